//! Who speaks first. While a client is silent and its policy lets it connect opaquely, the application is dialled; if
//! that speaks first, nobody needs to wait for the client any more.
//!
//! HTTP servers may speak first too: HTTP/2 servers send SETTINGS at once, HTTP/1 servers send 408 to idle connections.
//! What looks like either is no reason to stop waiting, or a slow client would evade the policy for HTTP.

use crate::error::Error;
use bytes::BytesMut;
use linkerd_stack::{Io, PrefixedIo};
use std::{
    future::{Future, pending},
    pin::pin,
    time::Duration,
};
use tokio::{
    io::AsyncReadExt,
    select,
    time::{self, Instant},
};

/// Silence before the application is dialled: clients that speak promptly cost it no extra connection.
pub(super) const DIAL_AFTER: Duration = Duration::from_millis(20);

/// Silence after which a connection that has sent nothing is taken for one without TLS, once the application has
/// spoken. A ClientHello that was lost once is sent again within this time (RTO, at least 200 ms on Linux).
pub(super) const PLAIN_AFTER: Duration = Duration::from_millis(250);

/// Wait for more when the application's first bytes are too few to be judged. Frames and status lines are written in
/// one piece.
const SETTLE: Duration = Duration::from_millis(100);

/// Bytes of the application's speech that are read before the client is connected to it.
const SPEECH: usize = 1024;

/// How a wait for first bytes ended.
#[derive(Debug)]
pub(super) enum First<T, I> {
    /// The client spoke (or left).
    Client(T),
    /// The application spoke, and not HTTP. What it said is replayed.
    App(PrefixedIo<I>),
    /// Nobody spoke.
    Timeout,
}

/// Waits for the client, for at most `timeout`. With `dial`, also for the application, which cannot win before
/// `not_before` has passed. `dial` gives the connection and what is held while it is undecided. Dropping the future closes
/// the connection to the application.
pub(super) async fn first<T, I: Io, G>(
    client: impl Future<Output = T>,
    dial: Option<impl Future<Output = Result<(I, G), Error>>>,
    not_before: Duration,
    timeout: Duration,
) -> First<T, I> {
    let start = Instant::now();
    let app = pin!(async {
        match dial {
            Some(dial) => listen(dial, start + not_before).await,
            None => pending().await,
        }
    });
    select! {
        biased;
        client = client => First::Client(client),
        app = app => First::App(app),
        () = time::sleep_until(start + timeout) => First::Timeout,
    }
}

/// Ends when the application has said something that is not HTTP.
async fn listen<I: Io, G>(dial: impl Future<Output = Result<(I, G), Error>>, not_before: Instant) -> PrefixedIo<I> {
    time::sleep(DIAL_AFTER).await;
    let Ok((mut io, held)) = dial.await else {
        return pending().await;
    };
    let mut speech = BytesMut::with_capacity(SPEECH);
    loop {
        let silent = speech.is_empty();
        let mut rest = (&mut io).take((SPEECH - speech.len()) as u64);
        let read = rest.read_buf(&mut speech);
        let read = if silent { read.await } else { time::timeout(SETTLE, read).await.unwrap_or(Ok(0)) };
        match read {
            Ok(0) if silent => break,
            Ok(0) => {
                time::sleep_until(not_before).await;
                return PrefixedIo::new(speech.freeze(), io);
            }
            Err(_) => break,
            Ok(_) => {}
        }
        match judge(&speech) {
            Speech::Http => break,
            Speech::Opaque => {
                time::sleep_until(not_before).await;
                return PrefixedIo::new(speech.freeze(), io);
            }
            Speech::TooShort => {}
        }
    }
    drop((io, held));
    pending().await
}

#[derive(Copy, Clone, Debug, PartialEq, Eq)]
enum Speech {
    Http,
    Opaque,
    TooShort,
}

/// Whether first bytes are those of an HTTP server: a status line (RFC 9112 section 4), or a SETTINGS frame on stream 0
/// that is no acknowledgement (RFC 9113 sections 4.1, 6.5).
fn judge(bytes: &[u8]) -> Speech {
    const STATUS: &[u8] = b"HTTP/";
    let status = STATUS.iter().zip(bytes).all(|(a, b)| a == b);
    // Length (any), type, flags, stream.
    let settings = [4, 0, 0, 0, 0, 0].iter().zip(bytes.iter().skip(3)).all(|(a, b)| a == b);
    match (status, settings) {
        (true, _) if bytes.len() >= STATUS.len() => Speech::Http,
        (_, true) if bytes.len() >= 9 => Speech::Http,
        (false, false) => Speech::Opaque,
        _ => Speech::TooShort,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Cause;
    use tokio::io::{AsyncWriteExt, DuplexStream};

    const LIMIT: Duration = Duration::from_secs(10);

    #[test]
    fn http_servers_are_known_by_their_first_bytes() {
        for (bytes, expected) in [
            (&b"HTTP/1.1 408 Request Timeout\r\n"[..], Speech::Http),
            (b"HTT", Speech::TooShort),
            (b"\0\0\x12\x04\0\0\0\0\0\0\x03", Speech::Http),
            (b"\0\0\x12\x04\0\0\0", Speech::TooShort),
            (b"\0\0\x12\x04\x01\0\0\0\0", Speech::Opaque),
            (b"220 mail ESMTP\r\n", Speech::Opaque),
            (b"J\0\0\0\x0a8.0.36\0", Speech::Opaque),
            (b"SSH-2.0-OpenSSH_9.9\r\n", Speech::Opaque),
        ] {
            assert_eq!(judge(bytes), expected, "{bytes:?}");
        }
    }

    /// Runs a wait with an application that says something after a time, and a silent client.
    async fn wait(
        says: Option<&'static [u8]>,
        after: Duration,
        not_before: Duration,
    ) -> (First<(), DuplexStream>, Duration) {
        let (mut app, io) = tokio::io::duplex(64);
        let talk = async move {
            time::sleep(after).await;
            if let Some(words) = says {
                app.write_all(words).await.unwrap();
            }
            pending::<()>().await;
        };
        let start = Instant::now();
        let dial = async { Ok((io, ())) };
        select! {
            () = talk => unreachable!(),
            first = first(pending(), Some(dial), not_before, LIMIT) => (first, start.elapsed()),
        }
    }

    #[tokio::test(start_paused = true)]
    async fn an_application_that_speaks_first_is_heard() {
        let ms = Duration::from_millis;
        let (First::App(io), at) = wait(Some(b"220 hi\r\n"), ms(30), Duration::ZERO).await else { panic!() };
        assert_eq!((io.prefix(), at), (&b"220 hi\r\n"[..], ms(30)));
        let (First::App(_), at) = wait(Some(b"220 hi\r\n"), ms(30), PLAIN_AFTER).await else { panic!() };
        assert_eq!(at, PLAIN_AFTER);
        // Too short to be judged, but nothing more comes.
        let (First::App(io), at) = wait(Some(b"H"), ms(30), Duration::ZERO).await else { panic!() };
        assert_eq!((io.prefix(), at), (&b"H"[..], ms(130)));
    }

    #[tokio::test(start_paused = true)]
    async fn http_servers_and_silence_do_not_end_the_wait() {
        for says in [None, Some(&b"HTTP/1.1 408 Request Timeout\r\n\r\n"[..]), Some(b"\0\0\0\x04\0\0\0\0\0")] {
            let (first, at) = wait(says, Duration::from_millis(30), Duration::ZERO).await;
            assert!(matches!(first, First::Timeout), "{says:?}");
            assert_eq!(at, LIMIT);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_prompt_client_costs_no_connection() {
        let client = async {
            time::sleep(DIAL_AFTER / 2).await;
            7
        };
        let dial = async { panic!("dialled") as Result<(DuplexStream, ()), Error> };
        let First::Client(7) = first(client, Some(dial), Duration::ZERO, LIMIT).await else { panic!() };
    }

    #[tokio::test(start_paused = true)]
    async fn an_application_that_cannot_be_reached_is_no_answer() {
        let dial = async { Err::<(DuplexStream, ()), _>(Cause::FailFast(crate::error::Lack::Connection).into()) };
        let waited = first(pending::<()>(), Some(dial), Duration::ZERO, LIMIT).await;
        assert!(matches!(waited, First::Timeout));
    }
}
