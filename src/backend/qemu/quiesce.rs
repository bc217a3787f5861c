//! The instant of a backup with the guest's file systems frozen, so that what is copied is as after a
//! sync and not as after a power cut.
//!
//! A guest that stays frozen hangs. So they are thawed in every outcome, and in the conversation in
//! which they were frozen, for three reasons. The channel serves one client at a time, so nobody gets in
//! between. An agent that is still at the freeze when nobody waits for it any more will freeze in the
//! end, and has to find there what it is to do next. And it has to find somebody there: qemu-ga (7.2,
//! `ga_channel_write_all`) spins for as long as nobody takes its answer, and gets no further. So after a
//! freeze that was not answered a thread stays on the line.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use parking_lot::Mutex;

use super::Shared;
use crate::backend::watch::Watcher;
use crate::model::{Error, Kind, Result};
use crate::qmp::Agent;

/// How long freezing may take. Whatever the guest has to write out has to be written by then; a Windows
/// guest undoes a freeze by itself after ten seconds.
const FREEZE: Duration = Duration::from_secs(10);

/// Does `work` while the guest's file systems are frozen, if the mount says so.
pub(super) fn frozen<T>(shared: &Shared, work: impl FnOnce() -> Result<T>) -> Result<T> {
    match &shared.places.guest_agent {
        Some(agent) if shared.places.quiesce => frozen_by(shared, agent, work),
        _ => work(),
    }
}

/// Does `work` while the guest's file systems are frozen by the agent behind the socket `path`.
pub(super) fn frozen_by<T>(
    shared: &Shared,
    path: &Path,
    work: impl FnOnce() -> Result<T>,
) -> Result<T> {
    let timeout = FREEZE.min(shared.places.timeout);
    let during = |e: Error| e.during("freeze file systems");
    // Nothing was asked for yet that would have to be undone.
    let mut agent = Agent::connect(path, timeout).map_err(during)?;
    if agent.is_frozen().map_err(during)? {
        // Not ours to thaw: whoever froze them relies on it.
        return Err(during(
            Error::new(Kind::Busy, "the guest's file systems are frozen already").hint(
                "wait until whoever froze them has thawed them; if nobody will, send \
                 {\"execute\":\"guest-fsfreeze-thaw\"} to the agent",
            ),
        ));
    }
    // For the next fleecefs, should this one be killed.
    shared
        .rundir
        .note_frozen(&path.display().to_string())
        .map_err(during)?;
    let mut asked = Asked {
        agent: Some(agent),
        count: 0,
        patience: timeout,
        shared,
        path,
        timeout,
    };
    let done = asked.freeze().map_err(during).and_then(|()| work())?;
    // Whoever asked for the backup has to know if it was no such instant, or if the guest may hang.
    asked.thaw().map(|()| done)
}

/// An agent that is asked to freeze. Dropped, it is told to thaw.
struct Asked<'a> {
    agent: Option<Agent>,
    /// How many file systems it has frozen.
    count: u64,
    /// How long its answer to that is waited for here.
    patience: Duration,
    shared: &'a Shared,
    path: &'a Path,
    timeout: Duration,
}

impl Asked<'_> {
    fn freeze(&mut self) -> Result<()> {
        let Some(agent) = &mut self.agent else {
            return Ok(());
        };
        let asked = agent.freeze();
        match &asked {
            Ok(count) => self.count = *count,
            // Whoever waits for the freeze has waited long enough.
            Err(e) if e.kind() == Kind::TimedOut => self.patience = Duration::ZERO,
            Err(_) => {}
        }
        asked.map(drop)
    }

    /// Nothing if it was told already.
    fn thaw(&mut self) -> Result<()> {
        let Some(mut agent) = self.agent.take() else {
            return Ok(());
        };
        let told = agent.tell_to_thaw();
        let thawed = told.and_then(|()| agent.thawed(self.patience));
        if thawed.is_ok() {
            thawed_now(&self.shared.rundir.frozen_note());
        }
        match thawed {
            // None was left to thaw.
            Ok(0) if self.count > 0 => Err(Error::new(
                Kind::Io,
                "the guest's file systems did not stay frozen for as long as it took",
            )
            .hint("does something else in the guest thaw them?")),
            Ok(_) => Ok(()),
            // A Windows guest thawed by itself, or a script that the guest runs after it failed.
            Err(why) if why.kind() == Kind::Io && matches!(agent.is_frozen(), Ok(false)) => {
                Err(why)
            }
            Err(why) => {
                let why = still_frozen(&why);
                log::error!("{why}");
                if matches!(why.kind(), Kind::TimedOut | Kind::NotConnected) {
                    let note = self.shared.rundir.frozen_note();
                    let late = &self.shared.late_thaw;
                    late.wait(Some(agent), self.path.to_owned(), self.timeout, note);
                }
                Err(why)
            }
        }
    }
}

impl Drop for Asked<'_> {
    fn drop(&mut self) {
        // Whatever it was that failed says more, and a guest that stays frozen was logged.
        let _ = self.thaw();
    }
}

fn still_frozen(error: &Error) -> Error {
    Error::new(
        error.kind(),
        format!(
            "the guest's file systems may still be frozen: {}",
            error.message()
        ),
    )
    .hint("the guest hangs until its agent is sent {\"execute\":\"guest-fsfreeze-thaw\"}")
}

/// No killed fleecefs left anything to thaw.
fn thawed_now(note: &Path) {
    // There may be none.
    let _ = std::fs::remove_file(note);
}

/// The thread that stays on the line until the guest is thawed, if there is one.
#[derive(Default)]
pub(super) struct LateThaw(Mutex<Option<Watcher>>);

impl LateThaw {
    /// `agent` was told to thaw, or nobody was yet; `note` says until then that it is to be.
    fn wait(&self, agent: Option<Agent>, path: PathBuf, timeout: Duration, note: PathBuf) {
        let watcher = Watcher::start(move |stop| match wait(agent, &path, timeout, stop) {
            Ok(()) => {
                thawed_now(&note);
                log::info!("the guest's file systems are thawed");
            }
            Err(e) => log::error!("gave up: {}", still_frozen(&e)),
        });
        // There is no other one at work: the agent has answered since.
        *self.0.lock() = Some(watcher);
    }

    /// Thaws what a fleecefs may have left frozen that was killed.
    pub(super) fn after_a_kill(&self, shared: &Shared, path: &Path) {
        log::warn!("an earlier fleecefs may have left the guest frozen: it is thawed");
        // Should this one be killed as well.
        if let Err(e) = shared.rundir.note_frozen(&path.display().to_string()) {
            log::warn!("{e}");
        }
        let timeout = FREEZE.min(shared.places.timeout);
        self.wait(None, path.to_owned(), timeout, shared.rundir.frozen_note());
    }

    /// Gives up, after a last try.
    pub(super) fn close(&self) {
        let watcher = self.0.lock().take();
        drop(watcher);
    }
}

/// Waits for the agent, until it is told to stop or QEMU is gone. One that is silent for long is called
/// again: if it was started anew it knows nothing of what its forerunner was told.
fn wait(agent: Option<Agent>, path: &Path, timeout: Duration, stop: &AtomicBool) -> Result<()> {
    // Hung up afterwards, so that there is room for the next call.
    if agent.is_some_and(|mut agent| agent.thawed(timeout).is_ok()) {
        return Ok(());
    }
    loop {
        let called = Agent::connect(path, timeout).and_then(|mut agent| {
            agent.tell_to_thaw()?;
            agent.thawed(timeout)
        });
        match called {
            Err(e) if e.kind() == Kind::TimedOut && !stop.load(Ordering::Acquire) => {}
            answered => return answered.map(drop),
        }
    }
}
