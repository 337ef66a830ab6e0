//! Label sets as they are printed, written once when a handle is made (metrics.md 3).
//!
//! A set is keyed by its whole printed text, so that two resources of one name in different namespaces never share
//! numbers. Values are escaped here; names that come from discovery are reduced to what parsers accept.

use crate::policy::{
    Meta,
    authz::{ClientTls, NoTls},
    endpoint::EndpointMeta,
};
use linkerd_tls::Id;
use std::{fmt::Write as _, net::SocketAddr, sync::Arc};

/// Which half of the proxy.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Hash)]
pub enum Direction {
    /// Towards the local application, and the admin server.
    Inbound,
    /// Away from the local application.
    Outbound,
}

impl Direction {
    /// The label's value.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Inbound => "inbound",
            Self::Outbound => "outbound",
        }
    }
}

/// Whose connection.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Hash)]
pub enum Peer {
    /// Accepted by the proxy.
    Src,
    /// Opened by the proxy.
    Dst,
}

/// TLS of either side.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum TlsLabels {
    /// Of an accepted connection.
    Accepted(ClientTls),
    /// Of an opened connection: the identity demanded of the server, or why none is.
    Connected(Result<Id, NoTls>),
}

/// The four connection label sets of metrics.md 5.6, by direction and peer. What a set does not print is ignored.
#[derive(Clone, Debug)]
pub struct ConnLabels {
    /// Which half of the proxy.
    pub direction: Direction,
    /// Whose connection.
    pub peer: Peer,
    /// `target_addr`, `target_ip`, `target_port`; none for inbound `dst`.
    pub target: Option<SocketAddr>,
    /// TLS.
    pub tls: TlsLabels,
    /// Inbound `src`: the policy's Server and the port it was looked up for.
    pub srv: Option<(Meta, u16)>,
    /// Outbound `dst`: the name used for endpoint discovery, see [`authority`].
    pub authority: Option<Arc<str>>,
    /// Outbound `dst`: discovery's labels and the zone.
    pub dst: Option<Arc<EndpointMeta>>,
}

/// Who HTTP requests go to: EP-IN and EP-OUT of metrics.md 3.1.
#[derive(Clone, Debug)]
pub enum EndpointLabels {
    /// The local application, or the admin server.
    Inbound {
        /// Logical name, only with the `unsafe` authority setting.
        authority: Option<Arc<str>>,
        /// Original destination.
        target: SocketAddr,
        /// The client's TLS.
        tls: ClientTls,
        /// The policy's Server.
        srv: Meta,
        /// The port the policy was looked up for.
        srv_port: u16,
        /// Matched route.
        route: Meta,
        /// Authorization that admitted the request.
        authz: Meta,
    },
    /// A replica.
    Outbound {
        /// Name used for endpoint discovery, see [`authority`]; none for plain forwards.
        authority: Option<Arc<str>>,
        /// The replica's address.
        target: SocketAddr,
        /// The identity demanded, or why none is.
        tls: Result<Id, NoTls>,
        /// Discovery's labels.
        dst: Arc<EndpointMeta>,
    },
}

/// An accepted inbound connection as its policy sees it: TGT, SRV and TLS-S of metrics.md 5.8.
#[derive(Clone, Debug)]
pub struct ServerLabels {
    /// Original destination.
    pub target: SocketAddr,
    /// The policy's Server.
    pub srv: Meta,
    /// The port the policy was looked up for.
    pub srv_port: u16,
    /// The client's TLS.
    pub tls: ClientTls,
}

/// PR-IN of metrics.md 3.1.
#[derive(Clone, Debug)]
pub struct InboundRouteLabels {
    /// The policy's Server.
    pub parent: Meta,
    /// The port the policy was looked up for.
    pub parent_port: u16,
    /// Matched route.
    pub route: Meta,
}

/// RH of metrics.md 5.5; TLS routes carry the same labels.
#[derive(Clone, Debug)]
pub struct RouteLabels {
    /// The resource the client policy was found for.
    pub parent: Meta,
    /// Matched route.
    pub route: Meta,
    /// The request's host if it is a DNS name, or the SNI; none unless the hostname setting is on.
    pub hostname: Option<Arc<str>>,
}

/// PRB of metrics.md 5.5.
#[derive(Clone, Debug)]
pub struct BackendLabels {
    /// The resource the client policy was found for.
    pub parent: Meta,
    /// Matched route.
    pub route: Meta,
    /// The backend of its rule.
    pub backend: Meta,
}

/// A route of a ServiceProfile: RP of metrics.md 5.4.
#[derive(Clone, Debug)]
pub struct ProfileRouteLabels {
    /// Which half of the proxy.
    pub direction: Direction,
    /// Logical address, `name:port`.
    pub dst: Arc<str>,
    /// The route's labels, printed with the prefix `rt_`; empty for the catch-all.
    pub labels: Vec<(Arc<str>, Arc<str>)>,
}

/// The label `authority` of outbound families: `name:port` without a trailing dot, without the port when it is 80.
pub fn authority(name: &str, port: u16) -> Arc<str> {
    let name = name.trim_end_matches('.');
    if port == 80 { name.into() } else { format!("{name}:{port}").into() }
}

/// A printed label set: `a="1",b="2"`.
#[derive(Clone, Debug, Default)]
pub(super) struct Labels {
    pub(super) text: String,
    /// Where the last label's value begins, inside its quotes.
    pub(super) last_value: usize,
    /// How much of the text is from closed sets and stays when the family is full.
    closed: usize,
}

impl Labels {
    pub(super) fn new() -> Self {
        Self::default()
    }

    /// Adds a label whose name is legal.
    pub(super) fn push(mut self, name: &str, value: &str) -> Self {
        if !self.text.is_empty() {
            self.text.push(',');
        }
        self.text.push_str(name);
        self.text.push_str("=\"");
        self.last_value = self.text.len();
        escape(&mut self.text, value);
        self.text.push('"');
        self
    }

    /// Adds a label whose values are a closed set of two; only before all others.
    fn push_closed(self, name: &str, value: &str) -> Self {
        let mut labels = self.push(name, value);
        labels.closed = labels.text.len();
        labels
    }

    pub(super) fn direction(self, direction: Direction) -> Self {
        self.push_closed("direction", direction.as_str())
    }

    pub(super) fn peer(self, peer: Peer) -> Self {
        self.push_closed(
            "peer",
            match peer {
                Peer::Src => "src",
                Peer::Dst => "dst",
            },
        )
    }

    pub(super) fn opt(self, name: &str, value: Option<&str>) -> Self {
        match value {
            Some(value) => self.push(name, value),
            None => self,
        }
    }

    pub(super) fn port(self, name: &str, port: Option<u16>) -> Self {
        match port {
            Some(port) => self.push(name, &port.to_string()),
            None => self.push(name, ""),
        }
    }

    pub(super) fn target(self, addr: SocketAddr) -> Self {
        self.push("target_addr", &addr.to_string())
            .push("target_ip", &addr.ip().to_string())
            .push("target_port", &addr.port().to_string())
    }

    pub(super) fn srv(self, srv: &Meta, port: u16) -> Self {
        self.push("srv_group", srv.group())
            .push("srv_kind", srv.kind())
            .push("srv_name", srv.name())
            .push("srv_port", &port.to_string())
    }

    pub(super) fn route_in(self, route: &Meta) -> Self {
        self.push("route_group", route.group()).push("route_kind", route.kind()).push("route_name", route.name())
    }

    pub(super) fn authz(self, authz: &Meta) -> Self {
        self.push("authz_group", authz.group()).push("authz_kind", authz.kind()).push("authz_name", authz.name())
    }

    pub(super) fn parent(self, parent: &Meta) -> Self {
        self.push("parent_group", parent.group())
            .push("parent_kind", parent.kind())
            .push("parent_namespace", parent.namespace())
            .push("parent_name", parent.name())
            .port("parent_port", parent.port())
            .push("parent_section_name", parent.section())
    }

    pub(super) fn route_out(self, route: &Meta) -> Self {
        self.push("route_group", route.group())
            .push("route_kind", route.kind())
            .push("route_namespace", route.namespace())
            .push("route_name", route.name())
    }

    pub(super) fn backend(self, backend: &Meta) -> Self {
        self.push("backend_group", backend.group())
            .push("backend_kind", backend.kind())
            .push("backend_namespace", backend.namespace())
            .push("backend_name", backend.name())
            .port("backend_port", backend.port())
            .push("backend_section_name", backend.section())
    }

    pub(super) fn client_tls(self, tls: &ClientTls) -> Self {
        match tls {
            ClientTls::Terminated(id) => self.push("tls", "true").push("client_id", id.as_ref().map_or("", Id::as_str)),
            ClientTls::Passthru { sni } => self.push("tls", "opaque").push("sni", sni),
            ClientTls::None(why) => self.no_tls(*why),
        }
    }

    pub(super) fn server_tls(self, tls: &Result<Id, NoTls>) -> Self {
        match tls {
            Ok(id) => self.push("tls", "true").push("server_id", id.as_str()),
            Err(why) => self.no_tls(*why),
        }
    }

    fn no_tls(self, why: NoTls) -> Self {
        self.push("tls", "no_identity").push("no_tls_reason", why.as_str())
    }

    /// Labels with names from outside, prefixed. A name that is already there after reduction is left out, since a
    /// duplicate would cost the whole scrape.
    pub(super) fn prefixed<'a>(
        mut self,
        prefix: &str,
        labels: impl IntoIterator<Item = (&'a Arc<str>, &'a Arc<str>)>,
    ) -> Self {
        let mut seen: Vec<String> = Vec::new();
        for (key, value) in labels {
            let legal = key.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '_' });
            let name: String = prefix.chars().chain(legal).collect();
            if !seen.contains(&name) {
                self = self.push(&name, value);
                seen.push(name);
            }
        }
        self
    }

    /// The set that takes what comes after the family's bound.
    pub(super) fn overflow(&self) -> Self {
        let closed = Self { text: self.text[..self.closed].to_string(), last_value: 0, closed: self.closed };
        closed.push("series", "other")
    }
}

impl ConnLabels {
    pub(super) fn labels(&self) -> Labels {
        let labels = Labels::new().direction(self.direction).peer(self.peer);
        let tls = |labels: Labels| match &self.tls {
            TlsLabels::Accepted(tls) => labels.client_tls(tls),
            TlsLabels::Connected(tls) => labels.server_tls(tls),
        };
        let target = |labels: Labels| match self.target {
            Some(target) => labels.target(target),
            None => labels,
        };
        match (self.direction, self.peer) {
            (Direction::Inbound, Peer::Src) => match &self.srv {
                Some((srv, port)) => tls(target(labels)).srv(srv, *port),
                None => tls(target(labels)),
            },
            // One series for the whole proxy.
            (Direction::Inbound, Peer::Dst) => tls(labels),
            (Direction::Outbound, Peer::Src) => tls(target(labels)),
            (Direction::Outbound, Peer::Dst) => {
                let labels = tls(target(labels.opt("authority", self.authority.as_deref())));
                match &self.dst {
                    Some(dst) => labels.prefixed("dst_", &dst.labels),
                    None => labels,
                }
            }
        }
    }
}

impl EndpointLabels {
    pub(super) fn labels(&self) -> Labels {
        match self {
            Self::Inbound { authority, target, tls, srv, srv_port, route, authz } => Labels::new()
                .direction(Direction::Inbound)
                .opt("authority", authority.as_deref())
                .target(*target)
                .client_tls(tls)
                .srv(srv, *srv_port)
                .route_in(route)
                .authz(authz),
            Self::Outbound { authority, target, tls, dst } => Labels::new()
                .direction(Direction::Outbound)
                .opt("authority", authority.as_deref())
                .target(*target)
                .server_tls(tls)
                .prefixed("dst_", &dst.labels),
        }
    }
}

impl ServerLabels {
    /// TGT and SRV.
    pub(super) fn server(&self) -> Labels {
        Labels::new().target(self.target).srv(&self.srv, self.srv_port)
    }
}

impl InboundRouteLabels {
    pub(super) fn labels(&self) -> Labels {
        Labels::new()
            .push("parent_group", self.parent.group())
            .push("parent_kind", self.parent.kind())
            .push("parent_name", self.parent.name())
            .port("parent_port", Some(self.parent_port))
            .route_in(&self.route)
    }
}

impl RouteLabels {
    pub(super) fn labels(&self) -> Labels {
        Labels::new()
            .parent(&self.parent)
            .route_out(&self.route)
            .push("hostname", self.hostname.as_deref().unwrap_or(""))
    }
}

impl BackendLabels {
    pub(super) fn labels(&self) -> Labels {
        Labels::new().parent(&self.parent).route_out(&self.route).backend(&self.backend)
    }
}

impl ProfileRouteLabels {
    pub(super) fn labels(&self) -> Labels {
        Labels::new()
            .direction(self.direction)
            .push("dst", &self.dst)
            .prefixed("rt_", self.labels.iter().map(|(k, v)| (k, v)))
    }
}

/// Backslash, quote and newline, as the text format has it.
pub(super) fn escape(out: &mut String, value: &str) {
    if !value.contains(['\\', '"', '\n']) {
        return out.push_str(value);
    }
    for c in value.chars() {
        match c {
            '\\' => out.push_str("\\\\"),
            '"' => out.push_str("\\\""),
            '\n' => out.push_str("\\n"),
            c => out.push(c),
        }
    }
}

/// A label's value that is put together at scrape time.
#[derive(Copy, Clone, Debug)]
pub(super) enum Text<'a> {
    Str(&'a str),
    Num(u64),
}

impl Text<'_> {
    pub(super) fn write(self, out: &mut String) {
        match self {
            Self::Str(s) => escape(out, s),
            // Writing to a String cannot fail.
            Self::Num(n) => drop(write!(out, "{n}")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(labels: Labels, expected: &str) {
        assert_eq!(labels.text, expected);
    }

    #[test]
    fn connection_sets_print_in_contract_order() {
        let target = Some("[::1]:80".parse().unwrap());
        let base = ConnLabels {
            direction: Direction::Inbound,
            peer: Peer::Src,
            target,
            tls: TlsLabels::Accepted(ClientTls::Terminated(None)),
            srv: Some((Meta::default("deny"), 80)),
            authority: None,
            dst: None,
        };
        check(
            base.labels(),
            r#"direction="inbound",peer="src",target_addr="[::1]:80",target_ip="::1",target_port="80",tls="true",client_id="",srv_group="",srv_kind="default",srv_name="deny",srv_port="80""#,
        );
        let loopback = TlsLabels::Connected(Err(NoTls::Loopback));
        check(
            ConnLabels { peer: Peer::Dst, tls: loopback, ..base.clone() }.labels(),
            r#"direction="inbound",peer="dst",tls="no_identity",no_tls_reason="loopback""#,
        );
        let meta = EndpointMeta {
            labels: [("service".into(), "web".into()), ("pod".into(), "web-0".into())].into(),
            ..EndpointMeta::default()
        };
        check(
            ConnLabels {
                direction: Direction::Outbound,
                peer: Peer::Dst,
                tls: TlsLabels::Connected(Ok("web.id".parse().unwrap())),
                authority: Some(authority("web.ns.svc.cluster.local.", 80)),
                dst: Some(Arc::new(meta)),
                ..base
            }
            .labels(),
            r#"direction="outbound",peer="dst",authority="web.ns.svc.cluster.local",target_addr="[::1]:80",target_ip="::1",target_port="80",tls="true",server_id="web.id",dst_pod="web-0",dst_service="web""#,
        );
    }

    #[test]
    fn ports_are_digits_or_empty() {
        let labels = RouteLabels {
            parent: Meta::resource("core", "Service", "ns", "web", Some(8080)),
            route: Meta::default("http"),
            hostname: None,
        };
        check(
            labels.labels(),
            r#"parent_group="core",parent_kind="Service",parent_namespace="ns",parent_name="web",parent_port="8080",parent_section_name="",route_group="",route_kind="default",route_namespace="",route_name="http",hostname="""#,
        );
        let labels = BackendLabels {
            parent: Meta::default("fallback"),
            route: Meta::default("fallback"),
            backend: Meta::default("unknown"),
        };
        assert!(labels.labels().text.contains(r#"parent_port="",parent_section_name="""#));
    }

    #[test]
    fn foreign_text_cannot_break_the_scrape() {
        let pairs: Vec<(Arc<str>, Arc<str>)> =
            vec![("a-b".into(), "x\"y\\z\n".into()), ("a_b".into(), "again".into()), ("é".into(), "".into())];
        check(Labels::new().prefixed("rt_", pairs.iter().map(|(k, v)| (k, v))), r#"rt_a_b="x\"y\\z\n",rt__="""#);
    }
}
