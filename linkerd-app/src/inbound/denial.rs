//! Why a client was refused, in words: the server, the route, every authorization that was looked at and what it
//! missed. Lines are bounded in number, so that a flood of refused requests does not become a flood of log lines.

use super::policy::Prepared;
use crate::policy::{Authentication, Authorization, Meta, authz::ClientTls};
use parking_lot::Mutex;
use std::{fmt, net::SocketAddr, time::Duration};
use tokio::time::Instant;

/// Lines that may be written in a row, and then one per [`LINE_INTERVAL`]. Enough to see every distinct client of an
/// ordinary misconfiguration, few enough to read.
const LINE_BURST: u32 = 20;

/// Time that earns another line.
const LINE_INTERVAL: Duration = Duration::from_millis(200);

/// Bounds the number of lines. Only refusals and audited uses come here, so one lock will do.
#[derive(Debug, Default)]
pub(super) struct Lines(Mutex<Option<State>>);

#[derive(Debug)]
struct State {
    /// When the allowance is full again.
    full_at: Instant,
    /// Lines not written since the last one.
    suppressed: u64,
}

/// Who was judged, by whom.
#[derive(Copy, Clone, Debug)]
pub(super) struct Case<'a> {
    /// Who connected.
    pub client: SocketAddr,
    /// Their TLS.
    pub tls: &'a ClientTls,
    /// The Server.
    pub server: &'a Meta,
    /// The route; none for connections.
    pub route: Option<&'a Meta>,
    /// The path, where the application may read it in another way than it is written.
    pub read_as: Option<&'a str>,
    /// What was compared.
    pub authorizations: &'a [Authorization],
}

impl Lines {
    /// Whether another line may be written, and how many were not since the last.
    fn admit(&self) -> Option<u64> {
        let now = Instant::now();
        let mut state = self.0.lock();
        let state = state.get_or_insert(State { full_at: now, suppressed: 0 });
        let full_at = state.full_at.max(now);
        if full_at.duration_since(now) >= LINE_INTERVAL * LINE_BURST {
            state.suppressed += 1;
            return None;
        }
        state.full_at = full_at + LINE_INTERVAL;
        Some(std::mem::take(&mut state.suppressed))
    }

    /// Says that a request or connection was refused.
    pub(super) fn denied(&self, case: Case<'_>) {
        if let Some(suppressed) = self.admit() {
            tracing::info!(
                client = %case.client, tls = %Tls(case.tls), server = %case.server,
                route = case.route.map(tracing::field::display), read_as = case.read_as, suppressed,
                "denied: {}", Reasons(case),
            );
        }
    }

    /// Says that an audited use was let in, and why it would have been refused.
    pub(super) fn audited(&self, case: Case<'_>) {
        if let Some(suppressed) = self.admit() {
            tracing::info!(
                client = %case.client, tls = %Tls(case.tls), server = %case.server,
                route = case.route.map(tracing::field::display), suppressed,
                "allowed by audit mode; would have been denied: {}", Reasons(case),
            );
        }
    }

    /// Says that an open connection lost its authorization.
    pub(super) fn terminated(&self, case: Case<'_>) {
        if let Some(suppressed) = self.admit() {
            tracing::info!(
                client = %case.client, tls = %Tls(case.tls), server = %case.server, suppressed,
                "connection closed, since the policy changed: {}", Reasons(case),
            );
        }
    }

    /// Says that a request fits no route.
    pub(super) fn no_route(&self, client: SocketAddr, prepared: &Prepared, method: &http::Method, path: &str) {
        if let Some(suppressed) = self.admit() {
            tracing::info!(
                %client, server = %prepared.policy.meta, %method, path, suppressed,
                "no route of the server takes the request",
            );
        }
    }
}

/// What each authorization missed.
struct Reasons<'a>(Case<'a>);

impl fmt::Display for Reasons<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Case { client, tls, authorizations, .. } = self.0;
        let mut first = true;
        for authorization in authorizations.iter().filter(|authorization| !authorization.audit) {
            if !std::mem::take(&mut first) {
                f.write_str("; ")?;
            }
            write!(f, "{}: ", authorization.meta)?;
            missed(f, authorization, client, tls)?;
        }
        if first { f.write_str("nothing authorizes anybody here") } else { Ok(()) }
    }
}

/// Which of the two demands failed, the network first.
fn missed(f: &mut fmt::Formatter<'_>, authz: &Authorization, client: SocketAddr, tls: &ClientTls) -> fmt::Result {
    let ip = client.ip();
    if !authz.networks.iter().any(|network| network.contains(ip)) {
        return match authz.networks.iter().find(|network| network.net.contains(&ip)) {
            Some(network) => write!(f, "{ip} is among the exceptions of {}", network.net),
            None => write!(f, "{ip} is outside its {} networks", authz.networks.len()),
        };
    }
    match &authz.authentication {
        authentication if authentication.permits(tls) => f.write_str("permits"),
        Authentication::Unauthenticated => f.write_str("permits"),
        Authentication::TlsUnauthenticated => f.write_str("needs mesh TLS"),
        Authentication::TlsAuthenticated { identities, suffixes } => match tls.client_id() {
            None => f.write_str("needs a verified identity"),
            Some(id) => {
                write!(f, "{id} is none of its {} identities and {} suffixes", identities.len(), suffixes.len())
            }
        },
    }
}

/// A client's TLS in a log line.
struct Tls<'a>(&'a ClientTls);

impl fmt::Display for Tls<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            ClientTls::Terminated(Some(id)) => write!(f, "{id}"),
            ClientTls::Terminated(None) => f.write_str("mesh TLS without identity"),
            ClientTls::Passthru { sni } => write!(f, "TLS for {sni}"),
            ClientTls::None(why) => f.write_str(why.as_str()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        inbound::policy::tests::{PLAIN, anybody, meshed},
        policy::Network,
    };
    use std::collections::BTreeSet;

    #[track_caller]
    fn check(authorizations: &[Authorization], tls: &ClientTls, expected: &str) {
        let server = Meta::default("all-authenticated");
        let client = SocketAddr::from(([10, 1, 0, 7], 4321));
        let case = Case { client, tls, server: &server, route: None, read_as: None, authorizations };
        assert_eq!(Reasons(case).to_string(), expected);
    }

    #[test]
    fn every_authorization_says_what_it_missed() {
        check(&[], &PLAIN, "nothing authorizes anybody here");
        check(&[meshed()], &PLAIN, "default.all-authenticated: needs a verified identity");
        let mut far = Network::new("10.0.0.0/8".parse().unwrap());
        let elsewhere = Authorization { networks: vec![Network::new("192.0.2.0/24".parse().unwrap())], ..anybody() };
        check(
            std::slice::from_ref(&elsewhere),
            &PLAIN,
            "default.all-unauthenticated: 10.1.0.7 is outside its 1 networks",
        );
        far.except.push("10.1.0.0/16".parse().unwrap());
        let excepted = Authorization { networks: vec![far], ..anybody() };
        check(
            &[elsewhere, excepted],
            &PLAIN,
            "default.all-unauthenticated: 10.1.0.7 is outside its 1 networks; \
             default.all-unauthenticated: 10.1.0.7 is among the exceptions of 10.0.0.0/8",
        );
        let id: linkerd_tls::Id = "web.ns".parse().unwrap();
        let named = Authorization {
            authentication: Authentication::TlsAuthenticated {
                identities: BTreeSet::from(["db.ns".parse().unwrap()]),
                suffixes: vec![],
            },
            ..anybody()
        };
        check(
            &[named],
            &ClientTls::Terminated(Some(id)),
            "default.all-unauthenticated: web.ns is none of its 1 identities and 0 suffixes",
        );
        check(&[Authorization { audit: true, ..anybody() }], &PLAIN, "nothing authorizes anybody here");
    }

    #[tokio::test(start_paused = true)]
    async fn lines_are_bounded_and_what_was_left_out_is_counted() {
        let lines = Lines::default();
        for _ in 0..LINE_BURST {
            assert_eq!(lines.admit(), Some(0));
        }
        for _ in 0..5 {
            assert_eq!(lines.admit(), None);
        }
        tokio::time::advance(LINE_INTERVAL).await;
        assert_eq!(lines.admit(), Some(5));
        assert_eq!(lines.admit(), None);
    }
}
