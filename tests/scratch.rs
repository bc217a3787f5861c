//! Scratch space that gets short costs the backup, not the guest: a real QEMU, through the library.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::time::Duration;

use common::domain::{fixture, name, open, places};
use common::tools::{self, need};
use common::{Fault, Qemu, QmpFault, image};
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

/// Scratch space that a document put elsewhere is looked after there, and costs no other backup its own.
#[test]
fn scratch_space_elsewhere_gets_short() {
    need!("qemu-system-x86_64", "qemu-img");
    if !tools::is_root() {
        return tools::skip("only root can mount a small file system for the scratch file");
    }
    let f = fixture(&[16 * MIB, 16 * MIB]);
    for target in ["vda", "vdb"] {
        f.qemu.guest_write(target, 0, 16 * MIB, 7);
    }
    let small = f.dir.path().join("small");
    std::fs::create_dir(&small).unwrap();
    let text = tools::text;
    tools::run(
        "mount",
        &["-t", "tmpfs", "-o", "size=64m", "none", text(&small)],
    );
    let file = std::fs::File::create(small.join("fill")).unwrap();
    let fill = |length| {
        let flags = rustix::fs::FallocateFlags::empty();
        rustix::fs::fallocate(&file, flags, 0, length).unwrap();
    };
    fill(54 * MIB);
    let largest = f.domain.begin_backup(name("largest")).unwrap();
    f.qemu.guest_write("vda", 0, 16 * MIB, 8);
    let document = format!(
        "<domainbackup mode='pull'><disks><disk name='vdb'><scratch file='{}'/></disk></disks>\
         </domainbackup>",
        text(&small.join("scratch"))
    );
    let begin = |backup| {
        f.domain
            .begin_backup_from(&name(backup), document.as_bytes())
    };
    begin("elsewhere").unwrap();
    let elsewhere = f.domain.backup("elsewhere").unwrap();
    // 10 MiB are free, a twentieth of 64 is the reserve: short, and not full.
    for offset in 0..7 {
        f.qemu.guest_write("vdb", 2 * offset * MIB, MIB, 9);
    }
    let why = tools::eventually("the end", Duration::from_secs(20), || elsewhere.failure());
    assert_eq!(why.kind(), Kind::NoSpace, "{why}");
    assert!(largest.failure().is_none());
    f.domain.end_backup(&name("elsewhere")).unwrap();
    fill(62 * MIB);
    assert_eq!(begin("again").unwrap_err().kind(), Kind::NoSpace);
    f.domain.close().unwrap();
    drop(file);
    tools::run("umount", &[text(&small)]);
}
