//! What is done with a request that took a rule. It meets, first to last: `l5d-` headers, the request deadline, retries,
//! and on each attempt filters, mirrors, the choice of a backend, the backend's filters, the limits of the attempt, and
//! the replica (metrics.md 4.3 has the same order).

use super::{
    Runtime,
    concrete::{Concrete, Distribution, Replica, Replicas, Unready, random},
    endpoint::HttpEndpoint,
    limits::{Expired, Limits, Progress},
    mirror::{Mirroring, mirror},
    params::Params,
    session::Token,
    tracked::{ProfileHook, Tracked},
};
use crate::{
    error::{Cause, Error, Lack},
    http::{
        Asked, Match, classify,
        filter::{self, Flow},
    },
    policy::{client::Session, route::Filter},
    tap,
    telemetry::{BackendMetrics, Ended, ProfileRouteMetrics, RouteKind, RouteLabels, RouteMetrics},
};
use http::{HeaderName, HeaderValue, Request, Response};
use http_body::Body as _;
use linkerd_stack::{
    Ready,
    balance::Picked,
    budget::Budget,
    http::{Body, normalize},
};
use std::{net::SocketAddr, pin::pin, sync::Arc, time::Duration};
use tokio::time::{Instant, timeout_at};

const L5D_DST_CANONICAL: HeaderName = HeaderName::from_static("l5d-dst-canonical");

/// Picks from a balancer whose breaker shut before the request could be admitted, before it counts as shed.
const MAX_PICKS: usize = 8;

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
pub(super) struct Exchange<'a> {
    pub(super) rule: &'a Rule,
    pub(super) asked: &'a Asked,
    pub(super) matched: &'a Match,
    pub(super) params: &'a Params,
    /// None for requests without a body.
    pub(super) progress: Option<Arc<Progress>>,
    /// The whole request's.
    pub(super) deadline: Option<(Instant, Duration)>,
    pub(super) token: Option<Token>,
    pub(super) expired: Expired,
    /// Counts the request as a whole; none of a ServiceProfile.
    pub(super) route: Option<Arc<RouteMetrics>>,
    /// How a ServiceProfile judges responses.
    pub(super) judge: Option<classify::Rule>,
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
        let judge = match &self.metrics {
            Counted::Profile(profile) => Some(self.enter_profile(profile, &mut req)),
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
            route,
            judge,
        };
        let result = {
            // Pinned here: each of the arms below would otherwise have room for a copy of its own.
            let mut attempts = pin!(exchange.attempts(req));
            match exchange.limit(dispatched) {
                Some((at, cause)) => timeout_at(at, attempts.as_mut()).await.unwrap_or_else(|_| {
                    exchange.expired.set(Some(cause.clone()));
                    Err(cause.into())
                }),
                None => attempts.as_mut().await,
            }
        };
        exchange.ended(result, dispatched)
    }

    /// Marks and counts a request of a ServiceProfile's route; how its responses are judged.
    fn enter_profile(&self, profile: &ProfileRule, req: &mut Request<Body>) -> classify::Rule {
        profile.metrics.logical.request();
        if let Some(canonical) = &profile.canonical {
            req.headers_mut().insert(L5D_DST_CANONICAL, canonical.clone());
        }
        if self.rt.telemetry.taps().any() {
            req.extensions_mut().insert(profile.labels.clone());
        }
        profile.classes.clone().unwrap_or_else(|| classify::Rule::of(req.headers(), self.grpc))
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
    /// When the whole request must be over, and what it failed with otherwise.
    fn limit(&self, dispatched: Instant) -> Option<(Instant, Cause)> {
        match (self.deadline, &self.rule.metrics) {
            (Some((at, t)), _) => Some((at, Cause::RequestTimeout(t))),
            (None, Counted::Profile(profile)) => profile.timeout.map(|t| (dispatched + t, Cause::ProfileTimeout(t))),
            (None, Counted::Policy { .. }) => None,
        }
    }

    /// Counts the request as a whole, when its response ends or because there is none.
    fn ended(&self, result: Result<Response<Tracked>, Error>, dispatched: Instant) -> Result<Response<Tracked>, Error> {
        let rule = self.rule;
        match result {
            Ok(mut rsp) => {
                if let Some(route) = &self.route {
                    Tracked::hook_route(&mut rsp, rule.grpc, route, dispatched);
                }
                if let (Counted::Profile(profile), Some(judge)) = (&rule.metrics, &self.judge) {
                    hook_profile(&mut rsp, profile, judge.clone(), false, dispatched);
                }
                Ok(rsp)
            }
            Err(error) => {
                if let Some(route) = &self.route {
                    route.ended(Ended::failed(error.cause()), dispatched.elapsed());
                }
                if let Counted::Profile(profile) = &rule.metrics {
                    profile.metrics.logical.response(None, crate::telemetry::Class::error(error.cause()));
                }
                Err(error.context(rule.context.clone()))
            }
        }
    }

    /// One attempt. `headers` limits the wait for response headers.
    pub(super) async fn attempt(
        &self,
        mut req: Request<Body>,
        headers: Option<Duration>,
        first: bool,
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
                if let (Counted::Profile(profile), Some(judge)) = (&rule.metrics, &self.judge) {
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
pub(super) async fn send(
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

pub(super) fn is_upgrade<B>(req: &Request<B>) -> bool {
    req.method() == http::Method::CONNECT || normalize::is_upgrade(req)
}
