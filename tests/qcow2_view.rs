//! The made-up qcow2 images, written to files and read by QEMU itself: no error, no leak, and the
//! disk's bytes, alone, over a backing file and in a chain.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::fs;
use std::io::Write as _;
use std::path::Path;

use common::tools::{need, run, temp_dir, text};
use common::{Disk, Rng, Write, image};
use fleecefs::model::{Allocation, Change, Extents};
use fleecefs::view::qcow2::{Backing, Format, Image, Kind};

const CLUSTER: u64 = 65536;

/// Sizes around sectors, clusters and what an L2 table maps, and one of nothing.
const SIZES: [u64; 7] = [
    0,
    1,
    512,
    CLUSTER - 1,
    3 * CLUSTER + 513,
    20 << 20,
    (24 << 20) + 12345,
];

/// Runs of all kinds, most of them about as long as a cluster.
fn random<K: Copy + PartialEq>(rng: &mut Rng, size: u64, kinds: &[K]) -> Extents<K> {
    let mut map = Extents::new();
    while map.size() < size {
        let length = match rng.within(0..4) {
            0 => rng.within(1..4096),
            1 => CLUSTER,
            2 => rng.within(1..4 * CLUSTER),
            _ => CLUSTER - map.size() % CLUSTER,
        };
        let kind = kinds[rng.within(0..kinds.len() as u64) as usize];
        map.push(length.min(size - map.size()), kind);
    }
    map
}

fn with<K: Copy + PartialEq>(disk: &Disk, map: &Extents<K>, pattern: fn(K) -> Option<u8>) -> Disk {
    let mut disk = disk.clone();
    for e in map.iter() {
        if let Some(pattern) = pattern(e.kind) {
            disk.apply(Write {
                offset: e.offset,
                length: e.length,
                pattern,
            });
        }
    }
    disk
}

/// The disk after the changes.
fn changed(disk: &Disk, map: &Extents<Change>) -> Disk {
    with(disk, map, |c| match c {
        Change::Clean => None,
        Change::Dirty => Some(0xdd),
        Change::DirtyZero => Some(0),
    })
}

/// Reads the image in pieces of no round size.
fn write(image: &Image, disk: &Disk, path: &Path) {
    let mut file = fs::File::create(path).unwrap();
    let mut at = 0;
    let mut buf = vec![0; 1_000_003];
    while at < image.size() {
        let length = (buf.len() as u64).min(image.size() - at) as usize;
        image
            .read(at, &mut buf[..length], |from, part| {
                let from = from as usize;
                part.copy_from_slice(&disk.bytes()[from..from + part.len()]);
                Ok::<(), ()>(())
            })
            .unwrap();
        file.write_all(&buf[..length]).unwrap();
        at += length as u64;
    }
}

/// QEMU finds no error and no leak (which is exit status 3), and reads the disk, to its last sector.
fn assert_holds(path: &Path, disk: &Disk) {
    run("qemu-img", &["check", "-q", "-f", "qcow2", text(path)]);
    let mut bytes = image::bytes(path, "qcow2");
    let sectors = disk.bytes().len().next_multiple_of(512);
    assert_eq!(bytes.len(), sectors);
    assert!(bytes.split_off(disk.bytes().len()).iter().all(|b| *b == 0));
    disk.assert_is(&bytes, &path.display().to_string());
    let raw = path.with_extension("raw");
    fs::write(&raw, disk.bytes()).unwrap();
    let (raw, path) = (text(&raw), text(path));
    run(
        "qemu-img",
        &["compare", "-q", "-f", "raw", "-F", "qcow2", raw, path],
    );
}

/// What `qemu-img map` says of the image itself, as the kinds of the view.
fn map(path: &Path) -> Extents<Kind> {
    let said = run(
        "qemu-img",
        &["map", "--output=json", "-f", "qcow2", text(path)],
    );
    let mut map = Extents::new();
    for e in serde_json::from_str::<Vec<serde_json::Value>>(&said).unwrap() {
        assert_eq!(e["start"], map.size());
        let kind = match (e["depth"] == 0 && e["present"] == true, e["data"] == true) {
            (false, _) => Kind::Absent,
            (true, false) => Kind::Zero,
            (true, true) => Kind::Data,
        };
        map.push(e["length"].as_u64().unwrap(), kind);
    }
    map
}

#[test]
fn an_image_alone() {
    need!("qemu-img", "qemu-io");
    let dir = temp_dir();
    let path = dir.path().join("full.qcow2");
    let mut rng = Rng::from_env();
    let kinds = [Allocation::DATA, Allocation::HOLE, Allocation::ZERO];
    for size in SIZES {
        let map = random(&mut rng, size, &kinds);
        let disk = with(&Disk::patterned(size), &map, |a| a.zero.then_some(0));
        write(&Image::full(&map).unwrap(), &disk, &path);
        assert_holds(&path, &disk);
    }
    // It can be written to like any other: what counts clusters is in order.
    for offset in ["0", "5M", "19M"] {
        let command = format!("write -P 7 {offset} 1M");
        run("qemu-io", &["-f", "qcow2", "-c", &command, text(&path)]);
    }
    run("qemu-img", &["check", "-q", "-f", "qcow2", text(&path)]);
}

#[test]
fn a_chain_of_overlays() {
    need!("qemu-img");
    let dir = temp_dir();
    let path = |name: &str| dir.path().join(name);
    let mut rng = Rng::from_env();
    let kinds = [
        Change::Clean,
        Change::Clean,
        Change::Dirty,
        Change::DirtyZero,
    ];
    for size in SIZES {
        let sun = Disk::patterned(size);
        fs::write(path("sun.raw"), sun.bytes()).unwrap();
        let mut before = sun;
        let mut backing = Backing {
            name: "sun.raw".into(),
            format: Format::Raw,
        };
        for name in ["mon.qcow2", "tue.qcow2"] {
            let map = random(&mut rng, size, &kinds);
            let now = changed(&before, &map);
            let image = Image::overlay(&map, Some(&backing)).unwrap();
            write(&image, &now, &path(name));
            assert_holds(&path(name), &now);
            before = now;
            backing = Backing {
                name: name.into(),
                format: Format::Qcow2,
            };
        }
        let said = run(
            "qemu-img",
            &["info", "--output=json", text(&path("tue.qcow2"))],
        );
        let said: serde_json::Value = serde_json::from_str(&said).unwrap();
        assert_eq!(said["backing-filename"], "mon.qcow2");
        assert_eq!(said["backing-filename-format"], "qcow2");
        assert_eq!(said["virtual-size"], size.next_multiple_of(512));
    }
}

#[test]
fn an_overlay_whose_backing_file_is_named_later() {
    need!("qemu-img");
    let dir = temp_dir();
    let path = dir.path().join("over.qcow2");
    let mut rng = Rng::from_env();
    let size = (9 << 20) + 512;
    let map = random(&mut rng, size, &[Change::Clean, Change::Dirty]);
    let sun = Disk::patterned(size);
    let mon = changed(&sun, &map);
    fs::write(dir.path().join("sun.raw"), sun.bytes()).unwrap();
    write(&Image::overlay(&map, None).unwrap(), &mon, &path);
    run("qemu-img", &["check", "-q", "-f", "qcow2", text(&path)]);
    run(
        "qemu-img",
        &[
            "rebase",
            "-u",
            "-f",
            "qcow2",
            "-b",
            "sun.raw",
            "-F",
            "raw",
            text(&path),
        ],
    );
    assert_holds(&path, &mon);
    // And becomes part of what it lies over.
    run("qemu-img", &["commit", "-q", "-f", "qcow2", text(&path)]);
    mon.assert_file(&dir.path().join("sun.raw"));
}

/// A cluster is told as zeros only where all of it is, and as absent only where none of it changed.
#[test]
fn what_qemu_is_told_of_each_cluster() {
    need!("qemu-img");
    let dir = temp_dir();
    let path = dir.path().join("over.qcow2");
    let mut map = Extents::new();
    for (length, change) in [
        (2 * CLUSTER, Change::DirtyZero),
        (CLUSTER, Change::Clean),
        (CLUSTER / 2, Change::DirtyZero),
        (2 * CLUSTER, Change::Clean),
        (CLUSTER / 2, Change::Dirty),
        (3 * CLUSTER, Change::Clean),
        (CLUSTER, Change::DirtyZero),
    ] {
        map.push(length, change);
    }
    let sun = Disk::patterned(map.size());
    fs::write(dir.path().join("sun.raw"), sun.bytes()).unwrap();
    let backing = Backing {
        name: "sun.raw".into(),
        format: Format::Raw,
    };
    let mon = changed(&sun, &map);
    write(&Image::overlay(&map, Some(&backing)).unwrap(), &mon, &path);
    let mut told = Extents::new();
    for (clusters, kind) in [
        (2, Kind::Zero),
        (1, Kind::Absent),
        (1, Kind::Data),
        (1, Kind::Absent),
        (1, Kind::Data),
        (3, Kind::Absent),
        (1, Kind::Zero),
    ] {
        told.push(clusters * CLUSTER, kind);
    }
    assert_eq!(self::map(&path), told);
}

/// Small clusters make many tables of all sorts, up to two clusters of refcount table.
#[test]
fn clusters_of_other_sizes() {
    need!("qemu-img");
    let dir = temp_dir();
    let path = dir.path().join("small.qcow2");
    let mut rng = Rng::from_env();
    for (bits, size) in [(9, 10 << 20), (12, (20 << 20) + 1), (21, (20 << 20) + 1)] {
        let map = random(
            &mut rng,
            size,
            &[Kind::Data, Kind::Data, Kind::Data, Kind::Absent],
        );
        let disk = with(&Disk::patterned(size), &map, |k| {
            (k == Kind::Absent).then_some(0)
        });
        write(&Image::new(&map, bits, None).unwrap(), &disk, &path);
        assert_holds(&path, &disk);
    }
}

/// The tables of 16 TiB, read by QEMU; the data is zeros here, for the file to be small.
#[test]
fn sixteen_tebibytes() {
    need!("qemu-img");
    let dir = temp_dir();
    let path = dir.path().join("large.qcow2");
    let mut map = Extents::new();
    let mut told = Extents::new();
    let apart = (1 << 40) / CLUSTER * CLUSTER;
    for n in 0..16 {
        map.push(n * apart - map.size(), Allocation::HOLE);
        map.push(CLUSTER, Allocation::DATA);
        told.push(n * apart - told.size(), Kind::Absent);
        told.push(CLUSTER, Kind::Data);
    }
    map.push((16 << 40) - map.size(), Allocation::HOLE);
    told.push((16 << 40) - told.size(), Kind::Absent);
    let image = Image::full(&map).unwrap();
    assert_eq!(image.size(), (7 + 16 + 16) * CLUSTER);
    let mut bytes = vec![0; image.size() as usize];
    image.read(0, &mut bytes, |_, _| Ok::<(), ()>(())).unwrap();
    fs::write(&path, bytes).unwrap();
    run("qemu-img", &["check", "-q", "-f", "qcow2", text(&path)]);
    assert_eq!(self::map(&path), told);
}
