//! The state that a retry layer shares between all its services.

use std::{
    fmt, mem,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
    },
    time::Duration,
};

use super::{counters::RetryCounters, policy::RetryPolicy};
use crate::attempt::{GiveUpReason, RetryBudget, SaveRules};
use crate::{
    error::ConfigError,
    fault::{Fault, NameCell},
    sync::Mutex,
};

/// The maximum number of transparent retries that a layer makes without a response in between.
const MAX_TRANSPARENT_BALANCE: u32 = 200;

/// The number of transparent retries that each response adds to the balance.
const TRANSPARENT_PER_RESPONSE: u32 = 5;

/// The settings and the counts of one retry layer.
pub(crate) struct RetrySettings {
    pub(crate) name: NameCell,
    /// The layer has built a service with this state.
    in_use: AtomicBool,
    /// The maximum size of a saved request body. Separate from the policy, because every call reads it. The policy is
    /// read only after an attempt that did not plainly succeed.
    max_replay_bytes: AtomicU64,
    /// The timeout of an attempt in milliseconds. 0 is none.
    attempt_timeout_ms: AtomicU64,
    policy: Mutex<Arc<RetryPolicy>>,
    /// Whether the policy has rules of the user. These rules apply to every response, also to a success. It is changed
    /// under the lock of the policy, and read without the lock by every call.
    has_overrides: AtomicBool,
    /// See [`contradiction`](Self::contradiction).
    contradiction: OnceLock<Fault>,
    budget: Mutex<Option<RetryBudget>>,
    /// The number of transparent retries that the layer may make until the next response.
    transparent_balance: AtomicU32,
    pub(super) counters: RetryCounters,
}

impl RetrySettings {
    pub(crate) fn new() -> Self {
        Self::with(RetryPolicy::new().into(), Some(RetryBudget::default()))
    }

    fn with(policy: Arc<RetryPolicy>, budget: Option<RetryBudget>) -> Self {
        Self {
            name: NameCell::default(),
            in_use: AtomicBool::new(false),
            max_replay_bytes: AtomicU64::new(64 * 1024),
            attempt_timeout_ms: AtomicU64::new(0),
            has_overrides: AtomicBool::new(!policy.overrides.is_empty()),
            policy: Mutex::new(policy),
            contradiction: OnceLock::new(),
            budget: Mutex::new(budget),
            transparent_balance: AtomicU32::new(MAX_TRANSPARENT_BALANCE),
            counters: RetryCounters::new(),
        }
    }

    /// Returns a copy of the settings with counts of its own. The budget stays shared.
    pub(crate) fn fork(&self) -> Self {
        let fork = Self { name: self.name.fork(), ..Self::with(self.policy(), self.budget()) };
        fork.max_replay_bytes
            .store(self.max_replay_bytes.load(Ordering::Relaxed), Ordering::Relaxed);
        fork.set_attempt_timeout(self.attempt_timeout());
        fork
    }

    pub(crate) fn is_in_use(&self) -> bool {
        self.in_use.load(Ordering::Relaxed)
    }

    pub(crate) fn set_in_use(&self) {
        self.in_use.store(true, Ordering::Relaxed);
    }

    /// Changes settings of which some combinations contradict each other. Keeps the settings if the new ones would.
    pub(crate) fn try_set(&self, set: impl FnOnce(&mut RetryPolicy)) -> Result<(), ConfigError> {
        self.change(set, RetryPolicy::check)
    }

    /// Changes settings while the layer is built. A later setter may resolve a contradiction, so `checked` and the first
    /// service report it.
    pub(crate) fn set_unchecked(&self, set: impl FnOnce(&mut RetryPolicy)) {
        let _ = self.change(set, |_| Ok(()));
    }

    fn change(
        &self,
        set: impl FnOnce(&mut RetryPolicy),
        check: impl FnOnce(&RetryPolicy) -> Result<(), ConfigError>,
    ) -> Result<(), ConfigError> {
        let mut policy = self.policy.lock();
        let mut changed = policy.clone();
        set(Arc::make_mut(&mut changed));
        let checked = check(&changed);
        if checked.is_ok() {
            self.has_overrides.store(!changed.overrides.is_empty(), Ordering::Relaxed);
            mem::swap(&mut *policy, &mut changed);
        }
        // A closure that `set` replaces is dropped with the other policy, without the lock.
        drop(policy);
        drop(changed);
        checked
    }

    /// Returns the contradiction in the settings, if there is one now. All services share its report.
    pub(crate) fn contradiction(&self) -> Option<&Fault> {
        let error = self.policy().check().err()?;
        Some(self.contradiction.get_or_init(|| Some(error).into()))
    }

    #[inline]
    pub(crate) fn has_overrides(&self) -> bool {
        self.has_overrides.load(Ordering::Relaxed)
    }

    pub(crate) fn policy(&self) -> Arc<RetryPolicy> {
        self.policy.lock().clone()
    }

    pub(crate) fn set_max_replay_bytes(&self, bytes: u64) {
        self.max_replay_bytes.store(bytes, Ordering::Relaxed);
    }

    pub(crate) fn set_attempt_timeout(&self, time: Option<Duration>) {
        let ms = time.map(|time| u64::try_from(time.as_millis()).unwrap_or(u64::MAX).max(1));
        self.attempt_timeout_ms.store(ms.unwrap_or(0), Ordering::Relaxed);
    }

    pub(crate) fn attempt_timeout(&self) -> Option<Duration> {
        match self.attempt_timeout_ms.load(Ordering::Relaxed) {
            0 => None,
            ms => Some(Duration::from_millis(ms)),
        }
    }

    pub(crate) fn set_budget(&self, budget: Option<RetryBudget>) {
        let before = mem::replace(&mut *self.budget.lock(), budget);
        drop(before);
    }

    pub(crate) fn budget(&self) -> Option<RetryBudget> {
        self.budget.lock().clone()
    }

    #[inline]
    pub(crate) fn save_rules(&self, is_off: bool, marks: bool) -> SaveRules<'static> {
        SaveRules {
            max_replay_bytes: self.max_replay_bytes.load(Ordering::Relaxed),
            safe_requests: None,
            is_off,
            marks,
        }
    }

    /// Deposits transparent retries for a response. This is one load if the balance is at its maximum.
    #[inline]
    pub(crate) fn deposit_transparent(&self) {
        if self.transparent_balance.load(Ordering::Relaxed) < MAX_TRANSPARENT_BALANCE {
            self.add_transparent(TRANSPARENT_PER_RESPONSE);
        }
    }

    /// Withdraws one transparent retry. Returns `false` if none is left.
    pub(crate) fn withdraw_transparent(&self) -> bool {
        let one_less = |balance: u32| balance.checked_sub(1);
        self.transparent_balance
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_less)
            .is_ok()
    }

    /// Refunds a transparent retry that was withdrawn and is not made.
    pub(crate) fn refund_transparent(&self) {
        self.add_transparent(1);
    }

    #[cold]
    fn add_transparent(&self, retries: u32) {
        let more = |balance: u32| Some((balance + retries).min(MAX_TRANSPARENT_BALANCE));
        let _ = self.transparent_balance.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more);
    }

    /// Records the end of a call whose first attempt is not retryable.
    pub(super) fn record_end_of_first(&self, is_error: bool) {
        if is_error {
            self.counters.record_give_up(GiveUpReason::NotRetryable);
        }
    }

    /// Returns the numbers of retries made, calls given up, and retries that the budget denied.
    pub(crate) fn counts(&self) -> [u64; 3] {
        let give_ups = self.counters.give_ups();
        let is_counted = |reason: &GiveUpReason| {
            !matches!(reason, GiveUpReason::Responded | GiveUpReason::NotRetryable)
        };
        let counted =
            GiveUpReason::ALL.iter().zip(give_ups).filter(|(reason, _)| is_counted(reason));
        let gave_up = counted.map(|(_, count)| count).sum();
        let denied = give_ups[GiveUpReason::BudgetUsedUp as usize];
        [self.counters.retries().iter().sum(), gave_up, denied]
    }
}

impl fmt::Debug for RetrySettings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RetrySettings")
            .field("policy", &self.policy())
            .field("budget", &self.budget())
            .finish_non_exhaustive()
    }
}
