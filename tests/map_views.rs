//! Maps in other programs' formats, held against those programs: bmaptool and nbdinfo.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::fs;
use std::path::Path;
use std::process::Command;

use common::tools::{find, is_root, need, run, skip, temp_dir, text};
use common::{Disk, Rng, image, model};
use fleecefs::model::{Allocation, Change, Extents};
use fleecefs::view::{bmap, json, map};

/// Whole sectors, as a loop device has, but no multiple of bmap's blocks.
const SIZE: u64 = (8 << 20) + 1536;

/// A loop device over a file, until dropped.
struct Loop(String);

impl Loop {
    fn over(path: &Path) -> Self {
        Self(run("losetup", &["-f", "--show", text(path)]).trim().into())
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let losetup = find("losetup").unwrap();
        let _ = Command::new(losetup).args(["-d", &self.0]).status();
    }
}

#[test]
fn bmaptool_brings_an_old_copy_up_to_date() {
    need!("bmaptool", "losetup");
    if !is_root() {
        return skip("loop devices need root");
    }
    let dir = temp_dir();
    let path = |name: &str| dir.path().join(name);
    let mut rng = Rng::from_env();
    for round in 0..4 {
        let old = Disk::patterned(SIZE);
        let mut new = old.clone();
        let mut changes: Vec<Change> = vec![Change::Clean; (SIZE / 512) as usize];
        // Nothing at all the first time.
        for _ in 0..round * 6 {
            let write = rng.write(SIZE);
            new.apply(write);
            let sectors = write.offset / 512..(write.offset + write.length) / 512;
            changes[sectors.start as usize..sectors.end as usize].fill(match write.pattern {
                0 => Change::DirtyZero,
                _ => Change::Dirty,
            });
        }
        let mut map = Extents::new();
        for change in changes {
            map.push(512, change);
        }
        fs::write(path("copy"), old.bytes()).unwrap();
        fs::write(path("new.raw"), new.bytes()).unwrap();
        let bmap = bmap::text(&map);
        fs::write(path("new.bmap"), &bmap).unwrap();
        let device = Loop::over(&path("copy"));
        let copy = |bmap: &str| {
            let (bmap, new) = (path(bmap), path("new.raw"));
            let args = ["copy", "--bmap", text(&bmap), text(&new), &device.0];
            let bmaptool = find("bmaptool").unwrap();
            Command::new(bmaptool).args(args).output().unwrap()
        };
        // It does look at the checksum.
        fs::write(path("bad.bmap"), bmap.replace("sha256 ", "sha256  ")).unwrap();
        let refused = copy("bad.bmap");
        assert!(String::from_utf8_lossy(&refused.stderr).contains("checksum"));
        assert!(!refused.status.success());

        let copied = copy("new.bmap");
        let said = String::from_utf8_lossy(&copied.stderr);
        assert!(copied.status.success(), "{said}");
        drop(device);
        new.assert_file(&path("copy"));
    }
}

/// From nbdinfo's own columns to its own JSON, byte for byte, by way of the view.
#[test]
fn json_is_nbdinfos() {
    need!("nbdinfo", "qemu-nbd", "qemu-img", "qemu-io");
    let dir = temp_dir();
    let path = dir.path().join("disk.qcow2");
    image::create(&path, "qcow2", SIZE, "");
    run("qemu-img", &["bitmap", "--add", text(&path), "b"]);
    image::write(&path, 65536, 200_000, 7);
    image::write(&path, 4 << 20, 65536, 7);
    let zero = ["-f", "qcow2", "-c", "write -z 5M 128k", text(&path)];
    run("qemu-io", &zero);
    let nbdinfo = |args: &[&str]| {
        let server = [
            "--",
            "[",
            "qemu-nbd",
            "-r",
            "-B",
            "b",
            "-f",
            "qcow2",
            text(&path),
            "]",
        ];
        run("nbdinfo", &[args, &server].concat())
    };

    let columns = nbdinfo(&["--map"]);
    let mut allocation = Extents::new();
    for line in model::parse_map(&columns) {
        let kind = Allocation {
            hole: line.kind & 1 > 0,
            zero: line.kind & 2 > 0,
        };
        allocation.push(line.length, kind);
    }
    assert!(allocation.count() > 4, "{columns}");
    assert_eq!(map::allocation_text(&allocation), columns);
    assert_eq!(json::allocation(&allocation), nbdinfo(&["--map", "--json"]));

    let columns = nbdinfo(&["--map=qemu:dirty-bitmap:b"]);
    let mut changes = Extents::new();
    for line in model::parse_map(&columns) {
        let change = [Change::Clean, Change::Dirty][line.kind as usize];
        changes.push(line.length, change);
    }
    assert_eq!(map::change_text(&changes), columns);
    let theirs = nbdinfo(&["--map=qemu:dirty-bitmap:b", "--json"]);
    assert_eq!(json::changes(&changes), theirs);
}
