//! Connections after a handshake, in both roles. Vectored writes are passed on, so that a frame's head and body share
//! TLS records of up to 16 KiB instead of being sealed one by one.

use crate::{Error, gather::Gather};
use linkerd_stack::Io;
use rustls::{ClientConfig, CommonState, ServerConfig, pki_types::ServerName};
use std::{
    io::{self, IoSlice},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// The server's end of a TLS connection.
#[derive(Debug)]
pub struct ServerIo<I>(tokio_rustls::server::TlsStream<Gather<I>>);

/// The client's end of a TLS connection.
#[derive(Debug)]
pub struct ClientIo<I>(tokio_rustls::client::TlsStream<Gather<I>>);

impl<I: Io> ServerIo<I> {
    /// Shakes hands.
    pub(crate) async fn accept(config: Arc<ServerConfig>, io: I) -> Result<Self, Error> {
        let accept = tokio_rustls::TlsAcceptor::from(config).accept(Gather::new(io));
        let mut io = settled(accept.into_fallible().await).await?;
        io.get_mut().0.server_done();
        Ok(Self(io))
    }
}

impl<I: Io> ClientIo<I> {
    /// Shakes hands.
    pub(crate) async fn connect(config: Arc<ClientConfig>, name: ServerName<'static>, io: I) -> Result<Self, Error> {
        let connect = tokio_rustls::TlsConnector::from(config).connect(name, Gather::new(io));
        let mut io = settled(connect.into_fallible().await).await?;
        io.get_mut().0.client_done();
        Ok(Self(io))
    }
}

/// A handshake that failed may have left an alert for the peer.
async fn settled<S, I: Io>(shaken: Result<S, (io::Error, Gather<I>)>) -> Result<S, Error> {
    match shaken {
        Ok(io) => Ok(io),
        Err((error, mut io)) => {
            io.release().await;
            Err(Error::handshake(error))
        }
    }
}

macro_rules! stream {
    ($io:ident) => {
        impl<I: Io> $io<I> {
            /// What the handshake agreed on.
            pub(crate) fn session(&self) -> &CommonState {
                self.0.get_ref().1
            }

            /// The transport below.
            pub fn get_ref(&self) -> &I {
                self.0.get_ref().0.get_ref()
            }
        }

        impl<I: Io> AsyncRead for $io<I> {
            fn poll_read(
                mut self: Pin<&mut Self>,
                cx: &mut Context<'_>,
                buf: &mut ReadBuf<'_>,
            ) -> Poll<io::Result<()>> {
                Pin::new(&mut self.0).poll_read(cx, buf)
            }
        }

        impl<I: Io> AsyncWrite for $io<I> {
            fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
                Pin::new(&mut self.0).poll_write(cx, buf)
            }

            fn poll_write_vectored(
                mut self: Pin<&mut Self>,
                cx: &mut Context<'_>,
                bufs: &[IoSlice<'_>],
            ) -> Poll<io::Result<usize>> {
                Pin::new(&mut self.0).poll_write_vectored(cx, bufs)
            }

            fn is_write_vectored(&self) -> bool {
                true
            }

            fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
                Pin::new(&mut self.0).poll_flush(cx)
            }

            fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
                self.0.get_mut().0.closing();
                Pin::new(&mut self.0).poll_shutdown(cx)
            }
        }
    };
}

stream!(ServerIo);
stream!(ClientIo);
