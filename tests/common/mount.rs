//! A fleecefs mount: the built command, in directories of its own.

use std::ffi::CString;
use std::fs::File;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use super::process;
use super::tools::{DEADLINE, eventually, temp_dir, text};
use super::tree::Tree;

/// The command under test.
pub const FLEECEFS: &str = env!("CARGO_BIN_EXE_fleecefs");

/// The directories that outlive a mount: give them to the next one to restart fleecefs.
pub struct Home {
    dir: tempfile::TempDir,
}

impl Home {
    /// New and empty ones: `mnt`, `state`, `runtime`, `scratch`.
    pub fn new() -> Self {
        let home = Self { dir: temp_dir() };
        for name in ["mnt", "state", "runtime", "scratch"] {
            std::fs::create_dir(home.path(name)).unwrap();
        }
        home
    }

    /// A path inside.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Everything in the runtime and scratch directories: must be nothing after an end.
    pub fn leftovers(&self) -> Vec<PathBuf> {
        fn walk(dir: &Path, found: &mut Vec<PathBuf>) {
            for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
                found.push(entry.path());
                if entry.file_type().is_ok_and(|t| t.is_dir()) {
                    walk(&entry.path(), found);
                }
            }
        }
        let mut found = Vec::new();
        walk(&self.path("runtime"), &mut found);
        walk(&self.path("scratch"), &mut found);
        found
    }

    /// Processes that have one of the directories on their command line.
    pub fn processes(&self) -> Vec<(u32, String)> {
        process::naming(self.dir.path())
    }

    /// Is `mnt` a mount point? Reads mountinfo, since touching a dead mount would hang.
    pub fn mounted(&self) -> bool {
        let mount = self.path("mnt");
        let info = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        info.lines()
            .any(|line| line.split(' ').nth(4) == Some(text(&mount)))
    }

    /// Fails unless nothing is mounted, running or lying about.
    pub fn assert_clean(&self) {
        eventually("the mount's end", DEADLINE, || {
            (!self.mounted() && self.processes().is_empty()).then_some(())
        });
        let found = self.leftovers();
        assert!(found.is_empty(), "left behind: {found:?}");
    }
}

impl Default for Home {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        // Never a look inside the mount here: it may be dead.
        for (pid, _) in self.processes() {
            process::signal(pid, libc::SIGKILL);
        }
        let mount = CString::new(text(&self.path("mnt"))).unwrap();
        while self.mounted() {
            // SAFETY: the string outlives the call.
            if unsafe { libc::umount2(mount.as_ptr(), libc::MNT_DETACH) } != 0 {
                eprintln!("cannot unmount {mount:?}");
                break;
            }
        }
    }
}

/// How to mount.
pub struct Builder {
    sources: Vec<String>,
    options: Vec<String>,
    daemon: bool,
    home: Option<Home>,
    env: Vec<(String, String)>,
    /// Other users are let through to the directories.
    passable: bool,
}

/// Why it did not mount.
#[derive(Debug)]
pub struct Refused {
    /// How the command ended.
    pub status: ExitStatus,
    /// What it said.
    pub stderr: String,
}

impl Builder {
    /// One more image.
    pub fn source(mut self, source: &str) -> Self {
        self.sources.push(source.into());
        self
    }

    /// `-o KEY=VALUE` or `-o KEY`, in place of an earlier one of that key.
    pub fn option(mut self, option: &str) -> Self {
        let key = |option: &str| option.split('=').next().map(str::to_owned);
        self.options.retain(|o| key(o) != key(option));
        self.options.push(option.into());
        self
    }

    /// Without `-f`.
    pub fn daemon(mut self) -> Self {
        self.daemon = true;
        self
    }

    /// In the directories of an earlier mount.
    pub fn home(mut self, home: Home) -> Self {
        self.home = Some(home);
        self
    }

    /// A variable of the environment.
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.env.push((name.into(), value.into()));
        self
    }

    /// Mounts; fails the test when that is refused.
    pub fn mount(self) -> Fleecefs {
        let refused = match self.try_mount() {
            Ok(mount) => return mount,
            Err((refused, _)) => refused,
        };
        panic!("{}: {}", refused.status, refused.stderr);
    }

    /// Mounts and waits until it is usable. Of a refusal the directories come back too.
    pub fn try_mount(self) -> Result<Fleecefs, (Refused, Home)> {
        let home = self.home.unwrap_or_default();
        if self.passable {
            // QEMU is another user, and has to get through to its sockets and files.
            let passable = std::fs::Permissions::from_mode(0o711);
            for name in ["", "runtime", "scratch"] {
                std::fs::set_permissions(home.path(name), passable.clone()).unwrap();
            }
        }
        let stderr = home.path("stderr");
        let mut command = Command::new(FLEECEFS);
        command.arg("mount");
        if !self.daemon {
            command.arg("-f");
        }
        for name in ["state", "runtime", "scratch"] {
            // One that the test set itself stands.
            let key = format!("{name}=");
            if !self.options.iter().any(|o| o.starts_with(&key)) {
                command.args(["-o", &(key + text(&home.path(name)))]);
            }
        }
        for option in &self.options {
            command.args(["-o", option]);
        }
        let child = command
            .args(&self.sources)
            .arg(home.path("mnt"))
            .envs(self.env)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            // A file and no pipe: a daemon keeps it open.
            .stderr(File::create(&stderr).unwrap())
            .spawn()
            .unwrap();
        let mut mount = Fleecefs {
            child,
            daemon: self.daemon,
            tree: Tree::at(&home.path("mnt")),
            home: Some(home),
        };
        let ended = eventually("the mount", DEADLINE, || {
            let ended = mount.child.try_wait().unwrap();
            if ended.is_some() || (!self.daemon && mount.home().mounted()) {
                return Some(ended);
            }
            None
        });
        match ended {
            None => Ok(mount),
            Some(status) if self.daemon && status.success() => {
                assert!(
                    mount.home().mounted(),
                    "the daemon's parent came back early"
                );
                Ok(mount)
            }
            Some(status) => {
                let stderr = mount.stderr();
                let home = mount.home.take().unwrap();
                Err((Refused { status, stderr }, home))
            }
        }
    }
}

/// A mount. Dropped, it is ended and unmounted whatever its state is.
pub struct Fleecefs {
    child: Child,
    daemon: bool,
    home: Option<Home>,
    tree: Tree,
}

impl std::ops::Deref for Fleecefs {
    type Target = Tree;

    fn deref(&self) -> &Tree {
        &self.tree
    }
}

impl Fleecefs {
    /// How to mount: `disk.qcow2` or `qmp:/path`.
    pub fn source(source: &str) -> Builder {
        Builder {
            sources: vec![source.into()],
            options: Vec::new(),
            daemon: false,
            home: None,
            env: Vec::new(),
            passable: false,
        }
    }

    /// A running QEMU, by its monitor's socket.
    pub fn qmp(socket: &Path) -> Builder {
        Self::source(&format!("qmp:{}", text(socket)))
    }

    /// The domain `vm` of a libvirtd of the test's own.
    pub fn libvirt(uri: &str) -> Builder {
        let mut builder = Self::source("libvirt:vm")
            .option(&format!("uri={uri}"))
            .option("timeout=20");
        builder.passable = true;
        builder
    }

    /// Its directories.
    pub fn home(&self) -> &Home {
        self.home.as_ref().expect("taken by umount only")
    }

    /// What is mounted.
    pub fn tree(&self) -> &Tree {
        &self.tree
    }

    /// What it said so far.
    pub fn stderr(&self) -> String {
        std::fs::read_to_string(self.home().path("stderr")).unwrap_or_default()
    }

    /// The process that serves the mount.
    pub fn pid(&self) -> u32 {
        if !self.daemon {
            return self.child.id();
        }
        let serves = |(_, line): &(u32, String)| line.contains("fleecefs mount");
        let found = self.home().processes().into_iter().find(serves);
        found.expect("a daemon that serves the mount").0
    }

    /// `fleecefs umount`, and waits for the end: directories, for a look or the next mount.
    pub fn umount(mut self) -> Home {
        let status = Command::new(FLEECEFS)
            .arg("umount")
            .arg(self.path(""))
            .status()
            .unwrap();
        assert!(status.success(), "umount: {status}: {}", self.stderr());
        self.gone()
    }

    /// Waits for the end that something else has begun.
    pub fn wait_end(mut self) -> Home {
        self.gone()
    }

    /// SIGTERM, and waits for the end.
    pub fn sigterm(mut self) -> Home {
        process::signal(self.pid(), libc::SIGTERM);
        self.gone()
    }

    /// SIGKILL; what is left of the mount point is detached, nothing else.
    pub fn sigkill(mut self) -> Home {
        let pid = self.pid();
        process::signal(pid, libc::SIGKILL);
        let _ = self.child.wait();
        eventually("SIGKILL", DEADLINE, || (!process::alive(pid)).then_some(()));
        let mount = CString::new(text(&self.home().path("mnt"))).unwrap();
        if self.home().mounted() {
            // SAFETY: the string outlives the call.
            unsafe { libc::umount2(mount.as_ptr(), libc::MNT_DETACH) };
        }
        self.home.take().unwrap()
    }

    fn gone(&mut self) -> Home {
        if !self.daemon {
            let status = process::wait(&mut self.child, DEADLINE).expect("fleecefs ends");
            assert!(status.success(), "{status}: {}", self.stderr());
        }
        let home = self.home.take().unwrap();
        eventually("the mount's end", DEADLINE, || {
            let served = |(_, line): &(u32, String)| line.contains("fleecefs mount");
            (!home.mounted() && !home.processes().iter().any(served)).then_some(())
        });
        home
    }
}

impl Drop for Fleecefs {
    fn drop(&mut self) {
        if let Some(home) = &self.home {
            if std::thread::panicking() {
                eprintln!("fleecefs said: {}", self.stderr());
            }
            // Time to end what it has in QEMU; then Home's drop takes the rest away.
            if self.daemon {
                for (pid, _) in home.processes() {
                    process::signal(pid, libc::SIGTERM);
                }
                let end = std::time::Instant::now() + Duration::from_secs(10);
                while !home.processes().is_empty() && std::time::Instant::now() < end {
                    std::thread::sleep(Duration::from_millis(10));
                }
            } else {
                process::end(&mut self.child, Duration::from_secs(10));
            }
        }
    }
}
