//! Sockets and what travels on them before any protocol: listeners, original destinations, connections onward, the
//! transport header, byte counts. Shared by inbound, outbound and admin; no policy is known here.

pub mod connect;
pub mod header;
pub mod listen;
pub mod metered;
pub mod orig_dst;
pub mod own;

pub use self::{
    connect::connect,
    header::TransportHeader,
    listen::{Accepted, BindError, BoundListener, bind},
    metered::{Meter, Metered},
    orig_dst::orig_dst,
};

use crate::error::{Cause, Error};
use socket2::{SockRef, TcpKeepalive};
use std::{
    io,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

/// An IPv4 address that was mapped into IPv6 by a dual-stack socket, as IPv4.
pub fn unmapped(addr: SocketAddr) -> SocketAddr {
    match addr.ip() {
        IpAddr::V4(_) => addr,
        IpAddr::V6(ip) => match ip.to_ipv4_mapped() {
            Some(ip) => SocketAddr::new(ip.into(), addr.port()),
            None => addr,
        },
    }
}

/// The failure that an I/O error means, with its errno where the system gave one.
pub fn io_failure(error: &io::Error) -> Error {
    Error::new(Cause::Io { errno: error.raw_os_error(), message: error.to_string().into() })
}

/// TCP_NODELAY always (behaviour.md 0.2); keepalive and user timeout where configured.
fn set_options(socket: &SockRef<'_>, keepalive: Option<Duration>, user_timeout: Option<Duration>) -> io::Result<()> {
    socket.set_tcp_nodelay(true)?;
    socket.set_keepalive(true)?;
    if let Some(idle) = keepalive {
        socket.set_tcp_keepalive(&TcpKeepalive::new().with_time(idle))?;
    }
    if let Some(timeout) = user_timeout {
        socket.set_tcp_user_timeout(Some(timeout))?;
    }
    Ok(())
}
