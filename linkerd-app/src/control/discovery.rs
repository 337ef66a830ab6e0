//! Policies of destinations (behaviour.md D.1 to D.3): a profile and an outbound policy become one client policy.
//!
//! Both are asked for at the same time and both must have answered before anything is known. From then on each update of
//! either changes the one policy. [`merge`] is the whole rule and has no side effects.

use super::{
    convert::{
        Invalid, meta, outbound,
        profile::{self, Profile},
    },
    stream::{self, Event, Subscription},
};
use crate::policy::{
    ClientPolicy, DiscoveryError, Endpoint, Meta, Target,
    client::{
        Backend, Breaker, Dispatcher, Distribution, Http, Load, Opaque, Profile as ProfileRoutes, Protocol, Route,
        RouteBackend, Routes, Rule, TcpRoute,
    },
    route::Precedence,
};
use linkerd2_proxy_api::{destination, outbound as api};
use std::{sync::Arc, time::Duration};
use tokio::{
    sync::{oneshot, watch},
    time::{self, Instant},
};
use tonic::{Code, Status};

/// How long a new destination is looked up before the connection fails. The original waits without end; ten seconds
/// are longer than a control plane's restart behind several replicas takes, and shorter than clients' patience.
pub(crate) const LOOKUP_LIMIT: Duration = Duration::from_secs(10);

/// One look-up.
pub(super) struct Discovery {
    pub(super) target: Target,
    pub(super) policy: Subscription<api::OutboundPolicy>,
    /// None if profiles are not asked for this target.
    pub(super) profile: Option<Subscription<destination::DestinationProfile>>,
    /// Limit on protocol detection where no policy names one.
    pub(super) detect_timeout: Duration,
    /// What keeps the control plane from being reached, if something does.
    pub(super) trouble: Box<dyn Fn() -> Option<Arc<str>> + Send + Sync>,
}

type Answer = Result<watch::Receiver<Arc<ClientPolicy>>, DiscoveryError>;

/// What is known of a policy.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Policy {
    /// The controller's.
    Known(Meta, Protocol),
    /// The controller has none.
    Absent,
    /// The controller's, but it can't be understood.
    Invalid(Arc<str>),
}

/// Why no policy can be made.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct NothingKnown;

impl Discovery {
    /// Answers once, and then keeps the policy up to date until nobody follows it.
    pub(super) async fn run(mut self, answer: oneshot::Sender<Answer>) {
        let deadline = Instant::now() + LOOKUP_LIMIT;
        let mut state = State::default();
        if self.profile.is_none() {
            state.profile = Some(None);
            state.profile_over = true;
        }
        // The first answers.
        while state.policy.is_none() || state.profile.is_none() {
            tokio::select! {
                biased;
                result = self.step(&mut state) => if let Err(refused) = result {
                    let _ = answer.send(Err(refused));
                    return;
                },
                () = time::sleep_until(deadline) => {
                    let _ = answer.send(Err(self.unavailable(&state)));
                    return;
                }
            }
        }
        let Ok(first) = self.merged(&state) else {
            let reason = "the control plane knows neither a policy nor a profile".into();
            let _ = answer.send(Err(DiscoveryError::Refused { target: self.target, reason }));
            return;
        };
        let (policy, rx) = watch::channel(Arc::new(first));
        if answer.send(Ok(rx)).is_err() {
            return;
        }
        // Everything after.
        while !(state.policy_over && state.profile_over) {
            tokio::select! {
                () = policy.closed() => return,
                // A refusal can't come any more: once there was an answer, it stays in force.
                _ = self.step(&mut state) => if let Ok(merged) = self.merged(&state) {
                    policy.send_if_modified(|current| {
                        let changed = **current != merged;
                        if changed {
                            *current = Arc::new(merged);
                        }
                        changed
                    });
                }
            }
        }
        // Nothing will change any more; the records stay visible while the policy is in use.
        policy.closed().await;
    }

    fn merged(&self, state: &State) -> Result<ClientPolicy, NothingKnown> {
        let profile = state.profile.as_ref().and_then(Option::as_ref);
        let broken = state.broken_profile.clone().map(Policy::Invalid);
        let policy = broken.as_ref().or(state.policy.as_ref()).unwrap_or(&Policy::Absent);
        merge(&self.target, policy, profile, self.detect_timeout)
    }

    /// The next event of either watch. Err: the control plane refuses the target.
    async fn step(&mut self, state: &mut State) -> Result<(), DiscoveryError> {
        let profile = async {
            match &mut self.profile {
                Some(profile) if !state.profile_over => profile.next().await,
                _ => std::future::pending().await,
            }
        };
        tokio::select! {
            event = self.policy.next(), if !state.policy_over => match event {
                Event::Message { message, .. } => {
                    let metadata = message.metadata.clone();
                    state.policy = Some(match outbound::policy(message) {
                        Ok((meta, protocol)) => Policy::Known(meta, protocol),
                        Err(invalid) => invalid_policy(&self.target, metadata, &invalid),
                    });
                    Ok(())
                }
                Event::Ended(status) => self.policy_ended(state, &status),
            },
            event = profile => {
                match event {
                    Event::Message { message, .. } => match profile::profile(message) {
                        Ok((found, left_out)) => {
                            for invalid in left_out {
                                tracing::warn!(target = %self.target, error = %invalid, "Part of a profile can't be understood");
                            }
                            state.profile = Some(Some(found));
                            state.broken_profile = None;
                        }
                        Err(invalid) => {
                            tracing::warn!(target = %self.target, error = %invalid, "Profile can't be understood");
                            state.profile.get_or_insert(None);
                            state.broken_profile = Some(format!("invalid profile: {invalid}").into());
                        }
                    },
                    Event::Ended(status) => self.profile_ended(state, &status),
                }
                Ok(())
            }
        }
    }

    fn policy_ended(&self, state: &mut State, status: &Status) -> Result<(), DiscoveryError> {
        match status.code() {
            // A Service that goes keeps its policy, and may come back.
            Code::NotFound if state.policy.is_none() => {
                state.policy = Some(Policy::Absent);
                state.policy_over = true;
            }
            Code::Unimplemented => {
                state.policy.get_or_insert(Policy::Absent);
                state.policy_over = true;
            }
            code if stream::is_final(code) => {
                state.policy_over = true;
                if state.policy.is_some() {
                    return Ok(());
                }
                let reason = stream::describe(status).into();
                return Err(DiscoveryError::Refused { target: self.target.clone(), reason });
            }
            _ => {}
        }
        Ok(())
    }

    fn profile_ended(&self, state: &mut State, status: &Status) {
        match (status.code(), &self.target) {
            (code, _) if stream::is_final(code) => {
                state.profile.get_or_insert(None);
                state.profile_over = true;
            }
            // What the controller says of a name that is no Service (behaviour.md D.1). It is asked again all the
            // same.
            (Code::Unknown, Target::Name(..)) => {
                state.profile.get_or_insert(None);
            }
            _ => {}
        }
    }

    fn unavailable(&self, state: &State) -> DiscoveryError {
        let missing = |record: &super::record::Record| {
            let what = if record.method().contains("Profile") { "profile" } else { "policy" };
            let why = record.last_error().or_else(|| (self.trouble)());
            format!("no {what}: {}", why.as_deref().unwrap_or("the control plane is silent"))
        };
        let reason = match (&state.policy, &self.profile) {
            (Some(_), Some(profile)) => missing(profile.record()),
            _ => missing(self.policy.record()),
        };
        DiscoveryError::Unavailable { target: self.target.clone(), after: LOOKUP_LIMIT, reason: reason.into() }
    }
}

#[derive(Default)]
struct State {
    policy: Option<Policy>,
    /// The inner option: whether the control plane has a profile.
    profile: Option<Option<Profile>>,
    /// Why the latest profile can't be understood.
    broken_profile: Option<Arc<str>>,
    policy_over: bool,
    profile_over: bool,
}

fn invalid_policy(target: &Target, metadata: Option<linkerd2_proxy_api::meta::Metadata>, invalid: &Invalid) -> Policy {
    let parent = metadata.and_then(|metadata| meta::strict(metadata).ok());
    let parent = parent.map_or_else(|| target.to_string(), |parent| parent.to_string());
    tracing::warn!(%target, parent, error = %invalid, "Client policy can't be understood");
    Policy::Invalid(format!("invalid client policy of {parent}: {invalid}").into())
}

/// One policy from both answers.
///
/// # Errors
/// When a name was asked for and neither answer tells where it is: unlike an address, it can't be dialled as it is.
pub(super) fn merge(
    target: &Target,
    policy: &Policy,
    profile: Option<&Profile>,
    detect_timeout: Duration,
) -> Result<ClientPolicy, NothingKnown> {
    let port = match target {
        Target::Addr(addr) => addr.port(),
        Target::Name(_, port) => *port,
    };
    let service = profile.and_then(|profile| profile.name.as_ref()).map(|name| Service::new(name, port));
    let mut merged = match policy {
        Policy::Known(parent, protocol) => {
            ClientPolicy { parent: parent.clone(), protocol: protocol.clone(), logical: None, rate_limit: None }
        }
        Policy::Absent => synthesize(target, profile, service.as_ref(), detect_timeout)?,
        Policy::Invalid(why) => ClientPolicy {
            parent: Meta::default("invalid"),
            protocol: Protocol::Invalid(why.clone()),
            logical: None,
            rate_limit: None,
        },
    };
    merged.logical = match (&service, target) {
        (Some(service), _) => Some(service.addr.clone()),
        (None, Target::Name(name, port)) => Some(format!("{name}:{port}").into()),
        (None, Target::Addr(_)) => None,
    };
    let Some(profile) = profile else { return Ok(merged) };
    if profile.opaque {
        merged.protocol = to_opaque(merged.protocol, target, service.as_ref());
    }
    // A profile of a single endpoint has no service to route for.
    if let (Some(service), None) = (service, &profile.endpoint)
        && !(profile.routes.is_empty() && profile.overrides.is_empty())
    {
        merged.protocol = put_in_force(merged.protocol, profile, &service);
    }
    Ok(merged)
}

/// A named service on a port.
struct Service {
    /// `host:port`.
    addr: Arc<str>,
    meta: Meta,
}

impl Service {
    fn new(name: &str, port: u16) -> Self {
        Self { addr: format!("{name}:{port}").into(), meta: meta::service(name, port) }
    }

    /// Balances with the control plane's usual load metric.
    fn balancer(&self) -> Backend {
        let dispatcher = Dispatcher::Balance { discovery: self.addr.clone(), load: Load::default() };
        Backend { meta: self.meta.clone(), dispatcher }
    }
}

/// A policy where the controller has none.
fn synthesize(
    target: &Target,
    profile: Option<&Profile>,
    service: Option<&Service>,
    detect_timeout: Duration,
) -> Result<ClientPolicy, NothingKnown> {
    let forward = |name, endpoint| ClientPolicy::forward(name, endpoint, detect_timeout);
    let mut policy = match (profile, target) {
        (Some(Profile { endpoint: Some(endpoint), .. }), _) => forward("endpoint", endpoint.clone()),
        (Some(_), Target::Addr(addr)) => forward("profile", Endpoint::bare(*addr)),
        (None, Target::Addr(addr)) => forward("fallback", Endpoint::bare(*addr)),
        (_, Target::Name(..)) => {
            let service = service.ok_or(NothingKnown)?;
            balance("profile", service.balancer(), detect_timeout)
        }
    };
    if let Some(parent) = profile.and_then(|profile| profile.parent.as_ref()) {
        policy.parent = parent.clone();
    }
    Ok(policy)
}

/// Detects HTTP and sends everything to one backend.
fn balance(name: &'static str, backend: Backend, timeout: Duration) -> ClientPolicy {
    let meta = Meta::default(name);
    let to = Distribution::FirstAvailable(Arc::new([RouteBackend { filters: Vec::new(), backend: backend.clone() }]));
    let route = Route { meta: meta.clone(), hosts: Vec::new(), rules: vec![Rule::to(to)] };
    let http = Http { routes: Routes::Http(Arc::new([route]), Precedence::Linkerd), breaker: Breaker::None };
    let opaque = opaque_to(meta.clone(), backend);
    let protocol = Protocol::Detect { timeout, http1: http.clone(), http2: http, opaque };
    ClientPolicy { parent: meta, protocol, logical: None, rate_limit: None }
}

fn opaque_to(meta: Meta, backend: Backend) -> Opaque {
    let backends = Distribution::FirstAvailable(Arc::new([RouteBackend { filters: Vec::new(), backend }]));
    Opaque { route: Some(TcpRoute { meta, refuse: None, backends }) }
}

/// The opaque part of a policy whose profile says that connections are opaque.
fn to_opaque(protocol: Protocol, target: &Target, service: Option<&Service>) -> Protocol {
    match protocol {
        Protocol::Detect { opaque, .. } | Protocol::Opaque(opaque) => Protocol::Opaque(opaque),
        Protocol::Invalid(why) => Protocol::Invalid(why),
        // The policy has no opaque part: the two answers disagree, for instance while one of them is late.
        Protocol::Http1(_) | Protocol::Http2(_) | Protocol::Grpc(_) | Protocol::Tls(_) => {
            let meta = Meta::default("profile");
            Protocol::Opaque(match (service, target) {
                (Some(service), _) => opaque_to(meta, service.balancer()),
                (None, Target::Addr(addr)) => {
                    let dispatcher = Dispatcher::Forward(Endpoint::bare(*addr));
                    opaque_to(meta, Backend { meta: Meta::default("unknown"), dispatcher })
                }
                (None, Target::Name(..)) => Opaque { route: None },
            })
        }
    }
}

/// A profile's routes replace those of HTTP; its overrides replace the backends of opaque connections too. TLS stays as
/// the policy has it.
fn put_in_force(protocol: Protocol, profile: &Profile, service: &Service) -> Protocol {
    let over = profile.overrides.iter().map(|over| {
        let dispatcher = Dispatcher::Balance { discovery: over.authority.clone(), load: Load::default() };
        (Backend { meta: over.meta.clone(), dispatcher }, over.weight)
    });
    let over: Vec<_> = over.collect();
    let opaque = |opaque: Opaque| {
        if over.is_empty() {
            return opaque;
        }
        let weighted = over
            .iter()
            .map(|(backend, weight)| (RouteBackend { filters: Vec::new(), backend: backend.clone() }, *weight));
        let backends = Distribution::RandomAvailable(weighted.collect());
        Opaque { route: Some(TcpRoute { meta: Meta::default("profile"), refuse: None, backends }) }
    };
    let targets = if over.is_empty() { vec![(service.balancer(), 1)] } else { over.clone() };
    let routes = Routes::Profile(Arc::new(ProfileRoutes {
        addr: service.addr.clone(),
        routes: profile.routes.clone(),
        budget: profile.budget,
        targets: targets.into(),
    }));
    let http = Http { routes, breaker: Breaker::None };
    match protocol {
        Protocol::Detect { timeout, opaque: bytes, .. } => {
            Protocol::Detect { timeout, http1: http.clone(), http2: http, opaque: opaque(bytes) }
        }
        Protocol::Http1(_) => Protocol::Http1(http),
        Protocol::Http2(_) => Protocol::Http2(http),
        Protocol::Grpc(_) => Protocol::Grpc(http),
        Protocol::Opaque(bytes) => Protocol::Opaque(opaque(bytes)),
        unchanged @ (Protocol::Tls(_) | Protocol::Invalid(_)) => unchanged,
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::{
            convert::{
                destination::tests::weighted,
                outbound::tests as messages,
                profile::{Override, tests::route_for},
            },
            record::Registry,
            tests::{fails, says, settings},
        },
        *,
    };
    use stream::{Call, tests::End};

    const DETECT: Duration = Duration::from_secs(10);

    fn addr() -> Target {
        Target::Addr("10.0.0.1:80".parse().unwrap())
    }

    fn name() -> Target {
        Target::Name("web.shop.svc.cluster.local".into(), 80)
    }

    fn known() -> Policy {
        let (meta, protocol) = outbound::policy(messages::message(None)).unwrap();
        Policy::Known(meta, protocol)
    }

    fn detect() -> Policy {
        let service = Service::new("web.shop.svc.cluster.local", 80);
        let policy = balance("http", service.balancer(), DETECT);
        Policy::Known(policy.parent, policy.protocol)
    }

    fn named() -> Profile {
        Profile { name: Some("web.shop.svc.cluster.local".into()), ..Profile::default() }
    }

    fn with_route() -> Profile {
        let message = destination::DestinationProfile {
            fully_qualified_name: "web.shop.svc.cluster.local".into(),
            routes: vec![route_for("/x")],
            ..Default::default()
        };
        profile::profile(message).unwrap().0
    }

    fn with_overrides() -> Profile {
        let over = |name: &str, weight| Override {
            authority: format!("{name}:80").into(),
            weight,
            meta: meta::service(name, 80),
        };
        Profile { overrides: vec![over("a.shop.svc", 1), over("b.shop.svc", 3)], ..named() }
    }

    #[track_caller]
    fn merged(target: Target, policy: Policy, profile: Option<Profile>) -> ClientPolicy {
        merge(&target, &policy, profile.as_ref(), DETECT).unwrap()
    }

    #[test]
    fn a_policy_stands_beside_a_plain_profile() {
        let found = merged(addr(), known(), Some(named()));
        assert!(matches!(found.protocol, Protocol::Http1(Http { routes: Routes::Http(..), .. })));
        assert_eq!(found.parent.to_string(), "Service.shop.web");
        assert_eq!(found.logical.as_deref(), Some("web.shop.svc.cluster.local:80"));
    }

    #[test]
    fn policies_are_synthesized_where_there_is_none() {
        let endpoint = {
            let labels = std::collections::HashMap::new();
            super::super::convert::destination::endpoint(weighted("10.0.0.1:80"), &labels).unwrap()
        };
        let pod = Profile { endpoint: Some(endpoint), ..Profile::default() };
        assert_eq!(merged(addr(), Policy::Absent, Some(pod)).parent, Meta::default("endpoint"));
        assert_eq!(merged(addr(), Policy::Absent, Some(Profile::default())).parent, Meta::default("profile"));
        assert_eq!(merged(addr(), Policy::Absent, None).parent, Meta::default("fallback"));
        let found = merged(name(), Policy::Absent, Some(named()));
        let Protocol::Detect { opaque, timeout: DETECT, .. } = found.protocol else { panic!() };
        assert!(matches!(opaque.route.unwrap().backends, Distribution::FirstAvailable(b)
            if matches!(&b[0].backend.dispatcher, Dispatcher::Balance { discovery, .. } if &**discovery == "web.shop.svc.cluster.local:80")));
        assert_eq!(merge(&name(), &Policy::Absent, None, DETECT), Err(NothingKnown));
        assert_eq!(merge(&name(), &Policy::Absent, Some(&Profile::default()), DETECT), Err(NothingKnown));
    }

    #[test]
    fn an_opaque_profile_wins() {
        let opaque = || Some(Profile { opaque: true, ..named() });
        assert!(matches!(merged(addr(), detect(), opaque()).protocol, Protocol::Opaque(Opaque { route: Some(_) })));
        // The policy knows only HTTP: bytes go where the service's endpoints are.
        let Protocol::Opaque(Opaque { route: Some(route) }) = merged(addr(), known(), opaque()).protocol else {
            panic!()
        };
        assert_eq!(route.meta, Meta::default("profile"));
        let invalid = merged(addr(), Policy::Invalid("x".into()), opaque());
        assert_eq!(invalid.protocol, Protocol::Invalid("x".into()));
    }

    #[test]
    fn a_profile_with_routes_is_in_force_for_http_alone() {
        let Protocol::Detect { http1, opaque, .. } = merged(addr(), detect(), Some(with_route())).protocol else {
            panic!()
        };
        let Routes::Profile(profile) = http1.routes else { panic!() };
        assert_eq!((&*profile.addr, profile.routes.len()), ("web.shop.svc.cluster.local:80", 1));
        assert_eq!(profile.targets.len(), 1);
        assert_eq!(opaque.route.unwrap().meta, Meta::default("http"));
        // Without a name it is not.
        let nameless = Profile { name: None, ..with_route() };
        let found = merged(addr(), known(), Some(nameless));
        assert!(matches!(found.protocol, Protocol::Http1(Http { routes: Routes::Http(..), .. })));
    }

    #[test]
    fn overrides_move_http_and_bytes_but_not_tls() {
        let found = merged(addr(), detect(), Some(with_overrides()));
        let Protocol::Detect { http2, opaque, .. } = found.protocol else { panic!() };
        let Routes::Profile(profile) = http2.routes else { panic!() };
        assert_eq!(profile.targets.iter().map(|(_, w)| *w).collect::<Vec<_>>(), [1, 3]);
        assert!(matches!(opaque.route.unwrap().backends, Distribution::RandomAvailable(b) if b.len() == 2));
        let tls = Policy::Known(Meta::default("t"), Protocol::Tls(crate::policy::client::Tls { routes: Arc::new([]) }));
        assert!(matches!(merged(addr(), tls, Some(with_overrides())).protocol, Protocol::Tls(_)));
    }

    fn discovery(
        target: Target,
        policy: Call<api::OutboundPolicy>,
        profile: Option<Call<destination::DestinationProfile>>,
    ) -> Discovery {
        let registry = Arc::new(Registry::default());
        let at_once = || settings(stream::Resume::AtOnce);
        let record = |method| registry.record(method, "t".into());
        Discovery {
            policy: Subscription::new(at_once(), record("OutboundPolicies.Watch"), policy),
            profile: profile.map(|call| Subscription::new(at_once(), record("Destination.GetProfile"), call)),
            target,
            detect_timeout: DETECT,
            trouble: Box::new(|| Some("connection refused".into())),
        }
    }

    async fn answer(discovery: Discovery) -> Answer {
        let (tx, rx) = oneshot::channel();
        tokio::spawn(discovery.run(tx));
        rx.await.unwrap()
    }

    fn profile_message(opaque_protocol: bool) -> destination::DestinationProfile {
        let fully_qualified_name = "web.shop.svc.cluster.local".into();
        destination::DestinationProfile { fully_qualified_name, opaque_protocol, ..Default::default() }
    }

    #[tokio::test(start_paused = true)]
    async fn both_answers_are_needed() {
        let policy = || says(vec![messages::message(None)], End::Never);
        let found = answer(discovery(addr(), policy(), Some(says(vec![profile_message(false)], End::Never)))).await;
        assert!(found.is_ok());
        let start = Instant::now();
        let found = answer(discovery(addr(), policy(), Some(says(vec![], End::Never)))).await;
        let Err(DiscoveryError::Unavailable { after: LOOKUP_LIMIT, reason, .. }) = found else { panic!("{found:?}") };
        assert_eq!(&*reason, "no profile: connection refused");
        assert!(start.elapsed() >= LOOKUP_LIMIT);
        let found = answer(discovery(addr(), fails(Code::Unavailable), None)).await;
        let Err(DiscoveryError::Unavailable { reason, .. }) = found else { panic!("{found:?}") };
        assert!(reason.starts_with("no policy: Unavailable"), "{reason}");
    }

    #[tokio::test(start_paused = true)]
    async fn refusals_are_told_apart() {
        let found = answer(discovery(addr(), fails(Code::InvalidArgument), None)).await;
        assert!(matches!(found, Err(DiscoveryError::Refused { .. })), "{found:?}");
        let found = answer(discovery(addr(), fails(Code::NotFound), None)).await.unwrap();
        assert_eq!(found.borrow().parent, Meta::default("fallback"));
        let found = answer(discovery(name(), fails(Code::NotFound), Some(fails(Code::Unknown)))).await;
        assert!(matches!(found, Err(DiscoveryError::Refused { .. })), "{found:?}");
        let found = answer(discovery(addr(), fails(Code::NotFound), Some(fails(Code::InvalidArgument)))).await;
        assert_eq!(found.unwrap().borrow().parent, Meta::default("fallback"));
    }

    #[tokio::test(start_paused = true)]
    async fn updates_follow_and_refusals_keep_the_last() {
        let updates = vec![profile_message(false), profile_message(true)];
        let policy = says(vec![messages::message(None)], End::Error(Code::FailedPrecondition));
        let mut found = answer(discovery(addr(), policy, Some(says(updates, End::Never)))).await.unwrap();
        found.wait_for(|policy| matches!(policy.protocol, Protocol::Opaque(_))).await.unwrap();
        time::sleep(Duration::from_secs(60)).await;
        assert!(!found.has_changed().unwrap());
    }

    #[tokio::test(start_paused = true)]
    async fn a_policy_that_makes_no_sense_is_invalid() {
        let broken = api::OutboundPolicy { protocol: None, ..messages::message(None) };
        let found = answer(discovery(addr(), says(vec![broken], End::Never), None)).await.unwrap();
        let expected = "invalid client policy of Service.shop.web: protocol: missing";
        assert_eq!(found.borrow().protocol, Protocol::Invalid(expected.into()));
    }

    #[tokio::test(start_paused = true)]
    async fn a_look_up_ends_with_its_last_follower() {
        let registry = Arc::new(Registry::default());
        let record = registry.record("OutboundPolicies.Watch", "t".into());
        let mut discovery = discovery(addr(), says(vec![], End::Never), None);
        let call = says(vec![messages::message(None)], End::Never);
        discovery.policy = Subscription::new(settings(stream::Resume::AtOnce), record, call);
        let found = answer(discovery).await.unwrap();
        assert_eq!(registry.snapshot().len(), 1);
        drop(found);
        time::sleep(Duration::from_millis(1)).await;
        assert_eq!(registry.snapshot(), []);
    }
}
