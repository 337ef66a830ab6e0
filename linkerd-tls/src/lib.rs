//! Workload identity and mutual TLS: names, keys and certificates, trust anchors, handshakes, a look at a ClientHello's
//! server name, and a small certificate authority in a folder. The only crate that names `rustls` types.
//!
//! A process has one identity: [`identity::channel`] makes its writing end, which installs certificates and trust
//! anchors as they are renewed, and its reading end, which every listener and client clones and shakes hands with.

pub mod ca;
pub mod certificate;
pub mod csr;
pub mod detect;
mod error;
pub mod identity;
mod io;
mod key;
mod name;
mod roots;
mod tickets;
mod verify;
pub mod web;

pub use self::{
    certificate::Certificate,
    error::{Error, Invalid},
    identity::{Accepted, Alpn, Client, ClientTls, Connected},
    io::{ClientIo, ServerIo},
    key::Key,
    name::{Id, InvalidName, ServerName},
    roots::TrustAnchors,
};
