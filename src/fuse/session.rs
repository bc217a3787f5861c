//! A mount from its beginning to its end.
//!
//! It ends when it is unmounted, by whomever: the kernel then closes the connection, the event
//! loops return, and [`Mounted::ended`] tells.

use std::fs;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use crossbeam_channel::{Receiver, bounded};
use fuser::{Config, Session, SessionACL};
use parking_lot::Mutex;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::adapter::Adapter;
use super::mount::{attach, unmount};
use super::mountinfo;
use crate::model::{Error, Kind, Result};
use crate::vfs::Vfs;

/// Event loops; more gain nothing, as they wait for nobody.
const EVENT_LOOPS: usize = 2;

/// How long an unmounted session may take to notice.
const LAST_REPLIES: Duration = Duration::from_secs(5);

/// How a mount is made.
#[derive(Debug, Clone)]
pub struct MountOptions {
    /// What `mount` and `df` show as source.
    pub source: String,
    /// Other users may look and read.
    pub allow_other: bool,
    /// How far the kernel reads ahead, in KiB. It decides the speed of sequential reads; only root
    /// can set it.
    pub read_ahead_kib: u32,
}

/// A live mount. Dropping it leaves it mounted.
pub struct Mounted {
    vfs: Arc<Vfs>,
    point: PathBuf,
    device: Option<String>,
    connection: Arc<Connection>,
    ended: Receiver<()>,
}

/// The connection to the kernel, until the event loops have ended: kept any longer it would keep
/// the kernel from noticing that nobody answers any more.
struct Connection(Mutex<Option<OwnedFd>>);

impl Connection {
    /// Whether the file system still exists.
    fn lives(&self) -> bool {
        let held = self.0.lock();
        let Some(fd) = &*held else { return false };
        let now = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        let mut fds = [PollFd::new(fd, PollFlags::empty())];
        poll(&mut fds, Some(&now)).is_ok() && !fds[0].revents().contains(PollFlags::ERR)
    }
}

/// What became of an unmount.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unmounted {
    /// It is unmounted.
    Done,
    /// It was not there any more, or somebody mounted something else over it, which stays.
    Gone,
    /// It is in use and still mounted.
    Busy,
}

/// Mounts `vfs` on a directory, checked before by [`heal`](super::heal). When this returns, the
/// mount answers.
pub fn mount(vfs: Arc<Vfs>, point: &Path, options: &MountOptions) -> Result<Mounted> {
    let failed =
        |e: std::io::Error| Error::new(Kind::Io, format!("cannot serve {}: {e}", point.display()));
    let adapter = Adapter::start(Arc::clone(&vfs)).map_err(failed)?;
    let fd = attach(point, &options.source, options.allow_other)?;
    let device = mountinfo::at(point)
        .filter(|entry| entry.kind == mountinfo::TYPE)
        .map(|entry| entry.device);

    let connection = fd
        .try_clone()
        .map(|fd| Arc::new(Connection(Mutex::new(Some(fd)))));
    let connection = match connection {
        Ok(connection) => connection,
        Err(e) => {
            let _ = unmount(point, true);
            return Err(failed(e));
        }
    };
    let mut config = Config::default();
    config.n_threads = Some(EVENT_LOOPS);
    config.clone_fd = true;
    // The kernel decides who may ask (the owner, or all with allow_other). fuser's own check would
    // also refuse requests that the kernel sends in nobody's name.
    let session = match Session::from_fd(adapter, fd, SessionACL::All, config) {
        Ok(session) => session,
        Err(e) => {
            let _ = unmount(point, true);
            return Err(failed(e));
        }
    };
    if let Some(device) = &device {
        read_ahead(device, options.read_ahead_kib);
    }
    let (alive, ended) = bounded(0);
    let kept = Arc::clone(&connection);
    let serve = move || {
        if let Err(e) = session.run() {
            log::error!("serving the mount ended with an error: {e}");
        }
        *kept.0.lock() = None;
        drop(alive);
    };
    let thread = thread::Builder::new().name("fuse".to_owned()).spawn(serve);
    if let Err(e) = thread {
        let _ = unmount(point, true);
        return Err(failed(e));
    }
    Ok(Mounted {
        vfs,
        point: point.to_owned(),
        device,
        connection,
        ended,
    })
}

/// Without it, reads come in 128 KiB, one at a time.
fn read_ahead(device: &str, kib: u32) {
    let path = format!("/sys/class/bdi/{device}/read_ahead_kb");
    if let Err(e) = fs::write(&path, kib.to_string()) {
        log::debug!("cannot set {path}: {e}; sequential reads are slower");
    }
}

impl Mounted {
    /// Where it is mounted.
    pub fn point(&self) -> &Path {
        &self.point
    }

    /// Is disconnected when the mount has ended. Nothing is ever sent.
    pub fn ended(&self) -> &Receiver<()> {
        &self.ended
    }

    /// Unmounts, if what is mounted there is still this mount.
    pub fn unmount(&self, lazily: bool) -> Result<Unmounted> {
        let same =
            mountinfo::at(&self.point).is_some_and(|top| Some(&top.device) == self.device.as_ref());
        // In this order: the device number was our own then if our file system exists still. Once it
        // does not, the next mount may get the same number at once.
        if !same || !self.connection.lives() {
            return Ok(Unmounted::Gone);
        }
        match unmount(&self.point, lazily) {
            Ok(()) => Ok(Unmounted::Done),
            Err(e) if e.kind() == std::io::ErrorKind::ResourceBusy => Ok(Unmounted::Busy),
            // Unmounted in between.
            Err(e) if e.kind() == std::io::ErrorKind::InvalidInput => Ok(Unmounted::Gone),
            Err(e) => Err(Error::new(
                Kind::Io,
                format!("cannot unmount {}: {e}", self.point.display()),
            )),
        }
    }

    /// Waits for the end; whether it came in time.
    pub fn wait(&self, deadline: Duration) -> bool {
        self.ended.recv_timeout(deadline) == Err(crossbeam_channel::RecvTimeoutError::Disconnected)
    }

    /// Ends everything, in whatever state the mount is: first the backups, so that reads fail
    /// rather than hang; then the mount, detached if somebody still has a file open.
    pub fn shut_down(&self) -> Result<()> {
        let closed = self.vfs.domain().close();
        let unmounted = match self.unmount(false) {
            Ok(Unmounted::Busy) => {
                log::warn!(
                    "{} is still in use; it is detached, and open files give errors",
                    self.point.display()
                );
                self.unmount(true)
            }
            Ok(Unmounted::Done) => {
                self.wait(LAST_REPLIES);
                Ok(Unmounted::Done)
            }
            other => other,
        };
        closed.and(unmounted.map(drop))
    }
}
