//! Backups of a simulated domain.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use parking_lot::Mutex;

use super::{GRANULE, Sim, ended, finish, union};
use crate::backend::{Frozen, FrozenDisk, Progress, Pushing};
use crate::model::{Allocation, Control, Error, Extents, JobState, Kind, Outcome, Result};

pub(super) struct SimPush {
    pub(super) sim: Sim,
    pub(super) state: Arc<Mutex<JobState>>,
    pub(super) sizes: Vec<u64>,
    /// How often the domain had ended when this began.
    pub(super) ends: usize,
    pub(super) gone: AtomicBool,
}

impl Pushing for SimPush {
    fn progress(&self) -> Vec<Progress> {
        let state = self.state.lock().clone();
        let done = |size: &u64| match state {
            JobState::Ended(Outcome::Completed) => *size,
            _ => 0,
        };
        let progress = |size: &u64| Progress {
            state: state.clone(),
            done: done(size),
            total: *size,
        };
        self.sizes.iter().map(progress).collect()
    }

    fn state(&self) -> JobState {
        self.state.lock().clone()
    }

    fn control(&self, command: Control) -> Result<()> {
        self.sim.0.inner.lock().enter("control")?;
        let word = self.state().word();
        if !matches!(self.state(), JobState::Running | JobState::Paused) {
            return Err(Error::new(
                Kind::Invalid,
                format!("it is over already: {word}"),
            ));
        }
        match command {
            Control::Abort => return self.end(),
            Control::Pause => *self.state.lock() = JobState::Paused,
            Control::Resume => *self.state.lock() = JobState::Running,
            Control::Speed(_) => {}
        }
        Ok(())
    }

    fn end(&self) -> Result<()> {
        let mut inner = self.sim.0.inner.lock();
        if inner.off {
            return Ok(());
        }
        let fail = inner.enter("end")?;
        if !self.gone.swap(true, Ordering::AcqRel) && self.ends == inner.ends {
            inner.running -= 1;
        }
        let mut state = self.state.lock();
        if matches!(*state, JobState::Running | JobState::Paused) {
            *state = JobState::Ended(Outcome::Aborted);
        }
        finish(fail, ())
    }
}

pub(super) struct SimFrozen {
    pub(super) sim: Sim,
    pub(super) disks: Vec<Box<dyn FrozenDisk>>,
    pub(super) fate: Arc<OnceLock<Error>>,
}

impl Frozen for SimFrozen {
    fn disks(&self) -> &[Box<dyn FrozenDisk>] {
        &self.disks
    }

    fn failure(&self) -> Option<Error> {
        self.fate.get().cloned()
    }

    fn scratch_used(&self) -> u64 {
        0
    }

    fn scratch_limit(&self) -> Option<u64> {
        None
    }

    fn end(&self) -> Result<()> {
        let mut inner = self.sim.0.inner.lock();
        if inner.off {
            // With the domain went all that it had.
            return Ok(());
        }
        let fail = inner.enter("end")?;
        if self.fate.set(ended()).is_ok() {
            inner.running -= 1;
        }
        inner
            .pulls
            .retain(|(_, fate)| !Arc::ptr_eq(fate, &self.fate));
        self.sim.0.bell.notify_all();
        finish(fail, ())
    }
}

pub(super) struct SimFrozenDisk {
    pub(super) sim: Sim,
    pub(super) target: String,
    pub(super) data: Vec<u8>,
    pub(super) recorded: Option<Vec<bool>>,
    pub(super) pulled: AtomicU64,
    pub(super) fate: Arc<OnceLock<Error>>,
}

impl FrozenDisk for SimFrozenDisk {
    fn size(&self) -> u64 {
        self.data.len() as u64
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.sim.wait_while_held("read_at", &self.fate);
        let fail = self.sim.0.inner.lock().enter("read_at")?;
        if let Some(why) = self.fate.get() {
            return Err(why.clone());
        }
        let start = offset as usize;
        buf.copy_from_slice(&self.data[start..start + buf.len()]);
        self.pulled.fetch_add(buf.len() as u64, Ordering::Relaxed);
        finish(fail, ())
    }

    fn allocation(&self, part: Range<u64>) -> Result<Extents<Allocation>> {
        self.sim.wait_while_held("allocation", &self.fate);
        let fail = self.sim.0.inner.lock().enter("allocation")?;
        let mut map = Extents::new();
        let part = &self.data[part.start as usize..part.end as usize];
        for granule in part.chunks(GRANULE) {
            let zero = granule.iter().all(|b| *b == 0);
            let kind = if zero {
                Allocation::HOLE
            } else {
                Allocation::DATA
            };
            map.push(granule.len() as u64, kind);
        }
        finish(fail, map)
    }

    fn changed(&self, bitmaps: &[String]) -> Result<Extents<bool>> {
        let mut inner = self.sim.0.inner.lock();
        let fail = inner.enter("changed")?;
        let granules = self.data.len().div_ceil(GRANULE);
        let mut dirty = self
            .recorded
            .clone()
            .unwrap_or_else(|| vec![false; granules]);
        let disk = inner.disks.get(&self.target);
        for name in bitmaps {
            match disk.and_then(|d| d.bitmaps.get(name)) {
                Some(bitmap) => union(&mut dirty, &bitmap.1),
                None => return Err(Error::new(Kind::Stale, format!("bitmap {name} is gone"))),
            }
        }
        let mut map = Extents::new();
        for (granule, d) in self.data.chunks(GRANULE).zip(dirty) {
            map.push(granule.len() as u64, d);
        }
        finish(fail, map)
    }

    fn bytes_pulled(&self) -> u64 {
        self.pulled.load(Ordering::Relaxed)
    }
}
