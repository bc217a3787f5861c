//! Events, numbered and kept for a while, so that one may come before anybody waits for it.
//!
//! ```text
//! pushed out |  kept (at most MAX_EVENTS, about MAX_BYTES of text)  | to come
//!  1 2 3 4 5 |  6   7   8   9                                       |  10
//!        ^ mark: 5 is lost, EventsLost        ^ Mark(9), the end: waits for 10
//! ```

use std::collections::VecDeque;
use std::sync::Arc;

use serde_json::Value;

use super::{Error, Result};

/// How many events are kept: a job's life is about ten, and JOB_STATUS_CHANGE flaps on nearly
/// every graph command, so this is hundreds of operations back.
const MAX_EVENTS: usize = 4096;

/// How much text of events is kept, so that few huge ones cannot eat the memory either.
const MAX_BYTES: usize = 16 << 20;

/// A place in the stream of events: between one event and the next.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Mark(u64);

impl Mark {
    /// Before the first event of the session.
    pub const START: Self = Self(0);
}

/// Something that happened in QEMU.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    /// QEMU's name for it, such as `JOB_STATUS_CHANGE`.
    pub name: String,
    /// What QEMU says about it; null if it says nothing.
    pub data: Value,
    /// Its number in this session, from 1 on, without gaps.
    pub seq: u64,
}

impl Event {
    /// The place right after this event.
    pub fn mark(&self) -> Mark {
        Mark(self.seq)
    }
}

/// The newest events.
#[derive(Debug)]
pub(super) struct Ring {
    /// Each with the length of its line.
    kept: VecDeque<(Arc<Event>, usize)>,
    bytes: usize,
    newest: u64,
}

impl Ring {
    pub(super) fn new() -> Self {
        Self {
            kept: VecDeque::new(),
            bytes: 0,
            newest: 0,
        }
    }

    /// The place after the newest event.
    pub(super) fn end(&self) -> Mark {
        Mark(self.newest)
    }

    /// Adds an event whose line was `bytes` long. The newest event is kept however long it is.
    pub(super) fn push(&mut self, name: String, data: Value, bytes: usize) {
        self.newest += 1;
        let seq = self.newest;
        self.bytes += bytes;
        self.kept
            .push_back((Arc::new(Event { name, data, seq }), bytes));
        while self.kept.len() > MAX_EVENTS || (self.bytes > MAX_BYTES && self.kept.len() > 1) {
            if let Some((_, bytes)) = self.kept.pop_front() {
                self.bytes -= bytes;
            }
        }
    }

    /// The first event after `mark`; none if it is still to come.
    pub(super) fn after(&self, mark: Mark) -> Result<Option<Arc<Event>>> {
        let Some((oldest, _)) = self.kept.front() else {
            return Ok(None);
        };
        let next = mark.0.saturating_add(1);
        match next.checked_sub(oldest.seq) {
            None => Err(Error::EventsLost {
                missed: oldest.seq - next,
            }),
            Some(index) => Ok(usize::try_from(index)
                .ok()
                .and_then(|index| self.kept.get(index))
                .map(|(event, _)| Arc::clone(event))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filled(count: usize, bytes: usize) -> Ring {
        let mut ring = Ring::new();
        for _ in 0..count {
            ring.push("E".into(), Value::Null, bytes);
        }
        ring
    }

    #[test]
    fn the_next_event_is_the_first_after_the_mark() {
        let ring = filled(3, 1);
        let seq = |mark| ring.after(Mark(mark)).unwrap().map(|event| event.seq);
        assert_eq!(seq(0), Some(1));
        assert_eq!(seq(2), Some(3));
        assert_eq!(seq(3), None);
        assert_eq!(seq(u64::MAX), None);
        assert_eq!(ring.end(), Mark(3));
    }

    #[test]
    fn what_was_pushed_out_is_reported_with_its_count() {
        let ring = filled(MAX_EVENTS + 5, 1);
        let lost = ring.after(Mark(2)).unwrap_err();
        assert!(matches!(lost, Error::EventsLost { missed: 3 }), "{lost}");
        assert_eq!(ring.after(Mark(5)).unwrap().unwrap().seq, 6);
        assert_eq!(ring.kept.len(), MAX_EVENTS);
    }

    #[test]
    fn huge_events_push_out_earlier_but_not_themselves() {
        let ring = filled(3, MAX_BYTES + 1);
        assert_eq!(ring.kept.len(), 1);
        assert_eq!(ring.after(Mark(2)).unwrap().unwrap().seq, 3);
        assert_eq!(ring.bytes, MAX_BYTES + 1);
    }
}
