//! The transport header: what a meshed client says on a connection to a proxy's own port before any application byte
//! (behaviour.md A.5). Framing: the preface, a 32-bit big-endian length, a protobuf message.

use bytes::{BufMut, Bytes, BytesMut};
use linkerd_tls::ServerName;
use prost::Message;
use std::{io, time::Duration};
use tokio::{
    io::{AsyncRead, AsyncReadExt},
    time,
};

/// The first bytes of every header.
pub const PREFACE: &[u8; 23] = b"transport.l5d.io/v1\r\n\r\n";

/// Longest message accepted, bytes (behaviour.md A.5: about 64 KiB). The fields of real ones stay below 300.
const MAX_MESSAGE: usize = 64 * 1024;

/// Bytes before the message.
const FRAME: usize = PREFACE.len() + 4;

/// Where the connection is to go, and how it is spoken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TransportHeader {
    /// Target port, never 0.
    pub port: u16,
    /// Target name, for gateways: lower case, without a trailing dot.
    pub name: Option<String>,
    /// Framing of what follows; none = opaque.
    pub session: Option<Session>,
}

/// An HTTP version that a header declares.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Hash)]
pub enum Session {
    /// HTTP/1.
    Http1,
    /// HTTP/2.
    Http2,
}

/// Why there is no header.
#[derive(Debug, thiserror::Error)]
pub enum HeaderError {
    /// Other bytes than the preface.
    #[error("the connection does not begin with a transport header")]
    Preface,
    /// The message is longer than any real one.
    #[error("transport header of {0} bytes; at most {MAX_MESSAGE} are taken")]
    TooLong(usize),
    /// The message is no protobuf of the expected shape.
    #[error("transport header cannot be decoded: {0}")]
    Decode(#[from] prost::DecodeError),
    /// The port is not one.
    #[error("transport header names port {0}; a port is 1 to 65535")]
    Port(i32),
    /// The name is not one.
    #[error("transport header: {0}")]
    Name(#[from] linkerd_tls::InvalidName),
    /// Not complete in time.
    #[error("no complete transport header within {0:?}")]
    Timeout(Duration),
    /// The connection failed or ended early.
    #[error("connection failed within the transport header: {0}")]
    Io(#[from] io::Error),
}

impl TransportHeader {
    /// The header as it is sent.
    pub fn encode(&self) -> Bytes {
        let kind = self.session.map(|session| match session {
            Session::Http1 => wire::Kind::Http1(wire::Empty {}),
            Session::Http2 => wire::Kind::Http2(wire::Empty {}),
        });
        let message = wire::Header {
            port: i32::from(self.port),
            name: self.name.clone().unwrap_or_default(),
            session_protocol: kind.map(|kind| wire::SessionProtocol { kind: Some(kind) }),
        };
        let len = message.encoded_len();
        let mut buf = BytesMut::with_capacity(FRAME + len);
        buf.put_slice(PREFACE);
        // A port and a DNS name: some 300 bytes at most.
        buf.put_u32(u32::try_from(len).unwrap_or(u32::MAX));
        buf.put_slice(&message.encode_to_vec());
        buf.freeze()
    }

    fn decode(message: &[u8]) -> Result<Self, HeaderError> {
        let wire::Header { port, name, session_protocol } = wire::Header::decode(message)?;
        let port = u16::try_from(port).ok().filter(|port| *port != 0).ok_or(HeaderError::Port(port))?;
        let name = match name.as_str() {
            "" => None,
            name => Some(name.parse::<ServerName>()?.as_str().to_string()),
        };
        let session = session_protocol.and_then(|session| session.kind).map(|kind| match kind {
            wire::Kind::Http1(wire::Empty {}) => Session::Http1,
            wire::Kind::Http2(wire::Empty {}) => Session::Http2,
        });
        Ok(Self { port, name, session })
    }
}

/// Reads a header. Also returned are the bytes that were read beyond it. A wrong preface is noticed at its first wrong
/// byte. Dropping the future loses what was read.
///
/// # Errors
/// Every way not to be a header; the connection is of no further use then.
pub async fn read<I: AsyncRead + Unpin>(
    io: &mut I,
    timeout: Duration,
) -> Result<(TransportHeader, Bytes), HeaderError> {
    match time::timeout(timeout, read_message(io)).await {
        Ok(result) => result,
        Err(_) => Err(HeaderError::Timeout(timeout)),
    }
}

async fn read_message<I: AsyncRead + Unpin>(io: &mut I) -> Result<(TransportHeader, Bytes), HeaderError> {
    let mut buf = BytesMut::with_capacity(512);
    loop {
        let seen = buf.len().min(PREFACE.len());
        if buf[..seen] != PREFACE[..seen] {
            return Err(HeaderError::Preface);
        }
        if let Some((len, _)) =
            buf.get(PREFACE.len()..).and_then(|rest| rest.split_first_chunk::<4>().map(|(l, r)| (*l, r)))
        {
            let len = u32::from_be_bytes(len) as usize;
            if len > MAX_MESSAGE {
                return Err(HeaderError::TooLong(len));
            }
            if buf.len() >= FRAME + len {
                let header = TransportHeader::decode(&buf[FRAME..FRAME + len])?;
                return Ok((header, buf.split_off(FRAME + len).freeze()));
            }
            buf.reserve(FRAME + len - buf.len());
        }
        if io.read_buf(&mut buf).await? == 0 {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
        }
    }
}

/// The message on the wire; field numbers from behaviour.md A.5.
mod wire {
    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct Header {
        #[prost(int32, tag = "1")]
        pub(super) port: i32,
        #[prost(string, tag = "2")]
        pub(super) name: String,
        #[prost(message, optional, tag = "3")]
        pub(super) session_protocol: Option<SessionProtocol>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct SessionProtocol {
        #[prost(oneof = "Kind", tags = "1, 2")]
        pub(super) kind: Option<Kind>,
    }

    #[derive(Clone, PartialEq, prost::Oneof)]
    pub(super) enum Kind {
        #[prost(message, tag = "1")]
        Http1(Empty),
        #[prost(message, tag = "2")]
        Http2(Empty),
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct Empty {}
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::AsyncWriteExt;

    fn header(name: Option<&str>, session: Option<Session>) -> TransportHeader {
        TransportHeader { port: 8080, name: name.map(str::to_string), session }
    }

    async fn read_all(mut bytes: &[u8]) -> Result<(TransportHeader, Bytes), HeaderError> {
        read(&mut bytes, Duration::from_secs(1)).await
    }

    #[tokio::test]
    async fn what_is_written_is_read_and_the_rest_is_kept() {
        for header in [
            header(None, None),
            header(None, Some(Session::Http1)),
            header(Some("web.ns.svc.cluster.local"), Some(Session::Http2)),
        ] {
            let mut bytes = header.encode().to_vec();
            bytes.extend_from_slice(b"application");
            let (read, rest) = read_all(&bytes).await.unwrap();
            assert_eq!((read, &rest[..]), (header, &b"application"[..]));
        }
    }

    #[test]
    fn the_bytes_on_the_wire_are_fixed() {
        let bytes = header(Some("a.b"), Some(Session::Http2)).encode();
        let expected = b"transport.l5d.io/v1\r\n\r\n\0\0\0\x0c\x08\x90\x3f\x12\x03a.b\x1a\x02\x12\x00";
        assert_eq!(&bytes[..], &expected[..]);
    }

    #[tokio::test]
    async fn every_truncation_is_an_error() {
        let bytes = header(Some("a.b"), Some(Session::Http1)).encode();
        for end in 0..bytes.len() {
            let error = read_all(&bytes[..end]).await.unwrap_err();
            assert!(matches!(error, HeaderError::Io(_)), "{end}: {error}");
        }
    }

    #[tokio::test]
    async fn a_header_may_come_byte_by_byte() {
        let bytes = header(None, Some(Session::Http2)).encode();
        let (mut client, mut server) = tokio::io::duplex(1);
        let write = tokio::spawn(async move { client.write_all(&bytes).await });
        let (read, rest) = read(&mut server, Duration::from_secs(1)).await.unwrap();
        assert_eq!((read, rest), (header(None, Some(Session::Http2)), Bytes::new()));
        write.await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn bad_headers_have_names() {
        let frame = |message: &[u8]| {
            let len = u32::try_from(message.len()).unwrap().to_be_bytes();
            [&PREFACE[..], &len, message].concat()
        };
        let check = |bytes: Vec<u8>, part: &'static str| async move {
            let error = read_all(&bytes).await.unwrap_err().to_string();
            assert!(error.contains(part), "{part:?} is missing in {error:?}");
        };
        check(b"GET / HTTP/1.1".to_vec(), "does not begin").await;
        check(frame(&[]), "names port 0").await;
        check(frame(&[8, 0x80, 0x80, 4]), "names port 65536").await;
        check(frame(&[8, 80, 0x12, 1, b'*']), "neither a DNS name").await;
        check(frame(&[0xff, 0xff]), "decoded").await;
        check([&PREFACE[..], &[0, 1, 0, 1]].concat(), "65537 bytes").await;
        check([&PREFACE[..], &[0xff; 4]].concat(), "at most 65536").await;
    }

    #[tokio::test(start_paused = true)]
    async fn silence_ends_with_the_timeout() {
        let (_client, mut server) = tokio::io::duplex(64);
        let error = read(&mut server, Duration::from_secs(10)).await.unwrap_err();
        assert!(matches!(error, HeaderError::Timeout(t) if t == Duration::from_secs(10)));
    }
}
