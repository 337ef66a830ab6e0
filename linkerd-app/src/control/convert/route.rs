//! Matches and filters that inbound and outbound routes share (behaviour.md C.7, C.8).

use super::{Inside, Invalid, list, optional, port, required};
use crate::policy::route::{
    Filter, FullRegex, GrpcFailure, GrpcMatch, HeaderMatch, HeaderModifier, HostMatch, HttpFailure, HttpMatch,
    ModifyPath, PathMatch, QueryMatch, Ratio, Redirect, RouteMatch, StringMatch,
};
use http::{HeaderName, HeaderValue, Method, StatusCode, uri};
use linkerd2_proxy_api::{grpc_route, http_route, http_types, tls_route};

/// The highest gRPC code (status codes of the gRPC specification); codes above count as 2, unknown.
const MAX_GRPC_CODE: u32 = 16;

/// A host, lower case.
pub(crate) fn host(message: http_route::HostMatch) -> Result<HostMatch, Invalid> {
    match message.r#match {
        None => Err(Invalid::new("missing").inside("match")),
        Some(http_route::host_match::Match::Exact(name)) => exact_host(&name),
        Some(http_route::host_match::Match::Suffix(suffix)) => Ok(suffix_host(&suffix.reverse_labels)),
    }
}

/// A server name, lower case: behaviour.md D.9 has the original compare the case; names in TLS have none (RFC 6066, 3).
pub(crate) fn sni(message: tls_route::SniMatch) -> Result<HostMatch, Invalid> {
    match message.r#match {
        None => Err(Invalid::new("missing").inside("match")),
        Some(tls_route::sni_match::Match::Exact(name)) => exact_host(&name),
        Some(tls_route::sni_match::Match::Suffix(suffix)) => Ok(suffix_host(&suffix.reverse_labels)),
    }
}

fn exact_host(name: &str) -> Result<HostMatch, Invalid> {
    if name.is_empty() {
        return Err(Invalid::new("empty").inside("exact"));
    }
    Ok(HostMatch::Exact(name.to_ascii_lowercase().into()))
}

/// `[com, example]` is `.example.com`; no labels at all is any name.
fn suffix_host(reverse_labels: &[String]) -> HostMatch {
    let mut suffix = String::new();
    for label in reverse_labels.iter().rev() {
        suffix.push('.');
        suffix.push_str(&label.to_ascii_lowercase());
    }
    HostMatch::Suffix(suffix.into())
}

/// One alternative of an HTTP rule.
pub(crate) fn http_match(message: http_route::HttpRouteMatch) -> Result<RouteMatch, Invalid> {
    let http_route::HttpRouteMatch { path, headers, query_params, method } = message;
    Ok(RouteMatch::Http(HttpMatch {
        path: optional("path", path, path_match)?,
        headers: list("headers", headers, header_match)?,
        query: list("query_params", query_params, query_match)?,
        method: optional("method", method, method_match)?,
    }))
}

/// One alternative of a gRPC rule. Without `rpc` it is for any method: that is what a GRPCRoute match with headers alone
/// means, and how the policy controller sends it (behaviour.md C.7).
pub(crate) fn grpc_match(message: grpc_route::GrpcRouteMatch) -> Result<RouteMatch, Invalid> {
    let grpc_route::GrpcRouteMatch { rpc, headers } = message;
    let grpc_route::GrpcRpcMatch { service, method } = rpc.unwrap_or_default();
    let exact = |text: String| (!text.is_empty()).then(|| StringMatch::Exact(text.into()));
    Ok(RouteMatch::Grpc(GrpcMatch {
        service: exact(service),
        method: exact(method),
        headers: list("headers", headers, header_match)?,
    }))
}

fn path_match(message: http_route::PathMatch) -> Result<PathMatch, Invalid> {
    use http_route::path_match::Kind;
    match message.kind {
        None => Err(Invalid::new("missing").inside("kind")),
        Some(Kind::Exact(path)) => Ok(PathMatch::Exact(path.into())),
        Some(Kind::Prefix(path)) => Ok(PathMatch::Prefix(path.trim_end_matches('/').into())),
        Some(Kind::Regex(source)) => Ok(PathMatch::Regex(regex(&source)?)),
    }
}

fn header_match(message: http_route::HeaderMatch) -> Result<HeaderMatch, Invalid> {
    use http_route::header_match::Value;
    let name = header_name(&message.name).inside("name")?;
    let value = required("value", message.value, |value| match value {
        Value::Exact(bytes) => match String::from_utf8(bytes) {
            Ok(text) => Ok(StringMatch::Exact(text.into())),
            Err(_) => Err(Invalid::new("not UTF-8")),
        },
        Value::Regex(source) => Ok(StringMatch::Regex(regex(&source)?)),
    })?;
    Ok(HeaderMatch { name, value })
}

fn query_match(message: http_route::QueryParamMatch) -> Result<QueryMatch, Invalid> {
    use http_route::query_param_match::Value;
    let value = required("value", message.value, |value| match value {
        Value::Exact(text) => Ok(StringMatch::Exact(text.into())),
        Value::Regex(source) => Ok(StringMatch::Regex(regex(&source)?)),
    })?;
    Ok(QueryMatch { name: message.name.into(), value })
}

pub(crate) fn method_match(message: http_types::HttpMethod) -> Result<Method, Invalid> {
    Method::try_from(message).map_err(|error| Invalid::new(error.to_string()))
}

fn regex(source: &str) -> Result<FullRegex, Invalid> {
    FullRegex::new(source).map_err(|error| Invalid::new(format!("{source:?} is no regular expression: {error}")))
}

fn header_name(name: &str) -> Result<HeaderName, Invalid> {
    name.parse().map_err(|_| Invalid::new(format!("{name:?} is no header name")))
}

/// Changes of request headers.
pub(crate) fn request_headers(message: http_route::RequestHeaderModifier) -> Result<Filter, Invalid> {
    let http_route::RequestHeaderModifier { add, set, remove } = message;
    Ok(Filter::RequestHeaders(modifier(add, set, remove)?))
}

/// Changes of response headers.
pub(crate) fn response_headers(message: http_route::ResponseHeaderModifier) -> Result<Filter, Invalid> {
    let http_route::ResponseHeaderModifier { add, set, remove } = message;
    Ok(Filter::ResponseHeaders(modifier(add, set, remove)?))
}

fn modifier(
    add: Option<http_types::Headers>,
    set: Option<http_types::Headers>,
    remove: Vec<String>,
) -> Result<HeaderModifier, Invalid> {
    let headers = |field: &str, message: Option<http_types::Headers>| {
        list("headers", message.unwrap_or_default().headers, |header| {
            let name = header_name(&header.name).inside("name")?;
            let value = HeaderValue::from_bytes(&header.value)
                .map_err(|_| Invalid::new(format!("value of {name} is no header value")).inside("value"))?;
            Ok((name, value))
        })
        .inside(field)
    };
    Ok(HeaderModifier {
        add: headers("add", add)?,
        set: headers("set", set)?,
        remove: list("remove", remove, |name| header_name(&name))?,
    })
}

/// A redirect; status 0 is 301.
pub(crate) fn redirect(message: http_route::RequestRedirect) -> Result<Filter, Invalid> {
    let http_route::RequestRedirect { scheme, host, path, port: number, status } = message;
    let scheme = optional("scheme", scheme, |scheme| {
        uri::Scheme::try_from(scheme).map_err(|error| Invalid::new(error.to_string()))
    })?;
    if !host.is_empty() && host.parse::<uri::Authority>().is_err() {
        return Err(Invalid::new(format!("{host:?} is no host")).inside("host"));
    }
    let path = optional("path", path, |path| {
        use http_route::path_modifier::Replace;
        match path.replace {
            None => Err(Invalid::new("missing").inside("replace")),
            Some(Replace::Full(path)) => {
                Ok(ModifyPath::ReplaceFull { path: absolute(path).inside("full")?.into(), keep_query: false })
            }
            Some(Replace::Prefix(path)) => Ok(ModifyPath::ReplacePrefix(absolute(path).inside("prefix")?.into())),
        }
    })?;
    let status = if status == 0 { Ok(StatusCode::MOVED_PERMANENTLY) } else { self::status(status) };
    Ok(Filter::Redirect(Redirect {
        scheme,
        host: (!host.is_empty()).then(|| host.into()),
        port: port(number).inside("port")?,
        path,
        status: status.inside("status")?,
    }))
}

fn absolute(path: String) -> Result<String, Invalid> {
    if path.starts_with('/') && path.parse::<uri::PathAndQuery>().is_ok() {
        Ok(path)
    } else {
        Err(Invalid::new(format!("{path:?} is no absolute path")))
    }
}

fn status(code: u32) -> Result<StatusCode, Invalid> {
    let status = u16::try_from(code).ok().and_then(|code| StatusCode::from_u16(code).ok());
    status.ok_or_else(|| Invalid::new(format!("{code} is no HTTP status")))
}

fn ratio(message: Option<http_route::Ratio>) -> Result<Ratio, Invalid> {
    match message {
        None => Ok(Ratio::ALWAYS),
        Some(http_route::Ratio { numerator, denominator }) => {
            Ratio::new(numerator, denominator).ok_or_else(|| Invalid::new("zero").inside("denominator").inside("ratio"))
        }
    }
}

/// An injected HTTP failure.
pub(crate) fn http_failure(message: http_route::HttpFailureInjector) -> Result<Filter, Invalid> {
    Ok(Filter::HttpFailure(HttpFailure {
        status: status(message.status).inside("status")?,
        message: message.message.into(),
        ratio: ratio(message.ratio)?,
    }))
}

/// An injected gRPC failure.
pub(crate) fn grpc_failure(message: grpc_route::GrpcFailureInjector) -> Result<Filter, Invalid> {
    let code = if message.code > MAX_GRPC_CODE { 2 } else { message.code };
    Ok(Filter::GrpcFailure(GrpcFailure {
        // Never above 16.
        code: u16::try_from(code).unwrap_or(2),
        message: message.message.into(),
        ratio: ratio(message.ratio)?,
    }))
}

/// A filter without a kind that we know: requests that meet it are refused, the rest of the policy stands. The original
/// refuses the whole outbound policy instead (behaviour.md C.8), for instance when a GRPCRoute has a redirect.
pub(crate) fn unknown_filter(whose: &str) -> Filter {
    Filter::Unknown { what: format!("{whose} policy configured with unknown filter").into() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http_route::{header_match, path_match as pm, path_modifier::Replace, query_param_match};

    fn path(kind: pm::Kind) -> http_route::HttpRouteMatch {
        let path = Some(http_route::PathMatch { kind: Some(kind) });
        http_route::HttpRouteMatch { path, headers: vec![], query_params: vec![], method: None }
    }

    #[track_caller]
    fn check_path(kind: pm::Kind, expected: Option<PathMatch>) {
        let found = match http_match(path(kind)) {
            Ok(RouteMatch::Http(m)) => m.path,
            _ => None,
        };
        assert_eq!(found, expected);
    }

    #[test]
    fn paths() {
        check_path(pm::Kind::Exact("/a/".into()), Some(PathMatch::Exact("/a/".into())));
        check_path(pm::Kind::Prefix("/a//".into()), Some(PathMatch::Prefix("/a".into())));
        check_path(pm::Kind::Prefix("/".into()), Some(PathMatch::Prefix("".into())));
        check_path(pm::Kind::Regex("/a|/ab".into()), Some(PathMatch::Regex(FullRegex::new("/a|/ab").unwrap())));
        check_path(pm::Kind::Regex("(".into()), None);
    }

    #[test]
    fn headers_and_queries_need_values() {
        let header = |name: &str, value| http_route::HeaderMatch { name: name.into(), value };
        let with = |h| http_route::HttpRouteMatch { headers: vec![h], ..http_route::HttpRouteMatch::default() };
        assert!(http_match(with(header("X-A", Some(header_match::Value::Exact(b"1".to_vec()))))).is_ok());
        let text = http_match(with(header("x-a", None))).unwrap_err().to_string();
        assert_eq!(text, "headers[0].value: missing");
        assert!(http_match(with(header("x a", Some(header_match::Value::Regex(".*".into()))))).is_err());
        assert!(http_match(with(header("x", Some(header_match::Value::Exact(vec![0xff]))))).is_err());
        let query = |value| http_route::QueryParamMatch { name: "q".into(), value };
        let with = |q| http_route::HttpRouteMatch { query_params: vec![q], ..http_route::HttpRouteMatch::default() };
        assert!(http_match(with(query(Some(query_param_match::Value::Exact(String::new()))))).is_ok());
        assert!(http_match(with(query(None))).is_err());
    }

    #[test]
    fn a_grpc_match_without_rpc_is_any_method() {
        let any = RouteMatch::Grpc(GrpcMatch::default());
        assert_eq!(grpc_match(grpc_route::GrpcRouteMatch { rpc: None, headers: vec![] }).unwrap(), any);
        let rpc = Some(grpc_route::GrpcRpcMatch { service: "a.B".into(), method: String::new() });
        let some = GrpcMatch { service: Some(StringMatch::Exact("a.B".into())), ..GrpcMatch::default() };
        assert_eq!(grpc_match(grpc_route::GrpcRouteMatch { rpc, headers: vec![] }).unwrap(), RouteMatch::Grpc(some));
    }

    #[test]
    fn hosts() {
        use http_route::host_match::{Match, Suffix};
        let host = |m| super::host(http_route::HostMatch { r#match: m });
        assert_eq!(host(Some(Match::Exact("A.b".into()))).unwrap(), HostMatch::Exact("a.b".into()));
        let suffix = Suffix { reverse_labels: vec!["com".into(), "Example".into()] };
        assert_eq!(host(Some(Match::Suffix(suffix))).unwrap(), HostMatch::Suffix(".example.com".into()));
        assert!(host(None).is_err() && host(Some(Match::Exact(String::new()))).is_err());
    }

    fn redirect_to(replace: Option<Replace>, status: u32, port: u32) -> Result<Filter, Invalid> {
        redirect(http_route::RequestRedirect {
            scheme: None,
            host: "example.com".into(),
            path: Some(http_route::PathModifier { replace }),
            port,
            status,
        })
    }

    #[test]
    fn redirects_are_validated() {
        let Ok(Filter::Redirect(found)) = redirect_to(Some(Replace::Full("/x?y".into())), 0, 0) else { panic!() };
        assert_eq!((found.status, found.port), (StatusCode::MOVED_PERMANENTLY, None));
        assert_eq!(found.path, Some(ModifyPath::ReplaceFull { path: "/x?y".into(), keep_query: false }));
        assert!(redirect_to(Some(Replace::Prefix("/p".into())), 308, 8080).is_ok());
        assert!(redirect_to(Some(Replace::Full("x".into())), 0, 0).is_err());
        assert!(redirect_to(None, 0, 0).is_err());
        assert!(redirect_to(Some(Replace::Full("/".into())), 99, 0).is_err());
        assert!(redirect_to(Some(Replace::Full("/".into())), 302, 70_000).is_err());
    }

    #[test]
    fn injected_failures_are_validated() {
        let http = |status, denominator| {
            let ratio = Some(http_route::Ratio { numerator: 1, denominator });
            http_failure(http_route::HttpFailureInjector { status, message: "m".into(), ratio })
        };
        assert!(http(503, 2).is_ok());
        assert_eq!(http(503, 0).unwrap_err().to_string(), "ratio.denominator: zero");
        assert!(http(0, 1).is_err());
        let grpc = |code| grpc_failure(grpc_route::GrpcFailureInjector { code, message: "m".into(), ratio: None });
        let code = |f: Result<Filter, Invalid>| match f {
            Ok(Filter::GrpcFailure(f)) => f.code,
            _ => panic!(),
        };
        assert_eq!(code(grpc(16)), 16);
        assert_eq!(code(grpc(500)), 2);
    }

    #[test]
    fn header_changes_are_validated() {
        let header = |name: &str, value: &[u8]| http_types::headers::Header { name: name.into(), value: value.into() };
        let change = |h, remove: &str| {
            let add = Some(http_types::Headers { headers: vec![h] });
            request_headers(http_route::RequestHeaderModifier { add, set: None, remove: vec![remove.into()] })
        };
        assert!(change(header("X-A", b"1"), "x-b").is_ok());
        assert_eq!(
            change(header("x-a", b"\n"), "x").unwrap_err().to_string(),
            "add.headers[0].value: value of x-a is no header value"
        );
        assert!(change(header("x-a", b""), "x b").is_err());
    }
}
