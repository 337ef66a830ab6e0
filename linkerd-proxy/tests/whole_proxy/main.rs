//! The whole proxy: pods as network namespaces, redirected by `linkerd-proxy redirect`, each with its own proxy process
//! as uid 2102, between real clients and servers. Needs root, iproute2 and iptables; says so where it must skip.

#![allow(clippy::unwrap_used, reason = "tests may unwrap, and what they share too")]

mod apps;
mod gateway;
mod inbound;
mod net;
mod policy;
mod protocols;
mod reload;
mod routing;
mod smuggling;
mod startup;
mod wire;
mod world;
