//! What the process observes, by name.

use std::{
    fmt,
    sync::{Arc, Weak},
};

use super::{
    metric::{Metric, Value},
    metrics::{BUILD_INFO, FOLDED_SERIES},
    visit::{Observe, Observed, Part, Visit},
};
use crate::{error::ConfigError, sync::Mutex};

/// The maximum length of a name in bytes. A name is the value of a label.
const MAX_NAME_BYTES: usize = 64;

/// The layers that the process observes.
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
#[derive(Clone, Default)]
pub struct Registry {
    watched: Arc<Mutex<Vec<Arc<Watched>>>>,
}

/// One layer that is observed.
struct Watched {
    layer: &'static str,
    name: Option<String>,
    state: Weak<dyn Observed>,
}

impl Registry {
    /// Returns a registry that watches nothing.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
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
    /// A layer without a name, with a name of more than 64 bytes, or with the name of another watched layer of the same
    /// kind, or a second health registry or lifecycle. Then nothing of the handle is watched.
    pub fn watch(&self, handle: &impl Observe) -> Result<(), ConfigError> {
        let parts = handle.parts();
        let mut watched = self.watched.lock();
        watched.retain(|watched| watched.state.strong_count() > 0);
        for (nth, part) in parts.iter().enumerate() {
            check_name(part)?;
            let is_same = |layer: &str, name: &Option<String>| {
                (layer, name.as_deref()) == (part.layer, part.name.as_deref())
            };
            let is_taken = watched.iter().any(|other| is_same(other.layer, &other.name))
                || parts[..nth].iter().any(|other| is_same(other.layer, &other.name));
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
        let new = |Part { layer, name, state }| Arc::new(Watched { layer, name, state });
        watched.extend(parts.into_iter().map(new));
        Ok(())
    }

    /// Visits the current values of all metrics of the watched layers, layer by layer.
    pub fn visit(&self, to: &mut dyn NamedVisit) {
        let version = [("version", env!("CARGO_PKG_VERSION"))];
        to.sample(&BUILD_INFO, None, &version, Value::Count(1));
        let watched = self.watched.lock().clone();
        for watched in watched {
            if let Some(state) = watched.state.upgrade() {
                state.observe(&mut Named { name: watched.name.as_deref(), to });
            }
        }
        to.sample(&FOLDED_SERIES, None, &[], Value::Count(0));
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
    to: &'a mut dyn NamedVisit,
}

impl Visit for Named<'_> {
    fn sample(&mut self, metric: &'static Metric, labels: &[(&'static str, &str)], value: Value) {
        self.to.sample(metric, self.name.filter(|_| metric.is_named()), labels, value);
    }
}

impl fmt::Debug for Registry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let watched = self.watched.lock().clone();
        let names = watched.iter().map(|watched| (watched.layer, &watched.name));
        f.debug_struct("Registry").field("watched", &names.collect::<Vec<_>>()).finish()
    }
}
