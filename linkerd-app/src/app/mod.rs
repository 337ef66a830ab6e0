//! A whole proxy: its parts joined, its sockets bound, its life from the first certificate to the end of the drain.
//!
//! Two threads: traffic (one runtime, one worker per core) and the daemon (admin and tap servers, identity), so that a busy
//! data path never delays a probe or a renewal. The order of starting is contract.md 3.1, that of stopping 3.4, but
//! for what is better here: outbound stays open while inbound drains, the admin server stays until the end, and a
//! second signal ends the process at once.

mod watch;

use crate::{
    admin::{self, Admin, Panels},
    config::{self, Config, env::Fault},
    control::{self, Control, ControlService, certify::Certifier, spire, traces::Exporter},
    gateway::Gateway,
    http::settings,
    identity::{self, Task, documents::Error as Documents},
    inbound::Inbound,
    outbound::Outbound,
    policy::Source,
    standalone::Standalone,
    tap,
    telemetry::{Telemetry, TlsInfo, access::AccessLog, log, trace, watchdog::Watchdog},
    transport::{self, BindError, BoundListener},
};
use linkerd_stack::{Ready, drain};
use linkerd_tls::identity::Reader;
use std::{collections::BTreeMap, sync::Arc, time::Duration};
use tokio::{
    runtime::Handle,
    select,
    sync::mpsc,
    time::{Instant, timeout_at},
};

/// A head start for the answer to `POST /shutdown`, which another thread sends: an idle proxy drains in no time, and the
/// process would end with the answer unsent.
const ANSWER: Duration = Duration::from_millis(50);

/// Which control plane the proxy listens to.
pub enum Home {
    /// Linkerd's; `config.control` says where.
    Linkerd,
    /// A folder of manifests.
    Standalone(Arc<Standalone>),
}

/// What a proxy is built from.
pub struct Parts {
    /// What the operator asked for.
    pub config: Config,
    /// Who tells it the truth.
    pub home: Home,
    /// Metrics.
    pub telemetry: Telemetry,
    /// Access log.
    pub access_log: AccessLog,
    /// The log filter.
    pub log: log::Handle,
    /// The environment, for the admin server.
    pub env: BTreeMap<String, String>,
    /// The runtime that [`Daemon::run`] will run on.
    pub beside: Handle,
}

/// Why a proxy can't be built. The process ends with exit code 1, or 64 for an [`InitError::fault`].
#[derive(Debug, thiserror::Error)]
pub enum InitError {
    /// A listener's port can't be had.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// Certificates, keys or trust anchors are unusable.
    #[error(transparent)]
    Identity(#[from] identity::Error),
    /// A part of the configuration that this home needs is absent.
    #[error("the configuration has no {0}")]
    Missing(&'static str),
}

impl InitError {
    /// What the environment names and is unusable, if that is it: the exit code is 64 then (contract.md 1.7).
    pub fn fault(&self) -> Option<Fault> {
        let Self::Identity(error) = self else { return None };
        let fault = |name: &str, value, why| Some(Fault { name: name.into(), value, why });
        match error {
            identity::Error::Token(error) => {
                let path = error.path.display().to_string();
                fault("LINKERD2_PROXY_IDENTITY_TOKEN_FILE", Some(path), error.to_string())
            }
            identity::Error::Documents(error @ (Documents::Read { .. } | Documents::Contents { .. })) => {
                fault("LINKERD2_PROXY_IDENTITY_DIR", None, error.to_string())
            }
            _ => None,
        }
    }
}

/// A proxy with its sockets bound, that serves nothing yet.
pub struct App {
    inbound: (Arc<Inbound>, BoundListener),
    outbound: (Outbound, Vec<BoundListener>),
    telemetry: Telemetry,
    identity: Reader,
    shutdown: mpsc::Receiver<()>,
    grace: Duration,
}

/// What runs beside traffic, on a runtime of its own.
pub struct Daemon {
    identity: Reader,
    certificate: Certificate,
    traces: Option<Exporter>,
    telemetry: Telemetry,
    ready: Ready,
    admin: (admin::Server, BoundListener),
    tap: Option<(tap::Server, BoundListener)>,
    traffic: Handle,
}

/// How the certificate is kept fresh.
enum Certificate {
    Folder(identity::Folder),
    Certify(identity::Certifying, Certifier),
    Spire(spire::Agent, identity::Installer),
}

impl App {
    /// Builds every part and binds every socket. Must be called within the traffic runtime: the source's tasks run
    /// there.
    ///
    /// # Errors
    /// [`InitError`] names what can't be had.
    pub fn build(parts: Parts) -> Result<(Self, Daemon), InitError> {
        let Parts { config, home, telemetry, access_log, log, env, beside } = parts;
        let (identity, task) = identity::prepare(config.identity.as_ref().ok_or(InitError::Missing("identity"))?)?;
        let panels = Panels::default();
        let observer = observer(&config, &telemetry);
        let source = source(home, &config, &identity, &observer, &telemetry, &panels)?;
        let traces = traces(&config, &identity, &observer, &telemetry);
        let certificate = certificate(task, &config, &identity, observer)?;
        let (inbound, outbound) = directions(&config, &identity, source, &telemetry, access_log);
        let listeners = Listeners::bind(&config, &beside)?;
        telemetry.set_tls_info(tls_info());
        telemetry.set_runtime(&Handle::current());
        watch::directions(&inbound, &outbound, &panels);
        watch::identity(&identity, &telemetry, &panels);
        introduce(&config, &identity, &listeners);

        let (ask, shutdown) = mpsc::channel(1);
        let ready = Ready::new(false);
        let admin = Admin::new(admin::Options {
            ready: ready.clone(),
            telemetry: telemetry.clone(),
            log,
            env,
            shutdown: config.admin.shutdown_enabled.then_some(ask),
            panels,
        });
        let server = admin::Server {
            admin,
            guard: inbound.guard().clone(),
            identity: Some(identity.clone()),
            http: settings::server(&config.inbound.http_server),
            telemetry: telemetry.clone(),
        };
        let daemon = Daemon {
            identity: identity.clone(),
            certificate,
            traces,
            telemetry: telemetry.clone(),
            ready,
            admin: (server, listeners.admin),
            tap: tap_server(&config, &identity, &telemetry).zip(listeners.tap),
            traffic: Handle::current(),
        };
        let app = Self {
            inbound: (inbound, listeners.inbound),
            outbound: (outbound, listeners.outbound),
            telemetry,
            identity,
            shutdown,
            grace: config.shutdown_grace_period,
        };
        Ok((app, daemon))
    }

    /// Serves until asked to stop, then drains. `signals` yields the name of each signal that arrives; the first drains,
    /// the second ends at once.
    pub async fn serve(mut self, mut signals: mpsc::Receiver<&'static str>) {
        select! {
            biased;
            () = wait(&mut self.shutdown, &mut signals) => {
                // Nothing is being served, so there is nothing to drain.
                tracing::info!("Shutting down before a certificate was issued");
                return;
            }
            () = identity::first_certificate(&self.identity) => {}
        }
        let (inbound_drain, inbound_watch) = drain::channel();
        let (outbound_drain, outbound_watch) = drain::channel();
        let (outbound, listeners) = (self.outbound.0.clone(), std::mem::take(&mut self.outbound.1));
        let mut tasks = Vec::new();
        for listener in listeners {
            let addr = listener.local_addr();
            let task = tokio::spawn(outbound.clone().serve(listener, outbound_watch.clone()));
            tasks.push((format!("accepting connections on {addr}"), task.abort_handle()));
        }
        drop(outbound_watch);
        let (mut ask, grace, telemetry) = (self.shutdown, self.grace, self.telemetry);
        let (inbound, listener) = self.inbound;
        let addr = listener.local_addr();
        let task = tokio::spawn(inbound.serve(listener, inbound_watch));
        tasks.push((format!("accepting connections on {addr}"), task.abort_handle()));
        let draining = watch::tasks(tasks, &telemetry);

        wait(&mut ask, &mut signals).await;
        draining.set(true);
        let started = Instant::now();
        let deadline = started + grace;
        let drained = async {
            // The application may need to call out to finish what it is serving.
            inbound_drain.drain().await;
            outbound_drain.drain().await;
        };
        select! {
            drained = timeout_at(deadline, drained) => match drained {
                Ok(()) => tracing::debug!(elapsed = ?started.elapsed(), "Drained"),
                Err(_) => tracing::warn!(?grace, "Graceful shutdown timed out; the connections that are left are cut"),
            },
            Some(name) = signals.recv() => tracing::warn!("Received {name} again; the connections that are left are cut"),
        }
        telemetry.cut();
    }
}

/// The sockets that traffic and operators come in by.
struct Listeners {
    inbound: BoundListener,
    outbound: Vec<BoundListener>,
    admin: BoundListener,
    tap: Option<BoundListener>,
}

impl Listeners {
    /// `beside` is the runtime that serves the operators' ports: a socket hears of connections through the runtime in which
    /// it was bound, and operators must be heard while traffic hangs.
    fn bind(config: &Config, beside: &Handle) -> Result<Self, BindError> {
        let inbound = transport::bind(&config.inbound.listen)?;
        let outbound = config.outbound.listen.iter().map(transport::bind).collect::<Result<_, _>>()?;
        let _entered = beside.enter();
        let tap = config.tap.as_ref().map(|tap| transport::bind(&tap.listen)).transpose()?;
        Ok(Self { inbound, outbound, admin: transport::bind(&config.admin.listen)?, tap })
    }
}

/// What counts the calls to the control plane.
fn observer(config: &Config, telemetry: &Telemetry) -> Arc<dyn control::Observer> {
    let mut services = Vec::new();
    if let Some(config::Issuer::Certify { client, .. }) = config.identity.as_ref().map(|identity| &identity.issuer) {
        services.push((ControlService::Identity, client));
    }
    if let Some(control) = &config.control {
        services
            .extend([(ControlService::Destination, &control.destination), (ControlService::Policy, &control.policy)]);
    }
    services.extend(config.traces.iter().map(|traces| (ControlService::TraceCollector, &traces.collector)));
    Arc::new(control::metrics::Metrics::new(telemetry, services))
}

/// Who tells the data plane the truth. Its tasks are started.
fn source(
    home: Home,
    config: &Config,
    identity: &Reader,
    observer: &Arc<dyn control::Observer>,
    telemetry: &Telemetry,
    panels: &Panels,
) -> Result<Arc<dyn Source>, InitError> {
    match home {
        Home::Linkerd => {
            let control = Control::start(control::Start {
                control: config.control.as_ref().ok_or(InitError::Missing("control plane"))?,
                inbound: &config.inbound,
                outbound: &config.outbound,
                admin_port: config.admin.listen.addr.port(),
                is_gateway: !config.gateway.suffixes.0.is_empty(),
                dns: config.dns,
                secure: Arc::new(identity.clone()),
                observer: observer.clone(),
            });
            watch::control(&control, telemetry, panels);
            Ok(control)
        }
        Home::Standalone(standalone) => {
            watch::manifests(&standalone, telemetry, panels);
            Ok(standalone)
        }
    }
}

/// How the certificate will be kept fresh.
fn certificate(
    task: Task,
    config: &Config,
    identity: &Reader,
    observer: Arc<dyn control::Observer>,
) -> Result<Certificate, InitError> {
    match (task, config.identity.as_ref().map(|identity| &identity.issuer)) {
        (Task::Folder(folder), _) => Ok(Certificate::Folder(folder)),
        (Task::Certify(certifying), Some(config::Issuer::Certify { client, token_file, .. })) => {
            let certifier = Certifier::new(
                identity.server_name().clone(),
                token_file.clone(),
                client.clone(),
                connect_to(config, client).clone(),
                config.dns,
                Arc::new(identity.clone()),
                observer,
            );
            Ok(Certificate::Certify(certifying, certifier))
        }
        (Task::Pushed(installer), Some(config::Issuer::Spire { socket, backoff, .. })) => {
            Ok(Certificate::Spire(spire::Agent::new(socket.clone(), identity.id().clone(), *backoff), installer))
        }
        (Task::Certify(_) | Task::Pushed(_), _) => Err(InitError::Missing("issuer for its identity")),
    }
}

/// Switches tracing on if there is a collector.
fn traces(
    config: &Config,
    identity: &Reader,
    observer: &Arc<dyn control::Observer>,
    telemetry: &Telemetry,
) -> Option<Exporter> {
    let traces = config.traces.as_ref()?;
    Some(Exporter {
        spans: telemetry.tracer().start(telemetry.spans().dropped.clone())?,
        resource: trace::resource(traces),
        collector: traces.collector.clone(),
        connect: connect_to(config, &traces.collector).clone(),
        dns: config.dns,
        secure: Arc::new(identity.clone()),
        observer: observer.clone(),
        telemetry: telemetry.clone(),
    })
}

/// Settings of connections to a service of the control plane (contract.md 1.6).
fn connect_to<'a>(config: &'a Config, addr: &config::ControlAddr) -> &'a config::Connect {
    if addr.is_loopback() { &config.inbound.connect } else { &config.outbound.connect }
}

/// The data plane, joined by the gateway.
fn directions(
    config: &Config,
    identity: &Reader,
    source: Arc<dyn Source>,
    telemetry: &Telemetry,
    access_log: AccessLog,
) -> (Arc<Inbound>, Outbound) {
    let outbound = Outbound::new(
        &config.outbound,
        config.inbound.ips.clone(),
        Some(identity.clone()),
        source.clone(),
        telemetry.clone(),
    );
    let gateway = Gateway::new(&config.gateway, identity.id().clone(), Arc::new(outbound.clone()));
    let inbound = Inbound::new(
        &config.inbound,
        gateway,
        Some(identity.clone()),
        source,
        telemetry.clone(),
        access_log,
        config.admin.listen.addr.port(),
    );
    (inbound, outbound)
}

/// Whoever may watch requests pass, if somebody may.
fn tap_server(config: &Config, identity: &Reader, telemetry: &Telemetry) -> Option<tap::Server> {
    config.tap.as_ref().map(|tap| tap::Server {
        taps: telemetry.taps().clone(),
        client: tap.client.clone(),
        identity: identity.clone(),
        http: settings::server(&config.inbound.http_server),
    })
}

/// Ends when the process is asked to stop, by a signal or on the admin port.
async fn wait(ask: &mut mpsc::Receiver<()>, signals: &mut mpsc::Receiver<&'static str>) {
    let signal = select! {
        Some(name) = signals.recv() => Some(name),
        Some(()) = ask.recv() => None,
    };
    // Whoever asks again is told that it has been asked.
    ask.close();
    match signal {
        Some(name) => tracing::info!("Received {name}; draining"),
        None => {
            tracing::info!("Shutdown requested on the admin port; draining");
            tokio::time::sleep(ANSWER).await;
        }
    }
}

impl Daemon {
    /// Serves the admin port and keeps the certificate fresh, for the life of the process.
    pub async fn run(self) {
        let observer = watch::Attempts::watched(&self.telemetry);
        let (admin, listener) = self.admin;
        let mut tasks = vec![("serving the admin port".into(), tokio::spawn(admin.serve(listener)).abort_handle())];
        if let Some((tap, listener)) = self.tap {
            tasks.push(("serving the tap port".into(), tokio::spawn(tap.serve(listener)).abort_handle()));
        }
        let _ = watch::tasks(tasks, &self.telemetry);
        if let Some(traces) = self.traces {
            tokio::spawn(traces.run());
        }
        tokio::spawn(watch::workers(Watchdog::new(&self.traffic), self.telemetry.clone()));
        let (identity, ready) = (self.identity, self.ready);
        tokio::spawn(async move {
            identity.ready().await;
            ready.set(true);
        });
        match self.certificate {
            Certificate::Folder(folder) => folder.run(observer).await,
            Certificate::Certify(certifying, certifier) => certifying.run(certifier, observer).await,
            Certificate::Spire(agent, installer) => spire::run(agent, installer, observer).await,
        }
        // The admin server's tasks belong to this runtime, which ends with this future.
        std::future::pending::<()>().await;
    }
}

/// Contract.md 3.1, step 8.
fn introduce(config: &Config, identity: &Reader, listeners: &Listeners) {
    tracing::info!("Admin interface on {}", listeners.admin.local_addr());
    tracing::info!("Inbound interface on {}", listeners.inbound.local_addr());
    for listener in &listeners.outbound {
        tracing::info!("Outbound interface on {}", listener.local_addr());
    }
    match &listeners.tap {
        Some(listener) => tracing::info!("Tap interface on {}", listener.local_addr()),
        None => tracing::info!("Tap DISABLED"),
    }
    tracing::info!("SNI is {}", identity.server_name());
    tracing::info!("Local identity is {}", identity.id());
    let at = |config::ControlAddr { host, port, identity }: &config::ControlAddr| match identity {
        Some(id) => format!("{host}:{port} ({id})"),
        None => format!("{host}:{port}"),
    };
    if let Some(control) = &config.control {
        tracing::info!("Destinations resolved via {}", at(&control.destination));
    }
    if let Some(traces) = &config.traces {
        tracing::info!("Traces are sent to {}", at(&traces.collector));
    }
}

/// What `rustls_info` tells.
fn tls_info() -> TlsInfo {
    let linkerd_tls::identity::Info { suites, kx_groups, rand, key_provider, fips } = linkerd_tls::identity::info();
    TlsInfo { suites, kx_groups, rand, key_provider, fips }
}
