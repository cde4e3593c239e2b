//! The balance of a retry budget: a token bucket without a lock.
//!
//! Amounts are integers in millionths of a retry ([`RETRY`]). The invariant is `balance <= cap`. Each change of the
//! balance is one atomic read-modify-write operation, so that concurrent deposits and withdrawals are not lost, and a
//! withdrawal never makes the balance negative.
//!
//! `deposit` first loads the balance and skips the write if it is full. The load may be stale: the deposit is then lost
//! although another thread has made a withdrawal meanwhile. This makes the budget slightly stricter, never looser.
//!
//! The trickle is deposited on demand, by `deposit_trickle`. `trickled_until` is the instant up to which it has been
//! deposited. The compare-exchange on it decides which thread deposits the trickle of a period, so that each period is
//! deposited once.
//!
//! The atomics publish no other memory, so correctness depends on no pairing of their orderings. `Relaxed` would
//! suffice where the code has `Acquire` and `Release`.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use crate::{
    error::ConfigError,
    time::{Clock, Nanos},
};

/// One retry in the unit of a balance. With this fixed point, a ratio such as 0.6 is exact.
pub(crate) const RETRY: u64 = 1_000_000;

pub(crate) fn in_retries(amount: u64) -> f64 {
    amount as f64 / RETRY as f64
}

pub(crate) struct TokenBucket {
    pub(crate) refill: u64,
    pub(crate) cap: u64,
    /// The amount that is deposited per second.
    pub(crate) trickle: u64,
    pub(crate) mode: RefillMode,
    pub(crate) balance: AtomicU64,
    /// The time up to which the trickle has been deposited.
    trickled_until: AtomicU64,
    pub(crate) denied: AtomicU64,
    clock: Clock,
    pub(crate) fault: Option<ConfigError>,
}

/// The events that make deposits and withdrawals.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RefillMode {
    /// Each call makes a deposit when it begins. A retry withdraws its cost.
    Calls,
    /// Each good response makes a deposit. A retry withdraws its cost, and a good response refunds the cost of the
    /// call's last retry.
    Responses,
    /// Each good response makes a deposit, and each failure withdraws its cost, down to zero. Retries withdraw nothing.
    /// They are permitted while the balance is above `floor`.
    ResponsesLessFailures { floor: u64 },
}

impl TokenBucket {
    pub(crate) fn new(refill: u64, cap: u64, trickle: u64) -> Self {
        Self {
            refill,
            cap,
            trickle,
            mode: RefillMode::Calls,
            balance: AtomicU64::new((trickle * 10).min(cap)),
            trickled_until: AtomicU64::new(0),
            denied: AtomicU64::new(0),
            clock: Clock::new(),
            fault: None,
        }
    }

    /// Makes the bucket start with a full balance.
    pub(crate) fn filled(mut self, mode: RefillMode) -> Self {
        self.balance = AtomicU64::new(self.cap);
        self.mode = mode;
        self
    }

    /// Deposits an amount. A full balance costs one load.
    #[inline]
    pub(crate) fn deposit(&self, amount: u64) {
        if self.balance.load(Ordering::Relaxed) < self.cap {
            self.add(amount);
        }
    }

    fn add(&self, amount: u64) {
        let _ = self.balance.fetch_update(Ordering::AcqRel, Ordering::Relaxed, |balance| {
            Some((balance + amount).min(self.cap))
        });
    }

    /// Withdraws the cost of a failure, if failures make withdrawals.
    pub(crate) fn record_failure(&self, cost: u64) {
        if matches!(self.mode, RefillMode::ResponsesLessFailures { .. }) {
            let _ = self.balance.fetch_update(Ordering::AcqRel, Ordering::Relaxed, |balance| {
                Some(balance.saturating_sub(cost))
            });
        }
    }

    /// Withdraws a retry of this cost. Returns `None` and counts a denial if the balance is too low.
    pub(crate) fn withdraw(self: &Arc<Self>, cost: u64) -> Option<Withdrawal> {
        self.deposit_trickle();
        let withdrawn = match self.mode {
            RefillMode::ResponsesLessFailures { floor } => {
                (self.balance.load(Ordering::Acquire) > floor).then_some(0)
            }
            RefillMode::Calls | RefillMode::Responses => self
                .balance
                .fetch_update(Ordering::AcqRel, Ordering::Relaxed, |balance| {
                    balance.checked_sub(cost)
                })
                .is_ok()
                .then_some(cost),
        };
        if withdrawn.is_none() {
            self.denied.fetch_add(1, Ordering::Relaxed);
        }
        withdrawn.map(|amount| Withdrawal(Some((self.clone(), amount))))
    }

    /// Deposits the trickle since the last deposit.
    pub(crate) fn deposit_trickle(&self) {
        const SECOND: u128 = Duration::from_secs(1).as_nanos();
        if self.trickle == 0 {
            return;
        }
        let now = self.clock.now();
        let before = self.trickled_until.load(Ordering::Acquire);
        let passed = u128::from(now.saturating_sub(before));
        let amount = passed * u128::from(self.trickle) / SECOND;
        if amount == 0 {
            return;
        }
        // Advance `trickled_until` only by the time that the deposited amount represents. The rest, worth less than one
        // unit, counts for the next deposit. Otherwise frequent calls would each discard a rest, and the trickle would
        // stop.
        let time = (amount * SECOND).div_ceil(u128::from(self.trickle));
        let until = before.saturating_add(Nanos::try_from(time).unwrap_or(Nanos::MAX));
        let exchanged = self.trickled_until.compare_exchange(
            before,
            until,
            Ordering::AcqRel,
            Ordering::Relaxed,
        );
        if exchanged.is_ok() {
            self.deposit(u64::try_from(amount).unwrap_or(u64::MAX).min(self.cap));
        }
    }
}

/// A retry that was withdrawn from a [`RetryBudget`](super::budget::RetryBudget). Dropping it without
/// [`spend`](Self::spend) refunds it.
#[must_use = "the withdrawal is refunded when this is dropped"]
pub struct Withdrawal(Option<(Arc<TokenBucket>, u64)>);

impl Withdrawal {
    /// Spends the withdrawal, because the retry is made.
    pub fn spend(mut self) {
        self.spend_amount();
    }

    /// Spends the withdrawal. Returns the amount.
    pub(crate) fn spend_amount(&mut self) -> u64 {
        self.0.take().map_or(0, |(_, amount)| amount)
    }
}

impl Drop for Withdrawal {
    fn drop(&mut self) {
        if let Some((bucket, amount)) = self.0.take() {
            bucket.deposit(amount);
        }
    }
}

impl std::fmt::Debug for Withdrawal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let amount = self.0.as_ref().map(|(_, amount)| in_retries(*amount));
        f.debug_tuple("Withdrawal").field(&amount).finish()
    }
}
