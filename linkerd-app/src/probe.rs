//! One small request of HTTP/1.1 whose status is all that counts: to a proxy's admin server, to a gateway's probe port.

use std::{io, net::SocketAddr};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

/// The status line fits; no more of an answer is read.
const STATUS_LINE: u64 = 32;

/// The status that the first of `addrs` that can be connected to answers with. It may take for ever.
///
/// # Errors
/// When none can be connected to, the connection breaks, or the answer is not HTTP/1.
pub(crate) async fn status(addrs: &[SocketAddr], method: &str, path: &str, host: &str) -> io::Result<u16> {
    let mut io = TcpStream::connect(addrs).await?;
    let request = format!("{method} {path} HTTP/1.1\r\nhost: {host}\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
    io.write_all(request.as_bytes()).await?;
    let mut answer = Vec::new();
    (&mut io).take(STATUS_LINE).read_to_end(&mut answer).await?;
    let status = answer.strip_prefix(b"HTTP/1.").and_then(|rest| rest.get(2..5));
    let status = status.and_then(|digits| std::str::from_utf8(digits).ok()?.parse().ok());
    status.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "the answer is not HTTP/1"))
}
