//! Pull backups: what was frozen, what changed, and several at once.

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::os::unix::fs::FileExt;
use std::process::{Child, Command, Stdio};

use crate::common::mount::FLEECEFS;
use crate::common::tools::{need, run, text};
use crate::common::{Disk, errno, image};
use crate::story::Story;
use crate::world::{DISKS, Since};

/// Full on the first night, and what changed on the others, while the guest goes on writing.
pub fn nights_of_random_writes(story: &mut Story) {
    story.scatter();
    for name in ["n0", "n1", "n2", "n3"] {
        story.scatter();
        let night = story.backup(name);
        story.scatter();
        story.holds(&night);
        // Read to the end while still more is written.
        story.scatter();
        night.disks[0].assert_file(&story.tree.path(&format!("backups/{name}/disk.raw")));
        let status = |key| story.tree.status(&format!("backups/{name}/status"), key);
        let base = night.marks.last().map_or("none", |mark| &mark.name);
        assert_eq!(status("state").unwrap(), "running");
        assert_eq!(status("base").unwrap(), base);
        assert_eq!(status("checkpoint").unwrap(), name);
        assert_eq!(
            status("since-base-only-because").is_some(),
            story.facts().since == Since::Base
        );
        story.end(name);
    }
    story.remount(&[]);
    story.look();
}

/// The disks as images of their own, and what changed as images on top of them.
pub fn images_make_a_chain(story: &mut Story) {
    need!("qemu-img");
    let kept = crate::common::tools::temp_dir();
    let copy = |story: &Story, from: &str, disk: &str, night: &str| {
        let dir = kept.path().join(disk);
        fs::create_dir_all(&dir).unwrap();
        let to = dir.join(format!("{night}.qcow2"));
        fs::copy(story.tree.path(from), &to).unwrap();
        to
    };
    story.scatter();
    story.backup("mon");
    for (target, _) in DISKS {
        let from = format!("backups/mon/qcow2/{target}.qcow2");
        copy(story, &from, target, "mon");
    }
    story.end("mon");
    story.scatter();
    let tue = story.backup("tue");
    story.scatter();
    for (disk, (target, _)) in DISKS.iter().enumerate() {
        let whole = format!("backups/tue/qcow2/{target}.qcow2");
        let whole = copy(story, &whole, target, "whole");
        let changed = format!("backups/tue/since/mon/{target}.qcow2");
        let changed = copy(story, &changed, target, "tue");
        for path in [&whole, &changed] {
            run("qemu-img", &["check", "-q", "-f", "qcow2", text(path)]);
            tue.disks[disk].assert_is(&image::bytes(path, "qcow2"), text(path));
        }
    }
    story.end("tue");
}

pub fn an_existing_checkpoint_is_used(story: &mut Story) {
    story.checkpoint("mon");
    story.scatter();
    story.checkpoint("tue");
    // In the backup, and listed again by the next one.
    story.scatter();
    let mut tue = story.instant("tue");
    tue.base = Some("mon".into());
    story.tree.mkdir("backups/tue").unwrap();
    assert_eq!(story.tree.list("checkpoints"), ["mon", "tue"]);
    let status = |key| story.tree.status("backups/tue/status", key).unwrap();
    assert_eq!(
        (status("base"), status("checkpoint")),
        ("mon".into(), "tue".into())
    );
    story.holds(&tue);
    story.end("tue");
    let wed = story.backup("wed");
    story.holds(&wed);
    story.end("wed");
}

/// Each shows its own instant, in whatever order they end; or the second one is refused.
pub fn two_at_once(story: &mut Story) {
    story.scatter();
    let one = story.backup("one");
    story.scatter();
    let running = story.world.state();
    assert_eq!(errno(story.tree.mkdir("backups/one")), libc::EEXIST);
    if !story.facts().several_backups {
        story.refused(story.tree.mkdir("backups/two"), libc::EBUSY, "one backup");
        assert_eq!(story.tree.list("backups"), ["one"]);
        assert_eq!(story.tree.list("checkpoints"), ["one"]);
        assert_eq!(story.world.state(), running);
        story.holds(&one);
        story.end("one");
        let two = story.backup("two");
        story.holds(&two);
        story.end("two");
        return;
    }
    let two = story.backup("two");
    story.scatter();
    story.holds(&one);
    story.holds(&two);
    let current = |backup: &str| {
        story
            .tree
            .status(&format!("backups/{backup}/status"), "current")
    };
    assert_eq!(current("one").unwrap(), "yes");
    assert_eq!(current("two").unwrap(), "no");
    story.end("one");
    story.scatter();
    story.holds(&two);
    let three = story.backup("three");
    story.scatter();
    // The one that began last ends first.
    story.end("three");
    story.scatter();
    story.holds(&two);
    assert_eq!(three.marks.len(), 2);
    story.end("two");
}

/// A checkpoint in use, and a file that is open when its backup ends.
pub fn what_a_running_backup_needs_stays(story: &mut Story) {
    story.checkpoint("mon");
    // Data far from what is read first, so that the kernel has not read ahead of it.
    story.fill(0, 0, DISKS[0].1, 7);
    let tue = story.backup("tue");
    story.scatter();
    let before = story.world.state();
    let busy = story.tree.rmdir("checkpoints/mon");
    story.refused(busy, libc::EBUSY, "backup tue");
    let busy = story.tree.say("checkpoints/mon/control", "forget");
    story.refused(busy, libc::EBUSY, "backup tue");
    let busy = Command::new(FLEECEFS)
        .args(["checkpoint", "delete", "mon"])
        .arg(story.tree.path(""))
        .output()
        .unwrap();
    assert!(!busy.status.success());
    assert_eq!(story.world.state(), before);
    // Its own, and later ones, are made and deleted meanwhile.
    story.checkpoint("later");
    story.scatter();
    story.delete("tue");
    story.delete("later");
    story.holds(&tue);

    let file = File::open(story.tree.path("backups/tue/raw/vda.raw")).unwrap();
    let unread = File::open(story.tree.path("backups/tue/qcow2/vda.qcow2")).unwrap();
    story.end("tue");
    assert_eq!(
        errno(fs::metadata(story.tree.path("backups/tue"))),
        libc::ENOENT
    );
    assert_eq!(errno(story.tree.rmdir("backups/tue")), libc::ENOENT);
    // What the kernel has kept is the instant all the same; nothing else is read.
    let mut found = vec![0; 4096];
    if let Ok(read) = file.read_at(&mut found, 0) {
        assert!(found[..read] == tue.disks[0].bytes()[..read]);
    }
    assert_eq!(errno(unread.read_at(&mut found, 2 << 20)), libc::ENOTCONN);
    story.look();
}

/// Ends with whoever started it.
struct Follower(Child);

impl Drop for Follower {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// status, jobs and events, of a backup that is ended and of one that is aborted.
pub fn an_end_is_told(story: &mut Story) {
    let mut follower = Command::new(FLEECEFS)
        .args(["events", "--all"])
        .arg(story.tree.path(""))
        .stdout(Stdio::piped())
        .spawn()
        .map(Follower)
        .unwrap();
    story.scatter();
    story.backup("mon");
    let jobs = || run(FLEECEFS, &["jobs", text(&story.tree.path(""))]);
    assert!(jobs().contains("mon"), "{}", jobs());
    let pulled = || {
        story
            .tree
            .status("backups/mon/status", "bytes-pulled")
            .unwrap()
    };
    assert_eq!(pulled(), "0");
    fs::read(story.tree.path("backups/mon/disk.raw")).unwrap();
    assert_ne!(pulled(), "0");
    story.tree.rmdir("backups/mon").unwrap();
    story.backup("tue");
    let control = "backups/tue/control";
    for word in ["pause", "speed 5M"] {
        story.refused(story.tree.say(control, word), libc::EOPNOTSUPP, "abort");
    }
    story.tree.say(control, "abort").unwrap();
    let state = || story.tree.status("backups/tue/status", "state").unwrap();
    assert_eq!(state(), "aborted");
    let read = fs::read(story.tree.path("backups/tue/disk.raw"));
    assert_eq!(errno(read), libc::ENOTCONN);
    assert_eq!(story.tree.list("backups"), ["tue"]);
    story.end("tue");
    let events = story.tree.read("events");
    let told: Vec<(String, String, String)> = events
        .lines()
        .map(|line| {
            let event: serde_json::Value = serde_json::from_str(line).unwrap();
            let word = |key: &str| event[key].as_str().unwrap().to_owned();
            (word("event"), word("name"), word("outcome"))
        })
        .collect();
    let event = |name: &str, outcome: &str| {
        (
            "job-completed".to_owned(),
            name.to_owned(),
            outcome.to_owned(),
        )
    };
    assert_eq!(told, [event("mon", "completed"), event("tue", "aborted")]);
    // The command prints the same lines as they come.
    let mut printed = String::new();
    let mut lines = BufReader::new(follower.0.stdout.take().unwrap());
    while printed.len() < events.len() {
        assert!(
            lines.read_line(&mut printed).unwrap() > 0,
            "it ended: {printed}"
        );
    }
    assert_eq!(printed, events);
}

/// With `-o checkpoint=no` nothing is left in the images.
pub fn without_checkpoints(story: &mut Story) {
    story.remount(&["checkpoint=no"]);
    let before = story.world.state();
    for name in ["mon", "tue"] {
        story.scatter();
        story.tree.mkdir(&format!("backups/{name}")).unwrap();
        let instant = story.instant(name);
        story.scatter();
        story.holds(&instant);
        let files = story.tree.list(&format!("backups/{name}"));
        assert!(!files.contains(&"checkpoint.xml".to_owned()), "{files:?}");
        story.end(name);
        assert_eq!(story.world.state(), before);
    }
    assert_eq!(story.tree.list("checkpoints"), [""; 0]);
    assert!(story.disks[0] != Disk::new(DISKS[0].1));
}
