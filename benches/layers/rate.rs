//! A rate limit's decision: for everyone, and by client among 10,000.

use criterion::Criterion;
use linkerd_stack::rate::{Keyed, Limiter};
use std::{hint::black_box, num::NonZeroU32};

pub(crate) fn benches(c: &mut Criterion) {
    let runtime = crate::runtime();
    let _entered = runtime.enter();
    let mut group = c.benchmark_group("rate");
    for (name, per_second) in [("total_admitted", NonZeroU32::MAX), ("total_refused", NonZeroU32::MIN)] {
        let limiter = Limiter::new(per_second);
        let _ = limiter.check();
        group.bench_function(name, |b| b.iter(|| limiter.check()));
    }
    let keyed = Keyed::new(NonZeroU32::MAX);
    let key = |i| format!("client-{i}.shop.serviceaccount.identity.linkerd.cluster.local");
    let kept: Vec<_> = (0..10_000).map(|i| keyed.bucket(&key(i))).collect();
    let one = key(17);
    group.bench_function("keyed_10000_clients", |b| b.iter(|| keyed.check(black_box(&one))));
    drop(kept);
}
