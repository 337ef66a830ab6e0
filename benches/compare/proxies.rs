//! The proxies that are compared, and how each is configured for the same duty: mutual TLS with identities checked on both
//! sides, one worker thread, redirected traffic on both ends, no access log.
//!
//! HTTP/1.1 goes between the proxies as each does best with its own kind: HAProxy and Envoy pool HTTP/1.1 connections,
//! this proxy decides by itself. HTTP/2 stays HTTP/2.

use crate::{
    net::{Net, PROXY_UID, Pod, success},
    work::{HTTP, Mode, OPAQUE, SERVICE},
};
use benches::process::Process;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
};
use std::{
    fmt, fs, io,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

/// Ports of the redirection.
const OUTBOUND: u16 = 4140;
const INBOUND: u16 = 4143;
/// Admin address of this proxy.
pub(crate) const ADMIN: &str = "127.0.0.1:4191";
const NAMESPACE: &str = "shop";

#[derive(Copy, Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Name {
    /// This proxy.
    Ours,
    Haproxy,
    Envoy,
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ours => "linkerd-proxy",
            Self::Haproxy => "HAProxy",
            Self::Envoy => "Envoy",
        })
    }
}

/// A proxy to be measured: its program and the folder with all configurations.
pub(crate) struct Proxy<'a> {
    pub(crate) name: Name,
    pub(crate) program: &'a Path,
    pub(crate) dir: &'a Path,
}

/// Both proxies of one kind.
pub(crate) struct Pair {
    pub(crate) outbound: Process,
    pub(crate) inbound: Process,
    /// From the start of the process to readiness, the slower of the two.
    pub(crate) start: Duration,
}

impl Pair {
    /// CPU time of both.
    pub(crate) fn cpu(&self) -> io::Result<(Duration, Duration)> {
        Ok((self.outbound.cpu()?, self.inbound.cpu()?))
    }

    /// KiB of each.
    pub(crate) fn pss(&self) -> io::Result<(u64, u64)> {
        Ok((self.outbound.pss()?, self.inbound.pss()?))
    }
}

impl Proxy<'_> {
    pub(crate) fn version(&self) -> String {
        let flag = if self.name == Name::Haproxy { "-v" } else { "--version" };
        let out = Command::new(self.program).arg(flag).output();
        let text = out.map(|o| String::from_utf8_lossy(&o.stdout).into_owned()).unwrap_or_default();
        let line = text.lines().find(|l| !l.trim().is_empty()).unwrap_or("version unknown");
        line.split("  version: ").last().unwrap_or(line).trim().to_string()
    }

    /// Starts both proxies and waits until they are ready.
    pub(crate) fn start(&self, net: &Net, mode: Mode) -> io::Result<Pair> {
        let one = |pod: &Pod, side: Side| {
            let mut command = pod.proxy(self.program);
            self.arguments(&mut command, pod, side, mode);
            let log = self.log(side);
            let file = fs::File::create(&log)?;
            let begin = Instant::now();
            let process = Process::start(command.stdout(file.try_clone()?).stderr(file))?;
            let mut wait = pod.command(std::env::current_exe()?);
            match (self.name, side) {
                (Name::Ours, _) => wait.args(["wait", ADMIN, "/ready"]),
                (_, Side::Outbound) => wait.args(["wait", &format!("127.0.0.1:{OUTBOUND}")]),
                (_, Side::Inbound) => wait.args(["wait", &format!("127.0.0.1:{INBOUND}")]),
            };
            success(&mut wait).map_err(|error| {
                let log = fs::read_to_string(&log).unwrap_or_default();
                io::Error::other(format!("{} does not become ready: {error}\n{log}", self.name))
            })?;
            Ok::<_, io::Error>((process, begin.elapsed()))
        };
        let (inbound, slow) = one(&net.server, Side::Inbound)?;
        let (outbound, start) = one(&net.client, Side::Outbound)?;
        Ok(Pair { outbound, inbound, start: start.max(slow) })
    }

    /// What a proxy has said.
    pub(crate) fn log(&self, side: Side) -> PathBuf {
        self.dir.join(format!("{}-{side:?}.log", self.name).to_lowercase())
    }

    fn arguments(&self, command: &mut Command, pod: &Pod, side: Side, mode: Mode) {
        let file = |kind: &str| self.dir.join(format!("{kind}-{side:?}-{mode:?}").to_lowercase());
        match self.name {
            Name::Ours => {
                command
                    .arg("run")
                    .arg("--manifests")
                    .arg(self.dir.join("manifests"))
                    .args(["--workload", &format!("{NAMESPACE}/{}", pod.name), "--identity"])
                    .arg(self.dir.join("identity"))
                    .env("LINKERD2_PROXY_LOG", "error")
                    .env("LINKERD2_PROXY_INBOUND_LISTEN_ADDR", format!("0.0.0.0:{INBOUND}"))
                    .env("LINKERD2_PROXY_OUTBOUND_LISTEN_ADDRS", format!("127.0.0.1:{OUTBOUND}"))
                    .env("LINKERD2_PROXY_ADMIN_LISTEN_ADDR", ADMIN);
            }
            Name::Haproxy => {
                command.args(["-db", "-f"]).arg(file("haproxy").with_extension("cfg"));
            }
            Name::Envoy => {
                command.args(["--concurrency", "1", "--disable-hot-restart", "-l", "error", "-c"]);
                command.arg(file("envoy").with_extension("yaml"));
            }
        }
    }
}

/// Which of the two proxies.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    Outbound,
    Inbound,
}

/// Writes identities, manifests and configurations of all proxies into a folder.
pub(crate) fn configure(net: &Net, dir: &Path, ours: &Path) -> io::Result<()> {
    certificates(dir)?;
    for side in [Side::Outbound, Side::Inbound] {
        for mode in [Mode::Http, Mode::Opaque] {
            let (haproxy, envoy) = match side {
                Side::Outbound => (haproxy_outbound(net, dir, mode), envoy_outbound(net, dir, mode)),
                Side::Inbound => (haproxy_inbound(dir, mode), envoy_inbound(dir, mode)),
            };
            let name = |kind: &str| format!("{kind}-{side:?}-{mode:?}").to_lowercase();
            fs::write(dir.join(name("haproxy")).with_extension("cfg"), haproxy)?;
            fs::write(dir.join(name("envoy")).with_extension("yaml"), envoy)?;
        }
    }
    fs::create_dir_all(dir.join("manifests"))?;
    fs::write(dir.join("manifests/shop.yaml"), manifests(net))?;
    success(Command::new(ours).args(["identity", "init"]).arg(dir.join("identity")))?;
    success(Command::new("chown").args(["-R", &PROXY_UID.to_string()]).arg(dir))
}

/// An authority and a certificate for each pod, P-256 as a mesh's are.
fn certificates(dir: &Path) -> io::Result<()> {
    let make = || {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, "compare authority");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let key = KeyPair::generate()?;
        let authority = params.self_signed(&key)?.pem();
        let issuer = Issuer::new(params, key);
        let mut files = vec![("ca.pem".to_string(), authority)];
        for pod in ["client", "server"] {
            let mut params = CertificateParams::new(vec![identity(pod)])?;
            params.distinguished_name.push(DnType::CommonName, identity(pod));
            params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
            params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
            let key = KeyPair::generate()?;
            let certificate = params.signed_by(&key, &issuer)?.pem();
            files.push((format!("{pod}.crt"), certificate.clone()));
            files.push((format!("{pod}.key"), key.serialize_pem()));
            files.push((format!("{pod}.pem"), certificate + &key.serialize_pem()));
        }
        Ok::<_, rcgen::Error>(files)
    };
    for (name, text) in make().map_err(io::Error::other)? {
        fs::write(dir.join(name), text)?;
    }
    Ok(())
}

fn identity(pod: &str) -> String {
    format!("{pod}.{NAMESPACE}.serviceaccount.identity.linkerd.cluster.local")
}

/// Two meshed Pods and a Service with a detected and an opaque port.
fn manifests(net: &Net) -> String {
    let pod = |pod: &Pod, ports: &str| {
        format!(
            "apiVersion: v1
kind: Pod
metadata:
  name: {0}
  namespace: {NAMESPACE}
  labels: {{app: {0}, linkerd.io/control-plane-ns: linkerd}}
  annotations: {{config.linkerd.io/opaque-ports: \"{1}\"}}
spec:
  serviceAccountName: {0}
  containers: [{{name: app, ports: [{ports}]}}]
status:
  podIP: {2}
  podIPs: [{{ip: {2}}}]
---
",
            pod.name, OPAQUE.1, pod.ip
        )
    };
    format!(
        "apiVersion: v1
kind: Namespace
metadata: {{name: {NAMESPACE}}}
---
{}{}apiVersion: v1
kind: Service
metadata: {{name: web, namespace: {NAMESPACE}}}
spec:
  clusterIP: {SERVICE}
  clusterIPs: [{SERVICE}]
  selector: {{app: server}}
  ports:
  - {{name: http, port: {}, targetPort: {}}}
  - {{name: opaque, port: {}, targetPort: {}, appProtocol: linkerd.io/opaque}}
",
        pod(&net.client, ""),
        pod(
            &net.server,
            &format!("{{name: http, containerPort: {}}}, {{name: opaque, containerPort: {}}}", HTTP.1, OPAQUE.1)
        ),
        HTTP.0,
        HTTP.1,
        OPAQUE.0,
        OPAQUE.1
    )
}

fn haproxy_common(mode: Mode) -> String {
    let mode = match mode {
        Mode::Http => "http",
        Mode::Opaque => "tcp",
    };
    format!(
        "global
  nbthread 1
  maxconn 8000
defaults
  mode {mode}
  timeout connect 5s
  timeout client 60s
  timeout server 60s
"
    )
}

fn haproxy_outbound(net: &Net, dir: &Path, mode: Mode) -> String {
    let tls = format!(
        "ssl verify required ca-file {0}/ca.pem crt {0}/client.pem sni str({1}) verifyhost {1}",
        dir.display(),
        identity("server")
    );
    let server = format!("server server {}:{} {tls}", net.server.ip, mode.ports().1);
    let front = format!("{}frontend outbound\n  bind 0.0.0.0:{OUTBOUND}\n", haproxy_common(mode));
    match mode {
        Mode::Http => format!(
            "{front}  use_backend h2 if {{ fc_http_major 2 }}
  default_backend h1
backend h1
  http-reuse always
  {server} alpn http/1.1
backend h2
  http-reuse always
  {server} alpn h2
"
        ),
        Mode::Opaque => format!("{front}  default_backend tcp\nbackend tcp\n  {server}\n"),
    }
}

fn haproxy_inbound(dir: &Path, mode: Mode) -> String {
    let alpn = match mode {
        Mode::Http => " alpn h2,http/1.1",
        Mode::Opaque => "",
    };
    let front = format!(
        "{}frontend inbound\n  bind 0.0.0.0:{INBOUND} ssl crt {2}/server.pem ca-file {2}/ca.pem verify required{alpn}\n  {1} reject unless {{ ssl_c_s_dn(CN) {3} }}\n",
        haproxy_common(mode),
        match mode {
            Mode::Http => "http-request",
            Mode::Opaque => "tcp-request content",
        },
        dir.display(),
        identity("client")
    );
    let server = format!("server app 127.0.0.1:{}", mode.ports().1);
    match mode {
        Mode::Http => format!(
            "{front}  use_backend h2 if {{ fc_http_major 2 }}
  default_backend h1
backend h1
  http-reuse always
  {server}
backend h2
  http-reuse always
  {server} proto h2
"
        ),
        Mode::Opaque => format!("{front}  default_backend tcp\nbackend tcp\n  {server}\n"),
    }
}

fn envoy_outbound(net: &Net, dir: &Path, mode: Mode) -> String {
    let socket = format!(
        "
    transport_socket:
      name: envoy.transport_sockets.tls
      typed_config:
        \"@type\": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext
        sni: {}
        common_tls_context:{}",
        identity("server"),
        envoy_tls(dir, "client", "server")
    );
    envoy(OUTBOUND, mode, "", &net.server.ip.to_string(), &socket)
}

fn envoy_inbound(dir: &Path, mode: Mode) -> String {
    let alpn = match mode {
        Mode::Http => "\n          alpn_protocols: [h2, http/1.1]",
        Mode::Opaque => "",
    };
    let tls = envoy_tls(dir, "server", "client").replace("\n", "\n  ");
    let socket = format!(
        "
      transport_socket:
        name: envoy.transport_sockets.tls
        typed_config:
          \"@type\": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext
          require_client_certificate: true
          common_tls_context:{tls}{}",
        alpn.replace("\n", "\n  ")
    );
    envoy(INBOUND, mode, &socket, "127.0.0.1", "")
}

/// Own certificate, and the name that the peer must prove.
fn envoy_tls(dir: &Path, own: &str, peer: &str) -> String {
    format!(
        "
          tls_certificates:
          - certificate_chain: {{filename: {0}/{own}.crt}}
            private_key: {{filename: {0}/{own}.key}}
          validation_context:
            trusted_ca: {{filename: {0}/ca.pem}}
            match_typed_subject_alt_names:
            - {{san_type: DNS, matcher: {{exact: {1}}}}}",
        dir.display(),
        identity(peer)
    )
}

fn envoy(port: u16, mode: Mode, downstream: &str, to: &str, upstream: &str) -> String {
    let (filter, protocol) = match mode {
        Mode::Http => (
            "
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          \"@type\": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: http
          codec_type: AUTO
          generate_request_id: false
          route_config:
            virtual_hosts:
            - name: all
              domains: [\"*\"]
              routes:
              - match: {prefix: /}
                route: {cluster: to, timeout: 0s}
          http_filters:
          - name: envoy.filters.http.router
            typed_config:
              \"@type\": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router",
            "
    typed_extension_protocol_options:
      envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
        \"@type\": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
        use_downstream_protocol_config: {http_protocol_options: {}, http2_protocol_options: {}}",
        ),
        Mode::Opaque => (
            "
      - name: envoy.filters.network.tcp_proxy
        typed_config:
          \"@type\": type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy
          stat_prefix: tcp
          cluster: to",
            "",
        ),
    };
    format!(
        "static_resources:
  listeners:
  - name: from
    address: {{socket_address: {{address: 0.0.0.0, port_value: {port}}}}}
    filter_chains:
    - filters:{filter}{downstream}
  clusters:
  - name: to
    type: STATIC
    connect_timeout: 5s
    circuit_breakers:
      thresholds: [{{max_connections: 100000, max_pending_requests: 100000, max_requests: 100000}}]
    load_assignment:
      cluster_name: to
      endpoints:
      - lb_endpoints:
        - endpoint: {{address: {{socket_address: {{address: {to}, port_value: {}}}}}}}{protocol}{upstream}
",
        mode.ports().1
    )
}
