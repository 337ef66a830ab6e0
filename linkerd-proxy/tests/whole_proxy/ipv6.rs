//! IPv6 alone and beside IPv4, from pod to pod and to the outside.

use crate::{
    apps,
    world::{World, service, success},
};
use std::{net::SocketAddr, time::Duration};

const CLIENT_ID: &str = "client.shop.serviceaccount.identity.linkerd.cluster.local";

#[tokio::test(flavor = "multi_thread")]
async fn every_protocol_travels_over_either_family() {
    let Some(mut world) = World::new("ipv6") else { return };
    let client = world.meshed("client", &[], &[]);
    let sixth = world.meshed("sixth", &[], &[]);
    let server = world.meshed(
        "server",
        &[("http", 8080), ("bytes", 9000), ("mail", 9025)],
        &[("config.linkerd.io/opaque-ports", "9025")],
    );
    let ports = [
        ("http", 80, "http", None),
        ("bytes", 90, "bytes", None),
        ("mail", 25, "mail", Some("linkerd.io/opaque")),
        ("sni", 443, "bytes", None),
    ];
    world.manifest("dual", &service("dual", "server", &["10.96.0.10", "fd96::10"], &ports));
    world.manifest("six", &service("six", "server", &["fd96::11"], &ports));
    for name in ["dual", "six"] {
        world.manifest(
            &format!("{name}-sni"),
            &format!(
                "apiVersion: gateway.networking.k8s.io/v1
kind: TLSRoute
metadata: {{name: {name}, namespace: shop}}
spec: {{parentRefs: [{{group: '', kind: Service, name: {name}, port: 443}}], hostnames: [a.test], rules: [{{backendRefs: [{{name: {name}, port: 443}}]}}]}}
"
            ),
        );
    }
    // A replica of IPv6 alone, outside the mesh.
    let lone = world.plain("lone", &[]);
    let mut slices =
        service("lone", "x", &["fd96::12"], &[("http", 80, "8080", None)]).replace("  selector: {app: x}\n", "");
    slices += &format!(
        "---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {{name: lone, namespace: shop, labels: {{kubernetes.io/service-name: lone}}}}
addressType: IPv6
ports: [{{name: http, port: 8080}}]
endpoints: [{{addresses: ['{}']}}]
",
        lone.ip6
    );
    world.manifest("lone", &slices);
    world.start(&["client", "server"]).await;
    let _apps = [
        apps::http(&server, 8080, "server"),
        apps::server_first(&server, 9000, "hello\n"),
        apps::server_first(&server, 9025, "220 mail\n"),
        apps::http(&lone, 8080, "lone"),
    ];
    for ip in ["10.96.0.10", "fd96::10", "fd96::11"] {
        let at = |port| SocketAddr::new(ip.parse().unwrap(), port);
        let answer = apps::get(&client, at(80), "/", &[]).await.unwrap();
        assert_eq!(answer.body, "server GET /", "{ip}");
        assert_eq!(answer.headers["x-client-id"], CLIENT_ID, "{ip}");
        assert_eq!(apps::grpc(&client, at(80), "/a.B/C").await, (http::StatusCode::OK, "0".into()), "{ip}");
        for (port, bytes, greeting) in [
            (90, vec![], "hello\n"),
            (90, b"\0bytes".to_vec(), "hello\n"),
            (25, vec![], "220 mail\n"),
            (443, apps::client_hello("a.test"), "hello\n"),
        ] {
            let mut io = client.connect(at(port)).await.unwrap();
            tokio::io::AsyncWriteExt::write_all(&mut io, &bytes).await.unwrap();
            apps::expect_text(&mut io, greeting).await;
        }
    }
    // By the pods' own addresses, in and out of the mesh, and without a Host header.
    for (pod, name) in [(&server, "server"), (&lone, "lone")] {
        let addr = SocketAddr::new(pod.ip6.into(), 8080);
        let answer = apps::get(&client, addr, "/", &[]).await.unwrap();
        assert_eq!(answer.body, format!("{name} GET /"));
        assert_eq!(answer.headers.contains_key("x-client-id"), name == "server");
    }
    let answer = apps::get(&client, "[fd96::12]:80".parse().unwrap(), "/", &[]).await.unwrap();
    assert_eq!(answer.body, "lone GET /");
    let back = apps::send_bytes(&client, "[fd96::12]:80".parse().unwrap(), b"GET / HTTP/1.0\r\n\r\n").await;
    assert!(
        back.starts_with(b"HTTP/1.0 200") || back.starts_with(b"HTTP/1.1 200"),
        "{}",
        String::from_utf8_lossy(&back)
    );
    // Of replicas with both addresses one is dialled: which one is for the operator to say.
    world.args.push("--prefer-ipv6".into());
    world.start(&["sixth"]).await;
    for (pod, name, ip) in [(&client, "client", "10."), (&sixth, "sixth", "fd88:")] {
        assert_eq!(
            apps::get(pod, SocketAddr::new("fd96::10".parse().unwrap(), 80), "/", &[]).await.unwrap().status,
            200
        );
        let labels = ["direction=\"outbound\"", "dst_service=\"dual\"", &format!("target_ip=\"{ip}")];
        assert!(world.metric(name, "request_total", &labels).await >= 1.0, "{name} dials {ip}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn egress_networks_of_either_family() {
    let Some(mut world) = World::new("ipv6-egress") else { return };
    let client = world.meshed("client", &[], &[]);
    let outside = world.plain("outside", &[]);
    // On the link: a router could ask for its neighbours only once its own address has been found to be nobody else's.
    for addr in ["2001:db8::5", "2001:db8:1::5"] {
        success(outside.command("ip").args(["addr", "add", &format!("{addr}/128"), "dev", "eth0", "nodad"]));
        success(client.command("ip").args(["-6", "route", "add", addr, "dev", "eth0"]));
    }
    world.manifest(
        "egress",
        "apiVersion: policy.linkerd.io/v1alpha1
kind: EgressNetwork
metadata: {name: rest, namespace: shop}
spec: {trafficPolicy: Deny}
---
apiVersion: policy.linkerd.io/v1alpha1
kind: EgressNetwork
metadata: {name: some, namespace: shop}
spec: {trafficPolicy: Allow, networks: [{cidr: '2001:db8::/32', except: ['2001:db8:1::/48']}]}
",
    );
    world.start(&["client"]).await;
    let _apps = [apps::http(&outside, 80, "outside"), apps::server_first(&outside, 90, "hello\n")];
    for (ip, status) in [("2001:db8::5", 200), ("2001:db8:1::5", 403)] {
        let answer = apps::get(&client, SocketAddr::new(ip.parse().unwrap(), 80), "/", &[]).await.unwrap();
        assert_eq!(answer.status, status, "{ip}");
    }
    let mut io = client.connect("[2001:db8::5]:90".parse().unwrap()).await.unwrap();
    apps::expect_text(&mut io, "hello\n").await;
    let mut io = client.connect("[2001:db8:1::5]:90".parse().unwrap()).await.unwrap();
    tokio::io::AsyncWriteExt::write_all(&mut io, b"\0bytes").await.unwrap();
    let read = tokio::io::AsyncReadExt::read_u8(&mut io);
    let ended = tokio::time::timeout(Duration::from_secs(5), read).await.expect("an end").unwrap_err();
    assert_eq!(ended.kind(), std::io::ErrorKind::ConnectionReset);
}
