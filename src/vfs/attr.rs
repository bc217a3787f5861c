//! Attributes: truthful sizes, blocks, times and link counts.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use super::node::{FileKind, Ino, Node};
use super::types::{Ask, Attr, FOREVER, Found, SHORTLY};
use super::{Vfs, refusals};
use crate::engine::{Backup, Job};
use crate::model::{Kind, Mode, Result};

/// Size and blocks, and how long they hold.
struct Extent {
    size: u64,
    blocks: u64,
    ttl: Duration,
}

impl Extent {
    fn text(length: usize, ttl: Duration) -> Self {
        let size = length as u64;
        Self {
            size,
            blocks: size.div_ceil(512),
            ttl,
        }
    }
}

impl Vfs {
    /// The attributes of a file, and how long they hold. Asks the domain where
    /// [`asks`](Self::asks) says so.
    pub fn getattr(&self, ino: Ino) -> Result<(Attr, Duration)> {
        let node = Self::node(ino)?;
        let attr = self.attributes(node, true);
        self.noted(|| format!("stat {}", self.path(node)), attr)
    }

    /// Whether an operation may have to ask the domain, and so may take up to its deadline.
    /// Never waits itself.
    pub fn asks(&self, ino: Ino, operation: Ask) -> bool {
        let Ok(node) = Self::node(ino) else {
            return false;
        };
        match (node, operation) {
            // Whole disks and slices are opened unseen.
            (Node::Raw(..) | Node::Slice(..), Ask::Open) => false,
            (_, Ask::Attributes | Ask::Open | Ask::Seek) if is_content(node) => {
                let stamped = operation != Ask::Attributes || self.is_stamped(node);
                !(stamped && self.content_is_known(node))
            }
            (_, Ask::Attributes | Ask::Open) if is_map(node) => self.texts.known(node).is_none(),
            (Node::DomainXml | Node::CheckpointStatus(_), Ask::Open) => true,
            // Of a pull backup everything is known here.
            (Node::BackupStatus(job), Ask::Open) => {
                self.job(job).is_ok_and(|job| job.mode() == Mode::Push)
            }
            (Node::BackupControl(_) | Node::CheckpointControl(_), Ask::Write) => true,
            // Writing may have to wait until an earlier close was answered.
            (Node::BackupDraft(_) | Node::CheckpointDraft(_), Ask::Write | Ask::Flush) => true,
            _ => false,
        }
    }

    /// A node with what is known of it.
    pub(super) fn found(&self, node: Node) -> Result<Found> {
        let (attr, attr_ttl) = self.attributes(node, false)?;
        let generation = match node {
            Node::Slice(slot, ..) => self.sliced(slot)?.id().into(),
            _ => 0,
        };
        Ok(Found {
            attr,
            attr_ttl,
            name_ttl: Self::name_ttl(node),
            generation,
        })
    }

    fn attributes(&self, node: Node, ask: bool) -> Result<(Attr, Duration)> {
        let kind = node.kind();
        let own = match (kind, node) {
            (FileKind::Symlink, _) => 0o777,
            (FileKind::Directory, _) => 0o700,
            (_, Node::CheckpointDraft(_) | Node::BackupDraft(_)) => 0o600,
            (_, Node::CheckpointControl(_) | Node::BackupControl(_)) => 0o600,
            _ => 0o400,
        };
        // Others may look and read, and nothing more.
        let others = if self.facts.allow_other {
            0o055 & (own >> 3 | own >> 6)
        } else {
            0
        };
        let perm = own | others;
        let extent = self.extent(node, ask)?;
        let attr = Attr {
            ino: node.ino()?,
            size: extent.size,
            blocks: extent.blocks,
            mtime: self.mtime(node)?,
            kind,
            perm,
            nlink: self.links(node)?,
            uid: self.facts.uid,
            gid: self.facts.gid,
        };
        Ok((attr, extent.ttl))
    }

    fn extent(&self, node: Node, ask: bool) -> Result<Extent> {
        Ok(match node {
            _ if is_content(node) => self.content_extent(node, ask)?,
            _ if is_map(node) => {
                let text = match self.texts.known(node) {
                    None if ask => self.text(node).map(Some),
                    known => Ok(known),
                };
                match text {
                    Ok(Some(text)) => Extent::text(text.len(), FOREVER),
                    Ok(None) => Extent::text(0, Duration::ZERO),
                    // That changes are not all known is for open(2) to say.
                    Err(e) if e.kind() == Kind::Stale => Extent::text(0, Duration::ZERO),
                    Err(e) => return Err(e),
                }
            }
            // These change under the same number, and what they would say now is not worth a
            // question: the size of the last text will do.
            Node::DomainXml | Node::CheckpointStatus(_) | Node::BackupStatus(_)
                if self.asks(node.ino()?, Ask::Open) =>
            {
                let length = self.texts.known(node).map_or(0, |text| text.len());
                Extent::text(length, Duration::ZERO)
            }
            Node::Events => Extent::text(self.events.extent().0, Duration::ZERO),
            Node::CheckpointDraft(_) | Node::BackupDraft(_) => {
                Extent::text(self.drafts.get(node)?.extent().0, Duration::ZERO)
            }
            Node::Status
            | Node::LastError
            | Node::BackupStatus(_)
            | Node::CheckpointXml(_)
            | Node::CheckpointControl(_)
            | Node::BackupControl(_) => Extent::text(self.text(node)?.len(), Duration::ZERO),
            Node::BackupXml(_)
            | Node::BackupCheckpointXml(_)
            | Node::BackupDomainXml(_)
            | Node::Manifest(_) => Extent::text(self.text(node)?.len(), FOREVER),
            Node::Parent(_) | Node::Child(..) => {
                let size = self.readlink(node.ino()?)?.len() as u64;
                Extent {
                    size,
                    blocks: 0,
                    ttl: Duration::ZERO,
                }
            }
            _ => Extent {
                size: 0,
                blocks: 0,
                ttl: match (node, node.job()) {
                    (Node::Checkpoints | Node::Backups | Node::Checkpoint(_), _) => Duration::ZERO,
                    (Node::Current, _) => Duration::ZERO,
                    (_, Some(_)) => FOREVER,
                    _ => SHORTLY,
                },
            },
        })
    }

    fn mtime(&self, node: Node) -> Result<SystemTime> {
        if let Some(job) = node.job() {
            return Ok(match node {
                Node::BackupStatus(_) => SystemTime::now(),
                // borg forgets the files of the newest time that it sees: let that be no slice's.
                Node::Manifest(_) => self.job(job)?.begun() + Duration::from_secs(1),
                _ => self.job(job)?.begun(),
            });
        }
        Ok(match node {
            Node::Checkpoints => self.changed.lock().checkpoints,
            Node::Backups => self.changed.lock().backups,
            Node::Status => SystemTime::now(),
            Node::Events => self.events.extent().1,
            Node::CheckpointDraft(_) | Node::BackupDraft(_) => self.drafts.get(node)?.extent().1,
            Node::LastError => self.refusals.newest().unwrap_or(self.mounted),
            Node::Checkpoint(c)
            | Node::CheckpointXml(c)
            | Node::CheckpointStatus(c)
            | Node::CheckpointControl(c)
            | Node::Parent(c)
            | Node::Children(c) => self.checkpoint(c)?.checkpoint.created,
            Node::Current => match self.domain.current_backup() {
                Some(holder) => holder.begun(),
                None => self.changed.lock().backups,
            },
            Node::Slice(slot, disk, slice) => self.stamp(slot, disk, slice)?,
            Node::Child(_, child) => self.checkpoint(child)?.checkpoint.created,
            _ => self.mounted,
        })
    }

    fn links(&self, node: Node) -> Result<u32> {
        let directories = |n: usize| u32::try_from(n).unwrap_or(u32::MAX).saturating_add(2);
        Ok(match node {
            Node::Root => directories(3),
            Node::Checkpoints => directories(self.domain.checkpoints().len()),
            Node::Checkpoint(_) => directories(1),
            Node::Backups => directories(self.domain.jobs().len()),
            Node::Backup(job) => match self.job(job)? {
                Job::Pull(backup) => directories(4 + usize::from(backup.slot().is_some())),
                Job::Push(_) => directories(0),
            },
            Node::SinceDir(job) => directories(self.backup(job)?.since().len()),
            Node::Current => match self.domain.current_backup() {
                Some(holder) => directories(holder.disks().len()),
                None => directories(0),
            },
            Node::Slices(job) => directories(self.backup(job)?.disks().len()),
            Node::SliceDisk(_, job, disk) => {
                let cut = self.backup(job)?.cut(disk.into());
                let dirs = cut.map_or(0, |cut| cut.directories());
                directories(usize::try_from(dirs).unwrap_or(usize::MAX))
            }
            // disk.raw and raw/<first disk>.raw
            Node::Raw(_, 0) => 2,
            _ if node.kind() == FileKind::Directory => directories(0),
            _ => 1,
        })
    }
}

/// Files whose bytes come from a frozen disk.
fn is_content(node: Node) -> bool {
    matches!(
        node,
        Node::Raw(..)
            | Node::Slice(..)
            | Node::SinceRaw(..)
            | Node::SinceQcow2(..)
            | Node::Qcow2(..)
    )
}

/// Texts that are made of what the domain says, once a backup.
pub(super) fn is_map(node: Node) -> bool {
    matches!(
        node,
        Node::Map(..)
            | Node::DirtyMap(_)
            | Node::SinceMap(..)
            | Node::SinceJson(..)
            | Node::SinceBmap(..)
    )
}

impl Vfs {
    /// Whether everything is known that the attributes of a content depend on, but for stamps.
    fn content_is_known(&self, node: Node) -> bool {
        let allocated = |backup: Result<Arc<Backup>>, disk: u16| {
            backup.is_ok_and(|b| b.known_allocation(disk.into()).is_some())
        };
        match node {
            Node::Raw(job, disk) | Node::Qcow2(job, disk) => allocated(self.backup(job), disk),
            Node::Slice(slot, disk, _) => allocated(self.sliced(slot), disk),
            Node::SinceRaw(job, c, disk) | Node::SinceQcow2(job, c, disk) => self
                .backup(job)
                .is_ok_and(|b| b.known_changes(disk.into(), c).is_some()),
            _ => true,
        }
    }

    fn is_stamped(&self, node: Node) -> bool {
        match node {
            Node::Slice(slot, disk, _) => self
                .sliced(slot)
                .is_ok_and(|b| b.known_stamps(disk.into()).is_some()),
            _ => true,
        }
    }

    fn content_extent(&self, node: Node, ask: bool) -> Result<Extent> {
        if let (Node::Slice(slot, disk, _), true) = (node, ask) {
            self.sliced(slot)?.stamps(disk.into())?;
        }
        if ask || (self.content_is_known(node) && self.is_stamped(node)) {
            let content = self.content(node)?;
            let size = content.size();
            let Some(blocks) = content.blocks()? else {
                // Less than the size, so that tools look for holes before they copy.
                return Ok(Extent {
                    size,
                    blocks: (size / 512).saturating_sub(8),
                    ttl: Duration::ZERO,
                });
            };
            return Ok(Extent {
                size,
                blocks,
                // The number may be another night's before long.
                ttl: match node {
                    Node::Slice(..) => Duration::ZERO,
                    _ => FOREVER,
                },
            });
        }
        let of_disk = |backup: &Backup, disk: u16| {
            let disk = backup.disks().get(usize::from(disk));
            disk.map_or(0, |d| d.size())
        };
        let size = match node {
            Node::Raw(job, disk) | Node::SinceRaw(job, _, disk) => {
                of_disk(&*self.backup(job)?, disk)
            }
            Node::Slice(slot, disk, slice) => {
                super::slices::range(&*self.sliced(slot)?, disk, slice)?.1
            }
            // Of an image not even the size is known.
            Node::SinceQcow2(job, ..) | Node::Qcow2(job, _) => {
                self.backup(job)?;
                0
            }
            _ => 0,
        };
        Ok(Extent {
            size,
            blocks: size.div_ceil(512),
            ttl: Duration::ZERO,
        })
    }
}

/// The instant in the two forms that `status` gives it in.
pub(super) fn instant(time: SystemTime) -> (String, u64) {
    (refusals::rfc3339(time), refusals::unix(time))
}
