//! The cells that events are counted in: relaxed atomics, no lock, no clock, no allocation after the first event of a kind.
//!
//! A handle is resolved once, when its target is built; counting is then one or two atomic additions. What is printed of
//! the cells, and in which dialect, is decided at scrape time by `legacy` and `prom`.

use std::{
    sync::{
        OnceLock,
        atomic::{AtomicI64, AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

/// A number that only grows.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// One more.
    pub fn inc(&self) {
        self.add(1);
    }

    /// Several more.
    pub fn add(&self, n: u64) {
        self.0.fetch_add(n, Relaxed);
    }

    /// Events so far.
    pub fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

/// A number that rises and falls. Several owners may share one: each adds and takes away its own part.
#[derive(Debug, Default)]
pub struct Gauge(AtomicI64);

impl Gauge {
    /// Adds a positive or negative change.
    pub fn add(&self, change: i64) {
        self.0.fetch_add(change, Relaxed);
    }

    /// Replaces the value.
    pub fn set(&self, value: i64) {
        self.0.store(value, Relaxed);
    }

    /// The value; never below 0, even while two halves of a change are seen in the wrong order.
    pub fn get(&self) -> u64 {
        self.0.load(Relaxed).max(0).unsigned_abs()
    }
}

/// A gauge of fractional seconds.
#[derive(Debug, Default)]
pub(super) struct Seconds(AtomicU64);

impl Seconds {
    /// Replaces the value.
    pub(super) fn set(&self, seconds: f64) {
        self.0.store(seconds.to_bits(), Relaxed);
    }

    /// The value.
    pub(super) fn get(&self) -> f64 {
        f64::from_bits(self.0.load(Relaxed))
    }
}

/// Upper bounds of a histogram's buckets, in whole base units, and how many base units make the printed unit.
#[derive(Debug)]
pub(super) struct Scale {
    pub(super) bounds: &'static [u64],
    pub(super) per_unit: f64,
}

/// Nanoseconds in a second: time is kept in nanoseconds and printed in seconds.
const NANOS: f64 = 1e9;
const MICRO: u64 = 1_000;
const MILLI: u64 = 1_000 * MICRO;
const SECOND: u64 = 1_000 * MILLI;

/// B-ms of metrics.md 1, in milliseconds.
pub(super) static LATENCY_MS: Scale = Scale {
    bounds: &[
        1, 2, 3, 4, 5, 10, 20, 30, 40, 50, 100, 200, 300, 400, 500, 1_000, 2_000, 3_000, 4_000, 5_000, 10_000, 20_000,
        30_000, 40_000, 50_000,
    ],
    per_unit: 1.0,
};
/// B-fine of metrics.md 1.
pub(super) static FINE: Scale = Scale {
    bounds: &[25 * MILLI, 50 * MILLI, 100 * MILLI, 250 * MILLI, 500 * MILLI, SECOND, 10 * SECOND],
    per_unit: NANOS,
};
/// B-coarse of metrics.md 1.
pub(super) static COARSE: Scale = Scale { bounds: &[50 * MILLI, 500 * MILLI, SECOND, 10 * SECOND], per_unit: NANOS };
/// B-frame of metrics.md 1, in bytes.
pub(super) static FRAME: Scale = Scale { bounds: &[128, 1_024, 10_240], per_unit: 1.0 };
/// B-queue of metrics.md 1.
pub(super) static QUEUE: Scale =
    Scale { bounds: &[500 * MICRO, 5 * MILLI, 50 * MILLI, 500 * MILLI, SECOND, 3 * SECOND], per_unit: NANOS };
/// B-detect of metrics.md 1.
pub(super) static DETECT: Scale = Scale { bounds: &[MILLI, 100 * MILLI], per_unit: NANOS };

/// Observations by size. One addition to a bucket and one to the sum per observation; the count is the buckets' sum.
#[derive(Debug)]
pub struct Histogram {
    scale: &'static Scale,
    /// One per bound, and one for everything above; not cumulative.
    buckets: Box<[AtomicU64]>,
    sum: AtomicU64,
}

impl Histogram {
    pub(super) fn new(scale: &'static Scale) -> Self {
        Self { scale, buckets: (0..=scale.bounds.len()).map(|_| AtomicU64::new(0)).collect(), sum: AtomicU64::new(0) }
    }

    /// Counts a value in base units: nanoseconds, milliseconds or bytes, as the histogram was made for.
    pub(super) fn observe(&self, value: u64) {
        let i = self.scale.bounds.iter().position(|bound| value <= *bound).unwrap_or(self.scale.bounds.len());
        if let Some(bucket) = self.buckets.get(i) {
            bucket.fetch_add(1, Relaxed);
        }
        self.sum.fetch_add(value, Relaxed);
    }

    /// Counts a duration in a histogram of nanoseconds. Durations above 584 years count as that.
    pub(super) fn observe_nanos(&self, value: Duration) {
        self.observe(u64::try_from(value.as_nanos()).unwrap_or(u64::MAX));
    }

    /// Observations so far.
    pub fn count(&self) -> u64 {
        self.buckets.iter().map(|b| b.load(Relaxed)).sum()
    }

    pub(super) fn sum(&self) -> u64 {
        self.sum.load(Relaxed)
    }

    pub(super) fn scale(&self) -> &'static Scale {
        self.scale
    }

    /// Observations per bucket, not cumulative; the last is for values above all bounds.
    pub(super) fn buckets(&self) -> impl Iterator<Item = u64> {
        self.buckets.iter().map(|b| b.load(Relaxed))
    }
}

/// A key of [`Slots`].
pub(super) trait SlotKey: Copy + Eq {
    /// Stands for every key that came when the slots were used up.
    const OTHER: Self;
}

/// Cells by a small key (status, class, errno), made at the key's first event and never taken away.
///
/// A chain that only grows: looking up walks it without a lock, and the keys that matter come first because they
/// happened first.
#[derive(Debug)]
pub(super) struct Slots<K, V> {
    head: OnceLock<Box<Slot<K, V>>>,
}

#[derive(Debug)]
struct Slot<K, V> {
    key: K,
    value: V,
    next: OnceLock<Box<Slot<K, V>>>,
}

/// Keys in one chain. HTTP defines 62 statuses and gRPC 17; a server that makes up more is not worth more memory.
const MAX_SLOTS: usize = 64;

impl<K, V> Default for Slots<K, V> {
    fn default() -> Self {
        Self { head: OnceLock::new() }
    }
}

impl<K: SlotKey, V> Slots<K, V> {
    /// The key's cell; the cell of [`SlotKey::OTHER`] when all slots are taken by other keys.
    pub(super) fn get(&self, key: K, make: impl Fn() -> V) -> &V {
        let mut link = &self.head;
        let mut depth = 0;
        loop {
            let wanted = if depth < MAX_SLOTS { key } else { K::OTHER };
            let slot = link.get_or_init(|| Box::new(Slot { key: wanted, value: make(), next: OnceLock::new() }));
            if slot.key == wanted {
                return &slot.value;
            }
            link = &slot.next;
            depth += 1;
        }
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (K, &V)> {
        let mut link = &self.head;
        std::iter::from_fn(move || {
            let slot = link.get()?;
            link = &slot.next;
            Some((slot.key, &slot.value))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    impl SlotKey for u16 {
        const OTHER: Self = 0;
    }

    #[test]
    fn a_bound_belongs_to_its_bucket() {
        let h = Histogram::new(&FRAME);
        for v in [0, 128, 129, 10_240, 10_241] {
            h.observe(v);
        }
        assert_eq!(h.buckets().collect::<Vec<_>>(), [2, 1, 1, 1]);
        assert_eq!((h.count(), h.sum()), (5, 128 + 129 + 10_240 + 10_241));
    }

    #[test]
    fn slots_are_bounded() {
        let slots = Slots::<u16, Counter>::default();
        for key in 1..=200 {
            slots.get(key, Counter::default).inc();
        }
        slots.get(1, Counter::default).inc();
        assert_eq!(slots.iter().count(), MAX_SLOTS + 1);
        let counts: Vec<_> = slots.iter().map(|(k, c)| (k, c.get())).collect();
        assert_eq!(counts[0], (1, 2));
        assert_eq!(counts[MAX_SLOTS], (0, 200 - MAX_SLOTS as u64));
    }

    #[test]
    fn gauges_never_print_below_zero() {
        let g = Gauge::default();
        g.add(-1);
        assert_eq!(g.get(), 0);
        g.add(3);
        assert_eq!(g.get(), 2);
    }
}
