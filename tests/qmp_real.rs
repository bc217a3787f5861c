//! The QMP client against real monitors: that of qemu-storage-daemon and that of QEMU.
//!
//! Where a program is missing its tests are skipped and say so; with FLEECEFS_TESTS_STRICT set, as
//! in CI, they fail.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use fleecefs::qmp::{Client, Error, Version};
use qapi_qmp::{query_status, query_version};
use serde_json::{Value, json};

const TIMEOUT: Duration = Duration::from_secs(20);

/// A process with a monitor; ended with the value.
struct Monitor {
    process: Child,
    path: PathBuf,
    dir: tempfile::TempDir,
}

impl Monitor {
    fn storage_daemon() -> Option<Self> {
        Self::start("qemu-storage-daemon", |path| {
            vec![
                "--chardev".into(),
                format!("socket,path={path},server=on,wait=off,id=m"),
                "--monitor".into(),
                "chardev=m,mode=control".into(),
            ]
        })
    }

    fn qemu() -> Option<Self> {
        Self::start("qemu-system-x86_64", |path| {
            let fixed = "-machine none -nodefaults -display none -qmp";
            let mut arguments: Vec<String> = fixed.split(' ').map(Into::into).collect();
            arguments.push(format!("unix:{path},server=on,wait=off"));
            arguments
        })
    }

    /// None if there is no such program.
    fn start(program: &str, arguments: impl FnOnce(&str) -> Vec<String>) -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("qmp");
        let started = Command::new(program)
            .args(arguments(path.to_str().unwrap()))
            .stdin(Stdio::null())
            .spawn();
        let process = match started {
            Ok(process) => process,
            Err(error) if std::env::var_os("FLEECEFS_TESTS_STRICT").is_none() => {
                eprintln!("skipped: {program}: {error}");
                return None;
            }
            Err(error) => panic!("{program}: {error}"),
        };
        let monitor = Self { process, path, dir };
        // There is no other sign that it listens than that it can be connected to.
        let begun = Instant::now();
        while !monitor.path.exists() {
            assert!(begun.elapsed() < TIMEOUT, "{program} does not start");
            std::thread::sleep(Duration::from_millis(10));
        }
        Some(monitor)
    }

    /// Connects; again while the socket is bound but not yet listened on.
    fn client(&self) -> Client {
        let begun = Instant::now();
        loop {
            match Client::connect_within(TIMEOUT, &self.path, TIMEOUT) {
                Err(Error::Connect { source, .. })
                    if source.kind() == std::io::ErrorKind::ConnectionRefused
                        && begun.elapsed() < TIMEOUT => {}
                result => return result.unwrap(),
            }
        }
    }

    fn is_peer_of(&self, client: &Client) -> bool {
        u32::try_from(client.peer().pid).unwrap() == self.process.id()
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

#[test]
fn the_storage_daemon_answers_and_quits() {
    let Some(mut daemon) = Monitor::storage_daemon() else {
        return;
    };
    let client = daemon.client();
    assert!(daemon.is_peer_of(&client));
    let version = client.execute(&query_version {}).unwrap().qemu;
    assert_eq!(i64::from(client.version().major), version.major);
    assert_eq!(i64::from(client.version().micro), version.micro);
    let nodes: Vec<Value> = client
        .call("query-named-block-nodes", json!({"flat": true}))
        .unwrap();
    assert!(nodes.is_empty());

    match client.call::<Value>("query-status", Value::Null) {
        Err(Error::Command { class, .. }) => assert_eq!(class, "CommandNotFound"),
        other => panic!("{other:?}"),
    }
    match client.call::<Value>("blockdev-del", json!({"node-name": "x"})) {
        Err(Error::Command { desc, .. }) => {
            assert_eq!(desc, "Failed to find node with node-name='x'");
        }
        other => panic!("{other:?}"),
    }

    client.call::<Value>("quit", Value::Null).unwrap();
    let end = client.wait_event(client.mark(), TIMEOUT, |_| None::<()>);
    assert!(matches!(end, Err(Error::Disconnected { .. })), "{end:?}");
    assert!(daemon.process.wait().unwrap().success());
}

#[test]
fn a_second_client_is_told_that_the_monitor_is_in_use() {
    let Some(daemon) = Monitor::storage_daemon() else {
        return;
    };
    let first = daemon.client();
    // The backlog holds one or two; those who come later do not even get into it.
    for _ in 0..3 {
        let error = Client::connect(&daemon.path, TIMEOUT).unwrap_err();
        assert!(matches!(error, Error::InUse { .. }), "{error:?}");
    }
    assert!(first.execute(&query_version {}).is_ok());
    drop(first);
    // Those who gave up are no obstacle to the next.
    assert!(daemon.client().is_connected());
}

#[test]
fn a_job_is_followed_by_its_events() {
    let Some(daemon) = Monitor::storage_daemon() else {
        return;
    };
    let client = daemon.client();
    let job_is = |mark, status: &str| {
        client.wait_event(mark, TIMEOUT, |event| {
            (event.name == "JOB_STATUS_CHANGE"
                && event.data["id"] == "j"
                && event.data["status"] == *status)
                .then_some(event.seq)
        })
    };
    let file = daemon.dir.path().join("x.raw");
    let mark = client.mark();
    let options = json!({"driver": "file", "filename": file, "size": 65536});
    client
        .call::<Value>(
            "blockdev-create",
            json!({"job-id": "j", "options": options}),
        )
        .unwrap();
    let concluded = job_is(mark, "concluded").unwrap();
    assert_eq!(std::fs::metadata(&file).unwrap().len(), 65536);

    let dismissed = client.mark();
    client
        .call::<Value>("job-dismiss", json!({"id": "j"}))
        .unwrap();
    let gone = job_is(dismissed, "null").unwrap();
    assert!(gone > concluded);
    // From the first mark on, the same event is found again.
    assert_eq!(job_is(mark, "null").unwrap(), gone);
    assert_eq!(client.commands_sent(), 3);
}

#[test]
fn a_killed_daemon_disconnects_at_once() {
    let Some(mut daemon) = Monitor::storage_daemon() else {
        return;
    };
    let client = daemon.client();
    daemon.process.kill().unwrap();
    let end = client.wait_event(client.mark(), TIMEOUT, |_| None::<()>);
    assert!(matches!(end, Err(Error::Disconnected { .. })), "{end:?}");
    assert!(!client.is_connected());
}

#[test]
fn qemu_answers_in_the_types_of_qapi() {
    let Some(qemu) = Monitor::qemu() else {
        return;
    };
    let client = qemu.client();
    assert!(qemu.is_peer_of(&client));
    let oldest = Version {
        major: 7,
        minor: 2,
        micro: 0,
    };
    assert!(client.version() >= oldest);
    let version = client.execute(&query_version {}).unwrap().qemu;
    assert_eq!(i64::from(client.version().minor), version.minor);
    assert!(client.execute(&query_status {}).unwrap().running);

    let mark = client.mark();
    client.call::<Value>("stop", Value::Null).unwrap();
    let stopped = client.wait_event(mark, TIMEOUT, |event| (event.name == "STOP").then_some(()));
    assert!(stopped.is_ok(), "{stopped:?}");
    assert!(!client.execute(&query_status {}).unwrap().running);
}

/// The longest reply of a QEMU without disks, some 200 KiB in one line.
#[test]
fn the_schema_fits_in_a_line() {
    let Some(daemon) = Monitor::storage_daemon() else {
        return;
    };
    let client = daemon.client();
    let schema: Vec<Value> = client.call("query-qmp-schema", Value::Null).unwrap();
    assert!(schema.len() > 100);
}
