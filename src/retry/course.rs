//! What is known of a call whose first attempt has failed. Made then, and not before: a call that is well pays
//! for none of it.

use std::time::Duration;

use tokio::time::Instant;

use super::{
    account::Withdrawal,
    attempts::{Attempts, Tried},
    core::{Core, Settings},
    exchange::Numbered,
    policy::{Again, Class, Facts, Policy, Repeatable, decide},
    rules::{FailureKind, PerKind},
    series::Series,
    stop::Stop,
    weighed::earns_deposit,
};
use crate::{
    call::{Deadline, Outcome, Reason, Rejected, http as rule},
    event,
};

pub(super) struct Course<S> {
    /// What later attempts are made with; none until there is one.
    service: Option<S>,
    withdrawal: Option<Withdrawal>,
    /// What the last retry has cost, and how long was waited for it.
    cost: u64,
    waited: Duration,
    record: Attempts,
    transparent: u32,
    of_kind: PerKind<u32>,
    /// Its waits, once there is one.
    series: Option<Series>,
}

/// A wait, from when it was decided: reading the answer away is part of it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wait {
    pub(super) since: Instant,
    pub(super) time: Duration,
    /// How much of the answer may be read away, and for how long.
    pub(super) drain_cap: u64,
    pub(super) drain_time: Duration,
}

/// How long a discarded answer may take before its connection is given up.
const DRAIN_TIME: Duration = Duration::from_millis(50);

impl Wait {
    pub(super) fn left(&self) -> Duration {
        self.time.saturating_sub(self.since.elapsed())
    }
}

/// What is known of a request that was kept.
pub(super) struct Kept {
    pub(super) safe: bool,
    pub(super) is_unprocessed: bool,
    pub(super) is_error: bool,
    pub(super) body: Repeatable,
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
    pub(super) fn service(&mut self, core: &Core<S>) -> &mut S
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

    /// How long until the next attempt; or why there is none.
    pub(super) fn next(
        &mut self,
        core: &Core<S>,
        policy: &Policy,
        (class, outcome, is_error): (Class, Outcome, bool),
        kept: Option<Kept>,
        claim: impl FnOnce() -> bool,
    ) -> Result<Wait, Stop> {
        let now = Instant::now();
        let deadline = kept.as_ref().and_then(|kept| kept.deadline);
        let left = deadline.map(|deadline| deadline.at().saturating_duration_since(now));
        let transparent = kept.as_ref().is_some_and(|kept| !kept.has_inner_attempts)
            && policy.is_transparent(outcome, self.transparent)
            && core.settings.withdraw_transparent();
        let is_unprocessed = kept.as_ref().is_some_and(|kept| kept.is_unprocessed);
        let is_sent_before = kept.as_ref().is_some_and(|kept| kept.is_sent_before);
        let may_be_sent = FailureKind::of(outcome).may_be_seen() || is_sent_before;
        let decision = match kept {
            Some(kept) => self.decide(policy, (class, outcome), transparent, &kept, left),
            None if class == Class::Final && is_error => Err(Stop::NotRetryable),
            None if class == Class::Final => Err(Stop::Answered),
            None if core.misconfigured => Err(Stop::Misconfigured),
            // The request cannot be saved.
            None => match class {
                Class::Refused(stop) => Err(stop),
                _ => Err(Stop::BodyGone),
            },
        };
        if let Some(budget) = &core.budget {
            match class {
                Class::Final if earns_deposit(outcome) => budget.answered(self.cost),
                // These retries make no withdrawal, also where each failure makes one.
                Class::Retryable if is_unprocessed || outcome.reason() == Reason::Rejected => {}
                Class::Retryable | Class::Refused(Stop::Pushback) if !transparent => {
                    budget.failed(FailureKind::of(outcome));
                }
                _ => {}
            }
        }
        // The budget last: what another rule refuses is never charged.
        let decision = decision.and_then(|again| {
            if let (Some(budget), Some(kind)) = (&core.budget, again.charge) {
                self.withdrawal = Some(budget.grant(kind).ok_or(Stop::BudgetUsedUp)?);
            }
            if !claim() {
                self.withdrawal = None;
                return Err(Stop::BodyGone);
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
                self.record.tried(Tried { outcome, waited: again.wait });
                event!(
                    DEBUG,
                    resilience.name = policy.name(),
                    attempt = self.record.made,
                    delay_ms = again.wait.as_millis() as u64,
                    reason = ?outcome,
                    "retrying"
                );
                // The next attempt is to be of use.
                let most =
                    left.map_or(DRAIN_TIME, |left| left.saturating_sub(policy.least_attempt));
                Ok(Wait {
                    since: now,
                    time: again.wait,
                    drain_cap: policy.drain_cap,
                    drain_time: DRAIN_TIME.min(most),
                })
            }
            Err(stop) => {
                event!(
                    DEBUG,
                    resilience.name = policy.name(),
                    attempt = self.record.made,
                    reason = stop.as_str(),
                    outcome = ?outcome,
                    "not retried"
                );
                self.record.sent += u32::from(may_be_sent);
                self.record.tried(Tried { outcome, waited: Duration::ZERO });
                Err(stop)
            }
        }
    }

    fn decide(
        &mut self,
        policy: &Policy,
        (class, outcome): (Class, Outcome),
        is_transparent: bool,
        kept: &Kept,
        left: Option<Duration>,
    ) -> Result<Again, Stop> {
        let facts = Facts {
            class,
            outcome,
            safe: kept.safe,
            is_unprocessed: kept.is_unprocessed,
            is_error: kept.is_error,
            body: kept.body,
            made: self.record.made,
            is_transparent,
            transparent: self.transparent,
            of_kind: self.of_kind,
            left,
        };
        decide(&facts, policy, &mut self.series)
    }

    /// The next attempt is made: from here on its retry is spent.
    pub(super) fn begin(&mut self) -> Numbered {
        // A transparent retry makes no withdrawal, so the cost of the retry before it stays.
        if let Some(mut withdrawal) = self.withdrawal.take() {
            self.cost = withdrawal.take();
        }
        self.record.made += 1;
        Numbered { number: self.record.made, seen: self.record.sent }
    }

    /// Not even the first attempt is made.
    pub(super) fn not_begun(&mut self) {
        self.record.made = 0;
    }

    /// Records that the attempt in flight ended by this rejection.
    pub(super) fn cut_short(&mut self, rejected: &Rejected) -> Outcome {
        let outcome = rule::of_rejected(rejected);
        self.record.sent += 1;
        self.record.tried(Tried { outcome, waited: Duration::ZERO });
        outcome
    }

    /// There is no further attempt: what was done.
    pub(super) fn end(&mut self, settings: &Settings, stop: Stop) -> Attempts {
        settings.count_stop(stop);
        self.withdrawal = None;
        self.record.stop = stop;
        std::mem::replace(&mut self.record, Attempts::UNSENT)
    }
}
