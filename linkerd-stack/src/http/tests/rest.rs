//! HTTP/1 connections that wait for their next request. The streams tell by the room that is read into who waits: a codec
//! with a buffer of its own, or the connection at rest.

use super::*;
use crate::{
    http::rest::{QUIET, Stream},
    scratch::SCRATCH,
};
use bytes::{Buf, Bytes};
use futures_util::FutureExt;
use std::{
    io,
    pin::Pin,
    sync::atomic::{AtomicUsize, Ordering},
    task::{Context, Poll},
};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// A pipe that notes how much room the last read offered.
struct Watched(DuplexStream, Arc<AtomicUsize>);

impl AsyncRead for Watched {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.1.store(buf.remaining(), Ordering::Relaxed);
        Pin::new(&mut self.0).poll_read(cx, buf)
    }
}

impl AsyncWrite for Watched {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}

/// A connection that is served, and what is known of it from outside.
struct Connection {
    io: DuplexStream,
    room: Arc<AtomicUsize>,
    drain: drain::Signal,
    task: tokio::task::JoinHandle<Result<(), ServeError>>,
}

impl Connection {
    /// `pipe` bytes fit between the client and the connection.
    fn open(service: Service, pipe: usize) -> Self {
        let (io, far) = tokio::io::duplex(pipe);
        let (drain, watch) = drain::channel();
        let room = Arc::<AtomicUsize>::default();
        let far = Watched(far, room.clone());
        let task = tokio::spawn(async move { serve(&ServerConfig::default(), Version::H1, far, service, watch).await });
        Self { io, room, drain, task }
    }

    async fn write(&mut self, text: &str) {
        self.io.write_all(text.as_bytes()).await.unwrap();
    }

    async fn get(&mut self) {
        self.write("GET /a HTTP/1.1\r\nHost: web\r\n\r\n").await;
        self.answered("").await;
    }

    async fn answered(&mut self, body: &str) {
        let rsp = read_until(&mut self.io, &format!("{body:?}")).await;
        assert!(rsp.starts_with("HTTP/1.1 200 OK\r\n"), "{rsp}");
    }

    #[track_caller]
    fn rests(&self, expected: bool) {
        assert_eq!(self.room.load(Ordering::Relaxed) == SCRATCH, expected);
    }
}

/// Long enough for a quiet connection to have come to rest.
async fn quiet() {
    tokio::time::sleep(QUIET * 3).await;
    settle().await;
}

#[tokio::test(start_paused = true)]
async fn a_quiet_connection_rests_and_wakes_with_the_next_request() {
    let mut conn = Connection::open(echo(), PIPE);
    quiet().await;
    conn.rests(false);
    for _ in 0..3 {
        conn.get().await;
        conn.rests(false);
        quiet().await;
        conn.rests(true);
    }
    conn.write("POST / HTTP/1.1\r\nHost: web\r\nContent-Length: 3\r\n\r\nabc").await;
    conn.answered("abc").await;
    quiet().await;
    conn.rests(true);
}

#[tokio::test(start_paused = true)]
async fn a_connection_in_use_keeps_its_codec() {
    let mut conn = Connection::open(echo(), PIPE);
    conn.get().await;
    for _ in 0..20 {
        tokio::time::sleep(QUIET / 2).await;
        conn.rests(false);
        conn.get().await;
    }
}

#[tokio::test(start_paused = true)]
async fn half_a_head_is_not_lost() {
    let mut conn = Connection::open(echo(), PIPE);
    conn.write("GET /a HTTP/1.1\r\nHost: web\r\n\r\nGET /b HT").await;
    conn.answered("").await;
    quiet().await;
    conn.write("TP/1.1\r\nHost: web\r\n\r\n").await;
    conn.answered("").await;
    quiet().await;
    conn.rests(true);
}

#[tokio::test(start_paused = true)]
async fn exchanges_under_way_are_waited_for() {
    // The answer comes before the request has ended.
    let early = service(|req| async move {
        tokio::spawn(req.into_body().collect());
        Ok(Response::new(Body::full("\"\"")))
    });
    let mut conn = Connection::open(early, PIPE);
    conn.write("POST / HTTP/1.1\r\nHost: web\r\nContent-Length: 30\r\n\r\nabc").await;
    conn.answered("").await;
    quiet().await;
    conn.write("GET /smuggled HTTP/1.1\r\n\r\n!").await;
    quiet().await;
    conn.rests(true);
    conn.get().await;

    // The answer takes its time, and then its content.
    let slow = service(|_| async {
        tokio::time::sleep(QUIET * 10).await;
        let late = futures_util::stream::once(async {
            tokio::time::sleep(QUIET * 10).await;
            Ok::<_, BodyError>(http_body::Frame::data("\"\"".into()))
        });
        let body = http_body_util::StreamBody::new(late);
        Ok(Response::builder().header("content-length", "2").body(Body::new(Box::pin(body))).unwrap())
    });
    let mut conn = Connection::open(slow, PIPE);
    for _ in 0..2 {
        conn.get().await;
        quiet().await;
        conn.rests(true);
    }
}

#[tokio::test(start_paused = true)]
async fn an_answer_that_is_not_read_yet_is_kept() {
    let mut conn = Connection::open(service(|_| async { Ok(Response::new(Body::full("\"\""))) }), 40);
    conn.write("GET /a HTTP/1.1\r\nHost: web\r\n\r\n").await;
    quiet().await;
    conn.rests(false);
    conn.answered("").await;
    quiet().await;
    conn.rests(true);
}

#[tokio::test(start_paused = true)]
async fn rest_ends_with_the_client_or_the_drain() {
    let mut conn = Connection::open(echo(), PIPE);
    conn.get().await;
    quiet().await;
    conn.rests(true);
    conn.io.shutdown().await.unwrap();
    assert_eq!(read_all(&mut conn.io).await, "");
    conn.task.await.unwrap().unwrap();

    let mut conn = Connection::open(echo(), PIPE);
    conn.get().await;
    quiet().await;
    conn.rests(true);
    conn.drain.drain().await;
    assert_eq!(read_all(&mut conn.io).await, "");
    conn.task.await.unwrap().unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_connection_that_has_rested_hears_of_the_drain() {
    let slow = service(|_| async {
        tokio::time::sleep(QUIET * 2).await;
        Ok(Response::new(Body::full("\"\"")))
    });
    let mut conn = Connection::open(slow, PIPE);
    conn.get().await;
    quiet().await;
    conn.rests(true);
    conn.write("GET /a HTTP/1.1\r\nHost: web\r\n\r\n").await;
    tokio::time::sleep(QUIET).await;
    let drained = tokio::spawn(conn.drain.drain());
    let rsp = read_all(&mut conn.io).await;
    assert!(rsp.contains("connection: close") && rsp.ends_with("\"\""), "{rsp}");
    conn.task.await.unwrap().unwrap();
    drained.await.unwrap();
}

#[tokio::test]
async fn an_empty_remainder_keeps_no_buffer() {
    struct Buffer {
        _held: Arc<()>,
    }
    impl AsRef<[u8]> for Buffer {
        fn as_ref(&self) -> &[u8] {
            b"used"
        }
    }
    let held = Arc::new(());
    let mut rest = Bytes::from_owner(Buffer { _held: held.clone() });
    rest.advance(4);
    let (_near, far) = tokio::io::duplex(PIPE);
    let forever = std::pin::pin!(std::future::pending());
    let mut resting = Box::pin(Stream::new(far, Arc::default()).rest(rest, forever));
    assert!(resting.as_mut().now_or_never().is_none());
    assert_eq!(Arc::strong_count(&held), 1);
}
