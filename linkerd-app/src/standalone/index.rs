//! The objects in force, and who depends on them. Policies are made by reading through a [`View`], which notes what was
//! looked at; a change of objects yields the set of things that changed, so that only those policies are made again.

use super::{
    alloc::{self, Claim, ServiceRange},
    files::Change,
    manifest::{
        AuthorizationPolicy, BackendTls, BackendTraffic, ConfigMap, Egress, ExternalWorkload, Key, Kind, MeshTls,
        NetworkAuth, Object, ParentKind, Pod, Profile, RateLimit, Route, Server, ServerAuthorization, Service,
        ServiceKind, Workload,
    },
};
use linkerd_tls::web;
use std::{
    cell::RefCell,
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    net::IpAddr,
    sync::Arc,
};

/// Something that a policy may depend on.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Dep {
    /// One object, there or not.
    Object(Key),
    /// All objects of a kind in a namespace (cluster, kind, namespace).
    Scope(Arc<str>, Kind, Arc<str>),
    /// The routes on a parent (kind, namespace, name).
    Routes(ParentKind, Arc<str>, Arc<str>),
    /// The slices of a Service (cluster, namespace, name).
    Slices(Arc<str>, Arc<str>, Arc<str>),
    /// Who has an address: a Service, Pod or ExternalWorkload.
    Ip(IpAddr),
    /// The cluster addresses of a Service of the own cluster.
    Frontend(Arc<str>, Arc<str>),
}

/// Objects with the look-ups that policies need. Iteration is in order of keys, so results do not depend on chance.
#[derive(Default)]
pub(super) struct Index {
    range: ServiceRange,
    objects: BTreeMap<Key, Arc<Object>>,
    /// Those of `objects` that Links made.
    derived: BTreeMap<Key, Arc<Object>>,
    slices: HashMap<(Arc<str>, Arc<str>, Arc<str>), BTreeSet<Key>>,
    routes: HashMap<(ParentKind, Arc<str>, Arc<str>), BTreeSet<Key>>,
    /// Pods and ExternalWorkloads of all clusters by address; the own cluster sorts first.
    by_ip: HashMap<IpAddr, BTreeSet<Key>>,
    /// Services of the own cluster by cluster address; the first is in force.
    frontends: HashMap<IpAddr, Vec<(Arc<str>, Arc<str>)>>,
    assigned: BTreeMap<(Arc<str>, Arc<str>), Vec<IpAddr>>,
    counts: BTreeMap<Kind, usize>,
}

impl Index {
    pub(super) fn new(range: ServiceRange) -> Self {
        Self { range, ..Self::default() }
    }

    /// Takes changes in. Returns everything that a policy may have seen differently before.
    pub(super) fn apply(&mut self, changes: Vec<Change>) -> HashSet<Dep> {
        let mut touched = HashSet::new();
        let mut services = false;
        for (key, new) in changes {
            self.derived.remove(&key);
            let old = match &new {
                Some(object) => self.objects.insert(key.clone(), object.clone()),
                None => self.objects.remove(&key),
            };
            match (&old, &new) {
                (None, Some(_)) => *self.counts.entry(key.kind).or_default() += 1,
                (Some(_), None) => {
                    if let Some(n) = self.counts.get_mut(&key.kind) {
                        *n = n.saturating_sub(1);
                    }
                }
                _ => {}
            }
            if let Some(old) = &old {
                self.unlink(&key, old, &mut touched);
            }
            if let Some(new) = &new {
                self.link(&key, new, &mut touched);
            }
            services |=
                key.kind == Kind::Service && key.cluster.is_empty() && claim(old.as_deref()) != claim(new.as_deref());
            touched.insert(Dep::Scope(key.cluster.clone(), key.kind, key.namespace.clone()));
            touched.insert(Dep::Object(key));
        }
        if services {
            self.assign(&mut touched);
        }
        touched
    }

    /// Puts what Links make in the place of what they made before; manifests go before it. Returns as [`Self::apply`].
    pub(super) fn derive(&mut self, wanted: BTreeMap<Key, Arc<Object>>) -> HashSet<Dep> {
        let mut derived = std::mem::take(&mut self.derived);
        let mut changes: Vec<Change> = Vec::new();
        derived.retain(|key, _| {
            let kept = wanted.contains_key(key);
            if !kept {
                changes.push((key.clone(), None));
            }
            kept
        });
        for (key, object) in wanted {
            let same = match derived.get(&key).map(|old| (&**old, &*object)) {
                None => self.objects.contains_key(&key),
                Some((Object::Service(old), Object::Service(new))) => old == new,
                Some((Object::Endpoints(old), Object::Endpoints(new))) => old == new,
                Some(_) => false,
            };
            if !same {
                derived.insert(key.clone(), object.clone());
                changes.push((key, Some(object)));
            }
        }
        let touched = self.apply(changes);
        self.derived = derived;
        touched
    }

    fn link(&mut self, key: &Key, object: &Object, touched: &mut HashSet<Dep>) {
        for dep in links(key, object) {
            match &dep {
                Dep::Slices(c, ns, s) => {
                    self.slices.entry((c.clone(), ns.clone(), s.clone())).or_default().insert(key.clone());
                }
                Dep::Routes(kind, ns, name) => {
                    self.routes.entry((*kind, ns.clone(), name.clone())).or_default().insert(key.clone());
                }
                Dep::Ip(ip) => {
                    self.by_ip.entry(*ip).or_default().insert(key.clone());
                }
                Dep::Object(_) | Dep::Scope(..) | Dep::Frontend(..) => {}
            }
            touched.insert(dep);
        }
    }

    fn unlink(&mut self, key: &Key, object: &Object, touched: &mut HashSet<Dep>) {
        fn remove<K: std::hash::Hash + Eq>(map: &mut HashMap<K, BTreeSet<Key>>, at: K, key: &Key) {
            if let Some(set) = map.get_mut(&at) {
                set.remove(key);
                if set.is_empty() {
                    map.remove(&at);
                }
            }
        }
        for dep in links(key, object) {
            match dep.clone() {
                Dep::Slices(c, ns, s) => remove(&mut self.slices, (c, ns, s), key),
                Dep::Routes(kind, ns, name) => remove(&mut self.routes, (kind, ns, name), key),
                Dep::Ip(ip) => remove(&mut self.by_ip, ip, key),
                Dep::Object(_) | Dep::Scope(..) | Dep::Frontend(..) => {}
            }
            touched.insert(dep);
        }
    }

    /// Gives every Service its addresses; runs only when Services come, go, or change their addresses.
    fn assign(&mut self, touched: &mut HashSet<Dep>) {
        let start = Key { cluster: "".into(), kind: Kind::Service, namespace: "".into(), name: "".into() };
        let services = self.objects.range(start..).take_while(|(k, _)| k.cluster.is_empty() && k.kind == Kind::Service);
        let mut claims: Vec<Claim> = services.filter_map(|(_, o)| claim(Some(o))).collect();
        claims.sort();
        let assigned = alloc::assign(&claims, &self.range);
        let mut frontends: HashMap<IpAddr, Vec<(Arc<str>, Arc<str>)>> = HashMap::new();
        for c in &claims {
            let key = (c.namespace.clone(), c.name.clone());
            // Explicit addresses, or assigned ones; never both.
            for ip in assigned.get(&key).into_iter().flatten().chain(&c.explicit) {
                frontends.entry(*ip).or_default().push(key.clone());
            }
        }
        for (ip, owners) in frontends.iter().chain(&self.frontends) {
            let (old, new) = (self.frontends.get(ip), frontends.get(ip));
            if old != new {
                touched.insert(Dep::Ip(*ip));
                for (ns, name) in owners {
                    touched.insert(Dep::Frontend(ns.clone(), name.clone()));
                }
            }
        }
        self.assigned = assigned;
        self.frontends = frontends;
    }

    /// How many objects of each kind there are.
    pub(super) fn counts(&self) -> BTreeMap<&'static str, usize> {
        let mut out = BTreeMap::new();
        for (kind, n) in &self.counts {
            *out.entry(kind.name()).or_default() += n;
        }
        out
    }

    /// Services that have assigned addresses.
    pub(super) fn assigned(&self) -> &BTreeMap<(Arc<str>, Arc<str>), Vec<IpAddr>> {
        &self.assigned
    }

    /// Cluster addresses that several Services claim.
    pub(super) fn contested(&self) -> BTreeMap<IpAddr, Vec<(Arc<str>, Arc<str>)>> {
        self.frontends.iter().filter(|(_, s)| s.len() > 1).map(|(ip, s)| (*ip, s.clone())).collect()
    }

    pub(super) fn objects(&self) -> &BTreeMap<Key, Arc<Object>> {
        &self.objects
    }

    /// Whether a Link made it.
    pub(super) fn is_derived(&self, key: &Key) -> bool {
        self.derived.contains_key(key)
    }

    fn of_kind(&self, cluster: &Arc<str>, kind: Kind) -> impl Iterator<Item = (&Key, &Arc<Object>)> + use<'_> {
        let start = Key { cluster: cluster.clone(), kind, namespace: "".into(), name: "".into() };
        let cluster = cluster.clone();
        self.objects.range(start..).take_while(move |(k, _)| k.cluster == cluster && k.kind == kind)
    }

    /// Objects of the own cluster.
    pub(super) fn own(&self, kind: Kind) -> impl Iterator<Item = &Object> {
        self.of_kind(&"".into(), kind).map(|(_, object)| &**object)
    }

    /// The Services of a cluster that manifests bring.
    pub(super) fn given_services(&self, cluster: &Arc<str>) -> impl Iterator<Item = &Service> + use<'_> {
        self.of_kind(cluster, Kind::Service).filter(|(key, _)| !self.is_derived(key)).filter_map(|(_, o)| match &**o {
            Object::Service(service) => Some(service),
            _ => None,
        })
    }

    /// Whether the own cluster has a namespace: its object, or anything in it.
    pub(super) fn has_namespace(&self, namespace: &Arc<str>) -> bool {
        let lives = |kind| {
            let start = Key { cluster: "".into(), kind, namespace: namespace.clone(), name: "".into() };
            let keys = self.objects.range(start..).map(|(key, _)| key);
            keys.take_while(|k| k.cluster.is_empty() && k.kind == kind && k.namespace == *namespace)
                .any(|key| !self.is_derived(key))
        };
        let object = Key { cluster: "".into(), kind: Kind::Namespace, namespace: "".into(), name: namespace.clone() };
        self.objects.contains_key(&object) || Kind::all().any(lives)
    }
}

/// What an object is found by, beside its name.
fn links(key: &Key, object: &Object) -> Vec<Dep> {
    match object {
        Object::Slice(slice) => {
            slice.service.iter().map(|s| Dep::Slices(key.cluster.clone(), key.namespace.clone(), s.clone())).collect()
        }
        Object::Route(route) if key.cluster.is_empty() => {
            route.parents.iter().map(|p| Dep::Routes(p.kind, p.namespace.clone(), p.name.clone())).collect()
        }
        Object::Pod(pod) if !pod.host_network && !pod.finished => pod.ips.iter().map(|ip| Dep::Ip(*ip)).collect(),
        Object::ExternalWorkload(w) => w.ips.iter().map(|ip| Dep::Ip(*ip)).collect(),
        _ => Vec::new(),
    }
}

fn claim(object: Option<&Object>) -> Option<Claim> {
    let Some(Object::Service(s)) = object else { return None };
    let ServiceKind::Cluster { ips, v4, v6 } = &s.kind else { return None };
    Some(Claim {
        created: (s.head.created.is_none(), s.head.created.clone()),
        namespace: s.head.namespace.clone(),
        name: s.head.name.clone(),
        explicit: ips.clone(),
        v4: *v4,
        v6: *v6,
    })
}

/// Reads the index and notes what was read.
pub(super) struct View<'a> {
    index: &'a Index,
    deps: RefCell<HashSet<Dep>>,
}

macro_rules! getters {
    ($($name:ident, $variant:ident, $type:ty, $kind:expr;)*) => {$(
        pub(super) fn $name(&self, cluster: &Arc<str>, namespace: &Arc<str>, name: &Arc<str>) -> Option<&'a $type> {
            match self.object(cluster, $kind, namespace, name)?.as_ref() {
                Object::$variant(o) => Some(o),
                _ => None,
            }
        }
    )*};
}

macro_rules! lists {
    ($($name:ident, $variant:ident, $type:ty, $kind:expr;)*) => {$(
        /// In order of age.
        pub(super) fn $name(&self, namespace: &Arc<str>) -> Vec<&'a $type> {
            let mut list: Vec<_> = self
                .scope(&"".into(), $kind, namespace)
                .filter_map(|(_, o)| match o.as_ref() {
                    Object::$variant(o) => Some(o),
                    _ => None,
                })
                .collect();
            list.sort_by(|a, b| a.head.age().cmp(&b.head.age()));
            list
        }
    )*};
}

impl<'a> View<'a> {
    pub(super) fn new(index: &'a Index) -> Self {
        Self { index, deps: RefCell::default() }
    }

    /// What was looked at.
    pub(super) fn into_deps(self) -> HashSet<Dep> {
        self.deps.into_inner()
    }

    /// What was looked at elsewhere on behalf of this view.
    pub(super) fn also(&self, deps: HashSet<Dep>) {
        self.deps.borrow_mut().extend(deps);
    }

    pub(super) fn index(&self) -> &'a Index {
        self.index
    }

    fn note(&self, dep: Dep) {
        self.deps.borrow_mut().insert(dep);
    }

    pub(super) fn object(
        &self,
        cluster: &Arc<str>,
        kind: Kind,
        namespace: &Arc<str>,
        name: &Arc<str>,
    ) -> Option<&'a Arc<Object>> {
        let key = Key { cluster: cluster.clone(), kind, namespace: namespace.clone(), name: name.clone() };
        let object = self.index.objects.get(&key);
        self.note(Dep::Object(key));
        object
    }

    /// All objects of a kind in a namespace.
    pub(super) fn scope(
        &self,
        cluster: &Arc<str>,
        kind: Kind,
        namespace: &Arc<str>,
    ) -> impl Iterator<Item = (&'a Key, &'a Arc<Object>)> + use<'a> {
        self.note(Dep::Scope(cluster.clone(), kind, namespace.clone()));
        let start = Key { cluster: cluster.clone(), kind, namespace: namespace.clone(), name: "".into() };
        let (cluster, namespace) = (cluster.clone(), namespace.clone());
        self.index
            .objects
            .range(start..)
            .take_while(move |(k, _)| k.cluster == cluster && k.kind == kind && k.namespace == namespace)
    }

    getters! {
        service, Service, Service, Kind::Service;
        config_map, ConfigMap, ConfigMap, Kind::ConfigMap;
        pod, Pod, Pod, Kind::Pod;
        external_workload, ExternalWorkload, ExternalWorkload, Kind::ExternalWorkload;
        mesh_tls, MeshTls, MeshTls, Kind::MeshTlsAuthentication;
        network_auth, NetworkAuth, NetworkAuth, Kind::NetworkAuthentication;
        egress, Egress, Egress, Kind::EgressNetwork;
        profile, Profile, Profile, Kind::ServiceProfile;
        replica_set, Workload, Workload, Kind::ReplicaSet;
    }

    lists! {
        servers, Server, Server, Kind::Server;
        server_authorizations, ServerAuthorization, ServerAuthorization, Kind::ServerAuthorization;
        authorization_policies, AuthorizationPolicy, AuthorizationPolicy, Kind::AuthorizationPolicy;
        rate_limits, RateLimit, RateLimit, Kind::HttpLocalRateLimitPolicy;
        egresses, Egress, Egress, Kind::EgressNetwork;
        backend_tls, BackendTls, BackendTls, Kind::BackendTlsPolicy;
        backend_traffic, BackendTraffic, BackendTraffic, Kind::BackendTrafficPolicy;
    }

    /// The bundles of ConfigMaps together; unusable if one is missing. None = the system's.
    pub(super) fn roots(&self, namespace: &Arc<str>, config_maps: Option<&[Arc<str>]>) -> web::Roots {
        let Some(names) = config_maps else { return web::Roots::System };
        let mut pem = String::new();
        for name in names {
            let bundle = self.config_map(&"".into(), namespace, name).and_then(|c| c.authorities.as_deref());
            let Some(bundle) = bundle else {
                return web::Roots::Unusable(format!("there is no ConfigMap {namespace}/{name} with ca.crt").into());
            };
            pem.push_str(bundle);
            pem.push('\n');
        }
        web::Roots::Pem(pem.into())
    }

    /// The annotation of a namespace.
    pub(super) fn namespace_annotation(&self, cluster: &Arc<str>, namespace: &Arc<str>, key: &str) -> Option<&'a str> {
        self.object(cluster, Kind::Namespace, &"".into(), namespace)?.head().annotation(key)
    }

    /// The zone of a node.
    pub(super) fn zone(&self, cluster: &Arc<str>, node: &Arc<str>) -> Option<&'a Arc<str>> {
        self.object(cluster, Kind::Node, &"".into(), node)?.head().labels.get("topology.kubernetes.io/zone")
    }

    /// The routes on a parent, older first.
    pub(super) fn routes(&self, kind: ParentKind, namespace: &Arc<str>, name: &Arc<str>) -> Vec<(&'a Key, &'a Route)> {
        self.note(Dep::Routes(kind, namespace.clone(), name.clone()));
        let keys = self.index.routes.get(&(kind, namespace.clone(), name.clone()));
        let mut list: Vec<_> = keys
            .into_iter()
            .flatten()
            .filter_map(|k| match self.index.objects.get(k)?.as_ref() {
                Object::Route(r) => Some((k, r)),
                _ => None,
            })
            .collect();
        list.sort_by(|a, b| a.1.head.age().cmp(&b.1.head.age()));
        list
    }

    /// The slices of a Service.
    pub(super) fn slices(
        &self,
        cluster: &Arc<str>,
        namespace: &Arc<str>,
        name: &Arc<str>,
    ) -> Vec<(&'a Key, &'a Arc<Object>)> {
        let at = (cluster.clone(), namespace.clone(), name.clone());
        let keys = self.index.slices.get(&at);
        self.note(Dep::Slices(at.0, at.1, at.2));
        keys.into_iter().flatten().filter_map(|k| Some((k, self.index.objects.get(k)?))).collect()
    }

    /// The Service of the own cluster that has a cluster address.
    pub(super) fn frontend(&self, ip: IpAddr) -> Option<&'a Service> {
        self.note(Dep::Ip(ip));
        let (namespace, name) = self.index.frontends.get(&ip)?.first()?;
        self.service(&"".into(), namespace, name)
    }

    /// The Pod or ExternalWorkload that has an address, of the own cluster if there is one.
    pub(super) fn by_ip(&self, ip: IpAddr) -> Option<(&'a Key, &'a Arc<Object>)> {
        self.note(Dep::Ip(ip));
        let key = self.index.by_ip.get(&ip)?.first()?;
        Some((key, self.index.objects.get(key)?))
    }

    /// The cluster addresses of a Service of the own cluster.
    pub(super) fn cluster_ips(&self, service: &Service) -> Vec<IpAddr> {
        self.note(Dep::Frontend(service.head.namespace.clone(), service.head.name.clone()));
        match &service.kind {
            ServiceKind::Cluster { ips, .. } if ips.is_empty() => {
                let key = (service.head.namespace.clone(), service.head.name.clone());
                self.index.assigned.get(&key).cloned().unwrap_or_default()
            }
            ServiceKind::Cluster { ips, .. } => ips.clone(),
            ServiceKind::Headless | ServiceKind::External => Vec::new(),
        }
    }
}
