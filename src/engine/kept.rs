//! Checkpoints that somebody else keeps: libvirt has a record of its own, and virsh and others change
//! it as they like. The engine's record then only mirrors that one: it is taken over when the domain
//! is opened, before each change and after it, and whenever the backend sees that it has changed. No
//! intent is written down, since whatever became of a change is seen by looking.
//!
//! One thing nobody else remembers: how large a disk was when its checkpoint was made. A disk that was
//! made smaller and larger again has zeros that no bitmap tells of. So the size at which a checkpoint was
//! first seen is kept, and outlives the mount.

use std::sync::atomic::Ordering;
use std::time::Duration;

use super::domain::{Changes, Domain};
use super::store::Record;
use crate::model::{Checkpoint, Result};

impl Domain {
    /// Takes over the checkpoints of whoever keeps them. Does nothing where that is the engine.
    pub(super) fn adopt(&self, changes: &mut Changes) -> Result<()> {
        if !self.mirrors {
            return Ok(());
        }
        let kept = self.backend.own_checkpoints()?;
        self.mirror(changes, kept.unwrap_or_default());
        Ok(())
    }

    /// Shows what others did to the checkpoints, if the backend has seen something. Waits for nothing:
    /// during a change there is nothing to be seen yet.
    pub(super) fn adopt_seen(&self) {
        let number = self.seen.load(Ordering::Acquire);
        if let Some((number, seen)) = self.backend.seen_checkpoints(number)
            && let Some(mut changes) = self.try_changes()
        {
            self.seen.store(number, Ordering::Release);
            self.mirror(&mut changes, seen);
        }
    }

    fn mirror(&self, changes: &mut Changes, kept: Vec<Checkpoint>) {
        if take_over(&mut changes.record, kept) {
            // Only sizes would be lost, and only if a disk is resized before the next one succeeds.
            if let Err(e) = self.store.save(&changes.record) {
                log::warn!("the sizes of disks are not remembered: {e}");
            }
            self.publish(changes);
        }
    }
}

/// Makes the record say what the keeper's does; whether that was something new.
pub(super) fn take_over(record: &mut Record, kept: Vec<Checkpoint>) -> bool {
    let mut kept = in_order(kept);
    for checkpoint in &mut kept {
        let same = |c: &&Checkpoint| c.name == checkpoint.name && c.created == checkpoint.created;
        let Some(known) = record.checkpoints.iter().find(same) else {
            continue;
        };
        for entry in &mut checkpoint.disks {
            // 0 is of a disk whose size could not be told.
            if let Some(known) = known.disk(&entry.target).filter(|known| known.size != 0) {
                entry.size = known.size;
            }
        }
    }
    let new = kept != record.checkpoints;
    if new {
        let newest = kept.last().map(|c| c.created);
        record.last_created = record.last_created.max(newest);
        record.checkpoints = kept;
    }
    new
}

/// Oldest first, with times of their own: two that were made in one second differ by one here, since
/// a time is what tells checkpoints apart in tables of stamps.
fn in_order(mut all: Vec<Checkpoint>) -> Vec<Checkpoint> {
    for place in 0..all.len() {
        let (before, rest) = all.split_at_mut(place);
        let Some(this) = rest.first_mut() else { break };
        let parent = before
            .iter()
            .find(|c| Some(&c.name) == this.parent.as_ref());
        if let Some(parent) = parent {
            this.created = this.created.max(parent.created + Duration::from_secs(1));
        }
    }
    all.sort_by_key(|c| c.created);
    for place in 1..all.len() {
        let floor = all[place - 1].created + Duration::from_secs(1);
        all[place].created = all[place].created.max(floor);
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{CheckpointDisk, Name};
    use std::time::SystemTime;

    #[test]
    fn the_size_at_first_sight_stays() {
        let seen = |second, size| Checkpoint {
            name: Name::new("a").unwrap(),
            created: SystemTime::UNIX_EPOCH + Duration::from_secs(second),
            parent: None,
            description: None,
            disks: vec![CheckpointDisk {
                target: "vda".to_owned(),
                bitmap: "a".to_owned(),
                size,
                image: None,
                broken: None,
            }],
        };
        let mut record = Record::default();
        assert!(take_over(&mut record, vec![seen(10, 100)]));
        assert!(!take_over(&mut record, vec![seen(10, 200)]));
        assert_eq!(record.checkpoints, [seen(10, 100)]);
        // Another one of the same name.
        assert!(take_over(&mut record, vec![seen(11, 200)]));
        assert_eq!(record.checkpoints, [seen(11, 200)]);
    }

    #[test]
    fn one_second_is_one_checkpoints() {
        let made = |name: &str, parent: Option<&str>, second| Checkpoint {
            name: Name::new(name).unwrap(),
            created: SystemTime::UNIX_EPOCH + Duration::from_secs(second),
            parent: parent.map(|p| Name::new(p).unwrap()),
            description: None,
            disks: Vec::new(),
        };
        let ordered = in_order(vec![
            made("a", None, 10),
            made("c", Some("a"), 10),
            made("d", Some("c"), 9),
            made("b", None, 10),
        ]);
        let all: Vec<(&str, u64)> = ordered
            .iter()
            .map(|c| {
                let since = c.created.duration_since(SystemTime::UNIX_EPOCH);
                (c.name.as_str(), since.unwrap().as_secs())
            })
            .collect();
        assert_eq!(all, [("a", 10), ("b", 11), ("c", 12), ("d", 13)]);
    }
}
