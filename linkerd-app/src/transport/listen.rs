//! Listening sockets. Binding fails with what to do about it; accepting never fails: a full descriptor table is waited
//! out, a connection that is gone before it was taken is skipped.

use super::{set_options, unmapped};
use crate::config;
use socket2::{Domain, Protocol, SockRef, Socket, Type};
use std::{io, net::SocketAddr, time::Duration};
use tokio::{
    net::{TcpListener, TcpStream},
    time,
};

/// First wait after an accept that failed for want of a resource.
const ACCEPT_BACKOFF_MIN: Duration = Duration::from_millis(10);

/// Longest wait after such accepts. Connections queue in the kernel meanwhile, up to the backlog.
const ACCEPT_BACKOFF_MAX: Duration = Duration::from_secs(1);

/// A bound socket that accepts connections.
#[derive(Debug)]
pub struct BoundListener {
    tcp: TcpListener,
    local: SocketAddr,
    keepalive: Option<Duration>,
    user_timeout: Option<Duration>,
}

/// An accepted connection.
#[derive(Debug)]
pub struct Accepted {
    /// The socket.
    pub io: TcpStream,
    /// Who connected; IPv4 as IPv4 even on a dual-stack listener.
    pub client: SocketAddr,
    /// The address of our end, after redirection.
    pub local: SocketAddr,
}

/// Why a listener could not be had.
#[derive(Debug, thiserror::Error)]
#[error("{setting}: cannot listen on {addr}: {source}; {}", remedy(.source, .setting))]
pub struct BindError {
    /// Name of the setting that asked for the address.
    pub setting: &'static str,
    /// The address.
    pub addr: SocketAddr,
    /// What the system said.
    pub source: io::Error,
}

fn remedy(error: &io::Error, setting: &str) -> String {
    match error.raw_os_error() {
        Some(libc::EADDRINUSE) => {
            format!(
                "another process listens there: stop it, or give {setting} a free port (`ss -ltnp` names the process)"
            )
        }
        Some(libc::EACCES) => {
            format!("ports below 1024 need CAP_NET_BIND_SERVICE: grant it, or give {setting} a higher port")
        }
        Some(libc::EADDRNOTAVAIL) => {
            format!("no interface of this host has that address: give {setting} one that it has, or a wildcard")
        }
        Some(libc::EAFNOSUPPORT) => {
            format!("this host lacks that address family: give {setting} an address of the other family")
        }
        _ => format!("correct {setting}"),
    }
}

/// Opens a listening socket. An IPv6 wildcard takes IPv4 connections too, where the system allows it.
///
/// # Errors
/// When the socket cannot be made, bound or put to listen: the error names the setting, the address and the remedy.
pub fn bind(config: &config::Listen) -> Result<BoundListener, BindError> {
    let fail = |source| BindError { setting: config.setting, addr: config.addr, source };
    let tcp = open(config).map_err(fail)?;
    let local = tcp.local_addr().map_err(fail)?;
    Ok(BoundListener { tcp, local, keepalive: config.keepalive, user_timeout: config.user_timeout })
}

fn open(config: &config::Listen) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(config.addr), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&config.addr.into())?;
    socket.listen(i32::try_from(config.backlog).unwrap_or(i32::MAX))?;
    TcpListener::from_std(socket.into())
}

impl BoundListener {
    /// The address in use; its port is real even if port 0 was asked for.
    pub fn local_addr(&self) -> SocketAddr {
        self.local
    }

    /// The next connection. Failures to accept are logged and outlived; dropping the future loses no connection.
    pub async fn accept(&self) -> Accepted {
        let mut backoff = ACCEPT_BACKOFF_MIN;
        loop {
            match self.tcp.accept().await {
                Ok((io, client)) => {
                    if let Err(error) = set_options(&SockRef::from(&io), self.keepalive, self.user_timeout) {
                        // The peer may be gone already; whoever serves the connection will see it.
                        tracing::debug!(%client, %error, "cannot set options of an accepted socket");
                    }
                    let local = io.local_addr().unwrap_or(self.local);
                    return Accepted { io, client: unmapped(client), local: unmapped(local) };
                }
                Err(error) if exhausted(&error) => {
                    tracing::warn!(
                        listener = %self.local, %error, wait = ?backoff,
                        "cannot accept: raise the limit on open files or memory; waiting",
                    );
                    time::sleep(backoff).await;
                    backoff = (backoff * 2).min(ACCEPT_BACKOFF_MAX);
                }
                Err(error) => {
                    tracing::debug!(listener = %self.local, %error, "a connection was lost before it was accepted");
                    tokio::task::yield_now().await;
                }
            }
        }
    }
}

/// Whether an accept failed for want of something that comes back with time, rather than because of the connection.
fn exhausted(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE | libc::ENOBUFS | libc::ENOMEM))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn loopback(port: u16) -> config::Listen {
        config::Listen {
            addr: SocketAddr::from(([127, 0, 0, 1], port)),
            setting: "LINKERD2_PROXY_INBOUND_LISTEN_ADDR",
            keepalive: Some(Duration::from_secs(10)),
            user_timeout: Some(Duration::from_secs(30)),
            backlog: 128,
        }
    }

    #[tokio::test]
    async fn accepted_sockets_have_their_options() {
        let listener = bind(&loopback(0)).unwrap();
        let client = TcpStream::connect(listener.local_addr()).await.unwrap();
        let accepted = listener.accept().await;
        assert_eq!(accepted.client, client.local_addr().unwrap());
        assert_eq!(accepted.local, listener.local_addr());
        let socket = SockRef::from(&accepted.io);
        assert!(socket.tcp_nodelay().unwrap() && socket.keepalive().unwrap());
        assert_eq!(socket.tcp_user_timeout().unwrap(), Some(Duration::from_secs(30)));

        // Peers are looked after, by the system's times, where no time is set.
        let listener = bind(&config::Listen { keepalive: None, ..loopback(0) }).unwrap();
        let _client = TcpStream::connect(listener.local_addr()).await.unwrap();
        assert!(SockRef::from(&listener.accept().await.io).keepalive().unwrap());
    }

    #[tokio::test]
    async fn a_taken_port_is_an_error_with_setting_address_and_remedy() {
        let listener = bind(&loopback(0)).unwrap();
        let addr = listener.local_addr();
        let error = bind(&loopback(addr.port())).unwrap_err().to_string();
        for part in ["LINKERD2_PROXY_INBOUND_LISTEN_ADDR", &addr.to_string(), "in use", "give", "free port"] {
            assert!(error.contains(part), "{part:?} is missing in {error:?}");
        }
    }

    #[tokio::test]
    async fn an_address_of_nobody_is_an_error_with_a_remedy() {
        let config = config::Listen { addr: SocketAddr::from(([192, 0, 2, 1], 0)), ..loopback(0) };
        assert!(bind(&config).unwrap_err().to_string().contains("no interface"));
    }
}
