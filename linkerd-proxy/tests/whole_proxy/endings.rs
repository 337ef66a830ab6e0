//! What is told of requests and connections that end: the access log, termination codes, health, and the operator's page.

use crate::{
    apps,
    world::{World, service},
};
use bytes::Bytes;
use http::{Request, StatusCode};
use http_body_util::Full;
use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};
use tokio::io::AsyncWriteExt;

const WEB: ([u8; 4], u16) = ([10, 96, 0, 10], 80);
const CLIENT_ID: &str = "client.shop.serviceaccount.identity.linkerd.cluster.local";

/// A client and a server with a Service; the server's proxy has an access log.
async fn pair(test: &str, format: &str) -> Option<(World, crate::net::Pod, apps::App)> {
    let mut world = World::new(test)?;
    let client = world.meshed("client", &[], &[]);
    let server = world.meshed("server", &[("http", 8080)], &[]);
    let ports = [("http", 80, "http", None), ("nobody", 81, "1", None)];
    world.manifest("web", &service("web", "server", &["10.96.0.10"], &ports));
    world.spawn("server", &[("LINKERD2_PROXY_ACCESS_LOG", format), ("LINKERD2_PROXY_SHUTDOWN_GRACE_PERIOD", "500ms")]);
    world.start(&["client"]).await;
    world.wait_ready("server").await;
    let app = apps::http(&server, 8080, "server");
    Some((world, client, app))
}

/// Lines of the access log; the proxy's other lines do not begin with `{`.
fn lines(world: &World) -> Vec<serde_json::Value> {
    world
        .log("server")
        .lines()
        .filter(|l| l.starts_with("{\"client.addr\""))
        .map(|l| serde_json::from_str(l).unwrap())
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_access_log_is_in_order_and_soon_written() {
    let Some((world, client, _app)) = pair("access-json", "json").await else { return };
    let mut send = apps::http1(&client, WEB.into()).await;
    let started = Instant::now();
    for i in 0..20 {
        let req = Request::get(format!("/n/{i}?q=x"))
            .header("host", "web.shop")
            .header("user-agent", "test/1")
            .header("x-request-id", format!("r{i}"));
        send.ready().await.unwrap();
        apps::read(send.send_request(req.body(Full::default()).unwrap()).await.unwrap()).await.unwrap();
    }
    let ended = Instant::now();
    world.eventually("all lines are written", async || lines(&world).len() == 20).await;
    assert!(ended.elapsed() < Duration::from_secs(1), "lines are seen within a second: {:?}", ended.elapsed());
    let lines = lines(&world);
    for (i, line) in lines.iter().enumerate() {
        assert_eq!(line["trace_id"], format!("r{i}"), "in order");
        assert_eq!(line["client.id"], CLIENT_ID);
        assert_eq!((&line["status"], &line["method"], &line["host"]), (&200.into(), &"GET".into(), &"web.shop".into()));
        assert_eq!(line["user_agent"], "test/1");
        assert!(line["uri"].as_str().unwrap().contains(&format!("/n/{i}?q=")), "{line}");
        let total: u128 = line["total_ns"].as_str().unwrap().parse().unwrap();
        assert!(total < started.elapsed().as_nanos());
        assert!(line.get("termination").is_none(), "nothing went wrong: {line}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_apache_format() {
    let Some((world, client, _app)) = pair("access-apache", "apache").await else { return };
    assert_eq!(apps::get(&client, WEB.into(), "/a", &[]).await.unwrap().status, StatusCode::OK);
    let line = || world.log("server").lines().find(|l| l.contains("/a HTTP/")).map(str::to_string);
    world.eventually("the line is written", async || line().is_some()).await;
    let line = line().unwrap();
    let words: Vec<_> = line.split(' ').collect();
    assert!(words[0].parse::<SocketAddr>().is_ok(), "{line}");
    assert_eq!(&words[1..3], [CLIENT_ID, "-"], "{line}");
    assert!(words[3].starts_with("[20") && words[3].ends_with("Z]"), "{line}");
    assert!(line.contains("\"GET ") && line.contains("/a HTTP/") && line.ends_with("\" 200"), "{line}");
}

/// Who ended it: in the log, in the metric, and where the client is told, in a header.
#[tokio::test(flavor = "multi_thread")]
async fn a_canceled_request_and_one_that_nobody_takes() {
    let Some((world, client, _app)) = pair("terminations", "json").await else { return };
    let mut send = apps::http2(&client, WEB.into()).await;
    let req = Request::get("http://web.shop/sleep/60000").body(Full::<Bytes>::default()).unwrap();
    let request = tokio::spawn(async move { send.send_request(req).await.map(|_| ()) });
    world
        .eventually("the request is in flight", async || {
            world.metric("server", "request_total", &["direction=\"inbound\"", "target_port=\"8080\""]).await >= 1.0
        })
        .await;
    request.abort();
    let canceled = ["phase=\"request\",by=\"client\",code=\"request-canceled\""];
    for (name, direction) in [("client", "direction=\"outbound\""), ("server", "direction=\"inbound\"")] {
        world
            .eventually(&format!("the cancellation is counted by {name}"), async || {
                world.metric(name, "terminations_total", &[direction, canceled[0]]).await == 1.0
            })
            .await;
    }
    world.eventually("the line is written", async || lines(&world).len() == 1).await;
    assert_eq!(lines(&world)[0]["termination"], "request-canceled");

    // Nothing listens on this port of the server: its proxy says so, to the client's proxy.
    let answer = apps::get(&client, (WEB.0, 81).into(), "/", &[]).await.unwrap();
    assert_eq!(answer.status, StatusCode::BAD_GATEWAY);
    world.eventually("the line is written", async || lines(&world).len() == 2).await;
    assert_eq!(lines(&world)[1]["termination"], "connect-failed");
    let failed = ["phase=\"connect\",by=\"server\",code=\"connect-failed\""];
    assert_eq!(world.metric("server", "terminations_total", &failed).await, 1.0);
    assert!(!answer.headers.contains_key("l5d-proxy-termination"), "that was between the proxies");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_endpoint_that_is_gone_is_named_to_the_client() {
    let Some(mut world) = World::new("gone") else { return };
    let client = world.meshed("client", &[], &[]);
    let stranger = world.plain("stranger", &[]);
    world.start(&["client"]).await;
    let answer = apps::get(&client, stranger.addr(8080), "/", &[]).await.unwrap();
    assert_eq!(answer.status, StatusCode::BAD_GATEWAY);
    assert_eq!(answer.headers["l5d-proxy-termination"], "connect-failed");
    let failed = ["direction=\"outbound\",phase=\"connect\",by=\"server\",code=\"connect-failed\""];
    assert_eq!(world.metric("client", "terminations_total", &failed).await, 1.0);
    // A connection that is no HTTP ends for the same reason.
    let mut io = client.connect(stranger.addr(9000)).await.unwrap();
    io.write_all(b"\x01\x02\x03 not http\r\n").await.unwrap();
    world
        .eventually("the connection is counted", async || {
            world.metric("client", "terminations_total", &failed).await == 2.0
        })
        .await;
}

/// What the end of the drain cuts has its line, with who cut it.
#[tokio::test(flavor = "multi_thread")]
async fn requests_that_a_drain_cuts_are_logged_as_such() {
    let Some((mut world, client, _app)) = pair("cut", "json").await else { return };
    let mut send = apps::http2(&client, WEB.into()).await;
    let req = Request::get("http://web.shop/sleep/60000").body(Full::<Bytes>::default()).unwrap();
    let request = tokio::spawn(async move { send.send_request(req).await.map(|_| ()) });
    world
        .eventually("the request is in flight", async || {
            world.metric("server", "request_total", &["direction=\"inbound\"", "target_port=\"8080\""]).await >= 1.0
        })
        .await;
    world.terminate("server");
    assert_eq!(world.exit_code("server").await, Some(0));
    let lines = lines(&world);
    assert_eq!(lines.len(), 1, "{}", world.log("server"));
    assert_eq!(lines[0]["termination"], "drain-cut");
    request.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn refused_manifests_are_unhealthy_and_yet_ready() {
    let Some(mut world) = World::new("unhealthy") else { return };
    world.meshed("server", &[("http", 8080)], &[]);
    world.start(&["server"]).await;
    let verbose = async || world.admin("server", "GET", "/ready?verbose").await.unwrap();
    assert_eq!(verbose().await, (200, "ready\n[+] certificate\n".into()));
    let unhealthy = async || world.metric("server", "proxy_unhealthy", &["condition=\"manifests_refused\""]).await;
    assert_eq!(unhealthy().await, 0.0);

    world
        .manifest("bad", "apiVersion: v1\nkind: Service\nmetadata: {name: x, namespace: shop}\nspec: {clusterIP: 7}\n");
    world.eventually("the metric says so", async || unhealthy().await == 1.0).await;
    let (status, body) = verbose().await;
    assert_eq!(status, 200);
    assert!(body.contains("[-] manifests_refused: "), "{body}");
    assert_eq!(world.admin("server", "GET", "/ready").await.unwrap(), (200, "ready\n".into()));
}

/// The Linkerd proxy, whose control plane refuses connections.
#[tokio::test(flavor = "multi_thread")]
async fn a_lost_control_plane_is_told() {
    let Some(mut world) = World::new("lost") else { return };
    world.plain("server", &[]);
    let anchors = std::fs::read_to_string(world.dir.join("identity/ca.crt")).unwrap();
    let dir = world.dir.join("end-entity");
    std::fs::create_dir(&dir).unwrap();
    std::fs::write(dir.join("token"), "token").unwrap();
    let (dir, token) = (dir.display().to_string(), dir.join("token").display().to_string());
    let name = |service: &str| format!("{service}.linkerd.serviceaccount.identity.linkerd.cluster.local");
    let (destination, policy, identity) =
        (name("linkerd-destination"), name("linkerd-destination"), name("linkerd-identity"));
    world.spawn_linkerd(
        "server",
        &[
            ("LINKERD2_PROXY_DESTINATION_SVC_ADDR", "127.0.0.1:1"),
            ("LINKERD2_PROXY_DESTINATION_SVC_NAME", &destination),
            ("LINKERD2_PROXY_POLICY_SVC_ADDR", "127.0.0.1:1"),
            ("LINKERD2_PROXY_POLICY_SVC_NAME", &policy),
            ("LINKERD2_PROXY_POLICY_WORKLOAD", "shop:server"),
            ("LINKERD2_PROXY_IDENTITY_SVC_ADDR", "127.0.0.1:1"),
            ("LINKERD2_PROXY_IDENTITY_SVC_NAME", &identity),
            ("LINKERD2_PROXY_IDENTITY_LOCAL_NAME", "server.shop.serviceaccount.identity.linkerd.cluster.local"),
            ("LINKERD2_PROXY_IDENTITY_DIR", &dir),
            ("LINKERD2_PROXY_IDENTITY_TOKEN_FILE", &token),
            ("LINKERD2_PROXY_IDENTITY_TRUST_ANCHORS", &anchors),
            ("LINKERD2_PROXY_INBOUND_PORTS", "8080"),
        ],
    );
    world
        .eventually("the metric says so", async || {
            world.admin("server", "GET", "/metrics").await.is_ok()
                && world.metric("server", "proxy_unhealthy", &["condition=\"control_plane_lost\""]).await == 1.0
        })
        .await;
    let (status, body) = world.admin("server", "GET", "/ready?verbose").await.unwrap();
    assert_eq!(status, 503, "there is no certificate yet");
    assert!(body.starts_with("not ready\n[-] certificate: none has been installed yet\n"), "{body}");
    assert!(body.contains("[-] control_plane_lost: ") && body.contains("127.0.0.1:1"), "{body}");
    world.terminate("server");
    assert_eq!(world.exit_code("server").await, Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn series_beyond_the_bound_are_summed_and_told() {
    let Some(mut world) = World::new("bound") else { return };
    let client = world.meshed("client", &[], &[]);
    let stranger = world.plain("stranger", &[]);
    world.spawn("client", &[("LINKERD2_PROXY_METRICS_MAX_SERIES", "2")]);
    world.wait_ready("client").await;
    let _apps: Vec<_> = (1..=4).map(|n| apps::http(&stranger, 8080 + n, "stranger")).collect();
    for n in 1..=4 {
        assert_eq!(apps::get(&client, stranger.addr(8080 + n), "/", &[]).await.unwrap().status, StatusCode::OK);
    }
    // One of the two is the admin port's, which the scrapes and probes of this test count on.
    assert_eq!(world.metric("client", "request_total", &["series=\"other\""]).await, 3.0);
    assert!(world.metric("client", "telemetry_series_overflow_total", &["family=\"request\""]).await >= 3.0);
    assert_eq!(world.metric("client", "proxy_unhealthy", &["condition=\"bound_exhausted\""]).await, 1.0);
    let (status, body) = world.admin("client", "GET", "/ready?verbose").await.unwrap();
    assert!(status == 200 && body.contains("[-] bound_exhausted: ") && body.contains("request"), "{body}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_page_shows_ports_targets_and_replicas() {
    let Some((world, client, _app)) = pair("page", "json").await else { return };
    assert_eq!(apps::get(&client, WEB.into(), "/a", &[]).await.unwrap().status, StatusCode::OK);
    let (status, page) = world.admin("client", "GET", "/").await.unwrap();
    assert_eq!(status, 200);
    for word in
        ["<h2>health", "<h2>identity", "<h2>inbound", "<h2>manifests", "<h2>outbound", CLIENT_ID, "10.96.0.10:80"]
    {
        assert!(page.contains(word), "{word} is not on\n{page}");
    }
    let (_, json) = world.admin("client", "GET", "/status/outbound.json").await.unwrap();
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    let target =
        json["targets"].as_array().unwrap().iter().find(|t| t["target"] == "10.96.0.10:80").expect("the target");
    assert_eq!(target["parent"], "Service.shop.web:80");
    let (_, json) = world.admin("server", "GET", "/status/inbound.json").await.unwrap();
    assert!(json.contains("8080"), "{json}");
    for path in ["/status.json", "/status/manifests.json", "/status/identity.json", "/status/health.json"] {
        let (status, json) = world.admin("server", "GET", path).await.unwrap();
        assert!(status == 200 && serde_json::from_str::<serde_json::Value>(&json).is_ok(), "{path}: {json}");
    }
    assert_eq!(world.admin("server", "GET", "/status/nothing.json").await.unwrap().0, 404);
}
