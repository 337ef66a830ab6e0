//! The embedded control plane: folders of Kubernetes manifests in, values of [`crate::policy`] out.
//!
//! A change of a file meets, first to last: `watch` (something changed), `files` (documents read again where their text
//! changed), `manifest` (objects, every field checked), and only if nothing anywhere is wrong `index` (objects in force),
//! then `server`, `client` and `endpoints` for those policies and resolutions that looked at what changed. What is wrong
//! leaves the last good state in force and is told by `status`.
//!
//! In standalone mode a Pod is meshed if it has the label `linkerd.io/control-plane-ns` with the configured namespace, as
//! Linkerd's injector would have left it.

mod alloc;
mod annotations;
mod check;
mod client;
mod duration;
mod endpoints;
mod files;
mod gateways;
mod index;
mod manifest;
mod mirror;
mod profile;
mod report;
mod routes;
mod server;
mod watch;
mod workload;
mod yaml;

pub use self::{
    alloc::ServiceRange,
    check::{check, check_with},
    files::{Cluster, Folder},
    report::{Finding, Report, Severity},
    workload::{Workload, WorkloadKind},
};

use self::{
    endpoints::{Delta, Local, Replicas, ServiceName},
    files::{Change, Files},
    index::{Dep, Index, View},
    manifest::Key,
    mirror::Facts,
};
use crate::{
    config::DefaultPolicy,
    policy::{ClientPolicy, DiscoveryError, Resolution, ServerPolicy, Source, Target, Update, client::Profile},
};
use futures_util::future::BoxFuture;
use ipnet::IpNet;
use linkerd_tls::Id;
use parking_lot::Mutex;
use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    hash::Hash,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime},
};
use tokio::sync::{Notify, mpsc, watch as channel};

/// What to read, and for whom.
#[derive(Clone, Debug)]
pub struct Options {
    /// Folders, in order; of an object that stands in several the last counts.
    pub folders: Vec<Folder>,
    /// Namespace of the local workload.
    pub namespace: Arc<str>,
    /// Name of its Pod, ExternalWorkload or Deployment.
    pub name: Arc<str>,
    /// Everything that has a default.
    pub settings: Settings,
    /// Whether the folders are watched; else only [`Standalone::reload`] reads them again.
    pub watch: bool,
}

/// What a cluster's administrator would configure.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// Last part of identities.
    pub trust_domain: Arc<str>,
    /// Last part of Services' names.
    pub cluster_domain: Arc<str>,
    /// Namespace of the control plane: a part of identities, and the value of the label of meshed Pods.
    pub control_plane_namespace: Arc<str>,
    /// Networks meant by `cluster-*` policies and left out of EgressNetworks.
    pub cluster_networks: Vec<IpNet>,
    /// Where Services without a clusterIP get one.
    pub service_range: ServiceRange,
    /// Wait for the first bytes of a connection from outside.
    pub inbound_detect_timeout: Duration,
    /// Wait for the first bytes of a connection of the application.
    pub outbound_detect_timeout: Duration,
    /// Opaque ports where no annotation says otherwise.
    pub opaque_ports: BTreeSet<u16>,
    /// Policy of ports that no Server and no annotation covers.
    pub default_policy: DefaultPolicy,
    /// Networks that probes come from.
    pub probe_networks: Vec<IpNet>,
    /// Namespace whose EgressNetworks count for all namespaces that have none.
    pub egress_namespace: Arc<str>,
    /// Whether `l5d-retry-*` and `l5d-timeout` request headers are honoured where no annotation says otherwise.
    pub l5d_headers: bool,
    /// Which address of a dual-stack Pod is used.
    pub prefer_ipv6: bool,
}

impl Default for Settings {
    /// Linkerd's defaults (resources.md 4.6, 5.3, 7).
    fn default() -> Self {
        let v4 = |a, b, c, d, len| IpNet::from(ipnet::Ipv4Net::new_assert(Ipv4Addr::new(a, b, c, d), len));
        let v6 = |first, len| IpNet::from(ipnet::Ipv6Net::new_assert(Ipv6Addr::new(first, 0, 0, 0, 0, 0, 0, 0), len));
        Self {
            trust_domain: "cluster.local".into(),
            cluster_domain: "cluster.local".into(),
            control_plane_namespace: "linkerd".into(),
            cluster_networks: vec![
                v4(10, 0, 0, 0, 8),
                v4(100, 64, 0, 0, 10),
                v4(172, 16, 0, 0, 12),
                v4(192, 168, 0, 0, 16),
                v6(0xfd00, 8),
            ],
            service_range: ServiceRange::default(),
            inbound_detect_timeout: Duration::from_secs(10),
            outbound_detect_timeout: Duration::from_secs(10),
            opaque_ports: BTreeSet::from([25, 587, 3306, 4444, 5432, 6379, 9300, 11211]),
            default_policy: DefaultPolicy::AllUnauthenticated,
            probe_networks: vec![v4(0, 0, 0, 0, 0), v6(0, 0)],
            egress_namespace: "linkerd-egress".into(),
            l5d_headers: false,
            prefer_ipv6: false,
        }
    }
}

/// Why the embedded control plane does not start.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Manifests have errors.
    #[error("the manifests can't be used:\n{0}")]
    Manifests(Report),
    /// The local workload is not among them, or its identity is no name.
    #[error("the workload {namespace}/{name} can't be used: {why}")]
    Workload {
        /// Namespace that was asked for.
        namespace: Arc<str>,
        /// Name that was asked for.
        name: Arc<str>,
        /// What is wrong, and what to do.
        why: String,
    },
}

/// The embedded control plane.
pub struct Standalone {
    shared: Arc<Shared>,
}

/// How far reading has come.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Good states so far; the first is 1.
    pub generation: u64,
    /// Changes that were refused, because something was wrong.
    pub refused: u64,
}

/// What the admin page and the metrics show.
#[derive(Clone, Debug)]
pub struct Status {
    /// How far reading has come.
    pub progress: Progress,
    /// When the state in force was taken in.
    pub loaded_at: SystemTime,
    /// Whether what is on disk is in force.
    pub current: bool,
    /// Objects in force by kind.
    pub objects: BTreeMap<&'static str, usize>,
    /// What is wrong on disk, errors first.
    pub findings: Vec<Finding>,
    /// Services that got their address here, as `namespace/name`.
    pub assigned: Vec<(String, IpAddr)>,
    /// The local workload.
    pub workload: Arc<Workload>,
    /// Work done so far.
    pub work: WorkDone,
}

/// Work done so far; it grows with what changes, not with what there is.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq)]
pub struct WorkDone {
    /// YAML documents read.
    pub documents: u64,
    /// Objects taken in or out.
    pub objects: u64,
    /// Policies made.
    pub policies: u64,
    /// Endpoints made.
    pub endpoints: u64,
}

#[derive(Debug, Default)]
pub(crate) struct Work {
    documents: AtomicU64,
    objects: AtomicU64,
    policies: AtomicU64,
    endpoints: AtomicU64,
}

impl Work {
    fn done(&self) -> WorkDone {
        let get = |n: &AtomicU64| n.load(Ordering::Relaxed);
        WorkDone {
            documents: get(&self.documents),
            objects: get(&self.objects),
            policies: get(&self.policies),
            endpoints: get(&self.endpoints),
        }
    }
}

/// What policies need to know beside the objects.
struct Mesh {
    settings: Settings,
    /// Other clusters, as the command line has them.
    given: Vec<Cluster>,
    /// By name; the own cluster has the empty one.
    clusters: HashMap<Arc<str>, Facts>,
    /// By Link: the addresses of its gateway that may be used, where that had to be found out.
    gateways: HashMap<Key, BTreeSet<IpAddr>>,
    local: Local,
    work: Arc<Work>,
}

impl Mesh {
    fn new(settings: Settings, folders: &[Folder], namespace: &Arc<str>, work: Arc<Work>) -> Self {
        Self {
            settings,
            given: folders.iter().filter_map(|f| f.cluster.clone()).collect(),
            clusters: HashMap::new(),
            gateways: HashMap::new(),
            local: (namespace.clone(), None, None),
            work,
        }
    }

    /// Takes in everything that files have to hand on, for the first time.
    fn index(&mut self, files: &mut Files, blocked: &BTreeSet<Arc<str>>) -> Index {
        let mut index = Index::new(self.settings.service_range);
        let touched = index.apply(files.take_changes(blocked));
        self.clusters = mirror::learn(&index, self);
        mirror::update(&mut index, self, &touched);
        index
    }

    /// The identity of a service account (resources.md 7.2).
    fn identity(&self, cluster: &Arc<str>, namespace: &str, account: &str) -> Result<Id, String> {
        let name = format!("{account}.{namespace}.serviceaccount.identity.{}", self.identity_suffix(cluster));
        name.parse().map_err(|e: linkerd_tls::InvalidName| e.to_string())
    }

    /// What identities of a cluster end in.
    fn identity_suffix(&self, cluster: &Arc<str>) -> String {
        match self.clusters.get(cluster) {
            Some(c) => format!("{}.{}", c.control_plane_namespace, c.trust_domain),
            None => String::new(),
        }
    }
}

struct Shared {
    files: Mutex<Files>,
    state: Mutex<State>,
    progress: channel::Sender<Progress>,
    runtime: tokio::runtime::Handle,
    work: Arc<Work>,
}

/// The state in force, and everybody who follows it.
struct State {
    index: Index,
    mesh: Mesh,
    workload: Arc<Workload>,
    workload_deps: HashSet<Dep>,
    asked: (Arc<str>, Arc<str>),
    servers: Followers<u16, ServerPolicy>,
    clients: Followers<Target, ClientPolicy>,
    resolutions: HashMap<u64, Running>,
    next_resolution: u64,
    loaded_at: SystemTime,
}

/// A resolution that somebody follows.
struct Running {
    replicas: Replicas,
    /// What was not sent yet: at most one entry an address, however slow the follower.
    pending: Delta,
    wake: Arc<Notify>,
}

/// Updates that may wait in a resolution's channel; everything else waits merged.
const RESOLUTION_QUEUE: usize = 4;
/// Policies kept before those that nobody follows are looked for.
const PRUNE_AT: usize = 64;

/// Policies that somebody follows, or followed a moment ago.
struct Followers<K, T> {
    map: HashMap<K, Followed<T>>,
    prune_at: usize,
}

struct Followed<T> {
    sender: channel::Sender<Arc<T>>,
    deps: HashSet<Dep>,
}

impl<K: Hash + Eq + Clone, T: PartialEq> Followers<K, T> {
    fn new() -> Self {
        Self { map: HashMap::new(), prune_at: PRUNE_AT }
    }

    fn get(&self, key: &K) -> Option<channel::Receiver<Arc<T>>> {
        Some(self.map.get(key)?.sender.subscribe())
    }

    fn insert(&mut self, key: K, value: T, deps: HashSet<Dep>) -> channel::Receiver<Arc<T>> {
        if self.map.len() >= self.prune_at {
            self.map.retain(|_, f| f.sender.receiver_count() > 0);
            self.prune_at = (self.map.len() * 2).max(PRUNE_AT);
        }
        let (sender, receiver) = channel::channel(Arc::new(value));
        self.map.insert(key, Followed { sender, deps });
        receiver
    }

    /// Makes the policies again that looked at what changed; forgets those that nobody follows.
    fn update(&mut self, dirty: Option<&HashSet<Dep>>, mut make: impl FnMut(&K) -> (Option<T>, HashSet<Dep>)) {
        self.map.retain(|key, followed| {
            if dirty.is_some_and(|d| !intersects(d, &followed.deps)) {
                return true;
            }
            if followed.sender.receiver_count() == 0 {
                return false;
            }
            let (value, deps) = make(key);
            followed.deps = deps;
            // A name that is gone keeps its last policy: its replicas are gone too, which says more than a closed watch.
            if let Some(value) = value {
                followed.sender.send_if_modified(|old| {
                    let changed = **old != value;
                    if changed {
                        *old = Arc::new(value);
                    }
                    changed
                });
            }
            true
        });
    }
}

fn intersects(a: &HashSet<Dep>, b: &HashSet<Dep>) -> bool {
    let (small, large) = if a.len() < b.len() { (a, b) } else { (b, a) };
    small.iter().any(|d| large.contains(d))
}

impl Standalone {
    /// Reads the folders and begins to watch them. Must be called within a tokio runtime, which runs its tasks; they end
    /// when the value is dropped.
    ///
    /// # Errors
    /// When a manifest has an error, or the workload is not among them.
    pub fn start(options: Options) -> Result<(Arc<Self>, Workload), Error> {
        let work = Arc::new(Work::default());
        let Options { folders, namespace, name, settings, watch } = options;
        let mut mesh = Mesh::new(settings, &folders, &namespace, work.clone());
        let mut files = Files::new(folders, work.clone());
        files.scan();
        let blocked = files.blocked();
        if blocked.contains("") {
            return Err(Error::Manifests(check::report(&files, None)));
        }
        // Another cluster's mistakes are no reason to stay away.
        files.tell_errors();
        let index = mesh.index(&mut files, &blocked);
        let view = View::new(&index);
        let workload = workload::find(&view, &mesh, &namespace, &name).map_err(|why| Error::Workload {
            namespace: namespace.clone(),
            name: name.clone(),
            why,
        })?;
        let workload_deps = view.into_deps();
        let mesh = Mesh { local: endpoints::local(&workload), ..mesh };
        let state = State {
            index,
            mesh,
            workload: Arc::new(workload.clone()),
            workload_deps,
            asked: (namespace, name),
            servers: Followers::new(),
            clients: Followers::new(),
            resolutions: HashMap::new(),
            next_resolution: 0,
            loaded_at: SystemTime::now(),
        };
        let shared = Arc::new(Shared {
            files: Mutex::new(files),
            state: Mutex::new(state),
            progress: channel::Sender::new(Progress { generation: 1, refused: 0 }),
            runtime: tokio::runtime::Handle::current(),
            work,
        });
        if watch {
            watch::spawn(&shared);
            gateways::spawn(&shared);
        }
        Ok((Arc::new(Self { shared }), workload))
    }

    /// Reads again what changed, at once. It blocks for as long as that takes.
    pub fn reload(&self) -> Progress {
        self.shared.reload()
    }

    /// Follows how far reading has come.
    pub fn progress(&self) -> channel::Receiver<Progress> {
        self.shared.progress.subscribe()
    }

    /// What is in force, and what is wrong on disk.
    pub fn status(&self) -> Status {
        let (findings, current) = {
            let files = self.shared.files.lock();
            (files.findings(), files.blocked().is_empty())
        };
        let state = self.shared.state.lock();
        Status {
            progress: *self.shared.progress.borrow(),
            loaded_at: state.loaded_at,
            current,
            objects: state.index.counts(),
            findings,
            assigned: check::assigned(&state.index),
            workload: state.workload.clone(),
            work: self.shared.work.done(),
        }
    }

    /// Everything that `check` would say of the state on disk, warnings across objects included.
    pub fn report(&self) -> Report {
        let files = self.shared.files.lock();
        let state = self.shared.state.lock();
        check::report(&files, Some((&state.index, &state.mesh)))
    }
}

impl Shared {
    fn reload(&self) -> Progress {
        let mut files = self.files.lock();
        if !files.scan() {
            return *self.progress.borrow();
        }
        let blocked = files.blocked();
        let changes = files.take_changes(&blocked);
        let changed = changes.len();
        if !blocked.is_empty() {
            files.tell_errors();
            self.progress.send_modify(|p| p.refused += 1);
            if changed == 0 {
                return *self.progress.borrow();
            }
        }
        self.state.lock().apply(changes, &self.work);
        drop(files);
        self.progress.send_modify(|p| p.generation += 1);
        let progress = *self.progress.borrow();
        tracing::info!(generation = progress.generation, changed, "manifests loaded");
        progress
    }
}

impl Shared {
    /// Takes in what was found out about the gateway of a Link; none = the Link alone counts.
    fn gateway(&self, link: &Key, usable: Option<BTreeSet<IpAddr>>) {
        let mut state = self.state.lock();
        let gateways = &mut state.mesh.gateways;
        match usable {
            Some(usable) => gateways.insert(link.clone(), usable),
            None => gateways.remove(link),
        };
        state.refresh(HashSet::from([Dep::Object(link.clone())]), &self.work);
    }
}

impl State {
    /// Takes changes in, and tells everybody who looked at what changed.
    fn apply(&mut self, changes: Vec<Change>, work: &Work) {
        let touched = self.index.apply(changes);
        self.loaded_at = SystemTime::now();
        self.refresh(touched, work);
    }

    /// Tells everybody who looked at what changed.
    fn refresh(&mut self, mut touched: HashSet<Dep>, work: &Work) {
        let mirrored = mirror::update(&mut self.index, &mut self.mesh, &touched);
        let renamed = mirrored.is_none();
        touched.extend(mirrored.into_iter().flatten());
        let mut dirty = Some(&touched).filter(|_| !renamed);
        if intersects(&touched, &self.workload_deps) {
            let view = View::new(&self.index);
            match workload::find(&view, &self.mesh, &self.asked.0, &self.asked.1) {
                Ok(workload) if workload != *self.workload => {
                    self.mesh.local = endpoints::local(&workload);
                    self.workload = Arc::new(workload);
                    // Labels, ports and place of the workload decide about everything.
                    dirty = None;
                }
                Ok(_) => {}
                Err(why) => tracing::warn!(why, "the local workload is gone; what was known of it stays in force"),
            }
            self.workload_deps = view.into_deps();
        }
        let Self { index, mesh, workload, servers, clients, resolutions, .. } = self;
        servers.update(dirty, |port| {
            work.policies.fetch_add(1, Ordering::Relaxed);
            let view = View::new(index);
            let policy = server::policy(&view, mesh, workload, *port);
            (Some(policy), view.into_deps())
        });
        clients.update(dirty, |target| {
            work.policies.fetch_add(1, Ordering::Relaxed);
            let view = View::new(index);
            let policy = client::policy(&view, mesh, target);
            (policy.ok(), view.into_deps())
        });
        for running in resolutions.values_mut() {
            let delta = running.replicas.update(index, mesh, work, dirty);
            if !delta.is_empty() {
                running.pending.extend(delta);
                running.wake.notify_one();
            }
        }
    }
}

impl Source for Standalone {
    fn watch_server(&self, port: u16) -> channel::Receiver<Arc<ServerPolicy>> {
        let mut state = self.shared.state.lock();
        if let Some(receiver) = state.servers.get(&port) {
            return receiver;
        }
        self.shared.work.policies.fetch_add(1, Ordering::Relaxed);
        let view = View::new(&state.index);
        let policy = server::policy(&view, &state.mesh, &state.workload, port);
        let deps = view.into_deps();
        state.servers.insert(port, policy, deps)
    }

    fn watch_client(
        &self,
        target: Target,
    ) -> BoxFuture<'static, Result<channel::Receiver<Arc<ClientPolicy>>, DiscoveryError>> {
        Box::pin(std::future::ready(self.shared.client(target)))
    }

    fn watch_service_profile(&self, name: &str, port: u16) -> Option<channel::Receiver<Option<Arc<Profile>>>> {
        let target = Target::Name(name.into(), port);
        let policies = self.shared.client(target.clone()).ok()?;
        let (known, receiver) = channel::channel(None);
        self.shared.runtime.spawn(profile::follow(target, policies, known));
        Some(receiver)
    }

    fn resolve(&self, discovery: &str) -> Resolution {
        let (sender, receiver) = mpsc::channel(RESOLUTION_QUEUE);
        let mut state = self.shared.state.lock();
        let name = discovery
            .rsplit_once(':')
            .and_then(|(host, port)| Some((ServiceName::parse(host, &state.mesh)?, port.parse::<u16>().ok()?)));
        let Some((name, port)) = name else {
            let why = format!("{discovery} is no Service and port").into();
            // The channel is empty, so there is room.
            let _ = sender.try_send(Update::Fail(why));
            return Resolution::current(receiver);
        };
        let mut replicas = Replicas::new(name, port);
        replicas.update(&state.index, &state.mesh, &self.shared.work, None);
        let _ = sender.try_send(Update::Reset(replicas.all()));
        let wake = Arc::new(Notify::new());
        let id = state.next_resolution;
        state.next_resolution += 1;
        state.resolutions.insert(id, Running { replicas, pending: Delta::new(), wake: wake.clone() });
        drop(state);
        self.shared.runtime.spawn(send_updates(Arc::downgrade(&self.shared), id, wake, sender));
        Resolution::current(receiver)
    }
}

impl Shared {
    fn client(&self, target: Target) -> Result<channel::Receiver<Arc<ClientPolicy>>, DiscoveryError> {
        let mut state = self.state.lock();
        if let Some(receiver) = state.clients.get(&target) {
            return Ok(receiver);
        }
        self.work.policies.fetch_add(1, Ordering::Relaxed);
        let view = View::new(&state.index);
        let policy = client::policy(&view, &state.mesh, &target)
            .map_err(|reason| DiscoveryError::Refused { target: target.clone(), reason: reason.into() })?;
        let deps = view.into_deps();
        Ok(state.clients.insert(target, policy, deps))
    }
}

/// Sends what changed of a resolution until nobody listens or the source is gone.
async fn send_updates(shared: std::sync::Weak<Shared>, id: u64, wake: Arc<Notify>, sender: mpsc::Sender<Update>) {
    loop {
        tokio::select! {
            () = sender.closed() => break,
            () = wake.notified() => {}
        }
        let delta = match shared.upgrade() {
            Some(shared) => match shared.state.lock().resolutions.get_mut(&id) {
                Some(running) => std::mem::take(&mut running.pending),
                None => break,
            },
            None => break,
        };
        for update in endpoints::updates(delta) {
            if sender.send(update).await.is_err() {
                break;
            }
        }
    }
    if let Some(shared) = shared.upgrade() {
        shared.state.lock().resolutions.remove(&id);
    }
}

impl Drop for Shared {
    /// Wakes the tasks of resolutions, so that they see that the source is gone.
    fn drop(&mut self) {
        for running in self.state.get_mut().resolutions.values() {
            running.wake.notify_one();
        }
    }
}

#[cfg(test)]
mod tests;
