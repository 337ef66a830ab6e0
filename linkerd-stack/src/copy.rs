//! Forwarding bytes both ways between two streams, each direction on its own, end of stream included.
//!
//! An idle connection holds no buffer: bytes pass through one buffer per thread, and only what the other side does not
//! take at once is kept, which also stops the reading. Between two plain TCP streams on Linux the bytes stay in the
//! kernel.

#[cfg(target_os = "linux")]
use crate::splice::Pipe;
use crate::{
    io::Io,
    scratch::{self, SCRATCH},
};
use std::{
    any::Any,
    future::poll_fn,
    io,
    pin::Pin,
    task::{Context, Poll, ready},
};
use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt, Interest, ReadBuf},
    net::{
        TcpStream,
        tcp::{ReadHalf, WriteHalf},
    },
};

/// Rounds of reading and writing that one direction may do before it lets other tasks run. Streams of Tokio yield by
/// themselves; this bounds those that don't.
const MAX_ROUNDS: usize = 32;

/// From which side to which.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From the first stream to the second.
    Forth,
    /// From the second stream to the first.
    Back,
}

/// Forwards bytes both ways until both sides have finished, and returns how many went forth and back.
///
/// When one side has finished, the other is told (shut down for writing) as soon as it has got everything; the
/// opposite direction goes on. Dropping the future drops both streams, and with them bytes that are on their way.
///
/// # Errors
/// The first error of either side ends both directions.
pub async fn duplex<A: Io, B: Io>(mut a: A, mut b: B) -> io::Result<(u64, u64)> {
    let tcp_a = (&mut a as &mut dyn Any).downcast_mut::<TcpStream>();
    let tcp_b = (&mut b as &mut dyn Any).downcast_mut::<TcpStream>();
    if let (Some(a), Some(b)) = (tcp_a, tcp_b) {
        return tcp(a, b, &[], &|_, _| {}).await;
    }
    let (mut forth, mut back) = (Half::default(), Half::default());
    poll_fn(|cx| {
        let there = forth.poll_copy(cx, &mut a, &mut b)?;
        let again = back.poll_copy(cx, &mut b, &mut a)?;
        if there.is_ready() && again.is_ready() { Poll::Ready(Ok((forth.moved, back.moved))) } else { Poll::Pending }
    })
    .await
}

/// As [`duplex`], for plain TCP streams. First `prefix` is sent forth, then the bytes are moved inside the kernel where
/// it can. `moved` is told how many bytes were written in which direction, each time.
///
/// Dropping the future leaves both streams open, but loses bytes that are on their way.
///
/// # Errors
/// As [`duplex`].
pub async fn tcp(
    a: &mut TcpStream,
    b: &mut TcpStream,
    prefix: &[u8],
    moved: &(dyn Fn(Direction, u64) + Sync),
) -> io::Result<(u64, u64)> {
    let (read_a, mut write_a) = a.split();
    let (read_b, mut write_b) = b.split();
    let forth = async {
        let mut sent = 0;
        if !prefix.is_empty() {
            write_b.write_all(prefix).await?;
            sent = prefix.len() as u64;
            moved(Direction::Forth, sent);
        }
        Ok(sent + relay(&read_a, &mut write_b, &|n| moved(Direction::Forth, n)).await?)
    };
    let moved_back = |n| moved(Direction::Back, n);
    let back = relay(&read_b, &mut write_a, &moved_back);
    tokio::try_join!(forth, back)
}

/// One direction between two TCP streams.
async fn relay(from: &ReadHalf<'_>, to: &mut WriteHalf<'_>, moved: &(dyn Fn(u64) + Sync)) -> io::Result<u64> {
    let mut sum = 0;
    #[cfg(target_os = "linux")]
    if spliced(from, to, &mut sum, moved).await? == End::Done {
        to.shutdown().await?;
        return Ok(sum);
    }
    buffered(from, to, &mut sum, moved).await?;
    to.shutdown().await?;
    Ok(sum)
}

/// How the in-kernel way ended.
#[cfg(target_os = "linux")]
#[derive(PartialEq)]
enum End {
    /// The sender has finished, and everything is delivered.
    Done,
    /// It does not work for these streams, or there is no pipe to be had. No byte is lost.
    Refused,
}

#[cfg(target_os = "linux")]
async fn spliced(
    from: &ReadHalf<'_>,
    to: &WriteHalf<'_>,
    sum: &mut u64,
    moved: &(dyn Fn(u64) + Sync),
) -> io::Result<End> {
    use std::os::fd::AsFd;
    let (from, to): (&TcpStream, &TcpStream) = (from.as_ref(), to.as_ref());
    loop {
        from.readable().await?;
        // Out of descriptors, or forbidden: the other way works without.
        let Ok(mut pipe) = Pipe::take() else { return Ok(End::Refused) };
        match from.try_io(Interest::READABLE, || pipe.fill(from.as_fd())) {
            Ok(0) => {
                pipe.give_back();
                return Ok(End::Done);
            }
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                pipe.give_back();
                continue;
            }
            Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::ENOSYS | libc::EPERM)) => {
                return Ok(End::Refused);
            }
            Err(error) => return Err(error),
        }
        while pipe.held() > 0 {
            match to.try_io(Interest::WRITABLE, || pipe.drain(to.as_fd())) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => {
                    *sum += n as u64;
                    moved(n as u64);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => to.writable().await?,
                Err(error) => return Err(error),
            }
        }
        pipe.give_back();
        // Readiness that was cached does not yield by itself.
        tokio::task::consume_budget().await;
    }
}

async fn buffered(
    from: &ReadHalf<'_>,
    to: &WriteHalf<'_>,
    sum: &mut u64,
    moved: &(dyn Fn(u64) + Sync),
) -> io::Result<()> {
    loop {
        from.readable().await?;
        // Read and written without a pause, so that the thread's buffer is free again before anything waits.
        let step = scratch::with(|buf| {
            let n = match from.try_read(buf) {
                Ok(n) => n,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(error) => return Err(error),
            };
            let written = match to.try_write(&buf[..n]) {
                Ok(written) => written,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => 0,
                Err(error) => return Err(error),
            };
            Ok(Some((n, written, buf[written..n].to_vec())))
        })?;
        let Some((n, mut written, rest)) = step else { continue };
        if n == 0 {
            return Ok(());
        }
        let mut rest = &rest[..];
        loop {
            if written > 0 {
                *sum += written as u64;
                moved(written as u64);
            }
            if rest.is_empty() {
                break;
            }
            to.writable().await?;
            written = match to.try_write(rest) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => written,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => 0,
                Err(error) => return Err(error),
            };
            rest = &rest[written..];
        }
        tokio::task::consume_budget().await;
    }
}

/// One direction between streams of any kind.
#[derive(Default)]
struct Half {
    /// Read but not taken by the other side: at most one scratch buffer's worth, and freed once it is gone.
    rest: Vec<u8>,
    /// How much of `rest` is written.
    written: usize,
    moved: u64,
    unflushed: bool,
    finished: bool,
    done: bool,
}

impl Half {
    fn poll_copy<R, W>(&mut self, cx: &mut Context<'_>, from: &mut R, to: &mut W) -> Poll<io::Result<()>>
    where
        R: AsyncRead + Unpin,
        W: AsyncWrite + Unpin,
    {
        if self.done {
            return Poll::Ready(Ok(()));
        }
        for _ in 0..MAX_ROUNDS {
            ready!(self.poll_rest(cx, to))?;
            if self.finished {
                // A shutdown flushes what the stream still has.
                ready!(Pin::new(to).poll_shutdown(cx))?;
                self.done = true;
                return Poll::Ready(Ok(()));
            }
            let read = scratch::with(|buf| self.poll_through(cx, from, to, buf));
            if read?.is_pending() {
                if self.unflushed && Pin::new(to).poll_flush(cx)?.is_ready() {
                    self.unflushed = false;
                }
                return Poll::Pending;
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    /// Writes what was kept.
    fn poll_rest<W: AsyncWrite + Unpin>(&mut self, cx: &mut Context<'_>, to: &mut W) -> Poll<io::Result<()>> {
        while self.written < self.rest.len() {
            let n = ready!(Pin::new(&mut *to).poll_write(cx, &self.rest[self.written..]))?;
            if n == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.written += n;
            self.moved += n as u64;
        }
        self.rest = Vec::new();
        self.written = 0;
        Poll::Ready(Ok(()))
    }

    /// Reads once and writes as much of it as is taken at once; the remainder is kept. Pending means that nothing was
    /// read.
    fn poll_through<R, W>(
        &mut self,
        cx: &mut Context<'_>,
        from: &mut R,
        to: &mut W,
        buf: &mut [u8; SCRATCH],
    ) -> io::Result<Poll<()>>
    where
        R: AsyncRead + Unpin,
        W: AsyncWrite + Unpin,
    {
        let mut buf = ReadBuf::new(buf);
        if Pin::new(from).poll_read(cx, &mut buf)?.is_pending() {
            return Ok(Poll::Pending);
        }
        let mut bytes = buf.filled();
        self.finished = bytes.is_empty();
        self.unflushed |= !self.finished;
        while !bytes.is_empty() {
            let Poll::Ready(n) = Pin::new(&mut *to).poll_write(cx, bytes)? else { break };
            if n == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
            self.moved += n as u64;
            bytes = &bytes[n..];
        }
        self.rest = bytes.to_vec();
        Ok(Poll::Ready(()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use parking_lot::Mutex;
    use std::{future::Future, time::Duration};
    use tokio::{
        io::AsyncReadExt,
        net::{TcpListener, TcpSocket},
    };

    /// More than fits into any buffer on the way.
    const LARGE: usize = 3_000_000;

    async fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let socket = TcpSocket::new_v4().unwrap();
        let (far, near) = tokio::join!(socket.connect(listener.local_addr().unwrap()), listener.accept());
        (far.unwrap(), near.unwrap().0)
    }

    fn pattern(len: usize) -> Vec<u8> {
        (0..len).map(|i| (i % 251) as u8).collect()
    }

    /// The client sends much and finishes; only then does the server answer, and finishes.
    async fn check<C, S>(client: C, server: S, copy: impl Future<Output = io::Result<(u64, u64)>>)
    where
        C: AsyncRead + AsyncWrite + Unpin,
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let (mut client, mut server) = (client, server);
        let sent = pattern(LARGE);
        let client = async {
            client.write_all(&sent).await.unwrap();
            client.shutdown().await.unwrap();
            let mut answer = String::new();
            client.read_to_string(&mut answer).await.unwrap();
            assert_eq!(answer, "got it all");
        };
        let server = async {
            let mut got = Vec::new();
            server.read_to_end(&mut got).await.unwrap();
            assert!(got == sent);
            server.write_all(b"got it all").await.unwrap();
            server.shutdown().await.unwrap();
        };
        let ((), (), moved) = tokio::join!(client, server, copy);
        assert_eq!(moved.unwrap(), (LARGE as u64, 10));
    }

    #[tokio::test]
    async fn streams_of_any_kind() {
        let (client, a) = tokio::io::duplex(1000);
        let (server, b) = tokio::io::duplex(100_000);
        check(client, server, duplex(a, b)).await;
    }

    #[tokio::test]
    async fn mixed_streams() {
        let (client, a) = pair().await;
        let (server, b) = tokio::io::duplex(5000);
        check(client, server, duplex(a, b)).await;
    }

    #[tokio::test]
    async fn tcp_streams() {
        let (client, a) = pair().await;
        let (server, b) = pair().await;
        check(client, server, duplex(a, b)).await;
    }

    #[tokio::test]
    async fn tcp_streams_without_the_kernels_help() {
        let ((client, mut a), (server, mut b)) = (pair().await, pair().await);
        let copy = async {
            let (read_a, mut write_a) = a.split();
            let (read_b, mut write_b) = b.split();
            let (mut forth, mut back) = (0, 0);
            buffered(&read_a, &write_b, &mut forth, &|_| {}).await?;
            write_b.shutdown().await?;
            buffered(&read_b, &write_a, &mut back, &|_| {}).await?;
            write_a.shutdown().await?;
            Ok((forth, back))
        };
        check(client, server, copy).await;
    }

    #[tokio::test]
    async fn a_prefix_goes_first_and_bytes_are_counted() {
        let ((mut client, mut a), (mut server, mut b)) = (pair().await, pair().await);
        let seen = Mutex::new((0, 0));
        let count = |direction, n| match direction {
            Direction::Forth => seen.lock().0 += n,
            Direction::Back => seen.lock().1 += n,
        };
        let copy = tcp(&mut a, &mut b, b"first ", &count);
        let ends = async {
            client.write_all(b"second").await.unwrap();
            client.shutdown().await.unwrap();
            let mut got = String::new();
            server.read_to_string(&mut got).await.unwrap();
            assert_eq!(got, "first second");
            server.write_all(b"ok").await.unwrap();
            drop(server);
        };
        let (moved, ()) = tokio::join!(copy, ends);
        assert_eq!(moved.unwrap(), (12, 2));
        assert_eq!(*seen.lock(), (12, 2));
    }

    #[tokio::test]
    async fn a_reset_ends_both_directions() {
        let ((client, a), (_server, b)) = (pair().await, pair().await);
        #[allow(deprecated)]
        client.set_linger(Some(Duration::ZERO)).unwrap();
        drop(client);
        assert_eq!(duplex(a, b).await.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
    }

    #[tokio::test]
    async fn small_messages_pass_at_once_both_ways() {
        let (mut client, a) = tokio::io::duplex(64);
        let (mut server, b) = tokio::io::duplex(64);
        let task = tokio::spawn(duplex(a, b));
        for _ in 0..3 {
            let mut buf = [0; 4];
            client.write_all(b"ping").await.unwrap();
            server.read_exact(&mut buf).await.unwrap();
            assert_eq!(&buf, b"ping");
            server.write_all(b"pong").await.unwrap();
            client.read_exact(&mut buf).await.unwrap();
            assert_eq!(&buf, b"pong");
        }
        drop((client, server));
        assert_eq!(task.await.unwrap().unwrap(), (12, 12));
    }
}
