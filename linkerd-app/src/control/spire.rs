//! Identities from a SPIRE agent: the SPIFFE Workload API over a Unix socket (behaviour.md B.5, contract.md 7.3).
//!
//! The agent pushes the workload's SVIDs over one stream, anew before they expire. An agent that is missing, or
//! restarts, is waited for; the last identity stays in use meanwhile. The four messages are written out here.

use super::stream;
use crate::identity::{Installer, Observer};
use bytes::Bytes;
use futures_util::future::BoxFuture;
use http::{Request, Response, Uri};
use hyper_util::rt::{TokioExecutor, TokioIo};
use linkerd_stack::backoff::Backoff;
use linkerd_tls::{Certificate, Id, Key};
use std::{
    fmt,
    path::PathBuf,
    task::{Context, Poll},
    time::Duration,
};
use tokio::{
    net::UnixStream,
    time::{self, Instant},
};
use tonic::{Code, Status, metadata::MetadataValue};

/// How long connecting to the socket may take: the agent is on this host.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);
/// Certificates of one chain that are taken.
const MAX_CERTIFICATES: usize = 64;

/// What comes of following the agent.
#[derive(Debug)]
pub enum Event {
    /// A new identity, not verified yet, and the trust anchors of its trust domain, DER.
    Svid(Certificate, Vec<Vec<u8>>),
    /// The agent is away or said something useless; it is asked again after `delay`.
    Failed {
        /// In words.
        reason: String,
        /// Until the next attempt; none = the stream goes on.
        delay: Option<Duration>,
    },
    /// The agent refuses for good (gRPC InvalidArgument).
    Refused(String),
}

/// Follows the agent.
pub struct Agent {
    socket: PathBuf,
    id: Id,
    backoff: Backoff,
    attempt: u32,
    /// When the next attempt is due.
    due: Option<Instant>,
    messages: Option<tonic::Streaming<proto::X509SvidResponse>>,
}

impl Agent {
    /// An agent at a socket, asked for the SVID of `id`.
    pub fn new(socket: PathBuf, id: Id, backoff: crate::policy::client::Backoff) -> Self {
        let backoff = Backoff { min: backoff.min, max: backoff.max, jitter: backoff.jitter };
        Self { socket, id, backoff, attempt: 0, due: None, messages: None }
    }

    /// The next identity or failure. Must not be called again after [`Event::Refused`].
    pub async fn next(&mut self) -> Event {
        if let Some(due) = self.due {
            time::sleep_until(due).await;
            self.due = None;
        }
        if self.messages.is_none() {
            match fetch(self.socket.clone()).await {
                Ok(messages) => self.messages = Some(messages),
                Err(status) => return self.failed(&status),
            }
        }
        let result = match &mut self.messages {
            Some(messages) => messages.message().await,
            None => Ok(None),
        };
        match result {
            Ok(Some(response)) => {
                self.attempt = 0;
                match pick(response, &self.id) {
                    Ok((svid, bundle)) => Event::Svid(svid, bundle),
                    Err(reason) => Event::Failed { reason, delay: None },
                }
            }
            Ok(None) => self.failed(&Status::new(Code::Ok, "the agent ended the stream")),
            Err(status) => self.failed(&status),
        }
    }

    fn failed(&mut self, status: &Status) -> Event {
        self.messages = None;
        let reason = format!("SPIRE agent at {}: {}", self.socket.display(), stream::describe(status));
        if status.code() == Code::InvalidArgument {
            return Event::Refused(reason);
        }
        let delay = self.backoff.delay(self.attempt, stream::random());
        self.attempt = self.attempt.saturating_add(1);
        self.due = Some(Instant::now() + delay);
        Event::Failed { reason, delay: Some(delay) }
    }
}

/// Installs every identity that the agent has for us, for the life of the process. What is installed stays in force
/// through every failure. Ends only if the agent refuses for good.
pub async fn run(mut agent: Agent, mut installer: Installer, observer: impl Observer) {
    let configured = installer.trust_anchors();
    let mut waiting = false;
    loop {
        match agent.next().await {
            Event::Svid(certificate, bundle) => {
                waiting = false;
                // Roots that the agent no longer names are no longer trusted; the configured ones always are.
                let roots = configured.extended(&bundle);
                if let Err(error) = installer.install(Some(roots), certificate, &observer) {
                    tracing::error!(id = %installer.id(), %error, "SVID is refused; the last one stays in force");
                }
            }
            Event::Failed { reason, delay: Some(delay) } => {
                // Loud once per outage, not per attempt: those are a second apart.
                if waiting {
                    tracing::debug!(reason, ?delay, "Still waiting for the SPIRE agent");
                } else {
                    tracing::warn!(reason, "Waiting for the SPIRE agent");
                    observer.refreshed(Err(&reason));
                }
                waiting = true;
            }
            Event::Failed { reason, delay: None } => {
                tracing::error!(reason, "SPIRE agent's answer can't be used");
                observer.refreshed(Err(&reason));
            }
            Event::Refused(reason) => {
                tracing::error!(reason, "SPIRE agent refuses; the process must be restarted once that is mended");
                observer.refreshed(Err(&reason));
                return;
            }
        }
    }
}

/// Opens the stream of SVIDs.
async fn fetch(socket: PathBuf) -> Result<tonic::Streaming<proto::X509SvidResponse>, Status> {
    let unavailable = |error: &dyn fmt::Display| Status::unavailable(error.to_string());
    let io = match time::timeout(CONNECT_LIMIT, UnixStream::connect(&socket)).await {
        Ok(result) => result.map_err(|error| unavailable(&error))?,
        Err(_) => return Err(Status::unavailable(format!("no connection within {CONNECT_LIMIT:?}"))),
    };
    let (sender, connection) = hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(io))
        .await
        .map_err(|error| unavailable(&error))?;
    // Ends with its streams, once the sender is gone.
    tokio::spawn(connection);
    let mut grpc = tonic::client::Grpc::with_origin(Connection(sender), Uri::from_static("http://localhost"));
    grpc.ready().await.map_err(|error| unavailable(&error))?;
    let mut request = tonic::Request::new(proto::X509SvidRequest {});
    // Workload API specification, 4.2: without it the agent refuses.
    request.metadata_mut().insert("workload.spiffe.io", MetadataValue::from_static("true"));
    let path = http::uri::PathAndQuery::from_static("/SpiffeWorkloadAPI/FetchX509SVID");
    Ok(grpc.server_streaming(request, path, tonic_prost::ProstCodec::default()).await?.into_inner())
}

/// The SVID of the identity, with its bundle. The bundle is trusted beside what the configuration says (the original trusts
/// that alone, contract.md 7.3), so that the trust domain's root can be rotated by SPIRE without a restart. A bundle that
/// can't be read counts as empty: the configured anchors may do.
fn pick(response: proto::X509SvidResponse, id: &Id) -> Result<(Certificate, Vec<Vec<u8>>), String> {
    let ids: Vec<_> = response.svids.iter().map(|svid| svid.spiffe_id.clone()).collect();
    let Some(svid) = response.svids.into_iter().find(|svid| svid.spiffe_id == id.as_str()) else {
        return Err(format!("SPIRE agent has no SVID for {id}, only for {ids:?}: check the registration entry"));
    };
    let chain = split_der(&svid.x509_svid).ok_or_else(|| format!("SVID of {id} is not a chain of certificates"))?;
    if chain.is_empty() || svid.x509_svid_key.is_empty() {
        return Err(format!("SVID of {id} lacks its certificate or its key"));
    }
    let key = Key::from_pkcs8(svid.x509_svid_key.into());
    let bundle = split_der(&svid.bundle).unwrap_or_else(|| {
        tracing::warn!(%id, "SPIRE agent's bundle is not a sequence of certificates; it is ignored");
        Vec::new()
    });
    let svid = Certificate::from_der(chain, key).map_err(|error| format!("SVID of {id}: {error}"))?;
    Ok((svid, bundle))
}

/// Splits concatenated DER sequences (X.690, 8.1.3); none if they are anything else.
fn split_der(mut bytes: &[u8]) -> Option<Vec<Vec<u8>>> {
    let mut parts = Vec::new();
    while !bytes.is_empty() {
        if parts.len() == MAX_CERTIFICATES || *bytes.first()? != 0x30 {
            return None;
        }
        let first = usize::from(*bytes.get(1)?);
        let (head, length) = if first < 0x80 {
            (2, first)
        } else {
            let n = first & 0x7f;
            // Four octets of length are 4 GiB.
            if n == 0 || n > 4 {
                return None;
            }
            let octets = bytes.get(2..2 + n)?;
            (2 + n, octets.iter().fold(0usize, |length, octet| length << 8 | usize::from(*octet)))
        };
        let end = head.checked_add(length)?;
        parts.push(bytes.get(..end)?.to_vec());
        bytes = &bytes[end..];
    }
    Some(parts)
}

/// One HTTP/2 connection as a service.
struct Connection(hyper::client::conn::http2::SendRequest<tonic::body::Body>);

impl tower::Service<Request<tonic::body::Body>> for Connection {
    type Response = Response<hyper::body::Incoming>;
    type Error = hyper::Error;
    type Future = BoxFuture<'static, hyper::Result<Self::Response>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<hyper::Result<()>> {
        self.0.poll_ready(cx)
    }

    fn call(&mut self, request: Request<tonic::body::Body>) -> Self::Future {
        Box::pin(self.0.send_request(request))
    }
}

/// Messages of the Workload API (SPIFFE `workload.proto`), as far as they are used.
mod proto {
    use super::Bytes;
    use std::fmt;

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct X509SvidRequest {}

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct X509SvidResponse {
        #[prost(message, repeated, tag = "1")]
        pub(super) svids: Vec<X509Svid>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    #[prost(skip_debug)]
    pub(super) struct X509Svid {
        #[prost(string, tag = "1")]
        pub(super) spiffe_id: String,
        #[prost(bytes = "bytes", tag = "2")]
        pub(super) x509_svid: Bytes,
        #[prost(bytes = "bytes", tag = "3")]
        pub(super) x509_svid_key: Bytes,
        #[prost(bytes = "bytes", tag = "4")]
        pub(super) bundle: Bytes,
    }

    /// Without the key.
    impl fmt::Debug for X509Svid {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.debug_struct("X509Svid").field("spiffe_id", &self.spiffe_id).finish_non_exhaustive()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::client;
    use linkerd_tls::ca;
    use std::sync::atomic::{AtomicUsize, Ordering};

    const ID: &str = "spiffe://root/web";

    /// What an agent says of a workload.
    fn response(id: &str) -> proto::X509SvidResponse {
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        let dir = std::env::temp_dir().join(format!("spire-ca-{}-{n}", std::process::id()));
        ca::init(&dir, &ca::Init::default()).unwrap();
        let issued = ca::Issuer::load(&dir).unwrap().issue(&ID.parse().unwrap()).unwrap();
        std::fs::remove_dir_all(dir).unwrap();
        let svid = proto::X509Svid {
            spiffe_id: id.into(),
            x509_svid: [issued.leaf, issued.intermediates.concat()].concat().into(),
            x509_svid_key: issued.key_pkcs8.secret_der().to_vec().into(),
            bundle: Bytes::new(),
        };
        proto::X509SvidResponse { svids: vec![svid] }
    }

    #[test]
    fn chains_are_split() {
        let chain = [0x30, 1, 7, 0x30, 0x81, 1, 8];
        assert_eq!(split_der(&chain).unwrap(), [vec![0x30, 1, 7], vec![0x30, 0x81, 1, 8]]);
        for bad in [
            &[0x31, 0][..],
            &[0x30],
            &[0x30, 2, 0],
            &[0x30, 0x80],
            &[0x30, 0x85, 1, 1, 1, 1, 1],
            &[0x30, 0x84, 0xff, 0xff, 0xff, 0xff],
        ] {
            assert_eq!(split_der(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn another_identity_is_refused_in_words() {
        let error = pick(response("spiffe://root/db"), &ID.parse().unwrap()).unwrap_err();
        assert!(error.contains(ID) && error.contains("spiffe://root/db"), "{error}");
    }

    #[test]
    fn keys_are_not_printed() {
        let text = format!("{:?}", response(ID));
        assert!(text.contains(ID) && !text.contains("key"), "{text}");
    }

    fn agent(name: &str) -> (Agent, PathBuf) {
        let socket = std::env::temp_dir().join(format!("spire-{}-{name}.sock", std::process::id()));
        let _ = std::fs::remove_file(&socket);
        let backoff = client::Backoff { min: Duration::from_millis(10), max: Duration::from_millis(20), jitter: 0.0 };
        (Agent::new(socket.clone(), ID.parse().unwrap(), backoff), socket)
    }

    /// An agent that gives each request the next answer, and ends the stream; the last answer is repeated.
    fn serve(socket: &PathBuf, answers: Vec<proto::X509SvidResponse>) {
        let listener = tokio::net::UnixListener::bind(socket).unwrap();
        tokio::spawn(async move {
            let mut answers = answers.into_iter().peekable();
            loop {
                let (io, _) = listener.accept().await.unwrap();
                let answer = answers.next().unwrap();
                if answers.peek().is_none() {
                    answers = vec![answer.clone()].into_iter().peekable();
                }
                let service = hyper::service::service_fn(move |request: Request<hyper::body::Incoming>| {
                    assert_eq!(request.uri().path(), "/SpiffeWorkloadAPI/FetchX509SVID");
                    assert_eq!(request.headers()["workload.spiffe.io"], "true");
                    let message = prost::Message::encode_to_vec(&answer);
                    let mut frame = vec![0];
                    frame.extend_from_slice(&u32::try_from(message.len()).unwrap().to_be_bytes());
                    frame.extend_from_slice(&message);
                    let response = Response::builder().header("content-type", "application/grpc");
                    let response = response.body(http_body_util::Full::new(Bytes::from(frame))).unwrap();
                    std::future::ready(Ok::<_, std::convert::Infallible>(response))
                });
                let server = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
                tokio::spawn(server.serve_connection(TokioIo::new(io), service));
            }
        });
    }

    #[derive(Clone, Default)]
    struct Seen(std::sync::Arc<parking_lot::Mutex<Vec<Result<(), String>>>>);

    impl Observer for Seen {
        fn refreshed(&self, result: Result<std::time::SystemTime, &str>) {
            self.0.lock().push(result.map(drop).map_err(Into::into));
        }
    }

    #[tokio::test]
    async fn the_bundle_is_trusted_beside_the_configured_anchors_and_only_as_long_as_it_is_told() {
        let dir = std::env::temp_dir().join(format!("spire-configured-{}", std::process::id()));
        ca::init(&dir, &ca::Init::default()).unwrap();
        let trust_anchors = std::fs::read_to_string(dir.join("ca.crt")).unwrap();
        std::fs::remove_dir_all(dir).unwrap();
        let (agent, socket) = agent("bundle");
        let backoff = client::Backoff { min: Duration::from_millis(10), max: Duration::from_millis(20), jitter: 0.0 };
        let (reader, task) = crate::identity::prepare(&crate::config::Identity {
            id: ID.parse().unwrap(),
            server_name: "web".parse().unwrap(),
            issuer: crate::config::Issuer::Spire { trust_anchors, socket: socket.clone(), backoff },
            min_refresh: Duration::from_secs(10),
            max_refresh: Duration::from_secs(60),
        })
        .unwrap();
        let crate::identity::Task::Pushed(installer) = task else { panic!() };
        // Of an authority that is not configured: refused, and accepted once the agent vouches for it.
        let foreign = response(ID);
        let mut vouched = response(ID);
        let chain = split_der(&vouched.svids[0].x509_svid).unwrap();
        vouched.svids[0].bundle = chain[1..].concat().into();
        let junk = |mut response: proto::X509SvidResponse| {
            response.svids[0].bundle = Bytes::from_static(b"junk");
            response
        };
        serve(&socket, vec![foreign, vouched.clone(), junk(vouched)]);
        let seen = Seen::default();
        let task = tokio::spawn(run(agent, installer, seen.clone()));
        reader.ready().await;
        assert_eq!(reader.trust_anchor_count(), 2);
        let refusals =
            || seen.0.lock().iter().filter(|r| matches!(r, Err(why) if why.contains("trust anchor"))).count();
        while refusals() < 2 {
            time::sleep(Duration::from_millis(5)).await;
        }
        assert!(reader.is_ready(), "the last one stays in force");
        task.abort();
        std::fs::remove_file(socket).unwrap();
    }

    #[tokio::test]
    async fn a_missing_agent_is_waited_for() {
        let (mut agent, socket) = agent("late");
        for expected in [10, 20, 20] {
            let Event::Failed { delay: Some(delay), .. } = agent.next().await else { panic!() };
            assert_eq!(delay, Duration::from_millis(expected));
        }
        serve(&socket, vec![response(ID)]);
        let Event::Svid(certificate, _) = agent.next().await else { panic!() };
        assert_eq!(certificate.ids().unwrap(), [ID.parse().unwrap()]);
        // The agent ends the stream; it is asked again.
        assert!(matches!(agent.next().await, Event::Failed { delay: Some(_), .. }));
        std::fs::remove_file(socket).unwrap();
    }
}
