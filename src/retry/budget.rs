use std::{
    fmt,
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
const RETRY: u64 = 1_000_000;

/// How many retries there may be for so many first attempts.
///
/// Every first attempt pays `ratio` of a retry in, every retry takes one out; a small reserve trickles
/// in, so that a service that is called rarely can retry at all. What is saved up is capped. A shared
/// value: clones draw on the same balance, so that several layers can keep one.
///
/// The idea is Finagle's `RetryBudget`; that a full balance is not written to is gRPC's retry
/// throttling (gRFC A6).
#[derive(Clone)]
pub struct RetryBudget(Arc<Account>);

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
        Self(Arc::new(Account {
            deposit: deposit.min(10 * RETRY),
            cap,
            trickle,
            balance: AtomicU64::new((trickle * 10).min(cap)),
            paid_until: AtomicU64::new(0),
            denied: AtomicU64::new(0),
            clock: Clock::new(),
            fault,
        }))
    }

    /// Whether it can work.
    ///
    /// # Errors
    ///
    /// A ratio that is not within (0, 10] or too small to count (below a millionth), or a cap of zero.
    pub fn check(&self) -> Result<(), ConfigError> {
        self.0.fault.clone().map_or(Ok(()), Err)
    }

    /// How many retries could be made now.
    #[must_use]
    pub fn balance(&self) -> f64 {
        self.0.trickle_in();
        self.0.balance.load(Ordering::Relaxed) as f64 / RETRY as f64
    }

    /// How many retries were denied.
    #[must_use]
    pub fn denied(&self) -> u64 {
        self.0.denied.load(Ordering::Relaxed)
    }

    /// A first attempt is made. One load when the balance is full.
    #[inline]
    pub fn deposit(&self) {
        self.0.pay_in(self.0.deposit);
    }

    /// Takes out one retry, if there is one. Dropping the withdrawal unspent pays it back.
    #[must_use]
    pub fn withdraw(&self) -> Option<Withdrawal> {
        self.0.trickle_in();
        let taken = self.0.balance.fetch_update(Ordering::AcqRel, Ordering::Relaxed, |balance| {
            balance.checked_sub(RETRY)
        });
        if taken.is_err() {
            self.0.denied.fetch_add(1, Ordering::Relaxed);
            return None;
        }
        Some(Withdrawal(Some(self.clone())))
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
#[derive(Debug)]
#[must_use = "dropping it pays it back"]
pub struct Withdrawal(Option<RetryBudget>);

impl Withdrawal {
    /// The retry is being made.
    pub fn spend(mut self) {
        self.0 = None;
    }
}

impl Drop for Withdrawal {
    fn drop(&mut self) {
        if let Some(budget) = self.0.take() {
            budget.0.pay_in(RETRY);
        }
    }
}
