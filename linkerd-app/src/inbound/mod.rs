//! Traffic towards the local application.
//!
//! A connection meets, first to last: accept (original destination, policy of the port) → tls (detect, terminate, pass
//! on; or direct: transport header) → detect (HTTP, or opaque) → authorize → http | opaque → the application.

mod accept;
mod denial;
mod detect;
mod direct;
mod first;
pub mod http;
mod limits;
mod local;
mod opaque;
pub mod policy;
mod tls;

use self::{accept::Conn, detect::Protocol, local::Locals, tls::Secured};
use crate::{
    config,
    error::{Cause, Error},
    gateway::Gateway,
    policy::Source,
    telemetry::Telemetry,
    transport::{Accepted, BoundListener},
};
use linkerd_stack::drain;
use linkerd_tls::identity::Reader;
use std::{net::SocketAddr, sync::Arc};
use tokio::{select, sync::Semaphore};

/// Connections to the application that may be opened while their clients have said nothing yet. More silent clients
/// than that wait for the timeout as if the application never spoke first.
const MAX_EARLY_DIALS: usize = 1024;

/// The inbound half of the proxy.
pub struct Inbound {
    cfg: config::Inbound,
    identity: Option<Reader>,
    guard: Arc<http::Guard>,
    locals: Locals,
    gateway: Option<Gateway>,
    telemetry: Telemetry,
    early_dials: Arc<Semaphore>,
}

impl Inbound {
    /// Starts to watch the ports named in the configuration, `admin_port`, and in gateway mode the inbound port. Without
    /// an identity, no TLS is terminated.
    pub fn new(
        cfg: &config::Inbound,
        gateway: Option<Gateway>,
        identity: Option<Reader>,
        source: Arc<dyn Source>,
        telemetry: Telemetry,
        admin_port: u16,
    ) -> Arc<Self> {
        let own = cfg.listen.addr.port();
        let pinned = cfg.ports.iter().copied().chain([admin_port]).chain(gateway.is_some().then_some(own));
        let ports = policy::Ports::new(source, cfg.discovery_idle_timeout, pinned);
        Arc::new(Self {
            guard: Arc::new(http::Guard::new(ports, telemetry.clone(), cfg.authority_labels)),
            locals: Locals::new(cfg, telemetry.clone()),
            early_dials: Arc::new(Semaphore::new(MAX_EARLY_DIALS)),
            cfg: cfg.clone(),
            identity,
            gateway,
            telemetry,
        })
    }

    /// Authorization of HTTP requests by the policy of a port, for servers of the proxy itself.
    pub fn guard(&self) -> &Arc<http::Guard> {
        &self.guard
    }

    /// Accepts connections until the drain begins; those that exist go on. Nothing is accepted before there is a
    /// certificate.
    pub async fn serve(self: Arc<Self>, listener: BoundListener, drain: drain::Watch) {
        if let Some(identity) = &self.identity {
            select! {
                () = identity.ready() => {}
                () = drain.signaled() => return,
            }
        }
        let local = listener.local_addr();
        loop {
            let accepted = select! {
                biased;
                () = drain.signaled() => return,
                accepted = listener.accept() => accepted,
            };
            let (this, drain) = (self.clone(), drain.clone());
            tokio::spawn(async move {
                let client = accepted.client;
                if let Err((target, error)) = this.connection(accepted, drain).await {
                    this.failed(client, target.unwrap_or(local), &error);
                }
            });
        }
    }

    /// The table of contents.
    async fn connection(
        self: &Arc<Self>,
        accepted: Accepted,
        drain: drain::Watch,
    ) -> Result<(), (Option<SocketAddr>, Error)> {
        let (conn, io) = accept::accept(self, accepted).map_err(|error| (None, error))?;
        let target = conn.target;
        let served = async {
            if conn.direct {
                return direct::serve(self, conn, io, drain).await;
            }
            match tls::secure(self, conn, io, &drain).await? {
                Secured::Plain(conn, io) => self.protocol(conn, io, drain).await,
                Secured::Mesh(conn, io) => self.protocol(conn, io, drain).await,
                Secured::Early(conn, io, app) => {
                    let client = opaque::Side::Tcp(bytes::Bytes::new(), io);
                    opaque::forward(self, conn, client, Some(app), drain).await
                }
                Secured::Gone => Ok(()),
            }
        };
        served.await.map_err(|error| (Some(target), error))
    }

    async fn protocol<I: opaque::Stream>(
        self: &Arc<Self>,
        conn: Conn,
        io: I,
        drain: drain::Watch,
    ) -> Result<(), Error> {
        match detect::protocol(self, &conn, io, &drain).await? {
            Protocol::Http(version, io) => http::serve(self, conn, version, Box::new(io), drain).await,
            Protocol::Opaque(read, io, app) => opaque::forward(self, conn, io.side(read), app, drain).await,
            Protocol::Gone => Ok(()),
        }
    }

    /// Where a failed connection's error stops: it is counted and logged.
    fn failed(&self, client: SocketAddr, target: SocketAddr, error: &Error) {
        self.telemetry.inbound_tcp_errors(target).failed(error.cause());
        match error.cause() {
            Cause::DetectTimeout(_) | Cause::Loop(_) | Cause::InvalidPolicy(_) => {
                tracing::warn!(%client, %target, %error, "connection closed");
            }
            _ => tracing::info!(%client, %target, %error, "connection closed"),
        }
    }
}
