//! qemu-img, as a program that is run.

use std::fs::File;
use std::io::{Read, Seek};
use std::process::{Child, Command, Stdio};

use super::progress::Progress;
use crate::model::{Error, Kind, Result};

/// What it said and how it ended.
pub(super) struct Said {
    pub(super) stdout: String,
    pub(super) stderr: String,
    pub(super) code: Option<i32>,
}

impl Said {
    /// What it printed, if it succeeded.
    pub(super) fn ok(self, tried: &str) -> Result<String> {
        match self.code {
            Some(0) => Ok(self.stdout),
            _ => Err(self.failure(tried)),
        }
    }

    /// The error that it ended with.
    pub(super) fn failure(&self, tried: &str) -> Error {
        let mut lines = self.stderr.lines().filter(|l| !l.is_empty());
        let why = match lines.next_back() {
            Some(line) => line.trim_start_matches("qemu-img: ").to_owned(),
            None => "qemu-img did not say why".to_owned(),
        };
        let kind = match why.contains("No space left") {
            true => Kind::NoSpace,
            false => Kind::Io,
        };
        Error::new(kind, format!("cannot {tried}: {why}"))
    }
}

/// Ended with us, whatever happens.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Runs it to its end. With `-p` among the words, what it prints moves the bar.
pub(super) fn run(words: &[&str], progress: &Progress) -> Result<Said> {
    let failed = |e: std::io::Error| {
        let message = format!("cannot run qemu-img: {e}");
        Error::new(Kind::Unsupported, message).hint("install it (Debian: qemu-utils)")
    };
    // A file, so that it never waits for us to read what it complains of.
    let mut stderr = tempfile::tempfile().map_err(failed)?;
    let child = Command::new("qemu-img")
        .args(words)
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::from(stderr.try_clone().map_err(failed)?))
        .spawn()
        .map_err(failed)?;
    let mut child = Running(child);
    let mut stdout = Vec::new();
    if let Some(mut pipe) = child.0.stdout.take() {
        let mut buf = [0; 4096];
        loop {
            match pipe.read(&mut buf).map_err(failed)? {
                0 => break,
                length => stdout.extend_from_slice(buf.get(..length).unwrap_or_default()),
            }
            match percent(&stdout) {
                Some(percent) => progress.percent(percent)?,
                None => progress.go_on()?,
            }
        }
    }
    let status = child.0.wait().map_err(failed)?;
    progress.go_on()?;
    Ok(Said {
        stdout: String::from_utf8_lossy(&stdout).into_owned(),
        stderr: all_of(&mut stderr),
        code: status.code(),
    })
}

fn all_of(file: &mut File) -> String {
    let mut bytes = Vec::new();
    // It is for a message only.
    let _ = file.rewind();
    let _ = file.read_to_end(&mut bytes);
    String::from_utf8_lossy(&bytes).into_owned()
}

/// The last `    (12.34/100%)` of what it printed.
fn percent(printed: &[u8]) -> Option<f64> {
    let tail = printed.get(printed.len().saturating_sub(64)..)?;
    let tail = std::str::from_utf8(tail).ok()?;
    let (before, _) = tail.rsplit_once("/100%)")?;
    let (_, number) = before.rsplit_once('(')?;
    number.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_moves_the_bar() {
        assert_eq!(percent(b"    (0.00/100%)\r    (12.50/100%)\r"), Some(12.5));
        assert_eq!(percent(b"    (0.00/100%)\r    (12.5"), Some(0.0));
        assert_eq!(percent(b"{}"), None);
    }
}
