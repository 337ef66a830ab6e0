//! Pods as network namespaces, joined by a bridge in one more namespace.
//!
//! A socket belongs to the namespace of the thread that made it, wherever it is used later: so all clients and servers of
//! all pods live in the test process, each made by a thread that has entered the pod's namespace for it.

use std::{
    fs::File,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream},
    os::fd::AsRawFd,
    process::Command,
    sync::atomic::{AtomicU32, Ordering},
};

/// A bridge and its pods; everything is removed on drop.
pub(crate) struct Net {
    prefix: String,
    pods: AtomicU32,
}

/// One network namespace with an IPv4 and an IPv6 address.
#[derive(Clone)]
pub(crate) struct Pod {
    pub(crate) name: String,
    pub(crate) netns: String,
    pub(crate) ip4: Ipv4Addr,
    pub(crate) ip6: Ipv6Addr,
}

static NETS: AtomicU32 = AtomicU32::new(0);

impl Net {
    /// None, with the reason on stdout, where namespaces can't be made; never none in CI.
    pub(crate) fn new() -> Option<Self> {
        let prefix = format!("lp{}x{}", std::process::id(), NETS.fetch_add(1, Ordering::Relaxed));
        let net = Self { prefix, pods: AtomicU32::new(0) };
        let bridge = net.bridge_netns();
        if let Err(why) = run(&["ip", "netns", "add", &bridge]) {
            assert!(std::env::var("CI").as_deref() != Ok("true"), "network namespaces are needed: {why}");
            println!("skipped: network namespaces need root and iproute2 ({why})");
            return None;
        }
        for cmd in [
            "link add br0 type bridge",
            "link set br0 up",
            "link set lo up",
            "addr add 10.88.255.254/16 dev br0",
            "addr add fd88::ffff/64 dev br0 nodad",
        ] {
            let mut args = vec!["ip", "-n", &bridge];
            args.extend(cmd.split(' '));
            run(&args).expect("the bridge");
        }
        // ClusterIPs have routes but nobody answers there: only redirection makes them work.
        for (sysctl, value) in [("net.ipv4.ip_forward", "1"), ("net.ipv6.conf.all.forwarding", "1")] {
            let assignment = format!("{sysctl}={value}");
            run(&["ip", "netns", "exec", &bridge, "sysctl", "-qw", &assignment]).expect("forwarding");
        }
        Some(net)
    }

    pub(crate) fn bridge_netns(&self) -> String {
        format!("{}-br", self.prefix)
    }

    /// A new pod with a default route through the bridge.
    pub(crate) fn pod(&self, name: &str) -> Pod {
        let index = self.pods.fetch_add(1, Ordering::Relaxed) + 1;
        let pod = Pod {
            name: name.to_string(),
            netns: format!("{}-{index}", self.prefix),
            ip4: Ipv4Addr::new(10, 88, 1, u8::try_from(index).expect("few pods")),
            ip6: format!("fd88::1:{index}").parse().expect("an address"),
        };
        let (ns, bridge) = (&pod.netns, self.bridge_netns());
        let veth = format!("v{index}");
        run(&["ip", "netns", "add", ns]).expect("a namespace");
        run(&["ip", "-n", &bridge, "link", "add", &veth, "type", "veth", "peer", "name", "eth0", "netns", ns])
            .expect("a veth pair");
        run(&["ip", "-n", &bridge, "link", "set", &veth, "master", "br0", "up"]).expect("the bridge port");
        for cmd in [
            "link set lo up".to_string(),
            format!("addr add {}/16 dev eth0", pod.ip4),
            format!("addr add {}/64 dev eth0 nodad", pod.ip6),
            "link set eth0 up".to_string(),
            "route add default via 10.88.255.254".to_string(),
            "-6 route add default via fd88::ffff".to_string(),
        ] {
            let mut args = vec!["ip", "-n", ns];
            args.extend(cmd.split(' '));
            run(&args).expect("the pod's addresses");
        }
        pod
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        for index in 1..=self.pods.load(Ordering::Relaxed) {
            let netns = format!("{}-{index}", self.prefix);
            let _ = run(&["ip", "netns", "del", &netns]);
            let _ = std::fs::remove_dir_all(etc(&netns));
        }
        let _ = run(&["ip", "netns", "del", &self.bridge_netns()]);
    }
}

/// Where `ip netns exec` takes files of `/etc` from.
fn etc(netns: &str) -> String {
    format!("/etc/netns/{netns}")
}

impl Pod {
    /// Commands that run in the pod from here on ask this name server.
    pub(crate) fn resolve_by(&self, server: IpAddr) {
        let dir = etc(&self.netns);
        std::fs::create_dir_all(&dir).expect("/etc/netns");
        let text = format!("nameserver {server}\noptions timeout:1 attempts:2\n");
        std::fs::write(format!("{dir}/resolv.conf"), text).expect("a resolv.conf");
    }

    /// A UDP socket on every address of the pod.
    pub(crate) fn udp(&self, port: u16) -> tokio::net::UdpSocket {
        let socket = within(&self.netns, || std::net::UdpSocket::bind((IpAddr::from(Ipv4Addr::UNSPECIFIED), port)))
            .unwrap_or_else(|e| panic!("{} cannot listen on {port}: {e}", self.name));
        socket.set_nonblocking(true).expect("a nonblocking socket");
        tokio::net::UdpSocket::from_std(socket).expect("a runtime")
    }

    pub(crate) fn addr(&self, port: u16) -> SocketAddr {
        (self.ip4, port).into()
    }

    /// Listens on every address of the pod.
    pub(crate) fn listen(&self, port: u16) -> tokio::net::TcpListener {
        let listener = within(&self.netns, || TcpListener::bind((IpAddr::from(Ipv6Addr::UNSPECIFIED), port)))
            .unwrap_or_else(|e| panic!("{} cannot listen on {port}: {e}", self.name));
        listener.set_nonblocking(true).expect("a nonblocking listener");
        tokio::net::TcpListener::from_std(listener).expect("a runtime")
    }

    pub(crate) async fn connect(&self, addr: SocketAddr) -> io::Result<tokio::net::TcpStream> {
        let netns = self.netns.clone();
        let io = tokio::task::spawn_blocking(move || within(&netns, || TcpStream::connect(addr)))
            .await
            .expect("the connecting thread")?;
        io.set_nonblocking(true)?;
        io.set_nodelay(true)?;
        tokio::net::TcpStream::from_std(io)
    }

    /// A command that will run in the pod.
    pub(crate) fn command(&self, program: &str) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.netns, program]);
        command
    }
}

/// Runs a closure on a thread of its own inside a network namespace.
pub(crate) fn within<T: Send>(netns: &str, f: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        scope
            .spawn(|| {
                enter(netns).expect("the namespace exists");
                f()
            })
            .join()
            .expect("the thread does not panic")
    })
}

#[allow(unsafe_code)]
fn enter(netns: &str) -> io::Result<()> {
    let file = File::open(format!("/run/netns/{netns}"))?;
    // SAFETY: setns takes a file descriptor, which `file` keeps open for the call, and touches no memory of ours.
    match unsafe { libc::setns(file.as_raw_fd(), libc::CLONE_NEWNET) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

pub(crate) fn run(args: &[&str]) -> Result<(), String> {
    let out = Command::new(args[0]).args(&args[1..]).output().map_err(|e| format!("{}: {e}", args[0]))?;
    if out.status.success() {
        Ok(())
    } else {
        Err(format!("{}: {}", args.join(" "), String::from_utf8_lossy(&out.stderr).trim()))
    }
}
