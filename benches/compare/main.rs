//! Measures service-mesh sidecars side by side: client pod → outbound proxy → mutual TLS → inbound proxy → server pod, in
//! network namespaces, for this proxy, HAProxy and Envoy in turn, on the same work in one run.
//!
//! `compare run` needs root and iproute2, and writes `report.md` and `plot.svg`. The other commands are what it starts
//! in the pods. docs/performance.md says how to read the figures.

mod net;
mod proxies;
mod report;
mod run;
mod scrape;
mod work;

use benches::{
    load::{self, Kind, Spec},
    serve,
};
use clap::{Args, Parser};
use std::{
    io::{self, Read, Write},
    net::{IpAddr, SocketAddr, TcpStream},
    process::ExitCode,
    time::{Duration, Instant},
};

/// Measures service-mesh sidecars side by side.
#[derive(Debug, Parser)]
#[command(name = "compare", max_term_width = 110)]
enum Command {
    /// Measure, and write a report.
    Run(run::Options),
    /// Measure what scrapes of this proxy cost and what they do to requests meanwhile.
    Scrapes(scrape::Options),
    /// Be the application: answer HTTP/1 and HTTP/2 on these addresses.
    Serve {
        /// Addresses.
        #[arg(required = true)]
        addrs: Vec<SocketAddr>,
    },
    /// Be the client.
    Load(Load),
    /// Open connections, use each once, and keep them until the standard input ends.
    Hold {
        /// Where to connect to.
        #[arg(long)]
        to: SocketAddr,
        /// Connections.
        #[arg(long)]
        connections: usize,
    },
    /// Ask once, and print the answer's body.
    Fetch {
        /// Where to connect to.
        addr: SocketAddr,
        /// What to ask for.
        path: String,
    },
    /// Be Prometheus: ask for metrics time and again.
    Scrape {
        /// Where to connect to.
        addr: SocketAddr,
        /// Milliseconds between two scrapes.
        every: u64,
        /// How often.
        times: u32,
    },
    /// Call destinations that nobody serves, for the series that they leave behind.
    Swell {
        /// Whom to call.
        ip: IpAddr,
        /// Ports.
        targets: u16,
    },
    /// Wait until an address takes connections, or answers 200 for a path.
    Wait {
        /// Where to connect to.
        addr: SocketAddr,
        /// What to ask for.
        path: Option<String>,
    },
}

#[derive(Debug, Args)]
struct Load {
    /// Where to connect to.
    #[arg(long)]
    to: SocketAddr,
    /// Connections.
    #[arg(long, default_value_t = 32)]
    connections: usize,
    /// HTTP/2 with so many streams per connection.
    #[arg(long)]
    streams: Option<usize>,
    /// A new connection for each request.
    #[arg(long, conflicts_with = "streams")]
    reconnect: bool,
    /// Requests per second.
    #[arg(long)]
    rate: Option<u32>,
    /// Bytes of each answer.
    #[arg(long, default_value_t = 0)]
    size: u64,
    /// Milliseconds before the measured time.
    #[arg(long, default_value_t = 1000)]
    warmup: u64,
    /// Measured milliseconds.
    #[arg(long, default_value_t = 5000)]
    time: u64,
}

fn main() -> ExitCode {
    let result = match Command::parse() {
        Command::Run(options) => run::run(&options),
        Command::Scrapes(options) => scrape::run(&options),
        Command::Serve { addrs } => answer(&addrs),
        Command::Load(args) => ask(&args),
        Command::Hold { to, connections } => hold(to, connections),
        Command::Fetch { addr, path } => fetch(addr, &path),
        Command::Scrape { addr, every, times } => scrape::scrape(addr, Duration::from_millis(every), times),
        Command::Swell { ip, targets } => scrape::swell(ip, targets),
        Command::Wait { addr, path } => wait(addr, path.as_deref()),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("compare: {error}");
            ExitCode::FAILURE
        }
    }
}

fn answer(addrs: &[SocketAddr]) -> io::Result<()> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(serve::run(addrs))
}

/// Prints `begin` and `end` when they happen, then the outcome, a name and a number in each line.
fn ask(args: &Load) -> io::Result<()> {
    let spec = Spec {
        to: args.to,
        host: work::HOST.into(),
        size: args.size,
        connections: args.connections,
        kind: match args.streams {
            Some(streams) => Kind::Http2 { streams },
            None if args.reconnect => Kind::Reconnect,
            None => Kind::KeepAlive,
        },
        rate: args.rate,
        warmup: Duration::from_millis(args.warmup),
        time: Duration::from_millis(args.time),
    };
    let say = |text: &str| {
        let mut out = io::stdout().lock();
        // Without a reader the run is pointless, and ends by itself.
        let _ = writeln!(out, "{text}").and_then(|()| out.flush());
    };
    let outcome = load::run(&spec, say)?;
    for (name, n) in [
        ("requests", outcome.requests),
        ("bytes", outcome.bytes),
        ("errors", outcome.errors),
        ("p50", outcome.percentile(0.5).into()),
        ("p90", outcome.percentile(0.9).into()),
        ("p99", outcome.percentile(0.99).into()),
        ("p999", outcome.percentile(0.999).into()),
    ] {
        say(&format!("{name} {n}"));
    }
    if let Some(error) = outcome.error {
        eprintln!("{} requests failed, the first one: {error}", outcome.errors);
    }
    Ok(())
}

fn hold(to: SocketAddr, connections: usize) -> io::Result<()> {
    let held = load::hold(to, work::HOST, connections)?;
    println!("held {}", held.len());
    io::stdin().read_to_end(&mut Vec::new())?;
    Ok(())
}

fn fetch(addr: SocketAddr, path: &str) -> io::Result<()> {
    let text = scrape::ask(addr, path)?;
    print!("{}", text.split_once("\r\n\r\n").map_or("", |(_, body)| body));
    Ok(())
}

fn wait(addr: SocketAddr, path: Option<&str>) -> io::Result<()> {
    let end = Instant::now() + Duration::from_secs(20);
    let attempt = || {
        let mut io = TcpStream::connect_timeout(&addr, Duration::from_secs(1))?;
        let Some(path) = path else { return Ok(()) };
        io.set_read_timeout(Some(Duration::from_secs(1)))?;
        write!(io, "GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")?;
        let mut head = [0; 12];
        io.read_exact(&mut head)?;
        if head.ends_with(b" 200") { Ok(()) } else { Err(io::Error::other("not ready")) }
    };
    loop {
        match attempt() {
            Ok(()) => return Ok(()),
            Err(error) if Instant::now() > end => return Err(io::Error::new(error.kind(), format!("{addr}: {error}"))),
            Err(_) => std::thread::sleep(Duration::from_millis(1)),
        }
    }
}
