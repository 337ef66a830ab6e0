//! Names of resources.

use super::{Inside, Invalid, port};
use crate::policy::{Meta, meta::Resource};
use linkerd2_proxy_api::meta as api;
use std::{collections::HashMap, sync::Arc};

/// Metadata of outbound policies: group, kind, namespace and name are all needed (behaviour.md D.4).
pub(crate) fn strict(message: api::Metadata) -> Result<Meta, Invalid> {
    convert(message, |r| {
        [("group", &r.group), ("kind", &r.kind), ("namespace", &r.namespace), ("name", &r.name)].to_vec()
    })
}

/// Metadata of inbound policies, which the policy controller sends without namespaces.
pub(crate) fn lenient(message: api::Metadata) -> Result<Meta, Invalid> {
    convert(message, |r| [("kind", &r.kind), ("name", &r.name)].to_vec())
}

fn convert(
    message: api::Metadata,
    needed: impl for<'a> Fn(&'a api::Resource) -> Vec<(&'static str, &'a String)>,
) -> Result<Meta, Invalid> {
    match message.kind {
        None => Err(Invalid::new("missing").inside("kind")),
        Some(api::metadata::Kind::Default(name)) if name.is_empty() => Err(Invalid::new("empty").inside("default")),
        Some(api::metadata::Kind::Default(name)) => Ok(Meta::default(name)),
        Some(api::metadata::Kind::Resource(resource)) => {
            if let Some((field, _)) = needed(&resource).into_iter().find(|(_, value)| value.is_empty()) {
                return Err(Invalid::new("missing").inside(field).inside("resource"));
            }
            let api::Resource { group, kind, name, namespace, section, port: number } = resource;
            let port = port(number).inside("port").inside("resource")?;
            Ok(Meta::Resource(Arc::new(Resource { group, kind, namespace, name, section, port })))
        }
    }
}

/// Metadata from the labels that old messages carry: `group`, `kind`, `name` (behaviour.md C.2, C.4).
pub(crate) fn labels(
    labels: &HashMap<String, String>,
    default_group: &str,
    default_kind: &str,
) -> Result<Meta, Invalid> {
    let get = |key: &str, default: &str| labels.get(key).map_or(default, String::as_str).to_string();
    let name = get("name", "");
    if name.is_empty() {
        return Err(Invalid::new("missing").inside("name"));
    }
    if let Some(name) = name.strip_prefix("default:") {
        return Ok(Meta::default(name));
    }
    let (group, kind) = (get("group", default_group), get("kind", default_kind));
    if group.is_empty() && kind == "default" {
        return Ok(Meta::default(name));
    }
    Ok(Meta::resource(&group, &kind, "", &name, None))
}

/// The Service that a name such as `web.shop.svc.cluster.local` stands for; `unknown` if it is no Service's name.
pub(crate) fn service(name: &str, port: u16) -> Meta {
    let mut labels = name.split('.');
    match (labels.next(), labels.next(), labels.next()) {
        (Some(service), Some(namespace), Some("svc")) if !service.is_empty() && !namespace.is_empty() => {
            Meta::resource("core", "Service", namespace, service, Some(port))
        }
        _ => Meta::default("unknown"),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A resource's metadata, for tests.
    pub(crate) fn resource(group: &str, kind: &str, namespace: &str, name: &str) -> api::Metadata {
        let (group, kind, namespace, name) = (group.into(), kind.into(), namespace.into(), name.into());
        let resource = api::Resource { group, kind, name, namespace, section: String::new(), port: 0 };
        api::Metadata { kind: Some(api::metadata::Kind::Resource(resource)) }
    }

    /// Default metadata, for tests.
    pub(crate) fn default(name: &str) -> api::Metadata {
        api::Metadata { kind: Some(api::metadata::Kind::Default(name.into())) }
    }

    #[track_caller]
    fn check_labels(pairs: &[(&str, &str)], expected: Option<Meta>) {
        let map = pairs.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
        assert_eq!(labels(&map, "policy.linkerd.io", "server").ok(), expected);
    }

    #[test]
    fn labels_name_resources_and_defaults() {
        let server = Meta::resource("policy.linkerd.io", "server", "", "web", None);
        check_labels(&[("name", "web")], Some(server));
        check_labels(&[("group", ""), ("kind", "default"), ("name", "deny")], Some(Meta::default("deny")));
        check_labels(&[("name", "default:deny")], Some(Meta::default("deny")));
        check_labels(&[("kind", "server")], None);
    }

    #[test]
    fn outbound_resources_need_every_coordinate() {
        assert_eq!(strict(default("x")).unwrap(), Meta::default("x"));
        let meta = strict(resource("core", "Service", "ns", "web")).unwrap();
        assert_eq!(meta.to_string(), "Service.ns.web");
        let text = strict(resource("core", "Service", "", "web")).unwrap_err().to_string();
        assert_eq!(text, "resource.namespace: missing");
        assert!(strict(api::Metadata { kind: None }).is_err());
        assert!(lenient(resource("policy.linkerd.io", "server", "", "web")).is_ok());
        assert!(lenient(resource("policy.linkerd.io", "server", "", "")).is_err());
    }

    #[test]
    fn service_names_become_services() {
        assert_eq!(service("web.shop.svc.cluster.local", 80).to_string(), "Service.shop.web:80");
        assert_eq!(service("example.com", 80), Meta::default("unknown"));
    }
}
