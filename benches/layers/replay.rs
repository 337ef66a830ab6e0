//! A request body that is kept for a retry: the first attempt, and the second one.

use bytes::Bytes;
use criterion::{BatchSize, Criterion, Throughput};
use futures_util::FutureExt;
use http_body::{Body, Frame};
use http_body_util::BodyExt;
use linkerd_stack::replay::ReplayBody;
use std::{
    collections::VecDeque,
    convert::Infallible,
    pin::Pin,
    task::{Context, Poll},
};

const MAX: usize = 64 * 1024;

pub(crate) fn benches(c: &mut Criterion) {
    let mut group = c.benchmark_group("replay");
    for (name, frames, size) in [("4_frames_of_16_KiB", 4, 16 * 1024), ("256_frames_of_64_B", 256, 64)] {
        group.throughput(Throughput::Bytes(frames as u64 * size as u64));
        let frames = vec![Bytes::from(vec![b'x'; size]); frames];
        group.bench_function(format!("once/{name}"), |b| {
            b.iter_batched(
                || body(&frames),
                |body| drain(ReplayBody::new(body, MAX).ok().unwrap().0),
                BatchSize::SmallInput,
            );
        });
        group.bench_function(format!("and_again/{name}"), |b| {
            let twice = |body| {
                let (first, replay) = ReplayBody::new(body, MAX).ok().unwrap();
                drain(first) + drain(replay.again().unwrap())
            };
            b.iter_batched(|| body(&frames), twice, BatchSize::SmallInput);
        });
    }
}

struct Frames(VecDeque<Bytes>);

impl Body for Frames {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        Poll::Ready(self.0.pop_front().map(|data| Ok(Frame::data(data))))
    }

    fn is_end_stream(&self) -> bool {
        self.0.is_empty()
    }
}

fn body(frames: &[Bytes]) -> Frames {
    Frames(frames.iter().cloned().collect())
}

fn drain(mut body: impl Body<Data = Bytes> + Unpin) -> usize {
    let mut sum = 0;
    while let Some(frame) = body.frame().now_or_never().unwrap() {
        sum += frame.ok().and_then(|f| f.data_ref().map(Bytes::len)).unwrap_or(0);
    }
    sum
}
