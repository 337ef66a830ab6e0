//! Layers of a proxy, generic over targets: one file per layer, joined by the rooms above.
//!
//! Nothing here names a socket address, a policy, an environment variable or a metric registry. Time comes from
//! `tokio::time` and randomness from values handed in, or from the thread's generator where only spread matters.

pub mod backoff;
pub mod balance;
mod boxed;
pub mod breaker;
pub mod budget;
pub mod cache;
pub mod copy;
pub mod detect;
pub mod drain;
pub mod http;
pub mod io;
pub mod limit;
mod new_service;
mod param;
pub mod rate;
pub mod ready;
pub mod replay;
mod scratch;
mod slots;
#[cfg(target_os = "linux")]
mod splice;

pub use self::{
    boxed::{BoxFuture, BoxService},
    io::{BoxedIo, Io, PrefixedIo},
    new_service::NewService,
    param::Param,
    ready::Ready,
};
