//! [`serve`] against raw bytes.

use super::*;

/// Sends `input`, then half-closes; expects exactly `expected` back.
async fn check_with(config: ServerConfig, service: Service, input: &str, expected: &str) {
    let (mut io, _drain, task) = served(config, Version::H1, service);
    io.write_all(input.as_bytes()).await.unwrap();
    io.shutdown().await.unwrap();
    let output = read_all(&mut io).await;
    assert_eq!(output, expected, "for {input:?}");
    let _ = task.await.unwrap();
}

async fn check(input: &str, expected: &str) {
    check_with(ServerConfig::default(), echo(), input, expected).await;
}

fn ok(body: &str) -> String {
    format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{body}", body.len())
}

fn ok_close(body: &str) -> String {
    format!("HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{body}", body.len())
}

const BAD: &str = "HTTP/1.1 400 Bad Request\r\nconnection: close\r\ncontent-length: 0\r\n\r\n";

#[tokio::test]
async fn requests_of_one_connection() {
    check("GET /a HTTP/1.1\r\nHost: web\r\n\r\n", &ok(r#"GET http://web/a HTTP/1.1 host=web """#)).await;
    let two = "POST /a HTTP/1.1\r\nHost: web\r\nContent-Length: 3\r\n\r\nabcGET /b HTTP/1.1\r\nHost: other\r\n\r\n";
    let both = ok(r#"POST http://web/a HTTP/1.1 host=web content-length=3 "abc""#)
        + &ok(r#"GET http://other/b HTTP/1.1 host=other """#);
    check(two, &both).await;
    let rest = "GET /b HTTP/1.1\r\nHost: web\r\n\r\n";
    let close = format!("GET /a HTTP/1.1\r\nHost: web\r\nConnection: close\r\n\r\n{rest}");
    check(&close, &ok_close(r#"GET http://web/a HTTP/1.1 host=web """#)).await;
}

#[tokio::test]
async fn http_1_0_closes_unless_asked() {
    let rest = "GET /b HTTP/1.0\r\n\r\n";
    let body = r#"GET /a HTTP/1.0 """#;
    let expected = format!("HTTP/1.0 200 OK\r\ncontent-length: {}\r\n\r\n{body}", body.len());
    check(&format!("GET /a HTTP/1.0\r\n\r\n{rest}"), &expected).await;
    let body_b = r#"GET /b HTTP/1.0 """#;
    let kept = format!(
        "HTTP/1.0 200 OK\r\nconnection: keep-alive\r\ncontent-length: {}\r\n\r\n{body}\
         HTTP/1.0 200 OK\r\ncontent-length: {}\r\n\r\n{body_b}",
        body.len(),
        body_b.len()
    );
    let (mut io, _drain, _task) = served(ServerConfig::default(), Version::H1, echo());
    let input = format!("GET /a HTTP/1.0\r\nConnection: keep-alive\r\n\r\n{rest}");
    io.write_all(input.as_bytes()).await.unwrap();
    let output = read_all(&mut io).await;
    assert!(output.starts_with("HTTP/1.0 200 OK\r\n") && output.contains("keep-alive"), "{output}");
    assert_eq!(output.len(), kept.len(), "{output}");
}

#[tokio::test]
async fn chunks_and_trailers_arrive() {
    let input = "POST / HTTP/1.1\r\nHost: web\r\nTransfer-Encoding: chunked\r\nTrailer: x-sum\r\n\r\n\
                 3\r\nabc\r\n2;ext=1\r\nde\r\n0\r\nx-sum: 5\r\n\r\n";
    check(input, &ok(r#"POST http://web/ HTTP/1.1 host=web transfer-encoding=chunked "abcde" trailer x-sum=5"#)).await;
}

#[tokio::test]
async fn trailers_go_to_clients_that_want_them() {
    let trailers = service(|_| async {
        let mut map = ::http::HeaderMap::new();
        map.insert("x-sum", "3".parse().unwrap());
        let frames = [Ok::<_, BodyError>(http_body::Frame::data("abc".into())), Ok(http_body::Frame::trailers(map))];
        let body = http_body_util::StreamBody::new(futures_util::stream::iter(frames));
        Ok(Response::builder().header("trailer", "x-sum").body(Body::new(body)).unwrap())
    });
    let (mut io, _drain, _task) = served(ServerConfig::default(), Version::H1, trailers);
    io.write_all(b"GET / HTTP/1.1\r\nHost: a\r\nTE: trailers\r\nConnection: TE\r\n\r\n").await.unwrap();
    let output = read_until(&mut io, "x-sum: 3\r\n\r\n").await;
    assert!(output.ends_with("\r\n\r\n3\r\nabc\r\n0\r\nx-sum: 3\r\n\r\n"), "{output}");
    io.write_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").await.unwrap();
    assert!(read_until(&mut io, "0\r\n\r\n").await.ends_with("\r\n\r\n3\r\nabc\r\n0\r\n\r\n"));
}

#[tokio::test]
async fn continue_comes_when_the_body_is_wanted() {
    let (mut io, _drain, _task) = served(ServerConfig::default(), Version::H1, echo());
    io.write_all(b"POST / HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n").await.unwrap();
    assert_eq!(read_until(&mut io, "\r\n\r\n").await, "HTTP/1.1 100 Continue\r\n\r\n");
    io.write_all(b"ok").await.unwrap();
    assert!(read_until(&mut io, "\"ok\"").await.starts_with("HTTP/1.1 200 OK\r\n"));
}

#[tokio::test]
async fn head_has_no_content() {
    let head =
        service(|_| async { Ok(Response::builder().header("content-length", "9").body(Body::empty()).unwrap()) });
    let input = "HEAD / HTTP/1.1\r\nHost: a\r\n\r\nHEAD / HTTP/1.1\r\nHost: a\r\n\r\n";
    let one = "HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n";
    check_with(ServerConfig::default(), head, input, &format!("{one}{one}")).await;
}

#[tokio::test]
async fn a_wrong_length_is_made_right() {
    let wrong =
        service(|_| async { Ok(Response::builder().header("content-length", "2").body(Body::full("four")).unwrap()) });
    let one = "HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nfour";
    check_with(ServerConfig::default(), wrong, "GET / HTTP/1.1\r\nHost: a\r\n\r\n", one).await;
}

/// Each of these, followed by another request, must yield one 400 and nothing else.
#[tokio::test]
async fn ambiguous_heads_are_refused() {
    let post = "POST / HTTP/1.1\r\nHost: a\r\n";
    let heads = [
        format!("{post}Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello"),
        format!("{post}Content-Length: 5, 6\r\n\r\nhello"),
        format!("{post}Content-Length: +5\r\n\r\nhello"),
        format!("{post}Content-Length: 5 5\r\n\r\nhello"),
        format!("{post}Content-Length: -1\r\n\r\nhello"),
        format!("{post}Content-Length: 0x5\r\n\r\nhello"),
        format!("{post}Content-Length:\r\n\r\nhello"),
        format!("{post}Content-Length: 99999999999999999999\r\n\r\nhello"),
        format!("{post}Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n"),
        format!("{post}Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n"),
        format!("{post}Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n"),
        format!("{post}Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n"),
        format!("{post}Transfer-Encoding\u{b}: chunked\r\n\r\n0\r\n\r\n"),
        format!("{post}Content-Length : 5\r\n\r\nhello"),
        format!("{post} Content-Length: 5\r\n\r\nhello"),
        format!("{post}X: a\r\n b\r\n\r\n"),
        format!("{post}X: a\r\n\tContent-Length: 5\r\n\r\n"),
        format!("{post}X: a\rContent-Length: 5\r\n\r\n"),
        format!("{post}X: a\0b\r\n\r\n"),
        format!("{post}X\0: a\r\n\r\n"),
        format!("{post}: a\r\n\r\n"),
        format!("{post}no colon\r\n\r\n"),
        "POST / HTTP/1.0\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n".to_owned(),
        "GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n".to_owned(),
        "GET / HTTP/1.1\r\nHost: a\r\nhost: a\r\n\r\n".to_owned(),
        "GET / HTTP/1.1\r\nHost: a/../b\r\n\r\n".to_owned(),
        "GET / HTTP/1.1\r\nHost: u@a\r\n\r\n".to_owned(),
        "GET http://u@a/ HTTP/1.1\r\nHost: a\r\n\r\n".to_owned(),
        "GET a:80 HTTP/1.1\r\nHost: a\r\n\r\n".to_owned(),
        "GET * HTTP/1.1\r\nHost: a\r\n\r\n".to_owned(),
        "GET /a b HTTP/1.1\r\nHost: a\r\n\r\n".to_owned(),
        "GET  /a HTTP/1.1\r\nHost: a\r\n\r\n".to_owned(),
        "GET /a HTTP/1.2\r\nHost: a\r\n\r\n".to_owned(),
        "G(T /a HTTP/1.1\r\nHost: a\r\n\r\n".to_owned(),
        "CONNECT / HTTP/1.1\r\nHost: a\r\n\r\n".to_owned(),
        "CONNECT http://a:80/ HTTP/1.1\r\nHost: a\r\n\r\n".to_owned(),
        "CONNECT a:80 HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabc".to_owned(),
    ];
    for head in heads {
        check(&format!("{head}GET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n"), BAD).await;
    }
    check("CONNECT a:80 HTTP/1.0\r\nHost: a\r\n\r\n", &BAD.replace("1.1", "1.0")).await;
    let coding = "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n";
    check(coding, &BAD.replace("400 Bad Request", "501 Not Implemented")).await;
}

/// What RFC 9112 lets a server understand in one way only, it passes on in that way only.
#[tokio::test]
async fn ambiguous_heads_are_made_plain() {
    let next = "GET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n";
    // Section 6.3: the coding wins, and the connection is closed.
    for lengths in [("Content-Length: 3\r\n", ""), ("", "Content-Length: 3\r\n")] {
        let (before, after) = lengths;
        let input = format!(
            "POST / HTTP/1.1\r\nHost: a\r\n{before}Transfer-Encoding: chunked\r\n{after}\r\n5\r\nhello\r\n0\r\n\r\n{next}"
        );
        check(&input, &ok_close(r#"POST http://a/ HTTP/1.1 host=a transfer-encoding=chunked "hello""#)).await;
    }
    // Section 6.3: a list of one number.
    let twice = "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\nContent-Length: 2\r\n\r\nhi";
    check(twice, &ok(r#"POST http://a/ HTTP/1.1 host=a content-length=2 "hi""#)).await;
    // Section 2.2: a single LF ends a line.
    check("GET / HTTP/1.1\nHost: a\nX: 1\n\n", &ok(r#"GET http://a/ HTTP/1.1 host=a x=1 """#)).await;
    // Section 3.2.2: the target wins over Host.
    check("GET http://a/x HTTP/1.1\r\nHost: b\r\n\r\n", &ok(r#"GET http://a/x HTTP/1.1 host=a """#)).await;
    // A client can't have framing or Host removed.
    let listed =
        "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\nX: 1\r\nConnection: content-length, host, x\r\n\r\nhi";
    check(listed, &ok(r#"POST http://a/ HTTP/1.1 host=a content-length=2 "hi""#)).await;
}

#[tokio::test]
async fn bad_chunks_end_the_body() {
    for bad in [
        "x\r\n",
        "5 5\r\nhello",
        "-1\r\n",
        "0x5\r\nhello",
        "ffffffffffffffff1\r\n",
        "5\nhello",
        "5\r\nhelloXX0\r\n\r\n",
    ] {
        let head = "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n";
        let (mut io, _drain, _task) = served(ServerConfig::default(), Version::H1, echo());
        io.write_all(format!("{head}{bad}\r\n0\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n").as_bytes())
            .await
            .unwrap();
        let output = read_all(&mut io).await;
        assert!(!output.contains("smuggled") && !output.contains(r#"hello""#), "{bad:?}: {output}");
        assert!(output.is_empty() || output.contains("Io(") || output.contains("Other("), "{bad:?}: {output}");
    }
}

#[tokio::test]
async fn large_heads_get_431_with_the_name_of_the_setting() {
    let config =
        || ServerConfig { max_header_size: 16_384, max_header_setting: "MAX_HEAD_OF_TEST", ..Default::default() };
    let large = |n: usize| format!("GET / HTTP/1.1\r\nHost: a\r\nX: {}\r\n\r\n", "y".repeat(n));
    let output = |input: String| async move {
        let (mut io, _drain, _task) = served(config(), Version::H1, echo());
        io.write_all(input.as_bytes()).await.unwrap();
        io.shutdown().await.unwrap();
        read_all(&mut io).await
    };
    assert!(output(large(16_000)).await.starts_with("HTTP/1.1 200 OK\r\n"));
    let refused = output(large(17_000)).await;
    assert!(refused.starts_with("HTTP/1.1 431 Request Header Fields Too Large\r\n"), "{refused}");
    assert!(refused.contains("connection: close\r\n"), "{refused}");
    assert!(refused.ends_with("more than the 16384 that MAX_HEAD_OF_TEST allows\n"), "{refused}");
    // Beyond its buffer, and of more than 100 fields, the codec refuses by itself.
    let beyond = output(large(500_000)).await;
    assert!(beyond.starts_with("HTTP/1.1 431 "), "{beyond}");
    let many = output(format!("GET / HTTP/1.1\r\nHost: a\r\n{}\r\n", "X: 1\r\n".repeat(101))).await;
    assert!(many.starts_with("HTTP/1.1 431 "), "{many}");
}

#[tokio::test]
async fn a_reset_is_a_close_without_an_answer() {
    let reset = service(|_| async { Err(Reset::new(h2::Reason::REFUSED_STREAM)) });
    let (mut io, _drain, task) = served(ServerConfig::default(), Version::H1, reset);
    io.write_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").await.unwrap();
    assert_eq!(read_all(&mut io).await, "");
    let Err(ServeError::Reset(reset)) = task.await.unwrap() else { panic!("not a reset") };
    assert_eq!(reset.reason(), h2::Reason::REFUSED_STREAM);
}

#[tokio::test]
async fn a_response_can_close_the_connection() {
    let closing = service(|_| async {
        let mut rsp = Response::new(Body::full("bye"));
        rsp.extensions_mut().insert(CloseConnection);
        Ok(rsp)
    });
    let input = "GET / HTTP/1.1\r\nHost: a\r\n\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n";
    check_with(ServerConfig::default(), closing, input, &ok_close("bye")).await;
}

#[tokio::test]
async fn a_drain_ends_idle_connections_at_once() {
    for first in ["", "GET / HTTP/1.1\r\nHost: a\r\n\r\n"] {
        let (mut io, drain, task) = served(ServerConfig::default(), Version::H1, echo());
        io.write_all(first.as_bytes()).await.unwrap();
        settle().await;
        drain.drain().await;
        assert!(task.await.unwrap().is_ok());
        assert!(!read_all(&mut io).await.contains("connection: close"));
    }
}

#[tokio::test]
async fn a_drain_waits_for_the_current_response() {
    let (tx, rx) = tokio::sync::watch::channel(false);
    let slow = service(move |_| {
        let mut rx = rx.clone();
        async move {
            let _ = rx.wait_for(|go| *go).await;
            Ok(Response::new(Body::full("late")))
        }
    });
    let (mut io, drain, _task) = served(ServerConfig::default(), Version::H1, slow);
    io.write_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").await.unwrap();
    settle().await;
    let drained = tokio::spawn(drain.drain());
    settle().await;
    assert!(!drained.is_finished());
    tx.send_replace(true);
    assert_eq!(read_all(&mut io).await, ok_close("late"));
    drained.await.unwrap();
}

/// A request whose stream the service itself provides.
fn tunnel(status: u16) -> (Service, mpsc::UnboundedReceiver<DuplexStream>) {
    let (tx, rx) = mpsc::unbounded_channel();
    let service = service(move |_| {
        let (near, far) = tokio::io::duplex(PIPE);
        let _ = tx.send(far);
        async move {
            let mut rsp = Response::builder()
                .status(status)
                .header("content-length", "3")
                .header("upgrade", "echo")
                .header("connection", "upgrade")
                .body(Body::empty())
                .unwrap();
            rsp.extensions_mut().insert(upgrade::Tunnel::new(near));
            Ok(rsp)
        }
    });
    (service, rx)
}

#[tokio::test]
async fn an_upgrade_joins_both_sides_until_they_close() {
    let (service, mut far) = tunnel(101);
    let (mut io, drain, task) = served(ServerConfig::default(), Version::H1, service);
    io.write_all(b"GET / HTTP/1.1\r\nHost: a\r\nUpgrade: echo\r\nConnection: upgrade\r\n\r\nearly").await.unwrap();
    let head = read_until(&mut io, "\r\n\r\n").await;
    assert_eq!(head, "HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: echo\r\n\r\n");
    let mut far = far.recv().await.unwrap();
    assert!(task.await.unwrap().is_ok());
    assert_eq!(read_until(&mut far, "early").await, "early");
    far.write_all(b"hello").await.unwrap();
    assert_eq!(read_until(&mut io, "hello").await, "hello");
    // Half-close, one direction at a time; the drain waits for both.
    let drained = tokio::spawn(drain.drain());
    io.shutdown().await.unwrap();
    assert_eq!(read_all(&mut far).await, "");
    far.write_all(b"more").await.unwrap();
    assert_eq!(read_until(&mut io, "more").await, "more");
    settle().await;
    assert!(!drained.is_finished());
    drop(far);
    assert_eq!(read_all(&mut io).await, "");
    drained.await.unwrap();
}

#[tokio::test]
async fn connect_is_an_upgrade_too() {
    let (service, mut far) = tunnel(200);
    let (mut io, _drain, _task) = served(ServerConfig::default(), Version::H1, service);
    io.write_all(b"CONNECT a:80 HTTP/1.1\r\nHost: a:80\r\n\r\n").await.unwrap();
    let head = read_until(&mut io, "\r\n\r\n").await;
    assert!(head.starts_with("HTTP/1.1 200 OK\r\n") && !head.contains("content-length"), "{head}");
    let mut far = far.recv().await.unwrap();
    far.write_all(b"hello").await.unwrap();
    assert_eq!(read_until(&mut io, "hello").await, "hello");
}

#[tokio::test]
async fn no_upgrade_without_101_and_no_101_without_asking() {
    let bad_gateway = BAD.replace("400 Bad Request", "502 Bad Gateway");
    let ask = "GET / HTTP/1.1\r\nHost: a\r\nUpgrade: echo\r\nConnection: upgrade\r\n\r\n";
    let plain = "GET / HTTP/1.1\r\nHost: a\r\n\r\n";
    let h2c = "GET / HTTP/1.1\r\nHost: a\r\nUpgrade: h2c\r\nConnection: upgrade\r\n\r\n";
    for (status, input) in [(101, plain), (101, h2c), (103, ask), (101, "CONNECT a:80 HTTP/1.1\r\nHost: a:80\r\n\r\n")]
    {
        check_with(ServerConfig::default(), tunnel(status).0, input, &bad_gateway).await;
    }
    let bare = service(|_| async { Ok(Response::builder().status(101).body(Body::empty()).unwrap()) });
    check_with(ServerConfig::default(), bare, ask, &bad_gateway).await;
    // Another status leaves HTTP in place.
    check(
        &format!("{ask}{plain}"),
        &(ok("GET http://a/ HTTP/1.1 host=a connection=upgrade \"\"") + &ok("GET http://a/ HTTP/1.1 host=a \"\"")),
    )
    .await;
    check(h2c, &ok("GET http://a/ HTTP/1.1 host=a \"\"")).await;
}

/// Sets its flag when it is dropped: the request that holds it is over.
struct Over(Arc<std::sync::atomic::AtomicBool>);

impl Drop for Over {
    fn drop(&mut self) {
        self.0.store(true, std::sync::atomic::Ordering::SeqCst);
    }
}

/// A client that sends `sent`, waits, and closes its connection: whether the request ends before its answer, which
/// takes a minute.
async fn gives_up(sent: &str, streams: bool, after: Duration) -> bool {
    let over = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let flag = over.clone();
    let slow = service(move |_| {
        let over = Over(flag.clone());
        async move {
            let minute = async move {
                tokio::time::sleep(Duration::from_secs(60)).await;
                drop(over);
            };
            if !streams {
                minute.await;
                return Ok(Response::new(Body::full("late")));
            }
            let end = futures_util::stream::once(async move {
                minute.await;
                Ok::<_, BodyError>(http_body::Frame::data(bytes::Bytes::from_static(b"late")))
            });
            Ok(Response::new(Body::new(http_body_util::StreamBody::new(end))))
        }
    });
    let (mut io, _drain, task) = served(ServerConfig::default(), Version::H1, slow);
    io.write_all(sent.as_bytes()).await.unwrap();
    if streams {
        read_until(&mut io, "\r\n\r\n").await;
    }
    tokio::time::sleep(after).await;
    io.shutdown().await.unwrap();
    tokio::time::sleep(Duration::from_secs(1)).await;
    let early = over.load(std::sync::atomic::Ordering::SeqCst);
    assert_eq!(task.is_finished(), early);
    if early {
        assert!(matches!(task.await.unwrap(), Err(ServeError::Io(_))));
    } else {
        assert!(read_all(&mut io).await.contains("late"));
        assert!(task.await.unwrap().is_ok());
    }
    early
}

#[tokio::test(start_paused = true)]
async fn a_client_that_goes_away_ends_its_request() {
    const GET: &str = "GET / HTTP/1.1\r\nHost: web\r\n\r\n";
    const POST: &str = "POST / HTTP/1.1\r\nHost: web\r\nContent-Length: 3\r\n\r\nabc";
    let later = Duration::from_secs(1);
    for (sent, streams, after, expected) in [
        (GET, false, later, true),
        (POST, false, later, true),
        // While the answer is on its way and nothing has to be said.
        (GET, true, later, true),
        // Closing together with the request is how some clients say that it was the last one.
        (GET, false, Duration::ZERO, false),
        (POST, false, Duration::ZERO, false),
    ] {
        assert_eq!(gives_up(sent, streams, after).await, expected, "{sent:?} {streams} {after:?}");
    }
    // What was read ahead is not lost.
    let (mut io, _drain, _task) = served(ServerConfig::default(), Version::H1, echo());
    for _ in 0..2 {
        io.write_all(GET.as_bytes()).await.unwrap();
    }
    io.shutdown().await.unwrap();
    let one = ok(r#"GET http://web/ HTTP/1.1 host=web """#);
    assert_eq!(read_all(&mut io).await, format!("{one}{one}"));
}

#[tokio::test(start_paused = true)]
async fn a_body_that_is_read_slowly_is_not_cut_into_bytes() {
    const SIZE: usize = 256 * 1024;
    let count = service(|req: Request<Body>| async move {
        let (mut body, mut pieces) = (req.into_body(), 0);
        while let Some(Ok(_)) = body.frame().await {
            pieces += 1;
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        Ok(Response::new(Body::full(format!("{pieces} pieces"))))
    });
    let (mut io, _drain, _task) = served(ServerConfig::default(), Version::H1, count);
    io.write_all(format!("POST / HTTP/1.1\r\nHost: web\r\nContent-Length: {SIZE}\r\n\r\n").as_bytes()).await.unwrap();
    io.write_all(&vec![b'x'; SIZE]).await.unwrap();
    let output = read_until(&mut io, " pieces").await;
    let pieces = output.rsplit("\r\n").next().unwrap().trim_end_matches(" pieces").parse::<usize>().unwrap();
    assert!(pieces < 200, "{pieces}");
}
