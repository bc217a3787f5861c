//! A value made on first use, where making it can fail and takes a while.

use std::sync::Arc;

use parking_lot::Mutex;

use crate::model::Result;

/// Made at most once; a failed attempt is made again by the next caller. Callers that come while
/// it is being made wait for it rather than make it a second time; the making has a deadline.
pub(super) struct Once<T>(Mutex<Option<Arc<T>>>);

impl<T> Once<T> {
    pub(super) fn new() -> Self {
        Self(Mutex::new(None))
    }

    /// The value if it was made already; does not wait for one that is being made.
    pub(super) fn known(&self) -> Option<Arc<T>> {
        self.0.try_lock()?.clone()
    }

    pub(super) fn get(&self, make: impl FnOnce() -> Result<T>) -> Result<Arc<T>> {
        let mut slot = self.0.lock();
        if let Some(value) = &*slot {
            return Ok(Arc::clone(value));
        }
        let value = Arc::new(make()?);
        *slot = Some(Arc::clone(&value));
        Ok(value)
    }
}
