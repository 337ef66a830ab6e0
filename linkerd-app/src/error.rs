//! Why a request or a connection ended other than it was meant to: one closed enum.
//!
//! Everything that has to be decided from a failure (HTTP status, gRPC code, whether the client's connection is
//! closed, metric labels, whether it is the endpoint's) is in one table, [`facts`], and the code that operators see in
//! another, [`Code::of`]: matches over [`Cause`] without a wildcard, so that a new cause cannot be forgotten. Stages add
//! what they know with [`Error::context`]; the chain is what `l5d-proxy-error` and the log show.

mod facts;

pub use self::facts::{Facts, facts};

use crate::telemetry::termination::{Code, Phase};
use http::{HeaderValue, StatusCode};
use std::{fmt, net::SocketAddr, sync::Arc, time::Duration};

/// A failure: its cause, how far things had come, and where it happened.
#[derive(Clone, Debug)]
pub struct Error(Box<Inner>);

#[derive(Clone, Debug)]
struct Inner {
    cause: Cause,
    /// As the stage that failed knows it.
    phase: Option<Phase>,
    /// Outermost first.
    context: Vec<Arc<str>>,
}

/// What ended a request or a connection.
#[derive(Clone, Debug, PartialEq)]
pub enum Cause {
    /// Nothing was ready for the whole failfast timeout.
    FailFast(Lack),
    /// Refused at once, because of an earlier failfast or a full queue.
    LoadShed(Lack),
    /// The route's whole-request deadline passed.
    RequestTimeout(Duration),
    /// One attempt took longer than `backendRequest` allows.
    BackendRequestTimeout(Duration),
    /// The response did not end in time after the request did.
    ResponseTimeout(Duration),
    /// Response headers did not come in time (per-try timeout of a retry policy).
    ResponseHeadersTimeout(Duration),
    /// No frame in either direction for too long.
    IdleTimeout(Duration),
    /// A ServiceProfile's route timeout.
    ProfileTimeout(Duration),
    /// `l5d-require-id` asked for another identity than the endpoint's.
    RequiredId {
        /// What the request asked for.
        required: String,
        /// What the endpoint has, if anything.
        found: Option<String>,
    },
    /// The route leads to a backend that can't be.
    FailBackend {
        /// HTTP status for it.
        status: StatusCode,
        /// gRPC code for it.
        grpc_code: u16,
        /// Why.
        message: Arc<str>,
    },
    /// Routes exist, none matches.
    NoRoute,
    /// A route answers with a redirect.
    Redirect {
        /// Status.
        status: StatusCode,
        /// Where to.
        location: HeaderValue,
    },
    /// A route injects an HTTP failure.
    InjectedHttp {
        /// Status.
        status: StatusCode,
        /// Message.
        message: Arc<str>,
    },
    /// A route injects a gRPC failure.
    InjectedGrpc {
        /// gRPC code.
        code: u16,
        /// Message.
        message: Arc<str>,
    },
    /// The client may not do that.
    Unauthorized,
    /// A local rate limit.
    RateLimited {
        /// Which bucket refused: `total`, `identity` or `override`.
        scope: RateLimitScope,
        /// Requests per second of that bucket.
        rps: u32,
        /// When the bucket has a cell again.
        retry_after: Duration,
    },
    /// Egress policy forbids the destination.
    Forbidden(Arc<str>),
    /// The gateway does not serve that name.
    GatewayDomain,
    /// The gateway met its own request again.
    GatewayLoop,
    /// The policy in force could not be understood.
    InvalidPolicy(Arc<str>),
    /// Discovery refused the destination or did not answer.
    Discovery(Arc<str>),
    /// The HTTP/2 peer reset the stream.
    Http2Reset(h2::Reason),
    /// The HTTP/2 peer said GOAWAY, or the connection broke, under a stream.
    Http2Connection(Arc<str>),
    /// Connecting, TLS, reading or writing failed. `errno` where the system gave one.
    Io {
        /// `errno` symbol number.
        errno: Option<i32>,
        /// Text.
        message: Arc<str>,
    },
    /// A server outside the mesh may not be spoken to: its certificate was refused, or there is nothing to verify it with.
    Tls(Arc<str>),
    /// A connection was not established in time.
    ConnectTimeout(Duration),
    /// The peer closed before a complete response head.
    IncompleteResponse,
    /// The request can't be forwarded as it is.
    BadRequest(Arc<str>),
    /// No authority could be found for the request.
    MissingAuthority,
    /// The client went away.
    Canceled,
    /// Waiting for the first bytes took too long.
    DetectTimeout(Duration),
    /// A connection would lead back to this proxy.
    Loop(SocketAddr),
    /// Nothing above.
    Unexpected(Arc<str>),
}

/// What a request that nothing could take was lacking. It does not change the answer's status, only what is told.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Lack {
    /// Nobody knows more.
    Readiness,
    /// There is no endpoint.
    Endpoints,
    /// Circuit breakers hold endpoints back.
    Admission,
    /// No endpoint is connected.
    Connection,
    /// What is known of endpoints may be out of date: discovery is away.
    Discovery,
    /// The queue is full.
    Room,
}

/// Buckets of a local rate limit.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Hash)]
pub enum RateLimitScope {
    /// All clients.
    Total,
    /// One client.
    Identity,
    /// The clients of an override.
    Override,
}

impl Error {
    /// A failure with no context yet.
    pub fn new(cause: Cause) -> Self {
        Self(Box::new(Inner { cause, phase: None, context: Vec::new() }))
    }

    /// What happened.
    pub fn cause(&self) -> &Cause {
        &self.0.cause
    }

    /// Tells the phase, unless a stage further in has told it.
    pub fn during(mut self, phase: Phase) -> Self {
        self.0.phase.get_or_insert(phase);
        self
    }

    /// The termination code; `otherwise` is the phase of failures whose stage told none.
    pub fn code(&self, otherwise: Phase) -> Code {
        Code::of(&self.0.cause, self.0.phase.unwrap_or(otherwise))
    }

    /// Adds the stage that the failure passes through, outermost last to be added.
    pub fn context(mut self, context: impl Into<Arc<str>>) -> Self {
        self.0.context.insert(0, context.into());
        self
    }
}

impl From<Cause> for Error {
    fn from(cause: Cause) -> Self {
        Self::new(cause)
    }
}

/// The chain of contexts, outermost first, separated by `: `, ending in the cause.
impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for context in &self.0.context {
            write!(f, "{context}: ")?;
        }
        self.0.cause.fmt(f)
    }
}

impl std::error::Error for Error {}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::FailFast(_) => f.write_str("service in fail-fast"),
            Self::LoadShed(_) => f.write_str("service unavailable"),
            Self::RequestTimeout(t) => write!(f, "request timeout: not complete within {t:?}"),
            Self::BackendRequestTimeout(t) => write!(f, "backend request timeout: not complete within {t:?}"),
            Self::ResponseTimeout(t) => write!(f, "response timeout: not complete within {t:?}"),
            Self::ResponseHeadersTimeout(t) => write!(f, "response headers timeout: none within {t:?}"),
            Self::IdleTimeout(t) => write!(f, "idle timeout: no frame for {t:?}"),
            Self::ProfileTimeout(t) => write!(f, "HTTP response timeout after {t:?}"),
            Self::RequiredId { required, found: Some(found) } => {
                write!(f, "required id {required}; found {found}")
            }
            Self::RequiredId { required, found: None } => write!(f, "required id {required}; found none"),
            Self::FailBackend { message, .. } => f.write_str(message),
            Self::NoRoute => f.write_str("no route found for request"),
            Self::Redirect { .. } => f.write_str("redirected"),
            Self::InjectedHttp { message, .. } | Self::InjectedGrpc { message, .. } => f.write_str(message),
            Self::Unauthorized => f.write_str("unauthorized request on route"),
            Self::RateLimited { scope, rps, .. } => {
                let scope = match scope {
                    RateLimitScope::Total => "total",
                    RateLimitScope::Identity => "per-identity",
                    RateLimitScope::Override => "override",
                };
                write!(f, "{scope} rate limit exceeded: {rps}rps")
            }
            Self::Forbidden(message) | Self::InvalidPolicy(message) | Self::Discovery(message) => f.write_str(message),
            Self::GatewayDomain => f.write_str("gateway domain invalid"),
            Self::GatewayLoop => f.write_str("gateway loop detected"),
            Self::Http2Reset(reason) => write!(f, "stream error received: {reason}"),
            Self::Http2Connection(message) => write!(f, "HTTP/2 connection failed: {message}"),
            Self::Io { message, .. } => f.write_str(message),
            Self::Tls(message) => write!(f, "TLS refused: {message}"),
            Self::ConnectTimeout(t) => write!(f, "connect timed out after {t:?}"),
            Self::IncompleteResponse => f.write_str("connection closed before a complete response"),
            Self::BadRequest(message) => write!(f, "bad request: {message}"),
            Self::MissingAuthority => f.write_str("request has no authority"),
            Self::Canceled => f.write_str("client canceled"),
            Self::DetectTimeout(t) => write!(f, "no first bytes within {t:?}"),
            Self::Loop(addr) => write!(f, "connection to {addr} would loop"),
            Self::Unexpected(message) => f.write_str(message),
        }
    }
}
