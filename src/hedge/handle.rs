use std::sync::{Arc, atomic::Ordering};

use super::settings::{HedgeDeclineReason, HedgeSettings, LAYER};
use crate::{error::ConfigError, event::settings_changed};

/// The maximum of [`HedgeLayer::max_hedges`](super::layer::HedgeLayer::max_hedges).
const MAX_HEDGES: u32 = 10;

/// A handle that reads the counts of a hedge layer and changes its settings while it runs.
///
/// The setters have the values and the errors of the layer's setters. They also change the services that the layer has
/// built, for calls that begin later. Delay, budget, name and protocol cannot change.
#[derive(Clone, Debug)]
pub struct HedgeHandle(pub(super) Arc<HedgeSettings>);

/// A snapshot of a hedge layer.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct HedgeSnapshot {
    /// The number of hedge attempts that were sent. A call can have [several](super::layer::HedgeLayer::max_hedges).
    pub sent: u64,
    /// The number of calls that returned the response of a hedge attempt, good or bad.
    pub won: u64,
    /// The number of hedge attempts of this layer that the budget denied.
    pub budget_denied: u64,
    /// The number of hedge attempts that the budget permits now. `None` without a budget.
    pub budget_balance: Option<f64>,
}

impl HedgeHandle {
    /// Returns the current counts.
    #[must_use]
    pub fn snapshot(&self) -> HedgeSnapshot {
        HedgeSnapshot {
            sent: self.0.sent.load(Ordering::Relaxed),
            won: self.0.won.load(Ordering::Relaxed),
            budget_denied: self.0.declined(HedgeDeclineReason::BudgetUsedUp),
            budget_balance: self.0.budget().map(|budget| budget.balance()),
        }
    }

    // ===== Changes at run time =====

    /// Sets the maximum number of hedge attempts of a call, as [`max_hedges`](super::layer::HedgeLayer::max_hedges)
    /// does. It also applies to calls in flight.
    ///
    /// # Errors
    ///
    /// The number is not within 1 to 10.
    pub fn set_max_hedges(&self, hedges: u32) -> Result<(), ConfigError> {
        if !(1..=MAX_HEDGES).contains(&hedges) {
            return Err(ConfigError::new("max_hedges", hedges, "use 1 to 10 hedge attempts"));
        }
        self.0.max_hedges.store(hedges, Ordering::Relaxed);
        self.report_setting("max_hedges");
        Ok(())
    }

    /// Sets the maximum size of a saved request body, as
    /// [`max_replay_bytes`](super::layer::HedgeLayer::max_replay_bytes) does.
    pub fn set_max_replay_bytes(&self, bytes: u64) {
        self.0.max_replay_bytes.store(bytes, Ordering::Relaxed);
        self.report_setting("max_replay_bytes");
    }

    /// Sets whether every request is safe to be sent more than once, as
    /// [`assume_idempotent`](super::layer::HedgeLayer::assume_idempotent) does.
    pub fn set_assume_idempotent(&self, all: bool) {
        self.0.assume_idempotent.store(all, Ordering::Relaxed);
        self.report_setting("assume_idempotent");
    }

    /// Reports a setting that has changed.
    fn report_setting(&self, key: &'static str) {
        settings_changed!(hedge, self.0.is_in_use(), LAYER, self.0.name(), key);
    }
}
