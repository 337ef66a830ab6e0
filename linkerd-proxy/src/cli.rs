//! The command line. Only shapes and help texts: what the commands do is in `commands`.

use clap::{Args, Parser, Subcommand};
use std::{net::IpAddr, path::PathBuf};

/// A service-mesh sidecar proxy.
///
/// With the environment of an injected pod and no arguments this is the Linkerd proxy; `run` needs no cluster.
#[derive(Debug, Parser)]
#[command(name = "linkerd-proxy", version, max_term_width = 110)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Option<Command>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run beside a workload, with policy and discovery from folders of Kubernetes manifests.
    Run(Run),
    /// Check folders of manifests and say what is wrong; exits with 1 if something is.
    Check(Check),
    /// Make the identity folder of a mesh without a cluster.
    #[command(subcommand)]
    Identity(Identity),
    /// Redirect this network namespace's TCP traffic to the proxy with iptables.
    Redirect(Redirect),
    /// Wait until the proxy is ready, then run a command.
    Await(Await),
    /// Check that traffic is redirected, as the network validator does.
    Validate(Validate),
}

/// What is said of a mesh beside its manifests.
#[derive(Debug, Args)]
pub(crate) struct Mesh {
    /// Folder of another cluster's manifests, for Links and federated Services: NAME=DIR, and after commas where they
    /// differ from ours and no Link or Secret tells, trust-domain=NAME, cluster-domain=NAME,
    /// control-plane-namespace=NAME. May be given several times.
    #[arg(long = "cluster", value_name = "NAME=DIR")]
    pub(crate) clusters: Vec<String>,
    /// Trust domain of identities.
    #[arg(long, value_name = "NAME", default_value = "cluster.local")]
    pub(crate) trust_domain: String,
    /// Domain of Service names.
    #[arg(long, value_name = "NAME", default_value = "cluster.local")]
    pub(crate) cluster_domain: String,
    /// Range from which Services without a clusterIP get one; once for IPv4 and once for IPv6.
    #[arg(long = "service-range", value_name = "CIDR")]
    pub(crate) service_ranges: Vec<String>,
    /// Namespace of the control plane: a part of identities, and the label of Pods that have a proxy.
    #[arg(long, value_name = "NAME", default_value = "linkerd")]
    pub(crate) control_plane_namespace: String,
    /// Namespace whose EgressNetworks count for namespaces that have none.
    #[arg(long, value_name = "NAME", default_value = "linkerd-egress")]
    pub(crate) global_egress_network_namespace: String,
    /// Networks that probes come from, where ports have no routes of their own; any if not given.
    #[arg(long, value_name = "CIDR", value_delimiter = ',')]
    pub(crate) probe_networks: Vec<ipnet::IpNet>,
    /// Honour the request headers l5d-timeout, l5d-response-timeout and l5d-retry-*.
    #[arg(long)]
    pub(crate) allow_l5d_request_headers: bool,
    /// Use the IPv6 address of Pods that have both.
    #[arg(long)]
    pub(crate) prefer_ipv6: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Run {
    /// Folder of manifests; may be given several times, later folders win.
    #[arg(long = "manifests", value_name = "DIR", required = true)]
    pub(crate) manifests: Vec<PathBuf>,
    #[command(flatten)]
    pub(crate) mesh: Mesh,
    /// The Pod that this proxy stands beside.
    #[arg(long, value_name = "NAMESPACE/POD")]
    pub(crate) workload: String,
    /// Folder with an issuer made by `identity init`, or with tls.crt, tls.key and ca.crt issued elsewhere.
    #[arg(long, value_name = "DIR")]
    pub(crate) identity: PathBuf,
}

#[derive(Debug, Args)]
pub(crate) struct Check {
    /// Folders of manifests.
    #[arg(value_name = "DIR", required = true)]
    pub(crate) dirs: Vec<PathBuf>,
    #[command(flatten)]
    pub(crate) mesh: Mesh,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Identity {
    /// Make a trust anchor and an issuer.
    Init {
        /// The folder; made if it does not exist.
        #[arg(value_name = "DIR")]
        dir: PathBuf,
        /// Trust domain that the issuer is for.
        #[arg(long, value_name = "NAME", default_value = "cluster.local")]
        trust_domain: String,
        /// Replace what is there.
        #[arg(long)]
        force: bool,
    },
}

#[derive(Debug, Args)]
pub(crate) struct Redirect {
    /// Remove the rules.
    #[arg(long, conflicts_with_all = ["check", "dry_run"])]
    pub(crate) undo: bool,
    /// Say whether the rules are in place; exits with 1 if not.
    #[arg(long, conflicts_with = "dry_run")]
    pub(crate) check: bool,
    /// Print the rules and change nothing.
    #[arg(long, alias = "simulate")]
    pub(crate) dry_run: bool,
    /// The original init program's flags: --incoming-proxy-port 4143, --outgoing-proxy-port 4140, --proxy-uid 2102,
    /// --proxy-gid, --ports-to-redirect, --inbound-ports-to-ignore 4190,4191,4567,4568,
    /// --outbound-ports-to-ignore 4567,4568, --subnets-to-ignore, --netns, --use-wait-flag, --iptables-mode, --ipv6 ….
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "FLAGS")]
    pub(crate) flags: Vec<String>,
}

#[derive(Debug, Args)]
pub(crate) struct Await {
    /// Admin port.
    #[arg(short, long, default_value_t = 4191)]
    pub(crate) port: u16,
    /// Admin address; this machine's loopback addresses if not given.
    #[arg(long)]
    pub(crate) address: Option<IpAddr>,
    /// Pause after a failed try, for instance 1s.
    #[arg(short, long, default_value = "1s")]
    pub(crate) backoff: String,
    /// Longest wait; exits with 69 when it ends.
    #[arg(short, long)]
    pub(crate) timeout: Option<String>,
    /// false: run the command even if the wait ended without success.
    #[arg(long, default_value = "true", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub(crate) timeout_fatal: bool,
    /// Ask the proxy to shut down when the command ends.
    #[arg(short = 'S', long)]
    pub(crate) shutdown: bool,
    /// The command.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "CMD")]
    pub(crate) command: Vec<std::ffi::OsString>,
}

#[derive(Debug, Args)]
pub(crate) struct Validate {
    /// Address to connect to.
    #[arg(long, default_value = "192.0.2.2:1404")]
    pub(crate) connect_addr: std::net::SocketAddr,
    /// Address to listen on: the outbound port.
    #[arg(long, default_value = "0.0.0.0:4140")]
    pub(crate) listen_addr: std::net::SocketAddr,
    /// Longest wait.
    #[arg(long, default_value = "10s")]
    pub(crate) timeout: String,
    /// Ignored; understood for compatibility.
    #[arg(long)]
    pub(crate) log_format: Option<String>,
    /// Ignored; understood for compatibility.
    #[arg(long)]
    pub(crate) log_level: Option<String>,
}
