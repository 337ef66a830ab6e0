//! Policies of local ports, followed while they are used, and prepared once per value so that a request only reads.
//!
//! A port is watched from its first connection until it was idle for the configured time; the ports named in the
//! configuration are watched from the start and never forgotten (contract.md 1.3).

use super::{limits::Limits, readings};
use crate::policy::{
    Authorization, ServerPolicy, Source,
    authz::ClientTls,
    server::{Protocol, Route},
};
use arc_swap::{ArcSwap, Guard};
use linkerd_stack::cache::{Cache, Cached};
use std::{net::IpAddr, sync::Arc, time::Duration};
use tokio::{sync::watch, task::AbortHandle};

/// Ports whose policies are kept, so that a scan of all ports does not watch all of them for long.
const MAX_PORTS: usize = 4096;

/// The ports of this workload.
pub struct Ports {
    source: Arc<dyn Source>,
    cache: Cache<u16, Port>,
    /// Held so that they are never forgotten.
    _pinned: Vec<PortRef>,
}

/// A port in use. While one of these lives, the policy is followed.
pub type PortRef = Cached<Port>;

/// A local port and its policy in force.
pub struct Port {
    number: u16,
    changes: watch::Receiver<Arc<ServerPolicy>>,
    prepared: Arc<ArcSwap<Prepared>>,
    follow: AbortHandle,
}

/// A policy, ready for use.
pub struct Prepared {
    /// As the source gave it.
    pub policy: Arc<ServerPolicy>,
    /// Its rate limits; fresh ones only when the limits themselves changed.
    pub limits: Option<Arc<Limits>>,
    /// The routes, for paths that can be read in several ways; none if no path matters.
    pub(super) readings: Option<Arc<[Route]>>,
}

/// What HTTP requests to a port meet.
pub enum HttpRoutes<'a> {
    /// Routes; requests that match none are answered 404.
    Routes(&'a [Route]),
    /// The policy could not be understood.
    Invalid(&'a Arc<str>),
}

impl Ports {
    /// `pinned` are watched at once and for good, the others for `idle` after their last use.
    pub fn new(source: Arc<dyn Source>, idle: Duration, pinned: impl IntoIterator<Item = u16>) -> Self {
        let cache = Cache::new(idle, MAX_PORTS);
        let pinned =
            pinned.into_iter().map(|port| cache.get_or_insert_with(port, |_| follow(&*source, port))).collect();
        Self { cache, _pinned: pinned, source }
    }

    /// The port's policy; there is a value at once.
    pub fn get(&self, port: u16) -> PortRef {
        self.cache.get_or_insert_with(port, |_| follow(&*self.source, port))
    }
}

impl Ports {
    /// The ports in use and their policies, by number.
    pub(super) fn status(&self) -> serde_json::Value {
        let mut entries = self.cache.entries();
        entries.sort_by_key(|(number, _)| *number);
        entries.iter().map(|(number, port)| port_status(*number, &port.current().policy)).collect()
    }
}

fn port_status(number: u16, policy: &ServerPolicy) -> serde_json::Value {
    let authorizations = |list: &[Authorization]| -> serde_json::Value {
        list.iter().map(|authorization| authorization.meta.to_string()).collect()
    };
    let routes = |list: &[Route]| -> serde_json::Value {
        let route = |route: &Route| {
            serde_json::json!({
                "route": route.meta.to_string(),
                "authorizations": authorizations(&route.authorizations),
            })
        };
        list.iter().map(route).collect()
    };
    let (protocol, detail) = match &policy.protocol {
        Protocol::Detect { http, tcp, .. } => {
            ("detect", serde_json::json!({ "routes": routes(http), "authorizations": authorizations(tcp) }))
        }
        Protocol::Http1(http) => ("http/1", serde_json::json!({ "routes": routes(http) })),
        Protocol::Http2(http) => ("http/2", serde_json::json!({ "routes": routes(http) })),
        Protocol::Grpc(http) => ("grpc", serde_json::json!({ "routes": routes(http) })),
        Protocol::Opaque(tcp) => ("opaque", serde_json::json!({ "authorizations": authorizations(tcp) })),
        Protocol::Tls(tcp) => ("tls", serde_json::json!({ "authorizations": authorizations(tcp) })),
        Protocol::Invalid(reason) => ("invalid", serde_json::json!({ "reason": **reason })),
    };
    serde_json::json!({
        "port": number,
        "server": policy.meta.to_string(),
        "protocol": protocol,
        "policy": detail,
        "rate_limit": policy.rate_limit.as_ref().map(|limit| serde_json::json!({
            "total": limit.total,
            "identity": limit.identity,
            "overrides": limit.overrides.len(),
        })),
    })
}

/// Watches a port in a task that ends with the port.
fn follow(source: &dyn Source, number: u16) -> Port {
    let changes = source.watch_server(number);
    let mut rx = changes.clone();
    let first = rx.borrow_and_update().clone();
    let prepared = Arc::new(ArcSwap::from_pointee(Prepared::new(first, None)));
    let task = tokio::spawn({
        let prepared = prepared.clone();
        async move {
            // Ends when the source is gone; the last value stays in force.
            while rx.changed().await.is_ok() {
                let policy = rx.borrow_and_update().clone();
                let previous = prepared.load_full();
                if !Arc::ptr_eq(&previous.policy, &policy) {
                    tracing::debug!(port = number, server = %policy.meta, "policy changed");
                    prepared.store(Arc::new(Prepared::new(policy, Some(&previous))));
                }
            }
        }
    });
    Port { number, changes, prepared, follow: task.abort_handle() }
}

impl Port {
    /// Its number.
    pub fn number(&self) -> u16 {
        self.number
    }

    /// The policy in force. No lock is taken.
    pub fn current(&self) -> Guard<Arc<Prepared>> {
        self.prepared.load()
    }

    /// For those who wait for changes.
    pub fn changes(&self) -> watch::Receiver<Arc<ServerPolicy>> {
        self.changes.clone()
    }
}

impl Drop for Port {
    fn drop(&mut self) {
        self.follow.abort();
    }
}

impl Prepared {
    fn new(policy: Arc<ServerPolicy>, previous: Option<&Prepared>) -> Self {
        let kept = previous.and_then(|previous| previous.limits.clone());
        let limits = policy.rate_limit.as_ref().map(|wanted| match kept {
            Some(kept) if *kept.policy() == **wanted => kept,
            _ => Arc::new(Limits::new(wanted.clone())),
        });
        let readings = match http(&policy) {
            HttpRoutes::Routes(routes) => readings::routes(routes),
            HttpRoutes::Invalid(_) => None,
        };
        Self { policy, limits, readings }
    }
}

/// Authorizations of connections that are not HTTP; none where the policy speaks only of HTTP.
pub fn tcp(policy: &ServerPolicy) -> &[Authorization] {
    match &policy.protocol {
        Protocol::Detect { tcp, .. } => tcp,
        Protocol::Opaque(authorizations) | Protocol::Tls(authorizations) => authorizations,
        Protocol::Http1(_) | Protocol::Http2(_) | Protocol::Grpc(_) | Protocol::Invalid(_) => &[],
    }
}

/// What HTTP requests meet under this policy, whatever the version (behaviour.md C.6).
pub fn http(policy: &ServerPolicy) -> HttpRoutes<'_> {
    match &policy.protocol {
        Protocol::Detect { http: routes, .. }
        | Protocol::Http1(routes)
        | Protocol::Http2(routes)
        | Protocol::Grpc(routes) => HttpRoutes::Routes(routes),
        Protocol::Opaque(_) | Protocol::Tls(_) => HttpRoutes::Routes(&[]),
        Protocol::Invalid(reason) => HttpRoutes::Invalid(reason),
    }
}

/// The authorization that lets a client connect without HTTP, if any.
pub fn permit_tcp<'a>(policy: &'a ServerPolicy, client: IpAddr, tls: &ClientTls) -> Option<&'a Authorization> {
    tcp(policy).iter().find(|authorization| authorization.permits(client, tls))
}

/// Whether the policy could refuse or change an HTTP request of a client that may connect opaquely. If not, taking a
/// silent connection as opaque relaxes nothing.
pub fn depends_on_http(policy: &ServerPolicy, client: IpAddr, tls: &ClientTls) -> bool {
    let Protocol::Detect { http, .. } = &policy.protocol else {
        return !matches!(policy.protocol, Protocol::Opaque(_) | Protocol::Tls(_));
    };
    let takes_all = |route: &Route| route.hosts.is_empty() && route.rules.iter().any(|rule| rule.matches.is_empty());
    let untouched = |route: &Route| {
        route.rules.iter().all(|rule| rule.filters.is_empty())
            && route.authorizations.iter().any(|authorization| authorization.permits(client, tls))
    };
    policy.rate_limit.is_some() || !http.iter().all(untouched) || !http.iter().any(takes_all)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::policy::{
        Authentication, ClientPolicy, DiscoveryError, Meta, Network, Resolution, Target,
        authz::NoTls,
        client::Profile,
        route::Precedence,
        server::{RateLimit, Rule},
    };
    use futures_util::future::BoxFuture;
    use parking_lot::Mutex;
    use std::collections::HashMap;

    /// A source of server policies that a test sets.
    #[derive(Default)]
    pub(crate) struct Fixed {
        ports: Mutex<HashMap<u16, watch::Sender<Arc<ServerPolicy>>>>,
        pub(crate) watched: Mutex<Vec<u16>>,
        pub(crate) profiles: Mutex<HashMap<String, watch::Sender<Option<Arc<Profile>>>>>,
    }

    impl Fixed {
        pub(crate) fn set(&self, port: u16, policy: ServerPolicy) {
            let policy = Arc::new(policy);
            let mut ports = self.ports.lock();
            match ports.get(&port) {
                Some(tx) => {
                    tx.send_replace(policy);
                }
                None => {
                    ports.insert(port, watch::Sender::new(policy));
                }
            }
        }

        pub(crate) fn watchers(&self, port: u16) -> usize {
            self.ports.lock()[&port].receiver_count()
        }
    }

    impl Source for Fixed {
        fn watch_server(&self, port: u16) -> watch::Receiver<Arc<ServerPolicy>> {
            self.watched.lock().push(port);
            self.ports.lock()[&port].subscribe()
        }

        fn watch_client(
            &self,
            target: Target,
        ) -> BoxFuture<'static, Result<watch::Receiver<Arc<ClientPolicy>>, DiscoveryError>> {
            panic!("inbound looked {target} up")
        }

        fn watch_service_profile(&self, name: &str, port: u16) -> Option<watch::Receiver<Option<Arc<Profile>>>> {
            Some(self.profiles.lock().get(&format!("{name}:{port}"))?.subscribe())
        }

        fn resolve(&self, discovery: &str) -> Resolution {
            panic!("inbound resolved {discovery}")
        }
    }

    pub(crate) fn anybody() -> Authorization {
        Authorization {
            networks: Network::all(),
            authentication: Authentication::Unauthenticated,
            meta: Meta::default("all-unauthenticated"),
            audit: false,
        }
    }

    pub(crate) fn meshed() -> Authorization {
        Authorization {
            authentication: Authentication::any_identity(),
            meta: Meta::default("all-authenticated"),
            ..anybody()
        }
    }

    /// Wait for first bytes in tests.
    pub(crate) const DETECT: Duration = Duration::from_millis(600);

    pub(crate) fn detect(authorizations: Vec<Authorization>) -> ServerPolicy {
        let routes = [Route::implicit(authorizations.clone())];
        server(Protocol::Detect { timeout: DETECT, http: Arc::new(routes), tcp: authorizations.into() })
    }

    pub(crate) fn server(protocol: Protocol) -> ServerPolicy {
        let meta = Meta::resource("policy.linkerd.io", "server", "ns", "srv", None);
        ServerPolicy { protocol, precedence: Precedence::Linkerd, meta, rate_limit: None }
    }

    pub(crate) const CLIENT: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 1, 0, 7));
    pub(crate) const PLAIN: ClientTls = ClientTls::None(NoTls::NoTlsFromRemote);

    #[tokio::test(start_paused = true)]
    async fn a_port_follows_its_policy_and_is_forgotten_when_idle() {
        let source = Arc::new(Fixed::default());
        for port in [80, 81] {
            source.set(port, detect(vec![anybody()]));
        }
        let idle = Duration::from_secs(90);
        let ports = Ports::new(source.clone(), idle, [81]);
        assert_eq!(*source.watched.lock(), [81]);
        let port = ports.get(80);
        assert!(permit_tcp(&port.current().policy, CLIENT, &PLAIN).is_some());
        source.set(80, detect(vec![]));
        tokio::time::sleep(Duration::from_millis(1)).await;
        assert!(permit_tcp(&port.current().policy, CLIENT, &PLAIN).is_none());
        drop(port);
        tokio::time::sleep(idle * 2).await;
        assert_eq!((source.watchers(80), source.watchers(81) > 0), (0, true));
    }

    #[tokio::test(start_paused = true)]
    async fn buckets_survive_changes_of_other_parts() {
        let source = Arc::new(Fixed::default());
        let limit = |rps| RateLimit { meta: None, total: Some(rps), identity: None, overrides: vec![] };
        let with = |rps, authz| ServerPolicy { rate_limit: Some(Arc::new(limit(rps))), ..detect(authz) };
        source.set(80, with(1, vec![anybody()]));
        let ports = Ports::new(source.clone(), Duration::from_secs(90), []);
        let port = ports.get(80);
        let limits = || port.current().limits.clone().unwrap();
        let first = limits();
        source.set(80, with(1, vec![]));
        tokio::time::sleep(Duration::from_millis(1)).await;
        assert!(Arc::ptr_eq(&first, &limits()));
        source.set(80, with(2, vec![]));
        tokio::time::sleep(Duration::from_millis(1)).await;
        assert!(!Arc::ptr_eq(&first, &limits()));
    }

    #[test]
    fn only_policies_without_conditions_on_http_are_independent_of_it() {
        let check = |policy: &ServerPolicy, expected: bool| {
            assert_eq!(depends_on_http(policy, CLIENT, &PLAIN), expected, "{policy:?}");
        };
        check(&detect(vec![anybody()]), false);
        check(&server(Protocol::Opaque(Arc::new([]))), false);
        check(&server(Protocol::Http1(Arc::new([]))), true);
        check(&detect(vec![meshed()]), true);
        let with = |route: Route| {
            server(Protocol::Detect {
                timeout: Duration::from_secs(10),
                http: Arc::new([Route::implicit(vec![anybody()]), route]),
                tcp: Arc::new([anybody()]),
            })
        };
        check(&with(Route::implicit(vec![anybody()])), false);
        check(&with(Route::implicit(vec![meshed()])), true);
        let filters = vec![crate::policy::route::Filter::Unknown { what: "x".into() }];
        let filtered = Rule { matches: vec![], filters };
        check(&with(Route { rules: vec![filtered], ..Route::implicit(vec![anybody()]) }), true);
    }
}
