//! ServiceProfiles on their own, for the inbound side: they judge responses and label metrics, and route nothing
//! (behaviour.md C.12).

use super::{
    convert::profile,
    stream::{self, Event, Subscription},
};
use crate::policy::{Target, client::Profile};
use linkerd2_proxy_api::destination;
use std::sync::Arc;
use tokio::sync::watch;
use tonic::Code;

/// What is known of a profile; none until the control plane has answered.
pub(super) type Known = Option<Arc<Profile>>;

/// Follows a name's profile until nobody follows `known`. A name without one has a profile without routes.
pub(super) async fn run(
    target: Target,
    mut updates: Subscription<destination::DestinationProfile>,
    known: watch::Sender<Known>,
) {
    let addr: Arc<str> = target.to_string().into();
    let profile = |routes| Some(Arc::new(Profile { addr: addr.clone(), routes, budget: None, targets: Arc::new([]) }));
    loop {
        let event = tokio::select! {
            () = known.closed() => return,
            event = updates.next() => event,
        };
        match event {
            Event::Message { message, .. } => match profile::profile(message) {
                Ok((found, left_out)) => {
                    for error in left_out {
                        tracing::warn!(%target, %error, "Part of a profile can't be understood");
                    }
                    known.send_replace(profile(found.routes));
                }
                Err(error) => {
                    tracing::warn!(%target, %error, "Profile can't be understood");
                    known.send_if_modified(|known| none_if_unknown(known, || profile(Vec::new())));
                }
            },
            Event::Ended(status) => {
                // Unknown is what the controller says of a name that is no Service (behaviour.md D.1).
                let over = stream::is_final(status.code());
                if over || status.code() == Code::Unknown {
                    known.send_if_modified(|known| none_if_unknown(known, || profile(Vec::new())));
                }
                if over {
                    known.closed().await;
                    return;
                }
            }
        }
    }
}

/// Settles for no profile where nothing was known; what was known stays.
fn none_if_unknown(known: &mut Known, none: impl FnOnce() -> Known) -> bool {
    let unknown = known.is_none();
    if unknown {
        *known = none();
    }
    unknown
}
