//! Identities from a SPIRE agent, on both sides: a fake of its Workload API on a Unix socket.

use crate::{
    apps,
    control_plane::{ControlPlane, Vars, frame, start},
    net::Pod,
    world::World,
};
use futures_util::StreamExt;
use http::{HeaderValue, Response, StatusCode};
use http_body_util::StreamBody;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use linkerd_tls::{Id, ca::Issuer};
use prost::Message;
use std::{convert::Infallible, net::SocketAddr, os::unix::fs::PermissionsExt, path::PathBuf};
use tokio::{
    net::UnixListener,
    sync::watch,
    task::{AbortHandle, JoinSet},
};

const WEB: ([u8; 4], u16) = ([10, 96, 0, 10], 80);

/// `SpiffeWorkloadAPI.FetchX509SVID`'s answer.
#[derive(Clone, PartialEq, Message)]
struct X509SvidResponse {
    #[prost(message, repeated, tag = "1")]
    svids: Vec<X509Svid>,
}

#[derive(Clone, PartialEq, Message)]
struct X509Svid {
    #[prost(string, tag = "1")]
    spiffe_id: String,
    #[prost(bytes = "vec", tag = "2")]
    x509_svid: Vec<u8>,
    #[prost(bytes = "vec", tag = "3")]
    x509_svid_key: Vec<u8>,
    #[prost(bytes = "vec", tag = "4")]
    bundle: Vec<u8>,
}

/// Has SVIDs for some identities; who asks gets them all.
struct Agent {
    socket: PathBuf,
    issuer: Issuer,
    answer: watch::Sender<X509SvidResponse>,
    task: Option<AbortHandle>,
}

impl Agent {
    fn new(world: &World) -> Self {
        let issuer = Issuer::load(&world.dir.join("identity")).unwrap();
        let socket = world.dir.join("agent.sock");
        Self { socket, issuer, answer: watch::Sender::default(), task: None }
    }

    /// New SVIDs, for everybody who listens too.
    fn issue(&self, pods: &[&str]) {
        let svid = |pod: &&str| {
            let id: Id = id(pod).parse().unwrap();
            let issued = self.issuer.issue(&id).unwrap();
            let mut chain = issued.leaf;
            chain.extend(issued.intermediates.concat());
            X509Svid {
                spiffe_id: id.to_string(),
                x509_svid: chain,
                x509_svid_key: issued.key_pkcs8.secret_der().to_vec(),
                bundle: Vec::new(),
            }
        };
        self.answer.send_replace(X509SvidResponse { svids: pods.iter().map(svid).collect() });
    }

    fn start(&mut self) {
        let listener = UnixListener::bind(&self.socket).unwrap();
        std::fs::set_permissions(&self.socket, std::fs::Permissions::from_mode(0o777)).unwrap();
        let answer = self.answer.clone();
        let serve = async move {
            let mut connections = JoinSet::new();
            loop {
                let (io, _) = listener.accept().await.unwrap();
                let answer = answer.clone();
                let service = service_fn(move |req: http::Request<hyper::body::Incoming>| {
                    assert_eq!(req.uri().path(), "/SpiffeWorkloadAPI/FetchX509SVID");
                    assert_eq!(req.headers()["workload.spiffe.io"], "true");
                    let mut answer = answer.subscribe();
                    answer.mark_changed();
                    let messages = futures_util::stream::unfold(answer, async |mut answer| {
                        answer.changed().await.ok()?;
                        let message = answer.borrow_and_update().encode_to_vec();
                        Some((Ok::<_, Infallible>(frame(&message)), answer))
                    });
                    let body: StreamBody<futures_util::stream::BoxStream<'static, _>> =
                        StreamBody::new(messages.boxed());
                    let mut rsp = Response::new(body);
                    rsp.headers_mut().insert("content-type", HeaderValue::from_static("application/grpc"));
                    std::future::ready(Ok::<_, Infallible>(rsp))
                });
                let builder = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
                connections.spawn(async move { drop(builder.serve_connection(TokioIo::new(io), service).await) });
            }
        };
        self.task = Some(tokio::spawn(serve).abort_handle());
    }

    /// Connections end, and the socket is gone.
    fn stop(&mut self) {
        if let Some(task) = self.task.take() {
            task.abort();
        }
        let _ = std::fs::remove_file(&self.socket);
    }

    /// What a pod's proxy needs to be certified by it.
    fn vars(&self, world: &World, pod: &Pod) -> Vars {
        let vars = [
            ("TRUST_ANCHORS", std::fs::read_to_string(world.dir.join("identity/ca.crt")).unwrap()),
            ("SERVER_ID", id(&pod.name)),
            ("SERVER_NAME", server_name(&pod.name)),
            ("SPIRE_WORKLOAD_API_ADDRESS", format!("unix://{}", self.socket.display())),
        ];
        vars.map(|(name, value)| (format!("LINKERD2_PROXY_IDENTITY_{name}"), value)).into()
    }
}

fn id(pod: &str) -> String {
    format!("spiffe://root.linkerd.cluster.local/{pod}")
}

fn server_name(pod: &str) -> String {
    format!("{pod}.machines.local")
}

async fn verbose(world: &World) -> std::io::Result<(u16, String)> {
    world.admin("client", "GET", "/ready?verbose").await
}

#[tokio::test(flavor = "multi_thread")]
async fn spiffe_identities_on_both_sides_outlive_the_agent() {
    let Some(mut world) = World::new("spire") else { return };
    let client = world.meshed("client", &[], &[]);
    let server = world.meshed("server", &[("http", 8080)], &[]);
    let control = ControlPlane::new(&world);
    control.service(SocketAddr::from(WEB), "web");
    control.endpoint_of("web", server.addr(8080), &id("server"), &server_name("server"));
    let mut agent = Agent::new(&world);
    for pod in [&client, &server] {
        let mut services = control.serve_local(pod);
        services.retain(|(name, _)| !name.contains("_IDENTITY_"));
        // Every request has a handshake of its own.
        let unpooled = [("LINKERD2_PROXY_OUTBOUND_MAX_IDLE_CONNS_PER_ENDPOINT", "0")];
        let identity = agent.vars(&world, pod);
        start(&mut world, pod, &[services, identity], &unpooled);
    }
    let socket = agent.socket.display().to_string();

    // There is no agent yet.
    world
        .eventually("its absence is told", async || {
            matches!(verbose(&world).await, Ok((503, body)) if body.contains("SPIRE agent") && body.contains(&socket))
        })
        .await;
    assert!(world.metric("client", "control_identity_cert_refreshes_total", &["result=\"error\""]).await >= 1.0);

    // It comes, and knows others only.
    agent.issue(&["somebody"]);
    agent.start();
    world
        .eventually("its answer is told", async || {
            matches!(verbose(&world).await, Ok((503, body)) if body.contains("no SVID for") && body.contains("registration entry"))
        })
        .await;
    agent.issue(&["somebody", "client", "server"]);
    world.wait_ready("client").await;
    world.wait_ready("server").await;
    let _app = apps::http(&server, 8080, "server");
    let get = async || {
        let answer = apps::get(&client, SocketAddr::from(WEB), "/", &[]).await.unwrap();
        (answer.status, answer.headers.get("x-client-id").map(|id| id.to_str().unwrap().to_string()))
    };
    let good = (StatusCode::OK, Some(id("client")));
    assert_eq!(get().await, good);
    let server_id = format!("server_id=\"{}\"", id("server"));
    assert!(world.metric("client", "request_total", &["direction=\"outbound\"", &server_id]).await >= 1.0);

    // Rotation.
    let refreshed = async |name: &str, n: f64| {
        world
            .eventually("it is refreshed", async || {
                world.metric(name, "control_identity_cert_refreshes_total", &["result=\"ok\""]).await >= n
            })
            .await;
    };
    agent.issue(&["client", "server"]);
    refreshed("client", 2.0).await;
    refreshed("server", 2.0).await;
    assert_eq!(get().await, good);

    // The agent restarts: what is installed stays in force meanwhile, and is replaced after.
    agent.stop();
    world
        .eventually("the outage is told", async || {
            matches!(verbose(&world).await, Ok((200, body)) if body.contains("[-] certificate_failing") && body.contains(&socket))
        })
        .await;
    assert_eq!(get().await, good);
    agent.issue(&["client", "server"]);
    agent.start();
    refreshed("client", 3.0).await;
    assert_eq!(get().await, good);
    world
        .eventually(
            "all is well",
            async || matches!(verbose(&world).await, Ok((200, body)) if !body.contains("[-] certificate_failing")),
        )
        .await;
    // The agent handed private keys out; none of them was repeated.
    for svid in &agent.answer.borrow().svids {
        for name in ["client", "server"] {
            crate::secrets::not_in(&svid.x509_svid_key, name, world.log(name).as_bytes());
        }
    }
    agent.stop();
}
