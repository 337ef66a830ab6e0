//! Connections to one replica: TCP, then mutual TLS if it is meshed, then the transport header if its proxy takes one
//! (behaviour.md A.5, D.8). Everything about them is decided when the connector is built.

use super::Runtime;
use crate::{
    error::{Cause, Error},
    policy::{
        authz::NoTls,
        endpoint::{Endpoint, ProtocolHint},
    },
    telemetry::{ConnLabels, ConnMetrics, Direction, Peer, TlsLabels, termination::Phase},
    transport::{self, Metered, TransportHeader, header::Session},
};
use bytes::Bytes;
use linkerd_stack::{BoxFuture, BoxedIo, http::Version};
use linkerd_tls::{Client, ClientTls, Id, web};
use parking_lot::Mutex;
use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Duration,
};
use tokio::{
    io::AsyncWriteExt,
    net::TcpStream,
    time::{Instant, timeout},
};

/// Opens connections to one replica. Clones are the same connector.
#[derive(Clone)]
pub(super) struct Connector(Arc<Inner>);

struct Inner {
    rt: Arc<Runtime>,
    /// Where TCP goes: the replica, or its proxy's inbound port.
    dial: SocketAddr,
    tls: Result<Client, NoTls>,
    /// TLS to a server outside the mesh, or why there can be none.
    web: Option<Result<web::Client, Arc<str>>>,
    /// Encoded once per session protocol: none, HTTP/1, HTTP/2. Present if one may be sent.
    header: Option<[Bytes; 3]>,
    metrics: Arc<ConnMetrics>,
    /// Of the last attempt, if it failed: what is told when nothing is ready.
    failure: Mutex<Option<Failing>>,
}

/// A replica that could not be connected to.
struct Failing {
    error: Error,
    /// The first failure since a success.
    since: Instant,
    /// The latest.
    last: Instant,
}

/// A connection to a replica.
pub(super) enum Upstream {
    /// Plaintext, not yet counted: whoever moves its bytes counts them.
    Plain(TcpStream, Arc<ConnMetrics>),
    /// Mutual TLS.
    Tls(Box<Metered<linkerd_tls::ClientIo<TcpStream>, ConnMetrics>>),
}

impl Connector {
    /// For a replica; `authority` labels its connections.
    pub(super) fn new(rt: &Arc<Runtime>, endpoint: &Endpoint, authority: Option<Arc<str>>) -> Self {
        let meta = &endpoint.meta;
        let named = meta.authority_override.as_deref().and_then(named_port);
        let tls = match (&meta.tls, &rt.identity) {
            _ if rt.is_local(endpoint.addr) => Err(NoTls::Loopback),
            (Some(tls), Some(identity)) => Ok(identity.client(ClientTls {
                server_id: tls.server_id.clone(),
                server_name: tls.server_name.clone(),
                transport_header: meta.opaque_transport_port.is_some() || meta.authority_override.is_some(),
            })),
            (None, _) | (_, None) => Err(NoTls::NotProvidedByServiceDiscovery),
        };
        let mut dial = endpoint.addr;
        let mut header = None;
        if let Ok(tls) = &tls {
            if let Some(port) = meta.opaque_transport_port {
                dial.set_port(port);
            }
            if tls.target().transport_header {
                let (name, port) = match named {
                    Some((name, port)) => (Some(name.to_string()), port),
                    None => (None, endpoint.addr.port()),
                };
                // An opaque port is opaque to the session protocol too.
                let session = |s| if meta.hint == ProtocolHint::Opaque { None } else { s };
                let encode = |s| TransportHeader { port, name: name.clone(), session: session(s) }.encode();
                header = Some([encode(None), encode(Some(Session::Http1)), encode(Some(Session::Http2))]);
            }
        }
        let metrics = rt.telemetry.conn(ConnLabels {
            direction: Direction::Outbound,
            peer: Peer::Dst,
            target: Some(endpoint.addr),
            tls: TlsLabels::Connected(tls.as_ref().map(|tls| tls.target().server_id.clone()).map_err(|why| *why)),
            srv: None,
            authority,
            dst: Some(meta.clone()),
        });
        let web = meta.origin_tls.as_deref().filter(|_| tls.is_err());
        let web = web.map(|target| web::Client::new(target).map_err(|error| error.to_string().into()));
        Self(Arc::new(Inner { rt: rt.clone(), dial, tls, web, header, metrics, failure: Mutex::new(None) }))
    }

    /// The identity demanded of the replica, or why none is.
    pub(super) fn server_id(&self) -> Result<&Id, NoTls> {
        self.0.tls.as_ref().map(|tls| &tls.target().server_id).map_err(|why| *why)
    }

    /// Opens a connection whose bytes will be framed by `session`. Dropping the future abandons it.
    ///
    /// # Errors
    /// [`Cause::Loop`] for addresses of this host, [`Cause::ConnectTimeout`] for TCP and TLS together, [`Cause::Io`].
    pub(super) async fn open(&self, session: Option<Version>) -> Result<Upstream, Error> {
        let Inner { rt, dial, .. } = &*self.0;
        if rt.refuses(*dial) {
            return Err(Cause::Loop(*dial).into());
        }
        let limit = rt.config.connect.timeout;
        let handshaking = AtomicBool::new(false);
        let result = match timeout(limit, self.establish(session, &handshaking)).await {
            Ok(result) => result,
            Err(_) => Err(Cause::ConnectTimeout(limit).into()),
        };
        let phase = if handshaking.load(Relaxed) { Phase::Tls } else { Phase::Connect };
        let result = result.map_err(|error| error.during(phase));
        let mut failure = self.0.failure.lock();
        *failure = result.as_ref().err().map(|error| {
            let last = Instant::now();
            Failing { error: error.clone(), since: failure.as_ref().map_or(last, |f| f.since), last }
        });
        drop(failure);
        result
    }

    /// Why the last attempt to connect failed, if it did.
    pub(super) fn failure(&self) -> Option<Error> {
        self.0.failure.lock().as_ref().map(|failing| failing.error.clone())
    }

    /// From the first to the last of the failed attempts, if there is one and none has succeeded since: time without
    /// attempts says nothing.
    pub(super) fn refused_for(&self) -> Option<Duration> {
        self.0.failure.lock().as_ref().map(|failing| failing.last - failing.since)
    }

    /// Sets `handshaking` while the TLS handshake is under way.
    async fn establish(&self, session: Option<Version>, handshaking: &AtomicBool) -> Result<Upstream, Error> {
        let Inner { rt, dial, tls, web, header, metrics, .. } = &*self.0;
        if let Some(Err(why)) = web {
            return Err(Cause::Tls(why.clone()).into());
        }
        let io = transport::connect(*dial, &rt.config.connect).await?;
        if let Some(Ok(web)) = web {
            let alpn = match session {
                None => web::Alpn::None,
                Some(Version::H1) => web::Alpn::Http1,
                Some(Version::H2) => web::Alpn::Http2,
            };
            handshaking.store(true, Relaxed);
            let io = web.connect(io, alpn).await.map_err(web_failure)?;
            handshaking.store(false, Relaxed);
            return Ok(Upstream::Tls(Box::new(Metered::new(io, metrics.clone()))));
        }
        let Ok(tls) = tls else {
            return Ok(Upstream::Plain(io, metrics.clone()));
        };
        handshaking.store(true, Relaxed);
        let shaken = match tls.connect(io).await {
            Err(linkerd_tls::Error::NotResumed) => {
                handshaking.store(false, Relaxed);
                let io = transport::connect(*dial, &rt.config.connect).await?;
                handshaking.store(true, Relaxed);
                tls.connect(io).await
            }
            shaken => shaken,
        };
        let (connected, mut io) = shaken
            .map_err(|error| Error::new(Cause::Io { errno: error.errno(), message: error.to_string().into() }))?;
        handshaking.store(false, Relaxed);
        if connected.transport_header
            && let Some([opaque, http1, http2]) = header
        {
            let header = match session {
                None => opaque,
                Some(Version::H1) => http1,
                Some(Version::H2) => http2,
            };
            io.write_all(header).await.map_err(|error| transport::io_failure(&error))?;
        }
        Ok(Upstream::Tls(Box::new(Metered::new(io, metrics.clone()))))
    }
}

/// What the server is refused for is told apart from connections that break.
fn web_failure(error: linkerd_tls::Error) -> Error {
    let message = error.to_string().into();
    match error {
        linkerd_tls::Error::Peer(_) | linkerd_tls::Error::Invalid(_) => Cause::Tls(message).into(),
        other => Cause::Io { errno: other.errno(), message }.into(),
    }
}

impl Upstream {
    /// The connection with its type forgotten.
    pub(super) fn boxed(self) -> BoxedIo {
        match self {
            Self::Plain(io, metrics) => Box::new(Metered::new(io, metrics)),
            Self::Tls(io) => io,
        }
    }
}

impl linkerd_stack::http::Connect for Connector {
    type Error = Error;

    fn connect(&self, session: Option<Version>) -> BoxFuture<Result<BoxedIo, Error>> {
        let this = self.clone();
        Box::pin(async move { this.open(session).await.map(Upstream::boxed) })
    }
}

/// `name:port` of an authority, if it has a port and is a DNS name.
fn named_port(authority: &str) -> Option<(&str, u16)> {
    let (name, port) = authority.rsplit_once(':')?;
    let port = port.parse().ok().filter(|p| *p != 0)?;
    name.parse::<linkerd_tls::ServerName>().ok()?;
    Some((name, port))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_with_ports_are_named_in_the_header() {
        for (authority, expected) in [
            ("web.ns.svc.east:8080", Some(("web.ns.svc.east", 8080))),
            ("web.ns.svc.east", None),
            ("10.0.0.1:80", None),
            ("[::1]:80", None),
            ("web:0", None),
        ] {
            assert_eq!(named_port(authority), expected, "{authority}");
        }
    }
}
