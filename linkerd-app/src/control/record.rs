//! What the proxy knows of its own look-ups: how old each answer is, and what went wrong last.
//!
//! Every stream to the control plane keeps a [`Record`] for as long as it lives; [`Registry::snapshot`] lists them for
//! the status page. The age of an answer is the time since its stream last said something.

use parking_lot::Mutex;
use std::{collections::BTreeMap, sync::Arc, time::Duration};
use tokio::time::Instant;

/// One look-up as the status page shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lookup {
    /// The method, for instance `OutboundPolicies.Watch`.
    pub method: &'static str,
    /// What is looked up: an address, a name or a port.
    pub target: String,
    /// Whether a stream is open and has said something.
    pub live: bool,
    /// Time since the last message; none before the first.
    pub age: Option<Duration>,
    /// Messages so far.
    pub messages: u64,
    /// Why the last stream or attempt ended, if one did since the last message.
    pub last_error: Option<Arc<str>>,
}

/// All look-ups that are under way.
#[derive(Debug, Default)]
pub(crate) struct Registry(Mutex<Entries>);

#[derive(Debug, Default)]
struct Entries {
    next: u64,
    /// In the order in which they began.
    records: BTreeMap<u64, Arc<Mutex<State>>>,
}

#[derive(Debug)]
struct State {
    method: &'static str,
    target: String,
    live: bool,
    heard: Option<Instant>,
    messages: u64,
    last_error: Option<Arc<str>>,
}

/// A look-up's entry; it goes when this is dropped.
#[derive(Debug)]
pub(crate) struct Record {
    id: u64,
    state: Arc<Mutex<State>>,
    registry: Arc<Registry>,
}

impl Registry {
    /// Adds a look-up.
    pub(crate) fn record(self: &Arc<Self>, method: &'static str, target: String) -> Record {
        let state = State { method, target, live: false, heard: None, messages: 0, last_error: None };
        let state = Arc::new(Mutex::new(state));
        let mut entries = self.0.lock();
        let id = entries.next;
        entries.next += 1;
        entries.records.insert(id, state.clone());
        Record { id, state, registry: self.clone() }
    }

    /// All look-ups, oldest first.
    pub(crate) fn snapshot(&self) -> Vec<Lookup> {
        let now = Instant::now();
        let entries = self.0.lock();
        let lookup = |state: &Arc<Mutex<State>>| {
            let state = state.lock();
            Lookup {
                method: state.method,
                target: state.target.clone(),
                live: state.live,
                age: state.heard.map(|heard| now.saturating_duration_since(heard)),
                messages: state.messages,
                last_error: state.last_error.clone(),
            }
        };
        entries.records.values().map(lookup).collect()
    }
}

impl Record {
    /// A message came.
    pub(crate) fn heard(&self) {
        let mut state = self.state.lock();
        state.live = true;
        state.heard = Some(Instant::now());
        state.messages += 1;
        state.last_error = None;
    }

    /// The stream or an attempt ended.
    pub(crate) fn ended(&self, why: Arc<str>) {
        let mut state = self.state.lock();
        state.live = false;
        state.last_error = Some(why);
    }

    /// Why the last stream or attempt ended.
    pub(crate) fn last_error(&self) -> Option<Arc<str>> {
        self.state.lock().last_error.clone()
    }

    /// Tells why nothing is heard any more, as long as a stream that had said something is gone. Outlives the record.
    pub(crate) fn outage(&self) -> impl Fn() -> Option<Arc<str>> + Send + Sync + use<> {
        let state = self.state.clone();
        move || {
            let state = state.lock();
            state.last_error.clone().filter(|_| !state.live && state.heard.is_some())
        }
    }

    /// For the log.
    pub(crate) fn method(&self) -> &'static str {
        self.state.lock().method
    }

    /// For the log.
    pub(crate) fn target(&self) -> String {
        self.state.lock().target.clone()
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        self.registry.0.lock().records.remove(&self.id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn ages_grow_and_entries_go() {
        let registry = Arc::new(Registry::default());
        let record = registry.record("Destination.Get", "web:80".into());
        assert_eq!(registry.snapshot()[0].age, None);
        let outage = record.outage();
        record.ended("silent".into());
        assert_eq!(outage(), None, "nothing was ever said");
        record.heard();
        tokio::time::advance(Duration::from_secs(3)).await;
        record.ended("gone".into());
        assert_eq!(outage().as_deref(), Some("gone"));
        let found = &registry.snapshot()[0];
        assert_eq!((found.live, found.age, found.messages), (false, Some(Duration::from_secs(3)), 1));
        assert_eq!(found.last_error.as_deref(), Some("gone"));
        drop(record);
        assert_eq!(registry.snapshot(), []);
    }
}
