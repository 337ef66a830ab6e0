//! Notices that folders change: through the kernel's notifications, and by looking now and then in case those fail (network
//! file systems, exhausted inotify watches).

use super::Shared;
use notify::{EventKind, RecursiveMode, Watcher, event::AccessKind, event::AccessMode};
use std::{
    sync::{Arc, Weak},
    time::Duration,
};
use tokio::sync::Notify;

/// A change is read when nothing more happened for this long: writers of many files are given time to finish.
const QUIET: Duration = Duration::from_millis(100);
/// A writer that never pauses is not waited for longer than this many quiet spans.
const MOST_QUIET: usize = 10;
/// Time between looks without any notification.
const LOOK: Duration = Duration::from_secs(30);
/// The same where notifications are not to be had.
const LOOK_OFTEN: Duration = Duration::from_secs(2);

/// Begins to watch; ends when the last other owner of `shared` is gone.
pub(super) fn spawn(shared: &Arc<Shared>) {
    let changed = Arc::new(Notify::new());
    let notify = changed.clone();
    let watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
        // Our own reading must not wake us again.
        let written = |kind: &EventKind| match kind {
            EventKind::Access(access) => *access == AccessKind::Close(AccessMode::Write),
            _ => true,
        };
        if event.as_ref().map_or(true, |e| written(&e.kind)) {
            notify.notify_one();
        }
    });
    let mut every = LOOK;
    let watcher = match watcher {
        Ok(mut watcher) => {
            for folder in shared.files.lock().folders() {
                if let Err(error) = watcher.watch(&folder.path, RecursiveMode::Recursive) {
                    tracing::warn!(folder = %folder.path.display(), %error, "no notifications of changes; looking every 2s");
                    every = LOOK_OFTEN;
                }
            }
            Some(watcher)
        }
        Err(error) => {
            tracing::warn!(%error, "no notifications of changes; looking every 2s");
            every = LOOK_OFTEN;
            None
        }
    };
    let weak = Arc::downgrade(shared);
    shared.runtime.spawn(async move {
        // Dropped with the task.
        let _watcher = watcher;
        run(weak, changed, every).await;
    });
}

async fn run(shared: Weak<Shared>, changed: Arc<Notify>, every: Duration) {
    loop {
        let _ = tokio::time::timeout(every, changed.notified()).await;
        for _ in 0..MOST_QUIET {
            if tokio::time::timeout(QUIET, changed.notified()).await.is_err() {
                break;
            }
        }
        let Some(shared) = shared.upgrade() else { return };
        if let Err(error) = tokio::task::spawn_blocking(move || shared.reload()).await {
            tracing::error!(%error, "reading manifests failed");
        }
    }
}
