//! Names. Nothing here asks the domain, whatever state it is in: `ls -R` always works.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;
use std::time::Duration;

use super::node::{FileKind, Ino, Node};
use super::types::{DirEntry, FOREVER, Found, Handle, SHORTLY};
use super::{Vfs, disk_index};
use crate::engine::Backup;
use crate::model::{Error, Kind, Mode, Result};

impl Vfs {
    /// The file called `name` in a directory.
    ///
    /// What only the domain could tell (the blocks of a disk, the size of a map) may be missing
    /// from the attributes; they are then valid for no time at all, so that a real stat(2) asks
    /// again with [`getattr`](Self::getattr).
    pub fn lookup(&self, parent: Ino, name: &OsStr) -> Result<Found> {
        let parent = Self::node(parent)?;
        let mut found = self.found(self.child(parent, name)?)?;
        if parent == Node::Current {
            // Another backup's before long.
            found.name_ttl = Duration::ZERO;
        }
        Ok(found)
    }

    /// Where a symbolic link leads.
    pub fn readlink(&self, ino: Ino) -> Result<String> {
        match Self::node(ino)? {
            Node::Parent(c) => match &self.checkpoint(c)?.checkpoint.parent {
                Some(parent) => Ok(format!("../{parent}")),
                None => Err(Error::new(Kind::NotFound, "the checkpoint has no parent")),
            },
            Node::Child(_, child) => {
                Ok(format!("../../{}", self.checkpoint(child)?.checkpoint.name))
            }
            _ => Err(Error::new(Kind::Invalid, "not a symbolic link")),
        }
    }

    /// Opens a directory.
    pub fn opendir(&self, ino: Ino) -> Result<Handle> {
        let node = Self::node(ino)?;
        if node.kind() != FileKind::Directory {
            return Err(Error::new(Kind::NotADirectory, "not a directory"));
        }
        self.children(node)?;
        Ok(self.files.open_directory(node))
    }

    /// What is in an opened directory, with `.` and `..`. Entry `n` is followed by those from
    /// offset `n + 1` on. The list is made when reading starts at the front and stays the same
    /// until it does so again: offsets keep their meaning while names come and go.
    pub fn readdir(&self, handle: Handle, offset: u64) -> Result<Arc<[DirEntry]>> {
        let (node, listing) = self.files.directory(handle)?;
        let mut listing = listing.lock();
        if let (Some(entries), true) = (&*listing, offset != 0) {
            return Ok(Arc::clone(entries));
        }
        let entry = |name: &str, node: Node| {
            Ok(DirEntry {
                name: name.into(),
                ino: node.ino()?,
                kind: node.kind(),
            })
        };
        let mut entries = vec![entry(".", node)?, entry("..", node.parent())?];
        for (name, child) in self.children(node)? {
            entries.push(entry(&name, child)?);
        }
        let entries: Arc<[DirEntry]> = entries.into();
        *listing = Some(Arc::clone(&entries));
        Ok(entries)
    }

    pub(super) fn child(&self, parent: Node, name: &OsStr) -> Result<Node> {
        let none = || {
            let name = name.to_string_lossy();
            Error::new(Kind::NotFound, format!("there is no {name} here"))
        };
        let text = name.to_str().ok_or_else(none)?;
        let found = match parent {
            // Not by listing all: there may be hundreds.
            Node::Checkpoints => {
                let found = self.domain.checkpoint(text);
                let found = found.map(|c| Node::Checkpoint(c.id));
                found.or_else(|| self.shown_draft(parent, text))
            }
            Node::Backups => {
                let found = self.domain.job(text);
                let found = found.map(|job| Node::Backup(job.id()));
                found.or_else(|| self.shown_draft(parent, text))
            }
            Node::SliceDisk(..) | Node::SliceDir(..) => self.slice_child(parent, text)?,
            _ => {
                let mut all = self.children(parent)?.into_iter();
                all.find(|c| c.0.as_bytes() == name.as_bytes()).map(|c| c.1)
            }
        };
        found.ok_or_else(none)
    }

    fn shown_draft(&self, dir: Node, name: &str) -> Option<Node> {
        let mut all = self.drafts.shown_in(dir).into_iter();
        all.find(|d| d.file_name() == name).map(|d| d.node())
    }

    /// Every name in a directory.
    pub(super) fn children(&self, node: Node) -> Result<Vec<(String, Node)>> {
        let mut list = Vec::new();
        let mut add = |name: &str, node| list.push((name.to_owned(), node));
        match node {
            Node::Root => {
                add("domain.xml", Node::DomainXml);
                add("status", Node::Status);
                add("last-error", Node::LastError);
                add("events", Node::Events);
                add("checkpoints", Node::Checkpoints);
                add("backups", Node::Backups);
                add("current", Node::Current);
            }
            Node::Checkpoints => {
                for c in self.domain.checkpoints() {
                    add(c.checkpoint.name.as_str(), Node::Checkpoint(c.id));
                }
                for draft in self.drafts.shown_in(node) {
                    add(&draft.file_name(), draft.node());
                }
            }
            Node::Checkpoint(c) => {
                add("checkpoint.xml", Node::CheckpointXml(c));
                add("status", Node::CheckpointStatus(c));
                add("control", Node::CheckpointControl(c));
                if self.checkpoint(c)?.checkpoint.parent.is_some() {
                    add("parent", Node::Parent(c));
                }
                add("children", Node::Children(c));
            }
            Node::Children(c) => {
                let own = self.checkpoint(c)?;
                for other in self.domain.checkpoints() {
                    if other.checkpoint.parent.as_ref() == Some(&own.checkpoint.name) {
                        add(other.checkpoint.name.as_str(), Node::Child(c, other.id));
                    }
                }
            }
            Node::Backups => {
                for job in self.domain.jobs() {
                    add(job.name().as_str(), Node::Backup(job.id()));
                }
                for draft in self.drafts.shown_in(node) {
                    add(&draft.file_name(), draft.node());
                }
            }
            Node::Backup(job) => {
                let backup = self.job(job)?;
                add("backup.xml", Node::BackupXml(job));
                if backup.checkpoint_record().is_some() {
                    add("checkpoint.xml", Node::BackupCheckpointXml(job));
                }
                add("domain.xml", Node::BackupDomainXml(job));
                add("status", Node::BackupStatus(job));
                add("control", Node::BackupControl(job));
                if backup.mode() == Mode::Pull {
                    add("disk.raw", Node::Raw(job, 0));
                    add("dirty.map", Node::DirtyMap(job));
                    add("raw", Node::RawDir(job));
                    add("qcow2", Node::Qcow2Dir(job));
                    add("map", Node::MapDir(job));
                    add("since", Node::SinceDir(job));
                    if backup.pull().is_some_and(|b| b.slot().is_some()) {
                        add("slices", Node::Slices(job));
                    }
                }
            }
            Node::Qcow2Dir(job) => disks(&*self.backup(job)?, |_, target, i| {
                add(&format!("{target}.qcow2"), Node::Qcow2(job, i));
            }),
            Node::Current => return Ok(self.current_children()),
            Node::Slices(job) => return self.slices_children(job),
            Node::SliceDisk(via, job, disk) => return self.slice_dirs(via, job, disk),
            Node::SliceDir(via, job, disk, dir) => return self.slices_in(via, job, disk, dir),
            Node::RawDir(job) => disks(&*self.backup(job)?, |_, target, i| {
                add(&format!("{target}.raw"), Node::Raw(job, i));
            }),
            Node::MapDir(job) => disks(&*self.backup(job)?, |_, target, i| {
                add(&format!("{target}.map"), Node::Map(job, i));
            }),
            Node::SinceDir(job) => {
                for since in self.backup(job)?.since() {
                    add(since.name.as_str(), Node::Since(job, since.id));
                }
            }
            Node::Since(job, c) => disks(&*self.backup(job)?, |disk, target, i| {
                if disk.knows_since(c) {
                    add(&format!("{target}.map"), Node::SinceMap(job, c, i));
                    add(&format!("{target}.json"), Node::SinceJson(job, c, i));
                    add(&format!("{target}.bmap"), Node::SinceBmap(job, c, i));
                    add(&format!("{target}.raw"), Node::SinceRaw(job, c, i));
                    add(&format!("{target}.qcow2"), Node::SinceQcow2(job, c, i));
                }
            }),
            _ => return Err(Error::new(Kind::NotADirectory, "not a directory")),
        }
        Ok(list)
    }

    /// How long the kernel may believe that a name means what it means now.
    pub(super) fn name_ttl(node: Node) -> Duration {
        match (node, node.job()) {
            (Node::Backup(_), _) => SHORTLY,
            // Not every change of these comes as an operation on the name itself.
            (Node::Checkpoint(_) | Node::Child(..), _) => Duration::ZERO,
            (Node::CheckpointDraft(_) | Node::BackupDraft(_), _) => Duration::ZERO,
            // Its directory is one backup's, which only looking it up there tells: its number will be
            // the next one's.
            (Node::Slice(..), _) => Duration::ZERO,
            // All of a backup's names last as long as its directory.
            (_, Some(_)) => FOREVER,
            _ if node.parent() == Node::Root => FOREVER,
            _ => SHORTLY,
        }
    }

    /// The path below the mount point, for sentences.
    pub(super) fn path(&self, node: Node) -> String {
        if node == Node::Root {
            return ".".to_owned();
        }
        if let Node::Slice(slot, disk, slice) = node {
            let path = self.slice_path(slot, disk, slice);
            return path.unwrap_or_else(|| "?".to_owned());
        }
        let name = self.name(node).unwrap_or_else(|| "?".to_owned());
        match node.parent() {
            Node::Root => name,
            parent => format!("{}/{name}", self.path(parent)),
        }
    }

    pub(super) fn path_of(&self, ino: Ino) -> String {
        Node::of(ino).map_or_else(|| "?".to_owned(), |node| self.path(node))
    }

    pub(super) fn path_in(&self, parent: Ino, name: &OsStr) -> String {
        let name = name.to_string_lossy();
        match Node::of(parent) {
            Some(Node::Root) => name.into_owned(),
            _ => format!("{}/{name}", self.path_of(parent)),
        }
    }

    fn name(&self, node: Node) -> Option<String> {
        match node {
            // Not by listing all: there may be hundreds.
            Node::Checkpoint(c) => Some(self.checkpoint(c).ok()?.checkpoint.name.to_string()),
            Node::Backup(job) => Some(self.job(job).ok()?.name().to_string()),
            // Also where the directory does not show it any more.
            Node::CheckpointDraft(_) | Node::BackupDraft(_) => {
                Some(self.drafts.get(node).ok()?.file_name())
            }
            _ => {
                let mut all = self.children(node.parent()).ok()?.into_iter();
                all.find(|c| c.1 == node).map(|c| c.0)
            }
        }
    }
}

fn disks(backup: &Backup, mut each: impl FnMut(&crate::engine::BackupDisk, &str, u16)) {
    for (i, disk) in backup.disks().iter().enumerate() {
        each(disk, disk.target(), disk_index(i));
    }
}
