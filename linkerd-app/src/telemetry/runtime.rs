//! `tokio_rt_*` of the runtime that serves traffic, as far as a stable build of it counts (metrics.md 5.16). Read when
//! scraped.

use super::prom::{Encoder, Sample};
use prometheus_client::registry::Unit;
use std::{fmt, time::Duration};
use tokio::runtime::RuntimeMetrics;

pub(super) fn encode(metrics: &RuntimeMetrics, out: &mut Encoder<'_, '_>) -> fmt::Result {
    let workers = metrics.num_workers();
    let one = |value: usize| [(Sample::NONE, value as u64)];
    let parked = (0..workers).map(|i| metrics.worker_park_count(i)).sum();
    let busy: Duration = (0..workers).map(|i| metrics.worker_total_busy_duration(i)).sum();
    out.gauge("tokio_rt_workers", None, "Threads that serve traffic", one(workers))?;
    out.gauge(
        "tokio_rt_injection_queue_depth",
        None,
        "Tasks that were woken from outside and wait for a worker",
        one(metrics.global_queue_depth()),
    )?;
    out.counter("tokio_rt_park", None, "Times that a worker had nothing to do", [(Sample::NONE, parked)])?;
    out.counter_f64(
        "tokio_rt_busy",
        Some(Unit::Seconds),
        "Time that workers were not waiting",
        [(Sample::NONE, busy.as_secs_f64())],
    )
}

#[cfg(test)]
mod tests {
    use crate::{config, telemetry::Telemetry};

    #[tokio::test]
    async fn the_runtime_is_told_once_it_is_known() {
        let telemetry = Telemetry::new(config::Metrics::default());
        assert!(!telemetry.render().contains("tokio_rt"));
        telemetry.set_runtime(&tokio::runtime::Handle::current());
        let page = telemetry.render();
        for line in [
            "# TYPE tokio_rt_workers gauge\ntokio_rt_workers 1\n",
            "# TYPE tokio_rt_injection_queue_depth gauge\ntokio_rt_injection_queue_depth 0\n",
            "# TYPE tokio_rt_park counter\ntokio_rt_park_total ",
            "# UNIT tokio_rt_busy_seconds seconds\ntokio_rt_busy_seconds_total ",
        ] {
            assert!(page.contains(line), "{line} in {page}");
        }
    }
}
