//! One replica behind a backend: address, identity, how to speak to it.

use linkerd_tls::{Id, ServerName, web};
use std::{collections::BTreeMap, net::SocketAddr, sync::Arc, time::Duration};

/// A replica as discovery describes it. Equal endpoints share connections; a change in any field rebuilds them.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Endpoint {
    /// The application's address.
    pub addr: SocketAddr,
    /// Everything else.
    pub meta: Arc<EndpointMeta>,
}

/// What discovery knows of a replica.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct EndpointMeta {
    /// Relative share of traffic; 0 takes none while others are there. Linkerd's plain weight is 10,000.
    pub weight: Option<u32>,
    /// Mesh TLS, if the replica is meshed.
    pub tls: Option<ServerTls>,
    /// TLS that is originated for a replica that is not meshed (BackendTLSPolicy, egress); mesh TLS goes first.
    pub origin_tls: Option<Arc<web::Target>>,
    /// What the replica's proxy can take.
    pub hint: ProtocolHint,
    /// Inbound port of the replica's proxy for connections that begin with a transport header.
    pub opaque_transport_port: Option<u16>,
    /// `host[:port]` that replaces the request's authority (multicluster gateways).
    pub authority_override: Option<Arc<str>>,
    /// HTTP/2 client settings for this replica.
    pub http2: Option<Http2Params>,
    /// Metric labels, printed with the prefix `dst_`.
    pub labels: BTreeMap<Arc<str>, Arc<str>>,
    /// Where the replica is relative to this proxy.
    pub zone: ZoneLocality,
    /// Cluster that a federated endpoint came from; empty = the local one.
    pub cluster: Arc<str>,
}

/// Identity that a replica must prove, and the name to ask for.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ServerTls {
    /// Must be among the certificate's DNS and URI names.
    pub server_id: Id,
    /// SNI.
    pub server_name: ServerName,
}

/// What the replica's proxy can take.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq, Hash)]
pub enum ProtocolHint {
    /// Nothing known: HTTP/1 stays HTTP/1.
    #[default]
    Unknown,
    /// HTTP/1 may be carried over HTTP/2.
    Http2,
    /// The port is opaque: no upgrade, no session protocol.
    Opaque,
}

/// Values of the label `zone_locality`.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq, Hash)]
pub enum ZoneLocality {
    /// Same zone.
    Local,
    /// Another zone.
    Remote,
    /// Not told.
    #[default]
    Unknown,
}

/// HTTP/2 client settings that discovery may give per endpoint.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Http2Params {
    /// Windows in bytes, if both were given.
    pub windows: Option<Http2Windows>,
    /// PING interval and timeout, if both were given.
    pub keep_alive: Option<Http2KeepAlive>,
    /// Streams remembered after a local reset.
    pub max_concurrent_reset_streams: Option<u32>,
    /// Largest frame that we accept, bytes.
    pub max_frame_size: Option<u32>,
    /// Write buffer per stream, bytes.
    pub max_send_buf_size: Option<u32>,
}

/// Flow control.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Hash)]
pub enum Http2Windows {
    /// Grow with the bandwidth-delay product.
    Adaptive,
    /// Fixed, bytes.
    Fixed {
        /// Per stream.
        stream: u32,
        /// Per connection.
        connection: u32,
    },
}

/// PINGs.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Hash)]
pub struct Http2KeepAlive {
    /// Time between PINGs.
    pub interval: Duration,
    /// Time to wait for the answer.
    pub timeout: Duration,
    /// Whether PINGs go on without open streams.
    pub while_idle: bool,
}

impl Endpoint {
    /// An address of which nothing else is known.
    pub fn bare(addr: SocketAddr) -> Self {
        Self { addr, meta: Arc::default() }
    }
}
