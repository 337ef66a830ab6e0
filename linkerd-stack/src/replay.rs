//! A request body that can be sent again: it streams to the first attempt and is kept while it does, up to a bound.
//!
//! Frames are handed on without copying. The first byte above the bound releases everything kept, and the body goes on
//! as if it had never been kept.

use bytes::{Bytes, BytesMut};
use http::HeaderMap;
use http_body::{Body, Frame, SizeHint};
use parking_lot::Mutex;
use std::{
    collections::VecDeque,
    fmt,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

/// Frames below this size are copied together when they are kept: a slice of a few bytes would otherwise hold the whole
/// read buffer it was cut from.
const SMALL: usize = 1024;

/// Size up to which small frames are collected into one.
const COLLECTED: usize = 4 * SMALL;

/// One attempt's copy of a body.
pub struct ReplayBody<B> {
    shared: Arc<Mutex<Kept<B>>>,
    /// What this attempt replays before it reads on; filled when the attempt is made.
    replay: VecDeque<Bytes>,
    trailers: Option<HeaderMap>,
    /// The original, held by the one attempt that reads on.
    source: Option<B>,
}

/// The way to further attempts.
pub struct Replay<B>(Arc<Mutex<Kept<B>>>);

/// Per request, so that the lock is contended by nobody but attempts of one request; it is not held while the original
/// is polled.
struct Kept<B> {
    max: usize,
    frames: Vec<Bytes>,
    /// Small frames, yet to be added to `frames`.
    tail: BytesMut,
    len: usize,
    trailers: Option<HeaderMap>,
    /// Given back by an attempt that was dropped before it had read everything.
    source: Option<B>,
    state: State,
}

#[derive(Copy, Clone, Debug, PartialEq, Eq)]
enum State {
    /// Not read to its end; what was read is kept.
    Reading,
    /// Read to its end, and kept.
    Complete,
    /// Too long, or its source failed: never again.
    Lost,
}

impl<B> ReplayBody<B>
where
    B: Body<Data = Bytes> + Unpin,
{
    /// Keeps up to `max` bytes of a body, for as long as the way to further attempts exists.
    ///
    /// # Errors
    /// Gives the body back if it is known to be longer than `max`.
    pub fn new(body: B, max: usize) -> Result<(Self, Replay<B>), B> {
        if body.size_hint().lower() > max as u64 {
            return Err(body);
        }
        let state = if body.is_end_stream() { State::Complete } else { State::Reading };
        let kept = Kept { max, frames: Vec::new(), tail: BytesMut::new(), len: 0, trailers: None, source: None, state };
        let shared = Arc::new(Mutex::new(kept));
        let first = Self { shared: shared.clone(), replay: VecDeque::new(), trailers: None, source: Some(body) };
        Ok((first, Replay(shared)))
    }

    /// Puts a frame away, if that is still worth it.
    fn keep(&self, frame: &Frame<Bytes>, last: bool) {
        let mut kept = self.shared.lock();
        if kept.state != State::Reading {
            return;
        }
        // Without anyone who could ask for another attempt, nothing needs to be kept.
        if Arc::strong_count(&self.shared) == 1 {
            return kept.lose();
        }
        if let Some(data) = frame.data_ref() {
            kept.len = kept.len.saturating_add(data.len());
            if kept.len > kept.max {
                return kept.lose();
            }
            kept.push(data);
        } else if let Some(trailers) = frame.trailers_ref() {
            kept.trailers = Some(trailers.clone());
        }
        if last || frame.is_trailers() {
            kept.state = State::Complete;
        }
    }
}

impl<B> Replay<B> {
    /// Whether the original was read to its end within the bound: what behaviour.md D.11 demands for a retry.
    pub fn is_complete(&self) -> bool {
        self.0.lock().state == State::Complete
    }

    /// Whether no further attempt will ever be possible.
    pub fn is_lost(&self) -> bool {
        self.0.lock().state == State::Lost
    }

    /// The body for another attempt: what is kept, and then what the original still has. None if the body was too long
    /// or has failed, or if an attempt that is still alive is reading it.
    pub fn again(&self) -> Option<ReplayBody<B>> {
        let mut kept = self.0.lock();
        let source = match kept.state {
            State::Lost => return None,
            State::Complete => None,
            State::Reading => Some(kept.source.take()?),
        };
        kept.collect();
        let replay = kept.frames.iter().cloned().collect();
        Some(ReplayBody { shared: self.0.clone(), replay, trailers: kept.trailers.clone(), source })
    }
}

impl<B> Kept<B> {
    fn push(&mut self, data: &Bytes) {
        if data.len() < SMALL {
            self.tail.extend_from_slice(data);
            if self.tail.len() >= COLLECTED {
                self.collect();
            }
        } else {
            self.collect();
            self.frames.push(data.clone());
        }
    }

    fn collect(&mut self) {
        if !self.tail.is_empty() {
            let collected = self.tail.split().freeze();
            self.frames.push(collected);
        }
    }

    fn lose(&mut self) {
        self.state = State::Lost;
        self.frames = Vec::new();
        self.tail = BytesMut::new();
        self.trailers = None;
    }
}

impl<B> Body for ReplayBody<B>
where
    B: Body<Data = Bytes> + Unpin,
{
    type Data = Bytes;
    type Error = B::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        if let Some(data) = self.replay.pop_front() {
            return Poll::Ready(Some(Ok(Frame::data(data))));
        }
        if let Some(trailers) = self.trailers.take() {
            return Poll::Ready(Some(Ok(Frame::trailers(trailers))));
        }
        let Some(source) = &mut self.source else { return Poll::Ready(None) };
        let polled = ready!(Pin::new(&mut *source).poll_frame(cx));
        match &polled {
            Some(Ok(frame)) => {
                let last = source.is_end_stream();
                self.keep(frame, last);
            }
            Some(Err(_)) => self.shared.lock().lose(),
            None => {
                let mut kept = self.shared.lock();
                if kept.state == State::Reading {
                    kept.state = State::Complete;
                }
            }
        }
        Poll::Ready(polled)
    }

    fn is_end_stream(&self) -> bool {
        self.replay.is_empty() && self.trailers.is_none() && self.source.as_ref().is_none_or(Body::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        let replay: u64 = self.replay.iter().map(|data| data.len() as u64).sum();
        let source = self.source.as_ref().map(Body::size_hint).unwrap_or_else(|| SizeHint::with_exact(0));
        let mut hint = SizeHint::new();
        hint.set_lower(source.lower().saturating_add(replay));
        if let Some(upper) = source.upper().and_then(|upper| upper.checked_add(replay)) {
            hint.set_upper(upper);
        }
        hint
    }
}

impl<B> Drop for ReplayBody<B> {
    fn drop(&mut self) {
        if let Some(source) = self.source.take() {
            let mut kept = self.shared.lock();
            if kept.state == State::Reading {
                kept.source = Some(source);
            }
        }
    }
}

impl<B> fmt::Debug for ReplayBody<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ReplayBody")
            .field("to_replay", &self.replay.len())
            .field("reads_on", &self.source.is_some())
            .finish_non_exhaustive()
    }
}

impl<B> fmt::Debug for Replay<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kept = self.0.lock();
        f.debug_struct("Replay").field("state", &kept.state).field("len", &kept.len).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt;
    use http_body_util::BodyExt;

    /// Frames as scripted; `Err` ends them with an error. Says that it ends only by ending.
    #[derive(Debug)]
    struct Script(VecDeque<Result<Frame<Bytes>, &'static str>>, Option<u64>);

    impl Body for Script {
        type Data = Bytes;
        type Error = &'static str;

        fn poll_frame(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame<Bytes>, &'static str>>> {
            Poll::Ready(self.0.pop_front())
        }

        fn size_hint(&self) -> SizeHint {
            self.1.map(SizeHint::with_exact).unwrap_or_default()
        }
    }

    fn script(chunks: &[&'static [u8]]) -> Script {
        Script(chunks.iter().map(|chunk| Ok(Frame::data(Bytes::from_static(chunk)))).collect(), None)
    }

    fn frame(body: &mut ReplayBody<Script>) -> Option<Result<Frame<Bytes>, &'static str>> {
        body.frame().now_or_never().unwrap()
    }

    #[track_caller]
    fn check(body: ReplayBody<Script>, data: &[u8], trailers: Option<&HeaderMap>) {
        let collected = body.collect().now_or_never().unwrap().unwrap();
        assert_eq!(collected.trailers(), trailers);
        assert_eq!(collected.to_bytes(), data);
    }

    #[test]
    fn complete_bodies_are_sent_again_with_trailers() {
        let mut trailers = HeaderMap::new();
        trailers.insert("x-sum", "1".parse().unwrap());
        let mut body = script(&[b"ab", &[b'x'; 2000], b"cd"]);
        body.0.push_back(Ok(Frame::trailers(trailers.clone())));
        let (first, replay) = ReplayBody::new(body, 2004).unwrap();
        let data = [b"ab".as_slice(), &[b'x'; 2000], b"cd"].concat();
        assert!(!replay.is_complete() && replay.again().is_none());
        check(first, &data, Some(&trailers));
        assert!(replay.is_complete());
        for _ in 0..2 {
            let again = replay.again().unwrap();
            assert_eq!(again.size_hint().exact(), Some(2004));
            check(again, &data, Some(&trailers));
        }
    }

    #[test]
    fn too_long_bodies_pass_through_once() {
        let (first, replay) = ReplayBody::new(script(&[b"abc", b"def"]), 5).unwrap();
        check(first, b"abcdef", None);
        assert!(replay.is_lost() && replay.again().is_none());
        assert!(replay.0.lock().frames.is_empty());
        let known = Script(VecDeque::new(), Some(6));
        assert!(ReplayBody::new(known, 5).is_err());
    }

    #[test]
    fn an_attempt_that_was_dropped_early_leaves_the_rest_to_the_next() {
        let (mut first, replay) = ReplayBody::new(script(&[b"abc", b"def"]), 100).unwrap();
        assert_eq!(frame(&mut first).unwrap().unwrap().into_data().unwrap(), "abc");
        assert!(replay.again().is_none(), "the first attempt may still read on");
        drop(first);
        assert!(!replay.is_complete());
        let second = replay.again().unwrap();
        assert!(replay.again().is_none());
        check(second, b"abcdef", None);
        check(replay.again().unwrap(), b"abcdef", None);
    }

    #[test]
    fn a_failed_source_is_not_replayed() {
        let mut body = script(&[b"abc"]);
        body.0.push_back(Err("reset"));
        let (mut first, replay) = ReplayBody::new(body, 100).unwrap();
        assert!(frame(&mut first).unwrap().is_ok());
        assert_eq!(frame(&mut first).unwrap().unwrap_err(), "reset");
        drop(first);
        assert!(replay.again().is_none());
    }

    #[test]
    fn empty_bodies_are_complete_from_the_start() {
        let (first, replay) = ReplayBody::new(http_body_util::Empty::<Bytes>::new(), 0).unwrap();
        assert!(first.is_end_stream() && replay.is_complete());
        assert!(replay.again().unwrap().is_end_stream());
    }

    #[test]
    fn a_known_length_is_complete_with_its_last_byte() {
        let (mut first, replay) = ReplayBody::new(http_body_util::Full::new(Bytes::from_static(b"abc")), 3).unwrap();
        assert_eq!(first.size_hint().exact(), Some(3));
        assert!(first.frame().now_or_never().unwrap().is_some());
        assert!(first.is_end_stream() && replay.is_complete());
    }

    #[test]
    fn nothing_is_kept_for_nobody() {
        let (mut first, replay) = ReplayBody::new(script(&[b"abc", b"def"]), 100).unwrap();
        drop(replay);
        frame(&mut first);
        assert_eq!(first.shared.lock().state, State::Lost);
    }

    #[test]
    fn small_frames_are_kept_together() {
        let (first, replay) = ReplayBody::new(script(&[b"a".as_slice(); 10_000]), 10_000).unwrap();
        check(first, &[b'a'; 10_000], None);
        check(replay.again().unwrap(), &[b'a'; 10_000], None);
        assert_eq!(replay.0.lock().frames.len(), 3);
    }
}
