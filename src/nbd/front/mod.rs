//! A small NBD server in front of a private one, for clients such as nbdcopy and qemu-img.
//!
//! ```text
//!   client A ──unix──┐                        ┌─ fl-7-vda   (public name: vda)
//!   client B ──tcp───┼─ Front of backup 7 ────┤             private server:
//!   client C ──tls───┘   names: vda, vdb      ├─ fl-7-vdb   one for a process
//!   client D ──unix──── Front of backup 8 ────┴─ fl-8-vda
//! ```
//!
//! A QEMU process has one NBD server, and all exports of all its backups are in it; it is on a
//! socket that nobody else can reach. A front has an address of its own, as the backup's
//! `<server>` wants it, and lets clients have this backup's exports and no others.
//!
//! | file | its one idea |
//! |---|---|
//! | `listener` | what clients connect to, and what of it is ours to remove |
//! | `channel` | one place to wait, and a bell that ends all waiting |
//! | `tls` | pre-shared keys |
//! | `names` | what clients may have |
//! | `handshake` | options are read, and names translated |
//! | `relay` | bytes are copied, and not read |
//!
//! What it must not do: trust a client. Whatever one sends ends its own connection at most, and the
//! handshake has a deadline as a whole. There is a thread for each connection, and no more than
//! [`MAX_CLIENTS`] of them.

mod channel;
mod error;
mod handshake;
mod listener;
mod names;
mod relay;
mod tls;

use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use rustix::event::PollFlags;

use super::socket::Deadline;
use crate::model::ServerAddress;
use channel::{Bell, End, Stream};
pub use error::FrontError;
use listener::Listener;
use names::Names;
pub use tls::Psk;

/// Clients at once; one more is hung up on.
const MAX_CLIENTS: usize = 64;
/// How long accepting rests when the system lacks something, such as descriptors.
const REST: Duration = Duration::from_millis(100);

/// What all threads of a front share.
#[derive(Debug)]
struct Site {
    names: Names,
    /// The private server's socket.
    upstream: PathBuf,
    /// TLS is demanded, with these keys.
    psk: Option<Psk>,
    timeout: Duration,
    bell: Bell,
}

/// A running front; see the module's comment. Dropping it closes it.
#[derive(Debug)]
pub struct Front {
    site: Arc<Site>,
    tcp_addresses: Vec<SocketAddr>,
    thread: Option<JoinHandle<()>>,
}

impl Front {
    /// Listens on `address` and forwards to the server on the Unix socket `upstream`. `exports` are
    /// pairs of the public and the private name. `psk` is needed for an address that has TLS, and
    /// left aside for others. `timeout` bounds each client's handshake as a whole, and what the
    /// private server still has to say once a client has hung up.
    pub fn start(
        address: &ServerAddress,
        upstream: PathBuf,
        exports: Vec<(String, String)>,
        psk: Option<Psk>,
        timeout: Duration,
    ) -> Result<Self, FrontError> {
        let (text, listeners, psk) = match address {
            ServerAddress::Unix(path) => {
                let listener = Listener::unix(Path::new(path));
                (path.clone(), listener.map(|one| vec![one]), None)
            }
            ServerAddress::Tcp { host, port, tls } => {
                let address = format!("{host}:{port}");
                if *tls && psk.is_none() {
                    return Err(FrontError::NoKeys { address });
                }
                (address, Listener::tcp(host, *port), psk.filter(|_| *tls))
            }
        };
        let failed = |error| FrontError::listen(&text, error);
        let listeners = listeners.map_err(failed)?;
        let site = Arc::new(Site {
            names: Names::new(exports),
            upstream,
            psk,
            timeout,
            bell: Bell::new().map_err(failed)?,
        });
        let tcp_addresses = listeners.iter().filter_map(Listener::tcp_address).collect();
        let shared = site.clone();
        let thread = thread::Builder::new()
            .name("nbd-front".to_owned())
            .spawn(move || serve(listeners, &shared))
            .map_err(failed)?;
        Ok(Self {
            site,
            tcp_addresses,
            thread: Some(thread),
        })
    }

    /// What it listens on, if that is TCP: for each address of the host, the port in use.
    pub fn tcp_addresses(&self) -> &[SocketAddr] {
        &self.tcp_addresses
    }

    /// Stops listening, ends all connections and waits until they are gone; a socket's file that is
    /// still ours is removed. Exports can be taken away after that without a client's noticing.
    pub fn close(self) {}
}

impl Drop for Front {
    fn drop(&mut self) {
        self.site.bell.ring();
        if let Some(thread) = self.thread.take() {
            // It waits nowhere but at the bell. Its panic, if any, was told on stderr.
            let _ = thread.join();
        }
    }
}

/// Takes clients in until the bell rings, and waits for the last of them to leave.
fn serve(listeners: Vec<Listener>, site: &Site) {
    // Each client's thread holds one more of it.
    let places = Arc::new(());
    thread::scope(|scope| {
        let wanted: Vec<_> = listeners.iter().map(|l| (l.fd(), PollFlags::IN)).collect();
        loop {
            match site.bell.wait(&wanted, None) {
                Ok(()) => {}
                Err(End::Stopped) => break,
                Err(end) => {
                    log::warn!("NBD server: takes no more clients: {end}");
                    break;
                }
            }
            for listener in &listeners {
                let client = match listener.accept() {
                    Ok(client) => client,
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
                    Err(error) => {
                        log::warn!("NBD server: cannot accept: {error}");
                        // Only the bell is listened to; it is heard above as well.
                        let _ = site.bell.wait(&[], Some(Deadline::after(REST)));
                        continue;
                    }
                };
                if Arc::strong_count(&places) > MAX_CLIENTS {
                    log::warn!("NBD server: has {MAX_CLIENTS} clients and takes no more");
                    continue;
                }
                let place = places.clone();
                let attend = move || {
                    attend(client, site);
                    drop(place);
                };
                let thread = thread::Builder::new().name("nbd-client".to_owned());
                if let Err(error) = thread.spawn_scoped(scope, attend) {
                    log::warn!("NBD server: no thread for a client: {error}");
                }
            }
        }
        drop(wanted);
        drop(listeners);
    });
}

/// One client, from its greeting to its end.
fn attend(client: Stream, site: &Site) {
    let deadline = Deadline::after(site.timeout);
    match handshake::negotiate(client, site, deadline) {
        Ok(Some((client, upstream))) => {
            if let Err(end) = relay::relay(client, upstream, &site.bell, site.timeout) {
                log::debug!("NBD client: {end}");
            }
        }
        Ok(None) | Err(End::Stopped) => {}
        Err(end) => log::info!("NBD client: not let in: {end}"),
    }
}
