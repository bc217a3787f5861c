//! After a change whose outcome is unknown: the answer was lost, or fleecefs was killed.

use super::history;
use super::store::{Pending, Record, Store};
use crate::backend::Backend;
use crate::model::{Checkpoint, CheckpointDisk, Disk, Name, Result};

/// Undoes or completes a change whose outcome is unknown, by looking at the domain.
///
/// A checkpoint that was being made is removed again if its bitmaps are there: whoever asked for it
/// got an error, or no answer. One that was being deleted is gone if its bitmaps are; QEMU's
/// transactions do all or nothing, so any one bitmap tells.
pub(super) fn recover(backend: &dyn Backend, store: &Store, record: &mut Record) -> Result<()> {
    let Some(pending) = record.pending.clone() else {
        return Ok(());
    };
    let disks = backend.disks()?;
    let present = |c: &Checkpoint| {
        c.disks.iter().any(|entry| {
            let disk = disks.iter().find(|d| d.target == entry.target);
            disk.is_some_and(|d| d.bitmaps.iter().any(|b| b.name == entry.bitmap))
        })
    };
    match pending {
        Pending::Create(checkpoint) => {
            if present(&checkpoint) {
                log::warn!(
                    "undoing checkpoint {}, which was left half made",
                    checkpoint.name
                );
                let mut all: Vec<&Checkpoint> = record.checkpoints.iter().collect();
                all.push(&checkpoint);
                let removal = history::removal(&all, all.len() - 1, &disks);
                backend.delete_checkpoint(&removal)?;
            }
        }
        Pending::Delete(name) => {
            let known = record.checkpoints.iter().find(|c| c.name == name);
            if known.is_some_and(|c| !present(c)) {
                log::warn!("checkpoint {name} was being deleted, and is gone");
                forget(record, &name, &disks);
            }
        }
        Pending::Rename(from, to) => {
            let known = record.checkpoints.iter().find(|c| c.name == from);
            // Bitmaps that did not bear the name, or were away, kept theirs.
            let renamed = |entry: &&CheckpointDisk| {
                let has = |bitmap: &Name| {
                    let disk = disks.iter().find(|d| d.target == entry.target);
                    disk.is_some_and(|d| d.bitmaps.iter().any(|b| b.name == bitmap.as_str()))
                };
                entry.bitmap == from.as_str() && has(&to) && !has(&from)
            };
            let renamed = known.iter().flat_map(|c| c.disks.iter().filter(renamed));
            let renamed: Vec<String> = renamed.map(|entry| entry.target.clone()).collect();
            // Where there is none, nothing had to be done in the domain.
            if !renamed.is_empty() {
                log::warn!("checkpoint {from} was being renamed, and is now {to}");
                rename(record, &from, &to, &renamed);
            }
        }
    }
    record.pending = None;
    store.save(record)
}

/// Gives a checkpoint another name in the record, and to its bitmaps on the disks of these targets.
pub(super) fn rename(record: &mut Record, from: &Name, to: &Name, disks: &[String]) {
    record.pending = None;
    for checkpoint in &mut record.checkpoints {
        if checkpoint.name == *from {
            checkpoint.rename(to, disks);
        }
        if checkpoint.parent.as_ref() == Some(from) {
            checkpoint.parent = Some(to.clone());
        }
    }
}

/// Takes a checkpoint out of the record; its children become its parent's. On these disks its parent's
/// bitmaps took over what its own had recorded; on any other it is lost to all before it.
pub(super) fn forget(record: &mut Record, name: &Name, disks: &[Disk]) {
    record.pending = None;
    let Some(place) = record.checkpoints.iter().position(|c| c.name == *name) else {
        return;
    };
    let gone = record.checkpoints.remove(place);
    for checkpoint in &mut record.checkpoints {
        if checkpoint.parent.as_ref() == Some(name) {
            checkpoint.parent.clone_from(&gone.parent);
        }
    }
    let handed_on = |target: &String| disks.iter().any(|d| d.target == *target);
    let older = record.checkpoints.iter_mut().take(place);
    for disk in older.flat_map(|c| &mut c.disks) {
        let lost = gone.disk(&disk.target).is_some() && !handed_on(&disk.target);
        if lost && disk.broken.is_none() {
            disk.broken = Some(format!(
                "what checkpoint {name} had recorded was lost: it was forgotten, or deleted while the \
                 disk was away"
            ));
        }
    }
}
