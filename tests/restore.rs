//! `fleecefs restore`, the built command, on files that users hold: random series against a model of
//! the disk, in all forms, into all sorts of outputs. `restore_refusals.rs` has what does not fit.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::process::Command;

use common::copies::nights;
use common::restoring::SLICE;
use common::tools::{find, is_root, need, run, skip, text};
use common::{Place, Rng, image};

const SIZE: u64 = (3 << 20) + 1536;

/// A series in which each generation is since any earlier one, given in any order.
#[test]
fn random_series() {
    need!("qemu-img");
    let mut rng = Rng::from_env();
    for round in 0..12 {
        let place = Place::new();
        let size = [0, 1, SIZE, SIZE + 77, 1 << 20][round % 5];
        let count = rng.within(1..8) as usize;
        let nights = nights(&mut rng, size, count);
        let mut dirs = Vec::new();
        for (at, night) in nights.iter().enumerate() {
            let dir = format!("copies/{}", rng.within(0..1 << 40));
            let base = at.checked_sub(1).map(|last| {
                let base = if rng.once_in(3) {
                    rng.within(0..at as u64) as usize
                } else {
                    last
                };
                (base, &nights[base])
            });
            let (path, of) = (place.path(&dir), base.map(|b| b.1));
            night.documents(&path, of);
            // The other documents are enough.
            if !rng.once_in(3) {
                fs::write(path.join("manifest"), night.manifest(of, SLICE).write()).unwrap();
            }
            match base {
                Some((base, of)) if !rng.once_in(5) => {
                    let changes = night.changes(&nights[base + 1..at]);
                    night.changes_raw(&path, &of.name, &changes);
                }
                _ => night.whole_raw(&path),
            }
            dirs.push(dir);
        }
        let until = rng.within(0..nights.len() as u64) as usize;
        let night = &nights[until];
        let mut words = vec!["--until", &night.name];
        if until == nights.len() - 1 && rng.once_in(2) {
            words.clear();
        }
        // A reader of order would be lucky.
        if rng.once_in(2) {
            dirs.sort();
            words.extend(dirs.iter().map(String::as_str));
        } else {
            words.push("copies");
        }
        let said = place.restores(&[&words[..], &["out/vda.raw"]].concat());
        night.disk.assert_file(&place.path("out/vda.raw"));
        let line = format!("restored vda of vm 1 as of {} of 2026-1", night.name);
        assert!(said.starts_with(&line), "{said}");
        if size.is_multiple_of(512) {
            let words = [&words[..], &["--format", "qcow2", "out/vda.qcow2"]].concat();
            place.restores(&words);
            night.disk.assert_is(
                &image::bytes(&place.path("out/vda.qcow2"), "qcow2"),
                "qcow2",
            );
        }
        assert!(place.left().iter().all(|name| !name.starts_with('.')));
    }
}

#[test]
fn random_slices() {
    let mut rng = Rng::from_env();
    for size in [0, 1, SLICE, SIZE, SIZE + 77] {
        let place = Place::new();
        let night = nights(&mut rng, size, 3).pop().unwrap();
        night.slices(&place.path("current"), SLICE);
        let said = place.restores(&["current", "out/vda.raw"]);
        night.disk.assert_file(&place.path("out/vda.raw"));
        assert!(
            said.starts_with("restored vda of vm 1 as of wed of 2026-11-25T22:00:00Z: "),
            "{said}"
        );
        // The same by name.
        let words = ["--disk", "vda", "--until", "wed", "current", "out/again"];
        place.restores(&words);
        night.disk.assert_file(&place.path("out/again"));
        // The same in what was copied of a backup.
        night.documents(&place.path("wed"), None);
        night.slices(&place.path("wed/slices"), SLICE);
        place.restores(&["wed", "out/third"]);
        night.disk.assert_file(&place.path("out/third"));
    }
}

/// Copies of the overlays side by side under the names that their headers expect; and the same in the
/// directories of a series.
#[test]
fn random_chains() {
    need!("qemu-img");
    let mut rng = Rng::from_env();
    for round in 0..4 {
        let place = Place::new();
        let count = rng.within(2..7) as usize;
        let nights = nights(&mut rng, [SIZE, 1 << 20][round % 2], count);
        for (at, night) in nights.iter().enumerate() {
            let beside = place.path(&format!("ch:a,in/{}.qcow2", night.name));
            let dir = place.path(&format!("series/{}", night.name));
            match at.checked_sub(1).map(|i| &nights[i]) {
                None => {
                    night.documents(&dir, None);
                    night.whole_qcow2(&beside);
                    night.whole_qcow2(&dir.join("qcow2/vda.qcow2"));
                }
                Some(base) => {
                    night.documents(&dir, Some(base));
                    let changes = night.changes(&[]);
                    night.changes_qcow2(&beside, &base.name, &changes);
                    let path = dir.join("since").join(&base.name).join("vda.qcow2");
                    night.changes_qcow2(&path, &base.name, &changes);
                }
            }
        }
        let (last, some) = (
            nights.last().unwrap(),
            &nights[rng.within(0..count as u64) as usize],
        );
        let top = format!("ch:a,in/{}.qcow2", last.name);
        for source in [top.as_str(), "series"] {
            place.restores(&[source, "out/vda.raw", "--force"]);
            last.disk.assert_file(&place.path("out/vda.raw"));
            place.restores(&["--until", &some.name, source, "out/some.raw", "--force"]);
            some.disk.assert_file(&place.path("out/some.raw"));
            place.restores(&["--format=qcow2", source, "out/vda.qcow2", "--force"]);
            last.disk
                .assert_is(&image::bytes(&place.path("out/vda.qcow2"), "qcow2"), source);
            let info = run("qemu-img", &["info", text(&place.path("out/vda.qcow2"))]);
            assert!(!info.contains("backing file"), "it stands alone: {info}");
        }
    }
}

#[test]
fn the_newest_of_several_ends() {
    let mut rng = Rng::new(2);
    let nights = nights(&mut rng, 1 << 20, 4);
    let place = Place::new();
    place.series(&nights[..2]);
    // A new series, begun before the old one was thrown away.
    nights[2].documents(&place.path("wed"), Some(&nights[1]));
    nights[2].whole_raw(&place.path("wed"));
    nights[3].documents(&place.path("thu"), Some(&nights[1]));
    let changes = nights[3].changes(&nights[2..3]);
    nights[3].changes_raw(&place.path("thu"), "tue", &changes);
    place.restores(&["thu", "mon", "wed", "tue", "out/vda.raw"]);
    nights[3].disk.assert_file(&place.path("out/vda.raw"));
    // Nothing tells which of the two is later.
    for night in ["wed", "thu"] {
        fs::remove_file(place.path(night).join("checkpoint.xml")).unwrap();
    }
    let words = ["thu", "mon", "wed", "tue", "out/x"];
    place.refuses(&words, "which generation is the newest cannot be told");
    place.restores(&[&["--until", "wed"], &words[..]].concat());
    nights[2].disk.assert_file(&place.path("out/x"));
}

/// A copy of disk.raw is one of the first disk.
#[test]
fn several_disks() {
    let mut rng = Rng::new(3);
    let night = nights(&mut rng, 1 << 20, 1).remove(0);
    let place = Place::new();
    night.documents(&place.path("mon"), None);
    night.whole_raw(&place.path("mon"));
    fs::rename(place.path("mon/raw/vda.raw"), place.path("mon/disk.raw")).unwrap();
    place.restores(&["mon", "out/one"]);
    night.disk.assert_file(&place.path("out/one"));
    fs::write(place.path("mon/raw/vdb.raw"), "other").unwrap();
    place.refuses(
        &["mon", "out/x"],
        "mon has several disks (choose one with --disk: vda, vdb)",
    );
    place.restores(&["--disk=vdb", "mon", "out/two"]);
    assert_eq!(fs::read(place.path("out/two")).unwrap(), b"other");
}

#[test]
fn the_output() {
    let mut rng = Rng::new(6);
    let mut night = nights(&mut rng, SIZE, 1).remove(0);
    // Long zeros, as data.
    let write = common::Write {
        offset: 65536,
        length: 2 << 20,
        pattern: 0,
    };
    night.disk.apply(write);
    let place = Place::new();
    night.slices(&place.path("current"), SLICE);
    place.restores(&["current", "out/vda.raw"]);
    let meta = fs::metadata(place.path("out/vda.raw")).unwrap();
    assert!(
        meta.blocks() * 512 <= SIZE - (2 << 20) + 65536,
        "it has holes"
    );
    assert_eq!(meta.mode() & 0o777, 0o600, "for its owner only");

    place.refuses(&["current", "out/vda.raw"], "out/vda.raw exists");
    place.refuses(&["current", "out"], "out exists");
    place.refuses(
        &["--force", "current", "out"],
        "neither a file nor a block device",
    );
    place.refuses(
        &["current", "none/vda.raw"],
        "none/vda.raw is in no directory that exists",
    );
    fs::write(place.path("out/old"), "old").unwrap();
    std::os::unix::fs::symlink("old", place.path("out/link")).unwrap();
    std::os::unix::fs::symlink("nowhere", place.path("out/dangling")).unwrap();
    place.refuses(&["current", "out/dangling"], "out/dangling exists");
    place.restores(&["--force", "current", "out/link"]);
    night.disk.assert_file(&place.path("out/old"));
    assert!(
        fs::symlink_metadata(place.path("out/link"))
            .unwrap()
            .is_symlink()
    );
    // A source is not replaced by what is made of it.
    let inside = "current/vda/0000/0000001";
    place.refuses(
        &["--force", "current", inside],
        "is a part of the source current",
    );
    // What is refused leaves what is there.
    fs::remove_file(place.path("current/vda/0000/0000004")).unwrap();
    place.refuses(&["--force", "current", "out/old"], "0000004 is missing");
    night.disk.assert_file(&place.path("out/old"));
}

#[test]
fn who_interrupts_it_finds_nothing() {
    let mut rng = Rng::new(7);
    let night = nights(&mut rng, SIZE, 1).remove(0);
    let place = Place::new();
    night.slices(&place.path("current"), SLICE);
    let request = fleecefs::restore::Request {
        sources: vec![place.path("current")],
        output: place.path("out/vda.raw"),
        format: fleecefs::model::Format::Raw,
        disk: None,
        until: None,
        force: false,
    };
    let said = fleecefs::restore::run(&request, &true.into()).unwrap_err();
    assert!(said.message().contains("interrupted"), "{said}");
    assert_eq!(place.left(), [""; 0]);
}

/// A device or file system, taken away in the end.
struct Undo(&'static str, String);

impl Drop for Undo {
    fn drop(&mut self) {
        let args: &[&str] = if self.0 == "losetup" { &["-d"] } else { &[] };
        let program = find(self.0).unwrap();
        let _ = Command::new(program).args(args).arg(&self.1).status();
    }
}

#[test]
fn a_device() {
    need!("losetup", "qemu-img");
    if !is_root() {
        return skip("loop devices need root");
    }
    let mut rng = Rng::new(8);
    let nights = nights(&mut rng, SIZE, 2);
    let place = Place::new();
    place.series(&nights);
    nights[1].whole_qcow2(&place.path("tue.qcow2"));
    let larger = SIZE + 4096;
    fs::write(place.path("device"), vec![0xaa; larger as usize]).unwrap();
    let said = run("losetup", &["-f", "--show", text(&place.path("device"))]);
    let device = Undo("losetup", said.trim().to_owned());
    for source in [&["mon", "tue"][..], &["tue.qcow2"]] {
        fs::write(place.path("device"), vec![0xaa; larger as usize]).unwrap();
        place.restores(&[source, &[&device.1]].concat());
        let mut found = fs::read(place.path("device")).unwrap();
        let rest = found.split_off(SIZE as usize);
        nights[1].disk.assert_is(&found, "device");
        assert!(
            rest.iter().all(|b| *b == 0xaa),
            "what comes after is not touched"
        );
    }
    place.refuses(
        &["--format=qcow2", "tue.qcow2", &device.1],
        "takes a raw image",
    );
    drop(device);
    fs::write(place.path("device"), vec![0xaa; 4096]).unwrap();
    let said = run("losetup", &["-f", "--show", text(&place.path("device"))]);
    let device = Undo("losetup", said.trim().to_owned());
    place.refuses(
        &["tue.qcow2", &device.1],
        "has 4096 bytes, and the disk has",
    );
    place.refuses(
        &["mon", "tue", &device.1],
        "has 4096 bytes, and the disk has",
    );
    assert_eq!(fs::read(place.path("device")).unwrap(), vec![0xaa; 4096]);
}

#[test]
fn a_full_disk() {
    need!("mount", "umount", "qemu-img");
    if !is_root() {
        return skip("mounting needs root");
    }
    let mut rng = Rng::new(9);
    let nights = nights(&mut rng, SIZE, 2);
    let place = Place::new();
    place.series(&nights);
    nights[1].whole_qcow2(&place.path("tue.qcow2"));
    let out = place.path("out");
    run(
        "mount",
        &["-t", "tmpfs", "-o", "size=1M", "none", text(&out)],
    );
    let _undo = Undo("umount", text(&out).to_owned());
    place.refuses(&["mon", "tue", "out/vda.raw"], "No space left");
    place.refuses(&["tue.qcow2", "out/vda.raw"], "cannot");
}
