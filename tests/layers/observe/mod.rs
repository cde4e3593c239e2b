//! The values of metrics after scripted scenarios. Each test reads the text page, as Prometheus does.

mod breaker;
mod connect;
mod dashboard;
mod decisions;
mod facade;
mod health;
mod histograms;
mod lifecycle;
mod limit;
mod page;
mod paths;
mod registry;
mod retry;
mod sampler;
mod stack;
mod status;
mod time;

use std::collections::BTreeMap;

use buttress::observe::Registry;

/// The samples of a page by series: `name{label="value"}`.
pub struct Page(BTreeMap<String, f64>);

impl Page {
    pub fn of(registry: &Registry) -> Self {
        Self::parse(&registry.text())
    }

    /// Parses the text format. Fails for a series that occurs twice.
    pub fn parse(text: &str) -> Self {
        let mut samples = BTreeMap::new();
        for line in text.lines().filter(|line| !line.starts_with('#') && !line.is_empty()) {
            let (series, value) = line.rsplit_once(' ').expect(line);
            let value = value.parse().expect(line);
            assert!(samples.insert(series.to_owned(), value).is_none(), "twice: {series}");
        }
        Self(samples)
    }

    /// Returns the value of a series.
    #[track_caller]
    pub fn get(&self, series: &str) -> f64 {
        match self.0.get(series) {
            Some(value) => *value,
            None => {
                let family = series.split('{').next().unwrap_or(series);
                panic!("no {series}; there are {:#?}", self.family(family))
            }
        }
    }

    /// Returns the samples of a metric.
    pub fn family(&self, name: &str) -> Vec<(&str, f64)> {
        let is_of = |series: &&String| series.split('{').next() == Some(name);
        self.0.keys().filter(is_of).map(|series| (&**series, self.0[series])).collect()
    }

    /// Returns the values of one label of a metric, in the order of the page.
    #[track_caller]
    pub fn labels(&self, name: &str, label: &str) -> Vec<&str> {
        let start = format!("{label}=\"");
        let value = |series: &str| {
            let at = series.find(&start).expect(series) + start.len();
            at..at + series[at..].find('"').expect(series)
        };
        self.family(name).into_iter().map(|(series, _)| &series[value(series)]).collect()
    }

    pub fn sum(&self, name: &str) -> f64 {
        self.family(name).iter().map(|(_, value)| value).sum()
    }

    pub fn len(&self) -> usize {
        self.0.len()
    }

    pub fn contains(&self, text: &str) -> bool {
        self.0.keys().any(|series| series.contains(text))
    }
}
