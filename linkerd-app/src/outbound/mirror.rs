//! Copies of requests to other backends, whose answers nobody waits for (resources.md 3.7).

use super::{
    concrete::Concrete,
    endpoint::HttpEndpoint,
    limits::{Expired, Progress},
    rule::{is_upgrade, send},
    tracked::Outgoing,
};
use crate::{error::Cause, http::Asked, policy::route::Ratio};
use http::Request;
use http_body::Body as _;
use linkerd_stack::http::Body;
use std::{pin::pin, sync::Arc, time::Duration};
use tokio::{sync::Semaphore, time::Instant};

/// Longest exchange with a mirror; nobody waits for it, so nobody else would end it.
const MIRROR_TIMEOUT: Duration = Duration::from_secs(60);

/// Mirrored requests in flight per rule; more are not copied.
pub(super) const MIRRORS_IN_FLIGHT: usize = 1_000;

/// Where copies of requests go.
pub(super) struct Mirroring {
    pub(super) ratio: Ratio,
    pub(super) concrete: Arc<Concrete<HttpEndpoint>>,
    pub(super) in_flight: Arc<Semaphore>,
}

/// Sends copies on their way. Their answers are read to the end and forgotten; a copy that finds no room is not made.
pub(super) fn mirror(mirrors: &[Mirroring], req: &mut Request<Body>, asked: &Asked) {
    for mirror in mirrors {
        if !mirror.ratio.draw(crate::http::random) || is_upgrade(req) {
            continue;
        }
        let Ok(permit) = mirror.in_flight.clone().try_acquire_owned() else { continue };
        let body = if req.body().is_end_stream() {
            Body::empty()
        } else {
            let now = Instant::now();
            let mut tee = Outgoing::new(std::mem::take(req.body_mut()), Progress::new(now), None);
            let copy = tee.mirror();
            *req.body_mut() = Body::new(tee);
            copy
        };
        let mut copy = Request::new(body);
        *copy.method_mut() = req.method().clone();
        *copy.uri_mut() = req.uri().clone();
        *copy.version_mut() = req.version();
        *copy.headers_mut() = req.headers().clone();
        let (concrete, asked) = (mirror.concrete.clone(), *asked);
        tokio::spawn(async move {
            let _permit = permit;
            let Concrete::Replicas(replicas) = &*concrete else { return };
            let expired = Expired::default();
            let mut exchange = pin!(async {
                let Ok((_, rsp)) = send(replicas, None, copy, &asked, &expired).await else { return };
                let mut body = pin!(rsp.into_body());
                while let Some(Ok(_)) = std::future::poll_fn(|cx| body.as_mut().poll_frame(cx)).await {}
            });
            // Late answers are given up.
            if tokio::time::timeout(MIRROR_TIMEOUT, exchange.as_mut()).await.is_err() {
                expired.set(Some(Cause::RequestTimeout(MIRROR_TIMEOUT)));
            }
        });
    }
}
