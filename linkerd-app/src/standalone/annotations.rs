//! Settings that manifests carry as annotations (resources.md 5): retries, timeouts, breakers, load metric, ports.
//! A bad value on a route is an error, on a Service or EgressNetwork it loses that setting with a warning (5.1).

use super::{
    duration,
    report::{At, Severity, remedied},
};
use crate::policy::client::{Backoff, Breaker, Load, Penalty, Retry, Timeouts};
use std::{collections::BTreeMap, ops::RangeInclusive, sync::Arc, time::Duration};

/// Labels or annotations.
pub(super) type Pairs = BTreeMap<Arc<str>, Arc<str>>;

/// Relative share of traffic of an endpoint, on its Pod, ExternalWorkload or EndpointSlice: a decimal number from 0 to
/// 100, 1 when absent. 0 takes nothing while others are there. This key is ours.
pub(super) const WEIGHT: &str = "balancer.linkerd.io/weight";
/// How peers reach a meshed Pod: `transparent` (default) dials the application's port, which the Pod redirects to its
/// proxy; `transport-header` dials the proxy's inbound port and names the application's port in a transport header, for
/// Pods where nothing is redirected. This key is ours.
pub(super) const TRANSPORT_MODE: &str = "config.linkerd.io/proxy-transport-mode";
/// On a route of an EgressNetwork: plain requests leave as TLS. `system`, or the name of a ConfigMap of the route's
/// namespace with authorities in `ca.crt`. This key and the next two are ours.
pub(super) const ORIGINATE_TLS: &str = "egress.linkerd.io/originate-tls";
/// Name for SNI and verification; without it, the route's host name.
const TLS_HOSTNAME: &str = "egress.linkerd.io/tls-hostname";
/// Port that TLS is spoken on; without it 443 for connections to port 80, and for others the port that was dialled.
const TLS_PORT: &str = "egress.linkerd.io/tls-port";
pub(super) const OPAQUE_PORTS: &str = "config.linkerd.io/opaque-ports";

/// On a Service, EgressNetwork or route: bytes of a request's body that are kept for another attempt, up to
/// [`MAX_RETRY_BODY`]. This key is ours.
const RETRY_BYTES: &str = "retry.linkerd.io/max-request-bytes";
/// On a Service, EgressNetwork or route: whether requests may say `l5d-timeout`, `l5d-retry-http` and the like (behaviour.md
/// D.13); when absent, the command line says. This key is ours.
const REQUEST_HEADERS: &str = "retry.linkerd.io/request-headers";
/// Most that a request may hold on to for another attempt: each of thousands in flight may.
const MAX_RETRY_BODY: usize = 16 * 1024 * 1024;
/// Body bytes kept for another attempt (resources.md 8).
const RETRY_BODY: usize = 64 * 1024;
/// Wait between attempts (resources.md 8).
pub(super) const RETRY_BACKOFF: Backoff =
    Backoff { min: Duration::from_millis(25), max: Duration::from_millis(250), jitter: 1.0 };

/// What the annotations of 5.1 on one object say.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Tuning {
    pub(super) retry: Option<Retry>,
    /// Bytes kept for another attempt, whoever asks for it.
    pub(super) retry_bytes: Option<usize>,
    /// Whether request headers may ask for retries and timeouts.
    pub(super) request_headers: Option<bool>,
    pub(super) timeouts: Timeouts,
    pub(super) breaker: Breaker,
    pub(super) load: Load,
    pub(super) opaque_ports: Option<Ports>,
}

/// TLS that a route of an EgressNetwork originates.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Originate {
    /// ConfigMap with authorities; none = the system's.
    pub(super) authorities: Option<Arc<str>>,
    pub(super) hostname: Option<Arc<str>>,
    pub(super) port: Option<u16>,
}

impl Originate {
    /// Reads the annotations of a route; `at` is its `metadata`.
    pub(super) fn read(pairs: &Pairs, at: &mut At<'_>) -> Option<Self> {
        let mut r = Reader { pairs, at: at.field("annotations"), severity: Severity::Error };
        let authorities = pairs.get(ORIGINATE_TLS)?;
        let hostname = r.get(TLS_HOSTNAME, |t| match linkerd_tls::web::is_host_name(t) {
            true => Ok(Arc::from(t)),
            false => Err(format!(
                "{t:?} is neither a DNS name nor an IP address; write the name in the server's certificate"
            )),
        });
        let port = r.get(TLS_PORT, |t| {
            t.parse::<u16>().ok().filter(|p| *p > 0).ok_or_else(|| format!("{t:?} is no port; write 1 to 65535"))
        });
        Some(Self { authorities: Some(authorities.clone()).filter(|a| **a != *"system"), hostname, port })
    }
}

/// A comma list of ports, ranges and port names.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Ports {
    ranges: Vec<RangeInclusive<u16>>,
    names: Vec<Arc<str>>,
}

impl Ports {
    /// Blanks around items are allowed, empty items ignored; the empty list is "none".
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let mut ports = Self::default();
        for item in text.split(',').map(str::trim).filter(|i| !i.is_empty()) {
            let number = |n: &str| n.trim().parse::<u16>().ok().filter(|p| *p > 0);
            if let Some(port) = number(item) {
                ports.ranges.push(port..=port);
            } else if let Some((a, b)) = item.split_once('-').and_then(|(a, b)| Some((number(a)?, number(b)?))) {
                if a > b {
                    return Err(format!("port range {item:?} runs backwards; write {b}-{a}"));
                }
                ports.ranges.push(a..=b);
            } else if is_port_name(item) {
                ports.names.push(item.into());
            } else {
                return Err(format!("{item:?} is no port, port range or port name; write ports of 1 to 65535"));
            }
        }
        Ok(ports)
    }

    pub(super) fn contains(&self, port: u16, name: Option<&str>) -> bool {
        self.ranges.iter().any(|r| r.contains(&port)) || name.is_some_and(|n| self.names.iter().any(|m| **m == *n))
    }
}

/// IANA service name: at most 15 of lower-case letters, digits and `-`, at least one letter (RFC 6335, 5.1).
pub(super) fn is_port_name(text: &str) -> bool {
    (1..=15).contains(&text.len())
        && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
        && text.bytes().any(|b| b.is_ascii_lowercase())
        && !text.starts_with('-')
        && !text.ends_with('-')
}

/// `1 t T true TRUE True` and `0 f F false FALSE False`.
pub(super) fn boolean(text: &str) -> Result<bool, String> {
    match text {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Ok(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Ok(false),
        _ => Err(format!("{text:?} is no boolean; write true or false")),
    }
}

/// The weight annotation, in the unit of [`crate::policy::endpoint::EndpointMeta::weight`] (10,000 = ordinary).
pub(super) fn weight(text: &str) -> Result<u32, String> {
    match text.trim().parse::<f64>() {
        Ok(w) if (0.0..=100.0).contains(&w) => Ok((w * 10_000.0).round() as u32),
        _ => Err(format!("{text:?} is no weight; write a number from 0 to 100, where 1 is an ordinary share")),
    }
}

/// Looks annotations up and tells bad ones with one severity.
struct Reader<'p, 'a> {
    pairs: &'p Pairs,
    at: At<'a>,
    severity: Severity,
}

impl Reader<'_, '_> {
    fn get<T>(&mut self, key: &str, parse: impl FnOnce(&str) -> Result<T, String>) -> Option<T> {
        let value = self.pairs.get(key)?;
        match parse(value) {
            Ok(value) => Some(value),
            Err(why) => {
                let (why, remedy) = remedied(&why);
                let ignored = if self.severity == Severity::Error { "" } else { "; until then the setting is ignored" };
                self.at.key(key).say(self.severity, why, format!("{remedy}{ignored}"));
                None
            }
        }
    }

    /// A duration of which 0 means "none".
    fn limit(&mut self, key: &str) -> Option<Duration> {
        self.get(key, duration::linkerd).filter(|d| !d.is_zero())
    }
}

impl Tuning {
    /// Reads the annotations of an object; `at` is its `metadata`.
    pub(super) fn read(pairs: &Pairs, at: &mut At<'_>, severity: Severity) -> Self {
        let mut r = Reader { pairs, at: at.field("annotations"), severity };
        let timeouts = Timeouts {
            request: r.limit("timeout.linkerd.io/request"),
            backend_request: None,
            response: r.limit("timeout.linkerd.io/response"),
            idle: r.limit("timeout.linkerd.io/idle"),
        };
        Self {
            retry: retry(&mut r),
            retry_bytes: r.get(RETRY_BYTES, |t| match t.parse() {
                Ok(bytes) if bytes <= MAX_RETRY_BODY => Ok(bytes),
                _ => Err(format!("{t:?} is no number of bytes from 0 to {MAX_RETRY_BODY}")),
            }),
            request_headers: r.get(REQUEST_HEADERS, boolean),
            timeouts,
            breaker: breaker(&mut r),
            load: load(&mut r),
            opaque_ports: r.get(OPAQUE_PORTS, Ports::parse),
        }
    }
}

fn retry(r: &mut Reader<'_, '_>) -> Option<Retry> {
    const KEYS: [&str; 4] =
        ["retry.linkerd.io/http", "retry.linkerd.io/grpc", "retry.linkerd.io/limit", "retry.linkerd.io/timeout"];
    if !KEYS.iter().any(|k| r.pairs.contains_key(*k)) {
        return None;
    }
    let statuses = r.get(KEYS[0], statuses);
    let grpc_codes = r.get(KEYS[1], grpc_codes);
    let limit = r.get(KEYS[2], |t| t.parse::<u16>().map_err(|_| format!("{t:?} is no number; write 0 to 65535")));
    let timeout = r.limit(KEYS[3]);
    Some(Retry {
        max_retries: limit.filter(|l| *l > 0).unwrap_or(1),
        max_request_bytes: RETRY_BODY,
        statuses: statuses.unwrap_or_default(),
        grpc_codes: grpc_codes.unwrap_or_default(),
        timeout,
        backoff: Some(RETRY_BACKOFF),
        connection_errors: false,
        budget: None,
    })
}

/// A `Retry` without conditions, for stanzas and profiles.
pub(super) fn plain_retry() -> Retry {
    Retry {
        max_retries: 1,
        max_request_bytes: RETRY_BODY,
        statuses: Vec::new(),
        grpc_codes: Vec::new(),
        timeout: None,
        backoff: Some(RETRY_BACKOFF),
        connection_errors: false,
        budget: None,
    }
}

fn statuses(text: &str) -> Result<Vec<RangeInclusive<u16>>, String> {
    let code = |t: &str| t.parse::<u16>().ok().filter(|c| (100..=599).contains(c));
    text.split(',')
        .map(|item| match item.to_ascii_lowercase().as_str() {
            "5xx" => Ok(500..=599),
            "gateway-error" => Ok(502..=504),
            word => match word.split_once('-') {
                Some((a, b)) => code(a).zip(code(b)).filter(|(a, b)| a <= b).map(|(a, b)| a..=b),
                None => code(word).map(|c| c..=c),
            }
            .ok_or_else(|| {
                format!("{item:?} is no status; write 5xx, gateway-error, a code of 100 to 599 or a range a-b")
            }),
        })
        .collect()
}

fn grpc_codes(text: &str) -> Result<Vec<u16>, String> {
    text.split(',')
        .map(|item| match item.to_ascii_lowercase().as_str() {
            "cancelled" => Ok(1),
            "deadline-exceeded" => Ok(4),
            "resource-exhausted" => Ok(8),
            "internal" => Ok(13),
            "unavailable" => Ok(14),
            _ => Err(format!(
                "{item:?} is no retryable gRPC status; write cancelled, deadline-exceeded, internal, resource-exhausted or unavailable"
            )),
        })
        .collect()
}

fn breaker(r: &mut Reader<'_, '_>) -> Breaker {
    const BASE: &str = "balancer.linkerd.io/failure-accrual";
    #[derive(PartialEq)]
    enum Mode {
        Consecutive,
        Unified,
    }
    let mode = r.get(BASE, |t| match t {
        "consecutive" => Ok(Mode::Consecutive),
        "unified" => Ok(Mode::Unified),
        _ => Err(format!("{t:?} is no failure accrual; write consecutive or unified")),
    });
    let Some(mode) = mode else { return Breaker::None };
    let whole =
        |t: &str| t.parse::<u32>().map_err(|_| format!("{t:?} is no whole number; write one of 0 to 4294967295"));
    let positive = |t: &str| match duration::linkerd(t)? {
        Duration::ZERO => Err("no penalty at all; write at least 1ms".to_string()),
        d => Ok(d),
    };
    let max_failures = r.get(&format!("{BASE}-consecutive-max-failures"), whole).unwrap_or(7);
    let max = r.get(&format!("{BASE}-consecutive-max-penalty"), positive).unwrap_or(Duration::from_secs(60));
    let min = r
        .get(&format!("{BASE}-consecutive-min-penalty"), |t| match positive(t)? {
            d if d > max => Err(format!("min-penalty {d:?} is longer than max-penalty {max:?}; write at most that")),
            d => Ok(d),
        })
        .unwrap_or(Duration::from_secs(1).min(max));
    let jitter = r
        .get(&format!("{BASE}-consecutive-jitter-ratio"), |t| match t.parse::<f64>() {
            Ok(j) if (0.0..=100.0).contains(&j) => Ok(j),
            _ => Err(format!("{t:?} is no ratio; write 0 to 100")),
        })
        .unwrap_or(0.5);
    let backoff = Backoff { min, max, jitter };
    if mode == Mode::Consecutive {
        return Breaker::Consecutive { max_failures, backoff };
    }
    const ALPHA: &str = "balancer.alpha.linkerd.io/failure-accrual";
    Breaker::Unified {
        max_consecutive_failures: max_failures,
        success_rate: r
            .get(&format!("{ALPHA}-success-rate-threshold"), |t| match t.parse::<f64>() {
                Ok(s) if (0.0..=1.0).contains(&s) => Ok(s),
                _ => Err(format!("{t:?} is no rate; write 0 to 1")),
            })
            .unwrap_or(0.8),
        window: r
            .get(&format!("{ALPHA}-success-rate-window"), |t| match duration::linkerd(t)? {
                d if d < Duration::from_millis(10) => Err(format!("window {d:?} is too short; write at least 10ms")),
                d => Ok(d),
            })
            .unwrap_or(Duration::from_secs(10)),
        min_requests: r
            .get(&format!("{ALPHA}-success-rate-min-requests"), |t| match whole(t)? {
                n if n > 1_000_000 => Err(format!("{n} is too many; write at most 1000000")),
                n => Ok(n),
            })
            .unwrap_or(5),
        backoff,
        respect_retry_after: r.get(&format!("{ALPHA}-honor-retry-after"), boolean).unwrap_or(false),
    }
}

fn load(r: &mut Reader<'_, '_>) -> Load {
    let penalize = r.get("balancer.alpha.linkerd.io/penalize-failures", boolean).unwrap_or(false);
    let penalty = r.get("balancer.alpha.linkerd.io/load-biaser-penalty", |t| match duration::linkerd(t)? {
        d if d.as_millis() > 1 << 32 => Err(format!("penalty {d:?} is too long; write at most 49d")),
        d => Ok(d),
    });
    let max_retry_after = r.get("balancer.alpha.linkerd.io/load-biaser-max-retry-after", duration::linkerd);
    Load {
        penalty: penalize.then(|| Penalty {
            penalty: penalty.unwrap_or(Duration::from_secs(5)),
            max_retry_after: max_retry_after.unwrap_or(Duration::from_secs(300)),
        }),
        ..Load::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(pairs: &[(&str, &str)], issues: &[&str]) -> Tuning {
        let pairs = pairs.iter().map(|(k, v)| (Arc::from(*k), Arc::from(*v))).collect();
        let mut list = Vec::new();
        let tuning = Tuning::read(&pairs, &mut At::new(&mut list, "metadata"), Severity::Warning);
        let seen: Vec<_> = list.iter().map(|i| i.field.as_str()).collect();
        assert_eq!(seen, issues);
        tuning
    }

    #[test]
    fn retries_and_timeouts() {
        let t = check(
            &[
                ("retry.linkerd.io/http", "5xx,gateway-error,429,400-404"),
                ("retry.linkerd.io/limit", "0"),
                ("retry.linkerd.io/timeout", "300ms"),
                ("timeout.linkerd.io/request", "2s"),
                ("timeout.linkerd.io/idle", "0"),
            ],
            &[],
        );
        let retry = t.retry.unwrap();
        assert_eq!(retry.statuses, [500..=599, 502..=504, 429..=429, 400..=404]);
        assert_eq!((retry.max_retries, retry.timeout), (1, Some(Duration::from_millis(300))));
        assert_eq!((t.timeouts.request, t.timeouts.idle), (Some(Duration::from_secs(2)), None));
        assert!(check(&[("timeout.linkerd.io/request", "2s")], &[]).retry.is_none());
        let t = check(&[(RETRY_BYTES, "16777216"), (REQUEST_HEADERS, "true")], &[]);
        assert_eq!((t.retry_bytes, t.request_headers, t.retry), (Some(MAX_RETRY_BODY), Some(true), None));
        let bytes = "metadata.annotations[\"retry.linkerd.io/max-request-bytes\"]";
        assert_eq!(check(&[(RETRY_BYTES, "16777217")], &[bytes]).retry_bytes, None);
    }

    #[test]
    fn bad_values_lose_only_themselves() {
        let t = check(
            &[
                ("retry.linkerd.io/http", "6xx"),
                ("retry.linkerd.io/grpc", "Unavailable"),
                ("timeout.linkerd.io/request", "1h30m"),
            ],
            &[
                "metadata.annotations[\"timeout.linkerd.io/request\"]",
                "metadata.annotations[\"retry.linkerd.io/http\"]",
            ],
        );
        assert_eq!(t.retry.unwrap().grpc_codes, [14]);
        assert_eq!(t.timeouts.request, None);
    }

    #[test]
    fn breakers() {
        let base = "balancer.linkerd.io/failure-accrual";
        let t =
            check(&[(base, "consecutive"), ("balancer.linkerd.io/failure-accrual-consecutive-max-failures", "3")], &[]);
        assert_eq!(
            t.breaker,
            Breaker::Consecutive {
                max_failures: 3,
                backoff: Backoff { min: Duration::from_secs(1), max: Duration::from_secs(60), jitter: 0.5 }
            }
        );
        assert_eq!(
            check(&[(base, "sometimes")], &["metadata.annotations[\"balancer.linkerd.io/failure-accrual\"]"]).breaker,
            Breaker::None
        );
        let t = check(&[(base, "unified")], &[]);
        assert!(matches!(t.breaker, Breaker::Unified { min_requests: 5, respect_retry_after: false, .. }));
    }

    #[test]
    fn port_lists() {
        let ports = Ports::parse("25, 8000-8080 ,redis,").unwrap();
        assert!(ports.contains(25, None) && ports.contains(8050, None) && ports.contains(1, Some("redis")));
        assert!(!ports.contains(26, Some("web")));
        assert_eq!(Ports::parse("").unwrap(), Ports::default());
        for bad in ["0", "70000", "90-80", "a b", "1-"] {
            assert!(Ports::parse(bad).is_err(), "{bad}");
        }
        assert_eq!(weight("0.5"), Ok(5_000));
        assert!(weight("-1").is_err() && weight("NaN").is_err() && weight("101").is_err());
    }

    #[test]
    fn the_page_explains_every_key_of_ours() {
        let page = include_str!("../../../docs/annotations.md");
        let keys = [WEIGHT, TRANSPORT_MODE, ORIGINATE_TLS, TLS_HOSTNAME, TLS_PORT, RETRY_BYTES, REQUEST_HEADERS];
        for key in keys {
            assert!(page.contains(&format!("| `{key}` |")), "{key}");
        }
    }
}
