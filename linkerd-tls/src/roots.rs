//! Trust anchors: the roots that certificates of the mesh must chain to.

use crate::error::{Error, Invalid};
use rustls::pki_types::{CertificateDer, TrustAnchor, pem::PemObject};
use std::{fmt, sync::Arc};

/// Most certificates that are taken from one bundle; a mesh has one or two, during a rotation a handful.
const MAX_ANCHORS: usize = 256;

/// A set of roots, never empty. Clones share it.
#[derive(Clone)]
pub struct TrustAnchors(Arc<Roots>);

struct Roots {
    anchors: Vec<TrustAnchor<'static>>,
    certificates: Vec<CertificateDer<'static>>,
}

impl TrustAnchors {
    /// Reads every CERTIFICATE block of a PEM text. Blocks that can't be used are skipped, each with a warning.
    ///
    /// # Errors
    /// When no block is usable.
    pub fn from_pem(pem: &str) -> Result<(Self, Vec<String>), Error> {
        let (mut ders, mut warnings) = (Vec::new(), Vec::new());
        for (n, block) in CertificateDer::pem_slice_iter(pem.as_bytes()).enumerate() {
            if n >= MAX_ANCHORS {
                warnings.push(format!("trust anchors after the first {MAX_ANCHORS} are ignored"));
                break;
            }
            match block {
                Ok(der) => ders.push(der),
                Err(error) => warnings.push(format!("trust anchor {} skipped: {error:?}", n + 1)),
            }
        }
        let roots = Self::from_der(ders, &mut warnings)?;
        Ok((roots, warnings))
    }

    fn from_der(ders: Vec<CertificateDer<'static>>, warnings: &mut Vec<String>) -> Result<Self, Error> {
        let (mut anchors, mut certificates) = (Vec::new(), Vec::new());
        for (n, der) in ders.into_iter().enumerate() {
            match webpki::anchor_from_trusted_cert(&der) {
                Ok(anchor) => {
                    anchors.push(anchor.to_owned());
                    certificates.push(der);
                }
                Err(error) => warnings.push(format!("trust anchor {} skipped: {error}", n + 1)),
            }
        }
        if anchors.is_empty() {
            return Err(Invalid::NoCertificate.into());
        }
        Ok(Self(Arc::new(Roots { anchors, certificates })))
    }

    /// These roots and those of a bundle in DER, such as a SPIRE agent's; what can't be used is skipped.
    pub fn extended(&self, bundle: &[Vec<u8>]) -> Self {
        let more = bundle.iter().filter(|der| !self.contains(der)).take(MAX_ANCHORS);
        let ders = self.0.certificates.iter().cloned().chain(more.map(|der| CertificateDer::from(der.clone())));
        Self::from_der(ders.collect(), &mut Vec::new()).unwrap_or_else(|_| self.clone())
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.0.anchors.len()
    }

    pub(crate) fn anchors(&self) -> &[TrustAnchor<'static>] {
        &self.0.anchors
    }

    /// Whether this very certificate is one of the anchors.
    pub(crate) fn contains(&self, der: &[u8]) -> bool {
        self.0.certificates.iter().any(|c| c.as_ref() == der)
    }
}

/// Two sets are the same when they hold the same certificates in the same order.
impl PartialEq for TrustAnchors {
    fn eq(&self, other: &Self) -> bool {
        self.0.certificates == other.0.certificates
    }
}

impl Eq for TrustAnchors {}

impl fmt::Debug for TrustAnchors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TrustAnchors({})", self.count())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ca::tests::Folder;

    #[test]
    fn unusable_blocks_are_skipped_with_a_warning() {
        let good = Folder::new("roots").ca_pem();
        let junk = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
        let (roots, warnings) = TrustAnchors::from_pem(&format!("{junk}text\n{good}{good}")).unwrap();
        assert_eq!(roots.count(), 2);
        assert_eq!(warnings.len(), 1, "{warnings:?}");
        let other = Folder::new("roots-other").ca_pem();
        let (other, _) = TrustAnchors::from_pem(&other).unwrap();
        let bundle: Vec<Vec<u8>> = other.0.certificates.iter().map(|c| c.to_vec()).chain([b"junk".to_vec()]).collect();
        assert_eq!(roots.extended(&bundle).count(), 3);
        assert_eq!(roots.extended(&[]), roots);
        for bad in ["", "nothing", junk] {
            assert!(TrustAnchors::from_pem(bad).is_err(), "{bad}");
        }
    }
}
