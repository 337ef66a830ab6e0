//! Addresses of control-plane services (behaviour.md G.1).
//!
//! SRV records of the whole name are asked for first. The first label of each target must be an IP address written with
//! dashes, which is how headless services name their pods; then nothing further is looked up. If any target is
//! not of that form, or there are no SRV records, A and AAAA records give the addresses and the configuration the port.
//! There is no cache: the caller asks again when the answer expires.

use super::super::{ControlService, DnsRecord, Observer};
use crate::config;
use futures_util::future::BoxFuture;
use hickory_resolver::{
    TokioResolver,
    net::{DnsError, NetError},
    proto::rr::RData,
};
use parking_lot::Mutex;
use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
    time::{Duration, Instant},
};

/// Shortest time between two look-ups, whatever the TTL (behaviour.md G.1).
pub(crate) const MIN_REFRESH: Duration = Duration::from_secs(5);
/// Longest time between two look-ups: a TTL of days must not outlive a control plane that moved.
pub(crate) const MAX_REFRESH: Duration = Duration::from_secs(3600);
/// Addresses of one service that are used; more replicas than this are not connected to.
const MAX_ADDRESSES: usize = 64;

/// An answer and how long it holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Answer<T> {
    pub(crate) value: T,
    pub(crate) ttl: Duration,
}

/// A failed look-up; the server may have said for how long it stays so.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Failed {
    pub(crate) reason: String,
    pub(crate) ttl: Option<Duration>,
}

/// Looks records up.
pub(crate) trait Lookup: Send + Sync + 'static {
    /// Targets and ports of SRV records.
    fn srv(&self, name: &str) -> BoxFuture<'_, Result<Answer<Vec<(String, u16)>>, Failed>>;
    /// Addresses of A and AAAA records.
    fn ip(&self, name: &str) -> BoxFuture<'_, Result<Answer<Vec<IpAddr>>, Failed>>;
}

/// Where a service is: found without DNS, or to be looked up.
pub(crate) fn literal(addr: &config::ControlAddr) -> Option<SocketAddr> {
    let host = addr.host.trim_end_matches('.');
    if host.eq_ignore_ascii_case("localhost") {
        return Some(SocketAddr::new(Ipv4Addr::LOCALHOST.into(), addr.port));
    }
    let ip = host.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>().ok()?;
    Some(SocketAddr::new(ip, addr.port))
}

/// Looks a service's replicas up.
pub(crate) async fn resolve(
    dns: &dyn Lookup,
    addr: &config::ControlAddr,
    service: ControlService,
    observer: &dyn Observer,
) -> Result<Answer<BTreeSet<SocketAddr>>, Failed> {
    match dns.srv(&addr.host).await {
        Ok(answer) => {
            observer.dns(service, DnsRecord::Srv, true);
            let found = answer.value.iter().map(|(target, port)| Some(SocketAddr::new(dashed_ip(target)?, *port)));
            if let Some(found) = found.collect::<Option<BTreeSet<_>>>()
                && !found.is_empty()
            {
                return Ok(Answer { value: found.into_iter().take(MAX_ADDRESSES).collect(), ttl: answer.ttl });
            }
            tracing::debug!(host = addr.host, "SRV targets are no dashed addresses; asking for addresses");
        }
        Err(_) => observer.dns(service, DnsRecord::Srv, false),
    }
    let answer = dns.ip(&addr.host).await;
    observer.dns(service, DnsRecord::Addresses, answer.is_ok());
    let answer = answer?;
    let value: BTreeSet<_> =
        answer.value.into_iter().map(|ip| SocketAddr::new(ip, addr.port)).take(MAX_ADDRESSES).collect();
    if value.is_empty() {
        return Err(Failed { reason: format!("{} has no addresses", addr.host), ttl: Some(answer.ttl) });
    }
    Ok(Answer { value, ttl: answer.ttl })
}

/// `10-1-2-3.web.ns.svc.cluster.local` is 10.1.2.3; `fd00--1.…` is fd00::1.
fn dashed_ip(target: &str) -> Option<IpAddr> {
    let label = target.split('.').next()?;
    let v4 = label.replace('-', ".").parse::<Ipv4Addr>().map(IpAddr::V4);
    v4.or_else(|_| label.replace('-', ":").parse::<Ipv6Addr>().map(IpAddr::V6)).ok()
}

/// DNS as `/etc/resolv.conf` says; read when it is first needed, and again if that fails.
pub(crate) struct System {
    limits: config::Dns,
    resolver: Mutex<Option<Arc<TokioResolver>>>,
}

impl System {
    pub(crate) fn new(limits: config::Dns) -> Self {
        Self { limits, resolver: Mutex::new(None) }
    }

    fn resolver(&self) -> Result<Arc<TokioResolver>, Failed> {
        let mut resolver = self.resolver.lock();
        if let Some(resolver) = &*resolver {
            return Ok(resolver.clone());
        }
        let bad = |error: NetError| Failed { reason: format!("/etc/resolv.conf can't be used: {error}"), ttl: None };
        let mut builder = TokioResolver::builder_tokio().map_err(bad)?;
        let options = builder.options_mut();
        options.cache_size = 0;
        options.positive_min_ttl = self.limits.min_ttl;
        options.positive_max_ttl = self.limits.max_ttl;
        let built = Arc::new(builder.build().map_err(bad)?);
        *resolver = Some(built.clone());
        Ok(built)
    }

    fn failed(&self, error: &NetError) -> Failed {
        let ttl = match error {
            NetError::Dns(DnsError::NoRecordsFound(none)) => none.negative_ttl,
            _ => None,
        };
        let ttl = ttl.map(|seconds| Duration::from_secs(u64::from(seconds)));
        Failed { reason: error.to_string(), ttl: ttl.map(|ttl| self.clamp(ttl)) }
    }

    /// How much longer an answer holds.
    fn left(&self, until: Instant) -> Duration {
        self.clamp(until.saturating_duration_since(Instant::now()))
    }

    fn clamp(&self, ttl: Duration) -> Duration {
        let ttl = ttl.max(self.limits.min_ttl.unwrap_or_default());
        ttl.min(self.limits.max_ttl.unwrap_or(MAX_REFRESH)).clamp(MIN_REFRESH, MAX_REFRESH)
    }
}

impl Lookup for System {
    fn srv(&self, name: &str) -> BoxFuture<'_, Result<Answer<Vec<(String, u16)>>, Failed>> {
        let name = name.to_string();
        Box::pin(async move {
            let answer = self.resolver()?.srv_lookup(name).await.map_err(|error| self.failed(&error))?;
            let targets = answer.answers().iter().filter_map(|record| match &record.data {
                RData::SRV(srv) => Some((srv.target.to_utf8(), srv.port)),
                _ => None,
            });
            Ok(Answer { value: targets.collect(), ttl: self.left(answer.valid_until()) })
        })
    }

    fn ip(&self, name: &str) -> BoxFuture<'_, Result<Answer<Vec<IpAddr>>, Failed>> {
        let name = name.to_string();
        Box::pin(async move {
            let answer = self.resolver()?.lookup_ip(name).await.map_err(|error| self.failed(&error))?;
            Ok(Answer { value: answer.iter().collect(), ttl: self.left(answer.valid_until()) })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A zone with at most one answer of each kind.
    #[derive(Default)]
    struct Zone {
        srv: Vec<(&'static str, u16)>,
        ip: Vec<&'static str>,
    }

    impl Lookup for Zone {
        fn srv(&self, _: &str) -> BoxFuture<'_, Result<Answer<Vec<(String, u16)>>, Failed>> {
            let none = Failed { reason: "no records".into(), ttl: None };
            let value: Vec<_> = self.srv.iter().map(|(target, port)| (target.to_string(), *port)).collect();
            let answer = if value.is_empty() { Err(none) } else { Ok(Answer { value, ttl: MIN_REFRESH }) };
            Box::pin(std::future::ready(answer))
        }

        fn ip(&self, _: &str) -> BoxFuture<'_, Result<Answer<Vec<IpAddr>>, Failed>> {
            let value = self.ip.iter().map(|ip| ip.parse().unwrap()).collect();
            Box::pin(std::future::ready(Ok(Answer { value, ttl: MIN_REFRESH })))
        }
    }

    fn addr(host: &str) -> config::ControlAddr {
        config::ControlAddr { host: host.into(), port: 8086, identity: None }
    }

    async fn check(zone: Zone, expected: &[&str]) {
        let found = resolve(&zone, &addr("x."), ControlService::Policy, &()).await;
        let found = found.map(|a| a.value).unwrap_or_default();
        assert_eq!(found, expected.iter().map(|a| a.parse().unwrap()).collect());
    }

    #[tokio::test]
    async fn srv_records_win_if_all_targets_are_dashed_addresses() {
        let ip = vec!["10.9.9.9"];
        let srv = vec![("10-1-2-3.dst.linkerd.svc.", 1), ("fd00--1.dst.linkerd.svc.", 2)];
        check(Zone { srv, ip: ip.clone() }, &["10.1.2.3:1", "[fd00::1]:2"]).await;
        let srv = vec![("10-1-2-3.dst.", 1), ("pod-0.dst.", 2)];
        check(Zone { srv, ip: ip.clone() }, &["10.9.9.9:8086"]).await;
        check(Zone { srv: vec![], ip }, &["10.9.9.9:8086"]).await;
        check(Zone::default(), &[]).await;
    }

    #[test]
    fn dashed_addresses() {
        assert_eq!(dashed_ip("10-1-2-3.x"), Some("10.1.2.3".parse().unwrap()));
        assert_eq!(dashed_ip("fd00--a.x"), Some("fd00::a".parse().unwrap()));
        assert_eq!(dashed_ip("10-1-2.x"), None);
        assert_eq!(dashed_ip("web-0.x"), None);
        assert_eq!(dashed_ip(""), None);
    }

    #[test]
    fn literals_need_no_dns() {
        assert_eq!(literal(&addr("localhost.")), Some("127.0.0.1:8086".parse().unwrap()));
        assert_eq!(literal(&addr("::1")), Some("[::1]:8086".parse().unwrap()));
        assert_eq!(literal(&addr("[::1]")), Some("[::1]:8086".parse().unwrap()));
        assert_eq!(literal(&addr("linkerd-dst.linkerd.svc.")), None);
    }

    #[test]
    fn ttls_are_clamped() {
        let clamp = |min, max, ttl| {
            let seconds = |n: Option<u64>| n.map(Duration::from_secs);
            let dns = System::new(config::Dns { min_ttl: seconds(min), max_ttl: seconds(max) });
            dns.clamp(Duration::from_secs(ttl)).as_secs()
        };
        assert_eq!(clamp(None, None, 0), 5);
        assert_eq!(clamp(None, None, 1_000_000), 3600);
        assert_eq!(clamp(Some(30), Some(60), 5), 30);
        assert_eq!(clamp(Some(30), Some(60), 90), 60);
        assert_eq!(clamp(None, Some(1), 90), 5);
    }
}
