//! Connections of the admin port meet, first to last: TLS (detected, and terminated if it is for this proxy), HTTP
//! (detected), policy (of the admin port), answer.
//!
//! The listener goes on while the proxy drains, so that probes and scrapes see the end.

use super::Admin;
use crate::{
    inbound::http::{Connection, Guard, Kind, PolicyService, Server as Guarded},
    policy::authz::{ClientTls, NoTls},
    telemetry::{ConnLabels, Direction, Peer, Telemetry, TlsLabels},
    transport::{Accepted, BoundListener, Metered},
};
use bytes::{Bytes, BytesMut};
use http::{Method, Request, Response, StatusCode};
use linkerd_stack::{
    BoxService, BoxedIo, PrefixedIo,
    detect::{self, DetectError, Detected},
    drain,
    http::{Body, Reset, ServerConfig, Version},
};
use linkerd_tls::{
    detect::{Sni, client_hello},
    identity::{Alpn, Reader},
};
use std::{net::SocketAddr, sync::Arc, time::Duration};
use tokio::{sync::Semaphore, time::timeout};
use tower::ServiceExt as _;

/// Wait for the first bytes, and after TLS for HTTP (behaviour.md C.13).
const DETECT: Duration = Duration::from_secs(1);
/// A handshake takes a few round trips; a client that is slower holds one of the connections below.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// Connections at a time. Kubelet, Prometheus and a person need a handful; what comes above is closed.
const MAX_CONNECTIONS: usize = 1_024;
/// Requests of one connection that are answered at a time.
const MAX_IN_FLIGHT: usize = 100;

/// Accepts connections for an [`Admin`].
pub struct Server {
    /// Answers.
    pub admin: Arc<Admin>,
    /// Authorizes, by the policy of the listener's port.
    pub guard: Arc<Guard>,
    /// Terminates TLS; without it no TLS is understood.
    pub identity: Option<Reader>,
    /// HTTP settings.
    pub http: ServerConfig,
    /// Connections are counted in it.
    pub telemetry: Telemetry,
}

/// Why a connection was closed before a request.
#[derive(Debug, thiserror::Error)]
enum Closed {
    #[error("nothing came within {DETECT:?}")]
    Silent,
    #[error("TLS for {0:?}, which is not this proxy's name, or before there is a certificate")]
    ForeignTls(String),
    #[error("neither HTTP/1 nor HTTP/2")]
    NotHttp,
    #[error(transparent)]
    Tls(#[from] linkerd_tls::Error),
    #[error(transparent)]
    Io(#[from] std::io::Error),
    #[error(transparent)]
    Detect(#[from] DetectError),
    #[error(transparent)]
    Http(#[from] linkerd_stack::http::ServeError),
}

impl Server {
    /// Accepts until dropped.
    pub async fn serve(self, listener: BoundListener) {
        let local = listener.local_addr();
        let this = Arc::new(self);
        let connections = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        // Never signaled: connections end with the process.
        let (_signal, drain) = drain::channel();
        loop {
            let Accepted { io, client, .. } = listener.accept().await;
            let Ok(permit) = connections.clone().try_acquire_owned() else {
                tracing::warn!(%client, limit = MAX_CONNECTIONS, "too many admin connections; closed this one");
                continue;
            };
            let (this, drain) = (this.clone(), drain.clone());
            tokio::spawn(async move {
                if let Err(error) = this.connection(client, local, io, drain).await {
                    tracing::debug!(%client, %error, "admin connection");
                }
                drop(permit);
            });
        }
    }

    async fn connection(
        &self,
        client: SocketAddr,
        local: SocketAddr,
        mut io: tokio::net::TcpStream,
        drain: drain::Watch,
    ) -> Result<(), Closed> {
        let hello = timeout(DETECT, client_hello(&mut io)).await.map_err(|_| Closed::Silent)?;
        let (sni, read) = hello?;
        let (tls, io) = self.terminate(sni, PrefixedIo::new(read, io)).await?;
        let (version, io) = version(&tls, io).await?;

        let port = self.guard.port(local.port());
        let labels = ConnLabels {
            direction: Direction::Inbound,
            peer: Peer::Src,
            target: Some(local),
            tls: TlsLabels::Accepted(tls.clone()),
            srv: Some((port.current().policy.meta.clone(), local.port())),
            authority: None,
            dst: None,
        };
        let io = Metered::new(io, self.telemetry.conn(labels));
        let connection = Connection { client, tls, target: local, port, kind: Kind::Admin };
        let policy = PolicyService::new(self.guard.clone(), connection, self.admin.service(client));
        let authority = local.to_string().parse().ok();
        let guarded = Guarded::new(policy, authority, MAX_IN_FLIGHT);
        let service = always_probes(self.admin.clone(), client, guarded);
        Ok(linkerd_stack::http::serve(&self.http, version, io, service, drain).await?)
    }

    async fn terminate(&self, sni: Sni, io: PrefixedIo<tokio::net::TcpStream>) -> Result<(ClientTls, BoxedIo), Closed> {
        match (sni, &self.identity) {
            (Sni::NotTls | Sni::Incomplete, _) => Ok((ClientTls::None(NoTls::NoTlsFromRemote), Box::new(io))),
            (Sni::Name(name), Some(identity))
                if identity.is_ready() && name.eq_ignore_ascii_case(identity.server_name().as_str()) =>
            {
                let accepted = timeout(HANDSHAKE, identity.accept(io, Alpn::None)).await;
                let (accepted, io) = accepted.map_err(|_| Closed::Silent)??;
                Ok((ClientTls::Terminated(accepted.client_id), Box::new(io)))
            }
            (Sni::Name(name), _) => Err(Closed::ForeignTls(name)),
            (Sni::NoName, _) => Err(Closed::ForeignTls(String::new())),
        }
    }
}

/// A client that says no more is taken for what such clients speak: HTTP/1 in the clear, HTTP/2 in mesh TLS.
async fn version(tls: &ClientTls, mut io: BoxedIo) -> Result<(Version, BoxedIo), Closed> {
    let mut buf = BytesMut::new();
    let version = match detect::http(&mut io, DETECT, &mut buf).await {
        Ok(Detected::H1) => Version::H1,
        Ok(Detected::H2) => Version::H2,
        Ok(Detected::NotHttp) => return Err(Closed::NotHttp),
        Err(DetectError::Timeout(_)) => match tls {
            ClientTls::Terminated(_) => Version::H2,
            ClientTls::Passthru { .. } | ClientTls::None(_) => Version::H1,
        },
        Err(error) => return Err(error.into()),
    };
    let read: Bytes = buf.freeze();
    Ok((version, Box::new(PrefixedIo::new(read, io))))
}

/// Probes are answered whatever the policy says (contract.md 8, wart 13): a strict policy, or one that has not come yet,
/// must not make the kubelet kill the pod. They pass the policy first, so that they are counted like other requests.
fn always_probes(
    admin: Arc<Admin>,
    client: SocketAddr,
    guarded: Guarded,
) -> BoxService<Request<Body>, Response<Body>, Reset> {
    BoxService::from_fn(move |req: Request<Body>| {
        let (admin, guarded) = (admin.clone(), guarded.clone());
        async move {
            let probe = is_probe(&req).then(|| req.uri().clone());
            let response = guarded.oneshot(req).await?;
            match probe {
                Some(uri) if refused(response.status()) => {
                    let mut again = Request::new(Body::empty());
                    *again.uri_mut() = uri;
                    Ok(admin.answer(client, again).await)
                }
                Some(_) | None => Ok(response),
            }
        }
    })
}

fn is_probe(req: &Request<Body>) -> bool {
    matches!(*req.method(), Method::GET | Method::HEAD) && matches!(req.uri().path(), "/live" | "/ready")
}

/// The probes' own answers are 200 and 503.
fn refused(status: StatusCode) -> bool {
    status.is_client_error() || status == StatusCode::INTERNAL_SERVER_ERROR
}
