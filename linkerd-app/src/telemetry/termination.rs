//! Who ended a request or a connection, why, and in which phase: one closed set of codes. A code labels the metric
//! `terminations_total`, stands in the access log, and has a section in `docs/errors.md`, which a test holds to this enum.

use super::{
    labels::{Direction, Labels},
    metric::Counter,
    prom::{Encoder, Sample},
};
use crate::error::{Cause, Lack};
use std::fmt;

/// How far a request or connection had come.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Hash)]
pub enum Phase {
    /// A connection was taken from the listener.
    Accept,
    /// First bytes were waited for.
    Detect,
    /// A TLS handshake, on either side.
    Tls,
    /// Policy was looked up and applied.
    Policy,
    /// A route was looked for and its filters applied.
    Route,
    /// Waiting for something ready to take it.
    Queue,
    /// A connection was being opened.
    Connect,
    /// The request was on its way.
    Request,
    /// The response was awaited or on its way; also the life of an opaque connection.
    Response,
    /// The proxy was on its way out.
    Drain,
}

/// Who ended it.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Hash)]
pub enum Party {
    /// Whoever called.
    Client,
    /// Whoever was called.
    Server,
    /// The operator's configuration.
    Policy,
    /// The control plane, or the manifests that stand for it.
    ControlPlane,
    /// This proxy.
    Proxy,
}

impl Phase {
    /// The label's value.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Accept => "accept",
            Self::Detect => "detect",
            Self::Tls => "tls",
            Self::Policy => "policy",
            Self::Route => "route",
            Self::Queue => "queue",
            Self::Connect => "connect",
            Self::Request => "request",
            Self::Response => "response",
            Self::Drain => "drain",
        }
    }
}

impl Party {
    /// The label's value.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Client => "client",
            Self::Server => "server",
            Self::Policy => "policy",
            Self::ControlPlane => "control-plane",
            Self::Proxy => "proxy",
        }
    }
}

macro_rules! codes {
    ($($(#[$doc:meta])* $code:ident = $text:literal, $phase:ident, $party:ident;)*) => {
        /// Why a request or connection ended other than it was meant to.
        #[derive(Copy, Clone, Debug, PartialEq, Eq, Hash)]
        pub enum Code {
            $($(#[$doc])* $code,)*
        }

        impl Code {
            /// Every code, in order of phase.
            pub const ALL: &'static [Self] = &[$(Self::$code),*];

            /// As it is printed.
            pub fn as_str(self) -> &'static str {
                match self {
                    $(Self::$code => $text,)*
                }
            }

            /// The phase it belongs to.
            pub fn phase(self) -> Phase {
                match self {
                    $(Self::$code => Phase::$phase,)*
                }
            }

            /// Who ended it.
            pub fn party(self) -> Party {
                match self {
                    $(Self::$code => Party::$party,)*
                }
            }
        }
    };
}

codes! {
    /// The connection would lead back to this proxy.
    AcceptLoop = "accept-loop", Accept, Proxy;
    /// The accepted connection failed at once.
    AcceptFailed = "accept-failed", Accept, Client;
    /// No first bytes in time.
    DetectTimeout = "detect-timeout", Detect, Client;
    /// The client went away before its first bytes.
    DetectFailed = "detect-failed", Detect, Client;
    /// A handshake failed.
    TlsFailed = "tls-failed", Tls, Server;
    /// A handshake took too long.
    TlsTimeout = "tls-timeout", Tls, Server;
    /// The server did not prove the identity that the request asked for.
    TlsRequiredId = "tls-required-id", Tls, Proxy;
    /// No authorization covers the client.
    PolicyUnauthorized = "policy-unauthorized", Policy, Policy;
    /// An authorization was taken back while a connection was open.
    PolicyRevoked = "policy-revoked", Policy, Policy;
    /// Egress policy forbids the destination.
    PolicyForbidden = "policy-forbidden", Policy, Policy;
    /// A local rate limit.
    PolicyRateLimited = "policy-rate-limited", Policy, Policy;
    /// The policy could not be understood.
    PolicyInvalid = "policy-invalid", Policy, ControlPlane;
    /// Discovery refused the destination or did not answer.
    PolicyDiscovery = "policy-discovery", Policy, ControlPlane;
    /// The gateway does not serve the name.
    PolicyGatewayDomain = "policy-gateway-domain", Policy, Policy;
    /// The gateway met its own request.
    PolicyGatewayLoop = "policy-gateway-loop", Policy, Proxy;
    /// No route matches.
    RouteNotFound = "route-not-found", Route, Policy;
    /// A route redirects.
    RouteRedirect = "route-redirect", Route, Policy;
    /// A route injects a failure.
    RouteInjected = "route-injected", Route, Policy;
    /// The route's backend can't be.
    RouteBackend = "route-backend", Route, Policy;
    /// There is no endpoint.
    QueueNoEndpoints = "queue-no-endpoints", Queue, Server;
    /// Circuit breakers hold the endpoints back.
    QueueEjected = "queue-ejected", Queue, Server;
    /// No endpoint is connected.
    QueueUnconnected = "queue-unconnected", Queue, Server;
    /// Nothing is ready, and discovery is away.
    QueueStaleDiscovery = "queue-stale-discovery", Queue, ControlPlane;
    /// The queue is full.
    QueueFull = "queue-full", Queue, Proxy;
    /// Nothing became ready in time.
    QueueFailfast = "queue-failfast", Queue, Proxy;
    /// Refused at once, because nothing was ready before.
    QueueLoadShed = "queue-load-shed", Queue, Proxy;
    /// Connecting failed.
    ConnectFailed = "connect-failed", Connect, Server;
    /// Connecting took too long.
    ConnectTimeout = "connect-timeout", Connect, Server;
    /// The request can't be forwarded as it is.
    RequestInvalid = "request-invalid", Request, Client;
    /// The request names no authority.
    RequestNoAuthority = "request-no-authority", Request, Client;
    /// The client went away before the response began.
    RequestCanceled = "request-canceled", Request, Client;
    /// Sending the request failed.
    RequestFailed = "request-failed", Request, Server;
    /// The whole request's deadline passed.
    RequestTimeout = "request-timeout", Request, Policy;
    /// Response headers did not come in time.
    ResponseHeadersTimeout = "response-headers-timeout", Response, Policy;
    /// One attempt took too long.
    ResponseAttemptTimeout = "response-attempt-timeout", Response, Policy;
    /// The response did not end in time.
    ResponseTimeout = "response-timeout", Response, Policy;
    /// A ServiceProfile's timeout passed.
    ResponseProfileTimeout = "response-profile-timeout", Response, Policy;
    /// Nothing moved for too long.
    ResponseIdle = "response-idle", Response, Policy;
    /// The server closed before a complete response.
    ResponseIncomplete = "response-incomplete", Response, Server;
    /// The connection to the server failed under the response.
    ResponseFailed = "response-failed", Response, Server;
    /// The server reset the stream.
    ResponseReset = "response-reset", Response, Server;
    /// The server's HTTP/2 connection ended under the stream.
    ResponseConnection = "response-connection", Response, Server;
    /// The client went away during the response.
    ResponseCanceled = "response-canceled", Response, Client;
    /// Cut when the time for draining was over.
    DrainCut = "drain-cut", Drain, Proxy;
    /// A failure that the proxy has no word for.
    Unexpected = "unexpected", Response, Proxy;
}

impl Code {
    /// The code of a failure in a phase.
    pub fn of(cause: &Cause, phase: Phase) -> Self {
        match cause {
            Cause::FailFast(lack) => Self::lacking(*lack, Self::QueueFailfast),
            Cause::LoadShed(lack) => Self::lacking(*lack, Self::QueueLoadShed),
            Cause::RequestTimeout(_) => Self::RequestTimeout,
            Cause::BackendRequestTimeout(_) => Self::ResponseAttemptTimeout,
            Cause::ResponseTimeout(_) => Self::ResponseTimeout,
            Cause::ResponseHeadersTimeout(_) => Self::ResponseHeadersTimeout,
            Cause::IdleTimeout(_) => Self::ResponseIdle,
            Cause::ProfileTimeout(_) => Self::ResponseProfileTimeout,
            Cause::RequiredId { .. } => Self::TlsRequiredId,
            Cause::FailBackend { .. } => Self::RouteBackend,
            Cause::NoRoute => Self::RouteNotFound,
            Cause::Redirect { .. } => Self::RouteRedirect,
            Cause::InjectedHttp { .. } | Cause::InjectedGrpc { .. } => Self::RouteInjected,
            // Once traffic flows, an authorization can only have been taken back.
            Cause::Unauthorized => match phase {
                Phase::Response => Self::PolicyRevoked,
                Phase::Accept
                | Phase::Detect
                | Phase::Tls
                | Phase::Policy
                | Phase::Route
                | Phase::Queue
                | Phase::Connect
                | Phase::Request
                | Phase::Drain => Self::PolicyUnauthorized,
            },
            Cause::RateLimited { .. } => Self::PolicyRateLimited,
            Cause::Forbidden(_) => Self::PolicyForbidden,
            Cause::GatewayDomain => Self::PolicyGatewayDomain,
            Cause::GatewayLoop => Self::PolicyGatewayLoop,
            Cause::InvalidPolicy(_) => Self::PolicyInvalid,
            Cause::Discovery(_) => Self::PolicyDiscovery,
            Cause::Http2Reset(_) => Self::ResponseReset,
            Cause::Http2Connection(_) => Self::ResponseConnection,
            Cause::Io { .. } => match phase {
                Phase::Accept => Self::AcceptFailed,
                Phase::Detect => Self::DetectFailed,
                Phase::Tls => Self::TlsFailed,
                Phase::Policy | Phase::Route | Phase::Queue | Phase::Connect => Self::ConnectFailed,
                Phase::Request => Self::RequestFailed,
                Phase::Response => Self::ResponseFailed,
                Phase::Drain => Self::DrainCut,
            },
            Cause::ConnectTimeout(_) => match phase {
                Phase::Tls => Self::TlsTimeout,
                Phase::Accept
                | Phase::Detect
                | Phase::Policy
                | Phase::Route
                | Phase::Queue
                | Phase::Connect
                | Phase::Request
                | Phase::Response
                | Phase::Drain => Self::ConnectTimeout,
            },
            Cause::IncompleteResponse => Self::ResponseIncomplete,
            Cause::Tls(_) => Self::TlsFailed,
            Cause::BadRequest(_) => Self::RequestInvalid,
            Cause::MissingAuthority => Self::RequestNoAuthority,
            Cause::Canceled => match phase {
                Phase::Response => Self::ResponseCanceled,
                Phase::Drain => Self::DrainCut,
                Phase::Accept
                | Phase::Detect
                | Phase::Tls
                | Phase::Policy
                | Phase::Route
                | Phase::Queue
                | Phase::Connect
                | Phase::Request => Self::RequestCanceled,
            },
            Cause::DetectTimeout(_) => Self::DetectTimeout,
            Cause::Loop(_) => Self::AcceptLoop,
            Cause::Unexpected(_) => Self::Unexpected,
        }
    }
}

impl Code {
    fn lacking(lack: Lack, otherwise: Self) -> Self {
        match lack {
            Lack::Readiness => otherwise,
            Lack::Endpoints => Self::QueueNoEndpoints,
            Lack::Admission => Self::QueueEjected,
            Lack::Connection => Self::QueueUnconnected,
            Lack::Discovery => Self::QueueStaleDiscovery,
            Lack::Room => Self::QueueFull,
        }
    }
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// `terminations_total`: every code of both directions; printed from its first event on.
pub(super) struct Terminations {
    inbound: Box<[Counter]>,
    outbound: Box<[Counter]>,
}

impl Default for Terminations {
    fn default() -> Self {
        let counters = || Code::ALL.iter().map(|_| Counter::default()).collect();
        Self { inbound: counters(), outbound: counters() }
    }
}

impl Terminations {
    pub(super) fn count(&self, direction: Direction, code: Code) {
        let counters = match direction {
            Direction::Inbound => &self.inbound,
            Direction::Outbound => &self.outbound,
        };
        // Variants are declared in the order of ALL.
        if let Some(counter) = counters.get(code as usize) {
            counter.inc();
        }
    }

    pub(super) fn encode(&self, out: &mut Encoder<'_, '_>) -> fmt::Result {
        let both = [(Direction::Inbound, &self.inbound), (Direction::Outbound, &self.outbound)];
        let texts: Vec<_> = both
            .into_iter()
            .flat_map(|(direction, counters)| {
                Code::ALL.iter().zip(counters).filter(|(_, n)| n.get() > 0).map(move |(code, n)| {
                    let labels = Labels::new()
                        .direction(direction)
                        .push("phase", code.phase().as_str())
                        .push("by", code.party().as_str())
                        .push("code", code.as_str());
                    (labels, n.get())
                })
            })
            .collect();
        out.counter(
            "terminations",
            None,
            "Requests and connections that ended other than they were meant to",
            texts.iter().map(|(labels, n)| (Sample::written(labels), *n)),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn codes_are_distinct_and_in_order() {
        for (i, code) in Code::ALL.iter().enumerate() {
            assert_eq!(*code as usize, i);
            assert!(Code::ALL[..i].iter().all(|c| c.as_str() != code.as_str()), "{code}");
        }
    }

    #[test]
    fn the_phase_decides_between_codes_of_one_cause() {
        let io = Cause::Io { errno: None, message: "reset".into() };
        assert_eq!(Code::of(&io, Phase::Connect), Code::ConnectFailed);
        assert_eq!(Code::of(&io, Phase::Response), Code::ResponseFailed);
        assert_eq!(Code::of(&Cause::Unauthorized, Phase::Policy), Code::PolicyUnauthorized);
        assert_eq!(Code::of(&Cause::Unauthorized, Phase::Response), Code::PolicyRevoked);
        assert_eq!(Code::of(&Cause::ConnectTimeout(Duration::ZERO), Phase::Tls), Code::TlsTimeout);
    }

    /// Each code has a section that tells phase, party, cause, meaning and remedy; no section is left from a code that is
    /// gone.
    #[test]
    fn the_page_explains_every_code() {
        let page = include_str!("../../../docs/errors.md");
        let sections: Vec<&str> = page.split("\n### ").skip(1).collect();
        let titles: Vec<&str> = sections.iter().filter_map(|s| s.lines().next()).collect();
        let codes: Vec<String> = Code::ALL.iter().map(|c| format!("`{c}`")).collect();
        assert_eq!(titles, codes);
        for (code, section) in Code::ALL.iter().zip(sections) {
            let who = format!("Phase {}, ended by {}.", code.phase().as_str(), code.party().as_str());
            assert!(section.contains(&who), "{code}: {who}");
            for word in ["Cause:", "Meaning:", "Remedy:"] {
                assert!(section.contains(word), "{code}: {word}");
            }
        }
    }
}
