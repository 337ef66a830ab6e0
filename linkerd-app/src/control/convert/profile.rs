//! Service profiles (behaviour.md D.3), and what else a profile tells of a destination.

use super::{Inside, Invalid, destination, duration, limit, list, meta, optional, required, route};
use crate::policy::{
    Endpoint, Meta,
    client::{Budget, ProfileRoute, RequestCondition, ResponseCondition},
};
use linkerd2_proxy_api::destination as api;
use regex::Regex;
use std::{collections::HashMap, ops::RangeInclusive, sync::Arc, time::Duration};

/// How deep conditions may nest. The API sets no bound, and each level is a stack frame here and per request; a
/// ServiceProfile of the CRD's schema has a handful.
const MAX_CONDITION_DEPTH: usize = 32;
/// Bounds of a retry budget's window (behaviour.md D.3).
const BUDGET_TTL: RangeInclusive<Duration> = Duration::from_secs(1)..=Duration::from_secs(60);
/// Bounds of a retry budget's ratio (behaviour.md D.3).
const BUDGET_RATIO: RangeInclusive<f32> = 0.0..=1000.0;

/// What `GetProfile` tells of a destination.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Profile {
    /// The service's name, lower case, without trailing dot.
    pub(crate) name: Option<Arc<str>>,
    /// Connections are opaque.
    pub(crate) opaque: bool,
    /// First match wins.
    pub(crate) routes: Vec<ProfileRoute>,
    /// None if absent or out of bounds.
    pub(crate) budget: Option<Budget>,
    /// Where traffic goes instead, by weight; only positive weights.
    pub(crate) overrides: Vec<Override>,
    /// The destination is this one replica.
    pub(crate) endpoint: Option<Endpoint>,
    /// The Service.
    pub(crate) parent: Option<Meta>,
}

/// One of several services that share a service's traffic.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Override {
    /// `host:port`.
    pub(crate) authority: Arc<str>,
    /// Share.
    pub(crate) weight: u32,
    /// The Service.
    pub(crate) meta: Meta,
}

/// A profile, and what was left out of it. A route that can't be understood is left out: it would only have added
/// metrics, a timeout or retries to requests that are served without it too. An override decides where traffic goes,
/// so a bad one makes the whole message invalid.
pub(crate) fn profile(message: api::DestinationProfile) -> Result<(Profile, Vec<Invalid>), Invalid> {
    let api::DestinationProfile {
        fully_qualified_name,
        opaque_protocol,
        routes,
        retry_budget,
        dst_overrides,
        endpoint,
        parent_ref,
        profile_ref: _,
    } = message;
    let mut left_out = Vec::new();
    let mut kept = Vec::with_capacity(routes.len());
    for (i, message) in routes.into_iter().enumerate() {
        match profile_route(message) {
            Ok(route) => kept.push(route),
            Err(invalid) => left_out.push(invalid.inside(&format!("routes[{i}]"))),
        }
    }
    let budget = match optional("retry_budget", retry_budget, budget) {
        Ok(budget) => budget,
        Err(invalid) => {
            left_out.push(invalid);
            None
        }
    };
    let overrides = list("dst_overrides", dst_overrides, override_to)?;
    let name = fully_qualified_name.trim_end_matches('.').to_ascii_lowercase();
    let profile = Profile {
        name: (!name.is_empty()).then(|| name.into()),
        opaque: opaque_protocol,
        routes: kept,
        budget,
        overrides: overrides.into_iter().filter(|o| o.weight > 0).collect(),
        endpoint: optional("endpoint", endpoint, |endpoint| destination::endpoint(endpoint, &HashMap::new()))?,
        // Only a label: what can't be understood is as good as absent.
        parent: parent_ref.and_then(|parent| meta::strict(parent).ok()),
    };
    Ok((profile, left_out))
}

fn override_to(message: api::WeightedDst) -> Result<Override, Invalid> {
    let api::WeightedDst { authority, weight, backend_ref } = message;
    let bad = || Invalid::new(format!("{authority:?} is no host:port")).inside("authority");
    let (host, port) = authority.rsplit_once(':').ok_or_else(bad)?;
    let port: u16 = port.parse().map_err(|_| bad())?;
    let host = host.trim_end_matches('.').to_ascii_lowercase();
    if host.is_empty() || port == 0 {
        return Err(bad());
    }
    let meta = backend_ref.and_then(|backend| meta::strict(backend).ok());
    Ok(Override {
        authority: format!("{host}:{port}").into(),
        weight,
        meta: meta.unwrap_or_else(|| meta::service(&host, port)),
    })
}

fn profile_route(message: api::Route) -> Result<ProfileRoute, Invalid> {
    let api::Route { condition, response_classes, metrics_labels, is_retryable, timeout } = message;
    Ok(ProfileRoute {
        condition: required("condition", condition, |condition| request(condition, MAX_CONDITION_DEPTH))?,
        classes: list("response_classes", response_classes, |class| {
            let condition =
                required("condition", class.condition, |condition| response(condition, MAX_CONDITION_DEPTH))?;
            Ok((condition, class.is_failure))
        })?,
        labels: metrics_labels.into_iter().map(|(key, value)| (key.into(), value.into())).collect(),
        retryable: is_retryable,
        timeout: limit("timeout", timeout)?,
    })
}

fn too_deep() -> Invalid {
    Invalid::new(format!("nested deeper than {MAX_CONDITION_DEPTH} levels"))
}

fn request(message: api::RequestMatch, depth: usize) -> Result<RequestCondition, Invalid> {
    use api::request_match::Match;
    let below = depth.checked_sub(1).ok_or_else(too_deep)?;
    required("match", message.r#match, |condition| {
        Ok(match condition {
            Match::All(all) => RequestCondition::All(list("all", all.matches, |m| request(m, below))?),
            Match::Any(any) => RequestCondition::Any(list("any", any.matches, |m| request(m, below))?),
            Match::Not(not) => RequestCondition::Not(Box::new(request(*not, below).inside("not")?)),
            Match::Path(path) => {
                let bad = |error| Invalid::new(format!("{:?} is no regular expression: {error}", path.regex));
                // Checked without the anchors first, which could otherwise close a group that the text left open.
                Regex::new(&path.regex).map_err(bad).inside("path")?;
                RequestCondition::Path(Regex::new(&format!("^(?:{})$", path.regex)).map_err(bad).inside("path")?)
            }
            Match::Method(method) => RequestCondition::Method(route::method_match(method).inside("method")?),
        })
    })
}

fn response(message: api::ResponseMatch, depth: usize) -> Result<ResponseCondition, Invalid> {
    use api::response_match::Match;
    let below = depth.checked_sub(1).ok_or_else(too_deep)?;
    required("match", message.r#match, |condition| {
        Ok(match condition {
            Match::All(all) => ResponseCondition::All(list("all", all.matches, |m| response(m, below))?),
            Match::Any(any) => ResponseCondition::Any(list("any", any.matches, |m| response(m, below))?),
            Match::Not(not) => ResponseCondition::Not(Box::new(response(*not, below).inside("not")?)),
            Match::Status(range) => ResponseCondition::Status(statuses(range).inside("status")?),
        })
    })
}

/// One bound alone stands for both (destination.proto, HttpStatusRange).
fn statuses(message: api::HttpStatusRange) -> Result<RangeInclusive<u16>, Invalid> {
    let api::HttpStatusRange { min, max } = message;
    let (low, high) = match (min, max) {
        (0, only) | (only, 0) => (only, only),
        both => both,
    };
    match (u16::try_from(low), u16::try_from(high)) {
        (Ok(low @ 100..=599), Ok(high @ 100..=599)) if low <= high => Ok(low..=high),
        _ => Err(Invalid::new(format!("{min}..{max} is no range of HTTP statuses"))),
    }
}

fn budget(message: api::RetryBudget) -> Result<Budget, Invalid> {
    let api::RetryBudget { retry_ratio, min_retries_per_second, ttl } = message;
    let ttl = required("ttl", ttl, duration)?;
    if !BUDGET_TTL.contains(&ttl) {
        return Err(Invalid::new(format!("{ttl:?} is not within {BUDGET_TTL:?}")).inside("ttl"));
    }
    if !BUDGET_RATIO.contains(&retry_ratio) {
        return Err(Invalid::new(format!("{retry_ratio} is not within {BUDGET_RATIO:?}")).inside("retry_ratio"));
    }
    Ok(Budget { ratio: f64::from(retry_ratio), min_per_second: min_retries_per_second, ttl })
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use api::{request_match, response_match};

    /// A route for a path, for tests.
    pub(crate) fn route_for(path: &str) -> api::Route {
        let path = request_match::Match::Path(api::PathMatch { regex: path.into() });
        api::Route { condition: Some(api::RequestMatch { r#match: Some(path) }), ..api::Route::default() }
    }

    #[test]
    fn a_bad_route_is_left_out_and_named() {
        let routes = vec![route_for("/a"), route_for("("), route_for("/c")];
        let (found, left_out) = profile(api::DestinationProfile { routes, ..Default::default() }).unwrap();
        assert_eq!(found.routes.len(), 2);
        assert!(left_out[0].to_string().starts_with("routes[1].condition.match.path: "), "{}", left_out[0]);
    }

    #[test]
    fn paths_are_anchored_on_both_ends() {
        let (found, _) =
            profile(api::DestinationProfile { routes: vec![route_for("/a|/b")], ..Default::default() }).unwrap();
        let RequestCondition::Path(regex) = &found.routes[0].condition else { panic!() };
        assert!(regex.is_match("/a") && regex.is_match("/b") && !regex.is_match("/ab") && !regex.is_match("x/b"));
    }

    #[track_caller]
    fn check_statuses(min: u32, max: u32, expected: Option<RangeInclusive<u16>>) {
        assert_eq!(statuses(api::HttpStatusRange { min, max }).ok(), expected);
    }

    #[test]
    fn status_ranges() {
        check_statuses(500, 599, Some(500..=599));
        check_statuses(404, 0, Some(404..=404));
        check_statuses(0, 404, Some(404..=404));
        check_statuses(0, 0, None);
        check_statuses(500, 400, None);
        check_statuses(100, 70_000, None);
    }

    #[test]
    fn nesting_is_bounded() {
        let status = api::HttpStatusRange { min: 500, max: 599 };
        let mut deep = api::ResponseMatch { r#match: Some(response_match::Match::Status(status)) };
        for _ in 0..MAX_CONDITION_DEPTH - 1 {
            deep = api::ResponseMatch { r#match: Some(response_match::Match::Not(Box::new(deep))) };
        }
        assert!(response(deep.clone(), MAX_CONDITION_DEPTH).is_ok());
        let deeper = api::ResponseMatch { r#match: Some(response_match::Match::Not(Box::new(deep))) };
        assert!(response(deeper, MAX_CONDITION_DEPTH).is_err());
    }

    #[test]
    fn budgets_are_bounded() {
        let budget = |ratio, seconds| {
            let ttl = Some(prost_types::Duration { seconds, nanos: 0 });
            super::budget(api::RetryBudget { retry_ratio: ratio, min_retries_per_second: 10, ttl })
        };
        assert!(budget(0.2, 10).is_ok());
        assert!(budget(0.2, 0).is_err() && budget(0.2, 61).is_err());
        assert!(budget(-0.1, 10).is_err() && budget(f32::NAN, 10).is_err() && budget(1000.5, 10).is_err());
    }

    #[test]
    fn overrides_need_an_address_and_weight() {
        let over =
            |authority: &str, weight| api::WeightedDst { authority: authority.into(), weight, backend_ref: None };
        let with = |o| profile(api::DestinationProfile { dst_overrides: vec![o], ..Default::default() });
        let (found, _) = with(over("Web.shop.svc.cluster.local.:80", 5)).unwrap();
        assert_eq!(&*found.overrides[0].authority, "web.shop.svc.cluster.local:80");
        assert_eq!(found.overrides[0].meta.to_string(), "Service.shop.web:80");
        assert!(with(over("a:80", 0)).unwrap().0.overrides.is_empty());
        assert!(with(over("a", 1)).is_err());
    }
}
