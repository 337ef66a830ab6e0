//! What inbound and outbound share about HTTP: matching requests to routes, filters, judging responses, and the one
//! place where a failure becomes an answer.

pub mod classify;
pub mod filter;
pub mod rescue;
pub mod route;
pub mod settings;

pub use self::{
    rescue::{Answer, Asked, Rescue},
    route::{Match, best_match, best_match_at},
};

use http::{HeaderMap, header::CONTENT_TYPE};

/// Whether headers announce gRPC: a content type that begins with `application/grpc` (behaviour.md D.10, E.6).
pub fn is_grpc(headers: &HeaderMap) -> bool {
    headers.get(CONTENT_TYPE).is_some_and(|v| v.as_bytes().starts_with(b"application/grpc"))
}

/// A source of random numbers for ratios: a number below its argument. Thread local, no lock.
pub fn random(below: u32) -> u32 {
    use rand::RngExt;
    if below == 0 { 0 } else { rand::rng().random_range(0..below) }
}
