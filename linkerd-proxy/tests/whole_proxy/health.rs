//! Health apart from readiness: what `/ready?verbose` and `proxy_unhealthy` say while plain `/ready` stays as it is.
//! The lost control plane, refused manifests and exhausted bounds are in `endings`.

use crate::{
    apps,
    net::Pod,
    world::{World, service},
};
use std::{
    fs, io,
    net::SocketAddr,
    path::Path,
    sync::mpsc,
    thread,
    time::{Duration, SystemTime},
};
use tokio::time::timeout;

/// Longer than the admin server takes to answer on a busy machine.
const ANSWER: Duration = Duration::from_secs(2);

/// Whether a condition holds by the metric and by the words, while plain readiness stays.
async fn says(world: &World, pod: &str, condition: &str) -> bool {
    let look = async {
        let label = format!("condition=\"{condition}\"");
        let metric = world.metric(pod, "proxy_unhealthy", &[&label]).await;
        let (_, words) = world.admin(pod, "GET", "/ready?verbose").await.unwrap();
        let (status, _) = world.admin(pod, "GET", "/ready").await.unwrap();
        assert_eq!(status, 200, "{words}");
        metric == 1.0 && words.contains(&format!("[-] {condition}: "))
    };
    timeout(ANSWER, look).await.unwrap_or(false)
}

/// Puts a certificate for `id`, signed by the folder's issuer, in the issuer's place.
fn certify(folder: &Path, id: &str, lifetime: Duration) {
    let read = |name: &str| fs::read_to_string(folder.join(name)).unwrap();
    let authority = rcgen::KeyPair::from_pem(&read("issuer.key")).unwrap();
    let issuer = rcgen::Issuer::from_ca_cert_pem(&read("issuer.crt"), authority).unwrap();
    let key = rcgen::KeyPair::generate().unwrap();
    let mut params = rcgen::CertificateParams::new([id.to_string()]).unwrap();
    params.not_before = (SystemTime::now() - Duration::from_secs(10)).into();
    params.not_after = (SystemTime::now() + lifetime).into();
    let leaf = params.signed_by(&key, &issuer).unwrap();
    fs::write(folder.join("tls.crt"), leaf.pem() + &read("issuer.crt")).unwrap();
    fs::write(folder.join("tls.key"), key.serialize_pem()).unwrap();
    fs::remove_file(folder.join("issuer.crt")).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_expired_certificate_is_told() {
    let Some(mut world) = World::new("expired") else { return };
    world.meshed("web", &[], &[]);
    let id = "web.shop.serviceaccount.identity.linkerd.cluster.local";
    certify(&world.dir.join("identity"), id, Duration::from_secs(2));
    world.start(&["web"]).await;
    world.eventually("the certificate has expired", async || says(&world, "web", "certificate_expired").await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_is_stuck_is_told() {
    let Some(mut world) = World::new("stuck") else { return };
    let client = world.meshed("client", &[], &[]);
    let server = world.plain("server", &[("http", 8080)]);
    world.manifest("web", &service("web", "server", &["10.96.0.10"], &[("http", 80, "http", None)]));
    world.start(&["client"]).await;
    let _app = apps::http(&server, 8080, "server");
    let busy = tokio::spawn(busy(client));
    assert!(!says(&world, "client", "worker_stuck").await);
    // A thread that is stopped while it holds what the admin server needs proves nothing: then there is another try.
    let mut tries = 0;
    while {
        let _stopped = Stopped::at_work(world.pid("client"));
        !told_within(&world, "worker_stuck", Duration::from_secs(10)).await
    } {
        tries += 1;
        assert!(tries < 3, "not told\n{}", world.logs());
    }
    world.eventually("it goes on", async || !says(&world, "client", "worker_stuck").await).await;
    busy.abort();
}

async fn told_within(world: &World, condition: &str, limit: Duration) -> bool {
    let told = async {
        while !says(world, "client", condition).await {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    timeout(limit, told).await.is_ok()
}

/// Gives a proxy something to do.
async fn busy(client: Pod) {
    loop {
        let _ = apps::get(&client, SocketAddr::from(([10, 96, 0, 10], 80)), "/", &[]).await;
    }
}

/// A process whose first thread, the one worker, is stopped until drop; its other threads run.
struct Stopped(Option<(mpsc::Sender<()>, thread::JoinHandle<()>)>);

impl Stopped {
    /// Stops it in the middle of something, not while it waits for events.
    fn at_work(pid: u32) -> Self {
        let (release, wait) = mpsc::channel();
        let (stopped, ready) = mpsc::channel();
        // Only the thread that traces may let go.
        let tracer = thread::spawn(move || {
            let pid = libc::pid_t::try_from(pid).unwrap();
            trace(libc::PTRACE_SEIZE, pid).unwrap();
            loop {
                trace(libc::PTRACE_INTERRUPT, pid).unwrap();
                wait_for_stop(pid).unwrap();
                // "-1": in no system call.
                if fs::read_to_string(format!("/proc/{pid}/syscall")).unwrap().starts_with("-1 ") {
                    break;
                }
                trace(libc::PTRACE_CONT, pid).unwrap();
                thread::sleep(Duration::from_micros(500));
            }
            stopped.send(()).unwrap();
            let _ = wait.recv();
            trace(libc::PTRACE_DETACH, pid).unwrap();
        });
        ready.recv().unwrap();
        Self(Some((release, tracer)))
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        if let Some((release, tracer)) = self.0.take() {
            drop(release);
            let _ = tracer.join();
        }
    }
}

#[allow(unsafe_code)]
fn trace(request: libc::c_uint, pid: libc::pid_t) -> io::Result<()> {
    let none = std::ptr::null_mut::<libc::c_void>();
    // SAFETY: none of the requests used here reads or writes memory of ours; address and data are zero.
    match unsafe { libc::ptrace(request, pid, none, none) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

#[allow(unsafe_code)]
fn wait_for_stop(pid: libc::pid_t) -> io::Result<()> {
    let mut status = 0;
    // SAFETY: `status` outlives the call, which writes one integer to it.
    match unsafe { libc::waitpid(pid, &raw mut status, libc::__WALL) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}
