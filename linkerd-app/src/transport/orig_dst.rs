//! Where a redirected connection was meant to go: SO_ORIGINAL_DST of the kernel's NAT table (behaviour.md A.1).

use super::unmapped;
use socket2::SockRef;
use std::{io, net::SocketAddr};
use tokio::net::TcpStream;

/// The destination before redirection, looked up in the table of the peer's address family; IPv4 that was mapped into
/// IPv6 counts as IPv4.
///
/// # Errors
/// The system's: `ENOENT` or `ENOPROTOOPT` when the kernel knows no translation of the connection (see
/// [`is_missing`]), `ENOTCONN` when the peer is gone.
pub fn orig_dst(io: &TcpStream) -> io::Result<SocketAddr> {
    let peer = unmapped(io.peer_addr()?);
    let socket = SockRef::from(io);
    let addr = if peer.is_ipv4() { socket.original_dst_v4()? } else { socket.original_dst_v6()? };
    let addr = addr
        .as_socket()
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "original destination is no IP address"))?;
    Ok(unmapped(addr))
}

/// Whether the look-up failed because the connection was not redirected at all.
pub fn is_missing(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENOPROTOOPT))
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::net::TcpListener;

    /// Where the kernel tracks connections, one that nobody redirected is found under its own address.
    #[tokio::test]
    async fn a_connection_without_redirection_has_no_other_destination() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let local = listener.local_addr().unwrap();
        let _client = TcpStream::connect(local).await.unwrap();
        let (io, _) = listener.accept().await.unwrap();
        match orig_dst(&io) {
            Ok(addr) => assert_eq!(addr, local),
            Err(error) => assert!(is_missing(&error), "{error}"),
        }
    }
}
