//! The instant of a backup with the guest's file systems frozen, by libvirt's way to the guest's agent.
//!
//! libvirt waits for an agent for as long as it takes, and whatever else is asked of the agent waits
//! with it; calls that do not need the agent go on. So these have a [`Link`](super::link::Link) of their
//! own, which alone is held up by a freeze that hangs.
//!
//! A guest that stays frozen hangs. So it is thawed in every outcome: also after a freeze that failed,
//! since part of the file systems may be frozen, and after one that nobody waits for any more.

use std::time::Duration;

use super::Shared;
use super::ffi::Domain;
use super::link::Link;
use crate::model::{Error, Kind, Result};

/// How long freezing may take, and what is then done while all is frozen. Whatever the guest has to
/// write out has to be written by then; a Windows guest undoes a freeze by itself after ten seconds.
pub(super) const FREEZE: Duration = Duration::from_secs(10);

/// What may be wrong when the agent does not answer.
pub(super) const HINT: &str = "does qemu-guest-agent run in the guest, and is it not held up by a \
                               file system that cannot be written, such as one over a network?";

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
    let freeze = |domain: &Domain| {
        domain.freeze().inspect_err(|_| {
            // What can be thawed is; the error of the freeze says more.
            let _ = domain.thaw();
        })
    };
    let late = |domain: &Domain, ()| {
        if let Err(fault) = domain.thaw() {
            log::error!("a late freeze could not be undone: {}", fault.message);
        }
    };
    let what = "freeze the guest's file systems";
    shared.agent.call_or_undo(what, freeze, late)?;
    let outcome = work(&shared.link.within(FREEZE));
    let Err(why) = thaw(shared) else {
        return outcome;
    };
    // Whoever asked for the backup has to know; a log is read later.
    log::error!("the guest's file systems may still be frozen: {why}");
    match outcome {
        Ok(done) => undo(done),
        Err(e) => log::error!("while they were frozen: {e}"),
    }
    Err(Error::new(
        Kind::Io,
        format!("the guest's file systems may still be frozen: {why}"),
    )
    .hint("the guest hangs until they are thawed: virsh domfsthaw"))
}

fn thaw(shared: &Shared) -> Result<()> {
    let once = || {
        let thaw = |domain: &Domain| domain.thaw();
        shared.agent.call("thaw the guest's file systems", thaw)
    };
    (1..TRIES).fold(once(), |thawed, _| thawed.or_else(|_| once()))
}
