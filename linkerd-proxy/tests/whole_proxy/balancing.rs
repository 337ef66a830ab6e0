//! Spreading load: endpoint weights, zones, and sessions that stay where they began.

use crate::scripted::{Ask, BOTH, Stage, route, service, slice};
use std::{
    collections::BTreeMap,
    sync::atomic::{AtomicBool, Ordering::Relaxed},
    time::Duration,
};

/// Which server answered how many of `n` requests, one after the other.
async fn shares(stage: &Stage, service: u8, headers: &[(&str, &str)], n: u32) -> BTreeMap<String, u32> {
    let mut shares = BTreeMap::new();
    for _ in 0..n {
        let told = stage.ask(service, Ask { script: "200", headers, ..Ask::default() }).await;
        assert_eq!(told.status, 200, "{told:?}");
        *shares.entry(told.header("x-server").to_string()).or_default() += 1;
    }
    shares
}

#[tokio::test(flavor = "multi_thread")]
async fn equal_endpoints_share_alike_and_weights_are_honoured() {
    let one = slice(1, "one", "3", &["{addresses: [ONE]}"]);
    let two = slice(1, "two", "1", &["{addresses: [TWO]}"]);
    let manifests = service(0, &[], BOTH) + &service(1, &[], &[]) + &one + &two;
    let Some(stage) = Stage::new("shares", &manifests, &[]).await else { return };
    let equal = shares(&stage, 0, &[], 100).await;
    assert!(equal.len() == 2 && equal.values().all(|n| *n >= 20), "{equal:?}");
    let weighted = shares(&stage, 1, &[], 200).await;
    // 150 expected if they are as fast as each other.
    assert!((115..=185).contains(&weighted["one"]), "{weighted:?}");
    // A weight of 0 takes nothing while another is there, and everything when it is alone.
    stage.manifests(&manifests.replace("\"3\"", "\"0\""));
    stage.world.eventually("one takes nothing", async || !shares(&stage, 1, &[], 10).await.contains_key("one")).await;
    stage.manifests(&(service(1, &[], &[]) + &one.replace("\"3\"", "\"0\"")));
    stage.world.eventually("one is alone", async || shares(&stage, 1, &[], 5).await.get("one") == Some(&5)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn endpoints_come_and_go_under_load_without_a_failed_request() {
    let (one, both) = (service(0, &[], &BOTH[..1]), service(0, &[], BOTH));
    let Some(stage) = Stage::new("come-and-go", &both, &[]).await else { return };
    let done = AtomicBool::new(false);
    let load = async || {
        while !done.load(Relaxed) {
            let told = stage.ask(0, Ask { script: "slow:30", ..Ask::default() }).await;
            assert_eq!(told.status, 200, "{told:?}");
        }
    };
    let changes = async {
        for _ in 0..3 {
            for (manifests, left) in [(&one, [true, false]), (&both, [true, true])] {
                stage.manifests(manifests);
                let seen = || [stage.one.count(), stage.two.count()];
                // Until those that are left are asked, and the other is not.
                let settled = async || {
                    let before = seen();
                    tokio::time::sleep(Duration::from_millis(150)).await;
                    let after = seen();
                    [0, 1].map(|i| after[i] > before[i]) == left
                };
                stage.world.eventually("the change is seen", settled).await;
            }
        }
        done.store(true, Relaxed);
    };
    tokio::join!(changes, load(), load(), load());
}

#[tokio::test(flavor = "multi_thread")]
async fn zone_hints_keep_traffic_in_the_zone_while_there_is_someone() {
    let hinted = |one: &str, two: &str| {
        let of = |ip, zone| format!("{{addresses: [{ip}], hints: {{forZones: [{{name: {zone}}}]}}}}");
        let node = "apiVersion: v1
kind: Node
metadata: {name: node, labels: {topology.kubernetes.io/zone: west}}
---
";
        node.to_string() + &service(0, &[], &[&of("ONE", one), &of("TWO", two)])
    };
    let Some(stage) = Stage::new("zones", &hinted("west", "east"), &[]).await else { return };
    let only_one = shares(&stage, 0, &[], 20).await;
    assert_eq!(only_one, BTreeMap::from([("one".to_string(), 20)]));
    stage.manifests(&hinted("south", "east"));
    stage.world.eventually("both are used", async || shares(&stage, 0, &[], 20).await.len() == 2).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn sessions_stay_where_they_began() {
    let manifests = [
        service(0, &[], BOTH),
        route(0, "sessionPersistence: {sessionName: chocolate, type: Cookie}"),
        service(1, &[], BOTH),
        route(1, "sessionPersistence: {sessionName: x-session, type: Header}"),
    ];
    let Some(stage) = Stage::new("sessions", &manifests.concat(), &[]).await else { return };
    // Two sessions of each kind, so that at least one kind has both servers in nearly all runs.
    for (service, answer, question) in [(0, "set-cookie", "cookie"), (1, "x-session", "x-session")] {
        let mut holders = BTreeMap::new();
        for _ in 0..12 {
            let told = stage.ask(service, Ask { script: "200", ..Ask::default() }).await;
            let token = told.header(answer).split(';').next().unwrap().to_string();
            assert!(!token.is_empty(), "{told:?}");
            holders.insert(told.header("x-server").to_string(), token);
        }
        assert_eq!(holders.len(), 2, "sessions begin on both: {holders:?}");
        for (holder, token) in &holders {
            let told = shares(&stage, service, &[(question, token)], 10).await;
            assert_eq!(told, BTreeMap::from([(holder.clone(), 10)]));
        }
        // A token of nobody is as good as none.
        assert_eq!(shares(&stage, service, &[(question, "chocolate=zz")], 30).await.len(), 2);
    }
    // The session's endpoint goes away: another takes it over, with a new token.
    let told = stage.ask(1, Ask { script: "200", headers: &[("x-session", "none")], ..Ask::default() }).await;
    let (holder, token) = (told.header("x-server").to_string(), told.header("x-session").to_string());
    let gone = if holder == "one" { "{addresses: [ONE]}, " } else { ", {addresses: [TWO]}" };
    stage.manifests(&manifests.concat().replace(gone, ""));
    let headers = [("x-session", &*token)];
    let ask = Ask { script: "200", headers: &headers, ..Ask::default() };
    stage.world.eventually("it moves", async || stage.ask(1, ask).await.header("x-server") != holder).await;
    let told = stage.ask(1, ask).await;
    assert!(!["", &*token].contains(&told.header("x-session")), "{told:?}");
}
