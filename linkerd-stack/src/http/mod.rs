//! HTTP/1 and HTTP/2, both ends: a server of one connection, a client of one endpoint, and the rules between them
//! (which headers travel, which requests are refused, how HTTP/1 is carried over HTTP/2, how connections are upgraded).
//!
//! A request meets, first to last: `server` (codec, size limit), `normalize` (form, authority, hop-by-hop headers), the
//! service, `client` (pool or stream), and its response the same way back.

mod attend;
pub mod body;
pub mod client;
pub mod headers;
pub mod normalize;
pub mod orig_proto;
mod rest;
pub mod server;
pub mod upgrade;

#[cfg(test)]
mod tests;

pub use self::{
    body::{Body, BodyError, Reset},
    client::{Client, ClientConfig, Connect, Http1Config, Http2Config, KeepAlive, OnReplay, SendError},
    normalize::{AbsoluteForm, BadRequest},
    server::{CloseConnection, ServeError, ServerConfig, serve},
};

/// Which HTTP a connection speaks. HTTP/1.0 and HTTP/1.1 share connections and count as one.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Hash)]
pub enum Version {
    /// HTTP/1.0 or HTTP/1.1, RFC 9112.
    H1,
    /// HTTP/2, RFC 9113.
    H2,
}

impl Version {
    /// The version of a message; none for HTTP/0.9 and HTTP/3, which do not exist here.
    pub fn of(version: http::Version) -> Option<Self> {
        match version {
            http::Version::HTTP_10 | http::Version::HTTP_11 => Some(Self::H1),
            http::Version::HTTP_2 => Some(Self::H2),
            _ => None,
        }
    }
}

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::H1 => "HTTP/1",
            Self::H2 => "HTTP/2",
        })
    }
}
