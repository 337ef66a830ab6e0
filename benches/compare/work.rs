//! The workloads, and the targets they are held against: first target and aim relative to another proxy.

use crate::proxies::Name;

/// Authority of all requests.
pub(crate) const HOST: &str = "web.shop";
/// The Service's address; nobody has it.
pub(crate) const SERVICE: &str = "10.96.0.10";
/// The Service's port whose protocol is detected, and the server pod's for it.
pub(crate) const HTTP: (u16, u16) = (80, 8080);
/// The Service's port that is opaque, and the server pod's for it.
pub(crate) const OPAQUE: (u16, u16) = (90, 9000);

/// How the proxies of others must be configured for a work.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    Http,
    Opaque,
}

/// What the cost is divided by.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(crate) enum Unit {
    Request,
    Gibibyte,
}

/// At most so many times what another proxy costs.
#[derive(Copy, Clone, Debug)]
pub(crate) struct Target {
    pub(crate) of: Name,
    pub(crate) first: f64,
    pub(crate) aim: f64,
}

pub(crate) struct Work {
    pub(crate) name: &'static str,
    pub(crate) title: &'static str,
    pub(crate) mode: Mode,
    /// Arguments of `compare load`.
    pub(crate) load: &'static [&'static str],
    pub(crate) unit: Unit,
    pub(crate) target: Target,
}

const fn target(of: Name, first: f64, aim: f64) -> Target {
    Target { of, first, aim }
}

pub(crate) const WORKS: [Work; 8] = [
    Work {
        name: "http1",
        title: "HTTP/1.1, 32 connections, saturated",
        mode: Mode::Http,
        load: &["--connections", "32", "--size", "100"],
        unit: Unit::Request,
        target: target(Name::Haproxy, 1.5, 1.0),
    },
    Work {
        name: "http1-rate",
        title: "HTTP/1.1 at 2,000 requests/s",
        mode: Mode::Http,
        load: &["--connections", "32", "--size", "100", "--rate", "2000"],
        unit: Unit::Request,
        target: target(Name::Haproxy, 1.3, 1.0),
    },
    Work {
        name: "http2",
        title: "HTTP/2, 4 connections × 16 streams, saturated",
        mode: Mode::Http,
        load: &["--connections", "4", "--streams", "16", "--size", "100"],
        unit: Unit::Request,
        target: target(Name::Haproxy, 2.0, 1.0),
    },
    Work {
        name: "http1-connect",
        title: "new client connection per HTTP/1.1 request",
        mode: Mode::Http,
        load: &["--connections", "16", "--size", "100", "--reconnect"],
        unit: Unit::Request,
        target: target(Name::Haproxy, 1.3, 1.0),
    },
    Work {
        name: "http1-bytes",
        title: "HTTP/1.1, 64 MiB responses",
        mode: Mode::Http,
        load: &["--connections", "4", "--size", "67108864"],
        unit: Unit::Gibibyte,
        target: target(Name::Envoy, 1.0, 0.7),
    },
    Work {
        name: "opaque",
        title: "opaque TCP over mTLS, 32 connections",
        mode: Mode::Opaque,
        load: &["--connections", "32", "--size", "100"],
        unit: Unit::Request,
        target: target(Name::Envoy, 1.0, 0.8),
    },
    Work {
        name: "opaque-connect",
        title: "new opaque connection per request, mTLS each",
        mode: Mode::Opaque,
        load: &["--connections", "16", "--size", "100", "--reconnect"],
        unit: Unit::Request,
        target: target(Name::Envoy, 1.0, 0.5),
    },
    Work {
        name: "opaque-bytes",
        title: "opaque over mTLS, 64 MiB responses",
        mode: Mode::Opaque,
        load: &["--connections", "4", "--size", "67108864"],
        unit: Unit::Gibibyte,
        target: target(Name::Envoy, 1.0, 0.7),
    },
];

impl Mode {
    /// The Service's port and the server pod's.
    pub(crate) fn ports(self) -> (u16, u16) {
        match self {
            Self::Http => HTTP,
            Self::Opaque => OPAQUE,
        }
    }
}
