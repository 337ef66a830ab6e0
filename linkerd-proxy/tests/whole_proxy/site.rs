//! A client with a proxy, three plain backends, and requests and answers written as text, for tables of cases that share one
//! world.

use crate::{
    apps::{self, App},
    net::Pod,
    world::{World, service},
};
use bytes::Bytes;
use http::{HeaderMap, Request};
use http_body_util::Full;
use std::{fmt::Write as _, net::SocketAddr, time::Duration};
use tokio::{io::AsyncWriteExt, time::timeout};

/// The pods `one`, `two` and `three` are each behind the Service of their name: HTTP on port 80, and on port 90 bytes: a
/// greeting that is the pod's name, then an echo.
pub(crate) struct Site {
    pub(crate) world: World,
    pub(crate) client: Pod,
    pub(crate) http: Vec<App>,
    _bytes: Vec<App>,
}

pub(crate) const BACKENDS: [&str; 3] = ["one", "two", "three"];

/// Routes, in whose text SVC stands for a Service of their own with the replicas of `one`, what is asked of it, and lines
/// that the answer has.
pub(crate) struct Case {
    pub(crate) what: &'static str,
    pub(crate) routes: &'static str,
    pub(crate) asks: &'static [(&'static str, &'static [&'static str])],
}

impl Site {
    /// None where namespaces can't be made.
    pub(crate) async fn new(test: &str, manifests: &str, env: &[(&str, &str)]) -> Option<Self> {
        Self::with_args(test, manifests, env, &[]).await
    }

    /// With further arguments of the client's proxy.
    pub(crate) async fn with_args(test: &str, manifests: &str, env: &[(&str, &str)], args: &[&str]) -> Option<Self> {
        let mut world = World::new(test)?;
        world.args.extend(args.iter().map(ToString::to_string));
        let client = world.meshed("client", &[], &[]);
        let (mut http, mut bytes) = (Vec::new(), Vec::new());
        for (i, name) in BACKENDS.into_iter().enumerate() {
            let pod = world.plain(name, &[]);
            world.manifest(name, &plain_service(name, name, &format!("10.96.1.{}", i + 1)));
            http.push(apps::http(&pod, 8080, name));
            bytes.push(apps::server_first(&pod, 9000, name));
        }
        world.manifest("routes", manifests);
        world.spawn("client", env);
        world.wait_ready("client").await;
        Some(Self { world, client, http, _bytes: bytes })
    }

    /// Runs all cases in one world, and fails with every line that is not as expected.
    pub(crate) async fn check(test: &str, cases: &[Case]) -> Option<Self> {
        let site = Self::new(test, &manifests(cases), &[]).await?;
        let mut wrong = String::new();
        for (i, case) in cases.iter().enumerate() {
            for (ask, lines) in case.asks {
                site.compare(case_addr(i, 80), case.what, ask, lines, &mut wrong).await;
            }
        }
        assert!(wrong.is_empty(), "{wrong}\n{}", site.world.logs());
        Some(site)
    }

    /// Adds to `wrong` what an answer lacks of its lines; a line that begins with `!` must be the beginning of none.
    pub(crate) async fn compare(&self, to: SocketAddr, what: &str, ask: &str, lines: &[&str], wrong: &mut String) {
        let told = self.ask(to, ask).await;
        let holds = |line: &&str| match line.strip_prefix('!') {
            Some(start) => !told.iter().any(|l| l.starts_with(start)),
            None => told.iter().any(|l| l == line),
        };
        if !lines.iter().all(holds) {
            let _ = writeln!(wrong, "{what}: {ask}\n  wanted {lines:?}\n  got    {told:?}");
        }
    }

    /// `[h2|grpc] METHOD TARGET | header: value | ...` on a connection of its own. The answer as lines: status, headers,
    /// trailers, body.
    pub(crate) async fn ask(&self, to: SocketAddr, text: &str) -> Vec<String> {
        let mut fields = text.split(" | ");
        let mut words: Vec<_> = fields.next().unwrap().split(' ').collect();
        let kind = if matches!(words[0], "h2" | "grpc") { words.remove(0) } else { "h1" };
        let mut headers: Vec<_> = fields.map(|f| f.split_once(": ").unwrap()).collect();
        let host = headers.iter().find(|h| h.0 == "host").map_or("web.shop", |h| h.1);
        let mut req = Request::builder().method(words[0]);
        if kind == "h1" {
            req = req.uri(words[1]).header("host", host);
        } else {
            req = req.uri(format!("http://{host}{}", words[1]));
        }
        headers.retain(|h| h.0 != "host");
        if kind == "grpc" {
            headers.extend([("content-type", "application/grpc"), ("te", "trailers")]);
        }
        for (name, value) in headers {
            req = req.header(name, value);
        }
        let req = req.body(Full::<Bytes>::default()).unwrap();
        let answered = if kind == "h1" {
            apps::http1(&self.client, to).await.send_request(req).await
        } else {
            apps::http2(&self.client, to).await.send_request(req).await
        };
        let answer = match answered {
            Ok(rsp) => apps::read(rsp).await.unwrap_or_else(|e| panic!("{text}: {e}")),
            Err(error) => return vec![format!("no answer: {error}")],
        };
        let fields = |map: &HeaderMap| {
            map.iter().map(|(n, v)| format!("{n}: {}", v.to_str().unwrap_or("?"))).collect::<Vec<_>>()
        };
        let mut lines = vec![answer.status.as_str().to_string()];
        lines.extend(fields(&answer.headers));
        lines.extend(fields(&answer.trailers));
        lines.extend(answer.body.lines().map(str::to_string));
        lines
    }

    /// What greets a client that sends these bytes; `closed` or `reset` if nothing does.
    pub(crate) async fn greeting(&self, to: SocketAddr, bytes: &[u8]) -> String {
        let mut io = self.client.connect(to).await.unwrap();
        let _ = io.write_all(bytes).await;
        let mut buf = [0; 64];
        let read = tokio::io::AsyncReadExt::read(&mut io, &mut buf);
        match timeout(Duration::from_secs(15), read).await.expect("an answer or an end") {
            Ok(0) => "closed".into(),
            // Its echo may follow.
            Ok(n) => buf[..n].iter().map(|b| char::from(*b)).take_while(char::is_ascii_lowercase).collect(),
            Err(_) => "reset".into(),
        }
    }
}

/// The Service of a case.
pub(crate) fn case_addr(index: usize, port: u16) -> SocketAddr {
    (std::net::Ipv4Addr::new(10, 96, 2, u8::try_from(index + 1).expect("few cases")), port).into()
}

fn manifests(cases: &[Case]) -> String {
    let mut all = Vec::new();
    for (i, case) in cases.iter().enumerate() {
        let name = format!("case-{i}");
        all.push(plain_service(&name, "one", &case_addr(i, 80).ip().to_string()));
        all.push(case.routes.replace("SVC", &name));
    }
    all.join("---\n")
}

fn plain_service(name: &str, selects: &str, ip: &str) -> String {
    service(name, selects, &[ip], &[("http", 80, "8080", None), ("bytes", 90, "9000", None)])
}
