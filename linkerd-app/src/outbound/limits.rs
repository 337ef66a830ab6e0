//! Limits in time on one attempt and on the whole request (behaviour.md D.12), before and after response headers.
//!
//! Before headers [`Limits::headers`] waits; after them the response body carries a [`BodyLimits`], which it asks
//! whenever it is polled in vain. A limit that is not set costs nothing.

use crate::error::{Cause, Error};
use parking_lot::Mutex;
use std::{
    future::Future,
    pin::{Pin, pin},
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};
use tokio::{
    sync::Notify,
    time::{Instant, Sleep, sleep_until},
};

/// How far a request's body has come. Shared by the body, the waiting attempt and the response body.
#[derive(Debug)]
pub(super) struct Progress {
    state: Mutex<Sending>,
    ended: Notify,
}

#[derive(Copy, Clone, Debug)]
struct Sending {
    /// Of the last frame.
    last: Instant,
    /// When it was sent in full, or dropped.
    ended: Option<Instant>,
}

/// Which limit ended an attempt. Set before the attempt's future is dropped, so that what it drops can tell a limit from a
/// client that went away.
#[derive(Debug, Default)]
pub(super) struct Expired(Mutex<Option<Cause>>);

/// The limits of one attempt.
#[derive(Clone, Debug, Default)]
pub(super) struct Limits {
    /// Whole request: the deadline and the duration it came from.
    pub(super) request: Option<(Instant, Duration)>,
    /// This attempt.
    pub(super) backend_request: Option<(Instant, Duration)>,
    /// From the end of the request to the end of the response.
    pub(super) response: Option<Duration>,
    /// From the end of the request to response headers; in that phase it replaces `response`.
    pub(super) headers: Option<Duration>,
    /// Without a frame in either direction.
    pub(super) idle: Option<Duration>,
}

/// What is left of the limits once headers are there.
#[derive(Debug)]
pub(super) struct BodyLimits {
    /// The earliest of the fixed deadlines.
    fixed: Option<(Instant, Cause)>,
    idle: Option<Duration>,
    /// Of the last response frame, or the headers.
    last: Instant,
    progress: Option<Arc<Progress>>,
    sleep: Pin<Box<Sleep>>,
}

impl Progress {
    pub(super) fn new(now: Instant) -> Arc<Self> {
        Arc::new(Self { state: Mutex::new(Sending { last: now, ended: None }), ended: Notify::new() })
    }

    /// A frame has been taken.
    pub(super) fn frame(&self) {
        self.state.lock().last = Instant::now();
    }

    /// The body ended or was dropped. Only the first call counts.
    pub(super) fn end(&self) {
        let mut state = self.state.lock();
        if state.ended.is_none() {
            state.ended = Some(Instant::now());
            drop(state);
            self.ended.notify_waiters();
        }
    }

    /// When the body ended, if it has.
    pub(super) fn ended(&self) -> Option<Instant> {
        self.state.lock().ended
    }

    fn get(&self) -> Sending {
        *self.state.lock()
    }
}

impl Expired {
    pub(super) fn set(&self, cause: Option<Cause>) {
        *self.0.lock() = cause;
    }

    pub(super) fn take(&self) -> Option<Cause> {
        self.0.lock().take()
    }
}

impl Limits {
    /// Whether nothing limits the attempt itself.
    fn is_unlimited(&self) -> bool {
        self.backend_request.is_none() && self.response.is_none() && self.headers.is_none() && self.idle.is_none()
    }

    /// Waits for response headers within the limits of the attempt; the deadline of the whole request is the caller's.
    /// `progress` is none for requests without a body.
    pub(super) async fn headers<T>(
        &self,
        started: Instant,
        progress: Option<&Arc<Progress>>,
        mut response: Pin<&mut impl Future<Output = Result<T, Error>>>,
    ) -> Result<T, Error> {
        if self.is_unlimited() {
            return response.await;
        }
        let mut sleep = pin!(sleep_until(started));
        loop {
            let mut ended = pin!(async {
                match progress {
                    Some(progress) => progress.ended.notified().await,
                    None => std::future::pending().await,
                }
            });
            // Registered before the state is read, so that an end between the two is seen.
            let already = futures_util::poll!(ended.as_mut());
            let next = self.before_headers(started, progress);
            if let Some((at, cause)) = next {
                sleep.as_mut().reset(at);
                tokio::select! {
                    biased;
                    response = &mut response => return response,
                    () = ended, if already.is_pending() => {}
                    () = &mut sleep => {
                        // An idle limit has moved on if a frame came meanwhile.
                        if self.before_headers(started, progress).is_some_and(|(at, _)| at <= Instant::now()) {
                            return Err(cause.into());
                        }
                    }
                }
            } else {
                tokio::select! {
                    biased;
                    response = &mut response => return response,
                    () = ended, if already.is_pending() => {}
                }
            }
        }
    }

    fn before_headers(&self, started: Instant, progress: Option<&Arc<Progress>>) -> Option<(Instant, Cause)> {
        let sending = progress.map(|p| p.get());
        let sent = match sending {
            None => Some(started),
            Some(sending) => sending.ended.map(|at| at.max(started)),
        };
        let backend = self.backend_request.map(|(at, t)| (at, Cause::BackendRequestTimeout(t)));
        let response = sent.and_then(|sent| match (self.headers, self.response) {
            (Some(t), _) => Some((sent + t, Cause::ResponseHeadersTimeout(t))),
            (None, Some(t)) => Some((sent + t, Cause::ResponseTimeout(t))),
            (None, None) => None,
        });
        let idle = match (sending, self.idle) {
            (Some(Sending { last, ended: None }), Some(t)) => Some((last.max(started) + t, Cause::IdleTimeout(t))),
            _ => None,
        };
        [backend, response, idle].into_iter().flatten().min_by_key(|(at, _)| *at)
    }

    /// What limits the response body; `progress` as above.
    pub(super) fn body(&self, progress: Option<&Arc<Progress>>) -> Option<BodyLimits> {
        let now = Instant::now();
        let request = self.request.map(|(at, t)| (at, Cause::RequestTimeout(t)));
        let backend = self.backend_request.map(|(at, t)| (at, Cause::BackendRequestTimeout(t)));
        let response = self.response.map(|t| {
            let sent = progress.and_then(|p| p.ended()).unwrap_or(now);
            (sent + t, Cause::ResponseTimeout(t))
        });
        let fixed = [request, backend, response].into_iter().flatten().min_by_key(|(at, _)| *at);
        let first = match (&fixed, self.idle) {
            (None, None) => return None,
            (Some((at, _)), None) => *at,
            (None, Some(idle)) => now + idle,
            (Some((at, _)), Some(idle)) => (*at).min(now + idle),
        };
        Some(BodyLimits {
            fixed,
            idle: self.idle,
            last: now,
            progress: progress.cloned(),
            sleep: Box::pin(sleep_until(first)),
        })
    }
}

impl BodyLimits {
    /// A frame of the response has come.
    pub(super) fn frame(&mut self) {
        if self.idle.is_some() {
            self.last = Instant::now();
        }
    }

    /// Ready with the limit that was met; else the task is woken when one may be.
    pub(super) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Cause> {
        while self.sleep.as_mut().poll(cx).is_ready() {
            let now = Instant::now();
            if let Some((at, cause)) = &self.fixed
                && *at <= now
            {
                return Poll::Ready(cause.clone());
            }
            let idle = self.idle.map(|t| {
                let sent = self.progress.as_ref().map(|p| p.get()).filter(|s| s.ended.is_none()).map(|s| s.last);
                (sent.map_or(self.last, |sent| sent.max(self.last)) + t, t)
            });
            let next = match (idle, &self.fixed) {
                (Some((at, t)), _) if at <= now => return Poll::Ready(Cause::IdleTimeout(t)),
                (Some((idle, _)), Some((fixed, _))) => idle.min(*fixed),
                (Some((idle, _)), None) => idle,
                (None, Some((fixed, _))) => *fixed,
                (None, None) => return Poll::Pending,
            };
            self.sleep.as_mut().reset(next);
        }
        Poll::Pending
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: Duration = Duration::from_secs(1);

    async fn never() -> Result<(), Error> {
        std::future::pending().await
    }

    #[tokio::test(start_paused = true)]
    async fn an_attempt_without_limits_waits() {
        let limits = Limits { request: Some((Instant::now() + S, S)), ..Limits::default() };
        assert!(tokio::time::timeout(100 * S, limits.headers(Instant::now(), None, pin!(never()))).await.is_err());
        assert!(limits.headers(Instant::now(), None, pin!(async { Ok(()) })).await.is_ok());
    }

    #[track_caller]
    fn check(result: Result<(), Error>, started: Instant, cause: Cause, after: Duration) {
        assert_eq!(*result.unwrap_err().cause(), cause);
        assert_eq!(started.elapsed(), after);
    }

    #[tokio::test(start_paused = true)]
    async fn the_response_clock_starts_when_the_request_has_been_sent() {
        let started = Instant::now();
        let limits = Limits { response: Some(2 * S), ..Limits::default() };
        check(limits.headers(started, None, pin!(never())).await, started, Cause::ResponseTimeout(2 * S), 2 * S);

        let started = Instant::now();
        let progress = Progress::new(started);
        let sender = progress.clone();
        tokio::spawn(async move {
            tokio::time::sleep(5 * S).await;
            sender.end();
        });
        let limits = Limits { response: Some(9 * S), headers: Some(2 * S), ..Limits::default() };
        let result = limits.headers(started, Some(&progress), pin!(never())).await;
        check(result, started, Cause::ResponseHeadersTimeout(2 * S), 7 * S);
    }

    #[tokio::test(start_paused = true)]
    async fn frames_of_the_request_hold_off_the_idle_limit_and_its_end_lifts_it() {
        let started = Instant::now();
        let progress = Progress::new(started);
        let sender = progress.clone();
        tokio::spawn(async move {
            tokio::time::sleep(S).await;
            sender.frame();
        });
        let limits = Limits { idle: Some(2 * S), ..Limits::default() };
        let result = limits.headers(started, Some(&progress), pin!(never())).await;
        check(result, started, Cause::IdleTimeout(2 * S), 3 * S);

        let progress = Progress::new(Instant::now());
        progress.end();
        let never = pin!(never());
        let waiting = limits.headers(Instant::now(), Some(&progress), never);
        assert!(tokio::time::timeout(100 * S, waiting).await.is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn backend_request_limits_the_attempt() {
        let started = Instant::now();
        let limits = Limits { backend_request: Some((started + S, S)), response: Some(9 * S), ..Limits::default() };
        check(limits.headers(started, None, pin!(never())).await, started, Cause::BackendRequestTimeout(S), S);
    }

    #[tokio::test(start_paused = true)]
    async fn bodies_meet_the_earliest_limit() {
        let now = Instant::now();
        let limits = Limits { request: Some((now + 5 * S, 5 * S)), idle: Some(2 * S), ..Limits::default() };
        let mut body = limits.body(None).unwrap();
        tokio::time::advance(S).await;
        body.frame();
        let cause = std::future::poll_fn(|cx| body.poll(cx)).await;
        assert_eq!((cause, now.elapsed()), (Cause::IdleTimeout(2 * S), 3 * S));

        let mut body = limits.body(None).unwrap();
        tokio::time::advance(S).await;
        body.frame();
        let cause = std::future::poll_fn(|cx| body.poll(cx)).await;
        assert_eq!((cause, now.elapsed()), (Cause::RequestTimeout(5 * S), 5 * S));
        assert!(Limits::default().body(None).is_none());
    }
}
