//! Client policies (behaviour.md D.4, D.5, D.9 to D.12).

use super::{Inside, Invalid, destination, duration, limit, list, meta, non_empty, optional, required, route};
use crate::policy::{
    Meta,
    client::{
        Backend, Backoff, Breaker, Dispatcher, Distribution, Failure, Http, Load, Opaque, Penalty, Protocol, Refuse,
        Retry, Route, RouteBackend, Routes, Rule, TcpRoute, Timeouts, Tls,
    },
    route::{Filter, HostMatch, Precedence},
};
use http::StatusCode;
use linkerd2_proxy_api::{http_route as shared, outbound as api};
use std::{collections::HashMap, ops::RangeInclusive, time::Duration};

/// Defaults of the penalizing load metric (behaviour.md D.4).
const DEFAULT_RTT: Duration = Duration::from_millis(30);
const DEFAULT_DECAY: Duration = Duration::from_secs(10);
const DEFAULT_PENALTY: Duration = Duration::from_secs(5);
const DEFAULT_MAX_RETRY_AFTER: Duration = Duration::from_secs(300);
/// Defaults and bounds of the unified breaker (behaviour.md D.10).
const DEFAULT_WINDOW: Duration = Duration::from_secs(10);
const MIN_WINDOW: Duration = Duration::from_millis(10);
const MAX_MIN_REQUESTS: u32 = 1_000_000;
/// Largest jitter ratio of a backoff.
const MAX_JITTER: f64 = 100.0;
/// HTTP statuses that a retry condition may name (behaviour.md D.4).
const STATUSES: RangeInclusive<u32> = 1..=599;

/// A policy's name and content.
pub(crate) fn policy(message: api::OutboundPolicy) -> Result<(Meta, Protocol), Invalid> {
    let api::OutboundPolicy { protocol, metadata } = message;
    let meta = required("metadata", metadata, meta::strict)?;
    let protocol = required("protocol", protocol, |protocol| required("kind", protocol.kind, self::protocol))?;
    Ok((meta, protocol))
}

fn protocol(kind: api::proxy_protocol::Kind) -> Result<Protocol, Invalid> {
    use api::proxy_protocol::{Detect, Grpc, Http1, Http2, Kind};
    let http1 = |m: Http1| http("http1", m.routes, m.failure_accrual);
    let http2 = |m: Http2| http("http2", m.routes, m.failure_accrual);
    Ok(match kind {
        Kind::Detect(Detect { timeout, opaque, http1: first, http2: second }) => Protocol::Detect {
            timeout: required("timeout", timeout, duration).inside("detect")?,
            http1: http1(first.ok_or_else(|| missing("http1"))?).inside("detect")?,
            http2: http2(second.ok_or_else(|| missing("http2"))?).inside("detect")?,
            opaque: self::opaque(opaque.ok_or_else(|| missing("opaque"))?).inside("detect")?,
        },
        Kind::Opaque(message) => Protocol::Opaque(opaque(message)?),
        Kind::Http1(message) => Protocol::Http1(http1(message)?),
        Kind::Http2(message) => Protocol::Http2(http2(message)?),
        Kind::Grpc(Grpc { routes, failure_accrual }) => {
            let routes = list("routes", routes, grpc_route).inside("grpc")?;
            let breaker = breaker(failure_accrual).inside("grpc")?;
            Protocol::Grpc(Http { routes: Routes::Grpc(routes.into(), Precedence::Linkerd), breaker })
        }
        Kind::Tls(message) => {
            let routes = list("routes", message.routes, tls_route).inside("tls")?;
            Protocol::Tls(Tls { routes: routes.into() })
        }
    })
}

fn missing(field: &str) -> Invalid {
    Invalid::new("missing").inside(field).inside("detect")
}

fn http(
    field: &str,
    routes: Vec<api::HttpRoute>,
    failure_accrual: Option<api::FailureAccrual>,
) -> Result<Http, Invalid> {
    let routes = list("routes", routes, http_route).inside(field)?;
    let breaker = breaker(failure_accrual).inside(field)?;
    Ok(Http { routes: Routes::Http(routes.into(), Precedence::Linkerd), breaker })
}

/// The messages for HTTP and for gRPC differ in nothing but what they match, filter and retry by.
macro_rules! route {
    ($route:ident, $message:ident, $rule:ident, $module:ident, $match:expr, $filter:expr, $distribution:expr, $retry:expr) => {
        fn $route(message: api::$message) -> Result<Route, Invalid> {
            let api::$message { metadata, hosts, rules } = message;
            Ok(Route {
                meta: required("metadata", metadata, meta::strict)?,
                hosts: list("hosts", hosts, route::host)?,
                rules: list("rules", rules, $rule)?,
            })
        }

        fn $rule(message: api::$module::Rule) -> Result<Rule, Invalid> {
            #[allow(deprecated)]
            let api::$module::Rule {
                matches,
                filters,
                backends,
                request_timeout,
                timeouts,
                retry,
                allow_l5d_request_headers,
            } = message;
            Ok(Rule {
                matches: list("matches", matches, $match)?,
                filters: list("filters", filters, $filter)?,
                backends: required("backends", backends, $distribution)?,
                timeouts: self::timeouts(timeouts, request_timeout)?,
                retry: optional("retry", retry, $retry)?,
                allow_l5d_headers: allow_l5d_request_headers,
                session: None,
            })
        }
    };
}

route!(http_route, HttpRoute, http_rule, http_route, route::http_match, http_filter, http_distribution, http_retry);
route!(grpc_route, GrpcRoute, grpc_rule, grpc_route, route::grpc_match, grpc_filter, grpc_distribution, grpc_retry);

fn http_filter(message: api::http_route::Filter) -> Result<Filter, Invalid> {
    use api::http_route::filter::Kind;
    match message.kind {
        Some(Kind::FailureInjector(m)) => route::http_failure(m).inside("failure_injector"),
        Some(Kind::RequestHeaderModifier(m)) => route::request_headers(m).inside("request_header_modifier"),
        Some(Kind::ResponseHeaderModifier(m)) => route::response_headers(m).inside("response_header_modifier"),
        Some(Kind::Redirect(m)) => route::redirect(m).inside("redirect"),
        None => Ok(route::unknown_filter("client")),
    }
}

fn grpc_filter(message: api::grpc_route::Filter) -> Result<Filter, Invalid> {
    use api::grpc_route::filter::Kind;
    match message.kind {
        Some(Kind::FailureInjector(m)) => route::grpc_failure(m).inside("failure_injector"),
        Some(Kind::RequestHeaderModifier(m)) => route::request_headers(m).inside("request_header_modifier"),
        None => Ok(route::unknown_filter("client")),
    }
}

fn opaque(message: api::proxy_protocol::Opaque) -> Result<Opaque, Invalid> {
    let mut routes = list("routes", message.routes, opaque_route).inside("opaque")?;
    if routes.len() > 1 {
        return Err(Invalid::new(format!("{} routes, at most one is possible", routes.len())).inside("opaque"));
    }
    Ok(Opaque { route: routes.pop() })
}

/// Any filter refuses connections; the first says why.
fn opaque_route(message: api::OpaqueRoute) -> Result<TcpRoute, Invalid> {
    let api::OpaqueRoute { metadata, rules } = message;
    let meta = required("metadata", metadata, meta::strict)?;
    let (filters, backends) = only_rule(rules.into_iter().map(|rule| (rule.filters, rule.backends)).collect())?;
    let filters = list("filters", filters, opaque_filter).inside("rules[0]")?;
    let backends = required("backends", backends, opaque_distribution).inside("rules[0]")?;
    Ok(TcpRoute { meta, refuse: filters.into_iter().next(), backends })
}

fn tls_route(message: api::TlsRoute) -> Result<(Vec<HostMatch>, TcpRoute), Invalid> {
    let api::TlsRoute { metadata, snis, rules } = message;
    let meta = required("metadata", metadata, meta::strict)?;
    let snis = list("snis", snis, route::sni)?;
    let (filters, backends) = only_rule(rules.into_iter().map(|rule| (rule.filters, rule.backends)).collect())?;
    let filters = list("filters", filters, tls_filter).inside("rules[0]")?;
    let backends = required("backends", backends, tls_distribution).inside("rules[0]")?;
    Ok((snis, TcpRoute { meta, refuse: filters.into_iter().next(), backends }))
}

/// Opaque and TLS routes have exactly one rule (behaviour.md D.9).
fn only_rule<T>(rules: Vec<T>) -> Result<T, Invalid> {
    let n = rules.len();
    let mut rules = rules.into_iter();
    match (rules.next(), rules.next()) {
        (Some(rule), None) => Ok(rule),
        _ => Err(Invalid::new(format!("{n} rules, exactly one is needed")).inside("rules")),
    }
}

fn opaque_filter(message: api::opaque_route::Filter) -> Result<Refuse, Invalid> {
    use api::opaque_route::filter::Kind;
    Ok(match message.kind {
        Some(Kind::Forbidden(_)) => Refuse::Forbidden,
        Some(Kind::Invalid(invalid)) => Refuse::Invalid(invalid.message.into()),
        None => unknown_refusal(),
    })
}

fn tls_filter(message: api::tls_route::Filter) -> Result<Refuse, Invalid> {
    use api::tls_route::filter::Kind;
    Ok(match message.kind {
        Some(Kind::Forbidden(_)) => Refuse::Forbidden,
        Some(Kind::Invalid(invalid)) => Refuse::Invalid(invalid.message.into()),
        None => unknown_refusal(),
    })
}

fn unknown_refusal() -> Refuse {
    Refuse::Invalid("client policy configured with unknown filter".into())
}

/// The four messages for distributions differ in nothing but their filters.
macro_rules! distribution {
    ($name:ident, $module:ident, $filter:ty, $convert:expr) => {
        fn $name(message: api::$module::Distribution) -> Result<Distribution<$filter>, Invalid> {
            use api::$module::{RouteBackend as Proto, distribution::Kind};
            let one = |message: Proto| -> Result<RouteBackend<$filter>, Invalid> {
                let backend = required("backend", message.backend, backend)?;
                Ok(RouteBackend { filters: list("filters", message.filters, $convert)?, backend })
            };
            required("kind", message.kind, |kind| match kind {
                Kind::Empty(_) => Ok(Distribution::Empty),
                Kind::FirstAvailable(m) => {
                    let backends = non_empty("backends", m.backends, one).inside("first_available")?;
                    Ok(Distribution::FirstAvailable(backends.into()))
                }
                Kind::RandomAvailable(m) => {
                    let backends =
                        non_empty("backends", m.backends, |m| Ok((required("backend", m.backend, one)?, m.weight)));
                    Ok(random(backends.inside("random_available")?))
                }
            })
        }
    };
}

distribution!(http_distribution, http_route, Filter, http_filter);
distribution!(grpc_distribution, grpc_route, Filter, grpc_filter);
distribution!(opaque_distribution, opaque_route, Refuse, opaque_filter);
distribution!(tls_distribution, tls_route, Refuse, tls_filter);

/// A single backend takes everything whatever its weight; several that all weigh nothing are none (behaviour.md D.5).
fn random<F>(mut backends: Vec<(RouteBackend<F>, u32)>) -> Distribution<F> {
    if backends.len() == 1 {
        let only: Vec<_> = backends.drain(..).map(|(backend, _)| backend).collect();
        return Distribution::FirstAvailable(only.into());
    }
    if backends.iter().all(|(_, weight)| *weight == 0) {
        return Distribution::Empty;
    }
    Distribution::RandomAvailable(backends.into())
}

/// A backend. A forward needs no metadata: the policy controller sends some without (behaviour.md D.14), and only labels
/// depend on it.
fn backend(message: api::Backend) -> Result<Backend, Invalid> {
    use api::backend::Kind;
    let api::Backend { metadata, queue, kind } = message;
    let meta = match (metadata, &kind) {
        (None, Some(Kind::Forward(_))) => Meta::default("unknown"),
        (metadata, _) => required("metadata", metadata, meta::strict)?,
    };
    // Its numbers are not used: the proxy's own settings count (behaviour.md D.4).
    required("queue", queue, Ok)?;
    let dispatcher = match kind {
        Some(Kind::Forward(addr)) => {
            Dispatcher::Forward(destination::endpoint(addr, &HashMap::new()).inside("forward")?)
        }
        Some(Kind::Balancer(balancer)) => self::balancer(balancer).inside("balancer")?,
        None => Dispatcher::Fail(Failure {
            status: StatusCode::BAD_GATEWAY,
            grpc_code: 14,
            message: format!("backend {meta} is of no known kind").into(),
        }),
    };
    Ok(Backend { meta, dispatcher })
}

fn balancer(message: api::backend::BalanceP2c) -> Result<Dispatcher, Invalid> {
    use api::backend::{balance_p2c, endpoint_discovery};
    let api::backend::BalanceP2c { discovery, load } = message;
    let discovery = required("discovery", discovery, |discovery| {
        required("kind", discovery.kind, |kind| match kind {
            endpoint_discovery::Kind::Dst(dst) if dst.path.is_empty() => {
                Err(Invalid::new("empty").inside("path").inside("dst"))
            }
            endpoint_discovery::Kind::Dst(dst) => Ok(dst.path.into()),
        })
    })?;
    let load = required("load", load, |load| match load {
        balance_p2c::Load::PeakEwma(ewma) => Ok(Load {
            default_rtt: required("default_rtt", ewma.default_rtt, duration).inside("peak_ewma")?,
            decay: required("decay", ewma.decay, duration).inside("peak_ewma")?,
            penalty: None,
        }),
        balance_p2c::Load::PenaltyPeakEwma(ewma) => {
            let or = |field: &str, value, default| {
                Ok(optional(field, value, duration).inside("penalty_peak_ewma")?.unwrap_or(default))
            };
            Ok(Load {
                default_rtt: or("default_rtt", ewma.default_rtt, DEFAULT_RTT)?,
                decay: or("decay", ewma.decay, DEFAULT_DECAY)?,
                penalty: Some(Penalty {
                    penalty: or("penalty", ewma.penalty, DEFAULT_PENALTY)?,
                    max_retry_after: or("max_retry_after", ewma.max_retry_after, DEFAULT_MAX_RETRY_AFTER)?,
                }),
            })
        }
    })?;
    Ok(Dispatcher::Balance { discovery, load })
}

fn timeouts(
    message: Option<shared::Timeouts>,
    deprecated_request: Option<prost_types::Duration>,
) -> Result<Timeouts, Invalid> {
    let shared::Timeouts { response, request, idle } = message.unwrap_or_default();
    let request = match request {
        Some(_) => limit("request", request).inside("timeouts")?,
        None => limit("request_timeout", deprecated_request)?,
    };
    Ok(Timeouts {
        request,
        backend_request: None,
        response: limit("response", response).inside("timeouts")?,
        idle: limit("idle", idle).inside("timeouts")?,
    })
}

fn http_retry(message: api::http_route::Retry) -> Result<Retry, Invalid> {
    let api::http_route::Retry { max_retries, max_request_bytes, conditions, timeout, backoff } = message;
    let statuses = required("conditions", conditions, |conditions| {
        list("status_ranges", conditions.status_ranges, |range| {
            if !STATUSES.contains(&range.start) || !STATUSES.contains(&range.end) || range.start > range.end {
                return Err(Invalid::new(format!("{}..{} is no range of statuses", range.start, range.end)));
            }
            // Within 599.
            Ok(u16::try_from(range.start).unwrap_or(u16::MAX)..=u16::try_from(range.end).unwrap_or(u16::MAX))
        })
    })?;
    retry(max_retries, max_request_bytes, timeout, backoff, statuses, Vec::new())
}

fn grpc_retry(message: api::grpc_route::Retry) -> Result<Retry, Invalid> {
    let api::grpc_route::Retry { max_retries, max_request_bytes, conditions, timeout, backoff } = message;
    let codes = required("conditions", conditions, |on| {
        let flags = [
            (on.cancelled, 1),
            (on.deadine_exceeded, 4),
            (on.resource_exhausted, 8),
            (on.internal, 13),
            (on.unavailable, 14),
        ];
        Ok(flags.into_iter().filter(|(on, _)| *on).map(|(_, code)| code).collect())
    })?;
    retry(max_retries, max_request_bytes, timeout, backoff, Vec::new(), codes)
}

fn retry(
    max_retries: u32,
    max_request_bytes: u32,
    timeout: Option<prost_types::Duration>,
    backoff: Option<api::ExponentialBackoff>,
    statuses: Vec<RangeInclusive<u16>>,
    grpc_codes: Vec<u16>,
) -> Result<Retry, Invalid> {
    let max_retries = u16::try_from(max_retries)
        .map_err(|_| Invalid::new(format!("{max_retries} is more than 65535")).inside("max_retries"))?;
    Ok(Retry {
        max_retries,
        max_request_bytes: usize::try_from(max_request_bytes).unwrap_or(usize::MAX),
        statuses,
        grpc_codes,
        timeout: limit("timeout", timeout)?,
        backoff: optional("backoff", backoff, |message| Ok(self::backoff(message)?.0))?,
        connection_errors: false,
        budget: None,
    })
}

fn breaker(message: Option<api::FailureAccrual>) -> Result<Breaker, Invalid> {
    use api::failure_accrual::{ConsecutiveFailures, Kind, Unified};
    let convert = |message: api::FailureAccrual| {
        required("kind", message.kind, |kind| match kind {
            Kind::ConsecutiveFailures(ConsecutiveFailures { max_failures, backoff }) => {
                let (backoff, _) = required("backoff", backoff, self::backoff).inside("consecutive_failures")?;
                Ok(Breaker::Consecutive { max_failures, backoff })
            }
            Kind::Unified(Unified {
                success_rate_threshold,
                decay,
                min_requests,
                max_consecutive_failures,
                backoff,
            }) => {
                let (backoff, respect_retry_after) = required("backoff", backoff, self::backoff).inside("unified")?;
                let window = optional("decay", decay, duration).inside("unified")?.unwrap_or(DEFAULT_WINDOW);
                if !(0.0..=1.0).contains(&success_rate_threshold) {
                    let text = format!("{success_rate_threshold} is not within 0..1");
                    return Err(Invalid::new(text).inside("success_rate_threshold").inside("unified"));
                }
                if success_rate_threshold > 0.0 && window < MIN_WINDOW {
                    return Err(Invalid::new(format!("shorter than {MIN_WINDOW:?}")).inside("decay").inside("unified"));
                }
                if success_rate_threshold > 0.0 && min_requests > MAX_MIN_REQUESTS {
                    let text = format!("more than {MAX_MIN_REQUESTS}");
                    return Err(Invalid::new(text).inside("min_requests").inside("unified"));
                }
                Ok(Breaker::Unified {
                    max_consecutive_failures,
                    success_rate: success_rate_threshold,
                    window,
                    min_requests,
                    backoff,
                    respect_retry_after,
                })
            }
        })
    };
    Ok(optional("failure_accrual", message, convert)?.unwrap_or(Breaker::None))
}

/// A backoff, and whether `retry-after` is to be respected.
fn backoff(message: api::ExponentialBackoff) -> Result<(Backoff, bool), Invalid> {
    let api::ExponentialBackoff { min_backoff, max_backoff, jitter_ratio, respect_retry_after_hint } = message;
    let min = required("min_backoff", min_backoff, duration)?;
    let max = required("max_backoff", max_backoff, duration)?;
    if max.is_zero() || min > max {
        return Err(Invalid::new(format!("{max:?} is zero or less than min_backoff, {min:?}")).inside("max_backoff"));
    }
    let jitter = f64::from(jitter_ratio);
    if !(0.0..=MAX_JITTER).contains(&jitter) {
        return Err(Invalid::new(format!("{jitter_ratio} is not within 0..{MAX_JITTER}")).inside("jitter_ratio"));
    }
    Ok((Backoff { min, max, jitter }, respect_retry_after_hint))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::{super::meta::tests as metadata, *};
    use api::proxy_protocol::{self, Kind};

    fn seconds(seconds: i64) -> Option<prost_types::Duration> {
        Some(prost_types::Duration { seconds, nanos: 0 })
    }

    /// A backend that balances over a name, for tests.
    pub(crate) fn balance(path: &str) -> api::Backend {
        use api::backend::{BalanceP2c, EndpointDiscovery, balance_p2c, endpoint_discovery};
        let dst = endpoint_discovery::DestinationGet { path: path.into() };
        let ewma = balance_p2c::PeakEwma { default_rtt: seconds(1), decay: seconds(10) };
        api::Backend {
            metadata: Some(metadata::resource("core", "Service", "shop", "web")),
            queue: Some(api::Queue { capacity: 100, failfast_timeout: seconds(3) }),
            kind: Some(api::backend::Kind::Balancer(BalanceP2c {
                discovery: Some(EndpointDiscovery { kind: Some(endpoint_discovery::Kind::Dst(dst)) }),
                load: Some(balance_p2c::Load::PeakEwma(ewma)),
            })),
        }
    }

    fn to(backends: Vec<(api::Backend, u32)>) -> api::http_route::Distribution {
        use api::http_route::{Distribution, RouteBackend, WeightedRouteBackend, distribution};
        #[allow(deprecated)]
        let one = |(backend, weight)| WeightedRouteBackend {
            backend: Some(RouteBackend { backend: Some(backend), filters: vec![], request_timeout: None }),
            weight,
        };
        let random = distribution::RandomAvailable { backends: backends.into_iter().map(one).collect() };
        Distribution { kind: Some(distribution::Kind::RandomAvailable(random)) }
    }

    fn rule() -> api::http_route::Rule {
        let backends = Some(to(vec![(balance("web:80"), 1)]));
        api::http_route::Rule { backends, ..Default::default() }
    }

    fn http1(rule: api::http_route::Rule) -> Kind {
        let route = api::HttpRoute { metadata: Some(metadata::default("http")), hosts: vec![], rules: vec![rule] };
        Kind::Http1(proxy_protocol::Http1 { routes: vec![route], failure_accrual: None })
    }

    /// A policy of HTTP/1 to a balancer, for tests.
    pub(crate) fn message(kind: Option<Kind>) -> api::OutboundPolicy {
        api::OutboundPolicy {
            protocol: Some(api::ProxyProtocol { kind: Some(kind.unwrap_or_else(|| http1(rule()))) }),
            metadata: Some(metadata::resource("core", "Service", "shop", "web")),
        }
    }

    fn one_rule(rule: api::http_route::Rule) -> Result<Rule, Invalid> {
        let Protocol::Http1(http) = policy(message(Some(http1(rule))))?.1 else { panic!() };
        let Routes::Http(routes, Precedence::Linkerd) = http.routes else { panic!() };
        Ok(routes[0].rules[0].clone())
    }

    #[track_caller]
    fn check_invalid<T: std::fmt::Debug>(result: Result<T, Invalid>, path: &str) {
        let text = result.unwrap_err().to_string();
        assert!(text.contains(path), "{text} is not about {path}");
    }

    #[test]
    fn detect_needs_all_its_parts() {
        let full = proxy_protocol::Detect {
            timeout: seconds(10),
            opaque: Some(proxy_protocol::Opaque { routes: vec![] }),
            http1: Some(proxy_protocol::Http1 { routes: vec![], failure_accrual: None }),
            http2: Some(proxy_protocol::Http2 { routes: vec![], failure_accrual: None }),
        };
        let check = |detect| policy(message(Some(Kind::Detect(detect))));
        assert!(check(full.clone()).is_ok());
        check_invalid(check(proxy_protocol::Detect { timeout: None, ..full.clone() }), "detect.timeout");
        check_invalid(check(proxy_protocol::Detect { opaque: None, ..full.clone() }), "detect.opaque");
        check_invalid(check(proxy_protocol::Detect { http1: None, ..full.clone() }), "detect.http1");
        check_invalid(check(proxy_protocol::Detect { http2: None, ..full }), "detect.http2");
        check_invalid(policy(api::OutboundPolicy { metadata: None, ..message(None) }), "metadata");
        check_invalid(policy(api::OutboundPolicy { protocol: None, ..message(None) }), "protocol");
    }

    #[test]
    fn backends_need_metadata_queue_and_a_kind() {
        let with = |backend| one_rule(api::http_route::Rule { backends: Some(to(vec![(backend, 1)])), ..rule() });
        check_invalid(with(api::Backend { metadata: None, ..balance("a:1") }), "backend.metadata");
        check_invalid(with(api::Backend { queue: None, ..balance("a:1") }), "backend.queue");
        check_invalid(with(balance("")), "discovery.kind.dst.path");
        let Distribution::FirstAvailable(found) = with(api::Backend { kind: None, ..balance("a:1") }).unwrap().backends
        else {
            panic!()
        };
        let Dispatcher::Fail(failure) = &found[0].backend.dispatcher else { panic!() };
        assert_eq!((failure.status, failure.grpc_code), (StatusCode::BAD_GATEWAY, 14));
        let forward = api::backend::Kind::Forward(destination::tests::weighted("10.0.0.1:80"));
        assert!(with(api::Backend { metadata: None, kind: Some(forward), ..balance("a:1") }).is_ok());
        check_invalid(one_rule(api::http_route::Rule { backends: None, ..rule() }), "rules[0].backends");
        check_invalid(
            one_rule(api::http_route::Rule { backends: Some(to(vec![])), ..rule() }),
            "random_available.backends: empty",
        );
    }

    #[test]
    fn weights() {
        let with = |weights: &[u32]| {
            let backends = weights.iter().map(|w| (balance("a:1"), *w)).collect();
            one_rule(api::http_route::Rule { backends: Some(to(backends)), ..rule() }).unwrap().backends
        };
        assert!(matches!(with(&[0]), Distribution::FirstAvailable(_)));
        assert!(matches!(with(&[0, 0]), Distribution::Empty));
        assert!(matches!(with(&[0, 5]), Distribution::RandomAvailable(b) if b[1].1 == 5));
    }

    #[test]
    fn the_old_timeout_counts_only_alone() {
        let with = |request, old| {
            #[allow(deprecated)]
            let rule = api::http_route::Rule {
                timeouts: Some(shared::Timeouts { request, response: seconds(0), idle: seconds(7) }),
                request_timeout: old,
                ..rule()
            };
            one_rule(rule).map(|rule| rule.timeouts)
        };
        let found = with(None, seconds(5)).unwrap();
        assert_eq!((found.request, found.response), (Some(Duration::from_secs(5)), None));
        assert_eq!(with(seconds(3), seconds(5)).unwrap().request, Some(Duration::from_secs(3)));
        check_invalid(with(seconds(-3), None), "timeouts.request");
    }

    fn backoff_message(min: i64, max: i64, jitter_ratio: f32) -> Option<api::ExponentialBackoff> {
        let (min_backoff, max_backoff) = (seconds(min), seconds(max));
        Some(api::ExponentialBackoff { min_backoff, max_backoff, jitter_ratio, respect_retry_after_hint: true })
    }

    #[test]
    fn retries_are_validated() {
        use api::http_route::{Retry, retry::Conditions, retry::conditions::StatusRange};
        let with = |max_retries, range: Option<(u32, u32)>, backoff| {
            let status_ranges = range.into_iter().map(|(start, end)| StatusRange { start, end }).collect();
            let conditions = Some(Conditions { status_ranges });
            let retry = Retry { max_retries, max_request_bytes: 64, conditions, timeout: None, backoff };
            one_rule(api::http_route::Rule { retry: Some(retry), ..rule() }).map(|rule| rule.retry)
        };
        let found = with(2, Some((500, 599)), backoff_message(1, 2, 0.5)).unwrap().unwrap();
        assert_eq!((found.max_retries, found.statuses), (2, vec![500..=599]));
        check_invalid(with(70_000, None, None), "retry.max_retries");
        check_invalid(with(1, Some((0, 599)), None), "status_ranges[0]");
        check_invalid(with(1, Some((500, 600)), None), "status_ranges[0]");
        check_invalid(with(1, Some((502, 500)), None), "status_ranges[0]");
        check_invalid(with(1, None, backoff_message(2, 1, 0.0)), "max_backoff");
        check_invalid(with(1, None, backoff_message(1, 2, -1.0)), "jitter_ratio");
        check_invalid(with(1, None, backoff_message(1, 2, f32::NAN)), "jitter_ratio");
        let retry = Retry { conditions: None, ..Default::default() };
        check_invalid(one_rule(api::http_route::Rule { retry: Some(retry), ..rule() }), "retry.conditions");
    }

    #[test]
    fn breakers_are_validated() {
        use api::failure_accrual::{ConsecutiveFailures, Kind, Unified};
        let with = |kind| breaker(Some(api::FailureAccrual { kind, ejection: None }));
        assert_eq!(breaker(None).unwrap(), Breaker::None);
        check_invalid(with(None), "failure_accrual.kind");
        let consecutive = |backoff| Some(Kind::ConsecutiveFailures(ConsecutiveFailures { max_failures: 7, backoff }));
        assert!(matches!(
            with(consecutive(backoff_message(1, 60, 0.5))),
            Ok(Breaker::Consecutive { max_failures: 7, .. })
        ));
        check_invalid(with(consecutive(None)), "consecutive_failures.backoff");
        let unified = |rate, decay, min_requests| {
            with(Some(Kind::Unified(Unified {
                success_rate_threshold: rate,
                decay,
                min_requests,
                max_consecutive_failures: 7,
                backoff: backoff_message(1, 60, 0.5),
            })))
        };
        let Ok(Breaker::Unified { window, respect_retry_after, .. }) = unified(0.8, None, 5) else { panic!() };
        assert_eq!((window, respect_retry_after), (DEFAULT_WINDOW, true));
        check_invalid(unified(1.5, None, 5), "success_rate_threshold");
        check_invalid(unified(f64::NAN, None, 5), "success_rate_threshold");
        check_invalid(unified(0.8, seconds(0), 5), "decay");
        check_invalid(unified(0.8, None, 2_000_000), "min_requests");
        assert!(unified(0.0, seconds(0), 2_000_000).is_ok());
    }

    #[test]
    fn loads_have_defaults_only_with_penalties() {
        use api::backend::{Kind, balance_p2c};
        let with = |load| {
            let mut backend = balance("a:1");
            let Some(Kind::Balancer(balancer)) = &mut backend.kind else { panic!() };
            balancer.load = load;
            super::backend(backend)
        };
        let penalty = with(Some(balance_p2c::Load::PenaltyPeakEwma(Default::default()))).unwrap();
        let Dispatcher::Balance { load, .. } = penalty.dispatcher else { panic!() };
        assert_eq!((load.default_rtt, load.decay), (DEFAULT_RTT, DEFAULT_DECAY));
        assert_eq!(load.penalty, Some(Penalty { penalty: DEFAULT_PENALTY, max_retry_after: DEFAULT_MAX_RETRY_AFTER }));
        check_invalid(with(Some(balance_p2c::Load::PeakEwma(Default::default()))), "peak_ewma.default_rtt");
        check_invalid(with(None), "balancer.load");
    }

    fn opaque_message(rules: usize, filters: &[bool]) -> api::OpaqueRoute {
        use api::opaque_route::{Distribution, Filter, Rule, distribution, filter};
        let filter = |known: &bool| Filter {
            kind: known.then(|| filter::Kind::Forbidden(linkerd2_proxy_api::opaque_route::Forbidden {})),
        };
        let rule = Rule {
            backends: Some(Distribution { kind: Some(distribution::Kind::Empty(distribution::Empty {})) }),
            filters: filters.iter().map(filter).collect(),
        };
        api::OpaqueRoute { metadata: Some(metadata::default("opaq")), rules: vec![rule; rules] }
    }

    #[test]
    fn opaque_routes() {
        let with = |routes: Vec<api::OpaqueRoute>| opaque(proxy_protocol::Opaque { routes });
        assert_eq!(with(vec![]).unwrap().route, None);
        assert_eq!(with(vec![opaque_message(1, &[])]).unwrap().route.unwrap().refuse, None);
        assert_eq!(with(vec![opaque_message(1, &[true])]).unwrap().route.unwrap().refuse, Some(Refuse::Forbidden));
        let unknown = with(vec![opaque_message(1, &[false])]).unwrap().route.unwrap().refuse;
        assert!(matches!(unknown, Some(Refuse::Invalid(_))));
        check_invalid(with(vec![opaque_message(2, &[])]), "routes[0].rules");
        check_invalid(with(vec![opaque_message(0, &[])]), "routes[0].rules");
        check_invalid(with(vec![opaque_message(1, &[]); 2]), "opaque");
    }

    #[test]
    fn an_unknown_filter_spares_the_rest_of_the_policy() {
        let filters = vec![api::http_route::Filter { kind: None }];
        let found = one_rule(api::http_route::Rule { filters, ..rule() }).unwrap();
        assert!(matches!(&found.filters[..], [Filter::Unknown { .. }]));
    }
}
