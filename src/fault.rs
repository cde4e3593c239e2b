//! The first setting of a layer that cannot work, and its reports.

use std::{fmt, sync::Arc};

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
    pub(crate) fn report(&self, layer: &'static str, effect: &'static str) {
        if let Some(fault) = self.0.as_deref().and_then(|label| label.fault.as_ref()) {
            fault.report(layer, effect);
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

    /// Reports the fault. `effect` states what the layer does because of it.
    pub(crate) fn report(&self, layer: &'static str, effect: &'static str) {
        if let Some(_occurrences) = self.reports.record() {
            event!(
                config,
                ERROR,
                layer,
                error = %self.error,
                occurrences = _occurrences,
                "misconfigured: {effect}"
            );
        }
        let _ = (layer, effect);
    }
}
