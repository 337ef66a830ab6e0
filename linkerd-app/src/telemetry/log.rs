//! Diagnostics on standard output: two formats and a filter that can be replaced while running (contract.md 1.11, 3.5).

use std::{fmt, time::Instant};
use tracing::{Subscriber, level_filters::LevelFilter};
use tracing_subscriber::{
    EnvFilter, Layer as _, Registry,
    fmt::{MakeWriter, format::Writer, time::FormatTime},
    layer::SubscriberExt as _,
    reload,
};

/// What is logged when nothing was asked for.
pub const DEFAULT_FILTER: &str = "warn,linkerd=info,hickory=error";

/// How lines look.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq)]
pub enum Format {
    /// Uptime, level, thread, spans, target, message, fields.
    #[default]
    Plain,
    /// One object per line.
    Json,
}

impl Format {
    /// `json` in any case is JSON; everything else is plain.
    pub fn parse(text: &str) -> Self {
        if text.trim().eq_ignore_ascii_case("json") { Self::Json } else { Self::Plain }
    }
}

/// The filter in force; clones share it.
#[derive(Clone, Debug)]
pub struct Handle(Option<reload::Handle<EnvFilter, Registry>>);

/// A filter that can't be parsed; the text is the parser's.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct InvalidFilter(String);

/// Makes this the process's logger. `off` (trimmed, any case) disables logging for good. Directives of `filter` that
/// can't be parsed are left out, each with a note on standard error.
///
/// # Errors
/// When the process has a logger already.
pub fn init(filter: Option<&str>, format: Format) -> Result<Handle, tracing::subscriber::SetGlobalDefaultError> {
    let filter = filter.map(str::trim).filter(|f| !f.is_empty()).unwrap_or(DEFAULT_FILTER);
    if filter.eq_ignore_ascii_case("off") {
        return Ok(Handle(None));
    }
    let (subscriber, handle) = subscriber(lossy(filter), format, std::io::stdout);
    tracing::subscriber::set_global_default(subscriber)?;
    Ok(handle)
}

impl Handle {
    /// Of a process that does not log.
    pub fn off() -> Self {
        Self(None)
    }

    /// A handle whose filter nothing is logged by.
    #[cfg(test)]
    pub(crate) fn detached(filter: &str) -> Self {
        let (layer, handle) = reload::Layer::new(lossy(filter));
        // The handle refers to the layer, which a subscriber would own.
        Box::leak(Box::new(layer));
        Self(Some(handle))
    }

    /// The filter in force, as directives separated by commas; none when logging is off.
    pub fn filter(&self) -> Option<String> {
        self.0.as_ref()?.with_current(EnvFilter::to_string).ok()
    }

    /// Replaces the whole filter. Nothing happens when logging is off.
    ///
    /// # Errors
    /// When a directive can't be parsed; the filter stays as it was.
    pub fn set_filter(&self, filter: &str) -> Result<(), InvalidFilter> {
        let Some(handle) = &self.0 else { return Ok(()) };
        let filter = builder().parse(filter.trim()).map_err(|error| InvalidFilter(error.to_string()))?;
        handle.reload(filter).map_err(|error| InvalidFilter(error.to_string()))
    }
}

fn builder() -> tracing_subscriber::filter::Builder {
    EnvFilter::builder().with_default_directive(LevelFilter::WARN.into()).with_regex(false)
}

fn lossy(filter: &str) -> EnvFilter {
    builder().parse_lossy(filter)
}

fn subscriber<W>(filter: EnvFilter, format: Format, writer: W) -> (Box<dyn Subscriber + Send + Sync>, Handle)
where
    W: for<'a> MakeWriter<'a> + Send + Sync + 'static,
{
    let (filter, handle) = reload::Layer::new(filter);
    let lines = tracing_subscriber::fmt::layer().with_ansi(false).with_thread_ids(true).with_writer(writer);
    let lines = match format {
        Format::Plain => lines.with_timer(Uptime(Instant::now())).boxed(),
        Format::Json => lines.json().with_current_span(false).with_span_list(true).boxed(),
    };
    (Box::new(tracing_subscriber::registry().with(filter).with(lines)), Handle(Some(handle)))
}

/// `[     0.001234s]`: seconds since logging began. A log line is no place for a clock that tests could turn.
struct Uptime(Instant);

impl FormatTime for Uptime {
    fn format_time(&self, out: &mut Writer<'_>) -> fmt::Result {
        let elapsed = self.0.elapsed();
        write!(out, "[{:>6}.{:06}s]", elapsed.as_secs(), elapsed.subsec_micros())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use parking_lot::Mutex;
    use std::{io, sync::Arc};

    #[derive(Clone, Default)]
    struct Sink(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Sink {
        fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
            self.0.lock().extend_from_slice(buf);
            Ok(buf.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// What is written by a function under a filter.
    fn logged(filter: &str, format: Format, f: impl FnOnce(&Handle)) -> String {
        let sink = Sink::default();
        let writer = sink.clone();
        let (subscriber, handle) = subscriber(lossy(filter), format, move || writer.clone());
        tracing::subscriber::with_default(subscriber, || f(&handle));
        let bytes = sink.0.lock().clone();
        String::from_utf8(bytes).unwrap()
    }

    fn event() {
        let _span = tracing::info_span!("accept", client = "1.2.3.4:5").entered();
        let _inner = tracing::info_span!("http").entered();
        tracing::info!(status = 200, "hello");
    }

    #[test]
    fn plain_lines() {
        let line = logged("info", Format::Plain, |_| event());
        let (uptime, rest) = line.split_at("[     0.000000s]".len());
        assert!(uptime.starts_with("[     0.") && uptime.ends_with("s]"), "{line}");
        let (thread, rest) = rest.split_once(") ").unwrap();
        assert!(thread.starts_with("  INFO ThreadId("), "{line}");
        assert_eq!(rest, "accept{client=\"1.2.3.4:5\"}:http: linkerd_app::telemetry::log::tests: hello status=200\n");
    }

    #[test]
    fn json_lines() {
        let line = logged("info", Format::Json, |_| event());
        let mut at = 0;
        for key in ["timestamp", "level", "fields", "target", "spans", "threadId"] {
            let key = format!("\"{key}\":");
            at += line[at..].find(&key).unwrap_or_else(|| panic!("{key} after byte {at} of {line}"));
        }
        let value: serde_json::Value = serde_json::from_str(&line).unwrap();
        assert_eq!(value["fields"], serde_json::json!({ "message": "hello", "status": 200 }));
        assert_eq!(value["spans"][0], serde_json::json!({ "client": "1.2.3.4:5", "name": "accept" }));
        let timestamp = value["timestamp"].as_str().unwrap();
        assert_eq!(timestamp.len(), "2026-01-01T00:00:00.000000Z".len(), "{timestamp}");
        assert!(!logged("info", Format::Json, |_| tracing::info!("x")).contains("spans"));
    }

    #[test]
    fn filters_go_by_prefix_and_can_be_replaced() {
        assert_eq!(logged("warn,linkerd=info", Format::Plain, |_| event()).lines().count(), 1);
        assert_eq!(logged("warn,linked=info", Format::Plain, |_| event()), "");
        // The injector's default: events with headers are hidden.
        let injected = "warn,linkerd=info,hickory=error,[{headers}]=off,[{request}]=off";
        let lines = logged(injected, Format::Plain, |handle| {
            event();
            handle.set_filter("error").unwrap();
            event();
            assert_eq!(handle.filter().as_deref(), Some("error"));
            assert!(handle.set_filter("linkerd=loud").is_err());
            assert_eq!(handle.filter().as_deref(), Some("error"));
        });
        assert_eq!(lines.lines().count(), 1);
    }

    #[test]
    fn off_has_no_filter() {
        let off = Handle::off();
        assert_eq!(off.filter(), None);
        off.set_filter("debug").unwrap();
        assert_eq!(off.filter(), None);
    }
}
