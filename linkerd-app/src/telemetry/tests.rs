//! The whole page: order of the dialects, headers, what appears when, expiry, and what independent readers demand of it.

use super::*;
use crate::{
    error::{Cause, Lack, RateLimitScope},
    policy::{
        authz::ClientTls,
        endpoint::{EndpointMeta, ZoneLocality},
    },
};
use linkerd_stack::balance::{Observer as _, Update};
use std::collections::{BTreeMap, BTreeSet};

const RETAIN: Duration = Duration::from_secs(600);

fn telemetry() -> Telemetry {
    Telemetry::new(config::Metrics { retain_idle: RETAIN, ..config::Metrics::default() })
}

fn target() -> SocketAddr {
    "10.0.0.1:8080".parse().unwrap()
}

fn service(name: &str) -> Meta {
    Meta::resource("core", "Service", "ns", name, Some(80))
}

fn web() -> ServerLabels {
    ServerLabels {
        target: target(),
        srv: Meta::resource("policy.linkerd.io", "server", "", "web", None),
        srv_port: 8080,
        tls: ClientTls::Terminated(Some("client.id".parse().unwrap())),
    }
}

fn peer(pod: &str) -> ConnLabels {
    let dst = EndpointMeta {
        labels: [("pod".into(), pod.into())].into(),
        zone: ZoneLocality::Remote,
        ..EndpointMeta::default()
    };
    ConnLabels {
        direction: Direction::Outbound,
        peer: Peer::Dst,
        target: Some(target()),
        tls: TlsLabels::Connected(Err(NoTls::NotProvidedByServiceDiscovery)),
        srv: None,
        authority: Some(authority("web.ns.svc.cluster.local", 8080)),
        dst: Some(Arc::new(dst)),
    }
}

/// A little of everything.
fn used() -> Telemetry {
    let t = telemetry();
    let server = t.inbound_server(web());
    let (route, authz) = (Meta::default("default"), Meta::default("all-authenticated"));
    server.http_allow(&route, &authz).inc();
    server.http_deny(&route).inc();
    server.http_not_found().inc();
    server.rate_limited(None, RateLimitScope::Override).inc();
    server.tcp_allow(&authz).inc();
    server.tcp_deny().inc();
    server.tcp_terminate().inc();
    server.http_errors().failed(&Cause::FailFast(Lack::Readiness));
    server.tcp_errors().failed(&Cause::Unexpected("x".into()));
    t.outbound_http_errors().failed(&Cause::LoadShed(Lack::Readiness));
    t.outbound_tcp_errors(target()).failed(&Cause::LoadShed(Lack::Readiness));

    let ServerLabels { target, srv, srv_port, tls } = web();
    let endpoint = t.endpoint(EndpointLabels::Inbound {
        authority: None,
        target,
        tls: tls.clone(),
        srv: srv.clone(),
        srv_port,
        route: route.clone(),
        authz,
    });
    endpoint.request();
    endpoint.first_byte(200, Duration::from_millis(3));
    endpoint.response(Some(200), Class::http(200));

    let profile = ProfileRouteLabels { direction: Direction::Outbound, dst: "web:80".into(), labels: Vec::new() };
    t.profile_route(profile).logical.request();
    t.control_client("dst.linkerd:8086", &Err(NoTls::Loopback)).request();

    let conn = t.conn(peer("web-0"));
    conn.open();
    conn.read(5);
    conn.written(7);
    conn.close(None);

    let inbound = InboundRouteLabels { parent: srv.clone(), parent_port: srv_port, route: route.clone() };
    let inbound = t.inbound_route(RouteKind::Grpc, inbound);
    inbound.request();
    inbound.ended(Some(0), Duration::from_millis(30), Duration::ZERO);

    let (parent, http) = (service("web"), Meta::default("http"));
    let labels = RouteLabels { parent: parent.clone(), route: http.clone(), hostname: None };
    let outbound = t.outbound_route(RouteKind::Http, labels.clone());
    outbound.request();
    outbound.request_frame(100);
    outbound.retry().requests.inc();
    outbound.ended(Ended { status: Some(200), error: None }, Duration::from_millis(60));
    outbound.ended(Ended::failed(&Cause::RequestTimeout(Duration::ZERO)), Duration::from_secs(1));
    let backend = BackendLabels { parent: parent.clone(), route: http.clone(), backend: service("web") };
    let backend = t.outbound_backend(RouteKind::Grpc, backend);
    backend.request();
    backend.ended(Ended { status: Some(14), error: None }, Duration::from_millis(60));

    let kind = BalancerKind::OutboundHttp { parent: parent.clone(), backend: service("web") };
    let balancer = t.balancer(&kind, Duration::from_secs(3));
    balancer.gate_opened();
    balancer.endpoints(2, 1);
    balancer.updated(Update::Add);
    balancer.enqueued();
    balancer.dequeued(Duration::from_millis(1));

    t.inbound_detect(&srv, srv_port).detected(Detected::Http2, Duration::from_micros(10));
    t.outbound_detect(&parent).detected(Detected::ReadTimeout, Duration::from_secs(10));
    t.protocol_connections("detect", &parent).inc();
    t.transport_header("http/2", 8080, "", None).inc();
    t.tcp_route(&parent, &Meta::default("opaq"), "10.0.0.1", 80).open();
    t.tls_route(&labels).close(Some(&Cause::Forbidden("no".into())));
    t.identity().refreshed(std::time::SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000));
    t.manifests().refused(2);
    t.terminated(Direction::Outbound, Code::QueueFailfast);
    t.set_tls_info(TlsInfo { suites: vec!["A".into(), "B".into()], ..TlsInfo::default() });
    t
}

/// What the reader of the Prometheus text format of the CLI demands: one HELP and one TYPE per name, before the name's samples,
/// known kinds, legal names, no series twice, no empty label between commas.
#[track_caller]
fn check_page(page: &str) {
    let mut kinds: BTreeMap<&str, &str> = BTreeMap::new();
    let mut helps: BTreeSet<&str> = BTreeSet::new();
    let mut seen: BTreeSet<&str> = BTreeSet::new();
    let legal = |name: &str| {
        !name.is_empty()
            && !name.starts_with(|c: char| c.is_ascii_digit())
            && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_' || c == ':')
    };
    assert!(page.ends_with("\n# EOF\n"));
    assert!(!page.contains(",,"));
    for line in page.lines() {
        let words: Vec<&str> = line.splitn(4, ' ').collect();
        match words[..] {
            ["#", "EOF"] | ["#", "UNIT", ..] => {}
            ["#", "HELP", name, _] => assert!(helps.insert(name), "{line}"),
            ["#", "TYPE", name, kind] => {
                assert!(matches!(kind, "counter" | "gauge" | "histogram"), "{line}");
                assert!(kinds.insert(name, kind).is_none(), "{line}");
            }
            _ => {
                let (series, value) = line.rsplit_once(' ').unwrap();
                assert!(value.parse::<f64>().is_ok(), "{line}");
                assert!(seen.insert(series), "twice: {line}");
                let (name, labels) = series.split_once('{').unwrap_or((series, "}"));
                let known = ["", "_total", "_bucket", "_sum", "_count"]
                    .iter()
                    .any(|suffix| name.strip_suffix(suffix).is_some_and(|family| kinds.contains_key(family)));
                assert!(known, "no TYPE before {line}");
                let labels = labels.strip_suffix('}').unwrap();
                let mut names = BTreeSet::new();
                for label in labels.split("\",").filter(|l| !l.is_empty()) {
                    let label = label.split_once("=\"").unwrap_or_else(|| panic!("{label} in {line}")).0;
                    assert!(legal(label) && names.insert(label), "{label} in {line}");
                }
            }
        }
    }
}

/// Samples of a family without their values.
fn samples<'a>(page: &'a str, name: &str) -> Vec<&'a str> {
    page.lines().filter(|l| l.strip_prefix(name).is_some_and(|rest| rest.starts_with(['{', ' ']))).collect()
}

#[track_caller]
fn check(page: &str, line: &str) {
    let name = line.split(['{', ' ']).next().unwrap();
    assert!(page.lines().any(|l| l == line), "{line}\nnot among\n{}", samples(page, name).join("\n"));
}

#[test]
fn the_page_is_well_formed_and_stable() {
    let t = used();
    let page = t.render();
    check_page(&page);
    check_page(&telemetry().render());
    let still = |page: &str| -> String {
        let lines = page.lines().filter(|l| !l.contains("process_") && !l.contains("_time_seconds"));
        lines.collect::<Vec<_>>().join("\n")
    };
    assert_eq!(still(&page), still(&t.render()));
}

#[test]
fn must_families_print_to_the_letter() {
    let page = used().render();
    let tgt = r#"target_addr="10.0.0.1:8080",target_ip="10.0.0.1",target_port="8080""#;
    let srv = r#"srv_group="policy.linkerd.io",srv_kind="server",srv_name="web",srv_port="8080""#;
    let route = r#"route_group="",route_kind="default",route_name="default""#;
    let authz = r#"authz_group="",authz_kind="default",authz_name="all-authenticated""#;
    let tls = r#"tls="true",client_id="client.id""#;
    let parent = r#"parent_group="core",parent_kind="Service",parent_namespace="ns",parent_name="web",parent_port="80",parent_section_name="""#;
    let route_out = r#"route_group="",route_kind="default",route_namespace="",route_name="http""#;
    let backend = r#"backend_group="core",backend_kind="Service",backend_namespace="ns",backend_name="web",backend_port="80",backend_section_name="""#;
    let peer = format!(
        r#"direction="outbound",peer="dst",authority="web.ns.svc.cluster.local:8080",{tgt},tls="no_identity",no_tls_reason="not_provided_by_service_discovery",dst_pod="web-0""#
    );
    for line in [
        format!("inbound_http_authz_allow_total{{{tgt},{srv},{route},{authz},{tls}}} 1"),
        format!("inbound_http_authz_deny_total{{{tgt},{srv},{route},{tls}}} 1"),
        format!("inbound_http_route_not_found_total{{{tgt},{srv},{tls}}} 1"),
        format!(r#"inbound_http_local_ratelimit_total{{{tgt},{srv},ratelimit_scope="identity",{tls}}} 1"#),
        format!("inbound_tcp_authz_allow_total{{{tgt},{srv},{authz},{tls}}} 1"),
        format!("inbound_tcp_authz_terminate_total{{{tgt},{srv},{tls}}} 1"),
        format!(r#"inbound_http_errors_total{{error="failfast",{tgt},{srv}}} 1"#),
        format!(r#"inbound_tcp_errors_total{{error="unexpected",{tgt}}} 1"#),
        r#"outbound_http_errors_total{error="loadshed"} 1"#.into(),
        format!(r#"outbound_tcp_errors_total{{{tgt},error="loadshed"}} 1"#),
        format!(r#"request_total{{direction="inbound",{tgt},{tls},{srv},{route},{authz}}} 1"#),
        format!(
            r#"response_total{{direction="inbound",{tgt},{tls},{srv},{route},{authz},status_code="200",classification="success",grpc_status="",error=""}} 1"#
        ),
        format!(
            r#"response_latency_ms_bucket{{direction="inbound",{tgt},{tls},{srv},{route},{authz},status_code="200",le="3"}} 1"#
        ),
        r#"route_request_total{direction="outbound",dst="web:80"} 1"#.into(),
        r#"control_request_total{addr="dst.linkerd:8086",tls="no_identity",no_tls_reason="loopback"} 1"#.into(),
        format!("tcp_open_total{{{peer}}} 1"),
        format!("tcp_open_connections{{{peer}}} 0"),
        format!("tcp_read_bytes_total{{{peer}}} 5"),
        format!("tcp_write_bytes_total{{{peer}}} 7"),
        format!(r#"tcp_close_total{{{peer},errno=""}} 1"#),
        r#"outbound_tcp_transfer_cost_bytes_total{op="Send",zone_locality="Remote"} 7"#.into(),
        r#"outbound_tcp_transfer_cost_bytes_total{op="Recv",zone_locality="Remote"} 5"#.into(),
        "opentelemetry_span_exports 0".into(),
        format!(
            r#"inbound_grpc_statuses_total{{parent_group="policy.linkerd.io",parent_kind="server",parent_name="web",parent_port="8080",{route},status="0"}} 1"#
        ),
        format!(
            r#"outbound_http_route_request_statuses_total{{{parent},{route_out},hostname="",http_status="200",error=""}} 1"#
        ),
        format!(
            r#"outbound_http_route_request_statuses_total{{{parent},{route_out},hostname="",http_status="",error="REQUEST_TIMEOUT"}} 1"#
        ),
        format!(
            r#"outbound_http_route_request_duration_seconds_bucket{{le="0.5",{parent},{route_out},hostname=""}} 1"#
        ),
        format!(r#"outbound_http_route_request_duration_seconds_sum{{{parent},{route_out},hostname=""}} 1.06"#),
        format!(r#"outbound_http_route_retry_requests_total{{{parent},{route_out},hostname=""}} 1"#),
        format!(r#"outbound_http_route_retry_overflow_total{{{parent},{route_out},hostname=""}} 0"#),
        format!(
            r#"outbound_grpc_route_backend_response_statuses_total{{{parent},{route_out},{backend},grpc_status="UNAVAILABLE",error=""}} 1"#
        ),
        format!(
            r#"outbound_grpc_route_backend_response_duration_seconds_bucket{{le="0.1",{parent},{route_out},{backend}}} 1"#
        ),
        format!(r#"outbound_http_balancer_p2c_updates_total{{op="Add",{parent},{backend}}} 1"#),
        // The balancer is gone, its counters stay.
        format!(r#"outbound_http_balancer_p2c_endpoints{{{parent},{backend}}} 0"#),
        format!(r#"outbound_http_balancer_queue_latency_seconds_bucket{{le="0.005",{parent},{backend}}} 1"#),
        format!(r#"outbound_http_balancer_queue_gate_timeout_seconds{{{parent},{backend}}} 3.0"#),
        format!(r#"inbound_tcp_detect_http_results_total{{result="http/2",{srv}}} 1"#),
        format!(r#"outbound_tcp_detect_http_duration_seconds_bucket{{le="+Inf",{parent}}} 1"#),
        format!(r#"outbound_tcp_protocol_connections_total{{protocol="detect",{parent}}} 1"#),
        r#"inbound_tcp_transport_header_connections_total{session_protocol="http/2",target_port="8080",target_name="",client_id=""} 1"#
            .into(),
        format!(
            r#"outbound_tls_route_close_total{{{parent},{route_out},hostname="",error="forbidden"}} 1"#
        ),
        "control_identity_cert_expiration_timestamp_seconds 1800000000.0".into(),
        r#"control_identity_cert_refreshes_total{result="ok"} 1"#.into(),
        r#"control_dns_resolutions_total{client="trace_collector",record_type="A/AAAA",result="not_found"} 0"#.into(),
        "manifests_last_load_success 0".into(),
        r#"terminations_total{direction="outbound",phase="queue",by="proxy",code="queue-failfast"} 1"#.into(),
        r#"rustls_info{tls_suites="A,B,",tls_kx_groups="",tls_rand="",tls_key_provider="",tls_fips="false"} 1"#.into(),
        r#"proxy_unhealthy{condition="worker_stuck"} 0"#.into(),
    ] {
        check(&page, &line);
    }
    for name in ["process_start_time_seconds", "process_cpu_seconds_total", "process_open_fds", "proxy_build_info"] {
        assert_eq!(samples(&page, name).len(), 1, "{name}");
    }
    assert!(samples(&page, "process_start_time_seconds")[0].split(' ').nth(1).unwrap().starts_with(char::is_numeric));
}

#[test]
fn nothing_is_printed_before_it_happens() {
    let t = telemetry();
    let server = t.inbound_server(web());
    let allow = server.http_allow(&Meta::default("default"), &Meta::default("probe"));
    let labels = RouteLabels { parent: service("web"), route: Meta::default("http"), hostname: None };
    let route = t.outbound_route(RouteKind::Http, labels);
    let page = t.render();
    assert!(samples(&page, "inbound_http_authz_allow_total").is_empty());
    assert!(!page.contains("TYPE outbound_http_route"));
    assert!(!page.contains("TYPE manifests_"));
    assert!(!page.contains("rustls_info"));
    allow.inc();
    route.request();
    let page = t.render();
    assert_eq!(samples(&page, "inbound_http_authz_allow_total").len(), 1);
    assert!(page.contains("outbound_http_route_request_frame_size_bytes_count"));
    assert!(!page.contains("outbound_http_route_request_duration_seconds"));
    assert!(!page.contains("outbound_http_route_retry"));
}

#[test]
fn resources_of_one_name_do_not_share_numbers() {
    let t = telemetry();
    for ns in ["a", "b"] {
        let parent = Meta::resource("core", "Service", ns, "web", Some(80));
        t.protocol_connections("opaq", &parent).inc();
    }
    assert_eq!(samples(&t.render(), "outbound_tcp_protocol_connections_total").len(), 2);
}

#[tokio::test(start_paused = true)]
async fn idle_series_go_and_zone_bytes_stay() {
    let t = telemetry();
    let held = t.conn(peer("held"));
    let gone = t.conn(peer("gone"));
    held.written(1);
    gone.written(10);
    drop(gone);
    t.render();
    tokio::time::advance(RETAIN).await;
    // Dropped after this page was printed.
    assert_eq!(samples(&t.render(), "tcp_open_total").len(), 2);
    let page = t.render();
    assert_eq!(samples(&page, "tcp_open_total").len(), 1);
    check(&page, r#"outbound_tcp_transfer_cost_bytes_total{op="Send",zone_locality="Remote"} 11"#);
    held.written(1);
    check(&t.render(), r#"outbound_tcp_transfer_cost_bytes_total{op="Send",zone_locality="Remote"} 12"#);
}

#[test]
fn a_full_family_says_so() {
    let t = Telemetry::new(config::Metrics { retain_idle: RETAIN, max_series: 2.try_into().unwrap() });
    for pod in ["a", "b", "c", "d"] {
        t.conn(peer(pod)).open();
    }
    let page = t.render();
    check(&page, r#"tcp_open_total{direction="outbound",peer="dst",series="other"} 2"#);
    check(&page, r#"telemetry_series_overflow_total{family="tcp"} 2"#);
    check(&page, r#"proxy_unhealthy{condition="bound_exhausted"} 1"#);
    assert!(t.health().problems()[0].1.contains("tcp"));
    check_page(&page);
}

#[test]
fn two_balancers_of_one_label_set_add_up() {
    let t = telemetry();
    let kind = BalancerKind::OutboundTls { concrete: "web:443".into() };
    let old = t.balancer(&kind, Duration::from_secs(3));
    old.endpoints(2, 0);
    let new = t.balancer(&kind, Duration::from_secs(3));
    new.endpoints(1, 1);
    check(&t.render(), r#"outbound_tls_balancer_p2c_endpoints{concrete="web:443"} 4"#);
    drop(old);
    let page = t.render();
    check(&page, r#"outbound_tls_balancer_p2c_endpoints{concrete="web:443"} 2"#);
    check(&page, r#"outbound_tls_balancer_endpoints{endpoint_state="pending",concrete="web:443"} 1"#);
}

/// docs/metrics.md explains what a proxy without traffic prints of its own, and every condition.
#[test]
fn the_page_explains_the_own_families() {
    let page = include_str!("../../../docs/metrics.md");
    // Families of the contract that are there from the start.
    let contract = ["process_", "opentelemetry_", "control_", "proxy_build_info", "rustls_info"];
    let t = telemetry();
    t.terminated(Direction::Inbound, Code::Unexpected);
    let text = t.render();
    for line in text.lines().filter_map(|l| l.strip_prefix("# TYPE ")) {
        let (name, kind) = line.split_once(' ').unwrap();
        let total = if kind == "counter" { "_total" } else { "" };
        let known = contract.iter().any(|prefix| name.starts_with(prefix));
        assert!(known || page.contains(&format!("| `{name}{total}` | {kind} |")), "{line}");
    }
    for condition in Condition::ALL {
        assert!(page.contains(&format!("`{}`", condition.as_str())), "{condition:?}");
    }
}
