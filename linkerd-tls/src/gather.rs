//! Fewer and fuller writes around a handshake: each write is a system call and a segment for both ends.
//!
//! What a handshake writes is held until somebody waits for an answer. So a client's last message of the handshake goes
//! with its first words, a server's tickets go with its first answer, and the end of TLS goes with the end of TCP. In
//! between, writes pass through.

use linkerd_stack::{Io, io::poll_write_last};
use std::{
    io::{self, IoSlice},
    pin::Pin,
    task::{Context, Poll, ready},
};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Most bytes that are held; more are written as they come. One full record, and a handshake's last message.
const MAX_HELD: usize = 20 * 1024;

/// A stream below TLS.
#[derive(Debug)]
pub(crate) struct Gather<I> {
    io: I,
    held: Vec<u8>,
    phase: Phase,
}

/// Phases follow one another from top to bottom; each may be skipped.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
enum Phase {
    /// Whoever shakes hands reads next, whatever it writes: only a read sends.
    Handshake,
    /// A client's first words: a read or a flush sends.
    Words,
    /// A server's tickets, which nobody waits for: the first write or flush sends.
    Tickets,
    /// Nothing is held.
    Open,
    /// The end of TLS: the end of TCP sends.
    Closing,
}

impl<I: Io> Gather<I> {
    /// Before a handshake.
    pub(crate) fn new(io: I) -> Self {
        Self { io, held: Vec::new(), phase: Phase::Handshake }
    }

    pub(crate) fn get_ref(&self) -> &I {
        &self.io
    }

    /// The handshake of a client is over.
    pub(crate) fn client_done(&mut self) {
        self.done(Phase::Words);
    }

    /// The handshake of a server is over.
    pub(crate) fn server_done(&mut self) {
        self.done(Phase::Tickets);
    }

    fn done(&mut self, phase: Phase) {
        self.phase = if self.held.is_empty() { Phase::Open } else { phase };
        if self.phase == Phase::Open {
            self.held = Vec::new();
        }
    }

    /// The stream is about to be shut down.
    pub(crate) fn closing(&mut self) {
        self.phase = Phase::Closing;
    }

    /// Sends what a handshake that failed left: the alert. That it cannot be sent is no news.
    pub(crate) async fn release(&mut self) {
        let _ = std::future::poll_fn(|cx| self.poll_send(cx)).await;
    }

    fn poll_send(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.held.is_empty() {
            let n = match self.phase {
                Phase::Closing => ready!(poll_write_last(&mut self.io, cx, &self.held))?,
                _ => ready!(Pin::new(&mut self.io).poll_write(cx, &self.held))?,
            };
            if n == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.held.drain(..n);
        }
        if matches!(self.phase, Phase::Words | Phase::Tickets) {
            self.done(Phase::Open);
        }
        Poll::Ready(Ok(()))
    }

    /// How many bytes were taken to be held; none if they are to be written.
    fn poll_hold(&mut self, cx: &mut Context<'_>, bufs: &[IoSlice<'_>]) -> Poll<io::Result<Option<usize>>> {
        if self.phase == Phase::Open {
            return Poll::Ready(Ok(None));
        }
        let len = bufs.iter().map(|buf| buf.len()).sum::<usize>();
        if self.held.len() + len > MAX_HELD {
            ready!(self.poll_send(cx))?;
            return Poll::Ready(Ok(None));
        }
        for buf in bufs {
            self.held.extend_from_slice(buf);
        }
        if self.phase == Phase::Tickets {
            // What does not leave now is sent by the flush that ends whatever is being written.
            let _ = self.poll_send(cx)?;
        }
        Poll::Ready(Ok(Some(len)))
    }
}

impl<I: Io> AsyncRead for Gather<I> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if matches!(self.phase, Phase::Handshake | Phase::Words) {
            ready!(self.poll_send(cx))?;
        }
        Pin::new(&mut self.io).poll_read(cx, buf)
    }
}

impl<I: Io> AsyncWrite for Gather<I> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match ready!(self.poll_hold(cx, &[IoSlice::new(buf)]))? {
            Some(n) => Poll::Ready(Ok(n)),
            None => Pin::new(&mut self.io).poll_write(cx, buf),
        }
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match ready!(self.poll_hold(cx, bufs))? {
            Some(n) => Poll::Ready(Ok(n)),
            None => Pin::new(&mut self.io).poll_write_vectored(cx, bufs),
        }
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.phase == Phase::Handshake {
            return Poll::Ready(Ok(()));
        }
        ready!(self.poll_send(cx))?;
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_send(cx))?;
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, Mutex};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    /// Notes each write by itself, and has nothing to read.
    #[derive(Clone, Default)]
    struct Wire(Arc<Mutex<Vec<String>>>);

    impl Wire {
        #[track_caller]
        fn saw(&self, expected: &[&str]) {
            assert_eq!(std::mem::take(&mut *self.0.lock().unwrap()), expected);
        }
    }

    impl AsyncRead for Wire {
        fn poll_read(self: Pin<&mut Self>, _: &mut Context<'_>, _: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
    }

    impl AsyncWrite for Wire {
        fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
            self.0.lock().unwrap().push(String::from_utf8_lossy(buf).into_owned());
            Poll::Ready(Ok(buf.len()))
        }

        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }

        fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            self.0.lock().unwrap().push("end".into());
            Poll::Ready(Ok(()))
        }
    }

    /// Reads, which finds the end.
    async fn listen(io: &mut Gather<Wire>) {
        assert_eq!(io.read(&mut [0]).await.unwrap(), 0);
    }

    /// After the first message of a handshake was answered and the last one written.
    async fn shaken() -> (Wire, Gather<Wire>) {
        let wire = Wire::default();
        let mut io = Gather::new(wire.clone());
        io.write_all(b"hello").await.unwrap();
        io.flush().await.unwrap();
        wire.saw(&[]);
        listen(&mut io).await;
        wire.saw(&["hello"]);
        io.write_all(b"fin").await.unwrap();
        io.flush().await.unwrap();
        wire.saw(&[]);
        (wire, io)
    }

    #[tokio::test]
    async fn a_client_ends_the_handshake_with_its_first_words() {
        let (wire, mut io) = shaken().await;
        io.client_done();
        io.write_all(b"+head").await.unwrap();
        io.write_all(b"+body").await.unwrap();
        wire.saw(&[]);
        io.flush().await.unwrap();
        wire.saw(&["fin+head+body"]);
        io.write_all(b"more").await.unwrap();
        wire.saw(&["more"]);
    }

    #[tokio::test]
    async fn a_client_with_nothing_to_say_ends_the_handshake_before_it_listens() {
        let (wire, mut io) = shaken().await;
        io.client_done();
        listen(&mut io).await;
        wire.saw(&["fin"]);
    }

    #[tokio::test]
    async fn tickets_go_with_the_first_answer_and_hold_nothing_up() {
        let (wire, mut io) = shaken().await;
        io.server_done();
        listen(&mut io).await;
        wire.saw(&[]);
        io.write_all(b"+answer").await.unwrap();
        wire.saw(&["fin+answer"]);
        io.write_all(b"more").await.unwrap();
        wire.saw(&["more"]);
    }

    #[tokio::test]
    async fn more_than_is_held_passes_in_order() {
        let (wire, mut io) = shaken().await;
        io.client_done();
        let large = "x".repeat(MAX_HELD);
        io.write_all(large.as_bytes()).await.unwrap();
        wire.saw(&["fin", &large]);
    }

    #[tokio::test]
    async fn alerts_leave_and_ends_come_last() {
        let (wire, mut io) = shaken().await;
        io.release().await;
        wire.saw(&["fin"]);
        io.client_done();
        io.closing();
        io.write_all(b"bye").await.unwrap();
        wire.saw(&[]);
        io.shutdown().await.unwrap();
        wire.saw(&["bye", "end"]);
    }
}
