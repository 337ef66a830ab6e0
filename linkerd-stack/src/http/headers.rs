//! How large the head of a request may be: one limit for HTTP/1 and HTTP/2, measured the same way on both, and the 431
//! that names the setting.

use super::{Version, body::Body};
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode, header};

/// What RFC 9113 section 6.5.2 adds to each field for bookkeeping, bytes.
const FIELD_OVERHEAD: usize = 32;

/// The pseudo-header names `:method`, `:scheme`, `:authority` and `:path`, with their overhead, bytes. Counted for
/// HTTP/1 too, so that a request does not pass one proxy of a pair and fail at the other.
const PSEUDO_FIELDS: usize = 7 + 7 + 10 + 5 + 4 * FIELD_OVERHEAD;

/// Size of a request's head by RFC 9113 section 6.5.2, bytes: names, values and 32 for each field.
pub fn size<B>(req: &Request<B>) -> usize {
    let uri = req.uri();
    let target = uri.scheme_str().map_or(0, str::len)
        + uri.authority().map_or(0, |a| a.as_str().len())
        + uri.path_and_query().map_or(0, |p| p.as_str().len());
    PSEUDO_FIELDS + req.method().as_str().len() + target + fields(req.headers())
}

/// Size of header or trailer fields by RFC 9113 section 6.5.2, bytes.
pub fn fields(headers: &HeaderMap) -> usize {
    headers.iter().map(|(name, value)| name.as_str().len() + value.len() + FIELD_OVERHEAD).sum()
}

/// The answer to a head of `size` bytes where `limit` were allowed by `setting`. It closes an HTTP/1 connection.
pub(super) fn too_large(version: Version, size: usize, limit: u32, setting: &str) -> Response<Body> {
    let text = format!("the head of the request has {size} bytes, more than the {limit} that {setting} allows\n");
    let mut rsp = plain(version, StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE, Body::full(text));
    rsp.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain"));
    rsp
}

/// An answer of the codec: a status and no headers of the mesh. It closes an HTTP/1 connection, because what follows a
/// request that was not understood can't be trusted.
pub(super) fn plain(version: Version, status: StatusCode, body: Body) -> Response<Body> {
    let mut rsp = Response::new(body);
    *rsp.status_mut() = status;
    if version == Version::H1 {
        rsp.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    rsp
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_head_has_the_same_size_in_both_forms() {
        let absolute = Request::get("http://h/p").header("a", "bc").body(()).unwrap();
        // ":method" "GET", ":scheme" "http", ":authority" "h", ":path" "/p", "a" "bc".
        assert_eq!(size(&absolute), (7 + 3) + (7 + 4) + (10 + 1) + (5 + 2) + (1 + 2) + 5 * 32);
    }

    #[test]
    fn the_answer_names_the_setting() {
        let rsp = too_large(Version::H1, 70_000, 65_536, "MAX_HEAD");
        assert_eq!(rsp.status(), 431);
        assert_eq!(rsp.headers()["connection"], "close");
        assert!(!too_large(Version::H2, 1, 0, "").headers().contains_key("connection"));
    }
}
