//! What Links make of other clusters' Services, as Linkerd's service mirror would: mirrors behind a gateway, mirrors with
//! the replicas themselves, and federated Services, whose replicas come from several clusters (resources.md 6). A Service
//! that a manifest brings ready-made goes before one that a Link makes.

use super::{
    Mesh,
    annotations::Tuning,
    files::Cluster,
    index::{Dep, Index},
    manifest::{Address, Endpoints, Gateway, Head, Key, Kind, Link, Object, Selector, Service, ServiceKind, SlicePort},
    report::{At, Severity},
};
use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    net::IpAddr,
    sync::Arc,
};

/// What is known of a cluster, whoever told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Facts {
    pub(super) trust_domain: Arc<str>,
    pub(super) cluster_domain: Arc<str>,
    pub(super) control_plane_namespace: Arc<str>,
}

/// Takes Links in after a change: learns about clusters, and makes and unmakes Services. Returns what changed by that; none
/// = the names of a cluster, on which everything may depend.
pub(super) fn update(index: &mut Index, mesh: &mut Mesh, touched: &HashSet<Dep>) -> Option<HashSet<Dep>> {
    if !touched.iter().any(concerns) {
        return Some(HashSet::new());
    }
    let clusters = learn(index, mesh);
    let same = clusters == mesh.clusters;
    mesh.clusters = clusters;
    let mirrors = mirrors(index, mesh);
    let changed = index.derive(mirrors);
    same.then_some(changed)
}

/// Whether Links may have to be looked at again. Replicas of other clusters are followed where they are used.
fn concerns(dep: &Dep) -> bool {
    let Dep::Object(key) = dep else { return false };
    match key.kind {
        Kind::Link | Kind::Secret | Kind::Service => true,
        // Anything else of our own may be what makes a namespace exist.
        Kind::EndpointSlice | Kind::Endpoints => false,
        _ => key.cluster.is_empty(),
    }
}

/// The names of all clusters: as the command line has it, else the credentials of a Link, else the Link, else ours.
pub(super) fn learn(index: &Index, mesh: &Mesh) -> HashMap<Arc<str>, Facts> {
    let own = Facts {
        trust_domain: mesh.settings.trust_domain.clone(),
        cluster_domain: mesh.settings.cluster_domain.clone(),
        control_plane_namespace: mesh.settings.control_plane_namespace.clone(),
    };
    let mut told: BTreeMap<Arc<str>, Vec<Cluster>> = BTreeMap::new();
    for cluster in &mesh.given {
        told.entry(cluster.name.clone()).or_default().push(cluster.clone());
    }
    for secret in index.own(Kind::Secret).map(Object::head) {
        if let Some(name) = secret.labels.get("multicluster.linkerd.io/cluster-name") {
            let annotation = |key: &str| secret.annotations.get(key).cloned();
            told.entry(name.clone()).or_default().push(Cluster {
                name: name.clone(),
                trust_domain: annotation("multicluster.linkerd.io/trust-domain"),
                cluster_domain: annotation("multicluster.linkerd.io/cluster-domain"),
                control_plane_namespace: None,
            });
        }
    }
    for link in links(index) {
        told.entry(link.cluster.clone()).or_default().push(Cluster {
            name: link.cluster.clone(),
            trust_domain: None,
            cluster_domain: link.cluster_domain.clone(),
            control_plane_namespace: link.control_plane_namespace.clone(),
        });
    }
    told.remove("");
    let mut facts: HashMap<_, _> = told
        .into_iter()
        .map(|(name, told)| {
            let first = |get: fn(&Cluster) -> &Option<Arc<str>>, own: &Arc<str>| {
                told.iter().find_map(|c| get(c).clone()).unwrap_or_else(|| own.clone())
            };
            let facts = Facts {
                trust_domain: first(|c| &c.trust_domain, &own.trust_domain),
                cluster_domain: first(|c| &c.cluster_domain, &own.cluster_domain),
                control_plane_namespace: first(|c| &c.control_plane_namespace, &own.control_plane_namespace),
            };
            (name, facts)
        })
        .collect();
    facts.insert("".into(), own);
    facts
}

/// The Links in force, older first.
fn links(index: &Index) -> Vec<&Link> {
    let mut links: Vec<_> = index
        .own(Kind::Link)
        .filter_map(|object| match object {
            Object::Link(link) => Some(link),
            _ => None,
        })
        .collect();
    links.sort_by(|a, b| a.head.age().cmp(&b.head.age()));
    links
}

/// Gateways of which something has to be found out, by Link.
pub(super) fn gateways(index: &Index, mesh: &Mesh) -> BTreeMap<Key, Gateway> {
    let links = links(index).into_iter().filter(|link| has_folder(mesh, link));
    let all = links.filter_map(|link| Some((key(&link.head, Kind::Link), link.gateway.as_ref()?)));
    all.filter(|(_, gateway)| gateway.probe.is_some() || !gateway.names.is_empty())
        .map(|(link, gateway)| (link, gateway.clone()))
        .collect()
}

/// Whether anything can be mirrored from the Link's cluster.
fn has_folder(mesh: &Mesh, link: &Link) -> bool {
    mesh.given.iter().any(|cluster| cluster.name == link.cluster)
}

/// A federated Service that is coming together.
#[derive(Default)]
struct Federation<'a> {
    /// Who gives labels, annotations and ports: the own member, else that of the oldest Link.
    model: Option<(&'a Link, &'a Service)>,
    /// Members here: the Service of that name, and mirrors behind gateways.
    local: BTreeSet<Arc<str>>,
    /// Clusters with members.
    remote: BTreeSet<Arc<str>>,
}

/// Everything that the Links make.
fn mirrors(index: &Index, mesh: &Mesh) -> BTreeMap<Key, Arc<Object>> {
    let mut out = BTreeMap::new();
    let mut federations: BTreeMap<(&Arc<str>, &Arc<str>), Federation<'_>> = BTreeMap::new();
    let links = links(index);
    let own: Arc<str> = "".into();
    let told = links.iter().any(|link| link.cluster.is_empty());
    for link in links.iter().filter(|link| !told || link.cluster.is_empty()) {
        // Where no Link is about our own cluster, our Services join as the others' do.
        for service in index.given_services(&own).filter(|s| joins(link, s)) {
            let federation = federations.entry((&service.head.namespace, &service.head.name)).or_default();
            federation.model.get_or_insert((link, service));
            federation.local.insert(service.head.name.clone());
        }
    }
    for link in links.iter().filter(|link| !link.cluster.is_empty()) {
        for service in index.given_services(&link.cluster) {
            let head = &service.head;
            if service.kind == ServiceKind::External || !index.has_namespace(&head.namespace) {
                continue;
            }
            let joins = joins(link, service);
            let chosen = |selector: &Option<_>| selector.as_ref().is_some_and(|s: &Selector| s.matches(&head.labels));
            match &link.gateway {
                _ if chosen(&link.discovered) => add(&mut out, discovered(link, service)),
                Some(gateway) if chosen(&link.exported) || (joins && link.federated_by_gateway) => {
                    let (mirror, endpoints) = behind(link, service, gateway, mesh);
                    add(&mut out, mirror);
                    let key = key(&endpoints.head, Kind::Endpoints);
                    out.insert(key, Arc::new(Object::Endpoints(endpoints)));
                }
                _ => {}
            }
            if joins {
                let federation = federations.entry((&head.namespace, &head.name)).or_default();
                federation.model.get_or_insert((link, service));
                match link.federated_by_gateway {
                    true => federation.local.insert(mirror_name(link, service)),
                    false => federation.remote.insert(link.cluster.clone()),
                };
            }
        }
    }
    for ((_, name), federation) in federations {
        if let Some((link, model)) = federation.model {
            add(&mut out, federated(link, model, name, &federation));
        }
    }
    out
}

fn joins(link: &Link, service: &Service) -> bool {
    matches!(service.kind, ServiceKind::Cluster { .. })
        && link.federated.as_ref().is_some_and(|s| s.matches(&service.head.labels))
}

fn add(out: &mut BTreeMap<Key, Arc<Object>>, service: Service) {
    out.insert(key(&service.head, Kind::Service), Arc::new(Object::Service(service)));
}

fn key(head: &Head, kind: Kind) -> Key {
    Key { cluster: "".into(), kind, namespace: head.namespace.clone(), name: head.name.clone() }
}

fn mirror_name(link: &Link, service: &Service) -> Arc<str> {
    format!("{}-{}", service.head.name, link.cluster).into()
}

/// A Service of another name with the same ports, and no replicas of its own.
fn copy(link: &Link, service: &Service, name: Arc<str>, labels: &[(&str, &str)], notes: &[(&str, &str)]) -> Service {
    let (mut own_labels, mut annotations) = link.copied(&service.head);
    let pair = |(k, v): &(&str, &str)| (Arc::from(*k), Arc::from(*v));
    own_labels.extend(labels.iter().map(pair));
    annotations.extend(notes.iter().map(pair));
    let tuning = Tuning::read(&annotations, &mut At::new(&mut Vec::new(), ""), Severity::Warning);
    let head = Head { name, labels: own_labels, annotations, owner: None, ..service.head.clone() };
    let (v4, v6) = match service.kind {
        ServiceKind::Cluster { v4, v6, .. } => (v4, v6),
        ServiceKind::Headless | ServiceKind::External => (true, false),
    };
    Service {
        head,
        kind: ServiceKind::Cluster { ips: Vec::new(), v4, v6 },
        selector: BTreeMap::new(),
        local_only: false,
        publish_not_ready: false,
        tuning,
        ..service.clone()
    }
}

const MIRRORED: (&str, &str) = ("mirror.linkerd.io/mirrored-service", "true");
const CLUSTER_NAME: &str = "mirror.linkerd.io/cluster-name";

/// A mirror whose replicas are the remote Service's own.
fn discovered(link: &Link, service: &Service) -> Service {
    let labels = [
        MIRRORED,
        (CLUSTER_NAME, &*link.cluster),
        ("multicluster.linkerd.io/remote-discovery", &*link.cluster),
        ("multicluster.linkerd.io/remote-service", &*service.head.name),
    ];
    copy(link, service, mirror_name(link, service), &labels, &[])
}

/// A mirror whose only replicas are the gateway's addresses.
fn behind(link: &Link, service: &Service, gateway: &Gateway, mesh: &Mesh) -> (Service, Endpoints) {
    let domain = mesh.clusters.get(&link.cluster).map_or(&mesh.settings.cluster_domain, |facts| &facts.cluster_domain);
    let remote = format!("{}.{}.svc.{domain}", service.head.name, service.head.namespace);
    let notes = [
        ("mirror.linkerd.io/remote-svc-fq-name", &*remote),
        ("mirror.linkerd.io/remote-gateway-identity", gateway.identity.as_str()),
    ];
    let labels = [MIRRORED, (CLUSTER_NAME, &*link.cluster)];
    let mut mirror = copy(link, service, mirror_name(link, service), &labels, &notes);
    mirror.behind = Some((link.cluster.clone(), service.head.name.clone()));
    let address = |ip: &IpAddr| Address {
        ip: *ip,
        ready: true,
        hostname: None,
        node: None,
        zone: None,
        hints: None,
        target: None,
    };
    let usable = mesh.gateways.get(&key(&link.head, Kind::Link));
    let addresses = match usable {
        Some(usable) => usable.iter().map(address).collect(),
        None => gateway.addresses.iter().map(address).collect(),
    };
    let ports = mirror.ports.iter().map(|p| SlicePort { name: p.name.clone(), port: gateway.port }).collect();
    let head = Head { annotations: BTreeMap::new(), ..mirror.head.clone() };
    (mirror, Endpoints { head, subsets: vec![(ports, addresses)] })
}

/// A Service whose replicas are those of all members.
fn federated(link: &Link, model: &Service, name: &str, federation: &Federation<'_>) -> Service {
    let join = |members: Vec<String>| members.join(",");
    let remote = join(federation.remote.iter().map(|cluster| format!("{name}@{cluster}")).collect());
    let local = join(federation.local.iter().map(ToString::to_string).collect());
    let notes: Vec<_> =
        [("multicluster.linkerd.io/remote-discovery", &*remote), ("multicluster.linkerd.io/local-discovery", &*local)]
            .into_iter()
            .filter(|(_, members)| !members.is_empty())
            .collect();
    copy(link, model, format!("{name}-federated").into(), &[MIRRORED], &notes)
}

/// Services of other clusters that some Link asks for and that can't be mirrored, and Links that nothing can come from:
/// the Link, and why.
pub(super) fn problems(index: &Index, mesh: &Mesh) -> Vec<(Key, String, &'static str)> {
    let mut out = Vec::new();
    for link in links(index).into_iter().filter(|link| !link.cluster.is_empty()) {
        let at = key(&link.head, Kind::Link);
        if !has_folder(mesh, link) {
            let why = format!("no folder stands for cluster {}, so nothing is mirrored from it", link.cluster);
            out.push((at, why, "Give one with --cluster NAME=DIR"));
            continue;
        }
        let wanted = |s: &&Service| {
            let selectors = [&link.exported, &link.discovered, &link.federated];
            selectors.into_iter().flatten().any(|selector| selector.matches(&s.head.labels))
        };
        let namespaces: BTreeSet<_> =
            index.given_services(&link.cluster).filter(wanted).map(|s| &s.head.namespace).collect();
        for namespace in namespaces.into_iter().filter(|namespace| !index.has_namespace(namespace)) {
            let why = format!("Services of namespace {namespace} are not mirrored: this cluster has no such namespace");
            out.push((at.clone(), why, "Add the Namespace"));
        }
    }
    out
}
