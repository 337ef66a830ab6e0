//! The source as a whole: manifests in a folder, policies and endpoints out, and what a change costs.

use super::*;
use crate::policy::{
    Authentication, Endpoint,
    client::{Dispatcher, Distribution, Protocol, Refuse, Routes},
    endpoint::{ProtocolHint, ZoneLocality},
    route::{Filter, Precedence},
    server,
};
use std::{fmt::Write as _, fs, net::SocketAddr, path::PathBuf};

/// A folder that is removed with the test.
struct Dir(PathBuf);

impl Dir {
    fn new(files: &[(&str, &str)]) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let name = format!("l5d-standalone-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(name);
        fs::create_dir_all(&path).unwrap();
        let dir = Self(path);
        for (name, text) in files {
            dir.write(name, text);
        }
        dir
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(self.0.join(name), text).unwrap();
    }

    fn remove(&self, name: &str) {
        fs::remove_file(self.0.join(name)).unwrap();
    }

    fn folder(&self) -> Folder {
        Folder { path: self.0.clone(), cluster: None }
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// The local workload, unless a test brings its own.
const LOCAL: &str = "
apiVersion: v1
kind: Pod
metadata: {name: client, namespace: shop, labels: {app: client, linkerd.io/control-plane-ns: linkerd}}
spec: {serviceAccountName: client, nodeName: node-a, containers: [{ports: [{name: http, containerPort: 8080}, {name: db, containerPort: 5432}]}]}
status: {podIP: 10.1.0.100}
---
apiVersion: v1
kind: Node
metadata: {name: node-a, labels: {topology.kubernetes.io/zone: a}}
";

/// A Service with two Pods in one slice.
const WEB: &str = "
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec: {clusterIP: 10.96.0.10, selector: {app: web}, ports: [{name: http, port: 80, targetPort: http}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: web-1, namespace: shop, labels: {kubernetes.io/service-name: web}}
addressType: IPv4
ports: [{name: http, port: 8080}]
endpoints:
- {addresses: [10.1.0.1], zone: a, targetRef: {kind: Pod, name: web-7d9-abc}}
- {addresses: [10.1.0.2], zone: b}
---
apiVersion: v1
kind: Pod
metadata:
  name: web-7d9-abc
  namespace: shop
  labels: {app: web, pod-template-hash: 7d9, linkerd.io/control-plane-ns: linkerd}
  annotations: {balancer.linkerd.io/weight: '0.5', config.linkerd.io/opaque-ports: '9000'}
  ownerReferences: [{kind: ReplicaSet, name: web-7d9}]
spec: {serviceAccountName: web, containers: [{ports: [{name: http, containerPort: 8080}, {name: raw, containerPort: 9000}]}]}
status: {podIP: 10.1.0.1}
";

fn options(folders: Vec<Folder>) -> Options {
    Options { folders, namespace: "shop".into(), name: "client".into(), settings: Settings::default(), watch: false }
}

#[track_caller]
fn start(dir: &Dir) -> Arc<Standalone> {
    match Standalone::start(options(vec![dir.folder()])) {
        Ok((standalone, _)) => standalone,
        Err(error) => panic!("{error}"),
    }
}

/// A source over one file of manifests and the usual client.
#[track_caller]
fn with(text: &str) -> (Dir, Arc<Standalone>) {
    let dir = Dir::new(&[("local.yaml", LOCAL), ("mesh.yaml", text)]);
    let standalone = start(&dir);
    (dir, standalone)
}

async fn policy(standalone: &Standalone, target: &str) -> Arc<ClientPolicy> {
    let target = match target.parse::<SocketAddr>() {
        Ok(addr) => Target::Addr(addr),
        Err(_) => {
            let (name, port) = target.rsplit_once(':').unwrap();
            Target::Name(name.into(), port.parse().unwrap())
        }
    };
    standalone.watch_client(target).await.unwrap().borrow().clone()
}

#[track_caller]
fn http(policy: &ClientPolicy) -> &crate::policy::client::Http {
    match &policy.protocol {
        Protocol::Detect { http1, .. } => http1,
        Protocol::Http1(http) | Protocol::Http2(http) | Protocol::Grpc(http) => http,
        other => panic!("{other:?}"),
    }
}

#[track_caller]
fn routes(policy: &ClientPolicy) -> (&[crate::policy::client::Route], Precedence) {
    match &http(policy).routes {
        Routes::Http(routes, p) | Routes::Grpc(routes, p) => (routes, *p),
        Routes::Profile(_) => panic!("a profile"),
    }
}

/// `discovery` keys, weights and failures of a rule's backends.
fn backends(rule: &crate::policy::client::Rule) -> Vec<(String, u32)> {
    let name = |d: &Dispatcher| match d {
        Dispatcher::Balance { discovery, .. } => discovery.to_string(),
        Dispatcher::Forward(endpoint) => endpoint.addr.to_string(),
        Dispatcher::Fail(f) => format!("{} {}", f.status.as_u16(), f.message),
    };
    match &rule.backends {
        Distribution::Empty => Vec::new(),
        Distribution::FirstAvailable(list) => list.iter().map(|b| (name(&b.backend.dispatcher), 1)).collect(),
        Distribution::RandomAvailable(list) => list.iter().map(|(b, w)| (name(&b.backend.dispatcher), *w)).collect(),
    }
}

async fn replicas(standalone: &Standalone, discovery: &str) -> Vec<Endpoint> {
    match standalone.resolve(discovery).updates.recv().await {
        Some(Update::Reset(endpoints)) => endpoints,
        other => panic!("{other:?}"),
    }
}

fn addrs(endpoints: &[Endpoint]) -> Vec<String> {
    endpoints.iter().map(|e| e.addr.to_string()).collect()
}

const WEB_KEY: &str = "web.shop.svc.cluster.local:80";

#[tokio::test]
async fn a_service_without_routes_is_balanced_by_address_and_by_name() {
    let (_dir, s) = with(WEB);
    let by_addr = policy(&s, "10.96.0.10:80").await;
    assert_eq!(by_addr.parent.to_string(), "Service.shop.web:80");
    assert_eq!(by_addr.logical.as_deref(), Some(WEB_KEY));
    let (list, precedence) = routes(&by_addr);
    assert_eq!((list[0].meta.name(), precedence), ("http", Precedence::Linkerd));
    assert_eq!(backends(&list[0].rules[0]), [(WEB_KEY.to_string(), 1)]);
    for name in ["web:80", "web.shop:80", "web.shop.svc:80", "web.shop.svc.cluster.local:80"] {
        assert_eq!(policy(&s, name).await, by_addr, "{name}");
    }
    // IPv4 addresses come mapped on dual-stack listeners.
    assert_eq!(policy(&s, "[::ffff:10.96.0.10]:80").await, by_addr);
    assert!(s.watch_client(Target::Name("example.com".into(), 80)).await.is_err());
}

#[tokio::test]
async fn other_destinations_are_forwarded_or_refused() {
    let (_dir, s) = with(WEB);
    let undefined = policy(&s, "10.96.0.10:81").await;
    let Protocol::Opaque(opaque) = &undefined.protocol else { panic!("{undefined:?}") };
    assert_eq!(opaque.route.as_ref().unwrap().refuse, Some(Refuse::Forbidden));
    let pod = policy(&s, "10.1.0.1:8080").await;
    let Distribution::FirstAvailable(list) = &routes(&pod).0[0].rules[0].backends else { panic!() };
    let Dispatcher::Forward(endpoint) = &list[0].backend.dispatcher else { panic!() };
    assert!(endpoint.meta.tls.is_some());
    assert_eq!(endpoint.meta.labels.get("service"), None);
    assert_eq!(endpoint.meta.labels["pod"], "web-7d9-abc".into());
    assert!(matches!(policy(&s, "10.1.0.1:9000").await.protocol, Protocol::Opaque(_)));
    assert_eq!(policy(&s, "10.9.9.9:80").await.parent.name(), "fallback");
    assert_eq!(policy(&s, "1.2.3.4:80").await.parent.name(), "egress-fallback");
}

#[tokio::test]
async fn endpoints_join_slices_pods_and_services() {
    let (_dir, s) = with(WEB);
    let list = replicas(&s, WEB_KEY).await;
    assert_eq!(addrs(&list), ["10.1.0.1:8080", "10.1.0.2:8080"]);
    let meta = &list[0].meta;
    let tls = meta.tls.as_ref().unwrap();
    assert_eq!(tls.server_id.as_str(), "web.shop.serviceaccount.identity.linkerd.cluster.local");
    assert_eq!((meta.hint, meta.opaque_transport_port), (ProtocolHint::Http2, None));
    assert_eq!((meta.weight, meta.zone), (Some(5_000), ZoneLocality::Local));
    let labels: Vec<_> = meta.labels.iter().map(|(k, v)| format!("{k}={v}")).collect();
    assert_eq!(
        labels.join(","),
        "control_plane_ns=linkerd,deployment=web,namespace=shop,pod=web-7d9-abc,pod_template_hash=7d9,service=web,\
         serviceaccount=web,zone=a,zone_locality=local"
    );
    // Nothing is known of the other one but its address and zone.
    assert_eq!((list[1].meta.tls.is_none(), list[1].meta.weight), (true, Some(10_000)));
    assert_eq!(list[1].meta.zone, ZoneLocality::Remote);
    assert!(matches!(s.resolve("nonsense").updates.recv().await, Some(Update::Fail(_))));
    assert!(replicas(&s, "none.shop.svc.cluster.local:80").await.is_empty());
}

#[tokio::test]
async fn opaque_ports_go_through_the_peers_inbound_port() {
    let (_dir, s) = with(&format!(
        "{WEB}---\n{}",
        "{apiVersion: v1, kind: Service, metadata: {name: raw, namespace: shop}, spec: {selector: {app: web}, ports: [{port: 90, targetPort: raw}]}}"
    ));
    let list = replicas(&s, "raw.shop.svc.cluster.local:90").await;
    assert_eq!(addrs(&list), ["10.1.0.1:9000"]);
    assert_eq!((list[0].meta.hint, list[0].meta.opaque_transport_port), (ProtocolHint::Opaque, Some(4143)));
}

#[tokio::test]
async fn clients_know_that_a_server_makes_a_port_opaque() {
    let server = |protocol: &str| {
        format!(
            "{{apiVersion: policy.linkerd.io/v1beta3, kind: Server, metadata: {{name: s, namespace: shop}}, spec: {{podSelector: {{matchLabels: {{app: web}}}}, port: 8080, proxyProtocol: {protocol}}}}}"
        )
    };
    let (dir, s) = with(WEB);
    let transport = async |s: &Standalone| replicas(s, WEB_KEY).await[0].meta.opaque_transport_port;
    assert_eq!(transport(&s).await, None);
    for (protocol, expected) in [("opaque", Some(4143)), ("HTTP/1", None), ("opaque", Some(4143))] {
        dir.write("server.yaml", &server(protocol));
        s.reload();
        assert_eq!(transport(&s).await, expected, "{protocol}");
    }
}

#[tokio::test]
async fn readiness_hints_and_families_choose_replicas() {
    let slice = |name: &str, family: &str, endpoints: &str| {
        format!(
            "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\n\
             metadata: {{name: {name}, namespace: shop, labels: {{kubernetes.io/service-name: s}}}}\n\
             addressType: {family}\nports: [{{name: '', port: 80}}]\nendpoints: [{endpoints}]\n"
        )
    };
    let service =
        "{apiVersion: v1, kind: Service, metadata: {name: s, namespace: shop}, spec: {ports: [{port: 80}]}}\n";
    let check = async |slices: &[String], expected: &[&str]| {
        let (_dir, s) = with(&format!("{service}{}", slices.concat()));
        assert_eq!(addrs(&replicas(&s, "s.shop.svc.cluster.local:80").await), expected);
    };
    check(
        &[slice("a", "IPv4", "{addresses: [10.2.0.1], conditions: {ready: false}}, {addresses: [10.2.0.2]}")],
        &["10.2.0.2:80"],
    )
    .await;
    let hinted = |ip: &str, zone: &str| format!("{{addresses: [{ip}], hints: {{forZones: [{{name: {zone}}}]}}}}");
    let both = format!("{}, {}", hinted("10.2.0.1", "a"), hinted("10.2.0.2", "b"));
    check(&[slice("a", "IPv4", &both)], &["10.2.0.1:80"]).await;
    check(
        &[slice("a", "IPv4", &format!("{both}, {{addresses: [10.2.0.3]}}"))],
        &["10.2.0.1:80", "10.2.0.2:80", "10.2.0.3:80"],
    )
    .await;
    check(&[slice("a", "IPv4", &hinted("10.2.0.2", "b"))], &["10.2.0.2:80"]).await;
    // Two families of one Pod: one is used. Without a Pod to tell, both are.
    let pod = "---\n{apiVersion: v1, kind: Pod, metadata: {name: p, namespace: shop}, status: {podIPs: [{ip: 10.2.0.1}, {ip: 'fd01::1'}]}}\n";
    let (v4, v6) = (slice("a", "IPv4", "{addresses: [10.2.0.1]}"), slice("b", "IPv6", "{addresses: ['fd01::1']}"));
    check(&[pod.into(), v4.clone(), v6.clone()], &["10.2.0.1:80"]).await;
    check(&[v4, v6], &["10.2.0.1:80", "[fd01::1]:80"]).await;
}

#[tokio::test]
async fn machines_and_hand_written_endpoints_are_replicas() {
    let (_dir, s) = with(
        "
apiVersion: v1
kind: Service
metadata: {name: vm, namespace: shop}
spec: {selector: {app: vm}, ports: [{port: 80, targetPort: web}]}
---
apiVersion: workload.linkerd.io/v1beta1
kind: ExternalWorkload
metadata: {name: vm-1, namespace: shop, labels: {app: vm}}
spec:
  meshTLS: {identity: 'spiffe://root/vm', serverName: vm.local}
  ports: [{name: web, port: 8080}, {name: linkerd-proxy, port: 5143}]
  workloadIPs: [{ip: 10.5.0.1}]
---
apiVersion: v1
kind: Service
metadata: {name: old, namespace: shop}
spec: {clusterIP: None, ports: [{port: 80}]}
---
apiVersion: v1
kind: Endpoints
metadata: {name: old, namespace: shop}
subsets: [{addresses: [{ip: 10.5.0.2, hostname: one}, {ip: 10.5.0.3}], notReadyAddresses: [{ip: 10.5.0.4}], ports: [{port: 80}]}]
",
    );
    let list = replicas(&s, "vm.shop.svc.cluster.local:80").await;
    assert_eq!(addrs(&list), ["10.5.0.1:8080"]);
    let tls = list[0].meta.tls.as_ref().unwrap();
    assert_eq!((tls.server_id.as_str(), tls.server_name.as_str()), ("spiffe://root/vm", "vm.local"));
    assert_eq!(addrs(&replicas(&s, "old.shop.svc.cluster.local:80").await), ["10.5.0.2:80", "10.5.0.3:80"]);
    assert_eq!(addrs(&replicas(&s, "one.old.shop.svc.cluster.local:80").await), ["10.5.0.2:80"]);
    let one = policy(&s, "one.old.shop.svc:80").await;
    assert_eq!(backends(&routes(&one).0[0].rules[0]), [("10.5.0.2:80".to_string(), 1)]);
}

#[tokio::test]
async fn gateway_api_routes_follow_the_gateway_api() {
    let (_dir, s) = with(&format!(
        "{WEB}---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {{name: r, namespace: shop}}
spec:
  hostnames: [ignored.example]
  parentRefs: [{{group: '', kind: Service, name: web, port: 80}}]
  rules:
  - matches: [{{path: {{value: /a}}}}]
    timeouts: {{request: 2s, backendRequest: 1s}}
    retry: {{codes: [503], attempts: 2}}
    backendRefs: [{{name: web, port: 80, weight: 9}}, {{name: gone, port: 80}}, {{name: web, port: 99, weight: 0}}]
  - matches: [{{path: {{value: /b}}}}]
    filters: [{{type: RequestRedirect, requestRedirect: {{scheme: https}}}}]
  - matches: [{{path: {{value: /c}}}}]
  - matches: [{{path: {{value: /d}}}}]
    backendRefs: [{{name: web, port: 80, weight: 0}}]
"
    ));
    let p = policy(&s, "10.96.0.10:80").await;
    let (list, precedence) = routes(&p);
    assert_eq!((list.len(), precedence), (1, Precedence::GatewayApi));
    assert!(list[0].hosts.is_empty());
    assert_eq!(list[0].meta.to_string(), "HTTPRoute.shop.r");
    let rules = &list[0].rules;
    assert_eq!(backends(&rules[0]), [(WEB_KEY.into(), 9), ("500 Service not found shop/gone".into(), 1)]);
    let timeouts = rules[0].timeouts;
    assert_eq!(timeouts.request, Some(Duration::from_secs(2)));
    assert_eq!(timeouts.backend_request, Some(Duration::from_secs(1)));
    let retry = rules[0].retry.as_ref().unwrap();
    assert_eq!((retry.max_retries, retry.connection_errors, retry.statuses.as_slice()), (2, true, &[503..=503][..]));
    let Filter::Redirect(redirect) = &rules[1].filters[0] else { panic!() };
    assert_eq!((redirect.status.as_u16(), redirect.port), (302, Some(443)));
    assert_eq!(backends(&rules[2]), [("500 the rule has no backends".into(), 1)]);
    assert_eq!(backends(&rules[3]), [("500 all backends have weight 0".into(), 1)]);
}

#[tokio::test]
async fn linkerd_routes_follow_linkerd_and_service_annotations_fill_in() {
    let route = |spec: &str| {
        format!(
            "---\napiVersion: policy.linkerd.io/v1beta3\nkind: HTTPRoute\nmetadata: {{name: r, namespace: shop}}\nspec: {{hostnames: [a.b], parentRefs: [{{group: core, kind: Service, name: web}}], rules: [{spec}]}}\n"
        )
    };
    let web = WEB.replacen(
        "{name: web, namespace: shop}",
        "{name: web, namespace: shop, annotations: {timeout.linkerd.io/request: 3s, retry.linkerd.io/http: 5xx, balancer.linkerd.io/failure-accrual: consecutive}}",
        1,
    );
    let (_dir, s) = with(&format!("{web}{}", route("{}")));
    let p = policy(&s, "10.96.0.10:80").await;
    let (list, precedence) = routes(&p);
    assert_eq!((list[0].hosts.len(), precedence), (1, Precedence::Linkerd));
    let rule = &list[0].rules[0];
    assert_eq!(backends(rule), [(WEB_KEY.into(), 1)]);
    assert_eq!(rule.timeouts.request, Some(Duration::from_secs(3)));
    assert_eq!(rule.retry.as_ref().unwrap().statuses, [500..=599]);
    assert!(matches!(http(&p).breaker, crate::policy::client::Breaker::Consecutive { max_failures: 7, .. }));
    let (_dir, s) = with(&format!("{web}{}", route("{timeouts: {request: 1.5s}}")));
    let p = policy(&s, "10.96.0.10:80").await;
    assert_eq!(routes(&p).0[0].rules[0].timeouts.request, Some(Duration::from_millis(1500)));
}

#[tokio::test]
async fn route_kinds_and_namespaces_go_before_one_another() {
    let route = |kind: &str, name: &str, namespace: &str, rest: &str| {
        format!(
            "---\napiVersion: gateway.networking.k8s.io/v1\nkind: {kind}\nmetadata: {{name: {name}, namespace: {namespace}}}\n\
             spec: {{parentRefs: [{{group: '', kind: Service, name: api, namespace: other}}]{rest}}}\n"
        )
    };
    let api = "{apiVersion: v1, kind: Service, metadata: {name: api, namespace: other}, spec: {clusterIP: 10.96.0.20, ports: [{name: x, port: 80}]}}\n";
    let names = async |routes_text: &[String]| {
        let (_dir, s) = with(&format!("{api}{}", routes_text.concat()));
        let p = policy(&s, "10.96.0.20:80").await;
        routes(&p).0.iter().map(|r| r.meta.name().to_string()).collect::<Vec<_>>()
    };
    let producer = route("HTTPRoute", "producer", "other", "");
    let consumer = route("HTTPRoute", "consumer", "shop", "");
    let stranger = route("HTTPRoute", "stranger", "elsewhere", "");
    let grpc = route("GRPCRoute", "grpc", "other", "");
    let port = route("HTTPRoute", "port", "other", "").replace("namespace: other}]", "namespace: other, port: 81}]");
    assert_eq!(names(&[producer.clone(), stranger.clone()]).await, ["producer"]);
    assert_eq!(names(&[producer.clone(), consumer.clone()]).await, ["consumer"]);
    assert_eq!(names(&[producer.clone(), grpc]).await, ["grpc"]);
    assert_eq!(names(&[port]).await, ["http"]);
    // Linkerd's own consumer routes are merged with the producer's.
    let linkerd = consumer.replace("gateway.networking.k8s.io/v1", "policy.linkerd.io/v1beta3");
    assert_eq!(names(&[producer, linkerd]).await, ["producer", "consumer"]);
}

#[tokio::test]
async fn app_protocols_and_opaque_ports_declare() {
    let check = async |port: &str, annotations: &str, expected: &str| {
        let (_dir, s) = with(&format!(
            "{{apiVersion: v1, kind: Service, metadata: {{name: a, namespace: shop, annotations: {{{annotations}}}}}, spec: {{clusterIP: 10.96.0.30, ports: [{{port: 80, {port}}}]}}}}"
        ));
        let p = policy(&s, "10.96.0.30:80").await;
        let seen = format!("{:?}", p.protocol);
        assert_eq!(seen.split(['(', ' ']).next(), Some(expected), "{port} {annotations}");
    };
    check("name: a", "", "Detect").await;
    check("appProtocol: http", "", "Http1").await;
    check("appProtocol: kubernetes.io/ws", "", "Http1").await;
    check("appProtocol: kubernetes.io/H2C", "", "Http2").await;
    check("appProtocol: grpc", "", "Http2").await;
    check("appProtocol: https", "", "Opaque").await;
    check("appProtocol: linkerd.io/opaque", "", "Opaque").await;
    check("appProtocol: example.com/other", "", "Opaque").await;
    check("targetPort: 5432", "", "Opaque").await;
    check("targetPort: 5432", "config.linkerd.io/opaque-ports: ''", "Detect").await;
    check("name: a", "config.linkerd.io/opaque-ports: '80'", "Opaque").await;
    check("appProtocol: http", "config.linkerd.io/opaque-ports: '80'", "Http1").await;
}

#[tokio::test]
async fn tls_and_tcp_routes() {
    let route = |kind: &str, version: &str, hosts: &str| {
        format!(
            "{WEB}---\napiVersion: gateway.networking.k8s.io/{version}\nkind: {kind}\nmetadata: {{name: r, namespace: shop}}\n\
             spec: {{parentRefs: [{{group: '', kind: Service, name: web, sectionName: http}}], {hosts}rules: [{{backendRefs: [{{name: web, port: 80}}, {{name: gone, port: 1}}]}}]}}\n"
        )
    };
    let (_dir, s) = with(&route("TLSRoute", "v1", "hostnames: ['*.a.b'], "));
    let p = policy(&s, "10.96.0.10:80").await;
    let Protocol::Tls(tls) = &p.protocol else { panic!("{p:?}") };
    assert_eq!(tls.routes[0].0.len(), 1);
    let (_dir, s) = with(&route("TCPRoute", "v1alpha2", ""));
    let p = policy(&s, "10.96.0.10:80").await;
    let Protocol::Opaque(opaque) = &p.protocol else { panic!("{p:?}") };
    let Distribution::RandomAvailable(list) = &opaque.route.as_ref().unwrap().backends else { panic!() };
    assert!(list[0].0.filters.is_empty());
    assert!(matches!(list[1].0.filters[0], Refuse::Invalid(_)));
}

#[tokio::test]
async fn egress_networks() {
    let egress = |policy: &str| {
        format!(
            "
apiVersion: policy.linkerd.io/v1alpha1
kind: EgressNetwork
metadata: {{name: all, namespace: linkerd-egress}}
spec: {{trafficPolicy: {policy}}}
---
apiVersion: policy.linkerd.io/v1alpha1
kind: EgressNetwork
metadata: {{name: part, namespace: linkerd-egress}}
spec: {{trafficPolicy: Allow, networks: [{{cidr: 8.8.0.0/16, except: [8.8.8.0/24]}}]}}
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {{name: r, namespace: shop}}
spec:
  hostnames: ['*.example.com']
  parentRefs: [{{group: policy.linkerd.io, kind: EgressNetwork, name: all, namespace: linkerd-egress, port: 80}}]
"
        )
    };
    let (_dir, s) = with(&egress("Deny"));
    let p = policy(&s, "1.2.3.4:80").await;
    assert_eq!(p.parent.to_string(), "EgressNetwork.linkerd-egress.all:80");
    let (list, _) = routes(&p);
    assert_eq!(list.iter().map(|r| r.meta.name()).collect::<Vec<_>>(), ["r", "http-egress-deny"]);
    assert_eq!((list[0].hosts.len(), backends(&list[0].rules[0])), (1, vec![("1.2.3.4:80".into(), 1)]));
    assert_eq!(backends(&list[1].rules[0]), [("403 traffic not allowed".into(), 1)]);
    let Protocol::Detect { opaque, .. } = &p.protocol else { panic!() };
    assert_eq!(opaque.route.as_ref().unwrap().refuse, Some(Refuse::Forbidden));
    assert_eq!(routes(&*policy(&s, "1.2.3.4:443").await).0.len(), 1);
    assert_eq!(policy(&s, "8.8.1.1:80").await.parent.name(), "part");
    assert_eq!(policy(&s, "8.8.8.1:80").await.parent.name(), "all");
    // Inside the cluster nothing of this counts.
    assert_eq!(policy(&s, "10.200.0.1:80").await.parent.name(), "fallback");
}

#[tokio::test]
async fn profiles_in_force_replace_routes() {
    let (_dir, s) = with(&format!(
        "{WEB}---
apiVersion: linkerd.io/v1alpha2
kind: ServiceProfile
metadata: {{name: web.shop.svc.cluster.local, namespace: shop}}
spec:
  routes: [{{name: get, condition: {{method: GET}}, isRetryable: true}}]
  dstOverrides: [{{authority: web.shop.svc.cluster.local, weight: 500m}}, {{authority: 'b.shop.svc.cluster.local:81', weight: 1}}]
"
    ));
    let p = policy(&s, "10.96.0.10:80").await;
    let Routes::Profile(profile) = &http(&p).routes else { panic!("{p:?}") };
    assert_eq!((profile.routes.len(), &*profile.addr), (1, WEB_KEY));
    let targets: Vec<_> = profile.targets.iter().map(|(b, w)| (b.meta.to_string(), *w)).collect();
    assert_eq!(targets, [("Service.shop.web:80".into(), 5_000), ("Service.shop.b:81".into(), 10_000)]);
}

#[tokio::test]
async fn profiles_are_told_to_the_inbound_side_too() {
    let manifest = "
apiVersion: linkerd.io/v1alpha2
kind: ServiceProfile
metadata: {name: web.shop.svc.cluster.local, namespace: shop}
spec: {routes: [{name: get, condition: {method: GET}}]}
";
    let (dir, s) = with(WEB);
    let mut known = s.watch_service_profile("web.shop.svc.cluster.local", 80).unwrap();
    known.wait_for(|known| known.as_ref().is_some_and(|p| p.routes.is_empty())).await.unwrap();
    dir.write("profile.yaml", manifest);
    s.reload();
    let found = known.wait_for(|known| known.as_ref().is_some_and(|p| !p.routes.is_empty())).await.unwrap().clone();
    assert_eq!(&*found.unwrap().addr, WEB_KEY);
    assert!(s.watch_service_profile("elsewhere.example", 80).is_none());
}

#[tokio::test]
async fn client_side_policies_of_services() {
    let (_dir, s) = with(&format!(
        "{WEB}---
apiVersion: policy.linkerd.io/v1alpha1
kind: HTTPLocalRateLimitPolicy
metadata: {{name: l, namespace: shop}}
spec: {{targetRef: {{kind: Service, name: web}}, total: {{requestsPerSecond: 5}}}}
---
apiVersion: gateway.networking.x-k8s.io/v1alpha1
kind: XBackendTrafficPolicy
metadata: {{name: t, namespace: shop}}
spec: {{targetRefs: [{{kind: Service, name: web}}], retryConstraint: {{budget: {{percent: 50}}}}, sessionPersistence: {{}}}}
---
apiVersion: gateway.networking.k8s.io/v1
kind: BackendTLSPolicy
metadata: {{name: b, namespace: shop}}
spec: {{targetRefs: [{{kind: Service, name: web}}], validation: {{hostname: a.b, wellKnownCACertificates: System}}}}
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {{name: r, namespace: shop}}
spec: {{parentRefs: [{{group: '', kind: Service, name: web}}], rules: [{{retry: {{}}, backendRefs: [{{name: web, port: 80}}]}}]}}
"
    ));
    let p = policy(&s, "10.96.0.10:80").await;
    assert_eq!(p.rate_limit.as_ref().unwrap().total, Some(5));
    let rule = &routes(&p).0[0].rules[0];
    assert_eq!(rule.retry.as_ref().unwrap().budget.unwrap().ratio, 0.5);
    assert!(rule.session.is_some());
    // The replica that is not meshed gets TLS, the other keeps the mesh's.
    for endpoint in replicas(&s, WEB_KEY).await {
        assert_ne!(endpoint.meta.tls.is_some(), endpoint.meta.origin_tls.is_some(), "{endpoint:?}");
    }
}

#[track_caller]
fn server_policy(standalone: &Standalone, port: u16) -> Arc<ServerPolicy> {
    standalone.watch_server(port).borrow().clone()
}

/// The authorizations of TCP connections, and of the first route.
fn authorizations(policy: &ServerPolicy) -> (Vec<String>, Vec<String>) {
    let names =
        |list: &[crate::policy::Authorization]| list.iter().map(|a| a.meta.name().to_string()).collect::<Vec<_>>();
    match &policy.protocol {
        server::Protocol::Detect { http, tcp, .. } => (names(tcp), names(&http[0].authorizations)),
        server::Protocol::Opaque(tcp) | server::Protocol::Tls(tcp) => (names(tcp), Vec::new()),
        server::Protocol::Http1(r) | server::Protocol::Http2(r) | server::Protocol::Grpc(r) => {
            (Vec::new(), names(&r[0].authorizations))
        }
        server::Protocol::Invalid(why) => panic!("{why}"),
    }
}

#[tokio::test]
async fn ports_without_a_server_have_the_default_policy() {
    let (_dir, s) = with("{apiVersion: v1, kind: Namespace, metadata: {name: shop}}");
    let p = server_policy(&s, 8080);
    assert_eq!(p.meta.name(), "all-unauthenticated");
    assert_eq!(authorizations(&p).0, ["all-unauthenticated", "localhost"]);
    assert!(matches!(server_policy(&s, 5432).protocol, server::Protocol::Opaque(_)));
    let (_dir, s) = with(
        "{apiVersion: v1, kind: Namespace, metadata: {name: shop, annotations: {config.linkerd.io/default-inbound-policy: cluster-unauthenticated, config.linkerd.io/proxy-require-identity-inbound-ports: http}}}",
    );
    assert_eq!(server_policy(&s, 9999).meta.name(), "cluster-unauthenticated");
    assert_eq!(server_policy(&s, 8080).meta.name(), "cluster-authenticated");
    let (_dir, s) = with(
        "{apiVersion: v1, kind: Namespace, metadata: {name: shop, annotations: {config.linkerd.io/default-inbound-policy: opne}}}",
    );
    assert_eq!(authorizations(&server_policy(&s, 8080)).0, ["localhost"]);
}

const SERVER: &str = "
apiVersion: policy.linkerd.io/v1beta3
kind: Server
metadata: {name: http, namespace: shop, labels: {tier: front}}
spec: {podSelector: {matchLabels: {app: client}}, port: http, proxyProtocol: PROTOCOL}
---
apiVersion: policy.linkerd.io/v1beta1
kind: ServerAuthorization
metadata: {name: sa, namespace: shop}
spec: {server: {selector: {matchLabels: {tier: front}}}, client: {meshTLS: {serviceAccounts: [{name: web}]}}}
---
apiVersion: policy.linkerd.io/v1alpha1
kind: AuthorizationPolicy
metadata: {name: ap, namespace: shop}
spec: {targetRef: {group: policy.linkerd.io, kind: Server, name: http}, requiredAuthenticationRefs: [{group: policy.linkerd.io, kind: NetworkAuthentication, name: net}, {group: policy.linkerd.io, kind: MeshTLSAuthentication, name: m}]}
---
apiVersion: policy.linkerd.io/v1alpha1
kind: AuthorizationPolicy
metadata: {name: broken, namespace: shop}
spec: {targetRef: {group: policy.linkerd.io, kind: Server, name: http}, requiredAuthenticationRefs: [{group: policy.linkerd.io, kind: NetworkAuthentication, name: gone}]}
---
apiVersion: policy.linkerd.io/v1alpha1
kind: AuthorizationPolicy
metadata: {name: everywhere, namespace: shop}
spec: {targetRef: {kind: Namespace, name: shop}, requiredAuthenticationRefs: [{kind: ServiceAccount, name: boss}]}
---
apiVersion: policy.linkerd.io/v1alpha1
kind: NetworkAuthentication
metadata: {name: net, namespace: shop}
spec: {networks: [{cidr: 10.0.0.0/8, except: [10.3.0.0/16]}]}
---
apiVersion: policy.linkerd.io/v1alpha1
kind: MeshTLSAuthentication
metadata: {name: m, namespace: shop}
spec: {identityRefs: [{kind: Namespace, name: front}]}
---
apiVersion: policy.linkerd.io/v1alpha1
kind: HTTPLocalRateLimitPolicy
metadata: {name: rl, namespace: shop}
spec: {targetRef: {group: policy.linkerd.io, kind: Server, name: http}, total: {requestsPerSecond: 10}, overrides: [{requestsPerSecond: 5, clientRefs: [{kind: ServiceAccount, name: web}]}]}
";

#[tokio::test]
async fn servers_collect_their_authorizations() {
    let (_dir, s) = with(&SERVER.replace("PROTOCOL", "unknown"));
    let p = server_policy(&s, 8080);
    assert_eq!((p.meta.kind(), p.meta.name(), p.meta.group()), ("server", "http", "policy.linkerd.io"));
    let expected = ["sa", "ap", "everywhere", "localhost"];
    assert_eq!(authorizations(&p), (expected.map(String::from).to_vec(), expected.map(String::from).to_vec()));
    let server::Protocol::Detect { tcp, .. } = &p.protocol else { panic!() };
    let permits = |i: usize, ip: &str, id: &str| {
        let tls = crate::policy::authz::ClientTls::Terminated(Some(id.parse().unwrap()));
        tcp[i].permits(ip.parse().unwrap(), &tls)
    };
    let id = |account: &str, ns: &str| format!("{account}.{ns}.serviceaccount.identity.linkerd.cluster.local");
    assert!(permits(0, "1.1.1.1", &id("web", "shop")) && !permits(0, "1.1.1.1", &id("web", "front")));
    assert!(permits(1, "10.1.1.1", &id("any", "front")));
    assert!(!permits(1, "10.3.1.1", &id("any", "front")) && !permits(1, "10.1.1.1", &id("any", "shop")));
    let limit = p.rate_limit.as_ref().unwrap();
    assert_eq!((limit.total, limit.overrides[0].identities.len()), (Some(10), 1));
    // The Server covers this port alone.
    assert_eq!(server_policy(&s, 8081).meta.name(), "all-unauthenticated");
    for (protocol, expected) in
        [("HTTP/1", "Http1"), ("HTTP/2", "Http2"), ("gRPC", "Grpc"), ("opaque", "Opaque"), ("TLS", "Tls")]
    {
        let (_dir, s) = with(&SERVER.replace("PROTOCOL", protocol));
        let seen = format!("{:?}", server_policy(&s, 8080).protocol);
        assert_eq!(seen.split('(').next(), Some(expected));
    }
}

#[tokio::test]
async fn inbound_routes_and_probes() {
    let probed = LOCAL.replace("containers: [{", "containers: [{livenessProbe: {httpGet: {path: /live, port: http}}, ");
    let dir = Dir::new(&[("local.yaml", &probed), ("server.yaml", &SERVER.replace("PROTOCOL", "HTTP/1"))]);
    let s = start(&dir);
    let server::Protocol::Http1(list) = &server_policy(&s, 8080).protocol else { panic!() };
    assert_eq!(list.iter().map(|r| r.meta.name()).collect::<Vec<_>>(), ["default", "probe"]);
    assert_eq!(list[1].authorizations[0].authentication, Authentication::Unauthenticated);
    dir.write(
        "route.yaml",
        "
apiVersion: policy.linkerd.io/v1beta3
kind: HTTPRoute
metadata: {name: r, namespace: shop}
spec: {parentRefs: [{kind: Server, name: http}], rules: [{matches: [{path: {value: /x}}]}]}
---
apiVersion: policy.linkerd.io/v1alpha1
kind: AuthorizationPolicy
metadata: {name: on-route, namespace: shop}
spec: {targetRef: {group: policy.linkerd.io, kind: HTTPRoute, name: r}}
",
    );
    let mut watch = s.watch_server(8080);
    watch.mark_unchanged();
    assert_eq!(s.reload().generation, 2);
    assert!(watch.has_changed().unwrap());
    let p = watch.borrow().clone();
    let server::Protocol::Http1(list) = &p.protocol else { panic!() };
    assert_eq!(list.iter().map(|r| r.meta.name()).collect::<Vec<_>>(), ["r"]);
    assert_eq!(authorizations(&p).1, ["on-route", "sa", "ap", "everywhere", "localhost"]);
    assert_eq!(p.precedence, Precedence::Linkerd);
    dir.write(
        "gateway.yaml",
        "
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: g, namespace: shop}
spec: {parentRefs: [{group: policy.linkerd.io, kind: Server, name: http}], rules: [{matches: [{path: {value: /y}}]}]}
",
    );
    assert_eq!(s.reload().generation, 3);
    assert_eq!(watch.borrow().precedence, Precedence::GatewayApi);
}

#[tokio::test]
async fn the_workload_may_be_a_deployment_or_a_machine() {
    let dir = Dir::new(&[(
        "a.yaml",
        "
apiVersion: apps/v1
kind: Deployment
metadata: {name: web, namespace: shop}
spec: {template: {metadata: {labels: {app: web}}, spec: {serviceAccountName: sa, containers: [{ports: [{containerPort: 80}]}]}}}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: web-api, namespace: shop}
spec: {template: {metadata: {labels: {app: api}}}}
---
apiVersion: workload.linkerd.io/v1beta1
kind: ExternalWorkload
metadata: {name: vm, namespace: shop}
spec: {meshTLS: {identity: vm.local, serverName: vm.local}, ports: [{port: 80}]}
---
apiVersion: policy.linkerd.io/v1beta3
kind: Server
metadata: {name: pods, namespace: shop}
spec: {podSelector: {}, port: 80}
---
apiVersion: policy.linkerd.io/v1beta3
kind: Server
metadata: {name: machines, namespace: shop}
spec: {externalWorkloadSelector: {}, port: 80}
",
    )]);
    let check = |name: &str, expected: Option<(&str, &str)>| {
        let found = Standalone::start(Options { name: name.into(), ..options(vec![dir.folder()]) });
        match (found, expected) {
            (Ok((s, w)), Some((app, server))) => {
                assert_eq!(
                    (w.labels.get("app").map_or("", |l| l), server_policy(&s, 80).meta.name()),
                    (app, server),
                    "{name}"
                );
            }
            (Err(error), None) => assert!(error.to_string().contains("shop/"), "{error}"),
            (found, _) => panic!("{name}: {:?}", found.map(|f| f.1)),
        }
    };
    check("web", Some(("web", "pods")));
    check("web-7d9f-x2x4z", Some(("web", "pods")));
    check("web-api-7d9f-x2x4z", Some(("api", "pods")));
    check("vm", Some(("", "machines")));
    check("nobody", None);
}

#[tokio::test]
async fn a_bad_change_keeps_the_last_good_state() {
    let (dir, s) = with(WEB);
    let mut policy = s.watch_client(Target::Addr("10.96.0.10:80".parse().unwrap())).await.unwrap();
    policy.mark_unchanged();
    // A good change in one file and a bad one in another: neither counts.
    dir.write(
        "mesh.yaml",
        &WEB.replacen("namespace: shop}", "namespace: shop, annotations: {timeout.linkerd.io/request: 3s}}", 1),
    );
    dir.write(
        "route.yaml",
        "# a comment\n---\nkind: Pod\n---\napiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {name: r, namespace: shop}\nspec:\n  parentRefs: [{group: '', kind: Service, name: web}]\n  rules: [{timeouts: {request: 1.5h}}]\n",
    );
    assert_eq!(s.reload(), Progress { generation: 1, refused: 1 });
    assert!(!policy.has_changed().unwrap());
    let status = s.status();
    assert!(!status.current);
    let errors: Vec<_> =
        status.findings.iter().filter(|f| f.severity == Severity::Error).map(|f| f.to_string()).collect();
    assert_eq!(errors.len(), 2);
    assert!(errors[0].contains("route.yaml: document 1 (line 2)"), "{}", errors[0]);
    assert!(
        errors[1].contains("route.yaml: document 2 (line 4): HTTPRoute shop/r: spec.rules[0].timeouts.request: \"1.5h\" is not a duration"),
        "{}",
        errors[1]
    );
    dir.write("route.yaml", "a: [");
    assert_eq!(s.reload().refused, 2);
    dir.remove("route.yaml");
    assert_eq!(s.reload(), Progress { generation: 2, refused: 2 });
    assert!(policy.has_changed().unwrap());
    assert_eq!(routes(&policy.borrow()).0[0].rules[0].timeouts.request, Some(Duration::from_secs(3)));
    assert!(s.status().current);
    // Nothing changed: nothing happens.
    assert_eq!(s.reload(), Progress { generation: 2, refused: 2 });
}

#[tokio::test]
async fn a_start_with_errors_is_refused_with_a_report() {
    let dir = Dir::new(&[("local.yaml", LOCAL), ("bad.yaml", "a: [")]);
    let error = Standalone::start(options(vec![dir.folder()])).map(|_| ()).unwrap_err();
    assert!(error.to_string().contains("bad.yaml: document 1"), "{error}");
    let gone = Folder { path: "/nonexistent/manifests".into(), cluster: None };
    let error = Standalone::start(options(vec![gone])).map(|_| ()).unwrap_err();
    assert!(error.to_string().contains("/nonexistent/manifests: can't be read"), "{error}");
}

#[tokio::test]
async fn routes_come_and_go_and_later_objects_win() {
    let (dir, s) = with(WEB);
    let mut policy = s.watch_client(Target::Addr("10.96.0.10:80".parse().unwrap())).await.unwrap();
    let route = |path: &str| {
        format!(
            "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {{name: r, namespace: shop}}\nspec: {{parentRefs: [{{group: '', kind: Service, name: web}}], rules: [{{matches: [{{path: {{value: {path}}}}}]}}]}}\n"
        )
    };
    let mut path = async |s: &Standalone| {
        s.reload();
        policy.changed().await.unwrap();
        let p = policy.borrow_and_update().clone();
        let text = format!("{:?}", routes(&p).0[0].rules[0].matches);
        ["/one", "/two"].into_iter().find(|p| text.contains(p)).unwrap_or("none")
    };
    dir.write("r1.yaml", &route("/one"));
    assert_eq!(path(&s).await, "/one");
    dir.write("r2.yaml", &route("/two"));
    assert_eq!(path(&s).await, "/two");
    dir.remove("r2.yaml");
    assert_eq!(path(&s).await, "/one");
    dir.remove("r1.yaml");
    assert_eq!(path(&s).await, "none");
}

#[tokio::test]
async fn addresses_are_assigned_and_told() {
    let text = "{apiVersion: v1, kind: Service, metadata: {name: auto, namespace: shop}, spec: {ports: [{port: 80}]}}";
    let (dir, s) = with(text);
    let assigned = s.status().assigned;
    assert_eq!((assigned.len(), assigned[0].0.as_str()), (1, "shop/auto"));
    let addr = SocketAddr::new(assigned[0].1, 80);
    assert_eq!(policy(&s, &addr.to_string()).await.parent.name(), "auto");
    assert_eq!(start(&dir).status().assigned, assigned);
    // The address stays when others come, and is free when the Service gets its own.
    dir.write(
        "more.yaml",
        "{apiVersion: v1, kind: Service, metadata: {name: more, namespace: shop}, spec: {ports: [{port: 80}]}}",
    );
    s.reload();
    assert!(s.status().assigned.contains(&assigned[0]));
    let mut watch = s.watch_client(Target::Addr(addr)).await.unwrap();
    watch.mark_unchanged();
    dir.write("mesh.yaml", &text.replace("spec: {", "spec: {clusterIP: 10.96.7.7, "));
    s.reload();
    assert!(watch.has_changed().unwrap());
    assert_eq!(watch.borrow().parent.name(), "fallback");
    assert_eq!(policy(&s, "10.96.7.7:80").await.parent.name(), "auto");
}

#[tokio::test]
async fn federated_services_join_clusters() {
    let dir = Dir::new(&[
        ("local.yaml", LOCAL),
        ("web.yaml", WEB),
        (
            "fed.yaml",
            "
apiVersion: v1
kind: Service
metadata:
  name: web-federated
  namespace: shop
  annotations: {multicluster.linkerd.io/remote-discovery: 'web@west', multicluster.linkerd.io/local-discovery: web}
spec: {ports: [{name: http, port: 80}]}
",
        ),
    ]);
    let west = Dir::new(&[("web.yaml", &WEB.replace("10.1.0.", "10.7.0."))]);
    let cluster = Cluster { name: "west".into(), trust_domain: Some("west.example".into()), ..Cluster::default() };
    let folders = vec![dir.folder(), Folder { path: west.0.clone(), cluster: Some(cluster) }];
    let (s, _) = Standalone::start(options(folders)).unwrap();
    let list = replicas(&s, "web-federated.shop.svc.cluster.local:80").await;
    assert_eq!(addrs(&list), ["10.1.0.1:8080", "10.1.0.2:8080", "10.7.0.1:8080", "10.7.0.2:8080"]);
    let tls = list[2].meta.tls.as_ref().unwrap();
    assert_eq!(tls.server_id.as_str(), "web.shop.serviceaccount.identity.linkerd.west.example");
    assert_eq!(&*list[2].meta.cluster, "west");
    assert_eq!(list[2].meta.labels["service"], "web".into());
    assert_eq!(list[2].meta.labels["target_cluster"], "west".into());
    // The other cluster's objects are not seen as our own.
    assert_eq!(addrs(&replicas(&s, WEB_KEY).await).len(), 2);
    west.remove("web.yaml");
    s.reload();
    assert_eq!(replicas(&s, "web-federated.shop.svc.cluster.local:80").await.len(), 2);
}

#[tokio::test]
async fn mirrored_services_go_through_the_gateway() {
    let (_dir, s) = with(
        "
apiVersion: v1
kind: Service
metadata:
  name: web-east
  namespace: shop
  labels: {mirror.linkerd.io/cluster-name: east}
  annotations: {mirror.linkerd.io/remote-svc-fq-name: web.shop.svc.cluster.local, mirror.linkerd.io/remote-gateway-identity: gw.linkerd-multicluster.serviceaccount.identity.linkerd.east}
spec: {ports: [{port: 80}]}
---
apiVersion: v1
kind: Endpoints
metadata: {name: web-east, namespace: shop}
subsets: [{addresses: [{ip: 1.2.3.4}], ports: [{port: 4143}]}]
",
    );
    let list = replicas(&s, "web-east.shop.svc.cluster.local:80").await;
    assert_eq!(addrs(&list), ["1.2.3.4:4143"]);
    assert_eq!(list[0].meta.authority_override.as_deref(), Some(WEB_KEY));
    assert!(list[0].meta.tls.is_some());
    assert_eq!(list[0].meta.labels["target_cluster"], "east".into());
}

/// A Link with every default of `linkerd link`, but for the parts that a test chooses.
fn link(cluster: &str, annotations: &str, more: &str) -> String {
    let gateway = format!("gw.linkerd-multicluster.serviceaccount.identity.linkerd.{cluster}.example");
    format!(
        "apiVersion: multicluster.linkerd.io/v1alpha3\nkind: Link\n\
         metadata: {{name: {cluster}, namespace: linkerd-multicluster, annotations: {{{annotations}}}}}\n\
         spec: {{targetClusterName: {cluster}, targetClusterDomain: {cluster}.local, gatewayAddress: 10.9.9.9, gatewayIdentity: {gateway}, \
         selector: {{matchLabels: {{mirror.linkerd.io/exported: 'true'}}}}, \
         remoteDiscoverySelector: {{matchLabels: {{mirror.linkerd.io/exported: remote-discovery}}}}, \
         federatedServiceSelector: {{matchLabels: {{mirror.linkerd.io/federated: member}}}}{more}}}\n"
    )
}

/// [`WEB`] of another cluster, with labels and annotations on its Service.
fn web_of(network: &str, labels: &str) -> String {
    let head = format!(
        "metadata: {{name: web, namespace: shop, labels: {{{labels}}}, annotations: {{a: b, timeout.linkerd.io/request: 9s}}}}"
    );
    WEB.replace("10.1.0.", network).replacen("metadata: {name: web, namespace: shop}", &head, 1)
}

fn clusters(dirs: &[(&Dir, Option<&str>)]) -> Arc<Standalone> {
    let folder = |(dir, name): &(&Dir, Option<&str>)| Folder {
        cluster: name.map(|name| Cluster { name: name.into(), ..Cluster::default() }),
        ..dir.folder()
    };
    Standalone::start(options(dirs.iter().map(folder).collect())).unwrap().0
}

#[tokio::test]
async fn links_mirror_services() {
    let here = Dir::new(&[("local.yaml", LOCAL), ("link.yaml", &link("east", "", ""))]);
    let exported = web_of("10.7.0.", "mirror.linkerd.io/exported: 'true'");
    let east = Dir::new(&[("web.yaml", &exported)]);
    let s = clusters(&[(&here, None), (&east, Some("east"))]);
    let mirror = "web-east.shop.svc.cluster.local:80";
    let list = replicas(&s, mirror).await;
    assert_eq!(addrs(&list), ["10.9.9.9:4143"]);
    assert_eq!(list[0].meta.authority_override.as_deref(), Some("web.shop.svc.east.local:80"));
    let tls = list[0].meta.tls.as_ref().unwrap();
    assert_eq!(tls.server_id.as_str(), "gw.linkerd-multicluster.serviceaccount.identity.linkerd.east.example");
    assert_eq!(list[0].meta.labels["target_cluster"], "east".into());
    // Settings come along.
    let policy = policy(&s, "web-east.shop:80").await;
    assert_eq!(routes(&policy).0[0].rules[0].timeouts.request, Some(Duration::from_secs(9)));

    // Without replicas there, there are none here.
    let mut resolution = s.resolve(mirror);
    assert!(matches!(resolution.updates.recv().await, Some(Update::Reset(list)) if list.len() == 1));
    east.write("web.yaml", &exported.replace("{addresses", "{conditions: {ready: false}, addresses"));
    s.reload();
    assert!(matches!(resolution.updates.recv().await, Some(Update::Remove(_))));
    east.write("web.yaml", &exported);
    s.reload();
    assert!(matches!(resolution.updates.recv().await, Some(Update::Add(_))));

    // The same with the replicas themselves; names come from the credentials.
    east.write("web.yaml", &web_of("10.7.0.", "mirror.linkerd.io/exported: remote-discovery"));
    here.write(
        "secret.yaml",
        "{apiVersion: v1, kind: Secret, metadata: {name: c, namespace: linkerd-multicluster, labels: {multicluster.linkerd.io/cluster-name: east}, annotations: {multicluster.linkerd.io/trust-domain: east.example, multicluster.linkerd.io/cluster-domain: east.local}}}",
    );
    s.reload();
    let list = replicas(&s, mirror).await;
    assert_eq!(addrs(&list), ["10.7.0.1:8080", "10.7.0.2:8080"]);
    let tls = list[0].meta.tls.as_ref().unwrap();
    assert_eq!(tls.server_id.as_str(), "web.shop.serviceaccount.identity.linkerd.east.example");

    // Ready-made objects go first, and come back when those are gone; what is not exported is not mirrored.
    here.write(
        "own.yaml",
        "{apiVersion: v1, kind: Service, metadata: {name: web-east, namespace: shop}, spec: {ports: [{port: 80}]}}",
    );
    s.reload();
    assert!(replicas(&s, mirror).await.is_empty());
    here.remove("own.yaml");
    s.reload();
    assert_eq!(replicas(&s, mirror).await.len(), 2);
    east.write("web.yaml", &web_of("10.7.0.", ""));
    s.reload();
    assert!(s.watch_client(Target::Name("web-east.shop".into(), 80)).await.is_err());
}

#[tokio::test]
async fn links_join_clusters() {
    let member = "mirror.linkerd.io/federated: member";
    let by_gateway = link("west", "multicluster.linkerd.io/federated-path: gateway", "");
    let here = Dir::new(&[
        ("local.yaml", LOCAL),
        ("web.yaml", &web_of("10.1.0.", member)),
        ("links.yaml", &format!("{}---\n{by_gateway}", link("east", "", ""))),
    ]);
    let east = Dir::new(&[("web.yaml", &web_of("10.7.0.", member))]);
    let west = Dir::new(&[("web.yaml", &web_of("10.8.0.", member))]);
    let s = clusters(&[(&here, None), (&east, Some("east")), (&west, Some("west"))]);
    let name = "web-federated.shop.svc.cluster.local:80";
    let list = replicas(&s, name).await;
    let all = ["10.1.0.1:8080", "10.1.0.2:8080", "10.7.0.1:8080", "10.7.0.2:8080", "10.9.9.9:4143"];
    assert_eq!(addrs(&list), all);
    assert_eq!(list[4].meta.authority_override.as_deref(), Some("web.shop.svc.west.local:80"));

    // A cluster's mistakes are its own: nothing of it is taken in, and the others go on.
    let mut resolution = s.resolve(name);
    resolution.updates.recv().await;
    east.write("web.yaml", "kind: [");
    west.remove("web.yaml");
    assert_eq!(s.reload(), Progress { generation: 2, refused: 1 });
    assert!(matches!(resolution.updates.recv().await, Some(Update::Remove(gone)) if gone.len() == 1));
    assert_eq!(addrs(&replicas(&s, name).await), all[..4]);
    assert!(!s.status().current);
    // A folder that can't be reached is no empty one.
    fs::rename(&east.0, east.0.with_extension("away")).unwrap();
    s.reload();
    assert_eq!(replicas(&s, name).await.len(), 4);
    fs::rename(east.0.with_extension("away"), &east.0).unwrap();
    east.write("web.yaml", &web_of("10.7.1.", member));
    s.reload();
    assert_eq!(addrs(&replicas(&s, name).await)[2..], ["10.7.1.1:8080", "10.7.1.2:8080"]);

    // A cluster that is broken from the start does not keep this one from starting; one's own mistakes do.
    west.write("bad.yaml", "kind: [");
    let s = clusters(&[(&here, None), (&east, Some("east")), (&west, Some("west"))]);
    assert_eq!(replicas(&s, name).await.len(), 4);
}

#[tokio::test]
async fn gateways_are_probed() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let alive = Arc::new(std::sync::atomic::AtomicBool::new(true));
    let told = alive.clone();
    let server = tokio::spawn(async move {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        loop {
            let (mut io, _) = listener.accept().await.unwrap();
            let mut request = [0; 12];
            io.read_exact(&mut request).await.unwrap();
            assert_eq!(&request, b"GET /healthy");
            let status = if told.load(Ordering::SeqCst) { "200 OK" } else { "503 Service Unavailable" };
            io.write_all(format!("HTTP/1.1 {status}\r\ncontent-length: 0\r\n\r\n").as_bytes()).await.unwrap();
        }
    });
    let probe =
        format!(", probeSpec: {{path: /healthy, port: '{port}', period: 10ms, timeout: 5s, failureThreshold: '2'}}");
    let link = link("east", "", &probe).replace("10.9.9.9", "localhost");
    let here = Dir::new(&[("local.yaml", LOCAL), ("link.yaml", &link)]);
    let east = Dir::new(&[("web.yaml", &web_of("10.7.0.", "mirror.linkerd.io/exported: 'true'"))]);
    let folder = Folder { cluster: Some(Cluster { name: "east".into(), ..Cluster::default() }), ..east.folder() };
    let options = Options { watch: true, ..options(vec![here.folder(), folder]) };
    let (s, _) = Standalone::start(options).unwrap();
    let mut resolution = s.resolve("web-east.shop.svc.cluster.local:80");
    let mut expect = async |all: bool| {
        let wait = async {
            let mut known = BTreeSet::new();
            loop {
                match resolution.updates.recv().await {
                    Some(Update::Reset(list) | Update::Add(list)) => {
                        known.extend(list.iter().map(|e| e.addr.to_string()))
                    }
                    Some(Update::Remove(list)) => known.retain(|a| !list.iter().any(|gone| gone.to_string() == *a)),
                    other => panic!("{other:?}"),
                }
                if known.contains("127.0.0.1:4143") == all {
                    return;
                }
            }
        };
        tokio::time::timeout(Duration::from_secs(10), wait).await.unwrap();
    };
    expect(true).await;
    alive.store(false, Ordering::SeqCst);
    expect(false).await;
    alive.store(true, Ordering::SeqCst);
    expect(true).await;
    server.abort();
}

#[test]
fn links_are_checked() {
    let here = Dir::new(&[
        ("links.yaml", &format!("{}---\n{}", link("east", "", ""), link("west", "", ""))),
        (
            "fed.yaml",
            "{apiVersion: v1, kind: Service, metadata: {name: a, namespace: here, annotations: {multicluster.linkerd.io/remote-discovery: 'a@east, a@north'}}, spec: {ports: [{port: 80}]}}",
        ),
    ]);
    let east = Dir::new(&[("web.yaml", &web_of("10.7.0.", "mirror.linkerd.io/exported: 'true'"))]);
    let folder = Folder { cluster: Some(Cluster { name: "east".into(), ..Cluster::default() }), ..east.folder() };
    let report = check_with(&[here.folder(), folder], &Settings::default()).to_string();
    for text in [
        "Link linkerd-multicluster/west: spec: no folder stands for cluster west",
        "Link linkerd-multicluster/east: spec: Services of namespace shop are not mirrored",
        "Service here/a: metadata.annotations: cluster north is not known",
    ] {
        assert!(report.contains(text), "{text}: {report}");
    }
    assert!(report.contains("0 errors, 3 warnings"), "{report}");
}

/// 200 Services with 2 slices of 10 endpoints each, and a route each, in one file for each Service.
fn large() -> Dir {
    let dir = Dir::new(&[("local.yaml", LOCAL)]);
    for i in 0..200 {
        dir.write(&format!("s{i}.yaml"), &large_service(i, 10));
    }
    dir
}

fn large_service(i: usize, in_second: usize) -> String {
    let mut text = format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: s{i}, namespace: shop}}\nspec: {{ports: [{{port: 80}}]}}\n---\n\
         apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {{name: r{i}, namespace: shop}}\n\
         spec: {{parentRefs: [{{group: '', kind: Service, name: s{i}}}], rules: [{{backendRefs: [{{name: s{i}, port: 80}}]}}]}}\n"
    );
    for (slice, n) in [(0, 10), (1, in_second)] {
        let ips: Vec<_> = (0..n).map(|n| format!("{{addresses: [10.{}.{slice}.{n}]}}", 20 + i)).collect();
        write!(
            text,
            "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {{name: s{i}-{slice}, namespace: shop, labels: {{kubernetes.io/service-name: s{i}}}}}\naddressType: IPv4\nports: [{{port: 80}}]\nendpoints: [{}]\n",
            ips.join(", ")
        )
        .unwrap();
    }
    text
}

#[tokio::test]
async fn a_change_costs_what_it_touches() {
    let dir = large();
    let s = start(&dir);
    let assigned = s.status().assigned;
    let mut policies = Vec::new();
    let mut resolutions = Vec::new();
    for (i, (_, ip)) in assigned.iter().enumerate() {
        policies.push(s.watch_client(Target::Addr(SocketAddr::new(*ip, 80))).await.unwrap());
        let mut resolution = s.resolve(&format!("s{i}.shop.svc.cluster.local:80"));
        assert!(matches!(resolution.updates.recv().await, Some(Update::Reset(list)) if list.len() == 20));
        resolutions.push(resolution);
    }
    let before = s.status().work;
    assert_eq!((before.documents, before.policies, before.endpoints), (2 + 200 * 4, 200, 4000));
    // One slice loses an endpoint: one document, one object, the nine endpoints of that slice, no policy.
    dir.write("s7.yaml", &large_service(7, 9));
    s.reload();
    let after = s.status().work;
    assert_eq!(after.documents - before.documents, 1);
    assert_eq!(after.objects - before.objects, 1);
    assert_eq!(after.endpoints - before.endpoints, 9);
    assert_eq!(after.policies, before.policies);
    assert_eq!(resolutions[7].updates.recv().await, Some(Update::Remove(vec!["10.27.1.9:80".parse().unwrap()])));
    assert!(resolutions[8].updates.try_recv().is_err());
    // A route costs its policy.
    let before = after;
    dir.write("s9.yaml", &large_service(9, 10).replace("port: 80}]}]}", "port: 80, weight: 2}]}]}"));
    s.reload();
    let after = s.status().work;
    assert_eq!((after.documents - before.documents, after.policies - before.policies), (1, 1));
    assert_eq!(after.endpoints, before.endpoints);
}

#[tokio::test]
async fn resolutions_merge_what_a_slow_follower_misses() {
    let dir = Dir::new(&[("local.yaml", LOCAL), ("s.yaml", &large_service(0, 10))]);
    let s = start(&dir);
    let mut resolution = s.resolve("s0.shop.svc.cluster.local:80");
    for n in (0..10).rev() {
        dir.write("s.yaml", &large_service(0, n));
        s.reload();
    }
    dir.write("s.yaml", &large_service(0, 3));
    s.reload();
    let mut set = HashSet::new();
    while set.len() != 13 {
        match resolution.updates.recv().await.unwrap() {
            Update::Reset(list) => set = list.into_iter().map(|e| e.addr).collect(),
            Update::Add(list) => set.extend(list.into_iter().map(|e| e.addr)),
            Update::Remove(list) => list.iter().for_each(|a| {
                set.remove(a);
            }),
            Update::Fail(why) => panic!("{why}"),
        }
    }
    // Dropping the source ends its tasks, dropping a resolution its state.
    drop(resolution);
    while !s.shared.state.lock().resolutions.is_empty() {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn folders_are_watched() {
    let (dir, quiet) = with(WEB);
    drop(quiet);
    let (s, _) = Standalone::start(Options { watch: true, ..options(vec![dir.folder()]) }).unwrap();
    let mut progress = s.progress();
    dir.write("new.yaml", "{apiVersion: v1, kind: Service, metadata: {name: new, namespace: shop}, spec: {clusterIP: 10.96.3.3, ports: [{port: 80}]}}");
    let wait = progress.wait_for(|p| p.generation == 2);
    tokio::time::timeout(Duration::from_secs(20), wait).await.unwrap().unwrap();
    assert_eq!(policy(&s, "10.96.3.3:80").await.parent.name(), "new");
}

#[test]
fn check_tells_what_only_shows_across_objects() {
    let dir = Dir::new(&[(
        "a.yaml",
        "
apiVersion: v1
kind: Service
metadata: {name: web}
spec: {clusterIP: None, ports: [{port: 80, appProtocol: magic}]}
---
apiVersion: v1
kind: Service
metadata: {name: a}
spec: {clusterIP: 10.96.0.1, ports: [{port: 80}]}
---
apiVersion: v1
kind: Service
metadata: {name: b}
spec: {clusterIP: 10.96.0.1, ports: [{port: 80}]}
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: r}
spec:
  parentRefs: [{group: '', kind: Service, name: web}, {group: '', kind: Service, name: gone}, {group: '', kind: Service, name: a, port: 81}]
  rules: [{backendRefs: [{name: gone, port: 80}]}]
---
apiVersion: policy.linkerd.io/v1alpha1
kind: AuthorizationPolicy
metadata: {name: p}
spec: {targetRef: {kind: Namespace, name: default}, requiredAuthenticationRefs: [{group: policy.linkerd.io, kind: NetworkAuthentication, name: gone}]}
---
apiVersion: policy.linkerd.io/v1alpha1
kind: EgressNetwork
metadata: {name: e}
spec: {trafficPolicy: Allow, networks: [{cidr: 10.2.0.0/16}]}
---
apiVersion: example.com/v1
kind: Thing
metadata: {name: t}
---
apiVersion: policy.linkerd.io/v1beta3
kind: Server
metadata: {name: raw}
spec: {podSelector: {}, port: 90, proxyProtocol: opaque}
---
apiVersion: policy.linkerd.io/v1beta1
kind: ServerAuthorization
metadata: {name: sa}
spec: {server: {name: gone}, client: {unauthenticated: true}}
---
apiVersion: policy.linkerd.io/v1alpha1
kind: AuthorizationPolicy
metadata: {name: on-route}
spec: {targetRef: {group: gateway.networking.k8s.io, kind: HTTPRoute, name: gone}, requiredAuthenticationRefs: []}
---
apiVersion: policy.linkerd.io/v1alpha1
kind: AuthorizationPolicy
metadata: {name: on-server}
spec: {targetRef: {group: policy.linkerd.io, kind: Server, name: raw}, requiredAuthenticationRefs: []}
---
apiVersion: policy.linkerd.io/v1alpha1
kind: HTTPLocalRateLimitPolicy
metadata: {name: l}
spec: {targetRef: {group: policy.linkerd.io, kind: Server, name: raw}, total: {requestsPerSecond: 1}}
---
apiVersion: policy.linkerd.io/v1alpha1
kind: HTTPLocalRateLimitPolicy
metadata: {name: l-out}
spec: {targetRef: {group: policy.linkerd.io, kind: EgressNetwork, name: gone}, total: {requestsPerSecond: 1}}
---
apiVersion: gateway.networking.k8s.io/v1
kind: BackendTLSPolicy
metadata: {name: tls}
spec: {targetRefs: [{kind: Service, name: a}], validation: {hostname: a.b, caCertificateRefs: [{group: '', kind: ConfigMap, name: gone}]}}
---
apiVersion: v1
kind: Service
metadata: {name: bytes, annotations: {config.linkerd.io/opaque-ports: '80'}}
spec: {clusterIP: 10.96.0.3, ports: [{port: 80}]}
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: unseen}
spec:
  parentRefs: [{group: '', kind: Service, name: bytes}]
  rules:
  - filters: [{type: RequestMirror, requestMirror: {backendRef: {name: gone, port: 80}}}, {type: ExternalAuth}]
    backendRefs: [{group: gateway.networking.x-k8s.io, kind: XBackend, name: x}, {group: multicluster.x-k8s.io, kind: ServiceImport, name: i, port: 80}]
",
    )]);
    let report = check(std::slice::from_ref(&dir.0));
    assert_eq!(report.errors(), 0, "{report}");
    let seen: Vec<_> = report.findings.iter().map(|f| (f.severity, f.document, f.field.as_str())).collect();
    let warning = |document, field| (Severity::Warning, document, field);
    assert_eq!(
        seen,
        [
            warning(1, "spec.ports[0].appProtocol"),
            warning(3, "spec.clusterIP"),
            warning(4, "spec.parentRefs[0]"),
            warning(4, "spec.parentRefs[1]"),
            warning(4, "spec.parentRefs[2]"),
            warning(4, "spec.rules[0].backendRefs[0]"),
            warning(5, "spec.requiredAuthenticationRefs[0]"),
            warning(6, "spec.networks"),
            warning(9, "spec.server.name"),
            warning(10, "spec.targetRef"),
            warning(12, "spec.targetRef"),
            warning(13, "spec.targetRef"),
            warning(14, "spec.validation.caCertificateRefs"),
            warning(16, "spec.rules[0].filters[1].type"),
            warning(16, "spec.rules[0].backendRefs[0]"),
            warning(16, "spec.rules[0].backendRefs[1]"),
            warning(16, "spec.parentRefs[0]"),
            warning(16, "spec.rules[0].filters[0].requestMirror"),
            (Severity::Note, 7, ""),
        ],
        "{report}"
    );
}

#[test]
fn the_examples_of_the_documentation_are_valid() {
    let text = include_str!("../../../docs/outbound.md");
    let examples: Vec<_> = text.split("```yaml\n").skip(1).filter_map(|rest| rest.split("```").next()).collect();
    assert_eq!(examples.len(), 1);
    let dir = Dir::new(&[("example.yaml", examples[0])]);
    let report = check(std::slice::from_ref(&dir.0));
    assert!(report.findings.is_empty() && report.objects == 4, "{report}");
}
