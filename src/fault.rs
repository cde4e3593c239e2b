//! The first setting of a layer that cannot work, and its reports.

use std::{
    fmt,
    sync::{Arc, OnceLock},
};

use crate::{
    error::ConfigError,
    event::{RepeatedEvent, event},
};

/// The first setting of a layer that cannot work.
///
/// The clones of the layer and all of its services share it, so that its report is limited however often the layer is
/// applied: axum applies a layer once per connection or request.
#[derive(Clone, Default)]
pub(crate) struct Fault(Option<Arc<LayerName>>);

impl Fault {
    /// Records the error, unless there is an earlier one.
    pub(crate) fn get_or_insert(&mut self, error: ConfigError) {
        self.get_or_insert_with(|| error);
    }

    pub(crate) fn get_or_insert_with(&mut self, error: impl FnOnce() -> ConfigError) {
        self.0.get_or_insert_with(|| {
            let fault = Some(LayerFault::new(error()));
            Arc::new(LayerName { name: Box::default(), fault })
        });
    }

    /// Returns the value of a valid setting, or records the error unless there is an earlier one.
    pub(crate) fn accept<T>(&mut self, setting: Result<T, ConfigError>) -> Option<T> {
        setting.map_err(|error| self.get_or_insert(error)).ok()
    }

    pub(crate) fn is_some(&self) -> bool {
        self.0.is_some()
    }

    pub(crate) fn is_none(&self) -> bool {
        self.0.is_none()
    }

    pub(crate) fn error(&self) -> Option<&ConfigError> {
        Some(&self.0.as_deref()?.fault.as_ref()?.error)
    }

    /// Removes and returns the error.
    pub(crate) fn take(&mut self) -> Option<ConfigError> {
        let error = self.error().cloned();
        self.0 = None;
        error
    }

    /// Returns the label of the rejections because of this error.
    pub(crate) fn label(&self) -> Option<&Arc<LayerName>> {
        self.0.as_ref()
    }

    /// Reports the error for a layer that does not reject calls because of it.
    pub(crate) fn report(&self, layer: &'static str, name: &str, effect: &'static str) {
        if let Some(fault) = self.0.as_deref().and_then(|label| label.fault.as_ref()) {
            fault.report(layer, name, effect);
        }
    }
}

impl From<Option<ConfigError>> for Fault {
    fn from(error: Option<ConfigError>) -> Self {
        let mut fault = Self::default();
        if let Some(error) = error {
            fault.get_or_insert(error);
        }
        fault
    }
}

impl fmt::Debug for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.error().fmt(f)
    }
}

/// The part that the rejections of one layer share: its name, or the setting that cannot work.
#[derive(Debug)]
pub(crate) struct LayerName {
    pub(crate) name: Box<str>,
    pub(crate) fault: Option<LayerFault>,
}

impl LayerName {
    /// Returns the name of a layer whose settings can work.
    pub(crate) fn named(name: &str) -> Arc<Self> {
        Arc::new(Self { name: name.into(), fault: None })
    }
}

/// The name of a layer: the first name that it gets, or until then a default, such as the name of the layer that it is a
/// fork of. It is read without a lock.
#[derive(Debug, Default)]
pub(crate) struct NameCell {
    own: OnceLock<Arc<LayerName>>,
    default: OnceLock<Arc<LayerName>>,
}

impl NameCell {
    /// Sets the name, unless the layer has a name of its own. An empty name has no effect.
    pub(crate) fn set(&self, name: &str) {
        if !name.is_empty() {
            // The first name stays, because rejections in progress refer to it.
            let _ = self.own.set(LayerName::named(name));
        }
    }

    #[inline]
    pub(crate) fn get(&self) -> Option<&Arc<LayerName>> {
        self.own.get().or_else(|| self.default.get())
    }

    pub(crate) fn as_str(&self) -> &str {
        self.get().map_or("", |label| &label.name)
    }

    pub(crate) fn has_own(&self) -> bool {
        self.own.get().is_some()
    }

    /// Sets the name that is used until the layer has a name of its own. The first default stays.
    pub(crate) fn set_default(&self, name: &str) {
        let _ = self.default.set(LayerName::named(name));
    }

    /// Returns a cell with this name as its default.
    pub(crate) fn fork(&self) -> Self {
        let default = self.get().map_or_else(OnceLock::new, |name| name.clone().into());
        Self { own: OnceLock::new(), default }
    }
}

/// A setting that cannot work, and the events that report it.
#[derive(Clone, Debug)]
pub(crate) struct LayerFault {
    pub(crate) error: ConfigError,
    pub(crate) reports: Arc<RepeatedEvent>,
}

impl LayerFault {
    pub(crate) fn new(error: ConfigError) -> Self {
        Self { error, reports: Arc::new(RepeatedEvent::new()) }
    }

    /// Reports the fault of the layer `name`. `effect` states what the layer does because of it.
    pub(crate) fn report(&self, layer: &'static str, name: &str, effect: &'static str) {
        if let Some(occurrences) = self.reports.record() {
            event!(
                config,
                ERROR,
                layer,
                name,
                field = self.error.field,
                value = self.error.value.as_str(),
                remedy = &*self.error.remedy,
                why = effect,
                occurrences = occurrences,
                "misconfigured",
            );
        }
    }
}
