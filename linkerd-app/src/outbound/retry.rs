//! Another attempt where one failed (behaviour.md D.11; of ServiceProfiles D.3): what counts as a failure, how often, after
//! which wait, and with a body that was kept while it was sent.

use super::{
    endpoint::Unanswered,
    rule::{Counted, Exchange, is_upgrade},
    tracked::{Outgoing, Tracked},
};
use crate::{
    error::{Cause, Error},
    http::{classify, is_grpc, settings},
    policy::client::Retry,
};
use http::{Request, Response, Version};
use http_body::Body as _;
use linkerd_stack::{http::Body, replay::ReplayBody};
use rand::RngExt;
use tokio::time::sleep;

/// Bytes of request body kept for retries of a ServiceProfile's route (behaviour.md D.3).
const PROFILE_REPLAY_BYTES: usize = 64 * 1024;

impl Exchange<'_> {
    /// The first attempt and its retries (behaviour.md D.11).
    pub(super) async fn attempts(&self, req: Request<Body>) -> Result<Response<Tracked>, Error> {
        let (req, max_bytes) = (self.count_frames(req), self.replay_bytes());
        match max_bytes.filter(|_| !is_upgrade(&req)) {
            None => self.attempt(req, None, true).await,
            // Boxed, so that requests that are not retried don't pay for the room.
            Some(max_bytes) => Box::pin(self.retrying(req, max_bytes)).await,
        }
    }

    async fn retrying(&self, req: Request<Body>, max_bytes: usize) -> Result<Response<Tracked>, Error> {
        if let Some(budget) = &self.rule.budget {
            budget.deposit();
        }
        let (head, body) = req.into_parts();
        let (mut body, replay) = match body.is_end_stream() {
            true => (Body::empty(), None),
            false => match ReplayBody::new(body, max_bytes) {
                Ok((body, replay)) => (Body::new(body), Some(replay)),
                // Too long from the start.
                Err(body) => return self.attempt(Request::from_parts(head, body), None, true).await,
            },
        };
        let mut retries: u32 = 0;
        loop {
            let last = self.max_retries().is_some_and(|max| retries >= max);
            let headers = self.params.retry.as_ref().and_then(|r| r.timeout).filter(|_| !last);
            let req = Request::from_parts(head.clone(), std::mem::take(&mut body));
            let mut result = self.attempt(req, headers, retries == 0).await;
            let retryable = self.is_retryable(&mut result).await;
            if !retryable {
                if retries > 0
                    && let Some(route) = &self.route
                {
                    route.retry().successes.inc();
                }
                return result;
            }
            if last {
                if let Some(route) = &self.route {
                    route.retry().limit_exceeded.inc();
                }
                return result;
            }
            if let Some(replay) = &replay {
                let Some(again) = replay.is_complete().then(|| replay.again()).flatten() else { return result };
                body = Body::new(again);
            }
            if !self.withdraw() {
                return result;
            }
            // Gives connection and load back before the wait.
            drop(result);
            self.expired.set(None);
            if let Some(backoff) = self.params.retry.as_ref().and_then(|r| r.backoff.as_ref()) {
                let wait = settings::backoff(backoff).delay(retries, rand::rng().random());
                sleep(wait).await;
            }
            retries += 1;
            if let Some(route) = &self.route {
                route.retry().requests.inc();
            }
        }
    }

    fn count_frames(&self, req: Request<Body>) -> Request<Body> {
        if let (Some(route), Some(_)) = (&self.route, &self.params.retry) {
            // All four families appear with the first request that may be retried.
            let _ = route.retry();
        }
        let Some(progress) = &self.progress else { return req };
        req.map(|body| Body::new(Outgoing::new(body, progress.clone(), self.route.clone())))
    }

    /// How much body is kept for another attempt; none if there will be none.
    fn replay_bytes(&self) -> Option<usize> {
        match (&self.rule.metrics, &self.params.retry) {
            (Counted::Profile(profile), _) => profile.retryable.then_some(PROFILE_REPLAY_BYTES),
            (Counted::Policy { .. }, retry) => retry.as_ref().map(|r| r.max_request_bytes),
        }
    }

    /// None = as many as the budget allows.
    fn max_retries(&self) -> Option<u32> {
        self.params.retry.as_ref().map(|r| u32::from(r.max_retries))
    }

    fn withdraw(&self) -> bool {
        let granted = self.rule.budget.as_ref().is_none_or(|budget| budget.withdraw());
        match (&self.rule.metrics, granted) {
            (Counted::Profile(profile), false) => profile.metrics.no_budget.inc(),
            (Counted::Policy { .. }, false) => {
                if let Some(route) = &self.route {
                    route.retry().overflow.inc();
                }
            }
            (_, true) => {}
        }
        granted
    }

    async fn is_retryable(&self, result: &mut Result<Response<Tracked>, Error>) -> bool {
        match (&self.rule.metrics, &self.params.retry, result) {
            // A ServiceProfile retries responses alone, never errors (behaviour.md D.3).
            (Counted::Profile(profile), _, Ok(rsp)) => {
                let failed = self.failed_by_profile(rsp).await;
                if failed {
                    profile.metrics.retryable.inc();
                }
                failed
            }
            (Counted::Profile(_), _, Err(_)) | (Counted::Policy { .. }, None, _) => false,
            (Counted::Policy { .. }, Some(retry), Ok(rsp)) => self.failed_by_policy(retry, rsp).await,
            (Counted::Policy { .. }, Some(retry), Err(error)) => {
                classify::is_always_retryable(error) || retry.connection_errors && is_connection_error(error)
            }
        }
    }

    async fn failed_by_profile(&self, rsp: &mut Response<Tracked>) -> bool {
        let Some(judge) = &self.judge else { return false };
        if rsp.extensions().get::<Unanswered>().is_some() {
            return false;
        }
        let class = match judge.start(rsp.status(), rsp.headers()) {
            Some(class) => class,
            None if self.holds_back(rsp) => {
                let status = rsp.status();
                match rsp.body_mut().peek_trailers().await {
                    Some(trailers) => judge.end(status, Some(trailers)),
                    None => return false,
                }
            }
            None => return false,
        };
        !class.success
    }

    async fn failed_by_policy(&self, retry: &Retry, rsp: &mut Response<Tracked>) -> bool {
        let unanswered = rsp.extensions().get().is_some_and(|Unanswered(error)| is_connection_error(error));
        let status = rsp.status().as_u16();
        if unanswered && retry.connection_errors || retry.statuses.iter().any(|range| range.contains(&status)) {
            return true;
        }
        if retry.grpc_codes.is_empty() {
            return false;
        }
        let code = match classify::grpc_status(rsp.headers()) {
            Some(code) => Some(code),
            None if self.holds_back(rsp) => rsp.body_mut().peek_trailers().await.and_then(classify::grpc_status),
            None => None,
        };
        code.is_some_and(|code| retry.grpc_codes.contains(&code))
    }

    /// Whether a response is held until its first frame: gRPC over HTTP/2, whose failures may be in trailers.
    fn holds_back(&self, rsp: &Response<Tracked>) -> bool {
        self.asked.version == Version::HTTP_2 && is_grpc(rsp.headers())
    }
}

fn is_connection_error(error: &Error) -> bool {
    matches!(
        error.cause(),
        Cause::Io { .. }
            | Cause::ConnectTimeout(_)
            | Cause::IncompleteResponse
            | Cause::Http2Connection(_)
            | Cause::Http2Reset(_)
            | Cause::BackendRequestTimeout(_)
    )
}
