//! Everything that manifests can ask of the server side: each with a client that gets it and one that is refused.

use crate::{apps, net::Pod, world::World};
use http::StatusCode;
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

const OK: StatusCode = StatusCode::OK;
const FORBIDDEN: StatusCode = StatusCode::FORBIDDEN;
const NOT_FOUND: StatusCode = StatusCode::NOT_FOUND;
const TOO_MANY: StatusCode = StatusCode::TOO_MANY_REQUESTS;

/// A server, two meshed clients and one outside the mesh.
struct Site {
    world: World,
    friend: Pod,
    foe: Pod,
    stranger: Pod,
    server: Pod,
}

const PORTS: [(&str, u16); 6] =
    [("detect", 8080), ("h1", 8081), ("h2", 8082), ("grpc", 8083), ("opaque", 9000), ("tls", 8443)];

impl Site {
    async fn new(test: &str, policy: &str) -> Option<Self> {
        Self::with_env(test, policy, &[]).await
    }

    async fn with_env(test: &str, policy: &str, env: &[(&str, &str)]) -> Option<Self> {
        let mut world = World::new(test)?;
        let friend = world.meshed("friend", &[], &[]);
        let foe = world.meshed("foe", &[], &[]);
        let stranger = world.plain("stranger", &[]);
        let server = world.meshed("server", &PORTS, &[]);
        let policy = policy.replace("STRANGER", &stranger.ip4.to_string()).replace("FRIEND", &friend.ip4.to_string());
        world.manifest("policy", &policy);
        for name in ["friend", "foe", "server"] {
            world.spawn(name, env);
        }
        for name in ["friend", "foe", "server"] {
            world.wait_ready(name).await;
        }
        Some(Self { world, friend, foe, stranger, server })
    }

    async fn get(&self, from: &Pod, port: u16, path: &str) -> StatusCode {
        apps::get(from, self.server.addr(port), path, &[]).await.expect("an answer").status
    }

    async fn get2(&self, from: &Pod, port: u16) -> StatusCode {
        let mut send = apps::http2(from, self.server.addr(port)).await;
        let req = http::Request::get("http://web.shop/").body(http_body_util::Full::default()).unwrap();
        send.send_request(req).await.expect("an answer").status()
    }
}

/// A Server on a port, given by name or number.
fn server(name: &str, port: &str, protocol: &str, access: &str) -> String {
    format!(
        "apiVersion: policy.linkerd.io/v1beta3\nkind: Server\nmetadata: {{name: {name}, namespace: shop, labels: {{server: {name}}}}}\nspec: {{podSelector: {{matchLabels: {{app: server}}}}, port: {port}, proxyProtocol: {protocol}, accessPolicy: {access}}}\n---\n"
    )
}

/// An AuthorizationPolicy on a target that demands something.
fn authorize(name: &str, target: &str, requires: &str) -> String {
    format!(
        "apiVersion: policy.linkerd.io/v1alpha1\nkind: AuthorizationPolicy\nmetadata: {{name: {name}, namespace: shop}}\nspec: {{targetRef: {{{target}}}, requiredAuthenticationRefs: [{requires}]}}\n---\n"
    )
}

const FRIENDS: &str = "
apiVersion: policy.linkerd.io/v1alpha1
kind: MeshTLSAuthentication
metadata: {name: friends, namespace: shop}
spec: {identities: [friend.shop.serviceaccount.identity.linkerd.cluster.local]}
---
";
const ARE_FRIENDS: &str = "{group: policy.linkerd.io, kind: MeshTLSAuthentication, name: friends}";

#[tokio::test(flavor = "multi_thread")]
async fn servers_of_every_protocol_serve_the_mesh_and_refuse_strangers() {
    let policy = [
        server("detect", "detect", "unknown", "all-authenticated"),
        server("h1", "8081", "HTTP/1", "all-authenticated"),
        server("h2", "h2", "HTTP/2", "all-authenticated"),
        server("grpc", "grpc", "gRPC", "all-authenticated"),
        server("opaque", "9000", "opaque", "all-authenticated"),
        server("tls", "tls", "TLS", "all-authenticated"),
    ];
    let Some(site) = Site::new("servers", &policy.concat()).await else { return };
    let pod = &site.server;
    let _apps = [8080, 8081, 8082, 8083].map(|port| apps::http(pod, port, "server"));
    let _tcp = [9000, 8443].map(|port| apps::tcp_echo(pod, port));
    for (who, http, grpc) in [(&site.friend, OK, (OK, "0")), (&site.stranger, FORBIDDEN, (OK, "7"))] {
        assert_eq!(site.get(who, 8080, "/").await, http, "{} detect", who.name);
        assert_eq!(site.get2(who, 8080).await, http, "{} detect, HTTP/2", who.name);
        assert_eq!(site.get(who, 8081, "/").await, http, "{} HTTP/1", who.name);
        assert_eq!(site.get2(who, 8082).await, http, "{} HTTP/2", who.name);
        let (status, code) = apps::grpc(who, pod.addr(8083), "/pkg.Svc/Do").await;
        assert_eq!((status, &*code), grpc, "{} gRPC", who.name);
    }
    let hello = apps::client_hello("app.example");
    for (port, bytes) in [(9000, &b"\0bytes"[..]), (9000, b"GET / HTTP/1.1\r\n\r\n"), (9000, &hello), (8443, &hello)] {
        let back = apps::send_bytes(&site.friend, pod.addr(port), bytes).await;
        assert_eq!(back, bytes, "{port}\n{}", site.world.logs());
        assert_eq!(apps::send_bytes(&site.stranger, pod.addr(port), bytes).await, b"", "{port}");
    }
    // Bytes where the port's policy knows HTTP alone.
    assert_eq!(apps::send_bytes(&site.stranger, pod.addr(8080), b"\0bytes").await, b"");
    for name in ["detect", "h1", "h2", "grpc"] {
        let labels = [format!("srv_name=\"{name}\""), "tls=\"no_identity\"".to_string()];
        let labels: Vec<_> = labels.iter().map(|l| &**l).collect();
        assert!(site.world.metric("server", "inbound_http_authz_deny_total", &labels).await >= 1.0, "{name}");
    }
    for name in ["opaque", "tls", "detect"] {
        let label = format!("srv_name=\"{name}\"");
        assert!(site.world.metric("server", "inbound_tcp_authz_deny_total", &[&label]).await >= 1.0, "{name}");
    }
    let log = site.world.log("server");
    assert!(log.contains("needs a verified identity"), "refusals say why:\n{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn server_authorizations_admit_by_identity_suffix_tls_and_network() {
    let authorization = |name: &str, server: &str, client: &str| {
        format!(
            "apiVersion: policy.linkerd.io/v1beta1\nkind: ServerAuthorization\nmetadata: {{name: {name}, namespace: shop}}\nspec: {{server: {{{server}}}, client: {{{client}}}}}\n---\n"
        )
    };
    let policy = [
        server("detect", "detect", "unknown", "deny"),
        server("h1", "h1", "HTTP/1", "deny"),
        server("h2", "h2", "HTTP/2", "deny"),
        server("grpc", "grpc", "gRPC", "deny"),
        authorization("account", "name: detect", "meshTLS: {serviceAccounts: [{name: friend}]}"),
        authorization(
            "suffix",
            "selector: {matchLabels: {server: h1}}",
            "meshTLS: {identities: ['*.shop.serviceaccount.identity.linkerd.cluster.local']}",
        ),
        authorization("tls", "name: h2", "meshTLS: {unauthenticatedTLS: true}"),
        authorization(
            "network",
            "name: grpc",
            "unauthenticated: true, networks: [{cidr: 10.88.0.0/16, except: [FRIEND/32]}]",
        ),
    ];
    let Some(site) = Site::new("server-authz", &policy.concat()).await else { return };
    let _apps = [8080, 8081, 8082, 8083].map(|port| apps::http(&site.server, port, "server"));
    for (who, account, suffix, tls, network) in [
        (&site.friend, OK, OK, OK, "7"),
        (&site.foe, FORBIDDEN, OK, OK, "0"),
        (&site.stranger, FORBIDDEN, FORBIDDEN, FORBIDDEN, "0"),
    ] {
        assert_eq!(site.get(who, 8080, "/").await, account, "{}", who.name);
        assert_eq!(site.get(who, 8081, "/").await, suffix, "{}", who.name);
        assert_eq!(site.get2(who, 8082).await, tls, "{}", who.name);
        assert_eq!(apps::grpc(who, site.server.addr(8083), "/a.B/C").await.1, network, "{}", who.name);
    }
    let log = site.world.log("server");
    for why in ["is none of its 1 identities", "needs mesh TLS", "is among the exceptions of 10.88.0.0/16"] {
        assert!(log.contains(why), "{why:?} is missing:\n{log}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn authorization_policies_on_servers_routes_and_namespaces() {
    let route = |name: &str, path: &str| {
        format!(
            "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {{name: {name}, namespace: shop}}\nspec: {{parentRefs: [{{group: policy.linkerd.io, kind: Server, name: detect}}], rules: [{{matches: [{{path: {{value: {path}}}}}]}}]}}\n---\n"
        )
    };
    let policy = [
        server("detect", "detect", "unknown", "deny"),
        server("h1", "h1", "HTTP/1", "deny"),
        route("public", "/public"),
        route("admin", "/admin"),
        FRIENDS.to_string(),
        authorize("public", "group: gateway.networking.k8s.io, kind: HTTPRoute, name: public", ""),
        authorize("admin", "group: gateway.networking.k8s.io, kind: HTTPRoute, name: admin", ARE_FRIENDS),
        authorize("h1", "group: policy.linkerd.io, kind: Server, name: h1", "{kind: ServiceAccount, name: foe}"),
    ];
    let Some(site) = Site::new("authz-policies", &policy.concat()).await else { return };
    let _apps = [8080, 8081].map(|port| apps::http(&site.server, port, "server"));
    for (who, public, admin, on_server) in
        [(&site.friend, OK, OK, FORBIDDEN), (&site.foe, OK, FORBIDDEN, OK), (&site.stranger, OK, FORBIDDEN, FORBIDDEN)]
    {
        assert_eq!(site.get(who, 8080, "/public/x").await, public, "{}", who.name);
        for path in ["/admin", "/admin/x"] {
            assert_eq!(site.get(who, 8080, path).await, admin, "{} {path}", who.name);
        }
        // However it is written, and wherever it would be allowed by its letters.
        let allowed = admin == OK;
        for path in ["/public/../admin", "/public/%2e%2e/admin", "/public/..%2fadmin", "/public/..;/admin"] {
            assert_eq!(site.get(who, 8080, path).await == OK, allowed, "{} {path}", who.name);
        }
        assert_eq!(site.get(who, 8080, "/other").await, NOT_FOUND, "{}", who.name);
        assert_eq!(site.get(who, 8080, "/public/../other").await, NOT_FOUND, "{}", who.name);
        assert_eq!(site.get(who, 8081, "/").await, on_server, "{}", who.name);
    }
    let denied = ["route_kind=\"HTTPRoute\"", "route_name=\"admin\""];
    assert!(site.world.metric("server", "inbound_http_authz_deny_total", &denied).await >= 4.0);
    assert!(site.world.log("server").contains("read_as=\"/admin\""), "{}", site.world.log("server"));

    site.world.manifest("everywhere", &authorize("everywhere", "kind: Namespace, name: shop", ""));
    site.world
        .eventually("the namespace's policy lets everybody in", async || {
            site.get(&site.stranger, 8081, "/").await == OK && site.get(&site.stranger, 8080, "/admin").await == OK
        })
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn audit_mode_allows_counts_and_says_whom_it_would_have_refused() {
    let on_h1 = authorize("friends", "group: policy.linkerd.io, kind: Server, name: h1", ARE_FRIENDS);
    let rest = [FRIENDS, &on_h1, &server("opaque", "opaque", "opaque", "audit")].concat();
    let policy = [server("h1", "h1", "HTTP/1", "audit"), rest.clone()].concat();
    let Some(site) = Site::new("audit", &policy).await else { return };
    let _app = apps::http(&site.server, 8081, "server");
    let _tcp = apps::tcp_echo(&site.server, 9000);
    for who in [&site.friend, &site.foe, &site.stranger] {
        assert_eq!(site.get(who, 8081, "/").await, OK, "{}", who.name);
        assert_eq!(apps::send_bytes(who, site.server.addr(9000), b"\0x").await, b"\0x", "{}", who.name);
    }
    let count = async |family, authz| site.world.metric("server", family, &[authz]).await;
    assert_eq!(count("inbound_http_authz_allow_total", "authz_name=\"audit\"").await, 2.0);
    assert_eq!(count("inbound_http_authz_allow_total", "authz_name=\"friends\"").await, 1.0);
    assert_eq!(count("inbound_tcp_authz_allow_total", "authz_name=\"audit\"").await, 3.0);
    assert_eq!(count("inbound_http_authz_deny_total", "").await, 0.0);
    let log = site.world.log("server");
    assert!(log.contains("allowed by audit mode; would have been denied: authorizationpolicy.friends: "), "{log}");

    site.world.manifest("policy", &[server("h1", "h1", "HTTP/1", "deny"), rest].concat());
    site.world
        .eventually("without audit mode they are refused", async || site.get(&site.foe, 8081, "/").await == FORBIDDEN)
        .await;
    assert_eq!(site.get(&site.friend, 8081, "/").await, OK);
}

#[tokio::test(flavor = "multi_thread")]
async fn rate_limits_in_total_by_identity_and_by_override() {
    let limit = |name: &str, spec: &str| {
        format!(
            "apiVersion: policy.linkerd.io/v1alpha1\nkind: HTTPLocalRateLimitPolicy\nmetadata: {{name: {name}, namespace: shop}}\nspec: {{targetRef: {{group: policy.linkerd.io, kind: Server, name: {name}}}, {spec}}}\n---\n"
        )
    };
    let policy = [
        server("h1", "h1", "HTTP/1", "all-unauthenticated"),
        server("detect", "detect", "unknown", "all-unauthenticated"),
        limit("h1", "total: {requestsPerSecond: 3}"),
        limit(
            "detect",
            "total: {requestsPerSecond: 100}, identity: {requestsPerSecond: 2}, overrides: [{requestsPerSecond: 5, clientRefs: [{kind: ServiceAccount, name: friend}]}]",
        ),
    ];
    let Some(site) = Site::new("rate-limits", &policy.concat()).await else { return };
    let _apps = [8080, 8081].map(|port| apps::http(&site.server, port, "server"));
    // Statuses of a burst on one connection: it is over well within the time in which the bucket refills.
    let burst = async |who: &Pod, port| {
        let started = Instant::now();
        let mut send = apps::http1(who, site.server.addr(port)).await;
        let (mut passed, mut limited) = (0, 0);
        for _ in 0..12 {
            let req = http::Request::get("/").header("host", "web.shop").body(http_body_util::Full::default()).unwrap();
            send.ready().await.expect("a limit leaves the connection open");
            let answer = apps::read(send.send_request(req).await.unwrap()).await.unwrap();
            match answer.status {
                OK => passed += 1,
                TOO_MANY => {
                    limited += 1;
                    assert_eq!(answer.headers["retry-after"], "1");
                }
                other => panic!("{other}"),
            }
        }
        (passed, limited, started.elapsed().as_secs_f64())
    };
    for (who, port, per_second) in
        [(&site.stranger, 8081, 3.0), (&site.friend, 8080, 5.0), (&site.foe, 8080, 2.0), (&site.stranger, 8080, 2.0)]
    {
        let (passed, limited, seconds) = burst(who, port).await;
        let most = per_second + (seconds * per_second).ceil();
        assert!(f64::from(passed) >= per_second && f64::from(passed) <= most, "{}: {passed} in {seconds} s", who.name);
        assert!(limited > 0, "{}", who.name);
    }
    // Overrides count as identities.
    for scope in ["total", "identity"] {
        let label = format!("ratelimit_scope=\"{scope}\"");
        assert!(site.world.metric("server", "inbound_http_local_ratelimit_total", &[&label]).await >= 1.0, "{scope}");
    }
    let mut codes = Vec::new();
    for _ in 0..6 {
        codes.push(apps::grpc(&site.foe, site.server.addr(8080), "/a.B/C").await);
    }
    assert!(codes.contains(&(OK, "8".to_string())), "{codes:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn routes_on_servers_change_headers_redirect_and_match_calls() {
    let policy = [
        server("detect", "detect", "unknown", "all-unauthenticated"),
        server("grpc", "grpc", "gRPC", "all-unauthenticated"),
        r#"
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: web, namespace: shop}
spec:
  parentRefs: [{group: policy.linkerd.io, kind: Server, name: detect}]
  rules:
  - matches: [{path: {type: Exact, value: /exact}}]
    filters: [{type: RequestHeaderModifier, requestHeaderModifier: {set: [{name: x-test, value: exact}]}}]
  - matches: [{path: {value: /exact}, headers: [{name: x-extra, value: "1"}]}]
    filters: [{type: RequestHeaderModifier, requestHeaderModifier: {set: [{name: x-test, value: prefix}]}}]
  - matches: [{path: {value: /headers}}]
    filters:
    - type: RequestHeaderModifier
      requestHeaderModifier: {add: [{name: x-test, value: added}], remove: [x-gone]}
    - type: ResponseHeaderModifier
      responseHeaderModifier: {set: [{name: x-version, value: "none"}], add: [{name: x-more, value: "1"}]}
  - matches: [{path: {value: /moved}, method: GET}]
    filters: [{type: RequestRedirect, requestRedirect: {hostname: new.example, port: 80, statusCode: 301, path: {type: ReplacePrefixMatch, replacePrefixMatch: /here}}}]
---
apiVersion: gateway.networking.k8s.io/v1
kind: GRPCRoute
metadata: {name: calls, namespace: shop}
spec:
  parentRefs: [{group: policy.linkerd.io, kind: Server, name: grpc}]
  rules:
  - matches: [{method: {service: pkg.Svc, method: Do}}]
    filters: [{type: RequestHeaderModifier, requestHeaderModifier: {set: [{name: x-test, value: by-route}]}}]
---
"#
        .to_string(),
    ];
    let Some(site) = Site::new("inbound-routes", &policy.concat()).await else { return };
    let _apps = [8080, 8083].map(|port| apps::http(&site.server, port, "server"));
    let addr = site.server.addr(8080);
    for who in [&site.friend, &site.stranger] {
        // The Gateway API prefers the exact path, whatever the headers.
        let answer = apps::get(who, addr, "/exact", &[("x-extra", "1")]).await.unwrap();
        assert_eq!(answer.headers["x-seen-test"], "exact");
        let answer = apps::get(who, addr, "/exact/x", &[("x-extra", "1")]).await.unwrap();
        assert_eq!(answer.headers["x-seen-test"], "prefix");
        assert_eq!(site.get(who, 8080, "/exact/x").await, NOT_FOUND);
        let answer = apps::get(who, addr, "/headers", &[]).await.unwrap();
        assert_eq!(
            (&answer.headers["x-seen-test"], &answer.headers["x-version"], &answer.headers["x-more"]),
            (&"added".parse().unwrap(), &"none".parse().unwrap(), &"1".parse().unwrap())
        );
        let answer = apps::get(who, addr, "/moved/a?b=c", &[]).await.unwrap();
        assert_eq!(answer.status, StatusCode::MOVED_PERMANENTLY);
        assert_eq!(answer.headers["location"], "http://new.example/here/a?b=c");
        assert_eq!(site.get(who, 8080, "/elsewhere").await, NOT_FOUND);
        assert_eq!(apps::grpc(who, site.server.addr(8083), "/pkg.Svc/Do").await, (OK, "0".into()));
        for path in ["/pkg.Svc/Undo", "/pkg.Other/Do"] {
            assert_eq!(apps::grpc(who, site.server.addr(8083), path).await, (OK, "5".into()), "{path}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_changed_policy_is_felt_by_open_connections() {
    let deny = |who: &str| {
        [
            server("h1", "h1", "HTTP/1", "deny"),
            server("opaque", "opaque", "opaque", "deny"),
            FRIENDS.replace("friend.shop", &format!("{who}.shop")),
            authorize("everywhere", "kind: Namespace, name: shop", ARE_FRIENDS),
        ]
        .concat()
    };
    let open = deny("*").replace("'*", "*").replace("[*.shop", "['*.shop").replace("local]", "local']");
    let Some(site) = Site::new("change", &open).await else { return };
    let _app = apps::http(&site.server, 8081, "server");
    let _tcp = apps::tcp_echo(&site.server, 9000);
    let open = async |who: &Pod| {
        let mut tcp = who.connect(site.server.addr(9000)).await.unwrap();
        tcp.write_all(b"\0one").await.unwrap();
        apps::expect_text(&mut tcp, "\0one").await;
        (tcp, apps::http1(who, site.server.addr(8081)).await)
    };
    let (mut friend_tcp, mut friend_http) = open(&site.friend).await;
    let (mut foe_tcp, mut foe_http) = open(&site.foe).await;
    let get = async |send: &mut hyper::client::conn::http1::SendRequest<http_body_util::Full<bytes::Bytes>>| {
        let req = http::Request::get("/").header("host", "web.shop").body(http_body_util::Full::default()).unwrap();
        send.ready().await.expect("the connection stays open");
        apps::read(send.send_request(req).await.unwrap()).await.unwrap().status
    };
    assert_eq!((get(&mut friend_http).await, get(&mut foe_http).await), (OK, OK));
    let tunnel = async |who: &Pod| {
        let mut send = apps::http1(who, site.server.addr(8081)).await;
        let req = http::Request::get("/chat").header("host", "web.shop").header("connection", "upgrade");
        let req = req.header("upgrade", "websocket").body(http_body_util::Full::default()).unwrap();
        let rsp = send.send_request(req).await.unwrap();
        assert_eq!(rsp.status(), StatusCode::SWITCHING_PROTOCOLS);
        let mut io = hyper_util::rt::TokioIo::new(hyper::upgrade::on(rsp).await.unwrap());
        io.write_all(b"one").await.unwrap();
        apps::expect_text(&mut io, "one").await;
        io
    };
    let (mut friend_tunnel, mut foe_tunnel) = (tunnel(&site.friend).await, tunnel(&site.foe).await);

    site.world.manifest("policy", &deny("friend"));
    let mut rest = Vec::new();
    let ended = tokio::time::timeout(Duration::from_secs(20), foe_tcp.read_to_end(&mut rest)).await;
    assert!(ended.is_ok() && rest.is_empty(), "the connection must end: {rest:?}\n{}", site.world.logs());
    let ended = tokio::time::timeout(Duration::from_secs(20), foe_tunnel.read_to_end(&mut rest)).await;
    assert!(ended.is_ok() && rest.is_empty(), "the tunnel must end: {rest:?}\n{}", site.world.logs());
    assert_eq!((get(&mut friend_http).await, get(&mut foe_http).await), (OK, FORBIDDEN));
    friend_tcp.write_all(b"\0two").await.unwrap();
    apps::expect_text(&mut friend_tcp, "\0two").await;
    friend_tunnel.write_all(b"two").await.unwrap();
    apps::expect_text(&mut friend_tunnel, "two").await;
    for server in ["srv_name=\"opaque\"", "srv_name=\"h1\""] {
        assert_eq!(site.world.metric("server", "inbound_tcp_authz_terminate_total", &[server]).await, 1.0, "{server}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn silence_and_servers_that_speak_first() {
    let policy = [
        server("detect", "detect", "unknown", "all-unauthenticated"),
        server("h1", "h1", "HTTP/1", "all-unauthenticated"),
        server("h2", "h2", "unknown", "all-authenticated"),
        "apiVersion: policy.linkerd.io/v1alpha1\nkind: HTTPLocalRateLimitPolicy\nmetadata: {name: l, namespace: shop}\nspec: {targetRef: {group: policy.linkerd.io, kind: Server, name: detect}, total: {requestsPerSecond: 100}}\n".into(),
    ];
    let env = [("LINKERD2_PROXY_INBOUND_DETECT_TIMEOUT", "3s")];
    let Some(site) = Site::with_env("silence", &policy.concat(), &env).await else { return };
    let _apps = [apps::server_first(&site.server, 8080, "220 hello\r\n"), apps::http(&site.server, 8081, "server")];
    let _refused = apps::server_first(&site.server, 8082, "220 hello\r\n");
    let started = Instant::now();
    for who in [&site.stranger, &site.friend] {
        let mut io = who.connect(site.server.addr(8080)).await.unwrap();
        apps::expect_text(&mut io, "220 hello\r\n").await;
        io.write_all(b"EHLO x\r\n").await.unwrap();
        apps::expect_text(&mut io, "EHLO x\r\n").await;
    }
    assert!(started.elapsed() < Duration::from_secs(3), "nobody waits for the timeout: {:?}", started.elapsed());

    // Who may not connect hears nothing, and who is silent on a port for HTTP is closed.
    for (port, why) in [(8082, "a stranger"), (8081, "HTTP/1")] {
        let mut io = site.stranger.connect(site.server.addr(port)).await.unwrap();
        let mut rest = Vec::new();
        let ended = tokio::time::timeout(Duration::from_secs(15), io.read_to_end(&mut rest)).await;
        assert!(ended.is_ok() && rest.is_empty(), "{why}: {rest:?}");
    }
    assert!(started.elapsed() >= Duration::from_secs(3));
    let errors = site.world.metric("server", "inbound_tcp_errors_total", &["tls detection timeout"]).await;
    assert_eq!(errors, 2.0);
    let log = site.world.log("server");
    assert!(log.contains("declare the port opaque"), "the remedy is named:\n{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_proxys_own_port_is_for_other_proxies() {
    let policy = server("opaque", "opaque", "opaque", "all-authenticated");
    let Some(site) = Site::new("direct", &policy).await else { return };
    let _tcp = apps::tcp_echo(&site.server, 9000);
    // Opaque ports are reached through it, with a transport header.
    assert_eq!(apps::send_bytes(&site.friend, site.server.addr(9000), b"\0x").await, b"\0x");
    let header = ["session_protocol=\"\"", "target_port=\"9000\"", "friend.shop"];
    assert_eq!(site.world.metric("server", "inbound_tcp_transport_header_connections_total", &header).await, 1.0);
    let hello = apps::client_hello("app.example");
    let forged = b"transport.l5d.io/v1\r\n\r\n\0\0\0\x03\x08\xa8\x46";
    for bytes in [&b"GET / HTTP/1.1\r\nhost: a\r\n\r\n"[..], &hello, forged] {
        assert_eq!(apps::send_bytes(&site.stranger, site.server.addr(4143), bytes).await, b"");
    }
    assert!(site.world.log("server").contains("must come from another meshed proxy"));
}

#[tokio::test(flavor = "multi_thread")]
async fn default_policies_of_ports_without_a_server() {
    let Some(mut world) = World::new("defaults") else { return };
    let friend = world.meshed("friend", &[], &[]);
    let stranger = world.plain("stranger", &[]);
    world.start(&["friend"]).await;
    // Who is let in: meshed, not meshed.
    let policies = [
        ("deny", FORBIDDEN, FORBIDDEN),
        ("all-authenticated", OK, FORBIDDEN),
        ("all-unauthenticated", OK, OK),
        ("cluster-authenticated", OK, FORBIDDEN),
        ("cluster-unauthenticated", OK, OK),
        ("audit", OK, OK),
    ];
    for (policy, meshed, plain) in policies {
        let annotation = [("config.linkerd.io/default-inbound-policy", policy)];
        let server = world.meshed(policy, &[("http", 8080), ("tcp", 9000)], &annotation);
        world.start(&[policy]).await;
        let _apps = [apps::http(&server, 8080, "server")];
        let _tcp = apps::tcp_echo(&server, 9000);
        for (who, expected) in [(&friend, meshed), (&stranger, plain)] {
            let answer = apps::get(who, server.addr(8080), "/", &[]).await;
            assert_eq!(answer.expect("an answer").status, expected, "{policy}: {}", who.name);
            let back = apps::send_bytes(who, server.addr(9000), b"\0x").await;
            assert_eq!(back == b"\0x", expected == OK, "{policy}: {}", who.name);
        }
        assert_eq!(world.log(policy).contains("allowed by audit mode"), policy == "audit", "{policy}");
        world.terminate(policy);
        world.exit_code(policy).await;
    }
}
