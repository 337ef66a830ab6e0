//! What the operator can see of the parts while they live: health conditions and the pages of the admin server. Everything
//! here only looks, and holds nothing alive.

use crate::{
    admin::Panels,
    control::Control,
    identity as certificates,
    inbound::Inbound,
    outbound::Outbound,
    standalone::Standalone,
    telemetry::{Condition, IdentityMetrics, Telemetry, watchdog::Watchdog},
};
use linkerd_stack::Ready;
use linkerd_tls::identity::Reader;
use parking_lot::Mutex;
use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};
use tokio::task::{AbortHandle, spawn_blocking};

/// How often the workers are looked at.
const WATCHDOG: Duration = Duration::from_secs(1);

/// Pages about what each direction keeps.
pub(super) fn directions(inbound: &Arc<Inbound>, outbound: &Outbound, panels: &Panels) {
    let shown = outbound.clone();
    panels.add("outbound", move || shown.status());
    let shown = Arc::downgrade(inbound);
    panels.add("inbound", move || shown.upgrade().map_or(serde_json::Value::Null, |inbound| inbound.status()));
}

/// Whether the certificate is in date, and a page about it.
pub(super) fn identity(identity: &Reader, telemetry: &Telemetry, panels: &Panels) {
    let reader = identity.clone();
    expired(telemetry, move || reader.expiry());
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

/// A certificate that is past its end is a health condition.
fn expired(telemetry: &Telemetry, expiry: impl Fn() -> Option<SystemTime> + Send + Sync + 'static) {
    telemetry.health().add(Condition::CertificateExpired, move || {
        let ago = SystemTime::now().duration_since(expiry()?).ok()?;
        Some(format!("the certificate expired {} s ago", ago.as_secs()))
    });
}

/// Which services of the control plane are away, and a page about what is known from them.
pub(super) fn control(control: &Arc<Control>, telemetry: &Telemetry, panels: &Panels) {
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
pub(super) fn manifests(standalone: &Arc<Standalone>, telemetry: &Telemetry, panels: &Panels) {
    let metrics = telemetry.manifests();
    let (mut progress, weak) = (standalone.progress(), Arc::downgrade(standalone));
    tokio::spawn(async move {
        let mut loaded = 0;
        loop {
            let Some(standalone) = weak.upgrade() else { return };
            let generation = progress.borrow_and_update().generation;
            // A look at all objects, under locks that a reload holds: not for the worker of the traffic.
            let looked = spawn_blocking(move || (standalone.status(), standalone.report())).await;
            let Ok((status, report)) = looked else { return };
            if generation != loaded {
                loaded = generation;
                let objects = status.objects.values().sum::<usize>();
                metrics.loaded(generation, objects as u64, report.warnings() as u64);
            }
            if !status.current {
                metrics.refused(report.errors() as u64);
            }
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
pub(super) fn tasks(tasks: Vec<(String, AbortHandle)>, telemetry: &Telemetry) -> Ready {
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
pub(super) async fn workers(mut watchdog: Watchdog, telemetry: Telemetry) {
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

/// Counts attempts at a certificate, and remembers why the last one failed.
pub(super) struct Attempts {
    metrics: Arc<IdentityMetrics>,
    failing: Arc<Mutex<Option<String>>>,
}

impl Attempts {
    /// Its failures are a health condition from now on, until an attempt succeeds.
    pub(super) fn watched(telemetry: &Telemetry) -> Self {
        let failing = Arc::new(Mutex::new(None));
        let told = failing.clone();
        telemetry.health().add(Condition::CertificateFailing, move || told.lock().clone());
        Self { metrics: telemetry.identity(), failing }
    }
}

impl certificates::Observer for Attempts {
    fn refreshed(&self, result: Result<SystemTime, &str>) {
        match result {
            Ok(expiry) => self.metrics.refreshed(expiry),
            Err(_) => self.metrics.failed(),
        }
        *self.failing.lock() = result.err().map(Into::into);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config;

    #[tokio::test]
    async fn tasks_that_end_before_the_proxy_does_are_told() {
        let telemetry = Telemetry::new(config::Metrics::default());
        let task = tokio::spawn(std::future::pending::<()>());
        let over = tasks(vec![("serving".into(), task.abort_handle())], &telemetry);
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
        use certificates::Observer;
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
        expired(&telemetry, move || *read.lock());
        let told = || telemetry.health().problems().iter().filter(|(c, _)| *c == Condition::CertificateExpired).count();
        assert_eq!(told(), 0, "none was issued yet");
        *expiry.lock() = Some(SystemTime::now() + Duration::from_secs(60));
        assert_eq!(told(), 0);
        *expiry.lock() = Some(SystemTime::now() - Duration::from_secs(60));
        assert_eq!(told(), 1);
    }
}
