//! The registry: the layers that a process observes, by name.

use std::{
    fmt,
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    time::SystemTime,
};

use tokio::time::Instant;

use super::{
    decision::{DecisionLog, DecisionReporter, Decisions},
    exemplar::TraceId,
    exports::{Exports, HistogramExport},
    histogram::bounds,
    history::{LayerHistory, LayerSample},
    metric::{Metric, Value},
    metrics::{BUILD_INFO, FOLDED_SERIES},
    visit::{ForceCircuit, Observe, Observed, Part, Visit},
};
use crate::{
    error::ConfigError,
    sync::Mutex,
    time::{Clock, Nanos},
};

/// The maximum length of a name in bytes. A name is the value of a label.
const MAX_NAME_BYTES: usize = 64;
/// The maximum number of keys of a keyed layer in the metrics.
const MAX_KEYS: usize = 1000;

/// The layers that a process watches, with their metrics, status and decisions.
///
/// A registry holds no layer alive: a layer whose last service and handle are dropped disappears from the metrics. Clones
/// share the layers.
///
/// ```
/// use buttress::{CircuitBreakerLayer, observe::Registry};
///
/// # fn main() -> Result<(), buttress::ConfigError> {
/// let registry = Registry::new();
/// let breaker = CircuitBreakerLayer::http().name("search");
/// registry.watch(&breaker.handle())?;
/// assert!(registry.text().contains("buttress_breaker_state{name=\"search\",state=\"closed\"} 1"));
/// # Ok(()) }
/// ```
#[derive(Clone)]
pub struct Registry {
    layers: Arc<WatchedLayers>,
}

/// The layers of a registry, which its clones share.
pub(super) struct WatchedLayers {
    watched: Mutex<Vec<Arc<Watched>>>,
    pub(super) log: Arc<DecisionLog>,
    pub(super) clock: Clock,
    /// The time at which the registry was made.
    pub(super) started: SystemTime,
    /// Whether a sampler runs.
    pub(super) is_sampled: AtomicBool,
    /// The maximum number of keys of each keyed layer in the metrics.
    max_keys: AtomicUsize,
    /// The number of keys that were combined, summed over all reads.
    folded: AtomicU64,
    pub(super) exports: Arc<Exports>,
    /// The open streams of live pages.
    #[cfg(feature = "dashboard")]
    pub(super) streams: AtomicUsize,
}

/// A layer that is observed.
pub(super) struct Watched {
    pub(super) layer: &'static str,
    pub(super) name: Option<Arc<str>>,
    pub(super) state: Weak<dyn Observed>,
    pub(super) history: Mutex<LayerHistory>,
}

impl WatchedLayers {
    /// Returns the layers that exist at this time.
    pub(super) fn all(&self) -> Vec<Arc<Watched>> {
        let mut watched = self.watched.lock();
        watched.retain(|watched| watched.state.strong_count() > 0);
        watched.clone()
    }
}

impl Watched {
    /// Returns the reporter of this layer.
    pub(super) fn reporter(&self, log: &Arc<DecisionLog>) -> DecisionReporter {
        DecisionReporter { log: Arc::downgrade(log), layer: self.layer, name: self.name.clone() }
    }

    /// Begins the history at this time.
    pub(super) fn start_history(&self, now: Nanos) {
        if let Some(state) = self.state.upgrade() {
            let sample = LayerSample::of(&*state);
            self.history.lock().start(sample, now);
        }
    }
}

impl Registry {
    /// Returns a registry that watches nothing.
    #[must_use]
    pub fn new() -> Self {
        let layers = WatchedLayers {
            watched: Mutex::default(),
            log: Arc::default(),
            clock: Clock::new(),
            started: SystemTime::now(),
            is_sampled: AtomicBool::new(false),
            max_keys: AtomicUsize::new(0),
            folded: AtomicU64::new(0),
            exports: Arc::default(),
            #[cfg(feature = "dashboard")]
            streams: AtomicUsize::new(0),
        };
        Self { layers: Arc::new(layers) }
    }

    #[cfg(any(feature = "metrics", feature = "opentelemetry_0_33"))]
    pub(super) fn of(layers: Arc<WatchedLayers>) -> Self {
        Self { layers }
    }

    pub(super) fn exports(&self) -> &Arc<Exports> {
        &self.layers.exports
    }

    pub(super) fn layers(&self) -> &Arc<WatchedLayers> {
        &self.layers
    }

    /// Sets the maximum number of keys of each keyed layer that have series of their own, with the label `key`. The
    /// default is 0, because keys come from requests. The maximum is 1000.
    ///
    /// Keys whose circuits are not closed come first, then those whose circuits have rejected the most calls. The others
    /// are combined into the key `other`, and `buttress_observe_folded_series_total` counts them. The keys of a closure have
    /// names only with [`named_keys`](crate::breaker::KeyedCircuitBreakerLayer::named_keys).
    ///
    /// # Errors
    ///
    /// Returns an error for more than 1000 keys.
    pub fn set_max_keys(&self, max_keys: usize) -> Result<(), ConfigError> {
        if max_keys > MAX_KEYS {
            return Err(ConfigError::new("max_keys", max_keys, "use 1000 or less"));
        }
        self.layers.max_keys.store(max_keys, Ordering::Relaxed);
        Ok(())
    }

    /// Returns a receiver of the decisions after this call: changes of states with their reasons, and summaries of
    /// rejections. Use it to run code when a circuit opens:
    ///
    /// ```
    /// # use buttress::{CircuitBreakerLayer, observe::Registry};
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), buttress::ConfigError> {
    /// let registry = Registry::new();
    /// let breaker = CircuitBreakerLayer::http().name("search");
    /// registry.watch(&breaker.handle())?;
    /// let mut decisions = registry.decisions();
    ///
    /// breaker.handle().force_open();
    /// let decision = decisions.next().await.expect("the registry exists");
    /// assert_eq!((decision.layer, decision.event), ("circuit_breaker", "circuit forced"));
    /// # Ok(()) }
    /// ```
    ///
    /// The registry keeps the last 256 decisions, so a slow receiver delays no layer. Summaries need the
    /// [sampler](Self::run), and so do the decisions of a keyed circuit breaker: `circuits opened` when its first
    /// circuit opens, and `circuits closed` when all are closed again.
    #[must_use]
    pub fn decisions(&self) -> Decisions {
        let log = &self.layers.log;
        Decisions::after(log, log.last_id())
    }

    /// Watches the layer of a handle, all layers of the handle of a stack, the checks of a health registry, or a
    /// lifecycle.
    ///
    /// The metrics have the name of the layer as the label `name`. All layers of a stack have the name of the stack. Give
    /// the layers of one stack that you build yourself the same name, so that rules can combine their metrics. A health
    /// registry and a lifecycle exist once in a process and need no name.
    ///
    /// # Errors
    ///
    /// Returns an error for a layer without a name, with a name of more than 64 bytes, or with the name of another watched
    /// layer of the same kind, and for a second health registry or lifecycle. In these cases no layer of the handle is
    /// watched.
    pub fn watch(&self, handle: &impl Observe) -> Result<(), ConfigError> {
        let parts = handle.parts();
        let new: Vec<_> = {
            let mut watched = self.layers.watched.lock();
            watched.retain(|watched| watched.state.strong_count() > 0);
            for (nth, part) in parts.iter().enumerate() {
                check_name(part)?;
                let is_same = |layer: &str, name: Option<&str>| {
                    (layer, name) == (part.layer, part.name.as_deref())
                };
                let is_taken = watched
                    .iter()
                    .any(|other| is_same(other.layer, other.name.as_deref()))
                    || parts[..nth].iter().any(|other| is_same(other.layer, other.name.as_deref()));
                if is_taken {
                    return Err(match &part.name {
                        Some(name) => {
                            let remedy = format!("give each {} a name of its own", part.layer);
                            ConfigError::new("name", name, remedy)
                        }
                        None => {
                            let remedy = format!("watch one {} for each registry", part.layer);
                            ConfigError::new("part", part.layer, remedy)
                        }
                    });
                }
            }
            let new = |Part { layer, name, state }| {
                let name = name.map(Arc::from);
                Arc::new(Watched { layer, name, state, history: Mutex::default() })
            };
            let new: Vec<_> = parts.into_iter().map(new).collect();
            watched.extend(new.iter().cloned());
            new
        };
        let now = self.layers.clock.at(Instant::now());
        for watched in new {
            watched.start_history(now);
            if let Some(state) = watched.state.upgrade() {
                state.add_receiver(Arc::new(watched.reporter(&self.layers.log)));
            }
            self.connect(&watched);
        }
        Ok(())
    }

    /// Attaches exemplars to the buckets of the call durations and of the queue waits, on the page in the format of
    /// OpenMetrics: the id of the trace of one call.
    ///
    /// The first call of a second in a bucket for which `trace_id` returns an id becomes the exemplar of the bucket.
    /// `trace_id` runs in the context of the call when its value is recorded, without a lock, and only if the bucket has
    /// no exemplar of this second. It must not make calls through watched layers. If it panics, the call has no exemplar. The last
    /// `trace_id` replaces the ones before it. Only the first registry that exports the histograms of a layer has its
    /// exemplars.
    ///
    /// ```
    /// use buttress::observe::{Registry, TraceId};
    ///
    /// let registry = Registry::new();
    /// // With OpenTelemetry: `TraceId::from_bytes(Context::current().span().span_context().trace_id().to_bytes())`.
    /// registry.exemplars(|| TraceId::from_text("4bf92f3577b34da6a3ce929d0e0e4736"));
    /// ```
    pub fn exemplars(&self, trace_id: impl Fn() -> Option<TraceId> + Send + Sync + 'static) {
        self.exports().set_hook(Arc::new(trace_id));
        self.connect_histograms();
    }

    /// Exports the duration of each call to the `metrics` facade and to the meters of OpenTelemetry, too.
    ///
    /// By default only the text page has the durations of calls, because the exporters receive each value separately:
    /// after this call, each call of a stack calls the recorder of the facade and the SDK of OpenTelemetry.
    #[cfg(any(feature = "metrics", feature = "opentelemetry_0_33"))]
    #[cfg_attr(docsrs, doc(cfg(any(feature = "metrics", feature = "opentelemetry_0_33"))))]
    pub fn export_call_durations(&self) {
        self.exports().export_call_durations();
        self.connect_histograms();
    }

    /// Connects the histograms of all layers to the exports that need them.
    pub(super) fn connect_histograms(&self) {
        self.layers.all().iter().for_each(|watched| self.connect(watched));
    }

    /// Connects the histograms of a layer to the exports that need them. The exports are set before the layers are read,
    /// and a layer is added before the exports are read, so that no histogram is missed.
    fn connect(&self, watched: &Watched) {
        let Some(state) = watched.state.upgrade() else { return };
        let name = watched.name.as_deref();
        state.visit_histograms(&mut |metric, labels, cell| {
            if self.exports().needs(metric) {
                let buckets = bounds(metric).len() + 1;
                let exports = self.exports().clone();
                cell.connect(|| HistogramExport::new(exports, metric, name, labels, buckets));
            }
        });
    }

    /// Visits the current values of all metrics of the watched layers, layer by layer.
    pub fn visit(&self, to: &mut dyn NamedVisit) {
        let version = [("version", env!("CARGO_PKG_VERSION"))];
        to.sample(&BUILD_INFO, None, &version, Value::Count(1));
        let max_keys = self.layers.max_keys.load(Ordering::Relaxed);
        let folded = &self.layers.folded;
        for watched in self.layers.all() {
            if let Some(state) = watched.state.upgrade() {
                state.observe(&mut Named { name: watched.name.as_deref(), max_keys, folded, to });
            }
        }
        to.sample(&FOLDED_SERIES, None, &[], Value::Count(folded.load(Ordering::Relaxed)));
    }

    /// Forces the state of a circuit. Returns `false` if no circuit with this name is watched.
    pub(super) fn force(&self, name: &str, to: ForceCircuit) -> bool {
        self.layers.all().iter().any(|watched| {
            watched.name.as_deref() == Some(name)
                && watched.state.upgrade().is_some_and(|state| state.force(to))
        })
    }
}

/// A reference that does not keep the registry alive.
#[cfg(feature = "opentelemetry_0_33")]
pub(super) struct WeakRegistry(Weak<WatchedLayers>);

#[cfg(feature = "opentelemetry_0_33")]
impl Registry {
    pub(super) fn downgrade(&self) -> WeakRegistry {
        WeakRegistry(Arc::downgrade(&self.layers))
    }
}

#[cfg(feature = "opentelemetry_0_33")]
impl WeakRegistry {
    pub(super) fn upgrade(&self) -> Option<Registry> {
        self.0.upgrade().map(Registry::of)
    }
}

fn check_name(part: &Part) -> Result<(), ConfigError> {
    // A part of the process needs no name.
    let Some(name) = &part.name else { return Ok(()) };
    if name.is_empty() {
        let remedy = match part.layer {
            "stack" => "set `name` of the configuration".to_owned(),
            layer => format!("call `.name(…)` of the {layer} before `handle()`"),
        };
        return Err(ConfigError::new("name", "", remedy));
    }
    if name.len() > MAX_NAME_BYTES {
        let remedy = format!("use at most {MAX_NAME_BYTES} bytes");
        return Err(ConfigError::new("name", name, remedy));
    }
    Ok(())
}

/// Receives the values of metrics with the names of their layers.
pub trait NamedVisit {
    /// Receives one value. `name` is the name of the layer, or `None` for a metric of the process.
    fn sample(
        &mut self,
        metric: &'static Metric,
        name: Option<&str>,
        labels: &[(&'static str, &str)],
        value: Value,
    );
}

/// Adds the name of a layer to its metrics. A metric of a part of the process has no name.
struct Named<'a> {
    name: Option<&'a str>,
    max_keys: usize,
    folded: &'a AtomicU64,
    to: &'a mut dyn NamedVisit,
}

impl Visit for Named<'_> {
    fn sample(&mut self, metric: &'static Metric, labels: &[(&'static str, &str)], value: Value) {
        self.to.sample(metric, self.name.filter(|_| metric.is_named()), labels, value);
    }

    fn max_keys(&self) -> usize {
        self.max_keys
    }

    fn fold(&mut self, keys: u64) {
        self.folded.fetch_add(keys, Ordering::Relaxed);
    }
}

impl Default for Registry {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for Registry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let watched = self.layers.all();
        let names = watched.iter().map(|watched| (watched.layer, &watched.name));
        f.debug_struct("Registry").field("watched", &names.collect::<Vec<_>>()).finish()
    }
}

#[cfg(all(test, feature = "full"))]
mod tests {
    use std::{collections::BTreeMap, time::Duration};

    use bytes::Bytes;
    use http_body_util::Empty;

    use super::*;
    use crate::{
        CircuitBreakerLayer, ConcurrencyLimitLayer, HealthProbeLayer, HedgeLayer, RetryLayer, Trip,
        connect::ConnectLayer,
        health::{Get, Health},
        lifecycle::Lifecycle,
        limit::adaptive::Knee,
        sync::lock_log,
    };

    /// A visitor that runs a closure for each value.
    struct Each<F>(F);

    impl<F: FnMut()> NamedVisit for Each<F> {
        fn sample(
            &mut self,
            _: &'static Metric,
            _: Option<&str>,
            _: &[(&'static str, &str)],
            _: Value,
        ) {
            (self.0)();
        }
    }

    /// Reads the layer. `uses_locks` takes every lock of the layer: it would deadlock under one of them.
    fn check<T>(what: &str, handle: &impl Observe, uses_locks: impl Fn() -> T) {
        let registry = Registry::new();
        registry.watch(handle).unwrap();
        let locks = lock_log::of(|| registry.visit(&mut Each(|| ())));
        let mut times = BTreeMap::<usize, u32>::new();
        locks.into_iter().for_each(|lock| *times.entry(lock).or_default() += 1);
        assert!(times.values().all(|times| *times == 1), "{what}: {times:?}");
        registry.visit(&mut Each(|| drop(uses_locks())));
    }

    #[tokio::test(start_paused = true)]
    async fn read_takes_each_lock_of_a_layer_once_and_visits_without_it() {
        let second = Duration::from_secs(1);
        let breaker = CircuitBreakerLayer::http().name("a");
        let handle = breaker.handle();
        check("breaker", &handle, || handle.snapshot());
        let limit = ConcurrencyLimitLayer::adaptive(Knee::default()).queue(5, second).name("a");
        let handle = limit.handle();
        check("limit", &handle, || handle.snapshot());
        let retry = RetryLayer::http().name("a");
        let handle = retry.handle();
        check("retry", &handle, || handle.snapshot());
        let hedge = HedgeLayer::http(second).name("a");
        let handle = hedge.handle();
        check("hedge", &handle, || handle.snapshot());
        let connect = ConnectLayer::new().name("a");
        let handle = connect.handle();
        check("connect", &handle, || handle.snapshot());
        let probe: HealthProbeLayer<Get<Empty<Bytes>>> = HealthProbeLayer::get("/").name("a");
        let handle = probe.handle();
        check("probe", &handle, || handle.snapshot());
        let health = Health::new();
        let _checks = ["a", "b", "c"].map(|name| health.reporter(name).unwrap());
        check("health", &health, || health.snapshot());
        let lifecycle = Lifecycle::without_signals(&health).unwrap();
        check("lifecycle", &lifecycle, || lifecycle.in_flight());
        let keyed = CircuitBreakerLayer::new(Trip::consecutive(1)).name("a").keyed(|key: &u8| *key);
        let handle = keyed.per_response().handle();
        check("keyed breaker", &handle, || handle.snapshot());
    }
}
