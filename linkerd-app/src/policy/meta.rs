//! Names of the resources that policies come from. They label metrics, logs and error texts.

use std::{fmt, sync::Arc};

/// The configured resource that caused a policy, a route, a backend or an authorization.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Meta {
    /// Made up by the proxy or the control plane; `kind` is printed as `default`, group and namespace as empty.
    Default {
        /// For instance `all-unauthenticated`, `http`, `fallback`, `probe`.
        name: Arc<str>,
    },
    /// A Kubernetes resource.
    Resource(Arc<Resource>),
}

/// A Kubernetes resource's coordinates.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Resource {
    /// API group; `core` for Services (outbound), `policy.linkerd.io` for Servers.
    pub group: String,
    /// Kind as sent by the source, case kept (`Service`, `HTTPRoute`, `server`).
    pub kind: String,
    /// Namespace; empty where the source does not tell (inbound).
    pub namespace: String,
    /// Name.
    pub name: String,
    /// Section (a named port or rule); empty if none.
    pub section: String,
    /// Port number, if one was named. Printed as digits or as an empty label, never as 0.
    pub port: Option<u16>,
}

impl Meta {
    /// A synthetic resource.
    pub fn default(name: impl Into<Arc<str>>) -> Self {
        Self::Default { name: name.into() }
    }

    /// A Kubernetes resource.
    pub fn resource(group: &str, kind: &str, namespace: &str, name: &str, port: Option<u16>) -> Self {
        Self::Resource(Arc::new(Resource {
            group: group.to_string(),
            kind: kind.to_string(),
            namespace: namespace.to_string(),
            name: name.to_string(),
            section: String::new(),
            port,
        }))
    }

    /// API group, empty for synthetic resources.
    pub fn group(&self) -> &str {
        match self {
            Self::Default { .. } => "",
            Self::Resource(r) => &r.group,
        }
    }

    /// Kind, `default` for synthetic resources.
    pub fn kind(&self) -> &str {
        match self {
            Self::Default { .. } => "default",
            Self::Resource(r) => &r.kind,
        }
    }

    /// Namespace, empty for synthetic resources.
    pub fn namespace(&self) -> &str {
        match self {
            Self::Default { .. } => "",
            Self::Resource(r) => &r.namespace,
        }
    }

    /// Name.
    pub fn name(&self) -> &str {
        match self {
            Self::Default { name } => name,
            Self::Resource(r) => &r.name,
        }
    }

    /// Section, empty if none.
    pub fn section(&self) -> &str {
        match self {
            Self::Default { .. } => "",
            Self::Resource(r) => &r.section,
        }
    }

    /// Port, if one was named.
    pub fn port(&self) -> Option<u16> {
        match self {
            Self::Default { .. } => None,
            Self::Resource(r) => r.port,
        }
    }
}

/// `Kind.namespace.name[:port]`, or `default.name` (behaviour.md D.4).
impl fmt::Display for Meta {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default { name } => write!(f, "default.{name}"),
            Self::Resource(r) => {
                // The resources of a server's policy come without their namespace: it is that of the workload.
                match &*r.namespace {
                    "" => write!(f, "{}.{}", r.kind, r.name)?,
                    namespace => write!(f, "{}.{namespace}.{}", r.kind, r.name)?,
                }
                if let Some(port) = r.port {
                    write!(f, ":{port}")?;
                }
                Ok(())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn display_is_what_error_headers_carry() {
        let svc = Meta::resource("core", "Service", "ns", "web", Some(80));
        assert_eq!(svc.to_string(), "Service.ns.web:80");
        assert_eq!(Meta::resource("policy.linkerd.io", "server", "", "web", None).to_string(), "server.web");
        assert_eq!(Meta::default("http").to_string(), "default.http");
    }
}
