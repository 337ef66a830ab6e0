//! Layers of a proxy, generic over targets: one file per layer, joined by the rooms above.
//!
//! Nothing here names a socket address, a policy, an environment variable or a metric registry. Time comes from
//! `tokio::time` and randomness from values handed in, or from the thread's generator where only spread matters.

pub mod backoff;
pub mod balance;
mod boxed;
pub mod drain;
pub mod http;
pub mod io;
mod new_service;
mod param;
pub mod ready;

pub use self::{
    boxed::{BoxFuture, BoxService},
    io::{BoxedIo, Io, PrefixedIo},
    new_service::NewService,
    param::Param,
    ready::Ready,
};
