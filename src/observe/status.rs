//! The status of all layers, which the live page and scripts read.

use std::{
    borrow::Cow,
    fmt::Write,
    sync::{Arc, atomic::Ordering},
    time::{SystemTime, UNIX_EPOCH},
};

use tokio::time::Instant;

use super::{
    condition::{Fact, Severity},
    decision::Decision,
    history::{MAX_SAMPLES, Track},
    registry::{Registry, Watched},
    sampler::SAMPLE_INTERVAL,
};
use crate::{json::JsonText, outcome::LayerKind, time::Nanos};

/// The number of the last decisions in a status.
const MAX_DECISIONS: usize = 100;

/// The status of all watched layers at one time.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Status {
    /// The time of the status.
    pub at: SystemTime,
    /// The time at which the registry was made.
    pub started: SystemTime,
    /// The phase of the process. `None` if no lifecycle is watched.
    pub phase: Option<&'static str>,
    /// Whether the [sampler](Registry::run) runs. Without it, there are no tracks and no rates.
    pub is_sampled: bool,
    /// The number of layers that need attention, as a sentence.
    pub verdict: String,
    /// The layers, the most severe first.
    pub layers: Vec<LayerStatus>,
    /// The last 100 decisions, the newest first.
    pub decisions: Vec<Decision>,
}

/// The status of one layer.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct LayerStatus {
    /// The kind of the layer, such as `circuit_breaker`. Metrics with the label `layer` have the same value.
    pub layer: &'static str,
    /// The name of the layer. `None` for a part of the process.
    pub name: Option<Arc<str>>,
    /// The severity of the state.
    pub severity: Severity,
    /// The state in one word. Empty if the layer has no states.
    pub state: &'static str,
    /// The state, its reason, and the calls that are rejected now.
    pub sentence: String,
    /// The reason in `snake_case`, as in metrics and events.
    pub reason: Option<&'static str>,
    /// The time at which this state ends without an action.
    pub ends_at: Option<SystemTime>,
    /// The next change of the state, or the action that ends it.
    pub next: Option<Cow<'static, str>>,
    /// A text that may contain the words of an upstream, such as the error of a health probe.
    pub detail: Option<String>,
    /// The time of the sample at which the layer became healthy, or stopped being healthy. `None` without the sampler.
    pub since: Option<SystemTime>,
    /// The numbers of the layer with their limits.
    pub facts: Vec<Fact>,
    /// The samples of the last five minutes. Empty without the sampler.
    pub tracks: Vec<Track>,
    /// Whether the layer is a circuit that can be forced by hand.
    pub(super) is_circuit: bool,
}

impl Status {
    /// Returns whether no layer needs attention.
    #[must_use]
    pub fn is_healthy(&self) -> bool {
        self.layers.iter().all(|layer| layer.severity == Severity::Healthy)
    }

    /// Returns the status as JSON, as the live page receives it: times in milliseconds since 1970, texts without markup.
    /// The [details](LayerStatus::detail) are left out.
    #[must_use]
    pub fn to_json(&self) -> String {
        self.write_json(&StatusJson::default())
    }

    pub(super) fn write_json(&self, options: &StatusJson<'_>) -> String {
        let mut json = String::with_capacity(4096);
        json.push_str("{\"schema\":1,");
        self.write_head(&mut json, options);
        json.push_str(",\"layers\":[");
        for (nth, layer) in self.layers.iter().enumerate() {
            comma(&mut json, nth);
            layer.write_json(&mut json, options);
        }
        json.push_str("],\"decisions\":[");
        for (nth, decision) in self.decisions.iter().enumerate() {
            comma(&mut json, nth);
            decision.write_json(&mut json);
        }
        json.push_str("]}");
        json
    }

    /// Writes the fields of the whole process, without braces.
    pub(super) fn write_head(&self, json: &mut String, options: &StatusJson<'_>) {
        let interval = SAMPLE_INTERVAL.as_millis();
        let (at, started) = (millis(self.at), millis(self.started));
        let (title, verdict) = (JsonText(options.title), JsonText(&self.verdict));
        let _ = write!(
            json,
            "\"at\":{at},\"interval_ms\":{interval},\"version\":\"{}\",\"process\":{{\"title\":{title},\
             \"started\":{started},\"phase\":{}}},\"healthy\":{},\"sampled\":{},\"verdict\":{verdict}",
            env!("CARGO_PKG_VERSION"),
            OrNull(self.phase.map(JsonText)),
            self.is_healthy(),
            self.is_sampled,
        );
    }
}

/// The options for the JSON text of a status.
#[derive(Clone, Copy, Debug)]
pub(super) struct StatusJson<'a> {
    pub(super) title: &'a str,
    pub(super) has_controls: bool,
    pub(super) has_details: bool,
    /// The maximum number of samples of each track.
    pub(super) max_samples: usize,
}

impl Default for StatusJson<'_> {
    fn default() -> Self {
        Self { title: "", has_controls: false, has_details: false, max_samples: MAX_SAMPLES }
    }
}

impl LayerStatus {
    /// Returns the identifier of the layer in its registry: the kind and the name, such as `circuit_breaker/search`.
    #[must_use]
    pub fn id(&self) -> String {
        match &self.name {
            Some(name) => format!("{}/{name}", self.layer),
            None => self.layer.to_owned(),
        }
    }

    pub(super) fn write_json(&self, json: &mut String, options: &StatusJson<'_>) {
        let id = self.id();
        let _ = write!(
            json,
            "{{\"id\":{},\"layer\":\"{}\",\"name\":{},\"severity\":\"{}\",\"state\":\"{}\",\"sentence\":{},\
             \"reason\":{},\"ends_at\":{},\"next\":{},\"since\":{},\"detail\":{},\"facts\":[",
            JsonText(&id),
            self.layer,
            OrNull(self.name.as_deref().map(JsonText)),
            self.severity,
            self.state,
            JsonText(&self.sentence),
            OrNull(self.reason.map(JsonText)),
            OrNull(self.ends_at.map(millis)),
            OrNull(self.next.as_deref().map(JsonText)),
            OrNull(self.since.map(millis)),
            OrNull(self.detail.as_deref().filter(|_| options.has_details).map(JsonText)),
        );
        for (nth, Fact { label, value, max, unit }) in self.facts.iter().enumerate() {
            comma(json, nth);
            let (value, max) = (finite(*value), OrNull(max.map(finite)));
            let _ = write!(
                json,
                "{{\"label\":\"{label}\",\"value\":{value},\"max\":{max},\"unit\":\"{unit}\"}}"
            );
        }
        json.push_str("],\"tracks\":[");
        for (nth, Track { label, unit, values }) in self.tracks.iter().enumerate() {
            comma(json, nth);
            let _ = write!(json, "{{\"label\":\"{label}\",\"unit\":\"{unit}\",\"values\":[");
            let first = values.len().saturating_sub(options.max_samples);
            for (nth, value) in values[first..].iter().enumerate() {
                comma(json, nth);
                // One decimal place is enough for a drawing, and keeps the history small.
                let _ = write!(json, "{}", finite((f64::from(*value) * 10.0).round() / 10.0));
            }
            json.push_str("]}");
        }
        let controls = if self.is_circuit && options.has_controls {
            "\"open\",\"close\",\"reset\""
        } else {
            ""
        };
        let _ = write!(json, "],\"controls\":[{controls}]}}");
    }
}

impl Decision {
    pub(super) fn write_json(&self, json: &mut String) {
        let Self { id, at, layer, name, event, reason, why, count } = self;
        let _ = write!(
            json,
            "{{\"id\":{id},\"at\":{},\"layer\":\"{layer}\",\"name\":{},\"event\":\"{event}\",\"reason\":{},\
             \"why\":{},\"count\":{count}}}",
            millis(*at),
            OrNull(name.as_deref().map(JsonText)),
            OrNull(reason.as_deref().map(JsonText)),
            JsonText(why),
        );
    }
}

/// Displays a value, or `null`.
struct OrNull<T>(Option<T>);

impl<T: std::fmt::Display> std::fmt::Display for OrNull<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.0 {
            Some(value) => value.fmt(f),
            None => f.write_str("null"),
        }
    }
}

fn comma(json: &mut String, nth: usize) {
    if nth > 0 {
        json.push(',');
    }
}

/// JSON has no number that is not finite.
fn finite(number: f64) -> f64 {
    if number.is_finite() { number } else { 0.0 }
}

fn millis(at: SystemTime) -> u128 {
    at.duration_since(UNIX_EPOCH).unwrap_or_default().as_millis()
}

// ===== The registry =====

impl Registry {
    /// Returns the status of all watched layers: their states with reasons, limits and times, the history of five minutes,
    /// and the last decisions.
    ///
    /// The states are read by this call. The history and the rates need the [sampler](Self::run).
    #[must_use]
    pub fn status(&self) -> Status {
        let layers = self.layers();
        let (at, now) = (SystemTime::now(), layers.clock.at(Instant::now()));
        let is_sampled = layers.is_sampled.load(Ordering::Acquire);
        let status = |watched: &Arc<Watched>| watched.status(at, now, is_sampled);
        let mut statuses: Vec<LayerStatus> = layers.all().iter().filter_map(status).collect();
        statuses.sort_by(|a, b| {
            let key = |layer: &LayerStatus| {
                (std::cmp::Reverse(layer.severity), layer.name.clone(), layer.layer)
            };
            key(a).cmp(&key(b))
        });
        let is_lifecycle = |layer: &&LayerStatus| layer.layer == LayerKind::Lifecycle.as_str();
        let phase = statuses.iter().find(is_lifecycle).map(|layer| layer.state);
        let unhealthy = statuses.iter().filter(|layer| layer.severity > Severity::Healthy).count();
        let verdict = match (unhealthy, statuses.len()) {
            (_, 0) => "No layer is watched".to_owned(),
            (0, 1) => "The layer is healthy".to_owned(),
            (0, all) => format!("All {all} layers are healthy"),
            (1, all) => format!("1 of {all} layers needs attention"),
            (some, all) => format!("{some} of {all} layers need attention"),
        };
        Status {
            at,
            started: layers.started,
            phase,
            is_sampled,
            verdict,
            layers: statuses,
            decisions: layers.log.newest(MAX_DECISIONS).iter().map(|one| (**one).clone()).collect(),
        }
    }
}

impl Watched {
    fn status(&self, at: SystemTime, now: Nanos, is_sampled: bool) -> Option<LayerStatus> {
        let mut condition = self.state.upgrade()?.condition();
        // Without a running sampler, the history is that of an earlier sampler, whose last episodes would never end.
        let (since, tracks) = if is_sampled {
            let history = self.history.lock();
            history.assess(&mut condition, now);
            (history.since(condition.severity), history.tracks(MAX_SAMPLES))
        } else {
            (None, Vec::new())
        };
        Some(LayerStatus {
            layer: self.layer,
            name: self.name.clone(),
            severity: condition.severity,
            state: condition.state,
            sentence: condition.sentence,
            reason: condition.reason,
            ends_at: condition.ends_in.and_then(|left| at.checked_add(left)),
            next: condition.next,
            detail: condition.detail,
            since,
            facts: condition.facts,
            tracks,
            is_circuit: condition.is_circuit,
        })
    }
}
