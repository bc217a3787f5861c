//! What changes the tree: mkdir and rmdir in two places, rename in one. Everything else is refused,
//! and says so.

use std::ffi::OsStr;
use std::time::{Duration, SystemTime};

use super::Vfs;
use super::node::{Ino, Node};
use super::types::{Attr, Change, Found};
use crate::model::{Error, Kind, Name, Result};

impl Vfs {
    /// Makes a checkpoint or begins a backup. Asks the domain.
    pub fn mkdir(&self, parent: Ino, name: &OsStr) -> Result<Found> {
        let made = self.make(parent, name).and_then(|node| self.found(node));
        self.made(|| format!("mkdir {}", self.path_in(parent, name)), made)
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

    /// Gives a checkpoint another name. A name that is taken is never replaced, whatever rename(2) is
    /// told. Asks the domain.
    pub fn rename(&self, from: (Ino, &OsStr), to: (Ino, &OsStr)) -> Result<()> {
        let renamed = self.rename_to(from, to);
        let path = |(parent, name): (Ino, &OsStr)| self.path_in(parent, name);
        self.noted(|| format!("rename {} to {}", path(from), path(to)), renamed)
    }

    fn rename_to(&self, from: (Ino, &OsStr), to: (Ino, &OsStr)) -> Result<()> {
        let (parent, node) = (Self::node(from.0)?, Self::node(to.0)?);
        let Node::Checkpoint(_) = self.child(parent, from.1)? else {
            return Err(Error::new(
                Kind::NotPermitted,
                "only checkpoints can be renamed",
            ));
        };
        if node != Node::Checkpoints {
            let error = Error::new(Kind::NotPermitted, "a checkpoint cannot leave checkpoints/");
            // mv moves into a directory that is there.
            return Err(match node {
                Node::Checkpoint(_) => error.hint("to rename it, choose a name that is not taken"),
                _ => error,
            });
        }
        let (from, to) = (self.name_of(from.1)?, self.name_of(to.1)?);
        if from == to {
            return Ok(());
        }
        if self.domain.checkpoint(to.as_str()).is_some() {
            return Err(
                Error::new(Kind::Exists, format!("there is a checkpoint {to} already"))
                    .hint("choose another name, or delete it with rmdir"),
            );
        }
        self.domain.rename_checkpoint(&from, &to)?;
        // Its own texts name it, and so do those of its children.
        self.texts.forget(Node::Checkpoints);
        self.touch();
        Ok(())
    }

    /// chmod, chown, utimens, and truncate if there is a `size`: nothing has modes or times of its own,
    /// but programs that write a document or to a `control` set them on the way. The attributes
    /// afterwards.
    pub fn setattr(&self, ino: Ino, size: Option<u64>) -> Result<(Attr, Duration)> {
        let node = Self::node(ino)?;
        match (node, size) {
            (Node::CheckpointDraft(_) | Node::BackupDraft(_), size) => {
                let draft = self.drafts.get(node)?;
                size.map_or(Ok(()), |size| self.truncate_draft(&draft, size))?;
            }
            // What a shell does to whatever it redirects to.
            (Node::CheckpointControl(_) | Node::BackupControl(_), Some(_)) => {}
            _ => return Err(self.refuse(ino, None, Change::Attributes)),
        }
        self.getattr(ino)
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
            Change::Exchange => ("exchange", Kind::Invalid, NO_EXCHANGE),
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
    pub(super) fn touch(&self) {
        // What was told of it does not pile up where nobody looks.
        self.events.catch_up();
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
const NO_EXCHANGE: &str = "two names cannot be exchanged here";
const NO_XATTR: &str = "extended attributes cannot be set here";
