//! A look at the first bytes of a connection: is it TLS, and which server name does its ClientHello ask for
//! (behaviour.md A.3)? The look decides as soon as the name's own bytes are there, never waits for bytes that cannot
//! change the answer, and never reads more than it must.

use crate::ServerName;
use bytes::{Bytes, BytesMut};
use std::io;
use tokio::{
    io::{AsyncRead, AsyncReadExt},
    net::TcpStream,
};

/// Bytes that the first look leaves in the socket. Hellos without post-quantum key shares fit.
pub const PEEK: usize = 512;

/// Most bytes that are read before the connection counts as not TLS; also the longest record taken for a ClientHello.
pub const MAX_HELLO: usize = 8192;

/// What the first bytes are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Sni {
    /// May become a ClientHello; more bytes are needed.
    Incomplete,
    /// Not a ClientHello, or one whose server name is no DNS name.
    NotTls,
    /// A ClientHello that names no server.
    NoName,
    /// The server's name, lower case, without a trailing dot.
    Name(String),
}

/// Looks at a connection: once without taking bytes, then by reading. Returns what it is, never `Incomplete`, and the
/// bytes that were taken, to be replayed before the rest. Dropping the future loses those bytes. The caller bounds the
/// time.
///
/// # Errors
/// When the connection breaks. Its end is not an error: what was read is then not TLS.
pub async fn client_hello(io: &mut TcpStream) -> io::Result<(Sni, Bytes)> {
    let peeked = {
        let mut peek = vec![0; PEEK];
        let n = io.peek(&mut peek).await?;
        sni(&peek[..n])
    };
    match peeked {
        Sni::Incomplete => read(io).await,
        decided => Ok((decided, Bytes::new())),
    }
}

/// Reads until it is decided what a connection is; as [`client_hello`] otherwise.
///
/// # Errors
/// When the connection breaks.
pub async fn read<I: AsyncRead + Unpin>(io: &mut I) -> io::Result<(Sni, Bytes)> {
    let mut buf = BytesMut::with_capacity(2048);
    loop {
        let left = MAX_HELLO - buf.len();
        let end = (&mut *io).take(left as u64).read_buf(&mut buf).await? == 0;
        match sni(&buf) {
            Sni::Incomplete if end || buf.len() >= MAX_HELLO => return Ok((Sni::NotTls, buf.freeze())),
            Sni::Incomplete => {}
            decided => return Ok((decided, buf.freeze())),
        }
    }
}

/// What these first bytes of a connection are. A ClientHello spread over several records is not recognized: none of the
/// mesh's peers does that.
pub fn sni(bytes: &[u8]) -> Sni {
    match parse(bytes) {
        Ok(sni) => sni,
        Err(Stop::Incomplete) => Sni::Incomplete,
        Err(Stop::Malformed) => Sni::NotTls,
    }
}

enum Stop {
    Incomplete,
    Malformed,
}

const HANDSHAKE: u8 = 22;
const CLIENT_HELLO: u8 = 1;
const SERVER_NAME: u16 = 0;
const HOST_NAME: u8 = 0;

fn parse(bytes: &[u8]) -> Result<Sni, Stop> {
    let mut stream = Reader { bytes, len: usize::MAX };
    stream.expect(|record| record == HANDSHAKE)?;
    stream.expect(|major| major == 3)?;
    stream.expect(|minor| minor == 1 || minor == 3)?;
    let len = stream.u16()?.into();
    if len > MAX_HELLO {
        return Err(Stop::Malformed);
    }
    let mut record = stream.part(len)?;
    record.expect(|message| message == CLIENT_HELLO)?;
    record.expect(|length_above_16_bits| length_above_16_bits == 0)?;
    let len = record.u16()?.into();
    let mut hello = record.part(len)?;
    hello.expect(|major| major == 3)?;
    hello.expect(|minor| minor == 3)?;
    let _random = hello.part(32)?;
    let _session_id = hello.vector8()?;
    let _cipher_suites = hello.vector16()?;
    let _compression = hello.vector8()?;
    if hello.is_empty() {
        return Ok(Sni::NoName);
    }
    let mut extensions = hello.vector16()?;
    while !extensions.is_empty() {
        let kind = extensions.u16()?;
        let mut extension = extensions.vector16()?;
        if kind == SERVER_NAME {
            return server_name(extension.vector16()?);
        }
    }
    Ok(Sni::NoName)
}

fn server_name(mut names: Reader<'_>) -> Result<Sni, Stop> {
    while !names.is_empty() {
        let kind = names.u8()?;
        let name = names.vector16()?;
        if kind == HOST_NAME {
            let name = std::str::from_utf8(name.whole()?).map_err(|_| Stop::Malformed)?;
            let name: ServerName = name.parse().map_err(|_| Stop::Malformed)?;
            return Ok(Sni::Name(name.as_str().to_owned()));
        }
    }
    Err(Stop::Malformed)
}

/// A field of declared length, of which perhaps only the beginning has arrived.
struct Reader<'a> {
    /// What has arrived; never more than `len`.
    bytes: &'a [u8],
    /// What the sender declared to be left.
    len: usize,
}

impl<'a> Reader<'a> {
    fn is_empty(&self) -> bool {
        self.len == 0
    }

    fn u8(&mut self) -> Result<u8, Stop> {
        if self.len == 0 {
            return Err(Stop::Malformed);
        }
        let (&first, rest) = self.bytes.split_first().ok_or(Stop::Incomplete)?;
        self.bytes = rest;
        self.len -= 1;
        Ok(first)
    }

    fn u16(&mut self) -> Result<u16, Stop> {
        Ok(u16::from_be_bytes([self.u8()?, self.u8()?]))
    }

    fn expect(&mut self, good: impl Fn(u8) -> bool) -> Result<(), Stop> {
        if good(self.u8()?) { Ok(()) } else { Err(Stop::Malformed) }
    }

    /// The next `len` bytes as a field of their own, arrived or not.
    fn part(&mut self, len: usize) -> Result<Reader<'a>, Stop> {
        if len > self.len {
            return Err(Stop::Malformed);
        }
        let (part, rest) = self.bytes.split_at(len.min(self.bytes.len()));
        self.bytes = rest;
        self.len -= len;
        Ok(Reader { bytes: part, len })
    }

    fn vector8(&mut self) -> Result<Reader<'a>, Stop> {
        let len = self.u8()?.into();
        self.part(len)
    }

    fn vector16(&mut self) -> Result<Reader<'a>, Stop> {
        let len = self.u16()?.into();
        self.part(len)
    }

    fn whole(self) -> Result<&'a [u8], Stop> {
        if self.bytes.len() == self.len { Ok(self.bytes) } else { Err(Stop::Incomplete) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::AsyncWriteExt;

    fn vector8(body: &[u8]) -> Vec<u8> {
        [&[body.len() as u8], body].concat()
    }

    fn vector16(body: &[u8]) -> Vec<u8> {
        [&(body.len() as u16).to_be_bytes(), body].concat()
    }

    fn extension(kind: u16, body: &[u8]) -> Vec<u8> {
        [&kind.to_be_bytes()[..], &vector16(body)].concat()
    }

    fn name(kind: u8, name: &[u8]) -> Vec<u8> {
        [&[kind][..], &vector16(name)].concat()
    }

    fn record(extensions: Option<&[u8]>) -> Vec<u8> {
        let extensions = extensions.map(vector16).unwrap_or_default();
        let hello =
            [&[3, 3][..], &[7; 32], &vector8(&[9; 32]), &vector16(&[0x13, 1]), &vector8(&[0]), &extensions].concat();
        let handshake = [&[1, 0][..], &vector16(&hello)].concat();
        [&[22, 3, 1][..], &vector16(&handshake)].concat()
    }

    /// A hello with something before the name and a big key share behind it.
    fn hello(host: &str) -> Vec<u8> {
        let sni = extension(0, &vector16(&name(0, host.as_bytes())));
        record(Some(&[extension(43, &[2, 3, 4]), sni, extension(51, &[1; 1300])].concat()))
    }

    #[track_caller]
    fn check(bytes: &[u8], expected: Sni) {
        assert_eq!(sni(bytes), expected);
    }

    fn named(name: &str) -> Sni {
        Sni::Name(name.into())
    }

    #[test]
    fn names_are_found_and_folded() {
        check(&hello("Web.shop.svc."), named("web.shop.svc"));
        check(&hello("a_b.c"), named("a_b.c"));
        let second = [name(7, b"x"), name(0, b"second.example")].concat();
        check(&record(Some(&extension(0, &vector16(&second)))), named("second.example"));
    }

    #[test]
    fn hellos_without_a_name() {
        check(&record(None), Sni::NoName);
        check(&record(Some(&[])), Sni::NoName);
        check(&record(Some(&extension(43, &[2, 3, 4]))), Sni::NoName);
    }

    #[test]
    fn bytes_that_are_no_hello() {
        for bytes in [
            &b"GET / HTTP/1.1\r\n"[..],
            b"P",
            &[22, 2],
            &[22, 3, 2],
            &[22, 3, 1, 0x20, 1],
            &[22, 3, 1, 0, 4, 2],
            &[22, 3, 1, 0, 0],
            &[22, 3, 1, 0, 8, 1, 1],
            &[22, 3, 1, 0, 8, 1, 0, 0, 5],
        ] {
            check(bytes, Sni::NotTls);
        }
        for bad in ["", "10.0.0.1", "a b", "-x"] {
            check(&hello(bad), Sni::NotTls);
        }
        check(&record(Some(&extension(0, &vector16(&name(0, &[0xff, 0xfe]))))), Sni::NotTls);
        check(&record(Some(&extension(0, &vector16(&[])))), Sni::NotTls);
        check(&record(Some(&extension(0, &[0, 200, 0]))), Sni::NotTls);
        check(&record(Some(&[0, 0, 0, 9])), Sni::NotTls);
    }

    #[test]
    fn every_truncation_is_incomplete_until_the_name_is_there() {
        let whole = hello("web.shop");
        let end = whole.windows(8).position(|w| w == b"web.shop").unwrap() + 8;
        for n in 0..end {
            check(&whole[..n], Sni::Incomplete);
        }
        for n in end..=whole.len() {
            check(&whole[..n], named("web.shop"));
        }
    }

    /// No byte at any place makes the parser panic or go beyond its bounds.
    #[test]
    fn damaged_hellos_do_no_harm() {
        let whole = hello("web.shop");
        for at in 0..130 {
            for byte in [0, 1, 2, 0x7f, 0xff] {
                let mut damaged = whole.clone();
                damaged[at] = byte;
                for n in [damaged.len(), at + 1, at + 7] {
                    sni(&damaged[..n]);
                }
            }
        }
    }

    #[tokio::test]
    async fn reading_stops_at_a_decision_at_the_end_and_at_the_bound() {
        let whole = hello("web.shop");
        let (mut tx, mut rx) = tokio::io::duplex(16);
        let sent = whole.clone();
        tokio::spawn(async move { tx.write_all(&sent).await });
        let (sni, bytes) = read(&mut rx).await.unwrap();
        assert_eq!(sni, named("web.shop"));
        assert!(bytes.len() < 200 && whole.starts_with(&bytes), "{}", bytes.len());

        assert_eq!(read(&mut &whole[..40]).await.unwrap(), (Sni::NotTls, Bytes::copy_from_slice(&whole[..40])));
        assert_eq!(read(&mut &[][..]).await.unwrap(), (Sni::NotTls, Bytes::new()));
        // The longest record that is taken, with its own header, exceeds the bound by five bytes.
        let long = record(Some(&[extension(51, &[1; 8105]), extension(43, &[])].concat()));
        let (sni, bytes) = read(&mut &long[..]).await.unwrap();
        assert_eq!((sni, bytes.len()), (Sni::NotTls, MAX_HELLO));
    }

    #[tokio::test]
    async fn short_hellos_stay_in_the_socket() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (mut server, _) = listener.accept().await.unwrap();
        client.write_all(&hello("web.shop")).await.unwrap();
        let (sni, taken) = client_hello(&mut server).await.unwrap();
        assert_eq!((sni, taken.len()), (named("web.shop"), 0));
        let mut first = [0; 3];
        server.read_exact(&mut first).await.unwrap();
        assert_eq!(first, [22, 3, 1]);
    }
}
