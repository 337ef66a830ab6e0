//! A watch that survives the control plane's absence (behaviour.md G.3).
//!
//! A [`Subscription`] opens a stream, hands its messages on, and opens another when it ends, fails, or stalls:
//!
//! ```text
//!            ┌──────────── ended, failed, limit reached ────────────┐
//!            ▼                                                      │
//!        Waiting ── wait over, or the client is connected again ─▶ Calling ── response ─▶ Open
//!            ▲                                                      │                     │
//!            └───────────────── failed, initial limit ──────────────┴── ended, a limit ───┘
//! ```
//!
//! It never gives up by itself: whoever asks for the next event stops asking when a code is final. Nothing is lost when
//! a call of [`Subscription::next`] is abandoned and repeated.

use super::record::Record;
use futures_util::{StreamExt, future::BoxFuture, stream::BoxStream};
use linkerd_stack::backoff::Backoff;
use std::{pin::Pin, time::Duration};
use tokio::{
    sync::watch,
    time::{self, Instant, Sleep},
};
use tonic::{Code, Status};

/// Longest silence of a stream when the configuration sets no idle limit. A peer that vanished without a word would
/// otherwise be waited for without end; a quiet stream that is opened anew costs one message in ten minutes.
pub(crate) const STALL_LIMIT: Duration = Duration::from_secs(600);
/// Idle and lifetime limits are cut by up to this share at random, so that proxies that started together don't all
/// subscribe anew together.
const LIMIT_JITTER: f64 = 0.1;
/// A stream that ends sooner than this counts as a failure even if it said something: without that, a server that
/// answers and closes at once would be asked in a tight loop.
const MIN_LIFE: Duration = Duration::from_secs(1);
/// Once the client is connected again, waiting streams are opened within this time, spread at random.
const RECOVERY_SPREAD: Duration = Duration::from_millis(500);

/// Limits on streams; none = no limit.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Limits {
    /// From the call to the first message.
    pub(crate) initial: Option<Duration>,
    /// Between messages.
    pub(crate) idle: Option<Duration>,
    /// Of the whole stream.
    pub(crate) lifetime: Option<Duration>,
}

/// When the next stream is opened after one ended.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(crate) enum Resume {
    /// At once; with backoff only if that fails too. For policies and profiles.
    AtOnce,
    /// Always after a step of the backoff. For endpoints.
    AfterBackoff,
}

/// How a subscription behaves.
#[derive(Clone)]
pub(crate) struct Settings {
    pub(crate) limits: Limits,
    pub(crate) backoff: Backoff,
    pub(crate) resume: Resume,
    /// Whether the client has a connection; a wait is cut short when it becomes true.
    pub(crate) connected: watch::Receiver<bool>,
    /// A number within 0..1.
    pub(crate) random: fn() -> f64,
}

/// Opens a stream.
pub(crate) type Call<M> =
    Box<dyn FnMut() -> BoxFuture<'static, Result<BoxStream<'static, Result<M, Status>>, Status>> + Send>;

/// What happens to a subscription.
#[derive(Debug)]
pub(crate) enum Event<M> {
    /// A message; `first` of its stream or not.
    Message { first: bool, message: M },
    /// The stream, or the attempt to open one, ended. Code `Ok` stands for a clean end or a limit of ours. The next
    /// call of [`Subscription::next`] opens another.
    Ended(Status),
}

/// One watch over all its streams.
pub(crate) struct Subscription<M> {
    settings: Settings,
    call: Call<M>,
    record: Record,
    state: State<M>,
    /// Attempts in a row that failed.
    failures: u32,
}

enum State<M> {
    Waiting(Pin<Box<Sleep>>),
    Calling {
        response: BoxFuture<'static, Result<BoxStream<'static, Result<M, Status>>, Status>>,
        since: Instant,
    },
    Open {
        messages: BoxStream<'static, Result<M, Status>>,
        since: Instant,
        heard: Option<Instant>,
        end: Option<Instant>,
    },
}

impl<M: Send + 'static> Subscription<M> {
    /// Opens the first stream when the first event is asked for.
    pub(crate) fn new(mut settings: Settings, record: Record, mut call: Call<M>) -> Self {
        let shorten = |limit: &mut Option<Duration>, random: f64| {
            *limit = limit.map(|limit| limit.mul_f64(1.0 - LIMIT_JITTER * random));
        };
        shorten(&mut settings.limits.idle, (settings.random)());
        shorten(&mut settings.limits.lifetime, (settings.random)());
        let state = State::Calling { response: call(), since: Instant::now() };
        Self { settings, call, record, state, failures: 0 }
    }

    /// The look-up's entry in the status.
    pub(crate) fn record(&self) -> &Record {
        &self.record
    }

    /// The next event. May be abandoned and called again.
    pub(crate) async fn next(&mut self) -> Event<M> {
        loop {
            match &mut self.state {
                State::Waiting(sleep) => {
                    wait(sleep, &mut self.settings).await;
                    self.state = State::Calling { response: (self.call)(), since: Instant::now() };
                }
                State::Calling { response, since } => {
                    let since = *since;
                    let deadline = self.settings.limits.initial.map(|limit| since + limit);
                    match before(deadline, response.as_mut()).await {
                        Some(Ok(messages)) => {
                            let end = self.settings.limits.lifetime.map(|limit| since + limit);
                            self.state = State::Open { messages, since, heard: None, end };
                        }
                        Some(Err(status)) => return self.ended(status, false),
                        None => return self.ended(silent(&self.settings.limits), false),
                    }
                }
                State::Open { messages, since, heard, end } => {
                    let silence = match *heard {
                        None => self.settings.limits.initial.map(|limit| *since + limit),
                        Some(heard) => self.settings.limits.idle.map(|limit| heard + limit),
                    };
                    let deadline = [silence, *end].into_iter().flatten().min();
                    let worked = heard.is_some() && since.elapsed() >= MIN_LIFE;
                    match before(deadline, messages.next()).await {
                        Some(Some(Ok(message))) => {
                            let first = heard.replace(Instant::now()).is_none();
                            self.record.heard();
                            return Event::Message { first, message };
                        }
                        Some(Some(Err(status))) => return self.ended(status, worked),
                        Some(None) => return self.ended(Status::new(Code::Ok, "stream ended"), worked),
                        None if heard.is_none() => return self.ended(silent(&self.settings.limits), false),
                        None => return self.ended(Status::new(Code::Ok, "limit of the stream reached"), true),
                    }
                }
            }
        }
    }

    /// Prepares the next attempt. `worked`: the stream that ended had brought something, and lasted.
    fn ended(&mut self, status: Status, worked: bool) -> Event<M> {
        self.record.ended(describe(&status).into());
        if worked {
            self.failures = 0;
        } else {
            self.failures = self.failures.saturating_add(1);
        }
        let backoff = |step| self.settings.backoff.delay(step, (self.settings.random)());
        let delay = match (self.settings.resume, self.failures) {
            (Resume::AtOnce, 0 | 1) => Duration::ZERO,
            (Resume::AtOnce, failures) => backoff(failures - 2),
            (Resume::AfterBackoff, failures) => backoff(failures.saturating_sub(1)),
        };
        tracing::debug!(
            method = self.record.method(),
            target = self.record.target(),
            code = ?status.code(),
            message = status.message(),
            ?delay,
            "Control stream ended"
        );
        self.state = State::Waiting(Box::pin(time::sleep(delay)));
        Event::Ended(status)
    }
}

/// Waits for the backoff. A client that was not connected and now is ends the wait early.
async fn wait(sleep: &mut Pin<Box<Sleep>>, settings: &mut Settings) {
    if *settings.connected.borrow_and_update() {
        return sleep.await;
    }
    tokio::select! {
        () = sleep.as_mut() => return,
        gone = async { settings.connected.wait_for(|connected| *connected).await.is_err() } => if gone {
            // The client is gone, and calls will say so: the backoff alone paces them.
            return sleep.await;
        }
    }
    let soon = Instant::now() + RECOVERY_SPREAD.mul_f64((settings.random)());
    if soon < sleep.deadline() {
        sleep.as_mut().reset(soon);
    }
    sleep.await;
}

/// None when the deadline passed first.
async fn before<T>(deadline: Option<Instant>, future: impl Future<Output = T>) -> Option<T> {
    match deadline {
        Some(deadline) => time::timeout_at(deadline, future).await.ok(),
        None => Some(future.await),
    }
}

fn silent(limits: &Limits) -> Status {
    Status::deadline_exceeded(format!("no message within {:?}", limits.initial.unwrap_or_default()))
}

/// A status for people: `Unavailable: connection refused`.
pub(crate) fn describe(status: &Status) -> String {
    match (status.code(), status.message()) {
        (Code::Ok, message) => message.to_string(),
        (code, "") => format!("{code:?}"),
        (code, message) => format!("{code:?}: {message}"),
    }
}

/// Codes after which no watch is repeated (behaviour.md G.3).
pub(crate) fn is_final(code: Code) -> bool {
    matches!(code, Code::InvalidArgument | Code::FailedPrecondition)
}

/// A call that a client of `linkerd2-proxy-api` makes, as a [`Call`].
pub(crate) fn call<M, F>(mut call: impl FnMut() -> F + Send + 'static) -> Call<M>
where
    M: Send + 'static,
    F: Future<Output = Result<tonic::Response<tonic::Streaming<M>>, Status>> + Send + 'static,
{
    Box::new(move || {
        let response = call();
        Box::pin(async move { Ok(response.await?.into_inner().boxed()) })
    })
}

/// A number within 0..1, for [`Settings::random`].
pub(crate) fn random() -> f64 {
    rand::random()
}

/// A task that ends when this is dropped, unless it is let go.
pub(crate) struct AbortOnDrop(Option<tokio::task::AbortHandle>);

impl AbortOnDrop {
    pub(crate) fn new<T>(task: &tokio::task::JoinHandle<T>) -> Self {
        Self(Some(task.abort_handle()))
    }

    /// The task goes on.
    pub(crate) fn detach(mut self) {
        self.0 = None;
    }
}

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        if let Some(task) = self.0.take() {
            task.abort();
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::{super::record::Registry, *};
    use futures_util::stream;
    use parking_lot::Mutex;
    use std::{collections::VecDeque, sync::Arc};

    /// What a scripted server does with one call.
    pub(crate) enum Script {
        /// Refuses the call.
        Refuse(Code),
        /// Never answers.
        Hang,
        /// Messages, then the end.
        Say(Vec<u32>, End),
    }

    /// How a scripted stream ends.
    #[derive(Copy, Clone)]
    pub(crate) enum End {
        Clean,
        Error(Code),
        Never,
    }

    struct Harness {
        subscription: Subscription<u32>,
        calls: Arc<Mutex<Vec<Duration>>>,
        connected: watch::Sender<bool>,
        start: Instant,
    }

    fn harness(resume: Resume, limits: Limits, script: Vec<Script>) -> Harness {
        let calls = Arc::new(Mutex::new(Vec::new()));
        let mut script: VecDeque<_> = script.into();
        let start = Instant::now();
        let seen = calls.clone();
        let call: Call<u32> = Box::new(move || {
            seen.lock().push(start.elapsed());
            match script.pop_front() {
                Some(Script::Refuse(code)) => Box::pin(std::future::ready(Err(Status::new(code, "no")))),
                None | Some(Script::Hang) => Box::pin(std::future::pending()),
                Some(Script::Say(messages, end)) => {
                    let said = stream::iter(messages.into_iter().map(Ok));
                    let stream = match end {
                        End::Clean => said.boxed(),
                        End::Error(code) => said.chain(stream::iter([Err(Status::new(code, "broken"))])).boxed(),
                        End::Never => said.chain(stream::pending()).boxed(),
                    };
                    Box::pin(std::future::ready(Ok(stream)))
                }
            }
        });
        let (connected, rx) = watch::channel(true);
        let settings = Settings {
            limits,
            backoff: Backoff { min: Duration::from_millis(100), max: Duration::from_secs(60), jitter: 0.0 },
            resume,
            connected: rx,
            random: || 0.0,
        };
        let record = Arc::new(Registry::default()).record("Test", "t".into());
        Harness { subscription: Subscription::new(settings, record, call), calls, connected, start }
    }

    impl Harness {
        /// `3` or `3!` (first of its stream) for a message, else the code.
        async fn next(&mut self) -> String {
            match self.subscription.next().await {
                Event::Message { first, message } => format!("{message}{}", if first { "!" } else { "" }),
                Event::Ended(status) => format!("{:?}", status.code()),
            }
        }

        #[track_caller]
        fn check_calls(&self, expected_ms: &[u64]) {
            let expected: Vec<_> = expected_ms.iter().map(|ms| Duration::from_millis(*ms)).collect();
            // Timers have a granularity of 1 ms.
            let found: Vec<_> = self
                .calls
                .lock()
                .iter()
                .map(|t| Duration::from_millis(u64::try_from(t.as_millis()).unwrap()))
                .collect();
            let close = |(a, b): (&Duration, &Duration)| a.abs_diff(*b) <= Duration::from_millis(3);
            assert!(found.len() == expected.len() && found.iter().zip(&expected).all(close), "{found:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn failures_back_off_after_one_immediate_retry() {
        let refuse = || Script::Refuse(Code::Unavailable);
        let script = vec![refuse(), refuse(), refuse(), refuse(), Script::Say(vec![7], End::Never)];
        let mut h = harness(Resume::AtOnce, Limits::default(), script);
        for _ in 0..4 {
            assert_eq!(h.next().await, "Unavailable");
        }
        assert_eq!(h.next().await, "7!");
        h.check_calls(&[0, 0, 100, 300, 700]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_stream_that_worked_is_opened_again_at_once() {
        let limits = Limits { lifetime: Some(Duration::from_secs(5)), ..Limits::default() };
        let say = |n| Script::Say(vec![n, n], End::Never);
        let mut h = harness(Resume::AtOnce, limits, vec![say(1), say(2), say(3)]);
        for expected in ["1!", "1", "Ok", "2!", "2", "Ok", "3!"] {
            assert_eq!(h.next().await, expected);
        }
        h.check_calls(&[0, 5_000, 10_000]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_server_that_closes_at_once_is_not_asked_in_a_tight_loop() {
        let script = (0..4).map(|_| Script::Say(vec![1], End::Clean)).collect();
        let mut h = harness(Resume::AtOnce, Limits::default(), script);
        for expected in ["1!", "Ok", "1!", "Ok", "1!", "Ok", "1!"] {
            assert_eq!(h.next().await, expected);
        }
        h.check_calls(&[0, 0, 100, 300]);
    }

    #[tokio::test(start_paused = true)]
    async fn endpoints_always_wait() {
        let limits = Limits { idle: Some(Duration::from_secs(2)), ..Limits::default() };
        let script = vec![
            Script::Say(vec![1], End::Never),
            Script::Refuse(Code::NotFound),
            Script::Refuse(Code::NotFound),
            Script::Say(vec![2], End::Error(Code::Unavailable)),
        ];
        let mut h = harness(Resume::AfterBackoff, limits, script);
        for expected in ["1!", "Ok", "NotFound", "NotFound", "2!", "Unavailable"] {
            assert_eq!(h.next().await, expected);
        }
        h.check_calls(&[0, 2_100, 2_200, 2_400]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_server_runs_into_the_initial_limit() {
        let limits = Limits { initial: Some(Duration::from_secs(3)), ..Limits::default() };
        let script = vec![Script::Hang, Script::Say(vec![], End::Never), Script::Say(vec![4], End::Never)];
        let mut h = harness(Resume::AtOnce, limits, script);
        assert_eq!(h.next().await, "DeadlineExceeded");
        assert_eq!(h.next().await, "DeadlineExceeded");
        assert_eq!(h.next().await, "4!");
        h.check_calls(&[0, 3_000, 6_100]);
        // Once something was said, the initial limit is over.
        assert!(time::timeout(Duration::from_secs(3600), h.subscription.next()).await.is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn an_idle_stream_is_opened_anew() {
        let limits = Limits { idle: Some(Duration::from_secs(300)), ..Limits::default() };
        let script = vec![Script::Say(vec![1], End::Never), Script::Say(vec![2], End::Never)];
        let mut h = harness(Resume::AtOnce, limits, script);
        for expected in ["1!", "Ok", "2!"] {
            assert_eq!(h.next().await, expected);
        }
        h.check_calls(&[0, 300_000]);
    }

    #[tokio::test(start_paused = true)]
    async fn abandoned_calls_lose_nothing() {
        let script = vec![
            Script::Refuse(Code::Unavailable),
            Script::Refuse(Code::Unavailable),
            Script::Say(vec![9], End::Never),
        ];
        let mut h = harness(Resume::AtOnce, Limits::default(), script);
        let mut seen = Vec::new();
        for _ in 0..40 {
            if let Ok(event) = time::timeout(Duration::from_millis(10), h.next()).await {
                seen.push(event);
            }
        }
        assert_eq!(seen, ["Unavailable", "Unavailable", "9!"]);
        h.check_calls(&[0, 0, 100]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_new_connection_ends_a_long_wait() {
        let refuse = || Script::Refuse(Code::Unavailable);
        let mut script: Vec<_> = (0..12).map(|_| refuse()).collect();
        script.push(Script::Say(vec![1], End::Never));
        let mut h = harness(Resume::AtOnce, Limits::default(), script);
        h.connected.send_replace(false);
        for _ in 0..12 {
            h.next().await;
        }
        let before = h.start.elapsed();
        let connected = h.connected.clone();
        tokio::spawn(async move {
            time::sleep(Duration::from_secs(2)).await;
            connected.send_replace(true);
        });
        assert_eq!(h.next().await, "1!");
        // The backoff alone would have been a minute.
        assert!(h.start.elapsed() - before < Duration::from_secs(3));
    }

    #[test]
    fn final_codes() {
        assert!(is_final(Code::InvalidArgument) && is_final(Code::FailedPrecondition));
        assert!(!is_final(Code::NotFound) && !is_final(Code::Ok) && !is_final(Code::Unknown));
    }
}
