//! `last-error`: an errno is one word; the sentence that goes with it is kept here and logged.

use std::collections::VecDeque;
use std::fmt::Write;
use std::time::SystemTime;

use parking_lot::Mutex;

use crate::model::Error;

/// Refusals that are shown; the log has them all.
const SHOWN: usize = 16;

/// The last refusals, oldest first.
#[derive(Debug, Default)]
pub(super) struct Refusals(Mutex<VecDeque<(SystemTime, String)>>);

impl Refusals {
    /// Writes down that `operation` was refused.
    pub(super) fn note(&self, operation: &str, error: &Error) {
        // One refusal, one line, whatever a name or a sentence from elsewhere holds.
        let line: String = format!("{operation}: {error}")
            .chars()
            .map(|c| if c.is_control() { ' ' } else { c })
            .collect();
        let now = SystemTime::now();
        let mut last = self.0.lock();
        // The kernel tries again after some errors, and so do users.
        if last.back().is_some_and(|(_, text)| *text == line) {
            last.pop_back();
        } else {
            log::warn!("{line}");
        }
        last.push_back((now, line));
        if last.len() > SHOWN {
            last.pop_front();
        }
    }

    /// When the newest one was.
    pub(super) fn newest(&self) -> Option<SystemTime> {
        self.0.lock().back().map(|(time, _)| *time)
    }

    /// One line each, the newest last.
    pub(super) fn text(&self) -> String {
        let mut out = String::new();
        for (time, line) in self.0.lock().iter() {
            // Writing to a String cannot fail.
            let _ = writeln!(out, "{} {line}", rfc3339(*time));
        }
        out
    }
}

/// A time in UTC, to the second: `2026-11-23T22:43:32Z`.
pub(super) fn rfc3339(time: SystemTime) -> String {
    match jiff::Timestamp::try_from(time) {
        Ok(time) => time.strftime("%Y-%m-%dT%H:%M:%SZ").to_string(),
        // Beyond the year 9999 or before -9999.
        Err(_) => format!("@{}", unix(time)),
    }
}

/// Seconds since 1970.
pub(super) fn unix(time: SystemTime) -> u64 {
    time.duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::model::Kind;

    #[test]
    fn one_line_each_the_last_ones_only() {
        let refusals = Refusals::default();
        for i in 0..20 {
            let error = Error::new(Kind::Busy, format!("reason\n{i}")).hint("wait");
            refusals.note("mkdir backups/x", &error);
            refusals.note("mkdir backups/x", &error);
        }
        let text = refusals.text();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), SHOWN);
        assert!(
            lines[0].ends_with("Z mkdir backups/x: reason 4 (wait)"),
            "{text}"
        );
        assert!(lines[15].ends_with("reason 19 (wait)"));
    }

    #[test]
    fn times() {
        let time = SystemTime::UNIX_EPOCH + Duration::from_millis(1_795_473_812_999);
        assert_eq!(rfc3339(time), "2026-11-23T22:43:32Z");
        assert_eq!(unix(time), 1_795_473_812);
    }
}
