//! Core kinds: Services, their endpoints, Pods and what makes Pods.

use super::{
    super::{
        annotations::{Ports, Tuning, WEIGHT, is_port_name, weight},
        report::{At, Severity},
    },
    Head, Kind,
    typed::typed,
};
use serde::Deserialize;
use serde_json::Value;
use std::{collections::BTreeMap, net::IpAddr, sync::Arc};

/// A Service (resources.md 2.1).
#[derive(Clone, Debug, PartialEq)]
pub(in super::super) struct Service {
    pub(in super::super) head: Head,
    pub(in super::super) kind: ServiceKind,
    pub(in super::super) selector: BTreeMap<Arc<str>, Arc<str>>,
    /// TCP ports alone.
    pub(in super::super) ports: Vec<ServicePort>,
    pub(in super::super) local_only: bool,
    pub(in super::super) client_ip_affinity: bool,
    pub(in super::super) publish_not_ready: bool,
    pub(in super::super) tuning: Tuning,
    /// Of a mirror that a Link makes behind a gateway: cluster and name of the Service there.
    pub(in super::super) behind: Option<(Arc<str>, Arc<str>)>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(in super::super) enum ServiceKind {
    /// With the addresses that the manifest gives; which families it wants if it gives none.
    Cluster {
        ips: Vec<IpAddr>,
        v4: bool,
        v6: bool,
    },
    Headless,
    External,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(in super::super) struct ServicePort {
    pub(in super::super) name: Arc<str>,
    pub(in super::super) port: u16,
    pub(in super::super) target: PortRef,
    /// Lower case.
    pub(in super::super) app_protocol: Option<Arc<str>>,
}

/// A port by number or by name.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Deserialize)]
#[serde(try_from = "Value")]
pub(in super::super) enum PortRef {
    Number(u16),
    Name(Arc<str>),
}

impl TryFrom<Value> for PortRef {
    type Error = String;

    fn try_from(value: Value) -> Result<Self, String> {
        let number = match &value {
            Value::Number(n) => n.as_u64(),
            Value::String(s) if s.bytes().all(|b| b.is_ascii_digit()) => s.parse().ok(),
            Value::String(s) if is_port_name(s) => return Ok(Self::Name(s.as_str().into())),
            _ => None,
        };
        match number.and_then(|n| u16::try_from(n).ok()).filter(|n| *n > 0) {
            Some(n) => Ok(Self::Number(n)),
            None => Err(format!("{value} is no port; write a number from 1 to 65535 or the name of a container port")),
        }
    }
}

impl PortRef {
    /// Whether it names this container port.
    pub(in super::super) fn is(&self, number: u16, name: Option<&str>) -> bool {
        match self {
            Self::Number(n) => *n == number,
            Self::Name(n) => name == Some(n),
        }
    }
}

/// Who made an object.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub(in super::super) struct Owner {
    pub(in super::super) kind: String,
    pub(in super::super) name: String,
}

/// An EndpointSlice (resources.md 2.2).
#[derive(Clone, Debug)]
pub(in super::super) struct Slice {
    pub(in super::super) head: Head,
    pub(in super::super) service: Option<Arc<str>>,
    pub(in super::super) ports: Vec<SlicePort>,
    pub(in super::super) addresses: Vec<Address>,
}

/// Endpoints, the older form: groups of addresses with ports.
#[derive(Clone, Debug, PartialEq)]
pub(in super::super) struct Endpoints {
    pub(in super::super) head: Head,
    pub(in super::super) subsets: Vec<(Vec<SlicePort>, Vec<Address>)>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(in super::super) struct SlicePort {
    pub(in super::super) name: Arc<str>,
    pub(in super::super) port: u16,
}

/// One endpoint of a slice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in super::super) struct Address {
    pub(in super::super) ip: IpAddr,
    pub(in super::super) ready: bool,
    pub(in super::super) hostname: Option<Arc<str>>,
    pub(in super::super) node: Option<Arc<str>>,
    pub(in super::super) zone: Option<Arc<str>>,
    /// Zones that should use it, if the slice hints.
    pub(in super::super) hints: Option<Vec<Arc<str>>>,
    /// The Pod or ExternalWorkload behind it.
    pub(in super::super) target: Option<(Kind, Arc<str>, Arc<str>)>,
}

/// A Pod, or the template of one.
#[derive(Clone, Debug, Default)]
pub(in super::super) struct Pod {
    pub(in super::super) head: Head,
    pub(in super::super) service_account: Arc<str>,
    pub(in super::super) node: Option<Arc<str>>,
    pub(in super::super) host_network: bool,
    pub(in super::super) containers: Vec<Container>,
    pub(in super::super) ips: Vec<IpAddr>,
    /// Ready, or not told (a manifest without status).
    pub(in super::super) ready: bool,
    /// Succeeded, failed, or being deleted.
    pub(in super::super) finished: bool,
    pub(in super::super) hostname: Option<Arc<str>>,
    pub(in super::super) subdomain: Option<Arc<str>>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(in super::super) struct Container {
    /// TCP ports with their names.
    pub(in super::super) ports: Vec<(u16, Option<Arc<str>>)>,
    /// HTTP probes: port and path.
    pub(in super::super) probes: Vec<(PortRef, Arc<str>)>,
}

impl Pod {
    /// The name of a container port.
    pub(in super::super) fn port_name(&self, port: u16) -> Option<&str> {
        self.containers.iter().flat_map(|c| &c.ports).find(|p| p.0 == port)?.1.as_deref()
    }

    /// The container port that a reference means.
    pub(in super::super) fn port(&self, port: &PortRef) -> Option<u16> {
        match port {
            PortRef::Number(n) => Some(*n),
            PortRef::Name(_) => self
                .containers
                .iter()
                .flat_map(|c| &c.ports)
                .find(|(number, name)| port.is(*number, name.as_deref()))
                .map(|p| p.0),
        }
    }
}

/// A Deployment or the like: what makes Pods.
#[derive(Clone, Debug)]
pub(in super::super) struct Workload {
    pub(in super::super) head: Head,
    pub(in super::super) kind: Kind,
    pub(in super::super) template: Pod,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct RawService {
    #[serde(rename = "type")]
    kind: String,
    #[serde(rename = "clusterIP")]
    cluster_ip: String,
    #[serde(rename = "clusterIPs")]
    cluster_ips: Vec<String>,
    ip_families: Vec<String>,
    ip_family_policy: String,
    selector: BTreeMap<Arc<str>, Arc<str>>,
    ports: Vec<RawServicePort>,
    internal_traffic_policy: String,
    session_affinity: String,
    publish_not_ready_addresses: bool,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawServicePort {
    #[serde(default)]
    name: Arc<str>,
    port: PortRef,
    target_port: Option<PortRef>,
    #[serde(default)]
    protocol: String,
    app_protocol: Option<String>,
}

/// Most ports of a Service; Kubernetes has no bound, its API server's request size gives about this.
const MAX_PORTS: usize = 10_000;

pub(super) fn service(value: &Value, head: Head, at: &mut At<'_>) -> Option<Service> {
    let raw: RawService = typed(value, "spec", at)?;
    let tuning = Tuning::read(&head.annotations, &mut at.field("metadata"), Severity::Warning);
    let mut at = at.field("spec");
    let ports = service_ports(raw.ports, &mut at.field("ports"));
    let kind = match raw.kind.as_str() {
        "ExternalName" => {
            at.field("type").warn(
                "a Service of type ExternalName has no cluster address and no endpoints here",
                "Use an EgressNetwork with routes, or a Service with EndpointSlices",
            );
            ServiceKind::External
        }
        "" | "ClusterIP" | "NodePort" | "LoadBalancer" => {
            let mut ips = Vec::new();
            let first = (!raw.cluster_ip.is_empty()).then_some(("clusterIP", &raw.cluster_ip));
            let all = raw.cluster_ips.iter().map(|ip| ("clusterIPs", ip));
            let mut headless = false;
            for (field, text) in first.into_iter().chain(all) {
                match text.parse::<IpAddr>() {
                    _ if text == "None" => headless = true,
                    Ok(ip) if ips.contains(&ip) => {}
                    Ok(ip) => ips.push(ip),
                    Err(_) => at
                        .field(field)
                        .error(format!("{text:?} is no IP address"), "Give an address, None, or leave it out"),
                }
            }
            let wants = |family: &str| raw.ip_families.iter().any(|f| f == family);
            for family in raw.ip_families.iter().filter(|f| !matches!(f.as_str(), "IPv4" | "IPv6")) {
                at.field("ipFamilies").error(format!("{family:?} is no address family"), "Write IPv4 or IPv6");
            }
            let dual = matches!(raw.ip_family_policy.as_str(), "PreferDualStack" | "RequireDualStack");
            if headless {
                ServiceKind::Headless
            } else {
                ServiceKind::Cluster { ips, v4: dual || !wants("IPv6") || wants("IPv4"), v6: dual || wants("IPv6") }
            }
        }
        other => {
            at.field("type").error(
                format!("{other:?} is no Service type"),
                "Write ClusterIP, NodePort, LoadBalancer or ExternalName",
            );
            ServiceKind::External
        }
    };
    Some(Service {
        head,
        kind,
        selector: raw.selector,
        ports,
        local_only: raw.internal_traffic_policy == "Local",
        client_ip_affinity: raw.session_affinity == "ClientIP",
        publish_not_ready: raw.publish_not_ready_addresses,
        tuning,
        behind: None,
    })
}

fn service_ports(raw: Vec<RawServicePort>, at: &mut At<'_>) -> Vec<ServicePort> {
    let mut ports: Vec<ServicePort> = Vec::new();
    if raw.len() > MAX_PORTS {
        at.error(format!("{} ports are more than {MAX_PORTS}", raw.len()), "Split the Service");
        return ports;
    }
    let several = raw.len() > 1;
    for (i, p) in raw.into_iter().enumerate() {
        let mut at = at.item(i);
        if !matches!(p.protocol.as_str(), "" | "TCP") {
            at.field("protocol").note(format!("{} ports are left alone", p.protocol));
            continue;
        }
        let PortRef::Number(port) = p.port else {
            at.field("port").error("a Service port is a number", "Use targetPort to name a container port");
            continue;
        };
        if several && p.name.is_empty() {
            at.field("name").error("missing", "A Service with several ports names each of them");
        }
        if ports.iter().any(|q| q.port == port) {
            at.field("port").error(format!("port {port} is there twice"), "Remove one of them");
            continue;
        }
        if !p.name.is_empty() && ports.iter().any(|q| q.name == p.name) {
            at.field("name").error(format!("the name {:?} is there twice", p.name), "Give each port its own name");
        }
        let app_protocol = p.app_protocol.map(|a| a.to_ascii_lowercase());
        ports.push(ServicePort {
            name: p.name,
            port,
            target: p.target_port.unwrap_or(PortRef::Number(port)),
            app_protocol: app_protocol.map(Into::into),
        });
    }
    ports
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct RawConditions {
    ready: Option<bool>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct RawTarget {
    kind: String,
    namespace: Option<Arc<str>>,
    name: Arc<str>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct RawEndpoint {
    addresses: Vec<String>,
    conditions: RawConditions,
    hostname: Option<Arc<str>>,
    node_name: Option<Arc<str>>,
    zone: Option<Arc<str>>,
    hints: Option<RawHints>,
    target_ref: Option<RawTarget>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawHints {
    for_zones: Option<Vec<RawZone>>,
}

#[derive(Deserialize)]
struct RawZone {
    name: Arc<str>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct RawSlicePort {
    name: Arc<str>,
    port: Option<PortRef>,
    protocol: String,
}

/// Most endpoints of one slice (Kubernetes: 1,000).
const MAX_ENDPOINTS: usize = 100_000;

fn slice_ports(raw: Vec<RawSlicePort>, at: &mut At<'_>) -> Vec<SlicePort> {
    let mut ports = Vec::new();
    for (i, p) in raw.into_iter().enumerate() {
        match p.port {
            _ if !matches!(p.protocol.as_str(), "" | "TCP") => {}
            Some(PortRef::Number(port)) => ports.push(SlicePort { name: p.name, port }),
            Some(PortRef::Name(name)) => {
                at.item(i).field("port").error(format!("{name:?} is no port number"), "Write 1 to 65535")
            }
            // "All ports" in the API; nobody can join it with a Service port.
            None => {}
        }
    }
    ports
}

fn target(raw: Option<RawTarget>, namespace: &Arc<str>) -> Option<(Kind, Arc<str>, Arc<str>)> {
    let raw = raw?;
    let kind = match raw.kind.as_str() {
        "Pod" => Kind::Pod,
        "ExternalWorkload" => Kind::ExternalWorkload,
        _ => return None,
    };
    Some((kind, raw.namespace.unwrap_or_else(|| namespace.clone()), raw.name))
}

pub(super) fn slice(value: &Value, head: Head, at: &mut At<'_>) -> Option<Slice> {
    let address_type = value.get("addressType").and_then(Value::as_str).unwrap_or_default().to_string();
    let service = head.label("kubernetes.io/service-name").map(Arc::from);
    if service.is_none() {
        at.field("metadata").field("labels").warn(
            "the label kubernetes.io/service-name is missing, so the slice belongs to no Service",
            "Set it to the name of the Service",
        );
    }
    weight_annotation(&head, &mut at.field("metadata"));
    let mut slice = Slice { service, ports: Vec::new(), addresses: Vec::new(), head };
    let is_of_type = match address_type.as_str() {
        "IPv4" => IpAddr::is_ipv4,
        "IPv6" => IpAddr::is_ipv6,
        "FQDN" => {
            at.field("addressType").warn("slices of names are left alone", "Use addresses");
            return Some(slice);
        }
        other => {
            at.field("addressType").error(format!("{other:?} is no address type"), "Write IPv4 or IPv6");
            |_: &IpAddr| true
        }
    };
    let raw_ports: Vec<RawSlicePort> = list(value, "ports", at)?;
    slice.ports = slice_ports(raw_ports, &mut at.field("ports"));
    let raw: Vec<RawEndpoint> = list(value, "endpoints", at)?;
    let mut at = at.field("endpoints");
    if raw.len() > MAX_ENDPOINTS {
        at.error(format!("{} endpoints are more than {MAX_ENDPOINTS}", raw.len()), "Split the slice");
        return None;
    }
    for (i, e) in raw.into_iter().enumerate() {
        let mut at = at.item(i);
        let Some(text) = e.addresses.first() else {
            at.field("addresses").error("missing", "Give one address");
            continue;
        };
        let ip = match text.parse::<IpAddr>() {
            Ok(ip) if is_of_type(&ip) => ip,
            _ => {
                at.field("addresses[0]")
                    .error(format!("{text:?} is no {address_type} address"), "Slices have addresses of one family");
                continue;
            }
        };
        slice.addresses.push(Address {
            ip,
            ready: e.conditions.ready.unwrap_or(true),
            hostname: e.hostname,
            node: e.node_name,
            zone: e.zone,
            hints: e.hints.and_then(|h| h.for_zones).map(|z| z.into_iter().map(|z| z.name).collect()),
            target: target(e.target_ref, &slice.head.namespace),
        });
    }
    Some(slice)
}

/// A list at the top of an object; absent = empty.
fn list<T: serde::de::DeserializeOwned>(value: &Value, field: &str, at: &mut At<'_>) -> Option<Vec<T>> {
    match value.get(field) {
        None | Some(Value::Null) => Some(Vec::new()),
        Some(_) => typed(value, field, at),
    }
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct RawSubset {
    addresses: Vec<RawAddress>,
    not_ready_addresses: Vec<RawAddress>,
    ports: Vec<RawSlicePort>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct RawAddress {
    ip: String,
    hostname: Option<Arc<str>>,
    node_name: Option<Arc<str>>,
    target_ref: Option<RawTarget>,
}

pub(super) fn endpoints(value: &Value, head: Head, at: &mut At<'_>) -> Option<Endpoints> {
    let raw: Vec<RawSubset> = list(value, "subsets", at)?;
    let mut at = at.field("subsets");
    let mut subsets = Vec::new();
    for (i, s) in raw.into_iter().enumerate() {
        let mut at = at.item(i);
        let ports = slice_ports(s.ports, &mut at.field("ports"));
        let mut addresses = Vec::new();
        for (field, ready, list) in
            [("addresses", true, s.addresses), ("notReadyAddresses", false, s.not_ready_addresses)]
        {
            let mut at = at.field(field);
            for (j, a) in list.into_iter().enumerate() {
                let Ok(ip) = a.ip.parse() else {
                    at.item(j)
                        .field("ip")
                        .error(format!("{:?} is no IP address", a.ip), "Write one like 10.1.0.7 or fd00::7");
                    continue;
                };
                addresses.push(Address {
                    ip,
                    ready,
                    hostname: a.hostname,
                    node: a.node_name,
                    zone: None,
                    hints: None,
                    target: target(a.target_ref, &head.namespace),
                });
            }
        }
        subsets.push((ports, addresses));
    }
    Some(Endpoints { head, subsets })
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct RawPodSpec {
    service_account_name: Option<Arc<str>>,
    service_account: Option<Arc<str>>,
    node_name: Option<Arc<str>>,
    host_network: bool,
    hostname: Option<Arc<str>>,
    subdomain: Option<Arc<str>>,
    containers: Vec<RawContainer>,
    init_containers: Vec<RawContainer>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct RawContainer {
    ports: Vec<RawContainerPort>,
    liveness_probe: Option<RawProbe>,
    readiness_probe: Option<RawProbe>,
    startup_probe: Option<RawProbe>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawContainerPort {
    name: Option<Arc<str>>,
    container_port: std::num::NonZeroU16,
    #[serde(default)]
    protocol: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawProbe {
    http_get: Option<RawHttpGet>,
}

#[derive(Deserialize)]
struct RawHttpGet {
    path: Option<String>,
    port: PortRef,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct RawPodStatus {
    phase: String,
    #[serde(rename = "podIP")]
    pod_ip: Option<String>,
    #[serde(rename = "podIPs")]
    pod_ips: Vec<RawIp>,
    conditions: Vec<RawCondition>,
}

#[derive(Deserialize)]
struct RawIp {
    ip: String,
}

#[derive(Deserialize)]
pub(super) struct RawCondition {
    #[serde(rename = "type")]
    pub(super) kind: String,
    pub(super) status: String,
}

/// False only if a condition of that type says other than True; a manifest without status is ready.
pub(super) fn is_ready(conditions: &[RawCondition]) -> bool {
    conditions.iter().find(|c| c.kind == "Ready").is_none_or(|c| c.status == "True")
}

pub(super) fn pod(value: &Value, head: Head, at: &mut At<'_>) -> Option<Pod> {
    let spec: RawPodSpec = typed(value, "spec", at)?;
    let status: RawPodStatus = typed(value, "status", at)?;
    let mut ips = Vec::new();
    let mut at_status = at.field("status");
    for text in status.pod_ip.iter().chain(status.pod_ips.iter().map(|ip| &ip.ip)) {
        match text.parse::<IpAddr>() {
            Ok(ip) if ips.contains(&ip) => {}
            Ok(ip) => ips.push(ip),
            Err(_) => at_status
                .field("podIPs")
                .error(format!("{text:?} is no IP address"), "Write one like 10.1.0.7 or fd00::7"),
        }
    }
    let finished = matches!(status.phase.as_str(), "Succeeded" | "Failed")
        || value["metadata"].get("deletionTimestamp").is_some_and(|t| !t.is_null());
    let ready = is_ready(&status.conditions);
    weight_annotation(&head, &mut at.field("metadata"));
    pod_annotations(&head, &mut at.field("metadata"));
    Some(Pod { ips, ready, finished, ..template(head, spec) })
}

/// Tells a bad weight of an endpoint.
pub(super) fn weight_annotation(head: &Head, at: &mut At<'_>) {
    if let Some(Err(why)) = head.annotation(WEIGHT).map(weight) {
        at.field("annotations").key(WEIGHT).warn(why, "The weight is ignored");
    }
}

/// Tells bad values of the annotations that this reader uses on Pods and Namespaces (resources.md 5.3).
pub(super) fn pod_annotations(head: &Head, at: &mut At<'_>) {
    let mut at = at.field("annotations");
    for key in ["opaque-ports", "proxy-require-identity-inbound-ports", "skip-inbound-ports"] {
        let key = format!("config.linkerd.io/{key}");
        if let Some(Err(why)) = head.annotation(&key).map(Ports::parse) {
            at.key(&key).warn(why, "The setting is ignored");
        }
    }
    let key = super::super::annotations::TRANSPORT_MODE;
    if let Some(text) = head.annotation(key)
        && !matches!(text, "transparent" | "transport-header")
    {
        at.key(key).warn(
            format!("{text:?} is no transport mode"),
            "Write transparent or transport-header; transparent applies",
        );
    }
    let key = "config.linkerd.io/default-inbound-policy";
    if let Some(text) = head.annotation(key)
        && super::policy::default_policy(text).is_none()
    {
        at.key(key).warn(
            format!("{text:?} is no policy"),
            "Write all-unauthenticated, all-authenticated, cluster-unauthenticated, cluster-authenticated, deny or audit; deny applies",
        );
    }
}

fn template(head: Head, spec: RawPodSpec) -> Pod {
    let container = |c: RawContainer| Container {
        ports: c
            .ports
            .into_iter()
            .filter(|p| matches!(p.protocol.as_str(), "" | "TCP"))
            .map(|p| (p.container_port.get(), p.name))
            .collect(),
        probes: [c.liveness_probe, c.readiness_probe, c.startup_probe]
            .into_iter()
            .flatten()
            .filter_map(|p| p.http_get)
            .map(|get| {
                // Kubernetes takes the path with its query; a route matches the path alone.
                let path = get.path.unwrap_or_default();
                let path = path.split('?').next().unwrap_or_default();
                let path = if path.starts_with('/') { path.to_string() } else { format!("/{path}") };
                (get.port, path.into())
            })
            .collect(),
    };
    Pod {
        head,
        service_account: spec.service_account_name.or(spec.service_account).unwrap_or_else(|| "default".into()),
        node: spec.node_name,
        host_network: spec.host_network,
        containers: spec.containers.into_iter().chain(spec.init_containers).map(container).collect(),
        ips: Vec::new(),
        ready: true,
        finished: false,
        hostname: spec.hostname,
        subdomain: spec.subdomain,
    }
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct RawTemplateHead {
    labels: BTreeMap<Arc<str>, Arc<str>>,
    annotations: BTreeMap<Arc<str>, Arc<str>>,
}

pub(super) fn workload(value: &Value, kind: Kind, head: Head, at: &mut At<'_>) -> Option<Workload> {
    let mut at = at.field("spec");
    let spec = &value["spec"];
    let (part, mut at) = match kind {
        Kind::CronJob => (&spec["jobTemplate"]["spec"]["template"], at.field("jobTemplate.spec.template")),
        _ => (&spec["template"], at.field("template")),
    };
    let raw_head: RawTemplateHead = typed(part, "metadata", &mut at)?;
    let raw: RawPodSpec = typed(part, "spec", &mut at)?;
    let mut labels = raw_head.labels;
    // ReplicaSets carry the hash that their Pods have.
    if let Some(hash) = head.labels.get("pod-template-hash") {
        labels.entry("pod-template-hash".into()).or_insert_with(|| hash.clone());
    }
    let template_head = Head {
        namespace: head.namespace.clone(),
        name: head.name.clone(),
        labels,
        annotations: raw_head.annotations,
        created: None,
        owner: Some(Owner { kind: kind.name().to_string(), name: head.name.to_string() }),
    };
    pod_annotations(&template_head, &mut at.field("metadata"));
    Some(Workload { head, kind, template: template(template_head, raw) })
}

#[cfg(test)]
mod tests {
    use super::{super::tests::check, super::*, *};

    #[test]
    fn services() {
        let o = check(
            "
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec:
  clusterIP: 10.96.0.5
  selector: {app: web}
  ports:
  - {name: http, port: 80, targetPort: web, appProtocol: HTTP}
  - {name: dns, port: 53, protocol: UDP}
",
            &[],
        );
        let Some(Object::Service(s)) = o.as_deref() else { panic!("{o:?}") };
        assert_eq!(s.ports.len(), 1);
        assert_eq!(s.ports[0].app_protocol.as_deref(), Some("http"));
        assert_eq!(s.ports[0].target, PortRef::Name("web".into()));
        let spec = |spec: &str, issues: &[&str]| {
            check(&format!("{{apiVersion: v1, kind: Service, metadata: {{name: a}}, spec: {spec}}}"), issues);
        };
        spec("{clusterIP: None}", &[]);
        spec("{type: ExternalName, externalName: example.com}", &["spec.type"]);
        spec("{type: Magic}", &["spec.type"]);
        spec("{clusterIP: here}", &["spec.clusterIP"]);
        spec("{ports: [{port: 0}]}", &["spec.ports[0].port"]);
        spec("{ports: [{port: 80}, {port: 81}]}", &["spec.ports[0].name", "spec.ports[1].name"]);
        spec("{ports: [{name: a, port: 80}, {name: b, port: 80}]}", &["spec.ports[1].port"]);
        spec("{ports: [{port: 80, targetPort: 'No Port'}]}", &["spec.ports[0].targetPort"]);
        spec("{ports: {port: 80}}", &["spec.ports"]);
        spec("{ipFamilies: [IPX]}", &["spec.ipFamilies"]);
    }

    #[test]
    fn slices() {
        let o = check(
            "
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: web-1, namespace: shop, labels: {kubernetes.io/service-name: web}}
addressType: IPv4
ports: [{name: http, port: 8080}]
endpoints:
- {addresses: [10.1.0.1], conditions: {ready: false}, zone: a}
- {addresses: [10.1.0.2], hints: {forZones: [{name: a}]}, targetRef: {kind: Pod, name: web-0}}
",
            &[],
        );
        let Some(Object::Slice(s)) = o.as_deref() else { panic!("{o:?}") };
        assert_eq!(s.addresses.iter().map(|a| a.ready).collect::<Vec<_>>(), [false, true]);
        assert_eq!(s.addresses[1].target, Some((Kind::Pod, "shop".into(), "web-0".into())));
        let slice = |rest: &str, issues: &[&str]| {
            let head = "apiVersion: discovery.k8s.io/v1, kind: EndpointSlice, metadata: {name: a, labels: {kubernetes.io/service-name: b}}";
            check(&format!("{{{head}, {rest}}}"), issues);
        };
        slice("addressType: IPv4", &[]);
        slice("addressType: IPX", &["addressType"]);
        slice("addressType: FQDN", &["addressType"]);
        slice("addressType: IPv6, endpoints: [{addresses: [10.0.0.1]}]", &["endpoints[0].addresses[0]"]);
        slice("addressType: IPv4, endpoints: [{addresses: []}]", &["endpoints[0].addresses"]);
        slice("addressType: IPv4, endpoints: [{addresses: x}]", &["endpoints[0].addresses"]);
    }

    #[test]
    fn pods_and_templates() {
        let o = check(
            "
apiVersion: v1
kind: Pod
metadata: {name: web-0, namespace: shop, annotations: {config.linkerd.io/opaque-ports: 'x y', balancer.linkerd.io/weight: heavy}}
spec:
  serviceAccountName: web
  containers:
  - ports: [{name: http, containerPort: 8080}, {containerPort: 53, protocol: UDP}]
    livenessProbe: {httpGet: {path: '/ok?x=1', port: http}}
status: {podIP: 10.1.0.1, podIPs: [{ip: 10.1.0.1}, {ip: 'fd00::1'}], conditions: [{type: Ready, status: 'False'}]}
",
            &["metadata.annotations[\"balancer.linkerd.io/weight\"]", "metadata.annotations[\"config.linkerd.io/opaque-ports\"]"],
        );
        let Some(Object::Pod(p)) = o.as_deref() else { panic!("{o:?}") };
        assert_eq!((p.ips.len(), p.ready, &*p.service_account), (2, false, "web"));
        assert_eq!(p.port(&PortRef::Name("http".into())), Some(8080));
        assert_eq!(p.containers[0].probes, [(PortRef::Name("http".into()), "/ok".into())]);
        let o = check(
            "{apiVersion: batch/v1, kind: CronJob, metadata: {name: c}, spec: {jobTemplate: {spec: {template: {metadata: {labels: {a: b}}, spec: {serviceAccountName: s}}}}}}",
            &[],
        );
        let Some(Object::Workload(w)) = o.as_deref() else { panic!("{o:?}") };
        assert_eq!((&*w.template.service_account, w.template.head.label("a")), ("s", Some("b")));
        check(
            "{apiVersion: apps/v1, kind: Deployment, metadata: {name: c}, spec: {template: {spec: {containers: [{ports: [{containerPort: big}]}]}}}}",
            &["spec.template.spec.containers[0].ports[0].containerPort"],
        );
    }
}
