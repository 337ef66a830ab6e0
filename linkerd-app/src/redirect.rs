//! Redirects a pod's or machine's TCP traffic to the proxy with rules in the `nat` table (contract.md section 6), for
//! IPv4 and IPv6, and takes them away again.
//!
//! The rules stand in two chains of our own; every other rule of the host is left alone. One family's rules go in, or
//! out, in one transaction of `iptables-restore --noflush`, so that no packet meets half of them. The tools come as `nft`,
//! `legacy` and plain: the first that works on this host is used, and rules left in another are removed.

mod command;
mod flags;
mod rules;

use self::{
    command::{Runner, Tools},
    rules::{INBOUND_CHAIN, OUTBOUND_CHAIN, Saved},
};
pub use self::{
    flags::{InitFlags, parse_init_flags},
    rules::{Family, PortRange, parse_ports, parse_subnets},
};
use ipnet::IpNet;
use std::{fmt, path::PathBuf, time::Duration};

/// What to redirect. [`Options::default`] is what the injector asks for: every inbound port but the proxy's own, every
/// outbound port, IPv4 and IPv6.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// What to do.
    pub action: Action,
    /// The proxy's inbound port.
    pub inbound_port: u16,
    /// The proxy's outbound port.
    pub outbound_port: u16,
    /// User whose own traffic is left alone. None or 0 makes no such rule: the proxy's connections would come back to
    /// it.
    pub uid: Option<u32>,
    /// Group whose own traffic is left alone; none or 0 makes no rule.
    pub gid: Option<u32>,
    /// Inbound ports to redirect; empty = all.
    pub inbound_ports: Vec<u16>,
    /// Inbound ports to leave alone.
    pub inbound_ports_to_ignore: Vec<PortRange>,
    /// Outbound ports to leave alone.
    pub outbound_ports_to_ignore: Vec<PortRange>,
    /// Sources whose inbound traffic is left alone; each applies to its own family.
    pub subnets_to_ignore: Vec<IpNet>,
    /// Network namespace to work in, such as `/var/run/netns/NAME`; none = this process's own.
    pub netns: Option<PathBuf>,
    /// Wait for the lock that other users of iptables hold, instead of failing.
    pub wait: bool,
    /// Sets how long the kernel remembers half-closed connections first; needs more privileges than the rules do.
    pub close_wait_timeout: Option<Duration>,
    /// Which tools to try first; the others follow.
    pub mode: Option<Mode>,
    /// Whether IPv6 is redirected too, if the kernel has it.
    pub ipv6: bool,
}

/// What to do.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Put the rules in force, or leave them if they are.
    Apply,
    /// Take them away.
    Undo,
    /// Say whether exactly these rules are in force.
    Check,
    /// Say what would be done.
    DryRun,
}

/// Kinds of iptables tools.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Mode {
    /// `iptables-nft`.
    Nft,
    /// `iptables`, whatever the host means by it.
    Plain,
    /// `iptables-legacy`.
    Legacy,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            action: Action::Apply,
            inbound_port: 4143,
            outbound_port: 4140,
            uid: Some(2102),
            gid: None,
            inbound_ports: Vec::new(),
            inbound_ports_to_ignore: vec![PortRange::single(4190), PortRange::single(4191)],
            outbound_ports_to_ignore: Vec::new(),
            subnets_to_ignore: Vec::new(),
            netns: None,
            wait: true,
            close_wait_timeout: None,
            mode: None,
            ipv6: true,
        }
    }
}

/// Why the rules are not as asked for.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// An item of a list of ports.
    #[error("{list}: {item:?} is no port or range; expected a list such as 25,3306,4567-4568 within 1-65535")]
    Ports {
        /// Which list.
        list: &'static str,
        /// The item.
        item: String,
    },
    /// An item of a list of networks.
    #[error("{list}: {item:?} is no network; expected CIDRs such as 10.0.0.0/8,fd00::/8")]
    Subnet {
        /// Which list.
        list: &'static str,
        /// The item.
        item: String,
    },
    /// A port of the proxy's own.
    #[error("{0}: the proxy's port must be within 1-65535")]
    ProxyPort(&'static str),
    /// A command line of the original init program that can't be understood.
    #[error("{flag}: {problem}")]
    Flag {
        /// The flag.
        flag: String,
        /// What is wrong.
        problem: String,
    },
    /// No kind of tools is installed.
    #[error("found none of {tried}; install iptables (with its nft or legacy tools)")]
    NoTools {
        /// What was looked for.
        tried: String,
    },
    /// A command of another kind is missing.
    #[error("{0} is not installed; it is needed to work in another network namespace")]
    NoCommand(String),
    /// Privileges are missing.
    #[error("{command}: {message}; run as root, or give this process CAP_NET_ADMIN and CAP_NET_RAW")]
    Privileges {
        /// The command.
        command: String,
        /// Its words.
        message: String,
    },
    /// Every kind of tools that is installed failed.
    #[error("{family}: no installed tool could do it: {failures}")]
    Failed {
        /// Which family.
        family: Family,
        /// What each said.
        failures: String,
    },
    /// A setting of the kernel could not be changed.
    #[error(
        "nf_conntrack_tcp_timeout_close_wait: {0}; this needs a privileged container run as root, or leave the \
             timeout as it is"
    )]
    CloseWait(String),
}

/// What was done, or found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// One per address family.
    pub families: Vec<FamilyReport>,
    /// What the operator should know.
    pub warnings: Vec<String>,
}

/// What was done, or found, for one address family.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FamilyReport {
    /// Which family.
    pub family: Family,
    /// What came of it.
    pub outcome: Outcome,
}

/// What came of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The rules were put in force by this tool.
    Applied(String),
    /// They were in force already.
    InForce(String),
    /// They were taken away by these tools.
    Removed(Vec<String>),
    /// There is none of them.
    Absent,
    /// Rules are there, and differ: lines that are missing and lines that should not be there, as `- ` and `+ `.
    Differs(Vec<String>),
    /// What would be fed to this tool.
    DryRun {
        /// The tool.
        tool: String,
        /// Its input.
        input: String,
    },
}

impl Report {
    /// Whether everything is as it was asked for; false only for checks.
    pub fn is_as_asked(&self, action: Action) -> bool {
        match action {
            Action::Apply | Action::Undo | Action::DryRun => true,
            Action::Check => self.families.iter().all(|f| matches!(f.outcome, Outcome::InForce(_))),
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for warning in &self.warnings {
            writeln!(f, "warning: {warning}")?;
        }
        for FamilyReport { family, outcome } in &self.families {
            match outcome {
                Outcome::Applied(tool) => writeln!(f, "{family}: redirected ({tool})")?,
                Outcome::InForce(tool) => writeln!(f, "{family}: in force ({tool})")?,
                Outcome::Removed(tools) => writeln!(f, "{family}: removed ({})", tools.join(", "))?,
                Outcome::Absent => writeln!(f, "{family}: no rules of ours")?,
                Outcome::Differs(lines) => {
                    writeln!(f, "{family}: the rules differ from what was asked for")?;
                    lines.iter().try_for_each(|line| writeln!(f, "  {line}"))?;
                }
                Outcome::DryRun { tool, input } => write!(f, "# {family}: {tool}\n{input}")?,
            }
        }
        Ok(())
    }
}

/// Does what the options ask for. Blocks while the tools run.
///
/// # Errors
/// When tools or privileges are missing or every tool fails. A family that failed is as it was before; if IPv6 fails after
/// IPv4 was newly put in force, IPv4 is taken back.
pub fn run(options: &Options) -> Result<Report, Error> {
    for (name, port) in [("inbound port", options.inbound_port), ("outbound port", options.outbound_port)] {
        if port == 0 {
            return Err(Error::ProxyPort(name));
        }
    }
    let runner = Runner::new(options.netns.clone())?;
    let mut warnings = warnings(options);
    let mut families = vec![Family::V4];
    if options.ipv6 {
        if command::kernel_has_ipv6() {
            families.push(Family::V6);
        } else {
            warnings.push("this kernel has no IPv6; only IPv4 is redirected".into());
        }
    }
    if let (Some(timeout), Action::Apply) = (options.close_wait_timeout, options.action) {
        runner.set_close_wait_timeout(timeout)?;
    }
    let mut reports: Vec<FamilyReport> = Vec::new();
    for family in families {
        match one(options, family, &runner) {
            Ok(outcome) => reports.push(FamilyReport { family, outcome }),
            Err(error) => {
                for done in reports.iter().filter(|r| matches!(r.outcome, Outcome::Applied(_))) {
                    // The error at hand says more than a failure to clean up after it would.
                    let _ = undo(options, done.family, &runner);
                }
                return Err(error);
            }
        }
    }
    Ok(Report { families: reports, warnings })
}

fn warnings(options: &Options) -> Vec<String> {
    let mut warnings = Vec::new();
    if matches!(options.action, Action::Apply | Action::DryRun) && options.uid.is_none_or(|uid| uid == 0) {
        warnings.push(
            "no user id above 0 is exempt, so the proxy's own connections will be redirected back to it; run the proxy as \
             a user of its own and name that user"
                .into(),
        );
    }
    warnings
}

fn one(options: &Options, family: Family, runner: &Runner) -> Result<Outcome, Error> {
    match options.action {
        Action::Apply => apply(options, family, runner),
        Action::Undo => undo(options, family, runner),
        Action::Check => check(options, family, runner),
        Action::DryRun => dry_run(options, family, runner),
    }
}

/// Tries one kind of tools after the other; the first that takes the rules wins.
fn apply(options: &Options, family: Family, runner: &Runner) -> Result<Outcome, Error> {
    let wanted = rules::chains(options, family);
    let mut failures = Vec::new();
    let mut applied = None;
    for tools in runner.tools(family, options.mode)? {
        let result = (|| {
            let saved = Saved::parse(&tools.save(runner)?);
            if rules::differences(&wanted, &saved).is_empty() {
                return Ok(Outcome::InForce(tools.name()));
            }
            tools.restore(runner, &rules::apply(&wanted, &saved), options.wait)?;
            // A tool may accept rules that the kernel does not keep; only what is read back counts.
            let missing = rules::differences(&wanted, &Saved::parse(&tools.save(runner)?));
            match &missing[..] {
                [] => Ok(Outcome::Applied(tools.name())),
                lines => Err(command::Failure::new(tools.name(), format!("rules were not kept: {}", lines.join("; ")))),
            }
        })();
        match result {
            Ok(outcome) => {
                applied = Some((tools, outcome));
                break;
            }
            Err(failure) => failures.push(failure),
        }
    }
    let Some((tools, outcome)) = applied else {
        return Err(command::no_success(family, failures));
    };
    for failure in failures {
        tracing::warn!(%family, %failure, "Another tool had to be used");
    }
    // Rules of an earlier run with other tools would redirect twice, or to where nobody listens any more.
    for other in runner.tools(family, options.mode)?.into_iter().filter(|other| other.backend != tools.backend) {
        if let Err(failure) = remove(&other, runner, options.wait) {
            tracing::warn!(%family, %failure, "Could not look for rules left by other tools");
        }
    }
    Ok(outcome)
}

fn undo(options: &Options, family: Family, runner: &Runner) -> Result<Outcome, Error> {
    let (mut removed, mut failures, mut looked) = (Vec::new(), Vec::new(), false);
    for tools in runner.tools(family, options.mode)? {
        match remove(&tools, runner, options.wait) {
            Ok(there) => {
                looked = true;
                removed.extend(there.then(|| tools.name()));
            }
            Err(failure) => failures.push(failure),
        }
    }
    // A tool that this kernel does not support holds no rules; one that we may not use can hold some.
    if !looked || failures.iter().any(command::Failure::lacks_privileges) {
        return Err(command::no_success(family, failures));
    }
    Ok(if removed.is_empty() { Outcome::Absent } else { Outcome::Removed(removed) })
}

/// Takes our chains away; false if there were none.
fn remove(tools: &Tools, runner: &Runner, wait: bool) -> Result<bool, command::Failure> {
    if !tools.may_hold_rules(runner) {
        return Ok(false);
    }
    let saved = Saved::parse(&tools.save(runner)?);
    match rules::undo(&saved) {
        Some(input) => tools.restore(runner, &input, wait).map(|()| true),
        None => Ok(false),
    }
}

fn check(options: &Options, family: Family, runner: &Runner) -> Result<Outcome, Error> {
    let wanted = rules::chains(options, family);
    let (mut found, mut failures, mut looked) = (None, Vec::new(), false);
    for tools in runner.tools(family, options.mode)? {
        if !tools.may_hold_rules(runner) {
            continue;
        }
        match tools.save(runner).map(|text| Saved::parse(&text)) {
            Ok(saved) => {
                looked = true;
                let differences = rules::differences(&wanted, &saved);
                if differences.is_empty() {
                    return Ok(Outcome::InForce(tools.name()));
                }
                if saved.has(INBOUND_CHAIN) || saved.has(OUTBOUND_CHAIN) {
                    found.get_or_insert(differences);
                }
            }
            Err(failure) => failures.push(failure),
        }
    }
    match (found, looked) {
        (Some(differences), _) => Ok(Outcome::Differs(differences)),
        (None, true) => Ok(Outcome::Absent),
        (None, false) => Err(command::no_success(family, failures)),
    }
}

/// What would be done on a host without any rules; needs neither tools nor privileges.
fn dry_run(options: &Options, family: Family, runner: &Runner) -> Result<Outcome, Error> {
    let input = rules::apply(&rules::chains(options, family), &Saved::default());
    let tool = match runner.tools(family, options.mode) {
        Ok(tools) => tools.first().map(|tools| tools.restore_line(runner, options.wait)),
        Err(_) => None,
    };
    let tool = tool.unwrap_or_else(|| "no iptables tools are installed here".into());
    Ok(Outcome::DryRun { tool, input })
}

#[cfg(test)]
mod tests;
