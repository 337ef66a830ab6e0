//! Tickets with which sessions are resumed. A client keeps a few for one target, and uses each once; a server makes none
//! that would not fit into what is read of a hello.
//!
//! A store belongs to one client configuration, hence to one target, one certificate and one set of trust anchors, and
//! goes when any of them does.

use parking_lot::Mutex;
use rustls::{
    NamedGroup,
    client::{ClientSessionStore, Tls12ClientSessionValue, Tls13ClientSessionValue},
    pki_types::ServerName,
    server::ProducesTickets,
};
use std::{collections::VecDeque, fmt, sync::Arc};

/// Most tickets kept for one target: as many connections as are usually opened at a time. Each takes 2 to 3 KiB.
pub(crate) const MAX_TICKETS: usize = 16;

/// Largest session that is put into a ticket, bytes; a client's chain of certificates is the most of it. A hello with
/// such a ticket and two key shares has about 6 KiB, of [`crate::detect::MAX_HELLO`] that peers read before they decide.
const MAX_SESSION: usize = 4 * 1024;

/// The tickets of one target; beyond [`MAX_TICKETS`] the oldest is dropped.
#[derive(Default)]
pub(crate) struct Tickets(Mutex<VecDeque<Tls13ClientSessionValue>>);

impl Tickets {
    /// The newest, which is the least likely to have expired.
    pub(crate) fn take(&self) -> Option<Tls13ClientSessionValue> {
        self.0.lock().pop_back()
    }

    pub(crate) fn clear(&self) {
        self.0.lock().clear();
    }

    fn put(&self, ticket: Tls13ClientSessionValue) {
        let mut tickets = self.0.lock();
        if tickets.len() == MAX_TICKETS {
            tickets.pop_front();
        }
        tickets.push_back(ticket);
    }
}

/// What one handshake shows, and where the tickets that it earns go.
#[derive(Debug)]
pub(crate) struct Offer {
    ticket: Mutex<Option<Tls13ClientSessionValue>>,
    earned: Arc<Tickets>,
}

impl Offer {
    pub(crate) fn new(ticket: Option<Tls13ClientSessionValue>, earned: Arc<Tickets>) -> Self {
        Self { ticket: Mutex::new(ticket), earned }
    }
}

impl ClientSessionStore for Offer {
    fn insert_tls13_ticket(&self, _: ServerName<'static>, ticket: Tls13ClientSessionValue) {
        self.earned.put(ticket);
    }

    fn take_tls13_ticket(&self, _: &ServerName<'static>) -> Option<Tls13ClientSessionValue> {
        self.ticket.lock().take()
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

/// Makes tickets, but no large ones.
#[derive(Debug)]
pub(crate) struct Small(pub(crate) Arc<dyn ProducesTickets>);

impl ProducesTickets for Small {
    fn enabled(&self) -> bool {
        self.0.enabled()
    }

    fn lifetime(&self) -> u32 {
        self.0.lifetime()
    }

    fn encrypt(&self, session: &[u8]) -> Option<Vec<u8>> {
        if session.len() > MAX_SESSION { None } else { self.0.encrypt(session) }
    }

    fn decrypt(&self, ticket: &[u8]) -> Option<Vec<u8>> {
        self.0.decrypt(ticket)
    }
}

impl fmt::Debug for Tickets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tickets({})", self.0.lock().len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sessions_that_would_swell_a_hello_get_no_ticket() {
        let small = Small(rustls::crypto::aws_lc_rs::Ticketer::new().unwrap());
        let ticket = small.encrypt(&[7; MAX_SESSION]).unwrap();
        assert!(ticket.len() + 3 * 1024 < crate::detect::MAX_HELLO, "{}", ticket.len());
        assert_eq!(small.decrypt(&ticket).unwrap(), [7; MAX_SESSION]);
        assert_eq!(small.encrypt(&[7; MAX_SESSION + 1]), None);
    }
}
