//! The serial console of the Linux guest (tests/guest/init): what it printed, and telling it what
//! to do.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

type Lines = Arc<(Mutex<Vec<String>>, Condvar)>;

/// A guest's console. A thread of its own reads all the time, so that the guest never waits.
pub struct Console {
    stream: UnixStream,
    lines: Lines,
    seen: usize,
}

impl Console {
    /// Connects to the socket behind the guest's ttyS0.
    pub fn connect(path: &Path) -> Self {
        let stream = UnixStream::connect(path).unwrap();
        let lines = Lines::default();
        let (reader, sink) = (stream.try_clone().unwrap(), Arc::clone(&lines));
        std::thread::spawn(move || {
            for line in BufReader::new(reader).split(b'\n').map_while(Result::ok) {
                let line = String::from_utf8_lossy(&line).trim_end().to_owned();
                sink.0.lock().unwrap().push(line);
                sink.1.notify_all();
            }
        });
        Self {
            stream,
            lines,
            seen: 0,
        }
    }

    /// All lines so far.
    pub fn lines(&self) -> Vec<String> {
        self.lines.0.lock().unwrap().clone()
    }

    /// Waits for a line that begins so, after the last one waited for, and returns it.
    pub fn wait(&mut self, start: &str, deadline: Duration) -> String {
        let end = Instant::now() + deadline;
        let (lock, arrived) = &*self.lines;
        let mut lines = lock.lock().unwrap();
        loop {
            let found = lines[self.seen..].iter().position(|l| l.starts_with(start));
            if let Some(at) = found {
                self.seen += at + 1;
                return lines[self.seen - 1].clone();
            }
            let left = end.saturating_duration_since(Instant::now());
            assert!(
                !left.is_zero(),
                "no {start:?} from the guest within {deadline:?}; it said:\n{}",
                lines.join("\n")
            );
            lines = arrived.wait_timeout(lines, left).unwrap().0;
        }
    }

    /// Waits until the guest has mounted its disks and obeys.
    pub fn ready(&mut self) {
        self.wait("fleece: ready", Duration::from_secs(120));
    }

    /// Sends a command (see tests/guest/init) and waits until it is done: the lines in between.
    pub fn tell(&mut self, command: &str) -> Vec<String> {
        self.seen = self.lines.0.lock().unwrap().len();
        let from = self.seen;
        self.stream
            .write_all(format!("{command}\n").as_bytes())
            .unwrap();
        let done = self.wait("fleece: done", Duration::from_secs(120));
        let said = self.lines()[from..self.seen - 1].to_vec();
        assert_eq!(done, "fleece: done 0", "{command}: {said:?}");
        said
    }

    /// The number of the newest round on all disks: 0 before the first.
    pub fn round(&self) -> u64 {
        let number = |l: &String| l.strip_prefix("fleece: round ")?.parse().ok();
        self.lines().iter().rev().find_map(number).unwrap_or(0)
    }

    /// Waits until the writer has done so many rounds more.
    pub fn rounds_more(&self, more: u64, deadline: Duration) {
        let goal = self.round() + more;
        super::tools::eventually("the guest's writer", deadline, || {
            (self.round() >= goal).then_some(())
        });
    }
}
