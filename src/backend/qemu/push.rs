//! A push backup: QEMU copies the disks, as they are at one instant, into targets by itself.
//!
//! ```text
//!                     guest
//!                       |          copies in the background, and old content
//!    job "job" ······ filter ····· before each write of the guest
//!    sync=full or       |                         |
//!    sync=bitmap    live disk                   target (qcow2 or raw)
//!                   bitmap "bits": what           |
//!                   changed, a frozen union     file or device
//! ```
//!
//! The same transaction as for a pull backup, over all disks, decides the instant. Then there is
//! nothing to do but to watch: the guard looks at the jobs and lets go of each target as soon as it
//! is written, so that `completed` means closed and on disk. If one disk fails, all do. A file that
//! was made here and did not become a backup is removed; it could be taken for one.

use std::fs::{self, File, OpenOptions};
use std::io::ErrorKind;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;
use serde_json::{Value, json};

use super::monitor::{Job, Monitor};
use super::{Shared, action, quiesce};
use crate::backend::names::Names;
use crate::backend::rundir;
use crate::backend::{Notice, Progress, Pushing};
use crate::model::{
    Control, CopyDisk, Error, Format, Image, JobId, JobState, Kind, NewCheckpoint, Outcome,
    PushPlan, Result, Target,
};

/// One disk's share of a push backup.
struct Part {
    disk: String,
    /// The live node.
    node: String,
    size: u64,
    names: Names,
    target: Target,
    /// The bitmaps whose union is copied; `None`: everything.
    changed: Option<Vec<String>>,
    progress: Mutex<Progress>,
    /// The target, held open: its name may be another file's before long, or a pipe's, to open which
    /// would take for ever.
    file: Mutex<Option<File>>,
    /// The file was made here.
    made: Mutex<bool>,
}

/// A push backup in QEMU.
pub(super) struct PushSession {
    id: JobId,
    /// The QEMU process that holds it.
    pid: i32,
    parts: Vec<Part>,
    /// Its jobs are there: the guard may look at them.
    begun: AtomicBool,
    /// How the whole stands; once it is over, that stays.
    state: Mutex<JobState>,
    /// Nothing of it is left in QEMU. The lock is held while it is taken apart.
    gone: Mutex<bool>,
}

/// Begins to copy the disks of the plan.
pub(super) fn push(shared: &Arc<Shared>, plan: &PushPlan) -> Result<Box<dyn Pushing>> {
    shared.settle()?;
    let monitor = shared.link.monitor()?;
    shared.not_migrating(&monitor)?;
    let mut parts = Vec::new();
    for (index, disk) in plan.disks.iter().enumerate() {
        parts.push(Part::new(shared, plan.id, index, disk)?);
    }
    let session = Arc::new(PushSession {
        id: plan.id,
        pid: monitor.client().peer().pid,
        parts,
        begun: AtomicBool::new(false),
        state: Mutex::new(JobState::Running),
        gone: Mutex::new(false),
    });
    shared.pushes.lock().push(Arc::clone(&session));
    if let Err(error) = session.begin(shared, &monitor, plan.checkpoint.as_ref()) {
        if let Err(e) = session.undo(shared, plan.checkpoint.as_ref(), &error) {
            log::error!("undoing a backup that could not begin: {e}");
        }
        return Err(error);
    }
    session.begun.store(true, Ordering::Release);
    Ok(Box::new(QemuPush {
        shared: Arc::clone(shared),
        session,
    }))
}

impl Part {
    fn new(shared: &Shared, job: JobId, index: usize, disk: &CopyDisk) -> Result<Self> {
        let live = shared.node(&disk.disk)?;
        Ok(Self {
            disk: disk.disk.clone(),
            node: live.node,
            size: live.disk.size,
            names: Names::new(shared.rundir.id(), job, index),
            target: disk.target.clone(),
            changed: disk.changed.clone(),
            progress: Mutex::new(Progress {
                state: JobState::Running,
                done: 0,
                total: 0,
            }),
            file: Mutex::new(None),
            made: Mutex::new(false),
        })
    }

    /// Makes and opens the target.
    fn prepare(&self, shared: &Shared, monitor: &Monitor) -> Result<()> {
        let path = Path::new(self.target.image.path());
        let driver = match &self.target.image {
            Image::File(_) => {
                self.prepare_file(shared, path, monitor)?;
                "file"
            }
            Image::Block(_) => {
                if !self.open(path)?.file_type().is_block_device() {
                    let why = format!("{} is no block device", path.display());
                    return Err(Error::new(Kind::Invalid, why));
                }
                "host_device"
            }
        };
        let file = self.names.file();
        monitor
            .blockdev_add(json!({"driver": driver, "node-name": file, "filename": path}))
            .map_err(|e| match e.kind() {
                Kind::NotPermitted => e.hint(
                    "QEMU's user must be able to enter the directory and to write there: choose \
                     another",
                ),
                _ => e,
            })?;
        if self.target.format == Format::Qcow2 && !self.target.existing {
            monitor.create_qcow2(&self.names.create(), &file, self.size)?;
        }
        let mut node = json!({
            "driver": self.target.format.word(), "node-name": self.names.overlay(), "file": file,
        });
        match self.target.format {
            // Whole clusters are written, so what a prepared image is based on need not be opened,
            // and may not: it can be the very disk that is copied.
            Format::Qcow2 => node["backing"] = Value::Null,
            // A device may be larger than the disk.
            Format::Raw => node["size"] = json!(self.size),
        }
        monitor.blockdev_add(node)
    }

    fn prepare_file(&self, shared: &Shared, path: &Path, monitor: &Monitor) -> Result<()> {
        let peer = monitor.client().peer();
        if !self.target.existing {
            let file = OpenOptions::new()
                .create_new(true)
                .write(true)
                .mode(0o600)
                .open(path)
                .map_err(|e| unusable(path, &e))?;
            *self.made.lock() = true;
            let file = self.file.lock().insert(file).try_clone();
            let file = file.map_err(|e| unusable(path, &e))?;
            let noted = shared.rundir.note_target(path);
            noted.map_err(|e| unusable(path, &e))?;
            if self.target.format == Format::Raw {
                file.set_len(self.size).map_err(|e| unusable(path, &e))?;
            }
            return rundir::give_to(&file, path, peer.uid, peer.gid).map(drop);
        }
        let meta = self.open(path).map_err(|e| match e.kind() {
            Kind::NotFound => e.hint(
                "the changes are written onto an older copy, which must be there; as qcow2 they \
                 can stand alone",
            ),
            _ => e,
        })?;
        if self.target.format == Format::Raw && meta.len() != self.size {
            return Err(Error::new(
                Kind::Invalid,
                format!(
                    "{} has {} bytes, and the disk {}: it is no copy of it",
                    path.display(),
                    meta.len(),
                    self.size
                ),
            ));
        }
        Ok(())
    }

    /// Opens a target that is there, whatever it is.
    fn open(&self, path: &Path) -> Result<fs::Metadata> {
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(path)
            .map_err(|e| unusable(path, &e))?;
        let meta = file.metadata().map_err(|e| unusable(path, &e))?;
        *self.file.lock() = Some(file);
        Ok(meta)
    }

    /// Whether the target still has its name.
    fn is_in_place(&self) -> bool {
        let id = |m: fs::Metadata| (m.dev(), m.ino());
        let file = self.file.lock();
        let own = file.as_ref().and_then(|f| f.metadata().ok()).map(id);
        let named = fs::metadata(self.target.image.path()).ok().map(id);
        own.is_some() && own == named
    }

    /// Its share of the instant.
    fn actions(&self) -> Vec<Value> {
        let bits = self.names.bits();
        let mut actions = Vec::new();
        let mut backup = json!({
            "job-id": self.names.job(), "device": self.node, "target": self.names.overlay(),
            "filter-node-name": self.names.filter(), "sync": "full", "auto-dismiss": false,
        });
        if let Some(changed) = &self.changed {
            actions.push(action(
                "block-dirty-bitmap-add",
                json!({"node": self.node, "name": bits, "persistent": false, "disabled": true}),
            ));
            actions.push(action(
                "block-dirty-bitmap-merge",
                json!({"node": self.node, "target": bits, "bitmaps": changed}),
            ));
            // "never": whatever becomes of the job, the bitmap is ours to remove.
            backup["sync"] = json!("bitmap");
            backup["bitmap"] = json!(bits);
            backup["bitmap-mode"] = json!("never");
        }
        actions.push(action("blockdev-backup", backup));
        actions
    }

    /// Lets go of the target and of what helped to write it; each may be gone already.
    fn dissolve(&self, monitor: &Monitor) -> Result<()> {
        monitor.discard_create(&self.names.create())?;
        monitor.job_end(&self.names.job())?;
        monitor.blockdev_del(&self.names.overlay())?;
        monitor.blockdev_del(&self.names.file())?;
        monitor.bitmap_remove(&self.node, &self.names.bits())?;
        Ok(())
    }

    /// The job has ended by itself: whether the target is what it should be.
    fn conclude(&self, monitor: &Monitor, job: &Job) -> Result<()> {
        let failure = job
            .error()
            .map(|why| super::monitor::refused("the backup", why));
        self.dissolve(monitor)?;
        if let Some(failure) = failure {
            return Err(failure);
        }
        let path = Path::new(self.target.image.path());
        if !self.is_in_place() {
            let why = format!("target {} was replaced meanwhile", path.display());
            return Err(Error::new(Kind::Io, why));
        }
        let file = self.file.lock();
        let synced = file.as_ref().map_or(Ok(()), File::sync_all);
        synced.map_err(|e| unusable(path, &e))
    }

    fn during(&self, error: Error) -> Error {
        error.during(format!("disk {}", self.disk))
    }
}

impl PushSession {
    fn begin(
        &self,
        shared: &Shared,
        monitor: &Monitor,
        checkpoint: Option<&NewCheckpoint>,
    ) -> Result<()> {
        for part in &self.parts {
            part.prepare(shared, monitor).map_err(|e| part.during(e))?;
        }
        let mut actions: Vec<Value> = self.parts.iter().flat_map(Part::actions).collect();
        if let Some(new) = checkpoint {
            actions.extend(shared.checkpoint_actions(new)?);
        }
        quiesce::frozen(&shared.places, || monitor.transaction(actions))
    }

    fn undo(&self, shared: &Shared, checkpoint: Option<&NewCheckpoint>, why: &Error) -> Result<()> {
        let ended = self.end(shared, JobState::Failed(why.clone()));
        match checkpoint {
            Some(new) => shared.undo_checkpoint(new).and(ended),
            None => ended,
        }
    }

    /// The node under this backup's filter, if `node` is one.
    pub(super) fn below(&self, node: &str) -> Option<String> {
        let part = self.parts.iter().find(|p| p.names.filter() == node)?;
        Some(part.node.clone())
    }

    fn is_running(&self) -> bool {
        matches!(*self.state.lock(), JobState::Running | JobState::Paused)
    }

    /// Over from now on, unless it was before; whether this made it so.
    fn over(&self, how: JobState) -> bool {
        let mut state = self.state.lock();
        let running = matches!(*state, JobState::Running | JobState::Paused);
        if running {
            *state = how;
        }
        running
    }

    /// Fails: all disks do, and what was written is no backup.
    pub(super) fn fail(&self, shared: &Shared, why: Error) {
        let was_running = self.is_running();
        if let Err(e) = self.end(shared, JobState::Failed(why.clone())) {
            log::error!("ending push backup {}: {e}", self.id);
        }
        // Its owner may have broken it off meanwhile.
        if was_running && matches!(*self.state.lock(), JobState::Failed(_)) {
            shared.notify(Notice::Over(self.id, Err(why)));
        }
    }

    /// Looks at the jobs: how far they are, and which have ended.
    pub(super) fn watch(&self, shared: &Shared) {
        if !self.begun.load(Ordering::Acquire) || !self.is_running() {
            return;
        }
        let looked = shared.link.monitor().and_then(|monitor| {
            let pid = monitor.client().peer().pid;
            if pid != self.pid {
                return Err(Error::new(Kind::NotConnected, "the domain was restarted"));
            }
            let jobs = monitor.jobs()?;
            Ok((monitor, jobs))
        });
        let (monitor, jobs) = match looked {
            Ok(looked) => looked,
            Err(e) if e.kind() == Kind::NotConnected => return self.fail(shared, e),
            // It may answer again.
            Err(_) => return,
        };
        for part in &self.parts {
            if matches!(part.progress.lock().state, JobState::Ended(_)) {
                continue;
            }
            let job = jobs.iter().find(|j| j.id == part.names.job());
            let Some(job) = job else {
                let why = Error::new(Kind::Io, "its job is gone: somebody else ended it");
                return self.fail(shared, part.during(why));
            };
            let ended = job.status == "concluded";
            let state = match job.status.as_str() {
                "paused" => JobState::Paused,
                _ => JobState::Running,
            };
            *part.progress.lock() = Progress {
                state,
                done: job.done,
                total: job.total,
            };
            if ended {
                if let Err(e) = part.conclude(&monitor, job) {
                    return self.fail(shared, part.during(e));
                }
                part.progress.lock().state = JobState::Ended(Outcome::Completed);
            }
        }
        let mut parts = self.parts.iter();
        let done = parts.all(|p| matches!(p.progress.lock().state, JobState::Ended(_)));
        let mut gone = self.gone.lock();
        if done && self.over(JobState::Ended(Outcome::Completed)) {
            *gone = true;
            drop(gone);
            for part in &self.parts {
                let path = Path::new(part.target.image.path());
                shared.rundir.forget_target(path);
            }
            self.forget(shared);
            shared.notify(Notice::Over(self.id, Ok(Outcome::Completed)));
        }
    }

    /// Takes everything apart, and only then says that it is over; nothing is left to do after that
    /// succeeded once.
    fn end(&self, shared: &Shared, how: JobState) -> Result<()> {
        let mut gone = self.gone.lock();
        if *gone {
            return Ok(());
        }
        let taken_apart = self.dissolve(shared);
        self.over(how);
        taken_apart?;
        *gone = true;
        drop(gone);
        self.forget(shared);
        Ok(())
    }

    fn dissolve(&self, shared: &Shared) -> Result<()> {
        let monitor = match shared.link.monitor() {
            Ok(monitor) => Some(monitor).filter(|m| m.client().peer().pid == self.pid),
            // Nobody listens: QEMU is gone, and with it all that we had there.
            Err(e) if e.kind() == Kind::NotConnected => None,
            Err(e) => return Err(e),
        };
        if let Some(monitor) = monitor {
            for part in &self.parts {
                part.dissolve(&monitor).map_err(|e| part.during(e))?;
            }
        }
        self.remove_files(shared);
        Ok(())
    }

    /// Removes the files that were made for it, lest they be taken for a backup.
    fn remove_files(&self, shared: &Shared) {
        for part in self.parts.iter().filter(|p| *p.made.lock()) {
            let path = part.target.image.path();
            if !part.is_in_place() {
                log::warn!("{path} is not what was written there; it is left alone");
            } else if let Err(e) = fs::remove_file(path) {
                log::warn!("cannot remove {path}, which is no backup: {e}");
            }
            shared.rundir.forget_target(Path::new(path));
        }
    }

    fn forget(&self, shared: &Shared) {
        shared.pushes.lock().retain(|s| !std::ptr::eq(&**s, self));
    }

    /// What is left of a push backup that is over, and could not be taken apart when it was.
    pub(super) fn settle(&self, shared: &Shared) -> Result<()> {
        match self.is_running() {
            true => Ok(()),
            false => self.abort(shared),
        }
    }

    /// Breaks it off if it still runs, and takes everything apart.
    pub(super) fn abort(&self, shared: &Shared) -> Result<()> {
        self.end(shared, JobState::Ended(Outcome::Aborted))
    }

    fn each_job(&self, what: impl Fn(&str) -> Result<()>) -> Result<()> {
        for part in &self.parts {
            let running = matches!(
                part.progress.lock().state,
                JobState::Running | JobState::Paused
            );
            match what(&part.names.job()) {
                // It ended a moment ago.
                Err(e)
                    if !running
                        || e.kind() == Kind::NotFound
                        || e.message().contains("in state 'concluded'") => {}
                outcome => outcome.map_err(|e| part.during(e))?,
            }
        }
        Ok(())
    }
}

fn unusable(path: &Path, error: &std::io::Error) -> Error {
    let kind = match error.kind() {
        ErrorKind::AlreadyExists => Kind::Exists,
        ErrorKind::NotFound => Kind::NotFound,
        ErrorKind::PermissionDenied => Kind::NotPermitted,
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => Kind::NoSpace,
        _ => Kind::Io,
    };
    let error = Error::new(kind, format!("target {}: {error}", path.display()));
    match kind {
        Kind::Exists => error.hint("a backup is never written over something: choose another name"),
        _ => error,
    }
}

struct QemuPush {
    shared: Arc<Shared>,
    session: Arc<PushSession>,
}

impl Pushing for QemuPush {
    fn progress(&self) -> Vec<Progress> {
        let parts = self.session.parts.iter();
        parts.map(|p| p.progress.lock().clone()).collect()
    }

    fn state(&self) -> JobState {
        self.session.state.lock().clone()
    }

    fn control(&self, command: Control) -> Result<()> {
        let session = &self.session;
        if !session.is_running() {
            return Err(Error::new(
                Kind::Invalid,
                format!("it is over already: {}", session.state.lock().word()),
            ));
        }
        if command == Control::Abort {
            return session.abort(&self.shared);
        }
        let monitor = self.shared.link.monitor()?;
        session.each_job(|job| match command {
            Control::Pause => monitor.job_pause(job),
            Control::Resume => monitor.job_resume(job),
            Control::Speed(bytes) => monitor.job_speed(job, bytes),
            Control::Abort => Ok(()),
        })?;
        let mut state = session.state.lock();
        match (command, &*state) {
            (Control::Pause, JobState::Running) => *state = JobState::Paused,
            (Control::Resume, JobState::Paused) => *state = JobState::Running,
            _ => {}
        }
        Ok(())
    }

    fn end(&self) -> Result<()> {
        self.session.abort(&self.shared)
    }
}
