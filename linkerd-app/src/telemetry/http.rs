//! HTTP as the older families count it: `request_*` and `response_*` per endpoint, `route_*` per ServiceProfile route,
//! `control_*` per control-plane client (metrics.md 4.1, 4.2, 5.1, 5.3, 5.4, 5.11).

use super::{
    labels::Text,
    legacy::{Family, Sample},
    metric::{Counter, Histogram, LATENCY_MS, SlotKey, Slots},
    store::{Metric, Series},
};
use crate::error::{Cause, facts};
use std::time::Duration;

/// How a response is judged: the labels `classification`, `grpc_status` and `error`.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Hash)]
pub struct Class {
    /// `classification="success"` rather than `failure`.
    pub success: bool,
    /// gRPC code, printed in decimal.
    pub grpc_status: Option<u16>,
    /// Why there was no response, or no whole one; see [`Class::error`].
    pub error: Option<&'static str>,
}

impl Class {
    /// By the rule for plain HTTP: 500 to 599 fail.
    pub fn http(status: u16) -> Self {
        Self { success: !(500..600).contains(&status), grpc_status: None, error: None }
    }

    /// By the rule for gRPC: 2, 4, 7, 13, 14 and 15 fail; a missing code is 2 and yet a success, a code above 16 is 2.
    pub fn grpc(code: Option<u16>) -> Self {
        match code {
            None => Self { success: true, grpc_status: Some(2), error: None },
            Some(code) => {
                let code = if code > 16 { 2 } else { code };
                Self { success: !matches!(code, 2 | 4 | 7 | 13 | 14 | 15), grpc_status: Some(code), error: None }
            }
        }
    }

    /// An error instead of a response, or while the body was streamed.
    pub fn error(cause: &Cause) -> Self {
        Self { success: false, grpc_status: None, error: Some(facts(cause).class) }
    }
}

/// `h2(REASON)` with the names of RFC 9113 section 7.
pub fn h2_reason(reason: h2::Reason) -> &'static str {
    match reason {
        h2::Reason::NO_ERROR => "h2(NO_ERROR)",
        h2::Reason::PROTOCOL_ERROR => "h2(PROTOCOL_ERROR)",
        h2::Reason::INTERNAL_ERROR => "h2(INTERNAL_ERROR)",
        h2::Reason::FLOW_CONTROL_ERROR => "h2(FLOW_CONTROL_ERROR)",
        h2::Reason::SETTINGS_TIMEOUT => "h2(SETTINGS_TIMEOUT)",
        h2::Reason::STREAM_CLOSED => "h2(STREAM_CLOSED)",
        h2::Reason::FRAME_SIZE_ERROR => "h2(FRAME_SIZE_ERROR)",
        h2::Reason::REFUSED_STREAM => "h2(REFUSED_STREAM)",
        h2::Reason::CANCEL => "h2(CANCEL)",
        h2::Reason::COMPRESSION_ERROR => "h2(COMPRESSION_ERROR)",
        h2::Reason::CONNECT_ERROR => "h2(CONNECT_ERROR)",
        h2::Reason::ENHANCE_YOUR_CALM => "h2(ENHANCE_YOUR_CALM)",
        h2::Reason::INADEQUATE_SECURITY => "h2(INADEQUATE_SECURITY)",
        h2::Reason::HTTP_1_1_REQUIRED => "h2(HTTP_1_1_REQUIRED)",
        _ => "h2(UNKNOWN)",
    }
}

/// `request_total`, `response_total` and `response_latency_ms` of one label set.
#[derive(Debug, Default)]
pub struct HttpMetrics {
    requests: Counter,
    /// By status; none = there was no response.
    statuses: Slots<Status, ByStatus>,
}

/// Per endpoint.
pub type EndpointMetrics = HttpMetrics;

#[derive(Copy, Clone, Debug, PartialEq, Eq)]
struct Status(Option<u16>);

impl SlotKey for Status {
    /// 0 is no status; printed as `other`.
    const OTHER: Self = Self(Some(0));
}

impl SlotKey for Class {
    const OTHER: Self = Self { success: false, grpc_status: None, error: Some("other") };
}

#[derive(Debug)]
struct ByStatus {
    latency: Histogram,
    classes: Slots<Class, Counter>,
}

impl ByStatus {
    fn new() -> Self {
        Self { latency: Histogram::new(&LATENCY_MS), classes: Slots::default() }
    }
}

impl HttpMetrics {
    /// A request: at once if it has no body, else when its first body frame (or end, or error) is pulled.
    pub fn request(&self) {
        self.requests.inc();
    }

    /// Time from dispatch to the first response body frame, the body's end, or its drop, whichever came first. Once per
    /// response; not when there was none, nor when the first frame is an error.
    pub fn first_byte(&self, status: u16, latency: Duration) {
        let ms = u64::try_from(latency.as_millis()).unwrap_or(u64::MAX);
        self.statuses.get(Status(Some(status)), ByStatus::new).latency.observe(ms);
    }

    /// The response's end, or with no status the error that came instead. Once per request.
    pub fn response(&self, status: Option<u16>, class: Class) {
        self.statuses.get(Status(status), ByStatus::new).classes.get(class, Counter::default).inc();
    }
}

impl Metric for HttpMetrics {
    fn version(&self) -> u64 {
        let responses = |s: &ByStatus| s.latency.count() + s.classes.iter().map(|(_, c)| c.get()).sum::<u64>();
        self.requests.get() + self.statuses.iter().map(|(_, s)| responses(s)).sum::<u64>()
    }
}

/// One route of a ServiceProfile: before and after retries.
#[derive(Debug, Default)]
pub struct ProfileRouteMetrics {
    /// `route_*`: requests of clients.
    pub logical: HttpMetrics,
    /// `route_actual_*`: attempts; printed for outbound alone.
    pub actual: HttpMetrics,
    /// Retryable responses.
    pub retryable: Counter,
    /// Of those, the ones not retried for want of budget.
    pub no_budget: Counter,
    /// Inbound routes have no attempts and no retries.
    pub(super) outbound: bool,
}

impl Metric for ProfileRouteMetrics {
    fn version(&self) -> u64 {
        self.logical.version() + self.actual.version() + self.retryable.get() + self.no_budget.get()
    }
}

/// `<prefix>request_total`, `<prefix>response_total`, `<prefix>response_latency_ms`.
pub(super) fn encode(out: &mut String, prefix: &str, series: &[Series<HttpMetrics>]) {
    let each = || series.iter().map(|s| (&*s.text, &*s.metric));
    requests(out, prefix, each());
    responses(out, prefix, each());
    latencies(out, prefix, each());
}

/// `route_*`, `route_retryable_total`, `route_actual_*`.
pub(super) fn encode_profiles(out: &mut String, series: &[Series<ProfileRouteMetrics>]) {
    let logical = || series.iter().map(|s| (&*s.text, &s.metric.logical));
    requests(out, "route_", logical());
    responses(out, "route_", logical());
    latencies(out, "route_", logical());

    let outbound = || series.iter().filter(|s| s.metric.outbound);
    let mut family = Family::counter(out, "route_retryable_total", "Responses that a ServiceProfile lets be retried.");
    for s in outbound() {
        family.value((&s.text).into(), s.metric.retryable.get());
        let skipped = [("skipped", Text::Str("no_budget"))];
        family.value(Sample { before: &[], base: &s.text, after: &skipped }, s.metric.no_budget.get());
    }

    let actual = || outbound().map(|s| (&*s.text, &s.metric.actual));
    requests(out, "route_actual_", actual());
    responses(out, "route_actual_", actual());
}

fn requests<'a>(out: &mut String, prefix: &str, series: impl Iterator<Item = (&'a str, &'a HttpMetrics)>) {
    let name = format!("{prefix}request_total");
    let mut family = Family::counter(out, &name, "HTTP requests.");
    for (base, metrics) in series {
        family.value(Sample { before: &[], base, after: &[] }, metrics.requests.get());
    }
}

fn responses<'a>(out: &mut String, prefix: &str, series: impl Iterator<Item = (&'a str, &'a HttpMetrics)>) {
    let name = format!("{prefix}response_total");
    let mut family = Family::counter(out, &name, "Finished HTTP responses.");
    for (base, metrics) in series {
        for (status, by_status) in metrics.statuses.iter() {
            for (class, count) in by_status.classes.iter() {
                let classification = if class.success { "success" } else { "failure" };
                let grpc = class.grpc_status.map_or(Text::Str(""), |code| Text::Num(code.into()));
                let after = [
                    ("status_code", status.text()),
                    ("classification", Text::Str(classification)),
                    ("grpc_status", grpc),
                    ("error", Text::Str(class.error.unwrap_or(""))),
                ];
                let after = if status.0.is_none() { &after[1..] } else { &after[..] };
                family.value(Sample { before: &[], base, after }, count.get());
            }
        }
    }
}

fn latencies<'a>(out: &mut String, prefix: &str, series: impl Iterator<Item = (&'a str, &'a HttpMetrics)>) {
    let name = format!("{prefix}response_latency_ms");
    let mut family = Family::histogram(out, &name, "Time to the first byte of HTTP responses, in milliseconds.");
    for (base, metrics) in series {
        for (status, by_status) in metrics.statuses.iter() {
            let after = [("status_code", status.text())];
            let after = if status.0.is_none() { &[] } else { &after[..] };
            family.distribution(Sample { before: &[], base, after }, &by_status.latency);
        }
    }
}

impl Status {
    fn text(self) -> Text<'static> {
        match self.0 {
            Some(0) | None => Text::Str("other"),
            Some(status) => Text::Num(status.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[test]
    fn classes_follow_the_two_rules() {
        assert!(Class::http(404).success);
        assert!(!Class::http(503).success);
        assert!(Class::grpc(Some(5)).success);
        assert!(!Class::grpc(Some(14)).success);
        assert_eq!(Class::grpc(Some(99)), Class { success: false, grpc_status: Some(2), error: None });
        // Viz counts on this being a success.
        assert_eq!(Class::grpc(None), Class { success: true, grpc_status: Some(2), error: None });
        assert_eq!(Class::error(&Cause::Http2Reset(h2::Reason::CANCEL)).error, Some("h2(CANCEL)"));
    }

    #[test]
    fn endpoint_families_print_as_the_contract_says() {
        let metrics = HttpMetrics::default();
        metrics.request();
        metrics.first_byte(200, Duration::from_micros(2500));
        metrics.response(Some(200), Class::grpc(Some(0)));
        metrics.response(None, Class::error(&Cause::FailFast(crate::error::Lack::Readiness)));
        let mut out = String::new();
        encode(&mut out, "", &[Series { text: "d=\"x\"".into(), last_value: 3, metric: Arc::new(metrics) }]);
        let lines: Vec<_> = out.lines().filter(|l| !l.starts_with('#')).collect();
        assert_eq!(lines[0], r#"request_total{d="x"} 1"#);
        assert_eq!(
            lines[1],
            r#"response_total{d="x",status_code="200",classification="success",grpc_status="0",error=""} 1"#
        );
        assert_eq!(lines[2], r#"response_total{d="x",classification="failure",grpc_status="",error="unclassified"} 1"#);
        assert_eq!(lines[3], r#"response_latency_ms_bucket{d="x",status_code="200",le="1"} 0"#);
        assert_eq!(lines[4], r#"response_latency_ms_bucket{d="x",status_code="200",le="2"} 1"#);
        // The series without a status is printed too, all zero.
        assert!(lines.contains(&r#"response_latency_ms_bucket{d="x",le="+Inf"} 0"#));
    }

    #[test]
    fn profile_routes_have_both_retryable_series_outbound_and_none_inbound() {
        let series = |outbound, text: &str| Series {
            text: text.into(),
            last_value: 3,
            metric: Arc::new(ProfileRouteMetrics { outbound, ..Default::default() }),
        };
        let mut out = String::new();
        encode_profiles(&mut out, &[series(true, "d=\"o\""), series(false, "d=\"i\"")]);
        let samples: Vec<_> = out.lines().filter(|l| !l.starts_with('#')).collect();
        assert_eq!(
            samples,
            [
                r#"route_request_total{d="o"} 0"#,
                r#"route_request_total{d="i"} 0"#,
                r#"route_retryable_total{d="o"} 0"#,
                r#"route_retryable_total{d="o",skipped="no_budget"} 0"#,
                r#"route_actual_request_total{d="o"} 0"#,
            ]
        );
    }
}
