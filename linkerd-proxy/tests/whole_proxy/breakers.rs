//! Circuit breakers: what trips them, the one probe at a time, the way back, and load that failures count as.

use crate::scripted::{Ask, BOTH, Kind, Stage, service};

/// Asks until `two` has answered so often; the number of attempts that `one` saw.
async fn until(stage: &Stage, service: u8, id: &str, kind: Kind, one: &str, answers: usize) -> usize {
    let script = [("x-script-one", one)];
    for _ in 0..10 * answers {
        stage.ask(service, Ask { id, script: "200", kind, headers: &script, ..Ask::default() }).await;
        if stage.two.attempts(id).len() >= answers {
            return stage.one.attempts(id).len();
        }
    }
    panic!("{id}: two is not asked")
}

const KIND: &str = "balancer.linkerd.io/failure-accrual";
const MAX: &str = "balancer.linkerd.io/failure-accrual-consecutive-max-failures";
const MIN_PENALTY: &str = "balancer.linkerd.io/failure-accrual-consecutive-min-penalty";
const MAX_PENALTY: &str = "balancer.linkerd.io/failure-accrual-consecutive-max-penalty";
const JITTER: &str = "balancer.linkerd.io/failure-accrual-consecutive-jitter-ratio";
const PENALIZE: &str = "balancer.alpha.linkerd.io/penalize-failures";

#[tokio::test(flavor = "multi_thread")]
async fn failures_in_a_row_and_a_low_success_rate_take_an_endpoint_out() {
    let manifests = [
        service(0, &[(KIND, "consecutive"), (MAX, "3")], BOTH),
        service(1, &[(KIND, "unified"), (MAX, "0")], BOTH),
        service(2, &[(KIND, "unified"), (MAX, "3")], BOTH),
        service(3, &[], BOTH),
        service(4, &[(KIND, "consecutive"), (MAX, "3")], BOTH),
        service(5, &[(KIND, "consecutive"), (MAX, "3")], BOTH),
    ];
    let Some(stage) = Stage::new("breakers", &manifests.concat(), &[]).await else { return };
    let h1 = Kind::Http1;
    assert_eq!(until(&stage, 0, "row", h1, "503", 40).await, 3);
    // What asks for less is no failure in a row, but one of the rate; five responses are needed to judge.
    let alternating = ["503,200"; 50].join(",");
    assert!(until(&stage, 4, "alternating", h1, &alternating, 40).await > 8);
    assert!(until(&stage, 3, "none", h1, "503", 40).await > 8);
    assert!((5..=6).contains(&until(&stage, 1, "rate", h1, &alternating, 40).await));
    // Of a row of three the row trips first.
    assert_eq!(until(&stage, 2, "unified-row", h1, "503", 40).await, 3);
    // gRPC codes that are the server's fault, in trailers; others are not.
    assert_eq!(until(&stage, 5, "grpc", Kind::Grpc, "grpc:14", 40).await, 3);
    assert!(until(&stage, 4, "grpc-other", Kind::Grpc, "grpc:5", 40).await > 8);
}

#[tokio::test(flavor = "multi_thread")]
async fn rate_limited_answers_trip_the_unified_breaker_and_count_as_load() {
    let manifests = [
        service(0, &[(KIND, "consecutive"), (MAX, "3")], BOTH),
        service(1, &[(KIND, "unified"), (MAX, "0")], BOTH),
        service(2, &[(PENALIZE, "true")], BOTH),
    ];
    let Some(stage) = Stage::new("rate-limited", &manifests.concat(), &[]).await else { return };
    assert!(until(&stage, 0, "consecutive", Kind::Http1, "429", 40).await > 8);
    assert_eq!(until(&stage, 1, "unified", Kind::Http1, "429", 40).await, 5);
    // Five seconds of latency, whatever it took: the first such answer is the last for a while.
    assert!(until(&stage, 2, "biased", Kind::Http1, "limited:1", 40).await <= 3);
    assert!(until(&stage, 2, "biased-grpc", Kind::Grpc, "grpc!8", 40).await <= 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn one_probe_at_a_time_decides_on_the_return() {
    let breaker = [(KIND, "consecutive"), (MAX, "1"), (MIN_PENALTY, "300ms"), (MAX_PENALTY, "300ms"), (JITTER, "0")];
    let Some(stage) = Stage::new("probation", &service(0, &breaker, BOTH), &[]).await else { return };
    // The fourth attempt succeeds, and so do all others. One request at a time until it has tripped.
    let headers = [("x-script-one", "503,503,503,200")];
    let ask = Ask { id: "probes", script: "200", headers: &headers, ..Ask::default() };
    while stage.one.attempts("probes").is_empty() {
        stage.ask(0, ask).await;
    }
    stage
        .world
        .eventually("it is back", async || {
            // Many at once: a probe must not be several.
            futures_util::future::join_all((0..4).map(|_| stage.ask(0, ask))).await;
            stage.one.attempts("probes").len() >= 20
        })
        .await;
    let attempts = stage.one.attempts("probes");
    for pair in attempts[..4].windows(2) {
        let waited = (pair[1].at - pair[0].at).as_millis();
        assert!((290..2_000).contains(&waited), "{waited} ms");
    }
    // Back in service, it takes its share at once.
    let quick = (attempts[8].at - attempts[3].at).as_millis();
    assert!(quick < 2_000, "{quick} ms");
}
