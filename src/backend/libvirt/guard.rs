//! A thread that looks after a domain of libvirt: does it run, is our job still there, is there room
//! for scratch space, did somebody change the checkpoints?
//!
//! It polls. libvirt's events need an event loop of libvirt's in this process, and say nothing of
//! checkpoints, of scratch space or of a restarted libvirtd; a look a few times a second tells all.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use virt_sys as sys;

use super::session::{Session, is_ours};
use super::{Shared, look};
use crate::backend::Notice;
use crate::backend::watch::Watcher;
use crate::model::{Error, Kind};

/// How often it looks while a backup runs, and how often its end is looked for.
const LOOK: Duration = Duration::from_millis(250);

/// How often it looks while none does.
const IDLE: Duration = Duration::from_secs(1);

/// How long a job that is gone may be so because its domain is about to be.
const SETTLE: Duration = Duration::from_millis(200);

pub(super) fn start(shared: &Arc<Shared>) -> Watcher {
    let weak = Arc::downgrade(shared);
    Watcher::start(move |stop| run(&weak, stop))
}

fn run(shared: &Weak<Shared>, stop: &AtomicBool) {
    while !stop.load(Ordering::Acquire) {
        let Some(shared) = shared.upgrade() else {
            return;
        };
        let began = Instant::now();
        let session = shared.session.lock().clone();
        watch(&shared, session.as_deref());
        let wait = match session {
            Some(_) => LOOK,
            None => IDLE,
        };
        drop(shared);
        while !stop.load(Ordering::Acquire) && began.elapsed() < wait {
            std::thread::park_timeout(wait.saturating_sub(began.elapsed()));
        }
    }
}

/// What one look tells.
struct Seen {
    state: i32,
    reason: i32,
    id: Option<u32>,
    /// Our job is there.
    ours: bool,
    /// Names of checkpoints, unless one is just being made: libvirt 11.3 then lists one without a name,
    /// and its own client refuses the list.
    checkpoints: Option<Vec<String>>,
}

fn watch(shared: &Shared, session: Option<&Session>) {
    let socket = session.map(|s| s.socket().to_owned());
    let seen = shared.link.call("look after the domain", move |domain| {
        let wanted = socket.is_some();
        let ours = socket.map_or(Ok(false), |socket| is_ours(domain, &socket))?;
        if wanted && !ours {
            // A domain that ends takes the job along, a moment before it says so.
            std::thread::sleep(SETTLE);
        }
        let (state, reason) = domain.state()?;
        Ok(Seen {
            state,
            reason,
            id: domain.id(),
            ours,
            checkpoints: domain
                .checkpoints()
                .ok()
                .map(|all| all.iter().map(|c| c.name()).collect()),
        })
    });
    let seen = match seen {
        Ok(seen) => seen,
        Err(e) => {
            if shared.link.is_undefined()
                && let Some(session) = session
            {
                fail(shared, session, gone("the domain is undefined"));
            }
            // Otherwise libvirt does not answer: the backup, which is in QEMU, is none the worse.
            shared.set_down(Some(e));
            return;
        }
    };
    let down = down(&seen);
    shared.set_down(down.clone());
    let listed = seen.checkpoints.as_ref();
    if listed.is_some_and(|names| shared.knows_other_checkpoints(names))
        && let Ok(look) = look::look(&shared.link, false)
    {
        shared.note_checkpoints(&look.checkpoints);
    }
    let Some(session) = session else { return };
    match down {
        Some(why) => fail(shared, session, why),
        None if !session.is_of(seen.id) => {
            fail(shared, session, gone("the domain was restarted"));
        }
        None if !seen.ours && session.fate.failure().is_none() => {
            let why = "libvirt's job is gone: it was aborted by someone else (virsh domjobabort), or \
                       failed";
            fail(shared, session, gone(why));
        }
        None => {}
    }
    if session.fate.failure().is_some() {
        // Also what could not be ended before.
        if let Err(e) = session.end(shared) {
            log::debug!("ending a backup that is over: {e}");
        }
        return;
    }
    watch_space(shared, session, &seen);
}

/// Why the domain cannot be asked for anything, if it cannot.
fn down(seen: &Seen) -> Option<Error> {
    let state = seen.state as sys::virDomainState;
    let reason = seen.reason as sys::virDomainShutoffReason;
    let why = match (state, reason) {
        (sys::VIR_DOMAIN_CRASHED, _) | (_, sys::VIR_DOMAIN_SHUTOFF_CRASHED)
            if state == sys::VIR_DOMAIN_CRASHED || state == sys::VIR_DOMAIN_SHUTOFF =>
        {
            "the domain crashed"
        }
        (sys::VIR_DOMAIN_SHUTOFF, sys::VIR_DOMAIN_SHUTOFF_DESTROYED) => "the domain was destroyed",
        (sys::VIR_DOMAIN_SHUTOFF, sys::VIR_DOMAIN_SHUTOFF_MIGRATED) => {
            "the domain was migrated to another host"
        }
        (sys::VIR_DOMAIN_SHUTOFF, _) => "the domain is shut off",
        _ => return None,
    };
    Some(gone(why))
}

fn gone(why: &str) -> Error {
    Error::new(Kind::NotConnected, why)
        .hint("rmdir the backup; begin another when the domain runs again")
}

/// Ends the backup before the guest has to pay for it. Scratch space that is full stops the guest;
/// once the backup is ended, its write is made again.
fn watch_space(shared: &Shared, session: &Session, seen: &Seen) {
    let used = session.scratch_used();
    let limit = shared.places.scratch_limit;
    let room = session.room();
    let most = match (limit, room.map(|room| room.saturating_add(used))) {
        (Some(a), Some(b)) => Some(a.min(b)),
        (a, b) => a.or(b),
    };
    if let Some(most) = most.filter(|m| used.saturating_mul(4) >= m.saturating_mul(3))
        && used > 0
        && session.fate.warn_once()
    {
        shared.notify(Notice::ScratchThreshold(session.id, used, most));
    }
    let stopped = seen.state as sys::virDomainState == sys::VIR_DOMAIN_PAUSED
        && seen.reason as sys::virDomainPausedReason == sys::VIR_DOMAIN_PAUSED_IOERROR;
    let (why, hint) = if let Some(limit) = limit.filter(|limit| used > *limit) {
        (
            format!("the backup took {used} bytes of scratch space, {limit} allowed"),
            "raise -o scratch-limit=",
        )
    } else if room == Some(0) || stopped {
        let why = match stopped {
            true => "a write of the guest failed, as when the scratch space is full",
            false => "the scratch directory is nearly full",
        };
        (
            why.to_owned(),
            "use a larger -o scratch=DIR, or read faster",
        )
    } else {
        return;
    };
    let why = format!("{why}; the backup was ended so that the guest can go on");
    log::error!("{why} ({hint})");
    fail(shared, session, Error::new(Kind::NoSpace, why).hint(hint));
    if let Err(e) = session.end(shared) {
        log::error!("ending it: {e}");
        return;
    }
    if stopped && let Err(e) = shared.link.call("resume the domain", |d| d.resume()) {
        log::error!("the guest is stopped and cannot be made to go on: {e}");
    }
}

/// From now on reads of the backup fail, and whoever listens is told.
fn fail(shared: &Shared, session: &Session, why: Error) {
    if session.fate.fail(why.clone()) {
        shared.notify(Notice::Over(session.id, Err(why)));
    }
}
