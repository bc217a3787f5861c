//! The QMP client against a scripted peer: what a QEMU of another version, a hung one, a dying one
//! and a hostile one would do. Each test asserts the error, and that it comes in time.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::mpsc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use fleecefs::qmp::{Client, Error, MAX_LINE, Mark, Version};
use proptest::prelude::*;
use serde::Deserialize;
use serde_json::{Value, json};

/// Long enough never to pass in a test that does not want it to.
const LONG: Duration = Duration::from_secs(20);
/// Short, for the tests that do.
const SHORT: Duration = Duration::from_millis(200);

const GREETING: &str = r#"{"QMP": {"version": {"qemu": {"micro": 2, "minor": 0, "major": 10}, "package": ""}, "capabilities": ["oob"]}}"#;

/// A listening socket, and a thread that plays the peer for one client.
struct Fake {
    path: PathBuf,
    script: Option<JoinHandle<()>>,
    _dir: tempfile::TempDir,
}

impl Fake {
    /// Plays `script` from the connection on.
    fn raw(script: impl FnOnce(Peer) + Send + 'static) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("qmp");
        let listener = UnixListener::bind(&path).unwrap();
        let script = thread::spawn(move || {
            let (socket, _) = listener.accept().unwrap();
            socket.set_read_timeout(Some(LONG)).unwrap();
            script(Peer {
                lines: BufReader::new(socket.try_clone().unwrap()),
                socket,
            });
        });
        Self {
            path,
            script: Some(script),
            _dir: dir,
        }
    }

    /// Greets, answers qmp_capabilities, then plays `script`.
    fn greeted(script: impl FnOnce(Peer) + Send + 'static) -> Self {
        Self::raw(|mut peer| {
            peer.say(GREETING);
            let request = peer.hear();
            assert_eq!(request["execute"], "qmp_capabilities");
            peer.answer(&request, json!({}));
            script(peer);
        })
    }

    fn client(&self) -> Client {
        Client::connect(&self.path, LONG).unwrap()
    }
}

impl Drop for Fake {
    /// A failed assertion in the script fails the test.
    fn drop(&mut self) {
        if let Some(script) = self.script.take()
            && !thread::panicking()
        {
            script.join().unwrap();
        }
    }
}

/// The script's end of the connection.
struct Peer {
    lines: BufReader<UnixStream>,
    socket: UnixStream,
}

impl Peer {
    fn say(&mut self, line: &str) {
        self.socket.write_all(line.as_bytes()).unwrap();
        self.socket.write_all(b"\r\n").unwrap();
    }

    fn hear(&mut self) -> Value {
        let mut line = String::new();
        self.lines.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap()
    }

    fn answer(&mut self, request: &Value, value: Value) {
        self.say(&json!({ "return": value, "id": request["id"] }).to_string());
    }

    fn event(&mut self, name: &str, data: Value) {
        let event =
            json!({ "timestamp": {"seconds": 1, "microseconds": 2}, "event": name, "data": data });
        self.say(&event.to_string());
    }

    /// Does nothing until the client goes away.
    fn hang(mut self) {
        let _ = self.lines.read_to_end(&mut Vec::new());
    }
}

fn disconnected(result: Result<impl std::fmt::Debug, Error>) -> String {
    match result.unwrap_err() {
        Error::Disconnected { reason } => reason,
        other => panic!("{other:?}"),
    }
}

fn timed_out(result: Result<impl std::fmt::Debug, Error>) -> String {
    match result.unwrap_err() {
        Error::Timeout { waiting_for } => waiting_for,
        other => panic!("{other:?}"),
    }
}

// Connecting

#[test]
fn the_greeting_gives_the_version_and_the_kernel_the_peer() {
    let fake = Fake::greeted(Peer::hang);
    let client = fake.client();
    let version = Version {
        major: 10,
        minor: 0,
        micro: 2,
    };
    assert_eq!(client.version(), version);
    assert_eq!(
        client.peer().pid,
        i32::try_from(std::process::id()).unwrap()
    );
    assert!(client.is_connected());
    assert_eq!(client.commands_sent(), 1);
}

#[test]
fn no_greeting_means_in_use() {
    let fake = Fake::raw(Peer::hang);
    let begun = Instant::now();
    let error = Client::connect(&fake.path, LONG).unwrap_err();
    assert!(matches!(error, Error::InUse { .. }), "{error:?}");
    assert!((1..4).contains(&begun.elapsed().as_secs()));
}

#[test]
fn a_greeting_that_drips_does_not_stretch_the_deadline() {
    let fake = Fake::raw(|mut peer| {
        while peer.socket.write_all(b" ").is_ok() {
            thread::sleep(Duration::from_millis(20));
        }
    });
    let error = Client::connect_within(SHORT, &fake.path, LONG).unwrap_err();
    assert!(matches!(error, Error::InUse { .. }), "{error:?}");
}

#[test]
fn a_full_backlog_means_in_use() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("qmp");
    let listener = UnixListener::bind(&path).unwrap();
    // SAFETY: no pointers. Listening again changes the backlog, which std makes large.
    assert_eq!(unsafe { libc::listen(listener.as_raw_fd(), 0) }, 0);
    let _queued = UnixStream::connect(&path).unwrap();
    let begun = Instant::now();
    let error = Client::connect_within(SHORT, &path, LONG).unwrap_err();
    assert!(matches!(error, Error::InUse { .. }), "{error:?}");
    assert!(begun.elapsed() >= SHORT && begun.elapsed() < LONG);
}

#[test]
fn end_of_file_in_the_greeting() {
    let fake = Fake::raw(|mut peer| peer.socket.write_all(&GREETING.as_bytes()[..20]).unwrap());
    let reason = disconnected(Client::connect(&fake.path, LONG));
    assert!(reason.contains("closed"), "{reason}");
}

#[test]
fn a_greeting_of_another_protocol() {
    for (line, expected) in [
        ("220 mail.example ESMTP", "not JSON"),
        (r#"{"return": {}, "id": 1}"#, "greeting"),
        (r#"{"QMP": {"version": "new"}}"#, "greeting"),
    ] {
        let fake = Fake::raw(move |mut peer| {
            peer.say(line);
            peer.hang();
        });
        let reason = disconnected(Client::connect(&fake.path, LONG));
        assert!(reason.contains(expected), "{reason}");
    }
}

#[test]
fn what_is_no_socket_is_told_from_a_socket_without_listener() {
    let dir = tempfile::tempdir().unwrap();
    let connect = |name: &str| Client::connect(dir.path().join(name), LONG).unwrap_err();

    std::fs::write(dir.path().join("file"), "").unwrap();
    assert!(matches!(connect("file"), Error::NotASocket { .. }));

    drop(UnixListener::bind(dir.path().join("dead")).unwrap());
    let kind = |error| match error {
        Error::Connect { source, .. } => source.kind(),
        other => panic!("{other:?}"),
    };
    assert_eq!(kind(connect("dead")), std::io::ErrorKind::ConnectionRefused);
    assert_eq!(kind(connect("none")), std::io::ErrorKind::NotFound);
    assert_eq!(
        kind(connect(&"x".repeat(108))),
        std::io::ErrorKind::InvalidInput
    );
}

#[test]
fn a_refused_qmp_capabilities_fails_the_connect() {
    let fake = Fake::raw(|mut peer| {
        peer.say(GREETING);
        peer.hear();
        peer.say(r#"{"id": 1, "error": {"class": "CommandNotFound", "desc": "no"}}"#);
        peer.hang();
    });
    let error = Client::connect(&fake.path, LONG).unwrap_err();
    assert!(matches!(error, Error::Command { .. }), "{error:?}");
}

// Commands

#[test]
fn fields_of_later_versions_pass_by() {
    #[derive(Deserialize)]
    struct Node {
        #[serde(rename = "node-name")]
        name: String,
    }
    let fake = Fake::greeted(|mut peer| {
        let request = peer.hear();
        assert_eq!(request["arguments"], json!({"flat": true}));
        let line = json!({
            "return": [{"node-name": "d0", "drv": "from-the-future", "hue": [1]}],
            "id": request["id"], "tide": "high",
        });
        peer.say(&line.to_string());
        peer.hang();
    });
    let client = fake.client();
    let nodes: Vec<Node> = client
        .call("query-named-block-nodes", json!({"flat": true}))
        .unwrap();
    assert_eq!(nodes[0].name, "d0");
}

#[test]
fn a_refusal_keeps_the_words_of_qemu() {
    let fake = Fake::greeted(|mut peer| {
        let id = peer.hear()["id"].clone();
        let error = json!({"class": "DeviceNotActive", "desc": "Block job 'x' not found"});
        peer.say(&json!({"id": id, "error": error}).to_string());
        peer.hang();
    });
    match fake
        .client()
        .call::<Value>("block-job-cancel", json!({"device": "x"}))
    {
        Err(Error::Command {
            command,
            class,
            desc,
        }) => {
            assert_eq!(command, "block-job-cancel");
            assert_eq!(class, "DeviceNotActive");
            assert_eq!(desc, "Block job 'x' not found");
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_reply_of_another_type_spoils_only_its_own_call() {
    let fake = Fake::greeted(|mut peer| {
        let request = peer.hear();
        peer.answer(&request, json!("a string"));
        let request = peer.hear();
        let deep = format!("{}{}", "[".repeat(500), "]".repeat(500));
        peer.say(&format!(r#"{{"return": {deep}, "id": {}}}"#, request["id"]));
        let request = peer.hear();
        peer.answer(&request, json!(3));
        peer.hang();
    });
    let client = fake.client();
    for _ in 0..2 {
        let error = client.call::<u32>("query-x", Value::Null).unwrap_err();
        assert!(matches!(error, Error::Decode { .. }), "{error:?}");
    }
    assert_eq!(client.call::<u32>("query-x", Value::Null).unwrap(), 3);
}

#[test]
fn what_nobody_waits_for_passes_by() {
    let fake = Fake::greeted(|mut peer| {
        let request = peer.hear();
        for line in [
            "",
            "[]",
            "17",
            r#"{"event": {"not": "a name"}}"#,
            r#"{"return": 1}"#,
            r#"{"return": 1, "id": "x"}"#,
            r#"{"return": 1, "id": 999999}"#,
            r#"{"error": {"class": "GenericError", "desc": "JSON parse error"}}"#,
            GREETING,
        ] {
            peer.say(line);
        }
        peer.event("AN_EVENT_OF_LATER", json!([null, {"odd": "data"}]));
        peer.answer(&request, json!(true));
        peer.hang();
    });
    let client = fake.client();
    let mark = client.mark();
    assert!(client.call::<bool>("query-x", Value::Null).unwrap());
    let event = client.next_event(mark, LONG).unwrap().unwrap();
    assert_eq!(event.name, "AN_EVENT_OF_LATER");
    assert_eq!(event.data[1]["odd"], "data");
    assert_eq!(client.next_event(event.mark(), SHORT).unwrap(), None);
}

#[test]
fn replies_out_of_order_find_their_callers() {
    let fake = Fake::greeted(|mut peer| {
        let (first, second) = (peer.hear(), peer.hear());
        peer.answer(&second, second["execute"].clone());
        peer.answer(&first, first["execute"].clone());
        peer.hang();
    });
    let client = fake.client();
    thread::scope(|scope| {
        for name in ["query-a", "query-b"] {
            let client = &client;
            scope.spawn(move || {
                assert_eq!(client.call::<String>(name, Value::Null).unwrap(), name);
            });
        }
    });
    assert_eq!(client.commands_sent(), 3);
}

#[test]
fn a_late_reply_is_nobodys() {
    let fake = Fake::greeted(|mut peer| {
        let late = peer.hear();
        let next = peer.hear();
        peer.answer(&late, json!("late"));
        peer.answer(&next, json!("right"));
        peer.hang();
    });
    let client = fake.client();
    let begun = Instant::now();
    let late = client.call_within::<String>(SHORT, "query-a", Value::Null);
    assert_eq!(timed_out(late), "query-a");
    assert!(begun.elapsed() >= SHORT && begun.elapsed() < LONG);
    let next = client.call::<String>("query-b", Value::Null).unwrap();
    assert_eq!(next, "right");
}

// The end

#[test]
fn end_of_file_wakes_all_who_wait_and_refuses_all_who_come() {
    let fake = Fake::greeted(|mut peer| {
        peer.hear();
        thread::sleep(SHORT);
    });
    let client = fake.client();
    let begun = Instant::now();
    thread::scope(|scope| {
        scope.spawn(|| {
            disconnected(client.wait_event(client.mark(), LONG, |_| None::<()>));
        });
        scope.spawn(|| disconnected(client.call::<Value>("query-a", Value::Null)));
    });
    disconnected(client.call::<Value>("query-b", Value::Null));
    disconnected(client.next_event(client.mark(), LONG));
    assert!(!client.is_connected());
    assert!(begun.elapsed() < LONG);
}

#[test]
fn what_came_before_the_end_is_still_given_out() {
    let fake = Fake::greeted(|mut peer| {
        let quit = peer.hear();
        peer.event("SHUTDOWN", json!({"guest": false}));
        peer.answer(&quit, json!({}));
    });
    let client = fake.client();
    let mark = client.mark();
    client.call::<Value>("quit", Value::Null).unwrap();
    let event = client.next_event(mark, LONG).unwrap().unwrap();
    assert_eq!(event.name, "SHUTDOWN");
    disconnected(client.next_event(event.mark(), LONG));
}

#[test]
fn closing_wakes_who_waits() {
    let fake = Fake::greeted(Peer::hang);
    let client = fake.client();
    thread::scope(|scope| {
        let waiter = scope.spawn(|| client.call::<Value>("query-a", Value::Null));
        while client.commands_sent() < 2 {
            thread::yield_now();
        }
        client.close();
        assert!(disconnected(waiter.join().unwrap()).contains("this side"));
    });
    client.close();
    assert!(!client.is_connected());
}

#[test]
fn dropping_the_client_hangs_up() {
    let (gone, seen) = mpsc::channel();
    let fake = Fake::greeted(move |peer| {
        peer.hang();
        gone.send(()).unwrap();
    });
    drop(fake.client());
    seen.recv_timeout(LONG).unwrap();
}

#[test]
fn what_is_not_json_ends_the_session() {
    let fake = Fake::greeted(|mut peer| {
        peer.hear();
        peer.say("Segmentation fault");
        peer.hang();
    });
    let client = fake.client();
    let reason = disconnected(client.call::<Value>("query-a", Value::Null));
    assert!(reason.contains("not JSON"), "{reason}");
}

#[test]
fn an_endless_line_is_cut_off() {
    let fake = Fake::greeted(|mut peer| {
        let chunk = vec![b'['; 1 << 20];
        let mut sent = 0;
        while peer.socket.write_all(&chunk).is_ok() {
            sent += chunk.len();
        }
        assert!((MAX_LINE - chunk.len()..MAX_LINE + 4 * chunk.len()).contains(&sent));
    });
    let client = fake.client();
    let reason = disconnected(client.call::<Value>("query-a", Value::Null));
    assert!(reason.contains("a line of more than"), "{reason}");
}

/// More than the kernel takes for a peer that does not read.
fn huge() -> Value {
    json!({"x": "x".repeat(8 << 20)})
}

#[test]
fn a_peer_that_stops_reading_cannot_hang_us() {
    let (done, wait) = mpsc::channel::<()>();
    let fake = Fake::greeted(move |_peer| {
        let _ = wait.recv();
    });
    let client = fake.client();
    let begun = Instant::now();
    let stuck = client.call_within::<Value>(SHORT, "blockdev-add", huge());
    assert_eq!(timed_out(stuck), "blockdev-add");
    assert!(begun.elapsed() >= SHORT && begun.elapsed() < LONG);
    // Half a command was sent: there is no going on.
    let reason = disconnected(client.call::<Value>("query-a", Value::Null));
    assert!(reason.contains("in the middle of blockdev-add"), "{reason}");
    assert_eq!(client.commands_sent(), 1);
    drop(done);
}

#[test]
fn waiting_behind_a_stuck_sender_has_a_deadline_too() {
    let (done, wait) = mpsc::channel::<()>();
    let fake = Fake::greeted(move |_peer| {
        let _ = wait.recv();
    });
    let client = fake.client();
    thread::scope(|scope| {
        let stuck = scope.spawn(|| client.call::<Value>("blockdev-add", huge()));
        thread::sleep(SHORT);
        let begun = Instant::now();
        timed_out(client.call_within::<Value>(SHORT, "query-a", Value::Null));
        assert!(begun.elapsed() >= SHORT && begun.elapsed() < LONG);
        client.close();
        disconnected(stuck.join().unwrap());
    });
    drop(done);
}

// Events

#[test]
fn an_event_is_found_from_its_mark_on_whoever_waits_when() {
    let fake = Fake::greeted(|mut peer| {
        for round in 0..2 {
            let request = peer.hear();
            for status in ["created", "running", "null"] {
                let data = json!({"id": "j", "status": status, "round": round});
                peer.event("JOB_STATUS_CHANGE", data);
            }
            peer.answer(&request, json!({}));
        }
        peer.hang();
    });
    let client = fake.client();
    let job_gone = |mark| {
        client.wait_event(mark, LONG, |event| {
            (event.name == "JOB_STATUS_CHANGE" && event.data["status"] == "null")
                .then(|| event.data["round"].as_u64())
                .flatten()
        })
    };
    let first = client.mark();
    client.call::<Value>("job-dismiss", Value::Null).unwrap();
    let second = client.mark();
    client.call::<Value>("job-dismiss", Value::Null).unwrap();
    assert_eq!(job_gone(second).unwrap(), 1);
    assert_eq!(job_gone(first).unwrap(), 0);
}

#[test]
fn the_matcher_may_use_the_client() {
    let fake = Fake::greeted(|mut peer| {
        peer.event("STOP", json!({}));
        let request = peer.hear();
        peer.answer(&request, json!("io-error"));
        peer.hang();
    });
    let client = fake.client();
    let status = client
        .wait_event(Mark::START, LONG, |_| {
            client.call::<String>("query-status", Value::Null).ok()
        })
        .unwrap();
    assert_eq!(status, "io-error");
}

/// The matcher is slower than the peer and never catches up; the lag stays far from what is kept.
#[test]
fn a_flood_of_other_events_does_not_stretch_the_deadline() {
    let fake = Fake::greeted(|mut peer| {
        while peer.socket.write_all(b"{\"event\": \"NOISE\"}\n").is_ok() {
            thread::sleep(Duration::from_millis(1));
        }
    });
    let client = fake.client();
    let begun = Instant::now();
    let noise = client.wait_event(Mark::START, SHORT, |_| {
        thread::sleep(Duration::from_millis(3));
        None::<()>
    });
    assert_eq!(timed_out(noise), "an event");
    assert!(begun.elapsed() >= SHORT && begun.elapsed() < 10 * SHORT);
    drop(client);
}

#[test]
fn events_that_were_pushed_out_are_reported() {
    let fake = Fake::greeted(|mut peer| {
        let request = peer.hear();
        for number in 0..5000 {
            peer.event("NOISE", json!(number));
        }
        peer.answer(&request, json!({}));
        peer.hang();
    });
    let client = fake.client();
    let mark = client.mark();
    client.call::<Value>("query-a", Value::Null).unwrap();
    let error = client.next_event(mark, LONG).unwrap_err();
    let Error::EventsLost { missed } = error else {
        panic!("{error:?}");
    };
    assert_eq!(missed, 5000 - 4096);
    // The session goes on.
    assert_eq!(client.next_event(client.mark(), SHORT).unwrap(), None);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever a peer says and however it leaves, a call comes back and nothing panics.
    #[test]
    fn no_bytes_panic_or_hang(chunks in proptest::collection::vec(prop_oneof![
        proptest::collection::vec(any::<u8>(), 0..100),
        r#"(\{"(return|event|error|id|QMP)": ?("x"|2|\{\}|null|\[\])(, "id": 2)?\}|[\[{"]{1,9})\r?\n"#
            .prop_map(String::into_bytes),
    ], 0..12)) {
        let fake = Fake::greeted(move |mut peer| {
            peer.hear();
            let _ = peer.socket.write_all(&chunks.concat());
        });
        let client = fake.client();
        let begun = Instant::now();
        let _ = client.call::<Value>("query-a", Value::Null);
        disconnected(client.wait_event(client.mark(), LONG, |_| None::<()>));
        prop_assert!(begun.elapsed() < LONG);
    }
}
