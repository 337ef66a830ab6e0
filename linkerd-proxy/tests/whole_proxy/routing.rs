//! HTTPRoutes: matches, weights, timeouts, backends that are not there.

use crate::{
    apps,
    net::Pod,
    world::{World, service},
};
use http::StatusCode;
use std::net::SocketAddr;

async fn world(test: &str, route: &str) -> Option<(World, Pod, Vec<apps::App>)> {
    let mut world = World::new(test)?;
    let client = world.meshed("client", &[], &[]);
    let one = world.meshed("one", &[("http", 8080)], &[]);
    let two = world.meshed("two", &[("http", 8080)], &[]);
    world.manifest("web", &service("web", "one", &["10.96.0.10"], &[("http", 80, "http", None)]));
    world.manifest("two", &service("two", "two", &["10.96.0.11"], &[("http", 80, "http", None)]));
    world.manifest("route", route);
    world.start(&["client", "one", "two"]).await;
    Some((world, client, vec![apps::http(&one, 8080, "one"), apps::http(&two, 8080, "two")]))
}

fn route(rules: &str) -> String {
    format!(
        "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {{name: web, namespace: shop}}\nspec:\n  parentRefs: [{{group: \"\", kind: Service, name: web, port: 80}}]\n  rules:\n{rules}"
    )
}

const WEB: ([u8; 4], u16) = ([10, 96, 0, 10], 80);

#[tokio::test(flavor = "multi_thread")]
async fn rules_are_matched_with_the_gateway_apis_precedence() {
    let rules = "  - matches: [{path: {type: PathPrefix, value: /a}, headers: [{name: x, value: \"1\"}]}]
    backendRefs: [{name: web, port: 80}]
  - matches: [{path: {type: Exact, value: /a}}]
    backendRefs: [{name: two, port: 80}]
  - matches: [{path: {type: PathPrefix, value: /}}]
    backendRefs: [{name: web, port: 80}]
";
    let Some((_world, client, _apps)) = world("precedence", &route(rules)).await else { return };
    let addr = SocketAddr::from(WEB);
    for (path, headers, body) in [
        ("/a", &[][..], "two GET /a"),
        ("/a", &[("x", "1")][..], "two GET /a"),
        ("/a/b", &[("x", "1")][..], "one GET /a/b"),
        ("/b", &[][..], "one GET /b"),
    ] {
        assert_eq!(apps::get(&client, addr, path, headers).await.unwrap().body, body, "{path} {headers:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn weights_share_the_requests() {
    let rules = "  - backendRefs: [{name: web, port: 80, weight: 1}, {name: two, port: 80, weight: 3}]\n";
    let Some((_world, client, _apps)) = world("weights", &route(rules)).await else { return };
    let mut two = 0;
    for _ in 0..200 {
        let answer = apps::get(&client, SocketAddr::from(WEB), "/", &[]).await.unwrap();
        two += u32::from(answer.body.starts_with("two"));
    }
    // 150 expected; six standard deviations (6.1 each) on both sides.
    assert!((113..=187).contains(&two), "{two} of 200");
}

#[tokio::test(flavor = "multi_thread")]
async fn timeouts_answer_504() {
    let rules = "  - matches: [{path: {value: /sleep/2000}}]
    timeouts: {request: 300ms}
  - matches: [{path: {value: /sleep/3000}}]
    timeouts: {request: 10s, backendRequest: 300ms}
  - matches: [{path: {value: /sleep/10}}]
    timeouts: {request: 5s, backendRequest: 5s}
";
    let rules = rules.replace("    timeouts", "    backendRefs: [{name: web, port: 80}]\n    timeouts");
    let Some((_world, client, _apps)) = world("timeouts", &route(&rules)).await else { return };
    for (path, status) in [("/sleep/2000", 504), ("/sleep/3000", 504), ("/sleep/10", 200)] {
        let started = std::time::Instant::now();
        let answer = apps::get(&client, SocketAddr::from(WEB), path, &[]).await.unwrap();
        assert_eq!(answer.status, status, "{path}");
        assert!(started.elapsed().as_millis() < 1900, "{path}: {:?}", started.elapsed());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backend_that_is_not_there_takes_its_share_with_500() {
    let rules = "  - backendRefs: [{name: web, port: 80}, {name: nowhere, port: 80}]\n";
    let Some((_world, client, _apps)) = world("nowhere", &route(rules)).await else { return };
    let mut statuses = [0; 2];
    for _ in 0..60 {
        match apps::get(&client, SocketAddr::from(WEB), "/", &[]).await.unwrap().status {
            StatusCode::OK => statuses[0] += 1,
            StatusCode::INTERNAL_SERVER_ERROR => statuses[1] += 1,
            other => panic!("{other}"),
        }
    }
    assert!(statuses[0] > 5 && statuses[1] > 5, "{statuses:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_that_no_rule_matches_get_404() {
    let rules = "  - matches: [{path: {value: /only}}]\n    backendRefs: [{name: web, port: 80}]\n";
    let Some((_world, client, _apps)) = world("unmatched", &route(rules)).await else { return };
    let status = apps::get(&client, SocketAddr::from(WEB), "/other", &[]).await.unwrap().status;
    assert_eq!(status, StatusCode::NOT_FOUND);
}

#[tokio::test(flavor = "multi_thread")]
async fn no_endpoint_is_503_or_504_with_a_reason() {
    let Some((world, client, _apps)) = world("empty", "").await else { return };
    world.manifest("web", &service("web", "nobody", &["10.96.0.10"], &[("http", 80, "http", None)]));
    world
        .eventually("the service loses its endpoints", async || {
            let answer = apps::get(&client, SocketAddr::from(WEB), "/", &[]).await.unwrap();
            matches!(answer.status.as_u16(), 503 | 504) && answer.headers.contains_key("l5d-proxy-error")
        })
        .await;
}
