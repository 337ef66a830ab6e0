//! Policy and discovery from the Linkerd control plane, over gRPC.
//!
//! [`Control`] is the [`Source`] of a proxy in a Linkerd mesh. It watches `InboundServerPolicies`, `OutboundPolicies` and
//! `Destination`, turns every message into policy values (`convert`), and keeps what it knows through every absence of the
//! control plane (`stream`). [`certify`] and [`spire`] are where certificates come from.
//!
//! ```text
//!   watch_server ── server ────┐
//!   watch_client ── discovery ─┼── stream ── client ── dns, connection
//!   resolve ─────── resolve ───┘
//! ```
//!
//! There are no caches but the watched ports: a look-up lives as long as somebody follows it. A consumer whose endpoints
//! keep refusing asks anew by dropping its [`Resolution`] and resolving again, which opens a fresh stream.

pub mod certify;
mod client;
mod convert;
pub mod defaults;
mod discovery;
pub mod metrics;
mod profile;
mod record;
mod resolve;
mod server;
pub mod spire;
mod stream;
pub mod traces;

pub use self::{client::tls::Secure, record::Lookup};

use self::{
    client::{Client, Options, dns},
    discovery::Discovery,
    record::Registry,
    server::{Ports, Subscribe},
    stream::{AbortOnDrop, Limits, Resume, STALL_LIMIT, Settings, Subscription},
};
use crate::{
    config,
    policy::{ClientPolicy, DiscoveryError, Resolution, ServerPolicy, Source, Target},
};
use futures_util::future::BoxFuture;
use linkerd_stack::{backoff::Backoff, balance};
use linkerd2_proxy_api::{
    destination::{self as destination_api, destination_client::DestinationClient},
    inbound::{self as inbound_api, inbound_server_policies_client::InboundServerPoliciesClient},
    outbound::{self as outbound_api, outbound_policies_client::OutboundPoliciesClient},
};
use std::{collections::BTreeSet, sync::Arc, time::Duration};
use tokio::{
    runtime::Handle,
    sync::{mpsc, oneshot, watch},
};

/// Services of the control plane.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ControlService {
    /// Certificates.
    Identity,
    /// Endpoints and profiles.
    Destination,
    /// Inbound and outbound policies.
    Policy,
    /// Takes spans.
    TraceCollector,
}

/// Kinds of DNS look-ups.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum DnsRecord {
    /// SRV.
    Srv,
    /// A and AAAA.
    Addresses,
}

/// Sees what the clients do; every method does nothing by default (metrics.md 5.11, 5.13).
pub trait Observer: Send + Sync + 'static {
    /// A look-up of a service's name ended.
    fn dns(&self, service: ControlService, record: DnsRecord, ok: bool) {
        let _ = (service, record, ok);
    }

    /// A request is sent.
    fn request(&self, service: ControlService) {
        let _ = service;
    }

    /// The head of a response came.
    fn first_byte(&self, service: ControlService, status: u16, latency: Duration) {
        let _ = (service, status, latency);
    }

    /// What a new client's balancer tells (metrics.md 5.9).
    fn balancer(&self, service: ControlService) -> Arc<dyn balance::Observer> {
        let _ = service;
        Arc::new(())
    }

    /// A response ended: none = it never began, or never told.
    fn response(&self, service: ControlService, status: Option<u16>, grpc_status: Option<u16>) {
        let _ = (service, status, grpc_status);
    }
}

/// Sees nothing.
impl Observer for () {}

impl ControlService {
    /// Value of the label `client` (metrics.md 5.13).
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Identity => "identity",
            Self::Destination => "destination",
            Self::Policy => "policy",
            Self::TraceCollector => "trace_collector",
        }
    }
}

impl DnsRecord {
    /// Value of the label `record_type` (metrics.md 5.13).
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Srv => "SRV",
            Self::Addresses => "A/AAAA",
        }
    }
}

/// The Linkerd control plane as a source of policy.
pub struct Control {
    config: config::Control,
    outbound: Arc<config::Outbound>,
    destination: Service,
    policy: Service,
    registry: Arc<Registry>,
    ports: Arc<Ports>,
    /// Where the work is done, whoever asks.
    runtime: Handle,
}

/// One service: its client, and how streams from it behave.
#[derive(Clone)]
struct Service {
    client: Client,
    origin: http::Uri,
    limits: Limits,
    backoff: Backoff,
}

/// What a [`Control`] is made of.
pub struct Start<'a> {
    /// The control plane.
    pub control: &'a config::Control,
    /// The inbound side: default policies, and the ports watched from the start.
    pub inbound: &'a config::Inbound,
    /// The outbound side: which profiles are looked up, and the detection timeout of synthesized policies.
    pub outbound: &'a config::Outbound,
    /// The admin port, which is watched too.
    pub admin_port: u16,
    /// Whether this proxy is a gateway: the inbound port itself is then watched too.
    pub is_gateway: bool,
    /// DNS.
    pub dns: config::Dns,
    /// Mesh TLS.
    pub secure: Arc<dyn Secure>,
    /// Metrics.
    pub observer: Arc<dyn Observer>,
}

impl Control {
    /// Connects and begins to watch the inbound ports, in tasks of the current runtime.
    ///
    /// # Panics
    /// Outside a Tokio runtime.
    pub fn start(start: Start<'_>) -> Arc<Self> {
        let Start { control, inbound, outbound, admin_port, is_gateway, dns, secure, observer } = start;
        let dns: Arc<dyn dns::Lookup> = Arc::new(dns::System::new(dns));
        let service = |service, addr: &config::ControlAddr| {
            let loopback = addr.is_loopback();
            let connect = if loopback { &control.loopback_connect } else { &control.connect };
            let client = Client::new(Options {
                service,
                addr: addr.clone(),
                connect: connect.clone(),
                secure: secure.clone(),
                needs_identity: true,
                dns: dns.clone(),
                observer: observer.clone(),
            });
            let backoff =
                Backoff { min: connect.backoff.min, max: connect.backoff.max, jitter: connect.backoff.jitter };
            let limits = if loopback { Limits::default() } else { limits(control) };
            Service { client, origin: client::origin(addr), limits, backoff }
        };
        let destination = service(ControlService::Destination, &control.destination);
        let policy = service(ControlService::Policy, &control.policy);
        let registry = Arc::new(Registry::default());
        let runtime = Handle::current();
        let mut permanent: BTreeSet<u16> = inbound.ports.clone();
        permanent.insert(admin_port);
        if is_gateway {
            permanent.insert(inbound.listen.addr.port());
        }
        let subscribe = watch_port(policy.clone(), control.workload.clone(), registry.clone());
        let ports = Ports::new(Arc::new(inbound.clone()), permanent, subscribe, runtime.clone());
        let outbound = Arc::new(outbound.clone());
        Arc::new(Self { config: control.clone(), outbound, destination, policy, registry, ports, runtime })
    }

    /// All look-ups that are under way, oldest first, with the age of what they know.
    pub fn status(&self) -> Vec<Lookup> {
        self.registry.snapshot()
    }

    /// The same for the status page: `{"unreachable": {service: reason}, "lookups": [..]}`, ages in seconds.
    pub fn status_json(&self) -> serde_json::Value {
        let lookup = |lookup: Lookup| {
            serde_json::json!({
                "method": lookup.method,
                "target": lookup.target,
                "live": lookup.live,
                "age_seconds": lookup.age.map(|age| age.as_secs_f64()),
                "messages": lookup.messages,
                "last_error": lookup.last_error.as_deref(),
            })
        };
        let unreachable: serde_json::Map<_, _> = self
            .trouble()
            .into_iter()
            .map(|(service, why)| (service.as_str().to_string(), serde_json::Value::from(&*why)))
            .collect();
        let lookups: Vec<_> = self.status().into_iter().map(lookup).collect();
        serde_json::json!({ "unreachable": unreachable, "lookups": lookups })
    }

    /// What keeps a service from being reached; none while it is connected.
    pub fn trouble(&self) -> Vec<(ControlService, Arc<str>)> {
        let services = [(ControlService::Destination, &self.destination), (ControlService::Policy, &self.policy)];
        services.into_iter().filter_map(|(name, service)| Some((name, service.client.trouble()?))).collect()
    }

    fn watch_policy(&self, target: &Target) -> Subscription<outbound_api::OutboundPolicy> {
        use outbound_api::{TrafficSpec, traffic_spec};
        let target_spec = match target {
            Target::Addr(addr) => traffic_spec::Target::Addr((*addr).into()),
            Target::Name(..) => traffic_spec::Target::Authority(target.to_string()),
        };
        let spec = TrafficSpec { source_workload: self.config.workload.clone(), target: Some(target_spec) };
        let client = OutboundPoliciesClient::with_origin(self.policy.client.clone(), self.policy.origin.clone());
        let record = self.registry.record("OutboundPolicies.Watch", target.to_string());
        let call = stream::call(move || {
            let (mut client, spec) = (client.clone(), spec.clone());
            async move { client.watch(spec).await }
        });
        Subscription::new(self.policy.settings(Resume::AtOnce), record, call)
    }

    /// None where profiles are not looked up (behaviour.md D.1).
    fn watch_profile(&self, target: &Target) -> Option<Subscription<destination_api::DestinationProfile>> {
        let wanted = match target {
            Target::Addr(addr) => self.outbound.profile_networks.iter().any(|net| net.contains(&addr.ip())),
            Target::Name(name, _) => self.outbound.profile_suffixes.matches(name),
        };
        if !wanted {
            return None;
        }
        let request = self.destination_request(target.to_string());
        let client = DestinationClient::with_origin(self.destination.client.clone(), self.destination.origin.clone());
        let record = self.registry.record("Destination.GetProfile", target.to_string());
        let call = stream::call(move || {
            let (mut client, request) = (client.clone(), request.clone());
            async move { client.get_profile(request).await }
        });
        Some(Subscription::new(self.destination.settings(Resume::AtOnce), record, call))
    }

    fn destination_request(&self, path: String) -> destination_api::GetDestination {
        let context_token = self.config.destination_context.clone();
        destination_api::GetDestination { scheme: String::new(), path, context_token }
    }
}

impl Source for Control {
    fn watch_server(&self, port: u16) -> watch::Receiver<Arc<ServerPolicy>> {
        self.ports.watch(port)
    }

    fn watch_client(
        &self,
        target: Target,
    ) -> BoxFuture<'static, Result<watch::Receiver<Arc<ClientPolicy>>, DiscoveryError>> {
        let (policy_client, destination_client) = (self.policy.client.clone(), self.destination.client.clone());
        let discovery = Discovery {
            policy: self.watch_policy(&target),
            profile: self.watch_profile(&target),
            target: target.clone(),
            detect_timeout: self.outbound.detect_timeout,
            trouble: Box::new(move || policy_client.trouble().or_else(|| destination_client.trouble())),
        };
        let (tx, rx) = oneshot::channel();
        let looking_up = AbortOnDrop::new(&self.runtime.spawn(discovery.run(tx)));
        Box::pin(async move {
            let answer = rx.await;
            looking_up.detach();
            answer.unwrap_or_else(|_| {
                let reason = "the proxy is shutting down".into();
                Err(DiscoveryError::Unavailable { target, after: Duration::ZERO, reason })
            })
        })
    }

    fn watch_service_profile(&self, name: &str, port: u16) -> Option<watch::Receiver<profile::Known>> {
        let target = Target::Name(name.into(), port);
        let subscription = self.watch_profile(&target)?;
        let (tx, rx) = watch::channel(None);
        self.runtime.spawn(profile::run(target, subscription, tx));
        Some(rx)
    }

    fn resolve(&self, discovery: &str) -> Resolution {
        let request = self.destination_request(discovery.to_string());
        let client = DestinationClient::with_origin(self.destination.client.clone(), self.destination.origin.clone());
        let record = self.registry.record("Destination.Get", discovery.to_string());
        let (unheard, connection) = (record.outage(), self.destination.client.clone());
        let call = stream::call(move || {
            let (mut client, request) = (client.clone(), request.clone());
            async move { client.get(request).await }
        });
        let subscription = Subscription::new(self.destination.settings(Resume::AfterBackoff), record, call);
        let (tx, rx) = mpsc::channel(resolve::UPDATES);
        self.runtime.spawn(resolve::run(subscription, tx));
        Resolution { updates: rx, stale: Arc::new(move || connection.trouble().or_else(&unheard)) }
    }
}

impl Service {
    fn settings(&self, resume: Resume) -> Settings {
        let connected = self.client.connected();
        Settings { limits: self.limits, backoff: self.backoff, resume, connected, random: stream::random }
    }
}

/// The configured limits. Silence always has one.
fn limits(config: &config::Control) -> Limits {
    let idle = config.stream_idle_timeout.unwrap_or(STALL_LIMIT);
    let initial = config.stream_initial_timeout.unwrap_or(idle);
    Limits { initial: Some(initial), idle: Some(idle), lifetime: config.stream_lifetime }
}

fn watch_port(policy: Service, workload: String, registry: Arc<Registry>) -> Subscribe {
    Box::new(move |port| {
        let spec = inbound_api::PortSpec { workload: workload.clone(), port: u32::from(port) };
        let client = InboundServerPoliciesClient::with_origin(policy.client.clone(), policy.origin.clone());
        let call = stream::call(move || {
            let (mut client, spec) = (client.clone(), spec.clone());
            async move { client.watch_port(spec).await }
        });
        let record = registry.record("InboundServerPolicies.WatchPort", port.to_string());
        Subscription::new(policy.settings(Resume::AtOnce), record, call)
    })
}

#[cfg(test)]
mod tests {
    use super::{
        stream::{Call, tests::End},
        *,
    };
    use futures_util::{FutureExt, StreamExt};
    use std::collections::VecDeque;
    use tonic::{Code, Status};

    /// An inbound configuration, for tests.
    pub(super) fn inbound_config() -> config::Inbound {
        config::Inbound {
            listen: config::Listen {
                addr: "127.0.0.1:4143".parse().unwrap(),
                setting: "TEST",
                keepalive: None,
                user_timeout: None,
                backlog: 1,
            },
            ips: Arc::default(),
            ports: BTreeSet::new(),
            default_policy: config::DefaultPolicy::AllUnauthenticated,
            cluster_networks: vec!["10.0.0.0/8".parse().unwrap()],
            opaque_ports: [3306].into(),
            detect_timeout: Duration::from_secs(10),
            queue: config::Queue { capacity: 1, failfast_timeout: Duration::from_secs(1) },
            max_in_flight: 1,
            discovery_idle_timeout: Duration::from_secs(90),
            profile_timeout: Duration::from_millis(500),
            connect: client::tests::connect_config(),
            http1: config::Http1Client { max_idle: 1, idle_timeout: Duration::from_secs(3) },
            http2_client: Default::default(),
            http_server: http_server(),
            authority_labels: false,
            profile_suffixes: config::Suffixes::default(),
        }
    }

    fn http_server() -> config::HttpServer {
        config::HttpServer {
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
        }
    }

    fn outbound_config() -> config::Outbound {
        config::Outbound {
            listen: vec![],
            tcp_queue: config::Queue { capacity: 1, failfast_timeout: Duration::from_secs(3) },
            http_queue: config::Queue { capacity: 1, failfast_timeout: Duration::from_secs(3) },
            max_in_flight: 1,
            discovery_idle_timeout: Duration::from_secs(5),
            detect_timeout: Duration::from_secs(10),
            connect: client::tests::connect_config(),
            http1: config::Http1Client { max_idle: 1, idle_timeout: Duration::from_secs(3) },
            http2_client: Default::default(),
            http_server: http_server(),
            informational_headers: true,
            ingress_mode: false,
            hostname_labels: false,
            profile_suffixes: config::Suffixes(vec!["svc.cluster.local.".into()]),
            profile_networks: vec!["10.0.0.0/8".parse().unwrap()],
            explicit: false,
        }
    }

    /// Settings of subscriptions without limits, for tests.
    pub(super) fn settings(resume: Resume) -> Settings {
        let backoff = Backoff { min: Duration::from_millis(100), max: Duration::from_secs(60), jitter: 0.0 };
        let (_, connected) = watch::channel(true);
        Settings { limits: Limits::default(), backoff, resume, connected, random: || 0.0 }
    }

    /// Streams with these messages and ends, one per call; further calls hang.
    pub(super) fn sequence<M: Send + Sync + Clone + 'static>(streams: Vec<(Vec<M>, End)>) -> Call<M> {
        let mut streams: VecDeque<_> = streams.into();
        Box::new(move || match streams.pop_front() {
            None => std::future::pending().boxed(),
            Some((messages, end)) => {
                let said = futures_util::stream::iter(messages.into_iter().map(Ok));
                let stream = match end {
                    End::Clean => said.boxed(),
                    End::Error(code) => {
                        said.chain(futures_util::stream::iter([Err(Status::new(code, "over"))])).boxed()
                    }
                    End::Never => said.chain(futures_util::stream::pending()).boxed(),
                };
                std::future::ready(Ok(stream)).boxed()
            }
        })
    }

    /// Every call has these messages and this end.
    pub(super) fn says<M: Send + Sync + Clone + 'static>(messages: Vec<M>, end: End) -> Call<M> {
        Box::new(move || {
            let mut one = sequence(vec![(messages.clone(), end)]);
            one()
        })
    }

    /// Every call fails.
    pub(super) fn fails<M: Send + 'static>(code: Code) -> Call<M> {
        Box::new(move || std::future::ready(Err(Status::new(code, "no"))).boxed())
    }

    fn start() -> Arc<Control> {
        let addr = || config::ControlAddr { host: "localhost.".into(), port: 1, identity: None };
        let control = config::Control {
            destination: addr(),
            destination_context: "ctx".into(),
            policy: addr(),
            workload: "ns:pod".into(),
            stream_initial_timeout: None,
            stream_idle_timeout: None,
            stream_lifetime: None,
            loopback_connect: client::tests::connect_config(),
            connect: client::tests::connect_config(),
        };
        let inbound = config::Inbound { ports: [8080].into(), ..inbound_config() };
        Control::start(Start {
            control: &control,
            inbound: &inbound,
            outbound: &outbound_config(),
            admin_port: 4191,
            is_gateway: true,
            dns: config::Dns::default(),
            secure: Arc::new(client::tests::NoTls),
            observer: Arc::new(()),
        })
    }

    #[tokio::test(start_paused = true)]
    async fn without_a_control_plane_defaults_hold_and_look_ups_end() {
        let control = start();
        let watched: Vec<_> = control.status().into_iter().map(|l| l.target).collect();
        assert_eq!(watched, ["4143", "4191", "8080"]);
        assert_eq!(control.watch_server(80).borrow().meta.name(), "all-unauthenticated");
        let target = Target::Addr("10.0.0.1:80".parse().unwrap());
        let found = control.watch_client(target).await;
        let Err(DiscoveryError::Unavailable { reason, .. }) = found else { panic!("{found:?}") };
        assert!(reason.contains("refused"), "{reason}");
        let json = control.status_json();
        assert!(json["unreachable"]["policy"].as_str().is_some_and(|why| why.contains("refused")), "{json}");
        assert_eq!(json["lookups"][0]["target"], "4143");
    }

    #[tokio::test]
    async fn profiles_are_looked_up_where_the_configuration_says() {
        let control = start();
        let check =
            |target: Target, expected| assert_eq!(control.watch_profile(&target).is_some(), expected, "{target}");
        check(Target::Addr("10.1.1.1:80".parse().unwrap()), true);
        check(Target::Addr("1.1.1.1:80".parse().unwrap()), false);
        check(Target::Name("web.shop.svc.cluster.local".into(), 80), true);
        check(Target::Name("example.com".into(), 80), false);
    }

    #[test]
    fn silence_has_a_limit_even_if_none_is_set() {
        let mut config = config::Control {
            destination: config::ControlAddr { host: "a".into(), port: 1, identity: None },
            destination_context: String::new(),
            policy: config::ControlAddr { host: "a".into(), port: 1, identity: None },
            workload: String::new(),
            stream_initial_timeout: None,
            stream_idle_timeout: None,
            stream_lifetime: None,
            loopback_connect: client::tests::connect_config(),
            connect: client::tests::connect_config(),
        };
        assert_eq!(limits(&config).initial, Some(STALL_LIMIT));
        config.stream_idle_timeout = Some(Duration::from_secs(300));
        assert_eq!(limits(&config).initial, Some(Duration::from_secs(300)));
        config.stream_initial_timeout = Some(Duration::from_secs(3));
        assert_eq!(limits(&config).initial, Some(Duration::from_secs(3)));
    }
}
