//! Making, renaming and deleting checkpoints.

use std::sync::Arc;
use std::time::SystemTime;

use super::domain::{Changes, CheckpointEntry, Domain};
use super::history;
use super::recovery::{forget, rename};
use super::request::CheckpointRequest;
use super::store::{Pending, Record};
use crate::model::{
    Bitmap, Checkpoint, CheckpointDisk, CheckpointRemoval, Disk, Error, Kind, Name, NewCheckpoint,
    RenameBitmap, Result,
};

impl Domain {
    /// Marks a point in time on every disk that can carry a bitmap, at one instant.
    pub fn create_checkpoint(&self, name: Name) -> Result<()> {
        self.create(&CheckpointRequest::new(name))
    }

    /// Marks a point in time on the disks that were asked for, at one instant.
    pub fn create(&self, request: &CheckpointRequest) -> Result<()> {
        self.create_with(&request.name, |_| Ok(request.clone()))
    }

    /// The same, where the request depends on the disks there are.
    pub(super) fn create_with(
        &self,
        name: &Name,
        request: impl FnOnce(&[Disk]) -> Result<CheckpointRequest>,
    ) -> Result<()> {
        let work = || {
            let mut changes = self.begin_change()?;
            self.checkpoint_is_free(name)?;
            let disks = self.disks()?;
            let request = request(&disks)?;
            let new = self
                .new_checkpoint(&changes, &request, &disks)?
                .ok_or_else(|| no_disk_can(&disks))?;
            self.with_new_checkpoint(&mut changes, new, &disks, |new| {
                let new = NewCheckpoint {
                    quiesce: request.quiesce,
                    ..new.clone()
                };
                self.backend.create_checkpoint(&new)
            })
        };
        work().map_err(|e| e.during(format!("create checkpoint {name}")))?;
        log::info!("checkpoint {name} made");
        Ok(())
    }

    /// Gives a checkpoint another name, and its bitmaps with it where they bear its name.
    pub fn rename_checkpoint(&self, from: &Name, to: &Name) -> Result<()> {
        let work = || {
            let mut changes = self.begin_change()?;
            let place = self.place(&changes, from)?;
            if from == to {
                return Ok(());
            }
            self.checkpoint_is_free(to)?;
            let entry = Arc::clone(&self.state.read().checkpoints[place]);
            self.not_listed(&entry)?;
            let disks = self.disks()?;
            let renames = renamed_bitmaps(&entry.checkpoint, to, &disks)?;

            let record = changes.record.clone();
            self.intend(
                &mut changes,
                record,
                Pending::Rename(from.clone(), to.clone()),
            )?;
            if let Err(e) = self.backend.rename_checkpoint(&renames) {
                self.settle(&mut changes);
                return Err(e);
            }
            let renamed: Vec<String> = renames.into_iter().map(|r| r.target).collect();
            rename(&mut changes.record, from, to, &renamed);
            self.keep_number(entry.id, to);
            self.publish(&mut changes);
            self.save_outcome(&changes.record);
            Ok(())
        };
        work().map_err(|e| e.during(format!("rename checkpoint {from} to {to}")))?;
        log::info!("checkpoint {from} is now {to}");
        Ok(())
    }

    /// Forgets a checkpoint; what it recorded goes to its parent, so no change is lost.
    pub fn delete_checkpoint(&self, name: &Name) -> Result<()> {
        self.lock_changes_for_removal(name, |changes| self.delete(changes, name))
    }

    /// Deletes a checkpoint's descendants, newest first, and then itself unless `children_only`:
    /// libvirt's CHILDREN and CHILDREN_ONLY. Stops at the first that is refused; those deleted until
    /// then are gone.
    pub fn delete_checkpoints(&self, name: &Name, children_only: bool) -> Result<()> {
        self.lock_changes_for_removal(name, |changes| {
            self.place(changes, name)?;
            let mut going = self.descendants(name);
            if !children_only {
                going.insert(0, Arc::clone(&self.entry(name)?));
            }
            for entry in going.iter().rev() {
                let name = &entry.checkpoint.name;
                self.delete(changes, name)
                    .map_err(|e| e.during(format!("checkpoint {name}")))?;
            }
            Ok(())
        })
    }

    /// Forgets a checkpoint and leaves its bitmaps where they are: libvirt's METADATA_ONLY. What was
    /// recorded by it is then unknown, so older checkpoints cannot be trusted any more.
    pub fn forget_checkpoint(&self, name: &Name) -> Result<()> {
        self.lock_changes_for_removal(name, |changes| {
            self.not_listed(&*self.entry(name)?)?;
            if self.mirrors {
                self.backend.forget_checkpoint(name)?;
                return self.adopt(changes);
            }
            let mut record = changes.record.clone();
            forget(&mut record, name, &[]);
            self.store.save(&record)?;
            changes.record = record;
            self.publish(changes);
            Ok(())
        })
    }

    fn lock_changes_for_removal(
        &self,
        name: &Name,
        work: impl FnOnce(&mut Changes) -> Result<()>,
    ) -> Result<()> {
        self.begin_change()
            .and_then(|mut changes| work(&mut changes))
            .map_err(|e| e.during(format!("delete checkpoint {name}")))?;
        log::info!("checkpoint {name} deleted");
        Ok(())
    }

    fn delete(&self, changes: &mut Changes, name: &Name) -> Result<()> {
        let place = self.place(changes, name)?;
        let entry = self.entry(name)?;
        let disks = self.disks()?;
        let mut record = changes.record.clone();
        history::record_broken(&mut record.checkpoints, &disks);
        let all: Vec<&Checkpoint> = record.checkpoints.iter().collect();
        let removal = history::removal(&all, place, &disks);
        self.not_in_use(&entry, &removal)?;

        self.intend(changes, record, Pending::Delete(name.clone()))?;
        if let Err(e) = self.backend.delete_checkpoint(&removal) {
            // Whether it happened is looked up at the next change or start if this fails too.
            self.settle(changes);
            return Err(e);
        }
        if self.mirrors {
            return self.adopt(changes);
        }
        forget(&mut changes.record, name, &disks);
        self.publish(changes);
        self.save_outcome(&changes.record);
        Ok(())
    }

    /// Writes down what is about to be done, for a start after a kill. Where somebody else keeps the
    /// checkpoints, a look tells what was done.
    fn intend(&self, changes: &mut Changes, mut record: Record, pending: Pending) -> Result<()> {
        record.pending = Some(pending).filter(|_| !self.mirrors);
        self.store.save(&record)?;
        changes.record = record;
        Ok(())
    }

    /// Where a checkpoint stands in the record.
    fn place(&self, changes: &Changes, name: &Name) -> Result<usize> {
        let mut all = changes.record.checkpoints.iter();
        all.position(|c| c.name == *name)
            .ok_or_else(|| no_checkpoint(name))
    }

    fn entry(&self, name: &Name) -> Result<Arc<CheckpointEntry>> {
        self.checkpoint(name.as_str())
            .ok_or_else(|| no_checkpoint(name))
    }

    pub(super) fn checkpoint_is_free(&self, name: &Name) -> Result<()> {
        match self.checkpoint(name.as_str()) {
            None => Ok(()),
            Some(_) => Err(Error::new(
                Kind::Exists,
                format!("there is a checkpoint {name} already"),
            )),
        }
    }

    /// The checkpoint that would be made now, of `disks`; none if no disk can carry a bitmap and
    /// none was asked for by name.
    pub(super) fn new_checkpoint(
        &self,
        changes: &Changes,
        request: &CheckpointRequest,
        disks: &[Disk],
    ) -> Result<Option<Checkpoint>> {
        let mut covered = Vec::new();
        for disk in disks {
            let wanted = request.disks.as_ref();
            let wanted = wanted.map(|all| all.iter().find(|d| d.disk == disk.target));
            let bitmap = match (wanted, &disk.no_checkpoint) {
                (Some(None), _) | (None, Some(_)) => continue,
                (Some(Some(_)), Some(why)) => {
                    return Err(Error::new(
                        Kind::Unsupported,
                        format!("disk {} cannot carry a dirty bitmap: {why}", disk.target),
                    )
                    .hint("leave the disk out with checkpoint='no'"));
                }
                (Some(Some(wanted)), None) => wanted.bitmap.clone(),
                (None, None) => None,
            };
            let bitmap = bitmap.unwrap_or_else(|| request.name.to_string());
            if disk.bitmaps.iter().any(|b| b.name == bitmap) {
                return Err(Error::new(
                    Kind::Exists,
                    format!(
                        "disk {} already has a dirty bitmap {bitmap} that belongs to no checkpoint \
                         of this name",
                        disk.target
                    ),
                )
                .hint("choose another name, or remove that bitmap with qemu-img bitmap --remove"));
            }
            covered.push(CheckpointDisk {
                target: disk.target.clone(),
                bitmap,
                size: disk.size,
                image: disk.path().map(str::to_owned),
                broken: None,
            });
        }
        if covered.is_empty() {
            return Ok(None);
        }
        Ok(Some(Checkpoint {
            name: request.name.clone(),
            created: changes.record.next_time(SystemTime::now()),
            parent: changes.record.checkpoints.last().map(|c| c.name.clone()),
            description: request.description.clone(),
            disks: covered,
        }))
    }

    /// Does `work`, which makes the bitmaps of `checkpoint`, between writing down the intent and
    /// writing down the outcome.
    pub(super) fn with_new_checkpoint<T>(
        &self,
        changes: &mut Changes,
        checkpoint: Checkpoint,
        disks: &[Disk],
        work: impl FnOnce(&NewCheckpoint) -> Result<T>,
    ) -> Result<T> {
        let mut record = changes.record.clone();
        history::record_broken(&mut record.checkpoints, disks);
        let all: Vec<&Checkpoint> = record.checkpoints.iter().collect();
        let granularity = self.options.granularity;
        let new = NewCheckpoint {
            name: checkpoint.name.clone(),
            description: checkpoint.description.clone(),
            created: checkpoint.created,
            bitmaps: history::new_bitmaps(&checkpoint, disks, &all, granularity),
            quiesce: false,
        };
        self.intend(changes, record, Pending::Create(checkpoint.clone()))?;

        let outcome = work(&new);
        match &outcome {
            // It is made, whatever becomes of the look at it.
            Ok(_) if self.mirrors => self.settle(changes),
            Ok(_) => {
                changes.record.pending = None;
                changes.record.last_created = Some(checkpoint.created);
                changes.record.checkpoints.push(checkpoint);
                self.publish(changes);
                self.save_outcome(&changes.record);
            }
            Err(_) => self.settle(changes),
        }
        outcome
    }

    /// A renamed checkpoint is still the same: inode numbers and open files go by its number.
    fn keep_number(&self, id: u32, name: &Name) {
        let mut state = self.state.write();
        for entry in state.checkpoints.iter_mut().filter(|e| e.id == id) {
            let mut checkpoint = entry.checkpoint.clone();
            checkpoint.name = name.clone();
            *entry = Arc::new(CheckpointEntry { id, checkpoint });
        }
    }

    /// EBUSY if a running backup lists the changes since the checkpoint.
    fn not_listed(&self, entry: &CheckpointEntry) -> Result<()> {
        let removal = CheckpointRemoval {
            name: entry.checkpoint.name.clone(),
            bitmaps: Vec::new(),
        };
        self.not_in_use(entry, &removal)
    }

    /// EBUSY if a running backup lists the changes since the checkpoint, or reads a bitmap that
    /// the removal would change.
    fn not_in_use(&self, entry: &CheckpointEntry, removal: &CheckpointRemoval) -> Result<()> {
        for backup in self.backups() {
            let listed = backup.since().iter().any(|s| s.id == entry.id);
            let mut merges = removal.bitmaps.iter();
            let changed = merges.any(|r| {
                let mut into = r.merge_into.iter();
                into.any(|into| backup.reads_bitmap(&r.target, into))
            });
            if listed || changed {
                return Err(Error::new(
                    Kind::Busy,
                    format!(
                        "checkpoint {} is in use: backup {} lists what changed since",
                        removal.name,
                        backup.name()
                    ),
                )
                .hint(format!(
                    "end the backup first: rmdir backups/{}",
                    backup.name()
                )));
            }
        }
        Ok(())
    }
}

/// The bitmaps that go along when a checkpoint gets another name: those that bear its name.
fn renamed_bitmaps(
    checkpoint: &Checkpoint,
    to: &Name,
    disks: &[Disk],
) -> Result<Vec<RenameBitmap>> {
    let mut renames = Vec::new();
    for entry in &checkpoint.disks {
        let Some(disk) = disks.iter().find(|d| d.target == entry.target) else {
            continue;
        };
        let of_another = |b: &Bitmap| b.name == to.as_str() && b.name != entry.bitmap;
        if disk.bitmaps.iter().any(of_another) {
            return Err(Error::new(
                Kind::Exists,
                format!("disk {} already has a dirty bitmap {to}", disk.target),
            ));
        }
        let bitmap = disk.bitmaps.iter().find(|b| b.name == entry.bitmap);
        let Some(bitmap) = bitmap.filter(|b| b.name == checkpoint.name.as_str()) else {
            continue;
        };
        if bitmap.inconsistent {
            return Err(Error::new(
                Kind::Stale,
                format!(
                    "bitmap {} of disk {} is inconsistent",
                    bitmap.name, disk.target
                ),
            )
            .hint("it can only be removed: delete the checkpoint"));
        }
        renames.push(RenameBitmap {
            target: disk.target.clone(),
            from: bitmap.name.clone(),
            to: to.to_string(),
            recording: bitmap.recording,
            granularity: bitmap.granularity,
        });
    }
    Ok(renames)
}

pub(super) fn no_checkpoint(name: &Name) -> Error {
    Error::new(Kind::NotFound, format!("there is no checkpoint {name}"))
}

fn no_disk_can(disks: &[Disk]) -> Error {
    let reasons: Vec<String> = disks
        .iter()
        .filter_map(|d| Some(format!("{}: {}", d.target, d.no_checkpoint.as_ref()?)))
        .collect();
    let why = if reasons.is_empty() {
        "the domain has no writable disk".to_owned()
    } else {
        reasons.join("; ")
    };
    Error::new(
        Kind::Unsupported,
        format!("no disk can carry a persistent dirty bitmap ({why})"),
    )
    .hint("qcow2 version 3 can: qemu-img amend -o compat=v3, or qemu-img convert -O qcow2")
}
