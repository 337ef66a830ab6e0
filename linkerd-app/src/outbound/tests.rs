//! The outbound half between a scripted source and real sockets on loopback, with time in the test's hands.

use super::*;
use crate::policy::{
    ClientPolicy, DiscoveryError, Endpoint, Meta, Resolution, ServerPolicy, Update,
    client::{
        Backend, Backoff, Breaker, Dispatcher, Distribution, Failure, Http, Load, Opaque, Protocol, Retry, Route,
        RouteBackend, Routes, Rule, Session, SessionToken, TcpRoute, Timeouts,
    },
    route::{Filter, HttpMatch, Mirror, PathMatch, Precedence, Ratio, RouteMatch},
};
use ::http::{HeaderMap, StatusCode};
use http_body_util::BodyExt;
use linkerd_stack::http::Reset;
use parking_lot::Mutex;
use std::{
    collections::HashMap,
    sync::atomic::{AtomicUsize, Ordering::SeqCst},
    time::Duration,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
    sync::{mpsc, watch},
    time::Instant,
};

const MS: Duration = Duration::from_millis(1);

/// Most bytes that an idle connection's task may hold: what a stage needs lies in a box of its own and is gone with it.
const TASK: usize = 1280;

#[test]
fn a_connection_has_no_memory_for_stages_that_are_over() {
    fn size<F>(_: impl FnOnce(Outbound, Accepted, drain::Watch) -> F) -> usize {
        size_of::<F>()
    }
    let size = size(Outbound::connection);
    assert!(size <= TASK, "{size} bytes");
}

/// A source that says what the test tells it.
#[derive(Default)]
struct Script {
    policies: Mutex<HashMap<Target, watch::Sender<Arc<ClientPolicy>>>>,
    endpoints: Mutex<HashMap<String, Vec<Endpoint>>>,
    streams: Mutex<HashMap<String, mpsc::Sender<Update>>>,
    lookups: AtomicUsize,
    resolutions: AtomicUsize,
    stale: Arc<Mutex<Option<Arc<str>>>>,
}

impl Script {
    fn set_policy(&self, target: Target, policy: ClientPolicy) {
        let policy = Arc::new(policy);
        let mut policies = self.policies.lock();
        match policies.get(&target) {
            Some(tx) => drop(tx.send_replace(policy)),
            None => drop(policies.insert(target, watch::channel(policy).0)),
        }
    }

    async fn update(&self, discovery: &str, update: Update) {
        let tx = self.streams.lock().get(discovery).unwrap().clone();
        tx.send(update).await.unwrap();
        settle().await;
    }
}

impl Source for Script {
    fn watch_server(&self, _: u16) -> watch::Receiver<Arc<ServerPolicy>> {
        unreachable!("outbound asks for no server policies")
    }

    fn watch_client(
        &self,
        target: Target,
    ) -> futures_util::future::BoxFuture<'static, Result<watch::Receiver<Arc<ClientPolicy>>, DiscoveryError>> {
        self.lookups.fetch_add(1, SeqCst);
        let known = self.policies.lock().get(&target).map(watch::Sender::subscribe);
        Box::pin(async move { known.ok_or(DiscoveryError::Refused { target, reason: "unknown".into() }) })
    }

    fn resolve(&self, discovery: &str) -> Resolution {
        self.resolutions.fetch_add(1, SeqCst);
        let (tx, rx) = mpsc::channel(8);
        if let Some(endpoints) = self.endpoints.lock().get(discovery) {
            tx.try_send(Update::Reset(endpoints.clone())).unwrap();
        }
        self.streams.lock().insert(discovery.into(), tx);
        let (known, stale) = (self.endpoints.lock().contains_key(discovery), self.stale.clone());
        Resolution { updates: rx, stale: Arc::new(move || stale.lock().clone().filter(|_| known)) }
    }
}

/// Lets every task run that can.
async fn settle() {
    for _ in 0..50 {
        tokio::task::yield_now().await;
    }
}

struct World {
    outbound: Outbound,
    script: Arc<Script>,
    telemetry: Telemetry,
}

fn world() -> World {
    let script = Arc::new(Script::default());
    let telemetry = Telemetry::new(config::Metrics::default());
    let outbound = Outbound::new(&settings(), Arc::default(), None, script.clone(), telemetry.clone());
    World { outbound, script, telemetry }
}

impl World {
    /// The sum of a family's samples that have these labels.
    #[track_caller]
    fn counted(&self, family: &str, labels: &str, expected: u64) {
        let page = self.telemetry.render();
        let of =
            |line: &&str| line.strip_prefix(family).is_some_and(|rest| rest.starts_with('{')) && line.contains(labels);
        let sum: u64 = page.lines().filter(of).filter_map(|l| l.rsplit(' ').next()?.parse::<u64>().ok()).sum();
        assert_eq!(sum, expected, "{family} {labels}\n{page}");
    }
}

fn settings() -> config::Outbound {
    let backoff = Backoff { min: 100 * MS, max: 60_000 * MS, jitter: 0.1 };
    let queue = config::Queue { capacity: 100, failfast_timeout: 3_000 * MS };
    config::Outbound {
        listen: Vec::new(),
        tcp_queue: queue,
        http_queue: queue,
        max_in_flight: 1_000,
        discovery_idle_timeout: 5_000 * MS,
        detect_timeout: 10_000 * MS,
        connect: config::Connect { timeout: 1_000 * MS, keepalive: None, user_timeout: None, backoff },
        http1: config::Http1Client { max_idle: 100, idle_timeout: 3_000 * MS },
        http2_client: Default::default(),
        http_server: config::HttpServer {
            stream_window: 65_535,
            connection_window: 1 << 20,
            adaptive_window: false,
            keep_alive: None,
            max_concurrent_streams: None,
            max_frame_size: None,
            max_header_size: 1 << 16,
            max_header_setting: "LINKERD2_PROXY_OUTBOUND_SERVER_HTTP2_MAX_HEADER_LIST_SIZE",
            max_pending_accept_reset_streams: None,
            max_send_buf_size: None,
        },
        informational_headers: true,
        ingress_mode: false,
        hostname_labels: false,
        profile_suffixes: Default::default(),
        profile_networks: Vec::new(),
        // Loopback endpoints are legitimate.
        explicit: true,
    }
}

/// A server of both HTTPs on loopback.
async fn app<F, Fut>(answer: F) -> SocketAddr
where
    F: Fn(Request<Body>) -> Fut + Clone + Send + Sync + 'static,
    Fut: Future<Output = Response<Body>> + Send + 'static,
{
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    tokio::spawn(async move {
        let (_signal, drain) = drain::channel();
        while let Ok((mut io, _)) = listener.accept().await {
            let (answer, drain) = (answer.clone(), drain.clone());
            tokio::spawn(async move {
                let svc = tower::service_fn(move |req| {
                    let answer = answer.clone();
                    async move { Ok::<_, Reset>(answer(req).await) }
                });
                let Ok((Some(version), read)) = protocol::http(10_000 * MS, &mut io).await else { return };
                let _ = serve(&ServerConfig::default(), version, PrefixedIo::new(read, io), svc, drain).await;
            });
        }
    });
    addr
}

/// A server that says its name.
async fn named(name: &'static str) -> SocketAddr {
    app(move |_| async move { Response::new(Body::full(name)) }).await
}

/// An address that refuses connections for as long as its socket, bound but not listening, is held.
fn refusing() -> (tokio::net::TcpSocket, SocketAddr) {
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let addr = socket.local_addr().unwrap();
    (socket, addr)
}

fn name(host: &str) -> Target {
    Target::Name(host.into(), 80)
}

fn balance(discovery: &str) -> RouteBackend<Filter> {
    let dispatcher = Dispatcher::Balance { discovery: discovery.into(), load: Load::default() };
    RouteBackend { filters: Vec::new(), backend: Backend { meta: Meta::default(discovery), dispatcher } }
}

fn to(discovery: &str) -> Rule {
    Rule::to(Distribution::FirstAvailable(Arc::new([balance(discovery)])))
}

fn policy(rules: Vec<Rule>) -> ClientPolicy {
    policy_with(rules, Breaker::None)
}

fn policy_with(rules: Vec<Rule>, breaker: Breaker) -> ClientPolicy {
    let route = Route { meta: Meta::default("test"), hosts: Vec::new(), rules };
    let http = Http { routes: Routes::Http(Arc::new([route]), Precedence::GatewayApi), breaker };
    let opaque = Opaque { route: None };
    let protocol = Protocol::Detect { timeout: 10_000 * MS, http1: http.clone(), http2: http, opaque };
    ClientPolicy { parent: Meta::default("svc"), protocol, logical: None, rate_limit: None }
}

impl World {
    async fn serve(&self, discovery: &str, addrs: &[SocketAddr]) {
        let endpoints = addrs.iter().map(|addr| Endpoint::bare(*addr)).collect();
        self.script.endpoints.lock().insert(discovery.into(), endpoints);
    }

    /// One request to `web`, answered as a client would see it.
    async fn send(&self, req: Request<Body>) -> Response<Body> {
        let asked = Asked::of(&req);
        match self.outbound.http_for(name("web")).send(req).await {
            Ok(rsp) => rsp,
            Err(error) => self.outbound.rt.rescue.response(&error, &asked),
        }
    }

    async fn get(&self, path: &str) -> (StatusCode, String) {
        let rsp = self.send(get(path)).await;
        (rsp.status(), text(rsp).await)
    }
}

fn get(path: &str) -> Request<Body> {
    Request::builder().uri(format!("http://web{path}")).header("host", "web").body(Body::empty()).unwrap()
}

async fn text(rsp: Response<Body>) -> String {
    let body = rsp.into_body().collect().await.map(|b| b.to_bytes()).unwrap_or_default();
    String::from_utf8(body.to_vec()).unwrap()
}

fn reason(rsp: &Response<Body>) -> &str {
    rsp.headers()["l5d-proxy-error"].to_str().unwrap()
}

#[tokio::test(start_paused = true)]
async fn requests_reach_a_replica_and_one_lookup_serves_all() {
    let w = world();
    w.serve("a", &[named("a").await]).await;
    w.script.set_policy(name("web"), policy(vec![to("a")]));
    for _ in 0..3 {
        assert_eq!(w.get("/").await, (StatusCode::OK, "a".into()));
    }
    assert_eq!(w.script.lookups.load(SeqCst), 1);
    let status = w.outbound.status();
    assert_eq!(status["targets"][0]["target"], "web:80");
    assert_eq!(status["targets"][0]["http"][0]["backends"]["backend default.a"]["open"], true);
}

#[tokio::test(start_paused = true)]
async fn a_policy_change_does_not_touch_requests_in_flight() {
    let w = world();
    let (go, wait) = watch::channel(false);
    let slow = app(move |_| {
        let mut wait = wait.clone();
        async move {
            wait.wait_for(|go| *go).await.unwrap();
            Response::new(Body::full("slow"))
        }
    });
    w.serve("slow", &[slow.await]).await;
    w.serve("fast", &[named("fast").await]).await;
    w.script.set_policy(name("web"), policy(vec![to("slow")]));
    let outbound = w.outbound.clone();
    let in_flight = tokio::spawn(async move { outbound.http_for(name("web")).send(get("/")).await.unwrap() });
    settle().await;
    w.script.set_policy(name("web"), policy(vec![to("fast")]));
    settle().await;
    assert_eq!(w.get("/").await.1, "fast");
    go.send_replace(true);
    assert_eq!(text(in_flight.await.unwrap()).await, "slow");
}

#[tokio::test(start_paused = true)]
async fn replicas_outlive_policies_that_keep_their_backend() {
    let w = world();
    w.serve("a", &[named("a").await]).await;
    w.script.set_policy(name("web"), policy(vec![to("a")]));
    w.get("/").await;
    let before = w.script.streams.lock()["a"].clone();
    let timeouts = Timeouts { request: Some(1_000 * MS), ..Timeouts::default() };
    w.script.set_policy(name("web"), policy(vec![Rule { timeouts, ..to("a") }]));
    settle().await;
    assert_eq!(w.get("/").await.1, "a");
    assert!(!before.is_closed(), "discovery goes on");
    w.script.set_policy(name("web"), policy(vec![to("b")]));
    settle().await;
    assert!(before.is_closed(), "and ends with its last user");
}

#[tokio::test(start_paused = true)]
async fn without_replicas_requests_fail_fast_and_then_at_once_until_there_are_some() {
    let w = world();
    w.script.set_policy(name("web"), policy(vec![to("a")]));
    let started = Instant::now();
    let rsp = w.send(get("/")).await;
    assert_eq!((rsp.status(), started.elapsed()), (StatusCode::GATEWAY_TIMEOUT, 3_000 * MS));
    let chain =
        "logical service default.svc: route default.test: backend default.a: no endpoints: service in fail-fast";
    assert_eq!(reason(&rsp), chain);
    let started = Instant::now();
    assert_eq!(w.get("/").await.0, StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(started.elapsed(), Duration::ZERO);
    let a = named("a").await;
    w.script.update("a", Update::Add(vec![Endpoint::bare(a)])).await;
    assert_eq!(w.get("/").await.1, "a");
    w.script.update("a", Update::Remove(vec![a])).await;
    assert_eq!(w.get("/").await.0, StatusCode::GATEWAY_TIMEOUT);
}

#[tokio::test(start_paused = true)]
async fn refused_connections_are_answers_of_the_endpoint() {
    let w = world();
    let (_port, gone) = refusing();
    w.serve("a", &[gone]).await;
    w.script.set_policy(name("web"), policy(vec![to("a")]));
    let rsp = w.send(get("/")).await;
    assert_eq!(rsp.status(), StatusCode::BAD_GATEWAY);
    assert!(reason(&rsp).starts_with(&format!("endpoint {gone}: ")), "{}", reason(&rsp));
}

/// What the replica says is no HTTP; that is not the client's fault.
#[tokio::test(start_paused = true)]
async fn malformed_responses_are_failures_of_the_endpoint() {
    let w = world();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut io, _)) = listener.accept().await {
            let _ = io.read(&mut [0; 1024]).await;
            let _ = io.write_all(b"SSH-2.0-OpenSSH\r\n\r\n").await;
        }
    });
    w.serve("a", &[addr]).await;
    w.script.set_policy(name("web"), policy(vec![to("a")]));
    let rsp = w.send(get("/")).await;
    assert_eq!(rsp.status(), StatusCode::BAD_GATEWAY);
    assert!(reason(&rsp).starts_with(&format!("endpoint {addr}: ")), "{}", reason(&rsp));
}

#[tokio::test(start_paused = true)]
async fn a_reset_in_a_grpc_response_stays_a_reset() {
    let w = world();
    let addr = app(|_| async {
        let frames = [
            Ok(http_body::Frame::data("part".into())),
            Err(linkerd_stack::http::BodyError::Reset(h2::Reason::CANCEL.into())),
        ];
        let frames = futures_util::StreamExt::then(futures_util::stream::iter(frames), |frame| async {
            tokio::time::sleep(100 * MS).await;
            frame
        });
        let mut rsp = Response::new(Body::new(http_body_util::StreamBody::new(Box::pin(frames))));
        rsp.headers_mut().insert("content-type", "application/grpc".parse().unwrap());
        rsp
    });
    w.serve("a", &[addr.await]).await;
    w.script.set_policy(name("web"), policy(vec![to("a")]));
    let mut req = get("/a.B/C");
    *req.version_mut() = ::http::Version::HTTP_2;
    req.headers_mut().remove("host");
    req.headers_mut().insert("content-type", "application/grpc".parse().unwrap());
    let error = w.send(req).await.into_body().collect().await.unwrap_err();
    assert_eq!(error.reset(), Some(h2::Reason::CANCEL));
}

#[tokio::test(start_paused = true)]
async fn request_timeouts_cover_headers_and_body() {
    let w = world();
    let stuck = app(|req| async move {
        if req.uri().path() == "/body" {
            let endless = futures_util::stream::once(async { Ok(http_body::Frame::data("x".into())) });
            let endless = futures_util::StreamExt::chain(endless, futures_util::stream::pending());
            return Response::new(Body::new(http_body_util::StreamBody::<_>::new(
                endless as futures_util::stream::Chain<_, futures_util::stream::Pending<Result<_, std::io::Error>>>,
            )));
        }
        std::future::pending().await
    });
    w.serve("a", &[stuck.await]).await;
    let timeouts = Timeouts { request: Some(300 * MS), ..Timeouts::default() };
    w.script.set_policy(name("web"), policy(vec![Rule { timeouts, ..to("a") }]));
    let started = Instant::now();
    let rsp = w.send(get("/")).await;
    assert_eq!((rsp.status(), started.elapsed()), (StatusCode::GATEWAY_TIMEOUT, 300 * MS));
    assert!(reason(&rsp).contains("request timeout"));
    assert!(!rsp.headers().contains_key("connection"), "the client's connection is kept");
    let started = Instant::now();
    let rsp = w.send(get("/body")).await;
    assert_eq!(rsp.status(), StatusCode::OK);
    assert!(rsp.into_body().collect().await.is_err());
    assert_eq!(started.elapsed(), 300 * MS);
}

/// Answers the given statuses in turn, then 200 with the request's body; counts.
async fn flaky(statuses: &[u16]) -> (SocketAddr, Arc<AtomicUsize>) {
    let tries = Arc::new(AtomicUsize::new(0));
    let (count, statuses) = (tries.clone(), statuses.to_vec());
    let addr = app(move |req: Request<Body>| {
        let status = statuses.get(count.fetch_add(1, SeqCst)).copied();
        async move {
            let body = req.into_body().collect().await.unwrap().to_bytes();
            let mut rsp = Response::new(Body::full(body));
            *rsp.status_mut() = StatusCode::from_u16(status.unwrap_or(200)).unwrap();
            rsp
        }
    });
    (addr.await, tries)
}

fn retry(max_retries: u16) -> Retry {
    Retry {
        max_retries,
        max_request_bytes: 1_000,
        statuses: vec![500..=599],
        grpc_codes: Vec::new(),
        timeout: None,
        backoff: Some(Backoff { min: 100 * MS, max: 1_000 * MS, jitter: 0.0 }),
        connection_errors: false,
        budget: None,
    }
}

#[tokio::test(start_paused = true)]
async fn retries_replay_the_body_after_a_backoff() {
    let w = world();
    let (addr, tries) = flaky(&[500, 503]).await;
    w.serve("a", &[addr]).await;
    w.script.set_policy(name("web"), policy(vec![Rule { retry: Some(retry(2)), ..to("a") }]));
    let started = Instant::now();
    let rsp = w.send(get("/").map(|_| Body::full("important"))).await;
    assert_eq!((rsp.status(), text(rsp).await.as_str()), (StatusCode::OK, "important"));
    assert_eq!((tries.load(SeqCst), started.elapsed()), (3, 300 * MS));
}

#[tokio::test(start_paused = true)]
async fn retries_have_a_limit_and_long_bodies_none() {
    let w = world();
    let (addr, tries) = flaky(&[500; 9]).await;
    w.serve("a", &[addr]).await;
    w.script.set_policy(name("web"), policy(vec![Rule { retry: Some(retry(1)), ..to("a") }]));
    assert_eq!(w.get("/").await.0, StatusCode::INTERNAL_SERVER_ERROR);
    assert_eq!(tries.load(SeqCst), 2);
    let rsp = w.send(get("/").map(|_| Body::full(vec![0; 1_001]))).await;
    assert_eq!(rsp.status(), StatusCode::INTERNAL_SERVER_ERROR);
    assert_eq!(tries.load(SeqCst), 3);
}

#[tokio::test(start_paused = true)]
async fn l5d_headers_ask_for_retries_only_where_allowed() {
    let w = world();
    let (addr, tries) = flaky(&[503, 503]).await;
    w.serve("a", &[addr]).await;
    let request = || {
        let mut req = get("/");
        req.headers_mut().insert("l5d-retry-http", "5xx".parse().unwrap());
        req
    };
    w.script.set_policy(name("web"), policy(vec![to("a")]));
    assert_eq!(w.send(request()).await.status(), 503);
    w.script.set_policy(name("web"), policy(vec![Rule { allow_l5d_headers: true, ..to("a") }]));
    settle().await;
    assert_eq!(w.send(request()).await.status(), 200);
    assert_eq!(tries.load(SeqCst), 3);
}

#[tokio::test(start_paused = true)]
async fn grpc_failures_in_trailers_are_retried() {
    let w = world();
    let tries = Arc::new(AtomicUsize::new(0));
    let count = tries.clone();
    let addr = app(move |_| {
        let code = if count.fetch_add(1, SeqCst) == 0 { "14" } else { "0" };
        async move {
            let mut trailers = HeaderMap::new();
            trailers.insert("grpc-status", code.parse().unwrap());
            let frames = futures_util::stream::iter([Ok::<_, std::io::Error>(http_body::Frame::trailers(trailers))]);
            let mut rsp = Response::new(Body::new(http_body_util::StreamBody::new(frames)));
            rsp.headers_mut().insert("content-type", "application/grpc".parse().unwrap());
            rsp
        }
    });
    w.serve("a", &[addr.await]).await;
    let retry = Retry { statuses: Vec::new(), grpc_codes: vec![14], ..retry(3) };
    w.script.set_policy(name("web"), policy(vec![Rule { retry: Some(retry), ..to("a") }]));
    let mut req = get("/a.B/C");
    *req.version_mut() = ::http::Version::HTTP_2;
    req.headers_mut().remove("host");
    req.headers_mut().insert("content-type", "application/grpc".parse().unwrap());
    let rsp = w.send(req).await;
    let trailers = rsp.into_body().collect().await.unwrap().trailers().cloned().unwrap();
    assert_eq!((trailers["grpc-status"].to_str().unwrap(), tries.load(SeqCst)), ("0", 2));
    // What was looked at counts: the attempt that failed and the one that did not, and the request on its route.
    w.counted("response_total", "classification=\"failure\",grpc_status=\"14\"", 1);
    w.counted("response_total", "classification=\"success\",grpc_status=\"0\"", 1);
    w.counted("outbound_http_route_request_statuses_total", "http_status=\"200\",error=\"\"", 1);
    w.counted("outbound_http_route_backend_response_statuses_total", "http_status=\"200\",error=\"\"", 2);
}

#[tokio::test(start_paused = true)]
async fn a_tripped_breaker_leaves_traffic_to_the_others() {
    let w = world();
    let (sick, tries) = flaky(&[500; 99]).await;
    w.serve("a", &[sick, named("well").await]).await;
    let backoff = Backoff { min: 10_000 * MS, max: 10_000 * MS, jitter: 0.0 };
    let breaker = Breaker::Consecutive { max_failures: 3, backoff };
    w.script.set_policy(name("web"), policy_with(vec![to("a")], breaker));
    // Destinations in use are not forgotten.
    let _in_use = w.outbound.discover.find(name("web")).await.ok();
    for _ in 0..200 {
        w.get("/").await;
    }
    assert_eq!(tries.load(SeqCst), 3);
    tokio::time::advance(11_000 * MS).await;
    for _ in 0..200 {
        w.get("/").await;
    }
    assert_eq!(tries.load(SeqCst), 4, "one probe");
}

#[tokio::test(start_paused = true)]
async fn failing_backends_and_missing_routes_say_so() {
    let w = world();
    let failure = Failure { status: StatusCode::INTERNAL_SERVER_ERROR, grpc_code: 14, message: "Service gone".into() };
    let backend = Backend { meta: Meta::default("gone"), dispatcher: Dispatcher::Fail(failure) };
    let matches =
        vec![RouteMatch::Http(HttpMatch { path: Some(PathMatch::Exact("/gone".into())), ..HttpMatch::default() })];
    let backends = Distribution::RandomAvailable(Arc::new([(RouteBackend { filters: Vec::new(), backend }, 1)]));
    w.script.set_policy(name("web"), policy(vec![Rule { matches, ..Rule::to(backends) }]));
    let rsp = w.send(get("/gone")).await;
    assert_eq!(rsp.status(), 500);
    assert!(reason(&rsp).ends_with("backend default.gone: Service gone"));
    let rsp = w.send(get("/")).await;
    assert_eq!(rsp.status(), 404);
    assert!(reason(&rsp).ends_with("no route found for request"));
    w.script.set_policy(
        name("web"),
        ClientPolicy { protocol: Protocol::Invalid("what is this".into()), ..policy(Vec::new()) },
    );
    settle().await;
    assert_eq!(w.get("/").await.0, StatusCode::INTERNAL_SERVER_ERROR);
}

#[tokio::test(start_paused = true)]
async fn an_identity_that_nobody_has_is_not_reached() {
    let w = world();
    w.serve("a", &[named("a").await]).await;
    w.script.set_policy(name("web"), policy(vec![to("a")]));
    let mut req = get("/");
    req.headers_mut().insert("l5d-require-id", "web.ns.id".parse().unwrap());
    let rsp = w.send(req).await;
    assert_eq!(rsp.status(), 502);
    assert!(reason(&rsp).ends_with("required id web.ns.id; found none"));
}

#[tokio::test(start_paused = true)]
async fn sessions_stick_to_their_replica() {
    let w = world();
    w.serve("a", &[named("1").await, named("2").await, named("3").await]).await;
    let session = Session { token: SessionToken::Header("x-session".parse().unwrap()), absolute_timeout: None };
    w.script.set_policy(name("web"), policy(vec![Rule { session: Some(Arc::new(session)), ..to("a") }]));
    let first = w.send(get("/")).await;
    let token = first.headers()["x-session"].clone();
    let first = text(first).await;
    for _ in 0..30 {
        let mut req = get("/");
        req.headers_mut().insert("x-session", token.clone());
        let rsp = w.send(req).await;
        assert!(!rsp.headers().contains_key("x-session"));
        assert_eq!(text(rsp).await, first);
    }
}

#[tokio::test(start_paused = true)]
async fn mirrors_get_a_copy_and_delay_nobody() {
    let w = world();
    let (tx, mut rx) = mpsc::channel(1);
    let copy = app(move |req: Request<Body>| {
        let tx = tx.clone();
        async move {
            let body = req.into_body().collect().await.unwrap().to_bytes();
            tx.send(body).await.unwrap();
            std::future::pending().await
        }
    });
    w.serve("copy", &[copy.await]).await;
    w.serve("a", &[named("a").await]).await;
    let mirror = Mirror { backend: Some(balance("copy").backend), ratio: Ratio::ALWAYS };
    let rule = Rule { filters: vec![Filter::Mirror(Arc::new(mirror))], ..to("a") };
    w.script.set_policy(name("web"), policy(vec![rule]));
    let rsp = w.send(get("/").map(|_| Body::full("twice"))).await;
    assert_eq!(text(rsp).await, "a");
    assert_eq!(rx.recv().await.unwrap(), "twice");
}

/// A client's connection to a target, served by outbound.
async fn connect(w: &World, target: Option<SocketAddr>) -> TcpStream {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    let (io, from) = listener.accept().await.unwrap();
    let outbound = w.outbound.clone();
    tokio::spawn(async move {
        let (_signal, drain) = drain::channel();
        let _ = outbound.run(io, from, target, drain).await;
    });
    client
}

fn opaque_policy(addr: SocketAddr) -> ClientPolicy {
    ClientPolicy::forward("test", Endpoint::bare(addr), 10_000 * MS)
}

#[tokio::test(start_paused = true)]
async fn a_server_that_speaks_first_is_heard_at_once() {
    let w = world();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    tokio::spawn(async move {
        loop {
            let (mut io, _) = listener.accept().await.unwrap();
            tokio::spawn(async move {
                io.write_all(b"hello").await.unwrap();
                let mut said = String::new();
                io.read_to_string(&mut said).await.unwrap();
                io.write_all(said.to_uppercase().as_bytes()).await.unwrap();
            });
        }
    });
    w.script.set_policy(Target::Addr(addr), opaque_policy(addr));
    for grace in [20 * MS, Duration::ZERO] {
        let started = Instant::now();
        let mut client = connect(&w, Some(addr)).await;
        let mut hello = [0; 5];
        client.read_exact(&mut hello).await.unwrap();
        assert_eq!(&hello, b"hello");
        assert!(started.elapsed() <= grace + 2 * MS, "{:?}", started.elapsed());
        client.write_all(b"bye").await.unwrap();
        client.shutdown().await.unwrap();
        let mut rest = String::new();
        client.read_to_string(&mut rest).await.unwrap();
        assert_eq!(rest, "BYE");
    }
}

#[tokio::test(start_paused = true)]
async fn a_slow_http_client_is_still_http() {
    let w = world();
    let addr = named("a").await;
    w.script.set_policy(Target::Addr(addr), opaque_policy(addr));
    let mut client = connect(&w, Some(addr)).await;
    tokio::time::sleep(500 * MS).await;
    client.write_all(b"GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n").await.unwrap();
    let mut rsp = String::new();
    client.read_to_string(&mut rsp).await.unwrap();
    assert!(rsp.starts_with("HTTP/1.1 200 OK\r\n") && rsp.ends_with("\r\n\r\na"), "{rsp}");
}

#[tokio::test(start_paused = true)]
async fn connections_without_a_route_are_closed() {
    let w = world();
    let addr = named("a").await;
    w.script.set_policy(
        Target::Addr(addr),
        ClientPolicy { protocol: Protocol::Opaque(Opaque { route: None }), ..policy(Vec::new()) },
    );
    let mut client = connect(&w, Some(addr)).await;
    assert_eq!(client.read(&mut [0; 1]).await.unwrap(), 0);

    let denied = TcpRoute {
        meta: Meta::default("tcp-egress-deny"),
        refuse: Some(crate::policy::client::Refuse::Forbidden),
        backends: Distribution::Empty,
    };
    w.script.set_policy(
        Target::Addr(addr),
        ClientPolicy { protocol: Protocol::Opaque(Opaque { route: Some(denied) }), ..policy(Vec::new()) },
    );
    settle().await;
    let mut client = connect(&w, Some(addr)).await;
    let error = client.read(&mut [0; 1]).await.unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
}

#[tokio::test(start_paused = true)]
async fn explicit_listeners_take_names_and_tunnels() {
    let w = world();
    let addr = named("a").await;
    w.serve("a", &[addr]).await;
    w.script.set_policy(name("web"), policy(vec![to("a")]));
    for head in ["GET http://web/ HTTP/1.1\r\nhost: x", "GET / HTTP/1.1\r\nhost: WEB"] {
        let mut client = connect(&w, None).await;
        client.write_all(format!("{head}\r\nconnection: close\r\n\r\n").as_bytes()).await.unwrap();
        let mut rsp = String::new();
        client.read_to_string(&mut rsp).await.unwrap();
        assert!(rsp.starts_with("HTTP/1.1 200 OK\r\n") && rsp.ends_with("\r\n\r\na"), "{rsp}");
    }
    w.script.set_policy(Target::Addr(addr), opaque_policy(addr));
    let mut client = connect(&w, None).await;
    client.write_all(format!("CONNECT {addr} HTTP/1.1\r\nhost: {addr}\r\n\r\n").as_bytes()).await.unwrap();
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(client.read_u8().await.unwrap());
    }
    assert!(head.starts_with(b"HTTP/1.1 200"));
    client.write_all(b"GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n").await.unwrap();
    let mut rsp = String::new();
    client.read_to_string(&mut rsp).await.unwrap();
    assert!(rsp.ends_with("\r\n\r\na"), "{rsp}");

    let mut client = connect(&w, None).await;
    client.write_all(b"GET http://nowhere/ HTTP/1.1\r\nhost: nowhere\r\n\r\n").await.unwrap();
    let mut rsp = String::new();
    client.read_to_string(&mut rsp).await.unwrap();
    assert!(rsp.starts_with("HTTP/1.1 503 ") && rsp.contains("discovery refused nowhere:80"), "{rsp}");
}

/// A replica that never answers, behind a breaker that trips after two failures; whether it has tripped after two that
/// met a limit.
async fn trips(timeouts: Timeouts, retry: Option<Retry>) -> bool {
    let w = world();
    let tries = Arc::new(AtomicUsize::new(0));
    let count = tries.clone();
    let mute = app(move |_| {
        count.fetch_add(1, SeqCst);
        std::future::pending()
    });
    w.serve("a", &[mute.await]).await;
    let backoff = Backoff { min: 60_000 * MS, max: 60_000 * MS, jitter: 0.0 };
    let breaker = Breaker::Consecutive { max_failures: 2, backoff };
    w.script.set_policy(name("web"), policy_with(vec![Rule { timeouts, retry, ..to("a") }], breaker));
    // A client that goes away says nothing about the replica.
    for _ in 0..9 {
        assert!(tokio::time::timeout(100 * MS, w.get("/")).await.is_err());
    }
    let before = tries.load(SeqCst);
    for _ in 0..3 {
        assert!(w.get("/").await.0.is_server_error());
    }
    w.counted("response_total", "error=\"", 2);
    (before, tries.load(SeqCst)) == (9, 11)
}

#[tokio::test(start_paused = true)]
async fn limits_in_time_are_failures_of_the_replica_and_cancellations_are_not() {
    let t = Some(300 * MS);
    assert!(trips(Timeouts { request: t, ..Timeouts::default() }, None).await);
    assert!(trips(Timeouts { backend_request: t, ..Timeouts::default() }, None).await);
    assert!(trips(Timeouts { response: t, ..Timeouts::default() }, None).await);
    let retry = Retry { timeout: t, ..retry(1) };
    assert!(trips(Timeouts { request: Some(10_000 * MS), ..Timeouts::default() }, Some(retry)).await);
}

#[tokio::test(start_paused = true)]
async fn failures_say_which_kind_of_nothing_was_ready() {
    let w = world();
    let (sick, _) = flaky(&[500; 99]).await;
    w.serve("a", &[sick]).await;
    let backoff = Backoff { min: 60_000 * MS, max: 60_000 * MS, jitter: 0.0 };
    let breaker = Breaker::Consecutive { max_failures: 1, backoff };
    w.script.set_policy(name("web"), policy_with(vec![to("a")], breaker));
    w.get("/").await;
    let rsp = w.send(get("/")).await;
    let why = "no endpoint of 1 is ready, 1 shut by circuit breakers: service in fail-fast";
    assert!(reason(&rsp).ends_with(why), "{}", reason(&rsp));
    assert_eq!(rsp.headers()["l5d-proxy-termination"], "queue-ejected");

    // HTTP/2 endpoints are connected ahead of requests, so it is the connection that is missing.
    let (_port, gone) = refusing();
    w.serve("b", &[gone]).await;
    w.script.set_policy(name("web"), policy(vec![to("b")]));
    settle().await;
    let mut req = get("/");
    *req.version_mut() = ::http::Version::HTTP_2;
    let rsp = w.send(req).await;
    let why = format!("no endpoint of 1 is ready, 1 not connected ({gone}: ");
    assert!(reason(&rsp).contains(&why), "{}", reason(&rsp));
    assert_eq!(rsp.headers()["l5d-proxy-termination"], "queue-unconnected");
}

#[tokio::test(start_paused = true)]
async fn failures_say_that_discovery_is_away() {
    let w = world();
    w.serve("a", &[]).await;
    w.script.set_policy(name("web"), policy(vec![to("a")]));
    let rsp = w.send(get("/")).await;
    assert!(reason(&rsp).ends_with("no endpoints: service in fail-fast"), "{}", reason(&rsp));
    assert_eq!(rsp.headers()["l5d-proxy-termination"], "queue-no-endpoints");
    *w.script.stale.lock() = Some("connection refused".into());
    tokio::time::advance(2_000 * MS).await;
    let rsp = w.send(get("/")).await;
    let why = "no endpoints, and discovery is stale (connection refused): service unavailable";
    assert!(reason(&rsp).ends_with(why), "{}", reason(&rsp));
    assert_eq!(rsp.headers()["l5d-proxy-termination"], "queue-stale-discovery");
}

#[tokio::test(start_paused = true)]
async fn a_dead_replica_does_not_cost_a_connection() {
    let w = world();
    let (_port, gone) = refusing();
    let addr = named("a").await;
    w.serve("a", &[gone, addr]).await;
    let backend = RouteBackend { filters: Vec::new(), backend: balance("a").backend };
    let route = TcpRoute {
        meta: Meta::default("opaq"),
        refuse: None,
        backends: Distribution::FirstAvailable(Arc::new([backend])),
    };
    let protocol = Protocol::Opaque(Opaque { route: Some(route) });
    w.script.set_policy(Target::Addr(addr), ClientPolicy { protocol, ..policy(Vec::new()) });
    for _ in 0..20 {
        let mut client = connect(&w, Some(addr)).await;
        client.write_all(b"GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n").await.unwrap();
        let mut rsp = String::new();
        client.read_to_string(&mut rsp).await.unwrap();
        assert!(rsp.ends_with("\r\n\r\na"), "{rsp}");
    }
}

#[tokio::test(start_paused = true)]
async fn http_clients_are_told_why_their_destination_is_unknown() {
    let w = world();
    let mut client = connect(&w, Some("10.0.0.1:80".parse().unwrap())).await;
    client.write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
    let mut rsp = String::new();
    client.read_to_string(&mut rsp).await.unwrap();
    assert!(rsp.starts_with("HTTP/1.1 503 "), "{rsp}");
    assert!(rsp.contains("l5d-proxy-error: discovery refused 10.0.0.1:80: unknown\r\n"), "{rsp}");
    // The rest gets an end without a word.
    let mut client = connect(&w, Some("10.0.0.1:80".parse().unwrap())).await;
    client.write_all(b"\x01\x02 no HTTP\r\n").await.unwrap();
    assert!(!matches!(client.read_to_string(&mut rsp).await, Ok(n) if n > 0));
}

#[tokio::test(start_paused = true)]
async fn a_replica_that_keeps_refusing_leads_to_a_fresh_lookup() {
    let w = world();
    let (_port, gone) = refusing();
    w.serve("a", &[gone]).await;
    w.script.set_policy(name("web"), policy(vec![to("a")]));
    // One request a second for so long; the number of look-ups since the beginning.
    let look = async |seconds| {
        for _ in 0..seconds {
            w.get("/").await;
            tokio::time::sleep(1_000 * MS).await;
        }
        w.script.resolutions.load(SeqCst)
    };
    assert_eq!(look(9).await, 1);
    assert_eq!(look(10).await, 2);
    // The same answer: more patience.
    assert_eq!(look(10).await, 2);
    let good = named("a").await;
    w.serve("a", &[good]).await;
    look(25).await;
    assert_eq!(w.get("/").await, (StatusCode::OK, "a".into()));
    let lookups = w.script.resolutions.load(SeqCst);
    assert_eq!(look(120).await, lookups, "and all is quiet");
}

#[tokio::test(start_paused = true)]
async fn a_fresh_lookup_gathers_before_it_replaces() {
    let w = world();
    let (_port, gone) = refusing();
    let (a, b) = (named("a").await, named("b").await);
    w.serve("a", &[gone]).await;
    w.script.set_policy(name("web"), policy(vec![to("a")]));
    let members = || {
        let status = w.outbound.status();
        let of = &status["targets"][0]["http"][0]["backends"]["backend default.a"]["endpoints"];
        let mut addrs: Vec<SocketAddr> =
            of.as_array().unwrap().iter().map(|e| e["addr"].as_str().unwrap().parse().unwrap()).collect();
        addrs.sort();
        addrs
    };
    let sorted = |mut addrs: Vec<SocketAddr>| {
        addrs.sort();
        addrs
    };
    w.get("/").await;
    w.serve("a", &[a]).await;
    while w.script.resolutions.load(SeqCst) < 2 {
        w.get("/").await;
        tokio::time::sleep(150 * MS).await;
    }
    assert_eq!(members(), [gone]);
    w.script.update("a", Update::Add(vec![Endpoint::bare(b)])).await;
    tokio::time::sleep(300 * MS).await;
    assert_eq!(members(), sorted(vec![a, b]));
}

/// One allocation per request holds everything that a request needs on its way; a future that is handed on by value is
/// stored twice, which once made this 44 KB.
#[tokio::test]
async fn requests_in_flight_are_small() {
    let w = world();
    w.script.set_policy(name("web"), policy(vec![to("a")]));
    let found = Arc::new(w.outbound.discover.find(name("web")).await.ok().unwrap());
    let mut edge = Edge::new(w.outbound.rt.clone(), ([127, 0, 0, 1], 4000).into(), Routing::Fixed(found));
    let size = size_of_val(&*tower::Service::call(&mut edge, get("/")));
    assert!(size <= 12 * 1024, "{size} bytes");
}

/// A meshed replica that has been started anew does not take the tickets of the one before it.
#[tokio::test]
async fn a_replica_that_forgot_its_sessions_costs_one_more_connection_and_no_failure() {
    use linkerd_tls::{ca, identity};
    let dir = std::env::temp_dir().join(format!("outbound-tests-{}", std::process::id()));
    let _ = std::fs::remove_dir_all(&dir);
    ca::init(&dir, &ca::Init::default()).unwrap();
    let issuer = ca::Issuer::load(&dir).unwrap();
    std::fs::remove_dir_all(&dir).unwrap();
    let certified = |name: &str| {
        let id: linkerd_tls::Id = name.parse().unwrap();
        let (mut writer, reader) =
            identity::channel(id.clone(), id.to_server_name().unwrap(), issuer.trust_anchors().clone());
        writer.set_certificate(issuer.issue(&id).unwrap()).unwrap();
        (writer, reader)
    };
    let ((_w, before), (_v, after)) = (certified("web.example"), certified("web.example"));
    let (_o, own) = certified("client.example");

    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let meta = crate::policy::endpoint::EndpointMeta {
        tls: Some(crate::policy::endpoint::ServerTls {
            server_id: before.id().clone(),
            server_name: before.server_name().clone(),
        }),
        ..Default::default()
    };
    let endpoint = Endpoint { addr: listener.local_addr().unwrap(), meta: Arc::new(meta) };
    let server = tokio::spawn(async move {
        let mut accepted = Vec::new();
        // What the first one and the second one make of the connections that come.
        for replica in [&before, &before, &after, &after] {
            let (io, _) = listener.accept().await.unwrap();
            let shaken = replica.accept(io, identity::Alpn::None).await;
            accepted.push(shaken.as_ref().ok().map(|(accepted, _)| accepted.resumed));
            if let Ok((_, mut io)) = shaken {
                // The one that was given up is closed already.
                let _ = io.write_all(b"x").await;
                let _ = io.shutdown().await;
            }
        }
        accepted
    });

    let telemetry = Telemetry::new(config::Metrics::default());
    let outbound = Outbound::new(&settings(), Arc::default(), Some(own), Arc::new(Script::default()), telemetry);
    let connector = super::connect::Connector::new(&outbound.rt, &endpoint, None);
    for _ in 0..3 {
        let mut io = connector.open(None).await.unwrap_or_else(|error| panic!("{error}")).boxed();
        let mut said = Vec::new();
        io.read_to_end(&mut said).await.unwrap();
        assert_eq!(said, b"x");
    }
    let accepted = server.await.unwrap();
    assert_eq!(accepted[..2], [Some(false), Some(true)]);
    assert_eq!(accepted[3], Some(false), "the connection in between was given up: {accepted:?}");
}
