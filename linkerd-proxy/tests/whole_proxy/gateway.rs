//! A gateway between two networks: clients reach Services behind it by name, and nothing else.

use crate::{
    apps,
    net::Pod,
    world::{World, service},
};
use http::StatusCode;
use std::{fmt::Write as _, net::SocketAddr};

const GATEWAY: &str = "gateway.shop.serviceaccount.identity.linkerd.cluster.local";

/// A mirror of a remote Service, as the service mirror makes it: all its ports are the gateway's.
fn mirror(name: &str, ip: &str, remote: &str, gateway: &Pod) -> String {
    let mut yaml = String::new();
    write!(
        yaml,
        "apiVersion: v1\nkind: Service\nmetadata:\n  name: {name}\n  namespace: shop\n  labels: {{mirror.linkerd.io/cluster-name: east}}\n  annotations: {{mirror.linkerd.io/remote-svc-fq-name: {remote}, mirror.linkerd.io/remote-gateway-identity: {GATEWAY}}}\nspec: {{clusterIP: {ip}, ports: [{{name: http, port: 80}}, {{name: tcp, port: 90, appProtocol: linkerd.io/opaque}}]}}\n---\n\
         apiVersion: v1\nkind: Endpoints\nmetadata: {{name: {name}, namespace: shop}}\nsubsets: [{{addresses: [{{ip: {gateway}}}], ports: [{{name: http, port: 4143}}, {{name: tcp, port: 4143}}]}}]\n---\n",
        gateway = gateway.ip4
    )
    .expect("a string");
    yaml
}

#[tokio::test(flavor = "multi_thread")]
async fn named_services_are_reached_through_the_gateway_and_loops_end() {
    let Some(mut world) = World::new("gateway") else { return };
    let client = world.meshed("client", &[], &[]);
    let gateway = world.meshed("gateway", &[], &[]);
    let server = world.meshed("server", &[("http", 8080), ("tcp", 9000)], &[]);
    world.manifest(
        "web",
        &service(
            "web",
            "server",
            &["10.96.0.10"],
            &[("http", 80, "http", None), ("tcp", 90, "tcp", Some("linkerd.io/opaque"))],
        ),
    );
    let mirrors = [
        mirror("web-east", "10.96.0.20", "web.shop.svc.cluster.local", &gateway),
        mirror("far-east", "10.96.0.21", "web.example.com", &gateway),
        mirror("loop-east", "10.96.0.22", "loop-east.shop.svc.cluster.local", &gateway),
    ];
    world.manifest("mirrors", &mirrors.concat());
    world.spawn("gateway", &[("LINKERD2_PROXY_INBOUND_GATEWAY_SUFFIXES", "svc.cluster.local.")]);
    world.start(&["client", "server"]).await;
    world.wait_ready("gateway").await;
    let _app = apps::http(&server, 8080, "server");
    let _tcp = apps::tcp_echo(&server, 9000);
    let at = |last: u8, port| SocketAddr::from(([10, 96, 0, last], port));

    let answer = apps::get(&client, at(20, 80), "/x", &[]).await.unwrap();
    assert_eq!((answer.status, &*answer.body), (StatusCode::OK, "server GET /x"), "{}", world.logs());
    assert_eq!(answer.headers["x-client-id"], GATEWAY, "the server knows the gateway, not who is behind it");
    assert_eq!(apps::send_bytes(&client, at(20, 90), b"\0bytes").await, b"\0bytes", "{}", world.logs());
    let header = ["client.shop", "target_name=\"web.shop.svc.cluster.local\""];
    assert!(world.metric("gateway", "inbound_tcp_transport_header_connections_total", &header).await >= 2.0);

    // Names that are not this gateway's business.
    assert_eq!(apps::get(&client, at(21, 80), "/", &[]).await.unwrap().status, StatusCode::NOT_FOUND);
    assert_eq!(apps::send_bytes(&client, at(21, 90), b"\0bytes").await, b"");
    // A request that has been here, by what other gateways wrote down.
    let been = format!("by=other.shop;for=x, by=\"{GATEWAY}\";for=client.shop");
    let answer = apps::get(&client, at(20, 80), "/", &[("forwarded", &been)]).await.unwrap();
    assert_eq!(answer.status, StatusCode::LOOP_DETECTED, "{answer:?}");
    let answer = apps::get(&client, at(20, 80), "/", &[("forwarded", "by=other.shop;for=x")]).await.unwrap();
    assert_eq!(answer.status, StatusCode::OK, "{answer:?}");
    // A Service that is mirrored onto itself: the gateway's own address is a plain local endpoint, which its port refuses.
    let answer = apps::get(&client, at(22, 80), "/", &[]).await.unwrap();
    assert_eq!(answer.status, StatusCode::BAD_GATEWAY, "{answer:?}");
    assert_eq!(apps::send_bytes(&client, at(22, 90), b"\0bytes").await, b"");

    // A proxy that is no gateway.
    world.manifest(
        "mirrors",
        &mirror("web-east", "10.96.0.20", "web.shop.svc.cluster.local", &server).replace("gateway.shop", "server.shop"),
    );
    world
        .eventually("the server is no gateway", async || {
            apps::get(&client, at(20, 80), "/", &[]).await.unwrap().status != StatusCode::OK
        })
        .await;
}
