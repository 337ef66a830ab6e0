//! Cluster addresses for Services that come without one. The address is a function of the set of Services alone: every
//! proxy that reads the same manifests assigns the same ones, before and after a restart, with no state to keep.

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use std::{
    collections::{BTreeMap, HashSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::Arc,
};

/// Where addresses are taken from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ServiceRange {
    /// For IPv4.
    pub v4: Ipv4Net,
    /// For IPv6.
    pub v6: Ipv6Net,
}

impl Default for ServiceRange {
    /// `10.96.0.0/12` and `fd00:10:96::/108`, the ranges that kubeadm and kind use.
    fn default() -> Self {
        Self {
            v4: Ipv4Net::new_assert(Ipv4Addr::new(10, 96, 0, 0), 12),
            v6: Ipv6Net::new_assert(Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, 0), 108),
        }
    }
}

/// A Service as far as its addresses go, in order of assignment: older first, then namespace and name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Claim {
    pub(super) created: (bool, Option<Arc<str>>),
    pub(super) namespace: Arc<str>,
    pub(super) name: Arc<str>,
    pub(super) explicit: Vec<IpAddr>,
    pub(super) v4: bool,
    pub(super) v6: bool,
}

/// Most addresses tried for one Service; with a range half full, 64 tries all fail once in 10^19 times.
const PROBES: u64 = 64;

/// Assigns addresses. Explicit ones are reserved first; then each claim takes the address that its name hashes to, or the
/// next free one of a sequence made of the name. A claim for which no probe is free gets none.
pub(super) fn assign(claims: &[Claim], range: &ServiceRange) -> BTreeMap<(Arc<str>, Arc<str>), Vec<IpAddr>> {
    let mut taken: HashSet<IpAddr> = claims.iter().flat_map(|c| c.explicit.iter().copied()).collect();
    let mut sorted: Vec<_> = claims.iter().filter(|c| c.explicit.is_empty()).collect();
    sorted.sort();
    let mut out = BTreeMap::new();
    for claim in sorted {
        let mut ips = Vec::new();
        let families = [(claim.v4, IpNet::V4(range.v4)), (claim.v6, IpNet::V6(range.v6))];
        for (_, net) in families.into_iter().filter(|f| f.0) {
            let free = (0..PROBES)
                .map(|n| address(&net, hash(&claim.namespace, &claim.name, n)))
                .find(|ip| !taken.contains(ip));
            if let Some(ip) = free {
                taken.insert(ip);
                ips.push(ip);
            }
        }
        out.insert((claim.namespace.clone(), claim.name.clone()), ips);
    }
    out
}

/// FNV-1a over `namespace/name` and the number of the probe, then the finalizer of MurmurHash3: stable over versions and
/// machines, which the standard library's hasher does not promise.
fn hash(namespace: &str, name: &str, probe: u64) -> u64 {
    let bytes = namespace.bytes().chain([b'/']).chain(name.bytes()).chain(probe.to_le_bytes());
    let mut h = bytes.fold(0xcbf2_9ce4_8422_2325_u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3));
    h = (h ^ (h >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    h = (h ^ (h >> 33)).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    h ^ (h >> 33)
}

/// The address of that number in the network, leaving out the first and the last.
fn address(net: &IpNet, number: u64) -> IpAddr {
    match net {
        IpNet::V4(net) => {
            let size = 1_u64 << (32 - net.prefix_len());
            let offset = if size > 2 { 1 + number % (size - 2) } else { number % size };
            IpAddr::V4(Ipv4Addr::from(u32::from(net.network()).wrapping_add(offset as u32)))
        }
        IpNet::V6(net) => {
            // 64 bits of number fill any larger host part well enough.
            let bits = (128 - net.prefix_len()).min(63);
            let size = 1_u64 << bits;
            let offset = if size > 2 { 1 + number % (size - 2) } else { number % size };
            IpAddr::V6(Ipv6Addr::from(u128::from(net.network()).wrapping_add(u128::from(offset))))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn claim(name: &str, explicit: &[&str], v6: bool) -> Claim {
        Claim {
            created: (true, None),
            namespace: "shop".into(),
            name: name.into(),
            explicit: explicit.iter().map(|ip| ip.parse().unwrap()).collect(),
            v4: true,
            v6,
        }
    }

    #[test]
    fn addresses_do_not_depend_on_the_order_or_on_others() {
        let range = ServiceRange::default();
        let web = |claims: &[Claim]| assign(claims, &range)[&("shop".into(), "web".into())].clone();
        let alone = web(&[claim("web", &[], true)]);
        assert_eq!(alone.len(), 2);
        assert!(range.v4.contains(&match alone[0] {
            IpAddr::V4(ip) => ip,
            IpAddr::V6(_) => panic!(),
        }));
        let mut many: Vec<_> = (0..100).map(|i| claim(&format!("s{i}"), &[], false)).collect();
        many.push(claim("web", &[], true));
        assert_eq!(web(&many), alone);
        many.reverse();
        assert_eq!(web(&many), alone);
        // This pins the function itself: a change would move every Service of every user.
        assert_eq!(alone[0], assign(&[claim("web", &[], false)], &range)[&("shop".into(), "web".into())][0]);
    }

    #[test]
    fn explicit_addresses_are_reserved_and_ranges_can_run_out() {
        let range = ServiceRange { v4: "10.0.0.0/30".parse().unwrap(), ..ServiceRange::default() };
        let all = assign(&[claim("a", &["10.0.0.1"], false), claim("b", &[], false), claim("c", &[], false)], &range);
        assert_eq!(all[&("shop".into(), "b".into())], ["10.0.0.2".parse::<IpAddr>().unwrap()]);
        assert!(all[&("shop".into(), "c".into())].is_empty());
        assert!(!all.contains_key(&("shop".into(), "a".into())));
    }

    #[test]
    fn older_services_keep_their_address_on_a_collision() {
        let range = ServiceRange { v4: "10.0.0.0/29".parse().unwrap(), ..ServiceRange::default() };
        let mut claims: Vec<_> = (0..4).map(|i| claim(&format!("s{i}"), &[], false)).collect();
        for (i, c) in claims.iter_mut().enumerate() {
            c.created = (false, Some(format!("2026-01-0{}T00:00:00Z", i + 1).into()));
        }
        let before = assign(&claims[..3], &range);
        let after = assign(&claims, &range);
        assert!(before.iter().all(|(k, v)| after[k] == *v));
        let distinct: HashSet<_> = after.values().flatten().collect();
        assert_eq!(distinct.len(), 4);
    }
}
