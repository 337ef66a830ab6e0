//! Health apart from readiness: conditions that an operator should look at while the proxy goes on serving. They show in
//! `/ready?verbose` and as `proxy_unhealthy`; plain `/ready` does not depend on them (contract.md 2.3).

use super::prom::{Encoder, Sample};
use parking_lot::RwLock;
use std::fmt;

/// What may be wrong.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Hash)]
pub enum Condition {
    /// The workload certificate has expired.
    CertificateExpired,
    /// The latest attempt at a certificate failed; the last one stays in force, if there is one.
    CertificateFailing,
    /// A service of the control plane does not answer; the last policy stays in force.
    ControlPlaneLost,
    /// The manifests on disk were refused; the last good ones stay in force.
    ManifestsRefused,
    /// A bound is exhausted: metric series, access log entries, descriptors.
    BoundExhausted,
    /// A worker thread has not moved for long.
    WorkerStuck,
    /// A task that should live as long as the proxy has ended.
    TaskEnded,
}

impl Condition {
    /// All of them, in order of printing.
    pub const ALL: [Self; 7] = [
        Self::CertificateExpired,
        Self::CertificateFailing,
        Self::ControlPlaneLost,
        Self::ManifestsRefused,
        Self::BoundExhausted,
        Self::WorkerStuck,
        Self::TaskEnded,
    ];

    /// The label's value.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::CertificateExpired => "certificate_expired",
            Self::CertificateFailing => "certificate_failing",
            Self::ControlPlaneLost => "control_plane_lost",
            Self::ManifestsRefused => "manifests_refused",
            Self::BoundExhausted => "bound_exhausted",
            Self::WorkerStuck => "worker_stuck",
            Self::TaskEnded => "task_ended",
        }
    }
}

type Check = Box<dyn Fn() -> Option<String> + Send + Sync>;

/// Checks by condition, asked when somebody looks.
#[derive(Default)]
pub struct Health {
    checks: RwLock<Vec<(Condition, Check)>>,
}

impl Health {
    /// Adds a check: it tells what is wrong, or nothing. It must be cheap and must not wait.
    pub fn add(&self, condition: Condition, check: impl Fn() -> Option<String> + Send + Sync + 'static) {
        self.checks.write().push((condition, Box::new(check)));
    }

    /// What is wrong now, in order of condition.
    pub fn problems(&self) -> Vec<(Condition, String)> {
        let checks = self.checks.read();
        let of = |condition| checks.iter().filter(move |(c, _)| *c == condition);
        Condition::ALL
            .into_iter()
            .flat_map(|condition| of(condition).filter_map(move |(_, check)| Some((condition, check()?))))
            .collect()
    }

    pub(super) fn encode(&self, out: &mut Encoder<'_, '_>) -> fmt::Result {
        let problems = self.problems();
        let of = |condition| problems.iter().filter(|(c, _)| *c == condition).count() as u64;
        out.gauge(
            "proxy_unhealthy",
            None,
            "Problems that an operator should look at, by kind",
            Condition::ALL.iter().map(|c| (Sample::of("condition", c.as_str()), of(*c))),
        )
    }
}

impl fmt::Debug for Health {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Health").finish_non_exhaustive()
    }
}
