//! Connections to the proxy's own port: mesh TLS with a client identity, then a transport header that says where to
//! (behaviour.md A.5). Anything else is closed.

use super::{At, Failed, Inbound, Serving, accept::Conn, http, opaque, tls};
use crate::{
    error::{Cause, Error},
    policy::{Target, authz::ClientTls},
    telemetry::termination::Phase,
    transport::{
        TransportHeader,
        header::{self, HeaderError, Session},
        io_failure,
    },
};
use futures_util::future::ready;
use linkerd_stack::{PrefixedIo, drain, http::Version};
use linkerd_tls::{detect::Sni, identity::Alpn};
use std::sync::Arc;
use tokio::{net::TcpStream, select};

/// Takes a connection to the proxy itself, and hands over to what serves it.
///
/// # Errors
/// When the connection is not what a meshed peer's proxy would make.
pub(super) async fn accept(
    inbound: &Arc<Inbound>,
    mut conn: Conn,
    mut io: TcpStream,
    drain: drain::Watch,
) -> Result<Serving<'_>, Failed> {
    // TLS, for us, by an identified client.
    let Some(identity) = &inbound.identity else {
        return Err(not_direct("this proxy has no identity")).at(Phase::Tls);
    };
    let (sni, read) = select! {
        biased;
        hello = tls::client_hello(inbound, &mut io, inbound.cfg.detect_timeout) => hello.at(Phase::Detect)?,
        () = drain.signaled() => return Ok(Box::pin(ready(Ok(())))),
    };
    match sni {
        Sni::Name(name) if name.eq_ignore_ascii_case(identity.server_name().as_str()) => {}
        Sni::NotTls if read.is_empty() => return Ok(Box::pin(ready(Ok(())))), // Connected and left: a probe.
        Sni::Name(_) | Sni::NoName | Sni::NotTls | Sni::Incomplete => {
            return Err(not_direct("no mesh TLS")).at(Phase::Tls);
        }
    }
    let (accepted, mut io) = identity
        .accept(PrefixedIo::new(read, io), Alpn::TransportHeader)
        .await
        .map_err(|error| tls::handshake(&error))
        .at(Phase::Tls)?;
    let Some(client_id) = accepted.client_id else {
        return Err(not_direct("no client identity")).at(Phase::Tls);
    };
    if !accepted.transport_header {
        return Err(not_direct("no transport header agreed on")).at(Phase::Tls);
    }

    // Where to, and how.
    let (header, rest) = header::read(&mut io, inbound.cfg.detect_timeout)
        .await
        .map_err(|error| header_failure(&error))
        .at(Phase::Detect)?;
    let session = match header.session {
        Some(Session::Http1) => "http/1",
        Some(Session::Http2) => "http/2",
        None => "",
    };
    let name = header.name.as_deref().unwrap_or("");
    inbound.telemetry.transport_header(session, header.port, name, Some(&client_id)).inc();
    conn.tls = ClientTls::Terminated(Some(client_id));
    let io = PrefixedIo::new(rest, io);

    // There.
    let version = |session| match session {
        Session::Http1 => Version::H1,
        Session::Http2 => Version::H2,
    };
    let TransportHeader { port, name, session } = header;
    let io = Box::new(io);
    Ok(match (name, session) {
        (None, None) => {
            let conn = conn.for_port(inbound, port);
            Box::pin(opaque::forward(inbound, conn, opaque::Side::Other(io), None, drain))
        }
        (None, Some(session)) => {
            Box::pin(http::serve(inbound, conn.for_port(inbound, port), version(session), io, drain))
        }
        (Some(name), session) => {
            let (target, gateway) = (Target::Name(name.into(), port), &inbound.gateway);
            match session {
                Some(session) => {
                    Box::pin(http::serve_gateway(inbound, conn, version(session), io, gateway, target, drain))
                }
                None => Box::pin(opaque::gateway(inbound, conn, io, gateway, target, drain)),
            }
        }
    })
}

/// The failure to say where to.
fn header_failure(error: &HeaderError) -> Error {
    let cause = match error {
        HeaderError::Timeout(timeout) => Cause::DetectTimeout(*timeout),
        HeaderError::Io(error) => return io_failure(error).context("transport header"),
        error => Cause::BadRequest(error.to_string().into()),
    };
    Error::new(cause).context("transport header")
}

/// The failure of connections that are no business of this port.
fn not_direct(why: &str) -> Error {
    Error::new(Cause::BadRequest(why.into())).context(
        "a connection to the proxy's own port must come from another meshed proxy; connections to the application \
         need redirection: run `linkerd-proxy redirect`",
    )
}
