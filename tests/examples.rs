//! The scripts in examples/, each run twice on a mount of a running guest's ext4, with changes in
//! between. What they make is restored as their heads say, and is the frozen disk bit for bit.
//!
//! kopia.sh is not run: kopia is in no Debian archive.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use common::tools::{need, run, text};
use common::{Disk, Fleecefs, Qemu, Write, eventually, image, process, tools};

const MIB: u64 = 1 << 20;
/// In 64 slices.
const SIZE: u64 = 64 * MIB;

struct World {
    dir: tempfile::TempDir,
    qemu: Qemu,
    mount: Fleecefs,
    disk: Disk,
}

/// `None` where nothing can be mounted.
fn world() -> Option<World> {
    tools::fuse()?;
    let dir = tools::temp_dir();
    let path = dir.path().join("disk.qcow2");
    let files = dir.path().join("files");
    std::fs::create_dir(&files).unwrap();
    std::fs::write(files.join("diary.txt"), "Monday: all quiet.\n").unwrap();
    image::ext4_of(&path, SIZE, &files);
    let disk = Disk::holding(image::bytes(&path, "qcow2"));
    let qemu = Qemu::build().disk("vda", &path, "qcow2").paused().start();
    let mount = Fleecefs::qmp(&qemu.socket())
        .option("slice-size=1M")
        .mount();
    Some(World {
        dir,
        qemu,
        mount,
        disk,
    })
}

impl World {
    /// The guest writes where its file system has nothing, in one slice.
    fn write(&mut self, pattern: u8) {
        let write = Write {
            offset: 50 * MIB + 4096,
            length: 8192,
            pattern,
        };
        self.qemu.write("vda", write);
        self.disk.apply(write);
    }

    fn out(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn command(&self, script: &str, args: &[&str]) -> Command {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples");
        let mut command = Command::new(path.join(script));
        command
            .arg(self.mount.path(""))
            .args(args)
            .env("PATH", path_with_sbin())
            .env("HOME", self.dir.path())
            .env("BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK", "yes")
            .env("RESTIC_PASSWORD", "secret")
            .stdin(Stdio::null());
        command
    }

    fn output(&self, script: &str, args: &[&str]) -> Output {
        let output = self.command(script, args).output().unwrap();
        assert_eq!(
            self.mount.list("backups"),
            Vec::<String>::new(),
            "{script} always ends its backup"
        );
        output
    }

    /// Runs a script that must work: the one line that it says.
    fn example(&self, script: &str, args: &[&str]) -> String {
        let output = self.output(script, args);
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        let complained = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{script}: {said}{complained}");
        assert_eq!(complained, "", "{script}");
        assert_eq!(said.lines().count(), 1, "{script}: {said}");
        // The next one has another name.
        std::thread::sleep(std::time::Duration::from_secs(1));
        said
    }

    /// What a script says it read: one slice, of a second run.
    fn assert_one_slice(&self, said: &str) {
        let (before, _) = said.split_once(" bytes were read").unwrap();
        let bytes: u64 = before.rsplit(' ').next().unwrap().parse().unwrap();
        assert!((1..=MIB).contains(&bytes), "{said}");
    }

    /// `cat vda/*/*`
    fn assert_slices(&self, top: &Path) {
        let cat = format!("cat {}/vda/*/* >{}", text(top), text(&self.out("cat.raw")));
        run("sh", &["-c", &cat]);
        self.disk.assert_file(&self.out("cat.raw"));
    }

    fn end(self) {
        self.mount.umount().assert_clean();
    }
}

fn path_with_sbin() -> String {
    format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap())
}

/// Names in a directory, sorted.
fn names(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).unwrap();
    let mut names: Vec<_> = entries
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn rsync_slices() {
    need!("qemu-system-x86_64", "qemu-img", "mkfs.ext4", "rsync");
    let Some(mut world) = world() else { return };
    let to = world.out("copy");
    for pattern in [1, 2] {
        world.write(pattern);
        let said = world.example("rsync-slices.sh", &[text(&to)]);
        world.assert_slices(&to);
        if pattern == 2 {
            world.assert_one_slice(&said);
        }
    }
    world.end();
}

#[test]
fn rsync_image() {
    need!("qemu-system-x86_64", "qemu-img", "mkfs.ext4", "rsync");
    let Some(mut world) = world() else { return };
    let to = world.out("copy");
    for pattern in [1, 2] {
        world.write(pattern);
        world.example("rsync-image.sh", &[text(&to)]);
        let copy = to.join("vda.raw");
        world.disk.assert_file(&copy);
        let bytes = std::fs::metadata(&copy).unwrap().blocks() * 512;
        assert!(bytes < SIZE / 2, "{bytes}: not sparse");
    }
    world.end();
}

#[test]
fn borg() {
    need!("qemu-system-x86_64", "qemu-img", "mkfs.ext4", "borg");
    let Some(mut world) = world() else { return };
    let repository = world.out("repo");
    let borg = |world: &World, args: &[&str]| {
        let status = Command::new("borg")
            .args(args)
            .current_dir(world.dir.path())
            .env("HOME", world.dir.path())
            .env("BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK", "yes")
            .status();
        assert!(status.unwrap().success());
    };
    borg(&world, &["init", "--encryption=none", text(&repository)]);
    for pattern in [1, 2] {
        world.write(pattern);
        let said = world.example("borg.sh", &[text(&repository)]);
        let (archive, _) = said.split_once(':').unwrap();
        borg(&world, &["extract", &format!("repo::{archive}")]);
        world.assert_slices(world.dir.path());
        std::fs::remove_dir_all(world.out("vda")).unwrap();
        if pattern == 2 {
            world.assert_one_slice(&said);
        }
    }
    world.end();
}

#[test]
fn restic() {
    need!("qemu-system-x86_64", "qemu-img", "mkfs.ext4", "restic");
    let Some(mut world) = world() else { return };
    let repository = world.out("repo");
    let to = world.out("restored");
    let restic = |world: &World, args: &[&str]| {
        let output = Command::new("restic")
            .args(["--quiet", "--repo", text(&repository)])
            .args(args)
            .env("HOME", world.dir.path())
            .env("RESTIC_PASSWORD", "secret")
            .output();
        assert!(output.unwrap().status.success());
    };
    restic(&world, &["init"]);
    for pattern in [1, 2] {
        world.write(pattern);
        let said = world.example("restic.sh", &[text(&repository)]);
        restic(&world, &["restore", "latest", "--target", text(&to)]);
        world.assert_slices(&to);
        std::fs::remove_dir_all(&to).unwrap();
        if pattern == 2 {
            world.assert_one_slice(&said);
        }
    }
    world.end();
}

#[test]
fn tar() {
    need!("qemu-system-x86_64", "qemu-img", "mkfs.ext4", "tar");
    let Some(mut world) = world() else { return };
    let (archives, to) = (world.out("archives"), world.out("restored"));
    std::fs::create_dir(&archives).unwrap();
    std::fs::create_dir(&to).unwrap();
    for pattern in [1, 2] {
        world.write(pattern);
        let said = world.example("tar.sh", &[text(&archives)]);
        let unpack = format!(
            "cd {} && for archive in {}/*.tar; do tar -xf \"$archive\"; done",
            text(&to),
            text(&archives)
        );
        run("sh", &["-c", &unpack]);
        world.assert_slices(&to);
        if pattern == 2 {
            world.assert_one_slice(&said);
        }
    }
    let newest = names(&archives).into_iter().rfind(|n| n.ends_with(".tar"));
    let listed = run("tar", &["-tf", text(&archives.join(newest.unwrap()))]);
    let slices = listed.lines().filter(|l| l.starts_with("./vda/0000/0"));
    assert_eq!(slices.count(), 1, "{listed}");
    world.end();
}

#[test]
fn qcow2_chain() {
    need!("qemu-system-x86_64", "qemu-img", "mkfs.ext4");
    let Some(mut world) = world() else { return };
    let to = world.out("images");
    for (pattern, what) in [
        (1, "in full"),
        (2, "what changed since"),
        (3, "what changed"),
    ] {
        world.write(pattern);
        let said = world.example("qcow2-chain.sh", &[text(&to)]);
        assert!(said.contains(what), "{said}");
        let newest = names(&to.join("vda")).pop().unwrap();
        let newest = to.join("vda").join(newest);
        let check = run("qemu-img", &["check", text(&newest)]);
        assert!(check.contains("No errors were found"), "{check}");
        let bytes = image::bytes(&newest, "qcow2");
        world.disk.assert_is(&bytes, text(&newest));
        std::fs::remove_file(newest.with_extension("bytes.raw")).ok();
        let size = std::fs::metadata(&newest).unwrap().len();
        assert!(pattern == 1 || size < MIB, "{size}");
    }
    assert_eq!(names(&to.join("vda")).len(), 3);
    world.end();
}

#[test]
fn bmaptool() {
    need!(
        "qemu-system-x86_64",
        "qemu-img",
        "mkfs.ext4",
        "bmaptool",
        "losetup"
    );
    if !tools::is_root() {
        return tools::skip("loop devices need root");
    }
    let Some(mut world) = world() else { return };
    let copy = world.out("copy.raw");
    for (pattern, what) in [(1, "everything"), (2, "what changed since"), (3, "since")] {
        world.write(pattern);
        let said = world.example("bmaptool.sh", &[text(&copy)]);
        assert!(said.contains(what), "{said}");
        world.disk.assert_file(&copy);
    }
    // Onto a device, where something else was before.
    let device_file = world.out("device");
    std::fs::write(&device_file, vec![0xff; SIZE as usize]).unwrap();
    let device = run("losetup", &["-f", "--show", text(&device_file)]);
    let note = world.out("note");
    let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        for pattern in [4, 5] {
            world.write(pattern);
            world.example("bmaptool.sh", &[device.trim(), text(&note)]);
            world.disk.assert_file(&device_file);
        }
    }));
    run("losetup", &["-d", device.trim()]);
    if let Err(panic) = outcome {
        std::panic::resume_unwind(panic);
    }
    world.end();
}

#[test]
fn rotate() {
    need!("qemu-system-x86_64", "qemu-img", "mkfs.ext4", "rsync");
    let Some(mut world) = world() else { return };
    let to = world.out("copies");
    std::fs::create_dir(&to).unwrap();
    let mut earlier: Option<(PathBuf, Disk)> = None;
    for pattern in [1, 2, 3] {
        world.write(pattern);
        let said = world.example("rotate.sh", &[text(&to), "2"]);
        let copies = names(&to);
        assert_eq!(copies.len(), usize::from(pattern).min(2), "{copies:?}");
        let newest = to.join(copies.last().unwrap());
        world.assert_slices(&newest);
        if let Some((path, disk)) = earlier {
            world.assert_one_slice(&said);
            // The older copy is still what it was, and shares what did not change.
            let now = std::mem::replace(&mut world.disk, disk);
            world.assert_slices(&path);
            world.disk = now;
            let number = |copy: &Path, slice: &str| {
                std::fs::metadata(copy.join("vda/0000").join(slice))
                    .unwrap()
                    .ino()
            };
            assert_eq!(number(&path, "0000001"), number(&newest, "0000001"));
            assert_ne!(number(&path, "0000050"), number(&newest, "0000050"));
        }
        earlier = Some((newest, world.disk.clone()));
    }
    world.end();
}

#[test]
fn one_file() {
    need!(
        "qemu-system-x86_64",
        "qemu-img",
        "mkfs.ext4",
        "sfdisk",
        "partx"
    );
    if !tools::is_root() {
        return tools::skip("loop mounts need root");
    }
    let Some(world) = world() else { return };
    for to in ["one.txt", "two.txt"] {
        let to = world.out(to);
        world.example("one-file.sh", &["/diary.txt", text(&to)]);
        let diary = std::fs::read_to_string(&to).unwrap();
        assert_eq!(diary, "Monday: all quiet.\n");
    }
    assert_eq!(world.mount.list("checkpoints"), Vec::<String>::new());
    let World { dir, mount, .. } = world;
    mount.umount().assert_clean();

    // The same file system in the second partition of a disk.
    let raw = dir.path().join("flat.raw");
    let file = std::fs::File::create(&raw).unwrap();
    file.set_len(48 * MIB).unwrap();
    let files = dir.path().join("files");
    run("mkfs.ext4", &["-q", "-F", "-d", text(&files), text(&raw)]);
    let whole = dir.path().join("whole.raw");
    let file = std::fs::File::create(&whole).unwrap();
    file.set_len(64 * MIB).unwrap();
    let table = format!(
        "printf 'label: gpt\\nstart=2048,size=2048\\nstart=8192,size=98304\\n' | sfdisk -q {0} && \
         dd if={1} of={0} bs=512 seek=8192 conv=notrunc status=none",
        text(&whole),
        text(&raw)
    );
    let sh = Command::new("sh")
        .args(["-c", &table])
        .env("PATH", path_with_sbin())
        .status();
    assert!(sh.unwrap().success());
    let disk = dir.path().join("whole.qcow2");
    image::convert(&whole, "raw", &disk, "qcow2");
    let qemu = Qemu::build().disk("vda", &disk, "qcow2").paused().start();
    let world = World {
        mount: Fleecefs::qmp(&qemu.socket()).mount(),
        dir,
        qemu,
        disk: Disk::new(0),
    };
    let to = world.out("three.txt");
    world.example("one-file.sh", &["/diary.txt", text(&to), "2"]);
    let diary = std::fs::read_to_string(&to).unwrap();
    assert_eq!(diary, "Monday: all quiet.\n");
    world.end();
}

#[test]
fn prune() {
    need!("qemu-system-x86_64", "qemu-img", "mkfs.ext4");
    let Some(mut world) = world() else { return };
    let made: Vec<String> = (0..17).map(|n| format!("c{}", (n * 7) % 17)).collect();
    for checkpoint in &made {
        world
            .mount
            .mkdir(&format!("checkpoints/{checkpoint}"))
            .unwrap();
    }
    let sorted = |names: &[String]| {
        let mut names = names.to_vec();
        names.sort();
        names
    };
    let said = world.example("prune.sh", &[]);
    assert!(
        said.starts_with("3 checkpoints were deleted, 14 are left"),
        "{said}"
    );
    assert_eq!(world.mount.list("checkpoints"), sorted(&made[3..]));
    world.example("prune.sh", &["2"]);
    assert_eq!(world.mount.list("checkpoints"), sorted(&made[15..]));
    // What is kept is still good.
    world.write(9);
    world.mount.mkdir("backups/b").unwrap();
    let map = world
        .mount
        .read(&format!("backups/b/since/{}/vda.map", made[15]));
    let dirty = common::model::dirty_extents(&common::model::parse_map(&map));
    assert_eq!(dirty, [(50 * MIB, 65_536)]);
    world.end();
}

#[test]
fn all_are_in_the_readme_and_say_how_they_are_used() {
    let top = Path::new(env!("CARGO_MANIFEST_DIR"));
    let readme = std::fs::read_to_string(top.join("README.md")).unwrap();
    for script in names(&top.join("examples")) {
        if script == "quickstart.sh" {
            continue;
        }
        let row = format!("\n| [{script}](examples/{script}) |");
        assert!(readme.contains(&row), "{script}");
        let output = Command::new(top.join("examples").join(&script)).output();
        let output = output.unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        let usage = format!("examples/{script} MOUNT");
        assert!(said.contains(&usage), "{script}: {said}");
        assert_eq!(output.status.code(), Some(2), "{script}");
    }
}

/// However they end, their backup is ended.
#[test]
fn a_script_that_fails_or_is_killed_ends_its_backup() {
    need!("qemu-system-x86_64", "qemu-img", "mkfs.ext4", "rsync");
    let Some(world) = world() else { return };
    let nowhere = world.out("no/such/place");
    let nowhere = text(&nowhere);
    for (script, args) in [
        ("rsync-slices.sh", &[nowhere][..]),
        ("rsync-image.sh", &[nowhere]),
        ("borg.sh", &[nowhere]),
        ("restic.sh", &[nowhere]),
        ("kopia.sh", &[]),
        ("tar.sh", &[nowhere]),
        ("qcow2-chain.sh", &["/proc/nowhere"]),
        ("bmaptool.sh", &[nowhere]),
        ("rotate.sh", &[nowhere]),
        ("one-file.sh", &["/no/such/file", nowhere]),
    ] {
        let output = world.output(script, args);
        assert!(!output.status.success(), "{script}");
        std::thread::sleep(std::time::Duration::from_secs(1));
    }
    // One that needs current/ does not go on without it.
    world.mount.mkdir("backups/other").unwrap();
    for (script, args) in [
        ("borg.sh", &["x"][..]),
        ("restic.sh", &["x"]),
        ("kopia.sh", &[]),
    ] {
        let output = world.command(script, args).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(said.contains("another backup holds current/"), "{said}");
        assert_eq!(world.mount.list("backups"), ["other"]);
        std::thread::sleep(std::time::Duration::from_secs(1));
    }
    world.mount.rmdir("backups/other").unwrap();

    // A tool that never ends.
    let bin = world.out("bin");
    std::fs::create_dir(&bin).unwrap();
    let slow = bin.join("rsync");
    std::fs::write(&slow, "#!/bin/sh\nexec sleep 1000\n").unwrap();
    std::fs::set_permissions(&slow, std::fs::Permissions::from_mode(0o755)).unwrap();
    for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP] {
        let mut script = world
            .command("rsync-slices.sh", &[nowhere])
            .env("PATH", format!("{}:{}", text(&bin), path_with_sbin()))
            .spawn()
            .unwrap();
        let sleeping = eventually("the tool", tools::DEADLINE, || {
            children(script.id()).into_iter().next()
        });
        // As a terminal does, or a service manager: all of them.
        process::signal(script.id(), signal);
        process::signal(sleeping, libc::SIGTERM);
        let status = process::wait(&mut script, tools::DEADLINE).unwrap();
        assert!(!status.success());
        assert_eq!(world.mount.list("backups"), Vec::<String>::new());
        std::thread::sleep(std::time::Duration::from_secs(1));
    }
    world.end();
}

/// Processes that a process started and that run the slow tool.
fn children(pid: u32) -> Vec<u32> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
    let pids = text.unwrap_or_default();
    let pids = pids.split_whitespace().filter_map(|p| p.parse().ok());
    pids.filter(|p: &u32| {
        std::fs::read_to_string(format!("/proc/{p}/comm")).is_ok_and(|c| c.trim() == "sleep")
    })
    .collect()
}
