//! Endpoints (behaviour.md D.6, B.2, D.16).

use super::{Inside, Invalid, duration, optional, required};
use crate::policy::{
    Endpoint,
    endpoint::{EndpointMeta, Http2KeepAlive, Http2Params, Http2Windows, ProtocolHint, ServerTls, ZoneLocality},
};
use linkerd_tls::{Id, ServerName};
use linkerd2_proxy_api::{destination as api, net};
use std::{
    collections::{BTreeMap, HashMap},
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

/// An address with its metadata; `set` holds the labels that all addresses of the message share.
///
/// An endpoint whose identity can't be understood is refused rather than dialled without mesh TLS: the control plane
/// said that it is meshed.
pub(crate) fn endpoint(message: api::WeightedAddr, set: &HashMap<String, String>) -> Result<Endpoint, Invalid> {
    let api::WeightedAddr {
        addr,
        weight,
        metric_labels,
        tls_identity,
        protocol_hint,
        authority_override,
        http2,
        resource_ref: _,
    } = message;
    let addr = required("addr", addr, address)?;
    let mut labels: BTreeMap<Arc<str>, Arc<str>> = BTreeMap::new();
    // The address's own labels win.
    for (key, value) in set.iter().chain(&metric_labels) {
        labels.insert(key.as_str().into(), value.as_str().into());
    }
    let zone = match labels.get("zone_locality").map(|zone| &**zone) {
        Some("local") => ZoneLocality::Local,
        Some("remote") => ZoneLocality::Remote,
        _ => ZoneLocality::Unknown,
    };
    let cluster = labels.get("target_cluster").cloned().unwrap_or_default();
    let (hint, opaque_transport_port) = self::hint(protocol_hint.unwrap_or_default()).inside("protocol_hint")?;
    let authority_override = authority_override.map(|o| o.authority_override).filter(|text| !text.is_empty());
    if let Some(text) = &authority_override
        && text.parse::<http::uri::Authority>().is_err()
    {
        return Err(Invalid::new(format!("{text:?} is no authority")).inside("authority_override"));
    }
    Ok(Endpoint {
        addr,
        meta: Arc::new(EndpointMeta {
            origin_tls: None,
            // 0 and absent look the same.
            weight: (weight != 0).then_some(weight),
            tls: optional("tls_identity", tls_identity, tls)?.flatten(),
            hint,
            opaque_transport_port,
            authority_override: authority_override.map(Into::into),
            http2: optional("http2", http2, self::http2)?,
            labels,
            zone,
            cluster,
        }),
    })
}

/// An address that can be dialled.
pub(crate) fn address(message: net::TcpAddress) -> Result<SocketAddr, Invalid> {
    let ip = required("ip", message.ip, |ip| IpAddr::try_from(ip).map_err(|_| Invalid::new("no IP address")))?;
    let port = super::port(message.port).inside("port")?;
    let port = port.ok_or_else(|| Invalid::new("zero").inside("port"))?;
    Ok(SocketAddr::new(ip.to_canonical(), port))
}

/// No strategy is no identity.
fn tls(message: api::TlsIdentity) -> Result<Option<ServerTls>, Invalid> {
    use api::tls_identity::Strategy;
    let id = match message.strategy {
        None => return Ok(None),
        Some(Strategy::DnsLikeIdentity(dns)) => dns.name,
        Some(Strategy::UriLikeIdentity(uri)) => uri.uri,
    };
    let server_id: Id = id.parse().map_err(|error| Invalid::new(format!("{error}")).inside("strategy"))?;
    let server_name = match message.server_name {
        Some(name) => Some(
            name.name.parse::<ServerName>().map_err(|error| Invalid::new(error.to_string()).inside("server_name"))?,
        ),
        None => server_id.to_server_name(),
    };
    let server_name = server_name
        .ok_or_else(|| Invalid::new(format!("missing, and {server_id} is no DNS name")).inside("server_name"))?;
    Ok(Some(ServerTls { server_id, server_name }))
}

fn hint(message: api::ProtocolHint) -> Result<(ProtocolHint, Option<u16>), Invalid> {
    use api::protocol_hint::Protocol;
    let hint = match message.protocol {
        None => ProtocolHint::Unknown,
        Some(Protocol::H2(_)) => ProtocolHint::Http2,
        Some(Protocol::Opaque(_)) => ProtocolHint::Opaque,
    };
    let port = match message.opaque_transport {
        None => None,
        Some(transport) => super::port(transport.inbound_port).inside("opaque_transport.inbound_port")?,
    };
    Ok((hint, port))
}

fn http2(message: api::Http2ClientParams) -> Result<Http2Params, Invalid> {
    let api::Http2ClientParams { flow_control, keep_alive, internals } = message;
    let windows = flow_control.and_then(|flow| {
        let (stream, connection) = (flow.initial_stream_window_size, flow.initial_connection_window_size);
        match flow.adaptive_flow_control {
            true => Some(Http2Windows::Adaptive),
            false => (stream > 0 && connection > 0).then_some(Http2Windows::Fixed { stream, connection }),
        }
    });
    let keep_alive = match keep_alive {
        None => None,
        Some(keep_alive) => {
            let interval = optional("interval", keep_alive.interval, duration).inside("keep_alive")?;
            let timeout = optional("timeout", keep_alive.timeout, duration).inside("keep_alive")?;
            let both = interval.zip(timeout).filter(|(interval, timeout)| !interval.is_zero() && !timeout.is_zero());
            both.map(|(interval, timeout)| Http2KeepAlive { interval, timeout, while_idle: keep_alive.while_idle })
        }
    };
    let internals = internals.unwrap_or_default();
    let set = |n: u32| (n > 0).then_some(n);
    Ok(Http2Params {
        windows,
        keep_alive,
        max_concurrent_reset_streams: set(internals.max_concurrent_reset_streams),
        max_frame_size: set(internals.max_frame_size),
        max_send_buf_size: set(internals.max_send_buf_size),
    })
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use api::tls_identity::{DnsLikeIdentity, Strategy, UriLikeIdentity};

    /// A plain address, for tests.
    pub(crate) fn weighted(addr: &str) -> api::WeightedAddr {
        let addr = addr.parse::<SocketAddr>().unwrap();
        api::WeightedAddr { addr: Some(addr.into()), weight: 10_000, ..api::WeightedAddr::default() }
    }

    fn convert(message: api::WeightedAddr) -> Result<Endpoint, Invalid> {
        endpoint(message, &HashMap::new())
    }

    fn with_tls(strategy: Strategy, server_name: Option<&str>) -> Result<Option<ServerTls>, Invalid> {
        let server_name = server_name.map(|name| DnsLikeIdentity { name: name.into() });
        let identity = api::TlsIdentity { server_name, strategy: Some(strategy) };
        convert(api::WeightedAddr { tls_identity: Some(identity), ..weighted("10.0.0.1:80") })
            .map(|e| e.meta.tls.clone())
    }

    fn dns(name: &str) -> Strategy {
        Strategy::DnsLikeIdentity(DnsLikeIdentity { name: name.into() })
    }

    fn uri(uri: &str) -> Strategy {
        Strategy::UriLikeIdentity(UriLikeIdentity { uri: uri.into() })
    }

    #[test]
    fn addresses_must_be_usable() {
        assert_eq!(convert(weighted("[fd00::1]:80")).unwrap().addr, "[fd00::1]:80".parse().unwrap());
        assert_eq!(convert(weighted("10.0.0.1:0")).unwrap_err().to_string(), "addr.port: zero");
        let none = api::WeightedAddr { addr: None, ..weighted("10.0.0.1:80") };
        assert_eq!(convert(none).unwrap_err().to_string(), "addr: missing");
        let far = net::TcpAddress { ip: Some([10, 0, 0, 1].into()), port: 65_616 };
        assert!(convert(api::WeightedAddr { addr: Some(far), ..weighted("10.0.0.1:80") }).is_err());
    }

    #[test]
    fn identities_follow_the_naming_rules() {
        let tls = with_tls(dns("a.b"), None).unwrap().unwrap();
        assert_eq!((tls.server_id.as_str(), tls.server_name.as_str()), ("a.b", "a.b"));
        let tls = with_tls(uri("spiffe://root/x"), Some("x.y")).unwrap().unwrap();
        assert_eq!((tls.server_id.as_str(), tls.server_name.as_str()), ("spiffe://root/x", "x.y"));
        assert!(with_tls(uri("spiffe://root/x"), None).is_err());
        assert!(with_tls(dns("not a name"), None).is_err());
    }

    #[test]
    fn labels_merge_and_name_the_zone() {
        let mut message = weighted("10.0.0.1:80");
        message.metric_labels.insert("pod".into(), "a".into());
        message.metric_labels.insert("zone_locality".into(), "local".into());
        let set = [("pod", "b"), ("service", "web"), ("target_cluster", "east")];
        let set = set.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
        let meta = endpoint(message, &set).unwrap().meta;
        assert_eq!((&*meta.labels["pod"], &*meta.labels["service"]), ("a", "web"));
        assert_eq!((meta.zone, &*meta.cluster, meta.weight), (ZoneLocality::Local, "east", Some(10_000)));
    }

    #[test]
    fn hints_and_overrides() {
        use api::protocol_hint::{H2, OpaqueTransport, Protocol};
        let hint = api::ProtocolHint {
            opaque_transport: Some(OpaqueTransport { inbound_port: 4143 }),
            protocol: Some(Protocol::H2(H2 {})),
        };
        let over = Some(api::AuthorityOverride { authority_override: "web.shop:80".into() });
        let message =
            api::WeightedAddr { protocol_hint: Some(hint), authority_override: over, ..weighted("10.0.0.1:80") };
        let meta = convert(message).unwrap().meta;
        assert_eq!((meta.hint, meta.opaque_transport_port), (ProtocolHint::Http2, Some(4143)));
        assert_eq!(meta.authority_override.as_deref(), Some("web.shop:80"));
        let over = Some(api::AuthorityOverride { authority_override: "a b".into() });
        assert!(convert(api::WeightedAddr { authority_override: over, ..weighted("10.0.0.1:80") }).is_err());
    }

    #[test]
    fn http2_parameters_need_their_partners() {
        use api::http2_client_params::{FlowControl, KeepAlive};
        let flow = |stream, adaptive| FlowControl {
            initial_connection_window_size: 1,
            initial_stream_window_size: stream,
            adaptive_flow_control: adaptive,
        };
        let keep = |timeout| KeepAlive {
            interval: Some(prost_types::Duration { seconds: 10, nanos: 0 }),
            timeout,
            while_idle: true,
        };
        let convert = |flow, keep| {
            super::http2(api::Http2ClientParams { flow_control: Some(flow), keep_alive: Some(keep), internals: None })
        };
        let three = prost_types::Duration { seconds: 3, nanos: 0 };
        let found = convert(flow(0, false), keep(None)).unwrap();
        assert_eq!((found.windows, found.keep_alive), (None, None));
        let found = convert(flow(2, false), keep(Some(three))).unwrap();
        assert_eq!(found.windows, Some(Http2Windows::Fixed { stream: 2, connection: 1 }));
        assert!(found.keep_alive.is_some_and(|k| k.while_idle));
        assert_eq!(convert(flow(0, true), keep(None)).unwrap().windows, Some(Http2Windows::Adaptive));
    }
}
