//! The same binary under its other names, and the end of its life.

use crate::{
    apps,
    world::{BINARY, World, service},
};
use http::StatusCode;
use std::{
    net::SocketAddr,
    os::unix::{fs::MetadataExt, process::CommandExt},
    process::{Command, Output},
    time::{Duration, Instant},
};

const WEB: ([u8; 4], u16) = ([10, 96, 0, 10], 80);

/// Runs the binary under another name and an empty environment but for PATH.
fn run_as(name: &str, args: &[&str]) -> (Output, String) {
    let mut command = Command::new(BINARY);
    command.arg0(format!("/usr/lib/linkerd/{name}")).args(args).env_clear();
    let out = command.env("PATH", std::env::var_os("PATH").unwrap()).output().unwrap();
    let text = format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    (out, text)
}

#[test]
fn by_the_init_programs_name_it_takes_its_flags() {
    let (out, text) = run_as(
        "linkerd2-proxy-init",
        &[
            "--simulate",
            "-p",
            "4143",
            "-o",
            "4140",
            "-u",
            "2102",
            "--inbound-ports-to-ignore",
            "4190,4191",
            "--ipv6=false",
        ],
    );
    assert!(out.status.success() && text.contains("PROXY_INIT_REDIRECT") && text.contains("4190,4191"), "{text}");
    let (out, text) = run_as("linkerd2-proxy-init", &["--simulate"]);
    assert!(!out.status.success() && text.contains("incoming-proxy-port"), "{text}");
}

#[test]
fn by_the_network_validators_name_it_says_95_when_nothing_is_redirected() {
    let args = ["--connect-addr", "127.0.0.1:9", "--listen-addr", "127.0.0.1:0", "--timeout", "1s"];
    let logs = ["--log-format", "plain", "--log-level", "debug"];
    let (out, text) = run_as("linkerd2-network-validator", &[&args[..], &logs].concat());
    assert_eq!(out.status.code(), Some(95), "{text}");
}

#[test]
fn by_the_await_helpers_name_it_waits() {
    let (out, text) = run_as("linkerd-await", &["--port=9", "--backoff=10ms", "--timeout=50ms", "--", "echo", "no"]);
    assert!(out.status.code() == Some(69) && !text.contains("no\n"), "{text}");
    let (out, text) =
        run_as("linkerd-await", &["--port=9", "--timeout=50ms", "--timeout-fatal=false", "--", "echo", "anyway"]);
    assert!(out.status.success() && text.contains("anyway"), "{text}");
}

#[test]
fn by_the_identity_helpers_name_it_is_the_proxy() {
    for name in ["linkerd2-proxy-identity", "linkerd2-proxy"] {
        let (out, text) = run_as(name, &[]);
        assert_eq!(out.status.code(), Some(64), "{text}");
        for word in ["LINKERD2_PROXY_DESTINATION_SVC_ADDR", "LINKERD2_PROXY_IDENTITY_TRUST_ANCHORS"] {
            assert!(text.contains(word), "{word}: {text}");
        }
    }
}

/// With logging off the reason for a failed start must still be said.
#[test]
fn a_failed_start_is_explained_without_a_log() {
    let out = Command::new(BINARY)
        .env_clear()
        .env("LINKERD2_PROXY_LOG", " OFF ")
        .env("LINKERD2_PROXY_INBOUND_LISTEN_ADDR", "nowhere")
        .output()
        .unwrap();
    let (stdout, stderr) = (String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    assert_eq!((out.status.code(), &*stdout), (Some(64), ""));
    for word in ["Invalid configuration: ", "LINKERD2_PROXY_INBOUND_LISTEN_ADDR", "nowhere"] {
        assert!(stderr.contains(word), "{word}: {stderr}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_running_proxy_cannot_be_dumped() {
    let Some(mut world) = World::new("undumpable") else { return };
    for (name, env, owner) in [("closed", &[][..], 0), ("open", &[("LINKERD2_PROXY_CORE_DUMPS", "true")], 2102)] {
        world.meshed(name, &[], &[]);
        world.spawn(name, env);
        world.wait_ready(name).await;
        // proc(5): what belongs to an undumpable process is root's.
        assert_eq!(std::fs::metadata(format!("/proc/{}/environ", world.pid(name))).unwrap().uid(), owner, "{name}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn outbound_stays_open_while_inbound_drains_and_a_second_sigterm_ends_at_once() {
    let Some(mut world) = World::new("drain") else { return };
    let client = world.meshed("client", &[], &[]);
    let server = world.meshed("server", &[("http", 8080)], &[]);
    let other = world.plain("other", &[("http", 8080)]);
    world.manifest("web", &service("web", "server", &["10.96.0.10"], &[("http", 80, "http", None)]));
    world.manifest("other", &service("other", "other", &["10.96.0.11"], &[("http", 80, "http", None)]));
    world.start(&["client", "server"]).await;
    let _apps = [apps::http(&server, 8080, "server"), apps::http(&other, 8080, "other")];
    let request = tokio::spawn(async move { apps::get(&client, SocketAddr::from(WEB), "/sleep/60000", &[]).await });
    world
        .eventually("the request is in flight", async || {
            world.metric("server", "request_total", &["direction=\"inbound\"", "target_port=\"8080\""]).await >= 1.0
        })
        .await;
    assert_eq!(world.admin("server", "POST", "/shutdown").await.unwrap().0, 200);
    world.eventually("it drains", async || world.log("server").contains("draining")).await;
    let again = world.admin("server", "POST", "/shutdown").await.unwrap();
    assert_eq!(again, (500, "shutdown has begun already\n".into()));
    // The application of a pod that drains calls another one, over a new connection.
    let outward: SocketAddr = ([10, 96, 0, 11], 80).into();
    assert_eq!(apps::get(&server, outward, "/", &[]).await.unwrap().status, StatusCode::OK);
    world.eventually("nobody is let in any more", async || other.connect(server.addr(8080)).await.is_err()).await;
    assert_eq!(apps::get(&server, outward, "/", &[]).await.unwrap().status, StatusCode::OK);
    let started = Instant::now();
    world.terminate("server");
    assert_eq!(world.exit_code("server").await, Some(0));
    assert!(started.elapsed() < Duration::from_secs(10), "{:?}", started.elapsed());
    assert_eq!(request.await.unwrap().unwrap().status, StatusCode::BAD_GATEWAY, "cut, as the client's proxy tells");
}
