//! A certificate with its chain and key, as issuers hand it over.

use crate::{Key, error::Invalid, verify};
use rustls::pki_types::{CertificateDer, pem::PemObject};
use std::time::{Duration, SystemTime};
use x509_parser::prelude::{FromDer, X509Certificate};

/// Most certificates of a chain that are read; longer chains exceed what verifiers follow (6 intermediates) anyway.
const MAX_CHAIN: usize = 16;

/// A leaf certificate, what vouches for it, and its key.
#[derive(Clone, Debug)]
pub struct Certificate {
    /// DER.
    pub leaf: Vec<u8>,
    /// DER, in sending order, without the trust anchor.
    pub intermediates: Vec<Vec<u8>>,
    /// The leaf's private key.
    pub key_pkcs8: Key,
    /// When it ceases to be valid.
    pub expiry: SystemTime,
}

impl Certificate {
    /// A chain in DER, leaf first, whose expiry is the leaf's own.
    ///
    /// # Errors
    /// When the chain is empty or the leaf is no certificate.
    pub fn from_der(chain: Vec<Vec<u8>>, key: Key) -> Result<Self, Invalid> {
        let mut chain = chain.into_iter();
        let leaf = chain.next().ok_or(Invalid::NoCertificate)?;
        let (_, expiry) = validity(&leaf)?;
        Ok(Self { leaf, intermediates: chain.take(MAX_CHAIN).collect(), key_pkcs8: key, expiry })
    }

    /// A chain in PEM, leaf first, and a key in PEM.
    ///
    /// # Errors
    /// When there is no certificate, a block is malformed, or there is no key.
    pub fn from_pem(chain: &str, key: &str) -> Result<Self, Invalid> {
        Self::from_der(chain_from_pem(chain)?, Key::from_pem(key)?)
    }

    /// From when to when the leaf is valid.
    ///
    /// # Errors
    /// When the leaf is no certificate.
    pub fn validity(&self) -> Result<(SystemTime, SystemTime), Invalid> {
        validity(&self.leaf)
    }

    /// Whether the leaf is no leaf but an authority (basicConstraints CA).
    ///
    /// # Errors
    /// When it is no certificate.
    pub fn is_authority(&self) -> Result<bool, Invalid> {
        let (_, certificate) = X509Certificate::from_der(&self.leaf).map_err(|e| Invalid::Malformed(e.to_string()))?;
        Ok(certificate.is_ca())
    }

    /// Names in the leaf that can be identities, in order.
    ///
    /// # Errors
    /// When the leaf is no certificate.
    pub fn ids(&self) -> Result<Vec<crate::Id>, Invalid> {
        verify::ids(&self.leaf)
    }
}

/// Every certificate of a PEM text, in order, as DER.
///
/// # Errors
/// When there is none, or one is malformed.
pub fn chain_from_pem(pem: &str) -> Result<Vec<Vec<u8>>, Invalid> {
    let chain = CertificateDer::pem_slice_iter(pem.as_bytes())
        .take(MAX_CHAIN)
        .map(|block| block.map(|der| der.to_vec()).map_err(|e| Invalid::Malformed(format!("{e:?}"))))
        .collect::<Result<Vec<_>, _>>()?;
    if chain.is_empty() { Err(Invalid::NoCertificate) } else { Ok(chain) }
}

/// `notBefore` and `notAfter` of a certificate.
pub(crate) fn validity(der: &[u8]) -> Result<(SystemTime, SystemTime), Invalid> {
    let (_, certificate) = X509Certificate::from_der(der).map_err(|e| Invalid::Malformed(e.to_string()))?;
    let validity = certificate.validity();
    Ok((time(validity.not_before.timestamp()), time(validity.not_after.timestamp())))
}

/// Seconds since the epoch; times before it are taken for the epoch itself, and those beyond the clock's range for
/// the last that fits.
fn time(seconds: i64) -> SystemTime {
    let since = Duration::from_secs(u64::try_from(seconds).unwrap_or(0));
    SystemTime::UNIX_EPOCH.checked_add(since).unwrap_or(SystemTime::UNIX_EPOCH)
}
