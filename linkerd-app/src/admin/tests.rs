//! Every path of contract.md 2.2, asked without a socket.

use super::*;
use crate::{config, telemetry::Condition};

const LOCAL: &str = "127.0.0.1:1234";
const REMOTE: &str = "10.0.0.9:1234";

pub(super) fn options() -> Options {
    Options {
        ready: Ready::new(true),
        telemetry: Telemetry::new(config::Metrics::default()),
        log: log::Handle::off(),
        env: [("A", "1"), ("LINKERD2_PROXY_IDENTITY_TOKEN_FILE", "/t"), ("DB_PASSWORD", "hunter2")]
            .map(|(k, v)| (k.to_string(), v.to_string()))
            .into(),
        shutdown: None,
        panels: Panels::default(),
    }
}

/// Status, headers, body.
async fn ask(admin: &Arc<Admin>, client: &str, req: http::request::Builder, body: &str) -> (u16, HeaderMap, Bytes) {
    let req = req.body(Body::full(body.to_string())).unwrap();
    let (head, body) = admin.service(client.parse().unwrap()).send(req).await.unwrap().into_parts();
    (head.status.as_u16(), head.headers, body.collect().await.unwrap().to_bytes())
}

#[track_caller]
fn check(options: Options, client: &str, req: http::request::Builder, status: u16, kind: Option<&str>, body: &str) {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let (got, headers, text) = runtime.block_on(ask(&Admin::new(options), client, req, ""));
    let content_type = headers.get(header::CONTENT_TYPE).map(|v| v.to_str().unwrap());
    assert_eq!((got, content_type, &*String::from_utf8_lossy(&text)), (status, kind, body));
}

fn get(path: &str) -> http::request::Builder {
    Request::get(path)
}

const TEXT: Option<&str> = Some("text/plain");
const JSON: Option<&str> = Some("application/json");

#[test]
fn probes() {
    check(options(), REMOTE, get("/live"), 200, TEXT, "live\n");
    check(options(), REMOTE, Request::delete("/live"), 200, TEXT, "live\n");
    check(options(), REMOTE, get("/ready"), 200, TEXT, "ready\n");
    let not_ready = || Options { ready: Ready::new(false), ..options() };
    check(not_ready(), REMOTE, get("/ready"), 503, None, "not ready\n");
    check(not_ready(), REMOTE, get("/live"), 200, TEXT, "live\n");
    check(options(), REMOTE, get("/livez"), 404, None, "");
}

#[test]
fn verbose_readiness_tells_more_and_keeps_the_status() {
    let bad = || {
        let options = options();
        options.telemetry.health().add(Condition::CertificateExpired, || Some("since noon".into()));
        options
    };
    let verbose = "ready\n[+] certificate\n[-] certificate_expired: since noon\n";
    check(bad(), REMOTE, get("/ready?verbose"), 200, TEXT, verbose);
    check(bad(), REMOTE, get("/ready"), 200, TEXT, "ready\n");
}

#[tokio::test]
async fn a_503_says_why_in_a_header() {
    let options = Options { ready: Ready::new(false), ..options() };
    let (health, admin) = (options.telemetry.clone(), Admin::new(options));
    let (status, headers, _) = ask(&admin, REMOTE, get("/ready"), "").await;
    assert_eq!(
        (status, &headers["l5d-proxy-error"]),
        (503, &HeaderValue::from_static("waiting for the first certificate"))
    );
    health.health().add(Condition::CertificateFailing, || Some("token /t is\nempty".into()));
    let (_, headers, _) = ask(&admin, REMOTE, get("/ready"), "").await;
    assert_eq!(headers["l5d-proxy-error"], "token /t is empty");
}

#[test]
fn environment() {
    let all = r#"{"A":"1","DB_PASSWORD":"hunter2","LINKERD2_PROXY_IDENTITY_TOKEN_FILE":"/t"}"#;
    check(options(), LOCAL, get("/env.json"), 200, JSON, all);
    let all = r#"{"A":"1","DB_PASSWORD":"(shown to localhost only)","LINKERD2_PROXY_IDENTITY_TOKEN_FILE":"/t"}"#;
    check(options(), REMOTE, get("/env.json"), 200, JSON, all);
    check(options(), REMOTE, get("/env.json?A&B"), 200, JSON, r#"{"A":"1","B":null}"#);
    let bad = r#"{"error":"the query is a list of names separated by `&`, without values","status":400}"#;
    check(options(), REMOTE, get("/env.json?A=1"), 400, JSON, bad);
    check(options(), REMOTE, Request::post("/env.json"), 405, None, "");
    check(options(), REMOTE, get("/env.json?A").header("accept", "text/html, */*"), 200, JSON, r#"{"A":"1"}"#);
    check(options(), REMOTE, get("/env.json").header("accept", "text/html"), 406, None, "application/json");
    let accept = HeaderValue::from_bytes(b"\xff").unwrap();
    let bad = r#"{"error":"the Accept header is no text","status":400}"#;
    check(options(), REMOTE, get("/env.json").header("accept", accept), 400, JSON, bad);
}

#[test]
fn log_level() {
    let denied = "Requests are only permitted from localhost.";
    check(options(), REMOTE, get("/proxy-log-level"), 403, TEXT, denied);
    check(options(), LOCAL, get("/proxy-log-level"), 404, None, "");
    check(options(), "[::ffff:127.0.0.1]:1", get("/proxy-log-level"), 404, None, "");
}

#[tokio::test]
async fn log_level_can_be_replaced() {
    let admin = Admin::new(Options { log: log::Handle::detached("warn,linkerd=info"), ..options() });
    let path = "/proxy-log-level";
    let (status, headers, body) = ask(&admin, LOCAL, get(path), "").await;
    assert_eq!((status, headers.get(header::CONTENT_TYPE)), (200, None));
    assert!(body.windows(12).any(|w| w == b"linkerd=info"), "{body:?}");
    assert_eq!(ask(&admin, LOCAL, Request::put(path), "linkerd=debug\n").await.0, 204);
    assert_eq!(ask(&admin, LOCAL, get(path), "").await.2, "linkerd=debug");
    assert_eq!(ask(&admin, LOCAL, Request::put(path), "linkerd=loud").await.0, 400);
    assert_eq!(ask(&admin, LOCAL, Request::put(path), &"x".repeat(MAX_FILTER + 1)).await.0, 400);
    let (status, headers, _) = ask(&admin, LOCAL, Request::post(path), "").await;
    assert_eq!(status, 405);
    assert_eq!(headers.get_all(header::ALLOW).iter().collect::<Vec<_>>(), ["GET", "PUT"]);
}

#[tokio::test]
async fn shutdown() {
    check_shutdown(&options(), get("/shutdown"), REMOTE, 405).await;
    check_shutdown(&options(), Request::post("/shutdown"), REMOTE, 403).await;
    check_shutdown(&options(), Request::post("/shutdown"), LOCAL, 404).await;
    let (shutdown, mut begun) = mpsc::channel(1);
    let enabled = Options { shutdown: Some(shutdown), ..options() };
    check_shutdown(&enabled, Request::post("/shutdown"), LOCAL, 200).await;
    check_shutdown(&enabled, Request::post("/shutdown"), LOCAL, 500).await;
    assert_eq!(begun.recv().await, Some(()));
}

async fn check_shutdown(options: &Options, req: http::request::Builder, client: &str, expected: u16) {
    let again = Options {
        ready: options.ready.clone(),
        telemetry: options.telemetry.clone(),
        log: options.log.clone(),
        env: options.env.clone(),
        shutdown: options.shutdown.clone(),
        panels: options.panels.clone(),
    };
    assert_eq!(ask(&Admin::new(again), client, req, "").await.0, expected);
}

#[tokio::test]
async fn metrics_are_compressed_on_demand() {
    let admin = Admin::new(options());
    let (status, headers, body) = ask(&admin, REMOTE, get("/metrics"), "").await;
    assert_eq!((status, &headers[header::CONTENT_TYPE]), (200, &HeaderValue::from_static("text/plain")));
    assert!(body.ends_with(b"# EOF\n"));
    assert!(!headers.contains_key(header::CONTENT_ENCODING));
    for accept in ["gzip", "deflate, gzip", "gzip,deflate", "brotli,gzip,deflate"] {
        let (_, headers, body) = ask(&admin, REMOTE, get("/metrics").header("accept-encoding", accept), "").await;
        assert_eq!(headers[header::CONTENT_ENCODING], "gzip", "{accept}");
        let mut page = String::new();
        std::io::Read::read_to_string(&mut flate2::read::GzDecoder::new(&body[..]), &mut page).unwrap();
        assert!(page.ends_with("# EOF\n"));
    }
    let (_, headers, _) = ask(&admin, REMOTE, get("/metrics").header("accept-encoding", "deflate"), "").await;
    assert!(!headers.contains_key(header::CONTENT_ENCODING));
}

#[tokio::test]
async fn panels_have_a_page_and_twins() {
    let admin = Admin::new(options());
    admin.0.panels.add("identity", || serde_json::json!({ "id": "web.<ns>" }));
    let (_, _, all) = ask(&admin, REMOTE, get("/status.json"), "").await;
    let all: serde_json::Value = serde_json::from_slice(&all).unwrap();
    assert_eq!(
        all,
        serde_json::json!({ "health": { "ready": true, "problems": [] }, "identity": { "id": "web.<ns>" } })
    );
    assert_eq!(ask(&admin, REMOTE, get("/status/identity.json"), "").await.2, r#"{"id":"web.<ns>"}"#);
    assert_eq!(ask(&admin, REMOTE, get("/status/other.json"), "").await.0, 404);
    let (status, headers, page) = ask(&admin, REMOTE, get("/"), "").await;
    assert_eq!((status, &headers[header::CONTENT_TYPE]), (200, &HeaderValue::from_static("text/html; charset=utf-8")));
    assert!(String::from_utf8_lossy(&page).contains("<th>id<td>web.&lt;ns&gt;"));
}
