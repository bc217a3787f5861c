//! Taking up checkpoints of which only the bitmaps are left: after the state directory was lost, or on
//! another host. The order of a series, its times and its names come from saved documents; whether
//! its changes can be believed comes from the bitmaps.

use super::domain::Domain;
use super::kept;
use super::request::{BitmapRequest, Redefinition};
use crate::model::{Checkpoint, CheckpointDisk, Disk, Error, Kind, Name, Result};

impl Domain {
    /// Takes up a checkpoint of which only the bitmaps are left. It must follow the newest one, so
    /// that a series is redefined in its order.
    pub fn redefine(&self, again: &Redefinition) -> Result<()> {
        self.redefine_with(&again.checkpoint.name, |_| Ok(again.clone()))
    }

    pub(super) fn redefine_with(
        &self,
        name: &Name,
        again: impl FnOnce(&[Disk]) -> Result<Redefinition>,
    ) -> Result<()> {
        let work = || {
            let mut changes = self.begin_change()?;
            let disks = self.disks()?;
            let again = again(&disks)?;
            let checkpoint = redefined(&again, &disks, again.validate && !self.mirrors)?;
            let all = &changes.record.checkpoints;
            if let Some(known) = all.iter().find(|c| c.name == *name) {
                let same = known.created == checkpoint.created
                    && known.parent == checkpoint.parent
                    && known.description == checkpoint.description
                    && known.disks.len() == checkpoint.disks.len()
                    && checkpoint.disks.iter().all(|d| {
                        let known = known.disk(&d.target);
                        known.is_some_and(|k| k.bitmap == d.bitmap)
                    });
                return match same {
                    true => Ok(()),
                    false => Err(Error::new(
                        Kind::Exists,
                        format!("there is another checkpoint {name} already"),
                    )),
                };
            }
            if self.mirrors {
                self.backend
                    .redefine_checkpoint(&checkpoint, again.validate)?;
                kept::expect(&mut changes.record, &checkpoint);
                return self.adopt(&mut changes);
            }
            follows_newest(&checkpoint, all)?;
            let mut record = changes.record.clone();
            record.last_created = record.last_created.max(Some(checkpoint.created));
            record.checkpoints.push(checkpoint);
            self.store.save(&record)?;
            changes.record = record;
            self.publish(&mut changes);
            Ok(())
        };
        work().map_err(|e| e.during(format!("redefine checkpoint {name}")))?;
        log::info!("checkpoint {name} redefined");
        Ok(())
    }
}

/// The checkpoint of a redefinition, as far as the disks bear it out. Whoever keeps checkpoints itself
/// validates them itself.
fn redefined(again: &Redefinition, disks: &[Disk], validate: bool) -> Result<Checkpoint> {
    let request = &again.checkpoint;
    let wanted = match &request.disks {
        Some(wanted) => wanted.clone(),
        None => {
            let able = disks.iter().filter(|d| d.no_checkpoint.is_none());
            able.map(|d| BitmapRequest {
                disk: d.target.clone(),
                bitmap: None,
            })
            .collect()
        }
    };
    let mut covered = Vec::new();
    for wanted in wanted {
        let bitmap = wanted.bitmap.unwrap_or_else(|| request.name.to_string());
        let disk = disks.iter().find(|d| d.target == wanted.disk);
        let found = disk.and_then(|d| d.bitmaps.iter().find(|b| b.name == bitmap));
        let flaw = match (disk, found) {
            (None, _) => Some("the domain has no such disk".to_owned()),
            (_, None) => Some(format!("there is no dirty bitmap {bitmap}")),
            (_, Some(b)) if b.inconsistent => Some(format!(
                "bitmap {bitmap} is inconsistent: the domain was not stopped cleanly"
            )),
            _ => None,
        };
        if let Some(why) = flaw.filter(|_| validate) {
            return Err(
                Error::new(Kind::Stale, format!("disk {}: {why}", wanted.disk))
                    .hint("its changes are lost: take a full backup"),
            );
        }
        covered.push(CheckpointDisk {
            target: wanted.disk,
            bitmap,
            // The document does not say how large the disk was; a bitmap of another size could not be
            // merged, and QEMU would say so.
            size: disk.map_or(0, |d| d.size),
            image: disk.and_then(Disk::path).map(str::to_owned),
            broken: None,
        });
    }
    if covered.is_empty() {
        return Err(Error::new(Kind::Invalid, "it covers no disk"));
    }
    Ok(Checkpoint {
        name: request.name.clone(),
        created: again.created,
        parent: again.parent.clone(),
        description: request.description.clone(),
        disks: covered,
    })
}

/// A redefined checkpoint must follow the newest one. One that was left out in the middle would be
/// missed by all before it, and nobody could tell: its bitmap belongs to no checkpoint.
fn follows_newest(checkpoint: &Checkpoint, all: &[Checkpoint]) -> Result<()> {
    for disk in &checkpoint.disks {
        let claims = |c: &&Checkpoint| {
            let theirs = c.disk(&disk.target);
            theirs.is_some_and(|t| t.bitmap == disk.bitmap)
        };
        if let Some(other) = all.iter().find(claims) {
            return Err(Error::new(
                Kind::Busy,
                format!(
                    "bitmap {} of disk {} belongs to checkpoint {}",
                    disk.bitmap, disk.target, other.name
                ),
            ));
        }
    }
    let in_order = |why: String| {
        Err(Error::new(Kind::Invalid, why).hint("redefine a series from the oldest to the newest"))
    };
    let newest = all.last();
    match (&checkpoint.parent, newest) {
        (Some(parent), Some(newest)) if newest.name == *parent => {}
        (None, None) => {}
        (Some(parent), _) => {
            return in_order(format!("its parent {parent} is not the newest checkpoint"));
        }
        (None, Some(newest)) => {
            return in_order(format!(
                "it has no parent, and there is {} already",
                newest.name
            ));
        }
    }
    match newest {
        Some(newest) if newest.created >= checkpoint.created => {
            in_order(format!("it is not later than its parent {}", newest.name))
        }
        _ => Ok(()),
    }
}
