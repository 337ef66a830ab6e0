//! Traffic away from the local application: found out where it goes, routed, balanced, retried within limits, and sent
//! over mutual TLS where the other side has a proxy too.

mod concrete;
mod connect;
mod discover;
mod endpoint;
mod http;
mod limits;
mod live;
mod logical;
mod mirror;
mod opaque;
mod params;
mod protocol;
mod retry;
mod rule;
mod session;
mod status;
#[cfg(test)]
mod tests;
mod tracked;

use self::{
    discover::{Discover, Found},
    http::{Edge, Named, Routing},
    opaque::Client,
    protocol::{Early, Ingress, Spoken},
};
use crate::{
    config,
    error::{Cause, Error},
    gateway,
    http::{Asked, Rescue, settings},
    policy::{
        Source, Target,
        authz::{ClientTls, NoTls},
    },
    telemetry::{ConnLabels, ConnMetrics, Direction, Peer, Telemetry, TlsLabels, termination::Phase},
    transport::{Accepted, BoundListener, Metered, orig_dst},
};
use ::http::{Request, Response};
use futures_util::future::BoxFuture;
use linkerd_stack::{
    BoxService, BoxedIo, PrefixedIo, drain,
    http::{Body, ServerConfig, Version, client::OnReplay, serve},
    limit::ConcurrencyLimit,
    rate::Limiter,
};
use linkerd_tls::identity::Reader;
use std::{
    collections::HashSet,
    net::{IpAddr, SocketAddr},
    num::NonZeroU32,
    sync::Arc,
    time::Duration,
};
use tokio::{net::TcpStream, sync::OnceCell};

/// Failures that are logged for everybody to see, per second; the rest is logged for debugging.
const LOGGED_PER_SECOND: NonZeroU32 = NonZeroU32::new(10).expect("10 is not 0");

/// The outbound half of the proxy. Clones are the same.
#[derive(Clone)]
pub struct Outbound {
    rt: Arc<Runtime>,
    discover: Arc<Discover>,
}

/// How long the first bytes of a connection are waited for only to say that its destination is unknown. A client that
/// speaks first has long spoken by then.
const UNKNOWN_DETECT: Duration = Duration::from_secs(1);

/// What every stage shares.
struct Runtime {
    config: config::Outbound,
    /// The workload's own addresses.
    local_ips: Arc<HashSet<IpAddr>>,
    identity: Option<Reader>,
    source: Arc<dyn Source>,
    telemetry: Telemetry,
    server: ServerConfig,
    rescue: Rescue,
    in_flight: ConcurrencyLimit,
    log_limit: Limiter,
    /// Counts requests that were sent once more.
    on_replay: OnReplay,
}

impl Runtime {
    /// Whether an address is the workload's own: such an endpoint is spoken to as the application itself
    /// (behaviour.md A.1). With explicit listeners the endpoints of other workloads may be on loopback addresses.
    fn is_local(&self, addr: SocketAddr) -> bool {
        self.local_ips.contains(&addr.ip()) && !(self.config.explicit && addr.ip().is_loopback())
    }

    /// Whether an address must not be dialled: loopback addresses lead back (contract.md 6.3), and so do the own
    /// listeners.
    fn refuses(&self, addr: SocketAddr) -> bool {
        let listens = |listen: &config::Listen| {
            listen.addr.port() == addr.port() && (listen.addr.ip() == addr.ip() || self.local_ips.contains(&addr.ip()))
        };
        (addr.ip().is_loopback() && !self.config.explicit) || self.config.listen.iter().any(listens)
    }
}

impl Outbound {
    /// An outbound half that serves nothing yet. `local_ips` are the workload's own addresses; without an identity
    /// nothing is encrypted.
    pub fn new(
        config: &config::Outbound,
        local_ips: Arc<HashSet<IpAddr>>,
        identity: Option<Reader>,
        source: Arc<dyn Source>,
        telemetry: Telemetry,
    ) -> Self {
        let replays = telemetry.replays(Direction::Outbound);
        let rt = Arc::new(Runtime {
            on_replay: Arc::new(move || replays.inc()),
            local_ips,
            identity,
            source,
            telemetry,
            server: settings::server(&config.http_server),
            rescue: http::rescue(config),
            in_flight: ConcurrencyLimit::new(config.max_in_flight),
            log_limit: Limiter::new(LOGGED_PER_SECOND),
            config: config.clone(),
        });
        Self { discover: Arc::new(Discover::new(rt.clone())), rt }
    }

    /// Serves a listener until the drain begins; connections go on until they end. Dropping the future stops
    /// accepting.
    pub async fn serve(self, listener: BoundListener, drain: drain::Watch) {
        loop {
            let accepted = tokio::select! {
                biased;
                () = drain.signaled() => return,
                accepted = listener.accept() => accepted,
            };
            let (this, drain) = (self.clone(), drain.clone());
            tokio::spawn(async move { this.connection(accepted, drain).await });
        }
    }

    async fn connection(self, accepted: Accepted, drain: drain::Watch) {
        let (client, local) = (accepted.client, accepted.local);
        let target = match original(&accepted) {
            Ok(target) => Some(target),
            Err(_) if self.rt.config.explicit => None,
            Err(error) => {
                let code = error.code(Phase::Accept);
                self.rt.telemetry.terminated(Direction::Outbound, code);
                tracing::warn!(%client, %code, %error, "connection without a destination dropped");
                return;
            }
        };
        if let Err(error) = self.run(accepted.io, client, target, drain).await {
            let at = target.unwrap_or(local);
            if *error.cause() == Cause::Canceled {
                tracing::debug!(%client, target = %at, "client closed without a word");
                return;
            }
            let code = error.code(Phase::Response);
            self.rt.telemetry.outbound_tcp_errors(at).failed(error.cause());
            self.rt.telemetry.terminated(Direction::Outbound, code);
            if self.rt.log_limit.check().is_ok() {
                tracing::info!(%client, target = %at, %code, %error, "connection closed");
            } else {
                tracing::debug!(%client, target = %at, %code, %error, "connection closed");
            }
        }
    }

    /// A connection meets, first to last: metrics, discover, protocol, and then http, tls or opaque, which go on through
    /// logical (routes), concrete (backend) and endpoint to connect.
    async fn run(
        &self,
        mut io: TcpStream,
        client: SocketAddr,
        target: Option<SocketAddr>,
        drain: drain::Watch,
    ) -> Result<(), Error> {
        let counted = Metered::new((), self.accepted(target));
        let Some(target) = target else { return Box::pin(self.explicit(io, client, counted, drain)).await };
        if self.rt.config.ingress_mode {
            return Box::pin(self.ingress(io, client, counted, target, drain)).await;
        }
        let found = match self.discover.find(Target::Addr(target)).await {
            Ok(found) => found,
            Err(error) => return Box::pin(self.unknown(io, client, counted, error, drain)).await,
        };
        // In boxes, so that a connection has memory for the stage that it is in, and none for those behind it.
        let spoken = Box::pin(protocol::decide(&self.rt, &found, &mut io)).await;
        let serving: BoxFuture<'_, _> = match spoken.map_err(|error| error.during(Phase::Detect))? {
            Spoken::Http(version, read) => {
                let routing = Routing::Fixed(Arc::new(found));
                Box::pin(self.http(version, counted.around(PrefixedIo::new(read, io)), client, routing, drain))
            }
            Spoken::Tls(sni, read) => Box::pin(async move {
                let route = found.tcp().get().route(Some(&sni))?;
                route.forward(Client::Tcp(io, read, counted), None, Some(&sni)).await
            }),
            Spoken::Opaque(read, early) => {
                Box::pin(async move { opaque(&found, Client::Tcp(io, read, counted), early).await })
            }
        };
        serving.await
    }

    /// A connection to a destination that could not be looked up. Clients that speak HTTP are told why; the connection
    /// ends with the answer, since the next look-up may go better.
    async fn unknown(
        &self,
        mut io: TcpStream,
        client: SocketAddr,
        counted: Metered<(), ConnMetrics>,
        error: Error,
        drain: drain::Watch,
    ) -> Result<(), Error> {
        match protocol::http(UNKNOWN_DETECT.min(self.rt.config.detect_timeout), &mut io).await {
            Ok((Some(version), read)) => {
                let io = counted.around(PrefixedIo::new(read, io));
                Box::pin(self.http(version, io, client, Routing::Unknown(error), drain)).await
            }
            Ok((None, _)) | Err(_) => Err(error),
        }
    }

    /// Serves HTTP on a connection.
    async fn http(
        &self,
        version: Version,
        io: Metered<PrefixedIo<TcpStream>, ConnMetrics>,
        client: SocketAddr,
        routing: Routing,
        drain: drain::Watch,
    ) -> Result<(), Error> {
        let edge = Edge::new(self.rt.clone(), client, routing);
        if let Err(error) = serve(&self.rt.server, version, io, edge, drain).await {
            // The requests' own failures have been told and counted; what is left is the client's.
            tracing::debug!(%error, "HTTP connection ended");
        }
        Ok(())
    }

    /// Clients that know they talk to a proxy: requests name their destination.
    async fn explicit(
        &self,
        mut io: TcpStream,
        client: SocketAddr,
        counted: Metered<(), ConnMetrics>,
        drain: drain::Watch,
    ) -> Result<(), Error> {
        let (version, read) = protocol::http(self.rt.config.detect_timeout, &mut io).await?;
        let Some(version) = version else {
            let why = "the connection was not redirected (see `linkerd-proxy redirect`), so it must be an HTTP request \
                       that names its destination: in absolute form, by CONNECT, or by Host";
            return Err(Cause::BadRequest(why.into()).into());
        };
        let routing = Routing::Explicit(Named::new(self.discover.clone()));
        Box::pin(self.http(version, counted.around(PrefixedIo::new(read, io)), client, routing, drain)).await
    }

    /// Ingress mode (behaviour.md D.15): always HTTP if it looks so, else opaque by the original destination.
    async fn ingress(
        &self,
        mut io: TcpStream,
        client: SocketAddr,
        counted: Metered<(), ConnMetrics>,
        target: SocketAddr,
        drain: drain::Watch,
    ) -> Result<(), Error> {
        let find = self.discover.find(Target::Addr(target));
        match protocol::ingress(&self.rt, find, &mut io).await? {
            Ingress::Http(version, read) => {
                let routing = Routing::Ingress(Named::new(self.discover.clone()), Target::Addr(target));
                Box::pin(self.http(version, counted.around(PrefixedIo::new(read, io)), client, routing, drain)).await
            }
            Ingress::Opaque(found, read, early) => opaque(&found, Client::Tcp(io, read, counted), early).await,
        }
    }

    fn accepted(&self, target: Option<SocketAddr>) -> Arc<ConnMetrics> {
        self.rt.telemetry.conn(ConnLabels {
            direction: Direction::Outbound,
            peer: Peer::Src,
            target,
            tls: TlsLabels::Accepted(ClientTls::None(NoTls::Loopback)),
            srv: None,
            authority: None,
            dst: None,
        })
    }

    /// A service for the requests to one target; it is looked up with the first request.
    pub fn http_for(&self, target: Target) -> BoxService<Request<Body>, Response<Body>, Error> {
        let (rt, discover) = (self.rt.clone(), self.discover.clone());
        let found: Arc<OnceCell<Found>> = Arc::default();
        BoxService::from_fn(move |req: Request<Body>| {
            let (rt, discover, found, target) = (rt.clone(), discover.clone(), found.clone(), target.clone());
            async move {
                let asked = Asked::of(&req);
                let found = found.get_or_try_init(|| discover.find(target)).await?;
                let slot = rt.in_flight.acquire().await;
                let rsp = http::call(found, req, &asked).await?;
                drop(slot);
                Ok(http::finish(&rt, rsp, &asked))
            }
        })
    }

    /// Forwards a connection to a target until both ends are done.
    ///
    /// # Errors
    /// When the target is not found or refuses, or either side breaks.
    pub async fn opaque_for(&self, target: Target, io: BoxedIo) -> Result<(), Error> {
        let found = self.discover.find(target).await?;
        opaque(&found, Client::Other(io), None).await
    }
}

impl gateway::Outbound for Outbound {
    fn http(&self, target: Target) -> BoxService<Request<Body>, Response<Body>, Error> {
        self.http_for(target)
    }

    fn opaque(&self, target: Target, io: BoxedIo) -> BoxFuture<'static, Result<(), Error>> {
        let this = self.clone();
        Box::pin(async move { this.opaque_for(target, io).await })
    }
}

/// Forwards a connection, over what was opened for it already if anything was.
async fn opaque(found: &Found, client: Client, early: Option<Early>) -> Result<(), Error> {
    match early {
        Some((route, opened, speech)) => route.forward(client, Some((opened, speech)), None).await,
        None => found.tcp().get().route(None)?.forward(client, None, None).await,
    }
}

/// Where the application meant to go.
///
/// # Errors
/// [`Cause::Loop`] for connections made to this proxy's own listener, [`Cause::Io`] without an original destination.
fn original(accepted: &Accepted) -> Result<SocketAddr, Error> {
    let target = orig_dst(&accepted.io).map_err(|error| {
        crate::transport::io_failure(&error)
            .context("no original destination; redirect the workload's traffic with `linkerd-proxy redirect`")
    })?;
    // Nothing was redirected: the client dialled the listener itself.
    if target == accepted.local {
        return Err(Cause::Loop(target).into());
    }
    Ok(target)
}
