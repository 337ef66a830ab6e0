//! Certificates from the identity controller (behaviour.md B.3).
//!
//! One call per attempt, over a client of its own: whatever went wrong with the last attempt's connections is left
//! behind. When to try again is the caller's business.

use super::{
    ControlService, Observer,
    client::{self, Client, Options, dns, tls::Secure},
    stream,
};
use crate::{
    config,
    identity::{Certified, Certify, documents::token},
};
use futures_util::future::BoxFuture;
use linkerd_tls::ServerName;
use linkerd2_proxy_api::identity::{CertifyRequest, identity_client::IdentityClient};
use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};
use tokio::time;

/// How long one attempt may take, connecting included. The next attempt follows 10 s after a failure.
const ATTEMPT_LIMIT: Duration = Duration::from_secs(10);

/// Client of the identity controller.
pub struct Certifier {
    name: ServerName,
    token_file: PathBuf,
    addr: config::ControlAddr,
    connect: config::Connect,
    secure: Arc<dyn Secure>,
    dns: Arc<dyn dns::Lookup>,
    observer: Arc<dyn Observer>,
}

impl Certifier {
    /// `name` is what is to be certified; `connect` are the settings of connections to the controller's address; `secure`
    /// verifies the controller, and works before there is a certificate of our own.
    pub fn new(
        name: ServerName,
        token_file: PathBuf,
        addr: config::ControlAddr,
        connect: config::Connect,
        dns: config::Dns,
        secure: Arc<dyn Secure>,
        observer: Arc<dyn Observer>,
    ) -> Self {
        Self { name, token_file, addr, connect, secure, dns: Arc::new(dns::System::new(dns)), observer }
    }

    async fn attempt(&self, csr: &[u8]) -> Result<Certified, String> {
        let token = read_token(&self.token_file).await?;
        let client = Client::new(Options {
            service: ControlService::Identity,
            addr: self.addr.clone(),
            connect: self.connect.clone(),
            secure: self.secure.clone(),
            needs_identity: false,
            dns: self.dns.clone(),
            observer: self.observer.clone(),
        });
        let mut grpc = IdentityClient::with_origin(client.clone(), client::origin(&self.addr));
        let request =
            CertifyRequest { identity: self.name.to_string(), token, certificate_signing_request: csr.to_vec() };
        let response = match time::timeout(ATTEMPT_LIMIT, grpc.certify(request)).await {
            Ok(Ok(response)) => response.into_inner(),
            Ok(Err(status)) => return Err(format!("identity controller: {}", stream::describe(&status))),
            Err(_) => {
                let trouble = client.trouble().map(|trouble| format!(": {trouble}")).unwrap_or_default();
                return Err(format!("identity controller did not answer within {ATTEMPT_LIMIT:?}{trouble}"));
            }
        };
        let until = response.valid_until.ok_or("identity controller's answer has no expiry")?;
        let expiry =
            SystemTime::try_from(until).map_err(|_| format!("identity controller's expiry is absurd: {until:?}"))?;
        if response.leaf_certificate.is_empty() {
            return Err("identity controller's answer has no certificate".to_string());
        }
        Ok(Certified { leaf: response.leaf_certificate, intermediates: response.intermediate_certificates, expiry })
    }
}

impl Certify for Certifier {
    fn certify<'a>(&'a self, csr_der: &'a [u8]) -> BoxFuture<'a, Result<Certified, String>> {
        Box::pin(self.attempt(csr_der))
    }
}

/// As [`token`], on a thread that may block.
async fn read_token(path: &Path) -> Result<Vec<u8>, String> {
    let path = path.to_owned();
    let read = tokio::task::spawn_blocking(move || token(&path).map_err(|error| error.to_string()));
    read.await.unwrap_or_else(|error| Err(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::{
        super::client::tests::{NoTls, connect_config},
        *,
    };

    fn certifier(token_file: &Path, port: u16) -> Certifier {
        Certifier::new(
            "web.shop".parse().unwrap(),
            token_file.into(),
            config::ControlAddr { host: "localhost.".into(), port, identity: None },
            connect_config(),
            config::Dns::default(),
            Arc::new(NoTls),
            Arc::new(()),
        )
    }

    fn file(name: &str, content: &[u8]) -> PathBuf {
        let path = std::env::temp_dir().join(format!("certify-{}-{name}", std::process::id()));
        std::fs::write(&path, content).unwrap();
        path
    }

    #[tokio::test]
    async fn a_missing_token_is_named() {
        let missing = certifier(Path::new("/does/not/exist"), 1).certify(b"csr").await.unwrap_err();
        assert!(missing.starts_with("token /does/not/exist can't be read"), "{missing}");
    }

    #[tokio::test(start_paused = true)]
    async fn an_unreachable_controller_is_given_up_with_the_reason() {
        let port = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().port();
        let token = file("token", b"t");
        let error = certifier(&token, port).certify(b"csr").await.unwrap_err();
        assert!(error.contains("within 10s") && error.contains("refused"), "{error}");
        std::fs::remove_file(token).unwrap();
    }
}
