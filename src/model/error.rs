//! One error type for everything above the wire: a kind that decides the errno, a sentence for
//! `last-error`, and what to do about it.

use std::fmt;

/// The result of everything that can be refused.
pub type Result<T> = std::result::Result<T, Error>;

/// What sort of refusal this is. Each kind has exactly one errno (see `fuse/errno.rs` and the
/// table in `docs/semantics.md`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// EEXIST: the name is taken.
    Exists,
    /// ENOENT: there is nothing of that name.
    NotFound,
    /// ENOTEMPTY: the directory still holds what has to go first.
    NotEmpty,
    /// ENOTDIR: a directory is needed.
    NotADirectory,
    /// EISDIR: a file is needed.
    IsADirectory,
    /// EINVAL: a bad name, number or document.
    Invalid,
    /// ENAMETOOLONG: longer than a name may be.
    NameTooLong,
    /// EFBIG: more than a document may hold.
    TooLarge,
    /// EBUSY: something else holds what is needed; trying later can work.
    Busy,
    /// ENOSPC: scratch space would not hold.
    NoSpace,
    /// EOPNOTSUPP: the disk format, the QEMU version or the source cannot do it.
    Unsupported,
    /// ESTALE: the checkpoint can no longer be trusted.
    Stale,
    /// EROFS: writing what is read-only.
    ReadOnly,
    /// EPERM: an operation that the tree does not have.
    NotPermitted,
    /// ENXIO: SEEK_DATA or SEEK_HOLE at or past the end.
    PastEnd,
    /// ENOTCONN: the domain is gone.
    NotConnected,
    /// ETIMEDOUT: it did not answer within the deadline.
    TimedOut,
    /// EIO: a read or a write failed.
    Io,
}

/// A refusal: its kind, the sentence that says what failed and why, and what to do.
///
/// The sentence is complete without the hint and without its sources, because `last-error` and the
/// log are all that an administrator sees.
#[derive(Debug, Clone)]
pub struct Error {
    kind: Kind,
    message: String,
    hint: Option<String>,
}

impl Error {
    /// An error whose sentence is `message`: lower case, no full stop at the end.
    pub fn new(kind: Kind, message: impl Into<String>) -> Self {
        Self {
            kind,
            message: message.into(),
            hint: None,
        }
    }

    /// The same error with a hint: what to do, as an imperative.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// The same error, its sentence led by what was being done: `context: message`.
    #[must_use]
    pub fn during(mut self, context: impl fmt::Display) -> Self {
        self.message = format!("{context}: {}", self.message);
        self
    }

    /// What sort of refusal this is.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// The sentence without the hint.
    pub fn message(&self) -> &str {
        &self.message
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.hint {
            Some(hint) => write!(f, "{} ({hint})", self.message),
            None => f.write_str(&self.message),
        }
    }
}

impl std::error::Error for Error {}
