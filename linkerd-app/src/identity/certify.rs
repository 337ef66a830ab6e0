//! Certification by someone else: a request goes out, a certificate comes back, and again before it expires
//! (behaviour.md B.3).

use super::{
    Installer, Observer,
    documents::Documents,
    schedule::{Clock, Schedule},
};
use futures_util::future::BoxFuture;
use linkerd_tls::Certificate;
use std::time::{Duration, SystemTime};

/// Longest that one attempt may take; a controller that hangs is then tried anew over a fresh connection.
const ATTEMPT: Duration = Duration::from_secs(30);

/// A certificate that was issued this moment and yet is valid since longer was issued by another clock, or backdated by an
/// unusual amount: Linkerd's issuer backdates by 20 s.
const SKEW: Duration = Duration::from_secs(600);

/// Whoever grants requests.
pub trait Certify: Send + Sync + 'static {
    /// Grants a request, PKCS#10 in DER. Reads the token anew each time. Called again after each failure; dropping the
    /// future gives the attempt up.
    ///
    /// # Errors
    /// Words that say whom was asked and what went wrong.
    fn certify<'a>(&'a self, csr_der: &'a [u8]) -> BoxFuture<'a, Result<Certified, String>>;
}

/// A granted request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Certified {
    /// DER.
    pub leaf: Vec<u8>,
    /// DER.
    pub intermediates: Vec<Vec<u8>>,
    /// When the issuer says that it ends.
    pub expiry: SystemTime,
}

/// Keeps a certificate fresh by asking for it.
pub struct Certifying {
    installer: Installer,
    documents: Documents,
    schedule: Schedule,
    clock: Clock,
}

impl Certifying {
    pub(super) fn new(installer: Installer, documents: Documents, (min, max): (Duration, Duration)) -> Self {
        Self { installer, documents, schedule: Schedule { min, max }, clock: Clock::system() }
    }

    /// Runs for ever. Dropping the future stops renewal; what is installed stays.
    pub async fn run(mut self, issuer: impl Certify, observer: impl Observer) {
        let (mut expiry, mut failures) = (None::<SystemTime>, 0u32);
        loop {
            let wait = match self.attempt(&issuer, &observer).await {
                Ok(until) => {
                    failures = 0;
                    expiry = Some(until);
                    self.schedule.renewal(expiry, &self.clock)
                }
                Err(reason) => {
                    failures = failures.saturating_add(1);
                    let wait = self.schedule.retry(failures, expiry, &self.clock);
                    self.report(&reason, expiry, failures, wait);
                    wait
                }
            };
            self.clock.sleep(wait).await;
        }
    }

    async fn attempt(&mut self, issuer: &impl Certify, observer: &impl Observer) -> Result<SystemTime, String> {
        let answer = tokio::time::timeout(ATTEMPT, issuer.certify(&self.documents.csr)).await;
        let certified = match answer {
            Ok(Ok(certified)) => certified,
            Ok(Err(reason)) => {
                observer.refreshed(Err(&reason));
                return Err(reason);
            }
            Err(_) => {
                let reason = format!("no answer within {ATTEMPT:?}");
                observer.refreshed(Err(&reason));
                return Err(reason);
            }
        };
        let Certified { leaf, intermediates, expiry } = certified;
        let certificate = Certificate { leaf, intermediates, key_pkcs8: self.documents.key.clone(), expiry };
        let skew = self.skew(&certificate);
        self.installer
            .install(None, certificate, observer)
            .map_err(|error| format!("the certificate that was issued is refused: {error}"))?;
        if let Some(skew) = skew {
            tracing::warn!(
                id = %self.installer.id(), skew_secs = skew.as_secs(),
                "The certificate that was just issued is valid since long by this machine's clock: this clock is ahead of the \
                 issuer's, and certificates seem to expire early"
            );
        }
        Ok(expiry)
    }

    /// How much this clock seems to be ahead of the issuer's, if that is much.
    fn skew(&self, issued: &Certificate) -> Option<Duration> {
        let (not_before, _) = issued.validity().ok()?;
        (self.clock.now)().duration_since(not_before).ok().filter(|age| *age > SKEW)
    }

    /// A failure is a warning while there is a certificate that works, and an error without.
    fn report(&self, error: &str, expiry: Option<SystemTime>, failures: u32, retry_in: Duration) {
        let id = self.installer.id();
        match expiry.map(|at| at.duration_since((self.clock.now)())) {
            None => tracing::error!(%id, %error, failures, ?retry_in, "Failed to obtain a certificate"),
            Some(Ok(left)) => tracing::warn!(
                %id, %error, failures, ?retry_in, left_secs = left.as_secs(),
                "Failed to renew the certificate; the last one stays in force"
            ),
            Some(Err(past)) => tracing::error!(
                %id, %error, failures, ?retry_in, expired_secs = past.duration().as_secs(),
                "Failed to renew the certificate, and the last one has expired: peers refuse this proxy"
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::{folder::tests::Dir, schedule::tests::clock};
    use linkerd_tls::{
        Id,
        ca::Issuer,
        identity::{self, Reader},
    };
    use std::sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering::SeqCst},
    };
    use tokio::time::{Instant, sleep};

    const ID: &str = "web.shop.serviceaccount.identity.linkerd.cluster.local";
    const DAY: u64 = 86_400;

    /// What the issuer does when it is asked.
    enum Answer {
        /// Issues, for so many seconds by the virtual clock.
        Good(u64),
        /// Issues what has expired, by its own word.
        Expired,
        /// Issues under another trust anchor.
        Foreign,
        Fails,
        Hangs,
    }

    struct Script {
        ours: Issuer,
        foreign: Issuer,
        start: Instant,
        /// Seconds after the start, tenths cut off.
        asked: Arc<Mutex<Vec<u64>>>,
        answer: fn(usize) -> Answer,
    }

    impl Certify for Script {
        fn certify<'a>(&'a self, csr: &'a [u8]) -> BoxFuture<'a, Result<Certified, String>> {
            Box::pin(async move {
                let n = {
                    let mut asked = self.asked.lock().unwrap();
                    asked.push(self.start.elapsed().as_secs());
                    asked.len()
                };
                let now = SystemTime::now() + self.start.elapsed();
                let (issuer, expiry) = match (self.answer)(n) {
                    Answer::Good(secs) => (&self.ours, now + Duration::from_secs(secs)),
                    Answer::Expired => (&self.ours, SystemTime::now() - Duration::from_secs(5)),
                    Answer::Foreign => (&self.foreign, now + Duration::from_secs(DAY)),
                    Answer::Fails => return Err("the controller refused".into()),
                    Answer::Hangs => std::future::pending().await,
                };
                let issued = issuer.issue_for(csr, &ID.parse::<Id>().unwrap()).map_err(|e| e.to_string())?;
                Ok(Certified { leaf: issued.leaf, intermediates: issued.intermediates, expiry })
            })
        }
    }

    #[derive(Default)]
    struct Counts {
        ok: AtomicUsize,
        failed: AtomicUsize,
    }

    impl Observer for Counts {
        fn refreshed(&self, result: Result<SystemTime, &str>) {
            if result.is_ok() { &self.ok } else { &self.failed }.fetch_add(1, SeqCst);
        }
    }

    /// Runs for a while and checks when the issuer was asked (seconds) and what was counted.
    async fn check(
        name: &str,
        answer: fn(usize) -> Answer,
        secs: u64,
        asked: &[u64],
        counted: (usize, usize),
    ) -> Reader {
        let (dir, other) = (Dir::authority(name), Dir::authority(&format!("{name}-foreign")));
        let id: Id = ID.parse().unwrap();
        let ours = Issuer::load(&dir.0).unwrap();
        let (writer, reader) =
            identity::channel(id.clone(), id.to_server_name().unwrap(), ours.trust_anchors().clone());
        let documents = Documents::make(&id).unwrap();
        let clamp = (Duration::from_secs(10), Duration::from_secs(DAY));
        let mut task = Certifying::new(Installer::new(writer), documents, clamp);
        task.clock = clock(0.0);
        let (log, counts) = (Arc::new(Mutex::new(Vec::new())), Arc::new(Counts::default()));
        let script = Script {
            ours,
            foreign: Issuer::load(&other.0).unwrap(),
            start: Instant::now(),
            asked: log.clone(),
            answer,
        };
        let running = tokio::spawn(task.run(script, counts.clone()));
        sleep(Duration::from_secs(secs)).await;
        running.abort();
        assert_eq!(log.lock().unwrap()[..], *asked);
        assert_eq!((counts.ok.load(SeqCst), counts.failed.load(SeqCst)), counted);
        reader
    }

    #[tokio::test(start_paused = true)]
    async fn renews_at_70_percent() {
        let reader = check("renews", |_| Answer::Good(1_000), 1_500, &[0, 700, 1_400], (3, 0)).await;
        assert!(reader.is_ready());
    }

    #[tokio::test(start_paused = true)]
    async fn the_first_failures_are_retried_fast_and_later_ones_every_ten_seconds() {
        let answer = |n| if n < 8 { Answer::Fails } else { Answer::Good(DAY) };
        let reader = check("retries", answer, 60, &[0, 0, 1, 3, 7, 15, 25, 35], (1, 7)).await;
        assert!(reader.is_ready());
    }

    #[tokio::test(start_paused = true)]
    async fn the_last_good_certificate_outlives_failures() {
        let answer = |n| if n == 1 { Answer::Good(100) } else { Answer::Fails };
        let asked = [0, 70, 70, 71, 73, 77, 85, 95, 105, 115];
        let reader = check("outlives", answer, 120, &asked, (1, 9)).await;
        assert!(reader.is_ready());
    }

    #[tokio::test(start_paused = true)]
    async fn unusable_answers_and_silence_count_as_failures() {
        let answer = |n| match n {
            1 => Answer::Expired,
            2 => Answer::Foreign,
            3 => Answer::Hangs,
            _ => Answer::Good(DAY),
        };
        let reader = check("unusable", answer, 60, &[0, 0, 1, 33], (1, 3)).await;
        assert!(reader.is_ready());
    }
}
