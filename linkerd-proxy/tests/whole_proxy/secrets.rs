//! Private keys stay where they are: nothing that the process writes or shows has them, in any spelling.

use crate::{
    apps,
    control_plane::{ControlPlane, identity_of},
    world::World,
};
use http::StatusCode;
use std::{
    fmt::Write,
    net::SocketAddr,
    path::Path,
    time::{Duration, Instant},
};

const WEB: ([u8; 4], u16) = ([10, 96, 0, 10], 80);

/// Fails if some text has the secret part of a P-256 key (PKCS#8 DER), as bytes, in hexadecimal, in base64 or as a list of
/// numbers.
#[track_caller]
pub(crate) fn not_in(key: &[u8], what: &str, text: &[u8]) {
    for (spelling, secret) in spellings(scalar(key)) {
        let found = text.windows(secret.len()).any(|window| window == secret);
        assert!(!found, "{what} has a private key in it ({spelling})");
    }
}

/// RFC 5915: after the version, the secret is the first octet string of 32 bytes.
fn scalar(key: &[u8]) -> &[u8] {
    let at = key.windows(5).position(|w| w == [2, 1, 1, 4, 32]).expect("a P-256 key") + 5;
    &key[at..at + 32]
}

fn spellings(secret: &[u8]) -> Vec<(&'static str, Vec<u8>)> {
    let hex = |upper: bool| {
        secret.iter().fold(String::new(), |mut text, byte| {
            if upper { write!(text, "{byte:02X}") } else { write!(text, "{byte:02x}") }.unwrap();
            text
        })
    };
    let numbers: Vec<_> = secret[..8].iter().map(u8::to_string).collect();
    let mut all = vec![
        ("bytes", secret.to_vec()),
        ("hexadecimal", hex(false).into()),
        ("hexadecimal", hex(true).into()),
        ("numbers", numbers.join(", ").into()),
    ];
    // As part of something longer it may begin at any of three places.
    all.extend((0..3).map(|skip| ("base64", base64(&secret[skip..skip + 24]))));
    all
}

fn base64(bytes: &[u8]) -> Vec<u8> {
    const ALPHABET: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let digits = |three: &[u8]| {
        let n = three.iter().fold(0, |n, byte| n << 8 | usize::from(*byte));
        [18, 12, 6, 0].map(|shift| ALPHABET[n >> shift & 63])
    };
    bytes.chunks_exact(3).flat_map(digits).collect()
}

/// A key and its request where the identity helper would leave them.
fn leave_documents(dir: &Path, name: &str) -> Vec<u8> {
    let key = linkerd_tls::csr::generate_key().unwrap();
    let csr = linkerd_tls::csr::csr_der(&key, &name.parse().unwrap()).unwrap();
    std::fs::create_dir(dir).unwrap();
    std::fs::write(dir.join("key.p8"), key.secret_der()).unwrap();
    std::fs::write(dir.join("csr.der"), csr).unwrap();
    key.secret_der().to_vec()
}

#[tokio::test(flavor = "multi_thread")]
async fn private_keys_are_in_no_log_and_on_no_page() {
    let Some(mut world) = World::new("secrets") else { return };
    let client = world.meshed("client", &[], &[]);
    let server = world.meshed("server", &[("http", 8080)], &[]);
    let control = ControlPlane::new(&world);
    control.service(SocketAddr::from(WEB), "web");
    control.endpoints("web", &[(server.addr(8080), Some("server"))]);
    control.certificates_last(Duration::from_secs(3));
    let mut keys = Vec::new();
    for pod in [&client, &server] {
        let dir = world.dir.join(format!("end-entity-{}", pod.name));
        keys.push(leave_documents(&dir, &identity_of(&pod.name)));
        let env = [
            ("LINKERD2_PROXY_IDENTITY_DIR", dir.to_str().unwrap()),
            ("LINKERD2_PROXY_IDENTITY_MIN_REFRESH", "1s"),
            ("LINKERD2_PROXY_LOG", "trace"),
        ];
        control.spawn(&mut world, pod, &env);
    }
    world.wait_ready("client").await;
    world.wait_ready("server").await;
    let _app = apps::http(&server, 8080, "server");
    assert_eq!(apps::get(&client, WEB.into(), "/", &[]).await.unwrap().status, StatusCode::OK);
    let started = Instant::now();
    for name in ["client", "server"] {
        // Installed, renewed, and refused once.
        world
            .eventually("it is renewed", async || {
                world.metric(name, "control_identity_cert_refreshes_total", &["result=\"ok\""]).await >= 2.0
            })
            .await;
    }
    assert!(started.elapsed() < Duration::from_secs(15));
    let mut told = Vec::new();
    for name in ["client", "server"] {
        for path in ["/metrics", "/env.json", "/", "/status.json", "/ready?verbose"] {
            told.push((format!("{name}{path}"), world.admin(name, "GET", path).await.unwrap().1));
        }
        world.terminate(name);
        assert_eq!(world.exit_code(name).await, Some(0));
        let log = world.log(name);
        assert!(log.contains("TRACE"), "the log is not at trace level");
        told.push((format!("{name}'s log"), log));
    }
    for key in &keys {
        for (what, text) in &told {
            not_in(key, what, text.as_bytes());
        }
    }
    // The files were only read.
    for pod in ["client", "server"] {
        assert_eq!(std::fs::read_dir(world.dir.join(format!("end-entity-{pod}"))).unwrap().count(), 2);
    }
}

#[test]
fn what_is_looked_for_would_be_found() {
    let key = linkerd_tls::csr::generate_key().unwrap();
    let der = key.secret_der();
    let pem = base64(&[der, &[0, 0]].concat()[..der.len() / 3 * 3]);
    let hex = der.iter().fold(String::new(), |text, byte| format!("{text}{byte:02x}"));
    for text in [der, &pem, hex.as_bytes(), format!("{der:?}").as_bytes()] {
        assert!(std::panic::catch_unwind(|| not_in(der, "it", text)).is_err(), "{:?}", String::from_utf8_lossy(text));
    }
    not_in(der, "it", b"nothing of the kind");
}
