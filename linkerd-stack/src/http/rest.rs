//! An HTTP/1 connection between requests. Its codec holds a buffer of 8 KiB for each direction and what it remembers of
//! the last head. So, when no request has come for a moment, the codec is taken apart; the stream alone waits for the next
//! byte, and gets another codec then.
//!
//! busy (exchanges are open) → quiet (none is; a timer runs) → busy, or at rest when the timer ends and the codec agrees
//! → busy with the next byte, or the end.

use super::attend::Attention;
use crate::{
    http::body::{Body, BodyError},
    io::{Io, PrefixedIo},
    scratch,
};
use bytes::Bytes;
use http_body::{Frame, SizeHint};
use std::{
    future::{Future, poll_fn},
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed},
    },
    task::{Context, Poll, ready},
    time::Duration,
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::{Instant, Sleep},
};

/// A connection is quiet this long before it rests: longer than the pauses of a client in the middle of its work, since
/// making a codec costs a microsecond or two, and short, since until then the buffers of all that come and go are held.
pub(super) const QUIET: Duration = Duration::from_millis(100);

/// What a connection's exchanges and its stream tell of themselves.
#[derive(Debug, Default)]
pub(super) struct Activity {
    /// Exchanges so far; wraps around.
    begun: AtomicUsize,
    /// Requests whose content is still to come, or to be taken.
    reading: AtomicUsize,
    /// Responses that are not sent.
    answering: AtomicUsize,
    /// The stream has not yet taken everything that was written.
    unwritten: AtomicBool,
    /// The stream stays open when the codec ends.
    kept: AtomicBool,
}

impl Activity {
    /// A request has come. Its halves are open until dropped.
    pub(super) fn begin(self: &Arc<Self>) -> (Request, Response) {
        self.begun.fetch_add(1, Relaxed);
        self.reading.fetch_add(1, Relaxed);
        self.answering.fetch_add(1, Relaxed);
        (Request(self.clone()), Response(self.clone()))
    }

    fn is_quiet(&self) -> bool {
        self.reading.load(Relaxed) == 0 && self.answering.load(Relaxed) == 0
    }

    /// Whether all that can be done is to wait for a response.
    fn is_answering(&self) -> bool {
        self.reading.load(Relaxed) == 0 && self.answering.load(Relaxed) > 0
    }

    /// Runs `end`, which ends the codec, and leaves the stream open.
    pub(super) fn keep<T>(&self, end: impl FnOnce() -> T) -> T {
        self.kept.store(true, Relaxed);
        let result = end();
        self.kept.store(false, Relaxed);
        result
    }
}

/// A request whose content is still to come.
#[derive(Debug)]
pub(in crate::http) struct Request(Arc<Activity>);

/// A response that is still to be sent.
#[derive(Debug)]
pub(super) struct Response(Arc<Activity>);

impl Drop for Request {
    fn drop(&mut self) {
        self.0.reading.fetch_sub(1, Relaxed);
    }
}

impl Drop for Response {
    fn drop(&mut self) {
        self.0.answering.fetch_sub(1, Relaxed);
    }
}

/// The content of a response on its way out.
pub(super) struct Outgoing {
    body: Body,
    _open: Option<Response>,
}

impl Outgoing {
    /// `open` is dropped with the content, when the codec has taken all of it.
    pub(super) fn new(body: Body, open: Option<Response>) -> Self {
        Self { body, _open: open }
    }
}

impl http_body::Body for Outgoing {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// Finds out when a connection may rest.
pub(super) struct Timer {
    sleep: Pin<Box<Sleep>>,
    running: bool,
    /// Exchanges that had begun when the timer was started.
    seen: usize,
}

impl Timer {
    /// For a codec that is new: it will not rest before it has seen a request.
    pub(super) fn new(activity: &Activity) -> Self {
        let sleep = Box::pin(tokio::time::sleep(QUIET));
        Self { sleep, running: false, seen: activity.begun.load(Relaxed) }
    }

    /// Whether the connection has been quiet for [`QUIET`]. `cx` is woken when that may have become so; until it is, the
    /// answer is no (`woken` tells that it was).
    pub(super) fn is_due(&mut self, activity: &Activity, woken: bool, cx: &mut Context<'_>) -> bool {
        let begun = activity.begun.load(Relaxed);
        let quiet = activity.is_quiet();
        if !self.running {
            if !quiet || begun == self.seen {
                return false;
            }
            self.start(begun);
        } else if !woken {
            return false;
        }
        while self.sleep.as_mut().poll(cx).is_ready() {
            self.running = false;
            if !quiet {
                return false;
            }
            if begun == self.seen && !activity.unwritten.load(Relaxed) {
                return true;
            }
            self.start(begun);
        }
        false
    }

    fn start(&mut self, begun: usize) {
        self.seen = begun;
        self.running = true;
        self.sleep.as_mut().reset(Instant::now() + QUIET);
    }
}

/// The stream of a connection, as a codec sees it.
#[derive(Debug)]
pub(super) struct Stream<I> {
    io: PrefixedIo<I>,
    activity: Arc<Activity>,
    attention: Attention,
}

impl<I: Io> Stream<I> {
    pub(super) fn new(io: I, activity: Arc<Activity>) -> Self {
        Self { io: PrefixedIo::new(Bytes::new(), io), activity, attention: Attention::new() }
    }

    /// Waits, without a buffer, until there is something to read. `rest` is what the last codec had read and not used.
    /// Yields none if there is nothing more: the client has closed, or `end` came.
    ///
    /// # Errors
    /// The stream's.
    pub(super) async fn rest(
        self,
        rest: Bytes,
        mut end: Pin<&mut impl Future<Output = ()>>,
    ) -> io::Result<Option<Self>> {
        let Self { io, activity, mut attention } = self;
        let (unread, mut io) = io.into_parts();
        // An empty piece of the codec's buffer would keep the buffer.
        let rest = Some(rest).filter(|rest| !rest.is_empty()).unwrap_or_default();
        let mut prefix = if unread.is_empty() { rest } else { [rest, unread].concat().into() };
        if prefix.is_empty() {
            prefix = poll_fn(|cx| {
                if end.as_mut().poll(cx).is_ready() {
                    return Poll::Ready(Ok(Bytes::new()));
                }
                scratch::with(|buffer| {
                    let mut buffer = ReadBuf::new(buffer);
                    ready!(Pin::new(&mut io).poll_read(cx, &mut buffer))?;
                    Poll::Ready(io::Result::Ok(Bytes::copy_from_slice(buffer.filled())))
                })
            })
            .await?;
        }
        if prefix.is_empty() {
            poll_fn(|cx| Pin::new(&mut io).poll_shutdown(cx)).await?;
            return Ok(None);
        }
        attention.heard();
        Ok(Some(Self { io: PrefixedIo::new(prefix, io), activity, attention }))
    }

    fn wrote<T>(&self, result: Poll<T>) -> Poll<T> {
        if result.is_pending() {
            self.activity.unwritten.store(true, Relaxed);
        }
        result
    }
}

impl<I: Io> AsyncRead for Stream<I> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let result = Pin::new(&mut self.io).poll_read(cx, buf);
        if buf.filled().len() > before {
            self.attention.heard();
        }
        result
    }
}

impl<I: Io> AsyncWrite for Stream<I> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.io).poll_write(cx, buf);
        self.wrote(result)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.io).poll_write_vectored(cx, bufs);
        self.wrote(result)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    /// The codec flushes when it has written all it has, and whenever it has been woken and has nothing left to do: the
    /// time to look after the client.
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if this.activity.is_answering() {
            this.attention.look(&mut this.io, cx)?;
        }
        let result = Pin::new(&mut self.io).poll_flush(cx);
        if result.is_ready() && self.activity.unwritten.load(Relaxed) {
            self.activity.unwritten.store(false, Relaxed);
        }
        self.wrote(result)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.activity.kept.load(Relaxed) {
            return Poll::Ready(Ok(()));
        }
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}
