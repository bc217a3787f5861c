//! Checkpoints that somebody else keeps: libvirt has a record of its own, and virsh and others change
//! it as they like. The engine's record then only mirrors that one: it is taken over when the domain
//! is opened, before each change and after it, and whenever the backend sees that it has changed. No
//! intent is written down, since whatever became of a change is seen by looking.

use std::sync::atomic::Ordering;
use std::time::Duration;

use super::domain::{Changes, Domain};
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
        let kept = in_order(kept);
        if kept != changes.record.checkpoints {
            let newest = kept.last().map(|c| c.created);
            changes.record.last_created = changes.record.last_created.max(newest);
            changes.record.checkpoints = kept;
            self.publish(changes);
        }
    }
}

/// Oldest first, with times of their own: two that were made in one second differ by one here, since
/// a time is what tells checkpoints apart in tables of stamps.
pub(super) fn in_order(mut all: Vec<Checkpoint>) -> Vec<Checkpoint> {
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
    use crate::model::Name;
    use std::time::SystemTime;

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
