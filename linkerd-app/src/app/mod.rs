//! A whole proxy: its parts joined, its sockets bound, its life from the first certificate to the end of the drain.
//!
//! Two threads: traffic (one runtime, one worker per core) and the daemon (admin server and identity), so that a busy
//! data path never delays a probe or a renewal. The order of starting is contract.md 3.1, that of stopping 3.4, but
//! for what is better here: outbound stays open while inbound drains, the admin server stays until the end, and a
//! second signal ends the process at once.

use crate::{
    admin::{self, Admin, Panels},
    config::{self, Config},
    control::{self, Control, certify::Certifier, spire},
    gateway::Gateway,
    http::settings,
    identity::{self, Task},
    inbound::Inbound,
    outbound::Outbound,
    policy::Source,
    standalone::Standalone,
    telemetry::{Condition, IdentityMetrics, Telemetry, TlsInfo, access::AccessLog, log, watchdog::Watchdog},
    transport::{self, BindError, BoundListener},
};
use linkerd_stack::{Ready, drain};
use linkerd_tls::identity::Reader;
use parking_lot::Mutex;
use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, SystemTime},
};
use tokio::{
    runtime::Handle,
    select,
    sync::mpsc,
    task::AbortHandle,
    time::{Instant, timeout_at},
};

/// How often the workers are looked at.
const WATCHDOG: Duration = Duration::from_secs(1);

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
}

/// Why a proxy can't be built. The process ends with exit code 1.
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
    telemetry: Telemetry,
    ready: Ready,
    admin: (admin::Server, BoundListener),
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
        let Parts { config, home, telemetry, access_log, log, env } = parts;
        let identity_config = config.identity.clone().ok_or(InitError::Missing("identity"))?;
        let (reader, task) = identity::prepare(&identity_config)?;
        let secure = Arc::new(reader.clone());
        let metrics: Arc<dyn control::Observer> = match (&config.control, &identity_config.issuer) {
            (Some(control), config::Issuer::Certify { client, .. }) => {
                Arc::new(control::metrics::Metrics::new(&telemetry, control, Some(client)))
            }
            (Some(control), _) => Arc::new(control::metrics::Metrics::new(&telemetry, control, None)),
            (None, _) => Arc::new(()),
        };
        let panels = Panels::default();
        let is_gateway = !config.gateway.suffixes.0.is_empty();
        let admin_port = config.admin.listen.addr.port();

        let source: Arc<dyn Source> = match home {
            Home::Linkerd => {
                let control = Control::start(control::Start {
                    control: config.control.as_ref().ok_or(InitError::Missing("control plane"))?,
                    inbound: &config.inbound,
                    outbound: &config.outbound,
                    admin_port,
                    is_gateway,
                    dns: config.dns,
                    secure: secure.clone(),
                    observer: metrics.clone(),
                });
                watch_control(&control, &telemetry, &panels);
                control
            }
            Home::Standalone(standalone) => {
                watch_manifests(&standalone, &telemetry, &panels);
                standalone
            }
        };
        let certificate = match (task, &identity_config.issuer) {
            (Task::Folder(folder), _) => Certificate::Folder(folder),
            (Task::Certify(certifying), config::Issuer::Certify { client, token_file, .. }) => {
                let connect = match &client.identity {
                    Some(_) => &config.outbound.connect,
                    None => &config.inbound.connect,
                };
                let certifier = Certifier::new(
                    reader.server_name().clone(),
                    token_file.clone(),
                    client.clone(),
                    connect.clone(),
                    config.dns,
                    secure,
                    metrics,
                );
                Certificate::Certify(certifying, certifier)
            }
            (Task::Pushed(installer), config::Issuer::Spire { socket, backoff, .. }) => {
                Certificate::Spire(spire::Agent::new(socket.clone(), reader.id().clone(), *backoff), installer)
            }
            (Task::Certify(_) | Task::Pushed(_), _) => return Err(InitError::Missing("issuer for its identity")),
        };

        let outbound = Outbound::new(
            &config.outbound,
            config.inbound.ips.clone(),
            Some(reader.clone()),
            source.clone(),
            telemetry.clone(),
        );
        let gateway = Gateway::new(&config.gateway, reader.id().clone(), Arc::new(outbound.clone()));
        let inbound = Inbound::new(
            &config.inbound,
            gateway,
            Some(reader.clone()),
            source,
            telemetry.clone(),
            access_log,
            admin_port,
        );
        let inbound_listener = transport::bind(&config.inbound.listen)?;
        let outbound_listeners = config.outbound.listen.iter().map(transport::bind).collect::<Result<Vec<_>, _>>()?;
        let admin_listener = transport::bind(&config.admin.listen)?;
        telemetry.set_tls_info(tls_info());
        let shown = outbound.clone();
        panels.add("outbound", move || shown.status());
        let shown = Arc::downgrade(&inbound);
        panels.add("inbound", move || shown.upgrade().map_or(serde_json::Value::Null, |inbound| inbound.status()));
        introduce(&config, &reader, &admin_listener, &inbound_listener, &outbound_listeners);

        let (ask, shutdown) = mpsc::channel(1);
        let ready = Ready::new(false);
        let admin = Admin::new(admin::Options {
            ready: ready.clone(),
            telemetry: telemetry.clone(),
            log,
            env,
            shutdown: config.admin.shutdown_enabled.then_some(ask.clone()),
            panels: panels.clone(),
        });
        watch_identity(&reader, &telemetry, &panels);
        let server = admin::Server {
            admin,
            guard: inbound.guard().clone(),
            identity: Some(reader.clone()),
            http: settings::server(&config.inbound.http_server),
            telemetry: telemetry.clone(),
        };
        let cutting = telemetry.clone();
        let daemon = Daemon {
            identity: reader.clone(),
            certificate,
            telemetry,
            ready,
            admin: (server, admin_listener),
            traffic: Handle::current(),
        };
        let app = Self {
            inbound: (inbound, inbound_listener),
            outbound: (outbound, outbound_listeners),
            telemetry: cutting,
            identity: reader,
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
        let draining = watch_tasks(tasks, &telemetry);

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

/// Ends when the process is asked to stop, by a signal or on the admin port.
async fn wait(ask: &mut mpsc::Receiver<()>, signals: &mut mpsc::Receiver<&'static str>) {
    select! {
        Some(name) = signals.recv() => tracing::info!("Received {name}; draining"),
        Some(()) = ask.recv() => {
            tracing::info!("Shutdown requested on the admin port; draining");
            tokio::time::sleep(ANSWER).await;
        }
    }
}

impl Daemon {
    /// Serves the admin port and keeps the certificate fresh, for the life of the process.
    pub async fn run(self) {
        let observer = Attempts::watched(&self.telemetry);
        let (admin, listener) = self.admin;
        let _ = watch_tasks(
            vec![("serving the admin port".into(), tokio::spawn(admin.serve(listener)).abort_handle())],
            &self.telemetry,
        );
        tokio::spawn(watch_workers(Watchdog::new(&self.traffic), self.telemetry.clone()));
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

/// Counts attempts at a certificate, and remembers why the last one failed.
struct Attempts {
    metrics: Arc<IdentityMetrics>,
    failing: Arc<Mutex<Option<String>>>,
}

impl Attempts {
    /// Its failures are a health condition from now on, until an attempt succeeds.
    fn watched(telemetry: &Telemetry) -> Self {
        let failing = Arc::new(Mutex::new(None));
        let told = failing.clone();
        telemetry.health().add(Condition::CertificateFailing, move || told.lock().clone());
        Self { metrics: telemetry.identity(), failing }
    }
}

impl identity::Observer for Attempts {
    fn refreshed(&self, result: Result<SystemTime, &str>) {
        match result {
            Ok(expiry) => self.metrics.refreshed(expiry),
            Err(_) => self.metrics.failed(),
        }
        *self.failing.lock() = result.err().map(Into::into);
    }
}

/// Contract.md 3.1, step 8.
fn introduce(
    config: &Config,
    identity: &Reader,
    admin: &BoundListener,
    inbound: &BoundListener,
    outbound: &[BoundListener],
) {
    tracing::info!("Admin interface on {}", admin.local_addr());
    tracing::info!("Inbound interface on {}", inbound.local_addr());
    for listener in outbound {
        tracing::info!("Outbound interface on {}", listener.local_addr());
    }
    tracing::info!("SNI is {}", identity.server_name());
    tracing::info!("Local identity is {}", identity.id());
    if let Some(config::Control { destination, .. }) = &config.control {
        let (host, port) = (&destination.host, destination.port);
        match &destination.identity {
            Some(id) => tracing::info!("Destinations resolved via {host}:{port} ({id})"),
            None => tracing::info!("Destinations resolved via {host}:{port}"),
        }
    }
}

/// What `rustls_info` tells.
fn tls_info() -> TlsInfo {
    let linkerd_tls::identity::Info { suites, kx_groups, rand, key_provider, fips } = linkerd_tls::identity::info();
    TlsInfo { suites, kx_groups, rand, key_provider, fips }
}

fn watch_identity(identity: &Reader, telemetry: &Telemetry, panels: &Panels) {
    let reader = identity.clone();
    watch_expiry(telemetry, move || reader.expiry());
    let reader = identity.clone();
    panels.add("identity", move || {
        let until = reader.expiry().and_then(|expiry| expiry.duration_since(SystemTime::now()).ok());
        serde_json::json!({
            "id": reader.id().as_str(),
            "server_name": reader.server_name().as_str(),
            "certified": reader.is_ready(),
            "expires_in_seconds": until.map(|until| until.as_secs()),
            "trust_anchors": reader.trust_anchor_count(),
        })
    });
}

fn watch_expiry(telemetry: &Telemetry, expiry: impl Fn() -> Option<SystemTime> + Send + Sync + 'static) {
    telemetry.health().add(Condition::CertificateExpired, move || {
        let ago = SystemTime::now().duration_since(expiry()?).ok()?;
        Some(format!("the certificate expired {} s ago", ago.as_secs()))
    });
}

fn watch_control(control: &Arc<Control>, telemetry: &Telemetry, panels: &Panels) {
    let weak = Arc::downgrade(control);
    telemetry.health().add(Condition::ControlPlaneLost, move || {
        let trouble = weak.upgrade()?.trouble();
        let words: Vec<_> = trouble.iter().map(|(service, why)| format!("{}: {why}", service.as_str())).collect();
        (!words.is_empty()).then(|| words.join("; "))
    });
    let weak = Arc::downgrade(control);
    panels.add("discovery", move || weak.upgrade().map_or(serde_json::Value::Null, |control| control.status_json()));
}

/// Metrics, health and a page about the folders of manifests.
fn watch_manifests(standalone: &Arc<Standalone>, telemetry: &Telemetry, panels: &Panels) {
    let metrics = telemetry.manifests();
    let (mut progress, weak) = (standalone.progress(), Arc::downgrade(standalone));
    tokio::spawn(async move {
        let mut loaded = 0;
        loop {
            let Some(standalone) = weak.upgrade() else { return };
            let generation = progress.borrow_and_update().generation;
            let (status, report) = (standalone.status(), standalone.report());
            if generation != loaded {
                loaded = generation;
                let objects = status.objects.values().sum::<usize>();
                metrics.loaded(generation, objects as u64, report.warnings() as u64);
            }
            if !status.current {
                metrics.refused(report.errors() as u64);
            }
            drop(standalone);
            if progress.changed().await.is_err() {
                return;
            }
        }
    });
    let weak = Arc::downgrade(standalone);
    telemetry.health().add(Condition::ManifestsRefused, move || {
        let standalone = weak.upgrade()?;
        (!standalone.status().current)
            .then(|| format!("{} errors; the last good state is in force", standalone.report().errors()))
    });
    let weak = Arc::downgrade(standalone);
    panels.add("manifests", move || {
        let Some(standalone) = weak.upgrade() else { return serde_json::Value::Null };
        let (status, report) = (standalone.status(), standalone.report());
        serde_json::json!({
            "generation": status.progress.generation,
            "refused": status.progress.refused,
            "current": status.current,
            "loaded_at_unix": status.loaded_at.duration_since(SystemTime::UNIX_EPOCH).ok().map(|t| t.as_secs()),
            "objects": status.objects,
            "assigned_addresses": status.assigned.iter().map(|(name, ip)| format!("{name} {ip}")).collect::<Vec<_>>(),
            "findings": report.to_string().lines().collect::<Vec<_>>(),
        })
    });
}

/// Tasks that should live as long as the proxy: one that ends is a health condition, until the flag that is returned
/// tells that the proxy is on its way out.
fn watch_tasks(tasks: Vec<(String, AbortHandle)>, telemetry: &Telemetry) -> Ready {
    let over = Ready::new(false);
    let ending = over.clone();
    telemetry.health().add(Condition::TaskEnded, move || {
        let ended: Vec<_> =
            tasks.iter().filter(|(_, task)| task.is_finished()).map(|(name, _)| name.as_str()).collect();
        (!ended.is_empty() && !ending.get())
            .then(|| format!("restart the proxy: nothing is {} any more", ended.join(", ")))
    });
    over
}

/// Asks the watchdog now and then; what it says is a health condition.
async fn watch_workers(mut watchdog: Watchdog, telemetry: Telemetry) {
    let last = Arc::new(Mutex::new(None::<String>));
    let said = last.clone();
    telemetry.health().add(Condition::WorkerStuck, move || said.lock().clone());
    loop {
        tokio::time::sleep(WATCHDOG).await;
        let stuck = watchdog.check();
        if let Some(stuck) = &stuck {
            tracing::warn!("{stuck}");
        }
        *last.lock() = stuck;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn tasks_that_end_before_the_proxy_does_are_told() {
        let telemetry = Telemetry::new(config::Metrics::default());
        let task = tokio::spawn(std::future::pending::<()>());
        let over = watch_tasks(vec![("serving".into(), task.abort_handle())], &telemetry);
        let told = || telemetry.health().problems().iter().filter(|(c, _)| *c == Condition::TaskEnded).count();
        assert_eq!(told(), 0);
        task.abort();
        let _ = task.await;
        assert_eq!(told(), 1);
        over.set(true);
        assert_eq!(told(), 0);
    }

    #[test]
    fn the_last_failure_is_told_until_an_attempt_succeeds() {
        use identity::Observer;
        let telemetry = Telemetry::new(config::Metrics::default());
        let attempts = Attempts::watched(&telemetry);
        attempts.refreshed(Err("first"));
        attempts.refreshed(Err("second"));
        assert_eq!(telemetry.health().problems(), [(Condition::CertificateFailing, "second".into())]);
        attempts.refreshed(Ok(SystemTime::now() + Duration::from_secs(60)));
        assert_eq!(telemetry.health().problems(), []);
    }

    #[tokio::test]
    async fn expired_certificates_are_told() {
        let telemetry = Telemetry::new(config::Metrics::default());
        let expiry = Arc::new(Mutex::new(None));
        let read = expiry.clone();
        watch_expiry(&telemetry, move || *read.lock());
        let told = || telemetry.health().problems().iter().filter(|(c, _)| *c == Condition::CertificateExpired).count();
        assert_eq!(told(), 0, "none was issued yet");
        *expiry.lock() = Some(SystemTime::now() + Duration::from_secs(60));
        assert_eq!(told(), 0);
        *expiry.lock() = Some(SystemTime::now() - Duration::from_secs(60));
        assert_eq!(told(), 1);
    }
}
