//! Connections that are passed on as bytes: opaque ones by the only route, TLS ones by SNI (behaviour.md D.9). Route and
//! backend are chosen once per connection; failures close it.

use super::{
    Runtime,
    concrete::{Concrete, Distribution, Replica, Replicas, Settings, Unready, random},
    connect::{Connector, Upstream},
    logical::{authority_label, distribution_of},
};
use crate::{
    error::{Cause, Error},
    http::route::match_hosts,
    policy::{
        self, ClientPolicy, Meta, Target,
        client::{self, Backend, Dispatcher, Protocol, Refuse, TcpRoute},
        route::HostMatch,
    },
    telemetry::{BalancerKind, ConnMetrics, ConnRouteMetrics, RouteLabels},
    transport::{Metered, io_failure},
};
use bytes::Bytes;
use linkerd_stack::{BoxedIo, Io, PrefixedIo, Ready, balance::LoadHandle, copy};
use std::{net::SocketAddr, sync::Arc, time::Duration};
use tokio::{io::AsyncWriteExt, net::TcpStream, time::Instant};

/// Replicas that are tried for a connection before its client is turned away.
const CONNECT_ATTEMPTS: usize = 3;

/// Latency that a failure to connect counts as, at the least.
const REFUSED_PENALTY: Duration = Duration::from_secs(1);

/// The routes of a destination for connections.
pub(super) struct TcpRoutes {
    context: Arc<str>,
    table: Table,
}

enum Table {
    Opaque(Option<Arc<Route>>),
    Tls(Vec<(Vec<HostMatch>, Arc<Route>)>),
    Invalid(Arc<str>),
}

/// A route, ready for connections.
pub(super) struct Route {
    rt: Arc<Runtime>,
    meta: Meta,
    parent: Meta,
    refuse: Option<Refuse>,
    backends: Distribution<RouteBackend>,
    metrics: Metrics,
}

enum Metrics {
    Opaque(Arc<ConnRouteMetrics>),
    Tls { metrics: Arc<ConnRouteMetrics>, by_name: bool },
}

struct RouteBackend {
    context: Arc<str>,
    refuse: Option<Refuse>,
    concrete: Arc<Concrete<TcpEndpoint>>,
}

/// A replica, for connections.
pub(super) struct TcpEndpoint {
    addr: SocketAddr,
    connector: Connector,
    ready: Ready,
}

impl Replica for TcpEndpoint {
    fn ready(&self) -> Ready {
        self.ready.clone()
    }

    fn unready(&self) -> Option<Unready> {
        None
    }

    fn refused_for(&self) -> Option<Duration> {
        self.connector.refused_for()
    }
}

/// A connection to a replica, with its share of the replica's load.
pub(super) struct Opened {
    upstream: Upstream,
    _load: LoadHandle,
}

/// The client's side of a connection.
pub(super) enum Client {
    /// A socket, what was read from it, and its metrics: its bytes can be moved by the kernel.
    Tcp(TcpStream, Bytes, Metered<(), ConnMetrics>),
    /// Anything else; counted already, if at all.
    Other(BoxedIo),
}

impl TcpRoutes {
    /// Whether an opaque connection could be made at all.
    pub(super) fn is_opaque(&self) -> bool {
        matches!(&self.table, Table::Opaque(Some(route)) if route.refuse.is_none())
    }

    /// The route of a connection; `sni` is what a TLS client asked for.
    ///
    /// # Errors
    /// [`Cause::NoRoute`], or [`Cause::InvalidPolicy`].
    pub(super) fn route(&self, sni: Option<&str>) -> Result<Arc<Route>, Error> {
        let found = match &self.table {
            Table::Opaque(route) => route.clone(),
            Table::Tls(routes) => {
                // The first of the best: a later one must be strictly better.
                let ranked = routes.iter().filter_map(|(hosts, route)| Some((match_hosts(hosts, sni)?, route)));
                ranked.rev().max_by_key(|(rank, _)| *rank).map(|(_, route)| route.clone())
            }
            Table::Invalid(why) => {
                return Err(Error::new(Cause::InvalidPolicy(why.clone())).context(self.context.clone()));
            }
        };
        found.ok_or_else(|| Error::new(Cause::NoRoute).context(self.context.clone()))
    }
}

impl Route {
    /// Connects to a replica of a backend.
    ///
    /// # Errors
    /// Refusals of policy, [`Cause::FailFast`] and [`Cause::LoadShed`], and failures to connect.
    pub(super) async fn open(&self) -> Result<Opened, Error> {
        let context = |error: Error| error.context(format!("route {}", self.meta));
        if let Some(refuse) = &self.refuse {
            return Err(context(refused(refuse)));
        }
        let backend = self.backends.pick(|b| is_open(&b.concrete), random);
        let Some(backend) = backend else {
            let message = "the route has no backend with a weight above 0".into();
            let status = http::StatusCode::SERVICE_UNAVAILABLE;
            return Err(context(Cause::FailBackend { status, grpc_code: 14, message }.into()));
        };
        backend.open().await.map_err(|error| context(error.context(backend.context.clone())))
    }

    /// Forwards a connection until both ends are done.
    ///
    /// # Errors
    /// As [`Route::open`], or when either side breaks.
    pub(super) async fn forward(
        &self,
        client: Client,
        ahead: Option<(Opened, Bytes)>,
        sni: Option<&str>,
    ) -> Result<(), Error> {
        let metrics = match &self.metrics {
            Metrics::Opaque(metrics) | Metrics::Tls { metrics, by_name: false } => metrics.clone(),
            Metrics::Tls { by_name: true, .. } => self.rt.telemetry.tls_route(&RouteLabels {
                parent: self.parent.clone(),
                route: self.meta.clone(),
                hostname: sni.map(Into::into),
            }),
        };
        metrics.open();
        let result = self.copy(client, ahead).await;
        metrics.close(result.as_ref().err().map(Error::cause));
        result
    }

    async fn copy(&self, client: Client, ahead: Option<(Opened, Bytes)>) -> Result<(), Error> {
        let (opened, speech) = match ahead {
            Some(ahead) => ahead,
            None => match self.open().await {
                Ok(opened) => (opened, Bytes::new()),
                Err(error) => {
                    if let (Cause::Forbidden(_), Client::Tcp(io, ..)) = (error.cause(), &client) {
                        // The client is told by a reset that this was no ordinary end.
                        let _ = socket2::SockRef::from(io).set_linger(Some(Duration::ZERO));
                    }
                    return Err(error);
                }
            },
        };
        match (client, opened.upstream) {
            (Client::Tcp(io, read, src), Upstream::Plain(server, metrics)) => {
                let dst = Metered::new((), metrics);
                splice(io, &read, src, server, &speech, dst).await
            }
            (Client::Tcp(io, read, src), upstream) => {
                let io = src.around(PrefixedIo::new(read, io));
                duplex(io, PrefixedIo::new(speech, upstream.boxed())).await
            }
            (Client::Other(io), upstream) => duplex(io, PrefixedIo::new(speech, upstream.boxed())).await,
        }
    }
}

async fn duplex(client: impl Io, server: impl Io) -> Result<(), Error> {
    copy::duplex(client, server).await.map(|_| ()).map_err(|error| io_failure(&error))
}

/// Copies between plain sockets, what was read from them first.
async fn splice(
    mut client: TcpStream,
    read: &[u8],
    mut src: Metered<(), ConnMetrics>,
    mut server: TcpStream,
    speech: &[u8],
    mut dst: Metered<(), ConnMetrics>,
) -> Result<(), Error> {
    let (src_meter, dst_meter) = (src.meter().clone(), dst.meter().clone());
    let moved = |direction, bytes| match direction {
        copy::Direction::Forth => {
            src_meter.read(bytes);
            dst_meter.written(bytes);
        }
        copy::Direction::Back => {
            dst_meter.read(bytes);
            src_meter.written(bytes);
        }
    };
    let copied = async {
        if !speech.is_empty() {
            client.write_all(speech).await?;
            moved(copy::Direction::Back, speech.len() as u64);
        }
        copy::tcp(&mut client, &mut server, read, &moved).await
    };
    match copied.await {
        Ok(_) => Ok(()),
        Err(error) => {
            src.failed(&error);
            dst.failed(&error);
            Err(io_failure(&error))
        }
    }
}

impl RouteBackend {
    async fn open(&self) -> Result<Opened, Error> {
        if let Some(refuse) = &self.refuse {
            return Err(refused(refuse));
        }
        let replicas = match &*self.concrete {
            Concrete::Replicas(replicas) => replicas,
            Concrete::Fail(failure) => {
                return Err(Cause::FailBackend {
                    status: failure.status,
                    grpc_code: failure.grpc_code,
                    message: failure.message.clone(),
                }
                .into());
            }
        };
        // Nothing has been sent yet, so another replica may be tried without harm.
        let mut attempts = 0;
        loop {
            attempts += 1;
            let picked = replicas.acquire().await?;
            let started = Instant::now();
            match picked.service.connector.open(None).await {
                Ok(upstream) => {
                    picked.load.observe(started.elapsed());
                    return Ok(Opened { upstream, _load: picked.load });
                }
                Err(error) => {
                    // The one that failed must not look like the fastest.
                    picked.load.penalize(started.elapsed().max(REFUSED_PENALTY));
                    let error = error.context(format!("endpoint {}", picked.service.addr));
                    if attempts >= CONNECT_ATTEMPTS.min(replicas.balance.len()) {
                        return Err(error);
                    }
                    tracing::debug!(%error, "trying another endpoint");
                }
            }
        }
    }
}

impl Opened {
    /// The connection itself.
    pub(super) fn into_io(self) -> BoxedIo {
        self.upstream.boxed()
    }

    /// What the server says first.
    ///
    /// # Errors
    /// When it closes, or the connection breaks.
    pub(super) async fn read_first(&mut self, buf: &mut bytes::BytesMut) -> std::io::Result<usize> {
        use tokio::io::AsyncReadExt;
        match &mut self.upstream {
            Upstream::Plain(io, _) => io.read_buf(buf).await,
            Upstream::Tls(io) => io.read_buf(buf).await,
        }
    }
}

fn is_open(concrete: &Concrete<TcpEndpoint>) -> bool {
    match concrete {
        Concrete::Replicas(replicas) => replicas.is_open(),
        Concrete::Fail(_) => true,
    }
}

fn refused(refuse: &Refuse) -> Error {
    match refuse {
        Refuse::Forbidden => Cause::Forbidden("policy forbids connections to this destination".into()).into(),
        Refuse::Invalid(why) => Cause::InvalidPolicy(why.clone()).into(),
    }
}

/// Makes [`TcpRoutes`] of policies, and keeps backends that stay the same.
pub(super) struct Builder {
    rt: Arc<Runtime>,
    target: Target,
    backends: Vec<(BackendKey, Arc<Concrete<TcpEndpoint>>)>,
}

#[derive(Clone, PartialEq)]
struct BackendKey {
    parent: Meta,
    backend: Backend,
    tls: bool,
}

impl Builder {
    pub(super) fn new(rt: Arc<Runtime>, target: Target) -> Self {
        Self { rt, target, backends: Vec::new() }
    }

    /// The routes of a policy; none if it has no part for connections.
    pub(super) fn build(&mut self, policy: &ClientPolicy) -> Option<TcpRoutes> {
        let mut kept = Vec::new();
        let table = match &policy.protocol {
            Protocol::Detect { opaque, .. } | Protocol::Opaque(opaque) => {
                let route = opaque.route.as_ref();
                Table::Opaque(route.map(|route| Arc::new(self.route(policy, route, false, &mut kept))))
            }
            Protocol::Tls(tls) => {
                let route = |(names, route): &(Vec<HostMatch>, TcpRoute)| {
                    (names.clone(), Arc::new(self.route(policy, route, true, &mut kept)))
                };
                Table::Tls(tls.routes.iter().map(route).collect())
            }
            Protocol::Invalid(why) => Table::Invalid(why.clone()),
            Protocol::Http1(_) | Protocol::Http2(_) | Protocol::Grpc(_) => return None,
        };
        self.backends = kept;
        Some(TcpRoutes { context: format!("logical service {}", policy.parent).into(), table })
    }

    /// For policies without a part for connections.
    pub(super) fn none(policy: &ClientPolicy) -> TcpRoutes {
        TcpRoutes { context: format!("logical service {}", policy.parent).into(), table: Table::Opaque(None) }
    }

    fn route(
        &self,
        policy: &ClientPolicy,
        route: &TcpRoute,
        tls: bool,
        kept: &mut Vec<(BackendKey, Arc<Concrete<TcpEndpoint>>)>,
    ) -> Route {
        let rt = &self.rt;
        let labels = || RouteLabels { parent: policy.parent.clone(), route: route.meta.clone(), hostname: None };
        let metrics = if tls {
            Metrics::Tls { metrics: rt.telemetry.tls_route(&labels()), by_name: rt.config.hostname_labels }
        } else {
            let (ip, port) = match &self.target {
                Target::Addr(addr) => (addr.ip().to_string(), addr.port()),
                Target::Name(_, port) => (String::new(), *port),
            };
            Metrics::Opaque(rt.telemetry.tcp_route(&policy.parent, &route.meta, &ip, port))
        };
        let backends = distribution_of(&route.backends, |backend: &client::RouteBackend<Refuse>| RouteBackend {
            context: format!("backend {}", backend.backend.meta).into(),
            refuse: backend.filters.first().cloned(),
            concrete: self.concrete(policy, &backend.backend, tls, kept),
        });
        Route {
            rt: rt.clone(),
            meta: route.meta.clone(),
            parent: policy.parent.clone(),
            refuse: route.refuse.clone(),
            backends,
            metrics,
        }
    }

    fn concrete(
        &self,
        policy: &ClientPolicy,
        backend: &Backend,
        tls: bool,
        kept: &mut Vec<(BackendKey, Arc<Concrete<TcpEndpoint>>)>,
    ) -> Arc<Concrete<TcpEndpoint>> {
        let key = BackendKey { parent: policy.parent.clone(), backend: backend.clone(), tls };
        let find = |known: &[(BackendKey, Arc<Concrete<TcpEndpoint>>)]| {
            known.iter().find(|(k, _)| *k == key).map(|(_, concrete)| concrete.clone())
        };
        if let Some(concrete) = find(kept) {
            return concrete;
        }
        let old = find(&self.backends).filter(|concrete| concrete.is_usable());
        let concrete = old.unwrap_or_else(|| Arc::new(self.make(policy, backend, tls)));
        kept.push((key, concrete.clone()));
        concrete
    }

    fn make(&self, policy: &ClientPolicy, backend: &Backend, tls: bool) -> Concrete<TcpEndpoint> {
        let rt = &self.rt;
        let queue = rt.config.tcp_queue;
        let replica = |rt: &Arc<Runtime>, endpoint: &policy::Endpoint, authority| TcpEndpoint {
            addr: endpoint.addr,
            connector: Connector::new(rt, endpoint, authority),
            ready: Ready::new(true),
        };
        match &backend.dispatcher {
            Dispatcher::Fail(failure) => Concrete::Fail(failure.clone()),
            Dispatcher::Forward(endpoint) => {
                let settings = Settings { load: client::Load::default(), queue, observer: Arc::new(()) };
                Concrete::Replicas(Replicas::known(endpoint, settings, replica(rt, endpoint, None)))
            }
            Dispatcher::Balance { discovery, load } => {
                let labels = if tls {
                    BalancerKind::OutboundTls { concrete: discovery.clone() }
                } else {
                    BalancerKind::OutboundTcp {
                        parent: policy.parent.clone(),
                        backend: backend.meta.clone(),
                        logical: policy.logical.clone().unwrap_or_else(|| self.target.to_string().into()),
                        concrete: discovery.clone(),
                    }
                };
                let observer = rt.telemetry.balancer(&labels, queue.failfast_timeout);
                let settings = Settings { load: load.clone(), queue, observer };
                // metrics.md 3.2: the logical service for opaque connections, nothing for TLS routes.
                let authority = policy.logical.as_deref().filter(|_| !tls).map(authority_label);
                let owned = rt.clone();
                let build = move |endpoint: &policy::Endpoint| replica(&owned, endpoint, authority.clone());
                Concrete::Replicas(Replicas::discovered(rt, discovery, settings, build))
            }
        }
    }
}
