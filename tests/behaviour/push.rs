//! Push backups, which the domain writes by itself.

use std::fs;
use std::path::Path;

use crate::common::tools::{DEADLINE, eventually, need, run, text};
use crate::common::{Disk, errno, image};
use crate::story::{Instant, Story};
use crate::world::DISKS;

/// A document for disks: target, format, path.
fn document(since: Option<&str>, disks: &[(&str, &str, &Path)]) -> String {
    let since = since.map_or(String::new(), |c| format!("<incremental>{c}</incremental>"));
    let disk = |(target, format, path): &(&str, &str, &Path)| {
        format!(
            "<disk name='{target}'><driver type='{format}'/><target file='{}'/></disk>",
            text(path)
        )
    };
    let mut disks: String = disks.iter().map(disk).collect();
    if !disks.contains("'vdb'") {
        disks += "<disk name='vdb' backup='no'/>";
    }
    format!("<domainbackup mode='push'>{since}<disks>{disks}</disks></domainbackup>")
}

/// Begins a push, which makes the checkpoint as well.
fn begin(story: &mut Story, name: &str, document: &str) -> Instant {
    let put = story.tree.put(&format!("backups/{name}.xml"), document);
    put.unwrap_or_else(|e| panic!("{name}: {e}: {}", story.tree.last_error()));
    let instant = story.instant(name);
    story.mark(name);
    instant
}

/// Waits until it is over: how it ended.
fn over(story: &Story, name: &str) -> String {
    let status = format!("backups/{name}/status");
    let state = eventually("the push", DEADLINE, || {
        let state = story.tree.status(&status, "state").unwrap();
        (state != "running" && state != "paused").then_some(state)
    });
    assert_eq!(story.tree.status(&status, "mode").unwrap(), "push");
    state
}

fn written(story: &Story, path: &Path, format: &str, model: &Disk) {
    if story.facts().push_writes {
        if format == "qcow2" {
            run("qemu-img", &["check", "-q", "-f", "qcow2", text(path)]);
        }
        model.assert_is(&image::bytes(path, format), text(path));
    }
}

/// Whole, then what changed, as qcow2 images on top of each other and onto the same raw copy, while the
/// guest goes on writing.
pub fn what_is_written_is_the_instant(story: &mut Story) {
    need!("qemu-img");
    let dir = story.world.dir();
    let at = |name: &str| dir.join(name);
    story.scatter();
    let (vda, vdb) = (at("mon.qcow2"), at("mon.raw"));
    let full = document(None, &[("vda", "qcow2", &vda), ("vdb", "raw", &vdb)]);
    let mon = begin(story, "mon", &full);
    story.scatter();
    story.world.let_pushes_end();
    assert_eq!(over(story, "mon"), "completed");
    let files = [
        "backup.xml",
        "checkpoint.xml",
        "control",
        "domain.xml",
        "status",
    ];
    assert_eq!(story.tree.list("backups/mon"), files);
    let status = |key| story.tree.status("backups/mon/status", key).unwrap();
    assert_eq!(status("done"), status("total"));
    story.end("mon");
    written(story, &vda, "qcow2", &mon.disks[0]);
    written(story, &vdb, "raw", &mon.disks[1]);

    let mut below = vda;
    for (base, name) in [("mon", "tue"), ("tue", "wed")] {
        // Zeros where there was data are a change as well.
        story.fill(0, 1 << 20, 1 << 20, 0);
        story.scatter();
        let top = at(&format!("{name}.qcow2"));
        let changed = [("vda", "qcow2", &*top), ("vdb", "raw", &*vdb)];
        let changed = document(Some(base), &changed);
        let night = begin(story, name, &changed);
        story.scatter();
        story.world.let_pushes_end();
        assert_eq!(over(story, name), "completed");
        let of_base = story.tree.status(&format!("backups/{name}/status"), "base");
        assert_eq!(of_base.unwrap(), base);
        story.end(name);
        if story.facts().push_writes {
            let info = run("qemu-img", &["info", text(&top)]);
            assert!(!info.contains("backing file"), "{info}");
            let onto = ["rebase", "-q", "-u", "-f", "qcow2", "-F", "qcow2", "-b"];
            run(
                "qemu-img",
                &[&onto[..], &[text(&below), text(&top)]].concat(),
            );
        }
        written(story, &top, "qcow2", &night.disks[0]);
        written(story, &vdb, "raw", &night.disks[1]);
        below = top;
    }
    assert_eq!(story.tree.list("checkpoints"), ["mon", "tue", "wed"]);
    let events = story.tree.read("events");
    let completed = |line: &&str| line.contains("\"push\"") && line.contains("\"completed\"");
    assert_eq!(events.lines().filter(completed).count(), 3, "{events}");
    // A pull backup goes on from there.
    story.look();
}

/// Paused, resumed, slowed down and aborted; one that was quicker than that is whole.
pub fn a_push_is_steered(story: &mut Story) {
    let dir = story.world.dir();
    let target = dir.join("copy.qcow2");
    story.fill(0, 0, DISKS[0].1, 7);
    let full = document(None, &[("vda", "qcow2", &target)]);
    let instant = begin(story, "mon", &full);
    let control = |word: &str| story.tree.say("backups/mon/control", word);
    for (word, state) in [
        ("speed 64K", None),
        ("pause", Some("paused")),
        ("resume", Some("running")),
    ] {
        match control(word) {
            Ok(()) if story.facts().push_control => {
                let now = story.tree.status("backups/mon/status", "state").unwrap();
                assert!(
                    now == "completed" || state.is_none_or(|s| s == now),
                    "{word}: {now}"
                );
            }
            Ok(()) => panic!("{word} was obeyed"),
            Err(e) => match e.raw_os_error().unwrap() {
                libc::EINVAL => assert_eq!(over(story, "mon"), "completed"),
                errno => {
                    assert!(!story.facts().push_control, "{word}: {e}");
                    assert_eq!(errno, libc::EOPNOTSUPP, "{word}");
                }
            },
        }
    }
    if story.tree.status("backups/mon/status", "state").unwrap() == "running" {
        match story.tree.rmdir("backups/mon") {
            Err(e) => {
                assert_eq!(e.raw_os_error(), Some(libc::EBUSY));
                assert!(story.tree.last_error().contains("echo abort"));
            }
            // It was written in between.
            Ok(()) => return written(story, &target, "qcow2", &instant.disks[0]),
        }
    }
    let aborted = control("abort");
    let state = over(story, "mon");
    match aborted {
        Ok(()) if state == "aborted" => {
            assert!(!target.exists(), "a part of a backup looks like one");
            story.refused(control("pause"), libc::EINVAL, "mon");
        }
        _ => {
            assert_eq!(state, "completed");
            written(story, &target, "qcow2", &instant.disks[0]);
        }
    }
    story.end("mon");
    let events = story.tree.read("events");
    assert!(
        events.contains(&format!("\"outcome\":\"{state}\"")),
        "{events}"
    );
}

pub fn what_is_there_is_never_written_over(story: &mut Story) {
    let dir = story.world.dir();
    let there = dir.join("there");
    fs::write(&there, "precious").unwrap();
    let push = |path: &Path| document(None, &[("vda", "qcow2", path)]);
    let before = story.world.state();
    let put = |path: &Path| story.tree.put("backups/mon.xml", &push(path));
    story.refused(put(&there), libc::EEXIST, "there");
    assert_eq!(errno(put(&dir.join("no/such/directory"))), libc::ENOENT);
    assert_eq!(fs::read(&there).unwrap(), b"precious");
    assert_eq!(story.world.state(), before);
    assert_eq!(story.tree.list("backups"), [""; 0]);
    assert_eq!(story.tree.list("checkpoints"), [""; 0]);
}
