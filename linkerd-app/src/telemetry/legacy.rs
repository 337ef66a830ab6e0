//! The older dialect (metrics.md 1): names whole in HELP and TYPE, integers that wrap at 2^53, `le` last and without decimals,
//! absent labels left out. Printed from the same cells that everything else reads.

use super::{labels::Text, metric::Histogram};
use std::{fmt::Write as _, sync::Arc};

/// Counters wrap here, so that readers that hold them in a double lose nothing.
const WRAP: u64 = (1 << 53) - 1;

/// Labels of one sample: the series' own and what a family adds.
#[derive(Copy, Clone)]
pub(super) struct Sample<'a> {
    pub(super) before: &'a [(&'a str, Text<'a>)],
    pub(super) base: &'a str,
    pub(super) after: &'a [(&'a str, Text<'a>)],
}

impl<'a> From<&'a Arc<str>> for Sample<'a> {
    fn from(base: &'a Arc<str>) -> Self {
        Self { before: &[], base, after: &[] }
    }
}

/// Prints one family; its header comes with its first sample, so that empty families print nothing.
pub(super) struct Family<'a> {
    out: &'a mut String,
    name: &'a str,
    kind: &'static str,
    help: &'static str,
    begun: bool,
}

impl<'a> Family<'a> {
    pub(super) fn counter(out: &'a mut String, name: &'a str, help: &'static str) -> Self {
        Self { out, name, kind: "counter", help, begun: false }
    }

    pub(super) fn gauge(out: &'a mut String, name: &'a str, help: &'static str) -> Self {
        Self { out, name, kind: "gauge", help, begun: false }
    }

    pub(super) fn histogram(out: &'a mut String, name: &'a str, help: &'static str) -> Self {
        Self { out, name, kind: "histogram", help, begun: false }
    }

    pub(super) fn value(&mut self, labels: Sample<'_>, value: u64) {
        self.header();
        self.sample("", labels, None, value);
    }

    pub(super) fn distribution(&mut self, labels: Sample<'_>, histogram: &Histogram) {
        self.header();
        let mut cumulative = 0;
        let bounds = histogram.scale().bounds.iter().copied().map(Text::Num).chain([Text::Str("+Inf")]);
        for (count, bound) in histogram.buckets().zip(bounds) {
            cumulative += count;
            self.sample("_bucket", labels, Some(bound), cumulative);
        }
        self.sample("_count", labels, None, cumulative);
        self.sample("_sum", labels, None, histogram.sum());
    }

    fn header(&mut self) {
        if !self.begun {
            self.begun = true;
            // Writing to a String cannot fail, here and below.
            let _ = write!(self.out, "# HELP {0} {1}\n# TYPE {0} {2}\n", self.name, self.help, self.kind);
        }
    }

    fn sample(&mut self, suffix: &str, labels: Sample<'_>, le: Option<Text<'_>>, value: u64) {
        let out = &mut *self.out;
        out.push_str(self.name);
        out.push_str(suffix);
        let mut open = '{';
        for (name, value) in labels.before {
            label(out, &mut open, name, *value);
        }
        if !labels.base.is_empty() {
            out.push(std::mem::replace(&mut open, ','));
            out.push_str(labels.base);
        }
        for (name, value) in labels.after {
            label(out, &mut open, name, *value);
        }
        if let Some(le) = le {
            label(out, &mut open, "le", le);
        }
        if open == ',' {
            out.push('}');
        }
        let _ = writeln!(out, " {}", value & WRAP);
    }
}

/// Writes one label; `open` is the brace or comma that comes before it.
fn label(out: &mut String, open: &mut char, name: &str, value: Text<'_>) {
    out.push(std::mem::replace(open, ','));
    out.push_str(name);
    out.push_str("=\"");
    value.write(out);
    out.push('"');
}

#[cfg(test)]
mod tests {
    use super::{super::metric::LATENCY_MS, *};

    #[test]
    fn samples_and_headers() {
        let mut out = String::new();
        let mut family = Family::counter(&mut out, "x_total", "What it is.");
        family.value(Sample { before: &[], base: "", after: &[] }, 1);
        family.value(Sample { before: &[("error", Text::Str("i/o"))], base: "a=\"1\"", after: &[] }, (1 << 53) + 2);
        family.value(Sample { before: &[], base: "a=\"1\"", after: &[("status_code", Text::Num(200))] }, 3);
        family.value(Sample { before: &[], base: "", after: &[("e", Text::Str(""))] }, 4);
        assert_eq!(
            out,
            "# HELP x_total What it is.\n# TYPE x_total counter\nx_total 1\nx_total{error=\"i/o\",a=\"1\"} 2\n\
             x_total{a=\"1\",status_code=\"200\"} 3\nx_total{e=\"\"} 4\n"
        );
    }

    #[test]
    fn histograms_print_bucket_count_sum_with_le_last() {
        let h = Histogram::new(&LATENCY_MS);
        h.observe(1);
        h.observe(60_000);
        let mut out = String::new();
        Family::histogram(&mut out, "l_ms", "Latency.")
            .distribution(Sample { before: &[], base: "a=\"b\"", after: &[] }, &h);
        let lines: Vec<_> = out.lines().collect();
        assert_eq!(lines.len(), 2 + 26 + 2);
        assert_eq!(lines[1], "# TYPE l_ms histogram");
        assert_eq!(lines[2], r#"l_ms_bucket{a="b",le="1"} 1"#);
        assert_eq!(lines[26], r#"l_ms_bucket{a="b",le="50000"} 1"#);
        assert_eq!(lines[27], r#"l_ms_bucket{a="b",le="+Inf"} 2"#);
        assert_eq!(lines[28], r#"l_ms_count{a="b"} 2"#);
        assert_eq!(lines[29], r#"l_ms_sum{a="b"} 60001"#);
    }
}
