//! `process_*` from `/proc`, read when scraped; what cannot be read is left out (metrics.md 5.15).

use super::prom::{Encoder, Sample};
use prometheus_client::registry::Unit;
use std::{
    fmt, fs,
    time::{SystemTime, UNIX_EPOCH},
};

/// Clock ticks per second in `/proc`. `USER_HZ` is 100 on every architecture that Linux gives the proxy to.
const TICKS_PER_SECOND: f64 = 100.0;

/// When the process started, read once.
#[derive(Copy, Clone, Debug)]
pub(super) struct Process {
    start: f64,
}

/// The fields of `/proc/self/stat` that are printed.
#[derive(Debug, PartialEq)]
struct Stat {
    cpu_seconds: f64,
    /// Since boot.
    start_seconds: f64,
    threads: u64,
    virtual_bytes: u64,
}

impl Process {
    pub(super) fn new() -> Self {
        let start = || {
            let stat = parse_stat(&fs::read_to_string("/proc/self/stat").ok()?)?;
            let boot = fs::read_to_string("/proc/stat").ok()?;
            let boot: f64 = boot.lines().find_map(|l| l.strip_prefix("btime "))?.trim().parse().ok()?;
            Some(boot + stat.start_seconds)
        };
        Self { start: start().unwrap_or_else(now) }
    }

    pub(super) fn encode(&self, out: &mut Encoder<'_, '_>) -> fmt::Result {
        let one = |value| [(Sample::NONE, value)];
        let now = now();
        out.gauge_f64(
            "process_start_time",
            Some(Unit::Seconds),
            "Unix time at which the process started",
            one(self.start),
        )?;
        out.counter_f64(
            "process_uptime",
            Some(Unit::Seconds),
            "Time since the process started",
            [(Sample::NONE, (now - self.start).max(0.0))],
        )?;
        out.gauge_f64("process_clock_time", Some(Unit::Seconds), "Unix time now", one(now.floor()))?;
        if let Some(stat) = fs::read_to_string("/proc/self/stat").ok().as_deref().and_then(parse_stat) {
            out.counter_f64("process_cpu", Some(Unit::Seconds), "User and system time", one(stat.cpu_seconds))?;
            out.gauge(
                "process_virtual_memory",
                Some(Unit::Bytes),
                "Address space",
                [(Sample::NONE, stat.virtual_bytes)],
            )?;
            out.gauge("process_threads", None, "Threads of the process", [(Sample::NONE, stat.threads)])?;
        }
        let status = fs::read_to_string("/proc/self/status").ok();
        if let Some(kib) = status.as_deref().and_then(|s| field(s, "VmRSS:")) {
            out.gauge("process_resident_memory", Some(Unit::Bytes), "Resident memory", [(Sample::NONE, kib * 1024)])?;
        }
        if let Some(open) = open_fds() {
            out.gauge("process_open_fds", None, "Open descriptors", [(Sample::NONE, open)])?;
        }
        out.gauge("process_max_fds", None, "Bound on open descriptors", [(Sample::NONE, max_fds(&limits()))])?;
        if let Some((received, sent)) = fs::read_to_string("/proc/self/net/netstat").ok().as_deref().and_then(octets) {
            let families = [
                ("process_network_receive", "IP octets received in the network namespace", received),
                ("process_network_transmit", "IP octets sent in the network namespace", sent),
            ];
            for (name, help, octets) in families {
                out.counter_f64(name, Some(Unit::Bytes), help, one(octets))?;
            }
        }
        Ok(())
    }
}

/// A twentieth of the descriptors is left: new connections will soon be refused.
pub(super) fn descriptors_low() -> Option<String> {
    let (open, max) = (open_fds()?, max_fds(&limits()));
    (max > 0 && open >= max - max / 20).then(|| format!("{open} of {max} descriptors are open"))
}

fn open_fds() -> Option<u64> {
    // The directory's own descriptor is among them.
    Some((fs::read_dir("/proc/self/fd").ok()?.count() as u64).saturating_sub(1))
}

fn limits() -> String {
    fs::read_to_string("/proc/self/limits").unwrap_or_default()
}

fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |d| d.as_secs_f64())
}

/// proc_pid_stat(5): the command in parentheses may hold anything; field 3 follows its last parenthesis.
fn parse_stat(text: &str) -> Option<Stat> {
    let fields: Vec<&str> = text.rsplit_once(')')?.1.split_ascii_whitespace().collect();
    let number = |field: usize| fields.get(field - 3)?.parse::<u64>().ok();
    Some(Stat {
        cpu_seconds: (number(14)? + number(15)?) as f64 / TICKS_PER_SECOND,
        threads: number(20)?,
        start_seconds: number(22)? as f64 / TICKS_PER_SECOND,
        virtual_bytes: number(23)?,
    })
}

/// A line `Name: 123 kB`.
fn field(status: &str, name: &str) -> Option<u64> {
    status.lines().find_map(|l| l.strip_prefix(name))?.split_ascii_whitespace().next()?.parse().ok()
}

/// The soft limit, else the hard one, else 0.
fn max_fds(limits: &str) -> u64 {
    let line = limits.lines().find_map(|l| l.strip_prefix("Max open files"));
    line.and_then(|l| l.split_ascii_whitespace().take(2).find_map(|n| n.parse().ok())).unwrap_or(0)
}

/// `InOctets` and `OutOctets` of the two lines that begin with `IpExt:`.
fn octets(netstat: &str) -> Option<(f64, f64)> {
    let mut lines = netstat.lines().filter_map(|l| l.strip_prefix("IpExt:"));
    let (names, values) = (lines.next()?, lines.next()?);
    let value = |name: &str| {
        let (_, v) = names.split_ascii_whitespace().zip(values.split_ascii_whitespace()).find(|(n, _)| *n == name)?;
        v.parse().ok()
    };
    Some((value("InOctets")?, value("OutOctets")?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn proc_files_parse() {
        let stat = "7 (a) b) S 1 7 7 0 -1 4194560 1 2 3 4 150 50 0 0 20 0 9 0 12345 4096 77 18446744073709551615";
        assert_eq!(
            parse_stat(stat),
            Some(Stat { cpu_seconds: 2.0, start_seconds: 123.45, threads: 9, virtual_bytes: 4096 })
        );
        assert_eq!(parse_stat("7 (a) S"), None);
        assert_eq!(field("VmSize:\t  10 kB\nVmRSS:\t  12 kB\n", "VmRSS:"), Some(12));
        assert_eq!(max_fds("Max open files            1024                 4096                 files"), 1024);
        assert_eq!(max_fds("Max open files            unlimited            4096                 files"), 4096);
        assert_eq!(max_fds(""), 0);
        assert_eq!(octets("TcpExt: A\nTcpExt: 1\nIpExt: X InOctets OutOctets\nIpExt: 0 5 6\n"), Some((5.0, 6.0)));
    }
}
