//! The whole proxy: pods as network namespaces, redirected by `linkerd-proxy redirect`, each with its own proxy process
//! as uid 2102, between real clients and servers. Needs root, iproute2 and iptables; says so where it must skip.

#![allow(clippy::unwrap_used, reason = "a failed expectation is what a test is for, in its helpers too")]

mod apps;
mod balancing;
mod breakers;
mod causes;
mod companions;
mod control;
mod control_names;
mod control_plane;
mod detection;
mod dns;
mod egress;
mod endings;
mod federation;
mod filters;
mod gateway;
mod giving_up;
mod heads;
mod health;
mod inbound;
mod ingress;
mod injection;
mod ipv6;
mod logs;
mod machines;
mod metrics;
mod net;
mod origination;
mod policy;
mod protocols;
mod reload;
mod retries;
mod routes;
mod routing;
mod scripted;
mod secrets;
mod settings;
mod site;
mod smuggling;
mod spire;
mod startup;
mod tap;
mod timeouts;
mod traces;
mod unprocessed;
mod wire;
mod world;
