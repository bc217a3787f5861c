//! `fleecefs umount`: returns when the daemon has cleaned up, not merely when the tree is gone.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::{Duration, Instant};

use crossbeam_channel::bounded;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use super::args::Umount;
use crate::fuse;
use crate::model::{Error, Kind, Result};

/// How long `status` may take to say who serves the mount.
const ANSWER: Duration = Duration::from_secs(5);
/// How long the daemon may take to notice by itself. A mount that was copied to another mount namespace,
/// such as that of a container or of a guest that libvirt started meanwhile, goes on there, and the
/// kernel tells the daemon nothing.
const NOTICING: Duration = Duration::from_secs(3);
/// How long the daemon may take to end all backups.
const CLEANING: Duration = Duration::from_secs(120);

pub(super) fn run(args: &Umount) -> Result<()> {
    let shown = args.dir.display();
    let failed = |e: std::io::Error| Error::new(Kind::Io, format!("cannot unmount {shown}: {e}"));
    let point = fuse::canonical(&args.dir).map_err(failed)?;
    let kind = fuse::mount_at(&point).map(|m| m.kind);
    if kind.as_deref() != Some(fuse::TYPE) {
        return Err(Error::new(
            Kind::Invalid,
            format!("{shown} is not a mounted fleecefs"),
        ));
    }
    let daemon = match status(&point) {
        // Nobody serves it any more: there is nothing to wait for.
        Some(Err(e)) if e.raw_os_error() == Some(rustix::io::Errno::NOTCONN.raw_os_error()) => {
            return fuse::unmount(&point, true).map_err(failed);
        }
        Some(Err(e)) => return Err(failed(e)),
        Some(Ok(text)) => daemon(&text),
        None => None,
    };
    match &daemon {
        // The daemon ends the backups, so that readers let go, and unmounts.
        Some((_, process)) if args.lazy => {
            pidfd_send_signal(process, Signal::TERM).map_err(|e| failed(e.into()))?;
        }
        _ => fuse::unmount(&point, args.lazy).map_err(|e| match e.kind() {
            std::io::ErrorKind::ResourceBusy => Error::new(
                Kind::Busy,
                format!("{shown} is in use: some process has a file or directory of it open"),
            )
            .hint(format!(
                "fuser -vm {shown} shows which; end it, or use fleecefs umount --lazy"
            )),
            _ => failed(e),
        })?,
    }
    if let Some((_, process)) = &daemon
        && !gone(process, NOTICING)
    {
        // One that is cleaning up already does not mind.
        match pidfd_send_signal(process, Signal::TERM) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => {}
            Err(e) => return Err(failed(e.into())),
        }
    }
    match daemon {
        Some((pid, process)) if !gone(&process, CLEANING) => Err(Error::new(
            Kind::TimedOut,
            format!(
                "{shown} is unmounted, but its daemon (process {pid}) is still cleaning up after \
                 {} s",
                CLEANING.as_secs()
            ),
        )
        .hint("look at its log")),
        _ => Ok(()),
    }
}

/// `status` of the mount; `None` if it does not answer.
fn status(point: &Path) -> Option<std::io::Result<String>> {
    let (sender, receiver) = bounded(1);
    let path = point.join("status");
    let read = move || {
        let _ = sender.send(std::fs::read_to_string(path));
    };
    std::thread::Builder::new()
        .name("status".to_owned())
        .spawn(read)
        .ok()?;
    receiver.recv_timeout(ANSWER).ok()
}

/// The process that serves the mount, held so that its number cannot come to mean another; `None`
/// if it is out of sight, as from another container.
fn daemon(status: &str) -> Option<(i32, OwnedFd)> {
    let line = status.lines().find_map(|l| l.strip_prefix("pid: "))?;
    let number: i32 = line.parse().ok()?;
    let process = pidfd_open(Pid::from_raw(number)?, PidfdFlags::empty()).ok()?;
    let name = std::fs::read_to_string(format!("/proc/{number}/comm")).ok()?;
    (name.trim_end() == "fleecefs").then_some((number, process))
}

/// Waits for the end of a process; whether it came in time.
fn gone(process: &OwnedFd, within: Duration) -> bool {
    let deadline = Instant::now() + within;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = Timespec::try_from(left).ok();
        let mut fds = [PollFd::new(process, PollFlags::IN)];
        match poll(&mut fds, timeout.as_ref()) {
            Ok(0) => return false,
            Ok(_) => return true,
            Err(rustix::io::Errno::INTR) => {}
            Err(_) => return false,
        }
    }
}
