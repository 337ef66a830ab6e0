//! An HTTP/1 client that goes away while its response is pending: the codec does not read meanwhile, so this does, a
//! byte at a time, and ends the connection and with it the request.
//!
//! A client that closes its side together with its request may be one that still reads the answer (RFC 9112 section 9.6
//! lets it), and is waited for; one that closes it later has given up. A reset leaves no doubt.

use std::{
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    task::{Context, Poll},
    time::Duration,
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::Instant,
};

/// The end of a client's stream belongs to its request if it comes within this time of the request's last byte. Programs
/// that close their side at once take microseconds between the two calls, or a tenth of a second where a container's share
/// of the processor ran out in between; people and timeouts take longer than this.
const TOGETHER: Duration = Duration::from_millis(200);

/// Whether a response is pending on a connection. Clones are the same.
#[derive(Clone, Debug, Default)]
pub(super) struct Pending(Arc<AtomicBool>);

impl Pending {
    pub(super) fn set(&self, pending: bool) {
        self.0.store(pending, Relaxed);
    }

    fn get(&self) -> bool {
        self.0.load(Relaxed)
    }
}

/// A client's connection whose end is noticed while a response is pending.
pub(super) struct Attended<I> {
    inner: I,
    pending: Pending,
    /// Read ahead of the codec.
    byte: Option<u8>,
    /// Something was read since `read_at` was taken.
    fresh: bool,
    read_at: Instant,
    /// The client closed its side together with its request.
    half_closed: bool,
}

impl<I: AsyncRead + Unpin> Attended<I> {
    pub(super) fn new(inner: I, pending: Pending) -> Self {
        Self { inner, pending, byte: None, fresh: false, read_at: Instant::now(), half_closed: false }
    }

    /// Looks whether the client is still there.
    fn attend(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        if self.half_closed || self.byte.is_some() {
            return Ok(());
        }
        if std::mem::take(&mut self.fresh) {
            self.read_at = Instant::now();
        }
        let mut byte = [0];
        let mut buf = ReadBuf::new(&mut byte);
        match Pin::new(&mut self.inner).poll_read(cx, &mut buf) {
            Poll::Pending => {}
            Poll::Ready(Err(error)) => return Err(error),
            Poll::Ready(Ok(())) => match *buf.filled() {
                [byte] => self.byte = Some(byte),
                _ if self.read_at.elapsed() <= TOGETHER => self.half_closed = true,
                _ => {
                    let why = "the client closed its connection while its response was pending";
                    return Err(io::Error::new(io::ErrorKind::ConnectionAborted, why));
                }
            },
        }
        Ok(())
    }
}

impl<I: AsyncRead + Unpin> AsyncRead for Attended<I> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        if buf.remaining() > 0
            && let Some(byte) = self.byte.take()
        {
            buf.put_slice(&[byte]);
        }
        // Along with the byte comes whatever follows it: a body must not be passed on in pieces of one byte.
        let mut result = Poll::Ready(Ok(()));
        if buf.remaining() > 0 || buf.filled().len() == before {
            result = Pin::new(&mut self.inner).poll_read(cx, buf);
        }
        if buf.filled().len() == before {
            return result;
        }
        self.fresh = true;
        // What has been read goes first; the end of the stream, or its failure, will be told again.
        Poll::Ready(Ok(()))
    }
}

impl<I: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Attended<I> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    /// The codec flushes whenever it has been woken and has nothing left to do: the time to look.
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.pending.get() {
            self.attend(cx)?;
        }
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}
