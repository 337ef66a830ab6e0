//! Tap: the operator watches HTTP requests as they pass, each with its response and its end (behaviour.md F.1).
//!
//! Both directions ask [`Taps`] about every request. While nobody taps, that is one relaxed load. A tap never delays what
//! it watches: its events go through a bounded queue, and what finds it full is lost to the tap and counted.

mod event;
mod filter;
mod observed;
mod serve;

#[cfg(test)]
mod tests;

pub use self::{
    observed::{Observed, failed, response},
    serve::Server,
};

use self::{event::Seen, filter::Filter};
use crate::{
    policy::{
        Meta,
        authz::{ClientTls, NoTls},
    },
    telemetry::Direction,
};
use arc_swap::ArcSwap;
use http::Request;
use linkerd_tls::Id;
use linkerd2_proxy_api::tap::{ObserveRequest, TapEvent};
use parking_lot::Mutex;
use std::{
    collections::{BTreeMap, HashMap},
    net::SocketAddr,
    pin::Pin,
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::Relaxed},
    },
    task::{Context, Poll},
};
use tokio::sync::mpsc;
use tonic::Status;

/// Taps at a time. An operator's tool opens one to each proxy; each costs every request a look at its conditions.
const MAX_TAPS: usize = 16;

/// Events that wait for one tap's connection (behaviour.md F.1).
const MAX_EVENTS: usize = 400;

/// Those who tap. Clones are the same.
#[derive(Clone, Debug, Default)]
pub struct Taps(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    /// Whether there is any tap; what requests look at.
    any: AtomicBool,
    taps: ArcSwap<Vec<Arc<Tap>>>,
    /// Held while the list changes.
    changing: Mutex<()>,
    /// Tells the streams of this process from those of others.
    base: u32,
    streams: AtomicU64,
}

/// One request to observe.
#[derive(Debug)]
struct Tap {
    filter: Filter,
    /// Whether events carry headers.
    headers: bool,
    /// Requests that may still be taken.
    left: AtomicU32,
    events: mpsc::Sender<TapEvent>,
    /// Events that found the queue full.
    lost: AtomicU64,
}

/// What there is to know about an exchange beside its messages.
#[derive(Clone, Debug)]
pub struct About {
    /// Which half of the proxy.
    pub direction: Direction,
    /// Who asks; unknown for what a gateway passes on.
    pub source: Option<SocketAddr>,
    /// What is known of them.
    pub source_labels: Labels,
    /// The replica that is asked.
    pub destination: SocketAddr,
    /// What is known of it.
    pub destination_labels: Labels,
    /// The route that was taken.
    pub route_labels: Labels,
}

/// Labels by name.
pub type Labels = HashMap<String, String>;

/// The client of a request, for those who tap; an extension of outbound requests.
#[derive(Copy, Clone, Debug)]
pub struct Source(pub SocketAddr);

/// The labels of the ServiceProfile's route that a request is on; an extension of outbound requests.
#[derive(Clone, Debug)]
pub struct Route(pub Arc<BTreeMap<Arc<str>, Arc<str>>>);

impl Default for Inner {
    fn default() -> Self {
        Self {
            any: AtomicBool::new(false),
            taps: ArcSwap::default(),
            changing: Mutex::default(),
            base: rand::random(),
            streams: AtomicU64::new(0),
        }
    }
}

impl Taps {
    /// Whether somebody taps.
    pub fn any(&self) -> bool {
        self.0.any.load(Relaxed)
    }

    /// Shows a request to those who want to see it; none if nobody does. `about` is asked only while somebody taps.
    pub fn request<B>(&self, req: &Request<B>, about: impl FnOnce() -> About) -> Option<Observed> {
        if !self.any() {
            return None;
        }
        let about = about();
        let takers: Vec<_> = self.0.taps.load().iter().filter(|tap| self.take(tap, req, &about)).cloned().collect();
        if takers.is_empty() {
            return None;
        }
        let stream = self.0.streams.fetch_add(1, Relaxed);
        Some(Observed::new(takers, Seen::new(self.0.base, stream, about), req))
    }

    /// Whether a tap takes a request. One that has taken its last is done.
    fn take<B>(&self, tap: &Arc<Tap>, req: &Request<B>, about: &About) -> bool {
        if !tap.filter.matches(req, about) {
            return false;
        }
        let left = tap.left.fetch_update(Relaxed, Relaxed, |left| left.checked_sub(1));
        if left == Ok(1) {
            self.remove(tap);
        }
        left.is_ok()
    }

    /// Begins to tap. The events end when as many requests as asked for have ended; dropping them ends the tap.
    ///
    /// # Errors
    /// `InvalidArgument` for requests that make no sense, `ResourceExhausted` if there are too many taps.
    fn observe(&self, req: ObserveRequest) -> Result<Events, Status> {
        if req.limit == 0 {
            return Err(Status::invalid_argument("limit must be positive"));
        }
        let wanted = req.r#match.ok_or_else(|| Status::invalid_argument("match is missing"))?;
        let filter = Filter::try_from(wanted).map_err(|why| Status::invalid_argument(why.to_string()))?;
        let headers = event::wants_headers(req.extract.as_ref());
        let (events, queue) = mpsc::channel(MAX_EVENTS);
        let tap = Arc::new(Tap { filter, headers, left: AtomicU32::new(req.limit), events, lost: AtomicU64::new(0) });
        let _changing = self.0.changing.lock();
        let mut taps = Vec::clone(&self.0.taps.load());
        if taps.len() >= MAX_TAPS {
            return Err(Status::resource_exhausted(format!("{MAX_TAPS} others tap already; end one of them")));
        }
        taps.push(tap.clone());
        self.set(taps);
        Ok(Events { queue, tap: Arc::downgrade(&tap), taps: self.clone() })
    }

    fn remove(&self, tap: &Arc<Tap>) {
        let _changing = self.0.changing.lock();
        let mut taps = Vec::clone(&self.0.taps.load());
        taps.retain(|other| !Arc::ptr_eq(other, tap));
        self.set(taps);
    }

    /// Only while `changing` is held.
    fn set(&self, taps: Vec<Arc<Tap>>) {
        let any = !taps.is_empty();
        self.0.taps.store(Arc::new(taps));
        self.0.any.store(any, Relaxed);
    }
}

impl Tap {
    fn tell(&self, event: TapEvent) {
        if let Err(mpsc::error::TrySendError::Full(_)) = self.events.try_send(event) {
            self.lost.fetch_add(1, Relaxed);
        }
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        let lost = *self.lost.get_mut();
        if lost > 0 {
            tracing::info!(lost, "a tap's connection was slower than its requests; events were lost");
        }
    }
}

/// The events of one tap.
struct Events {
    queue: mpsc::Receiver<TapEvent>,
    /// Not held: the queue ends when the last who could fill it is gone.
    tap: Weak<Tap>,
    taps: Taps,
}

impl futures_util::Stream for Events {
    type Item = Result<TapEvent, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.queue.poll_recv(cx).map(|event| event.map(Ok))
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        if let Some(tap) = self.tap.upgrade() {
            self.taps.remove(&tap);
        }
    }
}

impl About {
    /// A request to the local application.
    pub fn inbound(client: SocketAddr, tls: &ClientTls, target: SocketAddr) -> Self {
        let mut source_labels = Labels::new();
        match tls {
            ClientTls::Terminated(id) => {
                with_tls(&mut source_labels, Ok(()));
                source_labels.extend(id.as_ref().map(|id| ("client_id".to_string(), id.to_string())));
            }
            ClientTls::Passthru { .. } => with_tls(&mut source_labels, Err(NoTls::NoTlsFromRemote)),
            ClientTls::None(why) => with_tls(&mut source_labels, Err(*why)),
        }
        let mut destination_labels = Labels::new();
        with_tls(&mut destination_labels, Err(NoTls::Loopback));
        Self {
            direction: Direction::Inbound,
            source: Some(client),
            source_labels,
            destination: target,
            destination_labels,
            route_labels: Labels::new(),
        }
    }

    /// A request of the local application. `labels` are those that discovery gives the replica.
    pub fn outbound<'a>(
        source: Option<SocketAddr>,
        replica: SocketAddr,
        tls: Result<&Id, NoTls>,
        labels: impl Iterator<Item = (&'a Arc<str>, &'a Arc<str>)>,
    ) -> Self {
        let mut source_labels = Labels::new();
        with_tls(&mut source_labels, Err(NoTls::Loopback));
        let mut destination_labels: Labels = labels.map(|(key, value)| (key.to_string(), value.to_string())).collect();
        with_tls(&mut destination_labels, tls.map(|_| ()));
        destination_labels.extend(tls.ok().map(|id| ("server_id".to_string(), id.to_string())));
        Self {
            direction: Direction::Outbound,
            source,
            source_labels,
            destination: replica,
            destination_labels,
            route_labels: Labels::new(),
        }
    }

    /// Adds the labels of the route that was taken.
    pub fn on_route(self, labels: Option<&BTreeMap<Arc<str>, Arc<str>>>) -> Self {
        let labels = labels.into_iter().flatten().map(|(key, value)| (key.to_string(), value.to_string()));
        Self { route_labels: labels.collect(), ..self }
    }

    /// Adds group, kind and name of a resource to what is known of the destination, as `<what>_group` and so on.
    pub fn caused_by(mut self, what: &str, meta: &Meta) -> Self {
        for (part, value) in [("group", meta.group()), ("kind", meta.kind()), ("name", meta.name())] {
            self.destination_labels.insert(format!("{what}_{part}"), value.to_string());
        }
        self
    }
}

fn with_tls(labels: &mut Labels, tls: Result<(), NoTls>) {
    let status = tls.err().map_or("true", NoTls::as_str);
    labels.insert("tls".to_string(), status.to_string());
}
