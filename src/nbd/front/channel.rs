//! Streams that are never waited for but in one place, which the [`Bell`] wakes up.
//!
//! All sockets here are non-blocking. An attempt to move bytes either moves some or says what it
//! waits for; [`Bell::wait`] is the only sleep. This is what TLS asks for: one object serves both
//! directions, a read may have to write, and decrypted bytes may lie ready while the socket is
//! quiet, so the attempt comes before the sleep and never after it.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};

use openssl::ssl::{self, ErrorCode, SslStream};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

use super::super::Fault;
use super::super::socket::Deadline;

/// Why a connection of the front came to its end; for the log only.
#[derive(Debug, thiserror::Error)]
pub(super) enum End {
    #[error("the server stops")]
    Stopped,
    #[error("not done in time")]
    Timeout,
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("TLS: {0}")]
    Tls(String),
    #[error("it asked for an export that it may not have")]
    UnknownExport,
    #[error("broken protocol: {0}")]
    Protocol(String),
}

impl End {
    pub(super) fn protocol(text: impl Into<String>) -> Self {
        Self::Protocol(text.into())
    }
}

impl From<Fault> for End {
    fn from(fault: Fault) -> Self {
        match fault {
            Fault::Io(error) => Self::Io(error),
            Fault::Timeout => Self::Timeout,
            Fault::Closed => Self::Stopped,
            Fault::Protocol(text) => Self::Protocol(text),
            other => Self::Protocol(other.to_string()),
        }
    }
}

/// Rung once, it ends every wait there is and will be.
#[derive(Debug)]
pub(super) struct Bell {
    event: OwnedFd,
    /// The same for those who are too busy to wait.
    rung: AtomicBool,
}

impl Bell {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self {
            event: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            rung: AtomicBool::new(false),
        })
    }

    pub(super) fn ring(&self) {
        self.rung.store(true, Ordering::Relaxed);
        // Nobody reads the counter, so it stays ready. Only a full counter fails, which is ready.
        let _ = rustix::io::write(&self.event, &1u64.to_ne_bytes());
    }

    pub(super) fn has_rung(&self) -> bool {
        self.rung.load(Ordering::Relaxed)
    }

    /// Sleeps until one of `sources` is ready for what is wanted of it.
    pub(super) fn wait(
        &self,
        sources: &[(BorrowedFd<'_>, PollFlags)],
        deadline: Option<Deadline>,
    ) -> Result<(), End> {
        let mut fds = vec![PollFd::new(&self.event, PollFlags::IN)];
        let wanted = sources
            .iter()
            .map(|&(fd, flags)| PollFd::from_borrowed_fd(fd, flags));
        fds.extend(wanted);
        let left = deadline.map(Deadline::remaining).transpose()?;
        // A deadline is at most a year away: see `Deadline::after`.
        let left = left.and_then(|left| Timespec::try_from(left).ok());
        let ready = match poll(&mut fds, left.as_ref()) {
            Err(rustix::io::Errno::INTR) => return Ok(()), // the caller tries again
            other => other.map_err(io::Error::from)?,
        };
        if self.has_rung() {
            return Err(End::Stopped);
        }
        if ready == 0 {
            return Err(End::Timeout);
        }
        Ok(())
    }
}

/// What came of an attempt to move bytes without waiting.
#[derive(Debug)]
pub(super) enum Attempt {
    Moved(usize),
    /// It can be repeated when the descriptor is ready for this.
    Waits(PollFlags),
    /// The other side sends no more.
    Ended,
}

/// One end of a connection.
#[derive(Debug)]
pub(super) enum Stream {
    Unix(UnixStream),
    Tcp(TcpStream),
    Tls(Box<SslStream<TcpStream>>),
}

impl Stream {
    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Unix(stream) => stream.as_fd(),
            Self::Tcp(stream) => stream.as_fd(),
            Self::Tls(stream) => stream.get_ref().as_fd(),
        }
    }

    pub(super) fn try_read(&mut self, buffer: &mut [u8]) -> Result<Attempt, End> {
        let moved = match self {
            Self::Unix(stream) => plain(stream.read(buffer), PollFlags::IN)?,
            Self::Tcp(stream) => plain(stream.read(buffer), PollFlags::IN)?,
            Self::Tls(stream) => secret(stream.ssl_read(buffer))?,
        };
        Ok(match moved {
            Attempt::Moved(0) => Attempt::Ended,
            other => other,
        })
    }

    pub(super) fn try_write(&mut self, bytes: &[u8]) -> Result<Attempt, End> {
        match self {
            Self::Unix(stream) => plain(stream.write(bytes), PollFlags::OUT),
            Self::Tcp(stream) => plain(stream.write(bytes), PollFlags::OUT),
            Self::Tls(stream) => secret(stream.ssl_write(bytes)),
        }
    }

    /// Says that no more will be sent, as far as that needs no waiting.
    pub(super) fn finish(&mut self) {
        let _ = match self {
            Self::Unix(stream) => stream.shutdown(Shutdown::Write),
            Self::Tcp(stream) => stream.shutdown(Shutdown::Write),
            Self::Tls(stream) => {
                let _ = stream.shutdown(); // TLS's own goodbye, before TCP's
                stream.get_ref().shutdown(Shutdown::Write)
            }
        };
    }

    /// Fills all of `buffer`.
    pub(super) fn receive(
        &mut self,
        buffer: &mut [u8],
        bell: &Bell,
        deadline: Deadline,
    ) -> Result<(), End> {
        let mut filled = 0;
        while filled < buffer.len() {
            // A peer that never lets us sleep must not make us miss the deadline or the bell.
            deadline.remaining()?;
            if bell.has_rung() {
                return Err(End::Stopped);
            }
            match self.try_read(&mut buffer[filled..])? {
                Attempt::Moved(more) => filled += more,
                Attempt::Waits(flags) => bell.wait(&[(self.fd(), flags)], Some(deadline))?,
                Attempt::Ended => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
            }
        }
        Ok(())
    }

    /// Sends all of `bytes`.
    pub(super) fn send(
        &mut self,
        mut bytes: &[u8],
        bell: &Bell,
        deadline: Deadline,
    ) -> Result<(), End> {
        while !bytes.is_empty() {
            match self.try_write(bytes)? {
                Attempt::Moved(sent) => bytes = bytes.get(sent..).unwrap_or_default(),
                Attempt::Waits(flags) => bell.wait(&[(self.fd(), flags)], Some(deadline))?,
                Attempt::Ended => return Err(io::Error::from(io::ErrorKind::BrokenPipe).into()),
            }
        }
        Ok(())
    }
}

fn plain(result: io::Result<usize>, flags: PollFlags) -> Result<Attempt, End> {
    match result {
        Ok(moved) => Ok(Attempt::Moved(moved)),
        Err(error) => match error.kind() {
            io::ErrorKind::WouldBlock => Ok(Attempt::Waits(flags)),
            io::ErrorKind::Interrupted => Ok(Attempt::Waits(flags)),
            _ => Err(error.into()),
        },
    }
}

fn secret(result: Result<usize, ssl::Error>) -> Result<Attempt, End> {
    match result {
        Ok(moved) => Ok(Attempt::Moved(moved)),
        Err(error) if error.code() == ErrorCode::ZERO_RETURN => Ok(Attempt::Ended),
        Err(error) => wants(&error).map_or_else(
            || Err(End::Tls(error.to_string())),
            |flags| Ok(Attempt::Waits(flags)),
        ),
    }
}

/// What TLS waits for, if this is no real error.
pub(super) fn wants(error: &ssl::Error) -> Option<PollFlags> {
    match error.code() {
        ErrorCode::WANT_READ => Some(PollFlags::IN),
        ErrorCode::WANT_WRITE => Some(PollFlags::OUT),
        _ => None,
    }
}
