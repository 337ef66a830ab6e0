//! What routes do to requests and responses: header changes, redirects, rewrites, CORS, injected failures
//! (behaviour.md C.8, resources.md 3.7).
//!
//! Filters run in their order in the list. Copies for mirrors are the caller's to make: a copy needs the body.

use super::route::Match;
use crate::{
    error::{Cause, Error},
    policy::route::{Cors, Filter, HeaderModifier, ModifyPath, Precedence, Redirect, Rewrite},
};
use http::{
    HeaderMap, HeaderName, HeaderValue, Method, Request, StatusCode, Uri, Version,
    header::{self, HOST, ORIGIN},
    uri::{Authority, PathAndQuery, Scheme},
};
use std::fmt::Write;

/// What becomes of a request after its filters.
#[derive(Debug)]
pub enum Flow {
    /// It goes on. The follow-up is needed by [`on_response`].
    Forward(FollowUp),
    /// A filter answers it (CORS preflight); the body is empty.
    Answer(Box<http::response::Parts>),
}

/// What [`on_response`] has to know of the request.
#[derive(Clone, Debug, Default)]
pub struct FollowUp {
    origin: Option<HeaderValue>,
}

/// Headers that a modifier must not touch, because they frame the message or belong to the connection; the host is
/// for rewrites alone (resources.md 3.7).
const FRAMING: [HeaderName; 8] = [
    header::CONNECTION,
    header::CONTENT_LENGTH,
    header::HOST,
    header::TE,
    header::TRAILER,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
    HeaderName::from_static("keep-alive"),
];

/// Runs the filters of a rule on a request. `random` draws a number below its argument, for ratios.
///
/// # Errors
/// With the cause that [`super::rescue`] turns into the answer: a redirect, an injected failure, or `Unexpected` for a
/// filter that cannot be applied.
pub fn on_request<'a, B>(
    filters: impl IntoIterator<Item = &'a Filter>,
    req: &mut Request<B>,
    matched: &Match,
    random: impl FnMut(u32) -> u32,
) -> Result<Flow, Error> {
    on_request_copied(filters, req, matched, random, |_| ())
}

/// As [`on_request`]; `copy` is called once, with the request as it is at the first mirror of the list.
///
/// # Errors
/// As [`on_request`].
pub fn on_request_copied<'a, B>(
    filters: impl IntoIterator<Item = &'a Filter>,
    req: &mut Request<B>,
    matched: &Match,
    mut random: impl FnMut(u32) -> u32,
    copy: impl FnOnce(&mut Request<B>),
) -> Result<Flow, Error> {
    let mut follow_up = FollowUp::default();
    let mut copy = Some(copy);
    for filter in filters {
        match filter {
            Filter::RequestHeaders(modifier) => modify(modifier, req.headers_mut()),
            Filter::Redirect(r) => redirect(r, req, matched)?,
            Filter::Rewrite(r) => rewrite(r, req, matched)?,
            Filter::Cors(cors) => {
                if let Some(answer) = preflight(cors, req) {
                    return Ok(Flow::Answer(Box::new(answer)));
                }
                follow_up.origin = req.headers().get(ORIGIN).filter(|origin| allows(cors, origin)).cloned();
            }
            Filter::HttpFailure(f) if f.ratio.draw(&mut random) => {
                return Err(Cause::InjectedHttp { status: f.status, message: f.message.clone() }.into());
            }
            Filter::GrpcFailure(f) if f.ratio.draw(&mut random) => {
                let code = if f.code > 16 { 2 } else { f.code };
                return Err(Cause::InjectedGrpc { code, message: f.message.clone() }.into());
            }
            Filter::Unknown { what } => {
                return Err(Cause::Unexpected(format!("policy configured with unknown filter: {what}").into()).into());
            }
            Filter::Mirror(_) => {
                if let Some(copy) = copy.take() {
                    copy(req);
                }
            }
            Filter::ResponseHeaders(_) | Filter::HttpFailure(_) | Filter::GrpcFailure(_) => {}
        }
    }
    Ok(Flow::Forward(follow_up))
}

/// Runs the filters of a rule on the headers of its response.
pub fn on_response<'a>(filters: impl IntoIterator<Item = &'a Filter>, headers: &mut HeaderMap, follow_up: &FollowUp) {
    for filter in filters {
        match filter {
            Filter::ResponseHeaders(modifier) => modify(modifier, headers),
            Filter::Cors(cors) => {
                if let Some(origin) = &follow_up.origin {
                    allow(cors, origin, headers);
                    list(headers, header::ACCESS_CONTROL_EXPOSE_HEADERS, &cors.expose_headers);
                }
            }
            Filter::RequestHeaders(_)
            | Filter::Redirect(_)
            | Filter::Rewrite(_)
            | Filter::Mirror(_)
            | Filter::HttpFailure(_)
            | Filter::GrpcFailure(_)
            | Filter::Unknown { .. } => {}
        }
    }
}

/// Add, set, remove.
fn modify(modifier: &HeaderModifier, headers: &mut HeaderMap) {
    for (name, value) in &modifier.add {
        if !FRAMING.contains(name) {
            headers.append(name, value.clone());
        }
    }
    for (name, value) in &modifier.set {
        if !FRAMING.contains(name) {
            headers.insert(name, value.clone());
        }
    }
    for name in &modifier.remove {
        if !FRAMING.contains(name) {
            headers.remove(name);
        }
    }
}

fn redirect<B>(redirect: &Redirect, req: &Request<B>, matched: &Match) -> Result<(), Error> {
    let invalid = |what: &str| Error::new(Cause::Unexpected(format!("invalid redirect: {what}").into()));
    let uri = req.uri();
    let old_scheme = uri.scheme().unwrap_or(&Scheme::HTTP);
    let scheme = redirect.scheme.as_ref().unwrap_or(old_scheme);
    let old_host = uri.host().filter(|h| !h.is_empty());
    let old_port = uri.port_u16();
    let host = redirect.host.as_deref().or(old_host).ok_or_else(|| invalid("the request names no host"))?;
    let default = default_port(scheme);
    let port = match matched.precedence {
        Precedence::Linkerd => match (&redirect.host, redirect.port) {
            (Some(_), Some(port)) => Some(port),
            (Some(_), None) => old_port.filter(|p| Some(*p) != default),
            (None, Some(port)) => (Some(port) != default).then_some(port),
            (None, None) => old_port,
        },
        Precedence::GatewayApi => match (redirect.port, &redirect.scheme) {
            (Some(port), _) => Some(port),
            (None, Some(_)) => default,
            (None, None) => old_port,
        }
        .filter(|p| Some(*p) != default),
    };
    let mut path = uri.path().to_string();
    let mut query = uri.query();
    if let Some(change) = &redirect.path {
        path = change_path(change, &path, matched).ok_or_else(|| invalid("the rule has no path prefix to replace"))?;
        if let ModifyPath::ReplaceFull { keep_query: false, .. } = change {
            query = None;
        }
    }
    let mut location = format!("{scheme}://{host}");
    if let Some(port) = port {
        let _ = write!(location, ":{port}");
    }
    location.push_str(&path);
    if let Some(query) = query {
        location.push('?');
        location.push_str(query);
    }
    let unchanged = scheme == old_scheme
        && old_host.is_some_and(|h| h.eq_ignore_ascii_case(host))
        && port.or(default) == old_port.or(default_port(old_scheme))
        && path == uri.path()
        && query == uri.query();
    if unchanged {
        return Ok(());
    }
    let location = HeaderValue::try_from(location).map_err(|_| invalid("the location is no header value"))?;
    Err(Cause::Redirect { status: redirect.status, location }.into())
}

fn default_port(scheme: &Scheme) -> Option<u16> {
    match scheme.as_str() {
        "http" => Some(80),
        "https" => Some(443),
        _ => None,
    }
}

/// The new path, without a query; none if a prefix is to be replaced and the rule matched by none.
fn change_path(change: &ModifyPath, path: &str, matched: &Match) -> Option<String> {
    match change {
        ModifyPath::ReplaceFull { path, .. } => Some(path.to_string()),
        ModifyPath::ReplacePrefix(replacement) => {
            let rest = path.get(matched.prefix?..)?;
            let mut new = replacement.trim_end_matches('/').to_string();
            new.push_str(rest);
            if !new.starts_with('/') {
                new.insert(0, '/');
            }
            Some(new)
        }
    }
}

fn rewrite<B>(rewrite: &Rewrite, req: &mut Request<B>, matched: &Match) -> Result<(), Error> {
    let invalid = |what: &str| Error::new(Cause::Unexpected(format!("invalid rewrite: {what}").into()));
    let mut parts = req.uri().clone().into_parts();
    if let Some(change) = &rewrite.path {
        let old = parts.path_and_query.as_ref();
        let path = old.map_or("/", |p| p.path());
        let mut new = change_path(change, path, matched).ok_or_else(|| invalid("the rule has no path prefix"))?;
        let keep_query = !matches!(change, ModifyPath::ReplaceFull { keep_query: false, .. });
        if let Some(query) = old.and_then(|p| p.query()).filter(|_| keep_query) {
            new.push('?');
            new.push_str(query);
        }
        parts.path_and_query = Some(PathAndQuery::try_from(new).map_err(|_| invalid("the path is not legal"))?);
    }
    if let Some(host) = &rewrite.host {
        let authority = Authority::try_from(&**host).map_err(|_| invalid("the host is not legal"))?;
        let value = HeaderValue::try_from(&**host).map_err(|_| invalid("the host is not legal"))?;
        parts.authority = Some(authority);
        if req.version() < Version::HTTP_2 || req.headers().contains_key(HOST) {
            req.headers_mut().insert(HOST, value);
        }
    }
    if parts.authority.is_some() && parts.scheme.is_none() {
        parts.scheme = Some(Scheme::HTTP);
    }
    if parts.path_and_query.is_none() {
        parts.path_and_query = Some(PathAndQuery::from_static("/"));
    }
    *req.uri_mut() = Uri::from_parts(parts).map_err(|_| invalid("the URI is not legal"))?;
    Ok(())
}

/// The answer to a preflight, if the request is one. An origin that is not allowed gets no CORS headers.
fn preflight<B>(cors: &Cors, req: &Request<B>) -> Option<http::response::Parts> {
    let headers = req.headers();
    let origin = headers.get(ORIGIN)?;
    let method = headers.get(header::ACCESS_CONTROL_REQUEST_METHOD)?;
    if req.method() != Method::OPTIONS {
        return None;
    }
    let mut rsp = http::Response::new(());
    *rsp.status_mut() = StatusCode::NO_CONTENT;
    let out = rsp.headers_mut();
    if allows(cors, origin) {
        allow(cors, origin, out);
        // A literal `*` means nothing to a browser that sends credentials: echo what was asked for instead.
        if cors.allow_methods.iter().any(|m| m == "*") {
            let value = if cors.allow_credentials { method.clone() } else { HeaderValue::from_static("*") };
            out.insert(header::ACCESS_CONTROL_ALLOW_METHODS, value);
        } else {
            list(out, header::ACCESS_CONTROL_ALLOW_METHODS, &cors.allow_methods);
        }
        if cors.allow_headers.iter().any(|h| h == "*") {
            let asked = headers.get(header::ACCESS_CONTROL_REQUEST_HEADERS);
            match asked {
                Some(asked) if cors.allow_credentials => {
                    out.insert(header::ACCESS_CONTROL_ALLOW_HEADERS, asked.clone());
                }
                None if cors.allow_credentials => {}
                _ => {
                    out.insert(header::ACCESS_CONTROL_ALLOW_HEADERS, HeaderValue::from_static("*"));
                }
            }
        } else {
            list(out, header::ACCESS_CONTROL_ALLOW_HEADERS, &cors.allow_headers);
        }
        list(out, header::ACCESS_CONTROL_EXPOSE_HEADERS, &cors.expose_headers);
        out.insert(header::ACCESS_CONTROL_MAX_AGE, HeaderValue::from(cors.max_age.as_secs()));
    }
    out.append(header::VARY, HeaderValue::from_static("origin"));
    Some(rsp.into_parts().0)
}

/// `access-control-allow-origin` and `-credentials` for an origin that is allowed. The origin is echoed unless any
/// origin without credentials is.
fn allow(cors: &Cors, origin: &HeaderValue, headers: &mut HeaderMap) {
    let any = !cors.allow_credentials && cors.allow_origins.iter().any(|o| o == "*");
    let value = if any { HeaderValue::from_static("*") } else { origin.clone() };
    headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, value);
    if !any {
        headers.append(header::VARY, HeaderValue::from_static("origin"));
    }
    if cors.allow_credentials {
        headers.insert(header::ACCESS_CONTROL_ALLOW_CREDENTIALS, HeaderValue::from_static("true"));
    }
}

fn list(headers: &mut HeaderMap, name: HeaderName, values: &[String]) {
    if !values.is_empty()
        && let Ok(value) = HeaderValue::try_from(values.join(", "))
    {
        headers.insert(name, value);
    }
}

/// Whether an origin is among those allowed: `*`, the same text, or `scheme://*rest` where `*` stands for one or more
/// characters of the host.
fn allows(cors: &Cors, origin: &HeaderValue) -> bool {
    let Ok(origin) = origin.to_str() else { return false };
    cors.allow_origins.iter().any(|allowed| {
        if allowed == "*" || allowed.eq_ignore_ascii_case(origin) {
            return true;
        }
        let (Some((scheme, pattern)), Some((origin_scheme, host))) =
            (allowed.split_once("://"), origin.split_once("://"))
        else {
            return false;
        };
        let Some(suffix) = pattern.strip_prefix('*') else { return false };
        scheme.eq_ignore_ascii_case(origin_scheme)
            && host.len() > suffix.len()
            && host.get(host.len() - suffix.len()..).is_some_and(|end| end.eq_ignore_ascii_case(suffix))
            // `*` reaches over labels, not over a port.
            && host.get(..host.len() - suffix.len()).is_some_and(|start| !start.contains(':'))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::route::{GrpcFailure, HttpFailure, Ratio};
    use std::time::Duration;

    fn matched(precedence: Precedence, prefix: Option<usize>) -> Match {
        Match { route: 0, rule: 0, prefix, precedence }
    }

    fn req(uri: &str) -> Request<()> {
        Request::builder().uri(uri).body(()).unwrap()
    }

    #[track_caller]
    fn check_redirect(r: Redirect, m: Match, uri: &str, expected: Option<&str>) {
        let found = match on_request([&Filter::Redirect(r)], &mut req(uri), &m, |_| 0) {
            Ok(_) => None,
            Err(e) => match e.cause() {
                Cause::Redirect { location, .. } => Some(location.to_str().unwrap().to_string()),
                other => panic!("{other:?}"),
            },
        };
        assert_eq!(found.as_deref(), expected, "{uri}");
    }

    fn to() -> Redirect {
        Redirect { scheme: None, host: None, port: None, path: None, status: StatusCode::FOUND }
    }

    #[test]
    fn redirects_keep_what_is_not_given() {
        let l = matched(Precedence::Linkerd, Some(4));
        let g = matched(Precedence::GatewayApi, Some(4));
        let host = || Redirect { host: Some("new.test".into()), ..to() };
        let port = |p| Redirect { port: Some(p), ..to() };
        for m in [l, g] {
            check_redirect(to(), m, "http://a.test:81/x?y", None);
            check_redirect(host(), m, "http://a.test:81/x?y", Some("http://new.test:81/x?y"));
            check_redirect(host(), m, "http://a.test:80/x", Some("http://new.test/x"));
            check_redirect(port(8080), m, "http://a.test/x", Some("http://a.test:8080/x"));
            check_redirect(port(80), m, "http://a.test:8080/x", Some("http://a.test/x"));
        }
        let both = || Redirect { host: Some("new.test".into()), port: Some(80), ..to() };
        check_redirect(both(), l, "http://a.test/x", Some("http://new.test:80/x"));
        check_redirect(both(), g, "http://a.test/x", Some("http://new.test/x"));
        let https = || Redirect { scheme: Some(Scheme::HTTPS), ..to() };
        check_redirect(https(), l, "http://a.test:8080/x", Some("https://a.test:8080/x"));
        check_redirect(https(), g, "http://a.test:8080/x", Some("https://a.test/x"));
    }

    #[test]
    fn prefixes_are_replaced_as_the_gateway_api_tabulates() {
        for (path, replacement, expected) in [
            ("/foo/bar", "/xyz", "/xyz/bar"),
            ("/foo/bar", "/xyz/", "/xyz/bar"),
            ("/foo", "/xyz", "/xyz"),
            ("/foo/", "/xyz", "/xyz/"),
            ("/foo/bar", "", "/bar"),
            ("/foo/", "/", "/"),
            ("/foo", "/", "/"),
            ("/foo", "", "/"),
        ] {
            let r = Rewrite { host: None, path: Some(ModifyPath::ReplacePrefix(replacement.into())) };
            let mut request = req(&format!("http://h{path}?q=1"));
            let m = matched(Precedence::GatewayApi, Some(4));
            on_request([&Filter::Rewrite(r)], &mut request, &m, |_| 0).unwrap();
            assert_eq!(request.uri().to_string(), format!("http://h{expected}?q=1"), "{path} {replacement}");
        }
        let r = Redirect { path: Some(ModifyPath::ReplacePrefix("/x".into())), ..to() };
        let e = on_request([&Filter::Redirect(r)], &mut req("http://h/a"), &matched(Precedence::Linkerd, None), |_| 0)
            .unwrap_err();
        assert!(matches!(e.cause(), Cause::Unexpected(_)), "{e}");
    }

    #[test]
    fn full_paths_keep_the_query_only_when_told() {
        let full =
            |keep_query| Redirect { path: Some(ModifyPath::ReplaceFull { path: "/n".into(), keep_query }), ..to() };
        let m = matched(Precedence::Linkerd, None);
        check_redirect(full(false), m, "http://h/a?q", Some("http://h/n"));
        check_redirect(full(true), m, "http://h/a?q", Some("http://h/n?q"));
    }

    #[test]
    fn rewriting_the_host_reaches_authority_and_header() {
        let r = Rewrite { host: Some("new.test".into()), path: None };
        let mut request = req("http://old.test:81/a");
        request.headers_mut().insert(HOST, "old.test:81".parse().unwrap());
        on_request([&Filter::Rewrite(r)], &mut request, &matched(Precedence::GatewayApi, None), |_| 0).unwrap();
        assert_eq!(request.uri(), "http://new.test/a");
        assert_eq!(request.headers()[HOST], "new.test");
    }

    #[test]
    fn headers_are_added_set_and_removed_but_framing_stays() {
        let name = |s: &str| s.parse::<HeaderName>().unwrap();
        let value = |s: &str| s.parse::<HeaderValue>().unwrap();
        let m = HeaderModifier {
            add: vec![(name("a"), value("2"))],
            set: vec![(name("b"), value("2")), (name("content-length"), value("9"))],
            remove: vec![name("c"), name("transfer-encoding")],
        };
        let mut headers = HeaderMap::new();
        for n in ["a", "b", "c", "transfer-encoding"] {
            headers.insert(name(n), value("1"));
        }
        on_response([&Filter::ResponseHeaders(m)], &mut headers, &FollowUp::default());
        assert_eq!(headers.get_all("a").iter().collect::<Vec<_>>(), ["1", "2"]);
        assert_eq!(headers["b"], "2");
        assert!(!headers.contains_key("c") && !headers.contains_key("content-length"));
        assert!(headers.contains_key("transfer-encoding"));
    }

    #[test]
    fn failures_follow_their_ratio() {
        let half = Ratio::new(1, 2).unwrap();
        let m = matched(Precedence::Linkerd, None);
        let f = Filter::HttpFailure(HttpFailure { status: StatusCode::IM_A_TEAPOT, message: "no".into(), ratio: half });
        assert!(on_request([&f], &mut req("/"), &m, |_| 1).is_ok());
        let e = on_request([&f], &mut req("/"), &m, |_| 0).unwrap_err();
        assert!(matches!(e.cause(), Cause::InjectedHttp { .. }));
        let f = Filter::GrpcFailure(GrpcFailure { code: 500, message: "no".into(), ratio: Ratio::ALWAYS });
        let e = on_request([&f], &mut req("/"), &m, |_| 0).unwrap_err();
        assert!(matches!(e.cause(), Cause::InjectedGrpc { code: 2, .. }), "{e:?}");
        let f = Filter::Unknown { what: "x".into() };
        assert!(on_request([&f], &mut req("/"), &m, |_| 0).is_err());
    }

    #[track_caller]
    fn check_cors(cors: &Cors, origin: &str, expected: Option<&str>) {
        let filter = Filter::Cors(std::sync::Arc::new(cors.clone()));
        let m = matched(Precedence::GatewayApi, None);
        let mut request = req("http://h/");
        request.headers_mut().insert(ORIGIN, origin.parse().unwrap());
        let Flow::Forward(follow_up) = on_request([&filter], &mut request, &m, |_| 0).unwrap() else {
            panic!("answered")
        };
        let mut headers = HeaderMap::new();
        on_response([&filter], &mut headers, &follow_up);
        let actual = headers.get("access-control-allow-origin").map(|v| v.to_str().unwrap());
        assert_eq!(actual, expected, "{origin}");

        *request.method_mut() = Method::OPTIONS;
        request.headers_mut().insert("access-control-request-method", "PUT".parse().unwrap());
        let Flow::Answer(parts) = on_request([&filter], &mut request, &m, |_| 0).unwrap() else { panic!("forwarded") };
        assert_eq!(parts.status, 204);
        assert_eq!(parts.headers.get("access-control-allow-origin").map(|v| v.to_str().unwrap()), expected);
        assert_eq!(parts.headers.contains_key("access-control-allow-methods"), expected.is_some());
    }

    #[test]
    fn cors_answers_preflights_and_marks_responses() {
        let mut cors = Cors {
            allow_origins: vec!["https://*.foo.test".into(), "http://bar.test:8080".into()],
            allow_methods: vec!["GET".into(), "PUT".into()],
            max_age: Duration::from_secs(5),
            ..Cors::default()
        };
        for (origin, ok) in [
            ("https://a.b.foo.test", true),
            ("https://foo.test", false),
            ("http://a.foo.test", false),
            ("https://a:1.foo.test", false),
            ("http://bar.test:8080", true),
            ("http://bar.test", false),
        ] {
            check_cors(&cors, origin, ok.then_some(origin));
        }
        cors.allow_origins = vec!["*".into()];
        cors.allow_methods = vec!["*".into()];
        check_cors(&cors, "http://x", Some("*"));
        cors.allow_credentials = true;
        check_cors(&cors, "http://x", Some("http://x"));
    }
}
