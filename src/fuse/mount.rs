//! mount(2) and umount(2), or fusermount3 for those who may not.

use std::ffi::CString;
use std::fs::File;
use std::io::{self, IoSliceMut, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};

use super::mountinfo;
use crate::model::{Error, Kind, Result};

/// How long anything that should be immediate may take.
const DEADLINE: Duration = Duration::from_secs(10);

/// What was found on a directory before mounting.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Heal {
    /// Nothing of ours.
    Clean(PathBuf),
    /// A mount whose fleecefs was killed; it was taken away.
    Healed(PathBuf),
}

impl Heal {
    /// The canonical path of the directory.
    pub fn into_path(self) -> PathBuf {
        match self {
            Self::Clean(path) | Self::Healed(path) => path,
        }
    }
}

/// Checks that `dir` can be mounted on. What a killed fleecefs left mounted there is unmounted; one
/// that lives is EBUSY.
pub fn heal(dir: &Path) -> Result<Heal> {
    let shown = dir.display();
    let canonical = mountinfo::canonical(dir).map_err(|e| {
        let kind = match e.kind() {
            io::ErrorKind::NotFound => Kind::NotFound,
            _ => Kind::Io,
        };
        Error::new(kind, format!("cannot use {shown} as mount point: {e}"))
    })?;
    let mut healed = false;
    // A stale mount may cover another.
    while mountinfo::at(&canonical).is_some_and(|m| m.kind == mountinfo::TYPE) {
        match answers(&canonical) {
            Some(Err(e)) if e.raw_os_error() == Some(Errno::NOTCONN.raw_os_error()) => {}
            Some(_) => {
                return Err(Error::new(
                    Kind::Busy,
                    format!("{shown} is a mounted fleecefs already"),
                )
                .hint(format!("unmount it first: fleecefs umount {shown}")));
            }
            None => {
                return Err(Error::new(
                    Kind::TimedOut,
                    format!("{shown} is a mounted fleecefs that does not answer"),
                )
                .hint("look at its log; kill it, and mount again"));
            }
        }
        unmount(&canonical, true).map_err(|e| {
            Error::new(
                Kind::Io,
                format!("cannot unmount what a killed fleecefs left on {shown}: {e}"),
            )
        })?;
        log::warn!("unmounted what a killed fleecefs had left on {shown}");
        healed = true;
    }
    match std::fs::metadata(&canonical) {
        Ok(m) if m.is_dir() => {}
        Ok(_) => {
            return Err(Error::new(
                Kind::NotADirectory,
                format!("{shown} is not a directory"),
            ));
        }
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            return Err(
                Error::new(Kind::NotFound, format!("{shown} does not exist"))
                    .hint(format!("make it: mkdir {shown}")),
            );
        }
        Err(e) => {
            return Err(Error::new(
                Kind::Io,
                format!("cannot use {shown} as mount point: {e}"),
            ));
        }
    }
    Ok(match healed {
        true => Heal::Healed(canonical),
        false => Heal::Clean(canonical),
    })
}

/// stat(2) with a deadline; `None` when there is no answer by then.
pub fn answers(path: &Path) -> Option<io::Result<()>> {
    let (sender, receiver) = crossbeam_channel::bounded(1);
    let path = path.to_owned();
    let look = move || {
        let _ = sender.send(std::fs::metadata(path).map(drop));
    };
    std::thread::Builder::new()
        .name("look".to_owned())
        .spawn(look)
        .ok()?;
    receiver.recv_timeout(DEADLINE).ok()
}

/// Mounts on `dir` and returns the connection to the kernel.
pub(super) fn attach(dir: &Path, source: &str, allow_other: bool) -> Result<OwnedFd> {
    match attach_directly(dir, source, allow_other) {
        Err(Errno::PERM) => attach_by_fusermount(dir, source, allow_other),
        Err(e) => Err(refused(dir, &io::Error::from(e).to_string())),
        Ok(fd) => Ok(fd),
    }
}

fn attach_directly(dir: &Path, source: &str, allow_other: bool) -> rustix::io::Result<OwnedFd> {
    let device = match File::options().read(true).write(true).open("/dev/fuse") {
        Ok(device) => device,
        // Without the right to open it one has no right to mount either.
        Err(e) if e.kind() == io::ErrorKind::PermissionDenied => return Err(Errno::PERM),
        Err(e) => return Err(Errno::from_io_error(&e).unwrap_or(Errno::IO)),
    };
    let mut data = format!(
        "fd={},rootmode=40000,user_id={},group_id={},default_permissions",
        device.as_raw_fd(),
        rustix::process::getuid().as_raw(),
        rustix::process::getgid().as_raw(),
    );
    if allow_other {
        data.push_str(",allow_other");
    }
    let data = CString::new(data).map_err(|_| Errno::INVAL)?;
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    rustix::mount::mount(source, dir, mountinfo::TYPE, flags, data.as_c_str())?;
    Ok(device.into())
}

/// fusermount3 mounts for us and sends the connection over a socket, which it gets as its stdin.
fn attach_by_fusermount(dir: &Path, source: &str, allow_other: bool) -> Result<OwnedFd> {
    let failed = |e: io::Error| refused(dir, &e.to_string());
    let (ours, theirs) = UnixStream::pair().map_err(failed)?;
    ours.set_read_timeout(Some(DEADLINE)).map_err(failed)?;
    // A comma would begin another option.
    let source = source.replace([',', '\\'], "_");
    let mut options =
        format!("fsname={source},subtype=fleecefs,nosuid,nodev,noexec,default_permissions");
    if allow_other {
        options.push_str(",allow_other");
    }
    let mut child = Command::new("fusermount3")
        .args(["-o", &options, "--"])
        .arg(dir)
        .env("_FUSE_COMMFD", "0")
        .env("LC_ALL", "C")
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|e| refused(dir, &format!("cannot run fusermount3: {e}")))?;
    let received = receive(&ours);
    if received.is_err() {
        let _ = child.kill();
    }
    let mut said = String::new();
    if let Some(mut stderr) = child.stderr.take() {
        let _ = stderr.read_to_string(&mut said);
    }
    let _ = child.wait();
    match received {
        Ok(Some(fd)) => Ok(fd),
        Ok(None) | Err(_) => Err(refused(dir, said.trim())),
    }
}

fn receive(socket: &UnixStream) -> rustix::io::Result<Option<OwnedFd>> {
    let mut byte = [0];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    recvmsg(
        socket,
        &mut [IoSliceMut::new(&mut byte)],
        &mut control,
        RecvFlags::CMSG_CLOEXEC,
    )?;
    let mut fds = control.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    });
    Ok(fds.next())
}

fn refused(dir: &Path, why: &str) -> Error {
    let error = Error::new(
        Kind::Io,
        format!("cannot mount on {}: {why}", dir.display()),
    );
    if why.contains("user_allow_other") {
        error.hint("add user_allow_other to /etc/fuse.conf, or leave allow_other off")
    } else if !Path::new("/dev/fuse").exists() {
        error.hint("there is no /dev/fuse: modprobe fuse, or give it to the container")
    } else {
        error
    }
}

/// Unmounts `dir`; `lazily` also while it is in use.
pub fn unmount(dir: &Path, lazily: bool) -> io::Result<()> {
    let mut flags = UnmountFlags::NOFOLLOW;
    if lazily {
        flags |= UnmountFlags::DETACH;
    }
    match rustix::mount::unmount(dir, flags) {
        Err(Errno::PERM) => {}
        result => return Ok(result?),
    }
    let output = Command::new("fusermount3")
        .args(["-u", "-q"])
        .args(lazily.then_some("-z"))
        .arg("--")
        .arg(dir)
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .output()?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    // With -q it says nothing when the mount is busy.
    if said.is_empty() || said.contains("busy") {
        return Err(Errno::BUSY.into());
    }
    Err(io::Error::other(said))
}
