//! A scripted control plane: Identity, Destination and the two policy services over plaintext gRPC on a loopback address of
//! each pod, as in the control plane's own pods. It can refuse, hang, reset, talk nonsense, and come back. Messages are framed
//! by hand, so that they can be wrong, too.

use crate::{net::Pod, world::NAMESPACE, world::World};
use bytes::{BufMut, Bytes, BytesMut};
use http::{HeaderMap, HeaderValue, Request, Response};
use http_body_util::{BodyExt, StreamBody, combinators::UnsyncBoxBody};
use hyper::{
    body::{Frame, Incoming},
    service::service_fn,
};
use hyper_util::rt::{TokioExecutor, TokioIo};
use linkerd_tls::{
    Id,
    ca::Issuer,
    identity::{self as tls, Alpn, Reader},
};
use linkerd2_proxy_api::{destination, identity, inbound, meta, outbound};
use prost::Message;
use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::{Duration, SystemTime},
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::{mpsc, watch},
    task::JoinSet,
};

pub(crate) const PORT: u16 = 8086;

/// How it behaves, to new calls and to the streams that are open.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(crate) enum Mood {
    Well,
    /// Nobody listens, and what was connected is cut.
    Refuses,
    /// Says nothing any more.
    Hangs,
    /// Streams are reset.
    Resets,
    /// Messages are bytes that are no message.
    Garbles,
    /// Messages of a later version: an unknown field beside the known, and an update of an unknown kind.
    Surprises,
}

#[derive(Clone)]
pub(crate) struct ControlPlane(Arc<State>);

struct State {
    mood: watch::Sender<Mood>,
    /// A new value for each change of what is known; shared by all replicas.
    known: Arc<watch::Sender<Known>>,
    calls: Mutex<BTreeMap<String, u32>>,
    /// Who connected over TLS.
    clients: Mutex<BTreeSet<Option<String>>>,
    issuer: Arc<Issuer>,
}

/// Variables of an environment.
pub(crate) type Vars = Vec<(String, String)>;

/// What it tells.
#[derive(Clone, Default)]
struct Known {
    /// By port.
    servers: BTreeMap<u32, inbound::Server>,
    /// By original destination.
    policies: BTreeMap<String, outbound::OutboundPolicy>,
    /// By `name:port`.
    endpoints: BTreeMap<String, Vec<destination::WeightedAddr>>,
    /// How long certificates are said to last.
    lifetime: Option<Duration>,
    /// How many seconds the issuer's clock is ahead, if it is.
    clock: i64,
    /// Why none are issued.
    no_certificates: Option<String>,
}

type Body = UnsyncBoxBody<Bytes, io::Error>;
type Frames = mpsc::Sender<Result<Frame<Bytes>, io::Error>>;

impl ControlPlane {
    pub(crate) fn new(world: &World) -> Self {
        Self(Arc::new(State {
            mood: watch::Sender::new(Mood::Well),
            known: Arc::new(watch::Sender::new(Known::default())),
            calls: Mutex::default(),
            clients: Mutex::default(),
            issuer: Arc::new(Issuer::load(&world.dir.join("identity")).unwrap()),
        }))
    }

    /// One more replica: it knows the same, and has moods of its own.
    pub(crate) fn replica(&self) -> Self {
        Self(Arc::new(State {
            mood: watch::Sender::new(Mood::Well),
            known: self.0.known.clone(),
            calls: Mutex::default(),
            clients: Mutex::default(),
            issuer: self.0.issuer.clone(),
        }))
    }

    /// Serves in a pod over mesh TLS, as this identity.
    pub(crate) fn serve_tls(&self, pod: &Pod, port: u16, name: &str) {
        let id: Id = name.parse().unwrap();
        let (mut writer, reader) =
            tls::channel(id.clone(), id.to_server_name().unwrap(), self.0.issuer.trust_anchors().clone());
        writer.set_certificate(self.0.issuer.issue(&id).unwrap()).unwrap();
        tokio::spawn(serve(self.0.clone(), pod.clone(), port, Some(reader)));
    }

    /// Serves in a pod in plaintext, and is what the pod's proxy is to take for its control plane.
    pub(crate) fn serve_local(&self, pod: &Pod) -> Vars {
        tokio::spawn(serve(self.0.clone(), pod.clone(), PORT, None));
        let addr = |service| (format!("LINKERD2_PROXY_{service}_SVC_ADDR"), format!("localhost.:{PORT}"));
        vec![
            addr("DESTINATION"),
            addr("POLICY"),
            addr("IDENTITY"),
            ("LINKERD2_PROXY_POLICY_WORKLOAD".into(), "{}".into()),
        ]
    }

    /// Serves in a pod and starts the pod's proxy, which takes it for its control plane.
    pub(crate) fn spawn(&self, world: &mut World, pod: &Pod, env: &[(&str, &str)]) {
        start(world, pod, &[self.serve_local(pod), certified(world, pod)], env);
    }

    pub(crate) fn be(&self, mood: Mood) {
        self.0.mood.send_replace(mood);
    }

    /// A service: HTTP/1 at an address, balanced over what is set as endpoints of `name:80`.
    pub(crate) fn service(&self, addr: SocketAddr, name: &str) {
        self.policy(addr, http1(&format!("{name}:80")));
    }

    /// A policy of one's own for an address.
    pub(crate) fn policy(&self, addr: SocketAddr, policy: outbound::OutboundPolicy) {
        self.0.known.send_modify(|known| drop(known.policies.insert(addr.to_string(), policy)));
    }

    /// What a port of every pod serves.
    pub(crate) fn server(&self, port: u16, server: inbound::Server) {
        self.0.known.send_modify(|known| drop(known.servers.insert(port.into(), server)));
    }

    /// A policy that lacks its protocol.
    pub(crate) fn break_service(&self, addr: SocketAddr) {
        self.edit(addr, |policy| policy.protocol = None);
    }

    /// Changes the policy of a service.
    pub(crate) fn edit(&self, addr: SocketAddr, change: impl FnOnce(&mut outbound::OutboundPolicy)) {
        self.0.known.send_modify(|known| change(known.policies.get_mut(&addr.to_string()).unwrap()));
    }

    pub(crate) fn endpoints(&self, name: &str, endpoints: &[(SocketAddr, Option<&str>)]) {
        let of = |(addr, pod): &(SocketAddr, Option<&str>)| {
            use destination::tls_identity::{DnsLikeIdentity, Strategy};
            let tls_identity = pod.map(|pod| {
                let name = DnsLikeIdentity { name: identity_of(pod) };
                destination::TlsIdentity {
                    server_name: Some(name.clone()),
                    strategy: Some(Strategy::DnsLikeIdentity(name)),
                }
            });
            destination::WeightedAddr { addr: Some((*addr).into()), weight: 10_000, tls_identity, ..Default::default() }
        };
        let endpoints = endpoints.iter().map(of).collect();
        self.0.known.send_modify(|known| drop(known.endpoints.insert(format!("{name}:80"), endpoints)));
    }

    /// An endpoint that proves a URI, and is asked for by a name that is not it.
    pub(crate) fn endpoint_of(&self, name: &str, addr: SocketAddr, uri: &str, server_name: &str) {
        use destination::tls_identity::{DnsLikeIdentity, Strategy, UriLikeIdentity};
        let tls_identity = Some(destination::TlsIdentity {
            server_name: Some(DnsLikeIdentity { name: server_name.into() }),
            strategy: Some(Strategy::UriLikeIdentity(UriLikeIdentity { uri: uri.into() })),
        });
        let addr =
            destination::WeightedAddr { addr: Some(addr.into()), weight: 10_000, tls_identity, ..Default::default() };
        self.0.known.send_modify(|known| drop(known.endpoints.insert(format!("{name}:80"), vec![addr])));
    }

    /// The issuer's clock is ahead by so many seconds.
    pub(crate) fn clock_is_ahead(&self, seconds: i64) {
        self.0.known.send_modify(|known| known.clock = seconds);
    }

    /// Identities that clients proved over TLS; none = a client without one.
    pub(crate) fn clients(&self) -> BTreeSet<Option<String>> {
        self.0.clients.lock().unwrap().clone()
    }

    pub(crate) fn certificates_last(&self, lifetime: Duration) {
        self.0.known.send_modify(|known| known.lifetime = Some(lifetime));
    }

    pub(crate) fn issue_no_certificates(&self, why: Option<&str>) {
        self.0.known.send_modify(|known| known.no_certificates = why.map(Into::into));
    }

    /// How often a method was called, for instance `Destination/Get`.
    pub(crate) fn calls(&self, method: &str) -> u32 {
        self.0.calls.lock().unwrap().iter().filter(|(path, _)| path.ends_with(method)).map(|(_, n)| n).sum()
    }
}

pub(crate) fn identity_of(pod: &str) -> String {
    format!("{pod}.{NAMESPACE}.serviceaccount.identity.linkerd.cluster.local")
}

/// What a pod's proxy needs to be certified by the identity service.
pub(crate) fn certified(world: &World, pod: &Pod) -> Vars {
    let token = world.dir.join("token");
    std::fs::write(&token, "a token").unwrap();
    let vars = [
        ("TRUST_ANCHORS", std::fs::read_to_string(world.dir.join("identity/ca.crt")).unwrap()),
        ("LOCAL_NAME", identity_of(&pod.name)),
        ("DIR", "/nonexistent".into()),
        ("TOKEN_FILE", token.display().to_string()),
    ];
    vars.map(|(name, value)| (format!("LINKERD2_PROXY_IDENTITY_{name}"), value)).into()
}

/// Starts a pod's proxy; of two variables with one name the later counts.
pub(crate) fn start(world: &mut World, pod: &Pod, vars: &[Vars], env: &[(&str, &str)]) {
    let mut all: Vec<_> = vars.iter().flatten().map(|(name, value)| (&**name, &**value)).collect();
    all.extend_from_slice(env);
    world.spawn_linkerd(&pod.name, &all);
}

/// Listens and serves, but while it refuses.
async fn serve(state: Arc<State>, pod: Pod, port: u16, identity: Option<Reader>) {
    let mut mood = state.mood.subscribe();
    loop {
        mood.wait_for(|mood| *mood != Mood::Refuses).await.unwrap();
        let listener = pod.listen(port);
        let mut connections = JoinSet::new();
        loop {
            tokio::select! {
                _ = mood.wait_for(|mood| *mood == Mood::Refuses) => break,
                accepted = listener.accept() => {
                    let Ok((io, _)) = accepted else { continue };
                    let (state, identity) = (state.clone(), identity.clone());
                    connections.spawn(async move {
                        let Some(identity) = identity else { return serve_connection(state, io).await };
                        let Ok((peer, io)) = identity.accept(io, Alpn::None).await else { return };
                        state.clients.lock().unwrap().insert(peer.client_id.map(|id| id.to_string()));
                        serve_connection(state, io).await;
                    });
                }
            }
        }
    }
}

async fn serve_connection(state: Arc<State>, io: impl AsyncRead + AsyncWrite + Unpin + Send + 'static) {
    let service = service_fn(move |req| answer(state.clone(), req));
    let builder = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
    let _ = builder.serve_connection(TokioIo::new(io), service).await;
}

async fn answer(state: Arc<State>, req: Request<Incoming>) -> Result<Response<Body>, io::Error> {
    let path = req.uri().path().to_string();
    *state.calls.lock().unwrap().entry(path.clone()).or_default() += 1;
    let mood = *state.mood.borrow();
    match mood {
        Mood::Hangs => std::future::pending().await,
        Mood::Resets => return Err(io::Error::other("as scripted")),
        _ => {}
    }
    let message = req.into_body().collect().await.map_err(io::Error::other)?.to_bytes();
    let message = message.slice(5..);
    let (tx, rx) = mpsc::channel(16);
    match path.rsplit('.').next().unwrap() {
        "Identity/Certify" => certify(&state, &message, &tx).await,
        "OutboundPolicies/Watch" => {
            let spec = outbound::TrafficSpec::decode(message).unwrap();
            let Some(outbound::traffic_spec::Target::Addr(addr)) = spec.target else {
                panic!("names are not asked for")
            };
            let addr: SocketAddr = addr.try_into().unwrap();
            drop(tokio::spawn(watch_policy(state, addr.to_string(), tx)));
        }
        "Destination/Get" => {
            let path = destination::GetDestination::decode(message).unwrap().path;
            drop(tokio::spawn(watch_endpoints(state, path, tx)));
        }
        "InboundServerPolicies/WatchPort" => {
            let port = inbound::PortSpec::decode(message).unwrap().port;
            drop(tokio::spawn(watch_server(state, port, tx)));
        }
        other => panic!("unexpected call of {other}"),
    }
    let frames = futures_util::stream::unfold(rx, async |mut rx| Some((rx.recv().await?, rx)));
    let mut rsp = Response::new(UnsyncBoxBody::new(StreamBody::new(frames)));
    rsp.headers_mut().insert("content-type", HeaderValue::from_static("application/grpc"));
    Ok(rsp)
}

async fn certify(state: &State, message: &[u8], tx: &Frames) {
    let request = identity::CertifyRequest::decode(message).unwrap();
    assert_eq!(request.token, b"a token");
    let (lifetime, refusal, ahead) = {
        let known = state.known.borrow();
        (known.lifetime.unwrap_or(Duration::from_secs(3_600)), known.no_certificates.clone(), known.clock)
    };
    if let Some(why) = refusal {
        return end(tx, 9, &why).await;
    }
    let id: Id = request.identity.parse().unwrap();
    let shift = Duration::from_secs(ahead.unsigned_abs());
    let now = if ahead < 0 { SystemTime::now() - shift } else { SystemTime::now() + shift };
    let issued = state.issuer.issue_for_at(&request.certificate_signing_request, &id, now).unwrap();
    let response = identity::CertifyResponse {
        leaf_certificate: issued.leaf,
        intermediate_certificates: issued.intermediates,
        valid_until: Some((SystemTime::now() + lifetime).into()),
    };
    let _ = tx.send(Ok(frame(&response.encode_to_vec()))).await;
    end(tx, 0, "").await;
}

/// Says nothing about ports that nobody has set.
async fn watch_server(state: Arc<State>, port: u32, tx: Frames) {
    let mut known = state.known.subscribe();
    let mut told = None;
    loop {
        let server = known.borrow_and_update().servers.get(&port).cloned();
        if let Some(server) = server.filter(|server| told.as_ref() != Some(server)) {
            let _ = tx.send(Ok(frame(&server.encode_to_vec()))).await;
            told = Some(server);
        }
        tokio::select! {
            _ = known.changed() => {}
            () = tx.closed() => return,
        }
    }
}

async fn watch_policy(state: Arc<State>, addr: String, tx: Frames) {
    let (mut mood, mut known) = (state.mood.subscribe(), state.known.subscribe());
    let mut told = None;
    loop {
        let policy = known.borrow_and_update().policies.get(&addr).cloned();
        let now = *mood.borrow_and_update();
        match (&policy, now) {
            (None, _) => return end(&tx, 5, "no such service").await,
            (Some(_), Mood::Resets) => return reset(&tx).await,
            (Some(_), Mood::Garbles) => drop(tx.send(Ok(garbage())).await),
            (Some(policy), Mood::Surprises) => drop(tx.send(Ok(frame(&surprise(policy)))).await),
            (Some(_), Mood::Hangs | Mood::Refuses) => {}
            (Some(policy), Mood::Well) => {
                if told.as_ref() != Some(policy) {
                    let _ = tx.send(Ok(frame(&policy.encode_to_vec()))).await;
                    told = Some(policy.clone());
                }
            }
        }
        tokio::select! {
            _ = mood.changed() => {}
            _ = known.changed() => {}
            () = tx.closed() => return,
        }
    }
}

async fn watch_endpoints(state: Arc<State>, path: String, tx: Frames) {
    use destination::{AddrSet, NoEndpoints, Update, WeightedAddrSet, update::Update as Kind};
    let (mut mood, mut known) = (state.mood.subscribe(), state.known.subscribe());
    let mut told: Option<Vec<destination::WeightedAddr>> = None;
    loop {
        let endpoints = known.borrow_and_update().endpoints.get(&path).cloned().unwrap_or_default();
        let mut updates = Vec::new();
        let now = *mood.borrow_and_update();
        match now {
            Mood::Resets => return reset(&tx).await,
            Mood::Garbles => drop(tx.send(Ok(garbage())).await),
            Mood::Surprises => updates.push(surprise(&Update { update: None })),
            Mood::Hangs | Mood::Refuses => {}
            Mood::Well if told.as_ref() == Some(&endpoints) => {}
            Mood::Well => {
                let gone: Vec<_> = told.iter().flatten().filter(|e| !endpoints.contains(e)).collect();
                let gone = gone.into_iter().filter_map(|e| e.addr).collect::<Vec<_>>();
                let add = WeightedAddrSet { addrs: endpoints.clone(), metric_labels: Default::default() };
                let mut kinds = vec![Kind::Add(add)];
                if endpoints.is_empty() {
                    kinds = vec![Kind::NoEndpoints(NoEndpoints { exists: true })];
                } else if !gone.is_empty() {
                    kinds.push(Kind::Remove(AddrSet { addrs: gone }));
                }
                updates.extend(kinds.into_iter().map(|kind| Update { update: Some(kind) }.encode_to_vec()));
                told = Some(endpoints);
            }
        }
        for update in updates {
            let _ = tx.send(Ok(frame(&update))).await;
        }
        tokio::select! {
            _ = mood.changed() => {}
            _ = known.changed() => {}
            () = tx.closed() => return,
        }
    }
}

/// A message with one more field than is known: number 1000, a string.
fn surprise(message: &impl Message) -> Vec<u8> {
    let mut bytes = message.encode_to_vec();
    bytes.extend_from_slice(&[0xc2, 0x3e, 3]);
    bytes.extend_from_slice(b"new");
    bytes
}

/// The gRPC framing: uncompressed, length, message.
pub(crate) fn frame(message: &[u8]) -> Frame<Bytes> {
    let mut bytes = BytesMut::with_capacity(5 + message.len());
    bytes.put_u8(0);
    bytes.put_u32(u32::try_from(message.len()).unwrap());
    bytes.put_slice(message);
    Frame::data(bytes.freeze())
}

/// A field that promises more bytes than there are.
fn garbage() -> Frame<Bytes> {
    frame(&[0x0a, 0x7f, 1, 2, 3])
}

async fn reset(tx: &Frames) {
    let _ = tx.send(Err(io::Error::other("as scripted"))).await;
}

async fn end(tx: &Frames, status: u16, message: &str) {
    let mut trailers = HeaderMap::new();
    trailers.insert("grpc-status", status.into());
    trailers.insert("grpc-message", HeaderValue::from_str(message).unwrap());
    let _ = tx.send(Ok(Frame::trailers(trailers))).await;
}

/// One HTTP/1 route to a balancer.
pub(crate) fn http1(path: &str) -> outbound::OutboundPolicy {
    use outbound::{
        Backend, HttpRoute, OutboundPolicy, ProxyProtocol, Queue,
        backend::{BalanceP2c, EndpointDiscovery, Kind, balance_p2c, endpoint_discovery},
        http_route, proxy_protocol,
    };
    let seconds = |seconds| Some(prost_types::Duration { seconds, nanos: 0 });
    let name = |kind: &str| meta::Metadata { kind: Some(meta::metadata::Kind::Default(kind.into())) };
    let discovery = endpoint_discovery::Kind::Dst(endpoint_discovery::DestinationGet { path: path.into() });
    let ewma = balance_p2c::PeakEwma { default_rtt: seconds(1), decay: seconds(10) };
    let backend = Backend {
        metadata: Some(name("service")),
        queue: Some(Queue { capacity: 100, failfast_timeout: seconds(3) }),
        kind: Some(Kind::Balancer(BalanceP2c {
            discovery: Some(EndpointDiscovery { kind: Some(discovery) }),
            load: Some(balance_p2c::Load::PeakEwma(ewma)),
        })),
    };
    let backend = http_route::RouteBackend { backend: Some(backend), ..Default::default() };
    let first = http_route::distribution::FirstAvailable { backends: vec![backend] };
    let backends = Some(http_route::Distribution { kind: Some(http_route::distribution::Kind::FirstAvailable(first)) });
    let rule = http_route::Rule { backends, ..Default::default() };
    let route = HttpRoute { metadata: Some(name("http")), hosts: vec![], rules: vec![rule] };
    let kind = proxy_protocol::Kind::Http1(proxy_protocol::Http1 { routes: vec![route], failure_accrual: None });
    OutboundPolicy { protocol: Some(ProxyProtocol { kind: Some(kind) }), metadata: Some(name("service")) }
}
