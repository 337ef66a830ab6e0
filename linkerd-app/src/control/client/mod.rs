//! HTTP/2 client of one control-plane service (behaviour.md G.1, G.2), for the gRPC clients of `linkerd2-proxy-api`.
//!
//! The service's name is resolved to its replicas, each of which is kept connected, and requests are balanced over them as
//! over any others (`linkerd_stack::balance`). While none is connected they wait, bounded in time and number. Dropping all
//! clones closes everything.

mod connection;
pub(crate) mod dns;
pub(super) mod tls;

use self::{
    connection::{Dialer, Endpoint},
    dns::Lookup,
    tls::Secure,
};
use super::{
    ControlService, Observer,
    stream::{AbortOnDrop, random},
};
use crate::{config, http::classify::grpc_status};
use bytes::Bytes;
use futures_util::future::BoxFuture;
use http::{Request, Response, Uri};
use http_body::{Body, Frame};
use linkerd_stack::balance::{self, Balance, LoadHandle, Member, NotReady};
use parking_lot::Mutex;
use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};
use tokio::{
    sync::watch,
    time::{self, Instant},
};
use tonic::Status;

/// Requests that may wait for a connection (behaviour.md G.2).
const QUEUE_CAPACITY: usize = 1_000;
/// How long a request waits for a connection; then all fail at once until there is one (behaviour.md G.2).
pub(crate) const FAILFAST: Duration = Duration::from_secs(30);
/// Latency assumed of a replica that has answered nothing yet, and how estimates decay (behaviour.md G.2).
const DEFAULT_RTT: Duration = Duration::from_millis(30);
const DECAY: Duration = Duration::from_secs(10);
/// A request that is given up sooner than this says nothing about its connection.
const SUSPICION: Duration = Duration::from_secs(1);

/// Client of one service.
#[derive(Clone)]
pub(crate) struct Client {
    shared: Arc<Shared>,
    _resolving: Arc<AbortOnDrop>,
}

/// What a client is made of.
pub(crate) struct Options {
    pub(crate) service: ControlService,
    pub(crate) addr: config::ControlAddr,
    pub(crate) connect: config::Connect,
    pub(crate) secure: Arc<dyn Secure>,
    /// Whether a certificate of our own is waited for before the first connection.
    pub(crate) needs_identity: bool,
    pub(crate) dns: Arc<dyn Lookup>,
    pub(crate) observer: Arc<dyn Observer>,
}

struct Shared {
    service: ControlService,
    replicas: Balance<SocketAddr, Arc<Endpoint>>,
    /// Whether some replica is connected.
    connected: watch::Sender<bool>,
    /// The last failure to resolve or to connect.
    trouble: Mutex<Option<Arc<str>>>,
    observer: Arc<dyn Observer>,
}

impl Client {
    /// Starts to resolve and connect in the background. Must be called within a runtime.
    pub(crate) fn new(options: Options) -> Self {
        let Options { service, addr, connect, secure, needs_identity, dns, observer } = options;
        let balance = balance::Config {
            default_rtt: DEFAULT_RTT,
            decay: DECAY,
            queue_capacity: QUEUE_CAPACITY,
            failfast_timeout: FAILFAST,
        };
        let shared = Arc::new(Shared {
            service,
            replicas: Balance::new(balance, observer.balancer(service)),
            connected: watch::Sender::new(false),
            trouble: Mutex::new(None),
            observer,
        });
        // Loopback addresses are spoken to in plaintext, whatever their identity (behaviour.md G.1).
        let identity = addr.identity.clone().filter(|_| !addr.is_loopback());
        let dialer = Dialer { connect, tls: identity.map(|id| (secure, id)), needs_identity };
        let resolving = tokio::spawn(keep_resolved(shared.clone(), addr, Arc::new(dialer), dns));
        Self { shared, _resolving: Arc::new(AbortOnDrop::new(&resolving)) }
    }

    /// Whether some replica is connected.
    pub(crate) fn connected(&self) -> watch::Receiver<bool> {
        self.shared.connected.subscribe()
    }

    /// What keeps the service from being reached; none while some replica is connected.
    pub(crate) fn trouble(&self) -> Option<Arc<str>> {
        if *self.shared.connected.borrow() { None } else { self.shared.trouble.lock().clone() }
    }
}

/// The origin of a service's requests: `http://host:port`, without a trailing dot.
pub(crate) fn origin(addr: &config::ControlAddr) -> Uri {
    let host = addr.host.trim_end_matches('.');
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    let authority = match bare.parse::<std::net::Ipv6Addr>() {
        Ok(ip) => format!("[{ip}]:{}", addr.port),
        Err(_) => format!("{host}:{}", addr.port),
    };
    let uri = Uri::builder().scheme("http").authority(authority).path_and_query("/").build();
    // A host name that passed the configuration is an authority; if not, the server sees a name that it ignores.
    uri.unwrap_or_else(|_| Uri::from_static("http://control-plane/"))
}

/// Keeps the set of replicas as DNS says. A failed look-up leaves the set as it is.
async fn keep_resolved(shared: Arc<Shared>, addr: config::ControlAddr, dialer: Arc<Dialer>, dns: Arc<dyn Lookup>) {
    // Ends with this task.
    let mut tasks = BTreeMap::new();
    let backoff = dialer.backoff();
    let mut attempt = 0;
    loop {
        let answer = match dns::literal(&addr) {
            Some(addr) => Ok(dns::Answer { value: [addr].into(), ttl: Duration::MAX }),
            None => dns::resolve(&*dns, &addr, shared.service, &*shared.observer).await,
        };
        let refresh = match answer {
            Ok(answer) => {
                attempt = 0;
                shared.use_replicas(&answer.value, &dialer, &mut tasks);
                answer.ttl
            }
            Err(failed) => {
                tracing::debug!(
                    service = shared.name(),
                    host = addr.host,
                    error = failed.reason,
                    "Control plane not found"
                );
                shared.trouble(&format!("DNS look-up of {} failed: {}", addr.host, failed.reason));
                let delay = backoff.delay(attempt, random());
                attempt = attempt.saturating_add(1);
                failed.ttl.unwrap_or(delay)
            }
        };
        if refresh == Duration::MAX {
            return std::future::pending().await;
        }
        time::sleep(refresh).await;
    }
}

impl Shared {
    fn name(&self) -> &'static str {
        self.service.as_str()
    }

    /// Replaces the set of replicas; `tasks` keep them connected.
    fn use_replicas(
        self: &Arc<Self>,
        addrs: &BTreeSet<SocketAddr>,
        dialer: &Arc<Dialer>,
        tasks: &mut BTreeMap<SocketAddr, AbortOnDrop>,
    ) {
        let gone: Vec<_> = tasks.extract_if(.., |addr, _| !addrs.contains(addr)).collect();
        let members = addrs.iter().map(|addr| {
            let member = self.replicas.member(addr).unwrap_or_else(|| {
                let endpoint = Arc::new(Endpoint::new(*addr));
                let task = tokio::spawn(connection::maintain(endpoint.clone(), dialer.clone(), self.clone()));
                tasks.insert(*addr, AbortOnDrop::new(&task));
                Member { ready: endpoint.ready.clone(), service: endpoint, weight: 1 }
            });
            (*addr, member)
        });
        let members = members.collect();
        let retired: Vec<_> = gone.iter().filter_map(|(addr, _)| self.replicas.get(addr)).collect();
        self.replicas.reset(members);
        for endpoint in retired {
            endpoint.retire();
        }
        for (_, task) in gone {
            // Its streams end on their own.
            task.detach();
        }
        self.changed();
    }

    /// Replicas came, went, connected or disconnected.
    fn changed(&self) {
        // Looked at under the channel's lock, so that of two that tell at once the later has the last word.
        self.connected.send_if_modified(|was| {
            let up = self.replicas.status().iter().any(|replica| replica.ready);
            std::mem::replace(was, up) != up
        });
    }

    fn trouble(&self, why: &str) {
        *self.trouble.lock() = Some(why.into());
    }

    /// A connected replica, waited for if need be.
    async fn acquire(&self) -> Result<(Arc<Endpoint>, LoadHandle, connection::Sender), Status> {
        loop {
            let picked = self.replicas.acquire().await.map_err(|error| match error {
                NotReady::LoadShed if self.replicas.gate().get() => {
                    self.unavailable(&format!("{QUEUE_CAPACITY} requests are waiting for it"))
                }
                NotReady::FailFast(_) | NotReady::LoadShed => {
                    self.unavailable(&format!("not connected for {FAILFAST:?}"))
                }
                NotReady::Failed(reason) => self.unavailable(&reason),
            })?;
            // None if it was closed between the pick and now, which made it unready.
            if let Some(sender) = picked.service.sender() {
                return Ok((picked.service, picked.load, sender));
            }
        }
    }

    fn unavailable(&self, what: &str) -> Status {
        let trouble = self.trouble.lock().clone();
        let trouble = trouble.map(|trouble| format!(" ({trouble})")).unwrap_or_default();
        Status::unavailable(format!("control plane service {}: {what}{trouble}", self.name()))
    }
}

impl tower::Service<Request<tonic::body::Body>> for Client {
    type Response = Response<ResponseBody>;
    type Error = Status;
    type Future = BoxFuture<'static, Result<Self::Response, Status>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Status>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<tonic::body::Body>) -> Self::Future {
        let client = self.clone();
        Box::pin(async move {
            let (endpoint, load, mut sender) = client.shared.acquire().await?;
            let observer = client.shared.observer.clone();
            let service = client.shared.service;
            observer.request(service);
            let sent = Instant::now();
            let mut open = Open { client, endpoint, load, sent, answered: false, status: None, grpc: None };
            // Waits for a free stream, then for the response's head.
            let response = match sender.ready().await {
                Ok(()) => sender.send_request(request).await,
                Err(error) => Err(error),
            };
            let response = match response {
                Ok(response) => response,
                Err(error) => {
                    // The connection said no: it is not silent.
                    open.answered = true;
                    return Err(open.client.shared.unavailable(&error.to_string()));
                }
            };
            open.answered = true;
            open.status = Some(response.status().as_u16());
            open.grpc = grpc_status(response.headers());
            open.endpoint.heard();
            open.load.observe(sent.elapsed());
            observer.first_byte(service, response.status().as_u16(), sent.elapsed());
            Ok(response.map(|inner| ResponseBody { inner, open }))
        })
    }
}

/// A request whose response has not ended.
struct Open {
    client: Client,
    endpoint: Arc<Endpoint>,
    load: LoadHandle,
    sent: Instant,
    answered: bool,
    status: Option<u16>,
    grpc: Option<u16>,
}

impl Drop for Open {
    fn drop(&mut self) {
        // Changes nothing if there was an answer.
        self.load.penalize(self.sent.elapsed());
        if !self.answered && self.sent.elapsed() >= SUSPICION {
            self.endpoint.suspect(self.sent);
        }
        self.client.shared.observer.response(self.client.shared.service, self.status, self.grpc);
    }
}

/// A response body that keeps its request counted until it ends.
pub(crate) struct ResponseBody {
    inner: hyper::body::Incoming,
    open: Open,
}

impl Body for ResponseBody {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let frame = std::task::ready!(Pin::new(&mut self.inner).poll_frame(cx));
        Poll::Ready(frame.map(|frame| match frame {
            Ok(frame) => {
                self.open.endpoint.heard();
                if let Some(trailers) = frame.trailers_ref() {
                    self.open.grpc = grpc_status(trailers);
                }
                Ok(frame)
            }
            Err(error) => Err(Status::unavailable(format!("control plane connection broke: {error}"))),
        }))
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> http_body::SizeHint {
        self.inner.size_hint()
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::{super::stream, *};
    use futures_util::StreamExt;
    use linkerd_stack::BoxedIo;
    use linkerd_tls::Id;
    use linkerd2_proxy_api::destination as api;
    use tokio::net::{TcpListener, TcpStream};

    /// Never has a certificate; panics if it is asked for a handshake.
    pub(crate) struct NoTls;

    impl Secure for NoTls {
        fn ready(&self) -> BoxFuture<'static, ()> {
            Box::pin(std::future::pending())
        }

        fn connect(&self, _: TcpStream, _: &Id) -> BoxFuture<'static, std::io::Result<BoxedIo>> {
            panic!("loopback needs no TLS")
        }
    }

    /// Settings of connections, for tests.
    pub(crate) fn connect_config() -> config::Connect {
        config::Connect {
            timeout: Duration::from_secs(1),
            keepalive: None,
            user_timeout: None,
            backoff: crate::policy::client::Backoff {
                min: Duration::from_millis(10),
                max: Duration::from_millis(50),
                jitter: 0.0,
            },
        }
    }

    fn client(port: u16) -> Client {
        let identity = Some("dst.linkerd".parse().unwrap());
        let addr = config::ControlAddr { host: "localhost.".into(), port, identity };
        let dns = Arc::new(dns::System::new(config::Dns::default()));
        Client::new(Options {
            service: ControlService::Destination,
            addr,
            connect: connect_config(),
            secure: Arc::new(NoTls),
            needs_identity: true,
            dns,
            observer: Arc::new(()),
        })
    }

    fn profile(client: Client) -> BoxFuture<'static, Result<Vec<api::DestinationProfile>, Status>> {
        let origin = Uri::from_static("http://dst");
        let mut grpc = api::destination_client::DestinationClient::with_origin(client, origin);
        Box::pin(async move {
            let messages = grpc.get_profile(api::GetDestination::default()).await?.into_inner();
            messages.take(1).collect::<Vec<_>>().await.into_iter().collect()
        })
    }

    /// Answers every request of a connection with one profile message, or with nothing at all.
    async fn serve(io: impl linkerd_stack::Io, answers: bool) {
        let service = hyper::service::service_fn(move |_| async move {
            if !answers {
                std::future::pending::<()>().await;
            }
            let message = prost::Message::encode_to_vec(&api::DestinationProfile {
                fully_qualified_name: "web.shop".into(),
                ..Default::default()
            });
            let mut frame = vec![0];
            frame.extend_from_slice(&u32::try_from(message.len()).unwrap().to_be_bytes());
            frame.extend_from_slice(&message);
            let body = http_body_util::Full::new(Bytes::from(frame));
            let response = Response::builder().header("content-type", "application/grpc");
            Ok::<_, std::convert::Infallible>(response.body(body).unwrap())
        });
        let server = hyper::server::conn::http2::Builder::new(hyper_util::rt::TokioExecutor::new());
        let _ = server.serve_connection(hyper_util::rt::TokioIo::new(io), service).await;
    }

    async fn until_connected(client: &Client) {
        client.connected().wait_for(|connected| *connected).await.unwrap();
    }

    #[tokio::test]
    async fn a_call_waits_for_the_service_and_is_answered() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        drop(listener);
        let client = client(addr.port());
        let call = tokio::spawn(profile(client.clone()));
        let mut connected = client.connected();
        assert!(!*connected.borrow_and_update());
        let listener = TcpListener::bind(addr).await.unwrap();
        tokio::spawn(async move { serve(listener.accept().await.unwrap().0, true).await });
        let found = call.await.unwrap().unwrap();
        assert_eq!(found[0].fully_qualified_name, "web.shop");
        assert!(*connected.borrow_and_update() && client.trouble().is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn calls_fail_with_the_reason_once_nothing_was_connected_for_long() {
        let port = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().port();
        let client = client(port);
        let start = Instant::now();
        let status = profile(client.clone()).await.unwrap_err();
        assert_eq!(status.code(), tonic::Code::Unavailable);
        assert!(
            status.message().contains("not connected for 30s") && status.message().contains("refused"),
            "{status:?}"
        );
        assert!(start.elapsed() >= FAILFAST);
        // And at once from then on.
        let start = Instant::now();
        profile(client).await.unwrap_err();
        assert!(start.elapsed() < Duration::from_secs(1));
    }

    #[tokio::test]
    async fn a_broken_service_ends_the_stream_with_unavailable() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let client = client(listener.local_addr().unwrap().port());
        tokio::spawn(async move {
            let (io, _) = listener.accept().await.unwrap();
            time::sleep(Duration::from_millis(20)).await;
            drop(io);
        });
        let status = profile(client).await.unwrap_err();
        assert_eq!(status.code(), tonic::Code::Unavailable, "{}", stream::describe(&status));
    }

    #[tokio::test]
    async fn a_connection_that_has_gone_silent_is_replaced() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let client = client(listener.local_addr().unwrap().port());
        tokio::spawn(async move {
            for answers in [false, true] {
                let (io, _) = listener.accept().await.unwrap();
                tokio::spawn(serve(io, answers));
            }
        });
        until_connected(&client).await;
        time::pause();
        assert!(time::timeout(Duration::from_secs(3), profile(client.clone())).await.is_err());
        time::resume();
        assert_eq!(profile(client).await.unwrap().len(), 1);
    }

    /// Every name is this host.
    struct Here;

    impl Lookup for Here {
        fn srv(&self, _: &str) -> BoxFuture<'_, Result<dns::Answer<Vec<(String, u16)>>, dns::Failed>> {
            Box::pin(std::future::ready(Err(dns::Failed { reason: "none".into(), ttl: None })))
        }

        fn ip(&self, _: &str) -> BoxFuture<'_, Result<dns::Answer<Vec<std::net::IpAddr>>, dns::Failed>> {
            let value = vec!["127.0.0.1".parse().unwrap()];
            Box::pin(std::future::ready(Ok(dns::Answer { value, ttl: Duration::from_secs(60) })))
        }
    }

    #[tokio::test]
    async fn mesh_tls_waits_for_a_certificate_and_proves_both_sides() {
        use linkerd_tls::{
            ca,
            identity::{self, Alpn},
        };
        let dir = std::env::temp_dir().join(format!("control-client-{}", std::process::id()));
        ca::init(&dir, &ca::Init { overwrite: true, ..Default::default() }).unwrap();
        let issuer = ca::Issuer::load(&dir).unwrap();
        std::fs::remove_dir_all(dir).unwrap();
        let identity = |id: &str| {
            let id: Id = id.parse().unwrap();
            let name = id.to_server_name().unwrap();
            let (writer, reader) = identity::channel(id.clone(), name, issuer.trust_anchors().clone());
            (writer, reader, issuer.issue(&id).unwrap())
        };
        let (mut writer, server, certificate) = identity("dst.linkerd");
        writer.set_certificate(certificate).unwrap();
        let (mut writer, reader, certificate) = identity("web.shop");
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let client = |id: &str| {
            Client::new(Options {
                service: ControlService::Destination,
                addr: config::ControlAddr {
                    host: "dst.linkerd.svc.".into(),
                    port: listener.local_addr().unwrap().port(),
                    identity: Some(id.parse().unwrap()),
                },
                connect: connect_config(),
                secure: Arc::new(reader.clone()),
                needs_identity: true,
                dns: Arc::new(Here),
                observer: Arc::new(()),
            })
        };
        let right = client("dst.linkerd");
        tokio::task::yield_now().await;
        assert!(!*right.connected().borrow());
        writer.set_certificate(certificate).unwrap();
        let (io, _) = listener.accept().await.unwrap();
        let (accepted, io) = server.accept(io, Alpn::None).await.unwrap();
        assert_eq!(accepted.client_id, Some("web.shop".parse().unwrap()));
        tokio::spawn(serve(io, true));
        assert_eq!(profile(right).await.unwrap().len(), 1);
        // Somebody else answers.
        let wrong = client("policy.linkerd");
        let (io, _) = listener.accept().await.unwrap();
        assert!(server.accept(io, Alpn::None).await.is_err());
        let (_io, _) = listener.accept().await.unwrap();
        let trouble = wrong.trouble().unwrap();
        assert!(trouble.contains("TLS with policy.linkerd"), "{trouble}");
    }

    #[test]
    fn origins() {
        let origin = |host: &str| {
            super::origin(&config::ControlAddr { host: host.into(), port: 8086, identity: None }).to_string()
        };
        assert_eq!(origin("linkerd-dst.linkerd.svc."), "http://linkerd-dst.linkerd.svc:8086/");
        assert_eq!(origin("fd00::1"), "http://[fd00::1]:8086/");
        assert_eq!(origin("10.0.0.1"), "http://10.0.0.1:8086/");
    }
}
