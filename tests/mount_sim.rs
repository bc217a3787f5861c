//! A simulated domain behind the real kernel: what programs see, and how a mount ends. Needs
//! /dev/fuse and the right to mount; without, the tests say so and pass, unless
//! FLEECEFS_TESTS_STRICT is set.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::ffi::CString;
use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use fleecefs::backend::sim::{GRANULE, Sim};
use fleecefs::engine::{Domain, Options, Store};
use fleecefs::fuse::{self, MountOptions, Mounted, Unmounted};
use fleecefs::model::Kind;
use fleecefs::vfs::{Facts, Vfs};

#[path = "mount_sim/writing.rs"]
mod writing;

const SIZE: usize = 4 << 20;

struct Mount {
    sim: Sim,
    mounted: Mounted,
    dir: tempfile::TempDir,
}

impl Mount {
    fn path(&self, below: &str) -> PathBuf {
        self.dir.path().join("mnt").join(below)
    }

    fn calls(&self, f: impl FnOnce()) -> Vec<String> {
        let before = self.sim.calls().len();
        f();
        self.sim.calls()[before..].to_vec()
    }

    fn sh(&self, script: &str) -> String {
        let output = Command::new("sh")
            .args(["-ec", script])
            .current_dir(self.dir.path())
            .env("LC_ALL", "C")
            .output()
            .unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(
            output.status.success() && stderr.is_empty(),
            "{script}: {stderr}"
        );
        String::from_utf8(output.stdout).unwrap()
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        self.sim.release();
        let end = self.mounted.shut_down();
        if !thread::panicking() {
            end.unwrap();
        }
    }
}

fn mount_on(sim: &Sim, dir: &Path) -> fleecefs::model::Result<Mounted> {
    let store = Store::open(&dir.join("state"))?;
    let domain = Domain::open(Arc::new(sim.clone()), store, Options::default())?;
    let facts = Facts {
        uid: unsafe { libc::getuid() },
        gid: unsafe { libc::getgid() },
        ..Facts::default()
    };
    let point = fuse::heal(&dir.join("mnt"))?.into_path();
    let options = MountOptions {
        source: "sim: a,b".into(),
        allow_other: false,
        read_ahead_kib: 4096,
    };
    fuse::mount(
        Arc::new(Vfs::new(Arc::new(domain), facts)),
        &point,
        &options,
    )
}

/// A mounted domain whose disk has data in every other 64 KiB, after which a prime number of bytes
/// repeats, so that a wrong offset shows.
fn mounted() -> Option<Mount> {
    let sim = Sim::new(&[("vda", SIZE + 1000), ("vdb", 1 << 20)]);
    for start in (0..SIZE).step_by(128 << 10) {
        let bytes: Vec<u8> = (start..start + (64 << 10)).map(byte).collect();
        sim.write("vda", start, &bytes);
    }
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("mnt")).unwrap();
    match mount_on(&sim, dir.path()) {
        Ok(mounted) => Some(Mount { sim, mounted, dir }),
        Err(e) if std::env::var_os("FLEECEFS_TESTS_STRICT").is_none() => {
            eprintln!("skipped: {e}");
            None
        }
        Err(e) => panic!("{e}"),
    }
}

fn byte(at: usize) -> u8 {
    (at % 251) as u8 + 1
}

fn content() -> Vec<u8> {
    let data = |at: usize| at < SIZE && at % (128 << 10) < (64 << 10);
    (0..SIZE + 1000)
        .map(|at| if data(at) { byte(at) } else { 0 })
        .collect()
}

fn errno<T>(result: io::Result<T>) -> i32 {
    result.err().and_then(|e| e.raw_os_error()).unwrap_or(0)
}

fn rename2(from: &Path, to: &Path, flags: u32) -> i32 {
    let c = |path: &Path| CString::new(path.as_os_str().as_bytes()).unwrap();
    let (from, to) = (c(from), c(to));
    // SAFETY: two strings that end in a zero.
    match unsafe { libc::renameat2(-1, from.as_ptr(), -1, to.as_ptr(), flags) } {
        0 => 0,
        _ => io::Error::last_os_error().raw_os_error().unwrap(),
    }
}

fn until(what: &str, f: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !f() {
        assert!(Instant::now() < deadline, "{what}");
        thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn ordinary_programs() {
    let Some(m) = mounted() else { return };
    m.sh("mkdir mnt/checkpoints/mon mnt/backups/tue");
    m.sim.write("vda", 0, &[0xff; GRANULE]);
    let asked = m.calls(|| assert!(m.sh("ls -R mnt; ls mnt/backups/tue").contains("vda.raw")));
    assert_eq!(asked, [""; 0], "ls -R asks nobody");
    assert_eq!(
        m.calls(|| drop(m.sh("ls -l mnt/backups/tue/raw"))),
        ["allocation"; 2]
    );
    assert_eq!(
        m.calls(|| drop(m.sh("ls -lR mnt; ls -l mnt/backups/tue/raw"))),
        ["changed"; 2]
    );
    assert_eq!(
        m.sh(
            "stat -c '%a %F %h %i' mnt/backups/tue/disk.raw mnt/backups/tue/raw/vda.raw | uniq -c"
        )
        .split_whitespace()
        .take(6)
        .collect::<Vec<_>>(),
        [
            "2",
            "400",
            "regular",
            "file",
            "2",
            &fs::metadata(m.path("backups/tue/disk.raw"))
                .unwrap()
                .ino()
                .to_string()
        ]
    );
    let true_content = content();
    m.sh("cat mnt/backups/tue/disk.raw > cat.raw; dd if=mnt/backups/tue/disk.raw of=dd.raw bs=77777 status=none
          dd if=mnt/backups/tue/disk.raw of=direct.raw bs=64k iflag=direct status=none
          cp --sparse=always mnt/backups/tue/disk.raw cp.raw; tar -C mnt/backups/tue/raw -Scf t.tar vda.raw; tar xf t.tar --warning=no-timestamp");
    for copy in ["cat.raw", "dd.raw", "direct.raw", "cp.raw", "vda.raw"] {
        assert!(
            fs::read(m.dir.path().join(copy)).unwrap() == true_content,
            "{copy}"
        );
    }
    let blocks = |p: &Path| fs::metadata(p).unwrap().blocks() * 512;
    assert_eq!(blocks(&m.path("backups/tue/disk.raw")), SIZE as u64 / 2);
    assert!(blocks(&m.dir.path().join("cp.raw")) < SIZE as u64 * 3 / 4);
    // Copying with all attributes, of everything: nothing complains.
    m.sh("cp -a mnt/backups/tue tree; cp -a mnt/checkpoints checkpoints; cat mnt/status mnt/domain.xml > /dev/null");
    for map in [
        "dirty.map",
        "since/mon/vda.map",
        "map/vdb.map",
        "backup.xml",
    ] {
        let copy = fs::read(m.dir.path().join("tree").join(map)).unwrap();
        assert!(!copy.is_empty());
        assert_eq!(
            copy,
            fs::read(m.path("backups/tue").join(map)).unwrap(),
            "{map}"
        );
    }
    assert_eq!(
        fs::read_link(m.dir.path().join("checkpoints/tue/parent")).unwrap(),
        Path::new("../mon")
    );
    m.sh("find mnt -type f | wc -l; find mnt/checkpoints -name parent");
    m.sh("rmdir mnt/backups/tue mnt/checkpoints/tue mnt/checkpoints/mon");
    assert_eq!(m.sim.running(), 0);
}

#[test]
fn rsync_of_everything_twice() {
    let Some(m) = mounted() else { return };
    if Command::new("rsync").arg("--version").output().is_err() {
        return eprintln!("skipped: no rsync");
    }
    m.sh("mkdir mnt/backups/tue; rsync -aHSX mnt/backups/tue/ copy; rsync -aHX mnt/backups/tue/ copy");
    assert!(fs::read(m.dir.path().join("copy/disk.raw")).unwrap() == content());
}

/// lseek(2) to data or a hole.
fn seek(file: &File, offset: i64, whence: i32) -> Result<i64, i32> {
    use std::os::fd::AsRawFd;
    // SAFETY: an open file and no memory.
    match unsafe { libc::lseek(file.as_raw_fd(), offset, whence) } {
        -1 => Err(io::Error::last_os_error().raw_os_error().unwrap()),
        to => Ok(to),
    }
}

#[test]
fn reads_at_odd_places_and_holes() {
    let Some(m) = mounted() else { return };
    fs::create_dir(m.path("backups/tue")).unwrap();
    let mut file = File::open(m.path("backups/tue/disk.raw")).unwrap();
    let all = content();
    for (offset, length) in [
        (0, 1),
        (65535, 3),
        (SIZE - 1, 5000),
        (131_071, 70_001),
        (SIZE + 999, 10),
    ] {
        let mut buf = vec![0xee; length];
        let n = file.read_at(&mut buf, offset as u64).unwrap();
        let end = (offset + length).min(all.len());
        assert_eq!(n, end - offset);
        assert!(buf[..n] == all[offset..end]);
    }
    assert_eq!(file.read_at(&mut [0; 9], SIZE as u64 + 1000).unwrap(), 0);
    assert_eq!(seek(&file, 0, libc::SEEK_HOLE), Ok(64 << 10));
    assert_eq!(seek(&file, 64 << 10, libc::SEEK_DATA), Ok(128 << 10));
    assert_eq!(seek(&file, SIZE as i64, libc::SEEK_DATA), Err(libc::ENXIO));
    assert_eq!(seek(&file, SIZE as i64, libc::SEEK_HOLE), Ok(SIZE as i64));
    assert_eq!(
        seek(&file, SIZE as i64 + 1000, libc::SEEK_HOLE),
        Err(libc::ENXIO)
    );
    assert_eq!(file.seek(SeekFrom::End(0)).unwrap(), SIZE as u64 + 1000);
    // Read again: from the kernel's pages, without asking.
    let mut sink = Vec::new();
    file.rewind().unwrap();
    file.read_to_end(&mut sink).unwrap();
    // (The kernel may drop pages when it likes, as when another test asks it to; not each time.)
    let again = || m.calls(|| assert!(fs::read(m.path("backups/tue/raw/vda.raw")).unwrap() == all));
    assert!((0..10).any(|_| again().is_empty()));
}

#[test]
fn errno_through_the_kernel() {
    let Some(m) = mounted() else { return };
    let mkdir = |p: &str| errno(fs::create_dir(m.path(p)));
    assert_eq!(mkdir("checkpoints/mon"), 0);
    assert_eq!(mkdir("backups/tue"), 0);
    assert_eq!(mkdir("backups/tue"), libc::EEXIST);
    assert_eq!(mkdir("x"), libc::EPERM);
    assert_eq!(mkdir("backups/tue/raw/x"), libc::EPERM);
    assert_eq!(mkdir("backups/a b"), libc::EINVAL);
    assert_eq!(
        mkdir(&format!("backups/{}", "x".repeat(252))),
        libc::ENAMETOOLONG
    );
    for (kind, expected) in [
        (Kind::NoSpace, libc::ENOSPC),
        (Kind::Busy, libc::EBUSY),
        (Kind::TimedOut, libc::ETIMEDOUT),
        (Kind::NotConnected, libc::ENOTCONN),
        (Kind::Unsupported, libc::EOPNOTSUPP),
    ] {
        m.sim.fail_next("begin", kind);
        assert_eq!(mkdir("backups/wed"), expected);
    }
    let last = fs::read_to_string(m.path("last-error")).unwrap();
    assert!(
        last.trim_end()
            .ends_with("mkdir backups/wed: begin backup wed: begin fails as asked")
    );

    let raw = m.path("backups/tue/disk.raw");
    assert_eq!(errno(File::options().write(true).open(&raw)), libc::EROFS);
    assert_eq!(
        errno(File::options().read(true).write(true).open(&raw)),
        libc::EROFS
    );
    assert_eq!(
        errno(fs::set_permissions(&raw, fs::Permissions::from_mode(0o600))),
        libc::EROFS
    );
    assert_eq!(
        errno(std::os::unix::fs::chown(&raw, Some(1), None)),
        libc::EROFS
    );
    assert_eq!(
        errno(
            File::open(&raw)
                .unwrap()
                .set_times(fs::FileTimes::new().set_modified(std::time::SystemTime::now()))
        ),
        libc::EROFS
    );
    assert_eq!(errno(File::create(m.path("backups/x"))), libc::EPERM);
    assert_eq!(errno(symlink("a", m.path("checkpoints/x"))), libc::EPERM);
    assert_eq!(errno(fs::hard_link(&raw, m.path("backups/x"))), libc::EPERM);
    assert_eq!(errno(fs::remove_file(&raw)), libc::EPERM);
    assert_eq!(errno(fs::rename(&raw, m.path("backups/x"))), libc::EPERM);
    let mon = m.path("checkpoints/mon");
    let mv = |to: &str| errno(fs::rename(&mon, m.path(to)));
    assert_eq!(mv("checkpoints/tue"), libc::EEXIST);
    assert_eq!(mv("checkpoints/a b"), libc::EINVAL);
    assert_eq!(mv("backups/mon"), libc::EPERM);
    assert_eq!(mv("checkpoints/mon"), 0);
    assert_eq!(
        rename2(&mon, &m.path("checkpoints/tue"), libc::RENAME_EXCHANGE),
        libc::EINVAL
    );
    assert_eq!(
        rename2(&mon, &m.path("checkpoints/tue"), libc::RENAME_NOREPLACE),
        libc::EEXIST
    );
    assert_eq!(errno(fs::remove_dir(m.path("backups"))), libc::EPERM);
    assert_eq!(
        errno(fs::remove_dir(m.path("checkpoints/mon"))),
        libc::EBUSY
    );
    assert_eq!(errno(fs::remove_dir(&raw)), libc::ENOTDIR);
    assert_eq!(errno(fs::metadata(m.path("backups/none"))), libc::ENOENT);
    assert_eq!(
        errno(File::open(m.path("backups/tue/since/none/vda.map"))),
        libc::ENOENT
    );

    // A map that cannot be known, and a read that fails; the next one works.
    m.sim.disk("vda", |d| drop(d.bitmaps.remove("tue")));
    assert_eq!(mkdir("backups/thu"), 0);
    assert_eq!(
        errno(File::open(m.path("backups/thu/dirty.map"))),
        libc::ESTALE
    );
    assert_eq!(
        fs::metadata(m.path("backups/thu/dirty.map")).unwrap().len(),
        0
    );
    m.sh("ls -l mnt/backups/thu");
    let file = File::open(m.path("backups/thu/disk.raw")).unwrap();
    fs::metadata(m.path("backups/thu/disk.raw")).unwrap();
    let mut buf = [0; 4096];
    // The kernel asks a second time for what it failed to read ahead.
    m.sim.hang_at("read_at");
    assert_eq!(errno(file.read_at(&mut buf, 0)), libc::ETIMEDOUT);
    m.sim.revive();
    assert_eq!(file.read_at(&mut buf, 0).unwrap(), 4096);
    assert_eq!(buf[9], byte(9));
}

#[test]
fn a_slow_domain_holds_up_only_what_waits_for_it() {
    let Some(m) = mounted() else { return };
    fs::create_dir(m.path("backups/tue")).unwrap();
    let file = File::open(m.path("backups/tue/disk.raw")).unwrap();
    let tue = m.path("backups/tue");
    fs::metadata(tue.join("disk.raw")).unwrap();
    m.sim.hold("begin");
    thread::scope(|scope| {
        let slow = scope.spawn(|| fs::create_dir(m.path("backups/wed")));
        until("mkdir waits", || m.sim.waiting() == 1);
        let start = Instant::now();
        m.sh("ls -lR mnt/checkpoints mnt/backups/tue; cat mnt/status mnt/last-error mnt/backups/tue/status; ls mnt");
        let mut buf = [0; 4096];
        file.read_exact_at(&mut buf, 128 << 10).unwrap();
        assert_eq!(buf[0], byte(128 << 10));
        assert!(start.elapsed() < Duration::from_secs(10));
        assert!(!slow.is_finished());
        m.sim.release();
        slow.join().unwrap().unwrap();
    });
    // Nor do reads that hang.
    m.sim.hold("read_at");
    thread::scope(|scope| {
        for i in 0..12 {
            let file = &file;
            scope.spawn(move || file.read_at(&mut [0; 4096], (i + 3) * (256 << 10)).unwrap());
        }
        until("reads wait", || m.sim.waiting() > 2);
        m.sh("ls -lR mnt; cat mnt/checkpoints/tue/status; mkdir mnt/checkpoints/thu");
        m.sim.release();
    });
}

#[test]
fn many_readers() {
    let Some(m) = mounted() else { return };
    fs::create_dir(m.path("backups/tue")).unwrap();
    let all = content();
    thread::scope(|scope| {
        for i in 0..32usize {
            let (m, all) = (&m, &all);
            scope.spawn(move || {
                let file = File::open(m.path("backups/tue/disk.raw")).unwrap();
                let mut buf = vec![0; 100_003];
                for step in 0..50usize {
                    let offset = (i * 7919 + step * 104_729 * 3) % SIZE;
                    let n = file.read_at(&mut buf, offset as u64).unwrap();
                    assert!(buf[..n] == all[offset..offset + n]);
                }
            });
        }
    });
}

#[test]
fn a_reader_of_an_ended_backup_gets_an_error() {
    let Some(m) = mounted() else { return };
    fs::create_dir(m.path("backups/tue")).unwrap();
    let file = File::open(m.path("backups/tue/disk.raw")).unwrap();
    m.sim.hold("read_at");
    thread::scope(|scope| {
        let reader = scope.spawn(|| file.read_at(&mut [0; 4096], 0));
        until("the read waits", || m.sim.waiting() > 0);
        fs::remove_dir(m.path("backups/tue")).unwrap();
        assert_eq!(errno(reader.join().unwrap()), libc::ENOTCONN);
    });
    m.sim.release();
    assert_eq!(errno(file.read_at(&mut [0; 4096], 1 << 20)), libc::ENOTCONN);
    // The same name again is another backup.
    m.sim.write("vda", 0, &[0xaa; GRANULE]);
    fs::create_dir(m.path("backups/tue")).unwrap();
    assert_eq!(fs::read(m.path("backups/tue/disk.raw")).unwrap()[0], 0xaa);
}

#[test]
fn an_unmount_from_outside_ends_everything() {
    let Some(m) = mounted() else { return };
    fs::create_dir(m.path("backups/tue")).unwrap();
    fuse::unmount(m.mounted.point(), false).unwrap();
    assert!(m.mounted.wait(Duration::from_secs(10)));
    m.mounted.shut_down().unwrap();
    assert_eq!(m.sim.running(), 0);
    assert_eq!(m.sim.calls().last().unwrap(), "close");
    assert!(fs::read_dir(m.path("")).unwrap().next().is_none());
}

#[test]
fn a_strangers_mount_on_the_same_path_is_left_alone() {
    let Some(m) = mounted() else { return };
    fuse::unmount(m.mounted.point(), false).unwrap();
    let strange = mount_on(&Sim::new(&[("vda", GRANULE)]), &{
        // Another state directory: the first domain is still held.
        let other = m.dir.path().join("other");
        fs::create_dir(&other).unwrap();
        symlink(m.mounted.point(), other.join("mnt")).unwrap();
        other
    })
    .unwrap();
    assert_eq!(m.mounted.unmount(true).unwrap(), Unmounted::Gone);
    m.mounted.shut_down().unwrap();
    assert!(m.path("status").exists(), "still mounted");
    strange.shut_down().unwrap();
    assert!(!m.path("status").exists());
}

#[test]
fn shutting_down_under_a_reader() {
    let Some(m) = mounted() else { return };
    fs::create_dir(m.path("backups/tue")).unwrap();
    let file = File::open(m.path("backups/tue/disk.raw")).unwrap();
    m.sim.hold("read_at");
    thread::scope(|scope| {
        let reader = scope.spawn(|| file.read_at(&mut [0; 4096], 0));
        until("the read waits", || m.sim.waiting() > 0);
        m.mounted.shut_down().unwrap();
        assert_eq!(errno(reader.join().unwrap()), libc::ENOTCONN);
    });
    assert_eq!(m.sim.running(), 0);
    assert!(fuse::mount_at(m.mounted.point()).is_none(), "detached");
    assert!(errno(file.read_at(&mut [0; 4096], 0)) != 0);
    drop(file);
    assert!(
        m.mounted.wait(Duration::from_secs(10)),
        "ends with its last file"
    );
}

#[test]
fn a_second_mount_is_refused() {
    let Some(m) = mounted() else { return };
    let same_dir = fuse::heal(&m.path("")).unwrap_err();
    assert_eq!(same_dir.kind(), Kind::Busy);
    let other = m.dir.path().join("elsewhere");
    fs::create_dir(&other).unwrap();
    assert_eq!(
        fuse::heal(&other.join("none")).unwrap_err().kind(),
        Kind::NotFound
    );
    fs::write(other.join("file"), "").unwrap();
    assert_eq!(
        fuse::heal(&other.join("file")).unwrap_err().kind(),
        Kind::NotADirectory
    );
    let same_domain = Store::open(&m.dir.path().join("state")).unwrap_err();
    assert_eq!(same_domain.kind(), Kind::Busy);
}
