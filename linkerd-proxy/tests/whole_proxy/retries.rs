//! Retries: conditions, limit, per-try timeout, backoff, replay of the body, budget, and the headers that ask for them.

use crate::{
    apps,
    control_plane::ControlPlane,
    scripted::{Ask, Kind, ONE, Scripted, Stage, Told, address, route, service},
    world::World,
};
use futures_util::future::join_all;
use linkerd2_proxy_api::outbound::proxy_protocol::Kind as Protocol;
use std::time::Duration;

const KIB: usize = 1024;
const GRPC: Ask<'_> = Ask { id: "", script: "", kind: Kind::Grpc, body: 7, headers: &[] };
const HTTP2: Ask<'_> = Ask { kind: Kind::Http2, body: 0, ..GRPC };
const HTTP1: Ask<'_> = Ask { kind: Kind::Http1, ..HTTP2 };

/// A Service, what is asked of it, the status that is told (of gRPC if it has one), and the bodies of all attempts.
type Case<'a> = (u8, Ask<'a>, &'a str, &'a [usize]);

fn status(told: &Told) -> String {
    match told.header("grpc-status") {
        "" => told.status.to_string(),
        code => format!("grpc {code}"),
    }
}

/// Least time between attempts.
fn gap(app: &Scripted, id: &str) -> Duration {
    let attempts = app.attempts(id);
    attempts.windows(2).map(|pair| pair[1].at - pair[0].at).min().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn conditions_limits_backoff_and_bodies() {
    let manifests = [
        service(0, &[("retry.linkerd.io/http", "5xx,429"), ("retry.linkerd.io/limit", "2")], ONE),
        service(
            1,
            &[("retry.linkerd.io/grpc", "unavailable,resource-exhausted"), ("retry.linkerd.io/limit", "2")],
            ONE,
        ),
        service(2, &[("retry.linkerd.io/http", "gateway-error"), ("retry.linkerd.io/timeout", "200ms")], ONE),
        service(3, &[], ONE),
        route(3, "retry: {codes: [500], attempts: 2, backoff: 150ms}, timeouts: {request: 9s, backendRequest: 300ms}"),
        service(4, &[], ONE),
        service(5, &[("retry.linkerd.io/http", "5xx"), ("retry.linkerd.io/max-request-bytes", "100000")], ONE),
        service(6, &[("retry.linkerd.io/request-headers", "true")], ONE),
    ];
    let Some(stage) = Stage::new("retries", &manifests.concat(), &[]).await else { return };
    let cases: &[Case<'_>] = &[
        // Statuses in ranges; the last answer is told when the limit is reached.
        (0, Ask { id: "ranges", script: "503,429,200", ..HTTP1 }, "200", &[0; 3]),
        (0, Ask { id: "ranges-h2", script: "500,200", ..HTTP2 }, "200", &[0; 2]),
        (0, Ask { id: "limit", script: "503,502,501", ..HTTP1 }, "501", &[0; 3]),
        (0, Ask { id: "other", script: "404,200", ..HTTP1 }, "404", &[0]),
        (2, Ask { id: "gateway", script: "500,200", ..HTTP1 }, "500", &[0]),
        (4, Ask { id: "none", script: "503,200", ..HTTP1 }, "503", &[0]),
        // Codes in trailers and in headers.
        (1, Ask { id: "grpc", script: "grpc:14,grpc!8,grpc:0", ..GRPC }, "grpc 0", &[7; 3]),
        (1, Ask { id: "grpc-other", script: "grpc:13,grpc:0", ..GRPC }, "grpc 13", &[7]),
        // The time for one try is not that of the last.
        (2, Ask { id: "per-try", script: "hang,200", ..HTTP1 }, "200", &[0; 2]),
        (2, Ask { id: "last-try", script: "hang,slow:400", ..HTTP1 }, "200", &[0; 2]),
        // A route's own stanza: attempts that met its limit in time are retried, too.
        (3, Ask { id: "stanza", script: "500,hang,200", ..HTTP1 }, "200", &[0; 3]),
        (3, Ask { id: "stanza-other", script: "503,200", ..HTTP1 }, "503", &[0]),
        // What was sent is sent again, if all of it was kept.
        (0, Ask { id: "kept", script: "503,200", body: 64 * KIB, ..HTTP1 }, "200", &[64 * KIB; 2]),
        (0, Ask { id: "kept-h2", script: "503,200", body: 64 * KIB, ..HTTP2 }, "200", &[64 * KIB; 2]),
        (5, Ask { id: "kept-longer", script: "503,200", body: 100_000, ..HTTP1 }, "200", &[100_000; 2]),
        // The request asks for it itself.
        (6, Ask { id: "asked", script: "503,200", headers: &[("l5d-retry-http", "503")], ..HTTP1 }, "200", &[0; 2]),
        (0, Ask { id: "too-long", script: "503,200", body: 64 * KIB + 1, ..HTTP1 }, "503", &[64 * KIB + 1]),
    ];
    let run = async |(to, ask, wanted, bodies): &Case<'_>| {
        let told = stage.ask(*to, *ask).await;
        let seen: Vec<_> = stage.one.attempts(ask.id).iter().map(|attempt| attempt.body).collect();
        let good = status(&told) == *wanted && seen == *bodies;
        (!good).then(|| format!("{}: wanted {wanted} {bodies:?}, got {seen:?} {told:?}", ask.id))
    };
    let wrong: Vec<_> = join_all(cases.iter().map(run)).await.into_iter().flatten().collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(gap(&stage.one, "ranges") >= Duration::from_millis(25));
    assert!(gap(&stage.one, "stanza") >= Duration::from_millis(150));

    // Of unknown length, and longer than is kept.
    let mut io = stage.client.connect(address(0)).await.unwrap();
    let head = "POST / HTTP/1.1\r\nhost: a\r\nx-id: chunked\r\nx-script: 503,200\r\ntransfer-encoding: chunked\r\n\r\n";
    let body = format!("11000\r\n{}\r\n0\r\n\r\n", "x".repeat(0x11000));
    tokio::io::AsyncWriteExt::write_all(&mut io, (head.to_string() + &body).as_bytes()).await.unwrap();
    apps::expect_text(&mut io, "HTTP/1.1 503 ").await;
    assert_eq!(stage.one.attempts("chunked").len(), 1);

    let metric = async |name: &str| {
        let family = format!("outbound_http_route_retry_{name}_total");
        stage.world.metric("client", &family, &["parent_name=\"s0\""]).await
    };
    assert_eq!(metric("limit_exceeded").await, 1.0);
    assert_eq!(metric("successes").await, 4.0);
    assert_eq!(metric("requests").await, 7.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_budget_bounds_what_retries_add() {
    let budget = "apiVersion: gateway.networking.x-k8s.io/v1alpha1
kind: XBackendTrafficPolicy
metadata: {name: budget, namespace: shop}
spec:
  targetRefs: [{group: \"\", kind: Service, name: s0}]
  retryConstraint: {budget: {percent: 20, interval: 10s}, minRetryRate: {count: 3, interval: 10s}}
";
    let web = service(0, &[("retry.linkerd.io/http", "5xx"), ("retry.linkerd.io/limit", "3")], ONE);
    let Some(stage) = Stage::new("retry-budget", &(web + budget), &[]).await else { return };
    for _ in 0..10 {
        let told = join_all((0..4).map(|_| stage.ask(0, Ask { script: "503", ..HTTP1 }))).await;
        assert!(told.iter().all(|told| told.status == 503), "{told:?}");
    }
    let retries = stage.one.count() - 40;
    // A fifth of 40, and the least rate: 3 in 10 s, which is a whole one each second.
    assert!((8..=18).contains(&retries), "{retries}");
    assert!(stage.world.metric("client", "outbound_http_route_retry_overflow_total", &[]).await > 20.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn headers_ask_for_retries_and_timeouts_where_the_route_lets_them() {
    let Some(mut world) = World::new("l5d-headers") else { return };
    let client = world.meshed("client", &[], &[]);
    let server = world.plain("server", &[]);
    let app = Scripted::new(&server, 8080, "server");
    let control = ControlPlane::new(&world);
    for (n, name) in [(0, "strict"), (1, "open")] {
        control.service(address(n), name);
        control.endpoints(name, &[(server.addr(8080), None)]);
    }
    control.edit(address(1), |policy| {
        let Some(Protocol::Http1(http)) = policy.protocol.as_mut().and_then(|p| p.kind.as_mut()) else { panic!() };
        http.routes[0].rules[0].allow_l5d_request_headers = true;
    });
    control.spawn(&mut world, &client, &[]);
    world.wait_ready("client").await;

    let retry = [("l5d-retry-http", "5xx,429"), ("l5d-retry-limit", "2")];
    let cases = [
        (0, "strict", "503,200", &retry[..], 503, 1),
        (1, "retry", "503,429,200", &retry, 200, 3),
        (1, "retry-other", "404,200", &retry, 404, 1),
        (1, "once", "503,503,200", &retry[..1], 503, 2),
        (1, "per-try", "hang,200", &[("l5d-retry-http", "5xx"), ("l5d-retry-timeout", "200ms")], 200, 2),
        (1, "request", "hang", &[("l5d-timeout", "200ms")], 504, 1),
        (1, "response", "hang", &[("l5d-response-timeout", "200ms")], 504, 1),
        (0, "not-limited", "slow:500", &[("l5d-timeout", "200ms")], 200, 1),
        (1, "nonsense", "503,200", &[("l5d-retry-limit", "many"), ("l5d-timeout", "soon")], 503, 1),
    ];
    join_all(cases.iter().map(async |(to, id, script, headers, status, attempts)| {
        let told = Ask { id, script, headers, ..HTTP1 }.to(&client, address(*to)).await;
        let seen = app.attempts(id);
        assert_eq!((told.status, seen.len()), (*status, *attempts), "{id}: {told:?}");
        // The application sees them only where they mean nothing to the proxy.
        let passed = seen[0].headers.keys().any(|name| name.as_str().starts_with("l5d-"));
        assert_eq!(passed, *to == 0, "{id}: {:?}", seen[0].headers);
    }))
    .await;
}
