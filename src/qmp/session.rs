//! What the reader thread and the callers share: replies by id, events, and whether it is over.
//!
//! One lock and one condition variable for all of it. Everybody is woken by everything; there are
//! few callers, and one reason to wake cannot be forgotten for another.

use std::collections::HashMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use super::deadline::Deadline;
use super::events::Ring;
use super::wire::{Incoming, Reply};
use super::{Error, Event, Mark, Result, Version};

pub(super) struct Session {
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    greeting: Option<Version>,
    /// The ids that somebody waits for. A reply to any other is dropped.
    replies: HashMap<u64, Option<Reply>>,
    events: Ring,
    /// Somebody is writing a line. Not a mutex: a mutex cannot be awaited with a deadline.
    sending: bool,
    /// Why the session is over.
    ended: Option<String>,
}

impl State {
    fn check_alive(&self) -> Result<()> {
        match &self.ended {
            Some(reason) => Err(Error::Disconnected {
                reason: reason.clone(),
            }),
            None => Ok(()),
        }
    }
}

impl Session {
    pub(super) fn new() -> Self {
        Self {
            state: Mutex::new(State {
                greeting: None,
                replies: HashMap::new(),
                events: Ring::new(),
                sending: false,
                ended: None,
            }),
            changed: Condvar::new(),
        }
    }

    /// Takes in a line that was `bytes` long. An error is a reason to end the session.
    pub(super) fn take(&self, incoming: Incoming, bytes: usize) -> std::result::Result<(), String> {
        let mut state = self.lock();
        match incoming {
            Incoming::Greeting(version) => {
                state.greeting.get_or_insert(version);
            }
            _ if state.greeting.is_none() => return Err("its greeting is not that of QMP".into()),
            Incoming::Event { name, data } => state.events.push(name, data, bytes),
            Incoming::Reply { id, reply } => match state.replies.get_mut(&id) {
                Some(slot @ None) => *slot = Some(reply),
                _ => log::debug!("dropped a reply to {id}: nobody waits for it"),
            },
            Incoming::Stray => log::debug!("passed over a line of {bytes} bytes: not understood"),
        }
        self.changed.notify_all();
        Ok(())
    }

    /// Ends the session; the first reason given stays.
    pub(super) fn end(&self, reason: String) {
        self.lock().ended.get_or_insert(reason);
        self.changed.notify_all();
    }

    /// Fails if the session is over.
    pub(super) fn check_alive(&self) -> Result<()> {
        self.lock().check_alive()
    }

    /// The greeting; none if it did not come in time.
    pub(super) fn greeting(&self, deadline: Deadline) -> Result<Option<Version>> {
        self.wait(deadline, |state| match state.greeting {
            Some(version) => Ok(Some(version)),
            None => state.check_alive().map(|()| None),
        })
    }

    /// The place after the newest event.
    pub(super) fn mark(&self) -> Mark {
        self.lock().events.end()
    }

    /// The first event after `mark`; none if it did not come in time. What came before the end of
    /// the session is still given out after it.
    pub(super) fn event(&self, mark: Mark, deadline: Deadline) -> Result<Option<Arc<Event>>> {
        self.wait(deadline, |state| match state.events.after(mark)? {
            Some(event) => Ok(Some(event)),
            None => state.check_alive().map(|()| None),
        })
    }

    /// Registers `id`, so that its reply will be kept. To be done before the command is sent.
    pub(super) fn await_reply(&self, id: u64) -> Awaited<'_> {
        self.lock().replies.insert(id, None);
        Awaited { session: self, id }
    }

    /// The right to write a line, one at a time; none if it was not to be had in time.
    pub(super) fn turn_to_send(&self, deadline: Deadline) -> Result<Option<Turn<'_>>> {
        self.wait(deadline, |state| {
            state.check_alive()?;
            let free = !state.sending;
            state.sending = true;
            // Made lazily: its drop would give a turn back that was not had.
            Ok(free.then(|| Turn { session: self }))
        })
    }

    /// Waits until `ready` gives something or fails. None if the deadline passes before.
    fn wait<T>(
        &self,
        deadline: Deadline,
        mut ready: impl FnMut(&mut State) -> Result<Option<T>>,
    ) -> Result<Option<T>> {
        let mut state = self.lock();
        loop {
            if let Some(found) = ready(&mut state)? {
                return Ok(Some(found));
            }
            let remaining = deadline.remaining();
            if remaining.is_zero() {
                return Ok(None);
            }
            (state, _) = self
                .changed
                .wait_timeout(state, remaining)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// No code of others runs under the lock, and the state is whole between any two statements
    /// that do: a poisoned lock is as good as any.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A reply that is to come. Dropping it withdraws the id, and a late reply is then nobody's.
pub(super) struct Awaited<'a> {
    session: &'a Session,
    id: u64,
}

impl Awaited<'_> {
    /// The reply; none if it did not come in time. A reply that came before the end of the session
    /// counts: that is how `quit` is answered.
    pub(super) fn wait(self, deadline: Deadline) -> Result<Option<Reply>> {
        self.session.wait(deadline, |state| {
            match state.replies.get_mut(&self.id).and_then(Option::take) {
                Some(reply) => Ok(Some(reply)),
                None => state.check_alive().map(|()| None),
            }
        })
    }
}

impl Drop for Awaited<'_> {
    fn drop(&mut self) {
        self.session.lock().replies.remove(&self.id);
    }
}

/// The right to write a line. Dropping it gives it to the next.
pub(super) struct Turn<'a> {
    session: &'a Session,
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.session.lock().sending = false;
        self.session.changed.notify_all();
    }
}
