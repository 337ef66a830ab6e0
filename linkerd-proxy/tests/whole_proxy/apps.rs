//! Applications and clients: real HTTP/1 and HTTP/2 by hyper, and raw bytes.

use crate::net::Pod;
use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full, StreamBody, combinators::BoxBody};
use hyper::{
    body::{Frame, Incoming},
    client::conn::{http1, http2},
    service::service_fn,
};
use hyper_util::rt::{TokioExecutor, TokioIo};
use std::{
    convert::Infallible,
    fmt::Write as _,
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::Duration,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    task::AbortHandle,
};

pub(crate) type Body = BoxBody<Bytes, Infallible>;

/// A server task that ends on drop.
pub(crate) struct App {
    task: AbortHandle,
    seen: Arc<Mutex<Vec<String>>>,
}

impl App {
    /// The requests that came, as `METHOD URI`; nothing of servers that are not HTTP's.
    pub(crate) fn seen(&self) -> Vec<String> {
        self.seen.lock().unwrap().clone()
    }
}

impl Drop for App {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// What an answer says.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) body: String,
    pub(crate) trailers: HeaderMap,
}

/// HTTP/1 and HTTP/2 by what the client speaks. Answers with `NAME METHOD PATH`, its name in `x-app`, the HTTP version in
/// `x-version`, the client identity it was told in `x-client-id`, `x-test` and `traceparent` as `x-seen-..`; `/sleep/MS` waits
/// first; `/status/N` answers so; below `/headers` it adds the request's query, authority and headers, one a line; gRPC
/// requests get trailers, with code N for `/fail/N`.
pub(crate) fn http(pod: &Pod, port: u16, name: &'static str) -> App {
    let seen = Arc::<Mutex<Vec<String>>>::default();
    let log = seen.clone();
    let task = serve(pod, port, move |req| {
        log.lock().unwrap().push(format!("{} {}", req.method(), req.uri()));
        answer(name, req)
    });
    App { task, seen }
}

/// Serves HTTP/1 and HTTP/2 by what the client speaks. A request that is answered with an error loses its connection.
pub(crate) fn serve<F, E>(
    pod: &Pod,
    port: u16,
    answer: impl Fn(Request<Incoming>) -> F + Clone + Send + 'static,
) -> AbortHandle
where
    F: Future<Output = Result<Response<Body>, E>> + Send + 'static,
    E: std::error::Error + Send + Sync + 'static,
{
    let listener = pod.listen(port);
    let task = tokio::spawn(async move {
        loop {
            let Ok((io, _)) = listener.accept().await else { continue };
            let service = service_fn(answer.clone());
            tokio::spawn(async move {
                let mut start = [0; 4];
                let http2 = matches!(io.peek(&mut start).await, Ok(4)) && &start == b"PRI ";
                if http2 {
                    let mut builder = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
                    builder.max_header_list_size(1 << 20);
                    let _ = builder.serve_connection(TokioIo::new(io), service).await;
                } else {
                    let builder = hyper::server::conn::http1::Builder::new();
                    let _ = builder.serve_connection(TokioIo::new(io), service).with_upgrades().await;
                }
            });
        }
    });
    task.abort_handle()
}

async fn answer(name: &'static str, mut req: Request<Incoming>) -> Result<Response<Body>, Infallible> {
    let path = req.uri().path().to_string();
    if let Some(ms) = path.strip_prefix("/sleep/").and_then(|ms| ms.parse().ok()) {
        tokio::time::sleep(Duration::from_millis(ms)).await;
    }
    if req.headers().get("upgrade").is_some_and(|v| v == "websocket") {
        let upgrade = hyper::upgrade::on(&mut req);
        tokio::spawn(async move {
            let Ok(io) = upgrade.await else { return };
            let (mut rd, mut wr) = tokio::io::split(TokioIo::new(io));
            let _ = tokio::io::copy(&mut rd, &mut wr).await;
        });
        let mut rsp = Response::new(Full::default().boxed());
        *rsp.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
        rsp.headers_mut().insert("upgrade", HeaderValue::from_static("websocket"));
        rsp.headers_mut().insert("connection", HeaderValue::from_static("upgrade"));
        return Ok(rsp);
    }
    let version = format!("{:?}", req.version());
    let client = req.headers().get("l5d-client-id").cloned();
    let seen = ["x-test", "traceparent"].map(|name| (name, req.headers().get(name).cloned()));
    let grpc = req.headers().get("content-type").is_some_and(|v| v == "application/grpc");
    let mut text = format!("{name} {} {path}", req.method());
    if path.starts_with("/headers") {
        let authority = req.uri().authority().map(ToString::to_string).unwrap_or_default();
        let _ = write!(text, "\nquery: {}\nauthority: {authority}", req.uri().query().unwrap_or_default());
        for (name, value) in req.headers() {
            let _ = write!(text, "\n{name}: {}", value.to_str().unwrap_or("?"));
        }
    }
    let sent = req.into_body().collect().await.map(|b| b.to_bytes()).unwrap_or_default();
    let body = if sent.is_empty() { Bytes::from(text) } else { sent };
    let mut rsp = if grpc {
        let code = path.strip_prefix("/fail/").unwrap_or("0");
        let trailers = HeaderMap::from_iter([("grpc-status".parse().unwrap(), HeaderValue::from_str(code).unwrap())]);
        let frames = [Ok(Frame::data(body)), Ok(Frame::trailers(trailers))];
        let mut rsp = Response::new(BoxBody::new(StreamBody::new(futures_util::stream::iter(frames))));
        rsp.headers_mut().insert("content-type", HeaderValue::from_static("application/grpc"));
        rsp
    } else {
        Response::new(Full::new(body).boxed())
    };
    if let Some(status) = path.strip_prefix("/status/").and_then(|code| code.parse().ok()) {
        *rsp.status_mut() = status;
    }
    rsp.headers_mut().insert("x-version", version.parse().unwrap());
    rsp.headers_mut().insert("x-app", HeaderValue::from_static(name));
    if let Some(client) = client {
        rsp.headers_mut().insert("x-client-id", client);
    }
    for (name, value) in seen {
        if let Some(value) = value {
            let name = format!("x-seen-{}", name.trim_start_matches("x-"));
            rsp.headers_mut().insert(http::HeaderName::try_from(name).unwrap(), value);
        }
    }
    Ok(rsp)
}

/// Echoes bytes.
pub(crate) fn tcp_echo(pod: &Pod, port: u16) -> App {
    tcp(pod, port, "")
}

/// Greets first, then echoes.
pub(crate) fn server_first(pod: &Pod, port: u16, greeting: &'static str) -> App {
    tcp(pod, port, greeting)
}

fn tcp(pod: &Pod, port: u16, greeting: &'static str) -> App {
    let listener = pod.listen(port);
    let task = tokio::spawn(async move {
        loop {
            let Ok((mut io, _)) = listener.accept().await else { continue };
            tokio::spawn(async move {
                let _ = io.write_all(greeting.as_bytes()).await;
                let (mut rd, mut wr) = io.split();
                let _ = tokio::io::copy(&mut rd, &mut wr).await;
                let _ = wr.shutdown().await;
            });
        }
    });
    App { task: task.abort_handle(), seen: Arc::default() }
}

/// An HTTP/1.1 connection.
pub(crate) async fn http1(pod: &Pod, addr: SocketAddr) -> http1::SendRequest<Full<Bytes>> {
    let io = pod.connect(addr).await.expect("a connection");
    let (send, conn) = http1::handshake(TokioIo::new(io)).await.expect("a handshake");
    tokio::spawn(conn.with_upgrades());
    send
}

/// An HTTP/2 connection with prior knowledge.
pub(crate) async fn http2(pod: &Pod, addr: SocketAddr) -> http2::SendRequest<Full<Bytes>> {
    let io = pod.connect(addr).await.expect("a connection");
    let (send, conn) = http2::handshake(TokioExecutor::new(), TokioIo::new(io)).await.expect("a handshake");
    tokio::spawn(conn);
    send
}

/// One gRPC call on a connection of its own: its HTTP status and `grpc-status`, wherever that was.
pub(crate) async fn grpc(pod: &Pod, addr: SocketAddr, path: &str) -> (StatusCode, String) {
    let mut send = http2(pod, addr).await;
    let req = Request::post(format!("http://web.shop{path}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(Full::new(Bytes::from_static(b"\0\0\0\0\x02hi")));
    let answer = read(send.send_request(req.unwrap()).await.expect("an answer")).await.expect("a whole answer");
    let status = answer.headers.get("grpc-status").or_else(|| answer.trailers.get("grpc-status"));
    (answer.status, status.map_or_else(String::new, |s| s.to_str().unwrap_or_default().to_string()))
}

/// A TLS ClientHello for a name, as short as one can be.
pub(crate) fn client_hello(name: &str) -> Vec<u8> {
    let name = name.as_bytes();
    let n = u8::try_from(name.len()).unwrap();
    let mut sni = vec![0, 0, 0, n + 5, 0, n + 3, 0, 0, n];
    sni.extend(name);
    let mut body = vec![3, 3];
    body.extend([7; 32]);
    body.extend([0, 0, 2, 0x13, 0x01, 1, 0]);
    body.extend([0, u8::try_from(sni.len()).unwrap()]);
    body.extend(sni);
    let n = u8::try_from(body.len()).unwrap();
    [&[22, 3, 1, 0, n + 4, 1, 0, 0, n][..], &body].concat()
}

/// Sends bytes on a connection of its own: what comes back until as many bytes came, or the connection ended.
pub(crate) async fn send_bytes(pod: &Pod, addr: SocketAddr, bytes: &[u8]) -> Vec<u8> {
    let mut io = pod.connect(addr).await.expect("a connection");
    let _ = io.write_all(bytes).await;
    let mut back = Vec::new();
    let read = async {
        while back.len() < bytes.len() {
            match io.read_buf(&mut back).await {
                Ok(n) if n > 0 => {}
                _ => break,
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(15), read).await.expect("an answer or an end");
    back
}

/// One GET on a connection of its own.
pub(crate) async fn get(
    pod: &Pod,
    addr: SocketAddr,
    path: &str,
    headers: &[(&str, &str)],
) -> Result<Answer, hyper::Error> {
    let mut send = http1(pod, addr).await;
    let mut req = Request::get(path).header("host", "web.shop.svc.cluster.local");
    for (name, value) in headers {
        req = req.header(*name, *value);
    }
    read(send.send_request(req.body(Full::default()).unwrap()).await?).await
}

pub(crate) async fn read(rsp: Response<Incoming>) -> Result<Answer, hyper::Error> {
    let (head, body) = rsp.into_parts();
    let body = body.collect().await?;
    let trailers = body.trailers().cloned().unwrap_or_default();
    let body = String::from_utf8_lossy(&body.to_bytes()).into_owned();
    Ok(Answer { status: head.status, headers: head.headers, body, trailers })
}

/// Reads exactly as many bytes as the text has, within a few seconds.
pub(crate) async fn expect_text(io: &mut (impl AsyncReadExt + Unpin), text: &str) {
    expect_bytes(io, text.as_bytes()).await;
}

/// Reads exactly these bytes, within a few seconds.
pub(crate) async fn expect_bytes(io: &mut (impl AsyncReadExt + Unpin), bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    let mut buf = vec![0; bytes.len()];
    tokio::time::timeout(Duration::from_secs(5), io.read_exact(&mut buf))
        .await
        .unwrap_or_else(|_| panic!("{text:?} did not come"))
        .unwrap_or_else(|e| panic!("{text:?} did not come: {e}"));
    assert_eq!(String::from_utf8_lossy(&buf), text);
}
