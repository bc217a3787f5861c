//! The instant of a backup with the guest's file systems frozen, by libvirt's way to the guest's agent.
//!
//! libvirt waits for an agent for as long as it takes, and whatever else is asked of the agent waits
//! with it; calls that do not need the agent go on. So these have a [`Link`] of their own, which alone is
//! held up by a freeze that hangs.
//!
//! A guest that stays frozen hangs. So it is thawed in every outcome: also after a freeze that failed,
//! since part of the file systems may be frozen, and after one that nobody waits for any more. Whoever
//! cannot thaw it owes it, and the guard tries until it is paid.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::Shared;
use super::ffi::{Domain, Fault};
use super::link::Link;
use crate::model::{Error, Kind, Result};

/// How long freezing may take, and what is then done while all is frozen. Whatever the guest has to
/// write out has to be written by then; a Windows guest undoes a freeze by itself after ten seconds.
pub(super) const FREEZE: Duration = Duration::from_secs(10);

/// What may be wrong when the agent does not answer.
pub(super) const HINT: &str = "does qemu-guest-agent run in the guest, and is it not held up by a \
                               file system that cannot be written, such as one over a network?";

/// What a thaw that failed means.
const STILL_FROZEN: &str = "the guest's file systems may still be frozen";

/// How often thawing is tried.
const TRIES: u32 = 3;

/// Does `work`, over the link that it is given, while the guest's file systems are frozen, if that is
/// wanted. A guest that could not be thawed is an error, and `undo` is then what happens to work that was
/// done.
pub(super) fn frozen<T>(
    shared: &Shared,
    wanted: bool,
    work: impl FnOnce(&Link) -> Result<T>,
    undo: impl FnOnce(T),
) -> Result<T> {
    if !wanted {
        return work(&shared.link);
    }
    let owed = &shared.owed_thaw;
    owed.settle(shared)?;
    // For the next fleecefs, should this one be killed.
    shared.rundir.note_frozen(&shared.uuid)?;
    let [failed, late] = [Arc::clone(owed), Arc::clone(owed)];
    let freeze = move |domain: &Domain| {
        domain.freeze().inspect_err(|fault| {
            // What others froze is not ours to thaw. Otherwise part of it may be frozen, or will be when
            // an agent that was not waited for any longer comes to it.
            if !is_frozen_by_others(fault) {
                failed.owe();
            }
        })
    };
    let thaw_late = move |domain: &Domain, _| {
        if domain.thaw().is_err() {
            late.owe();
        }
    };
    let what = "freeze the guest's file systems";
    let frozen = match shared.agent.call_or_undo(what, freeze, thaw_late) {
        Ok(frozen) => frozen,
        Err(e) => {
            // After a silence the freeze is still under way.
            if e.kind() != Kind::TimedOut
                && let Err(e) = owed.pay(shared)
            {
                log::error!("{STILL_FROZEN}: {e}");
            }
            return Err(e);
        }
    };
    let outcome = work(&shared.link.within(FREEZE));
    let why = match thaw(shared) {
        // None was left to thaw.
        Ok(0) if frozen > 0 => {
            owed.forget(shared);
            "the guest's file systems did not stay frozen for as long as it took".to_owned()
        }
        Ok(_) => {
            owed.forget(shared);
            return outcome;
        }
        Err(e) => {
            owed.owe();
            log::error!("{STILL_FROZEN}: {e}");
            format!("{STILL_FROZEN}: {e}")
        }
    };
    // Whoever asked for the backup has to know; a log is read later.
    match outcome {
        Ok(done) => undo(done),
        Err(e) => log::error!("while they were frozen: {e}"),
    }
    let hint = match owed.is_owed() {
        true => "it is tried again for as long as this is mounted; or: virsh domfsthaw",
        false => "does something else in the guest thaw them?",
    };
    Err(Error::new(Kind::Io, why).hint(hint))
}

/// Thaws the guest; how many file systems.
fn thaw(shared: &Shared) -> Result<u32> {
    let once = || {
        let thaw = |domain: &Domain| domain.thaw();
        shared.agent.call("thaw the guest's file systems", thaw)
    };
    (1..TRIES).fold(once(), |thawed, _| thawed.or_else(|_| once()))
}

/// qemu-ga refuses nearly everything while file systems are frozen, freezing them once more as well.
fn is_frozen_by_others(fault: &Fault) -> bool {
    fault.message.contains("frozen state")
}

/// Whether a guest has yet to be thawed. The guard sees to it, until it is.
#[derive(Default)]
pub(super) struct OwedThaw {
    owed: AtomicBool,
    /// Somebody is at it.
    paying: AtomicBool,
}

impl OwedThaw {
    pub(super) fn owe(&self) {
        self.owed.store(true, Ordering::Release);
    }

    pub(super) fn is_owed(&self) -> bool {
        self.owed.load(Ordering::Acquire)
    }

    /// Nothing is frozen, as in a domain that does not run.
    pub(super) fn forget(&self, shared: &Shared) {
        self.owed.store(false, Ordering::Release);
        // There may be none.
        let _ = std::fs::remove_file(shared.rundir.frozen_note());
    }

    /// Thaws the guest, if that is owed.
    pub(super) fn pay(&self, shared: &Shared) -> Result<()> {
        if self.is_owed() {
            thaw(shared)?;
        }
        self.forget(shared);
        Ok(())
    }

    /// Before the next freeze, which a thaw that comes too late would undo.
    fn settle(&self, shared: &Shared) -> Result<()> {
        if self.paying.load(Ordering::Acquire) {
            return Err(Error::new(
                Kind::Busy,
                "the guest is still being thawed after an earlier backup",
            )
            .hint(HINT));
        }
        self.pay(shared)
    }

    /// The same without waiting for it; nothing if somebody is at it.
    pub(super) fn pay_aside(self: &Arc<Self>, shared: &Arc<Shared>) {
        if !self.is_owed() || self.paying.swap(true, Ordering::AcqRel) {
            return;
        }
        let (own, shared) = (Arc::clone(self), Arc::clone(shared));
        let thread = std::thread::Builder::new().name("thaw".to_owned());
        let spawned = thread.spawn(move || {
            match own.pay(&shared) {
                Ok(()) => log::info!("the guest's file systems are thawed"),
                Err(e) => log::debug!("{e}"),
            }
            own.paying.store(false, Ordering::Release);
        });
        if let Err(e) = spawned {
            log::error!("the guest may be frozen, and there is no thread to thaw it: {e}");
            self.paying.store(false, Ordering::Release);
        }
    }
}
