//! ServiceProfiles of the names that requests are for. Inbound never routes by them: they judge responses and label
//! `route_*` metrics (behaviour.md C.12, metrics.md 5.4).

use crate::{
    config::Suffixes,
    http::classify::Rule,
    policy::{
        Source,
        client::{Profile, RequestCondition},
    },
    tap,
    telemetry::{Direction, ProfileRouteLabels, ProfileRouteMetrics, Telemetry},
};
use ::http::Request;
use arc_swap::ArcSwapOption;
use linkerd_stack::{
    Ready,
    cache::{Cache, Cached},
};
use std::{sync::Arc, time::Duration};
use tokio::{task::AbortHandle, time};

/// Names whose profiles are kept. A client can ask for any number of them.
const MAX_NAMES: usize = 1024;

/// Port of a name that says none.
const HTTP_PORT: u16 = 80;

/// The profiles in use.
pub(super) struct Profiles {
    source: Arc<dyn Source>,
    suffixes: Suffixes,
    patience: Duration,
    telemetry: Telemetry,
    names: Cache<(String, u16), Name>,
}

/// A name in use, with its profile if it has one.
pub(super) type NameRef = Cached<Name>;

/// A name and what is known of its profile.
pub(super) struct Name {
    routes: Arc<ArcSwapOption<Vec<Route>>>,
    /// Set once the source has answered, or was waited for in vain.
    settled: Ready,
    follow: Option<AbortHandle>,
}

/// A profile's route, ready for use.
struct Route {
    condition: RequestCondition,
    taken: Taken,
}

/// What a profile's route says of the requests on it.
#[derive(Clone)]
pub(super) struct Taken {
    /// How responses are judged, if it says.
    pub(super) rule: Option<Rule>,
    /// Where they are counted.
    pub(super) metrics: Arc<ProfileRouteMetrics>,
    /// What those who tap are told of it.
    pub(super) labels: tap::Route,
}

impl Profiles {
    /// Profiles of names that end in one of `suffixes`. The first request for a name waits for at most `patience`.
    pub(super) fn new(
        source: Arc<dyn Source>,
        suffixes: Suffixes,
        patience: Duration,
        idle: Duration,
        telemetry: Telemetry,
    ) -> Self {
        Self { source, suffixes, patience, telemetry, names: Cache::new(idle, MAX_NAMES) }
    }

    /// Whether there are no names at all whose profiles are looked up.
    pub(super) fn is_off(&self) -> bool {
        self.suffixes.0.is_empty()
    }

    /// The profile of `host[:port]`; none where profiles are not looked up.
    pub(super) async fn of(&self, logical: &str) -> Option<NameRef> {
        let (host, port) = match logical.rsplit_once(':') {
            Some((host, port)) => (host, port.parse().ok()?),
            None => (logical, HTTP_PORT),
        };
        if !self.suffixes.matches(host) {
            return None;
        }
        let name = self.names.get_or_insert_with((host.to_string(), port), |(host, port)| self.follow(host, *port));
        if !name.settled.get() {
            let _ = time::timeout(self.patience, name.settled.wait()).await;
            name.settled.set(true);
        }
        Some(name)
    }

    fn follow(&self, host: &str, port: u16) -> Name {
        let routes: Arc<ArcSwapOption<Vec<Route>>> = Arc::default();
        let Some(mut rx) = self.source.watch_service_profile(host, port) else {
            return Name { routes, settled: Ready::new(true), follow: None };
        };
        let settled = Ready::new(false);
        let task = tokio::spawn({
            let (routes, settled, telemetry) = (routes.clone(), settled.clone(), self.telemetry.clone());
            async move {
                loop {
                    if let Some(profile) = rx.borrow_and_update().clone() {
                        routes.store(Some(Arc::new(prepare(&profile, &telemetry))));
                        settled.set(true);
                    }
                    if rx.changed().await.is_err() {
                        settled.set(true);
                        return;
                    }
                }
            }
        });
        Name { routes, settled, follow: Some(task.abort_handle()) }
    }
}

impl Drop for Name {
    fn drop(&mut self) {
        if let Some(follow) = &self.follow {
            follow.abort();
        }
    }
}

impl Name {
    /// The route of a request; none if no route takes it.
    pub(super) fn route<B>(&self, req: &Request<B>) -> Option<Taken> {
        let routes = self.routes.load();
        routes.as_ref()?.iter().find(|route| holds(&route.condition, req)).map(|route| route.taken.clone())
    }
}

fn prepare(profile: &Profile, telemetry: &Telemetry) -> Vec<Route> {
    let routes = profile.routes.iter().map(|route| Route {
        condition: route.condition.clone(),
        taken: Taken {
            rule: (!route.classes.is_empty()).then(|| Rule::Profile(route.classes.clone().into())),
            metrics: telemetry.profile_route(ProfileRouteLabels {
                direction: Direction::Inbound,
                dst: profile.addr.clone(),
                labels: route.labels.iter().map(|(key, value)| (key.clone(), value.clone())).collect(),
            }),
            labels: tap::Route(Arc::new(route.labels.clone())),
        },
    });
    routes.collect()
}

fn holds<B>(condition: &RequestCondition, req: &Request<B>) -> bool {
    match condition {
        RequestCondition::All(all) => all.iter().all(|condition| holds(condition, req)),
        RequestCondition::Any(any) => any.iter().any(|condition| holds(condition, req)),
        RequestCondition::Not(not) => !holds(not, req),
        RequestCondition::Path(path) => path.is_match(req.uri().path()),
        RequestCondition::Method(method) => method == req.method(),
    }
}
