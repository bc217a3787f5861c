//! What can go wrong with an NBD peer, told apart by what the caller can do about it.

use std::fmt;
use std::io;

use super::wire;

/// A failed operation: on which export, while doing what, and what happened.
///
/// The text is complete in itself, since it ends up in `last-error` and the log, where no chain of
/// sources is seen; so there is no `source()`.
#[derive(Debug, thiserror::Error)]
#[error("NBD export {export:?}: {operation}: {fault}")]
pub struct Error {
    /// The export's name.
    pub export: String,
    /// What was being done.
    pub operation: Operation,
    /// What happened.
    pub fault: Fault,
}

impl Error {
    /// The server went away: another connection may well work. A peer that is merely slow
    /// ([`Fault::Timeout`]) or that lies ([`Fault::Protocol`]) does not count; neither gets better
    /// by asking again.
    pub fn is_connection_lost(&self) -> bool {
        matches!(self.fault, Fault::Io(_))
    }
}

/// What was being done when it failed; offsets and lengths in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// Reaching the socket.
    Connect,
    /// Choosing the export, up to the server's consent.
    Handshake,
    /// Reading data.
    Read {
        /// First byte asked for.
        offset: u64,
        /// How many bytes.
        length: u64,
    },
    /// Asking for block status.
    BlockStatus {
        /// First byte asked about.
        offset: u64,
    },
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Connect => write!(f, "connect"),
            Self::Handshake => write!(f, "handshake"),
            Self::Read { offset, length } => write!(f, "read of {length} bytes at {offset}"),
            Self::BlockStatus { offset } => write!(f, "block status at {offset}"),
        }
    }
}

/// What happened. Only after [`Server`](Self::Server) and [`PastEnd`](Self::PastEnd) is the
/// connection still in step with its peer; after any other it is of no more use.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    /// The socket failed, or the server closed it.
    #[error("{0}")]
    Io(io::Error),
    /// It took longer than the time allowed.
    #[error("no answer in time")]
    Timeout,
    /// The peer broke the protocol; the text says how.
    #[error("the server broke the protocol: {0}")]
    Protocol(String),
    /// The server refused something during the handshake, such as an unknown export.
    #[error("the server refused {}: {}", wire::option_name(*option), refusal(*reply, message))]
    Refused {
        /// `NBD_OPT_*`: what was asked for.
        option: u32,
        /// `NBD_REP_ERR_*`: why not.
        reply: u32,
        /// The server's words, possibly none.
        message: String,
    },
    /// The server answered a command with an error; the connection stays usable.
    #[error("the server answered {}", answer(*errno, message))]
    Server {
        /// An errno with Linux' numbers (proto.md, "Error values").
        errno: u32,
        /// The server's words, possibly none.
        message: String,
    },
    /// The range does not lie within the export; nothing was sent.
    #[error("not within the export's {size} bytes")]
    PastEnd {
        /// The export's size in bytes.
        size: u64,
    },
    /// Our side has closed the connection or the pool.
    #[error("the connection was closed")]
    Closed,
}

impl Fault {
    /// Adds the context that only the caller of the wire code knows.
    pub(super) fn at(self, export: &str, operation: Operation) -> Error {
        Error {
            export: export.to_owned(),
            operation,
            fault: self,
        }
    }

    /// The server closed its end where more was due.
    pub(super) fn disconnected() -> Self {
        let text = "the server closed the connection";
        Self::Io(io::Error::new(io::ErrorKind::UnexpectedEof, text))
    }

    pub(super) fn protocol(text: impl Into<String>) -> Self {
        Self::Protocol(text.into())
    }

    /// Whether the bytes on the wire are still in step, so that another command can follow.
    pub(super) fn leaves_connection_usable(&self) -> bool {
        matches!(self, Self::Server { .. } | Self::PastEnd { .. })
    }
}

fn refusal(reply: u32, message: &str) -> String {
    let name = wire::reply_name(reply);
    if message.is_empty() {
        name
    } else {
        format!("{message:?} ({name})")
    }
}

fn answer(errno: u32, message: &str) -> String {
    let error = i32::try_from(errno).map_or_else(
        |_| format!("errno {errno}"),
        |n| io::Error::from_raw_os_error(n).to_string(),
    );
    if message.is_empty() {
        error
    } else {
        format!("{error}: {message:?}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_text_is_complete() {
        let read = Operation::Read {
            offset: 4096,
            length: 512,
        };
        let server = Fault::Server {
            errno: 5,
            message: "disk\nbroken".into(),
        };
        // The server's words are quoted: they must not forge lines of a log.
        assert_eq!(
            server.at("vda", read).to_string(),
            "NBD export \"vda\": read of 512 bytes at 4096: the server answered \
             Input/output error (os error 5): \"disk\\nbroken\""
        );
        let refused = Fault::Refused {
            option: wire::OPT_GO,
            reply: wire::REP_ERR_UNKNOWN,
            message: String::new(),
        };
        assert_eq!(
            refused.at("vda", Operation::Handshake).to_string(),
            "NBD export \"vda\": handshake: the server refused NBD_OPT_GO: NBD_REP_ERR_UNKNOWN"
        );
    }
}
