//! A request among 1, 10 and 1,000 routes; the last one is its own.

use criterion::{BenchmarkId, Criterion};
use http::Request;
use linkerd_app::{
    http::route::best_match,
    policy::route::{HostMatch, HttpMatch, PathMatch, Precedence, RouteMatch},
};
use std::hint::black_box;

pub(crate) fn benches(c: &mut Criterion) {
    let mut group = c.benchmark_group("route");
    for n in [1, 10, 1000] {
        let req = Request::get(format!("http://web.shop/service-{}/items?color=blue", n - 1)).body(()).unwrap();
        for (name, hosts) in [("any_host", Vec::new()), ("one_host", vec![HostMatch::Exact("web.shop".into())])] {
            let rules: Vec<[RouteMatch; 1]> = (0..n).map(|i| [path(&format!("/service-{i}"))]).collect();
            group.bench_function(BenchmarkId::new(name, n), |b| {
                b.iter(|| {
                    let routes = rules.iter().map(|rule| (&hosts[..], [&rule[..]]));
                    best_match(routes, Precedence::GatewayApi, black_box(&req)).unwrap()
                });
            });
        }
    }
}

fn path(prefix: &str) -> RouteMatch {
    RouteMatch::Http(HttpMatch { path: Some(PathMatch::Prefix(prefix.into())), ..HttpMatch::default() })
}
