//! Threads for what may take a while, and the guard that keeps a panic from taking the mount along:
//! an event loop that died would leave every later stat(2) of the mount hanging.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::thread;

use crossbeam_channel::{Sender, bounded};

type Job = Box<dyn FnOnce(&mut Vec<u8>) + Send>;

/// A fixed number of threads with a queue before them. They end when the value is dropped and the
/// queue is empty; nobody waits for them, because each wait of theirs has a deadline of its own.
pub(super) struct Workers {
    queue: Sender<(&'static str, Job)>,
}

impl Workers {
    /// Starts `threads` threads; `queue` jobs may wait.
    pub(super) fn start(name: &str, threads: usize, queue: usize) -> io::Result<Self> {
        let (sender, receiver) = bounded::<(&'static str, Job)>(queue);
        for i in 0..threads {
            let receiver = receiver.clone();
            thread::Builder::new()
                .name(format!("{name}-{i}"))
                .spawn(move || {
                    // Kept from job to job: a fresh megabyte for each read would be cleared first.
                    let mut buffer = Vec::new();
                    for (what, job) in receiver {
                        guarded(what, || job(&mut buffer));
                    }
                })?;
        }
        Ok(Self { queue: sender })
    }

    /// Queues a job. With a full queue it is dropped, and with it its reply, which answers EIO.
    pub(super) fn submit(
        &self,
        what: &'static str,
        job: impl FnOnce(&mut Vec<u8>) + Send + 'static,
    ) {
        if self.queue.try_send((what, Box::new(job))).is_err() {
            log::error!("{what} refused: too many requests are waiting already");
        }
    }
}

/// Runs a handler. If it panics, its reply is dropped on the way, which answers EIO.
pub(super) fn guarded(what: &str, handler: impl FnOnce()) {
    if catch_unwind(AssertUnwindSafe(handler)).is_err() {
        log::error!("a mistake in fleecefs itself: {what} panicked and was answered with EIO");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn a_panic_ends_one_job_only() {
        let workers = Workers::start("test", 1, 8).unwrap();
        let (sender, receiver) = bounded(1);
        workers.submit("panic", |_| panic!("on purpose"));
        workers.submit("next", move |_| sender.send(()).unwrap());
        receiver.recv_timeout(Duration::from_secs(10)).unwrap();
    }

    #[test]
    fn a_full_queue_drops_the_job() {
        let workers = Workers::start("test", 0, 1).unwrap();
        let (sender, receiver) = bounded::<()>(1);
        workers.submit("first", |_| ());
        workers.submit("second", move |_| drop(sender));
        assert!(receiver.recv().is_err(), "dropped, not queued");
    }
}
