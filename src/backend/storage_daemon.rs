//! Images of a stopped domain: a private `qemu-storage-daemon` opens them, and is then a QEMU like
//! any other.
//!
//! The daemon holds QEMU's lock on each image, so no domain can start on it meanwhile, and keeps
//! the images' dirty bitmaps as a domain would. It is told to quit, and gets SIGTERM should
//! fleecefs be killed: both save the bitmaps; only SIGKILL loses them.

use std::fs::{self, File};
use std::io::{self, ErrorKind, Read};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::qemu::{self, Link, Qemu, Roots};
use super::rundir::{self, RunDir};
use super::source::Places;
use crate::model::{DomainInfo, Error, Kind, Result};

/// The program, from QEMU's own tools.
const PROGRAM: &str = "qemu-storage-daemon";

/// What a qcow2 image begins with.
const QCOW2_MAGIC: &[u8; 4] = b"QFI\xfb";

/// How long a daemon with no image open may take to quit before it is killed.
const QUIT_TIMEOUT: Duration = Duration::from_secs(2);

/// How long to wait for a daemon that has to close its images by itself.
const DROP_TIMEOUT: Duration = Duration::from_secs(10);

/// The private process.
pub(super) struct Daemon {
    child: Child,
    /// The images that are open in it.
    nodes: Vec<String>,
}

/// An image to open.
pub(super) struct Wanted {
    pub(super) target: String,
    pub(super) path: PathBuf,
    /// Its format, where it is not to be told from the content.
    pub(super) format: Option<String>,
    /// Nothing is to be written to it, no bitmap either.
    pub(super) read_only: bool,
}

/// Opens the images, in the order of the domain's disks: `vda`, `vdb` and so on.
pub(super) fn open(images: &[PathBuf], places: &Places) -> Result<Qemu> {
    let wanted: Vec<Wanted> = images
        .iter()
        .enumerate()
        .map(|(index, path)| Wanted {
            target: target(index),
            path: path.clone(),
            format: places.format.clone(),
            read_only: false,
        })
        .collect();
    let images = inspect(&wanted)?;
    let Some(first) = images.first() else {
        return Err(Error::new(Kind::Invalid, "no image given"));
    };
    let stem = first.path.file_stem().unwrap_or_default();
    let info = DomainInfo {
        name: match &places.domain {
            Some(name) => name.clone(),
            None => stem.to_string_lossy().into_owned(),
        },
        uuid: None,
        key: match &places.domain {
            Some(name) => qemu::file_name(name),
            None => qemu::path_name(&first.path),
        },
    };
    serve(images, info, places)
}

/// Opens images of a domain that somebody else describes.
#[cfg(feature = "libvirt")]
pub(super) fn open_images(wanted: &[Wanted], info: DomainInfo, places: &Places) -> Result<Qemu> {
    serve(inspect(wanted)?, info, places)
}

fn inspect(wanted: &[Wanted]) -> Result<Vec<Image>> {
    wanted.iter().map(Image::inspect).collect()
}

fn serve(images: Vec<Image>, info: DomainInfo, places: &Places) -> Result<Qemu> {
    wait_for_the_dead(&images, places);

    let rundir = RunDir::create(&places.runtime)?;
    let (mut daemon, socket) = Daemon::start(&rundir)?;
    let log = rundir.path().join("daemon.log");
    // It greets when it is up, and a machine may be slow to start it; nobody else can hold it.
    let link = Link::open(socket, places.timeout, places.timeout).map_err(|e| {
        let said = fs::read_to_string(&log).unwrap_or_default();
        let why = match said.lines().last() {
            Some(line) => line.to_owned(),
            None => e.to_string(),
        };
        Error::new(Kind::Io, format!("{PROGRAM} did not start: {why}"))
    })?;
    let mut roots = Vec::new();
    for (index, image) in images.into_iter().enumerate() {
        let node = format!("disk{index}");
        daemon.nodes.push(node.clone());
        if let Err(e) = image.add(&link, &node) {
            // Those that are open must be closed in good order, or their bitmaps are lost.
            if let Err(e) = daemon.quit(&link, places.timeout) {
                log::error!("{e}");
            }
            return Err(e);
        }
        roots.push((image.target, node));
    }
    Ok(Qemu::new(
        link,
        Roots::Nodes(roots),
        rundir,
        places,
        info,
        Some(daemon),
    ))
}

/// The target of the disk with this number, as libvirt counts virtio disks: vda … vdz, vdaa …
fn target(mut index: usize) -> String {
    let mut letters = Vec::new();
    loop {
        letters.push(b'a' + (index % 26) as u8);
        if index < 26 {
            break;
        }
        index = index / 26 - 1;
    }
    letters.reverse();
    format!("vd{}", String::from_utf8_lossy(&letters))
}

/// An image and how to open it.
struct Image {
    target: String,
    path: PathBuf,
    format: String,
    device: bool,
    read_only: bool,
}

impl Image {
    /// Looks at the file; the format is the given one, or is told from the content where that is safe.
    fn inspect(wanted: &Wanted) -> Result<Self> {
        let path = &wanted.path;
        let failed = |e: io::Error| {
            let kind = match e.kind() {
                ErrorKind::NotFound => Kind::NotFound,
                ErrorKind::PermissionDenied => Kind::NotPermitted,
                _ => Kind::Io,
            };
            Error::new(
                kind,
                format!("cannot open the image {}: {e}", path.display()),
            )
        };
        let path = path.canonicalize().map_err(failed)?;
        let kind = fs::metadata(&path).map_err(failed)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(Error::new(
                Kind::Invalid,
                format!("{} is neither a file nor a block device", path.display()),
            )
            .hint("for a running domain's monitor say qmp:PATH"));
        }
        let mut head = Vec::new();
        let mut file = File::open(&path).map_err(failed)?.take(4);
        file.read_to_end(&mut head).map_err(failed)?;
        let format = match &wanted.format {
            Some(format) => format.clone(),
            None => guess(&path, &head, kind.is_block_device())?.to_owned(),
        };
        Ok(Self {
            target: wanted.target.clone(),
            path,
            format,
            device: kind.is_block_device(),
            read_only: wanted.read_only,
        })
    }

    fn add(&self, link: &Link, node: &str) -> Result<()> {
        let protocol = if self.device { "host_device" } else { "file" };
        let options: Value = json!({
            "driver": self.format, "node-name": node,
            "read-only": self.read_only, "auto-read-only": !self.read_only,
            "file": {"driver": protocol, "filename": self.path.display().to_string()},
        });
        link.blockdev_add(options).map_err(|e| {
            let e = e.during(format!("image {}", self.path.display()));
            match e.kind() {
                Kind::Busy => e.hint(
                    "a running domain or another tool uses it: mount the domain's QMP socket with \
                     qmp:PATH, or stop it first",
                ),
                _ => e,
            }
        })
    }
}

/// The format by content. A raw disk's first bytes belong to the guest, which could write a qcow2
/// header there that names any file of the host as its backing file; so a qcow2 header counts only
/// where the name does not say raw and the disk is a file.
fn guess(path: &Path, head: &[u8], device: bool) -> Result<&'static str> {
    let extension = path.extension().and_then(|e| e.to_str()).unwrap_or("");
    let raw_by_name = device || matches!(extension, "raw" | "img" | "iso");
    match head == QCOW2_MAGIC {
        false => Ok("raw"),
        true if !raw_by_name => Ok("qcow2"),
        true => Err(Error::new(
            Kind::Invalid,
            format!(
                "{} is named like a raw disk and begins like a qcow2 image",
                path.display()
            ),
        )
        .hint("say which it is: -o format=qcow2, or -o format=raw")),
    }
}

impl Daemon {
    /// Starts the program and waits until its socket is there. (A socket passed to it, to which we
    /// connect at once, makes QEMU 10.0 spin now and then; `mux=on` garbles commands.)
    fn start(rundir: &RunDir) -> Result<(Self, PathBuf)> {
        let socket = rundir.path().join("qmp.sock");
        let failed = |e: io::Error| {
            let hint = match e.kind() {
                ErrorKind::NotFound => "install QEMU's tools (Debian: qemu-utils)",
                _ => "see the log",
            };
            Error::new(Kind::Io, format!("cannot start {PROGRAM}: {e}")).hint(hint)
        };
        let log = File::create(rundir.path().join("daemon.log")).map_err(failed)?;
        let mut command = Command::new(PROGRAM);
        command
            .args([
                "--chardev",
                &format!("socket,path={},server=on,wait=off,id=m", socket.display()),
            ])
            .args(["--monitor", "chardev=m,mode=control"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            // Ctrl-C in the terminal is for us; we tell it when to go.
            .process_group(0);
        // SAFETY: only async-signal-safe calls between fork and exec.
        unsafe {
            command.pre_exec(move || {
                // Should fleecefs be killed, the daemon still saves its bitmaps.
                if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGTERM) != 0 {
                    return Err(io::Error::last_os_error());
                }
                Ok(())
            });
        }
        let child = command.spawn().map_err(failed)?;
        let deadline = Instant::now() + DROP_TIMEOUT;
        while !socket.exists() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(5));
        }
        // Bound, and a moment later listening.
        std::thread::sleep(Duration::from_millis(20));
        // For the mount after a kill: see `wait_for_the_dead`.
        let _ = fs::write(rundir.path().join("daemon.pid"), child.id().to_string());
        let nodes = Vec::new();
        Ok((Self { child, nodes }, socket))
    }

    /// Lets it save its bitmaps and go. What may then hang is harmless: QEMU 10.0 now and then waits
    /// for ever for its monitor's thread to end, so with no image open any more it is killed.
    pub(super) fn quit(mut self, link: &Link, timeout: Duration) -> Result<()> {
        for node in std::mem::take(&mut self.nodes) {
            if let Err(e) = link.blockdev_del(&node) {
                self.nodes.push(node);
                return Err(e.hint(
                    "the storage daemon still holds the image; it gets SIGTERM and may take a while",
                ));
            }
        }
        let asked = link.quit();
        if !self.is_gone_within(timeout.min(QUIT_TIMEOUT)) {
            log::debug!("{PROGRAM} does not quit ({asked:?}); it has no image open and is killed");
        }
        Ok(())
    }

    /// Its end is not announced by anything that can be waited for with a deadline; it takes
    /// milliseconds, unless bitmaps are large.
    fn is_gone_within(&mut self, timeout: Duration) -> bool {
        let deadline = Instant::now() + timeout;
        loop {
            match self.child.try_wait() {
                Ok(None) if Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(5));
                }
                Ok(None) => return false,
                Ok(Some(_)) | Err(_) => return true,
            }
        }
    }
}

impl Drop for Daemon {
    /// SIGTERM saves the bitmaps, too. As long as an image is open it is never killed, since that
    /// would break the history of every checkpoint.
    fn drop(&mut self) {
        if self.is_gone_within(Duration::ZERO) {
            return;
        }
        if self.nodes.is_empty() {
            let _ = self.child.kill();
            let _ = self.child.wait();
            return;
        }
        // SAFETY: no pointers; the child was not waited for, so the pid is still its.
        unsafe { libc::kill(self.child.id() as i32, libc::SIGTERM) };
        self.is_gone_within(DROP_TIMEOUT);
    }
}

/// The daemon of a fleecefs that was killed may still be saving its bitmaps, and holds the images
/// until it has. One that has closed them and is still there hangs as [`Daemon::quit`] says.
fn wait_for_the_dead(images: &[Image], places: &Places) {
    for dir in rundir::dead(&places.runtime) {
        let Some(pid) = rundir::noted_pid(&dir, "daemon.pid") else {
            continue;
        };
        let command = format!("/proc/{pid}/comm");
        let is_daemon = || {
            rundir::is_running(pid)
                && fs::read_to_string(&command).is_ok_and(|c| PROGRAM.starts_with(c.trim()))
        };
        let wait_while = |condition: &dyn Fn() -> bool, timeout| {
            let deadline = Instant::now() + timeout;
            while condition() && Instant::now() < deadline {
                std::thread::sleep(Duration::from_millis(10));
            }
        };
        wait_while(&|| is_daemon() && holds_any(pid, images), places.timeout);
        if is_daemon() && !holds_any(pid, &[]) {
            log::warn!("ending the storage daemon {pid}, left by a killed fleecefs");
            // SAFETY: no pointers.
            unsafe { libc::kill(pid, libc::SIGKILL) };
            // Its directory is swept next, if it is gone by then.
            wait_while(&is_daemon, QUIT_TIMEOUT);
        }
    }
}

/// Whether a process has one of the images open; or, with no image given, any image at all.
fn holds_any(pid: i32, images: &[Image]) -> bool {
    let fds = fs::read_dir(format!("/proc/{pid}/fd"));
    let mut files = fds.into_iter().flatten().flatten();
    files.any(|fd| {
        let Ok(target) = fs::read_link(fd.path()) else {
            return false;
        };
        if !images.is_empty() {
            return images.iter().any(|image| image.path == target);
        }
        // Pipes, sockets and events are no paths; the log and /dev/null are no images.
        let is_log = target.to_string_lossy().contains("daemon.log");
        target.is_absolute() && !is_log && target != Path::new("/dev/null")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_count_like_libvirts() {
        let names: Vec<String> = [0, 1, 25, 26, 27, 701, 702].map(target).to_vec();
        assert_eq!(
            names,
            ["vda", "vdb", "vdz", "vdaa", "vdab", "vdzz", "vdaaa"]
        );
    }

    #[test]
    fn a_guest_cannot_choose_the_format() {
        let guessed = |name: &str, head: &[u8], device| {
            guess(Path::new(name), head, device).map_err(|e| e.kind())
        };
        assert_eq!(guessed("a.qcow2", QCOW2_MAGIC, false), Ok("qcow2"));
        assert_eq!(guessed("a", QCOW2_MAGIC, false), Ok("qcow2"));
        assert_eq!(guessed("a.img", b"\0\0\0\0", false), Ok("raw"));
        assert_eq!(guessed("a.qcow2", b"", false), Ok("raw"));
        for (name, device) in [("a.img", false), ("a.raw", false), ("/dev/vg/a", true)] {
            assert_eq!(guessed(name, QCOW2_MAGIC, device), Err(Kind::Invalid));
        }
    }
}
