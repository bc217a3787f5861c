//! A minimal QMP client of the tests' own, so that what fleecefs did is judged by something else.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

use super::tools::{DEADLINE, eventually};

/// A QMP session.
pub struct Qmp {
    stream: BufReader<UnixStream>,
    events: Vec<Value>,
}

impl Qmp {
    /// Connects and takes part in the greeting; the socket may still have to appear.
    pub fn connect(path: &Path) -> Self {
        let stream = eventually("a QMP socket", DEADLINE, || UnixStream::connect(path).ok());
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        let mut qmp = Self {
            stream: BufReader::new(stream),
            events: Vec::new(),
        };
        let greeting = qmp.receive();
        assert!(greeting.get("QMP").is_some(), "not a greeting: {greeting}");
        qmp.cmd("qmp_capabilities", json!({}));
        qmp
    }

    fn receive(&mut self) -> Value {
        let mut line = String::new();
        let length = self.stream.read_line(&mut line).expect("an answer of QEMU");
        assert!(length > 0, "QEMU closed the QMP connection");
        serde_json::from_str(&line).expect("JSON")
    }

    /// Runs a command: its return value, or the error's text.
    pub fn try_cmd(&mut self, execute: &str, arguments: Value) -> Result<Value, String> {
        let mut line = json!({"execute": execute, "arguments": arguments}).to_string();
        line.push('\n');
        self.stream.get_mut().write_all(line.as_bytes()).unwrap();
        loop {
            let mut answer = self.receive();
            if answer.get("event").is_some() {
                self.events.push(answer);
            } else if let Some(error) = answer.get("error") {
                return Err(error["desc"].as_str().unwrap().to_owned());
            } else {
                return Ok(answer["return"].take());
            }
        }
    }

    /// Runs a command that must work.
    pub fn cmd(&mut self, execute: &str, arguments: Value) -> Value {
        self.try_cmd(execute, arguments)
            .unwrap_or_else(|e| panic!("{execute}: {e}"))
    }

    /// The events so far, with those that just came in; forgets them.
    pub fn events(&mut self) -> Vec<Value> {
        self.cmd("query-version", json!({}));
        std::mem::take(&mut self.events)
    }

    /// Waits for an event of that name among those not yet taken, and takes it.
    pub fn wait_event(&mut self, name: &str, deadline: Duration) -> Value {
        eventually(name, deadline, || {
            self.cmd("query-version", json!({}));
            let at = self.events.iter().position(|e| e["event"] == name)?;
            Some(self.events.remove(at))
        })
    }
}
