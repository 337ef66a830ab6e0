//! Clients that do not wait for their answer: the request ends at the server, too.

use crate::world::{World, service};
use std::{net::SocketAddr, time::Duration};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

const REQUEST: &[u8] = b"GET / HTTP/1.1\r\nhost: web.shop\r\n\r\n";

#[tokio::test(flavor = "multi_thread")]
async fn an_http1_client_that_goes_away_ends_its_request_at_the_server() {
    let Some(mut world) = World::new("giving-up") else { return };
    let client = world.meshed("client", &[], &[]);
    let server = world.meshed("server", &[("http", 8080)], &[]);
    world.manifest("web", &service("web", "server", &["10.96.0.10"], &[("http", 80, "http", Some("http"))]));
    world.start(&["client", "server"]).await;
    let app = server.listen(8080);
    for reset in [false, true] {
        let mut io = client.connect(SocketAddr::from(([10, 96, 0, 10], 80))).await.unwrap();
        io.write_all(REQUEST).await.unwrap();
        let (mut at_app, _) = app.accept().await.unwrap();
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(at_app.read_u8().await.unwrap());
        }
        // Longer than clients take that close their side together with their request.
        tokio::time::sleep(Duration::from_millis(50)).await;
        if reset {
            io.set_zero_linger().unwrap();
        }
        drop(io);
        let end = tokio::time::timeout(Duration::from_secs(5), at_app.read_u8()).await;
        assert!(end.is_ok_and(|read| read.is_err()), "the request goes on (reset: {reset})\n{}", world.logs());
    }
}
