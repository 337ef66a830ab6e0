//! What the proxy knows of its own surroundings: balancers (metrics.md 5.9), protocol detection (5.6), the workload certificate
//! (5.12), DNS (5.13), and the manifests of standalone mode.

use super::{
    labels::Labels,
    metric::{Counter, DETECT, Gauge, Histogram, QUEUE, Seconds},
    prom::{Encoder, Group, Sample},
    store::{Metric, Series},
};
use crate::policy::Meta;
use linkerd_stack::balance;
use prometheus_client::registry::Unit;
use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicI64, Ordering::Relaxed},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

/// Whose balancer, with the labels of its families.
#[derive(Clone, Debug)]
pub enum BalancerKind {
    /// HTTP and gRPC.
    OutboundHttp {
        /// The resource the client policy was found for.
        parent: Meta,
        /// The backend.
        backend: Meta,
    },
    /// Opaque connections.
    OutboundTcp {
        /// The resource the client policy was found for.
        parent: Meta,
        /// The backend.
        backend: Meta,
        /// Logical address.
        logical: Arc<str>,
        /// Name used for endpoint discovery.
        concrete: Arc<str>,
    },
    /// TLS connections.
    OutboundTls {
        /// Name used for endpoint discovery.
        concrete: Arc<str>,
    },
    /// The destination service.
    ControlDestination {
        /// Configured `name:port`.
        addr: Arc<str>,
    },
    /// The policy service.
    ControlPolicy {
        /// Configured `name:port`.
        addr: Arc<str>,
    },
    /// The identity service.
    ControlIdentity {
        /// Configured `name:port`.
        addr: Arc<str>,
    },
    /// Whoever takes spans.
    TraceCollector {
        /// Configured `name:port`.
        addr: Arc<str>,
    },
}

impl BalancerKind {
    pub(super) const PREFIXES: [&'static str; 7] = [
        "outbound_http_balancer",
        "outbound_tcp_balancer",
        "outbound_tls_balancer",
        "control_destination_balancer",
        "control_policy_balancer",
        "control_identity_balancer",
        "opentelemetry_balancer",
    ];

    /// Position in [`Self::PREFIXES`], and the labels.
    pub(super) fn family(&self) -> (usize, Labels) {
        let labels = Labels::new();
        match self {
            Self::OutboundHttp { parent, backend } => (0, labels.parent(parent).backend(backend)),
            Self::OutboundTcp { parent, backend, logical, concrete } => {
                (1, labels.parent(parent).backend(backend).push("logical", logical).push("concrete", concrete))
            }
            Self::OutboundTls { concrete } => (2, labels.push("concrete", concrete)),
            Self::ControlDestination { addr } => (3, labels.push("addr", addr)),
            Self::ControlPolicy { addr } => (4, labels.push("addr", addr)),
            Self::ControlIdentity { addr } => (5, labels.push("addr", addr)),
            Self::TraceCollector { addr } => (6, labels.push("addr", addr)),
        }
    }
}

/// Numbers of the balancers of one label set.
#[derive(Debug)]
pub(super) struct BalancerSeries {
    ready: Gauge,
    pending: Gauge,
    updates: [Counter; 3],
    queued: Gauge,
    requests: Counter,
    latency: Histogram,
    opened: Counter,
    shut: Counter,
    open_time: Seconds,
    shut_time: Seconds,
    timeout: Seconds,
}

/// Values of the label `op`, in order of [`BalancerSeries::updates`].
const OPS: [&str; 3] = ["Reset", "Add", "Remove"];

impl BalancerSeries {
    pub(super) fn new() -> Self {
        Self {
            ready: Gauge::default(),
            pending: Gauge::default(),
            updates: Default::default(),
            queued: Gauge::default(),
            requests: Counter::default(),
            latency: Histogram::new(&QUEUE),
            opened: Counter::default(),
            shut: Counter::default(),
            open_time: Seconds::default(),
            shut_time: Seconds::default(),
            timeout: Seconds::default(),
        }
    }
}

/// One balancer's observer. Balancers with the same labels share a series; each takes its own part of the gauges back when
/// it goes, so that a balancer rebuilt before the old one is gone still adds up.
#[derive(Debug)]
pub struct BalancerMetrics {
    shared: Arc<BalancerSeries>,
    ready: AtomicI64,
    pending: AtomicI64,
    queued: AtomicI64,
}

impl BalancerMetrics {
    pub(super) fn new(shared: Arc<BalancerSeries>, failfast_timeout: Duration) -> Self {
        shared.timeout.set(failfast_timeout.as_secs_f64());
        Self { shared, ready: AtomicI64::new(0), pending: AtomicI64::new(0), queued: AtomicI64::new(0) }
    }
}

impl balance::Observer for BalancerMetrics {
    fn enqueued(&self) {
        self.shared.requests.inc();
        self.shared.queued.add(1);
        self.queued.fetch_add(1, Relaxed);
    }

    fn dequeued(&self, waited: Duration) {
        self.shared.latency.observe_nanos(waited);
        self.shared.queued.add(-1);
        self.queued.fetch_sub(1, Relaxed);
    }

    fn gate_opened(&self) {
        self.shared.opened.inc();
        self.shared.open_time.set(unix(SystemTime::now()));
        self.shared.shut_time.set(0.0);
    }

    fn gate_shut(&self) {
        self.shared.shut.inc();
        self.shared.shut_time.set(unix(SystemTime::now()));
        self.shared.open_time.set(0.0);
    }

    fn endpoints(&self, ready: usize, pending: usize) {
        let set = |own: &AtomicI64, shared: &Gauge, value: usize| {
            let value = i64::try_from(value).unwrap_or(i64::MAX);
            shared.add(value - own.swap(value, Relaxed));
        };
        set(&self.ready, &self.shared.ready, ready);
        set(&self.pending, &self.shared.pending, pending);
    }

    fn updated(&self, update: balance::Update) {
        let i = match update {
            balance::Update::Reset => 0,
            balance::Update::Add => 1,
            balance::Update::Remove => 2,
        };
        self.shared.updates[i].inc();
    }
}

impl Drop for BalancerMetrics {
    fn drop(&mut self) {
        self.shared.ready.add(-self.ready.load(Relaxed));
        self.shared.pending.add(-self.pending.load(Relaxed));
        self.shared.queued.add(-self.queued.load(Relaxed));
    }
}

impl Metric for BalancerSeries {
    fn version(&self) -> u64 {
        self.requests.get()
    }
}

impl Group for BalancerSeries {
    /// The families' common prefix.
    type Names = &'static str;

    fn encode(out: &mut Encoder<'_, '_>, b: &&'static str, series: &[Series<Self>]) -> fmt::Result {
        let each = || series.iter();
        out.gauge(
            &format!("{b}_p2c_endpoints"),
            None,
            "Endpoints known to the balancer",
            each().map(|s| (Sample::new(s), s.metric.ready.get() + s.metric.pending.get())),
        )?;
        out.counter(
            &format!("{b}_p2c_updates"),
            None,
            "Discovery updates that changed the set",
            each().flat_map(|s| {
                let ops = OPS.iter().zip(&s.metric.updates);
                ops.map(move |(op, count)| (Sample::new(s).before("op", op), count.get()))
            }),
        )?;
        out.gauge(
            &format!("{b}_endpoints"),
            None,
            "Endpoints by readiness",
            each().flat_map(|s| {
                [("ready", &s.metric.ready), ("pending", &s.metric.pending)]
                    .map(|(state, gauge)| (Sample::new(s).before("endpoint_state", state), gauge.get()))
            }),
        )?;
        out.gauge(
            &format!("{b}_queue_length"),
            None,
            "Requests waiting",
            each().map(|s| (Sample::new(s), s.metric.queued.get())),
        )?;
        out.counter(
            &format!("{b}_queue_requests"),
            None,
            "Requests enqueued",
            each().map(|s| (Sample::new(s), s.metric.requests.get())),
        )?;
        out.histogram(
            &format!("{b}_queue_latency"),
            Unit::Seconds,
            "Time that requests waited",
            each().map(|s| (Sample::new(s), &s.metric.latency)),
        )?;
        out.counter(
            &format!("{b}_queue_gate_open"),
            None,
            "Openings of the gate",
            each().map(|s| (Sample::new(s), s.metric.opened.get())),
        )?;
        out.counter(
            &format!("{b}_queue_gate_shut"),
            None,
            "Entries into failfast",
            each().map(|s| (Sample::new(s), s.metric.shut.get())),
        )?;
        let times: [(&str, &str, fn(&Self) -> f64); 3] = [
            ("open_time", "Unix time of the gate's last opening, 0 while shut", |m| m.open_time.get()),
            ("shut_time", "Unix time of the gate's last shutting, 0 while open", |m| m.shut_time.get()),
            ("timeout", "Failfast timeout", |m| m.timeout.get()),
        ];
        for (name, help, value) in times {
            out.gauge_f64(
                &format!("{b}_queue_gate_{name}"),
                Some(Unit::Seconds),
                help,
                each().map(|s| (Sample::new(s), value(&s.metric))),
            )?;
        }
        Ok(())
    }
}

/// What detection found.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Detected {
    /// Bytes that are no HTTP.
    NotHttp,
    /// An HTTP/1 request line.
    Http1,
    /// The HTTP/2 preface.
    Http2,
    /// Too few bytes in time.
    ReadTimeout,
    /// Reading failed.
    Error,
}

/// HTTP detection of one label set.
#[derive(Debug)]
pub struct DetectMetrics {
    results: [Counter; 5],
    duration: Histogram,
}

const DETECTED: [&str; 5] = ["not_http", "http/1", "http/2", "read_timeout", "error"];

impl DetectMetrics {
    pub(super) fn new() -> Self {
        Self { results: Default::default(), duration: Histogram::new(&DETECT) }
    }

    /// Detection of a connection ended after so long.
    pub fn detected(&self, result: Detected, after: Duration) {
        self.results[result as usize].inc();
        self.duration.observe_nanos(after);
    }
}

impl Metric for DetectMetrics {
    fn version(&self) -> u64 {
        self.duration.count()
    }
}

impl Group for DetectMetrics {
    /// The families' common prefix.
    type Names = &'static str;

    fn encode(out: &mut Encoder<'_, '_>, prefix: &&'static str, series: &[Series<Self>]) -> fmt::Result {
        out.counter(
            &format!("{prefix}_results"),
            None,
            "Outcomes of HTTP detection",
            series.iter().flat_map(|s| {
                let results = DETECTED.iter().zip(&s.metric.results);
                results.map(move |(result, count)| (Sample::new(s).before("result", result), count.get()))
            }),
        )?;
        out.histogram(
            &format!("{prefix}_duration"),
            Unit::Seconds,
            "Time that HTTP detection took",
            series.iter().map(|s| (Sample::new(s), &s.metric.duration)),
        )
    }
}

/// A plain counter per label set.
impl Group for Counter {
    /// Name without `_total`, and help.
    type Names = (&'static str, &'static str);

    fn encode(out: &mut Encoder<'_, '_>, (name, help): &Self::Names, series: &[Series<Self>]) -> fmt::Result {
        out.counter(name, None, help, series.iter().map(|s| (Sample::new(s), s.metric.get())))
    }
}

/// The workload certificate.
#[derive(Debug, Default)]
pub struct IdentityMetrics {
    expiry: Seconds,
    refreshed: Seconds,
    ok: Counter,
    errors: Counter,
}

impl IdentityMetrics {
    /// A certificate was installed.
    pub fn refreshed(&self, expiry: SystemTime) {
        self.expiry.set(unix(expiry));
        self.refreshed.set(unix(SystemTime::now()));
        self.ok.inc();
    }

    /// An attempt to get one failed.
    pub fn failed(&self) {
        self.errors.inc();
    }

    pub(super) fn encode(&self, out: &mut Encoder<'_, '_>) -> fmt::Result {
        out.gauge_f64(
            "control_identity_cert_expiration_timestamp",
            Some(Unit::Seconds),
            "Unix time at which the workload certificate expires",
            [(Sample::NONE, self.expiry.get())],
        )?;
        out.gauge_f64(
            "control_identity_cert_refresh_timestamp",
            Some(Unit::Seconds),
            "Unix time of the workload certificate's last update",
            [(Sample::NONE, self.refreshed.get())],
        )?;
        out.counter(
            "control_identity_cert_refreshes",
            None,
            "Updates of the workload certificate",
            [("ok", &self.ok), ("error", &self.errors)].map(|(result, n)| (Sample::of("result", result), n.get())),
        )
    }
}

/// Whose names are looked up.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum DnsClient {
    /// The identity service's.
    Identity,
    /// The destination service's.
    Destination,
    /// The policy service's.
    Policy,
    /// The trace collector's.
    TraceCollector,
}

/// What is looked up.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum DnsRecord {
    /// SRV, tried first.
    Srv,
    /// A and AAAA, after SRV failed.
    Address,
}

/// Lookups by client, record type and result.
#[derive(Debug, Default)]
pub struct DnsMetrics([[[Counter; 2]; 2]; 4]);

const DNS_CLIENTS: [&str; 4] = ["identity", "destination", "policy", "trace_collector"];
const DNS_RECORDS: [&str; 2] = ["SRV", "A/AAAA"];
const DNS_RESULTS: [&str; 2] = ["ok", "not_found"];

impl DnsMetrics {
    /// A lookup ended. Any failure counts as `not_found`.
    pub fn resolved(&self, client: DnsClient, record: DnsRecord, ok: bool) {
        self.0[client as usize][record as usize][usize::from(!ok)].inc();
    }

    pub(super) fn encode(&self, out: &mut Encoder<'_, '_>) -> fmt::Result {
        let texts: Vec<_> = DNS_CLIENTS
            .iter()
            .zip(&self.0)
            .flat_map(|(client, records)| {
                DNS_RECORDS.iter().zip(records).flat_map(move |(record, results)| {
                    DNS_RESULTS.iter().zip(results).map(move |(result, count)| {
                        let labels =
                            Labels::new().push("client", client).push("record_type", record).push("result", result);
                        (labels, count.get())
                    })
                })
            })
            .collect();
        out.counter(
            "control_dns_resolutions",
            None,
            "Lookups of control-plane names",
            texts.iter().map(|(labels, count)| (Sample::written(labels), *count)),
        )
    }
}

/// The manifests of standalone mode. Printed once a load was tried.
#[derive(Debug, Default)]
pub struct ManifestMetrics {
    loaded: Counter,
    failed: Counter,
    last_load: Seconds,
    last_ok: Gauge,
    generation: Gauge,
    errors: Gauge,
    warnings: Gauge,
    objects: Gauge,
}

impl ManifestMetrics {
    /// A load was put in force as this generation, with so many objects and warnings.
    pub fn loaded(&self, generation: u64, objects: u64, warnings: u64) {
        let int = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
        self.loaded.inc();
        self.last_load.set(unix(SystemTime::now()));
        self.last_ok.set(1);
        self.generation.set(int(generation));
        self.objects.set(int(objects));
        self.warnings.set(int(warnings));
        self.errors.set(0);
    }

    /// A load was refused with so many errors; the generation before it stays in force.
    pub fn refused(&self, errors: u64) {
        self.failed.inc();
        self.last_ok.set(0);
        self.errors.set(i64::try_from(errors).unwrap_or(i64::MAX));
    }

    pub(super) fn encode(&self, out: &mut Encoder<'_, '_>) -> fmt::Result {
        if self.loaded.get() + self.failed.get() == 0 {
            return Ok(());
        }
        out.counter(
            "manifests_loads",
            None,
            "Loads of the manifest folders",
            [("ok", &self.loaded), ("error", &self.failed)].map(|(result, n)| (Sample::of("result", result), n.get())),
        )?;
        out.gauge_f64(
            "manifests_last_load_timestamp",
            Some(Unit::Seconds),
            "Unix time of the load in force",
            [(Sample::NONE, self.last_load.get())],
        )?;
        let gauges = [
            ("manifests_last_load_success", "Whether the last load was put in force", &self.last_ok),
            ("manifests_generation", "Number of the load in force", &self.generation),
            ("manifests_errors", "Errors of the last load", &self.errors),
            ("manifests_warnings", "Warnings of the load in force", &self.warnings),
            ("manifests_objects", "Objects of the load in force", &self.objects),
        ];
        for (name, help, gauge) in gauges {
            out.gauge(name, None, help, [(Sample::NONE, gauge.get())])?;
        }
        Ok(())
    }
}

/// Unix time in seconds; 0 before 1970.
pub(super) fn unix(time: SystemTime) -> f64 {
    time.duration_since(UNIX_EPOCH).map_or(0.0, |d| d.as_secs_f64())
}
