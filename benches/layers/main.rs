//! Time of the layers, one file per layer, named by scenario.
//!
//! `cargo bench -p benches` runs all; `cargo bench -p benches -- route` those with a word in their name.

#![allow(clippy::unwrap_used, reason = "a bench that can't be set up has no result")]

mod balance;
mod copy;
mod detect;
mod discovery;
mod metrics;
mod rate;
mod replay;
mod route;

use criterion::{Criterion, criterion_group, criterion_main};
use std::time::Duration;

criterion_group! {
    name = layers;
    config = Criterion::default().sample_size(30).warm_up_time(Duration::from_millis(500)).measurement_time(Duration::from_secs(2));
    targets =
        detect::benches,
        route::benches,
        balance::benches,
        rate::benches,
        replay::benches,
        copy::benches,
        metrics::benches,
        discovery::benches,
}
criterion_main!(layers);

/// A runtime for layers whose futures are ready at once or wait for sockets.
fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}
