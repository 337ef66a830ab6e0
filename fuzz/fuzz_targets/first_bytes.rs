//! HTTP detection judges whatever a client sends first: it must never panic, wait no longer than its buffer is long, and
//! take a connection preface for nothing else than HTTP/2.
#![no_main]

use libfuzzer_sys::fuzz_target;
use linkerd_stack::detect::{Detected, MAX_PEEK, classify};

fuzz_target!(|bytes: &[u8]| {
    for end in 0..=bytes.len().min(2 * MAX_PEEK) {
        let judged = classify(&bytes[..end]);
        assert!(judged.is_some() || end < MAX_PEEK, "undecided after {end} bytes");
    }
    let preface = [&b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"[..], bytes].concat();
    assert_eq!(classify(&preface), Some(Detected::H2));
    let request = [&b"GET / HTTP/1.1\r\n"[..], bytes].concat();
    assert_eq!(classify(&request), Some(Detected::H1));
});
