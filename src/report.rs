//! Reports of state changes, from a layer to the registries that watch it.

use std::fmt;
#[cfg(feature = "observe")]
use std::sync::Arc;

#[cfg(feature = "observe")]
use crate::sync::Mutex;

/// A change of the state of a layer.
#[derive(Clone, Debug)]
#[cfg_attr(not(feature = "observe"), allow(dead_code))]
pub(crate) struct StateChange {
    /// The message of the event about this change.
    pub(crate) event: &'static str,
    pub(crate) reason: Option<&'static str>,
    /// The values that led to the change, as text.
    pub(crate) why: String,
}

/// Receives the changes of one layer.
pub(crate) trait ReportChange: fmt::Debug + Send + Sync {
    /// Receives a change. It may wake tasks.
    fn report(&self, change: &StateChange);

    /// Returns whether the registry behind this receiver still exists.
    fn is_alive(&self) -> bool;
}

/// The receivers of the changes of a layer. Without the feature `observe` the cell is empty, and a report does nothing.
///
/// A fork of a layer starts with an empty cell, because a registry watches each layer by its handle.
#[derive(Debug, Default)]
pub(crate) struct ReportCell {
    #[cfg(feature = "observe")]
    receivers: Mutex<Vec<Arc<dyn ReportChange>>>,
}

impl ReportCell {
    /// Reports a change. Runs `change` only if there is a receiver.
    ///
    /// A report wakes tasks, so no lock may be held here.
    pub(crate) fn report(&self, change: impl FnOnce() -> StateChange) {
        #[cfg(feature = "observe")]
        {
            let receivers = self.receivers.lock().clone();
            if !receivers.is_empty() {
                let change = change();
                receivers.iter().for_each(|receiver| receiver.report(&change));
            }
        }
        #[cfg(not(feature = "observe"))]
        let _ = change;
    }

    /// Adds a receiver, and removes those that no longer exist.
    #[cfg(feature = "observe")]
    pub(crate) fn add(&self, receiver: Arc<dyn ReportChange>) {
        let mut receivers = self.receivers.lock();
        receivers.retain(|receiver| receiver.is_alive());
        receivers.push(receiver);
    }
}
