//! What a local port demands of those who connect to it.

use super::{
    Meta,
    authz::Authorization,
    route::{HostMatch, Precedence, RouteMatch},
};
use linkerd_tls::Id;
use std::{collections::BTreeSet, sync::Arc, time::Duration};

/// The policy of one local port.
#[derive(Clone, Debug, PartialEq)]
pub struct ServerPolicy {
    /// How to speak on the port, and who may.
    pub protocol: Protocol,
    /// Which of the routes wins when several match a request.
    pub precedence: Precedence,
    /// The Server, or the default policy, that says so.
    pub meta: Meta,
    /// Limits on HTTP requests.
    pub rate_limit: Option<Arc<RateLimit>>,
}

/// How a port is spoken to.
#[derive(Clone, Debug, PartialEq)]
pub enum Protocol {
    /// HTTP if the first bytes say so, else opaque.
    Detect {
        /// Longest wait for the first bytes, inside mesh TLS.
        timeout: Duration,
        /// For HTTP connections.
        http: Arc<[Route]>,
        /// For everything else.
        tcp: Arc<[Authorization]>,
    },
    /// HTTP/1.
    Http1(Arc<[Route]>),
    /// HTTP/2.
    Http2(Arc<[Route]>),
    /// gRPC over HTTP/2.
    Grpc(Arc<[Route]>),
    /// Bytes; TLS is not looked for.
    Opaque(Arc<[Authorization]>),
    /// The application's own TLS, passed on; mesh TLS around it is terminated.
    Tls(Arc<[Authorization]>),
    /// The source sent something that could not be understood. Requests get 403, or 500 with this text once
    /// authorized; opaque connections are closed.
    Invalid(Arc<str>),
}

/// One inbound route with its authorizations, the server's included, in order of evaluation.
#[derive(Clone, Debug, PartialEq)]
pub struct Route {
    /// The route resource.
    pub meta: Meta,
    /// Hosts it is for; empty = any.
    pub hosts: Vec<HostMatch>,
    /// Who may use it; the first that permits wins.
    pub authorizations: Vec<Authorization>,
    /// Alternatives; a request takes the best match over all rules of all routes.
    pub rules: Vec<Rule>,
}

/// Matches and what is done with a request that fits one.
#[derive(Clone, Debug, PartialEq)]
pub struct Rule {
    /// Alternatives; empty = everything.
    pub matches: Vec<RouteMatch>,
    /// Applied in order after authorization.
    pub filters: Vec<super::route::Filter>,
}

/// Local limits on the requests to a port (behaviour.md C.9).
#[derive(Clone, Debug, PartialEq)]
pub struct RateLimit {
    /// The policy resource, if the source told.
    pub meta: Option<Meta>,
    /// Requests per second over all clients; also the burst.
    pub total: Option<u32>,
    /// Requests per second of each client identity; clients without one share a bucket.
    pub identity: Option<u32>,
    /// Buckets of their own for named clients.
    pub overrides: Vec<RateLimitOverride>,
}

/// A bucket that the named clients share, instead of one each.
#[derive(Clone, Debug, PartialEq)]
pub struct RateLimitOverride {
    /// Requests per second; also the burst.
    pub requests_per_second: u32,
    /// The clients.
    pub identities: BTreeSet<Id>,
}

impl Route {
    /// The route that stands for "no routes": it takes every request.
    pub fn implicit(authorizations: Vec<Authorization>) -> Self {
        Self {
            meta: Meta::default("default"),
            hosts: Vec::new(),
            authorizations,
            rules: vec![Rule { matches: Vec::new(), filters: Vec::new() }],
        }
    }
}
