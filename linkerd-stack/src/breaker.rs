//! Taking a failing endpoint out of service, and trying it again with one request at a time (behaviour.md D.10).
//!
//! ```text
//! Closed ──trips──▶ Shut ──backoff over──▶ Probation ──one admitted──▶ Probing
//!   ▲                ▲                        ▲                          │││
//!   │                └────────────── failure ─┼──────────────────────────┘││
//!   │                              given up, or no verdict in time ───────┘│
//!   └───────────────────────────────── success ────────────────────────────┘
//! ```
//!
//! The flag of [`Breaker::ready`] is up in Closed and Probation. A response in Closed costs a few relaxed atomic
//! operations; only changes of state take the breaker's lock.

use crate::{backoff::Backoff, ready::Ready, slots::Slots};
use parking_lot::Mutex;
use std::{
    fmt,
    sync::{
        Arc, Weak,
        atomic::{
            AtomicU32, AtomicU64,
            Ordering::{Relaxed, SeqCst},
        },
    },
    time::Duration,
};
use tokio::{runtime::Handle, task::AbortHandle, time::Instant};

/// Longest time out of service that a server may ask for by `retry-after`: the default bound on such hints of
/// behaviour.md D.7.
pub const MAX_RETRY_AFTER: Duration = Duration::from_secs(300);

/// Least time that a probe has for its verdict. A probe may be a stream that lasts for hours; once it has had this
/// time, or the longest backoff if that is more, another probe is admitted beside it, so that there is always a way
/// back into service.
pub const MIN_PROBE_TIME: Duration = Duration::from_secs(10);

/// Success rates are compared in steps of 0.01 % (behaviour.md D.10).
const RATE_STEPS: f64 = 10_000.0;

/// When an endpoint is taken out of service.
#[derive(Copy, Clone, Debug, PartialEq)]
pub enum Config {
    /// After failures in a row.
    Consecutive {
        /// How many; 0 = never.
        max_failures: u32,
        /// Time out of service before each probe.
        backoff: Backoff,
    },
    /// After failures in a row, or below a success rate.
    Unified {
        /// Failures in a row; 0 disables this dimension.
        max_consecutive_failures: u32,
        /// Success rate, 0..=1, below which it trips; 0 disables this dimension.
        success_rate: f64,
        /// Length of the window over which the rate is taken.
        window: Duration,
        /// Responses that a window needs before its rate counts.
        min_requests: u32,
        /// Time out of service before each probe.
        backoff: Backoff,
        /// Whether a `retry-after` lengthens the time out of service, up to [`MAX_RETRY_AFTER`].
        respect_retry_after: bool,
    },
}

/// What became of a request.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The endpoint did its work.
    Success,
    /// It did not.
    Failure,
    /// It asks for less (HTTP 429, gRPC 8): a failure for the success rate and for a probe of the unified kind, else a
    /// success.
    RateLimited,
}

/// The breaker of one endpoint.
pub struct Breaker {
    rules: Rules,
    ready: Ready,
    /// Phase in the low 2 bits, number of trips above: verdicts on requests that were admitted before a trip are told
    /// apart from those after it.
    state: AtomicU64,
    /// Failures in a row.
    failures: AtomicU32,
    window: Option<Window>,
    /// Held during changes of state.
    slow: Mutex<Slow>,
    /// Runs the timers.
    runtime: Option<Handle>,
}

/// Leave for one request. Dropped without a verdict it counts as if the request had never been; a probe's slot is
/// given back.
#[must_use = "a permit that is dropped at once counts nothing"]
pub struct Permit {
    breaker: Arc<Breaker>,
    /// The state in which it was admitted.
    state: u64,
    resolved: bool,
}

struct Rules {
    /// 0 = never.
    max_failures: u32,
    backoff: Backoff,
    unified: bool,
    respect_retry_after: bool,
}

struct Slow {
    /// Steps of backoff since the endpoint was last in service.
    attempt: u32,
    /// Seed of the jitter.
    random: u64,
    /// The timer that ends Shut or Probing.
    timer: Option<AbortHandle>,
}

const CLOSED: u64 = 0;
const SHUT: u64 = 1;
const PROBATION: u64 = 2;
const PROBING: u64 = 3;
const PHASE: u64 = 3;
const TRIP: u64 = 4;

impl Breaker {
    /// A breaker in service. It is made inside a Tokio runtime, whose timers it uses; without one, a tripped breaker
    /// goes to probation at once. `seed` is for the jitter.
    pub fn new(config: Config, seed: u64) -> Arc<Self> {
        let (rules, window) = match config {
            Config::Consecutive { max_failures, backoff } => {
                (Rules { max_failures, backoff, unified: false, respect_retry_after: false }, None)
            }
            Config::Unified {
                max_consecutive_failures,
                success_rate,
                window,
                min_requests,
                backoff,
                respect_retry_after,
            } => {
                let threshold = (success_rate.clamp(0.0, 1.0) * RATE_STEPS).round() as u64;
                let rules =
                    Rules { max_failures: max_consecutive_failures, backoff, unified: true, respect_retry_after };
                (rules, (threshold > 0).then(|| Window::new(window, threshold, min_requests)))
            }
        };
        Arc::new(Self {
            rules,
            ready: Ready::new(true),
            state: AtomicU64::new(CLOSED),
            failures: AtomicU32::new(0),
            window,
            slow: Mutex::new(Slow { attempt: 0, random: seed, timer: None }),
            runtime: Handle::try_current().ok(),
        })
    }

    /// Whether a request may be sent: to be combined with the endpoint's own readiness by [`crate::ready::all`].
    pub fn ready(&self) -> Ready {
        self.ready.clone()
    }

    /// Leave for one request. None while shut, or while the one probe is out: the caller then takes another endpoint.
    pub fn admit(self: &Arc<Self>) -> Option<Permit> {
        let state = self.state.load(SeqCst);
        match state & PHASE {
            CLOSED => Some(self.permit(state)),
            PROBATION => {
                let mut slow = self.slow.lock();
                let probing = state - PROBATION + PROBING;
                self.state.compare_exchange(state, probing, SeqCst, SeqCst).ok()?;
                self.ready.set(false);
                let patience = self.rules.backoff.max.max(MIN_PROBE_TIME);
                self.after(&mut slow, patience, probing);
                Some(self.permit(probing))
            }
            _ => None,
        }
    }

    fn permit(self: &Arc<Self>, state: u64) -> Permit {
        Permit { breaker: self.clone(), state, resolved: false }
    }

    fn resolve(self: &Arc<Self>, admitted: u64, outcome: Outcome, retry_after: Option<Duration>) {
        if admitted & PHASE == PROBING {
            return self.resolve_probe(admitted, outcome, retry_after);
        }
        if self.state.load(SeqCst) != admitted {
            // It arrives while shut, or from before a trip that is over.
            return;
        }
        let rate_is_low = self.window.as_ref().is_some_and(|w| w.record(outcome == Outcome::Success, Instant::now()));
        let row_is_long = if outcome == Outcome::Failure {
            let failures = self.failures.fetch_add(1, Relaxed).saturating_add(1);
            self.rules.max_failures > 0 && failures >= self.rules.max_failures
        } else {
            // A store only where it changes something: the line stays shared between cores.
            if self.failures.load(Relaxed) != 0 {
                self.failures.store(0, Relaxed);
            }
            false
        };
        if row_is_long || rate_is_low {
            let mut slow = self.slow.lock();
            if self.state.load(SeqCst) == admitted {
                slow.attempt = 0;
                self.shut(&mut slow, admitted, retry_after);
            }
        }
    }

    fn resolve_probe(self: &Arc<Self>, admitted: u64, outcome: Outcome, retry_after: Option<Duration>) {
        let mut slow = self.slow.lock();
        let state = self.state.load(SeqCst);
        // A probe that took too long is back in Probation, or another one is out: its verdict still counts.
        if state / TRIP != admitted / TRIP || !matches!(state & PHASE, PROBING | PROBATION) {
            return;
        }
        let passed = match outcome {
            Outcome::Success => true,
            Outcome::Failure => false,
            Outcome::RateLimited => !self.rules.unified,
        };
        if passed {
            slow.attempt = 0;
            slow.cancel();
            self.failures.store(0, Relaxed);
            if let Some(window) = &self.window {
                window.slots.clear();
            }
            // A new number, so that requests from before the trip count no more.
            self.state.store((state | PHASE) + 1, SeqCst);
            self.ready.set(true);
        } else {
            slow.attempt = slow.attempt.saturating_add(1);
            self.shut(&mut slow, state, retry_after);
        }
    }

    /// Takes the endpoint out of service until the next step of backoff is over.
    fn shut(self: &Arc<Self>, slow: &mut Slow, state: u64, retry_after: Option<Duration>) {
        let shut = (state | PHASE) + 1 + SHUT;
        self.state.store(shut, SeqCst);
        self.ready.set(false);
        let mut delay = self.rules.backoff.delay(slow.attempt, slow.next_random());
        if self.rules.respect_retry_after {
            delay = delay.max(retry_after.unwrap_or_default().min(MAX_RETRY_AFTER));
        }
        self.after(slow, delay, shut);
    }

    /// Goes to Probation after `delay`, if the state is then still `state`.
    fn after(self: &Arc<Self>, slow: &mut Slow, delay: Duration, state: u64) {
        slow.cancel();
        let weak = Arc::downgrade(self);
        let Some(runtime) = &self.runtime else {
            return self.probation(state);
        };
        // The instant is taken here: a task that starts late must not prolong the wait.
        let deadline = Instant::now() + delay;
        let timer = async move {
            tokio::time::sleep_until(deadline).await;
            if let Some(breaker) = Weak::upgrade(&weak) {
                let slow = breaker.slow.lock();
                breaker.probation(state);
                drop(slow);
            }
        };
        slow.timer = Some(runtime.spawn(timer).abort_handle());
    }

    fn probation(&self, from: u64) {
        let probation = (from & !PHASE) | PROBATION;
        if self.state.compare_exchange(from, probation, SeqCst, SeqCst).is_ok() {
            self.ready.set(true);
        }
    }
}

impl Drop for Breaker {
    fn drop(&mut self) {
        self.slow.get_mut().cancel();
    }
}

impl Permit {
    /// The verdict on the request.
    pub fn resolve(self, outcome: Outcome) {
        self.resolve_with(outcome, None);
    }

    /// As [`Permit::resolve`], with the `retry-after` of the response.
    pub fn resolve_with(mut self, outcome: Outcome, retry_after: Option<Duration>) {
        self.resolved = true;
        self.breaker.resolve(self.state, outcome, retry_after);
    }

    /// Whether this is the one request on which the endpoint's return depends.
    pub fn is_probe(&self) -> bool {
        self.state & PHASE == PROBING
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        if !self.resolved && self.is_probe() {
            let mut slow = self.breaker.slow.lock();
            if self.breaker.state.load(SeqCst) == self.state {
                slow.cancel();
                self.breaker.probation(self.state);
            }
        }
    }
}

impl Slow {
    fn cancel(&mut self) {
        if let Some(timer) = self.timer.take() {
            timer.abort();
        }
    }

    /// Within `0.0..1.0` (xorshift on 64 bits; spread is all that jitter needs).
    fn next_random(&mut self) -> f64 {
        let mut x = self.random | 1;
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        self.random = x;
        (x >> 11) as f64 / (1u64 << 53) as f64
    }
}

/// Responses of the last while.
struct Window {
    /// In steps of 0.01 %; above 0.
    threshold: u64,
    min_requests: u64,
    slots: Slots<2>,
}

/// Which sum of the slots counts what.
const GOOD: usize = 0;
const BAD: usize = 1;

impl Window {
    fn new(length: Duration, threshold: u64, min_requests: u32) -> Self {
        // A rate of no responses is none.
        Self { threshold, min_requests: u64::from(min_requests.max(1)), slots: Slots::new(length) }
    }

    /// Counts a response and says whether the rate of successes is now too low.
    fn record(&self, success: bool, now: Instant) -> bool {
        let slot = self.slots.turn(now);
        self.slots.add(slot, if success { GOOD } else { BAD }, 1);
        let sum = |i| u64::try_from(self.slots.sum(i)).unwrap_or(0);
        let (good, all) = (sum(GOOD), sum(GOOD) + sum(BAD));
        all >= self.min_requests && good.saturating_mul(RATE_STEPS as u64) < self.threshold.saturating_mul(all)
    }
}

impl fmt::Debug for Breaker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let phase = match self.state.load(SeqCst) & PHASE {
            CLOSED => "closed",
            SHUT => "shut",
            PROBATION => "probation",
            _ => "probing",
        };
        f.debug_struct("Breaker").field("phase", &phase).finish_non_exhaustive()
    }
}

impl fmt::Debug for Permit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Permit").field("probe", &self.is_probe()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::{Outcome::*, *};

    fn backoff() -> Backoff {
        Backoff { min: Duration::from_secs(1), max: Duration::from_secs(60), jitter: 0.0 }
    }

    fn consecutive(max_failures: u32) -> Arc<Breaker> {
        Breaker::new(Config::Consecutive { max_failures, backoff: backoff() }, 1)
    }

    fn unified(max_consecutive_failures: u32) -> Arc<Breaker> {
        let config = Config::Unified {
            max_consecutive_failures,
            success_rate: 0.8,
            window: Duration::from_secs(10),
            min_requests: 5,
            backoff: backoff(),
            respect_retry_after: true,
        };
        Breaker::new(config, 1)
    }

    /// Sends requests with these outcomes, and says whether the breaker is ready after each.
    #[track_caller]
    fn check(breaker: &Arc<Breaker>, outcomes: &[Outcome], ready: &[bool]) {
        let seen: Vec<_> = outcomes
            .iter()
            .map(|outcome| {
                breaker.admit().expect("admits").resolve(*outcome);
                breaker.ready().get()
            })
            .collect();
        assert_eq!(seen, ready);
    }

    async fn advance(millis: u64) {
        tokio::time::advance(Duration::from_millis(millis)).await;
        tokio::task::yield_now().await;
    }

    #[tokio::test(start_paused = true)]
    async fn trips_after_failures_in_a_row() {
        let breaker = consecutive(3);
        check(&breaker, &[Failure, Failure, Success, Failure, Failure], &[true; 5]);
        check(&breaker, &[RateLimited, Failure, Failure, Failure], &[true, true, true, false]);
        assert!(breaker.admit().is_none());
        advance(999).await;
        assert!(!breaker.ready().get());
        advance(2).await;
        assert!(breaker.ready().get());
    }

    #[tokio::test(start_paused = true)]
    async fn one_probe_decides_and_backoff_grows() {
        let breaker = consecutive(1);
        check(&breaker, &[Failure], &[false]);
        advance(1_001).await;
        let probe = breaker.admit().unwrap();
        assert!(probe.is_probe() && !breaker.ready().get() && breaker.admit().is_none());
        probe.resolve(Failure);
        advance(1_999).await;
        assert!(!breaker.ready().get(), "the second step is two seconds");
        advance(2).await;
        check(&breaker, &[RateLimited], &[true]);
        check(&breaker, &[Failure], &[false]);
        advance(1_001).await;
        assert!(breaker.ready().get(), "a success sets the backoff back");
    }

    #[tokio::test(start_paused = true)]
    async fn a_probe_given_up_leaves_its_slot() {
        let breaker = consecutive(1);
        check(&breaker, &[Failure], &[false]);
        advance(1_001).await;
        let probe = breaker.admit().unwrap();
        drop(probe);
        assert!(breaker.ready().get());
        check(&breaker, &[Success], &[true]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_probe_without_a_verdict_does_not_block_forever() {
        let breaker = consecutive(1);
        check(&breaker, &[Failure], &[false]);
        advance(1_001).await;
        let endless = breaker.admit().unwrap();
        advance(59_000).await;
        assert!(!breaker.ready().get());
        advance(1_001).await;
        let second = breaker.admit().unwrap();
        endless.resolve(Success);
        assert!(breaker.ready().get() && !breaker.admit().unwrap().is_probe());
        second.resolve(Failure);
        assert!(breaker.ready().get(), "the first verdict was the one that counted");
    }

    #[tokio::test(start_paused = true)]
    async fn late_responses_do_not_count() {
        let breaker = consecutive(1);
        let (early, late) = (breaker.admit().unwrap(), breaker.admit().unwrap());
        check(&breaker, &[Failure], &[false]);
        early.resolve(Success);
        assert!(!breaker.ready().get(), "ignored while shut");
        advance(1_001).await;
        check(&breaker, &[Success], &[true]);
        late.resolve(Failure);
        assert!(breaker.ready().get(), "it was sent before the trip");
    }

    #[tokio::test(start_paused = true)]
    async fn the_rate_needs_enough_requests() {
        let breaker = unified(0);
        check(&breaker, &[Failure, Failure, Failure, Failure, Success], &[true, true, true, true, false]);
        let breaker = unified(0);
        check(&breaker, &[Success, Success, Success, Success, Failure], &[true; 5]);
        check(&breaker, &[RateLimited], &[false]);
        assert!(breaker.admit().is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn the_window_forgets_bucket_by_bucket() {
        let breaker = unified(0);
        check(&breaker, &[Failure, Failure, Failure, Failure], &[true; 4]);
        advance(5_000).await;
        check(&breaker, &[], &[]);
        advance(5_000).await;
        check(&breaker, &[Success; 4], &[true; 4]);
        check(&breaker, &[Failure], &[true]);
        advance(100_000).await;
        check(&breaker, &[Failure; 4], &[true; 4]);
        advance(9_000).await;
        check(&breaker, &[Success], &[false]);
    }

    #[tokio::test(start_paused = true)]
    async fn unified_probes_fail_on_rate_limits_and_a_pass_clears_all() {
        let breaker = unified(2);
        check(&breaker, &[RateLimited, Failure, Failure], &[true, true, false]);
        advance(1_001).await;
        check(&breaker, &[RateLimited], &[false]);
        advance(2_001).await;
        check(&breaker, &[Success, Failure, Success, Failure, Success], &[true; 5]);
    }

    #[tokio::test(start_paused = true)]
    async fn retry_after_lengthens_the_time_out_of_service() {
        let breaker = unified(1);
        breaker.admit().unwrap().resolve_with(Failure, Some(Duration::from_secs(30)));
        advance(29_999).await;
        assert!(!breaker.ready().get());
        advance(2).await;
        breaker.admit().unwrap().resolve_with(Failure, Some(Duration::MAX));
        advance(300_001).await;
        assert!(breaker.ready().get(), "it is bounded");
    }

    #[tokio::test(start_paused = true)]
    async fn zero_means_never() {
        check(&consecutive(0), &[Failure; 100], &[true; 100]);
    }

    #[test]
    fn without_a_runtime_there_is_no_dead_end() {
        check(&consecutive(1), &[Failure, Failure], &[true, true]);
    }
}
