//! What the application asked for over HTTP: the routes of its destination, made ready to run and made again when the
//! policy changes. Backends, budgets and limits that stay the same are carried over, so that replicas, connections and
//! requests in flight do not notice (behaviour.md D.2 to D.4).

use super::{
    Runtime,
    concrete::{Concrete, Distribution, Replicas, Settings},
    endpoint::{HttpEndpoint, Kind},
    params::Params,
    rule::{Counted, MIRRORS_IN_FLIGHT, Mirroring, ProfileRule, Rule, RuleBackend},
    tracked::Tracked,
};
use crate::{
    error::{Cause, Error, RateLimitScope},
    http::{Asked, Match, best_match, classify},
    policy::{
        self, ClientPolicy, Meta, Target,
        client::{self, Backend, Breaker, Dispatcher, Http, Profile, Protocol, RequestCondition, Routes},
        route::{Filter, Precedence},
        server::RateLimit,
    },
    tap,
    telemetry::{self, BackendLabels, BalancerKind, Direction, ProfileRouteLabels, RouteKind, RouteLabels},
};
use http::{HeaderValue, Request, Response, StatusCode, uri::Authority};
use linkerd_stack::{
    budget::Budget,
    http::{Body, Version, normalize},
    rate::Limiter,
};
use std::{collections::HashMap, num::NonZeroU32, sync::Arc};
use tokio::sync::Semaphore;

/// The routes of a destination for one version of HTTP.
pub(super) struct HttpRoutes {
    /// `logical service <meta>`.
    context: Arc<str>,
    /// For requests that name none.
    authority: Option<Authority>,
    limits: Vec<Limit>,
    table: Table,
}

struct Limit {
    limiter: Limiter,
    scope: RateLimitScope,
    rps: u32,
}

enum Table {
    Routes {
        routes: Arc<[client::Route]>,
        precedence: Precedence,
        grpc: bool,
        /// By route and rule.
        rules: Vec<Vec<Rule>>,
    },
    Profile {
        profile: Arc<Profile>,
        /// In the order of the profile's routes.
        rules: Vec<Rule>,
        otherwise: Rule,
    },
    Invalid(Arc<str>),
}

impl HttpRoutes {
    /// Runs a request. Dropping the future cancels it.
    ///
    /// # Errors
    /// Whatever is no answer of a replica: see [`crate::http::rescue`].
    pub(super) async fn call(&self, req: Request<Body>, asked: &Asked) -> Result<Response<Tracked>, Error> {
        self.route(req, asked).await.map_err(|error| error.context(self.context.clone()))
    }

    /// Every rule there is.
    pub(super) fn rules(&self) -> Box<dyn Iterator<Item = &Rule> + '_> {
        match &self.table {
            Table::Routes { rules, .. } => Box::new(rules.iter().flatten()),
            Table::Profile { rules, otherwise, .. } => Box::new(rules.iter().chain([otherwise])),
            Table::Invalid(_) => Box::new(std::iter::empty()),
        }
    }

    async fn route(&self, mut req: Request<Body>, asked: &Asked) -> Result<Response<Tracked>, Error> {
        normalize::request(&mut req, self.authority.as_ref()).map_err(|_| Error::new(Cause::MissingAuthority))?;
        for limit in &self.limits {
            limit.limiter.check().map_err(|retry_after| Cause::RateLimited {
                scope: limit.scope,
                rps: limit.rps,
                retry_after,
            })?;
        }
        match &self.table {
            Table::Routes { routes, precedence, grpc, rules } => {
                let candidates = routes.iter().map(|r| (&*r.hosts, r.rules.iter().map(|rule| &*rule.matches)));
                let matched = best_match(candidates, *precedence, &req);
                let rule = matched.as_ref().and_then(|m| rules.get(m.route)?.get(m.rule));
                match (&matched, rule) {
                    (Some(matched), Some(rule)) => rule.call(req, matched, asked).await,
                    _ => Err(no_route(*grpc && asked.grpc, *precedence)),
                }
            }
            Table::Profile { profile, rules, otherwise } => {
                let found = profile.routes.iter().position(|route| holds(&route.condition, &req));
                let rule = found.and_then(|i| rules.get(i)).unwrap_or(otherwise);
                let matched =
                    Match { route: found.unwrap_or(0), rule: 0, prefix: None, precedence: Precedence::Linkerd };
                rule.call(req, &matched, asked).await
            }
            Table::Invalid(why) => Err(Cause::InvalidPolicy(why.clone()).into()),
        }
    }
}

/// The Gateway API says that an unmatched gRPC call is UNIMPLEMENTED, 12 (resources.md 3.5).
fn no_route(grpc: bool, precedence: Precedence) -> Error {
    match (grpc, precedence) {
        (true, Precedence::GatewayApi) => {
            Cause::InjectedGrpc { code: 12, message: "no route found for request".into() }.into()
        }
        (false, _) | (true, Precedence::Linkerd) => Cause::NoRoute.into(),
    }
}

fn holds<B>(condition: &RequestCondition, req: &Request<B>) -> bool {
    match condition {
        RequestCondition::All(all) => all.iter().all(|c| holds(c, req)),
        RequestCondition::Any(any) => any.iter().any(|c| holds(c, req)),
        RequestCondition::Not(not) => !holds(not, req),
        RequestCondition::Path(regex) => {
            let path = req.uri().path();
            regex.find(path).is_some_and(|found| found.len() == path.len())
        }
        RequestCondition::Method(method) => method == req.method(),
    }
}

/// Makes [`HttpRoutes`] of policies, and remembers what can be used again.
pub(super) struct Builder {
    rt: Arc<Runtime>,
    target: Target,
    version: Version,
    backends: HashMap<Meta, Vec<(BackendKey, Arc<Concrete<HttpEndpoint>>)>>,
    budgets: Vec<(client::Budget, Arc<Budget>)>,
    limits: Option<(Arc<RateLimit>, Vec<Limiter>)>,
}

/// Backends with equal keys share replicas.
#[derive(Clone, PartialEq)]
struct BackendKey {
    parent: Meta,
    backend: Backend,
    breaker: Breaker,
    grpc: bool,
}

/// One building: what it uses of the last one, and what it leaves for the next.
struct Building<'a> {
    builder: &'a Builder,
    policy: &'a ClientPolicy,
    backends: HashMap<Meta, Vec<(BackendKey, Arc<Concrete<HttpEndpoint>>)>>,
    budgets: Vec<(client::Budget, Arc<Budget>)>,
}

impl Builder {
    pub(super) fn new(rt: Arc<Runtime>, target: Target, version: Version) -> Self {
        Self { rt, target, version, backends: HashMap::new(), budgets: Vec::new(), limits: None }
    }

    /// The routes of a policy; none if it has none for this version of HTTP.
    pub(super) fn build(&mut self, policy: &ClientPolicy) -> Option<HttpRoutes> {
        let http = match (&policy.protocol, self.version) {
            (Protocol::Detect { http1, .. }, Version::H1) => Ok(http1),
            (Protocol::Detect { http2, .. }, Version::H2) => Ok(http2),
            (Protocol::Http1(http), Version::H1) => Ok(http),
            (Protocol::Http2(http) | Protocol::Grpc(http), Version::H2) => Ok(http),
            (Protocol::Invalid(why), _) => Err(why),
            (
                Protocol::Http1(_) | Protocol::Http2(_) | Protocol::Grpc(_) | Protocol::Opaque(_) | Protocol::Tls(_),
                _,
            ) => return None,
        };
        let http = match http {
            Ok(http) => http,
            Err(why) => return Some(self.invalid(policy, why)),
        };
        let mut building = Building { builder: self, policy, backends: HashMap::new(), budgets: Vec::new() };
        let (table, authority) = building.table(http);
        let Building { backends, budgets, .. } = building;
        self.backends = backends;
        self.budgets = budgets;
        let authority = authority.or_else(|| default_authority(&self.target));
        Some(HttpRoutes { context: context(&policy.parent), authority, limits: self.limits(policy), table })
    }

    /// Answers 500 to everything.
    pub(super) fn invalid(&self, policy: &ClientPolicy, why: &Arc<str>) -> HttpRoutes {
        HttpRoutes {
            context: context(&policy.parent),
            authority: default_authority(&self.target),
            limits: Vec::new(),
            table: Table::Invalid(why.clone()),
        }
    }

    /// The limits of a policy; their buckets are kept as long as the limits stay the same. The application has no
    /// identity of its own here, so it has the bucket of clients without one.
    fn limits(&mut self, policy: &ClientPolicy) -> Vec<Limit> {
        let Some(limit) = &policy.rate_limit else {
            self.limits = None;
            return Vec::new();
        };
        let wanted = [(limit.total, RateLimitScope::Total), (limit.identity, RateLimitScope::Identity)];
        let wanted: Vec<_> = wanted
            .into_iter()
            .filter_map(|(rps, scope)| rps.and_then(NonZeroU32::new).map(|rps| (rps, scope)))
            .collect();
        let limiters = match &self.limits {
            Some((last, limiters)) if **last == **limit => limiters.clone(),
            _ => wanted.iter().map(|(rps, _)| Limiter::new(*rps)).collect(),
        };
        self.limits = Some((limit.clone(), limiters.clone()));
        let limit = |((rps, scope), limiter): ((NonZeroU32, _), _)| Limit { limiter, scope, rps: rps.get() };
        wanted.into_iter().zip(limiters).map(limit).collect()
    }
}

fn context(parent: &Meta) -> Arc<str> {
    format!("logical service {parent}").into()
}

/// What a request without an authority is for (behaviour.md E.4).
fn default_authority(target: &Target) -> Option<Authority> {
    let text = match target {
        Target::Addr(addr) if addr.port() == 80 && addr.is_ipv4() => addr.ip().to_string(),
        Target::Addr(addr) if addr.port() == 80 => format!("[{}]", addr.ip()),
        Target::Addr(addr) => addr.to_string(),
        Target::Name(name, 80) => name.to_string(),
        Target::Name(name, port) => format!("{name}:{port}"),
    };
    Authority::try_from(text).ok()
}

impl Building<'_> {
    fn table(&mut self, http: &Http) -> (Table, Option<Authority>) {
        let (routes, precedence, grpc) = match &http.routes {
            Routes::Http(routes, precedence) => (routes, *precedence, false),
            Routes::Grpc(routes, precedence) => (routes, *precedence, true),
            Routes::Profile(profile) => {
                let authority = Authority::try_from(&*profile.addr).ok();
                return (self.profile(profile, &http.breaker), authority);
            }
        };
        let rule = |(route, rule): (&client::Route, &client::Rule)| {
            self.rule(&route.meta, rule, precedence, grpc, &http.breaker)
        };
        let mut rule = rule;
        let rules = routes.iter().map(|route| route.rules.iter().map(|r| rule((route, r))).collect()).collect();
        (Table::Routes { routes: routes.clone(), precedence, grpc, rules }, None)
    }

    fn rule(
        &mut self,
        route: &Meta,
        rule: &client::Rule,
        precedence: Precedence,
        grpc: bool,
        breaker: &Breaker,
    ) -> Rule {
        let rt = self.builder.rt.clone();
        let kind = if grpc { RouteKind::Grpc } else { RouteKind::Http };
        let parent = &self.policy.parent;
        let labels = RouteLabels { parent: parent.clone(), route: route.clone(), hostname: None };
        let metrics = Counted::Policy {
            metrics: rt.telemetry.outbound_route(kind, labels.clone()),
            hostnames: rt.config.hostname_labels.then_some(labels),
        };
        let backends = self.distribution(&rule.backends, |this, backend| {
            let labels = BackendLabels {
                parent: this.policy.parent.clone(),
                route: route.clone(),
                backend: backend.backend.meta.clone(),
            };
            RuleBackend {
                context: format!("backend {}", backend.backend.meta).into(),
                filters: backend.filters.clone(),
                mirrors: this.mirrors(&backend.filters, breaker, grpc),
                concrete: this.concrete(&backend.backend, breaker, grpc),
                metrics: Some(this.builder.rt.telemetry.outbound_backend(kind, labels)),
            }
        });
        let empty = match precedence {
            Precedence::Linkerd => StatusCode::SERVICE_UNAVAILABLE,
            // resources.md 3.6: all weights 0, or no backend.
            Precedence::GatewayApi => StatusCode::INTERNAL_SERVER_ERROR,
        };
        Rule {
            context: format!("route {route}").into(),
            filters: rule.filters.clone(),
            mirrors: self.mirrors(&rule.filters, breaker, grpc),
            backends,
            empty: Cause::FailBackend {
                status: empty,
                grpc_code: 14,
                message: "the route has no backend with a weight above 0".into(),
            },
            params: Params { timeouts: rule.timeouts, retry: rule.retry.clone() },
            budget: rule.retry.as_ref().and_then(|retry| retry.budget).map(|budget| self.budget(budget)),
            allow_l5d_headers: rule.allow_l5d_headers,
            session: rule.session.clone(),
            grpc,
            metrics,
            rt,
        }
    }

    fn profile(&mut self, profile: &Arc<Profile>, breaker: &Breaker) -> Table {
        let none = client::ProfileRoute {
            condition: RequestCondition::All(Vec::new()),
            classes: Vec::new(),
            labels: Default::default(),
            retryable: false,
            timeout: None,
        };
        let canonical = HeaderValue::try_from(&*profile.addr).ok();
        let budget = profile.budget.map(|budget| self.budget(budget));
        let mut rule = |route: &client::ProfileRoute| {
            let rt = self.builder.rt.clone();
            let targets = policy::client::Distribution::RandomAvailable(
                profile
                    .targets
                    .iter()
                    .map(|(backend, weight)| {
                        (client::RouteBackend { filters: Vec::<Filter>::new(), backend: backend.clone() }, *weight)
                    })
                    .collect(),
            );
            let backends = self.distribution(&targets, |this, backend| RuleBackend {
                context: format!("backend {}", backend.backend.meta).into(),
                filters: Vec::new(),
                mirrors: Vec::new(),
                concrete: this.concrete(&backend.backend, breaker, false),
                metrics: None,
            });
            let metrics = rt.telemetry.profile_route(ProfileRouteLabels {
                direction: Direction::Outbound,
                dst: profile.addr.clone(),
                labels: route.labels.iter().map(|(k, v)| (k.clone(), v.clone())).collect(),
            });
            Rule {
                context: "route of the service profile".into(),
                filters: Vec::new(),
                mirrors: Vec::new(),
                backends,
                empty: Cause::FailBackend {
                    status: StatusCode::SERVICE_UNAVAILABLE,
                    grpc_code: 14,
                    message: "the service profile has no destination".into(),
                },
                params: Params::default(),
                budget: budget.clone().filter(|_| route.retryable),
                allow_l5d_headers: false,
                session: None,
                grpc: false,
                metrics: Counted::Profile(ProfileRule {
                    metrics,
                    classes: (!route.classes.is_empty())
                        .then(|| classify::Rule::Profile(route.classes.iter().cloned().collect())),
                    timeout: route.timeout,
                    // Without a budget a retry has no bound.
                    retryable: route.retryable && budget.is_some(),
                    canonical: canonical.clone(),
                    labels: tap::Route(Arc::new(route.labels.clone())),
                }),
                rt,
            }
        };
        let rules = profile.routes.iter().map(&mut rule).collect();
        let otherwise = rule(&none);
        Table::Profile { profile: profile.clone(), rules, otherwise }
    }

    fn distribution<F>(
        &mut self,
        distribution: &client::Distribution<F>,
        mut build: impl FnMut(&mut Self, &client::RouteBackend<F>) -> RuleBackend,
    ) -> Distribution<RuleBackend> {
        distribution_of(distribution, |backend| build(self, backend))
    }

    fn mirrors(&mut self, filters: &[Filter], breaker: &Breaker, grpc: bool) -> Vec<Mirroring> {
        let mirrors = filters.iter().filter_map(|filter| match filter {
            Filter::Mirror(mirror) => Some((mirror.backend.as_ref()?, mirror.ratio)),
            _ => None,
        });
        mirrors
            .map(|(backend, ratio)| Mirroring {
                ratio,
                concrete: self.concrete(backend, breaker, grpc),
                in_flight: Arc::new(Semaphore::new(MIRRORS_IN_FLIGHT)),
            })
            .collect()
    }

    fn budget(&mut self, budget: client::Budget) -> Arc<Budget> {
        let known = |budgets: &[(client::Budget, Arc<Budget>)]| {
            budgets.iter().find(|(b, _)| *b == budget).map(|(_, shared)| shared.clone())
        };
        if let Some(shared) = known(&self.budgets) {
            return shared;
        }
        let shared = known(&self.builder.budgets)
            .unwrap_or_else(|| Arc::new(Budget::new(budget.ratio, budget.min_per_second, budget.ttl)));
        self.budgets.push((budget, shared.clone()));
        shared
    }

    fn concrete(&mut self, backend: &Backend, breaker: &Breaker, grpc: bool) -> Arc<Concrete<HttpEndpoint>> {
        let key =
            BackendKey { parent: self.policy.parent.clone(), backend: backend.clone(), breaker: breaker.clone(), grpc };
        let find = |known: &HashMap<Meta, Vec<(BackendKey, Arc<Concrete<HttpEndpoint>>)>>| {
            known.get(&backend.meta)?.iter().find(|(k, _)| *k == key).map(|(_, concrete)| concrete.clone())
        };
        if let Some(concrete) = find(&self.backends) {
            return concrete;
        }
        let kept = find(&self.builder.backends).filter(|concrete| concrete.is_usable());
        let concrete = kept.unwrap_or_else(|| Arc::new(self.build(&key)));
        self.backends.entry(backend.meta.clone()).or_default().push((key, concrete.clone()));
        concrete
    }

    fn build(&self, key: &BackendKey) -> Concrete<HttpEndpoint> {
        let rt = &self.builder.rt;
        let queue = rt.config.http_queue;
        let kind = |authority, breaker, penalty, forward| Kind {
            rt: rt.clone(),
            authority,
            http2: self.builder.version == Version::H2,
            grpc: key.grpc,
            breaker,
            penalty,
            forward,
        };
        match &key.backend.dispatcher {
            Dispatcher::Fail(failure) => Concrete::Fail(failure.clone()),
            Dispatcher::Forward(endpoint) => {
                let settings = Settings { load: client::Load::default(), queue, observer: Arc::new(()) };
                let replica = HttpEndpoint::new(&kind(None, Breaker::None, None, true), endpoint);
                Concrete::Replicas(Replicas::known(endpoint, settings, replica))
            }
            Dispatcher::Balance { discovery, load } => {
                let labels =
                    BalancerKind::OutboundHttp { parent: key.parent.clone(), backend: key.backend.meta.clone() };
                let observer = rt.telemetry.balancer(&labels, queue.failfast_timeout);
                let settings = Settings { load: load.clone(), queue, observer };
                let kind = kind(Some(authority_label(discovery)), key.breaker.clone(), load.penalty.clone(), false);
                let build = move |endpoint: &policy::Endpoint| HttpEndpoint::new(&kind, endpoint);
                Concrete::Replicas(Replicas::discovered(rt, discovery, settings, build))
            }
        }
    }
}

/// A policy's distribution with its backends made ready. Backends of weight 0 take nothing; they are not even made
/// (resources.md 3.6).
pub(super) fn distribution_of<F, B>(
    distribution: &client::Distribution<F>,
    mut build: impl FnMut(&client::RouteBackend<F>) -> B,
) -> Distribution<B> {
    match distribution {
        client::Distribution::Empty => Distribution::Empty,
        client::Distribution::FirstAvailable(backends) => Distribution::First(backends.iter().map(build).collect()),
        client::Distribution::RandomAvailable(backends) => {
            let some = backends.iter().filter(|(_, weight)| *weight > 0);
            let backends: Box<[_]> = some.map(|(backend, weight)| (build(backend), *weight)).collect();
            if backends.is_empty() { Distribution::Empty } else { Distribution::Random(backends) }
        }
    }
}

/// The label `authority` for a discovery key `host:port`.
pub(super) fn authority_label(discovery: &str) -> Arc<str> {
    match discovery.rsplit_once(':').and_then(|(name, port)| Some((name, port.parse().ok()?))) {
        Some((name, port)) => telemetry::authority(name, port),
        None => discovery.into(),
    }
}
