//! HTTP/1 carried over HTTP/2 between two proxies (behaviour.md E.1). The client's proxy turns an HTTP/1 request into
//! HTTP/2 and says what it was in a header; the server's proxy turns it back; the response travels likewise. Content
//! and trailers pass untouched.

use super::normalize::{self, AbsoluteForm};
use http::{
    HeaderName, HeaderValue, Method, Request, Response, Uri, Version,
    header::{HOST, TRANSFER_ENCODING},
    uri::{Authority, Scheme},
};

/// Says which HTTP/1 a message was.
pub const HEADER: HeaderName = HeaderName::from_static("l5d-orig-proto");

const HTTP_11: &str = "HTTP/1.1";
const HTTP_10: &str = "HTTP/1.0";
const HTTP_11_ABSOLUTE: &str = "HTTP/1.1; absolute-form";
const HTTP_10_ABSOLUTE: &str = "HTTP/1.0; absolute-form";

/// Where `absolute-form` stands in the header's value: after `HTTP/1.x; `, bytes.
const ABSOLUTE_OFFSET: usize = 10;

/// What a request was before it was carried; its response needs it.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Carried(Version);

/// Whether the client's proxy may carry this request: HTTP/1 that neither is CONNECT nor wants an upgrade.
pub fn may_upgrade<B>(req: &Request<B>) -> bool {
    matches!(req.version(), Version::HTTP_10 | Version::HTTP_11)
        && req.method() != Method::CONNECT
        && !normalize::is_upgrade(req)
}

/// Client's proxy, request: HTTP/1 becomes HTTP/2. Requests of other versions are left alone, and none is returned.
pub fn upgrade_request<B>(req: &mut Request<B>) -> Option<Carried> {
    let absolute = req.extensions().get::<AbsoluteForm>().is_some();
    let version = req.version();
    let value = match (version, absolute) {
        (Version::HTTP_11, false) => HTTP_11,
        (Version::HTTP_11, true) => HTTP_11_ABSOLUTE,
        (Version::HTTP_10, false) => HTTP_10,
        (Version::HTTP_10, true) => HTTP_10_ABSOLUTE,
        _ => return None,
    };
    normalize::strip_hop_by_hop(req.headers_mut());
    req.headers_mut().remove(TRANSFER_ENCODING);
    req.headers_mut().insert(HEADER, HeaderValue::from_static(value));
    if req.uri().scheme().is_none() && req.uri().authority().is_some() {
        let mut parts = std::mem::take(req.uri_mut()).into_parts();
        parts.scheme = Some(Scheme::HTTP);
        // Valid: a scheme and an authority are there, and the path came from a URI.
        *req.uri_mut() = Uri::from_parts(parts).unwrap_or_default();
    }
    *req.version_mut() = Version::HTTP_2;
    Some(Carried(version))
}

/// Client's proxy, response: HTTP/2 becomes what the application's answer was, or what its request was if the peer
/// did not say.
pub fn restore_response<B>(rsp: &mut Response<B>, carried: Carried) {
    let value = rsp.headers_mut().remove(HEADER);
    *rsp.version_mut() = match value.as_ref().map(HeaderValue::as_bytes) {
        Some(value) if value == HTTP_11.as_bytes() => Version::HTTP_11,
        Some(value) if value == HTTP_10.as_bytes() => Version::HTTP_10,
        _ => carried.0,
    };
}

/// Server's proxy, request: HTTP/2 that carries HTTP/1 becomes HTTP/1 again. The header is removed in any case; a
/// value that is not understood leaves the request as it is, and none is returned.
pub fn restore_request<B>(req: &mut Request<B>) -> Option<Carried> {
    if req.version() != Version::HTTP_2 {
        return None;
    }
    let value = req.headers_mut().remove(HEADER)?;
    let version = if value.as_bytes().starts_with(HTTP_11.as_bytes()) {
        Version::HTTP_11
    } else if value.as_bytes().starts_with(HTTP_10.as_bytes()) {
        Version::HTTP_10
    } else {
        tracing::warn!(?value, "unknown l5d-orig-proto");
        return None;
    };
    if is_absolute_form(&value) {
        req.extensions_mut().insert(AbsoluteForm);
    }
    let host = req.headers().get(HOST).and_then(|host| Authority::try_from(host.as_bytes()).ok());
    if host.is_some() {
        // The application reads Host; policy was decided by the authority. They must be one.
        normalize::agree(req, host);
    }
    *req.version_mut() = version;
    Some(Carried(version))
}

/// Server's proxy, response: HTTP/1 becomes HTTP/2 and says what it was.
pub fn upgrade_response<B>(rsp: &mut Response<B>) {
    let value = match rsp.version() {
        Version::HTTP_10 => HTTP_10,
        Version::HTTP_11 => HTTP_11,
        _ => return,
    };
    normalize::strip_hop_by_hop(rsp.headers_mut());
    rsp.headers_mut().remove(TRANSFER_ENCODING);
    rsp.headers_mut().insert(HEADER, HeaderValue::from_static(value));
    *rsp.version_mut() = Version::HTTP_2;
}

/// Whether the header's value says that the target was in absolute form.
pub(super) fn is_absolute_form(value: &HeaderValue) -> bool {
    value.as_bytes().get(ABSOLUTE_OFFSET..).is_some_and(|rest| rest.starts_with(b"absolute-form"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(version: Version, absolute: bool, value: &str) {
        let mut req = Request::get("http://web/a").version(version).header("host", "web").body(()).unwrap();
        req.headers_mut().insert(TRANSFER_ENCODING, HeaderValue::from_static("chunked"));
        req.headers_mut().insert("connection", HeaderValue::from_static("close"));
        if absolute {
            req.extensions_mut().insert(AbsoluteForm);
        }
        assert!(may_upgrade(&req));
        let carried = upgrade_request(&mut req).unwrap();
        assert_eq!((req.version(), req.headers()[HEADER].to_str().unwrap()), (Version::HTTP_2, value));
        assert!(!req.headers().contains_key(TRANSFER_ENCODING) && !req.headers().contains_key("connection"));

        // The wire carries no extensions.
        *req.extensions_mut() = http::Extensions::new();
        assert_eq!(restore_request(&mut req), Some(carried));
        assert_eq!(req.version(), version);
        assert_eq!(req.extensions().get::<AbsoluteForm>().is_some(), absolute);
        assert!(!req.headers().contains_key(HEADER));

        let mut rsp = Response::builder().version(Version::HTTP_10).header("te", "x").body(()).unwrap();
        upgrade_response(&mut rsp);
        assert_eq!((rsp.version(), rsp.headers()[HEADER].to_str().unwrap()), (Version::HTTP_2, "HTTP/1.0"));
        restore_response(&mut rsp, carried);
        assert_eq!((rsp.version(), rsp.headers().contains_key(HEADER)), (Version::HTTP_10, false));
        *rsp.version_mut() = Version::HTTP_2;
        restore_response(&mut rsp, carried);
        assert_eq!(rsp.version(), version, "a peer that does not say gets the request's");
    }

    #[test]
    fn there_and_back() {
        check(Version::HTTP_11, false, "HTTP/1.1");
        check(Version::HTTP_10, false, "HTTP/1.0");
        check(Version::HTTP_11, true, "HTTP/1.1; absolute-form");
        check(Version::HTTP_10, true, "HTTP/1.0; absolute-form");
    }

    #[test]
    fn what_is_not_carried() {
        let ws = Request::get("/").header("upgrade", "websocket").body(()).unwrap();
        assert!(!may_upgrade(&ws));
        let connect = Request::connect("a:80").body(()).unwrap();
        assert!(!may_upgrade(&connect));
        let mut h2 = Request::get("http://a/").version(Version::HTTP_2).body(()).unwrap();
        assert_eq!(upgrade_request(&mut h2), None);
        assert!(!h2.headers().contains_key(HEADER));
    }

    #[test]
    fn an_unknown_value_stays_http2() {
        let mut req = Request::get("http://a/").version(Version::HTTP_2).header(HEADER, "HTTP/9").body(()).unwrap();
        assert_eq!(restore_request(&mut req), None);
        assert_eq!((req.version(), req.headers().contains_key(HEADER)), (Version::HTTP_2, false));
        let mut rsp = Response::builder().version(Version::HTTP_2).header(HEADER, "HTTP/1.1x").body(()).unwrap();
        restore_response(&mut rsp, Carried(Version::HTTP_10));
        assert_eq!(rsp.version(), Version::HTTP_10);
    }

    #[test]
    fn host_follows_the_authority_that_policy_saw() {
        let mut req = Request::get("http://a/").version(Version::HTTP_2).body(()).unwrap();
        req.headers_mut().insert(HEADER, HeaderValue::from_static(HTTP_11));
        req.headers_mut().insert(HOST, HeaderValue::from_static("evil"));
        restore_request(&mut req).unwrap();
        assert_eq!(req.headers()[HOST], "a");
    }
}
