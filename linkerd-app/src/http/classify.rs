//! Judges responses: success or failure for metrics and breakers (metrics.md 4.1), what balancers make of a failure, and
//! which failures may always be retried.

use super::{is_grpc, rescue::GRPC_STATUS};
use crate::{
    error::{Cause, Error},
    policy::client::{Penalty, ResponseCondition},
    telemetry::Class,
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

impl Rule {
    /// From the headers of a request; `grpc` if the policy in force is for gRPC.
    pub fn of(headers: &HeaderMap, grpc: bool) -> Self {
        if grpc || is_grpc(headers) { Self::Grpc } else { Self::Http }
    }

    /// Judges by status and headers, where these suffice.
    pub fn start(&self, status: StatusCode, headers: &HeaderMap) -> Option<Class> {
        match self {
            Self::Http => Some(Class::http(status.as_u16())),
            Self::Grpc => grpc_status(headers).map(|code| Class::grpc(Some(code))),
            Self::Profile(classes) => {
                let class = classes.iter().find(|(condition, _)| holds(condition, status));
                match class {
                    Some((_, failure)) => Some(Class { success: !failure, grpc_status: None, error: None }),
                    None => grpc_status(headers).map(|code| Class::grpc(Some(code))),
                }
            }
        }
    }

    /// Judges at the end of a response that headers left open. `trailers` is none if there were none or the body was
    /// dropped before them.
    pub fn end(&self, status: StatusCode, trailers: Option<&HeaderMap>) -> Class {
        match (self, trailers.and_then(grpc_status)) {
            (Self::Grpc | Self::Profile(_), Some(code)) => Class::grpc(Some(code)),
            // A missing status is reported as unknown but counts as success.
            (Self::Grpc, None) => Class::grpc(None),
            (Self::Http, _) | (Self::Profile(_), None) => Class::http(status.as_u16()),
        }
    }
}

/// `grpc-status` of headers or trailers. Codes above 16 become 2 (unknown); what is no number counts as missing.
pub fn grpc_status(headers: &HeaderMap) -> Option<u16> {
    let code: u32 = headers.get(GRPC_STATUS)?.to_str().ok()?.parse().ok()?;
    Some(u16::try_from(code).ok().filter(|c| *c <= 16).unwrap_or(2))
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

/// Whether an attempt that failed so may be repeated whatever the route's conditions (behaviour.md D.11): nothing was
/// ready, response headers were late, or the peer says that it did not process the stream.
pub fn is_always_retryable(error: &Error) -> bool {
    match error.cause() {
        Cause::FailFast(_) | Cause::ResponseHeadersTimeout(_) => true,
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
