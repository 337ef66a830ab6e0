//! Finds the best match for a request among routes (behaviour.md C.7, resources.md 3.4 and 3.5).
//!
//! Nothing is allocated unless a query string has escapes: hosts and regular expressions come ready in the policy
//! values. Each match of a rule competes on its own; ties go to the earlier one.

use crate::policy::route::{GrpcMatch, HostMatch, HttpMatch, PathMatch, Precedence, RouteMatch};
use http::{HeaderMap, Method, Request, header::HOST};
use std::{borrow::Cow, cmp::Ordering};

/// The rule that a request takes.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Match {
    /// Index of the route.
    pub route: usize,
    /// Index of the rule in the route.
    pub rule: usize,
    /// Bytes of the path that a prefix covered; none if the path was matched otherwise. Prefix replacements need it.
    pub prefix: Option<usize>,
    /// The dialect that filters of this route follow.
    pub precedence: Precedence,
}

/// Keys in order of importance; larger wins.
type Rank = [usize; 5];

/// What of a request is matched, looked up once.
struct Subject<'a> {
    host: Option<&'a str>,
    authority: Option<&'a str>,
    path: &'a str,
    query: Option<&'a str>,
    method: &'a Method,
    headers: &'a HeaderMap,
    precedence: Precedence,
}

/// The best match over all routes, rules and alternatives.
pub fn best_match<'a, R, B>(
    routes: impl IntoIterator<Item = (&'a [HostMatch], R)>,
    precedence: Precedence,
    req: &Request<B>,
) -> Option<Match>
where
    R: IntoIterator<Item = &'a [RouteMatch]>,
{
    best(routes, &Subject::new(req, precedence))
}

/// As [`best_match`], for a path other than that of the request.
pub fn best_match_at<'a, R, B>(
    routes: impl IntoIterator<Item = (&'a [HostMatch], R)>,
    precedence: Precedence,
    req: &Request<B>,
    path: &str,
) -> Option<Match>
where
    R: IntoIterator<Item = &'a [RouteMatch]>,
{
    best(routes, &Subject { path, ..Subject::new(req, precedence) })
}

fn best<'a, R>(routes: impl IntoIterator<Item = (&'a [HostMatch], R)>, subject: &Subject<'_>) -> Option<Match>
where
    R: IntoIterator<Item = &'a [RouteMatch]>,
{
    let precedence = subject.precedence;
    let mut best: Option<((usize, usize), Rank, Match)> = None;
    for (route, (hosts, rules)) in routes.into_iter().enumerate() {
        let Some(host) = subject.hosts(hosts) else { continue };
        if best.as_ref().is_some_and(|(best, ..)| host < *best) {
            continue;
        }
        for (rule, matches) in rules.into_iter().enumerate() {
            let Some((rank, prefix)) = subject.rule(matches) else { continue };
            let better = match &best {
                None => true,
                Some((best_host, best_rank, _)) => (host, &rank).cmp(&(*best_host, best_rank)) == Ordering::Greater,
            };
            if better {
                best = Some((host, rank, Match { route, rule, prefix, precedence }));
            }
        }
    }
    best.map(|(.., found)| found)
}

/// Rank of a name among hosts: kind (none 0, suffix 1, exact 2) and length; none if the hosts exclude it. SNI is
/// matched by the same rule (behaviour.md D.9).
pub fn match_hosts(hosts: &[HostMatch], name: Option<&str>) -> Option<(usize, usize)> {
    if hosts.is_empty() {
        return Some((0, 0));
    }
    let name = name?;
    hosts.iter().filter_map(|host| match_host(host, name)).max()
}

fn match_host(host: &HostMatch, name: &str) -> Option<(usize, usize)> {
    match host {
        HostMatch::Exact(exact) => {
            let name = if exact.ends_with('.') { name } else { name.strip_suffix('.').unwrap_or(name) };
            name.eq_ignore_ascii_case(exact).then_some((2, exact.len()))
        }
        HostMatch::Suffix(suffix) => {
            let name = if suffix.ends_with('.') { name } else { name.strip_suffix('.').unwrap_or(name) };
            let split = name.len().checked_sub(suffix.len()).filter(|at| *at > 0)?;
            let (label, rest) = name.split_at_checked(split)?;
            (rest.eq_ignore_ascii_case(suffix) && !label.ends_with('.')).then_some((1, suffix.len()))
        }
    }
}

impl<'a> Subject<'a> {
    fn new<B>(req: &'a Request<B>, precedence: Precedence) -> Self {
        let uri = req.uri();
        Self {
            host: uri.host(),
            authority: uri.authority().map(|a| a.as_str()),
            path: uri.path(),
            query: uri.query(),
            method: req.method(),
            headers: req.headers(),
            precedence,
        }
    }

    fn hosts(&self, hosts: &[HostMatch]) -> Option<(usize, usize)> {
        match_hosts(hosts, self.host)
    }

    /// The best alternative of a rule. A rule without alternatives takes everything, with the rank of the prefix `/`.
    fn rule(&self, matches: &[RouteMatch]) -> Option<(Rank, Option<usize>)> {
        if matches.is_empty() {
            let rank = match self.precedence {
                Precedence::Linkerd => [1, 0, 0, 0, 0],
                Precedence::GatewayApi => [0, 1, 0, 0, 0],
            };
            return Some((rank, Some(0)));
        }
        let mut best: Option<(Rank, Option<usize>)> = None;
        for alternative in matches {
            let found = match alternative {
                RouteMatch::Http(m) => self.http(m),
                RouteMatch::Grpc(m) => self.grpc(m).map(|rank| (rank, None)),
            };
            if let Some(found) = found
                && best.as_ref().is_none_or(|(rank, _)| found.0 > *rank)
            {
                best = Some(found);
            }
        }
        best
    }

    fn http(&self, m: &HttpMatch) -> Option<(Rank, Option<usize>)> {
        if m.method.as_ref().is_some_and(|method| method != self.method) {
            return None;
        }
        let (kind, length, prefix) = match &m.path {
            None => (0, 1, Some(0)),
            Some(path) => self.path(path)?,
        };
        let fits = m.headers.iter().all(|h| self.header(&h.name, |v| h.value.is_match(v)))
            && m.query.iter().all(|q| self.query(&q.name, |v| q.value.is_match(v)));
        if !fits {
            return None;
        }
        let method = usize::from(m.method.is_some());
        let rank = match self.precedence {
            Precedence::Linkerd => [length, m.headers.len(), m.query.len(), method, 0],
            Precedence::GatewayApi => [kind, length, method, m.headers.len(), m.query.len()],
        };
        Some((rank, prefix))
    }

    /// Kind (prefix 0, regular expression 1, exact 2), characters matched, and bytes covered by a prefix. The Gateway
    /// API gives regular expressions no place; between exact and prefix is where users expect them.
    fn path(&self, m: &PathMatch) -> Option<(usize, usize, Option<usize>)> {
        match m {
            PathMatch::Exact(exact) => (**exact == *self.path).then_some((2, exact.len(), None)),
            PathMatch::Prefix(prefix) => {
                let rest = self.path.strip_prefix(&**prefix)?;
                (prefix.is_empty() || rest.is_empty() || rest.starts_with('/')).then_some((
                    0,
                    prefix.len().max(1),
                    Some(prefix.len()),
                ))
            }
            PathMatch::Regex(regex) => regex.is_match(self.path).then_some((1, self.path.len(), None)),
        }
    }

    /// `/service/method`, POST only. Rank: service length, method length, headers.
    fn grpc(&self, m: &GrpcMatch) -> Option<Rank> {
        if self.method != Method::POST {
            return None;
        }
        let mut segments = self.path.strip_prefix('/')?.split('/');
        let (service, method) = (segments.next()?, segments.next()?);
        let fits = m.service.as_ref().is_none_or(|s| s.is_match(service))
            && m.method.as_ref().is_none_or(|s| s.is_match(method))
            && m.headers.iter().all(|h| self.header(&h.name, |v| h.value.is_match(v)));
        let service = m.service.as_ref().map_or(0, |_| service.len());
        let method = m.method.as_ref().map_or(0, |_| method.len());
        // One more than a rule without alternatives, so that "any call" beats "anything".
        fits.then_some([2, service, method, m.headers.len(), 0])
    }

    /// Any one value of a header. `host` sees the authority, which HTTP/2 has in its place.
    fn header(&self, name: &http::HeaderName, fits: impl Fn(&str) -> bool) -> bool {
        if *name == HOST
            && let Some(authority) = self.authority
            && fits(authority)
        {
            return true;
        }
        self.headers.get_all(name).iter().any(|v| v.to_str().is_ok_and(&fits))
    }

    /// A query parameter, decoded: any occurrence for Linkerd, the first for the Gateway API (resources.md 3.3).
    fn query(&self, name: &str, fits: impl Fn(&str) -> bool) -> bool {
        let mut values = query_pairs(self.query.unwrap_or("")).filter(|(key, _)| key == name).map(|(_, value)| value);
        match self.precedence {
            Precedence::Linkerd => values.any(|v| fits(&v)),
            Precedence::GatewayApi => values.next().is_some_and(|v| fits(&v)),
        }
    }
}

/// Decoded `name=value` pairs of a query string.
fn query_pairs(query: &str) -> impl Iterator<Item = (Cow<'_, str>, Cow<'_, str>)> {
    query.split('&').filter(|pair| !pair.is_empty()).map(|pair| {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        (decode(name), decode(value))
    })
}

/// `+` is a blank, `%XX` a byte; malformed escapes stay as they are. Invalid UTF-8 is replaced, so it matches nothing
/// that was configured.
fn decode(text: &str) -> Cow<'_, str> {
    if !text.bytes().any(|b| b == b'%' || b == b'+') {
        return Cow::Borrowed(text);
    }
    let mut out = Vec::with_capacity(text.len());
    let bytes = text.as_bytes();
    let mut at = 0;
    while let Some(&byte) = bytes.get(at) {
        at += 1;
        out.push(match byte {
            b'+' => b' ',
            b'%' => match (bytes.get(at).copied().and_then(hex), bytes.get(at + 1).copied().and_then(hex)) {
                (Some(high), Some(low)) => {
                    at += 2;
                    high << 4 | low
                }
                _ => b'%',
            },
            byte => byte,
        });
    }
    Cow::Owned(String::from_utf8_lossy(&out).into_owned())
}

fn hex(digit: u8) -> Option<u8> {
    char::from(digit).to_digit(16).and_then(|d| u8::try_from(d).ok())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::route::{FullRegex, HeaderMatch, QueryMatch, StringMatch};

    fn exact(p: &str) -> PathMatch {
        PathMatch::Exact(p.into())
    }
    fn prefix(p: &str) -> PathMatch {
        PathMatch::Prefix(p.trim_end_matches('/').into())
    }
    fn regex(p: &str) -> PathMatch {
        PathMatch::Regex(FullRegex::new(p).unwrap())
    }
    fn path(p: PathMatch) -> HttpMatch {
        HttpMatch { path: Some(p), ..HttpMatch::default() }
    }
    fn http(m: HttpMatch) -> Vec<RouteMatch> {
        vec![RouteMatch::Http(m)]
    }
    fn req(method: &str, uri: &str) -> Request<()> {
        Request::builder().method(method).uri(uri).body(()).unwrap()
    }

    /// The index of the rule that wins, in one route without hosts.
    #[track_caller]
    fn check(rules: &[Vec<RouteMatch>], precedence: Precedence, req: &Request<()>, expected: Option<usize>) {
        let hosts: &[HostMatch] = &[];
        let found = best_match([(hosts, rules.iter().map(|r| &**r))], precedence, req);
        assert_eq!(found.map(|m| m.rule), expected, "{} {}", req.method(), req.uri());
    }

    #[test]
    fn paths_rank_by_length_for_linkerd_and_by_kind_for_the_gateway_api() {
        let rules = [http(path(prefix("/a/b"))), http(path(exact("/a"))), http(path(regex("/a.*"))), vec![]];
        for precedence in [Precedence::Linkerd, Precedence::GatewayApi] {
            check(&rules, precedence, &req("GET", "http://h/a"), Some(1));
            check(&rules, precedence, &req("GET", "http://h/zzz"), Some(3));
            check(&rules, precedence, &req("GET", "http://h/a/b/c"), Some(2));
        }
        // The same number of characters: Linkerd takes the earlier one, the Gateway API the exact one.
        let rules = [http(path(prefix("/foo"))), http(path(exact("/foo")))];
        check(&rules, Precedence::Linkerd, &req("GET", "http://h/foo"), Some(0));
        check(&rules, Precedence::GatewayApi, &req("GET", "http://h/foo"), Some(1));
    }

    #[test]
    fn prefixes_match_whole_segments() {
        let rules = [http(path(prefix("/v2/")))];
        for (uri, expected) in
            [("/v2", Some(0)), ("/v2/", Some(0)), ("/v2/x", Some(0)), ("/v2?q", Some(0)), ("/v2x", None), ("/v", None)]
        {
            check(&rules, Precedence::GatewayApi, &req("GET", &format!("http://h{uri}")), expected);
        }
        check(&[http(path(prefix("/")))], Precedence::Linkerd, &req("OPTIONS", "*"), Some(0));
    }

    #[test]
    fn method_and_headers_swap_places_between_dialects() {
        let header = HeaderMatch { name: "x".parse().unwrap(), value: StringMatch::Exact("1".into()) };
        let rules = [
            http(HttpMatch { headers: vec![header.clone()], ..HttpMatch::default() }),
            http(HttpMatch { method: Some(Method::GET), ..HttpMatch::default() }),
        ];
        let mut r = req("GET", "http://h/");
        r.headers_mut().append("x", "0".parse().unwrap());
        r.headers_mut().append("x", "1".parse().unwrap());
        check(&rules, Precedence::Linkerd, &r, Some(0));
        check(&rules, Precedence::GatewayApi, &r, Some(1));
    }

    #[test]
    fn queries_are_decoded() {
        let query = |value: &str| {
            http(HttpMatch {
                query: vec![QueryMatch { name: "a b".into(), value: StringMatch::Exact(value.into()) }],
                ..HttpMatch::default()
            })
        };
        check(&[query("ü=%")], Precedence::Linkerd, &req("GET", "http://h/?a+b=%C3%BC%3d%25"), Some(0));
        check(&[query("x")], Precedence::Linkerd, &req("GET", "http://h/?a%20b=y&a%20b=x"), Some(0));
        check(&[query("x")], Precedence::GatewayApi, &req("GET", "http://h/?a%20b=y&a%20b=x"), None);
        check(&[query("%zz%")], Precedence::Linkerd, &req("GET", "http://h/?a+b=%zz%"), Some(0));
    }

    #[test]
    fn the_host_header_is_the_authority() {
        let rules = [http(HttpMatch {
            headers: vec![HeaderMatch { name: HOST, value: StringMatch::Exact("web.test:80".into()) }],
            ..HttpMatch::default()
        })];
        check(&rules, Precedence::Linkerd, &req("GET", "http://web.test:80/"), Some(0));
        check(&rules, Precedence::Linkerd, &req("GET", "http://other/"), None);
    }

    #[test]
    fn grpc_needs_post_unless_the_rule_is_empty() {
        let service = |s: Option<&str>, m: Option<&str>| {
            vec![RouteMatch::Grpc(GrpcMatch {
                service: s.map(|s| StringMatch::Exact(s.into())),
                method: m.map(|m| StringMatch::Exact(m.into())),
                headers: vec![],
            })]
        };
        let rules = [vec![], service(Some("a.B"), None), service(None, Some("Get")), service(Some("a.B"), Some("Get"))];
        for (method, path, expected) in [
            ("POST", "/a.B/Get", Some(3)),
            ("POST", "/a.B/Get/more", Some(3)),
            ("POST", "/a.B/Put", Some(1)),
            ("POST", "/c.D/Get", Some(2)),
            ("POST", "/c.D/Put", Some(0)),
            ("GET", "/a.B/Get", Some(0)),
            ("POST", "/a.B", Some(0)),
        ] {
            check(&rules, Precedence::Linkerd, &req(method, &format!("http://h{path}")), expected);
        }
        check(&rules[1..], Precedence::Linkerd, &req("GET", "http://h/a.B/Get"), None);
    }

    #[test]
    fn hosts_rank_before_everything_else() {
        let hosts = [
            vec![],
            vec![HostMatch::Suffix(".example.com".into())],
            vec![HostMatch::Suffix(".b.example.com".into())],
            vec![HostMatch::Exact("a.b.example.com".into())],
        ];
        let long = http(path(exact("/long/path")));
        let any: Vec<RouteMatch> = vec![];
        let rules = [[&long], [&any], [&any], [&any]];
        for (host, expected) in [
            ("a.b.example.com", Some(3)),
            ("A.B.Example.COM.:8080", Some(3)),
            ("x.b.example.com", Some(2)),
            ("x.example.com", Some(1)),
            ("example.com", Some(0)),
            ("other", Some(0)),
        ] {
            let r = req("GET", &format!("http://{host}/long/path"));
            let routes = hosts.iter().zip(&rules).map(|(h, r)| (&**h, r.iter().map(|m| &***m)));
            let found = best_match(routes, Precedence::GatewayApi, &r);
            assert_eq!(found.map(|m| m.route), expected, "{host}");
        }
    }
}
