//! The value syntaxes of the environment (contract.md 1.0), each a function from text to value.
//!
//! Errors say what was expected; the caller adds the variable's name and the value.

use super::{ControlAddr, DefaultPolicy, Suffixes};
use ipnet::IpNet;
use linkerd_tls::ServerName;
use std::{
    collections::{BTreeSet, HashSet},
    net::{IpAddr, SocketAddr},
    str::FromStr,
    time::Duration,
};

/// What was expected instead.
pub type Expected = String;

/// Exactly `true` or `false`.
pub fn boolean(s: &str) -> Result<bool, Expected> {
    match s {
        "true" => Ok(true),
        "false" => Ok(false),
        _ => Err("expected true or false".into()),
    }
}

/// Decimal digits, one leading `+` tolerated.
pub fn integer<T: FromStr>(s: &str) -> Result<T, Expected> {
    let digits = s.strip_prefix('+').unwrap_or(s);
    if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return Err("expected a whole number in decimal digits".into());
    }
    digits.parse().map_err(|_| "the number is too large".to_string())
}

/// A finite decimal float within bounds.
pub fn float(s: &str, min: f64, max: f64) -> Result<f64, Expected> {
    match s.parse::<f64>() {
        Ok(x) if x.is_finite() && (min..=max).contains(&x) => Ok(x),
        _ => Err(format!("expected a number from {min} to {max}")),
    }
}

/// A whole number and one of `ms`, `s`, `m`, `h`, `d`; a bare `0` is zero; blanks around are ignored.
pub fn duration(s: &str) -> Result<Duration, Expected> {
    let expected = || "expected a whole number with a unit of ms, s, m, h or d, for instance 10s".to_string();
    let s = s.trim();
    if s == "0" {
        return Ok(Duration::ZERO);
    }
    let split = s.find(|c: char| !c.is_ascii_digit()).ok_or_else(expected)?;
    let (digits, unit) = s.split_at(split);
    if digits.is_empty() {
        return Err(expected());
    }
    let n: u64 = digits.parse().map_err(|_| "the duration is too long".to_string())?;
    let seconds = |per: u64| n.checked_mul(per).map(Duration::from_secs);
    match unit {
        "ms" => Some(Duration::from_millis(n)),
        "s" => seconds(1),
        "m" => seconds(60),
        "h" => seconds(60 * 60),
        "d" => seconds(24 * 60 * 60),
        _ => return Err(expected()),
    }
    .ok_or_else(|| "the duration is too long".to_string())
}

/// A duration, or the empty string for "no limit".
pub fn duration_or_empty(s: &str) -> Result<Option<Duration>, Expected> {
    if s.is_empty() { Ok(None) } else { duration(s).map(Some) }
}

/// `1.2.3.4:80` or `[::1]:80`.
pub fn socket_addr(s: &str) -> Result<SocketAddr, Expected> {
    s.parse().map_err(|_| "expected an IP address and port, for instance 0.0.0.0:4143".into())
}

/// One or two `ip:port`, separated by commas, not trimmed.
pub fn socket_addrs(s: &str) -> Result<Vec<SocketAddr>, Expected> {
    let addrs = s.split(',').map(socket_addr).collect::<Result<Vec<_>, _>>()?;
    if addrs.len() > 2 {
        return Err("expected at most two addresses".into());
    }
    Ok(addrs)
}

/// `ip:port` or `name:port`.
pub fn addr(s: &str) -> Result<ControlAddr, Expected> {
    if let Ok(addr) = s.parse::<SocketAddr>() {
        return Ok(ControlAddr { host: addr.ip().to_string(), port: addr.port(), identity: None });
    }
    let expected = || "expected host:port or ip:port".to_string();
    let (host, port) = s.rsplit_once(':').ok_or_else(expected)?;
    dns_name(host).map_err(|_| expected())?;
    let port = integer(port).map_err(|_| expected())?;
    Ok(ControlAddr { host: host.to_ascii_lowercase(), port, identity: None })
}

/// A DNS name; one trailing dot allowed.
pub fn dns_name(s: &str) -> Result<ServerName, Expected> {
    s.parse().map_err(|_| "expected a DNS name".into())
}

/// Lines of `key=value`, or the comma list of the OpenTelemetry specification: text of one line in which every item has its
/// own `=`. Never refused.
pub fn otel_attributes(s: &str) -> Vec<String> {
    let is_list = s.lines().count() == 1 && s.split(',').all(|item| item.contains('='));
    let owned = |item: &str| item.trim().to_string();
    if is_list { s.split(',').map(owned).collect() } else { s.lines().map(owned).collect() }
}

/// Comma list of `N` or `LO-HI`; blanks and empty items are ignored.
pub fn port_set(s: &str) -> Result<BTreeSet<u16>, Expected> {
    let mut set = BTreeSet::new();
    for item in s.split(',').map(str::trim).filter(|i| !i.is_empty()) {
        let expected = |_| format!("{item:?} is no port; expected ports like 80 or ranges like 4000-4010");
        match item.split_once('-') {
            None => {
                set.insert(integer::<u16>(item).map_err(expected)?);
            }
            Some((lo, hi)) => {
                let lo: u16 = integer(lo.trim()).map_err(expected)?;
                let hi: u16 = integer(hi.trim()).map_err(expected)?;
                if lo > hi {
                    return Err(format!("{item:?} is a reversed range"));
                }
                set.extend(lo..=hi);
            }
        }
    }
    Ok(set)
}

/// Comma list of DNS names; `.` matches every name.
pub fn suffixes(s: &str) -> Result<Suffixes, Expected> {
    let mut suffixes = Vec::new();
    for item in s.split(',').map(str::trim).filter(|i| !i.is_empty()) {
        if item != "." {
            dns_name(item).map_err(|_| format!("{item:?} is no DNS name"))?;
        }
        suffixes.push(item.to_ascii_lowercase());
    }
    Ok(Suffixes(suffixes))
}

/// Comma list of CIDRs; the prefix length is needed, host bits may be set.
pub fn networks(s: &str) -> Result<Vec<IpNet>, Expected> {
    s.split(',')
        .map(str::trim)
        .filter(|i| !i.is_empty())
        .map(|item| item.parse().map_err(|_| format!("{item:?} is no network; expected CIDR notation like 10.0.0.0/8")))
        .collect()
}

/// Comma list of IP addresses, not trimmed, not empty.
pub fn ips(s: &str) -> Result<HashSet<IpAddr>, Expected> {
    s.split(',').map(|item| item.parse().map_err(|_| format!("{item:?} is no IP address"))).collect()
}

/// One of the default policies.
pub fn default_policy(s: &str) -> Result<DefaultPolicy, Expected> {
    use DefaultPolicy as P;
    [
        P::Deny,
        P::AllAuthenticated,
        P::AllUnauthenticated,
        P::ClusterAuthenticated,
        P::ClusterUnauthenticated,
        P::Audit,
    ]
    .into_iter()
    .find(|p| p.as_str() == s)
    .ok_or_else(|| {
        "expected deny, all-authenticated, all-unauthenticated, cluster-authenticated, cluster-unauthenticated or audit"
            .into()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check<T: PartialEq + std::fmt::Debug>(
        parse: impl Fn(&str) -> Result<T, Expected>,
        good: &[(&str, T)],
        bad: &[&str],
    ) {
        for (text, value) in good {
            assert_eq!(parse(text).as_ref(), Ok(value), "{text:?}");
        }
        for text in bad {
            assert!(parse(text).is_err(), "{text:?} must be refused");
        }
    }

    #[test]
    fn booleans() {
        check(boolean, &[("true", true), ("false", false)], &["True", "1", "yes", ""]);
    }

    #[test]
    fn integers() {
        check(integer::<u16>, &[("80", 80), ("+80", 80), ("65535", 65535)], &["", " 1", "-1", "65536", "0x1", "++1"]);
    }

    #[test]
    fn floats() {
        let parse = |s: &str| float(s, 0.0, 100.0);
        check(parse, &[("0.1", 0.1), ("100", 100.0)], &["", "NaN", "inf", "-1", "101", "x"]);
    }

    #[test]
    fn durations() {
        let s = Duration::from_secs;
        check(
            duration,
            &[
                ("0", s(0)),
                ("300ms", Duration::from_millis(300)),
                (" 10s ", s(10)),
                ("2m", s(120)),
                ("1h", s(3600)),
                ("365d", s(365 * 86400)),
            ],
            &["", "10", "1.5s", "1m30s", "10 s", "s", "-1s", "1us", "99999999999999999999s", "18446744073709551615d"],
        );
        check(duration_or_empty, &[("", None), ("5m", Some(s(300)))], &["5"]);
    }

    #[test]
    fn addresses() {
        let sa = |s: &str| s.parse::<SocketAddr>().expect("a socket address");
        check(
            socket_addr,
            &[("1.2.3.4:80", sa("1.2.3.4:80")), ("[::1]:80", sa("[::1]:80"))],
            &["localhost:80", "1.2.3.4", "::1:80", ""],
        );
        check(
            socket_addrs,
            &[("127.0.0.1:4140,[::1]:4140", vec![sa("127.0.0.1:4140"), sa("[::1]:4140")])],
            &["127.0.0.1:1, [::1]:1", "1.1.1.1:1,1.1.1.1:2,1.1.1.1:3", ""],
        );
        let ca = |host: &str, port| ControlAddr { host: host.into(), port, identity: None };
        check(
            addr,
            &[("a.b.:80", ca("a.b.", 80)), ("[::1]:80", ca("::1", 80)), ("LocalHost.:1", ca("localhost.", 1))],
            &["a.b", ":80", "a b:80", "a:99999"],
        );
        assert!(ca("localhost.", 1).is_loopback());
        assert!(!ca("localhost", 1).is_loopback());
        assert!(ca("127.9.9.9", 1).is_loopback());
    }

    #[test]
    fn dns_names_and_identities() {
        let name = |s: &str| s.parse::<ServerName>().expect("a DNS name");
        let (label, long) = ("x".repeat(63), format!("{0}.{0}.{0}.{1}", "x".repeat(63), "y".repeat(61)));
        check(
            dns_name,
            &[
                ("a", name("a")),
                ("A_b-1.C.", name("a_b-1.c")),
                ("1.a", name("1.a")),
                (&label, name(&label)),
                (&long, name(&long)),
            ],
            &["", ".", "*.a", "-a", "a-", "a..b", "1.2.3.4", "a.1", "a b", "::1", &"x".repeat(64), &format!("{long}z")],
        );
        let id = |s: &str| s.parse::<linkerd_tls::Id>().map_err(|e| e.to_string());
        let good = |s: &str| id(s).expect("an identity");
        check(
            id,
            &[("A.b", good("a.b")), ("spiffe://root/web", good("spiffe://root/web"))],
            &["a.b.", "", "spiffe:", "/path", "a b"],
        );
    }

    #[test]
    fn port_sets() {
        let set = |ports: &[u16]| ports.iter().copied().collect::<BTreeSet<_>>();
        check(
            port_set,
            &[("", set(&[])), ("80", set(&[80])), (" 80 , 90 - 92 ,,", set(&[80, 90, 91, 92]))],
            &["http", "80-", "-80", "90-80", "70000"],
        );
    }

    #[test]
    fn name_lists() {
        check(
            suffixes,
            &[
                ("", Suffixes(vec![])),
                (".", Suffixes(vec![".".into()])),
                ("svc.Cluster.local., b", Suffixes(vec!["svc.cluster.local.".into(), "b".into()])),
            ],
            &["*.a", "1.2.3.4"],
        );
        let list = suffixes("svc.cluster.local.").expect("a suffix");
        assert!(list.matches("web.ns.svc.cluster.local"));
        assert!(list.matches("web.ns.SVC.cluster.local."));
        assert!(!list.matches("xsvc.cluster.local"));
        assert!(suffixes(".").expect("everything").matches("example.com"));
    }

    #[test]
    fn networks_and_ips() {
        check(
            networks,
            &[
                ("", vec![]),
                ("10.1.2.3/8, fd00::/8", vec!["10.1.2.3/8".parse().expect("v4"), "fd00::/8".parse().expect("v6")]),
            ],
            &["10.0.0.0", "10.0.0.0/33"],
        );
        check(
            ips,
            &[("10.0.0.1", HashSet::from(["10.0.0.1".parse().expect("an IP")]))],
            &["", "10.0.0.1, ::1", "10.0.0.0/8"],
        );
    }

    #[test]
    fn resource_attributes() {
        assert_eq!(otel_attributes("a=1,b=2"), ["a=1", "b=2"]);
        assert_eq!(otel_attributes("a=1,2"), ["a=1,2"]);
        assert_eq!(otel_attributes("a=1,b=2\nc=3"), ["a=1,b=2", "c=3"]);
    }

    #[test]
    fn policies() {
        check(
            default_policy,
            &[("deny", DefaultPolicy::Deny), ("audit", DefaultPolicy::Audit)],
            &["", "Deny", "allow"],
        );
    }
}
