//! The state that a hedge layer shares between all its services.

use std::{
    fmt,
    sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
    time::Duration,
};

use tokio::time::Instant;

use super::percentile::LatencyPercentile;
use crate::attempt::{RetryBudget, SafeRequests, SaveRules};
use crate::event::event;
use crate::fault::NameCell;
use crate::outcome::LayerKind;
use crate::sync::Mutex;

pub(super) const LAYER: &str = LayerKind::Hedge.as_str();

/// The settings and the counts of one hedge layer.
pub(crate) struct HedgeSettings {
    delay: HedgeDelay,
    /// The layer has built a service with this state.
    in_use: AtomicBool,
    pub(crate) max_replay_bytes: AtomicU64,
    pub(crate) assume_idempotent: AtomicBool,
    pub(crate) max_hedges: AtomicU32,
    budget: Mutex<Option<RetryBudget>>,
    pub(crate) sent: AtomicU64,
    pub(crate) won: AtomicU64,
    /// Hedge attempts that were due and not sent, in the order of [`HedgeDeclineReason::ALL`].
    declined: [AtomicU64; HedgeDeclineReason::ALL.len()],
    pub(crate) name: NameCell,
}

pub(crate) enum HedgeDelay {
    /// No hedge attempt is sent.
    #[cfg(feature = "config")]
    Off,
    Fixed(Duration),
    Percentile(Box<LatencyPercentile>),
}

/// The reason for which a hedge attempt that was due is not sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum HedgeDeclineReason {
    /// The request body is not saved completely.
    Body,
    /// The deadline of the call has passed.
    DeadlinePassed,
    /// The budget is used up.
    BudgetUsedUp,
}

impl HedgeDeclineReason {
    /// All reasons, in the order of their declaration.
    pub(super) const ALL: [Self; 3] = [Self::Body, Self::DeadlinePassed, Self::BudgetUsedUp];

    /// Returns the reason in `snake_case`, as in metrics and events.
    pub(super) const fn as_str(self) -> &'static str {
        match self {
            Self::Body => "body",
            Self::DeadlinePassed => "deadline_passed",
            Self::BudgetUsedUp => "budget_used_up",
        }
    }
}

impl HedgeSettings {
    pub(crate) fn new(delay: HedgeDelay, budget: Option<RetryBudget>) -> Self {
        Self {
            delay,
            in_use: AtomicBool::new(false),
            max_replay_bytes: AtomicU64::new(64 * 1024),
            assume_idempotent: AtomicBool::new(false),
            max_hedges: AtomicU32::new(1),
            budget: Mutex::new(budget),
            sent: AtomicU64::new(0),
            won: AtomicU64::new(0),
            declined: Default::default(),
            name: NameCell::default(),
        }
    }

    /// Returns a copy of the settings with counts and a recorded latency of its own. The budget stays shared.
    pub(crate) fn fork(&self) -> Self {
        let delay = match &self.delay {
            #[cfg(feature = "config")]
            HedgeDelay::Off => HedgeDelay::Off,
            HedgeDelay::Fixed(delay) => HedgeDelay::Fixed(*delay),
            HedgeDelay::Percentile(latency) => HedgeDelay::Percentile(Box::new(latency.fork())),
        };
        Self {
            max_replay_bytes: self.max_replay_bytes.load(Ordering::Relaxed).into(),
            assume_idempotent: self.assume_idempotent.load(Ordering::Relaxed).into(),
            max_hedges: self.max_hedges().into(),
            name: self.name.fork(),
            ..Self::new(delay, self.budget())
        }
    }

    pub(crate) fn is_in_use(&self) -> bool {
        self.in_use.load(Ordering::Relaxed)
    }

    pub(crate) fn set_in_use(&self) {
        self.in_use.store(true, Ordering::Relaxed);
    }

    pub(crate) fn set_budget(&self, budget: Option<RetryBudget>) {
        let before = std::mem::replace(&mut *self.budget.lock(), budget);
        drop(before);
    }

    /// Returns the current delay. `None` if no hedge attempt is sent.
    pub(crate) fn delay(&self) -> Option<Duration> {
        match &self.delay {
            #[cfg(feature = "config")]
            HedgeDelay::Off => None,
            HedgeDelay::Fixed(delay) => Some(*delay),
            HedgeDelay::Percentile(latency) => latency.delay(),
        }
    }

    pub(crate) fn max_hedges(&self) -> u32 {
        self.max_hedges.load(Ordering::Relaxed)
    }

    /// Returns whether the layer records the latency of calls.
    pub(crate) fn records_latency(&self) -> bool {
        matches!(self.delay, HedgeDelay::Percentile(_))
    }

    /// Returns whether every request passes unchanged.
    pub(crate) fn is_off(&self) -> bool {
        #[cfg(feature = "config")]
        return matches!(self.delay, HedgeDelay::Off);
        #[cfg(not(feature = "config"))]
        false
    }

    /// Counts and reports a hedge attempt that was due and is not sent.
    pub(super) fn record_declined(&self, reason: HedgeDeclineReason) {
        self.declined[reason as usize].fetch_add(1, Ordering::Relaxed);
        event!(hedge, DEBUG, LAYER, self.name(), reason = reason.as_str(), "not hedged");
    }

    /// Returns the number of hedge attempts that were due and not sent for this reason.
    pub(super) fn declined(&self, reason: HedgeDeclineReason) -> u64 {
        self.declined[reason as usize].load(Ordering::Relaxed)
    }

    /// Records the latency of a call that has a good response. A call that fails fast is no reason for a shorter delay,
    /// and is not recorded.
    pub(crate) fn record_latency(&self, began: Option<Instant>) {
        if let (HedgeDelay::Percentile(latency), Some(began)) = (&self.delay, began) {
            latency.record(began);
        }
    }

    pub(crate) fn save_rules<'a>(
        &self,
        safe_requests: &'a SafeRequests,
        is_off: bool,
        marks: bool,
    ) -> SaveRules<'a> {
        let max_replay_bytes = self.max_replay_bytes.load(Ordering::Relaxed);
        SaveRules { max_replay_bytes, safe_requests: Some(safe_requests), is_off, marks }
    }

    pub(crate) fn safe_requests(&self) -> SafeRequests {
        if self.assume_idempotent.load(Ordering::Relaxed) {
            SafeRequests::All
        } else {
            SafeRequests::Idempotent
        }
    }

    pub(crate) fn name(&self) -> &str {
        self.name.as_str()
    }

    pub(crate) fn budget(&self) -> Option<RetryBudget> {
        self.budget.lock().clone()
    }
}

impl fmt::Debug for HedgeSettings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HedgeSettings")
            .field("delay", &self.delay())
            .field("budget", &self.budget())
            .finish_non_exhaustive()
    }
}
