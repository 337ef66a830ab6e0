//! Gateway mode: connections from meshed peers of other clusters or networks that name their target, passed on to
//! wherever that is (behaviour.md A.6). Inbound authenticates and authorizes them; outbound finds the target and speaks to
//! it. Neither knows the other: this stands between.

use crate::{
    config,
    error::{Cause, Error},
    policy::Target,
};
use ::http::{
    HeaderMap, HeaderName, HeaderValue, Request, Response, Version,
    header::{FORWARDED, HOST},
};
use futures_util::future::BoxFuture;
use linkerd_stack::{BoxService, BoxedIo, http::Body};
use linkerd_tls::Id;
use std::sync::Arc;

/// Consumed by outbound proxies; a peer must not steer this one with it.
const L5D_REQUIRE_ID: HeaderName = HeaderName::from_static("l5d-require-id");

/// What the gateway needs of the outbound half.
pub trait Outbound: Send + Sync + 'static {
    /// A service for the requests to a target; looking it up is part of the first call.
    fn http(&self, target: Target) -> BoxService<Request<Body>, Response<Body>, Error>;

    /// Forwards a connection to a target until both ends are done.
    fn opaque(&self, target: Target, io: BoxedIo) -> BoxFuture<'static, Result<(), Error>>;
}

/// The gateway.
#[derive(Clone)]
pub struct Gateway(Arc<Inner>);

struct Inner {
    cfg: config::Gateway,
    id: Id,
    outbound: Arc<dyn Outbound>,
}

impl Gateway {
    /// A gateway for the configured names; without any, it refuses all. `id` is the own identity.
    pub fn new(cfg: &config::Gateway, id: Id, outbound: Arc<dyn Outbound>) -> Self {
        Self(Arc::new(Inner { cfg: cfg.clone(), id, outbound }))
    }

    /// Whether there are names that it serves.
    pub fn is_on(&self) -> bool {
        !self.0.cfg.suffixes.0.is_empty()
    }

    /// Whether a target is served at all.
    ///
    /// # Errors
    /// [`Cause::GatewayDomain`] for names outside the configured suffixes.
    pub fn check(&self, target: &Target) -> Result<(), Error> {
        match target {
            Target::Name(name, _) if self.0.cfg.suffixes.matches(name) => Ok(()),
            Target::Name(..) | Target::Addr(_) if !self.is_on() => Err(Error::new(Cause::GatewayDomain)
                .context(format!("{target}: gateway mode is off (LINKERD2_PROXY_INBOUND_GATEWAY_SUFFIXES)"))),
            Target::Name(..) | Target::Addr(_) => Err(Error::new(Cause::GatewayDomain).context(target.to_string())),
        }
    }

    /// The service of a connection's requests. `client` is the verified identity of the peer.
    pub fn http(&self, target: Target, client: Option<Id>) -> BoxService<Request<Body>, Response<Body>, Error> {
        if let Err(error) = self.check(&target) {
            return BoxService::from_fn(move |_| std::future::ready(Err(error.clone())));
        }
        let authority = target.to_string();
        let conn = Arc::new(Conn {
            looped: client.as_ref() == Some(&self.0.id),
            forwarded: forwarded(&self.0.id, client.as_ref(), &authority),
            own: format!("by={}", self.0.id),
            host: HeaderValue::from_str(&authority).ok(),
            out: self.0.outbound.http(target),
        });
        BoxService::from_fn(move |req| {
            let conn = conn.clone();
            async move { conn.send(req).await }
        })
    }

    /// Passes a connection on unread.
    ///
    /// # Errors
    /// For names outside the configured suffixes, for connections of this proxy itself, and as outbound fails.
    pub async fn opaque(&self, target: Target, client: Option<&Id>, io: BoxedIo) -> Result<(), Error> {
        self.check(&target)?;
        if client == Some(&self.0.id) {
            return Err(Error::new(Cause::GatewayLoop).context(target.to_string()));
        }
        self.0.outbound.opaque(target, io).await
    }
}

/// A connection of a peer to one target.
struct Conn {
    /// The peer is this proxy.
    looped: bool,
    /// What is appended to each request; none if it would be no header value.
    forwarded: Option<HeaderValue>,
    /// How this proxy appears in `forwarded`.
    own: String,
    host: Option<HeaderValue>,
    out: BoxService<Request<Body>, Response<Body>, Error>,
}

impl Conn {
    async fn send(&self, mut req: Request<Body>) -> Result<Response<Body>, Error> {
        if self.looped || passed(&self.own, req.headers()) {
            return Err(Cause::GatewayLoop.into());
        }
        req.headers_mut().remove(L5D_REQUIRE_ID);
        if let Some(forwarded) = &self.forwarded {
            req.headers_mut().append(FORWARDED, forwarded.clone());
        }
        if let (Some(host), Version::HTTP_10 | Version::HTTP_11) = (&self.host, req.version()) {
            req.headers_mut().insert(HOST, host.clone());
        }
        self.out.send(req).await
    }
}

/// `by`, `for`, `host` and `proto` of RFC 7239. Identities and names are free of quotes and blanks; those with colons are
/// sent bare too, as peers expect them (behaviour.md A.6).
fn forwarded(own: &Id, client: Option<&Id>, authority: &str) -> Option<HeaderValue> {
    let client = client.map_or("unknown", Id::as_str);
    HeaderValue::from_str(&format!("by={own};for={client};host={authority};proto=https")).ok()
}

/// Whether a request has been here: some `forwarded` element names this proxy, quoted or not.
fn passed(own: &str, headers: &HeaderMap) -> bool {
    let elements = headers.get_all(FORWARDED).iter().filter_map(|value| value.to_str().ok()).flat_map(|v| v.split(','));
    elements.flat_map(|element| element.split(';')).any(|pair| {
        let Some((name, value)) = pair.trim().split_once('=') else { return false };
        name.eq_ignore_ascii_case("by") && own.strip_prefix("by=") == Some(value.trim().trim_matches('"'))
    })
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use parking_lot::Mutex;

    #[derive(Default)]
    struct Sink(Arc<Mutex<Vec<Request<Body>>>>);

    impl Outbound for Sink {
        fn http(&self, _: Target) -> BoxService<Request<Body>, Response<Body>, Error> {
            let seen = self.0.clone();
            BoxService::from_fn(move |req| {
                seen.lock().push(req);
                std::future::ready(Ok(Response::new(Body::empty())))
            })
        }

        fn opaque(&self, target: Target, _: BoxedIo) -> BoxFuture<'static, Result<(), Error>> {
            panic!("connected to {target}")
        }
    }

    fn id(name: &str) -> Id {
        name.parse().unwrap()
    }

    fn gateway(seen: &Arc<Mutex<Vec<Request<Body>>>>) -> Gateway {
        let cfg = config::Gateway { suffixes: config::Suffixes(vec!["svc.cluster.local.".into()]) };
        Gateway::new(&cfg, id("gw.ns"), Arc::new(Sink(seen.clone())))
    }

    async fn send(name: &str, client: &str, forwarded: &[&str]) -> (Result<(), Cause>, Vec<Request<Body>>) {
        let seen = Arc::default();
        let svc = gateway(&seen).http(Target::Name(name.into(), 80), Some(id(client)));
        let mut req = Request::new(Body::empty());
        for value in forwarded {
            req.headers_mut().append(FORWARDED, value.parse().unwrap());
        }
        let result = svc.send(req).await.map(|_| ()).map_err(|error| error.cause().clone());
        let seen = std::mem::take(&mut *seen.lock());
        (result, seen)
    }

    /// A gateway for no names.
    pub(crate) fn off() -> Gateway {
        Gateway::new(&config::Gateway::default(), id("gw.ns"), Arc::new(Sink::default()))
    }

    #[test]
    fn without_names_all_are_refused() {
        let error = off().check(&Target::Name("web.ns.svc.cluster.local".into(), 80)).unwrap_err();
        assert_eq!(*error.cause(), Cause::GatewayDomain);
        assert!(error.to_string().contains("LINKERD2_PROXY_INBOUND_GATEWAY_SUFFIXES"), "{error}");
    }

    #[tokio::test]
    async fn requests_go_on_with_their_way_written_down() {
        let (result, seen) = send("web.ns.svc.cluster.local", "peer.ns", &["by=other.ns;for=x"]).await;
        assert_eq!(result, Ok(()));
        let headers = seen[0].headers();
        let forwarded: Vec<_> = headers.get_all(FORWARDED).iter().map(|v| v.to_str().unwrap()).collect();
        let own = "by=gw.ns;for=peer.ns;host=web.ns.svc.cluster.local:80;proto=https";
        assert_eq!(forwarded, ["by=other.ns;for=x", own]);
        assert_eq!(headers[HOST], "web.ns.svc.cluster.local:80");
    }

    #[tokio::test]
    async fn loops_and_foreign_names_end_here() {
        let check = |name: &'static str, client: &'static str, forwarded: &'static [&'static str], cause: Cause| async move {
            let (result, seen) = send(name, client, forwarded).await;
            assert_eq!((result, seen.len()), (Err(cause), 0));
        };
        check("web.ns.svc.cluster.local", "gw.ns", &[], Cause::GatewayLoop).await;
        check("web.ns.svc.cluster.local", "peer.ns", &["for=a", "by=b;for=c, for=x;By=\"gw.ns\""], Cause::GatewayLoop)
            .await;
        check("web.example.com", "peer.ns", &[], Cause::GatewayDomain).await;
        check("evilsvc.cluster.local", "peer.ns", &[], Cause::GatewayDomain).await;
    }

    #[tokio::test]
    async fn opaque_connections_are_checked_alike() {
        let seen = Arc::default();
        let gateway = gateway(&seen);
        let (_, io) = tokio::io::duplex(1);
        let target = |name: &str| Target::Name(name.into(), 80);
        let error = gateway.opaque(target("a.com"), Some(&id("x")), Box::new(io)).await.unwrap_err();
        assert_eq!(*error.cause(), Cause::GatewayDomain);
        let (_, io) = tokio::io::duplex(1);
        let error = gateway.opaque(target("a.svc.cluster.local"), Some(&id("gw.ns")), Box::new(io)).await.unwrap_err();
        assert_eq!(*error.cause(), Cause::GatewayLoop);
    }
}
