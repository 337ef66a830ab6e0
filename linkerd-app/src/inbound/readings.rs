//! The ways in which an application may read a request's path.
//!
//! The proxy passes paths on as they came, but `/a/../admin`, `//admin`, `/%61dmin`, `/a%2f..%2fadmin` and `/a/..;/admin`
//! are all `/admin` to one server or another. A policy that guards `/admin` by its written form alone would not guard it.
//! So a client must be authorized for every reading of the path it sends; most paths have one only.

use crate::policy::{
    route::{HttpMatch, PathMatch, RouteMatch},
    server::{Route, Rule},
};
use std::sync::Arc;

/// Something that servers do to a path after percent-decoding. Which do, and which don't, cannot be known.
const STEPS: [fn(&str) -> String; 5] = [escaped_slashes, parameters, merged_slashes, dot_segments, merged_slashes];

/// Readings of a path other than itself, with percent-encoding in one form (see [`canonical`]). Each combination of the
/// steps is one, so that there are 32 at most; a path of ordinary characters has none, at the cost of one look at it.
pub(super) fn readings(path: &str) -> Vec<String> {
    if is_ordinary(path.as_bytes()) || !path.starts_with('/') {
        return Vec::new();
    }
    let mut readings = vec![canonical(path)];
    for step in STEPS {
        for index in 0..readings.len() {
            let read = step(&readings[index]);
            if !readings.contains(&read) {
                readings.push(read);
            }
        }
    }
    readings
}

/// Whether every server reads a path as it is written.
fn is_ordinary(path: &[u8]) -> bool {
    path.iter().enumerate().all(|(at, byte)| match byte {
        b'%' | b'\\' | b';' | 0x80.. => false,
        b'/' | b'.' => at == 0 || path[at - 1] != b'/',
        _ => true,
    })
}

/// The path with its percent-encoding in one form: what may stand in a segment is decoded (RFC 3986 section 3.3), all
/// else has upper-case digits (section 6.2.2.1). Bytes beyond ASCII are encoded.
fn canonical(path: &str) -> String {
    let bytes = path.as_bytes();
    let mut out = String::with_capacity(bytes.len());
    let mut at = 0;
    while let Some(&byte) = bytes.get(at) {
        let escape = bytes.get(at + 1..at + 3).filter(|_| byte == b'%').and_then(|digits| {
            let digit = |index: usize| char::from(digits[index]).to_digit(16);
            u8::try_from(digit(0)? << 4 | digit(1)?).ok()
        });
        match escape {
            Some(byte) => {
                if is_segment(byte) {
                    out.push(char::from(byte));
                } else {
                    escape_into(&mut out, byte);
                }
                at += 3;
            }
            None => {
                if byte.is_ascii() {
                    out.push(char::from(byte));
                } else {
                    escape_into(&mut out, byte);
                }
                at += 1;
            }
        }
    }
    out
}

fn escape_into(out: &mut String, byte: u8) {
    const DIGITS: &[u8; 16] = b"0123456789ABCDEF";
    out.push('%');
    out.push(char::from(DIGITS[usize::from(byte >> 4)]));
    out.push(char::from(DIGITS[usize::from(byte & 15)]));
}

/// RFC 3986: pchar.
fn is_segment(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"-._~!$&'()*+,;=:@".contains(&byte)
}

/// Slashes that were escaped, and backslashes, are slashes.
fn escaped_slashes(path: &str) -> String {
    path.replace("%2F", "/").replace("%5C", "/").replace('\\', "/")
}

/// What follows a semicolon in a segment is no part of its name.
fn parameters(path: &str) -> String {
    let segments: Vec<_> = path.split('/').map(|segment| segment.split(';').next().unwrap_or("")).collect();
    segments.join("/")
}

/// Slashes in a row are one.
fn merged_slashes(path: &str) -> String {
    let mut out = String::with_capacity(path.len());
    for c in path.chars() {
        if c != '/' || !out.ends_with('/') {
            out.push(c);
        }
    }
    out
}

/// `.` and `..` are resolved (RFC 3986 section 5.2.4).
fn dot_segments(path: &str) -> String {
    let mut kept: Vec<&str> = Vec::new();
    let mut segments = path.strip_prefix('/').unwrap_or(path).split('/').peekable();
    while let Some(segment) = segments.next() {
        match segment {
            "." | ".." => {
                if segment == ".." {
                    kept.pop();
                }
                if segments.peek().is_none() {
                    kept.push("");
                }
            }
            segment => kept.push(segment),
        }
    }
    format!("/{}", kept.join("/"))
}

/// Routes whose paths are in the form of [`readings`]; none where no path decides which route a request takes.
pub(super) fn routes(routes: &[Route]) -> Option<Arc<[Route]>> {
    let by_path = |m: &RouteMatch| match m {
        RouteMatch::Http(m) => m.path.is_some(),
        RouteMatch::Grpc(m) => m.service.is_some() || m.method.is_some(),
    };
    let matches = || routes.iter().flat_map(|route| &route.rules).flat_map(|rule| &rule.matches);
    matches().any(by_path).then(|| routes.iter().map(canonical_route).collect())
}

fn canonical_route(route: &Route) -> Route {
    let rule = |rule: &Rule| Rule {
        matches: rule.matches.iter().map(canonical_match).collect(),
        // Nothing is done by a route that only tells who may use it.
        filters: Vec::new(),
    };
    Route { rules: route.rules.iter().map(rule).collect(), ..route.clone() }
}

fn canonical_match(m: &RouteMatch) -> RouteMatch {
    let RouteMatch::Http(m) = m else { return m.clone() };
    let path = m.path.as_ref().map(|path| match path {
        PathMatch::Exact(path) => PathMatch::Exact(canonical(path).into()),
        PathMatch::Prefix(path) => PathMatch::Prefix(canonical(path).into()),
        PathMatch::Regex(regex) => PathMatch::Regex(regex.clone()),
    });
    RouteMatch::Http(HttpMatch { path, ..m.clone() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(path: &str, expected: &[&str]) {
        assert_eq!(readings(path), expected, "{path}");
    }

    #[test]
    fn ordinary_paths_are_read_one_way() {
        for path in ["/", "/a/b.c/", "/a~b/$metadata/@x:y", "/.well-known", "/a.../b", "*", ""] {
            let dots = path.contains("/.");
            assert_eq!(readings(path).len(), usize::from(dots), "{path}");
        }
    }

    #[test]
    fn every_way_to_read_a_path_is_found() {
        check("/%61dmin", &["/admin"]);
        check("/a%20b%c3%a9", &["/a%20b%C3%A9"]);
        check("/é", &["/%C3%A9"]);
        check("//admin", &["//admin", "/admin"]);
        check("/a/../admin", &["/a/../admin", "/admin"]);
        check("/a/%2E%2e/admin/.", &["/a/../admin/.", "/admin/"]);
        check("/a\\..\\admin", &["/a\\..\\admin", "/a/../admin", "/admin"]);
        check("/x/..//admin", &["/x/..//admin", "/x/../admin", "//admin", "/admin"]);
        check("/a%2f..%5Cadmin", &["/a%2F..%5Cadmin", "/a/../admin", "/admin"]);
        assert!(readings("/x/..;a=1/admin").contains(&"/admin".to_string()));
        assert!(readings("/x/..;%2f%2e.;/;/../y/..//admin;z").contains(&"/admin".to_string()));
        // Malformed escapes stay; what is escaped twice is unescaped once.
        check("/%6", &["/%6"]);
        check("/%zz%2561", &["/%zz%2561"]);
        check("/../../admin", &["/../../admin", "/admin"]);
    }

    #[test]
    fn readings_are_few() {
        for path in ["/..;/%2f../;//.\\..//%5c;a/./..", "/;;;....////\\\\\\%2f%2f%5c%5c/./../.", "/%2e%2e%2f%3b%25"] {
            assert!((2..=32).contains(&readings(path).len()), "{path}: {}", readings(path).len());
        }
    }
}
