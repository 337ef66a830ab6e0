//! What outbound is doing, for the operator's page: destinations in use, the policies in force, and the replicas behind
//! them with their load.

use super::{
    Outbound,
    concrete::{Concrete, Distribution, Unready},
    logical::HttpRoutes,
    rule::RuleBackend,
};
use crate::policy::client::Protocol;
use serde_json::{Value, json};
use std::collections::BTreeMap;

impl Outbound {
    /// A snapshot as JSON. It costs in proportion to what it shows; requests are not disturbed.
    pub fn status(&self) -> Value {
        let mut targets: Vec<_> = self.discover.targets();
        targets.sort_by_key(|(target, _)| target.to_string());
        let targets: Vec<Value> = targets
            .into_iter()
            .map(|(target, destination)| {
                let Some(destination) = destination else {
                    return json!({ "target": target.to_string(), "state": "discovering" });
                };
                let policy = destination.policy();
                let routes: Vec<Value> = destination
                    .made()
                    .map(|(version, routes)| json!({ "version": version.to_string(), "backends": backends(&routes) }))
                    .collect();
                json!({
                    "target": target.to_string(),
                    "state": "known",
                    "parent": policy.parent.to_string(),
                    "logical": policy.logical.as_deref(),
                    "protocol": protocol(&policy.protocol),
                    "http": routes,
                })
            })
            .collect();
        json!({ "targets": targets })
    }
}

fn protocol(protocol: &Protocol) -> &'static str {
    match protocol {
        Protocol::Detect { .. } => "detect",
        Protocol::Http1(_) => "http/1",
        Protocol::Http2(_) => "http/2",
        Protocol::Grpc(_) => "grpc",
        Protocol::Opaque(_) => "opaque",
        Protocol::Tls(_) => "tls",
        Protocol::Invalid(_) => "invalid",
    }
}

/// Backends by name; one that several rules share is shown once.
fn backends(routes: &HttpRoutes) -> BTreeMap<String, Value> {
    let distributions = routes.rules().map(|rule| &rule.backends);
    distributions.flat_map(Distribution::iter).map(|backend| (backend.context.to_string(), replicas(backend))).collect()
}

fn replicas(backend: &RuleBackend) -> Value {
    match &*backend.concrete {
        Concrete::Fail(failure) => json!({ "fails": &*failure.message, "status": failure.status.as_u16() }),
        Concrete::Replicas(replicas) => {
            let endpoints: Vec<Value> = replicas
                .balance
                .status()
                .into_iter()
                .map(|s| {
                    let state = match replicas.balance.get(&s.key).and_then(|replica| replica.unready()) {
                        None => "ready".to_string(),
                        Some(Unready::Ejected) => "shut by its circuit breaker".to_string(),
                        Some(Unready::Unconnected(None)) => "connecting".to_string(),
                        Some(Unready::Unconnected(Some(error))) => format!("not connected: {error}"),
                    };
                    json!({
                        "addr": s.key.to_string(),
                        "state": state,
                        "in_flight": s.in_flight,
                        "rtt_ms": s.rtt.as_secs_f64() * 1_000.0,
                        "weight": s.weight,
                    })
                })
                .collect();
            json!({ "open": replicas.is_open(), "endpoints": endpoints })
        }
    }
}
