//! The instant of a backup with the guest's file systems frozen, so that what is copied is as after a
//! sync and not as after a power cut.
//!
//! A guest that stays frozen hangs. So they are thawed in every outcome, in a conversation of its own:
//! the one that froze may have ended in a silence, with the agent still at it.

use std::path::Path;
use std::time::Duration;

use crate::backend::Places;
use crate::model::Result;
use crate::qmp::Agent;

/// How long freezing may take. Whatever the guest has to write out has to be written by then; a Windows
/// guest undoes a freeze by itself after ten seconds.
const FREEZE: Duration = Duration::from_secs(10);

/// How often thawing is tried.
const TRIES: u32 = 3;

/// Does `work` while the guest's file systems are frozen, if the mount says so.
pub(super) fn frozen<T>(places: &Places, work: impl FnOnce() -> Result<T>) -> Result<T> {
    match &places.guest_agent {
        Some(agent) if places.quiesce => frozen_by(agent, places.timeout, work),
        _ => work(),
    }
}

/// Does `work` while the guest's file systems are frozen by the agent behind the socket `path`.
pub(super) fn frozen_by<T>(
    path: &Path,
    timeout: Duration,
    work: impl FnOnce() -> Result<T>,
) -> Result<T> {
    let timeout = FREEZE.min(timeout);
    // Nothing was asked for yet that would have to be undone.
    let mut agent = Agent::connect(path, timeout).map_err(|e| e.during("freeze file systems"))?;
    let asked = agent.freeze();
    if let Ok(count) = &asked {
        log::debug!("the guest froze {count} file systems");
    }
    let outcome = asked
        .map_err(|e| e.during("freeze file systems"))
        .and_then(|_| work());
    drop(agent);
    let mut thawed = Ok(0);
    for _ in 0..TRIES {
        thawed = Agent::connect(path, timeout).and_then(|mut agent| agent.thaw());
        if thawed.is_ok() {
            break;
        }
    }
    if let Err(e) = thawed {
        log::error!("the guest's file systems may still be frozen: {e}");
    }
    outcome
}
