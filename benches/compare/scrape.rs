//! What scrapes of many series do to a real pair: CPU time of a scrape, and the 99th percentile of requests at a constant
//! rate with and without scrapes of both proxies meanwhile, in turns.

use crate::{
    net::{Net, Pod, success},
    proxies::{self, Name, Pair, Proxy},
    run::{Load, Remove, absolute},
    work::{HTTP, Mode, SERVICE, WORKS},
};
use benches::process::Process;
use clap::Args;
use std::{
    fs,
    io::{self, Read, Write},
    net::{IpAddr, SocketAddr, TcpStream},
    path::{Path, PathBuf},
    process::Stdio,
    thread,
    time::Duration,
};

/// Scrapes whose CPU time is measured at rest.
const AT_REST: u32 = 20;
/// Ports at which nobody listens begin here.
const FIRST_TARGET: u16 = 20_000;
/// The work whose latency is looked at.
const WORK: &str = "http1-rate";

#[derive(Debug, Args)]
pub(crate) struct Options {
    /// This proxy's binary. Without it, the one beside this program.
    #[arg(long)]
    proxy: Option<PathBuf>,
    /// Destinations that are called before, each of which leaves its series behind.
    #[arg(long, default_value_t = 125)]
    targets: u16,
    /// Milliseconds between two scrapes of a proxy; Prometheus' default for the mesh is 10,000.
    #[arg(long, default_value_t = 10_000)]
    every: u64,
    /// Rounds, each without and with scrapes.
    #[arg(long, default_value_t = 12)]
    rounds: usize,
    /// Measured milliseconds of each half of a round.
    #[arg(long, default_value_t = 10_000)]
    time: u64,
}

pub(crate) fn run(options: &Options) -> io::Result<()> {
    let here = std::env::current_exe()?;
    let ours = absolute(&options.proxy.clone().unwrap_or_else(|| here.with_file_name("linkerd-proxy")))?;
    let dir = std::env::temp_dir().join(format!("compare{}", std::process::id()));
    fs::create_dir_all(&dir)?;
    let _remove = Remove(dir.clone());
    let net = Net::new()?;
    let at = SocketAddr::new(IpAddr::from([0, 0, 0, 0]), HTTP.1);
    let _server = Process::start(net.server.command(&here).args(["serve", &at.to_string()]))?;
    proxies::configure(&net, &dir, &ours)?;
    net.redirect(&ours)?;
    let pair = Proxy { name: Name::Ours, program: &ours, dir: &dir }.start(&net, Mode::Http)?;

    let site = Site { here: &here, net: &net, pair: &pair };
    let targets = options.targets.to_string();
    success(net.client.command(&here).args(["swell", &net.server.ip.to_string(), &targets]))?;
    site.cost()?;
    site.disturbance(options)
}

/// A pair of proxies at work.
struct Site<'a> {
    here: &'a Path,
    net: &'a Net,
    pair: &'a Pair,
}

impl Site<'_> {
    fn pods(&self) -> [&Pod; 2] {
        [&self.net.client, &self.net.server]
    }

    /// Begins to scrape both proxies.
    fn scrape(&self, every: u64, times: u32) -> io::Result<Vec<Process>> {
        let args = [proxies::ADMIN.to_string(), every.to_string(), times.to_string()];
        let start = |pod: &Pod| Process::start(pod.command(self.here).arg("scrape").args(&args).stdout(Stdio::null()));
        self.pods().into_iter().map(start).collect()
    }

    /// CPU time of scrapes at rest.
    fn cost(&self) -> io::Result<()> {
        let mut samples = Vec::new();
        for pod in self.pods() {
            let out = pod.command(self.here).args(["fetch", proxies::ADMIN, "/metrics"]).output()?;
            samples.push(String::from_utf8_lossy(&out.stdout).lines().filter(|l| !l.starts_with('#')).count());
        }
        thread::sleep(Duration::from_secs(1));
        let before = self.pair.cpu()?;
        for mut client in self.scrape(0, AT_REST)? {
            client.wait()?;
        }
        let after = self.pair.cpu()?;
        for (cpu, samples) in [after.0 - before.0, after.1 - before.1].into_iter().zip(samples) {
            let each = cpu.as_secs_f64() * 1e3 / f64::from(AT_REST);
            let per_10k = each * 1e4 / samples.max(1) as f64;
            println!("{samples} samples: {each:.2} ms of CPU a scrape, {per_10k:.2} ms per 10,000");
        }
        Ok(())
    }

    fn disturbance(&self, options: &Options) -> io::Result<()> {
        let load = Load { warmup: 500, time: options.time, here: self.here };
        let work = WORKS.iter().find(|w| w.name == WORK).ok_or_else(|| io::Error::other(WORK))?;
        let to = SocketAddr::new(SERVICE.parse().map_err(io::Error::other)?, HTTP.0);
        let p99 = || Ok::<_, io::Error>(load.measure(self.net, work, to, Some(self.pair))?.counts["p99"]);
        let (mut quiet, mut scraped) = (Vec::new(), Vec::new());
        for _ in 0..options.rounds {
            quiet.push(p99()?);
            let _clients = self.scrape(options.every, u32::MAX)?;
            scraped.push(p99()?);
        }
        let (quiet, scraped) = (median(quiet), median(scraped));
        let change = (scraped as f64 / quiet as f64 - 1.0) * 100.0;
        let Options { rounds, every, .. } = options;
        println!(
            "p99, median of {rounds}: {quiet} µs without, {scraped} µs with a scrape each {every} ms: {change:+.1} %"
        );
        Ok(())
    }
}

fn median(mut list: Vec<u64>) -> u64 {
    list.sort_unstable();
    let at = |i: usize| list.get(i).copied().unwrap_or(0);
    at(list.len().saturating_sub(1) / 2).midpoint(at(list.len() / 2))
}

/// Scrapes so many times, or until it is ended.
pub(crate) fn scrape(addr: SocketAddr, every: Duration, times: u32) -> io::Result<()> {
    for _ in 0..times {
        ask(addr, "/metrics")?;
        thread::sleep(every);
    }
    Ok(())
}

/// Calls so many destinations that refuse.
pub(crate) fn swell(ip: IpAddr, targets: u16) -> io::Result<()> {
    (FIRST_TARGET..).take(targets.into()).try_for_each(|port| ask(SocketAddr::new(ip, port), "/").map(drop))
}

/// One answer with its head.
pub(crate) fn ask(addr: SocketAddr, path: &str) -> io::Result<String> {
    let mut io = TcpStream::connect_timeout(&addr, Duration::from_secs(1))?;
    io.set_read_timeout(Some(Duration::from_secs(5)))?;
    write!(io, "GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")?;
    let mut text = String::new();
    io.read_to_string(&mut text)?;
    Ok(text)
}
