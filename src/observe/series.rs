//! The values that an exporter stores by series, so that it builds the labels of a series once.

use std::{
    collections::HashMap,
    hash::{BuildHasherDefault, Hasher},
    ptr,
};

use super::metric::Metric;

/// The maximum number of stored series that the last pass has not visited. A layer has about 60 counters.
const MAX_ENDED: usize = 10_000;

/// Values by series. A pass is one visit of all series: [`begin`](Self::begin), [`get`](Self::get) for each of them, and
/// [`end`](Self::end). A lookup does not allocate.
#[derive(Debug)]
pub(super) struct SeriesMap<T> {
    /// The series by the hash of metric, name and labels.
    series: HashMap<u64, Vec<Series<T>>, BuildHasherDefault<SameHash>>,
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
        Self { series: HashMap::default(), pass: 0 }
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
        let found = self.series.entry(hash(metric, name, labels)).or_default();
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

    /// Ends a pass. `keeps` receives each series that the pass has not visited, and returns whether it stays in the map. If
    /// more than [`MAX_ENDED`] of these stay, those that have not been visited for the longest time are removed.
    pub(super) fn end(&mut self, mut keeps: impl FnMut(&mut T) -> bool) {
        let pass = self.pass;
        let mut ended = Vec::new();
        self.series.retain(|_, found| {
            found.retain_mut(|series| series.pass == pass || keeps(&mut series.value));
            ended.extend(found.iter().map(|series| series.pass).filter(|last| *last != pass));
            !found.is_empty()
        });
        if ended.len() > MAX_ENDED {
            // Half of `MAX_ENDED` or fewer remain, so that the next passes need no selection.
            let nth = ended.len() - MAX_ENDED / 2;
            let (_, last_removed, _) = ended.select_nth_unstable(nth);
            self.series.retain(|_, found| {
                found.retain(|series| series.pass > *last_removed);
                !found.is_empty()
            });
        }
    }
}

/// Returns the hash of a series. Only the label `key` can come from requests, and a layer has 1000 keys or fewer in the
/// metrics, so collisions are bounded and a fast function suffices.
fn hash(metric: &'static Metric, name: Option<&str>, labels: &[(&'static str, &str)]) -> u64 {
    // The multiplier of FxHash. Its high bits, which the rotation moves down, depend on all bits of the input.
    let mix =
        |hash: u64, word: u64| (hash.rotate_left(26) ^ word).wrapping_mul(0xf135_7aea_2e62_a9c5);
    let text = |hash, text: &str| {
        let (words, rest) = text.as_bytes().split_at(text.len() / 8 * 8);
        let words = words.chunks_exact(8).filter_map(|word| word.try_into().ok());
        let hash = words.map(u64::from_le_bytes).fold(hash, mix);
        mix(rest.iter().fold(hash, |hash, byte| mix(hash, (*byte).into())), text.len() as u64)
    };
    let hash = mix(0, ptr::from_ref(metric) as u64);
    let labels = labels.iter().map(|(_, value)| *value);
    name.into_iter().chain(labels).fold(hash, text).rotate_left(26)
}

/// Uses a hash as its own hash.
#[derive(Default)]
struct SameHash(u64);

impl Hasher for SameHash {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        self.0 = bytes.iter().fold(self.0, |hash, byte| hash.rotate_left(8) ^ u64::from(*byte));
    }

    fn write_u64(&mut self, hash: u64) {
        self.0 = hash;
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

    #[test]
    fn series_that_have_ended_are_bounded() {
        let mut map = SeriesMap::default();
        let name = |layer: usize| format!("tenant-{layer}");
        for pass in 0..30 {
            map.begin();
            for layer in pass * 1000..(pass + 1) * 1000 {
                map.get(&CONCURRENCY_LIMIT, Some(&name(layer)), &[], || layer);
            }
            map.end(|_| true);
            assert!(map.series.len() <= MAX_ENDED + 1000, "{}", map.series.len());
        }
        // The newest ones continue.
        map.begin();
        assert_eq!(*map.get(&CONCURRENCY_LIMIT, Some(&name(28_500)), &[], || 0), 28_500);
        assert_eq!(*map.get(&CONCURRENCY_LIMIT, Some(&name(500)), &[], || 0), 0);
    }
}
