//! The state of one service of an attempt layer.

use std::sync::Arc;

use super::budget::RetryBudget;
use crate::sync::Mutex;

/// The state of one service and its clones, which a call reaches through one pointer.
pub(crate) struct Core<S, T> {
    pub(crate) settings: Arc<T>,
    pub(crate) budget: Option<RetryBudget>,
    /// Later attempts are clones of this service, so that a call with one attempt does not clone it.
    ///
    /// `S::clone` is user code that runs under this lock, which a service that is not `Sync` requires. Nothing else
    /// runs under it, and no handle uses it. [`lock`] ignores the poison that a panic leaves.
    template: Mutex<S>,
    pub(crate) misconfigured: bool,
}

impl<S, T> Core<S, T> {
    pub(crate) fn new(
        settings: Arc<T>,
        budget: Option<RetryBudget>,
        template: S,
        misconfigured: bool,
    ) -> Self {
        Self { settings, budget, template: Mutex::new(template), misconfigured }
    }

    /// Makes the deposit for a call whose first attempt has a good response.
    #[inline]
    pub(crate) fn deposit_first(&self) {
        if let Some(budget) = &self.budget {
            budget.deposit_for_response(0);
        }
    }

    pub(crate) fn service(&self) -> S
    where
        S: Clone,
    {
        self.template.lock().clone()
    }
}
