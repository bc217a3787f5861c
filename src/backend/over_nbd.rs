//! What every frozen disk that is read over NBD has in common, whoever exports it.

use crate::model::{Allocation, Error, Kind};
use crate::nbd;

/// Data connections of one disk: as many readers can wait for it at once.
pub(super) const CONNECTIONS: usize = 8;

/// What the flags of [`nbd::BASE_ALLOCATION`] mean.
pub(super) fn allocation(flags: u32) -> Allocation {
    Allocation {
        hole: flags & nbd::STATE_HOLE != 0,
        zero: flags & nbd::STATE_ZERO != 0,
    }
}

/// What two answers of a scratch overlay about one place say for sure.
///
/// One answer alone has a race: a cluster may be copied and then zeroed on the live disk between the
/// look at the overlay and the look at what lies beneath. If the first answer was overtaken, the
/// cluster had been copied when the second was asked for, and of a copied cluster the overlay tells
/// the truth; so what is zero in both answers is zero.
pub(super) fn surely(first: Allocation, second: Allocation) -> Allocation {
    Allocation {
        hole: first.hole && second.hole,
        zero: first.zero && second.zero,
    }
}

/// A failed NBD operation, for users.
pub(super) fn error(error: nbd::Error) -> Error {
    let kind = match error.fault {
        nbd::Fault::Timeout => Kind::TimedOut,
        nbd::Fault::Closed => Kind::NotConnected,
        _ => Kind::Io,
    };
    Error::new(kind, error.to_string())
}
