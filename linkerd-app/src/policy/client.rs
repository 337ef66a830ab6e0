//! What a client-side destination demands: protocol, routes, backends, timeouts, retries, breakers.

use super::{
    Endpoint, Meta,
    route::{Filter, HostMatch, Precedence, RouteMatch},
    server::RateLimit,
};
use regex::Regex;
use std::{collections::BTreeMap, ops::RangeInclusive, sync::Arc, time::Duration};

/// The policy of one destination (an address, or a name in ingress and gateway mode).
#[derive(Clone, Debug, PartialEq)]
pub struct ClientPolicy {
    /// The Service or EgressNetwork found for it, or a synthetic name.
    pub parent: Meta,
    /// How it is spoken to, and where traffic goes.
    pub protocol: Protocol,
    /// Name of the service as `host:port`, without a trailing dot, where one is known.
    pub logical: Option<Arc<str>>,
    /// Limits on HTTP requests from this side.
    pub rate_limit: Option<Arc<RateLimit>>,
}

/// How a destination is spoken to.
#[derive(Clone, Debug, PartialEq)]
pub enum Protocol {
    /// HTTP if the client's first bytes say so, else opaque.
    Detect {
        /// The source's wish. Linkerd's outbound ignores it in favour of the environment's (behaviour.md D.2).
        timeout: Duration,
        /// For HTTP/1.
        http1: Http,
        /// For HTTP/2.
        http2: Http,
        /// For everything else.
        opaque: Opaque,
    },
    /// HTTP/1 without detection.
    Http1(Http),
    /// HTTP/2 without detection.
    Http2(Http),
    /// HTTP/2 without detection, gRPC routes.
    Grpc(Http),
    /// Bytes.
    Opaque(Opaque),
    /// The client's own TLS, routed by SNI, never terminated.
    Tls(Tls),
    /// The source sent something that could not be understood: HTTP gets 500, everything else is closed.
    Invalid(Arc<str>),
}

/// Routes for HTTP requests.
#[derive(Clone, Debug, PartialEq)]
pub struct Http {
    /// What is matched and how.
    pub routes: Routes,
    /// Circuit breaker of each endpoint of its balancers.
    pub breaker: Breaker,
}

/// The three shapes of HTTP routing.
#[derive(Clone, Debug, PartialEq)]
pub enum Routes {
    /// HTTPRoutes.
    Http(Arc<[Route]>, Precedence),
    /// GRPCRoutes.
    Grpc(Arc<[Route]>, Precedence),
    /// A ServiceProfile that is in force.
    Profile(Arc<Profile>),
}

/// One outbound route.
#[derive(Clone, Debug, PartialEq)]
pub struct Route {
    /// The route resource.
    pub meta: Meta,
    /// Hosts it is for; empty = any.
    pub hosts: Vec<HostMatch>,
    /// Alternatives.
    pub rules: Vec<Rule>,
}

/// Matches, and what is done with a request that fits one.
#[derive(Clone, Debug, PartialEq)]
pub struct Rule {
    /// Alternatives; empty = everything.
    pub matches: Vec<RouteMatch>,
    /// Applied in order, on each attempt, before the backend is chosen.
    pub filters: Vec<Filter>,
    /// Where requests go.
    pub backends: Distribution<Filter>,
    /// Limits in time.
    pub timeouts: Timeouts,
    /// Further attempts.
    pub retry: Option<Retry>,
    /// Whether `l5d-timeout`, `l5d-retry-*` and the like are honoured (behaviour.md D.13).
    pub allow_l5d_headers: bool,
    /// Sticky sessions.
    pub session: Option<Arc<Session>>,
}

/// Choice among backends.
#[derive(Clone, Debug, PartialEq)]
pub enum Distribution<F> {
    /// Nowhere: 503 / closed.
    Empty,
    /// The first that is ready, in order.
    FirstAvailable(Arc<[RouteBackend<F>]>),
    /// By weight among those that are ready. A backend with weight 0 takes nothing.
    RandomAvailable(Arc<[(RouteBackend<F>, u32)]>),
}

/// A backend with the filters that only it gets.
#[derive(Clone, Debug, PartialEq)]
pub struct RouteBackend<F> {
    /// Applied in order, on each attempt, after the backend is chosen.
    pub filters: Vec<F>,
    /// Where to.
    pub backend: Backend,
}

/// A set of replicas, one replica, or a refusal.
#[derive(Clone, Debug, PartialEq)]
pub struct Backend {
    /// The resource.
    pub meta: Meta,
    /// How its replicas are found.
    pub dispatcher: Dispatcher,
}

/// How a backend's replicas are found.
#[derive(Clone, Debug, PartialEq)]
pub enum Dispatcher {
    /// Balance over what discovery says.
    Balance {
        /// Key for [`super::Source::resolve`]: `host:port`. It is the metric label `authority` and `concrete`.
        discovery: Arc<str>,
        /// Load metric.
        load: Load,
    },
    /// One known replica.
    Forward(Endpoint),
    /// Refuse.
    Fail(Failure),
}

/// A backend that can't be: an unknown Service, an unusable reference.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// HTTP status for its share of requests.
    pub status: http::StatusCode,
    /// gRPC code for its share of calls.
    pub grpc_code: u16,
    /// Why; the error header and the log carry it.
    pub message: Arc<str>,
}

/// The balancer's load metric: peak EWMA of response latency (behaviour.md D.7).
#[derive(Clone, Debug, PartialEq)]
pub struct Load {
    /// Latency assumed of a new replica.
    pub default_rtt: Duration,
    /// Time constant of the decay.
    pub decay: Duration,
    /// Counts failures as load.
    pub penalty: Option<Penalty>,
}

/// The penalty variant of the load metric.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Penalty {
    /// Latency that a failure counts as, at the least.
    pub penalty: Duration,
    /// Bound on hints from `retry-after` and `grpc-retry-pushback-ms`.
    pub max_retry_after: Duration,
}

/// When an endpoint is taken out, and how it comes back (behaviour.md D.10).
#[derive(Clone, Debug, Default, PartialEq)]
pub enum Breaker {
    /// Never.
    #[default]
    None,
    /// After failures in a row.
    Consecutive {
        /// How many; 0 = never.
        max_failures: u32,
        /// Time out of service, before a probe.
        backoff: Backoff,
    },
    /// After failures in a row, or below a success rate.
    Unified {
        /// Failures in a row; 0 disables this dimension.
        max_consecutive_failures: u32,
        /// Success rate 0..=1 below which the breaker opens; 0 disables this dimension.
        success_rate: f64,
        /// Length of the window.
        window: Duration,
        /// Responses that a window needs before its rate counts.
        min_requests: u32,
        /// Time out of service, before a probe.
        backoff: Backoff,
        /// Whether `retry-after` lengthens the time out of service.
        respect_retry_after: bool,
    },
}

/// Exponential backoff with jitter: `min * 2^n` up to `max`, plus up to `jitter` times that, never above `max`.
#[derive(Copy, Clone, Debug, PartialEq)]
pub struct Backoff {
    /// First wait.
    pub min: Duration,
    /// Longest wait.
    pub max: Duration,
    /// 0..=100.
    pub jitter: f64,
}

/// Limits in time; none = no limit (behaviour.md D.12).
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq)]
pub struct Timeouts {
    /// From entering the route to the end of the response, over all attempts.
    pub request: Option<Duration>,
    /// Each attempt, from its dispatch to the end of its response (Gateway API `backendRequest`).
    pub backend_request: Option<Duration>,
    /// Each attempt, from the end of the request to the end of the response.
    pub response: Option<Duration>,
    /// No frame in either direction.
    pub idle: Option<Duration>,
}

/// Further attempts (behaviour.md D.11).
#[derive(Clone, Debug, PartialEq)]
pub struct Retry {
    /// How many beyond the first.
    pub max_retries: u16,
    /// Bytes of request body kept for another attempt; a longer body is not retried.
    pub max_request_bytes: usize,
    /// HTTP statuses that are retried.
    pub statuses: Vec<RangeInclusive<u16>>,
    /// gRPC codes that are retried.
    pub grpc_codes: Vec<u16>,
    /// Wait for response headers per attempt, lifted on the last.
    pub timeout: Option<Duration>,
    /// Wait between attempts.
    pub backoff: Option<Backoff>,
    /// Whether connection errors and `backend_request` timeouts are retried (Gateway API, GEP-1731).
    pub connection_errors: bool,
    /// Share of requests that may be retries, over all rules that hold the same budget.
    pub budget: Option<Budget>,
}

/// Retry budget.
#[derive(Copy, Clone, Debug, PartialEq)]
pub struct Budget {
    /// Retries per request.
    pub ratio: f64,
    /// Retries per second that are always allowed.
    pub min_per_second: u32,
    /// Window.
    pub ttl: Duration,
}

/// Sticky sessions (GEP-1619).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Session {
    /// Cookie or header that carries the token.
    pub token: SessionToken,
    /// The session ends after this.
    pub absolute_timeout: Option<Duration>,
}

/// Where a session token travels.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SessionToken {
    /// A cookie.
    Cookie {
        /// Name.
        name: Arc<str>,
        /// `Path` attribute.
        path: Arc<str>,
        /// Whether it carries `Max-Age` (lifetimeType Permanent).
        permanent: bool,
    },
    /// A header.
    Header(http::HeaderName),
}

/// Opaque connections.
#[derive(Clone, Debug, PartialEq)]
pub struct Opaque {
    /// The route; none = connections fail.
    pub route: Option<TcpRoute>,
}

/// TLS connections, by SNI.
#[derive(Clone, Debug, PartialEq)]
pub struct Tls {
    /// Routes with the names they are for; an empty list of names = any.
    pub routes: Arc<[(Vec<HostMatch>, TcpRoute)]>,
}

/// A route for connections.
#[derive(Clone, Debug, PartialEq)]
pub struct TcpRoute {
    /// The route resource.
    pub meta: Meta,
    /// Set if connections are refused.
    pub refuse: Option<Refuse>,
    /// Where connections go.
    pub backends: Distribution<Refuse>,
}

/// Why connections are refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refuse {
    /// Policy forbids the destination.
    Forbidden,
    /// The configuration can't be served.
    Invalid(Arc<str>),
}

/// A ServiceProfile that is in force: it has routes or overrides (behaviour.md D.3).
#[derive(Clone, Debug, PartialEq)]
pub struct Profile {
    /// `host:port` of the service.
    pub addr: Arc<str>,
    /// First match wins; none = the implicit catch-all.
    pub routes: Vec<ProfileRoute>,
    /// Retries over all routes.
    pub budget: Option<Budget>,
    /// Where requests go, by weight; never empty.
    pub targets: Arc<[(Backend, u32)]>,
}

/// A ServiceProfile's route.
#[derive(Clone, Debug, PartialEq)]
pub struct ProfileRoute {
    /// Which requests.
    pub condition: RequestCondition,
    /// First match judges a response.
    pub classes: Vec<(ResponseCondition, bool)>,
    /// Metric labels, printed with the prefix `rt_`.
    pub labels: BTreeMap<Arc<str>, Arc<str>>,
    /// Whether failures are retried within the budget.
    pub retryable: bool,
    /// Request to response headers, over all attempts.
    pub timeout: Option<Duration>,
}

/// Condition on a request.
#[derive(Clone, Debug)]
pub enum RequestCondition {
    /// Every part.
    All(Vec<RequestCondition>),
    /// Some part.
    Any(Vec<RequestCondition>),
    /// The opposite.
    Not(Box<RequestCondition>),
    /// The whole path.
    Path(Regex),
    /// The method.
    Method(http::Method),
}

/// Condition on a response.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ResponseCondition {
    /// Every part.
    All(Vec<ResponseCondition>),
    /// Some part.
    Any(Vec<ResponseCondition>),
    /// The opposite.
    Not(Box<ResponseCondition>),
    /// The status.
    Status(RangeInclusive<u16>),
}

impl PartialEq for RequestCondition {
    fn eq(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::All(a), Self::All(b)) | (Self::Any(a), Self::Any(b)) => a == b,
            (Self::Not(a), Self::Not(b)) => a == b,
            (Self::Path(a), Self::Path(b)) => a.as_str() == b.as_str(),
            (Self::Method(a), Self::Method(b)) => a == b,
            _ => false,
        }
    }
}

impl Default for Load {
    /// 30 ms and 10 s: what the control plane sends (behaviour.md D.7).
    fn default() -> Self {
        Self { default_rtt: Duration::from_millis(30), decay: Duration::from_secs(10), penalty: None }
    }
}

impl ClientPolicy {
    /// A destination of which nothing is known: detect HTTP and forward to where the client meant to go.
    pub fn forward(name: &'static str, endpoint: Endpoint, detect_timeout: Duration) -> Self {
        let meta = Meta::default(name);
        let backend = Backend { meta: Meta::default("unknown"), dispatcher: Dispatcher::Forward(endpoint) };
        let http = Http {
            routes: Routes::Http(
                Arc::new([Route {
                    meta: meta.clone(),
                    hosts: Vec::new(),
                    rules: vec![Rule::to(Distribution::FirstAvailable(Arc::new([RouteBackend {
                        filters: Vec::new(),
                        backend: backend.clone(),
                    }])))],
                }]),
                Precedence::Linkerd,
            ),
            breaker: Breaker::None,
        };
        let opaque = Opaque {
            route: Some(TcpRoute {
                meta: meta.clone(),
                refuse: None,
                backends: Distribution::FirstAvailable(Arc::new([RouteBackend { filters: Vec::new(), backend }])),
            }),
        };
        Self {
            parent: meta,
            protocol: Protocol::Detect { timeout: detect_timeout, http1: http.clone(), http2: http, opaque },
            logical: None,
            rate_limit: None,
        }
    }
}

impl Rule {
    /// A rule that takes everything and only chooses a backend.
    pub fn to(backends: Distribution<Filter>) -> Self {
        Self {
            matches: Vec::new(),
            filters: Vec::new(),
            backends,
            timeouts: Timeouts::default(),
            retry: None,
            allow_l5d_headers: false,
            session: None,
        }
    }
}
