//! Requests and connections that the proxy itself failed, by a closed set of kinds for each family (metrics.md 4.3, 5.1, 5.3).
//!
//! Which cause is of which kind stands in [`crate::error::facts`].

use super::{
    labels::Text,
    legacy::{Family, Sample},
    metric::Counter,
    store::{Metric, Series},
};
use crate::error::{Cause, facts};
use std::{fmt, marker::PhantomData};

/// Values of a label `error`, all of them.
pub trait Kind: Copy + fmt::Debug + Send + Sync + 'static {
    /// Every kind, in order of index.
    const ALL: &'static [Self];

    /// The kind of a cause.
    fn of(cause: &Cause) -> Self;

    /// The label's value.
    fn as_str(self) -> &'static str;

    /// Position in [`Kind::ALL`].
    fn index(self) -> usize;
}

/// `error` of `inbound_http_errors_total` and `inbound_tcp_errors_total`.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum InboundError {
    /// A queue waited for its whole timeout.
    FailFast,
    /// Refused at once.
    LoadShed,
    /// Connecting, reading or writing failed.
    Io,
    /// No first bytes in time.
    TlsDetectTimeout,
    /// A gateway met its own request.
    GatewayLoop,
    /// A gateway does not serve the name.
    GatewayDomain,
    /// Everything else.
    Unexpected,
}

/// `error` of `outbound_http_errors_total` and `outbound_tcp_errors_total`.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum OutboundError {
    /// Connecting, reading or writing failed.
    Io,
    /// `l5d-require-id` was not met.
    IdentityRequired,
    /// A queue waited for its whole timeout.
    FailFast,
    /// A route's timeout passed.
    ResponseTimeout,
    /// Refused at once.
    LoadShed,
    /// Everything else.
    Unexpected,
}

/// `error` of the outbound route and backend families.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum StreamError {
    /// A balancer or queue in failfast.
    FailFast,
    /// Load shedding.
    LoadShed,
    /// Response headers late.
    ResponseHeadersTimeout,
    /// The route's response timeout.
    ResponseStreamTimeout,
    /// The whole request's deadline.
    RequestTimeout,
    /// Nothing moved for too long.
    IdleTimeout,
    /// RST_STREAM CANCEL.
    Cancel,
    /// RST_STREAM REFUSED_STREAM.
    Refused,
    /// RST_STREAM ENHANCE_YOUR_CALM.
    EnhanceYourCalm,
    /// RST_STREAM with another reason.
    Reset,
    /// GOAWAY.
    GoAway,
    /// I/O under the stream.
    Io,
    /// Anything else, also a body that the client dropped before its end.
    Unknown,
}

/// `error` of the outbound TCP and TLS route families.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum RouteCloseError {
    /// Policy forbids the destination.
    Forbidden,
    /// The backend can't be.
    InvalidBackend,
    /// The policy could not be understood.
    InvalidPolicy,
    /// Everything else.
    Unexpected,
}

impl Kind for InboundError {
    const ALL: &'static [Self] = &[
        Self::FailFast,
        Self::LoadShed,
        Self::Io,
        Self::TlsDetectTimeout,
        Self::GatewayLoop,
        Self::GatewayDomain,
        Self::Unexpected,
    ];

    fn of(cause: &Cause) -> Self {
        facts(cause).inbound
    }

    fn as_str(self) -> &'static str {
        match self {
            Self::FailFast => "failfast",
            Self::LoadShed => "loadshed",
            Self::Io => "i/o",
            Self::TlsDetectTimeout => "tls detection timeout",
            Self::GatewayLoop => "gateway loop",
            Self::GatewayDomain => "gateway domain invalid",
            Self::Unexpected => "unexpected",
        }
    }

    fn index(self) -> usize {
        self as usize
    }
}

impl Kind for OutboundError {
    const ALL: &'static [Self] =
        &[Self::Io, Self::IdentityRequired, Self::FailFast, Self::ResponseTimeout, Self::LoadShed, Self::Unexpected];

    fn of(cause: &Cause) -> Self {
        facts(cause).outbound
    }

    fn as_str(self) -> &'static str {
        match self {
            Self::Io => "i/o",
            Self::IdentityRequired => "identity required",
            Self::FailFast => "failfast",
            Self::ResponseTimeout => "response timeout",
            Self::LoadShed => "loadshed",
            Self::Unexpected => "unexpected",
        }
    }

    fn index(self) -> usize {
        self as usize
    }
}

impl StreamError {
    /// The label's value.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::FailFast => "FAIL_FAST",
            Self::LoadShed => "LOAD_SHED",
            Self::ResponseHeadersTimeout => "RESPONSE_HEADERS_TIMEOUT",
            Self::ResponseStreamTimeout => "RESPONSE_STREAM_TIMEOUT",
            Self::RequestTimeout => "REQUEST_TIMEOUT",
            Self::IdleTimeout => "IDLE_TIMEOUT",
            Self::Cancel => "CANCEL",
            Self::Refused => "REFUSED",
            Self::EnhanceYourCalm => "ENHANCE_YOUR_CALM",
            Self::Reset => "RESET",
            Self::GoAway => "GO_AWAY",
            Self::Io => "IO",
            Self::Unknown => "UNKNOWN",
        }
    }
}

impl RouteCloseError {
    pub(super) const ALL: [Self; 4] = [Self::Forbidden, Self::InvalidBackend, Self::InvalidPolicy, Self::Unexpected];

    /// The label's value.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Forbidden => "forbidden",
            Self::InvalidBackend => "invalid_backend",
            Self::InvalidPolicy => "invalid_policy",
            Self::Unexpected => "unexpected",
        }
    }
}

/// Errors of one label set by kind. A kind is printed from its first event on.
#[derive(Debug)]
pub struct ErrorMetrics<K> {
    counts: Box<[Counter]>,
    kind: PhantomData<K>,
}

impl<K: Kind> Default for ErrorMetrics<K> {
    fn default() -> Self {
        Self { counts: K::ALL.iter().map(|_| Counter::default()).collect(), kind: PhantomData }
    }
}

impl<K: Kind> ErrorMetrics<K> {
    /// Counts a failure.
    pub fn failed(&self, cause: &Cause) {
        if let Some(count) = self.counts.get(K::of(cause).index()) {
            count.inc();
        }
    }

    fn iter(&self) -> impl Iterator<Item = (K, u64)> {
        K::ALL.iter().copied().zip(self.counts.iter().map(Counter::get)).filter(|(_, n)| *n > 0)
    }
}

impl<K: Kind> Metric for ErrorMetrics<K> {
    fn version(&self) -> u64 {
        self.counts.iter().map(Counter::get).sum()
    }
}

/// Whether `error` stands before or after the other labels; the original differs by family.
#[derive(Copy, Clone, PartialEq, Eq)]
pub(super) enum Place {
    First,
    Last,
}

pub(super) fn encode<K: Kind>(
    out: &mut String,
    name: &str,
    help: &'static str,
    place: Place,
    series: &[Series<ErrorMetrics<K>>],
) {
    let mut family = Family::counter(out, name, help);
    for s in series {
        for (kind, count) in s.metric.iter() {
            let error = [("error", Text::Str(kind.as_str()))];
            let (before, after) = if place == Place::First { (&error[..], &[][..]) } else { (&[][..], &error[..]) };
            family.value(Sample { before, base: &s.text, after }, count);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Lack;
    use std::sync::Arc;

    #[test]
    fn indices_are_positions() {
        assert!(InboundError::ALL.iter().enumerate().all(|(i, k)| k.index() == i));
        assert!(OutboundError::ALL.iter().enumerate().all(|(i, k)| k.index() == i));
    }

    #[test]
    fn only_kinds_that_happened_are_printed() {
        let errors = ErrorMetrics::<InboundError>::default();
        errors.failed(&Cause::FailFast(Lack::Readiness));
        errors.failed(&Cause::Io { errno: None, message: "refused".into() });
        errors.failed(&Cause::FailFast(Lack::Readiness));
        let series = [Series { text: "t=\"1\"".into(), last_value: 3, metric: Arc::new(errors) }];
        let mut out = String::new();
        encode(&mut out, "inbound_http_errors_total", "H.", Place::First, &series);
        assert!(out.ends_with(
            "inbound_http_errors_total{error=\"failfast\",t=\"1\"} 2\n\
             inbound_http_errors_total{error=\"i/o\",t=\"1\"} 1\n"
        ));
        out.clear();
        encode(&mut out, "outbound_tcp_errors_total", "H.", Place::Last, &series);
        assert!(out.contains("{t=\"1\",error=\"failfast\"} 2"));
    }
}
