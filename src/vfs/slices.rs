//! `current/` and `slices/`: the disks in slices whose times tell when they changed, so that tools
//! which go by times read what changed and nothing else. Names here ask nobody.
//!
//! Directories bear the number of their backup: one that is held open shows the instant that it
//! showed, or nothing any more. Slices bear the same number every night; see [`node`](super::node).

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use super::node::{CURRENT, DiskIndex, Job, Node, Slot, Via};
use super::{Vfs, disk_index};
use crate::engine::Backup;
use crate::model::{Error, Kind, Result};
use crate::view::manifest::{Manifest, ManifestDisk, Point};
use crate::view::slices::Cut;

impl Vfs {
    /// The backup whose slices are seen in a slot.
    pub(super) fn sliced(&self, slot: Slot) -> Result<Arc<Backup>> {
        let backup = match slot {
            CURRENT => self.domain.current_backup(),
            slot => self.domain.backup_in_slot(slot),
        };
        backup.ok_or_else(|| Error::new(Kind::NotFound, "the backup has ended"))
    }

    /// What is in `current/`: nothing while no backup holds it.
    pub(super) fn current_children(&self) -> Vec<(String, Node)> {
        match self.domain.current_backup() {
            Some(backup) => slices_children(&backup, Via::Current),
            None => Vec::new(),
        }
    }

    /// What is in `slices/`.
    pub(super) fn slices_children(&self, job: Job) -> Result<Vec<(String, Node)>> {
        Ok(slices_children(&*self.backup(job)?, Via::Backup))
    }

    /// The directories of a disk's slices.
    pub(super) fn slice_dirs(
        &self,
        via: Via,
        job: Job,
        disk: DiskIndex,
    ) -> Result<Vec<(String, Node)>> {
        let cut = cut(&*self.backup(job)?, disk)?;
        let all = 0..cut.directories();
        let dirs = all.filter_map(|dir| {
            let node = Node::SliceDir(via, job, disk, u32::try_from(dir).ok()?);
            Some((cut.directory_name(dir), node))
        });
        Ok(dirs.collect())
    }

    /// The slices in one of them.
    pub(super) fn slices_in(
        &self,
        via: Via,
        job: Job,
        disk: DiskIndex,
        dir: u32,
    ) -> Result<Vec<(String, Node)>> {
        let backup = self.backup(job)?;
        let (cut, slot) = (cut(&backup, disk)?, slot(&backup, via)?);
        let slices = cut.in_directory(dir.into());
        let slices = slices.map(|k| (cut.slice_name(k), Node::Slice(slot, disk, k)));
        Ok(slices.collect())
    }

    /// The same by name, without listing all.
    pub(super) fn slice_child(&self, parent: Node, name: &str) -> Result<Option<Node>> {
        Ok(match parent {
            Node::SliceDisk(via, job, disk) => {
                let dir = cut(&*self.backup(job)?, disk)?.directory_named(name);
                let dir = dir.and_then(|dir| u32::try_from(dir).ok());
                dir.map(|dir| Node::SliceDir(via, job, disk, dir))
            }
            Node::SliceDir(via, job, disk, dir) => {
                let backup = self.backup(job)?;
                let (cut, slot) = (cut(&backup, disk)?, slot(&backup, via)?);
                let slice = cut.slice_named(name);
                let slice = slice.filter(|k| cut.directory_of(*k) == u64::from(dir));
                slice.map(|k| Node::Slice(slot, disk, k))
            }
            _ => None,
        })
    }

    /// Path of a slice, for sentences.
    pub(super) fn slice_path(&self, slot: Slot, disk: DiskIndex, slice: u64) -> Option<String> {
        let backup = self.sliced(slot).ok()?;
        let cut = cut(&backup, disk).ok()?;
        let top = match slot {
            CURRENT => "current".to_owned(),
            _ => format!("backups/{}/slices", backup.name()),
        };
        let target = backup.disks().get(usize::from(disk))?.target();
        let dir = cut.directory_name(cut.directory_of(slice));
        Some(format!("{top}/{target}/{dir}/{}", cut.slice_name(slice)))
    }

    /// When a slice last changed; of a backup whose stamps were not asked for yet, its instant.
    pub(super) fn stamp(&self, slot: Slot, disk: DiskIndex, slice: u64) -> Result<SystemTime> {
        let backup = self.sliced(slot)?;
        let (start, _) = range(&backup, disk, slice)?;
        let stamps = backup.known_stamps(disk.into());
        let known = stamps.and_then(|s| s.clip(start, 1).next().map(|e| e.kind));
        Ok(match known {
            Some(unix) => SystemTime::UNIX_EPOCH + Duration::from_secs(unix),
            None => backup.begun(),
        })
    }

    /// What the manifest of a backup says.
    pub(super) fn manifest(&self, backup: &Backup) -> String {
        let info = self.domain.info();
        let disk = |disk: &crate::engine::BackupDisk| ManifestDisk {
            target: disk.target().to_owned(),
            size: disk.size(),
        };
        Manifest {
            domain: info.name,
            uuid: info.uuid,
            backup: backup.name().clone(),
            begun: unix(backup.begun()),
            checkpoint: backup.checkpoint_record().map(|c| Point {
                name: c.name.clone(),
                unix: unix(c.created),
            }),
            base: backup.base().map(|b| Point {
                name: b.name.clone(),
                unix: unix(b.created),
            }),
            slice_size: backup.cut(0).map_or(0, |cut| cut.slice),
            disks: backup.disks().iter().map(disk).collect(),
        }
        .write()
    }
}

/// Offset and length of a slice on its disk.
pub(super) fn range(backup: &Backup, disk: DiskIndex, slice: u64) -> Result<(u64, u64)> {
    let none = || Error::new(Kind::NotFound, format!("there is no slice {slice}"));
    cut(backup, disk)?.range(slice).ok_or_else(none)
}

fn cut(backup: &Backup, disk: DiskIndex) -> Result<Cut> {
    let none = || Error::new(Kind::NotFound, format!("there is no disk number {disk}"));
    backup.cut(disk.into()).ok_or_else(none)
}

fn slot(backup: &Backup, via: Via) -> Result<Slot> {
    match via {
        Via::Current => Ok(CURRENT),
        Via::Backup => backup.slot().ok_or_else(|| {
            Error::new(Kind::NotFound, "too many backups run for this one's slices")
        }),
    }
}

fn slices_children(backup: &Backup, via: Via) -> Vec<(String, Node)> {
    let job = backup.id();
    let mut list = vec![("domain.xml".to_owned(), Node::BackupDomainXml(job))];
    if backup.checkpoint().is_some() {
        list.push(("checkpoint.xml".to_owned(), Node::BackupCheckpointXml(job)));
    }
    list.push(("manifest".to_owned(), Node::Manifest(job)));
    for (i, disk) in backup.disks().iter().enumerate() {
        let node = Node::SliceDisk(via, job, disk_index(i));
        list.push((disk.target().to_owned(), node));
    }
    list
}

fn unix(time: SystemTime) -> u64 {
    super::refusals::unix(time)
}
