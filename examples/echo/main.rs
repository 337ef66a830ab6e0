//! A small application: answers HTTP/1 and HTTP/2 with what it saw.
//!
//! `echo NAME ADDR [ADDR …]` listens on each address. `GET /anything` answers with the name, the method, the path and
//! the headers. `?delay=500ms` waits first (`ms` or `s`), `?status=503` answers with that status. A POST gets its body back.

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Either, Full};
use hyper::{body::Incoming, service::service_fn};
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto::Builder,
};
use std::{convert::Infallible, fmt::Write, process::ExitCode, sync::Arc, time::Duration};
use tokio::net::TcpListener;

type Body = Either<Full<Bytes>, Incoming>;

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let mut args = std::env::args().skip(1);
    let Some(name) = args.next() else {
        eprintln!("usage: echo NAME ADDR [ADDR ...]");
        return ExitCode::from(64);
    };
    let name: Arc<str> = name.into();
    let mut servers = Vec::new();
    for addr in args {
        match TcpListener::bind(&addr).await {
            Ok(listener) => servers.push(tokio::spawn(serve(listener, name.clone()))),
            Err(error) => {
                eprintln!("echo: cannot listen on {addr}: {error}");
                return ExitCode::FAILURE;
            }
        }
    }
    for server in servers {
        if server.await.is_err() {
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}

async fn serve(listener: TcpListener, name: Arc<str>) {
    loop {
        let Ok((io, _)) = listener.accept().await else { continue };
        let name = name.clone();
        tokio::spawn(async move {
            let service = service_fn(move |req| answer(name.clone(), req));
            // A client that goes away in the middle is nobody's error here.
            let _ = Builder::new(TokioExecutor::new()).serve_connection_with_upgrades(TokioIo::new(io), service).await;
        });
    }
}

async fn answer(name: Arc<str>, req: Request<Incoming>) -> Result<Response<Body>, Infallible> {
    let param = |key: &str| {
        let pairs = req.uri().query()?.split('&').filter_map(|pair| pair.split_once('='));
        pairs.filter(|(k, _)| *k == key).map(|(_, v)| v.to_string()).next()
    };
    if let Some(delay) = param("delay").as_deref().and_then(duration) {
        tokio::time::sleep(delay).await;
    }
    let status = param("status").and_then(|s| s.parse().ok()).unwrap_or(StatusCode::OK);
    let mut rsp = if req.method() == Method::POST {
        Response::new(Either::Right(req.into_body()))
    } else {
        let mut text = format!("{name}: {} {}\n", req.method(), req.uri().path());
        for (header, value) in req.headers() {
            // Writing to a String cannot fail.
            let _ = writeln!(text, "  {header}: {}", value.to_str().unwrap_or("(not text)"));
        }
        let _ = req.into_body().collect().await;
        Response::new(Either::Left(Full::new(text.into())))
    };
    *rsp.status_mut() = status;
    Ok(rsp)
}

fn duration(text: &str) -> Option<Duration> {
    match text.strip_suffix("ms") {
        Some(ms) => ms.parse().ok().map(Duration::from_millis),
        None => text.strip_suffix('s')?.parse().ok().map(Duration::from_secs),
    }
}
