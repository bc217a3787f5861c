//! What can go wrong between this process and a monitor.
//!
//! A refusal by QEMU ([`Error::Command`]) and a failure of the line are kept apart, because only
//! after a refusal does the caller know that the command had no effect.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

/// The result of talking to a monitor.
pub type Result<T> = std::result::Result<T, Error>;

/// Why talking to a monitor failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The path exists, and is no socket. The kernel says "connection refused" to both this and a
    /// socket that nobody listens on.
    #[error("{} is not a socket", path.display())]
    NotASocket {
        /// The path that was given.
        path: PathBuf,
    },
    /// The connection could not be made.
    #[error("cannot connect to {}: {source}", path.display())]
    Connect {
        /// The path that was given.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// Connected or queued, but no greeting came: a monitor serves one client at a time and lets
    /// the next one wait in its backlog. (A QEMU whose main loop hangs looks the same.)
    #[error(
        "the monitor {} gave no greeting within {waited:?}: another client holds it",
        path.display()
    )]
    InUse {
        /// The path of the monitor.
        path: PathBuf,
        /// How long the greeting was awaited.
        waited: Duration,
    },
    /// QEMU refused the command.
    #[error("{command}: {desc}")]
    Command {
        /// The command's name.
        command: String,
        /// QEMU's error class, mostly `GenericError`.
        class: String,
        /// QEMU's own sentence.
        desc: String,
    },
    /// No answer, or no matching event, before the deadline. Whether the command took effect is
    /// not known. The session goes on, unless half a command was sent.
    #[error("timed out waiting for {waiting_for}")]
    Timeout {
        /// The command's name, or "an event".
        waiting_for: String,
    },
    /// The session is over. Every later call says this at once.
    #[error("the monitor is disconnected: {reason}")]
    Disconnected {
        /// What ended the session.
        reason: String,
    },
    /// The command cannot be written as JSON. Nothing was sent.
    #[error("{command}: the arguments cannot be encoded: {reason}")]
    Encode {
        /// The command's name.
        command: String,
        /// What is wrong with the arguments.
        reason: String,
    },
    /// QEMU carried the command out, and its reply is not of the expected type.
    #[error("{command}: unexpected reply: {reason}")]
    Decode {
        /// The command's name.
        command: String,
        /// What is wrong with the reply.
        reason: String,
    },
    /// Events after the mark are no longer kept. Take a new mark and query the state instead.
    #[error("{missed} events were lost: more came than are kept")]
    EventsLost {
        /// How many events after the mark are gone.
        missed: u64,
    },
}
