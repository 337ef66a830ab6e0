//! From Servers, authorizations, routes and rate limits to the policy of a local port (resources.md 4.5).

use super::{
    Mesh,
    annotations::{OPAQUE_PORTS, Pairs, Ports},
    index::View,
    manifest::{
        AuthorizationTarget, Identities, Key, Kind, POLICY, ParentKind, Principal, ProxyProtocol, RateLimitTarget,
        Requirement, Route as Manifest, RouteKind, Rule as ManifestRule, Server, ServerRef, Subjects, default_policy,
    },
    routes,
    workload::{Workload, WorkloadKind},
};
use crate::{
    config::DefaultPolicy,
    policy::{
        Authentication, Authorization, Meta, Network, ServerPolicy,
        authz::Suffix,
        route::{HttpMatch, PathMatch, Precedence, RouteMatch},
        server::{Protocol, RateLimit, RateLimitOverride, Route, Rule},
    },
};
use ipnet::IpNet;
use linkerd_tls::Id;
use std::{collections::BTreeSet, sync::Arc};

/// The policy of a port of the local workload.
pub(super) fn policy(view: &View<'_>, mesh: &Mesh, workload: &Workload, port: u16) -> ServerPolicy {
    let judge = Judge { view, mesh, workload, port };
    match judge.server() {
        Some(server) => judge.of_server(server),
        None => judge.by_default(),
    }
}

/// The Server of a port: the oldest that selects the workload and names the port.
fn server<'a>(
    view: &View<'a>,
    namespace: &Arc<str>,
    kind: WorkloadKind,
    labels: &Pairs,
    port: u16,
    port_name: Option<&str>,
) -> Option<&'a Server> {
    view.servers(namespace).into_iter().find(|s| {
        let selected = match (&s.subjects, kind) {
            (Subjects::Pods(selector), WorkloadKind::Pod) | (Subjects::Workloads(selector), WorkloadKind::External) => {
                selector.matches(labels)
            }
            _ => false,
        };
        selected && s.port.is(port, port_name)
    })
}

/// Whether a Server makes a port of a workload opaque. Clients must know: its proxy does not look for TLS there.
pub(super) fn is_opaque(
    view: &View<'_>,
    namespace: &Arc<str>,
    kind: WorkloadKind,
    labels: &Pairs,
    port: u16,
    port_name: Option<&str>,
) -> bool {
    server(view, namespace, kind, labels, port, port_name).is_some_and(|s| s.protocol == ProxyProtocol::Opaque)
}

struct Judge<'v, 'a> {
    view: &'v View<'a>,
    mesh: &'v Mesh,
    workload: &'v Workload,
    port: u16,
}

impl<'a> Judge<'_, 'a> {
    fn port_name(&self) -> Option<&str> {
        self.workload.ports.iter().find(|p| p.0 == self.port)?.1.as_deref()
    }

    fn server(&self) -> Option<&'a Server> {
        let Workload { namespace, kind, labels, .. } = self.workload;
        server(self.view, namespace, *kind, labels, self.port, self.port_name())
    }

    fn ports(&self, key: &str) -> Option<Ports> {
        Ports::parse(self.workload.annotations.get(key)?).ok()
    }

    fn by_default(&self) -> ServerPolicy {
        let annotated = self.workload.annotations.get("config.linkerd.io/default-inbound-policy");
        // A policy that can't be read closes the port rather than opening it.
        let mut policy =
            annotated.map_or(self.mesh.settings.default_policy, |t| default_policy(t).unwrap_or(DefaultPolicy::Deny));
        let required = self.ports("config.linkerd.io/proxy-require-identity-inbound-ports");
        if required.is_some_and(|p| p.contains(self.port, self.port_name())) {
            policy = match policy {
                DefaultPolicy::AllUnauthenticated | DefaultPolicy::Audit => DefaultPolicy::AllAuthenticated,
                DefaultPolicy::ClusterUnauthenticated => DefaultPolicy::ClusterAuthenticated,
                other => other,
            };
        }
        let mut authorizations: Vec<_> = default_authorization(self.mesh, policy).into_iter().collect();
        authorizations.push(localhost());
        let opaque = match self.ports(OPAQUE_PORTS) {
            Some(ports) => ports.contains(self.port, self.port_name()),
            None => self.mesh.settings.opaque_ports.contains(&self.port),
        };
        let protocol = if opaque {
            Protocol::Opaque(authorizations.into())
        } else {
            Protocol::Detect {
                timeout: self.mesh.settings.inbound_detect_timeout,
                http: self.implicit(&authorizations),
                tcp: authorizations.into(),
            }
        };
        ServerPolicy {
            protocol,
            precedence: Precedence::Linkerd,
            meta: Meta::default(policy.as_str()),
            rate_limit: None,
        }
    }

    fn of_server(&self, server: &Server) -> ServerPolicy {
        let mut authorizations = self.server_authorizations(server);
        authorizations.extend(self.target_authorizations(&AuthorizationTarget::Server(server.head.name.clone())));
        authorizations.extend(self.target_authorizations(&AuthorizationTarget::Namespace));
        authorizations.extend(default_authorization(self.mesh, server.access));
        authorizations.push(localhost());
        let http = |kinds: &[RouteKind]| self.routes(server, kinds, &authorizations);
        let tcp = || -> Arc<[Authorization]> { authorizations.clone().into() };
        let protocol = match server.protocol {
            ProxyProtocol::Unknown => Protocol::Detect {
                timeout: self.mesh.settings.inbound_detect_timeout,
                http: http(&[RouteKind::Http, RouteKind::Grpc]),
                tcp: tcp(),
            },
            ProxyProtocol::Http1 => Protocol::Http1(http(&[RouteKind::Http])),
            ProxyProtocol::Http2 => Protocol::Http2(http(&[RouteKind::Http, RouteKind::Grpc])),
            ProxyProtocol::Grpc => Protocol::Grpc(http(&[RouteKind::Grpc])),
            ProxyProtocol::Opaque => Protocol::Opaque(tcp()),
            ProxyProtocol::Tls => Protocol::Tls(tcp()),
        };
        ServerPolicy {
            protocol,
            precedence: self.precedence(server),
            meta: Meta::resource(POLICY, "server", "", &server.head.name, None),
            rate_limit: rate_limit(self.view, self.mesh, &server.head.namespace, |t| {
                *t == RateLimitTarget::Server(server.head.name.clone())
            }),
        }
    }

    /// Without routes: everything, and the probes of the port without authentication.
    fn implicit(&self, authorizations: &[Authorization]) -> Arc<[Route]> {
        let mut routes = vec![Route::implicit(authorizations.to_vec())];
        if let Some(paths) = self.workload.probes.get(&self.port) {
            let probe = |path: &Arc<str>| {
                RouteMatch::Http(HttpMatch {
                    path: Some(PathMatch::Exact(path.clone())),
                    method: Some(http::Method::GET),
                    ..HttpMatch::default()
                })
            };
            let mut allowed = vec![Authorization {
                networks: self.mesh.settings.probe_networks.iter().map(|n| Network::new(*n)).collect(),
                authentication: Authentication::Unauthenticated,
                meta: Meta::default("probe"),
                audit: false,
            }];
            allowed.extend_from_slice(authorizations);
            routes.push(Route {
                meta: Meta::default("probe"),
                hosts: Vec::new(),
                authorizations: allowed,
                rules: vec![Rule { matches: paths.iter().map(probe).collect(), filters: Vec::new() }],
            });
        }
        routes.into()
    }

    /// One Gateway API route makes its order that of all routes on the Server, as it does on Services.
    fn precedence(&self, server: &Server) -> Precedence {
        let head = &server.head;
        let attached = self.view.routes(ParentKind::Server, &head.namespace, &head.name);
        match attached.iter().any(|(key, route)| route.gateway && key.namespace == head.namespace) {
            true => Precedence::GatewayApi,
            false => Precedence::Linkerd,
        }
    }

    /// The routes on the Server, in order of age. GRPCRoutes count wherever HTTP/2 may arrive.
    fn routes(&self, server: &Server, kinds: &[RouteKind], authorizations: &[Authorization]) -> Arc<[Route]> {
        let head = &server.head;
        let attached: Vec<_> = self
            .view
            .routes(ParentKind::Server, &head.namespace, &head.name)
            .into_iter()
            .filter(|(key, route)| kinds.contains(&route.kind) && key.namespace == head.namespace)
            .collect();
        if attached.is_empty() {
            return self.implicit(authorizations);
        }
        attached.into_iter().map(|(key, route)| self.route(key, route, authorizations)).collect()
    }

    fn route(&self, key: &Key, route: &Manifest, authorizations: &[Authorization]) -> Route {
        let mut allowed = self.target_authorizations(&AuthorizationTarget::Route(key.kind, key.name.clone()));
        allowed.extend_from_slice(authorizations);
        let rule = |r: &ManifestRule| Rule {
            matches: r.matches.clone(),
            filters: r.filters.iter().map(routes::inbound_filter).collect(),
        };
        Route {
            meta: Meta::resource(key.kind.group(), key.kind.name(), "", &key.name, None),
            hosts: route.hosts.clone(),
            authorizations: allowed,
            rules: route.rules.iter().map(rule).collect(),
        }
    }

    fn server_authorizations(&self, server: &Server) -> Vec<Authorization> {
        let list = self.view.server_authorizations(&server.head.namespace);
        list.into_iter()
            .filter(|a| match &a.server {
                ServerRef::Name(name) => *name == server.head.name,
                ServerRef::Selector(selector) => selector.matches(&server.head.labels),
            })
            .map(|a| Authorization {
                networks: a.networks.clone().unwrap_or_else(Network::all),
                authentication: match &a.client {
                    Principal::Anybody => Authentication::Unauthenticated,
                    Principal::AnyTls => Authentication::TlsUnauthenticated,
                    Principal::Identities(ids) => authenticated(self.mesh, ids),
                },
                meta: Meta::resource(POLICY, "serverauthorization", "", &a.head.name, None),
                audit: false,
            })
            .collect()
    }

    fn target_authorizations(&self, target: &AuthorizationTarget) -> Vec<Authorization> {
        let list = self.view.authorization_policies(&self.workload.namespace);
        list.into_iter()
            .filter(|p| p.target == *target)
            .filter_map(|p| {
                let (mut networks, mut authentication) = (Network::all(), Authentication::Unauthenticated);
                for requirement in &p.requires {
                    // A policy with a reference to nothing grants nothing.
                    match requirement {
                        Requirement::Network { namespace, name } => {
                            networks = self.view.network_auth(&"".into(), namespace, name)?.networks.clone();
                        }
                        Requirement::MeshTls { namespace, name } => {
                            let auth = self.view.mesh_tls(&"".into(), namespace, name)?;
                            authentication = authenticated(self.mesh, &auth.identities);
                        }
                        Requirement::Account { namespace, name } => {
                            let accounts = vec![(namespace.clone(), name.clone())];
                            authentication =
                                authenticated(self.mesh, &Identities { accounts, ..Identities::default() });
                        }
                    }
                }
                let meta = Meta::resource(POLICY, "authorizationpolicy", "", &p.head.name, None);
                Some(Authorization { networks, authentication, meta, audit: false })
            })
            .collect()
    }
}

/// Turns accounts and namespaces into identities of the trust domain.
fn authenticated(mesh: &Mesh, ids: &Identities) -> Authentication {
    let local: Arc<str> = "".into();
    let mut identities: BTreeSet<Id> = ids.exact.iter().cloned().collect();
    identities.extend(ids.accounts.iter().filter_map(|(ns, name)| mesh.identity(&local, ns, name).ok()));
    let mut suffixes = ids.suffixes.clone();
    for namespace in &ids.namespaces {
        let tail = mesh.identity_suffix(&local);
        suffixes.push(Suffix::new([&**namespace, "serviceaccount", "identity"].into_iter().chain(tail.split('.'))));
    }
    Authentication::TlsAuthenticated { identities, suffixes }
}

/// What a default policy grants; nothing for `deny`.
fn default_authorization(mesh: &Mesh, policy: DefaultPolicy) -> Option<Authorization> {
    let cluster = || mesh.settings.cluster_networks.iter().map(|n| Network::new(*n)).collect();
    let (networks, authentication) = match policy {
        DefaultPolicy::Deny => return None,
        DefaultPolicy::AllAuthenticated => (Network::all(), Authentication::any_identity()),
        DefaultPolicy::AllUnauthenticated | DefaultPolicy::Audit => (Network::all(), Authentication::Unauthenticated),
        DefaultPolicy::ClusterAuthenticated => (cluster(), Authentication::any_identity()),
        DefaultPolicy::ClusterUnauthenticated => (cluster(), Authentication::Unauthenticated),
    };
    let audit = policy == DefaultPolicy::Audit;
    Some(Authorization { networks, authentication, meta: Meta::default(policy.as_str()), audit })
}

/// The workload itself may always call itself (behaviour.md C.2).
fn localhost() -> Authorization {
    use std::net::{Ipv4Addr, Ipv6Addr};
    let nets: [IpNet; 2] =
        [IpNet::from(std::net::IpAddr::from(Ipv4Addr::LOCALHOST)), std::net::IpAddr::from(Ipv6Addr::LOCALHOST).into()];
    Authorization {
        networks: nets.into_iter().map(Network::new).collect(),
        authentication: Authentication::Unauthenticated,
        meta: Meta::default("localhost"),
        audit: false,
    }
}

/// The rate limit on a target: the oldest.
pub(super) fn rate_limit(
    view: &View<'_>,
    mesh: &Mesh,
    namespace: &Arc<str>,
    is_target: impl Fn(&RateLimitTarget) -> bool,
) -> Option<Arc<RateLimit>> {
    let limit = view.rate_limits(namespace).into_iter().find(|l| is_target(&l.target))?;
    let local: Arc<str> = "".into();
    let overrides = limit.overrides.iter().map(|(rate, accounts)| RateLimitOverride {
        requests_per_second: *rate,
        identities: accounts.iter().filter_map(|(ns, name)| mesh.identity(&local, ns, name).ok()).collect(),
    });
    Some(Arc::new(RateLimit {
        meta: Some(Meta::resource(POLICY, Kind::HttpLocalRateLimitPolicy.name(), "", &limit.head.name, None)),
        total: limit.total,
        identity: limit.identity,
        overrides: overrides.collect(),
    }))
}
