//! The whole proxy: pods as network namespaces, redirected by `linkerd-proxy redirect`, each with its own proxy process
//! as uid 2102, between real clients and servers. Needs root, iproute2 and iptables; says so where it must skip.

mod apps;
mod federation;
mod net;
mod origination;
mod policy;
mod protocols;
mod reload;
mod routing;
mod startup;
mod wire;
mod world;
