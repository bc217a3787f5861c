//! A real QEMU: SeaBIOS only, or the Linux guest of tests/guest.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use serde_json::{Value, json};

use super::console::Console;
use super::model::Write;
use super::process;
use super::qmp::Qmp;
use super::tools::{DEADLINE, find, skip, temp_dir, text};

/// What a QEMU is to be started with.
#[derive(Clone, Default)]
pub struct Builder {
    disks: Vec<(String, PathBuf, String)>,
    iothread: bool,
    slow: bool,
    paused: bool,
    guest: Option<(PathBuf, String)>,
    user: Option<u32>,
    extra: Vec<String>,
}

impl Builder {
    /// A disk: its target (`vda`; its block node is then `node-vda`), image and format.
    pub fn disk(mut self, target: &str, path: &Path, format: &str) -> Self {
        self.disks
            .push((target.into(), path.to_owned(), format.into()));
        self
    }

    /// Lets the disks' requests run in a thread of their own. Where [`iothread_writes`] says no,
    /// leave the disks alone then, or take another QEMU.
    pub fn iothread(mut self) -> Self {
        self.iothread = true;
        self
    }

    /// Lets the images be read at 8 MiB a second, so that what copies them is still at it when a test
    /// looks. Writes are not held up.
    pub fn slow(mut self) -> Self {
        self.slow = true;
        self
    }

    /// Does not let the CPU run (`-S`).
    pub fn paused(mut self) -> Self {
        self.paused = true;
        self
    }

    /// Boots Linux; `files` as from [`linux`], `append` such as `fleece=writer`.
    pub fn linux(mut self, files: &Path, append: &str) -> Self {
        self.guest = Some((files.to_owned(), append.into()));
        self
    }

    /// Runs QEMU as another user, who then owns the images; needs root. The images' directory must
    /// let that user through.
    pub fn user(mut self, uid: u32) -> Self {
        self.user = Some(uid);
        self
    }

    /// More of QEMU's arguments.
    pub fn args(mut self, args: &[&str]) -> Self {
        self.extra.extend(args.iter().map(|a| (*a).to_owned()));
        self
    }

    /// Starts it and waits for its monitor, and with Linux connects the console.
    pub fn start(self) -> Qemu {
        Qemu::start(self)
    }
}

/// The directory with the Linux guest, built where needed; `None` when the test is to be skipped.
pub fn linux() -> Option<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let files = std::env::var_os("FLEECEFS_CACHE")
        .map_or_else(|| root.join("tests/.cache"), PathBuf::from)
        .join("guest");
    let built = Command::new(root.join("tests/guest/build"))
        .arg(&files)
        .status();
    if built.is_ok_and(|status| status.success()) {
        return Some(files);
    }
    skip("the Linux guest could not be built");
    None
}

/// Can [`Qemu::write`] write to a disk that has an iothread? In QEMU 7.2 that aborts QEMU, with
/// `in_aio_context_home_thread` in HMP's qemu-io; a guest's own writes are not affected.
pub fn iothread_writes() -> bool {
    let said = super::tools::run("qemu-system-x86_64", &["--version"]);
    !said.contains("version 7.")
}

/// Is it a QEMU whose snapshot-access shows newer data than it should?
pub fn is_before_8() -> bool {
    !iothread_writes()
}

/// Is it a QEMU that does not tell whether an image is its own to write?
pub fn is_before_10() -> bool {
    let said = super::tools::run("qemu-system-x86_64", &["--version"]);
    ["7.", "8.", "9."]
        .iter()
        .any(|v| said.contains(&format!("version {v}")))
}

/// A running QEMU. Dropped, it is ended and its directory removed.
pub struct Qemu {
    child: Child,
    ctl: Mutex<Qmp>,
    console: Option<Console>,
    stdout: Mutex<File>,
    dir: tempfile::TempDir,
}

impl Qemu {
    /// What it is to be started with.
    pub fn build() -> Builder {
        Builder::default()
    }

    fn start(how: Builder) -> Self {
        let dir = temp_dir();
        let at = |name: &str| dir.path().join(name);
        let mut args: Vec<String> = Vec::new();
        let mut arg = |words: &str| args.extend(words.split(' ').map(str::to_owned));

        arg("-nodefaults -no-user-config -display none -machine pc -S");
        if let Some(data) = std::env::var_os("FLEECEFS_QEMU_DATA") {
            arg(&format!("-L {}", data.to_str().unwrap()));
        }
        for (id, socket) in [("ctl", "ctl.sock"), ("fleecefs", "qmp.sock")] {
            let path = at(socket);
            arg(&format!(
                "-chardev socket,id={id},path={},server=on,wait=off",
                text(&path)
            ));
            arg(&format!("-mon chardev={id},mode=control"));
        }
        let mut iothread = "";
        if how.iothread {
            arg("-object iothread,id=io0");
            iothread = ",iothread=io0";
        }
        let mut file = "file.driver=file,file.filename";
        if how.slow {
            arg("-object throttle-group,id=slow,x-bps-read=8388608");
            file = "file.driver=throttle,file.throttle-group=slow,file.file.driver=file,file.file.filename";
        }
        for (target, path, format) in &how.disks {
            arg(&format!(
                "-blockdev driver={format},node-name=node-{target},{file}={}",
                text(path)
            ));
            arg(&format!(
                "-device virtio-blk-pci,id={target},drive=node-{target}{iothread}"
            ));
        }
        if let Some((files, append)) = &how.guest {
            let accel = std::fs::read_to_string(files.join("accel")).unwrap();
            arg(accel.trim().replace('\n', " ").as_str());
            arg("-m 192");
            arg(&format!("-kernel {}", text(&files.join("vmlinuz"))));
            arg(&format!("-initrd {}", text(&files.join("initrd"))));
            arg(&format!(
                "-chardev socket,id=console,path={},server=on,wait=off -serial chardev:console",
                text(&at("console.sock"))
            ));
            args.push("-append".into());
            args.push(format!("console=ttyS0 quiet panic=-1 {append}"));
        } else {
            arg("-accel tcg,thread=single -m 16");
        }
        args.extend(how.extra.iter().cloned());

        // stdbuf, since QEMU's HMP qemu-io tells its result on standard output only, which in a
        // file would be buffered. Both wrappers exec, so the child's id is QEMU's.
        let qemu = find("qemu-system-x86_64").expect("qemu-system-x86_64");
        let mut wrapper: Vec<String> = vec!["stdbuf".into(), "-oL".into()];
        if let Some(uid) = how.user {
            let ids = format!("setpriv --reuid={uid} --regid={uid} --clear-groups --");
            wrapper.splice(0..0, ids.split(' ').map(str::to_owned));
            std::os::unix::fs::chown(dir.path(), Some(uid), Some(uid)).unwrap();
            for (_, path, _) in &how.disks {
                std::os::unix::fs::chown(path, Some(uid), Some(uid)).unwrap();
            }
        }
        let stdout = File::create_new(at("stdout")).unwrap();
        let child = Command::new(&wrapper[0])
            .args(&wrapper[1..])
            .arg(qemu)
            .args(&args)
            .stdin(Stdio::null())
            .stdout(stdout)
            .stderr(File::create_new(at("stderr")).unwrap())
            .spawn()
            .unwrap();
        // From here on a panic must not leave QEMU behind.
        let mut child = Reaper(Some(child), at("stderr"));
        let ctl = child.connect(&at("ctl.sock"));
        let console = how
            .guest
            .is_some()
            .then(|| Console::connect(&at("console.sock")));
        let qemu = Self {
            child: child.0.take().unwrap(),
            ctl: Mutex::new(ctl),
            console,
            stdout: Mutex::new(File::open(at("stdout")).unwrap()),
            dir,
        };
        if !how.paused {
            qemu.cmd("cont", json!({}));
        }
        qemu
    }

    /// The tests' own monitor.
    pub fn ctl(&self) -> MutexGuard<'_, Qmp> {
        self.ctl.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Runs a QMP command that must work.
    pub fn cmd(&self, execute: &str, arguments: Value) -> Value {
        self.ctl().cmd(execute, arguments)
    }

    /// The monitor that is fleecefs' own: `qmp:` and this path is a source.
    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("qmp.sock")
    }

    /// The directory of its sockets, gone with it.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// The process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Linux' console.
    pub fn console(&mut self) -> &mut Console {
        self.console.as_mut().expect("Builder::linux")
    }

    /// What QEMU complained about.
    pub fn stderr(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("stderr")).unwrap()
    }

    /// Runs a qemu-io command on a disk as if the guest did it: what it said.
    fn guest_io(&self, target: &str, command: &str) -> String {
        let line = format!("qemu-io -d /machine/peripheral/{target}/virtio-backend \"{command}\"");
        let mut ctl = self.ctl();
        let mut stdout = self.stdout.lock().unwrap_or_else(|e| e.into_inner());
        stdout.seek(SeekFrom::End(0)).unwrap();
        let hmp = ctl.cmd("human-monitor-command", json!({"command-line": line}));
        let mut said = hmp.as_str().unwrap_or_default().to_owned();
        stdout.read_to_string(&mut said).unwrap();
        said
    }

    /// A guest's write, or why it failed. Zeros are written as such, and unmap.
    pub fn try_guest_write(&self, target: &str, write: Write) -> Result<(), String> {
        let Write {
            offset,
            length,
            pattern,
        } = write;
        let how = if pattern == 0 {
            "-z -u".to_owned()
        } else {
            format!("-P {pattern}")
        };
        let said = self.guest_io(target, &format!("write {how} {offset} {length}"));
        if said.contains(&format!("wrote {length}/{length} bytes at offset {offset}")) {
            Ok(())
        } else {
            Err(said)
        }
    }

    /// A guest's write that must work.
    pub fn write(&self, target: &str, write: Write) {
        self.try_guest_write(target, write)
            .unwrap_or_else(|e| panic!("{target}: {write:?}: {e:?}"));
    }

    /// Writes one byte over and over.
    pub fn guest_write(&self, target: &str, offset: u64, length: u64, pattern: u8) {
        assert_ne!(pattern, 0, "that is guest_zero");
        self.write(
            target,
            Write {
                offset,
                length,
                pattern,
            },
        );
    }

    /// Writes zeros, unmapping.
    pub fn guest_zero(&self, target: &str, offset: u64, length: u64) {
        self.write(
            target,
            Write {
                offset,
                length,
                pattern: 0,
            },
        );
    }

    /// Does a disk hold one byte over and over, as the guest sees it?
    pub fn guest_reads(&self, target: &str, offset: u64, length: u64, pattern: u8) -> bool {
        let said = self.guest_io(target, &format!("read -P {pattern} {offset} {length}"));
        assert!(
            said.contains(&format!("read {length}/{length} bytes")),
            "{said}"
        );
        !said.contains("Pattern verification failed")
    }

    /// Everything that a backup could leave behind; compare before and after.
    pub fn state(&self) -> State {
        let mut ctl = self.ctl();
        let ask = |(execute, arguments): &(&str, Value)| ctl.cmd(execute, arguments.clone());
        State::of(&State::questions().iter().map(ask).collect::<Vec<_>>())
    }

    /// Bytes dirty in a bitmap of `node-<target>`, if there is one of that name.
    pub fn dirty_bytes(&self, target: &str, bitmap: &str) -> Option<u64> {
        let nodes = self.cmd("query-named-block-nodes", json!({"flat": true}));
        let nodes = nodes.as_array()?;
        let node = nodes
            .iter()
            .find(|n| n["node-name"] == format!("node-{target}"))?;
        let bitmaps = node["dirty-bitmaps"].as_array()?;
        bitmaps.iter().find(|b| b["name"] == bitmap)?["count"].as_u64()
    }

    /// Does QEMU's one NBD server run? Nothing tells; only starting it does.
    pub fn nbd_server_running(&self) -> bool {
        let path = self.dir.path().join("probe.sock");
        let address = json!({"type": "unix", "data": {"path": text(&path)}});
        let mut ctl = self.ctl();
        match ctl.try_cmd("nbd-server-start", json!({"addr": address})) {
            Ok(_) => {
                ctl.cmd("nbd-server-stop", json!({}));
                false
            }
            Err(why) => {
                assert!(why.contains("already running"), "{why}");
                true
            }
        }
    }

    /// `running`, `paused`, `io-error`, …
    pub fn status(&self) -> String {
        let status = self.cmd("query-status", json!({}));
        status["status"].as_str().unwrap().to_owned()
    }

    /// QMP `quit`: bitmaps are saved.
    pub fn quit(mut self) {
        self.cmd("quit", json!({}));
        let status = process::wait(&mut self.child, DEADLINE).expect("QEMU quits");
        assert!(status.success(), "QEMU: {status}: {}", self.stderr());
    }

    /// SIGKILL: nothing is saved.
    pub fn kill9(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Waits until it is gone by itself, as after the guest's `poweroff`.
    pub fn wait(mut self, deadline: Duration) -> ExitStatus {
        process::wait(&mut self.child, deadline).expect("QEMU ends")
    }

    /// SIGSTOP: a QEMU that does not answer, until [`thaw`](Self::thaw).
    pub fn freeze(&self) {
        process::signal(self.pid(), libc::SIGSTOP);
    }

    /// SIGCONT.
    pub fn thaw(&self) {
        process::signal(self.pid(), libc::SIGCONT);
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        self.thaw();
        process::end(&mut self.child, Duration::from_secs(5));
        if std::thread::panicking() {
            eprintln!("QEMU said: {}", self.stderr());
        }
    }
}

/// A QEMU whose start is not over.
struct Reaper(Option<Child>, PathBuf);

impl Reaper {
    fn connect(&mut self, socket: &Path) -> Qmp {
        super::tools::eventually("QEMU's monitor", DEADLINE, || {
            if let Ok(Some(status)) = self.0.as_mut().unwrap().try_wait() {
                panic!("QEMU did not start: {status}");
            }
            std::os::unix::net::UnixStream::connect(socket)
                .is_ok()
                .then_some(())
        });
        Qmp::connect(socket)
    }
}

impl Drop for Reaper {
    fn drop(&mut self) {
        if let Some(child) = &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
            eprintln!(
                "QEMU said: {}",
                std::fs::read_to_string(&self.1).unwrap_or_default()
            );
        }
    }
}

/// Block nodes with their bitmaps, jobs, exports, objects and run state: sorted lines, so that a
/// failed comparison shows what is left over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct State(pub Vec<String>);

impl State {
    /// The QMP commands that it takes to know.
    pub fn questions() -> [(&'static str, Value); 5] {
        [
            ("query-named-block-nodes", json!({"flat": true})),
            ("query-jobs", json!({})),
            ("query-block-exports", json!({})),
            ("qom-list", json!({"path": "/objects"})),
            ("query-status", json!({})),
        ]
    }

    /// What they were answered.
    pub fn of(answers: &[Value]) -> Self {
        let [nodes, jobs, exports, objects, status] = answers else {
            panic!("an answer for each question");
        };
        let word = |value: &Value| value.as_str().unwrap_or("?").to_owned();
        let mut lines = Vec::new();
        let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
        for node in list(nodes) {
            let mut name = word(&node["node-name"]);
            if name.starts_with('#') {
                name = "#".into(); // QEMU's own names are numbered
            }
            let (driver, threshold) = (word(&node["drv"]), &node["write_threshold"]);
            let ro = if node["ro"] == true { " ro" } else { "" };
            lines.push(format!("node {name} {driver}{ro} threshold={threshold}"));
            for bitmap in list(&node["dirty-bitmaps"]) {
                let mut line = format!("bitmap {name}/{}", word(&bitmap["name"]));
                for flag in ["recording", "persistent", "busy", "inconsistent"] {
                    if bitmap[flag] == true {
                        line = line + " " + flag;
                    }
                }
                lines.push(format!("{line} granularity={}", bitmap["granularity"]));
            }
        }
        for job in list(jobs) {
            lines.push(format!("job {} {}", word(&job["id"]), word(&job["type"])));
        }
        for export in list(exports) {
            let (id, node) = (word(&export["id"]), word(&export["node-name"]));
            lines.push(format!("export {id} of {node}"));
        }
        for object in list(objects) {
            lines.push(format!("object {}", word(&object["name"])));
        }
        lines.push(format!("status {}", word(&status["status"])));
        lines.sort();
        Self(lines)
    }

    /// The same without bitmaps: for before and after an operation that makes some.
    pub fn without_bitmaps(mut self) -> Self {
        self.0.retain(|line| !line.starts_with("bitmap "));
        self
    }
}
