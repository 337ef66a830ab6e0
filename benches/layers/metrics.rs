//! What counting costs a request, and a scrape of some ten thousand series.

use criterion::{Criterion, Throughput};
use linkerd_app::{
    config,
    policy::authz::NoTls,
    telemetry::{Class, ConnLabels, ConnMetrics, Direction, EndpointLabels, Peer, Telemetry, TlsLabels},
};
use std::{
    net::{Ipv4Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

pub(crate) fn benches(c: &mut Criterion) {
    let runtime = crate::runtime();
    let _entered = runtime.enter();
    let mut group = c.benchmark_group("metrics");
    let telemetry = telemetry();

    let endpoint = telemetry.endpoint(endpoint_labels(1));
    group.bench_function("record_request", |b| {
        b.iter(|| {
            endpoint.request();
            endpoint.first_byte(200, Duration::from_micros(1700));
            endpoint.response(Some(200), Class::http(200));
        });
    });
    let conn = telemetry.conn(conn_labels(1));
    group.bench_function("record_bytes", |b| {
        b.iter(|| {
            conn.read(100);
            conn.written(1000);
        });
    });
    group.bench_function("resolve_handle", |b| b.iter(|| telemetry.endpoint(endpoint_labels(1))));

    let conns: Vec<Arc<ConnMetrics>> = (0..2000).map(|i| telemetry.conn(conn_labels(i))).collect();
    for conn in &conns {
        conn.open();
        conn.read(100);
        conn.written(100);
        conn.close(None);
    }
    let series = samples(&telemetry);
    assert!(series >= 10_000, "{series} samples");
    group.throughput(Throughput::Elements(series as u64));
    group.bench_function("scrape_10000_series", |b| b.iter(|| telemetry.render()));
}

fn samples(telemetry: &Telemetry) -> usize {
    telemetry.render().lines().filter(|l| !l.starts_with('#')).count()
}

fn telemetry() -> Telemetry {
    Telemetry::new(config::Metrics { retain_idle: Duration::from_secs(600) })
}

fn target(i: u32) -> SocketAddr {
    (Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 0, 0, 0)) + i), 8080).into()
}

fn endpoint_labels(i: u32) -> EndpointLabels {
    EndpointLabels::Outbound {
        authority: Some("web.shop.svc.cluster.local".into()),
        target: target(i),
        tls: Err(NoTls::NotProvidedByServiceDiscovery),
        dst: Arc::default(),
    }
}

fn conn_labels(i: u32) -> ConnLabels {
    ConnLabels {
        direction: Direction::Outbound,
        peer: Peer::Dst,
        target: Some(target(i)),
        tls: TlsLabels::Connected(Err(NoTls::NotProvidedByServiceDiscovery)),
        srv: None,
        authority: Some("web.shop.svc.cluster.local".into()),
        dst: None,
    }
}
