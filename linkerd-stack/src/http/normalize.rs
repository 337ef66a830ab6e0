//! What a request must be before anything decides by it: one authority, one length, one target form, and no headers
//! that were meant for this connection alone. What can be read in two ways is refused (400) or made unambiguous, as RFC
//! 9110, 9112 and 9113 demand; the two proxies of a pair apply the same rules.
//!
//! What the codec refuses before this sees it: line folding, blanks before a colon, bare CR, control characters in
//! names and values, repeated Content-Length that differs, Transfer-Encoding that does not end in `chunked`, bad
//! chunk sizes, Transfer-Encoding in HTTP/1.0 (RFC 9112 sections 2.2, 5, 6, 7), connection headers and bad
//! pseudo-headers on HTTP/2 (RFC 9113 section 8). Of Content-Length with Transfer-Encoding it drops the former and
//! closes the connection after the answer (RFC 9112 section 6.3). Paths are not rewritten: no dot segments removed, no
//! percent-decoding, no merged slashes; what is matched is what the application gets.

use http::{
    HeaderMap, HeaderValue, Method, Request, StatusCode, Uri, Version,
    header::{self, HeaderName},
    uri::{Authority, PathAndQuery, Scheme},
};
use std::fmt;

/// Request extension: the target was in absolute form, and goes on in absolute form (behaviour.md E.4).
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct AbsoluteForm;

/// A request that is not served.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum BadRequest {
    /// It can be read in more than one way, or not at all.
    Malformed(&'static str),
    /// A transfer coding other than `chunked`.
    TransferCoding,
    /// Neither the target nor Host names an authority, and there is no default.
    MissingAuthority,
}

impl BadRequest {
    /// Status of the answer. 501 is RFC 9112 section 6.1.
    pub fn status(self) -> StatusCode {
        match self {
            Self::Malformed(_) | Self::MissingAuthority => StatusCode::BAD_REQUEST,
            Self::TransferCoding => StatusCode::NOT_IMPLEMENTED,
        }
    }
}

impl fmt::Display for BadRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Malformed(what) => what,
            Self::TransferCoding => "a transfer coding other than chunked",
            Self::MissingAuthority => "request has no authority",
        })
    }
}

impl std::error::Error for BadRequest {}

/// The authority that the last request of a connection was for: clients rarely change it.
pub(super) type Cached = Option<Authority>;

/// Checks a request as the server's codec gave it, and gives it its canonical shape: the URI has the authority (of
/// Host, for origin form), [`AbsoluteForm`] marks absolute form, Host agrees with the URI, hop-by-hop headers are gone
/// unless the request wants an upgrade. Must run once per request. A request without any authority passes: see
/// [`request`].
pub(super) fn accept<B>(req: &mut Request<B>, cached: &mut Cached) -> Result<(), BadRequest> {
    match req.version() {
        Version::HTTP_10 | Version::HTTP_11 => http1(req, cached),
        Version::HTTP_2 => http2(req, cached),
        _ => Err(BadRequest::Malformed("unknown HTTP version")),
    }
}

/// Gives a request that names no authority the default one (behaviour.md E.4). Without a default that is an error,
/// which the spec answers with 500. Host is not invented.
pub fn request<B>(req: &mut Request<B>, default_authority: Option<&Authority>) -> Result<(), BadRequest> {
    if req.uri().authority().is_some() {
        return Ok(());
    }
    let authority = default_authority.ok_or(BadRequest::MissingAuthority)?;
    set_authority(req, authority.clone())
}

/// Replaces the authority of the URI; the scheme becomes http if there is none.
pub fn set_authority<B>(req: &mut Request<B>, authority: Authority) -> Result<(), BadRequest> {
    let mut parts = std::mem::take(req.uri_mut()).into_parts();
    parts.authority = Some(authority);
    if parts.scheme.is_none() {
        parts.scheme = Some(Scheme::HTTP);
    }
    if parts.path_and_query.is_none() {
        parts.path_and_query = Some(PathAndQuery::from_static("/"));
    }
    *req.uri_mut() = Uri::from_parts(parts).map_err(|_| BadRequest::Malformed("invalid request target"))?;
    Ok(())
}

fn http1<B>(req: &mut Request<B>, cached: &mut Cached) -> Result<(), BadRequest> {
    framing(req)?;
    let host = host(req.headers(), cached)?;
    if req.method() == Method::CONNECT {
        return connect(req, host);
    }
    match (req.uri().scheme(), req.uri().authority()) {
        (Some(scheme), Some(authority)) => {
            if *scheme != Scheme::HTTP && *scheme != Scheme::HTTPS {
                return Err(BadRequest::Malformed("scheme is neither http nor https"));
            }
            no_userinfo(authority)?;
            agree(req, host);
            req.extensions_mut().insert(AbsoluteForm);
        }
        (None, Some(_)) => return Err(BadRequest::Malformed("authority form without CONNECT")),
        (_, None) => {
            path(req)?;
            if let Some(host) = host {
                set_authority(req, host)?;
            }
        }
    }
    if !is_upgrade(req) {
        strip_hop_by_hop(req.headers_mut());
    }
    Ok(())
}

/// CONNECT is HTTP/1.1 and names a host and a port (RFC 9112 section 3.2.3); it has no content (RFC 9110 section
/// 9.3.6).
fn connect<B>(req: &mut Request<B>, host: Option<Authority>) -> Result<(), BadRequest> {
    if req.version() != Version::HTTP_11 {
        return Err(BadRequest::Malformed("CONNECT of a version other than HTTP/1.1"));
    }
    let uri = req.uri();
    let authority = match (uri.scheme(), uri.authority(), uri.path_and_query()) {
        (None, Some(authority), None) if authority.port_u16().is_some() => authority,
        _ => return Err(BadRequest::Malformed("CONNECT without authority form")),
    };
    no_userinfo(authority)?;
    if req.headers().contains_key(header::TRANSFER_ENCODING)
        || req.headers().get(header::CONTENT_LENGTH).is_some_and(|length| length != "0")
    {
        return Err(BadRequest::Malformed("CONNECT with content"));
    }
    agree(req, host);
    strip_connection_options(req.headers_mut());
    Ok(())
}

fn http2<B>(req: &mut Request<B>, cached: &mut Cached) -> Result<(), BadRequest> {
    if req.method() == Method::CONNECT {
        return Err(BadRequest::Malformed("CONNECT over HTTP/2"));
    }
    framing(req)?;
    path(req)?;
    let host = host(req.headers(), cached)?;
    match (req.uri().authority(), host) {
        (Some(authority), host) => {
            no_userinfo(authority)?;
            let scheme = req.uri().scheme();
            if let Some(host) = &host
                && !same(authority, host, scheme)
            {
                // RFC 9113 section 8.3.1. A request that was HTTP/1 at the other proxy will be HTTP/1 again, so RFC 9112
                // section 3.2.2 says what counts: the target in absolute form, otherwise Host. The URI and Host agree
                // from here on, so that policy looks at what the application will see.
                match req.headers().get(super::orig_proto::HEADER) {
                    None => return Err(BadRequest::Malformed("host and :authority disagree")),
                    Some(form) if super::orig_proto::is_absolute_form(form) => agree(req, Some(host.clone())),
                    Some(_) => set_authority(req, host.clone())?,
                }
            }
        }
        (None, Some(host)) => set_authority(req, host)?,
        (None, None) => {}
    }
    Ok(())
}

/// Length and coding of the content, as far as the codec leaves anything to check.
fn framing<B>(req: &mut Request<B>) -> Result<(), BadRequest> {
    let headers = req.headers_mut();
    if headers.contains_key(header::TRANSFER_ENCODING) {
        let mut codings = headers.get_all(header::TRANSFER_ENCODING).iter();
        let chunked = codings.next().is_some_and(|c| c.as_bytes().trim_ascii().eq_ignore_ascii_case(b"chunked"));
        if !chunked || codings.next().is_some() {
            return Err(BadRequest::TransferCoding);
        }
        headers.remove(header::CONTENT_LENGTH);
    }
    single_content_length(headers)
}

/// Leaves at most one Content-Length of one number (RFC 9110 section 8.6).
pub(super) fn single_content_length(headers: &mut HeaderMap) -> Result<(), BadRequest> {
    const BAD: BadRequest = BadRequest::Malformed("conflicting or invalid content-length");
    let mut values = headers.get_all(header::CONTENT_LENGTH).iter();
    let Some(first) = values.next() else { return Ok(()) };
    let more = values.next().is_some();
    if !more && !first.is_empty() && first.as_bytes().iter().all(u8::is_ascii_digit) {
        return Ok(());
    }
    let mut number = None;
    for value in headers.get_all(header::CONTENT_LENGTH) {
        for part in value.to_str().map_err(|_| BAD)?.split(',') {
            let part = part.trim_matches([' ', '\t']);
            if part.is_empty() || !part.bytes().all(|b| b.is_ascii_digit()) {
                return Err(BAD);
            }
            let part: u64 = part.parse().map_err(|_| BAD)?;
            if number.is_some_and(|number| number != part) {
                return Err(BAD);
            }
            number = Some(part);
        }
    }
    if let Some(number) = number {
        headers.insert(header::CONTENT_LENGTH, HeaderValue::from(number));
    }
    Ok(())
}

/// A path begins with a slash; `*` is for OPTIONS (RFC 9112 section 3.2.4, RFC 9113 section 8.3.1).
fn path<B>(req: &Request<B>) -> Result<(), BadRequest> {
    match req.uri().path_and_query().map(PathAndQuery::as_str) {
        Some(path) if path.starts_with('/') => Ok(()),
        Some("*") if req.method() == Method::OPTIONS => Ok(()),
        _ => Err(BadRequest::Malformed("invalid request target")),
    }
}

/// The authority that Host names; an empty Host is none (RFC 9110 section 7.2).
fn host(headers: &HeaderMap, cached: &mut Cached) -> Result<Option<Authority>, BadRequest> {
    let mut values = headers.get_all(header::HOST).iter();
    let Some(value) = values.next() else { return Ok(None) };
    if values.next().is_some() {
        return Err(BadRequest::Malformed("more than one host"));
    }
    let value = value.as_bytes();
    if value.is_empty() {
        return Ok(None);
    }
    if let Some(authority) = cached
        && authority.as_str().as_bytes() == value
    {
        return Ok(Some(authority.clone()));
    }
    let authority = Authority::try_from(value).map_err(|_| BadRequest::Malformed("invalid host"))?;
    no_userinfo(&authority)?;
    *cached = Some(authority.clone());
    Ok(Some(authority))
}

/// RFC 9110 section 4.2.4, RFC 9113 section 8.3.1.
fn no_userinfo(authority: &Authority) -> Result<(), BadRequest> {
    if authority.as_str().contains('@') {
        return Err(BadRequest::Malformed("userinfo in the authority"));
    }
    Ok(())
}

/// Makes Host say what the target says (RFC 9112 section 3.2.2), and leaves it as received where it does.
pub(super) fn agree<B>(req: &mut Request<B>, host: Option<Authority>) {
    let Some(authority) = req.uri().authority() else { return };
    if host.is_some_and(|host| same(authority, &host, req.uri().scheme())) {
        return;
    }
    if let Ok(value) = HeaderValue::from_str(authority.as_str()) {
        req.headers_mut().insert(header::HOST, value);
    }
}

/// Whether two authorities are one, names in any case and default ports elided.
fn same(a: &Authority, b: &Authority, scheme: Option<&Scheme>) -> bool {
    if a.as_str() == b.as_str() {
        return true;
    }
    let default = if scheme == Some(&Scheme::HTTPS) { 443 } else { 80 };
    a.host().eq_ignore_ascii_case(b.host()) && a.port_u16().unwrap_or(default) == b.port_u16().unwrap_or(default)
}

/// Whether a request wants another protocol on its connection: HTTP/1.1 with an Upgrade that is not exactly `h2c`
/// (behaviour.md E.2).
pub fn is_upgrade<B>(req: &Request<B>) -> bool {
    req.version() == Version::HTTP_11 && req.headers().get(header::UPGRADE).is_some_and(|value| value != "h2c")
}

const KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");
const PROXY_CONNECTION: HeaderName = HeaderName::from_static("proxy-connection");

/// Removes what was meant for one connection alone: Connection, the headers it lists, Upgrade, Proxy-Connection and
/// Keep-Alive (behaviour.md E.3, RFC 9110 section 7.6.1). TE, Trailer, Host and the framing headers stay even if
/// listed: a client must not be able to have them removed.
pub fn strip_hop_by_hop(headers: &mut HeaderMap) {
    strip_connection_options(headers);
    headers.remove(header::UPGRADE);
}

fn strip_connection_options(headers: &mut HeaderMap) {
    if headers.contains_key(header::CONNECTION) {
        // Usually `keep-alive` or `close`, which name no other header.
        let listed: Vec<HeaderName> = headers
            .get_all(header::CONNECTION)
            .iter()
            .flat_map(|value| value.as_bytes().split(|b| *b == b','))
            .map(<[u8]>::trim_ascii)
            .filter(|name| !name.eq_ignore_ascii_case(b"close") && !name.eq_ignore_ascii_case(b"keep-alive"))
            .filter_map(|name| HeaderName::from_bytes(name).ok())
            .filter(|name| {
                ![
                    header::HOST,
                    header::CONTENT_LENGTH,
                    header::TRANSFER_ENCODING,
                    header::TE,
                    header::TRAILER,
                    header::UPGRADE,
                ]
                .contains(name)
            })
            .collect();
        for name in listed {
            headers.remove(name);
        }
        headers.remove(header::CONNECTION);
    }
    headers.remove(PROXY_CONNECTION);
    headers.remove(KEEP_ALIVE);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn get(target: &str, headers: &[(&str, &str)]) -> Request<()> {
        let mut req = Request::builder().uri(target);
        for (name, value) in headers {
            req = req.header(*name, *value);
        }
        req.body(()).unwrap()
    }

    /// `expected`: URI, Host, absolute form; or the text of the error.
    #[track_caller]
    fn check(mut req: Request<()>, expected: Result<(&str, Option<&str>, bool), &str>) {
        let result = accept(&mut req, &mut None).map_err(|e| e.to_string());
        let shape = result.map(|()| {
            let host = req.headers().get("host").map(|h| h.to_str().unwrap().to_owned());
            (req.uri().to_string(), host, req.extensions().get::<AbsoluteForm>().is_some())
        });
        let expected = expected.map(|(u, h, a)| (u.to_owned(), h.map(str::to_owned), a)).map_err(str::to_owned);
        assert_eq!(shape, expected);
    }

    fn method(method: &str, mut req: Request<()>) -> Request<()> {
        *req.method_mut() = method.parse().unwrap();
        req
    }

    fn h2(mut req: Request<()>) -> Request<()> {
        *req.version_mut() = Version::HTTP_2;
        req
    }

    fn http10(mut req: Request<()>) -> Request<()> {
        *req.version_mut() = Version::HTTP_10;
        req
    }

    #[test]
    fn origin_form_takes_its_authority_from_host() {
        check(get("/a?b", &[("host", "web:8080")]), Ok(("http://web:8080/a?b", Some("web:8080"), false)));
        check(get("/", &[]), Ok(("/", None, false)));
        check(get("/", &[("host", "")]), Ok(("/", Some(""), false)));
        check(get("/", &[("host", "a"), ("host", "a")]), Err("more than one host"));
        check(get("/", &[("host", "a/b")]), Err("invalid host"));
        check(get("/", &[("host", "a b")]), Err("invalid host"));
        check(get("/", &[("host", "a,b@c")]), Err("userinfo in the authority"));
    }

    #[test]
    fn absolute_form_wins_over_host() {
        check(get("http://web/a", &[("host", "other")]), Ok(("http://web/a", Some("web"), true)));
        check(get("http://web:80/a", &[("host", "WEB")]), Ok(("http://web:80/a", Some("WEB"), true)));
        check(get("http://web/a", &[]), Ok(("http://web/a", Some("web"), true)));
        check(get("http://u@web/a", &[]), Err("userinfo in the authority"));
        check(get("ftp://web/a", &[]), Err("scheme is neither http nor https"));
    }

    #[test]
    fn other_forms_are_for_their_methods() {
        check(get("web:80", &[]), Err("authority form without CONNECT"));
        check(get("*", &[("host", "a")]), Err("invalid request target"));
        let mut options = method("OPTIONS", get("*", &[("host", "a")]));
        accept(&mut options, &mut None).unwrap();
        assert_eq!((options.uri().authority().unwrap().as_str(), options.uri().path()), ("a", "*"));
        check(method("CONNECT", get("web:80", &[("host", "x")])), Ok(("web:80", Some("web:80"), false)));
        check(method("CONNECT", get("web", &[])), Err("CONNECT without authority form"));
        check(method("CONNECT", get("/", &[("host", "a")])), Err("CONNECT without authority form"));
        check(method("CONNECT", get("http://web:80/", &[])), Err("CONNECT without authority form"));
        check(method("CONNECT", get("web:80", &[("content-length", "3")])), Err("CONNECT with content"));
        check(http10(method("CONNECT", get("web:80", &[]))), Err("CONNECT of a version other than HTTP/1.1"));
        check(h2(method("CONNECT", get("web:80", &[]))), Err("CONNECT over HTTP/2"));
    }

    #[test]
    fn http2_has_one_authority() {
        check(h2(get("http://a/", &[("host", "b")])), Err("host and :authority disagree"));
        check(h2(get("http://a/", &[("host", "A:80")])), Ok(("http://a/", Some("A:80"), false)));
        check(h2(get("https://a/", &[("host", "a:80")])), Err("host and :authority disagree"));
        check(h2(get("/x", &[("host", "b")])), Ok(("http://b/x", Some("b"), false)));
        check(h2(get("http://a@b/", &[])), Err("userinfo in the authority"));
        let carried = [("host", "b"), ("l5d-orig-proto", "HTTP/1.1; absolute-form")];
        check(h2(get("http://a/", &carried)), Ok(("http://a/", Some("a"), false)));
        let carried = [("host", "b"), ("l5d-orig-proto", "HTTP/1.1")];
        check(h2(get("http://a/x", &carried)), Ok(("http://b/x", Some("b"), false)));
        let mut relative = h2(get("/", &[]));
        *relative.uri_mut() = Uri::from(PathAndQuery::from_static("*"));
        check(relative, Err("invalid request target"));
    }

    #[test]
    fn lengths_are_one_number() {
        let framed = |values: &[&str]| {
            let mut req = get("/", &[]);
            for value in values {
                req.headers_mut().append("content-length", value.parse().unwrap());
            }
            accept(&mut req, &mut None).map(|()| req.headers()["content-length"].to_str().unwrap().to_owned())
        };
        assert_eq!(framed(&["5"]).unwrap(), "5");
        assert_eq!(framed(&["5", "5"]).unwrap(), "5");
        assert_eq!(framed(&["5, 05"]).unwrap(), "5");
        for bad in [&["5", "6"][..], &["5, 6"], &["+5"], &["-1"], &[""], &["5 5"], &["99999999999999999999", "1"]] {
            assert_eq!(framed(bad), Err(BadRequest::Malformed("conflicting or invalid content-length")), "{bad:?}");
        }
    }

    #[test]
    fn only_chunked_is_understood() {
        let coding = |values: &[&str]| {
            let mut req = get("/", &[("content-length", "3")]);
            for value in values {
                req.headers_mut().append("transfer-encoding", value.parse().unwrap());
            }
            accept(&mut req, &mut None).map(|()| req.headers().contains_key("content-length"))
        };
        assert_eq!(coding(&["Chunked"]), Ok(false), "the length is dropped");
        for bad in [
            &["gzip, chunked"][..],
            &["chunked, chunked"],
            &["chunked", "chunked"],
            &["identity"],
            &["\u{b}x"[1..].trim()],
        ] {
            assert_eq!(coding(bad), Err(BadRequest::TransferCoding), "{bad:?}");
        }
    }

    #[test]
    fn hop_by_hop_headers_go_unless_upgrading() {
        let headers = [
            ("connection", "close, x-private, host"),
            ("connection", "x-more"),
            ("x-private", "1"),
            ("x-more", "1"),
            ("keep-alive", "1"),
            ("proxy-connection", "1"),
            ("te", "trailers"),
            ("host", "a"),
        ];
        let mut req = get("/", &headers);
        accept(&mut req, &mut None).unwrap();
        let mut left: Vec<_> = req.headers().keys().map(|k| k.as_str()).collect();
        left.sort_unstable();
        assert_eq!(left, ["host", "te"]);

        let upgrade = |value: &str, version| {
            let mut req = get("/", &[("upgrade", value), ("connection", "upgrade"), ("host", "a")]);
            *req.version_mut() = version;
            accept(&mut req, &mut None).unwrap();
            (is_upgrade(&req), req.headers().contains_key("connection"), req.headers().contains_key("upgrade"))
        };
        assert_eq!(upgrade("websocket", Version::HTTP_11), (true, true, true));
        assert_eq!(upgrade("h2c", Version::HTTP_11), (false, false, false));
        assert_eq!(upgrade("websocket", Version::HTTP_10), (false, false, false));
    }

    #[test]
    fn the_default_authority_fills_a_gap_only() {
        let default = Authority::from_static("10.0.0.1:80");
        let mut req = get("/a", &[]);
        request(&mut req, Some(&default)).unwrap();
        assert_eq!(req.uri(), "http://10.0.0.1:80/a");
        assert!(!req.headers().contains_key("host"));
        request(&mut req, Some(&Authority::from_static("other"))).unwrap();
        assert_eq!(req.uri().authority(), Some(&default));
        assert_eq!(request(&mut get("/", &[]), None), Err(BadRequest::MissingAuthority));
    }
}
