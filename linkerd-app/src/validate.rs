//! The network validator: does redirection work in this network namespace? It listens where the proxy would and connects
//! somewhere else; with rules in force it meets itself there (contract.md 6.6).

use rand::{RngExt, distr::Alphanumeric};
use std::{net::SocketAddr, time::Duration};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    time::timeout,
};

/// Length of the token, without its newline.
const TOKEN: usize = 63;
/// Exit code when redirection does not work; the repair controller looks for it.
pub const EXIT_UNSUCCESSFUL: u8 = 95;
/// Most clients that are answered, so that a misdirected host cannot keep the validator busy.
const MAX_CLIENTS: usize = 16;

/// Where to listen and where to connect to.
#[derive(Clone, Debug)]
pub struct Options {
    /// The outbound port, on all addresses.
    pub listen: SocketAddr,
    /// An address at which nobody answers; it need not be reachable.
    pub connect: SocketAddr,
    /// Longest wait.
    pub timeout: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([0, 0, 0, 0], 4140)),
            connect: SocketAddr::from(([192, 0, 2, 2], 1404)),
            timeout: Duration::from_secs(10),
        }
    }
}

/// Why redirection does not work.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The port is taken, most likely by a proxy that is already running.
    #[error("cannot listen on {0}: {1}; is a proxy already running here?")]
    Listen(SocketAddr, std::io::Error),
    /// The connection did not come to us: it was refused or went astray.
    #[error("cannot connect to {0}: {1}; connections are not redirected")]
    Connect(SocketAddr, std::io::Error),
    /// Someone else answered, or nobody in full.
    #[error("{0} answered something else than our token; connections are not redirected to this process")]
    Token(SocketAddr),
    /// Nothing within the time.
    #[error("nothing came back from {0} within {1:?}; connections are not redirected")]
    Timeout(SocketAddr, Duration),
}

/// Validates, logs the outcome, and returns the exit code for this process: 0, or 95.
pub async fn run(options: Options) -> u8 {
    match validate(&options).await {
        Ok(()) => {
            tracing::info!("Redirection works");
            0
        }
        Err(error) => {
            tracing::error!(
                %error,
                "Redirection does not work; see that `linkerd-proxy redirect`, the init container or the CNI plugin has run in \
                 this network namespace"
            );
            EXIT_UNSUCCESSFUL
        }
    }
}

/// As [`run`], without its words.
///
/// # Errors
/// When redirection does not work.
pub async fn validate(options: &Options) -> Result<(), Error> {
    let Options { listen, connect, timeout: limit } = *options;
    let listener = TcpListener::bind(listen).await.map_err(|e| Error::Listen(listen, e))?;
    meet(listener, connect, limit).await
}

async fn meet(listener: TcpListener, connect: SocketAddr, limit: Duration) -> Result<(), Error> {
    let mut token: String = rand::rng().sample_iter(Alphanumeric).take(TOKEN).map(char::from).collect();
    token.push('\n');
    let answer = async {
        for _ in 0..MAX_CLIENTS {
            if let Ok((mut client, from)) = listener.accept().await {
                tracing::debug!(%from, "Answering");
                // A client that goes away is not the one that we wait for.
                let _ = client.write_all(token.as_bytes()).await;
            }
        }
        std::future::pending().await
    };
    let ask = async {
        let mut io = TcpStream::connect(connect).await.map_err(|e| Error::Connect(connect, e))?;
        let mut answer = vec![0; token.len()];
        match io.read_exact(&mut answer).await {
            Ok(_) if answer == token.as_bytes() => Ok(()),
            _ => Err(Error::Token(connect)),
        }
    };
    let both = async {
        tokio::select! {
            never = answer => never,
            result = ask => result,
        }
    };
    timeout(limit, both).await.unwrap_or(Err(Error::Timeout(connect, limit)))
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn local() -> (TcpListener, SocketAddr) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        (listener, addr)
    }

    #[tokio::test]
    async fn meeting_itself_is_success() {
        let (listener, addr) = local().await;
        meet(listener, addr, Duration::from_secs(10)).await.unwrap();
    }

    #[tokio::test]
    async fn meeting_another_is_failure() {
        let ((listener, _), (other, addr)) = (local().await, local().await);
        tokio::spawn(async move {
            let (mut io, _) = other.accept().await.unwrap();
            io.write_all(&[b'x'; TOKEN + 1]).await.unwrap();
        });
        assert!(matches!(meet(listener, addr, Duration::from_secs(10)).await, Err(Error::Token(_))));
    }

    #[tokio::test]
    async fn silence_refusal_and_a_taken_port_are_failures() {
        let ((listener, taken), (_silent, addr)) = (local().await, local().await);
        assert!(matches!(meet(listener, addr, Duration::ZERO).await, Err(Error::Timeout(..))));
        let (listener, _) = local().await;
        assert!(matches!(meet(listener, taken, Duration::from_secs(10)).await, Err(Error::Connect(..))));
        let options = Options { listen: addr, ..Options::default() };
        assert_eq!(run(options).await, EXIT_UNSUCCESSFUL);
    }
}
