//! The tools that people copy disks with, on a real mount of an image: every one of them must see
//! the frozen instant, holes where there are holes, and no error at the end of an odd-sized disk.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use common::tools::{need, run, text};
use common::{Disk, Fleecefs, Write, image, model, tools};

const MIB: u64 = 1 << 20;
/// Whole sectors, but no multiple of 4096.
const SIZE: u64 = 40 * MIB + 512;

/// An image with data, written zeros and holes.
fn fixture() -> (tempfile::TempDir, PathBuf, Disk) {
    let dir = tools::temp_dir();
    let path = dir.path().join("disk.qcow2");
    let mut disk = Disk::new(SIZE);
    for (offset, length, pattern) in [
        (0, 3 * MIB, 1),
        (9 * MIB + 512, 64 * 1024, 2),
        (20 * MIB, 5 * MIB + 512, 3),
        (SIZE - 1024, 1024, 4),
    ] {
        disk.apply(Write {
            offset,
            length,
            pattern,
        });
    }
    image::from_model(&path, &disk);
    (dir, path, disk)
}

fn allocated(path: &Path) -> u64 {
    std::fs::metadata(path).unwrap().blocks() * 512
}

#[test]
fn every_tool_reads_the_same_disk() {
    need!("qemu-img", "rsync", "cp", "tar", "dd", "sha256sum");
    let Some(()) = tools::fuse() else { return };
    let (dir, path, disk) = fixture();
    let mount = Fleecefs::source(text(&path)).mount();
    mount.mkdir("backups/full").unwrap();
    let raw = mount.path("backups/full/raw/vda.raw");
    let out = |name: &str| dir.path().join(name);
    let raw_text = text(&raw);

    let meta = std::fs::metadata(&raw).unwrap();
    assert_eq!(meta.size(), SIZE);
    assert!(meta.blocks() * 512 < 10 * MIB, "{} blocks", meta.blocks());
    let again = std::fs::metadata(mount.path("backups/full/disk.raw")).unwrap();
    assert_eq!(again.ino(), meta.ino());
    assert_eq!(meta.nlink(), 2);

    run("cp", &["--sparse=auto", raw_text, text(&out("cp.raw"))]);
    run(
        "rsync",
        &["-a", "--sparse", raw_text, text(&out("rsync.raw"))],
    );
    run("rsync", &["-aHAX", raw_text, text(&out("rsync2.raw"))]);
    let of = format!("of={}", text(&out("dd.raw")));
    run(
        "dd",
        &[&format!("if={raw_text}"), &of, "bs=100000", "status=none"],
    );
    let of = format!("of={}", text(&out("direct.raw")));
    run(
        "dd",
        &[
            &format!("if={raw_text}"),
            &of,
            "bs=1M",
            "iflag=direct",
            "status=none",
        ],
    );
    run(
        "qemu-img",
        &[
            "convert",
            "-f",
            "raw",
            "-O",
            "raw",
            raw_text,
            text(&out("img.raw")),
        ],
    );
    let folder = mount.path("backups/full/raw");
    let archive = out("a.tar");
    run(
        "tar",
        &["-S", "-C", text(&folder), "-cf", text(&archive), "vda.raw"],
    );
    run("tar", &["-C", text(dir.path()), "-xf", text(&archive)]);
    for name in ["cp", "rsync", "rsync2", "dd", "direct", "img", "vda"] {
        disk.assert_file(&out(&format!("{name}.raw")));
    }
    for sparse in ["cp", "rsync", "img", "vda"] {
        let bytes = allocated(&out(&format!("{sparse}.raw")));
        assert!(bytes < 10 * MIB, "{sparse} allocated {bytes}");
    }
    assert!(
        archive.metadata().unwrap().len() < 10 * MIB,
        "tar -S found the holes"
    );
    let here = run("sha256sum", &[raw_text]);
    let there = run("sha256sum", &[text(&out("cp.raw"))]);
    assert_eq!(here[..64], there[..64]);
    // A directory of a backup can be copied whole.
    run(
        "cp",
        &["-r", text(&mount.path("backups/full")), text(&out("whole"))],
    );
    disk.assert_file(&out("whole/disk.raw"));
    run(
        "rsync",
        &[
            "-rt",
            &format!("{}/", text(&mount.path("checkpoints"))),
            text(&out("c")),
        ],
    );

    mount.rmdir("backups/full").unwrap();
    mount.umount().assert_clean();
    // Nothing of the image changed but its bitmap.
    disk.assert_is(&image::bytes(&path, "qcow2"), "the image");
}

#[test]
fn maps_are_nbdinfos() {
    need!("qemu-img");
    let Some(()) = tools::fuse() else { return };
    let (_dir, path, disk) = fixture();
    let mount = Fleecefs::source(text(&path)).mount();
    mount.mkdir("checkpoints/mon").unwrap();
    mount.mkdir("backups/tue").unwrap();
    let map = model::parse_map(&mount.read("backups/tue/map/vda.map"));
    for line in &map {
        let bytes = &disk.bytes()[line.offset as usize..(line.offset + line.length) as usize];
        match (line.kind, line.description.as_str()) {
            (0, "data") => {}
            (2, "zero") | (3, "hole,zero") => assert!(bytes.iter().all(|b| *b == 0)),
            other => panic!("{other:?}"),
        }
    }
    let data: u64 = map.iter().filter(|l| l.kind == 0).map(|l| l.length).sum();
    assert!(data < 10 * MIB);
    // Nothing was written since.
    assert_eq!(
        model::dirty_extents(&model::parse_map(&mount.read("backups/tue/dirty.map"))),
        []
    );
    assert_eq!(
        mount.read("backups/tue/since/mon/vda.map"),
        mount.read("backups/tue/dirty.map")
    );
    for file in [
        "map/vda.map",
        "dirty.map",
        "backup.xml",
        "checkpoint.xml",
        "domain.xml",
    ] {
        let path = format!("backups/tue/{file}");
        let size = std::fs::metadata(mount.path(&path)).unwrap().len();
        assert_eq!(size, mount.read(&path).len() as u64, "{file}");
    }
    mount.umount().assert_clean();
}

/// What quickstart does, across remounts: checkpoints live in the image and the state directory.
#[test]
fn history_outlives_the_mount() {
    need!("qemu-img", "qemu-io");
    let Some(()) = tools::fuse() else { return };
    let (_dir, path, mut disk) = fixture();
    let mount = Fleecefs::source(text(&path)).daemon().mount();
    mount.mkdir("backups/mon").unwrap();
    let made = std::fs::metadata(mount.path("checkpoints/mon"))
        .unwrap()
        .mtime();
    let begun = std::fs::metadata(mount.path("backups/mon/disk.raw"))
        .unwrap()
        .mtime();
    assert_eq!(made, begun);
    mount.rmdir("backups/mon").unwrap();
    let home = mount.umount();
    home.assert_clean();

    let write = Write {
        offset: 12 * MIB,
        length: 70_000,
        pattern: 9,
    };
    image::write(&path, write.offset, write.length, write.pattern);
    disk.apply(write);
    let mount = Fleecefs::source(text(&path)).home(home).mount();
    assert_eq!(mount.list("checkpoints"), ["mon"]);
    let again = std::fs::metadata(mount.path("checkpoints/mon"))
        .unwrap()
        .mtime();
    assert_eq!(again, made);
    mount.mkdir("backups/tue").unwrap();
    let dirty = model::dirty_extents(&model::parse_map(&mount.read("backups/tue/dirty.map")));
    assert_eq!(dirty, [(12 * MIB, 2 * 65536)]);
    disk.assert_file(&mount.path("backups/tue/disk.raw"));
    let parent = std::fs::read_link(mount.path("checkpoints/tue/parent")).unwrap();
    assert_eq!(parent, Path::new("../mon"));
    let child = std::fs::read_link(mount.path("checkpoints/mon/children/tue")).unwrap();
    assert!(
        mount
            .path("checkpoints/mon/children")
            .join(child)
            .join("checkpoint.xml")
            .exists()
    );
    mount.umount().assert_clean();
}

#[test]
fn a_file_can_be_fetched_by_a_loop_mount() {
    need!("qemu-img", "mkfs.ext4", "debugfs", "losetup");
    let Some(()) = tools::fuse() else { return };
    if !tools::is_root() {
        return tools::skip("loop mounts need root");
    }
    let dir = tools::temp_dir();
    let path = dir.path().join("fs.qcow2");
    image::ext4(&path, 64 * MIB);
    let mount = Fleecefs::source(text(&path)).mount();
    mount.mkdir("backups/full").unwrap();
    let at = dir.path().join("loop");
    std::fs::create_dir(&at).unwrap();
    let raw = mount.path("backups/full/disk.raw");
    run("mount", &["-o", "ro,loop,noload", text(&raw), text(&at)]);
    let listed = std::fs::read_dir(&at).map(|d| d.count());
    run("umount", &[text(&at)]);
    assert!(listed.unwrap() >= 1, "lost+found at least");
    mount.umount().assert_clean();
}
