//! What is remembered of a domain's checkpoints between mounts: one small JSON file in the state
//! directory, replaced atomically, and a lock that keeps a second mount of the domain out.
//!
//! The bitmaps live in the images; what only we know is which bitmap belongs to which checkpoint,
//! its time, its order and what is known to be broken. An intent is written before the domain is
//! asked and cleared after it answered, so that a crash in between is found and undone at the next
//! start ([`Pending`]).

use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

use crate::model::{Checkpoint, Error, Kind, Name, Result};

/// The version of the file's form; a newer one is refused.
const VERSION: u32 = 1;

/// A change of the chain that was begun and not yet known to have ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Pending {
    /// The bitmaps of this checkpoint were about to be made.
    Create(Checkpoint),
    /// The bitmaps of this checkpoint were about to be removed.
    Delete(Name),
    /// The bitmaps of the first checkpoint were about to get the second name.
    Rename(Name, Name),
}

/// When somebody else's checkpoint was made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Kept {
    pub(super) name: Name,
    /// As its keeper says. With the name, it tells one checkpoint from another.
    pub(super) theirs: SystemTime,
    /// As it is shown here, where no two are of the same second.
    pub(super) shown: SystemTime,
}

/// The remembered state of a domain.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Record {
    version: u32,
    /// Checkpoints, oldest first.
    pub(super) checkpoints: Vec<Checkpoint>,
    /// The newest creation time given out so far, so that times rise even if the clock does not.
    pub(super) last_created: Option<SystemTime>,
    /// The times of checkpoints that somebody else keeps.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(super) kept: Vec<Kept>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) pending: Option<Pending>,
}

impl Default for Record {
    fn default() -> Self {
        Self {
            version: VERSION,
            checkpoints: Vec::new(),
            last_created: None,
            kept: Vec::new(),
            pending: None,
        }
    }
}

impl Record {
    /// Those of these checkpoints that somebody else keeps.
    pub(super) fn kept_of<'a>(&self, names: impl Iterator<Item = &'a Name>) -> Vec<Kept> {
        let names: Vec<&Name> = names.collect();
        let kept = self.kept.iter().filter(|k| names.contains(&&k.name));
        kept.cloned().collect()
    }

    /// A creation time for what is made now: in whole seconds, later than all before.
    pub(super) fn next_time(&self, now: SystemTime) -> SystemTime {
        let seconds = now
            .duration_since(SystemTime::UNIX_EPOCH)
            .unwrap_or_default()
            .as_secs();
        let floor = SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
        match self.last_created {
            Some(last) => floor.max(last + Duration::from_secs(1)),
            None => floor,
        }
    }
}

/// A domain's directory below the state directory, held for as long as the value lives.
#[derive(Debug)]
pub struct Store {
    dir: PathBuf,
    /// Holds the lock; the kernel drops it with the process.
    _lock: File,
}

impl Store {
    /// Takes `dir` for this mount: EBUSY when another mount of the domain holds it.
    pub fn open(dir: &Path) -> Result<Self> {
        let failed = |what: &str, e: std::io::Error| {
            Error::new(
                Kind::Io,
                format!("cannot {what} the state directory {}: {e}", dir.display()),
            )
            .hint("choose another with -o state=DIR")
        };
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(dir)
            .map_err(|e| failed("make", e))?;
        let lock = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(dir.join("lock"))
            .map_err(|e| failed("lock", e))?;
        match lock.try_lock() {
            Ok(()) => Ok(Self {
                dir: dir.to_owned(),
                _lock: lock,
            }),
            Err(fs::TryLockError::WouldBlock) => Err(Error::new(
                Kind::Busy,
                format!(
                    "this domain is already mounted by another fleecefs (it holds {})",
                    dir.join("lock").display()
                ),
            )
            .hint("use that mount, or unmount it first")),
            Err(fs::TryLockError::Error(e)) => Err(failed("lock", e)),
        }
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    pub(super) fn load(&self) -> Result<Record> {
        let path = self.path();
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(Record::default()),
            Err(e) => {
                return Err(Error::new(
                    Kind::Io,
                    format!("cannot read {}: {e}", path.display()),
                ));
            }
        };
        let record: Record = serde_json::from_slice(&text).map_err(|e| {
            Error::new(Kind::Io, format!("{} is damaged: {e}", path.display())).hint(
                "move the file away to start without checkpoints; the next backup is a full one",
            )
        })?;
        if record.version > VERSION {
            return Err(Error::new(
                Kind::Unsupported,
                format!(
                    "{} was written by a newer fleecefs (form {}, this one knows {VERSION})",
                    path.display(),
                    record.version
                ),
            ));
        }
        Ok(record)
    }

    /// Replaces the file: after a crash there is the old one or the new one, whole.
    pub(super) fn save(&self, record: &Record) -> Result<()> {
        let path = self.path();
        let temporary = self.dir.join("checkpoints.json.new");
        let write = || -> std::io::Result<()> {
            let mut file = OpenOptions::new()
                .create(true)
                .truncate(true)
                .write(true)
                .mode(0o600)
                .open(&temporary)?;
            serde_json::to_writer_pretty(&mut file, record)?;
            file.write_all(b"\n")?;
            file.sync_all()?;
            fs::rename(&temporary, &path)?;
            File::open(&self.dir)?.sync_all()
        };
        write().map_err(|e| {
            let kind = match e.kind() {
                ErrorKind::StorageFull | ErrorKind::QuotaExceeded => Kind::NoSpace,
                _ => Kind::Io,
            };
            Error::new(kind, format!("cannot write {}: {e}", path.display()))
        })
    }

    fn path(&self) -> PathBuf {
        self.dir.join("checkpoints.json")
    }
}
