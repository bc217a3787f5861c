//! A value made on first use, where making it can fail and takes a while.

use std::sync::{Arc, OnceLock};

use parking_lot::Mutex;

use crate::model::Result;

/// Made at most once; a failed attempt is made again by the next caller. Callers that come while
/// it is being made wait for it rather than make it a second time; the making has a deadline.
pub(super) struct Once<T> {
    /// Beside the lock and not under it, so that those who look do not get in each other's way.
    value: OnceLock<Arc<T>>,
    making: Mutex<()>,
}

impl<T> Once<T> {
    pub(super) fn new() -> Self {
        Self {
            value: OnceLock::new(),
            making: Mutex::new(()),
        }
    }

    /// The value if it was made already; does not wait for one that is being made. Once it is there,
    /// it is seen by everybody.
    pub(super) fn known(&self) -> Option<Arc<T>> {
        self.value.get().cloned()
    }

    pub(super) fn get(&self, make: impl FnOnce() -> Result<T>) -> Result<Arc<T>> {
        if let Some(value) = self.known() {
            return Ok(value);
        }
        let _one = self.making.lock();
        if let Some(value) = self.known() {
            return Ok(value);
        }
        let value = Arc::new(make()?);
        Ok(Arc::clone(self.value.get_or_init(|| value)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Error, Kind};

    #[test]
    fn a_failed_attempt_is_made_again() {
        let once = Once::new();
        let refused = once.get(|| Err(Error::new(Kind::Io, "not now")));
        assert!(refused.is_err() && once.known().is_none());
        assert_eq!(*once.get(|| Ok(1)).unwrap(), 1);
        assert_eq!(*once.get(|| Ok(2)).unwrap(), 1);
    }

    #[test]
    fn all_see_it_at_the_same_time() {
        let once = Once::new();
        once.get(|| Ok(1)).unwrap();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..20_000).for_each(|_| assert!(once.known().is_some())));
            }
        });
    }
}
