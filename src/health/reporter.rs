use std::{fmt, sync::Arc, thread, time::Duration};

use super::{
    entry::{CheckEntry, CheckState},
    registry::{CheckRegistry, Health},
};
use crate::error::ConfigError;

impl Health {
    /// Adds a check, and returns the reporter that sets its state. The state is unknown until then.
    ///
    /// The check is removed when the last clone of its reporter is dropped. If a panic drops this clone, the check
    /// remains and fails, until a new check with this name replaces it.
    ///
    /// # Errors
    ///
    /// Returns an error if the name does not consist of 1 to 64 of the characters `A`–`Z`, `a`–`z`, `0`–`9`, `.`, `_`
    /// and `-`, if another check has this name, or if the registry has 1000 checks.
    pub fn reporter(&self, name: &str) -> Result<Reporter, ConfigError> {
        let (registry, entry) = (self.registry().clone(), self.registry().add_entry(name)?);
        Ok(Reporter(Arc::new(Reporting { registry, entry })))
    }
}

/// Sets the state of one check of a [`Health`] registry.
///
/// Clones refer to the same check, which is removed when the last of them is dropped.
#[derive(Clone)]
pub struct Reporter(Arc<Reporting>);

struct Reporting {
    registry: Arc<CheckRegistry>,
    entry: Arc<CheckEntry>,
}

impl Reporter {
    /// Makes the check degrading: while it fails, the process is degraded but remains ready.
    #[must_use]
    pub fn degrading(self) -> Self {
        self.0.entry.set_degrading();
        self.0.registry.notify();
        self
    }

    /// Returns the name of the check.
    #[must_use]
    pub fn name(&self) -> &str {
        self.0.entry.name()
    }

    /// Returns the state of the check.
    #[must_use]
    pub fn state(&self) -> CheckState {
        self.0.entry.state()
    }

    /// Sets the state of the check.
    pub fn report(&self, state: CheckState) {
        match state {
            CheckState::Unknown => {}
            CheckState::Pass => self.record(Ok(()), None),
            CheckState::Fail => self.record(Err(String::new()), None),
        }
        self.publish(state);
    }

    /// Sets the state to passed.
    pub fn pass(&self) {
        self.report(CheckState::Pass);
    }

    /// Sets the state to failed, without a reason.
    pub fn fail(&self) {
        self.report(CheckState::Fail);
    }

    /// Sets the state to failed, with a reason for responses that [include
    /// reasons](super::endpoints::HealthService::with_reasons). The reason is stored without [secrets](crate#secrets),
    /// with a maximum of 256 bytes.
    pub fn fail_because(&self, reason: impl Into<String>) {
        self.record(Err(reason.into()), None);
        self.publish(CheckState::Fail);
    }

    /// Sets the state of the check without notifying the watchers of the registry. Runs no user code.
    #[cfg(feature = "lifecycle")]
    pub(crate) fn set(&self, result: Result<(), &'static str>) {
        let state = if result.is_ok() { CheckState::Pass } else { CheckState::Fail };
        self.record(result.map_err(str::to_owned), None);
        self.0.entry.publish(state);
    }

    /// Notifies the watchers of the registry that a check may have changed.
    #[cfg(feature = "lifecycle")]
    pub(crate) fn notify(&self) {
        self.0.registry.notify();
    }

    /// Ends all `Watch` streams of the registry, because the process stops.
    #[cfg(feature = "lifecycle")]
    pub(crate) fn end(&self) {
        self.0.registry.end();
    }

    /// Records the result of one run, without a change of the state.
    pub(super) fn record(&self, result: Result<(), String>, took: Option<Duration>) {
        self.0.entry.record(result, took);
    }

    /// Sets the state, and notifies the watchers of the registry if it has changed.
    pub(super) fn publish(&self, state: CheckState) {
        self.0.publish(state);
    }
}

impl Reporting {
    fn publish(&self, state: CheckState) {
        if self.entry.publish(state) {
            self.registry.notify_of(&self.entry);
        }
    }
}

impl Drop for Reporting {
    /// Removes the check. If a panic drops the reporter, the check remains and fails instead.
    fn drop(&mut self) {
        if thread::panicking() {
            self.entry.record(Err("its reporter panicked".into()), None);
            return self.publish(CheckState::Fail);
        }
        self.registry.remove(&self.entry);
    }
}

impl fmt::Debug for Reporter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reporter")
            .field("name", &self.name())
            .field("state", &self.state())
            .finish()
    }
}
