use std::sync::Arc;

use super::settings::RetrySettings;

/// A handle to the counts of a retry layer. To change the settings, use a clone of the layer: see the
/// [module](super#rules).
#[derive(Clone, Debug)]
pub struct RetryHandle(Arc<RetrySettings>);

/// A snapshot of a retry layer.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct RetrySnapshot {
    /// The number of attempts that were not the first of their call, including transparent retries.
    pub retries: u64,
    /// The number of calls that ended with a [`GiveUpReason`](crate::attempt::GiveUpReason) other than `Answered` and `NotRetryable`.
    pub gave_up: u64,
    /// The number of retries of this layer that the budget denied.
    pub budget_denied: u64,
    /// The number of retries that the budget permits now. `None` without a budget.
    pub budget_balance: Option<f64>,
}

impl RetryHandle {
    pub(super) fn new(settings: Arc<RetrySettings>) -> Self {
        Self(settings)
    }

    /// Returns the current counts.
    #[must_use]
    pub fn snapshot(&self) -> RetrySnapshot {
        let [retries, gave_up, budget_denied] = self.0.counts();
        let budget = self.0.budget();
        RetrySnapshot {
            retries,
            gave_up,
            budget_denied,
            budget_balance: budget.as_ref().map(|budget| budget.balance()),
        }
    }
}
