//! The one place where a kind of refusal becomes an errno; the same table is in
//! `docs/semantics.md`.

use fuser::Errno;

use crate::model::Kind;

/// The errno of a refusal.
pub(super) fn errno(kind: Kind) -> Errno {
    match kind {
        Kind::Exists => Errno::EEXIST,
        Kind::NotFound => Errno::ENOENT,
        Kind::NotEmpty => Errno::ENOTEMPTY,
        Kind::NotADirectory => Errno::ENOTDIR,
        Kind::IsADirectory => Errno::EISDIR,
        Kind::Invalid => Errno::EINVAL,
        Kind::NameTooLong => Errno::ENAMETOOLONG,
        Kind::TooLarge => Errno::EFBIG,
        Kind::Busy => Errno::EBUSY,
        Kind::NoSpace => Errno::ENOSPC,
        Kind::Unsupported => Errno::EOPNOTSUPP,
        Kind::Stale => Errno::ESTALE,
        Kind::ReadOnly => Errno::EROFS,
        Kind::NotPermitted => Errno::EPERM,
        Kind::PastEnd => Errno::ENXIO,
        Kind::NotConnected => Errno::ENOTCONN,
        Kind::TimedOut => Errno::ETIMEDOUT,
        Kind::Io => Errno::EIO,
    }
}
