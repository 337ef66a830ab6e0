//! Start, readiness, shutdown, and what is said when the start is impossible.

use crate::{
    apps,
    net::within,
    world::{BINARY, World, service},
};
use http::StatusCode;
use std::{
    net::{SocketAddr, TcpListener},
    process::Command,
    time::{Duration, Instant},
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

const WEB: ([u8; 4], u16) = ([10, 96, 0, 10], 80);

#[tokio::test(flavor = "multi_thread")]
async fn sigterm_lets_a_request_finish_and_then_ends_with_0() {
    let Some(mut world) = World::new("sigterm") else { return };
    let client = world.meshed("client", &[], &[]);
    let server = world.meshed("server", &[("http", 8080)], &[]);
    world.manifest("web", &service("web", "server", &["10.96.0.10"], &[("http", 80, "http", None)]));
    world.start(&["client", "server"]).await;
    let _app = apps::http(&server, 8080, "server");
    let request = tokio::spawn(async move { apps::get(&client, SocketAddr::from(WEB), "/sleep/1000", &[]).await });
    world
        .eventually("the request is in flight", async || {
            world.metric("server", "request_total", &["direction=\"inbound\"", "target_port=\"8080\""]).await >= 1.0
        })
        .await;
    world.terminate("server");
    assert_eq!(request.await.unwrap().unwrap().status, StatusCode::OK);
    assert_eq!(world.exit_code("server").await, Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_admin_server_answers_and_shuts_down() {
    let Some(mut world) = World::new("admin") else { return };
    world.meshed("server", &[("http", 8080)], &[]);
    world.start(&["server"]).await;
    assert_eq!(world.admin("server", "GET", "/live").await.unwrap(), (200, "live\n".into()));
    assert_eq!(world.admin("server", "GET", "/ready").await.unwrap(), (200, "ready\n".into()));
    assert!(world.metric("server", "control_identity_cert_expiration_timestamp_seconds", &[]).await > 1e9);
    assert_eq!(world.admin("server", "GET", "/shutdown").await.unwrap().0, 405);
    assert_eq!(world.admin("server", "POST", "/shutdown").await.unwrap().0, 200);
    assert_eq!(world.exit_code("server").await, Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_taken_port_is_an_error_message() {
    let Some(mut world) = World::new("taken") else { return };
    let pod = world.meshed("server", &[], &[]);
    let _squatter = within(&pod.netns, || TcpListener::bind("[::]:4143")).unwrap();
    world.spawn("server", &[]);
    let code = world.exit_code("server").await;
    let log = world.log("server");
    assert_eq!(code, Some(1), "{log}");
    assert!(log.contains("4143") && log.contains("LINKERD2_PROXY_INBOUND_LISTEN_ADDR"), "{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_without_a_nat_entry_is_dropped_with_a_remedy() {
    let Some(mut world) = World::new("no-nat") else { return };
    let pod = world.plain("server", &[]);
    world.start(&["server"]).await;
    let started = Instant::now();
    let mut io = pod.connect(([127, 0, 0, 1], 4140).into()).await.unwrap();
    io.write_all(b"\x01 no HTTP, and nothing says where it should go\n").await.unwrap();
    let mut rest = Vec::new();
    let _ = io.read_to_end(&mut rest).await;
    assert!(rest.is_empty() && started.elapsed() < Duration::from_secs(5));
    world.eventually("the remedy is logged", async || world.log("server").contains("linkerd-proxy redirect")).await;
    assert_eq!(world.admin("server", "GET", "/live").await.unwrap().0, 200);
}

#[track_caller]
fn refused(args: &[&str], words: &[&str]) {
    let out = Command::new(BINARY).args(args).env_clear().output().expect("the binary");
    let text = format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    assert!(!out.status.success(), "{args:?} must fail: {text}");
    for word in words {
        assert!(text.contains(word), "{args:?} must name {word:?}: {text}");
    }
    assert!(!text.contains("panicked"), "{text}");
}

#[test]
fn folders_that_cannot_be_read_are_named() {
    refused(&["check", "/nonexistent/manifests"], &["/nonexistent/manifests"]);
    refused(
        &["run", "--manifests", "/nonexistent/manifests", "--workload", "a/b", "--identity", "/nonexistent/identity"],
        &["/nonexistent/manifests"],
    );
}

#[test]
fn check_names_file_document_and_field() {
    let dir = std::env::temp_dir().join(format!("linkerd-proxy-check-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    std::fs::write(
        dir.join("bad.yaml"),
        "apiVersion: v1\nkind: Namespace\nmetadata: {name: shop}\n---\napiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {name: r, namespace: shop}\nspec:\n  parentRefs: [{group: \"\", kind: Service, name: web}]\n  rules:\n  - timeouts: {request: 1s, backendRequest: 2s}\n",
    )
    .unwrap();
    refused(&["check", dir.to_str().unwrap()], &["bad.yaml", "backendRequest", "2"]);
    // All that is wrong with one object, each with its value and what to do.
    std::fs::write(
        dir.join("bad.yaml"),
        "apiVersion: policy.linkerd.io/v1beta3\nkind: Server\nmetadata: {name: s, namespace: shop}\nspec: {podSelector: {matchLabels: {a: 1}}, port: 70000, proxyProtocol: HTTP/3, accessPolicy: open}\n",
    )
    .unwrap();
    let refusals = [
        "Server shop/s: spec.podSelector.matchLabels.a: integer `1` does not fit here. Write a string",
        "spec.port: 70000 is no port. Write a number from 1 to 65535",
        "spec.proxyProtocol: \"HTTP/3\" is no protocol. Write unknown, HTTP/1",
        "spec.accessPolicy: \"open\" is no policy. Write all-unauthenticated",
        "4 errors, 0 warnings",
    ];
    refused(&["check", dir.to_str().unwrap()], &refusals);
    std::fs::write(dir.join("bad.yaml"), "a: [").unwrap();
    refused(&["check", dir.to_str().unwrap()], &["bad.yaml"]);
    std::fs::remove_dir_all(dir).unwrap();
}
