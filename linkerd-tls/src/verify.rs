//! Verification of peers and of ourselves: a chain to the trust anchors, valid now, for the purpose, and names.
//!
//! Host names play no part: an identity is looked for among the leaf's DNS and URI alternative names (behaviour.md
//! B.2). Identities need not be names that a browser would take, so names are read here and not by the chain's verifier.

use crate::{Id, TrustAnchors, error::Invalid};
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, OtherError, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::{WebPkiSupportedAlgorithms, verify_tls13_signature},
    pki_types::{CertificateDer, ServerName, SignatureVerificationAlgorithm, UnixTime},
    server::danger::{ClientCertVerified, ClientCertVerifier},
};
use std::{sync::Arc, time::Duration};
use webpki::{EndEntityCert, KeyUsage, aws_lc_rs as alg};
use x509_parser::prelude::{ASN1Time, FromDer, GeneralName, X509Certificate};

/// Signatures that are verified in chains and handshakes, in the order in which they are offered (behaviour.md B.1).
/// There is no RSA-PSS among them: RSA authorities work, RSA workload keys do not.
pub(crate) static ALGORITHMS: WebPkiSupportedAlgorithms = WebPkiSupportedAlgorithms {
    all: &[
        alg::ECDSA_P256_SHA256,
        alg::ECDSA_P256_SHA384,
        alg::ECDSA_P256_SHA512,
        alg::ECDSA_P384_SHA256,
        alg::ECDSA_P384_SHA384,
        alg::ECDSA_P384_SHA512,
        alg::ECDSA_P521_SHA256,
        alg::ECDSA_P521_SHA384,
        alg::ECDSA_P521_SHA512,
        alg::ED25519,
        alg::RSA_PKCS1_2048_8192_SHA256,
        alg::RSA_PKCS1_2048_8192_SHA384,
        alg::RSA_PKCS1_2048_8192_SHA512,
    ],
    mapping: &[
        (SignatureScheme::ECDSA_NISTP384_SHA384, &[alg::ECDSA_P384_SHA384]),
        (SignatureScheme::ECDSA_NISTP256_SHA256, &[alg::ECDSA_P256_SHA256]),
        (SignatureScheme::ECDSA_NISTP521_SHA512, &[alg::ECDSA_P521_SHA512]),
        (SignatureScheme::ED25519, &[alg::ED25519]),
        (SignatureScheme::RSA_PKCS1_SHA512, &[alg::RSA_PKCS1_2048_8192_SHA512]),
        (SignatureScheme::RSA_PKCS1_SHA384, &[alg::RSA_PKCS1_2048_8192_SHA384]),
        (SignatureScheme::RSA_PKCS1_SHA256, &[alg::RSA_PKCS1_2048_8192_SHA256]),
    ],
};

/// Verifies a server: its chain, then that it holds the identity we demand.
#[derive(Debug)]
pub(crate) struct ServerVerifier {
    pub(crate) roots: TrustAnchors,
    pub(crate) id: Id,
}

/// Verifies a client's chain; a client without a certificate is let in without an identity.
#[derive(Debug)]
pub(crate) struct ClientVerifier {
    pub(crate) roots: TrustAnchors,
}

impl ServerCertVerifier for ServerVerifier {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        chain(&self.roots, leaf, intermediates, now, KeyUsage::server_auth()).map_err(refusal)?;
        holds(leaf, &self.id)
            .map_err(|invalid| rustls::Error::from(CertificateError::Other(OtherError(Arc::new(invalid)))))?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("TLS 1.2 is not spoken".into()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, leaf, signature, &ALGORITHMS)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        ALGORITHMS.supported_schemes()
    }
}

impl ClientCertVerifier for ClientVerifier {
    fn client_auth_mandatory(&self) -> bool {
        false
    }

    /// Empty: every peer has one certificate, so a list of acceptable issuers would only lengthen the handshake.
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        chain(&self.roots, leaf, intermediates, now, KeyUsage::client_auth()).map_err(refusal)?;
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("TLS 1.2 is not spoken".into()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, leaf, signature, &ALGORITHMS)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        ALGORITHMS.supported_schemes()
    }
}

/// Verifies our own certificate as peers will, in both roles, and that it is ours.
pub(crate) fn own(
    roots: &TrustAnchors,
    leaf: &CertificateDer<'_>,
    intermediates: &[CertificateDer<'_>],
    id: &Id,
) -> Result<(), Invalid> {
    for usage in [KeyUsage::server_auth(), KeyUsage::client_auth()] {
        chain(roots, leaf, intermediates, UnixTime::now(), usage).map_err(invalid)?;
    }
    holds(leaf, id)
}

/// Which end a certificate is shown by.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    Client,
    Server,
}

/// Whether a chain that was verified against these very roots holds still: time is all that can have changed.
pub(crate) fn still(
    roots: &TrustAnchors,
    certificates: &[CertificateDer<'_>],
    now: UnixTime,
    role: Role,
) -> Result<(), Invalid> {
    let Some((leaf, intermediates)) = certificates.split_first() else { return Ok(()) };
    let is_valid = |der: &CertificateDer<'_>| {
        let (_, certificate) = X509Certificate::from_der(der).ok()?;
        let at = ASN1Time::from_timestamp(i64::try_from(now.as_secs()).ok()?).ok()?;
        Some(certificate.validity().is_valid_at(at))
    };
    if certificates.iter().all(|der| is_valid(der) == Some(true)) {
        return Ok(());
    }
    // One of them is past its time; it may be one that no chain needs.
    let usage = match role {
        Role::Client => KeyUsage::client_auth(),
        Role::Server => KeyUsage::server_auth(),
    };
    chain(roots, leaf, intermediates, now, usage).map_err(invalid)
}

fn chain(
    roots: &TrustAnchors,
    leaf: &CertificateDer<'_>,
    intermediates: &[CertificateDer<'_>],
    now: UnixTime,
    usage: KeyUsage,
) -> Result<(), webpki::Error> {
    let algorithms: &[&dyn SignatureVerificationAlgorithm] = ALGORITHMS.all;
    EndEntityCert::try_from(leaf)?.verify_for_usage(
        algorithms,
        roots.anchors(),
        intermediates,
        now,
        usage,
        None,
        None,
    )?;
    Ok(())
}

fn holds(leaf: &[u8], expected: &Id) -> Result<(), Invalid> {
    let found = ids(leaf)?;
    if found.contains(expected) { Ok(()) } else { Err(Invalid::Id { expected: expected.clone(), found: found.into() }) }
}

/// The DNS and URI alternative names of a certificate that are identities, in order. Kinds are not mixed up: a URI name
/// that looks like a DNS name is no identity, nor the other way round.
pub(crate) fn ids(leaf: &[u8]) -> Result<Vec<Id>, Invalid> {
    let malformed = |e: &dyn std::fmt::Display| Invalid::Malformed(e.to_string());
    let (_, certificate) = X509Certificate::from_der(leaf).map_err(|e| malformed(&e))?;
    let Some(names) = certificate.subject_alternative_name().map_err(|e| malformed(&e))? else {
        return Ok(Vec::new());
    };
    Ok(self::names(&names.value.general_names))
}

/// Whether a certificate has this very URI among its alternative names.
pub(crate) fn has_uri(leaf: &[u8], uri: &str) -> bool {
    let Ok((_, certificate)) = X509Certificate::from_der(leaf) else { return false };
    let Ok(Some(names)) = certificate.subject_alternative_name() else { return false };
    names.value.general_names.iter().any(|name| matches!(name, GeneralName::URI(found) if *found == uri))
}

/// Alternative names that are identities.
pub(crate) fn names(names: &[GeneralName<'_>]) -> Vec<Id> {
    let id = |name: &GeneralName<'_>| match name {
        GeneralName::DNSName(name) => name.parse().ok().filter(|id: &Id| !id.is_uri()),
        GeneralName::URI(name) => name.parse().ok().filter(Id::is_uri),
        _ => None,
    };
    names.iter().filter_map(id).collect()
}

/// The reason for a peer, in the form that chooses the right TLS alert.
fn refusal(error: webpki::Error) -> rustls::Error {
    use webpki::Error as E;
    match error {
        E::CertExpired { time, not_after } => CertificateError::ExpiredContext { time, not_after },
        E::CertNotValidYet { time, not_before } => CertificateError::NotValidYetContext { time, not_before },
        E::UnknownIssuer => CertificateError::UnknownIssuer,
        E::BadDer | E::BadDerTime | E::TrailingData(_) => CertificateError::BadEncoding,
        E::InvalidSignatureForPublicKey => CertificateError::BadSignature,
        other => CertificateError::Other(OtherError(Arc::new(invalid(other)))),
    }
    .into()
}

/// The same reason in our own words.
fn invalid(error: webpki::Error) -> Invalid {
    use webpki::Error as E;
    let apart = |a: UnixTime, b: UnixTime| Duration::from_secs(a.as_secs().saturating_sub(b.as_secs()));
    match error {
        E::CertExpired { time, not_after } => Invalid::Expired(apart(time, not_after)),
        E::CertNotValidYet { time, not_before } => Invalid::NotYetValid(apart(not_before, time)),
        // An authority of the right name with another key: made anew, or of another mesh.
        E::UnknownIssuer | E::InvalidSignatureForPublicKey => Invalid::Untrusted,
        E::BadDer | E::BadDerTime | E::TrailingData(_) => Invalid::Malformed(error.to_string()),
        other => Invalid::Chain(other.to_string()),
    }
}
