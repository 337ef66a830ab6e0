//! What is decided from a cause, one row each: the answer that the client gets, whether it counts as the endpoint's, and
//! the labels under which the families of metrics count it (behaviour.md C.11 and E.6; metrics.md 4.3, 5.1 to 5.3).

use super::Cause;
use crate::telemetry::{InboundError, OutboundError, RouteCloseError, StreamError, h2_reason};
use http::StatusCode;

/// What a cause means to those who have to decide something.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Facts {
    /// HTTP status for requests that are not gRPC.
    pub status: StatusCode,
    /// gRPC code.
    pub grpc: u16,
    /// Whether the client's connection is closed after the answer.
    pub close: bool,
    /// Set if HTTP/2 clients get their stream reset instead.
    pub reset: Option<h2::Reason>,
    /// Whether the endpoint failed to answer, which counts as an answer of its: breakers, retries and metrics see it.
    pub of_endpoint: bool,
    /// `error` of `inbound_http_errors_total` and `inbound_tcp_errors_total`.
    pub inbound: InboundError,
    /// `error` of `outbound_http_errors_total` and `outbound_tcp_errors_total`.
    pub outbound: OutboundError,
    /// `error` of the outbound route and backend families; none for answers that policy asked for.
    pub stream: Option<StreamError>,
    /// `error` of the outbound TCP and TLS route families.
    pub route: RouteCloseError,
    /// `error` of `response_total`.
    pub class: &'static str,
}

/// The table. gRPC codes are those of the gRPC specification: 1 cancelled, 2 unknown, 4 deadline exceeded, 5 not
/// found, 7 permission denied, 8 resource exhausted, 9 failed precondition, 10 aborted, 13 internal, 14 unavailable.
pub fn facts(cause: &Cause) -> Facts {
    use InboundError as In;
    use OutboundError as Out;
    use StatusCode as S;
    use StreamError as Stream;

    let late = |stream| stays(S::GATEWAY_TIMEOUT, 4).outbound(Out::ResponseTimeout).stream(stream);
    match cause {
        Cause::FailFast(_) => {
            closes(S::GATEWAY_TIMEOUT, 4).counts(In::FailFast, Out::FailFast).stream(Stream::FailFast)
        }
        Cause::LoadShed(_) => {
            closes(S::SERVICE_UNAVAILABLE, 14).counts(In::LoadShed, Out::LoadShed).stream(Stream::LoadShed)
        }
        Cause::RequestTimeout(_) => late(Stream::RequestTimeout),
        // `backendRequest` bounds one attempt as the per-try timeout does.
        Cause::BackendRequestTimeout(_) | Cause::ResponseHeadersTimeout(_) => late(Stream::ResponseHeadersTimeout),
        Cause::ResponseTimeout(_) => late(Stream::ResponseStreamTimeout),
        Cause::IdleTimeout(_) => late(Stream::IdleTimeout),
        Cause::ProfileTimeout(_) => Facts { close: true, class: "timeout", ..late(Stream::RequestTimeout) },
        Cause::RequiredId { .. } => closes(S::BAD_GATEWAY, 14).outbound(Out::IdentityRequired),
        Cause::FailBackend { status, grpc_code, .. } => {
            Facts { route: RouteCloseError::InvalidBackend, ..closes(last(*status), *grpc_code) }
        }
        Cause::NoRoute => stays(S::NOT_FOUND, 5),
        Cause::Redirect { status, .. } => Facts { stream: None, ..stays(last(*status), 5) },
        Cause::InjectedHttp { status, .. } => Facts { stream: None, ..stays(last(*status), 9) },
        Cause::InjectedGrpc { code, .. } => Facts { stream: None, ..stays(S::OK, *code) },
        Cause::Unauthorized => stays(S::FORBIDDEN, 7),
        Cause::Forbidden(_) => Facts { route: RouteCloseError::Forbidden, ..stays(S::FORBIDDEN, 7) },
        Cause::RateLimited { .. } => stays(S::TOO_MANY_REQUESTS, 8),
        Cause::GatewayDomain => stays(S::NOT_FOUND, 5).inbound(In::GatewayDomain),
        Cause::GatewayLoop => closes(S::LOOP_DETECTED, 10).inbound(In::GatewayLoop),
        Cause::InvalidPolicy(_) => {
            Facts { route: RouteCloseError::InvalidPolicy, ..closes(S::INTERNAL_SERVER_ERROR, 13) }
        }
        Cause::Discovery(_) => closes(S::SERVICE_UNAVAILABLE, 14),
        Cause::Http2Reset(reason) => Facts {
            reset: Some(*reason),
            class: h2_reason(*reason),
            ..closes(S::BAD_GATEWAY, 14).of_endpoint().stream(stream_of(*reason))
        },
        Cause::Http2Connection(_) => closes(S::BAD_GATEWAY, 14).of_endpoint().stream(Stream::GoAway),
        Cause::Io { .. } => closes(S::BAD_GATEWAY, 14).of_endpoint().counts(In::Io, Out::Io).stream(Stream::Io),
        Cause::Tls(_) | Cause::IncompleteResponse => closes(S::BAD_GATEWAY, 14).of_endpoint().counts(In::Io, Out::Io),
        Cause::ConnectTimeout(_) => closes(S::GATEWAY_TIMEOUT, 4).of_endpoint().counts(In::Io, Out::Io),
        Cause::BadRequest(_) => closes(S::BAD_REQUEST, 13),
        Cause::MissingAuthority | Cause::Unexpected(_) => closes(S::INTERNAL_SERVER_ERROR, 13),
        Cause::Canceled => closes(S::INTERNAL_SERVER_ERROR, 1),
        Cause::DetectTimeout(_) => closes(S::REQUEST_TIMEOUT, 4).inbound(In::TlsDetectTimeout),
        Cause::Loop(_) => closes(S::BAD_GATEWAY, 14).of_endpoint(),
    }
}

/// An answer after which the client's connection stays; counted as nothing in particular.
fn stays(status: StatusCode, grpc: u16) -> Facts {
    Facts {
        status,
        grpc,
        close: false,
        reset: None,
        of_endpoint: false,
        inbound: InboundError::Unexpected,
        outbound: OutboundError::Unexpected,
        stream: Some(StreamError::Unknown),
        route: RouteCloseError::Unexpected,
        class: "unclassified",
    }
}

fn closes(status: StatusCode, grpc: u16) -> Facts {
    Facts { close: true, ..stays(status, grpc) }
}

impl Facts {
    fn of_endpoint(self) -> Self {
        Self { of_endpoint: true, ..self }
    }

    fn inbound(self, inbound: InboundError) -> Self {
        Self { inbound, ..self }
    }

    fn outbound(self, outbound: OutboundError) -> Self {
        Self { outbound, ..self }
    }

    fn counts(self, inbound: InboundError, outbound: OutboundError) -> Self {
        Self { inbound, outbound, ..self }
    }

    fn stream(self, stream: StreamError) -> Self {
        Self { stream: Some(stream), ..self }
    }
}

/// An informational status cannot end an exchange.
fn last(status: StatusCode) -> StatusCode {
    if status.is_informational() { StatusCode::INTERNAL_SERVER_ERROR } else { status }
}

fn stream_of(reason: h2::Reason) -> StreamError {
    match reason {
        h2::Reason::CANCEL => StreamError::Cancel,
        h2::Reason::REFUSED_STREAM => StreamError::Refused,
        h2::Reason::ENHANCE_YOUR_CALM => StreamError::EnhanceYourCalm,
        _ => StreamError::Reset,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn policy_answers_have_a_status_and_no_error() {
        let injected = Cause::InjectedHttp { status: StatusCode::OK, message: "".into() };
        assert_eq!(facts(&injected).stream, None);
        assert_eq!(facts(&Cause::Canceled).stream, Some(StreamError::Unknown));
    }

    #[test]
    fn what_an_endpoint_did_is_told_by_kind() {
        let io = facts(&Cause::Io { errno: None, message: "refused".into() });
        assert_eq!((io.inbound, io.outbound, io.stream), (InboundError::Io, OutboundError::Io, Some(StreamError::Io)));
        let reset = facts(&Cause::Http2Reset(h2::Reason::CANCEL));
        assert_eq!((reset.stream, reset.class), (Some(StreamError::Cancel), "h2(CANCEL)"));
        assert_eq!(facts(&Cause::ProfileTimeout(std::time::Duration::ZERO)).class, "timeout");
        assert_eq!(facts(&Cause::Forbidden("".into())).route, RouteCloseError::Forbidden);
    }
}
