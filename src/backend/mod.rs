//! What a source of disks must be able to do, and the sources themselves.
//!
//! Everything above this module works on the traits alone. A backend knows nothing of names in a
//! tree, of metadata or of which bitmaps belong together: it is told what to do to which bitmap,
//! does it on all disks at one instant or not at all, and hands out frozen disks.

use std::ops::Range;

use crate::model::{
    Allocation, BackupPlan, Checkpoint, CheckpointRemoval, Control, Disk, DomainInfo, Error,
    Extents, JobId, JobState, Name, NewCheckpoint, Outcome, PushPlan, RenameBitmap, Result,
};

pub mod found;
mod front;
#[cfg(feature = "libvirt")]
mod libvirt;
mod names;
mod over_nbd;
mod qemu;
mod rundir;
mod scratch;
pub mod sim;
mod source;
mod storage_daemon;
mod target;
mod watch;

pub use rundir::make_passable;
pub use source::{Places, Source};

/// A domain whose disks can be marked and frozen.
///
/// Every method that asks the domain has a deadline (ETIMEDOUT) and says ENOTCONN when the domain
/// is gone. A method that fails has changed nothing.
pub trait Backend: Send + Sync {
    /// Who the domain is. No I/O.
    fn info(&self) -> DomainInfo;

    /// Why the domain can no longer be reached, once that is known for good. No I/O.
    fn failure(&self) -> Option<Error> {
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

    /// Gives bitmaps other names, all at once.
    fn rename_checkpoint(&self, renames: &[RenameBitmap]) -> Result<()>;

    /// The checkpoints, where the domain's own management keeps them: each after its parent, and
    /// whatever others made of them. None where nobody does: the engine remembers them then, and
    /// none of the four methods below is called. Asks.
    fn own_checkpoints(&self) -> Result<Option<Vec<Checkpoint>>> {
        Ok(None)
    }

    /// The same as last seen, and a number that is another one whenever they are; None while it still
    /// is `number`. No I/O.
    fn seen_checkpoints(&self, number: u64) -> Option<(u64, Vec<Checkpoint>)> {
        let _ = number;
        None
    }

    /// Forgets a checkpoint and leaves its bitmaps.
    fn forget_checkpoint(&self, name: &Name) -> Result<()> {
        let _ = name;
        Ok(())
    }

    /// Takes up a checkpoint of which only the bitmaps are left; with `validate` they must be sound.
    fn redefine_checkpoint(&self, again: &Checkpoint, validate: bool) -> Result<()> {
        let _ = (again, validate);
        Ok(())
    }

    /// Why a backup can list the changes since its base only, where that is so. No I/O.
    fn only_base(&self) -> Option<&'static str> {
        None
    }

    /// Freezes disks at one instant, in the order of the plan.
    fn begin(&self, plan: &BackupPlan) -> Result<Box<dyn Frozen>>;

    /// Begins to copy disks, as they are at one instant, into targets.
    fn push(&self, plan: &PushPlan) -> Result<Box<dyn Pushing>>;

    /// Has `listener` told what happens to backups by itself. Called once, before any backup; the
    /// listener is quick and calls nothing here.
    fn listen(&self, listener: Listener);

    /// Leaves nothing behind: called once, after all backups were ended.
    fn close(&self) -> Result<()>;
}

/// Who is told of what happens by itself.
pub type Listener = Box<dyn Fn(Notice) + Send + Sync>;

/// What happens to a backup by itself.
#[derive(Debug, Clone)]
pub enum Notice {
    /// It is over: a push backup was written or failed, a pull backup had to be ended.
    Over(JobId, std::result::Result<Outcome, Error>),
    /// Scratch space gets short: the backup's number, bytes taken, bytes that may be taken.
    ScratchThreshold(JobId, u64, u64),
}

/// A push backup, until [`end`](Pushing::end).
pub trait Pushing: Send + Sync {
    /// How each disk stands, in the order of the plan; the last answer if the domain has none now.
    fn progress(&self) -> Vec<Progress>;

    /// How the whole stands. No I/O.
    fn state(&self) -> JobState;

    /// Breaks it off, halts it, lets it go on, or sets its speed.
    fn control(&self, command: Control) -> Result<()>;

    /// Breaks it off if it still runs, and leaves nothing of it in the domain. May be called again
    /// after an error.
    fn end(&self) -> Result<()>;
}

/// How the copying of one disk stands.
#[derive(Debug, Clone)]
pub struct Progress {
    /// Its part of the job.
    pub state: JobState,
    /// Bytes copied so far.
    pub done: u64,
    /// Bytes there are to copy.
    pub total: u64,
}

/// Disks frozen at one instant, until [`end`](Frozen::end).
pub trait Frozen: Send + Sync {
    /// The frozen disks, in the order of the plan.
    fn disks(&self) -> &[Box<dyn FrozenDisk>];

    /// Why the backup came to an end by itself, if it did: scratch space full, domain gone. No I/O.
    fn failure(&self) -> Option<Error>;

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

    /// What is data and what reads as zeros in a part of the disk, from its beginning on. Asks each
    /// time; the caller keeps it.
    fn allocation(&self, part: Range<u64>) -> Result<Extents<Allocation>>;

    /// What was written up to the instant: the union of the named bitmaps, which must not have
    /// changed since the instant, and of the frozen copy of the recording one. Asks each time.
    fn changed(&self, bitmaps: &[String]) -> Result<Extents<bool>>;

    /// Bytes fetched from the domain by `read_at` so far.
    fn bytes_pulled(&self) -> u64;
}
