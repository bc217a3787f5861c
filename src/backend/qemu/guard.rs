//! The guest comes first: a thread that ends a backup before the guest has to pay for it.
//!
//! When the scratch space is full, copy-before-write fails and with it the guest's write; with
//! QEMU's default `werror` the guest is paused. So free space is looked at a few times a second while
//! a backup runs and the largest one is ended in time. Should the guest have been stopped all the
//! same, the backup is ended and the guest goes on, unharmed: its write is made again. The same goes
//! for a push backup whose target is full. The thread also sees to push backups that were written.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use super::Shared;
use super::freeze::Session;
use crate::backend::Notice;
use crate::backend::scratch;
use crate::backend::watch::Watcher;
use crate::model::{Error, Kind};
use crate::qmp;

/// How often free space is looked at while a backup runs.
const LOOK: Duration = Duration::from_millis(200);

/// How often the thread looks whether it is still wanted.
const IDLE: Duration = Duration::from_millis(500);

/// How often the remains of a backup that is over are taken apart, where that failed before.
const SETTLE: Duration = Duration::from_secs(2);

pub(super) fn start(shared: &Arc<Shared>) -> Watcher {
    let weak = Arc::downgrade(shared);
    Watcher::start(move |stop| run(&weak, stop))
}

fn run(shared: &Weak<Shared>, stop: &AtomicBool) {
    let mut mark = qmp::Mark::START;
    let mut client: Option<Arc<qmp::Client>> = None;
    let mut last_look = Instant::now();
    let mut last_settled = Instant::now();
    while !stop.load(Ordering::Acquire) {
        let Some(shared) = shared.upgrade() else {
            return;
        };
        let sessions = shared.sessions.lock().clone();
        let idle = sessions.is_empty() && shared.pushes.lock().is_empty();
        // Only a running backup is worth connecting again for.
        if client.as_ref().is_none_or(|c| !c.is_connected()) {
            client = follow(&shared, &sessions);
            mark = qmp::Mark::START;
        }
        let wait = if idle { IDLE } else { LOOK };
        let event = match &client {
            Some(client) => client.next_event(mark, wait),
            None => {
                std::thread::sleep(wait);
                Ok(None)
            }
        };
        match event {
            Ok(Some(event)) => {
                mark = event.mark();
                match event.name.as_str() {
                    "BLOCK_IO_ERROR" => write_failed(&shared, &event),
                    "JOB_STATUS_CHANGE" if event.data["status"] == "concluded" => {
                        watch_pushes(&shared);
                    }
                    _ => {}
                }
            }
            Ok(None) => {}
            // The next round connects again; after lost events, go on with those to come.
            Err(_) => {
                mark = client.as_ref().map_or(mark, |c| c.mark());
                write_may_have_failed(&shared);
            }
        }
        // By the clock: a QEMU that is never silent must not keep us from looking.
        if last_look.elapsed() >= wait {
            watch_space(&shared);
            watch_pushes(&shared);
            last_look = Instant::now();
        }
        if last_settled.elapsed() >= SETTLE {
            // Fails as long as QEMU does not answer, and was logged when it first did.
            let _ = shared.settle();
            last_settled = Instant::now();
        }
    }
}

/// The client to listen to. Backups whose QEMU is gone or was restarted are over.
fn follow(shared: &Shared, sessions: &[Arc<Session>]) -> Option<Arc<qmp::Client>> {
    let gone = |sessions: &[Arc<Session>]| {
        for session in sessions {
            let why = Error::new(Kind::NotConnected, "the domain is gone")
                .hint("rmdir the backup; begin another when the domain runs again");
            fail(shared, session, why);
        }
    };
    match shared.link.monitor() {
        Ok(monitor) => {
            let pid = monitor.client().peer().pid;
            let lost: Vec<_> = sessions.iter().filter(|s| !s.is_of(pid)).cloned().collect();
            gone(&lost);
            Some(Arc::clone(monitor.client()))
        }
        Err(e) => {
            if e.kind() == Kind::NotConnected {
                gone(sessions);
            }
            None
        }
    }
}

/// Has push backups look how far they are.
fn watch_pushes(shared: &Shared) {
    let pushes = shared.pushes.lock().clone();
    for push in pushes {
        push.watch(shared);
    }
}

/// Ends the backup that takes the most, if space is short or its limit is reached.
fn watch_space(shared: &Shared) {
    let sessions = running(shared);
    warn(shared, &sessions);
    if let Some(limit) = shared.places.scratch_limit {
        for session in &sessions {
            let used = session.scratch_used();
            if used > limit {
                let why = format!("the backup took {used} bytes of scratch space, {limit} allowed");
                break_off(shared, session, &why, "raise -o scratch-limit=");
            }
        }
    }
    if sessions.iter().any(|s| s.is_short_of_room()) {
        end_largest(shared, "the scratch space is nearly full");
    }
}

/// A guest's write failed on one of our filters: no space to copy the old content to.
fn write_failed(shared: &Shared, event: &qmp::Event) {
    let node = event.data["node-name"].as_str().unwrap_or_default();
    let pulls = shared.sessions.lock().clone();
    let pushes = shared.pushes.lock().clone();
    let ours = pulls.iter().any(|p| p.below(node).is_some())
        || pushes.iter().any(|p| p.below(node).is_some());
    if !ours || event.data["operation"] != "write" {
        return;
    }
    give_way(shared, node);
    if event.data["action"] == "stop" {
        go_on(shared);
    }
}

/// Events were lost, and that a guest's write failed may be among them.
fn write_may_have_failed(shared: &Shared) {
    let short = running(shared).iter().any(|s| s.is_short_of_room())
        || shared.pushes.lock().iter().any(|p| p.is_out_of_room());
    let stopped = || {
        let state = shared
            .link
            .monitor()
            .and_then(|monitor| monitor.run_state());
        state.is_ok_and(|state| state == "io-error")
    };
    if short && stopped() {
        give_way(shared, "");
        go_on(shared);
    }
}

/// Ends the backup for which there was no space.
fn give_way(shared: &Shared, node: &str) {
    let pushes = shared.pushes.lock().clone();
    // Filters lie over each other, and the topmost is told of what failed in any of them.
    let full = pushes.iter().find(|p| p.is_out_of_room());
    match full.or_else(|| pushes.iter().find(|p| p.below(node).is_some())) {
        Some(push) => {
            let why = Error::new(
                Kind::NoSpace,
                "a target is full; the backup was ended so that the guest can go on",
            )
            .hint("make room for the target");
            push.fail(shared, why);
        }
        None => end_largest(shared, "the scratch space is full"),
    }
}

/// Has the guest make its write again; if it fails again, the next backup goes.
fn go_on(shared: &Shared) {
    let cont = shared.link.monitor().and_then(|monitor| {
        if monitor.run_state()? == "io-error" {
            log::warn!("the guest was stopped by a full scratch space; it goes on now");
            monitor.cont()?;
        }
        Ok(())
    });
    if let Err(e) = cont {
        log::error!("the guest is stopped and cannot be made to go on: {e}");
    }
}

/// Ends the one that takes the most, of those without room where any is: others have theirs elsewhere.
fn end_largest(shared: &Shared, why: &str) {
    let sessions = running(shared);
    let order = |s: &&Arc<Session>| (s.is_short_of_room(), s.scratch_used());
    if let Some(session) = sessions.iter().max_by_key(order) {
        let hint = "use a larger -o scratch=DIR, or read faster";
        break_off(shared, session, why, hint);
    }
}

/// Tells once of each backup that it has taken three quarters of what it may take: of its limit, or
/// of the room that it shares with others.
fn warn(shared: &Shared, sessions: &[Arc<Session>]) {
    let limit = shared.places.scratch_limit;
    let room = scratch::room(&shared.places.scratch);
    let used: u64 = sessions.iter().map(|s| s.scratch_used()).sum();
    for session in sessions {
        let own = session.scratch_used();
        let left = room.map(|room| used.saturating_add(room));
        let short = |used: u64, limit: Option<u64>| {
            limit.filter(|limit| used.saturating_mul(4) >= limit.saturating_mul(3))
        };
        let reached = short(own, limit).map(|limit| (own, limit));
        let reached = reached.or_else(|| short(used, left).map(|limit| (used, limit)));
        if let Some((used, limit)) = reached.filter(|_| session.fate.warn_once()) {
            shared.notify(Notice::ScratchThreshold(session.id, used, limit));
        }
    }
}

/// From now on reads of the backup fail, and whoever listens is told.
fn fail(shared: &Shared, session: &Session, why: Error) {
    if session.fail(why.clone()) {
        shared.notify(Notice::Over(session.id, Err(why)));
    }
}

fn running(shared: &Shared) -> Vec<Arc<Session>> {
    let sessions = shared.sessions.lock();
    let alive = sessions.iter().filter(|s| s.fate.failure().is_none());
    alive.cloned().collect()
}

fn break_off(shared: &Shared, session: &Session, why: &str, hint: &str) {
    let why = format!("{why}; the backup was ended so that the guest can go on");
    log::error!("{why} ({hint})");
    fail(shared, session, Error::new(Kind::NoSpace, why).hint(hint));
    if let Err(e) = session.end(shared) {
        log::error!("ending it: {e}");
    }
}
