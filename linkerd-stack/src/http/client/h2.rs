//! HTTP/2 to one endpoint: usually one connection. Requests that need one while none is open wait for the same attempt,
//! which outlives them. Another connection is opened only when each open one carries as many streams as its peer allows,
//! so that a hundred long streams do not stop the hundred and first request.

use super::{ClientConfig, Connect, Http2Config, OnReplay, SendError, copy};
use crate::{
    backoff::Backoff,
    http::{
        Version,
        body::Body,
        server::{FRAME_SIZES, MAX_WINDOW},
    },
    io::BoxedIo,
    ready::Ready,
};
use arc_swap::ArcSwap;
use http::{Method, Request, Response};
use hyper::{
    body::Incoming,
    client::conn::http2::{Builder, Connection, SendRequest},
};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use parking_lot::Mutex;
use std::{
    future::{Future, poll_fn},
    pin::pin,
    sync::{
        Arc, Weak,
        atomic::{AtomicUsize, Ordering},
    },
};
use tokio::{sync::watch, task::AbortHandle, time::Instant};

/// Attempts to find a connection that stays open long enough to be used, per request.
const ROUNDS: usize = 4;

/// Streams that may be opened before the peer's SETTINGS tell how many it allows. RFC 9113 section 6.5.2 recommends no
/// less than 100; one more is told apart from a peer that says 100.
const STREAMS_UNTOLD: usize = 101;

/// HTTP/2 to one endpoint.
pub(super) struct Http2<C: Connect> {
    connect: C,
    builder: Builder<TokioExecutor>,
    max_connections: usize,
    /// Open connections, oldest first. Written under the lock of `connecting`.
    conns: ArcSwap<Vec<Arc<Conn>>>,
    connecting: Mutex<Option<Attempt<C::Error>>>,
}

/// The outcome of an attempt to connect that others wait for; none while it lasts.
type Attempt<E> = watch::Receiver<Option<Result<(), E>>>;

impl<C: Connect> Http2<C> {
    pub(super) fn new(config: &ClientConfig, connect: C) -> Self {
        Self {
            connect,
            builder: builder(&config.h2, config.max_header_size),
            max_connections: config.h2.max_connections.max(1),
            conns: ArcSwap::default(),
            connecting: Mutex::new(None),
        }
    }

    pub(super) fn is_connected(&self) -> bool {
        self.conns.load().iter().any(|conn| !conn.sender.is_closed())
    }

    pub(super) async fn send(
        self: &Arc<Self>,
        req: Request<Body>,
        on_replay: &Option<OnReplay>,
    ) -> Result<Response<Body>, SendError<C::Error>> {
        if req.method() == Method::CONNECT {
            return Err(SendError::Invalid("CONNECT over HTTP/2".into()));
        }
        let spare = copy(&req);
        let (error, unsent) = match self.exchange(req).await {
            Ok(rsp) => return Ok(rsp),
            Err(error) => error,
        };
        let spare = match (unsent, error) {
            (Some(req), _) => *req,
            (None, error @ SendError::Unprocessed(_)) => spare.ok_or(error)?,
            (None, error) => return Err(error),
        };
        if let Some(on_replay) = on_replay {
            on_replay();
        }
        self.exchange(spare).await.map_err(|(error, _)| error)
    }

    /// One request and the head of its response. A request that never left is handed back with the error.
    async fn exchange(
        self: &Arc<Self>,
        req: Request<Body>,
    ) -> Result<Response<Body>, (SendError<C::Error>, Option<Box<Request<Body>>>)> {
        let stream = self.stream().await.map_err(|error| (error, None))?;
        let sent = stream.0.sender.clone().try_send_request(req);
        let rsp: Response<Incoming> = sent.await.map_err(|mut error| {
            let unsent = error.take_message().map(Box::new);
            (error.into_error().into(), unsent)
        })?;
        Ok(rsp.map(|body| Body::leased(body, super::Lease::H2(stream))))
    }

    /// A stream of an open connection, or of one that is opened for it.
    async fn stream(self: &Arc<Self>) -> Result<Stream, SendError<C::Error>> {
        for _ in 0..ROUNDS {
            let (busy, seen) = match self.pick() {
                Picked::Stream(stream) => return Ok(stream),
                Picked::Busy(stream, seen) => (Some(stream), seen),
                Picked::None(seen) => (None, seen),
            };
            if let Err(error) = self.connected(Some(seen)).await {
                // Better late on a busy connection than never.
                return busy.ok_or(SendError::Connect(error));
            }
        }
        Err(SendError::Unprocessed("connections close as soon as they are open".into()))
    }

    fn pick(&self) -> Picked {
        let conns = self.conns.load();
        let mut least: Option<&Arc<Conn>> = None;
        for conn in conns.iter().filter(|conn| !conn.sender.is_closed()) {
            let streams = conn.streams.fetch_add(1, Ordering::Relaxed);
            if streams < conn.max_streams.load(Ordering::Relaxed) {
                return Picked::Stream(Stream(conn.clone()));
            }
            conn.streams.fetch_sub(1, Ordering::Relaxed);
            if least.is_none_or(|least| streams < least.streams.load(Ordering::Relaxed)) {
                least = Some(conn);
            }
        }
        let seen = Seen(Arc::as_ptr(&conns) as usize);
        let Some(least) = least else { return Picked::None(seen) };
        least.streams.fetch_add(1, Ordering::Relaxed);
        let stream = Stream(least.clone());
        if conns.len() < self.max_connections { Picked::Busy(stream, seen) } else { Picked::Stream(stream) }
    }

    /// Waits for the attempt to connect that is under way, or for a new one; does nothing if the connections are not
    /// the ones that were seen any more.
    async fn connected(self: &Arc<Self>, seen: Option<Seen>) -> Result<(), C::Error> {
        let Some(mut attempt) = self.attempt(seen) else { return Ok(()) };
        match attempt.wait_for(Option::is_some).await {
            Ok(outcome) => outcome.clone().unwrap_or(Ok(())),
            // The runtime ends. The caller looks again, and gives up in the end.
            Err(_) => Ok(()),
        }
    }

    fn attempt(self: &Arc<Self>, seen: Option<Seen>) -> Option<Attempt<C::Error>> {
        let mut connecting = self.connecting.lock();
        if let Some(attempt) = &*connecting {
            return Some(attempt.clone());
        }
        if seen.is_some_and(|Seen(seen)| seen != Arc::as_ptr(&self.conns.load()) as usize) {
            return None;
        }
        let (tx, attempt) = watch::channel(None);
        *connecting = Some(attempt.clone());
        drop(connecting);
        let this = self.clone();
        tokio::spawn(async move {
            // Ends the attempt even if connecting panics.
            let ended = Ended(&this);
            let outcome = this.open().await;
            drop(ended);
            tx.send_replace(Some(outcome));
        });
        Some(attempt)
    }

    async fn open(self: &Arc<Self>) -> Result<(), C::Error> {
        let io = self.connect.connect(Some(Version::H2)).await?;
        let (sender, connection) = match self.builder.handshake(TokioIo::new(io)).await {
            Ok(opened) => opened,
            Err(error) => {
                // Whoever waits finds no connection, and tries again a bounded number of times.
                tracing::debug!(%error, "HTTP/2 handshake failed");
                return Ok(());
            }
        };
        let (closed, _) = watch::channel(false);
        let conn =
            Arc::new(Conn { sender, streams: AtomicUsize::new(0), max_streams: AtomicUsize::new(usize::MAX), closed });
        tokio::spawn(drive(connection, Arc::downgrade(&conn), conn.closed.clone(), Arc::downgrade(self)));
        self.update(|conns| conns.push(conn));
        Ok(())
    }

    fn update(&self, change: impl FnOnce(&mut Vec<Arc<Conn>>)) {
        let _writing = self.connecting.lock();
        let mut conns = Vec::clone(&self.conns.load());
        conns.retain(|conn| !conn.sender.is_closed());
        change(&mut conns);
        self.conns.store(Arc::new(conns));
    }
}

enum Picked {
    Stream(Stream),
    /// Of the connection with the fewest streams, all of which have all they may have; another may be opened.
    Busy(Stream, Seen),
    None(Seen),
}

/// Which list of connections was looked at: its address. A list that happens to be at the address of an older one
/// costs a connection that was not needed, no more.
#[derive(Copy, Clone)]
struct Seen(usize);

/// Ends an attempt to connect, so that the next request begins another.
struct Ended<'h, C: Connect>(&'h Arc<Http2<C>>);

impl<C: Connect> Drop for Ended<'_, C> {
    fn drop(&mut self) {
        *self.0.connecting.lock() = None;
    }
}

struct Conn {
    sender: SendRequest<Body>,
    /// Streams in use, those that wait to be opened included.
    streams: AtomicUsize,
    /// Streams that the peer allows; no limit until it has said.
    max_streams: AtomicUsize,
    closed: watch::Sender<bool>,
}

/// One stream of a connection; keeps it open.
pub(in crate::http) struct Stream(Arc<Conn>);

impl Drop for Stream {
    fn drop(&mut self) {
        self.0.streams.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The task of a connection: until it takes no more requests. Streams that are open then go on in the codec's task.
async fn drive<C: Connect>(
    connection: Connection<TokioIo<BoxedIo>, Body, TokioExecutor>,
    conn: Weak<Conn>,
    closed: watch::Sender<bool>,
    client: Weak<Http2<C>>,
) {
    let mut told = usize::MAX;
    let result = {
        // Dropped at the end of this block, which hands unsent requests back before anything else is done.
        let mut connection = pin!(connection);
        poll_fn(|cx| {
            let result = connection.as_mut().poll(cx);
            if result.is_pending() {
                let max = match connection.current_max_send_streams() {
                    STREAMS_UNTOLD => usize::MAX,
                    max => max,
                };
                if max != told
                    && let Some(conn) = conn.upgrade()
                {
                    told = max;
                    conn.max_streams.store(max, Ordering::Relaxed);
                }
            }
            result
        })
        .await
    };
    if let Err(error) = result {
        tracing::debug!(%error, "HTTP/2 connection to endpoint ended");
    }
    closed.send_replace(true);
    if let Some(client) = client.upgrade() {
        client.update(|conns| {
            if let Some(conn) = conn.upgrade() {
                conns.retain(|other| !Arc::ptr_eq(other, &conn));
            }
        });
    }
}

fn builder(config: &Http2Config, max_header_size: u32) -> Builder<TokioExecutor> {
    let mut builder = Builder::new(TokioExecutor::new());
    builder
        .timer(TokioTimer::new())
        .initial_max_send_streams(STREAMS_UNTOLD)
        .initial_stream_window_size(config.stream_window.min(MAX_WINDOW))
        .initial_connection_window_size(config.connection_window.min(MAX_WINDOW))
        .max_header_list_size(max_header_size);
    if config.adaptive_window {
        builder.adaptive_window(true);
    }
    if let Some(keep_alive) = config.keep_alive {
        builder
            .keep_alive_interval(keep_alive.interval)
            .keep_alive_timeout(keep_alive.timeout)
            .keep_alive_while_idle(keep_alive.while_idle);
    }
    builder.max_frame_size(config.max_frame_size.clamp(*FRAME_SIZES.start(), *FRAME_SIZES.end()));
    if let Some(size) = config.max_send_buf_size {
        builder.max_send_buf_size(size.min(u32::MAX as usize));
    }
    if let Some(max) = config.max_concurrent_reset_streams {
        builder.max_concurrent_reset_streams(max);
    }
    builder
}

/// Keeps a connection open until dropped.
pub(super) struct Eager(AbortHandle);

impl Drop for Eager {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Eager {
    pub(super) fn spawn<C: Connect>(client: Arc<Http2<C>>, backoff: Backoff, ready: Ready) -> Self {
        Self(tokio::spawn(keep_open(client, backoff, ready)).abort_handle())
    }
}

/// open → ready → lost → open …; after a failure, or a connection that lasted less than the wait would have been, it
/// waits first.
async fn keep_open<C: Connect>(client: Arc<Http2<C>>, backoff: Backoff, ready: Ready) {
    let mut failures = 0;
    loop {
        let wait = backoff.delay(failures, rand::random());
        // What the connector says is the connector's to log.
        if let Ok(Some(mut closed)) = client.open_one().await {
            let opened = Instant::now();
            ready.set(true);
            // An error means the same: its sender is gone.
            let _ = closed.wait_for(|closed| *closed).await;
            ready.set(false);
            if opened.elapsed() > wait {
                failures = 0;
                continue;
            }
        }
        failures = failures.saturating_add(1);
        tokio::time::sleep(wait).await;
    }
}

impl<C: Connect> Http2<C> {
    /// Connects unless a connection is open. Yields what tells when it takes no more requests; none if it is gone
    /// already.
    async fn open_one(self: &Arc<Self>) -> Result<Option<watch::Receiver<bool>>, C::Error> {
        let open =
            || self.conns.load().iter().find(|conn| !conn.sender.is_closed()).map(|conn| conn.closed.subscribe());
        if let Some(closed) = open() {
            return Ok(Some(closed));
        }
        self.connected(None).await?;
        Ok(open())
    }
}
