//! The log: stderr in the foreground; for a daemon a file whose place is known only when the domain
//! is, so that lines are held back until then.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;

use parking_lot::Mutex;

enum Sink {
    Stderr,
    Held(Vec<u8>),
    File(File),
}

/// Where lines go; clones share it.
#[derive(Clone)]
pub(super) struct Log(Arc<Mutex<Sink>>);

impl Log {
    /// Begins logging, to stderr or held back. What is logged can be set with `RUST_LOG`.
    pub(super) fn start(hold: bool) -> Self {
        let log = Self(Arc::new(Mutex::new(if hold {
            Sink::Held(Vec::new())
        } else {
            Sink::Stderr
        })));
        let result = env_logger::Builder::new()
            // fuser logs each unknown operation and its own comings and goings.
            .parse_filters("info,fuser=error")
            .parse_default_env()
            .format(|out, record| {
                let now = jiff::Timestamp::try_from(SystemTime::now()).unwrap_or_default();
                let now = now.strftime("%Y-%m-%dT%H:%M:%S%.3fZ");
                writeln!(out, "{now} {:5} {}", record.level(), record.args())
            })
            .target(env_logger::Target::Pipe(Box::new(log.clone())))
            .try_init();
        drop(result); // Fails only where somebody else's logger is in place already.
        log
    }

    /// Appends to a file from now on, beginning with what was held back.
    pub(super) fn to_file(&self, path: &Path) -> io::Result<()> {
        let mut file = OpenOptions::new()
            .create(true)
            .append(true)
            .mode(0o600)
            .open(path)?;
        let mut sink = self.0.lock();
        if let Sink::Held(lines) = &*sink {
            file.write_all(lines)?;
        }
        *sink = Sink::File(file);
        Ok(())
    }

    /// Shows on stderr what was held back and has no file to go to.
    pub(super) fn let_go(&self) {
        if let Sink::Held(lines) = std::mem::replace(&mut *self.0.lock(), Sink::Stderr) {
            let _ = io::stderr().write_all(&lines);
        }
    }

    /// The file, for what is written to stderr past the log: the words of a panic.
    pub(super) fn file(&self) -> Option<File> {
        match &*self.0.lock() {
            Sink::File(file) => file.try_clone().ok(),
            _ => None,
        }
    }
}

impl Write for Log {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        match &mut *self.0.lock() {
            Sink::Stderr => io::stderr().write(line),
            Sink::Held(lines) => lines.write(line),
            Sink::File(file) => file.write(line),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
