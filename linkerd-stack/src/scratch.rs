//! One buffer per thread for bytes that pass through within a single poll, so that waiting connections need none.

use std::cell::RefCell;

/// Size of the buffer in bytes: four full TLS records, beyond which larger reads gain nothing measurable.
pub(crate) const SCRATCH: usize = 64 * 1024;

thread_local! {
    static BUFFER: RefCell<Option<Box<[u8; SCRATCH]>>> = const { RefCell::new(None) };
}

/// Lends the thread's buffer. What it holds before is leftover bytes of others: only what was written may be read.
/// Used within itself (a stream that copies inside its own poll) it makes a buffer for the occasion.
pub(crate) fn with<T>(f: impl FnOnce(&mut [u8; SCRATCH]) -> T) -> T {
    let mut buffer = BUFFER.try_with(RefCell::take).ok().flatten().unwrap_or_else(new);
    let result = f(&mut buffer);
    let _ = BUFFER.try_with(|slot| slot.replace(Some(buffer)));
    result
}

/// Made on the heap without a detour over the stack.
fn new() -> Box<[u8; SCRATCH]> {
    vec![0; SCRATCH].try_into().unwrap_or_else(|_: Vec<u8>| Box::new([0; SCRATCH]))
}
