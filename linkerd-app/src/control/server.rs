//! Policies of local ports (behaviour.md C.1): one watch per port, shared by all its connections.

use super::{
    convert::inbound,
    defaults,
    stream::{self, AbortOnDrop, Event, Subscription},
};
use crate::{config, policy::ServerPolicy};
use linkerd2_proxy_api::inbound as api;
use parking_lot::Mutex;
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};
use tokio::{runtime::Handle, sync::watch, time};

/// Opens the watch of a port.
pub(super) type Subscribe = Box<dyn Fn(u16) -> Subscription<api::Server> + Send + Sync>;

/// The ports that are watched: at most the 65,535 there are, each dropped when it has been unused for long enough.
pub(super) struct Ports {
    config: Arc<config::Inbound>,
    /// Never forgotten.
    permanent: BTreeSet<u16>,
    subscribe: Subscribe,
    runtime: Handle,
    watched: Mutex<BTreeMap<u16, Port>>,
}

struct Port {
    policy: watch::Sender<Arc<ServerPolicy>>,
    _task: AbortOnDrop,
}

impl Ports {
    /// Starts to watch the permanent ports.
    pub(super) fn new(
        config: Arc<config::Inbound>,
        permanent: BTreeSet<u16>,
        subscribe: Subscribe,
        runtime: Handle,
    ) -> Arc<Self> {
        let watched = Mutex::default();
        let ports = Arc::new(Self { config, permanent, subscribe, runtime, watched });
        for port in &ports.permanent {
            ports.watch(*port);
        }
        ports
    }

    /// The policy of a port, from now on.
    pub(super) fn watch(self: &Arc<Self>, port: u16) -> watch::Receiver<Arc<ServerPolicy>> {
        let mut watched = self.watched.lock();
        if let Some(port) = watched.get(&port) {
            return port.policy.subscribe();
        }
        let policy = watch::Sender::new(Arc::new(defaults::server_policy(&self.config, port)));
        let rx = policy.subscribe();
        let mut following = Box::pin(follow((self.subscribe)(port), policy.clone()));
        let idle = self.config.discovery_idle_timeout;
        let permanent = self.permanent.contains(&port);
        let (ports, unused) = (Arc::downgrade(self), policy.clone());
        let task = self.runtime.spawn(async move {
            loop {
                tokio::select! {
                    never = &mut following => match never {},
                    () = until_unused(&unused, idle), if !permanent => {}
                }
                let Some(ports) = ports.upgrade() else { return };
                let mut watched = ports.watched.lock();
                // Nobody subscribes without the lock, so this is the last word.
                if unused.receiver_count() == 0 {
                    watched.remove(&port);
                    return;
                }
            }
        });
        watched.insert(port, Port { policy, _task: AbortOnDrop::new(&task) });
        rx
    }
}

/// Ends when nobody has followed the policy for `idle`.
async fn until_unused(policy: &watch::Sender<Arc<ServerPolicy>>, idle: Duration) {
    loop {
        policy.closed().await;
        time::sleep(idle).await;
        if policy.receiver_count() == 0 {
            return;
        }
    }
}

/// Keeps a port's policy as the control plane says; the last one stays through every failure.
async fn follow(
    mut subscription: Subscription<api::Server>,
    policy: watch::Sender<Arc<ServerPolicy>>,
) -> std::convert::Infallible {
    loop {
        match subscription.next().await {
            Event::Message { message, .. } => {
                let labels = message.labels.clone();
                let server = inbound::server(message).unwrap_or_else(|invalid| {
                    let target = subscription.record().target();
                    tracing::warn!(port = target, error = %invalid, "Server policy can't be understood");
                    inbound::invalid(&invalid, &labels)
                });
                // Equal policies are not told again: rate limits would begin anew.
                policy.send_if_modified(|current| {
                    let changed = **current != server;
                    if changed {
                        *current = Arc::new(server);
                    }
                    changed
                });
            }
            Event::Ended(status) if stream::is_final(status.code()) => {
                let (port, error) = (subscription.record().target(), stream::describe(&status));
                tracing::warn!(port, error, "Control plane refuses to tell the policy of a port");
                // The last policy stays until the port is forgotten, and the refusal stays visible.
                return std::future::pending().await;
            }
            Event::Ended(_) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::{record::Registry, tests::*},
        *,
    };
    use crate::policy::server::Protocol;
    use stream::{Call, tests::End};
    use tonic::Code;

    fn message(kind: api::proxy_protocol::Kind) -> api::Server {
        let labels = [("name".to_string(), "web".to_string())].into();
        api::Server {
            protocol: Some(api::ProxyProtocol { kind: Some(kind) }),
            server_ips: vec![],
            authorizations: vec![],
            labels,
        }
    }

    fn opaque() -> api::Server {
        message(api::proxy_protocol::Kind::Opaque(api::proxy_protocol::Opaque {}))
    }

    fn broken() -> api::Server {
        api::Server { protocol: None, ..opaque() }
    }

    /// Ports whose watches answer with these messages and this end; the number of calls is the second part.
    fn ports(messages: Vec<api::Server>, end: End, permanent: &[u16]) -> (Arc<Ports>, Arc<Mutex<Vec<u16>>>) {
        let registry = Arc::new(Registry::default());
        let calls = Arc::new(Mutex::new(Vec::new()));
        let seen = calls.clone();
        let subscribe: Subscribe = Box::new(move |port| {
            seen.lock().push(port);
            let call: Call<api::Server> = says(messages.clone(), end);
            Subscription::new(settings(stream::Resume::AtOnce), registry.record("WatchPort", port.to_string()), call)
        });
        let permanent = permanent.iter().copied().collect();
        (Ports::new(Arc::new(inbound_config()), permanent, subscribe, Handle::current()), calls)
    }

    #[tokio::test(start_paused = true)]
    async fn the_default_holds_until_the_control_plane_speaks() {
        let (ports, _) = ports(vec![opaque()], End::Never, &[]);
        let mut policy = ports.watch(80);
        assert_eq!(policy.borrow_and_update().meta.kind(), "default");
        policy.changed().await.unwrap();
        assert!(matches!(policy.borrow_and_update().protocol, Protocol::Opaque(_)));
        assert_eq!(policy.borrow().meta.name(), "web");
    }

    #[tokio::test(start_paused = true)]
    async fn a_broken_update_says_what_is_broken() {
        let (ports, _) = ports(vec![opaque(), broken()], End::Never, &[]);
        let mut policy = ports.watch(80);
        let found = policy.wait_for(|p| matches!(p.protocol, Protocol::Invalid(_))).await.unwrap();
        let Protocol::Invalid(why) = &found.protocol else { panic!() };
        assert_eq!(&**why, "invalid server configuration: protocol: missing");
    }

    #[tokio::test(start_paused = true)]
    async fn the_last_policy_stays_when_the_control_plane_refuses() {
        let (ports, _) = ports(vec![opaque()], End::Error(Code::InvalidArgument), &[]);
        let mut policy = ports.watch(80);
        policy.changed().await.unwrap();
        time::sleep(Duration::from_secs(3600)).await;
        assert!(!policy.has_changed().unwrap());
        assert_eq!(policy.borrow().meta.name(), "web");
    }

    #[tokio::test(start_paused = true)]
    async fn equal_updates_are_not_told_twice() {
        let (ports, _) = ports(vec![opaque(), opaque()], End::Never, &[]);
        let mut policy = ports.watch(80);
        policy.changed().await.unwrap();
        policy.borrow_and_update();
        assert!(time::timeout(Duration::from_secs(60), policy.changed()).await.is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn idle_ports_are_forgotten_and_permanent_ones_are_not() {
        let (ports, calls) = ports(vec![opaque()], End::Never, &[8080]);
        assert_eq!(*calls.lock(), [8080]);
        let one = ports.watch(80);
        let other = ports.watch(80);
        drop((one, other));
        time::sleep(Duration::from_secs(80)).await;
        drop(ports.watch(80));
        time::sleep(Duration::from_secs(80)).await;
        assert_eq!(*calls.lock(), [8080, 80]);
        time::sleep(Duration::from_secs(200)).await;
        assert_eq!(ports.watched.lock().keys().copied().collect::<Vec<_>>(), [8080]);
        drop(ports.watch(80));
        assert_eq!(*calls.lock(), [8080, 80, 80]);
    }
}
