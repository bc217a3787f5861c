//! Domains of a real libvirtd, through a mount: what makes a checkpoint of libvirt's untrustworthy, and that
//! nothing that changed is missed while it seems sound.
#![cfg(feature = "libvirt")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use common::Fleecefs;
use common::libvirtd::{Libvirtd, libvirtd};
use common::mount::Home;
use common::tools::{DEADLINE, eventually, fuse, need, run, text};
use serde_json::{Value, json};

const MIB: u64 = 1 << 20;
const NOTHING: [std::path::PathBuf; 0] = [];

fn mount(libvirtd: &Libvirtd, home: Home) -> Fleecefs {
    Fleecefs::libvirt(&libvirtd.uri()).home(home).mount()
}

/// A snapshot's image has bitmaps of the same names, begun anew: what was recorded before is on the images
/// below, and counts when the domain is off as when it runs.
#[test]
fn a_stopped_domain_has_what_was_recorded_before_its_snapshots() {
    need!("qemu-img");
    let (Some(libvirtd), Some(())) = (libvirtd(), fuse()) else {
        return;
    };
    libvirtd.domain(&[16 * MIB, 4 * MIB]);
    let write = |at| libvirtd.cluster("vda", at, 1);
    libvirtd.virsh(&["checkpoint-create-as", "vm", "mon"]);
    let mut written = vec![write(1)];
    libvirtd.snapshot("s");
    written.push(write(3));
    libvirtd.virsh(&["checkpoint-create-as", "vm", "tue"]);
    written.push(write(5));
    libvirtd.snapshot("t");
    libvirtd.snapshot("u");
    libvirtd.virsh(&["checkpoint-create-as", "vm", "wed"]);
    written.push(write(7));
    libvirtd.virsh(&["destroy", "--graceful", "vm"]);

    let mount = mount(&libvirtd, Home::new());
    mount.mkdir("backups/b").unwrap();
    for (checkpoint, first) in [("mon", 0), ("tue", 2), ("wed", 3)] {
        let dirty = mount.since("b", checkpoint, "vda");
        assert_eq!(dirty, written[first..], "{checkpoint}");
    }
    mount.rmdir("backups/b").unwrap();

    // A push backup goes by the same.
    let target = libvirtd.dir().join("inc.qcow2");
    let document = format!(
        "<domainbackup><incremental>mon</incremental><disks><disk name='vda'><driver type='qcow2'/>\
         <target file='{}'/></disk></disks></domainbackup>",
        text(&target)
    );
    std::fs::write(mount.path("backups/p.xml"), document).unwrap();
    eventually("the push", DEADLINE, || {
        let status = mount.read("backups/p/status");
        status.contains("state: completed").then_some(())
    });
    mount.rmdir("backups/p").unwrap();
    let map = run("qemu-img", &["map", "--output=json", text(&target)]);
    for (offset, _) in written {
        let there = format!("\"start\": {offset},");
        assert!(map.contains(&there), "{offset}: {map}");
    }
    assert_eq!(mount.umount().leftovers(), NOTHING);
}

/// A domain's XML, changed, and defined again; it is off.
fn redefine_domain(libvirtd: &Libvirtd, change: impl Fn(String) -> String) {
    let document = libvirtd.dir().join("changed.xml");
    let now = libvirtd.virsh(&["dumpxml", "--inactive", "vm"]);
    std::fs::write(&document, change(now)).unwrap();
    libvirtd.virsh(&["define", text(&document)]);
}

fn is_back(mount: &Fleecefs) {
    eventually("the domain's return", DEADLINE, || {
        let status = mount.read("status");
        status.contains("state: connected").then_some(())
    });
}

/// Images change places between two starts: libvirt goes by the target, and takes another disk's bitmap of
/// that name.
#[test]
fn a_disk_that_is_another_image_is_not_trusted() {
    let (Some(libvirtd), Some(())) = (libvirtd(), fuse()) else {
        return;
    };
    libvirtd.domain(&[8 * MIB, 8 * MIB]);
    // One that is not seen before the swap: libvirt's record has what the disks were.
    libvirtd.virsh(&["checkpoint-create-as", "vm", "theirs"]);
    let swap = || {
        libvirtd.virsh(&["destroy", "--graceful", "vm"]);
        redefine_domain(&libvirtd, |xml| {
            let swapped = xml.replace("vda.qcow2", "@@");
            let swapped = swapped.replace("vdb.qcow2", "vda.qcow2");
            swapped.replace("@@", "vdb.qcow2")
        });
    };
    swap();
    let broken = |mount: &Fleecefs, name: &str| {
        let status = mount.read(&format!("checkpoints/{name}/status"));
        assert!(status.contains("vda.qcow2 then and is "), "{status}");
    };
    // Off, and running.
    let mount = mount(&libvirtd, Home::new());
    broken(&mount, "theirs");
    let home = mount.umount();
    libvirtd.virsh(&["start", "--paused", "vm"]);
    let mount = self::mount(&libvirtd, home);
    broken(&mount, "theirs");
    mount.mkdir("backups/mon").unwrap();
    mount.rmdir("backups/mon").unwrap();

    swap();
    libvirtd.virsh(&["start", "--paused", "vm"]);
    is_back(&mount);
    let status = mount.read("checkpoints/mon/status");
    assert!(status.contains("vdb.qcow2 then and is "), "{status}");
    mount.mkdir("backups/tue").unwrap();
    let map = std::fs::read(mount.path("backups/tue/since/mon/vda.map"));
    assert!(map.is_err(), "{map:?}");
    assert_eq!(mount.umount().leftovers(), NOTHING);
}

/// What is the same disk: the image below a snapshot's, also when the snapshot was committed.
#[test]
fn a_disk_is_the_same_with_a_snapshot_and_without_it_again() {
    let (Some(libvirtd), Some(())) = (libvirtd(), fuse()) else {
        return;
    };
    libvirtd.domain(&[16 * MIB]);
    let mount = mount(&libvirtd, Home::new());
    mount.mkdir("checkpoints/mon").unwrap();
    let mut written = vec![libvirtd.cluster("vda", 1, 1)];
    libvirtd.snapshot("s");
    libvirtd.snapshot("t");
    written.push(libvirtd.cluster("vda", 3, 1));
    mount.mkdir("backups/tue").unwrap();
    assert_eq!(mount.since("tue", "mon", "vda"), written);
    mount.rmdir("backups/tue").unwrap();
    mount.rmdir("checkpoints/tue").unwrap();
    let commit = ["--active", "--pivot", "--wait"];
    libvirtd.virsh(&[&["blockcommit", "vm", "vda"], &commit[..]].concat());
    written.push(libvirtd.cluster("vda", 5, 1));
    mount.mkdir("backups/wed").unwrap();
    assert_eq!(mount.since("wed", "mon", "vda"), written);
    assert_eq!(mount.umount().leftovers(), NOTHING);
}

/// Two checkpoints of one second: what is remembered of one does not depend on the other.
#[test]
fn a_checkpoints_time_does_not_change() {
    let (Some(libvirtd), Some(())) = (libvirtd(), fuse()) else {
        return;
    };
    libvirtd.domain(&[8 * MIB]);
    let time = |name| {
        let document = libvirtd.virsh(&["checkpoint-dumpxml", "--no-domain", "vm", name]);
        let (_, after) = document.split_once("<creationTime>").unwrap();
        after.split('<').next().unwrap().to_owned()
    };
    loop {
        libvirtd.virsh(&["checkpoint-create-as vm a; checkpoint-create-as vm b"]);
        if time("a") == time("b") {
            break;
        }
        libvirtd.virsh(&["checkpoint-delete vm b; checkpoint-delete vm a"]);
    }
    let mount = mount(&libvirtd, Home::new());
    let shown = || {
        let document = mount.read("checkpoints/b/checkpoint.xml");
        let mut lines = document.lines().map(str::trim);
        lines
            .find(|l| l.starts_with("<creationTime>"))
            .map(str::to_owned)
    };
    let before = shown();
    assert!(!before.as_ref().unwrap().contains(&time("b")), "one later");
    libvirtd.virsh(&["blockresize", "vm", "vda", "4M"]);
    libvirtd.virsh(&["checkpoint-delete", "vm", "a"]);
    eventually("a's end", DEADLINE, || {
        (mount.list("checkpoints") == ["b"]).then_some(())
    });
    assert_eq!(shown(), before);
    let status = mount.read("checkpoints/b/status");
    assert!(status.contains("had 8388608 bytes then"), "{status}");
    assert_eq!(mount.umount().leftovers(), NOTHING);
}

/// Of a checkpoint that is broken on one disk, nothing stays on the others: it would record for ever.
#[test]
fn all_that_is_left_of_a_broken_checkpoint_is_deleted() {
    let (Some(libvirtd), Some(())) = (libvirtd(), fuse()) else {
        return;
    };
    libvirtd.domain(&[8 * MIB, 8 * MIB, 4 * MIB]);
    let mount = mount(&libvirtd, Home::new());
    for name in ["sun", "mon", "tue"] {
        mount.mkdir(&format!("checkpoints/{name}")).unwrap();
    }
    let nodes = libvirtd.qmp("query-named-block-nodes", json!({"flat": true}));
    let image = libvirtd.image("vdb");
    let is = |n: &&Value| n["drv"] == "qcow2" && n["file"] == text(&image);
    let node = nodes.as_array().unwrap().iter().find(is).unwrap()["node-name"].clone();
    let missing = json!({"node": node, "name": "mon"});
    libvirtd.qmp("block-dirty-bitmap-remove", missing);
    mount.rmdir("checkpoints/mon").unwrap();
    assert_eq!(mount.list("checkpoints"), ["sun", "tue"]);
    let parent = std::fs::read_link(mount.path("checkpoints/tue/parent")).unwrap();
    assert!(parent.ends_with("sun"), "{parent:?}");
    // No bitmap is in its way.
    mount.mkdir("checkpoints/mon").unwrap();
    for name in ["mon", "sun", "tue"] {
        mount.rmdir(&format!("checkpoints/{name}")).unwrap();
    }
    let nodes = libvirtd.qmp("query-named-block-nodes", json!({"flat": true}));
    let left = |n: &&Value| n["dirty-bitmaps"].as_array().is_some_and(|b| !b.is_empty());
    assert_eq!(nodes.as_array().unwrap().iter().find(left), None);
    assert_eq!(mount.umount().leftovers(), NOTHING);
}
