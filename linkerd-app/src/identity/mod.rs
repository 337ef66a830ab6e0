//! Where this process's certificate comes from, and how it is kept fresh.
//!
//! [`prepare`] does what must succeed before anything starts: trust anchors, keys and files are read and checked. What
//! it returns is a [`Task`] for the issuer that was configured, to be run for the life of the process. A certificate that
//! works stays in force through every failure to get a better one.

pub mod certify;
pub mod documents;
pub mod folder;
mod schedule;

pub use linkerd_tls::ca::{Init, init};

pub use self::{
    certify::{Certified, Certify, Certifying},
    folder::Folder,
};
use crate::config;
use linkerd_tls::{
    Certificate, Error as TlsError, TrustAnchors,
    identity::{self, Reader, Writer},
};
use std::time::{Duration, SystemTime};

/// How often a wait for the first certificate is spoken of (contract.md 3.1).
const STILL_WAITING: Duration = Duration::from_secs(15);

/// Told about each attempt at a certificate.
pub trait Observer: Send + Sync + 'static {
    /// An attempt succeeded, with the new certificate's expiry, or failed for the reason given in words.
    fn refreshed(&self, result: Result<SystemTime, &str>);
}

/// Counts nothing.
impl Observer for () {
    fn refreshed(&self, _: Result<SystemTime, &str>) {}
}

impl<O: Observer> Observer for std::sync::Arc<O> {
    fn refreshed(&self, result: Result<SystemTime, &str>) {
        (**self).refreshed(result);
    }
}

/// Why identity can't even be prepared.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The configured PEM text holds no anchor.
    #[error("LINKERD2_PROXY_IDENTITY_TRUST_ANCHORS: {0}")]
    TrustAnchors(#[source] TlsError),
    /// A key or request found in the identity folder is unusable.
    #[error(transparent)]
    Documents(#[from] documents::Error),
    /// There is no token to ask for a certificate with.
    #[error(transparent)]
    Token(#[from] documents::TokenError),
    /// The folder that stands for an issuer is unusable.
    #[error(transparent)]
    Folder(#[from] folder::Error),
}

/// What keeps the certificate fresh; one arm per kind of issuer.
pub enum Task {
    /// To be run with a client of the identity controller.
    Certify(Certifying),
    /// To be run as it is.
    Folder(Folder),
    /// To be handed to whoever receives certificates unasked (the SPIRE agent's stream).
    Pushed(Installer),
}

/// Reads and checks everything that identity needs at the start. Blocks on small files.
///
/// # Errors
/// When trust anchors, keys or files are missing or unusable; the text names them.
pub fn prepare(config: &config::Identity) -> Result<(Reader, Task), Error> {
    let channel = |roots| identity::channel(config.id.clone(), config.server_name.clone(), roots);
    match &config.issuer {
        config::Issuer::Certify { trust_anchors, dir, token_file, .. } => {
            documents::token(token_file)?;
            let documents = documents::Documents::load(dir, &config.id)?;
            let (writer, reader) = channel(anchors(trust_anchors)?);
            let clamp = (config.min_refresh, config.max_refresh);
            Ok((reader, Task::Certify(Certifying::new(Installer::new(writer), documents, clamp))))
        }
        config::Issuer::Spire { trust_anchors, .. } => {
            let (writer, reader) = channel(anchors(trust_anchors)?);
            Ok((reader, Task::Pushed(Installer::new(writer))))
        }
        config::Issuer::Folder(dir) => {
            let loaded = folder::Loaded::read(dir, &config.id)?;
            let (writer, reader) = channel(loaded.roots().clone());
            let clamp = (config.min_refresh, config.max_refresh);
            Ok((reader, Task::Folder(Folder::new(Installer::new(writer), dir.clone(), loaded, clamp)?)))
        }
    }
}

/// Ends with the first certificate; until then says now and then that it is waited for.
pub async fn first_certificate(reader: &Reader) {
    while tokio::time::timeout(STILL_WAITING, reader.ready()).await.is_err() {
        tracing::warn!(id = %reader.id(), "Waiting for identity to be initialized: no certificate has been issued yet");
    }
}

/// Installs certificates and reports what came of it.
#[derive(Debug)]
pub struct Installer {
    writer: Writer,
}

impl Installer {
    fn new(writer: Writer) -> Self {
        Self { writer }
    }

    /// Own identity.
    pub fn id(&self) -> &linkerd_tls::Id {
        self.writer.id()
    }

    /// The roots in force.
    pub fn trust_anchors(&self) -> TrustAnchors {
        self.writer.trust_anchors()
    }

    /// Installs a certificate, with other trust anchors if some are given. Logs and counts the outcome.
    ///
    /// # Errors
    /// When the certificate is not acceptable; what was in force stays so.
    pub fn install(
        &mut self,
        roots: Option<TrustAnchors>,
        certificate: Certificate,
        observer: &impl Observer,
    ) -> Result<(), TlsError> {
        let roots = roots.unwrap_or_else(|| self.writer.trust_anchors());
        let expiry = certificate.expiry;
        match self.writer.set(roots, certificate) {
            Ok(()) => {
                tracing::info!(id = %self.writer.id(), "Certified identity");
                observer.refreshed(Ok(expiry));
                Ok(())
            }
            Err(error) => {
                observer.refreshed(Err(&error.to_string()));
                Err(error)
            }
        }
    }
}

fn anchors(pem: &str) -> Result<TrustAnchors, Error> {
    let (roots, warnings) = TrustAnchors::from_pem(pem).map_err(Error::TrustAnchors)?;
    for warning in warnings {
        tracing::warn!("LINKERD2_PROXY_IDENTITY_TRUST_ANCHORS: {warning}");
    }
    Ok(roots)
}
