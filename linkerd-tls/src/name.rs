//! Names of workloads: DNS-like identities, SPIFFE identities, and the names asked for in SNI.

use std::{fmt, str::FromStr, sync::Arc};

/// A workload's identity: a DNS-like name without a trailing dot, lower case, or an absolute URI (SPIFFE).
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Id(Repr);

#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Repr {
    Dns(Arc<str>),
    Uri(Arc<str>),
}

/// The name that a TLS client asks for: a DNS name, lower case, without a trailing dot.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ServerName(Arc<str>);

/// A text that is no name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is neither a DNS name without trailing dot nor an absolute URI")]
pub struct InvalidName(pub String);

impl Id {
    /// The identity as it is printed.
    pub fn as_str(&self) -> &str {
        match &self.0 {
            Repr::Dns(s) | Repr::Uri(s) => s,
        }
    }

    /// Whether it is a URI (SPIFFE) rather than a DNS-like name.
    pub fn is_uri(&self) -> bool {
        matches!(self.0, Repr::Uri(_))
    }

    /// The SNI for a DNS-like identity; a URI has none of its own.
    pub fn to_server_name(&self) -> Option<ServerName> {
        match &self.0 {
            Repr::Dns(s) => Some(ServerName(s.clone())),
            Repr::Uri(_) => None,
        }
    }
}

impl FromStr for Id {
    type Err = InvalidName;

    fn from_str(s: &str) -> Result<Self, Self::Err> {
        if is_dns_name(s) && !s.ends_with('.') {
            return Ok(Self(Repr::Dns(s.to_ascii_lowercase().into())));
        }
        match s.split_once("://") {
            Some((scheme, rest))
                if !scheme.is_empty()
                    && scheme.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'+' | b'-' | b'.'))
                    && !rest.is_empty()
                    && rest.bytes().all(|b| b.is_ascii_graphic()) =>
            {
                Ok(Self(Repr::Uri(s.into())))
            }
            _ => Err(InvalidName(s.to_string())),
        }
    }
}

impl fmt::Display for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl ServerName {
    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for ServerName {
    type Err = InvalidName;

    fn from_str(s: &str) -> Result<Self, Self::Err> {
        if is_dns_name(s) {
            Ok(Self(s.trim_end_matches('.').to_ascii_lowercase().into()))
        } else {
            Err(InvalidName(s.to_string()))
        }
    }
}

impl fmt::Display for ServerName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Letters, digits, `-` and `_` in labels of 1 to 63; at most 253 bytes; the last label not all digits; one trailing
/// dot allowed (contract.md 1.0).
fn is_dns_name(s: &str) -> bool {
    let s = s.strip_suffix('.').unwrap_or(s);
    let label = |l: &str| {
        (1..=63).contains(&l.len())
            && !l.starts_with('-')
            && !l.ends_with('-')
            && l.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
    };
    !s.is_empty()
        && s.len() <= 253
        && s.split('.').all(label)
        && !s.rsplit('.').next().is_some_and(|l| l.bytes().all(|b| b.is_ascii_digit()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dns_like_and_spiffe_identities_parse() {
        let id: Id = "Web.Shop.serviceaccount.identity.linkerd.cluster.local".parse().expect("a DNS name");
        assert_eq!(id.as_str(), "web.shop.serviceaccount.identity.linkerd.cluster.local");
        assert!("spiffe://root/wl".parse::<Id>().expect("a URI").is_uri());
        for bad in ["", "a.", "a..b", "-a", "1.2.3.4", "*.a", "spiffe://", "a b"] {
            assert!(bad.parse::<Id>().is_err(), "{bad}");
        }
    }

    #[test]
    fn server_names_lose_their_trailing_dot() {
        assert_eq!("A.b.".parse::<ServerName>().expect("a DNS name").as_str(), "a.b");
    }
}
