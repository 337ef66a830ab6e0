//! Local rate limits on the requests to a port (behaviour.md C.9): over all clients, then per client identity, with
//! buckets of their own for named identities. A bucket holds one second's worth and refills evenly (GCRA).

use crate::{
    error::{Cause, Error, RateLimitScope},
    policy::server::{RateLimit, RateLimitOverride},
};
use linkerd_stack::rate::{Keyed, Limiter};
use linkerd_tls::Id;
use std::{collections::HashMap, num::NonZeroU32, sync::Arc};

/// The buckets of one policy value.
pub struct Limits {
    policy: Arc<RateLimit>,
    total: Option<Bucket<Limiter>>,
    identity: Option<Bucket<Keyed<Option<Id>>>>,
    /// In the order of the policy; none where the number is 0, which means no limit.
    overrides: Vec<Option<Bucket<Limiter>>>,
    by_id: HashMap<Id, usize>,
}

struct Bucket<L> {
    rps: u32,
    limiter: L,
}

/// The bucket that a client draws from after the total, looked up once per connection.
#[derive(Debug)]
pub struct Share(Option<(RateLimitScope, u32, Limiter)>);

impl Limits {
    /// Full buckets.
    pub fn new(policy: Arc<RateLimit>) -> Self {
        let bucket = |rps| NonZeroU32::new(rps).map(|n| Bucket { rps, limiter: Limiter::new(n) });
        let ids = |(index, ids): (usize, &RateLimitOverride)| {
            ids.identities.iter().map(move |id| (id.clone(), index)).collect::<Vec<_>>()
        };
        Self {
            total: policy.total.and_then(bucket),
            identity: policy
                .identity
                .and_then(|rps| NonZeroU32::new(rps).map(|n| Bucket { rps, limiter: Keyed::new(n) })),
            overrides: policy.overrides.iter().map(|o| bucket(o.requests_per_second)).collect(),
            // The first override that names an identity wins.
            by_id: policy.overrides.iter().enumerate().rev().flat_map(ids).collect(),
            policy,
        }
    }

    /// What the buckets were made from.
    pub fn policy(&self) -> &RateLimit {
        &self.policy
    }

    /// The bucket of a client: that of an override, or its own. Clients without an identity share one.
    pub fn share(&self, id: Option<&Id>) -> Share {
        let index = id.and_then(|id| self.by_id.get(id));
        Share(match index.map(|index| self.overrides.get(*index)) {
            Some(found) => found
                .and_then(Option::as_ref)
                .map(|bucket| (RateLimitScope::Override, bucket.rps, bucket.limiter.clone())),
            None => self
                .identity
                .as_ref()
                .map(|each| (RateLimitScope::Identity, each.rps, each.limiter.bucket(&id.cloned()))),
        })
    }

    /// Takes a cell of the total, then one of the client's. A cell of the total is spent even if the client has none.
    ///
    /// # Errors
    /// [`Cause::RateLimited`] by the first bucket that is empty.
    pub fn check(&self, share: &Share) -> Result<(), Error> {
        let take = |scope, rps, limiter: &Limiter| {
            limiter.check().map_err(|retry_after| Error::new(Cause::RateLimited { scope, rps, retry_after }))
        };
        if let Some(total) = &self.total {
            take(RateLimitScope::Total, total.rps, &total.limiter)?;
        }
        match &share.0 {
            Some((scope, rps, limiter)) => take(*scope, *rps, limiter),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn id(name: &str) -> Id {
        name.parse().unwrap()
    }

    fn limits(total: Option<u32>, identity: Option<u32>, overrides: &[(u32, &str)]) -> Limits {
        let overrides = overrides
            .iter()
            .map(|(rps, name)| RateLimitOverride { requests_per_second: *rps, identities: [id(name)].into() })
            .collect();
        Limits::new(Arc::new(RateLimit { meta: None, total, identity, overrides }))
    }

    /// How many of 100 requests in one instant pass, and who refuses the rest.
    #[track_caller]
    fn check(limits: &Limits, client: Option<&str>, passed: usize, by: Option<(RateLimitScope, u32)>) {
        let share = limits.share(client.map(id).as_ref());
        let results: Vec<_> = (0..100).map(|_| limits.check(&share)).collect();
        assert_eq!(results.iter().filter(|r| r.is_ok()).count(), passed);
        let refused = results.iter().find_map(|r| match r.as_ref().err()?.cause() {
            Cause::RateLimited { scope, rps, .. } => Some((*scope, *rps)),
            other => panic!("{other}"),
        });
        assert_eq!(refused, by);
    }

    #[tokio::test(start_paused = true)]
    async fn clients_have_buckets_of_their_own() {
        let limits = limits(None, Some(5), &[(9, "batch.ns"), (0, "free.ns")]);
        check(&limits, Some("a.ns"), 5, Some((RateLimitScope::Identity, 5)));
        check(&limits, Some("b.ns"), 5, Some((RateLimitScope::Identity, 5)));
        check(&limits, None, 5, Some((RateLimitScope::Identity, 5)));
        check(&limits, None, 0, Some((RateLimitScope::Identity, 5)));
        check(&limits, Some("batch.ns"), 9, Some((RateLimitScope::Override, 9)));
        check(&limits, Some("free.ns"), 100, None);
        tokio::time::advance(Duration::from_secs(1)).await;
        check(&limits, Some("a.ns"), 5, Some((RateLimitScope::Identity, 5)));
    }

    #[tokio::test(start_paused = true)]
    async fn the_total_comes_first_and_zero_is_no_limit() {
        check(&limits(Some(7), Some(50), &[]), Some("a.ns"), 7, Some((RateLimitScope::Total, 7)));
        check(&limits(Some(0), Some(0), &[]), None, 100, None);
    }
}
