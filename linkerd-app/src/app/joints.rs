//! Where rooms that do not know each other meet: each of them asks for a small trait, here it is answered.

use crate::{
    control::{self, ControlService, Secure, certify::Certifier, spire},
    identity::{self, Certified, Certify, Installer},
    policy::authz::NoTls,
    telemetry::{Class, DnsClient, DnsMetrics, DnsRecord, HttpMetrics, IdentityMetrics, Telemetry},
};
use futures_util::future::BoxFuture;
use linkerd_stack::BoxedIo;
use linkerd_tls::{
    Certificate, Id, Key,
    identity::{ClientTls, Reader},
};
use std::{
    io,
    sync::Arc,
    time::{Duration, SystemTime},
};
use tokio::net::TcpStream;

/// Mesh TLS for the control-plane clients.
pub(super) struct MeshTls(pub(super) Reader);

impl Secure for MeshTls {
    fn ready(&self) -> BoxFuture<'static, ()> {
        let reader = self.0.clone();
        Box::pin(async move { reader.ready().await })
    }

    fn connect(&self, io: TcpStream, server: &Id) -> BoxFuture<'static, io::Result<BoxedIo>> {
        let (reader, server_id) = (self.0.clone(), server.clone());
        Box::pin(async move {
            let server_name = server_id
                .to_server_name()
                .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, format!("{server_id} is no server name")))?;
            let tls = ClientTls { server_id, server_name, transport_header: false };
            let (_, io) = reader.connect(io, &tls).await.map_err(io::Error::other)?;
            Ok(Box::new(io) as BoxedIo)
        })
    }
}

/// Metrics of the control-plane clients.
pub(super) struct ControlMetrics {
    dns: Arc<DnsMetrics>,
    identity: Option<Arc<HttpMetrics>>,
    destination: Option<Arc<HttpMetrics>>,
    policy: Option<Arc<HttpMetrics>>,
}

impl ControlMetrics {
    /// Resolves the handles of every client that is configured.
    pub(super) fn new(telemetry: &Telemetry, config: &crate::config::Config) -> Self {
        let client = |addr: &crate::config::ControlAddr| {
            let tls = addr.identity.clone().ok_or(NoTls::Loopback);
            telemetry.control_client(&format!("{}:{}", addr.host, addr.port), &tls)
        };
        let identity = match config.identity.as_ref().map(|identity| &identity.issuer) {
            Some(crate::config::Issuer::Certify { client: addr, .. }) => Some(client(addr)),
            _ => None,
        };
        let control = config.control.as_ref();
        Self {
            dns: telemetry.dns(),
            identity,
            destination: control.map(|c| client(&c.destination)),
            policy: control.map(|c| client(&c.policy)),
        }
    }

    fn client(&self, service: ControlService) -> Option<&HttpMetrics> {
        match service {
            ControlService::Identity => self.identity.as_deref(),
            ControlService::Destination => self.destination.as_deref(),
            ControlService::Policy => self.policy.as_deref(),
        }
    }
}

impl control::Observer for ControlMetrics {
    fn dns(&self, service: ControlService, record: control::DnsRecord, ok: bool) {
        let client = match service {
            ControlService::Identity => DnsClient::Identity,
            ControlService::Destination => DnsClient::Destination,
            ControlService::Policy => DnsClient::Policy,
        };
        let record = match record {
            control::DnsRecord::Srv => DnsRecord::Srv,
            control::DnsRecord::Addresses => DnsRecord::Addresses,
        };
        self.dns.resolved(client, record, ok);
    }

    fn request(&self, service: ControlService) {
        if let Some(metrics) = self.client(service) {
            metrics.request();
        }
    }

    fn first_byte(&self, service: ControlService, status: u16, latency: Duration) {
        if let Some(metrics) = self.client(service) {
            metrics.first_byte(status, latency);
        }
    }

    fn response(&self, service: ControlService, status: Option<u16>, grpc_status: Option<u16>) {
        if let Some(metrics) = self.client(service) {
            let class = match status {
                Some(_) => Class::grpc(grpc_status),
                None => Class { success: false, grpc_status: None, error: Some("unclassified") },
            };
            metrics.response(status, class);
        }
    }
}

impl Certify for Certifier {
    fn certify<'a>(&'a self, csr_der: &'a [u8]) -> BoxFuture<'a, Result<Certified, String>> {
        Box::pin(async move {
            let control::certify::Certified { leaf, intermediates, expiry } = self.certify(csr_der).await?;
            Ok(Certified { leaf, intermediates, expiry })
        })
    }
}

impl identity::Observer for IdentityMetrics {
    fn refreshed(&self, result: Result<SystemTime, ()>) {
        match result {
            Ok(expiry) => Self::refreshed(self, expiry),
            Err(()) => self.failed(),
        }
    }
}

/// Installs what a SPIRE agent says, until it refuses this workload for good.
///
/// Peers are verified against the configured anchors and the agent's bundle together: a rotation that reaches the one
/// before the other breaks nothing.
pub(super) async fn spire(mut agent: spire::Agent, mut installer: Installer, observer: Arc<IdentityMetrics>) {
    let anchors = installer.trust_anchors();
    loop {
        match agent.next().await {
            spire::Event::Svid(svid) => {
                let roots = anchors.extended(&svid.bundle);
                let chain = std::iter::once(svid.leaf).chain(svid.intermediates).collect();
                let installed = match Certificate::from_der(chain, Key::from_pkcs8(svid.key_pkcs8)) {
                    Ok(certificate) => {
                        installer.install(Some(roots), certificate, &observer).map_err(|error| error.to_string())
                    }
                    Err(error) => {
                        observer.failed();
                        Err(error.to_string())
                    }
                };
                if let Err(error) = installed {
                    tracing::error!(%error, "The SPIRE agent's SVID is not usable; the last good one stays in force");
                }
            }
            spire::Event::Failed { reason, delay } => {
                observer.failed();
                tracing::warn!(?delay, "{reason}");
            }
            spire::Event::Refused(reason) => {
                observer.failed();
                tracing::error!("{reason}; it will not be asked again");
                return;
            }
        }
    }
}
