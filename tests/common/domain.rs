//! A domain over a real QEMU, through the library: no mount.

use std::path::Path;
use std::time::Duration;

use fleecefs::backend::{Places, Source};
use fleecefs::engine::{Backup, Domain, Options, Store};
use fleecefs::model::{Change, Name};

use super::qemu::Builder;
use super::{Qemu, image, tools};

/// A checkpoint's or backup's name.
pub fn name(text: &str) -> Name {
    Name::new(text).unwrap()
}

/// Everything below one directory.
pub fn places(dir: &Path) -> Places {
    Places {
        timeout: Duration::from_secs(20),
        runtime: dir.join("run"),
        scratch: dir.join("scratch"),
        ..Places::default()
    }
}

/// Opens the QEMU behind a monitor, with `state` below `dir`.
pub fn open(socket: &Path, places: &Places, dir: &Path) -> Domain {
    let source = Source::Qmp(socket.to_owned());
    let backend = source.open(places).unwrap();
    let store = Store::open(&dir.join("state")).unwrap();
    Domain::open(backend, store, Options::default()).unwrap()
}

/// All that a frozen disk reads as.
pub fn content(backup: &Backup, disk: usize) -> Vec<u8> {
    let size = backup.disks()[disk].size() as usize;
    let mut bytes = vec![0xee; size];
    // Odd pieces, so that reads do not begin or end with the granules.
    let mut at = 0;
    while at < size {
        let end = (at + 777_777).min(size);
        let read = backup
            .read_at(disk, at as u64, &mut bytes[at..end])
            .unwrap();
        assert_eq!(read, end - at);
        at = end;
    }
    bytes
}

/// Dirty extents since a checkpoint, as (offset, length), zeros or not.
pub fn since(backup: &Backup, disk: usize, checkpoint: &str) -> Vec<(u64, u64)> {
    let since = backup
        .since()
        .iter()
        .find(|s| s.name.as_str() == checkpoint);
    let map = backup.changes(disk, since.unwrap().id).unwrap();
    let dirty = map.map(|change| change != Change::Clean);
    let extents = dirty.iter().filter(|e| e.kind);
    extents.map(|e| (e.offset, e.length)).collect()
}

/// A paused QEMU with empty qcow2 disks, and its domain.
pub struct Fixture {
    /// Images, state, sockets and scratch space.
    pub dir: tempfile::TempDir,
    /// The QEMU.
    pub qemu: Qemu,
    /// The domain.
    pub domain: Domain,
}

/// Disks `vda`, `vdb` … of these sizes in bytes.
pub fn fixture(sizes: &[u64]) -> Fixture {
    fixture_with(sizes, |build| build)
}

/// The same, with a QEMU that is built otherwise.
pub fn fixture_with(sizes: &[u64], how: impl FnOnce(Builder) -> Builder) -> Fixture {
    let dir = tools::temp_dir();
    for (target, size) in TARGETS.iter().zip(sizes) {
        let path = dir.path().join(format!("{target}.qcow2"));
        image::create(&path, "qcow2", *size, "");
    }
    let qemu = how(build(dir.path(), sizes.len())).start();
    let domain = open(&qemu.socket(), &places(dir.path()), dir.path());
    Fixture { dir, qemu, domain }
}

const TARGETS: [&str; 4] = ["vda", "vdb", "vdc", "vdd"];

/// A paused QEMU on the images of a fixture.
pub fn start(dir: &Path, disks: usize) -> Qemu {
    build(dir, disks).start()
}

fn build(dir: &Path, disks: usize) -> Builder {
    let mut build = Qemu::build().paused();
    for target in TARGETS.iter().take(disks) {
        build = build.disk(target, &dir.join(format!("{target}.qcow2")), "qcow2");
    }
    build
}
