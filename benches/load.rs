//! A load client: so many connections that ask as fast as they are answered, or at a constant rate.
//!
//! At a constant rate every request has a time at which it is due, whatever became of those before it, and its latency
//! counts from then: a proxy that stalls is charged for every request that should have been sent meanwhile (no
//! coordinated omission). HTTP/1.1 clients are blocking threads, whose cost is two system calls per request and whose
//! sleeps are not rounded to a timer wheel's milliseconds. HTTP/2 clients share one thread.

use bytes::Bytes;
use h2::client::SendRequest;
use std::{
    io::{self, Read, Write},
    net::{SocketAddr, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    thread,
    time::{Duration, Instant},
};

/// Longest that one answer may take.
const PATIENCE: Duration = Duration::from_secs(10);
/// Failures after which a connection's client gives up.
const MAX_ERRORS: u64 = 100;
/// Most connections.
const MAX_CONNECTIONS: usize = 10_000;
/// Longest run, warm-up included.
const MAX_TIME: Duration = Duration::from_secs(300);
/// Most latencies kept per connection; later ones are not sampled.
const MAX_SAMPLES: usize = 2_000_000;
/// Largest response head, bytes.
const MAX_HEAD: usize = 16 * 1024;

/// What is asked.
#[derive(Clone, Debug)]
pub struct Spec {
    /// Where to connect to.
    pub to: SocketAddr,
    /// Authority of the requests.
    pub host: String,
    /// Bytes of each answer's body.
    pub size: u64,
    /// Connections.
    pub connections: usize,
    /// How each connection is used.
    pub kind: Kind,
    /// Requests per second of all connections together; none = as fast as they are answered.
    pub rate: Option<u32>,
    /// Time before the measured time.
    pub warmup: Duration,
    /// Measured time.
    pub time: Duration,
}

/// How a connection is used.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    /// HTTP/1.1, one request after the other.
    KeepAlive,
    /// HTTP/1.1, a new connection for each request.
    Reconnect,
    /// HTTP/2 with prior knowledge and so many streams at a time.
    Http2 {
        /// Streams per connection.
        streams: usize,
    },
}

/// What came of it within the measured time.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    /// Requests answered with 200.
    pub requests: u64,
    /// Body bytes received.
    pub bytes: u64,
    /// Requests that failed, at any time.
    pub errors: u64,
    /// The first failure.
    pub error: Option<String>,
    /// Latencies, in microseconds; sorted.
    pub latencies: Vec<u32>,
}

impl Outcome {
    /// The latency below which this share of requests stayed, microseconds; 0 without requests.
    pub fn percentile(&self, share: f64) -> u32 {
        let at = (self.latencies.len() as f64 * share).ceil() as usize;
        self.latencies.get(at.saturating_sub(1)).copied().unwrap_or(0)
    }

    fn failed(&mut self, error: &dyn std::fmt::Display) {
        self.errors += 1;
        self.error.get_or_insert_with(|| error.to_string());
    }

    fn add(&mut self, other: Self) {
        self.requests += other.requests;
        self.bytes += other.bytes;
        self.errors += other.errors;
        self.error = self.error.take().or(other.error);
        self.latencies.extend(other.latencies);
    }
}

/// When requests are due, and which of them count.
struct Clock {
    start: Instant,
    begin: Instant,
    end: Instant,
    /// Time between requests at a constant rate.
    pace: Option<Duration>,
    next: AtomicU64,
}

impl Clock {
    /// When the next request is due; none if the time is over.
    fn due(&self) -> Option<Instant> {
        let due = match self.pace {
            None => Instant::now(),
            Some(pace) => self.start + pace.mul_f64(self.next.fetch_add(1, Relaxed) as f64),
        };
        (due < self.end).then_some(due)
    }

    fn counts(&self, now: Instant) -> bool {
        self.begin <= now && now < self.end
    }

    fn answered(&self, due: Instant, out: &mut Outcome) {
        let now = Instant::now();
        if self.counts(now) {
            out.requests += 1;
            if out.latencies.len() < MAX_SAMPLES {
                out.latencies.push(u32::try_from((now - due).as_micros()).unwrap_or(u32::MAX));
            }
        }
    }
}

/// Runs a load. `phase` is called with `begin` and `end` at the bounds of the measured time.
///
/// # Errors
/// If what is asked is above a bound or makes no sense. Failed requests are part of the outcome.
pub fn run(spec: &Spec, phase: impl Fn(&str) + Sync) -> io::Result<Outcome> {
    let invalid = |text: String| Err(io::Error::new(io::ErrorKind::InvalidInput, text));
    if spec.connections == 0 || spec.connections > MAX_CONNECTIONS {
        return invalid(format!("{} connections: expected 1 to {MAX_CONNECTIONS}", spec.connections));
    }
    if spec.warmup + spec.time > MAX_TIME {
        return invalid(format!("{:?}: expected at most {MAX_TIME:?}", spec.warmup + spec.time));
    }
    if spec.rate == Some(0) || (spec.rate.is_some() && matches!(spec.kind, Kind::Http2 { .. })) {
        return invalid("a rate is above 0 and for HTTP/1.1".into());
    }
    let start = Instant::now();
    let clock = Arc::new(Clock {
        start,
        begin: start + spec.warmup,
        end: start + spec.warmup + spec.time,
        pace: spec.rate.map(|rate| Duration::from_secs(1) / rate),
        next: AtomicU64::new(0),
    });
    let mut sum = thread::scope(|scope| {
        scope.spawn(|| {
            for (at, name) in [(clock.begin, "begin"), (clock.end, "end")] {
                thread::sleep(at.saturating_duration_since(Instant::now()));
                phase(name);
            }
        });
        let mut sum = Outcome::default();
        match spec.kind {
            Kind::Http2 { streams } => sum.add(http2(spec, streams, &clock)?),
            Kind::KeepAlive | Kind::Reconnect => {
                let clients: Vec<_> = (0..spec.connections).map(|_| scope.spawn(|| http1(spec, &clock))).collect();
                for client in clients {
                    sum.add(client.join().map_err(|_| io::Error::other("a client panicked"))?);
                }
            }
        }
        Ok::<_, io::Error>(sum)
    })?;
    sum.latencies.sort_unstable();
    Ok(sum)
}

/// Connections that have been used once and stay open.
///
/// # Errors
/// If one of them can't be opened or is not answered.
pub fn hold(to: SocketAddr, host: &str, connections: usize) -> io::Result<Vec<Client>> {
    let request = request(host, 0);
    let client = |_| {
        let mut client = Client::open(to)?;
        client.ask(&request, &mut |_| {})?;
        Ok(client)
    };
    (0..connections.min(MAX_CONNECTIONS)).map(client).collect()
}

/// Asks for so many answers one after the other, for counts that must not depend on time.
///
/// # Errors
/// If one of them fails.
pub fn count(spec: &Spec, requests: u64) -> io::Result<()> {
    match spec.kind {
        Kind::KeepAlive => {
            let (mut client, request) = (Client::open(spec.to)?, request(&spec.host, spec.size));
            (0..requests).try_for_each(|_| client.ask(&request, &mut |_| {}))
        }
        Kind::Reconnect => {
            let request = request(&spec.host, spec.size);
            (0..requests).try_for_each(|_| Client::open(spec.to)?.ask(&request, &mut |_| {}))
        }
        Kind::Http2 { .. } => runtime()?.block_on(async {
            let send = connect_http2(spec).await?;
            for _ in 0..requests {
                ask_http2(&send, spec, &mut |_| {}).await.map_err(io::Error::other)?;
            }
            Ok(())
        }),
    }
}

fn http1(spec: &Spec, clock: &Clock) -> Outcome {
    let request = request(&spec.host, spec.size);
    let (mut out, mut open) = (Outcome::default(), None);
    while let Some(due) = clock.due() {
        thread::sleep(due.saturating_duration_since(Instant::now()));
        let mut bytes = 0;
        let result = (|| {
            let mut client = match open.take() {
                Some(client) => client,
                None => Client::open(spec.to)?,
            };
            client.ask(&request, &mut |n| {
                if clock.counts(Instant::now()) {
                    bytes += n as u64;
                }
            })?;
            Ok::<_, io::Error>(client)
        })();
        out.bytes += bytes;
        match result {
            Ok(client) => {
                clock.answered(due, &mut out);
                open = Some(client).filter(|_| spec.kind == Kind::KeepAlive);
            }
            // What the end cuts off is no failure.
            Err(_) if Instant::now() >= clock.end => break,
            Err(error) => out.failed(&error),
        }
        if out.errors >= MAX_ERRORS {
            break;
        }
    }
    out
}

fn request(host: &str, size: u64) -> Vec<u8> {
    format!("GET /{size} HTTP/1.1\r\nhost: {host}\r\nuser-agent: compare\r\naccept: */*\r\n\r\n").into_bytes()
}

/// A blocking HTTP/1.1 connection.
#[derive(Debug)]
pub struct Client {
    io: TcpStream,
    buf: Vec<u8>,
}

impl Client {
    fn open(to: SocketAddr) -> io::Result<Self> {
        let io = TcpStream::connect_timeout(&to, PATIENCE)?;
        io.set_nodelay(true)?;
        io.set_read_timeout(Some(PATIENCE))?;
        io.set_write_timeout(Some(PATIENCE))?;
        Ok(Self { io, buf: vec![0; MAX_HEAD] })
    }

    /// One request and its whole answer; `got` is told of body bytes as they come.
    fn ask(&mut self, request: &[u8], got: &mut dyn FnMut(usize)) -> io::Result<()> {
        self.io.write_all(request)?;
        let mut filled = 0;
        let (head, length) = loop {
            let n = self.read(filled)?;
            filled += n;
            if let Some(end) = self.buf[..filled].windows(4).position(|w| w == b"\r\n\r\n") {
                break (end + 4, content_length(&self.buf[..end])?);
            }
            if filled == self.buf.len() {
                return Err(invalid("a response head above 16 KiB"));
            }
        };
        let mut left = length
            .checked_sub((filled - head) as u64)
            .ok_or_else(|| invalid("more bytes than the response announced"))?;
        got(filled - head);
        if left > self.buf.len() as u64 {
            self.buf.resize(256 * 1024, 0);
        }
        while left > 0 {
            let most = self.buf.len().min(usize::try_from(left).unwrap_or(usize::MAX));
            let n = self.io.read(&mut self.buf[..most])?;
            if n == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            left -= n as u64;
            got(n);
        }
        Ok(())
    }

    fn read(&mut self, from: usize) -> io::Result<usize> {
        match self.io.read(&mut self.buf[from..])? {
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            n => Ok(n),
        }
    }
}

/// Body length of a 200 whose head is given.
fn content_length(head: &[u8]) -> io::Result<u64> {
    let head = std::str::from_utf8(head).map_err(|_| invalid("a response head that is no text"))?;
    let mut lines = head.split("\r\n");
    let status = lines.next().unwrap_or_default();
    if status.get(9..12) != Some("200") {
        return Err(invalid(&format!("answered {head:?}")));
    }
    lines
        .filter_map(|l| l.split_once(':'))
        .find(|(name, _)| name.eq_ignore_ascii_case("content-length"))
        .and_then(|(_, value)| value.trim().parse().ok())
        .ok_or_else(|| invalid("a response without content-length"))
}

fn invalid(text: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, text)
}

fn runtime() -> io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()
}

fn http2(spec: &Spec, streams: usize, clock: &Arc<Clock>) -> io::Result<Outcome> {
    runtime()?.block_on(async {
        let mut clients = tokio::task::JoinSet::new();
        for _ in 0..spec.connections {
            let send = connect_http2(spec).await?;
            for _ in 0..streams {
                clients.spawn(stream(send.clone(), spec.clone(), clock.clone()));
            }
        }
        let mut sum = Outcome::default();
        while let Some(out) = clients.join_next().await {
            sum.add(out.map_err(io::Error::other)?);
        }
        Ok(sum)
    })
}

async fn stream(send: SendRequest<Bytes>, spec: Spec, clock: Arc<Clock>) -> Outcome {
    let mut out = Outcome::default();
    while let Some(due) = clock.due() {
        let mut bytes = 0;
        let mut got = |n| {
            if clock.counts(Instant::now()) {
                bytes += n as u64;
            }
        };
        match tokio::time::timeout(PATIENCE, ask_http2(&send, &spec, &mut got)).await {
            Ok(Ok(())) => clock.answered(due, &mut out),
            Ok(Err(error)) => out.failed(&error),
            Err(_) => out.failed(&"no answer in time"),
        }
        out.bytes += bytes;
        if out.errors >= MAX_ERRORS {
            break;
        }
    }
    out
}

async fn connect_http2(spec: &Spec) -> io::Result<SendRequest<Bytes>> {
    let io = tokio::net::TcpStream::connect(spec.to).await?;
    io.set_nodelay(true)?;
    let mut builder = h2::client::Builder::new();
    builder.initial_window_size(1 << 20).initial_connection_window_size(1 << 24);
    let (send, connection) = builder.handshake(io).await.map_err(io::Error::other)?;
    tokio::spawn(async move {
        // Requests see the error too.
        let _ = connection.await;
    });
    Ok(send)
}

async fn ask_http2(
    send: &SendRequest<Bytes>,
    spec: &Spec,
    got: &mut (dyn FnMut(usize) + Send),
) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let uri = format!("http://{}/{}", spec.host, spec.size);
    let req = http::Request::get(uri).version(http::Version::HTTP_2).header("user-agent", "compare").body(())?;
    let (rsp, _) = send.clone().ready().await?.send_request(req, true)?;
    let rsp = rsp.await?;
    if rsp.status() != http::StatusCode::OK {
        return Err(format!("answered {rsp:?}").into());
    }
    let mut body = rsp.into_body();
    while let Some(data) = body.data().await {
        let n = data?.len();
        body.flow_control().release_capacity(n)?;
        got(n);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A server on a thread of its own; it ends with the test process.
    fn server() -> SocketAddr {
        let (tell, told) = std::sync::mpsc::channel();
        thread::spawn(move || {
            runtime().unwrap().block_on(async {
                let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
                tell.send(listener.local_addr().unwrap()).unwrap();
                crate::serve::accept(listener).await;
            });
        });
        told.recv().unwrap()
    }

    fn spec(kind: Kind, size: u64) -> Spec {
        let time = Duration::from_millis(200);
        Spec { to: server(), host: "web".into(), size, connections: 2, kind, rate: None, warmup: time / 4, time }
    }

    #[track_caller]
    fn check(spec: &Spec) -> Outcome {
        let out = run(spec, |_| {}).unwrap();
        assert_eq!((out.errors, out.error.as_deref()), (0, None));
        assert!(out.requests > 0 && out.percentile(0.5) <= out.percentile(1.0));
        assert!(out.bytes >= out.requests * spec.size.min(1), "{out:?}");
        out
    }

    #[test]
    fn every_kind_of_connection_is_answered() {
        for kind in [Kind::KeepAlive, Kind::Reconnect, Kind::Http2 { streams: 3 }] {
            for size in [0, 100, 200_000] {
                check(&spec(kind, size));
            }
            count(&spec(kind, 10), 5).unwrap();
        }
        assert_eq!(hold(server(), "web", 3).unwrap().len(), 3);
    }

    #[test]
    fn a_constant_rate_is_kept() {
        let out = check(&Spec { rate: Some(500), time: Duration::from_millis(400), ..spec(Kind::KeepAlive, 1) });
        assert!(out.requests <= 201, "{}", out.requests);
    }

    #[test]
    fn a_stalled_server_is_charged_for_requests_not_sent() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let to = listener.local_addr().unwrap();
        thread::spawn(move || {
            let (mut io, _) = listener.accept().unwrap();
            let mut buf = [0; 1024];
            let mut first = true;
            while io.read(&mut buf).is_ok_and(|n| n > 0) {
                if std::mem::take(&mut first) {
                    thread::sleep(Duration::from_millis(200));
                }
                io.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").unwrap();
            }
        });
        let out = check(&Spec {
            to,
            connections: 1,
            rate: Some(100),
            warmup: Duration::ZERO,
            time: Duration::from_millis(400),
            ..spec(Kind::KeepAlive, 0)
        });
        // Twenty requests fell due during the stall, the middle one of which had to wait for 100 ms.
        let late = out.latencies.iter().filter(|us| **us > 50_000).count();
        assert!(late >= 10, "{:?}", out.latencies);
    }

    #[test]
    fn loads_are_bounded() {
        let good = spec(Kind::KeepAlive, 0);
        let too_many = Spec { connections: MAX_CONNECTIONS + 1, ..good.clone() };
        let too_long = Spec { time: MAX_TIME, ..good.clone() };
        let no_rate = Spec { rate: Some(0), ..good };
        for spec in [too_many, too_long, no_rate] {
            assert_eq!(run(&spec, |_| {}).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        }
    }
}
