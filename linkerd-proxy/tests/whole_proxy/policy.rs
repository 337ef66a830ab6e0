//! Authorization at the server's proxy: who is let in and who is not.

use crate::{
    apps,
    net::Pod,
    world::{World, service},
};
use http::StatusCode;
use std::net::SocketAddr;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

const POLICY: &str = r#"
apiVersion: policy.linkerd.io/v1beta3
kind: Server
metadata: {name: web, namespace: shop}
spec: {podSelector: {matchLabels: {app: server}}, port: http, proxyProtocol: unknown}
---
apiVersion: policy.linkerd.io/v1beta3
kind: Server
metadata: {name: db, namespace: shop}
spec: {podSelector: {matchLabels: {app: server}}, port: db, proxyProtocol: opaque}
---
apiVersion: policy.linkerd.io/v1alpha1
kind: AuthorizationPolicy
metadata: {name: friends, namespace: shop}
spec:
  targetRef: {group: core, kind: Namespace, name: shop}
  requiredAuthenticationRefs: [{group: policy.linkerd.io, kind: MeshTLSAuthentication, name: friends}]
---
apiVersion: policy.linkerd.io/v1alpha1
kind: MeshTLSAuthentication
metadata: {name: friends, namespace: shop}
spec: {identityRefs: [{kind: ServiceAccount, name: friend}]}
"#;

const WEB: ([u8; 4], u16) = ([10, 96, 0, 10], 80);
const DB: ([u8; 4], u16) = ([10, 96, 0, 10], 5432);

async fn world(test: &str) -> Option<(World, Pod, Pod, Pod, Pod)> {
    let mut world = World::new(test)?;
    let friend = world.meshed("friend", &[], &[]);
    let foe = world.meshed("foe", &[], &[]);
    let stranger = world.plain("stranger", &[]);
    let server = world.meshed("server", &[("http", 8080), ("db", 5432)], &[]);
    world.manifest(
        "web",
        &service(
            "web",
            "server",
            &["10.96.0.10"],
            &[("http", 80, "http", None), ("db", 5432, "db", Some("linkerd.io/opaque"))],
        ),
    );
    world.manifest("policy", POLICY);
    world.start(&["friend", "foe", "server"]).await;
    Some((world, friend, foe, stranger, server))
}

#[tokio::test(flavor = "multi_thread")]
async fn http_is_authorized_by_client_identity() {
    let Some((world, friend, foe, stranger, server)) = world("authz").await else { return };
    let _app = apps::http(&server, 8080, "server");
    let web = SocketAddr::from(WEB);
    assert_eq!(apps::get(&friend, web, "/", &[]).await.unwrap().status, StatusCode::OK);
    assert_eq!(apps::get(&foe, web, "/", &[]).await.unwrap().status, StatusCode::FORBIDDEN);
    assert_eq!(apps::get(&stranger, server.addr(8080), "/", &[]).await.unwrap().status, StatusCode::FORBIDDEN);
    assert_eq!(world.metric("server", "inbound_http_authz_deny_total", &["srv_name=\"web\""]).await, 2.0);
    assert_eq!(world.metric("server", "inbound_http_authz_allow_total", &["authz_name=\"friends\""]).await, 1.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn opaque_connections_are_closed_unless_authorized() {
    let Some((_world, friend, foe, _stranger, server)) = world("authz-tcp").await else { return };
    let _app = apps::tcp_echo(&server, 5432);
    let mut io = friend.connect(DB.into()).await.unwrap();
    io.write_all(b"select").await.unwrap();
    apps::expect_text(&mut io, "select").await;
    let mut io = foe.connect(DB.into()).await.unwrap();
    let _ = io.write_all(b"select").await;
    let mut rest = Vec::new();
    let _ = io.read_to_end(&mut rest).await;
    assert!(rest.is_empty(), "nothing may come back: {rest:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn networks_authorize_clients_without_identity() {
    let Some((world, _friend, _foe, stranger, server)) = world("authz-net").await else { return };
    let _app = apps::http(&server, 8080, "server");
    world.manifest(
        "network",
        &format!(
            "apiVersion: policy.linkerd.io/v1alpha1\nkind: AuthorizationPolicy\nmetadata: {{name: net, namespace: shop}}\nspec:\n  targetRef: {{group: policy.linkerd.io, kind: Server, name: web}}\n  requiredAuthenticationRefs: [{{group: policy.linkerd.io, kind: NetworkAuthentication, name: net}}]\n---\napiVersion: policy.linkerd.io/v1alpha1\nkind: NetworkAuthentication\nmetadata: {{name: net, namespace: shop}}\nspec: {{networks: [{{cidr: {}/32}}]}}\n",
            stranger.ip4
        ),
    );
    world
        .eventually("the stranger is let in", async || {
            apps::get(&stranger, server.addr(8080), "/", &[]).await.unwrap().status == StatusCode::OK
        })
        .await;
}
