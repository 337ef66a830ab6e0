//! Each line of the input is `NAME=value`: no environment may panic the proxy, and a refused one names its faults.
#![no_main]

use libfuzzer_sys::fuzz_target;
use linkerd_app::config::env::{Mode, parse};
use std::{collections::HashMap, ffi::OsString};

fuzz_target!(|text: &str| {
    let vars: HashMap<&str, &str> =
        text.lines().filter_map(|line| line.split_once('=')).map(|(k, v)| (k.trim(), v)).collect();
    let names: Vec<String> = vars.keys().map(ToString::to_string).collect();
    for mode in [Mode::Linkerd, Mode::Standalone { explicit: false }] {
        if let Err(invalid) = parse(&|name| vars.get(name).map(OsString::from), names.clone(), mode) {
            assert!(!invalid.faults.is_empty());
        }
    }
});
