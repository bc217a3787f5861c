//! A checkpoint: a point in time from which changes are known, one dirty bitmap a disk.
//!
//! Checkpoints of a domain form a chain by `parent` (a tree once documents can redefine them). On
//! each disk only the newest checkpoint's bitmap records; an older one holds what changed between
//! it and its successor. What changed since a checkpoint is the union from its bitmap to the
//! newest.

use std::time::SystemTime;

use serde::{Deserialize, Serialize};

use super::Name;

/// A checkpoint and what is remembered of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Checkpoint {
    /// Its name, unique in the domain.
    pub name: Name,
    /// When it was made; whole seconds, as in libvirt's `creationTime`, strictly rising.
    pub created: SystemTime,
    /// The checkpoint that was the newest before.
    pub parent: Option<Name>,
    /// Words for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
    /// The disks it covers.
    pub disks: Vec<CheckpointDisk>,
}

/// One disk of a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckpointDisk {
    /// The disk target.
    pub target: String,
    /// Name of the dirty bitmap.
    pub bitmap: String,
    /// Size of the disk in bytes when the checkpoint was made.
    pub size: u64,
    /// Path of the image that the disk was then. A name says little: with images given in another
    /// order it is another disk's, and that has bitmaps of the same names.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<String>,
    /// Why this disk's history is broken from here on, once that was found out. Kept because the
    /// evidence may go away: removing a broken successor would make this one look sound.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub broken: Option<Broken>,
}

/// Why the changes since a checkpoint are not all known, in words.
pub type Broken = String;

impl Checkpoint {
    /// Gives it another name, and to its bitmaps on the disks of these targets.
    pub fn rename(&mut self, name: &Name, disks: &[String]) {
        for disk in &mut self.disks {
            if disks.contains(&disk.target) {
                disk.bitmap = name.to_string();
            }
        }
        self.name = name.clone();
    }

    /// The entry for a disk, if the checkpoint covers it.
    pub fn disk(&self, target: &str) -> Option<&CheckpointDisk> {
        self.disks.iter().find(|d| d.target == target)
    }
}

/// What a backend does to make a checkpoint, on all disks at one instant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewCheckpoint {
    /// The new checkpoint's name.
    pub name: Name,
    /// Words for people; only who keeps checkpoints itself has a use for them.
    pub description: Option<String>,
    /// When it is meant to be made; the same goes for this.
    pub created: SystemTime,
    /// A bitmap for each disk it covers.
    pub bitmaps: Vec<NewBitmap>,
    /// The guest's file systems are to be frozen at the instant.
    pub quiesce: bool,
}

/// A bitmap to make, and the one that stops recording in its favour.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewBitmap {
    /// The disk target.
    pub target: String,
    /// Name of the new bitmap, which records from the instant on.
    pub bitmap: String,
    /// The bitmap that recorded until then, if there is one.
    pub stop: Option<String>,
    /// Bytes a bit stands for, where the domain's own choice is not wanted.
    pub granularity: Option<u64>,
}

/// A bitmap that gets another name, and keeps all that it holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RenameBitmap {
    /// The disk target.
    pub target: String,
    /// Its name now.
    pub from: String,
    /// Its name afterwards, which no bitmap of the disk has.
    pub to: String,
    /// It records, and goes on recording.
    pub recording: bool,
    /// Bytes a bit stands for.
    pub granularity: u64,
}

/// What a backend does to forget a checkpoint, on all disks at once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CheckpointRemoval {
    /// The checkpoint's name.
    pub name: Name,
    /// What happens on each disk that has its bitmap.
    pub bitmaps: Vec<RemoveBitmap>,
}

/// A bitmap to remove, and what inherits its content.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RemoveBitmap {
    /// The disk target.
    pub target: String,
    /// The bitmap that goes.
    pub bitmap: String,
    /// The parent's bitmap, which takes over the content; `None` where there is none to trust.
    pub merge_into: Option<String>,
    /// The parent's bitmap records again: the removed one was recording.
    pub resume: bool,
}
