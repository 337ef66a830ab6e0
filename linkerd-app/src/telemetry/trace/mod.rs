//! Spans of traces that applications started (behaviour.md F.2).
//!
//! A request that carries a trace context gets a new span id on its way, and if the trace is sampled, a span is told of it
//! when its response's headers come. Without a context nothing is made, and without a collector nothing is looked at.
//! Spans go into a bounded queue that never makes a request wait; `control::traces` empties it.

mod context;
pub mod otlp;
mod resource;

pub use self::resource::resource;

use self::context::Context;
use super::{Direction, metric::Counter};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, StatusCode, Uri, header};
use std::{
    sync::{Arc, OnceLock},
    time::SystemTime,
};
use tokio::sync::mpsc;

/// Spans that wait for the exporter; one more is dropped (behaviour.md F.2).
const QUEUE: usize = 100;

const X_FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");
const L5D_ORIG_PROTO: HeaderName = linkerd_stack::http::orig_proto::HEADER;

/// Which side of the proxy a span is of.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum SpanKind {
    /// Where requests come in.
    Server,
    /// Where they go out, to an endpoint or the application.
    Client,
}

/// Makes spans; off until it is switched on.
#[derive(Debug, Default)]
pub struct Tracer(OnceLock<Queue>);

#[derive(Clone, Debug)]
struct Queue {
    spans: mpsc::Sender<Box<Span>>,
    dropped: Arc<Counter>,
}

impl Tracer {
    /// Switches it on; what comes out is to be exported. None if it is on already. `dropped` counts spans that the queue has
    /// no room for.
    pub fn start(&self, dropped: Arc<Counter>) -> Option<mpsc::Receiver<Box<Span>>> {
        let (spans, exported) = mpsc::channel(QUEUE);
        self.0.set(Queue { spans, dropped }).ok()?;
        Some(exported)
    }

    /// Gives the request a new span id if it carries a trace context. Some if the trace is sampled.
    pub fn begin<B>(&self, direction: Direction, kind: SpanKind, req: &mut Request<B>) -> Option<Begun> {
        let queue = self.0.get()?;
        let context = Context::read(req.headers())?;
        let id = rand::random::<[u8; 8]>();
        context.write(id, req.headers_mut());
        if !context.is_sampled() {
            return None;
        }
        let Context { trace, parent, .. } = context;
        let request = Traced::of(req);
        let span = Span { trace, parent, id, direction, kind, start: SystemTime::now(), end: None, request };
        Some(Begun(Box::new((span, queue.clone()))))
    }
}

/// A span whose request has no response yet. Dropped, it is told of by nobody.
#[derive(Debug)]
pub struct Begun(Box<(Span, Queue)>);

impl Begun {
    /// The response's headers are there: the span goes to the exporter, or is dropped if that is behind.
    pub fn answered(self, status: StatusCode) {
        let (mut span, queue) = *self.0;
        span.end = Some((SystemTime::now(), status));
        if queue.spans.try_send(Box::new(span)).is_err() {
            queue.dropped.inc();
        }
    }
}

/// One span. Header values are shared with the request, not copied.
#[derive(Clone, Debug)]
pub struct Span {
    trace: [u8; 16],
    /// The id that was read at this layer.
    parent: [u8; 8],
    id: [u8; 8],
    direction: Direction,
    kind: SpanKind,
    start: SystemTime,
    end: Option<(SystemTime, StatusCode)>,
    request: Traced,
}

/// What is told of a request.
#[derive(Clone, Debug)]
struct Traced {
    method: Method,
    uri: Uri,
    forwarded_host: Option<HeaderValue>,
    host: Option<HeaderValue>,
    user_agent: Option<HeaderValue>,
    content_length: Option<HeaderValue>,
    content_type: Option<HeaderValue>,
    orig_proto: Option<HeaderValue>,
}

impl Traced {
    fn of<B>(req: &Request<B>) -> Self {
        let header = |name: HeaderName| HeaderMap::get(req.headers(), name).cloned();
        Self {
            method: req.method().clone(),
            uri: req.uri().clone(),
            forwarded_host: header(X_FORWARDED_HOST),
            host: header(header::HOST),
            user_agent: header(header::USER_AGENT),
            content_length: header(header::CONTENT_LENGTH),
            content_type: header(header::CONTENT_TYPE),
            orig_proto: header(L5D_ORIG_PROTO),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAMPLED: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

    fn request(traceparent: &str) -> Request<()> {
        Request::get("http://web.shop:8080/a?b=c").header("traceparent", traceparent).body(()).unwrap()
    }

    fn begin(tracer: &Tracer, req: &mut Request<()>) -> Option<Begun> {
        tracer.begin(Direction::Inbound, SpanKind::Server, req)
    }

    #[test]
    fn without_a_collector_headers_pass_untouched() {
        let mut req = request(SAMPLED);
        assert!(begin(&Tracer::default(), &mut req).is_none());
        assert_eq!(req.headers()["traceparent"], SAMPLED);
    }

    #[test]
    fn without_a_context_nothing_is_made() {
        let tracer = Tracer::default();
        let mut spans = tracer.start(Arc::default()).unwrap();
        let mut req = Request::new(());
        assert!(begin(&tracer, &mut req).is_none());
        assert!(req.headers().is_empty() && spans.try_recv().is_err());
    }

    #[test]
    fn unsampled_traces_get_span_ids_but_no_spans() {
        let tracer = Tracer::default();
        let _spans = tracer.start(Arc::default()).unwrap();
        let mut req = request(&SAMPLED.replace("-01", "-00"));
        assert!(begin(&tracer, &mut req).is_none());
        let written = req.headers()["traceparent"].to_str().unwrap();
        assert!(written.starts_with("00-0af7651916cd43dd8448eb211c80319c-") && written.ends_with("-00"), "{written}");
        assert!(!written.contains("b7ad6b7169203331"), "{written}");
    }

    #[test]
    fn the_layers_of_a_pass_are_parent_and_child() {
        let tracer = Tracer::default();
        let mut spans = tracer.start(Arc::default()).unwrap();
        let mut req = request(SAMPLED);
        let server = begin(&tracer, &mut req).unwrap();
        let client = tracer.begin(Direction::Inbound, SpanKind::Client, &mut req).unwrap();
        client.answered(StatusCode::OK);
        server.answered(StatusCode::OK);
        let (client, server) = (spans.try_recv().unwrap(), spans.try_recv().unwrap());
        assert_eq!((client.parent, client.trace), (server.id, server.trace));
        assert_eq!(server.parent, [0xb7, 0xad, 0x6b, 0x71, 0x69, 0x20, 0x33, 0x31]);
        assert!(req.headers()["traceparent"].to_str().unwrap().ends_with("-01"));
    }

    #[test]
    fn a_full_queue_drops_spans_and_counts_them() {
        let tracer = Tracer::default();
        let dropped: Arc<Counter> = Arc::default();
        let _spans = tracer.start(dropped.clone()).unwrap();
        for _ in 0..QUEUE + 3 {
            begin(&tracer, &mut request(SAMPLED)).unwrap().answered(StatusCode::OK);
        }
        assert_eq!(dropped.get(), 3);
    }

    #[test]
    fn a_request_without_an_answer_leaves_no_span() {
        let tracer = Tracer::default();
        let mut spans = tracer.start(Arc::default()).unwrap();
        drop(begin(&tracer, &mut request(SAMPLED)));
        assert!(spans.try_recv().is_err());
    }
}
