//! Spans on their way to the collector: OTLP over gRPC, in batches (behaviour.md F.2).
//!
//! The exporter runs beside the traffic. While the collector is away it holds one batch and lets the queue before it fill,
//! where further spans are dropped and counted.

use super::{
    ControlService, Observer,
    client::{self, Client, Options, dns, tls::Secure},
    stream,
};
use crate::{
    config,
    telemetry::{
        SpanMetrics, Telemetry,
        trace::{
            Span,
            otlp::{OtlpSpan, Request, Resource, Response},
        },
    },
};
use http::uri::PathAndQuery;
use prost::Message;
use std::{sync::Arc, time::Duration};
use tokio::{
    sync::mpsc,
    time::{self, Instant},
};
use tonic::{Status, client::Grpc};

/// Spans of one batch (behaviour.md F.2).
const MAX_BATCH: usize = 1_000;
/// Bytes of one batch: half of what a collector accepts by default.
const MAX_BATCH_BYTES: usize = 2 * 1024 * 1024;
/// Least time between batches that are not full (behaviour.md F.2).
const INTERVAL: Duration = Duration::from_secs(10);
/// A batch after a quiet time waits no longer than this for more spans.
const LINGER: Duration = Duration::from_secs(1);
/// Longest wait for the collector's answer; then the batch is given up.
const EXPORT_LIMIT: Duration = Duration::from_secs(10);

const EXPORT: &str = "/opentelemetry.proto.collector.trace.v1.TraceService/Export";

/// What an exporter is made of.
pub struct Exporter {
    /// Spans to export.
    pub spans: mpsc::Receiver<Box<Span>>,
    /// What is said of the workload.
    pub resource: Resource,
    /// Where they go.
    pub collector: config::ControlAddr,
    /// Settings of connections to it.
    pub connect: config::Connect,
    /// DNS.
    pub dns: config::Dns,
    /// Mesh TLS.
    pub secure: Arc<dyn Secure>,
    /// Metrics of the client.
    pub observer: Arc<dyn Observer>,
    /// Metrics of the export.
    pub telemetry: Telemetry,
}

impl Exporter {
    /// Exports until there can be no more spans.
    pub async fn run(self) {
        let Self { spans, resource, collector, connect, dns, secure, observer, telemetry } = self;
        let client = Client::new(Options {
            service: ControlService::TraceCollector,
            addr: collector.clone(),
            connect,
            secure,
            needs_identity: true,
            dns: Arc::new(dns::System::new(dns)),
            observer,
        });
        let mut connected = client.connected();
        let mut grpc = Grpc::with_origin(client, client::origin(&collector));
        let metrics = telemetry.spans();
        let mut batches = Batches { spans, last: None };
        let mut failing = false;
        metrics.streams.inc();
        while let Some(batch) = batches.next().await {
            if connected.wait_for(|connected| *connected).await.is_err() {
                return;
            }
            batches.last = Some(Instant::now());
            let spans = batch.len() as u64;
            match export(&mut grpc, Request::new(resource.clone(), batch), metrics).await {
                Ok(response) => {
                    let (rejected, why) = response.rejected().unwrap_or_default();
                    if rejected > 0 {
                        tracing::debug!(rejected, why, "Trace collector did not take all spans");
                    }
                    if failing {
                        tracing::info!("Trace collector takes spans again");
                        metrics.streams.inc();
                    }
                    failing = false;
                    metrics.spans.add(spans.saturating_sub(rejected));
                    metrics.dropped.add(rejected);
                }
                Err(status) => {
                    metrics.dropped.add(spans);
                    let error = stream::describe(&status);
                    // Loud once per outage.
                    if failing {
                        tracing::debug!(spans, error, "Spans are lost");
                    } else {
                        tracing::warn!(spans, error, "Trace collector takes no spans; they are lost");
                    }
                    failing = true;
                }
            }
        }
    }
}

async fn export(grpc: &mut Grpc<Client>, request: Request, metrics: &SpanMetrics) -> Result<Response, Status> {
    metrics.requests.inc();
    let call = async {
        grpc.ready().await?;
        let codec = tonic_prost::ProstCodec::default();
        grpc.unary(tonic::Request::new(request), PathAndQuery::from_static(EXPORT), codec).await
    };
    match time::timeout(EXPORT_LIMIT, call).await {
        Ok(result) => result.map(tonic::Response::into_inner),
        Err(_) => Err(Status::deadline_exceeded(format!("no answer within {EXPORT_LIMIT:?}"))),
    }
}

/// Spans, gathered.
struct Batches {
    spans: mpsc::Receiver<Box<Span>>,
    /// When the last batch went out.
    last: Option<Instant>,
}

impl Batches {
    /// The next batch, never empty; none once there can be no more spans.
    async fn next(&mut self) -> Option<Vec<OtlpSpan>> {
        let first = self.spans.recv().await?;
        let lingered = Instant::now() + LINGER;
        let due = self.last.map_or(lingered, |last| lingered.max(last + INTERVAL));
        let mut batch = vec![OtlpSpan::from(&*first)];
        let mut bytes = batch[0].encoded_len();
        while batch.len() < MAX_BATCH && bytes < MAX_BATCH_BYTES {
            let Ok(Some(span)) = time::timeout_at(due, self.spans.recv()).await else { break };
            let span = OtlpSpan::from(&*span);
            bytes += span.encoded_len();
            batch.push(span);
        }
        Some(batch)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::{
        Direction,
        trace::{SpanKind, Tracer},
    };

    fn request(path: &str) -> http::Request<()> {
        let context = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        http::Request::get(path).header("traceparent", context).body(()).unwrap()
    }

    fn send(tracer: &Tracer, n: usize) {
        for _ in 0..n {
            let span = tracer.begin(Direction::Inbound, SpanKind::Server, &mut request("/"));
            span.unwrap().answered(http::StatusCode::OK);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn batches_are_bounded_in_time_and_number() {
        let tracer = Tracer::default();
        let mut batches = Batches { spans: tracer.start(Arc::default()).unwrap(), last: None };
        let start = Instant::now();
        // After a quiet time soon, then at intervals.
        for (spans, elapsed) in [(2, 1), (3, 11), (1, 21)] {
            send(&tracer, spans);
            assert_eq!(batches.next().await.unwrap().len(), spans);
            batches.last = Some(Instant::now());
            assert_eq!(start.elapsed(), Duration::from_secs(elapsed));
        }
        // A full one at once.
        let filling = tokio::spawn(async move {
            for _ in 0..MAX_BATCH / 100 + 1 {
                send(&tracer, 100);
                tokio::task::yield_now().await;
                time::sleep(Duration::from_millis(1)).await;
            }
            tracer
        });
        assert_eq!(batches.next().await.unwrap().len(), MAX_BATCH);
        assert!(start.elapsed() < Duration::from_secs(22));
        drop(filling.await.unwrap());
        assert_eq!(batches.next().await.unwrap().len(), 100);
        assert!(batches.next().await.is_none());
    }
}
