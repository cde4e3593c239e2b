//! What an exporter stores for each series, so that it builds the labels of a series once.

use std::{
    collections::HashMap,
    hash::{BuildHasher, Hash, Hasher, RandomState},
    ptr,
};

use super::metric::Metric;

/// Values by series. A pass is one visit of all series: [`begin`](Self::begin), [`get`](Self::get) for each of them, and
/// [`end`](Self::end). A lookup does not allocate.
#[derive(Debug)]
pub(super) struct SeriesMap<T> {
    /// The series by the hash of metric, name and labels.
    series: HashMap<u64, Vec<Series<T>>>,
    hasher: RandomState,
    pass: u64,
}

#[derive(Debug)]
struct Series<T> {
    metric: &'static Metric,
    name: Option<Box<str>>,
    labels: Box<[(&'static str, Box<str>)]>,
    /// The last pass that has visited the series.
    pass: u64,
    value: T,
}

impl<T> Default for SeriesMap<T> {
    fn default() -> Self {
        Self { series: HashMap::new(), hasher: RandomState::new(), pass: 0 }
    }
}

impl<T> SeriesMap<T> {
    pub(super) fn begin(&mut self) {
        self.pass += 1;
    }

    /// Returns the value of a series, and makes it if the series is new.
    pub(super) fn get(
        &mut self,
        metric: &'static Metric,
        name: Option<&str>,
        labels: &[(&'static str, &str)],
        new: impl FnOnce() -> T,
    ) -> &mut T {
        let mut hasher = self.hasher.build_hasher();
        ptr::from_ref(metric).hash(&mut hasher);
        name.hash(&mut hasher);
        labels.hash(&mut hasher);
        let found = self.series.entry(hasher.finish()).or_default();
        let at = found.iter().position(|series| series.is(metric, name, labels));
        let at = at.unwrap_or_else(|| {
            let labels = labels.iter().map(|(label, value)| (*label, Box::from(*value)));
            let (name, labels) = (name.map(Box::from), labels.collect());
            found.push(Series { metric, name, labels, pass: 0, value: new() });
            found.len() - 1
        });
        found[at].pass = self.pass;
        &mut found[at].value
    }

    /// Ends a pass. `keeps` receives each series that the pass has not visited, and returns whether the map keeps it.
    pub(super) fn end(&mut self, mut keeps: impl FnMut(&mut T) -> bool) {
        let pass = self.pass;
        self.series.retain(|_, found| {
            found.retain_mut(|series| series.pass == pass || keeps(&mut series.value));
            !found.is_empty()
        });
    }
}

impl<T> Series<T> {
    fn is(
        &self,
        metric: &'static Metric,
        name: Option<&str>,
        labels: &[(&'static str, &str)],
    ) -> bool {
        let own = self.labels.iter().map(|(label, value)| (*label, &**value));
        ptr::eq(self.metric, metric)
            && self.name.as_deref() == name
            && own.eq(labels.iter().copied())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::observe::metrics::{BREAKER_STATE, CONCURRENCY_LIMIT};

    #[test]
    fn series_is_made_once_and_removed_when_a_pass_does_not_visit_it() {
        let (mut map, mut made) = (SeriesMap::default(), 0);
        let states = [[("state", "open")], [("state", "closed")]];
        let mut pass = |map: &mut SeriesMap<i32>, names: &[&str]| {
            map.begin();
            for name in names {
                for labels in &states {
                    map.get(&BREAKER_STATE, Some(name), labels, || {
                        made += 1;
                        made
                    });
                }
                map.get(&CONCURRENCY_LIMIT, Some(name), &[], || {
                    made += 1;
                    made
                });
            }
            let mut gone = Vec::new();
            map.end(|value| {
                gone.push(*value);
                false
            });
            gone.sort_unstable();
            (made, gone)
        };
        assert_eq!(pass(&mut map, &["a", "b"]), (6, vec![]));
        assert_eq!(pass(&mut map, &["a", "b"]), (6, vec![]));
        assert_eq!(pass(&mut map, &["b"]), (6, vec![1, 2, 3]));
        assert_eq!(pass(&mut map, &["a", "b"]), (9, vec![]));
        assert_eq!(map.get(&BREAKER_STATE, Some("b"), &states[1], || 0), &5);
    }
}
