//! What clients connect to: a Unix socket of our own making, or a TCP port.

use std::io;
use std::net::{SocketAddr, TcpListener, ToSocketAddrs};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use rustix::fs::Mode;
use rustix::net::{self, AddressFamily, SocketAddrUnix, SocketFlags, SocketType, sockopt};

use super::channel::Stream;

/// As many as may connect before the first is served.
const BACKLOG: i32 = 64;

#[derive(Debug)]
pub(super) enum Listener {
    /// The file comes first and is dropped first: an open socket keeps its inode, so that until
    /// then no other file can have the same number.
    Unix {
        _file: File,
        listener: UnixListener,
    },
    Tcp(TcpListener),
}

impl Listener {
    /// A Unix socket that only our own user can connect to. bind(2) refuses a path that exists,
    /// whatever is there, and so do we: it is not ours to delete.
    pub(super) fn unix(path: &Path) -> io::Result<Self> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        // The file gets the socket's mode, less the umask: there is no moment at which others
        // could connect.
        rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
        net::bind(&socket, &SocketAddrUnix::new(path)?)?;
        // From here on the file is removed whatever happens.
        let file = File::of(path)?;
        net::listen(&socket, BACKLOG)?;
        let listener = socket.into();
        Ok(Self::Unix {
            _file: file,
            listener,
        })
    }

    /// All addresses that the name has: clients may try only one of them. A family that this
    /// system does not have is passed over, if there is another.
    pub(super) fn tcp(host: &str, port: u16) -> io::Result<Vec<Self>> {
        let mut listeners = Vec::new();
        let mut failed = None;
        for address in (host, port).to_socket_addrs()? {
            // std sets SO_REUSEADDR, so connections of the last backup do not keep the port.
            match TcpListener::bind(address) {
                Ok(listener) => {
                    listener.set_nonblocking(true)?;
                    listeners.push(Self::Tcp(listener));
                }
                Err(e) if e.kind() == io::ErrorKind::AddrInUse => return Err(e),
                Err(e) => failed = Some(e),
            }
        }
        match failed {
            Some(error) if listeners.is_empty() => Err(error),
            None if listeners.is_empty() => Err(io::ErrorKind::AddrNotAvailable.into()),
            _ => Ok(listeners),
        }
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Unix { listener, .. } => listener.as_fd(),
            Self::Tcp(listener) => listener.as_fd(),
        }
    }

    /// The port in use, which matters if 0 was asked for.
    pub(super) fn tcp_address(&self) -> Option<SocketAddr> {
        match self {
            Self::Unix { .. } => None,
            Self::Tcp(listener) => listener.local_addr().ok(),
        }
    }

    /// The next client, if one waits.
    pub(super) fn accept(&self) -> io::Result<Stream> {
        match self {
            Self::Unix { listener, .. } => {
                let (stream, _) = listener.accept()?;
                stream.set_nonblocking(true)?;
                Ok(Stream::Unix(stream))
            }
            Self::Tcp(listener) => {
                let (stream, _) = listener.accept()?;
                stream.set_nonblocking(true)?;
                stream.set_nodelay(true)?;
                // A client whose machine went away gives its place back some day.
                sockopt::set_socket_keepalive(&stream, true)?;
                Ok(Stream::Tcp(stream))
            }
        }
    }
}

/// A socket's file. Dropping it removes the file, unless another one has taken its place.
#[derive(Debug)]
pub(super) struct File {
    path: PathBuf,
    identity: (u64, u64),
}

impl File {
    fn of(path: &Path) -> io::Result<Self> {
        Ok(Self {
            path: std::path::absolute(path)?,
            identity: identity(path)?,
        })
    }
}

impl Drop for File {
    fn drop(&mut self) {
        if identity(&self.path).is_ok_and(|now| now == self.identity)
            && let Err(error) = std::fs::remove_file(&self.path)
        {
            log::warn!("{}: not removed: {error}", self.path.display());
        }
    }
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    let meta = std::fs::symlink_metadata(path)?;
    Ok((meta.dev(), meta.ino()))
}
