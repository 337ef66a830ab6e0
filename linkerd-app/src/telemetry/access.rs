//! The access log: one line per inbound request, in the order in which responses complete (contract.md 3.5).
//!
//! Requests hand their entry to a bounded queue and go on; a thread of its own formats and writes. When the queue is full,
//! entries are dropped and counted, since a slow standard error must not slow the traffic.

use super::{Code, metric::Counter};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode, Uri, Version, header};
use linkerd_tls::Id;
use std::{
    fmt::Write as _,
    io::{self, Write},
    net::SocketAddr,
    sync::{Arc, mpsc},
    thread,
    time::{Duration, Instant, SystemTime},
};
use time::OffsetDateTime;

/// Entries that may wait to be written: a second's worth at the rate of a busy proxy. About a kilobyte each.
const QUEUE: usize = 8_192;
/// Bytes gathered into one write.
const BUFFER: usize = 64 * 1024;
/// A written line is seen at the latest after this.
const FLUSH: Duration = Duration::from_millis(500);
/// How long a farewell waits for a slow standard error.
const CLOSE: Duration = Duration::from_secs(1);

/// How lines look.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Format {
    /// Like Apache's common format, with the mesh identity for the user; no sizes.
    Apache,
    /// One object per line.
    Json,
}

/// Neither `apache` nor `json`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no access log format; it is `apache` or `json`")]
pub struct InvalidFormat(String);

impl std::str::FromStr for Format {
    type Err = InvalidFormat;

    fn from_str(text: &str) -> Result<Self, InvalidFormat> {
        match text.trim().to_ascii_lowercase().as_str() {
            "apache" => Ok(Self::Apache),
            "json" => Ok(Self::Json),
            _ => Err(InvalidFormat(text.to_string())),
        }
    }
}

/// Where entries go; clones go to the same place.
#[derive(Clone, Debug, Default)]
pub struct AccessLog(Option<Open>);

#[derive(Clone, Debug)]
struct Open {
    queue: mpsc::SyncSender<Message>,
    dropped: Arc<Counter>,
}

enum Message {
    Entry(Box<Entry>),
    /// Answered when all before it is written.
    Flush(mpsc::SyncSender<()>),
}

/// A request as the log tells it. Header values are shared, not copied.
#[derive(Clone, Debug)]
pub struct Entry {
    /// When the request came.
    pub timestamp: SystemTime,
    /// The client.
    pub client: SocketAddr,
    /// Its verified identity.
    pub client_id: Option<Id>,
    /// Method.
    pub method: Method,
    /// As it came.
    pub uri: Uri,
    /// As it came.
    pub version: Version,
    /// `host`
    pub host: Option<HeaderValue>,
    /// `user-agent`
    pub user_agent: Option<HeaderValue>,
    /// `content-length` of the request.
    pub request_bytes: Option<HeaderValue>,
    /// First present of `x-b3-traceid`, `x-request-id`, `x-amzn-trace-id`.
    pub trace_id: Option<HeaderValue>,
    /// Status; none if no response was sent.
    pub status: Option<StatusCode>,
    /// `content-length` of the response.
    pub response_bytes: Option<HeaderValue>,
    /// Until the response's headers.
    pub processing: Duration,
    /// Until the response's end.
    pub total: Duration,
    /// Why it ended, if not as it was meant to.
    pub termination: Option<Code>,
}

impl Entry {
    /// The request's part. Made when the request comes, before anything of it is changed.
    pub fn new<B>(request: &Request<B>, client: SocketAddr, client_id: Option<Id>) -> Self {
        let headers = request.headers();
        Self {
            timestamp: SystemTime::now(),
            client,
            client_id,
            method: request.method().clone(),
            uri: request.uri().clone(),
            version: request.version(),
            host: headers.get(header::HOST).cloned(),
            user_agent: headers.get(header::USER_AGENT).cloned(),
            request_bytes: headers.get(header::CONTENT_LENGTH).cloned(),
            trace_id: trace_id(headers),
            status: None,
            response_bytes: None,
            processing: Duration::ZERO,
            total: Duration::ZERO,
            termination: None,
        }
    }

    /// The response's head, so long after the request came.
    pub fn response<B>(&mut self, response: &Response<B>, processing: Duration) {
        self.status = Some(response.status());
        self.response_bytes = response.headers().get(header::CONTENT_LENGTH).cloned();
        self.processing = processing;
    }

    fn write(&self, format: Format, out: &mut String) {
        // Writing to a String cannot fail.
        let _ = match format {
            Format::Apache => self.apache(out),
            Format::Json => self.json(out),
        };
        out.push('\n');
    }

    fn apache(&self, out: &mut String) -> std::fmt::Result {
        let id = self.client_id.as_ref().map_or("-", Id::as_str);
        // A parsed URI has neither blanks nor quotes.
        let Self { client, method, uri, version, .. } = self;
        write!(out, "{client} {id} - [{}] \"{method} {uri} {version:?}\" ", timestamp(self.timestamp))?;
        match self.status {
            Some(status) => write!(out, "{}", status.as_u16())?,
            None => out.push('-'),
        }
        match self.termination {
            Some(code) => write!(out, " {code}"),
            None => Ok(()),
        }
    }

    fn json(&self, out: &mut String) -> std::fmt::Result {
        let text = |value: &Option<HeaderValue>| {
            value.as_ref().map(|v| String::from_utf8_lossy(v.as_bytes()).into_owned()).unwrap_or_default()
        };
        let client_id = self.client_id.as_ref().map_or("", Id::as_str);
        let mut separator = '{';
        let mut pair = |name: &str, value: &str| {
            let value = serde_json::Value::from(value);
            let result = write!(out, "{separator}\"{name}\":{value}");
            separator = ',';
            result
        };
        pair("client.addr", &self.client.to_string())?;
        pair("client.id", client_id)?;
        pair("host", &text(&self.host))?;
        pair("method", self.method.as_str())?;
        pair("processing_ns", &self.processing.as_nanos().to_string())?;
        pair("request_bytes", &text(&self.request_bytes))?;
        pair("response_bytes", &text(&self.response_bytes))?;
        write!(out, ",\"status\":{}", self.status.map_or(0, |s| s.as_u16()))?;
        let mut pair = |name: &str, value: &str| write!(out, ",\"{name}\":{}", serde_json::Value::from(value));
        if let Some(code) = self.termination {
            pair("termination", code.as_str())?;
        }
        pair("timestamp", &timestamp(self.timestamp))?;
        pair("total_ns", &self.total.as_nanos().to_string())?;
        pair("trace_id", &text(&self.trace_id))?;
        pair("uri", &self.uri.to_string())?;
        pair("user_agent", &text(&self.user_agent))?;
        pair("version", &format!("{:?}", self.version))?;
        out.push('}');
        Ok(())
    }
}

const TRACE_IDS: [HeaderName; 3] = [
    HeaderName::from_static("x-b3-traceid"),
    HeaderName::from_static("x-request-id"),
    HeaderName::from_static("x-amzn-trace-id"),
];

fn trace_id(headers: &HeaderMap) -> Option<HeaderValue> {
    TRACE_IDS.iter().find_map(|name| headers.get(name)).cloned()
}

/// RFC 3339 in UTC with nanoseconds.
fn timestamp(time: SystemTime) -> String {
    let t = OffsetDateTime::from(time);
    format!(
        "{:04}-{:02}-{:02}T{:02}:{:02}:{:02}.{:09}Z",
        t.year(),
        u8::from(t.month()),
        t.day(),
        t.hour(),
        t.minute(),
        t.second(),
        t.nanosecond()
    )
}

impl AccessLog {
    /// No access log.
    pub fn off() -> Self {
        Self(None)
    }

    /// Writes to standard error from a thread of its own.
    ///
    /// # Errors
    /// When the thread can't be started.
    pub fn start(format: Format, dropped: Arc<Counter>) -> io::Result<Self> {
        Self::start_on(format, dropped, QUEUE, io::stderr())
    }

    fn start_on(
        format: Format,
        dropped: Arc<Counter>,
        capacity: usize,
        out: impl Write + Send + 'static,
    ) -> io::Result<Self> {
        let (queue, entries) = mpsc::sync_channel(capacity);
        thread::Builder::new().name("access-log".into()).spawn(move || write(format, &entries, out))?;
        Ok(Self(Some(Open { queue, dropped })))
    }

    /// Whether entries are worth making.
    pub fn is_on(&self) -> bool {
        self.0.is_some()
    }

    /// Hands an entry over, or drops it when too many wait. Never waits.
    pub fn record(&self, entry: Entry) {
        if let Some(open) = &self.0
            && open.queue.try_send(Message::Entry(Box::new(entry))).is_err()
        {
            open.dropped.inc();
        }
    }

    /// Waits until what was recorded is written, at most a second. For the process's end; blocks the thread.
    pub fn flush(&self) {
        if let Some(open) = &self.0 {
            let (done, written) = mpsc::sync_channel(1);
            if open.queue.try_send(Message::Flush(done)).is_ok() {
                let _ = written.recv_timeout(CLOSE);
            }
        }
    }
}

/// Runs until the last handle is gone. Nobody is left to tell of a standard error that can't be written to.
fn write(format: Format, entries: &mpsc::Receiver<Message>, mut out: impl Write) {
    let mut text = String::new();
    let mut oldest = None;
    loop {
        let message = match (entries.try_recv(), oldest) {
            (Ok(message), _) => message,
            (Err(mpsc::TryRecvError::Empty), None) => match entries.recv() {
                Ok(message) => message,
                Err(mpsc::RecvError) => return,
            },
            // Nothing waits: what is there goes out.
            (Err(_), _) => {
                flush(&mut text, &mut oldest, &mut out);
                continue;
            }
        };
        match message {
            Message::Entry(entry) => {
                entry.write(format, &mut text);
                let since = *oldest.get_or_insert_with(Instant::now);
                if text.len() >= BUFFER || since.elapsed() >= FLUSH {
                    flush(&mut text, &mut oldest, &mut out);
                }
            }
            Message::Flush(done) => {
                flush(&mut text, &mut oldest, &mut out);
                let _ = done.try_send(());
            }
        }
    }
}

fn flush(text: &mut String, oldest: &mut Option<Instant>, out: &mut impl Write) {
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
    text.clear();
    *oldest = None;
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Tells of each write, and waits to be allowed to return from it.
    struct Gated {
        wrote: mpsc::Sender<String>,
        gate: mpsc::Receiver<()>,
    }

    impl Write for Gated {
        fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
            self.wrote.send(String::from_utf8_lossy(buf).into_owned()).map_err(io::Error::other)?;
            self.gate.recv().map_err(io::Error::other)?;
            Ok(buf.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn entry(path: &str) -> Entry {
        let request = Request::builder()
            .uri(path)
            .header("host", "web")
            .header("user-agent", "curl \"7\"")
            .header("x-request-id", "r1")
            .body(())
            .unwrap();
        let mut entry = Entry::new(&request, "10.0.0.1:5".parse().unwrap(), Some("web.id".parse().unwrap()));
        entry.timestamp = SystemTime::UNIX_EPOCH + Duration::from_nanos(1_000_000_001);
        let response = Response::builder().status(201).header("content-length", "7").body(()).unwrap();
        entry.response(&response, Duration::from_nanos(5));
        entry.total = Duration::from_nanos(9);
        entry
    }

    #[track_caller]
    fn check(entry: &Entry, format: Format, expected: &str) {
        let mut out = String::new();
        entry.write(format, &mut out);
        assert_eq!(out, format!("{expected}\n"));
    }

    #[test]
    fn lines() {
        let mut e = entry("/a?b=c");
        check(&e, Format::Apache, r#"10.0.0.1:5 web.id - [1970-01-01T00:00:01.000000001Z] "GET /a?b=c HTTP/1.1" 201"#);
        check(
            &e,
            Format::Json,
            r#"{"client.addr":"10.0.0.1:5","client.id":"web.id","host":"web","method":"GET","processing_ns":"5","request_bytes":"","response_bytes":"7","status":201,"timestamp":"1970-01-01T00:00:01.000000001Z","total_ns":"9","trace_id":"r1","uri":"/a?b=c","user_agent":"curl \"7\"","version":"HTTP/1.1"}"#,
        );
        e.termination = Some(Code::ResponseCanceled);
        e.status = None;
        e.client_id = None;
        check(
            &e,
            Format::Apache,
            r#"10.0.0.1:5 - - [1970-01-01T00:00:01.000000001Z] "GET /a?b=c HTTP/1.1" - response-canceled"#,
        );
        let mut out = String::new();
        e.write(Format::Json, &mut out);
        assert!(serde_json::from_str::<serde_json::Value>(&out).is_ok(), "{out}");
    }

    #[test]
    fn formats_parse() {
        assert_eq!("Apache".parse(), Ok(Format::Apache));
        assert_eq!(" JSON ".parse(), Ok(Format::Json));
        assert!("nginx".parse::<Format>().is_err());
    }

    #[test]
    fn a_stuck_writer_costs_entries_and_no_time() {
        let (wrote, writes) = mpsc::channel();
        let (open, gate) = mpsc::channel();
        let dropped = Arc::new(Counter::default());
        let log = AccessLog::start_on(Format::Apache, dropped.clone(), 2, Gated { wrote, gate }).unwrap();
        log.record(entry("/0"));
        // The writer is inside its first write now; two more fit in the queue.
        assert!(writes.recv().unwrap().contains("/0"));
        for path in ["/1", "/2", "/3", "/4"] {
            log.record(entry(path));
        }
        assert_eq!(dropped.get(), 2);
        open.send(()).unwrap();
        open.send(()).unwrap();
        let rest = writes.recv().unwrap();
        let paths: Vec<_> = rest.lines().filter_map(|l| l.split(' ').nth(5)).collect();
        assert_eq!(paths, ["/1", "/2"]);
    }

    #[test]
    fn a_farewell_waits_for_what_was_recorded() {
        let (wrote, writes) = mpsc::channel();
        let (open, gate) = mpsc::channel();
        let log = AccessLog::start_on(Format::Apache, Arc::default(), 8, Gated { wrote, gate }).unwrap();
        open.send(()).unwrap();
        open.send(()).unwrap();
        log.record(entry("/last"));
        log.flush();
        assert!(writes.try_iter().any(|w| w.contains("/last")));
    }
}
