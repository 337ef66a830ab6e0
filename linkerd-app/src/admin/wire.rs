//! The admin port on a real socket: what is detected, what policy refuses, what probes get all the same.

use super::{tests::options, *};
use crate::{
    config::{self, env},
    inbound::Inbound,
    policy::ClientPolicy,
    policy::{
        Meta, ServerPolicy,
        authz::{Authentication, Authorization, Network},
        route::Precedence,
        server::{Protocol, Route},
        source::{DiscoveryError, Resolution, Source, Target},
    },
    telemetry::access::AccessLog,
    transport,
};
use futures_util::future::BoxFuture;
use linkerd_tls::{ca, identity, identity::Reader};
use std::time::Duration;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    sync::watch,
};

/// One policy for every port.
struct Fixed(Arc<ServerPolicy>);

impl Source for Fixed {
    fn watch_server(&self, _: u16) -> watch::Receiver<Arc<ServerPolicy>> {
        watch::channel(self.0.clone()).1
    }

    fn watch_client(
        &self,
        _: Target,
    ) -> BoxFuture<'static, Result<watch::Receiver<Arc<ClientPolicy>>, DiscoveryError>> {
        unreachable!("the admin server calls nobody")
    }

    fn resolve(&self, _: &str) -> Resolution {
        unreachable!("the admin server calls nobody")
    }
}

fn policy(authorizations: Vec<Authorization>) -> Arc<ServerPolicy> {
    let http = Arc::from([Route::implicit(authorizations)]);
    let protocol = Protocol::Detect { timeout: Duration::from_secs(10), http, tcp: Arc::from([]) };
    Arc::new(ServerPolicy { protocol, precedence: Precedence::Linkerd, meta: Meta::default("test"), rate_limit: None })
}

fn anybody() -> Authorization {
    Authorization {
        networks: Network::all(),
        authentication: Authentication::Unauthenticated,
        meta: Meta::default("all-unauthenticated"),
        audit: false,
    }
}

/// A reader with a certificate.
fn certified(name: &str) -> Reader {
    let dir = std::env::temp_dir().join(format!("admin-tests-{}-{name}", std::process::id()));
    ca::init(&dir, &ca::Init::default()).unwrap();
    let issuer = ca::Issuer::load(&dir).unwrap();
    std::fs::remove_dir_all(&dir).unwrap();
    let id: linkerd_tls::Id = name.parse().unwrap();
    let (mut writer, reader) =
        identity::channel(id.clone(), id.to_server_name().unwrap(), issuer.trust_anchors().clone());
    writer.set_certificate(issuer.issue(&id).unwrap()).unwrap();
    // Keeps the certificate for as long as the reader lives.
    std::mem::forget(writer);
    reader
}

/// An admin server under a policy; its address and telemetry.
async fn start(policy: Arc<ServerPolicy>, identity: Option<Reader>) -> (SocketAddr, Telemetry) {
    let config = env::parse(&|_| None, [], env::Mode::Standalone { explicit: true }).unwrap().config;
    let options = options();
    let telemetry = options.telemetry.clone();
    let source = Arc::new(Fixed(policy));
    let inbound = Inbound::new(
        &config.inbound,
        crate::gateway::tests::off(),
        None,
        source,
        telemetry.clone(),
        AccessLog::off(),
        4191,
    );
    let listen = config::Listen { addr: ([127, 0, 0, 1], 0).into(), ..config.admin.listen.clone() };
    let listener = transport::bind(&listen).unwrap();
    let addr = listener.local_addr();
    let server = Server {
        admin: Admin::new(options),
        guard: inbound.guard().clone(),
        identity,
        http: crate::http::settings::server(&config.inbound.http_server),
        telemetry: telemetry.clone(),
    };
    tokio::spawn(server.serve(listener));
    (addr, telemetry)
}

/// What comes back for these bytes until the server closes.
async fn exchange(mut io: impl linkerd_stack::Io, bytes: &[u8]) -> String {
    io.write_all(bytes).await.unwrap();
    let mut answer = Vec::new();
    // A refused connection may end in a reset.
    let _ = tokio::time::timeout(Duration::from_secs(30), io.read_to_end(&mut answer)).await.unwrap();
    String::from_utf8_lossy(&answer).into_owned()
}

async fn get(addr: SocketAddr, path: &str) -> String {
    let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
    exchange(TcpStream::connect(addr).await.unwrap(), request.as_bytes()).await
}

#[tokio::test]
async fn requests_are_authorized_and_counted() {
    let (addr, telemetry) = start(policy(vec![anybody()]), None).await;
    let answer = get(addr, "/metrics").await;
    assert!(answer.starts_with("HTTP/1.1 200 OK\r\n") && answer.contains("content-type: text/plain\r\n"), "{answer}");
    assert!(answer.contains("date: ") && answer.ends_with("# EOF\n"));
    let page = telemetry.render();
    for line in [
        format!("request_total{{direction=\"inbound\",target_addr=\"{addr}\""),
        format!("tcp_open_total{{direction=\"inbound\",peer=\"src\",target_addr=\"{addr}\""),
        format!("inbound_http_authz_allow_total{{target_addr=\"{addr}\""),
    ] {
        assert!(page.lines().any(|l| l.starts_with(&line) && l.ends_with(" 1")), "{line} is missing in\n{page}");
    }
}

#[tokio::test]
async fn probes_are_answered_whatever_the_policy_says() {
    let (addr, telemetry) = start(policy(Vec::new()), None).await;
    assert!(get(addr, "/metrics").await.starts_with("HTTP/1.1 403 "));
    assert!(get(addr, "/live").await.ends_with("\r\n\r\nlive\n"));
    assert!(get(addr, "/ready").await.ends_with("\r\n\r\nready\n"));
    let post = b"POST /live HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: 0\r\n\r\n";
    let answer = exchange(TcpStream::connect(addr).await.unwrap(), post).await;
    assert!(answer.starts_with("HTTP/1.1 403 "), "{answer}");
    assert!(telemetry.render().contains("inbound_http_authz_deny_total"));
}

#[tokio::test]
async fn mesh_tls_is_terminated_for_the_own_name_alone() {
    let reader = certified("web.ns.serviceaccount.identity.linkerd.cluster.local");
    let (addr, telemetry) = start(policy(vec![anybody()]), Some(reader.clone())).await;
    let tls = identity::ClientTls {
        server_id: reader.id().clone(),
        server_name: reader.server_name().clone(),
        transport_header: false,
    };
    let (_, io) = reader.client(tls.clone()).connect(TcpStream::connect(addr).await.unwrap()).await.unwrap();
    let request = b"GET /ready HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";
    assert!(exchange(io, request).await.ends_with("ready\n"));
    assert!(telemetry.render().contains(&format!("client_id=\"{}\"", reader.id())));

    let other = identity::ClientTls { server_name: "other.example".parse().unwrap(), ..tls };
    assert!(reader.client(other).connect(TcpStream::connect(addr).await.unwrap()).await.is_err());
}

#[tokio::test]
async fn what_is_no_http_is_closed() {
    let (addr, _) = start(policy(vec![anybody()]), None).await;
    assert_eq!(exchange(TcpStream::connect(addr).await.unwrap(), b"\x00\x01\x02 no http at all\r\n").await, "");
}
