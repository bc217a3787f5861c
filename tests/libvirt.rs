//! Domains of a real libvirtd, through a mount: what virsh does is seen in the mount, and what the
//! mount does is seen by virsh. What all backends have in common is in `behaviour`. The guest is paused;
//! its writes are made for it.
#![cfg(feature = "libvirt")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::os::unix::fs::PermissionsExt;
use std::process::Command;
use std::time::{Duration, Instant};

use common::libvirtd::{Libvirtd, libvirtd};
use common::mount::Home;
use common::tools::{DEADLINE, eventually, fuse, need, run, text};
use common::{Disk, Fleecefs, Rng, Write, errno, model, parse_map};

const MIB: u64 = 1 << 20;
const NOTHING: [std::path::PathBuf; 0] = [];

fn mount(libvirtd: &Libvirtd, home: Home) -> Fleecefs {
    Fleecefs::libvirt(&libvirtd.uri()).home(home).mount()
}

fn names(libvirtd: &Libvirtd) -> Vec<String> {
    let listed = libvirtd.virsh(&["checkpoint-list", "--name", "vm"]);
    let mut names: Vec<String> = listed.split_whitespace().map(str::to_owned).collect();
    names.sort();
    names
}

#[test]
fn checkpoints_are_libvirts() {
    let (Some(libvirtd), Some(())) = (libvirtd(), fuse()) else {
        return;
    };
    libvirtd.domain(&[8 * MIB, 4 * MIB]);
    libvirtd.virsh(&["checkpoint-create-as", "vm", "theirs"]);
    let listed = run(common::mount::FLEECEFS, &["list", "--uri", &libvirtd.uri()]);
    assert!(listed.contains(" libvirt:vm   running"), "{listed}");
    let nowhere = Command::new(common::mount::FLEECEFS)
        .args(["list", "--uri", "qemu+unix:///system?socket=/nonexistent"])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&nowhere.stderr);
    assert!(
        !nowhere.status.success() && said.contains("/nonexistent"),
        "{said}"
    );
    let mount = mount(&libvirtd, Home::new());
    assert_eq!(mount.list("checkpoints"), ["theirs"]);
    mount.mkdir("checkpoints/ours").unwrap();
    assert_eq!(names(&libvirtd), ["ours", "theirs"]);
    let dumped = libvirtd.virsh(&["checkpoint-dumpxml", "--no-domain", "vm", "ours"]);
    assert!(
        dumped.contains("<name>theirs</name>"),
        "the parent: {dumped}"
    );

    // What virsh makes appears by itself, and what it deletes disappears.
    libvirtd.virsh(&["checkpoint-create-as", "vm", "later"]);
    libvirtd.virsh(&["checkpoint-delete", "vm", "theirs"]);
    eventually("virsh's changes", DEADLINE, || {
        (mount.list("checkpoints") == ["later", "ours"]).then_some(())
    });
    // Before a change it is looked again: the name is taken at once.
    libvirtd.virsh(&["checkpoint-create-as", "vm", "taken"]);
    let taken = mount.mkdir("checkpoints/taken");
    assert_eq!(errno(taken), libc::EEXIST);

    mount.rmdir("checkpoints/ours").unwrap();
    assert_eq!(names(&libvirtd), ["later", "taken"]);
    let status = mount.read("checkpoints/later/status");
    assert!(status.contains("state: trusted"), "{status}");
    mount.say("checkpoints/taken/control", "forget").unwrap();
    assert_eq!(names(&libvirtd), ["later"]);
    assert_eq!(mount.umount().leftovers(), NOTHING);
}

/// What fleecefs reads is what virsh and nbdcopy get at the same instant.
#[test]
fn the_same_as_virsh_and_nbdcopy() {
    need!("nbdcopy");
    let (Some(libvirtd), Some(())) = (libvirtd(), fuse()) else {
        return;
    };
    let size = 8 * MIB;
    libvirtd.domain(&[size]);
    let mut rng = Rng::from_env();
    for _ in 0..8 {
        libvirtd.write("vda", rng.write(size));
    }
    let mount = mount(&libvirtd, Home::new());
    mount.mkdir("backups/ours").unwrap();
    let ours = std::fs::read(mount.path("backups/ours/disk.raw")).unwrap();
    mount.rmdir("backups/ours").unwrap();

    // The guest is paused and wrote nothing since.
    let at = |name: &str| libvirtd.dir().join(name);
    let sockets = at("sockets");
    std::fs::create_dir(&sockets).unwrap();
    std::fs::set_permissions(&sockets, std::fs::Permissions::from_mode(0o777)).unwrap();
    let socket = sockets.join("nbd.sock");
    let document = format!(
        "<domainbackup mode='pull'><server transport='unix' socket='{}'/><disks>\
         <disk name='vda' backup='yes' type='file'><scratch file='{}'/></disk></disks>\
         </domainbackup>",
        text(&socket),
        text(&at("scratch.qcow2"))
    );
    std::fs::write(at("backup.xml"), document).unwrap();
    libvirtd.virsh(&["backup-begin", "vm", text(&at("backup.xml"))]);

    // Somebody else's job: EBUSY at once, and it is left alone.
    let began = Instant::now();
    assert_eq!(errno(mount.mkdir("backups/late")), libc::EBUSY);
    assert!(
        began.elapsed() < Duration::from_secs(3),
        "{:?}",
        began.elapsed()
    );
    assert!(
        mount
            .last_error()
            .contains("a pull backup that someone else")
    );
    assert!(!mount.list("checkpoints").contains(&"late".to_owned()));

    let uri = format!("nbd+unix:///vda?socket={}", text(&socket));
    run("nbdcopy", &[&uri, text(&at("theirs.raw"))]);
    libvirtd.virsh(&["domjobabort", "vm"]);
    assert!(ours == std::fs::read(at("theirs.raw")).unwrap());
    mount.mkdir("backups/late").unwrap();
    assert_eq!(mount.umount().leftovers(), NOTHING);
    assert!(libvirtd.try_virsh(&["backup-dumpxml", "vm"]).is_err());
}

/// What others do to the domain ends a backup, and never the mount.
#[test]
fn the_mount_lives_on() {
    let (Some(mut libvirtd), Some(())) = (libvirtd(), fuse()) else {
        return;
    };
    libvirtd.domain(&[8 * MIB]);
    let mount = mount(&libvirtd, Home::new());
    let failed = |name: &str, says: &str| {
        let status = eventually("the failure", DEADLINE, || {
            let status = mount.read(&format!("backups/{name}/status"));
            status.contains("state: failed").then_some(status)
        });
        assert!(status.contains(says), "{status}");
        let read = std::fs::read(mount.path(&format!("backups/{name}/disk.raw")));
        assert!(read.is_err());
        mount.rmdir(&format!("backups/{name}")).unwrap();
    };

    mount.mkdir("backups/aborted").unwrap();
    libvirtd.virsh(&["domjobabort", "vm"]);
    failed("aborted", "domjobabort");

    // A restart of libvirtd is no end of anything: the backup is in QEMU.
    mount.mkdir("backups/kept").unwrap();
    libvirtd.restart();
    std::fs::read(mount.path("backups/kept/disk.raw")).unwrap();
    mount.rmdir("backups/kept").unwrap();
    assert!(libvirtd.try_virsh(&["backup-dumpxml", "vm"]).is_err());

    mount.mkdir("backups/destroyed").unwrap();
    libvirtd.virsh(&["destroy", "vm"]);
    failed("destroyed", "the domain was destroyed");
    libvirtd.virsh(&["start", "--paused", "vm"]);
    eventually("the domain's return", DEADLINE, || {
        mount
            .read("status")
            .contains("state: connected")
            .then_some(())
    });
    mount.mkdir("backups/again").unwrap();
    common::process::signal(libvirtd.qemu(), libc::SIGKILL);
    failed("again", "the domain crashed");
    assert_eq!(mount.umount().leftovers(), NOTHING);
}

/// A domain that is not running: its images, and every since/; nothing of it can be changed.
#[test]
fn a_stopped_domain_is_read() {
    let (Some(libvirtd), Some(())) = (libvirtd(), fuse()) else {
        return;
    };
    let size = 8 * MIB;
    libvirtd.domain(&[size]);
    let mut disk = Disk::new(size);
    for (pattern, checkpoint) in [(1, "mon"), (2, "tue"), (3, "")] {
        let write = Write {
            offset: u64::from(pattern) * MIB,
            length: 65536,
            pattern,
        };
        libvirtd.write("vda", write);
        disk.apply(write);
        if !checkpoint.is_empty() {
            libvirtd.virsh(&["checkpoint-create-as", "vm", checkpoint]);
        }
    }
    libvirtd.virsh(&["destroy", "--graceful", "vm"]);
    let before = std::fs::read(libvirtd.image("vda")).unwrap();

    let mount = mount(&libvirtd, Home::new());
    assert_eq!(mount.list("checkpoints"), ["mon", "tue"]);
    mount.mkdir("backups/b").unwrap();
    disk.assert_file(&mount.path("backups/b/disk.raw"));
    for (checkpoint, dirty) in [
        ("mon", vec![(2 * MIB, 65536), (3 * MIB, 65536)]),
        ("tue", vec![(3 * MIB, 65536)]),
    ] {
        let map = mount.read(&format!("backups/b/since/{checkpoint}/vda.map"));
        assert_eq!(model::dirty_extents(&parse_map(&map)), dirty);
    }
    assert_eq!(errno(mount.mkdir("checkpoints/no")), libc::EOPNOTSUPP);
    assert!(mount.last_error().contains("was not running"));
    mount.rmdir("backups/b").unwrap();
    assert_eq!(errno(mount.rmdir("checkpoints/mon")), libc::EROFS);
    // QEMU cannot lock the image; libvirt says so, or that QEMU ended.
    assert!(libvirtd.try_virsh(&["start", "vm"]).is_err());
    assert_eq!(mount.umount().leftovers(), NOTHING);
    assert!(before == std::fs::read(libvirtd.image("vda")).unwrap());
    libvirtd.virsh(&["start", "--paused", "vm"]);
    let still = libvirtd.virsh(&["checkpoint-dumpxml", "--size", "vm", "mon"]);
    assert!(still.contains("size='131072'"), "{still}");
}

/// A guest without an agent cannot be quiesced: that refuses the backup, and nothing is left of it.
#[test]
fn a_guest_without_an_agent_is_not_quiesced() {
    let (Some(libvirtd), Some(())) = (libvirtd(), fuse()) else {
        return;
    };
    libvirtd.domain(&[4 * MIB]);
    // A paused guest could not freeze anything either.
    libvirtd.virsh(&["resume", "vm"]);
    let mount = Fleecefs::libvirt(&libvirtd.uri()).option("quiesce").mount();
    assert!(mount.mkdir("backups/b").is_err());
    assert!(
        mount.last_error().contains("agent"),
        "{}",
        mount.last_error()
    );
    assert_eq!(names(&libvirtd), [] as [&str; 0]);
    assert!(libvirtd.try_virsh(&["backup-dumpxml", "vm"]).is_err());
    assert_eq!(mount.umount().leftovers(), NOTHING);
}

/// As AppArmor or SELinux would have it, which are not to be had here: QEMU may not make its socket.
#[test]
fn a_socket_that_qemu_may_not_make_is_a_refusal_that_says_so() {
    let (Some(libvirtd), Some(())) = (libvirtd(), fuse()) else {
        return;
    };
    libvirtd.domain(&[4 * MIB]);
    let mount = mount(&libvirtd, Home::new());
    let runtime = mount.home().path("runtime");
    std::fs::set_permissions(&runtime, std::fs::Permissions::from_mode(0o700)).unwrap();
    assert_eq!(errno(mount.mkdir("backups/b")), libc::EPERM);
    let said = mount.last_error();
    assert!(
        said.contains("Permission denied") && said.contains("AppArmor"),
        "{said}"
    );
    assert_eq!(names(&libvirtd), [] as [&str; 0]);
    std::fs::set_permissions(&runtime, std::fs::Permissions::from_mode(0o711)).unwrap();
    mount.mkdir("backups/b").unwrap();
    assert_eq!(mount.umount().leftovers(), NOTHING);
}

/// libvirt hands its bitmaps on to a snapshot's image, so that nothing is missed; a disk that was resized
/// has places that no bitmap tells of, and libvirt says nothing of that.
#[test]
fn a_snapshot_breaks_nothing_and_a_resized_disk_does() {
    let (Some(libvirtd), Some(())) = (libvirtd(), fuse()) else {
        return;
    };
    libvirtd.domain(&[8 * MIB, 4 * MIB]);
    let mount = mount(&libvirtd, Home::new());
    let write = |target, at, pattern| libvirtd.cluster(target, at, pattern);
    mount.mkdir("checkpoints/mon").unwrap();
    write("vda", 1, 1);
    libvirtd.snapshot("s");
    write("vda", 2, 2);
    mount.mkdir("backups/tue").unwrap();
    let both = [(MIB, 65536), (2 * MIB, 65536)];
    assert_eq!(mount.since("tue", "mon", "vda"), both);
    let bytes = std::fs::read(mount.path("backups/tue/raw/vda.raw")).unwrap();
    assert_eq!((bytes[MIB as usize], bytes[2 * MIB as usize]), (1, 2));
    mount.rmdir("backups/tue").unwrap();

    libvirtd.virsh(&["blockresize", "vm", "vda", "12M"]);
    write("vdb", 1, 3);
    let broken = |mount: &Fleecefs, says: &str| {
        let status = mount.read("checkpoints/tue/status");
        assert!(status.contains(says), "{status}");
    };
    broken(&mount, "had 8388608 bytes then and has 12582912 now");
    // What was seen outlives the mount.
    let home = mount.umount();
    libvirtd.virsh(&["blockresize", "vm", "vda", "16M"]);
    let mount = self::mount(&libvirtd, home);
    broken(&mount, "had 8388608 bytes then and has 16777216 now");
    mount.mkdir("backups/wed").unwrap();
    let map = std::fs::read(mount.path("backups/wed/since/tue/vda.map"));
    assert!(map.is_err(), "{map:?}");
    assert_eq!(
        mount.since("wed", "tue", "vdb"),
        [(MIB, 65536)],
        "not resized"
    );
    let raw = mount.path("backups/wed/raw/vda.raw");
    assert_eq!(std::fs::metadata(raw).unwrap().len(), 16 * MIB);
    mount.rmdir("backups/wed").unwrap();
    write("vda", 15, 4);
    mount.mkdir("backups/thu").unwrap();
    assert_eq!(mount.since("thu", "wed", "vda"), [(15 * MIB, 65536)]);
    mount.rmdir("backups/thu").unwrap();
    for checkpoint in ["mon", "tue", "wed", "thu"] {
        mount.rmdir(&format!("checkpoints/{checkpoint}")).unwrap();
    }
    assert_eq!(names(&libvirtd), [] as [&str; 0]);
    assert_eq!(mount.umount().leftovers(), NOTHING);
}

/// A domain that was saved and restored knows its bitmaps only when it runs again; until then nothing is
/// said of them, lest a checkpoint seem broken that is not.
#[test]
fn a_saved_domain_keeps_its_checkpoints() {
    let (Some(libvirtd), Some(())) = (libvirtd(), fuse()) else {
        return;
    };
    libvirtd.domain(&[4 * MIB]);
    let mount = mount(&libvirtd, Home::new());
    mount.mkdir("checkpoints/mon").unwrap();
    let write = |at| libvirtd.cluster("vda", at, 1);
    write(1);
    let saved = libvirtd.dir().join("saved");
    libvirtd.virsh(&["resume", "vm"]);
    libvirtd.virsh(&["save", "vm", text(&saved)]);
    libvirtd.virsh(&["restore", "--paused", text(&saved)]);
    eventually("the domain's return", DEADLINE, || {
        let status = mount.read("status");
        status.contains("state: connected").then_some(())
    });
    assert_eq!(errno(mount.mkdir("backups/early")), libc::EBUSY);
    let said = mount.last_error();
    assert!(said.contains("has not run since"), "{said}");
    libvirtd.virsh(&["resume", "vm"]);
    libvirtd.virsh(&["suspend", "vm"]);
    write(2);
    mount.mkdir("backups/tue").unwrap();
    let map = parse_map(&mount.read("backups/tue/since/mon/vda.map"));
    let both = [(MIB, 65536), (2 * MIB, 65536)];
    assert_eq!(model::dirty_extents(&map), both);
    assert_eq!(mount.umount().leftovers(), NOTHING);
}

/// A bitmap that libvirt has no record of is in the way of a checkpoint of its name.
#[test]
fn a_bitmap_without_a_record_is_in_the_way() {
    let (Some(libvirtd), Some(())) = (libvirtd(), fuse()) else {
        return;
    };
    libvirtd.domain(&[4 * MIB]);
    libvirtd.virsh(&["checkpoint-create-as", "vm", "mon"]);
    libvirtd.virsh(&["checkpoint-delete", "--metadata", "vm", "mon"]);
    let mount = mount(&libvirtd, Home::new());
    assert_eq!(errno(mount.mkdir("checkpoints/mon")), libc::EEXIST);
    assert!(mount.last_error().contains("no record of it"));
    assert_eq!(mount.umount().leftovers(), NOTHING);
}

/// A disk that another process serves cannot be frozen: it is named, and the others can be backed up.
#[test]
fn a_disk_of_another_process_is_refused_by_name() {
    need!("qemu-storage-daemon", "qemu-img");
    let (Some(libvirtd), Some(())) = (libvirtd(), fuse()) else {
        return;
    };
    let (image, socket) = (libvirtd.image("vdb"), libvirtd.dir().join("vhost.sock"));
    common::image::create(&image, "qcow2", 4 * MIB, "");
    let node = format!(
        "qcow2,node-name=disk,file.driver=file,file.filename={}",
        text(&image)
    );
    let export = format!(
        "vhost-user-blk,id=disk,node-name=disk,writable=on,addr.type=unix,addr.path={}",
        text(&socket)
    );
    let daemon = Command::new("qemu-storage-daemon")
        .args([
            "--blockdev",
            &format!("driver={node}"),
            "--export",
            &format!("type={export}"),
        ])
        .spawn();
    let _daemon = Ends(daemon.unwrap());
    eventually("the daemon", DEADLINE, || socket.exists().then_some(()));
    std::fs::set_permissions(&socket, std::fs::Permissions::from_mode(0o777)).unwrap();
    let more = format!(
        "<disk type='vhostuser' device='disk'><driver name='qemu' type='raw'/>\
         <source type='unix' path='{}'/><target dev='vdb' bus='virtio'/></disk>",
        text(&socket)
    );
    libvirtd.domain_with(&[4 * MIB], &more);
    let mount = mount(&libvirtd, Home::new());
    assert_eq!(errno(mount.mkdir("backups/all")), libc::EOPNOTSUPP);
    let said = mount.last_error();
    assert!(said.contains("disk vdb cannot be backed up"), "{said}");
    let document = "<domainbackup mode='pull'><disks><disk name='vda'/></disks></domainbackup>";
    std::fs::write(mount.path("backups/one.xml"), document).unwrap();
    assert_eq!(mount.list("backups/one/raw"), ["vda.raw"]);
    assert_eq!(mount.umount().leftovers(), NOTHING);
}

/// A process that is ended with the test.
struct Ends(std::process::Child);

impl Drop for Ends {
    fn drop(&mut self) {
        common::process::end(&mut self.0, Duration::from_secs(5));
    }
}

/// Somebody else's job that is no backup: nobody waits for it, and the sentence names it.
#[test]
fn a_job_of_somebody_else_is_named_at_once() {
    let (Some(libvirtd), Some(())) = (libvirtd(), fuse()) else {
        return;
    };
    libvirtd.domain(&[4 * MIB]);
    libvirtd.virsh(&["resume", "vm"]);
    let mount = mount(&libvirtd, Home::new());
    mount.mkdir("checkpoints/mon").unwrap();
    let saved = libvirtd.dir().join("saved");
    std::thread::scope(|scope| {
        let save = scope.spawn(|| libvirtd.try_virsh(&["save", "vm", text(&saved)]));
        // libvirt's helper writes the file; while it is halted, the save goes on.
        let helper = eventually("the helper", DEADLINE, || {
            let all = common::process::naming(&saved);
            all.into_iter().find(|(_, line)| line.contains("iohelper"))
        });
        common::process::signal(helper.0, libc::SIGSTOP);
        eventually("the job", DEADLINE, || {
            let info = libvirtd.try_virsh(&["domjobinfo", "vm"]).ok()?;
            info.contains("Save").then_some(())
        });
        for made in ["checkpoints/tue", "backups/tue"] {
            assert_eq!(errno(mount.mkdir(made)), libc::EBUSY, "{made}");
            let said = mount.last_error();
            assert!(said.contains("a save that someone else began"), "{said}");
        }
        assert_eq!(errno(mount.rmdir("checkpoints/mon")), libc::EBUSY);
        common::process::signal(helper.0, libc::SIGCONT);
        save.join().unwrap().unwrap();
    });
    assert_eq!(mount.umount().leftovers(), NOTHING);
}

/// A domain that libvirt no longer knows is lost until it is defined and runs again.
#[test]
fn an_undefined_domain_may_come_back() {
    let (Some(libvirtd), Some(())) = (libvirtd(), fuse()) else {
        return;
    };
    libvirtd.domain(&[4 * MIB]);
    let document = libvirtd.dir().join("again.xml");
    std::fs::write(&document, libvirtd.virsh(&["dumpxml", "--inactive", "vm"])).unwrap();
    let mount = mount(&libvirtd, Home::new());
    mount.mkdir("backups/b").unwrap();
    // Undefined while it runs, it is gone when it ends.
    libvirtd.virsh(&["undefine", "--checkpoints-metadata", "vm"]);
    std::fs::read(mount.path("backups/b/dirty.map")).unwrap();
    libvirtd.virsh(&["destroy", "vm"]);
    let becomes = |file: &str, words: &str| {
        eventually(words, DEADLINE, || {
            let status = mount.read(file);
            status.contains(words).then_some(status)
        })
    };
    let status = becomes("backups/b/status", "state: failed");
    assert!(status.contains("undefined"), "{status}");
    becomes("status", "state: lost");
    assert!(std::fs::read(mount.path("backups/b/disk.raw")).is_err());
    mount.rmdir("backups/b").unwrap();
    assert_eq!(errno(mount.mkdir("backups/no")), libc::ENOTCONN);

    libvirtd.virsh(&["define", text(&document)]);
    libvirtd.virsh(&["start", "--paused", "vm"]);
    becomes("status", "state: connected");
    mount.mkdir("backups/again").unwrap();
    assert_eq!(mount.umount().leftovers(), NOTHING);
}

/// Reads in the moment of somebody else's abort may be newer than the instant: whoever ends the backup
/// right after that is told, once, and so are those who follow its events.
#[test]
fn an_end_that_comes_after_an_abort_is_no_success() {
    let (Some(libvirtd), Some(())) = (libvirtd(), fuse()) else {
        return;
    };
    libvirtd.domain(&[4 * MIB]);
    let mount = mount(&libvirtd, Home::new());
    for name in ["a", "b", "c"] {
        let backup = format!("backups/{name}");
        mount.mkdir(&backup).unwrap();
        libvirtd.virsh(&["domjobabort", "vm"]);
        // Unless the guard has seen it first.
        if let Err(first) = mount.rmdir(&backup) {
            assert_eq!(first.raw_os_error(), Some(libc::EIO), "{first}");
            let said = mount.last_error();
            assert!(said.contains("thrown away"), "{said}");
            mount.rmdir(&backup).unwrap();
        }
    }
    let events = mount.read("events");
    assert_eq!(events.matches("\"failed\"").count(), 3, "{events}");
    assert!(!events.contains("\"completed\""), "{events}");
    assert_eq!(mount.umount().leftovers(), NOTHING);
}

/// libvirt begins a backup, and only then writes down its checkpoint. If it cannot, QEMU's jobs stay.
#[test]
fn a_begin_that_libvirt_cannot_write_down_leaves_nothing() {
    let (Some(libvirtd), Some(())) = (libvirtd(), fuse()) else {
        return;
    };
    libvirtd.domain(&[4 * MIB]);
    let mount = mount(&libvirtd, Home::new());
    let long = "b".repeat(248);
    for made in ["backups", "checkpoints"] {
        let refused = mount.mkdir(&format!("{made}/{long}"));
        assert_eq!(errno(refused), libc::ENAMETOOLONG, "{made}");
    }
    let records = libvirtd.dir().join("var/lib/libvirt/qemu/checkpoint");
    std::fs::create_dir_all(&records).unwrap();
    std::fs::write(records.join("vm"), "in the way").unwrap();
    assert_eq!(errno(mount.mkdir("backups/b")), libc::EIO);
    assert!(libvirtd.try_virsh(&["backup-dumpxml", "vm"]).is_err());
    let jobs = libvirtd.qmp("query-jobs", serde_json::json!({}));
    assert_eq!(jobs, serde_json::json!([]));
    std::fs::remove_file(records.join("vm")).unwrap();
    mount.mkdir("backups/c").unwrap();
    mount.rmdir("backups/c").unwrap();
    assert_eq!(mount.umount().leftovers(), NOTHING);
}
