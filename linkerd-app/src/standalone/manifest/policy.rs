//! Linkerd's own kinds but HTTPRoute, and the Gateway API's backend policies (resources.md 3.12, 3.13 and 4.3 to 4.9).

use super::{
    super::{
        annotations::{Pairs, Ports, Tuning},
        duration,
        report::{At, Severity},
    },
    Head, Kind, POLICY, PortRef,
    core::{RawCondition, is_ready, pod_annotations, weight_annotation},
    route::{RawSession, SessionSpec, session},
    typed::typed,
};
use crate::{
    config::DefaultPolicy,
    policy::{
        Network,
        authz::Suffix,
        client::{Budget, ProfileRoute, RequestCondition, ResponseCondition},
    },
};
use ipnet::IpNet;
use linkerd_tls::{
    Id, ServerName,
    web::{SubjectName, is_host_name},
};
use serde::Deserialize;
use serde_json::Value;
use std::{collections::BTreeMap, net::IpAddr, sync::Arc, time::Duration};

/// A label selector; all parts must hold, the empty one takes everything.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(in super::super) struct Selector {
    labels: Pairs,
    expressions: Vec<(Arc<str>, Operator)>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Operator {
    In(Vec<Arc<str>>),
    NotIn(Vec<Arc<str>>),
    Exists,
    DoesNotExist,
}

impl Selector {
    pub(in super::super) fn matches(&self, labels: &Pairs) -> bool {
        self.labels.iter().all(|(k, v)| labels.get(k) == Some(v))
            && self.expressions.iter().all(|(key, op)| {
                let value = labels.get(key);
                match op {
                    Operator::In(list) => value.is_some_and(|v| list.contains(v)),
                    Operator::NotIn(list) => value.is_none_or(|v| !list.contains(v)),
                    Operator::Exists => value.is_some(),
                    Operator::DoesNotExist => value.is_none(),
                }
            })
    }
}

/// A port of some Pods or ExternalWorkloads, and how it is spoken to (resources.md 4.3).
#[derive(Clone, Debug)]
pub(in super::super) struct Server {
    pub(in super::super) head: Head,
    pub(in super::super) subjects: Subjects,
    pub(in super::super) port: PortRef,
    pub(in super::super) protocol: ProxyProtocol,
    pub(in super::super) access: DefaultPolicy,
}

/// Whom a Server is for.
#[derive(Clone, Debug)]
pub(in super::super) enum Subjects {
    Pods(Selector),
    Workloads(Selector),
}

#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(in super::super) enum ProxyProtocol {
    Unknown,
    Http1,
    Http2,
    Grpc,
    Opaque,
    Tls,
}

/// Who may use Servers (resources.md 4.4).
#[derive(Clone, Debug)]
pub(in super::super) struct ServerAuthorization {
    pub(in super::super) head: Head,
    pub(in super::super) server: ServerRef,
    /// None = the client's address does not matter.
    pub(in super::super) networks: Option<Vec<Network>>,
    pub(in super::super) client: Principal,
}

#[derive(Clone, Debug)]
pub(in super::super) enum ServerRef {
    Name(Arc<str>),
    Selector(Selector),
}

/// What a client must prove.
#[derive(Clone, Debug)]
pub(in super::super) enum Principal {
    Anybody,
    AnyTls,
    Identities(Identities),
}

/// A set of identities; those named by accounts need the trust domain to become names.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(in super::super) struct Identities {
    pub(in super::super) exact: Vec<Id>,
    pub(in super::super) suffixes: Vec<Suffix>,
    /// Namespace and name.
    pub(in super::super) accounts: Vec<(Arc<str>, Arc<str>)>,
    pub(in super::super) namespaces: Vec<Arc<str>>,
}

/// Who may use a target; all requirements must hold.
#[derive(Clone, Debug)]
pub(in super::super) struct AuthorizationPolicy {
    pub(in super::super) head: Head,
    pub(in super::super) target: AuthorizationTarget,
    pub(in super::super) requires: Vec<Requirement>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(in super::super) enum AuthorizationTarget {
    Server(Arc<str>),
    Namespace,
    /// The route's kind and name.
    Route(Kind, Arc<str>),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(in super::super) enum Requirement {
    MeshTls { namespace: Arc<str>, name: Arc<str> },
    Network { namespace: Arc<str>, name: Arc<str> },
    Account { namespace: Arc<str>, name: Arc<str> },
}

#[derive(Clone, Debug)]
pub(in super::super) struct MeshTls {
    pub(in super::super) head: Head,
    pub(in super::super) identities: Identities,
}

#[derive(Clone, Debug)]
pub(in super::super) struct NetworkAuth {
    pub(in super::super) head: Head,
    pub(in super::super) networks: Vec<Network>,
}

/// Requests per second (resources.md 4.7).
#[derive(Clone, Debug)]
pub(in super::super) struct RateLimit {
    pub(in super::super) head: Head,
    pub(in super::super) target: RateLimitTarget,
    pub(in super::super) total: Option<u32>,
    pub(in super::super) identity: Option<u32>,
    /// Rate, and the accounts (namespace and name) that share it.
    pub(in super::super) overrides: Vec<(u32, Vec<(Arc<str>, Arc<str>)>)>,
}

/// Servers limit what comes in; Services and EgressNetworks (ours alone) what goes out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in super::super) enum RateLimitTarget {
    Server(Arc<str>),
    Service(Arc<str>),
    Egress(Arc<str>),
}

/// Destinations outside (resources.md 4.6).
#[derive(Clone, Debug)]
pub(in super::super) struct Egress {
    pub(in super::super) head: Head,
    pub(in super::super) allow: bool,
    /// None = everything outside the cluster networks.
    pub(in super::super) networks: Option<Vec<Network>>,
    pub(in super::super) tuning: Tuning,
}

/// A machine of the mesh that is no Pod (resources.md 4.8).
#[derive(Clone, Debug)]
pub(in super::super) struct ExternalWorkload {
    pub(in super::super) head: Head,
    pub(in super::super) identity: Id,
    pub(in super::super) server_name: ServerName,
    pub(in super::super) ports: Vec<(u16, Option<Arc<str>>)>,
    pub(in super::super) ips: Vec<IpAddr>,
    pub(in super::super) ready: bool,
}

impl ExternalWorkload {
    /// The listed port that a reference means.
    pub(in super::super) fn port(&self, port: &PortRef) -> Option<u16> {
        self.ports.iter().find(|(n, name)| port.is(*n, name.as_deref())).map(|p| p.0)
    }

    pub(in super::super) fn port_name(&self, port: u16) -> Option<&str> {
        self.ports.iter().find(|p| p.0 == port)?.1.as_deref()
    }
}

/// A ServiceProfile (resources.md 4.9).
#[derive(Clone, Debug)]
pub(in super::super) struct Profile {
    pub(in super::super) head: Head,
    pub(in super::super) routes: Vec<ProfileRoute>,
    pub(in super::super) budget: Option<Budget>,
    /// Authority and weight in thousandths times ten, as Linkerd sends it.
    pub(in super::super) overrides: Vec<(Arc<str>, u32)>,
    pub(in super::super) opaque_ports: Option<Ports>,
}

/// TLS to backends that are not meshed (resources.md 3.12).
#[derive(Clone, Debug)]
pub(in super::super) struct BackendTls {
    pub(in super::super) head: Head,
    /// Service, and the name of one of its ports.
    pub(in super::super) targets: Vec<(Arc<str>, Option<Arc<str>>)>,
    pub(in super::super) hostname: Arc<str>,
    /// ConfigMaps with authorities; none = the system's.
    pub(in super::super) authorities: Option<Vec<Arc<str>>>,
    pub(in super::super) subject_names: Vec<SubjectName>,
}

/// Retry budget and sessions of Services (resources.md 3.13).
#[derive(Clone, Debug)]
pub(in super::super) struct BackendTraffic {
    pub(in super::super) head: Head,
    pub(in super::super) targets: Vec<Arc<str>>,
    pub(in super::super) budget: Option<Budget>,
    pub(in super::super) session: Option<SessionSpec>,
}

/// A default policy by its name.
pub(in super::super) fn default_policy(text: &str) -> Option<DefaultPolicy> {
    use DefaultPolicy as P;
    [P::Deny, P::AllAuthenticated, P::AllUnauthenticated, P::ClusterAuthenticated, P::ClusterUnauthenticated, P::Audit]
        .into_iter()
        .find(|p| p.as_str() == text)
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct RawSelector {
    match_labels: Pairs,
    match_expressions: Vec<RawExpression>,
}

#[derive(Deserialize)]
struct RawExpression {
    key: Arc<str>,
    operator: String,
    #[serde(default)]
    values: Vec<Arc<str>>,
}

pub(super) fn selector(raw: RawSelector, at: &mut At<'_>) -> Selector {
    let mut expressions = Vec::new();
    for (i, e) in raw.match_expressions.into_iter().enumerate() {
        let mut at = at.field("matchExpressions");
        let mut at = at.item(i);
        let op = match (e.operator.as_str(), e.values.is_empty()) {
            ("In", false) => Operator::In(e.values),
            ("NotIn", false) => Operator::NotIn(e.values),
            ("Exists", true) => Operator::Exists,
            ("DoesNotExist", true) => Operator::DoesNotExist,
            ("In" | "NotIn" | "Exists" | "DoesNotExist", _) => {
                at.field("values")
                    .error("In and NotIn need values, Exists and DoesNotExist take none", "Add or remove values");
                continue;
            }
            (other, _) => {
                at.field("operator")
                    .error(format!("{other:?} is no operator"), "Write In, NotIn, Exists or DoesNotExist");
                continue;
            }
        };
        expressions.push((e.key, op));
    }
    Selector { labels: raw.match_labels, expressions }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawServer {
    pod_selector: Option<RawSelector>,
    external_workload_selector: Option<RawSelector>,
    port: PortRef,
    proxy_protocol: Option<String>,
    access_policy: Option<String>,
}

pub(super) fn server(value: &Value, head: Head, at: &mut At<'_>) -> Option<Server> {
    let raw: RawServer = typed(value, "spec", at)?;
    let mut at = at.field("spec");
    let subjects = match (raw.pod_selector, raw.external_workload_selector) {
        (Some(s), None) => Some(Subjects::Pods(selector(s, &mut at.field("podSelector")))),
        (None, Some(s)) => Some(Subjects::Workloads(selector(s, &mut at.field("externalWorkloadSelector")))),
        _ => {
            at.error(
                "exactly one of podSelector and externalWorkloadSelector must be given",
                "An empty selector {} takes everything",
            );
            None
        }
    };
    let protocol = match raw.proxy_protocol.as_deref().unwrap_or("unknown") {
        "unknown" => Some(ProxyProtocol::Unknown),
        "HTTP/1" => Some(ProxyProtocol::Http1),
        "HTTP/2" => Some(ProxyProtocol::Http2),
        "gRPC" => Some(ProxyProtocol::Grpc),
        "opaque" => Some(ProxyProtocol::Opaque),
        "TLS" => Some(ProxyProtocol::Tls),
        other => {
            at.field("proxyProtocol")
                .error(format!("{other:?} is no protocol"), "Write unknown, HTTP/1, HTTP/2, gRPC, opaque or TLS");
            None
        }
    };
    let access = raw.access_policy.as_deref().map_or(Some(DefaultPolicy::Deny), |text| {
        let access = default_policy(text);
        if access.is_none() {
            at.field("accessPolicy").error(
                format!("{text:?} is no policy"),
                "Write all-unauthenticated, all-authenticated, cluster-unauthenticated, cluster-authenticated, deny or audit",
            );
        }
        access
    });
    Some(Server { head, subjects: subjects?, port: raw.port, protocol: protocol?, access: access? })
}

#[derive(Deserialize)]
struct RawNetwork {
    cidr: String,
    #[serde(default)]
    except: Vec<String>,
}

/// A block, or a bare address as the block of itself.
fn net(text: &str) -> Result<IpNet, String> {
    let bare = || text.parse::<IpAddr>().map(IpNet::from);
    text.parse::<IpNet>()
        .or_else(|_| bare())
        .map(|n| n.trunc())
        .map_err(|_| format!("{text:?} is no network; write it like 10.0.0.0/8"))
}

fn networks(raw: Vec<RawNetwork>, at: &mut At<'_>) -> Vec<Network> {
    let mut out = Vec::new();
    for (i, n) in raw.into_iter().enumerate() {
        let mut at = at.item(i);
        let Some(block) = at.field("cidr").take(net(&n.cidr)) else { continue };
        let mut network = Network::new(block);
        for (j, text) in n.except.iter().enumerate() {
            let mut at = at.field("except");
            let mut at = at.item(j);
            let Some(except) = at.take(net(text)) else { continue };
            if except == block || !block.contains(&except) {
                at.error(
                    format!("{except} is not a part of {block}"),
                    "An exception lies inside its network and leaves something of it",
                );
                continue;
            }
            network.except.push(except);
        }
        out.push(network);
    }
    out
}

/// `*`, `*.suffix`, or an identity.
fn identity(text: &str, to: &mut Identities, at: &mut At<'_>) {
    if text == "*" {
        to.suffixes.push(Suffix::new([]));
    } else if let Some(suffix) = text.strip_prefix("*.") {
        if suffix.parse::<Id>().is_ok_and(|id| !id.is_uri()) {
            to.suffixes.push(Suffix::new(suffix.split('.')));
        } else {
            at.error(format!("{text:?} is no suffix of identities"), "Write *. and a DNS name");
        }
    } else {
        match text.parse() {
            Ok(id) => to.exact.push(id),
            Err(_) => at.error(format!("{text:?} is no identity"), "Write a DNS name, *.suffix, * or a spiffe:// URI"),
        }
    }
}

#[derive(Deserialize)]
struct RawServerAuthorization {
    server: RawServerRef,
    client: RawClient,
}

#[derive(Deserialize)]
struct RawServerRef {
    name: Option<Arc<str>>,
    selector: Option<RawSelector>,
}

#[derive(Deserialize)]
struct RawClient {
    networks: Option<Vec<RawNetwork>>,
    #[serde(default)]
    unauthenticated: bool,
    #[serde(rename = "meshTLS")]
    mesh_tls: Option<RawMeshTls>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct RawMeshTls {
    #[serde(rename = "unauthenticatedTLS")]
    unauthenticated_tls: bool,
    identities: Option<Vec<String>>,
    service_accounts: Option<Vec<RawAccount>>,
}

#[derive(Deserialize)]
struct RawAccount {
    name: Arc<str>,
    namespace: Option<Arc<str>>,
}

pub(super) fn server_authorization(value: &Value, head: Head, at: &mut At<'_>) -> Option<ServerAuthorization> {
    let raw: RawServerAuthorization = typed(value, "spec", at)?;
    let mut at = at.field("spec");
    let server = match (raw.server.name, raw.server.selector) {
        (Some(name), None) => Some(ServerRef::Name(name)),
        (None, Some(s)) => Some(ServerRef::Selector(selector(s, &mut at.field("server.selector")))),
        _ => {
            at.field("server").error("exactly one of name and selector must be given", "Keep the one that is meant");
            None
        }
    };
    let mut at = at.field("client");
    let networks = raw.client.networks.map(|n| networks(n, &mut at.field("networks")));
    let client = match (raw.client.unauthenticated, raw.client.mesh_tls) {
        (true, None) => Principal::Anybody,
        (false, Some(tls)) => principal(tls, &head, &mut at.field("meshTLS")),
        _ => {
            at.error(
                "exactly one of unauthenticated: true and meshTLS must be given",
                "Say whether clients need an identity",
            );
            return None;
        }
    };
    Some(ServerAuthorization { head, server: server?, networks, client })
}

fn principal(raw: RawMeshTls, head: &Head, at: &mut At<'_>) -> Principal {
    let named = raw.identities.is_some() || raw.service_accounts.is_some();
    if raw.unauthenticated_tls {
        if named {
            at.error("unauthenticatedTLS excludes identities and serviceAccounts", "Remove one of them");
        }
        return Principal::AnyTls;
    }
    let listed = raw.identities.iter().flatten().count() + raw.service_accounts.iter().flatten().count();
    if listed == 0 {
        at.error(
            "no identities and no serviceAccounts: nobody would be let in",
            "Name some, or set unauthenticatedTLS: true",
        );
    }
    let mut ids = Identities::default();
    for (i, text) in raw.identities.iter().flatten().enumerate() {
        identity(text, &mut ids, &mut at.field("identities").item(i));
    }
    for a in raw.service_accounts.into_iter().flatten() {
        ids.accounts.push((a.namespace.unwrap_or_else(|| head.namespace.clone()), a.name));
    }
    Principal::Identities(ids)
}

#[derive(Deserialize)]
struct RawRef {
    #[serde(default)]
    group: String,
    kind: String,
    name: Arc<str>,
    namespace: Option<Arc<str>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawAuthorizationPolicy {
    target_ref: RawRef,
    #[serde(default)]
    required_authentication_refs: Vec<RawRef>,
}

pub(super) fn authorization_policy(value: &Value, head: Head, at: &mut At<'_>) -> Option<AuthorizationPolicy> {
    let raw: RawAuthorizationPolicy = typed(value, "spec", at)?;
    let mut at = at.field("spec");
    let target = authorization_target(raw.target_ref, &head, &mut at.field("targetRef"));
    let mut requires = Vec::new();
    for (i, r) in raw.required_authentication_refs.into_iter().enumerate() {
        let mut at = at.field("requiredAuthenticationRefs");
        let mut at = at.item(i);
        let namespace = r.namespace.unwrap_or_else(|| head.namespace.clone());
        let name = r.name;
        requires.push(match (r.group.as_str(), r.kind.as_str()) {
            (POLICY, "MeshTLSAuthentication") => Requirement::MeshTls { namespace, name },
            (POLICY, "NetworkAuthentication") => Requirement::Network { namespace, name },
            ("" | "core", "ServiceAccount") => Requirement::Account { namespace, name },
            (group, kind) => {
                at.field("kind").error(
                    format!("{group}/{kind} is no authentication"),
                    "Name a MeshTLSAuthentication, NetworkAuthentication or ServiceAccount, with its API group",
                );
                continue;
            }
        });
    }
    let networks = requires.iter().filter(|r| matches!(r, Requirement::Network { .. })).count();
    if networks > 1 || requires.len() - networks > 1 {
        at.field("requiredAuthenticationRefs").error(
            "more than one of a sort",
            "At most one NetworkAuthentication, and one MeshTLSAuthentication or ServiceAccount; list alternatives inside them",
        );
    }
    Some(AuthorizationPolicy { head, target: target?, requires })
}

fn authorization_target(raw: RawRef, head: &Head, at: &mut At<'_>) -> Option<AuthorizationTarget> {
    if raw.namespace.as_ref().is_some_and(|ns| *ns != head.namespace) {
        at.field("namespace").error("a policy targets its own namespace alone", "Move the policy");
    }
    match (raw.group.as_str(), raw.kind.as_str()) {
        (POLICY, "Server") => Some(AuthorizationTarget::Server(raw.name)),
        ("" | "core", "Namespace") => {
            if raw.name != head.namespace {
                at.field("name").error(
                    format!("the policy's namespace is {}, not {}", head.namespace, raw.name),
                    "A policy can target only its own namespace",
                );
            }
            Some(AuthorizationTarget::Namespace)
        }
        (POLICY, "HTTPRoute") => Some(AuthorizationTarget::Route(Kind::LinkerdHttpRoute, raw.name)),
        (super::GATEWAY, "HTTPRoute") => Some(AuthorizationTarget::Route(Kind::HttpRoute, raw.name)),
        (super::GATEWAY, "GRPCRoute") => Some(AuthorizationTarget::Route(Kind::GrpcRoute, raw.name)),
        (group, kind) => {
            at.field("kind").error(
                format!("{group}/{kind} can't be a target"),
                "Target a Server, Namespace, HTTPRoute or GRPCRoute, with its API group",
            );
            None
        }
    }
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct RawMeshTlsAuthentication {
    identities: Option<Vec<String>>,
    identity_refs: Option<Vec<RawRef>>,
}

pub(super) fn mesh_tls(value: &Value, head: Head, at: &mut At<'_>) -> Option<MeshTls> {
    let raw: RawMeshTlsAuthentication = typed(value, "spec", at)?;
    let mut at = at.field("spec");
    let mut identities = Identities::default();
    if raw.identities.is_some() == raw.identity_refs.is_some() {
        at.error("exactly one of identities and identityRefs must be given", "Keep the one that is meant");
    }
    for (field, empty) in [
        ("identities", raw.identities.as_ref().is_some_and(Vec::is_empty)),
        ("identityRefs", raw.identity_refs.as_ref().is_some_and(Vec::is_empty)),
    ] {
        if empty {
            at.field(field).error("empty: nobody would be let in", "List at least one");
        }
    }
    for (i, text) in raw.identities.iter().flatten().enumerate() {
        identity(text, &mut identities, &mut at.field("identities").item(i));
    }
    for (i, r) in raw.identity_refs.into_iter().flatten().enumerate() {
        let mut at = at.field("identityRefs");
        let mut at = at.item(i);
        match (r.group.as_str(), r.kind.as_str()) {
            ("" | "core", "ServiceAccount") => {
                identities.accounts.push((r.namespace.unwrap_or_else(|| head.namespace.clone()), r.name));
            }
            ("" | "core", "Namespace") => identities.namespaces.push(r.name),
            (group, kind) => {
                at.field("kind")
                    .error(format!("{group}/{kind} has no identity"), "Name a ServiceAccount or a Namespace");
            }
        }
    }
    Some(MeshTls { head, identities })
}

#[derive(Deserialize)]
struct RawNetworkAuthentication {
    networks: Vec<RawNetwork>,
}

pub(super) fn network_auth(value: &Value, head: Head, at: &mut At<'_>) -> Option<NetworkAuth> {
    let raw: RawNetworkAuthentication = typed(value, "spec", at)?;
    let mut at = at.field("spec.networks");
    if raw.networks.is_empty() {
        at.error("empty: nobody would be let in", "List at least one network");
    }
    let networks = networks(raw.networks, &mut at);
    Some(NetworkAuth { head, networks })
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawRateLimit {
    target_ref: RawRef,
    total: Option<RawRate>,
    identity: Option<RawRate>,
    #[serde(default)]
    overrides: Vec<RawOverride>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawRate {
    requests_per_second: u32,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawOverride {
    requests_per_second: u32,
    client_refs: Vec<RawRef>,
}

pub(super) fn rate_limit(value: &Value, head: Head, at: &mut At<'_>) -> Option<RateLimit> {
    let raw: RawRateLimit = typed(value, "spec", at)?;
    let mut at = at.field("spec");
    let t = raw.target_ref;
    let target = match (t.group.as_str(), t.kind.as_str()) {
        (POLICY, "Server") => Some(RateLimitTarget::Server(t.name)),
        ("" | "core", "Service") => Some(RateLimitTarget::Service(t.name)),
        (POLICY, "EgressNetwork") => Some(RateLimitTarget::Egress(t.name)),
        (group, kind) => {
            at.field("targetRef.kind")
                .error(format!("{group}/{kind} can't be limited"), "Target a Server, a Service or an EgressNetwork");
            None
        }
    };
    let total = raw.total.map(|r| r.requests_per_second);
    let identity = raw.identity.map(|r| r.requests_per_second);
    let mut check = |rate: Option<u32>, field: String| match (rate, total) {
        (Some(0), _) => at.field(&field).error("0 requests per second", "Write at least 1, or remove the limit"),
        (Some(r), Some(t)) if r > t => {
            at.field(&field)
                .error(format!("{r} is more than the total of {t}"), "No client can have more than all together");
        }
        _ => {}
    };
    check(total, "total.requestsPerSecond".into());
    check(identity, "identity.requestsPerSecond".into());
    for (i, o) in raw.overrides.iter().enumerate() {
        check(Some(o.requests_per_second), format!("overrides[{i}].requestsPerSecond"));
    }
    if total.is_none() && identity.is_none() && raw.overrides.is_empty() {
        at.warn("neither total, identity nor overrides: nothing is limited", "Give at least one of them");
    }
    let overrides = raw
        .overrides
        .into_iter()
        .enumerate()
        .map(|(i, o)| {
            let mut accounts = Vec::new();
            for (j, r) in o.client_refs.into_iter().enumerate() {
                if !matches!(r.group.as_str(), "" | "core") || r.kind != "ServiceAccount" {
                    at.field(&format!("overrides[{i}].clientRefs[{j}].kind"))
                        .error(format!("{}/{} is no client", r.group, r.kind), "Name a ServiceAccount");
                    continue;
                }
                accounts.push((r.namespace.unwrap_or_else(|| head.namespace.clone()), r.name));
            }
            (o.requests_per_second, accounts)
        })
        .collect();
    Some(RateLimit { head, target: target?, total, identity, overrides })
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawEgress {
    traffic_policy: String,
    networks: Option<Vec<RawNetwork>>,
}

pub(super) fn egress(value: &Value, head: Head, at: &mut At<'_>) -> Option<Egress> {
    let raw: RawEgress = typed(value, "spec", at)?;
    let tuning = Tuning::read(&head.annotations, &mut at.field("metadata"), Severity::Warning);
    let mut at = at.field("spec");
    let allow = match raw.traffic_policy.as_str() {
        "Allow" => true,
        "Deny" => false,
        other => {
            at.field("trafficPolicy").error(format!("{other:?} is no policy"), "Write Allow or Deny");
            false
        }
    };
    if raw.networks.as_ref().is_some_and(Vec::is_empty) {
        at.field("networks").error("empty", "List networks, or leave the field out for everything outside the cluster");
    }
    let networks = raw.networks.map(|n| networks(n, &mut at.field("networks")));
    Some(Egress { head, allow, networks, tuning })
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawExternalWorkload {
    #[serde(rename = "meshTLS")]
    mesh_tls: RawWorkloadTls,
    #[serde(default)]
    ports: Vec<RawWorkloadPort>,
    #[serde(rename = "workloadIPs", default)]
    workload_ips: Vec<RawWorkloadIp>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawWorkloadTls {
    identity: String,
    server_name: String,
}

#[derive(Deserialize)]
struct RawWorkloadPort {
    name: Option<Arc<str>>,
    port: std::num::NonZeroU16,
    #[serde(default)]
    protocol: String,
}

#[derive(Deserialize)]
struct RawWorkloadIp {
    ip: String,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct RawStatus {
    conditions: Vec<RawCondition>,
}

pub(super) fn external_workload(value: &Value, head: Head, at: &mut At<'_>) -> Option<ExternalWorkload> {
    let raw: RawExternalWorkload = typed(value, "spec", at)?;
    let status: RawStatus = typed(value, "status", at)?;
    weight_annotation(&head, &mut at.field("metadata"));
    pod_annotations(&head, &mut at.field("metadata"));
    let mut at = at.field("spec");
    let tls = raw.mesh_tls;
    let identity = tls.identity.parse::<Id>().map_err(|e| format!("{e}; write the name in its certificate"));
    let identity = at.field("meshTLS.identity").take(identity);
    let server_name = tls.server_name.parse::<ServerName>().map_err(|e| format!("{e}; write its DNS name"));
    let server_name = at.field("meshTLS.serverName").take(server_name);
    let mut ips = Vec::new();
    for (i, ip) in raw.workload_ips.iter().enumerate() {
        match ip.ip.parse() {
            Ok(ip) => ips.push(ip),
            Err(_) => at
                .field("workloadIPs")
                .item(i)
                .error(format!("{:?} is no IP address", ip.ip), "Write one like 10.1.0.7"),
        }
    }
    if ips.len() > 2 {
        at.field("workloadIPs").error(format!("{} addresses are more than 2", ips.len()), "Give one of each family");
    }
    let ports = raw.ports.into_iter().filter(|p| matches!(p.protocol.as_str(), "" | "TCP"));
    Some(ExternalWorkload {
        head,
        identity: identity?,
        server_name: server_name?,
        ports: ports.map(|p| (p.port.get(), p.name)).collect(),
        ips,
        ready: is_ready(&status.conditions),
    })
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct RawProfile {
    routes: Vec<RawProfileRoute>,
    retry_budget: Option<RawBudget>,
    dst_overrides: Vec<RawDst>,
    opaque_ports: Option<Vec<Value>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawProfileRoute {
    name: Arc<str>,
    condition: RawRequestCondition,
    #[serde(default)]
    response_classes: Vec<RawClass>,
    #[serde(default)]
    is_retryable: bool,
    timeout: Option<String>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct RawRequestCondition {
    path_regex: Option<String>,
    method: Option<String>,
    all: Option<Vec<RawRequestCondition>>,
    any: Option<Vec<RawRequestCondition>>,
    not: Option<Box<RawRequestCondition>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawClass {
    condition: RawResponseCondition,
    #[serde(default)]
    is_failure: bool,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct RawResponseCondition {
    status: Option<RawStatusRange>,
    all: Option<Vec<RawResponseCondition>>,
    any: Option<Vec<RawResponseCondition>>,
    not: Option<Box<RawResponseCondition>>,
}

#[derive(Deserialize)]
struct RawStatusRange {
    min: Option<u16>,
    max: Option<u16>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawBudget {
    retry_ratio: f64,
    min_retries_per_second: u32,
    ttl: String,
}

#[derive(Deserialize)]
struct RawDst {
    authority: String,
    weight: Value,
}

/// Linkerd's retry budget where none is given (resources.md 4.9).
const PROFILE_BUDGET: Budget = Budget { ratio: 0.2, min_per_second: 10, ttl: Duration::from_secs(10) };

pub(super) fn profile(value: &Value, head: Head, at: &mut At<'_>) -> Option<Profile> {
    let raw: RawProfile = typed(value, "spec", at)?;
    let mut at = at.field("spec");
    let mut routes = Vec::new();
    for (i, r) in raw.routes.into_iter().enumerate() {
        let mut at = at.field("routes");
        let mut at = at.item(i);
        let condition = request_condition(r.condition, &mut at.field("condition"));
        let mut classes = Vec::new();
        for (j, c) in r.response_classes.into_iter().enumerate() {
            let mut at = at.field("responseClasses");
            if let Some(condition) = response_condition(c.condition, &mut at.item(j).field("condition")) {
                classes.push((condition, !c.is_failure));
            }
        }
        let timeout = r.timeout.and_then(|t| at.field("timeout").take(duration::go(&t))).filter(|d| !d.is_zero());
        let Some(condition) = condition else { continue };
        let labels = BTreeMap::from([(Arc::from("route"), r.name)]);
        routes.push(ProfileRoute { condition, classes, labels, retryable: r.is_retryable, timeout });
    }
    let budget = match raw.retry_budget {
        None => Some(PROFILE_BUDGET),
        Some(b) => {
            let mut at = at.field("retryBudget");
            let ttl = at.field("ttl").take(duration::go(&b.ttl));
            let fits = ttl.is_none_or(|t| (Duration::from_secs(1)..=Duration::from_secs(60)).contains(&t));
            if !fits || !(0.0..=1000.0).contains(&b.retry_ratio) {
                at.warn("ttl is 1s to 60s, retryRatio 0 to 1000", "Outside of that nothing is retried");
                None
            } else {
                ttl.map(|ttl| Budget { ratio: b.retry_ratio, min_per_second: b.min_retries_per_second, ttl })
            }
        }
    };
    let mut overrides = Vec::new();
    for (i, d) in raw.dst_overrides.iter().enumerate() {
        let mut at = at.field("dstOverrides");
        let mut at = at.item(i);
        let weight = at.field("weight").take(quantity(&d.weight));
        let authority = d.authority.trim_end_matches('.').to_ascii_lowercase();
        if authority.parse::<http::uri::Authority>().is_err() {
            at.field("authority")
                .error(format!("{:?} is no authority", d.authority), "Write a name like web.shop.svc.cluster.local:80");
            continue;
        }
        if let Some(weight) = weight {
            overrides.push((authority.into(), weight));
        }
    }
    let opaque_ports = raw.opaque_ports.and_then(|ports| {
        let text: Vec<_> = ports.iter().map(|p| p.as_str().map_or_else(|| p.to_string(), str::to_string)).collect();
        at.field("opaquePorts").take(Ports::parse(&text.join(",")))
    });
    Some(Profile { head, routes, budget, overrides, opaque_ports })
}

/// A Kubernetes quantity in thousandths, times ten: `500m` or `1`.
fn quantity(value: &Value) -> Result<u32, String> {
    let text = value.as_str().map_or_else(|| value.to_string(), str::to_string);
    let milli = match text.strip_suffix('m') {
        Some(n) => n.parse::<f64>(),
        None => text.parse::<f64>().map(|n| n * 1000.0),
    };
    match milli {
        Ok(m) if (0.0..=f64::from(u32::MAX / 10)).contains(&m) => Ok((m * 10.0).round() as u32),
        _ => Err(format!("{text:?} is no weight; write a quantity like 1 or 500m")),
    }
}

fn request_condition(raw: RawRequestCondition, at: &mut At<'_>) -> Option<RequestCondition> {
    let mut parts = Vec::new();
    if let Some(text) = raw.path_regex {
        let regex = regex::Regex::new(&format!("^(?:{text})$"))
            .map_err(|_| format!("{text:?} is no regular expression; write one of RE2"));
        parts.push(at.field("pathRegex").take(regex).map(RequestCondition::Path));
    }
    if let Some(text) = raw.method {
        let method = http::Method::from_bytes(text.to_ascii_uppercase().as_bytes())
            .map_err(|_| format!("{text:?} is no method; write one like GET"));
        parts.push(at.field("method").take(method).map(RequestCondition::Method));
    }
    for (field, list, all) in [("all", raw.all, true), ("any", raw.any, false)] {
        let Some(list) = list else { continue };
        let mut at = at.field(field);
        let list: Vec<_> = list.into_iter().enumerate().map(|(i, c)| request_condition(c, &mut at.item(i))).collect();
        let list: Option<Vec<_>> = list.into_iter().collect();
        parts.push(if all { list.map(RequestCondition::All) } else { list.map(RequestCondition::Any) });
    }
    if let Some(not) = raw.not {
        parts.push(request_condition(*not, &mut at.field("not")).map(|not| RequestCondition::Not(Box::new(not))));
    }
    if parts.is_empty() {
        at.error("empty", "Give pathRegex, method, all, any or not");
        return None;
    }
    let mut parts: Vec<_> = parts.into_iter().collect::<Option<_>>()?;
    Some(if parts.len() == 1 { parts.remove(0) } else { RequestCondition::All(parts) })
}

fn response_condition(raw: RawResponseCondition, at: &mut At<'_>) -> Option<ResponseCondition> {
    let mut parts = Vec::new();
    if let Some(s) = raw.status {
        let (min, max) = (s.min.unwrap_or(100), s.max.unwrap_or(599));
        if min > max || !(100..=599).contains(&min) || !(100..=599).contains(&max) {
            at.field("status").error(format!("{min} to {max} is no range of statuses"), "Statuses are 100 to 599");
        }
        parts.push(Some(ResponseCondition::Status(min..=max)));
    }
    for (field, list, all) in [("all", raw.all, true), ("any", raw.any, false)] {
        let Some(list) = list else { continue };
        let mut at = at.field(field);
        let list: Vec<_> = list.into_iter().enumerate().map(|(i, c)| response_condition(c, &mut at.item(i))).collect();
        let list: Option<Vec<_>> = list.into_iter().collect();
        parts.push(if all { list.map(ResponseCondition::All) } else { list.map(ResponseCondition::Any) });
    }
    if let Some(not) = raw.not {
        parts.push(response_condition(*not, &mut at.field("not")).map(|not| ResponseCondition::Not(Box::new(not))));
    }
    if parts.is_empty() {
        at.error("empty", "Give status, all, any or not");
        return None;
    }
    let mut parts: Vec<_> = parts.into_iter().collect::<Option<_>>()?;
    Some(if parts.len() == 1 { parts.remove(0) } else { ResponseCondition::All(parts) })
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawTargetRef {
    #[serde(default)]
    group: String,
    kind: String,
    name: Arc<str>,
    section_name: Option<Arc<str>>,
}

/// Most targets of a backend policy (resources.md 3.12).
const MAX_TARGETS: usize = 16;

fn targets(raw: Vec<RawTargetRef>, at: &mut At<'_>) -> Vec<(Arc<str>, Option<Arc<str>>)> {
    if raw.is_empty() || raw.len() > MAX_TARGETS {
        at.error(format!("{} targets", raw.len()), format!("List 1 to {MAX_TARGETS}"));
    }
    let mut out = Vec::new();
    for (i, t) in raw.into_iter().enumerate() {
        if t.kind == "Service" && matches!(t.group.as_str(), "" | "core") {
            out.push((t.name, t.section_name));
        } else {
            at.item(i).note(format!("targets of kind {}/{} are left alone", t.group, t.kind));
        }
    }
    out
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawBackendTls {
    #[serde(default)]
    target_refs: Vec<RawTargetRef>,
    /// v1alpha2, of Gateway API 1.0, had one target and other names for the same fields.
    target_ref: Option<RawTargetRef>,
    #[serde(alias = "tls")]
    validation: RawValidation,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawValidation {
    hostname: String,
    #[serde(default, alias = "caCertRefs")]
    ca_certificate_refs: Vec<RawRef>,
    #[serde(rename = "wellKnownCACertificates", alias = "wellKnownCACerts")]
    well_known: Option<String>,
    #[serde(default)]
    subject_alt_names: Vec<RawSubjectName>,
}

#[derive(Deserialize)]
struct RawSubjectName {
    #[serde(rename = "type")]
    kind: String,
    hostname: Option<Arc<str>>,
    uri: Option<Arc<str>>,
}

pub(super) fn backend_tls(value: &Value, head: Head, at: &mut At<'_>) -> Option<BackendTls> {
    let mut raw: RawBackendTls = typed(value, "spec", at)?;
    let mut at = at.field("spec");
    raw.target_refs.extend(raw.target_ref);
    let targets = targets(raw.target_refs, &mut at.field("targetRefs"));
    let mut at = at.field("validation");
    if !is_host_name(&raw.validation.hostname) {
        at.field("hostname").error(
            format!("{:?} is no host name", raw.validation.hostname),
            "Write the name in the backend's certificate",
        );
    }
    match (raw.validation.ca_certificate_refs.len(), raw.validation.well_known.as_deref()) {
        (0, Some("System")) | (1..=8, None) => {}
        (0, Some(other)) => {
            at.field("wellKnownCACertificates").error(format!("{other:?} is not known"), "Write System")
        }
        _ => at.error(
            "exactly one of caCertificateRefs (at most 8) and wellKnownCACertificates must be given",
            "Name a ConfigMap with authorities, or write System",
        ),
    }
    for (i, r) in raw.validation.ca_certificate_refs.iter().enumerate() {
        if r.kind != "ConfigMap" || !matches!(r.group.as_str(), "" | "core") {
            let mut at = at.field("caCertificateRefs");
            at.item(i)
                .error(format!("{}/{} holds no authorities", r.group, r.kind), "Name a ConfigMap with the key ca.crt");
        }
    }
    let mut subject_names = Vec::new();
    for (i, name) in raw.validation.subject_alt_names.into_iter().enumerate() {
        match (name.kind.as_str(), name.hostname, name.uri) {
            ("Hostname", Some(host), None) if is_host_name(&host) => subject_names.push(SubjectName::Host(host)),
            ("URI", None, Some(uri)) => subject_names.push(SubjectName::Uri(uri)),
            _ => {
                let mut at = at.field("subjectAltNames");
                at.item(i).error("neither Hostname with a hostname nor URI with a uri", "Give what the type names");
            }
        }
    }
    let authorities = match raw.validation.well_known {
        Some(_) => None,
        None => Some(raw.validation.ca_certificate_refs.into_iter().map(|r| r.name).collect()),
    };
    Some(BackendTls { head, targets, hostname: raw.validation.hostname.into(), authorities, subject_names })
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawBackendTraffic {
    target_refs: Vec<RawTargetRef>,
    retry_constraint: Option<RawConstraint>,
    session_persistence: Option<RawSession>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawConstraint {
    budget: Option<RawRetryBudget>,
    min_retry_rate: Option<RawRetryRate>,
}

#[derive(Deserialize)]
struct RawRetryBudget {
    percent: Option<u32>,
    interval: Option<String>,
}

#[derive(Deserialize)]
struct RawRetryRate {
    count: Option<u32>,
    interval: Option<String>,
}

pub(super) fn backend_traffic(value: &Value, head: Head, at: &mut At<'_>) -> Option<BackendTraffic> {
    let raw: RawBackendTraffic = typed(value, "spec", at)?;
    let mut at = at.field("spec");
    let targets = targets(raw.target_refs, &mut at.field("targetRefs")).into_iter().map(|t| t.0).collect();
    let budget = raw.retry_constraint.map(|c| {
        let mut at = at.field("retryConstraint");
        let mut interval = |text: Option<String>, field: &str, default: Duration, least: Duration| {
            let mut at = at.field(field);
            let Some(text) = text else { return default };
            match at.take(duration::gep2257(&text)) {
                Some(d) if d < least || d.is_zero() || d > Duration::from_secs(3600) => {
                    at.error(format!("{d:?} is out of range"), format!("Write {least:?} to 1h"));
                    default
                }
                Some(d) => d,
                None => default,
            }
        };
        let (percent, ttl) = match c.budget {
            Some(b) => (
                b.percent.unwrap_or(20),
                interval(b.interval, "budget.interval", Duration::from_secs(10), Duration::from_secs(1)),
            ),
            None => (20, Duration::from_secs(10)),
        };
        let (count, every) = match c.min_retry_rate {
            Some(r) => (
                r.count.unwrap_or(10),
                interval(r.interval, "minRetryRate.interval", Duration::from_secs(1), Duration::from_millis(1)),
            ),
            None => (10, Duration::from_secs(1)),
        };
        if percent > 100 {
            at.field("budget.percent").error(format!("{percent} is more than 100"), "Write 0 to 100");
        }
        let per_second = f64::from(count) / every.as_secs_f64();
        Budget { ratio: f64::from(percent) / 100.0, min_per_second: per_second.ceil().min(1e6) as u32, ttl }
    });
    let session = raw.session_persistence.and_then(|s| session(s, &mut at.field("sessionPersistence")));
    Some(BackendTraffic { head, targets, budget, session })
}

#[cfg(test)]
mod tests {
    use super::{super::tests::check, *};

    #[track_caller]
    fn spec(kind: &str, spec: &str, issues: &[&str]) {
        let group = match kind {
            "ExternalWorkload" => "workload.linkerd.io/v1beta1",
            "ServiceProfile" => "linkerd.io/v1alpha2",
            "Server" => "policy.linkerd.io/v1beta3",
            "ServerAuthorization" => "policy.linkerd.io/v1beta1",
            "BackendTLSPolicy" => "gateway.networking.k8s.io/v1",
            "XBackendTrafficPolicy" => "gateway.networking.x-k8s.io/v1alpha1",
            _ => "policy.linkerd.io/v1alpha1",
        };
        let issues: Vec<_> =
            issues.iter().map(|i| if i.is_empty() { "spec".into() } else { format!("spec.{i}") }).collect();
        check(
            &format!("{{apiVersion: {group}, kind: {kind}, metadata: {{name: x, namespace: shop}}, spec: {spec}}}"),
            &issues.iter().map(String::as_str).collect::<Vec<_>>(),
        );
    }

    #[test]
    fn servers() {
        spec("Server", "{podSelector: {}, port: http, proxyProtocol: HTTP/1, accessPolicy: audit}", &[]);
        spec(
            "Server",
            "{externalWorkloadSelector: {matchExpressions: [{key: a, operator: In, values: [b]}]}, port: 80}",
            &[],
        );
        spec("Server", "{port: 80}", &[""]);
        spec("Server", "{podSelector: {}, externalWorkloadSelector: {}, port: 80}", &[""]);
        spec("Server", "{podSelector: {}}", &["port"]);
        spec(
            "Server",
            "{podSelector: {matchLabels: {a: 1}, matchExpressions: [{key: b, operator: Is}]}, port: 70000, proxyProtocol: HTTP, accessPolicy: 3}",
            &[
                "accessPolicy",
                "podSelector.matchLabels.a",
                "port",
                "podSelector.matchExpressions[0].operator",
                "proxyProtocol",
            ],
        );
        spec("Server", "{podSelector: {}, port: 80, proxyProtocol: HTTP}", &["proxyProtocol"]);
        spec("Server", "{podSelector: {}, port: 80, accessPolicy: open}", &["accessPolicy"]);
        spec(
            "Server",
            "{podSelector: {matchExpressions: [{key: a, operator: In}]}, port: 80}",
            &["podSelector.matchExpressions[0].values"],
        );
    }

    #[test]
    fn selectors() {
        let labels: Pairs =
            [("app", "web"), ("tier", "front")].iter().map(|(k, v)| (Arc::from(*k), Arc::from(*v))).collect();
        let matches = |yaml: &str| {
            let mut issues = Vec::new();
            let docs = super::super::super::yaml::documents(yaml);
            let raw = serde_json::from_value(super::super::super::yaml::parse(&docs[0]).unwrap()).unwrap();
            selector(raw, &mut At::new(&mut issues, "")).matches(&labels)
        };
        assert!(matches("{}") && matches("{matchLabels: {app: web}}"));
        assert!(!matches("{matchLabels: {app: web, tier: back}}"));
        assert!(matches(
            "{matchExpressions: [{key: app, operator: In, values: [a, web]}, {key: x, operator: DoesNotExist}]}"
        ));
        assert!(matches("{matchExpressions: [{key: x, operator: NotIn, values: [a]}]}"));
        assert!(!matches("{matchExpressions: [{key: app, operator: NotIn, values: [web]}]}"));
        assert!(!matches("{matchExpressions: [{key: x, operator: Exists}]}"));
    }

    #[test]
    fn authorizations() {
        let sa = |client: &str, issues: &[&str]| {
            spec("ServerAuthorization", &format!("{{server: {{name: s}}, client: {client}}}"), issues);
        };
        sa("{unauthenticated: true, networks: [{cidr: 10.0.0.0/8, except: [10.1.0.0/16]}]}", &[]);
        sa("{meshTLS: {serviceAccounts: [{name: a}], identities: ['*', '*.b.c', 'spiffe://x/y']}}", &[]);
        sa(
            "{unauthenticated: true, networks: [{cidr: 10.0.0.0/8, except: [11.0.0.0/8]}]}",
            &["client.networks[0].except[0]"],
        );
        sa(
            "{unauthenticated: true, networks: [{cidr: 10.0.0.0/8, except: [10.0.0.0/8]}]}",
            &["client.networks[0].except[0]"],
        );
        sa("{unauthenticated: true, networks: [{cidr: ten}]}", &["client.networks[0].cidr"]);
        sa("{}", &["client"]);
        sa("{unauthenticated: true, meshTLS: {}}", &["client"]);
        sa("{meshTLS: {}}", &["client.meshTLS"]);
        sa("{meshTLS: {unauthenticatedTLS: true, identities: ['*']}}", &["client.meshTLS"]);
        sa("{meshTLS: {identities: ['*.', 'a b']}}", &["client.meshTLS.identities[0]", "client.meshTLS.identities[1]"]);
        spec("ServerAuthorization", "{server: {}, client: {unauthenticated: true}}", &["server"]);
        spec(
            "ServerAuthorization",
            "{server: {}, client: {meshTLS: {identities: [3, 'a b']}}}",
            &["client.meshTLS.identities[0]", "server", "client.meshTLS.identities[1]"],
        );

        let ap = |target: &str, refs: &str, issues: &[&str]| {
            spec(
                "AuthorizationPolicy",
                &format!("{{targetRef: {target}, requiredAuthenticationRefs: [{refs}]}}"),
                issues,
            );
        };
        let server = "{group: policy.linkerd.io, kind: Server, name: s}";
        let tls = "{group: policy.linkerd.io, kind: MeshTLSAuthentication, name: m}";
        ap(server, &format!("{tls}, {{group: policy.linkerd.io, kind: NetworkAuthentication, name: net}}"), &[]);
        ap("{kind: Namespace, name: shop}", "", &[]);
        ap("{kind: Namespace, name: other}", "", &["targetRef.name"]);
        ap("{kind: Pod, name: other}", "", &["targetRef.kind"]);
        ap(server, &format!("{tls}, {{kind: ServiceAccount, name: net}}"), &["requiredAuthenticationRefs"]);
        ap(server, "{kind: Secret, name: net}", &["requiredAuthenticationRefs[0].kind"]);
        ap(
            "{kind: Pod, name: other, namespace: far}",
            "{kind: Secret, name: net}, {kind: Pod, name: p}",
            &[
                "targetRef.namespace",
                "targetRef.kind",
                "requiredAuthenticationRefs[0].kind",
                "requiredAuthenticationRefs[1].kind",
            ],
        );

        spec(
            "MeshTLSAuthentication",
            "{identityRefs: [{kind: Namespace, name: a}, {kind: ServiceAccount, name: b}]}",
            &[],
        );
        spec("MeshTLSAuthentication", "{identities: []}", &["identities"]);
        spec("MeshTLSAuthentication", "{}", &[""]);
        spec("MeshTLSAuthentication", "{identityRefs: [{kind: Pod, name: b}]}", &["identityRefs[0].kind"]);
        spec("NetworkAuthentication", "{networks: [{cidr: 10.0.0.1}]}", &[]);
        spec("NetworkAuthentication", "{networks: []}", &["networks"]);
    }

    #[test]
    fn limits_and_egress() {
        let t = "targetRef: {group: policy.linkerd.io, kind: Server, name: s}";
        spec(
            "HTTPLocalRateLimitPolicy",
            &format!("{{{t}, total: {{requestsPerSecond: 10}}, identity: {{requestsPerSecond: 5}}}}"),
            &[],
        );
        spec(
            "HTTPLocalRateLimitPolicy",
            &format!("{{{t}, total: {{requestsPerSecond: 0}}}}"),
            &["total.requestsPerSecond"],
        );
        spec(
            "HTTPLocalRateLimitPolicy",
            &format!(
                "{{{t}, total: {{requestsPerSecond: 1}}, overrides: [{{requestsPerSecond: 2, clientRefs: [{{kind: Pod, name: a}}]}}]}}"
            ),
            &["overrides[0].requestsPerSecond", "overrides[0].clientRefs[0].kind"],
        );
        spec("HTTPLocalRateLimitPolicy", "{targetRef: {kind: Pod, name: a}}", &["targetRef.kind", ""]);
        spec("EgressNetwork", "{trafficPolicy: Deny, networks: [{cidr: 1.0.0.0/8}]}", &[]);
        spec("EgressNetwork", "{trafficPolicy: Maybe}", &["trafficPolicy"]);
        spec("EgressNetwork", "{trafficPolicy: Allow, networks: []}", &["networks"]);
    }

    #[test]
    fn workloads_profiles_and_backend_policies() {
        spec(
            "ExternalWorkload",
            "{meshTLS: {identity: 'spiffe://a/b', serverName: a.b}, ports: [{port: 80}], workloadIPs: [{ip: 10.0.0.1}]}",
            &[],
        );
        spec(
            "ExternalWorkload",
            "{meshTLS: {identity: 'a b', serverName: ''}}",
            &["meshTLS.identity", "meshTLS.serverName"],
        );
        spec(
            "ServiceProfile",
            "{routes: [{name: r, condition: {pathRegex: /a/.*, method: GET}, isRetryable: true, timeout: 1.5s}], dstOverrides: [{authority: 'a.b.svc.cluster.local', weight: 500m}], opaquePorts: ['80']}",
            &[],
        );
        spec(
            "ServiceProfile",
            "{routes: [{name: r, condition: {pathRegex: '('}}]}",
            &["routes[0].condition.pathRegex"],
        );
        spec("ServiceProfile", "{routes: [{name: r, condition: {}}]}", &["routes[0].condition"]);
        let tls = |v: &str, issues: &[&str]| {
            let head = "apiVersion: gateway.networking.k8s.io/v1, kind: BackendTLSPolicy, metadata: {name: x}";
            check(&format!("{{{head}, spec: {{targetRefs: [{{kind: Service, name: s}}], validation: {v}}}}}"), issues);
        };
        tls("{hostname: a.b, wellKnownCACertificates: System}", &[]);
        tls("{hostname: a.b, caCertificateRefs: [{group: '', kind: ConfigMap, name: c}]}", &[]);
        tls("{hostname: a.b}", &["spec.validation"]);
        tls("{hostname: 'a b', wellKnownCACertificates: System}", &["spec.validation.hostname"]);
        tls("{hostname: a.b, caCertificateRefs: [{kind: Secret, name: c}]}", &["spec.validation.caCertificateRefs[0]"]);
        tls(
            "{hostname: a.b, wellKnownCACertificates: System, subjectAltNames: [{type: URI, uri: 'x://y'}, {type: URI}]}",
            &["spec.validation.subjectAltNames[1]"],
        );
        spec(
            "XBackendTrafficPolicy",
            "{targetRefs: [{kind: Service, name: s}], retryConstraint: {budget: {percent: 30, interval: 5s}}}",
            &[],
        );
        spec(
            "XBackendTrafficPolicy",
            "{targetRefs: [{kind: Service, name: s}], retryConstraint: {budget: {interval: 1ms}}}",
            &["retryConstraint.budget.interval"],
        );
        spec("XBackendTrafficPolicy", "{targetRefs: []}", &["targetRefs"]);
    }
}
