//! What Services and routes say besides rules: ServiceProfiles, annotations, and traffic that is split by them.

use crate::site::Site;
use std::{
    fs,
    net::SocketAddr,
    time::{Duration, Instant},
};

const ONE: ([u8; 4], u16) = ([10, 96, 1, 1], 80);

#[tokio::test(flavor = "multi_thread")]
async fn service_profiles_route_retry_limit_and_split() {
    let profile = "apiVersion: linkerd.io/v1alpha2
kind: ServiceProfile
metadata: {name: one.shop.svc.cluster.local, namespace: shop}
spec:
  routes:
  - {name: slow, condition: {pathRegex: '/sleep/.*'}, timeout: 300ms}
  - {name: again, condition: {all: [{pathRegex: '/status/503'}, {method: GET}]}, isRetryable: true}
  - {name: fine, condition: {pathRegex: '/status/404'}, isRetryable: true, responseClasses: [{condition: {status: {min: 400, max: 499}}, isFailure: true}]}
  - {name: once, condition: {not: {method: GET}}}
  retryBudget: {retryRatio: 0, minRetriesPerSecond: 1, ttl: 5s}
";
    // What a profile in force takes the place of.
    let route = "apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: one, namespace: shop}
spec: {parentRefs: [{group: '', kind: Service, name: one}], rules: [{backendRefs: [{name: three, port: 80}]}]}
";
    let Some(site) = Site::new("profiles", route, &[]).await else { return };
    let at = SocketAddr::from(ONE);
    assert!(site.ask(at, "GET /").await.contains(&"three GET /".to_string()));
    site.world.manifest("profile", profile);
    let whose = async |name: &str| site.ask(at, "GET /").await.contains(&format!("{name} GET /"));
    site.world.eventually("the profile is in force", async || whose("one").await).await;
    let told = site.ask(at, "GET /headers").await;
    assert!(told.contains(&"l5d-dst-canonical: one.shop.svc.cluster.local:80".to_string()), "{told:?}");
    let started = Instant::now();
    assert_eq!(site.ask(at, "GET /sleep/3000").await[0], "504");
    assert!(started.elapsed() < Duration::from_secs(3));
    let tries = |request: &str| site.http[0].seen().iter().filter(|l| l.starts_with(request)).count();
    assert_eq!(site.ask(at, "POST /status/503").await[0], "503");
    assert_eq!(tries("POST /status/503"), 1);
    // Five retries are in the budget, which all routes share.
    assert_eq!(site.ask(at, "GET /status/503").await[0], "503");
    assert_eq!(site.ask(at, "GET /status/404").await[0], "404");
    let (again, fine) = (tries("GET /status/503"), tries("GET /status/404"));
    assert!((2..=8).contains(&again) && (1..=3).contains(&fine), "{again} and {fine} tries");
    for (name, count) in [("slow", 1.0), ("again", 1.0), ("once", 1.0)] {
        let labels = [format!("rt_route=\"{name}\""), "direction=\"outbound\"".into()];
        let labels: Vec<_> = labels.iter().map(|l| &**l).collect();
        assert_eq!(site.world.metric("client", "route_request_total", &labels).await, count, "{name}");
    }
    site.world.manifest("profile", &format!("{profile}  dstOverrides: [{{authority: two.shop.svc.cluster.local, weight: 1}}, {{authority: 'three.shop.svc.cluster.local:80', weight: 1}}, {{authority: one.shop.svc.cluster.local, weight: 0}}]\n"));
    site.world.eventually("the traffic is split", async || !whose("one").await).await;
    let mut shares = [0; 3];
    for _ in 0..60 {
        let told = site.ask(at, "GET /").await;
        let app = ["x-app: one", "x-app: two", "x-app: three"].iter().position(|a| told.iter().any(|l| l == a));
        shares[app.unwrap()] += 1;
    }
    // Six standard deviations.
    assert!(shares[0] == 0 && (7..=53).contains(&shares[1]), "{shares:?}");
    fs::remove_file(site.world.manifests().join("profile.yaml")).unwrap();
    site.world.eventually("the route is back", async || whose("three").await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn annotations_of_services_and_routes() {
    let one = |annotations: &str, rest: &str| {
        format!(
            "apiVersion: v1\nkind: Service\nmetadata:\n  name: one\n  namespace: shop\n  annotations: {{{annotations}}}\nspec:\n  clusterIP: 10.96.1.1\n  selector: {{app: one}}\n  ports: [{{name: http, port: 80, targetPort: 8080}}, {{name: bytes, port: 90, targetPort: 9000}}]\n{rest}"
        )
    };
    let Some(site) = Site::new("annotations", "", &[]).await else { return };
    let at = SocketAddr::from(ONE);
    let status = async |ask: &str| site.ask(at, ask).await[0].clone();
    let becomes = async |ask: &str, wanted: &str| {
        site.world.eventually(&format!("{ask} is answered {wanted}"), async || status(ask).await == wanted).await;
    };
    let tries = |request: &str| site.http[0].seen().iter().filter(|l| l.as_str() == request).count();
    assert_eq!(status("GET /sleep/500").await, "200");
    site.world.manifest(
        "one",
        &one("timeout.linkerd.io/request: 200ms, retry.linkerd.io/http: '5xx,404', retry.linkerd.io/grpc: internal, retry.linkerd.io/limit: '2', config.linkerd.io/opaque-ports: '90'", ""),
    );
    becomes("GET /sleep/500", "504").await;
    for (ask, request, count) in [
        ("GET /status/500", "GET /status/500", 3),
        ("GET /status/404", "GET /status/404", 3),
        ("GET /status/403", "GET /status/403", 1),
        ("grpc POST /fail/13", "POST http://web.shop/fail/13", 3),
        ("grpc POST /fail/14", "POST http://web.shop/fail/14", 1),
    ] {
        site.ask(at, ask).await;
        assert_eq!(tries(request), count, "{ask}: {:?}", site.http[0].seen());
    }
    // HTTP on an opaque port is bytes: the server's greeting comes before its answer.
    assert_eq!(site.greeting((ONE.0, 90).into(), b"GET / HTTP/1.1\r\n\r\n").await, "one");
    let opaque = ["protocol=\"opaq\"", "parent_name=\"one\""];
    assert_eq!(site.world.metric("client", "outbound_tcp_protocol_connections_total", &opaque).await, 1.0);
    // A route's own sets replace the Service's entirely.
    let route = "---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: one, namespace: shop, annotations: {timeout.linkerd.io/idle: 10s, retry.linkerd.io/http: gateway-error}}
spec: {parentRefs: [{group: '', kind: Service, name: one, port: 80}], rules: [{backendRefs: [{name: one, port: 80}]}]}
";
    site.world.manifest(
        "one",
        &one("timeout.linkerd.io/request: 200ms, retry.linkerd.io/http: 5xx, retry.linkerd.io/limit: '3'", route),
    );
    becomes("GET /sleep/501", "200").await;
    for (ask, request, count) in [("GET /status/501", "GET /status/501", 1), ("GET /status/502", "GET /status/502", 2)]
    {
        site.ask(at, ask).await;
        assert_eq!(tries(request), count, "{ask}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_may_ask_for_retries_and_timeouts_where_the_operator_allows_it() {
    let ask = |status: u16| format!("GET /status/{status} | l5d-retry-http: 5xx | l5d-retry-limit: 2");
    for (args, status, tries, left) in [(&["--allow-l5d-request-headers"][..], "504", 3, false), (&[], "200", 1, true)]
    {
        let test = format!("l5d-headers-{tries}");
        let Some(site) = Site::with_args(&test, "", &[], args).await else { return };
        let at = SocketAddr::from(ONE);
        assert_eq!(site.ask(at, "GET /sleep/500 | l5d-timeout: 200ms").await[0], status);
        assert_eq!(site.ask(at, &ask(503)).await[0], "503");
        assert_eq!(site.http[0].seen().iter().filter(|l| *l == "GET /status/503").count(), tries);
        let told = site.ask(at, "GET /headers | l5d-retry-limit: 2 | l5d-timeout: 10s").await;
        assert_eq!(told.iter().any(|l| l.starts_with("l5d-")), left, "{told:?}");
    }
}
