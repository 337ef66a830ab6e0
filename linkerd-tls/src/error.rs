//! What can be wrong with keys, certificates and handshakes. Each text names the thing, the value and the remedy.

use crate::Id;
use std::{io, path::PathBuf, sync::Arc, time::Duration};

/// A failure of this crate.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A handshake was wanted before the first certificate.
    #[error("no certificate has been issued to this proxy yet, so it cannot accept TLS")]
    NoCertificate,
    /// The peer did not finish its side in time.
    #[error("TLS handshake not finished within {0:?}")]
    HandshakeTimeout(Duration),
    /// The peer's certificate is not acceptable to us.
    #[error("the peer's certificate was refused: {0}")]
    Peer(#[source] Invalid),
    /// Another failure of the handshake: the peer's alert, a broken connection, or no common parameters.
    #[error("TLS handshake failed: {0}")]
    Handshake(#[source] io::Error),
    /// The server did not take the ticket that was shown; nothing is wrong, and a new connection gets on without one.
    #[error("the server did not resume the session; a new connection is needed")]
    NotResumed,
    /// A certificate, key or set of trust anchors of our own is unusable.
    #[error(transparent)]
    Invalid(#[from] Invalid),
    /// A file could not be read or written.
    #[error("{path}: {source}; {remedy}", path = path.display())]
    File {
        /// Which file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
        /// What to do.
        remedy: &'static str,
    },
    /// A file's contents are unusable.
    #[error("{path}: {source}", path = path.display())]
    Contents {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: Invalid,
    },
}

impl Error {
    /// The `errno` where the system gave one, for metrics and logs of closed connections.
    pub fn errno(&self) -> Option<i32> {
        match self {
            Self::Handshake(source) | Self::File { source, .. } => source.raw_os_error(),
            _ => None,
        }
    }

    /// Sorts what the TLS library reports during a handshake: refusals of the peer's certificate keep their reason.
    pub(crate) fn handshake(error: io::Error) -> Self {
        use rustls::{CertificateError, Error as Tls};
        if let Some(Tls::InvalidCertificate(reason)) = error.get_ref().and_then(|e| e.downcast_ref::<Tls>()) {
            return Self::Peer(match reason {
                CertificateError::Other(other) => match other.0.downcast_ref::<Invalid>() {
                    Some(invalid) => invalid.clone(),
                    None => Invalid::Chain(other.0.to_string()),
                },
                CertificateError::ExpiredContext { time, not_after } => {
                    Invalid::Expired(Duration::from_secs(time.as_secs().saturating_sub(not_after.as_secs())))
                }
                CertificateError::NotValidYetContext { time, not_before } => {
                    Invalid::NotYetValid(Duration::from_secs(not_before.as_secs().saturating_sub(time.as_secs())))
                }
                CertificateError::UnknownIssuer | CertificateError::BadSignature => Invalid::Untrusted,
                CertificateError::NotValidForNameContext { expected, presented } => {
                    Invalid::OtherName { expected: expected.to_str().into_owned(), found: presented.join(", ") }
                }
                reason => Invalid::Chain(format!("{reason:?}")),
            });
        }
        Self::Handshake(error)
    }
}

/// Why a certificate, key or set of trust anchors is no good.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Invalid {
    /// No certificate where one was expected.
    #[error("no usable certificate found; expected PEM with at least one CERTIFICATE block")]
    NoCertificate,
    /// No key where one was expected.
    #[error("no private key found; expected PEM with a PRIVATE KEY or EC PRIVATE KEY block, not encrypted")]
    NoKey,
    /// A key that can't be used.
    #[error("unusable private key: {0}")]
    Key(String),
    /// RSA keys can't sign TLS 1.3 handshakes that peers of the mesh verify.
    #[error("RSA workload keys cannot be used: peers verify no RSA-PSS signatures; issue an ECDSA P-256 key instead")]
    RsaKey,
    /// Key and certificate are not of one pair.
    #[error("the private key does not belong to the certificate")]
    KeyMismatch,
    /// Not a certificate.
    #[error("malformed certificate: {0}")]
    Malformed(String),
    /// The certificate's time is over.
    #[error("certificate expired {0:?} ago by this machine's clock; check the clock, or have it issued anew")]
    Expired(Duration),
    /// The certificate's time has not come.
    #[error(
        "certificate is not valid for another {0:?} by this machine's clock; this clock is behind the issuer's, or the \
         issuer's is ahead"
    )]
    NotYetValid(Duration),
    /// No chain leads to the trust anchors.
    #[error("certificate does not chain to the trust anchors; check that issuer and trust anchors belong together")]
    Untrusted,
    /// Another defect of the chain.
    #[error("invalid certificate chain: {0}")]
    Chain(String),
    /// The expected identity is not among the certificate's names.
    #[error("certificate is for [{}], not for {expected}", list(found))]
    Id {
        /// Who it should be for.
        expected: Id,
        /// Names that it holds.
        found: Arc<[Id]>,
    },
    /// The expected host is not among the certificate's names.
    #[error("certificate is for [{found}], not for {expected}")]
    OtherName {
        /// Who it should be for.
        expected: String,
        /// Names that it holds.
        found: String,
    },
    /// Something that should name a host does not.
    #[error("{0:?} is neither a DNS name nor an IP address")]
    HostName(String),
    /// Roots for servers outside the mesh can't be had.
    #[error("no roots to verify the server with: {0}")]
    Roots(String),
    /// A request for a certificate can't be granted.
    #[error("invalid certificate signing request: {0}")]
    Request(String),
    /// A certificate that may not issue others, or cannot for a reason given.
    #[error("not usable as an issuer: {0}")]
    Issuer(String),
}

fn list(ids: &[Id]) -> String {
    ids.iter().map(Id::as_str).collect::<Vec<_>>().join(", ")
}
