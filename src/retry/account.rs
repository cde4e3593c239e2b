//! The balance behind a budget: fixed point, and no lock.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use crate::{
    ConfigError,
    call::{Clock, Nanos},
};

/// One retry, in the fixed point that balances are kept in: 60 % is 60 %.
pub(super) const RETRY: u64 = 1_000_000;

pub(super) fn in_retries(amount: u64) -> f64 {
    amount as f64 / RETRY as f64
}

pub(super) struct Account {
    pub(super) deposit: u64,
    pub(super) cap: u64,
    /// What a second trickles in.
    pub(super) trickle: u64,
    pub(super) pays: Pays,
    pub(super) balance: AtomicU64,
    /// Until when the trickle has been paid in.
    paid_until: AtomicU64,
    pub(super) denied: AtomicU64,
    clock: Clock,
    pub(super) fault: Option<ConfigError>,
}

/// What pays in, and what is taken out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pays {
    /// Each call, as it begins; a retry takes its cost out.
    Calls,
    /// Each good answer; a retry takes its cost out, and the last one of a call gets it back with a good answer.
    Answers,
    /// Each good answer; each failure takes its cost out, down to nothing, and retries are made while there is
    /// more than this left.
    AnswersOverFailures { floor: u64 },
}

impl Account {
    pub(super) fn new(deposit: u64, cap: u64, trickle: u64) -> Self {
        Self {
            deposit,
            cap,
            trickle,
            pays: Pays::Calls,
            balance: AtomicU64::new((trickle * 10).min(cap)),
            paid_until: AtomicU64::new(0),
            denied: AtomicU64::new(0),
            clock: Clock::new(),
            fault: None,
        }
    }

    /// Full, and nothing trickles in.
    pub(super) fn full(mut self, pays: Pays) -> Self {
        self.balance = AtomicU64::new(self.cap);
        self.pays = pays;
        self
    }

    /// One load when it is full.
    #[inline]
    pub(super) fn pay_in(&self, amount: u64) {
        if self.balance.load(Ordering::Relaxed) < self.cap {
            self.add(amount);
        }
    }

    fn add(&self, amount: u64) {
        let _ = self.balance.fetch_update(Ordering::AcqRel, Ordering::Relaxed, |balance| {
            Some((balance + amount).min(self.cap))
        });
    }

    /// A failure, where failures are what is charged.
    pub(super) fn failed(&self, cost: u64) {
        if matches!(self.pays, Pays::AnswersOverFailures { .. }) {
            let _ = self.balance.fetch_update(Ordering::AcqRel, Ordering::Relaxed, |balance| {
                Some(balance.saturating_sub(cost))
            });
        }
    }

    /// A retry that costs so much: what was taken out for it.
    pub(super) fn grant(self: &Arc<Self>, cost: u64) -> Option<Withdrawal> {
        self.trickle_in();
        let granted = match self.pays {
            Pays::AnswersOverFailures { floor } => {
                (self.balance.load(Ordering::Acquire) > floor).then_some(0)
            }
            Pays::Calls | Pays::Answers => self
                .balance
                .fetch_update(Ordering::AcqRel, Ordering::Relaxed, |balance| {
                    balance.checked_sub(cost)
                })
                .is_ok()
                .then_some(cost),
        };
        if granted.is_none() {
            self.denied.fetch_add(1, Ordering::Relaxed);
        }
        granted.map(|amount| Withdrawal(Some((self.clone(), amount))))
    }

    /// Pays in what has trickled since the last time: each stretch of time once, whoever comes first.
    pub(super) fn trickle_in(&self) {
        const SECOND: u128 = Duration::from_secs(1).as_nanos();
        if self.trickle == 0 {
            return;
        }
        let now = self.clock.now();
        let before = self.paid_until.load(Ordering::Acquire);
        let passed = u128::from(now.saturating_sub(before));
        let amount = passed * u128::from(self.trickle) / SECOND;
        if amount == 0 {
            return;
        }
        // Only the time that is paid for is over: what is less than a unit waits for more, or many
        // questions in a short time would dry the trickle up.
        let paid = (amount * SECOND).div_ceil(u128::from(self.trickle));
        let until = before.saturating_add(Nanos::try_from(paid).unwrap_or(Nanos::MAX));
        let exchanged =
            self.paid_until.compare_exchange(before, until, Ordering::AcqRel, Ordering::Relaxed);
        if exchanged.is_ok() {
            self.pay_in(u64::try_from(amount).unwrap_or(u64::MAX).min(self.cap));
        }
    }
}

/// A retry taken out of a [`RetryBudget`](super::RetryBudget). Dropped without [`spend`](Self::spend), it is paid
/// back.
#[must_use = "dropping it pays it back"]
pub struct Withdrawal(Option<(Arc<Account>, u64)>);

impl Withdrawal {
    /// The retry is being made.
    pub fn spend(mut self) {
        self.take();
    }

    /// The retry is being made: what it has cost.
    pub(super) fn take(&mut self) -> u64 {
        self.0.take().map_or(0, |(_, amount)| amount)
    }
}

impl Drop for Withdrawal {
    fn drop(&mut self) {
        if let Some((account, amount)) = self.0.take() {
            account.pay_in(amount);
        }
    }
}

impl std::fmt::Debug for Withdrawal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let amount = self.0.as_ref().map(|(_, amount)| in_retries(*amount));
        f.debug_tuple("Withdrawal").field(&amount).finish()
    }
}
