//! Every protocol from pod to pod, through both proxies.

use crate::{
    apps,
    net::Pod,
    world::{World, service},
};
use bytes::Bytes;
use http::{Request, StatusCode, Version};
use http_body_util::Full;
use hyper_util::rt::TokioIo;
use std::net::SocketAddr;
use tokio::io::AsyncWriteExt;

const WEB4: &str = "10.96.0.10";
const WEB6: &str = "fd96::10";
const CLIENT_ID: &str = "client.shop.serviceaccount.identity.linkerd.cluster.local";

/// Client and server with a Service that has a port for each protocol.
async fn pair(test: &str) -> Option<(World, Pod, Pod)> {
    let mut world = World::new(test)?;
    let client = world.meshed("client", &[], &[]);
    let server = world.meshed(
        "server",
        &[("http", 8080), ("tcp", 9000), ("mail", 9025)],
        &[("config.linkerd.io/opaque-ports", "9025")],
    );
    world.manifest(
        "web",
        &service(
            "web",
            "server",
            &[WEB4, WEB6],
            &[
                ("http", 80, "http", None),
                ("h1", 81, "http", Some("http")),
                ("h2", 82, "http", Some("kubernetes.io/h2c")),
                ("tcp", 90, "tcp", None),
                ("mail", 25, "mail", Some("linkerd.io/opaque")),
            ],
        ),
    );
    world.start(&["client", "server"]).await;
    Some((world, client, server))
}

fn web(port: u16) -> SocketAddr {
    SocketAddr::new(WEB4.parse().unwrap(), port)
}

#[tokio::test(flavor = "multi_thread")]
async fn http1_over_ipv4_and_ipv6() {
    let Some((_world, client, server)) = pair("http1").await else { return };
    let _app = apps::http(&server, 8080, "server");
    for addr in [web(80), web(81), SocketAddr::new(WEB6.parse().unwrap(), 80)] {
        let answer = apps::get(&client, addr, "/hello", &[]).await.unwrap();
        assert_eq!((answer.status, &*answer.body), (StatusCode::OK, "server GET /hello"), "{addr}");
        assert_eq!(answer.headers["x-version"], "HTTP/1.1", "the application sees the client's version");
        assert_eq!(answer.headers["x-client-id"], CLIENT_ID);
        assert!(!answer.headers.contains_key("l5d-orig-proto"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_forged_client_id_is_replaced() {
    let Some((_world, client, server)) = pair("forged").await else { return };
    let _app = apps::http(&server, 8080, "server");
    let answer = apps::get(&client, web(80), "/", &[("l5d-client-id", "admin.shop")]).await.unwrap();
    assert_eq!(answer.headers["x-client-id"], CLIENT_ID);
}

#[tokio::test(flavor = "multi_thread")]
async fn http2_with_and_without_detection() {
    let Some((_world, client, server)) = pair("http2").await else { return };
    let _app = apps::http(&server, 8080, "server");
    for port in [80, 82] {
        let mut send = apps::http2(&client, web(port)).await;
        let req = Request::post("http://web.shop/echo").version(Version::HTTP_2).body(Full::new(Bytes::from("ping")));
        let answer = apps::read(send.send_request(req.unwrap()).await.unwrap()).await.unwrap();
        assert_eq!((answer.status, &*answer.body), (StatusCode::OK, "ping"));
        assert_eq!(answer.headers["x-version"], "HTTP/2.0");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn grpc_keeps_its_trailers() {
    let Some((_world, client, server)) = pair("grpc").await else { return };
    let _app = apps::http(&server, 8080, "server");
    let mut send = apps::http2(&client, web(80)).await;
    let req = Request::post("http://web.shop/pkg.Service/Method")
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(Full::new(Bytes::from_static(b"\0\0\0\0\x02hi")));
    let answer = apps::read(send.send_request(req.unwrap()).await.unwrap()).await.unwrap();
    assert_eq!(answer.status, StatusCode::OK);
    assert_eq!(answer.trailers["grpc-status"], "0");
}

#[tokio::test(flavor = "multi_thread")]
async fn websocket_upgrades_to_a_byte_stream() {
    let Some((_world, client, server)) = pair("websocket").await else { return };
    let _app = apps::http(&server, 8080, "server");
    let mut send = apps::http1(&client, web(80)).await;
    let req =
        Request::get("/chat").header("host", "web.shop").header("connection", "Upgrade").header("upgrade", "websocket");
    let rsp = send.send_request(req.body(Full::default()).unwrap()).await.unwrap();
    assert_eq!(rsp.status(), StatusCode::SWITCHING_PROTOCOLS);
    let mut io = TokioIo::new(hyper::upgrade::on(rsp).await.unwrap());
    for text in ["one", "another"] {
        io.write_all(text.as_bytes()).await.unwrap();
        apps::expect_text(&mut io, text).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn bytes_that_are_no_http_are_forwarded() {
    let Some((world, client, server)) = pair("opaque").await else { return };
    let _app = apps::tcp_echo(&server, 9000);
    let mut io = client.connect(web(90)).await.unwrap();
    io.write_all(b"\x00\x01 not http\r\n").await.unwrap();
    apps::expect_text(&mut io, "\x00\x01 not http\r\n").await;
    io.shutdown().await.unwrap();
    apps::expect_text(&mut io, "").await;
    let tls = world.metric("server", "tcp_open_total", &["direction=\"inbound\"", "peer=\"src\"", CLIENT_ID]).await;
    assert!(tls >= 1.0, "the connection between the proxies must be mutual TLS");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_speaks_first_on_a_declared_opaque_port_is_heard_at_once() {
    let Some((_world, client, server)) = pair("mail").await else { return };
    let _app = apps::server_first(&server, 9025, "220 mail ready\r\n");
    let started = std::time::Instant::now();
    let mut io = client.connect(web(25)).await.unwrap();
    apps::expect_text(&mut io, "220 mail ready\r\n").await;
    assert!(started.elapsed().as_secs() < 5, "detection must not be waited for");
    io.write_all(b"EHLO x\r\n").await.unwrap();
    apps::expect_text(&mut io, "EHLO x\r\n").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_speaks_first_on_a_detected_port_is_heard_too() {
    let Some((_world, client, server)) = pair("first").await else { return };
    let _app = apps::server_first(&server, 9000, "hello\n");
    let mut io = client.connect(web(90)).await.unwrap();
    apps::expect_text(&mut io, "hello\n").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn unknown_destinations_are_forwarded_as_they_are() {
    let Some(mut world) = World::new("unknown") else { return };
    let client = world.meshed("client", &[], &[]);
    let stranger = world.plain("stranger", &[]);
    world.start(&["client"]).await;
    let _app = apps::http(&stranger, 8080, "stranger");
    let answer = apps::get(&client, stranger.addr(8080), "/", &[]).await.unwrap();
    assert_eq!((answer.status, &*answer.body), (StatusCode::OK, "stranger GET /"));
    assert!(!answer.headers.contains_key("x-client-id"));
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_outside_the_mesh_are_served_in_plaintext() {
    let Some(mut world) = World::new("plain") else { return };
    let stranger = world.plain("stranger", &[]);
    let server = world.meshed("server", &[("http", 8080)], &[]);
    world.start(&["server"]).await;
    let _app = apps::http(&server, 8080, "server");
    let answer = apps::get(&stranger, server.addr(8080), "/", &[("l5d-client-id", CLIENT_ID)]).await.unwrap();
    assert_eq!((answer.status, &*answer.body), (StatusCode::OK, "server GET /"));
    assert!(!answer.headers.contains_key("x-client-id"), "an identity that was not proved must not arrive");
}
