//! Events as they are told (the messages of linkerd2-proxy-api).

use super::{About, Labels};
use crate::telemetry::Direction;
use http::{HeaderMap, Request, Response, Version};
use linkerd2_proxy_api::{
    http_types::{self, headers::Header},
    tap::{
        Eos, TapEvent,
        observe_request::{Extract, extract},
        tap_event::{
            self, EndpointMeta, ProxyDirection, RouteMeta,
            http::{Event, RequestInit, ResponseEnd, ResponseInit, StreamId},
        },
    },
};
use std::time::Duration;
use tokio::time::Instant;

/// An exchange that somebody sees.
pub(super) struct Seen {
    about: About,
    id: StreamId,
    pub(super) start: Instant,
}

/// Whether headers and trailers are asked for.
pub(super) fn wants_headers(extract: Option<&Extract>) -> bool {
    match extract.and_then(|extract| extract.extract.as_ref()) {
        Some(extract::Extract::Http(http)) => matches!(http.extract, Some(extract::http::Extract::Headers(_))),
        None => false,
    }
}

impl Seen {
    pub(super) fn new(base: u32, stream: u64, about: About) -> Self {
        Self { about, id: StreamId { base, stream }, start: Instant::now() }
    }

    pub(super) fn request<B>(&self, req: &Request<B>, with_headers: bool) -> TapEvent {
        let uri = req.uri();
        let authority = uri.authority().map(ToString::to_string).unwrap_or_default();
        let pseudo = || {
            [
                (":method", req.method().to_string()),
                (":scheme", uri.scheme_str().unwrap_or_default().to_string()),
                (":authority", authority.clone()),
                (":path", uri.path_and_query().map(ToString::to_string).unwrap_or_default()),
            ]
        };
        let pseudo = (with_headers && req.version() == Version::HTTP_2).then(pseudo);
        self.event(Event::RequestInit(RequestInit {
            id: Some(self.id),
            method: Some(req.method().clone().into()),
            scheme: uri.scheme().map(Into::into),
            headers: with_headers.then(|| headers(pseudo.into_iter().flatten(), req.headers())),
            path: uri.path().to_string(),
            authority,
        }))
    }

    pub(super) fn response<B>(&self, rsp: &Response<B>, now: Instant, with_headers: bool) -> TapEvent {
        let status = rsp.status();
        let pseudo = (rsp.version() == Version::HTTP_2).then(|| (":status", status.as_str().to_string()));
        self.event(Event::ResponseInit(ResponseInit {
            id: Some(self.id),
            since_request_init: duration(now.duration_since(self.start)),
            http_status: status.as_u16().into(),
            headers: with_headers.then(|| headers(pseudo.into_iter(), rsp.headers())),
        }))
    }

    /// `response` is when the response began, if it did.
    pub(super) fn end(
        &self,
        response: Option<Instant>,
        response_bytes: u64,
        eos: Option<Eos>,
        trailers: Option<&HeaderMap>,
    ) -> TapEvent {
        let now = Instant::now();
        self.event(Event::ResponseEnd(ResponseEnd {
            id: Some(self.id),
            since_request_init: duration(now.duration_since(self.start)),
            since_response_init: response.and_then(|response| duration(now.duration_since(response))),
            response_bytes,
            eos,
            trailers: trailers.map(|trailers| headers(std::iter::empty(), trailers)),
        }))
    }

    fn event(&self, event: Event) -> TapEvent {
        let About { direction, source, source_labels, destination, destination_labels, route_labels } = &self.about;
        let meta = |labels: &Labels| Some(EndpointMeta { labels: labels.clone() });
        TapEvent {
            source: source.map(Into::into),
            source_meta: meta(source_labels),
            destination: Some((*destination).into()),
            destination_meta: meta(destination_labels),
            route_meta: Some(RouteMeta { labels: route_labels.clone() }),
            proxy_direction: match direction {
                Direction::Inbound => ProxyDirection::Inbound.into(),
                Direction::Outbound => ProxyDirection::Outbound.into(),
            },
            event: Some(tap_event::Event::Http(tap_event::Http { event: Some(event) })),
        }
    }
}

fn headers(pseudo: impl Iterator<Item = (&'static str, String)>, map: &HeaderMap) -> http_types::Headers {
    let pseudo = pseudo.map(|(name, value)| (name, value.into_bytes()));
    let plain = map.iter().map(|(name, value)| (name.as_str(), value.as_bytes().to_vec()));
    let headers = pseudo.chain(plain).map(|(name, value)| Header { name: name.to_string(), value });
    http_types::Headers { headers: headers.collect() }
}

fn duration(d: Duration) -> Option<prost_types::Duration> {
    d.try_into().ok()
}
