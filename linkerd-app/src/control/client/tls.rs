//! How connections to the control plane are secured. The client asks this trait, so that it can be tested without
//! certificates.

use futures_util::future::BoxFuture;
use linkerd_stack::BoxedIo;
use linkerd_tls::Id;
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
