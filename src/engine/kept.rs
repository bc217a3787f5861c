//! Checkpoints that somebody else keeps: libvirt has a record of its own, and virsh and others change
//! it as they like. The engine's record then only mirrors that one: it is taken over when the domain
//! is opened, before each change and after it, and whenever the backend sees that it has changed. No
//! intent is written down, since whatever became of a change is seen by looking.
//!
//! One thing nobody else remembers: how large a disk was when its checkpoint was made. A disk that was
//! made smaller and larger again has zeros that no bitmap tells of. So the size at which a checkpoint was
//! first seen is kept, and outlives the mount; and so is the image that the disk was.

use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime};

use super::domain::{Changes, Domain};
use super::store::{Kept, Record};
use crate::model::{Checkpoint, CheckpointRemoval, Error, Kind, Name, NewCheckpoint, Result};

const SECOND: Duration = Duration::from_secs(1);

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

    /// Looks again when the present second is over, if a checkpoint was made in it: another of its name, made
    /// a moment later, could not be told from it. (A new checkpoint would be waited for just as long.)
    pub(super) fn tell_apart(&self, changes: &mut Changes) -> Result<()> {
        let Some(newest) = changes.record.kept.iter().map(|k| k.theirs).max() else {
            return Ok(());
        };
        match (newest + SECOND).duration_since(SystemTime::now()) {
            // A clock that was set back is not waited for.
            Ok(wait) if wait <= SECOND => {
                std::thread::sleep(wait);
                self.adopt(changes)
            }
            _ => Ok(()),
        }
    }

    /// Looks whether the bases of a backup that has begun are what they were when it was planned: their
    /// keeper knows them by name only, and somebody may have made one anew. If they are not, it is undone.
    pub(super) fn sure_of<T>(
        &self,
        bases: &[Kept],
        new: Option<&NewCheckpoint>,
        begun: T,
        end: impl FnOnce(&T) -> Result<()>,
    ) -> Result<T> {
        let looked = match bases {
            [] => return Ok(begun),
            _ => self.backend.own_checkpoints(),
        };
        let why = match looked.map(Option::unwrap_or_default) {
            Err(e) => e,
            Ok(now) => {
                let there = |k: &Kept| {
                    now.iter()
                        .any(|c| c.name == k.name && c.created == k.theirs)
                };
                match bases.iter().find(|base| !there(base)) {
                    None => return Ok(begun),
                    Some(base) => Error::new(
                        Kind::Busy,
                        format!(
                            "someone else deleted checkpoint {}, or made it anew, while the backup began",
                            base.name
                        ),
                    )
                    .hint("begin it again"),
                }
            }
        };
        let undone = end(&begun).and_then(|()| match new {
            Some(new) => self.backend.delete_checkpoint(&CheckpointRemoval {
                name: new.name.clone(),
                bitmaps: Vec::new(),
            }),
            None => Ok(()),
        });
        if let Err(e) = undone {
            log::error!("undoing a backup whose base was changed: {e}");
        }
        Err(why)
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
    let before = record.clone();
    give_times(record, &kept);
    let mut kept: Vec<Checkpoint> = kept
        .into_iter()
        .filter_map(|checkpoint| {
            let created = shown(record, &checkpoint.name, checkpoint.created)?;
            let known = before.checkpoints.iter();
            // Its time here is its alone.
            let same = |c: &&Checkpoint| c.name == checkpoint.name && c.created == created;
            let known = known.clone().find(same);
            Some(seen(
                Checkpoint {
                    created,
                    ..checkpoint
                },
                known,
            ))
        })
        .collect();
    kept.sort_by_key(|c| c.created);
    record.checkpoints = kept;
    *record != before
}

/// The checkpoint with what is remembered from when it was first seen.
fn seen(mut checkpoint: Checkpoint, known: Option<&Checkpoint>) -> Checkpoint {
    for entry in &mut checkpoint.disks {
        let Some(known) = known.and_then(|k| k.disk(&entry.target)) else {
            continue;
        };
        // 0 is of a disk whose size could not be told.
        if known.size != 0 {
            entry.size = known.size;
        }
        if known.image.is_some() {
            entry.image.clone_from(&known.image);
        }
    }
    checkpoint
}

fn shown(record: &Record, name: &Name, theirs: SystemTime) -> Option<SystemTime> {
    let mut all = record.kept.iter();
    let kept = all.find(|k| k.name == *name && k.theirs == theirs)?;
    Some(kept.shown)
}

/// Gives each checkpoint a time of its own, since a time is what tells checkpoints apart in tables of
/// stamps: of several that were made in one second, the later ones are shown a second later each. What one
/// was given it keeps, whatever becomes of the others.
fn give_times(record: &mut Record, kept: &[Checkpoint]) {
    let there = |k: &Kept| {
        kept.iter()
            .any(|c| c.name == k.name && c.created == k.theirs)
    };
    record.kept.retain(there);
    for checkpoint in parents_first(kept) {
        let (name, theirs) = (&checkpoint.name, checkpoint.created);
        if shown(record, name, theirs).is_some() {
            continue;
        }
        let mut time = theirs;
        // In a table of stamps it must not pass for an earlier one, which may be gone by now: made in the
        // same second, or before the clock was set back.
        if let Some(last) = record.last_created {
            time = time.max(last + SECOND);
        }
        record.kept.push(Kept {
            name: name.clone(),
            theirs,
            shown: time,
        });
        record.last_created = Some(time);
    }
}

/// A checkpoint was redefined: it is the one that it was, and shown with the time that it had.
pub(super) fn expect(record: &mut Record, again: &Checkpoint) {
    let (name, created) = (&again.name, again.created);
    let taken = record.kept.iter().any(|k| k.shown == created);
    if !taken {
        record.kept.push(Kept {
            name: name.clone(),
            theirs: created,
            shown: created,
        });
    }
}

/// The oldest first, but none before its parent, which a clock that was set back may have made later.
fn parents_first(kept: &[Checkpoint]) -> Vec<&Checkpoint> {
    let mut left: Vec<&Checkpoint> = kept.iter().collect();
    left.sort_by_key(|c| c.created);
    let mut all = Vec::new();
    while !left.is_empty() {
        let waits = |c: &&Checkpoint| left.iter().any(|p| Some(&p.name) == c.parent.as_ref());
        // In a circle of parents, which nobody makes, any is as good.
        let next = left.iter().position(|c| !waits(c)).unwrap_or(0);
        all.push(left.remove(next));
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::CheckpointDisk;

    #[test]
    fn size_and_image_at_first_sight_stay() {
        let seen_as = |second, size, image: &str| Checkpoint {
            name: Name::new("a").unwrap(),
            created: SystemTime::UNIX_EPOCH + Duration::from_secs(second),
            parent: None,
            description: None,
            disks: vec![CheckpointDisk {
                target: "vda".to_owned(),
                bitmap: "a".to_owned(),
                size,
                image: Some(image.to_owned()),
                broken: None,
            }],
        };
        let seen = |second, size| seen_as(second, size, "/a");
        let mut record = Record::default();
        assert!(take_over(&mut record, vec![seen(10, 100)]));
        assert!(!take_over(&mut record, vec![seen(10, 200)]));
        // Such as when it was redefined.
        assert!(!take_over(&mut record, vec![seen_as(10, 100, "/b")]));
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
        let times = |record: &Record| -> Vec<(String, u64)> {
            let all = record.checkpoints.iter().map(|c| {
                let since = c.created.duration_since(SystemTime::UNIX_EPOCH);
                (c.name.to_string(), since.unwrap().as_secs())
            });
            all.collect()
        };
        let expect = |record: &Record, all: &[(&str, u64)]| {
            let all: Vec<_> = all.iter().map(|(n, t)| ((*n).to_owned(), *t)).collect();
            assert_eq!(times(record), all);
        };
        let a = made("a", None, 10);
        let b = made("b", None, 10);
        let c = made("c", Some("a"), 10);
        let d = made("d", Some("c"), 9);
        let mut record = Record::default();
        let all = vec![a.clone(), c.clone(), d.clone(), b.clone()];
        assert!(take_over(&mut record, all.clone()));
        expect(&record, &[("a", 10), ("c", 11), ("d", 12), ("b", 13)]);
        assert!(!take_over(&mut record, all));

        // Whatever becomes of the others, each keeps its time.
        let b_and_d = || {
            vec![
                b.clone(),
                Checkpoint {
                    parent: None,
                    ..d.clone()
                },
            ]
        };
        assert!(take_over(&mut record, b_and_d()));
        expect(&record, &[("d", 12), ("b", 13)]);
        // One that is new is later than all that ever were, unless it was announced.
        let (again, old) = (made("a", None, 10), made("old", None, 5));
        super::expect(&mut record, &old);
        assert!(take_over(
            &mut record,
            [vec![again, old], b_and_d()].concat()
        ));
        expect(&record, &[("old", 5), ("d", 12), ("b", 13), ("a", 14)]);
    }
}
