//! How many worker threads serve traffic (contract.md 1.13), and the runtimes that they are.

use linkerd_app::config::env::Process;
use std::{fs, io};
use tokio::runtime::{Builder, Runtime};

/// The runtime for traffic: one worker is a single-threaded runtime on the calling thread.
///
/// # Errors
/// The system's, when threads or the event queue can't be made.
pub(crate) fn traffic(process: &Process) -> io::Result<Runtime> {
    let workers = choose(cpus(), process.cores_max, process.cores_ratio, process.cores_min);
    if workers == 1 {
        tracing::info!("Using single-threaded proxy runtime");
        Builder::new_current_thread().enable_all().build()
    } else {
        tracing::info!(cores = workers, "Using multi-threaded proxy runtime");
        Builder::new_multi_thread().enable_all().thread_name("proxy").worker_threads(workers).build()
    }
}

/// The runtime for the admin server, identity and discovery: a thread of its own, so that a busy data path never delays
/// a probe or a renewal.
///
/// # Errors
/// The system's, when the event queue can't be made.
pub(crate) fn daemon() -> io::Result<Runtime> {
    Builder::new_current_thread().enable_all().thread_name("admin").build()
}

/// `MAX`, else the share of the CPUs, else 1; raised to `MIN`; capped to the CPUs.
fn choose(cpus: usize, max: Option<usize>, ratio: Option<f64>, min: usize) -> usize {
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "0 < ratio <= 1 of a CPU count")]
    let share = ratio.map(|ratio| (cpus as f64 * ratio).round() as usize);
    max.or(share).unwrap_or(1).max(min).clamp(1, cpus.max(1))
}

/// The affinity mask's CPUs, limited by the cgroup's quota (v2, then v1), rounded up.
fn cpus() -> usize {
    let affinity = std::thread::available_parallelism().map_or(1, usize::from);
    quota().map_or(affinity, |quota| quota.min(affinity))
}

fn quota() -> Option<usize> {
    let (quota, period) = if let Ok(text) = fs::read_to_string("/sys/fs/cgroup/cpu.max") {
        let (quota, period) = text.trim().split_once(' ')?;
        (quota.parse::<u64>().ok()?, period.parse::<u64>().ok()?)
    } else {
        let read =
            |name: &str| fs::read_to_string(format!("/sys/fs/cgroup/cpu/{name}")).ok()?.trim().parse::<i64>().ok();
        (u64::try_from(read("cpu.cfs_quota_us")?).ok()?, u64::try_from(read("cpu.cfs_period_us")?).ok()?)
    };
    usize::try_from(quota.div_ceil(period.max(1))).ok().map(|n| n.max(1))
}

#[cfg(test)]
mod tests {
    use super::choose;

    #[test]
    fn workers_follow_the_contract() {
        assert_eq!(choose(8, None, None, 1), 1);
        assert_eq!(choose(8, Some(4), Some(0.1), 1), 4);
        assert_eq!(choose(8, None, Some(0.5), 1), 4);
        assert_eq!(choose(8, None, Some(0.01), 2), 2);
        assert_eq!(choose(2, Some(16), None, 1), 2);
        assert_eq!(choose(2, None, None, 9), 2);
    }
}
