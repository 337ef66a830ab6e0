//! What passes between two meshed pods, seen on the bridge: TLS, and not a byte of the application's in plaintext.

use crate::{
    apps,
    net::within,
    world::{World, service},
};
use socket2::{Domain, Protocol, Socket, Type};
use std::{
    io::Read,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};
use tokio::io::AsyncWriteExt;

/// Every frame of Ethernet, in network byte order.
const ETH_P_ALL: u16 = (libc::ETH_P_ALL as u16).to_be();

#[tokio::test(flavor = "multi_thread")]
async fn http_and_opaque_bytes_are_never_seen_in_plaintext() {
    let Some(mut world) = World::new("wire") else { return };
    let client = world.meshed("client", &[], &[]);
    let server = world.meshed("server", &[("http", 8080), ("tcp", 9000)], &[]);
    world.manifest(
        "web",
        &service("web", "server", &["10.96.0.10"], &[("http", 80, "http", None), ("tcp", 90, "tcp", None)]),
    );
    world.start(&["client", "server"]).await;
    let _apps = [apps::http(&server, 8080, "server"), apps::tcp_echo(&server, 9000)];

    let mut wire = within(&world.bridge_netns(), || {
        Socket::new(Domain::PACKET, Type::RAW, Some(Protocol::from(i32::from(ETH_P_ALL))))
    })
    .unwrap();
    wire.set_recv_buffer_size(8 << 20).unwrap();
    wire.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
    let done = Arc::new(AtomicBool::new(false));
    let capture = std::thread::spawn({
        let done = done.clone();
        move || {
            let (mut seen, mut frame) = (Vec::new(), [0; 65536]);
            while !done.load(Ordering::Relaxed) {
                if let Ok(n) = wire.read(&mut frame) {
                    seen.extend_from_slice(&frame[..n]);
                }
            }
            seen
        }
    });
    let web = |port| SocketAddr::from(([10, 96, 0, 10], port));
    let answer = apps::get(&client, web(80), "/sesame-http", &[]).await.unwrap();
    assert_eq!(answer.body, "server GET /sesame-http");
    let mut io = client.connect(web(90)).await.unwrap();
    io.write_all(b"\x01sesame-tcp").await.unwrap();
    apps::expect_text(&mut io, "\x01sesame-tcp").await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    done.store(true, Ordering::Relaxed);
    let seen = capture.join().unwrap();

    let contains = |needle: &[u8]| seen.windows(needle.len()).any(|w| w == needle);
    // A TLS record with a ClientHello in it: type 22, legacy version 3.1, handshake type 1.
    assert!(seen.windows(6).any(|w| w[..3] == [22, 3, 1] && w[5] == 1), "no ClientHello in {} bytes", seen.len());
    assert!(!contains(b"sesame"), "plaintext on the wire");
}
