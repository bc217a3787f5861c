//! Unix sockets with deadlines, which `std` does not have: connecting and sending.

use std::io;
use std::mem;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use super::deadline::Deadline;

/// The process that listens on the monitor's socket, as the kernel saw it when it began to listen.
/// If a manager opened the socket and passed it on, that is the manager.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Peer {
    /// Its process id; 0 if it lives in a pid namespace that this process cannot see.
    pub pid: i32,
    /// Its user.
    pub uid: u32,
    /// Its group.
    pub gid: u32,
}

/// Connects to `path`. `WouldBlock` if the listener's backlog stayed full until the deadline.
pub(super) fn connect(path: &Path, deadline: Deadline) -> io::Result<UnixStream> {
    let address = address(path)?;
    // SAFETY: no pointers.
    let fd = unsafe { libc::socket(libc::AF_UNIX, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is open and nobody else's.
    let socket = UnixStream::from(unsafe { OwnedFd::from_raw_fd(fd) });
    loop {
        // With a full backlog a non-blocking connect gives EAGAIN, and poll does not tell when there
        // is room. With a send timeout it waits for room and then gives EAGAIN (Linux,
        // net/unix/af_unix.c, unix_stream_connect). A timeout of zero would mean none.
        let timeout = deadline.remaining().max(Duration::from_millis(1));
        socket.set_write_timeout(Some(timeout))?;
        // SAFETY: the address is valid and as long as said.
        let status = unsafe {
            libc::connect(
                fd,
                (&raw const address).cast(),
                mem::size_of::<libc::sockaddr_un>() as libc::socklen_t,
            )
        };
        if status == 0 {
            return Ok(socket);
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

/// Whether there is something at `path` that is no socket.
pub(super) fn is_something_else(path: &Path) -> bool {
    path.metadata()
        .is_ok_and(|found| !found.file_type().is_socket())
}

fn address(path: &Path) -> io::Result<libc::sockaddr_un> {
    // SAFETY: all zeros is a valid sockaddr_un.
    let mut address: libc::sockaddr_un = unsafe { mem::zeroed() };
    address.sun_family = libc::AF_UNIX as libc::sa_family_t;
    let bytes = path.as_os_str().as_bytes();
    // One byte is for the terminator.
    if bytes.is_empty() || bytes.len() >= address.sun_path.len() || bytes.contains(&0) {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "the path of a socket has 1 to 107 bytes, none of them zero",
        ));
    }
    for (to, from) in address.sun_path.iter_mut().zip(bytes) {
        *to = *from as libc::c_char;
    }
    Ok(address)
}

/// Who is at the other end.
pub(super) fn peer(socket: &UnixStream) -> io::Result<Peer> {
    let mut found = libc::ucred {
        pid: 0,
        uid: 0,
        gid: 0,
    };
    let mut length = mem::size_of::<libc::ucred>() as libc::socklen_t;
    // SAFETY: both pointers are valid, and `length` is the size of what the first points to.
    let status = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut found).cast(),
            &raw mut length,
        )
    };
    if status < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(Peer {
        pid: found.pid,
        uid: found.uid,
        gid: found.gid,
    })
}

/// Sends `bytes`, or as many of them as the peer takes until the deadline; returns how many.
///
/// SO_SNDTIMEO would not do: it holds for each buffer that the kernel fills, not for the whole.
pub(super) fn send(socket: &UnixStream, bytes: &[u8], deadline: Deadline) -> io::Result<usize> {
    let mut sent = 0;
    while sent < bytes.len() {
        let rest = &bytes[sent..];
        // SAFETY: the pointer and length are those of `rest`.
        let status = unsafe {
            libc::send(
                socket.as_raw_fd(),
                rest.as_ptr().cast(),
                rest.len(),
                libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL,
            )
        };
        if let Ok(count) = usize::try_from(status) {
            sent += count;
            continue;
        }
        let error = io::Error::last_os_error();
        match error.kind() {
            io::ErrorKind::Interrupted => {}
            io::ErrorKind::WouldBlock if deadline.has_passed() => break,
            io::ErrorKind::WouldBlock => wait_writable(socket, deadline)?,
            _ => return Err(error),
        }
    }
    Ok(sent)
}

/// Sleeps until there may be room, the connection broke, or the deadline passed.
fn wait_writable(socket: &UnixStream, deadline: Deadline) -> io::Result<()> {
    let mut entry = libc::pollfd {
        fd: socket.as_raw_fd(),
        events: libc::POLLOUT,
        revents: 0,
    };
    // One more, so as not to wake just before the deadline and spin up to it.
    let millis = i32::try_from(deadline.remaining().as_millis() + 1).unwrap_or(i32::MAX);
    // SAFETY: one valid entry.
    let status = unsafe { libc::poll(&raw mut entry, 1, millis) };
    if status >= 0 {
        return Ok(());
    }
    match io::Error::last_os_error() {
        error if error.kind() == io::ErrorKind::Interrupted => Ok(()),
        error => Err(error),
    }
}
