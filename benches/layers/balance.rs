//! A member for a request among 10 and 10,000, and what an update of the set costs.

use criterion::{BenchmarkId, Criterion};
use futures_util::FutureExt;
use linkerd_stack::{
    Ready,
    balance::{Balance, Config, Member},
};
use std::{
    net::{Ipv4Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

pub(crate) fn benches(c: &mut Criterion) {
    let runtime = crate::runtime();
    let _entered = runtime.enter();
    let mut group = c.benchmark_group("balance");
    for n in [10, 10_000] {
        for (name, ready) in [("acquire_all_ready", 1), ("acquire_half_ready", 2)] {
            let balance = balance();
            balance.reset((0..n).map(|i| member(i, i % ready == 0, 1)).collect());
            group.bench_function(BenchmarkId::new(name, n), |b| {
                b.iter(|| {
                    let picked = balance.acquire().now_or_never().unwrap().unwrap();
                    picked.load.observe(Duration::from_millis(1));
                    picked.service
                });
            });
        }
        let balance = balance();
        balance.reset((0..n).map(|i| member(i, true, 1 + i % 3)).collect());
        group.bench_function(BenchmarkId::new("acquire_weighted", n), |b| {
            b.iter(|| balance.acquire().now_or_never().unwrap().unwrap().service);
        });
        let members: Vec<_> = (0..n).map(|i| member(i, true, 1)).collect();
        group.bench_function(BenchmarkId::new("reset_unchanged", n), |b| {
            b.iter_batched(|| members.clone(), |m| balance.reset(m), criterion::BatchSize::LargeInput);
        });
        group.bench_function(BenchmarkId::new("add_and_remove_one", n), |b| {
            b.iter(|| {
                let (key, one) = member(n, true, 1);
                balance.add(vec![(key, one)]);
                balance.remove(&[key]);
            });
        });
    }
}

fn balance() -> Balance<SocketAddr, u32> {
    let seconds = Duration::from_secs;
    let config = Config {
        default_rtt: Duration::from_millis(30),
        decay: seconds(10),
        queue_capacity: 100,
        failfast_timeout: seconds(3),
    };
    Balance::with_seed(config, Arc::new(()), 1)
}

fn member(i: u32, ready: bool, weight: u32) -> (SocketAddr, Member<u32>) {
    let ip = Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 0, 0, 0)) + i);
    ((ip, 8080).into(), Member { service: i, ready: Ready::new(ready), weight })
}
