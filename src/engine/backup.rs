//! A running backup: frozen disks, their maps made once, and reads that ask the domain only for
//! what is not known to be zeros.

use std::collections::HashMap;
use std::ops::{Deref, Range};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::SystemTime;

use parking_lot::Mutex;

use super::disk_map::DiskMap;
use super::job::Head;
use super::once::Once;
use super::stamps::Tables;
use crate::backend::{Frozen, FrozenDisk};
use crate::model::{
    Allocation, Change, Error, Extents, JobState, Kind, Name, Outcome, PublicExport, Result,
    ServerAddress,
};
use crate::view;
use crate::view::slices::Stamps;

/// A checkpoint that a backup can list the changes since.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Since {
    /// The checkpoint's number ([`CheckpointEntry::id`](super::CheckpointEntry::id)).
    pub id: u32,
    /// Its name when the backup began.
    pub name: Name,
    /// Its time, which is no other one's.
    pub created: SystemTime,
}

/// The domain's disks at one instant.
pub struct Backup {
    pub(super) head: Head,
    pub(super) base: Option<Since>,
    pub(super) since: Vec<Since>,
    pub(super) disks: Vec<BackupDisk>,
    /// Where other NBD clients can read the disks, if anywhere.
    pub(super) server: Option<ServerAddress>,
    pub(super) tables: Arc<Tables>,
    /// Why changes are known since the base only, where that is so.
    pub(super) only_base: Option<&'static str>,
    /// It holds `current/`, until it ends.
    pub(super) current: bool,
    /// Its place among the backups that run at the same time.
    pub(super) slot: Option<u8>,
    pub(super) frozen: Box<dyn Frozen>,
    /// It was broken off by its owner.
    pub(super) aborted: AtomicBool,
}

/// A checkpoint that can be trusted on a disk.
#[derive(Debug, Clone)]
pub(super) struct Link {
    /// The checkpoint's number.
    pub(super) id: u32,
    /// Its time, which is no other one's.
    pub(super) created: SystemTime,
    /// Its bitmap.
    pub(super) bitmap: String,
}

/// One disk of a backup.
pub struct BackupDisk {
    pub(super) target: String,
    pub(super) size: u64,
    pub(super) format: String,
    /// Why the disk is not part of the backup's checkpoint, if it is not.
    pub(super) note: Option<String>,
    /// The checkpoint that `dirty.map` lists the changes since.
    pub(super) base: Option<Since>,
    /// How other NBD clients find it, where there is a server for them.
    pub(super) export: Option<PublicExport>,
    /// Why older checkpoints cannot be trusted on this disk.
    pub(super) broken: Option<String>,
    /// The trusted checkpoints, oldest first, with their bitmaps; the last one recorded up to the
    /// instant, and its content is in the frozen copy.
    pub(super) links: Vec<Link>,
    pub(super) stamps: Once<Stamps>,
    pub(super) map: DiskMap,
    pub(super) changes: Mutex<HashMap<u32, Arc<Once<Extents<Change>>>>>,
}

impl BackupDisk {
    /// The disk target.
    pub fn target(&self) -> &str {
        &self.target
    }

    /// Size in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Format of the image in QEMU's words.
    pub fn format(&self) -> &str {
        &self.format
    }

    /// Why the disk is not part of the backup's checkpoint, if it is not.
    pub fn note(&self) -> Option<&str> {
        self.note.as_deref()
    }

    /// Why older checkpoints cannot be trusted on this disk, if they cannot.
    pub fn broken(&self) -> Option<&str> {
        self.broken.as_deref()
    }

    /// The checkpoint that `dirty.map` lists the changes since.
    pub fn base(&self) -> Option<&Since> {
        self.base.as_ref()
    }

    /// How other NBD clients find it, where there is a server for them.
    pub fn export(&self) -> Option<&PublicExport> {
        self.export.as_ref()
    }

    /// Whether the changes since the checkpoint of this number are known on this disk.
    pub fn knows_since(&self, checkpoint: u32) -> bool {
        self.links.iter().any(|l| l.id == checkpoint)
    }
}

impl Deref for Backup {
    type Target = Head;

    fn deref(&self) -> &Head {
        &self.head
    }
}

impl Backup {
    /// The checkpoint that changes are listed since, if it is the same on every disk: as a rule the
    /// newest before the backup's own.
    pub fn base(&self) -> Option<&Since> {
        self.base.as_ref()
    }

    /// Every checkpoint that can be trusted on at least one disk, oldest first.
    pub fn since(&self) -> &[Since] {
        &self.since
    }

    /// Why changes are known since the base only, where that is so.
    pub fn only_base(&self) -> Option<&'static str> {
        self.only_base
    }

    /// The disks, in the domain's order.
    pub fn disks(&self) -> &[BackupDisk] {
        &self.disks
    }

    /// Where other NBD clients can read the disks, if anywhere.
    pub fn server(&self) -> Option<&ServerAddress> {
        self.server.as_ref()
    }

    /// Whether it holds `current/`: it began while nobody did, and keeps it until it ends.
    pub fn holds_current(&self) -> bool {
        self.current
    }

    /// Its place among the backups that run at the same time, from 1: the lowest that was free. So a
    /// backup that runs alone, night after night, has the same one each time. None if all are taken.
    pub fn slot(&self) -> Option<u8> {
        self.slot
    }

    /// How it stands. Asks nobody.
    pub fn state(&self) -> JobState {
        match self.failure() {
            _ if self.aborted.load(Ordering::Acquire) => JobState::Ended(Outcome::Aborted),
            Some(why) => JobState::Failed(why),
            None => JobState::Running,
        }
    }

    /// Whether lists of changes still have to be made from this bitmap of a disk.
    pub(super) fn reads_bitmap(&self, target: &str, bitmap: &str) -> bool {
        let disk = self.disks.iter().find(|d| d.target == target);
        // The newest link is read from the frozen copy, not from the bitmap.
        disk.and_then(|d| d.links.split_last())
            .is_some_and(|(_, older)| older.iter().any(|l| l.bitmap == bitmap))
    }

    /// Why the backup ended by itself, if it did.
    pub fn failure(&self) -> Option<Error> {
        self.frozen.failure()
    }

    /// Bytes fetched from the domain so far, all disks.
    pub fn bytes_pulled(&self) -> u64 {
        self.frozen.disks().iter().map(|d| d.bytes_pulled()).sum()
    }

    /// Bytes of scratch space taken so far.
    pub fn scratch_used(&self) -> u64 {
        self.frozen.scratch_used()
    }

    /// Bytes of scratch space the backup may take, where that is limited.
    pub fn scratch_limit(&self) -> Option<u64> {
        self.frozen.scratch_limit()
    }

    /// What each part of a disk is; asked of the domain once.
    pub fn allocation(&self, disk: usize) -> Result<Arc<Extents<Allocation>>> {
        let (own, frozen) = self.disk(disk)?;
        own.map.whole(|part| self.ask(own, frozen, part))
    }

    /// What each part of a disk is, if the domain has been asked already. Never waits.
    pub fn known_allocation(&self, disk: usize) -> Option<Arc<Extents<Allocation>>> {
        self.disks.get(disk)?.map.known()
    }

    /// Bytes that are data in a part of a disk; none if that takes long to tell. It is asked meanwhile.
    pub fn data_within(
        self: &Arc<Self>,
        disk: usize,
        offset: u64,
        length: u64,
    ) -> Result<Option<u64>> {
        let (own, frozen) = self.disk(disk)?;
        let data = |map: &Extents<Allocation>, from: u64| {
            let data = map.clip(from, length).filter(|e| !e.kind.zero);
            data.map(|e| e.length).sum()
        };
        if own.map.is_in_one_piece(offset, length) && length > 0 {
            let piece = own.map.around(offset, |part| self.ask(own, frozen, part))?;
            return Ok(Some(data(&piece.map, offset - piece.start)));
        }
        let maker = Arc::clone(self);
        let map = own.map.soon(move || maker.allocation(disk))?;
        Ok(map.map(|map| data(&map, offset)))
    }

    /// What became of each part of a disk since a checkpoint, if the domain has been asked already.
    /// Never waits.
    pub fn known_changes(&self, disk: usize, checkpoint: u32) -> Option<Arc<Extents<Change>>> {
        let own = self.disks.get(disk)?;
        let cell = own.changes.lock().get(&checkpoint).cloned();
        cell?.known()
    }

    /// What became of each part of a disk since a checkpoint; asked of the domain once.
    pub fn changes(&self, disk: usize, checkpoint: u32) -> Result<Arc<Extents<Change>>> {
        let (own, frozen) = self.disk(disk)?;
        let Some(place) = own.links.iter().position(|l| l.id == checkpoint) else {
            return Err(self.no_history(own));
        };
        let cell = Arc::clone(
            own.changes
                .lock()
                .entry(checkpoint)
                .or_insert_with(|| Arc::new(Once::new())),
        );
        cell.get(|| {
            // The newest link is left to the frozen copy: the bitmap itself may go on recording.
            let older = &own.links[place..own.links.len() - 1];
            let bitmaps: Vec<String> = older.iter().map(|l| l.bitmap.clone()).collect();
            let dirty = frozen.changed(&bitmaps).map_err(|e| self.during(own, e))?;
            let dirty = self.whole(own, own.size, dirty)?;
            Ok(view::changes(&dirty, &*self.allocation(disk)?))
        })
    }

    /// What became of each part of a disk since its base. Without a base everything
    /// counts as changed; where the base cannot be trusted on this disk, ESTALE.
    pub fn changes_since_base(&self, disk: usize) -> Result<Arc<Extents<Change>>> {
        let (own, _) = self.disk(disk)?;
        match &own.base {
            Some(base) if own.knows_since(base.id) => self.changes(disk, base.id),
            Some(_) if own.broken.is_some() => Err(self.no_history(own)),
            _ => {
                let everything = Extents::uniform(own.size, true);
                Ok(Arc::new(view::changes(
                    &everything,
                    &*self.allocation(disk)?,
                )))
            }
        }
    }

    /// How many zeros a read of `length` bytes gets, if it is known already that it gets nothing else.
    /// Never waits.
    pub fn zeros_at(&self, disk: usize, offset: u64, length: usize) -> Option<usize> {
        let own = self.disks.get(disk)?;
        let left = own.size.saturating_sub(offset);
        let length = usize::try_from(left).map_or(length, |left| left.min(length));
        let known = own.map.known_around(offset)?;
        let zeros = offset + length as u64 <= known.end()
            && view::raw::is_zero(&known.map, offset - known.start, length as u64);
        (zeros && self.frozen.failure().is_none()).then_some(length)
    }

    /// Reads up to the end of `buf` or of the disk; the count of bytes read.
    pub fn read_at(&self, disk: usize, offset: u64, buf: &mut [u8]) -> Result<usize> {
        let (own, frozen) = self.disk(disk)?;
        if let Some(failure) = self.frozen.failure() {
            return Err(failure.during(format!("backup {}, disk {}", self.name, own.target)));
        }
        let left = own.size.saturating_sub(offset);
        let length = usize::try_from(left).map_or(buf.len(), |left| left.min(buf.len()));
        let mut rest = &mut buf[..length];
        let mut at = offset;
        while !rest.is_empty() {
            let known = own.map.around(at, |part| self.ask(own, frozen, part))?;
            let within = usize::try_from(known.end() - at).unwrap_or(usize::MAX);
            let (part, tail) = rest.split_at_mut(within.min(rest.len()));
            view::raw::read(&known.map, at - known.start, part, |from, part| {
                let from = known.start + from;
                frozen.read_at(from, part).map_err(|e| {
                    let what = format!("{} bytes at {from}", part.len());
                    self.during(own, e.during(what))
                })
            })?;
            at += part.len() as u64;
            rest = tail;
        }
        Ok(length)
    }

    /// What a part of a disk is.
    fn ask(
        &self,
        own: &BackupDisk,
        frozen: &dyn FrozenDisk,
        part: Range<u64>,
    ) -> Result<Extents<Allocation>> {
        let length = part.end - part.start;
        let map = frozen.allocation(part).map_err(|e| self.during(own, e))?;
        self.whole(own, length, map)
    }

    /// A map that does not end where it should would make offsets lie.
    fn whole<K: Copy + PartialEq>(
        &self,
        disk: &BackupDisk,
        length: u64,
        map: Extents<K>,
    ) -> Result<Extents<K>> {
        if map.size() == length {
            return Ok(map);
        }
        let message = format!("the map covers {} of {length} bytes", map.size());
        Err(self.during(disk, Error::new(Kind::Io, message)))
    }

    fn disk(&self, index: usize) -> Result<(&BackupDisk, &dyn FrozenDisk)> {
        let own = self.disks.get(index);
        let frozen = self.frozen.disks().get(index);
        own.zip(frozen).map(|(o, f)| (o, &**f)).ok_or_else(|| {
            Error::new(
                Kind::NotFound,
                format!("backup {} has no disk number {index}", self.name),
            )
        })
    }

    fn no_history(&self, disk: &BackupDisk) -> Error {
        let why = disk
            .broken
            .as_deref()
            .unwrap_or("the checkpoint does not cover this disk");
        Error::new(
            Kind::Stale,
            format!(
                "backup {}, disk {}: not all changes are known: {why}",
                self.name, disk.target
            ),
        )
        .hint("copy the whole disk this time")
    }

    fn during(&self, disk: &BackupDisk, error: Error) -> Error {
        error.during(format!("backup {}, disk {}", self.name, disk.target))
    }
}
