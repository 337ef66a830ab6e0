//! The newer dialect: collectors of a prometheus-client registry over our cells. A collector gives the crate's encoder label
//! sets that were written when the handle was made, so that a scrape formats numbers and nothing else.

use super::{
    labels::{Labels, Text},
    metric::Histogram,
    store::{Metric, Series, Store},
};
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric, LabelSetEncoder, LabelValueEncoder, NoLabelSet},
    metrics::{MetricType, counter::ConstCounter, gauge::ConstGauge},
    registry::Unit,
};
use std::{fmt, fmt::Write as _, sync::Arc};

/// A store whose series print themselves in the newer dialect.
pub(super) trait Group: Metric + Sized {
    /// What the families' names and labels depend on besides the store's series.
    type Names: Send + Sync + 'static;

    fn encode(out: &mut Encoder<'_, '_>, names: &Self::Names, series: &[Series<Self>]) -> fmt::Result;
}

/// Registers a store's families.
pub(super) struct GroupCollector<M: Group> {
    pub(super) store: Arc<Store<M>>,
    pub(super) names: M::Names,
}

impl<M: Group> fmt::Debug for GroupCollector<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GroupCollector").field("store", &self.store.name).finish()
    }
}

impl<M: Group> Collector for GroupCollector<M> {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        M::encode(&mut Encoder(&mut encoder), &self.names, &self.store.snapshot())
    }
}

/// Families that are not kept per label set are printed by a function.
pub(super) struct FnCollector<F>(pub(super) F);

impl<F> fmt::Debug for FnCollector<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("FnCollector").finish()
    }
}

impl<F> Collector for FnCollector<F>
where
    F: Fn(&mut Encoder<'_, '_>) -> fmt::Result + Send + Sync + 'static,
{
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        (self.0)(&mut Encoder(&mut encoder))
    }
}

/// The crate's encoder, family by family.
pub(super) struct Encoder<'a, 'b>(&'a mut DescriptorEncoder<'b>);

/// Labels of one sample: the series' own and what a family adds before and after.
#[derive(Copy, Clone, Debug)]
pub(super) struct Sample<'a> {
    before: Option<(&'a str, Text<'a>)>,
    base: &'a str,
    last_value: usize,
    after: [Option<(&'a str, Text<'a>)>; 2],
}

impl<'a> Sample<'a> {
    pub(super) const NONE: Self = Self { before: None, base: "", last_value: 0, after: [None, None] };

    pub(super) fn new<M>(series: &'a Series<M>) -> Self {
        Self { base: &series.text, last_value: series.last_value, ..Self::NONE }
    }

    /// A whole set that was just written.
    pub(super) fn written(labels: &'a Labels) -> Self {
        Self { base: &labels.text, last_value: labels.last_value, ..Self::NONE }
    }

    /// One label of its own.
    pub(super) fn of(name: &'a str, value: &'a str) -> Self {
        Self { before: Some((name, Text::Str(value))), ..Self::NONE }
    }

    pub(super) fn before(self, name: &'a str, value: &'a str) -> Self {
        Self { before: Some((name, Text::Str(value))), ..self }
    }

    pub(super) fn after(self, first: (&'a str, Text<'a>), second: Option<(&'a str, Text<'a>)>) -> Self {
        Self { after: [Some(first), second], ..self }
    }

    fn is_empty(&self) -> bool {
        self.before.is_none() && self.base.is_empty() && self.after[0].is_none()
    }
}

impl EncodeLabelSet for Sample<'_> {
    fn encode(&self, encoder: &mut LabelSetEncoder<'_>) -> fmt::Result {
        let mut label = |name: &str, write: &mut dyn FnMut(&mut LabelValueEncoder<'_>) -> fmt::Result| {
            let mut label = encoder.encode_label();
            let mut key = label.encode_label_key()?;
            key.write_str(name)?;
            let mut value = key.encode_label_value()?;
            write(&mut value)?;
            value.finish()
        };
        let mut text = |name: &str, value: Text<'_>| {
            label(name, &mut |out| match value {
                Text::Str(s) => out.write_str(s),
                Text::Num(n) => write!(out, "{n}"),
            })
        };
        if let Some((name, value)) = self.before {
            text(name, value)?;
        }
        if !self.base.is_empty() {
            // The written set goes out as one label: everything before the last value is its name. The encoder escapes
            // the value, which is escaped already.
            let (name, value) = self.base.split_at(self.last_value);
            let name = name.strip_suffix("=\"").unwrap_or(name);
            let value = value.strip_suffix('"').unwrap_or(value);
            text(name, Text::Str(&unescape(value)))?;
        }
        for (name, value) in self.after.iter().flatten() {
            text(name, *value)?;
        }
        Ok(())
    }
}

fn unescape(value: &str) -> std::borrow::Cow<'_, str> {
    if !value.contains('\\') {
        return value.into();
    }
    let mut out = String::with_capacity(value.len());
    let mut chars = value.chars();
    while let Some(c) = chars.next() {
        match (c, c == '\\') {
            (_, true) => match chars.next() {
                Some('n') => out.push('\n'),
                Some(c) => out.push(c),
                None => {}
            },
            (c, false) => out.push(c),
        }
    }
    out.into()
}

impl Encoder<'_, '_> {
    /// A counter family. `name` without unit and `_total`; a full stop is added to `help`.
    pub(super) fn counter<'s>(
        &mut self,
        name: &str,
        unit: Option<Unit>,
        help: &str,
        samples: impl IntoIterator<Item = (Sample<'s>, u64)>,
    ) -> fmt::Result {
        self.family(name, unit, help, MetricType::Counter, samples, |metric, value| {
            ConstCounter::new(value).encode(metric)
        })
    }

    /// A counter of fractional values.
    pub(super) fn counter_f64<'s>(
        &mut self,
        name: &str,
        unit: Option<Unit>,
        help: &str,
        samples: impl IntoIterator<Item = (Sample<'s>, f64)>,
    ) -> fmt::Result {
        self.family(name, unit, help, MetricType::Counter, samples, |metric, value| {
            ConstCounter::new(value).encode(metric)
        })
    }

    pub(super) fn gauge<'s>(
        &mut self,
        name: &str,
        unit: Option<Unit>,
        help: &str,
        samples: impl IntoIterator<Item = (Sample<'s>, u64)>,
    ) -> fmt::Result {
        self.family(name, unit, help, MetricType::Gauge, samples, |metric, value| ConstGauge::new(value).encode(metric))
    }

    /// A gauge of fractional values.
    pub(super) fn gauge_f64<'s>(
        &mut self,
        name: &str,
        unit: Option<Unit>,
        help: &str,
        samples: impl IntoIterator<Item = (Sample<'s>, f64)>,
    ) -> fmt::Result {
        self.family(name, unit, help, MetricType::Gauge, samples, |metric, value| ConstGauge::new(value).encode(metric))
    }

    pub(super) fn histogram<'s>(
        &mut self,
        name: &str,
        unit: Unit,
        help: &str,
        samples: impl IntoIterator<Item = (Sample<'s>, &'s Histogram)>,
    ) -> fmt::Result {
        self.family(name, Some(unit), help, MetricType::Histogram, samples, |mut metric, histogram: &Histogram| {
            let per_unit = histogram.scale().per_unit;
            let bounds = histogram.scale().bounds.iter().map(|b| *b as f64 / per_unit).chain([f64::INFINITY]);
            let buckets: Vec<_> = bounds.zip(histogram.buckets()).collect();
            let count = buckets.iter().map(|(_, n)| n).sum();
            metric.encode_histogram::<NoLabelSet>(histogram.sum() as f64 / per_unit, count, &buckets, None)
        })
    }

    fn family<'s, V>(
        &mut self,
        name: &str,
        unit: Option<Unit>,
        help: &str,
        kind: MetricType,
        samples: impl IntoIterator<Item = (Sample<'s>, V)>,
        encode: impl Fn(prometheus_client::encoding::MetricEncoder<'_>, V) -> fmt::Result,
    ) -> fmt::Result {
        let mut samples = samples.into_iter().peekable();
        if samples.peek().is_none() {
            return Ok(());
        }
        let mut metric = self.0.encode_descriptor(name, &format!("{help}."), unit.as_ref(), kind)?;
        for (labels, value) in samples {
            // A family of an empty set would print braces.
            if labels.is_empty() {
                encode(metric, value)?;
                return Ok(());
            }
            encode(metric.encode_family(&labels)?, value)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::{
            labels::Labels,
            metric::{COARSE, Counter, FRAME},
        },
        *,
    };
    use prometheus_client::{encoding::text, registry::Registry};
    use std::time::Duration;

    #[track_caller]
    fn check(encode: impl Fn(&mut Encoder<'_, '_>) -> fmt::Result + Send + Sync + 'static, expected: &str) {
        let mut registry = Registry::default();
        registry.register_collector(Box::new(FnCollector(encode)));
        let mut out = String::new();
        text::encode(&mut out, &registry).unwrap();
        assert_eq!(out, expected);
    }

    fn series(labels: Labels) -> Series<Counter> {
        Series { last_value: labels.last_value, text: labels.text.into(), metric: Arc::default() }
    }

    #[test]
    fn labels_are_the_written_ones() {
        let s = series(Labels::new().push("a", "1").push("b", "x=\"\\\n"));
        check(
            move |e| {
                e.counter(
                    "c",
                    Some(Unit::Bytes),
                    "Help",
                    [
                        (Sample::new(&s).before("op", "Add"), 1),
                        (Sample::new(&s).after(("status", Text::Num(200)), Some(("error", Text::Str("")))), 2),
                    ],
                )
            },
            "# HELP c_bytes Help.\n# TYPE c_bytes counter\n# UNIT c_bytes bytes\n\
             c_bytes_total{op=\"Add\",a=\"1\",b=\"x=\\\"\\\\\\n\"} 1\n\
             c_bytes_total{a=\"1\",b=\"x=\\\"\\\\\\n\",status=\"200\",error=\"\"} 2\n# EOF\n",
        );
    }

    #[test]
    fn empty_families_print_nothing_and_unlabelled_ones_no_braces() {
        check(
            |e| {
                e.counter("none", None, "Help", [])?;
                e.gauge_f64("start_time", Some(Unit::Seconds), "Help", [(Sample::NONE, 1.0)])
            },
            "# HELP start_time_seconds Help.\n# TYPE start_time_seconds gauge\n# UNIT start_time_seconds seconds\n\
             start_time_seconds 1.0\n# EOF\n",
        );
    }

    #[test]
    fn histograms_print_sum_count_bucket_with_le_first_and_decimal() {
        let h: &'static Histogram = Box::leak(Box::new(Histogram::new(&COARSE)));
        h.observe_nanos(Duration::from_millis(50));
        h.observe_nanos(Duration::from_secs(2));
        let s = series(Labels::new().push("a", "1"));
        check(
            move |e| e.histogram("d", Unit::Seconds, "Help", [(Sample::new(&s), h)]),
            "# HELP d_seconds Help.\n# TYPE d_seconds histogram\n# UNIT d_seconds seconds\n\
             d_seconds_sum{a=\"1\"} 2.05\nd_seconds_count{a=\"1\"} 2\n\
             d_seconds_bucket{le=\"0.05\",a=\"1\"} 1\nd_seconds_bucket{le=\"0.5\",a=\"1\"} 1\n\
             d_seconds_bucket{le=\"1.0\",a=\"1\"} 1\nd_seconds_bucket{le=\"10.0\",a=\"1\"} 2\n\
             d_seconds_bucket{le=\"+Inf\",a=\"1\"} 2\n# EOF\n",
        );
        let h: &'static Histogram = Box::leak(Box::new(Histogram::new(&FRAME)));
        check(
            move |e| e.histogram("f", Unit::Bytes, "Help", [(Sample::of("x", "y"), h)]),
            "# HELP f_bytes Help.\n# TYPE f_bytes histogram\n# UNIT f_bytes bytes\nf_bytes_sum{x=\"y\"} 0.0\n\
             f_bytes_count{x=\"y\"} 0\nf_bytes_bucket{le=\"128.0\",x=\"y\"} 0\nf_bytes_bucket{le=\"1024.0\",x=\"y\"} 0\n\
             f_bytes_bucket{le=\"10240.0\",x=\"y\"} 0\nf_bytes_bucket{le=\"+Inf\",x=\"y\"} 0\n# EOF\n",
        );
    }
}
