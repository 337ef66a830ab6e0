//! Routes of every kind and version: what matches, what goes before what, to whom it applies, and where it leads.

use crate::{
    apps,
    site::{Case, Site, case_addr},
    world::service,
};
use std::{fs, net::SocketAddr};

/// An HTTPRoute of the Gateway API on SVC.
macro_rules! http {
    ($spec:literal) => {
        concat!(
            "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {name: SVC, namespace: shop}\n",
            "spec: {parentRefs: [{group: '', kind: Service, name: SVC, port: 80}], ",
            $spec,
            "}\n"
        )
    };
}

const HTTP: &[Case] = &[
    Case {
        what: "paths",
        routes: http!(
            "rules: [
  {matches: [{path: {type: Exact, value: /v2}}], backendRefs: [{name: three, port: 80}]},
  {matches: [{path: {value: /v2/}}], backendRefs: [{name: two, port: 80}]},
  {matches: [{path: {value: /v2/deep}}], backendRefs: [{name: one, port: 80}]},
  {matches: [{path: {type: RegularExpression, value: '/r[0-9]+'}}], backendRefs: [{name: two, port: 80}]}]"
        ),
        asks: &[
            ("GET /v2", &["200", "three GET /v2"]),
            ("GET /v2/", &["two GET /v2/"]),
            ("GET /v2/x?y=1", &["two GET /v2/x"]),
            ("GET /v2/deep/x", &["one GET /v2/deep/x"]),
            ("GET /v2/deeper", &["two GET /v2/deeper"]),
            ("GET /v2x", &["404"]),
            ("GET /V2", &["404"]),
            ("GET /r7", &["two GET /r7"]),
            ("h2 GET /r77", &["two GET /r77"]),
            ("GET /r", &["404"]),
            ("GET /r7/", &["404"]),
        ],
    },
    Case {
        what: "methods, headers, parameters, the host",
        routes: http!(
            "rules: [
  {matches: [{method: DELETE}, {headers: [{name: X-Kind, value: a}, {name: x-more, type: RegularExpression, value: 'b+'}]}], backendRefs: [{name: two, port: 80}]},
  {matches: [{queryParams: [{name: q, value: 'a b'}]}, {queryParams: [{name: num, type: RegularExpression, value: '[0-9]+'}]}], backendRefs: [{name: three, port: 80}]},
  {matches: [{headers: [{name: Host, value: api.test}]}], backendRefs: [{name: three, port: 80}]}]"
        ),
        asks: &[
            ("DELETE /", &["two DELETE /"]),
            ("GET /", &["404"]),
            ("GET / | x-kind: a | X-More: bbb", &["two GET /"]),
            ("GET / | x-kind: A | x-more: b", &["404"]),
            ("GET / | x-kind: a | x-more: abb", &["404"]),
            ("GET / | x-kind: a", &["404"]),
            ("GET /?q=a%20b", &["three GET /"]),
            ("GET /?q=a+b&q=c", &["three GET /"]),
            ("GET /?q=c&q=a+b", &["404"]),
            ("GET /?Q=a+b", &["404"]),
            ("GET /?num=12", &["three GET /"]),
            ("GET /?num=12x", &["404"]),
            ("GET / | host: api.test", &["three GET /"]),
            ("h2 GET / | host: api.test", &["three GET /"]),
        ],
    },
    Case {
        what: "precedence",
        routes: http!(
            "rules: [
  {matches: [{path: {value: /}, method: GET, headers: [{name: h, value: '1'}, {name: i, value: '1'}], queryParams: [{name: q, value: '1'}]}], backendRefs: [{name: one, port: 80}]},
  {matches: [{path: {value: /a}}], backendRefs: [{name: two, port: 80}]},
  {matches: [{path: {value: /a}, queryParams: [{name: q, value: '1'}]}], backendRefs: [{name: three, port: 80}]},
  {matches: [{path: {value: /a}, headers: [{name: h, value: '1'}]}], backendRefs: [{name: two, port: 80}]},
  {matches: [{path: {value: /a}, headers: [{name: h, value: '1'}, {name: i, value: '1'}]}], backendRefs: [{name: one, port: 80}]},
  {matches: [{path: {value: /a}, method: POST}], backendRefs: [{name: three, port: 80}]},
  {matches: [{path: {type: Exact, value: /a}}], backendRefs: [{name: one, port: 80}]},
  {matches: [{path: {value: /b}}], backendRefs: [{name: three, port: 80}]},
  {matches: [{path: {value: /b}}], backendRefs: [{name: two, port: 80}]}]"
        ),
        asks: &[
            ("POST /a | h: 1 | i: 1", &["one POST /a"]),
            ("POST /a/ | h: 1 | i: 1", &["three POST /a/"]),
            ("GET /a/ | h: 1 | i: 1", &["one GET /a/"]),
            ("GET /a/?q=1 | h: 1", &["two GET /a/"]),
            ("GET /a/?q=1", &["three GET /a/"]),
            ("GET /a/", &["two GET /a/"]),
            ("GET /?q=1 | h: 1 | i: 1", &["one GET /"]),
            ("GET /b", &["three GET /b"]),
        ],
    },
    Case {
        what: "among routes the older goes before, then the name",
        routes: "apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: SVC-b, namespace: shop, creationTimestamp: '2026-01-02T00:00:00Z'}
spec: {parentRefs: [{group: '', kind: Service, name: SVC}], rules: [{matches: [{path: {value: /x}}, {path: {value: /y}}], backendRefs: [{name: two, port: 80}]}]}
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: SVC-a, namespace: shop, creationTimestamp: '2026-01-02T00:00:00Z'}
spec: {parentRefs: [{group: '', kind: Service, name: SVC}], rules: [{matches: [{path: {value: /x}}], backendRefs: [{name: three, port: 80}]}]}
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: SVC-c, namespace: shop, creationTimestamp: '2026-01-01T00:00:00Z'}
spec: {parentRefs: [{group: '', kind: Service, name: SVC}], rules: [{matches: [{path: {value: /y}}], backendRefs: [{name: one, port: 80}]}]}
",
        asks: &[("GET /x", &["three GET /x"]), ("GET /y", &["one GET /y"])],
    },
    Case {
        what: "parents by port and by name of the port",
        routes: "apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: SVC-named, namespace: shop}
spec: {parentRefs: [{group: '', kind: Service, name: SVC, sectionName: http}], rules: [{name: first, matches: [{path: {value: /named}}], backendRefs: [{name: two, port: 80}]}, {name: second, matches: [{path: {value: /}}], backendRefs: [{name: three, port: 80}]}]}
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: SVC-elsewhere, namespace: shop}
spec: {parentRefs: [{group: '', kind: Service, name: SVC, sectionName: http, port: 90}, {group: '', kind: Service, name: SVC, sectionName: nothing}, {name: a-gateway}], rules: [{matches: [{path: {type: Exact, value: /named}}], backendRefs: [{name: one, port: 80}]}]}
",
        asks: &[("GET /named", &["two GET /named"]), ("GET /x", &["three GET /x"])],
    },
    Case {
        what: "another port keeps its implicit route",
        routes: "apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: SVC, namespace: shop}
spec: {parentRefs: [{group: '', kind: Service, name: SVC, port: 90}], rules: [{backendRefs: [{name: two, port: 80}]}]}
",
        asks: &[("GET /", &["one GET /"])],
    },
    Case {
        what: "backends that cannot be, and shares of nothing",
        routes: http!(
            "rules: [
  {matches: [{path: {value: /gone}}], backendRefs: [{name: gone, port: 80}, {name: one, port: 80, weight: 0}]},
  {matches: [{path: {value: /port}}], backendRefs: [{name: one, port: 81}]},
  {matches: [{path: {value: /kind}}], backendRefs: [{group: example.com, kind: Bucket, name: one, port: 80}]},
  {matches: [{path: {value: /import}}], backendRefs: [{group: multicluster.x-k8s.io, kind: ServiceImport, name: one, port: 80}]},
  {matches: [{path: {value: /external}}], backendRefs: [{group: gateway.networking.x-k8s.io, kind: XBackend, name: one}]},
  {matches: [{path: {value: /none}}]},
  {matches: [{path: {value: /zero}}], backendRefs: [{name: one, port: 80, weight: 0}]},
  {matches: [{path: {value: /harmless}}], backendRefs: [{name: gone, port: 80, weight: 0}, {name: two, port: 80, weight: 1}]}]"
        ),
        asks: &[
            ("GET /gone", &["500"]),
            ("GET /port", &["500"]),
            ("GET /kind", &["500"]),
            ("GET /import", &["500"]),
            ("GET /external", &["500"]),
            ("GET /none", &["500"]),
            ("GET /zero", &["500"]),
            ("GET /harmless", &["two GET /harmless"]),
            ("grpc POST /gone/x", &["200", "grpc-status: 14"]),
        ],
    },
    Case {
        what: "Linkerd's own HTTPRoute: hosts count, and headers before the method",
        routes: "apiVersion: policy.linkerd.io/v1beta3
kind: HTTPRoute
metadata: {name: SVC, namespace: shop}
spec:
  hostnames: [api.test, '*.wild.test']
  parentRefs: [{group: core, kind: Service, name: SVC, port: 80}]
  rules:
  - {matches: [{method: POST}], backendRefs: [{name: two, port: 80}]}
  - {matches: [{headers: [{name: h, value: '1'}]}], backendRefs: [{name: three, port: 80}]}
  - {}
",
        asks: &[
            ("POST / | host: api.test | h: 1", &["three POST /"]),
            ("POST / | host: a.b.wild.test:80", &["two POST /"]),
            ("GET / | host: API.test", &["one GET /"]),
            ("GET / | host: wild.test", &["404"]),
            ("h2 GET / | host: other.test", &["404"]),
        ],
    },
    Case {
        what: "hostnames of the Gateway API say nothing in a mesh",
        routes: http!("hostnames: [api.test], rules: [{backendRefs: [{name: two, port: 80}]}]"),
        asks: &[("GET / | host: other.test", &["two GET /"])],
    },
];

#[tokio::test(flavor = "multi_thread")]
async fn http_routes_match_by_everything_a_request_has() {
    Site::check("routes-http", HTTP).await;
}

/// A GRPCRoute on SVC.
macro_rules! grpc {
    ($spec:literal) => {
        concat!(
            "apiVersion: gateway.networking.k8s.io/v1\nkind: GRPCRoute\nmetadata: {name: SVC, namespace: shop}\n",
            "spec: {parentRefs: [{group: '', kind: Service, name: SVC}], ",
            $spec,
            "}\n"
        )
    };
}

const GRPC: &[Case] = &[
    Case {
        what: "methods and metadata",
        routes: grpc!(
            "rules: [
  {matches: [{method: {service: a.B}}], backendRefs: [{name: one, port: 80}]},
  {matches: [{method: {service: a.B, method: Get}}], backendRefs: [{name: two, port: 80}]},
  {matches: [{method: {service: a.B, method: Get}, headers: [{name: h, value: '1'}]}], backendRefs: [{name: three, port: 80}]},
  {matches: [{method: {type: RegularExpression, service: 'x\\..*', method: 'L.+'}}], backendRefs: [{name: two, port: 80}]},
  {matches: [{headers: [{name: canary, value: 'yes'}]}], backendRefs: [{name: three, port: 80}]},
  {matches: [{method: {service: gone.S}}], backendRefs: [{name: gone, port: 80}]}]"
        ),
        asks: &[
            ("grpc POST /a.B/Put", &["grpc-status: 0", "x-app: one"]),
            ("grpc POST /a.B/Get", &["grpc-status: 0", "x-app: two"]),
            ("grpc POST /a.B/Get | h: 1", &["grpc-status: 0", "x-app: three"]),
            ("grpc POST /x.Y/List", &["grpc-status: 0", "x-app: two"]),
            ("grpc POST /x.Y/L", &["200", "grpc-status: 12"]),
            ("grpc POST /a.b/Get", &["200", "grpc-status: 12"]),
            ("grpc POST /any.S/M | canary: yes", &["x-app: three"]),
            ("grpc POST /gone.S/M", &["200", "grpc-status: 14"]),
            ("h2 GET /a.B/Get", &["404"]),
        ],
    },
    Case {
        what: "a GRPCRoute goes before an HTTPRoute on the same port",
        routes: concat!(
            "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {name: SVC, namespace: shop}\n",
            "spec: {parentRefs: [{group: '', kind: Service, name: SVC}], rules: [{backendRefs: [{name: two, port: 80}]}]}\n---\n",
            "apiVersion: gateway.networking.k8s.io/v1\nkind: GRPCRoute\nmetadata: {name: SVC, namespace: shop}\n",
            "spec: {parentRefs: [{group: '', kind: Service, name: SVC}], rules: [{backendRefs: [{name: three, port: 80}]}]}\n",
        ),
        asks: &[("grpc POST /a.B/Get", &["grpc-status: 0", "x-app: three"])],
    },
];

#[tokio::test(flavor = "multi_thread")]
async fn grpc_routes_match_methods_and_metadata() {
    Site::check("routes-grpc", GRPC).await;
}

#[track_caller]
fn assert_refused(heard: &str) {
    assert!(matches!(heard, "closed" | "reset"), "{heard}");
}

/// A TLSRoute or TCPRoute.
fn l4(kind: &str, name: &str, service: &str, spec: &str) -> String {
    format!(
        "---\napiVersion: gateway.networking.k8s.io/v1\nkind: {kind}\nmetadata: {{name: {name}, namespace: shop}}\nspec: {{parentRefs: [{{group: '', kind: Service, name: {service}}}], {spec}}}\n"
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn tls_routes_choose_by_sni_and_tcp_routes_by_nothing() {
    let mut manifests = String::new();
    for (i, name) in ["sni", "tcp", "closed", "split"].into_iter().enumerate() {
        manifests += "---\n";
        manifests += &service(name, "one", &[&format!("10.96.2.{}", i + 1)], &[("bytes", 90, "9000", None)]);
    }
    let to = |backend: &str| format!("rules: [{{backendRefs: [{{name: {backend}, port: 90}}]}}]");
    for (name, hosts, backend) in
        [("any", "'*.test'", "one"), ("sub", "'*.sub.test', other.example", "two"), ("exact", "a.sub.test", "three")]
    {
        manifests += &l4("TLSRoute", name, "sni", &format!("hostnames: [{hosts}], {}", to(backend)));
    }
    manifests += &l4("TCPRoute", "b", "tcp", &to("one"));
    manifests += &l4("TCPRoute", "a", "tcp", &to("two"));
    manifests += &l4("TCPRoute", "gone", "closed", &to("gone"));
    manifests += &l4(
        "TCPRoute",
        "split",
        "split",
        "rules: [{backendRefs: [{name: two, port: 90, weight: 1}, {name: three, port: 90, weight: 1}]}]",
    );
    let Some(site) = Site::new("routes-l4", &manifests, &[]).await else { return };
    for (sni, greeting) in [
        ("a.test", "one"),
        ("x.y.test", "one"),
        ("b.sub.test", "two"),
        ("A.SUB.test", "three"),
        ("a.a.sub.test", "two"),
        ("other.example", "two"),
    ] {
        let heard = site.greeting(case_addr(0, 90), &apps::client_hello(sni)).await;
        assert_eq!(heard, greeting, "{sni}\n{}", site.world.logs());
    }
    for bytes in [apps::client_hello("test"), apps::client_hello("another.example"), b"GET / HTTP/1.1\r\n\r\n".to_vec()]
    {
        assert_refused(&site.greeting(case_addr(0, 90), &bytes).await);
    }
    // Silent clients hear the server at once: nothing is looked for on a port with a TCPRoute. By age and then by name.
    assert_eq!(site.greeting(case_addr(1, 90), b"").await, "two");
    assert_eq!(site.greeting(case_addr(1, 90), b"GET / HTTP/1.1\r\n\r\n").await, "two");
    assert_refused(&site.greeting(case_addr(2, 90), b"x").await);
    let mut heard = std::collections::BTreeMap::<_, u32>::new();
    for _ in 0..40 {
        *heard.entry(site.greeting(case_addr(3, 90), b"").await).or_default() += 1;
    }
    // A fair coin shows one side 40 times in a row once in 2^39 runs.
    assert_eq!(heard.keys().map(String::as_str).collect::<Vec<_>>(), ["three", "two"]);
}

/// Services and routes of other namespaces than the client's.
#[tokio::test(flavor = "multi_thread")]
async fn producers_consumers_and_backends_of_other_namespaces() {
    let route = |name: &str, namespace: &str, service: &str, backend: &str| {
        format!(
            "---\napiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {{name: {name}, namespace: {namespace}}}\nspec: {{parentRefs: [{{group: '', kind: Service, name: {service}, namespace: prod}}], rules: [{{backendRefs: [{{{backend}, port: 80}}]}}]}}\n"
        )
    };
    let mut manifests = String::new();
    for (i, name) in ["produced", "consumed", "plain"].into_iter().enumerate() {
        let service = service(name, "nobody", &[&format!("10.96.2.{}", i + 1)], &[("http", 80, "8080", None)]);
        manifests += &format!("---\n{}", service.replace("namespace: shop", "namespace: prod"));
    }
    manifests += &route("r", "prod", "produced", "name: two, namespace: shop");
    manifests += &route("r", "shop", "consumed", "name: three");
    manifests += &route("producer", "prod", "consumed", "name: two, namespace: shop");
    manifests += &route("stranger", "elsewhere", "produced", "name: three, namespace: shop");
    manifests += &route("stranger", "elsewhere", "consumed", "name: one, namespace: shop");
    let Some(site) = Site::new("routes-namespaces", &manifests, &[]).await else { return };
    assert!(site.ask(case_addr(0, 80), "GET /").await.contains(&"two GET /".to_string()), "{}", site.world.logs());
    assert!(site.ask(case_addr(1, 80), "GET /").await.contains(&"three GET /".to_string()), "{}", site.world.logs());
    // Without the consumer's, the producer's routes are in force; without any, the Service's own endpoints.
    let without = |gone: &str| {
        let keep = |doc: &&str| !doc.contains(gone);
        manifests.split("---\n").filter(keep).collect::<Vec<_>>().join("---\n")
    };
    site.world.manifest("routes", &without("name: r, namespace: shop"));
    let becomes = async |index: usize, line: &str| {
        let what = format!("{line} at {index}");
        let there = async || site.ask(case_addr(index, 80), "GET /").await.iter().any(|l| l == line);
        site.world.eventually(&what, there).await;
    };
    becomes(1, "two GET /").await;
    site.world.manifest("routes", &without("kind: HTTPRoute"));
    // There are none.
    becomes(0, "503").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn removing_a_route_takes_effect_as_adding_it_does() {
    let manifests = l4("TCPRoute", "bytes", "one", "rules: [{backendRefs: [{name: two, port: 90}]}]")
        .replace("name: one}", "name: one, port: 90}");
    let http = |backend: &str| {
        http!("rules: [{matches: [{path: {value: /only}}], backendRefs: [{name: BACKEND, port: 80}]}]")
            .replace("SVC", "one")
            .replace("BACKEND", backend)
    };
    let Some(site) = Site::new("routes-removed", &manifests, &[]).await else { return };
    let (web, bytes) = (SocketAddr::from(([10, 96, 1, 1], 80)), SocketAddr::from(([10, 96, 1, 1], 90)));
    // One connection that outlives all changes, so that nothing is looked up anew.
    let mut kept = apps::http1(&site.client, web).await;
    let mut get = async |path: &str| {
        let req = http::Request::get(path).header("host", "one").body(http_body_util::Full::default()).unwrap();
        kept.ready().await.unwrap();
        let answer = apps::read(kept.send_request(req).await.unwrap()).await.unwrap();
        if answer.status == 200 { answer.body } else { answer.status.as_str().into() }
    };
    assert_eq!(get("/x").await, "one GET /x");
    for backend in ["two", "three"] {
        site.world.manifest("http", &http(backend));
        site.world
            .eventually("the route is there", async || get("/only").await == format!("{backend} GET /only"))
            .await;
        assert_eq!(get("/x").await, "404");
        fs::remove_file(site.world.manifests().join("http.yaml")).unwrap();
        site.world.eventually("the route is gone", async || get("/x").await == "one GET /x").await;
        assert_eq!(get("/only").await, "one GET /only");
    }
    assert_eq!(site.greeting(bytes, b"").await, "two");
    site.world.manifest("routes", "");
    site.world.eventually("the bytes go back", async || site.greeting(bytes, b"").await == "one").await;
}

/// One set of manifests for each release of the Gateway API since 1.0, with the versions that it had.
#[tokio::test(flavor = "multi_thread")]
async fn every_release_of_the_gateway_api_is_read() {
    // HTTPRoute, GRPCRoute, TLSRoute, TCPRoute.
    let releases = [
        ["v1beta1", "v1alpha2", "v1alpha2", "v1alpha2"],
        ["v1", "v1alpha2", "v1alpha2", "v1alpha2"],
        ["v1", "v1", "v1alpha3", "v1alpha2"],
        ["v1", "v1", "v1", "v1"],
    ];
    let route = |kind: &str, version: &str, i: usize, port: u16, rest: &str| {
        format!(
            "---\napiVersion: gateway.networking.k8s.io/{version}\nkind: {kind}\nmetadata: {{name: r{i}-{port}, namespace: shop}}\nspec: {{parentRefs: [{{group: '', kind: Service, name: release-{i}, port: {port}}}], {rest}rules: [{{backendRefs: [{{name: two, port: {}}}]}}]}}\n",
            if port < 90 { 80 } else { 90 }
        )
    };
    let mut manifests = String::new();
    for (i, [http, grpc, tls, tcp]) in releases.into_iter().enumerate() {
        let ports = [
            ("http", 80, "8080", None),
            ("grpc", 81, "8080", None),
            ("tls", 90, "9000", None),
            ("tcp", 91, "9000", None),
            ("any", 92, "9000", None),
        ];
        manifests += "---\n";
        manifests += &service(&format!("release-{i}"), "one", &[&case_addr(i, 80).ip().to_string()], &ports);
        manifests += &route("HTTPRoute", http, i, 80, "");
        manifests += &route("GRPCRoute", grpc, i, 81, "");
        manifests += &route("TLSRoute", tls, i, 90, "hostnames: [a.test], ");
        manifests += &route("TCPRoute", tcp, i, 91, "");
        if tls == "v1alpha2" {
            // Names were optional then.
            manifests += &route("TLSRoute", tls, i, 92, "");
        }
    }
    let Some(site) = Site::new("routes-versions", &manifests, &[]).await else { return };
    let mut wrong = String::new();
    for (i, release) in releases.into_iter().enumerate() {
        let what = format!("{release:?}");
        site.compare(case_addr(i, 80), &what, "GET /", &["two GET /"], &mut wrong).await;
        site.compare(case_addr(i, 81), &what, "grpc POST /a.B/C", &["x-app: two", "grpc-status: 0"], &mut wrong).await;
        let hello = apps::client_hello("a.test");
        assert_eq!(site.greeting(case_addr(i, 90), &hello).await, "two", "{what}");
        assert_eq!(site.greeting(case_addr(i, 91), b"").await, "two", "{what}");
        if release[2] == "v1alpha2" {
            assert_eq!(site.greeting(case_addr(i, 92), &hello).await, "two", "{what}");
        }
    }
    assert!(wrong.is_empty(), "{wrong}");
}
