//! A thread that looks after a domain of libvirt: does it run, is our job still there, is there room
//! for scratch space, did somebody change the checkpoints?
//!
//! It polls. libvirt's events say nothing of checkpoints, of scratch space or of a restarted libvirtd; a
//! look a few times a second tells all. (How a push backup came out is heard, see outcome.rs.)

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use virt_sys as sys;

use super::Shared;
use super::ffi::{self, Domain};
use super::job::{self, Running};
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
        let running = shared.running();
        watch(&shared, running.as_ref());
        let wait = match running {
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
    state: State,
    id: Option<u32>,
    /// Our job is there.
    ours: bool,
    /// Names of checkpoints, unless one is just being made: libvirt 11.3 then lists one without a name,
    /// and its own client refuses the list.
    checkpoints: Option<Vec<String>>,
}

/// How a domain is, in libvirt's numbers.
#[derive(Debug, Clone, Copy)]
pub(super) struct State {
    state: sys::virDomainState,
    reason: u32,
}

impl State {
    pub(super) fn of(domain: &Domain) -> ffi::Result<Self> {
        let (state, reason) = domain.state()?;
        Ok(Self {
            state: state as sys::virDomainState,
            reason: reason as u32,
        })
    }

    /// Its disks are not its own yet, or no longer.
    pub(super) fn is_elsewhere(self) -> bool {
        self.state == sys::VIR_DOMAIN_PAUSED && self.reason == sys::VIR_DOMAIN_PAUSED_MIGRATION
    }

    /// A write of the guest failed, and QEMU waits to make it again.
    pub(super) fn is_stopped_by_an_error(self) -> bool {
        self.state == sys::VIR_DOMAIN_PAUSED && self.reason == sys::VIR_DOMAIN_PAUSED_IOERROR
    }
}

fn watch(shared: &Arc<Shared>, running: Option<&Arc<dyn Running>>) {
    let mark = running.map(|r| r.mark());
    let seen = shared.link.call("look after the domain", move |domain| {
        let wanted = mark.is_some();
        let ours = mark.map_or(Ok(false), |mark| job::is_ours(domain, &mark))?;
        if wanted && !ours {
            // A domain that ends takes the job along, a moment before it says so.
            std::thread::sleep(SETTLE);
        }
        Ok(Seen {
            state: State::of(domain)?,
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
                && let Some(running) = running
            {
                running.fail(shared, gone("the domain is undefined"));
            }
            // Otherwise libvirt does not answer: the backup, which is in QEMU, is none the worse.
            shared.set_down(Some(e));
            return;
        }
    };
    let down = down(&seen.state);
    shared.set_down(down.clone());
    let listed = seen.checkpoints.as_ref();
    if listed.is_some_and(|names| shared.knows_other_checkpoints(names))
        && let Err(e) = shared.look(false)
    {
        log::debug!("{e}");
    }
    match &down {
        Some(_) => shared.guest.is_off(),
        None => shared.guest.pay_aside(shared),
    }
    if shared.owed_resume.load(Ordering::Acquire) {
        match seen.state.is_stopped_by_an_error() {
            true => shared.resume(),
            false => shared.owed_resume.store(false, Ordering::Release),
        }
    }
    let Some(running) = running else { return };
    match down {
        _ if running.is_written() => {}
        Some(why) => running.fail(shared, why),
        None if running.domain() != seen.id => {
            running.fail(shared, gone("the domain was restarted"));
        }
        None => {}
    }
    if running.is_over() {
        // Also what could not be ended before.
        if let Err(e) = running.end(shared) {
            log::debug!("ending a backup that is over: {e}");
        }
    } else if seen.ours {
        running.watch(shared, seen.state);
    } else {
        Arc::clone(running).vanished(shared);
    }
}

/// Why the domain cannot be asked for anything, if it cannot.
fn down(state: &State) -> Option<Error> {
    let State { state, reason } = *state;
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

pub(super) fn gone(why: &str) -> Error {
    Error::new(Kind::NotConnected, why)
        .hint("rmdir the backup; begin another when the domain runs again")
}
