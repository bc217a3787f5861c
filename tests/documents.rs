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
    let on_vdb = |bitmap: &str| f.qemu.dirty_bytes("vdb", bitmap);
    assert!(on_vdb("special").is_none() && on_vdb("mon").is_none());
    let xml = mount.read("checkpoints/mon/checkpoint.xml");
    assert!(xml.contains("bitmap=\"special\""), "{xml}");

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
