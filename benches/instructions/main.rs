//! Instructions that one request costs each side of the proxy, counted by valgrind and compared with the counts on file.
//!
//! Unlike time, the count hardly depends on the machine, so every change can be held against it: client → outbound proxy
//! → mutual TLS → inbound proxy → server on loopback addresses, without any privilege, the counted one of the two
//! proxies under callgrind. Counting begins after a warm-up; requests follow one another on one connection.

use benches::{
    load::{self, Kind, Spec},
    process::Process,
    serve,
};
use clap::Parser;
use std::{
    collections::BTreeMap,
    fmt::Write as _,
    fs, io,
    io::{Read, Write as _},
    net::{SocketAddr, TcpStream},
    path::{Path, PathBuf},
    process::{Command, ExitCode, Stdio},
    thread,
    time::{Duration, Instant},
};

/// Requests before counting begins: connections and pools are made, caches filled.
const WARM_UP: u64 = 50;
/// Requests counted.
const REQUESTS: u64 = 300;
/// A proxy under valgrind is some fifty times slower.
const PATIENCE: Duration = Duration::from_secs(120);
/// Share by which a count may differ from the one on file. From run to run they differ by a thousandth; what compilers,
/// processors and timers make of it gets the rest.
const TOLERANCE: f64 = 0.03;
/// What a proxy that slow needs more of, and the counts must not depend on.
const PATIENT: [&str; 4] = [
    "LINKERD2_PROXY_INBOUND_CONNECT_TIMEOUT",
    "LINKERD2_PROXY_OUTBOUND_CONNECT_TIMEOUT",
    "LINKERD2_PROXY_OUTBOUND_HTTP_FAILFAST_TIMEOUT",
    "LINKERD2_PROXY_OUTBOUND_DISCOVERY_IDLE_TIMEOUT",
];
const SERVER: &str = "127.0.0.2:18080";
const HOST: &str = "web.bench:80";

/// Counts instructions per request of each side of the proxy.
#[derive(Debug, Parser)]
#[command(name = "instructions", max_term_width = 110)]
struct Options {
    /// The proxy's binary, of the profile `counts` as the counts on file are. Without it, the one beside this program.
    #[arg(long)]
    proxy: Option<PathBuf>,
    /// Counts to compare with.
    #[arg(long, default_value = "benches/instructions/counts.txt")]
    counts: PathBuf,
    /// Replace the counts on file by the new ones.
    #[arg(long)]
    update: bool,
}

/// What one request is, and whose instructions are counted.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
enum Side {
    Outbound,
    Inbound,
}

fn main() -> ExitCode {
    match run(&Options::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("instructions: {error}");
            ExitCode::from(2)
        }
    }
}

/// Whether all counts are within the tolerance, or were written.
fn run(options: &Options) -> io::Result<bool> {
    let proxy = match &options.proxy {
        Some(proxy) => proxy.clone(),
        None => std::env::current_exe()?.with_file_name("linkerd-proxy"),
    };
    let dir = std::env::temp_dir().join(format!("instructions{}", std::process::id()));
    fs::create_dir_all(dir.join("manifests"))?;
    let _remove = Remove(dir.clone());
    fs::write(dir.join("manifests/bench.yaml"), manifests())?;
    success(Command::new(&proxy).args(["identity", "init"]).arg(dir.join("identity")))?;
    start_server()?;

    let mut counts = BTreeMap::new();
    for side in [Side::Outbound, Side::Inbound] {
        let pair = Pair::start(&proxy, &dir, side)?;
        for (name, kind) in [("http1", Kind::KeepAlive), ("http2", Kind::Http2 { streams: 1 })] {
            let count = pair.count(kind)?;
            let name = format!("{side:?}-{name}").to_lowercase();
            println!("{name} {count}");
            counts.insert(name, count);
        }
    }
    if options.update {
        fs::write(&options.counts, print(&counts))?;
        return Ok(true);
    }
    let old = fs::read_to_string(&options.counts)
        .map_err(|e| io::Error::new(e.kind(), format!("{}: {e}; --update makes it", options.counts.display())))?;
    let good = compare(&parse(&old), &counts);
    if !good {
        println!(
            "If the change is worth that, put the new counts on file, and the reason into the commit:\n    {} --update",
            std::env::current_exe()?.display()
        );
    }
    Ok(good)
}

/// Says what differs.
fn compare(old: &BTreeMap<String, u64>, new: &BTreeMap<String, u64>) -> bool {
    let mut good = true;
    for (name, count) in new {
        let Some(before) = old.get(name) else {
            println!("{name}: no count on file");
            good = false;
            continue;
        };
        let ratio = *count as f64 / *before as f64;
        let verdict = match ratio {
            r if r > 1.0 + TOLERANCE => "MORE than on file",
            r if r < 1.0 - TOLERANCE => "less than on file: --update to keep the gain",
            _ => "as on file",
        };
        good &= ratio <= 1.0 + TOLERANCE;
        println!("{name}: {before} → {count}, {:+.1} %: {verdict}", (ratio - 1.0) * 100.0);
    }
    good
}

fn parse(text: &str) -> BTreeMap<String, u64> {
    let line = |l: &str| l.split_once(' ').and_then(|(name, n)| Some((name.to_string(), n.trim().parse().ok()?)));
    text.lines().filter(|l| !l.starts_with('#')).filter_map(line).collect()
}

fn print(counts: &BTreeMap<String, u64>) -> String {
    let mut text = "# Instructions per request, in user mode; written by `instructions --update`.\n".to_string();
    for (name, count) in counts {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{name} {count}");
    }
    text
}

/// Two proxies, one of them under callgrind.
struct Pair {
    counted: Process,
    _other: Process,
    dir: PathBuf,
}

impl Pair {
    fn start(proxy: &Path, dir: &Path, counted: Side) -> io::Result<Self> {
        let one = |side: Side| {
            let (name, ip) = match side {
                Side::Outbound => ("client", "127.0.0.1"),
                Side::Inbound => ("web", "127.0.0.2"),
            };
            let mut command = Command::new("valgrind");
            command
                .args(["--tool=callgrind", "--instr-atstart=no", "--quiet"])
                .arg("--callgrind-out-file=callgrind.out");
            command.arg(proxy);
            if side != counted {
                command = Command::new(proxy);
            }
            let log = fs::File::create(dir.join(format!("{name}.log")))?;
            command
                .current_dir(dir)
                .args(["run", "--manifests", "manifests", "--identity", "identity"])
                .args(["--workload", &format!("bench/{name}")])
                .env("LINKERD2_PROXY_LOG", "error")
                .envs(PATIENT.map(|setting| (setting, format!("{}s", PATIENCE.as_secs()))))
                .env("LINKERD2_PROXY_INBOUND_LISTEN_ADDR", format!("{ip}:4143"))
                .env("LINKERD2_PROXY_OUTBOUND_LISTEN_ADDR", format!("{ip}:4140"))
                .env("LINKERD2_PROXY_ADMIN_LISTEN_ADDR", format!("{ip}:4191"))
                .stdin(Stdio::null())
                .stdout(log.try_clone()?)
                .stderr(log);
            let mut process = Process::start(&mut command)?;
            let admin = format!("{ip}:4191").parse().map_err(io::Error::other)?;
            wait_ready(admin, &mut process).map_err(|e| {
                let log = fs::read_to_string(dir.join(format!("{name}.log"))).unwrap_or_default();
                io::Error::other(format!("{name}'s proxy: {e}\n{log}"))
            })?;
            Ok::<_, io::Error>(process)
        };
        let (client, web) = (one(Side::Outbound)?, one(Side::Inbound)?);
        let (counted, other) = if counted == Side::Outbound { (client, web) } else { (web, client) };
        Ok(Self { counted, _other: other, dir: dir.to_path_buf() })
    }

    /// Instructions per request.
    fn count(&self, kind: Kind) -> io::Result<u64> {
        let spec = Spec {
            to: SocketAddr::from(([127, 0, 0, 1], 4140)),
            host: HOST.into(),
            size: 100,
            connections: 1,
            kind,
            rate: None,
            warmup: Duration::ZERO,
            time: PATIENCE,
        };
        load::count(&spec, WARM_UP)?;
        self.control("-i=on")?;
        self.control("--zero")?;
        load::count(&spec, REQUESTS)?;
        self.control("-d")?;
        self.control("-i=off")?;
        self.total().map(|n| n / REQUESTS)
    }

    fn control(&self, what: &str) -> io::Result<()> {
        success(Command::new("callgrind_control").arg(what).arg(self.counted.id().to_string()))
    }

    /// The sum over the dumps since the last call: one, or one per thread.
    fn total(&self) -> io::Result<u64> {
        let mut sum = 0;
        for entry in fs::read_dir(&self.dir)? {
            let path = entry?.path();
            if path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("callgrind.out.")) {
                let text = fs::read_to_string(&path)?;
                let totals =
                    text.lines().filter_map(|l| l.strip_prefix("totals:").or_else(|| l.strip_prefix("summary:")));
                sum += totals.filter_map(|n| n.trim().parse::<u64>().ok()).next().unwrap_or(0);
                fs::remove_file(path)?;
            }
        }
        if sum == 0 {
            return Err(io::Error::other("callgrind has counted nothing"));
        }
        Ok(sum)
    }
}

fn wait_ready(admin: SocketAddr, process: &mut Process) -> io::Result<()> {
    let end = Instant::now() + PATIENCE;
    loop {
        let ready = || {
            let mut io = TcpStream::connect_timeout(&admin, Duration::from_secs(1))?;
            io.set_read_timeout(Some(PATIENCE))?;
            io.write_all(b"GET /ready HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")?;
            let mut head = [0; 12];
            io.read_exact(&mut head)?;
            Ok::<_, io::Error>(head.ends_with(b" 200"))
        };
        if ready().unwrap_or(false) {
            return Ok(());
        }
        if let Some(status) = process.ended()? {
            return Err(io::Error::other(format!("ended with {status}")));
        }
        if Instant::now() > end {
            return Err(io::Error::other(format!("is not ready after {PATIENCE:?}")));
        }
        thread::sleep(Duration::from_millis(50));
    }
}

/// The application, on a thread that ends with the program.
fn start_server() -> io::Result<()> {
    let addr: SocketAddr = SERVER.parse().map_err(io::Error::other)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let listener = runtime.block_on(tokio::net::TcpListener::bind(addr))?;
    thread::spawn(move || runtime.block_on(serve::accept(listener)));
    Ok(())
}

fn success(command: &mut Command) -> io::Result<()> {
    let out = command.output().map_err(|e| io::Error::new(e.kind(), format!("{command:?}: {e}")))?;
    if out.status.success() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&out.stderr);
    Err(io::Error::other(format!("{command:?}: {}\n{text}", out.status)))
}

/// Removes a folder on drop.
struct Remove(PathBuf);

impl Drop for Remove {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Two Pods on loopback addresses, where nothing is redirected, and a Service.
fn manifests() -> String {
    let pod = |name: &str, ip: &str| {
        format!(
            "apiVersion: v1
kind: Pod
metadata:
  name: {name}
  namespace: bench
  labels: {{app: {name}, linkerd.io/control-plane-ns: linkerd}}
  annotations: {{config.linkerd.io/proxy-transport-mode: transport-header}}
spec:
  serviceAccountName: {name}
  containers: [{{name: app, ports: [{{name: http, containerPort: 18080}}]}}]
status:
  podIP: {ip}
---
"
        )
    };
    format!(
        "apiVersion: v1
kind: Namespace
metadata: {{name: bench}}
---
{}{}apiVersion: v1
kind: Service
metadata: {{name: web, namespace: bench}}
spec:
  selector: {{app: web}}
  ports: [{{port: 80, targetPort: 18080}}]
",
        pod("client", "127.0.0.1"),
        pod("web", "127.0.0.2")
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(new: u64, good: bool) {
        let counts = |n| BTreeMap::from([("outbound-http1".to_string(), n)]);
        assert_eq!(compare(&counts(100_000), &counts(new)), good, "{new}");
    }

    #[test]
    fn only_a_count_above_the_tolerance_fails() {
        for (new, good) in [(100_000, true), (102_900, true), (103_100, false), (50_000, true)] {
            check(new, good);
        }
        assert!(!compare(&BTreeMap::new(), &BTreeMap::from([("new".into(), 1)])));
    }

    #[test]
    fn counts_on_file_are_read_back() {
        let counts = BTreeMap::from([("inbound-http2".to_string(), 123)]);
        assert_eq!(parse(&print(&counts)), counts);
    }
}
