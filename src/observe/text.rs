//! The text formats of Prometheus (version 0.0.4) and OpenMetrics (version 1.0.0).

use std::{collections::BTreeMap, fmt::Write, time::UNIX_EPOCH};

use super::{
    exemplar::Exemplar,
    metric::{HistogramSnapshot, Metric, MetricKind, Value},
    metrics::METRICS,
    registry::{NamedVisit, Registry},
};

/// The format of the page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Format {
    Prometheus,
    OpenMetrics,
}

impl Format {
    /// Returns the format for the value of an `Accept` header. OpenMetrics only if it is named.
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

/// Returns the page. The layers are read first, so that no lock of a layer is held while the text is written.
pub(super) fn render(registry: &Registry, format: Format) -> String {
    let mut samples = Samples::default();
    registry.visit(&mut samples);
    let mut page = String::with_capacity(16 * 1024);
    for metric in METRICS {
        let Some(samples) = samples.0.get(metric.name) else { continue };
        header(&mut page, metric, format);
        for (labels, value) in samples {
            sample(&mut page, metric, labels, value, format);
        }
    }
    if format == Format::OpenMetrics {
        page.push_str("# EOF\n");
    }
    page
}

/// The values by metric, each with its labels as text.
#[derive(Default)]
struct Samples(BTreeMap<&'static str, Vec<(String, Value)>>);

impl NamedVisit for Samples {
    fn sample(
        &mut self,
        metric: &'static Metric,
        name: Option<&str>,
        labels: &[(&'static str, &str)],
        value: Value,
    ) {
        let mut text = String::new();
        for (label, value) in name.map(|name| ("name", name)).iter().chain(labels) {
            if !text.is_empty() {
                text.push(',');
            }
            let _ = write!(text, "{label}=\"");
            escape(&mut text, value, true);
            text.push('"');
        }
        self.0.entry(metric.name).or_default().push((text, value));
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

fn sample(page: &mut String, metric: &Metric, labels: &str, value: &Value, format: Format) {
    match value {
        Value::Count(count) => line(page, &metric.series(), labels, |page| write!(page, "{count}")),
        Value::Number(number) => {
            line(page, &metric.series(), labels, |page| write_number(page, *number))
        }
        Value::Histogram(histogram) => {
            histogram_lines(page, &metric.family(), labels, histogram, format);
        }
    }
}

fn histogram_lines(
    page: &mut String,
    family: &str,
    labels: &str,
    histogram: &HistogramSnapshot,
    format: Format,
) {
    let comma = if labels.is_empty() { "" } else { "," };
    let mut count = 0;
    for (nth, of_bucket) in histogram.counts.iter().enumerate() {
        count += of_bucket;
        let _ = write!(page, "{family}_bucket{{{labels}{comma}le=\"");
        let _ = match histogram.bounds.get(nth) {
            // OpenMetrics requires a canonical number with a fraction.
            Some(bound) if bound.fract() == 0.0 => write!(page, "{bound:.1}"),
            Some(bound) => write!(page, "{bound}"),
            None => write!(page, "+Inf"),
        };
        let _ = write!(page, "\"}} {count}");
        if let (Format::OpenMetrics, Some(Some(exemplar))) = (format, histogram.exemplars.get(nth))
        {
            write_exemplar(page, exemplar);
        }
        page.push('\n');
    }
    line(page, &format!("{family}_sum"), labels, |page| write_number(page, histogram.sum));
    line(page, &format!("{family}_count"), labels, |page| write!(page, "{count}"));
}

fn write_exemplar(page: &mut String, exemplar: &Exemplar) {
    let at = exemplar.at.duration_since(UNIX_EPOCH).unwrap_or_default();
    page.push_str(" # {trace_id=\"");
    escape(page, exemplar.trace_id.as_str(), true);
    page.push_str("\"} ");
    let _ = write_number(page, exemplar.value);
    let _ = write!(page, " {}.{:03}", at.as_secs(), at.subsec_millis());
}

fn line(
    page: &mut String,
    series: &str,
    labels: &str,
    value: impl FnOnce(&mut String) -> std::fmt::Result,
) {
    page.push_str(series);
    if !labels.is_empty() {
        let _ = write!(page, "{{{labels}}}");
    }
    page.push(' ');
    let _ = value(page);
    page.push('\n');
}

/// Writes a number. A value that is not finite does not occur in a layer; it would be written as 0.
fn write_number(page: &mut String, number: f64) -> std::fmt::Result {
    write!(page, "{}", if number.is_finite() { number } else { 0.0 })
}

/// Writes text with the escapes of the formats. The help of the Prometheus format has no escaped quotes.
fn escape(page: &mut String, text: &str, quotes: bool) {
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
