//! Two pods as network namespaces on a bridge in a third one. Nothing here reaches beyond these namespaces.

use std::{
    fs, io,
    net::Ipv4Addr,
    path::Path,
    process::{Command, Stdio},
};

/// Beginning of the namespaces' names; the id of the process that made them follows.
const PREFIX: &str = "compare";
/// User whose traffic is not redirected: the proxies.
pub(crate) const PROXY_UID: u32 = 2102;

/// The namespaces, removed on drop.
pub(crate) struct Net {
    bridge: String,
    pub(crate) client: Pod,
    pub(crate) server: Pod,
}

/// One network namespace.
#[derive(Clone)]
pub(crate) struct Pod {
    pub(crate) name: &'static str,
    netns: String,
    pub(crate) ip: Ipv4Addr,
}

impl Net {
    pub(crate) fn new() -> io::Result<Self> {
        remove_leftovers();
        let name = |what| format!("{PREFIX}{}-{what}", std::process::id());
        let pod = |what, last| Pod { name: what, netns: name(what), ip: Ipv4Addr::new(10, 87, 1, last) };
        let net = Self { bridge: name("bridge"), client: pod("client", 1), server: pod("server", 2) };
        ip(&["netns", "add", &net.bridge])?;
        for args in ["link add br0 type bridge", "link set br0 up", "link set lo up", "addr add 10.87.0.254/16 dev br0"]
        {
            ip_in(&net.bridge, args)?;
        }
        for pod in [&net.client, &net.server] {
            ip(&["netns", "add", &pod.netns])?;
            ip_in(&net.bridge, &format!("link add {} type veth peer name eth0 netns {}", pod.name, pod.netns))?;
            ip_in(&net.bridge, &format!("link set {} master br0 up", pod.name))?;
            ip_in(&pod.netns, "link set lo up")?;
            ip_in(&pod.netns, &format!("addr add {}/16 dev eth0", pod.ip))?;
            ip_in(&pod.netns, "link set eth0 up")?;
            // Services are addresses behind this route; where nothing redirects, nobody answers.
            ip_in(&pod.netns, "route add default via 10.87.0.254")?;
            // A new connection per request uses up ports in seconds otherwise, here and in connection tracking.
            for setting in ["net.ipv4.ip_local_port_range=1100 65000", "net.ipv4.tcp_tw_reuse=1"] {
                success(pod.command("sysctl").args(["-qw", setting]))?;
            }
        }
        Ok(net)
    }

    /// Puts redirection in force in both pods, with the program that pods are given for it.
    pub(crate) fn redirect(&self, proxy: &Path) -> io::Result<()> {
        for pod in [&self.client, &self.server] {
            success(pod.command(proxy).arg("redirect"))?;
            // Exists once rules track connections.
            let setting = "net.netfilter.nf_conntrack_tcp_timeout_time_wait=2";
            let _ = success(pod.command("sysctl").args(["-qw", setting]));
        }
        Ok(())
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        for netns in [&self.client.netns, &self.server.netns, &self.bridge] {
            let _ = ip(&["netns", "del", netns]);
        }
    }
}

impl Pod {
    /// A command to be run in the pod, as root.
    pub(crate) fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new("ip");
        // As many open files as may be: the idle connections need some thousands.
        let script = "ulimit -n $(ulimit -Hn); exec \"$@\"";
        command.args(["netns", "exec", &self.netns, "sh", "-c", script, "sh"]).arg(program);
        command.stdin(Stdio::null());
        command
    }

    /// A command to be run in the pod as the proxies' user.
    pub(crate) fn proxy(&self, program: &Path) -> Command {
        let mut command = self.command("setpriv");
        let uid = PROXY_UID.to_string();
        command.args(["--reuid", &uid, "--regid", &uid, "--clear-groups", "--"]).arg(program);
        command.env_clear().env("PATH", std::env::var_os("PATH").unwrap_or_default());
        command
    }
}

/// Removes namespaces of runs that were killed.
fn remove_leftovers() {
    let Ok(entries) = fs::read_dir("/run/netns") else { return };
    for name in entries.filter_map(|e| e.ok()?.file_name().into_string().ok()) {
        let pid = name
            .strip_prefix(PREFIX)
            .and_then(|rest| rest.split_once('-'))
            .and_then(|(pid, _)| pid.parse::<u32>().ok());
        if pid.is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists()) {
            let _ = ip(&["netns", "del", &name]);
        }
    }
}

fn ip_in(netns: &str, args: &str) -> io::Result<()> {
    success(Command::new("ip").args(["-n", netns]).args(args.split(' ')))
}

fn ip(args: &[&str]) -> io::Result<()> {
    success(Command::new("ip").args(args))
}

/// Runs a command to its end.
pub(crate) fn success(command: &mut Command) -> io::Result<()> {
    let out = command.output().map_err(|e| io::Error::new(e.kind(), format!("{command:?}: {e}")))?;
    if out.status.success() {
        return Ok(());
    }
    let (text, more) = (String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    Err(io::Error::other(format!("{command:?}: {}\n{text}{more}", out.status)))
}
