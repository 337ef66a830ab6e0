//! One HTTP replica: `l5d-require-id`, authority override, HTTP/1 carried over HTTP/2, the client, and what is made of
//! the answer: metrics, load, breaker (behaviour.md B.6, D.6, D.10, E.1, E.6).

use super::{
    Runtime,
    concrete::Unready,
    connect::Connector,
    limits::Expired,
    tracked::{EndpointHook, Tracked, outcome},
};
use crate::{
    error::{Cause, Error},
    http::{
        Asked, classify,
        rescue::{L5D_PROXY_CONNECTION, L5D_PROXY_ERROR, L5D_PROXY_TERMINATION, is_endpoint_level},
        settings,
    },
    policy::{
        client,
        endpoint::{Endpoint, Http2Params, ProtocolHint},
    },
    tap::{self, About, Source},
    telemetry::{Class, Direction, EndpointLabels, EndpointMetrics, trace::SpanKind},
};
use http::{HeaderName, HeaderValue, Request, Response, Version, header::HOST, uri::Authority};
use linkerd_stack::{
    Ready,
    balance::LoadHandle,
    breaker::{self, Breaker, Permit},
    http::{Body, Client, ClientConfig, CloseConnection, SendError, client::Http1Config, normalize, orig_proto},
    ready,
};
use linkerd_tls::Id;
use std::{sync::Arc, time::Duration};
use tokio::time::Instant;

const L5D_REQUIRE_ID: HeaderName = HeaderName::from_static("l5d-require-id");
const L5D_DST_CANONICAL: HeaderName = HeaderName::from_static("l5d-dst-canonical");

/// What endpoints of one balancer (or forward) have in common.
#[derive(Clone)]
pub(super) struct Kind {
    pub(super) rt: Arc<Runtime>,
    /// Label `authority`; none for forwards.
    pub(super) authority: Option<Arc<str>>,
    /// Whether requests come as HTTP/2.
    pub(super) http2: bool,
    /// Whether the policy has gRPC routes: responses are judged so.
    pub(super) grpc: bool,
    pub(super) breaker: client::Breaker,
    pub(super) penalty: Option<client::Penalty>,
    /// A single known replica, not one of a balancer's.
    pub(super) forward: bool,
}

/// One replica.
pub(super) struct HttpEndpoint {
    client: Client<Connector>,
    connector: Connector,
    metrics: Arc<EndpointMetrics>,
    breaker: Option<Arc<Breaker>>,
    /// Client and breaker together.
    ready: Ready,
    authority: Option<(Authority, HeaderValue)>,
    /// HTTP/1 requests are carried over HTTP/2.
    upgrade: bool,
    context: Arc<str>,
    endpoint: Endpoint,
    kind: Kind,
}

impl HttpEndpoint {
    pub(super) fn new(kind: &Kind, endpoint: &Endpoint) -> Self {
        let rt = &kind.rt;
        let meta = &endpoint.meta;
        let connector = Connector::new(rt, endpoint, kind.authority.clone());
        let local = rt.is_local(endpoint.addr);
        let upgrade = meta.hint == ProtocolHint::Http2 && !local;
        let client = Client::with_replay_hook(
            client_config(rt, meta.http2.as_ref()),
            connector.clone(),
            kind.http2 || upgrade,
            Some(rt.on_replay.clone()),
        );
        let breaker = breaker_config(&kind.breaker).map(|config| Breaker::new(config, rand::random()));
        let ready = match &breaker {
            Some(breaker) => ready::all([client.ready(), breaker.ready()]),
            None => client.ready(),
        };
        let metrics = rt.telemetry.endpoint(EndpointLabels::Outbound {
            authority: kind.authority.clone(),
            target: endpoint.addr,
            tls: connector.server_id().cloned(),
            dst: meta.clone(),
        });
        let authority = meta
            .authority_override
            .as_deref()
            .filter(|_| !local)
            .and_then(|text| Some((Authority::try_from(text).ok()?, HeaderValue::try_from(text).ok()?)));
        let context = format!("endpoint {}", endpoint.addr).into();
        let (endpoint, kind) = (endpoint.clone(), kind.clone());
        Self { client, connector, metrics, breaker, ready, authority, upgrade, context, endpoint, kind }
    }

    /// Whether it can take requests.
    pub(super) fn ready(&self) -> Ready {
        self.ready.clone()
    }

    /// Why it takes no requests, if so.
    pub(super) fn unready(&self) -> Option<Unready> {
        if self.breaker.as_ref().is_some_and(|breaker| !breaker.ready().get()) {
            return Some(Unready::Ejected);
        }
        (!self.client.ready().get()).then(|| Unready::Unconnected(self.connector.failure()))
    }

    /// How long it could not be connected to, if so.
    pub(super) fn refused_for(&self) -> Option<Duration> {
        self.connector.refused_for()
    }

    /// Leave from the breaker. None if it shut between the pick and now.
    pub(super) fn admit(&self) -> Option<Option<Permit>> {
        match &self.breaker {
            Some(breaker) => breaker.admit().map(Some),
            None => Some(None),
        }
    }

    /// Sends a request. Failures to reach the endpoint, or to get an answer from it, are answers of the endpoint
    /// (behaviour.md E.6, second table), so that breakers, retries and metrics see them.
    ///
    /// # Errors
    /// Everything else: a refused identity, a stream reset of an HTTP/2 request.
    pub(super) async fn send(
        &self,
        mut req: Request<Body>,
        asked: &Asked,
        load: LoadHandle,
        permit: Option<Permit>,
        expired: &Expired,
    ) -> Result<Response<Tracked>, Error> {
        self.require_id(&mut req)?;
        self.override_authority(&mut req)?;
        let rule = classify::Rule::of(req.headers(), self.kind.grpc);
        let tapped = self.kind.rt.telemetry.taps().request(&req, || self.about(&req));
        let carried =
            if self.upgrade && orig_proto::may_upgrade(&req) { orig_proto::upgrade_request(&mut req) } else { None };
        let span = self.kind.rt.telemetry.tracer().begin(Direction::Outbound, SpanKind::Client, &mut req);
        self.metrics.request();
        let dispatched = Instant::now();
        let mut waiting = Waiting { held: Some((load, permit)), endpoint: self, dispatched, expired };
        let sent = self.client.send(req).await;
        // Taken once: only a dropped future leaves it to the guard.
        let Some((load, permit)) = waiting.held.take() else { return Err(Cause::Canceled.into()) };
        let mut rsp = match sent {
            Ok(mut rsp) => {
                if let Some(carried) = carried {
                    orig_proto::restore_response(&mut rsp, carried);
                }
                rsp.headers_mut().remove(L5D_PROXY_ERROR);
                rsp.headers_mut().remove(L5D_PROXY_TERMINATION);
                let close = rsp.headers_mut().remove(L5D_PROXY_CONNECTION).is_some_and(|v| v == "close");
                if close && self.kind.forward {
                    rsp.extensions_mut().insert(CloseConnection);
                }
                tap::response(tapped, rsp).map(Tracked::new)
            }
            Err(error) => {
                let error = send_error(error).context(self.context.clone());
                let asked = Asked { orig_proto: asked.orig_proto || carried.is_some(), ..*asked };
                if !is_endpoint_level(error.cause(), &asked) {
                    self.metrics.response(None, Class::error(error.cause()));
                    tap::failed(tapped, error.cause());
                    // A client that goes away says nothing about the endpoint.
                    if let Some(permit) = permit.filter(|_| *error.cause() != Cause::Canceled) {
                        permit.resolve(breaker::Outcome::Failure);
                    }
                    return Err(error);
                }
                tracing::debug!(%error, "endpoint failed");
                let rsp = self.kind.rt.rescue.response(&error, &asked);
                let mut rsp = tap::response(tapped, rsp).map(Tracked::new);
                rsp.extensions_mut().insert(Unanswered(error));
                rsp
            }
        };
        if let Some(span) = span {
            span.answered(rsp.status());
        }
        let class = rule.start(rsp.status(), rsp.headers());
        let unanswered = rsp.extensions().get::<Unanswered>().is_some();
        let penalty = match &self.kind.penalty {
            Some(penalty) => classify::penalty(penalty, rsp.status(), rsp.headers()),
            None => None,
        };
        // An endpoint that refuses at once must not look like the fastest.
        let penalty = penalty.or_else(|| unanswered.then_some(UNANSWERED_PENALTY));
        let retry_after = classify::retry_after(rsp.status(), rsp.headers());
        let mut permit = permit.map(|permit| (permit, retry_after));
        if let (Some(class), Some((permit, retry_after))) = (&class, permit.take_if(|_| class.is_some())) {
            permit.resolve_with(outcome(class, rsp.status()), retry_after);
        }
        let hook = EndpointHook {
            metrics: self.metrics.clone(),
            status: rsp.status(),
            rule,
            class,
            dispatched,
            load,
            penalty,
            permit,
        };
        Tracked::hook_endpoint(&mut rsp, hook);
        Ok(rsp)
    }

    fn about(&self, req: &Request<Body>) -> About {
        let source = req.extensions().get::<Source>().map(|Source(client)| *client);
        let tls = self.connector.server_id();
        About::outbound(source, self.endpoint.addr, tls, self.endpoint.meta.labels.iter())
            .on_route(req.extensions().get::<tap::Route>().map(|tap::Route(labels)| &**labels))
    }

    fn require_id(&self, req: &mut Request<Body>) -> Result<(), Error> {
        let Some(required) = req.headers_mut().remove(L5D_REQUIRE_ID) else { return Ok(()) };
        let found = self.connector.server_id().ok();
        let required = String::from_utf8_lossy(required.as_bytes()).into_owned();
        let id = required.parse::<Id>().ok();
        if id.is_some() && id.as_ref() == found {
            return Ok(());
        }
        let found = found.map(|id| id.to_string());
        Err(Error::new(Cause::RequiredId { required, found }).context(self.context.clone()))
    }

    fn override_authority(&self, req: &mut Request<Body>) -> Result<(), Error> {
        let Some((authority, value)) = &self.authority else { return Ok(()) };
        req.headers_mut().remove(L5D_DST_CANONICAL);
        if req.version() < Version::HTTP_2 {
            req.headers_mut().insert(HOST, value.clone());
        } else {
            req.headers_mut().remove(HOST);
        }
        normalize::set_authority(req, authority.clone())
            .map_err(|error| Error::new(Cause::BadRequest(error.to_string().into())).context(self.context.clone()))
    }
}

/// A request without an answer yet. If it is given up, the time that it took so far counts as latency: a replica that never
/// answers must not look like one that was never asked. A limit in time that ended it is a failure of the replica; a client
/// that went away says nothing about it.
struct Waiting<'a> {
    held: Option<(LoadHandle, Option<Permit>)>,
    endpoint: &'a HttpEndpoint,
    dispatched: Instant,
    expired: &'a Expired,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        let Some((load, permit)) = self.held.take() else { return };
        load.penalize(self.dispatched.elapsed());
        if let Some(cause) = self.expired.take() {
            self.endpoint.metrics.response(None, Class::error(&cause));
            if let Some(permit) = permit {
                permit.resolve(breaker::Outcome::Failure);
            }
        }
    }
}

/// Latency that a failure to connect or to answer counts as, at the least.
const UNANSWERED_PENALTY: Duration = Duration::from_secs(1);

/// Marks a response that stands for a failure of the endpoint to answer.
#[derive(Clone, Debug)]
pub(super) struct Unanswered(pub(super) Error);

fn send_error(error: SendError<Error>) -> Error {
    match error {
        SendError::Connect(error) => error,
        SendError::Io { errno, message } => Cause::Io { errno, message }.into(),
        SendError::Reset(reason) => Cause::Http2Reset(reason).into(),
        SendError::Connection(message) => Cause::Http2Connection(message).into(),
        SendError::IncompleteResponse => Cause::IncompleteResponse.into(),
        // What a refused stream says: it may be sent again without harm.
        SendError::Unprocessed(message) => Error::new(Cause::Http2Reset(h2::Reason::REFUSED_STREAM)).context(message),
        SendError::RequestBody(_) => Cause::Canceled.into(),
        // Whether the request or the response can't be, it is between the proxy and the endpoint.
        SendError::Invalid(message) => Cause::Io { errno: None, message }.into(),
    }
}

/// What is said per endpoint, and for the rest the settings.
fn client_config(rt: &Runtime, params: Option<&Http2Params>) -> ClientConfig {
    let config = &rt.config;
    let fallback = &config.http2_client;
    ClientConfig {
        h1: Http1Config { idle_timeout: config.http1.idle_timeout, max_idle: config.http1.max_idle },
        h2: settings::http2_client(params.unwrap_or(fallback), fallback),
        backoff: settings::backoff(&config.connect.backoff),
        max_header_size: config.http_server.max_header_size,
    }
}

fn breaker_config(breaker: &client::Breaker) -> Option<breaker::Config> {
    match breaker {
        client::Breaker::None => None,
        client::Breaker::Consecutive { max_failures, backoff } => {
            Some(breaker::Config::Consecutive { max_failures: *max_failures, backoff: settings::backoff(backoff) })
        }
        client::Breaker::Unified {
            max_consecutive_failures,
            success_rate,
            window,
            min_requests,
            backoff,
            respect_retry_after,
        } => Some(breaker::Config::Unified {
            max_consecutive_failures: *max_consecutive_failures,
            success_rate: *success_rate,
            window: *window,
            min_requests: *min_requests,
            backoff: settings::backoff(backoff),
            respect_retry_after: *respect_retry_after,
        }),
    }
}
