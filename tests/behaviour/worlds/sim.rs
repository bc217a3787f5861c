//! The simulated domain, mounted by this process.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use fleecefs::backend::sim::{GRANULE, Sim};
use fleecefs::engine::{Domain, Options, Store};
use fleecefs::fuse::{self, MountOptions, Mounted};
use fleecefs::model::Kind;
use fleecefs::vfs::{Facts as Mounting, Vfs};

use crate::common::tools::{DEADLINE, eventually, fuse as usable, temp_dir};
use crate::common::{Tree, Write};
use crate::world::{DISKS, Facts, SIM, SLICE, World};

pub struct SimWorld {
    sim: Sim,
    mounted: Option<Mounted>,
    intruder: bool,
    dir: tempfile::TempDir,
}

pub fn world() -> Option<Box<dyn World>> {
    usable()?;
    let disks = DISKS.map(|(target, size)| (target, usize::try_from(size).unwrap()));
    let dir = temp_dir();
    std::fs::create_dir(dir.path().join("mnt")).unwrap();
    Some(Box::new(SimWorld {
        sim: Sim::new(&disks),
        mounted: None,
        intruder: false,
        dir,
    }))
}

impl World for SimWorld {
    fn facts(&self) -> Facts {
        SIM
    }

    fn tree(&self) -> Tree {
        Tree::at(&self.dir.path().join("mnt"))
    }

    fn mount(&mut self, options: &[&str]) {
        let mut how = Options {
            slice_size: SLICE,
            ..Options::default()
        };
        for option in options {
            match option.split_once('=') {
                Some(("checkpoint", "no")) => how.checkpoint = false,
                Some(("granularity", bytes)) => how.granularity = bytes.parse().ok(),
                Some(("timeout", seconds)) => {
                    how.timeout = Duration::from_secs(seconds.parse().unwrap());
                }
                _ => panic!("{option}"),
            }
        }
        // Threads of the last mount may be on their way out, and hold it until then.
        let store = eventually("the state directory", DEADLINE, || {
            Store::open(&self.dir.path().join("state")).ok()
        });
        let domain = Domain::open(Arc::new(self.sim.clone()), store, how).unwrap();
        // SAFETY: no pointers.
        let (uid, gid) = unsafe { (libc::getuid(), libc::getgid()) };
        let facts = Mounting {
            uid,
            gid,
            backing: "{checkpoint}.qcow2".into(),
            ..Mounting::default()
        };
        let point = fuse::heal(&self.dir.path().join("mnt"))
            .unwrap()
            .into_path();
        let options = MountOptions {
            source: "sim".into(),
            allow_other: false,
            read_ahead_kib: 4096,
        };
        let vfs = Arc::new(Vfs::new(Arc::new(domain), facts));
        self.mounted = Some(fuse::mount(vfs, &point, &options).unwrap());
        self.intrude(self.intruder);
    }

    fn unmount(&mut self) {
        self.mounted.take().unwrap().shut_down().unwrap();
    }

    fn kill(&mut self) {
        panic!("that would be this process");
    }

    fn guest_writes(&self, writes: &[(&str, Write)]) {
        for (target, write) in writes {
            let bytes = vec![write.pattern; usize::try_from(write.length).unwrap()];
            let offset = usize::try_from(write.offset).unwrap();
            self.sim.write(target, offset, &bytes);
        }
    }

    fn state(&self) -> Vec<String> {
        let mut lines = vec![format!("{} backups", self.sim.running())];
        for (target, _) in DISKS {
            self.sim.disk(target, |disk| {
                let line = |(name, (records, _)): (&String, &(bool, Vec<bool>))| {
                    format!("bitmap {target}/{name} recording={records}")
                };
                lines.extend(disk.bitmaps.iter().map(line));
            });
        }
        lines
    }

    fn end_domain(&mut self, killed: bool) {
        self.sim.power_off(killed);
    }

    fn start_domain(&mut self) {
        self.sim.power_on();
    }

    fn hang(&self, hung: bool) {
        match hung {
            true => self.sim.hang(),
            false => self.sim.revive(),
        }
    }

    fn resize(&self, target: &str, size: u64) {
        let size = usize::try_from(size).unwrap();
        self.sim.disk(target, |disk| {
            disk.data.resize(size, 0);
            for (_, dirty) in disk.bitmaps.values_mut() {
                dirty.resize(size.div_ceil(GRANULE), false);
            }
        });
    }

    fn intrude(&mut self, there: bool) {
        self.intruder = there;
        match there {
            true => self.sim.fail_next("begin", Kind::Busy),
            // Nothing is called this: what was to fail no longer is.
            false => self.sim.fail_next("", Kind::Busy),
        }
    }

    fn dir(&self) -> PathBuf {
        self.dir.path().to_owned()
    }

    fn let_pushes_end(&self) {
        self.sim.finish_pushes(None);
    }
}

impl Drop for SimWorld {
    fn drop(&mut self) {
        if let Some(mounted) = self.mounted.take() {
            // A test that failed; what it says is enough.
            let _ = mounted.shut_down();
        }
    }
}
