//! Requests for certificates (PKCS#10), as the identity controller and our own issuer check them (contract.md 4):
//! version 0, subject CN = identity, one subject alternative name = identity, an ECDSA P-256 key.

use crate::{Id, Key, error::Invalid, key::Signer};
use rcgen::{CertificateParams, DistinguishedName, DnType, SanType};
use x509_parser::{certification_request::X509CertificationRequest, extensions::ParsedExtension, prelude::FromDer};

/// Makes a new ECDSA P-256 key, the kind that every peer verifies.
///
/// # Errors
/// When the system has no randomness to give.
pub fn generate_key() -> Result<Key, Invalid> {
    let pair = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).map_err(|e| Invalid::Key(e.to_string()))?;
    let signer = Signer(pair);
    Ok(Key::from_pkcs8(signer.0.serialize_der()))
}

/// A request for a certificate in DER, signed by the key that it is for.
///
/// # Errors
/// When the key can't sign or the identity can't be put in a certificate.
pub fn csr_der(key: &Key, id: &Id) -> Result<Vec<u8>, Invalid> {
    let request = params(id)?.serialize_request(&key.signer()?).map_err(|e| Invalid::Request(e.to_string()))?;
    Ok(request.der().to_vec())
}

/// Checks a request that someone else made: it is for this key and for this identity alone.
///
/// # Errors
/// When request or key are malformed, do not belong together, or the request is for other names.
pub fn check(csr_der: &[u8], key: &Key, id: &Id) -> Result<(), Invalid> {
    let (_, request) = X509CertificationRequest::from_der(csr_der).map_err(|e| Invalid::Request(e.to_string()))?;
    let subject = request.certification_request_info.subject_pki.raw;
    if subject != rcgen::PublicKeyData::subject_public_key_info(&key.signer()?) {
        return Err(Invalid::KeyMismatch);
    }
    let names = request.requested_extensions().into_iter().flatten().find_map(|extension| match extension {
        ParsedExtension::SubjectAlternativeName(names) => Some(crate::verify::names(&names.general_names)),
        _ => None,
    });
    let found = names.unwrap_or_default();
    if found.as_slice() == std::slice::from_ref(id) {
        Ok(())
    } else {
        Err(Invalid::Id { expected: id.clone(), found: found.into() })
    }
}

/// What request and leaf have in common: the name, as CN and as the only subject alternative name. URIs are too long
/// for a CN (64 bytes, RFC 5280 appendix A.1), so those stand in the alternative name alone.
pub(crate) fn params(id: &Id) -> Result<CertificateParams, Invalid> {
    let name = id.as_str().try_into().map_err(|_| Invalid::Request(format!("identity {id} is not ASCII")))?;
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    if id.is_uri() {
        params.subject_alt_names = vec![SanType::URI(name)];
    } else {
        params.distinguished_name.push(DnType::CommonName, id.as_str());
        params.subject_alt_names = vec![SanType::DnsName(name)];
    }
    Ok(params)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_hold_what_the_controller_checks() {
        let id: Id = "web_1.shop.serviceaccount.identity.linkerd.cluster.local".parse().unwrap();
        let der = csr_der(&generate_key().unwrap(), &id).unwrap();
        let (rest, csr) = X509CertificationRequest::from_der(&der).unwrap();
        assert!(rest.is_empty());
        csr.verify_signature().unwrap();
        assert_eq!(csr.certification_request_info.version.0, 0);
        assert_eq!(csr.certification_request_info.subject.to_string(), format!("CN={id}"));
        let extensions: Vec<_> = csr.requested_extensions().unwrap().collect();
        match &extensions[..] {
            [ParsedExtension::SubjectAlternativeName(san)] => {
                assert_eq!(format!("{:?}", san.general_names), format!("[DNSName({:?})]", id.as_str()));
            }
            other => panic!("{other:?}"),
        }
    }
}
