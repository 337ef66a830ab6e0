//! What the data plane obeys: plain values, whichever source they come from.
//!
//! Two sources make these values: `control` (the Linkerd control plane over gRPC) and `standalone` (a folder of
//! manifests). Nothing here knows protobuf, Kubernetes or YAML, and the data plane cannot tell which source it hears.
//! The types are a superset of Linkerd's API: URL rewrite, mirroring, CORS, per-try timeouts apart from retries,
//! session persistence and client-side limits exist here before that API can say them.

pub mod authz;
pub mod client;
pub mod endpoint;
pub mod meta;
pub mod route;
pub mod server;
pub mod source;

pub use self::{
    authz::{Authentication, Authorization, Network},
    client::ClientPolicy,
    endpoint::Endpoint,
    meta::Meta,
    server::ServerPolicy,
    source::{DiscoveryError, Resolution, Source, Target, Update},
};
