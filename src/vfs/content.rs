//! Files whose bytes come from a frozen disk: the whole disk, a slice of it, what changed on it, and
//! images made up of either. What each of them is made of is fixed when it is opened.

use std::sync::Arc;

use super::types::Seek;
use crate::engine::Backup;
use crate::model::{Change, Extents, Result};
use crate::view::{qcow2, raw};

/// The content of such a file.
pub(super) struct Content {
    backup: Arc<Backup>,
    disk: usize,
    form: Form,
}

enum Form {
    /// The disk from `start` on.
    Part { start: u64, size: u64 },
    /// The disk where it changed; holes elsewhere.
    Changed(Arc<Extents<Change>>),
    /// An image that is worked out when it is read.
    Image(Box<qcow2::Image>),
}

impl Content {
    /// A whole disk.
    pub(super) fn disk(backup: Arc<Backup>, disk: usize) -> Self {
        let size = backup.disks().get(disk).map_or(0, |d| d.size());
        Self::part(backup, disk, (0, size))
    }

    /// Offset and length of a part of a disk.
    pub(super) fn part(backup: Arc<Backup>, disk: usize, (start, size): (u64, u64)) -> Self {
        Self {
            backup,
            disk,
            form: Form::Part { start, size },
        }
    }

    /// What changed since a checkpoint, as a sparse file. Asks the domain, once a backup.
    pub(super) fn changed(backup: Arc<Backup>, disk: usize, checkpoint: u32) -> Result<Self> {
        let changes = backup.changes(disk, checkpoint)?;
        Ok(Self {
            backup,
            disk,
            form: Form::Changed(changes),
        })
    }

    /// The disk as an image of its own. Asks the domain, once a backup.
    pub(super) fn image(backup: Arc<Backup>, disk: usize) -> Result<Self> {
        let image = qcow2::Image::full(&*backup.allocation(disk)?)?;
        Ok(Self {
            backup,
            disk,
            form: Form::Image(Box::new(image)),
        })
    }

    /// What changed since a checkpoint, as an image on top of another. Asks the domain, once a
    /// backup.
    pub(super) fn overlay(
        backup: Arc<Backup>,
        disk: usize,
        checkpoint: u32,
        backing: &qcow2::Backing,
    ) -> Result<Self> {
        let changes = backup.changes(disk, checkpoint)?;
        let image = qcow2::Image::overlay(&changes, Some(backing))?;
        Ok(Self {
            backup,
            disk,
            form: Form::Image(Box::new(image)),
        })
    }

    /// Size in bytes. No I/O.
    pub(super) fn size(&self) -> u64 {
        match &self.form {
            Form::Part { size, .. } => *size,
            Form::Changed(changes) => changes.size(),
            Form::Image(image) => image.size(),
        }
    }

    /// Blocks of 512 bytes that are not holes; none if that takes long to tell. Asks the domain, once a
    /// backup.
    pub(super) fn blocks(&self) -> Result<Option<u64>> {
        Ok(match &self.form {
            Form::Part { start, size } => {
                let data = self.backup.data_within(self.disk, *start, *size)?;
                data.map(|bytes| bytes.div_ceil(512))
            }
            Form::Changed(changes) => Some(raw::blocks(&**changes)),
            Form::Image(image) => Some(image.size().div_ceil(512)),
        })
    }

    /// How many zeros a read of `length` bytes gets, if it is known already that it gets nothing else.
    /// Never waits.
    pub(super) fn zeros_at(&self, offset: u64, length: usize) -> Option<usize> {
        let Form::Part { start, size } = &self.form else {
            return None;
        };
        let length = self.within(offset, length);
        let known = *size > 0 && length > 0;
        let zeros = known.then(|| self.backup.zeros_at(self.disk, start + offset, length));
        zeros.flatten()
    }

    /// Reads up to the end of `buf` or of the file; the count of bytes read. Asks the domain for what
    /// is not known.
    pub(super) fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<usize> {
        let length = self.within(offset, buf.len());
        let buf = &mut buf[..length];
        match &self.form {
            Form::Part { start, .. } if length > 0 => {
                return self.backup.read_at(self.disk, start + offset, buf);
            }
            Form::Part { .. } => {}
            Form::Changed(changes) => {
                raw::read(&**changes, offset, buf, |at, part| self.fetch(at, part))?;
            }
            Form::Image(image) => image.read(offset, buf, |at, part| self.fetch(at, part))?,
        }
        Ok(length)
    }

    /// SEEK_DATA and SEEK_HOLE from an offset within the file; `None` if there is no more data. Asks
    /// the domain, once a backup.
    pub(super) fn seek(&self, offset: u64, to: Seek) -> Result<Option<u64>> {
        let size = self.size();
        let (data, hole) = match &self.form {
            Form::Part { start, .. } => {
                let map = self.backup.allocation(self.disk)?;
                let data = raw::seek_data(&*map, start + offset);
                let hole = raw::seek_hole(&*map, start + offset) - start;
                (data.map(|data| data - start), hole)
            }
            Form::Changed(changes) => (
                raw::seek_data(&**changes, offset),
                raw::seek_hole(&**changes, offset),
            ),
            Form::Image(_) => (Some(offset), size),
        };
        Ok(match to {
            Seek::Data => data.filter(|at| *at < size),
            Seek::Hole => Some(hole.min(size)),
        })
    }

    fn within(&self, offset: u64, length: usize) -> usize {
        let left = self.size().saturating_sub(offset);
        usize::try_from(left).map_or(length, |left| left.min(length))
    }

    fn fetch(&self, offset: u64, part: &mut [u8]) -> Result<()> {
        let read = self.backup.read_at(self.disk, offset, part)?;
        // The maps end where the disk does.
        part[read..].fill(0);
        Ok(())
    }
}
