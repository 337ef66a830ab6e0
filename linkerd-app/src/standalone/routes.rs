//! From the rules of a route manifest to rules of a policy: backends found or refused, filters completed, timeouts and
//! retries merged with the parent's.

use super::{
    Mesh,
    annotations::Tuning,
    endpoints::discovery,
    index::View,
    manifest::{
        BackendKind, BackendRef, FilterSpec, Key, POLICY, ParentKind, Route as Manifest, RouteKind,
        Rule as ManifestRule, Service, ServiceKind, SessionSpec,
    },
};
use crate::policy::{
    Endpoint, Meta,
    client::{
        Backend, Budget, Dispatcher, Distribution, Failure, Refuse, Retry, Route, RouteBackend, Rule, Session,
        SessionToken, TcpRoute, Timeouts,
    },
    endpoint::EndpointMeta,
    route::{Filter, HostMatch, Mirror, Redirect},
};
use http::{StatusCode, uri::Scheme};
use linkerd_tls::web;
use std::{net::SocketAddr, sync::Arc};

/// What outbound routes stand on.
pub(super) struct Parent<'v, 'a> {
    pub(super) view: &'v View<'a>,
    pub(super) mesh: &'v Mesh,
    pub(super) kind: ParentKind,
    pub(super) namespace: Arc<str>,
    pub(super) name: Arc<str>,
    pub(super) port: u16,
    pub(super) tuning: &'v Tuning,
    /// Where the client meant to go, for EgressNetworks.
    pub(super) original: Option<SocketAddr>,
}

/// gRPC UNAVAILABLE: what an invalid backend answers (resources.md 3.6).
const UNAVAILABLE: u16 = 14;

impl<'a> Parent<'_, 'a> {
    pub(super) fn meta(&self) -> Meta {
        match self.kind {
            ParentKind::EgressNetwork => {
                Meta::resource(POLICY, "EgressNetwork", &self.namespace, &self.name, Some(self.port))
            }
            ParentKind::Service | ParentKind::Server => service_meta(&self.namespace, &self.name, self.port),
        }
    }

    /// An HTTPRoute or GRPCRoute.
    pub(super) fn http_route(&self, key: &Key, route: &Manifest) -> Route {
        // In a mesh the address chooses the Service, so hostnames of Gateway API routes say nothing there. Linkerd's own
        // kind compares them; on an EgressNetwork they are what there is to compare.
        let hosts = if route.gateway && self.kind == ParentKind::Service { Vec::new() } else { route.hosts.clone() };
        let rules = route.rules.iter().enumerate().map(|(i, rule)| self.rule(key, route, i, rule));
        Route { meta: route_meta(key), hosts, rules: rules.collect() }
    }

    fn rule(&self, key: &Key, route: &Manifest, index: usize, rule: &ManifestRule) -> Rule {
        let filters = self.filters(&rule.filters, key, route);
        let answers = rule.filters.iter().any(|f| matches!(f, FilterSpec::Redirect { .. }));
        let backends = match rule.backends.as_slice() {
            [] if answers => Distribution::Empty,
            [] => single(RouteBackend { filters: Vec::new(), backend: self.implicit_backend(key, route) }),
            refs => {
                let list = refs.iter().filter(|r| r.weight > 0).map(|r| {
                    let filters = self.filters(&r.filters, key, route);
                    let backend = match unsupported(&filters) {
                        Some(why) => RouteBackend { filters: Vec::new(), backend: fail(&why) },
                        None => {
                            let backend = self.backend(r, key, route).unwrap_or_else(|why| fail(&why));
                            RouteBackend { filters, backend }
                        }
                    };
                    (backend, r.weight)
                });
                distribute(list.collect()).unwrap_or_else(|| {
                    single(RouteBackend { filters: Vec::new(), backend: fail("all backends have weight 0") })
                })
            }
        };
        let retry = rule.retry.clone().or_else(|| route.tuning.retry.clone()).or_else(|| self.tuning.retry.clone());
        let retry_bytes = route.tuning.retry_bytes.or(self.tuning.retry_bytes);
        let service = rule.backends.first().filter(|b| b.kind == BackendKind::Service);
        let (namespace, name) = match service {
            Some(b) => (self.backend_namespace(b, key, route), b.name.clone()),
            None => (self.namespace.clone(), self.name.clone()),
        };
        let traffic = self.traffic(&namespace, &name);
        let session = rule.session.clone().or(traffic.1).filter(|_| {
            let service = self.view.service(&"".into(), &namespace, &name);
            !service.is_some_and(|s| s.client_ip_affinity)
        });
        Rule {
            matches: rule.matches.clone(),
            filters,
            backends,
            timeouts: self.timeouts(route, rule),
            retry: retry.map(|retry| completed(retry, retry_bytes, traffic.0)),
            allow_l5d_headers: route.tuning.request_headers.unwrap_or_else(|| self.request_headers()),
            session: session.map(|s| session_of(&s, key, index)),
        }
    }

    fn request_headers(&self) -> bool {
        self.tuning.request_headers.unwrap_or(self.mesh.settings.l5d_headers)
    }

    fn timeouts(&self, route: &Manifest, rule: &ManifestRule) -> Timeouts {
        let own = route.tuning.timeouts;
        let own = Timeouts { request: own.request.or(rule.request_timeout), ..own };
        let base = match own {
            // The parent's count only if the rule has none of the three.
            Timeouts { request: None, response: None, idle: None, .. } => self.tuning.timeouts,
            own => own,
        };
        Timeouts { backend_request: rule.backend_request_timeout, ..base }
    }

    /// Retry budget and sessions that an XBackendTrafficPolicy gives a Service.
    fn traffic(&self, namespace: &Arc<str>, name: &Arc<str>) -> (Option<Budget>, Option<SessionSpec>) {
        let policies = self.view.backend_traffic(namespace);
        let policy = policies.iter().find(|p| p.targets.contains(name));
        (policy.and_then(|p| p.budget), policy.and_then(|p| p.session.clone()))
    }

    fn filters(&self, specs: &[FilterSpec], key: &Key, route: &Manifest) -> Vec<Filter> {
        let convert = |spec: &FilterSpec| match spec {
            FilterSpec::Mirror { backend, ratio } => {
                Filter::Mirror(Arc::new(Mirror { backend: self.backend(backend, key, route).ok(), ratio: *ratio }))
            }
            other => plain_filter(other, route.gateway.then_some(self.port)),
        };
        specs.iter().map(convert).collect()
    }

    fn backend_namespace(&self, backend: &BackendRef, key: &Key, route: &Manifest) -> Arc<str> {
        let default = if route.gateway { &key.namespace } else { &self.namespace };
        backend.namespace.clone().unwrap_or_else(|| default.clone())
    }

    fn backend(&self, backend: &BackendRef, key: &Key, route: &Manifest) -> Result<Backend, String> {
        let namespace = self.backend_namespace(backend, key, route);
        let name = &backend.name;
        match &backend.kind {
            BackendKind::Unknown(kind) => Err(format!("{kind} {namespace}/{name} can't be a backend")),
            BackendKind::EgressNetwork => {
                let same = self.kind == ParentKind::EgressNetwork && *name == self.name && namespace == self.namespace;
                match self.original {
                    Some(addr) if same => self.egress_backend(addr, key, route),
                    _ => Err(format!("EgressNetwork {namespace}/{name} is a backend only of routes on itself")),
                }
            }
            BackendKind::Service => {
                let service = self.view.service(&"".into(), &namespace, name);
                let service = service.ok_or_else(|| format!("Service not found {namespace}/{name}"))?;
                if service.kind == ServiceKind::External {
                    return Err(format!("Service {namespace}/{name} is of type ExternalName"));
                }
                let number = backend.port.unwrap_or_default();
                let port = service.ports.iter().find(|p| p.port == number);
                let port = port.ok_or_else(|| format!("Service {namespace}/{name} has no port {number}"))?;
                let http = matches!(route.kind, RouteKind::Http | RouteKind::Grpc);
                if let Some(p) = port.app_protocol.as_deref().filter(|p| route.gateway && http && is_not_http(p)) {
                    return Err(format!("Service {namespace}/{name} port {number} speaks {p}, not HTTP"));
                }
                Ok(service_backend(self.mesh, service, number))
            }
        }
    }

    /// Where a rule without backends leads.
    fn implicit_backend(&self, key: &Key, route: &Manifest) -> Backend {
        match (self.kind, self.original) {
            (ParentKind::EgressNetwork, Some(addr)) => {
                self.egress_backend(addr, key, route).unwrap_or_else(|why| fail(&why))
            }
            _ if route.gateway => fail("the rule has no backends"),
            _ => self.default_backend(),
        }
    }

    /// The parent itself.
    pub(super) fn default_backend(&self) -> Backend {
        match (self.original, self.view.service(&"".into(), &self.namespace, &self.name)) {
            (Some(addr), _) => self.original_backend(addr),
            (None, Some(service)) => service_backend(self.mesh, service, self.port),
            (None, None) => fail(&format!("Service not found {}/{}", self.namespace, self.name)),
        }
    }

    /// Where the client meant to go, over TLS if the route says so.
    fn egress_backend(&self, addr: SocketAddr, key: &Key, route: &Manifest) -> Result<Backend, String> {
        let Some(originate) = route.originate.as_ref().filter(|_| route.kind != RouteKind::Tls) else {
            return Ok(self.original_backend(addr));
        };
        let name = match (&originate.hostname, route.hosts.as_slice()) {
            (Some(name), _) => name.clone(),
            (None, [HostMatch::Exact(name)]) => name.clone(),
            _ => {
                return Err(
                    "TLS needs one name to verify; annotate the route with egress.linkerd.io/tls-hostname".into()
                );
            }
        };
        let roots = self.view.roots(&key.namespace, originate.authorities.as_ref().map(std::slice::from_ref));
        let port = originate.port.unwrap_or(if addr.port() == 80 { 443 } else { addr.port() });
        let origin_tls = Some(Arc::new(web::Target { name, roots, subject_names: Vec::new() }));
        let meta = Arc::new(EndpointMeta { origin_tls, ..EndpointMeta::default() });
        let endpoint = Endpoint { addr: SocketAddr::new(addr.ip(), port), meta };
        Ok(Backend { meta: self.meta(), dispatcher: Dispatcher::Forward(endpoint) })
    }

    /// As [`Parent::http_route`]; a route that originates TLS becomes one for each of its host names, each with the
    /// name that its server must prove.
    pub(super) fn egress_routes(&self, key: &Key, route: &Manifest) -> Vec<Route> {
        let apart = route.originate.as_ref().is_some_and(|o| o.hostname.is_none()) && route.hosts.len() > 1;
        if !apart {
            return vec![self.http_route(key, route)];
        }
        let one = |host: &HostMatch| self.http_route(key, &Manifest { hosts: vec![host.clone()], ..route.clone() });
        route.hosts.iter().map(one).collect()
    }

    fn original_backend(&self, addr: SocketAddr) -> Backend {
        Backend { meta: self.meta(), dispatcher: Dispatcher::Forward(Endpoint::bare(addr)) }
    }

    /// The rule that stands for "no routes": the parent's settings alone.
    pub(super) fn default_rule(&self) -> Rule {
        let (budget, session) = self.traffic(&self.namespace, &self.name);
        let service = self.view.service(&"".into(), &self.namespace, &self.name);
        let session = session.filter(|_| !service.is_some_and(|s| s.client_ip_affinity));
        let key = format!("{}/{}:{}", self.namespace, self.name, self.port);
        Rule {
            timeouts: self.tuning.timeouts,
            retry: self.tuning.retry.clone().map(|retry| completed(retry, self.tuning.retry_bytes, budget)),
            allow_l5d_headers: self.request_headers(),
            session: session.map(|s| named_session(&s, &key)),
            ..Rule::to(single(RouteBackend { filters: Vec::new(), backend: self.default_backend() }))
        }
    }

    /// A TLSRoute or TCPRoute.
    pub(super) fn tcp_route(&self, key: &Key, route: &Manifest) -> (Vec<HostMatch>, TcpRoute) {
        let refs = route.rules.first().map_or(&[][..], |r| &r.backends);
        let list = refs.iter().filter(|r| r.weight > 0).map(|r| match self.backend(r, key, route) {
            Ok(backend) => (RouteBackend { filters: Vec::new(), backend }, r.weight),
            Err(why) => {
                (RouteBackend { filters: vec![Refuse::Invalid(why.as_str().into())], backend: fail(&why) }, r.weight)
            }
        });
        let backends = distribute(list.collect());
        let refuse =
            backends.is_none().then(|| Refuse::Invalid("the route has no backend with a weight above 0".into()));
        let route_of = TcpRoute { meta: route_meta(key), refuse, backends: backends.unwrap_or(Distribution::Empty) };
        (route.hosts.clone(), route_of)
    }
}

/// A retry policy with what is told apart from it.
fn completed(retry: Retry, bytes: Option<usize>, budget: Option<Budget>) -> Retry {
    Retry { max_request_bytes: bytes.unwrap_or(retry.max_request_bytes), budget, ..retry }
}

pub(super) fn service_meta(namespace: &str, name: &str, port: u16) -> Meta {
    Meta::resource("core", "Service", namespace, name, Some(port))
}

fn route_meta(key: &Key) -> Meta {
    Meta::resource(key.kind.group(), key.kind.name(), &key.namespace, &key.name, None)
}

/// Why a backend with these filters is none, if it is so (resources.md 3.6).
fn unsupported(filters: &[Filter]) -> Option<String> {
    filters.iter().find_map(|filter| match filter {
        Filter::Unknown { what } => Some(format!("the filter {what} is not supported")),
        _ => None,
    })
}

/// Balancing over the replicas of a Service port.
pub(super) fn service_backend(mesh: &Mesh, service: &Service, port: u16) -> Backend {
    let head = &service.head;
    Backend {
        meta: service_meta(&head.namespace, &head.name, port),
        dispatcher: Dispatcher::Balance {
            discovery: discovery(mesh, &head.namespace, &head.name, port),
            load: service.tuning.load.clone(),
        },
    }
}

/// A backend that answers 500, or UNAVAILABLE to gRPC.
pub(super) fn fail(why: &str) -> Backend {
    Backend {
        meta: Meta::default("fail"),
        dispatcher: Dispatcher::Fail(Failure {
            status: StatusCode::INTERNAL_SERVER_ERROR,
            grpc_code: UNAVAILABLE,
            message: why.into(),
        }),
    }
}

/// appProtocols that an HTTP route can't be carried over.
fn is_not_http(app_protocol: &str) -> bool {
    matches!(app_protocol, "https" | "tls" | "kubernetes.io/wss" | "linkerd.io/opaque" | "linkerd.io/tcp")
}

pub(super) fn single<F>(backend: RouteBackend<F>) -> Distribution<F> {
    Distribution::FirstAvailable(Arc::new([backend]))
}

/// None if there is nothing to choose from.
fn distribute<F>(mut list: Vec<(RouteBackend<F>, u32)>) -> Option<Distribution<F>> {
    match list.len() {
        0 => None,
        1 => list.pop().map(|(backend, _)| single(backend)),
        _ => Some(Distribution::RandomAvailable(list.into())),
    }
}

/// A filter that needs no other object. With `gateway_port`, redirects name the port as the Gateway API says: the filter's,
/// else the scheme's, else the one that the client addressed.
fn plain_filter(spec: &FilterSpec, gateway_port: Option<u16>) -> Filter {
    match spec {
        FilterSpec::Ready(filter) => filter.clone(),
        FilterSpec::Redirect { scheme, host, port, path, status } => {
            let well_known = |s: &Scheme| if *s == Scheme::HTTPS { 443 } else { 80 };
            let port = port.or_else(|| gateway_port.map(|p| scheme.as_ref().map_or(p, well_known)));
            Filter::Redirect(Redirect {
                scheme: scheme.clone(),
                host: host.clone(),
                port,
                path: path.clone(),
                status: *status,
            })
        }
        FilterSpec::Mirror { .. } => Filter::Unknown { what: "RequestMirror on an inbound route".into() },
    }
}

/// A filter of a route on a Server.
pub(super) fn inbound_filter(spec: &FilterSpec) -> Filter {
    plain_filter(spec, None)
}

fn session_of(spec: &SessionSpec, key: &Key, rule: usize) -> Arc<Session> {
    named_session(spec, &format!("{key}#{rule}"))
}

/// Sessions of different rules are apart, so a cookie without a name is named after the rule.
fn named_session(spec: &SessionSpec, owner: &str) -> Arc<Session> {
    let token = spec.token.clone().unwrap_or_else(|| {
        let hash =
            owner.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3));
        let name = format!("l5d-session-{hash:016x}").into();
        SessionToken::Cookie { name, path: spec.path.clone(), permanent: spec.permanent }
    });
    Arc::new(Session { token, absolute_timeout: spec.absolute_timeout })
}
