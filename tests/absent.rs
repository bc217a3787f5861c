//! Disks that are not always there, or not under the same name: no change goes unlisted because of it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::path::PathBuf;

use common::domain::{name, places, since};
use common::image;
use common::tools::{self, need, run, text};
use fleecefs::backend::Source;
use fleecefs::engine::{Domain, Options, Store};

const MIB: u64 = 1 << 20;
const GRANULE: u64 = 65536;

/// A domain that is off, whose images are not always all there.
struct Off {
    dir: tempfile::TempDir,
}

impl Off {
    fn new(images: &[&str]) -> Self {
        let dir = tools::temp_dir();
        for image in images {
            image::create(&dir.path().join(image), "qcow2", 4 * MIB, "");
        }
        Self { dir }
    }

    fn path(&self, image: &str) -> PathBuf {
        self.dir.path().join(image)
    }

    /// `vda`, `vdb` … are these images while `work` has the domain.
    fn with<T>(&self, images: &[&str], work: impl FnOnce(&Domain) -> T) -> T {
        let mut places = places(self.dir.path());
        places.domain = Some("off".to_owned());
        let images = images.iter().map(|i| self.path(i)).collect();
        let backend = Source::Images(images).open(&places).unwrap();
        let store = Store::open(&self.dir.path().join("state")).unwrap();
        let domain = Domain::open(backend, store, Options::default()).unwrap();
        let result = work(&domain);
        domain.close().unwrap();
        result
    }

    fn checkpoint(&self, images: &[&str], checkpoint: &str) {
        self.with(images, |d| d.create_checkpoint(name(checkpoint)).unwrap());
    }

    fn write(&self, image: &str, offset: u64) {
        image::write(&self.path(image), offset, 4096, 1);
    }

    /// What changed since a checkpoint on a disk, unless that is not known.
    fn since(&self, images: &[&str], disk: usize, checkpoint: &str) -> Option<Vec<(u64, u64)>> {
        self.with(images, |domain| {
            let backup = domain.begin_backup(name("look")).unwrap();
            let all = backup.since();
            let id = all.iter().find(|s| s.name.as_str() == checkpoint);
            let known = id.is_some_and(|s| backup.disks()[disk].knows_since(s.id));
            let found = known.then(|| since(&backup, disk, checkpoint));
            domain.end_backup(&name("look")).unwrap();
            domain.delete_checkpoint(&name("look")).unwrap();
            found
        })
    }
}

/// What a disk's bitmap recorded cannot go to its parent's while the disk is away.
#[test]
fn deleted_while_a_disk_is_away() {
    need!("qemu-storage-daemon", "qemu-img", "qemu-io");
    let off = Off::new(&["a", "b"]);
    for (checkpoint, offset) in [("sun", 0), ("mon", MIB), ("tue", 2 * MIB)] {
        off.checkpoint(&["a", "b"], checkpoint);
        off.write("a", offset);
        off.write("b", offset);
    }
    off.with(&["a"], |d| d.delete_checkpoint(&name("mon")).unwrap());
    let all = [0, MIB, 2 * MIB].map(|offset| (offset, GRANULE));
    assert_eq!(off.since(&["a", "b"], 0, "sun"), Some(all.to_vec()));
    assert_eq!(off.since(&["a", "b"], 1, "sun"), None);
    assert_eq!(
        off.since(&["a", "b"], 1, "tue"),
        Some(vec![(2 * MIB, GRANULE)])
    );
}

/// A checkpoint's bitmap on a disk that is away keeps its name, whatever else has the new one.
#[test]
fn renamed_while_a_disk_is_away() {
    need!("qemu-storage-daemon", "qemu-img", "qemu-io");
    let off = Off::new(&["a", "b"]);
    run(
        "qemu-img",
        &["bitmap", "--add", "--disable", text(&off.path("b")), "x"],
    );
    for (checkpoint, offset) in [("mon", MIB), ("tue", 2 * MIB)] {
        off.checkpoint(&["a", "b"], checkpoint);
        off.write("b", offset);
    }
    off.with(&["a"], |d| {
        d.rename_checkpoint(&name("mon"), &name("x")).unwrap()
    });
    let all = [MIB, 2 * MIB].map(|offset| (offset, GRANULE));
    assert_eq!(off.since(&["a", "b"], 1, "x"), Some(all.to_vec()));
}

/// The same checkpoints are on both images, and the same names.
#[test]
fn swapped_images() {
    need!("qemu-storage-daemon", "qemu-img", "qemu-io");
    let off = Off::new(&["a", "b"]);
    off.checkpoint(&["a", "b"], "mon");
    off.write("a", 0);
    assert_eq!(off.since(&["b", "a"], 0, "mon"), None, "it is another disk");
    assert_eq!(off.since(&["b", "a"], 1, "mon"), None);
}

/// A checkpoint may be called as what fleecefs itself puts into QEMU.
#[test]
fn a_name_like_our_own() {
    need!("qemu-storage-daemon", "qemu-img", "qemu-io");
    let off = Off::new(&["a"]);
    off.checkpoint(&["a"], "fleece-mon");
    off.write("a", 0);
    assert_eq!(off.since(&["a"], 0, "fleece-mon"), Some(vec![(0, GRANULE)]));
}
