//! What both live backends need to look after a running backup: a thread that does so until it is
//! told to stop, and the one answer to "is it over, and why?": that of a pull backup, which closes what
//! its readers read from, and that of a push backup.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use parking_lot::{Mutex, RwLock};

use crate::model::{Error, JobState, Kind, Result};
use crate::nbd;

/// A running thread; dropping it ends and joins it.
pub(super) struct Watcher {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Watcher {
    /// Runs `work`, which must end soon after the flag is set. It is unparked when that happens.
    pub(super) fn start(work: impl FnOnce(&AtomicBool) + Send + 'static) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::Builder::new()
            .name("guard".to_owned())
            .spawn(move || work(&stopped));
        if let Err(e) = &thread {
            log::error!("cannot start the thread that looks after backups: {e}");
        }
        Self {
            stop,
            thread: thread.ok(),
        }
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            // Its panic, if any, was told on stderr.
            let _ = thread.join();
        }
    }
}

/// Whether a backup is over, and the connections that end with it.
#[derive(Default)]
pub(super) struct Fate {
    /// Why it is over. Set before anything is taken apart.
    failure: RwLock<Option<Error>>,
    /// The connections of its readers.
    pools: Mutex<Vec<Arc<nbd::Pool>>>,
    /// It was told that its scratch space gets short.
    warned: AtomicBool,
}

impl Fate {
    pub(super) fn failure(&self) -> Option<Error> {
        self.failure.read().clone()
    }

    /// From now on every read fails with `why`, unless it failed before; whether this made it so.
    pub(super) fn fail(&self, why: Error) -> bool {
        let first = {
            let mut failure = self.failure.write();
            let first = failure.is_none();
            failure.get_or_insert(why);
            first
        };
        for pool in self.pools.lock().iter() {
            pool.close();
        }
        first
    }

    /// The reason is another one than was thought.
    #[cfg(feature = "libvirt")]
    pub(super) fn turns_out(&self, why: Error) {
        *self.failure.write() = Some(why);
    }

    /// These connections are closed when the backup is over: at once, if it is already.
    pub(super) fn closes(&self, pool: &Arc<nbd::Pool>) {
        self.pools.lock().push(Arc::clone(pool));
        if self.failure.read().is_some() {
            pool.close();
        }
    }

    /// Whether nobody was told yet that scratch space gets short.
    pub(super) fn warn_once(&self) -> bool {
        !self.warned.swap(true, Ordering::AcqRel)
    }
}

/// How a push backup stands; once it is over, that stays.
pub(super) struct Course(Mutex<JobState>);

impl Default for Course {
    fn default() -> Self {
        Self(Mutex::new(JobState::Running))
    }
}

impl Course {
    pub(super) fn state(&self) -> JobState {
        self.0.lock().clone()
    }

    pub(super) fn is_running(&self) -> bool {
        is_running(&self.0.lock())
    }

    /// EINVAL if it is over: there is nothing left to steer.
    pub(super) fn must_run(&self) -> Result<()> {
        let state = self.0.lock();
        match is_running(&state) {
            true => Ok(()),
            false => Err(Error::new(
                Kind::Invalid,
                format!("it is over already: {}", state.word()),
            )),
        }
    }

    /// Told to wait, or to go on; nothing if it is over.
    pub(super) fn pause(&self, pause: bool) {
        let mut state = self.0.lock();
        if is_running(&state) {
            *state = match pause {
                true => JobState::Paused,
                false => JobState::Running,
            };
        }
    }

    /// Over from now on, unless it was before; whether this made it so.
    pub(super) fn over(&self, how: JobState) -> bool {
        let mut state = self.0.lock();
        let running = is_running(&state);
        if running {
            *state = how;
        }
        running
    }
}

fn is_running(state: &JobState) -> bool {
    matches!(state, JobState::Running | JobState::Paused)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::model::Outcome;

    fn pool() -> Arc<nbd::Pool> {
        let endpoint = nbd::Endpoint {
            socket: "/nonexistent/nbd".into(),
            export: "vda".to_owned(),
        };
        Arc::new(nbd::Pool::new(endpoint, 1, Duration::from_secs(10)))
    }

    fn is_closed(pool: &nbd::Pool) -> bool {
        let error = pool.read_at(0, &mut [0; 512]).unwrap_err();
        matches!(error.fault, nbd::Fault::Closed)
    }

    #[test]
    fn the_first_failure_stays_and_closes_what_was_open_and_what_comes_late() {
        let fate = Fate::default();
        let (early, late) = (pool(), pool());
        fate.closes(&early);
        assert!(!is_closed(&early));
        assert!(fate.fail(Error::new(Kind::NoSpace, "first")));
        assert!(!fate.fail(Error::new(Kind::Io, "second")));
        assert_eq!(fate.failure().unwrap().kind(), Kind::NoSpace);
        assert!(is_closed(&early));
        fate.closes(&late);
        assert!(is_closed(&late));
    }

    #[test]
    fn what_is_over_stays_as_it_is() {
        let course = Course::default();
        course.pause(true);
        assert!(course.is_running() && course.state().word() == "paused");
        course.pause(false);
        assert!(course.over(JobState::Ended(Outcome::Aborted)));
        assert!(!course.over(JobState::Ended(Outcome::Completed)));
        course.pause(true);
        assert!(!course.is_running());
        assert_eq!(course.state().word(), "aborted");
    }

    #[test]
    fn a_dropped_watcher_has_ended() {
        let (done, ended) = crossbeam_channel::bounded(1);
        let watcher = Watcher::start(move |stop| {
            while !stop.load(Ordering::Acquire) {
                std::thread::park_timeout(Duration::from_secs(60));
            }
            done.send(()).unwrap();
        });
        drop(watcher);
        assert!(ended.try_recv().is_ok());
    }
}
