//! Traffic that leaves the mesh: which EgressNetwork an address belongs to, what it lets pass, and what is told of it.

use crate::{apps, site::Site, world::success};
use std::{net::SocketAddr, process::Command};

/// In networks of their own, in the order of [`NETWORKS`]: allowed; excepted from it; everything else.
const ALLOWED: [u8; 4] = [203, 0, 113, 5];
const EXCEPTED: [u8; 4] = [203, 0, 113, 6];
const REST: [u8; 4] = [198, 51, 100, 7];

const NETWORKS: &str = "apiVersion: policy.linkerd.io/v1alpha1
kind: EgressNetwork
metadata: {name: some, namespace: shop}
spec: {trafficPolicy: Allow, networks: [{cidr: 203.0.113.0/24, except: [203.0.113.6/32]}]}
---
apiVersion: policy.linkerd.io/v1alpha1
kind: EgressNetwork
metadata: {name: rest, namespace: shop}
spec: {trafficPolicy: Deny}
---
apiVersion: policy.linkerd.io/v1alpha1
kind: EgressNetwork
metadata: {name: of-others, namespace: linkerd-egress}
spec: {trafficPolicy: Allow, networks: [{cidr: 198.51.100.7/32}]}
---
";

/// A route on a port of the network `rest`.
fn route(kind: &str, name: &str, port: u16, spec: &str) -> String {
    format!(
        "apiVersion: gateway.networking.k8s.io/v1\nkind: {kind}\nmetadata: {{name: {name}, namespace: shop}}\nspec: {{parentRefs: [{{group: policy.linkerd.io, kind: EgressNetwork, name: rest, port: {port}}}], {spec}}}\n---\n"
    )
}

/// A server outside with the addresses above: HTTP on 80, 81 and 82, elsewhere a greeting.
async fn outside(test: &str, manifests: &str, env: &[(&str, &str)]) -> Option<(Site, Vec<apps::App>)> {
    let mut site = Site::new(test, &format!("{NETWORKS}{manifests}"), env).await?;
    let pod = site.world.plain("outside", &[]);
    let (bridge, via) = (site.world.bridge_netns(), pod.ip4.to_string());
    for addr in [ALLOWED, EXCEPTED, REST].map(|ip| std::net::Ipv4Addr::from(ip).to_string()) {
        success(pod.command("ip").args(["addr", "add", &format!("{addr}/32"), "dev", "lo"]));
        success(Command::new("ip").args(["-n", &bridge, "route", "add", &addr, "via", &via]));
    }
    let mut servers: Vec<_> = [80, 81, 82].into_iter().map(|port| apps::http(&pod, port, "outside")).collect();
    servers.extend([443, 444, 5000, 5001].into_iter().map(|port| apps::server_first(&pod, port, "outside")));
    Some((site, servers))
}

#[tokio::test(flavor = "multi_thread")]
async fn networks_allow_and_deny_by_address_authority_name_and_port() {
    let itself = "{group: policy.linkerd.io, kind: EgressNetwork, name: rest}";
    let routes = [
        route(
            "HTTPRoute",
            "api",
            80,
            "hostnames: [api.test, '*.wild.test'], rules: [{matches: [{path: {value: /ok}}]}]",
        ),
        route("HTTPRoute", "inside", 80, "hostnames: [inside.test], rules: [{backendRefs: [{name: two, port: 80}]}]"),
        route("GRPCRoute", "grpc", 81, "rules: [{matches: [{method: {service: a.B}}]}]"),
        route("TLSRoute", "tls", 443, &format!("hostnames: ['*.ok.test'], rules: [{{backendRefs: [{itself}]}}]")),
        route("TCPRoute", "tcp", 5000, &format!("rules: [{{backendRefs: [{itself}]}}]")),
    ];
    let Some((site, _servers)) = outside("egress", &routes.concat(), &[]).await else { return };
    let mut wrong = String::new();
    for (ip, port, ask, lines) in [
        (ALLOWED, 80, "GET /", &["200", "outside GET /"][..]),
        (ALLOWED, 82, "grpc POST /a.B/C", &["200", "grpc-status: 0", "x-app: outside"]),
        (EXCEPTED, 80, "GET /", &["403"]),
        (EXCEPTED, 82, "h2 GET /", &["403"]),
        (EXCEPTED, 82, "grpc POST /a.B/C", &["200", "grpc-status: 7"]),
        (REST, 80, "GET /ok | host: api.test", &["200", "outside GET /ok"]),
        (REST, 80, "h2 GET /ok | host: a.b.wild.test", &["200", "outside GET /ok"]),
        (REST, 80, "GET /else | host: api.test", &["403"]),
        (REST, 80, "GET /ok | host: other.test", &["403"]),
        (REST, 80, "GET / | host: inside.test", &["200", "two GET /"]),
        (REST, 81, "grpc POST /a.B/C", &["200", "grpc-status: 0", "x-app: outside"]),
        (REST, 81, "grpc POST /a.C/C", &["200", "grpc-status: 7"]),
    ] {
        site.compare((ip, port).into(), &format!("{ip:?}:{port}"), ask, lines, &mut wrong).await;
    }
    assert!(wrong.is_empty(), "{wrong}\n{}", site.world.logs());
    let hello = apps::client_hello;
    for (ip, port, bytes, heard) in [
        (ALLOWED, 443, hello("any.test"), "outside"),
        (ALLOWED, 5001, b"\0bytes".to_vec(), "outside"),
        (EXCEPTED, 444, hello("any.test"), "reset"),
        (EXCEPTED, 5001, b"\0bytes".to_vec(), "reset"),
        (REST, 443, hello("a.ok.test"), "outside"),
        (REST, 443, hello("a.bad.test"), "reset"),
        (REST, 5000, vec![], "outside"),
        (REST, 5001, b"\0bytes".to_vec(), "reset"),
    ] {
        let greeting = site.greeting((ip, port).into(), &bytes).await;
        assert_eq!(greeting, heard, "{ip:?}:{port}\n{}", site.world.logs());
    }
    let error = site.ask((EXCEPTED, 80).into(), "GET /").await;
    assert!(error.iter().any(|l| l.starts_with("l5d-proxy-error: ") && l.contains("not allowed")), "{error:?}");
    assert_eq!(site.world.metric("client", "outbound_tcp_errors_total", &["error=\"unexpected\""]).await, 4.0);
    let denied = ["parent_name=\"some\""];
    assert_eq!(site.world.metric("client", "outbound_http_route_request_statuses_total", &denied).await, 2.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn hostnames_are_told_within_a_budget() {
    let routes = route("HTTPRoute", "wild", 80, "hostnames: ['*.wild.test'], rules: [{}]")
        + &route(
            "TLSRoute",
            "tls",
            443,
            "hostnames: ['*.ok.test'], rules: [{backendRefs: [{group: policy.linkerd.io, kind: EgressNetwork, name: rest}]}]",
        );
    let env = [("LINKERD2_PROXY_OUTBOUND_METRICS_HOSTNAME_LABELS", "true"), ("LINKERD2_PROXY_METRICS_MAX_SERIES", "6")];
    let Some((site, _servers)) = outside("egress-hostnames", &routes, &env).await else { return };
    let told = async |family: &str, label: &str| site.world.metric("client", family, &[label]).await;
    for i in 0..20 {
        let answer = site.ask((REST, 80).into(), &format!("GET / | host: H{i}.wild.test:80")).await;
        assert_eq!(answer[0], "200", "{answer:?}");
        assert_eq!(site.greeting((REST, 443).into(), &apps::client_hello(&format!("s{i}.ok.test"))).await, "outside");
    }
    for (family, name) in [
        ("outbound_http_route_request_statuses_total", "h0.wild.test"),
        ("outbound_tls_route_open_total", "s0.ok.test"),
    ] {
        let label = format!("hostname=\"{name}\"");
        assert_eq!(told(family, &label).await, 1.0, "{family} {label}");
        // What is over the budget is summed.
        assert!(told(family, "series=\"other\"").await >= 14.0, "{family}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_are_limited_on_the_clients_side() {
    let limit = |name: &str, group: &str, kind: &str, target: &str| {
        format!(
            "apiVersion: policy.linkerd.io/v1alpha1\nkind: HTTPLocalRateLimitPolicy\nmetadata: {{name: {name}, namespace: shop}}\nspec: {{targetRef: {{group: '{group}', kind: {kind}, name: {target}}}, total: {{requestsPerSecond: 3}}}}\n---\n"
        )
    };
    let limits = limit("out", "policy.linkerd.io", "EgressNetwork", "some") + &limit("in", "", "Service", "one");
    let Some((site, _servers)) = outside("egress-limits", &limits, &[]).await else { return };
    for (to, seconds) in [(SocketAddr::from((ALLOWED, 80)), 1), (([10, 96, 1, 1], 80).into(), 1)] {
        let mut kept = apps::http1(&site.client, to).await;
        let mut counts = std::collections::BTreeMap::<u16, u32>::new();
        for _ in 0..12 {
            let req = http::Request::get("/").header("host", "a.test").body(http_body_util::Full::default()).unwrap();
            kept.ready().await.unwrap();
            let answer = apps::read(kept.send_request(req).await.unwrap()).await.unwrap();
            *counts.entry(answer.status.as_u16()).or_default() += 1;
            if answer.status == 429 {
                assert_eq!(answer.headers["retry-after"], seconds.to_string());
                let told = answer.headers["l5d-proxy-error"].to_str().unwrap();
                assert!(told.contains("total rate limit exceeded: 3rps"), "{told}");
            }
        }
        // Three at once, and one for each third of a second that this took.
        assert!(counts[&200] >= 3 && counts[&429] >= 1, "{to}: {counts:?}");
        let mut codes = Vec::new();
        for _ in 0..8 {
            codes.push(apps::grpc(&site.client, to, "/a.B/C").await.1);
        }
        assert!(codes.iter().any(|code| code == "8"), "{to}: {codes:?}");
    }
    // Others are not.
    for _ in 0..12 {
        assert_eq!(site.ask(([10, 96, 1, 2], 80).into(), "GET /").await[0], "200");
    }
    site.world.manifest("routes", NETWORKS.trim_end_matches("---\n"));
    site.world
        .eventually("the limit is gone", async || {
            let mut all = true;
            for _ in 0..8 {
                all &= site.ask((ALLOWED, 80).into(), "GET /").await[0] == "200";
            }
            all
        })
        .await;
}
