//! Bodies that tell metrics what passes: request frames, the first response byte, how and when a response ended
//! (metrics.md 4.2 and 4.3). A body that has nothing to tell is left as it is.

use crate::{
    error::{Cause, Error},
    http::{
        Rescue,
        classify::{Rule, grpc_status},
    },
    telemetry::{
        Class, Code, Direction, EndpointMetrics, InboundRouteMetrics, ProfileRouteMetrics, Telemetry,
        termination::Phase,
    },
};
use ::http::{HeaderMap, Response, StatusCode};
use bytes::Bytes;
use http_body::{Body as _, Frame, SizeHint};
use linkerd_stack::http::{Body, BodyError};
use pin_project_lite::pin_project;
use std::{
    pin::Pin,
    sync::{Arc, OnceLock},
    task::{Context, Poll, ready},
    time::Duration,
};
use tokio::time::Instant;

/// The handles of one route for one client.
#[derive(Clone)]
pub(super) struct Handles {
    /// None for the gateway.
    pub endpoint: Option<Arc<EndpointMetrics>>,
    /// Told when a response breaks off; none for the gateway, where outbound is told.
    pub edge: Option<Telemetry>,
    /// None for the admin server and the gateway (metrics.md 5.2).
    pub route: Option<Arc<InboundRouteMetrics>>,
    /// The ServiceProfile's route, if the request is on one.
    pub profile: Option<Arc<ProfileRouteMetrics>>,
}

impl Handles {
    fn request(&self) {
        if let Some(endpoint) = &self.endpoint {
            endpoint.request();
        }
        if let Some(profile) = &self.profile {
            profile.logical.request();
        }
    }

    fn first_byte(&self, status: StatusCode, latency: Duration) {
        if let Some(endpoint) = &self.endpoint {
            endpoint.first_byte(status.as_u16(), latency);
        }
        if let Some(profile) = &self.profile {
            profile.logical.first_byte(status.as_u16(), latency);
        }
    }

    fn response(&self, status: Option<StatusCode>, judged: Class) {
        let status = status.map(|status| status.as_u16());
        if let Some(endpoint) = &self.endpoint {
            endpoint.response(status, judged);
        }
        if let Some(profile) = &self.profile {
            profile.logical.response(status, judged);
        }
    }
}

/// One request on its way; dropped unused, it was cancelled before the response's headers and counts nowhere.
pub(super) struct Observed {
    handles: Handles,
    rule: Rule,
    start: Instant,
    sent: SentAt,
}

/// When the request had been sent.
enum SentAt {
    /// With its head.
    Start,
    /// When its body was; that tells.
    Body(Arc<OnceLock<Instant>>),
}

/// Begins to observe: counts the request now or at its first frame.
pub(super) fn request(handles: Handles, rule: Rule, body: Body) -> (Observed, Body) {
    let start = Instant::now();
    if let Some(route) = &handles.route {
        route.request();
    }
    if body.is_end_stream() {
        handles.request();
        return (Observed { handles, rule, start, sent: SentAt::Start }, body);
    }
    let sent = Arc::new(OnceLock::new());
    let guard = Sent { at: sent.clone() };
    let body = Body::new(RequestBody { inner: body, counted: false, guard, handles: handles.clone() });
    (Observed { handles, rule, start, sent: SentAt::Body(sent) }, body)
}

impl Observed {
    /// There is an error instead of a response.
    pub(super) fn failed(self, cause: &Cause) {
        self.ended(None, Class::error(cause), None, Instant::now());
    }

    /// The response's body tells the rest. With `rescue`, an error within it becomes gRPC trailers.
    pub(super) fn response(self, rsp: Response<Body>, rescue: Option<Rescue>) -> Response<Body> {
        let status = rsp.status();
        let judged = self.rule.start(status, rsp.headers());
        let grpc = grpc_status(rsp.headers());
        let report = Report { observed: self, status, judged, grpc, first: true, done: false };
        if rsp.body().is_end_stream() {
            // Dropping the report says everything.
            return rsp;
        }
        rsp.map(|inner| Body::new(ResponseBody { inner: Some(inner), report, rescue }))
    }

    fn ended(&self, status: Option<StatusCode>, judged: Class, route_status: Option<u16>, now: Instant) {
        self.handles.response(status, judged);
        if let Some(route) = &self.handles.route {
            let since_start = now.duration_since(self.start);
            // Zero if the response ended before the request did.
            let since_sent = match &self.sent {
                SentAt::Start => since_start,
                SentAt::Body(at) => at.get().map(|at| now.duration_since(*at)).unwrap_or_default(),
            };
            route.ended(route_status, since_start, since_sent);
        }
    }
}

/// Notes when the request was sent or dropped.
struct Sent {
    at: Arc<OnceLock<Instant>>,
}

impl Drop for Sent {
    fn drop(&mut self) {
        self.at.get_or_init(Instant::now);
    }
}

pin_project! {
    struct RequestBody {
        #[pin]
        inner: Body,
        counted: bool,
        guard: Sent,
        handles: Handles,
    }
}

impl http_body::Body for RequestBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let this = self.project();
        let frame = ready!(this.inner.poll_frame(cx));
        if !std::mem::replace(this.counted, true) {
            this.handles.request();
        }
        match (&frame, &this.handles.route) {
            (Some(Ok(frame)), Some(route)) => {
                if let Some(data) = frame.data_ref() {
                    route.request_frame(data.len() as u64);
                }
            }
            (None, _) => {
                this.guard.at.get_or_init(Instant::now);
            }
            _ => {}
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

/// What is known of a response so far; told at its end or when it is dropped.
struct Report {
    observed: Observed,
    status: StatusCode,
    /// None while trailers may decide.
    judged: Option<Class>,
    grpc: Option<u16>,
    first: bool,
    done: bool,
}

impl Report {
    fn first_byte(&mut self, now: impl FnOnce() -> Instant) {
        if std::mem::take(&mut self.first) {
            self.observed.handles.first_byte(self.status, now().duration_since(self.observed.start));
        }
    }

    fn end(&mut self, trailers: Option<&HeaderMap>) {
        let judged = self.judged.unwrap_or_else(|| self.observed.rule.end(self.status, trailers));
        self.grpc = trailers.and_then(grpc_status).or(self.grpc);
        let now = Instant::now();
        self.first_byte(|| now);
        self.tell(judged, now);
    }

    /// An error as the first frame leaves no latency behind.
    fn error(&mut self, cause: &Cause) {
        self.first = false;
        self.tell(Class::error(cause), Instant::now());
    }

    fn tell(&mut self, judged: Class, now: Instant) {
        if std::mem::replace(&mut self.done, true) {
            return;
        }
        let route_status = match self.observed.rule {
            Rule::Grpc => self.grpc,
            Rule::Http | Rule::Profile(_) => Some(self.status.as_u16()),
        };
        self.observed.ended(Some(self.status), judged, route_status, now);
    }
}

impl Drop for Report {
    fn drop(&mut self) {
        if !self.done {
            self.end(None);
        }
    }
}

struct ResponseBody {
    /// None once an error has been turned into trailers.
    inner: Option<Body>,
    report: Report,
    rescue: Option<Rescue>,
}

/// A body that is dropped before its end was given up by the client.
impl Drop for ResponseBody {
    fn drop(&mut self) {
        let ended = self.report.done || self.inner.as_ref().is_none_or(|inner| inner.is_end_stream());
        if let (false, Some(edge)) = (ended, &self.report.observed.handles.edge) {
            edge.canceled(Direction::Inbound, Phase::Response);
        }
    }
}

impl http_body::Body for ResponseBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let this = &mut *self;
        let Some(inner) = &mut this.inner else {
            return Poll::Ready(None);
        };
        match ready!(Pin::new(inner).poll_frame(cx)) {
            Some(Ok(frame)) => {
                this.report.first_byte(Instant::now);
                if let Some(data) = frame.data_ref() {
                    if let Some(route) = &this.report.observed.handles.route {
                        route.response_frame(data.len() as u64);
                    }
                } else if let Some(trailers) = frame.trailers_ref() {
                    this.report.end(Some(trailers));
                }
                Poll::Ready(Some(Ok(frame)))
            }
            Some(Err(error)) => {
                let failure = body_failure(&error);
                this.report.error(failure.cause());
                if let Some(edge) = &this.report.observed.handles.edge {
                    edge.terminated(Direction::Inbound, Code::of(failure.cause(), Phase::Response));
                }
                match &this.rescue {
                    // A reset stays a reset.
                    Some(rescue) if error.reset().is_none() => {
                        let trailers = rescue.trailers(&failure);
                        this.inner = None;
                        Poll::Ready(Some(Ok(Frame::trailers(trailers))))
                    }
                    _ => Poll::Ready(Some(Err(error))),
                }
            }
            None => {
                this.report.end(None);
                Poll::Ready(None)
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.inner.as_ref().is_none_or(|inner| inner.is_end_stream())
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.as_ref().map_or_else(|| SizeHint::with_exact(0), |inner| inner.size_hint())
    }
}

/// The failure that a broken body means.
fn body_failure(error: &BodyError) -> Error {
    match error {
        BodyError::Reset(reset) => Cause::Http2Reset(reset.reason()).into(),
        BodyError::Io(error) => crate::transport::io_failure(error),
        BodyError::Incomplete => Cause::IncompleteResponse.into(),
        BodyError::Other(error) => Cause::Unexpected(error.to_string().into()).into(),
    }
}
