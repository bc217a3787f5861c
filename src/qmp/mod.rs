//! A QMP client: one connection to the monitor of a QEMU or a qemu-storage-daemon.
//!
//! Why not the synchronous client of the `qapi` crate: there, an event or an enum value newer than
//! its schema ends the session, end of file in the greeting panics, replies carry no id, events
//! are seen only while a reply is awaited, and nothing has a deadline. So its command and reply
//! types are taken, and the reading is done here, around three rules:
//!
//! - **JSON first, types later.** A line becomes a [`serde_json::Value`], is routed as greeting,
//!   event or reply, and only the one who asked turns it into a type. What QEMU adds in later
//!   releases (fields, events, enum values) passes by.
//! - **Every wait has a deadline**: connecting, the greeting, sending, a reply, an event.
//! - **No event is missed in silence.** Events are numbered and kept for a while. Take a
//!   [`Mark`], send the command, then wait for the event from that mark on; if the event has
//!   meanwhile been pushed out, that is [`Error::EventsLost`].
//!
//! Life of a command: [`Client::execute`] takes an id, registers it, writes one line and sleeps on
//! the session's condition variable; the reader thread finds the id in a line, stores the reply
//! and wakes everybody; the caller takes its reply out. A caller whose deadline passes withdraws
//! the id, so that a late reply is nobody's.
//!
//! Out-of-band execution is not used: nothing here has to overtake a running command.

mod agent;
mod client;
mod connection;
mod deadline;
mod error;
mod events;
mod session;
mod socket;
mod wire;

pub use agent::Agent;
pub use client::{Client, GREETING_TIMEOUT};
pub use error::{Error, Result};
pub use events::{Event, Mark};
pub use socket::Peer;
pub use wire::{MAX_LINE, Version};
