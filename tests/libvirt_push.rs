//! Push backups of a real libvirtd's domains that do not come to their end: what the mount says of them is
//! true whatever becomes of the job. Those that do are in `behaviour`.
#![cfg(feature = "libvirt")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::path::{Path, PathBuf};

use common::libvirtd::{Libvirtd, libvirtd};
use common::tools::{DEADLINE, eventually, fuse, need, run, text};
use common::{Fleecefs, Write, image, process};

const MIB: u64 = 1 << 20;
const NOTHING: [PathBuf; 0] = [];

/// Where libvirt's QEMU may write.
fn targets(libvirtd: &Libvirtd) -> PathBuf {
    let dir = libvirtd.dir().join("targets");
    std::fs::create_dir(&dir).unwrap();
    dir
}

/// A `<domainbackup>`: disk, format, path.
fn document(incremental: Option<&str>, disks: &[(&str, &str, &Path)]) -> String {
    let base = incremental.map_or(String::new(), |c| format!("<incremental>{c}</incremental>"));
    let disk = |(disk, format, path): &(&str, &str, &Path)| {
        let path = path.display();
        format!("<disk name='{disk}'><driver type='{format}'/><target file='{path}'/></disk>")
    };
    let disks: String = disks.iter().map(disk).collect();
    format!("<domainbackup mode='push'>{base}<disks>{disks}</disks></domainbackup>")
}

fn write_document(mount: &Fleecefs, name: &str, document: &str) -> std::io::Result<()> {
    let path = mount.path(&format!("backups/{name}.xml"));
    // The shell tells what close() says, as its user would hear it.
    let script = "printf %s \"$1\" > \"$2\"";
    let status = std::process::Command::new("sh")
        .args(["-c", script, "sh", document, text(&path)])
        .stderr(std::process::Stdio::null())
        .status()?;
    match status.success() && mount.path(&format!("backups/{name}")).exists() {
        true => Ok(()),
        false => Err(std::io::Error::other(mount.last_error())),
    }
}

fn begin(mount: &Fleecefs, name: &str, document: &str) {
    write_document(mount, name, document).unwrap_or_else(|e| panic!("{name}: {e}"));
}

fn status(mount: &Fleecefs, name: &str) -> String {
    mount.read(&format!("backups/{name}/status"))
}

/// Waits until a backup is in this state.
fn becomes(mount: &Fleecefs, name: &str, state: &str) -> String {
    eventually(state, DEADLINE, || {
        let status = status(mount, name);
        status
            .contains(&format!("state: {state}"))
            .then_some(status)
    })
}

fn no_job(libvirtd: &Libvirtd) -> bool {
    libvirtd.try_virsh(&["backup-dumpxml", "vm"]).is_err()
}

/// A domain whose disk takes some seconds to copy.
fn slow(libvirtd: &Libvirtd) {
    libvirtd.domain(&[160 * MIB]);
    let write = Write {
        offset: 0,
        length: 160 * MIB,
        pattern: 7,
    };
    libvirtd.write("vda", write);
    libvirtd.slow("vda");
}

/// Ours, somebody else's, and of the whole domain: no end of a job leaves what could be taken for a
/// backup.
#[test]
fn a_push_that_is_broken_off() {
    need!("qemu-img");
    let (Some(mut libvirtd), Some(())) = (libvirtd(), fuse()) else {
        return;
    };
    slow(&libvirtd);
    let target = targets(&libvirtd).join("a.qcow2");
    let document = document(None, &[("vda", "qcow2", &target)]);
    let mount = Fleecefs::libvirt(&libvirtd.uri()).mount();

    begin(&mount, "ours", &document);
    assert!(status(&mount, "ours").contains("state: running"));
    let busy = mount.rmdir("backups/ours").unwrap_err();
    assert_eq!(busy.raw_os_error(), Some(libc::EBUSY));
    let second = mount.mkdir("backups/second").unwrap_err();
    assert_eq!(second.raw_os_error(), Some(libc::EBUSY));
    let control = mount.path("backups/ours/control");
    let pause = std::fs::write(&control, "pause\n").unwrap_err();
    assert_eq!(pause.raw_os_error(), Some(libc::EOPNOTSUPP), "{pause}");
    std::fs::write(&control, "abort\n").unwrap();
    becomes(&mount, "ours", "aborted");
    assert!(!target.exists() && no_job(&libvirtd));

    begin(&mount, "theirs", &document);
    libvirtd.virsh(&["domjobabort", "vm"]);
    let failed = becomes(&mount, "theirs", "failed");
    assert!(failed.contains("domjobabort"), "{failed}");
    assert!(!target.exists());

    begin(&mount, "domains", &document);
    libvirtd.virsh(&["destroy", "vm"]);
    let failed = becomes(&mount, "domains", "failed");
    assert!(failed.contains("destroyed"), "{failed}");
    assert!(!target.exists());
    for name in ["ours", "theirs", "domains"] {
        mount.rmdir(&format!("backups/{name}")).unwrap();
    }

    // A restart of libvirtd is no end: the job is in QEMU, and is known again.
    libvirtd.virsh(&["start", "--paused", "vm"]);
    libvirtd.slow("vda");
    eventually("the domain's return", DEADLINE, || {
        let status = mount.read("status");
        status.contains("state: connected").then_some(())
    });
    begin(&mount, "kept", &document);
    libvirtd.restart();
    assert!(!no_job(&libvirtd));
    libvirtd.fast_again();
    becomes(&mount, "kept", "completed");
    let image = image::bytes(&target, "qcow2");
    assert!(image.iter().all(|byte| *byte == 7));
    assert_eq!(mount.umount().leftovers(), NOTHING);
}

/// A killed fleecefs leaves a job and half a file; the next one removes both.
#[test]
fn the_next_start_ends_a_push() {
    let (Some(libvirtd), Some(())) = (libvirtd(), fuse()) else {
        return;
    };
    slow(&libvirtd);
    let target = targets(&libvirtd).join("a.qcow2");
    let killed = Fleecefs::libvirt(&libvirtd.uri()).mount();
    begin(&killed, "b", &document(None, &[("vda", "qcow2", &target)]));
    let home = killed.sigkill();
    assert!(!no_job(&libvirtd) && target.exists());
    let next = Fleecefs::libvirt(&libvirtd.uri()).home(home).mount();
    assert!(no_job(&libvirtd) && !target.exists());
    next.mkdir("backups/free").unwrap();
    assert_eq!(next.umount().leftovers(), NOTHING);
}

/// The guest goes on, and what was written of the copy is removed.
#[test]
fn a_full_target_fails_the_backup() {
    let Some(()) = fuse() else { return };
    let small = |dir: &Path| {
        let dir = dir.join("small");
        std::fs::create_dir(&dir).unwrap();
        let options = ["-t", "tmpfs", "-o", "size=8m,mode=755", "tmpfs"];
        run("mount", &[&options[..], &[text(&dir)]].concat());
    };
    let Some(libvirtd) = common::libvirtd::libvirtd_after(small) else {
        return;
    };
    let small = Unmounts(libvirtd.dir().join("small"));
    libvirtd.domain(&[160 * MIB]);
    let write = Write {
        offset: 0,
        length: 32 * MIB,
        pattern: 7,
    };
    libvirtd.write("vda", write);
    let target = small.0.join("a.qcow2");
    let mount = Fleecefs::libvirt(&libvirtd.uri()).mount();
    begin(&mount, "b", &document(None, &[("vda", "qcow2", &target)]));
    let failed = becomes(&mount, "b", "failed");
    assert!(failed.contains("a target is full"), "{failed}");
    assert!(!target.exists());
    let state = libvirtd.virsh(&["domstate", "--reason", "vm"]);
    assert!(
        state.contains("paused (starting up)") || state.contains("user"),
        "{state}"
    );
    mount.rmdir("backups/b").unwrap();
    assert_eq!(mount.umount().leftovers(), NOTHING);
    assert!(process::alive(libvirtd.qemu()));
}

struct Unmounts(PathBuf);

impl Drop for Unmounts {
    fn drop(&mut self) {
        run("umount", &["-l", text(&self.0)]);
    }
}

/// libvirt keeps what became of the last job only. One that waited for its turn follows ours at once, and
/// comes out well.
#[test]
fn the_success_of_another_is_not_ours() {
    let (Some(libvirtd), Some(())) = (libvirtd(), fuse()) else {
        return;
    };
    libvirtd.domain(&[160 * MIB, MIB]);
    let write = Write {
        offset: 0,
        length: 160 * MIB,
        pattern: 7,
    };
    libvirtd.write("vda", write);
    libvirtd.slow("vda");
    let dir = targets(&libvirtd);
    let mount = Fleecefs::libvirt(&libvirtd.uri()).mount();
    for round in 0..3 {
        let [ours, theirs] = ["ours", "theirs"].map(|who| dir.join(format!("{who}{round}.raw")));
        let name = format!("b{round}");
        begin(&mount, &name, &document(None, &[("vda", "raw", &ours)]));
        let other = libvirtd.dir().join("theirs.xml");
        let document = format!(
            "<domainbackup mode='push'><disks><disk name='vda' backup='no'/>\
             <disk name='vdb' type='file'><target file='{}'/><driver type='raw'/></disk></disks>\
             </domainbackup>",
            text(&theirs)
        );
        std::fs::write(&other, document).unwrap();
        let aborted = format!("domjobabort vm; backup-begin vm {}", text(&other));
        libvirtd.virsh(&[&aborted]);
        let failed = becomes(&mount, &name, "failed");
        assert!(failed.contains("aborted by someone else"), "{failed}");
        assert!(!ours.exists());
        eventually("the other's end", DEADLINE, || {
            no_job(&libvirtd).then_some(())
        });
        mount.rmdir(&format!("backups/{name}")).unwrap();
    }
    assert_eq!(mount.umount().leftovers(), NOTHING);
}
