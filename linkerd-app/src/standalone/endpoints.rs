//! The replicas of a Service port: which there are, and how each is spoken to (resources.md 7.1).
//!
//! A resolution is made of pieces, one for each EndpointSlice, Endpoints, Pod or ExternalWorkload that gives replicas. A
//! change rebuilds the pieces that it touches and nothing else; what the replicas together decide (zone hints, one address
//! family for each Pod) is kept in counts.

use super::{
    Mesh, Work,
    annotations::{OPAQUE_PORTS, Ports, TRANSPORT_MODE, WEIGHT, weight},
    index::{Dep, Index, View},
    manifest::{Address, ExternalWorkload, Key, Kind, Object, Pod, PortRef, Service, ServicePort, SlicePort},
    server,
    workload::{self, Workload, WorkloadKind},
};
use crate::policy::{
    Endpoint, Update,
    endpoint::{EndpointMeta, ProtocolHint, ServerTls, ZoneLocality},
};
use linkerd_tls::web;
use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    net::{IpAddr, SocketAddr},
    sync::{Arc, atomic::Ordering},
};

/// Weight of an endpoint that has no annotation, as Linkerd sends it.
const WEIGHT_UNIT: u32 = 10_000;
/// Inbound port of a proxy whose Pod does not say (contract.md).
const INBOUND_PORT: u16 = 4143;

/// A Service's name, maybe one of its instances.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct ServiceName {
    pub(super) instance: Option<Arc<str>>,
    pub(super) namespace: Arc<str>,
    pub(super) name: Arc<str>,
}

impl ServiceName {
    /// Reads `svc`, `svc.ns`, `svc.ns.svc` or `svc.ns.svc.DOMAIN`; the last two with `host.` before it for one instance.
    pub(super) fn parse(text: &str, mesh: &Mesh) -> Option<Self> {
        let text = text.trim_end_matches('.').to_ascii_lowercase();
        let short = text.strip_suffix(&*mesh.settings.cluster_domain).and_then(|t| t.strip_suffix('.'));
        let labels: Vec<&str> = short.unwrap_or(&text).split('.').collect();
        let (instance, name, namespace) = match *labels.as_slice() {
            [name] if short.is_none() => (None, name, &*mesh.local.0),
            [name, namespace] if short.is_none() => (None, name, namespace),
            [name, namespace, "svc"] => (None, name, namespace),
            [instance, name, namespace, "svc"] => (Some(instance), name, namespace),
            _ => return None,
        };
        let label = |l: &str| !l.is_empty() && l.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_');
        (label(name) && label(namespace) && instance.is_none_or(label)).then(|| Self {
            instance: instance.map(Into::into),
            namespace: namespace.into(),
            name: name.into(),
        })
    }
}

/// `svc.ns.svc.DOMAIN:port`, the key of resolutions and the metric label `authority`.
pub(super) fn discovery(mesh: &Mesh, namespace: &str, name: &str, port: u16) -> Arc<str> {
    format!("{name}.{namespace}.svc.{}:{port}", mesh.settings.cluster_domain).into()
}

/// A replica that may be in use.
#[derive(Clone, Debug)]
struct Candidate {
    endpoint: Endpoint,
    /// Whether it is of the own cluster, where zone hints count.
    local: bool,
    /// Whether its hints name zones, and ours is among them.
    hint: Option<bool>,
    /// The Pod or ExternalWorkload, to know its other addresses.
    target: Option<Key>,
    hostname: Option<Arc<str>>,
}

struct Piece {
    object: Arc<Object>,
    service: Arc<Object>,
    deps: HashSet<Dep>,
    addresses: BTreeSet<SocketAddr>,
}

/// Replicas of one Service port, kept up to date.
pub(super) struct Replicas {
    name: ServiceName,
    port: u16,
    root: HashSet<Dep>,
    pieces: BTreeMap<Key, Piece>,
    by_dep: HashMap<Dep, BTreeSet<Key>>,
    by_addr: BTreeMap<SocketAddr, BTreeMap<Key, Candidate>>,
    by_target: HashMap<Key, BTreeSet<SocketAddr>>,
    /// Candidates of the own cluster: all, without hints, with a hint for our zone.
    counts: (usize, usize, usize),
    /// TLS for replicas that are not meshed; plain text to them is then forbidden.
    origin_tls: Option<Arc<web::Target>>,
    zoned: bool,
    shown: BTreeMap<SocketAddr, Endpoint>,
}

/// Addresses that changed; none = gone.
pub(super) type Delta = BTreeMap<SocketAddr, Option<Endpoint>>;

/// What gives replicas: an object, and the Service and port through which it does.
struct Source<'a> {
    key: &'a Key,
    object: &'a Arc<Object>,
    service: &'a Arc<Object>,
}

impl Source<'_> {
    /// Whether it gives any replica.
    fn is_ready(&self) -> bool {
        match &**self.object {
            Object::Slice(slice) => slice.addresses.iter().any(|a| a.ready),
            Object::Endpoints(endpoints) => endpoints.subsets.iter().any(|(_, list)| list.iter().any(|a| a.ready)),
            Object::Pod(pod) => pod.ready && !pod.finished,
            Object::ExternalWorkload(workload) => workload.ready,
            _ => false,
        }
    }
}

impl Replicas {
    pub(super) fn new(name: ServiceName, port: u16) -> Self {
        Self {
            name,
            port,
            root: HashSet::new(),
            pieces: BTreeMap::new(),
            by_dep: HashMap::new(),
            by_addr: BTreeMap::new(),
            by_target: HashMap::new(),
            counts: (0, 0, 0),
            origin_tls: None,
            zoned: false,
            shown: BTreeMap::new(),
        }
    }

    /// All replicas in use.
    pub(super) fn all(&self) -> Vec<Endpoint> {
        self.shown.values().cloned().collect()
    }

    /// Everything that it depends on.
    pub(super) fn deps(&self) -> HashSet<Dep> {
        self.root.iter().chain(self.by_dep.keys()).cloned().collect()
    }

    /// Takes changes in; `dirty` none = everything is new.
    pub(super) fn update(&mut self, index: &Index, mesh: &Mesh, work: &Work, dirty: Option<&HashSet<Dep>>) -> Delta {
        let mut changed = BTreeSet::new();
        let mut rebuild: BTreeSet<Key> = match dirty {
            Some(dirty) => dirty.iter().filter_map(|d| self.by_dep.get(d)).flatten().cloned().collect(),
            None => self.pieces.keys().cloned().collect(),
        };
        let origin_tls = self.origin_tls.clone();
        if dirty.is_none_or(|dirty| dirty.iter().any(|d| self.root.contains(d))) {
            let view = View::new(index);
            let sources = self.sources(&view, mesh);
            self.root = view.into_deps();
            let mut gone: BTreeSet<Key> = self.pieces.keys().cloned().collect();
            for source in sources {
                gone.remove(source.key);
                let known = self
                    .pieces
                    .get(source.key)
                    .is_some_and(|p| Arc::ptr_eq(&p.object, source.object) && Arc::ptr_eq(&p.service, source.service));
                if !known || rebuild.contains(source.key) {
                    rebuild.remove(source.key);
                    self.build(source.key, source.object, source.service, index, mesh, work, &mut changed);
                }
            }
            for key in gone {
                rebuild.remove(&key);
                self.drop_piece(&key, &mut changed);
            }
        }
        for key in rebuild {
            if let Some(piece) = self.pieces.get(&key) {
                let (object, service) = (piece.object.clone(), piece.service.clone());
                self.build(&key, &object, &service, index, mesh, work, &mut changed);
            }
        }
        self.show(changed, origin_tls != self.origin_tls, mesh)
    }

    fn sources<'a>(&mut self, view: &View<'a>, mesh: &Mesh) -> Vec<Source<'a>> {
        let local: Arc<str> = "".into();
        let (namespace, name) = (self.name.namespace.clone(), self.name.name.clone());
        self.origin_tls = self.backend_tls(view, &namespace, &name);
        let Some(object) = view.object(&local, Kind::Service, &namespace, &name) else { return Vec::new() };
        let head = object.head();
        let mut members: Vec<(Arc<str>, Arc<str>)> = Vec::new();
        if let Some(cluster) = head.labels.get("multicluster.linkerd.io/remote-discovery") {
            let remote = head.labels.get("multicluster.linkerd.io/remote-service").unwrap_or(&name);
            members.push((cluster.clone(), remote.clone()));
        }
        for member in head.annotation("multicluster.linkerd.io/remote-discovery").unwrap_or_default().split(',') {
            if let Some((service, cluster)) = member.trim().split_once('@') {
                members.push((cluster.into(), service.into()));
            }
        }
        for service in head.annotation("multicluster.linkerd.io/local-discovery").unwrap_or_default().split(',') {
            if !service.trim().is_empty() {
                members.push((local.clone(), service.trim().into()));
            }
        }
        if members.is_empty() {
            members.push((local, name));
        }
        let mut out = Vec::new();
        for (cluster, name) in members {
            if mesh.clusters.contains_key(&cluster) {
                self.own_sources(view, &cluster, &namespace, &name, &mut out);
            }
        }
        out
    }

    /// The policy that names the port beats one that names the Service; then the older (resources.md 3.12).
    fn backend_tls(&self, view: &View<'_>, namespace: &Arc<str>, name: &Arc<str>) -> Option<Arc<web::Target>> {
        let policies = view.backend_tls(namespace);
        let service = view.service(&"".into(), namespace, name)?;
        let port = service.ports.iter().find(|p| p.port == self.port).map(|p| p.name.clone());
        let find = |section: Option<&Arc<str>>| {
            policies.iter().find(|p| p.targets.iter().any(|(s, own)| s == name && own.as_ref() == section))
        };
        let policy = port.and_then(|port| find(Some(&port))).or_else(|| find(None))?;
        Some(Arc::new(web::Target {
            name: policy.hostname.clone(),
            roots: view.roots(namespace, policy.authorities.as_deref()),
            subject_names: policy.subject_names.clone(),
        }))
    }

    /// Slices; without any, Endpoints; without those, the Pods that the selector takes. ExternalWorkloads that the selector
    /// takes always count: slices made by Kubernetes do not have them.
    fn own_sources<'a>(
        &self,
        view: &View<'a>,
        cluster: &Arc<str>,
        namespace: &Arc<str>,
        name: &Arc<str>,
        out: &mut Vec<Source<'a>>,
    ) {
        let Some(object) = view.object(cluster, Kind::Service, namespace, name) else { return };
        let Object::Service(service) = object.as_ref() else { return };
        if !service.ports.iter().any(|p| p.port == self.port) {
            return;
        }
        if let Some((cluster, name)) = &service.behind {
            // What a gateway has nothing to pass on to has no replicas.
            let mut theirs = Vec::new();
            self.own_sources(view, cluster, namespace, name, &mut theirs);
            if !theirs.iter().any(Source::is_ready) {
                return;
            }
        }
        let source = |(key, o): (&'a Key, &'a Arc<Object>)| Source { key, object: o, service: object };
        let selected = |labels: &super::annotations::Pairs| {
            !service.selector.is_empty() && service.selector.iter().all(|(k, v)| labels.get(k) == Some(v))
        };
        let slices = view.slices(cluster, namespace, name);
        let endpoints = || view.scope(cluster, Kind::Endpoints, namespace).find(|(k, _)| k.name == *name);
        if !slices.is_empty() {
            out.extend(slices.into_iter().map(source));
        } else if let Some(found) = endpoints() {
            out.push(source(found));
        } else if !service.selector.is_empty() {
            let pods = view.scope(cluster, Kind::Pod, namespace);
            out.extend(pods.filter(|(_, o)| selected(&o.head().labels)).map(source));
        }
        if !service.selector.is_empty() {
            let machines = view.scope(cluster, Kind::ExternalWorkload, namespace);
            out.extend(machines.filter(|(_, o)| selected(&o.head().labels)).map(source));
        }
    }

    #[allow(clippy::too_many_arguments, reason = "the parties of one step, used once")]
    fn build(
        &mut self,
        key: &Key,
        object: &Arc<Object>,
        service: &Arc<Object>,
        index: &Index,
        mesh: &Mesh,
        work: &Work,
        changed: &mut BTreeSet<SocketAddr>,
    ) {
        self.drop_piece(key, changed);
        let view = View::new(index);
        let mut candidates = Vec::new();
        if let Object::Service(service) = service.as_ref()
            && let Some(port) = service.ports.iter().find(|p| p.port == self.port)
        {
            let maker = Maker {
                view: &view,
                mesh,
                service,
                port,
                cluster: &key.cluster,
                mirror: Mirror::of(service, object, port),
            };
            candidates = maker.candidates(key, object);
        }
        work.endpoints.fetch_add(candidates.len() as u64, Ordering::Relaxed);
        let deps = view.into_deps();
        for dep in &deps {
            self.by_dep.entry(dep.clone()).or_default().insert(key.clone());
        }
        let mut addresses = BTreeSet::new();
        for c in candidates {
            if self.name.instance.is_some() && c.hostname != self.name.instance {
                continue;
            }
            let addr = c.endpoint.addr;
            changed.insert(addr);
            addresses.insert(addr);
            if let Some(target) = &c.target {
                let siblings = self.by_target.entry(target.clone()).or_default();
                siblings.insert(addr);
                changed.extend(siblings.iter().copied());
            }
            let replaced = self.by_addr.entry(addr).or_default().insert(key.clone(), c.clone());
            self.count(&c, true);
            if let Some(replaced) = replaced {
                self.count(&replaced, false);
            }
        }
        self.pieces.insert(key.clone(), Piece { object: object.clone(), service: service.clone(), deps, addresses });
    }

    fn drop_piece(&mut self, key: &Key, changed: &mut BTreeSet<SocketAddr>) {
        let Some(piece) = self.pieces.remove(key) else { return };
        for dep in &piece.deps {
            if let Some(keys) = self.by_dep.get_mut(dep) {
                keys.remove(key);
                if keys.is_empty() {
                    self.by_dep.remove(dep);
                }
            }
        }
        for addr in piece.addresses {
            changed.insert(addr);
            let Some(here) = self.by_addr.get_mut(&addr) else { continue };
            let Some(c) = here.remove(key) else { continue };
            let last = here.is_empty();
            if last {
                self.by_addr.remove(&addr);
            }
            self.count(&c, false);
            if let Some(target) = &c.target
                && let Some(siblings) = self.by_target.get_mut(target)
            {
                changed.extend(siblings.iter().copied());
                if last {
                    siblings.remove(&addr);
                }
                if siblings.is_empty() {
                    self.by_target.remove(target);
                }
            }
        }
    }

    fn count(&mut self, c: &Candidate, more: bool) {
        if !c.local {
            return;
        }
        let step = |n: &mut usize| *n = if more { *n + 1 } else { n.saturating_sub(1) };
        step(&mut self.counts.0);
        match c.hint {
            None => step(&mut self.counts.1),
            Some(true) => step(&mut self.counts.2),
            Some(false) => {}
        }
    }

    /// Decides anew about the addresses that changed, or about all if what they decide together changed.
    fn show(&mut self, mut changed: BTreeSet<SocketAddr>, all: bool, mesh: &Mesh) -> Delta {
        let (total, hintless, here) = self.counts;
        let zoned = total > 0 && hintless == 0 && here > 0;
        if zoned != self.zoned || all {
            self.zoned = zoned;
            changed.extend(self.by_addr.keys().chain(self.shown.keys()));
        }
        let mut delta = Delta::new();
        for addr in changed {
            let now = self.visible(addr, mesh);
            if self.shown.get(&addr) == now.as_ref() {
                continue;
            }
            match &now {
                Some(endpoint) => self.shown.insert(addr, endpoint.clone()),
                None => self.shown.remove(&addr),
            };
            delta.insert(addr, now);
        }
        delta
    }

    fn visible(&self, addr: SocketAddr, mesh: &Mesh) -> Option<Endpoint> {
        let c = self.by_addr.get(&addr)?.values().next()?;
        if self.zoned && c.local && c.hint != Some(true) {
            return None;
        }
        let preferred = |a: &SocketAddr| a.is_ipv6() == mesh.settings.prefer_ipv6;
        let siblings = c.target.as_ref().and_then(|t| self.by_target.get(t));
        if !preferred(&addr) && siblings.is_some_and(|s| s.iter().any(preferred)) {
            return None;
        }
        match &self.origin_tls {
            Some(target) if c.endpoint.meta.tls.is_none() => {
                let meta = EndpointMeta { origin_tls: Some(target.clone()), ..(*c.endpoint.meta).clone() };
                Some(Endpoint { addr, meta: Arc::new(meta) })
            }
            _ => Some(c.endpoint.clone()),
        }
    }
}

/// One `Reset`, or what differs.
pub(super) fn updates(delta: Delta) -> Vec<Update> {
    let (mut add, mut remove) = (Vec::new(), Vec::new());
    for (addr, endpoint) in delta {
        match endpoint {
            Some(endpoint) => add.push(endpoint),
            None => remove.push(addr),
        }
    }
    let mut out = Vec::new();
    // New replicas first, so that a set that is exchanged is never empty.
    if !add.is_empty() {
        out.push(Update::Add(add));
    }
    if !remove.is_empty() {
        out.push(Update::Remove(remove));
    }
    out
}

/// A Service that stands for one behind another cluster's gateway (resources.md 6.2).
struct Mirror {
    tls: Option<ServerTls>,
    authority: Arc<str>,
    labels: Vec<(&'static str, Arc<str>)>,
}

impl Mirror {
    fn of(service: &Service, endpoints: &Object, port: &ServicePort) -> Option<Self> {
        let find = |key: &str| service.head.annotations.get(key).or_else(|| endpoints.head().annotations.get(key));
        let remote = find("mirror.linkerd.io/remote-svc-fq-name")?;
        let identity = find("mirror.linkerd.io/remote-gateway-identity");
        let tls =
            identity.and_then(|id| Some(ServerTls { server_id: id.parse().ok()?, server_name: id.parse().ok()? }));
        let mut parts = remote.split('.');
        let mut labels = Vec::new();
        if let Some(cluster) = service.head.labels.get("mirror.linkerd.io/cluster-name") {
            labels.push(("target_cluster", cluster.clone()));
        }
        if let (Some(name), Some(namespace)) = (parts.next(), parts.next()) {
            labels.push(("target_service", name.into()));
            labels.push(("target_service_namespace", namespace.into()));
        }
        Some(Self { tls, authority: format!("{remote}:{}", port.port).into(), labels })
    }
}

/// Makes the candidates of one piece.
struct Maker<'v, 'a> {
    view: &'v View<'a>,
    mesh: &'v Mesh,
    service: &'v Service,
    port: &'v ServicePort,
    cluster: &'v Arc<str>,
    mirror: Option<Mirror>,
}

impl<'a> Maker<'_, 'a> {
    fn candidates(&self, key: &Key, object: &Object) -> Vec<Candidate> {
        match object {
            Object::Slice(slice) => {
                let weight = own_weight(&slice.head.annotations);
                self.addresses(&slice.ports, &slice.addresses, weight)
            }
            Object::Endpoints(e) => {
                e.subsets.iter().flat_map(|(ports, addresses)| self.addresses(ports, addresses, None)).collect()
            }
            Object::Pod(pod) => self.pod(key, pod, object),
            Object::ExternalWorkload(w) => self.machine(key, w, object),
            _ => Vec::new(),
        }
    }

    fn addresses(&self, ports: &[SlicePort], addresses: &[Address], weight: Option<u32>) -> Vec<Candidate> {
        let Some(port) = self.slice_port(ports) else { return Vec::new() };
        addresses
            .iter()
            .filter(|a| a.ready || self.service.publish_not_ready)
            .filter(|a| self.on_node(a.node.as_ref()))
            .map(|a| {
                let target = a.target.as_ref().and_then(|(kind, ns, name)| {
                    let object = self.view.object(self.cluster, *kind, ns, name)?;
                    let key =
                        Key { cluster: self.cluster.clone(), kind: *kind, namespace: ns.clone(), name: name.clone() };
                    Some((key, object))
                });
                // Slices written by hand often name no target; the address tells as well.
                let found = target.or_else(|| {
                    let (key, object) = self.view.by_ip(a.ip)?;
                    (key.cluster == *self.cluster).then(|| (key.clone(), object))
                });
                let meta = self.meta(found.as_ref().map(|(_, o)| o.as_ref()), port, a.zone.as_ref(), weight);
                let zone = self.mesh.local.2.as_ref();
                Candidate {
                    endpoint: Endpoint { addr: SocketAddr::new(a.ip, port), meta: Arc::new(meta) },
                    local: self.cluster.is_empty(),
                    hint: a.hints.as_ref().map(|h| zone.is_some_and(|z| h.contains(z))),
                    target: found.map(|f| f.0),
                    hostname: a.hostname.clone(),
                }
            })
            .collect()
    }

    fn slice_port(&self, ports: &[SlicePort]) -> Option<u16> {
        if let Some(p) = ports.iter().find(|p| p.name == self.port.name) {
            return Some(p.port);
        }
        match self.port.target {
            PortRef::Number(n) if ports.is_empty() || ports.iter().any(|p| p.port == n) => Some(n),
            _ if ports.len() == 1 && self.service.ports.len() == 1 => Some(ports[0].port),
            _ => None,
        }
    }

    /// `internalTrafficPolicy: Local` keeps to the client's node, if that is known.
    fn on_node(&self, node: Option<&Arc<str>>) -> bool {
        !self.service.local_only
            || !self.cluster.is_empty()
            || self.mesh.local.1.is_none()
            || self.mesh.local.1.as_ref() == node
    }

    fn pod(&self, key: &Key, pod: &Pod, object: &Object) -> Vec<Candidate> {
        let Some(port) = pod.port(&self.port.target) else { return Vec::new() };
        if pod.finished || !(pod.ready || self.service.publish_not_ready) || !self.on_node(pod.node.as_ref()) {
            return Vec::new();
        }
        let hostname = pod.hostname.clone().filter(|_| pod.subdomain.as_ref() == Some(&self.service.head.name));
        self.each(key, &pod.ips, port, object, hostname)
    }

    fn machine(&self, key: &Key, w: &ExternalWorkload, object: &Object) -> Vec<Candidate> {
        let Some(port) = w.port(&self.port.target) else { return Vec::new() };
        if !w.ready && !self.service.publish_not_ready {
            return Vec::new();
        }
        self.each(key, &w.ips, port, object, Some(w.head.name.clone()))
    }

    fn each(
        &self,
        key: &Key,
        ips: &[IpAddr],
        port: u16,
        object: &Object,
        hostname: Option<Arc<str>>,
    ) -> Vec<Candidate> {
        ips.iter()
            .map(|ip| Candidate {
                endpoint: Endpoint {
                    addr: SocketAddr::new(*ip, port),
                    meta: Arc::new(self.meta(Some(object), port, None, None)),
                },
                local: self.cluster.is_empty(),
                hint: None,
                target: Some(key.clone()),
                hostname: hostname.clone(),
            })
            .collect()
    }

    fn meta(&self, target: Option<&Object>, port: u16, zone: Option<&Arc<str>>, weight: Option<u32>) -> EndpointMeta {
        let mut meta = describe(self.view, self.mesh, self.cluster, target, port, zone);
        meta.weight = target.and_then(|t| own_weight(&t.head().annotations)).or(weight).or(Some(WEIGHT_UNIT));
        meta.labels.insert("service".into(), self.service.head.name.clone());
        meta.labels.insert("namespace".into(), self.service.head.namespace.clone());
        if !self.cluster.is_empty() {
            meta.labels.insert("target_cluster".into(), self.cluster.clone());
            meta.labels.insert("target_service".into(), self.service.head.name.clone());
            meta.labels.insert("target_service_namespace".into(), self.service.head.namespace.clone());
        }
        if let Some(mirror) = &self.mirror {
            meta.tls = mirror.tls.clone();
            meta.hint = if meta.tls.is_some() { ProtocolHint::Http2 } else { ProtocolHint::Unknown };
            meta.opaque_transport_port = None;
            meta.authority_override = Some(mirror.authority.clone());
            meta.labels.extend(mirror.labels.iter().map(|(k, v)| (Arc::from(*k), v.clone())));
        }
        meta
    }
}

fn own_weight(annotations: &super::annotations::Pairs) -> Option<u32> {
    weight(annotations.get(WEIGHT)?).ok()
}

/// How a Pod or ExternalWorkload is spoken to on a port; without one, all that is known is the address.
pub(super) fn describe(
    view: &View<'_>,
    mesh: &Mesh,
    cluster: &Arc<str>,
    target: Option<&Object>,
    port: u16,
    zone: Option<&Arc<str>>,
) -> EndpointMeta {
    let mut meta = EndpointMeta { cluster: cluster.clone(), ..EndpointMeta::default() };
    let mut zone = zone.cloned();
    let mut label = |k: &str, v: &Arc<str>| meta.labels.insert(k.into(), v.clone());
    let annotation = |head: &super::manifest::Head, key: &str| {
        let own = head.annotations.get(key).map(|v| v.to_string());
        own.or_else(|| view.namespace_annotation(cluster, &head.namespace, key).map(str::to_string))
    };
    let ports = |head: &super::manifest::Head, key: &str| annotation(head, key).and_then(|t| Ports::parse(&t).ok());
    let declared_opaque = |namespace: &Arc<str>, kind, labels: &super::annotations::Pairs, name: Option<&str>| {
        // Other clusters' Servers are not known.
        cluster.is_empty() && server::is_opaque(view, namespace, kind, labels, port, name)
    };
    let mut inbound = INBOUND_PORT;
    let (mut opaque, mut skipped, mut direct) = (false, false, false);
    match target {
        Some(Object::Pod(pod)) => {
            let head = &pod.head;
            label("namespace", &head.namespace);
            label("pod", &head.name);
            label("serviceaccount", &pod.service_account);
            if let Some((kind, name)) = workload::owner(view, cluster, pod) {
                label(&kind, &name);
            }
            if let Some(hash) = head.labels.get("pod-template-hash") {
                label("pod_template_hash", hash);
            }
            if zone.is_none() {
                zone = pod.node.as_ref().and_then(|n| view.zone(cluster, n)).cloned();
            }
            let name = pod.port_name(port);
            opaque = ports(head, OPAQUE_PORTS)
                .map_or_else(|| mesh.settings.opaque_ports.contains(&port), |p| p.contains(port, name));
            opaque |= declared_opaque(&head.namespace, WorkloadKind::Pod, &head.labels, name);
            skipped = ports(head, "config.linkerd.io/skip-inbound-ports").is_some_and(|p| p.contains(port, name));
            if let Some(p) = annotation(head, "config.linkerd.io/inbound-port").and_then(|t| t.parse().ok()) {
                inbound = p;
            }
            direct = annotation(head, TRANSPORT_MODE).is_some_and(|mode| *mode == *"transport-header");
            let control_plane = mesh.clusters.get(cluster).map(|c| &c.control_plane_namespace);
            let meshed = head.labels.get("linkerd.io/control-plane-ns");
            if !pod.host_network
                && meshed.is_some()
                && meshed == control_plane
                && let Ok(id) = mesh.identity(cluster, &head.namespace, &pod.service_account)
                && let Some(server_name) = id.to_server_name()
            {
                label("control_plane_ns", &meshed.cloned().unwrap_or_default());
                meta.tls = Some(ServerTls { server_id: id, server_name });
            }
        }
        Some(Object::ExternalWorkload(w)) => {
            label("namespace", &w.head.namespace);
            label("external_workload", &w.head.name);
            if zone.is_none() {
                zone = w.head.labels.get("topology.kubernetes.io/zone").cloned();
            }
            let name = w.port_name(port);
            opaque = ports(&w.head, OPAQUE_PORTS)
                .map_or_else(|| mesh.settings.opaque_ports.contains(&port), |p| p.contains(port, name));
            opaque |= declared_opaque(&w.head.namespace, WorkloadKind::External, &w.head.labels, name);
            if let Some((p, _)) = w.ports.iter().find(|(_, n)| n.as_deref() == Some("linkerd-proxy")) {
                inbound = *p;
            }
            meta.tls = Some(ServerTls { server_id: w.identity.clone(), server_name: w.server_name.clone() });
        }
        _ => {}
    }
    if skipped {
        meta.tls = None;
    }
    if meta.tls.is_some() {
        meta.hint = if opaque { ProtocolHint::Opaque } else { ProtocolHint::Http2 };
        meta.opaque_transport_port = (opaque || direct).then_some(inbound);
    } else if opaque {
        meta.hint = ProtocolHint::Opaque;
    }
    meta.zone = match (&zone, &mesh.local.2) {
        (Some(a), Some(b)) if a == b => ZoneLocality::Local,
        (Some(_), Some(_)) => ZoneLocality::Remote,
        _ => ZoneLocality::Unknown,
    };
    let locality = match meta.zone {
        ZoneLocality::Local => "local",
        ZoneLocality::Remote => "remote",
        ZoneLocality::Unknown => "unknown",
    };
    if target.is_some() {
        meta.labels.insert("zone".into(), zone.unwrap_or_default());
        meta.labels.insert("zone_locality".into(), locality.into());
    }
    meta
}

/// What endpoints need to know of the local workload: namespace, node, zone.
pub(super) type Local = (Arc<str>, Option<Arc<str>>, Option<Arc<str>>);

/// Its place.
pub(super) fn local(workload: &Workload) -> Local {
    (workload.namespace.clone(), workload.node.clone(), workload.zone.clone())
}
