//! Connections forwarded unread: authorized once, and again whenever the policy changes (behaviour.md C.5).

use super::{
    At, Failed, Inbound,
    accept::Conn,
    denial::Case,
    local::App,
    policy::{permit_tcp, tcp},
    tls::Plain,
};
use crate::{
    gateway::Gateway,
    policy::{ServerPolicy, Target},
    telemetry::{Code, ConnLabels, ConnMetrics, Direction, Peer, ServerLabels, TlsLabels, termination::Phase},
    transport::{Metered, io_failure},
};
use bytes::Bytes;
use linkerd_stack::{BoxedIo, Io, PrefixedIo, copy, drain};
use linkerd_tls::ServerIo;
use std::{future::pending, io, sync::Arc};
use tokio::{io::AsyncWriteExt, net::TcpStream, select, sync::watch};

/// A client's stream, in the shape that is copied best.
pub(super) enum Side {
    /// Plain TCP, which the kernel can splice, and the bytes already read from it.
    Tcp(Bytes, TcpStream),
    /// Anything else.
    Other(BoxedIo),
}

/// A stream that bytes were read from.
pub(super) trait Stream: Io {
    /// Puts the bytes back.
    fn side(self, read: Bytes) -> Side;
}

impl Stream for Plain {
    fn side(self, read: Bytes) -> Side {
        let (rest, io) = self.into_parts();
        match (read.is_empty(), rest.is_empty()) {
            (true, _) => Side::Tcp(rest, io),
            (false, true) => Side::Tcp(read, io),
            (false, false) => Side::Tcp([read, rest].concat().into(), io),
        }
    }
}

impl Stream for ServerIo<Plain> {
    fn side(self, read: Bytes) -> Side {
        Side::Other(Box::new(PrefixedIo::new(read, self)))
    }
}

/// Forwards a connection until both ends are done, a drain being no reason to end it. `app` is the connection to the
/// application if there is one already. A client that is refused, now or later, is closed.
///
/// # Errors
/// When the application cannot be reached, and when a copy fails.
pub(super) async fn forward(
    inbound: &Inbound,
    conn: Conn,
    client: Side,
    app: Option<App>,
    _drain: drain::Watch,
) -> Result<(), Failed> {
    let mut changes = conn.port.changes();
    let policy = changes.borrow_and_update().clone();
    if !authorize(inbound, &conn, &policy) {
        return Ok(());
    }
    let src = inbound.telemetry.conn(src_labels(&conn, &policy));
    let forward = async {
        match client {
            Side::Tcp(read, mut io) => {
                let mut src = Metered::new((), src);
                let app = match app {
                    Some(app) => app,
                    None => inbound.locals.connect(conn.target).await.at(Phase::Connect)?,
                };
                let (speech, mut app) = app.into_parts();
                let mut dst = Metered::new((), inbound.locals.metrics());
                let copied = splice(&mut io, &read, &mut app, &speech, src.meter(), dst.meter()).await;
                let copied = copied.map_err(|error| {
                    src.failed(&error);
                    dst.failed(&error);
                    io_failure(&error)
                });
                copied.at(Phase::Response)
            }
            Side::Other(io) => {
                let io = Metered::new(io, src);
                let app = match app {
                    Some(app) => app,
                    None => inbound.locals.connect(conn.target).await.at(Phase::Connect)?,
                };
                let app = Metered::new(app, inbound.locals.metrics());
                let copied = copy::duplex(io, app).await;
                copied.map(|_| ()).map_err(|error| io_failure(&error)).at(Phase::Response)
            }
        }
    };
    select! {
        forwarded = forward => forwarded,
        () = revoked(inbound, &conn, &mut changes) => Ok(()),
    }
}

/// Copies between plain sockets, what was read from them first.
async fn splice(
    client: &mut TcpStream,
    read: &[u8],
    app: &mut TcpStream,
    speech: &[u8],
    src: &ConnMetrics,
    dst: &ConnMetrics,
) -> io::Result<()> {
    let moved = |direction, bytes| match direction {
        copy::Direction::Forth => {
            src.read(bytes);
            dst.written(bytes);
        }
        copy::Direction::Back => {
            dst.read(bytes);
            src.written(bytes);
        }
    };
    if !speech.is_empty() {
        client.write_all(speech).await?;
        moved(copy::Direction::Back, speech.len() as u64);
    }
    copy::tcp(client, app, read, &moved).await.map(|_| ())
}

/// Passes an opaque connection on to a target elsewhere, authorized by the policy of this proxy's own port.
///
/// # Errors
/// As the gateway fails.
pub(super) async fn gateway(
    inbound: &Inbound,
    conn: Conn,
    io: BoxedIo,
    gateway: &Gateway,
    target: Target,
    _drain: drain::Watch,
) -> Result<(), Failed> {
    let mut changes = conn.port.changes();
    let policy = changes.borrow_and_update().clone();
    if !authorize(inbound, &conn, &policy) {
        return Ok(());
    }
    let io = Box::new(Metered::new(io, inbound.telemetry.conn(src_labels(&conn, &policy))));
    select! {
        passed = gateway.opaque(target, conn.tls.client_id(), io) => passed.at(Phase::Connect),
        () = revoked(inbound, &conn, &mut changes) => Ok(()),
    }
}

fn src_labels(conn: &Conn, policy: &ServerPolicy) -> ConnLabels {
    ConnLabels {
        direction: Direction::Inbound,
        peer: Peer::Src,
        target: Some(conn.target),
        tls: TlsLabels::Accepted(conn.tls.clone()),
        srv: Some((policy.meta.clone(), conn.port.number())),
        authority: None,
        dst: None,
    }
}

/// Whether the client may connect; a refusal is counted and logged.
fn authorize(inbound: &Inbound, conn: &Conn, policy: &Arc<ServerPolicy>) -> bool {
    let metrics = inbound.telemetry.inbound_server(server_labels(conn, policy));
    let case = case(conn, policy);
    match permit_tcp(policy, conn.client.ip(), &conn.tls) {
        Some(permit) => {
            metrics.tcp_allow(&permit.meta).inc();
            if permit.audit {
                inbound.guard.lines.audited(case);
            }
            true
        }
        None => {
            metrics.tcp_deny().inc();
            inbound.telemetry.terminated(Direction::Inbound, Code::PolicyUnauthorized);
            inbound.guard.lines.denied(case);
            false
        }
    }
}

/// Ends when the client is not permitted any more.
async fn revoked(inbound: &Inbound, conn: &Conn, changes: &mut watch::Receiver<Arc<ServerPolicy>>) {
    loop {
        if changes.changed().await.is_err() {
            // The source is gone; its last word stays in force.
            return pending().await;
        }
        let policy = changes.borrow_and_update().clone();
        if permit_tcp(&policy, conn.client.ip(), &conn.tls).is_none() {
            inbound.telemetry.inbound_server(server_labels(conn, &policy)).tcp_terminate().inc();
            inbound.telemetry.terminated(Direction::Inbound, Code::PolicyRevoked);
            inbound.guard.lines.terminated(case(conn, &policy));
            return;
        }
    }
}

fn case<'a>(conn: &'a Conn, policy: &'a ServerPolicy) -> Case<'a> {
    Case {
        client: conn.client,
        tls: &conn.tls,
        server: &policy.meta,
        route: None,
        read_as: None,
        authorizations: tcp(policy),
    }
}

fn server_labels(conn: &Conn, policy: &ServerPolicy) -> ServerLabels {
    ServerLabels { target: conn.target, srv: policy.meta.clone(), srv_port: conn.port.number(), tls: conn.tls.clone() }
}
