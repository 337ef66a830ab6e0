//! A bound on work in progress: whoever comes above it waits for a slot, and is not refused (behaviour.md 0.2).

use std::{fmt, future::Future, sync::Arc};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// So many at once. Clones share the slots.
#[derive(Clone)]
pub struct ConcurrencyLimit {
    slots: Option<Arc<Semaphore>>,
}

/// Work in progress, until dropped.
#[derive(Debug)]
#[must_use = "a slot that is dropped at once limits nothing"]
pub struct Slot(#[expect(dead_code, reason = "gives the slot back when dropped")] Option<OwnedSemaphorePermit>);

impl ConcurrencyLimit {
    /// At most `max` at once; no limit if it is above what can be counted.
    pub fn new(max: usize) -> Self {
        Self { slots: (max <= Semaphore::MAX_PERMITS).then(|| Arc::new(Semaphore::new(max))) }
    }

    /// Waits for a slot, first come, first served. Dropping the future gives the place in the line up.
    pub async fn acquire(&self) -> Slot {
        match &self.slots {
            // The semaphore is never closed; if it were, nothing would be limited.
            Some(slots) => Slot(slots.clone().acquire_owned().await.ok()),
            None => Slot(None),
        }
    }

    /// Runs `work` in a slot, which is free again as soon as there is a result: for an HTTP service, at the response's
    /// headers. Dropping the future gives the slot back.
    pub async fn run<F: Future>(&self, work: F) -> F::Output {
        let slot = self.acquire().await;
        let result = work.await;
        drop(slot);
        result
    }

    /// Slots that are free; none if there is no limit.
    pub fn available(&self) -> Option<usize> {
        self.slots.as_ref().map(|slots| slots.available_permits())
    }
}

impl fmt::Debug for ConcurrencyLimit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ConcurrencyLimit").field("available", &self.available()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt;

    #[tokio::test]
    async fn waits_for_a_slot_in_order() {
        let limit = ConcurrencyLimit::new(1);
        let slot = limit.acquire().await;
        let mut second = Box::pin(limit.run(async { 2 }));
        let mut third = Box::pin(limit.run(async { 3 }));
        assert!(second.as_mut().now_or_never().is_none() && third.as_mut().now_or_never().is_none());
        drop(slot);
        assert!(third.as_mut().now_or_never().is_none());
        assert_eq!((second.await, third.await, limit.available()), (2, 3, Some(1)));
    }

    #[tokio::test]
    async fn a_limit_beyond_counting_is_none() {
        let limit = ConcurrencyLimit::new(usize::MAX);
        let _slots = (limit.acquire().await, limit.acquire().await);
        assert_eq!(limit.available(), None);
    }
}
