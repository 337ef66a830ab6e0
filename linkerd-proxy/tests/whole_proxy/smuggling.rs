//! Requests that could be read in two ways, as raw bytes: through a pair of proxies, and through each of them alone. What
//! reaches the application is read by a strict parser; all three ways must agree.

use crate::{
    apps,
    net::Pod,
    world::{World, service},
};
use std::{
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::Duration,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    task::AbortHandle,
};

const WEB: ([u8; 4], u16) = ([10, 96, 0, 10], 80);

/// Requests as the application read them: `METHOD TARGET BODY`, and its complaints about framing.
type Seen = Arc<Mutex<Vec<String>>>;

/// An HTTP/1 server that takes nothing but unambiguous requests, and answers each with 200.
fn strict(pod: &Pod, port: u16, seen: &Seen) -> AbortHandle {
    let (listener, seen) = (pod.listen(port), seen.clone());
    let task = tokio::spawn(async move {
        loop {
            let Ok((io, _)) = listener.accept().await else { continue };
            let seen = seen.clone();
            tokio::spawn(async move {
                let mut io = io;
                let mut buf = Vec::new();
                while let Some(request) = request(&mut io, &mut buf).await {
                    seen.lock().unwrap().push(request);
                    let _ = io.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").await;
                }
            });
        }
    });
    task.abort_handle()
}

/// The next request; none at the end. What is left of a broken one is a request too, so that a test sees it.
async fn request(io: &mut TcpStream, buf: &mut Vec<u8>) -> Option<String> {
    let head = until(io, buf, b"\r\n\r\n").await?;
    let head = String::from_utf8_lossy(&head).into_owned();
    let mut lines = head.lines();
    let line = lines.next().unwrap_or_default().to_string();
    let (mut lengths, mut codings, mut hosts) = (vec![], vec![], 0);
    for header in lines.filter(|l| !l.is_empty()) {
        let Some((name, value)) = header.split_once(": ") else { return Some(format!("bad header {header:?}")) };
        match &*name.to_ascii_lowercase() {
            "content-length" => lengths.push(value.to_string()),
            "transfer-encoding" => codings.push(value.to_string()),
            "host" => hosts += 1,
            _ => {}
        }
    }
    if head.replace("\r\n", "").contains(['\r', '\n']) || hosts > 1 {
        return Some(format!("bad head {head:?}"));
    }
    let mut body = Vec::new();
    match (&*lengths, &*codings) {
        ([], []) => {}
        ([length], []) => {
            let length = length.parse().ok()?;
            while buf.len() < length {
                if io.read_buf(buf).await.ok()? == 0 {
                    break;
                }
            }
            body = buf.drain(..length.min(buf.len())).collect();
        }
        ([], [coding]) if coding == "chunked" => loop {
            let size = until(io, buf, b"\r\n").await?;
            let size = usize::from_str_radix(String::from_utf8_lossy(&size).trim(), 16).expect("a chunk size");
            let mut chunk = Vec::new();
            while chunk.len() < size + 2 {
                chunk.extend(until(io, buf, b"\r\n").await?);
            }
            chunk.truncate(size);
            if size == 0 {
                break;
            }
            body.extend(chunk);
        },
        _ => return Some(format!("two framings {head:?}")),
    }
    let target = line.strip_suffix(" HTTP/1.1").unwrap_or(&line);
    Some(format!("{target} {}", String::from_utf8_lossy(&body)).trim_end().to_string())
}

async fn until(io: &mut TcpStream, buf: &mut Vec<u8>, end: &[u8]) -> Option<Vec<u8>> {
    loop {
        if let Some(at) = buf.windows(end.len()).position(|w| w == end) {
            return Some(buf.drain(..at + end.len()).collect());
        }
        if io.read_buf(buf).await.ok()? == 0 {
            return None;
        }
    }
}

/// Three ways to an application.
struct Ways {
    world: World,
    client: Pod,
    stranger: Pod,
    server: Pod,
    bare: Pod,
    seen: Seen,
    _apps: [AbortHandle; 2],
}

impl Ways {
    async fn new(test: &str) -> Option<Self> {
        let mut world = World::new(test)?;
        let client = world.meshed("client", &[], &[]);
        let stranger = world.plain("stranger", &[]);
        let server = world.meshed("server", &[("http", 8080)], &[]);
        let bare = world.plain("bare", &[("http", 8080)]);
        world.manifest("web", &service("web", "server", &["10.96.0.10"], &[("http", 80, "http", None)]));
        world.start(&["client", "server"]).await;
        let seen = Seen::default();
        let apps = [strict(&server, 8080, &seen), strict(&bare, 8080, &seen)];
        Some(Self { world, client, stranger, server, bare, seen, _apps: apps })
    }

    fn ways(&self) -> [(&'static str, &Pod, SocketAddr); 3] {
        [
            ("pair", &self.client, WEB.into()),
            ("inbound", &self.stranger, self.server.addr(8080)),
            ("outbound", &self.client, self.bare.addr(8080)),
        ]
    }

    /// Sends bytes, closes, and compares the statuses that came back and the requests that arrived, for each way.
    async fn check(&self, bytes: &str, statuses: &[&[u16]], requests: &[&str]) {
        for (way, from, to) in self.ways() {
            self.seen.lock().unwrap().clear();
            let mut io = from.connect(to).await.unwrap();
            io.write_all(bytes.as_bytes()).await.unwrap();
            io.shutdown().await.unwrap();
            let mut answer = Vec::new();
            let ended = tokio::time::timeout(Duration::from_secs(15), io.read_to_end(&mut answer)).await;
            let answer = String::from_utf8_lossy(&answer).into_owned();
            assert!(ended.is_ok(), "{way}: no end of {answer:?}\n{bytes:?}\n{}", self.world.logs());
            let got: Vec<u16> =
                answer.split("HTTP/1.1 ").skip(1).map(|rest| rest[..3].parse().expect("a status")).collect();
            let seen = self.seen.lock().unwrap().clone();
            assert!(
                statuses.contains(&&*got),
                "{way}: {got:?}, expected one of {statuses:?}, for {bytes:?}; {seen:?}\n{answer}"
            );
            assert_eq!(seen, requests, "{way}: {bytes:?}");
        }
    }

    async fn refused(&self, bytes: &str) {
        self.check(bytes, &[&[400], &[501]], &[]).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn http1_heads_that_can_be_read_in_two_ways_are_refused() {
    let Some(ways) = Ways::new("smuggle-head").await else { return };
    let tail = "GET /smuggled HTTP/1.1\r\nhost: web\r\n\r\n";
    for headers in [
        // Lengths.
        "content-length: 5\r\ncontent-length: 6",
        "content-length: 5, 6",
        "content-length: 5, 5",
        "content-length: +5",
        "content-length: 0x5",
        "content-length: 5 5",
        "content-length: -1",
        "content-length:",
        "content-length: 99999999999999999999999",
        // Codings.
        "transfer-encoding: xchunked",
        "transfer-encoding: chunked, identity",
        "transfer-encoding: identity",
        "transfer-encoding: chunked\r\ntransfer-encoding: identity",
        "transfer-encoding:\u{b}chunked",
        "transfer-encoding: chunked\r\ncontent-length: 5\r\ntransfer-encoding: x",
        // Syntax.
        "transfer-encoding : chunked",
        " transfer-encoding: chunked",
        "x: a\r\n b",
        "x: a\rb: c",
        "x: a\0b",
        "content length: 5",
        "no colon here",
        ": no name",
        // Hosts.
        "host: other",
        "host: web",
    ] {
        ways.refused(&format!("POST /a HTTP/1.1\r\nhost: web\r\n{headers}\r\n\r\n{tail}")).await;
    }
    for host in ["a/b", "a b", "a@b", "a,b@c", "a:b:c", "[::1"] {
        ways.refused(&format!("GET /a HTTP/1.1\r\nhost: {host}\r\n\r\n")).await;
    }
    for line in [
        "GET  /a HTTP/1.1",
        "GET /a b HTTP/1.1",
        "GET /a\tb HTTP/1.1",
        "GET a HTTP/1.1",
        "GET ftp://web/a HTTP/1.1",
        "GET http://u:p@web/a HTTP/1.1",
        "GET web:80 HTTP/1.1",
        "GET * HTTP/1.1",
        "GET /a",
        "GET /a HTTP/3.9",
        "GET\t/a HTTP/1.1",
        "CONNECT /a HTTP/1.1",
    ] {
        ways.refused(&format!("{line}\r\nhost: web\r\n\r\n{tail}")).await;
    }
    ways.refused("POST /a HTTP/1.0\r\nhost: web\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn http1_framing_is_read_one_way_by_everybody() {
    let Some(ways) = Ways::new("smuggle-body").await else { return };
    let smuggled = "GET /smuggled HTTP/1.1\r\nhost: web\r\n\r\n";
    // Ordinary requests, to see that the harness sees them.
    ways.check(
        "POST /a HTTP/1.1\r\nhost: web\r\ncontent-length: 3\r\n\r\nabcGET /b HTTP/1.1\r\nhost: web\r\n\r\n",
        &[&[200, 200]],
        &["POST /a abc", "GET /b"],
    )
    .await;
    ways.check(
        "POST /a HTTP/1.1\r\nhost: web\r\ncontent-length: 3\r\ncontent-length: 3\r\n\r\nabc",
        &[&[200]],
        &["POST /a abc"],
    )
    .await;
    // The coding wins, and the connection ends with the answer: what follows is not looked at.
    let both = format!(
        "POST /a HTTP/1.1\r\nhost: web\r\ncontent-length: {}\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n{smuggled}",
        5 + smuggled.len()
    );
    ways.check(&both, &[&[200], &[400]], &["POST /a"]).await;
    // A bare LF ends a line for everybody, and goes on as CR LF.
    ways.check("GET /a HTTP/1.1\nhost: web\nx: y\n\n", &[&[200]], &["GET /a"]).await;
    // Absolute form wins over Host.
    ways.check("GET http://web/a HTTP/1.1\r\nhost: other\r\n\r\n", &[&[200]], &["GET http://web/a"]).await;
    // Headers that frame the message can't be listed away.
    let listed = format!(
        "POST /a HTTP/1.1\r\nhost: web\r\nconnection: content-length, host\r\ncontent-length: {}\r\n\r\n{smuggled}",
        smuggled.len()
    );
    ways.check(&listed, &[&[200]], &[format!("POST /a {smuggled}").trim_end()]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_chunks_never_become_requests() {
    let Some(ways) = Ways::new("smuggle-chunks").await else { return };
    for size in ["5;a\rb", "0x5", "-5", "+5", "5 5", "fffffffffffffffff", "", "5\n;", "g"] {
        let bytes = format!(
            "POST /a HTTP/1.1\r\nhost: web\r\ntransfer-encoding: chunked\r\n\r\n{size}\r\nabcde\r\n0\r\n\r\nGET /smuggled HTTP/1.1\r\nhost: web\r\n\r\n"
        );
        for (way, from, to) in ways.ways() {
            ways.seen.lock().unwrap().clear();
            let mut io = from.connect(to).await.unwrap();
            io.write_all(bytes.as_bytes()).await.unwrap();
            io.shutdown().await.unwrap();
            let mut answer = Vec::new();
            let ended = tokio::time::timeout(Duration::from_secs(15), io.read_to_end(&mut answer)).await;
            let answer = String::from_utf8_lossy(&answer).into_owned();
            assert!(ended.is_ok(), "{way}: {size:?}: no end of {answer:?}");
            assert!(!answer.contains(" 200 "), "{way}: {size:?}: {answer:?}");
            assert_eq!(*ways.seen.lock().unwrap(), Vec::<String>::new(), "{way}: {size:?}");
        }
    }
}

/// A frame of HTTP/2.
fn frame(kind: u8, flags: u8, stream: u8, payload: &[u8]) -> Vec<u8> {
    let mut frame = vec![0, 0, u8::try_from(payload.len()).unwrap(), kind, flags, 0, 0, 0, stream];
    frame.extend(payload);
    frame
}

/// A connection with one request of these fields, as HPACK literals without indexing, and its end.
fn http2(fields: &[(&str, &str)]) -> Vec<u8> {
    let mut block = Vec::new();
    for (name, value) in fields {
        block.push(0);
        for text in [name, value] {
            block.push(u8::try_from(text.len()).unwrap());
            block.extend(text.as_bytes());
        }
    }
    [&b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"[..], &frame(4, 0, 0, &[]), &frame(1, 5, 1, &block)].concat()
}

/// What became of stream 1: the first byte of its response head, or none if it or the connection ended without.
async fn outcome(io: &mut TcpStream) -> Option<u8> {
    loop {
        let mut head = [0; 9];
        io.read_exact(&mut head).await.ok()?;
        let mut payload = vec![0; usize::from(head[1]) << 8 | usize::from(head[2])];
        io.read_exact(&mut payload).await.ok()?;
        match head[3] {
            1 => return payload.first().copied(),
            3 | 7 => return None,
            _ => {}
        }
    }
}

/// HPACK's indexed fields `:status: 200` and `:status: 400` (RFC 7541 appendix A).
const INDEXED_200: u8 = 0x88;
const INDEXED_400: u8 = 0x8c;

#[tokio::test(flavor = "multi_thread")]
async fn http2_fields_never_become_http1_syntax() {
    let Some(ways) = Ways::new("smuggle-http2").await else { return };
    // Peers mark HTTP/1 that they carry in HTTP/2 like this; strangers may, too. It becomes HTTP/1 again.
    let carried = ("l5d-orig-proto", "HTTP/1.1");
    let base = [(":method", "GET"), (":scheme", "http"), (":path", "/a"), (":authority", "web")];
    let with = |name: &'static str, value: &'static str| {
        let mut fields: Vec<_> = base.iter().map(|f| if f.0 == name { (name, value) } else { *f }).collect();
        if !base.iter().any(|f| f.0 == name) {
            let at = if name.starts_with(':') { 0 } else { fields.len() };
            fields.insert(at, (name, value));
        }
        fields.push(carried);
        fields
    };
    let [pair, inbound, outbound] = ways.ways();
    let send_by = async |(way, from, to): (&str, &Pod, SocketAddr), fields: &[(&str, &str)]| {
        ways.seen.lock().unwrap().clear();
        let mut io = from.connect(to).await.unwrap();
        io.write_all(&http2(fields)).await.unwrap();
        let outcome = tokio::time::timeout(Duration::from_secs(15), outcome(&mut io))
            .await
            .unwrap_or_else(|_| panic!("{way}: no outcome of {fields:?}"));
        (outcome, ways.seen.lock().unwrap().clone())
    };
    let send = async |fields: &[(&str, &str)]| send_by(inbound, fields).await;
    assert_eq!(send(&with("x", "y")).await, (Some(INDEXED_200), vec!["GET /a".to_string()]));
    for (name, value) in [
        (":path", "/a HTTP/1.1\r\nhost: web\r\n\r\nGET /smuggled"),
        (":path", "/a b"),
        (":path", "a"),
        (":path", ""),
        (":path", "*"),
        (":method", "GET /smuggled HTTP/1.1\r\n\r\nGET"),
        (":method", "CONNECT"),
        (":method", ""),
        (":scheme", "ht tp"),
        (":authority", "a@b"),
        (":authority", "a/b"),
        (":authority", "a\r\nx: y"),
        ("x", "a\r\ny: z"),
        ("x", "a\nb"),
        ("x", "a\0b"),
        ("x\r\ny", "z"),
        ("x: y", "z"),
        ("X", "upper"),
        ("x y", "z"),
        ("", "z"),
        ("connection", "close"),
        ("transfer-encoding", "chunked"),
        ("upgrade", "websocket"),
        ("te", "gzip"),
        (":path2", "/b"),
        ("content-length", "5"),
        ("content-length", "x"),
    ] {
        for way in [pair, inbound, outbound] {
            let (outcome, seen) = send_by(way, &with(name, value)).await;
            assert!(matches!(outcome, None | Some(INDEXED_400)), "{}: {name:?} {value:?}: {outcome:?}", way.0);
            assert_eq!(seen, Vec::<String>::new(), "{}: {name:?} {value:?}", way.0);
        }
    }
    for repeated in base {
        let mut fields = with("x", "y");
        fields.push(repeated);
        assert_eq!(send(&fields).await, (None, vec![]), "a pseudo-header after a field: {repeated:?}");
        let fields = [&[repeated][..], &base, &[carried]].concat();
        assert_eq!(send(&fields).await, (None, vec![]), "twice: {repeated:?}");
    }
    let fields = [&base[..], &[("host", "other")]].concat();
    assert_eq!(send(&fields).await, (Some(INDEXED_400), vec![]), "Host and :authority disagree");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_is_a_tunnel_only_after_101() {
    let Some(ways) = Ways::new("smuggle-upgrade").await else { return };
    // The application refuses the upgrade with 200: what follows is a request and is checked as one.
    let upgrade = "GET /chat HTTP/1.1\r\nhost: web\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n";
    ways.check(&format!("{upgrade}GET /b HTTP/1.1\r\nhost: web\r\n\r\n"), &[&[200, 200]], &["GET /chat", "GET /b"])
        .await;
    ways.check(&format!("{upgrade}GET /b HTTP/1.1\r\nhost: web\r\nhost: x\r\n\r\n"), &[&[200, 400]], &["GET /chat"])
        .await;
    // A real one, to see that it could be.
    drop(ways);
    let Some(mut world) = World::new("upgrade") else { return };
    let server = world.meshed("server", &[("http", 8080)], &[]);
    let stranger = world.plain("stranger", &[]);
    world.start(&["server"]).await;
    let _app = apps::http(&server, 8080, "server");
    let mut io = stranger.connect(server.addr(8080)).await.unwrap();
    io.write_all(upgrade.as_bytes()).await.unwrap();
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(io.read_u8().await.unwrap());
    }
    assert!(head.starts_with(b"HTTP/1.1 101 "), "{}", String::from_utf8_lossy(&head));
    io.write_all(b"\x81\x00").await.unwrap();
    apps::expect_bytes(&mut io, b"\x81\x00").await;
}
