//! The files that are texts: which can be kept, which is asked for, which is made up each time.

use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::Mutex;

use super::node::Node;
use super::types::Caching;
use super::{Vfs, status};
use crate::engine::{Backup, BackupDisk};
use crate::model::{Checkpoint, DomainInfo, Error, Kind, Result};
use crate::{view, xml};

/// Texts worth keeping: those of maps, which never change and may be long; and the last ones of
/// files that change, for their size.
#[derive(Default)]
pub(super) struct Texts(Mutex<HashMap<Node, Arc<str>>>);

impl Texts {
    /// The text, if it was made. Never waits.
    pub(super) fn known(&self, node: Node) -> Option<Arc<str>> {
        self.0.lock().get(&node).cloned()
    }

    /// Keeps a text, if `alive` still: checked under the lock, so that nothing of a backup is kept
    /// after [`forget`](Self::forget).
    fn keep(&self, node: Node, text: &Arc<str>, alive: impl FnOnce() -> bool) {
        let mut texts = self.0.lock();
        if alive() {
            texts.insert(node, Arc::clone(text));
        }
    }

    /// Forgets the texts of a checkpoint or backup that is gone.
    pub(super) fn forget(&self, gone: Node) {
        self.0.lock().retain(|node, _| {
            let mut at = *node;
            while at != Node::Root && at != gone {
                at = at.parent();
            }
            at != gone
        });
    }
}

/// How the kernel may cache a text: the file of this number either never changes or may always.
pub(super) fn caching(node: Node) -> Caching {
    match node {
        Node::BackupStatus(_) => Caching::Bypass,
        _ if node.job().is_some() => Caching::Keep,
        _ => Caching::Bypass,
    }
}

impl Vfs {
    /// What a text says now. Maps, `domain.xml` and a checkpoint's `status` ask the domain.
    pub(super) fn text(&self, node: Node) -> Result<Arc<str>> {
        let text: String = match node {
            Node::Status => status::mount(&self.domain, &self.facts, self.mounted),
            Node::LastError => self.refusals.text(),
            Node::DomainXml => {
                let disks = self.domain.disks()?;
                return Ok(self.keep(node, xml::domain(&self.domain.info(), &disks)));
            }
            Node::CheckpointXml(c) => {
                checkpoint_xml(&self.checkpoint(c)?.checkpoint, &self.domain.info())
            }
            Node::CheckpointStatus(c) => {
                let entry = self.checkpoint(c)?;
                let standing = self.domain.checkpoint_status(c)?;
                return Ok(self.keep(node, status::checkpoint(&entry.checkpoint, &standing)));
            }
            Node::BackupStatus(job) => status::backup(&*self.backup(job)?),
            Node::BackupXml(job) => backup_xml(&*self.backup(job)?),
            Node::BackupDomainXml(job) => {
                xml::domain(&self.domain.info(), self.backup(job)?.domain_disks())
            }
            Node::BackupCheckpointXml(job) => match self.backup(job)?.checkpoint_record() {
                Some(checkpoint) => checkpoint_xml(checkpoint, &self.domain.info()),
                None => return Err(Error::new(Kind::NotFound, "there is no checkpoint")),
            },
            Node::Map(job, _) | Node::DirtyMap(job) | Node::SinceMap(job, ..) => {
                if let Some(text) = self.texts.known(node) {
                    return Ok(text);
                }
                let text = map(&*self.backup(job)?, node)?;
                return Ok(self.keep(node, text));
            }
            _ => return Err(Error::new(Kind::Invalid, "not a text")),
        };
        Ok(text.into())
    }

    fn keep(&self, node: Node, text: String) -> Arc<str> {
        let text: Arc<str> = text.into();
        self.texts.keep(node, &text, || match node {
            Node::CheckpointStatus(c) => self.checkpoint(c).is_ok(),
            _ => node.job().is_none_or(|job| self.backup(job).is_ok()),
        });
        text
    }
}

fn map(backup: &Backup, node: Node) -> Result<String> {
    Ok(match node {
        Node::Map(_, disk) => view::map::allocation_text(&*backup.allocation(disk.into())?),
        Node::SinceMap(_, checkpoint, disk) => {
            view::map::change_text(&*backup.changes(disk.into(), checkpoint)?)
        }
        _ => view::map::change_text(&*backup.changes_since_base(0)?),
    })
}

fn checkpoint_xml(checkpoint: &Checkpoint, domain: &DomainInfo) -> String {
    xml::CheckpointDocument::describe(checkpoint, Some(domain)).write()
}

/// `<server>` is left out: the disks are read as files of the mount, and the socket behind them is
/// nobody else's.
fn backup_xml(backup: &Backup) -> String {
    let base = backup.base();
    let disk = |disk: &BackupDisk| {
        let known = base.is_some_and(|b| disk.knows_since(b.id));
        xml::BackupDocumentDisk {
            export_name: Some(disk.target().to_owned()),
            // Said only where it is not what the document's <incremental> implies.
            backup_mode: (base.is_some() && !known).then_some(xml::BackupMode::Full),
            ..xml::BackupDocumentDisk::new(disk.target())
        }
    };
    xml::BackupDocument {
        mode: crate::model::Mode::Pull,
        incremental: base.map(|b| b.name.clone().into()),
        disks: backup.disks().iter().map(disk).collect(),
        ..xml::BackupDocument::default()
    }
    .write()
}
