//! The guest agent, as far as a backup needs it: freezing the guest's file systems, and thawing them.
//!
//! Its protocol is QMP's without greeting, ids and events, and the other end is a program in the guest:
//! slow, absent, or hostile. So a conversation begins with guest-sync-delimited (QEMU's
//! docs/interop/qemu-ga.rst): the agent sends a byte that no JSON has, then the number that it was told,
//! and whatever came before that was meant for somebody else. Every wait has a deadline, and an answer
//! a size. Not the `qapi` crate's client: that one has no deadlines.

use std::io::{self, Read};
use std::mem;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

use super::deadline::Deadline;
use super::socket;
use crate::model::{Error, Kind, Result};

/// Ends what was begun before, in both directions.
const DELIMITER: u8 = 0xff;

/// More than any answer here takes.
const LONGEST: usize = 4096;

/// A conversation with a guest agent.
#[derive(Debug)]
pub struct Agent {
    socket: UnixStream,
    deadline: Deadline,
    /// Commands whose answers have not come. The agent does one after the other, however long it takes.
    owed: u32,
    /// What has come of the next line.
    line: Vec<u8>,
}

impl Agent {
    /// Connects and sees that the agent answers. `timeout` is for this and for freezing.
    pub fn connect(path: &Path, timeout: Duration) -> Result<Self> {
        let deadline = Deadline::after(timeout);
        let socket = socket::connect(path, deadline).map_err(|e| {
            let what = format!(
                "cannot reach the guest agent's socket {}: {e}",
                path.display()
            );
            Error::new(Kind::NotConnected, what).hint("is -o guest-agent= right?")
        })?;
        let mut agent = Self {
            socket,
            deadline,
            owed: 0,
            line: Vec::new(),
        };
        // Any number that a conversation before will not have had.
        let id =
            std::process::id().wrapping_mul(1000) + deadline.remaining().subsec_micros() % 1000;
        let command = json!({"execute": "guest-sync-delimited", "arguments": {"id": id}});
        agent.send(&[DELIMITER])?;
        agent.send(format!("{command}\n").as_bytes())?;
        loop {
            while agent.byte()? != DELIMITER {}
            if agent.answer()?["return"] == id {
                return Ok(agent);
            }
        }
    }

    /// Whether the guest's file systems are frozen, as far as the agent knows and says.
    pub fn is_frozen(&mut self) -> Result<bool> {
        let answer = self.execute("guest-fsfreeze-status")?;
        Ok(answer["return"] == "frozen")
    }

    /// Freezes the guest's file systems; how many.
    pub fn freeze(&mut self) -> Result<u64> {
        count(
            &self.execute("guest-fsfreeze-freeze")?,
            "guest-fsfreeze-freeze",
        )
    }

    /// Tells the agent to thaw the guest's file systems, also one that is still at an earlier command:
    /// it finds this one when it is done.
    pub fn tell_to_thaw(&mut self) -> Result<()> {
        self.tell("guest-fsfreeze-thaw")
    }

    /// Waits until the agent that was told to has thawed them; how many. Can be repeated after a silence.
    pub fn thawed(&mut self, timeout: Duration) -> Result<u64> {
        self.deadline = Deadline::after(timeout);
        count(&self.last_answer()?, "guest-fsfreeze-thaw")
    }

    fn execute(&mut self, command: &str) -> Result<Value> {
        self.tell(command)?;
        self.last_answer()
    }

    fn tell(&mut self, command: &str) -> Result<()> {
        self.send(format!("{}\n", json!({"execute": command})).as_bytes())?;
        self.owed += 1;
        Ok(())
    }

    /// The answer to the last command, past those to commands before it that come too late.
    fn last_answer(&mut self) -> Result<Value> {
        loop {
            let answer = self.answer()?;
            self.owed = self.owed.saturating_sub(1);
            if self.owed == 0 {
                return Ok(answer);
            }
        }
    }

    fn send(&self, bytes: &[u8]) -> Result<()> {
        match socket::send(&self.socket, bytes, self.deadline) {
            Ok(sent) if sent == bytes.len() => Ok(()),
            Ok(_) => Err(silent()),
            Err(e) => Err(broken(&e)),
        }
    }

    /// The next line, which must be an object.
    fn answer(&mut self) -> Result<Value> {
        loop {
            match self.byte()? {
                b'\n' if self.line.is_empty() => {}
                b'\n' => break,
                _ if self.line.len() == LONGEST => {
                    return Err(Error::new(Kind::Io, "the guest agent's answer has no end"));
                }
                byte => self.line.push(byte),
            }
        }
        serde_json::from_slice(&mem::take(&mut self.line))
            .map_err(|_| Error::new(Kind::Io, "the guest agent's answer is not JSON"))
    }

    /// One at a time: answers are short, and what follows may be of another conversation.
    fn byte(&mut self) -> Result<u8> {
        let mut byte = [0];
        loop {
            let left = self.deadline.remaining();
            if left.is_zero() {
                return Err(silent());
            }
            self.socket
                .set_read_timeout(Some(left))
                .map_err(|e| broken(&e))?;
            match self.socket.read(&mut byte) {
                Ok(0) => return Err(broken(&io::ErrorKind::UnexpectedEof.into())),
                Ok(_) => return Ok(byte[0]),
                Err(e) => match e.kind() {
                    io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => return Err(silent()),
                    io::ErrorKind::Interrupted => {}
                    _ => return Err(broken(&e)),
                },
            }
        }
    }
}

/// The number that a command was answered with.
fn count(answer: &Value, command: &str) -> Result<u64> {
    answer["return"].as_u64().ok_or_else(|| {
        let why = answer["error"]["desc"]
            .as_str()
            .unwrap_or("it said neither");
        Error::new(
            Kind::Io,
            format!("the guest agent refused {command}: {why:?}"),
        )
    })
}

fn silent() -> Error {
    Error::new(Kind::TimedOut, "the guest agent did not answer in time")
        .hint("does qemu-guest-agent run in the guest, and does nobody else use its socket?")
}

fn broken(error: &io::Error) -> Error {
    Error::new(
        Kind::NotConnected,
        format!("the guest agent's connection broke: {error}"),
    )
}
