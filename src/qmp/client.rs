//! Commands and events, as the rest of the crate uses them.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use qapi_spec::Command;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::connection::Connection;
use super::deadline::Deadline;
use super::wire::{self, Reply};
use super::{Error, Event, Mark, Peer, Result, Version};

/// How long a monitor may take to greet. QEMU greets from its main loop, within milliseconds,
/// unless another client holds the monitor.
pub const GREETING_TIMEOUT: Duration = Duration::from_secs(1);

/// A session with a monitor. To be shared between threads by reference; each may call at any time.
pub struct Client {
    connection: Connection,
    version: Version,
    timeout: Duration,
    last_id: AtomicU64,
    commands_sent: AtomicU64,
}

impl Client {
    /// Connects to the monitor at `path`. `timeout` is the deadline of each later call.
    pub fn connect(path: impl AsRef<Path>, timeout: Duration) -> Result<Self> {
        Self::connect_within(GREETING_TIMEOUT, path, timeout)
    }

    /// The same, with `greeting_timeout` for connecting and the greeting together.
    pub fn connect_within(
        greeting_timeout: Duration,
        path: impl AsRef<Path>,
        timeout: Duration,
    ) -> Result<Self> {
        let path = path.as_ref();
        let in_use = || Error::InUse {
            path: path.into(),
            waited: greeting_timeout,
        };
        let deadline = Deadline::after(greeting_timeout);
        let connection = Connection::open(path, deadline)?.ok_or_else(in_use)?;
        let version = connection.session.greeting(deadline)?.ok_or_else(in_use)?;
        let client = Self {
            connection,
            version,
            timeout,
            last_id: AtomicU64::new(0),
            commands_sent: AtomicU64::new(0),
        };
        client.execute(&qapi_qmp::qmp_capabilities { enable: None })?;
        Ok(client)
    }

    /// The version in QEMU's greeting.
    pub fn version(&self) -> Version {
        self.version
    }

    /// The process at the other end.
    pub fn peer(&self) -> Peer {
        self.connection.peer
    }

    /// Carries out a command whose reply the `qapi` types can hold in any version of QEMU: one
    /// without enums and unions that grow. Elsewhere use [`Client::call`].
    pub fn execute<C: Command>(&self, command: &C) -> Result<C::Ok> {
        self.execute_within(self.timeout, command)
    }

    /// The same, with a deadline of its own.
    pub fn execute_within<C: Command>(&self, timeout: Duration, command: &C) -> Result<C::Ok> {
        // The types serialise to the arguments alone; name and id are put around them here.
        let arguments = serde_json::to_value(command).map_err(|error| Error::Encode {
            command: C::NAME.into(),
            reason: error.to_string(),
        })?;
        self.call_within(timeout, C::NAME, arguments)
    }

    /// Carries out a command by name, with the reply in a type of the caller's that holds no more
    /// than is needed. Null stands for no arguments.
    pub fn call<T: DeserializeOwned>(&self, command: &str, arguments: Value) -> Result<T> {
        self.call_within(self.timeout, command, arguments)
    }

    /// The same, with a deadline of its own.
    pub fn call_within<T: DeserializeOwned>(
        &self,
        timeout: Duration,
        command: &str,
        arguments: Value,
    ) -> Result<T> {
        let deadline = Deadline::after(timeout);
        let undecodable = |reason| Error::Decode {
            command: command.into(),
            reason,
        };
        let id = self.last_id.fetch_add(1, Ordering::Relaxed) + 1;
        let reply = self.connection.session.await_reply(id);
        let line = wire::request(command, arguments, id);
        self.connection.send(command, &line, deadline)?;
        self.commands_sent.fetch_add(1, Ordering::Relaxed);
        match reply.wait(deadline)? {
            Some(Reply::Return(value)) => {
                serde_json::from_value(value).map_err(|error| undecodable(error.to_string()))
            }
            Some(Reply::Unreadable(reason)) => Err(undecodable(reason)),
            Some(Reply::Refused { class, desc }) => {
                log::debug!("{command} refused: {class}: {desc}");
                Err(Error::Command {
                    command: command.into(),
                    class,
                    desc,
                })
            }
            None => Err(Error::Timeout {
                waiting_for: command.into(),
            }),
        }
    }

    /// How many commands were sent, the `qmp_capabilities` of connecting included. For tests that
    /// assert what an operation costs.
    pub fn commands_sent(&self) -> u64 {
        self.commands_sent.load(Ordering::Relaxed)
    }

    /// The place after the newest event. To be taken before the command that causes the event.
    pub fn mark(&self) -> Mark {
        self.connection.session.mark()
    }

    /// Waits for the first event after `mark` for which `matches` gives something. `matches` may
    /// use this client.
    pub fn wait_event<T>(
        &self,
        mark: Mark,
        timeout: Duration,
        mut matches: impl FnMut(&Event) -> Option<T>,
    ) -> Result<T> {
        let deadline = Deadline::after(timeout);
        let mut position = mark;
        let mut last = None;
        while let Some(event) = self.connection.session.event(position, deadline)? {
            if let Some(found) = matches(&event) {
                return Ok(found);
            }
            position = event.mark();
            // What came in time counts, however late it is looked at; but a flood of other events
            // must not carry the wait beyond its deadline.
            if deadline.has_passed() && position >= *last.get_or_insert_with(|| self.mark()) {
                break;
            }
        }
        Err(Error::Timeout {
            waiting_for: "an event".into(),
        })
    }

    /// The first event after `mark`; none if there was none within `timeout`. To follow all
    /// events, go on from [`Event::mark`]; after [`Error::EventsLost`], from [`Client::mark`],
    /// having queried the state anew.
    pub fn next_event(&self, mark: Mark, timeout: Duration) -> Result<Option<Arc<Event>>> {
        self.connection
            .session
            .event(mark, Deadline::after(timeout))
    }

    /// Whether the session goes on, as far as is known.
    pub fn is_connected(&self) -> bool {
        self.connection.session.check_alive().is_ok()
    }

    /// Ends the session. All who wait, and all later calls, get [`Error::Disconnected`] at once.
    /// Dropping the client does the same.
    pub fn close(&self) {
        self.connection.close();
    }
}

impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Client")
            .field("version", &self.version)
            .field("peer", &self.connection.peer)
            .field("connected", &self.is_connected())
            .finish_non_exhaustive()
    }
}
