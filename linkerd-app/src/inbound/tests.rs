//! The whole of inbound behind accept: real sockets, a scripted source of policies, real handshakes, and applications
//! that say what they saw.

use super::{policy::tests::*, *};
use crate::{
    gateway,
    policy::{
        Authorization, ServerPolicy, Target,
        authz::{ClientTls, NoTls},
        client::{Backoff, Profile, ProfileRoute, RequestCondition, ResponseCondition},
        endpoint::Http2Params,
        route::{Filter, HeaderModifier, HttpFailure, HttpMatch, PathMatch, Ratio, Redirect, RouteMatch},
        server::{Protocol, RateLimit, Route, Rule},
    },
    transport::{TransportHeader, header::Session},
};
use ::http::{Request, Response, StatusCode, Version};
use futures_util::future::BoxFuture;
use http_body_util::BodyExt;
use hyper_util::rt::{TokioExecutor, TokioIo};
use linkerd_stack::{
    BoxService, BoxedIo, Io,
    drain::Signal,
    http::{Body, Reset, ServerConfig},
};
use linkerd_tls::{TrustAnchors, ca, identity};
use std::{collections::BTreeSet, sync::OnceLock, time::Duration};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
    time::{Instant, timeout},
};

/// The port of the proxy itself.
const OWN_PORT: u16 = 4143;

/// Most bytes that an idle connection's task may hold: what a stage needs lies in a box of its own and is gone with it.
const TASK: usize = 1536;

#[test]
fn a_connection_has_no_memory_for_stages_that_are_over() {
    fn size<'a, F>(_: impl FnOnce(&'a Arc<Inbound>, Conn, TcpStream, drain::Watch) -> F) -> usize {
        size_of::<F>()
    }
    let size = size(Inbound::serve_connection);
    assert!(size <= TASK, "{size} bytes");
}

const SERVER: &str = "web.ns.serviceaccount.identity.linkerd.cluster.local";
const PEER: &str = "peer.ns.serviceaccount.identity.linkerd.cluster.local";

fn config() -> config::Inbound {
    let listen = config::Listen {
        addr: ([0, 0, 0, 0], OWN_PORT).into(),
        setting: "LINKERD2_PROXY_INBOUND_LISTEN_ADDR",
        keepalive: None,
        user_timeout: None,
        backlog: 128,
    };
    let backoff = Backoff { min: Duration::from_millis(10), max: Duration::from_millis(50), jitter: 0.1 };
    config::Inbound {
        listen,
        ips: Arc::default(),
        ports: BTreeSet::new(),
        default_policy: config::DefaultPolicy::Deny,
        cluster_networks: vec![],
        opaque_ports: BTreeSet::new(),
        detect_timeout: DETECT,
        queue: config::Queue { capacity: 10, failfast_timeout: Duration::from_millis(100) },
        max_in_flight: 100,
        discovery_idle_timeout: Duration::from_secs(90),
        profile_timeout: Duration::from_millis(500),
        connect: config::Connect { timeout: Duration::from_millis(300), keepalive: None, user_timeout: None, backoff },
        http1: config::Http1Client { max_idle: 10, idle_timeout: Duration::from_secs(3) },
        http2_client: Http2Params::default(),
        http_server: config::HttpServer {
            stream_window: 65_535,
            connection_window: 1_048_576,
            adaptive_window: false,
            keep_alive: None,
            max_concurrent_streams: None,
            max_frame_size: None,
            max_header_size: 65_536,
            max_header_setting: "LINKERD2_PROXY_OUTBOUND_SERVER_HTTP2_MAX_HEADER_LIST_SIZE",
            max_pending_accept_reset_streams: None,
            max_send_buf_size: None,
        },
        authority_labels: false,
        profile_suffixes: config::Suffixes::default(),
    }
}

/// The certificates of all tests: made once, since keys are dear.
fn readers() -> &'static (Reader, Reader) {
    static READERS: OnceLock<(Reader, Reader)> = OnceLock::new();
    READERS.get_or_init(|| {
        let dir = std::env::temp_dir().join(format!("inbound-tests-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&dir);
        ca::init(&dir, &ca::Init::default()).unwrap();
        let issuer = ca::Issuer::load(&dir).unwrap();
        std::fs::remove_dir_all(&dir).unwrap();
        let reader = |name: &str| {
            let id: linkerd_tls::Id = name.parse().unwrap();
            let roots: TrustAnchors = issuer.trust_anchors().clone();
            let (mut writer, reader) = identity::channel(id.clone(), id.to_server_name().unwrap(), roots);
            writer.set_certificate(issuer.issue(&id).unwrap()).unwrap();
            // The writer only renews.
            std::mem::forget(writer);
            reader
        };
        (reader(SERVER), reader(PEER))
    })
}

struct Proxy {
    inbound: Arc<Inbound>,
    source: Arc<Fixed>,
    telemetry: Telemetry,
    drain: (Signal, drain::Watch),
}

impl Proxy {
    /// A proxy whose port `port` has this policy.
    fn new(port: u16, policy: ServerPolicy) -> Self {
        Self::with(port, policy, config(), config::Gateway::default())
    }

    fn with(port: u16, policy: ServerPolicy, cfg: config::Inbound, gateway: config::Gateway) -> Self {
        let gateway = Gateway::new(&gateway, SERVER.parse().unwrap(), Arc::new(Elsewhere));
        let source = Arc::new(Fixed::default());
        for other in [OWN_PORT, 4191] {
            source.set(other, detect(vec![anybody()]));
        }
        source.set(port, policy);
        let telemetry = Telemetry::new(config::Metrics::default());
        let identity = Some(readers().0.clone());
        let inbound = Inbound::new(&cfg, gateway, identity, source.clone(), telemetry.clone(), AccessLog::off(), 4191);
        Self { inbound, source, telemetry, drain: drain::channel() }
    }

    /// A connection to `target` through the proxy.
    async fn connect(&self, target: SocketAddr) -> TcpStream {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (client, accepted) = tokio::join!(TcpStream::connect(listener.local_addr().unwrap()), listener.accept());
        let (io, addr) = accepted.unwrap();
        let conn = accept::conn(&self.inbound, addr, target).unwrap();
        let (inbound, drain) = (self.inbound.clone(), self.drain.1.clone());
        tokio::spawn(async move { inbound.serve_connection(conn, io, drain).await });
        client.unwrap()
    }

    /// The same, with mesh TLS by the peer.
    async fn mesh(&self, target: SocketAddr, transport_header: bool) -> BoxedIo {
        let io = self.connect(target).await;
        let (server, peer) = readers();
        let to = linkerd_tls::ClientTls {
            server_id: server.id().clone(),
            server_name: server.server_name().clone(),
            transport_header,
        };
        let (connected, io) = peer.client(to).connect(io).await.unwrap();
        assert_eq!(connected.transport_header, transport_header);
        Box::new(io)
    }

    /// A connection of a peer to the proxy's own port, its header sent.
    async fn direct(&self, ip: std::net::IpAddr, header: TransportHeader) -> BoxedIo {
        let mut io = self.mesh((ip, OWN_PORT).into(), true).await;
        io.write_all(&header.encode()).await.unwrap();
        io.flush().await.unwrap();
        io
    }

    #[track_caller]
    fn metric(&self, line: &str) {
        let text = self.telemetry.render();
        assert!(text.lines().any(|l| l.starts_with(line)), "{line} is missing in\n{text}");
    }

    #[track_caller]
    fn has(&self, name: &str, labels: &[&str], value: u64) {
        let text = self.telemetry.render();
        let found = text.lines().any(|line| {
            line.starts_with(&format!("{name}{{"))
                && labels.iter().all(|label| line.contains(label))
                && line.ends_with(&format!(" {value}"))
        });
        assert!(found, "{name} {labels:?} {value} is missing in\n{text}");
    }
}

/// An application that answers every request with what it saw: version, method, target, and the headers that matter.
async fn echo() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    tokio::spawn(async move {
        loop {
            let (mut io, _) = listener.accept().await.unwrap();
            tokio::spawn(async move {
                let mut first = bytes::BytesMut::with_capacity(64);
                let version = match linkerd_stack::detect::http(&mut io, DETECT, &mut first).await {
                    Ok(linkerd_stack::detect::Detected::H2) => linkerd_stack::http::Version::H2,
                    _ => linkerd_stack::http::Version::H1,
                };
                let io = linkerd_stack::PrefixedIo::new(first.freeze(), io);
                let svc = tower::service_fn(|req: Request<Body>| async move {
                    let header = |name: &str| req.headers().get(name).map_or("-", |v| v.to_str().unwrap()).to_string();
                    let seen = format!(
                        "{:?} {} {} host={} id={} x={}",
                        req.version(),
                        req.method(),
                        req.uri().path(),
                        header("host"),
                        header("l5d-client-id"),
                        header("x-test"),
                    );
                    Ok::<_, Reset>(Response::new(Body::full(seen)))
                });
                let (_signal, watch) = drain::channel();
                let _ = linkerd_stack::http::serve(&ServerConfig::default(), version, io, svc, watch).await;
            });
        }
    });
    addr
}

/// An application that says `greeting` and echoes bytes after it.
async fn parrot(greeting: &'static [u8]) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    tokio::spawn(async move {
        loop {
            let (mut io, _) = listener.accept().await.unwrap();
            tokio::spawn(async move {
                io.write_all(greeting).await.unwrap();
                let (mut r, mut w) = io.split();
                let _ = tokio::io::copy(&mut r, &mut w).await;
            });
        }
    });
    addr
}

/// An address where nobody listens.
async fn nobody() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap()
}

/// A client's end of an HTTP/1 connection.
struct H1(hyper::client::conn::http1::SendRequest<Body>);

impl H1 {
    async fn new(io: impl Io) -> Self {
        let (tx, conn) = hyper::client::conn::http1::handshake(TokioIo::new(io)).await.unwrap();
        tokio::spawn(conn.with_upgrades());
        Self(tx)
    }

    async fn get(&mut self, path: &str, headers: &[(&'static str, &str)]) -> Seen {
        let mut req = Request::get(path).header("host", "web.test");
        for (name, value) in headers {
            req = req.header(*name, *value);
        }
        self.0.ready().await.unwrap();
        seen(self.0.send_request(req.body(Body::empty()).unwrap()).await.unwrap()).await
    }
}

/// A response, read.
#[derive(Debug)]
struct Seen {
    status: StatusCode,
    headers: ::http::HeaderMap,
    body: String,
}

async fn seen(rsp: Response<hyper::body::Incoming>) -> Seen {
    let (parts, body) = rsp.into_parts();
    let body = body.collect().await.unwrap().to_bytes();
    Seen { status: parts.status, headers: parts.headers, body: String::from_utf8(body.to_vec()).unwrap() }
}

async fn h2(io: impl Io) -> hyper::client::conn::http2::SendRequest<Body> {
    let (tx, conn) = hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(io)).await.unwrap();
    tokio::spawn(conn);
    tx
}

fn h2_get(path: &str) -> ::http::request::Builder {
    Request::get(format!("http://web.test{path}")).version(Version::HTTP_2)
}

/// Reads until the connection ends, reset or not.
async fn closed(io: &mut (impl tokio::io::AsyncRead + Unpin)) -> Vec<u8> {
    let mut all = Vec::new();
    let _ = timeout(Duration::from_secs(5), io.read_to_end(&mut all)).await.expect("the connection stays open");
    all
}

async fn expect(io: &mut (impl tokio::io::AsyncRead + Unpin), bytes: &[u8]) {
    let mut read = vec![0; bytes.len()];
    timeout(Duration::from_secs(5), io.read_exact(&mut read)).await.expect("nothing comes").unwrap();
    assert_eq!(read, bytes);
}

fn routed(routes: Vec<Route>) -> ServerPolicy {
    server(Protocol::Detect { timeout: DETECT, http: routes.into(), tcp: Arc::new([]) })
}

fn rule(path: &str, filters: Vec<Filter>) -> Rule {
    let path = Some(PathMatch::Prefix(path.trim_end_matches('/').into()));
    Rule { matches: vec![RouteMatch::Http(HttpMatch { path, ..HttpMatch::default() })], filters }
}

fn limited(authz: Vec<Authorization>, total: u32) -> ServerPolicy {
    let limit = RateLimit { meta: None, total: Some(total), identity: None, overrides: vec![] };
    ServerPolicy { rate_limit: Some(Arc::new(limit)), ..detect(authz) }
}

#[tokio::test]
async fn the_client_id_is_set_for_the_mesh_and_taken_from_everybody_else() {
    let app = echo().await;
    let proxy = Proxy::new(app.port(), detect(vec![anybody()]));
    let forged = [("l5d-client-id", "admin.ns"), ("x-test", "1")];
    let plain = H1::new(proxy.connect(app).await).await.get("/a", &forged).await;
    assert_eq!(plain.body, "HTTP/1.1 GET /a host=web.test id=- x=1");
    let mesh = H1::new(proxy.mesh(app, false).await).await.get("/a", &forged).await;
    assert_eq!(mesh.body, format!("HTTP/1.1 GET /a host=web.test id={PEER} x=1"));

    let target = format!("target_addr=\"{app}\"");
    let authz = ["route_name=\"default\"", "authz_name=\"all-unauthenticated\"", "srv_name=\"srv\""];
    proxy.has("request_total", &[&target, "tls=\"no_identity\"", authz[0], authz[1]], 1);
    proxy.has("response_total", &[&target, &format!("client_id=\"{PEER}\""), "status_code=\"200\""], 1);
    proxy.has("inbound_http_authz_allow_total", &[&target, "tls=\"true\"", authz[0], authz[1], authz[2]], 1);
    proxy.has("tcp_open_total", &["peer=\"src\"", &target, "tls=\"true\""], 1);
    proxy.has("tcp_open_total", &["peer=\"dst\"", "no_tls_reason=\"loopback\""], 1);
    proxy.metric("inbound_http_requests_total{parent_group=\"policy.linkerd.io\"");
}

#[tokio::test]
async fn refusals_explain_themselves_to_the_mesh_alone() {
    let app = echo().await;
    let nobody = Authorization { networks: vec![], ..anybody() };
    let proxy = Proxy::new(app.port(), detect(vec![nobody]));
    let plain = H1::new(proxy.connect(app).await).await.get("/", &[]).await;
    assert_eq!((plain.status, plain.body.as_str()), (StatusCode::FORBIDDEN, ""));
    assert!(!plain.headers.contains_key("l5d-proxy-error"));
    let mesh = H1::new(proxy.mesh(app, false).await).await.get("/", &[]).await;
    assert_eq!(mesh.status, StatusCode::FORBIDDEN);
    let why = mesh.headers["l5d-proxy-error"].to_str().unwrap();
    assert!(why.starts_with("client 127.0.0.1:"), "{why}");
    assert!(why.ends_with(&format!(": server: {app}: unauthorized request on route")), "{why}");
    proxy.has("inbound_http_authz_deny_total", &["tls=\"true\"", "route_name=\"default\""], 1);
    proxy.has("terminations_total", &["policy-unauthorized"], 2);
    assert!(!proxy.telemetry.render().contains("inbound_http_errors_total{"));
}

#[tokio::test]
async fn open_connections_follow_the_policy_request_by_request() {
    let app = echo().await;
    let proxy = Proxy::new(app.port(), detect(vec![anybody()]));
    let mut client = H1::new(proxy.connect(app).await).await;
    assert_eq!(client.get("/", &[]).await.status, 200);
    for (policy, status) in [
        (detect(vec![meshed()]), 403),
        (routed(vec![Route { rules: vec![rule("/other", vec![])], ..Route::implicit(vec![anybody()]) }]), 404),
        (server(Protocol::Invalid("no timeout".into())), 403),
        (server(Protocol::Opaque(Arc::new([anybody()]))), 404),
        (detect(vec![anybody()]), 200),
    ] {
        proxy.source.set(app.port(), policy);
        tokio::task::yield_now().await;
        assert_eq!(client.get("/", &[]).await.status, status);
    }
    proxy.has("inbound_http_route_not_found_total", &["srv_name=\"srv\""], 2);
    proxy.has("inbound_http_authz_deny_total", &["route_kind=\"default\"", "route_name=\"invalid\""], 1);
}

#[tokio::test]
async fn routes_have_filters_of_their_own() {
    let app = echo().await;
    let set = |name: &'static str, value: &str| HeaderModifier {
        set: vec![(name.parse().unwrap(), value.parse().unwrap())],
        ..HeaderModifier::default()
    };
    let away =
        Redirect { scheme: None, host: Some("b.test".into()), port: None, path: None, status: StatusCode::FOUND };
    let rules = vec![
        rule("/", vec![Filter::RequestHeaders(set("x-test", "by-policy")), Filter::ResponseHeaders(set("x-out", "1"))]),
        rule("/away", vec![Filter::Redirect(away)]),
        rule("/odd", vec![Filter::Unknown { what: "field 9".into() }]),
    ];
    let proxy = Proxy::new(app.port(), routed(vec![Route { rules, ..Route::implicit(vec![anybody()]) }]));
    let mut client = H1::new(proxy.mesh(app, false).await).await;
    let rsp = client.get("/", &[("x-test", "mine")]).await;
    assert!(rsp.body.ends_with("x=by-policy"), "{}", rsp.body);
    assert_eq!(rsp.headers["x-out"], "1");
    let rsp = client.get("/away/x", &[]).await;
    assert_eq!((rsp.status.as_u16(), rsp.headers["location"].to_str().unwrap()), (302, "http://b.test/away/x"));
    let rsp = client.get("/odd", &[]).await;
    assert_eq!(rsp.status, 500);
    assert!(rsp.headers["l5d-proxy-error"].to_str().unwrap().contains("unknown filter"));
}

#[tokio::test]
async fn a_path_must_be_permitted_in_every_reading() {
    let app = echo().await;
    let guarded = |path: &str, authz| Route { rules: vec![rule(path, vec![])], ..Route::implicit(vec![authz]) };
    let routes = vec![guarded("/", anybody()), guarded("/admin", meshed())];
    let proxy = Proxy::new(app.port(), routed(routes));
    let mut plain = H1::new(proxy.connect(app).await).await;
    let mut mesh = H1::new(proxy.mesh(app, false).await).await;
    for path in
        ["/admin", "/%61dmin/x", "//admin", "/a/../admin", "/a/%2e%2E/admin", "/a%2F..%5cadmin", "/a/..;x/admin"]
    {
        assert_eq!(plain.get(path, &[]).await.status, 403, "{path}");
        let rsp = mesh.get(path, &[]).await;
        assert_eq!(rsp.status, 200, "{path}");
        assert!(rsp.body.contains(path), "the application gets what was sent: {}", rsp.body);
    }
    for path in ["/administrator", "/a%20b//c;d/./e", "/x/admin", "/%2561dmin"] {
        assert_eq!(plain.get(path, &[]).await.status, 200, "{path}");
    }

    proxy.source.set(app.port(), routed(vec![guarded("/public", anybody()), guarded("/%40me", anybody())]));
    tokio::task::yield_now().await;
    for (path, status) in
        [("/public/a%2fb", 200), ("/public/./a", 200), ("/%40me", 200), ("/public/../admin", 404), ("/admin", 404)]
    {
        assert_eq!(plain.get(path, &[]).await.status, status, "{path}");
    }
    proxy.has("inbound_http_route_not_found_total", &["srv_name=\"srv\""], 2);
}

#[tokio::test]
async fn failures_are_injected_in_their_ratio() {
    let app = echo().await;
    let fail = |numerator, denominator| {
        let ratio = Ratio::new(numerator, denominator).unwrap();
        vec![Filter::HttpFailure(HttpFailure { status: StatusCode::IM_A_TEAPOT, message: "on purpose".into(), ratio })]
    };
    let rules = vec![rule("/always", fail(1, 1)), rule("/never", fail(0, 5)), rule("/half", fail(1, 2))];
    let proxy = Proxy::new(app.port(), routed(vec![Route { rules, ..Route::implicit(vec![anybody()]) }]));
    let mut client = H1::new(proxy.mesh(app, false).await).await;
    let rsp = client.get("/always", &[]).await;
    assert_eq!(rsp.status, StatusCode::IM_A_TEAPOT);
    assert!(rsp.headers["l5d-proxy-error"].to_str().unwrap().ends_with(": on purpose"), "{:?}", rsp.headers);
    let mut failed = 0;
    for _ in 0..200 {
        assert_eq!(client.get("/never", &[]).await.status, 200);
        failed += u32::from(client.get("/half", &[]).await.status == StatusCode::IM_A_TEAPOT);
    }
    // 100 expected; six standard deviations (7.1 each) on both sides.
    assert!((57..=143).contains(&failed), "{failed} of 200");
}

#[tokio::test]
async fn too_many_requests_are_told_when_to_come_again() {
    let app = echo().await;
    let proxy = Proxy::new(app.port(), limited(vec![anybody()], 2));
    let mut client = H1::new(proxy.connect(app).await).await;
    let mut last = None;
    for _ in 0..4 {
        last = Some(client.get("/", &[]).await);
    }
    let last = last.unwrap();
    assert_eq!((last.status.as_u16(), &last.headers["retry-after"]), (429, &"1".parse().unwrap()));
    proxy.has("inbound_http_local_ratelimit_total", &["ratelimit_scope=\"total\""], 2);
}

#[tokio::test]
async fn http_1_inside_http_2_reaches_the_application_as_http_1() {
    let app = echo().await;
    let proxy = Proxy::new(app.port(), server(Protocol::Http1(Arc::new([Route::implicit(vec![anybody()])]))));
    let mut client = h2(proxy.mesh(app, false).await).await;
    let req = h2_get("/a").header("l5d-orig-proto", "HTTP/1.1").header("host", "web.test");
    let rsp = seen(client.send_request(req.body(Body::empty()).unwrap()).await.unwrap()).await;
    assert_eq!(rsp.body, format!("HTTP/1.1 GET /a host=web.test id={PEER} x=-"));
    assert_eq!(rsp.headers["l5d-orig-proto"], "HTTP/1.1");
    let rsp = seen(client.send_request(h2_get("/b").body(Body::empty()).unwrap()).await.unwrap()).await;
    assert_eq!(rsp.body, format!("HTTP/2.0 GET /b host=- id={PEER} x=-"));
    assert!(!rsp.headers.contains_key("l5d-orig-proto"));
}

#[tokio::test]
async fn a_dead_application_is_a_bad_gateway() {
    let app = nobody().await;
    let proxy = Proxy::new(app.port(), detect(vec![anybody()]));
    let rsp = H1::new(proxy.mesh(app, false).await).await.get("/", &[]).await;
    assert_eq!(rsp.status, 502);
    assert_eq!(rsp.headers["connection"], "close");
    let error = rsp.headers["l5d-proxy-error"].to_str().unwrap();
    assert!(error.starts_with("client 127.0.0.1:") && error.contains(&format!(": server: {app}: ")), "{error}");
    proxy.has("response_total", &["status_code=\"502\"", "classification=\"failure\""], 1);
    proxy.has("inbound_http_errors_total", &["error=\"i/o\""], 1);
}

#[tokio::test]
async fn http_2_to_a_dead_application_waits_then_fails_fast() {
    let app = nobody().await;
    let mut cfg = config();
    // Longer than the test: otherwise a slow machine sees the probe after it.
    (cfg.connect.backoff.min, cfg.connect.backoff.max) = (Duration::from_secs(60), Duration::from_secs(60));
    let proxy = Proxy::with(app.port(), detect(vec![anybody()]), cfg, config::Gateway::default());
    let get = async || {
        let mut client = h2(proxy.connect(app).await).await;
        client.send_request(h2_get("/").body(Body::empty()).unwrap()).await.unwrap().status()
    };
    let start = Instant::now();
    assert_eq!(get().await, 504);
    assert!(start.elapsed() >= config().queue.failfast_timeout);
    assert_eq!(get().await, 503);
    proxy.has("inbound_http_errors_total", &["error=\"failfast\""], 1);
    proxy.has("inbound_http_errors_total", &["error=\"loadshed\""], 1);
}

#[tokio::test]
async fn requests_that_wait_for_the_application_are_bounded() {
    let app = nobody().await;
    let proxy = Proxy::new(app.port(), detect(vec![anybody()]));
    let mut client = h2(proxy.connect(app).await).await;
    let sent: Vec<_> = (0..40).map(|_| client.send_request(h2_get("/").body(Body::empty()).unwrap())).collect();
    let mut statuses = [0; 2];
    for sent in sent {
        match sent.await.unwrap().status().as_u16() {
            504 => statuses[0] += 1,
            503 => statuses[1] += 1,
            other => panic!("{other}"),
        }
    }
    assert_eq!(statuses, [config().queue.capacity, 30], "{statuses:?}");
}

#[tokio::test]
async fn opaque_connections_end_when_their_authorization_does() {
    let app = parrot(b"").await;
    let open = server(Protocol::Opaque(Arc::new([anybody()])));
    let proxy = Proxy::new(app.port(), open.clone());
    let mut client = proxy.connect(app).await;
    client.write_all(b"ping").await.unwrap();
    expect(&mut client, b"ping").await;
    proxy.has("inbound_tcp_authz_allow_total", &["no_tls_reason=\"port_skipped\""], 1);
    proxy.has("tcp_write_bytes_total", &["peer=\"src\""], 4);
    // A change that still lets it in leaves it alone.
    proxy
        .source
        .set(app.port(), server(Protocol::Detect { timeout: DETECT, http: Arc::new([]), tcp: [anybody()].into() }));
    client.write_all(b"pong").await.unwrap();
    expect(&mut client, b"pong").await;
    proxy.source.set(app.port(), server(Protocol::Opaque(Arc::new([meshed()]))));
    assert!(closed(&mut client).await.is_empty());
    proxy.has("inbound_tcp_authz_terminate_total", &["srv_name=\"srv\""], 1);
    let mut refused = proxy.connect(app).await;
    assert!(closed(&mut refused).await.is_empty());
    proxy.has("inbound_tcp_authz_deny_total", &["srv_name=\"srv\""], 1);
}

#[tokio::test]
async fn bytes_that_are_not_http_are_opaque_inside_tls_too() {
    let app = parrot(b"").await;
    let proxy = Proxy::new(app.port(), detect(vec![meshed()]));
    let mut client = proxy.mesh(app, false).await;
    client.write_all(b"\x01\x02binary").await.unwrap();
    client.flush().await.unwrap();
    expect(&mut client, b"\x01\x02binary").await;
    proxy.has("inbound_tcp_detect_http_results_total", &["result=\"not_http\""], 1);
    // Without TLS it is refused.
    let mut plain = proxy.connect(app).await;
    plain.write_all(b"\x01\x02binary").await.unwrap();
    assert!(closed(&mut plain).await.is_empty());
}

#[tokio::test]
async fn an_application_that_speaks_first_is_heard_at_once() {
    let app = parrot(b"220 mail ESMTP\r\n").await;
    let proxy = Proxy::new(app.port(), detect(vec![anybody()]));
    for mesh in [false, true] {
        let start = Instant::now();
        let mut client: BoxedIo = match mesh {
            true => proxy.mesh(app, false).await,
            false => Box::new(proxy.connect(app).await),
        };
        expect(&mut client, b"220 mail ESMTP\r\n").await;
        assert!(start.elapsed() < DETECT, "it waited for the client");
        client.write_all(b"HELO x").await.unwrap();
        client.flush().await.unwrap();
        expect(&mut client, b"HELO x").await;
    }
}

#[tokio::test]
async fn silence_never_evades_a_policy_for_http() {
    let app = parrot(b"").await;
    // A route that only the mesh may use, on a port that anybody may connect to.
    let strict = server(Protocol::Detect {
        timeout: DETECT,
        http: Arc::new([Route::implicit(vec![meshed()])]),
        tcp: Arc::new([anybody()]),
    });
    let with_limit = limited(vec![anybody()], 1);
    for (policy, mesh) in [(strict, false), (with_limit, true), (detect(vec![anybody()]), false)] {
        let proxy = Proxy::new(app.port(), policy);
        let mut client: BoxedIo = match mesh {
            true => proxy.mesh(app, false).await,
            false => Box::new(proxy.connect(app).await),
        };
        assert!(closed(&mut client).await.is_empty());
        proxy.has("inbound_tcp_errors_total", &["error=\"tls detection timeout\""], 1);
        proxy.has("terminations_total", &["detect-timeout"], 1);
    }
    // Half a method is no more than silence.
    let proxy = Proxy::new(app.port(), limited(vec![anybody()], 1));
    let mut client = proxy.connect(app).await;
    client.write_all(b"GET ").await.unwrap();
    assert!(closed(&mut client).await.is_empty());
    // Where the policy is about connections alone, a meshed client may be silent.
    let proxy = Proxy::new(app.port(), detect(vec![meshed()]));
    let mut client = proxy.mesh(app, false).await;
    tokio::time::sleep(DETECT * 3 / 2).await;
    client.write_all(b"late").await.unwrap();
    client.flush().await.unwrap();
    expect(&mut client, b"late").await;
}

#[tokio::test]
async fn foreign_tls_is_passed_on_untouched() {
    let app = parrot(b"").await;
    let proxy = Proxy::new(app.port(), server(Protocol::Tls(Arc::new([anybody()]))));
    let io = proxy.connect(app).await;
    let (server, peer) = readers();
    let to = linkerd_tls::ClientTls {
        server_id: server.id().clone(),
        server_name: "app.example.com".parse().unwrap(),
        transport_header: false,
    };
    // The application echoes the ClientHello, which is no answer to one.
    assert!(peer.client(to).connect(io).await.is_err());
    proxy.has("inbound_tcp_authz_allow_total", &["tls=\"opaque\"", "sni=\"app.example.com\""], 1);
}

#[tokio::test]
async fn direct_connections_go_where_their_header_says() {
    let app = echo().await;
    let parrot = parrot(b"").await;
    let proxy = Proxy::new(app.port(), detect(vec![meshed()]));
    proxy.source.set(parrot.port(), server(Protocol::Opaque(Arc::new([meshed()]))));
    let header = |port, session| TransportHeader { port, name: None, session };

    let io = proxy.direct(app.ip(), header(app.port(), Some(Session::Http1))).await;
    let rsp = H1::new(io).await.get("/", &[]).await;
    assert_eq!(rsp.body, format!("HTTP/1.1 GET / host=web.test id={PEER} x=-"));

    let mut io = proxy.direct(parrot.ip(), header(parrot.port(), None)).await;
    io.write_all(b"bytes").await.unwrap();
    io.flush().await.unwrap();
    expect(&mut io, b"bytes").await;
    proxy.has("inbound_tcp_transport_header_connections_total", &["session_protocol=\"http/1\""], 1);

    // An opaque policy has no routes, and nothing leads back to the proxy.
    let mut client = h2(proxy.direct(parrot.ip(), header(parrot.port(), Some(Session::Http2))).await).await;
    assert_eq!(client.send_request(h2_get("/").body(Body::empty()).unwrap()).await.unwrap().status(), 404);
    let mut io = proxy.direct(app.ip(), header(OWN_PORT, None)).await;
    assert!(closed(&mut io).await.is_empty());
}

#[tokio::test]
async fn whoever_is_no_peer_cannot_use_the_own_port() {
    let app = echo().await;
    let proxy = Proxy::new(app.port(), detect(vec![anybody()]));
    let own = SocketAddr::new(app.ip(), OWN_PORT);
    let mut plain = proxy.connect(own).await;
    plain.write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
    assert!(closed(&mut plain).await.is_empty());
    // Mesh TLS without the agreement on a header.
    let mut mesh = proxy.mesh(own, false).await;
    let _ = mesh.write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n").await;
    assert!(closed(&mut mesh).await.is_empty());
    // No header in time, or another one.
    let mut io = proxy.mesh(own, true).await;
    io.write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
    io.flush().await.unwrap();
    assert!(closed(&mut io).await.is_empty());
}

struct Elsewhere;

impl gateway::Outbound for Elsewhere {
    fn http(&self, target: Target) -> BoxService<Request<Body>, Response<Body>, Error> {
        BoxService::from_fn(move |req: Request<Body>| {
            let forwarded = req.headers()["forwarded"].to_str().unwrap().to_string();
            std::future::ready(Ok(Response::new(Body::full(format!("{target} {forwarded}")))))
        })
    }

    fn opaque(&self, target: Target, mut io: BoxedIo) -> BoxFuture<'static, Result<(), Error>> {
        Box::pin(async move {
            io.write_all(target.to_string().as_bytes()).await.unwrap();
            io.shutdown().await.unwrap();
            Ok(())
        })
    }
}

#[tokio::test]
async fn the_gateway_passes_named_targets_on() {
    let cfg = config::Gateway { suffixes: config::Suffixes(vec!["svc.cluster.local.".into()]) };
    let proxy = Proxy::with(80, detect(vec![anybody()]), config(), cfg);
    proxy.source.set(OWN_PORT, detect(vec![meshed()]));
    let ip = [127, 0, 0, 1].into();
    let header = |name: &str, session| TransportHeader { port: 8080, name: Some(name.into()), session };
    let name = "web.ns.svc.cluster.local";

    let rsp = H1::new(proxy.direct(ip, header(name, Some(Session::Http1))).await).await.get("/", &[]).await;
    let way = format!("{name}:8080 by={SERVER};for={PEER};host={name}:8080;proto=https");
    assert_eq!(rsp.body, way);
    let mut io = proxy.direct(ip, header(name, None)).await;
    assert_eq!(closed(&mut io).await, format!("{name}:8080").as_bytes());

    let rsp = H1::new(proxy.direct(ip, header("a.example.com", Some(Session::Http1))).await).await.get("/", &[]).await;
    assert_eq!(rsp.status, 404);
    let mut io = proxy.direct(ip, header("a.example.com", None)).await;
    assert!(closed(&mut io).await.is_empty());

    // The policy of the own port comes first.
    proxy.source.set(OWN_PORT, detect(vec![]));
    tokio::task::yield_now().await;
    let rsp = H1::new(proxy.direct(ip, header(name, Some(Session::Http1))).await).await.get("/", &[]).await;
    assert_eq!(rsp.status, 403);
}

#[tokio::test]
async fn destinations_that_are_not_ours_are_refused() {
    let app = echo().await;
    let cfg = config::Inbound { ips: Arc::new([[10, 0, 0, 1].into()].into()), ..config() };
    let proxy = Proxy::with(app.port(), detect(vec![anybody()]), cfg, config::Gateway::default());
    let client = ([10, 0, 0, 9], 1234).into();
    let error = accept::conn(&proxy.inbound, client, app).err().unwrap();
    assert_eq!(*error.cause(), Cause::Loop(app));
    assert!(accept::conn(&proxy.inbound, client, ([10, 0, 0, 1], app.port()).into()).is_ok());
}

#[tokio::test]
async fn a_drain_ends_idle_connections_and_spares_busy_ones() {
    let app = parrot(b"").await;
    let http = echo().await;
    let proxy = Proxy::new(app.port(), server(Protocol::Opaque(Arc::new([anybody()]))));
    proxy.source.set(http.port(), detect(vec![anybody()]));
    let mut raw = proxy.connect(app).await;
    raw.write_all(b"x").await.unwrap();
    expect(&mut raw, b"x").await;
    let mut silent = proxy.connect(http).await;
    let mut idle = H1::new(proxy.connect(http).await).await;
    assert_eq!(idle.get("/", &[]).await.status, 200);

    let (signal, watch) = proxy.drain;
    drop(watch);
    let drained = tokio::spawn(signal.drain());
    assert!(closed(&mut silent).await.is_empty());
    raw.write_all(b"y").await.unwrap();
    expect(&mut raw, b"y").await;
    assert!(!drained.is_finished());
    drop(raw);
    timeout(Duration::from_secs(5), drained).await.expect("something still holds the drain").unwrap();
    assert!(idle.0.ready().await.is_err());
}

#[tokio::test]
async fn servers_of_the_proxy_itself_are_guarded_alike() {
    let proxy = Proxy::new(80, detect(vec![anybody()]));
    proxy.source.set(4191, detect(vec![meshed()]));
    tokio::task::yield_now().await;
    let guard = proxy.inbound.guard();
    let admin = |tls| {
        let conn = http::Connection {
            client: ([10, 1, 0, 7], 1).into(),
            tls,
            target: ([0, 0, 0, 0], 4191).into(),
            port: guard.port(4191),
            kind: http::Kind::Admin,
        };
        let inner = BoxService::from_fn(|_| std::future::ready(Ok(Response::new(Body::full("live\n")))));
        http::Server::new(http::PolicyService::new(guard.clone(), conn, inner), None, 100)
    };
    let get = async |tls| {
        let (client, server) = tokio::io::duplex(4096);
        let (_signal, watch) = drain::channel();
        let version = linkerd_stack::http::Version::H1;
        let svc = admin(tls);
        tokio::spawn(async move {
            let _ = linkerd_stack::http::serve(&ServerConfig::default(), version, server, svc, watch).await;
        });
        H1::new(client).await.get("/live", &[]).await.status
    };
    assert_eq!(get(ClientTls::None(NoTls::NoTlsFromRemote)).await, 403);
    assert_eq!(get(ClientTls::Terminated(Some(PEER.parse().unwrap()))).await, 200);
    proxy.has("request_total", &["target_addr=\"0.0.0.0:4191\"", "tls=\"true\""], 1);
    assert!(!proxy.telemetry.render().contains("parent_port=\"4191\""));
}

#[tokio::test]
async fn service_profiles_judge_and_label_but_never_route() {
    let app = echo().await;
    let cfg = config::Inbound { profile_suffixes: config::Suffixes(vec!["test.".into()]), ..config() };
    let proxy = Proxy::with(app.port(), detect(vec![anybody()]), cfg, config::Gateway::default());
    let route = |path: &str, name: &str, classes| ProfileRoute {
        condition: RequestCondition::Path(regex::Regex::new(&format!("^(?:{path})$")).unwrap()),
        classes,
        labels: [("route".into(), name.into())].into(),
        retryable: false,
        timeout: None,
    };
    let teapots_fail = vec![(ResponseCondition::Status(200..=200), true)];
    let profile = Profile {
        addr: "web.test:80".into(),
        routes: vec![route("/odd", "odd", teapots_fail), route("/even.*", "even", vec![])],
        budget: None,
        targets: Arc::new([]),
    };
    let sender = tokio::sync::watch::Sender::new(Some(Arc::new(profile)));
    proxy.source.profiles.lock().insert("web.test:80".into(), sender);
    let mut client = H1::new(proxy.connect(app).await).await;
    for path in ["/odd", "/even/x", "/other"] {
        assert_eq!(client.get(path, &[]).await.status, 200);
    }
    let labels =
        |route| ["direction=\"inbound\"".to_string(), "dst=\"web.test:80\"".into(), format!("rt_route=\"{route}\"")];
    let has = |name, route, more: &[&str]| {
        let labels = labels(route);
        let labels: Vec<&str> = labels.iter().map(String::as_str).chain(more.iter().copied()).collect();
        proxy.has(name, &labels, 1);
    };
    has("route_request_total", "odd", &[]);
    has("route_response_total", "odd", &["classification=\"failure\""]);
    has("route_response_total", "even", &["classification=\"success\""]);
    has("route_response_latency_ms_count", "even", &[]);
}

#[tokio::test]
async fn the_operator_sees_the_ports_in_use() {
    let app = echo().await;
    let proxy = Proxy::new(app.port(), limited(vec![anybody()], 5));
    let _client = proxy.connect(app).await;
    let status = proxy.inbound.status();
    let port = status.as_array().unwrap().iter().find(|port| port["port"] == app.port()).unwrap();
    assert_eq!((&port["protocol"], &port["rate_limit"]["total"]), (&"detect".into(), &5.into()));
    assert_eq!(port["policy"]["routes"][0]["authorizations"][0], "default.all-unauthenticated");
}
