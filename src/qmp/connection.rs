//! A connected socket, the thread that reads it, and their common end.
//!
//! The reader thread runs no code of others and holds no lock while it reads, so it can always be
//! joined once the socket is shut down.

use std::io::BufReader;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

use super::deadline::Deadline;
use super::session::Session;
use super::{Error, Peer, Result, socket, wire};

pub(super) struct Connection {
    pub(super) session: Arc<Session>,
    pub(super) peer: Peer,
    socket: Arc<UnixStream>,
    reader: Mutex<Option<JoinHandle<()>>>,
}

impl Connection {
    /// None if the listener's backlog was full until the deadline.
    pub(super) fn open(path: &Path, deadline: Deadline) -> Result<Option<Self>> {
        let failed = |source| Error::Connect {
            path: path.into(),
            source,
        };
        let socket = match socket::connect(path, deadline) {
            Ok(socket) => Arc::new(socket),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return Ok(None),
            Err(_) if socket::is_something_else(path) => {
                return Err(Error::NotASocket { path: path.into() });
            }
            Err(error) => return Err(failed(error)),
        };
        let peer = socket::peer(&socket).map_err(failed)?;
        let session = Arc::new(Session::new());
        let reader = thread::Builder::new()
            .name("qmp-reader".into())
            .spawn({
                let (socket, session) = (Arc::clone(&socket), Arc::clone(&session));
                move || {
                    session.end(read_to_end(&socket, &session));
                    // Also when it was the peer's nonsense that ended it: this tells the peer, and
                    // frees its monitor for the next client.
                    shut_down(&socket);
                }
            })
            .map_err(failed)?;
        Ok(Some(Self {
            session,
            peer,
            socket,
            reader: Mutex::new(Some(reader)),
        }))
    }

    /// Sends one line; `command` is its name for errors.
    pub(super) fn send(&self, command: &str, line: &str, deadline: Deadline) -> Result<()> {
        let timed_out = || Error::Timeout {
            waiting_for: command.into(),
        };
        let _turn = self.session.turn_to_send(deadline)?.ok_or_else(timed_out)?;
        log::trace!("-> {}", line.trim_end());
        match socket::send(&self.socket, line.as_bytes(), deadline) {
            Ok(sent) if sent == line.len() => Ok(()),
            Ok(0) => Err(timed_out()),
            // Half a command cannot be taken back, and the next line would be read as its rest.
            Ok(_) => {
                self.end(&format!("it stopped reading in the middle of {command}"));
                Err(timed_out())
            }
            Err(error) => {
                self.end(&error.to_string());
                self.session.check_alive()
            }
        }
    }

    /// Ends the session and returns when the reader thread is gone.
    pub(super) fn close(&self) {
        self.end("closed by this side");
        let reader = self
            .reader
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if let Some(reader) = reader
            && reader.join().is_err()
        {
            log::error!("the QMP reader thread panicked");
        }
    }

    fn end(&self, reason: &str) {
        self.session.end(reason.into());
        shut_down(&self.socket);
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.close();
    }
}

/// Wakes whoever reads or writes the socket. It fails only where it is not needed: on a socket
/// that is no longer connected.
fn shut_down(socket: &UnixStream) {
    let _ = socket.shutdown(Shutdown::Both);
}

/// Routes all lines until the session is over; returns why.
fn read_to_end(socket: &UnixStream, session: &Session) -> String {
    let mut reader = BufReader::new(socket);
    let mut line = Vec::new();
    loop {
        match wire::read_line(&mut reader, &mut line) {
            Ok(true) => {}
            Ok(false) => return "it closed the connection".into(),
            Err(error) => return error.to_string(),
        }
        log::trace!("<- {}", String::from_utf8_lossy(&line));
        let taken = match wire::decode(&line) {
            Ok(incoming) => session.take(incoming, line.len()),
            Err(error) => Err(format!("it sent a line that is not JSON: {error}")),
        };
        if let Err(reason) = taken {
            return reason;
        }
    }
}
