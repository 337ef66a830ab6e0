//! The one place where a failure becomes an answer: status, gRPC code, whether the client's connection is closed, and
//! the text of `l5d-proxy-error` and `grpc-message` (behaviour.md C.11 and E.6).
//!
//! What is answered stands in [`facts`]. Inbound and outbound differ only in who is told the reason.

use super::is_grpc;
use crate::{
    error::{Cause, Error, Facts, facts},
    telemetry::termination::Phase,
};
use http::{
    HeaderMap, HeaderName, HeaderValue, Request, Response, Version,
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

/// Whether a cause is the endpoint's failure to answer, which counts as an answer of the endpoint: breakers, retries
/// and metrics see a 502 or 504 (behaviour.md E.6, second table).
pub fn is_endpoint_level(cause: &Cause, asked: &Asked) -> bool {
    let facts = facts(cause);
    facts.of_endpoint && (facts.reset.is_none() || asked.version < Version::HTTP_2 || asked.orig_proto)
}

impl Rescue {
    /// The answer to a request that failed.
    pub fn answer<B: Default>(&self, error: &Error, asked: &Asked) -> Answer<B> {
        let facts = facts(error.cause());
        if let Some(reason) = facts.reset
            && asked.version == Version::HTTP_2
            && !asked.orig_proto
        {
            return Answer::Reset(reason);
        }
        Answer::Response(self.respond(&facts, error, asked))
    }

    /// The answer as a response, for failures that count as the endpoint's own answers.
    pub fn response<B: Default>(&self, error: &Error, asked: &Asked) -> Response<B> {
        self.respond(&facts(error.cause()), error, asked)
    }

    fn respond<B: Default>(&self, facts: &Facts, error: &Error, asked: &Asked) -> Response<B> {
        let mut rsp = Response::new(B::default());
        // The codec of the client's connection sets the version; orig-proto responses carry the one asked for.
        *rsp.version_mut() = asked.version;
        let headers = rsp.headers_mut();
        headers.insert(CONTENT_LENGTH, HeaderValue::from_static("0"));
        if asked.grpc {
            headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
            headers.insert(GRPC_STATUS, HeaderValue::from(facts.grpc));
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
            if facts.close {
                headers.insert(L5D_PROXY_CONNECTION, HeaderValue::from_static("close"));
            }
        }
        if facts.close && asked.version == Version::HTTP_11 && !asked.orig_proto {
            headers.insert(CONNECTION, HeaderValue::from_static("close"));
        }
        if !asked.grpc {
            *rsp.status_mut() = facts.status;
        }
        if facts.close {
            rsp.extensions_mut().insert(Close);
        }
        rsp
    }

    /// Trailers that end a gRPC response whose body failed.
    pub fn trailers(&self, error: &Error) -> HeaderMap {
        let mut trailers = HeaderMap::with_capacity(2);
        trailers.insert(GRPC_STATUS, HeaderValue::from(facts(error.cause()).grpc));
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
    use http::StatusCode;
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
        check(Cause::InjectedGrpc { code: 7, message: text.clone() }, 200, 7, false);
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
