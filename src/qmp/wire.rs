//! The lines of QMP: bytes to [`Incoming`] and commands to bytes. Pure.
//!
//! Nothing here knows a command or an event by name, and so nothing here can be too old for a
//! QEMU. Source: docs/interop/qmp-spec.rst of QEMU.

use std::io::{self, BufRead, Read};

use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::{Map, Value, json};

/// The longest line that is read, line end included. A peer that sends more is cut off before it
/// eats the memory. The longest honest replies are query-named-block-nodes of hundreds of nodes
/// and bitmaps: a few MiB.
pub const MAX_LINE: usize = 64 << 20;

/// A line buffer that grew beyond this gives the memory back.
const USUAL_LINE: usize = 64 << 10;

/// QEMU's version, as its greeting gives it. Compares as versions do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Deserialize)]
pub struct Version {
    /// 10 in 10.0.2
    pub major: u32,
    /// 0 in 10.0.2
    pub minor: u32,
    /// 2 in 10.0.2
    pub micro: u32,
}

/// A line, sorted but not yet understood.
#[derive(Debug, PartialEq)]
pub(super) enum Incoming {
    Greeting(Version),
    Event {
        name: String,
        data: Value,
    },
    Reply {
        id: u64,
        reply: Reply,
    },
    /// Well-formed, and nothing that anybody waits for.
    Stray,
}

/// The answer to a command.
#[derive(Debug, PartialEq)]
pub(super) enum Reply {
    Return(Value),
    Refused {
        class: String,
        desc: String,
    },
    /// It is the answer, but cannot be taken in: why.
    Unreadable(String),
}

/// The line that asks for `command`. QEMU takes null for wrong arguments, so null means none.
pub(super) fn request(command: &str, arguments: Value, id: u64) -> String {
    let mut request = json!({ "execute": command, "id": id });
    if !arguments.is_null() {
        request["arguments"] = arguments;
    }
    format!("{request}\n")
}

/// Reads the next line into `line`, without its end (`\r\n` from QEMU). False at the end of the
/// stream; what stands there without a line end was cut off and does not count.
pub(super) fn read_line(reader: &mut impl BufRead, line: &mut Vec<u8>) -> io::Result<bool> {
    line.clear();
    line.shrink_to(USUAL_LINE);
    let read = reader.take(MAX_LINE as u64).read_until(b'\n', line)?;
    if line.last() != Some(&b'\n') {
        return if read == MAX_LINE {
            Err(io::Error::other(format!(
                "a line of more than {read} bytes"
            )))
        } else {
            Ok(false)
        };
    }
    line.truncate(line.trim_ascii_end().len());
    Ok(true)
}

/// Sorts a line. An error if it is no JSON at all: then nothing after it can be trusted.
pub(super) fn decode(line: &[u8]) -> serde_json::Result<Incoming> {
    match serde_json::from_slice(line) {
        Ok(Value::Object(object)) => Ok(sort(object)),
        Ok(_) => Ok(Incoming::Stray),
        Err(_) if line.is_empty() => Ok(Incoming::Stray),
        Err(error) => too_deep(line, &error).ok_or(error),
    }
}

fn sort(mut object: Map<String, Value>) -> Incoming {
    if let Some(greeting) = object.get("QMP") {
        return Version::deserialize(&greeting["version"]["qemu"])
            .map_or(Incoming::Stray, Incoming::Greeting);
    }
    if let Some(Value::String(name)) = object.get_mut("event") {
        return Incoming::Event {
            name: std::mem::take(name),
            data: object.remove("data").unwrap_or_default(),
        };
    }
    // Without an id it is QEMU's answer to a line that it could not read. We send none such.
    let Some(id) = object.get("id").and_then(Value::as_u64) else {
        return Incoming::Stray;
    };
    let reply = match (object.remove("return"), object.get("error")) {
        (_, Some(error)) => Reply::Refused {
            class: text(&error["class"]),
            desc: text(&error["desc"]),
        },
        (Some(value), None) => Reply::Return(value),
        (None, None) => Reply::Unreadable("neither return nor error".into()),
    };
    Incoming::Reply { id, reply }
}

/// A string as it is, anything else as JSON.
fn text(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), Into::into)
}

/// JSON may nest deeper than serde_json follows (128 levels): the `backing-image` of a long chain
/// does. Such a reply must fail the call that asked for it, not the session.
fn too_deep(line: &[u8], error: &serde_json::Error) -> Option<Incoming> {
    #[derive(Deserialize)]
    struct IdOnly {
        id: u64,
    }
    if let Ok(IdOnly { id }) = serde_json::from_slice(line) {
        let reply = Reply::Unreadable(error.to_string());
        return Some(Incoming::Reply { id, reply });
    }
    let IgnoredAny = serde_json::from_slice(line).ok()?;
    Some(Incoming::Stray)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn lines(bytes: &[u8]) -> Vec<String> {
        let (mut reader, mut line, mut lines) = (bytes, Vec::new(), Vec::new());
        while read_line(&mut reader, &mut line).unwrap() {
            lines.push(String::from_utf8_lossy(&line).into_owned());
        }
        lines
    }

    #[test]
    fn lines_lose_their_end_and_an_unfinished_one_does_not_count() {
        assert_eq!(lines(b"a\r\nb\n\r\nc"), ["a", "b", ""]);
        assert!(lines(b"").is_empty());
    }

    #[test]
    fn a_line_without_end_is_an_error() {
        let mut reader = io::BufReader::new(io::repeat(b' '));
        assert!(read_line(&mut reader, &mut Vec::new()).is_err());
    }

    #[test]
    fn a_request_names_command_arguments_and_id() {
        let line = request("job-dismiss", json!({"id": "j"}), 7);
        assert!(line.ends_with('\n'));
        assert_eq!(
            serde_json::from_str::<Value>(&line).unwrap(),
            json!({"execute": "job-dismiss", "arguments": {"id": "j"}, "id": 7})
        );
        assert!(!request("quit", Value::Null, 8).contains("arguments"));
    }

    #[test]
    fn each_kind_of_line_is_told_apart() {
        let greeting = br#"{"QMP": {"version": {"qemu": {"micro": 2, "minor": 0, "major": 10},
            "package": "Debian"}, "capabilities": ["oob"], "new": 1}}"#;
        let version = Version {
            major: 10,
            minor: 0,
            micro: 2,
        };
        assert_eq!(decode(greeting).unwrap(), Incoming::Greeting(version));
        assert_eq!(
            decode(br#"{"event": "STOP", "timestamp": {}}"#).unwrap(),
            Incoming::Event {
                name: "STOP".into(),
                data: Value::Null
            }
        );
        let reply = |line: &[u8]| match decode(line).unwrap() {
            Incoming::Reply { reply, .. } => reply,
            other => panic!("{other:?}"),
        };
        assert_eq!(
            reply(br#"{"return": {}, "id": 18446744073709551615}"#),
            Reply::Return(json!({}))
        );
        assert_eq!(
            reply(br#"{"id": 1, "error": {"class": "GenericError", "desc": 5}}"#),
            Reply::Refused {
                class: "GenericError".into(),
                desc: "5".into()
            }
        );
        assert!(matches!(reply(br#"{"id": 1}"#), Reply::Unreadable(_)));
        for stray in ["", "[]", "null", "{}", r#"{"QMP": 1}"#, r#"{"event": 1}"#] {
            assert_eq!(decode(stray.as_bytes()).unwrap(), Incoming::Stray);
        }
        assert!(decode(b"HTTP/1.1 400 Bad Request").is_err());
    }

    #[test]
    fn nesting_too_deep_to_follow_spoils_its_own_reply_only() {
        let deep = format!("{}{}", "[".repeat(1000), "]".repeat(1000));
        let reply = decode(format!(r#"{{"return": {deep}, "id": 3}}"#).as_bytes()).unwrap();
        assert!(
            matches!(
                reply,
                Incoming::Reply {
                    id: 3,
                    reply: Reply::Unreadable(_)
                }
            ),
            "{reply:?}"
        );
        assert_eq!(decode(deep.as_bytes()).unwrap(), Incoming::Stray);
        assert!(decode("[".repeat(1000).as_bytes()).is_err());
    }

    proptest! {
        #[test]
        fn no_line_panics(line in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = decode(&line);
        }

        #[test]
        fn versions_compare_as_versions(a: (u32, u32, u32), b: (u32, u32, u32)) {
            let version = |(major, minor, micro)| Version { major, minor, micro };
            prop_assert_eq!(version(a).cmp(&version(b)), a.cmp(&b));
        }
    }
}
