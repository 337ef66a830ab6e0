//! An application that a request tells how to answer, attempt by attempt: `x-script: 503,200` with `x-id: a` answers the
//! first attempt of `a` with 503 and all later ones with 200; `x-script-NAME` is for the server of that name alone. What it
//! saw of each attempt is kept. And a world of two of them, `one` and `two`, behind Services without a proxy of theirs.
//!
//! `N` answers with HTTP status N, `grpc:N` with trailers alone, `grpc!N` with the code in the headers, `limited:S` with 429
//! and `retry-after: S`; `hang` never answers; `slow:MS` answers late; `drip:MS:N` sends N frames, each after so long;
//! `stall` sends headers and one frame.

use crate::{
    apps::{self, Body},
    net::Pod,
    world::{NAMESPACE, World},
};
use bytes::Bytes;
use futures_util::{StreamExt, stream};
use http::{HeaderMap, Request, Response};
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use std::{
    convert::Infallible,
    net::{Ipv4Addr, SocketAddr},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};
use tokio::task::AbortHandle;

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
    seen: Seen,
    task: AbortHandle,
}

type Seen = Arc<Mutex<Vec<Attempt>>>;

impl Drop for Scripted {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Scripted {
    pub(crate) fn new(pod: &Pod, port: u16, name: &'static str) -> Self {
        let seen = Seen::default();
        let log = seen.clone();
        Self { seen, task: apps::serve(pod, port, move |req| answer(name, log.clone(), req)) }
    }

    pub(crate) fn attempts(&self, id: &str) -> Vec<Attempt> {
        self.seen.lock().unwrap().iter().filter(|attempt| attempt.id == id).cloned().collect()
    }

    /// All attempts of all requests.
    pub(crate) fn count(&self) -> usize {
        self.seen.lock().unwrap().len()
    }
}

async fn answer(name: &'static str, seen: Seen, req: Request<Incoming>) -> Result<Response<Body>, hyper::Error> {
    let (head, body) = req.into_parts();
    let text = |name: &str| head.headers.get(name).map_or_else(String::new, |v| v.to_str().unwrap().to_string());
    let id = text("x-id");
    let own = text(&format!("x-script-{name}"));
    let script = if own.is_empty() { text("x-script") } else { own };
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
    let mut words = step.split([':', '!']);
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
        "grpc" => grpc(step.contains('!'), numbers[0]),
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

fn grpc(in_headers: bool, code: u64) -> Response<Body> {
    let status = HeaderMap::from_iter([("grpc-status".parse().unwrap(), code.into())]);
    let mut rsp = if in_headers {
        let mut rsp = Response::new(Full::default().boxed());
        *rsp.headers_mut() = status;
        rsp
    } else {
        framed(stream::iter([Ok(Frame::trailers(status))]))
    };
    rsp.headers_mut().insert("content-type", "application/grpc".parse().unwrap());
    rsp
}

fn framed(
    stream: impl stream::Stream<Item = Result<Frame<Bytes>, Infallible>> + Send + Sync + 'static,
) -> Response<Body> {
    Response::new(BodyExt::boxed(StreamBody::new(stream)))
}

/// A client with a proxy and the applications `one` and `two` on port 8080 of pods without one.
pub(crate) struct Stage {
    pub(crate) world: World,
    pub(crate) client: Pod,
    pub(crate) one: Scripted,
    pub(crate) two: Scripted,
}

/// What a client says.
#[derive(Copy, Clone, Default)]
pub(crate) struct Ask<'a> {
    pub(crate) id: &'a str,
    pub(crate) script: &'a str,
    pub(crate) kind: Kind,
    /// Bytes of body.
    pub(crate) body: usize,
    pub(crate) headers: &'a [(&'a str, &'a str)],
}

#[derive(Copy, Clone, Default, PartialEq, Eq)]
pub(crate) enum Kind {
    #[default]
    Http1,
    Http2,
    Grpc,
}

/// What it is told.
#[derive(Debug)]
pub(crate) struct Told {
    pub(crate) status: u16,
    pub(crate) headers: HeaderMap,
    pub(crate) trailers: HeaderMap,
    /// The bytes that came, and how the body broke if it did.
    pub(crate) body: String,
    pub(crate) broke: Option<String>,
    pub(crate) took: Duration,
}

impl Told {
    pub(crate) fn header(&self, name: &str) -> &str {
        self.headers.get(name).or_else(|| self.trailers.get(name)).map_or("", |v| v.to_str().unwrap())
    }
}

impl Stage {
    /// None where namespaces can't be made. The client runs on the Node `node`; the n-th Service is named `sN`; ONE and TWO stand in the manifests for the
    /// applications' addresses.
    pub(crate) async fn new(test: &str, manifests: &str, env: &[(&str, &str)]) -> Option<Self> {
        let mut world = World::new(test)?;
        let client = world.meshed("client", &[], &[]);
        let path = world.manifests().join("pod-client.yaml");
        let pod = std::fs::read_to_string(path).unwrap().replace("spec:\n", "spec:\n  nodeName: node\n");
        world.manifest("pod-client", &pod);
        let (one, two) = (world.plain("one", &[]), world.plain("two", &[]));
        let (one, two) = (Scripted::new(&one, 8080, "one"), Scripted::new(&two, 8080, "two"));
        let mut stage = Self { world, client, one, two };
        stage.manifests(manifests);
        stage.world.spawn("client", env);
        stage.world.wait_ready("client").await;
        Some(stage)
    }

    /// Writes or replaces them.
    pub(crate) fn manifests(&self, manifests: &str) {
        let of = |name| self.world.pod(name).ip4.to_string();
        self.world.manifest("stage", &manifests.replace("ONE", &of("one")).replace("TWO", &of("two")));
    }

    pub(crate) async fn ask(&self, service: u8, ask: Ask<'_>) -> Told {
        ask.to(&self.client, address(service)).await
    }
}

/// Where the Service `sN` is.
pub(crate) fn address(service: u8) -> SocketAddr {
    (Ipv4Addr::new(10, 96, 3, service + 1), 80).into()
}

/// The Service `sN` with annotations, over endpoints that are written in YAML.
pub(crate) fn service(n: u8, annotations: &[(&str, &str)], endpoints: &[&str]) -> String {
    let ip = address(n).ip();
    let annotations: Vec<_> = annotations.iter().map(|(key, value)| format!("{key}: {value:?}")).collect();
    let annotations = annotations.join(", ");
    let service = format!(
        "apiVersion: v1
kind: Service
metadata: {{name: s{n}, namespace: {NAMESPACE}, annotations: {{{annotations}}}}}
spec: {{clusterIP: {ip}, ports: [{{name: http, port: 80, targetPort: 8080}}]}}
---
"
    );
    service + &slice(n, "only", "", endpoints)
}

/// Endpoints of `sN`; `weight` as the annotation.
pub(crate) fn slice(n: u8, name: &str, weight: &str, endpoints: &[&str]) -> String {
    let annotations = if weight.is_empty() { String::new() } else { format!("balancer.linkerd.io/weight: {weight:?}") };
    let endpoints = endpoints.join(", ");
    format!(
        "apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata:
  name: s{n}-{name}
  namespace: {NAMESPACE}
  labels: {{kubernetes.io/service-name: s{n}}}
  annotations: {{{annotations}}}
addressType: IPv4
ports: [{{name: http, port: 8080}}]
endpoints: [{endpoints}]
---
"
    )
}

/// An HTTPRoute on `sN` with one rule, to `sN`.
pub(crate) fn route(n: u8, rule: &str) -> String {
    format!(
        "apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {{name: s{n}, namespace: {NAMESPACE}}}
spec:
  parentRefs: [{{group: \"\", kind: Service, name: s{n}, port: 80}}]
  rules: [{{backendRefs: [{{name: s{n}, port: 80}}], {rule}}}]
---
"
    )
}

/// Longest exchange; only failures take so long.
const PATIENCE: Duration = Duration::from_secs(15);

pub(crate) const ONE: &[&str] = &["{addresses: [ONE]}"];
pub(crate) const BOTH: &[&str] = &["{addresses: [ONE]}", "{addresses: [TWO]}"];

impl Ask<'_> {
    /// On a connection of its own.
    pub(crate) async fn to(self, client: &Pod, addr: SocketAddr) -> Told {
        self.try_to(client, addr).await.unwrap_or_else(|error| panic!("{}: {error}", self.id))
    }

    /// Of an answer without a head, what took its place.
    pub(crate) async fn try_to(self, client: &Pod, addr: SocketAddr) -> Result<Told, String> {
        tokio::time::timeout(PATIENCE, self.exchange(client, addr)).await.unwrap_or(Err("no end of it".into()))
    }

    async fn exchange(self, client: &Pod, addr: SocketAddr) -> Result<Told, String> {
        let req = Request::builder().method(if self.body > 0 { "POST" } else { "GET" });
        let mut req = match self.kind {
            Kind::Http1 => req.uri("/").header("host", "web.shop"),
            Kind::Http2 => req.uri("http://web.shop/"),
            Kind::Grpc => {
                req.uri("http://web.shop/").header("content-type", "application/grpc").header("te", "trailers")
            }
        };
        for (name, value) in [("x-id", self.id), ("x-script", self.script)].iter().chain(self.headers) {
            req = req.header(*name, *value);
        }
        let req = req.body(Full::from(vec![b'x'; self.body])).unwrap();
        let started = Instant::now();
        let answered = match self.kind {
            Kind::Http1 => apps::http1(client, addr).await.send_request(req).await,
            Kind::Http2 | Kind::Grpc => apps::http2(client, addr).await.send_request(req).await,
        };
        let (head, mut body) = answered.map_err(|error| format!("{error:?}"))?.into_parts();
        let mut told = Told {
            status: head.status.as_u16(),
            headers: head.headers,
            trailers: HeaderMap::new(),
            body: String::new(),
            broke: None,
            took: Duration::ZERO,
        };
        while let Some(frame) = body.frame().await {
            match frame.map(Frame::into_data) {
                Ok(Ok(data)) => told.body.push_str(&String::from_utf8_lossy(&data)),
                Ok(Err(frame)) => told.trailers = frame.into_trailers().unwrap_or_default(),
                Err(error) => {
                    told.broke = Some(format!("{error:?}"));
                    break;
                }
            }
        }
        told.took = started.elapsed();
        Ok(told)
    }
}
