//! How connections to the control plane are secured. The client asks this trait, so that it can be tested without
//! certificates.

use futures_util::future::BoxFuture;
use linkerd_stack::BoxedIo;
use linkerd_tls::{
    Id,
    identity::{ClientTls, Reader},
};
use std::io;
use tokio::net::TcpStream;

/// Mesh TLS towards the control plane.
pub trait Secure: Send + Sync + 'static {
    /// Ends when there is a certificate of our own to show.
    fn ready(&self) -> BoxFuture<'static, ()>;

    /// A handshake as a client: the server must prove `server`, which is also the name asked for. Our own certificate
    /// is shown if there is one. Dropping the future closes the connection.
    ///
    /// # Errors
    /// When the handshake fails, or the server is somebody else.
    fn connect(&self, io: TcpStream, server: &Id) -> BoxFuture<'static, io::Result<BoxedIo>>;
}

impl Secure for Reader {
    fn ready(&self) -> BoxFuture<'static, ()> {
        let identity = self.clone();
        Box::pin(async move { Self::ready(&identity).await })
    }

    fn connect(&self, io: TcpStream, server: &Id) -> BoxFuture<'static, io::Result<BoxedIo>> {
        let (identity, server_id) = (self.clone(), server.clone());
        Box::pin(async move {
            // Names of control-plane services are DNS names (contract.md 1.6).
            let server_name = server_id.to_server_name().ok_or_else(|| {
                io::Error::new(io::ErrorKind::InvalidInput, format!("{server_id} is no DNS name to ask for"))
            })?;
            let server = ClientTls { server_id, server_name, transport_header: false };
            let (_, io) = identity.client(server).connect(io).await.map_err(io::Error::other)?;
            Ok(Box::new(io) as BoxedIo)
        })
    }
}
