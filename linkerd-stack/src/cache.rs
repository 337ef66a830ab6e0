//! Keeping what was built for a key while it is used, and for a while after: found again by whoever asks in time,
//! dropped once it has been idle. Used per connection or per target, not per request.

use parking_lot::Mutex;
use std::hash::RandomState;
use std::{
    collections::{BTreeMap, HashMap},
    convert::Infallible,
    fmt,
    hash::Hash,
    ops::Deref,
    sync::{Arc, Weak},
    time::Duration,
};
use tokio::{runtime::Handle, time::Instant};

/// Values by key, shared by handles. Clones are the same cache.
pub struct Cache<K, V>(Arc<Inner<K, V>>);

/// A value that stays in its cache as long as this handle, or a clone of it, exists.
pub struct Cached<V> {
    value: Arc<V>,
    /// Dropped with the last handle: then the value becomes idle.
    lease: Option<Arc<dyn Send + Sync>>,
}

struct Inner<K, V> {
    idle: Duration,
    capacity: usize,
    state: Mutex<State<K, V>>,
}

struct State<K, V> {
    slots: HashMap<K, Slot<V>, RandomState>,
    /// Keys without a handle, in the order in which they expire.
    idle: BTreeMap<Expiry, K>,
    /// Numbers leases, and makes expiries differ.
    next: u64,
    /// Whether the task that drops idle values runs.
    sweeping: bool,
}

type Expiry = (Instant, u64);

struct Slot<V> {
    value: Arc<V>,
    lease: Weak<dyn Send + Sync>,
    /// Which lease is the present one; a former one that is just being dropped has no say.
    number: u64,
    expiry: Option<Expiry>,
}

/// What all handles of one value share.
struct Lease<K, V>
where
    K: Eq + Hash + Clone + Send + Sync + 'static,
    V: Send + Sync + 'static,
{
    cache: Weak<Inner<K, V>>,
    key: K,
    number: u64,
}

impl<K, V> Cache<K, V>
where
    K: Eq + Hash + Clone + Send + Sync + 'static,
    V: Send + Sync + 'static,
{
    /// An empty cache that keeps values for `idle` after their last handle, and at most `capacity` of them. When it is
    /// full, the value that has been idle for longest makes room; if all are in use, a new value lives outside the
    /// cache, as long as its handle.
    pub fn new(idle: Duration, capacity: usize) -> Self {
        let state = State { slots: HashMap::default(), idle: BTreeMap::new(), next: 0, sweeping: false };
        Self(Arc::new(Inner { idle, capacity, state: Mutex::new(state) }))
    }

    /// The value under a key, made by `make` if there is none. `make` must not use the cache.
    pub fn get_or_insert_with(&self, key: K, make: impl FnOnce(&K) -> V) -> Cached<V> {
        match self.get_or_try_insert_with(key, |key| Ok::<V, Infallible>(make(key))) {
            Ok(cached) => cached,
            Err(never) => match never {},
        }
    }

    /// As [`Cache::get_or_insert_with`], where making may fail.
    ///
    /// # Errors
    /// What `make` says. Then the cache is as it was.
    pub fn get_or_try_insert_with<E>(&self, key: K, make: impl FnOnce(&K) -> Result<V, E>) -> Result<Cached<V>, E> {
        // Declared before the lock, so that it is dropped after it: a value may do anything when it is dropped.
        let _evicted: Option<Slot<V>>;
        let mut state = self.0.state.lock();
        let state = &mut *state;
        if let Some(slot) = state.slots.get_mut(&key) {
            let lease = slot.lease.upgrade().unwrap_or_else(|| {
                state.next += 1;
                let lease: Arc<dyn Send + Sync> =
                    Arc::new(Lease { cache: Arc::downgrade(&self.0), key, number: state.next });
                slot.number = state.next;
                slot.lease = Arc::downgrade(&lease);
                if let Some(expiry) = slot.expiry.take() {
                    state.idle.remove(&expiry);
                }
                lease
            });
            return Ok(Cached { value: slot.value.clone(), lease: Some(lease) });
        }
        let value = Arc::new(make(&key)?);
        if state.slots.len() >= self.0.capacity {
            let Some((_, oldest)) = state.idle.pop_first() else {
                return Ok(Cached { value, lease: None });
            };
            _evicted = state.slots.remove(&oldest);
        }
        state.next += 1;
        let number = state.next;
        let lease: Arc<dyn Send + Sync> = Arc::new(Lease { cache: Arc::downgrade(&self.0), key: key.clone(), number });
        let slot = Slot { value: value.clone(), lease: Arc::downgrade(&lease), number, expiry: None };
        state.slots.insert(key, slot);
        Ok(Cached { value, lease: Some(lease) })
    }

    /// Forgets the value under a key. Handles that exist keep it alive for themselves.
    pub fn remove(&self, key: &K) {
        let mut state = self.0.state.lock();
        let slot = state.slots.remove(key);
        if let Some(expiry) = slot.as_ref().and_then(|slot| slot.expiry) {
            state.idle.remove(&expiry);
        }
        drop(state);
        drop(slot);
    }

    /// Values that are kept, in use or idle.
    pub fn len(&self) -> usize {
        self.0.state.lock().slots.len()
    }

    /// Whether nothing is kept.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// All values with their keys, in no order: for a look from outside. It keeps none of them in use.
    pub fn entries(&self) -> Vec<(K, Arc<V>)> {
        self.0.state.lock().slots.iter().map(|(key, slot)| (key.clone(), slot.value.clone())).collect()
    }
}

impl<K, V> Inner<K, V>
where
    K: Eq + Hash + Clone + Send + Sync + 'static,
    V: Send + Sync + 'static,
{
    /// The last handle of a value is gone.
    fn release(self: &Arc<Self>, key: &K, number: u64) {
        let mut state = self.state.lock();
        let state_mut = &mut *state;
        let Some(slot) = state_mut.slots.get_mut(key).filter(|slot| slot.number == number) else { return };
        let runtime = Handle::try_current().ok().filter(|_| !self.idle.is_zero());
        let Some(runtime) = runtime else {
            // Nothing would ever end its idleness.
            let slot = state_mut.slots.remove(key);
            drop(state);
            drop(slot);
            return;
        };
        let expiry = (Instant::now() + self.idle, number);
        slot.expiry = Some(expiry);
        state_mut.idle.insert(expiry, key.clone());
        if !std::mem::replace(&mut state_mut.sweeping, true) {
            runtime.spawn(sweep(Arc::downgrade(self)));
        }
    }

    /// Drops what has expired, and says when the next value will. None: nothing is idle, and the sweeper ends.
    fn expire(&self) -> Option<Instant> {
        let mut expired = Vec::new();
        let mut state = self.state.lock();
        let now = Instant::now();
        let next = loop {
            let Some(first) = state.idle.first_entry() else {
                state.sweeping = false;
                break None;
            };
            if first.key().0 > now {
                break Some(first.key().0);
            }
            let key = first.remove();
            expired.extend(state.slots.remove(&key));
        };
        drop(state);
        drop(expired);
        next
    }
}

/// Runs while something is idle. It does not keep the cache alive.
async fn sweep<K, V>(cache: Weak<Inner<K, V>>)
where
    K: Eq + Hash + Clone + Send + Sync + 'static,
    V: Send + Sync + 'static,
{
    while let Some(next) = cache.upgrade().and_then(|cache| cache.expire()) {
        tokio::time::sleep_until(next).await;
    }
}

impl<K, V> Drop for Lease<K, V>
where
    K: Eq + Hash + Clone + Send + Sync + 'static,
    V: Send + Sync + 'static,
{
    fn drop(&mut self) {
        if let Some(cache) = self.cache.upgrade() {
            cache.release(&self.key, self.number);
        }
    }
}

impl<V> Cached<V> {
    /// The value itself, which outlives the cache's interest in it.
    pub fn value(&self) -> &Arc<V> {
        &self.value
    }
}

impl<V> Deref for Cached<V> {
    type Target = V;

    fn deref(&self) -> &V {
        &self.value
    }
}

impl<V> Clone for Cached<V> {
    fn clone(&self) -> Self {
        Self { value: self.value.clone(), lease: self.lease.clone() }
    }
}

impl<V: fmt::Debug> fmt::Debug for Cached<V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cached").field("value", &self.value).field("kept", &self.lease.is_some()).finish()
    }
}

impl<K, V> Clone for Cache<K, V> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<K, V> fmt::Debug for Cache<K, V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.0.state.lock();
        f.debug_struct("Cache").field("kept", &state.slots.len()).field("idle", &state.idle.len()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const IDLE: Duration = Duration::from_secs(5);

    /// Gets a key; `expected` is the value it must have, where a new one has that of `fresh`.
    #[track_caller]
    fn check(cache: &Cache<&'static str, u32>, key: &'static str, fresh: u32, expected: u32) -> Cached<u32> {
        let cached = cache.get_or_insert_with(key, |_| fresh);
        assert_eq!(*cached, expected);
        cached
    }

    async fn advance(secs: u64) {
        // In steps that let the sweeper run between them.
        for _ in 0..secs {
            tokio::time::advance(Duration::from_secs(1)).await;
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test(start_paused = true)]
    async fn values_stay_while_used_and_for_the_idle_time() {
        let cache = Cache::new(IDLE, 10);
        let first = check(&cache, "a", 1, 1);
        let second = first.clone();
        advance(60).await;
        drop(first);
        advance(60).await;
        check(&cache, "a", 2, 1);
        drop(second);
        advance(4).await;
        drop(check(&cache, "a", 3, 1));
        advance(4).await;
        assert_eq!(cache.len(), 1, "the use in between began the idle time anew");
        advance(2).await;
        assert!(cache.is_empty());
        check(&cache, "a", 4, 4);
    }

    #[tokio::test(start_paused = true)]
    async fn the_sweeper_serves_many_and_rests() {
        let cache = Cache::new(IDLE, 10);
        drop(check(&cache, "a", 1, 1));
        advance(2).await;
        drop(check(&cache, "b", 2, 2));
        advance(4).await;
        assert_eq!(cache.entries().into_iter().map(|(k, _)| k).collect::<Vec<_>>(), ["b"]);
        advance(2).await;
        assert!(cache.is_empty() && !cache.0.state.lock().sweeping);
        drop(check(&cache, "c", 3, 3));
        advance(6).await;
        assert!(cache.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn it_is_bounded() {
        let cache = Cache::new(IDLE, 2);
        let a = check(&cache, "a", 1, 1);
        drop(check(&cache, "b", 2, 2));
        let c = check(&cache, "c", 3, 3);
        assert_eq!(cache.len(), 2, "the idle one made room");
        let d = check(&cache, "d", 4, 4);
        check(&cache, "d", 5, 5);
        assert_eq!((cache.len(), *d), (2, 4), "what has no room lives on its own");
        drop((a, c));
        advance(6).await;
        assert!(cache.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn a_failure_leaves_nothing_behind() {
        let cache: Cache<&str, u32> = Cache::new(IDLE, 2);
        assert_eq!(cache.get_or_try_insert_with("a", |_| Err("no")).unwrap_err(), "no");
        assert!(cache.is_empty());
        drop(check(&cache, "a", 1, 1));
        cache.remove(&"a");
        assert!(cache.is_empty() && cache.0.state.lock().idle.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn a_removed_value_does_not_disturb_its_successor() {
        let cache = Cache::new(IDLE, 2);
        let old = check(&cache, "a", 1, 1);
        cache.remove(&"a");
        let new = check(&cache, "a", 2, 2);
        drop(old);
        advance(6).await;
        check(&cache, "a", 3, 2);
        drop(new);
    }

    #[test]
    fn without_a_runtime_nothing_is_kept_idle() {
        let cache = Cache::new(IDLE, 2);
        drop(check(&cache, "a", 1, 1));
        assert!(cache.is_empty());
    }
}
