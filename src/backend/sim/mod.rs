//! A simulated domain: disks and bitmaps in memory, for tests of everything above a backend.
//!
//! It follows the rules that a real one enforces (all or nothing, no write without its bits, a
//! frozen disk stays as it was), counts what it is asked, and fails or breaks on demand. It stands
//! in for no real QEMU in any test that says it is about one. Its bitmaps have one granularity, and it
//! has no NBD server: what asks for another, or for one, is refused.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::{Arc, OnceLock};

use parking_lot::{Condvar, Mutex};

use self::jobs::{SimFrozen, SimFrozenDisk, SimPush};
use super::{Backend, Frozen, FrozenDisk, Listener, Notice, Pushing};
use crate::model::{
    BackupPlan, Bitmap, CheckpointRemoval, Disk, DomainInfo, Error, JobId, JobState, Kind,
    NewCheckpoint, Outcome, PushPlan, RenameBitmap, Result,
};

mod jobs;

/// Bytes that a bit of a simulated bitmap, and an extent of a simulated map, stands for.
pub const GRANULE: usize = 4096;

/// One simulated disk; every field may be changed by a test at any time.
#[derive(Debug, Clone, Default)]
pub struct SimDisk {
    /// The content.
    pub data: Vec<u8>,
    /// The bitmaps by name: recording, dirty granules.
    pub bitmaps: BTreeMap<String, (bool, Vec<bool>)>,
    /// Names of bitmaps that are inconsistent.
    pub inconsistent: Vec<String>,
    /// Why the disk cannot carry bitmaps.
    pub no_checkpoint: Option<String>,
    /// Why it cannot be frozen.
    no_backup: Option<String>,
}

#[derive(Default)]
struct Inner {
    disks: BTreeMap<String, SimDisk>,
    /// What the backend was asked, in order.
    calls: Vec<String>,
    /// The next call of this name fails with this kind, before (`false`) or after it took effect.
    fail: Option<(String, Kind, bool)>,
    running: usize,
    /// The push backups that were not finished yet.
    pushes: Vec<(JobId, Arc<Mutex<JobState>>)>,
    /// Set once the domain stopped answering.
    hung: bool,
    /// The next call of this name is the last that takes effect; its answer is lost.
    hang_at: Option<String>,
    /// Calls of this name wait until it is cleared.
    held: Option<String>,
    /// How many calls are waiting.
    waiting: usize,
    /// The pull backups that are in the domain, and what is set when they are over.
    pulls: Vec<(JobId, Arc<OnceLock<Error>>)>,
    /// The domain does not run.
    off: bool,
    /// How often it ended.
    ends: usize,
}

#[derive(Default)]
struct Shared {
    inner: Mutex<Inner>,
    listener: Mutex<Option<Listener>>,
    /// Rung when `held` is cleared and when a backup ends.
    bell: Condvar,
}

/// A simulated domain. Clones share it.
#[derive(Clone, Default)]
pub struct Sim(Arc<Shared>);

impl Sim {
    /// A domain with disks of these names and sizes in bytes, all zeros.
    pub fn new(disks: &[(&str, usize)]) -> Self {
        let sim = Self::default();
        for &(target, size) in disks {
            sim.add_disk(target, size);
        }
        sim
    }

    /// Plugs in a disk.
    pub fn add_disk(&self, target: &str, size: usize) {
        self.disk(target, |disk| disk.data = vec![0; size]);
    }

    /// A guest's write: changes the bytes and marks every recording bitmap.
    pub fn write(&self, target: &str, offset: usize, bytes: &[u8]) {
        self.disk(target, |disk| {
            disk.data[offset..offset + bytes.len()].copy_from_slice(bytes);
            let granules = offset / GRANULE..(offset + bytes.len()).div_ceil(GRANULE);
            for (recording, dirty) in disk.bitmaps.values_mut() {
                if *recording {
                    dirty[granules.clone()].fill(true);
                }
            }
        });
    }

    /// Looks at or changes a disk behind everybody's back; plugs in one of 0 bytes if there is none.
    pub fn disk<T>(&self, target: &str, f: impl FnOnce(&mut SimDisk) -> T) -> T {
        f(self
            .0
            .inner
            .lock()
            .disks
            .entry(target.to_owned())
            .or_default())
    }

    /// What the backend was asked so far, by the name of the method.
    pub fn calls(&self) -> Vec<String> {
        self.0.inner.lock().calls.clone()
    }

    /// How many backups are running.
    pub fn running(&self) -> usize {
        self.0.inner.lock().running
    }

    /// Makes the next call of `method` fail without effect.
    pub fn fail_next(&self, method: &str, kind: Kind) {
        self.0.inner.lock().fail = Some((method.to_owned(), kind, false));
    }

    /// Makes the next call of `method` take effect and then fail: an answer that got lost.
    pub fn fail_after_next(&self, method: &str, kind: Kind) {
        self.0.inner.lock().fail = Some((method.to_owned(), kind, true));
    }

    /// Lets the next call of `method` take effect, but nothing is answered from then on.
    pub fn hang_at(&self, method: &str) {
        self.0.inner.lock().hang_at = Some(method.to_owned());
    }

    /// Makes every call of `method` wait, until [`release`](Self::release) or, for reads, until
    /// their backup is ended: a domain that is slow.
    pub fn hold(&self, method: &str) {
        self.0.inner.lock().held = Some(method.to_owned());
    }

    /// Lets the waiting calls go on.
    pub fn release(&self) {
        self.0.inner.lock().held = None;
        self.0.bell.notify_all();
    }

    /// How many calls are waiting for [`release`](Self::release).
    pub fn waiting(&self) -> usize {
        self.0.inner.lock().waiting
    }

    fn wait_while_held(&self, method: &str, fate: &OnceLock<Error>) {
        let mut inner = self.0.inner.lock();
        inner.waiting += 1;
        self.0.bell.wait_while(&mut inner, |inner| {
            inner.held.as_deref() == Some(method) && fate.get().is_none()
        });
        inner.waiting -= 1;
    }

    /// The running push backups come to their end by themselves: written, or failed for this reason.
    pub fn finish_pushes(&self, failure: Option<&Error>) {
        let pushes = std::mem::take(&mut self.0.inner.lock().pushes);
        for (id, state) in pushes {
            let outcome = match failure {
                None => Ok(Outcome::Completed),
                Some(error) => Err(error.clone()),
            };
            *state.lock() = match &outcome {
                Ok(outcome) => JobState::Ended(*outcome),
                Err(error) => JobState::Failed(error.clone()),
            };
            self.notice(Notice::Over(id, outcome));
        }
    }

    /// Tells whoever listens.
    pub fn notice(&self, notice: Notice) {
        if let Some(listener) = &*self.0.listener.lock() {
            listener(notice);
        }
    }

    /// The domain ends, and its backups with it. Its bitmaps are saved, unless it is `killed`.
    pub fn power_off(&self, killed: bool) {
        let over = {
            let mut inner = self.0.inner.lock();
            inner.off = true;
            inner.ends += 1;
            inner.running = 0;
            for disk in inner.disks.values_mut().filter(|_| killed) {
                disk.inconsistent = disk.bitmaps.keys().cloned().collect();
            }
            std::mem::take(&mut inner.pulls)
        };
        self.0.bell.notify_all();
        for (id, fate) in over {
            if fate.set(gone()).is_ok() {
                self.notice(Notice::Over(id, Err(gone())));
            }
        }
        self.finish_pushes(Some(&gone()));
    }

    /// The domain is started again.
    pub fn power_on(&self) {
        self.0.inner.lock().off = false;
    }

    /// The domain answers nothing from now on.
    pub fn hang(&self) {
        self.0.inner.lock().hung = true;
    }

    /// The domain answers again.
    pub fn revive(&self) {
        self.0.inner.lock().hung = false;
    }
}

impl Inner {
    /// Notes the call; `Err` if it is to fail at once, `Ok(Some)` if it is to fail in the end.
    fn enter(&mut self, method: &str) -> Result<Option<Error>> {
        self.calls.push(method.to_owned());
        if self.off && method != "close" {
            return Err(gone());
        }
        if self.hung {
            return Err(Error::new(Kind::TimedOut, "no answer"));
        }
        if self.hang_at.take_if(|at| at == method).is_some() {
            self.hung = true;
            return Ok(Some(Error::new(Kind::TimedOut, "no answer")));
        }
        match self.fail.take() {
            Some((name, kind, after)) if name == method => {
                let error = Error::new(kind, format!("{method} fails as asked"));
                if after { Ok(Some(error)) } else { Err(error) }
            }
            other => {
                self.fail = other;
                Ok(None)
            }
        }
    }

    fn create(&mut self, new: &NewCheckpoint) -> Result<()> {
        for b in &new.bitmaps {
            if b.granularity.is_some_and(|g| g != GRANULE as u64) {
                return Err(Error::new(
                    Kind::Unsupported,
                    format!("a simulated bitmap has a bit for {GRANULE} bytes"),
                ));
            }
            let disk = self.disks.get(&b.target);
            if disk.is_none_or(|d| d.bitmaps.contains_key(&b.bitmap)) {
                return Err(Error::new(
                    Kind::Exists,
                    format!("bitmap {} exists", b.bitmap),
                ));
            }
        }
        for b in &new.bitmaps {
            if let Some(disk) = self.disks.get_mut(&b.target) {
                if let Some(old) = b.stop.as_ref().and_then(|s| disk.bitmaps.get_mut(s)) {
                    old.0 = false;
                }
                let granules = disk.data.len().div_ceil(GRANULE);
                disk.bitmaps
                    .insert(b.bitmap.clone(), (true, vec![false; granules]));
            }
        }
        Ok(())
    }
}

fn union(into: &mut [bool], from: &[bool]) {
    for (a, b) in into.iter_mut().zip(from) {
        *a |= b;
    }
}

fn ended() -> Error {
    Error::new(Kind::NotConnected, "the backup was ended")
}

fn gone() -> Error {
    Error::new(Kind::NotConnected, "the domain does not run")
}

fn finish<T>(fail: Option<Error>, value: T) -> Result<T> {
    match fail {
        Some(error) => Err(error),
        None => Ok(value),
    }
}

impl Backend for Sim {
    fn info(&self) -> DomainInfo {
        DomainInfo {
            name: "sim".to_owned(),
            uuid: Some("00000000-0000-4000-8000-000000000001".to_owned()),
            key: "sim".to_owned(),
        }
    }

    fn failure(&self) -> Option<Error> {
        self.0.inner.lock().off.then(gone)
    }

    fn tidy(&self) -> Result<()> {
        self.0.inner.lock().enter("tidy").map(drop)
    }

    fn disks(&self) -> Result<Vec<Disk>> {
        self.wait_while_held("disks", &OnceLock::new());
        let mut inner = self.0.inner.lock();
        let fail = inner.enter("disks")?;
        let disks = inner
            .disks
            .iter()
            .map(|(target, disk)| Disk {
                target: target.clone(),
                size: disk.data.len() as u64,
                format: "qcow2".to_owned(),
                file: Some(format!("/images/{target}.qcow2")),
                backing: Vec::new(),
                no_backup: disk.no_backup.clone(),
                no_checkpoint: disk.no_checkpoint.clone(),
                bitmaps: disk
                    .bitmaps
                    .iter()
                    .map(|(name, (recording, dirty))| Bitmap {
                        name: name.clone(),
                        recording: *recording,
                        inconsistent: disk.inconsistent.contains(name),
                        persistent: true,
                        granularity: GRANULE as u64,
                        dirty_bytes: (dirty.iter().filter(|d| **d).count() * GRANULE) as u64,
                    })
                    .collect(),
            })
            .collect();
        finish(fail, disks)
    }

    fn create_checkpoint(&self, new: &NewCheckpoint) -> Result<()> {
        let mut inner = self.0.inner.lock();
        let fail = inner.enter("create_checkpoint")?;
        inner.create(new)?;
        finish(fail, ())
    }

    fn delete_checkpoint(&self, removal: &CheckpointRemoval) -> Result<()> {
        let mut inner = self.0.inner.lock();
        let fail = inner.enter("delete_checkpoint")?;
        for r in &removal.bitmaps {
            let Some(disk) = inner.disks.get_mut(&r.target) else {
                continue;
            };
            let gone = disk.bitmaps.remove(&r.bitmap);
            let parent = r.merge_into.as_ref().and_then(|p| disk.bitmaps.get_mut(p));
            if let (Some((_, dirty)), Some(parent)) = (gone, parent) {
                union(&mut parent.1, &dirty);
                parent.0 |= r.resume;
            }
        }
        finish(fail, ())
    }

    fn begin(&self, plan: &BackupPlan) -> Result<Box<dyn Frozen>> {
        self.wait_while_held("begin", &OnceLock::new());
        let mut inner = self.0.inner.lock();
        let fail = inner.enter("begin")?;
        if plan.server.is_some() {
            return Err(Error::new(
                Kind::Unsupported,
                "a simulated domain has no NBD server for others",
            ));
        }
        let fate = Arc::new(OnceLock::new());
        let mut disks: Vec<Box<dyn FrozenDisk>> = Vec::new();
        for freeze in &plan.disks {
            let Some(disk) = inner.disks.get(&freeze.target) else {
                return Err(Error::new(Kind::NotFound, "no such disk"));
            };
            let recorded = freeze.recording.as_ref().and_then(|b| disk.bitmaps.get(b));
            disks.push(Box::new(SimFrozenDisk {
                sim: self.clone(),
                target: freeze.target.clone(),
                data: disk.data.clone(),
                recorded: recorded.map(|b| b.1.clone()),
                pulled: AtomicU64::new(0),
                fate: Arc::clone(&fate),
            }));
        }
        if let Some(new) = &plan.checkpoint {
            inner.create(new)?;
        }
        if let Some(error) = fail {
            // A backend that fails has changed nothing.
            for b in plan.checkpoint.iter().flat_map(|c| &c.bitmaps) {
                if let Some(disk) = inner.disks.get_mut(&b.target) {
                    disk.bitmaps.remove(&b.bitmap);
                    if let Some(old) = b.stop.as_ref().and_then(|s| disk.bitmaps.get_mut(s)) {
                        old.0 = true;
                    }
                }
            }
            return Err(error);
        }
        inner.running += 1;
        inner.pulls.push((plan.id, Arc::clone(&fate)));
        Ok(Box::new(SimFrozen {
            sim: self.clone(),
            disks,
            fate,
        }))
    }

    fn rename_checkpoint(&self, renames: &[RenameBitmap]) -> Result<()> {
        let mut inner = self.0.inner.lock();
        let fail = inner.enter("rename_checkpoint")?;
        for rename in renames {
            let disk = inner.disks.get_mut(&rename.target);
            let bitmap = disk.and_then(|d| Some((d.bitmaps.remove(&rename.from)?, d)));
            if let Some((bitmap, disk)) = bitmap {
                disk.bitmaps.insert(rename.to.clone(), bitmap);
            }
        }
        finish(fail, ())
    }

    fn push(&self, plan: &PushPlan) -> Result<Box<dyn Pushing>> {
        let mut inner = self.0.inner.lock();
        let fail = inner.enter("push")?;
        let sizes = plan.disks.iter().map(|d| inner.disks.get(&d.disk));
        let sizes = sizes.map(|d| d.map(|d| d.data.len() as u64));
        let sizes: Option<Vec<u64>> = sizes.collect();
        let sizes = sizes.ok_or_else(|| Error::new(Kind::NotFound, "no such disk"))?;
        if let Some(error) = fail {
            return Err(error);
        }
        if let Some(new) = &plan.checkpoint {
            inner.create(new)?;
        }
        let state = Arc::new(Mutex::new(JobState::Running));
        inner.pushes.push((plan.id, Arc::clone(&state)));
        inner.running += 1;
        Ok(Box::new(SimPush {
            sim: self.clone(),
            state,
            sizes,
            ends: inner.ends,
            gone: AtomicBool::new(false),
        }))
    }

    fn listen(&self, listener: Listener) {
        *self.0.listener.lock() = Some(listener);
    }

    fn close(&self) -> Result<()> {
        self.0.inner.lock().enter("close").map(drop)
    }
}
