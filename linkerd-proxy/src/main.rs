//! The binary: which of its duties is asked for, the allocator, runtimes, signals and exit codes.

mod cli;
mod commands;
mod memory;
mod runtime;
mod secrecy;

use std::{path::Path, process::ExitCode};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// The names under which an image carries this binary for its other duties (contract.md 5.1).
fn main() -> ExitCode {
    let mut args = std::env::args_os();
    let name = args.next().unwrap_or_default();
    match Path::new(&name).file_name().and_then(|n| n.to_str()) {
        Some("linkerd2-proxy-init") => commands::init(args.collect()),
        Some("linkerd2-network-validator") => {
            commands::dispatch(["linkerd-proxy".into(), "validate".into()].into_iter().chain(args))
        }
        Some("linkerd-await") => commands::dispatch(["linkerd-proxy".into(), "await".into()].into_iter().chain(args)),
        // The helper's work (key, request, trust anchors) is done in memory by the proxy itself.
        Some("linkerd2-proxy" | "linkerd2-proxy-identity") => commands::linkerd(),
        _ => commands::dispatch(std::env::args_os()),
    }
}
