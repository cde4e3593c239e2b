//! The state of a call after its first attempt has failed.
//!
//! It is allocated only then, so that a call whose first attempt succeeds does not allocate.

use std::time::Duration;

use tokio::time::Instant;

use super::{
    policy::{DecisionInput, RetryPlan, RetryPolicy, decide},
    retried::RetriedCall,
    settings::RetrySettings,
};
use crate::{
    attempt::{
        AttemptNumber, AttemptRecord, Attempts, BodyReplay, CallDelays, Core, FailureKind,
        GiveUpReason, PerKind, RetryAction, Withdrawal, earns_deposit,
    },
    drain::RESPONSE_TIMEOUT,
    event::{event, ms},
    outcome::{LayerKind, Outcome, Reason, Rejected, http as rule},
    time::Deadline,
};

const LAYER: &str = LayerKind::Retry.as_str();

pub(super) struct RetryState<S> {
    /// The service of the further attempts. `None` before the first of them.
    service: Option<S>,
    withdrawal: Option<Withdrawal>,
    /// The cost of the last retry, and the delay before it.
    cost: u64,
    delay: Duration,
    record: Attempts,
    /// The outcome of the last attempt that has ended.
    last: Option<Outcome>,
    /// `None` before the first delay, and after the end of the call.
    retried: Option<RetriedCall>,
    transparent: u32,
    retries_by_kind: PerKind<u32>,
    /// The delays of the call. `None` before the first delay is needed.
    delays: Option<CallDelays>,
}

/// The delay before the next attempt. It starts at the decision, so that it includes the drain of the discarded
/// response.
#[derive(Clone, Copy, Debug)]
pub(super) struct RetryDelay {
    pub(super) since: Instant,
    pub(super) time: Duration,
    /// The bounds of the drain in bytes and time.
    pub(super) max_drain_bytes: u64,
    pub(super) max_drain_time: Duration,
}

impl RetryDelay {
    pub(super) fn left(&self) -> Duration {
        self.time.saturating_sub(self.since.elapsed())
    }
}

/// The attempt that has ended, and the properties of its saved request.
pub(super) struct EndedAttempt {
    pub(super) is_safe: bool,
    pub(super) is_unprocessed: bool,
    pub(super) is_error: bool,
    pub(super) body: BodyReplay,
    pub(super) deadline: Option<Deadline>,
    /// An inner retry layer has returned the error.
    pub(super) has_inner_attempts: bool,
    /// An inner hedge layer may have sent another attempt, which the outcome does not report.
    pub(super) is_sent_before: bool,
}

impl<S> Default for RetryState<S> {
    fn default() -> Self {
        Self {
            service: None,
            withdrawal: None,
            cost: 0,
            delay: Duration::ZERO,
            record: Attempts::UNSENT,
            last: None,
            retried: None,
            transparent: 0,
            retries_by_kind: [0; 8],
            delays: None,
        }
    }
}

impl<S> RetryState<S> {
    pub(super) fn service(&mut self, core: &Core<S, RetrySettings>) -> &mut S
    where
        S: Clone,
    {
        self.service.get_or_insert_with(|| core.service())
    }

    pub(super) fn delay(&self) -> Duration {
        self.delay
    }

    pub(super) fn made(&self) -> u32 {
        self.record.made
    }

    /// Decides about a further attempt after an outcome. Returns the delay before it, or the reason why there is none.
    ///
    /// Makes the deposit or the withdrawal that the outcome requires. `ended` is `None` if the request is not saved.
    /// `take_over` reserves the request body for the next attempt, and returns `false` if the body can no longer be
    /// replayed.
    pub(super) fn plan_retry(
        &mut self,
        core: &Core<S, RetrySettings>,
        policy: &RetryPolicy,
        (class, outcome, is_error): (RetryAction, Outcome, bool),
        ended: Option<EndedAttempt>,
        take_over: impl FnOnce() -> bool,
    ) -> Result<RetryDelay, GiveUpReason> {
        let now = Instant::now();
        let deadline = ended.as_ref().and_then(|ended| ended.deadline);
        let left = deadline.map(|deadline| deadline.at().saturating_duration_since(now));
        let transparent =
            ended.as_ref().is_some_and(|ended| !ended.has_inner_attempts && !ended.is_sent_before)
                && policy.is_transparent(outcome, self.transparent)
                && core.settings.withdraw_transparent();
        let is_unprocessed = ended.as_ref().is_some_and(|ended| ended.is_unprocessed);
        let is_sent_before = ended.as_ref().is_some_and(|ended| ended.is_sent_before);
        let may_be_sent = FailureKind::of(outcome).may_be_seen() || is_sent_before;
        let decision = match ended {
            Some(ended) => self.decide(policy, (class, outcome), transparent, &ended, left),
            None if class == RetryAction::Done && is_error => Err(GiveUpReason::NotRetryable),
            None if class == RetryAction::Done => Err(GiveUpReason::Responded),
            None if core.misconfigured => Err(GiveUpReason::Misconfigured),
            // The request is not saved.
            None => match class {
                RetryAction::Forbidden(stop) => Err(stop),
                _ => Err(GiveUpReason::BodyGone),
            },
        };
        if let Some(budget) = &core.budget {
            match class {
                RetryAction::Done if earns_deposit(outcome) => {
                    budget.deposit_for_response(self.cost)
                }
                // These retries make no withdrawal, not even in a budget where each failure makes one.
                RetryAction::Retry if is_unprocessed || outcome.reason() == Reason::Rejected => {}
                RetryAction::Retry | RetryAction::Forbidden(GiveUpReason::Pushback)
                    if !transparent =>
                {
                    budget.record_failure(FailureKind::of(outcome));
                }
                _ => {}
            }
        }
        // Check the budget last, so that a retry that another check prevents makes no withdrawal.
        let decision = decision.and_then(|plan| {
            if let (Some(budget), Some(kind)) = (&core.budget, plan.charge) {
                self.withdrawal =
                    Some(budget.withdraw_recorded(kind).ok_or(GiveUpReason::BudgetUsedUp)?);
            }
            if !take_over() {
                self.withdrawal = None;
                return Err(GiveUpReason::BodyGone);
            }
            Ok(plan)
        });
        self.last = Some(outcome);
        if transparent && decision.is_err() {
            core.settings.refund_transparent();
        }
        match decision {
            Ok(plan) => {
                self.transparent += u32::from(plan.transparent);
                self.record.sent += u32::from(may_be_sent);
                self.retries_by_kind[plan.kind as usize] += 1;
                self.delay = plan.delay;
                let retried = || RetriedCall::new(core.settings.clone());
                self.retried.get_or_insert_with(retried).begin_delay(now);
                self.record.push(AttemptRecord { outcome, waited: plan.delay });
                event!(
                    retry,
                    DEBUG,
                    LAYER,
                    core.settings.name.as_str(),
                    attempt = self.record.made,
                    delay_ms = ms(plan.delay),
                    outcome = outcome.kind().as_str(),
                    reason = outcome.reason().as_str(),
                    code = outcome.code(),
                    "retrying",
                );
                // The drain leaves the next attempt its minimum time before the deadline.
                let max_drain_time = left
                    .map_or(RESPONSE_TIMEOUT, |left| left.saturating_sub(policy.min_attempt_time));
                Ok(RetryDelay {
                    since: now,
                    time: plan.delay,
                    max_drain_bytes: policy.max_drain_bytes,
                    max_drain_time: RESPONSE_TIMEOUT.min(max_drain_time),
                })
            }
            Err(stop) => {
                self.record.sent += u32::from(may_be_sent);
                self.record.push(AttemptRecord { outcome, waited: Duration::ZERO });
                Err(stop)
            }
        }
    }

    fn decide(
        &mut self,
        policy: &RetryPolicy,
        (class, outcome): (RetryAction, Outcome),
        is_transparent: bool,
        ended: &EndedAttempt,
        left: Option<Duration>,
    ) -> Result<RetryPlan, GiveUpReason> {
        let input = DecisionInput {
            class,
            outcome,
            is_safe: ended.is_safe,
            is_unprocessed: ended.is_unprocessed,
            is_error: ended.is_error,
            is_sent_before: ended.is_sent_before,
            body: ended.body,
            made: self.record.made,
            is_transparent,
            transparent: self.transparent,
            retries_by_kind: self.retries_by_kind,
            left,
        };
        decide(&input, policy, &mut self.delays)
    }

    /// Begins and counts the next attempt, and spends its withdrawal.
    pub(super) fn begin_attempt(&mut self, settings: &RetrySettings) -> AttemptNumber {
        if let Some(outcome) = self.last {
            settings.counters.record_retry(outcome.reason());
        }
        if let Some(retried) = &mut self.retried {
            retried.begin_attempt();
        }
        // A transparent retry makes no withdrawal, so the cost of the retry before it stays.
        if let Some(mut withdrawal) = self.withdrawal.take() {
            self.cost = withdrawal.spend_amount();
        }
        self.record.made += 1;
        AttemptNumber { number: self.record.made, seen: self.record.sent }
    }

    /// Records that not even the first attempt is made.
    pub(super) fn record_no_attempt(&mut self) {
        self.record.made = 0;
    }

    /// Records that the attempt in flight ended by this rejection.
    pub(super) fn record_rejected(&mut self, rejected: &Rejected) -> Outcome {
        let outcome = rule::of_rejected(rejected);
        self.last = Some(outcome);
        self.record.sent += 1;
        self.record.push(AttemptRecord { outcome, waited: Duration::ZERO });
        outcome
    }

    /// Emits the event of the end of a call: "recovered" for a retried call that succeeds, otherwise "not retried". A
    /// call without an attempt has no event.
    fn notify_of_end(&self, settings: &RetrySettings, stop: GiveUpReason, is_recovered: bool) {
        let name = settings.name.as_str();
        if is_recovered {
            event!(
                retry,
                DEBUG,
                LAYER,
                name,
                attempts = self.record.made,
                waited_ms = ms(self.record.waited),
                "recovered",
            );
        } else if self.record.made > 0 {
            event!(
                retry,
                DEBUG,
                LAYER,
                name,
                attempt = self.record.made,
                reason = stop.as_str(),
                outcome = self.last.map(|outcome| outcome.kind().as_str()),
                code = self.last.and_then(|outcome| outcome.code()),
                "not retried",
            );
        }
    }

    /// Ends the call without a further attempt. Refunds a withdrawal that is not spent, and returns the record of the
    /// attempts.
    pub(super) fn give_up(&mut self, settings: &RetrySettings, stop: GiveUpReason) -> Attempts {
        settings.counters.record_give_up(stop);
        let is_success = self.last.is_some_and(|outcome| outcome.is_success());
        let is_recovered = stop == GiveUpReason::Responded && self.record.made > 1 && is_success;
        if is_recovered {
            settings.counters.record_recovery();
        }
        self.notify_of_end(settings, stop, is_recovered);
        self.retried = None;
        self.withdrawal = None;
        self.record.stop = stop;
        std::mem::replace(&mut self.record, Attempts::UNSENT)
    }
}
