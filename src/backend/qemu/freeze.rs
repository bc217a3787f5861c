//! What a running backup has in QEMU, how it comes about and how it goes away.
//!
//! ```text
//!                       guest                          reader
//!                         |                              |
//!    job "job" ······· filter                         access     export "exp", NBD
//!    sync=none            |    \ old content             |      (snapshot-access:
//!                         |     \ before each write      |       old content from the
//!                         |      overlay (qcow2) <-------+       overlay, the rest
//!                         |        |                     |       from the live disk)
//!                     live disk <--|---------------------+
//!                                  file (scratch)
//! ```
//!
//! The overlay has no backing file. A filter that the next backup puts over the live disk would
//! become the backing of the overlays that are there, which makes two ways from each filter to the
//! next: with 16 backups at once 65536, and QEMU goes all of them when it is asked for its nodes.
//!
//! Freezing is one transaction over all disks: the checkpoint's bitmap on and its predecessor's
//! off, a frozen copy of what recorded until then, and the job that begins to copy before each
//! write. Everything before it is preparation and everything after it is access, so nothing but
//! the transaction decides which instant the backup shows.
//!
//! Taking it apart goes the other way round, and every step may find its object gone. So the same
//! steps end a backup, undo a begin that failed anywhere (also where QEMU did what it was told but
//! the answer was lost), and can be repeated.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;
use serde_json::{Value, json};

use super::disks::DiskNode;
use super::frozen::{QemuDisk, QemuFrozen};
use super::monitor::Monitor;
use super::quirks::Access;
use super::{Shared, action, quiesce};
use crate::backend::names::{Names, TAIL};
use crate::backend::scratch::{self, Scratch};
use crate::backend::watch::Fate;
use crate::backend::{FrozenDisk, front};
use crate::model::{
    BackupPlan, Error, FreezeDisk, JobId, Kind, NewCheckpoint, PublicExport, Result, ServerAddress,
};
use crate::nbd;

/// One disk's share of a backup.
pub(super) struct Part {
    pub(super) target: String,
    /// The live node.
    pub(super) live: DiskNode,
    pub(super) names: Names,
    /// Granularity of the bitmap that recorded up to the instant, where there is one; its frozen
    /// copy is on the overlay.
    pub(super) recorded: Option<(String, u64)>,
    /// The scratch file, where the usual place is not wanted.
    scratch: Option<PathBuf>,
    /// How other NBD clients find it.
    export: Option<PublicExport>,
}

/// A running backup.
pub(super) struct Session {
    pub(super) id: JobId,
    /// The QEMU process that holds it.
    pid: i32,
    pub(super) parts: Vec<Part>,
    scratch: Mutex<Vec<Scratch>>,
    /// Its begin did not fail.
    begun: AtomicBool,
    /// It counts among the NBD server's users.
    server: AtomicBool,
    /// The door for NBD clients from outside.
    front: Mutex<Option<nbd::Front>>,
    /// Whether it is over.
    pub(super) fate: Fate,
    /// Nothing of it is left in QEMU. The lock is held while it is put together or taken apart: what
    /// ends it meanwhile waits, lest it find only half of what there will be.
    gone: Mutex<bool>,
}

/// Freezes the disks of the plan.
pub(super) fn freeze(shared: &Arc<Shared>, plan: &BackupPlan) -> Result<QemuFrozen> {
    shared.settle()?;
    let monitor = shared.link.monitor()?;
    shared.not_migrating(&monitor)?;
    for disk in &plan.disks {
        let own = disk.scratch.as_ref().and_then(|s| Path::new(s).parent());
        scratch::check_room(own.unwrap_or(&shared.places.scratch))?;
    }
    if plan.server.is_some() && Access::of(monitor.client().version()).asks_the_overlay() {
        return Err(Error::new(
            Kind::Unsupported,
            "this QEMU, before 8.0, shows NBD clients newer data than it should; fleecefs works \
             around that, and other clients cannot",
        )
        .hint("leave <server> out and read the files, or use a newer QEMU"));
    }
    let mut parts = Vec::new();
    for (index, disk) in plan.disks.iter().enumerate() {
        parts.push(part(shared, plan.id, index, disk)?);
    }
    let session = Arc::new(Session {
        id: plan.id,
        pid: monitor.client().peer().pid,
        parts,
        scratch: Mutex::default(),
        begun: AtomicBool::new(false),
        server: AtomicBool::new(false),
        front: Mutex::default(),
        fate: Fate::default(),
        gone: Mutex::new(false),
    });
    shared.sessions.lock().push(Arc::clone(&session));
    let server = plan.server.as_ref();
    match session.begin(shared, &monitor, plan.checkpoint.as_ref(), server) {
        Ok(disks) => {
            session.begun.store(true, Ordering::Release);
            Ok(QemuFrozen::new(Arc::clone(shared), session, disks))
        }
        Err(error) => {
            let undone = session.undo(shared, plan.checkpoint.as_ref());
            if let Err(e) = undone {
                log::error!("undoing a backup that could not begin: {e}");
            }
            Err(error)
        }
    }
}

fn part(shared: &Shared, job: u32, index: usize, disk: &FreezeDisk) -> Result<Part> {
    let live = shared.node(&disk.target)?;
    let recorded = disk.recording.as_ref().and_then(|name| {
        let bitmap = live.disk.bitmaps.iter().find(|b| b.name == *name)?;
        Some((name.clone(), bitmap.granularity))
    });
    Ok(Part {
        target: disk.target.clone(),
        live,
        names: Names::new(shared.rundir.id(), job, index),
        recorded,
        scratch: disk.scratch.clone().map(PathBuf::from),
        export: disk.export.clone(),
    })
}

impl Part {
    /// Makes the overlay for what the guest will overwrite.
    fn prepare(&self, shared: &Shared, monitor: &Monitor) -> Result<Scratch> {
        let peer = monitor.client().peer();
        let name = self.names.overlay();
        let scratch = match &self.scratch {
            None => Scratch::create(&shared.places.scratch, &name, peer.uid, peer.gid)?,
            Some(path) => Scratch::create_at(path, peer.uid, peer.gid)?,
        };
        let file = self.names.file();
        monitor
            .blockdev_add(json!({
                "driver": "file", "node-name": file,
                "filename": scratch.path().display().to_string(),
            }))
            .map_err(|e| match e.kind() {
                Kind::NotPermitted => e.hint(
                    "QEMU's user must be able to enter the scratch directory: choose another with \
                     -o scratch=DIR",
                ),
                _ => e,
            })?;
        scratch.unlink();
        monitor.create_qcow2(&self.names.create(), &file, self.live.disk.size)?;
        let mut overlay = json!({
            "driver": "qcow2", "node-name": self.names.overlay(), "file": file,
        });
        if Access::of(monitor.client().version()).asks_the_overlay() {
            overlay["backing"] = json!(self.live.node);
        }
        monitor.blockdev_add(overlay)?;
        Ok(scratch)
    }

    /// Its share of the instant.
    fn actions(&self) -> Vec<Value> {
        let overlay = self.names.overlay();
        let mut actions = Vec::new();
        if let Some((bitmap, granularity)) = &self.recorded {
            actions.push(action(
                "block-dirty-bitmap-add",
                json!({"node": overlay, "name": TAIL, "granularity": granularity,
                       "persistent": false, "disabled": true}),
            ));
            actions.push(action(
                "block-dirty-bitmap-merge",
                json!({"node": overlay, "target": TAIL, "bitmaps": self.live.sources(bitmap)}),
            ));
        }
        actions.push(action(
            "blockdev-backup",
            json!({"job-id": self.names.job(), "device": self.live.node, "target": overlay,
                   "sync": "none", "filter-node-name": self.names.filter()}),
        ));
        actions
    }

    fn access(&self, monitor: &Monitor) -> Result<()> {
        let access = self.names.access();
        monitor.blockdev_add(json!({
            "driver": "snapshot-access", "node-name": access,
            "file": self.names.filter(), "read-only": true,
        }))?;
        let export = self.names.export();
        monitor.export_add(&export, &access, &export, &[])
    }

    /// Exports it once more, with the changes as a bitmap, for clients from outside; the public and
    /// the private name.
    fn publish(&self, monitor: &Monitor) -> Result<Option<(String, String)>> {
        let Some(public) = &self.export else {
            return Ok(None);
        };
        let export = self.names.public_export();
        let (access, overlay) = (self.names.access(), self.names.overlay());
        let bitmap = match (&public.bitmap, &self.recorded) {
            (Some((bitmap, older)), Some((_, granularity))) => {
                let mut sources: Vec<_> = older
                    .iter()
                    .flat_map(|name| self.live.sources(name))
                    .collect();
                sources.push(json!({"node": overlay, "name": TAIL}));
                monitor.bitmap_add(&overlay, bitmap, *granularity)?;
                monitor.bitmap_merge(&overlay, bitmap, sources)?;
                Some((overlay.as_str(), bitmap.as_str()))
            }
            _ => None,
        };
        monitor.export_add(&export, &access, &export, bitmap.as_slice())?;
        Ok(Some((public.name.clone(), export)))
    }

    /// Removes every trace, in the order that neither deadlocks QEMU nor shows a reader newer data:
    /// its readers, the export, the job, the nodes from the top down.
    fn dissolve(&self, shared: &Shared, monitor: &Monitor) -> Result<()> {
        monitor.export_del(&self.names.public_export())?;
        monitor.export_del(&self.names.map_export())?;
        monitor.export_del(&self.names.export())?;
        shared.in_silence(|| {
            monitor.job_cancel(&self.names.job())?;
            monitor.blockdev_del(&self.names.access())?;
            monitor.blockdev_del(&self.names.overlay())?;
            monitor.blockdev_del(&self.names.file())?;
            Ok(())
        })
    }

    fn during(&self, error: Error) -> Error {
        error.during(format!("disk {}", self.target))
    }
}

impl Session {
    fn begin(
        self: &Arc<Self>,
        shared: &Arc<Shared>,
        monitor: &Monitor,
        checkpoint: Option<&NewCheckpoint>,
        address: Option<&ServerAddress>,
    ) -> Result<Vec<Box<dyn FrozenDisk>>> {
        let _gone = self.gone.lock();
        for part in &self.parts {
            let scratch = part.prepare(shared, monitor).map_err(|e| part.during(e))?;
            self.scratch.lock().push(scratch);
        }
        let mut actions = match checkpoint {
            Some(new) => shared.checkpoint_actions(new)?,
            None => Vec::new(),
        };
        // The frozen copies come first: what a copy is taken of must not have been switched off by
        // an action that a later version might not see as simultaneous.
        actions.splice(0..0, self.parts.iter().flat_map(Part::actions));
        // In this order: a guest that is slow to freeze must not hold up who reads other backups.
        quiesce::frozen(shared, || {
            shared.in_silence(|| monitor.transaction(actions))
        })?;

        for part in &self.parts {
            if !self.server.load(Ordering::Acquire) {
                shared.server.acquire(monitor, &shared.rundir)?;
                self.server.store(true, Ordering::Release);
            }
            part.access(monitor).map_err(|e| part.during(e))?;
        }
        if let Some(address) = address {
            self.open_front(shared, monitor, address)?;
        }
        let mut disks: Vec<Box<dyn FrozenDisk>> = Vec::new();
        for index in 0..self.parts.len() {
            let disk = QemuDisk::open(shared, self, index)?;
            disks.push(Box::new(disk));
        }
        // Such as for want of scratch space, by the guard.
        self.fate.failure().map_or(Ok(disks), Err)
    }

    /// Lets NBD clients from outside have the disks.
    fn open_front(
        &self,
        shared: &Shared,
        monitor: &Monitor,
        address: &ServerAddress,
    ) -> Result<()> {
        let mut exports = Vec::new();
        for part in &self.parts {
            exports.extend(part.publish(monitor).map_err(|e| part.during(e))?);
        }
        let upstream = shared.rundir.socket();
        *self.front.lock() = Some(front::open(address, upstream, exports, &shared.places)?);
        Ok(())
    }

    /// The node under this backup's filter, if `node` is one.
    pub(super) fn below(&self, node: &str) -> Option<String> {
        let part = self.parts.iter().find(|p| p.names.filter() == node)?;
        Some(part.live.node.clone())
    }

    /// Whether the QEMU process of this id holds it.
    pub(super) fn is_of(&self, pid: i32) -> bool {
        self.pid == pid
    }

    /// From now on every read fails with `why`, unless it failed before; whether this made it so.
    pub(super) fn fail(&self, why: Error) -> bool {
        let first = self.fate.fail(why);
        drop(self.front.lock().take());
        first
    }

    pub(super) fn scratch_used(&self) -> u64 {
        self.scratch.lock().iter().map(Scratch::used).sum()
    }

    /// Adds something that [`dissolve`](Part::dissolve) removes: not while that is under way, which
    /// would have passed it by already, and cancel the job under a reader of it.
    pub(super) fn unless_over<T>(&self, add: impl FnOnce() -> Result<T>) -> Result<T> {
        let _whole = self.gone.lock();
        self.fate.failure().map_or_else(add, Err)
    }

    /// Whether there is no room left for what it has still to copy.
    pub(super) fn is_short_of_room(&self) -> bool {
        self.scratch.lock().iter().any(|s| s.room() == Some(0))
    }

    /// Takes everything apart; nothing is left to do after it succeeded once.
    pub(super) fn end(&self, shared: &Shared) -> Result<()> {
        self.fail(Error::new(Kind::NotConnected, "the backup was ended"));
        let mut gone = self.gone.lock();
        if *gone {
            return Ok(());
        }
        let monitor = match shared.link.monitor() {
            Ok(monitor) => Some(monitor).filter(|m| m.client().peer().pid == self.pid),
            // Nobody listens: QEMU is gone, and with it all that we had there.
            Err(e) if e.kind() == Kind::NotConnected => None,
            Err(e) => return Err(e),
        };
        match monitor {
            Some(monitor) => self.dissolve(shared, &monitor)?,
            None => {
                if self.server.swap(false, Ordering::AcqRel) {
                    shared.server.lost();
                }
            }
        }
        *gone = true;
        self.scratch.lock().clear();
        shared.sessions.lock().retain(|s| !std::ptr::eq(&**s, self));
        Ok(())
    }

    fn dissolve(&self, shared: &Shared, monitor: &Monitor) -> Result<()> {
        let mut result = Ok(());
        let begun = self.begun.load(Ordering::Acquire);
        for part in &self.parts {
            let half_made = match begun {
                true => Ok(()),
                false => monitor.discard_create(&part.names.create()),
            };
            let outcome = half_made
                .and_then(|()| part.dissolve(shared, monitor))
                .map_err(|e| part.during(e));
            let silent = matches!(&outcome, Err(e) if e.kind() == Kind::TimedOut);
            result = result.and(outcome);
            if silent {
                // One deadline is enough; the rest is done when it answers again.
                return result;
            }
        }
        if self.server.load(Ordering::Acquire) && result.is_ok() {
            shared.server.release(monitor, &shared.rundir)?;
            self.server.store(false, Ordering::Release);
        }
        result
    }

    /// After a begin that failed: takes apart what there is, and removes the checkpoint's bitmaps if
    /// the transaction took effect.
    fn undo(&self, shared: &Shared, checkpoint: Option<&NewCheckpoint>) -> Result<()> {
        let ended = self.end(shared);
        match checkpoint {
            Some(new) => shared.undo_checkpoint(new).and(ended),
            None => ended,
        }
    }
}

/// Where a reader finds an export.
pub(super) fn endpoint(shared: &Shared, export: &str) -> nbd::Endpoint {
    nbd::Endpoint {
        socket: shared.rundir.socket(),
        export: export.to_owned(),
    }
}
