//! A mounted domain: its checkpoints, its running backups, and the ordered steps that change them.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use crossbeam_channel::Receiver;
use parking_lot::{Mutex, MutexGuard, RwLock};

use super::backup::{Backup, BackupDisk, Since};
use super::history::{self, Chain};
use super::job::Job;
use super::once::Once;
use super::recovery::{forget, recover};
use super::status::{CheckpointStatus, disk_status};
use super::store::{Pending, Record, Store};
use crate::backend::Backend;
use crate::model::{
    BackupPlan, Checkpoint, CheckpointDisk, Control, Disk, DomainInfo, Error, Event, FreezeDisk,
    JobId, Kind, Name, NewCheckpoint, Result,
};

/// How a domain is treated.
#[derive(Debug, Clone)]
pub struct Options {
    /// A backup also makes a checkpoint of its name.
    pub checkpoint: bool,
    /// How long a change waits for the one before it.
    pub timeout: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            checkpoint: true,
            timeout: Duration::from_secs(30),
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

struct State {
    /// Oldest first, in step with the record's checkpoints.
    checkpoints: Vec<Arc<CheckpointEntry>>,
    jobs: BTreeMap<Name, Job>,
}

/// A domain whose checkpoints and backups can be managed: the RFC's API as a library.
pub struct Domain {
    backend: Arc<dyn Backend>,
    store: Store,
    options: Options,
    /// What is on disk, and the right to change anything.
    changes: Mutex<Changes>,
    state: RwLock<State>,
    closed: AtomicBool,
}

struct Changes {
    record: Record,
    next_checkpoint: u32,
    next_job: JobId,
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
        recover(&*backend, &store, &mut changes.record)?;
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
        Ok(Self {
            backend,
            store,
            options,
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
        self.backend.disks()
    }

    /// The checkpoints, oldest first. Asks nobody.
    pub fn checkpoints(&self) -> Vec<Arc<CheckpointEntry>> {
        self.state.read().checkpoints.clone()
    }

    /// The checkpoint of this name. Asks nobody.
    pub fn checkpoint(&self, name: &str) -> Option<Arc<CheckpointEntry>> {
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
        let disks = self.backend.disks()?;
        let all: Vec<&Checkpoint> = entries.iter().map(|e| &e.checkpoint).collect();
        let disks = all[place]
            .disks
            .iter()
            .map(|entry| disk_status(entry, place, &disks, &all))
            .collect();
        Ok(CheckpointStatus { disks })
    }

    /// Marks a point in time on every disk that can carry a bitmap, at one instant.
    pub fn create_checkpoint(&self, name: Name) -> Result<()> {
        let context = format!("create checkpoint {name}");
        let mut changes = self.begin_change().map_err(|e| e.during(&context))?;
        self.checkpoint_is_free(&name)?;
        let disks = self.backend.disks().map_err(|e| e.during(&context))?;
        let new = self
            .new_checkpoint(&mut changes, &name, &disks)
            .map_err(|e| e.during(&context))?
            .ok_or_else(|| no_disk_can(&disks).during(&context))?;
        self.with_new_checkpoint(&mut changes, new, &disks, |new| {
            self.backend.create_checkpoint(new)
        })
        .map_err(|e| e.during(&context))?;
        log::info!("checkpoint {name} made");
        Ok(())
    }

    /// Forgets a checkpoint; what it recorded goes to its parent, so no change is lost.
    pub fn delete_checkpoint(&self, name: &Name) -> Result<()> {
        let context = format!("delete checkpoint {name}");
        let mut changes = self.begin_change().map_err(|e| e.during(&context))?;
        let places = &changes.record.checkpoints;
        let Some(place) = places.iter().position(|c| c.name == *name) else {
            return Err(Error::new(
                Kind::NotFound,
                format!("there is no checkpoint {name}"),
            ));
        };
        let entry = Arc::clone(&self.state.read().checkpoints[place]);
        let disks = self.backend.disks().map_err(|e| e.during(&context))?;
        let mut record = changes.record.clone();
        history::record_broken(&mut record.checkpoints, &disks);
        let all: Vec<&Checkpoint> = record.checkpoints.iter().collect();
        let removal = history::removal(&all, place, &disks);
        self.not_in_use(entry.id, &removal)?;

        record.pending = Some(Pending::Delete(name.clone()));
        self.store.save(&record)?;
        changes.record = record;
        if let Err(e) = self.backend.delete_checkpoint(&removal) {
            // Whether it happened is looked up at the next change or start if this fails too.
            self.settle(&mut changes);
            return Err(e.during(&context));
        }
        forget(&mut changes.record, name);
        self.publish(&mut changes);
        log::info!("checkpoint {name} deleted");
        self.save_outcome(&changes.record);
        Ok(())
    }

    /// Freezes every disk at one instant, and makes the backup's checkpoint with it.
    pub fn begin_backup(&self, name: Name) -> Result<Arc<Backup>> {
        let context = format!("begin backup {name}");
        let mut changes = self.begin_change().map_err(|e| e.during(&context))?;
        if self.backup(name.as_str()).is_some() {
            return Err(
                Error::new(Kind::Exists, format!("a backup {name} is running already"))
                    .hint("choose another name, or end it with rmdir"),
            );
        }
        let disks = self.backend.disks().map_err(|e| e.during(&context))?;
        freezable(&disks).map_err(|e| e.during(&context))?;

        let entries = self.checkpoints();
        let own = entries.iter().position(|e| e.checkpoint.name == name);
        let new = match own {
            None if self.options.checkpoint => self
                .new_checkpoint(&mut changes, &name, &disks)
                .map_err(|e| e.during(&context))?,
            _ => None,
        };
        let own_checkpoint = match own {
            Some(place) => Some(entries[place].checkpoint.clone()),
            None => new.clone(),
        };
        let before = &entries[..own.unwrap_or(entries.len())];

        changes.next_job += 1;
        let mut plan = BackupPlan {
            id: changes.next_job,
            checkpoint: None,
            disks: Vec::new(),
            server: None,
        };
        let all: Vec<&Checkpoint> = entries.iter().map(|e| &e.checkpoint).collect();
        let mut own_disks = Vec::new();
        for disk in &disks {
            let chain = Chain::of(disk, &all);
            plan.disks.push(FreezeDisk {
                target: disk.target.clone(),
                recording: chain.links.last().map(|l| l.1.clone()),
                scratch: None,
                export: None,
            });
            own_disks.push(backup_disk(disk, chain, &entries));
        }
        let known: Vec<Since> = entries
            .iter()
            .filter(|e| own_disks.iter().any(|d| d.knows_since(e.id)))
            .map(|e| since(e))
            .collect();

        let (frozen, begun) = match new {
            Some(new) => {
                let begun = new.created;
                let frozen = self.with_new_checkpoint(&mut changes, new, &disks, |new| {
                    plan.checkpoint = Some(new.clone());
                    self.backend.begin(&plan)
                });
                (frozen, begun)
            }
            None => (self.backend.begin(&plan), SystemTime::now()),
        };
        let backup = Arc::new(Backup {
            id: plan.id,
            name: name.clone(),
            begun,
            base: before.last().map(|e| since(e)),
            checkpoint: own_checkpoint,
            domain_disks: disks,
            since: known,
            disks: own_disks,
            frozen: frozen.map_err(|e| e.during(&context))?,
        });
        let mut state = self.state.write();
        state
            .jobs
            .insert(name.clone(), Job::Pull(Arc::clone(&backup)));
        log::info!("backup {name} began, job {}", backup.id);
        Ok(backup)
    }

    /// Ends a backup: reads of it fail from now on, and nothing of it is left in the domain.
    pub fn end_backup(&self, name: &Name) -> Result<()> {
        let context = format!("end backup {name}");
        let _changes = self.lock_changes().map_err(|e| e.during(&context))?;
        let Some(backup) = self.backup(name.as_str()) else {
            return Err(Error::new(
                Kind::NotFound,
                format!("there is no backup {name}"),
            ));
        };
        backup.frozen.end().map_err(|e| e.during(&context))?;
        self.state.write().jobs.remove(name);
        log::info!("backup {name} ended");
        Ok(())
    }

    /// Makes a checkpoint as a `<domaincheckpoint>` says; one that says when it was made is redefined.
    /// EINVAL with the line where the document cannot be.
    pub fn create_checkpoint_from(&self, _name: &Name, _document: &[u8]) -> Result<()> {
        Err(Error::new(Kind::Unsupported, "not yet"))
    }

    /// Begins a backup as a `<domainbackup>` says. EINVAL with the line where the document cannot be.
    pub fn begin_backup_from(&self, _name: &Name, _document: &[u8]) -> Result<JobId> {
        Err(Error::new(Kind::Unsupported, "not yet"))
    }

    /// Gives a checkpoint another name, and its bitmaps with it.
    pub fn rename_checkpoint(&self, _from: &Name, _to: &Name) -> Result<()> {
        Err(Error::new(Kind::Unsupported, "not yet"))
    }

    /// Forgets a checkpoint, and leaves its bitmaps where they are: libvirt's METADATA_ONLY.
    pub fn forget_checkpoint(&self, _name: &Name) -> Result<()> {
        Err(Error::new(Kind::Unsupported, "not yet"))
    }

    /// Tells a running job to do something.
    pub fn control(&self, _job: JobId, _command: Control) -> Result<()> {
        Err(Error::new(Kind::Unsupported, "not yet"))
    }

    /// What happens from now on. A receiver that is dropped is forgotten.
    pub fn subscribe(&self) -> Receiver<Event> {
        crossbeam_channel::unbounded().1
    }

    /// Ends everything and lets go of the domain. Goes on after a failure; the first one is told.
    pub fn close(&self) -> Result<()> {
        if self.closed.swap(true, Ordering::AcqRel) {
            return Ok(());
        }
        let mut result = Ok(());
        for backup in self.backups() {
            let ended = self.end_backup(&backup.name);
            if let Err(e) = &ended {
                log::error!("{e}");
            }
            result = result.and(ended);
        }
        result.and(self.backend.close())
    }

    /// The right to change something, unless the domain is being closed. An earlier change of
    /// unknown outcome is settled first.
    fn begin_change(&self) -> Result<MutexGuard<'_, Changes>> {
        let mut changes = self.lock_changes()?;
        if self.closed.load(Ordering::Acquire) {
            return Err(Error::new(Kind::NotConnected, "being unmounted"));
        }
        if changes.record.pending.is_some() {
            recover(&*self.backend, &self.store, &mut changes.record)?;
            self.publish(&mut changes);
        }
        Ok(changes)
    }

    fn lock_changes(&self) -> Result<MutexGuard<'_, Changes>> {
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

    fn checkpoint_is_free(&self, name: &Name) -> Result<()> {
        match self.checkpoint(name.as_str()) {
            None => Ok(()),
            Some(_) => Err(Error::new(
                Kind::Exists,
                format!("there is a checkpoint {name} already"),
            )),
        }
    }

    /// The checkpoint that would be made now; none if no disk can carry a bitmap.
    fn new_checkpoint(
        &self,
        changes: &mut Changes,
        name: &Name,
        disks: &[Disk],
    ) -> Result<Option<Checkpoint>> {
        let able = disks.iter().filter(|d| d.no_checkpoint.is_none());
        let mut covered = Vec::new();
        for disk in able {
            if disk.bitmaps.iter().any(|b| b.name == name.as_str()) {
                return Err(Error::new(
                    Kind::Exists,
                    format!(
                        "disk {} already has a dirty bitmap {name} that belongs to no checkpoint \
                         here",
                        disk.target
                    ),
                )
                .hint("choose another name, or remove that bitmap with qemu-img bitmap --remove"));
            }
            covered.push(CheckpointDisk {
                target: disk.target.clone(),
                bitmap: name.to_string(),
                size: disk.size,
                broken: None,
            });
        }
        if covered.is_empty() {
            return Ok(None);
        }
        Ok(Some(Checkpoint {
            name: name.clone(),
            created: changes.record.next_time(SystemTime::now()),
            parent: changes.record.checkpoints.last().map(|c| c.name.clone()),
            description: None,
            disks: covered,
        }))
    }

    /// Does `work`, which makes the bitmaps of `checkpoint`, between writing down the intent and
    /// writing down the outcome.
    fn with_new_checkpoint<T>(
        &self,
        changes: &mut Changes,
        checkpoint: Checkpoint,
        disks: &[Disk],
        work: impl FnOnce(&NewCheckpoint) -> Result<T>,
    ) -> Result<T> {
        let mut record = changes.record.clone();
        history::record_broken(&mut record.checkpoints, disks);
        let all: Vec<&Checkpoint> = record.checkpoints.iter().collect();
        let new = NewCheckpoint {
            name: checkpoint.name.clone(),
            bitmaps: history::new_bitmaps(checkpoint.name.as_str(), disks, &all),
        };
        record.pending = Some(Pending::Create(checkpoint.clone()));
        self.store.save(&record)?;
        changes.record = record;

        let outcome = work(&new);
        match &outcome {
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

    /// Writes down what the domain has already done. If that fails, the intent is still on disk and
    /// the next start looks at the domain; too late to call the change a failure.
    fn save_outcome(&self, record: &Record) {
        if let Err(e) = self.store.save(record) {
            log::error!("{e}; what was done holds until fleecefs is restarted");
        }
    }

    /// After a failed change: find out what became of it, and undo it if it took effect.
    fn settle(&self, changes: &mut Changes) {
        match recover(&*self.backend, &self.store, &mut changes.record) {
            Ok(()) => self.publish(changes),
            Err(e) => log::error!("cannot settle the failed change yet: {e}"),
        }
    }

    /// Brings what is shown in step with the record; checkpoints keep their numbers.
    fn publish(&self, changes: &mut Changes) {
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
                known => Arc::new(CheckpointEntry {
                    id: known.map_or_else(|| changes.new_checkpoint_id(), |e| e.id),
                    checkpoint,
                }),
            })
            .collect();
    }

    /// EBUSY if a running backup lists the changes since the checkpoint, or reads a bitmap that
    /// the removal would change.
    fn not_in_use(&self, id: u32, removal: &crate::model::CheckpointRemoval) -> Result<()> {
        for backup in self.backups() {
            let listed = backup.since.iter().any(|s| s.id == id);
            let reads = |target: &str, bitmap: &String| {
                let disk = backup.disks.iter().find(|d| d.target == target);
                // The newest link is read from the frozen copy, not from the bitmap.
                disk.and_then(|d| d.links.split_last())
                    .is_some_and(|(_, older)| older.iter().any(|l| l.1 == *bitmap))
            };
            let changed = removal
                .bitmaps
                .iter()
                .any(|r| r.merge_into.iter().any(|into| reads(&r.target, into)));
            if listed || changed {
                return Err(Error::new(
                    Kind::Busy,
                    format!(
                        "checkpoint {} is in use: backup {} lists what changed since",
                        removal.name, backup.name
                    ),
                )
                .hint(format!(
                    "end the backup first: rmdir backups/{}",
                    backup.name
                )));
            }
        }
        Ok(())
    }
}

/// A backup holds all disks or none: a disk that cannot be frozen is refused by name.
fn freezable(disks: &[Disk]) -> Result<()> {
    if disks.is_empty() {
        return Err(
            Error::new(Kind::Unsupported, "the domain has no writable disk")
                .hint("CD-ROMs and empty drives do not count"),
        );
    }
    match disks.iter().find(|d| d.size == 0) {
        Some(disk) => Err(Error::new(
            Kind::Unsupported,
            format!(
                "disk {} has 0 bytes: there is nothing to back up",
                disk.target
            ),
        )
        .hint("resize it or detach it")),
        None => Ok(()),
    }
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

fn since(entry: &CheckpointEntry) -> Since {
    Since {
        id: entry.id,
        name: entry.checkpoint.name.clone(),
    }
}

fn backup_disk(disk: &Disk, chain: Chain, entries: &[Arc<CheckpointEntry>]) -> BackupDisk {
    BackupDisk {
        target: disk.target.clone(),
        size: disk.size,
        format: disk.format.clone(),
        note: disk.no_checkpoint.clone(),
        broken: chain.broken,
        links: chain
            .links
            .into_iter()
            .map(|(place, bitmap)| (entries[place].id, bitmap))
            .collect(),
        allocation: Once::new(),
        changes: Mutex::new(HashMap::new()),
    }
}
