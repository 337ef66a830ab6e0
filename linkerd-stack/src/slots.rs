//! Sums over the last while that need no lock: a ring of slots, each for a part of the window, forgotten one by one.

use parking_lot::Mutex;
use std::{
    array,
    sync::atomic::{
        AtomicI64, AtomicU64,
        Ordering::{Relaxed, SeqCst},
    },
    time::Duration,
};
use tokio::time::Instant;

/// Parts into which a window is divided (behaviour.md D.10). What happened is forgotten one part at a time.
const SLOTS: usize = 10;

/// `N` sums over a window of time.
#[derive(Debug)]
pub(crate) struct Slots<const N: usize> {
    base: Instant,
    /// Nanoseconds that one slot lasts; above 0.
    width: u64,
    /// Number of the slot that is being filled, counted from `base`.
    epoch: AtomicU64,
    slots: [[AtomicI64; N]; SLOTS],
    /// Sums over the slots. For a moment they may miss what is in a slot, or hold what has left one.
    sums: [AtomicI64; N],
    /// Held while slots are emptied, a few times per window.
    turning: Mutex<()>,
}

impl<const N: usize> Slots<N> {
    /// Empty sums over a window of this length.
    pub(crate) fn new(length: Duration) -> Self {
        Self {
            base: Instant::now(),
            width: u64::try_from(length.as_nanos() / SLOTS as u128).unwrap_or(u64::MAX).max(1),
            epoch: AtomicU64::new(0),
            slots: array::from_fn(|_| array::from_fn(|_| AtomicI64::new(0))),
            sums: array::from_fn(|_| AtomicI64::new(0)),
            turning: Mutex::new(()),
        }
    }

    /// Forgets what is older than the window, and returns the slot that belongs to this moment.
    pub(crate) fn turn(&self, now: Instant) -> Slot {
        let elapsed = u64::try_from(now.saturating_duration_since(self.base).as_nanos()).unwrap_or(u64::MAX);
        let epoch = elapsed / self.width;
        if epoch > self.epoch.load(SeqCst) {
            let turning = self.turning.lock();
            let last = self.epoch.load(SeqCst);
            for expired in (last.saturating_add(1)..=epoch).take(SLOTS) {
                self.empty((expired % SLOTS as u64) as usize);
            }
            self.epoch.fetch_max(epoch, SeqCst);
            drop(turning);
        }
        Slot((epoch % SLOTS as u64) as usize)
    }

    /// Adds to sum `i`.
    pub(crate) fn add(&self, slot: Slot, i: usize, n: i64) {
        self.slots[slot.0][i].fetch_add(n, Relaxed);
        self.sums[i].fetch_add(n, Relaxed);
    }

    /// Takes `n` from sum `i` if it is at least `floor` before, and says whether it did.
    pub(crate) fn take(&self, slot: Slot, i: usize, n: i64, floor: i64) -> bool {
        let taken =
            self.sums[i].try_update(Relaxed, Relaxed, |sum| (sum >= floor).then(|| sum.saturating_sub(n))).is_ok();
        if taken {
            self.slots[slot.0][i].fetch_sub(n, Relaxed);
        }
        taken
    }

    /// Sum `i`.
    pub(crate) fn sum(&self, i: usize) -> i64 {
        self.sums[i].load(Relaxed)
    }

    /// Forgets everything.
    pub(crate) fn clear(&self) {
        let turning = self.turning.lock();
        (0..SLOTS).for_each(|slot| self.empty(slot));
        drop(turning);
    }

    fn empty(&self, slot: usize) {
        for (part, sum) in self.slots[slot].iter().zip(&self.sums) {
            sum.fetch_sub(part.swap(0, Relaxed), Relaxed);
        }
    }
}

/// A slot of the ring.
#[derive(Copy, Clone, Debug)]
pub(crate) struct Slot(usize);
