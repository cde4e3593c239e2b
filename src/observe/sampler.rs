//! The sampler: reads all layers once a second, records their history, and summarises repeated events.

use std::{
    borrow::Cow,
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, SystemTime},
};

use tokio::time::{Instant, MissedTickBehavior};

#[cfg(feature = "metrics")]
use super::facade::MetricsPublisher;
use super::{
    condition::Severity,
    episode::Summary,
    history::{EpisodeSummary, LayerSample, Repeated},
    registry::{Registry, Watched, WatchedLayers},
    visit::KEYED_BREAKER,
};
use crate::{
    event::event,
    report::{ReportChange, StateChange},
    time::Nanos,
    user_code::catch_panic,
};

/// The time between two samples.
pub(super) const SAMPLE_INTERVAL: Duration = Duration::from_secs(1);

impl Registry {
    /// Returns the sampler: a future that reads all layers once a second until the last clone of the registry is dropped.
    /// Spawn it once:
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")] async fn main() {
    /// let registry = buttress::observe::Registry::new();
    /// tokio::spawn(registry.run());
    /// # }
    /// ```
    ///
    /// The sampler records five minutes of history for the [status](Self::status). It reports an outage in the log and as
    /// [decisions](Self::decisions), without a line for each call:
    ///
    /// - `calls rejected` (WARN) in the first second with rejections and then at most once in 10 s for each layer and
    ///   reason, and `calls are admitted again` (INFO) after 10 s without a rejection.
    /// - `retry budget used up` (WARN) at the first retry that the budget does not permit, and `retry budget is back`
    ///   (INFO) after 10 s without such a retry. The decision, but not the log, repeats the first one at most once in 10 s.
    /// - `calls timed out`, `calls not retried` and `hedge attempts not sent` as decisions only, with the same limit.
    ///
    /// With the feature `metrics` it also publishes the metrics after [`publish_metrics`](Self::publish_metrics).
    ///
    /// Metrics do not need the sampler, and neither do the reports of state changes, except those of a keyed circuit
    /// breaker. If the future is spawned more than once, one of the tasks samples, and another one continues when it
    /// ends. A task holds no reference to the registry between two samples. Dropping the future stops the sampler.
    pub fn run(&self) -> impl Future<Output = ()> + Send + 'static + use<> {
        let layers = Arc::downgrade(self.layers());
        async move {
            let mut ticks = tokio::time::interval(SAMPLE_INTERVAL);
            ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
            let mut guard = None;
            #[cfg(feature = "metrics")]
            let mut publisher = MetricsPublisher::new();
            loop {
                ticks.tick().await;
                let Some(layers) = layers.upgrade() else { return };
                let now = layers.clock.at(Instant::now());
                if guard.is_some() {
                    layers.sample(now);
                    #[cfg(feature = "metrics")]
                    publisher.publish_if_on(Registry::of(layers));
                } else {
                    guard = SamplerGuard::acquire(&layers);
                    if guard.is_some() {
                        layers.start_history(now);
                    }
                }
            }
        }
    }
}

/// The exclusive right to sample the layers of a registry, until it is dropped.
struct SamplerGuard(Weak<WatchedLayers>);

impl SamplerGuard {
    /// Returns `None` while another sampler has the right.
    fn acquire(layers: &Arc<WatchedLayers>) -> Option<Self> {
        let is_free = !layers.is_sampled.swap(true, Ordering::AcqRel);
        is_free.then(|| Self(Arc::downgrade(layers)))
    }
}

impl Drop for SamplerGuard {
    fn drop(&mut self) {
        if let Some(layers) = self.0.upgrade() {
            let is_sampled: &AtomicBool = &layers.is_sampled;
            is_sampled.store(false, Ordering::Release);
        }
    }
}

impl WatchedLayers {
    /// Begins the history of all layers at this time.
    fn start_history(&self, now: Nanos) {
        for watched in self.all() {
            let _ = catch_panic(|| watched.start_history(now));
        }
    }

    /// Adds a sample of each layer to its history, and emits the summaries that are due.
    fn sample(&self, now: Nanos) {
        for watched in self.all() {
            // A read can emit an event, such as that of the end of an open time, and can drop the last reference to a
            // layer. Subscribers and destructors are user code, whose panic must not end the sampler.
            let Some((summaries, change)) = catch_panic(|| watched.sample(now)) else { continue };
            if let Some(change) = change {
                watched.reporter(&self.log).report(&change);
            }
            for summary in summaries {
                let _ = catch_panic(|| watched.emit(&summary));
                self.add_decision(&watched, summary);
            }
        }
    }

    fn add_decision(&self, watched: &Watched, summary: EpisodeSummary) {
        let EpisodeSummary { kind, reason, summary, why } = summary;
        let (event, count) = match (kind, summary) {
            (Repeated::Rejections, Summary::Occurred { count, .. }) => ("calls rejected", count),
            (Repeated::Rejections, Summary::Ended { count, .. }) => {
                ("calls are admitted again", count)
            }
            (Repeated::Timeouts, Summary::Occurred { count, .. }) => ("calls timed out", count),
            (Repeated::RetriesDeclined, summary) if reason == BUDGET_USED_UP => match summary {
                Summary::Occurred { count, .. } => ("retry budget used up", count),
                Summary::Ended { count, .. } => ("retry budget is back", count),
            },
            (Repeated::RetriesDeclined, Summary::Occurred { count, .. }) => {
                ("calls not retried", count)
            }
            (Repeated::HedgesDeclined, Summary::Occurred { count, .. }) => {
                ("hedge attempts not sent", count)
            }
            (_, Summary::Ended { .. }) => return,
        };
        let why = match summary {
            Summary::Occurred { .. } => why,
            Summary::Ended { count, lasted } => {
                format!("{count} calls in {:.0} s", lasted as f64 / 1e9)
            }
        };
        let reason = Some(Cow::Owned(reason));
        self.log.add(watched.reporter(&self.log).decision(event, reason, why, count));
    }
}

/// The reason of a retry that the budget did not permit.
const BUDGET_USED_UP: &str = "budget_used_up";

/// Emits an event with the target of a layer. A target is a constant, so each layer has an event of its own.
macro_rules! event_of_layer {
    ($level:ident, $layer:expr, $name:expr, $($fields:tt)*) => {
        match $layer {
            "circuit_breaker" | KEYED_BREAKER => {
                event!(breaker, $level, $layer, $name, $($fields)*);
            }
            "concurrency_limit" => event!(limit, $level, $layer, $name, $($fields)*),
            "connect" => event!(connect, $level, $layer, $name, $($fields)*),
            "deadline" | "timeout" | "server_timeout" => {
                event!(timeout, $level, $layer, $name, $($fields)*);
            }
            "health_probe" => event!(health, $level, $layer, $name, $($fields)*),
            "lifecycle" => event!(lifecycle, $level, $layer, $name, $($fields)*),
            _ => event!(observe, $level, $layer, $name, $($fields)*),
        }
    };
}

impl Watched {
    /// Adds a sample of the layer to its history. Returns the summaries that are due, and the change of a keyed layer.
    ///
    /// A keyed layer reports that its first circuit is open, and that none is open any more. It does not report the changes
    /// of each circuit: an outage opens all of them, and they would displace all other decisions from the log.
    fn sample(&self, now: Nanos) -> (Vec<EpisodeSummary>, Option<StateChange>) {
        let Some(state) = self.state.upgrade() else { return (Vec::new(), None) };
        let sample = LayerSample::of(&*state);
        let mut condition = state.condition();
        let at = SystemTime::now();
        let mut history = self.history.lock();
        let summaries = history.add(sample, &condition, now);
        history.assess(&mut condition, now);
        let is_changed = history.set_severity(condition.severity, at);
        let change = (is_changed && self.layer == KEYED_BREAKER).then_some(StateChange {
            event: match condition.severity {
                Severity::Healthy => "circuits closed",
                _ => "circuits opened",
            },
            reason: None,
            why: condition.sentence,
        });
        (summaries, change)
    }

    /// Emits the event of a summary. Runs code of the subscriber, so no lock may be held.
    fn emit(&self, summary: &EpisodeSummary) {
        let EpisodeSummary { kind, reason, summary, .. } = summary;
        let (name, layer, reason) = (self.name.as_deref().unwrap_or(""), self.layer, &**reason);
        match (kind, *summary) {
            (Repeated::Rejections, Summary::Occurred { count, within, .. }) => {
                event_of_layer!(
                    WARN,
                    layer,
                    name,
                    reason = reason,
                    count = count,
                    in_ms = within / 1_000_000,
                    "calls rejected",
                );
            }
            (Repeated::Rejections, Summary::Ended { count, lasted }) => {
                event_of_layer!(
                    INFO,
                    layer,
                    name,
                    reason = reason,
                    count = count,
                    lasted_ms = lasted / 1_000_000,
                    "calls are admitted again",
                );
            }
            (Repeated::RetriesDeclined, Summary::Occurred { count, is_first: true, .. })
                if reason == BUDGET_USED_UP =>
            {
                event!(
                    retry,
                    WARN,
                    layer,
                    name,
                    reason = reason,
                    count = count,
                    "retry budget used up",
                );
            }
            (Repeated::RetriesDeclined, Summary::Ended { count, lasted })
                if reason == BUDGET_USED_UP =>
            {
                event!(
                    retry,
                    INFO,
                    layer,
                    name,
                    reason = reason,
                    count = count,
                    lasted_ms = lasted / 1_000_000,
                    "retry budget is back",
                );
            }
            _ => {}
        }
    }
}
