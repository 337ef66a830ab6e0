//! Limits in time: when each clock starts and stops, and what a client is told before and after response headers.

use crate::{
    apps,
    scripted::{Ask, Kind, ONE, Stage, Told, address, route, service},
};
use futures_util::future::join_all;
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

const REQUEST: u8 = 0;
const RESPONSE: u8 = 1;
const IDLE: u8 = 2;
const BACKEND: u8 = 3;

const MS: Duration = Duration::from_millis(1);
const LIMIT: Duration = Duration::from_millis(300);
/// What a busy machine may add.
const SLACK: Duration = Duration::from_millis(1_200);

fn manifests() -> String {
    let limit = |key| [(key, "300ms")];
    [
        service(REQUEST, &limit("timeout.linkerd.io/request"), ONE),
        service(RESPONSE, &limit("timeout.linkerd.io/response"), ONE),
        service(IDLE, &limit("timeout.linkerd.io/idle"), ONE),
        service(BACKEND, &[], ONE),
        route(BACKEND, "timeouts: {request: 8s, backendRequest: 300ms}"),
    ]
    .concat()
}

fn late(told: &Told) -> bool {
    (LIMIT..LIMIT + SLACK).contains(&told.took)
}

#[tokio::test(flavor = "multi_thread")]
async fn limits_before_and_after_response_headers() {
    let Some(stage) = Stage::new("timeouts", &manifests(), &[]).await else { return };
    // Headers that do not come in time: an answer that says which limit it was, on a connection that stays.
    let silent = [
        (REQUEST, "hang", "request timeout", "request-timeout"),
        (RESPONSE, "slow:3000", "response timeout", "response-timeout"),
        (BACKEND, "hang", "backend request timeout", "response-attempt-timeout"),
    ];
    let no_headers = silent.iter().map(async |(to, script, words, code)| {
        let told = stage.ask(*to, Ask { script, ..Ask::default() }).await;
        assert!(told.status == 504 && late(&told), "{told:?}");
        assert!(told.header("l5d-proxy-error").contains(words), "{told:?}");
        assert_eq!((told.header("l5d-proxy-termination"), told.header("connection")), (*code, ""), "{told:?}");
        let told = stage.ask(*to, Ask { script, kind: Kind::Grpc, ..Ask::default() }).await;
        assert!((told.status, told.header("grpc-status")) == (200, "4") && late(&told), "{told:?}");
    });
    // A body that does not end in time is broken off: HTTP/1 is cut short, HTTP/2 is reset, gRPC ends with trailers.
    let endless = [(REQUEST, "drip:50:60"), (RESPONSE, "drip:50:60"), (IDLE, "stall"), (BACKEND, "stall")];
    let no_end = endless.iter().flat_map(|case| [Kind::Http1, Kind::Http2, Kind::Grpc].map(|kind| (case, kind)));
    let no_end = no_end.map(async |((to, script), kind)| {
        let told = stage.ask(*to, Ask { script, kind, ..Ask::default() }).await;
        assert!(told.status == 200 && late(&told) && told.body.starts_with("drop"), "{told:?}");
        match kind {
            Kind::Http1 => assert!(told.broke.is_some(), "{told:?}"),
            Kind::Http2 => assert!(told.broke.as_ref().is_some_and(|e| e.contains("Reset")), "{told:?}"),
            Kind::Grpc => assert!(told.broke.is_none() && told.header("grpc-status") == "4", "{told:?}"),
        }
    });
    // What is never idle, and what may take its time.
    let patient =
        [(IDLE, "drip:150:5"), (IDLE, "slow:700"), (REQUEST, "200"), (RESPONSE, "drip:20:5"), (BACKEND, "200")];
    let whole = patient.iter().map(async |(to, script)| {
        let told = stage.ask(*to, Ask { script, ..Ask::default() }).await;
        assert!(told.status == 200 && told.broke.is_none(), "{script}: {told:?}");
    });
    tokio::join!(join_all(no_headers), join_all(no_end), join_all(whole));
}

/// The answer to a request whose body comes in four pieces with pauses between them, and when it came. With `stops` the last
/// piece never comes.
async fn upload(stage: &Stage, to: u8, pause: Duration, stops: bool) -> (String, Duration) {
    let (mut answer, mut io) = stage.client.connect(address(to)).await.unwrap().into_split();
    let started = Instant::now();
    io.write_all(b"POST / HTTP/1.1\r\nhost: a\r\nx-script: 200\r\ncontent-length: 4\r\n\r\n").await.unwrap();
    let sender = tokio::spawn(async move {
        for piece in 0..4 {
            if piece < 3 || !stops {
                tokio::time::sleep(pause).await;
                // An answer may have come before, and with it the end.
                let _ = io.write_all(b"x").await;
            }
        }
        io
    });
    let mut head = [0; 12];
    tokio::time::timeout(Duration::from_secs(10), answer.read_exact(&mut head)).await.expect("an answer").unwrap();
    let took = started.elapsed();
    drop(sender.await);
    (String::from_utf8_lossy(&head).into_owned(), took)
}

#[tokio::test(flavor = "multi_thread")]
async fn the_body_of_a_request_counts_where_it_should() {
    let Some(stage) = Stage::new("timeouts-upload", &manifests(), &[]).await else { return };
    let (request, response, idle, stopped) = tokio::join!(
        upload(&stage, REQUEST, 150 * MS, false),
        // Its clock starts when the request has been sent.
        upload(&stage, RESPONSE, 150 * MS, false),
        upload(&stage, IDLE, 150 * MS, false),
        upload(&stage, IDLE, 50 * MS, true),
    );
    assert!(request.0 == "HTTP/1.1 504" && request.1 < LIMIT + SLACK, "{request:?}");
    assert_eq!(response.0, "HTTP/1.1 200", "{response:?}");
    assert_eq!(idle.0, "HTTP/1.1 200", "{idle:?}");
    assert!(stopped.0 == "HTTP/1.1 504" && stopped.1 >= 150 * MS + LIMIT, "{stopped:?}");
    // The connection of a client whose request met its limit serves another one.
    let mut http1 = apps::http1(&stage.client, address(REQUEST)).await;
    for (script, status) in [("hang", 504), ("200", 200)] {
        let req = http::Request::get("/").header("host", "a").header("x-script", script).body(Default::default());
        let answer = apps::read(http1.send_request(req.unwrap()).await.unwrap()).await.unwrap();
        assert_eq!(answer.status, status);
    }
}
