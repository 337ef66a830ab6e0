//! TLS that the proxy originates for plain requests to the outside, and the egress policy around it.

use crate::{
    apps,
    net::Pod,
    world::{World, success},
};
use http::Request;
use http_body_util::Full;
use std::{
    fs,
    path::Path,
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

#[tokio::test(flavor = "multi_thread")]
async fn plain_requests_leave_as_tls_to_verified_hosts_alone() {
    let Some(mut world) = World::new("origination") else { return };
    let client = world.meshed("client", &[], &[]);
    let outside = world.plain("outside", &[]);
    success(outside.command("ip").args(["addr", "add", "203.0.113.5/32", "dev", "lo"]));
    let (bridge, via) = (world.bridge_netns(), outside.ip4.to_string());
    success(Command::new("ip").args(["-n", &bridge, "route", "add", "203.0.113.5", "via", &via]));
    let _server = https(&outside, &world.dir);
    let ca = fs::read_to_string(world.dir.join("ca.pem")).unwrap().replace('\n', "\n    ");
    world.manifest(
        "egress",
        &format!(
            "apiVersion: policy.linkerd.io/v1alpha1
kind: EgressNetwork
metadata: {{name: out, namespace: shop}}
spec: {{trafficPolicy: Deny}}
---
apiVersion: v1
kind: ConfigMap
metadata: {{name: roots, namespace: shop}}
data:
  ca.crt: |
    {ca}
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata:
  name: api
  namespace: shop
  annotations: {{egress.linkerd.io/originate-tls: roots}}
spec:
  parentRefs: [{{group: policy.linkerd.io, kind: EgressNetwork, name: out, port: 80}}]
  hostnames: [api.test, other.test]
  rules: [{{backendRefs: [{{group: policy.linkerd.io, kind: EgressNetwork, name: out}}]}}]
"
        ),
    );
    world.start(&["client"]).await;
    for (host, status, error) in [
        ("api.test", 200, None),
        // The server proves another name than the one that was asked for.
        ("other.test", 502, Some("TLS refused")),
        ("else.test", 403, Some("not allowed")),
    ] {
        let mut send = apps::http1(&client, (OUTSIDE, 80).into()).await;
        let req = Request::get("/").header("host", host).body(Full::default()).unwrap();
        let answer = apps::read(send.send_request(req).await.unwrap()).await.unwrap();
        let told = answer.headers.get("l5d-proxy-error").map(|v| v.to_str().unwrap().to_string());
        assert_eq!(answer.status, status, "{host}: {told:?}\n{}", world.logs());
        assert!(error.is_none_or(|e| told.as_deref().is_some_and(|t| t.contains(e))), "{host}: {told:?}");
    }
}
