//! A real mount's qcow2/ and since/: what cp makes of them is read by QEMU, by 7-Zip, which knows
//! nothing of QEMU's code, and by bmaptool.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use common::tools::{find, need, run, text};
use common::{Disk, Fleecefs, Qemu, Write, image, model, tools};

const MIB: u64 = 1 << 20;
/// Whole sectors, but no multiple of a cluster.
const SIZE: u64 = 40 * MIB + 512;

struct World {
    dir: tempfile::TempDir,
    qemu: Qemu,
    mount: Fleecefs,
    disk: Disk,
}

impl World {
    /// An empty disk with some data, at the beginning, in between and at the end.
    fn new(options: &[&str]) -> Self {
        let dir = tools::temp_dir();
        let path = dir.path().join("disk.qcow2");
        image::create(&path, "qcow2", SIZE, "");
        let qemu = Qemu::build().disk("vda", &path, "qcow2").paused().start();
        let mut mount = Fleecefs::qmp(&qemu.socket());
        for option in options {
            mount = mount.option(option);
        }
        let mut world = Self {
            dir,
            mount: mount.mount(),
            qemu,
            disk: Disk::new(SIZE),
        };
        world.write(0, 3 * MIB, 1);
        world.write(9 * MIB + 512, 200 * 1024, 2);
        world.write(20 * MIB, 5 * MIB, 3);
        world.write(SIZE - 1024, 1024, 4);
        world
    }

    fn write(&mut self, offset: u64, length: u64, pattern: u8) {
        let write = Write {
            offset,
            length,
            pattern,
        };
        self.qemu.write("vda", write);
        self.disk.apply(write);
    }

    fn out(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// `cp`, of a file that nobody has looked at before: its size must be right from the start.
    fn copy(&self, from: &str, to: &str) -> PathBuf {
        let (from, to) = (self.mount.path(from), self.out(to));
        let size = std::fs::metadata(&from).unwrap().len();
        run("cp", &[text(&from), text(&to)]);
        run("chmod", &["600", text(&to)]);
        assert_eq!(std::fs::metadata(&to).unwrap().len(), size);
        to
    }

    fn assert_is(&self, path: &Path, format: &str) {
        let bytes = image::bytes(path, format);
        self.disk.assert_is(&bytes, text(path));
    }

    fn end(self) {
        self.mount.umount().assert_clean();
    }
}

/// No error, no leak.
fn check(path: &Path) {
    let said = run("qemu-img", &["check", "-f", "qcow2", text(path)]);
    assert!(said.contains("No errors were found"), "{said}");
}

#[test]
fn copies_make_a_chain() {
    need!("qemu-system-x86_64", "qemu-img", "cp", "7z");
    let Some(()) = tools::fuse() else { return };
    let mut world = World::new(&[]);
    world.mount.mkdir("backups/mon").unwrap();
    let mon = world.copy("backups/mon/qcow2/vda.qcow2", "mon.qcow2");
    check(&mon);
    let raw = world.mount.path("backups/mon/raw/vda.raw");
    let same = [
        "compare",
        "-f",
        "qcow2",
        "-F",
        "raw",
        text(&mon),
        text(&raw),
    ];
    run("qemu-img", &same);
    world.assert_is(&mon, "qcow2");
    let bytes = std::fs::metadata(&mon).unwrap().len();
    assert!(bytes < 10 * MIB, "{bytes}: holes are in it");
    // In place, too: nothing has to be copied to be read.
    let there = world.mount.path("backups/mon/qcow2/vda.qcow2");
    check(&there);
    let seven = Command::new(find("7z").unwrap())
        .args(["x", "-so", "-tqcow", text(&there)])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&seven.stderr);
    assert!(seven.status.success(), "{said}");
    world.disk.assert_is(&seven.stdout, "7z");
    world.mount.rmdir("backups/mon").unwrap();

    world.write(MIB, 70_000, 5);
    world.write(21 * MIB, MIB, 0);
    world.write(30 * MIB, 512, 6);
    world.mount.mkdir("backups/tue").unwrap();
    let tue = world.copy("backups/tue/since/mon/vda.qcow2", "tue.qcow2");
    check(&tue);
    world.assert_is(&tue, "qcow2");
    let bytes = std::fs::metadata(&tue).unwrap().len();
    assert!(bytes < MIB, "{bytes}: more than what changed");
    world.mount.rmdir("backups/tue").unwrap();

    world.write(MIB + 65_536, 512, 0);
    world.write(21 * MIB + 4096, 4096, 7);
    world.write(SIZE - 512, 512, 8);
    world.mount.mkdir("backups/wed").unwrap();
    let wed = world.copy("backups/wed/since/tue/vda.qcow2", "wed.qcow2");
    check(&wed);
    world.assert_is(&wed, "qcow2");
    // Any earlier one will do.
    let both = world.copy("backups/wed/since/mon/vda.qcow2", "both.qcow2");
    check(&both);
    world.assert_is(&both, "qcow2");

    // Other names are a matter of rebase -u.
    let full = world.out("full.qcow2");
    std::fs::rename(&mon, &full).unwrap();
    let rebase = |over: &str, top: &Path| {
        let args = ["rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", over];
        run("qemu-img", &[&args[..], &[text(top)]].concat());
    };
    rebase("full.qcow2", &tue);
    world.assert_is(&wed, "qcow2");
    rebase("full.qcow2", &both);
    world.assert_is(&both, "qcow2");
    // And the chain can be folded.
    run(
        "qemu-img",
        &["commit", "-q", "-f", "qcow2", "-d", text(&wed)],
    );
    world.assert_is(&tue, "qcow2");
    world.end();
}

#[test]
fn a_backing_pattern_names_other_images() {
    need!("qemu-system-x86_64", "qemu-img", "cp");
    let Some(()) = tools::fuse() else { return };
    let mut world = World::new(&["backing=full/{disk}-{checkpoint}.raw"]);
    std::fs::create_dir(world.out("full")).unwrap();
    world.mount.mkdir("backups/mon").unwrap();
    world.copy("backups/mon/raw/vda.raw", "full/vda-mon.raw");
    world.mount.rmdir("backups/mon").unwrap();
    world.write(2 * MIB, MIB, 5);
    world.mount.mkdir("backups/tue").unwrap();
    let tue = world.copy("backups/tue/since/mon/vda.qcow2", "tue.qcow2");
    let info = run("qemu-img", &["info", "-f", "qcow2", text(&tue)]);
    assert!(info.contains("backing file: full/vda-mon.raw"), "{info}");
    assert!(info.contains("backing file format: raw"), "{info}");
    check(&tue);
    world.assert_is(&tue, "qcow2");
    world.end();
}

/// Data and holes of a file, by SEEK_DATA and SEEK_HOLE: the data's offsets and lengths.
fn data(path: &Path) -> Vec<(u64, u64)> {
    use rustix::fs::SeekFrom;
    let file = std::fs::File::open(path).unwrap();
    let mut found = Vec::new();
    let mut at = 0;
    while let Ok(start) = rustix::fs::seek(&file, SeekFrom::Data(at)) {
        at = rustix::fs::seek(&file, SeekFrom::Hole(start)).unwrap();
        found.push((start, at - start));
    }
    found
}

#[test]
fn changes_as_a_sparse_file_and_maps() {
    need!("qemu-system-x86_64", "qemu-img", "cp");
    let Some(()) = tools::fuse() else { return };
    let mut world = World::new(&[]);
    world.mount.mkdir("backups/mon").unwrap();
    let old = world.copy("backups/mon/raw/vda.raw", "old.raw");
    world.mount.rmdir("backups/mon").unwrap();
    world.write(MIB, 70_000, 5);
    world.write(21 * MIB, MIB, 0);
    world.write(30 * MIB, 512, 6);
    world.write(SIZE - 512, 512, 7);
    world.mount.mkdir("backups/tue").unwrap();
    let since = |name: &str| format!("backups/tue/since/mon/{name}");

    let meta = std::fs::metadata(world.mount.path(&since("vda.raw"))).unwrap();
    let map = model::parse_map(&world.mount.read(&since("vda.map")));
    let dirty = model::dirty_extents(&map);
    assert_eq!(
        dirty,
        [
            (MIB, 131_072),
            (21 * MIB, MIB),
            (30 * MIB, 65_536),
            (40 * MIB, 512)
        ]
    );
    let zeros: u64 = map.iter().filter(|l| l.kind == 3).map(|l| l.length).sum();
    assert_eq!(zeros, MIB);
    // What is zeros now is data here: it changed.
    let changed = world.mount.path(&since("vda.raw"));
    assert_eq!(data(&changed), dirty);
    assert_eq!(meta.len(), SIZE);
    let bytes: u64 = dirty.iter().map(|(_, length)| length).sum();
    assert_eq!(meta.blocks(), bytes.div_ceil(512));
    // cp makes holes of zeros, asked or not, so a copy needs the map to tell which changed.
    let copied = world.out("changed.raw");
    run("cp", &["--sparse=always", text(&changed), text(&copied)]);
    let blocks = std::fs::metadata(&copied).unwrap().blocks();
    assert!(blocks <= (bytes - zeros).div_ceil(512) + 8, "{blocks}");
    let from = std::fs::File::open(&copied).unwrap();
    let to = std::fs::File::options().write(true).open(&old).unwrap();
    for (offset, length) in dirty {
        let mut part = vec![0; length as usize];
        from.read_exact_at(&mut part, offset).unwrap();
        to.write_all_at(&part, offset).unwrap();
    }
    world.disk.assert_file(&old);

    // The same map as JSON.
    let json: serde_json::Value =
        serde_json::from_str(&world.mount.read(&since("vda.json"))).unwrap();
    let json: Vec<_> = json
        .as_array()
        .unwrap()
        .iter()
        .map(|e| {
            let number = |key: &str| e[key].as_u64().unwrap();
            (number("offset"), number("length"), number("type") as u32)
        })
        .collect();
    let lines = map.iter().map(|l| (l.offset, l.length, l.kind));
    assert!(lines.eq(json));
    // Sizes are right before and after.
    for name in ["vda.map", "vda.json", "vda.bmap", "vda.qcow2"] {
        let path = world.mount.path(&since(name));
        let size = std::fs::metadata(&path).unwrap().len();
        assert_eq!(size, std::fs::read(&path).unwrap().len() as u64, "{name}");
    }
    world.end();
}

#[test]
fn bmaptool_updates_a_device() {
    need!(
        "qemu-system-x86_64",
        "qemu-img",
        "cp",
        "bmaptool",
        "losetup"
    );
    let Some(()) = tools::fuse() else { return };
    if !tools::is_root() {
        return tools::skip("loop devices need root");
    }
    let mut world = World::new(&[]);
    world.mount.mkdir("backups/mon").unwrap();
    let copy = world.copy("backups/mon/raw/vda.raw", "copy.raw");
    world.mount.rmdir("backups/mon").unwrap();
    world.write(MIB, 70_000, 5);
    world.write(21 * MIB, MIB, 0);
    world.write(SIZE - 512, 512, 7);
    world.mount.mkdir("backups/tue").unwrap();
    // Not the file itself, which bmaptool would empty first.
    let device = run("losetup", &["-f", "--show", text(&copy)]);
    let bmap = world.mount.path("backups/tue/since/mon/vda.bmap");
    let raw = world.mount.path("backups/tue/raw/vda.raw");
    let copied = Command::new(find("bmaptool").unwrap())
        .args(["copy", "--bmap", text(&bmap), text(&raw), device.trim()])
        .output();
    run("losetup", &["-d", device.trim()]);
    let copied = copied.unwrap();
    let said = String::from_utf8_lossy(&copied.stderr);
    assert!(copied.status.success(), "{said}");
    world.disk.assert_file(&copy);
    world.end();
}
