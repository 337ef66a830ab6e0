//! Requests that the server provably did not process: sent once more, without a retry policy, and counted.

use crate::{
    net::Pod,
    scripted::{Ask, Kind, ONE, Stage, address, service},
    world::World,
};
use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    task::AbortHandle,
};

/// What a server does with one request.
#[derive(Copy, Clone, Debug)]
enum Do {
    Answer,
    /// RST_STREAM with REFUSED_STREAM.
    Refuse,
    /// RST_STREAM with INTERNAL_ERROR.
    Reset,
    /// GOAWAY whose last stream is 0, and the end.
    GoAway,
    /// The end without a byte.
    Close,
    /// The end in the middle of a response head.
    Break,
}

/// A server that does one thing after another, over all its connections; then it answers.
struct Raw {
    requests: Arc<AtomicUsize>,
    script: Arc<Mutex<VecDeque<Do>>>,
    task: AbortHandle,
}

impl Drop for Raw {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Raw {
    fn new(pod: &Pod, port: u16) -> Self {
        let listener = pod.listen(port);
        let (requests, script) = (Arc::<AtomicUsize>::default(), Arc::<Mutex<VecDeque<Do>>>::default());
        let (count, next) = (requests.clone(), script.clone());
        let task = tokio::spawn(async move {
            loop {
                let Ok((io, _)) = listener.accept().await else { continue };
                let (count, next) = (count.clone(), next.clone());
                let act = move || {
                    count.fetch_add(1, SeqCst);
                    next.lock().unwrap().pop_front().unwrap_or(Do::Answer)
                };
                tokio::spawn(async move {
                    let mut start = [0; 4];
                    let http2 = matches!(io.peek(&mut start).await, Ok(4)) && &start == b"PRI ";
                    let _ = if http2 { http2_server(io, act).await } else { http1_server(io, act).await };
                });
            }
        });
        Self { requests, script, task: task.abort_handle() }
    }

    /// Sets what comes next; returns the number of requests so far.
    fn script(&self, script: &[Do]) -> usize {
        *self.script.lock().unwrap() = script.iter().copied().collect();
        self.requests.load(SeqCst)
    }
}

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    let mut bytes = vec![length[1], length[2], length[3], kind, flags];
    bytes.extend_from_slice(&stream.to_be_bytes());
    bytes.extend_from_slice(payload);
    bytes
}

async fn http2_server(mut io: TcpStream, act: impl Fn() -> Do) -> std::io::Result<()> {
    const HEADERS: u8 = 1;
    const RST_STREAM: u8 = 3;
    const SETTINGS: u8 = 4;
    const PING: u8 = 6;
    const GOAWAY: u8 = 7;
    let mut preface = [0; 24];
    io.read_exact(&mut preface).await?;
    io.write_all(&frame(SETTINGS, 0, 0, &[])).await?;
    loop {
        let mut head = [0; 9];
        io.read_exact(&mut head).await?;
        let mut payload = vec![0; usize::from(head[0]) << 16 | usize::from(head[1]) << 8 | usize::from(head[2])];
        io.read_exact(&mut payload).await?;
        let stream = u32::from_be_bytes([head[5], head[6], head[7], head[8]]);
        match (head[3], head[4] & 1) {
            (SETTINGS, 0) => io.write_all(&frame(SETTINGS, 1, 0, &[])).await?,
            (PING, 0) => io.write_all(&frame(PING, 1, 0, &payload)).await?,
            (HEADERS, _) => match act() {
                // The indexed field `:status: 200`, with END_STREAM and END_HEADERS.
                Do::Answer => io.write_all(&frame(HEADERS, 5, stream, &[0x88])).await?,
                Do::Refuse => io.write_all(&frame(RST_STREAM, 0, stream, &[0, 0, 0, 7])).await?,
                Do::Reset => io.write_all(&frame(RST_STREAM, 0, stream, &[0, 0, 0, 2])).await?,
                Do::GoAway => return io.write_all(&frame(GOAWAY, 0, 0, &[0; 8])).await,
                Do::Close | Do::Break => return Ok(()),
            },
            _ => {}
        }
    }
}

async fn http1_server(mut io: TcpStream, act: impl Fn() -> Do) -> std::io::Result<()> {
    let mut head = Vec::new();
    loop {
        while !head.ends_with(b"\r\n\r\n") {
            head.push(io.read_u8().await?);
        }
        let head = std::mem::take(&mut head);
        if head.starts_with(b"POST") {
            io.read_exact(&mut [0; 5]).await?;
        }
        match act() {
            Do::Answer => io.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await?,
            Do::Break => return io.write_all(b"HTTP/1.1 200 O").await,
            Do::Refuse | Do::Reset | Do::GoAway | Do::Close => return Ok(()),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_not_processed_is_sent_once_more_and_counted() {
    let raw_service =
        |world: &World| service(0, &[], ONE).replace("8080", "9000").replace("ONE", &world.pod("one").ip4.to_string());
    let Some(stage) = Stage::new("unprocessed", "", &[]).await else { return };
    stage.world.manifest("raw", &raw_service(&stage.world));
    let raw = Raw::new(stage.world.pod("one"), 9000);
    let ask = async |kind, body| Ask { kind, body, ..Ask::default() }.try_to(&stage.client, address(0)).await;
    stage
        .world
        .eventually("it is there", async || matches!(ask(Kind::Http2, 0).await, Ok(told) if told.status == 200))
        .await;
    let replays =
        async || stage.world.metric("client", "http_replayed_requests_total", &["direction=\"outbound\""]).await;
    let before = replays().await;

    let mut wrong = Vec::new();
    let mut expected = before;
    for (kind, body, script, wanted, requests, replayed) in [
        (Kind::Http2, 0, &[Do::Refuse][..], "200", 2, 1.0),
        (Kind::Http2, 0, &[Do::GoAway], "200", 2, 1.0),
        // Once is enough.
        (Kind::Http2, 0, &[Do::Refuse, Do::Refuse], "REFUSED_STREAM", 2, 1.0),
        // It may have been processed.
        (Kind::Http2, 0, &[Do::Reset], "INTERNAL_ERROR", 1, 0.0),
        // A connection that was idle may close under the next request; the first one leaves it in the pool.
        (Kind::Http1, 0, &[Do::Answer], "200", 1, 0.0),
        (Kind::Http1, 0, &[Do::Close], "200", 2, 1.0),
        // What must not happen twice is not sent twice without proof.
        (Kind::Http1, 5, &[Do::Close], "502", 1, 0.0),
        // A connection of its own that closes: nobody knows.
        (Kind::Http1, 0, &[Do::Close], "502", 1, 0.0),
        // With a part of the response it was processed.
        (Kind::Http1, 0, &[Do::Answer], "200", 1, 0.0),
        (Kind::Http1, 0, &[Do::Break], "502", 1, 0.0),
    ] {
        let so_far = raw.script(script);
        let got = match ask(kind, body).await {
            Ok(told) => told.status.to_string(),
            Err(error) => error,
        };
        let seen = raw.requests.load(SeqCst) - so_far;
        expected += replayed;
        let counted = replays().await;
        if !got.contains(wanted) || seen != requests || counted != expected {
            wrong.push(format!("{script:?}: {got}, {seen} requests, {counted} replays for {expected}"));
            expected = counted;
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    // None of this was a retry.
    assert_eq!(stage.world.metric("client", "outbound_http_route_retry_requests_total", &[]).await, 0.0);
}
