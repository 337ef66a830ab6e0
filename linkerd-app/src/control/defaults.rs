//! Policies of ports that the control plane has not told about (behaviour.md C.3).

use crate::{
    config::{DefaultPolicy, Inbound},
    policy::{
        Authentication, Authorization, Meta, Network, ServerPolicy,
        route::Precedence,
        server::{Protocol, Route},
    },
};
use std::sync::Arc;

/// The default policy of a port: that of the configuration, opaque if the port is among the opaque ones.
pub fn server_policy(config: &Inbound, port: u16) -> ServerPolicy {
    let meta = Meta::default(config.default_policy.as_str());
    let cluster = || config.cluster_networks.iter().copied().map(Network::new).collect();
    let (networks, authentication) = match config.default_policy {
        DefaultPolicy::Deny => {
            return ServerPolicy {
                protocol: Protocol::Opaque(Arc::new([])),
                precedence: Precedence::Linkerd,
                meta,
                rate_limit: None,
            };
        }
        DefaultPolicy::AllAuthenticated => (Network::all(), Authentication::any_identity()),
        DefaultPolicy::AllUnauthenticated | DefaultPolicy::Audit => (Network::all(), Authentication::Unauthenticated),
        DefaultPolicy::ClusterAuthenticated => (cluster(), Authentication::any_identity()),
        DefaultPolicy::ClusterUnauthenticated => (cluster(), Authentication::Unauthenticated),
    };
    let audit = config.default_policy == DefaultPolicy::Audit;
    let authorization = Authorization { networks, authentication, meta: meta.clone(), audit };
    let tcp: Arc<[Authorization]> = Arc::new([authorization.clone()]);
    let protocol = if config.opaque_ports.contains(&port) {
        Protocol::Opaque(tcp)
    } else {
        Protocol::Detect { timeout: config.detect_timeout, http: Arc::new([Route::implicit(vec![authorization])]), tcp }
    };
    ServerPolicy { protocol, precedence: Precedence::Linkerd, meta, rate_limit: None }
}

#[cfg(test)]
mod tests {
    use super::{super::tests::inbound_config, *};
    use crate::policy::authz::{ClientTls, NoTls};

    #[track_caller]
    fn check(policy: DefaultPolicy, plain_cluster: bool, plain_world: bool, meshed_world: bool) {
        let config = Inbound { default_policy: policy, ..inbound_config() };
        let found = server_policy(&config, 80);
        let Protocol::Detect { tcp, .. } = &found.protocol else { panic!("{found:?}") };
        let may = |ip: &str, tls: &ClientTls| tcp.iter().any(|a| a.permits(ip.parse().unwrap(), tls));
        let plain = ClientTls::None(NoTls::NoTlsFromRemote);
        let meshed = ClientTls::Terminated(Some("a.b".parse().unwrap()));
        assert_eq!(
            (may("10.0.0.1", &plain), may("1.1.1.1", &plain), may("1.1.1.1", &meshed)),
            (plain_cluster, plain_world, meshed_world),
            "{policy:?}"
        );
        assert_eq!(found.meta, Meta::default(policy.as_str()));
        assert_eq!(tcp[0].audit, policy == DefaultPolicy::Audit);
    }

    #[test]
    fn who_may() {
        check(DefaultPolicy::AllUnauthenticated, true, true, true);
        check(DefaultPolicy::AllAuthenticated, false, false, true);
        check(DefaultPolicy::ClusterUnauthenticated, true, false, false);
        check(DefaultPolicy::ClusterAuthenticated, false, false, false);
        check(DefaultPolicy::Audit, true, true, true);
    }

    #[test]
    fn deny_and_opaque_ports() {
        let config = Inbound { default_policy: DefaultPolicy::Deny, ..inbound_config() };
        assert!(matches!(server_policy(&config, 80).protocol, Protocol::Opaque(tcp) if tcp.is_empty()));
        assert!(matches!(server_policy(&inbound_config(), 3306).protocol, Protocol::Opaque(tcp) if tcp.len() == 1));
    }
}
