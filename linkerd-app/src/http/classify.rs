//! Judges responses: success or failure for metrics, and the closed sets of `error` labels (metrics.md 4.1, 4.3, 5.2,
//! 5.3). What breakers and balancers make of a response is decided here too.

use super::{is_grpc, rescue::GRPC_STATUS};
use crate::{
    error::{Cause, Error},
    policy::client::{Penalty, ResponseCondition},
};
use http::{HeaderMap, StatusCode, header::RETRY_AFTER};
use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

/// How responses to a request are judged; chosen before it is sent.
#[derive(Clone, Debug)]
pub enum Rule {
    /// 5xx fails.
    Http,
    /// `grpc-status` 2, 4, 7, 13, 14 and 15 fail.
    Grpc,
    /// The first class whose condition holds; else gRPC if the response says so, else HTTP.
    Profile(Arc<[(ResponseCondition, bool)]>),
}

/// A judgement; the labels `classification`, `grpc_status` and `error`.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Hash)]
pub struct Judgement {
    /// `success` or `failure`.
    pub success: bool,
    /// gRPC code, where one counts.
    pub grpc_status: Option<u16>,
    /// Set if there was an error instead of a response or of its end.
    pub error: Option<&'static str>,
}

impl Rule {
    /// From the headers of a request; `grpc` if the policy in force is for gRPC.
    pub fn of(headers: &HeaderMap, grpc: bool) -> Self {
        if grpc || is_grpc(headers) { Self::Grpc } else { Self::Http }
    }

    /// Judges by status and headers, where these suffice.
    pub fn start(&self, status: StatusCode, headers: &HeaderMap) -> Option<Judgement> {
        match self {
            Self::Http => Some(Judgement::ended(!status.is_server_error(), None)),
            Self::Grpc => grpc_status(headers).map(Judgement::grpc),
            Self::Profile(classes) => {
                let class = classes.iter().find(|(condition, _)| holds(condition, status));
                match class {
                    Some((_, failure)) => Some(Judgement::ended(!failure, None)),
                    None => grpc_status(headers).map(Judgement::grpc),
                }
            }
        }
    }

    /// Judges at the end of a response that headers left open. `trailers` is none if there were none or the body was
    /// dropped before them.
    pub fn end(&self, status: StatusCode, trailers: Option<&HeaderMap>) -> Judgement {
        match (self, trailers.and_then(grpc_status)) {
            (Self::Grpc | Self::Profile(_), Some(code)) => Judgement::grpc(code),
            // A missing status is reported as unknown but counts as success.
            (Self::Grpc, None) => Judgement::ended(true, Some(2)),
            (Self::Http, _) | (Self::Profile(_), None) => Judgement::ended(!status.is_server_error(), None),
        }
    }
}

impl Judgement {
    fn ended(success: bool, grpc_status: Option<u16>) -> Self {
        Self { success, grpc_status, error: None }
    }

    fn grpc(code: u16) -> Self {
        Self::ended(!is_grpc_failure(code), Some(code))
    }

    /// For an error in place of a response, or while its body streamed.
    pub fn failed(cause: &Cause) -> Self {
        Self { success: false, grpc_status: None, error: Some(legacy_error(cause)) }
    }
}

/// Whether a gRPC code is the server's failure: unknown, deadline exceeded, permission denied, internal, unavailable,
/// data loss.
pub fn is_grpc_failure(code: u16) -> bool {
    matches!(code, 2 | 4 | 7 | 13 | 14 | 15)
}

/// `grpc-status` of headers or trailers. Codes above 16 become 2 (unknown); what is no number counts as missing.
pub fn grpc_status(headers: &HeaderMap) -> Option<u16> {
    let code: u32 = headers.get(GRPC_STATUS)?.to_str().ok()?.parse().ok()?;
    Some(u16::try_from(code).ok().filter(|c| *c <= 16).unwrap_or(2))
}

/// The name of a gRPC code as `grpc_status` labels of the newer families spell it; out of range is `UNKNOWN`.
pub fn grpc_code_name(code: u16) -> &'static str {
    match code {
        0 => "OK",
        1 => "CANCELLED",
        3 => "INVALID_ARGUMENT",
        4 => "DEADLINE_EXCEEDED",
        5 => "NOT_FOUND",
        6 => "ALREADY_EXISTS",
        7 => "PERMISSION_DENIED",
        8 => "RESOURCE_EXHAUSTED",
        9 => "FAILED_PRECONDITION",
        10 => "ABORTED",
        11 => "OUT_OF_RANGE",
        12 => "UNIMPLEMENTED",
        13 => "INTERNAL",
        14 => "UNAVAILABLE",
        15 => "DATA_LOSS",
        16 => "UNAUTHENTICATED",
        _ => "UNKNOWN",
    }
}

fn holds(condition: &ResponseCondition, status: StatusCode) -> bool {
    match condition {
        ResponseCondition::All(all) => all.iter().all(|c| holds(c, status)),
        ResponseCondition::Any(any) => any.iter().any(|c| holds(c, status)),
        ResponseCondition::Not(not) => !holds(not, status),
        ResponseCondition::Status(range) => range.contains(&status.as_u16()),
    }
}

/// The load that a failure counts as, under the penalty variant of the load metric (behaviour.md D.7): for 429, 5xx and
/// gRPC 2, 4, 8, 13, 14, 15 in the headers, the penalty or the server's own hint if that is longer.
pub fn penalty(config: &Penalty, status: StatusCode, headers: &HeaderMap) -> Option<Duration> {
    let grpc = grpc_status(headers).is_some_and(|code| matches!(code, 2 | 4 | 8 | 13 | 14 | 15));
    if !(grpc || status == StatusCode::TOO_MANY_REQUESTS || status.is_server_error()) {
        return None;
    }
    let hint = retry_after(status, headers).map_or(Duration::ZERO, |hint| hint.min(config.max_retry_after));
    Some(config.penalty.max(hint))
}

/// How long a server asks to be left alone: `retry-after` (seconds or a date, on 429 and 503), or
/// `grpc-retry-pushback-ms`.
pub fn retry_after(status: StatusCode, headers: &HeaderMap) -> Option<Duration> {
    if let Some(ms) = headers.get("grpc-retry-pushback-ms").and_then(|v| v.to_str().ok()).and_then(|v| v.parse().ok()) {
        return Some(Duration::from_millis(ms));
    }
    if !matches!(status, StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE) {
        return None;
    }
    let value = headers.get(RETRY_AFTER)?.to_str().ok()?.trim();
    if let Ok(seconds) = value.parse() {
        return Some(Duration::from_secs(seconds));
    }
    httpdate::parse_http_date(value).ok()?.duration_since(SystemTime::now()).ok()
}

/// `error` of `response_total` and `route_*` (metrics.md 4.1).
pub fn legacy_error(cause: &Cause) -> &'static str {
    match cause {
        Cause::ProfileTimeout(_) => "timeout",
        Cause::Http2Reset(reason) => match u32::from(*reason) {
            0 => "h2(NO_ERROR)",
            1 => "h2(PROTOCOL_ERROR)",
            2 => "h2(INTERNAL_ERROR)",
            3 => "h2(FLOW_CONTROL_ERROR)",
            4 => "h2(SETTINGS_TIMEOUT)",
            5 => "h2(STREAM_CLOSED)",
            6 => "h2(FRAME_SIZE_ERROR)",
            7 => "h2(REFUSED_STREAM)",
            8 => "h2(CANCEL)",
            9 => "h2(COMPRESSION_ERROR)",
            10 => "h2(CONNECT_ERROR)",
            11 => "h2(ENHANCE_YOUR_CALM)",
            12 => "h2(INADEQUATE_SECURITY)",
            13 => "h2(HTTP_1_1_REQUIRED)",
            _ => "h2(UNKNOWN)",
        },
        _ => "unclassified",
    }
}

/// `error` of the outbound route and backend families (metrics.md 4.3); none where a status stands instead.
pub fn route_error(cause: &Cause) -> Option<&'static str> {
    Some(match cause {
        Cause::FailFast => "FAIL_FAST",
        Cause::LoadShed => "LOAD_SHED",
        Cause::Redirect { .. } | Cause::InjectedHttp { .. } | Cause::InjectedGrpc { .. } => return None,
        Cause::ResponseHeadersTimeout(_) => "RESPONSE_HEADERS_TIMEOUT",
        Cause::ResponseTimeout(_) | Cause::BackendRequestTimeout(_) => "RESPONSE_STREAM_TIMEOUT",
        Cause::RequestTimeout(_) | Cause::ProfileTimeout(_) => "REQUEST_TIMEOUT",
        Cause::IdleTimeout(_) => "IDLE_TIMEOUT",
        Cause::Http2Reset(reason) => match *reason {
            h2::Reason::CANCEL => "CANCEL",
            h2::Reason::REFUSED_STREAM => "REFUSED",
            h2::Reason::ENHANCE_YOUR_CALM => "ENHANCE_YOUR_CALM",
            _ => "RESET",
        },
        Cause::Http2Connection(_) => "GO_AWAY",
        Cause::Io { .. } => "IO",
        Cause::RequiredId { .. }
        | Cause::FailBackend { .. }
        | Cause::NoRoute
        | Cause::Unauthorized
        | Cause::RateLimited { .. }
        | Cause::Forbidden(_)
        | Cause::GatewayDomain
        | Cause::GatewayLoop
        | Cause::InvalidPolicy(_)
        | Cause::Discovery(_)
        | Cause::ConnectTimeout(_)
        | Cause::IncompleteResponse
        | Cause::BadRequest(_)
        | Cause::MissingAuthority
        | Cause::Canceled
        | Cause::DetectTimeout(_)
        | Cause::Loop(_)
        | Cause::Unexpected(_) => "UNKNOWN",
    })
}

/// `error` of `outbound_http_errors_total` and `outbound_tcp_errors_total` (metrics.md 5.3).
pub fn outbound_error(cause: &Cause) -> &'static str {
    match cause {
        Cause::FailFast => "failfast",
        Cause::LoadShed => "loadshed",
        Cause::RequiredId { .. } => "identity required",
        Cause::RequestTimeout(_)
        | Cause::BackendRequestTimeout(_)
        | Cause::ResponseTimeout(_)
        | Cause::ResponseHeadersTimeout(_)
        | Cause::IdleTimeout(_)
        | Cause::ProfileTimeout(_) => "response timeout",
        Cause::Io { .. } | Cause::ConnectTimeout(_) | Cause::IncompleteResponse | Cause::Loop(_) => "i/o",
        Cause::FailBackend { .. }
        | Cause::NoRoute
        | Cause::Redirect { .. }
        | Cause::InjectedHttp { .. }
        | Cause::InjectedGrpc { .. }
        | Cause::Unauthorized
        | Cause::RateLimited { .. }
        | Cause::Forbidden(_)
        | Cause::GatewayDomain
        | Cause::GatewayLoop
        | Cause::InvalidPolicy(_)
        | Cause::Discovery(_)
        | Cause::Http2Reset(_)
        | Cause::Http2Connection(_)
        | Cause::BadRequest(_)
        | Cause::MissingAuthority
        | Cause::Canceled
        | Cause::DetectTimeout(_)
        | Cause::Unexpected(_) => "unexpected",
    }
}

/// `error` of `inbound_http_errors_total` and `inbound_tcp_errors_total` (metrics.md 5.1); none for denials and
/// missing routes, which have families of their own.
pub fn inbound_error(cause: &Cause) -> Option<&'static str> {
    Some(match cause {
        Cause::FailFast => "failfast",
        Cause::LoadShed => "loadshed",
        Cause::Io { .. } | Cause::ConnectTimeout(_) | Cause::IncompleteResponse | Cause::Loop(_) => "i/o",
        Cause::DetectTimeout(_) => "tls detection timeout",
        Cause::GatewayLoop => "gateway loop",
        Cause::GatewayDomain => "gateway domain invalid",
        Cause::Unauthorized | Cause::NoRoute => return None,
        Cause::RequestTimeout(_)
        | Cause::BackendRequestTimeout(_)
        | Cause::ResponseTimeout(_)
        | Cause::ResponseHeadersTimeout(_)
        | Cause::IdleTimeout(_)
        | Cause::ProfileTimeout(_)
        | Cause::RequiredId { .. }
        | Cause::FailBackend { .. }
        | Cause::Redirect { .. }
        | Cause::InjectedHttp { .. }
        | Cause::InjectedGrpc { .. }
        | Cause::RateLimited { .. }
        | Cause::Forbidden(_)
        | Cause::InvalidPolicy(_)
        | Cause::Discovery(_)
        | Cause::Http2Reset(_)
        | Cause::Http2Connection(_)
        | Cause::BadRequest(_)
        | Cause::MissingAuthority
        | Cause::Canceled
        | Cause::Unexpected(_) => "unexpected",
    })
}

/// Whether an attempt that failed so may be repeated whatever the route's conditions (behaviour.md D.11): nothing was
/// ready, response headers were late, or the peer says that it did not process the stream.
pub fn is_always_retryable(error: &Error) -> bool {
    match error.cause() {
        Cause::FailFast | Cause::ResponseHeadersTimeout(_) => true,
        Cause::Http2Reset(reason) => *reason == h2::Reason::REFUSED_STREAM,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
        pairs.iter().map(|(n, v)| (n.parse().unwrap(), v.parse().unwrap())).collect()
    }

    #[track_caller]
    fn check(
        rule: &Rule,
        status: u16,
        head: &[(&'static str, &str)],
        tail: &[(&'static str, &str)],
        expected: (bool, Option<u16>),
    ) {
        let status = StatusCode::from_u16(status).unwrap();
        let tail = headers(tail);
        let judged = rule.start(status, &headers(head)).unwrap_or_else(|| rule.end(status, Some(&tail)));
        assert_eq!((judged.success, judged.grpc_status), expected);
    }

    #[test]
    fn responses_are_judged_by_the_rule_of_their_request() {
        check(&Rule::Http, 404, &[], &[], (true, None));
        check(&Rule::Http, 503, &[], &[], (false, None));
        check(&Rule::Grpc, 503, &[("grpc-status", "0")], &[], (true, Some(0)));
        check(&Rule::Grpc, 200, &[], &[("grpc-status", "14")], (false, Some(14)));
        check(&Rule::Grpc, 200, &[], &[("grpc-status", "99")], (false, Some(2)));
        check(&Rule::Grpc, 200, &[], &[("grpc-status", "x")], (true, Some(2)));
        let profile = Rule::Profile(Arc::new([(ResponseCondition::Status(404..=404), true)]));
        check(&profile, 404, &[], &[], (false, None));
        check(&profile, 500, &[], &[], (false, None));
        check(&profile, 200, &[], &[("grpc-status", "13")], (false, Some(13)));
        assert_eq!(Judgement::failed(&Cause::Http2Reset(h2::Reason::CANCEL)).error, Some("h2(CANCEL)"));
    }

    #[test]
    fn hints_lengthen_penalties_up_to_their_bound() {
        let s = Duration::from_secs;
        let config = Penalty { penalty: s(5), max_retry_after: s(30) };
        let check = |status: u16, head: &[(&'static str, &str)], expected: Option<Duration>| {
            let status = StatusCode::from_u16(status).unwrap();
            assert_eq!(penalty(&config, status, &headers(head)), expected, "{status} {head:?}");
        };
        check(200, &[("retry-after", "9")], None);
        check(500, &[("retry-after", "9")], Some(s(5)));
        check(503, &[("retry-after", "9")], Some(s(9)));
        check(429, &[("retry-after", "900")], Some(s(30)));
        check(429, &[("retry-after", "Tue, 31 Dec 2999 23:59:59 GMT")], Some(s(30)));
        check(429, &[("retry-after", "soon")], Some(s(5)));
        check(200, &[("grpc-status", "8"), ("grpc-retry-pushback-ms", "7000")], Some(s(7)));
    }
}
