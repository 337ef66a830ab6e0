//! TLS that the proxy originates: for plain requests to the outside, and to backends that demand it.

use crate::{
    apps,
    net::Pod,
    world::{World, service, success},
};
use http::Request;
use http_body_util::Full;
use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

/// A server that ends with the test.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

const OUTSIDE: [u8; 4] = [203, 0, 113, 5];

/// An HTTPS server for `api.test` and, in `ca.pem`, its authority.
fn https(pod: &Pod, dir: &Path) -> Server {
    let openssl = |args: &str| success(Command::new("openssl").current_dir(dir).args(args.split(' ')));
    let key = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2";
    openssl(&format!("req -x509 {key} -subj /CN=outside -keyout ca.key -out ca.pem"));
    openssl(&format!(
        "req -x509 {key} -subj /CN=api -CA ca.pem -CAkey ca.key -keyout api.key -out api.pem -addext \
         basicConstraints=critical,CA:FALSE -addext subjectAltName=DNS:api.test"
    ));
    let mut command = pod.command("openssl");
    command.current_dir(dir).args("s_server -accept 443 -cert api.pem -key api.key -www -quiet".split(' '));
    Server(command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("openssl starts"))
}

/// A client and, outside, an HTTPS server, whose authority is in the ConfigMap `roots`.
async fn world(test: &str) -> Option<(World, Pod, Server)> {
    let mut world = World::new(test)?;
    let client = world.meshed("client", &[], &[]);
    let outside = world.plain("outside", &[]);
    success(outside.command("ip").args(["addr", "add", "203.0.113.5/32", "dev", "lo"]));
    let (bridge, via) = (world.bridge_netns(), outside.ip4.to_string());
    success(Command::new("ip").args(["-n", &bridge, "route", "add", "203.0.113.5", "via", &via]));
    let server = https(&outside, &world.dir);
    world.eventually("the server listens", async || outside.connect(outside.addr(443)).await.is_ok()).await;
    let ca = fs::read_to_string(world.dir.join("ca.pem")).unwrap().replace('\n', "\n    ");
    let roots = format!(
        "apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: roots, namespace: shop}}\ndata:\n  ca.crt: |\n    {ca}\n"
    );
    world.manifest("roots", &roots);
    Some((world, client, server))
}

/// The status of a request, and what the proxy says of it.
async fn get(client: &Pod, to: SocketAddr, host: &str) -> (u16, String) {
    let mut send = apps::http1(client, to).await;
    let req = Request::get("/").header("host", host).body(Full::default()).unwrap();
    let answer = apps::read(send.send_request(req).await.unwrap()).await.unwrap();
    let told = answer.headers.get("l5d-proxy-error").map(|v| v.to_str().unwrap().to_string());
    (answer.status.as_u16(), told.unwrap_or_default())
}

/// Routes of an EgressNetwork, with the authorities that their TLS believes.
fn egress(routes: &[(&str, &str, &str)]) -> String {
    let mut yaml = "apiVersion: policy.linkerd.io/v1alpha1
kind: EgressNetwork
metadata: {name: out, namespace: shop}
spec: {trafficPolicy: Deny}
"
    .to_string();
    for (name, hosts, roots) in routes {
        yaml += &format!(
            "---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {{name: {name}, namespace: shop, annotations: {{egress.linkerd.io/originate-tls: {roots}}}}}
spec:
  parentRefs: [{{group: policy.linkerd.io, kind: EgressNetwork, name: out, port: 80}}]
  hostnames: [{hosts}]
  rules: [{{backendRefs: [{{group: policy.linkerd.io, kind: EgressNetwork, name: out}}]}}]
"
        );
    }
    yaml
}

#[tokio::test(flavor = "multi_thread")]
async fn plain_requests_leave_as_tls_to_verified_hosts_alone() {
    let Some((mut world, client, server)) = world("origination").await else { return };
    world.manifest("egress", &egress(&[("api", "api.test, other.test", "roots"), ("lost", "lost.test", "gone")]));
    world.start(&["client"]).await;
    let failed = async |code: &str| world.metric("client", "terminations_total", &[&format!("code=\"{code}\"")]).await;
    for (host, status, error) in [
        ("api.test", 200, ""),
        // The server proves another name than the one that was asked for.
        ("other.test", 502, "TLS refused"),
        // There are no such authorities: nothing leaves in plain text.
        ("lost.test", 502, "TLS refused"),
        ("else.test", 403, "not allowed"),
    ] {
        let (found, told) = get(&client, (OUTSIDE, 80).into(), host).await;
        assert!(found == status && told.contains(error), "{host}: {found} {told}\n{}", world.logs());
    }
    assert_eq!((failed("tls-failed").await, failed("connect-failed").await), (2.0, 0.0));
    // A server that is not there is no matter of TLS.
    drop(server);
    let (status, told) = get(&client, (OUTSIDE, 80).into(), "api.test").await;
    assert!(status == 502 && !told.contains("TLS refused"), "{status} {told}");
    assert_eq!((failed("tls-failed").await, failed("connect-failed").await), (2.0, 1.0));
}

/// What stands below /etc for the programs of a pod; removed on drop.
struct Etc(PathBuf);

impl Drop for Etc {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_systems_roots_are_believed_where_told() {
    let Some((mut world, client, _server)) = world("origination-system").await else { return };
    let etc = Etc(Path::new("/etc/netns").join(&client.netns));
    let certs = etc.0.join("ssl/certs");
    fs::create_dir_all(&certs).unwrap();
    fs::copy(world.dir.join("ca.pem"), certs.join("ca-certificates.crt")).unwrap();
    world.manifest("egress", &egress(&[("api", "api.test, other.test", "system")]));
    world.start(&["client"]).await;
    assert_eq!(get(&client, (OUTSIDE, 80).into(), "api.test").await.0, 200, "{}", world.logs());
    assert_eq!(get(&client, (OUTSIDE, 80).into(), "other.test").await.0, 502);
}

#[tokio::test(flavor = "multi_thread")]
async fn backends_get_the_tls_that_their_policy_demands() {
    let Some((mut world, client, _server)) = world("origination-backend").await else { return };
    let policies = [
        (
            "right",
            "v1",
            "targetRefs: [{group: '', kind: Service, name: right}], validation: {hostname: api.test, caCertificateRefs: [{group: '', kind: ConfigMap, name: roots}]}",
        ),
        // As Gateway API 1.0 had it.
        (
            "early",
            "v1alpha2",
            "targetRef: {group: '', kind: Service, name: early}, tls: {hostname: api.test, caCertRefs: [{group: '', kind: ConfigMap, name: roots}]}",
        ),
        (
            "wrong",
            "v1alpha3",
            "targetRefs: [{group: '', kind: Service, name: wrong}], validation: {hostname: other.test, caCertificateRefs: [{group: '', kind: ConfigMap, name: roots}]}",
        ),
        (
            "san",
            "v1",
            "targetRefs: [{group: '', kind: Service, name: san}], validation: {hostname: other.test, caCertificateRefs: [{group: '', kind: ConfigMap, name: roots}], subjectAltNames: [{type: Hostname, hostname: api.test}]}",
        ),
        (
            "lost",
            "v1",
            "targetRefs: [{group: '', kind: Service, name: lost}], validation: {hostname: api.test, caCertificateRefs: [{group: '', kind: ConfigMap, name: gone}]}",
        ),
        // Of two, the one that names the port.
        (
            "port",
            "v1",
            "targetRefs: [{group: '', kind: Service, name: port, sectionName: http}], validation: {hostname: api.test, caCertificateRefs: [{group: '', kind: ConfigMap, name: roots}]}",
        ),
        (
            "all",
            "v1",
            "targetRefs: [{group: '', kind: Service, name: port}], validation: {hostname: other.test, caCertificateRefs: [{group: '', kind: ConfigMap, name: roots}]}",
        ),
    ];
    let addr = |i: usize| SocketAddr::from(([10, 96, 2, u8::try_from(i).unwrap()], 80));
    let mut yaml = Vec::new();
    for (i, (name, version, spec)) in policies.iter().enumerate() {
        yaml.push(service(name, "outside", &[&addr(i).ip().to_string()], &[("http", 80, "443", None)]));
        yaml.push(format!("apiVersion: gateway.networking.k8s.io/{version}\nkind: BackendTLSPolicy\nmetadata: {{name: {name}, namespace: shop}}\nspec: {{{spec}}}\n"));
    }
    world.manifest("backends", &yaml.join("---\n"));
    world.start(&["client"]).await;
    for (i, status) in [200, 200, 502, 200, 502, 200].into_iter().enumerate() {
        let (found, told) = get(&client, addr(i), "web.shop").await;
        let refused = status == 502;
        assert!(found == status && told.contains("TLS") == refused, "{}: {found} {told}", policies[i].0);
    }
}
