//! What is done with a request that took a rule. It meets, first to last: `l5d-` headers, the request deadline, retries,
//! and on each attempt filters, mirrors, the choice of a backend, the backend's filters, the limits of the attempt, and
//! the replica (metrics.md 4.3 has the same order).

use super::{
    Runtime,
    concrete::{Concrete, Distribution, Replica, Replicas, Unready, random},
    endpoint::{HttpEndpoint, Unanswered},
    limits::{Expired, Limits, Progress},
    params::Params,
    session::Token,
    tracked::{Outgoing, ProfileHook, Tracked},
};
use crate::{
    error::{Cause, Error, Lack},
    http::{
        Asked, Match, classify,
        filter::{self, Flow},
        is_grpc, settings,
    },
    policy::{
        client::Session,
        route::{Filter, Ratio},
    },
    tap,
    telemetry::{BackendMetrics, Ended, ProfileRouteMetrics, RouteKind, RouteLabels, RouteMetrics},
};
use http::{HeaderName, HeaderValue, Request, Response, Version};
use http_body::Body as _;
use linkerd_stack::{
    Ready,
    balance::Picked,
    budget::Budget,
    http::{Body, normalize},
    replay::ReplayBody,
};
use rand::RngExt;
use std::{net::SocketAddr, pin::pin, sync::Arc, time::Duration};
use tokio::{
    sync::Semaphore,
    time::{Instant, sleep, timeout_at},
};

const L5D_DST_CANONICAL: HeaderName = HeaderName::from_static("l5d-dst-canonical");

/// Bytes of request body kept for retries of a ServiceProfile's route (behaviour.md D.3).
const PROFILE_REPLAY_BYTES: usize = 64 * 1024;

/// Picks from a balancer whose breaker shut before the request could be admitted, before it counts as shed.
const MAX_PICKS: usize = 8;

/// Longest exchange with a mirror; nobody waits for it, so nobody else would end it.
const MIRROR_TIMEOUT: Duration = Duration::from_secs(60);

/// Mirrored requests in flight per rule; more are not copied.
pub(super) const MIRRORS_IN_FLIGHT: usize = 1_000;

/// A rule of a route, ready to run.
pub(super) struct Rule {
    pub(super) rt: Arc<Runtime>,
    /// `route <meta>`.
    pub(super) context: Arc<str>,
    pub(super) filters: Vec<Filter>,
    pub(super) mirrors: Vec<Mirroring>,
    pub(super) backends: Distribution<RuleBackend>,
    /// Answer where there is no backend.
    pub(super) empty: Cause,
    pub(super) params: Params,
    pub(super) budget: Option<Arc<Budget>>,
    pub(super) allow_l5d_headers: bool,
    pub(super) session: Option<Arc<Session>>,
    /// Metrics and judgements are for gRPC.
    pub(super) grpc: bool,
    pub(super) metrics: Counted,
}

/// Who counts the requests of a rule.
pub(super) enum Counted {
    /// A policy's route.
    Policy {
        metrics: Arc<RouteMetrics>,
        /// Set if metrics are told apart by the request's host.
        hostnames: Option<RouteLabels>,
    },
    /// A ServiceProfile's route.
    Profile(ProfileRule),
}

/// What only ServiceProfiles have.
pub(super) struct ProfileRule {
    pub(super) metrics: Arc<ProfileRouteMetrics>,
    /// How responses are judged; none = by the request.
    pub(super) classes: Option<classify::Rule>,
    /// Request to response headers, over all attempts.
    pub(super) timeout: Option<Duration>,
    pub(super) retryable: bool,
    /// `l5d-dst-canonical`.
    pub(super) canonical: Option<HeaderValue>,
    /// What those who tap are told of the route.
    pub(super) labels: tap::Route,
}

/// A backend of a rule.
pub(super) struct RuleBackend {
    /// `backend <meta>`.
    pub(super) context: Arc<str>,
    pub(super) filters: Vec<Filter>,
    pub(super) mirrors: Vec<Mirroring>,
    pub(super) concrete: Arc<Concrete<HttpEndpoint>>,
    pub(super) metrics: Option<Arc<BackendMetrics>>,
}

/// Where copies of requests go.
pub(super) struct Mirroring {
    pub(super) ratio: Ratio,
    pub(super) concrete: Arc<Concrete<HttpEndpoint>>,
    pub(super) in_flight: Arc<Semaphore>,
}

impl Replica for HttpEndpoint {
    fn ready(&self) -> Ready {
        HttpEndpoint::ready(self)
    }

    fn unready(&self) -> Option<Unready> {
        HttpEndpoint::unready(self)
    }

    fn refused_for(&self) -> Option<Duration> {
        HttpEndpoint::refused_for(self)
    }
}

/// A request's journey through a rule: what all attempts share.
struct Exchange<'a> {
    rule: &'a Rule,
    asked: &'a Asked,
    matched: &'a Match,
    params: &'a Params,
    /// None for requests without a body.
    progress: Option<Arc<Progress>>,
    /// The whole request's.
    deadline: Option<(Instant, Duration)>,
    token: Option<Token>,
    expired: Expired,
}

impl Rule {
    /// Runs a request. Dropping the future cancels it.
    ///
    /// # Errors
    /// Whatever is not an answer of a replica or of a filter.
    pub(super) async fn call(
        &self,
        mut req: Request<Body>,
        matched: &Match,
        asked: &Asked,
    ) -> Result<Response<Tracked>, Error> {
        let dispatched = Instant::now();
        let params = match self.allow_l5d_headers {
            true => self.params.with_headers(req.headers_mut()),
            false => std::borrow::Cow::Borrowed(&self.params),
        };
        let route = self.route_metrics(&req);
        if let Some(route) = &route {
            route.request();
        }
        if let Counted::Profile(profile) = &self.metrics {
            profile.metrics.logical.request();
            if let Some(canonical) = &profile.canonical {
                req.headers_mut().insert(L5D_DST_CANONICAL, canonical.clone());
            }
            if self.rt.telemetry.taps().any() {
                req.extensions_mut().insert(profile.labels.clone());
            }
        }
        let judge = match &self.metrics {
            Counted::Profile(ProfileRule { classes: Some(classes), .. }) => Some(classes.clone()),
            Counted::Profile(_) => Some(classify::Rule::of(req.headers(), self.grpc)),
            Counted::Policy { .. } => None,
        };
        let exchange = Exchange {
            rule: self,
            asked,
            matched,
            progress: (!req.body().is_end_stream()).then(|| Progress::new(dispatched)),
            deadline: params.timeouts.request.map(|t| (dispatched + t, t)),
            token: self.session.as_ref().and_then(|session| Token::of(session, req.headers())),
            params: &params,
            expired: Expired::default(),
        };
        let limit = match (exchange.deadline, self.profile_timeout()) {
            (Some((at, t)), _) => Some((at, Cause::RequestTimeout(t))),
            (None, Some(t)) => Some((dispatched + t, Cause::ProfileTimeout(t))),
            (None, None) => None,
        };
        let result = {
            // Pinned here: each of the arms below would otherwise have room for a copy of its own.
            let mut attempts = pin!(exchange.attempts(req, route.as_ref(), judge.as_ref()));
            match limit {
                Some((at, cause)) => timeout_at(at, attempts.as_mut()).await.unwrap_or_else(|_| {
                    exchange.expired.set(Some(cause.clone()));
                    Err(cause.into())
                }),
                None => attempts.as_mut().await,
            }
        };
        match result {
            Ok(mut rsp) => {
                if let Some(route) = &route {
                    Tracked::hook_route(&mut rsp, self.grpc, route, dispatched);
                }
                if let (Counted::Profile(profile), Some(rule)) = (&self.metrics, &judge) {
                    hook_profile(&mut rsp, profile, rule.clone(), false, dispatched);
                }
                Ok(rsp)
            }
            Err(error) => {
                if let Some(route) = &route {
                    route.ended(Ended::failed(error.cause()), dispatched.elapsed());
                }
                if let Counted::Profile(profile) = &self.metrics {
                    profile.metrics.logical.response(None, crate::telemetry::Class::error(error.cause()));
                }
                Err(error.context(self.context.clone()))
            }
        }
    }

    fn profile_timeout(&self) -> Option<Duration> {
        match &self.metrics {
            Counted::Profile(profile) => profile.timeout,
            Counted::Policy { .. } => None,
        }
    }

    /// The metrics of the route; by hostname only if the operator asked for that.
    fn route_metrics<B>(&self, req: &Request<B>) -> Option<Arc<RouteMetrics>> {
        match &self.metrics {
            Counted::Profile(_) => None,
            Counted::Policy { metrics, hostnames: None } => Some(metrics.clone()),
            Counted::Policy { hostnames: Some(labels), .. } => {
                let host = req.uri().host().filter(|h| h.parse::<linkerd_tls::ServerName>().is_ok());
                let hostname = host.map(|h| h.to_ascii_lowercase().into());
                let kind = if self.grpc { RouteKind::Grpc } else { RouteKind::Http };
                Some(self.rt.telemetry.outbound_route(kind, RouteLabels { hostname, ..labels.clone() }))
            }
        }
    }
}

fn hook_profile(
    rsp: &mut Response<Tracked>,
    profile: &ProfileRule,
    rule: classify::Rule,
    actual: bool,
    dispatched: Instant,
) {
    let status = rsp.status();
    let class = rule.start(status, rsp.headers());
    let hook = ProfileHook { metrics: profile.metrics.clone(), actual, status, rule, class, dispatched };
    Tracked::hook_profile(rsp, hook);
}

impl Exchange<'_> {
    /// The first attempt and its retries (behaviour.md D.11).
    async fn attempts(
        &self,
        req: Request<Body>,
        route: Option<&Arc<RouteMetrics>>,
        judge: Option<&classify::Rule>,
    ) -> Result<Response<Tracked>, Error> {
        let (req, max_bytes) = (self.count_frames(req, route), self.replay_bytes());
        match max_bytes.filter(|_| !is_upgrade(&req)) {
            None => self.attempt(req, None, true, judge).await,
            // Boxed, so that requests that are not retried don't pay for the room.
            Some(max_bytes) => Box::pin(self.retrying(req, max_bytes, route, judge)).await,
        }
    }

    async fn retrying(
        &self,
        req: Request<Body>,
        max_bytes: usize,
        route: Option<&Arc<RouteMetrics>>,
        judge: Option<&classify::Rule>,
    ) -> Result<Response<Tracked>, Error> {
        if let Some(budget) = &self.rule.budget {
            budget.deposit();
        }
        let (head, body) = req.into_parts();
        let (mut body, replay) = match body.is_end_stream() {
            true => (Body::empty(), None),
            false => match ReplayBody::new(body, max_bytes) {
                Ok((body, replay)) => (Body::new(body), Some(replay)),
                // Too long from the start.
                Err(body) => return self.attempt(Request::from_parts(head, body), None, true, judge).await,
            },
        };
        let mut retries: u32 = 0;
        loop {
            let last = self.max_retries().is_some_and(|max| retries >= max);
            let headers = self.params.retry.as_ref().and_then(|r| r.timeout).filter(|_| !last);
            let req = Request::from_parts(head.clone(), std::mem::take(&mut body));
            let mut result = self.attempt(req, headers, retries == 0, judge).await;
            let retryable = self.is_retryable(&mut result, judge).await;
            if !retryable {
                if retries > 0
                    && let Some(route) = route
                {
                    route.retry().successes.inc();
                }
                return result;
            }
            if last {
                if let Some(route) = route {
                    route.retry().limit_exceeded.inc();
                }
                return result;
            }
            if let Some(replay) = &replay {
                let Some(again) = replay.is_complete().then(|| replay.again()).flatten() else { return result };
                body = Body::new(again);
            }
            if !self.withdraw(route) {
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
            if let Some(route) = route {
                route.retry().requests.inc();
            }
        }
    }

    fn count_frames(&self, req: Request<Body>, route: Option<&Arc<RouteMetrics>>) -> Request<Body> {
        if let (Some(route), Some(_)) = (route, &self.params.retry) {
            // All four families appear with the first request that may be retried.
            let _ = route.retry();
        }
        let Some(progress) = &self.progress else { return req };
        req.map(|body| Body::new(Outgoing::new(body, progress.clone(), route.cloned())))
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

    fn withdraw(&self, route: Option<&Arc<RouteMetrics>>) -> bool {
        let granted = self.rule.budget.as_ref().is_none_or(|budget| budget.withdraw());
        match (&self.rule.metrics, granted) {
            (Counted::Profile(profile), false) => profile.metrics.no_budget.inc(),
            (Counted::Policy { .. }, false) => {
                if let Some(route) = route {
                    route.retry().overflow.inc();
                }
            }
            (_, true) => {}
        }
        granted
    }

    async fn is_retryable(
        &self,
        result: &mut Result<Response<Tracked>, Error>,
        judge: Option<&classify::Rule>,
    ) -> bool {
        if let Counted::Profile(profile) = &self.rule.metrics {
            // Only responses, never errors (behaviour.md D.3).
            let (Ok(rsp), Some(rule)) = (result, judge) else { return false };
            if rsp.extensions().get::<Unanswered>().is_some() {
                return false;
            }
            let class = match rule.start(rsp.status(), rsp.headers()) {
                Some(class) => class,
                None if self.holds_back(rsp) => {
                    let status = rsp.status();
                    let trailers = rsp.body_mut().peek_trailers().await;
                    if trailers.is_none() {
                        return false;
                    }
                    rule.end(status, trailers)
                }
                None => return false,
            };
            if !class.success {
                profile.metrics.retryable.inc();
            }
            return !class.success;
        }
        let Some(retry) = &self.params.retry else { return false };
        match result {
            Err(error) => classify::is_always_retryable(error) || retry.connection_errors && is_connection_error(error),
            Ok(rsp) => {
                if let Some(Unanswered(error)) = rsp.extensions().get()
                    && retry.connection_errors
                    && is_connection_error(error)
                {
                    return true;
                }
                let status = rsp.status().as_u16();
                if retry.statuses.iter().any(|range| range.contains(&status)) {
                    return true;
                }
                if retry.grpc_codes.is_empty() {
                    return false;
                }
                let code = match classify::grpc_status(rsp.headers()) {
                    Some(code) => Some(code),
                    None if self.holds_back(rsp) => {
                        rsp.body_mut().peek_trailers().await.and_then(classify::grpc_status)
                    }
                    None => None,
                };
                code.is_some_and(|code| retry.grpc_codes.contains(&code))
            }
        }
    }

    /// Whether a response is held until its first frame: gRPC over HTTP/2, whose failures may be in trailers.
    fn holds_back(&self, rsp: &Response<Tracked>) -> bool {
        self.asked.version == Version::HTTP_2 && is_grpc(rsp.headers())
    }

    /// One attempt. `headers` limits the wait for response headers.
    async fn attempt(
        &self,
        mut req: Request<Body>,
        headers: Option<Duration>,
        first: bool,
        judge: Option<&classify::Rule>,
    ) -> Result<Response<Tracked>, Error> {
        let rule = self.rule;
        let dispatched = Instant::now();
        let timeouts = &self.params.timeouts;
        let limits = Limits {
            request: self.deadline,
            backend_request: timeouts.backend_request.map(|t| (dispatched + t, t)),
            response: timeouts.response,
            headers,
            idle: timeouts.idle,
        };
        let follow_up = match self.filter(&rule.filters, &rule.mirrors, &mut req, first)? {
            Flow::Forward(follow_up) => follow_up,
            Flow::Answer(parts) => return Ok(Response::from_parts(*parts, Tracked::new(Body::empty()))),
        };
        let backend = self.pick().ok_or_else(|| Error::new(rule.empty.clone()))?;
        if let Some(metrics) = &backend.metrics {
            metrics.request();
        }
        if let Counted::Profile(profile) = &rule.metrics {
            profile.metrics.actual.request();
        }
        // Boxed: the largest of these futures, which every one around it would else contain and copy several times. Earned
        // by `instructions`, outbound-http1 and outbound-http2.
        let mut response = Box::pin(self.dispatch(backend, req, first));
        match limits.headers(dispatched, self.progress.as_ref(), response.as_mut()).await {
            Ok(mut rsp) => {
                rsp.body_mut().limit(limits.body(self.progress.as_ref()));
                if let Some(metrics) = &backend.metrics {
                    Tracked::hook_backend(&mut rsp, rule.grpc, metrics, dispatched, self.progress.as_ref());
                }
                if let (Counted::Profile(profile), Some(judge)) = (&rule.metrics, judge) {
                    hook_profile(&mut rsp, profile, judge.clone(), true, dispatched);
                }
                filter::on_response(&rule.filters, rsp.headers_mut(), &follow_up);
                Ok(rsp)
            }
            Err(error) => {
                self.expired.set(Some(error.cause().clone()));
                drop(response);
                if let Some(metrics) = &backend.metrics {
                    let sent = match &self.progress {
                        Some(progress) => progress.ended(),
                        None => Some(dispatched),
                    };
                    metrics.ended(Ended::failed(error.cause()), sent.map_or(Duration::ZERO, |at| at.elapsed()));
                }
                if let Counted::Profile(profile) = &rule.metrics {
                    profile.metrics.actual.response(None, crate::telemetry::Class::error(error.cause()));
                }
                Err(error.context(backend.context.clone()))
            }
        }
    }

    /// Runs filters on an attempt. Only the first is copied.
    fn filter(
        &self,
        filters: &[Filter],
        mirrors: &[Mirroring],
        req: &mut Request<Body>,
        first: bool,
    ) -> Result<Flow, Error> {
        filter::on_request_copied(filters, req, self.matched, crate::http::random, |req| {
            if first {
                mirror(mirrors, req, self.asked);
            }
        })
    }

    /// A backend; the one that holds the session's replica, if there is a session.
    fn pick(&self) -> Option<&RuleBackend> {
        let backends = &self.rule.backends;
        if let Some(token) = &self.token {
            let holder = backends.iter().find(|backend| match &*backend.concrete {
                Concrete::Replicas(replicas) => replicas.balance.get(&token.addr).is_some(),
                Concrete::Fail(_) => false,
            });
            if holder.is_some() {
                return holder;
            }
        }
        backends.pick(|backend| is_open(&backend.concrete), random)
    }

    /// Backend filters, then a replica.
    async fn dispatch(
        &self,
        backend: &RuleBackend,
        mut req: Request<Body>,
        first: bool,
    ) -> Result<Response<Tracked>, Error> {
        let follow_up = match self.filter(&backend.filters, &backend.mirrors, &mut req, first)? {
            Flow::Forward(follow_up) => follow_up,
            Flow::Answer(parts) => return Ok(Response::from_parts(*parts, Tracked::new(Body::empty()))),
        };
        let replicas = match &*backend.concrete {
            Concrete::Replicas(replicas) => replicas,
            Concrete::Fail(failure) => {
                return Err(Cause::FailBackend {
                    status: failure.status,
                    grpc_code: failure.grpc_code,
                    message: failure.message.clone(),
                }
                .into());
            }
        };
        let bound = self.token.and_then(|token| replicas.balance.acquire_key(&token.addr));
        let begins = self.rule.session.as_ref().filter(|_| bound.is_none());
        let (addr, mut rsp) = send(replicas, bound, req, self.asked, &self.expired).await?;
        filter::on_response(&backend.filters, rsp.headers_mut(), &follow_up);
        if let Some(session) = begins {
            Token::begin(addr).give(session, rsp.headers_mut());
        }
        Ok(rsp)
    }
}

fn is_open(concrete: &Concrete<HttpEndpoint>) -> bool {
    match concrete {
        Concrete::Replicas(replicas) => replicas.is_open(),
        // A refusal is always ready: its share of the traffic must see it.
        Concrete::Fail(_) => true,
    }
}

/// Sends a request to a replica that admits it.
async fn send(
    replicas: &Replicas<HttpEndpoint>,
    mut bound: Option<Picked<SocketAddr, Arc<HttpEndpoint>>>,
    req: Request<Body>,
    asked: &Asked,
    expired: &Expired,
) -> Result<(SocketAddr, Response<Tracked>), Error> {
    for _ in 0..MAX_PICKS {
        let picked = match bound.take() {
            Some(picked) => picked,
            None => replicas.acquire().await?,
        };
        if let Some(permit) = picked.service.admit() {
            let rsp = picked.service.send(req, asked, picked.load, permit, expired).await?;
            return Ok((picked.key, rsp));
        }
    }
    Err(Error::new(Cause::LoadShed(Lack::Admission)).context("every endpoint picked was shut by its breaker"))
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

fn is_upgrade<B>(req: &Request<B>) -> bool {
    req.method() == http::Method::CONNECT || normalize::is_upgrade(req)
}

/// Sends copies on their way. Their answers are read to the end and forgotten; a copy that finds no room is not made.
fn mirror(mirrors: &[Mirroring], req: &mut Request<Body>, asked: &Asked) {
    for mirror in mirrors {
        if !mirror.ratio.draw(crate::http::random) || is_upgrade(req) {
            continue;
        }
        let Ok(permit) = mirror.in_flight.clone().try_acquire_owned() else { continue };
        let body = if req.body().is_end_stream() {
            Body::empty()
        } else {
            let now = Instant::now();
            let mut tee = Outgoing::new(std::mem::take(req.body_mut()), Progress::new(now), None);
            let copy = tee.mirror();
            *req.body_mut() = Body::new(tee);
            copy
        };
        let mut copy = Request::new(body);
        *copy.method_mut() = req.method().clone();
        *copy.uri_mut() = req.uri().clone();
        *copy.version_mut() = req.version();
        *copy.headers_mut() = req.headers().clone();
        let (concrete, asked) = (mirror.concrete.clone(), *asked);
        tokio::spawn(async move {
            let _permit = permit;
            let Concrete::Replicas(replicas) = &*concrete else { return };
            let expired = Expired::default();
            let mut exchange = pin!(async {
                let Ok((_, rsp)) = send(replicas, None, copy, &asked, &expired).await else { return };
                let mut body = pin!(rsp.into_body());
                while let Some(Ok(_)) = std::future::poll_fn(|cx| body.as_mut().poll_frame(cx)).await {}
            });
            // Late answers are given up.
            if tokio::time::timeout(MIRROR_TIMEOUT, exchange.as_mut()).await.is_err() {
                expired.set(Some(Cause::RequestTimeout(MIRROR_TIMEOUT)));
            }
        });
    }
}
