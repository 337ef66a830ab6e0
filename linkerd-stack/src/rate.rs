//! Limits on requests per second (behaviour.md C.9): token buckets of `governor`, one atomic word each. A bucket holds as
//! many cells as the limit per second, is full at first, and refills evenly. What is ours is the time, tokio's, and the
//! bound on the buckets of many clients.

use governor::{
    Quota, RateLimiter,
    clock::{Clock, Reference},
    middleware::NoOpMiddleware,
    nanos::Nanos,
    state::{InMemoryState, NotKeyed},
};
use parking_lot::Mutex;
use std::hash::{BuildHasher, RandomState};
use std::{
    collections::HashMap,
    fmt,
    hash::Hash,
    num::NonZeroU32,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};
use tokio::time::Instant;

/// Most keys of a keyed limiter that have buckets of their own: about 10 MiB with keys of 100 bytes. Further ones
/// share a bucket, connections for as long as they last.
pub const MAX_KEYS: usize = 65_536;

/// Parts of a keyed limiter with locks of their own, so that connections that begin at once rarely wait for each other.
const SHARDS: usize = 16;

/// Least time between two searches of a full part for buckets that nobody needs: a search looks at all of them.
const SWEEP_INTERVAL: Duration = Duration::from_millis(100);

/// A bucket that nobody has touched for so long is full again, whatever the limit: it holds a second's worth.
const REFILLED: Duration = Duration::from_secs(1);

/// One bucket. Clones are the same bucket.
#[derive(Clone)]
pub struct Limiter(Arc<RateLimiter<NotKeyed, InMemoryState, Watch, NoOpMiddleware<Nanos>>>);

/// A bucket's clock: tokio's time since an instant. It remembers when it was last looked at, which is when the bucket was
/// last asked for a cell.
#[derive(Debug)]
struct Watch {
    base: Instant,
    /// Nanoseconds since `base`.
    seen: AtomicU64,
}

impl Clock for Watch {
    type Instant = Nanos;

    fn now(&self) -> Nanos {
        let now = since(self.base);
        self.seen.store(now.as_u64(), Relaxed);
        now
    }
}

impl Clone for Watch {
    fn clone(&self) -> Self {
        Self { base: self.base, seen: self.seen.load(Relaxed).into() }
    }
}

fn since(base: Instant) -> Nanos {
    base.elapsed().into()
}

/// What new buckets are made of.
#[derive(Copy, Clone, Debug)]
struct Make {
    per_second: NonZeroU32,
    base: Instant,
}

/// A bucket for each key, in bounded memory whatever the number of keys.
///
/// A key's bucket is looked up once for a connection and then used without a lock. Buckets that are full and in nobody's
/// hands are forgotten when room is needed: a new one would be the same.
pub struct Keyed<K> {
    make: Make,
    hasher: RandomState,
    shards: Box<[Mutex<Shard<K>>]>,
    /// Most buckets in one shard.
    capacity: usize,
    /// For the keys that find no room.
    overflow: Limiter,
}

struct Shard<K> {
    buckets: HashMap<K, Limiter, RandomState>,
    swept: Option<Nanos>,
}

impl Limiter {
    /// A full bucket of so many requests per second.
    pub fn new(per_second: NonZeroU32) -> Self {
        Make::new(per_second).bucket()
    }

    /// Takes a cell.
    ///
    /// # Errors
    /// The time after which there will be one; nothing was taken.
    pub fn check(&self) -> Result<(), Duration> {
        self.0.check().map_err(|not| not.wait_time_from(self.0.clock().now()))
    }

    /// Whether nobody else has it, and it is as good as new.
    fn is_spare(&self, now: Nanos) -> bool {
        let seen = Nanos::new(self.0.clock().seen.load(Relaxed));
        Arc::strong_count(&self.0) == 1 && Duration::from(now.duration_since(seen)) >= REFILLED
    }
}

impl Make {
    fn new(per_second: NonZeroU32) -> Self {
        Self { per_second, base: Instant::now() }
    }

    fn bucket(self) -> Limiter {
        let watch = Watch { base: self.base, seen: AtomicU64::new(0) };
        Limiter(Arc::new(RateLimiter::direct_with_clock(Quota::per_second(self.per_second), watch)))
    }
}

impl<K: Eq + Hash + Clone> Keyed<K> {
    /// Buckets of so many requests per second for each key.
    pub fn new(per_second: NonZeroU32) -> Self {
        Self::with_max_keys(per_second, MAX_KEYS)
    }

    /// As [`Keyed::new`], with another bound on the keys that have buckets of their own.
    pub fn with_max_keys(per_second: NonZeroU32, max_keys: usize) -> Self {
        let make = Make::new(per_second);
        let shard = || Mutex::new(Shard { buckets: HashMap::default(), swept: None });
        Self {
            make,
            hasher: RandomState::new(),
            shards: (0..SHARDS).map(|_| shard()).collect(),
            capacity: max_keys.div_ceil(SHARDS),
            overflow: make.bucket(),
        }
    }

    /// The bucket of a key, to be kept for a connection. If there is no room for another one, it is the bucket that all
    /// such keys share.
    pub fn bucket(&self, key: &K) -> Limiter {
        let shard = (self.hasher.hash_one(key) % SHARDS as u64) as usize;
        let mut shard = self.shards[shard].lock();
        if let Some(bucket) = shard.buckets.get(key) {
            return bucket.clone();
        }
        if shard.buckets.len() >= self.capacity && !shard.sweep(since(self.make.base)) {
            return self.overflow.clone();
        }
        let bucket = self.make.bucket();
        shard.buckets.insert(key.clone(), bucket.clone());
        bucket
    }

    /// Takes a cell of a key's bucket. Where the key stays the same, keep its [`Keyed::bucket`] instead.
    ///
    /// # Errors
    /// As [`Limiter::check`].
    pub fn check(&self, key: &K) -> Result<(), Duration> {
        self.bucket(key).check()
    }

    /// Keys that have buckets of their own.
    pub fn len(&self) -> usize {
        self.shards.iter().map(|shard| shard.lock().buckets.len()).sum()
    }

    /// Whether no key has a bucket yet.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl<K: Eq + Hash> Shard<K> {
    /// Makes room, and says whether there is any.
    fn sweep(&mut self, now: Nanos) -> bool {
        if self.swept.is_some_and(|swept| Duration::from(now.duration_since(swept)) < SWEEP_INTERVAL) {
            return false;
        }
        self.swept = Some(now);
        let full = self.buckets.len();
        self.buckets.retain(|_, bucket| !bucket.is_spare(now));
        self.buckets.len() < full
    }
}

impl fmt::Debug for Limiter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Limiter").finish_non_exhaustive()
    }
}

impl<K> fmt::Debug for Keyed<K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Keyed").field("make", &self.make).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rps(n: u32) -> NonZeroU32 {
        NonZeroU32::new(n).unwrap()
    }

    /// So many cells are there now, and the next one comes after `wait`.
    #[track_caller]
    fn check(limiter: &Limiter, cells: usize, wait: Duration) {
        for _ in 0..cells {
            assert_eq!(limiter.check(), Ok(()));
        }
        assert_eq!(limiter.check(), Err(wait));
    }

    #[tokio::test(start_paused = true)]
    async fn a_burst_and_then_the_pace() {
        let limiter = Limiter::new(rps(10));
        check(&limiter, 10, Duration::from_millis(100));
        tokio::time::advance(Duration::from_millis(40)).await;
        check(&limiter, 0, Duration::from_millis(60));
        tokio::time::advance(Duration::from_millis(260)).await;
        check(&limiter, 3, Duration::from_millis(100));
        tokio::time::advance(Duration::from_secs(3_600)).await;
        check(&limiter, 10, Duration::from_millis(100));
    }

    #[tokio::test(start_paused = true)]
    async fn one_per_second() {
        check(&Limiter::new(rps(1)), 1, Duration::from_secs(1));
    }

    #[tokio::test(start_paused = true)]
    async fn the_largest_limit_there_is() {
        let limiter = Limiter::new(NonZeroU32::MAX);
        assert!((0..100_000).all(|_| limiter.check().is_ok()));
    }

    #[test]
    fn threads_share_what_there_is() {
        let limiter = Limiter::new(rps(1_000));
        let takes = || (0..1_000).filter(|_| limiter.check().is_ok()).count();
        let granted: usize = std::thread::scope(|s| {
            let threads: Vec<_> = (0..4).map(|_| s.spawn(takes)).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).sum()
        });
        let refilled = limiter.0.clock().base.elapsed().as_millis() as usize + 1;
        assert!((1_000..=1_000 + refilled).contains(&granted), "{granted}");
    }

    #[tokio::test(start_paused = true)]
    async fn keys_have_buckets_of_their_own() {
        let keyed = Keyed::new(rps(1));
        assert!(keyed.check(&"a").is_ok() && keyed.check(&"b").is_ok());
        assert!(keyed.check(&"a").is_err());
        check(&keyed.bucket(&"b"), 0, Duration::from_secs(1));
    }

    #[tokio::test(start_paused = true)]
    async fn keys_without_room_share_a_bucket_until_idle_ones_make_room() {
        let keyed = Keyed::with_max_keys(rps(1), 1_600);
        for key in 0..100_000u32 {
            let _ = keyed.check(&key);
        }
        assert!(keyed.len() <= 1_600);
        assert!(keyed.check(&1_000_000).is_err(), "those without room share a bucket");
        let held: Vec<_> = (0..100u32).map(|key| keyed.bucket(&key)).collect();
        tokio::time::advance(Duration::from_secs(2)).await;
        for key in 200_000..300_000u32 {
            let _ = keyed.check(&key);
        }
        assert!(keyed.len() <= 1_600 && keyed.len() > 1_000, "the idle ones made room: {}", keyed.len());
        for (key, bucket) in held.iter().enumerate() {
            assert!(
                Arc::ptr_eq(&bucket.0, &keyed.bucket(&(key as u32)).0) || Arc::ptr_eq(&bucket.0, &keyed.overflow.0)
            );
        }
    }
}
