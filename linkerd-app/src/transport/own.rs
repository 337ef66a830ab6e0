//! Connections to the proxy's own servers (admin, tap): a bounded number of them, TLS looked for and terminated if it is
//! for this proxy.

use super::{Accepted, BoundListener};
use crate::policy::authz::{ClientTls, NoTls};
use linkerd_stack::{BoxedIo, PrefixedIo, detect::DetectError, drain};
use linkerd_tls::{
    detect::{Sni, client_hello},
    identity::{Alpn, Reader},
};
use std::{sync::Arc, time::Duration};
use tokio::{net::TcpStream, sync::Semaphore, time::timeout};

/// Wait for the first bytes (behaviour.md C.13, F.1).
pub const DETECT: Duration = Duration::from_secs(1);

/// Why a connection was closed before a request.
#[derive(Debug, thiserror::Error)]
pub enum Closed {
    /// No first bytes in time.
    #[error("nothing came within {DETECT:?}")]
    Silent,
    /// TLS for somebody else.
    #[error("TLS for {0:?}, which is not this proxy's name, or before there is a certificate")]
    ForeignTls(String),
    /// Bytes that are not for this server.
    #[error("neither HTTP/1 nor HTTP/2")]
    NotHttp,
    /// The handshake failed.
    #[error(transparent)]
    Tls(#[from] linkerd_tls::Error),
    /// Reading failed.
    #[error(transparent)]
    Io(#[from] std::io::Error),
    /// Reading failed.
    #[error(transparent)]
    Detect(#[from] DetectError),
    /// Requests could not be served.
    #[error(transparent)]
    Http(#[from] linkerd_stack::http::ServeError),
}

/// Accepts until dropped, at most `most` connections at a time, each served in a task of its own. The drain that they get
/// is never signaled: they end with the process.
pub async fn serve<F>(
    listener: BoundListener,
    server: &'static str,
    most: usize,
    connection: impl Fn(Accepted, drain::Watch) -> F,
) where
    F: Future<Output = Result<(), Closed>> + Send + 'static,
{
    let connections = Arc::new(Semaphore::new(most));
    let (_signal, drain) = drain::channel();
    loop {
        let accepted = listener.accept().await;
        let client = accepted.client;
        let Ok(permit) = connections.clone().try_acquire_owned() else {
            tracing::warn!(%client, server, limit = most, "too many connections; closed this one");
            continue;
        };
        let connection = connection(accepted, drain.clone());
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%client, server, %error, "connection closed");
            }
            drop(permit);
        });
    }
}

/// Terminates TLS for this proxy. Without an identity no TLS is understood.
///
/// # Errors
/// For clients that are silent or want someone else, and when the handshake fails.
pub async fn secure(mut io: TcpStream, identity: Option<&Reader>) -> Result<(ClientTls, BoxedIo), Closed> {
    let hello = timeout(DETECT, client_hello(&mut io)).await.map_err(|_| Closed::Silent)?;
    let (sni, read) = hello?;
    let io = PrefixedIo::new(read, io);
    match (sni, identity) {
        (Sni::NotTls | Sni::Incomplete, _) => Ok((ClientTls::None(NoTls::NoTlsFromRemote), Box::new(io))),
        (Sni::Name(name), Some(identity))
            if identity.is_ready() && name.eq_ignore_ascii_case(identity.server_name().as_str()) =>
        {
            let (accepted, io) = identity.accept(io, Alpn::None).await?;
            Ok((ClientTls::Terminated(accepted.client_id), Box::new(io)))
        }
        (Sni::Name(name), _) => Err(Closed::ForeignTls(name)),
        (Sni::NoName, _) => Err(Closed::ForeignTls(String::new())),
    }
}
