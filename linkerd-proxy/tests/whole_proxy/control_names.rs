//! A control plane of several replicas, found by DNS and spoken to over mesh TLS under the names given.

use crate::{
    apps,
    control_plane::{ControlPlane, Mood, PORT, Vars, certified, identity_of, start},
    dns::NameServer,
    net::Pod,
    world::World,
};
use http::StatusCode;
use std::net::SocketAddr;

const HOST: &str = "linkerd-dst-headless.linkerd.svc.cluster.local.";
const NAME: &str = "linkerd-destination.linkerd.serviceaccount.identity.linkerd.cluster.local";

/// All three services at one host and name.
fn services() -> Vars {
    let mut vars = vec![("LINKERD2_PROXY_POLICY_WORKLOAD".into(), "{}".into())];
    for service in ["DESTINATION", "POLICY", "IDENTITY"] {
        vars.push((format!("LINKERD2_PROXY_{service}_SVC_ADDR"), format!("{HOST}:{PORT}")));
        vars.push((format!("LINKERD2_PROXY_{service}_SVC_NAME"), NAME.into()));
    }
    vars
}

/// A client's proxy whose name server is in a pod of its own.
struct Mesh {
    world: World,
    client: Pod,
    server: Pod,
    control: ControlPlane,
    dns: NameServer,
}

impl Mesh {
    fn new(test: &str) -> Option<Self> {
        let mut world = World::new(test)?;
        let client = world.meshed("client", &[], &[]);
        let server = world.plain("server", &[]);
        let name_server = world.plain("dns", &[]);
        client.resolve_by(name_server.ip4.into());
        let control = ControlPlane::new(&world);
        let dns = NameServer::new(&name_server);
        Some(Self { world, client, server, control, dns })
    }

    async fn start(&mut self) {
        let vars = [services(), certified(&self.world, &self.client)];
        start(&mut self.world, &self.client, &vars, &[]);
        self.world.wait_ready("client").await;
    }

    /// A new destination, whose application is the server's.
    fn service(&self, n: u8) -> SocketAddr {
        let (addr, name) = (SocketAddr::from(([10, 96, 0, n], 80)), format!("web-{n}"));
        self.control.endpoints(&name, &[(self.server.addr(8080), None)]);
        self.control.service(addr, &name);
        addr
    }

    async fn get(&self, addr: SocketAddr) -> StatusCode {
        apps::get(&self.client, addr, "/", &[]).await.unwrap().status
    }

    async fn replicas(&self, state: &str) -> f64 {
        let state = format!("endpoint_state=\"{state}\"");
        self.world.metric("client", "control_policy_balancer_endpoints", &[HOST, &state]).await
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_are_spread_over_replicas_and_outlive_one() {
    let Some(mut mesh) = Mesh::new("control-replicas") else { return };
    let other = mesh.control.replica();
    let pods = ["one", "two"].map(|name| mesh.world.plain(name, &[]));
    for (replica, pod) in [&mesh.control, &other].into_iter().zip(&pods) {
        replica.serve_tls(pod, PORT, NAME);
    }
    mesh.dns.addresses(HOST, &pods.each_ref().map(|pod| pod.ip4));
    mesh.start().await;
    let _app = apps::http(&mesh.server, 8080, "server");
    for n in 1..=6 {
        assert_eq!(mesh.get(mesh.service(n)).await, StatusCode::OK);
    }
    // Which of two idle replicas takes a stream is drawn: so many that both must have had some of each kind.
    let kinds = ["OutboundPolicies/Watch", "Destination/Get"];
    let shared = || kinds.iter().all(|kind| mesh.control.calls(kind) > 0 && other.calls(kind) > 0);
    for n in 100..200 {
        if shared() {
            break;
        }
        assert_eq!(mesh.get(mesh.service(n)).await, StatusCode::OK);
    }
    assert!(shared());
    for replica in [&mesh.control, &other] {
        assert!(replica.clients().contains(&Some(identity_of("client"))), "{:?}", replica.clients());
    }
    // Before its first certificate the proxy had nothing to show.
    assert!([&mesh.control, &other].iter().any(|replica| replica.clients().contains(&None)));
    assert_eq!(mesh.replicas("ready").await, 2.0);
    assert!(mesh.world.metric("client", "control_dns_resolutions_total", &["\"A/AAAA\"", "\"ok\""]).await >= 3.0);

    mesh.control.be(Mood::Refuses);
    mesh.world.eventually("one is left", async || mesh.replicas("pending").await == 1.0).await;
    for n in 1..=6 {
        let addr = SocketAddr::from(([10, 96, 0, n], 80));
        assert_eq!(mesh.get(addr).await, StatusCode::OK, "known");
    }
    for n in 7..=10 {
        assert_eq!(mesh.get(mesh.service(n)).await, StatusCode::OK, "new");
    }
    // What was learnt from the one that is gone, the other keeps up to date.
    let _moved = apps::http(&mesh.server, 8081, "moved");
    for n in 1..=6 {
        mesh.control.endpoints(&format!("web-{n}"), &[(mesh.server.addr(8081), None)]);
    }
    for n in 1..=6 {
        let addr = SocketAddr::from(([10, 96, 0, n], 80));
        let moved = async || apps::get(&mesh.client, addr, "/", &[]).await.unwrap().body.starts_with("moved");
        mesh.world.eventually("it is told of the move", moved).await;
    }
    mesh.control.be(Mood::Well);
    mesh.world.eventually("both are back", async || mesh.replicas("ready").await == 2.0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn srv_records_name_replicas_and_a_control_plane_that_moves_is_followed() {
    let Some(mut mesh) = Mesh::new("control-srv") else { return };
    let pods = ["one", "two"].map(|name| mesh.world.plain(name, &[]));
    let target = |pod: &Pod| format!("{}.{HOST}", pod.ip4.to_string().replace('.', "-"));
    // Its port is the record's, not the configured one.
    mesh.control.serve_tls(&pods[0], 9_000, NAME);
    mesh.dns.services(HOST, &[(&target(&pods[0]), 9_000)]);
    mesh.start().await;
    let _app = apps::http(&mesh.server, 8080, "server");
    assert_eq!(mesh.get(mesh.service(1)).await, StatusCode::OK);
    assert!(mesh.world.metric("client", "control_dns_resolutions_total", &["\"SRV\"", "\"ok\""]).await >= 3.0);

    let other = mesh.control.replica();
    other.serve_tls(&pods[1], 9_001, NAME);
    mesh.dns.services(HOST, &[(&target(&pods[1]), 9_001)]);
    mesh.control.be(Mood::Refuses);
    // Found once the old answer's time is over.
    mesh.world
        .eventually("it is found again", async || {
            other.calls("OutboundPolicies/Watch") > 0 && mesh.replicas("ready").await == 1.0
        })
        .await;
    assert_eq!(mesh.get(mesh.service(2)).await, StatusCode::OK);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_control_plane_that_proves_another_name_is_not_listened_to() {
    let Some(mut mesh) = Mesh::new("control-impostor") else { return };
    let pod = mesh.world.plain("one", &[]);
    mesh.control.serve_tls(&pod, PORT, "impostor.linkerd.serviceaccount.identity.linkerd.cluster.local");
    mesh.dns.addresses(HOST, &[pod.ip4]);
    let vars = [services(), certified(&mesh.world, &mesh.client)];
    start(&mut mesh.world, &mesh.client, &vars, &[]);
    mesh.world
        .eventually("the reason is told", async || {
            let verbose = mesh.world.admin("client", "GET", "/ready?verbose").await;
            matches!(&verbose, Ok((503, body)) if body.contains("impostor") && body.contains(NAME))
        })
        .await;
    assert_eq!(mesh.control.calls("Certify"), 0, "the token is not shown to strangers");
}
