//! Workloads that are no ordinary Pods to policy: machines (ExternalWorkloads) with Servers of their own, and the kubelet, which
//! probes without an identity.

use crate::{
    apps,
    world::{World, service},
};
use http::StatusCode;
use std::net::SocketAddr;

const OK: StatusCode = StatusCode::OK;
const FORBIDDEN: StatusCode = StatusCode::FORBIDDEN;

#[tokio::test(flavor = "multi_thread")]
async fn servers_select_machines_and_refuse_strangers() {
    let Some(mut world) = World::new("machines") else { return };
    let friend = world.meshed("friend", &[], &[]);
    let stranger = world.plain("stranger", &[]);
    let machine = world.meshed("machine", &[], &[]);
    // The machine takes the place of the pod of that name.
    world.manifest(
        "pod-machine",
        &format!(
            "apiVersion: workload.linkerd.io/v1beta1\nkind: ExternalWorkload\nmetadata: {{name: machine, namespace: shop, labels: {{app: machine}}}}\nspec: {{meshTLS: {{identity: {id}, serverName: {id}}}, ports: [{{name: http, port: 8080}}, {{name: tcp, port: 9000}}], workloadIPs: [{{ip: {ip}}}]}}\n",
            id = "machine.shop.serviceaccount.identity.linkerd.cluster.local",
            ip = machine.ip4,
        ),
    );
    let server = |name: &str, selector: &str, port: &str, protocol: &str, access: &str| {
        format!(
            "apiVersion: policy.linkerd.io/v1beta3\nkind: Server\nmetadata: {{name: {name}, namespace: shop}}\nspec: {{{selector}: {{matchLabels: {{app: machine}}}}, port: {port}, proxyProtocol: {protocol}, accessPolicy: {access}}}\n---\n"
        )
    };
    world.manifest(
        "policy",
        &[
            server("web", "externalWorkloadSelector", "http", "HTTP/1", "all-authenticated"),
            server("tcp", "externalWorkloadSelector", "9000", "opaque", "all-authenticated"),
            // For pods with the same labels, which there are none of.
            server("pods", "podSelector", "http", "HTTP/1", "all-unauthenticated"),
        ]
        .concat(),
    );
    world.manifest("web", &service("web", "machine", &["10.96.0.10"], &[("http", 80, "http", None)]));
    world.start(&["friend", "machine"]).await;
    let _apps = [apps::http(&machine, 8080, "machine"), apps::tcp_echo(&machine, 9000)];

    let answer = apps::get(&friend, SocketAddr::from(([10, 96, 0, 10], 80)), "/x", &[]).await.unwrap();
    assert_eq!((answer.status, &*answer.body), (OK, "machine GET /x"), "{}", world.logs());
    assert_eq!(answer.headers["x-client-id"], "friend.shop.serviceaccount.identity.linkerd.cluster.local");
    assert_eq!(apps::get(&stranger, machine.addr(8080), "/x", &[]).await.unwrap().status, FORBIDDEN);
    assert_eq!(apps::send_bytes(&friend, machine.addr(9000), b"\0bytes").await, b"\0bytes");
    assert_eq!(apps::send_bytes(&stranger, machine.addr(9000), b"\0bytes").await, b"");
    assert_eq!(world.metric("machine", "inbound_http_authz_deny_total", &["srv_name=\"web\""]).await, 1.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn probes_and_localhost_are_let_in_and_nothing_else_is() {
    let Some(mut world) = World::new("probes") else { return };
    let kubelet = world.plain("kubelet", &[]);
    let pod = world.meshed("probed", &[], &[]);
    world.manifest(
        "pod-probed",
        &format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: probed, namespace: shop, labels: {{app: probed}}, annotations: {{config.linkerd.io/default-inbound-policy: deny}}}}\nspec:\n  serviceAccountName: probed\n  containers:\n  - name: app\n    ports: [{{name: http, containerPort: 8080}}]\n    livenessProbe: {{httpGet: {{path: '/live?verbose', port: http}}}}\n    readinessProbe: {{httpGet: {{path: /ready, port: 8080}}}}\nstatus: {{podIP: {ip}, podIPs: [{{ip: {ip}}}]}}\n",
            ip = pod.ip4
        ),
    );
    let server = "apiVersion: policy.linkerd.io/v1beta3\nkind: Server\nmetadata: {name: web, namespace: shop}\nspec: {podSelector: {}, port: http, proxyProtocol: HTTP/1, accessPolicy: deny}\n";
    world.manifest("server", server);
    world.start(&["probed"]).await;
    let _app = apps::http(&pod, 8080, "probed");
    let get = async |path: &str| apps::get(&kubelet, pod.addr(8080), path, &[]).await.unwrap().status;

    assert_eq!((get("/live?verbose").await, get("/ready").await), (OK, OK), "{}", world.logs());
    for path in ["/", "/live/x", "/ready/../", "/metrics"] {
        assert_eq!(get(path).await, FORBIDDEN, "{path}");
    }
    let mut send = apps::http1(&kubelet, pod.addr(8080)).await;
    let post = http::Request::post("/ready").header("host", "x").body(http_body_util::Full::default()).unwrap();
    assert_eq!(send.send_request(post).await.unwrap().status(), FORBIDDEN, "a probe is a GET");
    assert_eq!(world.metric("probed", "inbound_http_authz_allow_total", &["route_name=\"probe\""]).await, 2.0);

    // The admin port: probes for everybody, the rest by policy, which lets the pod itself in.
    let admin = async |path: &str| apps::get(&kubelet, pod.addr(4191), path, &[]).await.unwrap().status;
    assert_eq!((admin("/live").await, admin("/ready").await, admin("/metrics").await), (OK, OK, FORBIDDEN));
    assert_eq!(world.admin("probed", "GET", "/metrics").await.unwrap().0, 200);

    // A route of the operator's own takes the place of the implied ones.
    world.manifest(
        "server",
        &format!(
            "{server}---\napiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {{name: own, namespace: shop}}\nspec: {{parentRefs: [{{group: policy.linkerd.io, kind: Server, name: web}}], rules: [{{matches: [{{path: {{value: /own}}}}]}}]}}\n"
        ),
    );
    world.eventually("the route replaces the probes'", async || get("/ready").await == StatusCode::NOT_FOUND).await;
    assert_eq!(get("/own").await, FORBIDDEN);
}
