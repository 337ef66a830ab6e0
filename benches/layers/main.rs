//! Benches of layers.
fn main() {}
