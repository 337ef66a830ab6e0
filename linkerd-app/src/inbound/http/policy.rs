//! The policy of a port, applied to each request: route, authorization, filters, rate limit (behaviour.md C.6), then
//! the metrics of what was let through.
//!
//! What depends only on the connection (does this client's identity satisfy this route?) is decided once per policy value
//! and route, when the first request comes that needs it.

use super::{
    observe::{self, Handles},
    profile::{NameRef, Profiles, Taken},
};
use crate::{
    config,
    error::{Cause, Error},
    http::{
        Asked, Match, Rescue, best_match, best_match_at,
        classify::Rule,
        filter::{self, Flow},
        rescue::is_endpoint_level,
    },
    inbound::{
        denial::{Case, Lines},
        limits::Share,
        policy::{self, HttpRoutes, PortRef, Ports, Prepared},
        readings::readings,
    },
    policy::{
        Meta, Source,
        authz::ClientTls,
        route::{HostMatch, RouteMatch},
        server::{Protocol, Route},
    },
    tap::{self, About},
    telemetry::{
        Code, Counter, Direction, EndpointLabels, InboundRouteLabels, InboundServer, RouteKind, ServerLabels,
        Telemetry, access::AccessLog, termination::Phase,
    },
};
use ::http::{Method, Request, Response};
use arc_swap::{ArcSwap, ArcSwapOption};
use linkerd_stack::{
    BoxService,
    http::{Body, normalize, upgrade::Until},
};
use std::{
    future::pending,
    net::SocketAddr,
    sync::{Arc, OnceLock},
};

/// What authorizes requests; one per proxy.
pub struct Guard {
    pub(in crate::inbound) ports: Ports,
    pub(in crate::inbound) lines: Lines,
    telemetry: Telemetry,
    access: AccessLog,
    authority_labels: bool,
    profiles: Profiles,
}

/// What a port serves.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The local application.
    App,
    /// The admin server.
    Admin,
    /// Other proxies' targets.
    Gateway,
}

/// A connection that carries requests.
#[derive(Clone)]
pub struct Connection {
    /// Who connected.
    pub client: SocketAddr,
    /// What they proved.
    pub tls: ClientTls,
    /// Where they meant to go.
    pub target: SocketAddr,
    /// The port whose policy counts.
    pub port: PortRef,
    /// What is behind it.
    pub kind: Kind,
}

/// Requests of one connection, authorized before they reach the inner service.
pub struct PolicyService {
    guard: Arc<Guard>,
    conn: Connection,
    resolved: ArcSwap<Resolved>,
    profile: ArcSwapOption<(String, Option<NameRef>)>,
    inner: BoxService<Request<Body>, Response<Body>, Error>,
}

/// What a policy value means for this connection.
struct Resolved {
    prepared: Arc<Prepared>,
    metrics: InboundServer,
    share: Option<Share>,
    /// By index of the route.
    routes: Box<[OnceLock<Decision>]>,
}

/// What a route means for this connection.
enum Decision {
    Allow { allowed: Arc<Counter>, handles: Handles, audit: bool, authz: usize },
    Deny { denied: Arc<Counter> },
}

/// A request that may pass.
struct Permit<'a> {
    route: &'a Route,
    matched: Match,
    /// Index of the authorization.
    authz: usize,
    handles: Handles,
}

impl Guard {
    pub(in crate::inbound) fn new(
        cfg: &config::Inbound,
        source: &Arc<dyn Source>,
        ports: Ports,
        telemetry: Telemetry,
        access: AccessLog,
    ) -> Self {
        let profiles = Profiles::new(
            source.clone(),
            cfg.profile_suffixes.clone(),
            cfg.profile_timeout,
            cfg.discovery_idle_timeout,
            telemetry.clone(),
        );
        let authority_labels = cfg.authority_labels;
        Self { ports, lines: Lines::default(), telemetry, access, authority_labels, profiles }
    }

    /// The port, for [`Connection::port`].
    pub fn port(&self, number: u16) -> PortRef {
        self.ports.get(number)
    }
}

impl Connection {
    /// Says where a failure happened: whoever reads of it sees only this (behaviour.md E.6).
    pub(super) fn locate(&self, error: Error) -> Error {
        error.context(format!("server: {}", self.target)).context(format!("client {}", self.client))
    }
}

impl PolicyService {
    /// Puts the policy of the connection's port before `inner`.
    pub fn new(guard: Arc<Guard>, conn: Connection, inner: BoxService<Request<Body>, Response<Body>, Error>) -> Self {
        let prepared = conn.port.current().clone();
        let resolved = ArcSwap::from_pointee(Resolved::new(&guard, &conn, prepared));
        Self { guard, conn, resolved, profile: ArcSwapOption::empty(), inner }
    }

    /// The connection.
    pub fn connection(&self) -> &Connection {
        &self.conn
    }

    /// Applies the policy now in force, and passes the request on if it may.
    ///
    /// # Errors
    /// What the policy refuses, and the failures of the inner service, apart from those that count as the
    /// application's answers.
    pub async fn call(&self, mut req: Request<Body>, asked: &Asked, rescue: Rescue) -> Result<Response<Body>, Error> {
        let resolved = self.resolved();

        // Route and authorization.
        let Permit { route, matched, authz, mut handles } = self.permit(&resolved, &req)?;

        // Filters.
        let filters = route.rules.get(matched.rule).map_or(&[][..], |rule| &rule.filters);
        let follow_up = match filter::on_request(filters, &mut req, &matched, crate::http::random)? {
            Flow::Forward(follow_up) => follow_up,
            Flow::Answer(parts) => return Ok(Response::from_parts(*parts, Body::empty())),
        };

        // Rate limit.
        resolved.limit()?;

        // On, observed.
        let profile = self.profile(self.profiled(&req)).await.and_then(|name| name.route(&req));
        let mut rule = Rule::of(req.headers(), matches!(resolved.prepared.policy.protocol, Protocol::Grpc(_)));
        if let Some(Taken { rule: judges, metrics, .. }) = &profile {
            handles.profile = Some(metrics.clone());
            rule = judges.clone().unwrap_or(rule);
        }
        let tapped = match self.conn.kind {
            Kind::App => self.guard.telemetry.taps().request(&req, || {
                let labels = profile.as_ref().map(|Taken { labels: tap::Route(labels), .. }| &**labels);
                self.about(&resolved, route, authz).on_route(labels)
            }),
            Kind::Admin | Kind::Gateway => None,
        };
        let upgrade = upgrade_head(&req);
        let (parts, body) = req.into_parts();
        let (observed, body) = observe::request(handles, rule, body);
        let rsp = match self.inner.send(Request::from_parts(parts, body)).await {
            // Metrics count what the client sees of a dead application: an answer.
            Err(error) if is_endpoint_level(error.cause(), asked) => {
                let error = self.conn.locate(error);
                let code = self.failed(&error);
                let mut rsp = rescue.response(&error, asked);
                rsp.extensions_mut().insert(code);
                Ok(rsp)
            }
            answered => answered,
        };
        match rsp {
            Ok(mut rsp) => {
                filter::on_response(filters, rsp.headers_mut(), &follow_up);
                if let Some(head) = upgrade {
                    let (guard, conn) = (self.guard.clone(), self.conn.clone());
                    rsp.extensions_mut().insert(Until::new(revoked(guard, conn, head)));
                }
                let rsp = observed.response(rsp, asked.grpc.then_some(rescue));
                Ok(tap::response(tapped, rsp))
            }
            Err(error) => {
                observed.failed(error.cause());
                tap::failed(tapped, error.cause());
                Err(error)
            }
        }
    }

    /// The route of a request, and who lets its client use it.
    fn permit<'a>(&self, resolved: &'a Resolved, req: &Request<Body>) -> Result<Permit<'a>, Error> {
        let policy = &resolved.prepared.policy;
        let routes = match policy::http(policy) {
            HttpRoutes::Routes(routes) => routes,
            HttpRoutes::Invalid(reason) => {
                // Nobody is authorized by a policy that was not understood.
                resolved.metrics.http_deny(&Meta::default("invalid")).inc();
                self.guard.lines.denied(self.case(resolved, None));
                return Err(Error::new(Cause::Unauthorized).context(format!("invalid policy: {reason}")));
            }
        };
        let Some(matched) = best_match(candidates(routes), policy.precedence, req) else {
            resolved.metrics.http_not_found().inc();
            self.guard.lines.no_route(self.conn.client, &resolved.prepared, req.method(), req.uri().path());
            return Err(Cause::NoRoute.into());
        };
        let (Some(route), Some(slot)) = (routes.get(matched.route), resolved.routes.get(matched.route)) else {
            return Err(Cause::NoRoute.into());
        };
        match slot.get_or_init(|| self.decide(resolved, route)) {
            Decision::Allow { allowed, handles, audit, authz } => {
                self.permit_readings(resolved, routes, req)?;
                allowed.inc();
                if *audit {
                    self.guard.lines.audited(self.case(resolved, Some(route)));
                }
                let handles = match self.guard.authority_labels {
                    true => self.labelled(resolved, route, *authz, handles, req),
                    false => handles.clone(),
                };
                Ok(Permit { route, matched, authz: *authz, handles })
            }
            Decision::Deny { denied } => {
                denied.inc();
                self.guard.lines.denied(self.case(resolved, Some(route)));
                Err(Cause::Unauthorized.into())
            }
        }
    }

    /// Demands that the client is let in however the application reads the path.
    fn permit_readings(&self, resolved: &Resolved, routes: &[Route], req: &Request<Body>) -> Result<(), Error> {
        let Some(as_read) = &resolved.prepared.readings else { return Ok(()) };
        let precedence = resolved.prepared.policy.precedence;
        for path in readings(req.uri().path()) {
            let context = |cause: Cause| Error::new(cause).context(format!("the path may be read as {path}"));
            let found = best_match_at(candidates(as_read), precedence, req, &path);
            let Some((route, slot)) = found.and_then(|m| Some((routes.get(m.route)?, resolved.routes.get(m.route)?)))
            else {
                resolved.metrics.http_not_found().inc();
                self.guard.lines.no_route(self.conn.client, &resolved.prepared, req.method(), &path);
                return Err(context(Cause::NoRoute));
            };
            if let Decision::Deny { denied } = slot.get_or_init(|| self.decide(resolved, route)) {
                denied.inc();
                self.guard.lines.denied(Case { read_as: Some(&path), ..self.case(resolved, Some(route)) });
                return Err(context(Cause::Unauthorized));
            }
        }
        Ok(())
    }

    /// The name of which a request may have a ServiceProfile.
    fn profiled<'a>(&self, req: &'a Request<Body>) -> Option<&'a str> {
        let looked_up = self.conn.kind == Kind::App && !self.guard.profiles.is_off();
        logical(req).filter(|_| looked_up)
    }

    /// The profile of the name that a request is for. Clients ask one connection for one name after the other rather
    /// than for many at once, so the last one is kept.
    async fn profile(&self, logical: Option<&str>) -> Option<NameRef> {
        let logical = logical?;
        if let Some(last) = &*self.profile.load()
            && last.0 == logical
        {
            return last.1.clone();
        }
        let found = match is_name(logical) {
            true => self.guard.profiles.of(&logical.to_ascii_lowercase()).await,
            false => None,
        };
        self.profile.store(Some(Arc::new((logical.to_string(), found.clone()))));
        found
    }

    /// Where lines about requests go; none if there is no log, and for the admin server.
    pub(super) fn access(&self) -> Option<&AccessLog> {
        match self.conn.kind {
            Kind::App | Kind::Gateway => Some(&self.guard.access).filter(|log| log.is_on()),
            Kind::Admin => None,
        }
    }

    /// Where endings are counted.
    pub(super) fn telemetry(&self) -> &Telemetry {
        &self.guard.telemetry
    }

    /// Where a failed request's error stops: it is counted and logged.
    pub(super) fn failed(&self, error: &Error) -> Code {
        let (client, target) = (self.conn.client, self.conn.target);
        let code = error.code(Phase::Request);
        self.guard.telemetry.terminated(Direction::Inbound, code);
        match error.cause() {
            // They have families of their own, and were told in full where they were decided.
            Cause::Unauthorized | Cause::NoRoute => return code,
            Cause::Redirect { .. }
            | Cause::InjectedHttp { .. }
            | Cause::InjectedGrpc { .. }
            | Cause::RateLimited { .. } => tracing::debug!(%client, %target, %code, %error, "answered by policy"),
            _ => tracing::info!(%client, %target, %code, %error, "request failed"),
        }
        self.resolved.load().metrics.http_errors().failed(error.cause());
        code
    }

    /// The policy in force, brought up to date if it has changed. No lock is taken.
    fn resolved(&self) -> Arc<Resolved> {
        let resolved = self.resolved.load_full();
        let prepared = self.conn.port.current();
        if Arc::ptr_eq(&resolved.prepared, &prepared) {
            return resolved;
        }
        let resolved = Arc::new(Resolved::new(&self.guard, &self.conn, prepared.clone()));
        self.resolved.store(resolved.clone());
        resolved
    }

    fn decide(&self, resolved: &Resolved, route: &Route) -> Decision {
        let ip = self.conn.client.ip();
        let permit = route.authorizations.iter().enumerate().find(|(_, authz)| authz.permits(ip, &self.conn.tls));
        let Some((authz, permit)) = permit else {
            return Decision::Deny { denied: resolved.metrics.http_deny(&route.meta) };
        };
        let route_metrics = (self.conn.kind == Kind::App).then(|| {
            let labels = InboundRouteLabels {
                parent: resolved.prepared.policy.meta.clone(),
                parent_port: self.conn.port.number(),
                route: route.meta.clone(),
            };
            let kind = match resolved.prepared.policy.protocol {
                Protocol::Grpc(_) => RouteKind::Grpc,
                _ => RouteKind::Http,
            };
            self.guard.telemetry.inbound_route(kind, labels)
        });
        Decision::Allow {
            allowed: resolved.metrics.http_allow(&route.meta, &permit.meta),
            handles: Handles {
                // What passes through the gateway counts as outbound (metrics.md 5.3).
                endpoint: (self.conn.kind != Kind::Gateway).then(|| self.endpoint(resolved, route, authz, None)),
                edge: (self.conn.kind != Kind::Gateway).then(|| self.guard.telemetry.clone()),
                route: route_metrics,
                profile: None,
            },
            audit: permit.audit,
            authz,
        }
    }

    /// What is known of a request that a route let through, for those who tap.
    fn about(&self, resolved: &Resolved, route: &Route, authz: usize) -> About {
        let about = About::inbound(self.conn.client, &self.conn.tls, self.conn.target)
            .caused_by("srv", &resolved.prepared.policy.meta)
            .caused_by("route", &route.meta);
        match route.authorizations.get(authz) {
            Some(authz) => about.caused_by("authz", &authz.meta),
            None => about,
        }
    }

    fn endpoint(
        &self,
        resolved: &Resolved,
        route: &Route,
        authz: usize,
        authority: Option<Arc<str>>,
    ) -> Arc<crate::telemetry::EndpointMetrics> {
        let policy = &resolved.prepared.policy;
        self.guard.telemetry.endpoint(EndpointLabels::Inbound {
            authority,
            target: self.conn.target,
            tls: self.conn.tls.clone(),
            srv: policy.meta.clone(),
            srv_port: self.conn.port.number(),
            route: route.meta.clone(),
            authz: route.authorizations.get(authz).map_or_else(|| policy.meta.clone(), |authz| authz.meta.clone()),
        })
    }

    /// Handles with the `authority` label of the `unsafe` setting, looked up per request.
    fn labelled(
        &self,
        resolved: &Resolved,
        route: &Route,
        authz: usize,
        handles: &Handles,
        req: &Request<Body>,
    ) -> Handles {
        match (self.conn.kind, logical(req).filter(|name| is_name(name))) {
            (Kind::App, Some(name)) => {
                let name = name.trim_end_matches('.').to_ascii_lowercase().into();
                Handles { endpoint: Some(self.endpoint(resolved, route, authz, Some(name))), ..handles.clone() }
            }
            _ => handles.clone(),
        }
    }

    fn case<'a>(&'a self, resolved: &'a Resolved, route: Option<&'a Route>) -> Case<'a> {
        Case {
            client: self.conn.client,
            tls: &self.conn.tls,
            server: &resolved.prepared.policy.meta,
            route: route.map(|route| &route.meta),
            read_as: None,
            authorizations: route.map_or(&[], |route| &route.authorizations),
        }
    }
}

impl Resolved {
    /// Takes what a request takes of the rate limits.
    fn limit(&self) -> Result<(), Error> {
        let (Some(limits), Some(share)) = (&self.prepared.limits, &self.share) else { return Ok(()) };
        limits.check(share).inspect_err(|error| {
            if let Cause::RateLimited { scope, .. } = error.cause() {
                self.metrics.rate_limited(limits.policy().meta.as_ref(), *scope).inc();
            }
        })
    }

    fn new(guard: &Guard, conn: &Connection, prepared: Arc<Prepared>) -> Self {
        let metrics = guard.telemetry.inbound_server(ServerLabels {
            target: conn.target,
            srv: prepared.policy.meta.clone(),
            srv_port: conn.port.number(),
            tls: conn.tls.clone(),
        });
        let routes = match policy::http(&prepared.policy) {
            HttpRoutes::Routes(routes) => routes.len(),
            HttpRoutes::Invalid(_) => 0,
        };
        Self {
            metrics,
            share: prepared.limits.as_ref().map(|limits| limits.share(conn.tls.client_id())),
            routes: (0..routes).map(|_| OnceLock::new()).collect(),
            prepared,
        }
    }
}

/// The head of a request that may open a tunnel, to be judged again.
fn upgrade_head(req: &Request<Body>) -> Option<Request<()>> {
    if req.method() != Method::CONNECT && !normalize::is_upgrade(req) {
        return None;
    }
    let mut head = Request::new(());
    *head.method_mut() = req.method().clone();
    *head.uri_mut() = req.uri().clone();
    *head.headers_mut() = req.headers().clone();
    Some(head)
}

/// Ends when a tunnel that a request opened would not be opened any more.
async fn revoked(guard: Arc<Guard>, conn: Connection, head: Request<()>) {
    let mut changes = conn.port.changes();
    loop {
        let policy = changes.borrow_and_update().clone();
        let route = match policy::http(&policy) {
            HttpRoutes::Routes(routes) => {
                best_match(candidates(routes), policy.precedence, &head).and_then(|found| routes.get(found.route))
            }
            HttpRoutes::Invalid(_) => None,
        };
        let authorizations = route.map_or(&[][..], |route| &route.authorizations);
        if !authorizations.iter().any(|authz| authz.permits(conn.client.ip(), &conn.tls)) {
            let labels = ServerLabels {
                target: conn.target,
                srv: policy.meta.clone(),
                srv_port: conn.port.number(),
                tls: conn.tls.clone(),
            };
            guard.telemetry.inbound_server(labels).tcp_terminate().inc();
            guard.telemetry.terminated(Direction::Inbound, Code::PolicyRevoked);
            guard.lines.terminated(Case {
                client: conn.client,
                tls: &conn.tls,
                server: &policy.meta,
                route: route.map(|route| &route.meta),
                read_as: None,
                authorizations,
            });
            return;
        }
        if changes.changed().await.is_err() {
            // The source is gone; its last word stays in force.
            return pending().await;
        }
    }
}

/// Routes, as they are matched.
fn candidates(routes: &[Route]) -> impl Iterator<Item = (&[HostMatch], impl Iterator<Item = &[RouteMatch]>)> {
    routes.iter().map(|route| (&*route.hosts, route.rules.iter().map(|rule| &*rule.matches)))
}

/// What a request is for: `l5d-dst-canonical` if that is a name, else the authority, else Host.
fn logical<B>(req: &Request<B>) -> Option<&str> {
    let header = |name: &str| req.headers().get(name).and_then(|value| value.to_str().ok());
    header("l5d-dst-canonical")
        .filter(|name| is_name(name))
        .or_else(|| req.uri().authority().map(|authority| authority.as_str()))
        .or_else(|| header("host"))
}

/// Whether `host[:port]` names its host: no address.
fn is_name(authority: &str) -> bool {
    let host = authority.rsplit_once(':').map_or(authority, |(host, _)| host);
    !host.is_empty()
        && host.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_'))
        && host.parse::<std::net::Ipv4Addr>().is_err()
}
