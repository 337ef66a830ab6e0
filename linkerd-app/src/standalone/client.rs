//! From a destination to its policy: a Service's, an endpoint's, an EgressNetwork's, or plain forwarding (resources.md 3.2,
//! 4.1, 4.6; behaviour.md D.14).
//!
//! Where kinds of both groups stand on one Service they are merged, older first, and the Gateway API's precedence applies as
//! soon as one of its routes is among them. Consumer routes of the Gateway API replace the producer's; if all consumer
//! routes are Linkerd's own, both sets are merged.

use super::{
    Mesh,
    annotations::{OPAQUE_PORTS, Ports},
    endpoints::{Replicas, ServiceName, describe, discovery},
    index::View,
    manifest::{
        Egress, Key, ParentKind, PortRef, Profile as ProfileManifest, RateLimitTarget, Route as Manifest, RouteKind,
        Service, ServiceKind, ServicePort,
    },
    routes::{self, Parent, service_backend, service_meta, single},
    server::rate_limit,
};
use crate::policy::{
    ClientPolicy, Endpoint, Meta, Network, Target,
    client::{
        Backend, Dispatcher, Distribution, Failure, Http, Load, Opaque, Profile, Protocol, Refuse, Route, RouteBackend,
        Routes, Rule, TcpRoute, Tls,
    },
    endpoint::ProtocolHint,
    route::Precedence,
};
use http::StatusCode;
use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

/// The policy of a destination.
///
/// # Errors
/// When the name is none that this source knows.
pub(super) fn policy(view: &View<'_>, mesh: &Mesh, target: &Target) -> Result<ClientPolicy, String> {
    match target {
        Target::Addr(addr) => Ok(of_addr(view, mesh, SocketAddr::new(addr.ip().to_canonical(), addr.port()))),
        Target::Name(name, port) => of_name(view, mesh, name, *port),
    }
}

fn of_addr(view: &View<'_>, mesh: &Mesh, addr: SocketAddr) -> ClientPolicy {
    if let Some(service) = view.frontend(addr.ip()) {
        return of_service(view, mesh, service, addr.port());
    }
    if let Some((key, object)) = view.by_ip(addr.ip()) {
        let mut meta = describe(view, mesh, &key.cluster, Some(object), addr.port(), None);
        meta.weight = None;
        return forward(mesh, "endpoint", Endpoint { addr, meta: Arc::new(meta) });
    }
    if let Some(egress) = egress_of(view, mesh, addr.ip()) {
        return of_egress(view, mesh, egress, addr);
    }
    let inside = mesh.settings.cluster_networks.iter().any(|n| n.contains(&addr.ip()));
    forward(mesh, if inside { "fallback" } else { "egress-fallback" }, Endpoint::bare(addr))
}

/// One address; bytes without looking at them if its port is opaque.
fn forward(mesh: &Mesh, name: &'static str, endpoint: Endpoint) -> ClientPolicy {
    let opaque = endpoint.meta.hint == ProtocolHint::Opaque;
    let mut policy = ClientPolicy::forward(name, endpoint, mesh.settings.outbound_detect_timeout);
    if opaque && let Protocol::Detect { opaque, .. } = policy.protocol {
        policy.protocol = Protocol::Opaque(opaque);
    }
    policy
}

fn of_name(view: &View<'_>, mesh: &Mesh, name: &Arc<str>, port: u16) -> Result<ClientPolicy, String> {
    if let Ok(ip) = name.trim_matches(['[', ']']).parse::<IpAddr>() {
        return Ok(of_addr(view, mesh, SocketAddr::new(ip, port)));
    }
    let Some(service_name) = ServiceName::parse(name, mesh) else {
        return Err(format!("{name} is no name of a Service"));
    };
    let service = view.service(&"".into(), &service_name.namespace, &service_name.name);
    let Some(service) = service else {
        return Err(format!("{name} is no Service: there is no {}/{}", service_name.namespace, service_name.name));
    };
    if service.kind == ServiceKind::External {
        return Err(format!("Service {}/{} is of type ExternalName", service_name.namespace, service_name.name));
    }
    if service_name.instance.is_none() {
        return Ok(of_service(view, mesh, service, port));
    }
    let mut replicas = Replicas::new(service_name, port);
    replicas.update(view.index(), mesh, &mesh.work, None);
    view.also(replicas.deps());
    match replicas.all().into_iter().next() {
        Some(endpoint) => Ok(forward(mesh, "endpoint", endpoint)),
        None => Err(format!("{name} names no endpoint of its Service")),
    }
}

/// How a Service port is declared.
#[derive(Copy, Clone, PartialEq, Eq)]
enum Declared {
    Detect,
    Http1,
    Http2,
    Opaque,
    /// The application's own TLS.
    Tls,
}

impl Declared {
    /// Whether routes of a kind have something to match there.
    fn carries(self, kind: RouteKind) -> bool {
        match self {
            Self::Detect => true,
            Self::Http1 => kind == RouteKind::Http,
            Self::Http2 => matches!(kind, RouteKind::Http | RouteKind::Grpc),
            Self::Opaque => kind == RouteKind::Tcp,
            Self::Tls => matches!(kind, RouteKind::Tls | RouteKind::Tcp),
        }
    }
}

/// An appProtocol in lower case (resources.md 2.1). Beyond what Linkerd knows: WebSocket is HTTP/1, `grpc` is HTTP/2, and
/// `https`, `wss` and `tls` are TLS, which TLSRoutes may look into.
fn declared(app_protocol: &str) -> Declared {
    match app_protocol {
        "http" | "kubernetes.io/ws" => Declared::Http1,
        "kubernetes.io/h2c" | "grpc" => Declared::Http2,
        "https" | "tls" | "kubernetes.io/wss" => Declared::Tls,
        _ => Declared::Opaque,
    }
}

fn of_service(view: &View<'_>, mesh: &Mesh, service: &Service, number: u16) -> ClientPolicy {
    let head = &service.head;
    let meta = service_meta(&head.namespace, &head.name, number);
    let logical = Some(discovery(mesh, &head.namespace, &head.name, number));
    let Some(port) = service.ports.iter().find(|p| p.port == number) else {
        let route = TcpRoute {
            meta: Meta::default("undefined-port"),
            refuse: Some(Refuse::Forbidden),
            backends: Distribution::Empty,
        };
        let protocol = Protocol::Opaque(Opaque { route: Some(route) });
        return ClientPolicy { parent: meta, protocol, logical, rate_limit: None };
    };
    let parent = Parent {
        view,
        mesh,
        kind: ParentKind::Service,
        namespace: head.namespace.clone(),
        name: head.name.clone(),
        port: number,
        tuning: &service.tuning,
        original: None,
    };
    let profile = profile_of(view, mesh, service);
    let declared = declared_port(view, mesh, service, port, profile);
    let attached = attached(view, mesh, service, port, declared);
    let in_force = profile.filter(|p| !p.routes.is_empty() || !p.overrides.is_empty());
    let protocol = match in_force {
        Some(profile) => profile_protocol(&parent, service, profile, declared),
        None => protocol(&parent, declared, &attached),
    };
    let rate_limit = rate_limit(view, mesh, &head.namespace, |t| *t == RateLimitTarget::Service(head.name.clone()));
    ClientPolicy { parent: meta, protocol, logical, rate_limit }
}

fn declared_port(
    view: &View<'_>,
    mesh: &Mesh,
    service: &Service,
    port: &ServicePort,
    profile: Option<&ProfileManifest>,
) -> Declared {
    match &port.app_protocol {
        Some(p) => declared(p),
        None if is_opaque(view, mesh, service, port, profile) => Declared::Opaque,
        None => Declared::Detect,
    }
}

/// Whether routes of a kind have a meaning on a Service port.
pub(super) fn carries(view: &View<'_>, mesh: &Mesh, service: &Service, port: &ServicePort, kind: RouteKind) -> bool {
    declared_port(view, mesh, service, port, profile_of(view, mesh, service)).carries(kind)
}

fn is_opaque(
    view: &View<'_>,
    mesh: &Mesh,
    service: &Service,
    port: &ServicePort,
    profile: Option<&ProfileManifest>,
) -> bool {
    let named = Some(&*port.name);
    if let Some(ports) = &service.tuning.opaque_ports {
        return ports.contains(port.port, named);
    }
    if let Some(ports) = profile.and_then(|p| p.opaque_ports.as_ref()) {
        return ports.contains(port.port, named);
    }
    let inherited = view.namespace_annotation(&"".into(), &service.head.namespace, OPAQUE_PORTS);
    match inherited.and_then(|t| Ports::parse(t).ok()) {
        Some(ports) => ports.contains(port.port, named),
        // Of the default list what appears as a target port, which is the port itself if none is given.
        None => matches!(port.target, PortRef::Number(n) if mesh.settings.opaque_ports.contains(&n)),
    }
}

/// The routes in force on a Service port, all of one kind, older first.
fn attached<'a>(
    view: &View<'a>,
    mesh: &Mesh,
    service: &Service,
    port: &ServicePort,
    declared: Declared,
) -> Vec<(&'a Key, &'a Manifest)> {
    let head = &service.head;
    if !matches!(service.kind, ServiceKind::Cluster { .. }) {
        return Vec::new();
    }
    let mut routes = view.routes(ParentKind::Service, &head.namespace, &head.name);
    let client = &mesh.local.0;
    routes.retain(|(key, route)| {
        let fits = route.parents.iter().any(|p| {
            p.kind == ParentKind::Service
                && p.name == head.name
                && p.namespace == head.namespace
                && p.port.is_none_or(|n| n == port.port)
                && p.section.as_ref().is_none_or(|s| *s == port.name)
        });
        fits && declared.carries(route.kind) && (key.namespace == head.namespace || key.namespace == *client)
    });
    let consumer = |key: &Key| key.namespace != head.namespace;
    if routes.iter().any(|(key, route)| consumer(key) && route.gateway) {
        routes.retain(|(key, _)| consumer(key));
    }
    highest(routes)
}

/// GRPCRoutes beat HTTPRoutes beat TLSRoutes beat TCPRoutes.
fn highest<'a>(mut routes: Vec<(&'a Key, &'a Manifest)>) -> Vec<(&'a Key, &'a Manifest)> {
    if let Some(kind) = routes.iter().map(|(_, r)| r.kind).min() {
        routes.retain(|(_, r)| r.kind == kind);
    }
    routes
}

fn precedence(routes: &[(&Key, &Manifest)]) -> Precedence {
    if routes.iter().any(|(_, r)| r.gateway) { Precedence::GatewayApi } else { Precedence::Linkerd }
}

fn protocol(parent: &Parent<'_, '_>, declared: Declared, attached: &[(&Key, &Manifest)]) -> Protocol {
    let kind = attached.first().map(|(_, r)| r.kind);
    let http = || {
        let converted: Vec<Route> = attached.iter().map(|(k, r)| parent.http_route(k, r)).collect();
        let routes = match kind {
            Some(RouteKind::Http) => Routes::Http(converted.into(), precedence(attached)),
            Some(RouteKind::Grpc) => Routes::Grpc(converted.into(), precedence(attached)),
            _ => Routes::Http(
                Arc::new([Route {
                    meta: Meta::default("http"),
                    hosts: Vec::new(),
                    rules: vec![parent.default_rule()],
                }]),
                Precedence::Linkerd,
            ),
        };
        Http { routes, breaker: parent.tuning.breaker.clone() }
    };
    let opaque = || Opaque {
        route: Some(match attached.first() {
            // Of several TCPRoutes only the oldest is used.
            Some((key, route)) if route.kind == RouteKind::Tcp => parent.tcp_route(key, route).1,
            _ => TcpRoute {
                meta: Meta::default("opaq"),
                refuse: None,
                backends: single(RouteBackend { filters: Vec::new(), backend: parent.default_backend() }),
            },
        }),
    };
    match (declared, kind) {
        (Declared::Http1, _) => Protocol::Http1(http()),
        (Declared::Http2, Some(RouteKind::Grpc)) => Protocol::Grpc(http()),
        (Declared::Http2, _) => Protocol::Http2(http()),
        (Declared::Detect | Declared::Tls, Some(RouteKind::Tls)) => {
            Protocol::Tls(Tls { routes: attached.iter().map(|(k, r)| parent.tcp_route(k, r)).collect() })
        }
        (Declared::Opaque | Declared::Tls, _) | (Declared::Detect, Some(RouteKind::Tcp)) => Protocol::Opaque(opaque()),
        (Declared::Detect, _) => Protocol::Detect {
            timeout: parent.mesh.settings.outbound_detect_timeout,
            http1: http(),
            http2: http(),
            opaque: opaque(),
        },
    }
}

/// The ServiceProfile of a Service: the client namespace's, else the Service's own.
fn profile_of<'a>(view: &View<'a>, mesh: &Mesh, service: &Service) -> Option<&'a ProfileManifest> {
    let head = &service.head;
    let name: Arc<str> = format!("{}.{}.svc.{}", head.name, head.namespace, mesh.settings.cluster_domain).into();
    view.profile(&"".into(), &mesh.local.0, &name).or_else(|| view.profile(&"".into(), &head.namespace, &name))
}

fn profile_protocol(
    parent: &Parent<'_, '_>,
    service: &Service,
    profile: &ProfileManifest,
    declared: Declared,
) -> Protocol {
    let mut targets: Vec<(Backend, u32)> = profile
        .overrides
        .iter()
        .filter(|(_, weight)| *weight > 0)
        .map(|(authority, weight)| {
            let (host, port) = match authority.rsplit_once(':').and_then(|(h, p)| Some((h, p.parse().ok()?))) {
                Some((host, port)) => (host, port),
                None => (&**authority, parent.port),
            };
            let backend = match ServiceName::parse(host, parent.mesh) {
                Some(n) => Backend {
                    meta: service_meta(&n.namespace, &n.name, port),
                    dispatcher: Dispatcher::Balance {
                        discovery: discovery(parent.mesh, &n.namespace, &n.name, port),
                        load: Load::default(),
                    },
                },
                None => routes::fail(&format!("{authority} is no name of a Service")),
            };
            (backend, *weight)
        })
        .collect();
    let split = !targets.is_empty();
    if !split {
        targets.push((service_backend(parent.mesh, service, parent.port), 1));
    }
    let opaque_backends = if split {
        let plain = |(backend, weight): &(Backend, u32)| {
            (RouteBackend { filters: Vec::new(), backend: backend.clone() }, *weight)
        };
        Distribution::RandomAvailable(targets.iter().map(plain).collect())
    } else {
        single(RouteBackend { filters: Vec::new(), backend: parent.default_backend() })
    };
    let http = Http {
        routes: Routes::Profile(Arc::new(Profile {
            addr: discovery(parent.mesh, &parent.namespace, &parent.name, parent.port),
            routes: profile.routes.clone(),
            budget: profile.budget,
            targets: targets.into(),
        })),
        breaker: Default::default(),
    };
    let route = TcpRoute { meta: Meta::default("opaq"), refuse: None, backends: opaque_backends };
    let opaque = Opaque { route: Some(route) };
    match declared {
        Declared::Http1 => Protocol::Http1(http),
        Declared::Http2 => Protocol::Http2(http),
        Declared::Opaque | Declared::Tls => Protocol::Opaque(opaque),
        Declared::Detect => Protocol::Detect {
            timeout: parent.mesh.settings.outbound_detect_timeout,
            http1: http.clone(),
            http2: http,
            opaque,
        },
    }
}

/// The EgressNetwork for an address: of the client's namespace, or if that has none of the global one; the smallest that
/// has the address, then the oldest.
fn egress_of<'a>(view: &View<'a>, mesh: &Mesh, ip: IpAddr) -> Option<&'a Egress> {
    let mut candidates = view.egresses(&mesh.local.0);
    if candidates.is_empty() {
        candidates = view.egresses(&mesh.settings.egress_namespace);
    }
    let mut best: Option<(f64, &Egress)> = None;
    for egress in candidates {
        let size = match &egress.networks {
            None if mesh.settings.cluster_networks.iter().any(|n| n.contains(&ip)) => continue,
            None => f64::INFINITY,
            Some(networks) if !is_outside(mesh, networks) => continue,
            Some(networks) => match networks.iter().filter(|n| n.contains(ip)).map(size).min_by(f64::total_cmp) {
                Some(size) => size,
                None => continue,
            },
        };
        if best.is_none_or(|(least, _)| size < least) {
            best = Some((size, egress));
        }
    }
    best.map(|b| b.1)
}

/// Whether networks keep clear of the cluster; an EgressNetwork that does not is not accepted.
pub(super) fn is_outside(mesh: &Mesh, networks: &[Network]) -> bool {
    let touches = |n: &Network, c: &ipnet::IpNet| {
        (n.net.contains(c) || c.contains(&n.net)) && !n.except.iter().any(|e| e.contains(c) || e.contains(&n.net))
    };
    !networks.iter().any(|n| mesh.settings.cluster_networks.iter().any(|c| touches(n, c)))
}

/// Addresses in a network without its exceptions.
fn size(network: &Network) -> f64 {
    let of = |net: &ipnet::IpNet| f64::from(net.max_prefix_len() - net.prefix_len()).exp2();
    of(&network.net) - network.except.iter().map(of).sum::<f64>()
}

fn of_egress(view: &View<'_>, mesh: &Mesh, egress: &Egress, addr: SocketAddr) -> ClientPolicy {
    let head = &egress.head;
    let parent = Parent {
        view,
        mesh,
        kind: ParentKind::EgressNetwork,
        namespace: head.namespace.clone(),
        name: head.name.clone(),
        port: addr.port(),
        tuning: &egress.tuning,
        original: Some(addr),
    };
    let mut attached = view.routes(ParentKind::EgressNetwork, &head.namespace, &head.name);
    attached.retain(|(key, route)| {
        let fits = route.parents.iter().any(|p| {
            p.kind == ParentKind::EgressNetwork
                && p.name == head.name
                && p.namespace == head.namespace
                && p.port == Some(addr.port())
        });
        fits && (key.namespace == head.namespace || key.namespace == mesh.local.0)
    });
    let attached = highest(attached);
    let kind = attached.first().map(|(_, r)| r.kind);
    let verdict = if egress.allow { "allow" } else { "deny" };
    let default_tcp = |prefix: &str| TcpRoute {
        meta: Meta::default(format!("{prefix}-egress-{verdict}")),
        refuse: (!egress.allow).then_some(Refuse::Forbidden),
        backends: match egress.allow {
            true => single(RouteBackend { filters: Vec::new(), backend: parent.default_backend() }),
            false => Distribution::Empty,
        },
    };
    let default_http = |prefix: &str| {
        let rule = match egress.allow {
            true => parent.default_rule(),
            false => Rule::to(single(RouteBackend { filters: Vec::new(), backend: denied() })),
        };
        Route { meta: Meta::default(format!("{prefix}-egress-{verdict}")), hosts: Vec::new(), rules: vec![rule] }
    };
    let http = || {
        let mut converted: Vec<Route> = attached.iter().flat_map(|(k, r)| parent.egress_routes(k, r)).collect();
        let routes = match kind {
            Some(RouteKind::Grpc) => {
                converted.push(default_http("grpc"));
                Routes::Grpc(converted.into(), precedence(&attached))
            }
            Some(RouteKind::Http) => {
                converted.push(default_http("http"));
                Routes::Http(converted.into(), precedence(&attached))
            }
            _ => Routes::Http(Arc::new([default_http("http")]), Precedence::Linkerd),
        };
        Http { routes, breaker: egress.tuning.breaker.clone() }
    };
    let opaque_port = match &egress.tuning.opaque_ports {
        Some(ports) => ports.contains(addr.port(), None),
        None => mesh.settings.opaque_ports.contains(&addr.port()),
    };
    let protocol = match kind {
        Some(RouteKind::Tls) => {
            let named = attached.iter().map(|(k, r)| parent.tcp_route(k, r));
            Protocol::Tls(Tls { routes: named.chain([(Vec::new(), default_tcp("tls"))]).collect() })
        }
        Some(RouteKind::Tcp) => {
            Protocol::Opaque(Opaque { route: attached.first().map(|(k, r)| parent.tcp_route(k, r).1) })
        }
        None if opaque_port => Protocol::Opaque(Opaque { route: Some(default_tcp("tcp")) }),
        _ => Protocol::Detect {
            timeout: mesh.settings.outbound_detect_timeout,
            http1: http(),
            http2: http(),
            opaque: Opaque { route: Some(default_tcp("tcp")) },
        },
    };
    let rate_limit = rate_limit(view, mesh, &head.namespace, |t| *t == RateLimitTarget::Egress(head.name.clone()));
    ClientPolicy { parent: parent.meta(), protocol, logical: None, rate_limit }
}

/// What a denied request is answered: 403, or PERMISSION_DENIED (7) to gRPC.
fn denied() -> Backend {
    Backend {
        meta: Meta::default("fail"),
        dispatcher: Dispatcher::Fail(Failure {
            status: StatusCode::FORBIDDEN,
            grpc_code: 7,
            message: "traffic not allowed".into(),
        }),
    }
}
