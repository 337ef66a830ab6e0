//! The one trait between the data plane and whoever tells it the truth.

use super::{ClientPolicy, Endpoint, ServerPolicy, client::Profile};
use std::{net::SocketAddr, sync::Arc};
use tokio::sync::{mpsc, watch};

/// A source of policy and discovery. Cheap calls; the work behind them runs in the source's own tasks.
pub trait Source: Send + Sync + 'static {
    /// Follows the policy of a local port. There is a value at once (the default policy until the source knows
    /// better) and connections are never held for it. The source may forget the port when every receiver is gone.
    fn watch_server(&self, port: u16) -> watch::Receiver<Arc<ServerPolicy>>;

    /// Looks a destination up and follows it. The future ends with the first answer; dropping it abandons the
    /// look-up. When the receiver's sender is gone, its last value stays in force.
    ///
    /// # Errors
    /// When the source refuses the destination, or does not answer in bounded time.
    fn watch_client(
        &self,
        target: Target,
    ) -> futures_util::future::BoxFuture<'static, Result<watch::Receiver<Arc<ClientPolicy>>, DiscoveryError>>;

    /// Follows the ServiceProfile of a name, for classification and metrics alone: nothing is routed by it. None if the
    /// source has no profiles, or none for such names. The receiver's value is none until the source has answered; a
    /// name without a profile gets one without routes. Dropping the receiver ends the source's work for it.
    fn watch_service_profile(&self, _name: &str, _port: u16) -> Option<watch::Receiver<Option<Arc<Profile>>>> {
        None
    }

    /// Follows the replicas behind `host:port`. Dropping the resolution ends the source's work for it.
    fn resolve(&self, discovery: &str) -> Resolution;
}

/// What a client wants to reach.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Target {
    /// The original destination.
    Addr(SocketAddr),
    /// `host:port`, lower case, without a trailing dot (ingress and gateway mode, explicit proxying).
    Name(Arc<str>, u16),
}

/// Updates about a set of replicas.
pub struct Resolution {
    /// What changes.
    pub updates: mpsc::Receiver<Update>,
    /// Whether changes would be heard of now.
    pub stale: Stale,
}

/// What keeps a source from hearing of changes at the moment, if something does: what it told last may be out of date.
pub type Stale = Arc<dyn Fn() -> Option<Arc<str>> + Send + Sync>;

impl Resolution {
    /// Of a source that is never out of date.
    pub fn current(updates: mpsc::Receiver<Update>) -> Self {
        Self { updates, stale: Arc::new(|| None) }
    }
}

/// One change of a set of replicas.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Update {
    /// The whole set.
    Reset(Vec<Endpoint>),
    /// New or changed replicas, by address.
    Add(Vec<Endpoint>),
    /// Replicas that went away.
    Remove(Vec<SocketAddr>),
    /// The source gave up on the name: requests fail until the policy changes.
    Fail(Arc<str>),
}

/// Why a look-up failed.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum DiscoveryError {
    /// The source refuses the destination (gRPC InvalidArgument, FailedPrecondition and the like).
    #[error("discovery refused {target}: {reason}")]
    Refused {
        /// What was asked for.
        target: Target,
        /// The source's words.
        reason: Arc<str>,
    },
    /// No answer in bounded time: the control plane is away and nothing is known.
    #[error("discovery of {target} did not answer within {after:?}: {reason}")]
    Unavailable {
        /// What was asked for.
        target: Target,
        /// How long was waited.
        after: std::time::Duration,
        /// The last failure seen.
        reason: Arc<str>,
    },
}

impl std::fmt::Display for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Addr(addr) => write!(f, "{addr}"),
            Self::Name(name, port) => write!(f, "{name}:{port}"),
        }
    }
}
