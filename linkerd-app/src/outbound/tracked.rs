//! The two bodies of an exchange, each in one wrapper: the response's tells endpoint, backend and route when it ends
//! and how, and enforces what is left of the limits; the request's tells how far it has come.
//!
//! Whoever waits for a response's end holds a hook that is told exactly once: at trailers, end, error, limit, or drop.

use super::limits::{BodyLimits, Progress};
use crate::{
    error::{Cause, Error, facts},
    http::{Asked, Rescue, classify},
    telemetry::{
        BackendMetrics, Class, Code, Direction, Ended, EndpointMetrics, ProfileRouteMetrics, RouteMetrics, StreamError,
        Telemetry, termination::Phase,
    },
};
use bytes::Bytes;
use http::{HeaderMap, Response, StatusCode};
use http_body::{Body as _, Frame, SizeHint};
use linkerd_stack::{
    balance::LoadHandle,
    breaker::{Outcome, Permit},
    http::{Body, BodyError},
};
use std::{
    collections::VecDeque,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};
use tokio::{sync::mpsc, time::Instant};

/// What asking a body for its next frame came to; none is its end.
type Event = Option<Result<Frame<Bytes>, Cause>>;

/// A response body on its way to the client.
#[derive(Debug)]
pub(super) struct Tracked {
    inner: Body,
    /// What was looked at before the response was passed on, at most two; nobody has been told of it yet.
    peeked: VecDeque<Event>,
    hooks: Hooks,
    limits: Vec<BodyLimits>,
    /// For gRPC requests: an error becomes trailers instead of a reset.
    rescue: Option<Rescue>,
    /// The client asked for gRPC over HTTP/2.
    first: bool,
    done: bool,
    /// Told of failures once nothing but the client is left to see them.
    edge: Option<Telemetry>,
}

#[derive(Debug, Default)]
struct Hooks {
    endpoint: Option<EndpointHook>,
    profile: Vec<ProfileHook>,
    backend: Option<BackendHook>,
    route: Option<RouteHook>,
}

/// What an endpoint wants to know: load, breaker, and the older metrics.
#[derive(Debug)]
pub(super) struct EndpointHook {
    pub(super) metrics: Arc<EndpointMetrics>,
    pub(super) status: StatusCode,
    pub(super) rule: classify::Rule,
    /// The judgement, if the headers sufficed.
    pub(super) class: Option<Class>,
    pub(super) dispatched: Instant,
    pub(super) load: LoadHandle,
    /// Load that a failure counts as, at the least.
    pub(super) penalty: Option<Duration>,
    /// None once the verdict has been given.
    pub(super) permit: Option<(Permit, Option<Duration>)>,
}

/// A ServiceProfile's route, over all attempts or per attempt.
#[derive(Debug)]
pub(super) struct ProfileHook {
    pub(super) metrics: Arc<ProfileRouteMetrics>,
    /// Whether this is one attempt of several.
    pub(super) actual: bool,
    pub(super) status: StatusCode,
    pub(super) rule: classify::Rule,
    pub(super) class: Option<Class>,
    pub(super) dispatched: Instant,
}

#[derive(Debug)]
struct BackendHook {
    metrics: Arc<BackendMetrics>,
    status: EndStatus,
    dispatched: Instant,
    progress: Option<Arc<Progress>>,
}

#[derive(Debug)]
struct RouteHook {
    metrics: Arc<RouteMetrics>,
    status: EndStatus,
    dispatched: Instant,
}

/// The status that the newer families report.
#[derive(Copy, Clone, Debug)]
enum EndStatus {
    Http(u16),
    /// The code in the headers, if there was one.
    Grpc(Option<u16>),
}

impl EndStatus {
    fn of<B>(rsp: &Response<B>, grpc: bool) -> Self {
        if grpc { Self::Grpc(classify::grpc_status(rsp.headers())) } else { Self::Http(rsp.status().as_u16()) }
    }

    /// Trailers override headers even when they lack the field (metrics.md 4.3).
    fn ended(self, trailers: Option<&HeaderMap>, error: Option<StreamError>) -> Ended {
        let status = match (self, trailers) {
            (Self::Http(status), _) => status,
            (Self::Grpc(_), Some(trailers)) => classify::grpc_status(trailers).unwrap_or(2),
            (Self::Grpc(code), None) => code.unwrap_or(2),
        };
        Ended { status: Some(status), error }
    }
}

/// How a body ended.
enum End<'a> {
    /// Well.
    Whole(Option<&'a HeaderMap>),
    /// Badly.
    Failed(&'a Cause),
    /// Given up by whoever read it.
    Dropped,
}

impl Tracked {
    pub(super) fn new(inner: Body) -> Self {
        Self {
            inner,
            peeked: VecDeque::new(),
            hooks: Hooks::default(),
            limits: Vec::new(),
            rescue: None,
            first: true,
            done: false,
            edge: None,
        }
    }

    pub(super) fn hook_endpoint(rsp: &mut Response<Self>, hook: EndpointHook) {
        rsp.body_mut().hooks.endpoint = Some(hook);
    }

    pub(super) fn hook_profile(rsp: &mut Response<Self>, hook: ProfileHook) {
        rsp.body_mut().hooks.profile.push(hook);
    }

    pub(super) fn hook_backend(
        rsp: &mut Response<Self>,
        grpc: bool,
        metrics: &Arc<BackendMetrics>,
        dispatched: Instant,
        progress: Option<&Arc<Progress>>,
    ) {
        let hook = BackendHook {
            metrics: metrics.clone(),
            status: EndStatus::of(rsp, grpc),
            dispatched,
            progress: progress.cloned(),
        };
        rsp.body_mut().hooks.backend = Some(hook);
    }

    pub(super) fn hook_route(rsp: &mut Response<Self>, grpc: bool, metrics: &Arc<RouteMetrics>, dispatched: Instant) {
        let hook = RouteHook { metrics: metrics.clone(), status: EndStatus::of(rsp, grpc), dispatched };
        rsp.body_mut().hooks.route = Some(hook);
    }

    pub(super) fn limit(&mut self, limits: Option<BodyLimits>) {
        self.limits.extend(limits);
    }

    /// Looks at the beginning of the body: its first frame, and the second if it is there already. Returns trailers if
    /// they came so early, which is how gRPC calls without a message fail.
    pub(super) async fn peek_trailers(&mut self) -> Option<&HeaderMap> {
        let first = std::future::poll_fn(|cx| self.poll_event(cx)).await;
        let is_data = matches!(&first, Some(Ok(frame)) if frame.is_data());
        self.peeked.push_back(first);
        if is_data && let Poll::Ready(second) = futures_util::poll!(std::future::poll_fn(|cx| self.poll_event(cx))) {
            self.peeked.push_back(second);
        }
        self.peeked.iter().flatten().flatten().find_map(Frame::trailers_ref)
    }

    /// The body for the client's connection.
    pub(super) fn into_body(mut self, rescue: &Rescue, asked: &Asked, telemetry: &Telemetry) -> Body {
        if self.inner.is_end_stream() && self.peeked.is_empty() {
            self.end(&End::Whole(None));
            return std::mem::take(&mut self.inner);
        }
        self.rescue = asked.grpc.then_some(*rescue);
        self.edge = Some(telemetry.clone());
        Body::new(self)
    }

    fn frame(&mut self, frame: &Frame<Bytes>) {
        self.first_byte();
        if let Some(data) = frame.data_ref()
            && let Some(backend) = &self.hooks.backend
        {
            backend.metrics.response_frame(data.len() as u64);
        }
        if let Some(trailers) = frame.trailers_ref() {
            self.end(&End::Whole(Some(trailers)));
        } else if self.inner.is_end_stream() && self.peeked.is_empty() {
            self.end(&End::Whole(None));
        }
    }

    fn first_byte(&mut self) {
        if !std::mem::replace(&mut self.first, false) {
            return;
        }
        if let Some(hook) = &self.hooks.endpoint {
            let elapsed = hook.dispatched.elapsed();
            match hook.penalty {
                Some(penalty) => hook.load.penalize(penalty.max(elapsed)),
                None => hook.load.observe(elapsed),
            }
            hook.metrics.first_byte(hook.status.as_u16(), elapsed);
        }
        for hook in self.hooks.profile.iter().filter(|hook| !hook.actual) {
            hook.metrics.logical.first_byte(hook.status.as_u16(), hook.dispatched.elapsed());
        }
    }

    /// Tells every hook, once.
    fn end(&mut self, end: &End<'_>) {
        if std::mem::replace(&mut self.done, true) {
            return;
        }
        if !matches!(end, End::Failed(_)) {
            self.first_byte();
        }
        let (trailers, error) = match end {
            End::Whole(trailers) => (*trailers, None),
            End::Failed(cause) => (None, facts(cause).stream),
            End::Dropped => (None, Some(StreamError::Unknown)),
        };
        if let Some(telemetry) = &self.edge {
            match end {
                End::Whole(_) => {}
                End::Failed(cause) => {
                    telemetry.terminated(Direction::Outbound, Code::of(cause, Phase::Response));
                }
                End::Dropped => drop(telemetry.canceled(Direction::Outbound, Phase::Response)),
            }
        }
        let hooks = std::mem::take(&mut self.hooks);
        if let Some(hook) = hooks.endpoint {
            let class = match end {
                End::Failed(cause) => Class::error(cause),
                End::Whole(_) | End::Dropped => hook.class.unwrap_or_else(|| hook.rule.end(hook.status, trailers)),
            };
            hook.metrics.response(Some(hook.status.as_u16()), class);
            if let Some((permit, retry_after)) = hook.permit {
                match end {
                    End::Failed(_) => permit.resolve_with(Outcome::Failure, retry_after),
                    End::Whole(_) => permit.resolve_with(outcome(&class, hook.status), retry_after),
                    // Nobody knows how it would have ended.
                    End::Dropped => drop(permit),
                }
            }
        }
        for hook in hooks.profile {
            let class = match end {
                End::Failed(cause) => Class::error(cause),
                End::Whole(_) | End::Dropped => hook.class.unwrap_or_else(|| hook.rule.end(hook.status, trailers)),
            };
            let metrics = if hook.actual { &hook.metrics.actual } else { &hook.metrics.logical };
            metrics.response(Some(hook.status.as_u16()), class);
        }
        if let Some(hook) = hooks.backend {
            let sent = match &hook.progress {
                Some(progress) => progress.ended(),
                None => Some(hook.dispatched),
            };
            hook.metrics.ended(hook.status.ended(trailers, error), sent.map_or(Duration::ZERO, |at| at.elapsed()));
        }
        if let Some(hook) = hooks.route {
            hook.metrics.ended(hook.status.ended(trailers, error), hook.dispatched.elapsed());
        }
    }

    fn fail(&mut self, cause: Cause) -> Option<Result<Frame<Bytes>, BodyError>> {
        self.end(&End::Failed(&cause));
        self.limits.clear();
        // Dropped here, so that the peer is told at once.
        self.inner = Body::empty();
        let reset = match &cause {
            Cause::Http2Reset(reason) => Some(*reason),
            _ => None,
        };
        let error = Error::new(cause);
        tracing::debug!(%error, "response body failed");
        // A reset stays a reset: its reason is what the client's library makes a code of.
        match self.rescue.take().filter(|_| reset.is_none()) {
            Some(rescue) => Some(Ok(Frame::trailers(rescue.trailers(&error)))),
            None => Some(Err(match reset {
                Some(reason) => BodyError::Reset(reason.into()),
                None => BodyError::other(error),
            })),
        }
    }

    /// Asks for the next frame, and watches the limits.
    fn poll_event(&mut self, cx: &mut Context<'_>) -> Poll<Event> {
        match Pin::new(&mut self.inner).poll_frame(cx) {
            Poll::Ready(Some(Ok(frame))) => {
                for limits in &mut self.limits {
                    limits.frame();
                }
                Poll::Ready(Some(Ok(frame)))
            }
            Poll::Ready(Some(Err(error))) => Poll::Ready(Some(Err(body_cause(&error)))),
            Poll::Ready(None) => Poll::Ready(None),
            Poll::Pending if self.done => Poll::Pending,
            Poll::Pending => {
                let met = self.limits.iter_mut().find_map(|limits| match limits.poll(cx) {
                    Poll::Ready(cause) => Some(cause),
                    Poll::Pending => None,
                });
                met.map_or(Poll::Pending, |cause| Poll::Ready(Some(Err(cause))))
            }
        }
    }

    /// Passes on what came, and tells the hooks.
    fn deliver(&mut self, event: Event) -> Option<Result<Frame<Bytes>, BodyError>> {
        match event {
            Some(Ok(frame)) => {
                self.frame(&frame);
                Some(Ok(frame))
            }
            Some(Err(cause)) => self.fail(cause),
            None => {
                self.end(&End::Whole(None));
                None
            }
        }
    }
}

/// What a breaker makes of a judged response (behaviour.md D.10).
pub(super) fn outcome(class: &Class, status: StatusCode) -> Outcome {
    if class.grpc_status == Some(8) || status == StatusCode::TOO_MANY_REQUESTS {
        Outcome::RateLimited
    } else if class.success {
        Outcome::Success
    } else {
        Outcome::Failure
    }
}

/// Why a body failed.
fn body_cause(error: &BodyError) -> Cause {
    match error {
        BodyError::Reset(reset) => Cause::Http2Reset(reset.reason()),
        BodyError::Io(error) => Cause::Io { errno: error.raw_os_error(), message: error.to_string().into() },
        BodyError::Incomplete => Cause::IncompleteResponse,
        BodyError::Other(error) => Cause::Unexpected(error.to_string().into()),
    }
}

impl http_body::Body for Tracked {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let event = match self.peeked.pop_front() {
            Some(event) => event,
            None => ready!(self.poll_event(cx)),
        };
        Poll::Ready(self.deliver(event))
    }

    fn is_end_stream(&self) -> bool {
        self.peeked.is_empty() && self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        if self.peeked.is_empty() { self.inner.size_hint() } else { SizeHint::default() }
    }
}

impl Drop for Tracked {
    fn drop(&mut self) {
        // An attempt that was looked at and found wanting ended as what was seen of it.
        while let (false, Some(event)) = (self.done, self.peeked.pop_front()) {
            drop(self.deliver(event));
        }
        if !self.done {
            // A codec that has all announced bytes does not ask for more.
            let end = if self.inner.is_end_stream() { End::Whole(None) } else { End::Dropped };
            self.end(&end);
        }
    }
}

/// Frames that wait for a mirror; when it falls further behind, its copy is cut off (resources.md 3.7: a mirror never
/// delays the request).
pub(super) const MIRROR_FRAMES: usize = 32;

/// A request body on its way to an endpoint.
#[derive(Debug)]
pub(super) struct Outgoing {
    inner: Body,
    progress: Arc<Progress>,
    route: Option<Arc<RouteMetrics>>,
    mirrors: Vec<mpsc::Sender<Frame<Bytes>>>,
}

impl Outgoing {
    pub(super) fn new(inner: Body, progress: Arc<Progress>, route: Option<Arc<RouteMetrics>>) -> Self {
        Self { inner, progress, route, mirrors: Vec::new() }
    }

    /// A copy of everything that is to come.
    pub(super) fn mirror(&mut self) -> Body {
        let (tx, rx) = mpsc::channel(MIRROR_FRAMES);
        self.mirrors.push(tx);
        Body::new(Copied { rx, length: self.inner.size_hint() })
    }
}

impl http_body::Body for Outgoing {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let polled = Pin::new(&mut self.inner).poll_frame(cx);
        match &polled {
            Poll::Ready(Some(Ok(frame))) => {
                self.progress.frame();
                if let (Some(route), Some(data)) = (&self.route, frame.data_ref()) {
                    route.request_frame(data.len() as u64);
                }
                self.mirrors.retain(|mirror| {
                    let copy = match (frame.data_ref(), frame.trailers_ref()) {
                        (Some(data), _) => Frame::data(data.clone()),
                        (None, Some(trailers)) => Frame::trailers(trailers.clone()),
                        (None, None) => return true,
                    };
                    mirror.try_send(copy).is_ok()
                });
                if self.inner.is_end_stream() || frame.is_trailers() {
                    self.progress.end();
                    self.mirrors.clear();
                }
            }
            Poll::Ready(_) => {
                self.progress.end();
                self.mirrors.clear();
            }
            Poll::Pending => {}
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

impl Drop for Outgoing {
    fn drop(&mut self) {
        self.progress.end();
    }
}

/// The body of a mirrored request.
struct Copied {
    rx: mpsc::Receiver<Frame<Bytes>>,
    length: SizeHint,
}

impl http_body::Body for Copied {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        self.rx.poll_recv(cx).map(|frame| frame.map(Ok))
    }

    fn size_hint(&self) -> SizeHint {
        self.length
    }
}
