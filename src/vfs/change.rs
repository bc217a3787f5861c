//! What changes the tree: mkdir and rmdir in two places. Everything else is refused, and says so.

use std::ffi::OsStr;
use std::time::SystemTime;

use super::Vfs;
use super::node::{Ino, Node};
use super::types::{Change, Found};
use crate::model::{Error, Kind, Name, Result};

impl Vfs {
    /// Makes a checkpoint or begins a backup. Asks the domain.
    pub fn mkdir(&self, parent: Ino, name: &OsStr) -> Result<Found> {
        let made = self.make(parent, name).and_then(|node| self.found(node));
        self.noted(|| format!("mkdir {}", self.path_in(parent, name)), made)
    }

    fn make(&self, parent: Ino, name: &OsStr) -> Result<Node> {
        let parent = Self::node(parent)?;
        match parent {
            Node::Checkpoints => self.domain.create_checkpoint(self.name_of(name)?)?,
            Node::Backups => drop(self.domain.begin_backup(self.name_of(name)?)?),
            _ => {
                return Err(Error::new(
                    Kind::NotPermitted,
                    "directories can be made in checkpoints/ and backups/ only",
                ));
            }
        }
        self.touch();
        self.child(parent, name)
    }

    /// Deletes a checkpoint or ends a backup. Asks the domain.
    pub fn rmdir(&self, parent: Ino, name: &OsStr) -> Result<()> {
        let removed = self.remove(parent, name);
        self.noted(|| format!("rmdir {}", self.path_in(parent, name)), removed)
    }

    fn remove(&self, parent: Ino, name: &OsStr) -> Result<()> {
        let node = self.child(Self::node(parent)?, name)?;
        match node {
            Node::Checkpoint(_) => self.domain.delete_checkpoint(&self.name_of(name)?)?,
            Node::Backup(_) => self.domain.end_backup(&self.name_of(name)?)?,
            _ => {
                return Err(Error::new(
                    Kind::NotPermitted,
                    "only checkpoints and backups can be removed",
                ));
            }
        }
        self.texts.forget(node);
        self.touch();
        Ok(())
    }

    /// Refuses to change the file, or the name in it if one is given.
    pub fn refuse(&self, ino: Ino, name: Option<&OsStr>, change: Change) -> Error {
        let (verb, kind, why) = match change {
            Change::Attributes => ("change attributes of", Kind::ReadOnly, READ_ONLY),
            Change::Content => ("open for writing", Kind::ReadOnly, READ_ONLY),
            Change::Create => ("create", Kind::NotPermitted, NO_FILES),
            Change::Symlink => ("symlink", Kind::NotPermitted, NO_FILES),
            Change::Link => ("link", Kind::NotPermitted, NO_FILES),
            Change::Unlink => ("unlink", Kind::NotPermitted, NO_UNLINK),
            Change::Rename => ("rename", Kind::NotPermitted, NO_RENAME),
            Change::ExtendedAttributes => ("set attributes of", Kind::Unsupported, NO_XATTR),
        };
        let error = Error::new(kind, why);
        let path = || match name {
            Some(name) => self.path_in(ino, name),
            None => self.path_of(ino),
        };
        self.refusals.note(&format!("{verb} {}", path()), &error);
        error
    }

    fn name_of(&self, name: &OsStr) -> Result<Name> {
        Name::new(&name.to_string_lossy())
    }

    /// A backup also makes a checkpoint, so both directories may have changed.
    fn touch(&self) {
        let now = SystemTime::now();
        let mut changed = self.changed.lock();
        changed.checkpoints = now;
        changed.backups = now;
    }
}

const READ_ONLY: &str = "everything here is read-only";
const NO_FILES: &str = "files cannot be made here";
const NO_UNLINK: &str =
    "files cannot be removed; a checkpoint or backup goes as a whole, with rmdir";
const NO_RENAME: &str = "nothing here can be renamed";
const NO_XATTR: &str = "extended attributes cannot be set here";
