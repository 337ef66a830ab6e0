//! An application that a request tells how to answer, attempt by attempt: `x-script: 503,200` with `x-id: a` answers the
//! first attempt of `a` with 503 and all later ones with 200. What it saw of each attempt is kept.
//!
//! `N` answers with HTTP status N, `grpc:N` with trailers alone, `grpc+N` with a message and then trailers, `limited:S` with
//! 429 and `retry-after: S`; `hang` never answers; `slow:MS` answers late; `drip:MS:N` sends N frames, each after so long;
//! `stall` sends headers and one frame.

use crate::{apps::App, net::Pod};
use bytes::Bytes;
use futures_util::{StreamExt, stream};
use http::{HeaderMap, Request, Response};
use http_body_util::{BodyExt, Full, StreamBody, combinators::BoxBody};
use hyper::{
    body::{Frame, Incoming},
    service::service_fn,
};
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto::Builder,
};
use std::{
    convert::Infallible,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};
use tokio::net::TcpListener;

/// One attempt as it arrived.
#[derive(Clone, Debug)]
pub(crate) struct Attempt {
    pub(crate) id: String,
    pub(crate) at: Instant,
    pub(crate) body: usize,
    pub(crate) headers: HeaderMap,
}

/// A running application; its name is in `x-server` of every answer.
pub(crate) struct Scripted {
    seen: Arc<Mutex<Vec<Attempt>>>,
    _app: App,
}

impl Scripted {
    pub(crate) fn new(pod: &Pod, port: u16, name: &'static str) -> Self {
        let seen = Arc::<Mutex<Vec<Attempt>>>::default();
        let task = tokio::spawn(serve(pod.listen(port), name, seen.clone()));
        Self { seen, _app: App::of(task.abort_handle()) }
    }

    pub(crate) fn attempts(&self, id: &str) -> Vec<Attempt> {
        self.seen.lock().unwrap().iter().filter(|attempt| attempt.id == id).cloned().collect()
    }

    /// All attempts of all requests.
    pub(crate) fn count(&self) -> usize {
        self.seen.lock().unwrap().len()
    }
}

async fn serve(listener: TcpListener, name: &'static str, seen: Arc<Mutex<Vec<Attempt>>>) {
    loop {
        let Ok((io, _)) = listener.accept().await else { continue };
        let _ = io.set_nodelay(true);
        let seen = seen.clone();
        tokio::spawn(async move {
            let service = service_fn(move |req| answer(name, seen.clone(), req));
            let _ = Builder::new(TokioExecutor::new()).serve_connection(TokioIo::new(io), service).await;
        });
    }
}

type Body = BoxBody<Bytes, Infallible>;

async fn answer(
    name: &'static str,
    seen: Arc<Mutex<Vec<Attempt>>>,
    req: Request<Incoming>,
) -> Result<Response<Body>, hyper::Error> {
    let (head, body) = req.into_parts();
    let text = |name| head.headers.get(name).map_or_else(String::new, |v| v.to_str().unwrap().to_string());
    let (id, script) = (text("x-id"), text("x-script"));
    let at = Instant::now();
    let number = {
        let mut seen = seen.lock().unwrap();
        seen.push(Attempt { id: id.clone(), at, body: 0, headers: head.headers.clone() });
        seen.iter().filter(|attempt| attempt.id == id).count()
    };
    let body = body.collect().await?.to_bytes();
    if let Some(attempt) = seen.lock().unwrap().iter_mut().filter(|a| a.id == id).nth(number - 1) {
        attempt.body = body.len();
    }
    let steps: Vec<_> = script.split(',').collect();
    let mut rsp = step(steps[(number - 1).min(steps.len() - 1)]).await;
    rsp.headers_mut().insert("x-server", name.parse().unwrap());
    rsp.headers_mut().insert("x-attempt", number.into());
    Ok(rsp)
}

async fn step(step: &str) -> Response<Body> {
    let mut words = step.split([':', '+']);
    let word = words.next().unwrap_or_default();
    let numbers: Vec<u64> = words.map(|n| n.parse().unwrap()).collect();
    let ms = || Duration::from_millis(numbers[0]);
    match word {
        "hang" => std::future::pending().await,
        "slow" => {
            tokio::time::sleep(ms()).await;
            whole("slow")
        }
        "drip" => frames(numbers[1], ms()),
        "stall" => framed(stream::iter([data()]).chain(stream::pending())),
        "grpc" => grpc(step.contains('+'), numbers[0]),
        "limited" => {
            let mut rsp = status(429);
            rsp.headers_mut().insert("retry-after", numbers[0].into());
            rsp
        }
        "" => whole("ok"),
        code => status(code.parse().unwrap()),
    }
}

fn whole(text: &'static str) -> Response<Body> {
    Response::new(Full::from(text).boxed())
}

fn status(code: u16) -> Response<Body> {
    let mut rsp = whole("as scripted");
    *rsp.status_mut() = code.try_into().unwrap();
    rsp
}

fn data() -> Result<Frame<Bytes>, Infallible> {
    Ok(Frame::data(Bytes::from_static(b"drop\n")))
}

fn frames(n: u64, wait: Duration) -> Response<Body> {
    framed(stream::iter(0..n).then(move |_| async move {
        tokio::time::sleep(wait).await;
        data()
    }))
}

fn grpc(message: bool, code: u64) -> Response<Body> {
    let trailers = HeaderMap::from_iter([("grpc-status".parse().unwrap(), code.into())]);
    let message = message.then(|| Ok(Frame::data(Bytes::from_static(b"\0\0\0\0\x02hi"))));
    let mut rsp = framed(stream::iter(message.into_iter().chain([Ok(Frame::trailers(trailers))])));
    rsp.headers_mut().insert("content-type", "application/grpc".parse().unwrap());
    rsp
}

fn framed(stream: impl stream::Stream<Item = Result<Frame<Bytes>, Infallible>> + Send + Sync + 'static) -> Response<Body> {
    Response::new(BodyExt::boxed(StreamBody::new(stream)))
}
