//! Routes and backends as the newer families count them: inbound (metrics.md 5.2), outbound HTTP and gRPC with retries (5.5),
//! opaque and TLS routes (5.7).

use super::{
    errors::{RouteCloseError, StreamError},
    labels::Text,
    metric::{COARSE, Counter, FINE, FRAME, Histogram, SlotKey, Slots},
    prom::{Encoder, Group, Sample},
    store::{Metric, Series},
};
use crate::error::{Cause, facts};
use prometheus_client::registry::Unit;
use std::{
    fmt,
    sync::{
        OnceLock,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Duration,
};

/// Which family a route's numbers are in.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Hash)]
pub enum RouteKind {
    /// `…_http_…`, with `http_status`.
    Http,
    /// `…_grpc_…`, with `grpc_status`.
    Grpc,
}

/// How a response ended. Status and error may both be set; neither is a response that was given up before its head.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Ended {
    /// HTTP: the status. gRPC: the code, 2 (UNKNOWN) if the response had none.
    pub status: Option<u16>,
    /// Why it did not end normally.
    pub error: Option<StreamError>,
}

impl SlotKey for Ended {
    /// No such status; printed as `other`.
    const OTHER: Self = Self { status: Some(u16::MAX), error: None };
}

impl SlotKey for Option<u16> {
    const OTHER: Self = Some(u16::MAX);
}

impl Ended {
    /// A call that failed without a response.
    pub fn failed(cause: &Cause) -> Self {
        let status = match cause {
            Cause::Redirect { status, .. } | Cause::InjectedHttp { status, .. } => Some(status.as_u16()),
            Cause::InjectedGrpc { code, .. } => Some(*code),
            _ => None,
        };
        Self { status, error: facts(cause).stream }
    }

    fn labels<'a>(self, kind: RouteKind) -> ((&'a str, Text<'a>), Option<(&'a str, Text<'a>)>) {
        let status = match (kind, self.status) {
            (_, Some(u16::MAX)) => Text::Str("other"),
            (RouteKind::Http, Some(status)) => Text::Num(status.into()),
            (RouteKind::Grpc, Some(code)) => Text::Str(grpc_name(code)),
            (_, None) => Text::Str(""),
        };
        let name = match kind {
            RouteKind::Http => "http_status",
            RouteKind::Grpc => "grpc_status",
        };
        ((name, status), Some(("error", Text::Str(self.error.map_or("", StreamError::as_str)))))
    }
}

/// Upper-case names of the gRPC codes; whatever is none of them is UNKNOWN.
pub fn grpc_name(code: u16) -> &'static str {
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

/// An outbound route: requests of clients, whatever number of attempts they took.
#[derive(Debug)]
pub struct RouteMetrics {
    statuses: Slots<Ended, Counter>,
    duration: Histogram,
    frames: Histogram,
    begun: AtomicBool,
    retry: OnceLock<RetryMetrics>,
}

/// Retries of an outbound route.
#[derive(Debug, Default)]
pub struct RetryMetrics {
    /// Extra attempts sent.
    pub requests: Counter,
    /// Retries that ended in a response that is not retryable.
    pub successes: Counter,
    /// Still retryable after the last attempt.
    pub limit_exceeded: Counter,
    /// Skipped because nothing was ready for another attempt, or the budget was spent.
    pub overflow: Counter,
}

impl RouteMetrics {
    pub(super) fn new() -> Self {
        Self {
            statuses: Slots::default(),
            duration: Histogram::new(&COARSE),
            frames: Histogram::new(&FRAME),
            begun: AtomicBool::new(false),
            retry: OnceLock::new(),
        }
    }

    /// A request is dispatched.
    pub fn request(&self) {
        // The line is not written to again once it is set.
        if !self.begun.load(Relaxed) {
            self.begun.store(true, Relaxed);
        }
    }

    /// A DATA frame of a request, bytes.
    pub fn request_frame(&self, len: u64) {
        self.frames.observe(len);
    }

    /// The response ended, or the call failed, so long after dispatch. Not for calls given up before response headers.
    pub fn ended(&self, how: Ended, duration: Duration) {
        self.statuses.get(how, Counter::default).inc();
        self.duration.observe_nanos(duration);
    }

    /// For requests that carry a retry policy; all four families appear with the first of them.
    pub fn retry(&self) -> &RetryMetrics {
        self.retry.get_or_init(RetryMetrics::default)
    }
}

impl Metric for RouteMetrics {
    fn version(&self) -> u64 {
        self.duration.count() + self.frames.count()
    }
}

impl Group for RouteMetrics {
    type Names = RouteKind;

    fn encode(out: &mut Encoder<'_, '_>, kind: &RouteKind, series: &[Series<Self>]) -> fmt::Result {
        let kind = *kind;
        let prefix = match kind {
            RouteKind::Http => "outbound_http_route",
            RouteKind::Grpc => "outbound_grpc_route",
        };
        out.counter(
            &format!("{prefix}_request_statuses"),
            None,
            "Ended requests of clients",
            series.iter().flat_map(|s| {
                s.metric.statuses.iter().map(move |(how, count)| {
                    let (status, error) = how.labels(kind);
                    (Sample::new(s).after(status, error), count.get())
                })
            }),
        )?;
        out.histogram(
            &format!("{prefix}_request_duration"),
            Unit::Seconds,
            "Time from a request's dispatch to its response's end",
            series.iter().filter(|s| s.metric.duration.count() > 0).map(|s| (Sample::new(s), &s.metric.duration)),
        )?;
        out.histogram(
            &format!("{prefix}_request_frame_size"),
            Unit::Bytes,
            "Sizes of request DATA frames",
            series.iter().filter(|s| s.metric.begun.load(Relaxed)).map(|s| (Sample::new(s), &s.metric.frames)),
        )?;
        let families: [(&str, &str, fn(&RetryMetrics) -> u64); 4] = [
            ("requests", "Extra attempts sent", |r| r.requests.get()),
            ("successes", "Retries that ended in a response not to be retried", |r| r.successes.get()),
            ("limit_exceeded", "Requests still retryable after their last attempt", |r| r.limit_exceeded.get()),
            ("overflow", "Retries skipped because nothing could take them", |r| r.overflow.get()),
        ];
        for (name, help, value) in families {
            let retries = series.iter().filter_map(|s| Some((Sample::new(s), value(s.metric.retry.get()?))));
            out.counter(&format!("{prefix}_retry_{name}"), None, help, retries)?;
        }
        Ok(())
    }
}

/// A backend of an outbound route: one request per attempt.
#[derive(Debug)]
pub struct BackendMetrics {
    requests: Counter,
    statuses: Slots<Ended, Counter>,
    duration: Histogram,
    frames: Histogram,
}

impl BackendMetrics {
    pub(super) fn new() -> Self {
        Self {
            requests: Counter::default(),
            statuses: Slots::default(),
            duration: Histogram::new(&FINE),
            frames: Histogram::new(&FRAME),
        }
    }

    /// An attempt is dispatched.
    pub fn request(&self) {
        self.requests.inc();
    }

    /// A DATA frame of a response, bytes.
    pub fn response_frame(&self, len: u64) {
        self.frames.observe(len);
    }

    /// The attempt ended, so long after its request body was fully sent or dropped; zero if the response ended first.
    pub fn ended(&self, how: Ended, since_request_end: Duration) {
        self.statuses.get(how, Counter::default).inc();
        self.duration.observe_nanos(since_request_end);
    }
}

impl Metric for BackendMetrics {
    fn version(&self) -> u64 {
        self.requests.get() + self.duration.count() + self.frames.count()
    }
}

impl Group for BackendMetrics {
    type Names = RouteKind;

    fn encode(out: &mut Encoder<'_, '_>, kind: &RouteKind, series: &[Series<Self>]) -> fmt::Result {
        let kind = *kind;
        let prefix = match kind {
            RouteKind::Http => "outbound_http_route_backend",
            RouteKind::Grpc => "outbound_grpc_route_backend",
        };
        out.counter(
            &format!("{prefix}_requests"),
            None,
            "Attempts dispatched to backends",
            series.iter().map(|s| (Sample::new(s), s.metric.requests.get())),
        )?;
        out.counter(
            &format!("{prefix}_response_statuses"),
            None,
            "Ended attempts",
            series.iter().flat_map(|s| {
                s.metric.statuses.iter().map(move |(how, count)| {
                    let (status, error) = how.labels(kind);
                    (Sample::new(s).after(status, error), count.get())
                })
            }),
        )?;
        out.histogram(
            &format!("{prefix}_response_duration"),
            Unit::Seconds,
            "Time from a request's end to its response's end, per attempt",
            series.iter().filter(|s| s.metric.duration.count() > 0).map(|s| (Sample::new(s), &s.metric.duration)),
        )?;
        out.histogram(
            &format!("{prefix}_response_frame_size"),
            Unit::Bytes,
            "Sizes of response DATA frames",
            series.iter().map(|s| (Sample::new(s), &s.metric.frames)),
        )
    }
}

/// An inbound route: requests that were authorized and passed filters and rate limit.
#[derive(Debug)]
pub struct InboundRouteMetrics {
    requests: Counter,
    statuses: Slots<Option<u16>, Counter>,
    request_duration: Histogram,
    response_duration: Histogram,
    request_frames: Histogram,
    response_frames: Histogram,
}

impl InboundRouteMetrics {
    pub(super) fn new() -> Self {
        Self {
            requests: Counter::default(),
            statuses: Slots::default(),
            request_duration: Histogram::new(&FINE),
            response_duration: Histogram::new(&COARSE),
            request_frames: Histogram::new(&FRAME),
            response_frames: Histogram::new(&FRAME),
        }
    }

    /// A request is dispatched.
    pub fn request(&self) {
        self.requests.inc();
    }

    /// A DATA frame of a request, bytes.
    pub fn request_frame(&self, len: u64) {
        self.request_frames.observe(len);
    }

    /// A DATA frame of a response, bytes.
    pub fn response_frame(&self, len: u64) {
        self.response_frames.observe(len);
    }

    /// The response ended: with the HTTP status or the gRPC code if it had one, so long after dispatch and after the
    /// request body's end (zero if the response ended first).
    pub fn ended(&self, status: Option<u16>, since_dispatch: Duration, since_request_end: Duration) {
        self.statuses.get(status, Counter::default).inc();
        self.request_duration.observe_nanos(since_dispatch);
        self.response_duration.observe_nanos(since_request_end);
    }
}

impl Metric for InboundRouteMetrics {
    fn version(&self) -> u64 {
        self.requests.get() + self.request_duration.count() + self.request_frames.count() + self.response_frames.count()
    }
}

impl Group for InboundRouteMetrics {
    type Names = RouteKind;

    fn encode(out: &mut Encoder<'_, '_>, kind: &RouteKind, series: &[Series<Self>]) -> fmt::Result {
        let prefix = match kind {
            RouteKind::Http => "inbound_http",
            RouteKind::Grpc => "inbound_grpc",
        };
        // A handle is made with its target; the families begin with the first request.
        let begun = || series.iter().filter(|s| s.metric.requests.get() > 0);
        let ended = || series.iter().filter(|s| s.metric.request_duration.count() > 0);
        out.counter(
            &format!("{prefix}_requests"),
            None,
            "Authorized requests dispatched",
            begun().map(|s| (Sample::new(s), s.metric.requests.get())),
        )?;
        out.counter(
            &format!("{prefix}_statuses"),
            None,
            "Ended responses",
            series.iter().flat_map(|s| {
                s.metric.statuses.iter().map(move |(status, count)| {
                    let status = match status {
                        Some(u16::MAX) => Text::Str("other"),
                        Some(status) => Text::Num(status.into()),
                        None => Text::Str(""),
                    };
                    (Sample::new(s).after(("status", status), None), count.get())
                })
            }),
        )?;
        out.histogram(
            &format!("{prefix}_request_duration"),
            Unit::Seconds,
            "Time from a request's dispatch to its response's end",
            ended().map(|s| (Sample::new(s), &s.metric.request_duration)),
        )?;
        out.histogram(
            &format!("{prefix}_response_duration"),
            Unit::Seconds,
            "Time from a request's end to its response's end",
            ended().map(|s| (Sample::new(s), &s.metric.response_duration)),
        )?;
        out.histogram(
            &format!("{prefix}_request_frame_size"),
            Unit::Bytes,
            "Sizes of request DATA frames",
            begun().map(|s| (Sample::new(s), &s.metric.request_frames)),
        )?;
        out.histogram(
            &format!("{prefix}_response_frame_size"),
            Unit::Bytes,
            "Sizes of response DATA frames",
            begun().map(|s| (Sample::new(s), &s.metric.response_frames)),
        )
    }
}

/// Connections on an opaque or TLS route.
#[derive(Debug, Default)]
pub struct ConnRouteMetrics {
    opened: Counter,
    closed: Counter,
    failed: [Counter; RouteCloseError::ALL.len()],
}

impl ConnRouteMetrics {
    /// A connection is dispatched on the route.
    pub fn open(&self) {
        self.opened.inc();
    }

    /// It ended: well, or with a failure.
    pub fn close(&self, cause: Option<&Cause>) {
        match cause.map(|cause| facts(cause).route) {
            None => self.closed.inc(),
            Some(error) => {
                if let Some(i) = RouteCloseError::ALL.iter().position(|e| *e == error) {
                    self.failed[i].inc();
                }
            }
        }
    }
}

impl Metric for ConnRouteMetrics {
    fn version(&self) -> u64 {
        self.opened.get() + self.closed.get() + self.failed.iter().map(Counter::get).sum::<u64>()
    }
}

impl Group for ConnRouteMetrics {
    /// The families' common prefix.
    type Names = &'static str;

    fn encode(out: &mut Encoder<'_, '_>, prefix: &&'static str, series: &[Series<Self>]) -> fmt::Result {
        out.counter(
            &format!("{prefix}_open"),
            None,
            "Connections dispatched on routes",
            series.iter().map(|s| (Sample::new(s), s.metric.opened.get())),
        )?;
        out.counter(
            &format!("{prefix}_close"),
            None,
            "Connections on routes that ended",
            series.iter().flat_map(|s| {
                let well = (Sample::new(s).after(("error", Text::Str("")), None), s.metric.closed.get());
                let failed = RouteCloseError::ALL.iter().zip(&s.metric.failed).map(move |(error, count)| {
                    (Sample::new(s).after(("error", Text::Str(error.as_str())), None), count.get())
                });
                std::iter::once(well).chain(failed)
            }),
        )
    }
}
