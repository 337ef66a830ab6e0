//! Endpoints of a name (behaviour.md D.6, D.16): the stream of `Destination.Get` as updates of a set.

use super::{
    convert::destination,
    stream::{self, Event, Subscription},
};
use crate::policy::{Endpoint, Update};
use linkerd2_proxy_api::destination as api;
use std::{collections::BTreeMap, net::SocketAddr, time::Duration};
use tokio::{
    sync::mpsc,
    time::{self, Instant},
};

/// Updates that wait for a slow consumer; after that the stream is not read.
pub(super) const UPDATES: usize = 64;
/// After a reconnect, messages are gathered for this long before they replace what was known. The members of a federated
/// service come in one message per cluster: without that, all clusters but the first would be gone for a moment.
const GATHER: Duration = Duration::from_millis(200);
/// Endpoints that are kept for one name. A Service has at most a few thousand.
const MAX_ENDPOINTS: usize = 100_000;

/// Reads the stream until nobody listens, or the control plane refuses the name for good.
pub(super) async fn run(mut subscription: Subscription<api::Update>, updates: mpsc::Sender<Update>) {
    let listening = updates.clone();
    tokio::select! {
        () = listening.closed() => {}
        () = follow(&mut subscription, updates) => {}
    }
}

async fn follow(subscription: &mut Subscription<api::Update>, updates: mpsc::Sender<Update>) {
    // Whether anything was told before, so that there is something to lose.
    let mut told = false;
    // Whether the stream has changed the set yet.
    let mut fresh = true;
    let mut gathered: Option<(BTreeMap<SocketAddr, Endpoint>, Instant)> = None;
    loop {
        let due = gathered.as_ref().map(|(_, due)| *due);
        let event = tokio::select! {
            event = subscription.next() => Some(event),
            () = async { match due { Some(due) => time::sleep_until(due).await, None => std::future::pending().await } } => None,
        };
        let update = match event {
            None => None,
            Some(Event::Message { first, message }) => {
                fresh |= first;
                let Some(change) = change(subscription.record().target(), message) else { continue };
                match (&mut gathered, change) {
                    (Some((set, _)), change) => {
                        apply(set, change);
                        continue;
                    }
                    (None, Change::Add(endpoints)) if fresh && told => {
                        fresh = false;
                        let set = endpoints.into_iter().map(|e| (e.addr, e)).collect();
                        gathered = Some((set, Instant::now() + GATHER));
                        continue;
                    }
                    (None, Change::Add(endpoints)) if fresh => {
                        fresh = false;
                        Some(Update::Reset(endpoints))
                    }
                    (None, Change::Add(endpoints)) => Some(Update::Add(endpoints)),
                    (None, Change::Remove(addrs)) => Some(Update::Remove(addrs)),
                    (None, Change::Clear) => {
                        fresh = false;
                        Some(Update::Reset(Vec::new()))
                    }
                }
            }
            Some(Event::Ended(status)) if stream::is_final(status.code()) => {
                let target = subscription.record().target();
                tracing::warn!(target, error = stream::describe(&status), "Control plane refuses to resolve");
                let reason = format!("discovery of {target}: {}", stream::describe(&status));
                let _ = updates.send(Update::Fail(reason.into())).await;
                return;
            }
            // What was gathered is as good as it gets; what was told before stays.
            Some(Event::Ended(_)) => {
                fresh = true;
                None
            }
        };
        let gathered = gathered.take().map(|(set, _)| Update::Reset(set.into_values().collect()));
        for update in [gathered, update].into_iter().flatten() {
            told = true;
            if updates.send(update).await.is_err() {
                return;
            }
        }
    }
}

/// What a message does to the set.
#[derive(Debug, PartialEq, Eq)]
enum Change {
    Add(Vec<Endpoint>),
    Remove(Vec<SocketAddr>),
    Clear,
}

/// None for a message that changes nothing: endpoints that can't be understood are skipped, one by one.
fn change(target: String, message: api::Update) -> Option<Change> {
    let skip = |error| tracing::warn!(target, %error, "Endpoint can't be understood");
    match message.update? {
        api::update::Update::Add(api::WeightedAddrSet { addrs, metric_labels }) => {
            let endpoints: Vec<_> = addrs
                .into_iter()
                .take(MAX_ENDPOINTS)
                .filter_map(|addr| destination::endpoint(addr, &metric_labels).map_err(skip).ok())
                .collect();
            (!endpoints.is_empty()).then_some(Change::Add(endpoints))
        }
        api::update::Update::Remove(api::AddrSet { addrs }) => {
            let addrs: Vec<_> =
                addrs.into_iter().filter_map(|addr| destination::address(addr).map_err(skip).ok()).collect();
            (!addrs.is_empty()).then_some(Change::Remove(addrs))
        }
        api::update::Update::NoEndpoints(_) => Some(Change::Clear),
    }
}

fn apply(set: &mut BTreeMap<SocketAddr, Endpoint>, change: Change) {
    match change {
        Change::Add(endpoints) => set.extend(endpoints.into_iter().map(|e| (e.addr, e))),
        Change::Remove(addrs) => addrs.iter().for_each(|addr| {
            set.remove(addr);
        }),
        Change::Clear => set.clear(),
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::{
            convert::destination::tests::weighted,
            record::Registry,
            tests::{sequence, settings},
        },
        *,
    };
    use std::sync::Arc;
    use stream::{Call, tests::End};
    use tonic::Code;

    fn add(addrs: &[&str]) -> api::Update {
        let addrs = addrs.iter().map(|addr| weighted(addr)).collect();
        let set = api::WeightedAddrSet { addrs, metric_labels: Default::default() };
        api::Update { update: Some(api::update::Update::Add(set)) }
    }

    fn remove(addr: &str) -> api::Update {
        let addrs = vec![addr.parse::<SocketAddr>().unwrap().into()];
        api::Update { update: Some(api::update::Update::Remove(api::AddrSet { addrs })) }
    }

    fn none() -> api::Update {
        api::Update { update: Some(api::update::Update::NoEndpoints(api::NoEndpoints { exists: true })) }
    }

    fn show(update: Update) -> String {
        let list = |endpoints: Vec<Endpoint>| {
            endpoints.iter().map(|e| e.addr.port().to_string()).collect::<Vec<_>>().join(",")
        };
        match update {
            Update::Reset(endpoints) => format!("reset {}", list(endpoints)),
            Update::Add(endpoints) => format!("add {}", list(endpoints)),
            Update::Remove(addrs) => format!("remove {}", addrs[0].port()),
            Update::Fail(_) => "fail".into(),
        }
    }

    /// The updates of these streams, one after another.
    async fn check(streams: Vec<(Vec<api::Update>, End)>, expected: &[&str]) {
        let record = Arc::new(Registry::default()).record("Destination.Get", "web:80".into());
        let call: Call<api::Update> = sequence(streams);
        let subscription = Subscription::new(settings(stream::Resume::AfterBackoff), record, call);
        let (tx, mut rx) = mpsc::channel(UPDATES);
        let task = tokio::spawn(run(subscription, tx));
        for expected in expected {
            let found = time::timeout(Duration::from_secs(60), rx.recv()).await.expect("an update").map(show);
            assert_eq!(found.as_deref(), Some(*expected));
        }
        assert!(time::timeout(Duration::from_secs(60), rx.recv()).await.ok().flatten().is_none());
        drop(rx);
        task.await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn the_first_add_replaces_and_later_ones_add() {
        let stream = vec![add(&["10.0.0.1:1"]), add(&["10.0.0.1:2"]), remove("10.0.0.1:1"), none()];
        check(vec![(stream, End::Never)], &["reset 1", "add 2", "remove 1", "reset "]).await;
    }

    #[tokio::test(start_paused = true)]
    async fn nothing_is_lost_while_the_control_plane_is_away() {
        let streams = vec![
            (vec![add(&["10.0.0.1:1"])], End::Error(Code::Unavailable)),
            (vec![], End::Error(Code::NotFound)),
            (vec![], End::Clean),
            (vec![add(&["10.0.0.1:2"])], End::Never),
        ];
        check(streams, &["reset 1", "reset 2"]).await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_federated_set_is_gathered_before_it_replaces() {
        let both = || vec![add(&["10.0.0.1:1"]), add(&["10.0.0.1:2"])];
        let streams = vec![(both(), End::Error(Code::Unavailable)), (both(), End::Never)];
        check(streams, &["reset 1", "add 2", "reset 1,2"]).await;
    }

    #[tokio::test(start_paused = true)]
    async fn useless_messages_change_nothing() {
        let stream = vec![add(&[]), add(&["10.0.0.1:0"]), api::Update { update: None }, add(&["10.0.0.1:1"])];
        check(vec![(stream, End::Never)], &["reset 1"]).await;
    }

    #[tokio::test(start_paused = true)]
    async fn refused_names_fail() {
        let streams = vec![(vec![add(&["10.0.0.1:1"])], End::Error(Code::InvalidArgument))];
        check(streams, &["reset 1", "fail"]).await;
    }
}
