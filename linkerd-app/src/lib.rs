//! The proxy: configuration, policy, its two sources, inbound, outbound, admin. The only place where stages are joined.

pub mod admin;
pub mod app;
pub mod await_ready;
pub mod config;
pub mod control;
pub mod error;
pub mod gateway;
pub mod http;
pub mod identity;
pub mod inbound;
pub mod outbound;
pub mod policy;
mod probe;
pub mod redirect;
pub mod standalone;
pub mod tap;
pub mod telemetry;
pub mod transport;
pub mod validate;
