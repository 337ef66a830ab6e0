//! Routes of both groups: HTTPRoute, GRPCRoute, TLSRoute, TCPRoute (resources.md 3.1 to 3.10 and 4.2).

use super::{
    super::{
        annotations::{Originate, Tuning, plain_retry},
        duration,
        report::{At, Severity},
    },
    GATEWAY, Head, Kind, POLICY,
    typed::typed,
};
use crate::policy::{
    client::{Backoff, Retry, SessionToken},
    route::{
        Cors, Filter, FullRegex, GrpcMatch, HeaderMatch, HeaderModifier, HostMatch, HttpMatch, ModifyPath, PathMatch,
        QueryMatch, Ratio, Rewrite, RouteMatch, StringMatch,
    },
};
use http::{HeaderName, HeaderValue, Method, StatusCode, uri::Scheme};
use serde::Deserialize;
use serde_json::Value;
use std::{sync::Arc, time::Duration};

/// A route of any kind.
#[derive(Clone, Debug)]
pub(in super::super) struct Route {
    pub(in super::super) head: Head,
    pub(in super::super) kind: RouteKind,
    /// Whether it is of the Gateway API; else it is Linkerd's own HTTPRoute.
    pub(in super::super) gateway: bool,
    pub(in super::super) parents: Vec<ParentRef>,
    pub(in super::super) hosts: Vec<HostMatch>,
    pub(in super::super) rules: Vec<Rule>,
    pub(in super::super) tuning: Tuning,
    /// TLS for plain requests to an EgressNetwork.
    pub(in super::super) originate: Option<Originate>,
}

/// In order of precedence on one port (resources.md 3.2).
#[derive(Copy, Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(in super::super) enum RouteKind {
    Grpc,
    Http,
    Tls,
    Tcp,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(in super::super) struct ParentRef {
    pub(in super::super) kind: ParentKind,
    pub(in super::super) namespace: Arc<str>,
    pub(in super::super) name: Arc<str>,
    pub(in super::super) port: Option<u16>,
    pub(in super::super) section: Option<Arc<str>>,
}

/// What a route can stand on.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(in super::super) enum ParentKind {
    Service,
    Server,
    EgressNetwork,
}

#[derive(Clone, Debug, Default)]
pub(in super::super) struct Rule {
    pub(in super::super) matches: Vec<RouteMatch>,
    pub(in super::super) filters: Vec<FilterSpec>,
    pub(in super::super) backends: Vec<BackendRef>,
    pub(in super::super) request_timeout: Option<Duration>,
    pub(in super::super) backend_request_timeout: Option<Duration>,
    pub(in super::super) retry: Option<Retry>,
    pub(in super::super) session: Option<SessionSpec>,
}

/// A filter, with what only the parent or other objects can tell still open.
#[derive(Clone, Debug)]
pub(in super::super) enum FilterSpec {
    Ready(Filter),
    Redirect {
        scheme: Option<Scheme>,
        host: Option<Arc<str>>,
        port: Option<u16>,
        path: Option<ModifyPath>,
        status: StatusCode,
    },
    Mirror {
        backend: BackendRef,
        ratio: Ratio,
    },
}

#[derive(Clone, Debug)]
pub(in super::super) struct BackendRef {
    pub(in super::super) kind: BackendKind,
    /// None = the route's (Gateway API) or the parent's (Linkerd).
    pub(in super::super) namespace: Option<Arc<str>>,
    pub(in super::super) name: Arc<str>,
    pub(in super::super) port: Option<u16>,
    pub(in super::super) weight: u32,
    pub(in super::super) filters: Vec<FilterSpec>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(in super::super) enum BackendKind {
    Service,
    EgressNetwork,
    /// `group/Kind`, for the error text.
    Unknown(Arc<str>),
}

/// Sticky sessions; a cookie without a name gets one made of the route's name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in super::super) struct SessionSpec {
    pub(in super::super) token: Option<SessionToken>,
    pub(in super::super) path: Arc<str>,
    pub(in super::super) permanent: bool,
    pub(in super::super) absolute_timeout: Option<Duration>,
}

// Bounds of the Gateway API's schemas (resources.md 3).
const MAX_PARENTS: usize = 32;
const MAX_RULES: usize = 16;
const MAX_MATCHES: usize = 64;
const MAX_LINKERD_MATCHES: usize = 8;
const MAX_ROUTE_MATCHES: usize = 128;
const MAX_LIST: usize = 16;
const MAX_HOSTS: usize = 16;
const MAX_TLS_HOSTS: usize = 1024;
const MAX_WEIGHT: u32 = 1_000_000;
const MAX_PATH: usize = 1024;

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct RawRoute {
    parent_refs: Vec<RawParent>,
    hostnames: Vec<String>,
    rules: Option<Vec<RawRule>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawParent {
    group: Option<String>,
    kind: Option<String>,
    namespace: Option<Arc<str>>,
    name: Arc<str>,
    port: Option<u16>,
    section_name: Option<Arc<str>>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct RawRule {
    name: Option<String>,
    matches: Vec<RawMatch>,
    filters: Vec<RawFilter>,
    backend_refs: Vec<RawBackend>,
    timeouts: Option<RawTimeouts>,
    retry: Option<RawRetry>,
    session_persistence: Option<RawSession>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct RawMatch {
    path: Option<RawValue>,
    headers: Vec<RawNamed>,
    query_params: Vec<RawNamed>,
    method: Option<RawMethod>,
}

/// HTTPRoutes name a method, GRPCRoutes describe one.
#[derive(Deserialize)]
#[serde(untagged)]
enum RawMethod {
    Http(String),
    Grpc {
        #[serde(rename = "type")]
        kind: Option<String>,
        service: Option<String>,
        method: Option<String>,
    },
}

#[derive(Deserialize)]
struct RawValue {
    #[serde(rename = "type")]
    kind: Option<String>,
    value: Option<String>,
}

#[derive(Deserialize)]
struct RawNamed {
    #[serde(rename = "type")]
    kind: Option<String>,
    name: String,
    value: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawFilter {
    #[serde(rename = "type")]
    kind: String,
    request_header_modifier: Option<RawModifier>,
    response_header_modifier: Option<RawModifier>,
    request_redirect: Option<RawRedirect>,
    url_rewrite: Option<RawRewrite>,
    request_mirror: Option<RawMirror>,
    cors: Option<RawCors>,
    #[serde(rename = "extensionRef")]
    extension: Option<Value>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct RawModifier {
    set: Vec<RawHeader>,
    add: Vec<RawHeader>,
    remove: Vec<String>,
}

#[derive(Deserialize)]
struct RawHeader {
    name: String,
    value: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawRedirect {
    scheme: Option<String>,
    hostname: Option<String>,
    port: Option<u16>,
    path: Option<RawModifyPath>,
    status_code: Option<u16>,
}

#[derive(Deserialize)]
struct RawRewrite {
    hostname: Option<String>,
    path: Option<RawModifyPath>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawModifyPath {
    #[serde(rename = "type")]
    kind: String,
    replace_full_path: Option<String>,
    replace_prefix_match: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawMirror {
    backend_ref: RawBackend,
    percent: Option<u32>,
    fraction: Option<RawFraction>,
}

#[derive(Deserialize)]
struct RawFraction {
    numerator: u32,
    denominator: Option<u32>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct RawCors {
    allow_origins: Vec<String>,
    allow_methods: Vec<String>,
    allow_headers: Vec<String>,
    expose_headers: Vec<String>,
    allow_credentials: bool,
    max_age: Option<u32>,
}

#[derive(Deserialize)]
struct RawBackend {
    group: Option<String>,
    kind: Option<String>,
    namespace: Option<Arc<str>>,
    name: Arc<str>,
    port: Option<u16>,
    weight: Option<i64>,
    #[serde(default)]
    filters: Vec<RawFilter>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawTimeouts {
    request: Option<String>,
    backend_request: Option<String>,
}

#[derive(Deserialize)]
struct RawRetry {
    #[serde(default)]
    codes: Vec<u16>,
    attempts: Option<u16>,
    backoff: Option<String>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct RawSession {
    #[serde(rename = "type")]
    kind: Option<String>,
    session_name: Option<String>,
    cookie: Option<RawCookie>,
    header: Option<RawSessionHeader>,
    cookie_config: Option<RawCookie>,
    absolute_timeout: Option<String>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct RawCookie {
    name: Option<String>,
    path: Option<Arc<str>>,
    lifetime_type: Option<String>,
}

#[derive(Deserialize)]
struct RawSessionHeader {
    name: String,
}

/// What the reader of a part must know of the whole.
#[derive(Copy, Clone)]
struct Context {
    kind: RouteKind,
    gateway: bool,
    /// Set if a prefix may be replaced: the rule has exactly one match, by path prefix.
    prefix: bool,
}

pub(super) fn read(value: &Value, kind: Kind, head: Head, at: &mut At<'_>) -> Option<Route> {
    let raw: RawRoute = typed(value, "spec", at)?;
    let kinds = match kind {
        Kind::GrpcRoute => RouteKind::Grpc,
        Kind::TlsRoute => RouteKind::Tls,
        Kind::TcpRoute => RouteKind::Tcp,
        _ => RouteKind::Http,
    };
    let gateway = kind != Kind::LinkerdHttpRoute;
    let cx = Context { kind: kinds, gateway, prefix: false };
    let tuning = Tuning::read(&head.annotations, &mut at.field("metadata"), Severity::Error);
    let originate = Originate::read(&head.annotations, &mut at.field("metadata"));
    let mut at = at.field("spec");
    let parents = parents(raw.parent_refs, &head, gateway, &mut at.field("parentRefs"));
    let hosts = hosts(&raw.hostnames, kinds, &mut at.field("hostnames"));
    // The first versions of TLSRoute left the names open; a route without any is for every name.
    let named = value["apiVersion"].as_str().is_none_or(|version| !version.ends_with("/v1alpha2"));
    if kinds == RouteKind::Tls && raw.hostnames.is_empty() && named {
        at.field("hostnames").error("missing", "A TLSRoute lists the names that it is for");
    }
    let rules = rules(raw.rules, cx, &mut at.field("rules"));
    Some(Route { head, kind: kinds, gateway, parents, hosts, rules, tuning, originate })
}

fn parents(raw: Vec<RawParent>, head: &Head, gateway: bool, at: &mut At<'_>) -> Vec<ParentRef> {
    if raw.is_empty() {
        at.warn("missing: the route is attached to nothing", "Name a Service, Server or EgressNetwork");
    }
    if raw.len() > MAX_PARENTS {
        at.error(format!("{} parents are more than {MAX_PARENTS}", raw.len()), "Split the route");
    }
    let mut parents: Vec<ParentRef> = Vec::new();
    for (i, p) in raw.into_iter().enumerate() {
        let mut at = at.item(i);
        let default = if gateway { GATEWAY } else { POLICY };
        let group = p.group.as_deref();
        let kind = match (p.kind.as_deref().unwrap_or("Gateway"), group.unwrap_or(default)) {
            ("Service", "" | "core") => ParentKind::Service,
            // Linkerd takes an absent group for a Service.
            ("Service", _) if group.is_none() => ParentKind::Service,
            ("Server", POLICY) => ParentKind::Server,
            ("EgressNetwork", POLICY) => ParentKind::EgressNetwork,
            (kind, group) => {
                at.note(format!("parents of kind {group}/{kind} are left alone"));
                continue;
            }
        };
        if kind == ParentKind::EgressNetwork && p.port.is_none() {
            at.field("port").error("missing", "A route on an EgressNetwork names its port");
            continue;
        }
        if p.port == Some(0) {
            at.field("port").error("0 is no port", "Write 1 to 65535");
            continue;
        }
        if kind == ParentKind::Server && (p.port.is_some() || p.section_name.is_some()) {
            at.warn(
                "a Server has one port: port and sectionName must be absent",
                "Remove them; the route is not attached",
            );
            continue;
        }
        let parent = ParentRef {
            kind,
            namespace: p.namespace.unwrap_or_else(|| head.namespace.clone()),
            name: p.name,
            port: p.port,
            section: p.section_name,
        };
        if parents.contains(&parent) {
            at.error("the same parent is there twice", "Remove one of them");
            continue;
        }
        parents.push(parent);
    }
    parents
}

/// Hosts of HTTP routes, names of TLS routes; `*.` + suffix or exact.
fn hosts(raw: &[String], kind: RouteKind, at: &mut At<'_>) -> Vec<HostMatch> {
    let most = if kind == RouteKind::Tls { MAX_TLS_HOSTS } else { MAX_HOSTS };
    if raw.len() > most {
        at.error(format!("{} names are more than {most}", raw.len()), "Split the route");
    }
    let mut hosts = Vec::new();
    for (i, text) in raw.iter().enumerate() {
        match host(text) {
            Some(host) => hosts.push(host),
            None => at.item(i).error(
                format!("{text:?} is no host name"),
                "Write a DNS name without port, or *. and a suffix; no IP addresses",
            ),
        }
    }
    hosts
}

fn host(text: &str) -> Option<HostMatch> {
    let (wildcard, name) = match text.strip_prefix("*.") {
        Some(rest) => (true, rest),
        None => (false, text),
    };
    let label = |l: &str| {
        (1..=63).contains(&l.len())
            && l.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
            && !l.starts_with('-')
            && !l.ends_with('-')
    };
    let numeric = name.rsplit('.').next().is_some_and(|l| l.bytes().all(|b| b.is_ascii_digit()));
    if name.len() > 253 || !name.split('.').all(label) || numeric {
        return None;
    }
    let name = name.to_ascii_lowercase();
    Some(if wildcard { HostMatch::Suffix(format!(".{name}").into()) } else { HostMatch::Exact(name.into()) })
}

fn rules(raw: Option<Vec<RawRule>>, cx: Context, at: &mut At<'_>) -> Vec<Rule> {
    let raw = raw.unwrap_or_default();
    let l4 = matches!(cx.kind, RouteKind::Tls | RouteKind::Tcp);
    if l4 && raw.len() != 1 {
        at.error(format!("{} rules, where exactly 1 must be", raw.len()), "TLS and TCP routes have one rule");
    }
    if raw.len() > MAX_RULES {
        at.error(format!("{} rules are more than {MAX_RULES}", raw.len()), "Split the route");
    }
    if raw.iter().map(|r| r.matches.len()).sum::<usize>() > MAX_ROUTE_MATCHES {
        at.error(format!("more than {MAX_ROUTE_MATCHES} matches"), "Split the route");
    }
    if raw.is_empty() && !l4 {
        return vec![Rule::default()];
    }
    let mut names: Vec<String> = Vec::new();
    let mut rules = Vec::new();
    for (i, r) in raw.into_iter().enumerate() {
        let mut at = at.item(i);
        if let Some(name) = &r.name {
            if names.contains(name) {
                at.field("name").error(format!("the name {name:?} is there twice"), "Give each rule its own name");
            }
            names.push(name.clone());
        }
        rules.push(rule(r, cx, &mut at));
    }
    rules
}

fn rule(raw: RawRule, cx: Context, at: &mut At<'_>) -> Rule {
    let l4 = matches!(cx.kind, RouteKind::Tls | RouteKind::Tcp);
    let most = if cx.gateway { MAX_MATCHES } else { MAX_LINKERD_MATCHES };
    if raw.matches.len() > most {
        at.field("matches").error(format!("{} matches are more than {most}", raw.matches.len()), "Split the rule");
    }
    let only = |m: &RawMatch| m.path.as_ref().is_none_or(|p| p.kind.as_deref().is_none_or(|k| k == "PathPrefix"));
    let prefix = match raw.matches.as_slice() {
        [] => true,
        [m] => only(m),
        _ => false,
    };
    let matches: Vec<_> = raw
        .matches
        .into_iter()
        .enumerate()
        .filter_map(|(i, m)| {
            let mut at = at.field("matches");
            let mut at = at.item(i);
            match cx.kind {
                RouteKind::Grpc => grpc_match(m, &mut at).map(RouteMatch::Grpc),
                RouteKind::Http => http_match(m, &mut at).map(RouteMatch::Http),
                RouteKind::Tls | RouteKind::Tcp => None,
            }
        })
        .collect();
    let filters = filters(raw.filters, Context { prefix, ..cx }, &mut at.field("filters"));
    let redirects = filters.iter().any(|f| matches!(f, FilterSpec::Redirect { .. }));
    if redirects && !raw.backend_refs.is_empty() {
        at.field("backendRefs").error("a rule that redirects has no backends", "Remove the backends or the redirect");
    }
    if l4 && raw.backend_refs.is_empty() {
        at.field("backendRefs").error("missing", "TLS and TCP routes name at least one backend");
    }
    if raw.backend_refs.len() > MAX_LIST {
        at.field("backendRefs")
            .error(format!("{} backends are more than {MAX_LIST}", raw.backend_refs.len()), "Split the rule");
    }
    let backends = raw
        .backend_refs
        .into_iter()
        .enumerate()
        .map(|(i, b)| {
            let mut at = at.field("backendRefs");
            backend(b, Context { prefix, ..cx }, &mut at.item(i))
        })
        .collect();
    let (request_timeout, backend_request_timeout) = timeouts(raw.timeouts, cx, &mut at.field("timeouts"));
    let retry = raw.retry.and_then(|r| retry(r, &mut at.field("retry")));
    let session = raw.session_persistence.and_then(|s| session(s, &mut at.field("sessionPersistence")));
    Rule { matches, filters, backends, request_timeout, backend_request_timeout, retry, session }
}

fn regex(text: &str) -> Result<FullRegex, String> {
    FullRegex::new(text).map_err(|e| {
        let e = e.to_string();
        let why = e.lines().rev().find_map(|l| l.strip_prefix("error: ")).unwrap_or("too large").to_string();
        format!("the regular expression {text:?} can't be used ({why}); write one of RE2, without look-around")
    })
}

fn string_match(kind: Option<&str>, value: &str, at: &mut At<'_>) -> Option<StringMatch> {
    match kind.unwrap_or("Exact") {
        "Exact" => Some(StringMatch::Exact(value.into())),
        "RegularExpression" => at.field("value").take(regex(value)).map(StringMatch::Regex),
        other => {
            at.field("type").error(format!("{other:?} is no match type"), "Write Exact or RegularExpression");
            None
        }
    }
}

fn header_name(text: &str, at: &mut At<'_>) -> Option<HeaderName> {
    let name = HeaderName::from_bytes(text.as_bytes());
    at.field("name").take(name.map_err(|_| format!("{text:?} is no header name; write letters, digits and '-'")))
}

fn header_matches(raw: Vec<RawNamed>, at: &mut At<'_>) -> Vec<HeaderMatch> {
    if raw.len() > MAX_LIST {
        at.error(format!("{} headers are more than {MAX_LIST}", raw.len()), "Split the rule");
    }
    let mut out: Vec<HeaderMatch> = Vec::new();
    for (i, h) in raw.into_iter().enumerate() {
        let mut at = at.item(i);
        let Some(name) = header_name(&h.name, &mut at) else { continue };
        if out.iter().any(|o| o.name == name) {
            at.field("name").note("the header is there already; only its first entry counts");
            continue;
        }
        if let Some(value) = string_match(h.kind.as_deref(), &h.value, &mut at) {
            out.push(HeaderMatch { name, value });
        }
    }
    out
}

fn http_match(raw: RawMatch, at: &mut At<'_>) -> Option<HttpMatch> {
    let path = match raw.path {
        None => None,
        Some(p) => {
            let mut at = at.field("path");
            let value = p.value.as_deref().unwrap_or("/");
            match p.kind.as_deref().unwrap_or("PathPrefix") {
                "RegularExpression" => at.field("value").take(regex(value)).map(PathMatch::Regex),
                kind @ ("Exact" | "PathPrefix") => at.field("value").take(plain_path(value)).map(|()| match kind {
                    "Exact" => PathMatch::Exact(value.into()),
                    _ => PathMatch::Prefix(value.trim_end_matches('/').into()),
                }),
                other => {
                    at.field("type")
                        .error(format!("{other:?} is no path match"), "Write Exact, PathPrefix or RegularExpression");
                    None
                }
            }
        }
    };
    let method = match raw.method {
        None => None,
        Some(RawMethod::Http(m)) => match m.as_str() {
            "GET" | "HEAD" | "POST" | "PUT" | "DELETE" | "CONNECT" | "OPTIONS" | "TRACE" | "PATCH" => {
                Method::from_bytes(m.as_bytes()).ok()
            }
            _ => {
                at.field("method").error(format!("{m:?} is no method"), "Write it in capitals, like GET");
                None
            }
        },
        Some(RawMethod::Grpc { .. }) => {
            at.field("method").error("a gRPC method in an HTTPRoute", "Use a GRPCRoute");
            None
        }
    };
    let mut query: Vec<QueryMatch> = Vec::new();
    for (i, q) in raw.query_params.into_iter().enumerate() {
        let mut at = at.field("queryParams");
        let mut at = at.item(i);
        if query.iter().any(|o| *o.name == *q.name) {
            at.field("name").note("the parameter is there already; only its first entry counts");
            continue;
        }
        if let Some(value) = string_match(q.kind.as_deref(), &q.value, &mut at) {
            query.push(QueryMatch { name: q.name.into(), value });
        }
    }
    if query.len() > MAX_LIST {
        at.field("queryParams").error(format!("{} parameters are more than {MAX_LIST}", query.len()), "Split the rule");
    }
    Some(HttpMatch { path, headers: header_matches(raw.headers, &mut at.field("headers")), query, method })
}

/// Rules for Exact and PathPrefix values (resources.md 3.3).
fn plain_path(path: &str) -> Result<(), String> {
    let refuse = |why: &str| {
        Err(format!("{path:?} can't be a path to match ({why}); write it as it stands in a normal request, like /a/b"))
    };
    if !path.starts_with('/') {
        return refuse("it must start with /");
    }
    if path.len() > MAX_PATH {
        return refuse("it is longer than 1024 characters");
    }
    for bad in ["//", "/./", "/../", "%2f", "%2F", "#"] {
        if path.contains(bad) {
            return refuse(&format!("it contains {bad}"));
        }
    }
    if path.ends_with("/..") || path.ends_with("/.") {
        return refuse("it ends in a dot segment");
    }
    let bytes = path.as_bytes();
    for (i, b) in bytes.iter().enumerate() {
        let ok = match b {
            b'%' => bytes.get(i + 1..i + 3).is_some_and(|h| h.iter().all(u8::is_ascii_hexdigit)),
            b => b.is_ascii_alphanumeric() || b"/-._~!$&'()*+,;=:@".contains(b),
        };
        if !ok {
            return refuse("it contains a character that must be percent-encoded");
        }
    }
    Ok(())
}

fn grpc_match(raw: RawMatch, at: &mut At<'_>) -> Option<GrpcMatch> {
    let headers = header_matches(raw.headers, &mut at.field("headers"));
    let mut at = at.field("method");
    let (service, method) = match raw.method {
        None => (None, None),
        Some(RawMethod::Http(m)) => {
            at.error(format!("{m:?} is an HTTP method"), "Describe the gRPC method with service and method");
            return None;
        }
        Some(RawMethod::Grpc { service: None, method: None, .. }) => {
            at.error("neither service nor method", "Give at least one of them, or remove the field");
            return None;
        }
        Some(RawMethod::Grpc { kind, service, method }) => {
            let mut part = |text: Option<String>, field: &str| match (text, kind.as_deref().unwrap_or("Exact")) {
                (None, _) => None,
                (Some(t), "Exact") => {
                    let plain = |b: u8| b.is_ascii_alphanumeric() || b == b'_' || b == b'.';
                    if t.is_empty() || !t.bytes().all(plain) {
                        at.field(field).error(format!("{t:?} is no gRPC name"), "Letters, digits, '_' and '.'");
                        return None;
                    }
                    Some(StringMatch::Exact(t.into()))
                }
                (Some(t), "RegularExpression") => at.field(field).take(regex(&t)).map(StringMatch::Regex),
                (Some(_), other) => {
                    at.field("type").error(format!("{other:?} is no match type"), "Write Exact or RegularExpression");
                    None
                }
            };
            (part(service, "service"), part(method, "method"))
        }
    };
    Some(GrpcMatch { service, method, headers })
}

fn filters(raw: Vec<RawFilter>, cx: Context, at: &mut At<'_>) -> Vec<FilterSpec> {
    if raw.len() > MAX_LIST {
        at.error(format!("{} filters are more than {MAX_LIST}", raw.len()), "Split the rule");
    }
    let mut kinds: Vec<String> = Vec::new();
    let mut out: Vec<(u8, FilterSpec)> = Vec::new();
    for (i, f) in raw.into_iter().enumerate() {
        let mut at = at.item(i);
        let kind = f.kind.clone();
        if kinds.contains(&kind) && !matches!(kind.as_str(), "RequestMirror" | "ExtensionRef") {
            at.field("type").error(format!("{kind} is there twice"), "Put everything in one of them");
            continue;
        }
        let pair = |other: &str| kinds.iter().any(|k| k == other);
        if kind == "RequestRedirect" && pair("URLRewrite") || kind == "URLRewrite" && pair("RequestRedirect") {
            at.field("type").error("a redirect and a rewrite exclude each other", "Remove one of them");
        }
        if let Some(spec) = filter(f, cx, &mut at) {
            // CORS answers preflights, headers change before copies are made, rewrite and redirect come last (3.7).
            let rank = match &spec {
                FilterSpec::Ready(Filter::Cors(_)) => 0,
                FilterSpec::Ready(Filter::RequestHeaders(_)) => 1,
                FilterSpec::Mirror { .. } => 2,
                FilterSpec::Ready(Filter::Rewrite(_)) => 3,
                FilterSpec::Ready(_) => 4,
                FilterSpec::Redirect { .. } => 5,
            };
            out.push((rank, spec));
        }
        kinds.push(kind);
    }
    out.sort_by_key(|f| f.0);
    out.into_iter().map(|f| f.1).collect()
}

fn filter(raw: RawFilter, cx: Context, at: &mut At<'_>) -> Option<FilterSpec> {
    let kind = raw.kind.as_str();
    let linkerd = matches!(kind, "RequestHeaderModifier" | "ResponseHeaderModifier" | "RequestRedirect");
    if !cx.gateway && !linkerd {
        at.field("type").error(
            format!("a policy.linkerd.io HTTPRoute has no filter {kind}"),
            "Use an HTTPRoute of gateway.networking.k8s.io",
        );
        return None;
    }
    let grpc = matches!(kind, "RequestHeaderModifier" | "ResponseHeaderModifier" | "RequestMirror" | "ExtensionRef");
    if cx.kind == RouteKind::Grpc && !grpc {
        at.field("type")
            .error(format!("a GRPCRoute has no filter {kind}"), "Modify headers, mirror, or use an HTTPRoute");
        return None;
    }
    let missing = |at: &mut At<'_>, field: &str| {
        at.field(field).error(format!("missing, but the filter's type is {kind}"), "Give it, or another type");
        None
    };
    match kind {
        "RequestHeaderModifier" => match raw.request_header_modifier {
            Some(m) => {
                Some(FilterSpec::Ready(Filter::RequestHeaders(modifier(m, &mut at.field("requestHeaderModifier")))))
            }
            None => missing(at, "requestHeaderModifier"),
        },
        "ResponseHeaderModifier" => match raw.response_header_modifier {
            Some(m) => {
                Some(FilterSpec::Ready(Filter::ResponseHeaders(modifier(m, &mut at.field("responseHeaderModifier")))))
            }
            None => missing(at, "responseHeaderModifier"),
        },
        "RequestRedirect" => match raw.request_redirect {
            Some(r) => redirect(r, cx, &mut at.field("requestRedirect")),
            None => missing(at, "requestRedirect"),
        },
        "URLRewrite" => match raw.url_rewrite {
            Some(r) => {
                let mut at = at.field("urlRewrite");
                let host = host_part(r.hostname, &mut at);
                let path = r.path.and_then(|p| modify_path(p, cx, &mut at.field("path")));
                Some(FilterSpec::Ready(Filter::Rewrite(Rewrite { host, path })))
            }
            None => missing(at, "urlRewrite"),
        },
        "RequestMirror" => match raw.request_mirror {
            Some(m) => mirror(m, cx, &mut at.field("requestMirror")),
            None => missing(at, "requestMirror"),
        },
        "CORS" => match raw.cors {
            Some(c) => cors(c, &mut at.field("cors")),
            None => missing(at, "cors"),
        },
        other => {
            let what = match &raw.extension {
                Some(e) => format!(
                    "{other} {}/{} {}",
                    e["group"].as_str().unwrap_or_default(),
                    e["kind"].as_str().unwrap_or_default(),
                    e["name"].as_str().unwrap_or_default()
                ),
                None => other.to_string(),
            };
            at.field("type").warn(
                format!("the filter {what} is not supported"),
                "Requests that reach it are answered with an error; remove it",
            );
            Some(FilterSpec::Ready(Filter::Unknown { what: what.into() }))
        }
    }
}

fn modifier(raw: RawModifier, at: &mut At<'_>) -> HeaderModifier {
    let mut list = |raw: Vec<RawHeader>, field: &str| {
        let mut at = at.field(field);
        if raw.len() > MAX_LIST {
            at.error(format!("{} headers are more than {MAX_LIST}", raw.len()), "Split the rule");
        }
        let mut out: Vec<(HeaderName, HeaderValue)> = Vec::new();
        for (i, h) in raw.into_iter().enumerate() {
            let mut at = at.item(i);
            let Some(name) = header_name(&h.name, &mut at) else { continue };
            if is_framing(&name) {
                at.field("name").error(
                    format!("{name} can't be changed, it would break the message"),
                    "Change the host with URLRewrite",
                );
                continue;
            }
            let value = HeaderValue::from_str(&h.value)
                .map_err(|_| format!("{:?} is no header value; write visible ASCII", h.value));
            let Some(value) = at.field("value").take(value) else { continue };
            if !out.iter().any(|o| o.0 == name) {
                out.push((name, value));
            }
        }
        out
    };
    let (set, add) = (list(raw.set, "set"), list(raw.add, "add"));
    let mut remove = Vec::new();
    for (i, text) in raw.remove.iter().enumerate() {
        let mut at = at.field("remove");
        let mut at = at.item(i);
        match HeaderName::from_bytes(text.as_bytes()) {
            Ok(name) if is_framing(&name) => {
                at.error(format!("{name} can't be removed, it would break the message"), "Leave it alone")
            }
            Ok(name) => remove.push(name),
            Err(_) => at.error(format!("{text:?} is no header name"), "Write letters, digits and '-'"),
        }
    }
    HeaderModifier { add, set, remove }
}

/// Headers that frame or address a message; a filter must not be able to break it (resources.md 3.7).
fn is_framing(name: &HeaderName) -> bool {
    matches!(
        name.as_str(),
        "host" | "content-length" | "transfer-encoding" | "connection" | "upgrade" | "te" | "trailer" | "keep-alive"
    )
}

fn host_part(raw: Option<String>, at: &mut At<'_>) -> Option<Arc<str>> {
    let text = raw?;
    match host(&text) {
        Some(HostMatch::Exact(name)) => Some(name),
        Some(HostMatch::Suffix(_)) | None => {
            at.field("hostname")
                .error(format!("{text:?} is no host name"), "Write a DNS name without port and wildcard");
            None
        }
    }
}

fn modify_path(raw: RawModifyPath, cx: Context, at: &mut At<'_>) -> Option<ModifyPath> {
    let absolute = |text: &str, at: &mut At<'_>, field: &str| {
        let ok = text.starts_with('/') && text.len() <= MAX_PATH && text.parse::<http::uri::PathAndQuery>().is_ok();
        if !ok {
            at.field(field).error(format!("{text:?} is no absolute path"), "Start it with / and escape blanks");
        }
        ok
    };
    match (raw.kind.as_str(), raw.replace_full_path, raw.replace_prefix_match) {
        ("ReplaceFullPath", Some(path), None) => absolute(&path, at, "replaceFullPath")
            .then(|| ModifyPath::ReplaceFull { path: path.into(), keep_query: cx.gateway }),
        ("ReplacePrefixMatch", None, Some(prefix)) => {
            if !cx.prefix {
                at.field("type").error(
                    "ReplacePrefixMatch needs a rule with exactly one match, and that by PathPrefix",
                    "Split the rule or use ReplaceFullPath",
                );
                return None;
            }
            (prefix.is_empty() || absolute(&prefix, at, "replacePrefixMatch"))
                .then(|| ModifyPath::ReplacePrefix(prefix.into()))
        }
        ("ReplaceFullPath" | "ReplacePrefixMatch", ..) => {
            at.error("the type and the given field do not fit", "Give exactly the field that the type names");
            None
        }
        (other, ..) => {
            at.field("type")
                .error(format!("{other:?} is no path change"), "Write ReplaceFullPath or ReplacePrefixMatch");
            None
        }
    }
}

fn redirect(raw: RawRedirect, cx: Context, at: &mut At<'_>) -> Option<FilterSpec> {
    let scheme = match raw.scheme.as_deref() {
        None => None,
        Some("http") => Some(Scheme::HTTP),
        Some("https") => Some(Scheme::HTTPS),
        Some(other) => {
            at.field("scheme").error(format!("{other:?} is no scheme"), "Write http or https");
            None
        }
    };
    let allowed: &[u16] = if cx.gateway { &[301, 302, 303, 307, 308] } else { &[301, 302] };
    let status = raw.status_code.unwrap_or(302);
    if !allowed.contains(&status) {
        at.field("statusCode")
            .error(format!("{status} is no redirect status here"), format!("Write one of {allowed:?}"));
    }
    if raw.port == Some(0) {
        at.field("port").error("0 is no port", "Write 1 to 65535");
    }
    let host = host_part(raw.hostname, at);
    let path = raw.path.and_then(|p| modify_path(p, cx, &mut at.field("path")));
    let status = StatusCode::from_u16(status).unwrap_or(StatusCode::FOUND);
    Some(FilterSpec::Redirect { scheme, host, port: raw.port, path, status })
}

fn mirror(raw: RawMirror, cx: Context, at: &mut At<'_>) -> Option<FilterSpec> {
    let ratio = match (raw.percent, raw.fraction) {
        (Some(_), Some(_)) => {
            at.error("percent and fraction exclude each other", "Remove one of them");
            Some(Ratio::ALWAYS)
        }
        (None, None) => Some(Ratio::ALWAYS),
        (Some(p), None) => Ratio::new(p, 100).filter(|_| p <= 100),
        (None, Some(f)) => {
            let d = f.denominator.unwrap_or(100);
            Ratio::new(f.numerator, d).filter(|_| f.numerator <= d)
        }
    };
    if ratio.is_none() {
        at.error(
            "the share is not between 0 and 1",
            "percent is 0 to 100; numerator is at most denominator, which is at least 1",
        );
    }
    let backend = backend(raw.backend_ref, cx, &mut at.field("backendRef"));
    Some(FilterSpec::Mirror { backend, ratio: ratio? })
}

fn cors(raw: RawCors, at: &mut At<'_>) -> Option<FilterSpec> {
    for (i, origin) in raw.allow_origins.iter().enumerate() {
        let plain = origin.split_once("://").is_some_and(|(scheme, host)| {
            !scheme.is_empty()
                && !host.is_empty()
                && !host.contains(['/', ' ', '?', '#'])
                && !host.trim_start_matches("*.").trim_start_matches('*').contains('*')
        });
        if origin != "*" && !plain {
            let mut at = at.field("allowOrigins");
            at.item(i).error(
                format!("{origin:?} is no origin"),
                "Write *, or scheme://host[:port] whose host may be * or begin with *.",
            );
        }
        if origin == "*" && raw.allow_origins.len() > 1 {
            at.field("allowOrigins").error("* must be the only entry", "Remove the others");
        }
    }
    for (field, list, most) in [
        ("allowOrigins", &raw.allow_origins, 64),
        ("allowMethods", &raw.allow_methods, 9),
        ("allowHeaders", &raw.allow_headers, 64),
        ("exposeHeaders", &raw.expose_headers, 64),
    ] {
        if list.len() > most {
            at.field(field).error(format!("{} entries are more than {most}", list.len()), "Write *");
        }
        for (i, entry) in list.iter().enumerate().filter(|_| field != "allowOrigins") {
            if entry != "*" && HeaderName::from_bytes(entry.as_bytes()).is_err() {
                at.field(field).item(i).error(format!("{entry:?} is no name"), "Write letters, digits and '-', or *");
            }
            if entry == "*" && list.len() > 1 {
                at.field(field).error("* must be the only entry", "Remove the others");
            }
        }
    }
    let max_age = raw.max_age.unwrap_or(5);
    if max_age == 0 {
        at.field("maxAge").error("0 is too short", "Write at least 1 (second)");
    }
    Some(FilterSpec::Ready(Filter::Cors(Arc::new(Cors {
        allow_origins: raw.allow_origins,
        allow_methods: raw.allow_methods,
        allow_headers: raw.allow_headers,
        expose_headers: raw.expose_headers,
        allow_credentials: raw.allow_credentials,
        max_age: Duration::from_secs(max_age.into()),
    }))))
}

fn backend(raw: RawBackend, cx: Context, at: &mut At<'_>) -> BackendRef {
    let group = raw.group.as_deref().unwrap_or_default();
    let kind = match (group, raw.kind.as_deref().unwrap_or("Service")) {
        ("" | "core", "Service") => BackendKind::Service,
        (POLICY, "EgressNetwork") => BackendKind::EgressNetwork,
        (group, kind) => {
            at.warn(format!("{group}/{kind} can't be a backend"), "Its share is answered with 500; use a Service");
            BackendKind::Unknown(format!("{group}/{kind}").into())
        }
    };
    if kind == BackendKind::Service && raw.port.is_none() {
        at.field("port").error("missing", "A Service as a backend needs one of its ports");
    }
    if raw.port == Some(0) {
        at.field("port").error("0 is no port", "Write 1 to 65535");
    }
    let weight = raw.weight.unwrap_or(1);
    if !(0..=i64::from(MAX_WEIGHT)).contains(&weight) {
        at.field("weight").error(format!("{weight} is no weight"), format!("Write 0 to {MAX_WEIGHT}"));
    }
    BackendRef {
        kind,
        namespace: raw.namespace,
        name: raw.name,
        port: raw.port,
        weight: u32::try_from(weight).unwrap_or(0).min(MAX_WEIGHT),
        filters: filters(raw.filters, cx, &mut at.field("filters")),
    }
}

fn timeouts(raw: Option<RawTimeouts>, cx: Context, at: &mut At<'_>) -> (Option<Duration>, Option<Duration>) {
    let Some(raw) = raw else { return (None, None) };
    let parse = if cx.gateway { duration::gep2257 } else { duration::go };
    let mut limit = |text: Option<String>, field: &str| at.field(field).take(parse(&text?)).filter(|d| !d.is_zero());
    let request = limit(raw.request, "request");
    let backend_request = limit(raw.backend_request, "backendRequest");
    if let (Some(r), Some(b)) = (request, backend_request)
        && b > r
    {
        at.field("backendRequest").error(
            format!("one try may take {b:?}, longer than the whole request's {r:?}"),
            "Make it at most timeouts.request",
        );
    }
    (request, backend_request)
}

fn retry(raw: RawRetry, at: &mut At<'_>) -> Option<Retry> {
    for (i, code) in raw.codes.iter().enumerate().filter(|(_, c)| !(400..=599).contains(*c)) {
        at.field("codes").item(i).error(format!("{code} can't be retried"), "Write codes of 400 to 599");
    }
    if raw.attempts == Some(0) {
        at.field("attempts").error("0 retries", "Write at least 1, or remove the retry stanza");
    }
    let mut retry = plain_retry();
    if let Some(text) = raw.backoff {
        let min = at.field("backoff").take(duration::gep2257(&text)).unwrap_or_default();
        let grown = min.saturating_mul(10).max(Duration::from_millis(250));
        retry.backoff = Some(Backoff { min, max: grown, jitter: 1.0 });
    }
    Some(Retry {
        max_retries: raw.attempts.unwrap_or(1),
        statuses: raw.codes.iter().map(|c| *c..=*c).collect(),
        connection_errors: true,
        ..retry
    })
}

/// Reads session persistence; also of backend policies.
pub(super) fn session(raw: RawSession, at: &mut At<'_>) -> Option<SessionSpec> {
    let absolute_timeout = match raw.absolute_timeout {
        Some(text) => at.field("absoluteTimeout").take(duration::gep2257(&text)).filter(|d| !d.is_zero()),
        None => None,
    };
    let cookie = raw.cookie.or(raw.cookie_config);
    let mut spec = SessionSpec { token: None, path: "/".into(), permanent: false, absolute_timeout };
    match raw.kind.as_deref().unwrap_or("Cookie") {
        "Cookie" => {
            if raw.header.is_some() {
                at.field("header").error("given, but the type is Cookie", "Remove it or set type: Header");
            }
            let cookie = cookie.unwrap_or_default();
            spec.path = cookie.path.unwrap_or_else(|| "/".into());
            if !spec.path.starts_with('/') || spec.path.contains([';', ' ']) {
                at.field("cookie.path").error(format!("{:?} is no cookie path", spec.path), "Start it with /");
            }
            spec.permanent = match cookie.lifetime_type.as_deref().unwrap_or("Session") {
                "Session" => false,
                "Permanent" => true,
                other => {
                    at.field("cookie.lifetimeType")
                        .error(format!("{other:?} is no lifetime"), "Write Session or Permanent");
                    false
                }
            };
            if spec.permanent && spec.absolute_timeout.is_none() {
                at.field("absoluteTimeout").error("missing", "A permanent cookie needs one");
            }
            if let Some(name) = cookie.name.or(raw.session_name) {
                // A cookie name is a token (RFC 6265, 4.1.1), as header names are.
                if HeaderName::from_bytes(name.as_bytes()).is_err() {
                    at.field("cookie.name")
                        .error(format!("{name:?} is no cookie name"), "Write letters, digits and '-'");
                }
                let (path, permanent) = (spec.path.clone(), spec.permanent);
                spec.token = Some(SessionToken::Cookie { name: name.into(), path, permanent });
            }
        }
        "Header" => {
            if cookie.is_some() {
                at.field("cookie").error("given, but the type is Header", "Remove it or set type: Cookie");
            }
            let Some(name) = raw.header.map(|h| h.name).or(raw.session_name) else {
                at.field("header.name").error("missing", "Sessions by header need its name");
                return None;
            };
            spec.token = header_name(&name, &mut at.field("header")).map(SessionToken::Header);
            spec.token.as_ref()?;
        }
        other => {
            at.field("type").error(format!("{other:?} is no session type"), "Write Cookie or Header");
            return None;
        }
    }
    Some(spec)
}

#[cfg(test)]
mod tests {
    use super::{super::tests::check, super::*, *};

    const HEAD: &str = "apiVersion: gateway.networking.k8s.io/v1, metadata: {name: r, namespace: shop}";

    #[track_caller]
    fn http(rule: &str, issues: &[&str]) -> Route {
        let parent = "parentRefs: [{group: '', kind: Service, name: web}]";
        let o = check(&format!("{{{HEAD}, kind: HTTPRoute, spec: {{{parent}, rules: [{rule}]}}}}"), issues);
        match o.as_deref() {
            Some(Object::Route(r)) => r.clone(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn matches() {
        let r = http(
            "{matches: [{path: {value: /v2/}, headers: [{name: X-A, value: b}, {name: x-a, value: c}], method: GET, queryParams: [{name: q, value: '1'}]}]}",
            &[],
        );
        let RouteMatch::Http(m) = &r.rules[0].matches[0] else { panic!() };
        assert_eq!(m.path, Some(PathMatch::Prefix("/v2".into())));
        assert_eq!((m.headers.len(), m.query.len(), m.method.as_ref()), (1, 1, Some(&Method::GET)));
        let m = "spec.rules[0].matches[0]";
        for path in ["x", "//", "/a/../b", "/a%2fb", "/a#b", "/a b", "/.", "/%zz"] {
            http(&format!("{{matches: [{{path: {{type: Exact, value: '{path}'}}}}]}}"), &[&format!("{m}.path.value")]);
        }
        http("{matches: [{path: {type: RegularExpression, value: '('}}]}", &[&format!("{m}.path.value")]);
        http("{matches: [{path: {type: Glob, value: /}}]}", &[&format!("{m}.path.type")]);
        http("{matches: [{method: get}]}", &[&format!("{m}.method")]);
        http("{matches: [{headers: [{name: 'a b', value: c}]}]}", &[&format!("{m}.headers[0].name")]);
    }

    #[test]
    fn timeouts_and_retries() {
        let r = http(
            "{timeouts: {request: 1h30m, backendRequest: 500ms}, retry: {codes: [503], attempts: 3, backoff: 100ms}}",
            &[],
        );
        let rule = &r.rules[0];
        assert_eq!(rule.request_timeout, Some(Duration::from_secs(5400)));
        let retry = rule.retry.as_ref().unwrap();
        assert_eq!((retry.max_retries, retry.connection_errors), (3, true));
        assert_eq!(http("{timeouts: {request: 0s, backendRequest: 5s}}", &[]).rules[0].request_timeout, None);
        http("{timeouts: {request: 1.5h}}", &["spec.rules[0].timeouts.request"]);
        http("{timeouts: {request: 1s, backendRequest: 2s}}", &["spec.rules[0].timeouts.backendRequest"]);
        http("{retry: {codes: [200], attempts: 0}}", &["spec.rules[0].retry.codes[0]", "spec.rules[0].retry.attempts"]);
    }

    #[test]
    fn backends() {
        let r = http("{backendRefs: [{name: a, port: 80, weight: 9}, {name: b, port: 80, weight: 0}]}", &[]);
        assert_eq!(r.rules[0].backends.iter().map(|b| b.weight).collect::<Vec<_>>(), [9, 0]);
        let b = "spec.rules[0].backendRefs[0]";
        http("{backendRefs: [{name: a}]}", &[&format!("{b}.port")]);
        http("{backendRefs: [{name: a, port: 80, weight: -1}]}", &[&format!("{b}.weight")]);
        http("{backendRefs: [{name: a, port: 80, weight: 1000001}]}", &[&format!("{b}.weight")]);
        http("{backendRefs: [{name: a, kind: Bucket}]}", &[b]);
        let parent = "parentRefs: [{group: '', kind: Service, name: web}]";
        check(
            &format!("{{{HEAD}, kind: HTTPRoute, spec: {{{parent}, rules: [{{backendRefs: [{{port: 80}}]}}]}}}}"),
            &[&format!("{b}.name")],
        );
    }

    #[test]
    fn filters_are_checked_and_ordered() {
        let r = http(
            "{filters: [{type: URLRewrite, urlRewrite: {hostname: a.b, path: {type: ReplacePrefixMatch, replacePrefixMatch: /}}}, {type: RequestHeaderModifier, requestHeaderModifier: {set: [{name: a, value: b}]}}, {type: CORS, cors: {allowOrigins: ['https://*.a.b']}}]}",
            &[],
        );
        assert!(matches!(r.rules[0].filters[0], FilterSpec::Ready(Filter::Cors(_))));
        assert!(matches!(r.rules[0].filters[2], FilterSpec::Ready(Filter::Rewrite(_))));
        let f = |filter: &str, issues: &[&str]| {
            let issues: Vec<_> = issues.iter().map(|i| format!("spec.rules[0].filters[0].{i}")).collect();
            http(&format!("{{filters: [{filter}]}}"), &issues.iter().map(String::as_str).collect::<Vec<_>>());
        };
        f(
            "{type: RequestRedirect, requestRedirect: {statusCode: 303, scheme: https, path: {type: ReplaceFullPath, replaceFullPath: /x}}}",
            &[],
        );
        f("{type: RequestRedirect, requestRedirect: {statusCode: 300}}", &["requestRedirect.statusCode"]);
        f("{type: RequestRedirect, requestRedirect: {scheme: ftp}}", &["requestRedirect.scheme"]);
        f(
            "{type: RequestRedirect, requestRedirect: {path: {type: ReplaceFullPath, replaceFullPath: x}}}",
            &["requestRedirect.path.replaceFullPath"],
        );
        f("{type: RequestRedirect}", &["requestRedirect"]);
        f("{type: RequestMirror, requestMirror: {backendRef: {name: a, port: 1}, percent: 101}}", &["requestMirror"]);
        f(
            "{type: RequestMirror, requestMirror: {backendRef: {name: a, port: 1}, fraction: {numerator: 1, denominator: 0}}}",
            &["requestMirror"],
        );
        f("{type: CORS, cors: {allowOrigins: [nothing]}}", &["cors.allowOrigins[0]"]);
        f(
            "{type: RequestHeaderModifier, requestHeaderModifier: {set: [{name: Host, value: b}]}}",
            &["requestHeaderModifier.set[0].name"],
        );
        f("{type: Magic}", &["type"]);
        http(
            "{backendRefs: [{name: a, port: 80}], filters: [{type: RequestRedirect, requestRedirect: {scheme: https}}]}",
            &["spec.rules[0].backendRefs"],
        );
    }

    #[test]
    fn parents_and_hosts() {
        let spec =
            |kind: &str, spec: &str, issues: &[&str]| check(&format!("{{{HEAD}, kind: {kind}, spec: {spec}}}"), issues);
        let o = spec(
            "HTTPRoute",
            "{parentRefs: [{name: gw}, {group: '', kind: Service, name: a, sectionName: http}, {group: policy.linkerd.io, kind: EgressNetwork, name: e, port: 443}], hostnames: ['*.Example.com']}",
            &[],
        );
        let Some(Object::Route(r)) = o.as_deref() else { panic!() };
        assert_eq!(
            r.parents.iter().map(|p| p.kind).collect::<Vec<_>>(),
            [ParentKind::Service, ParentKind::EgressNetwork]
        );
        assert_eq!(r.hosts, [HostMatch::Suffix(".example.com".into())]);
        assert_eq!(r.rules.len(), 1);
        let p = "parentRefs: [{group: '', kind: Service, name: a}]";
        spec(
            "HTTPRoute",
            &format!("{{{p}, hostnames: ['1.2.3.4', 'a:80', '*']}}"),
            &["spec.hostnames[0]", "spec.hostnames[1]", "spec.hostnames[2]"],
        );
        spec(
            "HTTPRoute",
            "{parentRefs: [{group: policy.linkerd.io, kind: EgressNetwork, name: e}]}",
            &["spec.parentRefs[0].port"],
        );
        spec("TCPRoute", &format!("{{{p}, rules: []}}"), &["spec.rules"]);
        spec("TLSRoute", &format!("{{{p}, rules: [{{backendRefs: [{{name: a, port: 1}}]}}]}}"), &["spec.hostnames"]);
        spec("TCPRoute", &format!("{{{p}, rules: [{{}}]}}"), &["spec.rules[0].backendRefs"]);
    }

    #[test]
    fn grpc_and_linkerd_routes() {
        let p = "parentRefs: [{group: core, kind: Service, name: a}]";
        let grpc = |m: &str, issues: &[&str]| {
            check(&format!("{{{HEAD}, kind: GRPCRoute, spec: {{{p}, rules: [{{matches: [{m}]}}]}}}}"), issues)
        };
        grpc("{method: {service: a.B, method: C}}", &[]);
        grpc("{method: {}}", &["spec.rules[0].matches[0].method"]);
        grpc("{method: {service: 'a/b'}}", &["spec.rules[0].matches[0].method.service"]);
        let linkerd = |rule: &str, issues: &[&str]| {
            check(
                &format!(
                    "{{apiVersion: policy.linkerd.io/v1beta3, kind: HTTPRoute, metadata: {{name: r}}, spec: {{{p}, rules: [{rule}]}}}}"
                ),
                issues,
            )
        };
        let o = linkerd("{timeouts: {request: 1.5s}}", &[]);
        let Some(Object::Route(r)) = o.as_deref() else { panic!() };
        assert_eq!((r.gateway, r.rules[0].request_timeout), (false, Some(Duration::from_millis(1500))));
        linkerd("{filters: [{type: URLRewrite, urlRewrite: {}}]}", &["spec.rules[0].filters[0].type"]);
        linkerd("{timeouts: {request: -1s}}", &["spec.rules[0].timeouts.request"]);
    }

    #[test]
    fn sessions() {
        let s =
            |s: &str, issues: &[&str]| http(&format!("{{sessionPersistence: {s}}}"), issues).rules[0].session.clone();
        assert!(s("{cookie: {name: sid}}", &[]).unwrap().token.is_some());
        assert_eq!(s("{}", &[]).unwrap().token, None);
        s("{type: Header}", &["spec.rules[0].sessionPersistence.header.name"]);
        s("{cookie: {lifetimeType: Permanent}}", &["spec.rules[0].sessionPersistence.absoluteTimeout"]);
        s(
            "{type: Header, header: {name: x}, absoluteTimeout: soon}",
            &["spec.rules[0].sessionPersistence.absoluteTimeout"],
        );
    }

    #[test]
    fn bad_annotations_on_routes_are_errors() {
        check(
            "{apiVersion: gateway.networking.k8s.io/v1, kind: HTTPRoute, metadata: {name: r, annotations: {timeout.linkerd.io/request: fast}}, spec: {parentRefs: [{group: '', kind: Service, name: a}]}}",
            &["metadata.annotations[\"timeout.linkerd.io/request\"]"],
        );
    }
}
