//! Logs of a running proxy: formats, and a filter that changes at run time.

use crate::{apps, net::Pod, world::World};
use bytes::Bytes;
use http::{Request, StatusCode};
use http_body_util::Full;
use std::net::SocketAddr;

async fn put(pod: &Pod, admin: SocketAddr, filter: &'static str) -> StatusCode {
    let mut send = apps::http1(pod, admin).await;
    let request = Request::put("/proxy-log-level").header("host", "localhost");
    send.send_request(request.body(Full::new(Bytes::from(filter))).unwrap()).await.unwrap().status()
}

#[tokio::test(flavor = "multi_thread")]
async fn json_lines_whose_filter_changes_at_run_time() {
    let Some(mut world) = World::new("logs") else { return };
    let pod = world.meshed("server", &[("http", 8080)], &[]);
    let stranger = world.plain("stranger", &[]);
    let filter = "warn,linkerd=info,[{headers}]=off";
    world.spawn("server", &[("LINKERD2_PROXY_LOG", filter), ("LINKERD2_PROXY_LOG_FORMAT", "JSON")]);
    world.wait_ready("server").await;
    let line = |level: &str, log: &str| {
        let line = log.lines().rev().find(|line| line.contains(&format!("\"level\":\"{level}\"")))?;
        Some(serde_json::from_str::<serde_json::Value>(line).unwrap())
    };
    let log = world.log("server");
    assert!(log.lines().all(|line| serde_json::from_str::<serde_json::Value>(line).is_ok()), "{log}");
    let info = line("INFO", &log).unwrap();
    assert!(info["target"].as_str().unwrap().starts_with("linkerd") && info["threadId"].is_string(), "{info}");
    assert!(info["fields"]["message"].is_string() && info["timestamp"].as_str().unwrap().ends_with('Z'), "{info}");
    assert_eq!(line("DEBUG", &log), None);

    let admin = SocketAddr::from(([127, 0, 0, 1], 4191));
    let shown = async || world.admin("server", "GET", "/proxy-log-level").await.unwrap();
    assert!(shown().await.1.contains("linkerd=info"), "{:?}", shown().await);
    assert_eq!(put(&pod, admin, "warn,linkerd=loud").await, StatusCode::BAD_REQUEST);
    assert_eq!(put(&stranger, pod.addr(4191), "off").await, StatusCode::FORBIDDEN);
    assert_eq!(put(&pod, admin, "warn,linkerd=debug").await, StatusCode::NO_CONTENT);
    assert!(shown().await.1.contains("linkerd=debug"), "{:?}", shown().await);
    // Nobody listens there.
    let answer = apps::get(&pod, stranger.addr(8080), "/", &[]).await.unwrap();
    assert_eq!(answer.status, StatusCode::BAD_GATEWAY);
    world.eventually("debug lines come", async || line("DEBUG", &world.log("server")).is_some()).await;
}
