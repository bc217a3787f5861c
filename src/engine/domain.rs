//! A mounted domain: what it consists of, who may change it, and looking at it. The changes
//! themselves are in `checkpoints` and `backups`.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use crossbeam_channel::Receiver;
use parking_lot::{Mutex, MutexGuard, RwLock};

use super::backup::Backup;
use super::hub::Hub;
use super::job::Job;
use super::kept::take_over;
use super::recovery::recover;
use super::stamps::Tables;
use super::status::{CheckpointStatus, disk_status};
use super::store::{Record, Store};
use crate::backend::Backend;
use crate::model::{Checkpoint, Disk, DomainInfo, Error, Event, JobId, Kind, Name, Result};

/// How a domain is treated.
#[derive(Debug, Clone)]
pub struct Options {
    /// A backup also makes a checkpoint of its name.
    pub checkpoint: bool,
    /// How long a change waits for the one before it.
    pub timeout: Duration,
    /// Bytes that a bit of a new bitmap stands for; `None` leaves it to QEMU (the image's cluster size,
    /// but from 4 KiB to 64 KiB).
    pub granularity: Option<u64>,
    /// Bytes in a slice of a disk; a power of two.
    pub slice_size: u64,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            checkpoint: true,
            timeout: Duration::from_secs(30),
            granularity: None,
            slice_size: 8 << 20,
        }
    }
}

/// A checkpoint and its number, which is never given out again while the mount lives.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CheckpointEntry {
    /// The number.
    pub id: u32,
    /// The checkpoint.
    pub checkpoint: Checkpoint,
}

pub(super) struct State {
    /// Oldest first, in step with the record's checkpoints.
    pub(super) checkpoints: Vec<Arc<CheckpointEntry>>,
    pub(super) jobs: BTreeMap<Name, Job>,
}

/// A domain whose checkpoints and backups can be managed: the RFC's API as a library.
///
#[doc = include_str!("../../docs/rfc.md")]
pub struct Domain {
    pub(super) backend: Arc<dyn Backend>,
    pub(super) store: Store,
    pub(super) options: Options,
    /// What is on disk, and the right to change anything.
    changes: Mutex<Changes>,
    pub(super) state: RwLock<State>,
    pub(super) hub: Arc<Hub>,
    pub(super) tables: Arc<Tables>,
    /// Somebody else keeps the checkpoints: see `kept`.
    pub(super) mirrors: bool,
    /// The number of what was last seen there.
    pub(super) seen: AtomicU64,
    closed: AtomicBool,
}

pub(super) struct Changes {
    pub(super) record: Record,
    next_checkpoint: u32,
    pub(super) next_job: JobId,
}

impl Changes {
    fn new_checkpoint_id(&mut self) -> u32 {
        self.next_checkpoint += 1;
        self.next_checkpoint
    }
}

impl Domain {
    /// Takes up the domain where the last mount left it: an interrupted change is undone.
    pub fn open(backend: Arc<dyn Backend>, store: Store, options: Options) -> Result<Self> {
        // The store's lock is what makes it certain that nobody else works on the domain.
        backend.tidy()?;
        let mut changes = Changes {
            record: store.load()?,
            next_checkpoint: 0,
            next_job: 0,
        };
        let kept = backend.own_checkpoints()?;
        let mirrors = kept.is_some();
        match kept {
            Some(kept) => {
                if take_over(&mut changes.record, kept) {
                    store.save(&changes.record)?;
                }
            }
            None => recover(&*backend, &store, &mut changes.record)?,
        }
        let newest = changes.record.checkpoints.last().map(|c| c.created);
        changes.record.last_created = changes.record.last_created.max(newest);
        let checkpoints = changes.record.checkpoints.clone();
        let checkpoints = checkpoints
            .into_iter()
            .map(|checkpoint| {
                Arc::new(CheckpointEntry {
                    id: changes.new_checkpoint_id(),
                    checkpoint,
                })
            })
            .collect();
        let hub = Arc::new(Hub::default());
        let listener = Arc::clone(&hub);
        backend.listen(Box::new(move |notice| listener.notice(notice)));
        let tables = Tables::new(store.dir().to_owned(), options.slice_size);
        Ok(Self {
            tables: Arc::new(tables),
            backend,
            store,
            options,
            hub,
            mirrors,
            seen: AtomicU64::new(0),
            changes: Mutex::new(changes),
            state: RwLock::new(State {
                checkpoints,
                jobs: BTreeMap::new(),
            }),
            closed: AtomicBool::new(false),
        })
    }

    /// Who the domain is.
    pub fn info(&self) -> DomainInfo {
        self.backend.info()
    }

    /// The disks as they are now; asks the domain.
    pub fn disks(&self) -> Result<Vec<Disk>> {
        let disks = self.backend.disks()?;
        self.hub.looked(&self.checkpoints(), &disks);
        Ok(disks)
    }

    /// What happens from now on. A receiver that is dropped is forgotten.
    pub fn subscribe(&self) -> Receiver<Event> {
        self.hub.subscribe()
    }

    /// The checkpoints, oldest first. Asks nobody.
    pub fn checkpoints(&self) -> Vec<Arc<CheckpointEntry>> {
        self.adopt_seen();
        self.state.read().checkpoints.clone()
    }

    /// The checkpoint of this name. Asks nobody.
    pub fn checkpoint(&self, name: &str) -> Option<Arc<CheckpointEntry>> {
        self.adopt_seen();
        let state = self.state.read();
        let mut all = state.checkpoints.iter();
        all.find(|c| c.checkpoint.name.as_str() == name).cloned()
    }

    /// The backups of either mode, by name. Asks nobody.
    pub fn jobs(&self) -> Vec<Job> {
        self.state.read().jobs.values().cloned().collect()
    }

    /// The backup of this name. Asks nobody.
    pub fn job(&self, name: &str) -> Option<Job> {
        let state = self.state.read();
        let mut all = state.jobs.values();
        all.find(|j| j.name().as_str() == name).cloned()
    }

    /// The backup of this number. Asks nobody.
    pub fn job_by_id(&self, id: JobId) -> Option<Job> {
        let state = self.state.read();
        let mut all = state.jobs.values();
        all.find(|j| j.id() == id).cloned()
    }

    /// The pull backups, by name. Asks nobody.
    pub fn backups(&self) -> Vec<Arc<Backup>> {
        let state = self.state.read();
        let pulls = state.jobs.values().filter_map(Job::pull);
        pulls.cloned().collect()
    }

    /// The pull backup of this name. Asks nobody.
    pub fn backup(&self, name: &str) -> Option<Arc<Backup>> {
        self.job(name)?.pull().cloned()
    }

    /// The backup that holds `current/`. Asks nobody.
    pub fn current_backup(&self) -> Option<Arc<Backup>> {
        self.backups().into_iter().find(|b| b.holds_current())
    }

    /// The backup that has this place among those that run. Asks nobody.
    pub fn backup_in_slot(&self, slot: u8) -> Option<Arc<Backup>> {
        self.backups().into_iter().find(|b| b.slot() == Some(slot))
    }

    /// The pull backup of this number. Asks nobody.
    pub fn backup_by_id(&self, id: JobId) -> Option<Arc<Backup>> {
        self.job_by_id(id)?.pull().cloned()
    }

    /// The checkpoint of this number. Asks nobody.
    pub fn checkpoint_by_id(&self, id: u32) -> Option<Arc<CheckpointEntry>> {
        let state = self.state.read();
        state.checkpoints.iter().find(|c| c.id == id).cloned()
    }

    /// Why the domain can no longer be reached, if that is known. Asks nobody.
    pub fn failure(&self) -> Option<Error> {
        self.backend.failure()
    }

    /// How a checkpoint stands now; asks the domain once.
    pub fn checkpoint_status(&self, id: u32) -> Result<CheckpointStatus> {
        let entries = self.checkpoints();
        let Some(place) = entries.iter().position(|e| e.id == id) else {
            return Err(Error::new(Kind::NotFound, "the checkpoint was deleted"));
        };
        let disks = self.disks()?;
        let all: Vec<&Checkpoint> = entries.iter().map(|e| &e.checkpoint).collect();
        let disks = all[place]
            .disks
            .iter()
            .map(|entry| disk_status(entry, place, &disks, &all))
            .collect();
        Ok(CheckpointStatus { disks })
    }

    /// Ends everything and lets go of the domain. Goes on after a failure; the first one is told.
    pub fn close(&self) -> Result<()> {
        if self.closed.swap(true, Ordering::AcqRel) {
            return Ok(());
        }
        // A change that is under way comes to its end, or to its deadline: what it begins is ended below,
        // and a guest that it has frozen is not left so. No other one begins any more.
        let mut result = self.lock_changes().map(drop);
        if let Err(e) = &result {
            log::error!("{e}");
        }
        for job in self.jobs() {
            // A push backup that nobody waits for any more is broken off.
            let ended = self.end(job.id(), true).map(drop);
            if let Err(e) = &ended {
                log::error!("{e}");
            }
            result = result.and(ended);
        }
        result.and(self.backend.close())
    }

    /// The right to change something, unless the domain is being closed. An earlier change of
    /// unknown outcome is settled first.
    pub(super) fn begin_change(&self) -> Result<MutexGuard<'_, Changes>> {
        let mut changes = self.lock_changes()?;
        if self.closed.load(Ordering::Acquire) {
            return Err(Error::new(Kind::NotConnected, "being unmounted"));
        }
        if changes.record.pending.is_some() {
            recover(&*self.backend, &self.store, &mut changes.record)?;
            self.publish(&mut changes);
        }
        self.adopt(&mut changes)?;
        Ok(changes)
    }

    /// The right to change something, if nobody has it now.
    pub(super) fn try_changes(&self) -> Option<MutexGuard<'_, Changes>> {
        self.changes.try_lock()
    }

    pub(super) fn lock_changes(&self) -> Result<MutexGuard<'_, Changes>> {
        self.changes
            .try_lock_for(self.options.timeout)
            .ok_or_else(|| {
                Error::new(
                    Kind::TimedOut,
                    format!(
                        "another change was still under way after {} s",
                        self.options.timeout.as_secs()
                    ),
                )
                .hint("try again; if it stays so, the domain does not answer")
            })
    }

    /// Writes down what the domain has already done. If that fails, the intent is still on disk and
    /// the next start looks at the domain; too late to call the change a failure.
    pub(super) fn save_outcome(&self, record: &Record) {
        if let Err(e) = self.store.save(record) {
            log::error!("{e}; what was done holds until fleecefs is restarted");
        }
    }

    /// After a failed change: find out what became of it, and undo it if it took effect.
    pub(super) fn settle(&self, changes: &mut Changes) {
        let settled = match self.mirrors {
            true => self.adopt(changes),
            false => recover(&*self.backend, &self.store, &mut changes.record)
                .map(|()| self.publish(changes)),
        };
        match settled {
            Ok(()) => {}
            Err(e) => log::error!("cannot settle the failed change yet: {e}"),
        }
    }

    /// Brings what is shown in step with the record; checkpoints keep their numbers.
    pub(super) fn publish(&self, changes: &mut Changes) {
        let mut state = self.state.write();
        let mut old: HashMap<Name, Arc<CheckpointEntry>> = state
            .checkpoints
            .drain(..)
            .map(|e| (e.checkpoint.name.clone(), e))
            .collect();
        let record = changes.record.checkpoints.clone();
        state.checkpoints = record
            .into_iter()
            .map(|checkpoint| match old.remove(&checkpoint.name) {
                Some(entry) if entry.checkpoint == checkpoint => entry,
                known => {
                    // One that was made anew is another, whatever its name.
                    let same = known.filter(|e| e.checkpoint.created == checkpoint.created);
                    Arc::new(CheckpointEntry {
                        id: same.map_or_else(|| changes.new_checkpoint_id(), |e| e.id),
                        checkpoint,
                    })
                }
            })
            .collect();
    }
}
