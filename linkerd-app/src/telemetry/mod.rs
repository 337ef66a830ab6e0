//! What the proxy tells about itself: metrics (metrics.md), termination codes, logs and the access log.
//!
//! One [`Telemetry`] holds every family. Handles are asked for when a target is built and counted in afterwards; two handles
//! of one label set are the same cells. A scrape prints the older dialect from these cells directly and the newer one through
//! a prometheus-client registry whose collectors read the same cells; then it drops what has been idle for long.
//!
//! Left out: those `tokio_rt_*` that need tokio's unstable build, and `stack_*`, which describes layers that this proxy does
//! not have. No shipped query reads either.

pub mod access;
mod authz;
mod control;
mod errors;
mod health;
mod http;
mod labels;
mod legacy;
pub mod log;
mod metric;
mod process;
mod prom;
mod route;
mod runtime;
mod store;
mod tcp;
pub mod termination;
pub mod trace;
pub mod watchdog;

pub use self::{
    authz::InboundServer,
    control::{
        BalancerKind, BalancerMetrics, DetectMetrics, Detected, DnsClient, DnsMetrics, DnsRecord, IdentityMetrics,
        ManifestMetrics,
    },
    errors::{ErrorMetrics, InboundError, Kind, OutboundError, RouteCloseError, StreamError},
    health::{Condition, Health},
    http::{Class, EndpointMetrics, HttpMetrics, ProfileRouteMetrics, h2_reason},
    labels::{
        BackendLabels, ConnLabels, Direction, EndpointLabels, InboundRouteLabels, Peer, ProfileRouteLabels,
        RouteLabels, ServerLabels, TlsLabels, authority,
    },
    metric::{Counter, Gauge, Histogram},
    route::{
        BackendMetrics, ConnRouteMetrics, Ended, InboundRouteMetrics, RetryMetrics, RouteKind, RouteMetrics, grpc_name,
    },
    store::MAX_SERIES,
    tcp::{ConnMetrics, errno_name},
    termination::{Code, Phase},
    watchdog::Watchdog,
};

use self::{
    control::BalancerSeries,
    errors::Place,
    labels::Labels,
    legacy::Family,
    process::Process,
    prom::{Encoder, FnCollector, Group, GroupCollector, Sample},
    store::{Metric, Series, Store},
    tcp::Zones,
};
use crate::{
    config,
    policy::{Meta, authz::NoTls},
    tap::Taps,
};
use linkerd_tls::Id;
use parking_lot::Mutex;
use prometheus_client::{encoding::text, registry::Registry};
use std::{
    fmt,
    net::SocketAddr,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};
use tokio::{runtime::RuntimeMetrics, time::Instant};

/// Every family of the proxy. Clones are the same.
#[derive(Clone)]
pub struct Telemetry(Arc<Inner>);

struct Inner {
    retain_idle: Duration,
    authz: authz::Families,
    inbound_http_errors: Store<ErrorMetrics<InboundError>>,
    inbound_tcp_errors: Store<ErrorMetrics<InboundError>>,
    outbound_http_errors: Arc<ErrorMetrics<OutboundError>>,
    outbound_tcp_errors: Store<ErrorMetrics<OutboundError>>,
    endpoints: Store<HttpMetrics>,
    profile_routes: Store<ProfileRouteMetrics>,
    control_clients: Store<HttpMetrics>,
    conns: Arc<Store<ConnMetrics>>,
    /// Bytes of connection label sets that are gone.
    gone_zones: Arc<Mutex<Zones>>,
    spans: SpanMetrics,
    tracer: trace::Tracer,
    inbound_routes: Kinds<InboundRouteMetrics>,
    outbound_routes: Kinds<RouteMetrics>,
    outbound_backends: Kinds<BackendMetrics>,
    /// In order of [`BalancerKind::PREFIXES`].
    balancers: Vec<Arc<Store<BalancerSeries>>>,
    inbound_detect: Arc<Store<DetectMetrics>>,
    outbound_detect: Arc<Store<DetectMetrics>>,
    protocols: Arc<Store<Counter>>,
    transport_headers: Arc<Store<Counter>>,
    tcp_routes: Arc<Store<ConnRouteMetrics>>,
    tls_routes: Arc<Store<ConnRouteMetrics>>,
    singles: Singles,
    /// Set once the time for draining is over.
    cut: AtomicBool,
    taps: Taps,
    /// Of the newer dialect.
    registry: Registry,
    /// Bytes of the last scrape, so that the next one grows its buffer once.
    last_size: AtomicUsize,
}

/// HTTP and gRPC families of one kind of handle.
struct Kinds<M> {
    http: Arc<Store<M>>,
    grpc: Arc<Store<M>>,
}

impl<M> Kinds<M> {
    fn of(&self, kind: RouteKind) -> &Store<M> {
        match kind {
            RouteKind::Http => &self.http,
            RouteKind::Grpc => &self.grpc,
        }
    }
}

/// The TLS library's choices, for `rustls_info`.
#[derive(Clone, Debug, Default)]
pub struct TlsInfo {
    /// Cipher suites.
    pub suites: Vec<String>,
    /// Key exchange groups.
    pub kx_groups: Vec<String>,
    /// Source of randomness.
    pub rand: String,
    /// Loader of private keys.
    pub key_provider: String,
    /// Whether all of it is FIPS-approved.
    pub fips: bool,
}

/// Export of trace spans, always printed.
#[derive(Debug, Default)]
pub struct SpanMetrics {
    /// Streams opened.
    pub streams: Counter,
    /// Messages sent.
    pub requests: Counter,
    /// Spans exported.
    pub spans: Counter,
    /// Spans that were not: the queue was full, or the collector did not take them.
    pub dropped: Arc<Counter>,
}

/// What the process has one of, whatever its label sets. Clones are the same.
#[derive(Clone, Default)]
struct Singles {
    identity: Arc<IdentityMetrics>,
    dns: Arc<DnsMetrics>,
    manifests: Arc<ManifestMetrics>,
    terminations: Arc<termination::Terminations>,
    /// Inbound, outbound.
    replays: [Arc<Counter>; 2],
    tls_info: Arc<OnceLock<TlsInfo>>,
    runtime: Arc<OnceLock<RuntimeMetrics>>,
    health: Arc<Health>,
    access_log_drops: Arc<Counter>,
}

impl Singles {
    /// Shows them to scrapes, and to those who ask for the proxy's health.
    fn collect(&self, registry: &mut Registry) {
        let process = Process::new();
        collect(registry, move |out| process.encode(out));
        let this = self.clone();
        collect(registry, move |out| this.encode(out));

        self.health.add(Condition::BoundExhausted, process::descriptors_low);
        let lost = self.access_log_drops.clone();
        self.health.add(Condition::BoundExhausted, move || {
            let lost = lost.get();
            (lost > 0).then(|| format!("the access log lost {lost} lines: standard error is read too slowly"))
        });
    }

    fn encode(&self, out: &mut Encoder<'_, '_>) -> fmt::Result {
        build_info(out)?;
        self.tls_info.get().map_or(Ok(()), |tls| tls.encode(out))?;
        self.runtime.get().map_or(Ok(()), |metrics| runtime::encode(metrics, out))?;
        self.identity.encode(out)?;
        self.dns.encode(out)?;
        self.manifests.encode(out)?;
        self.terminations.encode(out)?;
        out.counter(
            "http_replayed_requests",
            None,
            "Requests sent once more because the peer provably had not processed them",
            ["inbound", "outbound"].iter().zip(&self.replays).map(|(d, n)| (Sample::of("direction", d), n.get())),
        )?;
        self.health.encode(out)?;
        let help = "Lines that did not fit into the access log's queue";
        out.counter("access_log_dropped_lines", None, help, [(Sample::NONE, self.access_log_drops.get())])
    }
}

impl Telemetry {
    /// Families with nothing in them yet.
    pub fn new(config: config::Metrics) -> Self {
        let limit = config.max_series.get();
        let mut registry = Registry::default();
        let singles = Singles::default();
        singles.collect(&mut registry);
        let conns = Arc::new(Store::new("tcp", limit));
        let gone_zones: Arc<Mutex<Zones>> = Arc::default();
        let (of, gone) = (conns.clone(), gone_zones.clone());
        collect(&mut registry, move |out| transfer_cost(out, &of, &gone));

        let mut groups = Groups { registry: &mut registry, limit, overflow: vec![conns.overflow()] };
        let authz = authz::Families::new(limit);
        groups.overflow.extend(authz.overflow());
        let inner = Inner {
            retain_idle: config.retain_idle,
            authz,
            inbound_http_errors: groups.legacy("inbound_http_errors_total"),
            inbound_tcp_errors: groups.legacy("inbound_tcp_errors_total"),
            outbound_http_errors: Arc::default(),
            outbound_tcp_errors: groups.legacy("outbound_tcp_errors_total"),
            endpoints: groups.legacy("request"),
            profile_routes: groups.legacy("route"),
            control_clients: groups.legacy("control"),
            conns,
            gone_zones,
            spans: SpanMetrics::default(),
            tracer: trace::Tracer::default(),
            inbound_routes: groups.kinds("inbound_http", "inbound_grpc"),
            outbound_routes: groups.kinds("outbound_http_route", "outbound_grpc_route"),
            outbound_backends: groups.kinds("outbound_http_route_backend", "outbound_grpc_route_backend"),
            balancers: BalancerKind::PREFIXES.iter().map(|prefix| groups.add(prefix, *prefix)).collect(),
            inbound_detect: groups.add("inbound_tcp_detect_http", "inbound_tcp_detect_http"),
            outbound_detect: groups.add("outbound_tcp_detect_http", "outbound_tcp_detect_http"),
            protocols: groups.add(
                "outbound_tcp_protocol_connections",
                ("outbound_tcp_protocol_connections", "Outbound connections by configured protocol"),
            ),
            transport_headers: groups.add(
                "inbound_tcp_transport_header_connections",
                ("inbound_tcp_transport_header_connections", "Connections that began with a transport header"),
            ),
            tcp_routes: groups.add("outbound_tcp_route", "outbound_tcp_route"),
            tls_routes: groups.add("outbound_tls_route", "outbound_tls_route"),
            singles,
            cut: AtomicBool::new(false),
            taps: Taps::default(),
            registry: Registry::default(),
            last_size: AtomicUsize::new(0),
        };
        watch_overflow(groups.overflow, limit, &inner.singles.health, &mut registry);
        Self(Arc::new(Inner { registry, ..inner }))
    }

    /// Connections of a label set.
    pub fn conn(&self, labels: ConnLabels) -> Arc<ConnMetrics> {
        let zone = match (labels.direction, labels.peer) {
            (Direction::Outbound, Peer::Dst) => Some(labels.dst.as_ref().map_or_else(Default::default, |d| d.zone)),
            (Direction::Outbound, Peer::Src) | (Direction::Inbound, _) => None,
        };
        self.0.conns.get(labels.labels(), || ConnMetrics::new(zone))
    }

    /// HTTP requests to an endpoint: `request_total`, `response_total`, `response_latency_ms`.
    pub fn endpoint(&self, labels: EndpointLabels) -> Arc<EndpointMetrics> {
        self.0.endpoints.get(labels.labels(), HttpMetrics::default)
    }

    /// Authorization, rate limits and errors of accepted inbound connections.
    pub fn inbound_server(&self, labels: ServerLabels) -> InboundServer {
        InboundServer::new(self.clone(), labels)
    }

    /// Those who watch requests pass.
    pub fn taps(&self) -> &Taps {
        &self.0.taps
    }

    /// Accepted inbound connections that failed before their policy was known.
    pub fn inbound_tcp_errors(&self, target: SocketAddr) -> Arc<ErrorMetrics<InboundError>> {
        self.0.inbound_tcp_errors.get(Labels::new().target(target), ErrorMetrics::default)
    }

    /// `inbound_{http,grpc}_*` of an inbound route.
    pub fn inbound_route(&self, kind: RouteKind, labels: InboundRouteLabels) -> Arc<InboundRouteMetrics> {
        self.0.inbound_routes.of(kind).get(labels.labels(), InboundRouteMetrics::new)
    }

    /// `outbound_{http,grpc}_route_*` of an outbound route, retries included.
    pub fn outbound_route(&self, kind: RouteKind, labels: RouteLabels) -> Arc<RouteMetrics> {
        self.0.outbound_routes.of(kind).get(labels.labels(), RouteMetrics::new)
    }

    /// `outbound_{http,grpc}_route_backend_*` of a route's backend.
    pub fn outbound_backend(&self, kind: RouteKind, labels: BackendLabels) -> Arc<BackendMetrics> {
        self.0.outbound_backends.of(kind).get(labels.labels(), BackendMetrics::new)
    }

    /// Outbound requests that ended in a proxy error, counted where the client is answered.
    pub fn outbound_http_errors(&self) -> &ErrorMetrics<OutboundError> {
        &self.0.outbound_http_errors
    }

    /// Outbound accepted connections that the proxy failed.
    pub fn outbound_tcp_errors(&self, target: SocketAddr) -> Arc<ErrorMetrics<OutboundError>> {
        self.0.outbound_tcp_errors.get(Labels::new().target(target), ErrorMetrics::default)
    }

    /// A ServiceProfile's route.
    pub fn profile_route(&self, labels: ProfileRouteLabels) -> Arc<ProfileRouteMetrics> {
        let outbound = labels.direction == Direction::Outbound;
        let make = || ProfileRouteMetrics { outbound, ..ProfileRouteMetrics::default() };
        self.0.profile_routes.get(labels.labels(), make)
    }

    /// The observer of a new balancer; one per balancer.
    pub fn balancer(&self, kind: &BalancerKind, failfast_timeout: Duration) -> Arc<BalancerMetrics> {
        let (family, labels) = kind.family();
        let shared = self.0.balancers[family].get(labels, BalancerSeries::new);
        Arc::new(BalancerMetrics::new(shared, failfast_timeout))
    }

    /// HTTP detection on an inbound port.
    pub fn inbound_detect(&self, srv: &Meta, srv_port: u16) -> Arc<DetectMetrics> {
        self.0.inbound_detect.get(Labels::new().srv(srv, srv_port), DetectMetrics::new)
    }

    /// HTTP detection of outbound connections.
    pub fn outbound_detect(&self, parent: &Meta) -> Arc<DetectMetrics> {
        self.0.outbound_detect.get(Labels::new().parent(parent), DetectMetrics::new)
    }

    /// Outbound connections by configured protocol: `http/1`, `http/2`, `detect`, `opaq` or `tls`.
    pub fn protocol_connections(&self, protocol: &'static str, parent: &Meta) -> Arc<Counter> {
        self.0.protocols.get(Labels::new().push("protocol", protocol).parent(parent), Counter::default)
    }

    /// Connections to the inbound port that began with a transport header. `session_protocol` is `http/1`, `http/2` or
    /// empty; `target_name` is empty unless the connection is for the gateway.
    pub fn transport_header(
        &self,
        session_protocol: &'static str,
        target_port: u16,
        target_name: &str,
        client_id: Option<&Id>,
    ) -> Arc<Counter> {
        let labels = Labels::new()
            .push("session_protocol", session_protocol)
            .port("target_port", Some(target_port))
            .push("target_name", target_name)
            .push("client_id", client_id.map_or("", Id::as_str));
        self.0.transport_headers.get(labels, Counter::default)
    }

    /// Connections on an opaque route. `ip` is empty when the logical address is a name.
    pub fn tcp_route(&self, parent: &Meta, route: &Meta, ip: &str, port: u16) -> Arc<ConnRouteMetrics> {
        let labels =
            Labels::new().parent(parent).route_out(route).push("target_ip", ip).port("target_port", Some(port));
        self.0.tcp_routes.get(labels, ConnRouteMetrics::default)
    }

    /// Connections on a TLS route.
    pub fn tls_route(&self, labels: &RouteLabels) -> Arc<ConnRouteMetrics> {
        self.0.tls_routes.get(labels.labels(), ConnRouteMetrics::default)
    }

    /// Requests that were sent once more, unseen by the application, because the peer provably had not processed them.
    pub fn replays(&self, direction: Direction) -> Arc<Counter> {
        match direction {
            Direction::Inbound => self.0.singles.replays[0].clone(),
            Direction::Outbound => self.0.singles.replays[1].clone(),
        }
    }

    /// Requests of a control-plane client, by its configured `name:port` and TLS.
    pub fn control_client(&self, addr: &str, tls: &Result<Id, NoTls>) -> Arc<HttpMetrics> {
        self.0.control_clients.get(Labels::new().push("addr", addr).server_tls(tls), HttpMetrics::default)
    }

    /// The workload certificate.
    pub fn identity(&self) -> Arc<IdentityMetrics> {
        self.0.singles.identity.clone()
    }

    /// Lookups of control-plane names.
    pub fn dns(&self) -> Arc<DnsMetrics> {
        self.0.singles.dns.clone()
    }

    /// Manifests of standalone mode.
    pub fn manifests(&self) -> Arc<ManifestMetrics> {
        self.0.singles.manifests.clone()
    }

    /// Makes spans of requests, once it is switched on.
    pub fn tracer(&self) -> &trace::Tracer {
        &self.0.tracer
    }

    /// Export of trace spans.
    pub fn spans(&self) -> &SpanMetrics {
        &self.0.spans
    }

    /// A request or connection ended other than it was meant to. Once, where it stops travelling.
    pub fn terminated(&self, direction: Direction, code: Code) {
        self.0.singles.terminations.count(direction, code);
    }

    /// Whoever waited for a request or response went away in this phase, and with it the request. It was counted once, here.
    pub fn canceled(&self, direction: Direction, phase: Phase) -> Code {
        let code = match phase {
            _ if self.is_cut() => Code::DrainCut,
            Phase::Response => Code::ResponseCanceled,
            _ => Code::RequestCanceled,
        };
        self.terminated(direction, code);
        code
    }

    /// Whether [`Telemetry::cut`] was called.
    pub fn is_cut(&self) -> bool {
        self.0.cut.load(Relaxed)
    }

    /// From now on it is the proxy that ends what goes away: the time for draining is over.
    pub fn cut(&self) {
        self.0.cut.store(true, Relaxed);
    }

    /// Tells what the TLS library was built with. Later calls change nothing.
    pub fn set_tls_info(&self, info: TlsInfo) {
        let _ = self.0.singles.tls_info.set(info);
    }

    /// Tells which runtime serves traffic. Later calls change nothing.
    pub fn set_runtime(&self, runtime: &tokio::runtime::Handle) {
        let _ = self.0.singles.runtime.set(runtime.metrics());
    }

    /// What an operator should look at.
    pub fn health(&self) -> &Arc<Health> {
        &self.0.singles.health
    }

    /// For [`access::AccessLog::start`]: lines that did not fit into its queue.
    pub fn access_log_drops(&self) -> Arc<Counter> {
        self.0.singles.access_log_drops.clone()
    }

    /// Everything as text, older dialect first, ending in `# EOF`. Afterwards drops series that nobody holds and that were
    /// last counted in longer ago than the retain-idle time.
    pub fn render(&self) -> String {
        let inner = &*self.0;
        let mut out = String::with_capacity(inner.last_size.load(Relaxed) + 4096);
        inner.legacy(&mut out);
        // Writing to a String cannot fail, and the collectors have no failures of their own.
        let _ = text::encode(&mut out, &inner.registry);
        inner.last_size.store(out.len(), Relaxed);
        inner.expire(Instant::now());
        out
    }
}

impl Inner {
    fn legacy(&self, out: &mut String) {
        self.authz.encode(out);
        let help = "Requests that the proxy failed.";
        errors::encode(out, self.inbound_http_errors.name, help, Place::First, &self.inbound_http_errors.snapshot());
        let help = "Accepted connections that the proxy failed.";
        errors::encode(out, self.inbound_tcp_errors.name, help, Place::First, &self.inbound_tcp_errors.snapshot());
        let all = [Series { text: "".into(), last_value: 0, metric: self.outbound_http_errors.clone() }];
        errors::encode(out, "outbound_http_errors_total", "Requests that the proxy failed.", Place::First, &all);
        errors::encode(out, self.outbound_tcp_errors.name, help, Place::Last, &self.outbound_tcp_errors.snapshot());
        http::encode(out, "", &self.endpoints.snapshot());
        http::encode_profiles(out, &self.profile_routes.snapshot());
        http::encode(out, "control_", &self.control_clients.snapshot());
        tcp::encode(out, &self.conns.snapshot());
        let spans = [
            ("opentelemetry_span_export_streams", "Streams opened to export spans.", &self.spans.streams),
            ("opentelemetry_span_export_requests", "Messages sent to export spans.", &self.spans.requests),
            ("opentelemetry_span_exports", "Spans exported.", &self.spans.spans),
            ("opentelemetry_span_drops", "Spans that were lost instead.", &self.spans.dropped),
        ];
        for (name, help, counter) in spans {
            let none = legacy::Sample { before: &[], base: "", after: &[] };
            Family::counter(out, name, help).value(none, counter.get());
        }
    }

    fn expire(&self, now: Instant) {
        self.endpoints.expire(now, self.retain_idle, |_| ());
        self.profile_routes.expire(now, self.retain_idle, |_| ());
        self.control_clients.expire(now, self.retain_idle, |_| ());
        let mut gone = self.gone_zones.lock();
        self.conns.expire(now, self.retain_idle, |conn| gone.add(conn));
    }
}

impl fmt::Debug for Telemetry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Telemetry").finish_non_exhaustive()
    }
}

/// Stores of the newer dialect on their way into the registry.
struct Groups<'a> {
    registry: &'a mut Registry,
    limit: usize,
    overflow: Vec<(&'static str, Arc<Counter>)>,
}

impl Groups<'_> {
    /// A store of the older dialect, which [`Inner::legacy`] prints.
    fn legacy<M: Metric>(&mut self, name: &'static str) -> Store<M> {
        let store = Store::new(name, self.limit);
        self.overflow.push(store.overflow());
        store
    }

    fn add<M: Group>(&mut self, name: &'static str, names: M::Names) -> Arc<Store<M>> {
        let store = Arc::new(Store::new(name, self.limit));
        self.registry.register_collector(Box::new(GroupCollector { store: store.clone(), names }));
        self.overflow.push(store.overflow());
        store
    }

    fn kinds<M: Group<Names = RouteKind>>(&mut self, http: &'static str, grpc: &'static str) -> Kinds<M> {
        Kinds { http: self.add(http, RouteKind::Http), grpc: self.add(grpc, RouteKind::Grpc) }
    }
}

fn collect<F>(registry: &mut Registry, encode: F)
where
    F: Fn(&mut Encoder<'_, '_>) -> fmt::Result + Send + Sync + 'static,
{
    registry.register_collector(Box::new(FnCollector(encode)));
}

/// Families that turn label sets away are a matter of health, and have a counter each.
fn watch_overflow(overflow: Vec<(&'static str, Arc<Counter>)>, limit: usize, health: &Health, registry: &mut Registry) {
    let of = overflow.clone();
    health.add(Condition::BoundExhausted, move || {
        let full: Vec<_> = of.iter().filter(|(_, n)| n.get() > 0).map(|(family, _)| *family).collect();
        (!full.is_empty()).then(|| format!("metric families at their bound of {limit}: {}", full.join(", ")))
    });
    collect(registry, move |out| {
        out.counter(
            "telemetry_series_overflow",
            None,
            "Label sets that a full family turned away to series=\"other\"",
            overflow.iter().map(|(family, n)| (Sample::of("family", family), n.get())),
        )
    });
}

/// `proxy_build_info`. The build hands date and revision over in its environment; a plain `cargo build` has none.
fn build_info(out: &mut Encoder<'_, '_>) -> fmt::Result {
    let labels = Labels::new()
        .push("date", option_env!("LINKERD_PROXY_BUILD_DATE").unwrap_or(""))
        .push("git_sha", option_env!("LINKERD_PROXY_GIT_SHA").unwrap_or(""))
        .push("profile", if cfg!(debug_assertions) { "debug" } else { "release" })
        .push("vendor", option_env!("LINKERD_PROXY_VENDOR").unwrap_or(""))
        .push("version", option_env!("LINKERD_PROXY_VERSION").unwrap_or(env!("CARGO_PKG_VERSION")));
    out.gauge("proxy_build_info", None, "What this proxy was built from", [(Sample::written(&labels), 1)])
}

impl TlsInfo {
    fn encode(&self, out: &mut Encoder<'_, '_>) -> fmt::Result {
        let list = |names: &[String]| names.iter().fold(String::new(), |list, name| list + name + ",");
        let labels = Labels::new()
            .push("tls_suites", &list(&self.suites))
            .push("tls_kx_groups", &list(&self.kx_groups))
            .push("tls_rand", &self.rand)
            .push("tls_key_provider", &self.key_provider)
            .push("tls_fips", if self.fips { "true" } else { "false" });
        out.gauge("rustls_info", None, "What the TLS library offers", [(Sample::written(&labels), 1)])
    }
}

/// `outbound_tcp_transfer_cost_bytes_total`, summed from the bytes of connections to peers: those of label sets that are
/// gone, and of those that are there.
fn transfer_cost(out: &mut Encoder<'_, '_>, conns: &Store<ConnMetrics>, gone: &Mutex<Zones>) -> fmt::Result {
    let zones = {
        // Held, so that no label set goes between the two sums.
        let gone = gone.lock();
        let mut zones = *gone;
        for s in conns.snapshot() {
            zones.add(&s.metric);
        }
        zones
    };
    let texts: Vec<_> = zones
        .iter()
        .flat_map(|(zone, bytes)| {
            [("Send", bytes.sent), ("Recv", bytes.received)]
                .map(|(op, n)| (Labels::new().push("op", op).push("zone_locality", zone), n))
        })
        .collect();
    out.counter(
        "outbound_tcp_transfer_cost",
        Some(prometheus_client::registry::Unit::Bytes),
        "Bytes to and from peers by their zone",
        texts.iter().map(|(labels, n)| (Sample::written(labels), *n)),
    )
}

#[cfg(test)]
mod tests;
