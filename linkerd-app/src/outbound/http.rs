//! HTTP served to the application. A request meets, first to last: the bound on requests in flight, the choice of its
//! destination (fixed per connection, or named by the request), the destination's routes; and its failure meets
//! `rescue`, here and nowhere else.

use super::{
    Runtime,
    discover::{Discover, Found},
    tracked::Tracked,
};
use crate::{
    error::{Cause, Error},
    http::{
        Answer, Asked,
        rescue::{Close, Rescue},
    },
    policy::Target,
    tap,
    telemetry::{Direction, Telemetry, termination::Phase, trace::SpanKind},
};
use http::{HeaderName, Method, Request, Response, StatusCode, header::HOST, uri::Authority};
use linkerd_stack::{
    BoxFuture,
    http::{AbsoluteForm, Body, CloseConnection, Reset, Version, upgrade::Tunnel},
};
use parking_lot::Mutex;
use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
    task::{Context, Poll},
};

/// Names the destination in ingress mode.
const L5D_DST_OVERRIDE: HeaderName = HeaderName::from_static("l5d-dst-override");

/// The service of one connection. Clones are the same.
#[derive(Clone)]
pub(super) struct Edge(Arc<Inner>);

struct Inner {
    rt: Arc<Runtime>,
    client: SocketAddr,
    routing: Routing,
}

/// Where the requests of a connection go.
pub(super) enum Routing {
    /// All to one destination.
    Fixed(Arc<Found>),
    /// To what `l5d-dst-override` names, else to the original destination (behaviour.md D.15).
    Ingress(Named, Target),
    /// To what the request itself names: the client knows that it talks to a proxy.
    Explicit(Named),
    /// Nowhere, for this reason.
    Unknown(Error),
}

/// Destinations by name. A connection seldom changes its destination, so the last one is kept.
pub(super) struct Named {
    discover: Arc<Discover>,
    last: Mutex<Option<(Target, Arc<Found>)>>,
}

impl Named {
    pub(super) fn new(discover: Arc<Discover>) -> Self {
        Self { discover, last: Mutex::new(None) }
    }

    async fn find(&self, target: Target) -> Result<Arc<Found>, Error> {
        if let Some((last, found)) = &*self.last.lock()
            && *last == target
        {
            return Ok(found.clone());
        }
        let found = Arc::new(self.discover.find(target.clone()).await?);
        *self.last.lock() = Some((target, found.clone()));
        Ok(found)
    }
}

impl Edge {
    pub(super) fn new(rt: Arc<Runtime>, client: SocketAddr, routing: Routing) -> Self {
        Self(Arc::new(Inner { rt, client, routing }))
    }

    async fn answer(self, mut req: Request<Body>) -> Result<Response<Body>, Reset> {
        let Inner { rt, client, routing } = &*self.0;
        let asked = Asked::of(&req);
        if rt.telemetry.taps().any() {
            req.extensions_mut().insert(tap::Source(*client));
        }
        let span = rt.telemetry.tracer().begin(Direction::Outbound, SpanKind::Server, &mut req);
        let mut cancellation = Cancellation { telemetry: &rt.telemetry, armed: true };
        // Until response headers; written out, because a future handed on is stored twice.
        let slot = rt.in_flight.acquire().await;
        let answered = routing.call(req, &asked).await;
        drop(slot);
        cancellation.armed = false;
        let answer = match answered {
            Ok(rsp) => Ok(finish(rt, rsp, &asked)),
            Err(error) => fail(rt, &error, &asked),
        };
        if let (Some(span), Ok(rsp)) = (span, &answer) {
            span.answered(rsp.status());
        }
        answer
    }
}

impl tower::Service<Request<Body>> for Edge {
    type Response = Response<Body>;
    type Error = Reset;
    type Future = BoxFuture<Result<Response<Body>, Reset>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Reset>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, req: Request<Body>) -> Self::Future {
        Box::pin(self.clone().answer(req))
    }
}

/// A response on its way to the client's codec.
pub(super) fn finish(rt: &Runtime, rsp: Response<Tracked>, asked: &Asked) -> Response<Body> {
    let (mut head, body) = rsp.into_parts();
    if head.extensions.remove::<Close>().is_some() {
        head.extensions.insert(CloseConnection);
    }
    if let Some(super::endpoint::Unanswered(error)) = head.extensions.remove() {
        count(rt, &error);
    }
    Response::from_parts(head, body.into_body(&rt.rescue, asked, &rt.telemetry))
}

fn fail(rt: &Runtime, error: &Error, asked: &Asked) -> Result<Response<Body>, Reset> {
    count(rt, error);
    match rt.rescue.answer::<Body>(error, asked) {
        Answer::Response(mut rsp) => {
            if rsp.extensions_mut().remove::<Close>().is_some() {
                rsp.extensions_mut().insert(CloseConnection);
            }
            Ok(rsp)
        }
        Answer::Reset(reason) => Err(Reset::new(reason)),
    }
}

/// Failures are counted and logged where they stop, a bounded number per second for everybody to see.
fn count(rt: &Runtime, error: &Error) {
    let code = error.code(Phase::Request);
    rt.telemetry.outbound_http_errors().failed(error.cause());
    rt.telemetry.terminated(Direction::Outbound, code);
    if rt.log_limit.check().is_ok() {
        tracing::info!(%code, %error, "request failed");
    } else {
        tracing::debug!(%code, %error, "request failed");
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
            self.telemetry.canceled(Direction::Outbound, Phase::Request);
        }
    }
}

impl Routing {
    async fn call(&self, mut req: Request<Body>, asked: &Asked) -> Result<Response<Tracked>, Error> {
        match self {
            Self::Fixed(found) => call(found, req, asked).await,
            Self::Unknown(error) => Err(error.clone()),
            Self::Ingress(named, original) => {
                let target =
                    match req.headers_mut().remove(L5D_DST_OVERRIDE) {
                        Some(value) => value.to_str().ok().and_then(|text| target_of(text, 80)).ok_or_else(|| {
                            Cause::BadRequest("l5d-dst-override is neither host nor host:port".into())
                        })?,
                        None => original.clone(),
                    };
                let found = named.find(target).await?;
                call(&found, req, asked).await
            }
            Self::Explicit(named) => {
                if req.method() == Method::CONNECT {
                    let target = req.uri().authority().and_then(|a| target_of(a.as_str(), 443));
                    return tunnel(named, target.ok_or_else(|| Error::new(Cause::MissingAuthority))?).await;
                }
                if req.uri().scheme_str().is_some_and(|scheme| scheme != "http") {
                    return Err(Cause::BadRequest("only http can be proxied; use CONNECT for the rest".into()).into());
                }
                let authority = req.uri().authority().map(Authority::as_str).map(str::to_string);
                let host = || req.headers().get(HOST)?.to_str().ok().map(str::to_string);
                let target = authority.or_else(host).and_then(|text| target_of(&text, 80));
                let target = target.ok_or_else(|| Error::new(Cause::MissingAuthority))?;
                // The next hop is an origin server, which is not spoken to in absolute form.
                req.extensions_mut().remove::<AbsoluteForm>();
                let found = named.find(target).await?;
                call(&found, req, asked).await
            }
        }
    }
}

/// Sends a request to a destination.
pub(super) async fn call(found: &Found, req: Request<Body>, asked: &Asked) -> Result<Response<Tracked>, Error> {
    let version =
        Version::of(asked.version).ok_or_else(|| Error::new(Cause::BadRequest("unknown HTTP version".into())))?;
    let routes = found.http(version).get();
    routes.call(req, asked).await
}

/// CONNECT to what the request names: the bytes that follow are opaque.
async fn tunnel(named: &Named, target: Target) -> Result<Response<Tracked>, Error> {
    let found = named.find(target).await?;
    let route = found.tcp().get().route(None)?;
    let opened = route.open().await?;
    let mut rsp = Response::new(Tracked::new(Body::empty()));
    *rsp.status_mut() = StatusCode::OK;
    rsp.extensions_mut().insert(Tunnel::new(opened.into_io()));
    Ok(rsp)
}

/// `host`, `host:port`, or an address in the same forms.
pub(super) fn target_of(text: &str, default_port: u16) -> Option<Target> {
    let authority = Authority::try_from(text).ok().filter(|a| !a.as_str().contains('@'))?;
    let port = match authority.port() {
        Some(port) => port.as_str().parse().ok().filter(|p| *p != 0)?,
        // The parser lets a port pass that is none.
        None if authority.as_str().len() > authority.host().len() => return None,
        None => default_port,
    };
    let host = authority.host();
    if let Ok(ip) = host.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>() {
        return Some(Target::Addr(SocketAddr::new(ip, port)));
    }
    // Names that a certificate could have: whatever is not is no service either.
    let name: linkerd_tls::ServerName = host.parse().ok()?;
    Some(Target::Name(name.as_str().into(), port))
}

/// The rescue of outbound.
pub(super) fn rescue(config: &crate::config::Outbound) -> Rescue {
    Rescue { informational: config.informational_headers }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn authorities_name_targets() {
        let name = |name: &str, port| Some(Target::Name(name.into(), port));
        let addr = |text: &str| Some(Target::Addr(text.parse().unwrap()));
        for (text, expected) in [
            ("Web.Ns.svc.", name("web.ns.svc", 80)),
            ("web:8080", name("web", 8080)),
            ("10.0.0.1", addr("10.0.0.1:80")),
            ("[::1]:81", addr("[::1]:81")),
            ("web:0", None),
            ("web:x", None),
            ("u@web", None),
            ("", None),
            ("a b", None),
        ] {
            assert_eq!(target_of(text, 80), expected, "{text}");
        }
    }
}
