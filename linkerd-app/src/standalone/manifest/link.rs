//! Links to other clusters (resources.md 6.1).

use super::{
    super::{annotations::Pairs, duration, report::At},
    Head,
    policy::{RawSelector, Selector, selector},
    typed,
};
use linkerd_tls::{Id, web::is_host_name};
use serde::Deserialize;
use serde_json::Value;
use std::{net::IpAddr, sync::Arc, time::Duration};

/// On a Link: how the replicas of federated Services are reached that the other cluster contributes. `direct` (default)
/// speaks to its Pods, `gateway` to its gateway. This key is ours.
const FEDERATED_PATH: &str = "multicluster.linkerd.io/federated-path";
/// Port of a gateway whose Link does not say.
const GATEWAY_PORT: u16 = 4143;
/// Most addresses of one gateway.
const MAX_ADDRESSES: usize = 64;

/// What is taken from another cluster, and how it is reached.
#[derive(Clone, Debug)]
pub(in super::super) struct Link {
    pub(in super::super) head: Head,
    /// Empty for the own cluster, of which the members of federated Services are then chosen.
    pub(in super::super) cluster: Arc<str>,
    pub(in super::super) cluster_domain: Option<Arc<str>>,
    pub(in super::super) control_plane_namespace: Option<Arc<str>>,
    pub(in super::super) gateway: Option<Gateway>,
    /// Services that are mirrored behind the gateway.
    pub(in super::super) exported: Option<Selector>,
    /// Services that are mirrored with their own replicas.
    pub(in super::super) discovered: Option<Selector>,
    /// Services that join the federated ones of their name.
    pub(in super::super) federated: Option<Selector>,
    pub(in super::super) federated_by_gateway: bool,
    excluded_labels: Vec<Arc<str>>,
    excluded_annotations: Vec<Arc<str>>,
}

/// The way into a cluster whose Pods can't be reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in super::super) struct Gateway {
    pub(in super::super) addresses: Vec<IpAddr>,
    /// Names that stand for more addresses.
    pub(in super::super) names: Vec<Arc<str>>,
    pub(in super::super) port: u16,
    pub(in super::super) identity: Id,
    pub(in super::super) probe: Option<Probe>,
}

/// How it is known whether a gateway lives.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in super::super) struct Probe {
    pub(in super::super) path: Arc<str>,
    pub(in super::super) port: u16,
    pub(in super::super) period: Duration,
    pub(in super::super) timeout: Duration,
    /// Failures in a row that make it dead.
    pub(in super::super) failures: u32,
}

impl Link {
    /// The labels and annotations that a mirror takes over (resources.md 6.2).
    pub(in super::super) fn copied(&self, head: &Head) -> (Pairs, Pairs) {
        let keep = |pairs: &Pairs, excluded: &[Arc<str>], never: &str| -> Pairs {
            let kept = pairs.iter().filter(|(k, _)| !k.starts_with(never) && !excluded.iter().any(|e| covers(e, k)));
            kept.map(|(k, v)| (k.clone(), v.clone())).collect()
        };
        (
            keep(&head.labels, &self.excluded_labels, "mirror.linkerd.io/"),
            keep(&head.annotations, &self.excluded_annotations, "service.kubernetes.io/topology-"),
        )
    }
}

/// A key, or all keys of a prefix (`prefix/*`).
fn covers(pattern: &str, key: &str) -> bool {
    match pattern.strip_suffix("/*") {
        Some(prefix) => key.split_once('/').is_some_and(|(p, _)| p == prefix),
        None => pattern == key,
    }
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct RawLink {
    target_cluster_name: Arc<str>,
    target_cluster_domain: Arc<str>,
    target_cluster_linkerd_namespace: Arc<str>,
    gateway_address: String,
    gateway_port: Text,
    gateway_identity: String,
    probe_spec: Option<RawProbe>,
    selector: RawSelector,
    remote_discovery_selector: RawSelector,
    federated_service_selector: RawSelector,
    excluded_labels: Vec<Arc<str>>,
    excluded_annotations: Vec<Arc<str>>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct RawProbe {
    path: Text,
    port: Text,
    period: Text,
    timeout: Text,
    failure_threshold: Text,
}

/// A string, or a number that stands for one: Links have been written both ways.
#[derive(Default, Deserialize)]
#[serde(from = "Value")]
struct Text(String);

impl From<Value> for Text {
    fn from(value: Value) -> Self {
        Self(match value {
            Value::String(text) => text,
            Value::Null => String::new(),
            other => other.to_string(),
        })
    }
}

impl Text {
    /// The value, or the default where there is none.
    fn or<T>(&self, default: T, at: &mut At<'_>, parse: impl FnOnce(&str) -> Result<T, String>) -> T {
        if self.0.is_empty() {
            return default;
        }
        at.take(parse(&self.0)).unwrap_or(default)
    }
}

fn port(text: &str) -> Result<u16, String> {
    text.parse().ok().filter(|p| *p > 0).ok_or_else(|| format!("{text:?} is no port; write 1 to 65535"))
}

pub(super) fn link(value: &Value, head: Head, at: &mut At<'_>) -> Option<Link> {
    let raw: RawLink = typed(value, "spec", at)?;
    let federated_by_gateway = match head.annotation(FEDERATED_PATH) {
        None | Some("direct") => false,
        Some("gateway") => true,
        Some(other) => {
            let mut at = at.field("metadata");
            at.field("annotations")
                .key(FEDERATED_PATH)
                .error(format!("{other:?} is no path"), "Write direct or gateway");
            false
        }
    };
    let mut at = at.field("spec");
    let gateway = gateway(&raw, &mut at);
    if federated_by_gateway && gateway.is_none() {
        at.field("gatewayAddress")
            .error("missing", "Members of federated Services are to be reached through the gateway");
    }
    // An absent or empty selector selects nothing.
    let mut chosen = |field: &str, raw: RawSelector| {
        let selector = selector(raw, &mut at.field(field));
        (selector != Selector::default()).then_some(selector)
    };
    let exported = chosen("selector", raw.selector);
    let discovered = chosen("remoteDiscoverySelector", raw.remote_discovery_selector);
    let federated = chosen("federatedServiceSelector", raw.federated_service_selector);
    let given = |text: Arc<str>| Some(text).filter(|t| !t.is_empty());
    Some(Link {
        head,
        cluster: raw.target_cluster_name,
        cluster_domain: given(raw.target_cluster_domain),
        control_plane_namespace: given(raw.target_cluster_linkerd_namespace),
        gateway,
        exported,
        discovered,
        federated,
        federated_by_gateway,
        excluded_labels: raw.excluded_labels,
        excluded_annotations: raw.excluded_annotations,
    })
}

/// None without an address: the clusters share a flat network.
fn gateway(raw: &RawLink, at: &mut At<'_>) -> Option<Gateway> {
    let (mut addresses, mut names) = (Vec::new(), Vec::new());
    for host in raw.gateway_address.split(',').map(str::trim).filter(|h| !h.is_empty()).take(MAX_ADDRESSES) {
        match host.parse::<IpAddr>() {
            Ok(ip) => addresses.push(ip),
            Err(_) if is_host_name(host) => names.push(Arc::from(host)),
            Err(_) => at.field("gatewayAddress").error(
                format!("{host:?} is neither an address nor a name"),
                "Write addresses and DNS names, with commas between them",
            ),
        }
    }
    if addresses.is_empty() && names.is_empty() {
        return None;
    }
    let gateway_port = raw.gateway_port.or(GATEWAY_PORT, &mut at.field("gatewayPort"), port);
    let probe = raw.probe_spec.as_ref().map(|raw| probe(raw, &mut at.field("probeSpec")));
    match raw.gateway_identity.parse::<Id>() {
        Ok(identity) if identity.to_server_name().is_some() => {
            Some(Gateway { addresses, names, port: gateway_port, identity, probe })
        }
        _ => {
            let why = format!("{:?} is no identity of a gateway", raw.gateway_identity);
            at.field("gatewayIdentity").error(why, "Write the name in the certificate of the gateway's proxy");
            None
        }
    }
}

fn probe(raw: &RawProbe, at: &mut At<'_>) -> Probe {
    let time = |text: &str| {
        duration::go(text).and_then(|d| if d.is_zero() { Err("0 is no time; write 1s or more".into()) } else { Ok(d) })
    };
    let path = raw.path.or("/ready".to_string(), &mut at.field("path"), |text| {
        let fits = text.starts_with('/') && text.bytes().all(|b| b.is_ascii_graphic());
        if fits { Ok(text.to_string()) } else { Err(format!("{text:?} is no path; write one like /ready")) }
    });
    Probe {
        path: path.into(),
        port: raw.port.or(4191, &mut at.field("port"), port),
        period: raw.period.or(Duration::from_secs(3), &mut at.field("period"), time),
        timeout: raw.timeout.or(Duration::from_secs(30), &mut at.field("timeout"), time),
        failures: raw.failure_threshold.or(3, &mut at.field("failureThreshold"), |text| {
            text.parse()
                .ok()
                .filter(|n| *n > 0)
                .ok_or_else(|| format!("{text:?} is no number above 0; write 1 or more"))
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::{Object, tests::check},
        *,
    };

    #[track_caller]
    fn spec(annotations: &str, spec: &str, issues: &[&str]) -> Option<Link> {
        let text = format!(
            "{{apiVersion: multicluster.linkerd.io/v1alpha3, kind: Link, metadata: {{name: east, namespace: linkerd-multicluster, annotations: {{{annotations}}}}}, spec: {spec}}}"
        );
        match check(&text, issues)?.as_ref() {
            Object::Link(link) => Some(link.clone()),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn links() {
        let link = spec(
            "",
            "{targetClusterName: east, targetClusterDomain: east.local, gatewayAddress: '10.0.0.1, gw.east.example', gatewayPort: '4143', gatewayIdentity: gw.ns.serviceaccount.identity.linkerd.east.local, probeSpec: {port: '4191', period: 2s}, selector: {matchLabels: {a: b}}, federatedServiceSelector: {}, excludedAnnotations: [own.example/*]}",
            &[],
        )
        .unwrap();
        let gateway = link.gateway.as_ref().unwrap();
        assert_eq!((gateway.addresses.len(), &*gateway.names[0], gateway.port), (1, "gw.east.example", 4143));
        let probe = gateway.probe.as_ref().unwrap();
        assert_eq!((&*probe.path, probe.period, probe.failures), ("/ready", Duration::from_secs(2), 3));
        assert!(link.exported.is_some() && link.discovered.is_none() && link.federated.is_none());
        let pairs = |list: &[(&str, &str)]| list.iter().map(|(k, v)| (Arc::from(*k), Arc::from(*v))).collect::<Pairs>();
        let head = Head {
            labels: pairs(&[("a", "b"), ("mirror.linkerd.io/exported", "true")]),
            annotations: pairs(&[("own.example/x", "1"), ("own.example.org/x", "2")]),
            ..Head::default()
        };
        assert_eq!(link.copied(&head), (pairs(&[("a", "b")]), pairs(&[("own.example.org/x", "2")])));
        assert!(spec("", "{targetClusterName: flat}", &[]).unwrap().gateway.is_none());
    }

    #[test]
    fn mistakes() {
        const ID: &str = "gatewayIdentity: gw.ns.serviceaccount.identity.linkerd.east.local";
        spec("", "{gatewayAddress: 10.0.0.1}", &["spec.gatewayIdentity"]);
        spec("", &format!("{{gatewayAddress: 'a b', {ID}}}"), &["spec.gatewayAddress"]);
        spec("", &format!("{{gatewayAddress: 10.0.0.1, gatewayPort: x, {ID}}}"), &["spec.gatewayPort"]);
        let bad = "{path: ready, port: '0', period: 3, timeout: 0s, failureThreshold: '0'}";
        let fields = ["path", "port", "period", "timeout", "failureThreshold"].map(|f| format!("spec.probeSpec.{f}"));
        spec(
            "",
            &format!("{{gatewayAddress: 10.0.0.1, probeSpec: {bad}, {ID}}}"),
            &fields.each_ref().map(|f| f.as_str()),
        );
        let key = "metadata.annotations[\"multicluster.linkerd.io/federated-path\"]";
        spec("multicluster.linkerd.io/federated-path: tunnel", "{}", &[key]);
        spec("multicluster.linkerd.io/federated-path: gateway", "{}", &["spec.gatewayAddress"]);
    }
}
