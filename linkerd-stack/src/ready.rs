//! A flag that says whether something can take work: read without a lock, waited for without a lost wake-up, combined
//! with others, and observed without a task.
//!
//! Reading is one atomic load, also of a combination: a combination is a flag of its own that its parts keep up to
//! date whenever one of them changes.

use parking_lot::Mutex;
use std::{
    fmt,
    future::Future,
    pin::pin,
    sync::{
        Arc, Weak,
        atomic::{AtomicU64, Ordering::SeqCst},
    },
};
use tokio::sync::Notify;

/// A level: ready or not. Clones are the same flag.
#[derive(Clone)]
pub struct Ready(Arc<Flag>);

/// Something that is told, in the thread of whoever sets a flag, that the flag has changed.
///
/// It reads the level itself: by the time it runs, the flag may have changed again. It must neither block nor hold a
/// lock that a caller of [`Ready::set`] holds.
pub trait Listener: Send + Sync {
    /// The flag has changed at least once since the last call.
    fn changed(&self);
}

struct Flag {
    /// Lowest bit: the level. The bits above it count changes, so that a change and back is seen as one.
    state: AtomicU64,
    notify: Notify,
    listeners: Mutex<Vec<Weak<dyn Listener>>>,
    /// For a combination, its parts: it is ready while all of them are.
    parts: Box<[Ready]>,
}

impl Ready {
    /// A flag that stands alone.
    pub fn new(initial: bool) -> Self {
        Self(Arc::new(Flag::new(initial, Box::default())))
    }

    /// Whether it can take work now.
    pub fn get(&self) -> bool {
        self.0.get()
    }

    /// Sets the level. Setting the level it has does nothing; so does setting a combination, which only follows its
    /// parts.
    pub fn set(&self, ready: bool) {
        if self.0.parts.is_empty() {
            self.0.set(ready);
        }
    }

    /// Waits until it is ready. Dropping the future is harmless.
    pub async fn wait(&self) {
        let mut notified = pin!(self.0.notify.notified());
        loop {
            // Registered before the level is read: a change between the two wakes this.
            notified.as_mut().enable();
            if self.get() {
                return;
            }
            notified.as_mut().await;
            notified.set(self.0.notify.notified());
        }
    }

    /// Waits for a change after this call (not: after the first poll). To miss none, call this, then read the level,
    /// then await. Dropping the future is harmless.
    pub fn changed(&self) -> impl Future<Output = ()> + Send + use<> {
        let seen = self.0.state.load(SeqCst);
        let this = self.clone();
        async move {
            let mut notified = pin!(this.0.notify.notified());
            loop {
                notified.as_mut().enable();
                if this.0.state.load(SeqCst) != seen {
                    return;
                }
                notified.as_mut().await;
                notified.set(this.0.notify.notified());
            }
        }
    }

    /// Whether both are one and the same flag.
    pub fn same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// Tells `listener` of every change from now on, until it is dropped.
    pub fn listen(&self, listener: Weak<dyn Listener>) {
        let mut listeners = self.0.listeners.lock();
        // Those that are gone are looked for only before the list would grow: a flag that many listen to stays cheap.
        if listeners.len() == listeners.capacity() {
            listeners.retain(|l| l.strong_count() > 0);
        }
        listeners.push(listener);
    }
}

/// A flag that is ready while all of `parts` are; without parts, always.
pub fn all(parts: impl IntoIterator<Item = Ready>) -> Ready {
    let parts: Box<[Ready]> = parts.into_iter().collect();
    if let [one] = &*parts {
        return one.clone();
    }
    let flag = Arc::new(Flag::new(parts.iter().all(Ready::get), parts));
    for part in &flag.parts {
        let weak: Weak<Flag> = Arc::downgrade(&flag);
        part.listen(weak);
    }
    // A part may have changed between the first reading and the registration.
    flag.changed();
    Ready(flag)
}

impl Flag {
    fn new(initial: bool, parts: Box<[Ready]>) -> Self {
        Self {
            state: AtomicU64::new(u64::from(initial)),
            notify: Notify::new(),
            listeners: Mutex::new(Vec::new()),
            parts,
        }
    }

    fn get(&self) -> bool {
        self.state.load(SeqCst) & 1 == 1
    }

    fn set(&self, ready: bool) {
        let flip = |state: u64| (state & 1 != u64::from(ready)).then(|| state.wrapping_add(2) ^ 1);
        if self.state.try_update(SeqCst, SeqCst, flip).is_err() {
            return;
        }
        self.notify.notify_waiters();
        let listeners: Vec<_> = self.listeners.lock().iter().filter_map(Weak::upgrade).collect();
        for listener in listeners {
            listener.changed();
        }
    }
}

impl Listener for Flag {
    /// Follows the parts. Of two threads that run this at once, the later writer re-reads, so the last word is true.
    fn changed(&self) {
        loop {
            let ready = self.parts.iter().all(Ready::get);
            self.set(ready);
            if self.parts.iter().all(Ready::get) == ready {
                return;
            }
        }
    }
}

impl fmt::Debug for Ready {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Ready").field(&self.get()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt;
    use std::sync::atomic::AtomicUsize;

    #[tokio::test]
    async fn waits_for_the_level() {
        let ready = Ready::new(false);
        let mut wait = Box::pin(ready.wait());
        assert!(wait.as_mut().now_or_never().is_none());
        ready.set(true);
        ready.set(false);
        assert!(wait.as_mut().now_or_never().is_none(), "it is not ready any more");
        ready.set(true);
        assert!(wait.as_mut().now_or_never().is_some());
        assert!(ready.wait().now_or_never().is_some());
    }

    #[tokio::test]
    async fn a_change_between_call_and_poll_counts() {
        let ready = Ready::new(true);
        let changed = ready.changed();
        ready.set(false);
        ready.set(true);
        assert!(changed.now_or_never().is_some());
        let mut changed = Box::pin(ready.changed());
        ready.set(true);
        assert!(changed.as_mut().now_or_never().is_none(), "setting the same level is no change");
        ready.set(false);
        assert!(changed.as_mut().now_or_never().is_some());
    }

    #[tokio::test]
    async fn a_combination_follows_its_parts() {
        let (a, b) = (Ready::new(true), Ready::new(false));
        let both = all([a.clone(), b.clone()]);
        let nested = all([both.clone(), Ready::new(true)]);
        assert!(!both.get() && !nested.get());
        let mut wait = Box::pin(nested.wait());
        assert!(wait.as_mut().now_or_never().is_none());
        b.set(true);
        assert!(both.get() && nested.get());
        assert!(wait.as_mut().now_or_never().is_some());
        both.set(false);
        assert!(both.get(), "only its parts set it");
        a.set(false);
        assert!(!nested.get());
        assert!(all([]).get());
    }

    #[test]
    fn listeners_are_told_until_they_are_dropped() {
        struct Count(AtomicUsize);
        impl Listener for Count {
            fn changed(&self) {
                self.0.fetch_add(1, SeqCst);
            }
        }
        let ready = Ready::new(false);
        let count = Arc::new(Count(AtomicUsize::new(0)));
        let weak: Weak<Count> = Arc::downgrade(&count);
        ready.listen(weak);
        ready.set(true);
        ready.set(true);
        ready.set(false);
        assert_eq!(count.0.load(SeqCst), 2);
        drop(count);
        ready.set(true);
    }

    #[test]
    fn a_combination_is_right_after_a_race() {
        let (a, b) = (Ready::new(false), Ready::new(false));
        let both = all([a.clone(), b.clone()]);
        std::thread::scope(|s| {
            for flag in [&a, &b] {
                s.spawn(|| {
                    for i in 0..10_000 {
                        flag.set(i % 2 == 0);
                    }
                    flag.set(true);
                });
            }
        });
        assert!(both.get());
    }
}
