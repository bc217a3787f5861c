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
//! nothing to do but to watch: the guard looks at the jobs, and a thread for each disk that is written
//! puts its target on disk and lets go of it, so that `completed` means closed and on disk, and nobody
//! waits for that meanwhile. If one disk fails, all do. A file that was made here and did not become a
//! backup is removed; it could be taken for one.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;
use serde_json::{Value, json};

use super::monitor::{Job, Monitor};
use super::{Shared, action, quiesce};
use crate::backend::names::Names;
use crate::backend::target::TargetFile;
use crate::backend::watch::Course;
use crate::backend::{Notice, Progress, Pushing};
use crate::model::{
    Control, CopyDisk, Error, Format, JobId, JobState, Kind, NewCheckpoint, Outcome, PushPlan,
    Result,
};

/// One disk's share of a push backup.
struct Part {
    disk: String,
    /// The live node.
    node: String,
    size: u64,
    names: Names,
    target: TargetFile,
    /// Where the bitmaps are whose union is copied; `None`: everything.
    changed: Option<Vec<Value>>,
    progress: Mutex<Progress>,
    /// How the letting go of a target that is written came out, once it has begun.
    closed: Mutex<Option<Closing>>,
}

/// Letting go of a target that is written.
enum Closing {
    /// It is under way.
    Begun,
    /// It is over.
    Over(Result<()>),
}

/// A push backup in QEMU.
pub(super) struct PushSession {
    id: JobId,
    /// The QEMU process that holds it.
    pid: i32,
    parts: Vec<Part>,
    /// Its jobs are there: the guard may look at them.
    begun: AtomicBool,
    /// How the whole stands.
    course: Course,
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
        course: Course::default(),
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
            node: live.node.clone(),
            size: live.disk.size,
            names: Names::new(shared.rundir.id(), job, index),
            target: TargetFile::new(disk.target.clone(), live.disk.size),
            changed: disk
                .changed
                .as_ref()
                .map(|all| all.iter().flat_map(|name| live.sources(name)).collect()),
            progress: Mutex::new(Progress {
                state: JobState::Running,
                done: 0,
                total: 0,
            }),
            closed: Mutex::new(None),
        })
    }

    /// Makes and opens the target.
    fn prepare(&self, shared: &Shared, monitor: &Monitor) -> Result<()> {
        let peer = monitor.client().peer();
        let driver = self
            .target
            .prepare(&shared.rundir, Some((peer.uid, peer.gid)))?;
        let path = self.target.path();
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
        let format = self.target.format();
        if format == Format::Qcow2 && !self.target.is_prepared() {
            monitor.create_qcow2(&self.names.create(), &file, self.size)?;
        }
        let mut node = json!({
            "driver": format.word(), "node-name": self.names.overlay(), "file": file,
        });
        match format {
            // Whole clusters are written, so what a prepared image is based on need not be opened,
            // and may not: it can be the very disk that is copied.
            Format::Qcow2 => node["backing"] = Value::Null,
            // A device may be larger than the disk.
            Format::Raw => node["size"] = json!(self.size),
        }
        monitor.blockdev_add(node)
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

    /// What the job wrote is put on disk, before QEMU flushes it while it holds its own lock; then the
    /// target is let go of.
    fn close(&self, monitor: &Monitor) -> Result<()> {
        self.target.sync()?;
        self.dissolve(monitor)?;
        self.target.sync()?;
        self.target.check()
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
        quiesce::frozen(shared, || {
            shared.in_silence(|| monitor.transaction(actions))
        })
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

    /// Fails: all disks do, and what was written is no backup.
    pub(super) fn fail(&self, shared: &Shared, why: Error) {
        let was_running = self.course.is_running();
        if let Err(e) = self.end(shared, JobState::Failed(why.clone())) {
            log::error!("ending push backup {}: {e}", self.id);
        }
        // Its owner may have broken it off meanwhile.
        if was_running && matches!(self.course.state(), JobState::Failed(_)) {
            shared.notify(Notice::Over(self.id, Err(why)));
        }
    }

    /// Looks at the jobs: how far they are, and which have ended.
    pub(super) fn watch(self: &Arc<Self>, shared: &Shared) {
        if !self.begun.load(Ordering::Acquire) || !self.course.is_running() {
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
        for (index, part) in self.parts.iter().enumerate() {
            if let Err(e) = self.watch_part(index, &monitor, &jobs) {
                return self.fail(shared, part.during(e));
            }
        }
        let mut parts = self.parts.iter();
        let done = parts.all(|p| matches!(p.progress.lock().state, JobState::Ended(_)));
        let mut gone = self.gone.lock();
        if done && self.course.over(JobState::Ended(Outcome::Completed)) {
            *gone = true;
            drop(gone);
            for part in &self.parts {
                part.target.keep(&shared.rundir);
            }
            self.forget(shared);
            shared.notify(Notice::Over(self.id, Ok(Outcome::Completed)));
        }
    }

    /// How far one disk is. What is written is let go of by a thread of its own.
    fn watch_part(self: &Arc<Self>, index: usize, monitor: &Monitor, jobs: &[Job]) -> Result<()> {
        let part = &self.parts[index];
        let mut closed = part.closed.lock();
        match closed.take() {
            None => {}
            Some(Closing::Begun) => {
                *closed = Some(Closing::Begun);
                return Ok(());
            }
            Some(Closing::Over(outcome)) => {
                *closed = Some(Closing::Over(Ok(())));
                outcome?;
                part.progress.lock().state = JobState::Ended(Outcome::Completed);
                return Ok(());
            }
        }
        let job = jobs.iter().find(|j| j.id == part.names.job());
        let job =
            job.ok_or_else(|| Error::new(Kind::Io, "its job is gone: somebody else ended it"))?;
        let state = match job.status.as_str() {
            "paused" => JobState::Paused,
            _ => JobState::Running,
        };
        *part.progress.lock() = Progress {
            state,
            done: job.done,
            total: job.total,
        };
        if job.status != "concluded" {
            return Ok(());
        }
        if let Some(why) = job.error() {
            return Err(super::monitor::refused("the backup", why));
        }
        let (session, monitor) = (Arc::clone(self), monitor.clone());
        let close = move || {
            let part = &session.parts[index];
            let outcome = part.close(&monitor);
            *part.closed.lock() = Some(Closing::Over(outcome));
        };
        let thread = std::thread::Builder::new().name("push".to_owned());
        let started = thread.spawn(close);
        started.map_err(|e| Error::new(Kind::Io, format!("cannot start a thread: {e}")))?;
        *closed = Some(Closing::Begun);
        Ok(())
    }

    /// Whether a target of it has no room left.
    pub(super) fn is_out_of_room(&self) -> bool {
        self.parts.iter().any(|p| p.target.is_full())
    }

    /// Takes everything apart, and only then says that it is over; nothing is left to do after that
    /// succeeded once.
    fn end(&self, shared: &Shared, how: JobState) -> Result<()> {
        let mut gone = self.gone.lock();
        if *gone {
            return Ok(());
        }
        let taken_apart = self.dissolve(shared);
        self.course.over(how);
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
                let dissolved = shared.in_silence(|| part.dissolve(&monitor));
                dissolved.map_err(|e| part.during(e))?;
            }
        }
        for part in &self.parts {
            part.target.discard(&shared.rundir);
        }
        Ok(())
    }

    fn forget(&self, shared: &Shared) {
        shared.pushes.lock().retain(|s| !std::ptr::eq(&**s, self));
    }

    /// What is left of a push backup that is over, and could not be taken apart when it was.
    pub(super) fn settle(&self, shared: &Shared) -> Result<()> {
        match self.course.is_running() {
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
        self.session.course.state()
    }

    fn control(&self, command: Control) -> Result<()> {
        let session = &self.session;
        session.course.must_run()?;
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
        match command {
            Control::Pause => session.course.pause(true),
            Control::Resume => session.course.pause(false),
            _ => {}
        }
        Ok(())
    }

    fn end(&self) -> Result<()> {
        self.session.abort(&self.shared)
    }
}
