//! The connection to the monitor, made anew when QEMU was restarted.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;

use super::monitor::{self, Monitor};
use crate::model::{Error, Kind, Result};
use crate::qmp;

/// The oldest QEMU that is tried: 7.1 brought snapshot-access, 7.2 is Debian 12's.
const OLDEST: qmp::Version = qmp::Version {
    major: 7,
    minor: 2,
    micro: 0,
};

/// A way to the monitor.
pub(in crate::backend) struct Link {
    socket: PathBuf,
    timeout: Duration,
    /// How long to wait for the greeting, by which a monitor that is held by someone else is told.
    greeting: Duration,
    client: Mutex<Option<Arc<qmp::Client>>>,
}

impl Link {
    /// Connects; EBUSY, EOPNOTSUPP and so on with a sentence each.
    pub(in crate::backend) fn open(
        socket: PathBuf,
        timeout: Duration,
        greeting: Duration,
    ) -> Result<Self> {
        let link = Self {
            socket,
            timeout,
            greeting,
            client: Mutex::new(None),
        };
        link.monitor()?;
        Ok(link)
    }

    /// The monitor; connects again if the connection is gone. NotConnected if nobody listens.
    pub(super) fn monitor(&self) -> Result<Monitor> {
        let mut slot = self.client.lock();
        if let Some(client) = slot.as_ref().filter(|c| c.is_connected()) {
            return Ok(Monitor::new(Arc::clone(client), self.timeout));
        }
        let client = Arc::new(self.connect()?);
        *slot = Some(Arc::clone(&client));
        Ok(Monitor::new(client, self.timeout))
    }

    /// The process at the other end.
    pub(super) fn peer(&self) -> Result<qmp::Peer> {
        Ok(self.monitor()?.client().peer())
    }

    /// Why there is no connection now, if there is none. Asks nobody; the next use connects again.
    pub(super) fn failure(&self) -> Option<Error> {
        // Somebody who connects holds the lock: that is no failure yet.
        let client = self.client.try_lock()?;
        let connected = client.as_ref().is_some_and(|c| c.is_connected());
        (!connected).then(|| Error::new(Kind::NotConnected, "the domain's monitor hung up"))
    }

    /// Hangs up; the monitor is free for others.
    pub(super) fn close(&self) {
        if let Some(client) = self.client.lock().take() {
            client.close();
        }
    }

    /// Sends QEMU the order to quit; for a storage daemon of ours.
    pub(in crate::backend) fn quit(&self) -> Result<()> {
        self.monitor()?.quit()
    }

    /// Adds a block node; for a storage daemon of ours.
    pub(in crate::backend) fn blockdev_add(&self, options: serde_json::Value) -> Result<()> {
        self.monitor()?.blockdev_add(options)
    }

    /// Closes a block node, which saves its bitmaps; for a storage daemon of ours.
    pub(in crate::backend) fn blockdev_del(&self, node: &str) -> Result<()> {
        self.monitor()?.blockdev_del(node).map(drop)
    }

    fn connect(&self) -> Result<qmp::Client> {
        let client = qmp::Client::connect_within(self.greeting, &self.socket, self.timeout);
        let client = client.map_err(|e| match &e {
            qmp::Error::Connect { source, .. } => {
                let message = e.to_string();
                match source.kind() {
                    std::io::ErrorKind::PermissionDenied => Error::new(Kind::NotPermitted, message)
                        .hint("run fleecefs as root, or as QEMU's user"),
                    _ => Error::new(Kind::NotConnected, message)
                        .hint("is the domain running, with a QMP socket of that path?"),
                }
            }
            qmp::Error::NotASocket { .. } => Error::new(Kind::Invalid, e.to_string())
                .hint("name the path that QEMU was given with -qmp unix:PATH,server=on,wait=off"),
            _ => monitor::error(e),
        })?;
        let version = client.version();
        if version < OLDEST {
            return Err(Error::new(
                Kind::Unsupported,
                format!(
                    "QEMU {}.{}.{} is too old: fleecefs needs {}.{}",
                    version.major, version.minor, version.micro, OLDEST.major, OLDEST.minor
                ),
            ));
        }
        Ok(client)
    }
}
