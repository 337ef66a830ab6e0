//! The proxy beside a control plane that fails in every way it can, and comes back.

use crate::{
    apps::{self, Answer},
    control_plane::{ControlPlane, Mood, certified, start},
    net::Pod,
    world::World,
};
use http::StatusCode;
use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

const WEB: ([u8; 4], u16) = ([10, 96, 0, 10], 80);
const NEW: ([u8; 4], u16) = ([10, 96, 0, 20], 80);

/// A client beside a control plane that knows `web`, of one plain server with applications on 8080 and 8081.
async fn pair(test: &str, env: &[(&str, &str)]) -> Option<(World, ControlPlane, Pod, Pod)> {
    let mut world = World::new(test)?;
    let client = world.meshed("client", &[], &[]);
    let server = world.plain("server", &[]);
    let control = ControlPlane::new(&world);
    control.service(SocketAddr::from(WEB), "web");
    control.endpoints("web", &[(server.addr(8080), None)]);
    control.spawn(&mut world, &client, env);
    world.wait_ready("client").await;
    Some((world, control, client, server))
}

async fn get(client: &Pod, addr: ([u8; 4], u16)) -> Answer {
    apps::get(client, SocketAddr::from(addr), "/", &[]).await.unwrap()
}

#[track_caller]
fn check(answer: &Answer, status: u16, words: &str) {
    let why = answer.headers.get("l5d-proxy-error").map(|v| v.to_str().unwrap()).unwrap_or_default();
    assert!(answer.status.as_u16() == status && why.contains(words), "{answer:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn known_destinations_outlive_every_kind_of_failure() {
    let Some((world, control, client, server)) = pair("control-known", &[]).await else { return };
    let _apps = [apps::http(&server, 8080, "one"), apps::http(&server, 8081, "two")];
    assert_eq!(get(&client, WEB).await.status, StatusCode::OK);
    let mut wanted = ["two", "one"].into_iter().cycle();
    for mood in [Mood::Refuses, Mood::Hangs, Mood::Resets, Mood::Garbles, Mood::Surprises] {
        control.be(mood);
        let end = Instant::now() + Duration::from_secs(1);
        while Instant::now() < end {
            let answer = get(&client, WEB).await;
            assert_eq!(answer.status, StatusCode::OK, "{mood:?}: {answer:?}");
        }
        // What changed meanwhile is learnt once it is back.
        let name = wanted.next().unwrap();
        control.endpoints("web", &[(server.addr(if name == "one" { 8080 } else { 8081 }), None)]);
        control.be(Mood::Well);
        world.eventually(&format!("{mood:?} is over"), async || get(&client, WEB).await.body.starts_with(name)).await;
    }
    assert_eq!(world.admin("client", "GET", "/ready").await.unwrap().0, 200);
}

/// How a destination of which nothing is known fares while the control plane is in a mood, and after.
async fn new_destination(test: &str, mood: Mood) {
    let Some((world, control, client, server)) = pair(test, &[]).await else { return };
    let _app = apps::http(&server, 8080, "new");
    control.service(SocketAddr::from(NEW), "new");
    control.endpoints("new", &[(server.addr(8080), None)]);
    control.be(mood);
    let started = Instant::now();
    check(&get(&client, NEW).await, 503, "discovery of 10.96.0.20:80");
    assert!(started.elapsed() < Duration::from_secs(15), "{:?}", started.elapsed());
    control.be(Mood::Well);
    world.eventually(&format!("{mood:?} is over"), async || get(&client, NEW).await.status == StatusCode::OK).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn new_destinations_fail_with_a_reason_while_the_control_plane_is_gone() {
    new_destination("control-new-refuses", Mood::Refuses).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn new_destinations_fail_with_a_reason_while_the_control_plane_hangs() {
    new_destination("control-new-hangs", Mood::Hangs).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_policy_that_makes_no_sense_is_told_and_heals() {
    let Some((world, control, client, server)) = pair("control-invalid", &[]).await else { return };
    let _app = apps::http(&server, 8080, "one");
    assert_eq!(get(&client, WEB).await.status, StatusCode::OK);
    control.break_service(SocketAddr::from(WEB));
    world
        .eventually("it is refused", async || get(&client, WEB).await.status == StatusCode::INTERNAL_SERVER_ERROR)
        .await;
    check(&get(&client, WEB).await, 500, "invalid client policy");
    control.service(SocketAddr::from(WEB), "web");
    world.eventually("it is healed", async || get(&client, WEB).await.status == StatusCode::OK).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_endpoint_that_keeps_refusing_is_looked_up_anew_and_ages_are_shown() {
    let Some((world, control, client, server)) = pair("control-stale", &[]).await else { return };
    // Nobody listens there.
    check(&get(&client, WEB).await, 502, "endpoint");
    let page = async || {
        let (_, page) = world.admin("client", "GET", "/status/discovery.json").await.unwrap();
        serde_json::from_str::<serde_json::Value>(&page).unwrap()
    };
    let age = async |method: &str| {
        let page = page().await;
        let lookup = page["lookups"].as_array().unwrap().iter().find(|l| l["method"] == method).unwrap().clone();
        (lookup["target"].as_str().unwrap().to_string(), lookup["age_seconds"].as_f64().unwrap())
    };
    let (target, before) = age("OutboundPolicies.Watch").await;
    assert_eq!(target, "10.96.0.10:80");
    assert_eq!(control.calls("Destination/Get"), 1);
    world
        .eventually("it is looked up anew", async || {
            get(&client, WEB).await;
            control.calls("Destination/Get") > 1
        })
        .await;
    assert!(age("OutboundPolicies.Watch").await.1 > before + 5.0);
    assert!(age("Destination.Get").await.1 < 5.0);
    let _app = apps::http(&server, 8080, "one");
    assert_eq!(get(&client, WEB).await.status, StatusCode::OK);
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_certificate_readiness_says_why_and_sigterm_ends_at_once() {
    let Some(mut world) = World::new("control-uncertified") else { return };
    let pods = [world.meshed("one", &[], &[]), world.meshed("two", &[], &[])];
    let control = ControlPlane::new(&world);
    control.issue_no_certificates(Some("token review failed"));
    for pod in &pods {
        control.spawn(&mut world, pod, &[]);
    }
    world
        .eventually("the reason is told", async || {
            let verbose = world.admin("one", "GET", "/ready?verbose").await;
            matches!(&verbose, Ok((503, body)) if body.contains("[-] certificate") && body.contains("token review failed"))
        })
        .await;
    assert_eq!(world.admin("one", "GET", "/live").await.unwrap().0, 200);
    assert!(world.metric("one", "control_identity_cert_refreshes_total", &["result=\"error\""]).await >= 1.0);
    let started = Instant::now();
    world.terminate("one");
    assert_eq!(world.exit_code("one").await, Some(0));
    assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
    // The other gets one as soon as there are some.
    control.issue_no_certificates(None);
    world.wait_ready("two").await;
    assert_eq!(world.admin("two", "GET", "/ready?verbose").await.unwrap(), (200, "ready\n[+] certificate\n".into()));
}

#[tokio::test(flavor = "multi_thread")]
async fn files_that_the_environment_names_are_checked_at_the_start() {
    let Some(mut world) = World::new("control-files") else { return };
    let pod = world.meshed("one", &[], &[]);
    let vars = [ControlPlane::new(&world).serve_local(&pod), certified(&world, &pod)];
    let empty = world.dir.join("empty");
    std::fs::create_dir(&empty).unwrap();
    std::fs::write(empty.join("key.p8"), "").unwrap();
    let (file, dir) = (empty.join("key.p8").display().to_string(), empty.display().to_string());
    for (variable, value, words) in [
        ("LINKERD2_PROXY_IDENTITY_TOKEN_FILE", "/nonexistent", "can't be read"),
        ("LINKERD2_PROXY_IDENTITY_TOKEN_FILE", &file, "is empty"),
        ("LINKERD2_PROXY_IDENTITY_DIR", &dir, "key.p8: 0 bytes long"),
    ] {
        start(&mut world, &pod, &vars, &[(variable, value)]);
        assert_eq!(world.exit_code("one").await, Some(64));
        let log = world.log("one");
        let told = log.lines().filter(|line| line.contains(variable) && line.contains(words)).count();
        assert!(told == 2 && log.contains("Invalid configuration: invalid environment variable"), "{log}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_clock_that_differs_from_the_issuers_is_told_in_words() {
    let Some(mut world) = World::new("control-skew") else { return };
    let pod = world.meshed("one", &[], &[]);
    let control = ControlPlane::new(&world);
    control.clock_is_ahead(7_200);
    control.spawn(&mut world, &pod, &[]);
    let ready = async |words: &str| {
        let verbose = world.admin("one", "GET", "/ready?verbose").await;
        matches!(&verbose, Ok((503, body)) if body.contains(words))
    };
    world.eventually("the future is told", async || ready("this clock is behind the issuer's").await).await;
    control.clock_is_ahead(-30 * 24 * 3_600);
    world.eventually("the past is told", async || ready("ago by this machine's clock; check the clock").await).await;
    // Still valid, and suspicious.
    control.clock_is_ahead(-7_200);
    world.wait_ready("one").await;
    world.eventually("a warning", async || world.log("one").contains("this clock is ahead of the issuer's")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn certificates_rotate_under_load_without_a_failed_request() {
    let Some(mut world) = World::new("control-rotation") else { return };
    let client = world.meshed("client", &[], &[]);
    let server = world.meshed("server", &[("http", 8080)], &[]);
    let control = ControlPlane::new(&world);
    control.certificates_last(Duration::from_secs(3));
    control.service(SocketAddr::from(WEB), "web");
    control.endpoints("web", &[(server.addr(8080), Some("server"))]);
    // Nothing is pooled: a handshake for each request.
    let env =
        [("LINKERD2_PROXY_IDENTITY_MIN_REFRESH", "1s"), ("LINKERD2_PROXY_OUTBOUND_MAX_IDLE_CONNS_PER_ENDPOINT", "0")];
    for pod in [&client, &server] {
        control.spawn(&mut world, pod, &env);
    }
    world.wait_ready("client").await;
    world.wait_ready("server").await;
    let _app = apps::http(&server, 8080, "server");
    let (stop, sent) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU32::new(0)));
    let workers: Vec<_> = (0..3)
        .map(|_| {
            let (client, stop, sent) = (client.clone(), stop.clone(), sent.clone());
            tokio::spawn(async move {
                while !stop.load(Relaxed) {
                    let answer = get(&client, WEB).await;
                    let id = answer.headers.get("x-client-id").cloned();
                    assert!(answer.status == StatusCode::OK && id.is_some(), "{answer:?}");
                    sent.fetch_add(1, Relaxed);
                }
            })
        })
        .collect();
    for pod in ["client", "server"] {
        world
            .eventually("four certificates were issued", async || {
                world.metric(pod, "control_identity_cert_refreshes_total", &["result=\"ok\""]).await >= 4.0
            })
            .await;
    }
    stop.store(true, Relaxed);
    for worker in workers {
        worker.await.unwrap();
    }
    let sent = sent.load(Relaxed);
    let handshakes = world.metric("server", "tcp_open_total", &["peer=\"src\"", "tls=\"true\""]).await;
    assert!(sent > 50 && handshakes >= f64::from(sent), "{sent} requests, {handshakes} connections");
}
