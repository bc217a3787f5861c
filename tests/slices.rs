//! `current/` and `slices/` on a real mount of a real QEMU: unmodified backup tools read what changed
//! and nothing else, and what they keep is the frozen disk bit for bit.
//!
//! kopia goes by size, time, mode and owner, all of which are checked here; it is in no Debian archive,
//! and so it does not run here itself.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::collections::BTreeSet;
use std::io::Read;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};

use common::mount::Home;
use common::tools::{need, run, text};
use common::{Disk, Fleecefs, Qemu, Rng, Write, image, tools};

const MIB: u64 = 1 << 20;

/// A paused guest, whose writes are made for it, its mount, and a model of its disk.
struct World {
    dir: tempfile::TempDir,
    qemu: Option<Qemu>,
    mount: Option<Fleecefs>,
    disk: Disk,
    rng: Rng,
    slice: u64,
}

impl World {
    /// All data but for a hole of a sixteenth.
    fn new(size: u64, slice: u64) -> Self {
        let dir = tools::temp_dir();
        let mut disk = Disk::patterned(size);
        disk.apply(Write {
            offset: size / 4 / slice * slice,
            length: size / 16 / slice * slice,
            pattern: 0,
        });
        image::from_model(&dir.path().join("vda.qcow2"), &disk);
        let mut world = Self {
            dir,
            qemu: None,
            mount: None,
            disk,
            rng: Rng::from_env(),
            slice,
        };
        world.boot();
        world.remount(Home::new());
        world
    }

    fn boot(&mut self) {
        let path = self.dir.path().join("vda.qcow2");
        let qemu = Qemu::build().disk("vda", &path, "qcow2").paused();
        self.qemu = Some(qemu.start());
    }

    /// The domain has a name, since each start of QEMU has another socket.
    fn remount(&mut self, home: Home) {
        let mount = Fleecefs::qmp(&self.qemu().socket())
            .option("domain=vm")
            .option(&format!("slice-size={}K", self.slice / 1024))
            .home(home);
        self.mount = Some(mount.mount());
    }

    fn unmount(&mut self) -> Home {
        self.mount.take().unwrap().umount()
    }

    fn qemu(&self) -> &Qemu {
        self.qemu.as_ref().unwrap()
    }

    fn mount(&self) -> &Fleecefs {
        self.mount.as_ref().unwrap()
    }

    fn count(&self) -> u64 {
        self.disk.size().div_ceil(self.slice)
    }

    /// So many slices at random.
    fn pick(&mut self, many: u64) -> BTreeSet<u64> {
        let mut picked = BTreeSet::new();
        while (picked.len() as u64) < many {
            picked.insert(self.rng.within(0..self.count()));
        }
        picked
    }

    /// The guest writes somewhere in each of these slices.
    fn write_in(&mut self, slices: &BTreeSet<u64>) {
        for slice in slices {
            let start = slice * self.slice;
            let end = (start + self.slice).min(self.disk.size());
            let mut write = self.rng.write(end - start);
            write.offset += start;
            self.qemu().write("vda", write);
            self.disk.apply(write);
        }
    }

    fn begin(&self, backup: &str) {
        self.mount().mkdir(&format!("backups/{backup}")).unwrap();
    }

    fn end(&self, backup: &str) {
        self.mount().rmdir(&format!("backups/{backup}")).unwrap();
    }

    fn status(&self, backup: &str, key: &str) -> String {
        let text = self.mount().read(&format!("backups/{backup}/status"));
        let prefix = format!("{key}: ");
        let mut lines = text.lines();
        let value = lines.find_map(|line| line.strip_prefix(&prefix));
        value
            .unwrap_or_else(|| panic!("no {key}: {text}"))
            .to_owned()
    }

    fn pulled(&self, backup: &str) -> u64 {
        self.status(backup, "bytes-pulled").parse().unwrap()
    }

    /// The slices below a directory of the mount, in order.
    fn slices(&self, top: &str) -> Vec<PathBuf> {
        slices(&self.mount().path(top))
    }

    /// Time and number of each slice.
    fn stamps(&self, top: &str) -> Vec<(i64, u64)> {
        let stamp = |path: &PathBuf| {
            let meta = std::fs::metadata(path).unwrap();
            assert_eq!(meta.mtime(), meta.ctime());
            assert_eq!((meta.mtime_nsec(), meta.ctime_nsec()), (0, 0));
            (meta.mtime(), meta.ino())
        };
        self.slices(top).iter().map(stamp).collect()
    }
}

/// `D/NNNN/NNNNNNN` below a directory: what a shell's `*/*/*` gives, in its order.
fn slices(top: &Path) -> Vec<PathBuf> {
    let sorted = |dir: &Path| {
        let entries = std::fs::read_dir(dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display()));
        let mut paths: Vec<_> = entries.map(|e| e.unwrap().path()).collect();
        paths.sort();
        paths
    };
    let dirs = sorted(&top.join("vda"));
    dirs.iter().flat_map(|dir| sorted(dir)).collect()
}

/// `cat vda/*/*`
fn joined(slices: &[PathBuf]) -> Vec<u8> {
    let mut all = Vec::new();
    for path in slices {
        let mut file = std::fs::File::open(path).unwrap();
        let read = file.read_to_end(&mut all);
        read.unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    }
    all
}

/// A backup tool with its store, in a directory of its own.
#[derive(Clone, Copy, PartialEq)]
enum Tool {
    Rsync,
    Borg,
    Restic,
}

impl Tool {
    fn command(self, dir: &Path, current: &Path, args: &[&str]) {
        let program = match self {
            Tool::Rsync => "rsync",
            Tool::Borg => "borg",
            Tool::Restic => "restic",
        };
        let output = Command::new(tools::find(program).unwrap())
            .args(args)
            .current_dir(current)
            .env("HOME", dir)
            .env("BORG_BASE_DIR", dir)
            .env("BORG_REPO", dir.join("repo"))
            .env("BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK", "yes")
            .env("RESTIC_REPOSITORY", dir.join("repo"))
            .env("RESTIC_CACHE_DIR", dir.join("cache"))
            .env("RESTIC_PASSWORD", "secret")
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{program} {args:?}: {said}");
    }

    fn prepare(self, dir: &Path) {
        match self {
            Tool::Rsync => {}
            Tool::Borg => self.command(dir, dir, &["init", "--encryption=none"]),
            Tool::Restic => self.command(dir, dir, &["init"]),
        }
    }

    /// Backs up `current/`.
    fn save(self, dir: &Path, current: &Path, night: &str) {
        match self {
            Tool::Rsync => {
                let to = dir.join("copy");
                self.command(dir, current, &["-a", "--delete", "./", text(&to)]);
            }
            Tool::Borg => self.command(dir, current, &["create", &format!("::{night}"), "."]),
            Tool::Restic => self.command(dir, current, &["backup", "--tag", night, "."]),
        }
    }

    /// The tree as it was that night.
    fn restored(self, dir: &Path, night: &str) -> PathBuf {
        let to = match self {
            Tool::Rsync => return dir.join("copy"),
            _ => dir.join(format!("restored-{night}")),
        };
        std::fs::create_dir(&to).unwrap();
        match self {
            Tool::Rsync => {}
            Tool::Borg => self.command(dir, &to, &["extract", &format!("::{night}")]),
            Tool::Restic => {
                let args = ["restore", "latest", "--tag", night, "--target", text(&to)];
                self.command(dir, dir, &args);
            }
        }
        to
    }
}

/// Seven nights. Each changes at most 1 % of the slices, and something else happens; while the tool
/// walks `current/`, the guest goes on writing, and other backups begin and end.
fn nights(tool: Tool) {
    let Some(()) = tools::fuse() else { return };
    let mut world = World::new(220 * MIB + 512, MIB);
    let size = world.disk.size();
    let store = tools::temp_dir();
    tool.prepare(store.path());
    let mut next = world.pick(2);
    for (n, what) in [
        "the first",
        "an ordinary night",
        "remounted",
        "rebooted, and a backup that nobody looked at",
        "an old checkpoint deleted",
        "an ordinary night",
        "the newest checkpoint deleted",
    ]
    .into_iter()
    .enumerate()
    {
        let night = format!("night-{n}");
        match n {
            2 => {
                let home = world.unmount();
                world.remount(home);
            }
            3 => {
                world.begin("unseen");
                world.end("unseen");
                world.write_in(&next.clone());
                let home = world.unmount();
                world.qemu.take().unwrap().quit();
                world.boot();
                world.remount(home);
            }
            4 => world.mount().rmdir("checkpoints/night-2").unwrap(),
            6 => {
                let newest = world.mount().list("checkpoints");
                let created = |c: &&String| {
                    let path = world.mount().path(&format!("checkpoints/{c}"));
                    std::fs::metadata(path).unwrap().mtime()
                };
                let newest = newest.iter().max_by_key(created).unwrap();
                world
                    .mount()
                    .rmdir(&format!("checkpoints/{newest}"))
                    .unwrap();
            }
            _ => {}
        }
        world.write_in(&next.clone());
        assert!(world.mount().list("current").is_empty());
        world.begin(&night);
        assert_eq!(world.status(&night, "current"), "yes");
        let frozen = world.disk.clone();

        next = world.pick(2);
        let current = world.mount().path("current");
        let walked = AtomicBool::new(false);
        let others = std::thread::scope(|scope| {
            let walk = scope.spawn(|| {
                let save = || tool.save(store.path(), &current, &night);
                let saved = std::panic::catch_unwind(std::panic::AssertUnwindSafe(save));
                walked.store(true, Ordering::Release);
                saved
            });
            let mut others = 0;
            loop {
                let over = walked.load(Ordering::Acquire);
                let other = format!("other-{n}-{others}");
                world.begin(&other);
                assert_eq!(world.status(&other, "current"), "no");
                world.write_in(&next.clone());
                world.end(&other);
                others += 1;
                if over {
                    break;
                }
            }
            if let Err(panic) = walk.join().unwrap() {
                std::panic::resume_unwind(panic);
            }
            others
        });
        let pulled = world.pulled(&night);
        let share = 100.0 * pulled as f64 / size as f64;
        println!("{night}, {what}: {pulled} bytes pulled, {share:.2} %; {others} others meanwhile");
        match n {
            0 => assert!(pulled >= size - size / 16, "{pulled}"),
            _ => assert!(pulled * 1000 <= size * 11, "{what}: {pulled} of {size}"),
        }
        let restored = tool.restored(store.path(), &night);
        frozen.assert_is(&joined(&slices(&restored)), what);
        let manifest = std::fs::read_to_string(restored.join("manifest")).unwrap();
        assert!(
            manifest.contains(&format!("backup: {night}\n")),
            "{manifest}"
        );
        // The same paths as last night, with what the kernel kept of them.
        frozen.assert_is(&joined(&world.slices("current")), what);
        world.end(&night);
        if tool != Tool::Rsync {
            std::fs::remove_dir_all(restored).unwrap();
        }
    }
    world.unmount().assert_clean();
}

#[test]
fn rsync_reads_what_changed() {
    need!("qemu-system-x86_64", "qemu-img", "rsync");
    nights(Tool::Rsync);
}

#[test]
fn borg_reads_what_changed() {
    need!("qemu-system-x86_64", "qemu-img", "borg");
    nights(Tool::Borg);
}

#[test]
fn restic_reads_what_changed() {
    need!("qemu-system-x86_64", "qemu-img", "restic");
    nights(Tool::Restic);
}

/// Numbers, times, modes and names, in `current/`, in `slices/`, and from one mount to the next.
#[test]
fn a_slice_is_the_same_file_every_night() {
    need!("qemu-system-x86_64", "qemu-img");
    let Some(()) = tools::fuse() else { return };
    let slice = 64 * 1024;
    // More than one directory, and a last slice that is shorter.
    let mut world = World::new(1010 * slice + 512, slice);
    world.begin("mon");
    let mon = world.stamps("current");
    assert_eq!(mon.len(), 1011);
    let numbers: BTreeSet<u64> = mon.iter().map(|(_, ino)| *ino).collect();
    assert_eq!(numbers.len(), mon.len());
    let names = world.slices("current");
    assert!(names[0].ends_with("current/vda/0000/0000000"));
    assert!(names[1010].ends_with("current/vda/0001/0001010"));
    let sizes = names.iter().map(|n| std::fs::metadata(n).unwrap().len());
    assert!(sizes.eq((0..1011).map(|k| if k == 1010 { 512 } else { slice })));
    assert_eq!(
        world.mount().list("current"),
        ["checkpoint.xml", "domain.xml", "manifest", "vda"]
    );

    // A second one is read under its own name, and has its own numbers there.
    world.write_in(&[1010].into());
    world.begin("mon2");
    assert_eq!(world.status("mon2", "current"), "no");
    assert_eq!(
        world.mount().list("backups/mon2/slices"),
        world.mount().list("current")
    );
    assert!(
        world
            .mount()
            .read("current/manifest")
            .contains("backup: mon\n")
    );
    assert!(
        world
            .mount()
            .read("backups/mon2/slices/manifest")
            .contains("backup: mon2\n")
    );
    let second = world.stamps("backups/mon2/slices");
    assert!(second.iter().all(|(_, ino)| !numbers.contains(ino)));
    let of = |stamps: &[(i64, u64)]| stamps.iter().map(|s| s.0).collect::<Vec<_>>();
    let differ = |a: &[(i64, u64)], b: &[(i64, u64)]| -> Vec<usize> {
        let pairs = a.iter().zip(b).enumerate();
        let differ = pairs.filter(|(_, (a, b))| a.0 != b.0);
        differ.map(|(k, _)| k).collect()
    };
    assert_eq!(of(&world.stamps("backups/mon/slices")), of(&mon));
    assert_eq!(differ(&mon, &second), [1010]);
    world.end("mon2");
    world.end("mon");
    assert!(world.mount().list("current").is_empty());

    let home = world.unmount();
    world.remount(home);
    world.write_in(&[7, 700].into());
    world.begin("tue");
    let tue = world.stamps("current");
    assert!(tue.iter().map(|s| s.1).eq(mon.iter().map(|s| s.1)));
    assert_eq!(differ(&mon, &tue), [7, 700, 1010]);
    assert_eq!(differ(&second, &tue), [7, 700]);
    // borg forgets the files of the newest time that it sees.
    let manifest = std::fs::metadata(world.mount().path("current/manifest")).unwrap();
    let begun: i64 = world.status("tue", "begun-unix").parse().unwrap();
    assert_eq!((manifest.mtime(), manifest.ctime()), (begun + 1, begun + 1));
    assert_eq!(tue.iter().map(|s| s.0).max(), Some(begun));
    // Mode and owner, which kopia compares.
    let first = std::fs::metadata(&world.slices("current")[0]).unwrap();
    assert_eq!(first.mode(), 0o100_400);
    world.end("tue");
    world.unmount().assert_clean();
}

/// A slice has the same number the next night: who still has it open must not see that night.
#[test]
fn what_is_open_stays_of_its_night() {
    need!("qemu-system-x86_64", "qemu-img");
    let Some(()) = tools::fuse() else { return };
    for looked_up in [true, false] {
        let mut world = World::new(16 * MIB, MIB);
        world.begin("mon");
        let old = world.disk.bytes()[..2 * MIB as usize].to_vec();
        let path = world.mount().path("current/vda/0000/0000000");
        let other = world.mount().path("current/vda/0000/0000001");
        let cached = std::fs::File::open(&path).unwrap();
        let unread = std::fs::File::open(&other).unwrap();
        cached.read_exact_at(&mut [0; 65536], 0).unwrap();
        world.end("mon");
        for offset in [0, MIB] {
            let write = Write {
                offset,
                length: MIB,
                pattern: 0xee,
            };
            world.qemu().write("vda", write);
            world.disk.apply(write);
        }
        world.begin("tue");
        if looked_up {
            assert!(std::fs::read(&path).unwrap().iter().all(|b| *b == 0xee));
            assert!(std::fs::read(&other).unwrap().iter().all(|b| *b == 0xee));
        }
        for (file, old) in [(&cached, &old[..65536]), (&unread, &old[MIB as usize..])] {
            // An error, or what it was.
            let mut bytes = vec![0; old.len()];
            let _ = file.metadata();
            if file.read_exact_at(&mut bytes, 0).is_ok() {
                assert!(bytes == old, "of another night");
            }
        }
        drop((cached, unread));
        world.end("tue");
        world.unmount().assert_clean();
    }
}

/// A directory that is held open shows one instant, or nothing: also under names that the kernel knows.
#[test]
fn a_directory_that_is_held_shows_no_other_night() {
    need!("qemu-system-x86_64", "qemu-img");
    let Some(()) = tools::fuse() else { return };
    let slice = 64 * 1024;
    let mut world = World::new(4 * slice, slice);
    world.begin("mon");
    let held = std::fs::File::open(world.mount().path("current/vda/0000")).unwrap();
    let inside = format!("/proc/self/fd/{}", held.as_raw_fd());
    let names = ["0000000", "0000001"].map(|name| Path::new(&inside).join(name));
    let mon = names.each_ref().map(|name| std::fs::read(name).unwrap());
    let open = std::fs::File::open(&names[0]).unwrap();
    world.end("mon");
    world.write_in(&[0].into());
    world.begin("tue");
    for name in &names {
        let gone = std::fs::read(name).unwrap_err();
        assert_eq!(gone.kind(), std::io::ErrorKind::NotFound, "{name:?}");
    }
    // What is open is of its night.
    let mut bytes = vec![0; slice as usize];
    if open.read_exact_at(&mut bytes, 0).is_ok() {
        assert!(bytes == mon[0]);
    }
    let tue = std::fs::read(&world.slices("current")[0]).unwrap();
    assert!(tue != mon[0]);
    world.end("tue");
    drop((held, open));
    world.unmount().assert_clean();
}

/// Killed when the checkpoint was made and the table of stamps was not yet: no change is hidden.
#[test]
fn killed_before_anybody_looked() {
    need!("qemu-system-x86_64", "qemu-img");
    let Some(()) = tools::fuse() else { return };
    let mut world = World::new(16 * MIB, 64 * 1024);
    world.begin("mon");
    let mon = world.stamps("current");
    world
        .disk
        .assert_is(&joined(&world.slices("current")), "mon");
    world.end("mon");
    let before = world.pick(3);
    world.write_in(&before);
    world.begin("tue");
    let home = world.mount.take().unwrap().sigkill();
    let after = world.pick(3);
    world.write_in(&after);
    world.remount(home);
    assert!(world.mount().list("current").is_empty());
    world.begin("wed");
    let wed = world.stamps("current");
    let changed = (0..mon.len() as u64).filter(|k| mon[*k as usize].0 != wed[*k as usize].0);
    assert!(changed.eq(before.union(&after).copied()));
    world
        .disk
        .assert_is(&joined(&world.slices("current")), "wed");
    world.end("wed");
    world.unmount().assert_clean();
}

/// A bitmap goes behind our back: everything is read again, once.
#[test]
fn broken_history_is_read_again() {
    need!("qemu-system-x86_64", "qemu-img", "rsync");
    let Some(()) = tools::fuse() else { return };
    let mut world = World::new(16 * MIB, 64 * 1024);
    let copy = world.dir.path().join("copy");
    let data = world.disk.size() - world.disk.size() / 16;
    for (backup, least, most) in [
        ("mon", data, data),
        ("tue", 0, 64 * 1024),
        ("broken", data, data + 64 * 1024),
        ("wed", 0, 64 * 1024),
    ] {
        if backup == "broken" {
            let bitmap = serde_json::json!({"node": "node-vda", "name": "tue"});
            world.qemu().cmd("block-dirty-bitmap-remove", bitmap);
        }
        if backup != "mon" {
            let one = world.pick(1);
            world.write_in(&one);
        }
        world.begin(backup);
        let from = format!("{}/", text(&world.mount().path("current")));
        run("rsync", &["-a", &from, text(&copy)]);
        let pulled = world.pulled(backup);
        assert!((least..=most).contains(&pulled), "{backup}: {pulled}");
        world.disk.assert_is(&joined(&slices(&copy)), backup);
        world.end(backup);
    }
    world.unmount().assert_clean();
}
