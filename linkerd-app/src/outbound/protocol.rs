//! What a connection speaks: declared by the policy, or found out by a bounded look at its first bytes (behaviour.md D.2,
//! A.4).
//!
//! Where the policy allows an opaque connection, a client that is silent is not waited for in vain: after a moment the
//! proxy connects on, and if the server speaks first, the connection is opaque at once. The detection timeout stays the
//! outer bound.

use super::{
    Runtime,
    discover::{Destination, Found, Heard},
    opaque::{Opened, Route},
};
use crate::{
    error::{Cause, Error},
    policy::client::Protocol,
    telemetry::{DetectMetrics, Detected as Outcome},
    transport::io_failure,
};
use bytes::{Bytes, BytesMut};
use linkerd_stack::{
    detect::{self, DetectError, Detected},
    http::Version,
};
use std::{pin::pin, sync::Arc, time::Duration};
use tokio::{
    net::TcpStream,
    time::{Instant, sleep, timeout},
};

/// How long a client may be silent before the proxy connects on, at a destination of which nothing is known: longer
/// than a client that speaks first takes, shorter than a person notices.
const GRACE: Duration = Duration::from_millis(20);

/// The same at a destination whose clients spoke HTTP so far.
const GRACE_HTTP: Duration = Duration::from_secs(1);

/// A detection timeout up to this is waited for once, at a destination of which nothing is known: whoever set it so short
/// has chosen when a silent connection becomes opaque, and an early connection that may turn out to be in vain would save
/// little. What was heard there counts from then on.
const SHORT: Duration = Duration::from_secs(2);

/// Bytes of a server's first words that are read before the client gets them.
const SPEECH: usize = 4_096;

/// What a connection speaks, with what was read of it.
pub(super) enum Spoken {
    Http(Version, Bytes),
    Opaque(Bytes, Option<Early>),
    /// A ClientHello for a name.
    Tls(String, Bytes),
}

/// What a connection in ingress mode speaks, and where it goes if it is not HTTP.
pub(super) enum Ingress {
    Http(Version, Bytes),
    Opaque(Found, Bytes, Option<Early>),
}

/// The connection to the server, if one was opened while the client was silent, and what the server said.
pub(super) type Early = (Arc<Route>, Opened, Bytes);

/// Decides by the policy as it is now. Dropping the future closes what it opened.
///
/// # Errors
/// [`Cause::Canceled`] if the client closes without a word, [`Cause::DetectTimeout`] and [`Cause::NoRoute`] for TLS
/// without a name.
pub(super) async fn decide(rt: &Runtime, dst: &Destination, io: &mut TcpStream) -> Result<Spoken, Error> {
    let policy = dst.policy();
    let count = |protocol| rt.telemetry.protocol_connections(protocol, &policy.parent).inc();
    match &policy.protocol {
        Protocol::Http1(_) => {
            count("http/1");
            Ok(Spoken::Http(Version::H1, Bytes::new()))
        }
        Protocol::Http2(_) | Protocol::Grpc(_) => {
            count("http/2");
            Ok(Spoken::Http(Version::H2, Bytes::new()))
        }
        Protocol::Opaque(_) => {
            count("opaq");
            Ok(Spoken::Opaque(Bytes::new(), None))
        }
        Protocol::Tls(_) => {
            count("tls");
            tls(rt.config.detect_timeout, io).await
        }
        Protocol::Detect { .. } => {
            count("detect");
            let metrics = rt.telemetry.outbound_detect(&policy.parent);
            let (version, read, early) = detect(rt.config.detect_timeout, dst, io, BytesMut::new(), &metrics).await?;
            match version {
                Some(version) => Ok(Spoken::Http(version, read)),
                None => Ok(Spoken::Opaque(read, early)),
            }
        }
        // HTTP is told with a 500; for that it must be known as HTTP.
        Protocol::Invalid(_) => match http(rt.config.detect_timeout, io).await? {
            (Some(version), read) => Ok(Spoken::Http(version, read)),
            (None, read) => Ok(Spoken::Opaque(read, None)),
        },
    }
}

/// Only HTTP or not: for listeners that know no destination yet. None if it is something else or nothing came in time.
///
/// # Errors
/// [`Cause::Canceled`] if the client closes without a word.
pub(super) async fn http(limit: Duration, io: &mut TcpStream) -> Result<(Option<Version>, Bytes), Error> {
    let mut buf = BytesMut::new();
    let version = version(detect::http(io, limit, &mut buf).await)?;
    Ok((version, buf.freeze()))
}

fn version(detected: Result<Detected, DetectError>) -> Result<Option<Version>, Error> {
    match detected {
        Ok(Detected::H1) => Ok(Some(Version::H1)),
        Ok(Detected::H2) => Ok(Some(Version::H2)),
        Ok(Detected::NotHttp) | Err(DetectError::Timeout(_)) => Ok(None),
        Err(DetectError::Closed) => Err(Cause::Canceled.into()),
        Err(DetectError::Io(error)) => Err(io_failure(&error)),
    }
}

/// In ingress mode every connection is looked at (behaviour.md D.15). The original destination is looked up when the
/// client is silent or speaks something else than HTTP, which may name another.
///
/// # Errors
/// [`Cause::Canceled`] if the client closes without a word, and those of `find` if there is no HTTP.
pub(super) async fn ingress(
    rt: &Runtime,
    find: impl Future<Output = Result<Found, Error>>,
    io: &mut TcpStream,
) -> Result<Ingress, Error> {
    let (started, limit) = (Instant::now(), rt.config.detect_timeout);
    let mut read = BytesMut::new();
    let mut find = pin!(find);
    let silent = async {
        sleep(GRACE).await;
        find.as_mut().await
    };
    let found = tokio::select! {
        biased;
        detected = detect::http(io, limit, &mut read) => match version(detected)? {
            Some(version) => return Ok(Ingress::Http(version, read.freeze())),
            None => return Ok(Ingress::Opaque(find.await?, read.freeze(), None)),
        },
        found = silent => found,
    };
    let left = limit.saturating_sub(started.elapsed());
    match found {
        Ok(found) => {
            let metrics = rt.telemetry.outbound_detect(&found.policy().parent);
            let (version, read, early) = detect(left, &found, io, read, &metrics).await?;
            Ok(match version {
                Some(version) => Ingress::Http(version, read),
                None => Ingress::Opaque(found, read, early),
            })
        }
        Err(error) => match version(detect::http(io, left, &mut read).await)? {
            Some(version) => Ok(Ingress::Http(version, read.freeze())),
            None => Err(error),
        },
    }
}

async fn tls(limit: Duration, io: &mut TcpStream) -> Result<Spoken, Error> {
    let hello = timeout(limit, linkerd_tls::detect::client_hello(io)).await;
    let (sni, read) = hello.map_err(|_| Cause::DetectTimeout(limit))?.map_err(|error| io_failure(&error))?;
    match sni {
        linkerd_tls::detect::Sni::Name(name) => Ok(Spoken::Tls(name, read)),
        _ => Err(Error::new(Cause::NoRoute).context("the client sent no TLS ClientHello with a server name")),
    }
}

async fn detect(
    limit: Duration,
    dst: &Destination,
    io: &mut TcpStream,
    mut read: BytesMut,
    metrics: &DetectMetrics,
) -> Result<(Option<Version>, Bytes, Option<Early>), Error> {
    let started = Instant::now();
    let mut ahead = Ahead::default();
    let result = {
        let mut detecting = pin!(detect::http(io, limit, &mut read));
        let mut server = pin!(ahead.listen(dst, limit));
        tokio::select! {
            biased;
            result = &mut detecting => Some(result),
            spoke = &mut server => {
                if spoke { None } else { Some(detecting.await) }
            }
        }
    };
    let (heard, counted, version) = match result {
        Some(Ok(Detected::H1)) => (Heard::Http, Outcome::Http1, Some(Version::H1)),
        Some(Ok(Detected::H2)) => (Heard::Http, Outcome::Http2, Some(Version::H2)),
        Some(Ok(Detected::NotHttp)) => (Heard::Other, Outcome::NotHttp, None),
        None => (Heard::ServerFirst, Outcome::NotHttp, None),
        Some(Err(DetectError::Timeout(_))) => {
            tracing::debug!(target = %dst.target(), ?limit, "no first bytes in time; the connection is opaque");
            (Heard::Other, Outcome::ReadTimeout, None)
        }
        Some(Err(error)) => {
            metrics.detected(Outcome::Error, started.elapsed());
            return Err(match error {
                DetectError::Closed | DetectError::Timeout(_) => Cause::Canceled.into(),
                DetectError::Io(error) => io_failure(&error),
            });
        }
    };
    dst.hear(heard);
    metrics.detected(counted, started.elapsed());
    Ok((version, read.freeze(), ahead.into_early()))
}

/// A connection opened while the client is silent.
#[derive(Default)]
struct Ahead {
    open: Option<(Arc<Route>, Opened)>,
    speech: BytesMut,
}

impl Ahead {
    /// Connects after a moment of silence, and waits for the server. True once it has spoken; false if it will not.
    async fn listen(&mut self, dst: &Destination, limit: Duration) -> bool {
        let grace = match dst.heard() {
            Heard::Nothing if limit <= SHORT => return false,
            Heard::Nothing | Heard::Other => GRACE,
            Heard::Http => GRACE_HTTP,
            Heard::ServerFirst => Duration::ZERO,
        };
        sleep(grace).await;
        let routes = dst.tcp().get();
        if !routes.is_opaque() {
            return false;
        }
        let Ok(route) = routes.route(None) else { return false };
        let Ok(opened) = route.open().await else { return false };
        let (_, opened) = self.open.insert((route, opened));
        self.speech.reserve(SPEECH);
        match opened.read_first(&mut self.speech).await {
            Ok(n) if n > 0 => true,
            // It closed without a word, as HTTP servers do with idle connections: the client may still speak.
            _ => {
                self.open = None;
                false
            }
        }
    }

    fn into_early(self) -> Option<Early> {
        let speech = self.speech.freeze();
        self.open.map(|(route, opened)| (route, opened, speech))
    }
}
