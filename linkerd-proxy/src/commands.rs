//! What each command does: arguments in, exit code out. The work itself is linkerd-app's.

use crate::{
    cli::{Await, Check, Cli, Command, Identity, Mesh, Redirect, Run, Validate},
    memory, runtime, secrecy,
};
use clap::Parser;
use linkerd_app::{
    app::{App, Home, Parts},
    await_ready,
    config::{
        self, Config,
        env::{self as environment, Class, Invalid, Process},
        syntax,
    },
    redirect,
    standalone::{self, Standalone},
    telemetry::{
        Telemetry,
        access::{self, AccessLog},
        log,
    },
    validate,
};
use std::{
    ffi::OsString,
    future::Future,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
    time::Duration,
};
use tokio::{
    runtime::Runtime,
    signal::unix::{SignalKind, signal},
    sync::mpsc,
};

/// Bad configuration or arguments (`EX_USAGE`, contract.md 3.2).
const EXIT_USAGE: u8 = 64;

/// Runs the command that the arguments name. Without any this is the Linkerd proxy.
pub(crate) fn dispatch(args: impl Iterator<Item = OsString>) -> ExitCode {
    let cli = match Cli::try_parse_from(args) {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version are no failures, and go to stdout.
            let failed = error.use_stderr();
            let _ = error.print();
            return if failed { EXIT_USAGE.into() } else { ExitCode::SUCCESS };
        }
    };
    match cli.command {
        None => linkerd(),
        Some(Command::Run(args)) => run(args),
        Some(Command::Check(args)) => check(args),
        Some(Command::Identity(Identity::Init { dir, trust_domain, force })) => {
            identity_init(&dir, trust_domain, force)
        }
        Some(Command::Redirect(args)) => redirect(args),
        Some(Command::Await(args)) => await_ready(args),
        Some(Command::Validate(args)) => validate(args),
    }
}

/// The Linkerd proxy: everything from the environment.
pub(crate) fn linkerd() -> ExitCode {
    let process = environment::process(&|name| std::env::var_os(name));
    let log = match init_log(&process) {
        Ok(log) => log,
        Err(code) => return code,
    };
    let config = match read_environment(environment::Mode::Linkerd) {
        Ok(config) => config,
        Err(code) => {
            if std::env::var_os("LINKERD2_PROXY_DESTINATION_SVC_ADDR").is_none() {
                eprintln!("Without a cluster: linkerd-proxy run --help");
            }
            return code;
        }
    };
    match runtime::traffic(&process) {
        Ok(traffic) => serve(config, Home::Linkerd, log, &process, traffic),
        Err(error) => failure(&format!("cannot start the runtime: {error}")),
    }
}

/// The proxy beside a workload of a folder of manifests.
fn run(args: Run) -> ExitCode {
    let process = environment::process(&|name| std::env::var_os(name));
    let log = match init_log(&process) {
        Ok(log) => log,
        Err(code) => return code,
    };
    let mut config = match read_environment(environment::Mode::Standalone { explicit: true }) {
        Ok(config) => config,
        Err(code) => return code,
    };
    let Some((namespace, name)) = args.workload.split_once('/').filter(|(ns, name)| !ns.is_empty() && !name.is_empty())
    else {
        return usage(&format!("--workload {:?}: expected NAMESPACE/POD", args.workload));
    };
    let (folders, settings) = match mesh(args.manifests, &args.mesh, &config) {
        Ok(mesh) => mesh,
        Err(why) => return usage(&why),
    };
    let traffic = match runtime::traffic(&process) {
        Ok(traffic) => traffic,
        Err(error) => return failure(&format!("cannot start the runtime: {error}")),
    };
    let started = traffic.block_on(async {
        Standalone::start(standalone::Options {
            folders,
            namespace: namespace.into(),
            name: name.into(),
            settings,
            watch: true,
        })
    });
    let (standalone, workload) = match started {
        Ok(started) => started,
        Err(error) => return failure(&error.to_string()),
    };
    let Some(server_name) = workload.identity.to_server_name() else {
        return failure(&format!("the workload's identity, {}, is no DNS name", workload.identity));
    };
    config.identity = Some(config::Identity {
        id: workload.identity.clone(),
        server_name,
        issuer: config::Issuer::Folder(args.identity),
        min_refresh: MIN_REFRESH,
        max_refresh: MAX_REFRESH,
    });
    if config.inbound.ips.is_empty() {
        config.inbound.ips = Arc::new(workload.addresses.iter().copied().collect());
    }
    config.inbound.ports.extend(workload.ports.iter().map(|(port, _)| *port));
    serve(config, Home::Standalone(standalone), log, &process, traffic)
}

/// Bounds on the time between certifications where the environment says nothing (contract.md 1.7).
const MIN_REFRESH: Duration = Duration::from_secs(10);
const MAX_REFRESH: Duration = Duration::from_secs(24 * 60 * 60);

/// How long the end of the tasks that are left is waited for.
const CUT: Duration = Duration::from_secs(1);

fn serve(config: Config, home: Home, log: log::Handle, process: &Process, traffic: Runtime) -> ExitCode {
    if !config.core_dumps {
        secrecy::keep();
    }
    memory::small_pages();
    let telemetry = Telemetry::new(config.metrics);
    let env = std::env::vars_os().filter_map(|(k, v)| Some((k.into_string().ok()?, v.into_string().ok()?))).collect();
    let access_log = match access_log(process, &telemetry) {
        Ok(access_log) => access_log,
        Err(error) => return failure(&format!("access log: {error}")),
    };
    let daemon = match runtime::daemon() {
        Ok(daemon) => daemon,
        Err(error) => return failure(&format!("cannot start the admin runtime: {error}")),
    };
    let beside = daemon.handle().clone();
    let parts = Parts { config, home, telemetry, access_log: access_log.clone(), log, env, beside };
    let built = {
        let _entered = traffic.enter();
        (App::build(parts), signals())
    };
    let (app, beside, signals) = match built {
        (Ok((app, beside)), Ok(signals)) => (app, beside, signals),
        (Err(error), _) => {
            let fault =
                error.fault().map(|fault| invalid(&Invalid { class: Class::InvalidVariable, faults: vec![fault] }));
            return fault.unwrap_or_else(|| failure(&error.to_string()));
        }
        (_, Err(error)) => return failure(&format!("cannot handle signals: {error}")),
    };
    let thread = std::thread::Builder::new().name("admin".into());
    if let Err(error) = thread.spawn(move || daemon.block_on(beside.run())) {
        return failure(&format!("cannot start the admin thread: {error}"));
    }
    traffic.block_on(app.serve(signals));
    // What is cut has its line in the access log, too.
    traffic.shutdown_timeout(CUT);
    access_log.flush();
    ExitCode::SUCCESS
}

/// The names of the signals that ask the process to stop, as they arrive.
fn signals() -> std::io::Result<mpsc::Receiver<&'static str>> {
    let (mut term, mut int) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let (tx, rx) = mpsc::channel(1);
    tokio::spawn(async move {
        loop {
            let name = tokio::select! {
                _ = term.recv() => "SIGTERM",
                _ = int.recv() => "SIGINT",
            };
            if tx.send(name).await.is_err() {
                return;
            }
        }
    });
    Ok(rx)
}

fn init_log(process: &Process) -> Result<log::Handle, ExitCode> {
    match log::init(process.log.as_deref(), log::Format::parse(&process.log_format)) {
        Ok(handle) => {
            tracing::info!(
                "{} {} {} ({})",
                if cfg!(debug_assertions) { "debug" } else { "release" },
                option_env!("LINKERD_PROXY_VERSION").unwrap_or(env!("CARGO_PKG_VERSION")),
                option_env!("LINKERD_PROXY_GIT_SHA").filter(|sha| !sha.is_empty()).unwrap_or("unknown"),
                env!("CARGO_PKG_NAME"),
            );
            warn(&process.warnings);
            Ok(handle)
        }
        Err(error) => {
            eprintln!("Invalid logging configuration: {error}");
            Err(EXIT_USAGE.into())
        }
    }
}

fn access_log(process: &Process, telemetry: &Telemetry) -> std::io::Result<AccessLog> {
    let Some(format) = &process.access_log else { return Ok(AccessLog::off()) };
    match format.parse::<access::Format>() {
        Ok(format) => AccessLog::start(format, telemetry.access_log_drops()),
        Err(error) => {
            eprintln!("LINKERD2_PROXY_ACCESS_LOG: {error}; the access log stays off");
            Ok(AccessLog::off())
        }
    }
}

fn read_environment(mode: environment::Mode) -> Result<Config, ExitCode> {
    let names = std::env::vars_os().filter_map(|(name, _)| name.into_string().ok());
    match environment::parse(&|name| std::env::var_os(name), names, mode) {
        Ok(parsed) => {
            warn(&parsed.warnings);
            Ok(parsed.config)
        }
        Err(error) => Err(invalid(&error)),
    }
}

fn warn(warnings: &[String]) {
    for warning in warnings {
        tracing::warn!(target: "linkerd_app::env", "{warning}");
    }
}

/// Says what is wrong with the environment, in the log and on stderr.
fn invalid(error: &Invalid) -> ExitCode {
    for fault in &error.faults {
        tracing::error!(target: "linkerd_app::env", "{fault}");
    }
    eprintln!("Invalid configuration: {error}");
    EXIT_USAGE.into()
}

/// The folders of all clusters, and what is said of ours.
fn mesh(
    own: Vec<PathBuf>,
    args: &Mesh,
    config: &Config,
) -> Result<(Vec<standalone::Folder>, standalone::Settings), String> {
    let mut folders: Vec<_> = own.into_iter().map(|path| standalone::Folder { path, cluster: None }).collect();
    for text in &args.clusters {
        folders.push(cluster(text).map_err(|why| format!("--cluster {text:?}: {why}"))?);
    }
    Ok((folders, settings(args, config)?))
}

/// `NAME=DIR[,trust-domain=NAME][,cluster-domain=NAME][,control-plane-namespace=NAME]`
fn cluster(text: &str) -> Result<standalone::Folder, String> {
    let mut parts = text.split(',');
    let first = parts.next().and_then(|first| first.split_once('='));
    let (name, dir) =
        first.filter(|(name, dir)| !name.is_empty() && !dir.is_empty()).ok_or("expected NAME=DIR at its start")?;
    let mut cluster = standalone::Cluster { name: name.into(), ..standalone::Cluster::default() };
    for part in parts {
        match part.split_once('=') {
            Some(("trust-domain", value)) => cluster.trust_domain = Some(value.into()),
            Some(("cluster-domain", value)) => cluster.cluster_domain = Some(value.into()),
            Some(("control-plane-namespace", value)) => cluster.control_plane_namespace = Some(value.into()),
            _ => return Err(format!("{part:?} is none of trust-domain=, cluster-domain=, control-plane-namespace=")),
        }
    }
    Ok(standalone::Folder { path: dir.into(), cluster: Some(cluster) })
}

/// What flags and environment say, over Linkerd's defaults.
fn settings(args: &Mesh, config: &Config) -> Result<standalone::Settings, String> {
    let mut settings = standalone::Settings {
        trust_domain: args.trust_domain.as_str().into(),
        cluster_domain: args.cluster_domain.as_str().into(),
        control_plane_namespace: args.control_plane_namespace.as_str().into(),
        egress_namespace: args.global_egress_network_namespace.as_str().into(),
        l5d_headers: args.allow_l5d_request_headers,
        prefer_ipv6: args.prefer_ipv6,
        default_policy: config.inbound.default_policy,
        inbound_detect_timeout: config.inbound.detect_timeout,
        outbound_detect_timeout: config.outbound.detect_timeout,
        ..standalone::Settings::default()
    };
    if !config.inbound.cluster_networks.is_empty() {
        settings.cluster_networks = config.inbound.cluster_networks.clone();
    }
    if !config.inbound.opaque_ports.is_empty() {
        settings.opaque_ports = config.inbound.opaque_ports.clone();
    }
    if !args.probe_networks.is_empty() {
        settings.probe_networks = args.probe_networks.clone();
    }
    for range in &args.service_ranges {
        match range.parse() {
            Ok(ipnet::IpNet::V4(net)) => settings.service_range.v4 = net,
            Ok(ipnet::IpNet::V6(net)) => settings.service_range.v6 = net,
            Err(_) => return Err(format!("--service-range {range:?}: expected CIDR notation like 10.96.0.0/12")),
        }
    }
    Ok(settings)
}

fn check(args: Check) -> ExitCode {
    let config = match read_environment(environment::Mode::Standalone { explicit: true }) {
        Ok(config) => config,
        Err(code) => return code,
    };
    let (folders, settings) = match mesh(args.dirs, &args.mesh, &config) {
        Ok(mesh) => mesh,
        Err(why) => return usage(&why),
    };
    let report = standalone::check_with(&folders, &settings);
    println!("{report}");
    if report.errors() > 0 { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

fn identity_init(dir: &Path, trust_domain: String, overwrite: bool) -> ExitCode {
    let init = linkerd_app::identity::Init { trust_domain, overwrite, ..Default::default() };
    match linkerd_app::identity::init(dir, &init) {
        Ok(files) => {
            for file in files {
                println!("wrote {}", file.display());
            }
            ExitCode::SUCCESS
        }
        Err(error) => failure(&format!("identity init: {error}")),
    }
}

/// Defaults of our own, before the flags that were given: the last value of a flag counts.
const REDIRECT_DEFAULTS: &[&str] =
    &["--incoming-proxy-port=4143", "--outgoing-proxy-port=4140", "--proxy-uid=2102", "--use-wait-flag"];

fn redirect(args: Redirect) -> ExitCode {
    let defaults = REDIRECT_DEFAULTS.iter().map(ToString::to_string);
    // Lists add up, so they have a default only where none is given.
    let given = |name: &str| args.flags.iter().any(|flag| flag.split('=').next() == Some(name));
    let lists =
        (!given("--inbound-ports-to-ignore")).then(|| "--inbound-ports-to-ignore=4190,4191,4567,4568".to_string());
    let skips = (!given("--outbound-ports-to-ignore")).then(|| "--outbound-ports-to-ignore=4567,4568".to_string());
    let flags = defaults.chain(lists).chain(skips).chain(args.flags.iter().cloned());
    let action = match (args.undo, args.check, args.dry_run) {
        (true, ..) => Some(redirect::Action::Undo),
        (_, true, _) => Some(redirect::Action::Check),
        (_, _, true) => Some(redirect::Action::DryRun),
        _ => None,
    };
    apply_rules(flags, action)
}

/// The original init program, under its own name and flags.
pub(crate) fn init(args: Vec<OsString>) -> ExitCode {
    apply_rules(args.into_iter().map(|arg| arg.to_string_lossy().into_owned()), None)
}

fn apply_rules(flags: impl Iterator<Item = String>, action: Option<redirect::Action>) -> ExitCode {
    let flags = match redirect::parse_init_flags(flags) {
        Ok(flags) => flags,
        Err(error) => return failure(&format!("redirect: {error}")),
    };
    for ignored in &flags.ignored {
        eprintln!("{ignored} has no effect");
    }
    let mut options = flags.options;
    if let Some(action) = action {
        options.action = action;
    }
    match redirect::run(&options) {
        Ok(report) => {
            print!("{report}");
            if report.is_as_asked(options.action) { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
        Err(error) => failure(&format!("redirect: {error}")),
    }
}

fn await_ready(args: Await) -> ExitCode {
    let duration = |name: &str, text: &str| syntax::duration(text).map_err(|why| format!("--{name} {text:?}: {why}"));
    let (backoff, timeout) =
        match (duration("backoff", &args.backoff), args.timeout.as_deref().map(|t| duration("timeout", t)).transpose())
        {
            (Ok(backoff), Ok(timeout)) => (backoff, timeout),
            (Err(why), _) | (_, Err(why)) => return usage(&why),
        };
    let set = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
    block_on(await_ready::run(await_ready::Options {
        address: args.address,
        port: args.port,
        backoff,
        timeout,
        timeout_fatal: args.timeout_fatal,
        shutdown: args.shutdown,
        disabled: set("LINKERD_AWAIT_DISABLED").or_else(|| set("LINKERD_DISABLED")),
        verbose: set("LINKERD_AWAIT_VERBOSE").is_some(),
        command: args.command,
    }))
}

fn validate(args: Validate) -> ExitCode {
    let timeout = match syntax::duration(&args.timeout) {
        Ok(timeout) => timeout,
        Err(why) => return usage(&format!("--timeout {:?}: {why}", args.timeout)),
    };
    block_on(validate::run(validate::Options { listen: args.listen_addr, connect: args.connect_addr, timeout }))
}

fn block_on(work: impl Future<Output = u8>) -> ExitCode {
    match runtime::daemon() {
        Ok(runtime) => runtime.block_on(work).into(),
        Err(error) => failure(&format!("cannot start the runtime: {error}")),
    }
}

fn usage(why: &str) -> ExitCode {
    eprintln!("Invalid configuration: {why}");
    EXIT_USAGE.into()
}

fn failure(why: &str) -> ExitCode {
    eprintln!("Initialization failure: {why}");
    ExitCode::FAILURE
}
