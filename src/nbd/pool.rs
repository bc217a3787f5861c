//! Several connections to one export, for several threads that read at once.
//!
//! A thread takes the connection that was used last (its buffers and the server's coroutine are
//! the warmest), or opens one while there are fewer than the maximum, or waits. A connection on
//! which something went wrong is dropped. If the server had hung up, the read is tried once more
//! on a new connection: the exports are frozen, so it reads the same bytes or fails again.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::socket::{Deadline, Socket, Stopper};
use super::{Connection, Endpoint, Error, Fault, Operation};

/// A pool of data connections; see the module's comment.
#[derive(Debug)]
pub struct Pool {
    endpoint: Endpoint,
    max_connections: usize,
    timeout: Duration,
    state: Mutex<State>,
    /// An idle connection or a free place for one has come up, or the pool was closed.
    freed: Condvar,
    bytes_read: AtomicU64,
}

#[derive(Debug, Default)]
struct State {
    closed: bool,
    idle: Vec<Connection>,
    /// Places taken: connections idle, in use, and being opened.
    open: usize,
    /// Threads that wait for a connection. std's Condvar enters the kernel at every notification,
    /// wanted or not, which a read need not pay for.
    waiting: usize,
    /// For all connected sockets, so that `close` reaches those in use.
    stoppers: Vec<Stopper>,
    /// Of the export, as the first connection was told.
    size: Option<u64>,
}

impl Pool {
    /// A pool of at most `max_connections` (at least one), none of which is opened yet. `timeout`
    /// bounds each read as a whole, with all its waiting, connecting and trying again.
    pub fn new(endpoint: Endpoint, max_connections: usize, timeout: Duration) -> Self {
        Self {
            endpoint,
            max_connections: max_connections.max(1),
            timeout,
            state: Mutex::default(),
            freed: Condvar::new(),
            bytes_read: AtomicU64::new(0),
        }
    }

    /// Fills `buffer` with the bytes from `offset` on. The whole range must lie within the export.
    /// After an error the buffer's content is unspecified.
    pub fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), Error> {
        let deadline = Deadline::after(self.timeout);
        let operation = Operation::Read {
            offset,
            length: buffer.len() as u64,
        };
        let mut lease = self.lease(deadline, operation)?;
        let mut result = lease.read(deadline, operation, offset, buffer);
        if result.as_ref().is_err_and(Error::is_connection_lost) {
            log::debug!("{}: trying once more", self.endpoint.export);
            lease.renew(deadline)?;
            result = lease.read(deadline, operation, offset, buffer);
        }
        if result.is_ok() {
            let length = buffer.len() as u64;
            self.bytes_read.fetch_add(length, Ordering::Relaxed);
        }
        result
    }

    /// Payload bytes of all successful reads so far.
    pub fn bytes_read(&self) -> u64 {
        self.bytes_read.load(Ordering::Relaxed)
    }

    /// Ends all reads, those in progress included, with [`Fault::Closed`]; does not wait for them.
    pub fn close(&self) {
        let mut state = self.lock();
        state.closed = true;
        // Connections that nobody uses say goodbye by being dropped, outside the lock; the others
        // are cut off.
        let idle = std::mem::take(&mut state.idle);
        state.open -= idle.len();
        let stoppers = std::mem::take(&mut state.stoppers);
        drop(state);
        drop(idle);
        stoppers.iter().for_each(Stopper::stop);
        self.freed.notify_all();
    }

    /// Waits for a connection or for a place to open one.
    fn lease(&self, deadline: Deadline, operation: Operation) -> Result<Lease<'_>, Error> {
        let mut state = self.lock();
        loop {
            if state.closed {
                return Err(Fault::Closed.at(&self.endpoint.export, operation));
            }
            let idle = state.idle.pop();
            if idle.is_some() || state.open < self.max_connections {
                state.open += usize::from(idle.is_none());
                drop(state);
                let fresh = idle.is_none();
                let mut lease = Lease {
                    pool: self,
                    connection: idle,
                };
                if fresh {
                    lease.renew(deadline)?;
                }
                return Ok(lease);
            }
            let left = deadline
                .remaining()
                .map_err(|fault| fault.at(&self.endpoint.export, operation))?;
            state.waiting += 1;
            let woken = self.freed.wait_timeout(state, left);
            state = woken.unwrap_or_else(PoisonError::into_inner).0;
            state.waiting -= 1;
        }
    }

    fn connect(&self, deadline: Deadline) -> Result<Connection, Error> {
        let socket = Socket::connect(&self.endpoint.socket, deadline, || !self.lock().closed)
            .map_err(|fault| self.error(fault, Operation::Connect))?;
        self.register(&socket)
            .and_then(|()| {
                Connection::negotiate(socket, &self.endpoint.export, self.timeout, deadline)
            })
            .and_then(|connection| self.check_size(connection))
            .map_err(|fault| self.error(fault, Operation::Handshake))
    }

    /// Puts the socket within reach of `close`, before anything is waited for on it.
    fn register(&self, socket: &Socket) -> Result<(), Fault> {
        let mut state = self.lock();
        if state.closed {
            return Err(Fault::Closed);
        }
        state.stoppers.retain(Stopper::is_needed);
        state.stoppers.push(socket.stopper());
        Ok(())
    }

    /// A frozen disk does not change its size: under the same name there is another disk now.
    fn check_size(&self, connection: Connection) -> Result<Connection, Fault> {
        let size = connection.size();
        let first = *self.lock().size.get_or_insert(size);
        if size == first {
            Ok(connection)
        } else {
            let text = format!("an export of {first} bytes now has {size}");
            Err(Fault::Protocol(text))
        }
    }

    /// A closed pool explains every other fault. Takes the lock.
    fn error(&self, fault: Fault, operation: Operation) -> Error {
        let closed = self.lock().closed;
        let fault = if closed { Fault::Closed } else { fault };
        fault.at(&self.endpoint.export, operation)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // No code that holds the lock can leave the state half changed.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A place in the pool, and the connection in it while it is good.
struct Lease<'a> {
    pool: &'a Pool,
    connection: Option<Connection>,
}

impl Lease<'_> {
    fn read(
        &mut self,
        deadline: Deadline,
        operation: Operation,
        offset: u64,
        buffer: &mut [u8],
    ) -> Result<(), Error> {
        self.connection
            .as_mut()
            .ok_or(Fault::Closed)
            .and_then(|connection| connection.read_before(deadline, offset, buffer))
            .map_err(|fault| self.pool.error(fault, operation))
    }

    /// Puts a new connection in place of the present one, if any.
    fn renew(&mut self, deadline: Deadline) -> Result<(), Error> {
        self.connection = None;
        self.connection = Some(self.pool.connect(deadline)?);
        Ok(())
    }
}

impl Drop for Lease<'_> {
    fn drop(&mut self) {
        let connection = self.connection.take().filter(Connection::is_usable);
        let mut state = self.pool.lock();
        match connection {
            Some(connection) if !state.closed => state.idle.push(connection),
            _ => state.open -= 1,
        }
        let waited_for = state.waiting > 0;
        drop(state);
        if waited_for {
            self.pool.freed.notify_one();
        }
    }
}
