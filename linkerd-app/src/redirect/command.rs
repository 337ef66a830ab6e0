//! Finds the tools of the host and runs them, in another network namespace if asked to. Every run has an end.

use super::{Error, Family, Mode};
use std::{
    fmt, fs,
    io::{Read, Write},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

/// Longest that one command may run. Tools that wait for a lock would wait for ever.
const LIMIT: Duration = Duration::from_secs(60);
/// How often a running command is looked at.
const LOOK: Duration = Duration::from_millis(5);
/// Most output that is kept of a command, bytes: the nat table of a node with ten thousand services is some megabytes.
const MAX_OUTPUT: u64 = 64 * 1024 * 1024;
/// Where tools are besides `PATH`, which often lacks these for ordinary users.
const FOLDERS: [&str; 4] = ["/usr/sbin", "/sbin", "/usr/local/sbin", "/usr/bin"];

/// Runs commands.
pub(super) struct Runner {
    /// What a command line begins with: `nsenter --net=…` or nothing.
    prefix: Vec<String>,
    folders: Vec<PathBuf>,
}

/// What manages the rules behind a tool.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(super) enum Backend {
    Nft,
    Legacy,
}

/// One kind of tools for one family.
#[derive(Clone, Debug)]
pub(super) struct Tools {
    pub(super) backend: Backend,
    family: Family,
    /// Command lines.
    save: Vec<String>,
    restore: Vec<String>,
}

/// A command that did not succeed.
#[derive(Debug)]
pub(super) struct Failure {
    command: String,
    message: String,
}

impl Failure {
    pub(super) fn new(command: String, message: String) -> Self {
        Self { command, message }
    }

    pub(super) fn lacks_privileges(&self) -> bool {
        ["Permission denied", "Operation not permitted", "must be root"]
            .iter()
            .any(|words| self.message.contains(words))
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.command, self.message)
    }
}

/// The error when no kind of tools succeeded: missing privileges if that is what one of them lacks.
pub(super) fn no_success(family: Family, failures: Vec<Failure>) -> Error {
    if let Some(Failure { command, message }) = failures.iter().find(|failure| failure.lacks_privileges()) {
        return Error::Privileges { command: command.clone(), message: message.clone() };
    }
    let failures = failures.iter().map(Failure::to_string).collect::<Vec<_>>().join("; ");
    Error::Failed { family, failures }
}

/// Whether there is anything to redirect.
pub(super) fn kernel_has_ipv6() -> bool {
    Path::new("/proc/net/if_inet6").exists()
}

impl Runner {
    pub(super) fn new(netns: Option<PathBuf>) -> Result<Self, Error> {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let folders = std::env::split_paths(&path).chain(FOLDERS.map(PathBuf::from)).collect();
        let mut runner = Self { prefix: Vec::new(), folders };
        if let Some(netns) = netns {
            let nsenter = runner.find("nsenter").ok_or_else(|| Error::NoCommand("nsenter".into()))?;
            runner.prefix = vec![nsenter, format!("--net={}", netns.display()), "--".into()];
        }
        Ok(runner)
    }

    fn find(&self, name: &str) -> Option<String> {
        self.folders.iter().map(|dir| dir.join(name)).find(|path| path.is_file()).map(|path| path.display().to_string())
    }

    /// The kinds of tools that are installed, in the order in which to try them: the wanted one, then nft, plain, legacy.
    /// Plain tools stand in only where the others are missing, since they are one of them by another name.
    pub(super) fn tools(&self, family: Family, wanted: Option<Mode>) -> Result<Vec<Tools>, Error> {
        let mut modes: Vec<Mode> = wanted.into_iter().collect();
        for mode in [Mode::Nft, Mode::Plain, Mode::Legacy] {
            if !modes.contains(&mode) {
                modes.push(mode);
            }
        }
        let mut found: Vec<Tools> = Vec::new();
        for mode in modes {
            if let Some(tools) = self.kind(family, mode)
                && found.iter().all(|other| other.backend != tools.backend)
            {
                found.push(tools);
            }
        }
        if found.is_empty() {
            let name = program(family);
            let tried = format!("{name}-nft-restore, {name}-restore, {name}-legacy-restore");
            return Err(Error::NoTools { tried });
        }
        Ok(found)
    }

    fn kind(&self, family: Family, mode: Mode) -> Option<Tools> {
        let name = program(family);
        let (infix, multi) = match mode {
            Mode::Nft => ("-nft", Some("xtables-nft-multi")),
            Mode::Plain => ("", None),
            Mode::Legacy => ("-legacy", Some("xtables-legacy-multi")),
        };
        // Some distributions ship one program without the names that others link to it.
        let find = |verb: &str| {
            let alone = self.find(&format!("{name}{infix}-{verb}")).map(|path| vec![path]);
            alone.or_else(|| Some(vec![self.find(multi?)?, format!("{name}-{verb}")]))
        };
        let (save, restore) = (find("save")?, find("restore")?);
        let backend = match mode {
            Mode::Nft => Backend::Nft,
            Mode::Legacy => Backend::Legacy,
            Mode::Plain => {
                let version = self.run(&[save[0].clone(), "--version".into()], None).unwrap_or_default();
                if version.contains("nf_tables") { Backend::Nft } else { Backend::Legacy }
            }
        };
        Some(Tools { backend, family, save, restore })
    }

    pub(super) fn set_close_wait_timeout(&self, timeout: Duration) -> Result<(), Error> {
        const SETTING: &str = "/proc/sys/net/netfilter/nf_conntrack_tcp_timeout_close_wait";
        let seconds = timeout.as_secs().to_string();
        if self.prefix.is_empty() {
            return fs::write(SETTING, seconds).map_err(|e| Error::CloseWait(e.to_string()));
        }
        let sysctl = self.find("sysctl").ok_or_else(|| Error::NoCommand("sysctl".into()))?;
        let setting = format!("net.netfilter.nf_conntrack_tcp_timeout_close_wait={seconds}");
        self.run(&[sysctl, "-w".into(), setting], None).map(drop).map_err(|e| Error::CloseWait(e.to_string()))
    }

    fn line(&self, command: &[String]) -> Vec<String> {
        self.prefix.iter().chain(command).cloned().collect()
    }

    /// Runs a command to its end, feeds it `input`, and returns what it printed.
    fn run(&self, command: &[String], input: Option<&str>) -> Result<String, Failure> {
        let line = self.line(command);
        let failure = |message: String| Failure::new(line.join(" "), message);
        let (program, args) = line.split_first().ok_or_else(|| failure("no command".into()))?;
        let mut child = Command::new(program)
            .args(args)
            .stdin(if input.is_some() { Stdio::piped() } else { Stdio::null() })
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|e| failure(e.to_string()))?;
        let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
        let collect = |pipe: Option<Box<dyn Read + Send>>| {
            move || {
                let mut text = Vec::new();
                if let Some(pipe) = pipe {
                    // What can't be read any more is not there to be shown either.
                    let _ = pipe.take(MAX_OUTPUT).read_to_end(&mut text);
                }
                String::from_utf8_lossy(&text).into_owned()
            }
        };
        let out = collect(stdout.map(|pipe| Box::new(pipe) as Box<dyn Read + Send>));
        let err = collect(stderr.map(|pipe| Box::new(pipe) as Box<dyn Read + Send>));
        thread::scope(|scope| {
            let (out, err) = (scope.spawn(out), scope.spawn(err));
            if let (Some(mut stdin), Some(input)) = (stdin, input) {
                // A command that ends early says why by itself. Rules are far smaller than a pipe.
                let _ = stdin.write_all(input.as_bytes());
            }
            let end = Instant::now() + LIMIT;
            let status = loop {
                match child.try_wait().map_err(|e| failure(e.to_string()))? {
                    Some(status) => break status,
                    None if Instant::now() >= end => {
                        // It may just have ended; either way it is reaped, and its pipes are closed.
                        let _ = child.kill();
                        let _ = child.wait();
                        return Err(failure(format!("not done after {LIMIT:?}; is another program holding the lock?")));
                    }
                    None => thread::sleep(LOOK),
                }
            };
            let (out, err) = (out.join().unwrap_or_default(), err.join().unwrap_or_default());
            if status.success() {
                Ok(out)
            } else {
                let words = err.lines().map(str::trim).filter(|line| !line.is_empty()).collect::<Vec<_>>().join(" ");
                Err(failure(if words.is_empty() { status.to_string() } else { words }))
            }
        })
    }
}

impl Tools {
    /// The tool's name, for people.
    pub(super) fn name(&self) -> String {
        match self.backend {
            Backend::Nft => format!("{}-nft", program(self.family)),
            Backend::Legacy => format!("{}-legacy", program(self.family)),
        }
    }

    /// The nat table as text.
    pub(super) fn save(&self, runner: &Runner) -> Result<String, Failure> {
        let mut command = self.save.clone();
        command.extend(["-t".into(), "nat".into()]);
        runner.run(&command, None)
    }

    /// Makes changes in one transaction.
    pub(super) fn restore(&self, runner: &Runner, input: &str, wait: bool) -> Result<(), Failure> {
        runner.run(&self.restore_command(wait), Some(input)).map(drop)
    }

    /// The command line of [`Tools::restore`].
    pub(super) fn restore_line(&self, runner: &Runner, wait: bool) -> String {
        runner.line(&self.restore_command(wait)).join(" ")
    }

    fn restore_command(&self, wait: bool) -> Vec<String> {
        let mut command = self.restore.clone();
        command.push("--noflush".into());
        if wait {
            command.push("-w".into());
        }
        command
    }

    /// Whether there can be rules at all. Only looking into legacy tables would make them where there are none.
    pub(super) fn may_hold_rules(&self, runner: &Runner) -> bool {
        let names = match (self.backend, self.family) {
            (Backend::Nft, _) => return true,
            (Backend::Legacy, Family::V4) => "/proc/net/ip_tables_names",
            (Backend::Legacy, Family::V6) => "/proc/net/ip6_tables_names",
        };
        let text = if runner.prefix.is_empty() {
            fs::read_to_string(names).unwrap_or_default()
        } else {
            runner.run(&["cat".into(), names.into()], None).unwrap_or_default()
        };
        text.lines().any(|table| table.trim() == "nat")
    }
}

fn program(family: Family) -> &'static str {
    match family {
        Family::V4 => "iptables",
        Family::V6 => "ip6tables",
    }
}
