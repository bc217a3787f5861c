//! The transmission phase: bytes in both directions, not looked at.
//!
//! ```text
//!   client ──read──> up   ──write──> upstream
//!   client <─write── down <──read─── upstream
//! ```
//!
//! One thread serves both, because a TLS object cannot be in two threads. Silence is a client's
//! right here: an NBD connection may idle for hours, so only the bell ends that wait. But once the
//! client has ended its side, upstream has a fixed time to end its own.

use rustix::event::PollFlags;
use std::os::fd::BorrowedFd;
use std::time::Duration;

use super::super::socket::Deadline;
use super::channel::{Attempt, Bell, End, Stream};

/// Holds what QEMU puts into a Unix socket at once; memory that is never touched costs nothing.
const BUFFER: usize = 256 * 1024;

/// Copies until either side has ended. `grace` is for what is still on its way then.
pub(super) fn relay(
    mut client: Stream,
    mut upstream: Stream,
    bell: &Bell,
    grace: Duration,
) -> Result<(), End> {
    let (mut up, mut down) = (Pipe::new(), Pipe::new());
    let mut deadline = None;
    loop {
        if bell.has_rung() {
            return Err(End::Stopped); // two busy sides would never let us reach the wait
        }
        let sent = up.step(&mut client, &mut upstream)?;
        let received = down.step(&mut upstream, &mut client)?;
        if down.ended {
            return Ok(()); // nothing can be answered any more
        }
        if up.ended && deadline.is_none() {
            deadline = Some(Deadline::after(grace));
        }
        deadline.map(Deadline::remaining).transpose()?;
        if matches!(sent, Step::Moved) || matches!(received, Step::Moved) {
            continue;
        }
        let sources: Vec<_> = [
            sent.wanted(&client, &upstream),
            received.wanted(&upstream, &client),
        ]
        .into_iter()
        .flatten()
        .collect();
        bell.wait(&sources, deadline)?;
    }
}

/// One direction: at most one buffer is under way.
struct Pipe {
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
    /// The source has ended, and all of it was delivered.
    ended: bool,
}

/// What a pipe did when it was its turn.
enum Step {
    Moved,
    WaitsForSource(PollFlags),
    WaitsForSink(PollFlags),
    Ended,
}

impl Step {
    fn wanted<'a>(
        &self,
        source: &'a Stream,
        sink: &'a Stream,
    ) -> Option<(BorrowedFd<'a>, PollFlags)> {
        match *self {
            Self::WaitsForSource(flags) => Some((source.fd(), flags)),
            Self::WaitsForSink(flags) => Some((sink.fd(), flags)),
            Self::Moved | Self::Ended => None,
        }
    }
}

impl Pipe {
    fn new() -> Self {
        Self {
            buffer: vec![0; BUFFER].into_boxed_slice(),
            start: 0,
            end: 0,
            ended: false,
        }
    }

    /// Writes what is there, or reads if nothing is.
    fn step(&mut self, source: &mut Stream, sink: &mut Stream) -> Result<Step, End> {
        if self.ended {
            return Ok(Step::Ended);
        }
        if self.start < self.end {
            return Ok(match sink.try_write(&self.buffer[self.start..self.end])? {
                Attempt::Moved(sent) => {
                    self.start += sent;
                    Step::Moved
                }
                Attempt::Waits(flags) => Step::WaitsForSink(flags),
                Attempt::Ended => return Err(End::protocol("closed while written to")),
            });
        }
        Ok(match source.try_read(&mut self.buffer)? {
            Attempt::Moved(got) => {
                (self.start, self.end) = (0, got);
                Step::Moved
            }
            Attempt::Waits(flags) => Step::WaitsForSource(flags),
            Attempt::Ended => {
                sink.finish();
                self.ended = true;
                Step::Ended
            }
        })
    }
}
