//! When each slice of a disk last changed, carried forward from backup to backup.
//!
//! A small table per disk lies in the state directory: the stamps as one backup saw them, and the
//! checkpoint from which on the next backup has to look. So a backup asks for one list of changes,
//! however many checkpoints there are. The table saves work and nothing else: without one, or with
//! one in doubt, the stamps are worked out from the checkpoints' bitmaps, and where those cannot be
//! trusted all slices get a new stamp.
//!
//! What keeps a stale table from doing harm:
//!
//! - A checkpoint is known by its time, which no other one has: it may be renamed, and one of its
//!   name may be another.
//! - If the table's checkpoint is gone, the newest one before it lists all that it would, and more.
//! - A table of a later instant (two backups at once) is no use to an earlier one.
//! - The table is replaced whole, after its backup's checkpoint was made. Killed in between, the
//!   next backup looks from the older checkpoint on.

use std::fs::{self, File, OpenOptions};
use std::io::{BufReader, BufWriter, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::SystemTime;

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use super::backup::{Backup, BackupDisk};
use crate::model::{Change, Error, Extents, Kind, Result};
use crate::view::slices::{self, Cut, Stamps};

/// The version of the file's form.
const VERSION: u32 = 1;

/// Intervals that are looked at to work stamps out anew. More would make fewer slices look new, and
/// each costs a look at a bitmap.
const HISTORY: usize = 32;

/// The stamps of a disk as one backup saw them.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Table {
    version: u32,
    disk: String,
    size: u64,
    slice_size: u64,
    /// The backup's instant, in seconds since 1970.
    instant: u64,
    /// The time of the checkpoint from which on later changes are known; no later than the instant.
    anchor: u64,
    /// (bytes, stamp) from the front.
    runs: Vec<(u64, u64)>,
}

impl Table {
    /// The stamps, if the table is of such a disk, and of an instant before `now`.
    fn stamps(&self, disk: &str, cut: Cut, now: u64) -> Option<Stamps> {
        let mut stamps = Extents::new();
        for &(bytes, stamp) in &self.runs {
            let whole = bytes.is_multiple_of(cut.slice) || stamps.size() + bytes == cut.size;
            if !whole || stamp > self.instant {
                return None;
            }
            stamps.push(bytes, stamp);
        }
        let same = self.version == VERSION
            && self.disk == disk
            && self.size == cut.size
            && self.slice_size == cut.slice
            && self.anchor <= self.instant
            && self.instant < now
            && stamps.size() == cut.size;
        same.then_some(stamps)
    }
}

/// The tables of a domain's disks.
pub(super) struct Tables {
    dir: PathBuf,
    slice: u64,
    /// Held while a table is replaced.
    writing: Mutex<()>,
}

impl Tables {
    /// Those in the state directory `dir`, for slices of so many bytes.
    pub(super) fn new(dir: PathBuf, slice: u64) -> Self {
        Self {
            dir,
            slice,
            writing: Mutex::new(()),
        }
    }

    pub(super) fn cut(&self, size: u64) -> Cut {
        Cut {
            size,
            slice: self.slice,
        }
    }

    /// Targets are names of files elsewhere in the tree, and so here.
    fn path(&self, disk: &str) -> PathBuf {
        self.dir.join(format!("slices-{disk}.json"))
    }

    fn load(&self, disk: &str) -> Option<Table> {
        let file = File::open(self.path(disk)).ok()?;
        let table = serde_json::from_reader(BufReader::new(file));
        let damaged = |e| log::warn!("{} is damaged: {e}", self.path(disk).display());
        table.map_err(damaged).ok()
    }

    /// Replaces a table, unless there is a later one.
    fn save(&self, table: &Table) {
        let _one = self.writing.lock();
        let later = self.load(&table.disk);
        if later.is_some_and(|later| later.instant >= table.instant) {
            return;
        }
        let path = self.path(&table.disk);
        let write = || -> std::io::Result<()> {
            let temporary = path.with_extension("new");
            let file = OpenOptions::new()
                .create(true)
                .truncate(true)
                .write(true)
                .mode(0o600)
                .open(&temporary)?;
            let mut out = BufWriter::new(file);
            serde_json::to_writer(&mut out, table)?;
            out.flush()?;
            out.get_ref().sync_all()?;
            fs::rename(&temporary, &path)
        };
        if let Err(e) = write() {
            let path = path.display();
            log::warn!("cannot write {path}: {e}; some slices will look changed that are not");
        }
    }
}

impl Backup {
    /// How a disk is cut into slices.
    pub fn cut(&self, disk: usize) -> Option<Cut> {
        let own = self.disks().get(disk)?;
        Some(self.tables.cut(own.size()))
    }

    /// When each slice of a disk last changed, in seconds since 1970; worked out once.
    pub fn stamps(&self, disk: usize) -> Result<Arc<Stamps>> {
        let none = || Error::new(Kind::NotFound, format!("there is no disk number {disk}"));
        let own = self.disks().get(disk).ok_or_else(none)?;
        own.stamps.get(|| self.work_out(disk, own))
    }

    /// The same if it was worked out already. Never waits.
    pub fn known_stamps(&self, disk: usize) -> Option<Arc<Stamps>> {
        self.disks().get(disk)?.stamps.known()
    }

    fn work_out(&self, disk: usize, own: &BackupDisk) -> Result<Stamps> {
        let cut = self.tables.cut(own.size());
        let now = seconds(self.begun());
        let stamps = match self.carried(own, cut, now) {
            Some((old, since)) => {
                let written = self.written(disk, since)?;
                slices::restamp(cut, &old, &written, now)
            }
            None => {
                let known = own.links.len().saturating_sub(HISTORY);
                let mut since = Vec::new();
                for link in &own.links[known..] {
                    since.push((seconds(link.created), self.written(disk, link.id)?));
                }
                slices::from_history(cut, &since, now)
            }
        };
        let covering = self.checkpoint_record();
        if let Some(checkpoint) = covering.filter(|c| c.disk(own.target()).is_some()) {
            self.tables.save(&Table {
                version: VERSION,
                disk: own.target().to_owned(),
                size: cut.size,
                slice_size: cut.slice,
                instant: now,
                anchor: seconds(checkpoint.created),
                runs: stamps.iter().map(|e| (e.length, e.kind)).collect(),
            });
        }
        Ok(stamps)
    }

    /// The stamps of an earlier backup, and the checkpoint since which changes come on top.
    fn carried(&self, own: &BackupDisk, cut: Cut, now: u64) -> Option<(Stamps, u32)> {
        let table = self.tables.load(own.target())?;
        let old = table.stamps(own.target(), cut, now)?;
        let mut links = own.links.iter().rev();
        let link = links.find(|l| seconds(l.created) <= table.anchor)?;
        Some((old, link.id))
    }

    fn written(&self, disk: usize, since: u32) -> Result<Extents<bool>> {
        Ok(self.changes(disk, since)?.map(|c| c != Change::Clean))
    }
}

fn seconds(time: SystemTime) -> u64 {
    time.duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs()
}
