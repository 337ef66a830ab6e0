//! A mesh for one test: pods, a folder of manifests, an identity folder, one proxy process per meshed pod.

use crate::net::{Net, Pod};
use std::{
    collections::BTreeMap,
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

pub(crate) const NAMESPACE: &str = "shop";
const PROXY_UID: &str = "2102";
pub(crate) const BINARY: &str = env!("CARGO_BIN_EXE_linkerd-proxy");
/// A debug build on a busy machine; only failures wait this long.
const PATIENCE: Duration = Duration::from_secs(30);

pub(crate) struct World {
    proxies: BTreeMap<String, Child>,
    pods: BTreeMap<String, Pod>,
    /// Pods of other clusters, and of which.
    members: BTreeMap<String, &'static str>,
    pub(crate) dir: PathBuf,
    /// Further arguments of this cluster's proxies.
    pub(crate) args: Vec<String>,
    net: Net,
}

impl World {
    /// None where namespaces can't be made (said on stdout).
    pub(crate) fn new(test: &str) -> Option<Self> {
        let net = Net::new()?;
        let dir = std::env::temp_dir().join(format!("linkerd-proxy-{}-{test}", std::process::id()));
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir_all(dir.join("manifests")).expect("a temporary folder");
        let (proxies, pods, members) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
        let world = Self { proxies, pods, members, dir, args: Vec::new(), net };
        identity(&world.dir.join("identity"), "cluster.local");
        success(Command::new("chmod").arg("755").arg(&world.dir));
        Some(world)
    }

    /// Another cluster: a folder of that name with manifests and an issuer of the trust domain `NAME.example`. Before the
    /// first proxy starts, all clusters trust all.
    pub(crate) fn cluster(&mut self, name: &'static str) -> PathBuf {
        let folder = self.dir.join(name);
        fs::create_dir_all(folder.join("manifests")).expect("a folder");
        identity(&folder.join("identity"), &format!("{name}.example"));
        self.args.extend(["--cluster".to_string(), format!("{name}={}", folder.join("manifests").display())]);
        folder.join("manifests")
    }

    /// Hands every cluster the trust anchors of all.
    pub(crate) fn share_trust(&self, clusters: &[&str]) {
        let files: Vec<_> = clusters.iter().map(|name| self.dir.join(name)).chain([self.dir.clone()]).collect();
        let files: Vec<_> = files.into_iter().map(|folder| folder.join("identity/ca.crt")).collect();
        let bundle: String = files.iter().map(|file| fs::read_to_string(file).expect("an anchor")).collect();
        for file in files {
            fs::write(file, &bundle).expect("a bundle");
        }
    }

    /// As [`World::meshed`], in another cluster.
    pub(crate) fn meshed_in(&mut self, cluster: &'static str, name: &str, ports: &[(&str, u16)]) -> Pod {
        self.members.insert(name.to_string(), cluster);
        self.meshed(name, ports, &[])
    }

    /// A pod without a proxy; `extra` goes below `metadata` and `spec` of its manifest.
    pub(crate) fn plain(&mut self, name: &str, ports: &[(&str, u16)]) -> Pod {
        self.add_pod(name, ports, "", &[])
    }

    /// A pod with redirection; its proxy starts with [`World::start`].
    pub(crate) fn meshed(&mut self, name: &str, ports: &[(&str, u16)], annotations: &[(&str, &str)]) -> Pod {
        let pod = self.add_pod(name, ports, "    linkerd.io/control-plane-ns: linkerd\n", annotations);
        for args in [&["redirect"][..], &["redirect", "--check"]] {
            success(pod.command(BINARY).args(args));
        }
        pod
    }

    fn add_pod(&mut self, name: &str, ports: &[(&str, u16)], labels: &str, annotations: &[(&str, &str)]) -> Pod {
        let pod = self.net.pod(name);
        let mut yaml = format!(
            "apiVersion: v1\nkind: Pod\nmetadata:\n  name: {name}\n  namespace: {NAMESPACE}\n  labels:\n    app: {name}\n{labels}"
        );
        if !annotations.is_empty() {
            yaml.push_str("  annotations:\n");
        }
        for (key, value) in annotations {
            writeln!(yaml, "    {key}: {value:?}").expect("a string");
        }
        write!(yaml, "spec:\n  serviceAccountName: {name}\n  containers:\n  - name: app\n").expect("a string");
        if !ports.is_empty() {
            yaml.push_str("    ports:\n");
        }
        for (port_name, port) in ports {
            writeln!(yaml, "    - {{name: {port_name}, containerPort: {port}}}").expect("a string");
        }
        write!(yaml, "status:\n  podIP: {0}\n  podIPs: [{{ip: {0}}}, {{ip: \"{1}\"}}]\n", pod.ip4, pod.ip6)
            .expect("a string");
        self.write(&self.home(name).join("manifests"), &format!("pod-{name}"), &yaml);
        self.pods.insert(name.to_string(), pod.clone());
        pod
    }

    /// Writes or replaces a manifest file, in one step as an operator's tool would.
    pub(crate) fn manifest(&self, name: &str, yaml: &str) {
        self.write(&self.manifests(), name, yaml);
    }

    fn write(&self, folder: &Path, name: &str, yaml: &str) {
        let temporary = self.dir.join(format!("{name}.tmp"));
        fs::write(&temporary, yaml).expect("a manifest");
        fs::rename(temporary, folder.join(format!("{name}.yaml"))).expect("a manifest");
    }

    /// The folder of a pod's cluster.
    fn home(&self, name: &str) -> PathBuf {
        self.members.get(name).map_or_else(|| self.dir.clone(), |cluster| self.dir.join(cluster))
    }

    pub(crate) fn manifests(&self) -> PathBuf {
        self.dir.join("manifests")
    }

    /// Starts the proxies of the named pods and waits until they are ready.
    pub(crate) async fn start(&mut self, pods: &[&str]) {
        for name in pods {
            self.spawn(name, &[]);
        }
        for name in pods {
            self.wait_ready(name).await;
        }
    }

    pub(crate) fn spawn(&mut self, name: &str, env: &[(&str, &str)]) {
        let home = self.home(name);
        let run = ["run", "--manifests", &home.join("manifests").display().to_string()].map(str::to_string);
        let who = ["--workload".into(), format!("{NAMESPACE}/{name}"), "--identity".into()];
        let identity = [home.join("identity").display().to_string()];
        let more = match self.members.get(name) {
            Some(cluster) => vec!["--trust-domain".into(), format!("{cluster}.example")],
            None => self.args.clone(),
        };
        self.spawn_args(name, &[&run[..], &who, &identity, &more].concat(), env);
    }

    /// The Linkerd proxy: everything from the environment.
    pub(crate) fn spawn_linkerd(&mut self, name: &str, env: &[(&str, &str)]) {
        self.spawn_args(name, &[], env);
    }

    fn spawn_args(&mut self, name: &str, args: &[String], env: &[(&str, &str)]) {
        let pod = &self.pods[name];
        let log = fs::File::create(self.log_path(name)).expect("a log file");
        let mut command = pod.command("setpriv");
        command
            .args(["--reuid", PROXY_UID, "--regid", PROXY_UID, "--clear-groups", "--", BINARY])
            .args(args)
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            .env("LINKERD2_PROXY_LOG", "warn,linkerd=debug")
            .env("LINKERD2_PROXY_INBOUND_LISTEN_ADDR", "[::]:4143")
            .env("LINKERD2_PROXY_OUTBOUND_LISTEN_ADDRS", "127.0.0.1:4140,[::1]:4140")
            .env("LINKERD2_PROXY_ADMIN_LISTEN_ADDR", "[::]:4191")
            .env("LINKERD2_PROXY_SHUTDOWN_ENDPOINT_ENABLED", "true")
            .envs(env.iter().copied())
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a log file"))
            .stderr(log);
        self.proxies.insert(name.to_string(), command.spawn().expect("the proxy starts"));
    }

    pub(crate) async fn wait_ready(&mut self, name: &str) {
        let end = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.proxies.get_mut(name).and_then(|p| p.try_wait().expect("a child")) {
                panic!("{name}'s proxy ended with {status}:\n{}", self.log(name));
            }
            if let Ok((200, _)) = self.admin(name, "GET", "/ready").await {
                return;
            }
            assert!(Instant::now() < end, "{name}'s proxy is not ready:\n{}", self.log(name));
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// One request to a proxy's admin port from inside its pod.
    pub(crate) async fn admin(&self, name: &str, method: &str, path: &str) -> std::io::Result<(u16, String)> {
        let mut io = self.pods[name].connect(([127, 0, 0, 1], 4191).into()).await?;
        io.write_all(format!("{method} {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n").as_bytes())
            .await?;
        let mut text = String::new();
        io.read_to_string(&mut text).await?;
        let status = text.get(9..12).and_then(|s| s.parse().ok()).unwrap_or(0);
        Ok((status, text.split_once("\r\n\r\n").map(|(_, body)| body.to_string()).unwrap_or_default()))
    }

    /// The sum of a family's samples whose labels contain all of the given texts.
    pub(crate) async fn metric(&self, name: &str, family: &str, labels: &[&str]) -> f64 {
        let (_, text) = self.admin(name, "GET", "/metrics").await.expect("metrics");
        text.lines()
            .filter(|l| l.strip_prefix(family).is_some_and(|rest| rest.starts_with(['{', ' '])))
            .filter(|l| labels.iter().all(|label| l.contains(label)))
            .filter_map(|l| l.rsplit(' ').next()?.parse::<f64>().ok())
            .sum()
    }

    /// Waits until a condition on the world holds.
    pub(crate) async fn eventually(&self, what: &str, mut condition: impl AsyncFnMut() -> bool) {
        let end = Instant::now() + PATIENCE;
        while !condition().await {
            assert!(Instant::now() < end, "{what}: not within {PATIENCE:?}\n{}", self.logs());
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// The process that is the proxy: the programs before it replaced themselves.
    pub(crate) fn pid(&self, name: &str) -> u32 {
        self.proxies[name].id()
    }

    pub(crate) fn terminate(&self, name: &str) {
        success(Command::new("kill").args(["-TERM", &self.proxies[name].id().to_string()]));
    }

    /// Exit code of a proxy that is expected to end.
    pub(crate) async fn exit_code(&mut self, name: &str) -> Option<i32> {
        let end = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.proxies.get_mut(name).expect("a proxy").try_wait().expect("a child") {
                return status.code();
            }
            assert!(Instant::now() < end, "{name}'s proxy does not end:\n{}", self.log(name));
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    pub(crate) fn log(&self, name: &str) -> String {
        fs::read_to_string(self.log_path(name)).unwrap_or_default()
    }

    pub(crate) fn logs(&self) -> String {
        self.proxies.keys().map(|name| format!("--- {name}\n{}", tail(&self.log(name), 60))).collect()
    }

    fn log_path(&self, name: &str) -> PathBuf {
        self.dir.join(format!("{name}.log"))
    }

    pub(crate) fn pod(&self, name: &str) -> &Pod {
        &self.pods[name]
    }

    pub(crate) fn bridge_netns(&self) -> String {
        self.net.bridge_netns()
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.logs());
        }
        for proxy in self.proxies.values_mut() {
            let _ = proxy.kill();
            let _ = proxy.wait();
        }
        let _ = fs::remove_dir_all(&self.dir);
    }
}

/// An identity folder that the proxies can read.
fn identity(folder: &Path, trust_domain: &str) {
    success(Command::new(BINARY).args(["identity", "init", "--trust-domain", trust_domain]).arg(folder));
    success(Command::new("chown").args(["-R", PROXY_UID]).arg(folder));
}

fn tail(text: &str, lines: usize) -> String {
    let all: Vec<_> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}

#[track_caller]
pub(crate) fn success(command: &mut Command) {
    let out = command.output().expect("the command exists");
    assert!(
        out.status.success(),
        "{command:?}: {}\n{}{}",
        out.status,
        String::from_utf8_lossy(&out.stdout),
        String::from_utf8_lossy(&out.stderr)
    );
}

/// A Service on a ClusterIP, for the pods labelled `app: <selects>`.
pub(crate) fn service(name: &str, selects: &str, ips: &[&str], ports: &[(&str, u16, &str, Option<&str>)]) -> String {
    let mut yaml = format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: {NAMESPACE}}}\nspec:\n  clusterIP: {:?}\n  clusterIPs: {ips:?}\n  selector: {{app: {selects}}}\n  ports:\n",
        ips[0]
    );
    for (port_name, port, target, app_protocol) in ports {
        write!(yaml, "  - {{name: {port_name}, port: {port}, targetPort: {target}").expect("a string");
        if let Some(protocol) = app_protocol {
            write!(yaml, ", appProtocol: {protocol}").expect("a string");
        }
        yaml.push_str("}\n");
    }
    yaml
}
