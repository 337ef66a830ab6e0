//! The series of a group of families that share their labels: get-or-create by the whole printed label set, a bound on how many
//! there are, and the rules by which idle ones go (metrics.md 2).

use super::{labels::Labels, metric::Counter};
use parking_lot::Mutex;
use std::{collections::BTreeMap, num::NonZeroUsize, sync::Arc, time::Duration};
use tokio::time::Instant;

/// Label sets that one group of families may have. A hundred thousand printed lines at worst, which Prometheus and the
/// proxy both bear; a proxy that speaks to more distinct targets than this is better read in sums.
pub const MAX_SERIES: NonZeroUsize = NonZeroUsize::new(10_000).expect("10,000 is not 0");

/// What is counted for one label set.
pub(super) trait Metric: Send + Sync + 'static {
    /// Changes whenever something was counted. Read at scrape time alone, so that events need no clock.
    fn version(&self) -> u64;
}

impl Metric for Counter {
    fn version(&self) -> u64 {
        self.get()
    }
}

pub(super) struct Store<M> {
    /// Named in the family that counts refusals.
    pub(super) name: &'static str,
    limit: usize,
    /// Ordered, so that two scrapes of one state are equal.
    entries: Mutex<BTreeMap<Arc<str>, Entry<M>>>,
    overflow: Arc<Counter>,
}

struct Entry<M> {
    metric: Arc<M>,
    last_value: usize,
    seen: u64,
    changed: Instant,
}

/// One label set as of a scrape.
pub(super) struct Series<M> {
    pub(super) text: Arc<str>,
    /// Where the last label's value begins in `text`.
    pub(super) last_value: usize,
    pub(super) metric: Arc<M>,
}

impl<M: Metric> Store<M> {
    pub(super) fn new(name: &'static str, limit: usize) -> Self {
        Self { name, limit, entries: Mutex::default(), overflow: Arc::default() }
    }

    /// The label set's cells. When the group is full, a label set not seen before gets those of `series="other"`.
    pub(super) fn get(&self, labels: Labels, make: impl FnOnce() -> M) -> Arc<M> {
        let mut entries = self.entries.lock();
        if let Some(entry) = entries.get(labels.text.as_str()) {
            return entry.metric.clone();
        }
        let labels = if entries.len() < self.limit {
            labels
        } else {
            self.overflow.inc();
            labels.overflow()
        };
        let entry = entries.entry(labels.text.into()).or_insert_with(|| Entry {
            metric: Arc::new(make()),
            last_value: labels.last_value,
            seen: 0,
            changed: Instant::now(),
        });
        entry.metric.clone()
    }

    /// Name, and how often a new label set was turned away.
    pub(super) fn overflow(&self) -> (&'static str, Arc<Counter>) {
        (self.name, self.overflow.clone())
    }

    /// Every series, in the order of its text. The lock is held for the copying of pointers, not for the printing.
    pub(super) fn snapshot(&self) -> Vec<Series<M>> {
        let entries = self.entries.lock();
        entries
            .iter()
            .map(|(text, e)| Series { text: text.clone(), last_value: e.last_value, metric: e.metric.clone() })
            .collect()
    }

    /// Drops what nobody holds and nobody has counted in for `retain`. To be called after a scrape was printed and its
    /// snapshot is gone. `dropped` sees each metric that goes.
    pub(super) fn expire(&self, now: Instant, retain: Duration, mut dropped: impl FnMut(&M)) {
        self.entries.lock().retain(|_, entry| {
            let version = entry.metric.version();
            if version != entry.seen {
                entry.seen = version;
                entry.changed = now;
            }
            let keep = Arc::strong_count(&entry.metric) > 1 || now.duration_since(entry.changed) < retain;
            if !keep {
                dropped(&entry.metric);
            }
            keep
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RETAIN: Duration = Duration::from_secs(600);

    fn store(limit: usize) -> Store<Counter> {
        Store::new("test", limit)
    }

    fn texts(store: &Store<Counter>) -> Vec<String> {
        store.snapshot().iter().map(|s| s.text.to_string()).collect()
    }

    #[test]
    fn the_bound_holds_and_is_counted() {
        let store = store(2);
        for i in 0..5 {
            store.get(Labels::new().push("n", &i.to_string()), Counter::default).inc();
        }
        store.get(Labels::new().push("n", "1"), Counter::default).inc();
        assert_eq!(texts(&store), [r#"n="0""#, r#"n="1""#, r#"series="other""#]);
        assert_eq!(store.snapshot().iter().map(|s| s.metric.get()).collect::<Vec<_>>(), [1, 2, 3]);
        assert_eq!(store.overflow().1.get(), 3);
    }

    #[tokio::test(start_paused = true)]
    async fn only_what_is_idle_and_unheld_goes() {
        let store = store(10);
        let labels = |n: &str| Labels::new().push("n", n);
        let held = store.get(labels("held"), Counter::default);
        store.get(labels("idle"), Counter::default).inc();
        let scrape = || store.expire(Instant::now(), RETAIN, |_| ());

        scrape();
        tokio::time::advance(RETAIN / 2).await;
        store.get(labels("used"), Counter::default).inc();
        scrape();
        assert_eq!(store.snapshot().len(), 3);

        tokio::time::advance(RETAIN / 2).await;
        scrape();
        assert_eq!(texts(&store), [r#"n="held""#, r#"n="used""#]);

        // Held for long: goes as soon as it is let go, since its last event is old.
        drop(held);
        scrape();
        assert_eq!(texts(&store), [r#"n="used""#]);
    }
}
