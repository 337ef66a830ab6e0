//! Taps, without their server.

use super::*;
use bytes::Bytes;
use futures_util::StreamExt as _;
use http::{Response, header::HeaderMap};
use http_body_util::BodyExt as _;
use linkerd_stack::http::{Body, BodyError};
use linkerd2_proxy_api::{
    net::IpAddress,
    tap::{
        observe_request::{
            Extract, Match,
            extract::{self, http::Headers},
            r#match::{Http, Label, Match as M, Seq, Tcp, http as h, tcp},
        },
        tap_event::{self, http::Event},
    },
};

fn all() -> Match {
    of(M::All(Seq { matches: vec![] }))
}

fn of(m: M) -> Match {
    Match { r#match: Some(m) }
}

fn wanted(limit: u32, r#match: Match) -> ObserveRequest {
    ObserveRequest { limit, r#match: Some(r#match), extract: None }
}

fn request() -> Request<Body> {
    let req = Request::get("http://web.shop/a/b?c=d").header("x", "y").version(http::Version::HTTP_2);
    req.body(Body::empty()).unwrap()
}

fn about() -> About {
    let tls = ClientTls::Terminated(Some("client.shop".parse().unwrap()));
    About::inbound(([10, 1, 0, 7], 4321).into(), &tls, ([10, 1, 0, 8], 8080).into())
        .caused_by("srv", &Meta::resource("policy.linkerd.io", "server", "shop", "web", None))
}

#[track_caller]
fn next(events: &mut Events) -> Option<TapEvent> {
    futures_util::FutureExt::now_or_never(events.next()).expect("an event at once").map(Result::unwrap)
}

#[track_caller]
fn http(events: &mut Events) -> Event {
    let Some(tap_event::Event::Http(http)) = next(events).expect("an event").event else { panic!("no HTTP event") };
    http.event.unwrap()
}

#[track_caller]
fn refused(req: ObserveRequest, code: tonic::Code, why: &str) {
    let Err(status) = Taps::default().observe(req) else { panic!("{why}: accepted") };
    assert_eq!((status.code(), status.message().contains(why)), (code, true), "{status}");
}

#[test]
fn requests_that_make_no_sense_are_refused() {
    let invalid = |m: M, why: &str| refused(wanted(1, of(m)), tonic::Code::InvalidArgument, why);
    refused(wanted(0, all()), tonic::Code::InvalidArgument, "limit must be positive");
    refused(ObserveRequest { limit: 1, ..Default::default() }, tonic::Code::InvalidArgument, "match is missing");
    let ip = || Some(IpAddress::from(std::net::IpAddr::from([10, 0, 0, 0])));
    for mask in [0, 33, 300] {
        let net = Tcp { r#match: Some(tcp::Match::Netmask(tcp::Netmask { ip: ip(), mask })) };
        invalid(M::Source(net), "no netmask");
    }
    for (min, max) in [(0, 0), (9, 8), (1, 70_000)] {
        let ports = Tcp { r#match: Some(tcp::Match::Ports(tcp::PortRange { min, max })) };
        invalid(M::Destination(ports), "no ports");
    }
    invalid(M::Not(Box::new(Match { r#match: None })), "a match is missing");
}

#[test]
fn conditions_choose_requests() {
    let check = |m: M, expected: bool| {
        let filter = Filter::try_from(of(m.clone())).unwrap();
        assert_eq!(filter.matches(&request(), &about()), expected, "{m:?}");
    };
    let ports = |min, max| Tcp { r#match: Some(tcp::Match::Ports(tcp::PortRange { min, max })) };
    let net = |ip: [u8; 4], mask| {
        let ip = Some(std::net::IpAddr::from(ip).into());
        Tcp { r#match: Some(tcp::Match::Netmask(tcp::Netmask { ip, mask })) }
    };
    let label = |key: &str, value: &str| Label { key: key.into(), value: value.into() };
    let path = |m| M::Http(Http { r#match: Some(h::Match::Path(h::StringMatch { r#match: Some(m) })) });
    check(M::Source(net([10, 1, 9, 9], 16)), true);
    check(M::Destination(net([10, 2, 0, 0], 16)), false);
    check(M::Destination(ports(8080, 0)), true);
    check(M::Destination(ports(0, 8080)), true);
    check(M::Destination(ports(8000, 8079)), false);
    check(M::DestinationLabel(label("srv_name", "web")), true);
    check(M::DestinationLabel(label("srv_name", "api")), false);
    check(M::RouteLabel(label("route", "r")), false);
    check(path(h::string_match::Match::Exact("/a/b".into())), true);
    check(path(h::string_match::Match::Prefix("/b".into())), false);
    check(M::Http(Http { r#match: Some(h::Match::Scheme("http".into())) }), true);
    check(M::Http(Http { r#match: Some(h::Match::Method(http::Method::POST.into())) }), false);
    check(M::Any(Seq { matches: vec![] }), false);
    check(M::Not(Box::new(of(M::Any(Seq { matches: vec![] })))), true);
    let both = vec![of(M::Source(net([10, 1, 0, 0], 16))), of(M::Destination(ports(1, 80)))];
    check(M::All(Seq { matches: both.clone() }), false);
    check(M::Any(Seq { matches: both }), true);
}

#[tokio::test(start_paused = true)]
async fn an_exchange_is_told_from_beginning_to_end() {
    let taps = Taps::default();
    assert!(taps.request(&request(), || panic!("nobody asked")).is_none());
    let headers = extract::Http { extract: Some(extract::http::Extract::Headers(Headers {})) };
    let extract = Some(Extract { extract: Some(extract::Extract::Http(headers)) });
    let mut events = taps.observe(ObserveRequest { extract, ..wanted(1, all()) }).ok().unwrap();

    let seen = taps.request(&request(), about).unwrap();
    let first = next(&mut events).unwrap();
    assert_eq!(first.source_meta.unwrap().labels["client_id"], "client.shop");
    let labels = first.destination_meta.unwrap().labels;
    assert_eq!((&*labels["srv_kind"], &*labels["tls"]), ("server", "loopback"));
    let Some(tap_event::Event::Http(tap_event::Http { event: Some(Event::RequestInit(init)) })) = first.event else {
        panic!("no request")
    };
    assert_eq!((&*init.authority, &*init.path), ("web.shop", "/a/b"));
    let names: Vec<_> = init.headers.unwrap().headers.into_iter().map(|h| h.name).collect();
    assert_eq!(names, [":method", ":scheme", ":authority", ":path", "x"]);

    tokio::time::advance(std::time::Duration::from_millis(30)).await;
    let trailers = HeaderMap::from_iter([("grpc-status".parse().unwrap(), "7".parse().unwrap())]);
    let frames: [Result<_, BodyError>; 2] =
        [Ok(http_body::Frame::data(Bytes::from_static(b"hello"))), Ok(http_body::Frame::trailers(trailers))];
    let body = Body::new(http_body_util::StreamBody::new(futures_util::stream::iter(frames)));
    let rsp = seen.response(Response::builder().status(202).body(body).unwrap());
    let Event::ResponseInit(began) = http(&mut events) else { panic!("no response") };
    assert_eq!((began.http_status, began.since_request_init.unwrap().nanos), (202, 30_000_000));

    // The limit is reached: others are not taken, and the events end with the last.
    assert!(!taps.any());
    rsp.into_body().collect().await.unwrap();
    let Event::ResponseEnd(end) = http(&mut events) else { panic!("no end") };
    assert_eq!((end.id, end.response_bytes), (init.id, 5));
    assert_eq!(end.eos, Some(linkerd2_proxy_api::tap::Eos::from_grpc_status(7)));
    assert_eq!(end.trailers.unwrap().headers[0].value, b"7");
    assert_eq!(next(&mut events), None);
}

#[test]
fn failures_and_requests_given_up_are_resets() {
    let taps = Taps::default();
    let mut events = taps.observe(wanted(9, all())).ok().unwrap();
    let mut check = |end: fn(Observed), reason: h2::Reason| {
        end(taps.request(&request(), about).unwrap());
        let Event::RequestInit(init) = http(&mut events) else { panic!("no request") };
        assert!(init.headers.is_none());
        let Event::ResponseEnd(end) = http(&mut events) else { panic!("no end") };
        assert_eq!((end.eos, end.since_response_init), (Some(reason.into()), None));
    };
    check(drop, h2::Reason::CANCEL);
    check(
        |seen| seen.failed(&crate::error::Cause::FailFast(crate::error::Lack::Readiness)),
        h2::Reason::INTERNAL_ERROR,
    );
    check(|seen| seen.failed(&crate::error::Cause::Http2Reset(h2::Reason::REFUSED_STREAM)), h2::Reason::REFUSED_STREAM);
}

#[test]
fn taps_are_bounded_and_end_with_their_connection() {
    let taps = Taps::default();
    let mut held: Vec<_> = (0..MAX_TAPS).map(|_| taps.observe(wanted(1_000, all())).ok().unwrap()).collect();
    assert_eq!(taps.observe(wanted(1, all())).err().unwrap().code(), tonic::Code::ResourceExhausted);
    // A queue that nobody empties loses events, and nothing else.
    for _ in 0..MAX_EVENTS {
        drop(taps.request(&request(), about));
    }
    let told = std::iter::from_fn(|| held[0].queue.try_recv().ok()).count();
    assert_eq!(told, MAX_EVENTS);
    held.clear();
    assert!(!taps.any());
}
