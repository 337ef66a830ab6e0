//! `await`: runs a command once the proxy beside it is ready, and may ask the proxy to shut down when the command ends
//! (contract.md 5.5), so that a Job's pod can end.

use crate::probe;
use std::{
    ffi::OsString,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::unix::process::{CommandExt, ExitStatusExt},
    process::ExitStatus,
    time::Duration,
};
use tokio::{
    signal::unix::{SignalKind, signal},
    time::{Instant, sleep, timeout, timeout_at},
};

/// Longest that one try may take.
const TRY: Duration = Duration::from_secs(5);
/// Exit code after the timeout (`EX_UNAVAILABLE`).
const EXIT_UNAVAILABLE: u8 = 69;
/// Exit code when the system refuses something (`EX_OSERR`).
const EXIT_OS: u8 = 71;

/// What to wait for and what to run.
#[derive(Clone, Debug)]
pub struct Options {
    /// Admin port of the proxy.
    pub port: u16,
    /// Address of its admin server; none = this machine's loopback addresses, IPv4 first.
    pub address: Option<IpAddr>,
    /// Pause after a failed try.
    pub backoff: Duration,
    /// Longest wait; none = for ever.
    pub timeout: Option<Duration>,
    /// Whether the command is not run after the timeout.
    pub timeout_fatal: bool,
    /// Whether the proxy is asked to shut down when the command has ended.
    pub shutdown: bool,
    /// Why there is no proxy to wait for, if so; the command is run at once.
    pub disabled: Option<String>,
    /// Says what happens on stderr.
    pub verbose: bool,
    /// Program and arguments; empty = only wait.
    pub command: Vec<OsString>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            port: 4191,
            address: None,
            backoff: Duration::from_secs(1),
            timeout: None,
            timeout_fatal: true,
            shutdown: false,
            disabled: None,
            verbose: false,
            command: Vec::new(),
        }
    }
}

/// Waits, runs, and returns the exit code for this process. Without `shutdown` a command replaces this process, and this
/// returns only when that fails.
pub async fn run(options: Options) -> u8 {
    let say = |text: &str| {
        if options.verbose {
            eprintln!("linkerd-proxy await: {text}");
        }
    };
    let proxied = match &options.disabled {
        Some(reason) => {
            say(&format!("not waiting for the proxy: {reason}"));
            false
        }
        None => {
            let end = options.timeout.and_then(|timeout| Instant::now().checked_add(timeout));
            if !ready(&options, end).await {
                eprintln!(
                    "linkerd-proxy await: the proxy's port {} was not ready within {:?}; `/ready` on that port says why",
                    options.port,
                    options.timeout.unwrap_or_default()
                );
                if options.timeout_fatal {
                    return EXIT_UNAVAILABLE;
                }
            }
            say("the proxy is ready");
            true
        }
    };
    let Some((program, args)) = options.command.split_first() else {
        return 0;
    };
    let failed = |error: io::Error| {
        eprintln!("linkerd-proxy await: {}: {error}", program.to_string_lossy());
        EXIT_OS
    };
    let mut command = std::process::Command::new(program);
    command.args(args);
    if !(options.shutdown && proxied) {
        return failed(command.exec());
    }
    let code = supervise(command.into()).await.map_or_else(failed, exit_code);
    match timeout(TRY, ask(&options, "POST", "/shutdown")).await {
        Ok(Ok(status)) if (200..300).contains(&status) => say("the proxy was asked to shut down"),
        Ok(Ok(status)) => eprintln!(
            "linkerd-proxy await: the proxy refused to shut down with status {status}; \
             LINKERD2_PROXY_SHUTDOWN_ENDPOINT_ENABLED=true lets it"
        ),
        Ok(Err(error)) => eprintln!("linkerd-proxy await: the proxy could not be asked to shut down: {error}"),
        Err(_) => eprintln!("linkerd-proxy await: the proxy did not answer within {TRY:?} when asked to shut down"),
    }
    code
}

/// Tries until the proxy is ready or the time is over.
async fn ready(options: &Options, end: Option<Instant>) -> bool {
    let tries = async {
        loop {
            if let Ok(Ok(200..300)) = timeout(TRY, ask(options, "GET", "/ready")).await {
                return;
            }
            sleep(options.backoff).await;
        }
    };
    match end {
        Some(end) => timeout_at(end, tries).await.is_ok(),
        None => {
            tries.await;
            true
        }
    }
}

/// The status of a request without a body.
async fn ask(options: &Options, method: &str, path: &str) -> io::Result<u16> {
    let port = options.port;
    let local = match options.address {
        Some(ip) => vec![SocketAddr::new(ip, port)],
        None => [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)]
            .map(|ip| SocketAddr::new(ip, port))
            .to_vec(),
    };
    probe::status(&local, method, path, &format!("localhost:{port}")).await
}

/// Runs a child to its end and hands SIGTERM on to it. SIGINT reaches it from the terminal by itself.
async fn supervise(mut command: tokio::process::Command) -> io::Result<ExitStatus> {
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let mut child = command.spawn()?;
    loop {
        tokio::select! {
            status = child.wait() => return status,
            _ = terminate.recv() => kill::terminate(&child)?,
            _ = interrupt.recv() => {}
        }
    }
}

/// The child's own code, or 128 and the signal that ended it, as shells have it.
fn exit_code(status: ExitStatus) -> u8 {
    let code = status.code().or_else(|| status.signal().map(|signal| 128 + signal)).unwrap_or_default();
    u8::try_from(code).unwrap_or(EXIT_OS)
}

#[allow(unsafe_code)]
mod kill {
    use std::io;

    /// Sends SIGTERM to a child that has not been waited for; does nothing if it has.
    pub(super) fn terminate(child: &tokio::process::Child) -> io::Result<()> {
        let Some(pid) = child.id().and_then(|pid| libc::pid_t::try_from(pid).ok()) else {
            return Ok(());
        };
        // SAFETY: `kill` takes plain numbers and touches no memory. The process has not been reaped, since `id` is none
        // from then on, so the number still means this child and no other process.
        match unsafe { libc::kill(pid, libc::SIGTERM) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, Mutex};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    /// A proxy whose first answers are 503, and the request lines that it saw.
    async fn proxy(unready: usize) -> (u16, Arc<Mutex<Vec<String>>>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let seen = Arc::new(Mutex::new(Vec::new()));
        let log = seen.clone();
        tokio::spawn(async move {
            for n in 0.. {
                let (mut io, _) = listener.accept().await.unwrap();
                let mut request = vec![0; 1024];
                let len = io.read(&mut request).await.unwrap();
                let line = String::from_utf8_lossy(&request[..len]).lines().next().unwrap().to_owned();
                log.lock().unwrap().push(line);
                let status = if n < unready { "503 Service Unavailable" } else { "200 OK" };
                io.write_all(format!("HTTP/1.1 {status}\r\ncontent-length: 0\r\n\r\n").as_bytes()).await.unwrap();
            }
        });
        (port, seen)
    }

    fn options(port: u16) -> Options {
        Options {
            port,
            address: None,
            backoff: Duration::from_millis(1),
            timeout: Some(Duration::from_secs(20)),
            ..Options::default()
        }
    }

    #[tokio::test]
    async fn waits_until_ready() {
        let (port, seen) = proxy(2).await;
        assert_eq!(run(options(port)).await, 0);
        assert_eq!(*seen.lock().unwrap(), ["GET /ready HTTP/1.1"; 3]);
    }

    #[tokio::test]
    async fn the_child_decides_the_code_and_the_proxy_is_shut_down() {
        for (script, code) in [("exit 7", 7), ("kill -9 $$", 137)] {
            let (port, seen) = proxy(0).await;
            let command = ["sh", "-c", script].map(OsString::from).to_vec();
            assert_eq!(run(Options { shutdown: true, command, ..options(port) }).await, code);
            assert_eq!(*seen.lock().unwrap(), ["GET /ready HTTP/1.1", "POST /shutdown HTTP/1.1"]);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn gives_up_after_the_timeout() {
        let closed = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().port();
        assert_eq!(run(options(closed)).await, EXIT_UNAVAILABLE);
        let late = Options { timeout_fatal: false, ..options(closed) };
        assert_eq!(run(late).await, 0);
        let disabled = Options { disabled: Some("no proxy".into()), timeout: None, ..options(closed) };
        assert_eq!(run(disabled).await, 0);
    }

    #[tokio::test]
    async fn a_command_that_is_not_there_is_an_os_error() {
        let (port, _) = proxy(0).await;
        for shutdown in [true, false] {
            let command = vec!["/nonexistent/program".into()];
            assert_eq!(run(Options { shutdown, command, ..options(port) }).await, EXIT_OS);
        }
    }
}
