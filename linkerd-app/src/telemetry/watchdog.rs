//! Notices a worker thread that does not come back from a task: blocked on I/O, spinning, or starved of its core.
//!
//! A worker of the runtime counts each time it parks and wakes, and its busy time every few dozen tasks. One that is awake
//! while neither number moves has been inside one task all along.

use std::time::Duration;
use tokio::{runtime::RuntimeMetrics, time::Instant};

/// How long a worker may stay in one task. Nothing in the proxy computes for this long; a page fault or a debugger may.
const STUCK: Duration = Duration::from_secs(5);

/// What was last seen of each worker.
#[derive(Debug)]
pub struct Watchdog {
    metrics: RuntimeMetrics,
    workers: Vec<Seen>,
}

#[derive(Copy, Clone, Debug)]
struct Seen {
    wakes: u64,
    busy: Duration,
    since: Instant,
}

impl Watchdog {
    /// Watches the workers of a runtime. To be asked from outside of it.
    pub fn new(runtime: &tokio::runtime::Handle) -> Self {
        let metrics = runtime.metrics();
        let seen = |i| Seen {
            wakes: metrics.worker_park_unpark_count(i),
            busy: metrics.worker_total_busy_duration(i),
            since: Instant::now(),
        };
        let workers = (0..metrics.num_workers()).map(seen).collect();
        Self { metrics, workers }
    }

    /// Looks again; tells the workers that are stuck. To be called about once a second.
    pub fn check(&mut self) -> Option<String> {
        let now = Instant::now();
        let mut stuck = None::<String>;
        for (i, seen) in self.workers.iter_mut().enumerate() {
            let wakes = self.metrics.worker_park_unpark_count(i);
            let busy = self.metrics.worker_total_busy_duration(i);
            // Parking makes the count odd.
            let parked = !wakes.is_multiple_of(2);
            if parked || wakes != seen.wakes || busy != seen.busy {
                *seen = Seen { wakes, busy, since: now };
            }
            let idle = now.duration_since(seen.since);
            if idle >= STUCK {
                let text = format!("worker {i} has been in one task for {} s", idle.as_secs());
                stuck = Some(stuck.map_or(text.clone(), |all| format!("{all}; {text}")));
            }
        }
        stuck
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    #[test]
    fn a_worker_that_blocks_is_noticed_and_forgiven() {
        let watched = tokio::runtime::Builder::new_multi_thread().worker_threads(2).build().unwrap();
        let paused = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
        let mut dog = paused.block_on(async { Watchdog::new(watched.handle()) });
        let mut check_after = |time| {
            paused.block_on(async {
                tokio::time::advance(time).await;
                dog.check()
            })
        };
        // Both have started and found nothing to do.
        let metrics = watched.metrics();
        while (0..2).any(|i| metrics.worker_park_unpark_count(i).is_multiple_of(2)) {
            std::thread::yield_now();
        }

        let (entered, begun) = mpsc::channel();
        let (release, gate) = mpsc::channel::<()>();
        watched.spawn(async move {
            entered.send(()).unwrap();
            gate.recv().unwrap();
        });
        begun.recv().unwrap();
        while (0..2).all(|i| metrics.worker_park_unpark_count(i).is_multiple_of(2)) {
            std::thread::yield_now();
        }
        check_after(Duration::ZERO);
        assert_eq!(check_after(STUCK / 2), None);
        let stuck = check_after(STUCK).unwrap();
        assert_eq!(stuck.matches("worker").count(), 1, "{stuck}");

        release.send(()).unwrap();
        while check_after(Duration::ZERO).is_some() {
            std::thread::yield_now();
        }
    }
}
