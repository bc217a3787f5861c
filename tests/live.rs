//! Checkpoints and backups of a real QEMU, through the library: no mount. The guest is paused or
//! sits in its firmware; its writes are made for it, so that a model can be kept beside.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::time::Duration;

use common::domain::{content, fixture, name, open, places, since};
use common::tools::{self, need};
use common::{Disk, Fault, Marks, Qemu, QmpFault, Rng, image};
use fleecefs::backend::Source;
use fleecefs::engine::{Domain, Options, Store};
use fleecefs::model::{Change, Kind};

const MIB: u64 = 1 << 20;
const GRANULE: u64 = 65536;

/// A running backup: its name, the disk and the marks as they were.
type Running = (String, Disk, Vec<(String, Marks)>);

/// Random writes, checkpoints, deletions and overlapping backups against a model of the disk and
/// of what was written since each checkpoint.
#[test]
fn random_rounds() {
    need!("qemu-system-x86_64", "qemu-img");
    let mut rng = Rng::from_env();
    let size = 24 * MIB;
    let f = fixture(&[size]);
    let before = f.qemu.state();
    let mut disk = Disk::new(size);
    let mut marks: Vec<(String, Marks)> = Vec::new();
    let mut running: Vec<Running> = Vec::new();
    for round in 0..300 {
        match rng.within(0..10) {
            0..=5 => {
                let write = rng.write(size);
                f.qemu.write("vda", write);
                disk.apply(write);
                marks.iter_mut().for_each(|(_, m)| m.mark(write));
            }
            6 => {
                let checkpoint = format!("c{round}");
                f.domain.create_checkpoint(name(&checkpoint)).unwrap();
                marks.push((checkpoint, Marks::new(size, GRANULE)));
            }
            7 if !marks.is_empty() => {
                let at = rng.within(0..marks.len() as u64) as usize;
                match f.domain.delete_checkpoint(&name(&marks[at].0)) {
                    Ok(()) => drop(marks.remove(at)),
                    Err(e) => {
                        assert_eq!(e.kind(), Kind::Busy, "{e}");
                        assert!(!running.is_empty());
                    }
                }
            }
            8 if running.len() < 3 => {
                let backup = format!("b{round}");
                f.domain.begin_backup(name(&backup)).unwrap();
                running.push((backup.clone(), disk.clone(), marks.clone()));
                marks.push((backup, Marks::new(size, GRANULE)));
            }
            9 if !running.is_empty() => {
                let at = rng.within(0..running.len() as u64) as usize;
                let (backup, disk, marks) = running.remove(at);
                let backup = f.domain.backup(&backup).unwrap();
                disk.assert_is(&content(&backup, 0), &format!("round {round}"));
                assert_eq!(backup.since().len(), marks.len());
                for (checkpoint, marks) in &marks {
                    let found = since(&backup, 0, checkpoint);
                    assert_eq!(found, marks.extents(), "round {round}, since {checkpoint}");
                }
                f.domain.end_backup(backup.name()).unwrap();
            }
            _ => {}
        }
    }
    f.domain.close().unwrap();
    assert_eq!(f.qemu.state().without_bitmaps(), before.without_bitmaps());
}

/// Every command of a begin fails in turn, in three ways; nothing is left behind, and the next
/// backup works.
#[test]
fn a_begin_that_fails_at_any_step_leaves_nothing() {
    need!("qemu-system-x86_64", "qemu-img");
    let dir = tools::temp_dir();
    let path = dir.path().join("vda.qcow2");
    let other = dir.path().join("vdb.qcow2");
    image::create(&path, "qcow2", 4 * MIB, "");
    image::create(&other, "qcow2", 4 * MIB, "");
    let qemu = Qemu::build()
        .disk("vda", &path, "qcow2")
        .disk("vdb", &other, "qcow2")
        .paused()
        .start();
    let proxy = QmpFault::start(&qemu.socket());
    let domain = open(&proxy.path(), &places(dir.path()), dir.path());
    domain.create_checkpoint(name("mon")).unwrap();
    qemu.guest_write("vda", 0, 4096, 1);
    let before = qemu.state();
    let record = || std::fs::read_to_string(dir.path().join("state/checkpoints.json")).unwrap();
    let faults = [
        Fault::Refuse("refused by the test".into()),
        Fault::FailAfter("failed by the test".into()),
        Fault::Close,
    ];
    let mut steps = 0;
    for fault in faults {
        for step in 0.. {
            proxy.arm(step, fault.clone());
            let outcome = domain.begin_backup(name("tue"));
            let fired = proxy.fired();
            proxy.disarm();
            if !fired {
                // Past the last command: this one is whole.
                outcome.unwrap();
                domain.end_backup(&name("tue")).unwrap();
                domain.delete_checkpoint(&name("tue")).unwrap();
                steps = step;
                break;
            }
            if outcome.is_ok() {
                // A refusal of what does not matter, such as dismissing a job twice.
                domain.end_backup(&name("tue")).unwrap();
                domain.delete_checkpoint(&name("tue")).unwrap();
            }
            let what = format!("{fault:?} at step {step}");
            assert_eq!(qemu.state(), before, "{what}");
            assert!(!qemu.nbd_server_running(), "{what}");
            assert!(domain.checkpoint("tue").is_none(), "{what}");
            assert!(!record().contains("pending"), "{what}");
            let scratch = std::fs::read_dir(dir.path().join("scratch"));
            assert!(scratch.map_or(true, |mut d| d.next().is_none()), "{what}");
        }
    }
    assert!(steps > 15, "only {steps} commands were seen");
    // What the guest wrote meanwhile is still known.
    let backup = domain.begin_backup(name("wed")).unwrap();
    assert_eq!(since(&backup, 0, "mon"), [(0, GRANULE)]);
    domain.close().unwrap();
}

#[test]
fn a_hung_qemu_times_out_and_is_tidied_when_it_answers_again() {
    need!("qemu-system-x86_64", "qemu-img");
    let dir = tools::temp_dir();
    let path = dir.path().join("vda.qcow2");
    image::create(&path, "qcow2", 4 * MIB, "");
    let qemu = Qemu::build().disk("vda", &path, "qcow2").paused().start();
    let proxy = QmpFault::start(&qemu.socket());
    let mut places = places(dir.path());
    places.timeout = Duration::from_millis(300);
    let domain = open(&proxy.path(), &places, dir.path());
    domain.create_checkpoint(name("mon")).unwrap();
    qemu.guest_write("vda", 0, 4096, 1);
    let before = qemu.state();
    let commands = [
        "blockdev-add",
        "blockdev-create",
        "transaction",
        "nbd-server-start",
        "block-export-add",
    ];
    for command in commands {
        proxy.arm_named(command, Fault::Hang);
        let error = domain.begin_backup(name("tue")).err().unwrap();
        assert_eq!(error.kind(), Kind::TimedOut, "{command}: {error}");
        proxy.disarm();
        // The next backup first settles what the last one left.
        let backup = domain.begin_backup(name("wed")).unwrap();
        assert_eq!(since(&backup, 0, "mon"), [(0, GRANULE)], "{command}");
        domain.end_backup(&name("wed")).unwrap();
        domain.delete_checkpoint(&name("wed")).unwrap();
        assert_eq!(qemu.state(), before, "{command}");
        assert!(!qemu.nbd_server_running(), "{command}");
    }
    domain.close().unwrap();
}

/// The bitmaps stay in the image below: afterwards the checkpoint is stale, on that disk only.
#[test]
fn stale_after_a_snapshot() {
    need!("qemu-system-x86_64", "qemu-img");
    let f = fixture(&[4 * MIB, 4 * MIB]);
    f.domain.create_checkpoint(name("mon")).unwrap();
    f.qemu.guest_write("vda", 0, 4096, 1);
    f.qemu.guest_write("vdb", MIB, 4096, 1);
    let overlay = f.dir.path().join("snap.qcow2");
    f.qemu.cmd(
        "blockdev-snapshot-sync",
        serde_json::json!({"node-name": "node-vda", "snapshot-node-name": "snap",
            "snapshot-file": overlay, "format": "qcow2"}),
    );
    f.qemu.guest_write("vda", 2 * MIB, 4096, 2);
    let backup = f.domain.begin_backup(name("tue")).unwrap();
    let error = backup.changes_since_base(0).unwrap_err();
    assert_eq!(error.kind(), Kind::Stale, "{error}");
    assert_eq!(since(&backup, 1, "mon"), [(MIB, GRANULE)]);
    // The disk itself can be read, whole.
    let bytes = content(&backup, 0);
    assert_eq!((bytes[0], bytes[2 * MIB as usize]), (1, 2));
    f.domain.close().unwrap();
}

#[test]
fn disks_that_cannot_carry_a_bitmap_are_backed_up_all_the_same() {
    need!("qemu-system-x86_64", "qemu-img");
    let dir = tools::temp_dir();
    let [good, raw, old] = ["good.qcow2", "raw.raw", "old.qcow2"].map(|n| dir.path().join(n));
    image::create(&good, "qcow2", MIB, "");
    image::create(&raw, "raw", 1_000_000, "");
    image::create(&old, "qcow2", MIB, "compat=0.10");
    let qemu = Qemu::build()
        .disk("vda", &good, "qcow2")
        .disk("vdb", &raw, "raw")
        .disk("vdc", &old, "qcow2")
        .paused()
        .start();
    let domain = open(&qemu.socket(), &places(dir.path()), dir.path());
    for target in ["vda", "vdb", "vdc"] {
        qemu.guest_write(target, 512, 1024, 5);
    }
    let backup = domain.begin_backup(name("full")).unwrap();
    let notes: Vec<_> = backup.disks().iter().map(|d| d.note().is_some()).collect();
    assert_eq!(notes, [false, true, true]);
    // QEMU rounds a raw disk up to whole sectors.
    assert_eq!(backup.disks()[1].size(), 1_000_448);
    for disk in 0..3 {
        let bytes = content(&backup, disk);
        assert!(bytes[512..1536].iter().all(|b| *b == 5));
        assert!(bytes[1536..].iter().all(|b| *b == 0));
    }
    let again = domain.begin_backup(name("next")).unwrap();
    assert_eq!(since(&again, 0, "full"), []);
    assert_eq!(again.since()[0].name.as_str(), "full");
    assert!(!again.disks()[1].knows_since(again.since()[0].id));
    let whole = again.changes_since_base(1).unwrap();
    assert!(
        whole.iter().all(|e| e.kind != Change::Clean),
        "no base: all counts as changed"
    );
    domain.close().unwrap();
}

/// Neither mode begins while the guest is being migrated; afterwards both do.
#[test]
fn no_backup_begins_during_a_migration() {
    need!("qemu-system-x86_64", "qemu-img");
    let f = fixture(&[4 * MIB]);
    f.domain.create_checkpoint(name("mon")).unwrap();
    let before = f.qemu.state();
    // A destination that takes the connection and nothing more.
    let socket = f.dir.path().join("destination.sock");
    let listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    let uri = format!("unix:{}", socket.display());
    f.qemu.cmd("migrate", serde_json::json!({"uri": uri}));
    let (destination, _) = listener.accept().unwrap();
    let target = f.dir.path().join("copy.qcow2");
    let push = format!(
        "<domainbackup><disks><disk name='vda'><target file='{}'/></disk></disks></domainbackup>",
        target.display()
    );
    let begin_push = || f.domain.begin_backup_from(&name("push"), push.as_bytes());
    for error in [
        f.domain.begin_backup(name("tue")).err().unwrap(),
        begin_push().unwrap_err(),
    ] {
        assert_eq!(error.kind(), Kind::Busy, "{error}");
        assert!(error.to_string().contains("migrated"), "{error}");
    }
    assert_eq!(f.qemu.state(), before);
    f.qemu.cmd("migrate_cancel", serde_json::json!({}));
    drop(destination);
    tools::eventually("the migration's end", Duration::from_secs(30), || {
        let status = f.qemu.cmd("query-migrate", serde_json::json!({}));
        let over = ["cancelled", "failed"].contains(&status["status"].as_str().unwrap_or(""));
        over.then_some(())
    });
    f.domain.begin_backup(name("tue")).unwrap();
    f.domain.end_backup(&name("tue")).unwrap();
    begin_push().unwrap();
    f.domain.close().unwrap();
}

/// With another state directory, and by another monitor of the same QEMU.
#[test]
fn a_second_mount_leaves_the_backups_of_the_first_alone() {
    need!("qemu-system-x86_64", "qemu-img");
    let dir = tools::temp_dir();
    let path = dir.path().join("vda.qcow2");
    image::create(&path, "qcow2", 4 * MIB, "");
    let socket = dir.path().join("second.sock");
    let monitor = format!("socket,id=two,path={},server=on,wait=off", socket.display());
    let qemu = Qemu::build().disk("vda", &path, "qcow2").paused();
    let more = ["-chardev", &monitor, "-mon", "chardev=two,mode=control"];
    let qemu = qemu.args(&more).start();
    let places = places(dir.path());
    let domain = open(&qemu.socket(), &places, dir.path());
    let backup = domain.begin_backup(name("mon")).unwrap();
    qemu.guest_write("vda", 0, 4096, 1);

    let store = Store::open(&dir.path().join("other state")).unwrap();
    let second = Source::Qmp(socket).open(&places).unwrap();
    let refused = Domain::open(second, store, Options::default()).map(drop);
    assert_eq!(refused.unwrap_err().kind(), Kind::Busy);
    assert_eq!(content(&backup, 0)[0], 0);
    domain.close().unwrap();
}

/// Another QEMU writes to the disks until a migration has arrived, and once one has left: neither side
/// makes a checkpoint then, which would miss that. One that was made before moves along.
#[test]
fn a_migration_takes_its_checkpoints_along() {
    need!("qemu-system-x86_64", "qemu-img");
    let dir = tools::temp_dir();
    let path = dir.path().join("vda.qcow2");
    image::create(&path, "qcow2", 4 * MIB, "");
    let build = || Qemu::build().disk("vda", &path, "qcow2").paused();
    let source = build().start();
    let here = open(&source.socket(), &places(dir.path()), dir.path());
    here.create_checkpoint(name("mon")).unwrap();
    source.guest_write("vda", 0, 4096, 1);

    let target = build().args(&["-incoming", "defer"]).start();
    let there = |state: &str| {
        open(
            &target.socket(),
            &places(dir.path()),
            &dir.path().join(state),
        )
    };
    let refused = |domain: &Domain, says: &str| {
        let before = target.state();
        let backup = domain.begin_backup(name("x")).map(drop);
        for error in [domain.create_checkpoint(name("x")), backup].map(Result::unwrap_err) {
            assert_eq!(error.kind(), Kind::Busy, "{error}");
            assert!(error.to_string().contains(says), "{error}");
        }
        assert_eq!(target.state(), before);
    };
    let early = there("early");
    refused(&early, "waits for a migration");
    let socket = dir.path().join("migration.sock");
    let uri = serde_json::json!({"uri": format!("unix:{}", socket.display())});
    target.cmd("migrate-incoming", uri.clone());
    source.guest_write("vda", MIB, 4096, 2);
    source.cmd("migrate", uri);
    for qemu in [&source, &target] {
        tools::eventually("the migration", Duration::from_secs(60), || {
            let status = qemu.cmd("query-migrate", serde_json::json!({}));
            (status["status"] == "completed").then_some(())
        });
    }
    refused(&here, "migrated away");
    here.close().unwrap();
    drop(here);
    if target.status() != "running" && !common::qemu::is_before_10() {
        refused(&early, "inactive");
    }
    early.close().unwrap();
    target.cmd("cont", serde_json::json!({}));
    target.guest_write("vda", 2 * MIB, 4096, 3);

    // The same record of checkpoints, on the other host.
    let domain = open(&target.socket(), &places(dir.path()), dir.path());
    let backup = domain.begin_backup(name("tue")).unwrap();
    assert_eq!(
        since(&backup, 0, "mon"),
        [0, MIB, 2 * MIB].map(|at| (at, GRANULE))
    );
    let bytes = content(&backup, 0);
    assert_eq!([0, MIB, 2 * MIB].map(|at| bytes[at as usize]), [1, 2, 3]);
    domain.close().unwrap();
}

/// To tell what 16 TiB are takes QEMU seconds, if they are in many pieces. A read asks about what
/// surrounds it only, and a disk reads the same on both sides of where one question ends.
#[test]
fn a_read_of_a_large_disk_asks_about_its_surroundings() {
    need!("qemu-system-x86_64", "qemu-img");
    const GIB: u64 = 1 << 30;
    let size = 16 << 40;
    let f = fixture(&[size]);
    let border = 64 * GIB;
    let writes = [0, border - 8192, border, 3 * border + 4096, size - 4096];
    for (pattern, at) in (1..).zip(writes) {
        f.qemu.guest_write("vda", at, 4096, pattern);
    }
    let backup = f.domain.begin_backup(name("b")).unwrap();
    f.qemu.guest_write("vda", border, 4096, 0xee);
    let read = |at: u64, length: usize| {
        let mut bytes = vec![0xaa; length];
        assert_eq!(backup.read_at(0, at, &mut bytes).unwrap(), length);
        bytes
    };
    let around = read(border - 8192, 16384);
    for (page, pattern) in around.chunks(4096).zip([2, 0, 3, 0]) {
        assert!(page.iter().all(|b| *b == pattern), "{pattern}");
    }
    assert!(read(0, 4096).iter().all(|b| *b == 1));
    assert!(read(size - 4096, 4096).iter().all(|b| *b == 5));
    assert_eq!(
        backup.read_at(0, size - 100, &mut [0; 4096]).unwrap(),
        100,
        "the end of the disk"
    );
    // What is known to be zeros is asked of nobody, and nobody has asked for all.
    let pulled = backup.bytes_pulled();
    assert_eq!(backup.zeros_at(0, border + GRANULE, 1 << 20), Some(1 << 20));
    assert_eq!(backup.zeros_at(0, border, 4096), None, "data");
    assert_eq!(backup.zeros_at(0, 2 * border, 4096), None, "not asked yet");
    assert!(read(2 * border, 1 << 20).iter().all(|b| *b == 0));
    assert_eq!(backup.zeros_at(0, 2 * border, 4096), Some(4096));
    assert_eq!(backup.bytes_pulled(), pulled);
    assert!(backup.known_allocation(0).is_none());
    let whole = backup.allocation(0).unwrap();
    assert_eq!(whole.size(), size);
    assert_eq!(backup.zeros_at(0, 9 * border, 4096), Some(4096));
    assert!(read(3 * border + 4096, 4096).iter().all(|b| *b == 4));
    f.domain.close().unwrap();
}
