//! What is said of the workload with every batch of spans (contract.md 1.9).

use super::otlp::{Resource, Value};
use crate::config::Traces;
use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, Read},
    path::Path,
    time::{SystemTime, UNIX_EPOCH},
};

/// Longest file of attributes, bytes; a pod's labels are at most 256 KiB in practice (the limit of its metadata).
const MAX_FILE: u64 = 256 * 1024;

/// The resource's attributes. Reads the file of attributes; if that can't be read, they are left out with a warning.
pub fn resource(config: &Traces) -> Resource {
    let labels = config.attributes_path.as_deref().map(|path| {
        read(path).unwrap_or_else(|error| {
            tracing::warn!(
                path = %path.display(), %error,
                "LINKERD2_PROXY_TRACE_ATTRIBUTES_PATH can't be read; its attributes are left out"
            );
            String::new()
        })
    });
    let mut texts: BTreeMap<String, String> = BTreeMap::new();
    texts.extend(config.service_name.iter().map(|name| ("service.name".to_string(), name.clone())));
    let lines = labels.as_deref().unwrap_or_default().lines();
    texts.extend(lines.chain(config.attributes.iter().map(String::as_str)).filter_map(attribute));
    texts.insert("host.name".into(), config.host_name.clone());
    let started = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let numbers = [
        ("process.pid", i64::from(std::process::id())),
        ("process.start_timestamp", i64::try_from(started.as_secs()).unwrap_or(i64::MAX)),
    ];
    let numbers = numbers.map(|(key, number)| (key.to_string(), Value::Int(number)));
    Resource::new(texts.into_iter().map(|(key, text)| (key, Value::Text(text))).chain(numbers))
}

/// The first `=` splits; quotes around the value, as the downward API writes them, are dropped.
fn attribute(line: &str) -> Option<(String, String)> {
    let (key, value) = line.split_once('=')?;
    Some((key.trim().to_string(), value.trim().trim_matches('"').to_string()))
}

fn read(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    File::open(path)?.take(MAX_FILE).read_to_string(&mut text)?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::ControlAddr;
    use prost::Message;

    fn config(attributes: &[&str]) -> Traces {
        Traces {
            collector: ControlAddr { host: "localhost.".into(), port: 4317, identity: None },
            service_name: Some("proxy".into()),
            attributes_path: None,
            attributes: attributes.iter().map(|line| line.to_string()).collect(),
            host_name: "web-0".into(),
        }
    }

    /// The attributes as the wire has them, without those of the process.
    #[track_caller]
    fn check(config: &Traces, expected: &[(&str, &str)]) {
        let mut wanted: BTreeMap<_, _> = expected.iter().copied().collect();
        wanted.insert("host.name", "web-0");
        let texts = wanted.into_iter().map(|(k, v)| (k.to_string(), Value::Text(v.to_string())));
        let expected = Resource::new(texts).encode_to_vec();
        let found = resource(config).encode_to_vec();
        assert!(found.starts_with(&expected), "{:?}", String::from_utf8_lossy(&found));
        let rest = String::from_utf8_lossy(&found[expected.len()..]).into_owned();
        assert!(rest.contains("process.pid") && rest.contains("process.start_timestamp"), "{rest}");
    }

    #[test]
    fn later_attributes_win() {
        check(&config(&[]), &[("service.name", "proxy")]);
        check(
            &config(&["a=1", "a=2=3", "b=\"x\"", "no value"]),
            &[("service.name", "proxy"), ("a", "2=3"), ("b", "x")],
        );
        check(&config(&["service.name=other"]), &[("service.name", "other")]);
    }

    #[test]
    fn the_file_is_read_and_a_missing_one_is_no_failure() {
        let path = std::env::temp_dir().join(format!("trace-attributes-{}", std::process::id()));
        std::fs::write(&path, "app=\"web\"\nservice.name=\"labels\"\n").unwrap();
        let of = |path: &Path, lines: &[&str]| Traces { attributes_path: Some(path.into()), ..config(lines) };
        check(&of(&path, &["app=extra"]), &[("service.name", "labels"), ("app", "extra")]);
        std::fs::remove_file(&path).unwrap();
        check(&of(&path, &[]), &[("service.name", "proxy")]);
    }
}
