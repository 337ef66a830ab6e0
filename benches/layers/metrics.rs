//! What counting costs a request, and a scrape of some ten thousand series.

use criterion::{BenchmarkGroup, Criterion, Throughput, measurement::WallTime};
use linkerd_app::{
    config,
    policy::{Meta, authz::NoTls},
    telemetry::{
        Class, ConnLabels, Direction, Ended, EndpointLabels, Peer, RouteKind, RouteLabels, Telemetry, TlsLabels,
    },
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

    let connections = self::telemetry();
    let handles: Vec<_> = (0..2000).map(|i| connections.conn(conn_labels(i))).collect();
    for conn in &handles {
        conn.open();
        conn.close(None);
    }
    scrape(&mut group, "connections", &connections);

    let requests = self::telemetry();
    let handles: Vec<_> = (0..400).map(|i| requests.endpoint(endpoint_labels(i))).collect();
    for endpoint in &handles {
        endpoint.request();
        endpoint.first_byte(200, Duration::from_millis(7));
        endpoint.response(Some(200), Class::http(200));
    }
    scrape(&mut group, "endpoints", &requests);

    let routes = self::telemetry();
    let handles: Vec<_> = (0..800).map(|i| routes.outbound_route(RouteKind::Http, route_labels(i))).collect();
    for route in &handles {
        route.request();
        route.ended(Ended { status: Some(200), error: None }, Duration::from_millis(7));
    }
    scrape(&mut group, "routes", &routes);
}

/// Some ten thousand samples, most of them of one kind; time is per sample.
fn scrape(group: &mut BenchmarkGroup<'_, WallTime>, kind: &str, telemetry: &Telemetry) {
    let samples = telemetry.render().lines().filter(|l| !l.starts_with('#')).count();
    assert!((9_000..16_000).contains(&samples), "{samples} samples");
    group.throughput(Throughput::Elements(samples as u64));
    group.bench_function(format!("scrape_10000_series/{kind}"), |b| b.iter(|| telemetry.render()));
}

fn telemetry() -> Telemetry {
    Telemetry::new(config::Metrics::default())
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

fn route_labels(i: u32) -> RouteLabels {
    let parent = Meta::resource("core", "Service", "shop", &format!("web-{i}"), Some(80));
    RouteLabels { parent, route: Meta::default("http"), hostname: None }
}
