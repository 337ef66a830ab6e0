//! The identity of this process: one writer that installs what issuers hand over, many readers that shake hands with it.
//!
//! Readers see a change at their next handshake; connections that exist keep what they were made with. TLS 1.3 alone, no
//! 0-RTT.
//!
//! Sessions are resumed, which spares both ends the certificates' signatures. A ticket stands for what the full handshake
//! proved, and for no longer than that holds: the server's keys for tickets and the client's store of them are parts of
//! what is built anew when certificate or anchors change, and the time of the peer's certificates is looked at again each
//! time. A fresh key exchange is part of every resumption. Tickets are made only for clients that ask for them (RFC
//! 9149), so peers without resumption pay nothing for it.

use crate::{
    Certificate, ClientIo, Id, ServerIo, ServerName, TrustAnchors,
    error::{Error, Invalid},
    tickets::Tickets,
    verify::{self, ClientVerifier, ServerVerifier},
};
use arc_swap::{ArcSwap, ArcSwapOption};
use rustls::{
    ClientConfig, CommonState, HandshakeKind, ServerConfig, SignatureAlgorithm,
    client::{Resumption, TicketRequest},
    crypto::{CryptoProvider, aws_lc_rs},
    pki_types::{self, CertificateDer},
    sign::{CertifiedKey, SingleCertAndKey},
    time_provider::{DefaultTimeProvider, TimeProvider},
};
use std::{
    fmt,
    sync::{Arc, LazyLock, Weak},
    time::{Duration, SystemTime},
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::watch,
    time::timeout,
};

/// The one ALPN value of the mesh: a transport header may follow the handshake (behaviour.md A.5).
pub const TRANSPORT_HEADER_ALPN: &[u8] = b"transport.l5d.io/v1";

/// Longest time that a client may take over its side of a handshake. The same bound as for detection: a client that is
/// this slow holds a socket and buffers for nothing.
pub const ACCEPT_TIMEOUT: Duration = Duration::from_secs(10);

/// Tickets that a client asks for: two after a full handshake, so that a second connection at the same time finds one, and
/// one in place of each that it used.
const TICKETS: TicketRequest = TicketRequest { new_session_count: 2, resumption_count: 1 };

/// Most tickets for one handshake, whatever a client asks for: each costs up to 2 KiB on the wire.
const MAX_TICKETS: usize = 2;

/// Algorithms of behaviour.md B.1, in order of preference.
static PROVIDER: LazyLock<Arc<CryptoProvider>> = LazyLock::new(|| {
    use aws_lc_rs::{cipher_suite as suite, kx_group as group};
    Arc::new(CryptoProvider {
        cipher_suites: vec![
            suite::TLS13_AES_128_GCM_SHA256,
            suite::TLS13_AES_256_GCM_SHA384,
            suite::TLS13_CHACHA20_POLY1305_SHA256,
        ],
        kx_groups: vec![group::X25519MLKEM768, group::X25519, group::SECP256R1, group::SECP384R1],
        signature_verification_algorithms: verify::ALGORITHMS,
        ..aws_lc_rs::default_provider()
    })
});

/// What TLS is made of here, by the library's names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Info {
    /// Cipher suites, in order of preference.
    pub suites: Vec<String>,
    /// Key exchange groups, in order of preference.
    pub kx_groups: Vec<String>,
    /// Source of randomness.
    pub rand: String,
    /// Loader of private keys.
    pub key_provider: String,
    /// Whether all of it is FIPS-approved.
    pub fips: bool,
}

/// What TLS is made of here.
pub fn info() -> Info {
    let CryptoProvider { cipher_suites, kx_groups, secure_random, key_provider, .. } = &**PROVIDER;
    Info {
        suites: cipher_suites.iter().map(|suite| format!("{:?}", suite.suite())).collect(),
        kx_groups: kx_groups.iter().map(|group| format!("{:?}", group.name())).collect(),
        rand: format!("{secure_random:?}"),
        key_provider: format!("{key_provider:?}"),
        fips: PROVIDER.fips(),
    }
}

/// What a listener offers.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Alpn {
    /// Nothing: ordinary connections.
    None,
    /// Exactly `transport.l5d.io/v1`: connections to the proxy's own port.
    TransportHeader,
}

/// What the handshake told about a client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Accepted {
    /// The first DNS or URI name of its certificate that is an identity; none if it showed no certificate.
    pub client_id: Option<Id>,
    /// Whether a transport header follows.
    pub transport_header: bool,
    /// Whether the identity was proved by an earlier handshake, whose session goes on.
    pub resumed: bool,
}

/// Whom to connect to.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ClientTls {
    /// Must be among the names of the server's certificate.
    pub server_id: Id,
    /// SNI.
    pub server_name: ServerName,
    /// Whether to offer to send a transport header.
    pub transport_header: bool,
}

/// What the handshake told about a server.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Connected {
    /// Whether the server takes a transport header; it was offered and chosen.
    pub transport_header: bool,
    /// Whether the identity was proved by an earlier handshake, whose session goes on.
    pub resumed: bool,
}

/// Installs certificates and trust anchors.
#[derive(Debug)]
pub struct Writer {
    shared: Arc<Shared>,
    expiry: watch::Sender<Option<SystemTime>>,
}

/// Shakes hands with what is installed. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Reader {
    shared: Arc<Shared>,
    expiry: watch::Receiver<Option<SystemTime>>,
}

/// Shakes hands with one target, and keeps the tickets that were issued for it.
#[derive(Debug)]
pub struct Client {
    shared: Arc<Shared>,
    target: ClientTls,
    made: ArcSwapOption<Made>,
}

struct Shared {
    id: Id,
    server_name: ServerName,
    state: ArcSwap<State>,
    time: Arc<dyn TimeProvider>,
}

/// What a client uses as long as a state is in force.
struct Made {
    of: Weak<State>,
    config: Arc<ClientConfig>,
}

/// Everything that depends on certificate and anchors; built anew when either changes.
struct State {
    roots: TrustAnchors,
    certificate: Option<Installed>,
    /// Present with a certificate.
    server: Option<Server>,
}

#[derive(Clone)]
struct Installed {
    key: Arc<CertifiedKey>,
    expiry: SystemTime,
}

struct Server {
    plain: Arc<ServerConfig>,
    transport_header: Arc<ServerConfig>,
}

/// The identity of a process that has no certificate yet.
pub fn channel(id: Id, server_name: ServerName, roots: TrustAnchors) -> (Writer, Reader) {
    channel_by(Arc::new(DefaultTimeProvider), id, server_name, roots)
}

/// By a given clock.
fn channel_by(time: Arc<dyn TimeProvider>, id: Id, server_name: ServerName, roots: TrustAnchors) -> (Writer, Reader) {
    let state = ArcSwap::from_pointee(State::new(&time, roots, None));
    let shared = Arc::new(Shared { id, server_name, state, time });
    let (tx, rx) = watch::channel(None);
    (Writer { shared: shared.clone(), expiry: tx }, Reader { shared, expiry: rx })
}

impl Writer {
    /// Own identity.
    pub fn id(&self) -> &Id {
        &self.shared.id
    }

    /// The anchors in force.
    pub fn trust_anchors(&self) -> TrustAnchors {
        self.shared.state.load().roots.clone()
    }

    /// Installs a certificate.
    ///
    /// # Errors
    /// When it does not chain to the trust anchors in force, is not valid now, does not hold the own identity, or its
    /// key does not fit or can't be used. The certificate before stays in force.
    pub fn set_certificate(&mut self, certificate: Certificate) -> Result<(), Error> {
        self.set(self.trust_anchors(), certificate)
    }

    /// Replaces the trust anchors. The certificate stays as it is, even if peers with the new anchors alone would refuse
    /// it: those with the old ones still take it.
    pub fn set_trust_anchors(&mut self, roots: TrustAnchors) {
        let certificate = self.shared.state.load().certificate.clone();
        self.shared.state.store(Arc::new(State::new(&self.shared.time, roots, certificate)));
    }

    /// Replaces anchors and certificate in one step, so that no handshake sees the one without the other.
    ///
    /// # Errors
    /// As [`Writer::set_certificate`], against the new anchors. Nothing changes then.
    pub fn set(&mut self, roots: TrustAnchors, certificate: Certificate) -> Result<(), Error> {
        let installed = Installed::new(&roots, certificate, &self.shared.id)?;
        let expiry = installed.expiry;
        self.shared.state.store(Arc::new(State::new(&self.shared.time, roots, Some(installed))));
        self.expiry.send_replace(Some(expiry));
        Ok(())
    }

    /// Another reading end.
    pub fn reader(&self) -> Reader {
        Reader { shared: self.shared.clone(), expiry: self.expiry.subscribe() }
    }
}

impl Reader {
    /// Own identity.
    pub fn id(&self) -> &Id {
        &self.shared.id
    }

    /// The SNI that is terminated here.
    pub fn server_name(&self) -> &ServerName {
        &self.shared.server_name
    }

    /// Ends with the first certificate. When the writer goes away before that it never ends.
    pub async fn ready(&self) {
        let mut expiry = self.expiry.clone();
        if expiry.wait_for(Option::is_some).await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    /// Whether there is a certificate.
    pub fn is_ready(&self) -> bool {
        self.expiry.borrow().is_some()
    }

    /// When the certificate in force ceases to be valid.
    pub fn expiry(&self) -> Option<SystemTime> {
        *self.expiry.borrow()
    }

    /// Follows the expiry, which changes with each new certificate.
    pub fn watch_expiry(&self) -> watch::Receiver<Option<SystemTime>> {
        self.expiry.clone()
    }

    /// How many trust anchors are in force.
    pub fn trust_anchor_count(&self) -> usize {
        self.shared.state.load().roots.count()
    }

    /// Terminates TLS. Dropping the future drops the connection.
    ///
    /// # Errors
    /// Without a certificate, when the client's certificate is refused, when the handshake fails otherwise, and when it
    /// takes longer than [`ACCEPT_TIMEOUT`].
    pub async fn accept<I>(&self, io: I, alpn: Alpn) -> Result<(Accepted, ServerIo<I>), Error>
    where
        I: AsyncRead + AsyncWrite + Unpin,
    {
        let state = self.shared.state.load_full();
        let config = match (&state.server, alpn) {
            (None, _) => return Err(Error::NoCertificate),
            (Some(server), Alpn::None) => server.plain.clone(),
            (Some(server), Alpn::TransportHeader) => server.transport_header.clone(),
        };
        let io = timeout(ACCEPT_TIMEOUT, tokio_rustls::TlsAcceptor::from(config).accept(io))
            .await
            .map_err(|_| Error::HandshakeTimeout(ACCEPT_TIMEOUT))?
            .map_err(Error::handshake)?;
        let session = io.get_ref().1;
        let resumed = self.shared.resumed(session, &state.roots, verify::Role::Client)?;
        let client_id = match session.peer_certificates().and_then(|chain| chain.first()) {
            Some(leaf) => verify::ids(leaf).map_err(Error::Peer)?.into_iter().next(),
            None => None,
        };
        let transport_header = session.alpn_protocol() == Some(TRANSPORT_HEADER_ALPN);
        Ok((Accepted { client_id, transport_header, resumed }, ServerIo::new(io)))
    }

    /// A client for one target, to be kept as long as connections to it may be made.
    pub fn client(&self, target: ClientTls) -> Client {
        Client { shared: self.shared.clone(), target, made: ArcSwapOption::empty() }
    }
}

impl Client {
    /// Whom it connects to.
    pub fn target(&self) -> &ClientTls {
        &self.target
    }

    /// Originates TLS; shows the own certificate once there is one. The caller bounds the time. Dropping the future drops
    /// the connection.
    ///
    /// # Errors
    /// When the server's certificate is refused (another identity among others), or the handshake fails otherwise.
    pub async fn connect<I>(&self, io: I) -> Result<(Connected, ClientIo<I>), Error>
    where
        I: AsyncRead + AsyncWrite + Unpin,
    {
        let name = pki_types::ServerName::try_from(self.target.server_name.as_str().to_owned())
            .map_err(|e| Error::Handshake(std::io::Error::new(std::io::ErrorKind::InvalidInput, e)))?;
        let state = self.shared.state.load_full();
        let connector = tokio_rustls::TlsConnector::from(self.config(&state));
        let io = connector.connect(name, io).await.map_err(Error::handshake)?;
        let session = io.get_ref().1;
        let resumed = self.shared.resumed(session, &state.roots, verify::Role::Server)?;
        let transport_header = session.alpn_protocol() == Some(TRANSPORT_HEADER_ALPN);
        Ok((Connected { transport_header, resumed }, ClientIo::new(io)))
    }

    /// That of the state in force, with its tickets. Two connections may make it at the same time; then one of the two
    /// goes after its first use.
    fn config(&self, state: &Arc<State>) -> Arc<ClientConfig> {
        if let Some(made) = &*self.made.load()
            && std::ptr::eq(made.of.as_ptr(), Arc::as_ptr(state))
        {
            return made.config.clone();
        }
        let config = Arc::new(client_config(&self.shared.time, state, &self.target));
        self.made.store(Some(Arc::new(Made { of: Arc::downgrade(state), config: config.clone() })));
        config
    }
}

impl Shared {
    /// Whether the session is an earlier one that goes on. What was proved then is only good as long as it lasts.
    fn resumed(&self, session: &CommonState, roots: &TrustAnchors, peer: verify::Role) -> Result<bool, Error> {
        if session.handshake_kind() != Some(HandshakeKind::Resumed) {
            return Ok(false);
        }
        if let Some(chain) = session.peer_certificates() {
            let now = self.time.current_time().ok_or_else(|| Invalid::Chain("the time is not known".into()));
            now.and_then(|now| verify::still(roots, chain, now, peer)).map_err(Error::Peer)?;
        }
        Ok(true)
    }
}

impl Installed {
    fn new(roots: &TrustAnchors, certificate: Certificate, id: &Id) -> Result<Self, Invalid> {
        let Certificate { leaf, intermediates, key_pkcs8, expiry } = certificate;
        let leaf = CertificateDer::from(leaf);
        let intermediates: Vec<_> = intermediates.into_iter().map(CertificateDer::from).collect();
        verify::own(roots, &leaf, &intermediates, id)?;
        if let Ok(past) = SystemTime::now().duration_since(expiry) {
            return Err(Invalid::Expired(past));
        }
        let key =
            PROVIDER.key_provider.load_private_key(key_pkcs8.to_rustls()).map_err(|e| Invalid::Key(e.to_string()))?;
        if key.algorithm() == SignatureAlgorithm::RSA {
            return Err(Invalid::RsaKey);
        }
        if key.choose_scheme(&verify::ALGORITHMS.supported_schemes()).is_none() {
            return Err(Invalid::Key("peers verify no signature of its kind; use ECDSA P-256".into()));
        }
        let chain = std::iter::once(leaf).chain(intermediates).collect();
        let key = CertifiedKey::new(chain, key);
        match key.keys_match() {
            Ok(()) | Err(rustls::Error::InconsistentKeys(rustls::InconsistentKeys::Unknown)) => {}
            Err(_) => return Err(Invalid::KeyMismatch),
        }
        Ok(Self { key: Arc::new(key), expiry })
    }
}

impl State {
    fn new(time: &Arc<dyn TimeProvider>, roots: TrustAnchors, certificate: Option<Installed>) -> Self {
        let server = certificate.as_ref().map(|certificate| Server {
            plain: Arc::new(server_config(time, &roots, certificate, Alpn::None)),
            transport_header: Arc::new(server_config(time, &roots, certificate, Alpn::TransportHeader)),
        });
        Self { roots, certificate, server }
    }
}

/// States the invariant behind the two builders.
const TLS13: &str = "the provider has TLS 1.3 suites and groups";

fn server_config(
    time: &Arc<dyn TimeProvider>,
    roots: &TrustAnchors,
    certificate: &Installed,
    alpn: Alpn,
) -> ServerConfig {
    let mut config = ServerConfig::builder_with_details(PROVIDER.clone(), time.clone())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .expect(TLS13)
        .with_client_cert_verifier(Arc::new(ClientVerifier { roots: roots.clone() }))
        .with_cert_resolver(Arc::new(SingleCertAndKey::from(certificate.key.clone())));
    if alpn == Alpn::TransportHeader {
        config.alpn_protocols = vec![TRANSPORT_HEADER_ALPN.to_vec()];
    }
    config.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});
    // A ticket holds the session itself, encrypted, so that nothing has to be kept here. Its key lives in memory alone,
    // and not longer than this configuration.
    match aws_lc_rs::Ticketer::new() {
        Ok(ticketer) => config.ticketer = ticketer,
        Err(error) => tracing::warn!(%error, "sessions cannot be resumed for want of randomness"),
    }
    config.send_tls13_tickets = 0;
    config.max_tls13_tickets = MAX_TICKETS;
    config
}

fn client_config(time: &Arc<dyn TimeProvider>, state: &State, target: &ClientTls) -> ClientConfig {
    let verifier = ServerVerifier { roots: state.roots.clone(), id: target.server_id.clone() };
    let config = ClientConfig::builder_with_details(PROVIDER.clone(), time.clone())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .expect(TLS13)
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier));
    let mut config = match &state.certificate {
        Some(certificate) => {
            config.with_client_cert_resolver(Arc::new(SingleCertAndKey::from(certificate.key.clone())))
        }
        None => config.with_no_client_auth(),
    };
    if target.transport_header {
        config.alpn_protocols = vec![TRANSPORT_HEADER_ALPN.to_vec()];
    }
    config.resumption = Resumption::store(Arc::new(Tickets::default()));
    config.send_ticket_request = Some(TICKETS);
    config
}

impl fmt::Debug for Made {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Made").field("tickets", &self.config.resumption).finish()
    }
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.state.load();
        f.debug_struct("Identity")
            .field("id", &self.id)
            .field("server_name", &self.server_name)
            .field("roots", &state.roots)
            .field("expiry", &state.certificate.as_ref().map(|c| c.expiry))
            .finish()
    }
}

#[cfg(test)]
mod resumption;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ca::tests::Folder;
    use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};

    pub(super) const WEB: &str = "web.shop.serviceaccount.identity.linkerd.cluster.local";
    pub(super) const SPIFFE: &str = "spiffe://cluster.local/machine";

    pub(super) fn id(name: &str) -> Id {
        name.parse().unwrap()
    }

    fn bare(folder: &Folder, name: &str) -> (Writer, Reader) {
        let (roots, _) = TrustAnchors::from_pem(&folder.ca_pem()).unwrap();
        let id = id(name);
        let server_name = id.to_server_name().unwrap_or_else(|| "machine".parse().unwrap());
        channel(id, server_name, roots)
    }

    fn certified(folder: &Folder, name: &str) -> (Writer, Reader) {
        let (mut tx, rx) = bare(folder, name);
        tx.set_certificate(folder.issuer().issue(&id(name)).unwrap()).unwrap();
        (tx, rx)
    }

    pub(super) fn target(server: &Reader, transport_header: bool) -> ClientTls {
        ClientTls { server_id: server.id().clone(), server_name: server.server_name().clone(), transport_header }
    }

    /// Shakes hands, sends a byte each way, and returns what both ends learned.
    pub(super) async fn shake(
        client: &Client,
        server: &Reader,
        alpn: Alpn,
    ) -> (Result<Connected, Error>, Result<Accepted, Error>) {
        let (a, b) = duplex(64 * 1024);
        let connect = async {
            let (connected, mut io) = client.connect(a).await?;
            let exchange = async {
                io.write_all(b"x").await?;
                io.flush().await?;
                io.read_u8().await
            };
            exchange.await.map_err(Error::handshake)?;
            Ok(connected)
        };
        let accept = async {
            let (accepted, mut io) = server.accept(b, alpn).await?;
            let exchange = async {
                io.read_u8().await?;
                io.write_all(b"y").await?;
                io.flush().await
            };
            exchange.await.map_err(Error::handshake)?;
            Ok(accepted)
        };
        tokio::join!(connect, accept)
    }

    #[tokio::test]
    async fn both_ends_prove_who_they_are() {
        let folder = Folder::new("mutual");
        let ((_w, web), (_m, machine)) = (certified(&folder, WEB), certified(&folder, SPIFFE));
        for (client, server) in [(&web, &machine), (&machine, &web)] {
            let (connected, accepted) = shake(&client.client(target(server, false)), server, Alpn::None).await;
            assert_eq!(connected.unwrap(), Connected { transport_header: false, resumed: false });
            let client_id = Some(client.id().clone());
            assert_eq!(accepted.unwrap(), Accepted { client_id, transport_header: false, resumed: false });
        }
    }

    #[tokio::test]
    async fn the_transport_header_is_negotiated_by_alpn() {
        let folder = Folder::new("alpn");
        let (_w, web) = certified(&folder, WEB);
        for (offered, alpn, expected) in [
            (true, Alpn::TransportHeader, true),
            (true, Alpn::None, false),
            (false, Alpn::TransportHeader, false),
            (false, Alpn::None, false),
        ] {
            let (connected, accepted) = shake(&web.client(target(&web, offered)), &web, alpn).await;
            assert_eq!((connected.unwrap().transport_header, accepted.unwrap().transport_header), (expected, expected));
        }
    }

    #[tokio::test]
    async fn clients_without_a_certificate_have_no_identity() {
        let folder = Folder::new("anonymous");
        let ((_w, web), (_n, nobody)) = (certified(&folder, WEB), bare(&folder, "new.example"));
        let (connected, accepted) = shake(&nobody.client(target(&web, false)), &web, Alpn::None).await;
        connected.unwrap();
        assert_eq!(accepted.unwrap().client_id, None);
        let (_, accepted) = shake(&web.client(target(&nobody, false)), &nobody, Alpn::None).await;
        assert!(matches!(accepted, Err(Error::NoCertificate)));
    }

    #[tokio::test]
    async fn servers_must_hold_the_demanded_identity() {
        let folder = Folder::new("demand");
        let (_w, web) = certified(&folder, WEB);
        let other = ClientTls { server_id: id("db.example"), ..target(&web, false) };
        let (connected, accepted) = shake(&web.client(other), &web, Alpn::None).await;
        match connected {
            Err(Error::Peer(Invalid::Id { expected, found })) => {
                assert_eq!((expected, &found[..]), (id("db.example"), &[id(WEB)][..]));
            }
            other => panic!("{other:?}"),
        }
        accepted.unwrap_err();
    }

    #[tokio::test]
    async fn strangers_are_refused_until_their_anchors_are_trusted() {
        let (ours, theirs) = (Folder::new("ours"), Folder::new("theirs"));
        let ((mut w, web), (mut s, stranger)) = (certified(&ours, WEB), certified(&theirs, WEB));
        let (connected, _) = shake(&stranger.client(target(&web, false)), &web, Alpn::None).await;
        assert!(matches!(connected, Err(Error::Peer(Invalid::Untrusted))), "{connected:?}");
        let (both, _) = TrustAnchors::from_pem(&(ours.ca_pem() + &theirs.ca_pem())).unwrap();
        s.set_trust_anchors(both.clone());
        let (_, accepted) = shake(&stranger.client(target(&web, false)), &web, Alpn::None).await;
        assert!(matches!(accepted, Err(Error::Peer(Invalid::Untrusted))), "{accepted:?}");
        w.set_trust_anchors(both);
        let (connected, accepted) = shake(&stranger.client(target(&web, false)), &web, Alpn::None).await;
        connected.unwrap();
        accepted.unwrap();
    }

    #[tokio::test]
    async fn certificates_that_peers_would_refuse_are_not_installed() {
        let (folder, other) = (Folder::new("own"), Folder::new("foreign"));
        let (mut tx, rx) = bare(&folder, WEB);
        let issuer = folder.issuer();
        let mut refused = |certificate| match tx.set_certificate(certificate) {
            Err(Error::Invalid(invalid)) => invalid,
            other => panic!("{other:?}"),
        };
        assert_eq!(refused(other.issuer().issue(&id(WEB)).unwrap()), Invalid::Untrusted);
        assert!(matches!(refused(issuer.issue(&id("db.example")).unwrap()), Invalid::Id { .. }));
        let mut swapped = issuer.issue(&id(WEB)).unwrap();
        swapped.key_pkcs8 = crate::csr::generate_key().unwrap();
        assert_eq!(refused(swapped), Invalid::KeyMismatch);
        let mut past = issuer.issue(&id(WEB)).unwrap();
        past.expiry = SystemTime::now() - Duration::from_secs(9);
        assert!(matches!(refused(past), Invalid::Expired(_)));
        let key = crate::csr::generate_key().unwrap();
        let csr = crate::csr::csr_der(&key, &id(WEB)).unwrap();
        let hour = Duration::from_secs(3_600);
        for (now, words) in
            [(SystemTime::now() + hour, "is not valid for another"), (SystemTime::now() - hour * 24 * 30, "expired")]
        {
            let issued = issuer.issue_for_at(&csr, &id(WEB), now).unwrap();
            let crate::ca::Issued { leaf, intermediates, .. } = issued;
            let skewed = Certificate { leaf, intermediates, key_pkcs8: key.clone(), expiry: SystemTime::now() + hour };
            let told = refused(skewed).to_string();
            assert!(told.contains(words) && told.contains("this machine's clock"), "{told}");
        }
        let mut chainless = issuer.issue(&id(WEB)).unwrap();
        chainless.intermediates.clear();
        assert_eq!(refused(chainless), Invalid::Untrusted);
        assert!(!rx.is_ready());

        let good = issuer.issue(&id(WEB)).unwrap();
        let expiry = good.expiry;
        tx.set_certificate(good).unwrap();
        rx.ready().await;
        assert_eq!(rx.expiry(), Some(expiry));
    }

    #[tokio::test(start_paused = true)]
    async fn slow_clients_do_not_hold_a_handshake() {
        let folder = Folder::new("slow");
        let (_w, web) = certified(&folder, WEB);
        let (_held, server) = duplex(64);
        let error = web.accept(server, Alpn::None).await.unwrap_err();
        assert!(matches!(error, Error::HandshakeTimeout(ACCEPT_TIMEOUT)), "{error}");
    }

    #[tokio::test]
    async fn only_tls_13_with_the_hybrid_group_first() {
        let folder = Folder::new("hello");
        let (_w, web) = certified(&folder, WEB);
        let (a, mut b) = duplex(64 * 1024);
        let connect = tokio::spawn(async move { web.client(target(&web, true)).connect(a).await.map(drop) });
        let mut hello = vec![0; 5];
        b.read_exact(&mut hello).await.unwrap();
        let mut body = vec![0; u16::from_be_bytes([hello[3], hello[4]]).into()];
        b.read_exact(&mut body).await.unwrap();
        hello.extend(body);
        assert_eq!(crate::detect::sni(&hello), crate::detect::Sni::Name(WEB.into()));
        let has = |needle: &[u8]| hello.windows(needle.len()).any(|w| w == needle);
        assert!(has(&[0x13, 1, 0x13, 2, 0x13, 3]), "suites");
        assert!(has(&[0x00, 0x0a, 0, 10, 0, 8, 0x11, 0xec, 0, 29, 0, 23, 0, 24]), "groups");
        assert!(has(&[0x00, 0x2b, 0, 3, 2, 3, 4]), "versions");
        assert!(has(&[5, 3, 4, 3, 6, 3, 8, 7, 6, 1, 5, 1, 4, 1]), "signatures");
        assert!(has(TRANSPORT_HEADER_ALPN));
        drop(b);
        connect.await.unwrap().unwrap_err();
    }
}
