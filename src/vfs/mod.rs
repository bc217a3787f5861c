//! The tree as a file system: names, inode numbers, attributes, open files. In types of its own:
//! it knows nothing of FUSE, and tests use it without a mount.
//!
//! ```text
//!   node      inode numbers, computed                 tree     names: lookup, readdir, readlink
//!   attr      getattr: sizes, blocks, times, links    open     open, read, write, lseek
//!   change    mkdir, rmdir, rename; what is refused   text     what status, maps and XML say
//!   draft     documents that are being written        control  words that are obeyed at once
//!   refusals  last-error                              events   what happened
//!   status    the kinds of status                     content  bytes of frozen disks
//!   slices    current/ and slices/
//! ```
//!
//! Two rules hold everywhere. What does not need the domain does not wait for it: looking up a
//! name or listing a directory never asks, and [`Vfs::asks`] tells beforehand which other
//! operation may. And what a file shows is fixed when it is opened: a reader never sees the half of
//! one text and the half of another.

mod attr;
mod change;
mod content;
mod control;
mod draft;
mod events;
mod node;
mod open;
mod refusals;
mod slices;
mod status;
mod text;
mod tree;
mod types;

use std::sync::Arc;
use std::time::SystemTime;

use parking_lot::Mutex;

pub use node::{FileKind, Ino, Node};
pub use open::window;
pub use types::{Ask, Attr, Caching, Change, Created, DirEntry, Found, Handle, Opened, Seek};

use crate::engine::{Backup, CheckpointEntry, Domain, Job};
use crate::model::{Error, Kind, Result};

/// What the mount is, for `status` and for the owner of files.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Facts {
    /// The source as it was given.
    pub source: String,
    /// The options in force, by name.
    pub options: Vec<(String, String)>,
    /// Owner of everything.
    pub uid: u32,
    /// Group of everything.
    pub gid: u32,
    /// Name of the image that a `since/C/D.qcow2` is on top of: `{checkpoint}` and `{disk}` stand for
    /// C and D.
    pub backing: String,
    /// Others may look and read; otherwise the owner only.
    pub allow_other: bool,
}

/// The file system of one domain.
pub struct Vfs {
    domain: Arc<Domain>,
    facts: Facts,
    mounted: SystemTime,
    /// When `checkpoints/` and `backups/` last changed.
    changed: Mutex<Changed>,
    refusals: refusals::Refusals,
    events: events::Events,
    texts: text::Texts,
    drafts: draft::Drafts,
    files: open::Files,
}

struct Changed {
    checkpoints: SystemTime,
    backups: SystemTime,
}

impl Vfs {
    /// The tree of `domain`.
    pub fn new(domain: Arc<Domain>, facts: Facts) -> Self {
        let mounted = SystemTime::now();
        Self {
            events: events::Events::new(domain.subscribe()),
            domain,
            facts,
            mounted,
            changed: Mutex::new(Changed {
                checkpoints: mounted,
                backups: mounted,
            }),
            refusals: refusals::Refusals::default(),
            texts: text::Texts::default(),
            drafts: draft::Drafts::default(),
            files: open::Files::default(),
        }
    }

    /// The domain.
    pub fn domain(&self) -> &Arc<Domain> {
        &self.domain
    }

    /// What a number stands for, if it was ever given out.
    fn node(ino: Ino) -> Result<Node> {
        Node::of(ino).ok_or_else(|| {
            Error::new(
                Kind::NotFound,
                format!("there is no inode number {}", ino.0),
            )
        })
    }

    fn job(&self, id: u32) -> Result<Job> {
        self.domain
            .job_by_id(id)
            .ok_or_else(|| Error::new(Kind::NotFound, "the backup has ended"))
    }

    /// The backup of this number, of which there are disks to read.
    fn backup(&self, job: u32) -> Result<Arc<Backup>> {
        match self.job(job)? {
            Job::Pull(backup) => Ok(backup),
            Job::Push(_) => Err(Error::new(Kind::NotFound, "a push backup is not read here")),
        }
    }

    fn checkpoint(&self, id: u32) -> Result<Arc<CheckpointEntry>> {
        self.domain
            .checkpoint_by_id(id)
            .ok_or_else(|| Error::new(Kind::NotFound, "the checkpoint was deleted"))
    }

    /// Passes a result on; a refusal is written down in `last-error` and the log first. That a
    /// name is not there, or a file has no more data, is an answer and no refusal.
    fn noted<T>(&self, operation: impl FnOnce() -> String, result: Result<T>) -> Result<T> {
        match &result {
            Err(error) if matches!(error.kind(), Kind::NotFound | Kind::PastEnd) => result,
            _ => self.made(operation, result),
        }
    }

    /// The same of what was to be made: what is not there then is something that it needs.
    fn made<T>(&self, operation: impl FnOnce() -> String, result: Result<T>) -> Result<T> {
        if let Err(error) = &result {
            self.refusals.note(&operation(), error);
        }
        result
    }
}

/// Place of a disk as its inode number has it. Too many disks get a place that no number has.
fn disk_index(place: usize) -> u16 {
    u16::try_from(place).unwrap_or(u16::MAX)
}
