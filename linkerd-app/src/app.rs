//! A whole proxy: its parts joined, its sockets bound, its life from the first certificate to the end of the drain.
//!
//! Two threads: traffic (one runtime, one worker per core) and the daemon (admin server and identity), so that a busy
//! data path never delays a probe or a renewal. The order of starting is contract.md 3.1, that of stopping 3.4, but
//! for what is better here: outbound stays open while inbound drains, the admin server stays until the end, and a
//! second signal ends the process at once.

use crate::{
    admin,
    config::{self, Config},
    control::{self, Control},
    gateway::Gateway,
    identity::{self, Task},
    inbound::Inbound,
    outbound::Outbound,
    policy::Source,
    standalone::Standalone,
    telemetry::{AccessLog, Telemetry},
    transport::{self, BindError, BoundListener},
};
use linkerd_stack::drain;
use linkerd_tls::identity::Reader;
use std::{future::Future, sync::Arc, time::Duration};
use tokio::{
    select,
    sync::mpsc,
    time::{Instant, timeout_at},
};

/// Which control plane the proxy listens to.
pub enum Home {
    /// Linkerd's; `config.control` says where.
    Linkerd,
    /// A folder of manifests.
    Standalone(Arc<Standalone>),
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
    /// The control-plane clients can't be made.
    #[error("control plane: {0}")]
    Control(#[from] control::StartError),
}

/// A proxy with its sockets bound, that serves nothing yet.
pub struct App {
    config: Config,
    inbound: (Arc<Inbound>, BoundListener),
    outbound: (Arc<Outbound>, Vec<BoundListener>),
    identity: Reader,
    shutdown: mpsc::Receiver<()>,
}

/// What runs beside traffic, on the daemon's runtime.
pub struct Daemon {
    config: config::Identity,
    dns: config::Dns,
    connect: config::Connect,
    task: Task,
    reader: Reader,
    telemetry: Telemetry,
    admin: (admin::Admin, BoundListener),
}

impl App {
    /// Builds every part and binds every socket. Must be called within the traffic runtime: the source's tasks run
    /// there.
    ///
    /// # Errors
    /// [`InitError`] names what can't be had.
    pub fn build(
        config: Config,
        home: Home,
        telemetry: Telemetry,
        access_log: Option<AccessLog>,
        log: admin::LogLevel,
    ) -> Result<(Self, Daemon), InitError> {
        let identity_config = config.identity.clone().ok_or(InitError::Missing("identity"))?;
        let (reader, task) = identity::prepare(&identity_config)?;
        let (source, standalone): (Arc<dyn Source>, _) = match home {
            Home::Linkerd => {
                let control = config.control.as_ref().ok_or(InitError::Missing("control plane"))?;
                (Control::start(control, &config, reader.clone(), telemetry.clone())?, None)
            }
            Home::Standalone(standalone) => (standalone.clone(), Some(standalone)),
        };

        let outbound = Outbound::new(
            &config.outbound,
            config.inbound.ips.clone(),
            Some(reader.clone()),
            source.clone(),
            telemetry.clone(),
        );
        let gateway = (!config.gateway.suffixes.0.is_empty())
            .then(|| Gateway::new(config.gateway.clone(), outbound.clone()));
        let inbound = Inbound::new(
            &config.inbound,
            gateway,
            Some(reader.clone()),
            source,
            telemetry.clone(),
            access_log,
            config.admin.listen.addr.port(),
        );
        let inbound_listener = transport::bind(&config.inbound.listen)?;
        let outbound_listeners = config.outbound.listen.iter().map(transport::bind).collect::<Result<Vec<_>, _>>()?;
        let admin_listener = transport::bind(&config.admin.listen)?;

        let (ask, shutdown) = mpsc::channel(1);
        let admin = admin::Admin::new(
            &config.admin,
            admin::Parts {
                identity: reader.clone(),
                guard: inbound.guard().clone(),
                telemetry: telemetry.clone(),
                log,
                shutdown: ask,
                standalone,
            },
        );
        tracing::info!("Admin interface on {}", admin_listener.local_addr());
        tracing::info!("Inbound interface on {}", inbound_listener.local_addr());
        for listener in &outbound_listeners {
            tracing::info!("Outbound interface on {}", listener.local_addr());
        }
        tracing::info!("SNI is {}", reader.server_name());
        tracing::info!("Local identity is {}", reader.id());
        if let Some(control) = &config.control {
            match &control.destination.identity {
                Some(id) => tracing::info!("Destinations resolved via {} ({id})", control.destination),
                None => tracing::info!("Destinations resolved via {}", control.destination),
            }
        }
        let daemon = Daemon {
            dns: config.dns,
            connect: config.outbound.connect.clone(),
            config: identity_config,
            task,
            reader: reader.clone(),
            telemetry,
            admin: (admin, admin_listener),
        };
        let app = Self {
            config,
            inbound: (inbound, inbound_listener),
            outbound: (outbound, outbound_listeners),
            identity: reader,
            shutdown,
        };
        Ok((app, daemon))
    }

    /// Serves until asked to stop, then drains. `signal` yields the name of each signal that arrives; the first drains,
    /// the second ends at once.
    pub async fn serve<S, F>(mut self, mut signal: S)
    where
        S: FnMut() -> F,
        F: Future<Output = &'static str>,
    {
        select! {
            biased;
            () = self.asked(&mut signal) => {
                // Nothing is being served, so there is nothing to drain.
                tracing::info!("Shutting down before a certificate was issued");
                return;
            }
            () = identity::first_certificate(&self.identity) => {}
        }
        let (inbound_drain, inbound_watch) = drain::channel();
        let (outbound_drain, outbound_watch) = drain::channel();
        let (outbound, listeners) = (self.outbound.0.clone(), std::mem::take(&mut self.outbound.1));
        for listener in listeners {
            tokio::spawn(outbound.clone().serve(listener, outbound_watch.clone()));
        }
        drop(outbound_watch);
        let (mut ask, mut grace) = (self.shutdown, self.config.shutdown_grace_period);
        let (inbound, listener) = self.inbound;
        tokio::spawn(inbound.serve(listener, inbound_watch));

        wait(&mut ask, &mut signal).await;
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
            name = signal() => {
                grace = Duration::ZERO;
                tracing::warn!(?grace, "Received {name} again; the connections that are left are cut");
            }
        }
    }

    async fn asked<S, F>(&mut self, signal: &mut S)
    where
        S: FnMut() -> F,
        F: Future<Output = &'static str>,
    {
        wait(&mut self.shutdown, signal).await;
    }
}

/// Ends when the process is asked to stop, by a signal or on the admin port.
async fn wait<S, F>(ask: &mut mpsc::Receiver<()>, signal: &mut S)
where
    S: FnMut() -> F,
    F: Future<Output = &'static str>,
{
    select! {
        name = signal() => tracing::info!("Received {name}; draining"),
        Some(()) = ask.recv() => tracing::info!("Shutdown requested on the admin port; draining"),
    }
}

impl Daemon {
    /// Serves the admin port and keeps the certificate fresh, for the life of the process.
    pub async fn run(self) {
        let observer = self.telemetry.identity();
        let (admin, listener) = self.admin;
        tokio::spawn(admin.serve(listener));
        match (self.task, self.config.issuer) {
            (Task::Folder(folder), _) => folder.run(observer).await,
            (Task::Certify(certify), config::Issuer::Certify { client, token_file, .. }) => {
                let client = control::certify::Client::new(client, token_file, self.reader, self.connect, self.dns, self.telemetry);
                certify.run(client, observer).await;
            }
            (Task::Pushed(installer), config::Issuer::Spire { socket, backoff, .. }) => {
                control::spire::run(socket, backoff, installer, observer).await;
            }
            (Task::Certify(_) | Task::Pushed(_), _) => {
                tracing::error!("identity was prepared for another issuer than the configured one");
            }
        }
    }
}
