//! The whole page: order of the dialects, headers, expiry, and what two independent readers demand of it.

use super::*;

fn telemetry() -> Telemetry {
    Telemetry::new(config::Metrics { retain_idle: Duration::from_secs(600) })
}

#[test]
fn compiles() {
    assert!(telemetry().render().ends_with("# EOF\n"));
}
