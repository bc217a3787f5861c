//! A booted Linux guest that writes all the time: what a backup shows must be a disk as after a power
//! cut, the same at one instant on all disks, and it must not move while the guest goes on.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use common::tools::{need, run, text};
use common::{Fleecefs, Qemu, image, tools};

const MIB: u64 = 1 << 20;

struct Fixture {
    dir: tempfile::TempDir,
    qemu: Qemu,
}

fn boot(disks: &[&str]) -> Option<Fixture> {
    tools::fuse()?;
    let files = common::qemu::linux()?;
    let dir = tools::temp_dir();
    let mut build = Qemu::build().linux(&files, "fleece=writer");
    for target in disks {
        let path = dir.path().join(format!("{target}.qcow2"));
        image::ext4(&path, 96 * MIB);
        build = build.disk(target, &path, "qcow2");
    }
    let mut qemu = build.start();
    qemu.console().ready();
    Some(Fixture { dir, qemu })
}

/// The journal is replayed on a copy, as a mount would; then nothing may be wrong.
fn check_ext4(raw: &Path, copy: &Path) -> u64 {
    run("cp", &["--sparse=always", text(raw), text(copy)]);
    run("chmod", &["600", text(copy)]);
    // 1: the file system was mended, by replaying its journal.
    let replay = Command::new("e2fsck")
        .args(["-fy", "-E", "journal_only"])
        .arg(copy)
        .output()
        .unwrap();
    assert!(replay.status.code().is_some_and(|c| c <= 1), "{replay:?}");
    let check = Command::new("e2fsck")
        .args(["-fn"])
        .arg(copy)
        .output()
        .unwrap();
    assert!(
        check.status.success(),
        "{}",
        String::from_utf8_lossy(&check.stdout)
    );
    let round = run("debugfs", &["-R", "cat /round", text(copy)]);
    round.trim().parse().unwrap()
}

fn hash(path: &Path) -> String {
    run("sha256sum", &[text(path)])[..64].to_owned()
}

fn drop_caches() {
    if std::fs::write("/proc/sys/vm/drop_caches", "3").is_err() {
        eprintln!("caches cannot be dropped here");
    }
}

#[test]
fn a_backup_of_a_busy_guest_is_one_instant_that_does_not_move() {
    need!(
        "qemu-system-x86_64",
        "qemu-img",
        "mkfs.ext4",
        "e2fsck",
        "debugfs",
        "sha256sum"
    );
    let Some(mut f) = boot(&["vda", "vdb"]) else {
        return;
    };
    let before = f.qemu.state().without_bitmaps();
    let mount = Fleecefs::qmp(&f.qemu.socket()).mount();
    f.qemu.console().rounds_more(5, Duration::from_secs(120));
    let seen = f.qemu.console().round();
    mount.mkdir("backups/one").unwrap();
    let raws: [PathBuf; 2] =
        ["vda", "vdb"].map(|t| mount.path(&format!("backups/one/raw/{t}.raw")));
    let hashes = raws.each_ref().map(|r| hash(r));

    // Every disk is whole, and they belong together.
    let rounds = ["vda", "vdb"].map(|t| {
        let raw = mount.path(&format!("backups/one/raw/{t}.raw"));
        check_ext4(&raw, &f.dir.path().join(format!("{t}.copy")))
    });
    assert!(rounds[0] >= seen, "{rounds:?}, {seen} were flushed before");
    assert!(
        rounds[0] == rounds[1] || rounds[0] == rounds[1] + 1,
        "{rounds:?}"
    );

    // A minute of heavy writes, three times re-read without caches; a second backup in between.
    let end = Instant::now() + Duration::from_secs(60);
    for round in 0..3 {
        f.qemu.console().rounds_more(10, Duration::from_secs(240));
        drop_caches();
        assert_eq!(raws.each_ref().map(|r| hash(r)), hashes, "re-read {round}");
        if round == 1 {
            mount.mkdir("backups/two").unwrap();
            let raw = mount.path("backups/two/raw/vda.raw");
            let later = check_ext4(&raw, &f.dir.path().join("later.copy"));
            assert!(later >= rounds[0] + 20, "{later} after {rounds:?}");
        }
    }
    while Instant::now() < end {
        f.qemu.console().rounds_more(5, Duration::from_secs(120));
    }
    drop_caches();
    assert_eq!(raws.each_ref().map(|r| hash(r)), hashes, "after a minute");

    // What changed from one to two, put onto a copy of one, gives two.
    let map = common::model::parse_map(&mount.read("backups/two/since/one/vda.map"));
    let copy = f.dir.path().join("one.raw");
    run("cp", &[text(&raws[0]), text(&copy)]);
    run("chmod", &["600", text(&copy)]);
    let source = std::fs::File::open(mount.path("backups/two/raw/vda.raw")).unwrap();
    let target = std::fs::File::options().write(true).open(&copy).unwrap();
    let mut changed = 0;
    for (offset, length) in common::model::dirty_extents(&map) {
        use std::os::unix::fs::FileExt;
        let mut buf = vec![0; length as usize];
        source.read_exact_at(&mut buf, offset).unwrap();
        target.write_all_at(&buf, offset).unwrap();
        changed += length;
    }
    assert!(changed > 0 && changed < 96 * MIB, "{changed} bytes changed");
    drop(source);
    assert_eq!(hash(&copy), hash(&mount.path("backups/two/raw/vda.raw")));

    mount.rmdir("backups/one").unwrap();
    mount.rmdir("backups/two").unwrap();
    mount.umount().assert_clean();
    assert_eq!(f.qemu.state().without_bitmaps(), before);
    f.qemu.console().tell("poweroff");
    f.qemu.wait(Duration::from_secs(60));
}

/// The guest must not pay: the scratch space is far too small, the backup ends, the guest goes on.
#[test]
fn a_full_scratch_ends_the_backup_and_not_the_guest() {
    need!("qemu-system-x86_64", "qemu-img", "mkfs.ext4");
    let Some(mut f) = boot(&["vda"]) else { return };
    if !tools::is_root() {
        return tools::skip("a small scratch file system needs root");
    }
    let small = f.dir.path().join("small");
    std::fs::create_dir(&small).unwrap();
    run(
        "mount",
        &[
            "-t",
            "tmpfs",
            "-o",
            "size=2m,mode=711",
            "tmpfs",
            text(&small),
        ],
    );
    let option = format!("scratch={}", text(&small));
    // Something to overwrite.
    f.qemu.console().rounds_more(60, Duration::from_secs(240));
    let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        let mount = Fleecefs::qmp(&f.qemu.socket()).option(&option).mount();
        mount.mkdir("backups/b").unwrap();
        // The rounds only go on if the guest does. Sooner or later they overwrite 2 MiB of data.
        let mut status = String::new();
        for _ in 0..100 {
            f.qemu.console().rounds_more(10, Duration::from_secs(240));
            status = mount.read("backups/b/status");
            if status.contains("state: failed") {
                break;
            }
        }
        assert!(status.contains("state: failed"), "{status}");
        assert!(status.contains("scratch"), "{status}");
        f.qemu.console().rounds_more(10, Duration::from_secs(240));
        assert_eq!(f.qemu.status(), "running");
        let error = std::fs::read(mount.path("backups/b/disk.raw")).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENOSPC), "{error}");
        mount.rmdir("backups/b").unwrap();
        mount.umount().assert_clean();
    }));
    run("umount", &["-l", text(&small)]);
    if let Err(panic) = outcome {
        std::panic::resume_unwind(panic);
    }
    assert_eq!(f.qemu.status(), "running");
}

/// A guest starts on what was copied: a full image and the changes on top of it, as they were named.
#[test]
fn a_guest_boots_from_the_chain_of_images() {
    need!("qemu-system-x86_64", "qemu-img", "mkfs.ext4");
    let Some(mut f) = boot(&["vda"]) else { return };
    let files = common::qemu::linux().unwrap();
    let mount = Fleecefs::qmp(&f.qemu.socket()).mount();
    let copies = f.dir.path().join("copies");
    std::fs::create_dir(&copies).unwrap();
    let mut last = 0;
    for (backup, from) in [("mon", "qcow2"), ("tue", "since/mon"), ("wed", "since/tue")] {
        f.qemu.console().rounds_more(5, Duration::from_secs(120));
        last = f.qemu.console().round();
        mount.mkdir(&format!("backups/{backup}")).unwrap();
        let image = mount.path(&format!("backups/{backup}/{from}/vda.qcow2"));
        let copy = copies.join(format!("{backup}.qcow2"));
        run("cp", &[text(&image), text(&copy)]);
        run("chmod", &["600", text(&copy)]);
        run("qemu-img", &["check", "-q", text(&copy)]);
        mount.rmdir(&format!("backups/{backup}")).unwrap();
    }
    mount.umount().assert_clean();
    f.qemu.console().tell("poweroff");
    f.qemu.wait(Duration::from_secs(60));
    let top = copies.join("wed.qcow2");
    let build = Qemu::build().linux(&files, "fleece=idle");
    let mut qemu = build.disk("vda", &top, "qcow2").start();
    qemu.console().ready();
    // It mounted the disk, replaying the journal, and goes on where Wednesday's instant was.
    qemu.console().tell("write 2");
    let now = qemu.console().round();
    assert!(now >= last + 2, "{now} after {last}");
    qemu.console().tell("poweroff");
    qemu.wait(Duration::from_secs(60));
}
