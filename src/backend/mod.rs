//! What a source of disks must be able to do, and the sources themselves.
//!
//! Everything above this module works on the traits alone. A backend knows nothing of names in a
//! tree, of metadata or of which bitmaps belong together: it is told what to do to which bitmap,
//! does it on all disks at one instant or not at all, and hands out frozen disks.

use crate::model::{
    Allocation, BackupPlan, CheckpointRemoval, Disk, DomainInfo, Extents, NewCheckpoint, Result,
};

mod qemu;
pub mod sim;
mod source;
mod storage_daemon;

pub use qemu::make_passable;
pub use source::{Places, Source};

/// A domain whose disks can be marked and frozen.
///
/// Every method that asks the domain has a deadline (ETIMEDOUT) and says ENOTCONN when the domain
/// is gone. A method that fails has changed nothing.
pub trait Backend: Send + Sync {
    /// Who the domain is. No I/O.
    fn info(&self) -> DomainInfo;

    /// Why the domain can no longer be reached, once that is known for good. No I/O.
    fn failure(&self) -> Option<crate::model::Error> {
        None
    }

    /// Removes what a fleecefs that was killed left behind in the domain. Called once, before anything
    /// else, by one who is certain that no other fleecefs works on the domain.
    fn tidy(&self) -> Result<()>;

    /// The disks as they are now, with their bitmaps: one look at the domain.
    fn disks(&self) -> Result<Vec<Disk>>;

    /// Makes the bitmaps of a checkpoint, all at one instant.
    fn create_checkpoint(&self, new: &NewCheckpoint) -> Result<()>;

    /// Removes the bitmaps of a checkpoint, all at once.
    fn delete_checkpoint(&self, removal: &CheckpointRemoval) -> Result<()>;

    /// Freezes disks at one instant, in the order of the plan.
    fn begin(&self, plan: &BackupPlan) -> Result<Box<dyn Frozen>>;

    /// Leaves nothing behind: called once, after all backups were ended.
    fn close(&self) -> Result<()>;
}

/// Disks frozen at one instant, until [`end`](Frozen::end).
pub trait Frozen: Send + Sync {
    /// The frozen disks, in the order of the plan.
    fn disks(&self) -> &[Box<dyn FrozenDisk>];

    /// Why the backup came to an end by itself, if it did: scratch space full, domain gone. No I/O.
    fn failure(&self) -> Option<crate::model::Error>;

    /// Bytes that the scratch space takes so far. No request to the domain.
    fn scratch_used(&self) -> u64;

    /// Bytes that the scratch space may take, where that is limited.
    fn scratch_limit(&self) -> Option<u64>;

    /// Thaws: reads in flight fail, and nothing of the backup is left in the domain. May be called
    /// again after an error, and after the backup ended by itself.
    fn end(&self) -> Result<()>;
}

/// One frozen disk.
pub trait FrozenDisk: Send + Sync {
    /// Size in bytes.
    fn size(&self) -> u64;

    /// Fills `buf` from `offset`; the caller stays within the size.
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()>;

    /// What is data and what reads as zeros. Asks each time; the caller keeps it.
    fn allocation(&self) -> Result<Extents<Allocation>>;

    /// What was written up to the instant: the union of the named bitmaps, which must not have
    /// changed since the instant, and of the frozen copy of the recording one. Asks each time.
    fn changed(&self, bitmaps: &[String]) -> Result<Extents<bool>>;

    /// Bytes fetched from the domain by `read_at` so far.
    fn bytes_pulled(&self) -> u64;
}
