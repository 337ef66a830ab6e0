//! A backend: a set of replicas balanced over, one known replica, or a refusal (behaviour.md D.6). A driver task per
//! balanced backend follows discovery and rebuilds only the replicas that changed.

use super::Runtime;
use crate::{
    error::{Cause, Error, Lack},
    policy::{
        Endpoint, Update,
        client::{Failure, Load},
        endpoint::EndpointMeta,
        source::Stale,
    },
};
use linkerd_stack::{
    Ready,
    balance::{self, Balance, Member, NotReady, Picked},
};
use parking_lot::Mutex;
use rand::RngExt;
use std::{
    collections::BTreeMap,
    fmt::Write,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Duration,
};
use tokio::{
    sync::mpsc,
    task::AbortHandle,
    time::{Instant, sleep, sleep_until, timeout_at},
};

/// Weight of a replica to which discovery gives none (resources.md: Linkerd's plain weight).
const PLAIN_WEIGHT: u32 = 10_000;

/// A backend without a ready replica for this long asks discovery anew, in case the stream has gone stale; up to half
/// as much again is added at random, so that proxies do not ask in step.
const STALE_AFTER: Duration = Duration::from_secs(30);

/// A replica that could not be connected to for this long makes the driver ask discovery anew, plus up to half as much
/// at random: the stream may have gone stale without a word, and the replica's address may be another's by now. The time
/// doubles while the answer stays the same, since a replica may just as well be broken.
const REFUSED_FOR: Duration = Duration::from_secs(10);

/// Where the doubling ends.
const REFUSED_FOR_MAX: Duration = Duration::from_secs(600);

/// How often replicas are looked at for that, once so much time has passed.
const LOOK: Duration = Duration::from_secs(2);

/// After discovery was asked anew, its messages are gathered for this long before they replace what was known: the members
/// of a federated service come in several, and those that are in use must not be gone in between.
const GATHER: Duration = Duration::from_millis(200);

/// What a replica's stack is, for the driver.
pub(super) trait Replica: Send + Sync + 'static {
    /// Whether it can take work.
    fn ready(&self) -> Ready;

    /// Why it can't, if so.
    fn unready(&self) -> Option<Unready>;

    /// How long attempts to connect to it have failed, if they do.
    fn refused_for(&self) -> Option<Duration>;
}

/// Why a replica takes no work.
pub(super) enum Unready {
    /// Its circuit breaker is open.
    Ejected,
    /// It is not connected; the last attempt's failure, if there was one.
    Unconnected(Option<Error>),
}

/// How long an explanation of why nothing is ready is given out again. Looking at every replica for each of the
/// requests that are shed would cost most when there is least to spare.
const EXPLANATION_LIFETIME: Duration = Duration::from_secs(1);

/// Replicas of type `E`, with the task that keeps them up to date. Dropping it ends both; requests in flight go on.
pub(super) struct Replicas<E> {
    pub(super) balance: Balance<SocketAddr, Arc<E>>,
    driver: Option<AbortHandle>,
    /// Set when discovery gave the name up.
    failed: Arc<AtomicBool>,
    explanation: Mutex<Option<(Instant, Lack, Arc<str>)>>,
    /// The present resolution's; none of a known replica.
    stale: Arc<Mutex<Option<Stale>>>,
    queue_capacity: usize,
}

impl<E: Replica> Concrete<E> {
    /// Whether it can be carried over to a new policy.
    pub(super) fn is_usable(&self) -> bool {
        match self {
            Self::Replicas(replicas) => !replicas.is_failed(),
            Self::Fail(_) => true,
        }
    }
}

/// A backend of HTTP or of connections.
pub(super) enum Concrete<E> {
    /// Replicas: discovered, or one that is known.
    Replicas(Replicas<E>),
    /// A refusal.
    Fail(Failure),
}

/// What a set of replicas is made of.
pub(super) struct Settings {
    pub(super) load: Load,
    pub(super) queue: crate::config::Queue,
    pub(super) observer: Arc<dyn balance::Observer>,
}

impl Settings {
    fn balance<E>(self) -> Balance<SocketAddr, Arc<E>> {
        let config = balance::Config {
            default_rtt: self.load.default_rtt,
            decay: self.load.decay,
            queue_capacity: self.queue.capacity,
            failfast_timeout: self.queue.failfast_timeout,
        };
        Balance::new(config, self.observer)
    }
}

impl<E: Replica> Replicas<E> {
    fn new(settings: Settings) -> Self {
        Self {
            queue_capacity: settings.queue.capacity,
            balance: settings.balance(),
            driver: None,
            failed: Arc::default(),
            explanation: Mutex::new(None),
            stale: Arc::default(),
        }
    }

    /// Replicas behind a name.
    pub(super) fn discovered(
        rt: &Arc<Runtime>,
        discovery: &Arc<str>,
        settings: Settings,
        build: impl FnMut(&Endpoint) -> E + Send + 'static,
    ) -> Self {
        let mut this = Self::new(settings);
        let resolve = {
            let (rt, discovery, stale) = (rt.clone(), discovery.clone(), this.stale.clone());
            move || {
                let resolution = rt.source.resolve(&discovery);
                *stale.lock() = Some(resolution.stale);
                resolution.updates
            }
        };
        let driver = drive(discovery.clone(), resolve, this.balance.clone(), this.failed.clone(), build);
        this.driver = Some(tokio::spawn(driver).abort_handle());
        this
    }

    /// One replica whose address is known.
    pub(super) fn known(endpoint: &Endpoint, settings: Settings, replica: E) -> Self {
        let this = Self::new(settings);
        let ready = replica.ready();
        this.balance.reset(vec![(endpoint.addr, Member { service: Arc::new(replica), ready, weight: 1 })]);
        this
    }

    /// A replica, waiting in the queue if none is ready (behaviour.md D.8).
    ///
    /// # Errors
    /// [`Cause::FailFast`] and [`Cause::LoadShed`], which say what was lacking, or [`Cause::Unexpected`] if discovery gave
    /// the name up.
    pub(super) async fn acquire(&self) -> Result<Picked<SocketAddr, Arc<E>>, Error> {
        self.balance.acquire().await.map_err(|error| match error {
            NotReady::FailFast(_) => self.explain(Cause::FailFast),
            NotReady::LoadShed if self.is_open() => {
                Error::new(Cause::LoadShed(Lack::Room)).context(format!("the queue of {} is full", self.queue_capacity))
            }
            NotReady::LoadShed => self.explain(Cause::LoadShed),
            NotReady::Failed(reason) => Error::new(Cause::Unexpected(reason)),
        })
    }

    /// A failure that says which kind of nothing there is.
    fn explain(&self, cause: fn(Lack) -> Cause) -> Error {
        let mut explanation = self.explanation.lock();
        let (lack, text) = match &*explanation {
            Some((at, lack, text)) if at.elapsed() < EXPLANATION_LIFETIME => (*lack, text.clone()),
            _ => {
                let (lack, text) = self.look();
                let text = Arc::<str>::from(text);
                *explanation = Some((Instant::now(), lack, text.clone()));
                (lack, text)
            }
        };
        Error::new(cause(lack)).context(text)
    }

    fn look(&self) -> (Lack, String) {
        let members = self.balance.status();
        let (mut ejected, mut unconnected, mut example) = (0_usize, 0_usize, None);
        for member in &members {
            match self.balance.get(&member.key).and_then(|replica| replica.unready()) {
                Some(Unready::Ejected) => ejected += 1,
                Some(Unready::Unconnected(failure)) => {
                    unconnected += 1;
                    example = example.or(failure.map(|failure| (member.key, failure)));
                }
                None => {}
            }
        }
        let mut text = match members.len() {
            0 => "no endpoints".to_string(),
            n => format!("no endpoint of {n} is ready"),
        };
        if ejected > 0 {
            let _ = write!(text, ", {ejected} shut by circuit breakers");
        }
        if unconnected > 0 {
            let _ = write!(text, ", {unconnected} not connected");
        }
        if let Some((addr, failure)) = example {
            let _ = write!(text, " ({addr}: {failure})");
        }
        let stale = self.stale.lock().as_ref().and_then(|stale| stale());
        if let Some(why) = &stale {
            let _ = write!(text, ", and discovery is stale ({why})");
        }
        let lack = match (stale, members.len(), ejected, unconnected) {
            (Some(_), ..) => Lack::Discovery,
            (None, 0, ..) => Lack::Endpoints,
            (None, _, 0, 0) => Lack::Readiness,
            (None, _, ejected, unconnected) if ejected >= unconnected => Lack::Admission,
            (None, ..) => Lack::Connection,
        };
        (lack, text)
    }

    /// Whether discovery gave the name up, so that it must be asked again.
    pub(super) fn is_failed(&self) -> bool {
        self.failed.load(Relaxed)
    }

    /// Whether requests would be taken now, as a distribution asks before it chooses.
    pub(super) fn is_open(&self) -> bool {
        self.balance.gate().get()
    }
}

impl<E> Drop for Replicas<E> {
    fn drop(&mut self) {
        if let Some(driver) = &self.driver {
            driver.abort();
        }
    }
}

/// Follows discovery until dropped. When discovery ends, what it said last stays in force.
async fn drive<E: Replica>(
    discovery: Arc<str>,
    resolve: impl Fn() -> mpsc::Receiver<Update>,
    balance: Balance<SocketAddr, Arc<E>>,
    failed: Arc<AtomicBool>,
    mut build: impl FnMut(&Endpoint) -> E,
) {
    let mut known: BTreeMap<SocketAddr, Arc<EndpointMeta>> = BTreeMap::new();
    let gate = balance.gate();
    let mut updates = resolve();
    // Whether discovery was asked anew and has not answered yet.
    let mut anew = false;
    let (mut patience, mut asked) = (REFUSED_FOR, Instant::now());
    loop {
        let jitter = rand::rng().random_range(1.0..1.5);
        let mut update = tokio::select! {
            update = updates.recv() => update,
            () = stale(&gate, STALE_AFTER.mul_f64(jitter)) => {
                tracing::info!(%discovery, "no endpoint has been ready for long; asking discovery again");
                updates = resolve();
                anew = true;
                continue;
            }
            endpoint = refusing(&balance, &known, asked, patience.mul_f64(jitter)) => {
                tracing::info!(%discovery, %endpoint, "an endpoint keeps refusing connections; asking discovery again");
                updates = resolve();
                anew = true;
                (patience, asked) = ((patience * 2).min(REFUSED_FOR_MAX), Instant::now());
                continue;
            }
        };
        if std::mem::take(&mut anew)
            && let Some(Update::Reset(first)) = update
        {
            update = Some(gather(first, &mut updates).await);
        }
        let mut member = |endpoint: &Endpoint| {
            let weight = endpoint.meta.weight.unwrap_or(PLAIN_WEIGHT);
            let unchanged = known.get(&endpoint.addr).is_some_and(|meta| *meta == endpoint.meta);
            if unchanged && let Some(member) = balance.member(&endpoint.addr) {
                return (endpoint.addr, member);
            }
            patience = REFUSED_FOR;
            let replica = build(endpoint);
            let ready = replica.ready();
            (endpoint.addr, Member { service: Arc::new(replica), ready, weight })
        };
        match update {
            Some(Update::Reset(endpoints)) => {
                let members = endpoints.iter().map(&mut member).collect();
                known = endpoints.into_iter().map(|e| (e.addr, e.meta)).collect();
                balance.reset(members);
            }
            Some(Update::Add(endpoints)) => {
                let members = endpoints.iter().map(&mut member).collect();
                known.extend(endpoints.into_iter().map(|e| (e.addr, e.meta)));
                balance.add(members);
            }
            Some(Update::Remove(addrs)) => {
                for addr in &addrs {
                    known.remove(addr);
                }
                balance.remove(&addrs);
            }
            Some(Update::Fail(reason)) => {
                tracing::warn!(%discovery, %reason, "discovery gave up; requests fail until the policy changes");
                failed.store(true, Relaxed);
                balance.fail(reason);
                return;
            }
            None => return,
        }
    }
}

/// Messages of a new stream, as one: those that come at once. A failure is told by the next.
async fn gather(first: Vec<Endpoint>, updates: &mut mpsc::Receiver<Update>) -> Update {
    let due = Instant::now() + GATHER;
    let mut set: BTreeMap<SocketAddr, Endpoint> = first.into_iter().map(|e| (e.addr, e)).collect();
    while let Ok(Some(update)) = timeout_at(due, updates.recv()).await {
        match update {
            Update::Reset(endpoints) => set = endpoints.into_iter().map(|e| (e.addr, e)).collect(),
            Update::Add(endpoints) => set.extend(endpoints.into_iter().map(|e| (e.addr, e))),
            Update::Remove(addrs) => addrs.iter().for_each(|addr| drop(set.remove(addr))),
            Update::Fail(reason) => return Update::Fail(reason),
        }
    }
    Update::Reset(set.into_values().collect())
}

/// Ends with the address of a replica that could not be connected to for `patience`, at least that long after discovery
/// was `asked`.
async fn refusing<E: Replica>(
    balance: &Balance<SocketAddr, Arc<E>>,
    known: &BTreeMap<SocketAddr, Arc<EndpointMeta>>,
    asked: Instant,
    patience: Duration,
) -> SocketAddr {
    sleep_until(asked + patience).await;
    loop {
        let refused = |addr: &&SocketAddr| {
            balance.get(addr).and_then(|replica| replica.refused_for()).is_some_and(|refused| refused >= patience)
        };
        if let Some(addr) = known.keys().find(refused) {
            return *addr;
        }
        sleep(LOOK).await;
    }
}

/// Ends once the gate has been shut for a while.
async fn stale(gate: &Ready, after: Duration) {
    loop {
        let changed = gate.changed();
        if gate.get() {
            changed.await;
            continue;
        }
        tokio::select! {
            () = changed => {}
            () = sleep(after) => return,
        }
    }
}

/// Choice among backends (behaviour.md D.5). `B` is a backend with its filters.
pub(super) enum Distribution<B> {
    /// Nowhere.
    Empty,
    /// The first that is ready, in order.
    First(Box<[B]>),
    /// By weight among those that are ready. No weight is 0.
    Random(Box<[(B, u32)]>),
}

impl<B> Distribution<B> {
    /// A backend; if none is ready, the one that would have been chosen, which then says why it is not.
    pub(super) fn pick(&self, is_open: impl Fn(&B) -> bool, mut random: impl FnMut(u64) -> u64) -> Option<&B> {
        match self {
            Self::Empty => None,
            Self::First(backends) => backends.iter().find(|b| is_open(b)).or_else(|| backends.first()),
            Self::Random(backends) => {
                if let [(only, _)] = &**backends {
                    return Some(only);
                }
                let total = backends.iter().map(|(_, weight)| u64::from(*weight)).sum();
                let first = draw(backends.iter(), random(total));
                if first.is_some_and(&is_open) {
                    return first;
                }
                // Seldom: draw again among those that are ready.
                let open = || backends.iter().filter(|(b, _)| is_open(b));
                match open().map(|(_, weight)| u64::from(*weight)).sum() {
                    0 => first,
                    total => draw(open(), random(total)).or(first),
                }
            }
        }
    }

    /// All backends, in order.
    pub(super) fn iter(&self) -> impl Iterator<Item = &B> {
        let (first, random): (&[B], &[(B, u32)]) = match self {
            Self::Empty => (&[], &[]),
            Self::First(backends) => (backends, &[]),
            Self::Random(backends) => (&[], backends),
        };
        first.iter().chain(random.iter().map(|(b, _)| b))
    }
}

fn draw<'a, B: 'a>(mut backends: impl Iterator<Item = &'a (B, u32)>, mut at: u64) -> Option<&'a B> {
    backends
        .find(|(_, weight)| match at.checked_sub(u64::from(*weight)) {
            Some(left) => {
                at = left;
                false
            }
            None => true,
        })
        .map(|(backend, _)| backend)
}

/// A random number below its argument, which is above 0.
pub(super) fn random(below: u64) -> u64 {
    if below == 0 { 0 } else { rand::rng().random_range(0..below) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(d: &Distribution<&'static str>, open: &[&str], draws: &[u64], expected: Option<&str>) {
        let mut draws = draws.iter();
        let picked = d.pick(|b| open.contains(b), |_| *draws.next().unwrap());
        assert_eq!(picked.copied(), expected);
    }

    #[test]
    fn the_first_ready_backend_is_taken() {
        let d = Distribution::First(["a", "b"].into());
        check(&d, &["a", "b"], &[], Some("a"));
        check(&d, &["b"], &[], Some("b"));
        check(&d, &[], &[], Some("a"));
        check(&Distribution::Empty, &[], &[], None);
    }

    #[test]
    fn weights_share_what_is_ready() {
        let d = Distribution::Random([("a", 1), ("b", 3), ("c", 6)].into());
        for (at, expected) in [(0, "a"), (1, "b"), (3, "b"), (4, "c"), (9, "c")] {
            check(&d, &["a", "b", "c"], &[at], Some(expected));
        }
        check(&d, &["a", "c"], &[1, 0], Some("a"));
        check(&d, &["a", "c"], &[1, 1], Some("c"));
        check(&d, &[], &[5], Some("c"));
        check(&Distribution::Random([("a", 5)].into()), &[], &[], Some("a"));
    }
}
