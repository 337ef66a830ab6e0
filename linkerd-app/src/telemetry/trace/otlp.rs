//! Spans in the words of the OpenTelemetry protocol: the few messages of `trace_service.proto`, `trace.proto`,
//! `resource.proto` and `common.proto` that an exporter needs, and attributes by the semantic conventions.

use super::{Span, SpanKind, Traced};
use crate::telemetry::Direction;
use http::{
    HeaderValue,
    uri::{Authority, PathAndQuery},
};
use std::time::{SystemTime, UNIX_EPOCH};

/// Longest text of an attribute, bytes. What is longer is cut: a batch must not hold a thousand of the largest heads.
const MAX_TEXT: usize = 1024;
/// Who made the spans.
const SCOPE: &str = "linkerd-proxy";

/// `opentelemetry.proto.collector.trace.v1.ExportTraceServiceRequest`
#[derive(Clone, PartialEq, prost::Message)]
pub struct Request {
    #[prost(message, repeated, tag = "1")]
    resource_spans: Vec<ResourceSpans>,
}

/// `opentelemetry.proto.collector.trace.v1.ExportTraceServiceResponse`
#[derive(Clone, PartialEq, prost::Message)]
pub struct Response {
    #[prost(message, optional, tag = "1")]
    partial_success: Option<PartialSuccess>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct PartialSuccess {
    #[prost(int64, tag = "1")]
    rejected_spans: i64,
    #[prost(string, tag = "2")]
    error_message: String,
}

#[derive(Clone, PartialEq, prost::Message)]
struct ResourceSpans {
    #[prost(message, optional, tag = "1")]
    resource: Option<Resource>,
    #[prost(message, repeated, tag = "2")]
    scope_spans: Vec<ScopeSpans>,
}

/// `opentelemetry.proto.resource.v1.Resource`
#[derive(Clone, PartialEq, prost::Message)]
pub struct Resource {
    #[prost(message, repeated, tag = "1")]
    attributes: Vec<KeyValue>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct ScopeSpans {
    #[prost(message, optional, tag = "1")]
    scope: Option<Scope>,
    #[prost(message, repeated, tag = "2")]
    spans: Vec<OtlpSpan>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Scope {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(string, tag = "2")]
    version: String,
}

/// `opentelemetry.proto.trace.v1.Span`
#[derive(Clone, PartialEq, prost::Message)]
pub struct OtlpSpan {
    #[prost(bytes = "vec", tag = "1")]
    trace_id: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    span_id: Vec<u8>,
    #[prost(bytes = "vec", tag = "4")]
    parent_span_id: Vec<u8>,
    #[prost(string, tag = "5")]
    name: String,
    /// `SPAN_KIND_SERVER` or `SPAN_KIND_CLIENT`.
    #[prost(int32, tag = "6")]
    kind: i32,
    #[prost(fixed64, tag = "7")]
    start_time_unix_nano: u64,
    #[prost(fixed64, tag = "8")]
    end_time_unix_nano: u64,
    #[prost(message, repeated, tag = "9")]
    attributes: Vec<KeyValue>,
}

/// `opentelemetry.proto.common.v1.KeyValue`
#[derive(Clone, PartialEq, prost::Message)]
struct KeyValue {
    #[prost(string, tag = "1")]
    key: String,
    #[prost(message, optional, tag = "2")]
    value: Option<AnyValue>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct AnyValue {
    #[prost(oneof = "Value", tags = "1, 3")]
    value: Option<Value>,
}

/// The kinds of values in use.
#[derive(Clone, PartialEq, prost::Oneof)]
pub enum Value {
    /// Text.
    #[prost(string, tag = "1")]
    Text(String),
    /// A number.
    #[prost(int64, tag = "3")]
    Int(i64),
}

impl Request {
    /// One batch.
    pub fn new(resource: Resource, spans: Vec<OtlpSpan>) -> Self {
        let scope = Scope { name: SCOPE.into(), version: env!("CARGO_PKG_VERSION").into() };
        let scope_spans = vec![ScopeSpans { scope: Some(scope), spans }];
        Self { resource_spans: vec![ResourceSpans { resource: Some(resource), scope_spans }] }
    }
}

impl Response {
    /// How many spans the collector did not take, and why.
    pub fn rejected(&self) -> Option<(u64, &str)> {
        let partial = self.partial_success.as_ref()?;
        let rejected = u64::try_from(partial.rejected_spans).ok().filter(|n| *n > 0)?;
        Some((rejected, &partial.error_message))
    }
}

impl Resource {
    /// Attributes in their order.
    pub fn new(attributes: impl IntoIterator<Item = (String, Value)>) -> Self {
        Self { attributes: attributes.into_iter().map(|(key, value)| KeyValue::new(key, value)).collect() }
    }
}

impl KeyValue {
    fn new(key: impl Into<String>, value: Value) -> Self {
        Self { key: key.into(), value: Some(AnyValue { value: Some(value) }) }
    }
}

impl From<&Span> for OtlpSpan {
    fn from(span: &Span) -> Self {
        let mut attributes = request_attributes(&span.request);
        let direction = match span.direction {
            Direction::Inbound => "inbound",
            Direction::Outbound => "outbound",
        };
        attributes.insert(0, KeyValue::new("direction", Value::Text(direction.into())));
        let end = span.end.map_or(span.start, |(end, _)| end);
        if let Some((_, status)) = span.end {
            attributes.push(KeyValue::new("http.response.status_code", Value::Int(status.as_u16().into())));
        }
        Self {
            trace_id: span.trace.to_vec(),
            span_id: span.id.to_vec(),
            parent_span_id: span.parent.to_vec(),
            name: cut(span.request.uri.path()),
            kind: match span.kind {
                SpanKind::Server => 2,
                SpanKind::Client => 3,
            },
            start_time_unix_nano: nanos(span.start),
            end_time_unix_nano: nanos(end),
            attributes,
        }
    }
}

fn request_attributes(request: &Traced) -> Vec<KeyValue> {
    let mut attributes = Vec::with_capacity(16);
    let mut text = |key: &str, value: &str| attributes.push(KeyValue::new(key, Value::Text(cut(value))));
    let uri = &request.uri;
    let scheme = uri.scheme_str().unwrap_or("http");
    let authority = |value: &Option<HeaderValue>| value.as_ref().and_then(first_authority);
    let named = uri.authority().cloned().or_else(|| authority(&request.host));
    text("http.request.method", request.method.as_str());
    text("url.scheme", scheme);
    text("url.path", uri.path());
    if let Some(query) = uri.query() {
        text("url.query", query);
    }
    if let Some(named) = &named {
        let path = uri.path_and_query().map_or("", PathAndQuery::as_str);
        text("url.full", &format!("{scheme}://{}{path}", redacted(named)));
    }
    text("network.transport", "tcp");
    let headers = [
        ("user_agent.original", &request.user_agent),
        ("http.request.header.content-length", &request.content_length),
        ("http.request.header.content-type", &request.content_type),
        ("http.request.header.l5d-orig-proto", &request.orig_proto),
    ];
    for (key, value) in headers {
        if let Some(value) = value.as_ref().and_then(|value| value.to_str().ok()) {
            text(key, value);
        }
    }
    if let Some(server) = authority(&request.forwarded_host).or(named) {
        text("server.address", server.host());
        if let Some(port) = server.port_u16() {
            attributes.push(KeyValue::new("server.port", Value::Int(port.into())));
        }
    }
    attributes
}

/// The first of several: a header that proxies append to.
fn first_authority(value: &HeaderValue) -> Option<Authority> {
    value.to_str().ok()?.split(',').next()?.trim().parse().ok()
}

/// Credentials are nobody's business.
fn redacted(authority: &Authority) -> String {
    match authority.as_str().rsplit_once('@') {
        Some((_, host)) => format!("REDACTED:REDACTED@{host}"),
        None => authority.to_string(),
    }
}

fn cut(text: &str) -> String {
    text[..text.floor_char_boundary(MAX_TEXT)].to_string()
}

fn nanos(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |since| u64::try_from(since.as_nanos()).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::StatusCode;
    use prost::Message;
    use std::collections::BTreeMap;

    fn span(request: http::request::Builder) -> OtlpSpan {
        let request = Traced::of(&request.body(()).unwrap());
        let start = UNIX_EPOCH + std::time::Duration::from_nanos(7);
        let end = Some((start, StatusCode::NOT_FOUND));
        let (trace, parent, id) = ([1; 16], [2; 8], [3; 8]);
        let (direction, kind) = (Direction::Outbound, SpanKind::Client);
        OtlpSpan::from(&Span { trace, parent, id, direction, kind, start, end, request })
    }

    fn attributes(span: &OtlpSpan) -> BTreeMap<&str, String> {
        let text = |value: &AnyValue| match value.value.as_ref().unwrap() {
            Value::Text(text) => text.clone(),
            Value::Int(number) => number.to_string(),
        };
        span.attributes.iter().map(|kv| (&*kv.key, text(kv.value.as_ref().unwrap()))).collect()
    }

    #[test]
    fn a_span_tells_of_its_request() {
        let span = span(
            http::Request::post("http://user:pw@web.shop:8080/a/b?c=d")
                .header("x-forwarded-host", "shop.example:443, inner")
                .header("host", "ignored")
                .header("user-agent", "curl/8")
                .header("content-type", "text/plain")
                .header("content-length", "3")
                .header("l5d-orig-proto", "HTTP/1.1"),
        );
        assert_eq!((&*span.name, span.kind, span.start_time_unix_nano), ("/a/b", 3, 7));
        assert_eq!((span.trace_id.len(), span.parent_span_id.len(), span.span_id.len()), (16, 8, 8));
        let expected = [
            ("direction", "outbound"),
            ("http.request.header.content-length", "3"),
            ("http.request.header.content-type", "text/plain"),
            ("http.request.header.l5d-orig-proto", "HTTP/1.1"),
            ("http.request.method", "POST"),
            ("http.response.status_code", "404"),
            ("network.transport", "tcp"),
            ("server.address", "shop.example"),
            ("server.port", "443"),
            ("url.full", "http://REDACTED:REDACTED@web.shop:8080/a/b?c=d"),
            ("url.path", "/a/b"),
            ("url.query", "c=d"),
            ("url.scheme", "http"),
            ("user_agent.original", "curl/8"),
        ];
        assert_eq!(attributes(&span), expected.map(|(k, v)| (k, v.to_string())).into());
    }

    #[test]
    fn what_is_absent_is_left_out_and_what_is_long_is_cut() {
        let long = span(http::Request::get(format!("/{}", "x".repeat(5_000))).header("host", "web.shop"));
        assert_eq!(long.name.len(), MAX_TEXT);
        let told = attributes(&long);
        assert_eq!(told["server.address"], "web.shop");
        assert!(!told.contains_key("server.port") && !told.contains_key("url.query"));
        assert!(told["url.full"].starts_with("http://web.shop/xxx"));
    }

    #[test]
    fn messages_are_as_the_protocol_says() {
        let resource = Resource::new([("a".to_string(), Value::Int(1))]);
        let bytes = Request::new(resource, vec![]).encode_to_vec();
        // 1: resource_spans { 1: resource { 1: attribute { 1: key, 2: value { 3: int } } }, 2: scope_spans { 1: scope } }
        let expected = [0x0a, 0x09, 0x0a, 0x07, 0x0a, 0x01, b'a', 0x12, 0x02, 0x18, 0x01];
        assert_eq!(bytes[2..13], expected);
        let rejected = Response::decode(&[0x0a, 0x05, 0x08, 0x02, 0x12, 0x01, b'x'][..]).unwrap();
        assert_eq!(rejected.rejected(), Some((2, "x")));
        assert_eq!(Response::default().rejected(), None);
    }
}
