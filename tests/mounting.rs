//! Mounting, refusing to mount, and every way to end: what is said, and that nothing is left behind.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::io::Read;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use common::tools::{need, run, text};
use common::{Disk, Fleecefs, Qemu, Write, image, tools};

const MIB: u64 = 1 << 20;
const FLEECEFS: &str = env!("CARGO_BIN_EXE_fleecefs");

fn image_of(size: u64) -> (tempfile::TempDir, std::path::PathBuf) {
    let dir = tools::temp_dir();
    let path = dir.path().join("disk.qcow2");
    image::create(&path, "qcow2", size, "");
    (dir, path)
}

/// Each refusal: the sentence names the trouble, the status is not 0, nothing is left.
#[test]
fn refused_sources() {
    need!("qemu-img", "qemu-storage-daemon", "qemu-system-x86_64");
    let Some(()) = tools::fuse() else { return };
    let (dir, good) = image_of(4 * MIB);
    let at = |name: &str| text(&dir.path().join(name)).to_owned();
    std::fs::write(at("plain"), "no socket").unwrap();
    drop(UnixListener::bind(at("nobody.sock")).unwrap());
    let silent = UnixListener::bind(at("silent.sock")).unwrap();
    let old = dir.path().join("old.sock");
    let old_listener = UnixListener::bind(&old).unwrap();
    // Greets as a QEMU that is too old; there is none to be had, and the greeting is all it takes.
    std::thread::spawn(move || {
        use std::io::Write as _;
        for stream in old_listener.incoming() {
            let mut stream = stream.unwrap();
            let greeting = r#"{"QMP": {"version": {"qemu": {"micro": 0, "minor": 2, "major": 5}, "package": ""}, "capabilities": []}}"#;
            let _ = writeln!(stream, "{greeting}");
            let mut line = [0; 256];
            let _ = stream.read(&mut line);
            let _ = writeln!(stream, r#"{{"return": {{}}, "id": 1}}"#);
            let _ = stream.read(&mut line);
        }
    });
    std::fs::write(at("fake.raw"), b"QFI\xfb and what a guest might write").unwrap();
    std::fs::write(at("empty"), "").unwrap();
    let qemu = Qemu::build().disk("vda", &good, "qcow2").paused().start();

    let cases: [(&[&str], &str); 9] = [
        (&["/no/such/image.qcow2"], "/no/such/image.qcow2"),
        (&[&at("")], "neither a file nor a block device"),
        (&[text(&good)], "lock"),
        (&[&format!("qmp:{}", at("plain"))], "not a socket"),
        (&[&format!("qmp:{}", at("nobody.sock"))], "nobody.sock"),
        (&[&format!("qmp:{}", at("silent.sock"))], "another client"),
        (&[&format!("qmp:{}", at("old.sock"))], "too old"),
        (&[&at("fake.raw")], "-o format="),
        (&[text(&good), &format!("qmp:{}", at("x"))], "only source"),
    ];
    for daemon in [false, true] {
        for (sources, said) in &cases {
            let mut build = Fleecefs::source(sources[0]);
            for more in &sources[1..] {
                build = build.source(more);
            }
            if daemon {
                build = build.daemon();
            }
            let Err((refused, home)) = build.try_mount() else {
                panic!("{sources:?} was mounted");
            };
            assert!(!refused.status.success(), "{sources:?}");
            assert!(
                refused.stderr.contains(said),
                "{sources:?}: {}",
                refused.stderr
            );
            assert!(
                refused.stderr.lines().count() <= 2,
                "one sentence: {}",
                refused.stderr
            );
            home.assert_clean();
        }
    }
    drop(silent);
    qemu.quit();
}

#[test]
fn options_are_refused_by_name() {
    let Some(()) = tools::fuse() else { return };
    for (option, said) in [
        ("colour=red", "colour"),
        ("timeout=soon", "timeout"),
        ("checkpoint=maybe", "checkpoint"),
        ("scratch-limit=1X", "scratch-limit"),
    ] {
        let Err((refused, home)) = Fleecefs::source("/dev/null").option(option).try_mount() else {
            panic!("{option} was accepted");
        };
        assert!(
            refused.stderr.contains(said),
            "{option}: {}",
            refused.stderr
        );
        home.assert_clean();
    }
}

/// A second image that cannot be opened must not cost the first one its bitmaps.
#[test]
fn a_bad_second_image_does_not_spoil_the_first() {
    need!("qemu-img", "qemu-io");
    let Some(()) = tools::fuse() else { return };
    let (dir, good) = image_of(4 * MIB);
    let mount = Fleecefs::source(text(&good)).mount();
    mount.mkdir("checkpoints/mon").unwrap();
    let home = mount.umount();
    let bad = dir.path().join("bad.qcow2");
    std::fs::write(&bad, b"QFI\xfb\0\0\0\x03 and nothing else").unwrap();
    let both = Fleecefs::source(text(&good)).source(text(&bad)).home(home);
    let Err((refused, home)) = both.try_mount() else {
        panic!("mounted");
    };
    assert!(refused.stderr.contains("bad.qcow2"), "{}", refused.stderr);
    let info = run("qemu-img", &["info", text(&good)]);
    assert!(info.contains("mon") && !info.contains("in-use"), "{info}");
    let mount = Fleecefs::source(text(&good)).home(home).mount();
    mount.mkdir("backups/tue").unwrap();
    mount.read("backups/tue/dirty.map");
    mount.umount().assert_clean();
}

#[test]
fn the_private_parts_are_private() {
    need!("qemu-img");
    let Some(()) = tools::fuse() else { return };
    let (_dir, path) = image_of(4 * MIB);
    let mount = Fleecefs::source(text(&path)).mount();
    mount.mkdir("backups/b").unwrap();
    let runtime = mount.home().path("runtime");
    for entry in std::fs::read_dir(&runtime).unwrap() {
        let meta = entry.unwrap().metadata().unwrap();
        assert_eq!(meta.permissions().mode() & 0o777, 0o700);
    }
    let meta = std::fs::metadata(mount.path("backups/b/disk.raw")).unwrap();
    assert_eq!(meta.permissions().mode() & 0o777, 0o400);
    assert_eq!(
        std::fs::metadata(mount.path(""))
            .unwrap()
            .permissions()
            .mode()
            & 0o777,
        0o700
    );
    let home = mount.umount();
    home.assert_clean();
    let mount = Fleecefs::source(text(&path))
        .option("allow_other")
        .home(home)
        .mount();
    mount.mkdir("backups/b").unwrap();
    let meta = std::fs::metadata(mount.path("backups/b/disk.raw")).unwrap();
    assert_eq!(meta.permissions().mode() & 0o777, 0o444);
    mount.umount().assert_clean();
}

/// A reader is in the middle of a large file while everything is ended around it.
#[test]
fn every_end_is_clean_with_a_reader_in_the_middle() {
    need!("qemu-system-x86_64", "qemu-img");
    let Some(()) = tools::fuse() else { return };
    for how in ["rmdir", "umount", "sigterm", "sigint"] {
        let (_dir, path) = image_of(64 * MIB);
        let mut qemu = Qemu::build().disk("vda", &path, "qcow2").paused();
        if common::qemu::iothread_writes() {
            qemu = qemu.iothread();
        }
        let qemu = qemu.start();
        let mut disk = Disk::new(64 * MIB);
        let full = Write {
            offset: 0,
            length: 64 * MIB,
            pattern: 7,
        };
        qemu.write("vda", full);
        disk.apply(full);
        let before = qemu.state();
        let mount = Fleecefs::qmp(&qemu.socket())
            .option("checkpoint=no")
            .mount();
        mount.mkdir("backups/b").unwrap();
        let raw = std::fs::File::open(mount.path("backups/b/disk.raw")).unwrap();
        let stop = std::sync::atomic::AtomicBool::new(false);
        let home = std::thread::scope(|scope| {
            let readers: Vec<_> = (0..4u64)
                .map(|n| {
                    let (raw, stop) = (&raw, &stop);
                    scope.spawn(move || {
                        // Random places, so that the page cache does not hide an end.
                        let mut rng = common::Rng::new(n + 1);
                        let mut buf = vec![0; 65536];
                        while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                            match raw.read_at(&mut buf, rng.within(0..63 * MIB)) {
                                Ok(n) => assert!(buf[..n].iter().all(|b| *b == 7), "new data"),
                                Err(_) => return,
                            }
                        }
                    })
                })
                .collect();
            std::thread::sleep(Duration::from_millis(100));
            let home = match how {
                "rmdir" => {
                    mount.rmdir("backups/b").unwrap();
                    // Newer data must not be seen by the readers that are left.
                    qemu.guest_write("vda", 0, 64 * MIB, 8);
                    std::thread::sleep(Duration::from_millis(100));
                    None
                }
                "umount" => {
                    // Busy: refused as with any file system. Then lazily.
                    let busy = Command::new(FLEECEFS)
                        .args(["umount", text(&mount.path(""))])
                        .output()
                        .unwrap();
                    assert!(!busy.status.success());
                    let said = String::from_utf8_lossy(&busy.stderr).into_owned();
                    assert!(said.contains("busy") || said.contains("in use"), "{said}");
                    run(FLEECEFS, &["umount", "-l", text(&mount.path(""))]);
                    None
                }
                "sigterm" => Some(()),
                _ => {
                    run("kill", &["-INT", &mount.pid().to_string()]);
                    Some(())
                }
            };
            let home = match (how, home) {
                ("sigterm", _) => mount.sigterm(),
                ("sigint", _) => mount.wait_end(),
                _ => {
                    stop.store(true, std::sync::atomic::Ordering::Relaxed);
                    for reader in readers {
                        reader.join().unwrap();
                    }
                    if how == "rmdir" {
                        run(FLEECEFS, &["umount", "-l", text(&mount.path(""))]);
                    }
                    mount.wait_end()
                }
            };
            stop.store(true, std::sync::atomic::Ordering::Relaxed);
            home
        });
        drop(raw);
        home.assert_clean();
        assert_eq!(qemu.state(), before, "{how}");
        assert!(!qemu.nbd_server_running(), "{how}");
        qemu.quit();
    }
}

#[test]
fn killed_with_its_image_the_bitmaps_are_saved() {
    need!("qemu-img", "qemu-io");
    let Some(()) = tools::fuse() else { return };
    let (_dir, path) = image_of(16 * MIB);
    let mount = Fleecefs::source(text(&path)).mount();
    mount.mkdir("backups/mon").unwrap();
    let home = mount.sigkill();
    let mount = Fleecefs::source(text(&path)).home(home).mount();
    mount.mkdir("backups/tue").unwrap();
    assert!(
        mount
            .read("backups/tue/since/mon/vda.map")
            .contains("clean")
    );
    mount.umount().assert_clean();
}

#[test]
fn a_second_mount_is_refused() {
    need!("qemu-img", "qemu-system-x86_64");
    let Some(()) = tools::fuse() else { return };
    let (_dir, path) = image_of(16 * MIB);
    let qemu = Qemu::build().disk("vda", &path, "qcow2").paused().start();
    let mount = Fleecefs::qmp(&qemu.socket()).mount();
    let Err((refused, home)) = Fleecefs::qmp(&qemu.socket()).try_mount() else {
        panic!("the monitor is held");
    };
    assert!(refused.stderr.contains("one client"), "{}", refused.stderr);
    home.assert_clean();
    // The same directory.
    let out = Command::new(FLEECEFS)
        .args([
            "mount",
            "-f",
            "-o",
            &format!("state={}", text(&home.path("state"))),
        ])
        .args([text(&path), text(&mount.path(""))])
        .output()
        .unwrap();
    assert!(!out.status.success());
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(said.contains("mounted"), "{said}");
    mount.mkdir("backups/still-works").unwrap();
    mount.umount().assert_clean();
}

/// QEMU runs as nobody, fleecefs as root: sockets and scratch work for that user, and for no other.
#[test]
fn qemu_of_another_user() {
    need!("qemu-system-x86_64", "qemu-img", "setpriv");
    let Some(()) = tools::fuse() else { return };
    if !tools::is_root() {
        return tools::skip("only root can start QEMU as another user");
    }
    let (dir, path) = image_of(16 * MIB);
    std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o777)).unwrap();
    let qemu = Qemu::build()
        .disk("vda", &path, "qcow2")
        .paused()
        .user(65534)
        .start();
    let mount = Fleecefs::qmp(&qemu.socket()).mount();
    mount.mkdir("backups/b").unwrap();
    qemu.guest_write("vda", 0, MIB, 1);
    let bytes = std::fs::read(mount.path("backups/b/disk.raw")).unwrap();
    assert!(bytes.iter().all(|b| *b == 0));
    let runtime = mount.home().path("runtime");
    let own = std::fs::read_dir(runtime).unwrap().next().unwrap().unwrap();
    let access = |path: &Path| {
        let meta = std::fs::metadata(path).unwrap();
        (meta.uid(), meta.gid(), meta.permissions().mode() & 0o777)
    };
    // QEMU's are the sockets, and nothing that fleecefs writes or believes.
    assert_eq!(access(&own.path()), (0, 65534, 0o710));
    assert_eq!(access(&own.path().join("nbd")), (65534, 65534, 0o700));
    mount.umount().assert_clean();
}

#[test]
fn the_disks_of_a_running_domain_are_found_by_themselves() {
    need!("qemu-system-x86_64", "qemu-img");
    let Some(()) = tools::fuse() else { return };
    let (dir, path) = image_of(16 * MIB);
    let iso = dir.path().join("cd.iso");
    image::create(&iso, "raw", MIB, "");
    let cd = format!("if=none,id=cd0,media=cdrom,format=raw,file={}", text(&iso));
    let start = || {
        let args = ["-drive", &cd, "-device", "ide-cd,drive=cd0,id=cdrom0"];
        let args = [&args[..], &["-device", "ide-cd,id=tray"]].concat();
        Qemu::build()
            .disk("root-disk", &path, "qcow2")
            .args(&args)
            .paused()
            .start()
    };
    let qemu = start();
    let mount = Fleecefs::qmp(&qemu.socket()).mount();
    mount.mkdir("backups/b").unwrap();
    assert_eq!(mount.list("backups/b/raw"), ["root-disk.raw"]);
    let home = mount.umount();
    qemu.quit();
    let qemu = start();
    let mount = Fleecefs::qmp(&qemu.socket())
        .option("domain=web")
        .home(home)
        .mount();
    assert_eq!(
        mount.list("checkpoints"),
        Vec::<String>::new(),
        "another domain"
    );
    mount.mkdir("backups/c").unwrap();
    assert_eq!(mount.list("backups/c/raw"), ["root-disk.raw"]);
    mount.umount().assert_clean();
}

/// One deadline, whatever hangs.
#[test]
fn a_hung_qemu_is_no_hung_mount() {
    need!("qemu-system-x86_64", "qemu-img");
    let Some(()) = tools::fuse() else { return };
    let (_dir, path) = image_of(16 * MIB);
    let qemu = Qemu::build().disk("vda", &path, "qcow2").paused().start();
    qemu.guest_write("vda", 0, 16 * MIB, 3);
    let mount = Fleecefs::qmp(&qemu.socket()).option("timeout=1").mount();
    mount.mkdir("backups/b").unwrap();
    mount.mkdir("backups/c").unwrap();
    let mut first = [0; 4096];
    let raw = std::fs::File::open(mount.path("backups/b/disk.raw")).unwrap();
    raw.read_exact_at(&mut first, 0).unwrap();
    qemu.freeze();
    let timed_out = |outcome: std::io::Result<()>, what: &str| {
        let error = outcome.expect_err(what);
        assert_eq!(
            error.raw_os_error(),
            Some(libc::ETIMEDOUT),
            "{what}: {error}"
        );
    };
    timed_out(raw.read_exact_at(&mut first, 8 * MIB), "read");
    timed_out(mount.mkdir("backups/d"), "mkdir");
    assert!(
        mount.last_error().contains("backups/d"),
        "{}",
        mount.last_error()
    );
    // What needs no answer goes on.
    assert_eq!(mount.list("backups"), ["b", "c"]);
    raw.read_exact_at(&mut first, 0).unwrap();
    qemu.thaw();
    // On a busy machine it takes longer than a second to come to itself.
    tools::eventually("a read", tools::DEADLINE, || {
        raw.read_exact_at(&mut first, 8 * MIB).ok()
    });
    mount.rmdir("backups/b").unwrap();
    mount.rmdir("backups/c").unwrap();
    mount.mkdir("backups/d").unwrap();
    drop(raw);
    mount.umount().assert_clean();
}

/// Somebody else's mount namespace, made meanwhile, has a copy of the mount and keeps it: unmounting
/// ends fleecefs all the same.
#[test]
fn a_copy_of_the_mount_elsewhere_holds_nothing_up() {
    need!("qemu-img", "unshare");
    let Some(()) = tools::fuse() else { return };
    if !tools::is_root() {
        return tools::skip("only root can make a mount namespace");
    }
    let (_dir, path) = image_of(16 * MIB);
    let mount = Fleecefs::source(text(&path)).daemon().mount();
    mount.mkdir("backups/b").unwrap();
    let mut elsewhere = Command::new("unshare")
        .args(["--mount", "--propagation", "private", "sleep", "600"])
        .spawn()
        .unwrap();
    let seen = format!("/proc/{}/mountinfo", elsewhere.id());
    let point = mount.path("");
    let point = text(&point).trim_end_matches('/').to_owned();
    let own = std::fs::read_link("/proc/self/ns/mnt").unwrap();
    tools::eventually("the copy", tools::DEADLINE, || {
        let namespace = std::fs::read_link(format!("/proc/{}/ns/mnt", elsewhere.id())).ok()?;
        let mounts = std::fs::read_to_string(&seen).ok()?;
        (namespace != own && mounts.contains(&point)).then_some(())
    });
    mount.umount().assert_clean();
    elsewhere.kill().unwrap();
    elsewhere.wait().unwrap();
}
