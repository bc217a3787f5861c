//! A connected stream socket on which no wait outlives its deadline: the only system calls and the
//! only `unsafe` of this module's family.
//!
//! The socket stays in blocking mode and the kernel keeps the time (SO_RCVTIMEO, SO_SNDTIMEO):
//! with MSG_WAITALL a payload of a megabyte is then one system call, where a non-blocking socket
//! would need a poll and a recv for every fill of the sender's buffer. A time-out option counts
//! from the start of each call, so a peer that drips bytes would extend the whole; therefore every
//! call is preceded by a look at the operation's [`Deadline`], and the option is set anew where it
//! overshoots by more than a quarter of what is left. In the normal case it is set once per
//! connection.
//!
//! Nothing but [`Socket::connect`] knows the address family; TCP would be a second such function.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use super::Fault;

/// How long a connect may sleep in the kernel before it looks whether it is still wanted: nothing
/// else can wake it up.
const CONNECT_SLICE: Duration = Duration::from_millis(100);

/// The moment at which an operation must have ended.
#[derive(Debug, Clone, Copy)]
pub(super) struct Deadline(Instant);

impl Deadline {
    pub(super) fn after(timeout: Duration) -> Self {
        // Bounded, because adding to an Instant panics on overflow.
        const YEAR: Duration = Duration::from_secs(365 * 86_400);
        Self(Instant::now() + timeout.min(YEAR))
    }

    /// What is left; none is a [`Fault::Timeout`].
    pub(super) fn remaining(self) -> Result<Duration, Fault> {
        match self.0.saturating_duration_since(Instant::now()) {
            Duration::ZERO => Err(Fault::Timeout),
            left => Ok(left),
        }
    }
}

/// A connected stream socket; see the module's comment.
#[derive(Debug)]
pub(super) struct Socket {
    fd: Arc<OwnedFd>,
    receive_timeout: Duration,
    send_timeout: Duration,
}

/// Ends a [`Socket`]'s use from another thread. It holds no descriptor of its own, and while it
/// acts it keeps the socket's from being closed, so it can never hit a descriptor that was reused.
#[derive(Debug)]
pub(super) struct Stopper(Weak<OwnedFd>);

impl Stopper {
    /// Makes all present and later calls on the socket return at once.
    pub(super) fn stop(&self) {
        if let Some(fd) = self.0.upgrade() {
            // SAFETY: no pointers; the descriptor is open. Failure means that the peer is gone.
            unsafe { libc::shutdown(fd.as_raw_fd(), libc::SHUT_RDWR) };
        }
    }

    pub(super) fn is_needed(&self) -> bool {
        self.0.strong_count() > 0
    }
}

impl Socket {
    /// Connects to a Unix socket, for as long as `wanted` says so.
    ///
    /// With a full backlog connect(2) sleeps until the server accepts; SO_SNDTIMEO bounds that
    /// sleep (socket(7)), and it then fails with EAGAIN.
    pub(super) fn connect(
        path: &Path,
        deadline: Deadline,
        wanted: impl Fn() -> bool,
    ) -> Result<Self, Fault> {
        let (address, length) = unix_address(path).map_err(Fault::Io)?;
        // SAFETY: no pointers; a descriptor that is returned is ours alone.
        let fd = unsafe {
            let fd = libc::socket(libc::AF_UNIX, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0);
            if fd < 0 {
                return Err(Fault::Io(io::Error::last_os_error()));
            }
            OwnedFd::from_raw_fd(fd)
        };
        let mut socket = Self {
            fd: Arc::new(fd),
            receive_timeout: Duration::ZERO,
            send_timeout: Duration::ZERO,
        };
        loop {
            if !wanted() {
                return Err(Fault::Closed);
            }
            let slice = deadline.remaining()?.min(CONNECT_SLICE);
            set_timeout(socket.raw(), libc::SO_SNDTIMEO, slice).map_err(Fault::Io)?;
            socket.send_timeout = slice;
            // SAFETY: `address` outlives the call and `length` bytes of it are initialised.
            let done = unsafe { libc::connect(socket.raw(), (&raw const address).cast(), length) };
            if done == 0 {
                return Ok(socket);
            }
            let error = io::Error::last_os_error();
            match error.kind() {
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => {}
                _ => return Err(Fault::Io(error)),
            }
        }
    }

    /// What another thread needs to interrupt this socket's user.
    pub(super) fn stopper(&self) -> Stopper {
        Stopper(Arc::downgrade(&self.fd))
    }

    /// Gives the descriptor to somebody with another way of waiting; none while a [`Stopper`] acts.
    pub(super) fn into_fd(self) -> Option<OwnedFd> {
        Arc::into_inner(self.fd)
    }

    /// Sends all of `bytes`.
    pub(super) fn send(&mut self, mut bytes: &[u8], deadline: Deadline) -> Result<(), Fault> {
        while !bytes.is_empty() {
            let left = deadline.remaining()?;
            if !fits(self.send_timeout, left) {
                set_timeout(self.raw(), libc::SO_SNDTIMEO, left).map_err(Fault::Io)?;
                self.send_timeout = left;
            }
            let sent = retry(self.send_flags(bytes, libc::MSG_NOSIGNAL))?;
            bytes = bytes.get(sent..).unwrap_or_default();
        }
        Ok(())
    }

    /// Sends `bytes` if that needs no waiting; whether it worked is not told.
    pub(super) fn try_send(&self, bytes: &[u8]) {
        let _ = self.send_flags(bytes, libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT);
    }

    /// Fills all of `buffer`.
    pub(super) fn receive(
        &mut self,
        mut buffer: &mut [u8],
        deadline: Deadline,
    ) -> Result<(), Fault> {
        while !buffer.is_empty() {
            let got = self.receive_once([buffer, &mut []], libc::MSG_WAITALL, deadline)?;
            buffer = buffer.get_mut(got..).unwrap_or_default();
        }
        Ok(())
    }

    /// Fills `header`, and of `payload` as much as has arrived with it, in one system call if it
    /// can: the answer is how much of `payload` that is. It waits for no more than `header`,
    /// because a reply that reports an error has no payload.
    pub(super) fn receive_reply(
        &mut self,
        header: &mut [u8],
        payload: &mut [u8],
        deadline: Deadline,
    ) -> Result<usize, Fault> {
        let mut filled = 0;
        while filled < header.len() {
            let rest = header.get_mut(filled..).unwrap_or_default();
            filled += self.receive_once([rest, payload], 0, deadline)?;
        }
        Ok(filled - header.len())
    }

    /// One recvmsg(2): at least one byte, or 0 after a signal or a time-out, both of which send
    /// the caller back to its deadline.
    fn receive_once(
        &mut self,
        buffers: [&mut [u8]; 2],
        flags: libc::c_int,
        deadline: Deadline,
    ) -> Result<usize, Fault> {
        let left = deadline.remaining()?;
        if !fits(self.receive_timeout, left) {
            set_timeout(self.raw(), libc::SO_RCVTIMEO, left).map_err(Fault::Io)?;
            self.receive_timeout = left;
        }
        let mut iov = buffers.map(|b| libc::iovec {
            iov_base: b.as_mut_ptr().cast(),
            iov_len: b.len(),
        });
        // SAFETY: all-zero is a valid msghdr: no name, no control data.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = iov.as_mut_ptr();
        message.msg_iovlen = iov.len() as _;
        // SAFETY: the iovecs cover two slices that are borrowed for the whole call.
        match unsafe { libc::recvmsg(self.raw(), &mut message, flags) } {
            0 => Err(Fault::disconnected()),
            got => retry(got),
        }
    }

    fn send_flags(&self, bytes: &[u8], flags: libc::c_int) -> isize {
        // SAFETY: `bytes` is borrowed for the whole call.
        unsafe { libc::send(self.raw(), bytes.as_ptr().cast(), bytes.len(), flags) }
    }

    fn raw(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

/// Whether a standing time-out serves when `left` is left. One that is too short only costs
/// another turn of the caller's loop, so it is kept up to a half.
fn fits(standing: Duration, left: Duration) -> bool {
    standing <= left + left / 4 && standing >= left / 2
}

/// The result of a system call, with "try again" (after a signal or a time-out) as 0 bytes.
fn retry(result: isize) -> Result<usize, Fault> {
    usize::try_from(result).or_else(|_| {
        let error = io::Error::last_os_error();
        match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(0),
            _ => Err(Fault::Io(error)),
        }
    })
}

fn set_timeout(fd: RawFd, option: libc::c_int, timeout: Duration) -> io::Result<()> {
    // Rounded up: a time-out of 0 would mean none at all.
    let timeout = timeout.max(Duration::from_millis(1));
    let value = libc::timeval {
        tv_sec: timeout.as_secs() as _,
        tv_usec: timeout.subsec_micros() as _,
    };
    // SAFETY: the pointer and length are those of `value`.
    let done = unsafe {
        libc::setsockopt(
            fd,
            libc::SOL_SOCKET,
            option,
            (&raw const value).cast(),
            size_of_val(&value) as libc::socklen_t,
        )
    };
    if done == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

fn unix_address(path: &Path) -> io::Result<(libc::sockaddr_un, libc::socklen_t)> {
    // SAFETY: all-zero is a valid sockaddr_un.
    let mut address: libc::sockaddr_un = unsafe { std::mem::zeroed() };
    address.sun_family = libc::AF_UNIX as libc::sa_family_t;
    let bytes = path.as_os_str().as_bytes();
    // One byte is left for the final NUL (unix(7)).
    if bytes.is_empty() || bytes.len() >= address.sun_path.len() || bytes.contains(&0) {
        let text = format!("{path:?} cannot be the path of a socket");
        return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
    }
    for (to, from) in address.sun_path.iter_mut().zip(bytes) {
        *to = *from as libc::c_char;
    }
    Ok((address, size_of_val(&address) as libc::socklen_t))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::unix::net::UnixListener;
    use std::sync::atomic::{AtomicU32, Ordering};

    fn soon() -> Deadline {
        Deadline::after(Duration::from_millis(50))
    }

    /// A listening socket whose backlog is full.
    fn full(dir: &Path) -> (std::path::PathBuf, OwnedFd, Vec<Socket>) {
        let path = dir.join("s");
        let (address, length) = unix_address(&path).unwrap();
        // SAFETY: as in `connect`.
        let fd = unsafe {
            let fd = libc::socket(libc::AF_UNIX, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0);
            assert_eq!(libc::bind(fd, (&raw const address).cast(), length), 0);
            assert_eq!(libc::listen(fd, 0), 0);
            OwnedFd::from_raw_fd(fd)
        };
        let mut waiting = Vec::new();
        while let Ok(socket) = Socket::connect(&path, soon(), || true) {
            waiting.push(socket);
        }
        (path, fd, waiting)
    }

    #[test]
    fn connecting_to_a_full_backlog_ends_at_the_deadline() {
        let dir = tempfile::tempdir().unwrap();
        let (path, _listener, _waiting) = full(dir.path());
        let result = Socket::connect(&path, soon(), || true);
        assert!(matches!(result, Err(Fault::Timeout)));
    }

    #[test]
    fn connecting_ends_when_no_longer_wanted() {
        let dir = tempfile::tempdir().unwrap();
        let (path, _listener, _waiting) = full(dir.path());
        let asked = AtomicU32::new(0);
        let result = Socket::connect(&path, Deadline::after(Duration::from_secs(600)), || {
            asked.fetch_add(1, Ordering::Relaxed) < 2
        });
        assert!(matches!(result, Err(Fault::Closed)));
    }

    #[test]
    fn a_path_that_does_not_fit_is_refused() {
        let long = "x".repeat(108);
        for path in ["", &long, "a\0b"] {
            let result = Socket::connect(Path::new(path), soon(), || true);
            assert!(matches!(result, Err(Fault::Io(e)) if e.kind() == io::ErrorKind::InvalidInput));
        }
    }

    #[test]
    fn a_reply_waits_for_its_header_only() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        let mut socket = Socket::connect(&path, soon(), || true).unwrap();
        let (mut peer, _) = listener.accept().unwrap();
        let (mut header, mut payload) = ([0; 4], [0; 4]);

        peer.write_all(b"head").unwrap();
        let got = socket.receive_reply(&mut header, &mut payload, soon());
        assert_eq!((got.unwrap(), &header), (0, b"head"));

        peer.write_all(b"HEADpay").unwrap();
        let got = socket.receive_reply(&mut header, &mut payload, soon());
        assert_eq!((got.unwrap(), &header, &payload), (3, b"HEAD", b"pay\0"));

        assert!(matches!(
            socket.receive(&mut payload, soon()),
            Err(Fault::Timeout)
        ));
        let stopper = socket.stopper();
        stopper.stop();
        assert!(matches!(
            socket.receive(&mut payload, soon()),
            Err(Fault::Io(_))
        ));
        assert!(stopper.is_needed());
        drop(socket);
        assert!(!stopper.is_needed());
    }
}
