//! Sessions are resumed as long as all that vouched for them stands, and not a handshake longer.

use super::{
    tests::{SPIFFE, WEB, id, shake, target},
    *,
};
use crate::ca::{LEAF_LIFETIME, tests::Folder};
use pki_types::UnixTime;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

const OTHER: &str = "other.shop.serviceaccount.identity.linkerd.cluster.local";

/// A clock that is ahead by so many seconds.
#[derive(Debug, Default)]
struct Ahead(AtomicU64);

impl TimeProvider for Ahead {
    fn current_time(&self) -> Option<UnixTime> {
        Some(UnixTime::since_unix_epoch(Duration::from_secs(UnixTime::now().as_secs() + self.0.load(Relaxed))))
    }
}

/// A process with a certificate, and its clock.
struct Peer {
    writer: Writer,
    reader: Reader,
    clock: Arc<Ahead>,
}

impl Peer {
    fn new(folder: &Folder, name: &str) -> Self {
        let mut peer = Self::bare(folder, name);
        peer.certify(folder);
        peer
    }

    fn bare(folder: &Folder, name: &str) -> Self {
        let clock = Arc::new(Ahead::default());
        let server_name = id(name).to_server_name().unwrap_or_else(|| "machine".parse().unwrap());
        let (writer, reader) = channel_by(clock.clone(), id(name), server_name, roots(&folder.ca_pem()));
        Self { writer, reader, clock }
    }

    fn certify(&mut self, folder: &Folder) {
        let id = self.writer.id().clone();
        self.writer.set_certificate(folder.issuer().issue(&id).unwrap()).unwrap();
    }
}

fn roots(pem: &str) -> TrustAnchors {
    TrustAnchors::from_pem(pem).unwrap().0
}

/// Client and server of one mesh, after a handshake that left tickets.
async fn acquainted(name: &str) -> (Folder, Peer, Client, Peer) {
    let folder = Folder::new(name);
    let (web, server) = (Peer::new(&folder, WEB), Peer::new(&folder, SPIFFE));
    let client = web.reader.client(target(&server.reader, false));
    check(&client, &server, false).await;
    (folder, web, client, server)
}

/// Shakes hands, and demands that both ends agree on whether a session was resumed and who is who.
#[track_caller]
fn check(client: &Client, server: &Peer, resumed: bool) -> impl Future<Output = ()> {
    let at = std::panic::Location::caller();
    async move {
        let (connected, accepted) = shake(client, &server.reader, Alpn::None).await;
        let (connected, accepted) = (connected.unwrap(), accepted.unwrap());
        assert_eq!((connected.resumed, accepted.resumed), (resumed, resumed), "at {at}");
        assert_eq!(accepted.client_id.as_ref(), Some(&client.shared.id), "at {at}");
    }
}

#[tokio::test]
async fn a_session_goes_on_with_the_identity_that_was_proved() {
    let (_folder, _web, client, server) = acquainted("resume").await;
    for _ in 0..2 * MAX_TICKETS {
        check(&client, &server, true).await;
    }
}

#[tokio::test]
async fn each_ticket_is_used_once() {
    let (_folder, _web, client, server) = acquainted("once").await;
    // Connections that learn of no new tickets use up those of the first handshake.
    let mut resumed = Vec::new();
    for _ in 0..3 {
        let (a, b) = tokio::io::duplex(64 * 1024);
        let (connected, accepted) = tokio::join!(client.connect(a), server.reader.accept(b, Alpn::None));
        resumed.push((connected.unwrap().0.resumed, accepted.unwrap().0.resumed));
    }
    assert_eq!(resumed, [(true, true), (true, true), (false, false)]);
}

#[tokio::test]
async fn tickets_of_one_target_are_not_shown_to_another() {
    let (_folder, web, _client, server) = acquainted("targets").await;
    // The same server for another client, and with a transport header.
    check(&web.reader.client(target(&server.reader, false)), &server, false).await;
    let direct = web.reader.client(target(&server.reader, true));
    check(&direct, &server, false).await;
    check(&direct, &server, true).await;
    let (connected, accepted) = shake(&direct, &server.reader, Alpn::TransportHeader).await;
    let (connected, accepted) = (connected.unwrap(), accepted.unwrap());
    // The ticket was made where no transport header is taken.
    assert_eq!((connected.transport_header, connected.resumed, accepted.resumed), (true, false, false));
}

#[tokio::test]
async fn another_server_takes_no_ticket_even_under_the_same_name() {
    let (folder, _web, client, _server) = acquainted("replicas").await;
    let replica = Peer::new(&folder, SPIFFE);
    check(&client, &replica, false).await;
    check(&client, &replica, true).await;
}

#[tokio::test]
async fn another_identity_is_refused_with_or_without_tickets() {
    let (_folder, web, client, server) = acquainted("identity").await;
    let to = ClientTls { server_id: id(OTHER), ..client.target().clone() };
    let (connected, _) = shake(&web.reader.client(to), &server.reader, Alpn::None).await;
    assert!(matches!(connected, Err(Error::Peer(Invalid::Id { .. }))), "{connected:?}");
}

#[tokio::test]
async fn the_clients_tickets_die_with_its_certificate_and_its_anchors() {
    let (folder, mut web, client, server) = acquainted("client").await;
    web.certify(&folder);
    check(&client, &server, false).await;
    check(&client, &server, true).await;
    web.writer.set_trust_anchors(roots(&folder.ca_pem()));
    check(&client, &server, false).await;
    // A server whose authority is trusted no more is not believed for what it proved before.
    check(&client, &server, true).await;
    web.writer.set_trust_anchors(roots(&Folder::new("client-others").ca_pem()));
    let (connected, _) = shake(&client, &server.reader, Alpn::None).await;
    assert!(matches!(connected, Err(Error::Peer(Invalid::Untrusted))), "{connected:?}");
}

#[tokio::test]
async fn the_servers_tickets_die_with_its_certificate_and_its_anchors() {
    let (folder, _web, client, mut server) = acquainted("server").await;
    server.certify(&folder);
    check(&client, &server, false).await;
    check(&client, &server, true).await;
    // A client whose authority is trusted no more is not let in for what it proved before.
    server.writer.set_trust_anchors(roots(&Folder::new("server-others").ca_pem()));
    let (_, accepted) = shake(&client, &server.reader, Alpn::None).await;
    assert!(matches!(accepted, Err(Error::Peer(Invalid::Untrusted))), "{accepted:?}");
}

#[tokio::test]
async fn a_client_without_a_certificate_gains_none_by_its_tickets() {
    let folder = Folder::new("nobody");
    let (mut nobody, server) = (Peer::bare(&folder, WEB), Peer::new(&folder, SPIFFE));
    let client = nobody.reader.client(target(&server.reader, false));
    for resumed in [false, true] {
        let (connected, accepted) = shake(&client, &server.reader, Alpn::None).await;
        assert_eq!(connected.unwrap().resumed, resumed);
        assert_eq!(accepted.unwrap().client_id, None);
    }
    nobody.certify(&folder);
    check(&client, &server, false).await;
}

#[tokio::test]
async fn no_session_outlives_the_certificates_that_vouched_for_it() {
    let over = (LEAF_LIFETIME + crate::ca::CLOCK_SKEW + Duration::from_secs(2)).as_secs();
    // Tickets live shorter than certificates do, so the handshake comes late in a certificate's life.
    let late = over - 60;
    for at_server in [true, false] {
        let (_folder, web, client, server) = acquainted("late").await;
        let clock = if at_server { &server.clock } else { &web.clock };
        for clock in [&web.clock, &server.clock] {
            clock.0.store(late, Relaxed);
        }
        let (connected, _) = shake(&client, &server.reader, Alpn::None).await;
        assert!(!connected.unwrap().resumed, "a ticket of a day ago");
        check(&client, &server, true).await;
        clock.0.store(over, Relaxed);
        let (connected, accepted) = shake(&client, &server.reader, Alpn::None).await;
        let error = if at_server { accepted.unwrap_err() } else { connected.unwrap_err() };
        assert!(matches!(error, Error::Peer(Invalid::Expired(_))), "{error}");
    }
}

#[tokio::test]
async fn clients_that_ask_for_no_tickets_get_none() {
    let (_folder, web, client, server) = acquainted("silent").await;
    let state = web.reader.shared.state.load_full();
    let mut config = client_config(&web.reader.shared.time, &state, client.target());
    config.send_ticket_request = None;
    client.made.store(Some(Arc::new(Made { of: Arc::downgrade(&state), config: Arc::new(config) })));
    check(&client, &server, false).await;
    check(&client, &server, false).await;
}
