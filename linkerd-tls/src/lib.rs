//! Workload identity and mutual TLS.

mod name;

pub use self::name::{Id, InvalidName, ServerName};
