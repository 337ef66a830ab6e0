//! Connections that stop being HTTP (behaviour.md E.2): after 101, or 2xx to CONNECT, both sides are joined byte for
//! byte until they close. The server side is what the server's codec hands over; the other side is what the client's
//! codec hands over, or a stream that the service itself puts into the response.

use super::body::Body;
use crate::{
    BoxFuture, copy, drain,
    io::{BoxedIo, Io},
};
use http::{Method, Request, Response, StatusCode, header};
use hyper::upgrade::{OnUpgrade, Upgraded};
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use std::{
    future::{Future, pending},
    io,
    sync::Arc,
};
use tokio::select;

/// Response extension: the stream that the client's connection is joined to. For services that answer CONNECT (or an
/// upgrade) themselves instead of forwarding it.
#[derive(Clone)]
pub struct Tunnel(Arc<Mutex<Option<BoxedIo>>>);

impl Tunnel {
    /// Joins to `io`, once the response has been sent.
    pub fn new(io: impl Io) -> Self {
        Self(Arc::new(Mutex::new(Some(Box::new(io)))))
    }

    fn take(&self) -> Option<BoxedIo> {
        self.0.lock().take()
    }
}

/// Response extension: the joined connections are closed when this future ends.
#[derive(Clone)]
pub struct Until(Arc<Mutex<Option<BoxFuture<()>>>>);

impl Until {
    /// Until `end` ends. It is dropped with the connections.
    pub fn new(end: impl Future<Output = ()> + Send + 'static) -> Self {
        Self(Arc::new(Mutex::new(Some(Box::pin(end)))))
    }

    async fn ended(this: Option<Self>) {
        match this.and_then(|this| this.0.lock().take()) {
            Some(end) => end.await,
            None => pending().await,
        }
    }
}

/// The server's side of a request that may become an upgrade. None for requests that don't ask for one, which then
/// never become one.
pub(super) fn requested(req: &mut Request<Body>) -> Option<Requested> {
    let connect = req.method() == Method::CONNECT;
    let on = req.extensions_mut().remove::<OnUpgrade>()?;
    (connect || super::normalize::is_upgrade(req)).then_some(Requested { connect, on })
}

/// See [`requested`].
pub(super) struct Requested {
    connect: bool,
    on: OnUpgrade,
}

impl Requested {
    /// Whether a response with this status ends HTTP on the connection as the request asked.
    pub(super) fn accepts(&self, status: StatusCode) -> bool {
        if self.connect { status.is_success() } else { status == StatusCode::SWITCHING_PROTOCOLS }
    }
}

/// Joins both sides of a response that ends HTTP, in a task that holds `drain` until they are closed. False if the
/// request did not ask for it or the response has nothing to join to: such a response must not be sent.
pub(super) fn join<B: Default>(rsp: &mut Response<B>, requested: Option<Requested>, drain: drain::Watch) -> bool {
    let Some(Requested { on, .. }) = requested.filter(|requested| requested.accepts(rsp.status())) else {
        return false;
    };
    let far = match (rsp.extensions_mut().remove::<Tunnel>(), rsp.extensions_mut().remove::<OnUpgrade>()) {
        (Some(tunnel), _) => match tunnel.take() {
            Some(io) => Far::Io(io),
            None => return false,
        },
        (None, Some(on)) => Far::Client(on),
        (None, None) => return false,
    };
    rsp.headers_mut().remove(header::CONTENT_LENGTH);
    rsp.headers_mut().remove(header::TRANSFER_ENCODING);
    *rsp.body_mut() = B::default();
    let until = rsp.extensions_mut().remove::<Until>();
    tokio::spawn(async move {
        let _working = drain;
        select! {
            spliced = splice(on, far) => {
                if let Err(error) = spliced {
                    tracing::debug!(%error, "upgraded connection failed");
                }
            }
            () = Until::ended(until) => {}
        }
    });
    true
}

enum Far {
    Client(OnUpgrade),
    Io(BoxedIo),
}

async fn splice(near: OnUpgrade, far: Far) -> io::Result<()> {
    // The far side is ready first: its response has been read. Taking the near side waits for the answer to be sent.
    let far: BoxedIo = match far {
        Far::Client(on) => Box::new(upgraded(on.await)?),
        Far::Io(io) => io,
    };
    let near = upgraded(near.await)?;
    copy::duplex(near, far).await.map(|_| ())
}

fn upgraded(result: hyper::Result<Upgraded>) -> io::Result<TokioIo<Upgraded>> {
    result.map(TokioIo::new).map_err(io::Error::other)
}
