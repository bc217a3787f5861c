//! One connection for data: reads in simple replies, one at a time.
//!
//! Structured replies are not negotiated here. They would let the server mark holes within a read,
//! but whoever reads knows the holes from [`block_status`](super::block_status) and does not ask;
//! a simple reply is a header and then the bytes, which the kernel copies to where the caller
//! wants them.

use std::time::Duration;

use super::handshake::{self, Granted};
use super::socket::{Deadline, Socket};
use super::{Endpoint, Error, Fault, Operation, wire};

/// An open export; see the module's comment. Dropping it says goodbye to the server.
#[derive(Debug)]
pub struct Connection {
    export: String,
    socket: Socket,
    granted: Granted,
    timeout: Duration,
    cookie: u64,
    /// In step with the server: no fault has ended it.
    usable: bool,
}

impl Connection {
    /// Connects and opens the export. `timeout` bounds this and every later operation as a whole.
    pub fn open(endpoint: &Endpoint, timeout: Duration) -> Result<Self, Error> {
        let deadline = Deadline::after(timeout);
        let socket = Socket::connect(&endpoint.socket, deadline, || true)
            .map_err(|fault| fault.at(&endpoint.export, Operation::Connect))?;
        Self::negotiate(socket, &endpoint.export, timeout, deadline)
            .map_err(|fault| fault.at(&endpoint.export, Operation::Handshake))
    }

    /// The second half of [`open`](Self::open), on a connected socket.
    pub(super) fn negotiate(
        mut socket: Socket,
        export: &str,
        timeout: Duration,
        deadline: Deadline,
    ) -> Result<Self, Fault> {
        let granted = handshake::negotiate(&mut socket, export, &[], deadline)?;
        Ok(Self {
            export: export.to_owned(),
            socket,
            granted,
            timeout,
            cookie: 0,
            usable: true,
        })
    }

    /// Size of the export in bytes.
    pub fn size(&self) -> u64 {
        self.granted.size
    }

    /// Whether another operation can succeed: false after any fault but an error that the server
    /// itself answered.
    pub fn is_usable(&self) -> bool {
        self.usable
    }

    /// Fills `buffer` with the bytes from `offset` on, in as many requests as the server's maximum
    /// demands. The whole range must lie within the export. After an error the buffer's content is
    /// unspecified.
    pub fn read_at(&mut self, offset: u64, buffer: &mut [u8]) -> Result<(), Error> {
        let operation = Operation::Read {
            offset,
            length: buffer.len() as u64,
        };
        self.read_before(Deadline::after(self.timeout), offset, buffer)
            .map_err(|fault| fault.at(&self.export, operation))
    }

    /// [`read_at`](Self::read_at) with a deadline that began earlier.
    pub(super) fn read_before(
        &mut self,
        deadline: Deadline,
        mut offset: u64,
        buffer: &mut [u8],
    ) -> Result<(), Fault> {
        if !self.usable {
            return Err(Fault::Closed);
        }
        let size = self.granted.size;
        if offset > size || buffer.len() as u64 > size - offset {
            return Err(Fault::PastEnd { size });
        }
        // An empty buffer makes no chunks, which is right: a read of no bytes is undefined
        // ("Request types").
        for part in buffer.chunks_mut(self.granted.max_request as usize) {
            self.request(deadline, offset, part)
                .inspect_err(|fault| self.usable = fault.leaves_connection_usable())?;
            offset += part.len() as u64;
        }
        Ok(())
    }

    /// One request and its reply: two system calls if the payload arrives with its header, three
    /// if the server is still sending.
    fn request(&mut self, deadline: Deadline, offset: u64, part: &mut [u8]) -> Result<(), Fault> {
        self.cookie += 1;
        let length = part.len() as u32; // at most max_request
        let request = wire::request(wire::CMD_READ, self.cookie, offset, length);
        self.socket.send(&request, deadline)?;

        let mut header = [0; wire::REPLY_LENGTH];
        let got = self.socket.receive_reply(&mut header, part, deadline)?;
        match wire::reply(&header, self.cookie)? {
            wire::Reply::Simple { errno: 0 } => {
                let rest = part.get_mut(got..).unwrap_or_default();
                self.socket.receive(rest, deadline)
            }
            wire::Reply::Simple { errno } if got == 0 => Err(Fault::Server {
                errno,
                message: String::new(),
            }),
            wire::Reply::Simple { .. } => Err(Fault::protocol("bytes after an error reply")),
            wire::Reply::Chunk { .. } => Err(Fault::protocol("a structured reply, unasked")),
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        // Politeness only ("NBD_CMD_DISC"); the close that follows says the same.
        if self.usable {
            let goodbye = wire::request(wire::CMD_DISC, self.cookie + 1, 0, 0);
            self.socket.try_send(&goodbye);
        }
    }
}
