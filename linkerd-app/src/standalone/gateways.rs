//! Gateways of other clusters as Links name them: names become addresses, and an address counts for as long as its probe
//! says that the gateway lives (resources.md 6.1). What is found out here goes into the mirrors behind that gateway.

use super::{
    Shared,
    manifest::{Gateway, Key, Probe},
    mirror,
};
use crate::probe;
use futures_util::future::join_all;
use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::{IpAddr, SocketAddr},
    sync::{Arc, Weak},
    time::Duration,
};
use tokio::{
    task::AbortHandle,
    time::{Instant, sleep, timeout},
};

/// Time between two look-ups of a gateway's names, at least: DNS of the system tells no time to live.
const LOOK_UP: Duration = Duration::from_secs(30);
/// Most addresses that a gateway's names may stand for.
const MAX_ADDRESSES: usize = 64;

/// Begins to follow the gateways of all Links, as they come and go; ends when the last other owner of `shared` is gone.
pub(super) fn spawn(shared: &Arc<Shared>) {
    let (weak, mut progress) = (Arc::downgrade(shared), shared.progress.subscribe());
    shared.runtime.spawn(async move {
        let mut followed: HashMap<Key, (Gateway, Following)> = HashMap::new();
        loop {
            let Some(shared) = weak.upgrade() else { return };
            let wanted = {
                let state = shared.state.lock();
                mirror::gateways(&state.index, &state.mesh)
            };
            followed.retain(|link, (gateway, _)| {
                let kept = wanted.get(link) == Some(gateway);
                if !kept {
                    shared.gateway(link, None);
                }
                kept
            });
            for (link, gateway) in wanted {
                followed.entry(link.clone()).or_insert_with(|| {
                    let task = shared.runtime.spawn(follow(weak.clone(), link, gateway.clone()));
                    (gateway, Following(task.abort_handle()))
                });
            }
            drop(shared);
            if progress.changed().await.is_err() {
                return;
            }
        }
    });
}

/// A task that ends with this.
struct Following(AbortHandle);

impl Drop for Following {
    fn drop(&mut self) {
        self.0.abort();
    }
}

async fn follow(shared: Weak<Shared>, link: Key, gateway: Gateway) {
    let (mut failures, mut told) = (BTreeMap::<IpAddr, u32>::new(), None);
    let (mut addresses, mut due) = (gateway.addresses.iter().copied().collect(), Instant::now());
    loop {
        if !gateway.names.is_empty() && due <= Instant::now() {
            look_up(&gateway, &link, &mut addresses).await;
            due = Instant::now() + LOOK_UP;
        }
        failures.retain(|ip, _| addresses.contains(ip));
        if let Some(probe) = &gateway.probe {
            let tries = addresses.iter().map(|ip| async move { (*ip, lives(probe, *ip).await) });
            for (ip, lives) in join_all(tries).await {
                let failed = failures.entry(ip).or_default();
                *failed = if lives { 0 } else { failed.saturating_add(1) };
            }
        }
        let limit = gateway.probe.as_ref().map_or(u32::MAX, |probe| probe.failures);
        let dead = |ip: &IpAddr| failures.get(ip).is_some_and(|failed| *failed >= limit);
        let usable: BTreeSet<_> = addresses.iter().copied().filter(|ip| !dead(ip)).collect();
        if told.as_ref() != Some(&usable) {
            let Some(shared) = shared.upgrade() else { return };
            tracing::info!(%link, ?usable, "gateway");
            shared.gateway(&link, Some(usable.clone()));
            told = Some(usable);
        }
        sleep(gateway.probe.as_ref().map_or(LOOK_UP, |probe| probe.period)).await;
    }
}

/// Replaces what the names stood for; what can't be looked up stands for what it did.
async fn look_up(gateway: &Gateway, link: &Key, addresses: &mut BTreeSet<IpAddr>) {
    let mut found: BTreeSet<IpAddr> = gateway.addresses.iter().copied().collect();
    for name in &gateway.names {
        match tokio::net::lookup_host((&**name, gateway.port)).await {
            Ok(list) => found.extend(list.map(|addr| addr.ip()).take(MAX_ADDRESSES)),
            Err(error) => {
                tracing::warn!(%link, name = &**name, %error, "gateway can't be looked up; what was known of it stays");
                return;
            }
        }
    }
    *addresses = found;
}

async fn lives(probe: &Probe, ip: IpAddr) -> bool {
    let addr = SocketAddr::new(ip, probe.port);
    let (addrs, host) = ([addr], addr.to_string());
    let answer = probe::status(&addrs, "GET", &probe.path, &host);
    matches!(timeout(probe.timeout, answer).await, Ok(Ok(200..300)))
}
