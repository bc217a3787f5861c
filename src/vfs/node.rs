//! What an inode number stands for. Numbers are computed, both ways, and never looked up:
//!
//! ```text
//!   bit  63        40 39        16 15      6 5    0
//!       | checkpoint |    job     |  disk   | kind |
//! ```
//!
//! So there is no table that grows with every lookup and no count of references to keep. Numbers
//! of jobs, checkpoints and drafts are never given out twice while the mount lives, hence neither
//! are these: whatever the kernel still caches under a number can never show other content.
//!
//! Slices are the exception. Backup tools take a file for another one when its number changes, so a
//! slice has the same number every night, made of its disk, its place on it and its backup's place
//! among those that run:
//!
//! ```text
//!   bit  63            24 23    16 15      6 5    0
//!       |     slice      |  slot  |  disk   | kind |
//! ```
//!
//! What the kernel caches of it is told apart by the generation that goes with the number
//! ([`Found::generation`](super::Found::generation)).

use crate::model::{Error, Kind, Result};

/// An inode number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Ino(pub u64);

impl Ino {
    /// The root directory.
    pub const ROOT: Self = Self(1);
}

/// Number of a checkpoint ([`crate::engine::CheckpointEntry::id`]).
pub type CheckpointId = u32;
/// Number of a backup.
pub type Job = u32;
/// Number of a document that is being written, where a checkpoint's would be.
pub type DraftId = u32;
/// Place of a disk in its backup.
pub type DiskIndex = u16;
/// Place of a backup among those that run ([`crate::engine::Backup::slot`]); 0 is whichever holds
/// `current/`.
pub type Slot = u8;

/// The slot of `current/`.
pub const CURRENT: Slot = 0;

/// By which way to a backup's slices.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Via {
    /// `current/`
    Current,
    /// `backups/B/slices/`
    Backup,
}

/// Everything that the tree can hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Node {
    /// The mount point.
    Root,
    /// `domain.xml`
    DomainXml,
    /// `status`
    Status,
    /// `last-error`
    LastError,
    /// `events`
    Events,
    /// `checkpoints/`
    Checkpoints,
    /// `checkpoints/C/`
    Checkpoint(CheckpointId),
    /// `checkpoints/C/checkpoint.xml`
    CheckpointXml(CheckpointId),
    /// `checkpoints/C/status`
    CheckpointStatus(CheckpointId),
    /// `checkpoints/C/control`
    CheckpointControl(CheckpointId),
    /// `checkpoints/C/parent`
    Parent(CheckpointId),
    /// `checkpoints/C/children/`
    Children(CheckpointId),
    /// `checkpoints/C/children/D`
    Child(CheckpointId, CheckpointId),
    /// `checkpoints/C.xml`, while it is being written
    CheckpointDraft(DraftId),
    /// `backups/`
    Backups,
    /// `backups/B.xml`, while it is being written
    BackupDraft(DraftId),
    /// `backups/B/`
    Backup(Job),
    /// `backups/B/backup.xml`
    BackupXml(Job),
    /// `backups/B/checkpoint.xml`
    BackupCheckpointXml(Job),
    /// `backups/B/domain.xml`
    BackupDomainXml(Job),
    /// `backups/B/status`
    BackupStatus(Job),
    /// `backups/B/control`
    BackupControl(Job),
    /// `backups/B/dirty.map`
    DirtyMap(Job),
    /// `backups/B/raw/`
    RawDir(Job),
    /// `backups/B/raw/D.raw`; the first disk's is also `backups/B/disk.raw`
    Raw(Job, DiskIndex),
    /// `backups/B/map/`
    MapDir(Job),
    /// `backups/B/map/D.map`
    Map(Job, DiskIndex),
    /// `backups/B/since/`
    SinceDir(Job),
    /// `backups/B/since/C/`
    Since(Job, CheckpointId),
    /// `backups/B/since/C/D.map`
    SinceMap(Job, CheckpointId, DiskIndex),
    /// `backups/B/since/C/D.json`
    SinceJson(Job, CheckpointId, DiskIndex),
    /// `backups/B/since/C/D.bmap`
    SinceBmap(Job, CheckpointId, DiskIndex),
    /// `backups/B/since/C/D.raw`
    SinceRaw(Job, CheckpointId, DiskIndex),
    /// `backups/B/since/C/D.qcow2`
    SinceQcow2(Job, CheckpointId, DiskIndex),
    /// `backups/B/qcow2/`
    Qcow2Dir(Job),
    /// `backups/B/qcow2/D.qcow2`
    Qcow2(Job, DiskIndex),
    /// `current/`
    Current,
    /// `backups/B/slices/`
    Slices(Job),
    /// `manifest` in either
    Manifest(Job),
    /// `D/` in either
    SliceDisk(Via, Job, DiskIndex),
    /// `D/NNNN/` in either
    SliceDir(Via, Job, DiskIndex, u32),
    /// `D/NNNN/NNNNNNN` in either
    Slice(Slot, DiskIndex, u64),
}

const KIND_BITS: u32 = 6;
const DISK_BITS: u32 = 10;
const ID_BITS: u32 = 24;
const SLOT_BITS: u32 = 8;
const SLICE_BITS: u32 = 40;
const SLICE_KIND: u64 = 44;

impl Node {
    /// The inode number. Fails after sixteen million backups or checkpoints in one mount, rather
    /// than use a number again.
    pub fn ino(self) -> Result<Ino> {
        let none_left = || {
            Error::new(
                Kind::Unsupported,
                "there are no inode numbers left for this mount",
            )
            .hint("unmount and mount again")
        };
        if let Self::Slice(slot, disk, slice) = self {
            if slice >> SLICE_BITS != 0 || disk >> DISK_BITS != 0 {
                return Err(none_left());
            }
            let id = slice << (KIND_BITS + DISK_BITS + SLOT_BITS)
                | u64::from(slot) << (KIND_BITS + DISK_BITS)
                | u64::from(disk) << KIND_BITS;
            return Ok(Ino(id | SLICE_KIND));
        }
        let (kind, disk, job, checkpoint) = self.fields();
        if job >> ID_BITS != 0 || checkpoint >> ID_BITS != 0 || disk >> DISK_BITS != 0 {
            return Err(none_left());
        }
        let id = u64::from(checkpoint) << (KIND_BITS + DISK_BITS + ID_BITS)
            | u64::from(job) << (KIND_BITS + DISK_BITS)
            | u64::from(disk) << KIND_BITS;
        Ok(Ino(id | kind))
    }

    /// What a number stands for; `None` if it was never given out.
    pub fn of(ino: Ino) -> Option<Self> {
        let field = |shift: u32, bits: u32| (ino.0 >> shift) & ((1 << bits) - 1);
        let disk = field(KIND_BITS, DISK_BITS) as DiskIndex;
        let job = field(KIND_BITS + DISK_BITS, ID_BITS) as Job;
        let c = field(KIND_BITS + DISK_BITS + ID_BITS, ID_BITS) as CheckpointId;
        let node = match field(0, KIND_BITS) {
            1 => Self::Root,
            2 => Self::DomainXml,
            3 => Self::Status,
            4 => Self::LastError,
            5 => Self::Checkpoints,
            6 => Self::Checkpoint(c),
            7 => Self::CheckpointXml(c),
            8 => Self::CheckpointStatus(c),
            9 => Self::Parent(c),
            10 => Self::Children(c),
            11 => Self::Child(c, job),
            12 => Self::Backups,
            13 => Self::Backup(job),
            14 => Self::BackupXml(job),
            15 => Self::BackupCheckpointXml(job),
            16 => Self::BackupDomainXml(job),
            17 => Self::BackupStatus(job),
            18 => Self::DirtyMap(job),
            19 => Self::RawDir(job),
            20 => Self::Raw(job, disk),
            21 => Self::MapDir(job),
            22 => Self::Map(job, disk),
            23 => Self::SinceDir(job),
            24 => Self::Since(job, c),
            25 => Self::SinceMap(job, c, disk),
            26 => Self::Events,
            27 => Self::CheckpointControl(c),
            28 => Self::CheckpointDraft(c),
            29 => Self::BackupDraft(c),
            30 => Self::BackupControl(job),
            31 => Self::SinceJson(job, c, disk),
            32 => Self::SinceBmap(job, c, disk),
            33 => Self::SinceRaw(job, c, disk),
            34 => Self::SinceQcow2(job, c, disk),
            35 => Self::Qcow2Dir(job),
            36 => Self::Qcow2(job, disk),
            37 => Self::Current,
            38 => Self::Slices(job),
            39 => Self::Manifest(job),
            40 => Self::SliceDisk(Via::Current, job, disk),
            41 => Self::SliceDisk(Via::Backup, job, disk),
            42 => Self::SliceDir(Via::Current, job, disk, c),
            43 => Self::SliceDir(Via::Backup, job, disk, c),
            44 => Self::Slice(
                field(KIND_BITS + DISK_BITS, SLOT_BITS) as Slot,
                disk,
                field(KIND_BITS + DISK_BITS + SLOT_BITS, SLICE_BITS),
            ),
            _ => return None,
        };
        // Bits that the kind has no use for must be clear, so that one thing has one number.
        (node.ino().ok() == Some(ino)).then_some(node)
    }

    /// Kind, disk, job and checkpoint. A slice has neither of the last two.
    fn fields(self) -> (u64, DiskIndex, Job, CheckpointId) {
        match self {
            Self::Root => (1, 0, 0, 0),
            Self::DomainXml => (2, 0, 0, 0),
            Self::Status => (3, 0, 0, 0),
            Self::LastError => (4, 0, 0, 0),
            Self::Checkpoints => (5, 0, 0, 0),
            Self::Checkpoint(c) => (6, 0, 0, c),
            Self::CheckpointXml(c) => (7, 0, 0, c),
            Self::CheckpointStatus(c) => (8, 0, 0, c),
            Self::Parent(c) => (9, 0, 0, c),
            Self::Children(c) => (10, 0, 0, c),
            Self::Child(c, child) => (11, 0, child, c),
            Self::Backups => (12, 0, 0, 0),
            Self::Backup(job) => (13, 0, job, 0),
            Self::BackupXml(job) => (14, 0, job, 0),
            Self::BackupCheckpointXml(job) => (15, 0, job, 0),
            Self::BackupDomainXml(job) => (16, 0, job, 0),
            Self::BackupStatus(job) => (17, 0, job, 0),
            Self::DirtyMap(job) => (18, 0, job, 0),
            Self::RawDir(job) => (19, 0, job, 0),
            Self::Raw(job, disk) => (20, disk, job, 0),
            Self::MapDir(job) => (21, 0, job, 0),
            Self::Map(job, disk) => (22, disk, job, 0),
            Self::SinceDir(job) => (23, 0, job, 0),
            Self::Since(job, c) => (24, 0, job, c),
            Self::SinceMap(job, c, disk) => (25, disk, job, c),
            Self::Events => (26, 0, 0, 0),
            Self::CheckpointControl(c) => (27, 0, 0, c),
            Self::CheckpointDraft(draft) => (28, 0, 0, draft),
            Self::BackupDraft(draft) => (29, 0, 0, draft),
            Self::BackupControl(job) => (30, 0, job, 0),
            Self::SinceJson(job, c, disk) => (31, disk, job, c),
            Self::SinceBmap(job, c, disk) => (32, disk, job, c),
            Self::SinceRaw(job, c, disk) => (33, disk, job, c),
            Self::SinceQcow2(job, c, disk) => (34, disk, job, c),
            Self::Qcow2Dir(job) => (35, 0, job, 0),
            Self::Qcow2(job, disk) => (36, disk, job, 0),
            Self::Current => (37, 0, 0, 0),
            Self::Slices(job) => (38, 0, job, 0),
            Self::Manifest(job) => (39, 0, job, 0),
            Self::SliceDisk(Via::Current, job, disk) => (40, disk, job, 0),
            Self::SliceDisk(Via::Backup, job, disk) => (41, disk, job, 0),
            Self::SliceDir(Via::Current, job, disk, dir) => (42, disk, job, dir),
            Self::SliceDir(Via::Backup, job, disk, dir) => (43, disk, job, dir),
            Self::Slice(_, disk, _) => (SLICE_KIND, disk, 0, 0),
        }
    }

    /// The backup it belongs to.
    pub fn job(self) -> Option<Job> {
        match self {
            Self::Child(..) => None,
            _ => Some(self.fields().2).filter(|&job| job != 0),
        }
    }

    /// Directory, file or symbolic link.
    pub fn kind(self) -> FileKind {
        match self {
            Self::Root
            | Self::Checkpoints
            | Self::Checkpoint(_)
            | Self::Children(_)
            | Self::Backups
            | Self::Backup(_)
            | Self::RawDir(_)
            | Self::MapDir(_)
            | Self::SinceDir(_)
            | Self::Since(..)
            | Self::Qcow2Dir(_)
            | Self::Current
            | Self::Slices(_)
            | Self::SliceDisk(..)
            | Self::SliceDir(..) => FileKind::Directory,
            Self::Parent(_) | Self::Child(..) => FileKind::Symlink,
            _ => FileKind::File,
        }
    }

    /// The directory it is in; the root's is itself. A slice's is not told by its number: what stands
    /// for it is the next one that is.
    pub fn parent(self) -> Self {
        match self {
            Self::Root
            | Self::DomainXml
            | Self::Status
            | Self::LastError
            | Self::Events
            | Self::Checkpoints
            | Self::Backups
            | Self::Current => Self::Root,
            Self::Checkpoint(_) | Self::CheckpointDraft(_) => Self::Checkpoints,
            Self::CheckpointXml(c)
            | Self::CheckpointStatus(c)
            | Self::CheckpointControl(c)
            | Self::Parent(c)
            | Self::Children(c) => Self::Checkpoint(c),
            Self::Child(c, _) => Self::Children(c),
            Self::Backup(_) | Self::BackupDraft(_) => Self::Backups,
            Self::BackupXml(job)
            | Self::BackupCheckpointXml(job)
            | Self::BackupDomainXml(job)
            | Self::BackupStatus(job)
            | Self::BackupControl(job)
            | Self::DirtyMap(job)
            | Self::RawDir(job)
            | Self::MapDir(job)
            | Self::SinceDir(job)
            | Self::Qcow2Dir(job)
            | Self::Slices(job) => Self::Backup(job),
            Self::Qcow2(job, _) => Self::Qcow2Dir(job),
            Self::Raw(job, _) => Self::RawDir(job),
            Self::Map(job, _) => Self::MapDir(job),
            Self::Since(job, _) => Self::SinceDir(job),
            Self::SinceMap(job, c, _)
            | Self::SinceJson(job, c, _)
            | Self::SinceBmap(job, c, _)
            | Self::SinceRaw(job, c, _)
            | Self::SinceQcow2(job, c, _) => Self::Since(job, c),
            Self::Manifest(job) | Self::SliceDisk(Via::Backup, job, _) => Self::Slices(job),
            Self::SliceDisk(Via::Current, ..) | Self::Slice(CURRENT, ..) => Self::Current,
            Self::SliceDir(via, job, disk, _) => Self::SliceDisk(via, job, disk),
            Self::Slice(..) => Self::Backups,
        }
    }
}

/// What sort of file a node is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FileKind {
    /// A directory.
    Directory,
    /// A regular file.
    File,
    /// A symbolic link.
    Symlink,
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn node() -> impl Strategy<Value = Node> {
        let id = || 1u32..1 << ID_BITS;
        let slice = (any::<u8>(), 0u64..1 << SLICE_BITS);
        let parts = (0usize..44, id(), id(), 0u16..1 << DISK_BITS, slice);
        parts.prop_map(|(which, c, job, disk, (slot, slice))| {
            [
                Node::Root,
                Node::DomainXml,
                Node::Status,
                Node::LastError,
                Node::Checkpoints,
                Node::Checkpoint(c),
                Node::CheckpointXml(c),
                Node::CheckpointStatus(c),
                Node::Parent(c),
                Node::Children(c),
                Node::Child(c, job),
                Node::Backups,
                Node::Backup(job),
                Node::BackupXml(job),
                Node::BackupCheckpointXml(job),
                Node::BackupDomainXml(job),
                Node::BackupStatus(job),
                Node::DirtyMap(job),
                Node::RawDir(job),
                Node::Raw(job, disk),
                Node::MapDir(job),
                Node::Map(job, disk),
                Node::SinceDir(job),
                Node::Since(job, c),
                Node::SinceMap(job, c, disk),
                Node::Events,
                Node::CheckpointControl(c),
                Node::CheckpointDraft(c),
                Node::BackupDraft(c),
                Node::BackupControl(job),
                Node::SinceJson(job, c, disk),
                Node::SinceBmap(job, c, disk),
                Node::SinceRaw(job, c, disk),
                Node::SinceQcow2(job, c, disk),
                Node::Qcow2Dir(job),
                Node::Qcow2(job, disk),
                Node::Current,
                Node::Slices(job),
                Node::Manifest(job),
                Node::SliceDisk(Via::Current, job, disk),
                Node::SliceDisk(Via::Backup, job, disk),
                Node::SliceDir(Via::Current, job, disk, c),
                Node::SliceDir(Via::Backup, job, disk, c),
                Node::Slice(slot, disk, slice),
            ][which]
        })
    }

    proptest! {
        #[test]
        fn there_and_back(node in node()) {
            prop_assert_eq!(Node::of(node.ino().unwrap()), Some(node));
        }

        #[test]
        fn different_things_have_different_numbers(a in node(), b in node()) {
            prop_assert_eq!(a == b, a.ino().unwrap() == b.ino().unwrap());
        }

        #[test]
        fn a_number_stands_for_one_thing_or_none(number in any::<u64>()) {
            if let Some(node) = Node::of(Ino(number)) {
                prop_assert_eq!(node.ino().unwrap(), Ino(number));
            }
        }

        #[test]
        fn everything_hangs_from_the_root(node in node()) {
            let mut at = node;
            for _ in 0..6 {
                at = at.parent();
                prop_assert_eq!(at.kind(), FileKind::Directory);
            }
            prop_assert_eq!(at, Node::Root);
        }
    }

    #[test]
    fn the_root_is_number_one_and_numbers_run_out_loudly() {
        assert_eq!(Node::Root.ino().unwrap(), Ino::ROOT);
        assert!(Node::of(Ino(0)).is_none());
        assert!(Node::Backup(1 << ID_BITS).ino().is_err());
        assert!(Node::Raw(1, 1 << DISK_BITS).ino().is_err());
    }
}
