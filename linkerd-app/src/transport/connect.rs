//! Plain TCP connections onward, with a limit in time. Who may be dialled is the caller's business.

use super::{io_failure, set_options};
use crate::{
    config,
    error::{Cause, Error},
    telemetry::termination::Phase,
};
use socket2::SockRef;
use std::{net::SocketAddr, time::Duration};
use tokio::{
    net::{TcpSocket, TcpStream},
    time,
};

/// Opens a connection. Dropping the future abandons the attempt.
///
/// # Errors
/// [`Cause::ConnectTimeout`] after `config.timeout`, else [`Cause::Io`] with the system's errno.
pub async fn connect(addr: SocketAddr, config: &config::Connect) -> Result<TcpStream, Error> {
    open(addr, config).await.map_err(|error| error.during(Phase::Connect))
}

async fn open(addr: SocketAddr, config: &config::Connect) -> Result<TcpStream, Error> {
    let socket = if addr.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() };
    let socket = socket.map_err(|error| io_failure(&error))?;
    set_options(&SockRef::from(&socket), config.keepalive, config.user_timeout).map_err(|error| io_failure(&error))?;
    within(config.timeout, socket.connect(addr)).await
}

async fn within<T>(timeout: Duration, connect: impl Future<Output = std::io::Result<T>>) -> Result<T, Error> {
    match time::timeout(timeout, connect).await {
        Ok(Ok(io)) => Ok(io),
        Ok(Err(error)) => Err(io_failure(&error)),
        Err(_) => Err(Cause::ConnectTimeout(timeout).into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::client::Backoff;
    use tokio::net::TcpListener;

    fn config() -> config::Connect {
        config::Connect {
            timeout: Duration::from_secs(1),
            keepalive: Some(Duration::from_secs(10)),
            user_timeout: None,
            backoff: Backoff { min: Duration::from_millis(100), max: Duration::from_secs(10), jitter: 0.1 },
        }
    }

    #[tokio::test]
    async fn connects_without_delay() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let io = connect(listener.local_addr().unwrap(), &config()).await.unwrap();
        assert!(io.nodelay().unwrap() && SockRef::from(&io).keepalive().unwrap());
    }

    #[tokio::test]
    async fn a_refusal_keeps_its_errno() {
        let addr = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
        let error = connect(addr, &config()).await.unwrap_err();
        assert!(matches!(error.cause(), Cause::Io { errno: Some(libc::ECONNREFUSED), .. }), "{error:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn silence_ends_with_the_timeout() {
        let timeout = Duration::from_millis(300);
        let error = within::<()>(timeout, std::future::pending()).await.unwrap_err();
        assert_eq!(*error.cause(), Cause::ConnectTimeout(timeout));
    }
}
