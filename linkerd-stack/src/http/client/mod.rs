//! A client of one endpoint: a pool of HTTP/1 connections and a few HTTP/2 connections, opened when needed or kept open.
//!
//! Requests arrive in the version they are to be sent in. A request that the endpoint provably has not processed is sent
//! once more on another connection, unseen by the application. Everything that a codec can report is turned into one
//! closed enum, [`SendError`], here and nowhere else.

mod error;
mod h1;
mod h2;

pub use self::error::SendError;

use super::{Version, body::Body, rest};
use crate::{backoff::Backoff, boxed::BoxFuture, io::BoxedIo, ready::Ready};
use http::{Method, Request, Response};
use std::{fmt, sync::Arc, time::Duration};

/// Opens connections to one endpoint, TLS and transport header included.
pub trait Connect: Clone + Send + Sync + 'static {
    /// Why it failed. Requests that wait for the same connection each get a copy.
    type Error: Clone + Send + Sync + 'static;

    /// Connects for the given protocol. Bounds its own time. Dropping the future gives up.
    fn connect(&self, session: Option<Version>) -> BoxFuture<Result<BoxedIo, Self::Error>>;
}

/// How connections to an endpoint are used. Values outside what the protocol allows are brought into its range.
#[derive(Clone, Debug)]
pub struct ClientConfig {
    /// HTTP/1.
    pub h1: Http1Config,
    /// HTTP/2.
    pub h2: Http2Config,
    /// Waits between attempts to keep an HTTP/2 connection open.
    pub backoff: Backoff,
    /// Largest head of a response, bytes.
    pub max_header_size: u32,
}

/// The HTTP/1 pool.
#[derive(Copy, Clone, Debug)]
pub struct Http1Config {
    /// Idle connections are closed after at most this, and at least three quarters of it.
    pub idle_timeout: Duration,
    /// Idle connections kept.
    pub max_idle: usize,
}

/// HTTP/2 connections.
#[derive(Copy, Clone, Debug)]
pub struct Http2Config {
    /// Stream window, bytes.
    pub stream_window: u32,
    /// Connection window, bytes.
    pub connection_window: u32,
    /// Windows grow with the bandwidth-delay product instead.
    pub adaptive_window: bool,
    /// PINGs.
    pub keep_alive: Option<KeepAlive>,
    /// Largest frame accepted, bytes.
    pub max_frame_size: Option<u32>,
    /// Write buffer per stream, bytes.
    pub max_send_buf_size: Option<usize>,
    /// Streams remembered after a local reset.
    pub max_concurrent_reset_streams: Option<usize>,
    /// Connections. Another one is opened only when each has as many streams as the peer allows.
    pub max_connections: usize,
}

/// HTTP/2 PINGs.
#[derive(Copy, Clone, Debug)]
pub struct KeepAlive {
    /// Time between PINGs.
    pub interval: Duration,
    /// How long the answer may take.
    pub timeout: Duration,
    /// Whether PINGs go on without open streams.
    pub while_idle: bool,
}

impl Default for ClientConfig {
    /// The defaults of behaviour.md 0.1, 0.2 and E.5, with a head of 64 KiB.
    fn default() -> Self {
        Self {
            h1: Http1Config { idle_timeout: Duration::from_secs(3), max_idle: 10_000 },
            h2: Http2Config::default(),
            backoff: Backoff { min: Duration::from_millis(100), max: Duration::from_secs(60), jitter: 0.1 },
            max_header_size: 64 * 1024,
        }
    }
}

impl Default for Http2Config {
    fn default() -> Self {
        Self {
            stream_window: 65_535,
            connection_window: 1_048_576,
            adaptive_window: false,
            keep_alive: None,
            max_frame_size: None,
            max_send_buf_size: None,
            max_concurrent_reset_streams: None,
            max_connections: 16,
        }
    }
}

/// A client of one endpoint. Clones share its connections; they close when the last clone and the last response body
/// are gone.
pub struct Client<C: Connect>(Arc<Inner<C>>);

struct Inner<C: Connect> {
    h1: h1::Http1<C>,
    h2: Arc<h2::Http2<C>>,
    /// Ends the task that keeps a connection open, when dropped.
    _eager: Option<h2::Eager>,
    ready: Ready,
    on_replay: Option<OnReplay>,
}

/// Told of each request that was sent a second time.
pub type OnReplay = Arc<dyn Fn() + Send + Sync>;

impl<C: Connect> Clone for Client<C> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<C: Connect> fmt::Debug for Client<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client").field("ready", &self.0.ready.get()).finish_non_exhaustive()
    }
}

impl<C: Connect> Client<C> {
    /// A client without connections. With `eager_h2` a task opens an HTTP/2 connection now and again whenever it is
    /// lost; that needs a runtime.
    pub fn new(config: ClientConfig, connect: C, eager_h2: bool) -> Self {
        Self::with_replay_hook(config, connect, eager_h2, None)
    }

    /// Like [`Client::new`], and tells `on_replay` of each request that was sent a second time.
    pub fn with_replay_hook(config: ClientConfig, connect: C, eager_h2: bool, on_replay: Option<OnReplay>) -> Self {
        let h1 = h1::Http1::new(&config, connect.clone());
        let h2 = Arc::new(h2::Http2::new(&config, connect));
        let ready = Ready::new(!eager_h2);
        let eager = eager_h2.then(|| h2::Eager::spawn(h2.clone(), config.backoff, ready.clone()));
        Self(Arc::new(Inner { h1, h2, _eager: eager, ready, on_replay }))
    }

    /// Whether requests need not wait for a connection: of an eager client, while one is open; otherwise always.
    pub fn ready(&self) -> Ready {
        self.0.ready.clone()
    }

    /// Whether an HTTP/2 connection is open, so that HTTP/2 requests need not wait for one.
    pub fn is_connected(&self) -> bool {
        self.0.h2.is_connected()
    }

    /// Sends a request in its version, and yields the head of the response. Dropping the future resets the stream or
    /// closes the connection.
    ///
    /// HTTP/1 goes out in origin form, or in absolute form if the extension
    /// [`AbsoluteForm`](super::normalize::AbsoluteForm) says so; HTTP/2 needs a scheme and an authority. A response
    /// with status 101, or 2xx to CONNECT, carries its stream as `hyper::upgrade` does.
    pub async fn send(&self, req: Request<Body>) -> Result<Response<Body>, SendError<C::Error>> {
        let mut rsp = match Version::of(req.version()) {
            Some(Version::H1) => self.0.h1.send(req, &self.0.on_replay).await,
            Some(Version::H2) => self.0.h2.send(req, &self.0.on_replay).await,
            None => Err(SendError::Invalid("unknown HTTP version".into())),
        }?;
        let headers = rsp.headers_mut();
        if headers.contains_key(http::header::TRANSFER_ENCODING) {
            // RFC 9112 section 6.3: the coding wins; both on the way out would be two readings.
            headers.remove(http::header::CONTENT_LENGTH);
        }
        super::normalize::single_content_length(headers)
            .map_err(|error| SendError::Invalid(error.to_string().into()))?;
        Ok(rsp)
    }
}

/// What is held while a body is read.
pub(super) enum Lease {
    /// An HTTP/1 connection, and the pool it goes back to.
    H1(h1::Lease),
    /// A stream of an HTTP/2 connection.
    H2(h2::Stream),
    /// The body is a request's, on a server's connection.
    Served(rest::Request),
}

impl Lease {
    /// The body has ended.
    pub(super) fn give_back(self) {
        match self {
            Self::H1(lease) => lease.give_back(),
            Self::H2(stream) => drop(stream),
            Self::Served(request) => drop(request),
        }
    }
}

/// A copy of a request to send again, if its body is in memory. Extensions stay with the original.
fn copy(req: &Request<Body>) -> Option<Request<Body>> {
    let mut copy = Request::new(req.body().try_clone()?);
    *copy.method_mut() = req.method().clone();
    *copy.uri_mut() = req.uri().clone();
    *copy.version_mut() = req.version();
    *copy.headers_mut() = req.headers().clone();
    Some(copy)
}

/// RFC 9110 section 9.2.2. A proxy may repeat only these when it can't know whether they were processed (RFC 9112
/// section 9.3.1).
fn is_idempotent(method: &Method) -> bool {
    matches!(*method, Method::GET | Method::HEAD | Method::OPTIONS | Method::TRACE | Method::PUT | Method::DELETE)
}
