//! An HTTP/1 client that goes away while its response is pending: the codec does not read meanwhile, so this looks a byte
//! ahead, and ends the connection and with it the request.
//!
//! A client that closes its side together with its request may be one that still reads the answer (RFC 9112 section 9.6
//! lets it), and is waited for; one that closes it later has given up. A reset leaves no doubt.

use crate::io::PrefixedIo;
use bytes::Bytes;
use std::{
    io,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};
use tokio::{
    io::{AsyncRead, ReadBuf},
    time::Instant,
};

/// The end of a client's stream belongs to its request if it comes within this time of the request's last byte. Programs
/// that close their side at once take microseconds between the two calls. Those that give up may do so after some tens of
/// milliseconds, and the original takes every end for that: where this is wrong, it should not be about them.
const TOGETHER: Duration = Duration::from_millis(20);

/// What is known of a client's presence.
#[derive(Debug)]
pub(super) struct Attention {
    /// Something was read since `read_at` was taken.
    fresh: bool,
    read_at: Instant,
    /// The client closed its side together with its request.
    half_closed: bool,
}

impl Attention {
    pub(super) fn new() -> Self {
        Self { fresh: false, read_at: Instant::now(), half_closed: false }
    }

    /// The client has sent something.
    pub(super) fn heard(&mut self) {
        self.fresh = true;
    }

    /// Looks whether a client whose request has come is still there. A byte that is read so stays to be read.
    ///
    /// # Errors
    /// The stream's, or that the client has given up.
    pub(super) fn look<I: AsyncRead + Unpin>(
        &mut self,
        io: &mut PrefixedIo<I>,
        cx: &mut Context<'_>,
    ) -> io::Result<()> {
        if self.half_closed || !io.prefix().is_empty() {
            return Ok(());
        }
        if std::mem::take(&mut self.fresh) {
            self.read_at = Instant::now();
        }
        let mut byte = [0];
        let mut buf = ReadBuf::new(&mut byte);
        match Pin::new(&mut *io).poll_read(cx, &mut buf) {
            Poll::Pending => {}
            Poll::Ready(Err(error)) => return Err(error),
            Poll::Ready(Ok(())) if !buf.filled().is_empty() => io.unread(Bytes::copy_from_slice(buf.filled())),
            Poll::Ready(Ok(())) if self.read_at.elapsed() <= TOGETHER => self.half_closed = true,
            Poll::Ready(Ok(())) => {
                let why = "the client closed its connection while its response was pending";
                return Err(io::Error::new(io::ErrorKind::ConnectionAborted, why));
            }
        }
        Ok(())
    }
}
