//! Server policies (behaviour.md C.2, C.4, C.9).

use super::{Inside, Invalid, duration, list, meta, non_empty, optional, required, route};
use crate::policy::{
    Authentication, Authorization, Meta, Network, ServerPolicy,
    authz::Suffix,
    route::{Filter, Precedence},
    server::{Protocol, RateLimit, RateLimitOverride, Route, Rule},
};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use linkerd_tls::Id;
use linkerd2_proxy_api::{inbound as api, net};
use std::{
    collections::BTreeSet,
    net::{Ipv4Addr, Ipv6Addr},
    sync::Arc,
};

/// A server policy, with the authorization of loopback clients appended.
pub(crate) fn server(message: api::Server) -> Result<ServerPolicy, Invalid> {
    let api::Server { protocol, server_ips: _, authorizations, labels } = message;
    let meta = meta::labels(&labels, "policy.linkerd.io", "server").inside("labels")?;
    let mut authorizations = list("authorizations", authorizations, authorization)?;
    authorizations.push(localhost());
    let (protocol, rate_limit) = required("protocol", protocol, |protocol| {
        required("kind", protocol.kind, |kind| self::protocol(kind, &authorizations))
    })?;
    Ok(ServerPolicy { protocol, precedence: Precedence::Linkerd, meta, rate_limit: rate_limit.map(Arc::new) })
}

/// What stands in for a policy that could not be understood.
pub(crate) fn invalid(why: &Invalid, labels: &std::collections::HashMap<String, String>) -> ServerPolicy {
    ServerPolicy {
        protocol: Protocol::Invalid(format!("invalid server configuration: {why}").into()),
        precedence: Precedence::Linkerd,
        meta: meta::labels(labels, "policy.linkerd.io", "server").unwrap_or_else(|_| Meta::default("invalid")),
        rate_limit: None,
    }
}

/// Clients in the same pod need no authorization: the policy controller leaves it to the proxy to say so.
fn localhost() -> Authorization {
    Authorization {
        networks: vec![
            Network::new(IpNet::V4(Ipv4Net::from(Ipv4Addr::LOCALHOST))),
            Network::new(IpNet::V6(Ipv6Net::from(Ipv6Addr::LOCALHOST))),
        ],
        authentication: Authentication::Unauthenticated,
        meta: Meta::default("localhost"),
        audit: false,
    }
}

fn protocol(
    kind: api::proxy_protocol::Kind,
    authorizations: &[Authorization],
) -> Result<(Protocol, Option<RateLimit>), Invalid> {
    use api::proxy_protocol::{Detect, Grpc, Http1, Http2, Kind};
    match kind {
        Kind::Detect(Detect { timeout, http_routes, http_local_rate_limit }) => {
            let timeout = required("timeout", timeout, duration).inside("detect")?;
            let http = http_routes_of("http_routes", http_routes, authorizations).inside("detect")?;
            let limit = optional("http_local_rate_limit", http_local_rate_limit, rate_limit).inside("detect")?;
            Ok((Protocol::Detect { timeout, http, tcp: authorizations.into() }, limit))
        }
        Kind::Http1(Http1 { routes, local_rate_limit }) => {
            let routes = http_routes_of("routes", routes, authorizations).inside("http1")?;
            let limit = optional("local_rate_limit", local_rate_limit, rate_limit).inside("http1")?;
            Ok((Protocol::Http1(routes), limit))
        }
        Kind::Http2(Http2 { routes, local_rate_limit }) => {
            let routes = http_routes_of("routes", routes, authorizations).inside("http2")?;
            let limit = optional("local_rate_limit", local_rate_limit, rate_limit).inside("http2")?;
            Ok((Protocol::Http2(routes), limit))
        }
        Kind::Grpc(Grpc { routes }) => {
            let routes = list("routes", routes, |route| grpc_route(route, authorizations)).inside("grpc")?;
            Ok((Protocol::Grpc(or_implicit(routes, authorizations)), None))
        }
        Kind::Opaque(_) => Ok((Protocol::Opaque(authorizations.into()), None)),
        Kind::Tls(_) => Ok((Protocol::Tls(authorizations.into()), None)),
    }
}

fn http_routes_of(
    field: &str,
    routes: Vec<api::HttpRoute>,
    authorizations: &[Authorization],
) -> Result<Arc<[Route]>, Invalid> {
    Ok(or_implicit(list(field, routes, |route| http_route(route, authorizations))?, authorizations))
}

/// No routes: one that takes every request.
fn or_implicit(mut routes: Vec<Route>, authorizations: &[Authorization]) -> Arc<[Route]> {
    if routes.is_empty() {
        routes.push(Route::implicit(authorizations.to_vec()));
    }
    routes.into()
}

fn http_route(message: api::HttpRoute, server: &[Authorization]) -> Result<Route, Invalid> {
    use api::http_route::filter::Kind;
    let api::HttpRoute { metadata, hosts, authorizations, rules } = message;
    Ok(Route {
        meta: required("metadata", metadata, meta::lenient)?,
        hosts: list("hosts", hosts, route::host)?,
        authorizations: with_server(authorizations, server)?,
        rules: list("rules", rules, |rule| {
            Ok(Rule {
                matches: list("matches", rule.matches, route::http_match)?,
                filters: list("filters", rule.filters, |filter| match filter.kind {
                    Some(Kind::FailureInjector(failure)) => route::http_failure(failure).inside("failure_injector"),
                    Some(Kind::RequestHeaderModifier(modifier)) => {
                        route::request_headers(modifier).inside("request_header_modifier")
                    }
                    Some(Kind::Redirect(redirect)) => route::redirect(redirect).inside("redirect"),
                    None => Ok(unknown_filter()),
                })?,
            })
        })?,
    })
}

fn grpc_route(message: api::GrpcRoute, server: &[Authorization]) -> Result<Route, Invalid> {
    use api::grpc_route::filter::Kind;
    let api::GrpcRoute { metadata, hosts, authorizations, rules } = message;
    Ok(Route {
        meta: required("metadata", metadata, meta::lenient)?,
        hosts: list("hosts", hosts, route::host)?,
        authorizations: with_server(authorizations, server)?,
        rules: list("rules", rules, |rule| {
            Ok(Rule {
                matches: list("matches", rule.matches, route::grpc_match)?,
                filters: list("filters", rule.filters, |filter| match filter.kind {
                    Some(Kind::FailureInjector(failure)) => route::grpc_failure(failure).inside("failure_injector"),
                    Some(Kind::RequestHeaderModifier(modifier)) => {
                        route::request_headers(modifier).inside("request_header_modifier")
                    }
                    None => Ok(unknown_filter()),
                })?,
            })
        })?,
    })
}

fn unknown_filter() -> Filter {
    route::unknown_filter("server")
}

/// The route's own authorizations, then the server's.
fn with_server(own: Vec<api::Authz>, server: &[Authorization]) -> Result<Vec<Authorization>, Invalid> {
    let mut all = list("authorizations", own, authorization)?;
    all.extend_from_slice(server);
    Ok(all)
}

fn authorization(message: api::Authz) -> Result<Authorization, Invalid> {
    let api::Authz { networks, authentication, labels, metadata } = message;
    let meta = match metadata {
        Some(metadata) => meta::lenient(metadata).inside("metadata")?,
        None => meta::labels(&labels, "policy.linkerd.io", "serverauthorization").inside("labels")?,
    };
    Ok(Authorization {
        networks: non_empty("networks", networks, network)?,
        authentication: required("authentication", authentication, |authentication| {
            required("permit", authentication.permit, self::authentication)
        })?,
        audit: meta == Meta::default("audit"),
        meta,
    })
}

fn authentication(permit: api::authn::Permit) -> Result<Authentication, Invalid> {
    use api::authn::{
        Permit,
        permit_mesh_tls::{Clients, PermitClientIdentities},
    };
    match permit {
        Permit::Unauthenticated(_) => Ok(Authentication::Unauthenticated),
        Permit::MeshTls(tls) => required("clients", tls.clients, |clients| match clients {
            Clients::Unauthenticated(_) => Ok(Authentication::TlsUnauthenticated),
            Clients::Identities(PermitClientIdentities { identities, suffixes }) => {
                let suffixes = suffixes
                    .iter()
                    .map(|suffix| Suffix::new(suffix.parts.iter().map(String::as_str).filter(|part| !part.is_empty())));
                Ok(Authentication::TlsAuthenticated {
                    identities: self::identities(identities).inside("identities")?,
                    suffixes: suffixes.collect(),
                })
            }
        })
        .inside("mesh_tls"),
    }
}

fn identities(identities: Vec<api::Identity>) -> Result<BTreeSet<Id>, Invalid> {
    let parsed = list("identities", identities, |identity| {
        identity.name.parse::<Id>().map_err(|error| Invalid::new(error.to_string()).inside("name"))
    })?;
    Ok(parsed.into_iter().collect())
}

fn network(message: api::Network) -> Result<Network, Invalid> {
    Ok(Network { net: required("net", message.net, ip_net)?, except: list("except", message.except, ip_net)? })
}

fn ip_net(message: net::IpNetwork) -> Result<IpNet, Invalid> {
    IpNet::try_from(message).map_err(|error| Invalid::new(error.to_string()))
}

fn rate_limit(message: api::HttpLocalRateLimit) -> Result<RateLimit, Invalid> {
    let api::HttpLocalRateLimit { metadata, total, identity, overrides } = message;
    // 0 switches a limiter off (behaviour.md C.9).
    let on = |limit: api::http_local_rate_limit::Limit| {
        (limit.requests_per_second != 0).then_some(limit.requests_per_second)
    };
    Ok(RateLimit {
        meta: optional("metadata", metadata, meta::lenient)?,
        total: total.and_then(on),
        identity: identity.and_then(on),
        overrides: list("overrides", overrides, |message| {
            let limit = required("limit", message.limit, Ok)?;
            let identities = required("clients", message.clients, |clients| identities(clients.identities))?;
            Ok(RateLimitOverride { requests_per_second: limit.requests_per_second, identities })
        })?,
    })
}

#[cfg(test)]
mod tests {
    use super::{super::meta::tests as metadata, *};
    use crate::policy::authz::{ClientTls, NoTls};
    use api::proxy_protocol::Kind;
    use std::collections::HashMap;

    fn labels(pairs: &[(&str, &str)]) -> HashMap<String, String> {
        pairs.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect()
    }

    fn net(a: [u8; 4], prefix_len: u32) -> net::IpNetwork {
        net::IpNetwork { ip: Some(a.into()), prefix_len }
    }

    fn authz(permit: Option<api::authn::Permit>) -> api::Authz {
        api::Authz {
            networks: vec![api::Network { net: Some(net([10, 0, 0, 0], 8)), except: vec![net([10, 1, 0, 0], 16)] }],
            authentication: Some(api::Authn { permit }),
            labels: HashMap::new(),
            metadata: Some(metadata::default("all-unauthenticated")),
        }
    }

    fn anyone() -> api::Authz {
        authz(Some(api::authn::Permit::Unauthenticated(api::authn::PermitUnauthenticated {})))
    }

    fn msg(kind: Kind) -> api::Server {
        api::Server {
            protocol: Some(api::ProxyProtocol { kind: Some(kind) }),
            server_ips: vec![],
            authorizations: vec![anyone()],
            labels: labels(&[("group", ""), ("kind", "default"), ("name", "all-unauthenticated")]),
        }
    }

    fn detect() -> api::proxy_protocol::Detect {
        let timeout = Some(prost_types::Duration { seconds: 10, nanos: 0 });
        api::proxy_protocol::Detect { timeout, http_routes: vec![], http_local_rate_limit: None }
    }

    #[test]
    fn localhost_is_appended_and_missing_routes_are_implied() {
        let policy = server(msg(Kind::Detect(detect()))).unwrap();
        assert_eq!(policy.meta, Meta::default("all-unauthenticated"));
        let Protocol::Detect { http, tcp, .. } = &policy.protocol else { panic!() };
        assert_eq!(tcp.len(), 2);
        assert!(tcp[1].permits("::1".parse().unwrap(), &ClientTls::None(NoTls::Loopback)));
        assert!(!tcp[1].permits("10.0.0.1".parse().unwrap(), &ClientTls::None(NoTls::Loopback)));
        assert!(tcp[0].permits("10.0.0.1".parse().unwrap(), &ClientTls::None(NoTls::NoTlsFromRemote)));
        assert!(!tcp[0].permits("10.1.0.1".parse().unwrap(), &ClientTls::None(NoTls::NoTlsFromRemote)));
        assert_eq!(http.len(), 1);
        assert_eq!(http[0].authorizations.len(), 2);
    }

    #[test]
    fn a_route_has_its_own_authorizations_first() {
        let mut own = anyone();
        own.metadata = Some(metadata::resource("policy.linkerd.io", "authorizationpolicy", "ns", "mine"));
        let filters = vec![api::http_route::Filter { kind: None }];
        let route = api::HttpRoute {
            metadata: Some(metadata::default("r")),
            hosts: vec![],
            authorizations: vec![own],
            rules: vec![api::http_route::Rule { matches: vec![], filters }],
        };
        let routes = api::proxy_protocol::Http1 { routes: vec![route], local_rate_limit: None };
        let Protocol::Http1(routes) = server(msg(Kind::Http1(routes))).unwrap().protocol else { panic!() };
        let names: Vec<_> = routes[0].authorizations.iter().map(|a| a.meta.name().to_string()).collect();
        assert_eq!(names, ["mine", "all-unauthenticated", "localhost"]);
        assert!(matches!(&routes[0].rules[0].filters[..], [Filter::Unknown { .. }]));
    }

    #[track_caller]
    fn check_invalid(message: api::Server, expected: &str) {
        assert_eq!(server(message).unwrap_err().to_string(), expected);
    }

    #[test]
    fn what_is_missing_is_named() {
        check_invalid(
            api::Server { protocol: None, ..msg(Kind::Opaque(api::proxy_protocol::Opaque {})) },
            "protocol: missing",
        );
        let timeless = api::proxy_protocol::Detect { timeout: None, ..detect() };
        check_invalid(msg(Kind::Detect(timeless)), "protocol.kind.detect.timeout: missing");
        let nameless = api::Server { labels: labels(&[("kind", "server")]), ..msg(Kind::Detect(detect())) };
        check_invalid(nameless, "labels.name: missing");
        let no_networks = api::Authz { networks: vec![], ..anyone() };
        let message = api::Server { authorizations: vec![no_networks], ..msg(Kind::Detect(detect())) };
        check_invalid(message, "authorizations[0].networks: empty");
        let message = api::Server { authorizations: vec![authz(None)], ..msg(Kind::Detect(detect())) };
        check_invalid(message, "authorizations[0].authentication.permit: missing");
        let mut wide = anyone();
        wide.networks[0].net = Some(net([10, 0, 0, 0], 33));
        let message = api::Server { authorizations: vec![wide], ..msg(Kind::Detect(detect())) };
        assert!(server(message).is_err());
    }

    #[test]
    fn audit_is_recognized_by_its_metadata() {
        let audit = api::Authz { metadata: Some(metadata::default("audit")), ..anyone() };
        assert!(authorization(audit).unwrap().audit);
        assert!(!authorization(anyone()).unwrap().audit);
        let old = api::Authz { metadata: None, labels: labels(&[("name", "old")]), ..anyone() };
        assert_eq!(authorization(old).unwrap().meta.kind(), "serverauthorization");
    }

    #[test]
    fn identities_and_suffixes() {
        use api::authn::{Permit, PermitMeshTls, permit_mesh_tls as tls};
        let permit = |identity: &str, parts: &[&str]| {
            let clients = tls::Clients::Identities(tls::PermitClientIdentities {
                identities: vec![api::Identity { name: identity.into() }],
                suffixes: vec![api::IdentitySuffix { parts: parts.iter().map(|p| p.to_string()).collect() }],
            });
            authentication(Permit::MeshTls(PermitMeshTls { clients: Some(clients) }))
        };
        let client = |id: &str| ClientTls::Terminated(Some(id.parse().unwrap()));
        let found = permit("web.shop", &["b", "c"]).unwrap();
        assert!(found.permits(&client("web.shop")) && found.permits(&client("a.b.c")));
        assert!(!found.permits(&client("x.y")));
        assert!(permit("web.shop", &[]).unwrap().permits(&client("spiffe://root/x")));
        assert!(permit("not a name", &[]).is_err());
    }

    #[test]
    fn rate_limits() {
        use api::http_local_rate_limit::{Limit, Override, r#override::ClientIdentities};
        let limit = |n| Some(Limit { requests_per_second: n });
        let clients = Some(ClientIdentities { identities: vec![api::Identity { name: "a.b".into() }] });
        let message = |clients| api::HttpLocalRateLimit {
            metadata: None,
            total: limit(100),
            identity: limit(0),
            overrides: vec![Override { limit: limit(5), clients }],
        };
        let found = rate_limit(message(clients)).unwrap();
        assert_eq!((found.total, found.identity, found.overrides[0].requests_per_second), (Some(100), None, 5));
        assert_eq!(rate_limit(message(None)).unwrap_err().to_string(), "overrides[0].clients: missing");
    }
}
