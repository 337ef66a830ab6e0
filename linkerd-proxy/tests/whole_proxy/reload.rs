//! Manifests that change while traffic runs.

use crate::{
    apps,
    world::{World, service},
};
use http::{Request, StatusCode};
use http_body_util::Full;
use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
};

const WEB: ([u8; 4], u16) = ([10, 96, 0, 10], 80);

fn route(backend: &str) -> String {
    format!(
        "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {{name: web, namespace: shop}}\nspec:\n  parentRefs: [{{group: \"\", kind: Service, name: web}}]\n  rules: [{{backendRefs: [{{name: {backend}, port: 80}}]}}]\n"
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn a_manifest_changed_under_traffic_fails_no_request() {
    let Some(mut world) = World::new("reload") else { return };
    let client = world.meshed("client", &[], &[]);
    let one = world.meshed("one", &[("http", 8080)], &[]);
    let two = world.meshed("two", &[("http", 8080)], &[]);
    for (name, ip) in [("one", "10.96.0.11"), ("two", "10.96.0.12")] {
        world.manifest(name, &service(name, name, &[ip], &[("http", 80, "http", None)]));
    }
    world.manifest("web", &service("web", "one", &["10.96.0.10"], &[("http", 80, "http", None)]));
    world.manifest("route", &route("one"));
    world.start(&["client", "one", "two"]).await;
    let _apps = [apps::http(&one, 8080, "one"), apps::http(&two, 8080, "two")];

    let stop = Arc::new(AtomicBool::new(false));
    let sent = Arc::new(AtomicU32::new(0));
    let workers: Vec<_> = (0..4)
        .map(|_| {
            let (client, stop, sent) = (client.clone(), stop.clone(), sent.clone());
            tokio::spawn(async move {
                let mut send = apps::http1(&client, SocketAddr::from(WEB)).await;
                let mut failures = Vec::new();
                while !stop.load(Ordering::Relaxed) {
                    let req = Request::get("/").header("host", "web.shop").body(Full::default()).unwrap();
                    send.ready().await.expect("the connection stays open");
                    match send.send_request(req).await {
                        Ok(rsp) if rsp.status() == StatusCode::OK => {
                            apps::read(rsp).await.expect("a whole body");
                        }
                        other => failures.push(format!("{other:?}")),
                    }
                    sent.fetch_add(1, Ordering::Relaxed);
                }
                failures
            })
        })
        .collect();
    for backend in ["two", "one", "two"] {
        world.manifest("route", &route(backend));
        world
            .eventually("the route changes", async || {
                let answer = apps::get(&client, SocketAddr::from(WEB), "/", &[]).await.unwrap();
                assert_eq!(answer.status, StatusCode::OK);
                answer.body.starts_with(backend)
            })
            .await;
    }
    stop.store(true, Ordering::Relaxed);
    for worker in workers {
        assert_eq!(worker.await.unwrap(), Vec::<String>::new());
    }
    assert!(sent.load(Ordering::Relaxed) > 50);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bad_change_keeps_the_last_good_state_and_says_why() {
    let Some(mut world) = World::new("bad-change") else { return };
    let client = world.meshed("client", &[], &[]);
    let one = world.meshed("one", &[("http", 8080)], &[]);
    world.manifest("web", &service("web", "one", &["10.96.0.10"], &[("http", 80, "http", None)]));
    world.start(&["client", "one"]).await;
    let _app = apps::http(&one, 8080, "one");

    world.manifest("route", &route("one").replace("rules: [{", "rules: [{timeouts: {request: 1.5h}, "));
    world.eventually("the log names the file", async || world.log("client").contains("route.yaml")).await;
    assert!(world.log("client").contains("timeouts.request"), "{}", world.log("client"));
    assert_eq!(apps::get(&client, SocketAddr::from(WEB), "/", &[]).await.unwrap().status, StatusCode::OK);
    assert!(world.metric("client", "manifests_errors", &[]).await >= 1.0);

    world.manifest("route", &route("nowhere"));
    world
        .eventually("a good change heals it", async || {
            apps::get(&client, SocketAddr::from(WEB), "/", &[]).await.unwrap().status
                == StatusCode::INTERNAL_SERVER_ERROR
        })
        .await;
    assert_eq!(world.metric("client", "manifests_errors", &[]).await, 0.0);
}
