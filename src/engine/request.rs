//! What a caller wants of a checkpoint or a backup, in terms of disk targets: what a document says
//! once its disks and checkpoints were found.

use std::time::SystemTime;

use crate::model::{Name, ServerAddress, Target};

/// A checkpoint to make.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CheckpointRequest {
    /// Its name.
    pub name: Name,
    /// Words for people.
    pub description: Option<String>,
    /// The disks it covers; `None`: every disk that can carry a bitmap.
    pub disks: Option<Vec<BitmapRequest>>,
    /// The guest's file systems are to be frozen at the instant: EOPNOTSUPP where its agent is not
    /// known. (A backup's checkpoint goes by the mount's `quiesce`.)
    pub quiesce: bool,
}

impl CheckpointRequest {
    /// A checkpoint of every disk that can carry a bitmap.
    pub fn new(name: Name) -> Self {
        Self {
            name,
            description: None,
            disks: None,
            quiesce: false,
        }
    }
}

/// A disk of a [`CheckpointRequest`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BitmapRequest {
    /// The disk target.
    pub disk: String,
    /// Name of the bitmap; the checkpoint's where nothing is said.
    pub bitmap: Option<String>,
}

/// A checkpoint whose bitmaps are there, and of which nothing else is known any more: libvirt's
/// REDEFINE.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Redefinition {
    /// What it is called, says and covers.
    pub checkpoint: CheckpointRequest,
    /// When it was made.
    pub created: SystemTime,
    /// The checkpoint before it.
    pub parent: Option<Name>,
    /// The bitmaps must be there and sound: libvirt's REDEFINE_VALIDATE.
    pub validate: bool,
}

/// What a backup does about a checkpoint of its own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum OwnCheckpoint {
    /// One of the backup's name is made or, if there is one already, used; where the mount says
    /// `checkpoint=no`, none.
    Usual,
    /// None.
    No,
    /// This one is made.
    Make(CheckpointRequest),
}

/// A backup to begin.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackupRequest {
    /// Its name.
    pub name: Name,
    /// Who copies, and how.
    pub work: Work,
    /// The checkpoint to make at the same instant.
    pub checkpoint: OwnCheckpoint,
}

/// Who copies, and how.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Work {
    /// Disks to be read, and where other NBD clients can read them, if anywhere.
    Pull(Vec<PullDisk>, Option<ServerAddress>),
    /// Disks to be written to targets.
    Push(Vec<CopyRequest>),
}

/// Since when changes are listed or copied.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Base {
    /// Since the newest checkpoint before the backup; without one, or where it cannot be trusted,
    /// since ever.
    Newest,
    /// Since ever.
    Full,
    /// Since this checkpoint, which must be trusted on the disk.
    Since(Name),
}

/// A disk to be read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PullDisk {
    /// The disk target.
    pub disk: String,
    /// What its changes are listed since, as far as one choice counts: all checkpoints can be asked.
    pub base: Base,
    /// Name of the export for other NBD clients; the target where nothing is said.
    pub export_name: Option<String>,
    /// Name of the bitmap of changes in that export; `backup-TARGET` where nothing is said.
    pub export_bitmap: Option<String>,
    /// File for scratch space, where the usual place is not wanted.
    pub scratch: Option<String>,
}

impl PullDisk {
    /// A disk about which nothing is said.
    pub fn new(disk: impl Into<String>) -> Self {
        Self {
            disk: disk.into(),
            base: Base::Newest,
            export_name: None,
            export_bitmap: None,
            scratch: None,
        }
    }
}

/// A disk to be written to a target.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CopyRequest {
    /// The disk target.
    pub disk: String,
    /// Where to.
    pub target: Target,
    /// Since when changes are copied.
    pub base: Base,
}
