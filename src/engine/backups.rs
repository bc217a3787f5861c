//! Beginning, steering and ending backups.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::SystemTime;

use parking_lot::Mutex;

use super::backup::{Backup, BackupDisk, Link, Since};
use super::checkpoints::no_checkpoint;
use super::disk_map::DiskMap;
use super::domain::{Changes, CheckpointEntry, Domain};
use super::history::Chain;
use super::job::{Head, Job, Push, PushDisk};
use super::once::Once;
use super::request::{
    BackupRequest, Base, CheckpointRequest, CopyRequest, OwnCheckpoint, PullDisk, Work,
};
use crate::model::{
    BackupPlan, Checkpoint, Control, CopyDisk, Disk, Error, FreezeDisk, JobId, JobInfo, Kind, Mode,
    Name, NewCheckpoint, Outcome, PublicExport, PushPlan, Result, ServerAddress,
};

/// What a backup is begun with, once it is known which checkpoint it makes.
struct Start<'a> {
    id: JobId,
    name: &'a Name,
    disks: &'a [Disk],
    entries: &'a [Arc<CheckpointEntry>],
    /// The newest checkpoint before it.
    newest: Option<&'a Arc<CheckpointEntry>>,
    /// The checkpoint of its name.
    own: Option<Checkpoint>,
}

impl Domain {
    /// Freezes every disk at one instant, and makes the backup's checkpoint with it.
    pub fn begin_backup(&self, name: Name) -> Result<Arc<Backup>> {
        let job = self.begin_with(&name, |disks| {
            let disks = disks.iter().map(|d| PullDisk::new(&d.target)).collect();
            Ok(BackupRequest {
                name: name.clone(),
                work: Work::Pull(disks, None),
                checkpoint: OwnCheckpoint::Usual,
            })
        })?;
        let other = || Error::new(Kind::Io, format!("backup {name} cannot be read"));
        job.pull().cloned().ok_or_else(other)
    }

    /// Begins the backup that was asked for; all its disks at one instant.
    pub fn begin(&self, request: &BackupRequest) -> Result<Job> {
        self.begin_with(&request.name, |_| Ok(request.clone()))
    }

    /// The same, where the request depends on the disks there are.
    pub(super) fn begin_with(
        &self,
        name: &Name,
        request: impl FnOnce(&[Disk]) -> Result<BackupRequest>,
    ) -> Result<Job> {
        let work = || {
            let mut changes = self.begin_change()?;
            if self.job(name.as_str()).is_some() {
                return Err(
                    Error::new(Kind::Exists, format!("there is a backup {name} already"))
                        .hint("choose another name, or end it with rmdir"),
                );
            }
            self.tell_apart(&mut changes)?;
            let disks = self.disks()?;
            let request = request(&disks)?;
            self.start(&mut changes, &disks, &request)
        };
        let job = work().map_err(|e| e.during(format!("begin backup {name}")))?;
        log::info!("backup {name} began, job {}", job.id());
        Ok(job)
    }

    fn start(&self, changes: &mut Changes, disks: &[Disk], request: &BackupRequest) -> Result<Job> {
        let name = &request.name;
        let taking_part = taking_part(disks, request)?;
        let entries = self.checkpoints();
        let own = entries.iter().position(|e| e.checkpoint.name == *name);
        let new = match (&request.checkpoint, own) {
            (OwnCheckpoint::Usual, None) if self.options.checkpoint => {
                let usual = CheckpointRequest::new(name.clone());
                self.new_checkpoint(changes, &usual, &taking_part)?
            }
            (OwnCheckpoint::Make(wanted), _) => {
                self.checkpoint_is_free(&wanted.name)?;
                self.new_checkpoint(changes, wanted, disks)?
            }
            _ => None,
        };
        let used = own.filter(|_| request.checkpoint == OwnCheckpoint::Usual);
        changes.next_job += 1;
        let start = Start {
            id: changes.next_job,
            name,
            disks,
            entries: &entries,
            newest: entries[..used.unwrap_or(entries.len())].last(),
            own: match used {
                Some(place) => Some(entries[place].checkpoint.clone()),
                None => new.clone(),
            },
        };
        let mode = match request.work {
            Work::Pull(..) => Mode::Pull,
            Work::Push(_) => Mode::Push,
        };
        self.hub.add_job(start.id, name, mode);
        let begun = match &request.work {
            Work::Pull(wanted, server) => self.pull(changes, &start, wanted, server.as_ref(), new),
            Work::Push(wanted) => self.push(changes, &start, wanted, new),
        };
        let job = begun.inspect_err(|_| self.hub.drop_job(start.id))?;
        self.state.write().jobs.insert(name.clone(), job.clone());
        Ok(job)
    }

    fn pull(
        &self,
        changes: &mut Changes,
        start: &Start<'_>,
        wanted: &[PullDisk],
        server: Option<&ServerAddress>,
        new: Option<Checkpoint>,
    ) -> Result<Job> {
        let mut plan = BackupPlan {
            id: start.id,
            checkpoint: None,
            disks: Vec::new(),
            server: server.cloned(),
        };
        let mut own_disks = Vec::new();
        for wanted in wanted {
            let disk = disk_of(start.disks, &wanted.disk)?;
            let mut own = start.pull_disk(disk, wanted)?;
            if self.backend.only_base().is_some() {
                let base = own.base.as_ref().map(|b| b.id);
                own.links.retain(|l| Some(l.id) == base);
            }
            let recording = own.links.last().map(|l| l.bitmap.clone());
            plan.disks.push(FreezeDisk {
                target: disk.target.clone(),
                base: recording
                    .as_ref()
                    .and(own.base.as_ref())
                    .map(|b| b.name.clone()),
                recording,
                scratch: wanted.scratch.clone(),
                export: server.map(|_| own.public_export(wanted)).transpose()?,
            });
            own_disks.push(own);
        }
        for (own, freeze) in own_disks.iter_mut().zip(&plan.disks) {
            own.export = freeze.export.clone();
        }
        let entries = start.entries.iter();
        let known: Vec<Since> = entries
            .filter(|e| own_disks.iter().any(|d| d.knows_since(e.id)))
            .map(|e| since(e))
            .collect();
        let bases = plan.disks.iter().filter_map(|d| d.base.as_ref());
        let bases = changes.record.kept_of(bases);
        let (frozen, head) = self.at_an_instant(changes, start, new, |new| {
            plan.checkpoint = new.cloned();
            let frozen = self.backend.begin(&plan)?;
            self.sure_of(&bases, new, frozen, |frozen| frozen.end())
        })?;
        // Nobody else can begin: the caller holds the right to change anything.
        let running = self.backups();
        Ok(Job::Pull(Arc::new(Backup {
            head,
            base: common(own_disks.iter().map(|d| d.base.clone())),
            since: known,
            disks: own_disks,
            server: server.cloned(),
            tables: Arc::clone(&self.tables),
            only_base: self.backend.only_base(),
            current: running.iter().all(|b| !b.current),
            slot: (1..=u8::MAX).find(|slot| running.iter().all(|b| b.slot != Some(*slot))),
            frozen,
            aborted: AtomicBool::new(false),
        })))
    }

    fn push(
        &self,
        changes: &mut Changes,
        start: &Start<'_>,
        wanted: &[CopyRequest],
        new: Option<Checkpoint>,
    ) -> Result<Job> {
        let mut plan = PushPlan {
            id: start.id,
            checkpoint: None,
            disks: Vec::new(),
        };
        let mut own_disks = Vec::new();
        for wanted in wanted {
            let disk = disk_of(start.disks, &wanted.disk)?;
            let chain = start.chain(disk);
            let base = start.base(disk, &chain, &wanted.base)?;
            // Without a base that can be trusted all is copied; one that was named is refused before.
            let from = base.as_ref().and_then(|b| {
                let mut links = chain.links.iter();
                links.position(|l| start.entries[l.0].id == b.id)
            });
            let changed = from.map(|from| {
                let links = chain.links[from..].iter();
                links.map(|l| l.1.clone()).collect()
            });
            let base = base.filter(|_| from.is_some()).map(|b| b.name);
            plan.disks.push(CopyDisk {
                disk: disk.target.clone(),
                target: wanted.target.clone(),
                changed,
                base: base.clone(),
            });
            own_disks.push(PushDisk {
                disk: disk.target.clone(),
                size: disk.size,
                target: wanted.target.clone(),
                base,
                note: disk.no_checkpoint.clone(),
            });
        }
        let bases = plan.disks.iter().filter_map(|d| d.base.as_ref());
        let bases = changes.record.kept_of(bases);
        let (pushing, head) = self.at_an_instant(changes, start, new, |new| {
            plan.checkpoint = new.cloned();
            let pushing = self.backend.push(&plan)?;
            self.sure_of(&bases, new, pushing, |pushing| pushing.end())
        })?;
        Ok(Job::Push(Arc::new(Push {
            head,
            base: common(own_disks.iter().map(|d| d.base.clone())),
            disks: own_disks,
            pushing,
        })))
    }

    /// Has `work` done together with the new checkpoint, if there is one; and when that was, with the
    /// rest of what every backup has.
    fn at_an_instant<T>(
        &self,
        changes: &mut Changes,
        start: &Start<'_>,
        new: Option<Checkpoint>,
        work: impl FnOnce(Option<&NewCheckpoint>) -> Result<T>,
    ) -> Result<(T, Head)> {
        let head = |begun, made| Head {
            id: start.id,
            name: start.name.clone(),
            begun,
            checkpoint: start.own_checkpoint(made),
            domain_disks: start.disks.to_vec(),
        };
        match new {
            Some(new) => {
                let (name, planned) = (new.name.clone(), new.created);
                let made =
                    self.with_new_checkpoint(changes, new, start.disks, |new| work(Some(new)))?;
                let mut known = changes.record.checkpoints.iter();
                let known = known.find(|c| c.name == name);
                let begun = known.map_or(planned, |c| c.created);
                Ok((made, head(begun, Some(begun))))
            }
            None => {
                // No two instants have the same time, whatever the clock does: stamps depend on it.
                let begun = changes.record.next_time(SystemTime::now());
                let mut record = changes.record.clone();
                record.last_created = Some(begun);
                self.store.save(&record)?;
                changes.record = record;
                Ok((work(None)?, head(begun, None)))
            }
        }
    }

    /// Ends a backup: of a pull backup, reads fail from now on. EBUSY while a push backup is being
    /// written. Nothing of it is left in the domain.
    pub fn end_backup(&self, name: &Name) -> Result<()> {
        let job = self.job(name.as_str());
        let job = job.ok_or_else(|| no_backup(name))?;
        self.end(job.id(), false).map(drop)
    }

    /// virDomainBackupEnd: ends the backup of this number, a push backup that is still being written
    /// only with `abort`; EBUSY without.
    pub fn end(&self, id: JobId, abort: bool) -> Result<Outcome> {
        let job = self.known_job(id)?;
        let name = job.name().clone();
        let context = format!("end backup {name}");
        let _changes = self.lock_changes().map_err(|e| e.during(&context))?;
        let outcome = match &job {
            Job::Pull(backup) => backup.end(abort),
            Job::Push(push) => push.end(abort),
        };
        let outcome = outcome.map_err(|e| e.during(&context))?;
        self.state.write().jobs.remove(&name);
        self.hub.job_over(job.id(), Ok(outcome));
        log::info!("backup {name} ended");
        Ok(outcome)
    }

    /// Tells a running job to do something. A job that is aborted stays, to be looked at, until it
    /// is ended.
    pub fn control(&self, id: JobId, command: Control) -> Result<()> {
        let job = self.known_job(id)?;
        let context = format!("backup {}", job.name());
        let done = match (&job, command) {
            (Job::Pull(backup), Control::Abort) => backup.abort(),
            (Job::Pull(_), _) => Err(Error::new(
                Kind::Unsupported,
                "a pull backup is read at its readers' pace: there is nothing to pause or to slow \
                 down",
            )
            .hint("only abort can be said here")),
            (Job::Push(push), command) => push.pushing.control(command),
        };
        done.map_err(|e| e.during(context))?;
        if command == Control::Abort {
            self.hub.job_over(job.id(), Ok(Outcome::Aborted));
        }
        Ok(())
    }

    /// How every job stands: the RFC's job list and statistics. May ask the domain.
    pub fn job_infos(&self) -> Vec<JobInfo> {
        self.jobs().iter().map(Job::info).collect()
    }

    /// The job of this number; 0 means the only one there is.
    pub(super) fn known_job(&self, id: JobId) -> Result<Job> {
        if id != 0 {
            let none = || Error::new(Kind::NotFound, format!("there is no job {id}"));
            return self.job_by_id(id).ok_or_else(none);
        }
        let mut jobs = self.jobs();
        match (jobs.pop(), jobs.is_empty()) {
            (Some(only), true) => Ok(only),
            (None, _) => Err(Error::new(Kind::NotFound, "no job is running")),
            _ => Err(
                Error::new(Kind::Invalid, "several jobs are running, so 0 is no answer")
                    .hint("say the job's id"),
            ),
        }
    }
}

impl Start<'_> {
    /// The checkpoint of the backup's name, with the time at which it was made if it was made now.
    fn own_checkpoint(&self, made: Option<SystemTime>) -> Option<Checkpoint> {
        let mut own = self.own.clone()?;
        own.created = made.unwrap_or(own.created);
        Some(own)
    }

    fn chain(&self, disk: &Disk) -> Chain {
        let all: Vec<&Checkpoint> = self.entries.iter().map(|e| &e.checkpoint).collect();
        Chain::of(disk, &all)
    }

    /// The checkpoint that a disk's changes are since.
    fn base(&self, disk: &Disk, chain: &Chain, wanted: &Base) -> Result<Option<Since>> {
        let name = match wanted {
            Base::Full => return Ok(None),
            Base::Newest => return Ok(self.newest.map(|e| since(e))),
            Base::Since(name) => name,
        };
        let mut all = self.entries.iter();
        let place = all.position(|e| e.checkpoint.name == *name);
        let place = place.ok_or_else(|| no_checkpoint(name))?;
        if chain.links.iter().any(|l| l.0 == place) {
            return Ok(Some(since(&self.entries[place])));
        }
        let why = match (
            &chain.broken,
            self.entries[place].checkpoint.disk(&disk.target),
        ) {
            (_, None) => "it does not cover this disk",
            (Some(why), _) => why,
            (None, _) => "it is on a branch that does not lead to the present",
        };
        Err(Error::new(
            Kind::Stale,
            format!(
                "disk {}: checkpoint {name} cannot be a base: {why}",
                disk.target
            ),
        )
        .hint("back this disk up in full: backupmode='full'"))
    }

    fn pull_disk(&self, disk: &Disk, wanted: &PullDisk) -> Result<BackupDisk> {
        let chain = self.chain(disk);
        let base = self.base(disk, &chain, &wanted.base)?;
        Ok(BackupDisk {
            target: disk.target.clone(),
            size: disk.size,
            format: disk.format.clone(),
            note: disk.no_checkpoint.clone(),
            broken: chain.broken,
            base,
            export: None,
            links: chain
                .links
                .into_iter()
                .map(|(place, bitmap)| Link {
                    id: self.entries[place].id,
                    created: self.entries[place].checkpoint.created,
                    bitmap,
                })
                .collect(),
            stamps: Once::new(),
            map: DiskMap::new(disk.size),
            changes: Mutex::new(HashMap::new()),
        })
    }
}

impl BackupDisk {
    /// How other NBD clients find the disk and its changes.
    fn public_export(&self, wanted: &PullDisk) -> Result<PublicExport> {
        let name = wanted.export_name.as_ref().unwrap_or(&self.target);
        let base = self.base.as_ref();
        let from = base.and_then(|b| self.links.iter().position(|l| l.id == b.id));
        if let (Some(bitmap), None) = (&wanted.export_bitmap, from) {
            return Err(Error::new(
                Kind::Invalid,
                format!(
                    "disk {}: there is nothing to export as bitmap {bitmap} in a full backup",
                    self.target
                ),
            )
            .hint("say since which checkpoint: <incremental>"));
        }
        let bitmap = from.map(|from| {
            let bitmap = wanted.export_bitmap.clone();
            // The newest link is in the frozen copy.
            let older = self.links[from..self.links.len() - 1].iter();
            (
                bitmap.unwrap_or_else(|| format!("backup-{}", self.target)),
                older.map(|l| l.bitmap.clone()).collect(),
            )
        });
        Ok(PublicExport {
            name: name.clone(),
            bitmap,
        })
    }
}

impl Backup {
    fn end(&self, abort: bool) -> Result<Outcome> {
        let sound = self.failure().is_none();
        self.frozen.end()?;
        Ok(match sound && !abort {
            true => Outcome::Completed,
            false => Outcome::Aborted,
        })
    }

    fn abort(&self) -> Result<()> {
        if self.failure().is_none() {
            self.aborted.store(true, Ordering::Release);
        }
        self.frozen.end()
    }
}

/// The disks that a request names. One that cannot be frozen is refused by name.
fn taking_part(disks: &[Disk], request: &BackupRequest) -> Result<Vec<Disk>> {
    let wanted: Vec<&String> = match &request.work {
        Work::Pull(wanted, _) => wanted.iter().map(|d| &d.disk).collect(),
        Work::Push(wanted) => wanted.iter().map(|d| &d.disk).collect(),
    };
    if wanted.is_empty() {
        return Err(
            Error::new(Kind::Unsupported, "the domain has no writable disk")
                .hint("CD-ROMs and empty drives do not count"),
        );
    }
    let mut found = Vec::new();
    for target in wanted {
        let disk = disk_of(disks, target)?;
        if let Some(why) = &disk.no_backup {
            return Err(Error::new(
                Kind::Unsupported,
                format!("disk {target} cannot be backed up: {why}"),
            )
            .hint("leave it out: a document backups/NAME.xml that lists the other disks"));
        }
        if disk.size == 0 {
            return Err(Error::new(
                Kind::Unsupported,
                format!("disk {target} has 0 bytes: there is nothing to back up"),
            )
            .hint("resize it or detach it"));
        }
        found.push(disk.clone());
    }
    Ok(found)
}

fn disk_of<'a>(disks: &'a [Disk], target: &str) -> Result<&'a Disk> {
    let mut all = disks.iter();
    all.find(|d| d.target == target).ok_or_else(|| {
        let there: Vec<&str> = disks.iter().map(|d| d.target.as_str()).collect();
        Error::new(Kind::Invalid, format!("the domain has no disk {target}"))
            .hint(format!("there are {}", there.join(", ")))
    })
}

fn no_backup(name: &Name) -> Error {
    Error::new(Kind::NotFound, format!("there is no backup {name}"))
}

fn since(entry: &CheckpointEntry) -> Since {
    Since {
        id: entry.id,
        name: entry.checkpoint.name.clone(),
        created: entry.checkpoint.created,
    }
}

/// What all say alike, if they do.
fn common<T: PartialEq>(mut all: impl Iterator<Item = Option<T>>) -> Option<T> {
    let first = all.next()??;
    all.all(|other| other.as_ref() == Some(&first))
        .then_some(first)
}
