//! A federated Service of three clusters, each a folder of manifests, and one of them cut off under load.

use crate::{
    apps,
    world::{World, service, success},
};
use std::{collections::BTreeSet, fs, net::SocketAddr};

const WEB: ([u8; 4], u16) = ([10, 96, 0, 10], 80);

#[tokio::test(flavor = "multi_thread")]
async fn traffic_moves_to_the_clusters_that_are_left() {
    let Some(mut world) = World::new("federation") else { return };
    let client = world.meshed("client", &[], &[]);
    let pods = ["home", "east", "west"].map(|name| world.meshed(name, &[("http", 8080)], &[]));
    for name in ["east", "west"] {
        let folder = world.dir.join(name);
        fs::create_dir(&folder).unwrap();
        fs::copy(world.manifests().join(format!("pod-{name}.yaml")), folder.join("pod.yaml")).unwrap();
        let web = service("web", name, &["10.97.0.10"], &[("http", 80, "http", None)]);
        fs::write(folder.join("web.yaml"), web).unwrap();
        world.args.extend(["--cluster".to_string(), format!("{name}={}", folder.display())]);
    }
    world.manifest("web", &service("web", "home", &["10.96.0.9"], &[("http", 80, "http", None)]));
    let federated = service("web-federated", "nobody", &["10.96.0.10"], &[("http", 80, "http", None)]).replace(
        "namespace: shop}",
        "namespace: shop, annotations: {multicluster.linkerd.io/remote-discovery: \"web@east,web@west\", \
         multicluster.linkerd.io/local-discovery: web, timeout.linkerd.io/response: 300ms, \
         balancer.linkerd.io/failure-accrual: consecutive, \
         balancer.linkerd.io/failure-accrual-consecutive-max-failures: \"3\"}}",
    );
    world.manifest("federated", &federated);
    world.start(&["client", "home", "east", "west"]).await;
    let _apps: Vec<_> =
        pods.iter().zip(["home", "east", "west"]).map(|(pod, name)| apps::http(pod, 8080, name)).collect();

    let get = async || apps::get(&client, SocketAddr::from(WEB), "/", &[]).await.unwrap();
    let mut seen = BTreeSet::new();
    world
        .eventually("all three clusters answer", async || {
            let answer = get().await;
            // The same identity at the far end, whichever cluster that is.
            let id = answer.headers.get("x-client-id").map(|v| v.to_str().unwrap().to_string());
            if answer.status == 200 {
                assert_eq!(id.as_deref(), Some("client.shop.serviceaccount.identity.linkerd.cluster.local"));
                seen.insert(answer.body.split(' ').next().unwrap().to_string());
            }
            seen.len() == 3
        })
        .await;

    success(pods[1].command("ip").args(["link", "set", "eth0", "down"]));
    let mut row = 0;
    world
        .eventually("traffic goes on without east", async || {
            row = if get().await.status == 200 { row + 1 } else { 0 };
            row == 30
        })
        .await;
    assert!(world.metric("client", "response_total", &["dst_target_cluster=\"west\""]).await > 0.0);
}
