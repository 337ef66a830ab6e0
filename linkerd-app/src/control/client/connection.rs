//! One replica of a control-plane service: an HTTP/2 connection that is kept up.
//!
//! ```text
//!   Dialling ── connected ──▶ Up ── closed ──▶ (backoff) ──▶ Dialling
//!      │ failed                │ suspect: answers stopped coming
//!      ▼                       ▼
//!   (backoff) ──▶ Dialling   Draining, beside a new Dialling
//! ```

use super::{Shared, tls::Secure};
use crate::{config, control::stream::random, transport};
use hyper::client::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use linkerd_stack::{BoxedIo, Ready, backoff::Backoff};
use linkerd_tls::Id;
use parking_lot::Mutex;
use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};
use tokio::{
    sync::Notify,
    time::{self, Instant},
};

/// Windows in bytes, as on every HTTP/2 client of the proxy (behaviour.md 0.2).
const STREAM_WINDOW: u32 = 65_535;
const CONNECTION_WINDOW: u32 = 1_048_576;
/// A connection that lasted this long resets the backoff.
const STABLE: Duration = Duration::from_secs(1);
/// A connection that gets no new streams is closed after this, if its streams have not ended by then.
const DRAIN_LIMIT: Duration = super::super::stream::STALL_LIMIT;
/// TCP keepalive and `TCP_USER_TIMEOUT` where the configuration sets none. Streams are quiet for minutes, and a peer
/// that vanished must be noticed sooner than its idle limit.
const KEEPALIVE: Duration = Duration::from_secs(30);

/// Sends requests on one connection.
pub(super) type Sender = http2::SendRequest<tonic::body::Body>;

/// How replicas are dialled.
pub(super) struct Dialer {
    pub(super) connect: config::Connect,
    /// Mesh TLS and the identity that the server must prove; none = plaintext.
    pub(super) tls: Option<(Arc<dyn Secure>, Id)>,
    /// Whether a certificate of our own is waited for first.
    pub(super) needs_identity: bool,
}

/// A replica.
pub(super) struct Endpoint {
    pub(super) addr: SocketAddr,
    up: Mutex<Option<Sender>>,
    /// Whether it is up. Changed with it, under its lock.
    pub(super) ready: Ready,
    /// When anything last came from the replica, in milliseconds since `epoch`.
    heard: AtomicU64,
    epoch: Instant,
    retired: AtomicBool,
    /// Woken when the connection is no longer to be used.
    abandon: Notify,
}

impl Dialer {
    /// The backoff between attempts.
    pub(super) fn backoff(&self) -> Backoff {
        let config::Connect { backoff, .. } = &self.connect;
        Backoff { min: backoff.min, max: backoff.max, jitter: backoff.jitter }
    }

    async fn dial(
        &self,
        addr: SocketAddr,
    ) -> Result<(Sender, impl Future<Output = hyper::Result<()>> + use<>), String> {
        if let (Some((tls, _)), true) = (&self.tls, self.needs_identity) {
            tls.ready().await;
        }
        let connect = config::Connect {
            keepalive: self.connect.keepalive.or(Some(KEEPALIVE)),
            user_timeout: self.connect.user_timeout.or(Some(KEEPALIVE)),
            ..self.connect.clone()
        };
        // The limit is for TCP and TLS together.
        let established = time::timeout(self.connect.timeout, async {
            let tcp = transport::connect(addr, &connect).await.map_err(|error| error.to_string())?;
            let io: BoxedIo = match &self.tls {
                None => Box::new(tcp),
                Some((tls, id)) => tls.connect(tcp, id).await.map_err(|error| format!("TLS with {id}: {error}"))?,
            };
            let mut builder = http2::Builder::new(TokioExecutor::new());
            builder
                .timer(TokioTimer::new())
                .initial_stream_window_size(STREAM_WINDOW)
                .initial_connection_window_size(CONNECTION_WINDOW);
            builder.handshake(TokioIo::new(io)).await.map_err(|error| error.to_string())
        });
        match established.await {
            Ok(result) => result,
            Err(_) => Err(format!("no connection within {:?}", self.connect.timeout)),
        }
    }
}

impl Endpoint {
    pub(super) fn new(addr: SocketAddr) -> Self {
        Self {
            addr,
            up: Mutex::new(None),
            ready: Ready::new(false),
            heard: AtomicU64::new(0),
            epoch: Instant::now(),
            retired: AtomicBool::new(false),
            abandon: Notify::new(),
        }
    }

    /// A handle to the connection, if it is up.
    pub(super) fn sender(&self) -> Option<Sender> {
        let mut up = self.up.lock();
        if up.as_ref().is_some_and(Sender::is_closed) {
            self.change(&mut up, None);
        }
        up.clone()
    }

    fn connected(&self, sender: Sender) {
        self.change(&mut self.up.lock(), Some(sender));
    }

    /// No new requests on this connection. Whether there was one.
    fn disconnect(&self) -> bool {
        self.change(&mut self.up.lock(), None)
    }

    fn change(&self, up: &mut Option<Sender>, sender: Option<Sender>) -> bool {
        let was = std::mem::replace(up, sender).is_some();
        self.ready.set(up.is_some());
        was
    }

    /// Something came from the replica.
    pub(super) fn heard(&self) {
        self.heard.store(self.at(Instant::now()), Ordering::Relaxed);
    }

    /// A request that was sent at `since` was given up without an answer. If nothing else came meanwhile, the
    /// connection is not trusted any more: new requests get a new one, streams that are open stay.
    pub(super) fn suspect(&self, since: Instant) {
        let since = self.at(since);
        if self.heard.load(Ordering::Relaxed) < since && self.disconnect() {
            tracing::info!(addr = %self.addr, "Control plane connection has gone silent; opening another");
            self.abandon.notify_one();
        }
    }

    /// The replica is no longer to be used.
    pub(super) fn retire(&self) {
        self.retired.store(true, Ordering::Relaxed);
        self.disconnect();
        self.abandon.notify_one();
    }

    /// Milliseconds since `epoch`, from 1: 0 stands for "never".
    fn at(&self, instant: Instant) -> u64 {
        let ms = u64::try_from(instant.saturating_duration_since(self.epoch).as_millis());
        ms.unwrap_or(u64::MAX).saturating_add(1)
    }
}

/// Keeps the replica connected until it is retired.
pub(super) async fn maintain(endpoint: Arc<Endpoint>, dialer: Arc<Dialer>, shared: Arc<Shared>) {
    let backoff = dialer.backoff();
    let mut attempt = 0;
    while !endpoint.retired.load(Ordering::Relaxed) {
        match dialer.dial(endpoint.addr).await {
            Ok((sender, connection)) => {
                tracing::debug!(service = shared.name(), addr = %endpoint.addr, "Control plane connected");
                let since = Instant::now();
                endpoint.connected(sender);
                shared.changed();
                let mut connection = Box::pin(connection);
                tokio::select! {
                    result = &mut connection => {
                        let why = result.err().map_or_else(|| "closed by the peer".to_string(), |error| error.to_string());
                        tracing::debug!(service = shared.name(), addr = %endpoint.addr, why, "Control plane disconnected");
                        shared.trouble(&format!("{}: {why}", endpoint.addr));
                    }
                    () = endpoint.abandon.notified() => {
                        tokio::spawn(time::timeout(DRAIN_LIMIT, connection));
                    }
                }
                endpoint.disconnect();
                shared.changed();
                if since.elapsed() >= STABLE {
                    attempt = 0;
                }
            }
            Err(error) => {
                tracing::debug!(service = shared.name(), addr = %endpoint.addr, error, "Control plane can't be reached");
                shared.trouble(&format!("{}: {error}", endpoint.addr));
            }
        }
        let delay = backoff.delay(attempt, random());
        attempt = attempt.saturating_add(1);
        tokio::select! {
            () = time::sleep(delay) => {}
            () = endpoint.abandon.notified() => {}
        }
    }
}
