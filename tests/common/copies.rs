//! What users hold of backups: the files that a copy program leaves, written without a mount.

use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::fs::FileExt;
use std::path::Path;

use fleecefs::model::{
    Allocation, Change, Checkpoint, CheckpointDisk, Disk as DomainDisk, DomainInfo, Extents, Mode,
    Name,
};
use fleecefs::view;
use fleecefs::view::manifest::{Manifest, ManifestDisk, Point};
use fleecefs::view::qcow2::{Backing, Format, Image};
use fleecefs::xml::{self, BackupDocument, BackupDocumentDisk, CheckpointDocument};

use super::model::{Disk, Marks, Rng};

pub const UUID: &str = "6ba7b810-9dad-11d1-80b4-00c04fd430c8";
const GRANULARITY: u64 = 65536;

/// A disk as one backup froze it, and what was written to it since the one before.
#[derive(Clone)]
pub struct Night {
    pub name: String,
    pub unix: u64,
    pub disk: Disk,
    pub written: Marks,
}

/// Backups of a disk that is written to in between, one a day.
pub fn nights(rng: &mut Rng, size: u64, count: usize) -> Vec<Night> {
    const NAMES: [&str; 7] = ["mon", "tue", "wed", "thu", "fri", "sat", "sun"];
    // No granules of zeros would show nothing of holes.
    let mut disk = Disk::patterned(size);
    let sectors = size / 512 * 512;
    let mut nights = Vec::new();
    for (day, name) in NAMES.iter().take(count).enumerate() {
        let mut written = Marks::new(size, GRANULARITY);
        for _ in 0..rng.within(0..9) {
            if sectors > 0 {
                let write = rng.write(sectors);
                disk.apply(write);
                written.mark(write);
            }
        }
        nights.push(Night {
            name: (*name).to_owned(),
            unix: 1_795_471_200 + day as u64 * 86400,
            disk: disk.clone(),
            written,
        });
    }
    nights
}

pub fn name(text: &str) -> Name {
    Name::new(text).unwrap()
}

impl Night {
    fn point(&self) -> Point {
        Point {
            name: name(&self.name),
            unix: self.unix,
        }
    }

    pub fn manifest(&self, base: Option<&Night>, slice: u64) -> Manifest {
        Manifest {
            domain: "vm 1".into(),
            uuid: Some(UUID.into()),
            backup: name(&self.name),
            begun: self.unix,
            checkpoint: Some(self.point()),
            base: base.map(Night::point),
            slice_size: slice,
            disks: vec![ManifestDisk {
                target: "vda".into(),
                size: self.disk.size(),
            }],
        }
    }

    /// `backup.xml`, `checkpoint.xml`, `domain.xml`.
    pub fn documents(&self, dir: &Path, base: Option<&Night>) {
        fs::create_dir_all(dir).unwrap();
        let info = DomainInfo {
            name: "vm 1".into(),
            uuid: Some(UUID.into()),
            key: "k".into(),
        };
        let checkpoint = Checkpoint {
            name: name(&self.name),
            created: std::time::UNIX_EPOCH + std::time::Duration::from_secs(self.unix),
            parent: base.map(|b| name(&b.name)),
            description: None,
            disks: vec![CheckpointDisk {
                target: "vda".into(),
                bitmap: self.name.clone(),
                size: self.disk.size(),
                image: None,
                broken: None,
            }],
        };
        let backup = BackupDocument {
            mode: Mode::Pull,
            incremental: base.map(|b| name(&b.name).into()),
            disks: vec![BackupDocumentDisk::new("vda")],
            ..BackupDocument::default()
        };
        let disk = DomainDisk {
            target: "vda".into(),
            size: self.disk.size(),
            format: "qcow2".into(),
            file: Some("/vm1.qcow2".into()),
            backing: Vec::new(),
            no_backup: None,
            no_checkpoint: None,
            bitmaps: Vec::new(),
        };
        let put = |name: &str, text: String| fs::write(dir.join(name), text).unwrap();
        put("backup.xml", backup.write());
        let described = CheckpointDocument::describe(&checkpoint, Some(&info));
        put("checkpoint.xml", described.write());
        put("domain.xml", xml::domain(&info, &[disk]));
    }

    fn allocation(&self) -> Extents<Allocation> {
        let mut map = Extents::new();
        for granule in self.disk.bytes().chunks(GRANULARITY as usize) {
            let zero = granule.iter().all(|b| *b == 0);
            let kind = if zero {
                Allocation::HOLE
            } else {
                Allocation::DATA
            };
            map.push(granule.len() as u64, kind);
        }
        map
    }

    /// What changed since an earlier night, of those in between as well.
    pub fn changes(&self, between: &[Night]) -> Extents<Change> {
        let mut written = self.written.clone();
        between.iter().for_each(|n| written.merge(&n.written));
        let mut dirty = Extents::new();
        for (offset, length) in written.extents() {
            dirty.push(offset - dirty.size(), false);
            dirty.push(length, true);
        }
        dirty.push(self.disk.size() - dirty.size(), false);
        view::changes(&dirty, &self.allocation())
    }

    /// `raw/vda.raw`.
    pub fn whole_raw(&self, dir: &Path) {
        fs::create_dir_all(dir.join("raw")).unwrap();
        sparse(&dir.join("raw/vda.raw"), &self.disk, &self.allocation());
    }

    /// `since/BASE/vda.raw`, `vda.map` and `vda.bmap`.
    pub fn changes_raw(&self, dir: &Path, base: &str, changes: &Extents<Change>) {
        let since = dir.join("since").join(base);
        fs::create_dir_all(&since).unwrap();
        sparse(&since.join("vda.raw"), &self.disk, changes);
        let put = |name: &str, text: String| fs::write(since.join(name), text).unwrap();
        put("vda.map", view::map::change_text(changes));
        put("vda.bmap", view::bmap::text(changes));
    }

    /// The disk as a qcow2 image of its own.
    pub fn whole_qcow2(&self, path: &Path) {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        self.image(&Image::full(&self.allocation()).unwrap(), path);
    }

    /// What changed, as an overlay.
    pub fn changes_qcow2(&self, path: &Path, base: &str, changes: &Extents<Change>) {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        let backing = Backing {
            name: format!("{base}.qcow2"),
            format: Format::Qcow2,
        };
        self.image(&Image::overlay(changes, Some(&backing)).unwrap(), path);
    }

    fn image(&self, image: &Image, path: &Path) {
        let mut bytes = vec![0; image.size() as usize];
        image
            .read(0, &mut bytes, |at, part| {
                part.copy_from_slice(&self.disk.bytes()[at as usize..][..part.len()]);
                Ok::<(), ()>(())
            })
            .unwrap();
        fs::write(path, bytes).unwrap();
    }

    /// `manifest` and `vda/`, without the times of the tree itself.
    pub fn slices(&self, dir: &Path, slice: u64) {
        self.documents(dir, None);
        fs::remove_file(dir.join("backup.xml")).unwrap();
        let manifest = self.manifest(None, slice);
        fs::write(dir.join("manifest"), manifest.write()).unwrap();
        let cut = manifest.cut(&manifest.disks[0]);
        for directory in 0..cut.directories() {
            let sub = dir.join("vda").join(cut.directory_name(directory));
            fs::create_dir_all(&sub).unwrap();
            for k in cut.in_directory(directory) {
                let (start, length) = cut.range(k).unwrap();
                let bytes = &self.disk.bytes()[start as usize..(start + length) as usize];
                let mut file = File::create(sub.join(cut.slice_name(k))).unwrap();
                file.write_all(bytes).unwrap();
            }
        }
        fs::create_dir_all(dir.join("vda")).unwrap();
    }
}

/// A file that has holes where the map shows them.
fn sparse<K: view::raw::Stretch>(path: &Path, disk: &Disk, map: &Extents<K>) {
    let file = File::create(path).unwrap();
    file.set_len(map.size()).unwrap();
    for e in map.iter().filter(|e| !e.kind.hole()) {
        let bytes = &disk.bytes()[e.offset as usize..e.end() as usize];
        file.write_all_at(bytes, e.offset).unwrap();
    }
}
