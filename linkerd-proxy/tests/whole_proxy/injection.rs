//! Failures that a control plane has injected, on either side: their share, their shape, and what is left alone.

use crate::{
    apps,
    control_plane::{ControlPlane, http1, identity_of},
    net::Pod,
    world::World,
};
use bytes::Bytes;
use http::StatusCode;
use http_body_util::Full;
use linkerd2_proxy_api::{
    grpc_route::{GrpcFailureInjector, GrpcRouteMatch, GrpcRpcMatch},
    http_route::{HttpFailureInjector, HttpRouteMatch, PathMatch, Ratio, path_match},
    inbound::{self, Authn, Authz, Network, Server, authn, proxy_protocol},
    meta,
    net::IpNetwork,
    outbound,
};
use std::{collections::BTreeMap, net::SocketAddr};

/// Requests of which one in two fails: 5 standard deviations on either side of 100.
const HALF: usize = 200;
const SOME: std::ops::Range<usize> = 65..136;

const WEB: ([u8; 4], u16) = ([10, 96, 0, 10], 80);

fn name(name: &str) -> Option<meta::Metadata> {
    Some(meta::Metadata { kind: Some(meta::metadata::Kind::Default(name.into())) })
}

fn path(prefix: &str) -> HttpRouteMatch {
    let path = PathMatch { kind: Some(path_match::Kind::Prefix(prefix.into())) };
    HttpRouteMatch { path: Some(path), ..Default::default() }
}

fn fail(status: u32, ratio: Option<(u32, u32)>) -> HttpFailureInjector {
    let ratio = ratio.map(|(numerator, denominator)| Ratio { numerator, denominator });
    HttpFailureInjector { status, message: "not today".into(), ratio }
}

/// Everybody may.
fn anybody() -> Authz {
    let net = IpNetwork { ip: Some(std::net::IpAddr::from([0, 0, 0, 0]).into()), prefix_len: 0 };
    let permit = authn::Permit::Unauthenticated(authn::PermitUnauthenticated {});
    Authz {
        networks: vec![Network { net: Some(net), except: vec![] }],
        authentication: Some(Authn { permit: Some(permit) }),
        metadata: name("anybody"),
        ..Default::default()
    }
}

fn server(kind: proxy_protocol::Kind) -> Server {
    Server {
        protocol: Some(inbound::ProxyProtocol { kind: Some(kind) }),
        authorizations: vec![anybody()],
        labels: [("name".to_string(), "web".to_string())].into(),
        ..Default::default()
    }
}

/// HTTP/1 whose rules each fail what begins with a path.
fn http(rules: &[(&str, HttpFailureInjector)]) -> Server {
    use inbound::http_route::{Filter, Rule, filter::Kind};
    let failing = rules.iter().map(|(prefix, failure)| Rule {
        matches: vec![path(prefix)],
        filters: vec![Filter { kind: Some(Kind::FailureInjector(failure.clone())) }],
    });
    let rules = failing.chain([Rule { matches: vec![path("/")], filters: vec![] }]).collect();
    let route =
        inbound::HttpRoute { metadata: name("web"), rules, authorizations: vec![anybody()], ..Default::default() };
    server(proxy_protocol::Kind::Http1(proxy_protocol::Http1 { routes: vec![route], local_rate_limit: None }))
}

/// gRPC in which one method always fails.
fn grpc(method: &str, code: u32) -> Server {
    use inbound::grpc_route::{Filter, Rule, filter::Kind};
    let rpc = |method: &str| GrpcRouteMatch {
        rpc: Some(GrpcRpcMatch { service: "pkg.Svc".into(), method: method.into() }),
        ..Default::default()
    };
    let failure = GrpcFailureInjector { code, message: "not today".into(), ratio: None };
    let failing =
        Rule { matches: vec![rpc(method)], filters: vec![Filter { kind: Some(Kind::FailureInjector(failure)) }] };
    let rules = vec![failing, Rule { matches: vec![rpc("")], filters: vec![] }];
    let route =
        inbound::GrpcRoute { metadata: name("grpc"), rules, authorizations: vec![anybody()], ..Default::default() };
    server(proxy_protocol::Kind::Grpc(proxy_protocol::Grpc { routes: vec![route] }))
}

/// How often each status came, of many requests on one connection.
async fn statuses(pod: &Pod, addr: SocketAddr, path: &str, count: usize) -> BTreeMap<u16, usize> {
    let mut send = apps::http1(pod, addr).await;
    let mut seen = BTreeMap::new();
    for _ in 0..count {
        let req = http::Request::get(path).header("host", "web.shop").body(Full::<Bytes>::default()).unwrap();
        send.ready().await.expect("an injected failure leaves the connection open");
        let answer = apps::read(send.send_request(req).await.unwrap()).await.unwrap();
        *seen.entry(answer.status.as_u16()).or_default() += 1;
    }
    seen
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_injects_failures_by_ratio_and_method() {
    let Some(mut world) = World::new("inject-in") else { return };
    let client = world.plain("client", &[]);
    let pod = world.meshed("server", &[("http", 8080), ("grpc", 8081), ("bad", 8082)], &[]);
    let control = ControlPlane::new(&world);
    let rules = [("/always", fail(418, None)), ("/half", fail(503, Some((1, 2)))), ("/never", fail(503, Some((0, 1))))];
    control.server(8080, http(&rules));
    control.server(8081, grpc("Do", 8));
    control.server(8082, http(&[("/", fail(503, Some((1, 0))))]));
    control.spawn(&mut world, &pod, &[("LINKERD2_PROXY_INBOUND_PORTS", "8080,8081,8082")]);
    world.wait_ready("server").await;
    let _apps = [8080, 8081, 8082].map(|port| apps::http(&pod, port, "server"));

    world
        .eventually("the policy arrives", async || {
            statuses(&client, pod.addr(8080), "/always", 1).await == BTreeMap::from([(418, 1)])
        })
        .await;
    assert_eq!(statuses(&client, pod.addr(8080), "/always", 20).await, BTreeMap::from([(418, 20)]));
    assert_eq!(statuses(&client, pod.addr(8080), "/never", 20).await, BTreeMap::from([(200, 20)]));
    assert_eq!(statuses(&client, pod.addr(8080), "/other", 20).await, BTreeMap::from([(200, 20)]));
    let half = statuses(&client, pod.addr(8080), "/half", HALF).await;
    assert!(half.len() == 2 && SOME.contains(&half[&503]), "{half:?}");
    assert_eq!(apps::grpc(&client, pod.addr(8081), "/pkg.Svc/Do").await, (StatusCode::OK, "8".into()));
    assert_eq!(apps::grpc(&client, pod.addr(8081), "/pkg.Svc/Undo").await, (StatusCode::OK, "0".into()));
    // A share of nothing cannot be: the policy is not understood, and lets nobody in.
    assert_eq!(statuses(&client, pod.addr(8082), "/", 1).await, BTreeMap::from([(403, 1)]));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_injects_failures_that_no_server_sees() {
    let Some(mut world) = World::new("inject-out") else { return };
    let client = world.meshed("client", &[], &[]);
    let pod = world.plain("server", &[("http", 8080)]);
    let control = ControlPlane::new(&world);
    control.endpoints("web.shop.svc.cluster.local", &[(pod.addr(8080), None)]);
    let mut policy = http1("web.shop.svc.cluster.local:80");
    let Some(outbound::proxy_protocol::Kind::Http1(http1)) = policy.protocol.as_mut().and_then(|p| p.kind.as_mut())
    else {
        panic!("HTTP/1")
    };
    let open = http1.routes[0].rules[0].clone();
    let failing = |prefix: &str, failure| {
        let kind = outbound::http_route::filter::Kind::FailureInjector(failure);
        let filters = vec![outbound::http_route::Filter { kind: Some(kind) }];
        outbound::http_route::Rule { matches: vec![path(prefix)], filters, ..open.clone() }
    };
    http1.routes[0].rules.insert(0, failing("/always", fail(418, None)));
    http1.routes[0].rules.insert(0, failing("/half", fail(503, Some((1, 2)))));
    control.policy(WEB.into(), policy);
    control.spawn(&mut world, &client, &[]);
    world.wait_ready("client").await;
    let _app = apps::http(&pod, 8080, "server");

    let answer = apps::get(&client, WEB.into(), "/always", &[]).await.unwrap();
    assert_eq!((answer.status.as_u16(), &*answer.body), (418, ""));
    let why = answer.headers["l5d-proxy-error"].to_str().unwrap();
    assert!(why.ends_with("not today"), "{why}");
    assert_eq!(answer.headers["l5d-proxy-termination"], "route-injected");
    assert!(!answer.headers.contains_key("connection"), "{answer:?}");
    assert_eq!(apps::get(&client, WEB.into(), "/other", &[]).await.unwrap().body, "server GET /other");
    let half = statuses(&client, WEB.into(), "/half", HALF).await;
    assert!(half.len() == 2 && SOME.contains(&half[&503]), "{half:?}");
    // What failed here never left.
    let sent = world.metric("client", "request_total", &["direction=\"outbound\""]).await;
    assert_eq!(sent, (1 + half[&200]) as f64, "{}", identity_of("server"));
}
