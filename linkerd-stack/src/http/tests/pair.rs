//! [`serve`] and [`Client`] joined: a proxy between a client and a peer; and [`serve`] under an HTTP/2 client.

use super::*;
use ::http::StatusCode;

/// A service that forwards with a client.
fn forward(client: Client<Pipes>) -> Service {
    service(move |req| {
        let client = client.clone();
        async move {
            Ok(client.send(req).await.unwrap_or_else(|error| {
                Response::builder().status(502).body(Body::full(format!("{error:?}"))).unwrap()
            }))
        }
    })
}

fn proxy() -> (DuplexStream, drain::Signal, mpsc::UnboundedReceiver<DuplexStream>) {
    let (pipes, far) = Pipes::new();
    let client = Client::new(ClientConfig::default(), pipes, false);
    let (io, drain, _task) = served(ServerConfig::default(), Version::H1, forward(client));
    (io, drain, far)
}

#[tokio::test]
async fn a_request_passes_through() {
    let (mut io, _drain, mut far) = proxy();
    io.write_all(
        b"POST /a HTTP/1.1\r\nHost: Web\r\nTransfer-Encoding: chunked\r\nKeep-Alive: 1\r\nTrailer: t\r\n\r\n3\r\nabc\r\n0\r\nT: 1\r\n\r\n",
    )
    .await
    .unwrap();
    let mut far = far.recv().await.unwrap();
    let wire = read_until(&mut far, "0\r\nt: 1\r\n\r\n").await;
    assert!(wire.starts_with("POST /a HTTP/1.1\r\nhost: Web\r\n") && !wire.contains("keep-alive"), "{wire}");
    far.write_all(b"HTTP/1.1 404 Nope\r\nX: 1\r\nDate: then\r\nContent-Length: 2\r\n\r\nno").await.unwrap();
    let answer = read_until(&mut io, "no").await;
    assert_eq!(answer, "HTTP/1.1 404 Nope\r\nx: 1\r\ncontent-length: 2\r\n\r\nno");
}

#[tokio::test]
async fn a_websocket_passes_through() {
    let (mut io, drain, mut far) = proxy();
    let upgrade = "GET /ws HTTP/1.1\r\nhost: web\r\nupgrade: websocket\r\nconnection: Upgrade\r\n\r\n";
    io.write_all(upgrade.as_bytes()).await.unwrap();
    let mut far = far.recv().await.unwrap();
    assert_eq!(read_until(&mut far, "\r\n\r\n").await, upgrade);
    far.write_all(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\nhello")
        .await
        .unwrap();
    assert!(read_until(&mut io, "hello").await.starts_with("HTTP/1.1 101 Switching Protocols\r\n"));
    let drained = tokio::spawn(drain.drain());
    io.write_all(b"ping").await.unwrap();
    assert_eq!(read_until(&mut far, "ping").await, "ping");
    assert!(!drained.is_finished());
    drop((io, far));
    drained.await.unwrap();
}

#[tokio::test]
async fn a_refused_upgrade_is_an_ordinary_response() {
    let (mut io, _drain, mut far) = proxy();
    io.write_all(b"GET /ws HTTP/1.1\r\nhost: web\r\nupgrade: websocket\r\nconnection: Upgrade\r\n\r\n").await.unwrap();
    let mut far = far.recv().await.unwrap();
    far.write_all(b"HTTP/1.1 426 Upgrade Required\r\nContent-Length: 2\r\n\r\nno").await.unwrap();
    assert!(read_until(&mut io, "\r\n\r\nno").await.starts_with("HTTP/1.1 426 "));
}

#[tokio::test]
async fn connect_passes_through() {
    let (mut io, _drain, mut far) = proxy();
    io.write_all(b"CONNECT web:443 HTTP/1.1\r\nHost: web:443\r\n\r\n").await.unwrap();
    let mut far = far.recv().await.unwrap();
    assert_eq!(read_until(&mut far, "\r\n\r\n").await, "CONNECT web:443 HTTP/1.1\r\nhost: web:443\r\n\r\n");
    far.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\n").await.unwrap();
    assert!(!read_until(&mut io, "\r\n\r\n").await.contains("content-length"));
    far.write_all(b"tls").await.unwrap();
    assert_eq!(read_until(&mut io, "tls").await, "tls");
}

/// An HTTP/2 client of [`serve`].
async fn h2_client(service: Service) -> (h2::client::SendRequest<bytes::Bytes>, drain::Signal, H2Task) {
    let config = ServerConfig { max_header_size: 16_384, max_header_setting: "MAX_HEAD_OF_TEST", ..Default::default() };
    let (io, drain, task) = served(config, Version::H2, service);
    let (client, conn) = h2::client::handshake(io).await.unwrap();
    (client, drain, (tokio::spawn(conn), task))
}

type H2Task = (tokio::task::JoinHandle<Result<(), h2::Error>>, tokio::task::JoinHandle<Result<(), ServeError>>);

async fn h2_get(
    client: &h2::client::SendRequest<bytes::Bytes>,
    req: Request<()>,
) -> Result<(StatusCode, String), h2::Error> {
    let (rsp, _) = client.clone().ready().await?.send_request(req, true)?;
    let (head, mut body) = rsp.await?.into_parts();
    let mut text = Vec::new();
    while let Some(data) = body.data().await {
        let data = data?;
        body.flow_control().release_capacity(data.len())?;
        text.extend_from_slice(&data);
    }
    Ok((head.status, String::from_utf8_lossy(&text).into_owned()))
}

#[tokio::test]
async fn http2_requests_are_checked_like_http1() {
    let (client, _drain, _task) = h2_client(echo()).await;
    let req = |uri: &str, headers: &[(&str, &str)]| {
        let mut req = Request::get(uri).version(::http::Version::HTTP_2);
        for (name, value) in headers {
            req = req.header(*name, *value);
        }
        req.body(()).unwrap()
    };
    let (status, body) = h2_get(&client, req("http://web/a", &[("x", "1")])).await.unwrap();
    assert_eq!((status, body.as_str()), (StatusCode::OK, r#"GET http://web/a HTTP/2.0 x=1 """#));
    let (status, body) = h2_get(&client, req("http://web/a", &[("host", "other")])).await.unwrap();
    assert_eq!((status, body.as_str()), (StatusCode::BAD_REQUEST, ""));
    let large = "y".repeat(17_000);
    let (status, body) = h2_get(&client, req("http://web/a", &[("x", large.as_str())])).await.unwrap();
    assert_eq!(status, StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE);
    assert!(body.ends_with("MAX_HEAD_OF_TEST allows\n"), "{body}");
    let larger = "y".repeat(34_000);
    let codec = h2_get(&client, req("http://web/a", &[("x", larger.as_str())])).await.unwrap();
    assert_eq!(codec.0, StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE);
    let connect = Request::connect("web:80").version(::http::Version::HTTP_2).body(()).unwrap();
    assert_eq!(h2_get(&client, connect).await.unwrap().0, StatusCode::BAD_REQUEST);
}

#[tokio::test]
async fn a_reset_is_rst_stream_with_its_reason() {
    let (client, _drain, _task) = h2_client(service(|req| async move {
        if req.uri().path() == "/body" {
            let frames = [Ok(http_body::Frame::data("a".into())), Err(BodyError::from(Reset::new(h2::Reason::CANCEL)))];
            return Ok(Response::new(Body::new(http_body_util::StreamBody::new(futures_util::stream::iter(frames)))));
        }
        Err(Reset::new(h2::Reason::ENHANCE_YOUR_CALM))
    }))
    .await;
    for (path, reason) in [("/", h2::Reason::ENHANCE_YOUR_CALM), ("/body", h2::Reason::CANCEL)] {
        let req = Request::get(format!("http://web{path}")).body(()).unwrap();
        let error = h2_get(&client, req).await.unwrap_err();
        assert!(error.is_reset() && error.is_remote() && error.reason() == Some(reason), "{error:?}");
    }
}

#[tokio::test]
async fn http2_ends_gracefully_on_drain_or_when_told() {
    let (tx, rx) = tokio::sync::watch::channel(false);
    let slow = service(move |req: Request<Body>| {
        let mut rx = rx.clone();
        async move {
            let mut rsp = Response::new(Body::full("late"));
            if req.uri().path() == "/close" {
                rsp.extensions_mut().insert(CloseConnection);
                // Must not reach HTTP/2.
                rsp.headers_mut().insert("connection", "close".parse().unwrap());
            } else {
                let _ = rx.wait_for(|go| *go).await;
            }
            Ok(rsp)
        }
    });
    for close in [true, false] {
        tx.send_replace(false);
        let (client, drain, (conn, served)) = h2_client(slow.clone()).await;
        let pending = {
            let client = client.clone();
            tokio::spawn(async move { h2_get(&client, Request::get("http://web/").body(()).unwrap()).await })
        };
        settle().await;
        let drained = if close {
            let closed = h2_get(&client, Request::get("http://web/close").body(()).unwrap()).await;
            assert_eq!(closed.unwrap().1, "late");
            None
        } else {
            Some(tokio::spawn(drain.drain()))
        };
        settle().await;
        assert!(client.clone().ready().await.is_err(), "GOAWAY");
        tx.send_replace(true);
        assert_eq!(pending.await.unwrap().unwrap().1, "late");
        drop(client);
        conn.await.unwrap().unwrap();
        served.await.unwrap().unwrap();
        if let Some(drained) = drained {
            drained.await.unwrap();
        }
    }
}

/// A HEADERS frame with these fields, as HPACK literals without indexing.
fn headers(fields: &[(&str, &str)]) -> Vec<u8> {
    let mut block = Vec::new();
    for (name, value) in fields {
        block.push(0);
        for text in [name, value] {
            block.push(u8::try_from(text.len()).unwrap());
            block.extend(text.as_bytes());
        }
    }
    let mut frame = (block.len() as u32).to_be_bytes()[1..].to_vec();
    // HEADERS, END_STREAM and END_HEADERS, stream 1.
    frame.extend([1, 5, 0, 0, 0, 1]);
    frame.extend(block);
    frame
}

/// RFC 9113 section 8: what would forge an HTTP/1 request never reaches the service.
#[tokio::test]
async fn http2_pseudo_header_tricks_are_refused() {
    let good = [(":method", "GET"), (":scheme", "http"), (":authority", "web"), (":path", "/a")];
    let with = |i: usize, name: &'static str, value: &'static str| {
        let mut fields = good.to_vec();
        fields[i] = (name, value);
        fields
    };
    let and = |name: &'static str, value: &'static str| {
        let mut fields = good.to_vec();
        fields.push((name, value));
        fields
    };
    let tricks = [
        with(0, ":method", "GET / HTTP/1.1\r\nx: y\r\n\r\nGET"),
        with(0, ":method", "GET /x"),
        with(0, ":method", ""),
        with(1, ":scheme", "http://evil/?"),
        with(2, ":authority", "web\r\nx: y"),
        with(2, ":authority", "user@web"),
        with(2, ":authority", "web/evil"),
        with(2, ":authority", "web evil"),
        with(3, ":path", "/a HTTP/1.1\r\nx: y"),
        with(3, ":path", "/a b"),
        with(3, ":path", "*"),
        with(3, ":path", ""),
        with(3, ":path", "http://evil/"),
        and(":path", "/b"),
        and(":authority", "evil"),
        and(":status", "200"),
        and("X-Upper", "1"),
        and("x", "a\r\ny: b"),
        and("x", "a\nb"),
        and("x", "a\0b"),
        and("x y", "a"),
        and("x:", "a"),
        and("", "a"),
        and("connection", "close"),
        and("transfer-encoding", "chunked"),
        and("upgrade", "websocket"),
        and("keep-alive", "1"),
        and("proxy-connection", "1"),
        and("te", "gzip"),
        and("host", "evil"),
        and("content-length", "5"),
        and("content-length", "x"),
        vec![good[0], good[1], good[2]],
        vec![good[0], good[2], good[3]],
        vec![good[1], good[2], good[3]],
        vec![("x", "1"), good[0], good[1], good[2], good[3]],
    ];
    for fields in tricks {
        let called = Arc::new(Mutex::new(None));
        let seen = called.clone();
        let spy = service(move |req| {
            *seen.lock() = Some(format!("{req:?}"));
            async { Ok(Response::new(Body::empty())) }
        });
        let (mut io, _drain, _task) = served(ServerConfig::default(), Version::H2, spy);
        io.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.unwrap();
        // SETTINGS.
        io.write_all(&[0, 0, 0, 4, 0, 0, 0, 0, 0]).await.unwrap();
        io.write_all(&headers(&fields)).await.unwrap();
        settle().await;
        assert_eq!(*called.lock(), None, "{fields:?}");
    }
}

#[tokio::test]
async fn orig_proto_carries_http1_between_two_proxies() {
    // Inner: serves HTTP/2, restores HTTP/1, forwards to the application.
    let (app, mut app_far) = Pipes::new();
    let app = Client::new(ClientConfig::default(), app, false);
    let inner = service(move |mut req| {
        let app = app.clone();
        async move {
            let carried = orig_proto::restore_request(&mut req);
            let mut rsp = app.send(req).await.unwrap();
            if carried.is_some() {
                orig_proto::upgrade_response(&mut rsp);
            }
            Ok(rsp)
        }
    });
    // Outer: serves HTTP/1, carries it over HTTP/2.
    let (pipes, mut far) = Pipes::new();
    let client = Client::new(ClientConfig::default(), pipes, false);
    let outer = service(move |mut req| {
        let client = client.clone();
        async move {
            let carried = orig_proto::upgrade_request(&mut req).unwrap();
            let mut rsp = client.send(req).await.unwrap();
            orig_proto::restore_response(&mut rsp, carried);
            Ok(rsp)
        }
    });
    let (mut io, _drain, _task) = served(ServerConfig::default(), Version::H1, outer);
    io.write_all(
        b"POST http://web/a HTTP/1.1\r\nHost: other\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
    )
    .await
    .unwrap();
    let far = far.recv().await.unwrap();
    let (_signal, watch) = drain::channel();
    tokio::spawn(async move { serve(&ServerConfig::default(), Version::H2, far, inner, watch).await });
    let mut app = app_far.recv().await.unwrap();
    let wire = read_until(&mut app, "0\r\n\r\n").await;
    assert_eq!(
        wire,
        "POST http://web/a HTTP/1.1\r\nhost: web\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"
    );
    app.write_all(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nDate: now\r\n\r\n2\r\nok\r\n0\r\n\r\n")
        .await
        .unwrap();
    assert_eq!(
        read_until(&mut io, "0\r\n\r\n").await,
        "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n"
    );
}

/// A connection that is given back in one thread while its task runs in another is neither lost nor used twice.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn connections_are_pooled_from_any_thread() {
    const CLIENTS: usize = 8;
    const REQUESTS: usize = 200;
    let (pipes, mut far) = Pipes::new();
    let client = Client::new(ClientConfig::default(), pipes.clone(), false);
    let peers = tokio::spawn(async move {
        let (_signal, watch) = drain::channel();
        while let Some(io) = far.recv().await {
            let watch = watch.clone();
            tokio::spawn(async move { serve(&ServerConfig::default(), Version::H1, io, echo(), watch).await });
        }
    });
    let clients: Vec<_> = (0..CLIENTS)
        .map(|c| {
            let client = client.clone();
            tokio::spawn(async move {
                for r in 0..REQUESTS {
                    let uri = format!("http://web/{c}/{r}");
                    let req = Request::post(&uri).header("host", "web").body(Body::full(uri.clone())).unwrap();
                    let text = text(client.send(req).await.unwrap()).await;
                    assert!(text.starts_with(&format!("POST {uri} ")) && text.ends_with(&format!("{uri:?}")), "{text}");
                }
            })
        })
        .collect();
    for client in clients {
        client.await.unwrap();
    }
    // A request may find its predecessor's connection not quite free.
    assert!(pipes.attempts() <= 4 * CLIENTS, "{} connections", pipes.attempts());
    peers.abort();
}
