//! HTTP or not: declared by the policy, or seen in the first bytes (behaviour.md A.2, A.4).
//!
//! A silent client never gets more than the policy for HTTP would give it: when the wait ends, it is closed, unless an
//! opaque connection is all the policy is about.

use super::{
    Inbound,
    accept::Conn,
    first::{First, first},
    local::App,
    policy::{depends_on_http, permit_tcp},
    tls::silent,
};
use crate::{
    error::Error,
    policy::{authz::ClientTls, server},
    telemetry::Detected,
    transport::io_failure,
};
use bytes::{Bytes, BytesMut};
use linkerd_stack::{
    Io, PrefixedIo,
    detect::{self, DetectError},
    drain,
    http::Version,
};
use std::time::Duration;
use tokio::{select, time::Instant};

/// Bytes looked at (behaviour.md A.4).
const FIRST_BYTES: usize = 1024;

/// How a connection is spoken.
pub(super) enum Protocol<I> {
    /// HTTP.
    Http(Version, PrefixedIo<I>),
    /// Bytes: those already read, the rest, and the connection to the application if that spoke first.
    Opaque(Bytes, I, Option<App>),
    /// The client left without a word, or the proxy is going away.
    Gone,
}

/// Decides by the policy that was in force at accept.
///
/// # Errors
/// When the client is silent for too long and the policy depends on HTTP; on I/O errors.
pub(super) async fn protocol<I: Io>(
    inbound: &Inbound,
    conn: &Conn,
    io: I,
    drain: &drain::Watch,
) -> Result<Protocol<I>, Error> {
    let untouched = |io| PrefixedIo::new(Bytes::new(), io);
    let timeout = match (&conn.policy.policy.protocol, &conn.tls) {
        (server::Protocol::Opaque(_) | server::Protocol::Tls(_), _) => {
            return Ok(Protocol::Opaque(Bytes::new(), io, None));
        }
        (server::Protocol::Http1(_), ClientTls::None(_)) => return Ok(Protocol::Http(Version::H1, untouched(io))),
        (server::Protocol::Http2(_) | server::Protocol::Grpc(_), _) => {
            return Ok(Protocol::Http(Version::H2, untouched(io)));
        }
        (server::Protocol::Detect { timeout, .. }, _) => *timeout,
        // A meshed client may carry HTTP/1 inside HTTP/2.
        (server::Protocol::Http1(_), ClientTls::Terminated(_) | ClientTls::Passthru { .. })
        | (server::Protocol::Invalid(_), _) => inbound.cfg.detect_timeout,
    };
    look(inbound, conn, io, timeout, drain).await
}

async fn look<I: Io>(
    inbound: &Inbound,
    conn: &Conn,
    mut io: I,
    timeout: Duration,
    drain: &drain::Watch,
) -> Result<Protocol<I>, Error> {
    let policy = &conn.policy.policy;
    let metrics = inbound.telemetry.inbound_detect(&policy.meta, conn.port.number());
    let start = Instant::now();
    let done = |result| metrics.detected(result, start.elapsed());

    let mut buf = BytesMut::with_capacity(FIRST_BYTES);
    let waited = {
        let may_be_opaque = matches!(policy.protocol, server::Protocol::Detect { .. })
            && permit_tcp(policy, conn.client.ip(), &conn.tls).is_some();
        let dial = may_be_opaque.then(|| inbound.dial_early(conn.target));
        let client = detect::http(&mut io, Duration::MAX, &mut buf);
        select! {
            biased;
            waited = first(client, dial, Duration::ZERO, timeout) => waited,
            () = drain.signaled() => return Ok(Protocol::Gone),
        }
    };
    let first = buf.freeze();
    match waited {
        First::Client(Ok(detect::Detected::H1)) => {
            done(Detected::Http1);
            Ok(Protocol::Http(Version::H1, PrefixedIo::new(first, io)))
        }
        First::Client(Ok(detect::Detected::H2)) => {
            done(Detected::Http2);
            Ok(Protocol::Http(Version::H2, PrefixedIo::new(first, io)))
        }
        First::Client(Ok(detect::Detected::NotHttp)) => {
            done(Detected::NotHttp);
            Ok(Protocol::Opaque(first, io, None))
        }
        First::Client(Err(DetectError::Closed)) => {
            done(Detected::Error);
            Ok(Protocol::Gone)
        }
        First::Client(Err(DetectError::Io(error))) => {
            done(Detected::Error);
            Err(io_failure(&error))
        }
        First::App(app) => {
            done(Detected::NotHttp);
            tracing::debug!(client = %conn.client, target = %conn.target, "the application spoke first: opaque");
            Ok(Protocol::Opaque(first, io, Some(app)))
        }
        First::Timeout | First::Client(Err(DetectError::Timeout(_))) => {
            done(if first.is_empty() { Detected::ReadTimeout } else { Detected::NotHttp });
            silence(conn, first, io, timeout)
        }
    }
}

/// What becomes of a client that said nothing, or stopped in the middle of what may be HTTP, by the policy now in force.
fn silence<I>(conn: &Conn, first: Bytes, io: I, timeout: Duration) -> Result<Protocol<I>, Error> {
    let now = conn.port.current();
    let client = conn.client.ip();
    if let server::Protocol::Http1(_) = now.policy.protocol {
        return Ok(Protocol::Http(Version::H1, PrefixedIo::new(first, io)));
    }
    if permit_tcp(&now.policy, client, &conn.tls).is_some() && !depends_on_http(&now.policy, client, &conn.tls) {
        return Ok(Protocol::Opaque(first, io, None));
    }
    Err(silent(timeout))
}
