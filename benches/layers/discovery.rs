//! The embedded control plane with 1,000 Services and 10,000 endpoints: start, one changed file, a look-up; and its memory.

use criterion::Criterion;
use linkerd_app::{
    policy::source::{Source, Target, Update},
    standalone::{Folder, Options, Settings, Standalone},
};
use std::{fmt::Write, fs, net::Ipv4Addr, path::PathBuf, sync::Arc};

const SERVICES: u32 = 1000;
const REPLICAS: u32 = 10;

pub(crate) fn benches(c: &mut Criterion) {
    let runtime = crate::runtime();
    let _entered = runtime.enter();
    let mut group = c.benchmark_group("discovery");
    group.sample_size(10);
    let folder = Manifests::write();

    let before = resident_kib();
    let standalone = folder.start();
    eprintln!(
        "discovery: {SERVICES} Services with {REPLICAS} endpoints each take {} KiB",
        resident_kib().saturating_sub(before)
    );

    group.bench_function("start_1000_services_10000_endpoints", |b| b.iter(|| folder.start()));
    let mut replicas = REPLICAS;
    group.bench_function("reload_one_changed_file", |b| {
        b.iter(|| {
            replicas = if replicas == REPLICAS { REPLICAS - 1 } else { REPLICAS };
            folder.write_service(17, replicas);
            standalone.reload()
        });
    });
    group.bench_function("look_up_a_service", |b| {
        let target = Target::Addr((cluster_ip(17), 80).into());
        b.iter(|| runtime.block_on(standalone.watch_client(target.clone())).unwrap());
    });
    group.bench_function("resolve_10_endpoints", |b| {
        b.iter(|| {
            let mut resolution = standalone.resolve("svc-17.bench.svc.cluster.local:80");
            let update = runtime.block_on(resolution.updates.recv());
            assert!(matches!(&update, Some(Update::Reset(set) | Update::Add(set)) if set.len() >= 9), "{update:?}");
        });
    });
}

/// A folder with a file for each Service and its Pods; removed on drop.
struct Manifests(PathBuf);

impl Manifests {
    fn write() -> Self {
        let dir = std::env::temp_dir().join(format!("bench-discovery-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        let folder = Self(dir);
        let local = format!(
            "apiVersion: v1\nkind: Namespace\nmetadata: {{name: bench}}\n---\n{}",
            pod("local", Ipv4Addr::new(10, 2, 0, 1))
        );
        fs::write(folder.0.join("local.yaml"), local).unwrap();
        for i in 0..SERVICES {
            folder.write_service(i, REPLICAS);
        }
        folder
    }

    fn write_service(&self, i: u32, replicas: u32) {
        let mut yaml = format!(
            "apiVersion: v1
kind: Service
metadata: {{name: svc-{i}, namespace: bench}}
spec:
  clusterIP: {0}
  clusterIPs: [{0}]
  selector: {{app: svc-{i}}}
  ports: [{{name: http, port: 80, targetPort: 8080}}]
",
            cluster_ip(i)
        );
        for replica in 0..replicas {
            let ip = Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 1, 0, 0)) + i * REPLICAS + replica);
            write!(yaml, "---\n{}", pod(&format!("svc-{i}"), ip)).unwrap();
        }
        fs::write(self.0.join(format!("svc-{i}.yaml")), yaml).unwrap();
    }

    fn start(&self) -> Arc<Standalone> {
        let options = Options {
            folders: vec![Folder { path: self.0.clone(), cluster: None }],
            namespace: "bench".into(),
            name: "local-10-2-0-1".into(),
            settings: Settings::default(),
            watch: false,
        };
        Standalone::start(options).unwrap().0
    }
}

impl Drop for Manifests {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn cluster_ip(i: u32) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 96, 0, 10)) + i)
}

fn pod(app: &str, ip: Ipv4Addr) -> String {
    format!(
        "apiVersion: v1
kind: Pod
metadata:
  name: {app}-{}
  namespace: bench
  labels: {{app: {app}, linkerd.io/control-plane-ns: linkerd}}
spec:
  serviceAccountName: {app}
  containers: [{{name: app, ports: [{{name: http, containerPort: 8080}}]}}]
status:
  podIP: {ip}
  podIPs: [{{ip: {ip}}}]
",
        ip.to_string().replace('.', "-")
    )
}

fn resident_kib() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:")).unwrap_or_default();
    line.split_ascii_whitespace().next().and_then(|n| n.parse().ok()).unwrap_or(0)
}
