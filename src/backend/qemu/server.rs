//! The NBD server: a QEMU process has one, which runs while any of our backups does.

use std::os::unix::net::UnixStream;

use parking_lot::Mutex;

use super::monitor::Monitor;
use crate::backend::rundir::RunDir;
use crate::model::{Kind, Result};

#[derive(Default)]
pub(super) struct Server {
    /// How many backups need it. The lock is held while it is started or stopped.
    users: Mutex<usize>,
}

impl Server {
    /// Starts it for its first user.
    pub(super) fn acquire(&self, monitor: &Monitor, rundir: &RunDir) -> Result<()> {
        let mut users = self.users.lock();
        if *users == 0 {
            start(monitor, rundir)?;
        }
        *users += 1;
        Ok(())
    }

    /// Stops it after its last user.
    pub(super) fn release(&self, monitor: &Monitor, rundir: &RunDir) -> Result<()> {
        let mut users = self.users.lock();
        if *users == 1 {
            monitor.nbd_server_stop()?;
            rundir.forget_server();
        }
        *users = users.saturating_sub(1);
        Ok(())
    }

    /// One user less of a server that died with its QEMU.
    pub(super) fn lost(&self) {
        let mut users = self.users.lock();
        *users = users.saturating_sub(1);
    }
}

/// Starts the server, or takes over one of ours whose start was answered too late. Whether it is ours
/// is told by our socket: the directory is nobody else's.
fn start(monitor: &Monitor, rundir: &RunDir) -> Result<()> {
    let socket = rundir.socket();
    let is_ours = || UnixStream::connect(&socket).is_ok();
    rundir.note_server(monitor.client().peer().pid);
    match monitor.nbd_server_start(&socket.display().to_string()) {
        Ok(()) => Ok(()),
        Err(e) if e.kind() == Kind::Busy && is_ours() => Ok(()),
        // It may yet start: the note stays.
        Err(e) if e.kind() == Kind::TimedOut => Err(e),
        Err(e) => {
            if is_ours() {
                monitor.nbd_server_stop()?;
            }
            rundir.forget_server();
            Err(match e.kind() {
                Kind::Busy => e.hint(
                    "a QEMU has one NBD server, and someone else started it: stop it with \
                     nbd-server-stop when it is no longer used",
                ),
                _ => e,
            })
        }
    }
}
