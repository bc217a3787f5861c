//! The files that are texts: which can be kept, which is asked for, which is made up each time.

use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::Mutex;

use super::attr::is_map;
use super::node::Node;
use super::types::Caching;
use super::{Vfs, status};
use crate::engine::{Backup, DescribeFlags, Job};
use crate::model::{Error, Kind, Result};
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
        Node::BackupStatus(_) | Node::BackupControl(_) => Caching::Bypass,
        _ if node.job().is_some() => Caching::Keep,
        _ => Caching::Bypass,
    }
}

impl Vfs {
    /// What a text says now. Maps, `domain.xml` and the `status` of a checkpoint or a push backup ask
    /// the domain.
    pub(super) fn text(&self, node: Node) -> Result<Arc<str>> {
        let text: String = match node {
            Node::Status => status::mount(&self.domain, &self.facts, self.mounted),
            Node::LastError => self.refusals.text(),
            Node::DomainXml => {
                let disks = self.domain.disks()?;
                return Ok(self.keep(node, xml::domain(&self.domain.info(), &disks)));
            }
            Node::CheckpointXml(c) => {
                let name = &self.checkpoint(c)?.checkpoint.name;
                self.domain.checkpoint_xml(name, DescribeFlags::default())?
            }
            Node::CheckpointStatus(c) => {
                let entry = self.checkpoint(c)?;
                let standing = self.domain.checkpoint_status(c)?;
                return Ok(self.keep(node, status::checkpoint(&entry.checkpoint, &standing)));
            }
            Node::BackupStatus(job) => match self.job(job)? {
                Job::Pull(backup) => status::pull(&backup),
                Job::Push(push) => return Ok(self.keep(node, status::push(&push))),
            },
            Node::CheckpointControl(_) | Node::BackupControl(_) => {
                let words = self.controls(node)?.iter();
                words.map(|word| format!("{word}\n")).collect()
            }
            Node::BackupXml(job) => self.job(job)?.xml(),
            Node::Manifest(job) => self.manifest(&*self.backup(job)?),
            Node::BackupDomainXml(job) => {
                xml::domain(&self.domain.info(), self.job(job)?.domain_disks())
            }
            Node::BackupCheckpointXml(job) => match self.job(job)?.checkpoint_record() {
                Some(checkpoint) => {
                    let info = self.domain.info();
                    xml::CheckpointDocument::describe(checkpoint, Some(&info)).write()
                }
                None => return Err(Error::new(Kind::NotFound, "there is no checkpoint")),
            },
            _ if is_map(node) => {
                if let Some(text) = self.texts.known(node) {
                    return Ok(text);
                }
                let job = node.job().unwrap_or_default();
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
            _ => node.job().is_none_or(|job| self.job(job).is_ok()),
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
        Node::SinceJson(_, checkpoint, disk) => {
            view::json::changes(&*backup.changes(disk.into(), checkpoint)?)
        }
        Node::SinceBmap(_, checkpoint, disk) => {
            view::bmap::text(&*backup.changes(disk.into(), checkpoint)?)
        }
        _ => view::map::change_text(&*backup.changes_since_base(0)?),
    })
}
