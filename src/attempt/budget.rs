use std::{
    fmt,
    sync::{Arc, atomic::Ordering},
};

use super::{
    failure::{FailureKind, PerKind},
    token_bucket::{RETRY, RefillMode, TokenBucket, Withdrawal, in_retries},
};
use crate::error::ConfigError;

const MAX_COST: f64 = 1000.0;

/// A token bucket that bounds retries to a share of the first attempts.
///
/// Each first attempt deposits `ratio` of a retry, and each retry makes a withdrawal of its cost. A small trickle over
/// time permits retries for a service that is rarely called. The balance is capped. In any period, the number of
/// retries is therefore at most `ratio` of the first attempts, plus the trickle, plus the cap.
///
/// Clones share the balance, so that several layers can share a budget.
///
/// The design follows Finagle's `RetryBudget`, with one difference: Finagle's deposits expire after a time. Here the
/// cap bounds the balance of a busy service instead, so a call that succeeds needs no clock read. As in gRPC's retry
/// throttling (gRFC A6), a full balance is not written to.
#[derive(Clone)]
pub struct RetryBudget {
    bucket: Arc<TokenBucket>,
    /// The cost of a retry for each kind of failure. Each clone has its own costs, so set them before you make clones.
    pub(crate) costs: PerKind<u64>,
}

impl RetryBudget {
    /// Returns a budget of `ratio` retries per first attempt: with 0.2, one retry for five first attempts. The ratio
    /// must be above 0 and at most 10.
    ///
    /// The trickle is 1 retry per second and the cap is 100. The balance starts at 10.
    #[must_use]
    pub fn ratio(ratio: f64) -> Self {
        Self::with(ratio, 1, 100)
    }

    /// Returns a budget with its own trickle, in retries per second, and its own cap, the maximum balance: 1 retry or
    /// more. The balance starts with ten seconds of trickle, within the cap.
    #[must_use]
    pub fn with(ratio: f64, per_second: u32, cap: u32) -> Self {
        Self::of(Self::bucket(ratio, per_second, cap))
    }

    pub(crate) fn bucket(ratio: f64, per_second: u32, cap: u32) -> TokenBucket {
        // NaN becomes 0 here, and so does a ratio below half a millionth.
        let refill = (ratio * RETRY as f64).round() as u64;
        let fault = if refill == 0 || ratio > 10.0 {
            let remedy = "use a share above 0 and at most 10, such as 0.2";
            Some(ConfigError::new("budget.ratio", ratio, remedy))
        } else if cap == 0 {
            Some(ConfigError::new("budget.cap", cap, "use 1 or more retries"))
        } else {
            None
        };
        let trickle = u64::from(per_second) * RETRY;
        let mut bucket = TokenBucket::new(refill.min(10 * RETRY), u64::from(cap) * RETRY, trickle);
        bucket.fault = fault;
        bucket
    }

    pub(crate) fn of(bucket: TokenBucket) -> Self {
        Self { bucket: Arc::new(bucket), costs: [RETRY; 8] }
    }

    /// Sets the cost of a retry for this kind of failure: 1 by default, above 0, at most 1000. Use a higher cost for
    /// expensive failures such as timeouts.
    ///
    /// The cost applies to this value and to clones that are made of it. Earlier clones share the balance and keep
    /// their costs.
    #[must_use]
    pub fn cost(mut self, kind: FailureKind, cost: f64) -> Self {
        let cost = if cost <= MAX_COST { cost } else { 0.0 };
        self.costs[kind as usize] = (cost * RETRY as f64).round() as u64;
        self
    }

    // ===== Use =====

    /// Checks the settings of the budget.
    ///
    /// # Errors
    ///
    /// The ratio is not within (0, 10] or is below half a millionth, the cap is zero, or a cost is not within (0,
    /// 1000].
    pub fn check(&self) -> Result<(), ConfigError> {
        if self.costs.contains(&0) {
            let remedy = "use more than 0 and at most 1000, such as 2";
            return Err(ConfigError::new("budget.cost", self.costs.map(in_retries), remedy));
        }
        self.bucket.fault.clone().map_or(Ok(()), Err)
    }

    /// Returns the number of retries of cost 1 that the balance permits now. With [`grpc`](Self::grpc), returns the
    /// number of tokens, the lower half of which permits no retries.
    #[must_use]
    pub fn balance(&self) -> f64 {
        self.bucket.deposit_trickle();
        in_retries(self.bucket.balance.load(Ordering::Relaxed))
    }

    /// Returns the maximum of [`balance`](Self::balance).
    #[cfg(feature = "observe")]
    pub(crate) fn max_balance(&self) -> f64 {
        in_retries(self.bucket.cap)
    }

    /// Returns the number of retries that the budget has denied, in all layers that share it.
    #[must_use]
    pub fn denied(&self) -> u64 {
        self.bucket.denied.load(Ordering::Relaxed)
    }

    /// Deposits the share of one first attempt, or of one good response with [`aws`](Self::aws) and
    /// [`grpc`](Self::grpc). A full balance costs one atomic load.
    #[inline]
    pub fn deposit(&self) {
        self.bucket.deposit(self.bucket.refill);
    }

    /// Withdraws one retry at the cost of 1. Returns `None` if the balance is too low. Dropping the withdrawal refunds
    /// it, unless it is [spent](Withdrawal::spend).
    #[must_use]
    pub fn withdraw(&self) -> Option<Withdrawal> {
        self.bucket.record_failure(RETRY);
        self.bucket.withdraw(RETRY)
    }

    /// Withdraws one retry for this kind of failure, at its [`cost`](Self::cost). Returns `None` if the balance is too
    /// low.
    #[must_use]
    pub fn withdraw_for(&self, kind: FailureKind) -> Option<Withdrawal> {
        self.record_failure(kind);
        self.withdraw_recorded(kind)
    }

    // ===== Use by a layer =====

    /// Makes the deposit for a call that begins, if calls make deposits.
    #[inline]
    pub(crate) fn deposit_for_call(&self) {
        if self.bucket.mode == RefillMode::Calls {
            self.deposit();
        }
    }

    /// Makes the deposit for a good response, if responses make deposits. `last_cost` is the cost of the call's last
    /// retry, or 0.
    #[inline]
    pub(crate) fn deposit_for_response(&self, last_cost: u64) {
        match self.bucket.mode {
            RefillMode::Calls => {}
            RefillMode::Responses if last_cost > 0 => self.bucket.deposit(last_cost),
            RefillMode::Responses | RefillMode::ResponsesLessFailures { .. } => self.deposit(),
        }
    }

    /// Records an attempt that failed with a retryable failure, or with one for which the server forbids a retry.
    pub(crate) fn record_failure(&self, kind: FailureKind) {
        self.bucket.record_failure(self.costs[kind as usize]);
    }

    /// Withdraws a retry for a failure that [`record_failure`](Self::record_failure) has recorded.
    pub(crate) fn withdraw_recorded(&self, kind: FailureKind) -> Option<Withdrawal> {
        self.bucket.withdraw(self.costs[kind as usize])
    }
}

impl Default for RetryBudget {
    /// Returns a budget of one retry for five first attempts.
    fn default() -> Self {
        Self::ratio(0.2)
    }
}

impl fmt::Debug for RetryBudget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RetryBudget")
            .field("balance", &self.balance())
            .field("denied", &self.denied())
            .finish()
    }
}
