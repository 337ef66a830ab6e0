//! Tickets with which a client resumes sessions: a few for one target, each used once.
//!
//! A store belongs to one client configuration, hence to one target, one certificate and one set of trust anchors, and
//! goes when any of them does.

use parking_lot::Mutex;
use rustls::{
    NamedGroup,
    client::{ClientSessionStore, Tls12ClientSessionValue, Tls13ClientSessionValue},
    pki_types::ServerName,
};
use std::{collections::VecDeque, fmt};

/// Most tickets kept for one target: as many connections as are usually opened at a time. Each takes 2 to 3 KiB.
pub(crate) const MAX_TICKETS: usize = 16;

/// The tickets of one target; beyond [`MAX_TICKETS`] the oldest is dropped.
#[derive(Default)]
pub(crate) struct Tickets(Mutex<VecDeque<Tls13ClientSessionValue>>);

impl ClientSessionStore for Tickets {
    fn insert_tls13_ticket(&self, _: ServerName<'static>, ticket: Tls13ClientSessionValue) {
        let mut tickets = self.0.lock();
        if tickets.len() == MAX_TICKETS {
            tickets.pop_front();
        }
        tickets.push_back(ticket);
    }

    /// The newest, which is the least likely to have expired.
    fn take_tls13_ticket(&self, _: &ServerName<'static>) -> Option<Tls13ClientSessionValue> {
        self.0.lock().pop_back()
    }

    /// Nothing is remembered: a hint is taken from a hello that nobody has vouched for yet, and would let whoever is in
    /// between talk the next handshake out of the hybrid group.
    fn kx_hint(&self, _: &ServerName<'_>) -> Option<NamedGroup> {
        None
    }

    fn set_kx_hint(&self, _: ServerName<'static>, _: NamedGroup) {}

    fn set_tls12_session(&self, _: ServerName<'static>, _: Tls12ClientSessionValue) {}

    fn tls12_session(&self, _: &ServerName<'_>) -> Option<Tls12ClientSessionValue> {
        None
    }

    fn remove_tls12_session(&self, _: &ServerName<'static>) {}
}

impl fmt::Debug for Tickets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tickets({})", self.0.lock().len())
    }
}
