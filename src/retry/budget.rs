use std::{
    fmt,
    sync::{Arc, atomic::Ordering},
};

use super::{
    account::{Account, Pays, RETRY, Withdrawal, in_retries},
    rules::{FailureKind, PerKind},
};
use crate::ConfigError;

const MOST_COST: f64 = 1000.0;

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
        Self::of(Self::account(ratio, per_second, cap))
    }

    fn account(ratio: f64, per_second: u32, cap: u32) -> Account {
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
        let mut account = Account::new(deposit.min(10 * RETRY), u64::from(cap) * RETRY, trickle);
        account.fault = fault;
        account
    }

    fn of(account: Account) -> Self {
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

    /// AWS SDKs, retry behaviour 2.1: a bucket of 500, full at first. A retry costs 14, one for what was
    /// throttled 5; a good answer pays in what the call's last retry has cost, or 1 where there was none.
    #[must_use]
    pub fn aws() -> Self {
        let mut budget = Self::of(Self::account(1.0, 0, 500).full(Pays::Answers));
        budget.costs = [14 * RETRY; 8];
        budget.cost(FailureKind::Throttled, 5.0)
    }

    /// gRPC's retry throttling (gRFC A6): a bucket of `max_tokens`, full at first. Each failure that is one to
    /// retry takes 1 out, retried or not, each good answer pays `token_ratio` in, and retries are made while
    /// more than half is left. At most 1000 tokens, and a thousandth is the least that counts.
    #[must_use]
    pub fn grpc(max_tokens: u32, token_ratio: f64) -> Self {
        // 0.57 is 570 thousandths, and a little less than that in binary.
        let ratio = (token_ratio * 1000.0 + 1e-6).floor() / 1000.0;
        let mut account = Self::account(ratio, 0, max_tokens);
        if max_tokens > 1000 {
            let fault = ConfigError::new("budget.cap", max_tokens, "use at most 1000 tokens");
            account.fault.get_or_insert(fault);
        }
        let floor = account.cap / 2;
        Self::of(account.full(Pays::AnswersOverFailures { floor }))
    }

    /// Finagle's default: a fifth, and 10 per second, saved up for 10 s.
    #[must_use]
    pub fn finagle() -> Self {
        Self::with(0.2, 10, 100)
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

    /// How many retries could be made now, if each costs 1; with [`grpc`](Self::grpc), of its upper half.
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

    /// A first attempt is made; or, with [`aws`](Self::aws) and [`grpc`](Self::grpc), it was answered well. One
    /// load when the balance is full.
    #[inline]
    pub fn deposit(&self) {
        self.account.pay_in(self.account.deposit);
    }

    /// Takes out one retry at the cost of 1, if there is one. Dropping the withdrawal unspent pays it back.
    #[must_use]
    pub fn withdraw(&self) -> Option<Withdrawal> {
        self.account.failed(RETRY);
        self.account.grant(RETRY)
    }

    /// Takes out one retry for this kind of failure, at its [`cost`](Self::cost).
    #[must_use]
    pub fn withdraw_for(&self, kind: FailureKind) -> Option<Withdrawal> {
        self.failed(kind);
        self.grant(kind)
    }

    // ===== Used by a layer, which tells it more =====

    /// A call begins.
    #[inline]
    pub(super) fn begun(&self) {
        if self.account.pays == Pays::Calls {
            self.deposit();
        }
    }

    /// A call has a good answer, and its last retry has cost so much.
    #[inline]
    pub(super) fn answered(&self, last: u64) {
        match self.account.pays {
            Pays::Calls => {}
            Pays::Answers if last > 0 => self.account.pay_in(last),
            Pays::Answers | Pays::AnswersOverFailures { .. } => self.deposit(),
        }
    }

    /// An attempt has failed so that it may be tried again, or was told not to be.
    pub(super) fn failed(&self, kind: FailureKind) {
        self.account.failed(self.costs[kind as usize]);
    }

    /// The retry for a failure that was told before.
    pub(super) fn grant(&self, kind: FailureKind) -> Option<Withdrawal> {
        self.account.grant(self.costs[kind as usize])
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
