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
mod readings;
mod tls;

#[cfg(test)]
mod tests;

use self::{accept::Conn, detect::Protocol, local::Locals, tls::Secured};
use crate::{
    config,
    error::{Cause, Error},
    gateway::Gateway,
    policy::Source,
    telemetry::{Code, Direction, Telemetry, access::AccessLog, termination::Phase},
    transport::BoundListener,
};
use bytes::Bytes;
use futures_util::future::{BoxFuture, ready};
use linkerd_stack::drain;
use linkerd_tls::identity::Reader;
use std::{net::SocketAddr, sync::Arc};
use tokio::{net::TcpStream, select, sync::Semaphore};

/// Connections to the application that may be opened while their clients have said nothing yet. More silent clients
/// than that wait for the timeout as if the application never spoke first.
const MAX_EARLY_DIALS: usize = 1024;

/// The inbound half of the proxy.
pub struct Inbound {
    cfg: config::Inbound,
    identity: Option<Reader>,
    guard: Arc<http::Guard>,
    locals: Locals,
    gateway: Gateway,
    telemetry: Telemetry,
    early_dials: Arc<Semaphore>,
}

impl Inbound {
    /// Starts to watch the ports named in the configuration, `admin_port`, and in gateway mode the inbound port. Without
    /// an identity, no TLS is terminated.
    pub fn new(
        cfg: &config::Inbound,
        gateway: Gateway,
        identity: Option<Reader>,
        source: Arc<dyn Source>,
        telemetry: Telemetry,
        access: AccessLog,
        admin_port: u16,
    ) -> Arc<Self> {
        let own = cfg.listen.addr.port();
        let pinned = cfg.ports.iter().copied().chain([admin_port]).chain(gateway.is_on().then_some(own));
        let ports = policy::Ports::new(source.clone(), cfg.discovery_idle_timeout, pinned);
        Arc::new(Self {
            guard: Arc::new(http::Guard::new(cfg, &source, ports, telemetry.clone(), access)),
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

    /// What is known of each port in use, by number: for the operator's page.
    pub fn status(&self) -> serde_json::Value {
        self.guard.ports.status()
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
                match accept::accept(&this, accepted).at(Phase::Accept) {
                    Ok((conn, io)) => this.serve_connection(conn, io, drain).await,
                    Err(failed) => this.failed(client, local, &failed),
                }
            });
        }
    }

    async fn serve_connection(self: &Arc<Self>, conn: Conn, io: TcpStream, drain: drain::Watch) {
        let (client, target) = (conn.client, conn.target);
        if let Err(failed) = self.connection(conn, io, drain).await {
            self.failed(client, target, &failed);
        }
    }

    /// The table of contents. The stages are in boxes, so that a connection has memory for the stage that it is in, and
    /// none for those behind it.
    async fn connection(self: &Arc<Self>, conn: Conn, io: TcpStream, drain: drain::Watch) -> Result<(), Failed> {
        if conn.direct {
            return Box::pin(direct::accept(self, conn, io, drain)).await?.await;
        }
        let secured = Box::pin(tls::secure(self, conn, io, &drain));
        let next: BoxFuture<'_, Result<Serving<'_>, Failed>> = match secured.await? {
            Secured::Plain(conn, io) => Box::pin(self.protocol(conn, io, drain)),
            Secured::Mesh(conn, io) => Box::pin(self.protocol(conn, io, drain)),
            Secured::Early(conn, io, app) => {
                let client = opaque::Side::Tcp(Bytes::new(), io);
                let serving: Serving<'_> = Box::pin(opaque::forward(self, conn, client, Some(app), drain));
                Box::pin(ready(Ok(serving)))
            }
            Secured::Gone => return Ok(()),
        };
        next.await?.await
    }

    /// Finds out what is spoken, and hands over to what serves that.
    async fn protocol<I: opaque::Stream>(
        self: &Arc<Self>,
        conn: Conn,
        io: I,
        drain: drain::Watch,
    ) -> Result<Serving<'_>, Failed> {
        Ok(match Box::pin(detect::protocol(self, &conn, io, &drain)).await.at(Phase::Detect)? {
            Protocol::Http(version, io) => Box::pin(http::serve(self, conn, version, Box::new(io), drain)),
            Protocol::Opaque(read, io, app) => Box::pin(opaque::forward(self, conn, io.side(read), app, drain)),
            Protocol::Gone => Box::pin(ready(Ok(()))),
        })
    }

    /// Where a failed connection's error stops: it is counted and logged.
    fn failed(&self, client: SocketAddr, target: SocketAddr, Failed { code, error }: &Failed) {
        self.telemetry.inbound_tcp_errors(target).failed(error.cause());
        self.telemetry.terminated(Direction::Inbound, *code);
        match error.cause() {
            Cause::DetectTimeout(_) | Cause::Loop(_) | Cause::InvalidPolicy(_) | Cause::BadRequest(_) => {
                tracing::warn!(%client, %target, %code, %error, "connection closed");
            }
            _ => tracing::info!(%client, %target, %code, %error, "connection closed"),
        }
    }
}

/// The last stage of a connection.
type Serving<'a> = BoxFuture<'a, Result<(), Failed>>;

/// Why a connection ended badly.
#[derive(Debug)]
struct Failed {
    code: Code,
    error: Error,
}

/// Tells how far a connection had come when it failed.
trait At<T> {
    fn at(self, phase: Phase) -> Result<T, Failed>;
}

impl<T> At<T> for Result<T, Error> {
    fn at(self, phase: Phase) -> Result<T, Failed> {
        self.map_err(|error| Failed { code: error.code(phase), error })
    }
}
