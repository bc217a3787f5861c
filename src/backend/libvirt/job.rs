//! libvirt's one job of a domain: beginning a backup, telling ours from others', and its end.
//!
//! libvirt gives a backup no name and no number. What it is served on or written to is nobody else's,
//! and is what ours is known by.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use virt_sys as sys;

use super::ffi::{self, Domain};
use super::guard::State;
use super::link::Link;
use super::{Shared, quiesce};
use crate::model::{Error, JobId, Kind, Mode, NewCheckpoint, Result};
use crate::xml::{BackupDocument, LiveBackup};

/// How often it is looked whether a job that was aborted is gone.
const POLL: Duration = Duration::from_millis(20);

/// How long an abort takes from which libvirt has returned.
const SETTLE: Duration = Duration::from_millis(150);

/// How long what was begun too late is waited for to be gone again.
const UNDO: Duration = Duration::from_secs(10);

/// What tells a backup of ours from others'.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Mark {
    /// The socket on which a pull backup is served.
    Socket(PathBuf),
    /// What a push backup is written to.
    Targets(Vec<PathBuf>),
}

impl Mark {
    /// Whether the backup that libvirt describes bears it.
    pub(super) fn is_on(&self, backup: &LiveBackup) -> bool {
        match self {
            Self::Socket(socket) => backup.socket.as_deref().map(Path::new) == Some(socket),
            // libvirt lists disks in an order of its own.
            Self::Targets(targets) => {
                backup.mode == Mode::Push
                    && !targets.is_empty()
                    && backup.targets.len() == targets.len()
                    && targets
                        .iter()
                        .all(|t| backup.targets.iter().any(|b| Path::new(b) == t))
            }
        }
    }
}

/// EBUSY if a job holds the domain: libvirt would let us wait for 30 s, and then say no.
pub(super) fn is_free(shared: &Shared) -> Result<()> {
    if let Some(running) = shared.running() {
        if !running.is_over() {
            return Err(Error::new(
                Kind::Busy,
                "libvirt lets a domain have one backup at a time, and one runs",
            )
            .hint("end that one first: rmdir; or wait until a push backup is written"));
        }
        running.end(shared)?;
    }
    let holder = shared.link.call("look for other jobs", |domain| {
        Ok(match running(domain)? {
            Some(backup) => Some(match backup.mode {
                Mode::Pull => "a pull backup",
                Mode::Push => "a push backup",
            }),
            None => other_than_a_backup(domain)?,
        })
    })?;
    holder.map_or(Ok(()), |kind| Err(held(kind)))
}

/// What holds the domain, in libvirt's words, if that is no backup. While it does, checkpoints cannot be
/// made, deleted or looked into; a backup is no hindrance to that.
pub(super) fn other_than_a_backup(domain: &Domain) -> ffi::Result<Option<&'static str>> {
    let operation = match domain.job() {
        Ok(Some(operation)) => operation,
        Ok(None) => return Ok(None),
        // libvirtd was killed while it began a backup, and knows no more than that there is one.
        Err(fault) if fault.message.contains("job data missing") => return Ok(None),
        Err(fault) => return Err(fault),
    };
    Ok(match operation as sys::virDomainJobOperation {
        sys::VIR_DOMAIN_JOB_OPERATION_BACKUP => None,
        sys::VIR_DOMAIN_JOB_OPERATION_MIGRATION_IN
        | sys::VIR_DOMAIN_JOB_OPERATION_MIGRATION_OUT => Some("a migration"),
        sys::VIR_DOMAIN_JOB_OPERATION_SAVE => Some("a save"),
        sys::VIR_DOMAIN_JOB_OPERATION_SNAPSHOT
        | sys::VIR_DOMAIN_JOB_OPERATION_SNAPSHOT_REVERT
        | sys::VIR_DOMAIN_JOB_OPERATION_SNAPSHOT_DELETE => Some("a snapshot"),
        sys::VIR_DOMAIN_JOB_OPERATION_DUMP => Some("a core dump"),
        _ => Some("a job"),
    })
}

pub(super) fn held(kind: &str) -> Error {
    Error::new(
        Kind::Busy,
        format!("the domain is held by {kind} that someone else began"),
    )
    .hint("wait for its end; virsh domjobinfo shows it, virsh domjobabort ends it")
}

/// Has libvirt begin the backup of the document, and make the checkpoint with it; its number of the
/// running domain. What it begins after its time was up is undone.
pub(super) fn begin(
    shared: &Shared,
    mark: &Mark,
    document: &BackupDocument,
    checkpoint: Option<&NewCheckpoint>,
) -> Result<Option<u32>> {
    let xml = document.write();
    let name = checkpoint.map(|new| new.name.to_string());
    let checkpoint_xml = checkpoint.map(|new| shared.checkpoint_xml(new));
    let flags = match mark {
        Mark::Socket(_) => 0,
        Mark::Targets(_) => sys::VIR_DOMAIN_BACKUP_BEGIN_REUSE_EXTERNAL,
    };
    let late = {
        let mark = mark.clone();
        move |domain: &Domain, _| undo_late(domain, &mark, name.as_deref())
    };
    let begin = |link: &Link| {
        link.call_or_undo(
            "begin a backup",
            move |domain| {
                domain.begin_backup(&xml, checkpoint_xml.as_deref(), flags)?;
                Ok(domain.id())
            },
            late,
        )
    };
    let undo = || {
        if let Err(e) = undo(&shared.link, mark.clone(), checkpoint) {
            log::error!("undoing a backup: {e}");
        }
    };
    let begun = quiesce::frozen(shared, shared.places.quiesce, begin, |_| undo());
    if let Err(error) = &begun {
        let mark = mark.clone();
        let left = shared
            .link
            .call("look what is left", move |d| is_ours(d, &mark));
        if left.unwrap_or(false) {
            undo();
        }
        if error.kind() == Kind::NotFound {
            let why = format!("a checkpoint that it counts from was deleted meanwhile: {error}");
            return Err(Error::new(Kind::Busy, why).hint("try again"));
        }
    }
    begun
}

/// Ends a backup that is not to be, and deletes the checkpoint that was made with it.
pub(super) fn undo(link: &Link, mark: Mark, checkpoint: Option<&NewCheckpoint>) -> Result<()> {
    end(link, mark, None, false)?;
    checkpoint.map_or(Ok(()), |new| undo_checkpoint(link, new))
}

/// Deletes a checkpoint that is not to be.
pub(super) fn undo_checkpoint(link: &Link, new: &NewCheckpoint) -> Result<()> {
    let name = new.name.to_string();
    link.call("undo a checkpoint", move |domain| delete(domain, &name))
}

/// There may be none: it is the last thing that libvirt makes.
fn delete(domain: &Domain, name: &str) -> ffi::Result<()> {
    match domain.checkpoint(name).and_then(|c| c.delete(0)) {
        Err(fault) if fault.code == sys::VIR_ERR_NO_DOMAIN_CHECKPOINT => Ok(()),
        deleted => deleted,
    }
}

/// After a begin that came too late for whoever waited for it.
fn undo_late(domain: &Domain, mark: &Mark, checkpoint: Option<&str>) {
    let gone = abort(domain, mark, Instant::now() + UNDO);
    let undone = gone.and_then(|_| checkpoint.map_or(Ok(()), |name| delete(domain, name)));
    if let Err(fault) = undone {
        log::error!("undoing a late backup: {}", fault.message);
    }
}

/// The backup that runs.
pub(super) fn running(domain: &Domain) -> ffi::Result<Option<LiveBackup>> {
    if !domain.is_active()? {
        return Ok(None);
    }
    match domain.backup_xml() {
        Ok(xml) => Ok(LiveBackup::read(xml.as_bytes()).ok()),
        Err(fault) if fault.code == sys::VIR_ERR_NO_DOMAIN_BACKUP => Ok(None),
        Err(fault) => Err(fault),
    }
}

/// Whether the backup that runs, if one does, bears this mark.
pub(super) fn is_ours(domain: &Domain, mark: &Mark) -> ffi::Result<bool> {
    Ok(running(domain)?.is_some_and(|backup| mark.is_on(&backup)))
}

/// Ends the backup with this mark and waits until libvirt has nothing of it; whether there was one.
fn abort(domain: &Domain, mark: &Mark, deadline: Instant) -> ffi::Result<bool> {
    if !is_ours(domain, mark)? {
        return Ok(false);
    }
    if let Err(fault) = domain.abort_job() {
        let ours = running(domain)?.filter(|backup| mark.is_on(backup));
        // It may have ended in between.
        let Some(backup) = ours else { return Ok(true) };
        // A begin that failed in its last step, when libvirt could not save the checkpoint's record, leaves
        // QEMU's jobs, and no job of libvirt's that could be aborted.
        let aborts = backup.disks.iter().map(|disk| domain.abort_block_job(disk));
        if aborts.filter(|a| a.is_ok()).count() == 0 {
            return Err(fault);
        }
    }
    while is_ours(domain, mark)? {
        if Instant::now() >= deadline {
            return Err(ffi::Fault::new(
                sys::VIR_ERR_OPERATION_TIMEOUT,
                "the job was aborted, and is still there",
            ));
        }
        std::thread::sleep(POLL);
    }
    Ok(true)
}

/// What ending a backup found.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Ended {
    /// It was not there any more, in a domain that runs on: somebody else has ended it.
    pub(super) was_gone: bool,
    /// A write of the guest has failed, and QEMU waits to make it again.
    pub(super) is_stopped: bool,
}

/// Ends the backup with this mark, which was begun in this run of the domain, if it is there; `wary`: and
/// sees whether somebody else is about to. Of an abort that is under way libvirt shows nothing, but that
/// does not take long.
pub(super) fn end(link: &Link, mark: Mark, run: Option<u32>, wary: bool) -> Result<Ended> {
    let deadline = Instant::now() + link.timeout();
    let ended = link.call("end a backup", move |domain| {
        let settled = Instant::now() + SETTLE;
        while wary && Instant::now() < settled && is_ours(domain, &mark)? {
            std::thread::sleep(POLL);
        }
        let was_there = abort(domain, &mark, deadline)?;
        let same_run = domain.is_active()? && domain.id() == run;
        Ok(Ended {
            was_gone: same_run && !was_there,
            is_stopped: same_run && State::of(domain)?.is_stopped_by_an_error(),
        })
    });
    match ended {
        // It is gone with its domain.
        Err(_) if link.is_undefined() => Ok(Ended::default()),
        ended => ended,
    }
}

/// A backup of ours that has something in libvirt.
pub(super) trait Running: Send + Sync {
    fn id(&self) -> JobId;

    /// What it is known by.
    fn mark(&self) -> Mark;

    /// libvirt's number of the domain's run in which it was begun.
    fn domain(&self) -> Option<u32>;

    /// All that libvirt has to do for it is done.
    fn is_written(&self) -> bool {
        false
    }

    /// Whether it is over, though something of it may be left. No I/O.
    fn is_over(&self) -> bool;

    /// Fails: whoever listens is told, unless it was over before.
    fn fail(&self, shared: &Shared, why: Error);

    /// Ends it if it still runs; nothing is left to do after that succeeded once.
    fn end(&self, shared: &Shared) -> Result<()>;

    /// libvirt still has it: looks after it.
    fn watch(&self, shared: &Shared, state: State);

    /// libvirt has it no longer, though nobody here ended it.
    fn vanished(self: Arc<Self>, shared: &Arc<Shared>);
}
