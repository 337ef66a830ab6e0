//! What a scrape of 10,000 series costs, in the older dialect (connections, requests with latencies) and in the newer one
//! (routes with histograms), what counting an event costs, and what scrapes do to those who count meanwhile. Prints CPU
//! time, which on one thread is wall time.

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
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

/// Scrapes, of which the fastest counts: the others met something else on the machine.
const ROUNDS: usize = 20;
const EVENTS: u32 = 1_000_000;
/// A hundred times as often as Prometheus does by default.
const SCRAPE_INTERVAL: Duration = Duration::from_millis(100);
/// As many batches as meet several scrapes.
const BATCHES: u16 = u16::MAX;
/// Requests counted in a batch.
const BATCH: usize = 100;

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

/// Nanoseconds that 99 of 100 batches of events stay below, each with a look-up as for a new target.
fn p99(t: &Telemetry) -> u64 {
    let mut times: Vec<u64> = (0..BATCHES)
        .map(|i| {
            let start = Instant::now();
            let endpoint = endpoint(t, i % 350);
            for _ in 0..BATCH {
                endpoint.request();
                endpoint.first_byte(200, Duration::from_millis(7));
                endpoint.response(Some(200), Class::http(200));
            }
            u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX)
        })
        .collect();
    times.sort_unstable();
    times[times.len() * 99 / 100]
}

/// The best of some rounds without and with scrapes, which take turns so that what else the machine does meets both.
fn disturbance(t: &Telemetry) {
    let (mut quiet, mut scraped) = (u64::MAX, u64::MAX);
    for _ in 0..ROUNDS {
        quiet = quiet.min(p99(t));
        let done = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    black_box(t.render());
                    thread::sleep(SCRAPE_INTERVAL);
                }
            });
            scraped = scraped.min(p99(t));
            done.store(true, Ordering::Relaxed);
        });
    }
    let change = (scraped as f64 / quiet as f64 - 1.0) * 100.0;
    println!(
        "p99 of counting, a scrape each {SCRAPE_INTERVAL:?}: {quiet} ns without, {scraped} ns with: {change:+.1} %"
    );
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
    disturbance(&t);

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
