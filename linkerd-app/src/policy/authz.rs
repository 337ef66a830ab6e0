//! Who may connect or call: networks and mesh identities (behaviour.md C.4).

use super::Meta;
use ipnet::IpNet;
use linkerd_tls::Id;
use std::{collections::BTreeSet, net::IpAddr, sync::Arc};

/// One way in. A client is authorized when it comes from one of the networks and authenticates as demanded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Authorization {
    /// Sources; a client must be inside one of them.
    pub networks: Vec<Network>,
    /// What the client must prove.
    pub authentication: Authentication,
    /// The resource that grants it.
    pub meta: Meta,
    /// Set on the stand-in for an `audit` policy: it lets everybody pass, each use is counted and logged as what
    /// would have been refused.
    pub audit: bool,
}

/// A block of addresses with exceptions.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Network {
    /// The block.
    pub net: IpNet,
    /// Blocks inside `net` that are excluded.
    pub except: Vec<IpNet>,
}

/// What a client must prove.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Authentication {
    /// Nothing.
    Unauthenticated,
    /// That the connection is mesh TLS terminated by this proxy; a client certificate is not needed.
    TlsUnauthenticated,
    /// A verified client identity.
    TlsAuthenticated {
        /// Exact identities.
        identities: BTreeSet<Id>,
        /// Suffixes of DNS-like identities.
        suffixes: Vec<Suffix>,
    },
}

/// A suffix of DNS-like identities: `.a.b` at the end. The empty suffix stands for any verified identity.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Suffix(Arc<str>);

/// What is known of a client's TLS when it is authorized.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum ClientTls {
    /// Mesh TLS, terminated here; the identity if the client had a certificate.
    Terminated(Option<Id>),
    /// A ClientHello for another name, passed on untouched. Satisfies no TLS authorization.
    Passthru {
        /// The name that the client asked for.
        sni: Arc<str>,
    },
    /// No TLS, or the port is not looked at.
    None(NoTls),
}

/// Why a connection has no mesh TLS; the value of the label `no_tls_reason`.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum NoTls {
    /// The client sent no ClientHello.
    NoTlsFromRemote,
    /// The policy says opaque, so nothing was detected.
    PortSkipped,
    /// The connection stays in the pod.
    Loopback,
    /// Discovery gave no identity for the endpoint.
    NotProvidedByServiceDiscovery,
    /// An ingress request without an override.
    IngressWithoutOverride,
}

impl NoTls {
    /// The label's value (metrics.md 3.2).
    pub fn as_str(self) -> &'static str {
        match self {
            Self::NoTlsFromRemote => "no_tls_from_remote",
            Self::PortSkipped => "port_skipped",
            Self::Loopback => "loopback",
            Self::NotProvidedByServiceDiscovery => "not_provided_by_service_discovery",
            Self::IngressWithoutOverride => "ingress_without_override",
        }
    }
}

impl ClientTls {
    /// The verified client identity.
    pub fn client_id(&self) -> Option<&Id> {
        match self {
            Self::Terminated(id) => id.as_ref(),
            Self::Passthru { .. } | Self::None(_) => None,
        }
    }
}

impl Suffix {
    /// From the labels that must end an identity; none = any identity.
    pub fn new<'a>(parts: impl IntoIterator<Item = &'a str>) -> Self {
        let mut s = String::new();
        for part in parts {
            s.push('.');
            s.push_str(&part.to_ascii_lowercase());
        }
        Self(s.into())
    }

    /// Whether a verified identity ends so. The empty suffix takes SPIFFE identities too: `all-authenticated` means
    /// any verified client (contract.md 8, wart 17).
    pub fn matches(&self, id: &Id) -> bool {
        self.0.is_empty() || (!id.is_uri() && id.as_str().ends_with(&*self.0))
    }
}

impl Network {
    /// A block without exceptions.
    pub fn new(net: IpNet) -> Self {
        Self { net, except: Vec::new() }
    }

    /// Every IPv4 and IPv6 address.
    pub fn all() -> Vec<Self> {
        use std::net::{Ipv4Addr, Ipv6Addr};
        let v4 = ipnet::Ipv4Net::new_assert(Ipv4Addr::UNSPECIFIED, 0);
        let v6 = ipnet::Ipv6Net::new_assert(Ipv6Addr::UNSPECIFIED, 0);
        vec![Self::new(v4.into()), Self::new(v6.into())]
    }

    /// Whether the address is in the block and in none of its exceptions.
    pub fn contains(&self, ip: IpAddr) -> bool {
        self.net.contains(&ip) && !self.except.iter().any(|net| net.contains(&ip))
    }
}

impl Authorization {
    /// Whether a client at this address with this TLS state is let in.
    pub fn permits(&self, client: IpAddr, tls: &ClientTls) -> bool {
        self.networks.iter().any(|net| net.contains(client)) && self.authentication.permits(tls)
    }
}

impl Authentication {
    /// Whether the TLS state proves what is demanded.
    pub fn permits(&self, tls: &ClientTls) -> bool {
        match (self, tls) {
            (Self::Unauthenticated, _) => true,
            (Self::TlsUnauthenticated, ClientTls::Terminated(_)) => true,
            (Self::TlsAuthenticated { identities, suffixes }, ClientTls::Terminated(Some(id))) => {
                identities.contains(id) || suffixes.iter().any(|s| s.matches(id))
            }
            (Self::TlsUnauthenticated | Self::TlsAuthenticated { .. }, _) => false,
        }
    }

    /// Any verified identity.
    pub fn any_identity() -> Self {
        Self::TlsAuthenticated { identities: BTreeSet::new(), suffixes: vec![Suffix::new([])] }
    }
}
