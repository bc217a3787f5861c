//! What a backend is to do at the instant of a backup, on all disks at once.

use super::{Name, NewCheckpoint, ServerAddress, Target};

/// A backup's number, positive, unique while the mount lives: the RFC's job id.
pub type JobId = u32;

/// What a backend is to freeze, all in one transaction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackupPlan {
    /// The backup's number.
    pub id: JobId,
    /// The checkpoint to make at the same instant.
    pub checkpoint: Option<NewCheckpoint>,
    /// The disks to freeze.
    pub disks: Vec<FreezeDisk>,
    /// Where other NBD clients can read them, if anywhere.
    pub server: Option<ServerAddress>,
}

/// A disk to freeze.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FreezeDisk {
    /// The disk target.
    pub target: String,
    /// The bitmap that records up to the instant, of which a frozen copy is kept with the backup:
    /// the last link of every union that [`FrozenDisk::changed`] forms.
    ///
    /// [`FrozenDisk::changed`]: crate::backend::FrozenDisk::changed
    pub recording: Option<String>,
    /// The checkpoint whose changes are listed, where it can be trusted: what a backend goes by that
    /// lists those since one checkpoint only.
    pub base: Option<Name>,
    /// File for scratch space, where the usual place is not wanted.
    pub scratch: Option<String>,
    /// How other NBD clients find it, where there is a server for them.
    pub export: Option<PublicExport>,
}

/// A frozen disk as other NBD clients see it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PublicExport {
    /// Name of the export.
    pub name: String,
    /// The bitmap of changes in it: its name, and the older bitmaps whose union with the frozen copy
    /// it is.
    pub bitmap: Option<(String, Vec<String>)>,
}

/// What a backend is to copy into targets by itself, all of one instant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PushPlan {
    /// The backup's number.
    pub id: JobId,
    /// The checkpoint to make at the same instant.
    pub checkpoint: Option<NewCheckpoint>,
    /// The disks to copy.
    pub disks: Vec<CopyDisk>,
}

/// A disk to copy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CopyDisk {
    /// The disk target.
    pub disk: String,
    /// Where to.
    pub target: Target,
    /// The bitmaps whose union says what changed, oldest first; `None`: copy everything.
    pub changed: Option<Vec<String>>,
    /// The checkpoint since which that is: what a backend goes by that merges bitmaps itself.
    pub base: Option<Name>,
}
