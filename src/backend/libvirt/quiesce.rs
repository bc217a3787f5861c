//! The instant of a backup with the guest's file systems frozen, by libvirt's way to the guest's agent.
//!
//! libvirt waits for an agent for as long as it takes, and whatever else is asked of the agent waits
//! with it; calls that do not need the agent go on. So these have a [`Link`] of their own, which alone is
//! held up by a freeze that hangs.
//!
//! A guest that stays frozen hangs. So it is thawed in every outcome: also after a freeze that failed,
//! since part of the file systems may be frozen, and after one that nobody waits for any more. Whoever
//! cannot thaw it owes it, and the guard tries until it is paid.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use virt_sys as sys;

use super::Shared;
use super::ffi::{self, Domain, Fault};
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

/// How long the guard leaves it at one try.
const AGAIN: Duration = Duration::from_secs(2);

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
    let guest = &shared.guest;
    let Some(_turn) = guest.turn.try_lock_for(FREEZE) else {
        return Err(Error::new(
            Kind::Busy,
            "the guest is still being thawed after an earlier backup",
        )
        .hint(HINT));
    };
    guest.pay(shared)?;
    let [asked, late] = [Arc::clone(guest), Arc::clone(guest)];
    // In the thread of the call, which may not be made at all while an earlier one hangs.
    let freeze = move |domain: &Domain| {
        asked.ask()?;
        domain.freeze().inspect_err(|fault| {
            // What others froze is not ours to thaw. Otherwise part of it may be frozen, or will be when
            // an agent that was not waited for any longer comes to it.
            asked.set(match froze_nothing(fault) {
                true => Frost::None,
                false => Frost::Owed,
            });
        })
    };
    let thaw_late = move |domain: &Domain, _| {
        late.set(match domain.thaw() {
            Ok(_) => Frost::None,
            Err(_) => Frost::Owed,
        });
    };
    let what = "freeze the guest's file systems";
    let frozen = match shared.agent.call_or_undo(what, freeze, thaw_late) {
        Ok(frozen) => frozen,
        Err(e) => {
            // After a silence the freeze is still under way.
            if let Err(e) = guest.pay(shared) {
                log::error!("{STILL_FROZEN}: {e}");
            }
            return Err(e);
        }
    };
    let outcome = work(&shared.link.within(FREEZE));
    guest.set(Frost::Owed);
    let (why, hint) = match thaw(shared) {
        // None was left to thaw.
        Ok(0) if frozen > 0 => {
            guest.set(Frost::None);
            let why = "the guest's file systems did not stay frozen for as long as it took";
            (
                why.to_owned(),
                "does something else in the guest thaw them?",
            )
        }
        Ok(_) => {
            guest.set(Frost::None);
            return outcome;
        }
        Err(e) => {
            log::error!("{STILL_FROZEN}: {e}");
            let hint = "it is tried again for as long as this is mounted; or: virsh domfsthaw";
            (format!("{STILL_FROZEN}: {e}"), hint)
        }
    };
    // Whoever asked for the backup has to know; a log is read later.
    match outcome {
        Ok(done) => undo(done),
        Err(e) => log::error!("while they were frozen: {e}"),
    }
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

/// A refusal after which nothing is frozen by us, and nothing will be: the agent was not asked, or it
/// refuses nearly everything while file systems are frozen (qemu-ga's words for that have changed), or is
/// configured not to freeze.
fn froze_nothing(fault: &Fault) -> bool {
    let says = |words| fault.message.contains(words);
    match fault.code {
        sys::VIR_ERR_ARGUMENT_UNSUPPORTED | sys::VIR_ERR_OPERATION_INVALID => true,
        sys::VIR_ERR_AGENT_UNRESPONSIVE => says("synchroni") || says("not connected"),
        _ => says("frozen state") || says("has been disabled"),
    }
}

/// How the guest's file systems are, as far as it is our doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Frost {
    /// Not frozen.
    None,
    /// The agent was asked to freeze them, and has not been told to thaw.
    Asked,
    /// They have to be thawed, and nobody is at it.
    Owed,
}

/// The guest as the agent knows it. Whoever cannot thaw it owes it, and the guard sees to that.
pub(super) struct Guest {
    frost: Mutex<Frost>,
    /// Held by whoever asks the agent for something: a thaw that comes late must not undo the next freeze.
    turn: Mutex<()>,
    /// When a thaw that is owed was tried last.
    tried: Mutex<Option<Instant>>,
    /// Names the domain for the next fleecefs, should this one be killed.
    note: PathBuf,
    uuid: String,
}

impl Guest {
    pub(super) fn new(note: PathBuf, uuid: String) -> Self {
        Self {
            frost: Mutex::new(Frost::None),
            turn: Mutex::default(),
            tried: Mutex::default(),
            note,
            uuid,
        }
    }

    /// The agent is about to be asked. Without the note it is not.
    fn ask(&self) -> ffi::Result<()> {
        std::fs::write(&self.note, &self.uuid).map_err(|e| {
            let what = format!("cannot write {}: {e}", self.note.display());
            Fault::new(sys::VIR_ERR_SYSTEM_ERROR, what)
        })?;
        self.set(Frost::Asked);
        Ok(())
    }

    fn set(&self, frost: Frost) {
        let mut now = self.frost.lock();
        *now = frost;
        if frost == Frost::None {
            // There may be none.
            let _ = std::fs::remove_file(&self.note);
        }
    }

    fn is_owed(&self) -> bool {
        *self.frost.lock() == Frost::Owed
    }

    /// Something was left frozen by an earlier fleecefs.
    pub(super) fn owe(&self) {
        if let Err(fault) = self.ask() {
            log::warn!("{}", fault.message);
        }
        self.set(Frost::Owed);
    }

    /// The domain does not run.
    pub(super) fn is_off(&self) {
        self.set(Frost::None);
    }

    /// Thaws it, if that is owed; whoever calls has the turn.
    fn pay(&self, shared: &Shared) -> Result<()> {
        if self.is_owed() {
            thaw(shared)?;
            self.set(Frost::None);
        }
        Ok(())
    }

    /// A last try.
    pub(super) fn close(&self, shared: &Shared) {
        let turn = self.turn.try_lock_for(FREEZE);
        if turn.is_some()
            && let Err(e) = self.pay(shared)
        {
            log::error!("{STILL_FROZEN}: {e}");
        }
    }

    /// Thaws it now and then, if that is owed, without waiting for it.
    pub(super) fn pay_aside(self: &Arc<Self>, shared: &Arc<Shared>) {
        {
            let mut tried = self.tried.lock();
            if !self.is_owed() || tried.is_some_and(|at| at.elapsed() < AGAIN) {
                return;
            }
            *tried = Some(Instant::now());
        }
        let (own, shared) = (Arc::clone(self), Arc::clone(shared));
        let thread = std::thread::Builder::new().name("thaw".to_owned());
        let spawned = thread.spawn(move || {
            let Some(_turn) = own.turn.try_lock() else {
                return;
            };
            match own.pay(&shared) {
                Ok(()) => log::info!("the guest's file systems are thawed"),
                Err(e) => log::debug!("{e}"),
            }
        });
        if let Err(e) = spawned {
            log::error!("the guest may be frozen, and there is no thread to thaw it: {e}");
        }
    }
}
