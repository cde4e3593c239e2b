use std::{
    fmt,
    sync::{Arc, atomic::Ordering},
};

use super::{
    failure::{FailureKind, PerKind},
    token_bucket::{Account, Pays, RETRY, Withdrawal, in_retries},
};
use crate::error::ConfigError;

const MOST_COST: f64 = 1000.0;

/// A token bucket that bounds retries to a share of the first attempts.
///
/// Each first attempt deposits `ratio` of a retry, and each retry makes a withdrawal of its cost. A small trickle over
/// time permits retries for a service that is rarely called. The balance is capped. Within any time, the number of
/// retries is therefore at most `ratio` of the first attempts, plus the trickle, plus the cap.
///
/// Clones share the balance, so that several layers can share a budget.
///
/// The design follows Finagle's `RetryBudget`, with one difference: Finagle's deposits expire, while these have no
/// effect beyond the cap. This bounds the savings of a busy service as well, and a call that succeeds needs no clock
/// read. As in gRPC's retry throttling (gRFC A6), a full balance is not written to.
#[derive(Clone)]
pub struct RetryBudget {
    account: Arc<Account>,
    /// The cost of a retry for each kind of failure. Each clone has its own costs, so set them before you make clones.
    costs: PerKind<u64>,
}

impl RetryBudget {
    /// Returns a budget of `ratio` retries per first attempt: with 0.2, one retry for five first attempts. Above 0, at
    /// most 10.
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
        Self::of(Self::account(ratio, per_second, cap))
    }

    fn account(ratio: f64, per_second: u32, cap: u32) -> Account {
        // NaN becomes 0 here, and so does a ratio below half a millionth.
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
        let mut account = Account::new(deposit.min(10 * RETRY), u64::from(cap) * RETRY, trickle);
        account.fault = fault;
        account
    }

    fn of(account: Account) -> Self {
        Self { account: Arc::new(account), costs: [RETRY; 8] }
    }

    /// Sets the cost of a retry for this kind of failure: 1 by default, above 0, at most 1000. Use a higher cost for
    /// expensive failures such as timeouts.
    ///
    /// The cost applies to this value and to clones that are made of it. Earlier clones share the balance and keep
    /// their costs.
    #[must_use]
    pub fn cost(mut self, kind: FailureKind, cost: f64) -> Self {
        let cost = if cost <= MOST_COST { cost } else { 0.0 };
        self.costs[kind as usize] = (cost * RETRY as f64).round() as u64;
        self
    }

    // ===== Budgets of other implementations =====

    /// Returns the budget of the AWS SDKs, retry behaviour 2.1: a bucket of 500 that starts full.
    ///
    /// A retry costs 14, or 5 after a throttled call. A good response deposits the cost of the call's last retry, or 1
    /// if there was none.
    #[must_use]
    pub fn aws() -> Self {
        let mut budget = Self::of(Self::account(1.0, 0, 500).full(Pays::Answers));
        budget.costs = [14 * RETRY; 8];
        budget.cost(FailureKind::Throttled, 5.0)
    }

    /// Returns the budget of gRPC's retry throttling (gRFC A6): a bucket of `max_tokens` that starts full, at most
    /// 1000.
    ///
    /// Each retryable failure withdraws 1 token, whether it is retried or not. Each good response deposits
    /// `token_ratio`, in whole thousandths. Retries are made while more than half of the tokens are left.
    #[must_use]
    pub fn grpc(max_tokens: u32, token_ratio: f64) -> Self {
        // In binary, 0.57 is slightly less than 570 thousandths. The small addend prevents a result of 569.
        let ratio = (token_ratio * 1000.0 + 1e-6).floor() / 1000.0;
        let mut account = Self::account(ratio, 0, max_tokens);
        if max_tokens > 1000 {
            let fault = ConfigError::new("budget.cap", max_tokens, "use at most 1000 tokens");
            account.fault.get_or_insert(fault);
        }
        let floor = account.cap / 2;
        Self::of(account.full(Pays::AnswersOverFailures { floor }))
    }

    /// Returns Finagle's default budget: one retry for five first attempts, a trickle of 10 per second, and a cap of
    /// 100.
    #[must_use]
    pub fn finagle() -> Self {
        Self::with(0.2, 10, 100)
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
        self.account.fault.clone().map_or(Ok(()), Err)
    }

    /// Returns the number of retries of cost 1 that the balance permits now. With [`grpc`](Self::grpc), returns the
    /// number of tokens, the lower half of which permits no retries.
    #[must_use]
    pub fn balance(&self) -> f64 {
        self.account.trickle_in();
        in_retries(self.account.balance.load(Ordering::Relaxed))
    }

    /// Returns the number of retries that the budget has denied, in all layers that share it.
    #[must_use]
    pub fn denied(&self) -> u64 {
        self.account.denied.load(Ordering::Relaxed)
    }

    /// Deposits the share of one first attempt, or of one good response with [`aws`](Self::aws) and
    /// [`grpc`](Self::grpc). A full balance costs one atomic load.
    #[inline]
    pub fn deposit(&self) {
        self.account.pay_in(self.account.deposit);
    }

    /// Withdraws one retry at the cost of 1. Returns `None` if the balance is too low. Dropping the withdrawal refunds
    /// it, unless it is [spent](Withdrawal::spend).
    #[must_use]
    pub fn withdraw(&self) -> Option<Withdrawal> {
        self.account.failed(RETRY);
        self.account.grant(RETRY)
    }

    /// Withdraws one retry for this kind of failure, at its [`cost`](Self::cost). Returns `None` if the balance is too
    /// low.
    #[must_use]
    pub fn withdraw_for(&self, kind: FailureKind) -> Option<Withdrawal> {
        self.failed(kind);
        self.grant(kind)
    }

    // ===== Use by a layer =====

    /// Makes the deposit for a call that begins, if calls make deposits.
    #[inline]
    pub(crate) fn begun(&self) {
        if self.account.pays == Pays::Calls {
            self.deposit();
        }
    }

    /// Makes the deposit for a good response, if responses make deposits. `last` is the cost of the call's last retry,
    /// or 0.
    #[inline]
    pub(crate) fn answered(&self, last: u64) {
        match self.account.pays {
            Pays::Calls => {}
            Pays::Answers if last > 0 => self.account.pay_in(last),
            Pays::Answers | Pays::AnswersOverFailures { .. } => self.deposit(),
        }
    }

    /// Records an attempt that failed with a retryable failure, or with one for which the server forbids a retry.
    pub(crate) fn failed(&self, kind: FailureKind) {
        self.account.failed(self.costs[kind as usize]);
    }

    /// Withdraws a retry for a failure that [`failed`](Self::failed) has recorded.
    pub(crate) fn grant(&self, kind: FailureKind) -> Option<Withdrawal> {
        self.account.grant(self.costs[kind as usize])
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
