//! The text formats of Prometheus (version 0.0.4) and OpenMetrics (version 1.0.0).

use std::{fmt::Write, time::UNIX_EPOCH};

use super::{
    exemplar::Exemplar,
    metric::{HistogramSnapshot, Metric, MetricKind, Value},
    metrics::{COUNT, METRICS},
    registry::{NamedVisit, Registry},
};

/// The format of the page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Format {
    Prometheus,
    OpenMetrics,
}

impl Format {
    /// Returns the format for the value of an `Accept` header: OpenMetrics if the header names it, otherwise that of
    /// Prometheus.
    pub(super) fn accepted(accept: &str) -> Self {
        let accepts = |range: &str| {
            let mut parts = range.split(';').map(str::trim);
            let is_named = parts.next() == Some("application/openmetrics-text");
            let version = parts.clone().find_map(|part| part.strip_prefix("version="));
            let is_declined = parts.any(|part| matches!(part, "q=0" | "q=0.0"));
            is_named && !is_declined && matches!(version, None | Some("1.0.0" | "0.0.1"))
        };
        match accept.split(',').take(32).any(|range| accepts(range.trim())) {
            true => Self::OpenMetrics,
            false => Self::Prometheus,
        }
    }

    /// Returns the exact content type. Prometheus 3 rejects a page without it.
    pub(super) const fn content_type(self) -> &'static str {
        match self {
            Self::Prometheus => "text/plain; version=0.0.4; charset=utf-8",
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
        }
    }
}

impl Registry {
    /// Returns the metrics in the text format of Prometheus, version 0.0.4.
    #[must_use]
    pub fn text(&self) -> String {
        render(self, Format::Prometheus)
    }

    /// Returns the metrics in the text format of OpenMetrics, version 1.0.0.
    #[must_use]
    pub fn open_metrics(&self) -> String {
        render(self, Format::OpenMetrics)
    }
}

/// Returns the page.
///
/// The lines of a metric follow each other on the page, while a visit proceeds from layer to layer. So the values are
/// stored first, in a compact form: a page of 1,000 circuits has 57,000 lines and 5 MB, and each byte that is written
/// twice costs page faults. A layer holds no lock while it visits its values.
pub(super) fn render(registry: &Registry, format: Format) -> String {
    let mut samples = Samples::default();
    registry.visit(&mut samples);
    let mut page = String::with_capacity(samples.max_bytes + "# EOF\n".len());
    for (metric, section) in METRICS.iter().zip(&samples.sections) {
        if let Some(section) = section {
            header(&mut page, metric, format);
            section.write(&mut page, &samples.names, format);
        }
    }
    if format == Format::OpenMetrics {
        page.push_str("# EOF\n");
    }
    page
}

/// The values of all metrics.
struct Samples {
    /// The sections of the page, in the order of [`METRICS`].
    sections: [Option<Section>; COUNT],
    /// The index of the last metric. The next one is usually the same or one of those after it.
    last: usize,
    /// The names of the layers, in the form `{name="search"`. The first one is empty.
    names: Vec<String>,
    /// The name of the last layer.
    last_name: String,
    /// An upper bound for the length of the page.
    max_bytes: usize,
}

impl Default for Samples {
    fn default() -> Self {
        Self {
            sections: [const { None }; COUNT],
            last: 0,
            names: vec![String::new()],
            last_name: String::new(),
            max_bytes: 0,
        }
    }
}

/// The samples of one metric.
struct Section {
    /// The name of the samples. That of a histogram lacks its suffix.
    series: String,
    /// Whether the labels have a closed set of values, so that layers share them.
    is_closed: bool,
    labels: Vec<Labels>,
    /// The index of the labels that probably follow. Layers of a kind visit their labels in the same order.
    next: usize,
    /// The name, the labels and the value of each sample, in this order. A name is an index in `Samples::names`.
    samples: Vec<(u32, u32, SampleValue)>,
    histograms: Vec<HistogramSnapshot>,
}

/// The labels of a sample except the name.
struct Labels {
    is_named: bool,
    values: Vec<(&'static str, Box<str>)>,
    /// The text between the name and the closing brace.
    text: String,
}

enum SampleValue {
    Count(u64),
    Number(f64),
    /// An index in `Section::histograms`.
    Histogram(usize),
}

/// The maximum length of a number and of the line end.
const MAX_NUMBER_BYTES: usize = 32;
/// The maximum length of the label `le`, and of an exemplar.
const MAX_BUCKET_BYTES: usize = 256;

impl NamedVisit for Samples {
    fn sample(
        &mut self,
        metric: &'static Metric,
        name: Option<&str>,
        labels: &[(&'static str, &str)],
        value: Value,
    ) {
        let mut order = (self.last..COUNT).chain(0..self.last);
        let Some(at) = order.find(|at| std::ptr::eq(METRICS[*at], metric)) else { return };
        self.last = at;
        let name = name.map_or(0, |name| self.name(name));
        let section = self.sections[at].get_or_insert_with(|| {
            self.max_bytes += 4 * (metric.help.len() + metric.name.len()) + 128;
            Section::new(metric)
        });
        let labels = section.labels(name > 0, labels);
        let bytes = section.series.len()
            + self.names[name].len()
            + section.labels[labels].text.len()
            + MAX_NUMBER_BYTES;
        let value = match value {
            Value::Count(count) => SampleValue::Count(count),
            Value::Number(number) => SampleValue::Number(number),
            Value::Histogram(histogram) => {
                self.max_bytes += (histogram.counts.len() + 1) * (bytes + MAX_BUCKET_BYTES);
                section.histograms.push(histogram);
                SampleValue::Histogram(section.histograms.len() - 1)
            }
        };
        self.max_bytes += bytes;
        section.samples.push((index(name), index(labels), value));
    }
}

/// A page has fewer than 4 billion names and label sets.
fn index(index: usize) -> u32 {
    u32::try_from(index).unwrap_or(u32::MAX)
}

impl Samples {
    /// Returns the index of a name.
    fn name(&mut self, name: &str) -> usize {
        if self.names.len() == 1 || self.last_name != name {
            name.clone_into(&mut self.last_name);
            let mut text = String::from("{name=\"");
            escape(&mut text, name, true);
            text.push('"');
            self.names.push(text);
        }
        self.names.len() - 1
    }
}

impl Section {
    fn new(metric: &Metric) -> Self {
        Self {
            series: metric.series(),
            is_closed: !metric.labels.iter().any(|label| matches!(*label, "check" | "key")),
            labels: Vec::new(),
            next: 0,
            samples: Vec::new(),
            histograms: Vec::new(),
        }
    }

    /// Returns the index of these labels.
    fn labels(&mut self, is_named: bool, labels: &[(&'static str, &str)]) -> usize {
        let is = |known: &Labels| {
            let values = known.values.iter().map(|(label, value)| (*label, &**value));
            known.is_named == is_named && values.eq(labels.iter().copied())
        };
        let found = match self.labels.get(self.next) {
            Some(next) if is(next) => Some(self.next),
            _ if self.is_closed => self.labels.iter().position(is),
            _ => None,
        };
        let found = found.unwrap_or_else(|| {
            self.labels.push(Labels::new(is_named, labels));
            self.labels.len() - 1
        });
        self.next = if found + 1 < self.labels.len() { found + 1 } else { 0 };
        found
    }

    fn write(&self, page: &mut String, names: &[String], format: Format) {
        for (name, labels, value) in &self.samples {
            let (Some(name), Some(labels)) =
                (names.get(*name as usize), self.labels.get(*labels as usize))
            else {
                continue;
            };
            let line = Line { series: &self.series, name, labels: &labels.text };
            match value {
                SampleValue::Count(count) => {
                    line.begin(page, "", None);
                    write_count(page, *count);
                }
                SampleValue::Number(number) => {
                    line.begin(page, "", None);
                    write_number(page, *number);
                }
                SampleValue::Histogram(nth) => {
                    line.write_histogram(page, &self.histograms[*nth], format);
                }
            }
            page.push('\n');
        }
    }
}

impl Labels {
    fn new(is_named: bool, labels: &[(&'static str, &str)]) -> Self {
        let mut text = String::new();
        for (label, value) in labels {
            text.push(if is_named || !text.is_empty() { ',' } else { '{' });
            text.push_str(label);
            text.push_str("=\"");
            escape(&mut text, value, true);
            text.push('"');
        }
        let values = labels.iter().map(|(label, value)| (*label, Box::from(*value))).collect();
        Self { is_named, values, text }
    }
}

/// The parts of a line before its value.
struct Line<'a> {
    series: &'a str,
    name: &'a str,
    labels: &'a str,
}

impl Line<'_> {
    /// Writes a series and a space. `bound` is the upper bound of a bucket.
    fn begin(&self, page: &mut String, suffix: &str, bound: Option<f64>) {
        page.push_str(self.series);
        page.push_str(suffix);
        page.push_str(self.name);
        page.push_str(self.labels);
        let is_open = !(self.name.is_empty() && self.labels.is_empty());
        if let Some(bound) = bound {
            page.push_str(if is_open { ",le=\"" } else { "{le=\"" });
            let _ = match bound {
                f64::INFINITY => page.write_str("+Inf"),
                // OpenMetrics requires a canonical number with a fraction.
                bound if bound.fract() == 0.0 => write!(page, "{bound:.1}"),
                bound => write!(page, "{bound}"),
            };
            page.push_str("\"} ");
        } else {
            page.push_str(if is_open { "} " } else { " " });
        }
    }

    /// Writes the lines of a histogram, without the last line end.
    fn write_histogram(&self, page: &mut String, histogram: &HistogramSnapshot, format: Format) {
        let mut count = 0;
        for (nth, of_bucket) in histogram.counts.iter().enumerate() {
            count += of_bucket;
            let bound = histogram.bounds.get(nth).copied().unwrap_or(f64::INFINITY);
            self.begin(page, "_bucket", Some(bound));
            write_count(page, count);
            if let (Format::OpenMetrics, Some(Some(exemplar))) =
                (format, histogram.exemplars.get(nth))
            {
                write_exemplar(page, exemplar);
            }
            page.push('\n');
        }
        self.begin(page, "_sum", None);
        write_number(page, histogram.sum);
        page.push('\n');
        self.begin(page, "_count", None);
        write_count(page, count);
    }
}

fn header(page: &mut String, metric: &Metric, format: Format) {
    // In the format of Prometheus the name in the header is that of the samples; in OpenMetrics it is the family.
    let name = match format {
        Format::Prometheus => metric.series(),
        Format::OpenMetrics => metric.family(),
    };
    let kind = match metric.kind {
        MetricKind::Counter => "counter",
        MetricKind::UpDownCounter | MetricKind::Gauge => "gauge",
        MetricKind::Histogram => "histogram",
    };
    let _ = write!(page, "# HELP {name} ");
    escape(page, metric.help, format == Format::OpenMetrics);
    let _ = write!(page, "\n# TYPE {name} {kind}\n");
    if format == Format::OpenMetrics && metric.unit == "s" {
        let _ = writeln!(page, "# UNIT {name} seconds");
    }
}

fn write_exemplar(page: &mut String, exemplar: &Exemplar) {
    let at = exemplar.at.duration_since(UNIX_EPOCH).unwrap_or_default();
    page.push_str(" # {trace_id=\"");
    escape(page, exemplar.trace_id.as_str(), true);
    page.push_str("\"} ");
    write_number(page, exemplar.value);
    let _ = write!(page, " {}.{:03}", at.as_secs(), at.subsec_millis());
}

/// Writes a count. Most counts of a page are 0, which needs no formatter.
fn write_count(page: &mut String, count: u64) {
    match count {
        0 => page.push('0'),
        _ => {
            let _ = write!(page, "{count}");
        }
    }
}

/// Writes a number. A value that is not finite does not occur in a layer; it would be written as 0.
fn write_number(page: &mut String, number: f64) {
    match number {
        number if number.is_finite() && number != 0.0 => {
            let _ = write!(page, "{number}");
        }
        _ => page.push('0'),
    }
}

/// Writes text with the escapes of the formats. The help of the Prometheus format has no escaped quotes.
fn escape(page: &mut String, text: &str, quotes: bool) {
    if !text.bytes().any(|byte| matches!(byte, b'\\' | b'\n' | b'"')) {
        return page.push_str(text);
    }
    for char in text.chars() {
        match char {
            '\\' => page.push_str("\\\\"),
            '\n' => page.push_str("\\n"),
            '"' if quotes => page.push_str("\\\""),
            char => page.push(char),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn open_metrics_is_served_only_if_it_is_named() {
        for (accept, expected) in [
            ("", Format::Prometheus),
            ("*/*", Format::Prometheus),
            ("text/plain;version=0.0.4", Format::Prometheus),
            (
                "application/openmetrics-text; version=1.0.0; charset=utf-8, */*;q=0.1",
                Format::OpenMetrics,
            ),
            ("application/openmetrics-text", Format::OpenMetrics),
            ("application/openmetrics-text;version=2.0.0,text/plain", Format::Prometheus),
            ("application/openmetrics-text;version=1.0.0;q=0", Format::Prometheus),
        ] {
            assert_eq!(Format::accepted(accept), expected, "{accept}");
        }
    }

    #[test]
    fn text_is_escaped() {
        let mut page = String::new();
        escape(&mut page, "a\"b\\c\nd", true);
        assert_eq!(page, r#"a\"b\\c\nd"#);
        assert_eq!(
            METRICS.iter().filter(|metric| metric.help.contains(['\\', '\n', '"'])).count(),
            0
        );
    }

    #[test]
    fn names_follow_the_rules_of_both_formats() {
        for metric in METRICS {
            let is_word =
                |text: &str| text.chars().all(|char| char.is_ascii_lowercase() || char == '_');
            assert!(
                metric.name.starts_with("buttress.") && metric.name.split('.').all(is_word),
                "{}",
                metric.name
            );
            assert!(metric.unit == "s" || metric.unit.starts_with('{'), "{}", metric.name);
            assert!(metric.help.ends_with('.'), "{}", metric.name);
            assert!(metric.labels.iter().all(|label| is_word(label)), "{}", metric.name);
        }
        let mut names: Vec<_> = METRICS.iter().map(|metric| metric.series()).collect();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), METRICS.len());
    }
}
