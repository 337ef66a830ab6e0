//! The proxy: configuration, policy, its two sources, inbound, outbound, admin. The only place where stages are joined.

pub mod config;
pub mod error;
pub mod policy;
pub mod standalone;
