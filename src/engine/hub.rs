//! Tells whoever listens what happened, each thing once.

use std::collections::{HashMap, HashSet};
use std::time::SystemTime;

use crossbeam_channel::{Receiver, Sender, unbounded};
use parking_lot::Mutex;

use super::domain::CheckpointEntry;
use super::history::Chain;
use crate::backend::Notice;
use crate::model::{Checkpoint, Disk, Error, Event, Happening, JobId, Mode, Name, Outcome};

/// Subscribers, and what they need not be told again.
#[derive(Default)]
pub(super) struct Hub {
    subscribers: Mutex<Vec<Sender<Event>>>,
    /// Jobs whose end was not told yet.
    jobs: Mutex<HashMap<JobId, (Name, Mode)>>,
    /// Checkpoints, by number, and disks on which they are known to be broken.
    broken: Mutex<HashSet<(u32, String)>>,
}

impl Hub {
    pub(super) fn subscribe(&self) -> Receiver<Event> {
        let (sender, receiver) = unbounded();
        self.subscribers.lock().push(sender);
        receiver
    }

    fn tell(&self, what: Happening) {
        let event = Event {
            time: SystemTime::now(),
            what,
        };
        let mut subscribers = self.subscribers.lock();
        subscribers.retain(|s| s.send(event.clone()).is_ok());
    }

    /// A job that is about to begin: it may be over before the call that begins it returns.
    pub(super) fn add_job(&self, id: JobId, name: &Name, mode: Mode) {
        self.jobs.lock().insert(id, (name.clone(), mode));
    }

    /// A job that did not begin after all.
    pub(super) fn drop_job(&self, id: JobId) {
        self.jobs.lock().remove(&id);
    }

    /// A job is over; only the first word on that counts.
    pub(super) fn job_over(&self, id: JobId, outcome: Result<Outcome, Error>) {
        let known = self.jobs.lock().remove(&id);
        let Some((name, mode)) = known else { return };
        match &outcome {
            Ok(outcome) => log::info!("backup {name}, job {id}: {}", outcome.word()),
            Err(why) => log::error!("backup {name}, job {id}: failed: {why}"),
        }
        self.tell(Happening::JobCompleted {
            id,
            name,
            mode,
            outcome,
        });
    }

    /// What the backend noticed.
    pub(super) fn notice(&self, notice: Notice) {
        match notice {
            Notice::Over(id, outcome) => self.job_over(id, outcome),
            Notice::ScratchThreshold(id, used, limit) => {
                let known = self.jobs.lock().get(&id).cloned();
                if let Some((name, _)) = known {
                    log::warn!("backup {name}: {used} of {limit} bytes of scratch space are used");
                    self.tell(Happening::ScratchThreshold {
                        id,
                        name,
                        used,
                        limit,
                    });
                }
            }
        }
    }

    /// Tells which checkpoints a look at the disks shows to be broken.
    pub(super) fn looked(&self, entries: &[std::sync::Arc<CheckpointEntry>], disks: &[Disk]) {
        let all: Vec<&Checkpoint> = entries.iter().map(|e| &e.checkpoint).collect();
        for disk in disks {
            let chain = Chain::of(disk, &all);
            let Some(why) = chain.broken else { continue };
            let first_sound = chain.links.first().map_or(usize::MAX, |l| l.0);
            let covering = entries.iter().take(first_sound);
            for entry in covering.filter(|e| e.checkpoint.disk(&disk.target).is_some()) {
                let name = entry.checkpoint.name.clone();
                if self.broken.lock().insert((entry.id, disk.target.clone())) {
                    self.tell(Happening::CheckpointBroken {
                        name,
                        disk: disk.target.clone(),
                        why: why.clone(),
                    });
                }
            }
        }
    }
}
