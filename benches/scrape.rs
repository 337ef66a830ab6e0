//! What a scrape of 10,000 series costs, in the older dialect (connections, requests with latencies) and in the newer one
//! (routes with histograms), and what counting an event costs. Prints CPU time, which on one thread is wall time.

use linkerd_app::{
    config,
    policy::{Meta, authz::NoTls},
    telemetry::{
        Class, ConnLabels, Direction, Ended, EndpointLabels, Peer, RouteKind, RouteLabels, Telemetry, TlsLabels,
        authority,
    },
};
use std::{
    any::Any,
    hint::black_box,
    sync::Arc,
    time::{Duration, Instant},
};

/// Scrapes, of which the fastest counts: the others met something else on the machine.
const ROUNDS: usize = 20;
const EVENTS: u32 = 1_000_000;

fn telemetry() -> Telemetry {
    Telemetry::new(config::Metrics::default())
}

fn scrape(name: &str, telemetry: &Telemetry) {
    let samples = telemetry.render().lines().filter(|l| !l.starts_with('#')).count();
    let mut best = Duration::MAX;
    for _ in 0..ROUNDS {
        let start = Instant::now();
        black_box(telemetry.render());
        best = best.min(start.elapsed());
    }
    let per_10k = best.as_secs_f64() * 1e3 * 10_000.0 / samples as f64;
    println!("{name:32} {samples:7} samples {best:10.2?} {per_10k:6.2} ms per 10,000");
}

fn count(name: &str, event: impl Fn()) {
    let start = Instant::now();
    (0..EVENTS).for_each(|_| event());
    println!("{name:32} {:7.1} ns per event", start.elapsed().as_secs_f64() * 1e9 / f64::from(EVENTS));
}

fn endpoint(t: &Telemetry, i: u16) -> Arc<linkerd_app::telemetry::EndpointMetrics> {
    t.endpoint(EndpointLabels::Outbound {
        authority: Some(authority("web.shop.svc.cluster.local", 8080)),
        target: ([10, 0, (i >> 8) as u8, i as u8], 8080).into(),
        tls: Err(NoTls::NotProvidedByServiceDiscovery),
        dst: Arc::default(),
    })
}

fn main() {
    // Held, so that nothing expires.
    let mut held: Vec<Arc<dyn Any + Send + Sync>> = Vec::new();

    let t = telemetry();
    for i in 0..2_000_u16 {
        let conn = t.conn(ConnLabels {
            direction: Direction::Outbound,
            peer: Peer::Dst,
            target: Some(([10, 0, (i >> 8) as u8, i as u8], 8080).into()),
            tls: TlsLabels::Connected(Err(NoTls::NotProvidedByServiceDiscovery)),
            srv: None,
            authority: Some(authority("web.shop.svc.cluster.local", 8080)),
            dst: Some(Arc::default()),
        });
        conn.open();
        conn.close(None);
        held.push(conn);
    }
    scrape("connections, older dialect", &t);

    let t = telemetry();
    for i in 0..350 {
        let endpoint = endpoint(&t, i);
        endpoint.request();
        endpoint.first_byte(200, Duration::from_millis(7));
        endpoint.response(Some(200), Class::http(200));
        held.push(endpoint);
    }
    scrape("requests, older dialect", &t);

    let t = telemetry();
    for i in 0..700_u16 {
        let parent = Meta::resource("core", "Service", "shop", &format!("web-{i}"), Some(80));
        let route =
            t.outbound_route(RouteKind::Http, RouteLabels { parent, route: Meta::default("http"), hostname: None });
        route.request();
        route.ended(Ended { status: Some(200), error: None }, Duration::from_millis(7));
        held.push(route);
    }
    scrape("routes, newer dialect", &t);

    let t = telemetry();
    let endpoint = endpoint(&t, 0);
    count("request, first byte, response", || {
        endpoint.request();
        endpoint.first_byte(200, Duration::from_millis(7));
        endpoint.response(Some(200), Class::http(200));
    });
}
