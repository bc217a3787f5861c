//! A paused domain of a libvirtd with a private root, mounted with the command.

use std::fs::{Permissions, create_dir, set_permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use crate::common::libvirtd::{Libvirtd, libvirtd};
use crate::common::mount::Home;
use crate::common::process::signal;
use crate::common::qemu::State;
use crate::common::tools::{DEADLINE, eventually, fuse, text};
use crate::common::{Fleecefs, Tree, Write};
use crate::world::{DISKS, Facts, LIBVIRT, SLICE, World};

pub struct LibvirtWorld {
    // Unmounted before libvirtd ends.
    mount: Option<Fleecefs>,
    home: Option<Home>,
    libvirtd: Libvirtd,
}

pub fn world() -> Option<Box<dyn World>> {
    fuse()?;
    let libvirtd = libvirtd()?;
    libvirtd.domain(&DISKS.map(|(_, size)| size));
    // QEMU is nobody, and writes targets and sockets here.
    let shared = libvirtd.dir().join("shared");
    create_dir(&shared).unwrap();
    set_permissions(&shared, Permissions::from_mode(0o777)).unwrap();
    Some(Box::new(LibvirtWorld {
        mount: None,
        home: Some(Home::new()),
        libvirtd,
    }))
}

impl World for LibvirtWorld {
    fn facts(&self) -> Facts {
        LIBVIRT
    }

    fn tree(&self) -> Tree {
        self.mount.as_ref().unwrap().tree().clone()
    }

    fn mount(&mut self, options: &[&str]) {
        let mut build =
            Fleecefs::libvirt(&self.libvirtd.uri()).option(&format!("slice-size={SLICE}"));
        for option in options {
            build = build.option(option);
        }
        self.mount = Some(build.home(self.home.take().unwrap()).mount());
    }

    fn unmount(&mut self) {
        let home = self.mount.take().unwrap().umount();
        home.assert_clean();
        self.home = Some(home);
    }

    fn kill(&mut self) {
        self.home = Some(self.mount.take().unwrap().sigkill());
    }

    fn guest_writes(&self, writes: &[(&str, Write)]) {
        self.libvirtd.writes(writes);
    }

    fn state(&self) -> Vec<String> {
        let mut lines = State::of(&self.libvirtd.qmp_all(&State::questions())).0;
        let listed = self
            .libvirtd
            .virsh(&["checkpoint-list", "--topological", "--name", "vm"]);
        let names = listed.split_whitespace();
        lines.extend(names.map(|name| format!("checkpoint {name}")));
        if self.libvirtd.try_virsh(&["backup-dumpxml", "vm"]).is_ok() {
            lines.push("libvirt's backup".into());
        }
        lines
    }

    fn end_domain(&mut self, killed: bool) {
        if killed {
            signal(self.libvirtd.qemu(), libc::SIGKILL);
        } else {
            self.libvirtd.virsh(&["destroy", "--graceful", "vm"]);
        }
    }

    fn start_domain(&mut self) {
        // libvirtd may not have noticed yet that its domain was killed.
        eventually("the start", DEADLINE, || {
            self.libvirtd.try_virsh(&["start", "--paused", "vm"]).ok()
        });
    }

    fn hang(&self, hung: bool) {
        let how = if hung { libc::SIGSTOP } else { libc::SIGCONT };
        signal(self.libvirtd.qemu(), how);
    }

    fn resize(&self, target: &str, size: u64) {
        let size = format!("{size}B");
        self.libvirtd.virsh(&["blockresize", "vm", target, &size]);
    }

    fn intrude(&mut self, there: bool) {
        if !there {
            self.libvirtd.virsh(&["domjobabort", "vm"]);
            return;
        }
        let document = self.libvirtd.dir().join("theirs.xml");
        let text_of = |name: &str| text(&self.dir().join(name)).to_owned();
        let theirs = format!(
            "<domainbackup mode='pull'><server transport='unix' socket='{}'/><disks>\
             <disk name='vda' backup='yes' type='file'><scratch file='{}'/></disk>\
             <disk name='vdb' backup='no'/></disks></domainbackup>",
            text_of("theirs.sock"),
            text_of("theirs.qcow2"),
        );
        std::fs::write(&document, theirs).unwrap();
        self.libvirtd
            .virsh(&["backup-begin", "vm", text(&document)]);
    }

    fn dir(&self) -> PathBuf {
        self.libvirtd.dir().join("shared")
    }
}
