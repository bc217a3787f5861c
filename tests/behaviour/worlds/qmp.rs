//! A paused QEMU, mounted by its monitor with the command.

use std::os::unix::fs::symlink;
use std::path::PathBuf;

use serde_json::json;

use crate::common::mount::Home;
use crate::common::qemu::is_before_8;
use crate::common::tools::{fuse, temp_dir, text, tool};
use crate::common::{Fleecefs, Qemu, Tree, Write, image};
use crate::world::{DISKS, Facts, QMP, SLICE, World};

pub struct QmpWorld {
    qemu: Option<Qemu>,
    mount: Option<Fleecefs>,
    home: Option<Home>,
    dir: tempfile::TempDir,
}

pub fn world() -> Option<Box<dyn World>> {
    for name in ["qemu-system-x86_64", "qemu-img"] {
        tool(name)?;
    }
    fuse()?;
    let dir = temp_dir();
    for (target, size) in DISKS {
        let path = dir.path().join(format!("{target}.qcow2"));
        image::create(&path, "qcow2", size, "");
    }
    let mut world = QmpWorld {
        qemu: None,
        mount: None,
        home: Some(Home::new()),
        dir,
    };
    world.start_domain();
    Some(Box::new(world))
}

impl QmpWorld {
    fn qemu(&self) -> &Qemu {
        self.qemu.as_ref().unwrap()
    }

    /// The socket's path, which is the same in every run of QEMU.
    fn socket(&self) -> PathBuf {
        self.dir.path().join("monitor")
    }
}

impl World for QmpWorld {
    fn facts(&self) -> Facts {
        Facts {
            server: !is_before_8(),
            ..QMP
        }
    }

    fn tree(&self) -> Tree {
        self.mount.as_ref().unwrap().tree().clone()
    }

    fn mount(&mut self, options: &[&str]) {
        let mut build = Fleecefs::qmp(&self.socket()).option(&format!("slice-size={SLICE}"));
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
        for (target, write) in writes {
            self.qemu().write(target, *write);
        }
    }

    fn state(&self) -> Vec<String> {
        let mut lines = self.qemu().state().0;
        if self.qemu().nbd_server_running() {
            lines.push("NBD server".into());
        }
        lines
    }

    fn end_domain(&mut self, killed: bool) {
        let qemu = self.qemu.take().unwrap();
        match killed {
            true => qemu.kill9(),
            false => qemu.quit(),
        }
    }

    fn start_domain(&mut self) {
        let mut build = Qemu::build().paused();
        for (target, _) in DISKS {
            let path = self.dir.path().join(format!("{target}.qcow2"));
            build = build.disk(target, &path, "qcow2");
        }
        let qemu = build.start();
        // Ready before it can be found.
        let next = self.dir.path().join("next");
        symlink(qemu.socket(), &next).unwrap();
        std::fs::rename(next, self.socket()).unwrap();
        self.qemu = Some(qemu);
    }

    fn hang(&self, hung: bool) {
        match hung {
            true => self.qemu().freeze(),
            false => self.qemu().thaw(),
        }
    }

    fn resize(&self, target: &str, size: u64) {
        let what = json!({"node-name": format!("node-{target}"), "size": size});
        self.qemu().cmd("block_resize", what);
    }

    fn intrude(&mut self, there: bool) {
        if there {
            let socket = self.dir.path().join("theirs.sock");
            let address = json!({"type": "unix", "data": {"path": text(&socket)}});
            self.qemu()
                .cmd("nbd-server-start", json!({"addr": address}));
        } else {
            self.qemu().cmd("nbd-server-stop", json!({}));
        }
    }

    fn dir(&self) -> PathBuf {
        self.dir.path().to_owned()
    }
}
