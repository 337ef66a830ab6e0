//! Kubernetes objects as the embedded control plane needs them. Reading an object checks every field that is used, tells
//! what is wrong by field path, and yields a value with nothing left to parse: regular expressions are compiled,
//! durations are durations. What one object alone cannot know (whether a Service it names exists) is not checked here.

mod core;
mod link;
mod policy;
mod route;
mod typed;

pub(super) use self::{
    core::{Address, Endpoints, Owner, Pod, PortRef, Service, ServiceKind, ServicePort, Slice, SlicePort, Workload},
    link::{Gateway, Link, Probe},
    policy::{
        AuthorizationPolicy, AuthorizationTarget, BackendTls, BackendTraffic, Egress, ExternalWorkload, Identities,
        MeshTls, NetworkAuth, Principal, Profile, ProxyProtocol, RateLimit, RateLimitTarget, Requirement, Selector,
        Server, ServerAuthorization, ServerRef, Subjects, default_policy,
    },
    route::{BackendKind, BackendRef, FilterSpec, ParentKind, ParentRef, Route, RouteKind, Rule, SessionSpec},
};

use self::typed::typed;
use super::{
    annotations::Pairs,
    report::{At, Issue},
};
use serde::Deserialize;
use serde_json::Value;
use std::{fmt, sync::Arc};

/// Most objects that one `List` may hold.
const MAX_LIST: usize = 100_000;

/// Kinds that mean something here.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Kind {
    Namespace,
    Node,
    Service,
    Endpoints,
    Pod,
    ServiceAccount,
    ConfigMap,
    Secret,
    Deployment,
    StatefulSet,
    DaemonSet,
    ReplicaSet,
    Job,
    CronJob,
    EndpointSlice,
    HttpRoute,
    GrpcRoute,
    TlsRoute,
    TcpRoute,
    ReferenceGrant,
    BackendTlsPolicy,
    BackendTrafficPolicy,
    Server,
    ServerAuthorization,
    AuthorizationPolicy,
    MeshTlsAuthentication,
    NetworkAuthentication,
    HttpLocalRateLimitPolicy,
    EgressNetwork,
    LinkerdHttpRoute,
    ExternalWorkload,
    ServiceProfile,
    Link,
}

/// Kinds with their API group, name, versions, and whether they live in a namespace (resources.md 1).
const KINDS: &[(Kind, &str, &str, &[&str], bool)] = &[
    (Kind::Namespace, "", "Namespace", &["v1"], false),
    (Kind::Node, "", "Node", &["v1"], false),
    (Kind::Service, "", "Service", &["v1"], true),
    (Kind::Endpoints, "", "Endpoints", &["v1"], true),
    (Kind::Pod, "", "Pod", &["v1"], true),
    (Kind::ServiceAccount, "", "ServiceAccount", &["v1"], true),
    (Kind::ConfigMap, "", "ConfigMap", &["v1"], true),
    (Kind::Secret, "", "Secret", &["v1"], true),
    (Kind::Deployment, "apps", "Deployment", &["v1"], true),
    (Kind::StatefulSet, "apps", "StatefulSet", &["v1"], true),
    (Kind::DaemonSet, "apps", "DaemonSet", &["v1"], true),
    (Kind::ReplicaSet, "apps", "ReplicaSet", &["v1"], true),
    (Kind::Job, "batch", "Job", &["v1"], true),
    (Kind::CronJob, "batch", "CronJob", &["v1"], true),
    (Kind::EndpointSlice, "discovery.k8s.io", "EndpointSlice", &["v1"], true),
    (Kind::HttpRoute, GATEWAY, "HTTPRoute", &["v1", "v1beta1"], true),
    (Kind::GrpcRoute, GATEWAY, "GRPCRoute", &["v1", "v1alpha2"], true),
    (Kind::TlsRoute, GATEWAY, "TLSRoute", &["v1", "v1alpha3", "v1alpha2"], true),
    (Kind::TcpRoute, GATEWAY, "TCPRoute", &["v1", "v1alpha2"], true),
    (Kind::ReferenceGrant, GATEWAY, "ReferenceGrant", &["v1", "v1beta1"], true),
    (Kind::BackendTlsPolicy, GATEWAY, "BackendTLSPolicy", &["v1", "v1alpha3", "v1alpha2"], true),
    (Kind::BackendTrafficPolicy, "gateway.networking.x-k8s.io", "XBackendTrafficPolicy", &["v1alpha1"], true),
    // What became XBackendTrafficPolicy was called so in Gateway API 1.1 and 1.2.
    (Kind::BackendTrafficPolicy, GATEWAY, "BackendLBPolicy", &["v1alpha2"], true),
    (Kind::Server, POLICY, "Server", &["v1beta3", "v1beta2", "v1beta1", "v1alpha1"], true),
    (Kind::ServerAuthorization, POLICY, "ServerAuthorization", &["v1beta1", "v1alpha1"], true),
    (Kind::AuthorizationPolicy, POLICY, "AuthorizationPolicy", &["v1alpha1"], true),
    (Kind::MeshTlsAuthentication, POLICY, "MeshTLSAuthentication", &["v1alpha1"], true),
    (Kind::NetworkAuthentication, POLICY, "NetworkAuthentication", &["v1alpha1"], true),
    (Kind::HttpLocalRateLimitPolicy, POLICY, "HTTPLocalRateLimitPolicy", &["v1alpha1"], true),
    (Kind::EgressNetwork, POLICY, "EgressNetwork", &["v1alpha1"], true),
    (Kind::LinkerdHttpRoute, POLICY, "HTTPRoute", &["v1beta3", "v1beta2", "v1beta1", "v1alpha1"], true),
    (Kind::ExternalWorkload, "workload.linkerd.io", "ExternalWorkload", &["v1beta1", "v1alpha1"], true),
    (Kind::ServiceProfile, "linkerd.io", "ServiceProfile", &["v1alpha2", "v1alpha1"], true),
    (Kind::Link, "multicluster.linkerd.io", "Link", &["v1alpha3", "v1alpha2", "v1alpha1"], true),
];

/// API group of the Gateway API.
pub(super) const GATEWAY: &str = "gateway.networking.k8s.io";
/// API group of Linkerd's policy kinds.
pub(super) const POLICY: &str = "policy.linkerd.io";

impl Kind {
    /// Every kind.
    pub(super) fn all() -> impl Iterator<Item = Self> {
        KINDS.iter().map(|k| k.0)
    }

    /// The kind as manifests write it.
    pub(super) fn name(self) -> &'static str {
        KINDS.iter().find(|k| k.0 == self).map_or("", |k| k.2)
    }

    /// Its API group; empty for the core group.
    pub(super) fn group(self) -> &'static str {
        KINDS.iter().find(|k| k.0 == self).map_or("", |k| k.1)
    }
}

/// What tells objects apart. The cluster is empty for the cluster that this proxy belongs to.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Key {
    pub(super) cluster: Arc<str>,
    pub(super) kind: Kind,
    pub(super) namespace: Arc<str>,
    pub(super) name: Arc<str>,
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ", self.kind.name())?;
        if !self.namespace.is_empty() {
            write!(f, "{}/", self.namespace)?;
        }
        f.write_str(&self.name)?;
        if self.cluster.is_empty() { Ok(()) } else { write!(f, " (cluster {})", self.cluster) }
    }
}

/// What every object has.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Head {
    pub(super) namespace: Arc<str>,
    pub(super) name: Arc<str>,
    pub(super) labels: Pairs,
    pub(super) annotations: Pairs,
    /// RFC 3339 in UTC, which sorts as text; none = no age known, which counts as youngest.
    pub(super) created: Option<Arc<str>>,
    pub(super) owner: Option<Owner>,
}

impl Head {
    /// Older first, then by namespace and name (resources.md 3.4).
    pub(super) fn age(&self) -> (bool, Option<&str>, &str, &str) {
        (self.created.is_none(), self.created.as_deref(), &self.namespace, &self.name)
    }

    pub(super) fn label(&self, key: &str) -> Option<&str> {
        self.labels.get(key).map(|v| &**v)
    }

    pub(super) fn annotation(&self, key: &str) -> Option<&str> {
        self.annotations.get(key).map(|v| &**v)
    }
}

/// A ConfigMap, of which only a bundle of authorities counts.
#[derive(Clone, Debug)]
pub(super) struct ConfigMap {
    pub(super) head: Head,
    /// `data["ca.crt"]`, PEM.
    pub(super) authorities: Option<Arc<str>>,
}

/// An object, ready for use.
#[derive(Clone, Debug)]
pub(super) enum Object {
    /// Kinds of which only the head counts, and kinds that are known but have no effect.
    Plain(Head),
    ConfigMap(ConfigMap),
    Service(Service),
    Slice(Slice),
    Endpoints(Endpoints),
    Pod(Pod),
    Workload(Workload),
    Route(Route),
    Server(Server),
    ServerAuthorization(ServerAuthorization),
    AuthorizationPolicy(AuthorizationPolicy),
    MeshTls(MeshTls),
    NetworkAuth(NetworkAuth),
    RateLimit(RateLimit),
    Egress(Egress),
    ExternalWorkload(ExternalWorkload),
    Profile(Profile),
    BackendTls(BackendTls),
    BackendTraffic(BackendTraffic),
    Link(Link),
}

impl Object {
    pub(super) fn head(&self) -> &Head {
        match self {
            Self::Plain(head) => head,
            Self::ConfigMap(o) => &o.head,
            Self::Service(o) => &o.head,
            Self::Slice(o) => &o.head,
            Self::Endpoints(o) => &o.head,
            Self::Pod(o) => &o.head,
            Self::Workload(o) => &o.head,
            Self::Route(o) => &o.head,
            Self::Server(o) => &o.head,
            Self::ServerAuthorization(o) => &o.head,
            Self::AuthorizationPolicy(o) => &o.head,
            Self::MeshTls(o) => &o.head,
            Self::NetworkAuth(o) => &o.head,
            Self::RateLimit(o) => &o.head,
            Self::Egress(o) => &o.head,
            Self::ExternalWorkload(o) => &o.head,
            Self::Profile(o) => &o.head,
            Self::BackendTls(o) => &o.head,
            Self::BackendTraffic(o) => &o.head,
            Self::Link(o) => &o.head,
        }
    }
}

/// An object as read, or what is wrong with it.
#[derive(Clone, Debug)]
pub(super) struct Read {
    /// None if even its name could not be read.
    pub(super) object: Option<(Key, Arc<Object>)>,
    /// For messages: `Kind namespace/name`, as far as known.
    pub(super) label: String,
    pub(super) issues: Vec<Issue>,
}

/// Reads a document: one object, or a `List` of them.
pub(super) fn read(value: Value, cluster: &Arc<str>) -> Vec<Read> {
    let Value::Object(map) = &value else {
        return vec![refused(
            "",
            "a manifest is a mapping with apiVersion and kind",
            "Write one Kubernetes object a document",
        )];
    };
    let text = |key: &str| map.get(key).and_then(Value::as_str).unwrap_or_default();
    let (version, kind) = (text("apiVersion"), text("kind"));
    if version.is_empty() || kind.is_empty() {
        return vec![refused("", "apiVersion or kind is missing", "Every Kubernetes object names both")];
    }
    if kind == "List" || (kind.ends_with("List") && map.get("items").is_some_and(Value::is_array)) {
        let Value::Object(mut map) = value else { return Vec::new() };
        return match map.remove("items") {
            Some(Value::Array(items)) if items.len() <= MAX_LIST => {
                items.into_iter().flat_map(|item| read(item, cluster)).collect()
            }
            Some(Value::Array(items)) => {
                vec![refused("List", format!("{} items are more than {MAX_LIST}", items.len()), "Split the list")]
            }
            _ => Vec::new(),
        };
    }
    vec![read_one(&value, version, kind, cluster)]
}

fn refused(label: &str, why: impl Into<String>, remedy: &str) -> Read {
    let mut issues = Vec::new();
    At::new(&mut issues, "").error(why, remedy);
    Read { object: None, label: label.to_string(), issues }
}

fn read_one(value: &Value, api_version: &str, kind_name: &str, cluster: &Arc<str>) -> Read {
    let (group, version) = api_version.rsplit_once('/').unwrap_or(("", api_version));
    let mut issues = Vec::new();
    let named = value["metadata"]["name"].as_str().unwrap_or("?");
    let mut label = match value["metadata"]["namespace"].as_str() {
        Some(ns) => format!("{kind_name} {ns}/{named}"),
        None => format!("{kind_name} {named}"),
    };
    let Some((kind, _, _, versions, namespaced)) = KINDS.iter().find(|k| k.1 == group && k.2 == kind_name) else {
        At::new(&mut issues, "").note(format!("{api_version} {kind_name} has no meaning here and is skipped"));
        return Read { object: None, label, issues };
    };
    if !versions.contains(&version) {
        At::new(&mut issues, "apiVersion")
            .note(format!("version {version} of {kind_name} is not known; skipped (known: {})", versions.join(", ")));
        return Read { object: None, label, issues };
    }
    let mut at = At::new(&mut issues, "");
    let Some(head) = head(value, *namespaced, &mut at) else { return Read { object: None, label, issues } };
    let key = Key { cluster: cluster.clone(), kind: *kind, namespace: head.namespace.clone(), name: head.name.clone() };
    label = key.to_string();
    if *kind == Kind::Namespace {
        core::pod_annotations(&head, &mut at.field("metadata"));
    }
    let object = match kind {
        Kind::Namespace | Kind::Node | Kind::ServiceAccount | Kind::Secret | Kind::ReferenceGrant => {
            Some(Object::Plain(head))
        }
        Kind::ConfigMap => {
            let authorities = value["data"]["ca.crt"].as_str().map(Into::into);
            Some(Object::ConfigMap(ConfigMap { head, authorities }))
        }
        Kind::Service => core::service(value, head, &mut at).map(Object::Service),
        Kind::Endpoints => core::endpoints(value, head, &mut at).map(Object::Endpoints),
        Kind::EndpointSlice => core::slice(value, head, &mut at).map(Object::Slice),
        Kind::Pod => core::pod(value, head, &mut at).map(Object::Pod),
        Kind::Deployment | Kind::StatefulSet | Kind::DaemonSet | Kind::ReplicaSet | Kind::Job | Kind::CronJob => {
            core::workload(value, *kind, head, &mut at).map(Object::Workload)
        }
        Kind::HttpRoute | Kind::GrpcRoute | Kind::TlsRoute | Kind::TcpRoute | Kind::LinkerdHttpRoute => {
            route::read(value, *kind, head, &mut at).map(Object::Route)
        }
        Kind::BackendTlsPolicy => policy::backend_tls(value, head, &mut at).map(Object::BackendTls),
        Kind::BackendTrafficPolicy => policy::backend_traffic(value, head, &mut at).map(Object::BackendTraffic),
        Kind::Server => policy::server(value, head, &mut at).map(Object::Server),
        Kind::ServerAuthorization => {
            policy::server_authorization(value, head, &mut at).map(Object::ServerAuthorization)
        }
        Kind::AuthorizationPolicy => {
            policy::authorization_policy(value, head, &mut at).map(Object::AuthorizationPolicy)
        }
        Kind::MeshTlsAuthentication => policy::mesh_tls(value, head, &mut at).map(Object::MeshTls),
        Kind::NetworkAuthentication => policy::network_auth(value, head, &mut at).map(Object::NetworkAuth),
        Kind::HttpLocalRateLimitPolicy => policy::rate_limit(value, head, &mut at).map(Object::RateLimit),
        Kind::EgressNetwork => policy::egress(value, head, &mut at).map(Object::Egress),
        Kind::ExternalWorkload => policy::external_workload(value, head, &mut at).map(Object::ExternalWorkload),
        Kind::ServiceProfile => policy::profile(value, head, &mut at).map(Object::Profile),
        Kind::Link => link::link(value, head, &mut at).map(Object::Link),
    };
    Read { object: object.map(|o| (key, Arc::new(o))), label, issues }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawHead {
    #[serde(default)]
    name: String,
    #[serde(default)]
    namespace: String,
    #[serde(default)]
    labels: Pairs,
    #[serde(default)]
    annotations: Pairs,
    creation_timestamp: Option<String>,
    #[serde(default)]
    owner_references: Vec<Owner>,
}

fn head(value: &Value, namespaced: bool, at: &mut At<'_>) -> Option<Head> {
    let raw: RawHead = typed(value, "metadata", at)?;
    let mut at = at.field("metadata");
    if !is_name(&raw.name) {
        let why = if raw.name.is_empty() { "missing".to_string() } else { format!("{:?} is no object name", raw.name) };
        at.field("name").error(why, "Names are at most 253 of lower-case letters, digits, '-' and '.'");
    }
    let namespace = match (namespaced, raw.namespace.as_str()) {
        (false, _) => "",
        (true, "") => "default",
        (true, ns) => ns,
    };
    if !namespace.is_empty() && (!is_name(namespace) || namespace.contains('.')) {
        at.field("namespace").error(
            format!("{namespace:?} is no namespace name"),
            "Namespaces are at most 63 of lower-case letters, digits and '-'",
        );
    }
    let created = raw.creation_timestamp.filter(|t| {
        let ok = is_timestamp(t);
        if !ok {
            at.field("creationTimestamp").warn(
                format!("{t:?} is no time"),
                "Write it like 2026-01-31T12:00:00Z; without it the object counts as youngest",
            );
        }
        ok
    });
    Some(Head {
        namespace: namespace.into(),
        name: raw.name.as_str().into(),
        labels: raw.labels,
        annotations: raw.annotations,
        created: created.map(Into::into),
        owner: raw.owner_references.into_iter().next(),
    })
}

/// DNS-1123 subdomain, as Kubernetes names objects.
fn is_name(text: &str) -> bool {
    let edge = |b: &u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let bytes = text.as_bytes();
    text.len() <= 253
        && bytes.first().is_some_and(edge)
        && bytes.last().is_some_and(edge)
        && bytes.iter().all(|b| edge(b) || matches!(b, b'-' | b'.'))
}

/// `YYYY-MM-DDTHH:MM:SS[.fraction]Z`, which is how Kubernetes writes times.
fn is_timestamp(text: &str) -> bool {
    let shape = |pattern: &str, text: &str| {
        text.len() == pattern.len()
            && pattern.bytes().zip(text.bytes()).all(|(p, b)| if p == b'0' { b.is_ascii_digit() } else { p == b })
    };
    let Some(text) = text.strip_suffix('Z') else { return false };
    let (time, fraction) = text.split_once('.').unwrap_or((text, "0"));
    shape("0000-00-00T00:00:00", time) && fraction.bytes().all(|b| b.is_ascii_digit())
}

#[cfg(test)]
pub(super) mod tests {
    use super::{super::yaml, *};

    /// Reads one document; the fields that issues (notes apart) were told for.
    #[track_caller]
    pub(in super::super) fn check(text: &str, issues: &[&str]) -> Option<Arc<Object>> {
        let docs = yaml::documents(text);
        assert_eq!(docs.len(), 1, "one document");
        let mut reads = read(yaml::parse(&docs[0]).unwrap(), &"".into());
        assert_eq!(reads.len(), 1, "one object");
        let read = reads.remove(0);
        let seen: Vec<_> = read
            .issues
            .iter()
            .filter(|i| i.severity != super::super::report::Severity::Note)
            .map(|i| i.field.as_str())
            .collect();
        assert_eq!(seen, issues, "{:#?}", read.issues);
        let remedied =
            |issue: &Issue| issue.severity == super::super::report::Severity::Note || !issue.remedy.is_empty();
        assert!(read.issues.iter().all(remedied), "{:#?}", read.issues);
        read.object.map(|o| o.1)
    }

    #[test]
    fn heads() {
        let object = check(
            "{apiVersion: v1, kind: Namespace, metadata: {name: shop, labels: {a: b}, creationTimestamp: '2026-01-31T12:00:00Z'}}",
            &[],
        );
        assert_eq!(object.unwrap().head().age(), (false, Some("2026-01-31T12:00:00Z"), "", "shop"));
        check("{apiVersion: v1, kind: Pod, metadata: {name: A}}", &["metadata.name"]);
        check("{apiVersion: v1, kind: Pod, metadata: {name: a, namespace: b.c}}", &["metadata.namespace"]);
        check("{apiVersion: v1, kind: Pod, metadata: {name: a, labels: {x: 1}}}", &["metadata.labels.x"]);
        check(
            "{apiVersion: v1, kind: Namespace, metadata: {name: a, creationTimestamp: soon}}",
            &["metadata.creationTimestamp"],
        );
    }

    #[test]
    fn unknown_kinds_are_noted_and_lists_flattened() {
        assert!(check("{apiVersion: v1, kind: Gateway, metadata: {name: a}}", &[]).is_none());
        check("{kind: Pod}", &[""]);
        let docs = yaml::documents(
            "{apiVersion: v1, kind: List, items: [{apiVersion: v1, kind: Node, metadata: {name: a}}, {apiVersion: v1, kind: Node, metadata: {name: b}}]}",
        );
        assert_eq!(read(yaml::parse(&docs[0]).unwrap(), &"".into()).len(), 2);
    }
}
