//! Push backups, and servers for other clients, of a real libvirtd's domains: libvirt copies, and what
//! the mount says of it is true whatever becomes of the job.
#![cfg(feature = "libvirt")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::path::{Path, PathBuf};

use common::libvirtd::{Libvirtd, libvirtd};
use common::tools::{DEADLINE, eventually, fuse, need, run, text};
use common::{Disk, Fleecefs, Rng, Write, image, process};

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

/// Night after night onto qcow2 images, each with the changes, and onto one raw copy.
#[test]
fn every_night_what_changed() {
    need!("qemu-img");
    let (Some(libvirtd), Some(())) = (libvirtd(), fuse()) else {
        return;
    };
    let sizes = [16 * MIB, 4 * MIB];
    libvirtd.domain(&sizes);
    let dir = targets(&libvirtd);
    let mount = Fleecefs::libvirt(&libvirtd.uri()).mount();
    let mut rng = Rng::from_env();
    let mut models = sizes.map(Disk::new);
    let scatter = |rng: &mut Rng, models: &mut [Disk; 2]| {
        for (target, model) in ["vda", "vdb"].iter().zip(models) {
            for _ in 0..8 {
                let write = rng.write(model.size());
                libvirtd.write(target, write);
                model.apply(write);
            }
        }
    };
    let raw = dir.join("vdb.raw");
    let mut chain: Vec<PathBuf> = Vec::new();
    for night in 0_u32..4 {
        scatter(&mut rng, &mut models);
        let name = format!("n{night}");
        let image = dir.join(&name);
        let last = night.checked_sub(1).map(|n| format!("n{n}"));
        let disks = [("vda", "qcow2", image.as_path()), ("vdb", "raw", &raw)];
        begin(&mount, &name, &document(last.as_deref(), &disks));
        let instant = models.clone();
        // The guest goes on writing.
        scatter(&mut rng, &mut models);
        let status = becomes(&mount, &name, "completed");
        assert!(status.contains("mode: push"), "{status}");
        assert!(no_job(&libvirtd));
        let info = run("qemu-img", &["info", text(&image)]);
        assert!(!info.contains("backing file"), "{info}");
        if let Some(below) = chain.last() {
            let rebase = ["rebase", "-q", "-u", "-f", "qcow2", "-F", "qcow2", "-b"];
            run(
                "qemu-img",
                &[&rebase[..], &[text(below), text(&image)]].concat(),
            );
        }
        run("qemu-img", &["check", "-q", text(&image)]);
        instant[0].assert_is(&image::bytes(&image, "qcow2"), &name);
        instant[1].assert_is(&image::bytes(&raw, "raw"), &name);
        chain.push(image);
        // Nothing is written over, and the refusal changes nothing.
        let again = [("vda", "qcow2", chain[0].as_path())];
        let refused = write_document(&mount, "again", &document(None, &again)).unwrap_err();
        assert!(
            refused.to_string().contains("never written over"),
            "{refused}"
        );
        mount.rmdir(&format!("backups/{name}")).unwrap();
    }
    let events = mount.read("events");
    assert_eq!(events.matches("\"completed\"").count(), 4, "{events}");
    assert_eq!(mount.umount().leftovers(), NOTHING);
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

/// `<server>`: other clients have the frozen disk and what changed, under the names that are asked for.
#[test]
fn other_clients_are_served() {
    need!("nbdcopy", "nbdinfo");
    let (Some(libvirtd), Some(())) = (libvirtd(), fuse()) else {
        return;
    };
    libvirtd.domain(&[8 * MIB]);
    let mut model = Disk::new(8 * MIB);
    let write = |model: &mut Disk, offset: u64, pattern| {
        let write = Write {
            offset,
            length: 65536,
            pattern,
        };
        libvirtd.write("vda", write);
        model.apply(write);
    };
    let mount = Fleecefs::libvirt(&libvirtd.uri()).mount();
    write(&mut model, 0, 1);
    mount.mkdir("checkpoints/mon").unwrap();
    write(&mut model, MIB, 2);
    let socket = libvirtd.dir().join("served.sock");
    let document = format!(
        "<domainbackup mode='pull'><incremental>mon</incremental>\
         <server transport='unix' socket='{}'/><disks>\
         <disk name='vda' exportname='root' exportbitmap='new'/></disks></domainbackup>",
        text(&socket)
    );
    begin(&mount, "b", &document);
    let frozen = model.clone();
    write(&mut model, 2 * MIB, 3);
    let uri = format!("nbd+unix:///root?socket={}", text(&socket));
    let copy = libvirtd.dir().join("copy");
    run("nbdcopy", &[&uri, text(&copy)]);
    frozen.assert_file(&copy);
    let map = run("nbdinfo", &["--map=qemu:dirty-bitmap:new", &uri]);
    let dirty = common::model::dirty_extents(&common::parse_map(&map));
    assert_eq!(dirty, [(MIB, 65536)]);
    let map = mount.read("backups/b/dirty.map");
    assert_eq!(
        common::model::dirty_extents(&common::parse_map(&map)),
        dirty
    );
    frozen.assert_file(&mount.path("backups/b/disk.raw"));
    mount.rmdir("backups/b").unwrap();
    assert!(!socket.exists());
    assert_eq!(mount.umount().leftovers(), NOTHING);
}
