//! `events`: what happened, one JSON object a line, in a file that grows.
//!
//! What the engine tells waits in its channel until somebody looks or the tree changes, so no
//! thread is needed to take it. The text is bounded: a file that got too long loses its older half
//! and is shorter from then on, which followers know from logs that are cut off.

use std::time::SystemTime;

use crossbeam_channel::Receiver;
use parking_lot::Mutex;
use serde::Serialize;

use super::refusals::rfc3339;
use crate::model::{Event, Happening, JobId};

/// Bytes that are kept.
const MOST: usize = 1 << 20;

/// All that happened lately.
pub(super) struct Events {
    news: Receiver<Event>,
    log: Mutex<Log>,
}

struct Log {
    text: String,
    changed: SystemTime,
}

impl Events {
    pub(super) fn new(news: Receiver<Event>) -> Self {
        let log = Log {
            text: String::new(),
            changed: SystemTime::now(),
        };
        Self {
            news,
            log: Mutex::new(log),
        }
    }

    /// Takes what the engine told since.
    pub(super) fn catch_up(&self) {
        let mut log = self.log.lock();
        for event in self.news.try_iter() {
            log.text += &line(&event);
            log.text.push('\n');
            log.changed = event.time;
            if log.text.len() > MOST {
                // No line is cut in two.
                let half = log.text.as_bytes()[MOST / 2..]
                    .iter()
                    .position(|b| *b == b'\n');
                log.text.drain(..half.map_or(0, |at| MOST / 2 + at + 1));
            }
        }
    }

    /// Size in bytes, and the time of the newest.
    pub(super) fn extent(&self) -> (usize, SystemTime) {
        self.catch_up();
        let log = self.log.lock();
        (log.text.len(), log.changed)
    }

    /// Copies the text from `offset` on; the count of bytes.
    pub(super) fn read(&self, offset: u64, buf: &mut [u8]) -> usize {
        self.catch_up();
        let log = self.log.lock();
        let part = super::open::window(log.text.as_bytes(), offset, buf.len());
        buf[..part.len()].copy_from_slice(part);
        part.len()
    }
}

/// A line as it is written: the names and their order are what readers see.
#[derive(Serialize)]
struct Line<'a> {
    time: String,
    #[serde(flatten)]
    what: What<'a>,
}

#[derive(Serialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
enum What<'a> {
    JobCompleted {
        job: JobId,
        name: &'a str,
        mode: &'static str,
        outcome: &'static str,
        #[serde(skip_serializing_if = "Option::is_none")]
        why: Option<String>,
    },
    ScratchThreshold {
        job: JobId,
        name: &'a str,
        used: u64,
        limit: u64,
    },
    CheckpointBroken {
        checkpoint: &'a str,
        disk: &'a str,
        why: &'a str,
    },
}

fn line(event: &Event) -> String {
    let what = match &event.what {
        Happening::JobCompleted {
            id,
            name,
            mode,
            outcome,
        } => What::JobCompleted {
            job: *id,
            name: name.as_str(),
            mode: mode.word(),
            outcome: outcome.as_ref().map_or("failed", |outcome| outcome.word()),
            why: outcome.as_ref().err().map(ToString::to_string),
        },
        Happening::ScratchThreshold {
            id,
            name,
            used,
            limit,
        } => What::ScratchThreshold {
            job: *id,
            name: name.as_str(),
            used: *used,
            limit: *limit,
        },
        Happening::CheckpointBroken { name, disk, why } => What::CheckpointBroken {
            checkpoint: name.as_str(),
            disk,
            why,
        },
    };
    let time = rfc3339(event.time);
    // Strings and numbers always have a form in JSON.
    serde_json::to_string(&Line { time, what }).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Error, Kind, Mode, Name, Outcome};
    use serde_json::Value;
    use std::time::Duration;

    fn event(what: Happening) -> Event {
        Event {
            time: SystemTime::UNIX_EPOCH + Duration::from_secs(1_795_473_812),
            what,
        }
    }

    fn completed(id: u32, outcome: Result<Outcome, Error>) -> Event {
        event(Happening::JobCompleted {
            id,
            name: Name::new("tue").unwrap(),
            mode: Mode::Push,
            outcome,
        })
    }

    fn text(events: &Events, from: u64) -> String {
        let mut buf = vec![0; 2 * MOST];
        let n = events.read(from, &mut buf);
        String::from_utf8(buf[..n].to_vec()).unwrap()
    }

    #[test]
    fn lines() {
        let (sender, receiver) = crossbeam_channel::unbounded();
        let events = Events::new(receiver);
        assert_eq!(events.extent().0, 0);
        sender.send(completed(3, Ok(Outcome::Completed))).unwrap();
        let first = text(&events, 0);
        assert_eq!(
            first,
            "{\"time\":\"2026-11-23T22:43:32Z\",\"event\":\"job-completed\",\"job\":3,\
             \"name\":\"tue\",\"mode\":\"push\",\"outcome\":\"completed\"}\n"
        );
        let why = Error::new(Kind::NoSpace, "full \"up\"\n").hint("make room");
        sender.send(completed(4, Err(why))).unwrap();
        sender
            .send(event(Happening::ScratchThreshold {
                id: 5,
                name: Name::new("wed").unwrap(),
                used: 7,
                limit: 9,
            }))
            .unwrap();
        sender
            .send(event(Happening::CheckpointBroken {
                name: Name::new("mon").unwrap(),
                disk: "vda".into(),
                why: "gone".into(),
            }))
            .unwrap();
        let (size, changed) = events.extent();
        assert_eq!(rfc3339(changed), "2026-11-23T22:43:32Z");
        // Offsets stay what they were.
        let rest = text(&events, first.len() as u64);
        assert_eq!(first.len() + rest.len(), size);
        let rest: Vec<Value> = rest
            .lines()
            .map(|l| serde_json::from_str(l).unwrap())
            .collect();
        assert_eq!(rest[0]["why"], "full \"up\"\n (make room)");
        assert_eq!(rest[1]["limit"], 9);
        assert_eq!(rest[2]["event"], "checkpoint-broken");
        assert_eq!(rest[2]["checkpoint"], "mon");
        assert_eq!(text(&events, size as u64), "");
    }

    #[test]
    fn it_loses_its_older_half() {
        let (sender, receiver) = crossbeam_channel::unbounded();
        let events = Events::new(receiver);
        let mut longest = 0;
        for id in 0..20_000 {
            sender.send(completed(id, Ok(Outcome::Aborted))).unwrap();
            longest = longest.max(events.extent().0);
        }
        assert!(longest <= MOST && longest > MOST - 200);
        let text = text(&events, 0);
        assert!(text.len() < longest && text.ends_with('\n'));
        let ids: Vec<u64> = text
            .lines()
            .map(|l| {
                serde_json::from_str::<Value>(l).unwrap()["job"]
                    .as_u64()
                    .unwrap()
            })
            .collect();
        assert_eq!(*ids.last().unwrap(), 19_999);
        assert!(
            ids.windows(2).all(|w| w[0] + 1 == w[1]),
            "nothing in between is missing"
        );
    }
}
