//! The one place where a failure becomes an answer: status, gRPC code, whether the client's connection is closed, and
//! the text of `l5d-proxy-error` and `grpc-message` (behaviour.md C.11 and E.6).
//!
//! [`verdict`] matches every cause without a wildcard. Inbound and outbound differ only in who is told the reason.

use super::is_grpc;
use crate::{
    error::{Cause, Error},
    telemetry::termination::Phase,
};
use http::{
    HeaderMap, HeaderName, HeaderValue, Request, Response, StatusCode, Version,
    header::{CONNECTION, CONTENT_LENGTH, CONTENT_TYPE, LOCATION, RETRY_AFTER},
};

/// Why the proxy answered instead of the application.
pub const L5D_PROXY_ERROR: HeaderName = HeaderName::from_static("l5d-proxy-error");
/// The termination code of that answer (docs/errors.md).
pub const L5D_PROXY_TERMINATION: HeaderName = HeaderName::from_static("l5d-proxy-termination");
/// `close`: the client's proxy shall close the application's connection after this response.
pub const L5D_PROXY_CONNECTION: HeaderName = HeaderName::from_static("l5d-proxy-connection");
/// gRPC status code, in headers or trailers.
pub const GRPC_STATUS: HeaderName = HeaderName::from_static("grpc-status");
/// gRPC status text.
pub const GRPC_MESSAGE: HeaderName = HeaderName::from_static("grpc-message");

/// Turns failures into answers for one server connection (inbound) or for all (outbound).
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Rescue {
    /// Whether `l5d-proxy-error`, `l5d-proxy-termination`, `grpc-message` and `l5d-proxy-connection` are sent. Outbound: the setting. Inbound:
    /// only to meshed clients with an identity.
    pub informational: bool,
}

/// What must be remembered of a request to answer it when it has been consumed.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Asked {
    /// HTTP version that the client speaks.
    pub version: Version,
    /// HTTP/2 with a gRPC content type.
    pub grpc: bool,
    /// It came as HTTP/1 inside HTTP/2 from another proxy: no `connection` header, and no stream reset.
    pub orig_proto: bool,
}

/// What the client gets.
#[derive(Debug)]
pub enum Answer<B> {
    /// A response. [`closes`] tells whether the connection ends after it.
    Response(Response<B>),
    /// The stream is reset with this reason; an HTTP/1 connection is closed.
    Reset(h2::Reason),
}

/// Marks a synthesized response after which the server connection is shut down gracefully.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Close;

/// What is decided from a cause.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// HTTP status for requests that are not gRPC.
    pub status: StatusCode,
    /// gRPC code.
    pub grpc: u16,
    /// Whether the client's connection is closed after the answer.
    pub close: bool,
    /// Set if HTTP/2 clients get their stream reset instead.
    pub reset: Option<h2::Reason>,
}

impl Asked {
    /// Of a request as it came, before its version is changed.
    pub fn of<B>(req: &Request<B>) -> Self {
        let version = req.version();
        Self { version, grpc: version == Version::HTTP_2 && is_grpc(req.headers()), orig_proto: false }
    }
}

/// Whether the server connection ends after this response.
pub fn closes<B>(rsp: &Response<B>) -> bool {
    rsp.extensions().get::<Close>().is_some()
}

/// The table. gRPC codes are those of the gRPC specification: 1 cancelled, 2 unknown, 4 deadline exceeded, 5 not
/// found, 7 permission denied, 8 resource exhausted, 9 failed precondition, 10 aborted, 13 internal, 14 unavailable.
pub fn verdict(cause: &Cause) -> Verdict {
    let v = |status, grpc, close| Verdict { status, grpc, close, reset: None };
    match cause {
        Cause::FailFast(_) => v(StatusCode::GATEWAY_TIMEOUT, 4, true),
        Cause::LoadShed(_) => v(StatusCode::SERVICE_UNAVAILABLE, 14, true),
        Cause::RequestTimeout(_)
        | Cause::BackendRequestTimeout(_)
        | Cause::ResponseTimeout(_)
        | Cause::ResponseHeadersTimeout(_)
        | Cause::IdleTimeout(_) => v(StatusCode::GATEWAY_TIMEOUT, 4, false),
        Cause::ProfileTimeout(_) | Cause::ConnectTimeout(_) => v(StatusCode::GATEWAY_TIMEOUT, 4, true),
        Cause::DetectTimeout(_) => v(StatusCode::REQUEST_TIMEOUT, 4, true),
        Cause::RequiredId { .. } => v(StatusCode::BAD_GATEWAY, 14, true),
        Cause::FailBackend { status, grpc_code, .. } => v(final_status(*status), *grpc_code, true),
        Cause::NoRoute | Cause::GatewayDomain => v(StatusCode::NOT_FOUND, 5, false),
        Cause::Redirect { status, .. } => v(final_status(*status), 5, false),
        Cause::InjectedHttp { status, .. } => v(final_status(*status), 9, false),
        Cause::InjectedGrpc { code, .. } => v(http_of_grpc(*code), *code, false),
        Cause::Unauthorized | Cause::Forbidden(_) => v(StatusCode::FORBIDDEN, 7, false),
        Cause::RateLimited { .. } => v(StatusCode::TOO_MANY_REQUESTS, 8, false),
        Cause::GatewayLoop => v(StatusCode::LOOP_DETECTED, 10, true),
        Cause::Discovery(_) => v(StatusCode::SERVICE_UNAVAILABLE, 14, true),
        Cause::Http2Reset(reason) => Verdict { reset: Some(*reason), ..v(StatusCode::BAD_GATEWAY, 14, true) },
        Cause::Http2Connection(_) | Cause::Io { .. } | Cause::IncompleteResponse | Cause::Tls(_) | Cause::Loop(_) => {
            v(StatusCode::BAD_GATEWAY, 14, true)
        }
        Cause::BadRequest(_) => v(StatusCode::BAD_REQUEST, 13, true),
        Cause::Canceled => v(StatusCode::INTERNAL_SERVER_ERROR, 1, true),
        Cause::InvalidPolicy(_) | Cause::MissingAuthority | Cause::Unexpected(_) => {
            v(StatusCode::INTERNAL_SERVER_ERROR, 13, true)
        }
    }
}

/// Whether a cause is the endpoint's failure to answer, which counts as an answer of the endpoint: breakers, retries
/// and metrics see a 502 or 504 (behaviour.md E.6, second table).
pub fn is_endpoint_level(cause: &Cause, asked: &Asked) -> bool {
    match cause {
        Cause::Io { .. }
        | Cause::ConnectTimeout(_)
        | Cause::IncompleteResponse
        | Cause::Tls(_)
        | Cause::Http2Connection(_)
        | Cause::Loop(_) => true,
        Cause::Http2Reset(_) => asked.version < Version::HTTP_2 || asked.orig_proto,
        Cause::FailFast(_)
        | Cause::LoadShed(_)
        | Cause::RequestTimeout(_)
        | Cause::BackendRequestTimeout(_)
        | Cause::ResponseTimeout(_)
        | Cause::ResponseHeadersTimeout(_)
        | Cause::IdleTimeout(_)
        | Cause::ProfileTimeout(_)
        | Cause::RequiredId { .. }
        | Cause::FailBackend { .. }
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
        | Cause::BadRequest(_)
        | Cause::MissingAuthority
        | Cause::Canceled
        | Cause::DetectTimeout(_)
        | Cause::Unexpected(_) => false,
    }
}

/// An informational status cannot end an exchange.
fn final_status(status: StatusCode) -> StatusCode {
    if status.is_informational() { StatusCode::INTERNAL_SERVER_ERROR } else { status }
}

/// The HTTP status that says the same as a gRPC code (google.rpc.Code), for callers that do not speak gRPC.
fn http_of_grpc(code: u16) -> StatusCode {
    match code {
        0 => StatusCode::OK,
        3 | 9 | 11 => StatusCode::BAD_REQUEST,
        4 => StatusCode::GATEWAY_TIMEOUT,
        5 => StatusCode::NOT_FOUND,
        6 | 10 => StatusCode::CONFLICT,
        7 => StatusCode::FORBIDDEN,
        8 => StatusCode::TOO_MANY_REQUESTS,
        12 => StatusCode::NOT_IMPLEMENTED,
        14 => StatusCode::SERVICE_UNAVAILABLE,
        16 => StatusCode::UNAUTHORIZED,
        _ => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

impl Rescue {
    /// The answer to a request that failed.
    pub fn answer<B: Default>(&self, error: &Error, asked: &Asked) -> Answer<B> {
        let verdict = verdict(error.cause());
        if let Some(reason) = verdict.reset
            && asked.version == Version::HTTP_2
            && !asked.orig_proto
        {
            return Answer::Reset(reason);
        }
        Answer::Response(self.respond(&verdict, error, asked))
    }

    /// The answer as a response, for failures that count as the endpoint's own answers.
    pub fn response<B: Default>(&self, error: &Error, asked: &Asked) -> Response<B> {
        self.respond(&verdict(error.cause()), error, asked)
    }

    fn respond<B: Default>(&self, verdict: &Verdict, error: &Error, asked: &Asked) -> Response<B> {
        let mut rsp = Response::new(B::default());
        // The codec of the client's connection sets the version; orig-proto responses carry the one asked for.
        *rsp.version_mut() = asked.version;
        let headers = rsp.headers_mut();
        headers.insert(CONTENT_LENGTH, HeaderValue::from_static("0"));
        if asked.grpc {
            headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
            headers.insert(GRPC_STATUS, HeaderValue::from(verdict.grpc));
            if self.informational {
                headers.insert(GRPC_MESSAGE, grpc_message(error));
            }
        } else if let Cause::Redirect { location, .. } = error.cause() {
            headers.insert(LOCATION, location.clone());
        }
        if let Cause::RateLimited { retry_after, .. } = error.cause() {
            // Whole seconds, rounded up (RFC 9110 section 10.2.3).
            let seconds = retry_after.as_secs() + u64::from(retry_after.subsec_nanos() > 0);
            headers.insert(RETRY_AFTER, HeaderValue::from(seconds.max(1)));
        }
        if self.informational {
            headers.insert(L5D_PROXY_ERROR, message(error));
            let code = error.code(Phase::Request);
            headers.insert(L5D_PROXY_TERMINATION, HeaderValue::from_static(code.as_str()));
            if verdict.close {
                headers.insert(L5D_PROXY_CONNECTION, HeaderValue::from_static("close"));
            }
        }
        if verdict.close && asked.version == Version::HTTP_11 && !asked.orig_proto {
            headers.insert(CONNECTION, HeaderValue::from_static("close"));
        }
        if !asked.grpc {
            *rsp.status_mut() = verdict.status;
        }
        if verdict.close {
            rsp.extensions_mut().insert(Close);
        }
        rsp
    }

    /// Trailers that end a gRPC response whose body failed.
    pub fn trailers(&self, error: &Error) -> HeaderMap {
        let mut trailers = HeaderMap::with_capacity(2);
        trailers.insert(GRPC_STATUS, HeaderValue::from(verdict(error.cause()).grpc));
        if self.informational {
            trailers.insert(GRPC_MESSAGE, grpc_message(error));
        }
        trailers
    }
}

/// The text for gRPC clients: an injected failure speaks in its own words, as the application would; everything else
/// says where it happened.
fn grpc_message(error: &Error) -> HeaderValue {
    match error.cause() {
        Cause::InjectedHttp { message: text, .. } | Cause::InjectedGrpc { message: text, .. } => {
            HeaderValue::from_str(text).unwrap_or_else(|_| message(error))
        }
        _ => message(error),
    }
}

/// The chain of contexts as a header value.
fn message(error: &Error) -> HeaderValue {
    HeaderValue::try_from(error.to_string()).unwrap_or_else(|_| HeaderValue::from_static("unexpected error"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::{Lack, RateLimitScope};
    use std::time::Duration;

    const S: Duration = Duration::from_secs(1);

    fn asked(version: Version, grpc: bool) -> Asked {
        Asked { version, grpc, orig_proto: false }
    }

    /// Status for HTTP, code for gRPC, and whether the connection closes.
    #[track_caller]
    fn check(cause: Cause, status: u16, grpc: u16, close: bool) {
        let error = Error::new(cause).context("logical service Service.ns.web:80");
        let rescue = Rescue { informational: true };
        let Answer::Response(rsp) = rescue.answer::<String>(&error, &asked(Version::HTTP_11, false)) else {
            panic!("HTTP/1 is never reset")
        };
        assert_eq!(rsp.status(), status);
        assert_eq!(rsp.headers()["content-length"], "0");
        assert_eq!(rsp.headers()["l5d-proxy-error"], error.to_string().as_str());
        assert_eq!(rsp.headers()["l5d-proxy-termination"], error.code(Phase::Request).as_str());
        assert_eq!(rsp.headers().contains_key("connection"), close);
        assert_eq!(rsp.headers().contains_key("l5d-proxy-connection"), close);
        assert_eq!(closes(&rsp), close);
        match rescue.answer::<String>(&error, &asked(Version::HTTP_2, true)) {
            Answer::Response(rsp) => {
                assert_eq!(rsp.status(), 200);
                assert_eq!(rsp.headers()["grpc-status"], grpc.to_string().as_str());
                let injected = matches!(error.cause(), Cause::InjectedHttp { .. } | Cause::InjectedGrpc { .. });
                let words = if injected { error.cause().to_string() } else { error.to_string() };
                assert_eq!(rsp.headers()["grpc-message"], words.as_str());
                assert_eq!(rsp.headers()["content-type"], "application/grpc");
                assert!(!rsp.headers().contains_key("connection") && !rsp.headers().contains_key("location"));
            }
            Answer::Reset(reason) => assert_eq!(*error.cause(), Cause::Http2Reset(reason)),
        }
    }

    #[test]
    fn every_cause_has_its_answer() {
        let text: std::sync::Arc<str> = "why".into();
        check(Cause::FailFast(Lack::Readiness), 504, 4, true);
        check(Cause::LoadShed(Lack::Readiness), 503, 14, true);
        check(Cause::RequestTimeout(S), 504, 4, false);
        check(Cause::BackendRequestTimeout(S), 504, 4, false);
        check(Cause::ResponseTimeout(S), 504, 4, false);
        check(Cause::ResponseHeadersTimeout(S), 504, 4, false);
        check(Cause::IdleTimeout(S), 504, 4, false);
        check(Cause::ProfileTimeout(S), 504, 4, true);
        check(Cause::RequiredId { required: "a".into(), found: None }, 502, 14, true);
        let status = StatusCode::INTERNAL_SERVER_ERROR;
        check(Cause::FailBackend { status, grpc_code: 14, message: text.clone() }, 500, 14, true);
        check(Cause::NoRoute, 404, 5, false);
        let location = HeaderValue::from_static("http://a/");
        check(Cause::Redirect { status: StatusCode::FOUND, location }, 302, 5, false);
        check(Cause::InjectedHttp { status: StatusCode::IM_A_TEAPOT, message: text.clone() }, 418, 9, false);
        check(Cause::InjectedHttp { status: StatusCode::CONTINUE, message: text.clone() }, 500, 9, false);
        check(Cause::InjectedGrpc { code: 7, message: text.clone() }, 403, 7, false);
        check(Cause::Unauthorized, 403, 7, false);
        check(Cause::RateLimited { scope: RateLimitScope::Total, rps: 1, retry_after: S }, 429, 8, false);
        check(Cause::Forbidden(text.clone()), 403, 7, false);
        check(Cause::GatewayDomain, 404, 5, false);
        check(Cause::GatewayLoop, 508, 10, true);
        check(Cause::InvalidPolicy(text.clone()), 500, 13, true);
        check(Cause::Discovery(text.clone()), 503, 14, true);
        check(Cause::Http2Reset(h2::Reason::REFUSED_STREAM), 502, 14, true);
        check(Cause::Http2Connection(text.clone()), 502, 14, true);
        check(Cause::Io { errno: None, message: text.clone() }, 502, 14, true);
        check(Cause::ConnectTimeout(S), 504, 4, true);
        check(Cause::IncompleteResponse, 502, 14, true);
        check(Cause::BadRequest(text.clone()), 400, 13, true);
        check(Cause::MissingAuthority, 500, 13, true);
        check(Cause::Canceled, 500, 1, true);
        check(Cause::DetectTimeout(S), 408, 4, true);
        check(Cause::Loop(([127, 0, 0, 1], 1).into()), 502, 14, true);
        check(Cause::Unexpected(text), 500, 13, true);
    }

    #[test]
    fn strangers_are_told_nothing() {
        let error = Error::new(Cause::Unauthorized);
        let rescue = Rescue { informational: false };
        let rsp: Response<String> = rescue.response(&error, &asked(Version::HTTP_2, true));
        assert_eq!(rsp.headers()["grpc-status"], "7");
        assert!(rsp.headers().keys().all(|name| name != "grpc-message" && !name.as_str().starts_with("l5d-")));
    }

    #[test]
    fn texts_that_are_no_header_values_are_replaced() {
        let error = Error::new(Cause::Unexpected("a\nb".into()));
        let rsp: Response<String> = Rescue { informational: true }.response(&error, &asked(Version::HTTP_11, false));
        assert_eq!(rsp.headers()["l5d-proxy-error"], "unexpected error");
    }

    #[test]
    fn orig_proto_requests_get_no_resets_and_no_connection_header() {
        let error = Error::new(Cause::Http2Reset(h2::Reason::CANCEL));
        let asked = Asked { version: Version::HTTP_2, grpc: false, orig_proto: true };
        let Answer::Response(rsp) = (Rescue { informational: true }).answer::<String>(&error, &asked) else {
            panic!("reset")
        };
        assert_eq!(rsp.status(), 502);
        assert!(!rsp.headers().contains_key("connection"));
        assert!(is_endpoint_level(error.cause(), &asked));
    }
}
