//! A small certificate authority in a folder, for meshes without a cluster.
//!
//! | file | holds |
//! |---|---|
//! | `ca.crt` | trust anchor, PEM; every peer needs it |
//! | `ca.key` | its key; only needed to make another issuer, best kept elsewhere |
//! | `issuer.crt`, `issuer.key` | issuer of workload certificates, and its key |
//! | `trust-domain` | the trust domain as text |

use crate::{
    Certificate, Id, Key, TrustAnchors, certificate, csr,
    error::{Error, Invalid},
    key::Signer,
    verify,
};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose as Purpose, IsCa, KeyUsagePurpose as Usage, SerialNumber,
};
use rustls::pki_types::{CertificateDer, CertificateSigningRequestDer};
use std::{
    fs, io,
    io::Write,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};
use x509_parser::prelude::{FromDer, X509Certificate};

/// File of the trust anchors.
pub const CA_CERTIFICATE: &str = "ca.crt";
/// File of the trust anchor's key.
pub const CA_KEY: &str = "ca.key";
/// File of the issuer's certificate.
pub const ISSUER_CERTIFICATE: &str = "issuer.crt";
/// File of the issuer's key.
pub const ISSUER_KEY: &str = "issuer.key";
/// File of the trust domain.
pub const TRUST_DOMAIN: &str = "trust-domain";

const DAY: Duration = Duration::from_secs(24 * 60 * 60);
/// Life of the trust anchor: replacing it touches every machine.
const CA_LIFETIME: Duration = DAY.saturating_mul(3650);
/// Life of the issuer, as Linkerd's own tools make it.
const ISSUER_LIFETIME: Duration = DAY.saturating_mul(365);
/// Life of a workload's certificate if nothing else is asked for (behaviour.md B.3).
pub const LEAF_LIFETIME: Duration = DAY;
/// How far clocks of peers may be apart; certificates are valid this much earlier and later (behaviour.md B.3).
pub const CLOCK_SKEW: Duration = Duration::from_secs(20);

/// What [`init`] makes.
#[derive(Clone, Debug)]
pub struct Init {
    /// Trust domain, such as `cluster.local`.
    pub trust_domain: String,
    /// Namespace in the names of authorities, such as `linkerd`.
    pub control_plane_ns: String,
    /// Replace files that exist.
    pub overwrite: bool,
}

impl Default for Init {
    fn default() -> Self {
        Self { trust_domain: "cluster.local".into(), control_plane_ns: "linkerd".into(), overwrite: false }
    }
}

/// Makes a trust anchor and an issuer in a folder, which is created if need be. Keys are ECDSA P-256 and readable by
/// their owner alone. Returns the files in the order in which they were written.
///
/// # Errors
/// When a file exists and may not be overwritten (nothing is written then), when a name is no DNS name, or when writing
/// fails.
pub fn init(dir: &Path, options: &Init) -> Result<Vec<PathBuf>, Error> {
    let now = SystemTime::now();
    let Init { trust_domain, control_plane_ns: ns, overwrite } = options;
    let name = |name: String| -> Result<Id, Error> {
        let id: Id = name.parse().map_err(|e: crate::InvalidName| Invalid::Request(e.to_string()))?;
        Ok(id)
    };
    let (root_name, issuer_name) =
        (name(format!("root.{ns}.{trust_domain}"))?, name(format!("identity.{ns}.{trust_domain}"))?);

    let root_key = csr::generate_key()?;
    let root_params = authority(&root_name, now, CA_LIFETIME, BasicConstraints::Unconstrained)?;
    let root = root_params.self_signed(&root_key.signer()?).map_err(issuing)?;
    let issuer_key = csr::generate_key()?;
    let signer = rcgen::Issuer::new(root_params, root_key.signer()?);
    let issuer = authority(&issuer_name, now, ISSUER_LIFETIME, BasicConstraints::Constrained(0))?
        .signed_by(&issuer_key.signer()?, &signer)
        .map_err(issuing)?;

    fs::create_dir_all(dir).map_err(file(dir, "make the folder, or choose one where you may write"))?;
    let files = [
        (CA_CERTIFICATE, root.pem(), 0o644),
        (CA_KEY, root_key.signer()?.0.serialize_pem(), 0o600),
        (ISSUER_CERTIFICATE, issuer.pem(), 0o644),
        (ISSUER_KEY, issuer_key.signer()?.0.serialize_pem(), 0o600),
        (TRUST_DOMAIN, format!("{trust_domain}\n"), 0o644),
    ];
    if !overwrite {
        for (name, ..) in &files {
            let path = dir.join(name);
            if path.symlink_metadata().is_ok() {
                let source = io::ErrorKind::AlreadyExists.into();
                let remedy = "nothing was changed; choose another folder, or ask for overwriting if no peer relies on \
                              these files any more";
                return Err(Error::File { path, source, remedy });
            }
        }
    }
    let mut written = Vec::new();
    for (name, text, mode) in files {
        let path = dir.join(name);
        replace(&path, zeroize::Zeroizing::new(text).as_bytes(), mode)?;
        written.push(path);
    }
    Ok(written)
}

/// The trust domain that a folder was made for: what its file says, else what the issuer's name ends in.
pub fn trust_domain(dir: &Path) -> Option<String> {
    let valid = |name: &str| name.parse::<Id>().ok().filter(|id| !id.is_uri()).map(|id| id.to_string());
    if let Ok(text) = fs::read_to_string(dir.join(TRUST_DOMAIN)) {
        return valid(text.trim());
    }
    let pem = fs::read_to_string(dir.join(ISSUER_CERTIFICATE)).ok()?;
    let der = certificate::chain_from_pem(&pem).ok()?.into_iter().next()?;
    let (_, certificate) = X509Certificate::from_der(&der).ok()?;
    let name = certificate.subject().iter_common_name().next()?.as_str().ok()?;
    let (_ns, domain) = name.strip_prefix("identity.")?.split_once('.')?;
    valid(domain)
}

/// An issuer of workload certificates.
pub struct Issuer {
    signer: rcgen::Issuer<'static, Signer>,
    /// From the issuer upwards, without trust anchors.
    chain: Vec<Vec<u8>>,
    /// The first end of validity in the chain.
    not_after: SystemTime,
    lifetime: Duration,
    roots: TrustAnchors,
}

/// A certificate without its key.
#[derive(Clone, Debug)]
pub struct Issued {
    /// DER.
    pub leaf: Vec<u8>,
    /// DER.
    pub intermediates: Vec<Vec<u8>>,
    /// When the leaf ceases to be valid.
    pub expiry: SystemTime,
}

impl Issuer {
    /// Reads `ca.crt`, `issuer.crt` and `issuer.key` and tries them out.
    ///
    /// # Errors
    /// When a file is missing or unusable, the key is not the issuer's, the issuer may not issue, is not valid now, or
    /// does not chain to the trust anchors.
    pub fn load(dir: &Path) -> Result<Self, Error> {
        let path = |name| dir.join(name);
        let contents = |name| move |source| Error::Contents { path: dir.join(name), source };
        let (roots, warnings) = TrustAnchors::from_pem(&read(&path(CA_CERTIFICATE))?).map_err(|e| match e {
            Error::Invalid(source) => Error::Contents { path: path(CA_CERTIFICATE), source },
            other => other,
        })?;
        for warning in warnings {
            tracing::warn!(file = %path(CA_CERTIFICATE).display(), "{warning}");
        }
        let chain =
            certificate::chain_from_pem(&read(&path(ISSUER_CERTIFICATE))?).map_err(contents(ISSUER_CERTIFICATE))?;
        let key = Key::from_pem(&zeroize::Zeroizing::new(read(&path(ISSUER_KEY))?)).map_err(contents(ISSUER_KEY))?;
        Self::new(roots, chain, &key).map_err(contents(ISSUER_CERTIFICATE))
    }

    /// An issuer from its parts: chain in DER, issuer first.
    ///
    /// # Errors
    /// As [`Issuer::load`].
    pub fn new(roots: TrustAnchors, chain: Vec<Vec<u8>>, key: &Key) -> Result<Self, Invalid> {
        let first = chain.first().ok_or(Invalid::NoCertificate)?.clone();
        let signer = key.signer()?;
        let (_, parsed) = X509Certificate::from_der(&first).map_err(|e| Invalid::Malformed(e.to_string()))?;
        if !parsed.is_ca() {
            return Err(Invalid::Issuer("its certificate is not an authority's (basicConstraints CA)".into()));
        }
        if parsed.public_key().raw != rcgen::PublicKeyData::subject_public_key_info(&signer) {
            return Err(Invalid::KeyMismatch);
        }
        let mut not_after = None;
        for der in &chain {
            let (_, end) = certificate::validity(der)?;
            not_after = Some(not_after.map_or(end, |earlier: SystemTime| earlier.min(end)));
        }
        let not_after = not_after.ok_or(Invalid::NoCertificate)?;
        let signer = rcgen::Issuer::from_ca_cert_der(&CertificateDer::from(first), signer).map_err(issuing)?;
        let chain = chain.into_iter().filter(|der| !roots.contains(der)).collect();
        let issuer = Self { signer, chain, not_after, lifetime: LEAF_LIFETIME, roots };
        let trial: Id = "trial.invalid".parse().map_err(|e: crate::InvalidName| Invalid::Request(e.to_string()))?;
        let Certificate { leaf, intermediates, .. } = issuer.issue(&trial)?;
        let intermediates: Vec<_> = intermediates.into_iter().map(CertificateDer::from).collect();
        verify::own(&issuer.roots, &leaf.into(), &intermediates, &trial)?;
        Ok(issuer)
    }

    /// Certificates issued from here on live this long, or as long as the issuer if that is shorter.
    pub fn with_lifetime(self, lifetime: Duration) -> Self {
        Self { lifetime, ..self }
    }

    /// The anchors that the issuer chains to.
    pub fn trust_anchors(&self) -> &TrustAnchors {
        &self.roots
    }

    /// When the issuer, or one above it, ceases to be valid.
    pub fn expiry(&self) -> SystemTime {
        self.not_after
    }

    /// Issues a certificate for a key made for it.
    ///
    /// # Errors
    /// When the identity can't be put in a certificate, or the issuer is past its time.
    pub fn issue(&self, id: &Id) -> Result<Certificate, Invalid> {
        let key = csr::generate_key()?;
        let Issued { leaf, intermediates, expiry } = self.issue_for(&csr::csr_der(&key, id)?, id)?;
        Ok(Certificate { leaf, intermediates, key_pkcs8: key, expiry })
    }

    /// Grants a request, which must be for this identity alone.
    ///
    /// # Errors
    /// When the request is malformed, its signature is not by its key, or it asks for other names; and when the issuer is
    /// past its time.
    pub fn issue_for(&self, csr_der: &[u8], id: &Id) -> Result<Issued, Invalid> {
        self.issue_for_at(csr_der, id, SystemTime::now())
    }

    /// As [`Issuer::issue_for`], by a clock that shows `now`.
    ///
    /// # Errors
    /// As [`Issuer::issue_for`].
    pub fn issue_for_at(&self, csr_der: &[u8], id: &Id, now: SystemTime) -> Result<Issued, Invalid> {
        let refused = |e: rcgen::Error| Invalid::Request(e.to_string());
        let mut request =
            CertificateSigningRequestParams::from_der(&CertificateSigningRequestDer::from(csr_der)).map_err(refused)?;
        let mut params = csr::params(id)?;
        if request.params.subject_alt_names != params.subject_alt_names {
            return Err(Invalid::Request(format!("its alternative names are not exactly {id}")));
        }
        if let Ok(past) = now.duration_since(self.not_after) {
            return Err(Invalid::Expired(past));
        }
        let wanted = now.checked_add(self.lifetime.saturating_add(CLOCK_SKEW)).unwrap_or(self.not_after);
        let expiry = wanted.min(self.not_after);
        params.not_before = (now - CLOCK_SKEW).into();
        params.not_after = expiry.into();
        params.serial_number = Some(serial()?);
        params.key_usages = vec![Usage::DigitalSignature, Usage::KeyEncipherment];
        params.extended_key_usages = vec![Purpose::ServerAuth, Purpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        request.params = params;
        let leaf = request.signed_by(&self.signer).map_err(issuing)?.der().to_vec();
        Ok(Issued { leaf, intermediates: self.chain.clone(), expiry })
    }
}

impl std::fmt::Debug for Issuer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Issuer").field("not_after", &self.not_after).field("lifetime", &self.lifetime).finish()
    }
}

fn authority(
    name: &Id,
    now: SystemTime,
    lifetime: Duration,
    constraints: BasicConstraints,
) -> Result<CertificateParams, Invalid> {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name.as_str());
    params.not_before = (now - CLOCK_SKEW).into();
    params.not_after = (now + lifetime).into();
    params.serial_number = Some(serial()?);
    params.is_ca = IsCa::Ca(constraints);
    params.key_usages = vec![Usage::KeyCertSign, Usage::CrlSign];
    params.use_authority_key_identifier_extension = true;
    Ok(params)
}

/// A positive random number of 127 bits (RFC 5280 4.1.2.2 allows up to 20 bytes).
fn serial() -> Result<SerialNumber, Invalid> {
    let mut bytes = [0; 16];
    rustls::crypto::aws_lc_rs::default_provider()
        .secure_random
        .fill(&mut bytes)
        .map_err(|_| Invalid::Issuer("the system has no randomness to give".into()))?;
    bytes[0] = bytes[0] & 0x7f | 0x40;
    Ok(SerialNumber::from_slice(&bytes))
}

fn issuing(error: rcgen::Error) -> Invalid {
    Invalid::Issuer(error.to_string())
}

fn file(path: &Path, remedy: &'static str) -> impl Fn(io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::File { path: path.clone(), source, remedy }
}

/// Reads a text file.
pub(crate) fn read(path: &Path) -> Result<String, Error> {
    fs::read_to_string(path).map_err(file(
        path,
        "`linkerd-proxy identity init DIR` makes the folder; the proxy's user must be able to read it",
    ))
}

/// Writes beside the file and renames, so that a reader sees the old or the new and the mode holds from the start.
fn replace(path: &Path, bytes: &[u8], mode: u32) -> Result<(), Error> {
    let remedy = "the folder must be writable and its disk not full";
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".new");
    let new = path.with_file_name(name);
    let write = || {
        match fs::remove_file(&new) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(mode).open(&new)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&new, path)
    };
    write().map_err(file(path, remedy))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    /// A folder made by [`init`], removed at the end.
    pub(crate) struct Folder(pub(crate) PathBuf);

    impl Folder {
        pub(crate) fn new(name: &str) -> Self {
            let dir = std::env::temp_dir().join(format!("linkerd-tls-{name}-{}", std::process::id()));
            let _ = fs::remove_dir_all(&dir);
            init(&dir, &Init::default()).unwrap();
            Self(dir)
        }

        pub(crate) fn ca_pem(&self) -> String {
            read(&self.0.join(CA_CERTIFICATE)).unwrap()
        }

        pub(crate) fn issuer(&self) -> Issuer {
            Issuer::load(&self.0).unwrap()
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn a_folder_is_made_once_and_is_self_contained() {
        let folder = Folder::new("init");
        for key in [CA_KEY, ISSUER_KEY] {
            assert_eq!(fs::metadata(folder.0.join(key)).unwrap().permissions().mode() & 0o777, 0o600);
        }
        assert_eq!(trust_domain(&folder.0).as_deref(), Some("cluster.local"));
        fs::remove_file(folder.0.join(TRUST_DOMAIN)).unwrap();
        assert_eq!(trust_domain(&folder.0).as_deref(), Some("cluster.local"));

        let before = folder.ca_pem();
        let error = init(&folder.0, &Init::default()).unwrap_err().to_string();
        assert!(error.contains(CA_CERTIFICATE) && error.contains("nothing was changed"), "{error}");
        assert_eq!(folder.ca_pem(), before);
        init(&folder.0, &Init { overwrite: true, ..Init::default() }).unwrap();
        assert_ne!(folder.ca_pem(), before);
    }

    #[test]
    fn leaves_live_a_day_but_not_longer_than_their_issuer() {
        let folder = Folder::new("leaf");
        let id: Id = "web.shop.serviceaccount.identity.linkerd.cluster.local".parse().unwrap();
        let issuer = folder.issuer();
        let leaf = issuer.issue(&id).unwrap();
        let (from, to) = leaf.validity().unwrap();
        assert_eq!(to.duration_since(from).unwrap(), LEAF_LIFETIME + 2 * CLOCK_SKEW);
        assert_eq!(leaf.ids().unwrap(), std::slice::from_ref(&id));
        assert_eq!(leaf.intermediates.len(), 1);
        let issuer = issuer.with_lifetime(ISSUER_LIFETIME * 2);
        let expiry = issuer.expiry();
        assert_eq!(issuer.issue(&id).unwrap().expiry, expiry);
    }

    #[test]
    fn requests_for_other_names_are_refused() {
        let folder = Folder::new("csr");
        let (web, db): (Id, Id) = ("web.example".parse().unwrap(), "db.example".parse().unwrap());
        let csr = csr::csr_der(&csr::generate_key().unwrap(), &web).unwrap();
        let issuer = folder.issuer();
        issuer.issue_for(&csr, &web).unwrap();
        assert!(matches!(issuer.issue_for(&csr, &db), Err(Invalid::Request(_))));
        assert!(matches!(issuer.issue_for(&csr[1..], &web), Err(Invalid::Request(_))));
    }

    #[test]
    fn folders_that_do_not_fit_together_are_refused_by_file() {
        let (a, b) = (Folder::new("mix-a"), Folder::new("mix-b"));
        let error = |dir: &Folder| Issuer::load(&dir.0).unwrap_err().to_string();
        fs::copy(b.0.join(ISSUER_KEY), a.0.join(ISSUER_KEY)).unwrap();
        assert!(error(&a).contains("does not belong"), "{}", error(&a));
        fs::copy(b.0.join(ISSUER_CERTIFICATE), a.0.join(ISSUER_CERTIFICATE)).unwrap();
        assert!(error(&a).contains("does not chain"), "{}", error(&a));
        fs::remove_file(a.0.join(ISSUER_KEY)).unwrap();
        assert!(error(&a).contains("issuer.key") && error(&a).contains("identity init"), "{}", error(&a));
    }
}
