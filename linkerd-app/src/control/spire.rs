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
    /// A new identity; not verified yet.
    Svid(Certificate),
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
                    Ok(svid) => Event::Svid(svid),
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
    let mut waiting = false;
    loop {
        match agent.next().await {
            Event::Svid(certificate) => {
                waiting = false;
                if let Err(error) = installer.install(None, certificate, &observer) {
                    tracing::error!(id = %installer.id(), %error, "SVID is refused; the last one stays in force");
                }
            }
            Event::Failed { reason, delay: Some(delay) } => {
                // Loud once per outage, not per attempt: those are a second apart.
                if waiting {
                    tracing::debug!(reason, ?delay, "Still waiting for the SPIRE agent");
                } else {
                    tracing::warn!(reason, "Waiting for the SPIRE agent");
                    observer.refreshed(Err(()));
                }
                waiting = true;
            }
            Event::Failed { reason, delay: None } => {
                tracing::error!(reason, "SPIRE agent's answer can't be used");
                observer.refreshed(Err(()));
            }
            Event::Refused(reason) => {
                tracing::error!(reason, "SPIRE agent refuses; the process must be restarted once that is mended");
                observer.refreshed(Err(()));
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

/// The SVID of the identity.
///
/// Its bundle is not used: whom this proxy trusts is what the configuration says (contract.md 7.3), and the SVID must chain to
/// that.
fn pick(response: proto::X509SvidResponse, id: &Id) -> Result<Certificate, String> {
    let ids: Vec<_> = response.svids.iter().map(|svid| svid.spiffe_id.clone()).collect();
    let Some(svid) = response.svids.into_iter().find(|svid| svid.spiffe_id == id.as_str()) else {
        return Err(format!("SPIRE agent has no SVID for {id}, only for {ids:?}: check the registration entry"));
    };
    let chain = split_der(&svid.x509_svid).ok_or_else(|| format!("SVID of {id} is not a chain of certificates"))?;
    if chain.is_empty() || svid.x509_svid_key.is_empty() {
        return Err(format!("SVID of {id} lacks its certificate or its key"));
    }
    let key = Key::from_pkcs8(svid.x509_svid_key.into());
    Certificate::from_der(chain, key).map_err(|error| format!("SVID of {id}: {error}"))
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

    #[tokio::test]
    async fn a_missing_agent_is_waited_for() {
        let (mut agent, socket) = agent("late");
        for expected in [10, 20, 20] {
            let Event::Failed { delay: Some(delay), .. } = agent.next().await else { panic!() };
            assert_eq!(delay, Duration::from_millis(expected));
        }
        let listener = tokio::net::UnixListener::bind(&socket).unwrap();
        tokio::spawn(async move {
            let (io, _) = listener.accept().await.unwrap();
            let service = hyper::service::service_fn(|request: Request<hyper::body::Incoming>| async move {
                assert_eq!(request.uri().path(), "/SpiffeWorkloadAPI/FetchX509SVID");
                assert_eq!(request.headers()["workload.spiffe.io"], "true");
                let message = prost::Message::encode_to_vec(&response(ID));
                let mut frame = vec![0];
                frame.extend_from_slice(&u32::try_from(message.len()).unwrap().to_be_bytes());
                frame.extend_from_slice(&message);
                let response = Response::builder().header("content-type", "application/grpc");
                Ok::<_, std::convert::Infallible>(response.body(http_body_util::Full::new(Bytes::from(frame))).unwrap())
            });
            let server = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
            let _ = server.serve_connection(TokioIo::new(io), service).await;
        });
        let Event::Svid(certificate) = agent.next().await else { panic!() };
        assert_eq!(certificate.ids().unwrap(), [ID.parse().unwrap()]);
        // The agent ends the stream; it is asked again.
        assert!(matches!(agent.next().await, Event::Failed { delay: Some(_), .. }));
        std::fs::remove_file(socket).unwrap();
    }
}
