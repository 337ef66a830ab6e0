//! A connection whose bytes, opening and closing are counted (metrics.md 5.6).

use crate::telemetry::ConnMetrics;
use std::{
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// What counts a connection. Called from the data path, so it must neither block nor allocate.
pub trait Meter: Send + Sync + 'static {
    /// The connection is there.
    fn open(&self);
    /// It ended: with the errno of the first I/O error, or cleanly. Called once.
    fn close(&self, errno: Option<i32>);
    /// Bytes came from the peer.
    fn read(&self, bytes: u64);
    /// Bytes went to the peer.
    fn written(&self, bytes: u64);
}

impl Meter for ConnMetrics {
    fn open(&self) {
        Self::open(self);
    }

    fn close(&self, errno: Option<i32>) {
        Self::close(self, errno);
    }

    fn read(&self, bytes: u64) {
        Self::read(self, bytes);
    }

    fn written(&self, bytes: u64) {
        Self::written(self, bytes);
    }
}

/// A counted connection. It closes once: at the first I/O error other than "would block", or when it is dropped.
#[derive(Debug)]
pub struct Metered<I, M: Meter> {
    io: I,
    guard: Guard<M>,
}

#[derive(Debug)]
struct Guard<M: Meter> {
    meter: Arc<M>,
    closed: bool,
}

impl<I, M: Meter> Metered<I, M> {
    /// Counts the connection as open.
    pub fn new(io: I, meter: Arc<M>) -> Self {
        meter.open();
        Self { io, guard: Guard { meter, closed: false } }
    }

    /// The connection inside.
    pub fn get_ref(&self) -> &I {
        &self.io
    }

    /// What counts it. For those who move the bytes themselves, with `()` as the connection.
    pub fn meter(&self) -> &Arc<M> {
        &self.guard.meter
    }

    /// Ends it with an error that was seen elsewhere.
    pub fn failed(&mut self, error: &io::Error) {
        self.guard.close(error.raw_os_error());
    }
}

impl<M: Meter> Metered<(), M> {
    /// Goes on counting around a connection that is known by now.
    pub fn around<I>(self, io: I) -> Metered<I, M> {
        Metered { io, guard: self.guard }
    }
}

impl<M: Meter> Guard<M> {
    fn check<T>(&mut self, result: io::Result<T>) -> io::Result<T> {
        if let Err(error) = &result
            && error.kind() != io::ErrorKind::WouldBlock
        {
            self.close(error.raw_os_error());
        }
        result
    }

    fn close(&mut self, errno: Option<i32>) {
        if !self.closed {
            self.closed = true;
            self.meter.close(errno);
        }
    }
}

impl<M: Meter> Drop for Guard<M> {
    fn drop(&mut self) {
        self.close(None);
    }
}

impl<I: AsyncRead + Unpin, M: Meter> AsyncRead for Metered<I, M> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let result = ready!(Pin::new(&mut self.io).poll_read(cx, buf));
        let read = buf.filled().len() - before;
        if read > 0 {
            self.guard.meter.read(read as u64);
        }
        Poll::Ready(self.guard.check(result))
    }
}

impl<I: AsyncWrite + Unpin, M: Meter> AsyncWrite for Metered<I, M> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let result = ready!(Pin::new(&mut self.io).poll_write(cx, buf));
        self.wrote(result)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let result = ready!(Pin::new(&mut self.io).poll_write_vectored(cx, bufs));
        self.wrote(result)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let result = ready!(Pin::new(&mut self.io).poll_flush(cx));
        Poll::Ready(self.guard.check(result))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let result = ready!(Pin::new(&mut self.io).poll_shutdown(cx));
        Poll::Ready(self.guard.check(result))
    }
}

impl<I, M: Meter> Metered<I, M> {
    fn wrote(&mut self, result: io::Result<usize>) -> Poll<io::Result<usize>> {
        if let Ok(written) = result
            && written > 0
        {
            self.guard.meter.written(written as u64);
        }
        Poll::Ready(self.guard.check(result))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use parking_lot::Mutex;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    #[derive(Default)]
    struct Log(Mutex<Vec<String>>);

    impl Meter for Log {
        fn open(&self) {
            self.0.lock().push("open".into());
        }
        fn close(&self, errno: Option<i32>) {
            self.0.lock().push(format!("close {errno:?}"));
        }
        fn read(&self, bytes: u64) {
            self.0.lock().push(format!("read {bytes}"));
        }
        fn written(&self, bytes: u64) {
            self.0.lock().push(format!("written {bytes}"));
        }
    }

    #[tokio::test]
    async fn bytes_are_counted_and_drop_closes() {
        let log = Arc::new(Log::default());
        let (mut peer, io) = tokio::io::duplex(64);
        let mut io = Metered::new(io, log.clone());
        peer.write_all(b"hello").await.unwrap();
        io.read_exact(&mut [0; 5]).await.unwrap();
        io.write_all(b"hi").await.unwrap();
        drop(io);
        assert_eq!(*log.0.lock(), ["open", "read 5", "written 2", "close None"]);
    }

    /// An I/O object that always fails.
    struct Broken;

    impl AsyncRead for Broken {
        fn poll_read(self: Pin<&mut Self>, _: &mut Context<'_>, _: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Err(io::Error::from_raw_os_error(libc::ECONNRESET)))
        }
    }

    #[tokio::test]
    async fn the_first_error_closes_once() {
        let log = Arc::new(Log::default());
        let mut io = Metered::new(Broken, log.clone());
        for _ in 0..2 {
            io.read_u8().await.unwrap_err();
        }
        drop(io);
        assert_eq!(*log.0.lock(), ["open".to_string(), format!("close {:?}", Some(libc::ECONNRESET))]);
    }
}
