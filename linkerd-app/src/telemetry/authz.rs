//! Who was let in: `inbound_*_authz_*`, missing routes and rate limits (metrics.md 5.8).
//!
//! These families are printed from a series' first event on and stay.

use super::{
    Telemetry,
    errors::{ErrorMetrics, InboundError},
    labels::ServerLabels,
    legacy::Family,
    metric::Counter,
    store::{Series, Store},
};
use crate::{error::RateLimitScope, policy::Meta};
use std::sync::{Arc, OnceLock};

/// The families of 5.8.
pub(super) struct Families {
    http_allow: Store<Counter>,
    http_deny: Store<Counter>,
    http_not_found: Store<Counter>,
    rate_limited: Store<Counter>,
    tcp_allow: Store<Counter>,
    tcp_deny: Store<Counter>,
    tcp_terminate: Store<Counter>,
}

impl Families {
    pub(super) fn new(limit: usize) -> Self {
        Self {
            http_allow: Store::new("inbound_http_authz_allow_total", limit),
            http_deny: Store::new("inbound_http_authz_deny_total", limit),
            http_not_found: Store::new("inbound_http_route_not_found_total", limit),
            rate_limited: Store::new("inbound_http_local_ratelimit_total", limit),
            tcp_allow: Store::new("inbound_tcp_authz_allow_total", limit),
            tcp_deny: Store::new("inbound_tcp_authz_deny_total", limit),
            tcp_terminate: Store::new("inbound_tcp_authz_terminate_total", limit),
        }
    }

    fn all(&self) -> [(&Store<Counter>, &'static str); 7] {
        [
            (&self.http_allow, "Requests authorized."),
            (&self.http_deny, "Requests with a route and no authorization."),
            (&self.http_not_found, "Requests that match no route."),
            (&self.rate_limited, "Requests refused by the local rate limit."),
            (&self.tcp_allow, "Connections authorized."),
            (&self.tcp_deny, "Connections without an authorization."),
            (&self.tcp_terminate, "Connections cut by a change of policy."),
        ]
    }

    pub(super) fn overflow(&self) -> impl Iterator<Item = (&'static str, Arc<Counter>)> {
        self.all().into_iter().map(|(store, _)| store.overflow())
    }

    pub(super) fn encode(&self, out: &mut String) {
        for (store, help) in self.all() {
            let series = store.snapshot();
            let mut family = Family::counter(out, store.name, help);
            for Series { text, metric, .. } in series.iter().filter(|s| s.metric.get() > 0) {
                family.value(text.into(), metric.get());
            }
        }
    }
}

/// An accepted inbound connection (or all of one client's to one port): its refusals, and handles per route and
/// authorization. Labels are written when first needed, so a plain accepted connection costs nothing here.
pub struct InboundServer {
    telemetry: Telemetry,
    labels: ServerLabels,
    not_found: OnceLock<Arc<Counter>>,
    tcp_deny: OnceLock<Arc<Counter>>,
    tcp_terminate: OnceLock<Arc<Counter>>,
    http_errors: OnceLock<Arc<ErrorMetrics<InboundError>>>,
    tcp_errors: OnceLock<Arc<ErrorMetrics<InboundError>>>,
}

impl InboundServer {
    pub(super) fn new(telemetry: Telemetry, labels: ServerLabels) -> Self {
        Self {
            telemetry,
            labels,
            not_found: OnceLock::new(),
            tcp_deny: OnceLock::new(),
            tcp_terminate: OnceLock::new(),
            http_errors: OnceLock::new(),
            tcp_errors: OnceLock::new(),
        }
    }

    fn families(&self) -> &Families {
        &self.telemetry.0.authz
    }

    fn plain(&self, store: &Store<Counter>) -> Arc<Counter> {
        store.get(self.labels.server().client_tls(&self.labels.tls), Counter::default)
    }

    /// Requests authorized on a route, before filters and rate limit.
    pub fn http_allow(&self, route: &Meta, authz: &Meta) -> Arc<Counter> {
        let labels = self.labels.server().route_in(route).authz(authz).client_tls(&self.labels.tls);
        self.families().http_allow.get(labels, Counter::default)
    }

    /// Requests with a route but no matching authorization.
    pub fn http_deny(&self, route: &Meta) -> Arc<Counter> {
        let labels = self.labels.server().route_in(route).client_tls(&self.labels.tls);
        self.families().http_deny.get(labels, Counter::default)
    }

    /// Requests matching no route.
    pub fn http_not_found(&self) -> &Counter {
        self.not_found.get_or_init(|| self.plain(&self.families().http_not_found))
    }

    /// Requests refused by a bucket of a limit. Overrides count as `identity` (metrics.md 3.2).
    pub fn rate_limited(&self, limit: Option<&Meta>, scope: RateLimitScope) -> Arc<Counter> {
        let mut labels = self.labels.server();
        if let Some(meta) = limit {
            labels = labels
                .push("ratelimit_group", meta.group())
                .push("ratelimit_kind", meta.kind())
                .push("ratelimit_name", meta.name());
        }
        let scope = match scope {
            RateLimitScope::Total => "total",
            RateLimitScope::Identity | RateLimitScope::Override => "identity",
        };
        let labels = labels.push("ratelimit_scope", scope).client_tls(&self.labels.tls);
        self.families().rate_limited.get(labels, Counter::default)
    }

    /// Opaque connections authorized.
    pub fn tcp_allow(&self, authz: &Meta) -> Arc<Counter> {
        let labels = self.labels.server().authz(authz).client_tls(&self.labels.tls);
        self.families().tcp_allow.get(labels, Counter::default)
    }

    /// Opaque connections refused.
    pub fn tcp_deny(&self) -> &Counter {
        self.tcp_deny.get_or_init(|| self.plain(&self.families().tcp_deny))
    }

    /// Open opaque connections cut by a change of policy.
    pub fn tcp_terminate(&self) -> &Counter {
        self.tcp_terminate.get_or_init(|| self.plain(&self.families().tcp_terminate))
    }

    /// Requests that the proxy failed; not for refusals and missing routes, which have their own families.
    pub fn http_errors(&self) -> &ErrorMetrics<InboundError> {
        self.http_errors
            .get_or_init(|| self.telemetry.0.inbound_http_errors.get(self.labels.server(), ErrorMetrics::default))
    }

    /// Accepted connections that the proxy failed.
    pub fn tcp_errors(&self) -> &ErrorMetrics<InboundError> {
        self.tcp_errors.get_or_init(|| self.telemetry.inbound_tcp_errors(self.labels.target))
    }
}
