//! ServiceProfiles on their own, for the inbound side: what the policy of a client of the same name would say, less
//! everything but the profile.

use crate::policy::{
    ClientPolicy, Target,
    client::{Profile, Protocol, Routes},
};
use std::sync::Arc;
use tokio::sync::watch;

/// Keeps `known` as `policies` says until nobody follows it, or the source is gone.
pub(super) async fn follow(
    target: Target,
    mut policies: watch::Receiver<Arc<ClientPolicy>>,
    known: watch::Sender<Option<Arc<Profile>>>,
) {
    loop {
        let profile = of(&target, &policies.borrow_and_update());
        known.send_if_modified(|known| {
            let changed = known.as_ref() != Some(&profile);
            if changed {
                *known = Some(profile);
            }
            changed
        });
        tokio::select! {
            () = known.closed() => return,
            changed = policies.changed() => if changed.is_err() { return },
        }
    }
}

/// The profile in force, or one without routes.
fn of(target: &Target, policy: &ClientPolicy) -> Arc<Profile> {
    let http = match &policy.protocol {
        Protocol::Detect { http1: http, .. } | Protocol::Http1(http) | Protocol::Http2(http) | Protocol::Grpc(http) => {
            Some(http)
        }
        Protocol::Opaque(_) | Protocol::Tls(_) | Protocol::Invalid(_) => None,
    };
    match http.map(|http| &http.routes) {
        Some(Routes::Profile(profile)) => profile.clone(),
        Some(Routes::Http(..) | Routes::Grpc(..)) | None => Arc::new(Profile {
            addr: target.to_string().into(),
            routes: Vec::new(),
            budget: None,
            targets: Arc::new([]),
        }),
    }
}
