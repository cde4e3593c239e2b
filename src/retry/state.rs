//! The state of a call after its first attempt has failed.
//!
//! It is allocated only then, so that a call whose first attempt succeeds does not pay for it.

use std::time::Duration;

use tokio::time::Instant;

use super::{
    policy::{Again, Facts, Policy, decide},
    settings::RetrySettings,
};
use crate::{
    attempt::{
        AttemptRecord, Attempts, BodyReplay, CallDelays, Core, FailureKind, GiveUpReason, Numbered,
        PerKind, RetryAction, Withdrawal, earns_deposit,
    },
    drain::RESPONSE_TIMEOUT,
    event::event,
    outcome::{Outcome, Reason, Rejected, http as rule},
    time::Deadline,
};

pub(super) struct Course<S> {
    /// The service of the further attempts. `None` before the first of them.
    service: Option<S>,
    withdrawal: Option<Withdrawal>,
    /// The cost of the last retry, and the delay before it.
    cost: u64,
    waited: Duration,
    record: Attempts,
    transparent: u32,
    of_kind: PerKind<u32>,
    /// The delays of the call. `None` before the first delay is needed.
    series: Option<CallDelays>,
}

/// The delay before the next attempt. It starts at the decision, so that it includes the drain of the discarded
/// response.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wait {
    pub(super) since: Instant,
    pub(super) time: Duration,
    /// The bounds of the drain in bytes and time.
    pub(super) drain_cap: u64,
    pub(super) drain_time: Duration,
}

impl Wait {
    pub(super) fn left(&self) -> Duration {
        self.time.saturating_sub(self.since.elapsed())
    }
}

/// The properties of a saved request and of the attempt that has ended.
pub(super) struct Kept {
    pub(super) safe: bool,
    pub(super) is_unprocessed: bool,
    pub(super) is_error: bool,
    pub(super) body: BodyReplay,
    pub(super) deadline: Option<Deadline>,
    /// An inner retry layer has returned the error.
    pub(super) has_inner_attempts: bool,
    /// An inner hedge layer may have sent another attempt, which the outcome does not report.
    pub(super) is_sent_before: bool,
}

impl<S> Default for Course<S> {
    fn default() -> Self {
        Self {
            service: None,
            withdrawal: None,
            cost: 0,
            waited: Duration::ZERO,
            record: Attempts::UNSENT,
            transparent: 0,
            of_kind: [0; 8],
            series: None,
        }
    }
}

impl<S> Course<S> {
    pub(super) fn service(&mut self, core: &Core<S, RetrySettings>) -> &mut S
    where
        S: Clone,
    {
        self.service.get_or_insert_with(|| core.service())
    }

    pub(super) fn waited(&self) -> Duration {
        self.waited
    }

    pub(super) fn made(&self) -> u32 {
        self.record.made
    }

    /// Decides about a further attempt after an outcome. Returns the delay before it, or the reason why there is none.
    ///
    /// Makes the deposit or the withdrawal that the outcome requires. `kept` is `None` if the request is not saved.
    /// `claim` reserves the request body for the next attempt, and returns `false` if the body can no longer be
    /// replayed.
    pub(super) fn next(
        &mut self,
        core: &Core<S, RetrySettings>,
        policy: &Policy,
        (class, outcome, is_error): (RetryAction, Outcome, bool),
        kept: Option<Kept>,
        claim: impl FnOnce() -> bool,
    ) -> Result<Wait, GiveUpReason> {
        let now = Instant::now();
        let deadline = kept.as_ref().and_then(|kept| kept.deadline);
        let left = deadline.map(|deadline| deadline.at().saturating_duration_since(now));
        let transparent =
            kept.as_ref().is_some_and(|kept| !kept.has_inner_attempts && !kept.is_sent_before)
                && policy.is_transparent(outcome, self.transparent)
                && core.settings.withdraw_transparent();
        let is_unprocessed = kept.as_ref().is_some_and(|kept| kept.is_unprocessed);
        let is_sent_before = kept.as_ref().is_some_and(|kept| kept.is_sent_before);
        let may_be_sent = FailureKind::of(outcome).may_be_seen() || is_sent_before;
        let decision = match kept {
            Some(kept) => self.decide(policy, (class, outcome), transparent, &kept, left),
            None if class == RetryAction::Final && is_error => Err(GiveUpReason::NotRetryable),
            None if class == RetryAction::Final => Err(GiveUpReason::Answered),
            None if core.misconfigured => Err(GiveUpReason::Misconfigured),
            // The request is not saved.
            None => match class {
                RetryAction::Refused(stop) => Err(stop),
                _ => Err(GiveUpReason::BodyGone),
            },
        };
        if let Some(budget) = &core.budget {
            match class {
                RetryAction::Final if earns_deposit(outcome) => budget.answered(self.cost),
                // These retries make no withdrawal, not even in a budget where each failure makes one.
                RetryAction::Retryable
                    if is_unprocessed || outcome.reason() == Reason::Rejected => {}
                RetryAction::Retryable | RetryAction::Refused(GiveUpReason::Pushback)
                    if !transparent =>
                {
                    budget.failed(FailureKind::of(outcome));
                }
                _ => {}
            }
        }
        // Check the budget last, so that a retry that another check prevents makes no withdrawal.
        let decision = decision.and_then(|again| {
            if let (Some(budget), Some(kind)) = (&core.budget, again.charge) {
                self.withdrawal = Some(budget.grant(kind).ok_or(GiveUpReason::BudgetUsedUp)?);
            }
            if !claim() {
                self.withdrawal = None;
                return Err(GiveUpReason::BodyGone);
            }
            Ok(again)
        });
        if transparent && decision.is_err() {
            core.settings.refund_transparent();
        }
        match decision {
            Ok(again) => {
                self.transparent += u32::from(again.transparent);
                self.record.sent += u32::from(may_be_sent);
                self.of_kind[again.kind as usize] += 1;
                self.waited = again.wait;
                self.record.tried(AttemptRecord { outcome, waited: again.wait });
                event!(
                    retry,
                    DEBUG,
                    resilience.name = policy.name(),
                    attempt = self.record.made,
                    delay_ms = again.wait.as_millis() as u64,
                    reason = ?outcome,
                    "retrying"
                );
                // The drain leaves the next attempt its minimum time before the deadline.
                let most = left
                    .map_or(RESPONSE_TIMEOUT, |left| left.saturating_sub(policy.min_attempt_time));
                Ok(Wait {
                    since: now,
                    time: again.wait,
                    drain_cap: policy.drain_cap,
                    drain_time: RESPONSE_TIMEOUT.min(most),
                })
            }
            Err(stop) => {
                event!(
                    retry,
                    DEBUG,
                    resilience.name = policy.name(),
                    attempt = self.record.made,
                    reason = stop.as_str(),
                    outcome = ?outcome,
                    "not retried"
                );
                self.record.sent += u32::from(may_be_sent);
                self.record.tried(AttemptRecord { outcome, waited: Duration::ZERO });
                Err(stop)
            }
        }
    }

    fn decide(
        &mut self,
        policy: &Policy,
        (class, outcome): (RetryAction, Outcome),
        is_transparent: bool,
        kept: &Kept,
        left: Option<Duration>,
    ) -> Result<Again, GiveUpReason> {
        let facts = Facts {
            class,
            outcome,
            safe: kept.safe,
            is_unprocessed: kept.is_unprocessed,
            is_error: kept.is_error,
            is_sent_before: kept.is_sent_before,
            body: kept.body,
            made: self.record.made,
            is_transparent,
            transparent: self.transparent,
            of_kind: self.of_kind,
            left,
        };
        decide(&facts, policy, &mut self.series)
    }

    /// Begins the next attempt, and spends its withdrawal.
    pub(super) fn begin(&mut self) -> Numbered {
        // A transparent retry makes no withdrawal, so the cost of the retry before it stays.
        if let Some(mut withdrawal) = self.withdrawal.take() {
            self.cost = withdrawal.take();
        }
        self.record.made += 1;
        Numbered { number: self.record.made, seen: self.record.sent }
    }

    /// Records that not even the first attempt is made.
    pub(super) fn not_begun(&mut self) {
        self.record.made = 0;
    }

    /// Records that the attempt in flight ended by this rejection.
    pub(super) fn cut_short(&mut self, rejected: &Rejected) -> Outcome {
        let outcome = rule::of_rejected(rejected);
        self.record.sent += 1;
        self.record.tried(AttemptRecord { outcome, waited: Duration::ZERO });
        outcome
    }

    /// Ends the call without a further attempt. Refunds a withdrawal that is not spent, and returns the record of the
    /// attempts.
    pub(super) fn end(&mut self, settings: &RetrySettings, stop: GiveUpReason) -> Attempts {
        settings.count_stop(stop);
        self.withdrawal = None;
        self.record.stop = stop;
        std::mem::replace(&mut self.record, Attempts::UNSENT)
    }
}
