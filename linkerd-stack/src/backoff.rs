//! Waits between attempts: exponential, jittered, bounded (behaviour.md D.10).

use std::time::Duration;

/// Waits of `min * 2^n` up to `max`, plus a random part of up to `jitter` times that, never above `max`.
#[derive(Copy, Clone, Debug, PartialEq)]
pub struct Backoff {
    /// The first wait.
    pub min: Duration,
    /// The longest wait.
    pub max: Duration,
    /// The largest random part, as a share of the wait. Below 0 or not a number counts as 0.
    pub jitter: f64,
}

impl Backoff {
    /// The wait after `attempt` failed attempts before it (0 = the first wait); `random` is within `0.0..1.0`.
    pub fn delay(&self, attempt: u32, random: f64) -> Duration {
        // 2^63 of any wait is above every maximum that a Duration of seconds can be compared with in practice.
        let factor = 1u64.checked_shl(attempt.min(63)).unwrap_or(u64::MAX);
        let nanos = self.min.as_nanos().saturating_mul(u128::from(factor)).min(self.max.as_nanos());
        let base = Duration::from_nanos_u128(nanos);
        let share = self.jitter * random;
        let jitter =
            if share > 0.0 { Duration::try_from_secs_f64(base.as_secs_f64() * share) } else { Ok(Duration::ZERO) };
        base.saturating_add(jitter.unwrap_or(Duration::MAX)).min(self.max)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(min: u64, max: u64, jitter: f64, attempt: u32, random: f64, expected_ms: u64) {
        let backoff = Backoff { min: Duration::from_millis(min), max: Duration::from_millis(max), jitter };
        assert_eq!(backoff.delay(attempt, random), Duration::from_millis(expected_ms));
    }

    #[test]
    fn doubles_up_to_the_maximum() {
        check(100, 10_000, 0.0, 0, 0.9, 100);
        check(100, 10_000, 0.0, 1, 0.9, 200);
        check(100, 10_000, 0.0, 6, 0.9, 6_400);
        check(100, 10_000, 0.0, 7, 0.9, 10_000);
        check(100, 10_000, 0.0, u32::MAX, 0.9, 10_000);
    }

    #[test]
    fn jitter_adds_and_is_bounded() {
        check(100, 10_000, 0.5, 0, 0.0, 100);
        check(100, 10_000, 0.5, 1, 0.5, 250);
        check(100, 120, 0.5, 0, 0.99, 120);
        check(100, 120, f64::INFINITY, 0, 0.5, 120);
        check(100, 120, f64::NAN, 0, 0.5, 100);
        check(100, 120, -1.0, 0, 0.5, 100);
    }

    #[test]
    fn zero_and_inverted_bounds_do_not_panic() {
        check(0, 0, 1.0, 3, 0.5, 0);
        check(100, 50, 1.0, 3, 0.5, 50);
    }
}
