//! What the operator asked for, as inert values. `env` turns the environment into them; nothing else reads it.

pub mod env;
pub mod syntax;

use crate::policy::{client::Backoff, endpoint::Http2Params};
use ipnet::IpNet;
use linkerd_tls::{Id, ServerName};
use std::{
    collections::{BTreeSet, HashSet},
    net::{IpAddr, SocketAddr},
    num::NonZeroUsize,
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

/// Everything. Section numbers are contract.md's.
#[derive(Clone, Debug)]
pub struct Config {
    /// 1.2, 1.3
    pub inbound: Inbound,
    /// 1.2, 1.4
    pub outbound: Outbound,
    /// Gateway mode, 1.5
    pub gateway: Gateway,
    /// 1.2, 1.12
    pub admin: Admin,
    /// 1.7; absent in standalone mode, where the workload's Pod and the identity folder say it.
    pub identity: Option<Identity>,
    /// 1.6; absent in standalone mode.
    pub control: Option<Control>,
    /// 1.10; absent = tap off.
    pub tap: Option<Tap>,
    /// 1.8
    pub metrics: Metrics,
    /// 1.9; absent = no tracing.
    pub traces: Option<Traces>,
    /// Longest drain, 1.12.
    pub shutdown_grace_period: Duration,
    /// Whether the kernel may write core files of this process, private keys included.
    pub core_dumps: bool,
    /// Clamp on DNS TTLs, 1.17.
    pub dns: Dns,
}

/// Traffic towards the local application.
#[derive(Clone, Debug)]
pub struct Inbound {
    /// Listener; its port is also the direct port.
    pub listen: Listen,
    /// This proxy's own addresses; empty = not checked.
    pub ips: Arc<HashSet<IpAddr>>,
    /// Ports whose policies are watched from the start and never forgotten.
    pub ports: BTreeSet<u16>,
    /// Policy of ports that the source has not told about.
    pub default_policy: DefaultPolicy,
    /// Networks meant by the `cluster-*` default policies.
    pub cluster_networks: Vec<IpNet>,
    /// Ports whose default policy is opaque.
    pub opaque_ports: BTreeSet<u16>,
    /// Wait for a ClientHello, then for HTTP.
    pub detect_timeout: Duration,
    /// Request queue towards the application.
    pub queue: Queue,
    /// Requests awaiting response headers.
    pub max_in_flight: usize,
    /// Idle policies and stacks are dropped after this.
    pub discovery_idle_timeout: Duration,
    /// How long a service profile is waited for.
    pub profile_timeout: Duration,
    /// Connections to the application.
    pub connect: Connect,
    /// HTTP/1 connections to the application.
    pub http1: Http1Client,
    /// HTTP/2 connections to the application.
    pub http2_client: Http2Params,
    /// HTTP served to clients.
    pub http_server: HttpServer,
    /// `unsafe` authority labels on inbound metrics.
    pub authority_labels: bool,
    /// Names for which service profiles may be looked up.
    pub profile_suffixes: Suffixes,
}

/// Traffic away from the local application.
#[derive(Clone, Debug)]
pub struct Outbound {
    /// One or two listeners.
    pub listen: Vec<Listen>,
    /// Queue of opaque and TLS connections.
    pub tcp_queue: Queue,
    /// Queue of HTTP requests, per backend.
    pub http_queue: Queue,
    /// Requests awaiting response headers.
    pub max_in_flight: usize,
    /// Idle discovery results, clients and connections are dropped after this.
    pub discovery_idle_timeout: Duration,
    /// Wait for the client's first bytes.
    pub detect_timeout: Duration,
    /// Connections to peers and to the control plane.
    pub connect: Connect,
    /// HTTP/1 connections to peers.
    pub http1: Http1Client,
    /// HTTP/2 connections to peers, where discovery says nothing.
    pub http2_client: Http2Params,
    /// HTTP served to the application.
    pub http_server: HttpServer,
    /// Whether `l5d-proxy-error` and `l5d-proxy-connection` are added to synthesized responses.
    pub informational_headers: bool,
    /// Route by `l5d-dst-override`.
    pub ingress_mode: bool,
    /// `hostname` labels on route metrics.
    pub hostname_labels: bool,
    /// Names for which service profiles may be looked up.
    pub profile_suffixes: Suffixes,
    /// Addresses for which service profiles may be looked up.
    pub profile_networks: Vec<IpNet>,
    /// Whether connections that nothing redirected are served too: their clients know that they talk to a proxy, and
    /// HTTP requests name their Service (absolute form, CONNECT, Host).
    pub explicit: bool,
}

/// Names that end in one of these; `.` = every name. Compared label by label, trailing dots ignored.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Suffixes(pub Vec<String>);

/// Names that may be reached through this proxy as a gateway; empty = none.
#[derive(Clone, Debug, Default)]
pub struct Gateway {
    /// Allowed names.
    pub suffixes: Suffixes,
}

/// A listening socket.
#[derive(Clone, Debug)]
pub struct Listen {
    /// Address to bind.
    pub addr: SocketAddr,
    /// Setting that named it, for error messages.
    pub setting: &'static str,
    /// Keepalive idle time of accepted sockets.
    pub keepalive: Option<Duration>,
    /// `TCP_USER_TIMEOUT` of accepted sockets.
    pub user_timeout: Option<Duration>,
    /// Backlog.
    pub backlog: u32,
}

/// How connections are opened.
#[derive(Clone, Debug)]
pub struct Connect {
    /// TCP and TLS together.
    pub timeout: Duration,
    /// Keepalive idle time.
    pub keepalive: Option<Duration>,
    /// `TCP_USER_TIMEOUT`.
    pub user_timeout: Option<Duration>,
    /// Wait between attempts.
    pub backoff: Backoff,
}

/// A bounded queue.
#[derive(Clone, Copy, Debug)]
pub struct Queue {
    /// Requests (or connections) that may wait.
    pub capacity: usize,
    /// How long they wait before fail-fast.
    pub failfast_timeout: Duration,
}

/// HTTP/1 connection pool.
#[derive(Clone, Copy, Debug)]
pub struct Http1Client {
    /// Idle connections kept per endpoint.
    pub max_idle: usize,
    /// Idle connections are closed after this.
    pub idle_timeout: Duration,
}

/// HTTP served to clients.
#[derive(Clone, Debug)]
pub struct HttpServer {
    /// Stream window, bytes.
    pub stream_window: u32,
    /// Connection window, bytes.
    pub connection_window: u32,
    /// Windows grow with the bandwidth-delay product instead.
    pub adaptive_window: bool,
    /// PING interval and timeout.
    pub keep_alive: Option<(Duration, Duration)>,
    /// Streams that a client may open; none = no limit is advertised.
    pub max_concurrent_streams: Option<u32>,
    /// Largest frame accepted, bytes.
    pub max_frame_size: Option<u32>,
    /// Largest head of a request, HTTP/1 and HTTP/2 alike, bytes.
    pub max_header_size: u32,
    /// The setting that bounds it; the answer 431 names it.
    pub max_header_setting: &'static str,
    /// Streams reset by the client before they were accepted.
    pub max_pending_accept_reset_streams: Option<usize>,
    /// Write buffer per stream, bytes.
    pub max_send_buf_size: Option<usize>,
}

/// The admin server.
#[derive(Clone, Debug)]
pub struct Admin {
    /// Listener.
    pub listen: Listen,
    /// Whether POST /shutdown works.
    pub shutdown_enabled: bool,
}

/// The tap server.
#[derive(Clone, Debug)]
pub struct Tap {
    /// Listener.
    pub listen: Listen,
    /// The only client allowed.
    pub client: Id,
}

/// Series retention and the like.
#[derive(Clone, Copy, Debug)]
pub struct Metrics {
    /// Idle series are dropped after this.
    pub retain_idle: Duration,
    /// Label sets that one group of families may have.
    pub max_series: NonZeroUsize,
}

impl Default for Metrics {
    fn default() -> Self {
        Self { retain_idle: Duration::from_secs(600), max_series: crate::telemetry::MAX_SERIES }
    }
}

/// Distributed tracing.
#[derive(Clone, Debug)]
pub struct Traces {
    /// Where spans go.
    pub collector: ControlAddr,
    /// `service.name` of what is sent.
    pub service_name: Option<String>,
    /// File of `key=value` lines about the workload.
    pub attributes_path: Option<PathBuf>,
    /// More `key=value` lines; the later of two with one key wins.
    pub attributes: Vec<String>,
    /// `host.name` of what is sent.
    pub host_name: String,
}

/// DNS settings.
#[derive(Clone, Copy, Debug, Default)]
pub struct Dns {
    /// Shortest TTL believed.
    pub min_ttl: Option<Duration>,
    /// Longest TTL believed.
    pub max_ttl: Option<Duration>,
}

/// Who we are, and who vouches for it.
#[derive(Clone, Debug)]
pub struct Identity {
    /// Own identity.
    pub id: Id,
    /// Name that peers ask for.
    pub server_name: ServerName,
    /// Where the certificate comes from.
    pub issuer: Issuer,
    /// Shortest time between certifications.
    pub min_refresh: Duration,
    /// Longest time between certifications.
    pub max_refresh: Duration,
}

/// Where the certificate comes from.
#[derive(Clone, Debug)]
pub enum Issuer {
    /// The identity controller.
    Certify {
        /// PEM text of the trust anchors.
        trust_anchors: String,
        /// Directory that may hold `key.p8` and `csr.der`.
        dir: PathBuf,
        /// Service-account token.
        token_file: PathBuf,
        /// The controller.
        client: ControlAddr,
    },
    /// A SPIRE agent.
    Spire {
        /// PEM text of the trust anchors.
        trust_anchors: String,
        /// Unix socket of the workload API.
        socket: PathBuf,
        /// Wait between attempts.
        backoff: Backoff,
    },
    /// A folder with an issuer of our own, or with a certificate issued elsewhere (standalone).
    Folder(PathBuf),
}

/// The Linkerd control plane.
#[derive(Clone, Debug)]
pub struct Control {
    /// Destination service.
    pub destination: ControlAddr,
    /// Context token of destination calls, verbatim.
    pub destination_context: String,
    /// Policy service.
    pub policy: ControlAddr,
    /// Workload token of policy calls, verbatim.
    pub workload: String,
    /// Limit on a stream's first message.
    pub stream_initial_timeout: Option<Duration>,
    /// Limit on the gap between a stream's messages.
    pub stream_idle_timeout: Option<Duration>,
    /// Limit on a stream's life.
    pub stream_lifetime: Option<Duration>,
    /// Settings of loopback controllers' connections.
    pub loopback_connect: Connect,
    /// Settings of the other controllers' connections.
    pub connect: Connect,
}

/// A control-plane service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ControlAddr {
    /// Host name with its trailing dot if it had one, or IP.
    pub host: String,
    /// Port.
    pub port: u16,
    /// Its identity and SNI; none = plaintext, for loopback addresses alone.
    pub identity: Option<Id>,
}

impl ControlAddr {
    /// Whether it stays on this machine (contract.md 1.0): a loopback IP, or `localhost.` with its dot. Then there is no TLS,
    /// and streams have no limits (behaviour.md G.1).
    pub fn is_loopback(&self) -> bool {
        self.host.eq_ignore_ascii_case("localhost.") || self.host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
    }
}

/// Policy of ports that the source has not told about (contract.md 1.3).
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum DefaultPolicy {
    /// Nobody.
    Deny,
    /// Any verified identity.
    AllAuthenticated,
    /// Anybody.
    AllUnauthenticated,
    /// Any verified identity in the cluster networks.
    ClusterAuthenticated,
    /// Anybody in the cluster networks.
    ClusterUnauthenticated,
    /// Anybody; each use is logged.
    Audit,
}

impl DefaultPolicy {
    /// As it is spelled in the environment, in annotations and in metric labels.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Deny => "deny",
            Self::AllAuthenticated => "all-authenticated",
            Self::AllUnauthenticated => "all-unauthenticated",
            Self::ClusterAuthenticated => "cluster-authenticated",
            Self::ClusterUnauthenticated => "cluster-unauthenticated",
            Self::Audit => "audit",
        }
    }
}

impl Suffixes {
    /// Whether a name, with or without a trailing dot, ends in one of the suffixes, label by label.
    pub fn matches(&self, name: &str) -> bool {
        let name = name.trim_end_matches('.');
        self.0.iter().any(|suffix| {
            let suffix = suffix.trim_matches('.');
            suffix.is_empty()
                || name.len() >= suffix.len()
                    && name.is_char_boundary(name.len() - suffix.len())
                    && name[name.len() - suffix.len()..].eq_ignore_ascii_case(suffix)
                    && (name.len() == suffix.len() || name.as_bytes()[name.len() - suffix.len() - 1] == b'.')
        })
    }
}
