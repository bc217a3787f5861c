//! Checkpoints that somebody else keeps, over a simulated domain: the keeper may change them at any moment.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::sync::Arc;
use std::time::Duration;

use fleecefs::backend::sim::{GRANULE, Sim};
use fleecefs::backend::{Backend, Frozen, Listener, Pushing};
use fleecefs::engine::{Domain, Options, Store};
use fleecefs::model::{
    BackupPlan, Checkpoint, CheckpointDisk, CheckpointRemoval, Disk, DomainInfo, Kind, Name,
    NewCheckpoint, PushPlan, RenameBitmap, Result,
};
use parking_lot::Mutex;

const SECOND: Duration = Duration::from_secs(1);

/// A domain with a management of its own.
struct Keeper {
    sim: Sim,
    all: Mutex<Vec<Checkpoint>>,
    /// The checkpoint that somebody makes anew while the next backup begins.
    anew: Mutex<Option<&'static str>>,
}

impl Keeper {
    fn add(&self, new: &NewCheckpoint) {
        let disk = |b: &fleecefs::model::NewBitmap| CheckpointDisk {
            target: b.target.clone(),
            bitmap: b.bitmap.clone(),
            size: 16 * GRANULE as u64,
            image: None,
            broken: None,
        };
        let mut all = self.all.lock();
        let parent = all.last().map(|c| c.name.clone());
        all.push(Checkpoint {
            name: new.name.clone(),
            created: new.created,
            parent,
            description: None,
            disks: new.bitmaps.iter().map(disk).collect(),
        });
    }

    fn meddle(&self) {
        let Some(name) = self.anew.lock().take() else {
            return;
        };
        let mut all = self.all.lock();
        let found = all.iter_mut().find(|c| c.name.as_str() == name);
        found.unwrap().created += SECOND;
    }
}

impl Backend for Keeper {
    fn info(&self) -> DomainInfo {
        self.sim.info()
    }

    fn tidy(&self) -> Result<()> {
        self.sim.tidy()
    }

    fn disks(&self) -> Result<Vec<Disk>> {
        self.sim.disks()
    }

    fn create_checkpoint(&self, new: &NewCheckpoint) -> Result<()> {
        self.sim.create_checkpoint(new)?;
        self.add(new);
        Ok(())
    }

    fn delete_checkpoint(&self, removal: &CheckpointRemoval) -> Result<()> {
        self.all.lock().retain(|c| c.name != removal.name);
        Ok(())
    }

    fn rename_checkpoint(&self, renames: &[RenameBitmap]) -> Result<()> {
        self.sim.rename_checkpoint(renames)
    }

    fn own_checkpoints(&self) -> Result<Option<Vec<Checkpoint>>> {
        Ok(Some(self.all.lock().clone()))
    }

    fn begin(&self, plan: &BackupPlan) -> Result<Box<dyn Frozen>> {
        self.meddle();
        let frozen = self.sim.begin(plan)?;
        plan.checkpoint.iter().for_each(|new| self.add(new));
        Ok(frozen)
    }

    fn push(&self, plan: &PushPlan) -> Result<Box<dyn Pushing>> {
        self.meddle();
        let pushing = self.sim.push(plan)?;
        plan.checkpoint.iter().for_each(|new| self.add(new));
        Ok(pushing)
    }

    fn listen(&self, listener: Listener) {
        self.sim.listen(listener);
    }

    fn close(&self) -> Result<()> {
        self.sim.close()
    }
}

#[test]
fn a_base_that_is_made_anew_while_a_backup_begins_refuses_it() {
    let sim = Sim::new(&[("vda", 16 * GRANULE)]);
    let keeper = Arc::new(Keeper {
        sim: sim.clone(),
        all: Mutex::default(),
        anew: Mutex::default(),
    });
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let domain = Domain::open(keeper.clone(), store, Options::default()).unwrap();
    let name = |text: &str| Name::new(text).unwrap();
    domain.create_checkpoint(name("mon")).unwrap();

    *keeper.anew.lock() = Some("mon");
    let refused = domain.begin_backup(name("tue")).err().unwrap();
    assert_eq!(refused.kind(), Kind::Busy);
    assert!(
        refused.message().contains("mon, or made it anew"),
        "{refused}"
    );
    // Nothing of it is left.
    assert!(domain.jobs().is_empty());
    assert_eq!(sim.running(), 0);
    let names: Vec<String> = keeper
        .all
        .lock()
        .iter()
        .map(|c| c.name.to_string())
        .collect();
    assert_eq!(names, ["mon"]);

    // The new one is a base like any other.
    sim.disk("vda", |d| drop(d.bitmaps.remove("tue")));
    domain.begin_backup(name("tue")).unwrap();
}
