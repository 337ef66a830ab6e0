//! Who is at a destination: its policy, looked up once for all connections to it, followed while it is in use, and
//! forgotten when it has been idle (behaviour.md D.1).

use super::{Runtime, live::Live, logical, logical::HttpRoutes, opaque, opaque::TcpRoutes};
use crate::{
    error::{Cause, Error},
    policy::{ClientPolicy, DiscoveryError, Target},
};
use linkerd_stack::{
    cache::{Cache, Cached},
    http::Version,
};
use parking_lot::Mutex;
use std::{
    ops::Deref,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU8, Ordering::Relaxed},
    },
    time::Duration,
};
use tokio::{
    sync::{OnceCell, watch},
    time::Instant,
};

/// Destinations that are remembered. More are served, but each connection looks its own up.
const MAX_DESTINATIONS: usize = 10_000;

/// How long a failed look-up answers for those that follow it, so that a crowd of connections costs one attempt.
const FAILURE_LIFETIME: Duration = Duration::from_secs(1);

/// All destinations in use.
pub(super) struct Discover {
    rt: Arc<Runtime>,
    cache: Cache<Target, Lookup>,
}

#[derive(Default)]
struct Lookup {
    destination: OnceCell<Arc<Destination>>,
    failed: Mutex<Option<(Instant, DiscoveryError)>>,
}

/// A destination in use; it is not forgotten before this is dropped.
pub(super) struct Found {
    destination: Arc<Destination>,
    _lookup: Cached<Lookup>,
}

/// A destination: its policy, and what was made of it so far.
pub(super) struct Destination {
    rt: Arc<Runtime>,
    target: Target,
    policy: watch::Receiver<Arc<ClientPolicy>>,
    http1: OnceLock<Live<HttpRoutes>>,
    http2: OnceLock<Live<HttpRoutes>>,
    tcp: OnceLock<Live<TcpRoutes>>,
    /// What detection found last.
    heard: AtomicU8,
}

/// What earlier connections to a destination turned out to be.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(super) enum Heard {
    /// There were none.
    Nothing = 0,
    /// The client spoke HTTP.
    Http = 1,
    /// The client spoke something else.
    Other = 2,
    /// The server spoke first.
    ServerFirst = 3,
}

impl Discover {
    pub(super) fn new(rt: Arc<Runtime>) -> Self {
        let cache = Cache::new(rt.config.discovery_idle_timeout, MAX_DESTINATIONS);
        Self { rt, cache }
    }

    /// The destination, looked up if it is not known. Dropping the future leaves the look-up to others that wait for
    /// it.
    ///
    /// # Errors
    /// [`Cause::Discovery`] when the source refuses or does not answer.
    pub(super) async fn find(&self, target: Target) -> Result<Found, Error> {
        let lookup = self.cache.get_or_insert_with(target.clone(), |_| Lookup::default());
        let found = lookup.destination.get_or_try_init(|| async {
            let recent = lookup.failed.lock().clone();
            if let Some((at, error)) = recent
                && at.elapsed() < FAILURE_LIFETIME
            {
                return Err(error);
            }
            match self.rt.source.watch_client(target.clone()).await {
                Ok(policy) => Ok(Arc::new(Destination::new(self.rt.clone(), target, policy))),
                Err(error) => {
                    *lookup.failed.lock() = Some((Instant::now(), error.clone()));
                    Err(error)
                }
            }
        });
        let destination = found.await.map_err(|error| Error::new(Cause::Discovery(error.to_string().into())))?.clone();
        Ok(Found { destination, _lookup: lookup })
    }

    /// Destinations in use, for the operator's page.
    pub(super) fn targets(&self) -> Vec<(Target, Option<Arc<Destination>>)> {
        let entries = self.cache.entries();
        entries.into_iter().map(|(target, lookup)| (target, lookup.destination.get().cloned())).collect()
    }
}

impl Deref for Found {
    type Target = Destination;

    fn deref(&self) -> &Destination {
        &self.destination
    }
}

impl Destination {
    fn new(rt: Arc<Runtime>, target: Target, policy: watch::Receiver<Arc<ClientPolicy>>) -> Self {
        Self {
            rt,
            target,
            policy,
            http1: OnceLock::new(),
            http2: OnceLock::new(),
            tcp: OnceLock::new(),
            heard: AtomicU8::new(Heard::Nothing as u8),
        }
    }

    /// The routes of requests that were made so far.
    pub(super) fn made(&self) -> impl Iterator<Item = (Version, Arc<HttpRoutes>)> {
        let made = [(Version::H1, self.http1.get()), (Version::H2, self.http2.get())];
        made.into_iter().filter_map(|(version, live)| Some((version, live?.get())))
    }

    /// What was asked for.
    pub(super) fn target(&self) -> &Target {
        &self.target
    }

    /// The policy as it is now.
    pub(super) fn policy(&self) -> Arc<ClientPolicy> {
        self.policy.borrow().clone()
    }

    /// Routes of HTTP requests, made when first asked for.
    pub(super) fn http(&self, version: Version) -> &Live<HttpRoutes> {
        let slot = match version {
            Version::H1 => &self.http1,
            Version::H2 => &self.http2,
        };
        slot.get_or_init(|| {
            let mut builder = logical::Builder::new(self.rt.clone(), self.target.clone(), version);
            let policy = self.policy();
            let none = builder.invalid(&policy, &format!("the policy of {} is not for {version}", self.target).into());
            Live::follow(self.policy.clone(), move |policy| builder.build(policy), || none)
        })
    }

    /// Routes of connections, made when first asked for.
    pub(super) fn tcp(&self) -> &Live<TcpRoutes> {
        self.tcp.get_or_init(|| {
            let mut builder = opaque::Builder::new(self.rt.clone(), self.target.clone());
            let none = opaque::Builder::none(&self.policy());
            Live::follow(self.policy.clone(), move |policy| builder.build(policy), || none)
        })
    }

    /// What earlier connections turned out to be.
    pub(super) fn heard(&self) -> Heard {
        match self.heard.load(Relaxed) {
            1 => Heard::Http,
            2 => Heard::Other,
            3 => Heard::ServerFirst,
            _ => Heard::Nothing,
        }
    }

    /// Remembers what a connection turned out to be.
    pub(super) fn hear(&self, heard: Heard) {
        if self.heard() != heard {
            self.heard.store(heard as u8, Relaxed);
        }
    }
}
