//! When the next certificate is due: after 70 % of the time left, within the configured bounds; sooner after a failure.

use linkerd_stack::backoff::Backoff;
use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};
use tokio::time::{Instant, sleep};

/// The share of the time left after which a certificate is renewed (behaviour.md B.3).
const RENEWAL: f64 = 0.7;
/// The largest share of that wait that chance takes away, so that a mesh started at once does not renew at once.
const JITTER: f64 = 0.1;
/// Waits after failures. They begin short, since most failures at a start are over in a moment; the regular wait is
/// their bound, so that a failure never makes the next attempt later than the original's would be.
const RETRY: Backoff = Backoff { min: Duration::from_millis(500), max: Duration::from_secs(60), jitter: 0.5 };
/// Longest sleep between looks at the clock, which may have been set meanwhile.
const LOOK: Duration = Duration::from_secs(60);

/// Where time and chance come from.
#[derive(Clone)]
pub(super) struct Clock {
    pub(super) now: Arc<dyn Fn() -> SystemTime + Send + Sync>,
    /// Within `0.0..1.0`.
    pub(super) random: Arc<dyn Fn() -> f64 + Send + Sync>,
}

/// Bounds on the time between certifications.
#[derive(Copy, Clone, Debug)]
pub(super) struct Schedule {
    pub(super) min: Duration,
    pub(super) max: Duration,
}

impl Schedule {
    /// The wait after success. `expiry` none = never certified.
    pub(super) fn renewal(&self, expiry: Option<SystemTime>, clock: &Clock) -> Duration {
        let regular = self.regular(expiry, (clock.now)());
        regular.mul_f64(1.0 - JITTER * (clock.random)().clamp(0.0, 1.0)).max(self.min)
    }

    /// The wait after `failures` failed attempts (1 = the first).
    pub(super) fn retry(&self, failures: u32, expiry: Option<SystemTime>, clock: &Clock) -> Duration {
        let backoff = RETRY.delay(failures.saturating_sub(1), (clock.random)().clamp(0.0, 1.0));
        backoff.min(self.regular(expiry, (clock.now)()))
    }

    fn regular(&self, expiry: Option<SystemTime>, now: SystemTime) -> Duration {
        let left = expiry.and_then(|at| at.duration_since(now).ok()).unwrap_or_default();
        left.mul_f64(RENEWAL).min(self.max).max(self.min)
    }
}

impl Clock {
    pub(super) fn system() -> Self {
        Self { now: Arc::new(SystemTime::now), random: Arc::new(rand::random::<f64>) }
    }

    /// Sleeps until the time has passed by either clock: the steady one, or the one on the wall, by which certificates
    /// expire and which goes on while the machine is suspended.
    pub(super) async fn sleep(&self, wait: Duration) {
        let steady = Instant::now();
        let Some(wall) = (self.now)().checked_add(wait) else {
            return sleep(wait).await;
        };
        loop {
            let left = wait.saturating_sub(steady.elapsed());
            if left.is_zero() || (self.now)() >= wall {
                return;
            }
            sleep(left.min(LOOK)).await;
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    const SCHEDULE: Schedule = Schedule { min: Duration::from_secs(10), max: Duration::from_secs(86_400) };

    /// A wall clock that goes with tokio's, and chance that is always the same.
    pub(crate) fn clock(random: f64) -> Clock {
        let (wall, steady) = (SystemTime::now(), Instant::now());
        Clock { now: Arc::new(move || wall + steady.elapsed()), random: Arc::new(move || random) }
    }

    #[track_caller]
    fn check(left: i64, random: f64, renewal: u64, retries: [u64; 3]) {
        let clock = clock(random);
        let now = (clock.now)();
        let expiry = match left {
            0.. => now + Duration::from_secs(left.unsigned_abs()),
            _ => now - Duration::from_secs(left.unsigned_abs()),
        };
        let clock = Clock { now: Arc::new(move || now), ..clock };
        let ms = |wait: Duration| wait.as_millis() as u64;
        assert_eq!(ms(SCHEDULE.renewal(Some(expiry), &clock)), renewal, "renewal");
        assert_eq!([1, 2, 9].map(|n| ms(SCHEDULE.retry(n, Some(expiry), &clock))), retries, "retries");
    }

    #[tokio::test(start_paused = true)]
    async fn renewal_at_70_percent_of_what_is_left_within_bounds() {
        check(86_400, 0.0, 60_480_000, [500, 1_000, 60_000]);
        check(86_400, 1.0, 54_432_000, [750, 1_500, 60_000]);
        check(20, 0.0, 14_000, [500, 1_000, 14_000]);
        check(5, 1.0, 10_000, [750, 1_500, 10_000]);
        check(-5, 1.0, 10_000, [750, 1_500, 10_000]);
        check(1_000_000, 0.0, 86_400_000, [500, 1_000, 60_000]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_clock_that_jumps_ahead_wakes_the_sleeper() {
        let (wall, steady) = (SystemTime::now(), Instant::now());
        let jump =
            move || if steady.elapsed() < Duration::from_secs(90) { wall } else { wall + Duration::from_secs(9_000) };
        let clock = Clock { now: Arc::new(jump), random: Arc::new(|| 0.0) };
        clock.sleep(Duration::from_secs(3_600)).await;
        assert_eq!(steady.elapsed(), Duration::from_secs(120));
    }
}
