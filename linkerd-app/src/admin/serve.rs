//! Connections of the admin port meet, first to last: TLS (detected, and terminated if it is for this proxy), HTTP
//! (detected), policy (of the admin port), answer.
//!
//! The listener goes on while the proxy drains, so that probes and scrapes see the end.

use super::Admin;
use crate::{
    inbound::http::{Connection, Guard, Kind, PolicyService, Server as Guarded},
    policy::authz::ClientTls,
    telemetry::{ConnLabels, Direction, Peer, Telemetry, TlsLabels},
    transport::{
        Accepted, BoundListener, Metered,
        own::{self, Closed, DETECT},
    },
};
use bytes::{Bytes, BytesMut};
use http::{Method, Request, Response, StatusCode};
use linkerd_stack::{
    BoxService, BoxedIo, PrefixedIo,
    detect::{self, DetectError, Detected},
    drain,
    http::{Body, Reset, ServerConfig, Version},
};
use linkerd_tls::identity::Reader;
use std::{net::SocketAddr, sync::Arc};
use tower::ServiceExt as _;

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

impl Server {
    /// Accepts until dropped.
    pub async fn serve(self, listener: BoundListener) {
        let local = listener.local_addr();
        let this = Arc::new(self);
        own::serve(listener, "admin", MAX_CONNECTIONS, move |accepted, drain| {
            let this = this.clone();
            async move { this.connection(accepted, local, drain).await }
        })
        .await;
    }

    async fn connection(&self, accepted: Accepted, local: SocketAddr, drain: drain::Watch) -> Result<(), Closed> {
        let client = accepted.client;
        let (tls, io) = own::secure(accepted.io, self.identity.as_ref()).await?;
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
