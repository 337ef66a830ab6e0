//! Requests that nothing could take: each kind of nothing has its own words in the answer and in the log, and its own code in
//! the answer and in the metric.

use crate::{
    control_plane::{ControlPlane, Mood},
    scripted::{Ask, BOTH, Kind, ONE, Stage, Told, address, service},
    world::World,
};
use futures_util::future::{join, join_all};

const FAST: (&str, &str) = ("LINKERD2_PROXY_OUTBOUND_HTTP_FAILFAST_TIMEOUT", "400ms");
const SMALL: (&str, &str) = ("LINKERD2_PROXY_OUTBOUND_HTTP_QUEUE_CAPACITY", "1");

/// The status, the words and the code of an answer; and the words in the log, and the code in the metric.
async fn check(world: &World, told: &Told, status: u16, words: &str, code: &str) {
    assert!(told.status == status && told.header("l5d-proxy-error").contains(words), "{words}: {told:?}");
    assert_eq!(told.header("l5d-proxy-termination"), code, "{told:?}");
    world.eventually(words, async || world.log("client").contains(words)).await;
    let label = format!("code=\"{code}\"");
    world.eventually(&label, async || world.metric("client", "terminations_total", &[&label]).await >= 1.0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn each_kind_of_nothing_is_told_apart() {
    let breaker = [
        ("balancer.linkerd.io/failure-accrual", "consecutive"),
        ("balancer.linkerd.io/failure-accrual-consecutive-max-failures", "1"),
        ("balancer.linkerd.io/failure-accrual-consecutive-min-penalty", "60s"),
    ];
    // Nobody listens on port 8081.
    let manifests = [
        service(0, &[], &[]),
        service(1, &[], ONE).replace("8080", "8081"),
        service(2, &[], BOTH).replace("8080", "8081"),
        service(3, &breaker, BOTH),
        service(4, &[], &[]),
    ];
    let Some(stage) = Stage::new("causes", &manifests.concat(), &[FAST, SMALL]).await else { return };
    let (world, ask) = (&stage.world, Ask { script: "503", ..Ask::default() });
    let http2 = Ask { kind: Kind::Http2, ..ask };

    let none = async {
        check(world, &stage.ask(0, ask).await, 504, "no endpoints: service in fail-fast", "queue-no-endpoints").await;
        check(world, &stage.ask(0, ask).await, 503, "no endpoints: service unavailable", "queue-no-endpoints").await;
    };
    let refused = async {
        check(world, &stage.ask(1, ask).await, 502, "Connection refused", "connect-failed").await;
        let words = "no endpoint of 2 is ready, 2 not connected (";
        let told = stage.ask(2, http2).await;
        assert!(told.header("l5d-proxy-error").contains("Connection refused"), "{told:?}");
        check(world, &told, 504, words, "queue-unconnected").await;
    };
    let ejected = async {
        while stage.ask(3, ask).await.headers.contains_key("x-server") {}
        let words = "no endpoint of 2 is ready, 2 shut by circuit breakers: service unavailable";
        check(world, &stage.ask(3, ask).await, 503, words, "queue-ejected").await;
    };
    let full = async {
        let mut told = join_all((0..3).map(|_| stage.ask(4, ask))).await;
        told.sort_by_key(|told| told.status);
        check(world, &told[0], 503, "the queue of 1 is full: service unavailable", "queue-full").await;
        assert_eq!(told[2].status, 504, "{told:?}");
    };
    join(join(none, refused), join(ejected, full)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn discovery_that_is_away_is_told() {
    let Some(mut world) = World::new("cause-stale") else { return };
    let client = world.meshed("client", &[], &[]);
    let control = ControlPlane::new(&world);
    control.service(address(0), "web");
    control.endpoints("web", &[]);
    control.edit(address(0), |policy| {
        use linkerd2_proxy_api::outbound::{http_route::distribution::Kind, proxy_protocol};
        let Some(proxy_protocol::Kind::Http1(http)) = policy.protocol.as_mut().unwrap().kind.as_mut() else { panic!() };
        let backends = http.routes[0].rules[0].backends.as_mut().unwrap().kind.as_mut().unwrap();
        let Kind::FirstAvailable(first) = backends else { panic!() };
        let queue = first.backends[0].backend.as_mut().unwrap().queue.as_mut().unwrap();
        queue.failfast_timeout = Some(prost_types::Duration { seconds: 0, nanos: 400_000_000 });
    });
    control.spawn(&mut world, &client, &[]);
    world.wait_ready("client").await;
    let ask = Ask::default();
    check(&world, &ask.to(&client, address(0)).await, 504, "no endpoints: service in fail-fast", "queue-no-endpoints")
        .await;
    control.be(Mood::Refuses);
    world
        .eventually("it is noticed", async || {
            ask.to(&client, address(0)).await.header("l5d-proxy-error").contains("stale")
        })
        .await;
    let told = ask.to(&client, address(0)).await;
    check(&world, &told, 503, "no endpoints, and discovery is stale (", "queue-stale-discovery").await;
    // Once it is back, they are simply none.
    control.be(Mood::Well);
    world
        .eventually("it is back", async || {
            ask.to(&client, address(0)).await.header("l5d-proxy-termination") == "queue-no-endpoints"
        })
        .await;
}
