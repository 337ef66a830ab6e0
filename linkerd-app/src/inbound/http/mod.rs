//! HTTP towards the application. A request meets, first to last: restore (HTTP/1 that was carried in HTTP/2), identify
//! (`l5d-client-id`), normalize (authority), limit (requests in flight), policy (route, authorization, filters, rate
//! limit), metrics, the application's client. Failures become answers in one place, on the way back.

mod access;
mod observe;
mod policy;
mod profile;

pub use self::policy::{Connection, Guard, Kind, PolicyService};

use super::{Failed, Inbound, accept::Conn};
use crate::{
    config,
    error::{Cause, Error},
    gateway::Gateway,
    http::{
        Asked, Rescue,
        rescue::{self, Answer},
        settings,
    },
    policy::Target,
    telemetry::{
        Code, ConnLabels, Direction, Peer, Telemetry, TlsLabels, access::Entry, termination::Phase, trace::SpanKind,
    },
    transport::{Metered, io_failure},
};
use ::http::{HeaderName, HeaderValue, Request, Response, uri::Authority};
use linkerd_stack::{
    BoxFuture, BoxService, BoxedIo,
    backoff::Backoff,
    drain,
    http::{
        Body, ClientConfig, CloseConnection, Reset, ServeError, Version, client::Http1Config, normalize, orig_proto,
    },
};
use std::{
    sync::Arc,
    task::{Context, Poll},
};
use tokio::{sync::Semaphore, time::Instant};

/// The verified identity of a meshed client. Set or removed on every request, so that it cannot be forged.
const L5D_CLIENT_ID: HeaderName = HeaderName::from_static("l5d-client-id");

/// Serves a connection's requests to the application.
///
/// # Errors
/// When the connection fails; requests that fail are answered.
pub(super) async fn serve(
    inbound: &Arc<Inbound>,
    conn: Conn,
    version: Version,
    io: BoxedIo,
    drain: drain::Watch,
) -> Result<(), Failed> {
    // Clients of direct connections name their target (behaviour.md A.5).
    let default_authority = (!conn.direct).then(|| Authority::try_from(conn.target.to_string()).ok()).flatten();
    let local = inbound.locals.http(conn.target);
    let telemetry = inbound.telemetry.clone();
    let app = BoxService::from_fn(move |mut req| {
        let local = local.clone();
        let span = telemetry.tracer().begin(Direction::Inbound, SpanKind::Client, &mut req);
        async move {
            let answered = local.send(req).await;
            if let (Some(span), Ok(rsp)) = (span, &answered) {
                span.answered(rsp.status());
            }
            answered
        }
    });
    run(inbound, conn, Kind::App, version, io, default_authority, app, drain).await
}

/// Serves a connection's requests to a target elsewhere (behaviour.md A.6).
///
/// # Errors
/// As [`serve`].
pub(super) async fn serve_gateway(
    inbound: &Arc<Inbound>,
    conn: Conn,
    version: Version,
    io: BoxedIo,
    gateway: &Gateway,
    target: Target,
    drain: drain::Watch,
) -> Result<(), Failed> {
    let default_authority = Authority::try_from(target.to_string()).ok();
    let out = gateway.http(target, conn.tls.client_id().cloned());
    run(inbound, conn, Kind::Gateway, version, io, default_authority, out, drain).await
}

#[expect(clippy::too_many_arguments, reason = "everything that a connection is made of meets here")]
async fn run(
    inbound: &Arc<Inbound>,
    conn: Conn,
    kind: Kind,
    version: Version,
    io: BoxedIo,
    default_authority: Option<Authority>,
    inner: BoxService<Request<Body>, Response<Body>, Error>,
    drain: drain::Watch,
) -> Result<(), Failed> {
    let labels = ConnLabels {
        direction: Direction::Inbound,
        peer: Peer::Src,
        target: Some(conn.target),
        tls: TlsLabels::Accepted(conn.tls.clone()),
        srv: Some((conn.policy.policy.meta.clone(), conn.port.number())),
        authority: None,
        dst: None,
    };
    let io = Metered::new(io, inbound.telemetry.conn(labels));
    let Conn { client, target, tls, port, .. } = conn;
    let connection = Connection { client, tls, target, port, kind };
    let policy = PolicyService::new(inbound.guard.clone(), connection, inner);
    let server = Server::new(policy, default_authority, inbound.cfg.max_in_flight);
    linkerd_stack::http::serve(&settings::server(&inbound.cfg.http_server), version, io, server, drain)
        .await
        .map_err(ended)
}

/// The requests of one connection: from what the codec gives to what it gets. Cheap to clone.
#[derive(Clone)]
pub struct Server(Arc<Shared>);

struct Shared {
    policy: PolicyService,
    rescue: Rescue,
    client_id: Option<HeaderValue>,
    default_authority: Option<Authority>,
    in_flight: Semaphore,
}

impl Server {
    /// A server for one connection. Requests without an authority get the default one, or fail. At most `max_in_flight`
    /// requests await response headers; more of them wait.
    pub fn new(policy: PolicyService, default_authority: Option<Authority>, max_in_flight: usize) -> Self {
        let id = policy.connection().tls.client_id();
        Self(Arc::new(Shared {
            rescue: Rescue { informational: id.is_some() },
            client_id: id.and_then(|id| HeaderValue::from_str(id.as_str()).ok()),
            default_authority,
            in_flight: Semaphore::new(max_in_flight.clamp(1, Semaphore::MAX_PERMITS)),
            policy,
        }))
    }
}

impl tower::Service<Request<Body>> for Server {
    type Response = Response<Body>;
    type Error = Reset;
    type Future = BoxFuture<Result<Response<Body>, Reset>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Reset>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, req: Request<Body>) -> Self::Future {
        let shared = self.0.clone();
        Box::pin(async move { shared.serve(req).await })
    }
}

impl Shared {
    async fn serve(&self, mut req: Request<Body>) -> Result<Response<Body>, Reset> {
        let conn = self.policy.connection();
        let line = self.policy.access().map(|log| {
            let entry = Entry::new(&req, conn.client, conn.tls.client_id().cloned());
            access::Line::new(log.clone(), self.policy.telemetry().clone(), Instant::now(), entry)
        });

        let span = match conn.kind {
            Kind::App | Kind::Gateway => {
                self.policy.telemetry().tracer().begin(Direction::Inbound, SpanKind::Server, &mut req)
            }
            Kind::Admin => None,
        };

        // Restore, identify.
        let mut asked = Asked::of(&req);
        let carried = orig_proto::restore_request(&mut req);
        if carried.is_some() {
            asked = Asked { version: req.version(), grpc: false, orig_proto: true };
        }
        match &self.client_id {
            Some(id) => drop(req.headers_mut().insert(L5D_CLIENT_ID, id.clone())),
            None => drop(req.headers_mut().remove(L5D_CLIENT_ID)),
        }

        let termination;
        let mut cancellation = Cancellation { telemetry: self.policy.telemetry(), armed: true };
        let answered = self.answer(req, &asked).await;
        cancellation.armed = false;
        let mut rsp = match answered {
            Ok(mut rsp) => {
                termination = rsp.extensions_mut().remove::<Code>();
                rsp
            }
            Err(error) => {
                let error = conn.locate(error);
                termination = Some(self.policy.failed(&error));
                match self.rescue.answer(&error, &asked) {
                    Answer::Response(rsp) => rsp,
                    Answer::Reset(reason) => {
                        if let Some(line) = line {
                            line.reset(termination);
                        }
                        return Err(Reset::new(reason));
                    }
                }
            }
        };
        if let Some(span) = span {
            span.answered(rsp.status());
        }
        if rescue::closes(&rsp) {
            rsp.extensions_mut().insert(CloseConnection);
        }
        if carried.is_some() {
            orig_proto::upgrade_response(&mut rsp);
        }
        Ok(match line {
            Some(line) => line.response(termination, rsp),
            None => rsp,
        })
    }

    async fn answer(&self, mut req: Request<Body>, asked: &Asked) -> Result<Response<Body>, Error> {
        // Normalize.
        normalize::request(&mut req, self.default_authority.as_ref()).map_err(|error| match error {
            normalize::BadRequest::MissingAuthority => Error::new(Cause::MissingAuthority),
            error => Error::new(Cause::BadRequest(error.to_string().into())),
        })?;
        // Limit, until the response's headers.
        let _permit =
            self.in_flight.acquire().await.map_err(|_| Error::new(Cause::Unexpected("the server is gone".into())))?;
        self.policy.call(req, asked, self.rescue).await
    }
}

/// Dropped while armed, its request was given up by the client before there was a response.
struct Cancellation<'a> {
    telemetry: &'a Telemetry,
    armed: bool,
}

impl Drop for Cancellation<'_> {
    fn drop(&mut self) {
        if self.armed {
            self.telemetry.canceled(Direction::Inbound, Phase::Request);
        }
    }
}

/// The failure that the end of a connection means.
fn ended(error: ServeError) -> Failed {
    let (code, error) = match error {
        ServeError::Io(error) => (Code::ResponseCanceled, io_failure(&error)),
        ServeError::Reset(reset) => (Code::ResponseReset, Cause::Http2Reset(reset.reason()).into()),
        ServeError::Protocol(message) => (Code::RequestInvalid, Cause::BadRequest(message).into()),
        ServeError::Other(message) => (Code::Unexpected, Cause::Unexpected(message).into()),
    };
    Failed { code, error }
}

/// The settings of the client for the application, as the stack takes them.
pub(super) fn client_config(cfg: &config::Inbound, backoff: Backoff) -> ClientConfig {
    ClientConfig {
        h1: Http1Config { idle_timeout: cfg.http1.idle_timeout, max_idle: cfg.http1.max_idle },
        h2: settings::http2_client(&cfg.http2_client, &cfg.http2_client),
        backoff,
        max_header_size: cfg.http_server.max_header_size,
    }
}
