//! TLS: looks for a ClientHello, terminates what is meant for this proxy, passes everything else on untouched
//! (behaviour.md A.2, A.3).
//!
//! A client that says nothing for the whole detection timeout is closed; until then the application may speak first,
//! where policy lets this client connect opaquely without TLS.

use super::{
    At, Failed, Inbound,
    accept::Conn,
    first::{First, PLAIN_AFTER, first},
    local::App,
    policy,
};
use crate::{
    error::{Cause, Error},
    policy::{
        authz::{ClientTls, NoTls},
        server::Protocol,
    },
    telemetry::termination::Phase,
    transport::io_failure,
};
use bytes::Bytes;
use linkerd_stack::{PrefixedIo, drain};
use linkerd_tls::{
    ServerIo,
    detect::{self, Sni},
    identity::Alpn,
};
use std::{io, time::Duration};
use tokio::{
    net::TcpStream,
    select,
    time::{self, Instant},
};

/// A client's socket, with the bytes already read from it.
pub(super) type Plain = PrefixedIo<TcpStream>;

/// A connection of which it is known whether it is TLS.
pub(super) enum Secured {
    /// No TLS, or not for us.
    Plain(Conn, Plain),
    /// Mesh TLS, terminated.
    Mesh(Conn, ServerIo<Plain>),
    /// The application spoke before the client did.
    Early(Conn, TcpStream, App),
    /// The client left without a word, or the proxy is going away.
    Gone,
}

/// Finds out about TLS, as the policy demands.
///
/// # Errors
/// When the client is silent for too long, when the handshake fails, and on I/O errors.
pub(super) async fn secure(
    inbound: &Inbound,
    mut conn: Conn,
    mut io: TcpStream,
    drain: &drain::Watch,
) -> Result<Secured, Failed> {
    if matches!(conn.policy.policy.protocol, Protocol::Opaque(_)) {
        conn.tls = ClientTls::None(NoTls::PortSkipped);
        return Ok(Secured::Plain(conn, PrefixedIo::new(Bytes::new(), io)));
    }
    let plain = ClientTls::None(NoTls::NoTlsFromRemote);
    let start = Instant::now();
    let waited = {
        let may_be_opaque = matches!(conn.policy.policy.protocol, Protocol::Detect { .. })
            && policy::permit_tcp(&conn.policy.policy, conn.client.ip(), &plain).is_some();
        let dial = may_be_opaque.then(|| inbound.dial_early(conn.target));
        let mut byte = [0; 1];
        select! {
            biased;
            waited = first(io.peek(&mut byte), dial, PLAIN_AFTER, inbound.cfg.detect_timeout) => waited,
            () = drain.signaled() => return Ok(Secured::Gone),
        }
    };
    match waited {
        First::Client(Ok(0)) => Ok(Secured::Gone),
        First::Client(Err(error)) => Err(io_failure(&error)).at(Phase::Detect),
        First::Client(Ok(_)) => {
            let left = inbound.cfg.detect_timeout.saturating_sub(start.elapsed());
            let (sni, read) = client_hello(inbound, &mut io, left).await.at(Phase::Detect)?;
            terminate(inbound, conn, sni, PrefixedIo::new(read, io)).await.at(Phase::Tls)
        }
        First::App(app) => {
            tracing::debug!(client = %conn.client, target = %conn.target, "the application spoke first: opaque");
            conn.tls = plain;
            Ok(Secured::Early(conn, io, app))
        }
        First::Timeout => Err(silent(inbound.cfg.detect_timeout)).at(Phase::Detect),
    }
}

/// The failure of a client that says nothing.
pub(super) fn silent(timeout: Duration) -> Error {
    Error::new(Cause::DetectTimeout(timeout)).context(
        "the client is silent; if this port's protocol lets the server speak first, declare the port opaque \
         (annotation config.linkerd.io/opaque-ports, or a Server with proxyProtocol: opaque)",
    )
}

/// Reads until it is known whether this is a ClientHello.
pub(super) async fn client_hello(inbound: &Inbound, io: &mut TcpStream, left: Duration) -> Result<(Sni, Bytes), Error> {
    match time::timeout(left, detect::client_hello(io)).await {
        Ok(Ok(found)) => Ok(found),
        Ok(Err(error)) => Err(io_failure(&error)),
        Err(_) => Err(Error::new(Cause::DetectTimeout(inbound.cfg.detect_timeout))
            .context("the client stopped within its ClientHello")),
    }
}

async fn terminate(inbound: &Inbound, mut conn: Conn, sni: Sni, io: Plain) -> Result<Secured, Error> {
    match (sni, &inbound.identity) {
        (Sni::Name(name), Some(identity)) if name.eq_ignore_ascii_case(identity.server_name().as_str()) => {
            let (accepted, io) = identity.accept(io, Alpn::None).await.map_err(|error| handshake(&error))?;
            conn.tls = ClientTls::Terminated(accepted.client_id);
            Ok(Secured::Mesh(conn, io))
        }
        (Sni::Name(name), _) => {
            conn.tls = ClientTls::Passthru { sni: name.into() };
            Ok(Secured::Plain(conn, io))
        }
        (Sni::NoName | Sni::NotTls | Sni::Incomplete, _) => {
            conn.tls = ClientTls::None(NoTls::NoTlsFromRemote);
            Ok(Secured::Plain(conn, io))
        }
    }
}

/// A handshake that failed.
pub(super) fn handshake(error: &linkerd_tls::Error) -> Error {
    let message = match error.errno() {
        Some(errno) => io::Error::from_raw_os_error(errno).to_string(),
        None => error.to_string(),
    };
    Error::new(Cause::Io { errno: error.errno(), message: message.into() }).context("TLS handshake with the client")
}
