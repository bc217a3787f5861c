//! A point in time that a wait must not outlive; made once per operation, so that the waits an
//! operation consists of share one budget.

use std::time::{Duration, Instant};

/// More than any wait should take; keeps `Duration::MAX` from overflowing the clock.
const LONGEST: Duration = Duration::from_secs(365 * 24 * 3600);

#[derive(Debug, Clone, Copy)]
pub(super) struct Deadline(Instant);

impl Deadline {
    pub(super) fn after(timeout: Duration) -> Self {
        Self(Instant::now() + timeout.min(LONGEST))
    }

    /// Zero once the deadline has passed.
    pub(super) fn remaining(self) -> Duration {
        self.0.saturating_duration_since(Instant::now())
    }

    pub(super) fn has_passed(self) -> bool {
        self.remaining().is_zero()
    }
}
