//! How large the head of a request may be, on both sides of the mesh and over both versions of HTTP.

use crate::{
    apps,
    net::Pod,
    world::{World, service},
};
use bytes::Bytes;
use http::{HeaderValue, Request, Version};
use http_body_util::Full;
use std::net::SocketAddr;

const WEB: ([u8; 4], u16) = ([10, 96, 0, 10], 80);

/// Status and body of a request with a header of so many bytes.
async fn ask(client: &Pod, version: Version, bytes: usize) -> (u16, String) {
    let value = HeaderValue::try_from("y".repeat(bytes)).unwrap();
    let req = Request::get("http://web.shop/").header("x-large", value);
    let addr = SocketAddr::from(WEB);
    let answered = if version == Version::HTTP_2 {
        apps::http2(client, addr).await.send_request(req.body(Full::<Bytes>::default()).unwrap()).await
    } else {
        let mut req = req.header("host", "web.shop").body(Full::<Bytes>::default()).unwrap();
        *req.uri_mut() = "/".parse().unwrap();
        apps::http1(client, addr).await.send_request(req).await
    };
    let answer = apps::read(answered.unwrap()).await.unwrap();
    (answer.status.as_u16(), answer.body)
}

#[tokio::test(flavor = "multi_thread")]
async fn one_limit_for_both_versions_in_each_direction() {
    const OUTBOUND: &str = "LINKERD2_PROXY_OUTBOUND_SERVER_HTTP2_MAX_HEADER_LIST_SIZE";
    const INBOUND: &str = "LINKERD2_PROXY_INBOUND_SERVER_HTTP2_MAX_HEADER_LIST_SIZE";
    let Some(mut world) = World::new("heads") else { return };
    let client = world.meshed("client", &[], &[]);
    let generous = world.meshed("generous", &[], &[]);
    let server = world.meshed("server", &[("http", 8080)], &[]);
    world.manifest("web", &service("web", "server", &["10.96.0.10"], &[("http", 80, "http", None)]));
    world.spawn("generous", &[(OUTBOUND, "200000")]);
    world.start(&["client", "server"]).await;
    world.wait_ready("generous").await;
    let _app = apps::http(&server, 8080, "server");
    for version in [Version::HTTP_11, Version::HTTP_2] {
        for (from, bytes, refused) in
            [(&client, 60_000, None), (&client, 70_000, Some(OUTBOUND)), (&generous, 70_000, Some(INBOUND))]
        {
            let (status, body) = ask(from, version, bytes).await;
            match refused {
                None => assert_eq!((status, &*body), (200, "server GET /"), "{version:?} {bytes}"),
                Some(setting) => {
                    assert!(status == 431 && body.contains(setting), "{version:?} {bytes}: {status} {body}");
                }
            }
        }
    }
}
