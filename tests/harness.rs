//! The tests' own helpers, tried on a real QEMU: a helper that cannot fail proves nothing.

mod common;

use common::tools::{self, need};
use common::{Disk, Fault, Marks, Qemu, Qmp, QmpFault, Rng, Write, image, model};
use serde_json::json;

const MIB: u64 = 1 << 20;

fn one_disk() -> (tempfile::TempDir, std::path::PathBuf) {
    let dir = tools::temp_dir();
    let path = dir.path().join("a.qcow2");
    image::create(&path, "qcow2", 16 * MIB, "");
    (dir, path)
}

#[test]
fn guest_writes_arrive_and_failures_are_seen() {
    need!("qemu-system-x86_64", "qemu-img");
    let (_dir, path) = one_disk();
    let mut build = Qemu::build().disk("vda", &path, "qcow2");
    if common::qemu::iothread_writes() {
        build = build.iothread();
    }
    let qemu = build.start();
    let mut rng = Rng::from_env();
    let mut disk = Disk::new(16 * MIB);
    for _ in 0..50 {
        let write = rng.write(disk.size());
        qemu.write("vda", write);
        disk.apply(write);
    }
    qemu.guest_write("vda", MIB, 4096, 0x41);
    assert!(qemu.guest_reads("vda", MIB, 4096, 0x41));
    assert!(!qemu.guest_reads("vda", MIB, 4096, 0x42));
    qemu.guest_zero("vda", MIB, 4096);
    assert!(qemu.guest_reads("vda", MIB, 4096, 0));
    disk.apply(Write {
        offset: MIB,
        length: 4096,
        pattern: 0,
    });
    let past_the_end = Write {
        offset: 64 * MIB,
        length: 512,
        pattern: 1,
    };
    assert!(qemu.try_guest_write("vda", past_the_end).is_err());
    qemu.quit();
    disk.assert_is(&image::bytes(&path, "qcow2"), "the image");
}

#[test]
fn the_state_shows_what_is_left_behind() {
    need!("qemu-system-x86_64", "qemu-img");
    let (dir, path) = one_disk();
    let qemu = Qemu::build().disk("vda", &path, "qcow2").paused().start();
    let before = qemu.state();
    assert_eq!(before, qemu.state());
    assert!(before.0.contains(&"status prelaunch".to_owned()));

    let bitmap = json!({"node": "node-vda", "name": "mon", "persistent": true});
    qemu.cmd("block-dirty-bitmap-add", bitmap);
    assert_ne!(before, qemu.state());
    assert_eq!(
        before.clone().without_bitmaps(),
        qemu.state().without_bitmaps()
    );
    let mut marks = Marks::new(16 * MIB, 65536);
    for offset in [100 * 1024, 9 * MIB] {
        let write = Write {
            offset,
            length: 40 * 1024,
            pattern: 1,
        };
        qemu.write("vda", write);
        marks.mark(write);
    }
    let dirty: u64 = marks.extents().iter().map(|(_, length)| length).sum();
    assert_eq!(qemu.dirty_bytes("vda", "mon"), Some(dirty));

    let scratch = dir.path().join("scratch.qcow2");
    image::create(&scratch, "qcow2", 16 * MIB, "");
    let file = json!({"driver": "file", "filename": scratch});
    let overlay = json!({"driver": "qcow2", "node-name": "ov1", "file": file,
        "backing": "node-vda"});
    let with_bitmap = qemu.state();
    qemu.cmd("blockdev-add", overlay);
    let job = json!({"job-id": "j1", "device": "node-vda", "target": "ov1", "sync": "none"});
    qemu.cmd("blockdev-backup", job);
    let during = qemu.state();
    assert!(during.0.contains(&"job j1 backup".to_owned()), "{during:?}");
    let mut ctl = qemu.ctl();
    ctl.events();
    ctl.cmd("job-cancel", json!({"id": "j1"}));
    ctl.wait_event("BLOCK_JOB_CANCELLED", tools::DEADLINE);
    drop(ctl);
    tools::eventually("the job's end", tools::DEADLINE, || {
        let left = qemu.state().0.iter().any(|l| l.starts_with("job "));
        (!left).then_some(())
    });
    qemu.cmd("blockdev-del", json!({"node-name": "ov1"}));
    assert_eq!(with_bitmap, qemu.state());

    assert!(!qemu.nbd_server_running());
    let socket = dir.path().join("n.sock");
    let address = json!({"type": "unix", "data": {"path": socket}});
    qemu.cmd("nbd-server-start", json!({"addr": address}));
    assert!(qemu.nbd_server_running());
}

#[test]
fn qemu_runs_as_another_user() {
    need!("qemu-system-x86_64", "qemu-img", "setpriv");
    use std::os::unix::fs::{MetadataExt, PermissionsExt};
    let (dir, path) = one_disk();
    if dir.path().metadata().unwrap().uid() != 0 {
        eprintln!("SKIPPED: only root can become another user");
        return;
    }
    std::fs::set_permissions(dir.path(), PermissionsExt::from_mode(0o711)).unwrap();
    let nobody = 65534;
    let qemu = Qemu::build()
        .disk("vda", &path, "qcow2")
        .user(nobody)
        .start();
    let process = std::fs::metadata(format!("/proc/{}", qemu.pid())).unwrap();
    assert_eq!(process.uid(), nobody);
    qemu.guest_write("vda", 0, 4096, 7);
    qemu.quit();
}

#[test]
fn each_fault_happens_where_it_should() {
    need!("qemu-system-x86_64", "qemu-img");
    let (_dir, path) = one_disk();
    let qemu = Qemu::build().disk("vda", &path, "qcow2").paused().start();
    let proxy = QmpFault::start(&qemu.socket());
    let mut client = Qmp::connect(&proxy.path());
    assert_eq!(proxy.commands(), ["qmp_capabilities"]);
    proxy.take();

    let add = |name: &str| json!({"node": "node-vda", "name": name});
    let has = |name: &str| qemu.dirty_bytes("vda", name).is_some();
    let no = |why: &str| Err(why.to_owned());

    proxy.arm(1, Fault::Refuse("no".into()));
    client.cmd("block-dirty-bitmap-add", add("a"));
    assert!(!proxy.fired());
    let refused = client.try_cmd("block-dirty-bitmap-add", add("b"));
    assert_eq!((refused, proxy.fired()), (no("no"), true));
    assert!(has("a") && !has("b"), "a refused command reached QEMU");

    proxy.arm_named("block-dirty-bitmap-add", Fault::FailAfter("late".into()));
    client.cmd("query-version", json!({}));
    let failed = client.try_cmd("block-dirty-bitmap-add", add("c"));
    assert_eq!(failed, no("late"));
    assert!(has("c"), "a failed command did not reach QEMU");
    client.cmd("block-dirty-bitmap-add", add("d"));
    assert_eq!(proxy.take().len(), 5);

    proxy.arm(0, Fault::Close);
    let lost = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        client.try_cmd("query-version", json!({}))
    }));
    assert!(lost.is_err(), "the connection should be closed");
    let mut client = Qmp::connect(&proxy.path());

    proxy.arm(0, Fault::Hang);
    let hung = std::thread::spawn(move || client.try_cmd("query-version", json!({})));
    tools::eventually("the command", tools::DEADLINE, || {
        proxy.fired().then_some(())
    });
    std::thread::sleep(std::time::Duration::from_millis(200));
    assert!(!hung.is_finished(), "a hanging command was answered");
    qemu.kill9();
    assert!(hung.join().is_err(), "the connection should be closed");
}

#[test]
fn linux_boots_writes_and_switches_off() {
    need!("qemu-system-x86_64", "mkfs.ext4", "debugfs", "busybox");
    let Some(files) = common::qemu::linux() else {
        return;
    };
    let dir = tools::temp_dir();
    let disks = ["vda", "vdb"].map(|target| dir.path().join(target).with_extension("qcow2"));
    let mut build = Qemu::build().linux(&files, "fleece=idle");
    for (target, path) in ["vda", "vdb"].iter().zip(&disks) {
        image::ext4(path, 64 * MIB);
        build = build.disk(target, path, "qcow2");
    }
    let mut qemu = build.start();
    qemu.console().ready();
    assert_eq!(qemu.console().tell("sh echo hello"), ["hello"]);
    qemu.console().tell("write 2");
    assert_eq!(qemu.console().round(), 2);
    qemu.console().tell("start");
    qemu.console().rounds_more(3, tools::DEADLINE);
    qemu.console().tell("poweroff");
    let rounds = qemu.console().round();
    assert!(qemu.wait(tools::DEADLINE).success());
    for path in &disks {
        let raw = path.with_extension("raw");
        image::convert(path, "qcow2", &raw, "raw");
        tools::run("e2fsck", &["-fn", tools::text(&raw)]);
        let round = tools::run("debugfs", &["-R", "cat round", tools::text(&raw)]);
        assert_eq!(round.trim().parse(), Ok(rounds));
    }
}

#[test]
fn maps_are_read_and_marks_joined() {
    let map = model::parse_map(
        "         0       65536    0  clean\n     65536       65536    1  dirty\n\
         \x20   131072       65536    3  dirty,zero\n",
    );
    assert_eq!(model::dirty_extents(&map), [(65536, 131_072)]);
    assert_eq!(map[2].description, "dirty,zero");
    let mut marks = Marks::new(100_000, 65536);
    let write = |offset, length| Write {
        offset,
        length,
        pattern: 1,
    };
    marks.mark(write(0, 1));
    assert_eq!(marks.extents(), [(0, 65536)]);
    marks.mark(write(99_000, 512));
    assert_eq!(marks.extents(), [(0, 100_000)]);
    let gap = std::panic::catch_unwind(|| model::parse_map("0 10 0 clean\n20 10 1 dirty\n"));
    assert!(gap.is_err());
}
