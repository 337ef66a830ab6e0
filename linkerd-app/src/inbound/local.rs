//! Connections to the local application: always to the original destination, never back to this proxy.
//!
//! Per address there is one HTTP client, kept while it is used. Where the application cannot be reached, HTTP/1
//! requests fail at once; HTTP/2 requests wait while connecting is tried again, then fail fast for all until it succeeds
//! (behaviour.md C.11).

use super::Inbound;
use crate::{
    config,
    error::{Cause, Error, Lack},
    policy::authz::NoTls,
    telemetry::{ConnLabels, ConnMetrics, Direction, Peer, Telemetry, TlsLabels},
    transport::{self, Metered},
};
use ::http::{Request, Response};
use linkerd_stack::{
    BoxFuture, BoxedIo, PrefixedIo,
    backoff::Backoff,
    cache::{Cache, Cached},
    http::{Body, Client, Connect, SendError, Version},
};
use parking_lot::Mutex;
use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};
use tokio::{
    net::TcpStream,
    sync::OwnedSemaphorePermit,
    time::{self, Instant},
};

/// Local addresses whose clients are kept: every port that serves HTTP, by IPv4 and IPv6.
const MAX_LOCALS: usize = 4096;

/// How long a probe through a shut gate may take before another one is let through.
const PROBE: Duration = Duration::from_secs(1);

/// A connection to the application that exists before the client's first byte.
pub(super) type App = PrefixedIo<TcpStream>;

/// The application's addresses.
pub(super) struct Locals {
    dial: Arc<Dial>,
    clients: Cache<SocketAddr, Local>,
    http: linkerd_stack::http::ClientConfig,
}

/// How the application is reached.
struct Dial {
    connect: config::Connect,
    backoff: Backoff,
    failfast: Duration,
    queue: usize,
    own_port: u16,
    metrics: Arc<ConnMetrics>,
}

/// HTTP to one address of the application.
pub(super) struct Local {
    client: Client<To>,
    gate: Arc<Gate>,
    /// Most requests that wait for a connection (LINKERD2_PROXY_INBOUND_HTTP_QUEUE_CAPACITY).
    queue: usize,
}

/// A local address in use; while one of these lives, its connections are kept.
pub(super) type LocalRef = Cached<Local>;

/// One address, as the HTTP client sees it.
#[derive(Clone)]
struct To {
    addr: SocketAddr,
    dial: Arc<Dial>,
    gate: Arc<Gate>,
}

/// Refuses HTTP/2 requests after connecting failed for the whole failfast timeout. While it is shut, one request per
/// backoff may try again.
///
/// open → shut: a series of attempts failed. shut → open: an attempt succeeded.
#[derive(Debug, Default)]
struct Gate {
    shut: AtomicBool,
    state: Mutex<Shut>,
    /// Requests that came while there was no connection and have no answer yet.
    queued: AtomicUsize,
}

/// Counts one while it lives.
struct Counted<'a>(&'a AtomicUsize);

impl<'a> Counted<'a> {
    fn new(count: &'a AtomicUsize) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self(count)
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

#[derive(Debug, Default)]
struct Shut {
    failures: u32,
    retry_at: Option<Instant>,
}

impl Locals {
    pub(super) fn new(cfg: &config::Inbound, telemetry: Telemetry) -> Self {
        let labels = ConnLabels {
            direction: Direction::Inbound,
            peer: Peer::Dst,
            target: None,
            tls: TlsLabels::Connected(Err(NoTls::Loopback)),
            srv: None,
            authority: None,
            dst: None,
        };
        let backoff = crate::http::settings::backoff(&cfg.connect.backoff);
        Self {
            dial: Arc::new(Dial {
                connect: cfg.connect.clone(),
                backoff,
                failfast: cfg.queue.failfast_timeout,
                queue: cfg.queue.capacity,
                own_port: cfg.listen.addr.port(),
                metrics: telemetry.conn(labels),
            }),
            clients: Cache::new(cfg.discovery_idle_timeout, MAX_LOCALS),
            http: super::http::client_config(cfg, backoff),
        }
    }

    /// What connections to the application are counted by.
    pub(super) fn metrics(&self) -> Arc<ConnMetrics> {
        self.dial.metrics.clone()
    }

    /// A connection for bytes; not counted yet.
    pub(super) async fn connect(&self, addr: SocketAddr) -> Result<App, Error> {
        Ok(PrefixedIo::new(bytes::Bytes::new(), self.dial.dial(addr).await?))
    }

    /// The HTTP client of an address.
    pub(super) fn http(&self, addr: SocketAddr) -> LocalRef {
        self.clients.get_or_insert_with(addr, |_| {
            let gate = Arc::new(Gate::default());
            let to = To { addr, dial: self.dial.clone(), gate: gate.clone() };
            Local { client: Client::new(self.http.clone(), to, false), gate, queue: self.dial.queue }
        })
    }
}

impl Inbound {
    /// A connection made before the client's first byte. It is counted among the early ones until that is decided; while
    /// there are too many of them, the future never ends.
    pub(super) fn dial_early(
        &self,
        addr: SocketAddr,
    ) -> impl Future<Output = Result<(TcpStream, OwnedSemaphorePermit), Error>> + use<> {
        let permits = self.early_dials.clone();
        let dial = self.locals.dial.clone();
        async move {
            match permits.try_acquire_owned() {
                Ok(permit) => Ok((dial.dial(addr).await?, permit)),
                Err(_) => std::future::pending().await,
            }
        }
    }
}

impl Dial {
    /// Opens one connection.
    async fn dial(&self, addr: SocketAddr) -> Result<TcpStream, Error> {
        if addr.port() == self.own_port {
            return Err(Cause::Loop(addr).into());
        }
        transport::connect(addr, &self.connect).await
    }
}

impl Connect for To {
    type Error = Error;

    fn connect(&self, session: Option<Version>) -> BoxFuture<Result<BoxedIo, Error>> {
        let this = self.clone();
        Box::pin(async move {
            let io = match session {
                Some(Version::H2) => this.connect_patiently().await?,
                Some(Version::H1) | None => this.dial.dial(this.addr).await?,
            };
            Ok(Box::new(Metered::new(io, this.dial.metrics.clone())) as BoxedIo)
        })
    }
}

impl To {
    /// Tries until the failfast timeout, or once if the gate is shut.
    async fn connect_patiently(&self) -> Result<TcpStream, Error> {
        let deadline = Instant::now() + self.dial.failfast;
        let probing = self.gate.shut.load(Ordering::Relaxed);
        let mut attempt = 0;
        loop {
            match self.dial.dial(self.addr).await {
                Ok(io) => {
                    self.gate.open();
                    return Ok(io);
                }
                Err(error) if matches!(error.cause(), Cause::Loop(_)) => return Err(error),
                Err(error) => {
                    let next = Instant::now() + self.dial.backoff.delay(attempt, rand::random());
                    attempt += 1;
                    tracing::debug!(addr = %self.addr, %error, attempt, "cannot connect to the application");
                    if !probing && next < deadline {
                        time::sleep_until(next).await;
                        continue;
                    }
                    if !probing {
                        time::sleep_until(deadline).await;
                    }
                    tracing::info!(addr = %self.addr, %error, "the application cannot be reached: failing fast");
                    self.gate.shut(&self.dial.backoff);
                    return Err(Error::new(Cause::FailFast(Lack::Connection)).context(error.to_string()));
                }
            }
        }
    }
}

impl Local {
    /// Sends a request by its version.
    ///
    /// # Errors
    /// As the application failed, or at once while connecting to it keeps failing.
    pub(super) async fn send(&self, req: Request<Body>) -> Result<Response<Body>, Error> {
        let version = req.version();
        let mut queued = None;
        if version == ::http::Version::HTTP_2 {
            if !self.gate.admits() {
                return Err(Cause::LoadShed(Lack::Connection).into());
            }
            if !self.client.is_connected() {
                queued = Some(self.gate.enqueue(self.queue)?);
            }
        }
        let _queued = queued;
        self.client.send(req).await.map_err(|error| failure(error, version))
    }
}

/// What a failure of the client means for the request.
fn failure(error: SendError<Error>, version: ::http::Version) -> Error {
    match error {
        SendError::Connect(error) => error,
        SendError::Io { errno, message } => Cause::Io { errno, message }.into(),
        SendError::Reset(reason) => Cause::Http2Reset(reason).into(),
        SendError::Connection(message) => Cause::Http2Connection(message).into(),
        SendError::IncompleteResponse => Cause::IncompleteResponse.into(),
        // The client may send it again: tell it in its own words (RFC 9113 section 8.7).
        SendError::Unprocessed(_) if version == ::http::Version::HTTP_2 => {
            Cause::Http2Reset(h2::Reason::REFUSED_STREAM).into()
        }
        SendError::Unprocessed(message) | SendError::Invalid(message) => Cause::Io { errno: None, message }.into(),
        SendError::RequestBody(error) => match error.reset() {
            Some(reason) => Cause::Http2Reset(reason).into(),
            None => Error::new(Cause::Canceled).context(error.to_string()),
        },
    }
}

impl Gate {
    /// Whether a request may go on: the gate is open, or it is time to try again.
    fn admits(&self) -> bool {
        if !self.shut.load(Ordering::Relaxed) {
            return true;
        }
        let now = Instant::now();
        let mut state = self.state.lock();
        match state.retry_at {
            Some(at) if now < at => false,
            // One request tries; the others wait for what comes of it, or for this bound.
            _ => {
                state.retry_at = Some(now + PROBE);
                true
            }
        }
    }

    /// A place among the requests that wait for a connection.
    fn enqueue(&self, capacity: usize) -> Result<Counted<'_>, Error> {
        let place = Counted::new(&self.queued);
        match self.queued.load(Ordering::Relaxed) > capacity {
            true => Err(Error::new(Cause::LoadShed(Lack::Room))
                .context("too many requests wait for the application (LINKERD2_PROXY_INBOUND_HTTP_QUEUE_CAPACITY)")),
            false => Ok(place),
        }
    }

    fn open(&self) {
        *self.state.lock() = Shut::default();
        self.shut.store(false, Ordering::Relaxed);
    }

    fn shut(&self, backoff: &Backoff) {
        let mut state = self.state.lock();
        state.retry_at = Some(Instant::now() + backoff.delay(state.failures, rand::random()));
        state.failures = state.failures.saturating_add(1);
        self.shut.store(true, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BACKOFF: Backoff = Backoff { min: Duration::from_millis(100), max: Duration::from_secs(10), jitter: 0.0 };

    #[tokio::test(start_paused = true)]
    async fn a_shut_gate_lets_one_probe_pass_per_backoff() {
        let gate = Gate::default();
        assert!(gate.admits() && gate.admits());
        gate.shut(&BACKOFF);
        assert!(!gate.admits());
        time::advance(BACKOFF.min).await;
        assert_eq!([gate.admits(), gate.admits()], [true, false]);
        gate.shut(&BACKOFF);
        time::advance(BACKOFF.min).await;
        assert!(!gate.admits(), "the backoff doubles");
        time::advance(BACKOFF.min).await;
        assert!(gate.admits());
        gate.open();
        assert!(gate.admits() && gate.admits());
    }

    fn to(addr: SocketAddr, own_port: u16) -> To {
        let connect = config::Connect {
            timeout: Duration::from_millis(300),
            keepalive: None,
            user_timeout: None,
            backoff: crate::policy::client::Backoff { min: BACKOFF.min, max: BACKOFF.max, jitter: 0.0 },
        };
        let failfast = Duration::from_secs(1);
        let dial = Dial { connect, backoff: BACKOFF, failfast, queue: 10, own_port, metrics: Arc::default() };
        To { addr, dial: Arc::new(dial), gate: Arc::default() }
    }

    #[tokio::test(start_paused = true)]
    async fn connecting_for_http_2_is_tried_again_until_the_failfast_timeout() {
        let addr = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let to = to(addr, 1);
        let start = Instant::now();
        let error = to.connect_patiently().await.unwrap_err();
        assert_eq!(*error.cause(), Cause::FailFast(Lack::Connection));
        assert_eq!(start.elapsed(), Duration::from_secs(1));
        assert!(!to.gate.admits());
    }

    #[tokio::test]
    async fn the_own_port_is_never_dialled() {
        let addr = SocketAddr::from(([10, 1, 2, 3], 4143));
        let error = to(addr, 4143).dial.dial(addr).await.unwrap_err();
        assert_eq!(*error.cause(), Cause::Loop(addr));
    }
}
