//! How far it is, on a terminal; and whether somebody wants it to stop.

use std::cell::RefCell;
use std::sync::atomic::{AtomicBool, Ordering};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::model::{Error, Kind, Result};

/// One bar at a time on stderr, where that is a terminal.
pub(super) struct Progress<'a> {
    stop: &'a AtomicBool,
    bar: RefCell<ProgressBar>,
}

impl<'a> Progress<'a> {
    pub(super) fn new(stop: &'a AtomicBool) -> Self {
        Self {
            stop,
            bar: RefCell::new(ProgressBar::hidden()),
        }
    }

    /// Begins something that is `total` bytes of work.
    pub(super) fn begin(&self, what: &'static str, total: u64) {
        let target = ProgressDrawTarget::stderr();
        let bar = ProgressBar::with_draw_target(Some(total), target).with_message(what);
        let template = "{msg:9} {wide_bar} {bytes} of {total_bytes}, {eta} left";
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        self.bar.replace(bar).finish_and_clear();
    }

    /// So many bytes more are done. Refuses to go on when it is to stop.
    pub(super) fn advance(&self, bytes: u64) -> Result<()> {
        self.bar.borrow().inc(bytes);
        self.go_on()
    }

    /// So much of a hundred is done.
    pub(super) fn percent(&self, percent: f64) -> Result<()> {
        let bar = self.bar.borrow();
        let total = bar.length().unwrap_or_default();
        bar.set_position((total as f64 * percent / 100.0) as u64);
        self.go_on()
    }

    /// Refuses to go on when it is to stop.
    pub(super) fn go_on(&self) -> Result<()> {
        match self.stop.load(Ordering::Relaxed) {
            false => Ok(()),
            true => Err(Error::new(Kind::Io, "interrupted before all was restored")),
        }
    }
}

impl Drop for Progress<'_> {
    fn drop(&mut self) {
        self.bar.borrow().finish_and_clear();
    }
}
