//! A value built from a policy and rebuilt when the policy changes: read without a lock on the request's path, written by
//! one task that ends with it.

use crate::policy::ClientPolicy;
use arc_swap::ArcSwap;
use std::sync::Arc;
use tokio::{sync::watch, task::AbortHandle};

/// The latest value.
pub(super) struct Live<T> {
    value: Arc<ArcSwap<T>>,
    task: AbortHandle,
}

impl<T: Send + Sync + 'static> Live<T> {
    /// Builds the value of the present policy, and a new one for each later policy; where `build` gives none the last
    /// value stays. The first must be given.
    pub(super) fn follow(
        mut policy: watch::Receiver<Arc<ClientPolicy>>,
        mut build: impl FnMut(&Arc<ClientPolicy>) -> Option<T> + Send + 'static,
        otherwise: impl FnOnce() -> T,
    ) -> Self {
        let first = policy.borrow_and_update().clone();
        let value = Arc::new(ArcSwap::from_pointee(build(&first).unwrap_or_else(otherwise)));
        let latest = value.clone();
        let task = tokio::spawn(async move {
            let mut last = first;
            while policy.changed().await.is_ok() {
                let next = policy.borrow_and_update().clone();
                if Arc::ptr_eq(&last, &next) || *last == *next {
                    continue;
                }
                if let Some(value) = build(&next) {
                    latest.store(Arc::new(value));
                }
                last = next;
            }
            // The sender is gone; what `build` keeps alive (backends) must stay until this is aborted.
            std::future::pending::<()>().await;
        });
        Self { value, task: task.abort_handle() }
    }

    /// The value as it is now.
    pub(super) fn get(&self) -> Arc<T> {
        self.value.load_full()
    }
}

impl<T> Drop for Live<T> {
    fn drop(&mut self) {
        self.task.abort();
    }
}
