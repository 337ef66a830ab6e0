//! Private keys: wiped when dropped, never printed.
//!
//! The copies that the TLS library makes for signing are its own to wipe; this type keeps ours short-lived.

use crate::error::Invalid;
use rustls::pki_types::{PrivateKeyDer, pem::PemObject};
use std::fmt;
use zeroize::{Zeroize, Zeroizing};

/// A private key, DER. Cloning copies the secret; both copies are wiped on drop.
#[derive(Clone)]
pub struct Key {
    der: Zeroizing<Vec<u8>>,
    form: Form,
}

/// How the DER is to be read.
#[derive(Copy, Clone, PartialEq, Eq)]
enum Form {
    Pkcs1,
    Sec1,
    Pkcs8,
}

impl Key {
    /// A key in PKCS#8 DER. Nothing is checked until it is used.
    pub fn from_pkcs8(der: Vec<u8>) -> Self {
        Self { der: Zeroizing::new(der), form: Form::Pkcs8 }
    }

    /// The first unencrypted private key of a PEM text: PKCS#8, or SEC1 as `step` and `openssl ecparam` write it.
    ///
    /// # Errors
    /// When there is none.
    pub fn from_pem(pem: &str) -> Result<Self, Invalid> {
        let key = PrivateKeyDer::from_pem_slice(pem.as_bytes()).map_err(|_| Invalid::NoKey)?;
        let form = match &key {
            PrivateKeyDer::Pkcs1(_) => Form::Pkcs1,
            PrivateKeyDer::Sec1(_) => Form::Sec1,
            PrivateKeyDer::Pkcs8(_) => Form::Pkcs8,
            _ => return Err(Invalid::NoKey),
        };
        let key = Zeroizing::new(key);
        Ok(Self { der: Zeroizing::new(key.secret_der().to_vec()), form })
    }

    /// The DER, for the one place that has to hand it on or store it.
    pub fn secret_der(&self) -> &[u8] {
        &self.der
    }

    /// A copy for the TLS library, which wipes it itself.
    pub(crate) fn to_rustls(&self) -> PrivateKeyDer<'static> {
        let der = self.der.to_vec();
        match self.form {
            Form::Pkcs1 => PrivateKeyDer::Pkcs1(der.into()),
            Form::Sec1 => PrivateKeyDer::Sec1(der.into()),
            Form::Pkcs8 => PrivateKeyDer::Pkcs8(der.into()),
        }
    }

    /// A signer of requests and certificates.
    pub(crate) fn signer(&self) -> Result<Signer, Invalid> {
        let der = Zeroizing::new(self.to_rustls());
        rcgen::KeyPair::try_from(&*der).map(Signer).map_err(|e| Invalid::Key(e.to_string()))
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Key(secret)")
    }
}

/// A key pair that is wiped on drop.
pub(crate) struct Signer(pub(crate) rcgen::KeyPair);

impl Drop for Signer {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

impl rcgen::PublicKeyData for Signer {
    fn der_bytes(&self) -> &[u8] {
        rcgen::PublicKeyData::der_bytes(&self.0)
    }

    fn algorithm(&self) -> &'static rcgen::SignatureAlgorithm {
        rcgen::PublicKeyData::algorithm(&self.0)
    }
}

impl rcgen::SigningKey for Signer {
    fn sign(&self, msg: &[u8]) -> Result<Vec<u8>, rcgen::Error> {
        self.0.sign(msg)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_never_printed() {
        let key = crate::csr::generate_key().unwrap();
        assert_eq!(format!("{key:?}"), "Key(secret)");
    }

    #[test]
    fn pkcs8_pem_is_read_and_other_text_is_refused() {
        let signer = crate::csr::generate_key().unwrap().signer().unwrap();
        let pem = signer.0.serialize_pem();
        assert_eq!(Key::from_pem(&pem).unwrap().secret_der(), signer.0.serialized_der());
        assert_eq!(Key::from_pem("no key").unwrap_err(), Invalid::NoKey);
        assert!(matches!(Key::from_pkcs8(vec![1, 2, 3]).signer(), Err(Invalid::Key(_))));
    }

    /// What `step` and `openssl ecparam` write; made for this test alone.
    #[test]
    fn sec1_pem_is_read_and_signs() {
        let pem = "-----BEGIN EC PRIVATE KEY-----\n\
             MHcCAQEEILmCrngUJGcGf7dY/Vwj4kFdH5nzr9HnceJJ57VKznHSoAoGCCqGSM49\n\
             AwEHoUQDQgAETQlZnrTZFPvGcSiTXBhEcLevZMKo0QAjh/KuusIzYb3irex56oZg\n\
             +yYVreXRmpDfm6NkUy/70ly24xNmVXF8mQ==\n\
             -----END EC PRIVATE KEY-----\n";
        let key = Key::from_pem(pem).unwrap();
        let id = "web.example".parse().unwrap();
        let csr = crate::csr::csr_der(&key, &id).unwrap();
        crate::csr::check(&csr, &key, &id).unwrap();
        rustls::crypto::aws_lc_rs::sign::any_supported_type(&key.to_rustls()).unwrap();
    }
}
