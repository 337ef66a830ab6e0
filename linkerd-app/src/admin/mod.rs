//! The operator's port: probes, metrics, log level, environment, shutdown, and a page that shows the proxy's own truth
//! (contract.md 2, behaviour.md C.13).
//!
//! [`Admin`] answers requests, [`Server`] accepts connections for it. Its answers are computed from what is handed over when
//! it is made, so that it depends on no other room.

mod page;
mod serve;

pub use self::serve::Server;

use crate::{
    error::Error,
    http::rescue::L5D_PROXY_ERROR,
    telemetry::{Condition, Telemetry, log},
};
use bytes::Bytes;
use flate2::{Compression, write::GzEncoder};
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Limited};
use linkerd_stack::{BoxService, Ready, http::Body};
use parking_lot::RwLock;
use std::{
    collections::BTreeMap,
    fmt,
    io::Write as _,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};
use tokio::sync::mpsc;

/// Largest filter that may be PUT, bytes: far more than a person writes.
const MAX_FILTER: usize = 64 * 1024;
/// Names of variables of others whose values are shown to this host alone.
const SECRET_WORDS: [&str; 5] = ["SECRET", "TOKEN", "PASSWORD", "PASSWD", "KEY"];
/// Variables of the proxy itself, which hold no secrets: tokens and keys are named by path.
const OWN_PREFIX: &str = "LINKERD2_PROXY_";

/// What the admin server is made from.
pub struct Options {
    /// Set once the first certificate is installed (contract.md 2.3).
    pub ready: Ready,
    /// Metrics and health.
    pub telemetry: Telemetry,
    /// The log filter.
    pub log: log::Handle,
    /// The environment as it was when the process started.
    pub env: BTreeMap<String, String>,
    /// Begins the drain; none when `/shutdown` is not enabled. Of capacity 1: a second shutdown finds it taken.
    pub shutdown: Option<mpsc::Sender<()>>,
    /// What `/` shows.
    pub panels: Panels,
}

/// Snapshots for `/` and its JSON twins, by name. Clones are the same.
#[derive(Clone, Default)]
pub struct Panels(Arc<RwLock<BTreeMap<&'static str, Panel>>>);

type Panel = Box<dyn Fn() -> serde_json::Value + Send + Sync>;

impl Panels {
    /// Adds or replaces a panel. `snapshot` is called when somebody looks; it must be cheap and must not wait. `name` is a
    /// lower-case word: it stands in the path `/status/<name>.json`.
    pub fn add(&self, name: &'static str, snapshot: impl Fn() -> serde_json::Value + Send + Sync + 'static) {
        self.0.write().insert(name, Box::new(snapshot));
    }

    fn get(&self, name: &str) -> Option<serde_json::Value> {
        self.0.read().get(name).map(|panel| panel())
    }

    fn all(&self) -> BTreeMap<&'static str, serde_json::Value> {
        self.0.read().iter().map(|(name, panel)| (*name, panel())).collect()
    }
}

impl fmt::Debug for Panels {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.0.read().keys()).finish()
    }
}

/// Answers the operator.
pub struct Admin(Options);

impl Admin {
    /// Answers from what is handed over.
    pub fn new(options: Options) -> Arc<Self> {
        Arc::new(Self(options))
    }

    /// The requests of one client. Never fails; the error type is that of the stages around it.
    pub fn service(self: &Arc<Self>, client: SocketAddr) -> BoxService<Request<Body>, Response<Body>, Error> {
        let this = self.clone();
        BoxService::from_fn(move |req| {
            let this = this.clone();
            async move { Ok(this.answer(client, req).await) }
        })
    }

    /// Answers one request.
    pub async fn answer(&self, client: SocketAddr, req: Request<Body>) -> Response<Body> {
        match req.uri().path() {
            "/live" => text(StatusCode::OK, "live\n"),
            "/ready" => self.ready(req.uri().query()),
            "/metrics" => metrics(req.headers(), &self.0.telemetry.render()),
            "/env.json" => self.env(client, &req),
            "/proxy-log-level" => self.log_level(client, req).await,
            "/shutdown" => self.shutdown(client, req.method()),
            "/" => page::html(self),
            "/status.json" => json(StatusCode::OK, &serde_json::json!(self.status())),
            path => match path.strip_prefix("/status/").and_then(|p| p.strip_suffix(".json")) {
                Some(name) => match self.panel(name) {
                    Some(value) => json(StatusCode::OK, &value),
                    None => empty(StatusCode::NOT_FOUND),
                },
                None => empty(StatusCode::NOT_FOUND),
            },
        }
    }

    /// Plain `/ready` depends on the first certificate alone; a 503 says in a header why there is none, as far as that is
    /// known. `?verbose` adds what else an operator should know, and does not change the status.
    fn ready(&self, query: Option<&str>) -> Response<Body> {
        let ready = self.0.ready.get();
        let mut body = if ready { "ready\n" } else { "not ready\n" }.to_string();
        let verbose = query.is_some_and(|q| q.split('&').any(|word| word == "verbose" || word.starts_with("verbose=")));
        if verbose {
            body.push_str(if ready { "[+] certificate\n" } else { "[-] certificate: none has been installed yet\n" });
            for (condition, problem) in self.0.telemetry.health().problems() {
                body.push_str(&format!("[-] {}: {problem}\n", condition.as_str()));
            }
        }
        if ready {
            return text(StatusCode::OK, body);
        }
        let mut response = Response::new(Body::full(body));
        *response.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
        let problems = self.0.telemetry.health().problems();
        let why = problems.iter().find(|(condition, _)| *condition == Condition::CertificateFailing);
        let why = why.map_or("waiting for the first certificate", |(_, problem)| problem.as_str());
        // Other people's words may hold what a header may not.
        let why: String = why.chars().map(|c| if c.is_ascii_graphic() { c } else { ' ' }).collect();
        if let Ok(why) = HeaderValue::try_from(why) {
            response.headers_mut().insert(L5D_PROXY_ERROR, why);
        }
        response
    }

    /// The whole environment, or the variables named in the query.
    fn env(&self, client: SocketAddr, req: &Request<Body>) -> Response<Body> {
        if req.method() != Method::GET {
            return not_allowed(&[Method::GET]);
        }
        match accepts_json(req.headers()) {
            Accepts::Yes => {}
            Accepts::No => return answer(StatusCode::NOT_ACCEPTABLE, None, "application/json"),
            Accepts::NotText => return bad_request("the Accept header is no text"),
        }
        let shown = |name: &str, value: &str| {
            let upper = name.to_ascii_uppercase();
            let secret = !name.starts_with(OWN_PREFIX) && SECRET_WORDS.iter().any(|word| upper.contains(word));
            if secret && !is_loopback(client.ip()) {
                serde_json::Value::from("(shown to localhost only)")
            } else {
                value.into()
            }
        };
        let vars: serde_json::Map<_, _> = match req.uri().query().filter(|q| !q.is_empty()) {
            None => self.0.env.iter().map(|(name, value)| (name.clone(), shown(name, value))).collect(),
            Some(query) if query.contains('=') => {
                return bad_request("the query is a list of names separated by `&`, without values");
            }
            Some(query) => query
                .split('&')
                .filter(|name| !name.is_empty())
                .map(|name| {
                    let value = self.0.env.get(name).map_or(serde_json::Value::Null, |value| shown(name, value));
                    (name.to_string(), value)
                })
                .collect(),
        };
        json(StatusCode::OK, &vars.into())
    }

    async fn log_level(&self, client: SocketAddr, req: Request<Body>) -> Response<Body> {
        if !is_loopback(client.ip()) {
            return forbidden();
        }
        let Some(filter) = self.0.log.filter() else { return empty(StatusCode::NOT_FOUND) };
        match *req.method() {
            Method::GET => answer(StatusCode::OK, None, filter),
            Method::PUT => {
                let Ok(body) = Limited::new(req.into_body(), MAX_FILTER).collect().await else {
                    return answer(StatusCode::BAD_REQUEST, None, format!("a filter has at most {MAX_FILTER} bytes"));
                };
                let body = body.to_bytes();
                let set = match std::str::from_utf8(&body) {
                    Ok(filter) => self.0.log.set_filter(filter).map_err(|error| error.to_string()),
                    Err(error) => Err(error.to_string()),
                };
                match set {
                    Ok(()) => {
                        tracing::info!(filter = %String::from_utf8_lossy(&body).trim(), "log filter replaced");
                        empty(StatusCode::NO_CONTENT)
                    }
                    Err(error) => answer(StatusCode::BAD_REQUEST, None, error),
                }
            }
            _ => not_allowed(&[Method::GET, Method::PUT]),
        }
    }

    fn shutdown(&self, client: SocketAddr, method: &Method) -> Response<Body> {
        if method != Method::POST {
            return not_allowed(&[Method::POST]);
        }
        if !is_loopback(client.ip()) {
            return forbidden();
        }
        match &self.0.shutdown {
            None => text(StatusCode::NOT_FOUND, "shutdown endpoint is not enabled\n"),
            Some(shutdown) => match shutdown.try_send(()) {
                Ok(()) => text(StatusCode::OK, "shutdown\n"),
                Err(_) => text(StatusCode::INTERNAL_SERVER_ERROR, "shutdown has begun already\n"),
            },
        }
    }

    /// Every panel, the proxy's own among them.
    fn status(&self) -> BTreeMap<&'static str, serde_json::Value> {
        let mut all = self.0.panels.all();
        all.insert("health", self.health());
        all
    }

    fn panel(&self, name: &str) -> Option<serde_json::Value> {
        if name == "health" { Some(self.health()) } else { self.0.panels.get(name) }
    }

    fn health(&self) -> serde_json::Value {
        let problems = self.0.telemetry.health().problems();
        let problems: Vec<_> = problems
            .into_iter()
            .map(|(condition, problem)| serde_json::json!({ "condition": condition.as_str(), "problem": problem }))
            .collect();
        serde_json::json!({ "ready": self.0.ready.get(), "problems": problems })
    }
}

/// The page, compressed when any `accept-encoding` has `gzip` in it.
fn metrics(headers: &HeaderMap, page: &str) -> Response<Body> {
    let has_gzip = |value: &HeaderValue| value.to_str().is_ok_and(|v| v.contains("gzip"));
    if !headers.get_all(header::ACCEPT_ENCODING).iter().any(has_gzip) {
        return text(StatusCode::OK, page.to_string());
    }
    // Fast: the page is mostly repetition, which any level finds.
    let mut gzip = GzEncoder::new(Vec::with_capacity(page.len() / 8), Compression::fast());
    match gzip.write_all(page.as_bytes()).and_then(|()| gzip.finish()) {
        Ok(body) => {
            let mut response = text(StatusCode::OK, body);
            response.headers_mut().insert(header::CONTENT_ENCODING, HeaderValue::from_static("gzip"));
            response
        }
        Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")),
    }
}

enum Accepts {
    Yes,
    No,
    NotText,
}

fn accepts_json(headers: &HeaderMap) -> Accepts {
    let mut values = headers.get_all(header::ACCEPT).iter().peekable();
    if values.peek().is_none() {
        return Accepts::Yes;
    }
    for value in values {
        let Ok(value) = std::str::from_utf8(value.as_bytes()) else { return Accepts::NotText };
        if ["application/json", "application/*", "*/*"].iter().any(|kind| value.contains(kind)) {
            return Accepts::Yes;
        }
    }
    Accepts::No
}

/// IPv4-mapped addresses count as IPv4.
fn is_loopback(ip: IpAddr) -> bool {
    ip.to_canonical().is_loopback()
}

fn answer(status: StatusCode, content_type: Option<&'static str>, body: impl Into<Bytes>) -> Response<Body> {
    let mut response = Response::new(Body::full(body));
    *response.status_mut() = status;
    if let Some(content_type) = content_type {
        response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    }
    response
}

fn text(status: StatusCode, body: impl Into<Bytes>) -> Response<Body> {
    answer(status, Some("text/plain"), body)
}

fn json(status: StatusCode, value: &serde_json::Value) -> Response<Body> {
    answer(status, Some("application/json"), value.to_string())
}

fn bad_request(error: &str) -> Response<Body> {
    json(StatusCode::BAD_REQUEST, &serde_json::json!({ "error": error, "status": 400 }))
}

fn empty(status: StatusCode) -> Response<Body> {
    let mut response = Response::new(Body::empty());
    *response.status_mut() = status;
    response
}

fn forbidden() -> Response<Body> {
    text(StatusCode::FORBIDDEN, "Requests are only permitted from localhost.")
}

/// One `allow` header per method.
fn not_allowed(methods: &[Method]) -> Response<Body> {
    let mut response = empty(StatusCode::METHOD_NOT_ALLOWED);
    for method in methods {
        // Standard methods are legal header values.
        if let Ok(value) = HeaderValue::from_str(method.as_str()) {
            response.headers_mut().append(header::ALLOW, value);
        }
    }
    response
}

#[cfg(test)]
mod tests;
#[cfg(test)]
mod wire;
