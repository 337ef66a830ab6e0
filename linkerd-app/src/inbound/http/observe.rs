//! Bodies that tell metrics what passes: request frames, the first response byte, how and when a response ended
//! (metrics.md 4.2 and 4.3). A body that has nothing to tell is left as it is.

use crate::{
    error::{Cause, Error},
    http::{Rescue, classify::Rule},
    telemetry::{Class, EndpointMetrics, InboundRouteMetrics},
};
use ::http::{HeaderMap, Response, StatusCode};
use bytes::Bytes;
use http_body::{Body as _, Frame, SizeHint};
use linkerd_stack::http::{Body, BodyError};
use parking_lot::Mutex;
use pin_project_lite::pin_project;
use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};
use tokio::time::Instant;

/// The handles of one route for one client.
#[derive(Clone)]
pub(super) struct Handles {
    pub endpoint: Arc<EndpointMetrics>,
    /// None for the admin server and the gateway (metrics.md 5.2).
    pub route: Option<Arc<InboundRouteMetrics>>,
}

/// One request on its way; dropped unused, it was cancelled before the response's headers and counts nowhere.
pub(super) struct Observed {
    handles: Handles,
    rule: Rule,
    start: Instant,
    /// When the request's body had been sent; shared with that body.
    sent: Arc<Mutex<Option<Instant>>>,
}

/// Begins to observe: counts the request now or at its first frame.
pub(super) fn request(handles: Handles, rule: Rule, body: Body) -> (Observed, Body) {
    let start = Instant::now();
    if let Some(route) = &handles.route {
        route.request();
    }
    let ended = body.is_end_stream();
    let sent = Arc::new(Mutex::new(ended.then_some(start)));
    let body = if ended {
        handles.endpoint.request();
        body
    } else {
        Body::new(RequestBody {
            inner: body,
            counted: false,
            guard: Sent { at: sent.clone() },
            handles: handles.clone(),
        })
    };
    (Observed { handles, rule, start, sent }, body)
}

impl Observed {
    /// There is an error instead of a response.
    pub(super) fn failed(self, cause: &Cause) {
        let judged = Class::error(cause);
        self.handles.endpoint.response(None, judged);
        if let Some(route) = &self.handles.route {
            route.ended(None, self.start.elapsed(), self.after_sent());
        }
    }

    /// The response's body tells the rest. With `rescue`, an error within it becomes gRPC trailers.
    pub(super) fn response(self, rsp: Response<Body>, rescue: Option<Rescue>) -> Response<Body> {
        let status = rsp.status();
        let judged = self.rule.start(status, rsp.headers());
        let head_status = crate::http::classify::grpc_status(rsp.headers());
        let report = Report { observed: self, status, judged, grpc: head_status, first: true, done: false };
        let (parts, body) = rsp.into_parts();
        if body.is_end_stream() {
            // Dropping the report says everything.
            return Response::from_parts(parts, body);
        }
        Response::from_parts(parts, Body::new(ResponseBody { inner: Some(body), report, rescue }))
    }

    /// From the end of the request to now; zero if the request has not ended.
    fn after_sent(&self) -> std::time::Duration {
        self.sent.lock().map(|at| at.elapsed()).unwrap_or_default()
    }
}

/// Notes when the request was sent or dropped.
struct Sent {
    at: Arc<Mutex<Option<Instant>>>,
}

impl Drop for Sent {
    fn drop(&mut self) {
        self.at.lock().get_or_insert_with(Instant::now);
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
            this.handles.endpoint.request();
        }
        match (&frame, &this.handles.route) {
            (Some(Ok(frame)), Some(route)) => {
                if let Some(data) = frame.data_ref() {
                    route.request_frame(data.len() as u64);
                }
            }
            (None, _) => {
                this.guard.at.lock().get_or_insert_with(Instant::now);
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
    fn first_byte(&mut self) {
        if std::mem::take(&mut self.first) {
            let status = self.status.as_u16();
            self.observed.handles.endpoint.first_byte(status, self.observed.start.elapsed());
        }
    }

    fn end(&mut self, trailers: Option<&HeaderMap>) {
        let judged = self.judged.unwrap_or_else(|| self.observed.rule.end(self.status, trailers));
        self.first_byte();
        self.grpc = trailers.and_then(crate::http::classify::grpc_status).or(self.grpc);
        self.tell(judged);
    }

    /// An error as the first frame leaves no latency behind.
    fn error(&mut self, cause: &Cause) {
        self.first = false;
        self.tell(Class::error(cause));
    }

    fn tell(&mut self, judged: Class) {
        if std::mem::replace(&mut self.done, true) {
            return;
        }
        let Observed { handles, rule, start, .. } = &self.observed;
        handles.endpoint.response(Some(self.status.as_u16()), judged);
        if let Some(route) = &handles.route {
            let status = match rule {
                Rule::Grpc => self.grpc,
                Rule::Http | Rule::Profile(_) => Some(self.status.as_u16()),
            };
            route.ended(status, start.elapsed(), self.observed.after_sent());
        }
    }
}

impl Drop for Report {
    fn drop(&mut self) {
        if !self.done {
            self.end(None);
        }
    }
}

pin_project! {
    struct ResponseBody {
        // None once an error has been turned into trailers.
        #[pin]
        inner: Option<Body>,
        report: Report,
        rescue: Option<Rescue>,
    }
}

impl http_body::Body for ResponseBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let mut this = self.project();
        let Some(inner) = this.inner.as_mut().as_pin_mut() else {
            return Poll::Ready(None);
        };
        match ready!(inner.poll_frame(cx)) {
            Some(Ok(frame)) => {
                this.report.first_byte();
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
                match this.rescue {
                    // A reset stays a reset.
                    Some(rescue) if error.reset().is_none() => {
                        let trailers = rescue.trailers(&failure);
                        this.inner.set(None);
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
