//! The life cycles over a simulated domain: which changes are listed, what is refused, what is left
//! behind. Nothing here mounts anything.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::BTreeMap;
use std::sync::Arc;

use fleecefs::backend::sim::{GRANULE, Sim};
use fleecefs::engine::{DiskStatus, Domain, Options, Store};
use fleecefs::model::{Change, Kind, Name};
use proptest::prelude::*;

fn name(text: &str) -> Name {
    Name::new(text).unwrap()
}

struct Fixture {
    sim: Sim,
    dir: tempfile::TempDir,
    domain: Option<Domain>,
}

impl Fixture {
    fn new(disks: &[(&str, usize)]) -> Self {
        let mut fixture = Self {
            sim: Sim::new(disks),
            dir: tempfile::tempdir().unwrap(),
            domain: None,
        };
        fixture.reopen();
        fixture
    }

    /// What a restart of fleecefs does; the lock must be free first.
    fn reopen(&mut self) {
        self.domain = None;
        let store = Store::open(self.dir.path()).unwrap();
        let domain = Domain::open(Arc::new(self.sim.clone()), store, Options::default());
        self.domain = Some(domain.unwrap());
    }

    fn domain(&self) -> &Domain {
        self.domain.as_ref().unwrap()
    }

    fn mkdir_checkpoint(&self, text: &str) {
        self.domain().create_checkpoint(name(text)).unwrap();
    }

    /// Granules of `vda` that a backup called `backup` lists as changed since `checkpoint`.
    fn changed(&self, backup: &str, checkpoint: &str) -> Vec<usize> {
        let backup = self.domain().backup(backup).unwrap();
        let since = backup
            .since()
            .iter()
            .find(|s| s.name.as_str() == checkpoint);
        let map = backup.changes(0, since.unwrap().id).unwrap();
        map.iter()
            .filter(|e| e.kind != Change::Clean)
            .flat_map(|e| e.offset / GRANULE as u64..e.end() / GRANULE as u64)
            .map(|g| g as usize)
            .collect()
    }

    fn write(&self, granule: usize) {
        self.sim.write("vda", granule * GRANULE, &[7; GRANULE]);
    }

    fn bitmaps(&self) -> Vec<(String, bool)> {
        self.sim.disk("vda", |d| {
            d.bitmaps.iter().map(|(n, b)| (n.clone(), b.0)).collect()
        })
    }
}

#[test]
fn one_bitmap_records_at_a_time_and_since_is_the_union() {
    let f = Fixture::new(&[("vda", 16 * GRANULE)]);
    f.write(0);
    f.mkdir_checkpoint("mon");
    f.write(1);
    f.mkdir_checkpoint("tue");
    f.write(2);
    let backup = f.domain().begin_backup(name("wed")).unwrap();
    f.write(3);
    assert_eq!(
        f.bitmaps(),
        [
            ("mon".into(), false),
            ("tue".into(), false),
            ("wed".into(), true)
        ]
    );
    assert_eq!(f.changed("wed", "mon"), [1, 2]);
    assert_eq!(f.changed("wed", "tue"), [2]);
    assert_eq!(backup.base().unwrap().name.as_str(), "tue");
    assert_eq!(backup.checkpoint(), Some(&name("wed")));
    assert_eq!(backup.since().len(), 2, "not since itself");
    f.domain().end_backup(&name("wed")).unwrap();
    assert_eq!(f.sim.running(), 0);
}

#[test]
fn an_existing_checkpoint_of_the_name_is_used() {
    let f = Fixture::new(&[("vda", 16 * GRANULE)]);
    f.mkdir_checkpoint("mon");
    f.write(1);
    f.mkdir_checkpoint("tue");
    f.write(2); // between the checkpoint and the backup of the same name
    let backup = f.domain().begin_backup(name("tue")).unwrap();
    f.write(3); // after the instant: recorded by tue, but not part of this backup
    assert_eq!(f.bitmaps(), [("mon".into(), false), ("tue".into(), true)]);
    assert_eq!(backup.base().unwrap().name.as_str(), "mon");
    assert_eq!(f.changed("tue", "mon"), [1, 2]);
    assert_eq!(f.changed("tue", "tue"), [2]);
    f.domain().end_backup(&name("tue")).unwrap();
    // What the backup missed is listed by the next one.
    f.domain().begin_backup(name("wed")).unwrap();
    assert_eq!(f.changed("wed", "tue"), [2, 3]);
}

#[test]
fn without_a_base_everything_counts_as_changed() {
    let f = Fixture::new(&[("vda", 4 * GRANULE)]);
    f.write(1);
    let backup = f.domain().begin_backup(name("first")).unwrap();
    let map = backup.changes_since_base(0).unwrap();
    let kinds: Vec<Change> = map.iter().map(|e| e.kind).collect();
    assert_eq!(kinds, [Change::DirtyZero, Change::Dirty, Change::DirtyZero]);
}

#[test]
fn maps_are_made_once() {
    let f = Fixture::new(&[("vda", 4 * GRANULE)]);
    f.mkdir_checkpoint("mon");
    let backup = f.domain().begin_backup(name("tue")).unwrap();
    for _ in 0..3 {
        f.changed("tue", "mon");
        backup.allocation(0).unwrap();
        backup.changes_since_base(0).unwrap();
    }
    let calls = f.sim.calls();
    assert_eq!(calls.iter().filter(|c| *c == "changed").count(), 1);
    assert_eq!(calls.iter().filter(|c| *c == "allocation").count(), 1);
    // Zeros are answered without asking.
    let mut buf = vec![1; 4 * GRANULE];
    assert_eq!(backup.read_at(0, 0, &mut buf).unwrap(), buf.len());
    assert_eq!(buf, vec![0; 4 * GRANULE]);
    assert!(!f.sim.calls().contains(&"read_at".to_string()));
}

#[test]
fn a_checkpoint_that_a_backup_lists_is_busy() {
    let f = Fixture::new(&[("vda", 4 * GRANULE)]);
    for checkpoint in ["mon", "tue"] {
        f.mkdir_checkpoint(checkpoint);
    }
    f.domain().begin_backup(name("wed")).unwrap();
    f.mkdir_checkpoint("thu");
    for (checkpoint, free) in [("mon", false), ("tue", false), ("thu", true)] {
        let outcome = f.domain().delete_checkpoint(&name(checkpoint));
        match outcome {
            Ok(()) => assert!(free, "{checkpoint}"),
            Err(e) => assert!(!free && e.kind() == Kind::Busy, "{checkpoint}: {e}"),
        }
    }
    f.domain().end_backup(&name("wed")).unwrap();
    f.domain().delete_checkpoint(&name("mon")).unwrap();
}

/// Every way in which a history breaks: the checkpoints before it are ESTALE for good, also after
/// the evidence is gone.
#[test]
fn broken_history_stays_broken() {
    type Break = fn(&Sim);
    let breaks: [(&str, Break); 4] = [
        ("bitmap removed", |s| {
            s.disk("vda", |d| drop(d.bitmaps.remove("tue")));
        }),
        ("bitmap switched off", |s| {
            s.disk("vda", |d| d.bitmaps.get_mut("tue").unwrap().0 = false);
        }),
        ("inconsistent", |s| {
            s.disk("vda", |d| d.inconsistent = vec!["mon".into(), "tue".into()]);
        }),
        ("resized", |s| {
            s.disk("vda", |d| {
                d.data.resize(8 * GRANULE, 0);
                for b in d.bitmaps.values_mut() {
                    b.1.resize(8, false);
                }
            });
        }),
    ];
    for (what, break_it) in breaks {
        let mut f = Fixture::new(&[("vda", 4 * GRANULE), ("vdb", 4 * GRANULE)]);
        f.mkdir_checkpoint("mon");
        f.mkdir_checkpoint("tue");
        break_it(&f.sim);
        f.write(1); // perhaps recorded by nobody

        // The next backup: nothing is known on vda, all is known on vdb.
        let backup = f.domain().begin_backup(name("wed")).unwrap();
        assert_eq!(
            backup.changes_since_base(0).unwrap_err().kind(),
            Kind::Stale,
            "{what}"
        );
        assert!(backup.changes_since_base(1).is_ok(), "{what}");
        f.domain().end_backup(&name("wed")).unwrap();

        // Deleting the broken link must not make the one before it look sound.
        f.domain().delete_checkpoint(&name("tue")).unwrap();
        f.reopen();
        let backup = f.domain().begin_backup(name("thu")).unwrap();
        let mon = backup
            .since()
            .iter()
            .find(|s| s.name.as_str() == "mon")
            .unwrap();
        assert_eq!(
            backup.changes(0, mon.id).unwrap_err().kind(),
            Kind::Stale,
            "{what}"
        );
        assert!(backup.changes(1, mon.id).is_ok(), "{what}");
        // From wed on the history is whole again.
        assert_eq!(f.changed("thu", "wed"), Vec::<usize>::new(), "{what}");
        let mon = f.domain().checkpoint("mon").unwrap().id;
        let status = f.domain().checkpoint_status(mon).unwrap();
        let DiskStatus::Broken { why, .. } = &status.disks[0] else {
            panic!("{what}: {status:?}");
        };
        assert_eq!(why.matches("checkpoint ").count(), 1, "said once: {why}");
        assert!(
            matches!(status.disks[1], DiskStatus::Trusted { .. }),
            "{what}"
        );
    }
}

#[test]
fn a_failed_change_leaves_nothing() {
    let mut f = Fixture::new(&[("vda", 4 * GRANULE)]);
    f.mkdir_checkpoint("mon");
    let before = f.bitmaps();
    for late in [false, true] {
        for method in ["create_checkpoint", "begin"] {
            if late {
                f.sim.fail_after_next(method, Kind::TimedOut);
            } else {
                f.sim.fail_next(method, Kind::Io);
            }
            let failed = match method {
                "begin" => f.domain().begin_backup(name("tue")).map(drop),
                _ => f.domain().create_checkpoint(name("tue")),
            };
            assert!(failed.is_err(), "{method} late={late}");
            assert_eq!(f.bitmaps(), before, "{method} late={late}");
            assert!(f.domain().checkpoint("tue").is_none());
            assert!(f.domain().backup("tue").is_none());
        }
    }
    // A deletion whose answer was lost did happen.
    f.sim.fail_after_next("delete_checkpoint", Kind::TimedOut);
    assert!(f.domain().delete_checkpoint(&name("mon")).is_err());
    assert!(f.domain().checkpoint("mon").is_none());
    // And one that failed did not.
    f.mkdir_checkpoint("tue");
    f.sim.fail_next("delete_checkpoint", Kind::Io);
    assert!(f.domain().delete_checkpoint(&name("tue")).is_err());
    f.reopen();
    assert!(f.domain().checkpoint("tue").is_some());
}

/// The domain stops answering in the middle and comes back later, or fleecefs is killed.
#[test]
fn an_interrupted_change_is_undone_later() {
    for killed in [false, true] {
        let mut f = Fixture::new(&[("vda", 4 * GRANULE)]);
        f.mkdir_checkpoint("mon");
        f.write(1);
        f.sim.hang_at("create_checkpoint");
        let error = f.domain().create_checkpoint(name("tue")).unwrap_err();
        assert_eq!(error.kind(), Kind::TimedOut);
        f.sim.revive();
        f.write(2);
        if killed {
            f.reopen();
        }
        f.domain().begin_backup(name("wed")).unwrap();
        assert_eq!(f.changed("wed", "mon"), [1, 2], "killed={killed}");
        assert!(f.domain().checkpoint("tue").is_none());
    }
}

#[test]
fn refusals() {
    let f = Fixture::new(&[("vda", 4 * GRANULE), ("vdb", 0)]);
    let error = f.domain().begin_backup(name("x")).err().unwrap();
    assert_eq!(error.kind(), Kind::Unsupported);
    assert!(error.to_string().contains("vdb has 0 bytes"), "{error}");

    let f = Fixture::new(&[]);
    assert_eq!(
        f.domain().begin_backup(name("x")).err().unwrap().kind(),
        Kind::Unsupported
    );

    let f = Fixture::new(&[("vda", 4 * GRANULE)]);
    f.sim
        .disk("vda", |d| d.no_checkpoint = Some("format raw".into()));
    let error = f.domain().create_checkpoint(name("x")).unwrap_err();
    assert_eq!(error.kind(), Kind::Unsupported);
    assert!(error.to_string().contains("vda: format raw"), "{error}");
    // It can still be backed up, without a checkpoint.
    let backup = f.domain().begin_backup(name("x")).unwrap();
    assert_eq!(backup.checkpoint(), None);
    assert_eq!(
        f.domain().begin_backup(name("x")).err().unwrap().kind(),
        Kind::Exists
    );

    // A second mount of the same domain.
    let error = Store::open(f.dir.path()).unwrap_err();
    assert_eq!(error.kind(), Kind::Busy);
}

#[test]
fn creation_times_rise_by_whole_seconds() {
    let mut f = Fixture::new(&[("vda", 4 * GRANULE)]);
    for i in 0..5 {
        f.mkdir_checkpoint(&format!("c{i}"));
        f.reopen();
    }
    let times: Vec<_> = f
        .domain()
        .checkpoints()
        .iter()
        .map(|c| c.checkpoint.created)
        .collect();
    assert!(
        times
            .windows(2)
            .all(|w| w[1] >= w[0] + std::time::Duration::from_secs(1))
    );
}

/// Any order of writes, checkpoints, deletions and restarts: what a backup lists since a checkpoint
/// is exactly what was written since.
#[derive(Debug, Clone)]
enum Step {
    Write(usize),
    Checkpoint(usize),
    Delete(usize),
    Backup(usize),
    Reopen,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        4 => (0usize..8).prop_map(Step::Write),
        3 => (0usize..6).prop_map(Step::Checkpoint),
        2 => (0usize..6).prop_map(Step::Delete),
        2 => (0usize..6).prop_map(Step::Backup),
        1 => Just(Step::Reopen),
    ];
    proptest::collection::vec(step, 1..40)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    #[test]
    fn since_is_exact(steps in steps()) {
        let mut f = Fixture::new(&[("vda", 8 * GRANULE)]);
        // The model: what was written since each checkpoint.
        let mut written: BTreeMap<String, Vec<usize>> = BTreeMap::new();
        for step in steps {
            match step {
                Step::Write(granule) => {
                    f.write(granule);
                    for list in written.values_mut() {
                        if !list.contains(&granule) {
                            list.push(granule);
                            list.sort_unstable();
                        }
                    }
                }
                Step::Checkpoint(i) => {
                    let text = format!("c{i}");
                    let made = f.domain().create_checkpoint(name(&text));
                    prop_assert_eq!(made.is_ok(), !written.contains_key(&text));
                    written.entry(text).or_default();
                }
                Step::Delete(i) => {
                    let text = format!("c{i}");
                    let deleted = f.domain().delete_checkpoint(&name(&text));
                    prop_assert_eq!(deleted.is_ok(), written.remove(&text).is_some());
                }
                Step::Backup(i) => {
                    let text = format!("c{i}");
                    let backup = f.domain().begin_backup(name(&text)).unwrap();
                    prop_assert_eq!(backup.since().len(), written.len());
                    for (checkpoint, list) in &written {
                        prop_assert_eq!(&f.changed(&text, checkpoint), list);
                    }
                    f.domain().end_backup(&name(&text)).unwrap();
                    written.entry(text).or_default();
                }
                Step::Reopen => f.reopen(),
            }
        }
        prop_assert!(f.bitmaps().iter().filter(|b| b.1).count() <= 1);
        prop_assert_eq!(f.bitmaps().len(), written.len());
    }
}
