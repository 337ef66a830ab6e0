//! Wire tests: bytes in, bytes out over in-memory pipes. `server` drives [`serve`] with raw bytes, `client` drives
//! [`Client`] against scripted peers, `pair` joins both.

mod client;
mod pair;
mod rest;
mod server;

use super::*;
use crate::{
    boxed::{BoxFuture, BoxService},
    drain,
    io::BoxedIo,
};
use ::http::{Request, Response};
use http_body_util::BodyExt;
use parking_lot::Mutex;
use std::{future::Future, sync::Arc, time::Duration};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, DuplexStream},
    sync::mpsc,
};

type Service = BoxService<Request<Body>, Response<Body>, Reset>;

/// Bytes that a pipe holds, more than any test writes without reading.
const PIPE: usize = 1 << 20;

fn service<F, R>(f: F) -> Service
where
    F: Fn(Request<Body>) -> R + Send + Sync + 'static,
    R: Future<Output = Result<Response<Body>, Reset>> + Send + 'static,
{
    BoxService::from_fn(f)
}

/// Answers with what it understood: method, URI, then Host, content-length and other headers of interest, then the
/// body in quotes, then trailers.
fn echo() -> Service {
    service(|req| async move {
        let (head, body) = req.into_parts();
        let mut text = format!("{} {} {:?}", head.method, head.uri, head.version);
        for name in ["host", "content-length", "transfer-encoding", "connection", "x"] {
            for value in head.headers.get_all(name) {
                text += &format!(" {name}={}", value.to_str().unwrap_or("?"));
            }
        }
        match body.collect().await {
            Ok(body) => {
                let trailers = body.trailers().cloned();
                text += &format!(" {:?}", String::from_utf8_lossy(&body.to_bytes()));
                for (name, value) in trailers.iter().flatten() {
                    text += &format!(" trailer {name}={}", value.to_str().unwrap_or("?"));
                }
            }
            Err(error) => text += &format!(" {error:?}"),
        }
        Ok(Response::new(Body::full(text)))
    })
}

/// The near end of a connection that `service` serves, and what it ended with.
fn served(
    config: ServerConfig,
    version: Version,
    service: Service,
) -> (DuplexStream, drain::Signal, tokio::task::JoinHandle<Result<(), ServeError>>) {
    let (near, far) = tokio::io::duplex(PIPE);
    let (signal, watch) = drain::channel();
    let task = tokio::spawn(async move { serve(&config, version, far, service, watch).await });
    (near, signal, task)
}

/// Everything until the end, without `date` lines.
async fn read_all(io: &mut (impl tokio::io::AsyncRead + Unpin)) -> String {
    let mut bytes = Vec::new();
    // A reset counts as an end.
    let _ = io.read_to_end(&mut bytes).await;
    undated(&bytes)
}

/// What can be read up to and including `end`.
async fn read_until(io: &mut (impl tokio::io::AsyncRead + Unpin), end: &str) -> String {
    let mut bytes = Vec::new();
    while !bytes.ends_with(end.as_bytes()) {
        let Ok(byte) = io.read_u8().await else { panic!("ended after {:?}", String::from_utf8_lossy(&bytes)) };
        bytes.push(byte);
    }
    undated(&bytes)
}

fn undated(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    text.split_inclusive("\r\n").filter(|line| !line.starts_with("date: ")).collect()
}

/// Hands out pipes; the test gets their far ends.
#[derive(Clone)]
struct Pipes {
    far: mpsc::UnboundedSender<DuplexStream>,
    /// Error for the next attempts, from the last to the first.
    errors: Arc<Mutex<Vec<&'static str>>>,
    attempts: Arc<Mutex<Vec<Option<Version>>>>,
}

impl Pipes {
    fn new() -> (Self, mpsc::UnboundedReceiver<DuplexStream>) {
        let (far, rx) = mpsc::unbounded_channel();
        (Self { far, errors: Arc::default(), attempts: Arc::default() }, rx)
    }

    fn attempts(&self) -> usize {
        self.attempts.lock().len()
    }
}

impl Connect for Pipes {
    type Error = &'static str;

    fn connect(&self, session: Option<Version>) -> BoxFuture<Result<BoxedIo, Self::Error>> {
        let this = self.clone();
        Box::pin(async move {
            this.attempts.lock().push(session);
            if let Some(error) = this.errors.lock().pop() {
                return Err(error);
            }
            tokio::task::yield_now().await;
            let (near, far) = tokio::io::duplex(PIPE);
            this.far.send(far).map_err(|_| "no peer")?;
            Ok(Box::new(near) as BoxedIo)
        })
    }
}

async fn text(rsp: Response<Body>) -> String {
    String::from_utf8_lossy(&rsp.into_body().collect().await.unwrap().to_bytes()).into_owned()
}

/// Lets every task run until it waits for something.
async fn settle() {
    for _ in 0..100 {
        tokio::task::yield_now().await;
    }
}
