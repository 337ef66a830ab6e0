//! Spreading load over the members of a set that changes: of two random ready members the less loaded one is taken
//! (power of two choices), where load is a peak-sensitive moving average of latency times requests in flight. Of two idle
//! ones the faster is the likelier.
//!
//! A pick takes no lock: the set is a snapshot, and a member's load is three atomic words. Only a request that finds
//! no ready member waits, in a bounded queue and for a bounded time (behaviour.md D.7 and D.8). No task runs for a
//! balancer: members tell it when their readiness changes, and the first waiter whose time is up shuts the gate.

use crate::ready::{Listener, Ready};
use arc_swap::ArcSwap;
use parking_lot::Mutex;
use std::{
    collections::BTreeMap,
    fmt,
    pin::pin,
    sync::{
        Arc, OnceLock, Weak,
        atomic::{
            AtomicBool, AtomicU8, AtomicU64, AtomicUsize,
            Ordering::{Relaxed, SeqCst},
        },
    },
    time::Duration,
};
use tokio::{
    sync::Notify,
    time::{Instant, timeout_at},
};

/// Smallest estimate that a member begins with (behaviour.md D.7): at zero every newcomer would win every comparison.
pub const MIN_DEFAULT_RTT: Duration = Duration::from_millis(1);

/// Random draws for each of the two candidates before all members are looked at. With half of the members ready, one
/// pick in sixteen needs the long way.
const DRAWS: usize = 4;

/// What a balancer needs to know.
#[derive(Clone, Debug)]
pub struct Config {
    /// Latency assumed of a member that has answered nothing yet; at least [`MIN_DEFAULT_RTT`].
    pub default_rtt: Duration,
    /// Time constant by which estimates decay.
    pub decay: Duration,
    /// Requests that may wait for a ready member; one more is shed at once.
    pub queue_capacity: usize,
    /// Longest wait for a ready member. The first request that has waited so long fails all that wait.
    pub failfast_timeout: Duration,
}

/// A change of the set, as [`Observer::updated`] counts it.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Update {
    /// The set was replaced by another one.
    Reset,
    /// One member was added or changed.
    Add,
    /// One member was removed.
    Remove,
}

/// Whoever counts what happens in a balancer. It is called on the request's path: handles, not look-ups.
pub trait Observer: Send + Sync + 'static {
    /// A request came in. One [`Observer::dequeued`] follows, whatever becomes of it.
    fn enqueued(&self) {}
    /// A request has its member, has failed, or was given up by its caller, after waiting so long.
    fn dequeued(&self, waited: Duration) {
        let _ = waited;
    }
    /// The gate is open: called once when the balancer is made, and after each shutting.
    fn gate_opened(&self) {}
    /// The gate has shut.
    fn gate_shut(&self) {}
    /// Members by readiness. Both are 0 once the balancer is gone.
    fn endpoints(&self, ready: usize, pending: usize) {
        let _ = (ready, pending);
    }
    /// The set has changed.
    fn updated(&self, update: Update) {
        let _ = update;
    }
}

/// Counts nothing.
impl Observer for () {}

/// One of the services among which requests are spread.
#[derive(Clone, Debug)]
pub struct Member<S> {
    /// What is called.
    pub service: S,
    /// Whether it can take work. The flag is also the member's identity: a member that is set again under its key with
    /// the same flag keeps its load estimate.
    pub ready: Ready,
    /// Relative share of the requests; with 0 it takes them only if no other member is ready.
    pub weight: u32,
}

/// A set of members among which load is spread. Clones are the same set.
pub struct Balance<K, S>(Arc<Shared<K, S>>);

/// A member chosen for one request.
#[derive(Debug)]
pub struct Picked<K, S> {
    /// Under which key it stands in the set.
    pub key: K,
    /// What is called.
    pub service: S,
    /// Counts the request as in flight until dropped.
    pub load: LoadHandle,
}

/// Why there is no member for a request.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotReady {
    /// It, or one that came before it, has waited as long as may be.
    #[error("no endpoint became ready within {0:?}: service in fail-fast")]
    FailFast(Duration),
    /// The gate is shut, or the queue is full; it did not wait.
    #[error("no endpoint is ready and requests are not queued: load shed")]
    LoadShed,
    /// There never will be one.
    #[error("{0}")]
    Failed(Arc<str>),
}

/// What an operator may want to see of a member.
#[derive(Clone, Debug, PartialEq)]
pub struct Status<K> {
    /// Its key.
    pub key: K,
    /// Whether it can take work.
    pub ready: bool,
    /// Requests in flight.
    pub in_flight: usize,
    /// Latency estimate at this moment.
    pub rtt: Duration,
    /// Relative share.
    pub weight: u32,
}

/// A request in flight at a member, until dropped.
#[derive(Debug)]
pub struct LoadHandle {
    live: Arc<Live>,
    sampled: AtomicBool,
}

struct Shared<K, S> {
    core: Arc<Core>,
    set: ArcSwap<Set<K, S>>,
    /// Held by whoever changes the set, never by a request.
    changing: Mutex<()>,
    failed: OnceLock<Arc<str>>,
    random: Random,
}

/// What members and waiters share, whatever the type of the members.
struct Core {
    config: Config,
    observer: Arc<dyn Observer>,
    /// Instants are kept as nanoseconds since this one.
    base: Instant,
    /// True while open.
    gate: Ready,
    /// Woken when a member becomes ready, the gate moves, or the set fails.
    wake: Notify,
    waiting: AtomicUsize,
    /// Members whose readiness was last seen as ready.
    usable: AtomicUsize,
    /// All members.
    total: AtomicUsize,
    /// Orders movements of the gate and reports to the observer. Never held across a wait.
    report: Mutex<()>,
}

/// A snapshot, in the order of keys.
struct Set<K, S> {
    entries: Box<[Entry<K, S>]>,
    /// Where weights differ: for each member the sum of weights up to and including its own.
    shares: Option<Box<[u64]>>,
    /// Mean of the weights.
    mean: f64,
}

struct Entry<K, S> {
    key: K,
    service: S,
    weight: u32,
    live: Arc<Live>,
}

/// The state of a member that outlives snapshots.
struct Live {
    core: Weak<Core>,
    ready: Ready,
    /// What `Core::usable` counts it as: one of the constants below.
    seen: AtomicU8,
    in_flight: AtomicUsize,
    /// The estimate in nanoseconds, as the bits of an `f64`.
    rtt: AtomicU64,
    /// When the estimate was made, in nanoseconds since `base`.
    stamp: AtomicU64,
    base: Instant,
    /// Nanoseconds, above 0.
    decay: f64,
}

/// `Live::seen`: Pending ⇄ Ready, and from both to Gone, which is final.
const PENDING: u8 = 0;
const READY: u8 = 1;
const GONE: u8 = 2;

impl<K, S> Balance<K, S>
where
    K: Ord + Clone,
    S: Clone,
{
    /// An empty set, which is not ready, with an open gate.
    pub fn new(config: Config, observer: Arc<dyn Observer>) -> Self {
        Self::with_seed(config, observer, rand::random())
    }

    /// As [`Balance::new`], with the seed of its draws.
    pub fn with_seed(config: Config, observer: Arc<dyn Observer>, seed: u64) -> Self {
        observer.gate_opened();
        observer.endpoints(0, 0);
        let core = Core {
            config,
            observer,
            base: Instant::now(),
            gate: Ready::new(true),
            wake: Notify::new(),
            waiting: AtomicUsize::new(0),
            usable: AtomicUsize::new(0),
            total: AtomicUsize::new(0),
            report: Mutex::new(()),
        };
        Self(Arc::new(Shared {
            core: Arc::new(core),
            set: ArcSwap::from_pointee(Set::new(Vec::new())),
            changing: Mutex::new(()),
            failed: OnceLock::new(),
            random: Random(AtomicU64::new(seed)),
        }))
    }

    /// Replaces the whole set. Members whose key and flag are those of a present member keep their load.
    pub fn reset(&self, members: Vec<(K, Member<S>)>) {
        self.change(|set| {
            let mut old = std::mem::take(set);
            let mut changed = false;
            for (key, member) in members {
                // The last of several members with one key wins.
                let present = old.remove(&key).or_else(|| set.remove(&key));
                changed |= self.put(set, present, key, member);
            }
            changed |= !old.is_empty();
            if changed { vec![Update::Reset] } else { Vec::new() }
        });
    }

    /// Adds members, or replaces those with the same key.
    pub fn add(&self, members: Vec<(K, Member<S>)>) {
        self.change(|set| {
            let mut updates = Vec::new();
            for (key, member) in members {
                let present = set.remove(&key);
                if self.put(set, present, key, member) {
                    updates.push(Update::Add);
                }
            }
            updates
        });
    }

    /// Removes members. Requests in flight at them are not disturbed.
    pub fn remove(&self, keys: &[K]) {
        self.change(|set| keys.iter().filter(|key| set.remove(*key).is_some()).map(|_| Update::Remove).collect());
    }

    /// Fails for good: every request, waiting or to come, gets the reason. The first reason stays.
    pub fn fail(&self, reason: Arc<str>) {
        let _ = self.0.failed.set(reason);
        self.0.core.wake.notify_waiters();
    }

    /// The service under a key, ready or not.
    pub fn get(&self, key: &K) -> Option<S> {
        self.0.set.load().find(key).map(|entry| entry.service.clone())
    }

    /// The member under a key, to be given back unchanged to [`Balance::reset`] or [`Balance::add`].
    pub fn member(&self, key: &K) -> Option<Member<S>> {
        self.0.set.load().find(key).map(|entry| Member {
            service: entry.service.clone(),
            ready: entry.live.ready.clone(),
            weight: entry.weight,
        })
    }

    /// Members, ready or not.
    pub fn len(&self) -> usize {
        self.0.set.load().entries.len()
    }

    /// Whether there is no member.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// All members as they are now, in the order of keys.
    pub fn status(&self) -> Vec<Status<K>> {
        let now = self.0.core.now();
        let status = |entry: &Entry<K, S>| Status {
            key: entry.key.clone(),
            ready: entry.live.ready.get(),
            in_flight: entry.live.in_flight.load(Relaxed),
            rtt: Duration::from_nanos(entry.live.rtt_at(now) as u64),
            weight: entry.weight,
        };
        self.0.set.load().entries.iter().map(status).collect()
    }

    /// False from the moment a request has waited in vain for the failfast timeout, until a member is ready.
    pub fn gate(&self) -> Ready {
        self.0.core.gate.clone()
    }

    /// A ready member for one request. Where none is ready it waits, at most for the failfast timeout, if the gate is
    /// open and the queue has room. Dropping the future gives the place in the queue back.
    ///
    /// # Errors
    /// [`NotReady`] says which bound was met.
    pub async fn acquire(&self) -> Result<Picked<K, S>, NotReady> {
        let shared = &*self.0;
        if let Some(result) = shared.try_acquire() {
            shared.core.observer.enqueued();
            shared.core.observer.dequeued(Duration::ZERO);
            return result;
        }
        shared.acquire_later().await
    }

    /// The member under a key if it is ready: for requests that are bound to one.
    pub fn acquire_key(&self, key: &K) -> Option<Picked<K, S>> {
        let set = self.0.set.load();
        set.find(key).filter(|entry| entry.live.ready.get()).map(Entry::picked)
    }

    /// Puts a member into a set under construction and says whether that is a change.
    fn put(
        &self,
        set: &mut BTreeMap<K, Entry<K, S>>,
        present: Option<Entry<K, S>>,
        key: K,
        Member { service, ready, weight }: Member<S>,
    ) -> bool {
        let (live, changed) = match present {
            Some(p) if p.live.ready.same(&ready) => (p.live, p.weight != weight),
            _ => (Arc::new(Live::new(&self.0.core, ready)), true),
        };
        set.insert(key.clone(), Entry { key, service, weight, live });
        changed
    }

    /// The one place where the set changes.
    fn change(&self, edit: impl FnOnce(&mut BTreeMap<K, Entry<K, S>>) -> Vec<Update>) {
        let Shared { core, set, changing, .. } = &*self.0;
        let changing = changing.lock();
        let old = set.load_full();
        let mut members = old.entries.iter().map(|entry| (entry.key.clone(), entry.clone())).collect();
        let updates = edit(&mut members);
        let new = Arc::new(Set::new(members.into_values().collect()));
        set.store(new.clone());
        core.total.store(new.entries.len(), SeqCst);
        // Newcomers report for duty only now, when a woken request can find them, and before the others leave, so
        // that a full replacement has no moment without a ready member.
        for entry in new.entries.iter() {
            if old.find(&entry.key).is_none_or(|was| !Arc::ptr_eq(&was.live, &entry.live)) {
                let weak: Weak<Live> = Arc::downgrade(&entry.live);
                entry.live.ready.listen(weak);
                entry.live.changed();
            }
        }
        for entry in old.entries.iter() {
            if new.find(&entry.key).is_none_or(|now| !Arc::ptr_eq(&now.live, &entry.live)) {
                entry.live.retire(core);
            }
        }
        for update in updates {
            core.observer.updated(update);
        }
        core.report();
        drop(changing);
    }
}

impl<K: Ord + Clone, S: Clone> Shared<K, S> {
    /// Whatever can be answered without waiting.
    fn try_acquire(&self) -> Option<Result<Picked<K, S>, NotReady>> {
        if let Some(reason) = self.failed.get() {
            return Some(Err(NotReady::Failed(reason.clone())));
        }
        let set = self.set.load();
        if let Some(entry) = set.choose(&mut self.random.draws()) {
            return Some(Ok(entry.picked()));
        }
        // Looked at after the members: the gate opens only once one is ready.
        (!self.core.gate.get()).then_some(Err(NotReady::LoadShed))
    }

    async fn acquire_later(&self) -> Result<Picked<K, S>, NotReady> {
        let Config { queue_capacity, failfast_timeout, .. } = self.core.config;
        let Some(place) = Waiting::enter(&self.core, queue_capacity) else { return Err(NotReady::LoadShed) };
        let deadline = place.since + failfast_timeout;
        let mut woken = pin!(self.core.wake.notified());
        loop {
            // Registered before looking: whatever happens after the look wakes it.
            woken.as_mut().enable();
            match self.try_acquire() {
                // The gate shut while this request was waiting: it fails as the one that shut it.
                Some(Err(NotReady::LoadShed)) => return Err(NotReady::FailFast(failfast_timeout)),
                Some(result) => return result,
                None => {}
            }
            if timeout_at(deadline, woken.as_mut()).await.is_err() {
                // A last look: a member may have become ready in the same instant.
                if let Some(Ok(picked)) = self.try_acquire() {
                    return Ok(picked);
                }
                self.core.shut();
                return Err(NotReady::FailFast(failfast_timeout));
            }
            woken.set(self.core.wake.notified());
        }
    }
}

/// A place in the queue.
struct Waiting<'a> {
    core: &'a Core,
    since: Instant,
}

impl<'a> Waiting<'a> {
    fn enter(core: &'a Core, capacity: usize) -> Option<Self> {
        core.observer.enqueued();
        if core.waiting.fetch_add(1, SeqCst) >= capacity {
            core.waiting.fetch_sub(1, SeqCst);
            core.observer.dequeued(Duration::ZERO);
            return None;
        }
        Some(Self { core, since: Instant::now() })
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.core.waiting.fetch_sub(1, SeqCst);
        self.core.observer.dequeued(self.since.elapsed());
    }
}

impl Core {
    fn now(&self) -> u64 {
        nanos(self.base, Instant::now())
    }

    /// Tells the observer the numbers of the moment, and opens the gate if a member is ready.
    fn report(&self) {
        let report = self.report.lock();
        let (usable, total) = (self.usable.load(SeqCst), self.total.load(SeqCst));
        self.observer.endpoints(usable.min(total), total.saturating_sub(usable));
        if usable > 0 && !self.gate.get() {
            self.gate.set(true);
            self.observer.gate_opened();
        }
        drop(report);
        if usable > 0 {
            self.wake.notify_waiters();
        }
    }

    /// Shuts the gate, unless a member has become ready, and fails all that wait.
    fn shut(&self) {
        let report = self.report.lock();
        if self.usable.load(SeqCst) == 0 && self.gate.get() {
            self.gate.set(false);
            self.observer.gate_shut();
        }
        drop(report);
        self.wake.notify_waiters();
    }
}

impl<K: Ord, S> Set<K, S> {
    fn new(entries: Vec<Entry<K, S>>) -> Self {
        let total: u64 = entries.iter().map(|entry| u64::from(entry.weight)).sum();
        let uniform = entries.windows(2).all(|pair| pair[0].weight == pair[1].weight);
        let shares = (!uniform).then(|| {
            let running = entries.iter().scan(0u64, |sum, entry| {
                *sum += u64::from(entry.weight);
                Some(*sum)
            });
            running.collect()
        });
        let mean = total as f64 / entries.len().max(1) as f64;
        Self { entries: entries.into(), shares, mean }
    }

    fn find(&self, key: &K) -> Option<&Entry<K, S>> {
        let i = self.entries.binary_search_by(|entry| entry.key.cmp(key)).ok()?;
        self.entries.get(i)
    }

    /// The less loaded of two ready members drawn at random, or the only ready one.
    ///
    /// Where all weights are equal the two are distinct and drawn alike. Where they differ, each is drawn on its own
    /// by weight and may be drawn twice; together with [`Set::load`] the shares then follow the weights at low load
    /// too, where a load divided by the weight would send everything to the heaviest member.
    fn choose(&self, random: &mut Draws) -> Option<&Entry<K, S>> {
        if let [only] = &*self.entries {
            return only.live.ready.get().then_some(only);
        }
        let first = self.draw(random, None);
        let second = first.and_then(|first| self.draw(random, Some(first)));
        let (a, b) = match (first, second) {
            (Some(a), Some(b)) => (a, b),
            _ => self.search(random)?,
        };
        let (a, b) = (&self.entries[a], &self.entries[b]);
        Some(if self.is_lighter(a, b, random) { a } else { b })
    }

    /// Whether the first of two candidates takes the request: the one with the lower load.
    ///
    /// Where neither has a request in flight there is no load to tell them apart, only two estimates, and the loser's is
    /// not corrected as long as it loses: one slow sample would keep it idle for several time constants, however fast it
    /// is. There the odds are the inverse squares of the estimates: a member twice as slow takes a request in 5, one ten
    /// times as slow a request in 101, and the mean latency is never more than 1.21 times the faster one's (the maximum
    /// of (r + r²) / (1 + r²), where r is how much slower the other one is).
    fn is_lighter(&self, a: &Entry<K, S>, b: &Entry<K, S>, random: &mut Draws) -> bool {
        let in_flight = [a, b].map(|entry| entry.live.in_flight.load(Relaxed));
        let ratio = a.live.rtt_relative_to(&b.live) * self.work(a, in_flight[0]) / self.work(b, in_flight[1]);
        match in_flight {
            [0, 0] => random.fraction() * (1.0 + ratio * ratio) < 1.0,
            _ => ratio <= 1.0,
        }
    }

    /// A few random draws, for the usual case that most members are ready.
    fn draw(&self, random: &mut Draws, other: Option<usize>) -> Option<usize> {
        let ready = |i: &usize| self.entries.get(*i).is_some_and(|entry| entry.live.ready.get());
        match &self.shares {
            None => {
                let n = self.entries.len().checked_sub(usize::from(other.is_some()))?;
                // Leaves a gap where the first candidate stands.
                let skip = |i: usize| if other.is_some_and(|o| i >= o) { i + 1 } else { i };
                (0..DRAWS).find_map(|_| Some(skip(random.below(n as u64)? as usize)).filter(ready))
            }
            Some(shares) => {
                let total = shares.last().copied()?;
                let at = |point: u64| shares.partition_point(|sum| *sum <= point);
                (0..DRAWS).find_map(|_| Some(at(random.below(total)?)).filter(ready))
            }
        }
    }

    /// All ready members are looked at. Members of weight 0 count only if there is no other.
    fn search(&self, random: &mut Draws) -> Option<(usize, usize)> {
        let ready = || self.entries.iter().enumerate().filter(|(_, entry)| entry.live.ready.get());
        let weighed: u64 = ready().map(|(_, entry)| u64::from(entry.weight)).sum();
        let by_weight = self.shares.is_some() && weighed > 0;
        let share = |entry: &Entry<K, S>| if by_weight { u64::from(entry.weight) } else { 1 };
        let total: u64 = ready().map(|(_, entry)| share(entry)).sum();
        // The member in whose share a point lies; the last one if readiness was lost since the sums were made.
        let at = |point: u64| {
            let mut sum = 0;
            let mut last = None;
            for (i, entry) in ready() {
                sum += share(entry);
                if share(entry) > 0 {
                    last = Some(i);
                }
                if sum > point {
                    break;
                }
            }
            last
        };
        let p = random.below(total)?;
        let q = if by_weight || total == 1 { random.below(total)? } else { (p + 1 + random.below(total - 1)?) % total };
        let a = at(p)?;
        Some((a, at(q).unwrap_or(a)))
    }

    /// Requests that a member would have with one more, those in flight taken relative to its weight.
    fn work(&self, entry: &Entry<K, S>, in_flight: usize) -> f64 {
        let share = if self.shares.is_some() && entry.weight > 0 { self.mean / f64::from(entry.weight) } else { 1.0 };
        in_flight as f64 * share + 1.0
    }
}

impl<K: Clone, S: Clone> Entry<K, S> {
    fn picked(&self) -> Picked<K, S> {
        self.live.in_flight.fetch_add(1, Relaxed);
        let load = LoadHandle { live: self.live.clone(), sampled: AtomicBool::new(false) };
        Picked { key: self.key.clone(), service: self.service.clone(), load }
    }
}

impl<K: Clone, S: Clone> Clone for Entry<K, S> {
    fn clone(&self) -> Self {
        Self { key: self.key.clone(), service: self.service.clone(), weight: self.weight, live: self.live.clone() }
    }
}

impl Live {
    fn new(core: &Arc<Core>, ready: Ready) -> Self {
        let rtt = core.config.default_rtt.max(MIN_DEFAULT_RTT).as_nanos() as f64;
        Self {
            core: Arc::downgrade(core),
            ready,
            seen: AtomicU8::new(PENDING),
            in_flight: AtomicUsize::new(0),
            rtt: AtomicU64::new(rtt.to_bits()),
            stamp: AtomicU64::new(core.now()),
            base: core.base,
            decay: (core.config.decay.as_nanos() as f64).max(1.0),
        }
    }

    /// The estimate decays toward zero while nothing is observed, so that a member that was slow once is tried again.
    fn rtt_at(&self, now: u64) -> f64 {
        f64::from_bits(self.rtt.load(Relaxed)) * self.remains(now)
    }

    /// How many times as slow it is as another one of the set. Both have decayed to the same moment, whichever that is:
    /// the clock need not be asked.
    fn rtt_relative_to(&self, other: &Self) -> f64 {
        let [a, b] = [self, other].map(|live| f64::from_bits(live.rtt.load(Relaxed)).max(1.0));
        let [a_at, b_at] = [self, other].map(|live| live.stamp.load(Relaxed) as f64);
        a / b * ((a_at - b_at) / self.decay).exp()
    }

    /// The share of the last estimate that is left: 1 at once, 1/e after the time constant.
    fn remains(&self, now: u64) -> f64 {
        let age = now.saturating_sub(self.stamp.load(Relaxed));
        (-(age as f64) / self.decay).exp()
    }

    /// A sample above the estimate replaces it; one below pulls it down by the share that has decayed.
    fn observe(&self, sample: f64, now: u64) {
        let remains = self.remains(now);
        let next = |bits: u64| {
            let estimate = f64::from_bits(bits);
            let next = if sample >= estimate { sample } else { estimate * remains + sample * (1.0 - remains) };
            next.to_bits()
        };
        self.rtt.update(Relaxed, Relaxed, next);
        self.stamp.fetch_max(now, Relaxed);
    }

    /// It is in the set no more.
    fn retire(&self, core: &Core) {
        if self.seen.swap(GONE, SeqCst) == READY {
            core.usable.fetch_sub(1, SeqCst);
        }
    }
}

impl Listener for Live {
    /// Brings the balancer's count up to date. Of two threads here at once, both leave only when the count is true.
    fn changed(&self) {
        let Some(core) = self.core.upgrade() else { return };
        loop {
            let seen = self.seen.load(SeqCst);
            let now = if self.ready.get() { READY } else { PENDING };
            if seen == GONE || seen == now {
                return;
            }
            if self.seen.compare_exchange(seen, now, SeqCst, SeqCst).is_ok() {
                if now == READY {
                    core.usable.fetch_add(1, SeqCst);
                } else {
                    core.usable.fetch_sub(1, SeqCst);
                }
                core.report();
            }
        }
    }
}

impl LoadHandle {
    /// Tells how long the answer took. Only the first sample of a request counts.
    pub fn observe(&self, rtt: Duration) {
        if !self.sampled.swap(true, Relaxed) {
            self.live.observe(rtt.as_nanos() as f64, nanos(self.live.base, Instant::now()));
        }
    }

    /// As [`LoadHandle::observe`] for an answer that shall count as slow: at least so much, and never less than the
    /// present estimate.
    pub fn penalize(&self, at_least: Duration) {
        if !self.sampled.swap(true, Relaxed) {
            let now = nanos(self.live.base, Instant::now());
            let sample = self.live.rtt_at(now).max(at_least.as_nanos() as f64);
            self.live.observe(sample, now);
        }
    }
}

impl Drop for LoadHandle {
    fn drop(&mut self) {
        self.live.in_flight.fetch_sub(1, Relaxed);
    }
}

impl<K, S> Drop for Shared<K, S> {
    fn drop(&mut self) {
        // A member's flag may outlive the set; it must not report any more.
        for entry in self.set.load().entries.iter() {
            entry.live.seen.store(GONE, SeqCst);
        }
        let report = self.core.report.lock();
        self.core.observer.endpoints(0, 0);
        drop(report);
    }
}

impl<K, S> Clone for Balance<K, S> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<K, S> fmt::Debug for Balance<K, S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let core = &self.0.core;
        f.debug_struct("Balance")
            .field("members", &core.total.load(SeqCst))
            .field("ready", &core.usable.load(SeqCst))
            .field("waiting", &core.waiting.load(SeqCst))
            .finish()
    }
}

impl fmt::Debug for Live {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Live").field("ready", &self.ready).field("in_flight", &self.in_flight).finish()
    }
}

fn nanos(base: Instant, at: Instant) -> u64 {
    u64::try_from(at.saturating_duration_since(base).as_nanos()).unwrap_or(u64::MAX)
}

/// Where picks begin their draws, shared without a lock: one step for each pick, however often it draws.
struct Random(AtomicU64);

/// Distance between the beginnings of two picks, and between two draws of one (odd numbers without a pattern, so that
/// the two never fall into step).
const PICK_STEP: u64 = 0x9e37_79b9_7f4a_7c15;
const DRAW_STEP: u64 = 0xd134_2543_de82_ef95;

/// Numbers without a pattern for one pick (the SplitMix64 construction: a counter that is mixed). Not for secrets.
struct Draws(u64);

impl Random {
    fn draws(&self) -> Draws {
        Draws(self.0.fetch_add(PICK_STEP, Relaxed))
    }
}

impl Draws {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(DRAW_STEP);
        let x = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    /// A number below `n`; none if `n` is 0. The bias of the multiplication is below `n / 2^64`.
    fn below(&mut self, n: u64) -> Option<u64> {
        (n > 0).then(|| ((u128::from(self.next()) * u128::from(n)) >> 64) as u64)
    }

    /// Within `0.0..1.0`, in steps of 2^-53.
    fn fraction(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        backoff::Backoff,
        breaker::{self, Breaker, Outcome},
        ready,
    };
    use futures_util::FutureExt;
    use std::future::Future;

    const FAILFAST: Duration = Duration::from_secs(3);

    #[derive(Default)]
    struct Log(Mutex<Vec<String>>);

    impl Observer for Log {
        fn gate_opened(&self) {
            self.0.lock().push("open".into());
        }
        fn gate_shut(&self) {
            self.0.lock().push("shut".into());
        }
        fn endpoints(&self, ready: usize, pending: usize) {
            self.0.lock().push(format!("{ready}/{pending}"));
        }
        fn updated(&self, update: Update) {
            self.0.lock().push(format!("{update:?}"));
        }
        fn enqueued(&self) {
            self.0.lock().push("in".into());
        }
        fn dequeued(&self, waited: Duration) {
            self.0.lock().push(format!("out {}", waited.as_millis()));
        }
    }

    impl Log {
        fn take(&self) -> String {
            let mut log = std::mem::take(&mut *self.0.lock());
            log.dedup();
            log.join(" ")
        }
    }

    fn config() -> Config {
        Config {
            default_rtt: Duration::from_millis(30),
            decay: Duration::from_secs(10),
            queue_capacity: 10,
            failfast_timeout: FAILFAST,
        }
    }

    fn balance() -> Balance<u32, u32> {
        Balance::with_seed(config(), Arc::new(()), 7)
    }

    fn member(ready: &Ready, weight: u32) -> Member<u32> {
        Member { service: 0, ready: ready.clone(), weight }
    }

    fn up(weight: u32) -> Member<u32> {
        member(&Ready::new(true), weight)
    }

    /// How often each member is picked in `n` requests that end at once.
    fn shares(balance: &Balance<u32, u32>, n: u32) -> BTreeMap<u32, u32> {
        let mut counts = BTreeMap::new();
        for _ in 0..n {
            let picked = balance.acquire().now_or_never().unwrap().unwrap();
            *counts.entry(picked.key).or_default() += 1;
        }
        counts
    }

    fn poll<F: Future>(future: &mut std::pin::Pin<Box<F>>) -> Option<F::Output> {
        future.as_mut().now_or_never()
    }

    #[tokio::test(start_paused = true)]
    async fn equal_members_share_alike() {
        let balance = balance();
        balance.reset((0..4).map(|k| (k, up(1))).collect());
        for (_, n) in shares(&balance, 4_000) {
            assert!((900..1_100).contains(&n), "{n}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn weights_are_shares() {
        let balance = balance();
        balance.reset(vec![(0, up(1)), (1, up(3)), (2, up(0))]);
        let counts = shares(&balance, 4_000);
        assert!((900..1_100).contains(&counts[&0]), "{counts:?}");
        assert_eq!(counts.get(&2), None, "weight 0 takes nothing while another is ready");
    }

    #[tokio::test(start_paused = true)]
    async fn weights_hold_under_load() {
        let balance = balance();
        balance.reset(vec![(0, up(1)), (1, up(3))]);
        let mut held = Vec::new();
        for _ in 0..400 {
            held.push(balance.acquire().await.unwrap());
        }
        let light = held.iter().filter(|picked| picked.key == 0).count();
        assert!((85..115).contains(&light), "{light}");
    }

    #[tokio::test(start_paused = true)]
    async fn weight_zero_is_the_last_resort() {
        let (a, b) = (Ready::new(true), Ready::new(true));
        let balance = balance();
        balance.reset(vec![(0, member(&a, 5)), (1, member(&b, 0)), (2, up(0))]);
        assert_eq!(shares(&balance, 50).keys().copied().collect::<Vec<_>>(), [0]);
        a.set(false);
        assert_eq!(shares(&balance, 50).keys().copied().collect::<Vec<_>>(), [1, 2]);
        let zeroes = Balance::with_seed(config(), Arc::new(()), 1);
        zeroes.reset(vec![(0, up(0)), (1, up(0))]);
        assert_eq!(shares(&zeroes, 50).len(), 2);
    }

    #[tokio::test(start_paused = true)]
    async fn only_ready_members_are_picked_and_both_candidates_differ() {
        let balance = balance();
        let flags: Vec<_> = (0..50).map(|_| Ready::new(false)).collect();
        balance.reset(flags.iter().enumerate().map(|(k, ready)| (k as u32, member(ready, 1))).collect());
        flags[7].set(true);
        assert_eq!(shares(&balance, 100).into_iter().collect::<Vec<_>>(), [(7, 100)]);
        flags[9].set(true);
        // With two ready members, the one in use must lose every comparison.
        let busy = balance.acquire().await.unwrap();
        let other = if busy.key == 7 { 9 } else { 7 };
        assert_eq!(shares(&balance, 100).into_iter().collect::<Vec<_>>(), [(other, 100)]);
    }

    /// The requests, one at a time, that each of the members takes in `n`, where a member's request takes as long as
    /// `latency` says of it.
    async fn one_at_a_time(
        balance: &Balance<u32, u32>,
        n: u32,
        mut latency: impl FnMut(u32) -> Duration,
    ) -> BTreeMap<u32, u32> {
        let mut counts = BTreeMap::new();
        for _ in 0..n {
            let picked = balance.acquire().await.unwrap();
            let took = latency(picked.key);
            tokio::time::advance(took).await;
            picked.load.observe(took);
            *counts.entry(picked.key).or_default() += 1;
        }
        counts
    }

    /// Latencies of equal members on a machine that has more to do, in tenths of a millisecond.
    fn noise() -> impl FnMut(u32) -> Duration {
        let mut noise =
            [11, 81, 74, 61, 110, 18, 13, 11, 54, 59, 15, 54, 12, 11, 70, 13, 84, 15, 53, 118].iter().cycle();
        move |_| Duration::from_micros(noise.next().unwrap() * 100)
    }

    #[tokio::test(start_paused = true)]
    async fn members_that_are_equal_but_noisy_share_alike_one_at_a_time() {
        for seed in 0..20 {
            let balance = Balance::with_seed(config(), Arc::new(()), seed);
            balance.reset(vec![(0, up(1)), (1, up(1))]);
            tokio::time::advance(Duration::from_millis(450)).await;
            let counts = one_at_a_time(&balance, 100, noise()).await;
            assert!(counts.len() == 2 && counts.values().all(|n| *n >= 30), "seed {seed}: {counts:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn one_slow_answer_does_not_starve_a_member() {
        let balance = balance();
        balance.reset(vec![(0, up(1)), (1, up(1))]);
        one_at_a_time(&balance, 100, noise()).await;
        balance.acquire_key(&1).unwrap().load.observe(Duration::from_millis(90));
        let counts = one_at_a_time(&balance, 100, noise()).await;
        assert!((2..30).contains(&counts[&1]), "{counts:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_slow_member_takes_little_one_at_a_time() {
        let balance = balance();
        balance.reset(vec![(0, up(1)), (1, up(1))]);
        let latency = |key| Duration::from_millis(if key == 0 { 5 } else { 200 });
        let counts = one_at_a_time(&balance, 1_000, latency).await;
        assert!((1..30).contains(&counts[&1]), "{counts:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn slow_members_are_avoided_until_their_estimate_has_decayed() {
        let balance = balance();
        balance.reset(vec![(0, up(1)), (1, up(1))]);
        balance.acquire_key(&0).unwrap().load.observe(Duration::from_millis(10));
        balance.acquire_key(&1).unwrap().load.penalize(Duration::from_secs(5));
        assert_eq!(shares(&balance, 100).into_iter().collect::<Vec<_>>(), [(0, 100)]);
        // Member 0 goes on being observed; e^-7 of five seconds is below its 10 ms.
        for _ in 0..70 {
            tokio::time::advance(Duration::from_secs(1)).await;
            balance.acquire_key(&0).unwrap().load.observe(Duration::from_millis(10));
        }
        assert!(shares(&balance, 100)[&1] > 60);
    }

    #[tokio::test(start_paused = true)]
    async fn estimates_rise_at_once_and_fall_slowly() {
        let balance = balance();
        balance.reset(vec![(0, up(1))]);
        let rtt = || balance.status()[0].rtt.as_micros();
        assert_eq!(rtt(), 30_000);
        balance.acquire().await.unwrap().load.observe(Duration::from_millis(100));
        assert_eq!(rtt(), 100_000);
        tokio::time::advance(Duration::from_secs(10)).await;
        assert_eq!(rtt(), 36_787, "100 ms / e after the time constant");
        balance.acquire().await.unwrap().load.observe(Duration::from_millis(10));
        assert_eq!(rtt(), 43_109, "100 / e + 10 * (1 - 1/e)");
        let picked = balance.acquire().await.unwrap();
        picked.load.observe(Duration::from_millis(50));
        picked.load.observe(Duration::from_millis(500));
        assert_eq!(rtt(), 50_000, "one sample for each request");
        balance.acquire().await.unwrap().load.penalize(Duration::from_millis(1));
        assert_eq!(rtt(), 50_000, "a penalty is never a reward");
        assert_eq!(balance.status()[0].in_flight, 1);
        drop(picked);
        assert_eq!(balance.status()[0].in_flight, 0);
    }

    #[tokio::test(start_paused = true)]
    async fn waits_for_a_member_and_fails_fast_without() {
        let log = Arc::new(Log::default());
        let balance: Balance<u32, u32> = Balance::with_seed(config(), log.clone(), 1);
        assert_eq!(log.take(), "open 0/0");
        let ready = Ready::new(false);
        balance.reset(vec![(1, member(&ready, 1))]);
        assert_eq!(log.take(), "Reset 0/1");

        let mut waiting = Box::pin(balance.acquire());
        assert!(poll(&mut waiting).is_none());
        tokio::time::advance(Duration::from_secs(1)).await;
        ready.set(true);
        assert_eq!(waiting.await.unwrap().key, 1);
        assert_eq!(log.take(), "in 1/0 out 1000");

        ready.set(false);
        let (mut first, mut second) = (Box::pin(balance.acquire()), Box::pin(balance.acquire()));
        assert!(poll(&mut first).is_none());
        tokio::time::advance(Duration::from_secs(2)).await;
        assert!(poll(&mut second).is_none());
        tokio::time::advance(Duration::from_secs(1)).await;
        assert_eq!(first.await.unwrap_err(), NotReady::FailFast(FAILFAST));
        assert_eq!(poll(&mut second).unwrap().unwrap_err(), NotReady::FailFast(FAILFAST), "all that wait fail");
        assert!(!balance.gate().get());
        assert_eq!(poll(&mut Box::pin(balance.acquire())).unwrap().unwrap_err(), NotReady::LoadShed);
        assert_eq!(log.take(), "0/1 in shut out 3000 out 1000 in out 0");

        ready.set(true);
        assert!(balance.gate().get(), "it opens without traffic");
        assert_eq!(balance.acquire().await.unwrap().key, 1);
        drop(second);
        drop(balance);
        assert_eq!(log.take(), "1/0 open in out 0 0/0");
        ready.set(false);
        assert_eq!(log.take(), "");
    }

    #[tokio::test(start_paused = true)]
    async fn an_emptied_set_fails_those_that_wait() {
        let balance = balance();
        balance.reset(vec![(1, member(&Ready::new(false), 1))]);
        let mut waiting = Box::pin(balance.acquire());
        assert!(poll(&mut waiting).is_none());
        balance.remove(&[1]);
        assert!(balance.is_empty());
        assert!(poll(&mut waiting).is_none());
        assert_eq!(waiting.await.unwrap_err(), NotReady::FailFast(FAILFAST));
        balance.add(vec![(2, up(1))]);
        assert!(balance.gate().get());
    }

    #[tokio::test(start_paused = true)]
    async fn the_queue_is_bounded_and_places_are_given_back() {
        let balance: Balance<u32, u32> = Balance::with_seed(Config { queue_capacity: 1, ..config() }, Arc::new(()), 1);
        let mut waiting = Box::pin(balance.acquire());
        assert!(poll(&mut waiting).is_none());
        assert_eq!(balance.acquire().await.unwrap_err(), NotReady::LoadShed);
        drop(waiting);
        assert!(poll(&mut Box::pin(balance.acquire())).is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn failure_is_final() {
        let balance = balance();
        let mut waiting = Box::pin(balance.acquire());
        assert!(poll(&mut waiting).is_none());
        balance.fail("no such service".into());
        balance.fail("other".into());
        assert_eq!(waiting.await.unwrap_err(), NotReady::Failed("no such service".into()));
        balance.add(vec![(1, up(1))]);
        assert!(matches!(balance.acquire().await, Err(NotReady::Failed(_))));
    }

    #[tokio::test(start_paused = true)]
    async fn members_given_back_keep_their_load() {
        let log = Arc::new(Log::default());
        let balance: Balance<u32, u32> = Balance::with_seed(config(), log.clone(), 1);
        balance.reset(vec![(1, up(1)), (2, up(1))]);
        balance.acquire_key(&1).unwrap().load.observe(Duration::from_millis(90));
        log.take();
        balance.reset(vec![(1, balance.member(&1).unwrap()), (2, balance.member(&2).unwrap())]);
        assert_eq!(log.take(), "2/0", "nothing changed");
        balance.reset(vec![(1, Member { weight: 2, ..balance.member(&1).unwrap() }), (2, up(1))]);
        assert_eq!(balance.status()[0].rtt, Duration::from_millis(90));
        balance.remove(&[2, 3]);
        assert_eq!(log.take(), "2/0 Reset 2/0 Remove 1/0");
        assert_eq!(balance.len(), 1);
        assert!(balance.acquire_key(&2).is_none() && balance.get(&2).is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn of_those_that_wait_one_is_the_probe() {
        let config = breaker::Config::Consecutive {
            max_failures: 1,
            backoff: Backoff { min: Duration::from_secs(1), max: Duration::from_secs(1), jitter: 0.0 },
        };
        let breaker = Breaker::new(config, 1);
        let balance = balance();
        balance.reset(vec![(1, member(&ready::all([Ready::new(true), breaker.ready()]), 1))]);
        breaker.admit().unwrap().resolve(Outcome::Failure);
        let request = async || {
            loop {
                let picked = balance.acquire().await?;
                if let Some(permit) = breaker.admit() {
                    return Ok::<_, NotReady>((picked, permit));
                }
            }
        };
        let (mut first, mut second) = (Box::pin(request()), Box::pin(request()));
        assert!(poll(&mut first).is_none() && poll(&mut second).is_none());
        tokio::time::sleep(Duration::from_millis(1_001)).await;
        let (_, probe) = poll(&mut first).unwrap().unwrap();
        assert!(probe.is_probe() && poll(&mut second).is_none(), "the other one waits for its verdict");
        probe.resolve(Outcome::Success);
        assert!(!poll(&mut second).unwrap().unwrap().1.is_probe());
    }

    #[test]
    fn futures_may_move_between_threads() {
        fn check<T: Send>(_: &T) {}
        let balance = balance();
        check(&balance.acquire());
        check(&balance.gate().wait());
    }

    #[test]
    fn counts_are_true_after_a_race() {
        let balance = balance();
        let flags: Vec<_> = (0..4).map(|_| Ready::new(false)).collect();
        balance.reset(flags.iter().enumerate().map(|(k, ready)| (k as u32, member(ready, 1))).collect());
        std::thread::scope(|s| {
            for flag in flags.iter().chain(&flags) {
                s.spawn(|| (0..2_000).for_each(|i| flag.set(i % 3 == 0)));
            }
            s.spawn(|| {
                for _ in 0..200 {
                    balance.remove(&[3]);
                    balance.add(vec![(3, member(&flags[3], 1))]);
                }
            });
        });
        let ready = flags.iter().filter(|flag| flag.get()).count();
        assert_eq!(balance.0.core.usable.load(SeqCst), ready);
    }
}
