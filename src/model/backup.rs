//! A backup: the domain's disks frozen at one instant.

use super::NewCheckpoint;

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
}
