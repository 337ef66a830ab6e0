//! The ClientHello parser reads whatever a client sends first: it must never panic, and more bytes must never turn a
//! decision into another one.
#![no_main]

use libfuzzer_sys::fuzz_target;
use linkerd_tls::detect::{Sni, sni};

fuzz_target!(|bytes: &[u8]| {
    let whole = sni(bytes);
    for end in 0..bytes.len() {
        match sni(&bytes[..end]) {
            Sni::Incomplete => {}
            decided => {
                assert_eq!(format!("{decided:?}"), format!("{whole:?}"), "decided early, at {end}");
                break;
            }
        }
    }
});
