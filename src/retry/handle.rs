use super::core::Settings;
use crate::call::Shared;

/// Looks at a retry layer, from outside of the stack. A clone of the layer changes it: see the
/// [module](crate::retry#what-can-be-changed-of-it).
#[derive(Clone, Debug)]
pub struct RetryHandle(Shared<Settings>);

/// A retry layer at one moment.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct RetrySnapshot {
    /// How many attempts were made beside first ones.
    pub retries: u64,
    /// How many calls ended with a failure that would have been tried again, had a rule not said no.
    pub gave_up: u64,
    /// How many retries of this layer the budget denied.
    pub budget_denied: u64,
    /// How many retries the budget would allow now; none: there is no budget.
    pub budget_balance: Option<f64>,
}

impl RetryHandle {
    pub(super) fn new(settings: Shared<Settings>) -> Self {
        Self(settings)
    }

    /// All there is to know at this moment.
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
