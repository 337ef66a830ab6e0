//! A bounded look at a client's first bytes, to tell HTTP/1 and HTTP/2 from everything else (behaviour.md A.4).
//!
//! It refuses to guess from little: while so few bytes have come that they could still become HTTP, it reads on, up
//! to the timeout. Bytes that can't are decided at once. Nothing read is lost, whatever the outcome: it stays in the
//! caller's buffer.

use bytes::BytesMut;
use std::{
    future::poll_fn,
    io,
    mem::MaybeUninit,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};
use tokio::{
    io::{AsyncRead, ReadBuf},
    time::{Instant, timeout_at},
};

/// Most bytes that are read to decide (behaviour.md A.4).
pub const MAX_PEEK: usize = 1024;

/// Bytes from which the outcome is always final: the length of the HTTP/2 preface's first line without its end, and
/// less than any complete HTTP/1 request line.
pub const ENOUGH: usize = H2_PREFACE.len();

const H2_PREFACE: &[u8] = b"PRI * HTTP/2.0";

/// Methods whose beginning is worth waiting for, with the space that follows. The registered ones in common use (IANA
/// HTTP Method Registry); a client that sends another one in pieces of less than [`ENOUGH`] bytes is taken as opaque.
const METHODS: [&[u8]; 21] = [
    b"GET ",
    b"HEAD ",
    b"POST ",
    b"PUT ",
    b"DELETE ",
    b"CONNECT ",
    b"OPTIONS ",
    b"TRACE ",
    b"PATCH ",
    b"QUERY ",
    b"PROPFIND ",
    b"PROPPATCH ",
    b"MKCOL ",
    b"COPY ",
    b"MOVE ",
    b"LOCK ",
    b"UNLOCK ",
    b"REPORT ",
    b"SEARCH ",
    b"LINK ",
    b"UNLINK ",
];

/// What the client speaks.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Detected {
    /// HTTP/1.0 or HTTP/1.1.
    H1,
    /// HTTP/2 with prior knowledge.
    H2,
    /// Something else.
    NotHttp,
}

/// Why there is nothing to tell.
#[derive(Debug, thiserror::Error)]
pub enum DetectError {
    /// The client closed before it sent a byte.
    #[error("the client closed the connection before it sent anything")]
    Closed,
    /// The client sent nothing within the time.
    #[error("the client sent nothing within {0:?}")]
    Timeout(Duration),
    /// The connection failed.
    #[error("reading the client's first bytes failed")]
    Io(#[from] io::Error),
}

/// Tells HTTP from other protocols, by what `buf` holds already and what comes within `timeout`.
///
/// All that was read is in `buf` afterwards, also after an error, and also when the future was dropped: a caller that
/// learns something better while the client is silent loses nothing. A client that stops in the middle of what may be
/// HTTP is not HTTP. While it waits it holds no buffer of its own.
///
/// # Errors
/// Only if nothing at all was read.
pub async fn http<I>(io: &mut I, timeout: Duration, buf: &mut BytesMut) -> Result<Detected, DetectError>
where
    I: AsyncRead + Unpin,
{
    // `Instant + Duration::MAX` would panic; a timeout beyond a year is none.
    let deadline = Instant::now() + timeout.min(Duration::from_secs(365 * 24 * 3600));
    loop {
        if let Some(detected) = classify(buf) {
            return Ok(detected);
        }
        match timeout_at(deadline, poll_fn(|cx| poll_read_some(io, cx, buf))).await {
            Ok(Ok(n)) if n > 0 => {}
            _ if !buf.is_empty() => return Ok(Detected::NotHttp),
            Ok(Ok(_)) => return Err(DetectError::Closed),
            Ok(Err(error)) => return Err(DetectError::Io(error)),
            Err(_) => return Err(DetectError::Timeout(timeout)),
        }
    }
}

/// What the first bytes of a connection say; none while they are too few.
///
/// A request line with mistakes that some server might overlook is HTTP, so that it is refused as such: whoever writes
/// two blanks for one must not get an opaque connection, and with it a way around the routes.
pub fn classify(bytes: &[u8]) -> Option<Detected> {
    if bytes.starts_with(H2_PREFACE) {
        return Some(Detected::H2);
    }
    let sloppy = sloppy_http1(bytes);
    if sloppy == Some(true) || (bytes.len() >= ENOUGH && is_http1(bytes)) {
        return Some(Detected::H1);
    }
    let undecided = sloppy.is_none() || may_become_http(bytes);
    if bytes.len() < ENOUGH && undecided || bytes.len() < MAX_PEEK && sloppy.is_none() {
        return None;
    }
    Some(Detected::NotHttp)
}

fn may_become_http(bytes: &[u8]) -> bool {
    let begins_method = |method: &&[u8]| bytes.starts_with(method) || method.starts_with(bytes);
    H2_PREFACE.starts_with(bytes) || (METHODS.iter().any(begins_method) && is_http1(bytes))
}

/// Whether bytes begin with a method and an HTTP target (a path or an absolute URI), however they are set apart; none
/// while more bytes might tell. Empty lines before it don't count (RFC 9112 section 2.2). No other protocol in common
/// use begins like that.
fn sloppy_http1(bytes: &[u8]) -> Option<bool> {
    let start = bytes.iter().position(|b| !matches!(b, b'\r' | b'\n'))?;
    let bytes = &bytes[start..];
    let is_blank = |b: &u8| matches!(b, b' ' | b'\t' | 0x0b | 0x0c);
    let name = bytes.iter().position(is_blank).unwrap_or(bytes.len());
    if !METHODS.iter().any(|method| match name == bytes.len() {
        true => method.starts_with(&bytes[..name]),
        false => method.trim_ascii_end() == &bytes[..name],
    }) {
        return Some(false);
    }
    let target = name + bytes[name..].iter().position(|b| !is_blank(b))?;
    let target = &bytes[target..];
    const URIS: [&[u8]; 3] = [b"/", b"http://", b"https://"];
    let longer = URIS.iter().any(|uri| target.len() < uri.len() && uri[..target.len()].eq_ignore_ascii_case(target));
    let begins = |uri: &&[u8]| target.get(..uri.len()).is_some_and(|begin| begin.eq_ignore_ascii_case(uri));
    match URIS.iter().any(begins) {
        true => Some(true),
        false if longer => None,
        false => Some(false),
    }
}

/// Whether nothing in the bytes contradicts an HTTP/1 request. Without room for headers the parser stops after the
/// request line, which is all that is asked.
fn is_http1(bytes: &[u8]) -> bool {
    match httparse::Request::new(&mut []).parse(bytes) {
        Ok(_) | Err(httparse::Error::TooManyHeaders) => true,
        Err(_) => false,
    }
}

/// Reads once, through the stack, so that a silent connection holds no buffer.
fn poll_read_some<I>(io: &mut I, cx: &mut Context<'_>, into: &mut BytesMut) -> Poll<io::Result<usize>>
where
    I: AsyncRead + Unpin,
{
    let mut space = [MaybeUninit::uninit(); MAX_PEEK];
    let mut buf = ReadBuf::uninit(&mut space);
    ready!(Pin::new(io).poll_read(cx, &mut buf))?;
    into.extend_from_slice(buf.filled());
    Poll::Ready(Ok(buf.filled().len()))
}

#[cfg(test)]
mod tests {
    use super::{Detected::*, *};
    use futures_util::FutureExt;
    use tokio::io::AsyncWriteExt;

    const TIMEOUT: Duration = Duration::from_secs(10);

    #[track_caller]
    fn check(bytes: &[u8], expected: impl Into<Option<Detected>>) {
        assert_eq!(classify(bytes), expected.into(), "{:?}", String::from_utf8_lossy(bytes));
    }

    #[test]
    fn complete_beginnings() {
        check(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", H1);
        check(b"GET / HTTP/1.0\r\n\r\n", H1);
        check(b"PROPFIND /a/long/path/that/goes/on", H1);
        check(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", H2);
        check(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03abcdefgh", NotHttp);
        check(b"SET key value of redis\r\n", NotHttp);
        check(b"GET http-like-key-of-redis\r\n", NotHttp);
    }

    #[test]
    fn few_bytes_wait_only_if_they_may_become_http() {
        check(b"", None);
        check(b"G", None);
        check(b"GET ", None);
        check(b"GET  ", None);
        check(b"\r\nGE", None);
        check(b"PRI * HT", None);
        check(b"P", None);
        check(b"PRI x", NotHttp);
        check(b"PING\r\n", NotHttp);
        check(b"GET k\r\n", NotHttp);
        check(b"hello", NotHttp);
        check(b"\x00\x01", NotHttp);
        check(b"GET \x00", NotHttp);
    }

    #[test]
    fn sloppy_requests_are_http_that_will_be_refused() {
        for bytes in [
            &b"GET /"[..],
            b"GET / HTTP/3.9\r\n\r\n",
            b"GET  / HTTP/1.1\r\n",
            b"GET\t/ HTTP/1.1\r\n",
            b"GET /a b HTTP/1.1\r\n",
            b"GET /\r\n",
            b"\r\n\n\r\nPOST \t HTTP://a",
        ] {
            check(bytes, H1);
        }
        check(&[&b"GET"[..], &[b' '; 500]].concat(), None);
        check(&[&b"GET"[..], &[b' '; MAX_PEEK]].concat(), NotHttp);
        check(b"GET ttp://a b\r\n", NotHttp);
        check(b"get /", NotHttp);
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_dribbles_is_not_misjudged() {
        let (mut far, mut near) = tokio::io::duplex(64);
        let mut buf = BytesMut::new();
        for piece in [&b"G"[..], b"ET ", b" ", b"\t"] {
            far.write_all(piece).await.unwrap();
            assert!(http(&mut near, TIMEOUT, &mut buf).now_or_never().is_none());
        }
        far.write_all(b"/ HTTP/1.1\r\n").await.unwrap();
        assert_eq!(http(&mut near, TIMEOUT, &mut buf).await.unwrap(), H1);
        assert_eq!(&buf[..], b"GET  \t/ HTTP/1.1\r\n");
    }

    #[tokio::test(start_paused = true)]
    async fn silence_closing_and_stopping_halfway() {
        let (mut far, mut near) = tokio::io::duplex(64);
        let mut buf = BytesMut::new();
        assert!(matches!(http(&mut near, TIMEOUT, &mut buf).await, Err(DetectError::Timeout(TIMEOUT))));
        far.write_all(b"GET ").await.unwrap();
        assert_eq!(http(&mut near, TIMEOUT, &mut buf).await.unwrap(), NotHttp);
        assert_eq!(&buf[..], b"GET ", "it is replayed");
        buf.clear();
        drop(far);
        assert!(matches!(http(&mut near, Duration::MAX, &mut buf).await, Err(DetectError::Closed)));
    }

    #[tokio::test]
    async fn bytes_read_before_are_judged_first() {
        let (_far, mut near) = tokio::io::duplex(64);
        let mut buf = BytesMut::from(&b"PRI * HTTP/2.0\r\n"[..]);
        assert_eq!(http(&mut near, TIMEOUT, &mut buf).now_or_never().unwrap().unwrap(), H2);
    }
}
