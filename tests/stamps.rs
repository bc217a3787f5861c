//! Stamps of slices tell the truth, whatever happens to history: wherever two backups show other
//! content, they show another stamp. Over a simulated domain; nothing here mounts anything.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::sync::Arc;

use fleecefs::backend::sim::{GRANULE, Sim};
use fleecefs::engine::{Backup, Domain, Options, Store};
use fleecefs::model::{Kind, Name};
use proptest::prelude::*;

const SLICE: usize = 4 * GRANULE;
const SLICES: usize = 8;

fn name(text: &str) -> Name {
    Name::new(text).unwrap()
}

/// What a backup showed: the disk, and a stamp for each slice.
struct Seen {
    what: String,
    content: Vec<u8>,
    stamps: Vec<u64>,
}

struct World {
    sim: Sim,
    dir: tempfile::TempDir,
    domain: Option<Domain>,
    options: Options,
    seen: Vec<Seen>,
    next: usize,
}

impl World {
    fn new() -> Self {
        let mut world = Self {
            sim: Sim::new(&[("vda", SLICES * SLICE)]),
            dir: tempfile::tempdir().unwrap(),
            domain: None,
            options: Options {
                slice_size: SLICE as u64,
                ..Options::default()
            },
            seen: Vec::new(),
            next: 0,
        };
        world.reopen();
        world
    }

    fn reopen(&mut self) {
        if let Some(domain) = self.domain.take() {
            domain.close().unwrap();
        }
        let store = Store::open(self.dir.path()).unwrap();
        let domain = Domain::open(Arc::new(self.sim.clone()), store, self.options.clone());
        self.domain = Some(domain.unwrap());
    }

    fn domain(&self) -> &Domain {
        self.domain.as_ref().unwrap()
    }

    fn fresh(&mut self, letter: &str) -> Name {
        self.next += 1;
        name(&format!("{letter}{}", self.next))
    }

    /// Looks at the stamps of a backup, and holds them against all that were seen before.
    fn look(&mut self, backup: &Backup) -> usize {
        let map = backup.stamps(0).unwrap();
        let stamps: Vec<u64> = (0..map.size().div_ceil(SLICE as u64))
            .map(|k| {
                let kinds: Vec<_> = map.clip(k * SLICE as u64, SLICE as u64).collect();
                assert_eq!(kinds.len(), 1, "one stamp a slice");
                kinds[0].kind
            })
            .collect();
        let mut content = vec![0; map.size() as usize];
        assert_eq!(backup.read_at(0, 0, &mut content).unwrap(), content.len());
        let what = backup.name().to_string();
        let slice = |content: &[u8], k: usize| {
            let end = ((k + 1) * SLICE).min(content.len());
            content.get(k * SLICE..end).map(<[u8]>::to_vec)
        };
        for before in &self.seen {
            for (k, stamp) in stamps.iter().enumerate() {
                let same = before.stamps.get(k) == Some(stamp);
                if same && slice(&before.content, k) != slice(&content, k) {
                    panic!(
                        "slice {k} of {what} changed since {}, and both are stamped {stamp}",
                        before.what
                    );
                }
            }
        }
        let changed = match self.seen.last() {
            Some(last) => stamps
                .iter()
                .zip(&last.stamps)
                .filter(|(a, b)| a != b)
                .count(),
            None => stamps.len(),
        };
        self.seen.push(Seen {
            what,
            content,
            stamps,
        });
        changed
    }

    /// A backup of now, and how many slices look changed since the last one looked at.
    fn backup(&mut self) -> usize {
        let own = self.fresh("b");
        let backup = self.domain().begin_backup(own.clone()).unwrap();
        let changed = self.look(&backup);
        self.domain().end_backup(&own).unwrap();
        changed
    }

    fn write(&self, slice: usize, byte: u8) {
        self.sim.write("vda", slice * SLICE + GRANULE, &[byte; 16]);
    }

    fn table(&self) -> std::path::PathBuf {
        self.dir.path().join("slices-vda.json")
    }
}

#[test]
fn only_what_changed_looks_changed() {
    let mut world = World::new();
    assert_eq!(world.backup(), SLICES);
    assert_eq!(world.backup(), 0);
    world.write(3, 1);
    assert_eq!(world.backup(), 1);
    world.reopen();
    assert_eq!(world.backup(), 0, "remounted");
    world.write(3, 2);
    world.write(5, 2);
    // One that nobody looks at moves no stamp.
    world.domain().begin_backup(name("unseen")).unwrap();
    world.domain().end_backup(&name("unseen")).unwrap();
    world.write(6, 2);
    assert_eq!(world.backup(), 3);
    // A table that is lost, and one that is damaged, are worked out again from the bitmaps.
    for damage in ["", "{", "{\"version\":1}", "null"] {
        match damage {
            "" => std::fs::remove_file(world.table()).unwrap(),
            text => std::fs::write(world.table(), text).unwrap(),
        }
        let changed = world.backup();
        assert!(changed <= 2, "{damage:?}: {changed} slices look changed");
        assert_eq!(world.backup(), 0, "{damage:?}");
    }
    // Asked once a backup, however often it is looked at.
    let backup = world.domain().begin_backup(name("calls")).unwrap();
    world.look(&backup);
    let calls = world.sim.calls().len();
    backup.stamps(0).unwrap();
    assert_eq!(world.sim.calls().len(), calls);
}

#[test]
fn what_breaks_history_makes_all_look_changed() {
    for what in [
        "inconsistent",
        "switched off",
        "slice size",
        "resized",
        "forgotten",
        "bitmap gone",
    ] {
        let mut world = World::new();
        world.backup();
        world.write(1, 1);
        assert_eq!(world.backup(), 1);
        let newest = world
            .domain()
            .current_checkpoint()
            .unwrap()
            .checkpoint
            .name
            .to_string();
        match what {
            "inconsistent" => world.sim.disk("vda", |d| d.inconsistent.push(newest)),
            "switched off" => world
                .sim
                .disk("vda", |d| d.bitmaps.get_mut(&newest).unwrap().0 = false),
            "bitmap gone" => drop(world.sim.disk("vda", |d| d.bitmaps.remove(&newest))),
            "forgotten" => world.domain().forget_checkpoint(&name(&newest)).unwrap(),
            "slice size" => {
                world.options.slice_size *= 2;
                world.reopen();
                let backup = world.domain().begin_backup(name("other")).unwrap();
                let cut = backup.cut(0).unwrap();
                assert_eq!(
                    (cut.slice, cut.count()),
                    (SLICE as u64 * 2, SLICES as u64 / 2)
                );
                let before = world
                    .seen
                    .last()
                    .unwrap()
                    .stamps
                    .iter()
                    .max()
                    .copied()
                    .unwrap();
                assert!(backup.stamps(0).unwrap().iter().all(|e| e.kind <= before));
                continue;
            }
            _ => world.sim.disk("vda", |d| {
                d.data.resize(SLICES * SLICE + GRANULE, 0);
                let granules = d.data.len() / GRANULE;
                d.bitmaps
                    .values_mut()
                    .for_each(|b| b.1.resize(granules, false));
            }),
        }
        // Unseen by any bitmap that counts.
        world.write(2, 9);
        let changed = world.backup();
        assert!(changed >= SLICES, "{what}: {changed}");
        assert_eq!(world.backup(), 0, "{what}: history begins anew");
    }
}

/// The clock goes back a day; the state of the last second is remembered across a remount.
#[test]
fn stamps_rise_though_the_clock_does_not() {
    let mut world = World::new();
    world.backup();
    let record = world.dir.path().join("checkpoints.json");
    // As after a clock that was a day ahead.
    let text = std::fs::read_to_string(&record).unwrap();
    let mut json: serde_json::Value = serde_json::from_str(&text).unwrap();
    let ahead = json["last_created"]["secs_since_epoch"].as_u64().unwrap() + 86_400;
    json["last_created"]["secs_since_epoch"] = ahead.into();
    world.domain.take().unwrap().close().unwrap();
    std::fs::write(&record, json.to_string()).unwrap();
    world.reopen();
    for round in 1..4 {
        world.write(0, round);
        assert_eq!(world.backup(), 1);
        let newest = *world.seen.last().unwrap().stamps.iter().max().unwrap();
        assert_eq!(newest, ahead + u64::from(round));
    }
    // Without a checkpoint of its own, too.
    world.options.checkpoint = false;
    world.reopen();
    for round in 4..7 {
        world.write(0, round);
        world.backup();
        let newest = *world.seen.last().unwrap().stamps.iter().max().unwrap();
        assert_eq!(newest, ahead + u64::from(round));
    }
}

/// Two at once: the later one looks first, and leaves a table that is no use to the earlier one.
#[test]
fn a_later_backups_table_is_no_use_to_an_earlier_one() {
    let mut world = World::new();
    world.backup();
    let early = world.domain().begin_backup(name("early")).unwrap();
    world.write(4, 4);
    let late = world.domain().begin_backup(name("late")).unwrap();
    world.look(&late);
    world.look(&early);
    // And does not overwrite it.
    let table = std::fs::read_to_string(world.table()).unwrap();
    world.domain().end_backup(&name("early")).unwrap();
    world.domain().end_backup(&name("late")).unwrap();
    assert_eq!(table, std::fs::read_to_string(world.table()).unwrap());
}

#[derive(Debug, Clone)]
enum Step {
    Write(usize, u8),
    Checkpoint,
    Backup,
    BackupUnseen,
    Begin,
    LookAt(usize),
    End(usize),
    Delete(usize),
    Rename(usize),
    Forget(usize),
    Break(usize),
    Remount,
    LoseTable,
    OldTable,
    CheckpointsOff(bool),
    OwnCheckpoint,
}

fn step() -> impl Strategy<Value = Step> {
    use Step::*;
    prop_oneof![
        6 => (0..SLICES, any::<u8>()).prop_map(|(slice, byte)| Write(slice, byte)),
        1 => Just(Checkpoint),
        4 => Just(Backup),
        1 => Just(BackupUnseen),
        2 => Just(Begin),
        2 => any::<usize>().prop_map(LookAt),
        2 => any::<usize>().prop_map(End),
        2 => any::<usize>().prop_map(Delete),
        1 => any::<usize>().prop_map(Rename),
        1 => any::<usize>().prop_map(Forget),
        1 => any::<usize>().prop_map(Break),
        1 => Just(Remount),
        1 => Just(LoseTable),
        1 => Just(OldTable),
        1 => any::<bool>().prop_map(CheckpointsOff),
        1 => Just(OwnCheckpoint),
    ]
}

fn run(world: &mut World, steps: Vec<Step>) {
    let mut running: Vec<Arc<Backup>> = Vec::new();
    let mut kept = None;
    for step in steps {
        let pick = |i: usize, n: usize| (n > 0).then(|| i % n);
        let checkpoints = world.domain().checkpoints();
        let checkpoint =
            |i| pick(i, checkpoints.len()).map(|i| checkpoints[i].checkpoint.name.clone());
        let may_be_refused = |done: fleecefs::model::Result<()>| match done {
            Err(e) if matches!(e.kind(), Kind::Busy | Kind::Stale) => {}
            done => done.unwrap(),
        };
        match step {
            Step::Write(slice, byte) => world.write(slice, byte),
            Step::Checkpoint => {
                let own = world.fresh("c");
                world.domain().create_checkpoint(own).unwrap();
            }
            Step::Backup => drop(world.backup()),
            Step::BackupUnseen => {
                let own = world.fresh("u");
                world.domain().begin_backup(own.clone()).unwrap();
                world.domain().end_backup(&own).unwrap();
            }
            Step::Begin if running.len() < 3 => {
                let own = world.fresh("r");
                running.push(world.domain().begin_backup(own).unwrap());
            }
            Step::LookAt(i) => {
                if let Some(i) = pick(i, running.len()) {
                    world.look(&running[i]);
                }
            }
            Step::End(i) => {
                if let Some(i) = pick(i, running.len()) {
                    let backup = running.remove(i);
                    world.domain().end_backup(backup.name()).unwrap();
                }
            }
            Step::Delete(i) => {
                if let Some(name) = checkpoint(i) {
                    may_be_refused(world.domain().delete_checkpoint(&name));
                }
            }
            Step::Rename(i) => {
                let to = world.fresh("n");
                if let Some(name) = checkpoint(i) {
                    may_be_refused(world.domain().rename_checkpoint(&name, &to));
                }
            }
            Step::Forget(i) => {
                if let Some(name) = checkpoint(i) {
                    may_be_refused(world.domain().forget_checkpoint(&name));
                }
            }
            Step::Break(i) => world.sim.disk("vda", |disk| {
                let names: Vec<String> = disk.bitmaps.keys().cloned().collect();
                // One in use cannot be touched, in a real QEMU.
                if let (Some(i), true) = (pick(i, names.len()), running.is_empty()) {
                    disk.inconsistent.push(names[i].clone());
                    disk.bitmaps.get_mut(&names[i]).unwrap().0 = false;
                }
            }),
            Step::Remount => {
                running.clear();
                world.reopen();
            }
            Step::LoseTable => {
                kept = std::fs::read(world.table()).ok().or(kept);
                let _ = std::fs::remove_file(world.table());
            }
            // As when a state directory was restored from a backup of its own.
            Step::OldTable => {
                if let Some(table) = &kept {
                    std::fs::write(world.table(), table).unwrap();
                }
            }
            Step::CheckpointsOff(off) => {
                running.clear();
                world.options.checkpoint = !off;
                world.reopen();
            }
            // mkdir checkpoints/x, writes, mkdir backups/x
            Step::OwnCheckpoint => {
                let own = world.fresh("o");
                world.domain().create_checkpoint(own.clone()).unwrap();
                world.write(7, world.next as u8);
                let backup = world.domain().begin_backup(own.clone()).unwrap();
                world.look(&backup);
                world.domain().end_backup(&own).unwrap();
            }
            Step::Begin => {}
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn whatever_happens_no_change_is_hidden(steps in proptest::collection::vec(step(), 1..50)) {
        run(&mut World::new(), steps);
    }
}
