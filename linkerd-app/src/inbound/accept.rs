//! The first stage: where the client meant to go, whether that is us, and which policy holds there. Nothing is read.

use super::{
    Inbound,
    policy::{PortRef, Prepared},
};
use crate::{
    error::{Cause, Error},
    policy::authz::{ClientTls, NoTls},
    transport::{Accepted, io_failure, orig_dst},
};
use std::{net::SocketAddr, sync::Arc};
use tokio::net::TcpStream;

/// A connection: who, where to, and under which policy.
pub(super) struct Conn {
    /// Who connected.
    pub client: SocketAddr,
    /// Where to: the original destination, or the local address with the port of a transport header.
    pub target: SocketAddr,
    /// Whether the client dialled the proxy itself.
    pub direct: bool,
    /// What the client proved so far.
    pub tls: ClientTls,
    /// The port and its policy, which may change.
    pub port: PortRef,
    /// The policy when the connection was accepted.
    pub policy: Arc<Prepared>,
}

impl Conn {
    /// A connection to another port of this workload (behaviour.md A.5).
    pub(super) fn for_port(self, inbound: &Inbound, number: u16) -> Self {
        let port = inbound.guard.ports.get(number);
        let policy = port.current().clone();
        Self { target: SocketAddr::new(self.target.ip(), number), port, policy, ..self }
    }
}

/// Learns where a connection goes.
///
/// A connection that nobody redirected is one to the proxy's own port.
///
/// # Errors
/// When the destination cannot be learned, or is none of this workload's addresses.
pub(super) fn accept(inbound: &Inbound, accepted: Accepted) -> Result<(Conn, TcpStream), Error> {
    let Accepted { io, client, local } = accepted;
    let own = inbound.cfg.listen.addr.port();
    let (target, redirected) = match orig_dst(&io) {
        Ok(target) => (target, true),
        Err(error) if orig_dst::is_missing(&error) && local.port() == own => (local, false),
        Err(error) => {
            return Err(io_failure(&error).context("cannot learn the original destination"));
        }
    };
    let conn = conn(inbound, client, target)?;
    if !redirected {
        tracing::debug!(%client, %local, "no NAT entry: taken as a connection to the proxy itself");
    }
    Ok((conn, io))
}

/// The guards of behaviour.md A.1.
pub(super) fn conn(inbound: &Inbound, client: SocketAddr, target: SocketAddr) -> Result<Conn, Error> {
    if !inbound.cfg.ips.is_empty() && !inbound.cfg.ips.contains(&target.ip()) {
        return Err(Error::new(Cause::Loop(target))
            .context("the destination is none of this proxy's addresses (LINKERD2_PROXY_INBOUND_IPS)"));
    }
    let port = inbound.guard.ports.get(target.port());
    let policy = port.current().clone();
    let direct = target.port() == inbound.cfg.listen.addr.port();
    Ok(Conn { client, target, direct, tls: ClientTls::None(NoTls::PortSkipped), port, policy })
}
