//! TLS to servers outside the mesh, as a browser speaks it: a chain to the system's roots or to given ones, and the name
//! of the host. TLS 1.3 and 1.2; no client certificate.
//!
//! A session may be resumed: tickets are kept with the client that they were issued to, which is for one name and one set
//! of roots and dies when either changes.

use crate::{ClientIo, Error, Invalid, verify::has_uri};
use linkerd_stack::Io;
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme,
    client::{
        WebPkiServerVerifier,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::{CryptoProvider, aws_lc_rs},
    pki_types::{CertificateDer, ServerName, UnixTime, pem::PemObject},
};
use std::{
    fs, io,
    path::Path,
    sync::{Arc, LazyLock},
};

/// Where systems keep the roots that they trust, the most common first (Debian, Red Hat, Alpine and BSD, SUSE).
const SYSTEM_ROOTS: [&str; 5] = [
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/cert.pem",
    "/etc/ssl/ca-bundle.pem",
    "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
];
/// Largest file of roots, bytes; the usual ones have a quarter of a megabyte.
const MAX_ROOTS_FILE: u64 = 8 * 1024 * 1024;

/// Whom to connect to, and what to believe.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Target {
    /// DNS name or IP address: sent as SNI if a name, and verified unless `subject_names` are given.
    pub name: Arc<str>,
    /// Authorities.
    pub roots: Roots,
    /// If any, one of these must be in the certificate instead of `name`.
    pub subject_names: Vec<SubjectName>,
}

/// Authorities that a server's chain may lead to.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Roots {
    /// The system's, read once in the life of the process.
    System,
    /// These, in PEM.
    Pem(Arc<str>),
    /// None can be had, for this reason: every connection fails, and never becomes plain text.
    Unusable(Arc<str>),
}

/// A subject alternative name.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum SubjectName {
    /// A host name; certificates may have a wildcard for it.
    Host(Arc<str>),
    /// The very URI.
    Uri(Arc<str>),
}

/// Protocol that is offered with ALPN.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Alpn {
    /// Nothing is offered.
    None,
    /// `http/1.1`
    Http1,
    /// `h2`
    Http2,
}

/// Shakes hands with one target.
#[derive(Clone, Debug)]
pub struct Client {
    name: ServerName<'static>,
    /// By [`Alpn`].
    configs: [Arc<ClientConfig>; 3],
}

impl Client {
    /// For a target.
    ///
    /// # Errors
    /// When its name is none, or its roots can't be used.
    pub fn new(target: &Target) -> Result<Self, Error> {
        let name = server_name(&target.name)?;
        let roots = match &target.roots {
            Roots::System => SYSTEM.as_ref().map_err(|why| Invalid::Roots(why.clone()))?.clone(),
            Roots::Pem(pem) => Arc::new(store(pem.as_bytes()).map_err(Invalid::Roots)?),
            Roots::Unusable(why) => return Err(Invalid::Roots(why.to_string()).into()),
        };
        let provider = Arc::new(aws_lc_rs::default_provider());
        let verifier = Verifier::new(roots, &target.subject_names, provider.clone())?;
        let unusable = |e: rustls::Error| Invalid::Roots(e.to_string());
        let config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(unusable)?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verifier))
            .with_no_client_auth();
        let offering = |alpn: &[&[u8]]| {
            let mut config = config.clone();
            config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
            Arc::new(config)
        };
        Ok(Self { name, configs: [offering(&[]), offering(&[b"http/1.1"]), offering(&[b"h2"])] })
    }

    /// Originates TLS. The caller bounds the time. Dropping the future drops the connection.
    ///
    /// # Errors
    /// When the server's certificate is refused, or the handshake fails otherwise.
    pub async fn connect<I: Io>(&self, io: I, alpn: Alpn) -> Result<ClientIo<I>, Error> {
        let [none, http1, http2] = &self.configs;
        let config = match alpn {
            Alpn::None => none,
            Alpn::Http1 => http1,
            Alpn::Http2 => http2,
        };
        let io = ClientIo::connect(config.clone(), self.name.clone(), io).await?;
        if alpn == Alpn::Http2 && io.session().alpn_protocol() != Some(b"h2") {
            let why = "the server does not speak HTTP/2 (no ALPN h2), and the request is HTTP/2";
            return Err(Error::Handshake(io::Error::new(io::ErrorKind::Unsupported, why)));
        }
        Ok(io)
    }
}

fn server_name(text: &str) -> Result<ServerName<'static>, Invalid> {
    ServerName::try_from(text.to_owned()).map_err(|_| Invalid::HostName(text.to_owned()))
}

static SYSTEM: LazyLock<Result<Arc<RootCertStore>, String>> = LazyLock::new(|| {
    let mut reasons = Vec::new();
    for path in SYSTEM_ROOTS.map(Path::new).into_iter().filter(|path| path.exists()) {
        match read(path) {
            Ok(roots) => return Ok(Arc::new(roots)),
            Err(why) => reasons.push(format!("{}: {why}", path.display())),
        }
    }
    if reasons.is_empty() {
        reasons.push(format!("none of {} exists; install the system's ca-certificates", SYSTEM_ROOTS.join(", ")));
    }
    Err(reasons.join("; "))
});

fn read(path: &Path) -> Result<RootCertStore, String> {
    let length = fs::metadata(path).map_err(|e| e.to_string())?.len();
    if length > MAX_ROOTS_FILE {
        return Err(format!("{length} bytes are more than {MAX_ROOTS_FILE}"));
    }
    store(&fs::read(path).map_err(|e| e.to_string())?)
}

/// What can't be used is left out, as systems' bundles always hold something odd.
fn store(pem: &[u8]) -> Result<RootCertStore, String> {
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(CertificateDer::pem_slice_iter(pem).flatten());
    if roots.is_empty() { Err("no usable CERTIFICATE block".to_string()) } else { Ok(roots) }
}

/// The ordinary verifier; with subject names, it looks for those instead of the name that was dialled.
#[derive(Debug)]
struct Verifier {
    chain: Arc<WebPkiServerVerifier>,
    hosts: Vec<ServerName<'static>>,
    uris: Vec<Arc<str>>,
}

impl Verifier {
    fn new(roots: Arc<RootCertStore>, names: &[SubjectName], provider: Arc<CryptoProvider>) -> Result<Self, Invalid> {
        let chain = WebPkiServerVerifier::builder_with_provider(roots, provider)
            .build()
            .map_err(|e| Invalid::Roots(e.to_string()))?;
        let (mut hosts, mut uris) = (Vec::new(), Vec::new());
        for name in names {
            match name {
                SubjectName::Host(host) => hosts.push(server_name(host)?),
                SubjectName::Uri(uri) => uris.push(uri.clone()),
            }
        }
        Ok(Self { chain, hosts, uris })
    }
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        dialled: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let verify = |name: &ServerName<'_>| self.chain.verify_server_cert(leaf, intermediates, name, ocsp, now);
        if self.hosts.is_empty() && self.uris.is_empty() {
            return verify(dialled);
        }
        // Names are looked at after the chain: a refusal because of the name says that the chain is good.
        let mut refusal = match verify(dialled) {
            Ok(_) => CertificateError::NotValidForName.into(),
            Err(
                e @ rustls::Error::InvalidCertificate(
                    CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
                ),
            ) => e,
            Err(other) => return Err(other),
        };
        if self.uris.iter().any(|uri| has_uri(leaf, uri)) {
            return Ok(ServerCertVerified::assertion());
        }
        for host in &self.hosts {
            match verify(host) {
                Ok(verified) => return Ok(verified),
                Err(e) => refusal = e,
            }
        }
        Err(refusal)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.chain.verify_tls12_signature(message, leaf, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.chain.verify_tls13_signature(message, leaf, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.chain.supported_verify_schemes()
    }
}

/// Whether a text is a DNS name or an IP address, as [`Target::name`] must be.
pub fn is_host_name(text: &str) -> bool {
    server_name(text).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair, SanType};
    use rustls::{ServerConfig, pki_types::PrivateKeyDer};
    use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};

    fn authority() -> CertifiedIssuer<'static, KeyPair> {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap()
    }

    fn server(ca: &CertifiedIssuer<'static, KeyPair>, alpn: &[&[u8]]) -> tokio_rustls::TlsAcceptor {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec!["api.test".into(), "*.wild.test".into()]).unwrap();
        params.subject_alt_names.push(SanType::URI("spiffe://a/b".try_into().unwrap()));
        let leaf = params.signed_by(&key, ca).unwrap();
        let mut config = ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![leaf.der().clone()], PrivateKeyDer::Pkcs8(key.serialize_der().into()))
            .unwrap();
        config.alpn_protocols = alpn.iter().map(|a| a.to_vec()).collect();
        Arc::new(config).into()
    }

    async fn shake(server: &tokio_rustls::TlsAcceptor, target: &Target, alpn: Alpn) -> Result<(), Error> {
        let client = Client::new(target)?;
        let (a, b) = duplex(64 * 1024);
        let accept = async {
            if let Ok(mut io) = server.accept(b).await {
                let _ = io.write_all(b"x").await;
                let _ = io.shutdown().await;
            }
        };
        let connect = async {
            let mut io = client.connect(a, alpn).await?;
            assert_eq!(io.read_u8().await.unwrap(), b'x');
            Ok(())
        };
        tokio::join!(accept, connect).1
    }

    #[tokio::test]
    async fn chains_and_names_are_verified() {
        let (ca, other) = (authority(), authority());
        let server = server(&ca, &[b"http/1.1"]);
        let pem = |ca: &CertifiedIssuer<'static, KeyPair>| Roots::Pem(ca.pem().into());
        let host = |h: &str| SubjectName::Host(h.into());
        let uri = |u: &str| SubjectName::Uri(u.into());
        for (name, roots, subject_names, fine) in [
            ("api.test", pem(&ca), vec![], true),
            ("a.wild.test", pem(&ca), vec![], true),
            ("other.test", pem(&ca), vec![], false),
            ("api.test", pem(&other), vec![], false),
            ("api.test", Roots::Unusable("no ConfigMap".into()), vec![], false),
            ("api.test", Roots::Pem("junk".into()), vec![], false),
            ("not a name", pem(&ca), vec![], false),
            // With subject names the dialled name is SNI alone.
            ("other.test", pem(&ca), vec![host("api.test")], true),
            ("api.test", pem(&ca), vec![host("other.test")], false),
            ("other.test", pem(&ca), vec![host("b.test"), uri("spiffe://a/b")], true),
            ("api.test", pem(&ca), vec![uri("spiffe://a/c")], false),
            ("api.test", pem(&other), vec![uri("spiffe://a/b")], false),
        ] {
            let what = format!("{name} {subject_names:?} {fine}");
            let target = Target { name: name.into(), roots, subject_names };
            let result = shake(&server, &target, Alpn::Http1).await;
            assert_eq!(result.is_ok(), fine, "{what}: {result:?}");
        }
    }

    #[tokio::test]
    async fn refusals_tell_the_name_and_http2_is_not_forced_on_servers() {
        let ca = authority();
        let server = server(&ca, &[]);
        let target =
            |name: &str| Target { name: name.into(), roots: Roots::Pem(ca.pem().into()), subject_names: Vec::new() };
        let error = shake(&server, &target("other.test"), Alpn::None).await.unwrap_err();
        assert!(matches!(&error, Error::Peer(_)) && error.to_string().contains("other.test"), "{error}");
        let error = shake(&server, &target("api.test"), Alpn::Http2).await.unwrap_err();
        assert!(error.to_string().contains("does not speak HTTP/2"), "{error}");
    }
}
