//! Rate limits by client, in bounded memory whatever the number of clients. A process of its own, so that what it holds is
//! what the limiter holds.

#![allow(clippy::unwrap_used, reason = "a failed expectation is what a test is for, in its helpers too")]

use linkerd_stack::rate::{Keyed, MAX_KEYS};
use std::{fs, num::NonZeroU32};

const CLIENTS: u32 = 1_000_000;

/// Twice what [`MAX_KEYS`] says, for what the allocator keeps.
const MOST_BYTES: usize = 20 << 20;

/// Resident bytes of this process.
fn resident() -> usize {
    let pages = fs::read_to_string("/proc/self/statm").expect("Linux has it");
    pages.split(' ').nth(1).and_then(|pages| pages.parse::<usize>().ok()).expect("two numbers or more") * 4096
}

#[tokio::test(start_paused = true)]
async fn a_million_identities_are_limited_in_bounded_memory() {
    let keyed: Keyed<String> = Keyed::new(NonZeroU32::MIN);
    let before = resident();
    let identity = |i: u32| format!("client-{i}.shop.serviceaccount.identity.linkerd.cluster.local");
    let admitted = (0..CLIENTS).filter(|i| keyed.check(&identity(*i)).is_ok()).count();
    let grown = resident().saturating_sub(before);
    assert!(grown < MOST_BYTES, "{} MiB for {CLIENTS} clients", grown >> 20);
    // Each client with a bucket was admitted once; those without share one.
    assert_eq!((admitted, keyed.len()), (MAX_KEYS + 1, MAX_KEYS));
}
