//! A push backup: libvirt has QEMU copy the disks, as they are at one instant, into targets by itself.
//!
//! The targets are made here, and libvirt is told that they are there (REUSE_EXTERNAL): left to itself
//! it makes an incremental's qcow2 file one that is based on the live image, which is no place for a
//! backup to look for what did not change.
//!
//! A job that is over is gone from libvirt, which tells what became of it (outcome.rs).

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use virt_sys as sys;

use super::ffi::{self, Domain, JobResult};
use super::guard::State;
use super::job::{self, Mark, Running};
use super::outcome::Outcomes;
use super::{Shared, qemu_img};
use crate::backend::target::TargetFile;
use crate::backend::watch::Course;
use crate::backend::{Notice, Progress, Pushing};
use crate::model::{
    Control, CopyDisk, Error, Format, JobId, JobState, Kind, Mode, Name, Outcome, PushPlan, Result,
};
use crate::xml::{BackupDocument, BackupDocumentDisk, BackupMode};

/// How long what became of a job is waited for once it is gone.
const NEWS: Duration = Duration::from_secs(2);

/// The same for what others tell at the same time.
const STRAGGLERS: Duration = Duration::from_millis(300);

/// One disk's share of a push backup.
struct Part {
    disk: String,
    target: TargetFile,
    /// The checkpoint since which changes are copied; none: everything.
    base: Option<Name>,
    progress: Mutex<Progress>,
}

/// A push backup in libvirt.
pub(super) struct PushSession {
    id: JobId,
    mark: Mark,
    /// libvirt's number of the running domain.
    domain: Option<u32>,
    parts: Vec<Part>,
    course: Course,
    /// What is told of the domain's backups. Once ours was seen to run, the next one is ours.
    outcomes: Mutex<Outcomes>,
    seen: AtomicBool,
    /// It is written, and being put on disk.
    closing: AtomicBool,
    /// Nothing of it is left in libvirt. The lock is held while it is ended.
    gone: Mutex<bool>,
}

/// Begins to copy the disks of the plan.
pub(super) fn push(shared: &Arc<Shared>, plan: &PushPlan) -> Result<LibvirtPush> {
    job::is_free(shared)?;
    let parts = plan.disks.iter().map(|disk| Part::new(shared, disk));
    let parts = parts.collect::<Result<Vec<_>>>()?;
    let targets: Vec<_> = parts.iter().map(|p| p.target.path().to_owned()).collect();
    let mark = Mark::Targets(targets.clone());
    let document = BackupDocument {
        mode: Mode::Push,
        disks: parts.iter().map(Part::describe).collect(),
        ..BackupDocument::default()
    };
    let prepared = parts.iter().try_for_each(|part| part.prepare(shared));
    let begun = prepared.and_then(|()| {
        let outcomes = shared.link.listen(&shared.uuid)?;
        shared.rundir.note_job(&shared.uuid, &targets);
        let run = job::begin(shared, &mark, &document, plan.checkpoint.as_ref())?;
        Ok((run, outcomes))
    });
    let (domain, outcomes) = begun.inspect_err(|_| {
        shared.rundir.forget_job();
        parts.iter().for_each(|p| p.target.discard(&shared.rundir));
    })?;
    let session = Arc::new(PushSession {
        id: plan.id,
        mark,
        domain,
        parts,
        course: Course::default(),
        outcomes: Mutex::new(outcomes),
        seen: AtomicBool::new(false),
        closing: AtomicBool::new(false),
        gone: Mutex::new(false),
    });
    // At once: what was told before it is seen to run is of others.
    let mark = session.mark.clone();
    let asked = shared
        .link
        .call("look at a backup", move |d| job::is_ours(d, &mark));
    if asked.unwrap_or(false) {
        session.see();
    }
    shared.put(Arc::clone(&session) as Arc<dyn Running>);
    Ok(LibvirtPush {
        shared: Arc::clone(shared),
        session,
    })
}

impl Part {
    fn new(shared: &Shared, disk: &CopyDisk) -> Result<Self> {
        let size = shared.size_of(&disk.disk)?;
        Ok(Self {
            disk: disk.disk.clone(),
            target: TargetFile::new(disk.target.clone(), size),
            base: disk.base.clone(),
            progress: Mutex::new(Progress {
                state: JobState::Running,
                done: 0,
                // Of changes libvirt tells when it is asked, unless it is done by then.
                total: if disk.base.is_none() { size } else { 0 },
            }),
        })
    }

    /// What virDomainBackupBegin is told.
    fn describe(&self) -> BackupDocumentDisk {
        BackupDocumentDisk {
            backup_mode: Some(match self.base {
                Some(_) => BackupMode::Incremental,
                None => BackupMode::Full,
            }),
            incremental: self.base.clone(),
            image: Some(self.target.image().clone()),
            format: Some(self.target.format()),
            ..BackupDocumentDisk::new(&self.disk)
        }
    }

    /// Makes or finds the target.
    fn prepare(&self, shared: &Shared) -> Result<()> {
        let make = || {
            self.target.prepare(&shared.rundir, shared.files_owner)?;
            if self.target.format() == Format::Qcow2 && !self.target.is_prepared() {
                let (path, size) = (self.target.path(), self.target.size());
                qemu_img::create_qcow2(path, size, shared.link.timeout())?;
            }
            Ok(())
        };
        make().map_err(|e| self.during(e))
    }

    /// Puts on disk what was written.
    fn close(&self) -> Result<()> {
        let closed = self.target.sync().and_then(|()| self.target.check());
        closed.map_err(|e| self.during(e))
    }

    fn during(&self, error: Error) -> Error {
        error.during(format!("disk {}", self.disk))
    }
}

impl PushSession {
    /// Over, in this way unless it was before, and nothing of it is left.
    fn settle(&self, shared: &Shared, how: JobState) -> Result<()> {
        let mut gone = self.gone.lock();
        if *gone {
            return Ok(());
        }
        let ended = job::end(&shared.link, self.mark.clone(), self.domain, false);
        if self.course.over(how.clone()) {
            for part in &self.parts {
                part.progress.lock().state = how.clone();
            }
        }
        ended?;
        let parts = self.parts.iter();
        parts.for_each(|p| p.target.discard(&shared.rundir));
        self.forget(shared, &mut gone);
        Ok(())
    }

    fn forget(&self, shared: &Shared, gone: &mut bool) {
        shared.rundir.forget_job();
        *gone = true;
        shared.take(self.id);
    }

    /// Breaks it off.
    fn abort(&self, shared: &Shared) -> Result<()> {
        self.settle(shared, JobState::Ended(Outcome::Aborted))
    }

    /// Notes how much was copied, as far as that is known: a job that was never seen to run tells of
    /// all disks together.
    fn note_total(&self, all: u64) {
        let (mut known, mut unknown) = (0, Vec::new());
        for part in &self.parts {
            match part.progress.lock().total {
                0 => unknown.push(part),
                total => known += total,
            }
        }
        if let [only] = unknown[..] {
            only.progress.lock().total = all.saturating_sub(known);
        }
    }

    /// Puts the targets on disk, which can take long, and only then says that it is completed.
    fn complete(&self, shared: &Shared) {
        let closed = self.parts.iter().try_for_each(Part::close);
        if let Err(why) = closed {
            return self.fail(shared, why);
        }
        let mut gone = self.gone.lock();
        if *gone || !self.course.over(JobState::Ended(Outcome::Completed)) {
            return;
        }
        for part in &self.parts {
            let mut progress = part.progress.lock();
            progress.state = JobState::Ended(Outcome::Completed);
            progress.done = progress.total;
            part.target.keep(&shared.rundir);
        }
        self.forget(shared, &mut gone);
        drop(gone);
        shared.notify(Notice::Over(self.id, Ok(Outcome::Completed)));
    }

    /// libvirtd was restarted, and tells those who listen now.
    fn listen_again(&self, shared: &Shared) {
        let mut outcomes = self.outcomes.lock();
        if !outcomes.is_alive()
            && let Ok(again) = shared.link.listen(&shared.uuid)
        {
            *outcomes = again;
        }
    }

    /// It runs.
    fn see(&self) {
        if !self.seen.swap(true, Ordering::AcqRel) {
            self.outcomes.lock().forget();
        }
    }

    /// What became of it, now that it is gone.
    fn outcome(&self, shared: &Shared) -> Result<Option<JobResult>> {
        let outcomes = self.outcomes.lock();
        let Some(first) = outcomes.next(NEWS) else {
            // libvirtd was restarted, and knows it by looking at QEMU.
            return match outcomes.is_alive() {
                true => Ok(None),
                false => shared
                    .link
                    .call("look what became of a backup", Domain::last_job),
            };
        };
        if self.seen.load(Ordering::Acquire) {
            return Ok(Some(first));
        }
        // It was over before it was seen. It is one of those that are told now; so all must be well.
        let mut result = first;
        while let Some(next) = outcomes.next(STRAGGLERS) {
            if next.kind != sys::VIR_DOMAIN_JOB_COMPLETED as i32 {
                result = next;
            }
        }
        Ok(Some(result))
    }
}

/// Why a job's result is no backup; none if it is one.
fn failure(result: Option<&JobResult>) -> Option<Error> {
    let backup = sys::VIR_DOMAIN_JOB_OPERATION_BACKUP as i32;
    let Some(result) = result.filter(|r| r.operation == backup) else {
        return Some(Error::new(
            Kind::Io,
            "libvirt does not say what became of it",
        ));
    };
    if result.kind == sys::VIR_DOMAIN_JOB_COMPLETED as i32 {
        return None;
    }
    let why = result.message.as_deref();
    let why = why.unwrap_or("libvirt says no reason");
    Some(if why.contains("No space left") {
        Error::new(Kind::NoSpace, format!("a target is full: {why}"))
            .hint("make room there, or choose another place")
    } else if why.contains("cancel") || result.kind == sys::VIR_DOMAIN_JOB_CANCELLED as i32 {
        Error::new(
            Kind::Io,
            format!("it was aborted by someone else (virsh domjobabort): {why}"),
        )
    } else {
        Error::new(Kind::Io, format!("libvirt's job failed: {why}"))
    })
}

impl Running for PushSession {
    fn id(&self) -> JobId {
        self.id
    }

    fn mark(&self) -> Mark {
        self.mark.clone()
    }

    fn domain(&self) -> Option<u32> {
        self.domain
    }

    fn is_written(&self) -> bool {
        self.closing.load(Ordering::Acquire)
    }

    fn is_over(&self) -> bool {
        !self.course.is_running()
    }

    /// What was written is no backup.
    fn fail(&self, shared: &Shared, why: Error) {
        let was_running = self.course.is_running();
        if let Err(e) = self.settle(shared, JobState::Failed(why.clone())) {
            log::error!("ending push backup {}: {e}", self.id);
        }
        // Its owner may have broken it off meanwhile.
        if was_running && matches!(self.course.state(), JobState::Failed(_)) {
            shared.notify(Notice::Over(self.id, Err(why)));
        }
    }

    fn end(&self, shared: &Shared) -> Result<()> {
        self.abort(shared)
    }

    fn watch(&self, shared: &Shared, _: State) {
        self.see();
        self.listen_again(shared);
        let disks: Vec<String> = self.parts.iter().map(|p| p.disk.clone()).collect();
        let asked = shared.link.call("look at a backup", move |domain| {
            let jobs = disks.iter().map(|disk| domain.block_job(disk));
            jobs.collect::<ffi::Result<Vec<_>>>()
        });
        let asked = asked.unwrap_or_default();
        for (part, found) in self.parts.iter().zip(asked) {
            let mut progress = part.progress.lock();
            match found {
                Some((done, total)) => (progress.done, progress.total) = (done, total),
                // One disk is copied; the others are not yet.
                None => progress.done = progress.total,
            }
        }
    }

    fn vanished(self: Arc<Self>, shared: &Arc<Shared>) {
        if self.closing.load(Ordering::Acquire) {
            return;
        }
        // It may be asked again, when libvirt answers.
        let Ok(result) = self.outcome(shared) else {
            return;
        };
        if let Some(why) = failure(result.as_ref()) {
            return self.fail(shared, why);
        }
        self.note_total(result.map_or(0, |r| r.total));
        self.closing.store(true, Ordering::Release);
        let (session, shared) = (Arc::clone(&self), Arc::clone(shared));
        let thread = std::thread::Builder::new().name("push".to_owned());
        let spawned = thread.spawn(move || session.complete(&shared));
        if let Err(e) = spawned {
            log::error!("a push backup is not put on disk yet: no thread: {e}");
            self.closing.store(false, Ordering::Release);
        }
    }
}

pub(super) struct LibvirtPush {
    shared: Arc<Shared>,
    session: Arc<PushSession>,
}

impl Pushing for LibvirtPush {
    fn progress(&self) -> Vec<Progress> {
        let parts = self.session.parts.iter();
        parts.map(|p| p.progress.lock().clone()).collect()
    }

    fn state(&self) -> JobState {
        self.session.course.state()
    }

    fn control(&self, command: Control) -> Result<()> {
        self.session.course.must_run()?;
        match command {
            Control::Abort => self.session.abort(&self.shared),
            _ => Err(Error::new(
                Kind::Unsupported,
                "libvirt cannot pause a backup, or change its speed, once it runs",
            )
            .hint("only abort can be said here")),
        }
    }

    fn end(&self) -> Result<()> {
        self.session.abort(&self.shared)
    }
}
