//! A connection's first bytes: which protocol.

use bytes::BytesMut;
use criterion::Criterion;
use futures_util::FutureExt;
use linkerd_stack::detect;
use std::{hint::black_box, time::Duration};

const HTTP1: &[u8] = b"GET /items/17?color=blue HTTP/1.1\r\nhost: web.shop\r\nuser-agent: bench\r\naccept: */*\r\n\r\n";
const HTTP2: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const OPAQUE: &[u8] = b"\x00\x00\x00\x17\x00\x03\x00\x00user\x00root\x00\x00\x00\x00";

pub(crate) fn benches(c: &mut Criterion) {
    let runtime = crate::runtime();
    let _entered = runtime.enter();
    let mut group = c.benchmark_group("detect");
    for (name, bytes) in [("http1", HTTP1), ("http2", HTTP2), ("opaque", OPAQUE)] {
        group.bench_function(name, |b| {
            b.iter(|| {
                let (mut io, mut buf) = (black_box(bytes), BytesMut::new());
                let detected = detect::http(&mut io, Duration::from_secs(10), &mut buf).now_or_never();
                detected.unwrap().unwrap()
            });
        });
    }
    group.bench_function("sni", |b| {
        let hello = client_hello("web.shop.serviceaccount.identity.linkerd.cluster.local");
        b.iter(|| linkerd_tls::detect::sni(black_box(&hello)));
    });
}

/// A TLS 1.2-style ClientHello with one extension, server_name (RFC 8446 section 4.1.2, RFC 6066 section 3).
fn client_hello(name: &str) -> Vec<u8> {
    let prefixed = |len: usize, body: Vec<u8>| {
        let mut out = (body.len() as u32).to_be_bytes()[4 - len..].to_vec();
        out.extend(body);
        out
    };
    let entry = [vec![0], prefixed(2, name.as_bytes().to_vec())].concat();
    let extension = [vec![0, 0], prefixed(2, prefixed(2, entry))].concat();
    let body = [
        vec![3, 3],
        vec![7; 32],
        prefixed(1, vec![9; 32]),
        prefixed(2, vec![0x13, 0x01]),
        prefixed(1, vec![0]),
        prefixed(2, extension),
    ]
    .concat();
    let handshake = [vec![1], prefixed(3, body)].concat();
    [vec![22, 3, 1], prefixed(2, handshake)].concat()
}
