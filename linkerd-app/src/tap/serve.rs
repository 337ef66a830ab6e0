//! The tap server: gRPC on a port of its own, for one client alone, which mesh TLS must prove (contract.md 1.10).

use super::{Events, Taps};
use crate::{
    policy::authz::{ClientTls, NoTls},
    transport::{Accepted, BoundListener, own},
};
use http::Request;
use http_body_util::BodyExt as _;
use linkerd_stack::{
    BoxService, drain,
    http::{Body, BodyError, ServerConfig, Version},
};
use linkerd_tls::{Id, identity::Reader};
use linkerd2_proxy_api::tap::{
    ObserveRequest,
    tap_server::{Tap, TapServer},
};
use std::{convert::Infallible, sync::Arc, time::Duration};
use tokio::time::timeout;
use tonic::Status;
use tower::Service as _;

/// Connections at a time; more are closed. The one client that may tap needs one.
const MAX_CONNECTIONS: usize = 64;

/// Who may not tap is told so, and then has no place here any more.
const REFUSAL: Duration = Duration::from_secs(2);

/// Largest request, bytes: far more conditions than an operator's tool writes.
const MAX_REQUEST: usize = 64 * 1024;

/// Accepts connections of those who want to tap.
pub struct Server {
    /// What they may see.
    pub taps: Taps,
    /// The only client that may.
    pub client: Id,
    /// Terminates TLS.
    pub identity: Reader,
    /// HTTP settings.
    pub http: ServerConfig,
}

impl Server {
    /// Accepts until dropped.
    pub async fn serve(self, listener: BoundListener) {
        let this = Arc::new(self);
        own::serve(listener, "tap", MAX_CONNECTIONS, move |accepted, drain| {
            let this = this.clone();
            async move { this.connection(accepted, drain).await }
        })
        .await;
    }

    async fn connection(&self, accepted: Accepted, drain: drain::Watch) -> Result<(), own::Closed> {
        let (tls, io) = own::secure(accepted.io, Some(&self.identity)).await?;
        let refusal = refusal(&tls, &self.client);
        if let Some(why) = refusal {
            tracing::debug!(client = %accepted.client, identity = ?tls.client_id().map(Id::as_str), why, "refused a tap");
        }
        let observer = Arc::new(Observer { taps: self.taps.clone(), refusal });
        let service = BoxService::from_fn(move |req: Request<Body>| {
            let mut server = TapServer::from_arc(observer.clone()).max_decoding_message_size(MAX_REQUEST);
            async move {
                let Ok::<_, Infallible>(rsp) = server.call(req).await;
                Ok(rsp.map(|body| Body::new(body.map_err(BodyError::other))))
            }
        });
        let served = linkerd_stack::http::serve(&self.http, Version::H2, io, service, drain);
        match refusal {
            None => Ok(served.await?),
            Some(_) => Ok(timeout(REFUSAL, served).await.unwrap_or(Ok(()))?),
        }
    }
}

/// Why a client may not tap; none if it may.
fn refusal(tls: &ClientTls, client: &Id) -> Option<&'static str> {
    match tls {
        ClientTls::Terminated(Some(id)) if id == client => None,
        ClientTls::Terminated(_) => Some("Unauthorized client"),
        ClientTls::Passthru { .. } => Some(NoTls::NoTlsFromRemote.as_str()),
        ClientTls::None(why) => Some(why.as_str()),
    }
}

/// Answers the calls of one connection.
struct Observer {
    taps: Taps,
    refusal: Option<&'static str>,
}

#[tonic::async_trait]
impl Tap for Observer {
    type ObserveStream = Events;

    async fn observe(&self, req: tonic::Request<ObserveRequest>) -> Result<tonic::Response<Events>, Status> {
        match self.refusal {
            Some(why) => Err(Status::unauthenticated(why)),
            None => self.taps.observe(req.into_inner()).map(tonic::Response::new),
        }
    }
}
