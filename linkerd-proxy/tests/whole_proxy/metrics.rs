//! The metrics contract (metrics.md) as its readers see it: a pair of proxies under traffic of every kind, scraped by a
//! real Prometheus that evaluates every query of viz, the CLI and the Grafana boards, and parsed by two parsers that are
//! not ours.

use crate::{
    apps,
    net::{Pod, within},
    world::{World, service},
};
use bytes::Bytes;
use http::{Request, StatusCode};
use http_body_util::Full;
use std::{
    fs,
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    process::{Child, Command, Stdio},
    time::Duration,
};
use tokio::{io::AsyncWriteExt, task::JoinHandle};

const WEB: [u8; 4] = [10, 96, 0, 10];
const OLD: [u8; 4] = [10, 96, 0, 11];
const CLIENT_ID: &str = "client.shop.serviceaccount.identity.linkerd.cluster.local";
const SERVER_ID: &str = "server.shop.serviceaccount.identity.linkerd.cluster.local";

const POLICIES: &str = r#"
apiVersion: policy.linkerd.io/v1beta3
kind: Server
metadata: {name: web, namespace: shop}
spec: {podSelector: {matchLabels: {app: server}}, port: http, proxyProtocol: unknown}
---
apiVersion: policy.linkerd.io/v1beta3
kind: HTTPRoute
metadata: {name: api, namespace: shop}
spec: {parentRefs: [{group: policy.linkerd.io, kind: Server, name: web}], rules: [{matches: [{path: {value: /}}]}]}
---
apiVersion: policy.linkerd.io/v1alpha1
kind: AuthorizationPolicy
metadata: {name: friends, namespace: shop}
spec:
  targetRef: {group: policy.linkerd.io, kind: Server, name: web}
  requiredAuthenticationRefs: [{group: policy.linkerd.io, kind: MeshTLSAuthentication, name: friends}]
---
apiVersion: policy.linkerd.io/v1alpha1
kind: MeshTLSAuthentication
metadata: {name: friends, namespace: shop}
spec: {identityRefs: [{kind: ServiceAccount, name: client}]}
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: web, namespace: shop, annotations: {retry.linkerd.io/http: 5xx, retry.linkerd.io/limit: "1"}}
spec:
  parentRefs: [{group: "", kind: Service, name: web, port: 80}]
  rules: [{backendRefs: [{name: web, port: 80}]}]
---
apiVersion: gateway.networking.k8s.io/v1
kind: GRPCRoute
metadata: {name: rpc, namespace: shop, annotations: {retry.linkerd.io/grpc: unavailable, retry.linkerd.io/limit: "1"}}
spec:
  parentRefs: [{group: "", kind: Service, name: web, port: 83}]
  rules: [{backendRefs: [{name: web, port: 83}]}]
---
apiVersion: linkerd.io/v1alpha2
kind: ServiceProfile
metadata: {name: old.shop.svc.cluster.local, namespace: shop}
spec:
  routes: [{name: all, condition: {pathRegex: /.*}, isRetryable: true}]
"#;

/// A meshed client and server, and a stranger that is neither, with traffic of every kind between them until drop.
struct Pair {
    world: World,
    traffic: JoinHandle<()>,
    _apps: Vec<apps::App>,
}

impl Drop for Pair {
    fn drop(&mut self) {
        self.traffic.abort();
    }
}

async fn pair(test: &str) -> Option<Pair> {
    let mut world = World::new(test)?;
    let client = world.meshed("client", &[], &[]);
    let server = world.meshed("server", &[("http", 8080), ("tcp", 9000)], &[]);
    let stranger = world.plain("stranger", &[]);
    for name in ["client", "server"] {
        let path = world.manifests().join(format!("pod-{name}.yaml"));
        let pod = fs::read_to_string(&path).expect("a manifest");
        let owned = format!("  labels:\n    linkerd.io/proxy-deployment: {name}\n    pod-template-hash: abc\n");
        world.manifest(&format!("pod-{name}"), &pod.replacen("  labels:\n", &owned, 1));
    }
    let ports = [
        ("http", 80, "http", None),
        ("h2", 82, "http", Some("kubernetes.io/h2c")),
        ("grpc", 83, "http", Some("kubernetes.io/h2c")),
        ("tcp", 90, "tcp", None),
    ];
    world.manifest("web", &service("web", "server", &["10.96.0.10"], &ports));
    world.manifest("old", &service("old", "server", &["10.96.0.11"], &[("http", 80, "http", None)]));
    world.manifest("policies", POLICIES);
    world.start(&["client", "server"]).await;
    let apps = vec![
        apps::http(&server, 8080, "server"),
        apps::tcp_echo(&server, 9000),
        apps::http(&stranger, 8080, "stranger"),
    ];
    let traffic = tokio::spawn(async move {
        loop {
            round(&client, &server, &stranger).await;
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    });
    Some(Pair { world, traffic, _apps: apps })
}

/// One request or connection of each kind.
async fn round(client: &Pod, server: &Pod, stranger: &Pod) {
    let web = |port| SocketAddr::from((WEB, port));
    assert_eq!(get(client, web(80), "web.shop", "/hello").await, StatusCode::OK);
    assert_eq!(get(client, web(80), "web.shop", "/status/503").await, StatusCode::SERVICE_UNAVAILABLE, "retried");
    assert_eq!(get(client, OLD_WEB.into(), "old.shop.svc.cluster.local", "/").await, StatusCode::OK, "profile");
    assert_eq!(get(client, stranger.addr(8080), "stranger", "/").await, StatusCode::OK, "unmeshed");
    assert_eq!(get(stranger, server.addr(8080), "web.shop", "/").await, StatusCode::FORBIDDEN, "denied");
    for (port, content_type, path) in
        [(82, "text/plain", "/"), (83, "application/grpc", "/pkg.Service/Method"), (83, "application/grpc", "/fail/14")]
    {
        let mut send = apps::http2(client, web(port)).await;
        let req = Request::post(format!("http://web.shop{path}"))
            .header("content-type", content_type)
            .body(Full::new(Bytes::from_static(b"\0\0\0\0\x02hi")));
        apps::read(send.send_request(req.unwrap()).await.unwrap()).await.unwrap();
    }
    let mut io = client.connect(web(90)).await.unwrap();
    io.write_all(b"\x01opaque").await.unwrap();
    apps::expect_text(&mut io, "\x01opaque").await;
}

const OLD_WEB: ([u8; 4], u16) = (OLD, 80);

async fn get(from: &Pod, addr: SocketAddr, host: &str, path: &str) -> StatusCode {
    let mut send = apps::http1(from, addr).await;
    let req = Request::get(path).header("host", host).body(Full::default()).unwrap();
    apps::read(send.send_request(req).await.unwrap()).await.unwrap().status
}

/// What a query must yield.
#[derive(Copy, Clone, Debug, PartialEq)]
enum Yields {
    /// Some sample above 0.
    Traffic,
    /// Some sample that is a number.
    Number,
    /// It must be understood; a running pair has nothing to show for it.
    Anything,
}

use Yields::{Anything, Number, Traffic};

/// Every shape of metrics.md 7.
fn queries() -> Vec<(Yields, String)> {
    let mut all = Vec::new();
    let mut add = |yields, query: String| all.push((yields, query));
    let quantiles = ["0.5", "0.95", "0.99"];

    // 7.1: filter, groups, peer of the byte counts, and what the filter of open connections adds.
    for (filter, groups, peer, open) in [
        (r#"deployment="server", direction="inbound", namespace="shop""#, "namespace, deployment", "src", ""),
        (
            r#"deployment="client", direction="outbound", dst_deployment="server", dst_namespace="shop", namespace="shop""#,
            "namespace, deployment",
            "dst",
            "",
        ),
        (
            r#"deployment="client", direction="outbound", dst_deployment="server", dst_namespace="shop", namespace="shop""#,
            "dst_namespace, dst_deployment",
            "dst",
            "",
        ),
        (r#"pod="server", direction="inbound", namespace="shop""#, "namespace, pod", "src", ""),
        (r#"direction="inbound", namespace="shop""#, "namespace", "src", ""),
        (
            r#"authority=~"^web.shop.svc.cluster.local.*", direction="outbound""#,
            "dst_namespace, dst_service",
            "dst",
            r#", peer="dst""#,
        ),
        (
            r#"authority=~"^.+.shop.svc.cluster.local.*", deployment="client", direction="outbound", namespace="shop""#,
            "dst_namespace, dst_service",
            "dst",
            r#", peer="dst""#,
        ),
        (
            r#"direction="inbound", namespace="shop", srv_kind="server", srv_name="web""#,
            "srv_kind, namespace, srv_name",
            "src",
            r#", peer="src""#,
        ),
    ] {
        responses(&mut add, filter, groups, &quantiles);
        add(Traffic, format!("sum(tcp_open_connections{{{filter}{open}}}) by ({groups})"));
        for bytes in ["tcp_read_bytes_total", "tcp_write_bytes_total"] {
            add(Traffic, format!(r#"sum(increase({bytes}{{{filter}, peer="{peer}"}}[1m])) by ({groups})"#));
        }
    }
    for (filter, groups, denied) in [
        (r#"namespace="shop", srv_kind="server", srv_name="web""#, "srv_kind, namespace, srv_name", Traffic),
        // Who was denied was admitted by no authorization.
        (
            r#"authz_kind="authorizationpolicy", authz_name="friends", namespace="shop""#,
            "namespace, authz_name",
            Anything,
        ),
        (r#"authz_kind="serverauthorization", namespace="shop""#, "namespace, authz_name", Anything),
        (
            r#"namespace="shop", route_name="api""#,
            "srv_name, srv_kind, route_name, route_kind, namespace, route_name",
            Traffic,
        ),
    ] {
        if !filter.contains("serverauthorization") {
            responses(&mut add, &format!(r#"direction="inbound", {filter}"#), groups, &quantiles);
            add(Traffic, format!("sum(increase(inbound_http_authz_allow_total{{{filter}}}[1m])) by ({groups})"));
        }
        add(denied, format!("sum(increase(inbound_http_authz_deny_total{{{filter}}}[1m])) by ({groups})"));
    }

    // 7.2
    let (filter, groups) = (
        r#"deployment="server", namespace="shop""#,
        "route_kind, route_name, authz_kind, authz_name, srv_kind, srv_name",
    );
    responses(&mut add, &format!(r#"direction="inbound", {filter}"#), groups, &quantiles);
    for family in ["inbound_http_authz_allow_total", "inbound_http_authz_deny_total"] {
        add(Traffic, format!("sum(increase({family}{{{filter}}}[1m])) by ({groups})"));
    }

    // 7.3
    for res in ["deployment", "pod"] {
        add(
            Traffic,
            format!(
                r#"sum(tcp_open_connections{{{res}!="", direction="outbound", dst_{res}!=""}}) by ({res}, dst_{res}, pod, server_id, namespace, dst_namespace, no_tls_reason)"#
            ),
        );
    }

    // 7.4
    for (direction, families) in [("inbound", &["route"][..]), ("outbound", &["route", "route_actual"])] {
        let who = if direction == "inbound" { "server" } else { "client" };
        let filter = format!(
            r#"deployment="{who}", direction="{direction}", dst=~"(old.shop.svc.cluster.local|web.shop.svc.cluster.local)(:\\d+)?", namespace="shop""#
        );
        for family in families {
            add(
                Traffic,
                format!("sum(increase({family}_response_total{{{filter}}}[1m])) by (rt_route, dst, classification)"),
            );
        }
        for q in quantiles {
            add(
                Traffic,
                format!(
                    "histogram_quantile({q}, sum(irate(route_response_latency_ms_bucket{{{filter}}}[1m])) by (le, dst, rt_route))"
                ),
            );
        }
    }

    // 7.5, 7.6
    add(Traffic, "max(process_start_time_seconds{}) by (pod, namespace)".into());
    add(Traffic, r#"max(process_start_time_seconds{namespace="shop"}) by (pod, namespace)"#.into());
    add(Anything, "sum(gateway_alive{}) by (gateway_namespace, target_cluster_name, gateway_name)".into());
    add(
        Anything,
        "histogram_quantile(0.5, sum(irate(gateway_probe_latency_ms_bucket{}[1m])) by (le, gateway_namespace, target_cluster_name, gateway_name))".into(),
    );

    // 7.7
    let groups = "srv_name, srv_kind, route_name, route_kind, target_port, namespace, deployment";
    let with_class = "srv_name, srv_kind, route_name, route_kind, classification, target_port, namespace, deployment";
    let filter = r#"direction="inbound", deployment="server", namespace="shop""#;
    add(Traffic, format!("sum(increase(response_total{{{filter}}}[1m])) by ({with_class})"));
    for q in quantiles {
        add(
            Traffic,
            format!(
                "histogram_quantile({q}, sum(irate(response_latency_ms_bucket{{{filter}}}[1m])) by (le, {groups}))"
            ),
        );
    }

    // 7.8
    let filter = r#"deployment="client", namespace="shop""#;
    let names = "namespace, deployment";
    for (p, status) in [("http", "http_status"), ("grpc", "grpc_status")] {
        let route = "parent_name, parent_port, route_name, route_kind";
        let backend = "parent_name, parent_port, backend_name, backend_port, route_name, route_kind";
        let prefix = format!("outbound_{p}_route");
        add(
            Traffic,
            format!(
                "sum(increase({prefix}_backend_response_statuses_total{{{filter}}}[1m])) by ({backend}, {status}, error, {names})"
            ),
        );
        add(
            Traffic,
            format!(
                "sum(increase({prefix}_request_statuses_total{{{filter}}}[1m])) by ({route}, {status}, error, {names})"
            ),
        );
        add(Traffic, format!("sum(increase({prefix}_retry_requests_total{{{filter}}}[1m])) by ({route}, {names})"));
        for q in quantiles {
            for (family, groups) in [("backend_response", backend), ("request", route)] {
                add(
                    Traffic,
                    format!(
                        "histogram_quantile({q}, sum(irate({prefix}_{family}_duration_seconds_bucket{{{filter}}}[1m])) by (le, {groups}, {names}))"
                    ),
                );
            }
        }
    }

    // 7.9
    add(Traffic, r#"sum(rate(request_total{direction="inbound", job="linkerd-proxy"}[30s]))"#.into());
    add(Traffic, r#"count(count by (pod) (request_total{job="linkerd-proxy"}))"#.into());
    add(
        Anything,
        r#"histogram_quantile(0.99, sum(rate(request_handle_us_bucket{job="linkerd-proxy"}[24h])) by (le))"#.into(),
    );

    grafana(&mut add);
    all
}

/// Success and latency, of which most shapes of 7.1 and 7.2 are made.
fn responses(add: &mut impl FnMut(Yields, String), filter: &str, groups: &str, quantiles: &[&str]) {
    add(Traffic, format!("sum(increase(response_total{{{filter}}}[1m])) by ({groups}, classification, tls)"));
    for q in quantiles {
        let of = format!("sum(irate(response_latency_ms_bucket{{{filter}}}[1m])) by (le, {groups})");
        add(Traffic, format!("histogram_quantile({q}, {of})"));
    }
}

/// 7.10
fn grafana(add: &mut impl FnMut(Yields, String)) {
    let inbound = r#"namespace="shop", deployment="server", direction="inbound""#;
    let outbound = r#"namespace="shop", deployment="client", direction="outbound""#;
    let to = r#"namespace="shop", deployment="client", dst_deployment="server", direction="outbound""#;
    let from =
        r#"deployment!="", deployment="client", dst_namespace="shop", dst_deployment="server", direction="outbound""#;
    let service = r#"namespace="shop", dst_service="web", direction="outbound""#;
    let authority = r#"namespace="shop", authority="web.shop.svc.cluster.local", direction="outbound""#;
    let route = r#"namespace="shop", direction="outbound", rt_route="all""#;
    for (filter, groups, meshed, plain) in [
        (inbound, "deployment", Traffic, Number),
        (inbound, "pod", Traffic, Number),
        (inbound, "namespace", Traffic, Number),
        (outbound, "pod", Traffic, Traffic),
        (to, "dst_deployment", Traffic, Anything),
        (from, "deployment, pod", Traffic, Anything),
        (service, "dst_service, deployment", Traffic, Anything),
        (service, "dst_service, pod", Traffic, Anything),
        (authority, "authority", Traffic, Anything),
        (authority, "deployment", Traffic, Anything),
        (
            r#"namespace="shop", authority="web.shop.svc.cluster.local", direction="inbound""#,
            "authority",
            Anything,
            Anything,
        ),
        (
            r#"dst_target_cluster="east", dst_target_cluster!="", direction="outbound""#,
            "dst_target_service",
            Anything,
            Anything,
        ),
    ] {
        for (tls, yields) in [("", meshed), (r#", tls="true""#, meshed), (r#", tls!="true""#, plain)] {
            add(yields, format!("sum(irate(request_total{{{filter}{tls}}}[10s]))"));
            add(yields, format!("sum(irate(request_total{{{filter}{tls}}}[10s])) by ({groups})"));
            // Nothing but successes may have come without TLS.
            add(
                yields,
                format!(
                    r#"sum(irate(response_total{{classification="success", {filter}{tls}}}[10s])) by ({groups}) / sum(irate(response_total{{{filter}{tls}}}[10s])) by ({groups})"#
                ),
            );
        }
        for rate in ["irate", "rate"] {
            let of = format!("sum({rate}(response_latency_ms_bucket{{{filter}}}[10s])) by (le, {groups})");
            add(meshed, format!("histogram_quantile(0.95, {of})"));
        }
    }
    add(Traffic, r#"sum(irate(request_total{namespace=~"shop|x", deployment=~"client|server"}[10s]))"#.into());
    add(Traffic, format!("count(count(request_total{{{outbound}}}) by (namespace, dst_deployment))"));
    add(
        Traffic,
        r#"count(count(request_total{dst_namespace="shop", deployment!="", dst_deployment!="", dst_deployment="server", direction="outbound"}) by (namespace, deployment))"#.into(),
    );
    add(Traffic, format!("tcp_open_connections{{{inbound}}}"));
    add(Traffic, format!("tcp_open_connections{{{outbound}}}"));
    add(Anything, format!(r#"tcp_close_total{{{inbound}, errno!=""}}"#));
    add(Anything, format!(r#"tcp_close_total{{{outbound}, errno!=""}}"#));
    add(Traffic, format!("tcp_close_total{{{inbound}}}"));
    add(Anything, "tcp_connection_duration_ms_bucket{}".into());

    for (tls, yields) in [("", Traffic), (r#", tls="true""#, Anything), (r#", tls!="true""#, Traffic)] {
        for groups in ["rt_route", "deployment, rt_route", "pod, rt_route"] {
            add(yields, format!("sum(irate(route_request_total{{{route}{tls}}}[10s])) by ({groups})"));
        }
        add(yields, format!("sum(irate(route_request_total{{{route}{tls}}}[10s]))"));
        add(
            yields,
            format!(
                r#"sum(irate(route_response_total{{classification="success", {route}{tls}}}[10s])) / sum(irate(route_response_total{{{route}{tls}}}[10s]))"#
            ),
        );
    }
    for rate in ["irate", "rate"] {
        for groups in ["rt_route", "rt_route, deployment", "rt_route, pod"] {
            let of = format!("sum({rate}(route_response_latency_ms_bucket{{{route}}}[10s])) by (le, {groups})");
            add(Traffic, format!("histogram_quantile(0.95, {of})"));
        }
    }

    let health = r#"deployment!="", namespace=~"shop|shop-viz", direction="inbound""#;
    add(Traffic, format!("sum(irate(request_total{{{health}}}[10s])) by (pod)"));
    add(Traffic, format!("sum(irate(response_total{{{health}}}[10s])) by (pod)"));
    add(
        Traffic,
        format!("histogram_quantile(0.95, sum(irate(response_latency_ms_bucket{{{health}}}[10s])) by (le, pod))"),
    );
    let health = r#"deployment="server", namespace=~"shop|shop-viz", direction="inbound""#;
    add(Traffic, format!("tcp_open_connections{{{health}}}"));
    add(Anything, format!(r#"tcp_close_total{{{health}, errno!=""}}"#));
    add(Traffic, r#"sum(irate(process_cpu_seconds_total{job="linkerd-proxy"}[10s])) by (namespace, pod)"#.into());
    for family in ["process_resident_memory_bytes", "process_virtual_memory_bytes", "process_open_fds"] {
        add(Traffic, format!(r#"{family}{{job="linkerd-proxy"}}"#));
    }
    // Drop-downs: label_values(series, label) is the label's values over the series.
    for label in ["namespace", "deployment", "pod", "control_plane_ns"] {
        add(Traffic, format!(r#"count(process_start_time_seconds{{{label}!=""}}) by ({label})"#));
    }
    for label in ["namespace", "deployment", "dst_deployment", "dst_pod", "dst_service", "authority"] {
        add(Traffic, format!(r#"count(request_total{{{label}!=""}}) by ({label})"#));
    }
    for label in ["namespace", "rt_route"] {
        add(Traffic, format!(r#"count(route_request_total{{{label}!=""}}) by ({label})"#));
    }
}

/// A Prometheus in the bridge's namespace that scrapes both proxies every second and labels them as relabelling would.
struct Prometheus<'a> {
    process: Child,
    world: &'a World,
}

impl Drop for Prometheus<'_> {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl<'a> Prometheus<'a> {
    fn start(world: &'a World) -> Self {
        let targets: String = ["client", "server"]
            .iter()
            .map(|name| {
                format!(
                    "  - targets: ['{}:4191']\n    labels: {{namespace: shop, pod: {name}, deployment: {name}, control_plane_ns: linkerd}}\n",
                    world.pod(name).ip4
                )
            })
            .collect();
        let config = format!(
            "global: {{scrape_interval: 1s, scrape_timeout: 1s}}\nscrape_configs:\n- job_name: linkerd-proxy\n  static_configs:\n{targets}"
        );
        let path = world.dir.join("prometheus.yaml");
        fs::write(&path, config).expect("a configuration");
        let log = fs::File::create(world.dir.join("prometheus.log")).expect("a log file");
        let process = Command::new("ip")
            .args(["netns", "exec", &world.bridge_netns(), "prometheus", "--web.listen-address=127.0.0.1:9090"])
            .arg(format!("--config.file={}", path.display()))
            .arg(format!("--storage.tsdb.path={}", world.dir.join("prometheus").display()))
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a log file"))
            .stderr(log)
            .spawn()
            .expect("Prometheus starts");
        Self { process, world }
    }

    /// None while nobody listens.
    fn get(&self, path: &str) -> Option<(u16, String)> {
        let mut io = within(&self.world.bridge_netns(), || TcpStream::connect("127.0.0.1:9090")).ok()?;
        io.set_read_timeout(Some(Duration::from_secs(10))).expect("a timeout");
        // HTTP/1.0, so that the answer is not chunked.
        io.write_all(format!("GET {path} HTTP/1.0\r\nhost: localhost\r\n\r\n").as_bytes()).ok()?;
        let mut text = String::new();
        io.read_to_string(&mut text).ok()?;
        let (head, body) = text.split_once("\r\n\r\n")?;
        Some((head.get(9..12)?.parse().ok()?, body.to_string()))
    }

    /// The values that a query yields now; what Prometheus does not understand is a failure.
    fn query(&self, query: &str) -> Vec<f64> {
        let encoded: String = query
            .bytes()
            .map(|b| if b.is_ascii_alphanumeric() { char::from(b).to_string() } else { format!("%{b:02X}") })
            .collect();
        let (status, body) = self.get(&format!("/api/v1/query?query={encoded}")).expect("Prometheus answers");
        assert_eq!(status, 200, "{query}: {body}");
        let answer: serde_json::Value = serde_json::from_str(&body).expect("JSON");
        let result = answer["data"]["result"].as_array().unwrap_or_else(|| panic!("{query}: {body}"));
        result.iter().filter_map(|s| s["value"][1].as_str()?.parse().ok()).collect()
    }

    fn satisfies(&self, yields: Yields, query: &str) -> bool {
        let values = self.query(query);
        match yields {
            Traffic => values.iter().any(|v| v.is_finite() && *v > 0.0),
            Number => values.iter().any(|v| v.is_finite()),
            Anything => true,
        }
    }
}

/// Whether a tool can be used; never no in CI.
fn has(tool: &str, args: &[&str], package: &str) -> bool {
    let found = Command::new(tool).args(args).stdout(Stdio::null()).stderr(Stdio::null()).status();
    if found.is_ok_and(|status| status.success()) {
        return true;
    }
    assert!(std::env::var("CI").as_deref() != Ok("true"), "{tool} is needed (Debian's package {package})");
    println!("skipped: {tool} is not there (Debian's package {package})");
    false
}

#[tokio::test(flavor = "multi_thread")]
async fn prometheus_evaluates_every_query_of_the_consumers() {
    if !has("prometheus", &["--version"], "prometheus") {
        return;
    }
    let Some(pair) = pair("prometheus").await else { return };
    let prometheus = Prometheus::start(&pair.world);
    pair.world
        .eventually("Prometheus scrapes both", async || {
            prometheus.get("/-/ready").is_some_and(|(status, _)| status == 200)
                && prometheus.query(r#"up{job="linkerd-proxy"} == 1"#).len() == 2
        })
        .await;
    let mut left = queries();
    let count = left.len();
    // The shortest window takes ten scrapes; traffic goes on all the while.
    let end = std::time::Instant::now() + Duration::from_secs(45);
    while !left.is_empty() && std::time::Instant::now() < end {
        tokio::time::sleep(Duration::from_secs(1)).await;
        left.retain(|(yields, query)| !prometheus.satisfies(*yields, query));
        assert!(!pair.traffic.is_finished(), "the traffic failed");
    }
    let left: Vec<String> = left.iter().map(|(yields, query)| format!("{yields:?}: {query}")).collect();
    assert!(left.is_empty(), "{} of {count} queries do not yield what they must:\n{}", left.len(), left.join("\n"));
    let clashes =
        prometheus.query(r#"count({__name__=~".+", exported_namespace!=""} or {__name__=~".+", exported_pod!=""})"#);
    assert!(clashes.is_empty(), "labels that relabelling writes are not for the proxy to write");
}

/// Prometheus' own text parser, which the CLI uses too, and the one of Prometheus' client for Python.
#[tokio::test(flavor = "multi_thread")]
async fn parsers_of_others_read_the_page() {
    const PARSE: &str = "import sys\nfrom prometheus_client.parser import text_string_to_metric_families as parse\nseen = {}\nfor family in parse(sys.stdin.read()):\n    for s in family.samples:\n        key = (s.name, tuple(sorted(s.labels.items())))\n        assert key not in seen, key\n        seen[key] = s.value\nassert len(seen) > 100, len(seen)\n";
    let python = has("/usr/bin/python3", &["-c", "import prometheus_client"], "python3-prometheus-client");
    let promtool = has("promtool", &["--version"], "prometheus");
    if !python && !promtool {
        return;
    }
    let Some(pair) = pair("parsers").await else { return };
    pair.world
        .eventually("there has been traffic", async || {
            pair.world.metric("client", "outbound_grpc_route_retry_requests_total", &[]).await >= 1.0
        })
        .await;
    for name in ["client", "server"] {
        let (_, page) = pair.world.admin(name, "GET", "/metrics").await.unwrap();
        if python {
            let (code, said) = feed(Command::new("/usr/bin/python3").args(["-c", PARSE]), &page);
            assert_eq!(code, Some(0), "{name}: {said}");
        }
        if promtool {
            // 3 is for matters of taste: names of the contract that would be chosen otherwise today.
            let (code, said) = feed(Command::new("promtool").args(["check", "metrics"]), &page);
            assert!(matches!(code, Some(0 | 3)), "{name}: {said}");
        }
    }
}

fn feed(command: &mut Command, text: &str) -> (Option<i32>, String) {
    let mut child =
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the parser starts");
    child.stdin.take().expect("a pipe").write_all(text.as_bytes()).expect("the parser reads");
    let out = child.wait_with_output().expect("the parser ends");
    (out.status.code(), format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr)))
}

#[track_caller]
fn check(page: &str, family: &str, labels: &[&str], absent: &[&str]) {
    let samples = || page.lines().filter(|l| l.strip_prefix(family).is_some_and(|rest| rest.starts_with(['{', ' '])));
    let found = samples().any(|line| {
        labels.iter().all(|label| line.contains(label))
            && !absent.iter().any(|label| line.contains(&format!("{label}=")))
    });
    let all: Vec<_> = samples().take(20).collect();
    assert!(found, "{family} with {labels:?} without {absent:?} is not among\n{}", all.join("\n"));
}

/// metrics.md 6 and 7.11: every family that somebody reads, with the labels it is read by.
#[tokio::test(flavor = "multi_thread")]
async fn families_and_labels_of_the_contract() {
    let Some(pair) = pair("families").await else { return };
    let world = &pair.world;
    world
        .eventually("two rounds of traffic", async || {
            world.metric("server", "tcp_close_total", &["peer=\"src\"", "target_port=\"9000\""]).await >= 2.0
                && world.metric("client", "outbound_grpc_route_retry_requests_total", &[]).await >= 1.0
        })
        .await;
    let (_, client) = world.admin("client", "GET", "/metrics").await.unwrap();
    let (_, server) = world.admin("server", "GET", "/metrics").await.unwrap();
    let (client_id, server_id) = (format!("client_id=\"{CLIENT_ID}\""), format!("server_id=\"{SERVER_ID}\""));

    let to_web = [
        "direction=\"outbound\",authority=\"web.shop.svc.cluster.local\",target_addr=\"10.",
        "tls=\"true\"",
        &server_id,
        "dst_control_plane_ns=\"linkerd\"",
        "dst_deployment=\"server\"",
        "dst_namespace=\"shop\"",
        "dst_pod=\"server\"",
        "dst_pod_template_hash=\"abc\"",
        "dst_service=\"web\"",
        "dst_serviceaccount=\"server\"",
    ];
    let from_client = [
        "direction=\"inbound\",target_addr=\"10.",
        "target_port=\"8080\"",
        "tls=\"true\"",
        &client_id,
        "srv_group=\"policy.linkerd.io\",srv_kind=\"server\",srv_name=\"web\",srv_port=\"8080\"",
        "route_group=\"policy.linkerd.io\",route_kind=\"HTTPRoute\",route_name=\"api\"",
        "authz_group=\"policy.linkerd.io\",authz_kind=\"authorizationpolicy\",authz_name=\"friends\"",
    ];
    for (page, labels) in [(&client, &to_web[..]), (&server, &from_client)] {
        check(page, "request_total", labels, &["no_tls_reason"]);
        for (family, more) in [
            ("response_total", &["status_code=\"200\",classification=\"success\",grpc_status=\"\",error=\"\""][..]),
            ("response_total", &["status_code=\"503\",classification=\"failure\""]),
            ("response_latency_ms_bucket", &["status_code=\"200\"", "le=\"50000\""]),
            ("response_latency_ms_count", &["status_code=\"200\""]),
            ("response_latency_ms_sum", &["status_code=\"200\""]),
        ] {
            let labels: Vec<_> = labels.iter().chain(more).copied().collect();
            check(page, family, &labels, &[]);
        }
    }
    check(&client, "request_total", &["authority=\"web.shop.svc.cluster.local:83\""], &[]);
    check(&client, "response_total", &["classification=\"failure\",grpc_status=\"14\""], &[]);
    check(
        &client,
        "request_total",
        &["target_port=\"8080\",tls=\"no_identity\",no_tls_reason=\"not_provided_by_service_discovery\""],
        &["authority", "server_id"],
    );

    let profile = "dst=\"old.shop.svc.cluster.local:80\",rt_route=\"all\"";
    for (page, direction) in [(&client, "direction=\"outbound\""), (&server, "direction=\"inbound\"")] {
        for family in ["route_request_total", "route_response_total", "route_response_latency_ms_bucket"] {
            check(page, family, &[direction, profile], &["tls", "authority", "target_addr"]);
        }
    }
    for family in ["route_actual_request_total", "route_actual_response_total", "route_retryable_total"] {
        check(&client, family, &["direction=\"outbound\"", profile], &[]);
    }

    check(&server, "inbound_http_authz_allow_total", &from_client[1..], &["direction"]);
    check(
        &server,
        "inbound_http_authz_deny_total",
        &["srv_name=\"web\"", "route_name=\"api\"", "tls=\"no_identity\",no_tls_reason=\"no_tls_from_remote\""],
        &["authz_name", "direction", "client_id"],
    );

    let src = "direction=\"inbound\",peer=\"src\",target_addr=\"10.";
    let conns =
        ["tcp_open_total", "tcp_open_connections", "tcp_read_bytes_total", "tcp_write_bytes_total", "tcp_close_total"];
    for family in conns {
        let default = "srv_group=\"\",srv_kind=\"default\",srv_name=\"all-unauthenticated\",srv_port=\"9000\"";
        check(&server, family, &[src, "target_port=\"9000\",tls=\"true\"", &client_id, default], &[]);
        let loopback = "tls=\"no_identity\",no_tls_reason=\"loopback\"";
        check(&server, family, &["{direction=\"inbound\",peer=\"dst\",", loopback], &["target_addr", "srv_name"]);
        check(
            &client,
            family,
            &["direction=\"outbound\",peer=\"src\",target_addr=\"10.96.0.10:80\"", loopback],
            &["dst_pod"],
        );
        let dst = "direction=\"outbound\",peer=\"dst\",authority=\"web.shop.svc.cluster.local:90\"";
        check(&client, family, &[dst, "tls=\"true\"", &server_id, "dst_service=\"web\""], &[]);
        // Connections to unmeshed servers are pooled, so none may have closed yet.
        if family != "tcp_close_total" {
            let direct = ["direction=\"outbound\",peer=\"dst\",target_addr=\"10.", "target_port=\"8080\""];
            check(&client, family, &direct, &["authority", "dst_service"]);
        }
    }
    check(&server, "tcp_close_total", &[src, "target_port=\"9000\"", "errno=\"\""], &[]);

    for (p, port, route, kind) in [("http", 80, "web", "HTTPRoute"), ("grpc", 83, "rpc", "GRPCRoute")] {
        let parent = format!(
            "parent_group=\"core\",parent_kind=\"Service\",parent_namespace=\"shop\",parent_name=\"web\",parent_port=\"{port}\",parent_section_name=\"\",route_group=\"gateway.networking.k8s.io\",route_kind=\"{kind}\",route_namespace=\"shop\",route_name=\"{route}\""
        );
        let backend = format!(
            "backend_group=\"core\",backend_kind=\"Service\",backend_namespace=\"shop\",backend_name=\"web\",backend_port=\"{port}\""
        );
        let (good, bad) = match p {
            "http" => ("http_status=\"200\",error=\"\"", "http_status=\"503\",error=\"\""),
            _ => ("grpc_status=\"OK\",error=\"\"", "grpc_status=\"UNAVAILABLE\",error=\"\""),
        };
        let prefix = format!("outbound_{p}_route");
        for status in [good, bad] {
            check(&client, &format!("{prefix}_request_statuses_total"), &[&parent, "hostname=\"\"", status], &[]);
            check(&client, &format!("{prefix}_backend_response_statuses_total"), &[&parent, &backend, status], &[]);
        }
        check(&client, &format!("{prefix}_request_duration_seconds_bucket"), &["{le=\"0.05\",", &parent], &[]);
        check(
            &client,
            &format!("{prefix}_request_duration_seconds_count"),
            &[&parent, "hostname=\"\""],
            &["http_status"],
        );
        check(
            &client,
            &format!("{prefix}_backend_response_duration_seconds_bucket"),
            &["{le=\"0.025\",", &backend],
            &[],
        );
        for family in ["requests", "successes", "limit_exceeded", "overflow"] {
            check(&client, &format!("{prefix}_retry_{family}_total"), &[&parent], &[]);
        }
        check(&client, &format!("{prefix}_backend_requests_total"), &[&parent, &backend], &[]);
    }
    check(
        &client,
        "outbound_http_route_request_duration_seconds_count",
        &["route_group=\"\",route_kind=\"default\",route_namespace=\"\",route_name=\"http\""],
        &[],
    );
    for page in [&client, &server] {
        for family in [
            "process_start_time_seconds",
            "process_cpu_seconds_total",
            "process_resident_memory_bytes",
            "process_virtual_memory_bytes",
            "process_open_fds",
            "process_max_fds",
            "process_threads",
            "control_identity_cert_expiration_timestamp_seconds",
            "proxy_build_info",
            "manifests_generation",
        ] {
            check(page, family, &[], &[]);
        }
        check(page, "rustls_info", &["tls_suites=\"TLS13_AES_128_GCM_SHA256,", "tls_kx_groups=\"X25519MLKEM768,"], &[]);
        check(page, "proxy_unhealthy", &["condition=\"certificate_expired\"} 0"], &[]);
        assert!(page.ends_with("# EOF\n") && !page.contains(",,"));
        let known = ["exported_", "{namespace=", ",namespace=", ",pod=", ",deployment=", "instance=", ",job="];
        assert!(!known.iter().any(|word| page.contains(word)), "labels that relabelling writes");
    }
    should(&client, &server);
    // The denied request ended where policy said so; what the retried one ended with was the application's own answer.
    check(
        &server,
        "terminations_total",
        &["direction=\"inbound\",phase=\"policy\",by=\"policy\",code=\"policy-unauthorized\""],
        &[],
    );
    assert!(!client.contains("terminations_total{"), "nothing that the client's proxy did ended badly");
}

/// The families that nothing shipped reads, as far as this traffic moves them (metrics.md 5).
fn should(client: &str, server: &str) {
    let route = ["parent_group=\"policy.linkerd.io\",parent_kind=\"server\",parent_name=\"web\",parent_port=\"8080\""];
    for family in ["requests_total", "request_duration_seconds_count", "response_duration_seconds_bucket"] {
        check(server, &format!("inbound_http_{family}"), &route, &["parent_namespace"]);
    }
    for family in ["request_frame_size_bytes_bucket", "response_frame_size_bytes_bucket"] {
        check(server, &format!("inbound_http_{family}"), &route, &[]);
    }
    check(server, "inbound_http_statuses_total", &[route[0], "status=\"200\""], &[]);
    let web = "srv_name=\"web\",srv_port=\"8080\"";
    for result in ["not_http", "http/1", "http/2", "read_timeout", "error"] {
        check(server, "inbound_tcp_detect_http_results_total", &[&format!("result=\"{result}\""), web], &[]);
        let parent = ["parent_name=\"web\",parent_port=\"80\"", &format!("result=\"{result}\"")];
        check(client, "outbound_tcp_detect_http_results_total", &parent, &[]);
    }
    check(server, "inbound_tcp_detect_http_duration_seconds_bucket", &["le=\"0.001\"", web], &[]);
    check(client, "outbound_tcp_detect_http_duration_seconds_bucket", &["le=\"0.001\"", "parent_port=\"90\""], &[]);
    check(server, "inbound_tcp_authz_allow_total", &["target_port=\"9000\"", "authz_kind=\"default\""], &["direction"]);
    for (protocol, port) in [("detect", 80), ("http/2", 82), ("http/2", 83), ("detect", 90)] {
        let labels = [&*format!("protocol=\"{protocol}\""), &*format!("parent_port=\"{port}\"")];
        check(client, "outbound_tcp_protocol_connections_total", &labels, &[]);
    }
    for op in ["Send", "Recv"] {
        check(
            client,
            "outbound_tcp_transfer_cost_bytes_total",
            &[&format!("op=\"{op}\""), "zone_locality=\"Unknown\""],
            &[],
        );
    }
    let tcp = "parent_port=\"90\"";
    check(client, "outbound_tcp_route_open_total", &[tcp, "target_ip=\"10.96.0.10\",target_port=\"90\""], &[]);
    check(client, "outbound_tcp_route_close_total", &[tcp, "error=\"\""], &[]);
    for (balancer, labels) in [
        ("outbound_http_balancer", &["parent_port=\"80\"", "backend_port=\"80\""][..]),
        (
            "outbound_tcp_balancer",
            &[tcp, "logical=\"web.shop.svc.cluster.local:90\"", "concrete=\"web.shop.svc.cluster.local:90\""],
        ),
    ] {
        for family in [
            "p2c_endpoints",
            "endpoints",
            "queue_length",
            "queue_requests_total",
            "queue_latency_seconds_bucket",
            "queue_gate_open_total",
            "queue_gate_shut_total",
            "queue_gate_open_time_seconds",
            "queue_gate_shut_time_seconds",
            "queue_gate_timeout_seconds",
        ] {
            check(client, &format!("{balancer}_{family}"), labels, &[]);
        }
        for op in ["Reset", "Add", "Remove"] {
            check(client, &format!("{balancer}_p2c_updates_total"), &[&format!("op=\"{op}\""), labels[0]], &[]);
        }
    }
    for family in ["route_request_frame_size_bytes_bucket", "route_backend_response_frame_size_bytes_bucket"] {
        for p in ["http", "grpc"] {
            check(client, &format!("outbound_{p}_{family}"), &["le=\"128.0\""], &[]);
        }
    }
    for page in [client, server] {
        for client in ["identity", "destination", "policy", "trace_collector"] {
            check(
                page,
                "control_dns_resolutions_total",
                &[&format!("client=\"{client}\""), "record_type=\"SRV\""],
                &[],
            );
        }
        check(page, "control_identity_cert_refreshes_total", &["result=\"ok\""], &[]);
        check(page, "control_identity_cert_refresh_timestamp_seconds", &[], &[]);
        for family in ["streams", "requests"] {
            check(page, &format!("opentelemetry_span_export_{family}"), &[], &[]);
        }
        for family in ["workers", "injection_queue_depth", "park_total", "busy_seconds_total"] {
            check(page, &format!("tokio_rt_{family}"), &[], &[]);
        }
        for family in ["uptime_seconds_total", "clock_time_seconds", "network_receive_bytes_total"] {
            check(page, &format!("process_{family}"), &[], &[]);
        }
    }
}
