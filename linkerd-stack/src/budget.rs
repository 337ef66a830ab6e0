//! How many retries a target may cost: a share of its requests, and a few per second in any case.

use crate::slots::Slots;
use std::time::Duration;
use tokio::time::Instant;

/// Parts of a retry in which deposits are counted.
const RETRY: i64 = 1_000;

/// Most retries that one request may deposit. Beyond it a budget limits nothing.
const MAX_RATIO: f64 = 1_000.0;

/// A retry budget, shared by all requests of a target. Both deposits and withdrawals are forgotten after its window.
#[derive(Debug)]
pub struct Budget {
    slots: Slots<1>,
    /// Parts of a retry that a request deposits.
    deposit: i64,
    /// Parts of a retry that may be overdrawn within the window.
    reserve: i64,
}

impl Budget {
    /// `ratio` retries for each request of the last `ttl`, and `min_per_second` in any case.
    pub fn new(ratio: f64, min_per_second: u32, ttl: Duration) -> Self {
        // NaN becomes 0 by the conversion.
        let deposit = (ratio.clamp(0.0, MAX_RATIO) * RETRY as f64).round() as i64;
        let reserve = (f64::from(min_per_second) * ttl.as_secs_f64()).ceil() * RETRY as f64;
        Self { slots: Slots::new(ttl), deposit, reserve: reserve as i64 }
    }

    /// A request is sent that is no retry.
    pub fn deposit(&self) {
        self.slots.add(self.slots.turn(Instant::now()), 0, self.deposit);
    }

    /// Whether a retry may be sent; if so it is paid for.
    pub fn withdraw(&self) -> bool {
        let slot = self.slots.turn(Instant::now());
        self.slots.take(slot, 0, RETRY, RETRY.saturating_sub(self.reserve))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(budget: &Budget, requests: usize, retries: usize) {
        (0..requests).for_each(|_| budget.deposit());
        let granted = (0..1_000).take_while(|_| budget.withdraw()).count();
        assert_eq!(granted, retries);
    }

    #[tokio::test(start_paused = true)]
    async fn a_share_of_requests() {
        let budget = Budget::new(0.2, 0, Duration::from_secs(10));
        check(&budget, 0, 0);
        check(&budget, 4, 0);
        check(&budget, 1, 1);
        check(&budget, 50, 10);
    }

    #[tokio::test(start_paused = true)]
    async fn a_few_per_second_in_any_case() {
        let budget = Budget::new(0.0, 2, Duration::from_secs(10));
        check(&budget, 100, 20);
        tokio::time::advance(Duration::from_secs(5)).await;
        check(&budget, 0, 0);
        tokio::time::advance(Duration::from_secs(6)).await;
        check(&budget, 0, 20);
    }

    #[tokio::test(start_paused = true)]
    async fn deposits_expire() {
        let budget = Budget::new(1.0, 0, Duration::from_secs(10));
        (0..5).for_each(|_| budget.deposit());
        tokio::time::advance(Duration::from_secs(11)).await;
        check(&budget, 0, 0);
    }

    #[tokio::test(start_paused = true)]
    async fn odd_values_do_not_panic() {
        check(&Budget::new(f64::NAN, 0, Duration::ZERO), 5, 0);
        check(&Budget::new(f64::INFINITY, u32::MAX, Duration::MAX), 1, 1_000);
    }
}
