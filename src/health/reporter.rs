use std::{fmt, sync::Arc, thread, time::Duration};

use super::{
    entry::{CheckState, Entry},
    registry::Registry,
};

/// Says how one check of a [`Health`](super::Health) is. Clones speak for the same check; it goes with the
/// last of them.
#[derive(Clone)]
pub struct Reporter(Arc<Reporting>);

struct Reporting {
    registry: Arc<Registry>,
    entry: Arc<Entry>,
}

impl Reporter {
    pub(super) fn new(registry: Arc<Registry>, entry: Arc<Entry>) -> Self {
        Self(Arc::new(Reporting { registry, entry }))
    }

    /// Lets this check degrade the process and no more: it stays ready while this fails.
    #[must_use]
    pub fn degrading(self) -> Self {
        self.0.entry.degrades();
        self.0.registry.tell();
        self
    }

    /// The check's name.
    #[must_use]
    pub fn name(&self) -> &str {
        self.0.entry.name()
    }

    /// What was said last.
    #[must_use]
    pub fn state(&self) -> CheckState {
        self.0.entry.state()
    }

    /// From now on the check says this.
    pub fn report(&self, state: CheckState) {
        match state {
            CheckState::Unknown => {}
            CheckState::Pass => self.looked(Ok(()), None),
            CheckState::Fail => self.looked(Err(String::new()), None),
        }
        self.publish(state);
    }

    /// All is well.
    pub fn pass(&self) {
        self.report(CheckState::Pass);
    }

    /// Not well.
    pub fn fail(&self) {
        self.report(CheckState::Fail);
    }

    /// Sets the state to failed, with a reason for responses that [include
    /// reasons](super::HealthService::with_reasons). At most 256 bytes of the reason are stored, without
    /// [secrets](crate#secrets).
    pub fn fail_because(&self, reason: impl Into<String>) {
        self.looked(Err(reason.into()), None);
        self.publish(CheckState::Fail);
    }

    /// Sets the state of the check without notifying the watchers of the registry. Runs no user code.
    #[cfg(feature = "lifecycle")]
    pub(crate) fn set(&self, result: Result<(), &'static str>) {
        let state = if result.is_ok() { CheckState::Pass } else { CheckState::Fail };
        self.looked(result.map_err(str::to_owned), None);
        self.0.entry.publish(state);
    }

    /// Notifies the watchers of the registry that a check may have changed.
    #[cfg(feature = "lifecycle")]
    pub(crate) fn tell(&self) {
        self.0.registry.tell();
    }

    /// The process stops: streams that tell of its health come to their end.
    #[cfg(feature = "lifecycle")]
    pub(crate) fn end(&self) {
        self.0.registry.end();
    }

    /// A single look, which need not change what the check says.
    pub(super) fn looked(&self, result: Result<(), String>, took: Option<Duration>) {
        self.0.entry.looked(result, took);
    }

    pub(super) fn publish(&self, state: CheckState) {
        self.0.publish(state);
    }
}

impl Reporting {
    fn publish(&self, state: CheckState) {
        if self.entry.publish(state) {
            self.registry.tell();
        }
    }
}

impl Drop for Reporting {
    fn drop(&mut self) {
        if thread::panicking() {
            self.entry.looked(Err("its reporter panicked".into()), None);
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
