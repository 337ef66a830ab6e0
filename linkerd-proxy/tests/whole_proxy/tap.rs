//! Tap: a real gRPC client with mesh TLS watches requests on both sides; nobody else may.

use crate::{
    apps,
    control_plane::identity_of,
    net::Pod,
    world::{World, service},
};
use hyper_util::rt::{TokioExecutor, TokioIo};
use linkerd_tls::{
    ClientTls, TrustAnchors,
    ca::Issuer,
    identity::{self, Reader, Writer},
};
use linkerd2_proxy_api::tap::{
    ObserveRequest, TapEvent,
    observe_request::{
        Extract, Match,
        extract::{self, http::Headers},
        r#match::{Http, Label, Match as M, http},
    },
    tap_client::TapClient,
    tap_event::{self, ProxyDirection, http::Event},
};
use std::{net::SocketAddr, time::Duration};
use tokio::io::{AsyncRead, AsyncWrite};
use tonic::{Code, Status, Streaming};
use tower::ServiceExt as _;

const ENV: [(&str, &str); 1] =
    [("LINKERD2_PROXY_TAP_SVC_NAME", "viz.shop.serviceaccount.identity.linkerd.cluster.local")];
const TAP: u16 = 4190;

/// An identity of the mesh, without a proxy.
fn identity(world: &World, name: &str) -> (Writer, Reader) {
    let anchors = std::fs::read_to_string(world.dir.join("identity/ca.crt")).unwrap();
    let id = identity_of(name);
    let (mut writer, reader) =
        identity::channel(id.parse().unwrap(), id.parse().unwrap(), TrustAnchors::from_pem(&anchors).unwrap().0);
    writer
        .set_certificate(Issuer::load(&world.dir.join("identity")).unwrap().issue(&id.parse().unwrap()).unwrap())
        .unwrap();
    (writer, reader)
}

/// Observes over a connection.
async fn observe<I>(io: I, req: ObserveRequest) -> Result<Streaming<TapEvent>, Status>
where
    I: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let handshake = hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(io));
    let (send, conn) = handshake.await.expect("HTTP/2");
    tokio::spawn(conn);
    let service = tower::service_fn(move |req: ::http::Request<tonic::body::Body>| {
        let mut send = send.clone();
        async move { send.send_request(req).await }
    });
    let origin = "http://tap".parse().unwrap();
    let mut client = TapClient::with_origin(service.boxed_clone(), origin);
    client.observe(req).await.map(tonic::Response::into_inner)
}

/// Observes a pod's proxy with an identity.
async fn tap(viz: &Pod, who: &Reader, pod: &Pod, req: ObserveRequest) -> Result<Streaming<TapEvent>, Status> {
    let id = identity_of(&pod.name);
    let server =
        ClientTls { server_id: id.parse().unwrap(), server_name: id.parse().unwrap(), transport_header: false };
    let (_, io) = who.client(server).connect(viz.connect(pod.addr(TAP)).await.unwrap()).await.unwrap();
    observe(io, req).await
}

fn wanted(limit: u32, m: M) -> ObserveRequest {
    let headers = extract::Http { extract: Some(extract::http::Extract::Headers(Headers {})) };
    ObserveRequest {
        limit,
        r#match: Some(Match { r#match: Some(m) }),
        extract: Some(Extract { extract: Some(extract::Extract::Http(headers)) }),
    }
}

fn path(prefix: &str) -> M {
    let text = http::StringMatch { r#match: Some(http::string_match::Match::Prefix(prefix.into())) };
    M::Http(Http { r#match: Some(http::Match::Path(text)) })
}

/// The next event: its labels, and what happened.
async fn next(events: &mut Streaming<TapEvent>) -> Option<(TapEvent, Event)> {
    let event = tokio::time::timeout(Duration::from_secs(10), events.message()).await.expect("an event").unwrap()?;
    let Some(tap_event::Event::Http(tap_event::Http { event: Some(what) })) = event.event.clone() else {
        panic!("{event:?}")
    };
    Some((event, what))
}

#[tokio::test(flavor = "multi_thread")]
async fn the_configured_client_sees_requests_and_nobody_else_does() {
    let Some(mut world) = World::new("tap") else { return };
    let client = world.meshed("client", &[], &[]);
    let server = world.meshed("server", &[("http", 8080)], &[]);
    let viz = world.plain("viz", &[]);
    world.manifest("web", &service("web", "server", &["10.96.0.10"], &[("http", 80, "http", None)]));
    world.manifest(
        "profile",
        "apiVersion: linkerd.io/v1alpha2\nkind: ServiceProfile\nmetadata: {name: web.shop.svc.cluster.local, namespace: shop}\nspec: {routes: [{name: seen, condition: {pathRegex: '/(un)?seen.*'}}]}\n",
    );
    world.spawn("client", &ENV);
    world.spawn("server", &ENV);
    world.wait_ready("client").await;
    world.wait_ready("server").await;
    let _app = apps::http(&server, 8080, "server");
    let web = SocketAddr::from(([10, 96, 0, 10], 80));
    let (_keep, operator) = identity(&world, "viz");

    // Whoever is not the one is told so, as are requests that make no sense.
    let (_keep, foe) = identity(&world, "foe");
    let refused = tap(&viz, &foe, &server, wanted(1, path("/"))).await.expect_err("a foe");
    assert_eq!((refused.code(), refused.message()), (Code::Unauthenticated, "Unauthorized client"));
    let plain = viz.connect(server.addr(TAP)).await.unwrap();
    let refused = observe(plain, wanted(1, path("/"))).await.expect_err("no TLS");
    assert_eq!((refused.code(), refused.message()), (Code::Unauthenticated, "no_tls_from_remote"));
    let refused = tap(&viz, &operator, &server, wanted(0, path("/"))).await.expect_err("no limit");
    assert_eq!(refused.code(), Code::InvalidArgument);

    let pod = Label { key: "pod".into(), value: "server".into() };
    let mut inbound = tap(&viz, &operator, &server, wanted(2, path("/seen"))).await.unwrap();
    let mut outbound = tap(&viz, &operator, &client, wanted(1, M::DestinationLabel(pod))).await.unwrap();
    for path in ["/unseen", "/seen/1", "/unseen", "/status/503"] {
        let _ = apps::get(&client, web, path, &[("x-test", "1")]).await.unwrap();
    }
    assert_eq!(apps::grpc(&client, web, "/seen/2").await.1, "0");

    // The server's proxy, of which only two were asked for.
    let (event, what) = next(&mut inbound).await.unwrap();
    assert_eq!(event.proxy_direction(), ProxyDirection::Inbound);
    let source = event.source_meta.unwrap().labels;
    assert_eq!((&*source["tls"], &source["client_id"]), ("true", &identity_of("client")));
    let labels = event.destination_meta.unwrap().labels;
    assert_eq!((&*labels["srv_kind"], &*labels["route_name"], &*labels["tls"]), ("default", "default", "loopback"));
    assert!(labels.contains_key("authz_name"), "{labels:?}");
    assert_eq!(event.route_meta.unwrap().labels["route"], "seen");
    let destination = SocketAddr::try_from(event.destination.unwrap()).unwrap();
    assert_eq!(destination, server.addr(8080));
    let Event::RequestInit(init) = what else { panic!("{what:?}") };
    assert_eq!((&*init.path, &*init.authority), ("/seen/1", "web.shop.svc.cluster.local"));
    assert!(init.headers.unwrap().headers.iter().any(|h| h.name == "x-test" && h.value == b"1"));
    let (_, what) = next(&mut inbound).await.unwrap();
    assert!(matches!(&what, Event::ResponseInit(rsp) if rsp.http_status == 200 && rsp.id == init.id), "{what:?}");
    let (_, what) = next(&mut inbound).await.unwrap();
    assert!(matches!(&what, Event::ResponseEnd(end) if end.response_bytes == 18 && end.id == init.id), "{what:?}");
    assert!(matches!(next(&mut inbound).await.unwrap().1, Event::RequestInit(init) if init.path == "/seen/2"));
    assert!(matches!(next(&mut inbound).await.unwrap().1, Event::ResponseInit(_)));
    let (_, what) = next(&mut inbound).await.unwrap();
    let ok = Some(linkerd2_proxy_api::tap::Eos::from_grpc_status(0));
    assert!(matches!(&what, Event::ResponseEnd(end) if end.eos == ok && end.trailers.is_some()), "{what:?}");
    assert!(next(&mut inbound).await.is_none(), "as many as asked for");

    // The client's proxy.
    let (event, what) = next(&mut outbound).await.unwrap();
    assert_eq!(event.proxy_direction(), ProxyDirection::Outbound);
    assert!(matches!(what, Event::RequestInit(init) if init.path == "/unseen"));
    assert_eq!(SocketAddr::try_from(event.source.unwrap()).unwrap().ip(), client.ip4);
    assert_eq!(event.route_meta.unwrap().labels["route"], "seen");
    let labels = event.destination_meta.unwrap().labels;
    assert_eq!((&*labels["tls"], &labels["server_id"]), ("true", &identity_of("server")));
    assert!(labels.contains_key("serviceaccount"), "{labels:?}");
}
