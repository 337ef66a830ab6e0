//! [`Client`] against scripted peers.

use super::*;
use std::sync::atomic::{AtomicUsize, Ordering};

type Sent = tokio::task::JoinHandle<Result<Response<Body>, SendError<&'static str>>>;

struct Fixture {
    client: Client<Pipes>,
    pipes: Pipes,
    far: mpsc::UnboundedReceiver<DuplexStream>,
    replays: Arc<AtomicUsize>,
}

fn fixture_with(config: ClientConfig, eager: bool, errors: &[&'static str]) -> Fixture {
    let (pipes, far) = Pipes::new();
    pipes.errors.lock().extend(errors.iter().rev());
    let replays = Arc::new(AtomicUsize::new(0));
    let hook = replays.clone();
    let hook: OnReplay = Arc::new(move || {
        hook.fetch_add(1, Ordering::SeqCst);
    });
    let client = Client::with_replay_hook(config, pipes.clone(), eager, Some(hook));
    Fixture { client, pipes, far, replays }
}

fn fixture() -> Fixture {
    fixture_with(ClientConfig::default(), false, &[])
}

impl Fixture {
    fn send(&self, req: Request<Body>) -> Sent {
        let client = self.client.clone();
        tokio::spawn(async move { client.send(req).await })
    }

    async fn accept(&mut self) -> DuplexStream {
        self.far.recv().await.unwrap()
    }

    fn replays(&self) -> usize {
        self.replays.load(Ordering::SeqCst)
    }

    /// Sends `req`; the peer at `io` must read exactly `wire`, and answers. Yields the response's text.
    async fn exchange(&self, io: &mut DuplexStream, req: Request<Body>, wire: &str, answer: &str) -> String {
        let sent = self.send(req);
        assert_eq!(read_until(io, wire).await, wire);
        io.write_all(answer.as_bytes()).await.unwrap();
        let text = text(sent.await.unwrap().unwrap()).await;
        settle().await;
        text
    }
}

fn get(uri: &str) -> Request<Body> {
    Request::get(uri).header("host", "web").body(Body::empty()).unwrap()
}

fn post(uri: &str, body: &'static str) -> Request<Body> {
    Request::post(uri).header("host", "web").body(Body::full(body)).unwrap()
}

fn http2(mut req: Request<Body>) -> Request<Body> {
    *req.version_mut() = ::http::Version::HTTP_2;
    req.headers_mut().remove("host");
    req
}

const GET_A: &str = "GET /a HTTP/1.1\r\nhost: web\r\n\r\n";
const OK: &str = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";

#[tokio::test]
async fn http1_connections_are_used_again() {
    let mut f = fixture();
    let sent = f.send(get("http://web/a"));
    let mut io = f.accept().await;
    assert_eq!(read_until(&mut io, "\r\n\r\n").await, GET_A);
    io.write_all(OK.as_bytes()).await.unwrap();
    let first = sent.await.unwrap().unwrap();
    // Its body is unread: its connection is not free.
    let sent = f.send(get("http://web/a"));
    let mut second = f.accept().await;
    assert_eq!(read_until(&mut second, "\r\n\r\n").await, GET_A);
    assert_eq!(text(first).await, "ok");
    settle().await;
    second.write_all(b"HTTP/1.1 204 No Content\r\n\r\n").await.unwrap();
    text(sent.await.unwrap().unwrap()).await;
    settle().await;
    // The one used last.
    assert_eq!(f.exchange(&mut second, get("http://web/a"), GET_A, OK).await, "ok");
    let chunked = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n";
    assert_eq!(f.exchange(&mut second, get("http://web/a"), GET_A, chunked).await, "hi");
    assert_eq!(f.exchange(&mut second, get("http://web/a"), GET_A, OK).await, "ok");
    assert_eq!(*f.pipes.attempts.lock(), [Some(Version::H1); 2]);
    assert_eq!(f.replays(), 0);
    drop(f.client);
    assert_eq!(read_all(&mut io).await, "");
    assert_eq!(read_all(&mut second).await, "");
}

#[tokio::test]
async fn an_unread_response_closes_its_connection() {
    let mut f = fixture();
    let sent = f.send(get("http://web/a"));
    let mut io = f.accept().await;
    io.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nab").await.unwrap();
    drop(sent.await.unwrap().unwrap());
    assert_eq!(read_all(&mut io).await, GET_A);
}

#[tokio::test]
async fn forms_have_connections_of_their_own() {
    let mut f = fixture();
    let absolute = || {
        let mut req = get("http://web/a");
        req.extensions_mut().insert(AbsoluteForm);
        req
    };
    let wire = "GET http://web/a HTTP/1.1\r\nhost: web\r\n\r\n";
    let sent = f.send(absolute());
    let mut first = f.accept().await;
    assert_eq!(read_until(&mut first, "\r\n\r\n").await, wire);
    first.write_all(OK.as_bytes()).await.unwrap();
    text(sent.await.unwrap().unwrap()).await;
    settle().await;
    let sent = f.send(get("http://web/a"));
    let mut second = f.accept().await;
    second.write_all(OK.as_bytes()).await.unwrap();
    text(sent.await.unwrap().unwrap()).await;
    settle().await;
    f.exchange(&mut first, absolute(), wire, OK).await;
    assert_eq!(f.pipes.attempts(), 2);
}

#[tokio::test]
async fn http_1_0_and_requests_without_host_are_one_off() {
    let mut f = fixture();
    let mut old = get("http://web/a");
    *old.version_mut() = ::http::Version::HTTP_10;
    let mut bare = get("http://web/a");
    bare.headers_mut().remove("host");
    let mut options = get("http://web/");
    *options.method_mut() = ::http::Method::OPTIONS;
    options.headers_mut().remove("host");
    let mut parts = std::mem::take(options.uri_mut()).into_parts();
    parts.path_and_query = Some("*".parse().unwrap());
    *options.uri_mut() = ::http::Uri::from_parts(parts).unwrap();
    for (req, wire) in [
        (old, "GET /a HTTP/1.0\r\nhost: web\r\n\r\n"),
        (bare, "GET /a HTTP/1.1\r\n\r\n"),
        (options, "OPTIONS * HTTP/1.1\r\n\r\n"),
    ] {
        let sent = f.send(req);
        let mut io = f.accept().await;
        assert_eq!(read_until(&mut io, "\r\n\r\n").await, wire);
        io.write_all(b"HTTP/1.1 200 OK\r\nConnection: keep-alive\r\nContent-Length: 2\r\n\r\nok").await.unwrap();
        let rsp = sent.await.unwrap().unwrap();
        assert!(!rsp.headers().contains_key("connection"));
        assert_eq!(text(rsp).await, "ok");
        assert_eq!(read_all(&mut io).await, "", "closed");
    }
}

#[tokio::test(start_paused = true)]
async fn idle_connections_are_closed_in_time() {
    let mut f = fixture();
    let sent = f.send(get("http://web/a"));
    let mut io = f.accept().await;
    io.write_all(OK.as_bytes()).await.unwrap();
    text(sent.await.unwrap().unwrap()).await;
    settle().await;
    tokio::time::sleep(Duration::from_millis(2_200)).await;
    f.exchange(&mut io, get("http://web/a"), &GET_A.repeat(2), OK).await;
    let idle = tokio::time::Instant::now();
    assert_eq!(read_all(&mut io).await, "");
    let waited = idle.elapsed();
    assert!(waited > Duration::from_millis(2_200) && waited <= Duration::from_secs(3), "{waited:?}");
}

#[tokio::test]
async fn the_pool_is_bounded() {
    let mut config = ClientConfig::default();
    config.h1.max_idle = 1;
    let mut f = fixture_with(config, false, &[]);
    let first = f.send(get("http://web/a"));
    let first_io = f.accept().await;
    let sent = [first, f.send(get("http://web/a"))];
    let mut ios = [first_io, f.accept().await];
    for io in &mut ios {
        io.write_all(OK.as_bytes()).await.unwrap();
    }
    for sent in sent {
        text(sent.await.unwrap().unwrap()).await;
        settle().await;
    }
    assert_eq!(read_all(&mut ios[1]).await, GET_A, "the second is not kept");
}

/// One exchange on a connection, then `req`, after which the peer does `then`. Yields what comes of `req`.
async fn second_use(f: &mut Fixture, req: Request<Body>, answer: &str) -> Sent {
    let sent = f.send(get("http://web/a"));
    let mut io = f.accept().await;
    read_until(&mut io, "\r\n\r\n").await;
    io.write_all(OK.as_bytes()).await.unwrap();
    text(sent.await.unwrap().unwrap()).await;
    settle().await;
    let sent = f.send(req);
    // The peer closes just as the request is on its way.
    read_until(&mut io, "\r\n\r\n").await;
    io.write_all(answer.as_bytes()).await.unwrap();
    drop(io);
    sent
}

#[tokio::test]
async fn a_request_that_met_a_closing_connection_is_sent_again_once() {
    let mut f = fixture();
    let sent = second_use(&mut f, get("http://web/b"), "").await;
    let mut io = f.accept().await;
    assert_eq!(read_until(&mut io, "\r\n\r\n").await, GET_A.replace("/a", "/b"));
    io.write_all(OK.as_bytes()).await.unwrap();
    assert_eq!(text(sent.await.unwrap().unwrap()).await, "ok");
    assert_eq!(f.replays(), 1);

    // Once.
    settle().await;
    let sent = f.send(get("http://web/c"));
    read_until(&mut io, "\r\n\r\n").await;
    drop(io);
    drop(f.accept().await);
    assert!(matches!(sent.await.unwrap(), Err(SendError::IncompleteResponse | SendError::Io { .. })));
    assert_eq!(f.replays(), 2);
}

#[tokio::test]
async fn nothing_that_may_have_been_processed_is_sent_again() {
    for (req, answer) in [
        (post("http://web/b", "x"), ""),
        (get("http://web/b"), "HTTP/1.1 200"),
        (Request::put("http://web/b").header("host", "web").body(unsized_body()).unwrap(), ""),
    ] {
        let mut f = fixture();
        let sent = second_use(&mut f, req, answer).await;
        let error = sent.await.unwrap().unwrap_err();
        assert!(matches!(error, SendError::IncompleteResponse | SendError::Io { .. }), "{error:?}");
        assert_eq!((f.replays(), f.pipes.attempts()), (0, 1));
    }
    // Nor on a connection that was new.
    let mut f = fixture();
    let sent = f.send(get("http://web/a"));
    drop(f.accept().await);
    assert!(matches!(sent.await.unwrap(), Err(SendError::IncompleteResponse | SendError::Io { .. })));
    assert_eq!(f.pipes.attempts(), 1);
}

#[tokio::test]
async fn a_closed_idle_connection_is_not_used() {
    let mut f = fixture();
    let sent = f.send(get("http://web/a"));
    let mut io = f.accept().await;
    io.write_all(OK.as_bytes()).await.unwrap();
    text(sent.await.unwrap().unwrap()).await;
    settle().await;
    drop(io);
    // Not even if its task has not noticed yet: then the request, whatever it is, was never sent.
    let sent = f.send(post("http://web/a", "x"));
    let mut io = f.accept().await;
    io.write_all(OK.as_bytes()).await.unwrap();
    assert_eq!(text(sent.await.unwrap().unwrap()).await, "ok");
}

fn unsized_body() -> Body {
    let frames = [Ok::<_, BodyError>(http_body::Frame::data("abc".into()))];
    Body::new(http_body_util::StreamBody::new(futures_util::stream::iter(frames)))
}

#[tokio::test]
async fn content_of_unknown_length_is_chunked_whatever_the_method() {
    let f = fixture();
    let mut far = f.far;
    let client = f.client;
    let req = Request::get("http://web/a").header("host", "web").body(unsized_body()).unwrap();
    let sent = tokio::spawn(async move { client.send(req).await });
    let mut io = far.recv().await.unwrap();
    let wire = read_until(&mut io, "0\r\n\r\n").await;
    assert_eq!(wire, "GET /a HTTP/1.1\r\nhost: web\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n");
    drop(io);
    assert!(sent.await.unwrap().is_err());
}

#[tokio::test]
async fn an_early_answer_does_not_free_a_connection_that_still_sends() {
    let mut f = fixture();
    let (tx, rx) = mpsc::unbounded_channel::<&'static str>();
    let frames = futures_util::stream::unfold(rx, |mut rx| async move {
        let data = rx.recv().await?;
        Some((Ok::<_, BodyError>(http_body::Frame::data(bytes::Bytes::from(data))), rx))
    });
    let body = Body::new(http_body_util::StreamBody::new(Box::pin(frames)));
    let sent = f.send(Request::post("http://web/up").header("host", "web").body(body).unwrap());
    let mut io = f.accept().await;
    read_until(&mut io, "\r\n\r\n").await;
    io.write_all(OK.as_bytes()).await.unwrap();
    assert_eq!(text(sent.await.unwrap().unwrap()).await, "ok");
    settle().await;
    // Still sending: another connection.
    let other = f.send(get("http://web/a"));
    let mut second = f.accept().await;
    second.write_all(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 0\r\n\r\n").await.unwrap();
    text(other.await.unwrap().unwrap()).await;
    // Done: the first is used again.
    tx.send("end").unwrap();
    drop(tx);
    settle().await;
    f.exchange(&mut io, get("http://web/a"), &format!("3\r\nend\r\n0\r\n\r\n{GET_A}"), OK).await;
    assert_eq!(f.pipes.attempts(), 2);
}

/// What a client makes of `answer`, after which the peer closes.
async fn answered(answer: &str) -> Result<(::http::HeaderMap, String), String> {
    let config = ClientConfig { max_header_size: 16_384, ..Default::default() };
    let mut f = fixture_with(config, false, &[]);
    let sent = f.send(get("http://web/a"));
    let mut io = f.accept().await;
    io.write_all(answer.as_bytes()).await.unwrap();
    drop(io);
    let rsp = sent.await.unwrap().map_err(|error| format!("{error:?}"))?;
    let (head, body) = rsp.into_parts();
    let body = body.collect().await.map_err(|error| format!("{error:?}"))?;
    Ok((head.headers, String::from_utf8_lossy(&body.to_bytes()).into_owned()))
}

#[tokio::test]
async fn responses_have_one_reading() {
    let (headers, body) =
        answered("HTTP/1.1 200 OK\r\nContent-Length: 9\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n")
            .await
            .unwrap();
    assert_eq!((headers.contains_key("content-length"), body.as_str()), (false, "ok"));
    let (headers, _) = answered("HTTP/1.1 200 OK\r\nContent-Length: 2, 2\r\n\r\nok").await.unwrap();
    assert_eq!(headers["content-length"], "2");
    let (headers, _) = answered("HTTP/1.1 200 OK\r\nConnection: x\r\nX: 1\r\nUpgrade: y\r\n\r\n").await.unwrap();
    assert!(headers.is_empty(), "{headers:?}");
    // Informational responses are passed over.
    assert_eq!(answered(&format!("HTTP/1.1 103 Early Hints\r\nX: 1\r\n\r\n{OK}")).await.unwrap().1, "ok");
    let bad = [
        "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nok".to_owned(),
        "HTTP/1.1 200 OK\r\nX : 1\r\n\r\n".to_owned(),
        "HTTP/1.1 200 OK\r\nX: 1\r\n 2\r\n\r\n".to_owned(),
        "HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n".to_owned(),
        "SSH-2.0-OpenSSH\r\n\r\n".to_owned(),
        format!("HTTP/1.1 200 OK\r\nX: {}\r\n\r\n", "y".repeat(17_000)),
    ];
    for answer in bad {
        let error = answered(&answer).await.unwrap_err();
        assert!(error.starts_with("Invalid("), "{answer:.40}: {error}");
    }
    assert_eq!(answered("HTTP/1.1 200 OK\r\nContent-").await.unwrap_err(), "IncompleteResponse");
    assert_eq!(answered("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nab").await.unwrap_err(), "Incomplete");
}

#[tokio::test]
async fn connect_errors_are_the_connectors() {
    let f = fixture_with(ClientConfig::default(), false, &["first", "second"]);
    assert!(matches!(f.send(get("http://web/")).await.unwrap(), Err(SendError::Connect("first"))));
    assert!(matches!(f.send(http2(get("http://web/"))).await.unwrap(), Err(SendError::Connect("second"))));
}

#[tokio::test]
async fn the_clients_own_body_error_is_told_apart() {
    let mut f = fixture();
    for version in [::http::Version::HTTP_11, ::http::Version::HTTP_2] {
        let frames = [Err::<http_body::Frame<bytes::Bytes>, _>(BodyError::Incomplete)];
        let body = Body::new(http_body_util::StreamBody::new(futures_util::stream::iter(frames)));
        let sent = f.send(Request::post("http://web/").version(version).header("host", "web").body(body).unwrap());
        let io = f.accept().await;
        let error = match version {
            ::http::Version::HTTP_2 => {
                let mut conn = h2::server::handshake(io).await.unwrap();
                let served = tokio::spawn(async move { while conn.accept().await.is_some() {} });
                let error = sent.await.unwrap().unwrap_err();
                served.abort();
                error
            }
            _ => sent.await.unwrap().unwrap_err(),
        };
        let expected = if version == ::http::Version::HTTP_2 {
            // The codec reports the reset that it sent.
            matches!(error, SendError::Reset(h2::Reason::INTERNAL_ERROR))
        } else {
            matches!(error, SendError::RequestBody(BodyError::Incomplete))
        };
        assert!(expected, "{error:?}");
    }
}

/// What an HTTP/2 peer does with its streams, in order.
enum Do {
    Answer,
    Reset(h2::Reason),
    /// Keeps the stream open until the peer is dropped.
    Hold,
}

/// An HTTP/2 peer; ends, with its connection, after the last step if `close`.
fn peer(io: DuplexStream, max_streams: Option<u32>, steps: Vec<Do>) -> tokio::task::JoinHandle<()> {
    tokio::spawn(async move {
        let mut builder = h2::server::Builder::new();
        if let Some(max) = max_streams {
            builder.max_concurrent_streams(max);
        }
        let mut conn = builder.handshake::<_, bytes::Bytes>(io).await.unwrap();
        let mut held = Vec::new();
        let mut steps = steps.into_iter();
        while let Some(Ok((req, mut respond))) = conn.accept().await {
            match steps.next().unwrap_or(Do::Answer) {
                Do::Answer => {
                    let mut body = respond.send_response(Response::new(()), false).unwrap();
                    let text = req.uri().path().to_owned();
                    let _ = body.send_data(text.into(), true);
                }
                Do::Reset(reason) => respond.send_reset(reason),
                Do::Hold => held.push((req, respond)),
            }
        }
    })
}

#[tokio::test]
async fn concurrent_http2_requests_share_a_connection() {
    let mut f = fixture();
    let sent: Vec<_> = (0..200).map(|i| f.send(http2(get(&format!("http://web/{i}"))))).collect();
    let _peer = peer(f.accept().await, None, vec![]);
    for (i, sent) in sent.into_iter().enumerate() {
        assert_eq!(text(sent.await.unwrap().unwrap()).await, format!("/{i}"));
    }
    assert_eq!(*f.pipes.attempts.lock(), [Some(Version::H2)]);
}

#[tokio::test]
async fn http2_resets_are_told_and_refused_streams_sent_again_once() {
    let mut f = fixture();
    let steps = vec![
        Do::Reset(h2::Reason::ENHANCE_YOUR_CALM),
        Do::Reset(h2::Reason::REFUSED_STREAM),
        Do::Answer,
        Do::Reset(h2::Reason::REFUSED_STREAM),
        Do::Reset(h2::Reason::REFUSED_STREAM),
        Do::Reset(h2::Reason::REFUSED_STREAM),
        Do::Answer,
    ];
    let sent = f.send(http2(get("http://web/1")));
    let _peer = peer(f.accept().await, None, steps);
    let error = sent.await.unwrap().unwrap_err();
    assert!(matches!(error, SendError::Reset(h2::Reason::ENHANCE_YOUR_CALM)), "{error:?}");
    assert_eq!(f.replays(), 0);
    assert_eq!(text(f.send(http2(post("http://web/2", "x"))).await.unwrap().unwrap()).await, "/2");
    assert_eq!(f.replays(), 1);
    let error = f.send(http2(get("http://web/3"))).await.unwrap().unwrap_err();
    assert!(error.is_unprocessed(), "{error:?}");
    assert_eq!(f.replays(), 2);
    // Its body is gone.
    let req = http2(Request::post("http://web/4").body(unsized_body()).unwrap());
    let error = f.send(req).await.unwrap().unwrap_err();
    assert!(error.is_unprocessed(), "{error:?}");
    assert_eq!(text(f.send(http2(get("http://web/5"))).await.unwrap().unwrap()).await, "/5");
    assert_eq!((f.replays(), f.pipes.attempts()), (2, 1));
}

/// An HTTP/2 frame.
fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut frame = (payload.len() as u32).to_be_bytes()[1..].to_vec();
    frame.extend([kind, flags]);
    frame.extend(stream.to_be_bytes());
    frame.extend(payload);
    frame
}

#[tokio::test]
async fn a_request_above_goaways_last_stream_is_sent_again() {
    let mut f = fixture();
    let sent = f.send(http2(get("http://web/1")));
    let mut io = f.accept().await;
    io.write_all(&frame(4, 0, 0, &[])).await.unwrap();
    settle().await;
    // GOAWAY: last stream 0, NO_ERROR.
    io.write_all(&frame(7, 0, 0, &[0; 8])).await.unwrap();
    let _peer = peer(f.accept().await, None, vec![]);
    assert_eq!(text(sent.await.unwrap().unwrap()).await, "/1");
    assert_eq!(f.replays(), 1);
}

#[tokio::test]
async fn a_lost_http2_connection_is_an_error_and_is_replaced() {
    let mut f = fixture();
    let sent = f.send(http2(get("http://web/1")));
    let held = peer(f.accept().await, None, vec![Do::Hold]);
    settle().await;
    held.abort();
    let error = sent.await.unwrap().unwrap_err();
    assert!(matches!(error, SendError::Io { .. } | SendError::Connection(_)), "{error:?}");
    settle().await;
    let sent = f.send(http2(get("http://web/2")));
    let _peer = peer(f.accept().await, None, vec![]);
    assert_eq!(text(sent.await.unwrap().unwrap()).await, "/2");
    assert_eq!(f.replays(), 0);
}

#[tokio::test]
async fn another_http2_connection_when_the_peer_allows_no_more_streams() {
    let mut config = ClientConfig::default();
    config.h2.max_connections = 2;
    let mut f = fixture_with(config, false, &[]);
    let sent = f.send(http2(get("http://web/0")));
    let _first = peer(f.accept().await, Some(1), vec![Do::Answer, Do::Hold]);
    text(sent.await.unwrap().unwrap()).await;
    let _held = f.send(http2(get("http://web/1")));
    settle().await;
    let sent = f.send(http2(get("http://web/2")));
    let _second = peer(f.accept().await, Some(1), vec![Do::Answer, Do::Hold]);
    assert_eq!(text(sent.await.unwrap().unwrap()).await, "/2");
    let _held = f.send(http2(get("http://web/3")));
    settle().await;
    // All are busy and there may be no third: this one waits.
    let waiting = f.send(http2(get("http://web/4")));
    settle().await;
    assert!(!waiting.is_finished());
    assert_eq!(f.pipes.attempts(), 2);
}

#[tokio::test(start_paused = true)]
async fn an_eager_client_is_ready_while_connected() {
    let mut f = fixture_with(ClientConfig::default(), true, &["refused"; 3]);
    let ready = f.client.ready();
    settle().await;
    assert!(!ready.get());
    let begun = tokio::time::Instant::now();
    let first = peer(f.accept().await, None, vec![]);
    ready.wait().await;
    let waited = begun.elapsed().as_millis();
    // 100 + 200 + 400, each with up to a tenth of jitter.
    assert!((700..=771).contains(&waited), "{waited}");
    assert_eq!(text(f.send(http2(get("http://web/1"))).await.unwrap().unwrap()).await, "/1");
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert!(ready.get());
    // Lost after a while: again at once.
    first.abort();
    let lost = tokio::time::Instant::now();
    let _second = peer(f.accept().await, None, vec![]);
    ready.wait().await;
    assert!(lost.elapsed() < Duration::from_millis(10));
    assert_eq!(f.pipes.attempts(), 5);
    assert!(Client::new(ClientConfig::default(), f.pipes.clone(), false).ready().get());
    drop(f.client);
    tokio::time::sleep(Duration::from_secs(600)).await;
    assert_eq!(f.pipes.attempts(), 5, "nobody connects for a client that is gone");
}
