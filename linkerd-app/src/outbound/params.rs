//! Limits and retries of one request: the rule's, changed field by field by `l5d-` request headers where the rule
//! allows them (behaviour.md D.13).

use crate::policy::client::{Backoff, Retry, Timeouts};
use http::HeaderMap;
use std::{borrow::Cow, ops::RangeInclusive, time::Duration};

/// What a request obeys.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Params {
    pub(super) timeouts: Timeouts,
    pub(super) retry: Option<Retry>,
}

/// Retry policy where only headers ask for one (behaviour.md D.13): one retry, 64 KiB, 25 to 250 ms.
fn header_retry() -> Retry {
    Retry {
        max_retries: 1,
        max_request_bytes: 64 * 1024,
        statuses: Vec::new(),
        grpc_codes: Vec::new(),
        timeout: None,
        backoff: Some(Backoff { min: Duration::from_millis(25), max: Duration::from_millis(250), jitter: 1.0 }),
        connection_errors: false,
        budget: None,
    }
}

impl Params {
    /// The rule's parameters with those of the headers, which are removed. Values that do not parse are ignored.
    pub(super) fn with_headers<'a>(&'a self, headers: &mut HeaderMap) -> Cow<'a, Self> {
        const NAMES: [&str; 7] = [
            "l5d-retry-http",
            "l5d-retry-grpc",
            "l5d-retry-limit",
            "l5d-retry-timeout",
            "l5d-timeout",
            "l5d-request-timeout",
            "l5d-response-timeout",
        ];
        let mut params = Cow::Borrowed(self);
        for name in NAMES {
            let Some(value) = headers.remove(name) else { continue };
            let Ok(value) = value.to_str() else { continue };
            let params = params.to_mut();
            match name {
                "l5d-retry-http" => params.retry().statuses = value.split(',').filter_map(statuses).collect(),
                "l5d-retry-grpc" => params.retry().grpc_codes = value.split(',').filter_map(grpc_code).collect(),
                "l5d-retry-limit" => {
                    if let Ok(limit) = value.parse() {
                        params.retry().max_retries = limit;
                    }
                }
                "l5d-retry-timeout" => {
                    if let Some(timeout) = duration(value) {
                        params.retry().timeout = Some(timeout);
                    }
                }
                "l5d-timeout" | "l5d-request-timeout" => {
                    params.timeouts.request = duration(value).or(params.timeouts.request);
                }
                _ => params.timeouts.response = duration(value).or(params.timeouts.response),
            }
        }
        params
    }

    fn retry(&mut self) -> &mut Retry {
        self.retry.get_or_insert_with(header_retry)
    }
}

/// `NNN`, `NNN-NNN`, `5xx` or `gateway-error`.
fn statuses(token: &str) -> Option<RangeInclusive<u16>> {
    let status = |s: &str| s.parse::<u16>().ok().filter(|s| (100..600).contains(s));
    if token.eq_ignore_ascii_case("5xx") {
        return Some(500..=599);
    }
    if token.eq_ignore_ascii_case("gateway-error") {
        return Some(502..=504);
    }
    match token.split_once('-') {
        Some((from, to)) => Some(status(from)?..=status(to)?).filter(|range| !range.is_empty()),
        None => status(token).map(|s| s..=s),
    }
}

fn grpc_code(token: &str) -> Option<u16> {
    const NAMES: [(&str, u16); 5] =
        [("cancelled", 1), ("deadline-exceeded", 4), ("resource-exhausted", 8), ("internal", 13), ("unavailable", 14)];
    NAMES.iter().find(|(name, _)| token.eq_ignore_ascii_case(name)).map(|(_, code)| *code)
}

/// Digits and a unit: `ms`, `s`, `m`, `h`, `d` (behaviour.md 0.1, unit required).
fn duration(text: &str) -> Option<Duration> {
    let text = text.trim();
    let split = text.find(|c: char| !c.is_ascii_digit())?;
    let number: u64 = text.get(..split)?.parse().ok()?;
    let seconds = |unit: u64| number.checked_mul(unit).map(Duration::from_secs);
    match text.get(split..)? {
        "ms" => Some(Duration::from_millis(number)),
        "s" => seconds(1),
        "m" => seconds(60),
        "h" => seconds(3600),
        "d" => seconds(86_400),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(headers: &[(&'static str, &str)], expected: Params) {
        let mut map: HeaderMap =
            headers.iter().map(|(n, v)| (http::HeaderName::from_static(n), v.parse().unwrap())).collect();
        let rule =
            Params { timeouts: Timeouts { request: Some(Duration::from_secs(9)), ..Timeouts::default() }, retry: None };
        assert_eq!(*rule.with_headers(&mut map), expected);
        assert!(map.is_empty());
    }

    #[test]
    fn headers_override_field_by_field() {
        let timeouts = |request: u64, response: Option<u64>| Timeouts {
            request: Some(Duration::from_secs(request)),
            response: response.map(Duration::from_secs),
            ..Timeouts::default()
        };
        check(&[], Params { timeouts: timeouts(9, None), retry: None });
        check(
            &[("l5d-timeout", "3s"), ("l5d-request-timeout", "4s")],
            Params { timeouts: timeouts(4, None), retry: None },
        );
        check(
            &[("l5d-timeout", "x"), ("l5d-response-timeout", "1m")],
            Params { timeouts: timeouts(9, Some(60)), retry: None },
        );
        check(
            &[("l5d-retry-http", "5XX,429,500-502,bad, 503,599-500"), ("l5d-retry-limit", "7")],
            Params {
                timeouts: timeouts(9, None),
                retry: Some(Retry {
                    statuses: vec![500..=599, 429..=429, 500..=502],
                    max_retries: 7,
                    ..header_retry()
                }),
            },
        );
        check(
            &[("l5d-retry-grpc", "Unavailable,internal,what"), ("l5d-retry-timeout", "250ms")],
            Params {
                timeouts: timeouts(9, None),
                retry: Some(Retry {
                    grpc_codes: vec![14, 13],
                    timeout: Some(Duration::from_millis(250)),
                    ..header_retry()
                }),
            },
        );
    }

    #[test]
    fn durations_need_a_unit() {
        for (text, expected) in [("10ms", Some(10)), ("2s", Some(2000)), ("5", None), ("s", None), ("1.5s", None)] {
            assert_eq!(duration(text), expected.map(Duration::from_millis), "{text}");
        }
        assert_eq!(duration("99999999999999999999d"), None);
    }
}
