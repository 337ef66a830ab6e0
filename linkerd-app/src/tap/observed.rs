//! One exchange on its way, and those who see it: the response is told when it begins, and again when its body ends,
//! fails or is dropped.

use super::{Tap, event::Seen};
use crate::{error::Cause, http::classify::grpc_status};
use bytes::Bytes;
use http::{HeaderMap, Request, Response};
use http_body::{Body as _, Frame, SizeHint};
use linkerd_stack::http::{Body, BodyError};
use linkerd2_proxy_api::tap::Eos;
use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};
use tokio::time::Instant;

/// A request that somebody sees. Dropped without a response, the request was given up.
pub struct Observed(Box<Exchange>);

struct Exchange {
    takers: Vec<Arc<Tap>>,
    seen: Seen,
    response: Option<Instant>,
    bytes: u64,
    /// Of a response without trailers.
    grpc: Option<u16>,
    ended: bool,
}

/// Shows a response, if somebody saw its request.
pub fn response(observed: Option<Observed>, rsp: Response<Body>) -> Response<Body> {
    match observed {
        Some(observed) => observed.response(rsp),
        None => rsp,
    }
}

/// Shows an error instead of a response.
pub fn failed(observed: Option<Observed>, cause: &Cause) {
    if let Some(observed) = observed {
        observed.failed(cause);
    }
}

impl Observed {
    pub(super) fn new<B>(takers: Vec<Arc<Tap>>, seen: Seen, req: &Request<B>) -> Self {
        for tap in &takers {
            tap.tell(seen.request(req, tap.headers));
        }
        Self(Box::new(Exchange { takers, seen, response: None, bytes: 0, grpc: None, ended: false }))
    }

    /// There is a response; its body tells the rest.
    pub(super) fn response(self, rsp: Response<Body>) -> Response<Body> {
        let Self(mut exchange) = self;
        let now = Instant::now();
        exchange.response = Some(now);
        exchange.grpc = grpc_status(rsp.headers());
        for tap in &exchange.takers {
            tap.tell(exchange.seen.response(&rsp, now, tap.headers));
        }
        if rsp.body().is_end_stream() {
            exchange.end(None);
            return rsp;
        }
        rsp.map(|inner| Body::new(ObservedBody { inner, exchange }))
    }

    /// There is an error instead of a response.
    pub(super) fn failed(self, cause: &Cause) {
        let reason = match cause {
            Cause::Http2Reset(reason) => *reason,
            _ => h2::Reason::INTERNAL_ERROR,
        };
        let Self(mut exchange) = self;
        exchange.reset(reason);
    }
}

impl Exchange {
    fn end(&mut self, trailers: Option<&HeaderMap>) {
        let grpc = trailers.and_then(grpc_status).or(self.grpc);
        self.tell(grpc.map(|code| Eos::from_grpc_status(code.into())), trailers);
    }

    fn reset(&mut self, reason: h2::Reason) {
        self.tell(Some(reason.into()), None);
    }

    fn tell(&mut self, eos: Option<Eos>, trailers: Option<&HeaderMap>) {
        if std::mem::replace(&mut self.ended, true) {
            return;
        }
        for tap in &self.takers {
            let trailers = trailers.filter(|_| tap.headers);
            tap.tell(self.seen.end(self.response, self.bytes, eos, trailers));
        }
    }
}

/// Whoever lets go before the end has lost interest.
impl Drop for Exchange {
    fn drop(&mut self) {
        self.reset(h2::Reason::CANCEL);
    }
}

struct ObservedBody {
    inner: Body,
    exchange: Box<Exchange>,
}

impl Drop for ObservedBody {
    fn drop(&mut self) {
        if self.inner.is_end_stream() {
            self.exchange.end(None);
        }
    }
}

impl http_body::Body for ObservedBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let this = &mut *self;
        let frame = ready!(Pin::new(&mut this.inner).poll_frame(cx));
        match &frame {
            Some(Ok(frame)) => {
                if let Some(data) = frame.data_ref() {
                    this.exchange.bytes += data.len() as u64;
                } else if let Some(trailers) = frame.trailers_ref() {
                    this.exchange.end(Some(trailers));
                }
            }
            Some(Err(error)) => this.exchange.reset(error.reset().unwrap_or(h2::Reason::INTERNAL_ERROR)),
            None => this.exchange.end(None),
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}
