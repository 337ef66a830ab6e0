//! Validation for people: everything that reading objects found, and what only shows when objects are seen together, such as
//! a route to a Service that is not there. The latter are warnings: the traffic concerned gets a defined answer.

use super::{
    Mesh, Settings, Work,
    client::{carries, is_outside},
    files::{Files, Folder},
    index::{Index, View},
    manifest::{
        AuthorizationPolicy, AuthorizationTarget, BackendKind, FilterSpec, Key, Kind, Object, ParentKind, ParentRef,
        ProxyProtocol, RateLimit, RateLimitTarget, Requirement, Route, RouteKind, ServerRef, Service, ServiceKind,
    },
    mirror,
    report::{Finding, Report, Severity},
};
use linkerd_tls::web::Roots;
use std::{collections::BTreeSet, net::IpAddr, path::PathBuf, sync::Arc};

/// Checks folders (or single files) as one mesh, with default settings.
pub fn check(folders: &[PathBuf]) -> Report {
    let folders: Vec<_> = folders.iter().map(|path| Folder { path: path.clone(), cluster: None }).collect();
    check_with(&folders, &Settings::default())
}

/// Checks folders as one mesh.
pub fn check_with(folders: &[Folder], settings: &Settings) -> Report {
    let work = Arc::new(Work::default());
    let mut mesh = Mesh::new(settings.clone(), folders, &"default".into(), work.clone());
    let mut files = Files::new(folders.to_vec(), work);
    files.scan();
    let index = mesh.index(&mut files, &BTreeSet::new());
    report(&files, Some((&index, &mesh)))
}

/// What was found in files, and across the objects of an index.
pub(super) fn report(files: &Files, index: Option<(&Index, &Mesh)>) -> Report {
    let mut report = Report { findings: files.findings(), files: files.count(), ..Report::default() };
    if let Some((index, mesh)) = index {
        report.objects = index.objects().len();
        report.assigned = assigned(index);
        report.findings.extend(files.duplicates());
        // What does not fit in an object may have been replaced by something that refers to nothing.
        let place = |finding: &Finding| (finding.file.clone(), finding.document, finding.object.clone());
        let errors = report.findings.iter().filter(|finding| finding.severity == Severity::Error);
        let refused: BTreeSet<_> = errors.map(place).collect();
        let across = across(index, mesh, files).into_iter();
        report.findings.extend(across.filter(|finding| !refused.contains(&place(finding))));
    }
    report.findings.sort_by(|a, b| (a.severity, &a.file, a.document).cmp(&(b.severity, &b.file, b.document)));
    report
}

/// Assigned cluster addresses, as `namespace/name` and address.
pub(super) fn assigned(index: &Index) -> Vec<(String, IpAddr)> {
    let each =
        index.assigned().iter().flat_map(|((ns, name), ips)| ips.iter().map(move |ip| (format!("{ns}/{name}"), *ip)));
    each.collect()
}

fn across(index: &Index, mesh: &Mesh, files: &Files) -> Vec<Finding> {
    let mut out = Vec::new();
    for (key, object) in index.objects().iter().filter(|(k, _)| k.cluster.is_empty() && !index.is_derived(k)) {
        let view = View::new(index);
        let mut problems = Vec::new();
        match object.as_ref() {
            Object::Route(route) => of_route(&view, mesh, key, route, &mut problems),
            Object::Slice(slice) => {
                if let Some(service) = &slice.service
                    && view.service(&key.cluster, &key.namespace, service).is_none()
                {
                    problems.push((
                        "metadata.labels".into(),
                        format!("there is no Service {}/{service}", key.namespace),
                        "Add it, or correct the label kubernetes.io/service-name",
                    ));
                }
            }
            Object::ServerAuthorization(authorization) => {
                if let ServerRef::Name(name) = &authorization.server {
                    missing(&view, key, Kind::Server, name, "spec.server.name", &mut problems);
                }
            }
            Object::RateLimit(limit) => of_rate_limit(&view, key, limit, &mut problems),
            Object::BackendTls(policy) => {
                for (name, _) in &policy.targets {
                    missing(&view, key, Kind::Service, name, "spec.targetRefs", &mut problems);
                }
                let field = "spec.validation.caCertificateRefs";
                unusable(&view, key, policy.authorities.as_deref(), field, &mut problems);
            }
            Object::BackendTraffic(policy) => {
                for name in &policy.targets {
                    missing(&view, key, Kind::Service, name, "spec.targetRefs", &mut problems);
                }
            }
            Object::AuthorizationPolicy(policy) => of_authorization(&view, key, policy, &mut problems),
            Object::Egress(egress) if egress.networks.as_ref().is_some_and(|n| !is_outside(mesh, n)) => {
                problems.push((
                    "spec.networks".into(),
                    "a network touches the cluster networks, so the EgressNetwork is not used".into(),
                    "Except the cluster's networks",
                ));
            }
            Object::Service(service) => of_service(&view, mesh, service, &mut problems),
            _ => {}
        }
        for (field, why, remedy) in problems {
            out.push(locate(files, key, field, why, remedy));
        }
    }
    for (link, why, remedy) in mirror::problems(index, mesh) {
        out.push(locate(files, &link, "spec".into(), why, remedy));
    }
    for (ip, services) in index.contested() {
        for (namespace, name) in services.iter().skip(1) {
            let key = Key { cluster: "".into(), kind: Kind::Service, namespace: namespace.clone(), name: name.clone() };
            let why = format!("{ip} belongs to the older Service {}/{}", services[0].0, services[0].1);
            out.push(locate(files, &key, "spec.clusterIP".into(), why, "Give each Service its own address"));
        }
    }
    out
}

/// Clusters that a Service names and that nobody tells anything about.
fn strangers<'a>(service: &'a Service, mesh: &Mesh) -> Vec<&'a str> {
    let key = "multicluster.linkerd.io/remote-discovery";
    let members = service.head.annotation(key).unwrap_or_default().split(',');
    let named = members.filter_map(|member| Some(member.trim().split_once('@')?.1)).chain(service.head.label(key));
    named.filter(|cluster| !mesh.clusters.contains_key(*cluster)).collect()
}

fn locate(files: &Files, key: &Key, field: String, why: String, remedy: &str) -> Finding {
    let (file, document, line) = files.locate(key).unwrap_or_default();
    Finding {
        severity: Severity::Warning,
        file,
        document,
        line,
        object: key.to_string(),
        field,
        why,
        remedy: remedy.into(),
    }
}

type Problems = Vec<(String, String, &'static str)>;

/// Notes a target in the object's own namespace that is not there.
fn missing(view: &View<'_>, key: &Key, kind: Kind, name: &Arc<str>, field: &str, problems: &mut Problems) {
    if view.object(&key.cluster, kind, &key.namespace, name).is_none() {
        let why = format!("there is no {} {}/{name}, so this has no effect", kind.name(), key.namespace);
        problems.push((field.into(), why, "Add it, or correct the reference"));
    }
}

fn of_authorization(view: &View<'_>, key: &Key, policy: &AuthorizationPolicy, problems: &mut Problems) {
    match &policy.target {
        AuthorizationTarget::Server(name) => {
            missing(view, key, Kind::Server, name, "spec.targetRef", problems);
        }
        AuthorizationTarget::Route(kind, name) => {
            missing(view, key, *kind, name, "spec.targetRef", problems);
        }
        AuthorizationTarget::Namespace => {}
    }
    for (i, requirement) in policy.requires.iter().enumerate() {
        let (kind, namespace, name, there) = match requirement {
            Requirement::MeshTls { namespace, name } => {
                let there = view.mesh_tls(&key.cluster, namespace, name).is_some();
                ("MeshTLSAuthentication", namespace, name, there)
            }
            Requirement::Network { namespace, name } => {
                let there = view.network_auth(&key.cluster, namespace, name).is_some();
                ("NetworkAuthentication", namespace, name, there)
            }
            Requirement::Account { .. } => continue,
        };
        if !there {
            problems.push((
                format!("spec.requiredAuthenticationRefs[{i}]"),
                format!("there is no {kind} {namespace}/{name}, so the policy grants nothing"),
                "Add it, or correct the reference",
            ));
        }
    }
}

fn of_service(view: &View<'_>, mesh: &Mesh, service: &Service, problems: &mut Problems) {
    let unassigned = matches!(service.kind, ServiceKind::Cluster { .. }) && view.cluster_ips(service).is_empty();
    if unassigned {
        problems.push((
            "spec.clusterIP".into(),
            "no address of the service range is free".into(),
            "Give one, or configure a larger range",
        ));
    }
    for cluster in strangers(service, mesh) {
        problems.push((
            "metadata.annotations".into(),
            format!("cluster {cluster} is not known, so it has no members there"),
            "Give its folder with --cluster NAME=DIR, or correct the annotation",
        ));
    }
    for (i, port) in service.ports.iter().enumerate() {
        let known = [
            "http",
            "https",
            "tls",
            "grpc",
            "kubernetes.io/h2c",
            "kubernetes.io/ws",
            "kubernetes.io/wss",
            "linkerd.io/opaque",
            "linkerd.io/tcp",
            "tcp",
        ];
        if let Some(p) = port.app_protocol.as_deref().filter(|p| !known.contains(p)) {
            problems.push((
                format!("spec.ports[{i}].appProtocol"),
                format!("{p:?} is not known, so the port carries bytes that nobody looks into"),
                "Remove it, and HTTP is detected",
            ));
        }
    }
}

fn of_route(view: &View<'_>, mesh: &Mesh, key: &Key, route: &Route, problems: &mut Problems) {
    for (i, parent) in route.parents.iter().enumerate() {
        let field = format!("spec.parentRefs[{i}]");
        let at = format!("{}/{}", parent.namespace, parent.name);
        let attached = match parent.kind {
            ParentKind::Service => of_service_parent(view, mesh, key, route, parent),
            ParentKind::EgressNetwork if view.egress(&key.cluster, &parent.namespace, &parent.name).is_none() => {
                Err((format!("there is no EgressNetwork {at}: not attached"), "Add it, or correct the name"))
            }
            ParentKind::EgressNetwork => Ok(()),
            ParentKind::Server => {
                let there = view.servers(&parent.namespace).iter().any(|s| s.head.name == parent.name);
                if there && parent.namespace == key.namespace {
                    Ok(())
                } else {
                    let why = format!("there is no Server {at} in the route's namespace: not attached");
                    Err((why, "Add it, or correct the name"))
                }
            }
        };
        if let Err((why, remedy)) = attached {
            problems.push((field, why, remedy));
        } else if parent.kind == ParentKind::Service
            && route.gateway
            && !route.hosts.is_empty()
            && matches!(route.kind, RouteKind::Http | RouteKind::Grpc)
        {
            problems.push((
                "spec.hostnames".into(),
                "in a mesh the address chooses the Service; hostnames of Gateway API routes are not compared".into(),
                "Match the header Host instead",
            ));
        }
    }
    if let Some(originate) = &route.originate {
        let authorities = originate.authorities.as_ref().map(std::slice::from_ref);
        unusable(view, key, authorities, "metadata.annotations", problems);
    }
    of_backends(view, key, route, problems);
}

/// Why a route does not stand on a Service, and what to do.
fn of_service_parent(
    view: &View<'_>,
    mesh: &Mesh,
    key: &Key,
    route: &Route,
    parent: &ParentRef,
) -> Result<(), (String, &'static str)> {
    let at = format!("{}/{}", parent.namespace, parent.name);
    let Some(service) = view.service(&key.cluster, &parent.namespace, &parent.name) else {
        return Err((format!("there is no Service {at}: not attached"), "Add it, or correct the name"));
    };
    if !matches!(service.kind, ServiceKind::Cluster { .. }) {
        let why = format!("Service {at} is headless or of type ExternalName: not attached");
        return Err((why, "Routes need a Service with a cluster address"));
    }
    let mut ports = service
        .ports
        .iter()
        .filter(|p| parent.port.is_none_or(|n| n == p.port) && parent.section.as_ref().is_none_or(|s| *s == p.name))
        .peekable();
    if ports.peek().is_none() {
        return Err((format!("Service {at} has no such port: not attached"), "Name one of its ports"));
    }
    if !ports.any(|port| carries(view, mesh, service, port, route.kind)) {
        let why = format!("no such port of Service {at} carries what {} matches: not attached", key.kind.name());
        return Err((why, "Change the port's appProtocol, or the opaque ports"));
    }
    let goes_before = |r: &Route| {
        let same = |p: &ParentRef| p.kind == parent.kind && p.name == parent.name && p.port == parent.port;
        r.kind < route.kind && r.head.namespace == route.head.namespace && r.parents.iter().any(same)
    };
    let others = view.routes(ParentKind::Service, &parent.namespace, &parent.name);
    match others.into_iter().find(|(_, r)| goes_before(r)) {
        Some((other, _)) => Err((
            format!("{other} stands on the same port and is of a kind that goes before"),
            "Only routes of one kind apply to a port",
        )),
        None => Ok(()),
    }
}

/// Notes authorities that are not there: what should speak TLS with them fails.
fn unusable(view: &View<'_>, key: &Key, authorities: Option<&[Arc<str>]>, field: &str, problems: &mut Problems) {
    if let Roots::Unusable(why) = view.roots(&key.namespace, authorities) {
        problems.push((field.into(), why.to_string(), "Add it; until then connections fail, and are never plain text"));
    }
}

fn of_rate_limit(view: &View<'_>, key: &Key, limit: &RateLimit, problems: &mut Problems) {
    let (kind, name) = match &limit.target {
        RateLimitTarget::Server(name) => (Kind::Server, name),
        RateLimitTarget::Service(name) => (Kind::Service, name),
        RateLimitTarget::Egress(name) => (Kind::EgressNetwork, name),
    };
    missing(view, key, kind, name, "spec.targetRef", problems);
    if let Some(Object::Server(server)) = view.object(&key.cluster, kind, &key.namespace, name).map(|o| &**o)
        && let ProxyProtocol::Opaque | ProxyProtocol::Tls = server.protocol
    {
        problems.push((
            "spec.targetRef".into(),
            format!("Server {}/{name} is opaque or TLS: it has no requests to limit", key.namespace),
            "Declare the protocol of the Server, or remove the limit",
        ));
    }
}

/// Backends that can't be, and take their share with an error.
fn of_backends(view: &View<'_>, key: &Key, route: &Route, problems: &mut Problems) {
    let share = match route.kind {
        RouteKind::Http => "Its share of requests is answered with 500",
        RouteKind::Grpc => "Its share of calls is UNAVAILABLE",
        RouteKind::Tls | RouteKind::Tcp => "Its share of connections is refused",
    };
    for (i, rule) in route.rules.iter().enumerate() {
        let refs = rule.backends.iter().enumerate();
        let refs = refs.map(|(j, b)| (format!("spec.rules[{i}].backendRefs[{j}]"), b, share));
        let mirrors = rule.filters.iter().enumerate().filter_map(|(j, f)| match f {
            FilterSpec::Mirror { backend, .. } => {
                Some((format!("spec.rules[{i}].filters[{j}].requestMirror"), backend, "Nothing is mirrored"))
            }
            FilterSpec::Ready(_) | FilterSpec::Redirect { .. } => None,
        });
        for (field, backend, remedy) in refs.chain(mirrors) {
            if backend.kind != BackendKind::Service {
                continue;
            }
            let parent = route.parents.first().map(|p| p.namespace.clone());
            let default = if route.gateway { None } else { parent };
            let namespace = backend.namespace.clone().or(default).unwrap_or_else(|| key.namespace.clone());
            let service = view.service(&key.cluster, &namespace, &backend.name);
            let why = match service {
                None => format!("there is no Service {namespace}/{}", backend.name),
                Some(s) if s.kind == ServiceKind::External => {
                    format!("Service {namespace}/{} is of type ExternalName", backend.name)
                }
                Some(s) if s.ports.iter().all(|p| Some(p.port) != backend.port) => {
                    format!("Service {namespace}/{} has no port {}", backend.name, backend.port.unwrap_or_default())
                }
                Some(_) => continue,
            };
            problems.push((field, why, remedy));
        }
    }
}
