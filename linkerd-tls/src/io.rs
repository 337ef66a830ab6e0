//! Connections after a handshake, in both roles. Vectored writes are passed on, so that a frame's head and body share
//! TLS records of up to 16 KiB instead of being sealed one by one.

use std::{
    io::{self, IoSlice},
    pin::Pin,
    task::{Context, Poll},
};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// The server's end of a TLS connection.
#[derive(Debug)]
pub struct ServerIo<I>(tokio_rustls::server::TlsStream<I>);

/// The client's end of a TLS connection.
#[derive(Debug)]
pub struct ClientIo<I>(tokio_rustls::client::TlsStream<I>);

macro_rules! stream {
    ($io:ident, $inner:path) => {
        impl<I> $io<I> {
            pub(crate) fn new(io: $inner) -> Self {
                Self(io)
            }

            /// The transport below.
            pub fn get_ref(&self) -> &I {
                self.0.get_ref().0
            }
        }

        impl<I: AsyncRead + AsyncWrite + Unpin> AsyncRead for $io<I> {
            fn poll_read(
                mut self: Pin<&mut Self>,
                cx: &mut Context<'_>,
                buf: &mut ReadBuf<'_>,
            ) -> Poll<io::Result<()>> {
                Pin::new(&mut self.0).poll_read(cx, buf)
            }
        }

        impl<I: AsyncRead + AsyncWrite + Unpin> AsyncWrite for $io<I> {
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
                Pin::new(&mut self.0).poll_shutdown(cx)
            }
        }
    };
}

stream!(ServerIo, tokio_rustls::server::TlsStream<I>);
stream!(ClientIo, tokio_rustls::client::TlsStream<I>);
