//! Which requests a tap wants to see.

use super::About;
use http::{Method, Request};
use ipnet::IpNet;
use linkerd2_proxy_api::{
    http_types::{self, scheme},
    tap::observe_request::{
        self as api,
        r#match::{Http, Label, Match, Tcp, http as on, tcp},
    },
};
use std::{
    borrow::Cow,
    net::{IpAddr, SocketAddr},
    ops::RangeInclusive,
};

/// A condition on a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Filter {
    All(Vec<Filter>),
    Any(Vec<Filter>),
    Not(Box<Filter>),
    Source(Address),
    Destination(Address),
    DestinationLabel(String, String),
    RouteLabel(String, String),
    Scheme(String),
    Method(Method),
    Authority(Text),
    Path(Text),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Address {
    In(IpNet),
    Ports(RangeInclusive<u16>),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Text {
    Exact(String),
    Prefix(String),
}

/// Why a condition cannot be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Invalid {
    #[error("a match is missing")]
    Missing,
    #[error("{0} is no netmask of {1}; write 1 to the length of the address")]
    Netmask(u32, IpAddr),
    #[error("{0} to {1} are no ports; write 1 to 65535")]
    Ports(u32, u32),
    #[error("{0}")]
    Http(String),
}

impl Filter {
    /// Whether a request fulfils it.
    pub(super) fn matches<B>(&self, req: &Request<B>, about: &About) -> bool {
        match self {
            Self::All(all) => all.iter().all(|filter| filter.matches(req, about)),
            Self::Any(any) => any.iter().any(|filter| filter.matches(req, about)),
            Self::Not(not) => !not.matches(req, about),
            Self::Source(address) => about.source.is_some_and(|source| address.contains(source)),
            Self::Destination(address) => address.contains(about.destination),
            Self::DestinationLabel(key, value) => about.destination_labels.get(key) == Some(value),
            Self::RouteLabel(key, value) => about.route_labels.get(key) == Some(value),
            Self::Scheme(scheme) => req.uri().scheme_str().unwrap_or("http") == scheme,
            Self::Method(method) => req.method() == method,
            Self::Authority(text) => req.uri().authority().is_some_and(|authority| text.matches(authority.as_str())),
            Self::Path(text) => text.matches(req.uri().path()),
        }
    }
}

impl Address {
    fn contains(&self, addr: SocketAddr) -> bool {
        match self {
            Self::In(net) => net.contains(&addr.ip()),
            Self::Ports(ports) => ports.contains(&addr.port()),
        }
    }
}

impl Text {
    fn matches(&self, text: &str) -> bool {
        match self {
            Self::Exact(exact) => text == exact,
            Self::Prefix(prefix) => text.starts_with(prefix.as_str()),
        }
    }
}

impl TryFrom<api::Match> for Filter {
    type Error = Invalid;

    fn try_from(wanted: api::Match) -> Result<Self, Invalid> {
        let each = |seq: api::r#match::Seq| seq.matches.into_iter().map(Self::try_from).collect::<Result<_, _>>();
        Ok(match wanted.r#match.ok_or(Invalid::Missing)? {
            Match::All(all) => Self::All(each(all)?),
            Match::Any(any) => Self::Any(each(any)?),
            Match::Not(not) => Self::Not(Box::new(Self::try_from(*not)?)),
            Match::Source(tcp) => Self::Source(tcp.try_into()?),
            Match::Destination(tcp) => Self::Destination(tcp.try_into()?),
            Match::DestinationLabel(Label { key, value }) => Self::DestinationLabel(key, value),
            Match::RouteLabel(Label { key, value }) => Self::RouteLabel(key, value),
            Match::Http(Http { r#match }) => match r#match.ok_or(Invalid::Missing)? {
                on::Match::Scheme(scheme) => Self::Scheme(name(&scheme)?),
                on::Match::Method(method) => Self::Method(
                    method.try_into().map_err(|error: http_types::InvalidMethod| Invalid::Http(error.to_string()))?,
                ),
                on::Match::Authority(text) => Self::Authority(text.try_into()?),
                on::Match::Path(text) => Self::Path(text.try_into()?),
            },
        })
    }
}

fn name(scheme: &http_types::Scheme) -> Result<String, Invalid> {
    let kind: &scheme::Type = scheme.r#type.as_ref().ok_or(Invalid::Missing)?;
    let name: Result<Cow<'static, str>, _> = kind.try_into();
    name.map(Cow::into_owned).map_err(|error: http_types::InvalidScheme| Invalid::Http(error.to_string()))
}

impl TryFrom<on::StringMatch> for Text {
    type Error = Invalid;

    fn try_from(text: on::StringMatch) -> Result<Self, Invalid> {
        Ok(match text.r#match.ok_or(Invalid::Missing)? {
            on::string_match::Match::Exact(exact) => Self::Exact(exact),
            on::string_match::Match::Prefix(prefix) => Self::Prefix(prefix),
        })
    }
}

impl TryFrom<Tcp> for Address {
    type Error = Invalid;

    fn try_from(tcp: Tcp) -> Result<Self, Invalid> {
        match tcp.r#match.ok_or(Invalid::Missing)? {
            tcp::Match::Netmask(tcp::Netmask { ip, mask }) => {
                let ip = ip.and_then(|ip| IpAddr::try_from(ip).ok()).ok_or(Invalid::Missing)?;
                let bits = u8::try_from(mask).ok().filter(|bits| *bits > 0);
                let net = bits.and_then(|bits| IpNet::new(ip, bits).ok());
                net.map(Self::In).ok_or(Invalid::Netmask(mask, ip))
            }
            tcp::Match::Ports(tcp::PortRange { min, max }) => {
                // Absent is 0, and as the other is.
                let or = |port: u32, other: u32| u16::try_from(if port == 0 { other } else { port }).ok();
                match (or(min, max), or(max, min)) {
                    (Some(from @ 1..), Some(to)) if from <= to => Ok(Self::Ports(from..=to)),
                    _ => Err(Invalid::Ports(min, max)),
                }
            }
        }
    }
}
