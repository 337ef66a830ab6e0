//! The environment, read: one row per setting, all bad entries reported at once.
//!
//! [`SETTINGS`] and [`LENIENT`] are the lists of variables. Each is read through `Reader`, which looks its row up there, so a
//! variable without a row cannot be read, and docs/configuration.md is printed from the same rows ([`reference()`]).

use super::{syntax as s, *};
use crate::policy::endpoint::{Http2Params, Http2Windows};
use std::{collections::HashMap, ffi::OsString, fmt, sync::LazyLock, time::Duration};

/// One setting.
#[derive(Debug)]
pub struct Setting {
    /// Variable.
    pub name: &'static str,
    /// Syntax (a row of contract.md 1.0).
    pub syntax: &'static str,
    /// Value when unset.
    pub default: &'static str,
    /// Meaning.
    pub doc: &'static str,
}

/// Which control plane the proxy will listen to.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Linkerd's, over gRPC: its addresses, the workload and the identity are required.
    Linkerd,
    /// A folder of manifests: all of them are given on the command line instead.
    Standalone {
        /// Serve connections that nothing redirected, too.
        explicit: bool,
    },
}

/// One bad entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Variable.
    pub name: String,
    /// Its value, if it has one.
    pub value: Option<String>,
    /// What is wrong, and what was expected.
    pub why: String,
}

/// The kind of configuration failure; the text after `Invalid configuration: ` on stderr (contract.md 3.2).
#[derive(Copy, Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Class {
    /// Some value is bad or missing.
    InvalidVariable,
    /// `LINKERD2_PROXY_DESTINATION_SVC_ADDR` is unset.
    NoDestination,
    /// `LINKERD2_PROXY_POLICY_SVC_ADDR` is unset.
    NoPolicy,
    /// Without SPIRE the identity must be a DNS name equal to the server name.
    IdAndNameDiffer,
}

/// Every bad entry of one environment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Invalid {
    /// The first class that applies.
    pub class: Class,
    /// All of them; never empty.
    pub faults: Vec<Fault>,
}

/// What was read, with what deserves a word.
#[derive(Debug)]
pub struct Parsed {
    /// The configuration.
    pub config: Config,
    /// Settings that have no effect, names that nobody reads.
    pub warnings: Vec<String>,
}

macro_rules! settings {
    ($($name:literal, $syntax:literal, $default:literal, $doc:literal;)*) => {
        &[$(Setting { name: $name, syntax: $syntax, default: $default, doc: $doc }),*]
    };
}

/// Every variable whose bad values stop the proxy, in the order of contract.md.
pub const SETTINGS: &[Setting] = settings! {
    "LINKERD2_PROXY_INBOUND_LISTEN_ADDR", "ip:port", "0.0.0.0:4143", "Inbound listener; its port is also the port for direct connections from other proxies.";
    "LINKERD2_PROXY_OUTBOUND_LISTEN_ADDRS", "one or two ip:port", "unset", "Outbound listeners; wins over the next variable.";
    "LINKERD2_PROXY_OUTBOUND_LISTEN_ADDR", "ip:port", "127.0.0.1:4140", "Outbound listener, the older form.";
    "LINKERD2_PROXY_ADMIN_LISTEN_ADDR", "ip:port", "127.0.0.1:4191", "Admin server.";
    "LINKERD2_PROXY_CONTROL_LISTEN_ADDR", "ip:port", "0.0.0.0:4190", "Tap server; bound only when tap is on.";
    "LINKERD2_PROXY_INBOUND_IPS", "IP list", "unset", "Own addresses. Inbound connections to other addresses are closed; outbound endpoints among them are local.";
    "LINKERD2_PROXY_INBOUND_PORTS", "port set", "empty", "Ports whose policies are watched from the start.";
    "LINKERD2_PROXY_INBOUND_DEFAULT_POLICY", "policy name", "all-unauthenticated", "Policy of a port until the control plane tells. The cluster policies and audit need cluster networks.";
    "LINKERD2_PROXY_INBOUND_PORTS_DISABLE_PROTOCOL_DETECTION", "port set", "empty", "Ports whose default policy is opaque.";
    "LINKERD2_PROXY_INBOUND_HTTP_QUEUE_CAPACITY", "integer", "10000", "Requests that wait for the local application.";
    "LINKERD2_PROXY_INBOUND_HTTP_FAILFAST_TIMEOUT", "duration", "1s", "Wait in that queue before fail-fast.";
    "LINKERD2_PROXY_INBOUND_MAX_IN_FLIGHT", "integer", "100000", "Inbound requests awaiting response headers.";
    "LINKERD2_PROXY_INBOUND_DISCOVERY_IDLE_TIMEOUT", "duration", "90s", "Idle inbound policies and stacks are dropped after this.";
    "LINKERD2_PROXY_DESTINATION_PROFILE_INITIAL_TIMEOUT", "duration", "500ms", "Longest wait for a service profile on the inbound side.";
    "LINKERD2_PROXY_OUTBOUND_TCP_QUEUE_CAPACITY", "integer", "10000", "Connections that wait for an endpoint.";
    "LINKERD2_PROXY_OUTBOUND_TCP_FAILFAST_TIMEOUT", "duration", "3s", "Wait in that queue before fail-fast.";
    "LINKERD2_PROXY_OUTBOUND_HTTP_QUEUE_CAPACITY", "integer", "10000", "Requests that wait for a backend.";
    "LINKERD2_PROXY_OUTBOUND_HTTP_FAILFAST_TIMEOUT", "duration", "3s", "Wait in that queue before fail-fast.";
    "LINKERD2_PROXY_OUTBOUND_MAX_IN_FLIGHT", "integer", "100000", "Outbound requests awaiting response headers.";
    "LINKERD2_PROXY_OUTBOUND_DISCOVERY_IDLE_TIMEOUT", "duration", "5s", "Idle outbound discovery results, clients and connections are dropped after this.";
    "LINKERD2_PROXY_OUTBOUND_DISABLE_INFORMATIONAL_HEADERS", "bool", "value of ingress mode", "true: no l5d-proxy-error and l5d-proxy-connection on outbound answers of the proxy's own.";
    "LINKERD2_PROXY_DESTINATION_PROFILE_SUFFIXES", "suffix list", "svc.cluster.local.", "Names for which service profiles may be looked up.";
    "LINKERD2_PROXY_DESTINATION_PROFILE_NETWORKS", "network list", "empty", "Addresses for which service profiles may be looked up.";
    "LINKERD2_PROXY_INGRESS_MODE", "bool", "false", "Route outbound HTTP by l5d-dst-override.";
    "LINKERD2_PROXY_INBOUND_GATEWAY_SUFFIXES", "suffix list", "empty", "Names that may be reached through this proxy as a gateway.";
    "LINKERD2_PROXY_DESTINATION_SVC_ADDR", "addr", "required", "Destination service.";
    "LINKERD2_PROXY_DESTINATION_SVC_NAME", "DNS name", "required unless loopback", "Its identity.";
    "LINKERD2_PROXY_POLICY_SVC_ADDR", "addr", "required", "Policy service.";
    "LINKERD2_PROXY_POLICY_SVC_NAME", "DNS name", "required unless loopback", "Its identity.";
    "LINKERD2_PROXY_IDENTITY_SVC_ADDR", "addr", "required without SPIRE", "Identity service.";
    "LINKERD2_PROXY_IDENTITY_SVC_NAME", "DNS name", "required unless loopback", "Its identity.";
    "LINKERD2_PROXY_DESTINATION_CONTEXT", "string", "empty", "Context token of destination calls, sent as it is.";
    "LINKERD2_PROXY_POLICY_WORKLOAD", "string", "required", "Workload of policy calls, sent as it is.";
    "LINKERD2_PROXY_POLICY_CLUSTER_NETWORKS", "network list", "empty", "Networks meant by the cluster policies.";
    "LINKERD2_PROXY_CONTROL_STREAM_INITIAL_TIMEOUT", "duration or empty", "no limit", "Limit on the first message of a discovery or policy stream.";
    "LINKERD2_PROXY_CONTROL_STREAM_IDLE_TIMEOUT", "duration or empty", "no limit", "Longest gap between messages of a stream.";
    "LINKERD2_PROXY_CONTROL_STREAM_LIFETIME", "duration or empty", "no limit", "Longest life of a stream.";
    "LINKERD2_PROXY_IDENTITY_TRUST_ANCHORS", "PEM text", "required", "Trust anchors.";
    "LINKERD2_PROXY_IDENTITY_LOCAL_NAME", "DNS name", "unset", "Own identity and server name at once.";
    "LINKERD2_PROXY_IDENTITY_SERVER_ID", "identity", "required without a local name", "Own identity.";
    "LINKERD2_PROXY_IDENTITY_SERVER_NAME", "DNS name", "required without a local name", "Name that peers ask for in SNI.";
    "LINKERD2_PROXY_IDENTITY_DIR", "path", "required without SPIRE", "Directory that may hold key.p8 and csr.der; otherwise key and request are made in memory.";
    "LINKERD2_PROXY_IDENTITY_TOKEN_FILE", "path", "required without SPIRE", "Service-account token, read anew for each certification.";
    "LINKERD2_PROXY_IDENTITY_MIN_REFRESH", "duration", "10s", "Shortest time between certifications.";
    "LINKERD2_PROXY_IDENTITY_MAX_REFRESH", "duration", "1d", "Longest time between certifications.";
    "LINKERD2_PROXY_IDENTITY_SPIRE_WORKLOAD_API_ADDRESS", "unix socket path", "unset", "SPIRE agent; its presence selects SPIRE. A leading unix: is dropped.";
    "LINKERD2_PROXY_IDENTITY_SPIRE_SOCKET", "unix socket path", "unset", "Deprecated name of the previous.";
    "LINKERD2_PROXY_LINKERD2_PROXY_IDENTITY_SPIRE_EXP_BACKOFF_MIN", "duration", "100ms", "First wait between attempts at the SPIRE agent.";
    "LINKERD2_PROXY_LINKERD2_PROXY_IDENTITY_SPIRE_EXP_BACKOFF_MAX", "duration", "1s", "Longest wait.";
    "LINKERD2_PROXY_LINKERD2_PROXY_IDENTITY_SPIRE_EXP_BACKOFF_JITTER", "float 0-100", "0.1", "Share of the wait that is added at random.";
    "LINKERD2_PROXY_IDENTITY_DISABLED", "any", "unset", "Identity cannot be disabled: a value is an error.";
    "LINKERD2_PROXY_METRICS_RETAIN_IDLE", "duration", "10m", "Idle series are dropped after this.";
    "LINKERD2_PROXY_METRICS_MAX_SERIES", "integer above 0", "10000", "Label sets that one group of metric families may have; more go to one series labelled series=\"other\".";
    "LINKERD2_PROXY_OUTBOUND_METRICS_HOSTNAME_LABELS", "bool", "false", "hostname labels on outbound route metrics.";
    "LINKERD2_PROXY_INBOUND_METRICS_AUTHORITY_LABELS", "empty or unsafe", "empty", "unsafe: authority labels on inbound metrics.";
    "LINKERD2_PROXY_TRACE_COLLECTOR_SVC_ADDR", "addr", "unset", "Trace collector, OTLP over gRPC; unset = trace headers pass untouched and no spans are made.";
    "LINKERD2_PROXY_TRACE_COLLECTOR_SVC_NAME", "DNS name", "required unless loopback", "Its identity.";
    "LINKERD2_PROXY_TAP_SVC_NAME", "identity", "unset", "The only client that may tap; unset = tap off.";
    "LINKERD2_PROXY_SHUTDOWN_GRACE_PERIOD", "duration", "2m", "Longest drain.";
    "LINKERD2_PROXY_SHUTDOWN_ENDPOINT_ENABLED", "bool", "false", "Enables POST /shutdown.";
    "LINKERD2_PROXY_CORE_DUMPS", "bool", "false", "true: the kernel may write core files, and debuggers of the same user may attach. Both see private keys.";
    "LINKERD2_PROXY_INBOUND_CONNECT_TIMEOUT", "duration", "300ms", "Connecting to the local application.";
    "LINKERD2_PROXY_OUTBOUND_CONNECT_TIMEOUT", "duration", "1s", "Connecting to peers and to the control plane, TLS included.";
    "LINKERD2_PROXY_INBOUND_CONNECT_EXP_BACKOFF_MIN", "duration", "100ms", "First wait before connecting again; goes with MAX.";
    "LINKERD2_PROXY_INBOUND_CONNECT_EXP_BACKOFF_MAX", "duration", "10s", "Longest wait; goes with MIN.";
    "LINKERD2_PROXY_INBOUND_CONNECT_EXP_BACKOFF_JITTER", "float 0-100", "0.1", "Share of the wait that is added at random; 0 when only MIN and MAX are set.";
    "LINKERD2_PROXY_OUTBOUND_CONNECT_EXP_BACKOFF_MIN", "duration", "100ms", "As inbound.";
    "LINKERD2_PROXY_OUTBOUND_CONNECT_EXP_BACKOFF_MAX", "duration", "60s", "As inbound.";
    "LINKERD2_PROXY_OUTBOUND_CONNECT_EXP_BACKOFF_JITTER", "float 0-100", "0.1", "As inbound.";
    "LINKERD2_PROXY_INBOUND_ACCEPT_KEEPALIVE", "duration", "kernel's", "Keepalive idle time of accepted inbound connections.";
    "LINKERD2_PROXY_OUTBOUND_ACCEPT_KEEPALIVE", "duration", "kernel's", "Keepalive idle time of accepted outbound connections.";
    "LINKERD2_PROXY_INBOUND_CONNECT_KEEPALIVE", "duration", "kernel's", "Keepalive idle time of connections to the application.";
    "LINKERD2_PROXY_OUTBOUND_CONNECT_KEEPALIVE", "duration", "kernel's", "Keepalive idle time of connections to peers.";
    "LINKERD2_PROXY_INBOUND_ACCEPT_USER_TIMEOUT", "duration", "kernel's", "TCP_USER_TIMEOUT of accepted inbound connections.";
    "LINKERD2_PROXY_OUTBOUND_ACCEPT_USER_TIMEOUT", "duration", "kernel's", "TCP_USER_TIMEOUT of accepted outbound connections.";
    "LINKERD2_PROXY_INBOUND_CONNECT_USER_TIMEOUT", "duration", "kernel's", "TCP_USER_TIMEOUT of connections to the application.";
    "LINKERD2_PROXY_OUTBOUND_CONNECT_USER_TIMEOUT", "duration", "kernel's", "TCP_USER_TIMEOUT of connections to peers.";
    "LINKERD2_PROXY_INBOUND_TCP_LISTEN_BACKLOG", "integer", "128", "Listen backlog, inbound, admin and tap.";
    "LINKERD2_PROXY_OUTBOUND_TCP_LISTEN_BACKLOG", "integer", "128", "Listen backlog, outbound.";
    "LINKERD2_PROXY_MAX_IDLE_CONNS_PER_ENDPOINT", "integer", "10000", "Idle HTTP/1 connections kept to the application.";
    "LINKERD2_PROXY_OUTBOUND_MAX_IDLE_CONNS_PER_ENDPOINT", "integer", "10000", "Idle HTTP/1 connections kept per peer.";
    "LINKERD2_PROXY_INBOUND_HTTP1_CONNECTION_POOL_IDLE_TIMEOUT", "duration", "3s", "Idle HTTP/1 connections to the application are closed after this.";
    "LINKERD2_PROXY_OUTBOUND_HTTP1_CONNECTION_POOL_IDLE_TIMEOUT", "duration", "3s", "Idle HTTP/1 connections to peers are closed after this.";
    "LINKERD2_PROXY_HTTP2_INITIAL_STREAM_WINDOW_SIZE", "integer", "65535", "HTTP/2 clients: stream window, bytes.";
    "LINKERD2_PROXY_HTTP2_INITIAL_CONNECTION_WINDOW_SIZE", "integer", "1048576", "HTTP/2 clients: connection window, bytes.";
    "LINKERD2_PROXY_INBOUND_SERVER_HTTP2_ADAPTIVE_FLOW_CONTROL", "bool", "false", "HTTP/2 served inbound: windows that adapt.";
    "LINKERD2_PROXY_INBOUND_SERVER_HTTP2_INITIAL_STREAM_WINDOW_SIZE", "integer", "65535", "Stream window, bytes; goes with the connection window.";
    "LINKERD2_PROXY_INBOUND_SERVER_HTTP2_INITIAL_CONNECTION_WINDOW_SIZE", "integer", "1048576", "Connection window, bytes; goes with the stream window.";
    "LINKERD2_PROXY_INBOUND_SERVER_HTTP2_KEEP_ALIVE_INTERVAL", "duration", "off", "Time between PINGs; goes with the timeout.";
    "LINKERD2_PROXY_INBOUND_SERVER_HTTP2_KEEP_ALIVE_TIMEOUT", "duration", "off", "Wait for a PING's answer; goes with the interval.";
    "LINKERD2_PROXY_INBOUND_SERVER_HTTP2_MAX_CONCURRENT_STREAMS", "integer", "no limit", "Streams that a client may have open.";
    "LINKERD2_PROXY_INBOUND_SERVER_HTTP2_MAX_FRAME_SIZE", "integer", "16384", "Largest frame accepted, bytes, 16384 to 16777215.";
    "LINKERD2_PROXY_INBOUND_SERVER_HTTP2_MAX_HEADER_LIST_SIZE", "integer", "65536", "Largest request head, HTTP/1 and HTTP/2, bytes.";
    "LINKERD2_PROXY_INBOUND_SERVER_HTTP2_MAX_PENDING_ACCEPT_RESET_STREAMS", "integer", "library's", "Streams reset before they were accepted.";
    "LINKERD2_PROXY_INBOUND_SERVER_HTTP2_MAX_SEND_BUF_SIZE", "integer", "library's", "Write buffer per stream, bytes.";
    "LINKERD2_PROXY_OUTBOUND_SERVER_HTTP2_ADAPTIVE_FLOW_CONTROL", "bool", "false", "As inbound, for HTTP/2 served to the application.";
    "LINKERD2_PROXY_OUTBOUND_SERVER_HTTP2_INITIAL_STREAM_WINDOW_SIZE", "integer", "65535", "As inbound.";
    "LINKERD2_PROXY_OUTBOUND_SERVER_HTTP2_INITIAL_CONNECTION_WINDOW_SIZE", "integer", "1048576", "As inbound.";
    "LINKERD2_PROXY_OUTBOUND_SERVER_HTTP2_KEEP_ALIVE_INTERVAL", "duration", "off", "As inbound.";
    "LINKERD2_PROXY_OUTBOUND_SERVER_HTTP2_KEEP_ALIVE_TIMEOUT", "duration", "off", "As inbound.";
    "LINKERD2_PROXY_OUTBOUND_SERVER_HTTP2_MAX_CONCURRENT_STREAMS", "integer", "no limit", "As inbound.";
    "LINKERD2_PROXY_OUTBOUND_SERVER_HTTP2_MAX_FRAME_SIZE", "integer", "16384", "As inbound.";
    "LINKERD2_PROXY_OUTBOUND_SERVER_HTTP2_MAX_HEADER_LIST_SIZE", "integer", "65536", "As inbound.";
    "LINKERD2_PROXY_OUTBOUND_SERVER_HTTP2_MAX_PENDING_ACCEPT_RESET_STREAMS", "integer", "library's", "As inbound.";
    "LINKERD2_PROXY_OUTBOUND_SERVER_HTTP2_MAX_SEND_BUF_SIZE", "integer", "library's", "As inbound.";
    "LINKERD2_PROXY_INBOUND_DETECT_TIMEOUT", "duration", "10s", "Wait for a ClientHello, then for HTTP, on inbound connections.";
    "LINKERD2_PROXY_OUTBOUND_DETECT_TIMEOUT", "duration", "10s", "Wait for HTTP or a ClientHello on outbound connections.";
    "LINKERD2_PROXY_DNS_MIN_TTL", "duration", "none", "Shortest TTL believed.";
    "LINKERD2_PROXY_DNS_MAX_TTL", "duration", "none", "Longest TTL believed.";
};

/// Every variable whose bad values never do: the log's, the runtime's, and what is said of the workload in traces.
pub const LENIENT: &[Setting] = settings! {
    "LINKERD2_PROXY_LOG", "filter directives", "warn,linkerd=info,hickory=error", "Log filter, which `/proxy-log-level` replaces; `off` disables logging for good.";
    "LINKERD2_PROXY_LOG_FORMAT", "json or plain", "plain", "Log format.";
    "LINKERD2_PROXY_ACCESS_LOG", "apache or json", "off", "Access log of inbound requests, on stderr.";
    "LINKERD2_PROXY_CORES_MIN", "integer above 0", "value of the next", "Least worker threads.";
    "LINKERD2_PROXY_CORES", "integer above 0", "1", "Older name of the previous.";
    "LINKERD2_PROXY_CORES_MAX", "integer above 0", "unset", "Wanted worker threads.";
    "LINKERD2_PROXY_CORES_MAX_RATIO", "float above 0, at most 1", "unset", "Wanted share of the CPUs, if the previous is unset.";
    "LINKERD2_PROXY_TRACE_SERVICE_NAME", "string", "unset", "`service.name` of the spans.";
    "LINKERD2_PROXY_TRACE_ATTRIBUTES_PATH", "path", "unset", "File of `key=value` lines, read once: attributes of the spans' resource.";
    "LINKERD2_PROXY_TRACE_EXTRA_ATTRIBUTES", "key=value lines", "unset", "More of them.";
    "OTEL_RESOURCE_ATTRIBUTES", "key=value lines or comma list", "unset", "More of them; the last of all that have one key wins.";
    "HOSTNAME", "string", "empty", "`host.name` of the spans.";
};

/// Set by Linkerd's injector and read by nobody (contract.md 1.18), and what holds instead. Who set one of the first two
/// wanted something, and is warned; the others come with every pod whose traces are collected.
const NO_EFFECT: &[(&str, &str)] = &[
    ("LINKERD2_PROXY_INBOUND_PORTS_REQUIRE_IDENTITY", POLICY_ENFORCES),
    ("LINKERD2_PROXY_INBOUND_PORTS_REQUIRE_TLS", POLICY_ENFORCES),
    ("LINKERD2_PROXY_TRACE_PROTOCOL", "spans are always sent as OTLP"),
    ("LINKERD2_PROXY_TRACE_ANNOTATIONS_PATH", "labels are read, by LINKERD2_PROXY_TRACE_ATTRIBUTES_PATH"),
];
const POLICY_ENFORCES: &str = "the policy controller enforces it";

/// Beginnings of the settings that `run --manifests` has no use for.
const LINKERD_ONLY: &[&str] = &[
    "LINKERD2_PROXY_DESTINATION_SVC_",
    "LINKERD2_PROXY_DESTINATION_CONTEXT",
    "LINKERD2_PROXY_DESTINATION_PROFILE_NETWORKS",
    "LINKERD2_PROXY_POLICY_SVC_",
    "LINKERD2_PROXY_POLICY_WORKLOAD",
    "LINKERD2_PROXY_CONTROL_STREAM_",
    "LINKERD2_PROXY_IDENTITY_",
    "LINKERD2_PROXY_LINKERD2_PROXY_IDENTITY_",
];

/// Settings of certification, which SPIRE has no use for.
const CERTIFY_ONLY: &[&str] = &[
    "LINKERD2_PROXY_IDENTITY_DIR",
    "LINKERD2_PROXY_IDENTITY_TOKEN_FILE",
    "LINKERD2_PROXY_IDENTITY_SVC_ADDR",
    "LINKERD2_PROXY_IDENTITY_SVC_NAME",
    "LINKERD2_PROXY_IDENTITY_MIN_REFRESH",
    "LINKERD2_PROXY_IDENTITY_MAX_REFRESH",
];

static ROWS: LazyLock<HashMap<&'static str, &'static Setting>> =
    LazyLock::new(|| SETTINGS.iter().chain(LENIENT).map(|row| (row.name, row)).collect());

/// What is needed before anything else: how to log, and on how many threads to run.
#[derive(Debug)]
pub struct Process {
    /// Log filter.
    pub log: Option<String>,
    /// Log format.
    pub log_format: String,
    /// Access log format; none = off.
    pub access_log: Option<String>,
    /// Least worker threads.
    pub cores_min: usize,
    /// Wanted worker threads.
    pub cores_max: Option<usize>,
    /// Wanted share of the CPUs, if the number is unset.
    pub cores_ratio: Option<f64>,
    /// Values that are ignored.
    pub warnings: Vec<String>,
}

/// Reads what can't fail.
pub fn process(lookup: &dyn Fn(&str) -> Option<OsString>) -> Process {
    let mut env = Reader { lookup, faults: Vec::new(), warnings: Vec::new(), class: None };
    let count = |text: &str| match s::integer::<usize>(text)? {
        0 => Err("expected a whole number above 0".to_string()),
        n => Ok(n),
    };
    let ratio = |text: &str| match s::float(text, 0.0, 1.0) {
        Ok(ratio) if ratio > 0.0 => Ok(ratio),
        _ => Err("expected a number above 0 and at most 1".to_string()),
    };
    let min = env.tolerated("LINKERD2_PROXY_CORES_MIN", count);
    Process {
        log: env.lenient("LINKERD2_PROXY_LOG"),
        log_format: env.lenient("LINKERD2_PROXY_LOG_FORMAT").unwrap_or_default(),
        access_log: env.lenient("LINKERD2_PROXY_ACCESS_LOG"),
        cores_min: min.or_else(|| env.tolerated("LINKERD2_PROXY_CORES", count)).unwrap_or(1),
        cores_max: env.tolerated("LINKERD2_PROXY_CORES_MAX", count),
        cores_ratio: env.tolerated("LINKERD2_PROXY_CORES_MAX_RATIO", ratio),
        warnings: env.warnings,
    }
}

/// Reads the configuration. `lookup` yields a variable's raw value, `names` every variable that is set.
///
/// # Errors
/// All bad entries at once.
pub fn parse(
    lookup: &dyn Fn(&str) -> Option<OsString>,
    names: impl IntoIterator<Item = String>,
    mode: Mode,
) -> Result<Parsed, Invalid> {
    let mut env = Reader { lookup, faults: Vec::new(), warnings: Vec::new(), class: None };
    let config = config(&mut env, mode);
    let issuer = config.as_ref().and_then(|config| config.identity.as_ref()).map(|identity| &identity.issuer);
    let by_spire = matches!(issuer, Some(Issuer::Spire { .. }));
    env.warnings.extend(names.into_iter().filter_map(|name| without_effect(&name, mode, by_spire)));
    match config {
        Some(config) if env.faults.is_empty() => Ok(Parsed { config, warnings: env.warnings }),
        _ => Err(Invalid { class: env.class.unwrap_or(Class::InvalidVariable), faults: env.faults }),
    }
}

/// A word about a variable that is set in vain.
fn without_effect(name: &str, mode: Mode, by_spire: bool) -> Option<String> {
    let because = |why: &str| Some(format!("{name} has no effect: {why}"));
    if let Some((_, why)) = NO_EFFECT.iter().find(|(known, _)| *known == name) {
        return if *why == POLICY_ENFORCES { because(why) } else { None };
    }
    if matches!(mode, Mode::Standalone { .. }) && LINKERD_ONLY.iter().any(|start| name.starts_with(start)) {
        return because("the manifests and the command line say it");
    }
    if by_spire && CERTIFY_ONLY.contains(&name) {
        return because("certificates come from the SPIRE agent");
    }
    let unknown = name.starts_with("LINKERD2_PROXY_") && !ROWS.contains_key(name);
    unknown.then(|| format!("{name} is not a setting of this proxy and is ignored"))
}

/// The reference page, docs/configuration.md.
pub fn reference() -> String {
    let mut page = String::from(
        "# Configuration\n\n\
         Every variable of the environment that the proxy reads. This page is printed from the table in\n\
         `linkerd-app/src/config/env.rs`; a test fails when it differs.\n\n\
         A bad value ends the start with exit code 64. All bad values are reported at once: on stderr, and as ERROR\n\
         lines in the log. A variable that is set to the empty string counts as set.\n\n\
         Durations are a whole number and one of `ms`, `s`, `m`, `h`, `d`, for instance `10s`.\n\n\
         | variable | syntax | default | meaning |\n|---|---|---|---|\n",
    );
    let rows = |page: &mut String, settings: &[Setting]| {
        for Setting { name, syntax, default, doc } in settings {
            page.push_str(&format!("| `{name}` | {syntax} | {default} | {doc} |\n"));
        }
    };
    rows(&mut page, SETTINGS);
    page.push_str(
        "\n## Never a reason to stop\n\n\
         Read by the log, the runtime and tracing. A bad value is ignored, with a word in the log.\n\n\
         | variable | syntax | default | meaning |\n|---|---|---|---|\n",
    );
    rows(&mut page, LENIENT);
    page.push_str(
        "\n## Without effect\n\n\
         Accepted, because Linkerd's injector sets them. A warning tells of the first two, and of every other variable\n\
         that begins with `LINKERD2_PROXY_` and is not on this page. So it does of settings that the mode has no use for:\n\
         with `run --manifests` those of the control plane and of identity, with SPIRE those of certification.\n\n\
         | variable | instead |\n|---|---|\n",
    );
    for (name, instead) in NO_EFFECT {
        page.push_str(&format!("| `{name}` | {instead} |\n"));
    }
    page
}

struct Reader<'a> {
    lookup: &'a dyn Fn(&str) -> Option<OsString>,
    faults: Vec<Fault>,
    warnings: Vec<String>,
    class: Option<Class>,
}

impl Reader<'_> {
    /// The variable's text, if it is set and is Unicode.
    fn text(&mut self, name: &'static str) -> Option<String> {
        debug_assert!(ROWS.contains_key(name), "{name} has no row in SETTINGS");
        match (self.lookup)(name)?.into_string() {
            Ok(text) => Some(text),
            Err(raw) => {
                self.fault(name, Some(raw.to_string_lossy().into_owned()), "the value is not valid Unicode");
                None
            }
        }
    }

    fn fault(&mut self, name: &str, value: Option<String>, why: impl Into<String>) {
        self.faults.push(Fault { name: name.to_string(), value, why: why.into() });
    }

    fn parse<T>(&mut self, name: &'static str, parse: impl FnOnce(&str) -> Result<T, s::Expected>) -> Option<T> {
        let text = self.text(name)?;
        match parse(&text) {
            Ok(value) => Some(value),
            Err(why) => {
                self.fault(name, Some(text), why);
                None
            }
        }
    }

    /// The value, or the default: always the default when the value is bad, so that parsing goes on.
    fn or<T>(&mut self, name: &'static str, default: T, parse: impl FnOnce(&str) -> Result<T, s::Expected>) -> T {
        self.parse(name, parse).unwrap_or(default)
    }

    fn required<T>(&mut self, name: &'static str, parse: impl FnOnce(&str) -> Result<T, s::Expected>) -> Option<T> {
        if (self.lookup)(name).is_none() {
            self.fault(name, None, "must be set");
            return None;
        }
        self.parse(name, parse)
    }

    /// The text of a variable whose bad values never stop the proxy: what is no Unicode counts as unset.
    fn lenient(&self, name: &'static str) -> Option<String> {
        debug_assert!(ROWS.contains_key(name), "{name} has no row in LENIENT");
        (self.lookup)(name)?.into_string().ok()
    }

    /// The value of such a variable; a bad one is ignored with a warning.
    fn tolerated<T>(&mut self, name: &'static str, parse: impl FnOnce(&str) -> Result<T, s::Expected>) -> Option<T> {
        let text = self.lenient(name)?;
        parse(&text).map_err(|why| self.warnings.push(format!("{name}={text:?} is ignored: {why}"))).ok()
    }

    fn class(&mut self, class: Class) {
        self.class = Some(self.class.map_or(class, |first| first.min(class)));
    }
}

const SECOND: Duration = Duration::from_secs(1);

fn config(env: &mut Reader<'_>, mode: Mode) -> Option<Config> {
    let cluster_networks = env.or("LINKERD2_PROXY_POLICY_CLUSTER_NETWORKS", Vec::new(), s::networks);
    let suffixes =
        env.or("LINKERD2_PROXY_DESTINATION_PROFILE_SUFFIXES", Suffixes(vec!["svc.cluster.local.".into()]), s::suffixes);
    let http2_client = Http2Params {
        windows: Some(Http2Windows::Fixed {
            stream: env.or("LINKERD2_PROXY_HTTP2_INITIAL_STREAM_WINDOW_SIZE", 65_535, s::integer),
            connection: env.or("LINKERD2_PROXY_HTTP2_INITIAL_CONNECTION_WINDOW_SIZE", 1_048_576, s::integer),
        }),
        ..Default::default()
    };
    let inbound = inbound(env, mode, &cluster_networks, suffixes.clone(), http2_client.clone());
    let outbound = outbound(env, mode, suffixes, http2_client);
    let gateway =
        Gateway { suffixes: env.or("LINKERD2_PROXY_INBOUND_GATEWAY_SUFFIXES", Suffixes::default(), s::suffixes) };
    let admin_like = |addr, setting| Listen { addr, setting, ..inbound.listen.clone() };
    let admin = Admin {
        listen: admin_like(
            env.or("LINKERD2_PROXY_ADMIN_LISTEN_ADDR", SocketAddr::from(([127, 0, 0, 1], 4191)), s::socket_addr),
            "LINKERD2_PROXY_ADMIN_LISTEN_ADDR",
        ),
        shutdown_enabled: env.or("LINKERD2_PROXY_SHUTDOWN_ENDPOINT_ENABLED", false, s::boolean),
    };
    let tap_addr = env.or("LINKERD2_PROXY_CONTROL_LISTEN_ADDR", SocketAddr::from(([0, 0, 0, 0], 4190)), s::socket_addr);
    let tap = env
        .parse("LINKERD2_PROXY_TAP_SVC_NAME", |t| t.parse::<Id>().map_err(|e| e.to_string()))
        .map(|client| Tap { listen: admin_like(tap_addr, "LINKERD2_PROXY_CONTROL_LISTEN_ADDR"), client });
    let Metrics { retain_idle, max_series } = Metrics::default();
    let metrics = Metrics {
        retain_idle: env.or("LINKERD2_PROXY_METRICS_RETAIN_IDLE", retain_idle, s::duration),
        max_series: env.or("LINKERD2_PROXY_METRICS_MAX_SERIES", max_series, s::integer),
    };
    let shutdown_grace_period = env.or("LINKERD2_PROXY_SHUTDOWN_GRACE_PERIOD", SECOND * 120, s::duration);
    let core_dumps = env.or("LINKERD2_PROXY_CORE_DUMPS", false, s::boolean);
    let dns = Dns {
        min_ttl: env.parse("LINKERD2_PROXY_DNS_MIN_TTL", s::duration),
        max_ttl: env.parse("LINKERD2_PROXY_DNS_MAX_TTL", s::duration),
    };
    let traces = traces(env);
    let (identity, control) = match mode {
        Mode::Standalone { .. } => (None, None),
        Mode::Linkerd => {
            let identity = identity(env);
            let control = control(env, &inbound, &outbound);
            (Some(identity?), Some(control?))
        }
    };
    Some(Config {
        inbound,
        outbound,
        gateway,
        admin,
        identity,
        control,
        tap,
        metrics,
        traces,
        shutdown_grace_period,
        core_dumps,
        dns,
    })
}

fn inbound(
    env: &mut Reader<'_>,
    mode: Mode,
    cluster_networks: &[IpNet],
    profile_suffixes: Suffixes,
    http2_client: Http2Params,
) -> Inbound {
    let default_policy = match env.parse("LINKERD2_PROXY_INBOUND_DEFAULT_POLICY", |text| {
        let policy = s::default_policy(text)?;
        match policy {
            DefaultPolicy::ClusterAuthenticated | DefaultPolicy::ClusterUnauthenticated | DefaultPolicy::Audit
                if cluster_networks.is_empty() =>
            {
                Err("this policy needs LINKERD2_PROXY_POLICY_CLUSTER_NETWORKS".into())
            }
            _ => Ok(policy),
        }
    }) {
        Some(policy) => policy,
        None => {
            if mode == Mode::Linkerd && (env.lookup)("LINKERD2_PROXY_INBOUND_DEFAULT_POLICY").is_none() {
                env.warnings.push("LINKERD2_PROXY_INBOUND_DEFAULT_POLICY is not set; using all-unauthenticated".into());
            }
            DefaultPolicy::AllUnauthenticated
        }
    };
    Inbound {
        listen: Listen {
            addr: env.or("LINKERD2_PROXY_INBOUND_LISTEN_ADDR", SocketAddr::from(([0, 0, 0, 0], 4143)), s::socket_addr),
            setting: "LINKERD2_PROXY_INBOUND_LISTEN_ADDR",
            keepalive: env.parse("LINKERD2_PROXY_INBOUND_ACCEPT_KEEPALIVE", s::duration),
            user_timeout: env.parse("LINKERD2_PROXY_INBOUND_ACCEPT_USER_TIMEOUT", s::duration),
            backlog: env.or("LINKERD2_PROXY_INBOUND_TCP_LISTEN_BACKLOG", 128, s::integer),
        },
        ips: Arc::new(env.or("LINKERD2_PROXY_INBOUND_IPS", HashSet::new(), s::ips)),
        ports: env.or("LINKERD2_PROXY_INBOUND_PORTS", BTreeSet::new(), s::port_set),
        default_policy,
        cluster_networks: cluster_networks.to_vec(),
        opaque_ports: env.or("LINKERD2_PROXY_INBOUND_PORTS_DISABLE_PROTOCOL_DETECTION", BTreeSet::new(), s::port_set),
        detect_timeout: env.or("LINKERD2_PROXY_INBOUND_DETECT_TIMEOUT", SECOND * 10, s::duration),
        queue: Queue {
            capacity: env.or("LINKERD2_PROXY_INBOUND_HTTP_QUEUE_CAPACITY", 10_000, s::integer),
            failfast_timeout: env.or("LINKERD2_PROXY_INBOUND_HTTP_FAILFAST_TIMEOUT", SECOND, s::duration),
        },
        max_in_flight: env.or("LINKERD2_PROXY_INBOUND_MAX_IN_FLIGHT", 100_000, s::integer),
        discovery_idle_timeout: env.or("LINKERD2_PROXY_INBOUND_DISCOVERY_IDLE_TIMEOUT", SECOND * 90, s::duration),
        profile_timeout: env.or(
            "LINKERD2_PROXY_DESTINATION_PROFILE_INITIAL_TIMEOUT",
            Duration::from_millis(500),
            s::duration,
        ),
        connect: Connect {
            timeout: env.or("LINKERD2_PROXY_INBOUND_CONNECT_TIMEOUT", Duration::from_millis(300), s::duration),
            keepalive: env.parse("LINKERD2_PROXY_INBOUND_CONNECT_KEEPALIVE", s::duration),
            user_timeout: env.parse("LINKERD2_PROXY_INBOUND_CONNECT_USER_TIMEOUT", s::duration),
            backoff: backoff(
                env,
                [
                    "LINKERD2_PROXY_INBOUND_CONNECT_EXP_BACKOFF_MIN",
                    "LINKERD2_PROXY_INBOUND_CONNECT_EXP_BACKOFF_MAX",
                    "LINKERD2_PROXY_INBOUND_CONNECT_EXP_BACKOFF_JITTER",
                ],
                Backoff { min: Duration::from_millis(100), max: SECOND * 10, jitter: 0.1 },
            ),
        },
        http1: Http1Client {
            max_idle: env.or("LINKERD2_PROXY_MAX_IDLE_CONNS_PER_ENDPOINT", 10_000, s::integer),
            idle_timeout: env.or("LINKERD2_PROXY_INBOUND_HTTP1_CONNECTION_POOL_IDLE_TIMEOUT", SECOND * 3, s::duration),
        },
        http2_client,
        http_server: http_server(env, &INBOUND_HTTP2),
        authority_labels: env.or("LINKERD2_PROXY_INBOUND_METRICS_AUTHORITY_LABELS", false, |text| match text {
            "" => Ok(false),
            t if t.eq_ignore_ascii_case("unsafe") => Ok(true),
            _ => Err("expected nothing or unsafe".into()),
        }),
        profile_suffixes,
    }
}

fn outbound(env: &mut Reader<'_>, mode: Mode, profile_suffixes: Suffixes, http2_client: Http2Params) -> Outbound {
    let single =
        env.or("LINKERD2_PROXY_OUTBOUND_LISTEN_ADDR", SocketAddr::from(([127, 0, 0, 1], 4140)), s::socket_addr);
    let (addrs, setting) = match env.parse("LINKERD2_PROXY_OUTBOUND_LISTEN_ADDRS", s::socket_addrs) {
        Some(addrs) => (addrs, "LINKERD2_PROXY_OUTBOUND_LISTEN_ADDRS"),
        None => (vec![single], "LINKERD2_PROXY_OUTBOUND_LISTEN_ADDR"),
    };
    let keepalive = env.parse("LINKERD2_PROXY_OUTBOUND_ACCEPT_KEEPALIVE", s::duration);
    let user_timeout = env.parse("LINKERD2_PROXY_OUTBOUND_ACCEPT_USER_TIMEOUT", s::duration);
    let backlog = env.or("LINKERD2_PROXY_OUTBOUND_TCP_LISTEN_BACKLOG", 128, s::integer);
    let ingress_mode = env.or("LINKERD2_PROXY_INGRESS_MODE", false, s::boolean);
    Outbound {
        listen: addrs.into_iter().map(|addr| Listen { addr, setting, keepalive, user_timeout, backlog }).collect(),
        tcp_queue: Queue {
            capacity: env.or("LINKERD2_PROXY_OUTBOUND_TCP_QUEUE_CAPACITY", 10_000, s::integer),
            failfast_timeout: env.or("LINKERD2_PROXY_OUTBOUND_TCP_FAILFAST_TIMEOUT", SECOND * 3, s::duration),
        },
        http_queue: Queue {
            capacity: env.or("LINKERD2_PROXY_OUTBOUND_HTTP_QUEUE_CAPACITY", 10_000, s::integer),
            failfast_timeout: env.or("LINKERD2_PROXY_OUTBOUND_HTTP_FAILFAST_TIMEOUT", SECOND * 3, s::duration),
        },
        max_in_flight: env.or("LINKERD2_PROXY_OUTBOUND_MAX_IN_FLIGHT", 100_000, s::integer),
        discovery_idle_timeout: env.or("LINKERD2_PROXY_OUTBOUND_DISCOVERY_IDLE_TIMEOUT", SECOND * 5, s::duration),
        detect_timeout: env.or("LINKERD2_PROXY_OUTBOUND_DETECT_TIMEOUT", SECOND * 10, s::duration),
        connect: Connect {
            timeout: env.or("LINKERD2_PROXY_OUTBOUND_CONNECT_TIMEOUT", SECOND, s::duration),
            keepalive: env.parse("LINKERD2_PROXY_OUTBOUND_CONNECT_KEEPALIVE", s::duration),
            user_timeout: env.parse("LINKERD2_PROXY_OUTBOUND_CONNECT_USER_TIMEOUT", s::duration),
            backoff: backoff(
                env,
                [
                    "LINKERD2_PROXY_OUTBOUND_CONNECT_EXP_BACKOFF_MIN",
                    "LINKERD2_PROXY_OUTBOUND_CONNECT_EXP_BACKOFF_MAX",
                    "LINKERD2_PROXY_OUTBOUND_CONNECT_EXP_BACKOFF_JITTER",
                ],
                Backoff { min: Duration::from_millis(100), max: SECOND * 60, jitter: 0.1 },
            ),
        },
        http1: Http1Client {
            max_idle: env.or("LINKERD2_PROXY_OUTBOUND_MAX_IDLE_CONNS_PER_ENDPOINT", 10_000, s::integer),
            idle_timeout: env.or("LINKERD2_PROXY_OUTBOUND_HTTP1_CONNECTION_POOL_IDLE_TIMEOUT", SECOND * 3, s::duration),
        },
        http2_client,
        http_server: http_server(env, &OUTBOUND_HTTP2),
        informational_headers: !env.or(
            "LINKERD2_PROXY_OUTBOUND_DISABLE_INFORMATIONAL_HEADERS",
            ingress_mode,
            s::boolean,
        ),
        ingress_mode,
        hostname_labels: env.or("LINKERD2_PROXY_OUTBOUND_METRICS_HOSTNAME_LABELS", false, s::boolean),
        profile_suffixes,
        profile_networks: env.or("LINKERD2_PROXY_DESTINATION_PROFILE_NETWORKS", Vec::new(), s::networks),
        explicit: matches!(mode, Mode::Standalone { explicit: true }),
    }
}

/// MIN and MAX go together; JITTER needs them and is 0 without a value of its own (contract.md 1.14).
fn backoff(env: &mut Reader<'_>, [min, max, jitter]: [&'static str; 3], default: Backoff) -> Backoff {
    let min_value = env.parse(min, s::duration);
    let max_value = env.parse(max, s::duration);
    let jitter_value = env.parse(jitter, |text| s::float(text, 0.0, 100.0));
    match (min_value, max_value) {
        (None, None) => {
            if jitter_value.is_some() {
                env.fault(jitter, None, format!("needs {min} and {max}"));
            }
            default
        }
        (Some(lo), Some(hi)) => {
            if hi.is_zero() {
                env.fault(max, Some("0".into()), "must be longer than zero");
            } else if lo > hi {
                env.fault(min, Some(format!("{lo:?}")), format!("must not be longer than {max} ({hi:?})"));
            }
            Backoff { min: lo, max: hi, jitter: jitter_value.unwrap_or(0.0) }
        }
        (Some(_), None) => {
            if (env.lookup)(max).is_none() {
                env.fault(min, None, format!("needs {max} beside it"));
            }
            default
        }
        (None, Some(_)) => {
            if (env.lookup)(min).is_none() {
                env.fault(max, None, format!("needs {min} beside it"));
            }
            default
        }
    }
}

struct Http2Names {
    adaptive: &'static str,
    stream: &'static str,
    connection: &'static str,
    interval: &'static str,
    timeout: &'static str,
    streams: &'static str,
    frame: &'static str,
    headers: &'static str,
    pending: &'static str,
    send_buf: &'static str,
}

macro_rules! http2_names {
    ($side:literal) => {
        Http2Names {
            adaptive: concat!("LINKERD2_PROXY_", $side, "_SERVER_HTTP2_ADAPTIVE_FLOW_CONTROL"),
            stream: concat!("LINKERD2_PROXY_", $side, "_SERVER_HTTP2_INITIAL_STREAM_WINDOW_SIZE"),
            connection: concat!("LINKERD2_PROXY_", $side, "_SERVER_HTTP2_INITIAL_CONNECTION_WINDOW_SIZE"),
            interval: concat!("LINKERD2_PROXY_", $side, "_SERVER_HTTP2_KEEP_ALIVE_INTERVAL"),
            timeout: concat!("LINKERD2_PROXY_", $side, "_SERVER_HTTP2_KEEP_ALIVE_TIMEOUT"),
            streams: concat!("LINKERD2_PROXY_", $side, "_SERVER_HTTP2_MAX_CONCURRENT_STREAMS"),
            frame: concat!("LINKERD2_PROXY_", $side, "_SERVER_HTTP2_MAX_FRAME_SIZE"),
            headers: concat!("LINKERD2_PROXY_", $side, "_SERVER_HTTP2_MAX_HEADER_LIST_SIZE"),
            pending: concat!("LINKERD2_PROXY_", $side, "_SERVER_HTTP2_MAX_PENDING_ACCEPT_RESET_STREAMS"),
            send_buf: concat!("LINKERD2_PROXY_", $side, "_SERVER_HTTP2_MAX_SEND_BUF_SIZE"),
        }
    };
}

const INBOUND_HTTP2: Http2Names = http2_names!("INBOUND");
const OUTBOUND_HTTP2: Http2Names = http2_names!("OUTBOUND");

/// Largest request head when nothing is set, bytes. The original takes 16 KiB over HTTP/2 and 400 KiB over HTTP/1.
const DEFAULT_MAX_HEADER_SIZE: u32 = 64 * 1024;

fn http_server(env: &mut Reader<'_>, names: &Http2Names) -> HttpServer {
    let adaptive_window = env.or(names.adaptive, false, s::boolean);
    let windows = if adaptive_window {
        (None, None)
    } else {
        (env.parse(names.stream, s::integer), env.parse(names.connection, s::integer))
    };
    let (stream_window, connection_window) = match windows {
        (Some(stream), Some(connection)) => (stream, connection),
        (Some(_), None) | (None, Some(_)) => {
            env.warnings.push(format!("{} and {} have no effect unless both are set", names.stream, names.connection));
            (65_535, 1_048_576)
        }
        (None, None) => (65_535, 1_048_576),
    };
    let keep_alive = match (env.parse(names.interval, s::duration), env.parse(names.timeout, s::duration)) {
        (Some(interval), Some(timeout)) => Some((interval, timeout)),
        (None, None) => None,
        _ => {
            env.warnings.push(format!("{} and {} have no effect unless both are set", names.interval, names.timeout));
            None
        }
    };
    let frame_size = |text: &str| match s::integer::<u32>(text)? {
        // RFC 9113 section 6.5.2: SETTINGS_MAX_FRAME_SIZE
        size @ 16_384..=16_777_215 => Ok(size),
        _ => Err("expected 16384 to 16777215".to_string()),
    };
    HttpServer {
        stream_window,
        connection_window,
        adaptive_window,
        keep_alive,
        max_concurrent_streams: env.parse(names.streams, s::integer),
        max_frame_size: env.parse(names.frame, frame_size),
        max_header_size: env.or(names.headers, DEFAULT_MAX_HEADER_SIZE, s::integer),
        max_header_setting: names.headers,
        max_pending_accept_reset_streams: env.parse(names.pending, s::integer),
        max_send_buf_size: env.parse(names.send_buf, s::integer),
    }
}

fn identity(env: &mut Reader<'_>) -> Option<Identity> {
    if (env.lookup)("LINKERD2_PROXY_IDENTITY_DISABLED").is_some_and(|v| !v.is_empty()) {
        env.fault("LINKERD2_PROXY_IDENTITY_DISABLED", None, "identity cannot be disabled; unset this variable");
    }
    let trust_anchors = env.required("LINKERD2_PROXY_IDENTITY_TRUST_ANCHORS", |text| {
        if text.is_empty() { Err("expected the PEM text of the trust anchors".into()) } else { Ok(text.to_string()) }
    });
    let parse_id = |text: &str| text.parse::<Id>().map_err(|e| e.to_string());
    let (id, server_name) = if (env.lookup)("LINKERD2_PROXY_IDENTITY_LOCAL_NAME").is_some() {
        let name = env.parse("LINKERD2_PROXY_IDENTITY_LOCAL_NAME", s::dns_name);
        let id = name.as_ref().and_then(|name| name.as_str().parse().ok());
        (id, name)
    } else {
        (
            env.required("LINKERD2_PROXY_IDENTITY_SERVER_ID", parse_id),
            env.required("LINKERD2_PROXY_IDENTITY_SERVER_NAME", s::dns_name),
        )
    };
    let min_refresh = env.or("LINKERD2_PROXY_IDENTITY_MIN_REFRESH", SECOND * 10, s::duration);
    let max_refresh = env.or("LINKERD2_PROXY_IDENTITY_MAX_REFRESH", SECOND * 86_400, s::duration);
    let spire_backoff = backoff(
        env,
        [
            "LINKERD2_PROXY_LINKERD2_PROXY_IDENTITY_SPIRE_EXP_BACKOFF_MIN",
            "LINKERD2_PROXY_LINKERD2_PROXY_IDENTITY_SPIRE_EXP_BACKOFF_MAX",
            "LINKERD2_PROXY_LINKERD2_PROXY_IDENTITY_SPIRE_EXP_BACKOFF_JITTER",
        ],
        Backoff { min: Duration::from_millis(100), max: SECOND, jitter: 0.1 },
    );
    let socket = |text: &str| Ok(PathBuf::from(text.strip_prefix("unix:").unwrap_or(text)));
    let old_socket = env.parse("LINKERD2_PROXY_IDENTITY_SPIRE_SOCKET", socket);
    if old_socket.is_some() {
        env.warnings.push(
            "LINKERD2_PROXY_IDENTITY_SPIRE_SOCKET is deprecated; use LINKERD2_PROXY_IDENTITY_SPIRE_WORKLOAD_API_ADDRESS"
                .into(),
        );
    }
    let spire = env.parse("LINKERD2_PROXY_IDENTITY_SPIRE_WORKLOAD_API_ADDRESS", socket).or(old_socket);
    let issuer = match spire {
        Some(socket) => {
            if id.as_ref().is_some_and(|id| !id.as_str().starts_with("spiffe://")) {
                env.fault(
                    "LINKERD2_PROXY_IDENTITY_SERVER_ID",
                    id.as_ref().map(ToString::to_string),
                    "with SPIRE the identity must be a spiffe:// URI (and LOCAL_NAME unset)",
                );
            }
            trust_anchors.map(|trust_anchors| Issuer::Spire { trust_anchors, socket, backoff: spire_backoff })
        }
        None => {
            if let (Some(id), Some(name)) = (&id, &server_name)
                && id.as_str() != name.as_str()
            {
                env.class(Class::IdAndNameDiffer);
                env.fault(
                    "LINKERD2_PROXY_IDENTITY_SERVER_ID",
                    Some(id.to_string()),
                    format!(
                        "without SPIRE it must be a DNS name equal to LINKERD2_PROXY_IDENTITY_SERVER_NAME ({name})"
                    ),
                );
            }
            let path = |text: &str| {
                if text.is_empty() { Err("expected a path".to_string()) } else { Ok(PathBuf::from(text)) }
            };
            let dir = env.required("LINKERD2_PROXY_IDENTITY_DIR", path);
            let token_file = env.required("LINKERD2_PROXY_IDENTITY_TOKEN_FILE", path);
            let client = control_addr(
                env,
                "LINKERD2_PROXY_IDENTITY_SVC_ADDR",
                "LINKERD2_PROXY_IDENTITY_SVC_NAME",
                Some(Class::InvalidVariable),
            );
            match (trust_anchors, dir, token_file, client) {
                (Some(trust_anchors), Some(dir), Some(token_file), Some(client)) => {
                    Some(Issuer::Certify { trust_anchors, dir, token_file, client })
                }
                _ => None,
            }
        }
    };
    Some(Identity { id: id?, server_name: server_name?, issuer: issuer?, min_refresh, max_refresh })
}

fn control(env: &mut Reader<'_>, inbound: &Inbound, outbound: &Outbound) -> Option<Control> {
    let destination = control_addr(
        env,
        "LINKERD2_PROXY_DESTINATION_SVC_ADDR",
        "LINKERD2_PROXY_DESTINATION_SVC_NAME",
        Some(Class::NoDestination),
    );
    let policy =
        control_addr(env, "LINKERD2_PROXY_POLICY_SVC_ADDR", "LINKERD2_PROXY_POLICY_SVC_NAME", Some(Class::NoPolicy));
    let workload = env.required("LINKERD2_PROXY_POLICY_WORKLOAD", |text| Ok(text.to_string()));
    let destination_context = env.or("LINKERD2_PROXY_DESTINATION_CONTEXT", String::new(), |text| Ok(text.to_string()));
    let initial = env.parse("LINKERD2_PROXY_CONTROL_STREAM_INITIAL_TIMEOUT", s::duration_or_empty).flatten();
    let idle = env.parse("LINKERD2_PROXY_CONTROL_STREAM_IDLE_TIMEOUT", s::duration_or_empty).flatten();
    let lifetime = env.parse("LINKERD2_PROXY_CONTROL_STREAM_LIFETIME", s::duration_or_empty).flatten();
    for (shorter, longer, names) in [
        (initial, idle, ["INITIAL_TIMEOUT", "IDLE_TIMEOUT"]),
        (idle, lifetime, ["IDLE_TIMEOUT", "LIFETIME"]),
        (initial, lifetime, ["INITIAL_TIMEOUT", "LIFETIME"]),
    ] {
        if let (Some(shorter), Some(longer)) = (shorter, longer)
            && shorter > longer
        {
            env.fault(
                &format!("LINKERD2_PROXY_CONTROL_STREAM_{}", names[0]),
                Some(format!("{shorter:?}")),
                format!("must not be longer than LINKERD2_PROXY_CONTROL_STREAM_{} ({longer:?})", names[1]),
            );
        }
    }
    Some(Control {
        destination: destination?,
        destination_context,
        policy: policy?,
        workload: workload?,
        stream_initial_timeout: initial.or(idle),
        stream_idle_timeout: idle,
        stream_lifetime: lifetime,
        loopback_connect: inbound.connect.clone(),
        connect: outbound.connect.clone(),
    })
}

/// Where spans go, and what is said of where they come from (contract.md 1.9).
fn traces(env: &mut Reader<'_>) -> Option<Traces> {
    let collector =
        control_addr(env, "LINKERD2_PROXY_TRACE_COLLECTOR_SVC_ADDR", "LINKERD2_PROXY_TRACE_COLLECTOR_SVC_NAME", None)?;
    let otel = env.lenient("OTEL_RESOURCE_ATTRIBUTES").map(|text| s::otel_attributes(&text));
    Some(Traces {
        collector,
        service_name: env.lenient("LINKERD2_PROXY_TRACE_SERVICE_NAME"),
        attributes_path: env.lenient("LINKERD2_PROXY_TRACE_ATTRIBUTES_PATH").map(PathBuf::from),
        attributes: env
            .lenient("LINKERD2_PROXY_TRACE_EXTRA_ATTRIBUTES")
            .iter()
            .flat_map(|text| text.lines().map(str::to_string))
            .chain(otel.unwrap_or_default())
            .collect(),
        host_name: env.lenient("HOSTNAME").unwrap_or_default(),
    })
}

/// An address with its identity. Loopback addresses need none (contract.md 1.6). `absent` is the class of failure where the
/// service is required.
fn control_addr(
    env: &mut Reader<'_>,
    addr: &'static str,
    name: &'static str,
    absent: Option<Class>,
) -> Option<ControlAddr> {
    let has_addr = (env.lookup)(addr).is_some();
    let has_name = (env.lookup)(name).is_some();
    let identity = env.parse(name, s::dns_name);
    let parsed = env.parse(addr, s::addr);
    match (has_addr, has_name) {
        (false, false) => {
            if let Some(class) = absent {
                env.class(class);
                env.fault(addr, None, "must be set");
            }
            None
        }
        (false, true) => {
            env.fault(addr, None, format!("{addr} and {name} are needed together"));
            None
        }
        (true, _) => {
            let mut parsed = parsed?;
            if parsed.is_loopback() {
                return Some(parsed);
            }
            if !has_name {
                env.fault(name, None, format!("{addr} and {name} are needed together"));
                return None;
            }
            parsed.identity = Some(identity?.as_str().parse().ok()?);
            Some(parsed)
        }
    }
}

impl Class {
    /// The text after `Invalid configuration: `.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::InvalidVariable => "invalid environment variable",
            Self::NoDestination => "no destination service configured",
            Self::NoPolicy => "no policy service configured",
            Self::IdAndNameDiffer => "TLS id and server name must be the same",
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.value {
            // Trust anchors and tokens are no secrets, but a page of PEM hides the message.
            Some(value) if value.len() > 200 => {
                write!(f, "{}: {} (value of {} bytes)", self.name, self.why, value.len())
            }
            Some(value) => write!(f, "{}={value:?}: {}", self.name, self.why),
            None => write!(f, "{}: {}", self.name, self.why),
        }
    }
}

impl fmt::Display for Invalid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.class.as_str())?;
        for fault in &self.faults {
            write!(f, "\n  {fault}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Invalid {}

#[cfg(test)]
mod tests {
    use super::*;

    const MINIMUM: &[(&str, &str)] = &[
        ("LINKERD2_PROXY_DESTINATION_SVC_ADDR", "localhost.:8086"),
        ("LINKERD2_PROXY_POLICY_SVC_ADDR", "127.0.0.1:8090"),
        ("LINKERD2_PROXY_POLICY_WORKLOAD", "ns:pod"),
        ("LINKERD2_PROXY_IDENTITY_TRUST_ANCHORS", "pem"),
        ("LINKERD2_PROXY_IDENTITY_LOCAL_NAME", "web.ns.serviceaccount.identity.linkerd.cluster.local"),
        ("LINKERD2_PROXY_IDENTITY_DIR", "/identity"),
        ("LINKERD2_PROXY_IDENTITY_TOKEN_FILE", "/token"),
        ("LINKERD2_PROXY_IDENTITY_SVC_ADDR", "localhost.:8080"),
    ];

    fn read(extra: &[(&str, &str)], mode: Mode) -> Result<Parsed, Invalid> {
        let mut vars: HashMap<String, String> = HashMap::new();
        if mode == Mode::Linkerd {
            vars.extend(MINIMUM.iter().map(|(k, v)| (k.to_string(), v.to_string())));
        }
        for (k, v) in extra {
            if *v == "<unset>" {
                vars.remove(*k);
            } else {
                vars.insert(k.to_string(), v.to_string());
            }
        }
        let names: Vec<_> = vars.keys().cloned().collect();
        parse(&|name| vars.get(name).map(OsString::from), names, mode)
    }

    #[track_caller]
    fn good(extra: &[(&str, &str)]) -> Config {
        read(extra, Mode::Linkerd).expect("the environment must be valid").config
    }

    #[track_caller]
    fn faults(extra: &[(&str, &str)]) -> Vec<String> {
        read(extra, Mode::Linkerd).expect_err("must be refused").faults.into_iter().map(|f| f.name).collect()
    }

    #[test]
    fn the_smallest_environment_starts_with_the_contracts_defaults() {
        let config = good(&[]);
        assert_eq!(config.inbound.listen.addr, SocketAddr::from(([0, 0, 0, 0], 4143)));
        assert_eq!(config.inbound.detect_timeout, SECOND * 10);
        assert_eq!(config.inbound.connect.timeout, Duration::from_millis(300));
        assert_eq!(config.outbound.connect.backoff.max, SECOND * 60);
        assert_eq!(config.shutdown_grace_period, SECOND * 120);
        assert!(config.outbound.informational_headers);
        assert!(config.tap.is_none());
    }

    #[test]
    fn standalone_needs_no_variable_at_all() {
        let parsed = read(&[], Mode::Standalone { explicit: true }).expect("valid");
        assert!(parsed.config.control.is_none() && parsed.config.outbound.explicit);
        assert_eq!(parsed.warnings, Vec::<String>::new());
    }

    #[test]
    fn all_bad_values_are_reported_at_once() {
        assert_eq!(
            faults(&[
                ("LINKERD2_PROXY_INBOUND_LISTEN_ADDR", "not an address"),
                ("LINKERD2_PROXY_OUTBOUND_CONNECT_TIMEOUT", "1.5s"),
                ("LINKERD2_PROXY_SHUTDOWN_ENDPOINT_ENABLED", "yes"),
            ]),
            [
                "LINKERD2_PROXY_INBOUND_LISTEN_ADDR",
                "LINKERD2_PROXY_OUTBOUND_CONNECT_TIMEOUT",
                "LINKERD2_PROXY_SHUTDOWN_ENDPOINT_ENABLED"
            ]
        );
    }

    #[test]
    fn failures_have_their_class() {
        #[track_caller]
        fn check(extra: &[(&str, &str)], class: Class) {
            assert_eq!(read(extra, Mode::Linkerd).expect_err("must be refused").class, class);
        }
        check(&[("LINKERD2_PROXY_DESTINATION_SVC_ADDR", "<unset>")], Class::NoDestination);
        check(&[("LINKERD2_PROXY_POLICY_SVC_ADDR", "<unset>")], Class::NoPolicy);
        check(&[("LINKERD2_PROXY_POLICY_WORKLOAD", "<unset>")], Class::InvalidVariable);
        check(
            &[
                ("LINKERD2_PROXY_IDENTITY_LOCAL_NAME", "<unset>"),
                ("LINKERD2_PROXY_IDENTITY_SERVER_ID", "a.b"),
                ("LINKERD2_PROXY_IDENTITY_SERVER_NAME", "c.d"),
            ],
            Class::IdAndNameDiffer,
        );
    }

    #[test]
    fn controllers_away_from_this_machine_need_a_name() {
        assert_eq!(faults(&[("LINKERD2_PROXY_POLICY_SVC_ADDR", "p.:1")]), ["LINKERD2_PROXY_POLICY_SVC_NAME"]);
        let control = good(&[("LINKERD2_PROXY_POLICY_SVC_ADDR", "p.:1"), ("LINKERD2_PROXY_POLICY_SVC_NAME", "p.id")])
            .control
            .expect("a control plane");
        assert_eq!(control.policy.identity.expect("an identity").as_str(), "p.id");
        assert!(control.destination.identity.is_none());
    }

    #[test]
    fn cluster_policies_need_cluster_networks() {
        for policy in ["cluster-authenticated", "cluster-unauthenticated", "audit"] {
            assert_eq!(
                faults(&[("LINKERD2_PROXY_INBOUND_DEFAULT_POLICY", policy)]),
                ["LINKERD2_PROXY_INBOUND_DEFAULT_POLICY"]
            );
            good(&[
                ("LINKERD2_PROXY_INBOUND_DEFAULT_POLICY", policy),
                ("LINKERD2_PROXY_POLICY_CLUSTER_NETWORKS", "10.0.0.0/8"),
            ]);
        }
    }

    #[test]
    fn backoff_bounds_go_together() {
        const MIN: &str = "LINKERD2_PROXY_INBOUND_CONNECT_EXP_BACKOFF_MIN";
        const MAX: &str = "LINKERD2_PROXY_INBOUND_CONNECT_EXP_BACKOFF_MAX";
        const JITTER: &str = "LINKERD2_PROXY_INBOUND_CONNECT_EXP_BACKOFF_JITTER";
        assert_eq!(faults(&[(MIN, "1s")]), [MIN]);
        assert_eq!(faults(&[(MAX, "1s")]), [MAX]);
        assert_eq!(faults(&[(JITTER, "1")]), [JITTER]);
        assert_eq!(faults(&[(MIN, "2s"), (MAX, "1s")]), [MIN]);
        assert_eq!(faults(&[(MIN, "0"), (MAX, "0")]), [MAX]);
        let backoff = good(&[(MIN, "1s"), (MAX, "2s")]).inbound.connect.backoff;
        assert_eq!((backoff.min, backoff.max, backoff.jitter), (SECOND, SECOND * 2, 0.0));
    }

    #[test]
    fn stream_limits_are_ordered() {
        assert_eq!(
            faults(&[
                ("LINKERD2_PROXY_CONTROL_STREAM_INITIAL_TIMEOUT", "10s"),
                ("LINKERD2_PROXY_CONTROL_STREAM_IDLE_TIMEOUT", "5s"),
            ]),
            ["LINKERD2_PROXY_CONTROL_STREAM_INITIAL_TIMEOUT"]
        );
        let control = good(&[("LINKERD2_PROXY_CONTROL_STREAM_INITIAL_TIMEOUT", "")]).control.expect("a control plane");
        assert_eq!(control.stream_initial_timeout, None);
    }

    #[test]
    fn spire_needs_a_uri_and_others_a_dns_name() {
        let spire = [
            ("LINKERD2_PROXY_IDENTITY_LOCAL_NAME", "<unset>"),
            ("LINKERD2_PROXY_IDENTITY_SERVER_ID", "spiffe://root/web"),
            ("LINKERD2_PROXY_IDENTITY_SERVER_NAME", "web.local"),
            ("LINKERD2_PROXY_IDENTITY_SPIRE_WORKLOAD_API_ADDRESS", "unix:///run/agent.sock"),
        ];
        let identity = good(&spire).identity.expect("an identity");
        assert!(
            matches!(identity.issuer, Issuer::Spire { socket, .. } if socket.to_str() == Some("///run/agent.sock"))
        );
        let warnings = read(&spire, Mode::Linkerd).expect("valid").warnings;
        assert!(warnings.iter().any(|w| w.contains("TOKEN_FILE has no effect")), "{warnings:?}");
        let mut bad = spire.to_vec();
        bad[1].1 = "web.local";
        assert_eq!(faults(&bad), ["LINKERD2_PROXY_IDENTITY_SERVER_ID"]);
    }

    #[test]
    fn settings_without_effect_are_warned_about() {
        let parsed = read(
            &[
                ("LINKERD2_PROXY_INBOUND_SERVER_HTTP2_KEEP_ALIVE_INTERVAL", "10s"),
                ("LINKERD2_PROXY_INBOUND_PORTS_REQUIRE_TLS", "8080"),
                ("LINKERD2_PROXY_TYPO", "1"),
            ],
            Mode::Linkerd,
        )
        .expect("valid");
        for name in ["KEEP_ALIVE_INTERVAL", "REQUIRE_TLS", "LINKERD2_PROXY_TYPO"] {
            assert!(parsed.warnings.iter().any(|w| w.contains(name)), "{name}: {:?}", parsed.warnings);
        }
        let control =
            [("LINKERD2_PROXY_POLICY_SVC_ADDR", "nowhere"), ("LINKERD2_PROXY_TRACE_PROTOCOL", "opentelemetry")];
        let warnings = read(&control, Mode::Standalone { explicit: true }).expect("valid").warnings;
        assert!(matches!(&warnings[..], [w] if w.contains("POLICY_SVC_ADDR has no effect")), "{warnings:?}");
    }

    #[test]
    fn what_the_process_needs_first_cannot_fail() {
        let read = |vars: &[(&str, &str)]| {
            let value = |name: &str| vars.iter().find(|(k, _)| *k == name).map(|(_, v)| OsString::from(v));
            process(&value)
        };
        let nothing = read(&[]);
        assert_eq!((nothing.log, nothing.cores_min, nothing.cores_max), (None, 1, None));
        let old = read(&[("LINKERD2_PROXY_CORES", "3"), ("LINKERD2_PROXY_CORES_MIN", "none")]);
        assert_eq!((old.cores_min, old.warnings.len()), (3, 1));
        let ratio = |text: &str| read(&[("LINKERD2_PROXY_CORES_MAX_RATIO", text)]).cores_ratio;
        assert_eq!(["0.5", "1", "0", "1.5", "x", "NaN"].map(ratio), [Some(0.5), Some(1.0), None, None, None, None]);
        let zero = read(&[("LINKERD2_PROXY_CORES_MAX", "0"), ("LINKERD2_PROXY_LOG", "off")]);
        assert_eq!((zero.cores_max, zero.log.as_deref()), (None, Some("off")));
    }

    #[test]
    fn a_collector_turns_tracing_on() {
        const ADDR: &str = "LINKERD2_PROXY_TRACE_COLLECTOR_SVC_ADDR";
        const NAME: &str = "LINKERD2_PROXY_TRACE_COLLECTOR_SVC_NAME";
        assert!(
            good(&[("LINKERD2_PROXY_TRACE_SERVICE_NAME", "web"), ("OTEL_RESOURCE_ATTRIBUTES", "a=b")]).traces.is_none()
        );
        assert_eq!(faults(&[(ADDR, "collector:4317")]), [NAME]);
        assert_eq!(faults(&[(NAME, "collector.id")]), [ADDR]);
        assert_eq!(faults(&[(ADDR, "collector")]), [ADDR]);
        let traces = good(&[
            (ADDR, "collector:4317"),
            (NAME, "collector.id"),
            ("LINKERD2_PROXY_TRACE_SERVICE_NAME", "web"),
            ("LINKERD2_PROXY_TRACE_EXTRA_ATTRIBUTES", "a=1\nb=2"),
            ("OTEL_RESOURCE_ATTRIBUTES", "c=3,d=4"),
            ("HOSTNAME", "web-0"),
        ])
        .traces
        .expect("tracing");
        assert_eq!(traces.collector.identity.expect("an identity").as_str(), "collector.id");
        assert_eq!((traces.service_name.as_deref(), &*traces.host_name), (Some("web"), "web-0"));
        assert_eq!(traces.attributes, ["a=1", "b=2", "c=3", "d=4"]);
    }

    #[test]
    fn identity_cannot_be_disabled() {
        assert_eq!(faults(&[("LINKERD2_PROXY_IDENTITY_DISABLED", "1")]), ["LINKERD2_PROXY_IDENTITY_DISABLED"]);
        good(&[("LINKERD2_PROXY_IDENTITY_DISABLED", "")]);
    }

    /// `BLESS=1 cargo test -p linkerd-app reference` writes the page anew.
    #[test]
    fn the_reference_page_is_current() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/configuration.md");
        if std::env::var_os("BLESS").is_some() {
            std::fs::write(path, reference()).expect("docs/ must be writable");
        }
        let page = std::fs::read_to_string(path).unwrap_or_default();
        assert!(page == reference(), "docs/configuration.md differs from the table; run this test with BLESS=1");
    }
}
