//! The application behind the measured proxies: HTTP/1.1 and HTTP/2 with prior knowledge on every address, on one thread.
//!
//! `/N` answers with N bytes, streamed from one static block, so that the server costs as little as possible.

use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body::{Body, Frame, SizeHint};
use hyper::{body::Incoming, service::service_fn};
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto::Builder,
};
use std::{
    convert::Infallible,
    io,
    net::SocketAddr,
    pin::Pin,
    task::{Context, Poll},
};
use tokio::net::TcpListener;

/// What large answers are made of.
static BLOCK: [u8; 64 * 1024] = [b'x'; 64 * 1024];

/// Largest answer, bytes: 1 GiB.
const MAX: u64 = 1 << 30;

/// Listens on all addresses and answers for ever.
///
/// # Errors
/// If an address can't be listened on.
pub async fn run(addrs: &[SocketAddr]) -> io::Result<()> {
    let mut listeners = Vec::new();
    for addr in addrs {
        listeners.push(TcpListener::bind(addr).await?);
    }
    let tasks: Vec<_> = listeners.into_iter().map(|listener| tokio::spawn(accept(listener))).collect();
    for task in tasks {
        task.await.map_err(io::Error::other)?;
    }
    Ok(())
}

/// Answers on a listener for ever.
pub async fn accept(listener: TcpListener) {
    loop {
        let Ok((io, _)) = listener.accept().await else {
            // Out of descriptors: some will come back.
            tokio::task::yield_now().await;
            continue;
        };
        let _ = io.set_nodelay(true);
        tokio::spawn(async move {
            let mut server = Builder::new(TokioExecutor::new());
            server.http2().initial_stream_window_size(1 << 20).initial_connection_window_size(1 << 20);
            // A client that goes away is nobody's error here.
            let _ = server.serve_connection(TokioIo::new(io), service_fn(answer)).await;
        });
    }
}

async fn answer(req: Request<Incoming>) -> Result<Response<Block>, Infallible> {
    let size = req.uri().path().strip_prefix('/').and_then(|n| n.parse().ok()).filter(|n| *n <= MAX);
    let mut rsp = Response::new(Block(size.unwrap_or(0)));
    if size.is_none() {
        *rsp.status_mut() = StatusCode::NOT_FOUND;
    }
    Ok(rsp)
}

/// So many bytes.
struct Block(u64);

impl Body for Block {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        if self.0 == 0 {
            return Poll::Ready(None);
        }
        let n = self.0.min(BLOCK.len() as u64);
        self.0 -= n;
        Poll::Ready(Some(Ok(Frame::data(Bytes::from_static(&BLOCK[..n as usize])))))
    }

    fn is_end_stream(&self) -> bool {
        self.0 == 0
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.0)
    }
}
