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
use linkerd_tls::{Id, ca::Issuer};
use linkerd2_proxy_api::{destination, identity, meta, outbound};
use prost::Message;
use std::{
    collections::BTreeMap,
    io,
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::{Duration, SystemTime},
};
use tokio::{
    sync::{mpsc, watch},
    task::JoinSet,
};

const PORT: u16 = 8086;

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
    /// A new value for each change of what is known.
    known: watch::Sender<Known>,
    calls: Mutex<BTreeMap<String, u32>>,
    issuer: Issuer,
}

/// What it tells.
#[derive(Clone, Default)]
struct Known {
    /// By original destination.
    policies: BTreeMap<String, outbound::OutboundPolicy>,
    /// By `name:port`.
    endpoints: BTreeMap<String, Vec<destination::WeightedAddr>>,
    /// How long certificates are said to last.
    lifetime: Option<Duration>,
    /// Why none are issued.
    no_certificates: Option<String>,
}

type Body = UnsyncBoxBody<Bytes, io::Error>;
type Frames = mpsc::Sender<Result<Frame<Bytes>, io::Error>>;

impl ControlPlane {
    pub(crate) fn new(world: &World) -> Self {
        Self(Arc::new(State {
            mood: watch::Sender::new(Mood::Well),
            known: watch::Sender::new(Known::default()),
            calls: Mutex::default(),
            issuer: Issuer::load(&world.dir.join("identity")).unwrap(),
        }))
    }

    /// Serves in a pod and starts the pod's proxy, which takes it for its control plane.
    pub(crate) fn spawn(&self, world: &mut World, pod: &Pod, env: &[(&str, &str)]) {
        tokio::spawn(serve(self.0.clone(), pod.clone()));
        let anchors = std::fs::read_to_string(world.dir.join("identity/ca.crt")).unwrap();
        let token = world.dir.join("token");
        std::fs::write(&token, "a token").unwrap();
        let (addr, name, token) = (format!("localhost.:{PORT}"), identity_of(&pod.name), token.display().to_string());
        let mut all = vec![
            ("LINKERD2_PROXY_DESTINATION_SVC_ADDR", &*addr),
            ("LINKERD2_PROXY_POLICY_SVC_ADDR", &addr),
            ("LINKERD2_PROXY_IDENTITY_SVC_ADDR", &addr),
            ("LINKERD2_PROXY_POLICY_WORKLOAD", "{}"),
            ("LINKERD2_PROXY_IDENTITY_TRUST_ANCHORS", &anchors),
            ("LINKERD2_PROXY_IDENTITY_LOCAL_NAME", &name),
            ("LINKERD2_PROXY_IDENTITY_DIR", "/nonexistent"),
            ("LINKERD2_PROXY_IDENTITY_TOKEN_FILE", &token),
        ];
        all.extend_from_slice(env);
        world.spawn_linkerd(&pod.name, &all);
    }

    pub(crate) fn be(&self, mood: Mood) {
        self.0.mood.send_replace(mood);
    }

    /// A service: HTTP/1 at an address, balanced over what is set as endpoints of `name:80`.
    pub(crate) fn service(&self, addr: SocketAddr, name: &str) {
        let policy = http1(&format!("{name}:80"));
        self.0.known.send_modify(|known| drop(known.policies.insert(addr.to_string(), policy)));
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

/// Listens and serves, but while it refuses.
async fn serve(state: Arc<State>, pod: Pod) {
    let mut mood = state.mood.subscribe();
    loop {
        mood.wait_for(|mood| *mood != Mood::Refuses).await.unwrap();
        let listener = pod.listen(PORT);
        let mut connections = JoinSet::new();
        loop {
            tokio::select! {
                _ = mood.wait_for(|mood| *mood == Mood::Refuses) => break,
                accepted = listener.accept() => {
                    let Ok((io, _)) = accepted else { continue };
                    let state = state.clone();
                    connections.spawn(async move {
                        let service = service_fn(move |req| answer(state.clone(), req));
                        let builder = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
                        let _ = builder.serve_connection(TokioIo::new(io), service).await;
                    });
                }
            }
        }
    }
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
        "InboundServerPolicies/WatchPort" => drop(tokio::spawn(async move { tx.closed().await })),
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
    let (lifetime, refusal) = {
        let known = state.known.borrow();
        (known.lifetime.unwrap_or(Duration::from_secs(3_600)), known.no_certificates.clone())
    };
    if let Some(why) = refusal {
        return end(tx, 9, &why).await;
    }
    let id: Id = request.identity.parse().unwrap();
    let issued = state.issuer.issue_for(&request.certificate_signing_request, &id).unwrap();
    let response = identity::CertifyResponse {
        leaf_certificate: issued.leaf,
        intermediate_certificates: issued.intermediates,
        valid_until: Some((SystemTime::now() + lifetime).into()),
    };
    let _ = tx.send(Ok(frame(&response.encode_to_vec()))).await;
    end(tx, 0, "").await;
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
fn frame(message: &[u8]) -> Frame<Bytes> {
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
fn http1(path: &str) -> outbound::OutboundPolicy {
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
