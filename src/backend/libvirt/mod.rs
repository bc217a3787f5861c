//! A domain that libvirt manages: by libvirt's own checkpoint and backup calls, so that virsh,
//! virt-manager and other backup programs see the same checkpoints and no two get in each other's way.
//!
//! ```text
//!   Libvirt ── Shared ──┬── Link      calls with deadlines; connects again after a restart
//!                       ├── Running   the one backup that libvirt lets a domain have (job.rs):
//!                       │             a Session that is read, or a PushSession that is written
//!                       ├── RunDir    the socket that it is read from
//!                       └── Seen      checkpoints as last seen; libvirt's record is the one that counts
//!   guard.rs: a thread that notices what others do to the domain
//! ```
//!
//! Tried on libvirt 11.3.0 with QEMU 10.0.2.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime};

use parking_lot::Mutex;
use virt_sys as sys;

use self::job::{Mark, Running};
use self::link::Link;
use self::look::Look;
use self::quiesce::Guest;
use super::rundir::{self, RunDir};
use super::source::Places;
use super::watch::Watcher;
use super::{Backend, Frozen, Listener, Notice, Pushing, scratch};
use crate::model::{
    BackupPlan, Checkpoint, CheckpointRemoval, Disk, DomainInfo, Error, JobId, Kind, Name,
    NewCheckpoint, PushPlan, RenameBitmap, Result,
};
use crate::xml::{CheckpointDocument, CheckpointDocumentDisk, DocumentBitmap, LiveBackup};

mod ffi;
mod guard;
mod job;
mod link;
mod look;
mod outcome;
mod push;
mod qemu_img;
mod quiesce;
mod removal;
mod session;
mod stopped;

/// Of a checkpoint's name. libvirt writes NAME.xml.new; with a longer one it fails in the end, and leaves
/// bitmaps (tried: 248).
const LONGEST_NAME: usize = 247;

/// How long is waited for a planned time. A clock that was set back is not waited for.
const LONGEST_WAIT: Duration = Duration::from_secs(2);

/// A running domain of libvirt.
struct Libvirt {
    shared: Arc<Shared>,
    info: DomainInfo,
    guard: Mutex<Option<Watcher>>,
}

struct Shared {
    link: Link,
    /// The way to the guest's agent, which may hang.
    agent: Link,
    guest: Arc<Guest>,
    uuid: String,
    places: Places,
    rundir: RunDir,
    /// Who is to own the files that QEMU writes, where libvirt does not see to that.
    files_owner: Option<(u32, u32)>,
    /// The backup that has something in libvirt.
    running: Mutex<Option<Arc<dyn Running>>>,
    /// The disks as last seen; the engine looks before every change.
    disks: Mutex<Vec<Disk>>,
    seen: Mutex<Seen>,
    /// A guest that a backup has stopped could not be made to go on yet.
    owed_resume: AtomicBool,
    /// Why the domain could not be asked when it was last looked after.
    down: Mutex<Option<Error>>,
    listener: OnceLock<Listener>,
}

/// Checkpoints as last seen, and how often they were seen to have changed.
#[derive(Default)]
struct Seen {
    number: u64,
    checkpoints: Vec<Checkpoint>,
    /// Looks that were begun.
    looks: u64,
    /// Which of them this is from.
    from: u64,
}

impl Seen {
    /// Before a look: its place in the order of all.
    fn look(&mut self) -> u64 {
        self.looks += 1;
        self.looks
    }

    /// What the look of this place found; nothing, if one that began later was told before.
    fn note(&mut self, look: u64, checkpoints: &[Checkpoint]) {
        if look < self.from {
            return;
        }
        self.from = look;
        if self.checkpoints != checkpoints {
            self.number += 1;
            self.checkpoints = checkpoints.to_vec();
        }
    }
}

/// Finds the domain. Nothing of it is changed yet.
pub(super) fn open(name: &str, places: &Places) -> Result<Arc<dyn Backend>> {
    let by_name = Link::by_name(&places.uri, name, places.timeout);
    let found = by_name.call("find the domain", |domain| {
        Ok((domain.name(), domain.uuid()?, domain.is_active()?))
    });
    let (name, uuid, active) = found.map_err(|e| match by_name.is_undefined() {
        true => Error::new(
            Kind::NotFound,
            format!("libvirt at {} has no domain {name}", places.uri),
        )
        .hint("fleecefs list shows those there are; -o uri= says where else to look"),
        false => e,
    })?;
    let info = DomainInfo {
        name,
        // Apart from what a QMP mount of the same domain remembers: the checkpoints are not the same.
        key: format!("libvirt-{uuid}"),
        uuid: Some(uuid.clone()),
    };
    let link = Link::by_uuid(&places.uri, &uuid, places.timeout);
    let look = look::look(&link, false)?;
    if !active {
        return Ok(Arc::new(stopped::open(link, &look, info, places)?));
    }
    let rundir = RunDir::create(&places.runtime)?;
    if let Some((uid, gid)) = look.domain.owner {
        rundir.give_to(uid, gid)?;
    }
    let shared = Arc::new(Shared {
        agent: link.aside(quiesce::FREEZE, quiesce::HINT),
        guest: Arc::new(Guest::new(rundir.frozen_note(), uuid.clone())),
        uuid,
        link,
        files_owner: look.domain.owner.filter(|_| look.domain.keeps_owners),
        places: places.clone(),
        rundir,
        running: Mutex::default(),
        disks: Mutex::new(look.disks),
        seen: Mutex::default(),
        owed_resume: AtomicBool::new(false),
        down: Mutex::default(),
        listener: OnceLock::new(),
    });
    let guard = Mutex::new(Some(guard::start(&shared)));
    Ok(Arc::new(Libvirt {
        shared,
        info,
        guard,
    }))
}

/// The names of libvirt's domains, and whether they run. Bounded like every call.
pub(super) fn list(uri: &str, timeout: Duration) -> Result<Vec<(String, bool)>> {
    let (answer, answered) = crossbeam_channel::bounded(1);
    let place = uri.to_owned();
    let ask = move || {
        let found = ffi::Connection::open(&place).and_then(|connection| {
            let domains = connection.domains()?;
            let mut all = domains
                .iter()
                .map(|domain| Ok((domain.name(), domain.is_active()?)))
                .collect::<ffi::Result<Vec<_>>>()?;
            all.sort();
            Ok(all)
        });
        // Nobody may wait any more.
        let _ = answer.send(found);
    };
    let thread = std::thread::Builder::new().name("libvirt".to_owned());
    let asked = thread.spawn(ask).is_ok();
    match answered.recv_timeout(timeout) {
        Ok(found) => found.map_err(|fault| link::explain(&fault).during(uri)),
        Err(_) if asked => Err(Error::new(
            Kind::TimedOut,
            format!("{uri} did not answer within {} s", timeout.as_secs()),
        )),
        Err(_) => Err(Error::new(Kind::Io, "no thread to ask libvirt in")),
    }
}

impl Shared {
    fn notify(&self, notice: Notice) {
        if let Some(listener) = self.listener.get() {
            listener(notice);
        }
    }

    fn running(&self) -> Option<Arc<dyn Running>> {
        self.running.lock().clone()
    }

    /// This backup has something in libvirt.
    fn put(&self, running: Arc<dyn Running>) {
        *self.running.lock() = Some(running);
    }

    /// The backup of this number has nothing there any more.
    fn take(&self, id: JobId) {
        self.running.lock().take_if(|r| r.id() == id);
    }

    /// Lets a guest go on that a backup has stopped. The guard tries again if it cannot.
    fn resume(&self) {
        let resumed = self.link.call("resume the domain", |d| d.resume());
        if let Err(e) = &resumed {
            log::error!("the guest is stopped and cannot be made to go on: {e}");
        }
        self.owed_resume.store(resumed.is_err(), Ordering::Release);
    }

    fn set_down(&self, why: Option<Error>) {
        let mut down = self.down.lock();
        let told = |e: &Option<Error>| e.as_ref().map(|e| e.message().to_owned());
        if told(&down) != told(&why) {
            match &why {
                Some(why) => log::warn!("{why}"),
                None => log::info!("the domain can be reached again"),
            }
        }
        *down = why;
    }

    fn knows_other_checkpoints(&self, names: &[String]) -> bool {
        let seen = self.seen.lock();
        let known = seen.checkpoints.iter().map(|c| c.name.as_str());
        // Names that would not do here were left out.
        let usable = names.iter().filter(|n| Name::new(n).is_ok());
        let (mut known, mut named): (Vec<_>, Vec<_>) =
            (known.collect(), usable.map(String::as_str).collect());
        known.sort_unstable();
        named.sort_unstable();
        known != named
    }

    /// Looks, and notes the checkpoints. Looks may overtake each other: one that began before a change
    /// and ends after it must not take back what is known of it.
    fn look(&self, bitmaps: bool) -> Result<Look> {
        let place = self.seen.lock().look();
        let look = look::look(&self.link, bitmaps)?;
        self.seen.lock().note(place, &look.checkpoints);
        Ok(look)
    }

    fn size_of(&self, target: &str) -> Result<u64> {
        let disks = self.disks.lock();
        let disk = disks.iter().find(|d| d.target == target);
        disk.map(|d| d.size)
            .ok_or_else(|| Error::new(Kind::NotFound, format!("the domain has no disk {target}")))
    }

    /// The document of a new checkpoint. libvirt takes the time by itself, in whole seconds, so this
    /// waits until that is the one which is planned: no two are made in one second.
    fn checkpoint_xml(&self, new: &NewCheckpoint) -> String {
        let disk = |bitmap: &crate::model::NewBitmap| CheckpointDocumentDisk {
            place: Default::default(),
            name: bitmap.target.clone(),
            bitmap: Some(DocumentBitmap {
                name: Some(bitmap.bitmap.clone()),
                size: None,
            }),
        };
        if let Ok(wait) = new.created.duration_since(SystemTime::now()) {
            std::thread::sleep(wait.min(LONGEST_WAIT));
        }
        // Disks that are not named take no part.
        CheckpointDocument {
            name: Some(new.name.clone().into()),
            description: new.description.clone(),
            disks: new.bitmaps.iter().map(disk).collect(),
            ..CheckpointDocument::default()
        }
        .write()
    }
}

/// What libvirt leaves no choice about.
fn choices(new: &NewCheckpoint) -> Result<()> {
    if new.name.as_str().len() > LONGEST_NAME {
        return Err(Error::new(
            Kind::NameTooLong,
            format!(
                "libvirt keeps a checkpoint in a file, whose name has room for {LONGEST_NAME} bytes"
            ),
        ));
    }
    for bitmap in &new.bitmaps {
        if bitmap.granularity.is_some() {
            return Err(Error::new(
                Kind::Unsupported,
                "libvirt chooses the granularity of bitmaps by itself",
            )
            .hint("mount without -o granularity="));
        }
        if bitmap.bitmap != new.name.as_str() {
            return Err(Error::new(
                Kind::Unsupported,
                format!(
                    "libvirt gives a bitmap its checkpoint's name, and none other such as {}",
                    bitmap.bitmap
                ),
            )
            .hint("leave bitmap= out"));
        }
    }
    Ok(())
}

/// Removes a checkpoint from libvirt's record; its bitmaps stay.
fn forget(link: &Link, name: &Name) -> Result<()> {
    let name = name.to_string();
    link.call("forget a checkpoint", move |domain| {
        let metadata = sys::VIR_DOMAIN_CHECKPOINT_DELETE_METADATA_ONLY;
        domain.checkpoint(&name)?.delete(metadata)
    })
}

/// What a backup is known by that a killed fleecefs began, with this runtime directory.
fn left_behind(backup: &LiveBackup, runtime: &Path) -> Option<Mark> {
    let served = || {
        let socket = Path::new(backup.socket.as_deref()?);
        // See `RunDir::socket`.
        let dir = socket.parent()?.parent()?;
        let id = dir.file_name()?.to_str()?;
        let dead = dir.parent()? == runtime && rundir::is_dead_id(runtime, id);
        dead.then(|| Mark::Socket(socket.to_owned()))
    };
    let written = || {
        let dead = rundir::dead(runtime).into_iter();
        let noted = dead.filter_map(|dir| Some(Mark::Targets(rundir::noted_job(&dir)?.1)));
        noted.into_iter().find(|mark| mark.is_on(backup))
    };
    served().or_else(written)
}

fn no_rename() -> Error {
    Error::new(
        Kind::Unsupported,
        "libvirt cannot give a checkpoint another name",
    )
    .hint("make another one, and delete this one when it is no longer needed")
}

impl Backend for Libvirt {
    fn info(&self) -> DomainInfo {
        self.info.clone()
    }

    fn failure(&self) -> Option<Error> {
        self.shared.down.lock().clone()
    }

    fn tidy(&self) -> Result<()> {
        let places = &self.shared.places;
        let link = &self.shared.link;
        if let Some(backup) = link.call("look for what is left", job::running)?
            && let Some(mark) = left_behind(&backup, &places.runtime)
        {
            log::warn!("ending a backup that a killed fleecefs left: {mark:?}");
            if let Err(e) = job::end(link, mark, None, false) {
                log::error!("{e}");
            }
        }
        scratch::sweep(&places.scratch, &places.runtime);
        for dir in rundir::dead(&places.runtime) {
            // Another domain's, whose next mount will look after it.
            let others = |uuid: &String| *uuid != self.shared.uuid;
            let frozen = rundir::noted_frozen(&dir);
            if frozen.as_ref().is_some_and(others)
                || rundir::noted_job(&dir).is_some_and(|(uuid, _)| others(&uuid))
            {
                continue;
            }
            if frozen.is_some() {
                log::warn!("an earlier fleecefs may have left the guest frozen: it is thawed");
                self.shared.guest.owe();
            }
            // A QEMU's NBD server, which the next QMP mount of that domain will look after.
            let server = rundir::noted_pid(&dir, "nbd-server");
            if !server.is_some_and(rundir::is_running) {
                rundir::remove_targets(&dir);
                let _ = std::fs::remove_dir_all(&dir);
            }
        }
        Ok(())
    }

    fn disks(&self) -> Result<Vec<Disk>> {
        let look = self.shared.look(true)?;
        self.shared.disks.lock().clone_from(&look.disks);
        Ok(look.disks)
    }

    fn own_checkpoints(&self) -> Result<Option<Vec<Checkpoint>>> {
        Ok(Some(self.shared.look(false)?.checkpoints))
    }

    fn seen_checkpoints(&self, number: u64) -> Option<(u64, Vec<Checkpoint>)> {
        let seen = self.shared.seen.lock();
        (seen.number != number).then(|| (seen.number, seen.checkpoints.clone()))
    }

    fn create_checkpoint(&self, new: &NewCheckpoint) -> Result<()> {
        choices(new)?;
        let shared = &self.shared;
        let xml = shared.checkpoint_xml(new);
        let create = |link: &Link| {
            link.call_or_undo(
                "create a checkpoint",
                move |domain| domain.create_checkpoint(&xml, 0),
                |_, checkpoint| {
                    if let Err(fault) = checkpoint.delete(0) {
                        log::error!("undoing a late checkpoint: {}", fault.message);
                    }
                },
            )
        };
        // libvirt's own flag for it is refused by its QEMU driver.
        let undo = |_| {
            if let Err(e) = job::undo_checkpoint(&shared.link, new) {
                log::error!("undoing a checkpoint: {e}");
            }
        };
        quiesce::frozen(shared, new.quiesce, create, undo).map(drop)
    }

    fn delete_checkpoint(&self, going: &CheckpointRemoval) -> Result<()> {
        let name = going.name.to_string();
        self.shared.link.call("delete a checkpoint", move |domain| {
            removal::delete(domain, &name)
        })
    }

    fn forget_checkpoint(&self, name: &Name) -> Result<()> {
        forget(&self.shared.link, name)
    }

    fn redefine_checkpoint(&self, again: &Checkpoint, validate: bool) -> Result<()> {
        let document = CheckpointDocument::describe(again, None);
        let mut flags = sys::VIR_DOMAIN_CHECKPOINT_CREATE_REDEFINE;
        if validate {
            flags |= sys::VIR_DOMAIN_CHECKPOINT_CREATE_REDEFINE_VALIDATE;
        }
        self.shared
            .link
            .call("redefine a checkpoint", move |domain| {
                let whole = removal::whole(domain, &document)?;
                domain.create_checkpoint(&whole, flags).map(drop)
            })
    }

    fn rename_checkpoint(&self, _: &[RenameBitmap]) -> Result<()> {
        Err(no_rename())
    }

    fn only_base(&self) -> Option<&'static str> {
        Some("libvirt exports one list of changes a disk, those since the base")
    }

    fn begin(&self, plan: &BackupPlan) -> Result<Box<dyn Frozen>> {
        if let Some(new) = &plan.checkpoint {
            choices(new)?;
        }
        Ok(Box::new(session::begin(&self.shared, plan)?))
    }

    fn push(&self, plan: &PushPlan) -> Result<Box<dyn Pushing>> {
        if let Some(new) = &plan.checkpoint {
            choices(new)?;
        }
        Ok(Box::new(push::push(&self.shared, plan)?))
    }

    fn listen(&self, listener: Listener) {
        // Called once; a second listener would be nobody's.
        let _ = self.shared.listener.set(listener);
    }

    fn close(&self) -> Result<()> {
        drop(self.guard.lock().take());
        self.shared.guest.close(&self.shared);
        let left = self.shared.running();
        let ended = left.map_or(Ok(()), |running| running.end(&self.shared));
        self.shared.rundir.leave_what_is_frozen();
        self.shared.rundir.remove();
        ended
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_look_that_was_overtaken_says_nothing() {
        let made = |name: &str| Checkpoint {
            name: Name::new(name).unwrap(),
            created: SystemTime::UNIX_EPOCH,
            parent: None,
            description: None,
            disks: Vec::new(),
        };
        let mut seen = Seen::default();
        let slow = seen.look();
        let after = seen.look();
        seen.note(after, &[made("mon")]);
        let number = seen.number;
        seen.note(slow, &[]);
        assert_eq!((seen.number, seen.checkpoints.len()), (number, 1));
        let next = seen.look();
        seen.note(next, &[]);
        assert_eq!((seen.number, seen.checkpoints.len()), (number + 1, 0));
    }
}
