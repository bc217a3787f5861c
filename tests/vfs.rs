//! The tree over a simulated domain, without a mount: names, errno, sizes, and how often the domain
//! is asked.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::sync::Arc;
use std::time::Duration;

use fleecefs::backend::sim::{GRANULE, Sim};
use fleecefs::engine::{Domain, Options, Store};
use fleecefs::model::{Kind, Result};
use fleecefs::vfs::{
    Ask, Attr, Caching, Change, Facts, FileKind, Found, Handle, Ino, Node, Seek, Vfs,
};

#[path = "vfs/writing.rs"]
mod writing;

struct Fixture {
    sim: Sim,
    vfs: Vfs,
    _dir: tempfile::TempDir,
}

impl std::ops::Deref for Fixture {
    type Target = Vfs;
    fn deref(&self) -> &Vfs {
        &self.vfs
    }
}

/// A disk whose data ends in the middle of a granule, and a second one without data.
fn fixture() -> Fixture {
    let sim = Sim::new(&[("vda", 16 * GRANULE + 1000), ("vdb", 4 * GRANULE)]);
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let domain = Domain::open(Arc::new(sim.clone()), store, Options::default()).unwrap();
    let facts = Facts {
        source: "sim: a # b".into(),
        options: vec![("timeout".into(), "30".into())],
        ..Facts::default()
    };
    let fixture = Fixture {
        sim,
        vfs: Vfs::new(Arc::new(domain), facts),
        _dir: dir,
    };
    fixture.write(0, 7);
    fixture.write(2, 8);
    fixture
}

impl Fixture {
    fn write(&self, granule: usize, byte: u8) {
        self.sim.write("vda", granule * GRANULE, &[byte; GRANULE]);
    }

    fn find(&self, path: &str) -> Result<Found> {
        let mut found = None;
        let mut at = Ino::ROOT;
        for name in path.split('/').filter(|n| !n.is_empty()) {
            let next = self.lookup(at, OsStr::new(name))?;
            at = next.attr.ino;
            found = Some(next);
        }
        Ok(found.unwrap())
    }

    fn ino(&self, path: &str) -> Ino {
        match path {
            "" => Ino::ROOT,
            _ => self.find(path).unwrap().attr.ino,
        }
    }

    fn stat(&self, path: &str) -> Attr {
        self.getattr(self.ino(path)).unwrap().0
    }

    fn mkdir(&self, path: &str) -> Result<Found> {
        let (parent, name) = path.rsplit_once('/').unwrap_or(("", path));
        self.vfs.mkdir(self.ino(parent), OsStr::new(name))
    }

    fn rmdir(&self, path: &str) -> Result<()> {
        let (parent, name) = path.rsplit_once('/').unwrap_or(("", path));
        self.vfs.rmdir(self.ino(parent), OsStr::new(name))
    }

    fn open(&self, path: &str) -> Handle {
        self.vfs.open(self.ino(path)).unwrap().handle
    }

    fn bytes(&self, handle: Handle) -> Vec<u8> {
        let mut all = Vec::new();
        let mut part = [0; 10_000];
        loop {
            let n = self.read(handle, all.len() as u64, &mut part).unwrap();
            if n == 0 {
                return all;
            }
            all.extend(&part[..n]);
        }
    }

    fn cat(&self, path: &str) -> String {
        let handle = self.open(path);
        let text = String::from_utf8(self.bytes(handle)).unwrap();
        self.release(handle);
        text
    }

    fn names(&self, dir: &str) -> Vec<String> {
        let handle = self.opendir(self.ino(dir)).unwrap();
        let entries = self.readdir(handle, 0).unwrap();
        self.release(handle);
        entries
            .iter()
            .map(|e| e.name.to_str().unwrap().to_owned())
            .filter(|n| n != "." && n != "..")
            .collect()
    }

    /// Every path below `dir`, as `ls -R` finds them: listing, and looking every name up.
    fn walk(&self, dir: &str, all: &mut BTreeMap<String, Found>) {
        for name in self.names(dir) {
            let path = format!("{dir}/{name}").trim_start_matches('/').to_owned();
            let found = self.find(&path).unwrap();
            all.insert(path.clone(), found);
            if found.attr.kind == FileKind::Directory {
                self.walk(&path, all);
            }
        }
    }

    fn tree(&self) -> BTreeMap<String, Found> {
        let mut all = BTreeMap::new();
        self.walk("", &mut all);
        all
    }

    /// How often the domain was asked while `f` ran.
    fn calls(&self, f: impl FnOnce()) -> Vec<String> {
        let before = self.sim.calls().len();
        f();
        self.sim.calls()[before..].to_vec()
    }
}

#[test]
fn the_tree() {
    let f = fixture();
    assert_eq!(f.mkdir("checkpoints/sun").unwrap().attr.nlink, 3);
    f.mkdir("checkpoints/mon").unwrap();
    f.mkdir("backups/tue").unwrap();
    let paths: Vec<String> = f.tree().into_keys().collect();
    let expected = "
        backups
        backups/tue
        backups/tue/backup.xml
        backups/tue/checkpoint.xml
        backups/tue/control
        backups/tue/dirty.map
        backups/tue/disk.raw
        backups/tue/domain.xml
        backups/tue/map
        backups/tue/map/vda.map
        backups/tue/map/vdb.map
        backups/tue/qcow2
        backups/tue/qcow2/vda.qcow2
        backups/tue/qcow2/vdb.qcow2
        backups/tue/raw
        backups/tue/raw/vda.raw
        backups/tue/raw/vdb.raw
        backups/tue/since
        backups/tue/since/mon
        backups/tue/since/mon/vda.bmap
        backups/tue/since/mon/vda.json
        backups/tue/since/mon/vda.map
        backups/tue/since/mon/vda.qcow2
        backups/tue/since/mon/vda.raw
        backups/tue/since/mon/vdb.bmap
        backups/tue/since/mon/vdb.json
        backups/tue/since/mon/vdb.map
        backups/tue/since/mon/vdb.qcow2
        backups/tue/since/mon/vdb.raw
        backups/tue/since/sun
        backups/tue/since/sun/vda.bmap
        backups/tue/since/sun/vda.json
        backups/tue/since/sun/vda.map
        backups/tue/since/sun/vda.qcow2
        backups/tue/since/sun/vda.raw
        backups/tue/since/sun/vdb.bmap
        backups/tue/since/sun/vdb.json
        backups/tue/since/sun/vdb.map
        backups/tue/since/sun/vdb.qcow2
        backups/tue/since/sun/vdb.raw
        backups/tue/slices
        backups/tue/slices/checkpoint.xml
        backups/tue/slices/domain.xml
        backups/tue/slices/manifest
        backups/tue/slices/vda
        backups/tue/slices/vda/0000
        backups/tue/slices/vda/0000/0000000
        backups/tue/slices/vdb
        backups/tue/slices/vdb/0000
        backups/tue/slices/vdb/0000/0000000
        backups/tue/status
        checkpoints
        checkpoints/mon
        checkpoints/mon/checkpoint.xml
        checkpoints/mon/children
        checkpoints/mon/children/tue
        checkpoints/mon/control
        checkpoints/mon/parent
        checkpoints/mon/status
        checkpoints/sun
        checkpoints/sun/checkpoint.xml
        checkpoints/sun/children
        checkpoints/sun/children/mon
        checkpoints/sun/control
        checkpoints/sun/status
        checkpoints/tue
        checkpoints/tue/checkpoint.xml
        checkpoints/tue/children
        checkpoints/tue/control
        checkpoints/tue/parent
        checkpoints/tue/status
        current
        current/checkpoint.xml
        current/domain.xml
        current/manifest
        current/vda
        current/vda/0000
        current/vda/0000/0000000
        current/vdb
        current/vdb/0000
        current/vdb/0000/0000000
        domain.xml
        events
        last-error
        status";
    let expected: Vec<&str> = expected.split_whitespace().collect();
    assert_eq!(paths, expected);
    assert_eq!(
        f.readlink(f.ino("checkpoints/mon/parent")).unwrap(),
        "../sun"
    );
    let child = f.ino("checkpoints/mon/children/tue");
    assert_eq!(f.readlink(child).unwrap(), "../../tue");
}

#[test]
fn attributes_are_true() {
    let f = fixture();
    f.mkdir("checkpoints/mon").unwrap();
    f.mkdir("backups/tue").unwrap();
    let begun = f.domain().backup("tue").unwrap().begun();
    for (path, found) in f.tree() {
        let (attr, _) = f.getattr(found.attr.ino).unwrap();
        // The link count of a directory is 2 and one for each directory in it.
        if attr.kind == FileKind::Directory {
            let dirs = f.names(&path).into_iter();
            let dirs = dirs.filter(|n| f.stat(&format!("{path}/{n}")).kind == FileKind::Directory);
            assert_eq!(attr.nlink as usize, 2 + dirs.count(), "{path}");
            assert_eq!(attr.perm, 0o700);
        }
        if path.ends_with("manifest") {
            // Newer than every slice: what borg forgets is not theirs.
            assert_eq!(attr.mtime, begun + Duration::from_secs(1), "{path}");
        } else if path.contains("/0000/") {
            assert!(attr.mtime <= begun, "{path}");
        } else if path.starts_with("backups/tue") && !path.ends_with("status") {
            assert_eq!(attr.mtime, begun, "{path}");
        }
        let ending = path.rsplit('.').next().unwrap_or_default();
        let text = matches!(ending, "map" | "json" | "bmap" | "xml") && path != "domain.xml";
        if text {
            assert_eq!(attr.size as usize, f.cat(&path).len(), "{path}");
            assert_eq!(attr.perm, 0o400);
        }
    }
    let created = f.domain().checkpoint("mon").unwrap().checkpoint.created;
    assert_eq!(f.stat("checkpoints/mon").mtime, created);
    // One file under two names.
    let (disk, raw) = (
        f.stat("backups/tue/disk.raw"),
        f.stat("backups/tue/raw/vda.raw"),
    );
    assert_eq!(disk, raw);
    assert_eq!((disk.nlink, disk.size), (2, 16 * GRANULE as u64 + 1000));
    assert_eq!(
        disk.blocks * 512,
        2 * GRANULE as u64,
        "holes take no blocks"
    );
    assert_eq!(f.stat("backups/tue/raw/vdb.raw").blocks, 0);
    assert_ne!(
        f.ino("backups/tue/dirty.map"),
        f.ino("backups/tue/since/mon/vda.map")
    );
}

#[test]
fn listing_asks_nobody_and_a_stat_asks_once() {
    let f = fixture();
    f.mkdir("checkpoints/mon").unwrap();
    f.mkdir("backups/tue").unwrap();
    assert_eq!(f.calls(|| drop(f.tree())), [""; 0]);
    // What the domain must tell is not believed for any time, so that stat(2) really asks.
    for lazy in ["disk.raw", "dirty.map", "map/vda.map", "since/mon/vdb.map"] {
        let found = f.find(&format!("backups/tue/{lazy}")).unwrap();
        assert_eq!(found.attr_ttl, Duration::ZERO, "{lazy}");
        assert!(f.asks(found.attr.ino, Ask::Attributes));
    }
    let stat = |path: &'static str| f.calls(|| assert!(f.stat(path).nlink > 0));
    assert_eq!(stat("backups/tue/disk.raw"), ["allocation"]);
    assert_eq!(stat("backups/tue/raw/vda.raw"), [""; 0]);
    assert_eq!(stat("backups/tue/map/vda.map"), [""; 0]);
    assert_eq!(stat("backups/tue/dirty.map"), ["changed"]);
    assert_eq!(stat("backups/tue/since/mon/vda.map"), [""; 0]);
    assert_eq!(
        stat("backups/tue/since/mon/vdb.map"),
        ["changed", "allocation"]
    );
    assert_eq!(stat("backups/tue/since/mon/vdb.map"), [""; 0]);
    assert!(!f.asks(f.ino("backups/tue/dirty.map"), Ask::Attributes));
    assert!(f.find("backups/tue/dirty.map").unwrap().attr_ttl > Duration::from_secs(60));
    // Status files never ask for their attributes.
    for quiet in [
        "status",
        "last-error",
        "events",
        "domain.xml",
        "backups/tue/status",
        "checkpoints/mon/status",
    ] {
        assert_eq!(stat(quiet), [""; 0], "{quiet}");
    }
    let cat = |path: &'static str| f.calls(|| drop(f.cat(path)));
    assert_eq!(cat("status"), [""; 0]);
    assert_eq!(cat("backups/tue/status"), [""; 0]);
    assert_eq!(cat("checkpoints/mon/status"), ["disks"]);
    assert_eq!(cat("domain.xml"), ["disks"]);
    assert_eq!(stat("domain.xml"), [""; 0]);
    assert_eq!(
        f.stat("domain.xml").size as usize,
        f.cat("domain.xml").len()
    );
}

/// All forms of the same changes are made of one answer of the domain, however often they are read.
#[test]
fn changes_are_asked_for_once_a_backup() {
    let f = fixture();
    f.mkdir("checkpoints/mon").unwrap();
    f.write(5, 1);
    f.mkdir("backups/tue").unwrap();
    for expected in [&["changed", "allocation"][..], &[]] {
        let asked = f.calls(|| {
            for form in ["map", "json", "bmap", "raw", "qcow2"] {
                let path = format!("backups/tue/since/mon/vda.{form}");
                assert!(f.stat(&path).size > 0, "{form}");
                let handle = f.open(&path);
                assert!(!f.bytes(handle).is_empty(), "{form}");
                f.release(handle);
            }
        });
        let maps = asked.into_iter().filter(|call| call != "read_at");
        let maps: Vec<String> = maps.collect();
        assert_eq!(maps, expected);
    }
}

#[test]
fn what_cannot_be_done_and_its_kind() {
    let f = fixture();
    f.mkdir("checkpoints/mon").unwrap();
    f.mkdir("backups/tue").unwrap();
    let kind = |r: Result<()>| r.unwrap_err().kind();
    let mkdir = |path: &str| kind(f.mkdir(path).map(drop));
    for (path, expected) in [
        ("x", Kind::NotPermitted),
        ("backups/tue/x", Kind::NotPermitted),
        ("backups/tue/raw/x", Kind::NotPermitted),
        ("checkpoints/mon/x", Kind::NotPermitted),
        ("checkpoints/mon/children/x", Kind::NotPermitted),
        ("checkpoints/mon", Kind::Exists),
        ("backups/tue", Kind::Exists),
        ("backups/.x", Kind::Invalid),
        ("backups/a b", Kind::Invalid),
        ("checkpoints/x.xml", Kind::Invalid),
    ] {
        assert_eq!(mkdir(path), expected, "mkdir {path}");
    }
    assert_eq!(
        mkdir(&format!("backups/{}", "x".repeat(252))),
        Kind::NameTooLong
    );
    for (path, expected) in [
        ("checkpoints", Kind::NotPermitted),
        ("backups/tue/raw", Kind::NotPermitted),
        ("backups/none", Kind::NotFound),
        ("checkpoints/none", Kind::NotFound),
        ("checkpoints/mon", Kind::Busy),
    ] {
        assert_eq!(kind(f.rmdir(path)), expected, "rmdir {path}");
    }
    for (change, expected) in [
        (Change::Attributes, Kind::ReadOnly),
        (Change::Content, Kind::ReadOnly),
        (Change::Create, Kind::NotPermitted),
        (Change::Symlink, Kind::NotPermitted),
        (Change::Link, Kind::NotPermitted),
        (Change::Unlink, Kind::NotPermitted),
        (Change::Exchange, Kind::Invalid),
        (Change::ExtendedAttributes, Kind::Unsupported),
    ] {
        assert_eq!(f.refuse(Ino::ROOT, None, change).kind(), expected);
    }
    let raw = f.ino("backups/tue/disk.raw");
    let dir = f.ino("backups");
    assert_eq!(f.vfs.open(dir).unwrap_err().kind(), Kind::IsADirectory);
    assert_eq!(f.opendir(raw).unwrap_err().kind(), Kind::NotADirectory);
    assert_eq!(
        f.lookup(raw, OsStr::new("x")).unwrap_err().kind(),
        Kind::NotADirectory
    );
    assert_eq!(f.readlink(raw).unwrap_err().kind(), Kind::Invalid);
    assert_eq!(f.find("backups/none").unwrap_err().kind(), Kind::NotFound);
    assert_eq!(f.getattr(Ino(0)).unwrap_err().kind(), Kind::NotFound);
    let map = Node::SinceMap(1, 99, 0).ino().unwrap();
    assert_eq!(f.vfs.open(map).unwrap_err().kind(), Kind::Stale);
    assert_eq!(
        f.read(Handle(999), 0, &mut [0]).unwrap_err().kind(),
        Kind::Io
    );
}

#[test]
fn the_last_error_says_it_in_words() {
    let f = fixture();
    assert_eq!(f.cat("last-error"), "");
    assert!(f.find("nothing").is_err(), "no refusal");
    assert_eq!(f.cat("last-error"), "");
    let earlier = f.open("last-error");
    f.mkdir("backups/a b").unwrap_err();
    f.refuse(f.ino("checkpoints"), Some(OsStr::new("x")), Change::Create);
    f.sim.fail_next("begin", Kind::NoSpace);
    f.mkdir("backups/x").unwrap_err();
    let text = f.cat("last-error");
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines.len(), 3, "{text}");
    assert!(lines[0].contains("Z mkdir backups/a b: \"a b\" cannot be a name here (use "));
    assert!(lines[1].ends_with("Z create checkpoints/x: files cannot be made here"));
    assert!(lines[2].ends_with("mkdir backups/x: begin backup x: begin fails as asked"));
    assert_eq!(
        f.bytes(earlier),
        b"",
        "what was opened before stays as it was"
    );
    assert_eq!(f.stat("last-error").size as usize, text.len());
}

#[test]
fn reading_and_seeking() {
    let f = fixture();
    f.mkdir("backups/tue").unwrap();
    f.write(0, 9);
    let opened = f.vfs.open(f.ino("backups/tue/disk.raw")).unwrap();
    assert_eq!(opened.caching, Caching::Keep);
    let handle = opened.handle;
    let size = 16 * GRANULE + 1000;
    let disk = f.bytes(handle);
    assert_eq!(disk.len(), size);
    assert!(disk[..GRANULE].iter().all(|b| *b == 7), "as it was");
    let mut buf = [1; 4096];
    assert_eq!(f.read(handle, size as u64 - 10, &mut buf).unwrap(), 10);
    assert_eq!(buf[..10], [0; 10]);
    assert_eq!(f.read(handle, size as u64, &mut buf).unwrap(), 0);
    assert_eq!(f.read(handle, u64::MAX, &mut buf).unwrap(), 0);
    assert_eq!(
        f.read(handle, GRANULE as u64 - 1, &mut buf[..3]).unwrap(),
        3
    );
    assert_eq!(buf[..3], [7, 0, 0]);

    let g = GRANULE as i64;
    let seek = |offset, to| f.lseek(handle, offset, to).map_err(|e| e.kind());
    assert_eq!(seek(0, Seek::Data), Ok(0));
    assert_eq!(seek(0, Seek::Hole), Ok(g));
    assert_eq!(seek(g, Seek::Data), Ok(2 * g));
    assert_eq!(seek(3 * g, Seek::Data), Err(Kind::PastEnd));
    assert_eq!(seek(3 * g, Seek::Hole), Ok(3 * g));
    for past in [size as i64, i64::MAX, -1] {
        assert_eq!(seek(past, Seek::Hole), Err(Kind::PastEnd), "{past}");
    }
    let status = f.open("status");
    assert_eq!(f.lseek(status, 3, Seek::Data).unwrap(), 3);
    let end = f.cat("status").len() as i64;
    assert_eq!(f.lseek(status, 3, Seek::Hole).unwrap(), end);
    assert_eq!(f.cat("last-error"), "", "the end of data is no refusal");
}

#[test]
fn maps_and_documents() {
    let f = fixture();
    f.mkdir("checkpoints/mon").unwrap();
    f.write(2, 1);
    f.write(4, 0); // written, and reads as zeros
    f.mkdir("backups/tue").unwrap();
    f.write(5, 1);
    let dirty = f.cat("backups/tue/dirty.map");
    assert_eq!(
        dirty,
        "         0        8192    0  clean\n      8192        4096    1  dirty\n     12288        \
         4096    0  clean\n     16384        4096    3  dirty,zero\n     20480       46056    0  \
         clean\n"
    );
    assert_eq!(f.cat("backups/tue/since/mon/vda.map"), dirty);
    assert_eq!(
        f.cat("backups/tue/map/vda.map").lines().next().unwrap(),
        "         0        4096    0  data"
    );
    let xml = f.cat("backups/tue/backup.xml");
    assert!(xml.contains("<incremental>mon</incremental>"), "{xml}");
    assert!(!xml.contains("exportname"), "{xml}");
    // The documents of a backup stay as they were at the instant.
    let (checkpoint, domain) = (
        f.cat("backups/tue/checkpoint.xml"),
        f.cat("backups/tue/domain.xml"),
    );
    assert_eq!(checkpoint, f.cat("checkpoints/tue/checkpoint.xml"));
    f.sim.add_disk("vdc", GRANULE);
    f.rmdir("checkpoints/tue").unwrap();
    assert_eq!(f.cat("backups/tue/checkpoint.xml"), checkpoint);
    assert_eq!(f.cat("backups/tue/domain.xml"), domain);
    assert!(!domain.contains("vdc") && f.cat("domain.xml").contains("vdc"));
    assert_eq!(f.cat("last-error"), "");
}

#[test]
fn status_texts() {
    let f = fixture();
    f.sim
        .disk("vdb", |d| d.no_checkpoint = Some("raw: cannot".into()));
    f.mkdir("checkpoints/none").unwrap();
    f.mkdir("backups/2026-11-23").unwrap();
    let before = f.open("backups/2026-11-23/status");
    f.bytes(f.open("backups/2026-11-23/disk.raw"));
    let text = f.cat("backups/2026-11-23/status");
    for line in [
        "state: running",
        "mode: pull",
        "job: 1",
        "base: \"none\"",
        "checkpoint: \"2026-11-23\"",
        "bytes-pulled: 12288",
        "scratch-used: 0",
        "scratch-limit: none",
        "current: yes",
        "disks:",
        "  vda:",
        "    size: 66536",
        "    checkpoint: yes",
        "    trusted-since: \"none\"",
        "  vdb:",
        "    checkpoint: no",
        "    no-checkpoint-because: \"raw: cannot\"",
        "    trusted-since: none",
    ] {
        assert!(text.lines().any(|l| l == line), "{line} in\n{text}");
    }
    let before = String::from_utf8(f.bytes(before)).unwrap();
    assert!(before.contains("bytes-pulled: 0\n"), "fixed when opened");
    let mount = f.cat("status");
    for line in [
        "state: connected",
        "domain: sim",
        "source: \"sim: a # b\"",
        "checkpoints: 2",
        "backups: 1",
        &format!("pid: {}", std::process::id()),
    ] {
        assert!(mount.lines().any(|l| l == line), "{line} in\n{mount}");
    }
    let checkpoint = f.cat("checkpoints/none/status");
    assert!(checkpoint.contains("parent: none\n"), "{checkpoint}");
    assert!(
        checkpoint.contains("    state: trusted\n    recording: no\n"),
        "{checkpoint}"
    );
}

#[test]
fn a_broken_history_is_estale_when_opened() {
    let f = fixture();
    f.mkdir("checkpoints/mon").unwrap();
    f.sim.disk("vda", |d| drop(d.bitmaps.remove("mon")));
    f.mkdir("backups/tue").unwrap();
    assert_eq!(
        f.names("backups/tue/since/mon"),
        ["vdb.map", "vdb.json", "vdb.bmap", "vdb.raw", "vdb.qcow2"],
        "where it is trusted"
    );
    let dirty = f.ino("backups/tue/dirty.map");
    assert_eq!(f.getattr(dirty).unwrap().0.size, 0, "ls -l goes on");
    assert_eq!(f.vfs.open(dirty).unwrap_err().kind(), Kind::Stale);
    assert!(f.cat("last-error").contains("open backups/tue/dirty.map: "));
    assert!(f.cat("backups/tue/status").contains("broken-before: "));
    assert!(
        f.cat("backups/tue/backup.xml")
            .contains("backupmode=\"full\"")
    );
}

#[test]
fn a_backup_that_ended_under_a_reader() {
    let f = fixture();
    f.mkdir("backups/tue").unwrap();
    let ino = f.ino("backups/tue/disk.raw");
    let (disk, map) = (
        f.open("backups/tue/disk.raw"),
        f.open("backups/tue/dirty.map"),
    );
    let dir = f.opendir(f.ino("backups/tue")).unwrap();
    f.rmdir("backups/tue").unwrap();
    assert_eq!(
        f.read(disk, 0, &mut [0; 512]).unwrap_err().kind(),
        Kind::NotConnected
    );
    // Also where it would read zeros: nobody can tell any more.
    let hole = f.read(disk, GRANULE as u64, &mut [0; 512]);
    assert_eq!(hole.unwrap_err().kind(), Kind::NotConnected);
    assert!(!f.bytes(map).is_empty(), "a text that was opened stays");
    assert_eq!(f.getattr(ino).unwrap_err().kind(), Kind::NotFound);
    assert_eq!(f.vfs.open(ino).unwrap_err().kind(), Kind::NotFound);
    assert_eq!(f.readdir(dir, 0).unwrap_err().kind(), Kind::NotFound);
    // The name again is another file.
    f.mkdir("backups/tue").unwrap();
    assert_ne!(f.ino("backups/tue/disk.raw"), ino);
    assert_eq!(f.getattr(ino).unwrap_err().kind(), Kind::NotFound);
}

#[test]
fn a_listing_keeps_its_offsets() {
    let f = fixture();
    for name in ["a", "b", "c"] {
        f.mkdir(&format!("checkpoints/{name}")).unwrap();
    }
    let dir = f.opendir(f.ino("checkpoints")).unwrap();
    let first = f.readdir(dir, 0).unwrap();
    f.rmdir("checkpoints/a").unwrap();
    assert_eq!(f.readdir(dir, 2).unwrap(), first, "in the middle");
    assert_eq!(f.readdir(dir, 0).unwrap().len(), first.len() - 1, "rewound");
}

#[test]
fn a_domain_that_fails_leaves_the_tree_readable() {
    let f = fixture();
    f.mkdir("backups/tue").unwrap();
    f.sim.fail_next("allocation", Kind::TimedOut);
    let raw = f.ino("backups/tue/disk.raw");
    assert_eq!(f.getattr(raw).unwrap_err().kind(), Kind::TimedOut);
    assert!(f.cat("last-error").contains("stat backups/tue/"));
    assert!(f.getattr(raw).is_ok(), "asked again");
    f.sim.fail_next("read_at", Kind::Io);
    let handle = f.open("backups/tue/disk.raw");
    assert_eq!(
        f.read(handle, 0, &mut [0; 512]).unwrap_err().kind(),
        Kind::Io
    );
    assert_eq!(f.read(handle, 0, &mut [0; 512]).unwrap(), 512);
}
