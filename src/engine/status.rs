//! How a checkpoint stands now, disk by disk.

use super::history::Chain;
use crate::model::{Checkpoint, CheckpointDisk, Disk};

/// How a checkpoint stands, disk by disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CheckpointStatus {
    /// The disks that the checkpoint covers.
    pub disks: Vec<DiskStatus>,
}

/// How a checkpoint stands on one disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DiskStatus {
    /// It can be trusted.
    Trusted {
        /// The disk target.
        target: String,
        /// Its own bitmap records (it is the newest); otherwise a later one does.
        recording: bool,
        /// Bytes changed since, at most: bitmaps that overlap are counted twice.
        changed_at_most: u64,
    },
    /// It can no longer be trusted.
    Broken {
        /// The disk target.
        target: String,
        /// Why not.
        why: String,
    },
    /// The domain has no such disk now.
    Absent {
        /// The disk target.
        target: String,
    },
}

impl DiskStatus {
    /// Bytes changed since on the disk of this target, at most, where that is known.
    pub fn changed_at_most(&self, disk: &str) -> Option<u64> {
        match self {
            Self::Trusted {
                target,
                changed_at_most,
                ..
            } if target == disk => Some(*changed_at_most),
            _ => None,
        }
    }
}

/// How one disk of the checkpoint at `place` stands.
pub(super) fn disk_status(
    entry: &CheckpointDisk,
    place: usize,
    disks: &[Disk],
    all: &[&Checkpoint],
) -> DiskStatus {
    let target = entry.target.clone();
    let Some(disk) = disks.iter().find(|d| d.target == target) else {
        return DiskStatus::Absent { target };
    };
    let chain = Chain::of(disk, all);
    let Some(first) = chain.links.iter().position(|l| l.0 == place) else {
        let branch = || "it is on a branch that does not lead to the present".to_owned();
        let why = chain.broken.unwrap_or_else(branch);
        return DiskStatus::Broken { target, why };
    };
    let dirty = |name: &String| disk.bitmaps.iter().find(|b| b.name == *name);
    let links = &chain.links[first..];
    let mut sum: u64 = 0;
    for bitmap in links.iter().filter_map(|l| dirty(&l.1)) {
        sum = sum.saturating_add(bitmap.dirty_bytes);
        // What records holds all that later ones do: of libvirt's bitmaps every one.
        if bitmap.recording {
            break;
        }
    }
    DiskStatus::Trusted {
        target,
        recording: links.len() == 1,
        changed_at_most: sum.min(disk.size),
    }
}
