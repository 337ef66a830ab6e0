//! The clients' metrics (metrics.md 5.11, 5.13), resolved once.

use super::{ControlService, DnsRecord, Observer};
use crate::{
    config,
    policy::authz::NoTls,
    telemetry::{self, Class, DnsClient, DnsMetrics, HttpMetrics, Telemetry},
};
use std::{sync::Arc, time::Duration};

/// Counts what the clients do.
pub struct Metrics {
    dns: Arc<DnsMetrics>,
    identity: Option<Arc<HttpMetrics>>,
    destination: Arc<HttpMetrics>,
    policy: Arc<HttpMetrics>,
}

impl Metrics {
    /// Of the configured services; `identity` is absent with SPIRE.
    pub fn new(telemetry: &Telemetry, control: &config::Control, identity: Option<&config::ControlAddr>) -> Self {
        let client = |addr: &config::ControlAddr| {
            let name = format!("{}:{}", addr.host, addr.port);
            let tls = match &addr.identity {
                Some(id) if !super::client::is_loopback(addr) => Ok(id.clone()),
                _ => Err(NoTls::Loopback),
            };
            telemetry.control_client(&name, &tls)
        };
        Self {
            dns: telemetry.dns(),
            identity: identity.map(client),
            destination: client(&control.destination),
            policy: client(&control.policy),
        }
    }

    fn client(&self, service: ControlService) -> Option<&HttpMetrics> {
        match service {
            ControlService::Identity => self.identity.as_deref(),
            ControlService::Destination => Some(&self.destination),
            ControlService::Policy => Some(&self.policy),
        }
    }
}

impl Observer for Metrics {
    fn dns(&self, service: ControlService, record: DnsRecord, ok: bool) {
        let client = match service {
            ControlService::Identity => DnsClient::Identity,
            ControlService::Destination => DnsClient::Destination,
            ControlService::Policy => DnsClient::Policy,
        };
        let record = match record {
            DnsRecord::Srv => telemetry::DnsRecord::Srv,
            DnsRecord::Addresses => telemetry::DnsRecord::Address,
        };
        self.dns.resolved(client, record, ok);
    }

    fn request(&self, service: ControlService) {
        if let Some(client) = self.client(service) {
            client.request();
        }
    }

    fn first_byte(&self, service: ControlService, status: u16, latency: Duration) {
        if let Some(client) = self.client(service) {
            client.first_byte(status, latency);
        }
    }

    fn response(&self, service: ControlService, status: Option<u16>, grpc_status: Option<u16>) {
        let Some(client) = self.client(service) else { return };
        let class = match (status, grpc_status) {
            (Some(_), Some(code)) => Class::grpc(Some(code)),
            // A watch that we end ourselves has no code; that is no failure.
            (Some(status), None) => Class::http(status),
            (None, _) => Class { success: false, grpc_status: None, error: Some("unclassified") },
        };
        client.response(status, class);
    }
}

#[cfg(test)]
mod tests {
    use super::{super::client::tests::connect_config, *};

    #[test]
    fn what_clients_do_is_printed() {
        let telemetry = Telemetry::new(config::Metrics::default());
        let addr = |port, identity: Option<&str>| {
            let host = if identity.is_some() { "linkerd-dst.linkerd.svc." } else { "localhost." };
            let identity = identity.map(|id| id.parse().unwrap());
            config::ControlAddr { host: host.into(), port, identity }
        };
        let control = config::Control {
            destination: addr(8086, Some("dst.linkerd")),
            destination_context: String::new(),
            policy: addr(8090, None),
            workload: String::new(),
            stream_initial_timeout: None,
            stream_idle_timeout: None,
            stream_lifetime: None,
            loopback_connect: connect_config(),
            connect: connect_config(),
        };
        let metrics = Metrics::new(&telemetry, &control, None);
        metrics.request(ControlService::Destination);
        metrics.response(ControlService::Destination, Some(200), Some(14));
        metrics.request(ControlService::Identity);
        metrics.dns(ControlService::Policy, DnsRecord::Srv, false);
        let text = telemetry.render();
        for expected in [
            "control_request_total{addr=\"linkerd-dst.linkerd.svc.:8086\",tls=\"true\",server_id=\"dst.linkerd\"} 1",
            "grpc_status=\"14\"",
            "control_dns_resolutions_total{client=\"policy\",record_type=\"SRV\",result=\"not_found\"} 1",
        ] {
            assert!(text.contains(expected), "{expected} is missing:\n{text}");
        }
    }
}
