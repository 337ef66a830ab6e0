//! Outbound protocol detection: silent clients are not waited for in vain, and slow ones are not cut short.

use crate::site::Site;
use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};
use tokio::io::AsyncWriteExt;

fn addr(backend: u8, port: u16) -> SocketAddr {
    ([10, 96, 1, backend], port).into()
}

#[tokio::test(flavor = "multi_thread")]
async fn servers_that_speak_first_are_heard_long_before_the_timeout() {
    let Some(site) = Site::new("detect-first", "", &[]).await else { return };
    let mut waits = Vec::new();
    for _ in 0..5 {
        let started = Instant::now();
        assert_eq!(site.greeting(addr(1, 90), b"").await, "one");
        waits.push(started.elapsed());
    }
    assert!(waits.iter().all(|w| *w < Duration::from_secs(2)), "{waits:?}");
    // An address of which there is no Service either.
    let pod = site.world.pod("two").addr(9000);
    let started = Instant::now();
    assert_eq!(site.greeting(pod, b"").await, "two");
    assert!(started.elapsed() < Duration::from_secs(2), "{:?}", started.elapsed());
    // Bytes that are no HTTP, and HTTP itself, on the same port as before.
    assert_eq!(site.greeting(addr(1, 90), b"\0\x01 no HTTP at all").await, "one");
}

/// A client that takes its time is still served as what it speaks, whatever was opened meanwhile.
#[tokio::test(flavor = "multi_thread")]
async fn slow_clients_are_served_as_what_they_speak() {
    let Some(site) = Site::new("detect-slow", "", &[]).await else { return };
    for silence in [0, 300] {
        for (bytes, answer) in [
            (&b"GET /slow HTTP/1.1\r\nhost: web.shop\r\nconnection: close\r\n\r\n"[..], "one GET /slow"),
            (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0", ""),
        ] {
            let mut io = site.client.connect(addr(1, 80)).await.unwrap();
            tokio::time::sleep(Duration::from_millis(silence)).await;
            io.write_all(bytes).await.unwrap();
            let mut back = Vec::new();
            let ended = async {
                while tokio::io::AsyncReadExt::read_buf(&mut io, &mut back).await.unwrap() > 0 {
                    // The server's SETTINGS, for HTTP/2.
                    if answer.is_empty() && back.get(3) == Some(&4) {
                        break;
                    }
                }
            };
            tokio::time::timeout(Duration::from_secs(10), ended).await.expect("an answer");
            let back = String::from_utf8_lossy(&back);
            assert!(back.contains(answer) && !back.is_empty(), "{silence} ms: {back:?}");
        }
    }
    let labels = ["direction=\"outbound\"", "dst_service=\"one\""];
    assert!(site.world.metric("client", "request_total", &labels).await >= 2.0, "HTTP was not taken for bytes");
}

/// Whoever sets the timeout that short waits for it once: what was heard counts from then on.
#[tokio::test(flavor = "multi_thread")]
async fn a_short_timeout_is_waited_for_once() {
    let env = [("LINKERD2_PROXY_OUTBOUND_DETECT_TIMEOUT", "1s")];
    let Some(site) = Site::new("detect-short", "", &env).await else { return };
    let mut waits = Vec::new();
    for _ in 0..3 {
        let started = Instant::now();
        assert_eq!(site.greeting(addr(1, 90), b"").await, "one");
        waits.push(started.elapsed().as_millis());
    }
    assert!((800..4000).contains(&waits[0]) && waits[1..].iter().all(|w| *w < 800), "{waits:?}");
}
