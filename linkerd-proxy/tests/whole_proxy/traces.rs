//! Spans of a request's way through two proxies, at a fake collector.

use crate::{
    apps,
    control_plane::frame,
    net::Pod,
    world::{World, service},
};
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode};
use http_body_util::{BodyExt, StreamBody};
use hyper::{body::Frame, body::Incoming, service::service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo};
use prost::Message;
use std::{
    collections::BTreeMap,
    convert::Infallible,
    net::SocketAddr,
    sync::{Arc, Mutex},
};

const WEB: ([u8; 4], u16) = ([10, 96, 0, 10], 80);
const PORT: u16 = 4317;
const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";

/// OTLP, as far as it is looked at.
#[derive(Clone, PartialEq, Message)]
struct Export {
    #[prost(message, repeated, tag = "1")]
    resources: Vec<ResourceSpans>,
}

#[derive(Clone, PartialEq, Message)]
struct ResourceSpans {
    #[prost(message, optional, tag = "1")]
    resource: Option<Attributes>,
    #[prost(message, repeated, tag = "2")]
    scopes: Vec<ScopeSpans>,
}

#[derive(Clone, PartialEq, Message)]
struct ScopeSpans {
    #[prost(message, repeated, tag = "2")]
    spans: Vec<Span>,
}

#[derive(Clone, PartialEq, Message)]
struct Attributes {
    #[prost(message, repeated, tag = "1")]
    attributes: Vec<KeyValue>,
}

#[derive(Clone, PartialEq, Message)]
struct Span {
    #[prost(bytes = "vec", tag = "1")]
    trace_id: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    span_id: Vec<u8>,
    #[prost(bytes = "vec", tag = "4")]
    parent_span_id: Vec<u8>,
    #[prost(string, tag = "5")]
    name: String,
    #[prost(int32, tag = "6")]
    kind: i32,
    #[prost(message, repeated, tag = "9")]
    attributes: Vec<KeyValue>,
}

#[derive(Clone, PartialEq, Message)]
struct KeyValue {
    #[prost(string, tag = "1")]
    key: String,
    #[prost(message, optional, tag = "2")]
    value: Option<AnyValue>,
}

#[derive(Clone, PartialEq, Message)]
struct AnyValue {
    #[prost(string, tag = "1")]
    text: String,
    #[prost(int64, tag = "3")]
    number: i64,
}

/// What the proxies of all pods exported: spans with the `service.name` of their resource.
#[derive(Clone, Default)]
struct Collector(Arc<Mutex<Vec<(String, Span)>>>);

impl Collector {
    /// Serves on a pod's loopback and other addresses.
    fn serve(&self, pod: &Pod) {
        let (listener, all) = (pod.listen(PORT), self.clone());
        tokio::spawn(async move {
            loop {
                let Ok((io, _)) = listener.accept().await else { continue };
                let all = all.clone();
                let service = service_fn(move |req| all.clone().take(req));
                let builder = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
                tokio::spawn(async move { drop(builder.serve_connection(TokioIo::new(io), service).await) });
            }
        });
    }

    async fn take(
        self,
        req: Request<Incoming>,
    ) -> Result<Response<impl hyper::body::Body<Data = bytes::Bytes, Error = Infallible>>, Infallible> {
        assert_eq!(req.uri().path(), "/opentelemetry.proto.collector.trace.v1.TraceService/Export");
        let message = req.into_body().collect().await.unwrap().to_bytes().slice(5..);
        for of in Export::decode(message).unwrap().resources {
            let attributes = texts(&of.resource.unwrap().attributes);
            assert!(attributes.contains_key("process.pid") && attributes.contains_key("process.start_timestamp"));
            assert_eq!(attributes["team"], "shop");
            let name = &attributes["service.name"];
            let spans = of.scopes.into_iter().flat_map(|scope| scope.spans);
            self.0.lock().unwrap().extend(spans.map(|span| (name.clone(), span)));
        }
        let trailers = HeaderMap::from_iter([("grpc-status".parse().unwrap(), HeaderValue::from_static("0"))]);
        let frames = [Ok(frame(&[])), Ok(Frame::trailers(trailers))];
        let mut rsp = Response::new(StreamBody::new(futures_util::stream::iter(frames)));
        rsp.headers_mut().insert("content-type", HeaderValue::from_static("application/grpc"));
        Ok(rsp)
    }

    fn spans(&self) -> Vec<(String, Span)> {
        self.0.lock().unwrap().clone()
    }
}

fn texts(attributes: &[KeyValue]) -> BTreeMap<String, String> {
    let text = |value: &AnyValue| if value.text.is_empty() { value.number.to_string() } else { value.text.clone() };
    attributes.iter().map(|kv| (kv.key.clone(), text(kv.value.as_ref().unwrap()))).collect()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sampled_trace_gets_two_spans_from_each_proxy() {
    let Some(mut world) = World::new("traces") else { return };
    let client = world.meshed("client", &[], &[]);
    let server = world.meshed("server", &[("http", 8080)], &[]);
    world.manifest("web", &service("web", "server", &["10.96.0.10"], &[("http", 80, "http", None)]));
    let collector = Collector::default();
    let addr = format!("localhost.:{PORT}");
    for pod in [&client, &server] {
        collector.serve(pod);
        let env = [
            ("LINKERD2_PROXY_TRACE_COLLECTOR_SVC_ADDR", &*addr),
            ("LINKERD2_PROXY_TRACE_SERVICE_NAME", &pod.name),
            ("LINKERD2_PROXY_TRACE_EXTRA_ATTRIBUTES", "team=shop"),
        ];
        world.spawn(&pod.name, &env);
    }
    world.wait_ready("client").await;
    world.wait_ready("server").await;
    let _app = apps::http(&server, 8080, "server");
    let get = async |flags: &str| {
        let context = format!("00-{TRACE}-b7ad6b7169203331-{flags}");
        let answer = apps::get(&client, SocketAddr::from(WEB), "/headers/cart?id=7", &[("traceparent", &context)])
            .await
            .unwrap();
        assert_eq!(answer.status, StatusCode::OK);
        let seen = answer.body.lines().find_map(|line| line.strip_prefix("traceparent: "));
        seen.expect("a context").to_string()
    };
    let unsampled = get("00").await;
    assert!(unsampled.starts_with(&format!("00-{TRACE}-")) && unsampled.ends_with("-00"), "{unsampled}");
    assert!(!unsampled.contains("b7ad6b7169203331"), "{unsampled}");
    let seen = get("01").await;
    world.eventually("the spans are there", async || collector.spans().len() >= 4).await;
    let spans = collector.spans();
    assert_eq!(spans.len(), 4, "{spans:?}");

    // From the application back to the client, each the parent of the one before.
    let mut id = seen.split('-').nth(2).unwrap().to_string();
    for (proxy, direction, kind) in
        [("server", "inbound", 3), ("server", "inbound", 2), ("client", "outbound", 3), ("client", "outbound", 2)]
    {
        let (name, span) = spans.iter().find(|(_, span)| hex(&span.span_id) == id).expect("a span of the chain");
        let told = texts(&span.attributes);
        assert_eq!((&**name, &*told["direction"], span.kind), (proxy, direction, kind), "{spans:?}");
        assert_eq!((hex(&span.trace_id), &*span.name), (TRACE.to_string(), "/headers/cart"));
        for (key, value) in [
            ("http.request.method", "GET"),
            ("http.response.status_code", "200"),
            ("url.query", "id=7"),
            ("url.full", "http://web.shop.svc.cluster.local/headers/cart?id=7"),
            ("server.address", "web.shop.svc.cluster.local"),
        ] {
            assert_eq!(told[key], value, "{told:?}");
        }
        // On the wire between the proxies HTTP/1 is carried by HTTP/2.
        let carried = matches!((proxy, kind), ("client", 3) | ("server", 2));
        assert_eq!(told.contains_key("http.request.header.l5d-orig-proto"), carried, "{told:?}");
        id = hex(&span.parent_span_id);
    }
    assert_eq!(id, "b7ad6b7169203331");
    assert_eq!(world.metric("client", "opentelemetry_span_exports", &[]).await, 2.0);
    assert!(
        world.metric("client", "opentelemetry_balancer_endpoints", &["\"ready\"", PORT.to_string().as_str()]).await
            >= 1.0
    );
}
