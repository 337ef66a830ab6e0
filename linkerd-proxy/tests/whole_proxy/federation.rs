//! A federated Service of three clusters, each with its own trust domain: this one, one whose Pods can be reached, and
//! one behind a gateway. Under load one is cut off, and another dies.

use crate::{
    apps::{self, Answer},
    net::Pod,
    world::{BINARY, World, service, success},
};
use std::{
    collections::BTreeMap,
    fs,
    net::SocketAddr,
    path::Path,
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

const CLIENT: &str = "client.shop.serviceaccount.identity.linkerd.cluster.local";
const GATEWAY: &str = "gateway.shop.serviceaccount.identity.linkerd.west.example";
/// Clients that send one request after the other.
const CLIENTS: usize = 6;

/// A member of the federated Service; the settings of ours count for all.
fn member(cluster: &str, ip: &str) -> String {
    service("web", cluster, &[ip], &[("http", 80, "http", None)]).replace(
        "namespace: shop}",
        "namespace: shop, labels: {mirror.linkerd.io/federated: member}, annotations: {\
         retry.linkerd.io/http: gateway-error, retry.linkerd.io/limit: \"3\", retry.linkerd.io/timeout: 300ms, \
         balancer.linkerd.io/failure-accrual: consecutive, \
         balancer.linkerd.io/failure-accrual-consecutive-max-failures: \"3\"}}",
    )
}

/// The Links, as two versions of Linkerd write them.
fn links(gateway: &Pod) -> String {
    let member = "federatedServiceSelector: {matchLabels: {mirror.linkerd.io/federated: member}}";
    format!(
        "apiVersion: multicluster.linkerd.io/v1alpha3\nkind: Link\nmetadata: {{name: east, namespace: linkerd-multicluster}}\n\
         spec: {{targetClusterName: east, clusterCredentialsSecret: east, {member}}}\n---\n\
         apiVersion: v1\nkind: Secret\ntype: mirror.linkerd.io/remote-kubeconfig\n\
         metadata: {{name: east, namespace: linkerd-multicluster, labels: {{multicluster.linkerd.io/cluster-name: east}}, \
         annotations: {{multicluster.linkerd.io/trust-domain: east.example, multicluster.linkerd.io/cluster-domain: cluster.local}}}}\n---\n\
         apiVersion: multicluster.linkerd.io/v1alpha2\nkind: Link\n\
         metadata: {{name: west, namespace: linkerd-multicluster, annotations: {{multicluster.linkerd.io/federated-path: gateway}}}}\n\
         spec: {{targetClusterName: west, targetClusterDomain: cluster.local, gatewayAddress: {}, gatewayPort: \"4143\", \
         gatewayIdentity: {GATEWAY}, probeSpec: {{path: /ready, port: \"4191\", period: 200ms, timeout: 1s}}, {member}}}\n",
        gateway.ip4
    )
}

/// The slice of the other cluster's Service, in a zone of its own.
fn slice(pod: &Pod) -> String {
    format!(
        "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\n\
         metadata: {{name: web-1, namespace: shop, labels: {{kubernetes.io/service-name: web}}}}\naddressType: IPv4\n\
         ports: [{{name: http, port: 8080}}]\nendpoints: [{{addresses: [{}], zone: east-1}}]\n",
        pod.ip4
    )
}

/// Who answered; the identity that arrived there must be the client's, or the gateway's where one is between.
fn who(answer: &Answer) -> &'static str {
    assert_eq!(answer.status, 200, "{answer:?}");
    let name = ["home", "east", "west"].into_iter().find(|name| answer.body.starts_with(name)).expect("a cluster");
    let expected = if name == "west" { GATEWAY } else { CLIENT };
    assert_eq!(answer.headers["x-client-id"], expected, "{answer:?}");
    name
}

/// Sends requests until told to stop: how many each cluster answered. Every one must succeed.
async fn load(client: Pod, web: SocketAddr, stop: Arc<AtomicBool>) -> BTreeMap<&'static str, usize> {
    let mut seen = BTreeMap::new();
    while !stop.load(Ordering::Relaxed) {
        let answer = apps::get(&client, web, "/", &[]).await.unwrap();
        *seen.entry(who(&answer)).or_default() += 1;
    }
    seen
}

#[tokio::test(flavor = "multi_thread")]
async fn traffic_moves_to_the_clusters_that_are_left() {
    let Some(mut world) = World::new("federation") else { return };
    let (east, west) = (world.cluster("east"), world.cluster("west"));
    world.share_trust(&["east", "west"]);
    let client = world.meshed("client", &[], &[]);
    let pods = [
        world.meshed("home", &[("http", 8080)], &[]),
        world.meshed_in("east", "east", &[("http", 8080)]),
        world.meshed_in("west", "west", &[("http", 8080)]),
    ];
    let gateway = world.meshed_in("west", "gateway", &[]);
    world.manifest("web", &member("home", "10.96.0.9"));
    fs::write(east.join("web.yaml"), format!("{}---\n{}", member("nobody", "10.97.0.10"), slice(&pods[1]))).unwrap();
    fs::write(west.join("web.yaml"), member("west", "10.98.0.10")).unwrap();
    world.manifest("links", &links(&gateway));
    let web = checked(&world, &[("east", &east), ("west", &west)]);
    world.spawn("gateway", &[("LINKERD2_PROXY_INBOUND_GATEWAY_SUFFIXES", "svc.cluster.local.")]);
    world.start(&["client", "home", "east", "west"]).await;
    world.wait_ready("gateway").await;
    let _apps: Vec<_> =
        pods.iter().zip(["home", "east", "west"]).map(|(pod, name)| apps::http(pod, 8080, name)).collect();

    let answered = async |cluster: &str| {
        world
            .metric("client", "response_total", &[&format!("dst_target_cluster=\"{cluster}\""), "status_code=\"200\""])
            .await
    };
    let stop = Arc::new(AtomicBool::new(false));
    let clients: Vec<_> = (0..CLIENTS).map(|_| tokio::spawn(load(client.clone(), web, stop.clone()))).collect();
    world
        .eventually("the other clusters answer", async || answered("east").await > 5.0 && answered("west").await > 5.0)
        .await;
    let zone = ["dst_target_cluster=\"east\"", "dst_zone=\"east-1\""];
    assert!(world.metric("client", "response_total", &zone).await > 0.0);

    success(pods[1].command("ip").args(["link", "set", "eth0", "down"]));
    let (then, mut last) = (answered("west").await, f64::NAN);
    world
        .eventually("nothing comes from east, and west goes on", async || {
            let now = answered("east").await;
            now == std::mem::replace(&mut last, now) && answered("west").await > then + 50.0
        })
        .await;
    success(Command::new("kill").args(["-KILL", &world.pid("gateway").to_string()]));
    let at_home = async || {
        let all = world.metric("client", "response_total", &["status_code=\"200\""]).await;
        all - answered("east").await - answered("west").await
    };
    let then = at_home().await;
    world.eventually("this cluster goes on alone", async || at_home().await > then + 50.0).await;
    stop.store(true, Ordering::Relaxed);
    for client in clients {
        let seen = client.await.unwrap_or_else(|error| panic!("{error}\n{}", world.logs()));
        assert!(seen["home"] > 0, "{seen:?}");
    }
}

/// `check` takes the clusters that `run` takes, and finds nothing: where the federated Service is.
fn checked(world: &World, clusters: &[(&str, &Path)]) -> SocketAddr {
    let mut command = Command::new(BINARY);
    command.arg("check").arg(world.manifests());
    for (name, folder) in clusters {
        command.arg("--cluster").arg(format!("{name}={}", folder.display()));
    }
    let out = command.output().unwrap();
    let text = String::from_utf8_lossy(&out.stdout);
    assert!(out.status.success() && text.contains(" 0 errors, 0 warnings"), "{text}");
    let ip = text.lines().find_map(|line| line.strip_prefix("assigned: Service shop/web-federated has clusterIP "));
    SocketAddr::new(ip.expect("an address").parse().unwrap(), 80)
}
