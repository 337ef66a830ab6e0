//! The clients' metrics (metrics.md 5.11, 5.13), resolved once.

use super::{ControlService, DnsRecord, Observer, client::FAILFAST};
use crate::{
    config,
    policy::authz::NoTls,
    telemetry::{self, BalancerKind, Class, DnsClient, DnsMetrics, HttpMetrics, Telemetry},
};
use linkerd_stack::balance;
use std::{collections::BTreeMap, sync::Arc, time::Duration};

/// Counts what the clients do.
pub struct Metrics {
    telemetry: Telemetry,
    dns: Arc<DnsMetrics>,
    services: BTreeMap<ControlService, Service>,
}

/// One configured service.
struct Service {
    /// `name:port`, as configured.
    addr: Arc<str>,
    requests: Arc<HttpMetrics>,
}

impl Metrics {
    /// Of the configured services.
    pub fn new<'a>(
        telemetry: &Telemetry,
        services: impl IntoIterator<Item = (ControlService, &'a config::ControlAddr)>,
    ) -> Self {
        let service = |(service, addr): (_, &config::ControlAddr)| {
            let name: Arc<str> = format!("{}:{}", addr.host, addr.port).into();
            let tls = match &addr.identity {
                Some(id) if !addr.is_loopback() => Ok(id.clone()),
                _ => Err(NoTls::Loopback),
            };
            (service, Service { requests: telemetry.control_client(&name, &tls), addr: name })
        };
        let services = services.into_iter().map(service).collect();
        Self { telemetry: telemetry.clone(), dns: telemetry.dns(), services }
    }

    fn requests(&self, service: ControlService) -> Option<&HttpMetrics> {
        self.services.get(&service).map(|service| &*service.requests)
    }
}

impl Observer for Metrics {
    fn balancer(&self, service: ControlService) -> Arc<dyn balance::Observer> {
        let Some(Service { addr, .. }) = self.services.get(&service) else { return Arc::new(()) };
        let addr = addr.clone();
        let kind = match service {
            ControlService::Identity => BalancerKind::ControlIdentity { addr },
            ControlService::Destination => BalancerKind::ControlDestination { addr },
            ControlService::Policy => BalancerKind::ControlPolicy { addr },
            ControlService::TraceCollector => BalancerKind::TraceCollector { addr },
        };
        self.telemetry.balancer(&kind, FAILFAST)
    }

    fn dns(&self, service: ControlService, record: DnsRecord, ok: bool) {
        let client = match service {
            ControlService::Identity => DnsClient::Identity,
            ControlService::Destination => DnsClient::Destination,
            ControlService::Policy => DnsClient::Policy,
            ControlService::TraceCollector => DnsClient::TraceCollector,
        };
        let record = match record {
            DnsRecord::Srv => telemetry::DnsRecord::Srv,
            DnsRecord::Addresses => telemetry::DnsRecord::Address,
        };
        self.dns.resolved(client, record, ok);
    }

    fn request(&self, service: ControlService) {
        if let Some(client) = self.requests(service) {
            client.request();
        }
    }

    fn first_byte(&self, service: ControlService, status: u16, latency: Duration) {
        if let Some(client) = self.requests(service) {
            client.first_byte(status, latency);
        }
    }

    fn response(&self, service: ControlService, status: Option<u16>, grpc_status: Option<u16>) {
        let Some(client) = self.requests(service) else { return };
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
    use super::*;

    #[test]
    fn what_clients_do_is_printed() {
        let telemetry = Telemetry::new(config::Metrics::default());
        let addr = |port, identity: Option<&str>| {
            let host = if identity.is_some() { "linkerd-dst.linkerd.svc." } else { "localhost." };
            let identity = identity.map(|id| id.parse().unwrap());
            config::ControlAddr { host: host.into(), port, identity }
        };
        let (destination, collector) = (addr(8086, Some("dst.linkerd")), addr(4317, None));
        let services = [(ControlService::Destination, &destination), (ControlService::TraceCollector, &collector)];
        let metrics = Metrics::new(&telemetry, services);
        let _balancer = metrics.balancer(ControlService::TraceCollector);
        metrics.request(ControlService::Destination);
        metrics.response(ControlService::Destination, Some(200), Some(14));
        metrics.request(ControlService::Identity);
        metrics.dns(ControlService::Policy, DnsRecord::Srv, false);
        let text = telemetry.render();
        for expected in [
            "control_request_total{addr=\"linkerd-dst.linkerd.svc.:8086\",tls=\"true\",server_id=\"dst.linkerd\"} 1",
            "grpc_status=\"14\"",
            "opentelemetry_balancer_queue_gate_timeout_seconds{addr=\"localhost.:4317\"} 30",
            "control_dns_resolutions_total{client=\"policy\",record_type=\"SRV\",result=\"not_found\"} 1",
        ] {
            assert!(text.contains(expected), "{expected} is missing:\n{text}");
        }
    }
}
