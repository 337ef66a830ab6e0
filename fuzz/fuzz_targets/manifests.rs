//! Manifests are written by people and by tools: whatever stands in them, they are read without a panic, and each fault has
//! a place and a text.
#![no_main]

use libfuzzer_sys::fuzz_target;
use linkerd_app::standalone::check;

fuzz_target!(|text: &str| {
    let path = std::env::temp_dir().join(format!("manifests-{}.yaml", std::process::id()));
    if std::fs::write(&path, text).is_err() {
        return;
    }
    let report = check(std::slice::from_ref(&path));
    let _ = std::fs::remove_file(&path);
    assert_eq!(report.files, 1);
    assert!(report.findings.iter().all(|finding| !finding.why.is_empty() && *finding.file == *path));
    let _ = report.to_string();
});
