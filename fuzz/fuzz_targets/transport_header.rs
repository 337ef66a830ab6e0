//! The transport header is the first thing an authenticated peer sends. Whatever is read can be written again and read
//! to the same value.
#![no_main]

use libfuzzer_sys::fuzz_target;
use linkerd_app::transport::header;
use std::time::Duration;

fuzz_target!(|bytes: &[u8]| {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build();
    let Ok(runtime) = runtime else { return };
    runtime.block_on(async {
        let mut io = bytes;
        let Ok((read, rest)) = header::read(&mut io, Duration::from_secs(1)).await else { return };
        assert!(rest.len() <= bytes.len());
        let encoded = read.encode();
        let mut again = &encoded[..];
        let (reread, rest) = header::read(&mut again, Duration::from_secs(1)).await.expect("our own encoding");
        assert_eq!((format!("{reread:?}"), rest.len()), (format!("{read:?}"), 0));
    });
});
