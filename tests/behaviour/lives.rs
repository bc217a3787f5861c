//! Ends of a mount and of its domain, and somebody else in between.

use std::fs;

use crate::common::tools::{DEADLINE, eventually};
use crate::common::{Disk, Write, errno, model, parse_map};
use crate::story::{Story, without_checkpoints};
use crate::world::DISKS;

/// A backup's reads fail, its status says why, and it can be ended.
fn is_lost(story: &mut Story, backup: &str) {
    let status = format!("backups/{backup}/status");
    eventually("the failure", DEADLINE, || {
        (story.tree.status(&status, "state").unwrap() == "failed").then_some(())
    });
    assert!(story.tree.status(&status, "why").is_some());
    let read = fs::read(story.tree.path(&format!("backups/{backup}/disk.raw")));
    assert_eq!(errno(read), libc::ENOTCONN);
}

fn is_back(story: &mut Story) {
    story.world.start_domain();
    eventually("the domain's return", DEADLINE, || {
        (story.tree.status("status", "state").unwrap() == "connected").then_some(())
    });
}

/// Checkpoints stay, and so does what is known of changes.
pub fn an_unmount_ends_what_runs(story: &mut Story) {
    let before = story.world.state();
    story.checkpoint("mon");
    story.scatter();
    story.backup("tue");
    story.scatter();
    story.world.unmount();
    let after = without_checkpoints(story.world.state());
    assert_eq!(after, without_checkpoints(before));
    // Nobody looks, and still it is recorded.
    story.scatter();
    story.mount(&[]);
    assert_eq!(story.tree.list("backups"), [""; 0]);
    assert_eq!(story.tree.list("checkpoints"), ["mon", "tue"]);
    story.look();
}

pub fn a_domain_that_ends_and_comes_back(story: &mut Story) {
    story.checkpoint("mon");
    story.scatter();
    story.backup("tue");
    story.scatter();
    story.world.end_domain(false);
    is_lost(story, "tue");
    eventually("the loss", DEADLINE, || {
        (story.tree.status("status", "state").unwrap() == "lost").then_some(())
    });
    assert!(story.tree.status("status", "why").is_some());
    for dir in ["backups/wed", "checkpoints/wed"] {
        story.refused(story.tree.mkdir(dir), libc::ENOTCONN, dir);
    }
    // What was known is still shown, and the remains are removed without the domain.
    assert_eq!(story.tree.list("checkpoints"), ["mon", "tue"]);
    story.end("tue");
    is_back(story);
    story.scatter();
    story.look();
    let events = story.tree.read("events");
    let told = events
        .lines()
        .find(|line| line.contains("\"name\":\"tue\""));
    assert!(told.unwrap().contains("\"outcome\":\"failed\""), "{events}");
}

/// What asks it is refused at the deadline, what asks nobody goes on, and what was refused has not
/// happened when it answers again.
pub fn a_hung_domain_is_no_hung_mount(story: &mut Story) {
    story.checkpoint("mon");
    story.scatter();
    story.remount(&["timeout=2"]);
    let before = story.world.state();
    story.world.hang(true);
    story.refused(
        story.tree.mkdir("backups/tue"),
        libc::ETIMEDOUT,
        "backup tue",
    );
    assert_eq!(story.tree.list("checkpoints"), ["mon"]);
    assert_eq!(story.tree.list("backups"), [""; 0]);
    assert!(
        story
            .tree
            .read("checkpoints/mon/checkpoint.xml")
            .contains("mon")
    );
    story.world.hang(false);
    eventually("a checkpoint", DEADLINE, || {
        story.tree.mkdir("checkpoints/wed").ok()
    });
    story.tree.rmdir("checkpoints/wed").unwrap();
    assert_eq!(story.world.state(), before);
    story.remount(&[]);
    story.look();
}

/// Its bitmaps were not saved: the next copy is a full one, and a new history begins with it.
pub fn a_killed_domain_breaks_its_history(story: &mut Story) {
    story.checkpoint("mon");
    story.scatter();
    story.backup("tue");
    story.world.end_domain(true);
    is_lost(story, "tue");
    story.end("tue");
    is_back(story);
    story.marks.clear();
    // What QEMU had not flushed is lost to the guest, as in a power cut.
    for (disk, (_, size)) in DISKS.iter().enumerate() {
        story.fill(disk, 0, *size, 9);
    }
    for name in ["mon", "tue"] {
        let status = story.tree.read(&format!("checkpoints/{name}/status"));
        assert!(status.contains("state: broken"), "{status}");
    }
    story.tree.mkdir("backups/wed").unwrap();
    assert_eq!(story.tree.list("backups/wed/since"), [""; 0]);
    let changes = fs::read(story.tree.path("backups/wed/dirty.map"));
    story.refused(changes, libc::ESTALE, "dirty.map");
    for (model, target) in story.disks.iter().zip(["vda", "vdb"]) {
        model.assert_file(&story.tree.path(&format!("backups/wed/raw/{target}.raw")));
    }
    story.mark("wed");
    story.end("wed");
    story.scatter();
    story.look();
    for name in ["mon", "tue"] {
        story.delete(name);
    }
    assert_eq!(story.tree.list("checkpoints"), ["wed"]);
    story.look();
}

/// No bitmap tells of what there was beyond an end that was moved; of the other disks all is known.
pub fn a_resized_disk_breaks_its_history(story: &mut Story) {
    story.checkpoint("mon");
    story.scatter();
    let larger = DISKS[0].1 + (1 << 20);
    story.world.resize("vda", larger);
    let mut bytes = story.disks[0].bytes().to_vec();
    bytes.resize(usize::try_from(larger).unwrap(), 0);
    story.disks[0] = Disk::holding(bytes);
    let status = story.tree.read("checkpoints/mon/status");
    assert!(status.contains("  vda:\n    state: broken\n"), "{status}");
    assert!(status.contains("  vdb:\n    state: trusted\n"), "{status}");
    story.tree.mkdir("backups/tue").unwrap();
    let read = |name: &str| story.tree.path(&format!("backups/tue/{name}"));
    for (model, target) in story.disks.iter().zip(["vda", "vdb"]) {
        model.assert_file(&read(&format!("raw/{target}.raw")));
    }
    let dirty = fs::read(read("dirty.map"));
    story.refused(dirty, libc::ESTALE, "dirty.map");
    assert_eq!(errno(fs::read(read("since/mon/vda.map"))), libc::ENOENT);
    let map = parse_map(&story.tree.read("backups/tue/since/mon/vdb.map"));
    assert_eq!(
        model::dirty_extents(&map),
        story.marks[0].written[1].extents()
    );
    story.tree.rmdir("backups/tue").unwrap();
    // History goes on from the checkpoint that was made with it.
    let behind = Write {
        offset: DISKS[0].1,
        length: 4096,
        pattern: 5,
    };
    story.world.guest_writes(&[("vda", behind)]);
    story.tree.mkdir("backups/wed").unwrap();
    let map = parse_map(&story.tree.read("backups/wed/since/tue/vda.map"));
    let granule = story.facts().granule;
    assert_eq!(model::dirty_extents(&map), [(DISKS[0].1, granule)]);
    story.end("wed");
}

pub fn somebody_else_has_what_is_needed(story: &mut Story) {
    story.checkpoint("mon");
    story.scatter();
    let words = story.facts().intruder;
    story.world.intrude(true);
    let theirs = story.world.state();
    for _ in 0..2 {
        story.refused(story.tree.mkdir("backups/tue"), libc::EBUSY, words);
        assert_eq!(story.tree.list("backups"), [""; 0]);
        assert_eq!(story.world.state(), theirs);
        // What is somebody else's is not tidied away either.
        story.remount(&[]);
    }
    // Fails if it is gone.
    story.world.intrude(false);
    story.look();
}

/// SIGKILL leaves the backup in the domain; the next mount takes it out.
pub fn killed_with_a_backup_running(story: &mut Story) {
    let before = story.world.state();
    story.checkpoint("mon");
    story.scatter();
    story.backup("tue");
    story.scatter();
    let mut made = vec!["mon", "tue"];
    if story.facts().several_backups {
        story.backup("wed");
        made.push("wed");
    }
    story.world.kill();
    assert_ne!(
        without_checkpoints(story.world.state()),
        without_checkpoints(before.clone())
    );
    story.mount(&[]);
    assert_eq!(story.tree.list("backups"), [""; 0]);
    assert_eq!(story.tree.list("checkpoints"), made);
    let after = without_checkpoints(story.world.state());
    assert_eq!(after, without_checkpoints(before));
    story.scatter();
    story.look();
}
