//! Ingress mode: requests name their destination; and traffic that would come back to where it left.

use crate::{
    apps,
    site::Site,
    world::{World, service},
};
use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};
use tokio::io::AsyncWriteExt;

const ONE: ([u8; 4], u16) = ([10, 96, 1, 1], 80);

#[tokio::test(flavor = "multi_thread")]
async fn requests_name_their_destination() {
    let route = "apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: three, namespace: shop}
spec: {parentRefs: [{group: '', kind: Service, name: three}], rules: [{matches: [{path: {value: /to-two}}], backendRefs: [{name: two, port: 80}]}, {backendRefs: [{name: three, port: 80}]}]}
";
    let env = [("LINKERD2_PROXY_INGRESS_MODE", "true")];
    let Some(site) = Site::new("ingress", route, &env).await else { return };
    let mut wrong = String::new();
    for (what, ask, lines) in [
        (
            "by name",
            "GET /headers | l5d-dst-override: two.shop.svc.cluster.local",
            &["two GET /headers", "!l5d-dst"][..],
        ),
        ("with a port", "GET / | l5d-dst-override: two.shop.svc.cluster.local:80", &["two GET /"]),
        ("HTTP/2", "h2 GET / | l5d-dst-override: two.shop.svc.cluster.local:80", &["two GET /"]),
        ("through its routes", "GET /to-two | l5d-dst-override: three.shop.svc.cluster.local", &["two GET /to-two"]),
        ("by the original address", "GET /headers", &["one GET /headers", "host: web.shop"]),
        ("no name at all", "GET / | l5d-dst-override: not a name", &["400", "!l5d-proxy-error"]),
        ("nobody's name", "GET / | l5d-dst-override: gone.shop.svc.cluster.local", &["503", "!l5d-proxy-error"]),
        ("a port that is not there", "GET / | l5d-dst-override: two.shop.svc.cluster.local:81", &["500"]),
    ] {
        site.compare(SocketAddr::from(ONE), what, ask, lines, &mut wrong).await;
    }
    assert!(wrong.is_empty(), "{wrong}\n{}", site.world.logs());
    // One connection may name another destination with each request.
    let mut kept = apps::http1(&site.client, SocketAddr::from(ONE)).await;
    for name in ["two", "three", "two"] {
        let req = http::Request::get("/").header("host", "web.shop");
        let req = req.header("l5d-dst-override", format!("{name}.shop.svc.cluster.local:80"));
        kept.ready().await.unwrap();
        let rsp = kept.send_request(req.body(http_body_util::Full::default()).unwrap()).await.unwrap();
        assert_eq!(apps::read(rsp).await.unwrap().body, format!("{name} GET /"));
    }
    // What is no HTTP goes where it was sent, and who is silent hears the server.
    let started = Instant::now();
    for bytes in [&b"\0bytes"[..], b"", b""] {
        assert_eq!(site.greeting((ONE.0, 90).into(), bytes).await, "one");
    }
    assert!(started.elapsed() < Duration::from_secs(4), "{:?}", started.elapsed());
    // A client that takes its time may still name another destination.
    let mut io = site.client.connect(ONE.into()).await.unwrap();
    tokio::time::sleep(Duration::from_millis(100)).await;
    let late = b"GET / HTTP/1.1\r\nhost: a\r\nl5d-dst-override: two.shop.svc.cluster.local\r\n\r\n";
    io.write_all(late).await.unwrap();
    apps::expect_text(&mut io, "HTTP/1.1 200 OK\r\nx-version: HTTP/1.1\r\nx-app: two\r\n").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn traffic_to_oneself_arrives_and_loops_are_refused() {
    let Some(mut world) = World::new("loops") else { return };
    let pod = world.meshed("client", &[("http", 8080)], &[]);
    world.manifest("self", &service("self", "client", &["10.96.0.10"], &[("http", 80, "http", None)]));
    // Replicas that are the proxy itself, or lead back to it.
    let mut slices = service("loop", "nobody", &["10.96.0.11"], &[("http", 80, "8080", None)])
        .replace("  selector: {app: nobody}\n", "");
    slices += "---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: loop, namespace: shop, labels: {kubernetes.io/service-name: loop}}
addressType: IPv4
ports: [{name: http, port: 4140}]
endpoints: [{addresses: [127.0.0.1]}]
";
    world.manifest("loop", &slices);
    world.start(&["client"]).await;
    let _app = apps::http(&pod, 8080, "client");
    for addr in [SocketAddr::from(([10, 96, 0, 10], 80)), pod.addr(8080), SocketAddr::new(pod.ip6.into(), 8080)] {
        let answer = apps::get(&pod, addr, "/", &[]).await.unwrap();
        assert_eq!((answer.status.as_u16(), &*answer.body), (200, "client GET /"), "{addr}");
    }
    let answer = apps::get(&pod, ([10, 96, 0, 11], 80).into(), "/", &[]).await.unwrap();
    let told = answer.headers["l5d-proxy-error"].to_str().unwrap();
    assert!(answer.status == 502 && told.contains("127.0.0.1:4140"), "{}: {told}", answer.status);
    // Dialled directly, a listener is an HTTP proxy, but not to itself.
    for local in [SocketAddr::from(([127, 0, 0, 1], 4140)), "[::1]:4140".parse().unwrap()] {
        let answer = apps::get(&pod, local, &format!("http://{local}/"), &[]).await.unwrap();
        let told = answer.headers["l5d-proxy-error"].to_str().unwrap();
        assert!(answer.status == 502 && told.contains(&local.to_string()), "{}: {told}", answer.status);
    }
}
