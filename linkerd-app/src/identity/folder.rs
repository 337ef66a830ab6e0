//! Certificates from a folder, for meshes without a cluster. The folder holds either an issuer, from which this process
//! has its own certificate issued for a key that never leaves memory, or a certificate that someone else issued and
//! renews. Both are re-read when they change.
//!
//! | kind | certificate | key | trust anchors |
//! |---|---|---|---|
//! | issuer, as `linkerd-proxy identity init` makes it | `issuer.crt` | `issuer.key` | `ca.crt` |
//! | cert-manager, Kubernetes Secrets | `tls.crt` | `tls.key` | `ca.crt` |
//! | step, openssl | `tls.pem` or `cert.pem` | `tls-key.pem` or `key.pem` | `ca.pem` |
//! | Istio | `cert-chain.pem` | `key.pem` | `root-cert.pem` |
//!
//! The first row whose certificate is there counts; its trust anchors may have any of the names in the last column. What
//! a certificate of the lower rows is shows in itself: an authority's is used as an issuer.

use super::{
    Installer, Observer,
    schedule::{Clock, Schedule},
};
use linkerd_tls::{Certificate, Id, Invalid, Key, TrustAnchors, ca::Issuer};
use std::{
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};
use tokio::time::sleep;

/// Certificate and key files, in the order in which they are looked for.
const PAIRS: [(&str, &str); 5] = [
    ("issuer.crt", "issuer.key"),
    ("tls.crt", "tls.key"),
    ("tls.pem", "tls-key.pem"),
    ("cert.pem", "key.pem"),
    ("cert-chain.pem", "key.pem"),
];
/// Files of trust anchors, likewise.
const ANCHORS: [&str; 3] = ["ca.crt", "ca.pem", "root-cert.pem"];
/// Largest file that is read, bytes. Bundles of trust anchors are tens of kilobytes.
const MAX_FILE: u64 = 1024 * 1024;
/// How often the folder is looked at. Renewals come hours ahead of expiry; notifications of the file system would miss
/// the symbolic links and network mounts by which such folders are often updated.
const POLL: Duration = Duration::from_secs(2);
/// Share of a certificate's life after which a missing replacement is worth a warning.
const OVERDUE: f64 = 0.9;

/// Why a folder is unusable.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Nothing that could be a certificate is there.
    #[error("{dir}: holds neither issuer.crt nor tls.crt, tls.pem, cert.pem or cert-chain.pem; `linkerd-proxy identity \
             init {dir}` makes an issuer there", dir = .0.display())]
    Empty(PathBuf),
    /// A file is missing or unreadable.
    #[error("{path}: {source}; {remedy}", path = path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's words.
        source: io::Error,
        /// What to do.
        remedy: &'static str,
    },
    /// A file is no good.
    #[error("{path}: {source}", path = path.display())]
    Contents {
        /// The file.
        path: PathBuf,
        /// Why.
        source: Invalid,
    },
    /// What the files hold is refused as this process's certificate.
    #[error("{path}: {source}", path = path.display())]
    Refused {
        /// The certificate's file.
        path: PathBuf,
        /// Why.
        source: linkerd_tls::Error,
    },
}

/// Contents of a folder.
#[derive(Debug)]
pub struct Loaded {
    file: PathBuf,
    roots: TrustAnchors,
    source: Source,
}

#[derive(Debug)]
enum Source {
    Issuer(Issuer),
    Certificate(Certificate),
}

/// Keeps the certificate of a folder in force.
pub struct Folder {
    dir: PathBuf,
    installer: Installer,
    schedule: Schedule,
    clock: Clock,
    source: Loaded,
    /// What the files looked like when they were last read.
    seen: Print,
    expiry: SystemTime,
}

/// Enough of the files' metadata to notice a change.
type Print = Vec<Option<(u64, u64, u64, i64, i64)>>;

impl Loaded {
    /// Reads a folder.
    ///
    /// # Errors
    /// When files are missing, unreadable, malformed or do not fit together; when a certificate is not for `id`.
    pub fn read(dir: &Path, id: &Id) -> Result<Self, Error> {
        let Some((certificate, key)) = PAIRS.iter().find(|(name, _)| dir.join(name).exists()) else {
            return Err(Error::Empty(dir.to_owned()));
        };
        let anchors = ANCHORS.iter().find(|name| dir.join(name).exists()).unwrap_or(&ANCHORS[0]);
        let (file, key, anchors) = (dir.join(certificate), dir.join(key), dir.join(anchors));
        let contents = |path: &Path| {
            let path = path.to_owned();
            move |source| Error::Contents { path, source }
        };

        let (roots, warnings) = TrustAnchors::from_pem(&text(&anchors)?).map_err(|source| match source {
            linkerd_tls::Error::Invalid(source) => Error::Contents { path: anchors.clone(), source },
            source => Error::Refused { path: anchors.clone(), source },
        })?;
        for warning in warnings {
            tracing::warn!(file = %anchors.display(), "{warning}");
        }
        let chain = linkerd_tls::certificate::chain_from_pem(&text(&file)?).map_err(contents(&file))?;
        let key = Key::from_pem(&text(&key)?).map_err(contents(&key))?;
        let certificate = Certificate::from_der(chain, key).map_err(contents(&file))?;
        let source = if certificate.is_authority().map_err(contents(&file))? {
            let Certificate { leaf, intermediates, key_pkcs8, .. } = certificate;
            let chain = std::iter::once(leaf).chain(intermediates).collect();
            Source::Issuer(Issuer::new(roots.clone(), chain, &key_pkcs8).map_err(contents(&file))?)
        } else {
            let found = certificate.ids().map_err(contents(&file))?;
            if !found.contains(id) {
                let source = Invalid::Id { expected: id.clone(), found: found.into() };
                return Err(Error::Contents { path: file, source });
            }
            Source::Certificate(certificate)
        };
        Ok(Self { file, roots, source })
    }

    /// The trust anchors.
    pub fn roots(&self) -> &TrustAnchors {
        &self.roots
    }

    /// A certificate for this process: a new one from an issuer, or the one that is there.
    fn certificate(&self, id: &Id) -> Result<Certificate, Error> {
        match &self.source {
            Source::Certificate(certificate) => Ok(certificate.clone()),
            Source::Issuer(issuer) => {
                issuer.issue(id).map_err(|source| Error::Contents { path: self.file.clone(), source })
            }
        }
    }
}

impl Folder {
    pub(super) fn new(
        installer: Installer,
        dir: PathBuf,
        source: Loaded,
        (min, max): (Duration, Duration),
    ) -> Result<Self, Error> {
        let seen = print(&dir);
        let schedule = Schedule { min, max };
        let expiry = SystemTime::UNIX_EPOCH;
        let mut this = Self { dir, installer, schedule, clock: Clock::system(), source, seen, expiry };
        this.install(&())?;
        Ok(this)
    }

    /// Runs for ever. Dropping the future stops renewal; what is installed stays.
    pub async fn run(mut self, observer: impl Observer) {
        // The certificate was installed when the folder was first read, before there was anyone to count it.
        observer.refreshed(Ok(self.expiry));
        let (mut failures, mut told, mut changing) = (0, Told::Nothing, None::<Print>);
        let mut due = self.due(failures);
        loop {
            sleep(POLL).await;
            let now = print(&self.dir);
            // A change is taken up when the files have been the same for two looks: several are replaced one by one.
            if now == self.seen {
                changing = None;
            } else if changing.as_ref() == Some(&now) {
                (changing, self.seen) = (None, now);
                match Loaded::read(&self.dir, self.installer.id()) {
                    Ok(source) => {
                        let before = std::mem::replace(&mut self.source, source);
                        match self.install(&observer) {
                            Ok(()) => (failures, told) = (0, Told::Nothing),
                            Err(error) => {
                                self.source = before;
                                tracing::error!(%error, "The identity folder changed and is refused; the certificate in force stays");
                            }
                        }
                        due = self.due(failures);
                    }
                    Err(error) => {
                        observer.refreshed(Err(&error.to_string()));
                        tracing::error!(%error, "The identity folder changed and is refused; the certificate in force stays");
                    }
                }
                continue;
            } else {
                changing = Some(now);
            }
            match &self.source.source {
                Source::Issuer(_) if (self.clock.now)() >= due => {
                    match self.install(&observer) {
                        Ok(()) => failures = 0,
                        Err(error) => {
                            failures += 1;
                            tracing::error!(%error, failures, "Failed to renew the certificate; the last one stays in force");
                        }
                    }
                    due = self.due(failures);
                }
                Source::Issuer(_) => {}
                Source::Certificate(certificate) => {
                    told = overdue(certificate, (self.clock.now)(), &self.source.file, told)
                }
            }
        }
    }

    fn install(&mut self, observer: &impl Observer) -> Result<(), Error> {
        let certificate = self
            .source
            .certificate(self.installer.id())
            .inspect_err(|error| observer.refreshed(Err(&error.to_string())))?;
        let expiry = certificate.expiry;
        self.installer
            .install(Some(self.source.roots.clone()), certificate, observer)
            .map_err(|source| Error::Refused { path: self.source.file.clone(), source })?;
        self.expiry = expiry;
        Ok(())
    }

    fn due(&self, failures: u32) -> SystemTime {
        let wait = match failures {
            0 => self.schedule.renewal(Some(self.expiry), &self.clock),
            _ => self.schedule.retry(failures, Some(self.expiry), &self.clock),
        };
        (self.clock.now)().checked_add(wait).unwrap_or(self.expiry)
    }
}

/// What has been said about a certificate that is not replaced.
#[derive(Copy, Clone, PartialEq, Eq)]
enum Told {
    Nothing,
    Overdue,
    Expired,
}

fn overdue(certificate: &Certificate, now: SystemTime, file: &Path, told: Told) -> Told {
    let file = file.display();
    if now >= certificate.expiry {
        if told != Told::Expired {
            tracing::error!(%file, "The certificate has expired and has not been replaced: peers refuse this proxy");
        }
        return Told::Expired;
    }
    let from = certificate.validity().map_or(now, |(from, _)| from);
    let life = certificate.expiry.duration_since(from).unwrap_or_default();
    let past = now.duration_since(from).unwrap_or_default();
    if past >= life.mul_f64(OVERDUE) {
        if told == Told::Nothing {
            let left_secs = (life - past).as_secs();
            tracing::warn!(%file, left_secs, "The certificate expires soon and has not been replaced");
        }
        return Told::Overdue;
    }
    told
}

/// Follows symbolic links, so that a link that is switched shows as a change.
fn print(dir: &Path) -> Print {
    let names = PAIRS.iter().flat_map(|(certificate, key)| [certificate, key]).chain(&ANCHORS);
    names
        .map(|name| {
            let meta = fs::metadata(dir.join(name)).ok()?;
            Some((meta.dev(), meta.ino(), meta.size(), meta.mtime(), meta.mtime_nsec()))
        })
        .collect()
}

fn text(path: &Path) -> Result<String, Error> {
    let error = |remedy| move |source| Error::Read { path: path.to_owned(), source, remedy };
    let len =
        fs::metadata(path).map_err(error("certificate, key and trust anchors belong into the folder together"))?.len();
    if len > MAX_FILE {
        let source = io::Error::other(format!("{len} bytes long, more than {MAX_FILE}"));
        return Err(error("it should hold PEM text")(source));
    }
    fs::read_to_string(path).map_err(error("it must be PEM text that the proxy's user can read"))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use linkerd_tls::{
        ca,
        identity::{self, Reader},
    };
    use std::sync::{Arc, Mutex};

    /// A folder of its own, removed at the end.
    pub(crate) struct Dir(pub(crate) PathBuf);

    impl Dir {
        pub(crate) fn new(name: &str) -> Self {
            let dir = std::env::temp_dir().join(format!("linkerd-identity-{name}-{}", std::process::id()));
            let _ = fs::remove_dir_all(&dir);
            fs::create_dir_all(&dir).unwrap();
            Self(dir)
        }

        /// With an authority in it.
        pub(crate) fn authority(name: &str) -> Self {
            let dir = Self::new(name);
            ca::init(&dir.0, &ca::Init::default()).unwrap();
            dir
        }

        /// Moves a file of an authority here under another name.
        fn take(&self, from: &Dir, file: &str, to: &str) {
            fs::copy(from.0.join(file), self.0.join(to)).unwrap();
        }

        /// Writes a certificate of the authority as someone else would.
        fn leaf(&self, from: &Dir, id: &str, certificate: &str, key: &str) {
            let issued = Issuer::load(&from.0).unwrap().issue(&id.parse().unwrap()).unwrap();
            let chain = std::iter::once(&issued.leaf).chain(&issued.intermediates);
            let chain: String = chain.map(|der| pem("CERTIFICATE", der)).collect();
            fs::write(self.0.join(certificate), chain).unwrap();
            fs::write(self.0.join(key), pem("PRIVATE KEY", issued.key_pkcs8.secret_der())).unwrap();
        }
    }

    fn pem(kind: &str, der: &[u8]) -> String {
        const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
        let mut text = format!("-----BEGIN {kind}-----\n");
        for line in der.chunks(48) {
            for three in line.chunks(3) {
                let bits = three.iter().fold(0, |bits, byte| bits << 8 | u32::from(*byte)) << (8 * (3 - three.len()));
                let digits = (0..4).map(|n| char::from(DIGITS[(bits >> (18 - 6 * n)) as usize & 63]));
                text.extend(digits.take(three.len() + 1).chain(std::iter::repeat_n('=', 3 - three.len())));
            }
            text.push('\n');
        }
        text + &format!("-----END {kind}-----\n")
    }

    impl Drop for Dir {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    const ID: &str = "web.shop.serviceaccount.identity.linkerd.cluster.local";
    const CLAMP: (Duration, Duration) = (Duration::from_secs(10), Duration::from_secs(86_400));

    #[derive(Clone, Default)]
    struct Log(Arc<Mutex<Vec<bool>>>);

    impl Observer for Log {
        fn refreshed(&self, result: Result<SystemTime, &str>) {
            self.0.lock().unwrap().push(result.is_ok());
        }
    }

    impl Log {
        fn take(&self) -> Vec<bool> {
            std::mem::take(&mut *self.0.lock().unwrap())
        }
    }

    fn open(dir: &Dir) -> Result<(Reader, Folder), Error> {
        let id: Id = ID.parse().unwrap();
        let loaded = Loaded::read(&dir.0, &id)?;
        let (writer, reader) = identity::channel(id.clone(), id.to_server_name().unwrap(), loaded.roots().clone());
        Ok((reader, Folder::new(Installer::new(writer), dir.0.clone(), loaded, CLAMP)?))
    }

    #[track_caller]
    fn refused(dir: &Dir, words: &[&str]) {
        let error = open(dir).map(drop).unwrap_err().to_string();
        assert!(words.iter().all(|word| error.contains(word)), "{error}");
    }

    #[test]
    fn every_layout_is_understood() {
        let authority = Dir::authority("layouts");
        open(&authority).unwrap();
        for (n, (certificate, key, anchors)) in [
            ("tls.crt", "tls.key", "ca.crt"),
            ("tls.pem", "tls-key.pem", "ca.pem"),
            ("cert.pem", "key.pem", "ca.pem"),
            ("cert-chain.pem", "key.pem", "root-cert.pem"),
        ]
        .into_iter()
        .enumerate()
        {
            let dir = Dir::new(&format!("layout-{n}"));
            dir.leaf(&authority, ID, certificate, key);
            dir.take(&authority, "ca.crt", anchors);
            let (reader, _) = open(&dir).unwrap();
            assert!(reader.is_ready());
        }
        // The Secret of a cluster's identity issuer.
        let dir = Dir::new("layout-secret");
        dir.take(&authority, "issuer.crt", "tls.crt");
        dir.take(&authority, "issuer.key", "tls.key");
        dir.take(&authority, "ca.crt", "ca.crt");
        assert!(matches!(open(&dir).unwrap().1.source.source, Source::Issuer(_)));
    }

    #[test]
    fn defects_name_file_and_remedy() {
        let (authority, dir) = (Dir::authority("defects"), Dir::new("defect"));
        refused(&dir, &["holds neither", "identity init"]);
        dir.leaf(&authority, "db.example", "tls.crt", "tls.key");
        refused(&dir, &["ca.crt", "belong into the folder together"]);
        dir.take(&authority, "ca.crt", "ca.crt");
        refused(&dir, &["tls.crt", "certificate is for [db.example], not for web.shop"]);
        dir.leaf(&authority, ID, "tls.crt", "other.key");
        refused(&dir, &["tls.crt", "does not belong"]);
        fs::write(dir.0.join("tls.key"), "junk").unwrap();
        refused(&dir, &["tls.key", "no private key"]);
    }

    #[tokio::test(start_paused = true)]
    async fn an_issuers_certificates_are_renewed() {
        let dir = Dir::authority("renewed");
        let (reader, mut folder) = open(&dir).unwrap();
        folder.clock = crate::identity::schedule::tests::clock(0.0);
        let (first, log) = (reader.expiry(), Log::default());
        let task = tokio::spawn(folder.run(log.clone()));
        sleep(Duration::from_secs(60_000)).await;
        assert_eq!(log.take(), [true]);
        sleep(Duration::from_secs(1_000)).await;
        assert_eq!(log.take(), [true]);
        assert!(reader.expiry() >= first);
        task.abort();
    }

    #[tokio::test(start_paused = true)]
    async fn changes_are_taken_up_once_they_settle_and_bad_ones_are_refused() {
        let (authority, other, dir) = (Dir::authority("old"), Dir::authority("new"), Dir::new("changes"));
        dir.leaf(&authority, ID, "tls.crt", "tls.key");
        dir.take(&authority, "ca.crt", "ca.crt");
        let (reader, folder) = open(&dir).unwrap();
        let log = Log::default();
        let task = tokio::spawn(folder.run(log.clone()));
        // From here on changes fall between two looks.
        sleep(POLL * 2 + POLL / 4).await;
        assert_eq!(log.take(), [true]);

        // Certificate first, key and anchors later: only the whole is taken up.
        let before = reader.expiry();
        dir.leaf(&other, ID, "tls.crt", "late.key");
        sleep(POLL).await;
        fs::rename(dir.0.join("late.key"), dir.0.join("tls.key")).unwrap();
        dir.take(&other, "ca.crt", "ca.crt");
        sleep(POLL * 3).await;
        assert_eq!(log.take(), [true]);
        assert!(reader.expiry() >= before);

        fs::write(dir.0.join("tls.crt"), "junk").unwrap();
        sleep(POLL * 9).await;
        assert_eq!(log.take(), [false]);
        assert!(reader.is_ready());
        task.abort();
    }
}
