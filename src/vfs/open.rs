//! Open files: what was opened stays what it was, also when the tree changes.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::{Mutex, RwLock};

use super::content::Content;
use super::draft::Draft;
use super::node::{FileKind, Ino, Node};
use super::types::{Caching, Change, DirEntry, Handle, Opened, Seek};
use super::{Vfs, slices};
use crate::engine::Backup;
use crate::model::{Error, Kind, Result};
use crate::view::qcow2;

/// What a directory held when reading it began.
pub(super) type Listing = Mutex<Option<Arc<[DirEntry]>>>;

pub(super) enum File {
    Content(Content),
    Text(Arc<str>),
    /// A document that is being written.
    Draft(Arc<Draft>),
    /// A `control`, opened for writing.
    Control(Node),
    /// The one text that grows while it is open.
    Events,
    Directory(Node, Arc<Listing>),
}

/// What is open, by handle.
#[derive(Default)]
pub(super) struct Files {
    last: AtomicU64,
    open: RwLock<HashMap<Handle, Arc<File>>>,
}

impl Files {
    pub(super) fn insert(&self, file: File) -> Handle {
        let handle = Handle(self.last.fetch_add(1, Ordering::Relaxed) + 1);
        self.open.write().insert(handle, Arc::new(file));
        handle
    }

    pub(super) fn get(&self, handle: Handle) -> Result<Arc<File>> {
        let open = self.open.read();
        open.get(&handle)
            .cloned()
            .ok_or_else(|| Error::new(Kind::Io, "the file is not open"))
    }

    pub(super) fn open_directory(&self, node: Node) -> Handle {
        self.insert(File::Directory(node, Arc::new(Mutex::new(None))))
    }

    pub(super) fn directory(&self, handle: Handle) -> Result<(Node, Arc<Listing>)> {
        match &*self.get(handle)? {
            File::Directory(node, listing) => Ok((*node, Arc::clone(listing))),
            _ => Err(Error::new(Kind::NotADirectory, "not a directory")),
        }
    }
}

impl Vfs {
    /// Opens a file for reading; its content is fixed from here on, but for `events`.
    pub fn open(&self, ino: Ino) -> Result<Opened> {
        let node = Self::node(ino)?;
        let opened = self.open_node(node);
        self.noted(|| format!("open {}", self.path(node)), opened)
    }

    fn open_node(&self, node: Node) -> Result<Opened> {
        let (file, caching) = match node {
            _ if node.kind() == FileKind::Directory => {
                return Err(Error::new(Kind::IsADirectory, "is a directory"));
            }
            Node::Raw(..)
            | Node::Slice(..)
            | Node::Qcow2(..)
            | Node::SinceRaw(..)
            | Node::SinceQcow2(..) => (File::Content(self.content(node)?), Caching::Keep),
            Node::Events => (File::Events, Caching::Bypass),
            Node::CheckpointDraft(_) | Node::BackupDraft(_) => return Err(self.refuse_draft(node)),
            _ => {
                let text = self.text(node)?;
                (File::Text(text), super::text::caching(node))
            }
        };
        Ok(Opened {
            handle: self.files.insert(file),
            caching,
        })
    }

    /// What a file of a frozen disk consists of. Asks the domain where [`asks`](Self::asks) says so.
    pub(super) fn content(&self, node: Node) -> Result<Content> {
        match node {
            Node::Raw(job, disk) => Ok(Content::disk(self.backup(job)?, disk.into())),
            Node::Slice(slot, disk, slice) => {
                let backup = self.sliced(slot)?;
                let range = slices::range(&backup, disk, slice)?;
                Ok(Content::part(backup, disk.into(), range))
            }
            Node::Qcow2(job, disk) => Content::image(self.backup(job)?, disk.into()),
            Node::SinceRaw(job, c, disk) => Content::changed(self.backup(job)?, disk.into(), c),
            Node::SinceQcow2(job, c, disk) => {
                let backup = self.backup(job)?;
                let backing = self.backing(&backup, c, disk.into());
                Content::overlay(backup, disk.into(), c, &backing)
            }
            _ => Err(Error::new(Kind::Invalid, "not of a disk")),
        }
    }

    /// The image that what changed since a checkpoint goes on top of.
    fn backing(&self, backup: &Backup, checkpoint: u32, disk: usize) -> qcow2::Backing {
        let mut since = backup.since().iter();
        let name = since.find(|s| s.id == checkpoint).map(|s| s.name.as_str());
        let target = backup.disks().get(disk).map(|d| d.target());
        let name = self
            .facts
            .backing
            .replace("{checkpoint}", name.unwrap_or_default())
            .replace("{disk}", target.unwrap_or_default());
        let format = match name.ends_with(".raw") || name.ends_with(".img") {
            true => qcow2::Format::Raw,
            false => qcow2::Format::Qcow2,
        };
        qcow2::Backing { name, format }
    }

    /// Opens a file for writing: a `control`. Nothing else is written in place.
    pub fn open_to_write(&self, ino: Ino) -> Result<Opened> {
        let node = Self::node(ino)?;
        let handle = match node {
            Node::BackupControl(_) | Node::CheckpointControl(_) => self.controls(node),
            Node::CheckpointDraft(_) | Node::BackupDraft(_) => Err(self.refuse_draft(node)),
            _ => return Err(self.refuse(ino, None, Change::Content)),
        }
        .map(|_| self.files.insert(File::Control(node)));
        let opened = handle.map(|handle| Opened {
            handle,
            caching: Caching::Bypass,
        });
        self.noted(|| format!("open {}", self.path(node)), opened)
    }

    /// Forgets a file or directory that was opened. A document that was not taken is dropped.
    pub fn release(&self, handle: Handle) {
        let file = self.files.open.write().remove(&handle);
        if let Some(File::Draft(draft)) = file.as_deref() {
            self.end_draft(draft);
        }
    }

    /// The whole content of an opened file, if that is a text. Never waits.
    pub fn opened_text(&self, handle: Handle) -> Option<Arc<str>> {
        match &*self.files.get(handle).ok()? {
            File::Text(text) => Some(Arc::clone(text)),
            _ => None,
        }
    }

    /// How many zeros a read of a disk gets, if it is known already that it gets nothing else. Never
    /// waits.
    pub fn zeros(&self, handle: Handle, offset: u64, length: usize) -> Option<usize> {
        match &*self.files.get(handle).ok()? {
            File::Content(content) => content.zeros_at(offset, length),
            _ => None,
        }
    }

    /// Reads up to the end of `buf` or of the file; the count of bytes read. Waits for the domain
    /// if the file is a disk.
    pub fn read(&self, handle: Handle, offset: u64, buf: &mut [u8]) -> Result<usize> {
        let file = self.files.get(handle)?;
        match &*file {
            File::Content(content) => {
                let read = content.read_at(offset, buf);
                self.noted(|| "read".to_owned(), read)
            }
            File::Text(text) => {
                let part = window(text.as_bytes(), offset, buf.len());
                buf[..part.len()].copy_from_slice(part);
                Ok(part.len())
            }
            File::Draft(draft) => Ok(draft.read(offset, buf)),
            File::Events => Ok(self.events.read(offset, buf)),
            File::Control(node) => {
                let text = self.text(*node)?;
                let part = window(text.as_bytes(), offset, buf.len());
                buf[..part.len()].copy_from_slice(part);
                Ok(part.len())
            }
            File::Directory(..) => Err(Error::new(Kind::IsADirectory, "is a directory")),
        }
    }

    /// Writes all of `bytes`: to a document, or a command to a `control`, whatever the offset. Asks
    /// the domain where [`asks`](Self::asks) says so.
    pub fn write(&self, handle: Handle, offset: u64, bytes: &[u8]) -> Result<()> {
        match &*self.files.get(handle)? {
            File::Draft(draft) => self.write_draft(draft, offset, bytes),
            File::Control(node) => self.control(*node, bytes),
            _ => Err(Error::new(
                Kind::ReadOnly,
                "the file is not open for writing",
            )),
        }
    }

    /// SEEK_DATA and SEEK_HOLE: ENXIO at and past the end.
    pub fn lseek(&self, handle: Handle, offset: i64, to: Seek) -> Result<i64> {
        let past_end = || Error::new(Kind::PastEnd, "there is nothing at this offset");
        let offset = u64::try_from(offset).map_err(|_| past_end())?;
        let file = self.files.get(handle)?;
        let found = match &*file {
            File::Content(content) => {
                if offset >= content.size() {
                    return Err(past_end());
                }
                self.noted(|| "lseek".to_owned(), content.seek(offset, to))?
            }
            File::Text(text) => all_data(text.len(), offset, to),
            File::Draft(draft) => all_data(draft.extent().0, offset, to),
            File::Events => all_data(self.events.extent().0, offset, to),
            File::Control(node) => all_data(self.text(*node)?.len(), offset, to),
            File::Directory(..) => return Err(Error::new(Kind::Invalid, "is a directory")),
        };
        let found = found.ok_or_else(past_end)?;
        i64::try_from(found).map_err(|_| past_end())
    }
}

/// Where a file without holes has data, or its one hole, which is its end.
fn all_data(size: usize, offset: u64, to: Seek) -> Option<u64> {
    let end = size as u64;
    match to {
        _ if offset >= end => None,
        Seek::Data => Some(offset),
        Seek::Hole => Some(end),
    }
}

/// The bytes of a text that a read of `length` bytes at `offset` gets.
pub fn window(text: &[u8], offset: u64, length: usize) -> &[u8] {
    let rest = usize::try_from(offset)
        .ok()
        .and_then(|offset| text.get(offset..))
        .unwrap_or_default();
    &rest[..rest.len().min(length)]
}
