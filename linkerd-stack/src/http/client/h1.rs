//! HTTP/1 to one endpoint. A connection goes, in the words used here: opened → leased (one exchange; the lease lies in
//! the response's body) → given back when the body has ended → idle, if its codec is ready for another request, or
//! waiting until it is → leased again, most recent first; or closed: by the peer, after the idle timeout, when the pool
//! is full, or because its exchange did not end well. Upgrades and requests that can't share a connection get one that
//! is never pooled.

use super::{ClientConfig, Connect, Http1Config, OnReplay, SendError, copy, is_idempotent};
use crate::{
    http::{
        Version,
        body::Body,
        normalize::{self, AbsoluteForm},
    },
    io::BoxedIo,
};
use http::{HeaderValue, Method, Request, Response, StatusCode, Uri, header, uri::PathAndQuery};
use http_body::Body as _;
use hyper::{
    body::Incoming,
    client::conn::http1::{Builder, Connection, SendRequest},
};
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use std::{
    future::{Future, poll_fn},
    io,
    pin::{Pin, pin},
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Idle time is counted in this many ticks per idle timeout, so that no clock is read per request.
const TICKS: u64 = 4;

/// Buffer of a connection: what the codec uses by default, bytes.
const MIN_BUFFER: usize = 8_192 + 4_096 * 100;

/// HTTP/1 to one endpoint.
pub(super) struct Http1<C> {
    connect: C,
    builder: Builder,
    pool: Arc<Pool>,
}

impl<C: Connect> Http1<C> {
    pub(super) fn new(config: &ClientConfig, connect: C) -> Self {
        let mut builder = Builder::new();
        builder
            .max_buf_size(MIN_BUFFER.max(config.max_header_size as usize))
            .max_header_size(config.max_header_size as usize);
        Self { connect, builder, pool: Arc::new(Pool::new(config.h1)) }
    }

    pub(super) async fn send(
        &self,
        mut req: Request<Body>,
        on_replay: &Option<OnReplay>,
    ) -> Result<Response<Body>, SendError<C::Error>> {
        let connect = req.method() == Method::CONNECT;
        if connect || normalize::is_upgrade(&req) {
            return self.upgrade(req, connect).await;
        }
        let shelf = wire_form(&mut req)?;
        // Without Host (or in HTTP/1.0) nothing says that the peer keeps the connection's meaning (behaviour.md E.4).
        let pooled = req.version() == http::Version::HTTP_11 && req.headers().contains_key(header::HOST);
        let idle = if pooled { self.pool.take(shelf) } else { None };
        let Some(Idle { sender, conn, .. }) = idle else {
            return self.send_new(req, shelf, pooled).await;
        };

        let spare = if is_idempotent(req.method()) { copy(&req) } else { None };
        let before = conn.received.load(Ordering::Relaxed);
        let mut lease = Lease { sender, conn };
        let (error, unsent) = match exchange(&mut lease, req).await {
            Ok(rsp) => return respond(rsp, lease),
            Err(error) => error,
        };
        let spare = match (unsent, error) {
            // Handed back untouched.
            (Some(req), _) => req,
            // Closed without a byte of an answer, as a server does with a connection that was idle too long for it.
            (None, error) => match (spare, error) {
                (Some(req), SendError::IncompleteResponse | SendError::Io { .. })
                    if lease.conn.received.load(Ordering::Relaxed) == before =>
                {
                    req
                }
                (_, error) => return Err(error),
            },
        };
        drop(lease);
        if let Some(on_replay) = on_replay {
            on_replay();
        }
        self.send_new(spare, shelf, pooled).await
    }

    /// Sends on a connection of its own, which may be pooled afterwards.
    async fn send_new(
        &self,
        req: Request<Body>,
        shelf: Shelf,
        pooled: bool,
    ) -> Result<Response<Body>, SendError<C::Error>> {
        let (sender, conn, io) = self.open(shelf, pooled).await?;
        tokio::spawn(drive(io, conn.clone()));
        let mut lease = Lease { sender, conn };
        let rsp = exchange(&mut lease, req).await.map_err(|(error, _)| error)?;
        respond(rsp, lease)
    }

    /// Sends a request that may take the connection with it.
    async fn upgrade(&self, mut req: Request<Body>, connect: bool) -> Result<Response<Body>, SendError<C::Error>> {
        if connect {
            let authority = req.uri().authority().ok_or(SendError::Invalid("CONNECT without authority".into()))?;
            *req.uri_mut() = Uri::from(authority.clone());
        } else {
            wire_form(&mut req)?;
        }
        let (sender, conn, io) = self.open(Shelf::Origin, false).await?;
        // Whatever becomes of it: the peer, the codec or the last handle closes it.
        tokio::spawn(async move { io.with_upgrades().await });
        let mut lease = Lease { sender, conn };
        let rsp = exchange(&mut lease, req).await.map_err(|(error, _)| error)?;
        let upgraded =
            if connect { rsp.status().is_success() } else { rsp.status() == StatusCode::SWITCHING_PROTOCOLS };
        if !upgraded {
            return respond(rsp, lease);
        }
        let mut rsp = rsp.map(|_| Body::empty());
        if connect {
            normalize::strip_hop_by_hop(rsp.headers_mut());
        }
        Ok(rsp)
    }

    async fn open(
        &self,
        shelf: Shelf,
        pooled: bool,
    ) -> Result<(SendRequest<Body>, Arc<Conn>, Connection<TokioIo<CountedIo>, Body>), SendError<C::Error>> {
        let io = self.connect.connect(Some(Version::H1)).await.map_err(SendError::Connect)?;
        let conn = Arc::new(Conn {
            shelf,
            pool: if pooled { Arc::downgrade(&self.pool) } else { Weak::new() },
            received: AtomicU64::new(0),
            waiting: AtomicBool::new(false),
            slot: Mutex::new(None),
        });
        let io = TokioIo::new(CountedIo { io, conn: conn.clone() });
        let (sender, connection) = self.builder.handshake(io).await?;
        Ok((sender, conn, connection))
    }
}

/// Gives the URI the form it has on the wire, and content its framing. Yields the shelf for that form.
fn wire_form<E>(req: &mut Request<Body>) -> Result<Shelf, SendError<E>> {
    let shelf = if req.extensions().get::<AbsoluteForm>().is_some() {
        if req.uri().scheme().is_none() || req.uri().authority().is_none() {
            return Err(SendError::Invalid("absolute form without authority".into()));
        }
        Shelf::Absolute
    } else {
        let path = std::mem::take(req.uri_mut()).into_parts().path_and_query;
        *req.uri_mut() = Uri::from(path.unwrap_or_else(|| PathAndQuery::from_static("/")));
        Shelf::Origin
    };
    // Of GET and its like the codec would drop content of unknown length (that came over HTTP/2, say).
    if req.version() == http::Version::HTTP_11
        && !req.body().is_end_stream()
        && req.body().size_hint().exact().is_none()
        && !req.headers().contains_key(header::CONTENT_LENGTH)
        && !req.headers().contains_key(header::TRANSFER_ENCODING)
    {
        req.headers_mut().insert(header::TRANSFER_ENCODING, HeaderValue::from_static("chunked"));
    }
    Ok(shelf)
}

/// One request and the head of its response. A request that never left is handed back with the error.
async fn exchange<E>(
    lease: &mut Lease,
    req: Request<Body>,
) -> Result<Response<Incoming>, (SendError<E>, Option<Request<Body>>)> {
    lease.sender.try_send_request(req).await.map_err(|mut error| {
        let unsent = error.take_message();
        (error.into_error().into(), unsent)
    })
}

/// The response of an exchange that is not an upgrade.
fn respond<E>(mut rsp: Response<Incoming>, lease: Lease) -> Result<Response<Body>, SendError<E>> {
    if rsp.status() == StatusCode::SWITCHING_PROTOCOLS {
        // RFC 9110 section 15.2.2: only to a request that asked. What follows it is not HTTP.
        return Err(SendError::Invalid("101 to a request that did not ask for it".into()));
    }
    normalize::strip_hop_by_hop(rsp.headers_mut());
    Ok(rsp.map(|body| Body::leased(body, super::Lease::H1(lease))))
}

/// Which requests a connection is for: behaviour.md E.4 keeps the forms apart.
#[derive(Copy, Clone)]
enum Shelf {
    Origin,
    Absolute,
}

/// Idle connections. The lock is held for a push or a pop.
struct Pool {
    config: Http1Config,
    state: Mutex<State>,
}

struct State {
    /// By [`Shelf`]; oldest first.
    shelves: [Vec<Idle>; 2],
    tick: u64,
    /// Whether a task counts ticks.
    ticking: bool,
}

struct Idle {
    sender: SendRequest<Body>,
    conn: Arc<Conn>,
    since: u64,
}

impl Pool {
    fn new(config: Http1Config) -> Self {
        let state = State { shelves: [Vec::new(), Vec::new()], tick: 0, ticking: false };
        Self { config, state: Mutex::new(state) }
    }

    /// The connection that was used last and is still open.
    fn take(&self, shelf: Shelf) -> Option<Idle> {
        let mut state = self.state.lock();
        let shelf = &mut state.shelves[shelf as usize];
        while let Some(idle) = shelf.pop() {
            if idle.sender.is_ready() {
                return Some(idle);
            }
        }
        None
    }

    fn put(self: &Arc<Self>, sender: SendRequest<Body>, conn: Arc<Conn>) {
        let shelf = conn.shelf as usize;
        let mut state = self.state.lock();
        if state.shelves[0].len() + state.shelves[1].len() >= self.config.max_idle {
            return;
        }
        let since = state.tick;
        state.shelves[shelf].push(Idle { sender, conn, since });
        if !state.ticking
            && let Ok(runtime) = tokio::runtime::Handle::try_current()
        {
            state.ticking = true;
            runtime.spawn(tick(Arc::downgrade(self), self.config.idle_timeout / TICKS as u32));
        }
    }

    /// Drops what has been idle too long. Yields whether anything is left.
    fn expire(&self) -> bool {
        let mut expired = Vec::new();
        let mut state = self.state.lock();
        state.tick += 1;
        let tick = state.tick;
        for shelf in &mut state.shelves {
            let young = shelf.partition_point(|idle| idle.since + TICKS <= tick);
            expired.extend(shelf.drain(..young));
            if shelf.is_empty() {
                *shelf = Vec::new();
            }
        }
        let left = state.shelves.iter().any(|shelf| !shelf.is_empty());
        state.ticking = left;
        drop(state);
        // Closes connections, which wakes their tasks: not under the lock.
        drop(expired);
        left
    }
}

/// Counts ticks until the pool is empty or gone.
async fn tick(pool: Weak<Pool>, every: Duration) {
    loop {
        tokio::time::sleep(every).await;
        if !pool.upgrade().is_some_and(|pool| pool.expire()) {
            return;
        }
    }
}

/// What is known of a connection outside its codec.
struct Conn {
    shelf: Shelf,
    /// Gone for connections that are not pooled.
    pool: Weak<Pool>,
    /// Bytes read.
    received: AtomicU64,
    /// Whether `slot` is occupied.
    waiting: AtomicBool,
    /// Given back, but the codec is still at the previous exchange (a request that is still being sent, usually just
    /// bookkeeping): the connection's task pools it when it is done.
    slot: Mutex<Option<SendRequest<Body>>>,
}

impl Conn {
    /// Pools what waits, if it need not wait any more.
    fn settle(self: &Arc<Self>) {
        let mut slot = self.slot.lock();
        match slot.take() {
            Some(sender) if sender.is_closed() => {}
            Some(sender) if !sender.is_ready() => {
                *slot = Some(sender);
                return;
            }
            Some(sender) => {
                if let Some(pool) = self.pool.upgrade() {
                    pool.put(sender, self.clone());
                }
            }
            None => {}
        }
        self.waiting.store(false, Ordering::SeqCst);
    }
}

/// The right to one exchange on a connection. Dropped, it closes the connection after that.
pub(in crate::http) struct Lease {
    sender: SendRequest<Body>,
    conn: Arc<Conn>,
}

impl Lease {
    pub(super) fn give_back(self) {
        let Self { sender, conn } = self;
        if conn.pool.strong_count() == 0 || sender.is_closed() {
            return;
        }
        // Either this sees that the codec is ready, or the task, which looks after the codec has run, sees `waiting`.
        *conn.slot.lock() = Some(sender);
        conn.waiting.store(true, Ordering::SeqCst);
        conn.settle();
    }
}

/// The task of a pooled connection.
async fn drive(connection: Connection<TokioIo<CountedIo>, Body>, conn: Arc<Conn>) {
    let mut connection = pin!(connection);
    let result = poll_fn(|cx| {
        let result = connection.as_mut().poll(cx);
        if conn.waiting.load(Ordering::SeqCst) {
            conn.settle();
        }
        result
    })
    .await;
    if let Err(error) = result {
        tracing::debug!(%error, "HTTP/1 connection to endpoint ended");
    }
}

/// Counts what is read, to tell an answer that broke off from one that never began.
struct CountedIo {
    io: BoxedIo,
    conn: Arc<Conn>,
}

impl AsyncRead for CountedIo {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let result = Pin::new(&mut self.io).poll_read(cx, buf);
        let read = buf.filled().len() - before;
        if read > 0 {
            self.conn.received.fetch_add(read as u64, Ordering::Relaxed);
        }
        result
    }
}

impl AsyncWrite for CountedIo {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}
