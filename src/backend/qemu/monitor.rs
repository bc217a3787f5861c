//! The QMP commands that fleecefs uses, one method each, and QEMU's refusals as our errors.
//!
//! Commands without unions are the `qapi` crate's types. Those with unions (blockdev-add,
//! transaction …) and replies that hold what belongs to others are plain JSON: the crate's enums
//! would not know what the next QEMU adds.

use std::sync::Arc;
use std::time::Duration;

use qapi_qmp as qapi;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::disks::{Drive, Node};
use crate::model::{Error, Kind, Result};
use crate::qmp;

/// A connection to QEMU's monitor.
#[derive(Clone)]
pub(super) struct Monitor {
    client: Arc<qmp::Client>,
    timeout: Duration,
}

/// What a command that may find its object gone already did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Removed {
    /// It removed it, or began to.
    Now,
    /// There was nothing of that name.
    Before,
}

impl Monitor {
    pub(super) fn new(client: Arc<qmp::Client>, timeout: Duration) -> Self {
        Self { client, timeout }
    }

    pub(super) fn client(&self) -> &Arc<qmp::Client> {
        &self.client
    }

    pub(super) fn drives(&self) -> Result<Vec<Drive>> {
        self.call("query-block", json!({}))
    }

    pub(super) fn nodes(&self) -> Result<Vec<Node>> {
        self.call("query-named-block-nodes", json!({"flat": true}))
    }

    /// Adds a block node.
    pub(super) fn blockdev_add(&self, options: Value) -> Result<()> {
        self.done("blockdev-add", options)
    }

    pub(super) fn blockdev_del(&self, node: &str) -> Result<Removed> {
        let node_name = node.to_owned();
        removed(self.execute(&qapi::blockdev_del { node_name }))
    }

    /// Formats a node as qcow2, and waits for the job that does it.
    pub(super) fn create_qcow2(&self, job: &str, node: &str, size: u64) -> Result<()> {
        let mark = self.client.mark();
        let options = json!({"driver": "qcow2", "file": node, "size": size});
        self.done(
            "blockdev-create",
            json!({"job-id": job, "options": options}),
        )?;
        self.wait_job(mark, job, "concluded")?;
        let failure = self.job_error(job)?;
        self.execute(&qapi::job_dismiss { id: job.to_owned() })?;
        match failure {
            None => Ok(()),
            Some(text) => Err(refused("blockdev-create", &text)),
        }
    }

    /// Gets rid of a job of [`create_qcow2`](Self::create_qcow2) whose outcome is unknown. Such a job
    /// stays until it is dismissed.
    pub(super) fn discard_create(&self, job: &str) -> Result<()> {
        let mark = self.client.mark();
        let jobs = self.jobs()?;
        let Some(found) = jobs.iter().find(|j| j.id == job) else {
            return Ok(());
        };
        if found.status != "concluded" {
            self.wait_job(mark, job, "concluded")?;
        }
        self.execute(&qapi::job_dismiss { id: job.to_owned() })?;
        Ok(())
    }

    /// Does all of it at one instant, or nothing.
    pub(super) fn transaction(&self, actions: Vec<Value>) -> Result<()> {
        if actions.is_empty() {
            return Ok(());
        }
        self.done("transaction", json!({"actions": actions}))
    }

    pub(super) fn bitmap_add(&self, node: &str, name: &str, granularity: u64) -> Result<()> {
        // Disabled: an enabled one on the overlay would record scratch writes, and cannot be
        // exported.
        let arguments = json!({"node": node, "name": name, "granularity": granularity,
                               "persistent": false, "disabled": true});
        self.done("block-dirty-bitmap-add", arguments)
    }

    pub(super) fn bitmap_merge(&self, node: &str, target: &str, sources: Vec<Value>) -> Result<()> {
        let arguments = json!({"node": node, "target": target, "bitmaps": sources});
        self.done("block-dirty-bitmap-merge", arguments)
    }

    pub(super) fn bitmap_remove(&self, node: &str, name: &str) -> Result<Removed> {
        let arguments = json!({"node": node, "name": name});
        removed(self.done("block-dirty-bitmap-remove", arguments))
    }

    pub(super) fn nbd_server_start(&self, socket: &str) -> Result<()> {
        let address = json!({"type": "unix", "data": {"path": socket}});
        // 0: no limit; the default of 100 is little for many backups with many readers.
        let arguments = json!({"addr": address, "max-connections": 0});
        self.done("nbd-server-start", arguments)
    }

    pub(super) fn nbd_server_stop(&self) -> Result<()> {
        self.execute(&qapi::nbd_server_stop {}).map(drop)
    }

    /// Exports a node read-only over NBD, with the bitmaps given as (node, name).
    pub(super) fn export_add(
        &self,
        id: &str,
        node: &str,
        name: &str,
        bitmaps: &[(&str, &str)],
    ) -> Result<()> {
        let bitmaps: Vec<Value> = bitmaps
            .iter()
            .map(|(node, name)| json!({"node": node, "name": name}))
            .collect();
        let arguments = json!({"type": "nbd", "id": id, "node-name": node, "name": name,
                               "writable": false, "bitmaps": bitmaps});
        self.done("block-export-add", arguments)
    }

    /// Cuts off an export's clients and removes it. `query-block-exports` would say it is gone
    /// before it is; only the event is sure.
    pub(super) fn export_del(&self, id: &str) -> Result<Removed> {
        let mark = self.client.mark();
        let arguments = json!({"id": id, "mode": "hard"});
        let outcome = removed(self.done("block-export-del", arguments))?;
        if outcome == Removed::Now {
            self.wait(mark, "the end of an export", |event| {
                event.name == "BLOCK_EXPORT_DELETED" && event.data["id"] == id
            })?;
        }
        Ok(outcome)
    }

    /// Ends a job of either sort, whatever its state: one that stays when it is over, and one that
    /// goes by itself.
    pub(super) fn job_end(&self, id: &str) -> Result<()> {
        let mark = self.client.mark();
        if self.job_cancel_or_dismiss(id)? {
            return Ok(());
        }
        let status = |event: &qmp::Event| match event.data["status"].as_str() {
            Some("concluded") => Some(true),
            Some("null") => Some(false),
            _ => None,
        };
        let stays = self.client.wait_event(mark, self.timeout, |event| {
            let ours = event.name == "JOB_STATUS_CHANGE" && event.data["id"] == id;
            ours.then(|| status(event)).flatten()
        });
        stays.map_err(error)?;
        // One that goes by itself may have gone since.
        let dismissed = self.execute(&qapi::job_dismiss { id: id.to_owned() });
        removed(dismissed).map(drop)
    }

    /// Whether nothing is left to wait for.
    fn job_cancel_or_dismiss(&self, id: &str) -> Result<bool> {
        match self.execute(&qapi::job_cancel { id: id.to_owned() }) {
            Ok(_) => Ok(false),
            Err(e) if e.kind() == Kind::NotFound => Ok(true),
            Err(e) if e.message().contains("in state 'concluded'") => {
                removed(self.execute(&qapi::job_dismiss { id: id.to_owned() })).map(|_| true)
            }
            Err(e) => Err(e),
        }
    }

    pub(super) fn job_pause(&self, id: &str) -> Result<()> {
        // "Job already paused" is as it should be.
        match self.execute(&qapi::job_pause { id: id.to_owned() }) {
            Err(e) if e.message().contains("already paused") => Ok(()),
            outcome => outcome.map(drop),
        }
    }

    pub(super) fn job_resume(&self, id: &str) -> Result<()> {
        match self.execute(&qapi::job_resume { id: id.to_owned() }) {
            Err(e) if e.message().contains("not paused") => Ok(()),
            outcome => outcome.map(drop),
        }
    }

    /// Bytes a second; 0 is no limit.
    pub(super) fn job_speed(&self, id: &str, speed: u64) -> Result<()> {
        self.done("block-job-set-speed", json!({"device": id, "speed": speed}))
    }

    /// Ends a job that goes by itself when it is over, and waits until nothing is left of it.
    pub(super) fn job_cancel(&self, id: &str) -> Result<Removed> {
        let mark = self.client.mark();
        let outcome = removed(self.execute(&qapi::job_cancel { id: id.to_owned() }))?;
        if outcome == Removed::Now {
            self.wait_job(mark, id, "null")?;
        }
        Ok(outcome)
    }

    pub(super) fn jobs(&self) -> Result<Vec<Job>> {
        self.call("query-jobs", json!({}))
    }

    pub(super) fn exports(&self) -> Result<Vec<Export>> {
        self.call("query-block-exports", json!({}))
    }

    /// Whether a migration is under way.
    pub(super) fn migrating(&self) -> Result<bool> {
        let reply: Value = self.call("query-migrate", json!({}))?;
        let status = reply["status"].as_str().unwrap_or("none");
        Ok(!matches!(
            status,
            "none" | "completed" | "cancelled" | "failed"
        ))
    }

    /// The run state, in QEMU's words.
    pub(super) fn run_state(&self) -> Result<String> {
        let reply: Value = self.call("query-status", json!({}))?;
        Ok(reply["status"].as_str().unwrap_or_default().to_owned())
    }

    pub(super) fn cont(&self) -> Result<()> {
        self.execute(&qapi::cont {}).map(drop)
    }

    pub(super) fn name(&self) -> Result<Option<String>> {
        Ok(self.execute(&qapi::query_name {})?.name)
    }

    pub(super) fn uuid(&self) -> Result<String> {
        Ok(self.execute(&qapi::query_uuid {})?.UUID)
    }

    pub(super) fn quit(&self) -> Result<()> {
        self.execute(&qapi::quit {}).map(drop)
    }

    fn job_error(&self, id: &str) -> Result<Option<String>> {
        let jobs = self.jobs()?;
        Ok(jobs.into_iter().find(|j| j.id == id).and_then(|j| j.error))
    }

    fn wait_job(&self, mark: qmp::Mark, id: &str, status: &str) -> Result<()> {
        // Between these, the status flaps between paused and running with nearly every command.
        self.wait(mark, "the end of a job", |event| {
            event.name == "JOB_STATUS_CHANGE"
                && event.data["id"] == id
                && event.data["status"] == status
        })
    }

    fn wait(
        &self,
        mark: qmp::Mark,
        what: &str,
        wanted: impl Fn(&qmp::Event) -> bool,
    ) -> Result<()> {
        self.client
            .wait_event(mark, self.timeout, |event| wanted(event).then_some(()))
            .map_err(|e| error(e).during(format!("waiting for {what}")))
    }

    fn execute<C: qapi_spec::Command>(&self, command: &C) -> Result<C::Ok> {
        self.client.execute(command).map_err(error)
    }

    fn call<T: DeserializeOwned>(&self, command: &str, arguments: Value) -> Result<T> {
        self.client.call(command, arguments).map_err(error)
    }

    /// A command whose reply says nothing.
    fn done(&self, command: &str, arguments: Value) -> Result<()> {
        self.call::<Value>(command, arguments).map(drop)
    }
}

/// An entry of `query-jobs`.
#[derive(Debug, Deserialize)]
pub(super) struct Job {
    pub(super) id: String,
    #[serde(default)]
    pub(super) status: String,
    #[serde(default, rename = "current-progress")]
    pub(super) done: u64,
    #[serde(default, rename = "total-progress")]
    pub(super) total: u64,
    #[serde(default)]
    error: Option<String>,
}

impl Job {
    /// Why it failed, once it has.
    pub(super) fn error(&self) -> Option<&str> {
        self.error.as_deref()
    }
}

/// An entry of `query-block-exports`.
#[derive(Debug, Deserialize)]
pub(super) struct Export {
    pub(super) id: String,
}

/// QEMU's words for a name that it does not know, of an export, a job, a node or a bitmap.
fn is_gone(text: &str) -> bool {
    (text.starts_with("Export '") && text.ends_with("is not found"))
        || text.starts_with("Job not found")
        || (text.starts_with("Block job '") && text.ends_with("not found"))
        || text.starts_with("Failed to find node with node-name")
        || (text.starts_with("Dirty bitmap '") && text.ends_with("not found"))
        || text.starts_with("Cannot find device='' nor node-name=")
}

fn removed<T>(outcome: Result<T>) -> Result<Removed> {
    match outcome {
        Ok(_) => Ok(Removed::Now),
        Err(e) if e.kind() == Kind::NotFound => Ok(Removed::Before),
        Err(e) => Err(e),
    }
}

/// A refusal of QEMU, by its text: the classes do not tell.
pub(super) fn refused(command: &str, text: &str) -> Error {
    let has = |part: &str| text.contains(part);
    let kind = if is_gone(text) {
        Kind::NotFound
    } else if has("No space left") || has("Disk quota exceeded") {
        Kind::NoSpace
    } else if has("in use") || has("is busy") || has("already running") || has("lock") {
        Kind::Busy
    } else if has("Permission denied") || has("Operation not permitted") {
        Kind::NotPermitted
    } else if has("No such file") {
        Kind::NotFound
    } else if has("Can't store persistent") || has("Cannot store dirty") || has("not supported") {
        Kind::Unsupported
    } else {
        Kind::Io
    };
    Error::new(kind, format!("QEMU refuses {command}: {text}"))
}

/// A failed call, for users.
pub(super) fn error(error: qmp::Error) -> Error {
    match &error {
        qmp::Error::Command { command, desc, .. } => refused(command, desc),
        qmp::Error::InUse { .. } => Error::new(Kind::Busy, error.to_string()).hint(
            "a QMP socket serves one client at a time: give QEMU a second -qmp socket for fleecefs",
        ),
        qmp::Error::Timeout { .. } => Error::new(Kind::TimedOut, error.to_string())
            .hint("the domain may be hung; -o timeout= sets how long to wait"),
        qmp::Error::Disconnected { .. } => Error::new(Kind::NotConnected, error.to_string())
            .hint("the domain is gone; start it again"),
        _ => Error::new(Kind::Io, error.to_string()),
    }
}
