//! Access log lines, written when responses end: the log's order is that of the responses (contract.md 3.5).

use crate::telemetry::{
    Code, Telemetry,
    access::{AccessLog, Entry},
};
use ::http::Response;
use bytes::Bytes;
use http_body::{Body as _, Frame, SizeHint};
use linkerd_stack::http::{Body, BodyError};
use std::{
    pin::Pin,
    task::{Context, Poll, ready},
};
use tokio::time::Instant;

/// A request's line. Written when it is dropped, at the latest: a request that was cancelled has one too.
pub(super) struct Line {
    log: AccessLog,
    telemetry: Telemetry,
    start: Instant,
    entry: Option<Entry>,
}

impl Line {
    pub(super) fn new(log: AccessLog, telemetry: Telemetry, start: Instant, mut entry: Entry) -> Self {
        // Until something else is known.
        entry.termination = Some(Code::RequestCanceled);
        Self { log, telemetry, start, entry: Some(entry) }
    }

    /// The request's stream is reset.
    pub(super) fn reset(mut self, termination: Option<Code>) {
        if let Some(entry) = &mut self.entry {
            entry.termination = termination;
            entry.processing = self.start.elapsed();
        }
    }

    /// The line is written when the response's body ends or is dropped.
    pub(super) fn response(mut self, termination: Option<Code>, rsp: Response<Body>) -> Response<Body> {
        if let Some(entry) = &mut self.entry {
            entry.termination = termination;
            entry.response(&rsp, self.start.elapsed());
        }
        if rsp.body().is_end_stream() {
            return rsp;
        }
        rsp.map(|inner| Body::new(Logged { inner, line: self }))
    }

    fn write(&mut self) {
        if let Some(mut entry) = self.entry.take() {
            if let Some(Code::RequestCanceled | Code::ResponseCanceled) = entry.termination
                && self.telemetry.is_cut()
            {
                entry.termination = Some(Code::DrainCut);
            }
            entry.total = self.start.elapsed();
            self.log.record(entry);
        }
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        self.write();
    }
}

struct Logged {
    inner: Body,
    line: Line,
}

/// A body that is dropped before its end was given up by the client.
impl Drop for Logged {
    fn drop(&mut self) {
        if let (false, Some(entry)) = (self.inner.is_end_stream(), &mut self.line.entry) {
            entry.termination.get_or_insert(Code::ResponseCanceled);
        }
    }
}

impl http_body::Body for Logged {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let this = &mut *self;
        let frame = ready!(Pin::new(&mut this.inner).poll_frame(cx));
        match &frame {
            Some(Ok(_)) => {}
            Some(Err(error)) => {
                if let Some(entry) = &mut this.line.entry {
                    entry.termination = Some(match error {
                        BodyError::Reset(_) => Code::ResponseReset,
                        BodyError::Incomplete => Code::ResponseIncomplete,
                        BodyError::Io(_) | BodyError::Other(_) => Code::ResponseFailed,
                    });
                }
            }
            // The end of the response, not the moment at which the codec lets go of its body.
            None => this.line.write(),
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
