//! Scratch space that gets short costs the backup, not the guest: a real QEMU, through the library.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::path::Path;
use std::time::Duration;

use common::domain::{Fixture, fixture, name, open, places};
use common::tools::{self, need, run, text};
use common::{Fault, Qemu, QmpFault, State, image};
use fleecefs::model::{Happening, Kind};

const MIB: u64 = 1 << 20;

/// Whoever listens is told when scratch space gets short, and when that ended the backup. The guest
/// goes on.
#[test]
fn events_tell_of_short_scratch_space() {
    need!("qemu-system-x86_64", "qemu-img");
    let dir = tools::temp_dir();
    let path = dir.path().join("vda.qcow2");
    image::create(&path, "qcow2", 64 * MIB, "");
    let qemu = Qemu::build().disk("vda", &path, "qcow2").paused().start();
    qemu.guest_write("vda", 0, 64 * MIB, 1);
    let mut places = places(dir.path());
    places.scratch_limit = Some(16 * MIB);
    let domain = open(&qemu.socket(), &places, dir.path());
    let events = domain.subscribe();
    let backup = domain.begin_backup(name("mon")).unwrap();
    qemu.guest_write("vda", 0, 4 * MIB, 2);
    qemu.guest_write("vda", 4 * MIB, 9 * MIB, 3);
    let deadline = Duration::from_secs(20);
    match events.recv_timeout(deadline).unwrap().what {
        Happening::ScratchThreshold {
            id, used, limit, ..
        } => {
            assert_eq!((id, limit), (backup.id(), 16 * MIB));
            assert!(used >= 12 * MIB && used <= limit, "{used}");
        }
        other => panic!("{other:?}"),
    }
    assert!(backup.failure().is_none());
    qemu.guest_write("vda", 20 * MIB, 20 * MIB, 4);
    match events.recv_timeout(deadline).unwrap().what {
        Happening::JobCompleted { outcome, .. } => {
            assert_eq!(outcome.unwrap_err().kind(), Kind::NoSpace);
        }
        other => panic!("{other:?}"),
    }
    qemu.guest_write("vda", 0, 64 * MIB, 5);
    domain.end_backup(&name("mon")).unwrap();
    assert_eq!(events.try_iter().count(), 0, "told once");
    domain.close().unwrap();
}

/// What the guard ends while it begins is refused as a whole, and nothing is left of it.
#[test]
fn ended_while_it_begins() {
    need!("qemu-system-x86_64", "qemu-img");
    let dir = tools::temp_dir();
    let mut build = Qemu::build().paused();
    for target in ["vda", "vdb", "vdc", "vdd"] {
        let path = dir.path().join(format!("{target}.qcow2"));
        image::create(&path, "qcow2", 4 * MIB, "");
        build = build.disk(target, &path, "qcow2");
    }
    let qemu = build.start();
    let between = QmpFault::start(&qemu.socket());
    let mut places = places(dir.path());
    places.scratch_limit = Some(1);
    let domain = open(&between.path(), &places, dir.path());
    let before = qemu.state();
    // Whichever step the guard is awake at: it looks five times a second.
    for command in ["transaction", "nbd-server-start", "block-export-add"] {
        between.arm_named(command, Fault::Slow(Duration::from_millis(500)));
        let error = domain.begin_backup(name("b")).map(drop).unwrap_err();
        assert!(between.fired());
        assert_eq!(error.kind(), Kind::NoSpace, "{command}: {error}");
        tools::eventually("the end", Duration::from_secs(20), || {
            (qemu.state() == before).then_some(())
        });
        assert!(!qemu.nbd_server_running(), "{command}");
    }
    domain.close().unwrap();
    assert_eq!(
        std::fs::read_dir(dir.path().join("scratch"))
            .unwrap()
            .count(),
        0
    );
}

/// A scratch file of its own, on a file system of its own that is too small.
#[test]
fn a_scratch_file_elsewhere_is_guarded_too() {
    need!("qemu-system-x86_64", "qemu-img");
    if !tools::is_root() {
        return tools::skip("only root can mount a small file system");
    }
    let f = fixture(&[64 * MIB]);
    let before = f.qemu.state();
    f.qemu.guest_write("vda", 0, 64 * MIB, 1);
    let small = f.dir.path().join("small");
    std::fs::create_dir(&small).unwrap();
    run(
        "mount",
        &["-t", "tmpfs", "-o", "size=40m", "none", text(&small)],
    );
    let outcome =
        std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| fill(&f, &before, &small)));
    run("umount", &["-l", text(&small)]);
    if let Err(panic) = outcome {
        std::panic::resume_unwind(panic);
    }
    assert_eq!(f.qemu.state(), before);
    f.domain.close().unwrap();
}

fn fill(f: &Fixture, before: &State, small: &Path) {
    let document = format!(
        "<domainbackup mode='pull'><disks><disk name='vda'><scratch file='{}'/></disk></disks>\
         <domaincheckpoint><disks><disk name='vda' checkpoint='no'/></disks></domaincheckpoint>\
         </domainbackup>",
        small.join("own").display()
    );
    let begun = f
        .domain
        .begin_backup_from(&name("own"), document.as_bytes());
    begun.unwrap();
    let backup = f.domain.backup("own").unwrap();
    f.qemu.guest_write("vda", 0, 38 * MIB, 2);
    let why = tools::eventually("the end", Duration::from_secs(20), || backup.failure());
    assert_eq!(why.kind(), Kind::NoSpace, "{why}");
    assert!(why.to_string().contains(text(small)), "{why}");
    // Reads fail at once; a moment later nothing is left that the guest's writes would meet.
    tools::eventually("the rest", Duration::from_secs(20), || {
        (f.qemu.state() == *before).then_some(())
    });
    f.qemu.guest_write("vda", 38 * MIB, 26 * MIB, 3);
    // Full already: not even begun.
    std::fs::write(small.join("fill"), vec![1; 39 << 20]).unwrap();
    f.domain.end_backup(&name("own")).unwrap();
    let refused = f
        .domain
        .begin_backup_from(&name("own"), document.as_bytes());
    assert_eq!(refused.unwrap_err().kind(), Kind::NoSpace);
}
