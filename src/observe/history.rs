//! The history of a layer: five minutes of samples, and the episodes of its rejections, of its timeouts, and of the
//! retries and hedge attempts that it declines.

use std::{
    collections::{BTreeMap, VecDeque},
    time::SystemTime,
};

use super::{
    condition::{Condition, Severity, counted},
    episode::{Episode, Summary},
    metric::{Metric, Value},
    metrics::*,
    visit::{Observed, Visit},
};
use crate::time::Nanos;

/// The number of samples that are kept: five minutes of one sample each second.
pub(super) const MAX_SAMPLES: usize = 300;

/// The number of samples from which the share of failed calls is computed.
const RECENT_SAMPLES: usize = 10;
/// The minimum share of failed calls that makes a stack strained.
const STRAINED_SHARE: f64 = 0.1;
/// The minimum share of failed calls that makes a stack failing.
const FAILING_SHARE: f64 = 0.5;
/// The minimum number of calls from which a share is computed.
const MIN_CALLS: f64 = 5.0;

// ===== Tracks =====

/// The definition of a track: the samples of one metric, for each layer that has the metric.
pub(super) struct TrackKind {
    metric: &'static Metric,
    pub(super) label: &'static str,
    /// The labels of which a value must have one. Empty if the track contains all values of the metric.
    only: &'static [(&'static str, &'static str)],
    /// Whether the samples are the increase of a counter in a second.
    pub(super) is_rate: bool,
}

const fn rate(metric: &'static Metric, label: &'static str) -> TrackKind {
    TrackKind { metric, label, only: &[], is_rate: true }
}

const fn level(metric: &'static Metric, label: &'static str) -> TrackKind {
    TrackKind { metric, label, only: &[], is_rate: false }
}

impl TrackKind {
    const fn only(self, only: &'static [(&'static str, &'static str)]) -> Self {
        Self { only, ..self }
    }
}

/// The indices in [`TRACKS`] of the calls of a stack, and of its failed calls.
const ALL_CALLS: usize = 0;
const FAILED_CALLS: usize = 1;

/// All tracks. A layer has the tracks of its metrics.
pub(super) static TRACKS: [TrackKind; 21] = [
    rate(&CALLS, "calls"),
    rate(&CALLS, "failures").only(&[("outcome", "failure")]),
    rate(&CALLS, "rejected").only(&[("outcome", "rejected")]),
    level(&CALL_ACTIVE, "in flight"),
    rate(&REJECTIONS_METRIC, "rejected"),
    level(&BREAKER_STATE, "open").only(&[("state", "open"), ("state", "forced_open")]),
    rate(&BREAKER_FAILURES, "failures"),
    level(&BREAKER_CIRCUITS, "open circuits").only(&[("state", "open"), ("state", "forced_open")]),
    level(&CONCURRENCY_USAGE, "in flight"),
    level(&QUEUE_DEPTH, "waiting").only(&[("layer", "concurrency_limit"), ("layer", "connect")]),
    rate(&RETRY_ATTEMPTS, "retries"),
    rate(&RETRY_DECLINED, "not retried"),
    rate(&RETRY_RECOVERIES, "recovered"),
    level(&RETRY_BUDGET_REMAINING, "budget"),
    rate(&HEDGE_ATTEMPTS, "hedge attempts"),
    rate(&HEDGE_WINS, "won"),
    rate(&TIMEOUTS, "timed out"),
    level(&CONNECTION_COUNT, "connections"),
    rate(&CONNECTION_FAILURES, "failed"),
    level(&PROBE_STATE, "up").only(&[("state", "up")]),
    level(&LIFECYCLE_ACTIVE, "in flight"),
];

// ===== Episodes =====

/// A kind of event that repeats during an outage.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Repeated {
    Rejections,
    Timeouts,
    RetriesDeclined,
    HedgesDeclined,
}

impl Repeated {
    /// Returns the kind that a metric counts, and the label of its reason.
    fn of(metric: &Metric) -> Option<(Self, &'static str)> {
        [
            (&REJECTIONS_METRIC, Self::Rejections, "reason"),
            (&TIMEOUTS, Self::Timeouts, "phase"),
            (&RETRY_DECLINED, Self::RetriesDeclined, "reason"),
            (&HEDGE_DECLINED, Self::HedgesDeclined, "reason"),
        ]
        .into_iter()
        .find_map(|(of, kind, label)| (of.name == metric.name).then_some((kind, label)))
    }
}

/// The summary of an episode, to be emitted after all locks are released.
#[derive(Clone, Debug)]
pub(super) struct EpisodeSummary {
    pub(super) kind: Repeated,
    pub(super) reason: String,
    pub(super) summary: Summary,
    /// The most severe condition of the layer while the events occurred.
    pub(super) why: String,
}

// ===== The history =====

/// The values of one sample of a layer that a history needs.
#[derive(Default)]
pub(super) struct LayerSample {
    tracks: [Option<f64>; TRACKS.len()],
    repeated: Vec<(Repeated, String, u64)>,
}

impl Visit for LayerSample {
    fn sample(&mut self, metric: &'static Metric, labels: &[(&'static str, &str)], value: Value) {
        let (number, count) = match value {
            Value::Count(count) => (count as f64, count),
            Value::Number(number) => (number, 0),
            Value::Histogram(_) => return,
        };
        for (kind, total) in TRACKS.iter().zip(&mut self.tracks) {
            let is_included = kind.only.is_empty() || kind.only.iter().any(|l| labels.contains(l));
            if kind.metric.name == metric.name && is_included {
                *total = Some(total.unwrap_or_default() + number);
            }
        }
        if let Some((kind, label)) = Repeated::of(metric) {
            let reason = labels.iter().find(|(of, _)| *of == label).map_or("", |(_, value)| value);
            self.repeated.push((kind, reason.to_owned(), count));
        }
    }
}

/// The events of one kind and reason.
#[derive(Debug, Default)]
struct RepeatedEvents {
    total: u64,
    episode: Option<Episode>,
    /// The most severe condition of the layer in the samples with events since the last summary, and its sentence.
    why: Option<(Severity, String)>,
}

/// The history of one layer.
#[derive(Debug, Default)]
pub(super) struct LayerHistory {
    /// The time of the last sample.
    sampled: Option<Nanos>,
    /// The last value of each track, and its samples.
    tracks: BTreeMap<usize, (f64, VecDeque<f32>)>,
    repeated: BTreeMap<(Repeated, String), RepeatedEvents>,
    /// Whether the layer is healthy, and the time of the sample at which this began. A layer under a steady overload
    /// changes between strained and failing, so these are not distinguished.
    since: Option<(bool, SystemTime)>,
}

/// The samples of one number of a layer. The last sample is the newest.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Track {
    /// The meaning of the samples, such as `rejected`.
    pub label: &'static str,
    /// `/s` for an increase in one second, otherwise empty.
    pub unit: &'static str,
    /// The samples, one for each second of the last five minutes.
    pub values: Vec<f32>,
}

impl LayerSample {
    /// Reads a layer. No lock may be held.
    pub(super) fn of(state: &dyn Observed) -> Self {
        let mut sample = Self::default();
        state.observe(&mut sample);
        sample
    }
}

/// Returns the number of samples that belong in the time between two samples.
fn whole_seconds(before: Nanos, now: Nanos) -> usize {
    let seconds = now.saturating_sub(before).saturating_add(500_000_000) / 1_000_000_000;
    usize::try_from(seconds).unwrap_or(MAX_SAMPLES).min(MAX_SAMPLES)
}

/// Adds the same sample several times. The oldest samples are removed.
fn push(values: &mut VecDeque<f32>, value: f32, times: usize) {
    let excess = (values.len() + times).saturating_sub(MAX_SAMPLES);
    values.drain(..excess.min(values.len()));
    values.extend(std::iter::repeat_n(value, times));
}

impl LayerHistory {
    /// Sets the counts from which the next sample is computed. Changes since the last sample are not recorded.
    pub(super) fn start(&mut self, sample: LayerSample, now: Nanos) {
        let before = self.sampled.replace(now).unwrap_or(now);
        // The severity of a layer between two samplers is not known.
        self.since = None;
        // If a sampler has ended before, its samples are moved into the past by the time without a sampler.
        for (_, values) in self.tracks.values_mut().filter(|(_, values)| !values.is_empty()) {
            push(values, 0.0, whole_seconds(before, now));
        }
        for (index, total) in sample.tracks.into_iter().enumerate() {
            if let Some(total) = total {
                self.tracks.entry(index).or_default().0 = total;
            }
        }
        for (kind, reason, total) in sample.repeated {
            self.repeated.entry((kind, reason)).or_default().total = total;
        }
    }

    /// Adds a sample. `condition` is the condition that the layer states itself. Returns the summaries to emit.
    pub(super) fn add(
        &mut self,
        sample: LayerSample,
        condition: &Condition,
        now: Nanos,
    ) -> Vec<EpisodeSummary> {
        let Some(before) = self.sampled.replace(now) else {
            self.start(sample, now);
            return Vec::new();
        };
        let seconds = (now.saturating_sub(before).max(1) as f64 / 1e9).max(1e-3);
        // A sample of a late sampler is the mean of several seconds.
        let times = whole_seconds(before, now).max(1);
        for (index, total) in sample.tracks.into_iter().enumerate() {
            let (last, values) = self.tracks.entry(index).or_default();
            // A metric that has become absent, such as that of a removed budget, has samples of zero.
            let value = match (total, TRACKS[index].is_rate) {
                (Some(total), true) => (total - *last).max(0.0) / seconds,
                (Some(total), false) => total,
                (None, _) => 0.0,
            };
            *last = total.unwrap_or(*last);
            if total.is_none() && values.is_empty() {
                self.tracks.remove(&index);
                continue;
            }
            push(values, value as f32, times);
        }
        let mut summaries = Vec::new();
        for (kind, reason, total) in sample.repeated {
            let events = self.repeated.entry((kind, reason.clone())).or_default();
            let count = total.saturating_sub(std::mem::replace(&mut events.total, total));
            let is_more_severe =
                |(severity, _): &(Severity, String)| condition.severity > *severity;
            if count > 0 && events.why.as_ref().is_none_or(is_more_severe) {
                events.why = Some((condition.severity, condition.sentence.clone()));
            }
            let Some(summary) = Episode::record(&mut events.episode, count, before, now) else {
                continue;
            };
            let why = events.why.take().map_or_else(String::new, |(_, why)| why);
            summaries.push(EpisodeSummary { kind, reason, summary, why });
        }
        summaries
    }

    /// Sets the severity of the layer at this sample. Returns whether the layer became healthy, or stopped being healthy.
    pub(super) fn set_severity(&mut self, severity: Severity, at: SystemTime) -> bool {
        let is_healthy = severity == Severity::Healthy;
        let before = self.since.map(|(was_healthy, _)| was_healthy);
        if before != Some(is_healthy) {
            self.since = Some((is_healthy, at));
        }
        before.unwrap_or(true) != is_healthy
    }

    /// Returns the time at which the layer became healthy, or stopped being healthy. `None` if it is not known.
    pub(super) fn since(&self, severity: Severity) -> Option<SystemTime> {
        let (is_healthy, since) = self.since?;
        (is_healthy == (severity == Severity::Healthy)).then_some(since)
    }

    /// Adds the state of the history to the condition: the calls that are rejected now, and the share of calls that
    /// fail.
    pub(super) fn assess(&self, condition: &mut Condition, now: Nanos) {
        self.add_rejections(condition, now);
        self.add_failures(condition);
    }

    fn add_rejections(&self, condition: &mut Condition, now: Nanos) {
        let episodes = self.repeated.iter().filter_map(|((kind, reason), events)| {
            Some((*kind, reason, events.episode.as_ref()?))
                .filter(|(kind, ..)| matches!(kind, Repeated::Rejections | Repeated::Timeouts))
        });
        let mut episodes: Vec<_> = episodes.collect();
        episodes.sort_by_key(|(_, _, episode)| std::cmp::Reverse(episode.total()));
        for (kind, reason, episode) in episodes {
            condition.severity = condition.severity.max(Severity::Strained);
            let seconds = episode.age(now).div_ceil(1_000_000_000);
            let calls = match kind {
                Repeated::Timeouts => counted(episode.total(), "call timed out", "calls timed out"),
                _ => counted(episode.total(), "call was rejected", "calls were rejected"),
            };
            condition.sentence.push_str(&format!(" {calls} in {seconds} s ({reason})."));
        }
    }

    fn add_failures(&self, condition: &mut Condition) {
        let recent = |index: usize| {
            let values = self.tracks.get(&index).map(|(_, values)| values);
            let recent = values.map(|values| values.iter().rev().take(RECENT_SAMPLES));
            recent.map_or(0.0, |recent| recent.map(|value| f64::from(*value)).sum())
        };
        let (calls, failures): (f64, f64) = (recent(ALL_CALLS), recent(FAILED_CALLS));
        if calls < MIN_CALLS || failures < calls * STRAINED_SHARE {
            return;
        }
        let share = failures / calls;
        let severity = if share >= FAILING_SHARE { Severity::Failing } else { Severity::Strained };
        condition.severity = condition.severity.max(severity);
        let (percent, calls) = ((share * 100.0).round(), calls.round());
        condition
            .sentence
            .push_str(&format!(" {percent} % of the {calls} calls of the last 10 s failed."));
    }

    /// Returns the tracks with their last samples, not more than `max_samples` of each.
    pub(super) fn tracks(&self, max_samples: usize) -> Vec<Track> {
        let track = |(index, (_, values)): (&usize, &(f64, VecDeque<f32>))| {
            let TrackKind { label, is_rate, .. } = TRACKS[*index];
            let values = values.range(values.len().saturating_sub(max_samples)..);
            let unit = if is_rate { "/s" } else { "" };
            Track { label, unit, values: values.copied().collect() }
        };
        self.tracks.iter().map(track).collect()
    }
}
