//! Documents, controls and events as files of a real mount over a real QEMU.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::path::{Path, PathBuf};

use common::qemu::Builder;
use common::tools::{self, DEADLINE, need, text};
use common::{Disk, Fleecefs, Qemu, Write, image, parse_map};

const MIB: u64 = 1 << 20;
const SIZE: u64 = 32 * MIB;

struct Fixture {
    dir: tempfile::TempDir,
    qemu: Qemu,
}

fn fixture() -> Fixture {
    fixture_with(Qemu::build())
}

fn fixture_with(build: Builder) -> Fixture {
    let dir = tools::temp_dir();
    let mut build = build.paused();
    for target in ["vda", "vdb"] {
        let path = dir.path().join(format!("{target}.qcow2"));
        image::create(&path, "qcow2", SIZE, "");
        build = build.disk(target, &path, "qcow2");
    }
    let qemu = build.start();
    Fixture { dir, qemu }
}

impl Fixture {
    fn mount(&self) -> Fleecefs {
        Fleecefs::qmp(&self.qemu.socket()).mount()
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }
}

/// Writes a document as a shell would: the error of close(2) is what counts.
fn put(mount: &Fleecefs, name: &str, document: &str) -> Result<(), String> {
    let script = "cat > \"$0\"";
    let mut child = std::process::Command::new("sh")
        .args(["-c", script, text(&mount.path(name))])
        .stdin(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    use std::io::Write as _;
    // Where the file cannot even be opened, nobody reads it.
    let mut stdin = child.stdin.take().unwrap();
    let _ = stdin.write_all(document.as_bytes());
    drop(stdin);
    let out = child.wait_with_output().unwrap();
    match out.status.success() {
        true => Ok(()),
        false => Err(String::from_utf8_lossy(&out.stderr).into_owned()),
    }
}

/// The errno that closing the document gives, and the sentence about it.
fn refused(mount: &Fleecefs, name: &str, document: &str, error: &str, sentence: &str) {
    let said = put(mount, name, document).expect_err(document);
    assert!(said.contains(error), "{document}: {said}");
    let last = mount.last_error();
    let last = last.lines().last().unwrap();
    assert!(last.contains(sentence), "{document}: {last}");
}

#[test]
fn documents_make_checkpoints() {
    need!("qemu-system-x86_64", "qemu-img");
    let Some(()) = tools::fuse() else { return };
    let f = fixture();
    let mount = f.mount();
    let one = "<domaincheckpoint><description>before the upgrade</description>\
               <disks><disk name='vda' checkpoint='bitmap' bitmap='special'/>\
               <disk name='vdb' checkpoint='no'/></disks></domaincheckpoint>";
    put(&mount, "checkpoints/mon.xml", one).unwrap();
    assert!(f.qemu.dirty_bytes("vda", "special").is_some());
    assert!(
        f.qemu.dirty_bytes("vdb", "special").is_none()
            && f.qemu.dirty_bytes("vdb", "mon").is_none()
    );
    let xml = mount.read("checkpoints/mon/checkpoint.xml");
    assert!(
        xml.contains("before the upgrade") && xml.contains("bitmap=\"special\""),
        "{xml}"
    );
    let before = f.qemu.state();
    let invalid = "Invalid argument";
    for (document, line, sentence) in [
        ("<domaincheckpoint>", 1, ""),
        (
            "<domaincheckpoint>\n<disks><disk name='vdx'/></disks></domaincheckpoint>",
            2,
            "vda, vdb",
        ),
        (
            "<domaincheckpoint><disks>\n<disk name='vda'/>\n<disk name='vda'/></disks></domaincheckpoint>",
            3,
            "twice",
        ),
        (
            "<domaincheckpoint>\n<name>wed</name></domaincheckpoint>",
            2,
            "not tue",
        ),
        (
            "<domaincheckpoint><disks>\n<disk name='vda' snapshot='no'/></disks></domaincheckpoint>",
            2,
            "snapshot=",
        ),
        ("<domainsnapshot/>", 1, "<domaincheckpoint> is needed"),
        (
            "<domaincheckpoint><disks><disk name='vda' checkpoint='no'/></disks></domaincheckpoint>",
            1,
            "no disk",
        ),
    ] {
        refused(
            &mount,
            "checkpoints/tue.xml",
            document,
            invalid,
            &format!("line {line}"),
        );
        refused(&mount, "checkpoints/tue.xml", document, invalid, sentence);
    }
    // By the image's path, which is the same disk.
    let image = f.path("vda.qcow2");
    let twice = format!(
        "<domaincheckpoint><disks><disk name='vda'/>\n<disk name='{}'/></disks></domaincheckpoint>",
        image.display()
    );
    refused(
        &mount,
        "checkpoints/tue.xml",
        &twice,
        invalid,
        "vda is listed twice",
    );
    refused(
        &mount,
        "checkpoints/mon.xml",
        "<domaincheckpoint/>",
        "File exists",
        "mon",
    );
    assert_eq!(f.qemu.state(), before);

    // Saved, lost and taken up again.
    f.qemu.guest_write("vda", MIB, 4096, 1);
    let home = mount.umount();
    std::fs::remove_dir_all(home.path("state")).unwrap();
    std::fs::create_dir(home.path("state")).unwrap();
    let mount = Fleecefs::qmp(&f.qemu.socket()).home(home).mount();
    assert!(mount.list("checkpoints").is_empty());
    put(&mount, "checkpoints/mon.xml", &xml).unwrap();
    assert_eq!(mount.read("checkpoints/mon/checkpoint.xml"), xml);
    mount.mkdir("backups/tue").unwrap();
    let changed = mount.read("backups/tue/since/mon/vda.map");
    let dirty = common::model::dirty_extents(&parse_map(&changed));
    assert_eq!(dirty, [(MIB, 65536)]);
    assert_eq!(
        mount.list("backups/tue/since/mon").len(),
        5,
        "vdb is not covered"
    );
    mount.umount().assert_clean();
}

#[test]
fn documents_begin_backups() {
    need!("qemu-system-x86_64", "qemu-img");
    let Some(()) = tools::fuse() else { return };
    let f = fixture();
    f.qemu.guest_write("vda", 0, MIB, 1);
    let mount = f.mount();
    mount.mkdir("checkpoints/mon").unwrap();
    f.qemu.guest_write("vda", MIB, MIB, 2);
    let before = f.qemu.state();
    let pull = |inner: &str| format!("<domainbackup mode='pull'>{inner}</domainbackup>");
    let disks = |inner: &str| pull(&format!("<disks>{inner}</disks>"));
    for (document, error, sentence) in [
        (pull("<incremental>sun</incremental>"), "Invalid argument", "line 1: there is no checkpoint sun"),
        (disks("<disk name='vda' incremental='sun'/>"), "Invalid argument", "no checkpoint sun"),
        (disks("<disk name='vdz'/>"), "Invalid argument", "line 1: the domain has no disk \"vdz\""),
        (disks("<disk name='vda' backup='no'/>"), "Invalid argument", "no disk takes part"),
        (disks("<disk name='vda' exportname='x'/>"), "Invalid argument", "needs <server>"),
        (disks("<disk name='vda' type='block'><scratch dev='/dev/null'/></disk>"), "Invalid argument", "not supported"),
        (pull("<domaincheckpoint><name>mon</name></domaincheckpoint>"), "File exists", "checkpoint mon"),
        (pull("<domaincheckpoint><creationTime>5</creationTime></domaincheckpoint>"), "Invalid argument", "creationTime"),
        ("<domainbackup><disks><disk name='vda'><target file='relative'/></disk></disks></domainbackup>".to_owned(), "Invalid argument", "absolute path"),
    ] {
        refused(&mount, "backups/tue.xml", &document, error, sentence);
        assert_eq!(f.qemu.state(), before, "{document}");
    }
    // One disk, since a checkpoint, with its own scratch file and no checkpoint of its own.
    let scratch = f.path("own-scratch");
    let document = format!(
        "<domainbackup mode='pull'>\n  <incremental>mon</incremental>\n  <disks>\n    \
         <disk name='vda' type='file'><driver type='qcow2'/><scratch file='{}'/></disk>\n  </disks>\n  \
         <domaincheckpoint><disks><disk name='vda' checkpoint='no'/></disks></domaincheckpoint>\n\
         </domainbackup>\n",
        scratch.display()
    );
    put(&mount, "backups/tue.xml", &document).unwrap();
    assert_eq!(mount.list("backups"), ["tue"]);
    assert_eq!(mount.list("backups/tue/raw"), ["vda.raw"]);
    assert_eq!(mount.list("checkpoints"), ["mon"]);
    assert!(
        mount
            .read("backups/tue/backup.xml")
            .contains("<incremental>mon</incremental>")
    );
    let dirty = common::model::dirty_extents(&parse_map(&mount.read("backups/tue/dirty.map")));
    assert_eq!(dirty, [(MIB, MIB)]);
    // Under another name's checkpoint, of one disk.
    let named = pull(
        "<domaincheckpoint><name>night</name><disks><disk name='vdb'/></disks></domaincheckpoint>",
    );
    put(&mount, "backups/wed.xml", &named).unwrap();
    assert_eq!(mount.list("checkpoints"), ["mon", "night"]);
    refused(
        &mount,
        "backups/wed.xml",
        &named,
        "File exists",
        "backup wed",
    );
    // abort: reads fail, and the directory stays until it is removed.
    std::fs::write(mount.path("backups/wed/control"), "abort\n").unwrap();
    assert!(
        mount
            .read("backups/wed/status")
            .starts_with("state: aborted\n")
    );
    assert!(std::fs::read(mount.path("backups/wed/disk.raw")).is_err());
    for word in ["pause", "speed 5M", "nonsense", "speed", ""] {
        let outcome = std::fs::write(mount.path("backups/tue/control"), format!("{word}\n"));
        assert!(outcome.is_err(), "{word}");
    }
    mount.rmdir("backups/wed").unwrap();
    mount.rmdir("backups/tue").unwrap();
    let events = mount.read("events");
    let told: Vec<serde_json::Value> = events
        .lines()
        .map(|l| serde_json::from_str(l).unwrap())
        .collect();
    let told: Vec<(&str, &str)> = told
        .iter()
        .map(|e| (e["name"].as_str().unwrap(), e["outcome"].as_str().unwrap()))
        .collect();
    assert_eq!(told, [("wed", "aborted"), ("tue", "completed")], "{events}");
    mount.umount().assert_clean();
}

/// Push by files: progress, EBUSY, abort; and fleecefs killed in the middle.
#[test]
fn a_push_is_steered_by_files_and_tidied_after_a_kill() {
    need!("qemu-system-x86_64", "qemu-img");
    let Some(()) = tools::fuse() else { return };
    let f = fixture_with(Qemu::build().slow());
    let mut model = Disk::new(SIZE);
    let write = Write {
        offset: MIB,
        length: MIB,
        pattern: 7,
    };
    f.qemu.write("vdb", write);
    model.apply(write);
    f.qemu.guest_write("vda", 0, SIZE, 7);
    let mount = f.mount();
    mount.mkdir("checkpoints/mon").unwrap();
    let before = f.qemu.state();
    let document = |disk: &str, target: &Path| {
        format!(
            "<domainbackup mode='push'><disks><disk name='{disk}'><target file='{}'/>\
             <driver type='qcow2'/></disk></disks></domainbackup>",
            target.display()
        )
    };
    let copy = f.path("copy.qcow2");
    put(&mount, "backups/tue.xml", &document("vdb", &copy)).unwrap();
    assert_eq!(
        mount.list("backups/tue"),
        [
            "backup.xml",
            "checkpoint.xml",
            "control",
            "domain.xml",
            "status"
        ]
    );
    tools::eventually("the push", DEADLINE, || {
        mount
            .read("backups/tue/status")
            .starts_with("state: completed")
            .then_some(())
    });
    mount.rmdir("backups/tue").unwrap();
    model.assert_is(&image::bytes(&copy, "qcow2"), "copy");

    let control =
        |word: &str| std::fs::write(mount.path("backups/wed/control"), format!("{word}\n"));
    let other = f.path("other.qcow2");
    put(&mount, "backups/wed.xml", &document("vda", &other)).unwrap();
    control("speed 64K").unwrap();
    let busy = mount.rmdir("backups/wed").unwrap_err();
    assert_eq!(busy.raw_os_error(), Some(libc::EBUSY));
    assert!(
        mount.last_error().contains("echo abort"),
        "{}",
        mount.last_error()
    );
    control("pause").unwrap();
    assert!(
        mount
            .read("backups/wed/status")
            .starts_with("state: paused")
    );
    control("resume").unwrap();
    let status = mount.read("backups/wed/status");
    assert!(
        status.contains("total: ") && status.contains("other.qcow2"),
        "{status}"
    );
    // In the middle of it.
    let home = mount.sigkill();
    let mount = Fleecefs::qmp(&f.qemu.socket()).home(home).mount();
    assert!(mount.list("backups").is_empty());
    assert!(
        !other.exists() && copy.exists(),
        "the unfinished one is gone"
    );
    assert_eq!(mount.list("checkpoints"), ["mon", "tue", "wed"]);
    for checkpoint in ["tue", "wed"] {
        mount.rmdir(&format!("checkpoints/{checkpoint}")).unwrap();
    }
    assert_eq!(f.qemu.state(), before);
    mount.umount().assert_clean();
}
