use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use super::rules::{FailureKind, PerKind};
use crate::{
    ConfigError,
    call::{Clock, Nanos},
};

const MOST_COST: f64 = 1000.0;

fn in_retries(amount: u64) -> f64 {
    amount as f64 / RETRY as f64
}

/// One retry, in the fixed point that balances are kept in: 60 % is 60 %.
const RETRY: u64 = 1_000_000;

/// How many retries there may be for so many first attempts.
///
/// Every first attempt pays `ratio` of a retry in, every retry takes one out; a small reserve trickles
/// in, so that a service that is called rarely can retry at all. What is saved up is capped. A shared
/// value: clones draw on the same balance, so that several layers can keep one.
///
/// The idea is Finagle's `RetryBudget`; that a full balance is not written to is gRPC's retry
/// throttling (gRFC A6). There deposits are forgotten after a time, here they are worth nothing beyond the cap:
/// that is what a busy service can save up either way, without a clock read and a write for every call that
/// is well. So in any stretch of time there is no more than `ratio` retries per first attempt, the trickle, and
/// the cap.
#[derive(Clone)]
pub struct RetryBudget {
    account: Arc<Account>,
    /// What a retry costs, by what it is for. Each clone's own: set it before handing clones out.
    costs: PerKind<u64>,
}

struct Account {
    deposit: u64,
    cap: u64,
    /// What a second trickles in.
    trickle: u64,
    balance: AtomicU64,
    /// Until when the trickle has been paid in.
    paid_until: AtomicU64,
    denied: AtomicU64,
    clock: Clock,
    fault: Option<ConfigError>,
}

impl RetryBudget {
    /// So many retries per first attempt: 0.2 is one for five. Above 0, at most 10.
    ///
    /// The reserve trickles at 1 per second, up to the cap of 100, and starts with 10.
    #[must_use]
    pub fn ratio(ratio: f64) -> Self {
        Self::with(ratio, 1, 100)
    }

    /// The same with its own trickle, in retries per second, and its own cap: the most retries that can
    /// be saved up, 1 or more. It starts with ten seconds of trickle.
    #[must_use]
    pub fn with(ratio: f64, per_second: u32, cap: u32) -> Self {
        // A ratio that is no number becomes 0 here; one below half a millionth does, too.
        let deposit = (ratio * RETRY as f64).round() as u64;
        let fault = if deposit == 0 || ratio > 10.0 {
            let remedy = "use a share above 0 and at most 10, such as 0.2";
            Some(ConfigError::new("budget.ratio", ratio, remedy))
        } else if cap == 0 {
            Some(ConfigError::new("budget.cap", cap, "use 1 or more retries"))
        } else {
            None
        };
        let trickle = u64::from(per_second) * RETRY;
        let cap = u64::from(cap) * RETRY;
        let account = Account {
            deposit: deposit.min(10 * RETRY),
            cap,
            trickle,
            balance: AtomicU64::new((trickle * 10).min(cap)),
            paid_until: AtomicU64::new(0),
            denied: AtomicU64::new(0),
            clock: Clock::new(),
            fault,
        };
        Self { account: Arc::new(account), costs: [RETRY; 8] }
    }

    /// What a retry for this kind of failure takes out, instead of 1: more for what hurts, such as timeouts, less
    /// for what is cheap. Above 0, at most 1000.
    ///
    /// For clones made of this value: the balance is shared with earlier ones, their costs are not.
    #[must_use]
    pub fn cost(mut self, kind: FailureKind, cost: f64) -> Self {
        let cost = if cost <= MOST_COST { cost } else { 0.0 };
        self.costs[kind as usize] = (cost * RETRY as f64).round() as u64;
        self
    }

    // ===== What others allow =====

    /// AWS SDKs, retry behaviour 2.1: a bucket of 500, full at first; a retry costs 14, one for what was
    /// throttled 5; a call pays in 1. Theirs pays in when a call succeeds, and gives a successful retry's cost
    /// back: this one is a little stricter.
    #[must_use]
    pub fn aws() -> Self {
        let mut budget = Self::bucket(1.0, 500);
        budget.costs = [14 * RETRY; 8];
        budget.cost(FailureKind::Throttled, 5.0)
    }

    /// gRPC's retry throttling (gRFC A6): a bucket of `max_tokens`, of which only the upper half can be used; a
    /// retry costs 1, a call pays in `token_ratio`. Theirs charges the first failure of a call too.
    #[must_use]
    pub fn grpc(max_tokens: u32, token_ratio: f64) -> Self {
        Self::bucket(token_ratio, max_tokens / 2)
    }

    /// Finagle's default: a fifth, and 10 per second, saved up for 10 s.
    #[must_use]
    pub fn finagle() -> Self {
        Self::with(0.2, 10, 100)
    }

    /// Full at first; nothing trickles in.
    fn bucket(deposit: f64, cap: u32) -> Self {
        let budget = Self::with(deposit, 0, cap);
        budget.account.balance.store(budget.account.cap, Ordering::Relaxed);
        budget
    }

    // ===== Using it =====

    /// Whether it can work.
    ///
    /// # Errors
    ///
    /// A ratio that is not within (0, 10] or too small to count (below a millionth), a cap of zero, or a cost
    /// that is not within (0, 1000].
    pub fn check(&self) -> Result<(), ConfigError> {
        if self.costs.contains(&0) {
            let remedy = "use more than 0 and at most 1000, such as 2";
            return Err(ConfigError::new("budget.cost", self.costs.map(in_retries), remedy));
        }
        self.account.fault.clone().map_or(Ok(()), Err)
    }

    /// How many retries could be made now, if each costs 1.
    #[must_use]
    pub fn balance(&self) -> f64 {
        self.account.trickle_in();
        in_retries(self.account.balance.load(Ordering::Relaxed))
    }

    /// How many retries were denied.
    #[must_use]
    pub fn denied(&self) -> u64 {
        self.account.denied.load(Ordering::Relaxed)
    }

    /// A first attempt is made. One load when the balance is full.
    #[inline]
    pub fn deposit(&self) {
        self.account.pay_in(self.account.deposit);
    }

    /// Takes out one retry at the cost of 1, if there is one. Dropping the withdrawal unspent pays it back.
    #[must_use]
    pub fn withdraw(&self) -> Option<Withdrawal> {
        self.take(RETRY)
    }

    /// Takes out one retry for this kind of failure, at its [`cost`](Self::cost).
    #[must_use]
    pub fn withdraw_for(&self, kind: FailureKind) -> Option<Withdrawal> {
        self.take(self.costs[kind as usize])
    }

    fn take(&self, amount: u64) -> Option<Withdrawal> {
        self.account.trickle_in();
        let taken =
            self.account.balance.fetch_update(Ordering::AcqRel, Ordering::Relaxed, |balance| {
                balance.checked_sub(amount)
            });
        if taken.is_err() {
            self.account.denied.fetch_add(1, Ordering::Relaxed);
            return None;
        }
        Some(Withdrawal(Some((self.account.clone(), amount))))
    }
}

impl Account {
    #[inline]
    fn pay_in(&self, amount: u64) {
        if self.balance.load(Ordering::Relaxed) < self.cap {
            let _ = self.balance.fetch_update(Ordering::AcqRel, Ordering::Relaxed, |balance| {
                Some((balance + amount).min(self.cap))
            });
        }
    }

    /// Pays in what has trickled since the last time: each stretch of time once, whoever comes first.
    fn trickle_in(&self) {
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

impl Default for RetryBudget {
    /// One retry for five first attempts.
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

/// A retry taken out of a [`RetryBudget`]. Dropped without [`spend`](Self::spend), it is paid back.
#[must_use = "dropping it pays it back"]
pub struct Withdrawal(Option<(Arc<Account>, u64)>);

impl Withdrawal {
    /// The retry is being made.
    pub fn spend(mut self) {
        self.0 = None;
    }
}

impl Drop for Withdrawal {
    fn drop(&mut self) {
        if let Some((account, amount)) = self.0.take() {
            account.pay_in(amount);
        }
    }
}

impl fmt::Debug for Withdrawal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let amount = self.0.as_ref().map(|(_, amount)| in_retries(*amount));
        f.debug_tuple("Withdrawal").field(&amount).finish()
    }
}
