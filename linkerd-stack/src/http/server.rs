//! One accepted connection, served as HTTP/1 or HTTP/2: codec settings, the checks before a request is a request, what
//! becomes of errors, upgrades, and the graceful end.
//!
//! An HTTP/1 connection has these states: idle (soon at rest, see `rest`), busy (a request has begun), closing (a drain was
//! signaled or a response asked for it: the current response is the last one and says `connection: close`; from idle,
//! this is the end), and upgraded (no longer ours, see `upgrade`). An HTTP/2 connection is open or closing (GOAWAY sent;
//! ends with its last stream).

use super::{
    Version,
    body::{Body, Reset, copy_io, source},
    client::Lease,
    headers,
    normalize::{self, BadRequest, Cached},
    rest::{self, Activity, Outgoing, Stream, Timer},
    upgrade,
};
use crate::{drain, io::Io};
use futures_util::task::AtomicWaker;
use http::{HeaderValue, Method, Request, Response, StatusCode, header};
use http_body::Body as _;
use hyper::{body::Incoming, server::conn::http1::UpgradeableConnection};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use pin_project_lite::pin_project;
use std::{
    cell::RefCell,
    error::Error as StdError,
    fmt,
    future::{Future, poll_fn},
    io,
    pin::{Pin, pin},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, Wake, Waker, ready},
    time::Duration,
};
use tower::Service;

/// How connections are served. Values outside what the protocol allows are brought into its range.
#[derive(Clone, Debug)]
pub struct ServerConfig {
    /// HTTP/2 stream window, bytes.
    pub stream_window: u32,
    /// HTTP/2 connection window, bytes.
    pub connection_window: u32,
    /// HTTP/2 windows grow with the bandwidth-delay product instead.
    pub adaptive_window: bool,
    /// HTTP/2 PING interval, and how long the answer may take.
    pub keep_alive: Option<(Duration, Duration)>,
    /// Streams a client may have open; none = no limit is advertised.
    pub max_concurrent_streams: Option<u32>,
    /// Largest HTTP/2 frame accepted, bytes.
    pub max_frame_size: Option<u32>,
    /// Largest head of a request, bytes, measured as RFC 9113 section 6.5.2 does, on HTTP/1 too.
    pub max_header_size: u32,
    /// What the answer 431 calls `max_header_size`.
    pub max_header_setting: &'static str,
    /// Streams reset by the client before they were accepted.
    pub max_pending_accept_reset_streams: Option<usize>,
    /// HTTP/2 write buffer per stream, bytes.
    pub max_send_buf_size: Option<usize>,
}

impl Default for ServerConfig {
    /// The defaults of behaviour.md 0.2 and E.5, with a head of 64 KiB.
    fn default() -> Self {
        Self {
            stream_window: 65_535,
            connection_window: 1_048_576,
            adaptive_window: false,
            keep_alive: None,
            max_concurrent_streams: None,
            max_frame_size: None,
            max_header_size: 64 * 1024,
            max_header_setting: "the limit",
            max_pending_accept_reset_streams: None,
            max_send_buf_size: None,
        }
    }
}

/// Response extension: after this response the connection is closed gracefully.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct CloseConnection;

/// Why a connection ended badly. The client has been told what it can be told.
#[derive(Debug)]
pub enum ServeError {
    /// Reading or writing failed, or the client went away in the middle of something.
    Io(io::Error),
    /// The client does not speak this protocol, or speaks it wrongly.
    Protocol(Arc<str>),
    /// An HTTP/1 request, or the content of its response, ended with this, so that its connection had to.
    Reset(Reset),
    /// Anything else.
    Other(Arc<str>),
}

impl fmt::Display for ServeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Io(error) => error.fmt(f),
            Self::Protocol(message) | Self::Other(message) => f.write_str(message),
            Self::Reset(reset) => reset.fmt(f),
        }
    }
}

impl StdError for ServeError {}

impl From<hyper::Error> for ServeError {
    fn from(error: hyper::Error) -> Self {
        if let Some(reset) = source::<Reset>(&error) {
            return Self::Reset(reset.clone());
        }
        let h2 = source::<h2::Error>(&error);
        if let Some(io) = h2.and_then(h2::Error::get_io).or_else(|| source(&error)) {
            return Self::Io(copy_io(io));
        }
        let mut message = error.to_string();
        if let Some(cause) = error.source() {
            message = format!("{message}: {cause}");
        }
        if error.is_incomplete_message() {
            Self::Io(io::Error::new(io::ErrorKind::UnexpectedEof, message))
        } else if error.is_parse() || h2.is_some() {
            Self::Protocol(message.into())
        } else {
            Self::Other(message.into())
        }
    }
}

/// Buffer of an HTTP/1 connection: what the codec uses by default, room for a head of 100 headers, bytes.
const MIN_BUFFER: usize = 8_192 + 4_096 * 100;

/// The codec's own limit is this many times `max_header_size`: a head between the two is read, so that it can be
/// answered with the name of the setting; a larger one gets the codec's bare 431.
const CODEC_HEADER_FACTOR: u32 = 2;

/// RFC 9113 section 6.5.2: SETTINGS_MAX_FRAME_SIZE, bytes.
pub(super) const FRAME_SIZES: std::ops::RangeInclusive<u32> = (1 << 14)..=((1 << 24) - 1);

/// RFC 9113 section 6.9.1: flow-control windows, bytes.
pub(super) const MAX_WINDOW: u32 = (1 << 31) - 1;

/// Serves one connection until it ends. Dropping the future closes it at once.
///
/// `Err(Reset)` of the service ends a request without an answer: `RST_STREAM` on HTTP/2, a closed connection on HTTP/1.
/// When `drain` is signaled the connection ends gracefully; it does not end by itself if a request never does.
pub async fn serve<I, S>(
    config: &ServerConfig,
    version: Version,
    io: I,
    service: S,
    drain: drain::Watch,
) -> Result<(), ServeError>
where
    I: Io,
    S: Service<Request<Body>, Response = Response<Body>, Error = Reset> + Clone + Send + 'static,
    S::Future: Send,
{
    let activity = Arc::default();
    let state = Arc::new(State {
        version,
        max_header_size: config.max_header_size,
        max_header_setting: config.max_header_setting,
        closing: AtomicBool::new(false),
        woken: AtomicBool::new(true),
        waker: AtomicWaker::new(),
        drain: drain.clone(),
    });
    let glue = Glue { service, state: state.clone(), activity, authority: RefCell::new(None) };
    let drained = pin!(drain.signaled());
    match version {
        Version::H1 => serve1(&http1(config), io, glue, &state, drained).await,
        Version::H2 => {
            let mut conn = Box::pin(http2(config).serve_connection(TokioIo::new(io), glue));
            run(conn.as_mut(), |conn| conn.graceful_shutdown(), &state, drained, None).await?;
            Ok(())
        }
    }
}

/// A codec after the other, and between them the connection rests.
async fn serve1<I, S>(
    builder: &hyper::server::conn::http1::Builder,
    io: I,
    mut glue: Glue<S>,
    state: &Arc<State>,
    mut drained: Pin<&mut impl Future<Output = ()>>,
) -> Result<(), ServeError>
where
    I: Io,
    S: Service<Request<Body>, Response = Response<Body>, Error = Reset> + Clone + Send + 'static,
    S::Future: Send,
{
    let mut io = Stream::new(io, glue.activity.clone());
    loop {
        let activity = glue.activity.clone();
        let mut conn = Box::new(builder.serve_connection(TokioIo::new(io), glue).with_upgrades());
        let shutdown = |conn: Pin<&mut UpgradeableConnection<_, _>>| conn.graceful_shutdown();
        match run(Pin::new(&mut *conn), shutdown, state, drained.as_mut(), Some(&activity)).await? {
            End::Closed => return Ok(()),
            End::Quiet => {}
        }
        let rest;
        (rest, glue) = match conn.into_parts() {
            Some(parts) => (parts.io.into_inner().rest(parts.read_buf, drained.as_mut()), parts.service),
            // Of a connection that was upgraded, and that has no more requests.
            None => return Ok(()),
        };
        match rest.await.map_err(ServeError::Io)? {
            Some(awake) => io = awake,
            None => return Ok(()),
        }
    }
}

fn http1(config: &ServerConfig) -> hyper::server::conn::http1::Builder {
    let mut builder = hyper::server::conn::http1::Builder::new();
    builder
        // `attend` tells clients that closed their side and wait from those that are gone.
        .half_close(true)
        .header_read_timeout(None)
        .max_buf_size(MIN_BUFFER.max(config.max_header_size.saturating_mul(CODEC_HEADER_FACTOR) as usize));
    builder
}

fn http2(config: &ServerConfig) -> hyper::server::conn::http2::Builder<TokioExecutor> {
    let mut builder = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
    builder
        .timer(TokioTimer::new())
        .initial_stream_window_size(config.stream_window.min(MAX_WINDOW))
        .initial_connection_window_size(config.connection_window.min(MAX_WINDOW))
        .max_concurrent_streams(config.max_concurrent_streams)
        .max_header_list_size(config.max_header_size.saturating_mul(CODEC_HEADER_FACTOR))
        .max_pending_accept_reset_streams(config.max_pending_accept_reset_streams);
    if config.adaptive_window {
        builder.adaptive_window(true);
    }
    if let Some((interval, timeout)) = config.keep_alive {
        builder.keep_alive_interval(interval).keep_alive_timeout(timeout);
    }
    if let Some(size) = config.max_frame_size {
        builder.max_frame_size(size.clamp(*FRAME_SIZES.start(), *FRAME_SIZES.end()));
    }
    if let Some(size) = config.max_send_buf_size {
        builder.max_send_buf_size(size.min(u32::MAX as usize));
    }
    builder
}

/// What the connection and its requests share. As a `Wake`, it notes that the drain or the timer has something to say
/// before it wakes the connection, so that a connection that was woken for another reason need not ask.
struct State {
    version: Version,
    max_header_size: u32,
    max_header_setting: &'static str,
    /// A response asked for the end.
    closing: AtomicBool,
    /// The drain's future and the timer must be polled.
    woken: AtomicBool,
    /// The task of the connection.
    waker: AtomicWaker,
    drain: drain::Watch,
}

impl Wake for State {
    fn wake(self: Arc<Self>) {
        self.woken.store(true, Ordering::SeqCst);
        self.waker.wake();
    }
}

impl State {
    fn close(&self) {
        self.closing.store(true, Ordering::SeqCst);
        self.waker.wake();
    }
}

/// How a codec ended.
enum End {
    /// With its connection.
    Closed,
    /// The connection can rest.
    Quiet,
}

/// Drives a connection, and ends it gracefully when told to, or its codec when it may rest.
async fn run<C>(
    mut conn: Pin<&mut C>,
    shutdown: impl Fn(Pin<&mut C>),
    state: &Arc<State>,
    mut drained: Pin<&mut impl Future<Output = ()>>,
    rests: Option<&Arc<Activity>>,
) -> Result<End, hyper::Error>
where
    C: Future<Output = Result<(), hyper::Error>>,
{
    let waker = Waker::from(state.clone());
    let mut rests = rests.map(|activity| (activity, Timer::new(activity)));
    // Whatever waited for the drain before, be it a connection at rest, did so with another waker.
    state.woken.store(true, Ordering::SeqCst);
    let mut registered: Option<Waker> = None;
    let mut shut = false;
    poll_fn(|cx| {
        loop {
            if let Poll::Ready(result) = conn.as_mut().poll(cx) {
                return Poll::Ready(result.map(|()| End::Closed));
            }
            if shut {
                return Poll::Pending;
            }
            if !registered.as_ref().is_some_and(|waker| waker.will_wake(cx.waker())) {
                state.waker.register(cx.waker());
                registered = Some(cx.waker().clone());
            }
            let mut end = state.closing.load(Ordering::SeqCst);
            let woken = state.woken.swap(false, Ordering::SeqCst);
            let mut cx_woken = Context::from_waker(&waker);
            if woken {
                end |= drained.as_mut().poll(&mut cx_woken).is_ready();
            }
            if !end {
                let Some((activity, timer)) = &mut rests else { return Poll::Pending };
                if !timer.is_due(activity, woken, &mut cx_woken) {
                    return Poll::Pending;
                }
                // The codec has the last word: only if it is idle too, it ends here.
                let ended = activity.keep(|| {
                    shutdown(conn.as_mut());
                    conn.as_mut().poll(cx)
                });
                shut = true;
                return ended.map_ok(|()| End::Quiet);
            }
            shut = true;
            shutdown(conn.as_mut());
        }
    })
    .await
}

/// What the codec calls for each request.
struct Glue<S> {
    service: S,
    state: Arc<State>,
    activity: Arc<Activity>,
    authority: RefCell<Cached>,
}

impl<S> hyper::service::Service<Request<Incoming>> for Glue<S>
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Reset> + Clone,
{
    type Response = Response<Outgoing>;
    type Error = Reset;
    type Future = Answer<S>;

    fn call(&self, req: Request<Incoming>) -> Answer<S> {
        let state = self.state.clone();
        let (mut req, open) = match state.version {
            Version::H1 => {
                let (request, response) = self.activity.begin();
                (req.map(|body| Body::leased(body, Lease::Served(request))), Some(response))
            }
            Version::H2 => (req.map(Body::from), None),
        };
        let head = req.method() == Method::HEAD;
        let step = match self.admit(&mut req) {
            Err(rsp) => Step::Refused { rsp: Some(*rsp) },
            Ok(()) => {
                let upgrade = upgrade::requested(&mut req);
                return Answer {
                    step: Step::Waiting { service: self.service.clone(), req: Some(req) },
                    upgrade,
                    head,
                    state,
                    open,
                };
            }
        };
        Answer { step, upgrade: None, head, state, open }
    }
}

impl<S> Glue<S> {
    fn admit(&self, req: &mut Request<Body>) -> Result<(), Box<Response<Body>>> {
        let state = &self.state;
        let size = headers::size(req);
        if size > state.max_header_size as usize {
            tracing::debug!(size, limit = state.max_header_size, setting = state.max_header_setting, "head too large");
            let rsp = headers::too_large(state.version, size, state.max_header_size, state.max_header_setting);
            return Err(Box::new(rsp));
        }
        normalize::accept(req, &mut self.authority.borrow_mut()).map_err(|error: BadRequest| {
            tracing::debug!(%error, "bad request");
            Box::new(headers::plain(state.version, error.status(), Body::empty()))
        })
    }
}

pin_project! {
    /// A request on its way to being a response.
    struct Answer<S> where S: Service<Request<Body>> {
        #[pin]
        step: Step<S>,
        upgrade: Option<upgrade::Requested>,
        head: bool,
        state: Arc<State>,
        // Of HTTP/1.
        open: Option<rest::Response>,
    }
}

pin_project! {
    #[project = StepProj]
    enum Step<S> where S: Service<Request<Body>> {
        Refused { rsp: Option<Response<Body>> },
        Waiting { service: S, req: Option<Request<Body>> },
        Called { #[pin] future: S::Future },
    }
}

impl<S> Future for Answer<S>
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Reset>,
{
    type Output = Result<Response<Outgoing>, Reset>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut this = self.project();
        let rsp = loop {
            let future = match this.step.as_mut().project() {
                StepProj::Refused { rsp } => break rsp.take().ok_or(Reset::new(h2::Reason::CANCEL))?,
                StepProj::Waiting { service, req } => {
                    ready!(service.poll_ready(cx))?;
                    match req.take() {
                        Some(req) => service.call(req),
                        None => return Poll::Ready(Err(Reset::new(h2::Reason::INTERNAL_ERROR))),
                    }
                }
                StepProj::Called { future } => {
                    let rsp = ready!(future.poll(cx))?;
                    break finish(rsp, this.upgrade.take(), *this.head, this.state);
                }
            };
            this.step.set(Step::Called { future });
        };
        let open = this.open.take();
        Poll::Ready(Ok(rsp.map(|body| Outgoing::new(body, open))))
    }
}

/// The last look at a response before the codec: upgrades, the end of the connection, and framing that must be right.
fn finish(mut rsp: Response<Body>, requested: Option<upgrade::Requested>, head: bool, state: &State) -> Response<Body> {
    // Neither a status of another response's nor a promise without a stream behind it may reach the client.
    let upgraded = rsp.status().is_informational() || requested.as_ref().is_some_and(|r| r.accepts(rsp.status()));
    if upgraded && !upgrade::join(&mut rsp, requested, state.drain.clone()) {
        tracing::debug!(status = %rsp.status(), "response ends HTTP, which was not asked for or can't be done");
        return headers::plain(state.version, StatusCode::BAD_GATEWAY, Body::empty());
    }
    let close = rsp.extensions_mut().remove::<CloseConnection>().is_some();
    match state.version {
        Version::H1 => {
            if close {
                rsp.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
            }
            if !matches!(rsp.version(), http::Version::HTTP_10 | http::Version::HTTP_11) {
                *rsp.version_mut() = http::Version::HTTP_11;
            }
            if !upgraded && !head {
                true_length(&mut rsp);
            }
        }
        Version::H2 => {
            if close {
                state.close();
            }
            if rsp.headers().contains_key(header::CONNECTION) {
                normalize::strip_hop_by_hop(rsp.headers_mut());
            }
            rsp.headers_mut().remove(header::TRANSFER_ENCODING);
        }
    }
    rsp
}

/// Makes Content-Length say what the body is known to have: the HTTP/1 codec trusts the header, and whatever follows
/// a wrong one would be read as another response.
fn true_length(rsp: &mut Response<Body>) {
    // The codec ignores the header of a response without content.
    if rsp.body().is_end_stream() {
        return;
    }
    let Some(length) = rsp.body().size_hint().exact() else { return };
    if let Some(value) = rsp.headers().get(header::CONTENT_LENGTH) {
        let claimed = value.to_str().ok().and_then(|value| value.parse::<u64>().ok());
        if claimed != Some(length) {
            rsp.headers_mut().insert(header::CONTENT_LENGTH, HeaderValue::from(length));
        }
    }
}
