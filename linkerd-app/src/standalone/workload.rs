//! The workload that this proxy stands beside: a Pod, an ExternalWorkload, or a Deployment and the like that would make
//! such a Pod.

use super::{
    Mesh,
    annotations::Pairs,
    index::View,
    manifest::{Head, Kind, Object, Pod, PortRef, Workload as Maker},
};
use linkerd_tls::Id;
use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
};

/// What the manifests say about the local workload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Workload {
    /// Its namespace.
    pub namespace: Arc<str>,
    /// The name that was asked for.
    pub name: Arc<str>,
    /// Whether it is a Pod or a machine outside.
    pub kind: WorkloadKind,
    /// Its labels.
    pub labels: BTreeMap<Arc<str>, Arc<str>>,
    /// Its annotations, over the `config.linkerd.io/` ones of its namespace.
    pub annotations: BTreeMap<Arc<str>, Arc<str>>,
    /// Its service account; `default` for machines.
    pub service_account: Arc<str>,
    /// Its identity.
    pub identity: Id,
    /// What made it, for metric labels: a kind in lower case as labels spell it (`deployment`) and a name.
    pub owner: Option<(Arc<str>, Arc<str>)>,
    /// Its TCP ports with their names.
    pub ports: Vec<(u16, Option<Arc<str>>)>,
    /// Paths of HTTP probes by port.
    pub probes: BTreeMap<u16, BTreeSet<Arc<str>>>,
    /// Its addresses; empty if the manifests do not tell.
    pub addresses: Vec<IpAddr>,
    /// Its node.
    pub node: Option<Arc<str>>,
    /// Its zone.
    pub zone: Option<Arc<str>>,
}

/// What a workload is.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Hash)]
pub enum WorkloadKind {
    /// A Pod; Servers select it by `podSelector`.
    Pod,
    /// A machine; Servers select it by `externalWorkloadSelector`.
    External,
}

const MAKERS: [Kind; 6] =
    [Kind::Deployment, Kind::StatefulSet, Kind::DaemonSet, Kind::ReplicaSet, Kind::Job, Kind::CronJob];

/// Looks the workload up: a Pod of that name, an ExternalWorkload, a Deployment (or the like) of that name, or one whose
/// Pods would be named so.
///
/// # Errors
/// When there is none, with what was looked for.
pub(super) fn find(view: &View<'_>, mesh: &Mesh, namespace: &Arc<str>, name: &Arc<str>) -> Result<Workload, String> {
    let local: Arc<str> = "".into();
    if let Some(pod) = view.pod(&local, namespace, name) {
        return of_pod(view, mesh, pod, name);
    }
    if let Some(w) = view.external_workload(&local, namespace, name) {
        return Ok(Workload {
            kind: WorkloadKind::External,
            identity: w.identity.clone(),
            ports: w.ports.clone(),
            addresses: w.ips.clone(),
            zone: w.head.labels.get("topology.kubernetes.io/zone").cloned(),
            ..base(view, &w.head, name, w.identity.clone())
        });
    }
    // The longest name wins: Pods of `web-api` are not Pods of `web`.
    let mut makers: Vec<&Maker> = MAKERS
        .into_iter()
        .flat_map(|kind| view.scope(&local, kind, namespace))
        .filter_map(|(_, o)| match o.as_ref() {
            Object::Workload(w) => Some(w),
            _ => None,
        })
        .filter(|w| name.strip_prefix(&*w.head.name).is_some_and(|rest| rest.is_empty() || is_suffix(rest)))
        .collect();
    makers.sort_by_key(|w| (std::cmp::Reverse(w.head.name.len()), MAKERS.iter().position(|k| *k == w.kind)));
    match makers.first() {
        Some(maker) => of_pod(view, mesh, &maker.template, name),
        None => Err(format!(
            "the manifests have no Pod, ExternalWorkload or Deployment {namespace}/{name}; \
             add its object, or name one that is there as NAMESPACE/POD"
        )),
    }
}

/// `-hash`, `-hash-hash` or `-0`, as controllers name Pods.
fn is_suffix(rest: &str) -> bool {
    let Some(rest) = rest.strip_prefix('-') else { return false };
    let parts: Vec<_> = rest.split('-').collect();
    parts.len() <= 2
        && parts.iter().all(|p| !p.is_empty() && p.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit()))
}

fn base(view: &View<'_>, head: &Head, name: &Arc<str>, identity: Id) -> Workload {
    let mut annotations: Pairs = BTreeMap::new();
    if let Some(ns) = view.object(&"".into(), Kind::Namespace, &"".into(), &head.namespace) {
        let inherited =
            ns.head().annotations.iter().filter(|(k, _)| k.starts_with("config.") || k.starts_with("linkerd.io/"));
        annotations.extend(inherited.map(|(k, v)| (k.clone(), v.clone())));
    }
    annotations.extend(head.annotations.iter().map(|(k, v)| (k.clone(), v.clone())));
    Workload {
        namespace: head.namespace.clone(),
        name: name.clone(),
        kind: WorkloadKind::Pod,
        labels: head.labels.clone(),
        annotations,
        service_account: "default".into(),
        identity,
        owner: None,
        ports: Vec::new(),
        probes: BTreeMap::new(),
        addresses: Vec::new(),
        node: None,
        zone: None,
    }
}

fn of_pod(view: &View<'_>, mesh: &Mesh, pod: &Pod, name: &Arc<str>) -> Result<Workload, String> {
    let local: Arc<str> = "".into();
    let identity = mesh.identity(&local, &pod.head.namespace, &pod.service_account)?;
    let mut probes: BTreeMap<u16, BTreeSet<Arc<str>>> = BTreeMap::new();
    for container in &pod.containers {
        for (port, path) in &container.probes {
            // A probe names a port of its own container before one of another.
            let own = container.ports.iter().find(|(n, name)| port.is(*n, name.as_deref())).map(|p| p.0);
            let number = match port {
                PortRef::Number(n) => Some(*n),
                PortRef::Name(_) => own.or_else(|| pod.port(port)),
            };
            if let Some(number) = number {
                probes.entry(number).or_default().insert(path.clone());
            }
        }
    }
    Ok(Workload {
        service_account: pod.service_account.clone(),
        owner: owner(view, &local, pod),
        ports: pod.containers.iter().flat_map(|c| c.ports.iter().cloned()).collect(),
        probes,
        addresses: pod.ips.clone(),
        zone: pod.node.as_ref().and_then(|n| view.zone(&local, n)).cloned(),
        node: pod.node.clone(),
        ..base(view, &pod.head, name, identity)
    })
}

/// What made a Pod, as metric labels spell it (metrics.md 3.2).
pub(super) fn owner(view: &View<'_>, cluster: &Arc<str>, pod: &Pod) -> Option<(Arc<str>, Arc<str>)> {
    if let Some(owner) = &pod.head.owner {
        let name: Arc<str> = owner.name.as_str().into();
        return Some(match owner.kind.as_str() {
            "ReplicaSet" => {
                let hash = pod.head.label("pod-template-hash");
                let known = view.replica_set(cluster, &pod.head.namespace, &name).and_then(|r| r.head.owner.as_ref());
                let cut = hash.and_then(|h| name.strip_suffix(h)?.strip_suffix('-'));
                match (known, cut) {
                    (Some(deployment), _) => ("deployment".into(), deployment.name.as_str().into()),
                    (None, Some(deployment)) => ("deployment".into(), deployment.into()),
                    (None, None) => ("replicaset".into(), name),
                }
            }
            "Job" => ("k8s_job".into(), name),
            kind => (kind.to_ascii_lowercase().into(), name),
        });
    }
    // The injector leaves the owner in a label.
    ["deployment", "daemonset", "statefulset", "replicaset", "replicationcontroller", "cronjob", "job"]
        .into_iter()
        .find_map(|kind| {
            let name = pod.head.labels.get(format!("linkerd.io/proxy-{kind}").as_str())?;
            Some((if kind == "job" { "k8s_job" } else { kind }.into(), name.clone()))
        })
}
