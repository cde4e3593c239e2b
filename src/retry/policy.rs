//! The decision about a retry after one failed attempt.
//!
//! [`decide`] depends only on its arguments and on random jitter. The order of its checks is part of the contract: the
//! [`GiveUpReason`] names the first check that fails. The caller checks the budget afterwards, so that a retry that
//! another check prevents makes no withdrawal.

use std::time::Duration;

use super::overrides::{Failure, Overrides};
use crate::{
    attempt::{
        Backoff, BodyReplay, CallDelays, DelaySource, FailureKind, GiveUpReason, PerKind,
        RetryAction, SafeRequests,
    },
    error::ConfigError,
    outcome::{MAX_HINT, Outcome, Reason, grpc},
};

/// The settings of a retry layer that are needed only after a failed attempt.
#[derive(Clone, Debug)]
pub(crate) struct RetryPolicy {
    pub(crate) attempts: u32,
    /// The maximum number of retries for each kind of failure.
    pub(crate) max_retries: PerKind<Option<u32>>,
    pub(crate) delays: DelaySource,
    /// `None`: [`DEFAULT_MAX_WAIT`] for a call without a deadline, no maximum for a call with one.
    pub(crate) max_wait: Option<Duration>,
    pub(crate) hint: HintMode,
    /// A rejection by an inner layer that carries `retry_after` is retried after that time.
    pub(crate) wait_on_rejection: bool,
    /// The maximum number of transparent retries of one call. They are immediate, and neither counted as attempts nor
    /// charged to the budget.
    pub(crate) max_transparent: u32,
    /// The minimum time between the delay and the deadline. With less, there is no attempt.
    pub(crate) min_attempt_time: Duration,
    pub(crate) max_drain_bytes: u64,
    pub(crate) overrides: Overrides,
    pub(crate) safe_requests: SafeRequests,
    /// A gRPC status that declares the call unprocessed makes a retry safe for any method.
    pub(crate) trusts_grpc_status: bool,
}

/// The default of `max_transparent`, enough to pass every stale connection of a small pool.
pub(crate) const MAX_TRANSPARENT: u32 = 5;

impl RetryPolicy {
    pub(crate) fn new() -> Self {
        Self {
            attempts: 3,
            max_retries: [None; 8],
            delays: Backoff::default().into(),
            max_wait: None,
            hint: HintMode::Above { jitter: HINT_JITTER },
            wait_on_rejection: false,
            max_transparent: MAX_TRANSPARENT,
            min_attempt_time: Duration::from_millis(10),
            overrides: Overrides::default(),
            max_drain_bytes: 64 * 1024,
            safe_requests: SafeRequests::Idempotent,
            trusts_grpc_status: false,
        }
    }

    /// Returns an error for settings that contradict each other or have no effect.
    pub(crate) fn check(&self) -> Result<(), ConfigError> {
        if let Some(status) = self.overrides.contradiction() {
            let remedy = "list the status in either unprocessed or never_on";
            return Err(ConfigError::new("unprocessed", status.as_u16(), remedy));
        }
        if self.wait_on_rejection && self.overrides.forbids(Failure::Because(Reason::Rejected)) {
            let remedy = "remove either wait_on_rejection or never_on(Reason::Rejected)";
            return Err(ConfigError::new("wait_on_rejection", true, remedy));
        }
        let limit = self.max_retries[FailureKind::Rejected as usize];
        if self.wait_on_rejection && limit == Some(0) {
            let remedy =
                "remove either wait_on_rejection or max_retries_for(FailureKind::Rejected, 0)";
            return Err(ConfigError::new("wait_on_rejection", true, remedy));
        }
        if let (Some(limit), true, false) =
            (limit, self.overrides.is_empty(), self.wait_on_rejection)
        {
            let remedy = match limit {
                0 => "remove it: a rejection is retried only with wait_on_rejection",
                _ => "set wait_on_rejection, without which a rejection is never retried",
            };
            return Err(ConfigError::new("max_retries_for(FailureKind::Rejected)", limit, remedy));
        }
        Ok(())
    }

    /// Returns whether a retry for this outcome is transparent. `before` is the number of transparent retries that the
    /// call has had.
    pub(crate) fn is_transparent(&self, outcome: Outcome, before: u32) -> bool {
        let unprocessed = FailureKind::of(outcome) == FailureKind::Unseen;
        (unprocessed || outcome.is_housekeeping()) && before < self.max_transparent
    }

    /// Returns whether the gRPC status of the server makes a retry safe for any method.
    fn is_unprocessed_grpc(&self, outcome: Outcome) -> bool {
        self.trusts_grpc_status
            && outcome.reason() == Reason::GrpcStatus
            && matches!(outcome.code(), Some(grpc::UNAVAILABLE | grpc::RESOURCE_EXHAUSTED))
    }

    /// Returns the class of an outcome. A rejection that states a time becomes retryable with `wait_on_rejection`.
    pub(crate) fn classify_rejection(&self, class: RetryAction, outcome: Outcome) -> RetryAction {
        // Without a hint, the time at which the inner layer admits calls again is unknown.
        let can_wait = self.wait_on_rejection && outcome.retry_after().is_some();
        if class == RetryAction::Forbidden(GiveUpReason::Rejected) && can_wait {
            RetryAction::Retry
        } else {
            class
        }
    }

    /// Returns the delay before the next attempt. `backoff` is its delay by the backoff, and `left` the time until the
    /// deadline.
    fn delay(
        &self,
        backoff: Duration,
        hint: Option<Duration>,
        left: Option<Duration>,
    ) -> Result<Duration, GiveUpReason> {
        let max_wait = self.max_wait.or(left.is_none().then_some(DEFAULT_MAX_WAIT));
        let backoff = max_wait.map_or(backoff, |max| backoff.min(max));
        let Some(hint) = hint else { return Ok(backoff) };
        // Spreads clients that receive the same hint at the same time.
        let random = |max: Duration| match self.delays.has_jitter() {
            true => max.mul_f64(fastrand::f64()),
            false => Duration::ZERO,
        };
        let is_too_long = hint >= MAX_HINT || max_wait.is_some_and(|max| hint > max);
        match self.hint {
            HintMode::Within(reach) => {
                let delay = hint.saturating_add(random(hint.mul_f64(HINT_JITTER)));
                let delay = delay.clamp(backoff, backoff.saturating_add(reach));
                Ok(max_wait.map_or(delay, |max| delay.min(max)))
            }
            _ if is_too_long => Err(GiveUpReason::DelayTooLong),
            HintMode::Exact => Ok(hint),
            HintMode::Above { jitter } => {
                // A deadline cuts the addition to the hint, and not the time of the attempt. The attempt keeps at least
                // half of the time between the hint and the deadline. With less, an attempt after a hint that fits the
                // deadline would end at the deadline.
                let spare = left.map(|left| left.saturating_sub(self.min_attempt_time));
                let max = spare.map_or(Duration::MAX, |spare| spare.saturating_sub(hint) / 2);
                let added = random(hint.mul_f64(jitter).min(max));
                Ok(hint.saturating_add(added.max(backoff.saturating_sub(hint).min(max))))
            }
        }
    }
}

/// The default of `max_wait` for calls without a deadline.
const DEFAULT_MAX_WAIT: Duration = Duration::from_secs(30);

/// The default of `hint_jitter`: half of the hint, as in Envoy's rate-limited backoff.
pub(crate) const HINT_JITTER: f64 = 0.5;

/// How a server's hint changes the delay before an attempt.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum HintMode {
    /// The hint is a lower bound. The delay is at most `hint × (1 + jitter)`, or the backoff if that is longer.
    Above { jitter: f64 },
    /// The hint lengthens the delay of the backoff by at most this time.
    Within(Duration),
    /// The hint is the delay.
    Exact,
}

/// The input of the decision.
#[derive(Clone, Copy, Debug)]
pub(crate) struct DecisionInput {
    pub(crate) class: RetryAction,
    pub(crate) outcome: Outcome,
    /// A retry is safe by the method, by a key, by a rule of the user, or because the server did not process the
    /// request.
    pub(crate) is_safe: bool,
    /// The response proves that the server did not process the request, so that a retry makes no withdrawal.
    pub(crate) is_unprocessed: bool,
    /// The attempt ended with an error.
    pub(crate) is_error: bool,
    /// An earlier attempt of an inner hedge may have been sent, although this outcome is that of an unsent attempt.
    pub(crate) is_sent_before: bool,
    pub(crate) body: BodyReplay,
    /// The number of attempts made, including this one.
    pub(crate) made: u32,
    /// A retry for this outcome is transparent.
    pub(crate) is_transparent: bool,
    /// The number of attempts that were followed by a transparent retry.
    pub(crate) transparent: u32,
    /// The number of retries made for each kind of failure.
    pub(crate) retries_by_kind: PerKind<u32>,
    /// The time until the deadline, if there is one.
    pub(crate) left: Option<Duration>,
}

/// A retry that all checks except the budget permit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RetryPlan {
    pub(crate) delay: Duration,
    /// The retry neither counts as an attempt nor is charged to the budget.
    pub(crate) transparent: bool,
    /// The kind of failure for which the budget is charged. `None` if the retry makes no withdrawal.
    pub(crate) charge: Option<FailureKind>,
    pub(crate) kind: FailureKind,
}

/// Decides whether to retry and after which delay.
///
/// `delays` has the delays of the call, and is created when the first delay is needed.
pub(crate) fn decide(
    input: &DecisionInput,
    policy: &RetryPolicy,
    delays: &mut Option<CallDelays>,
) -> Result<RetryPlan, GiveUpReason> {
    let reason = input.outcome.reason();
    let hint = input.outcome.retry_after();
    let rejected = reason == Reason::Rejected;
    match input.class {
        RetryAction::Forbidden(stop) => return Err(stop),
        RetryAction::Done if input.is_error => return Err(GiveUpReason::NotRetryable),
        RetryAction::Done => return Err(GiveUpReason::Responded),
        RetryAction::Retry => {}
    }
    let kind = FailureKind::of(input.outcome);
    // The request did not leave the client, or the server did not process it (RFC 9113 §6.8, §8.7). A retry is then
    // safe for any method.
    let unsent = !kind.may_be_seen();
    if !input.is_safe
        && (!unsent || input.is_sent_before)
        && !policy.is_unprocessed_grpc(input.outcome)
    {
        return Err(GiveUpReason::Unsafe);
    }
    // The stream of the attempt has ended, so the transport no longer reads the body even if it still owns it.
    let over = unsent || matches!(reason, Reason::Reset | Reason::StaleConnection);
    match input.body {
        BodyReplay::Yes => {}
        BodyReplay::Streaming if over => {}
        BodyReplay::Streaming => return Err(GiveUpReason::StillSending),
        BodyReplay::No => return Err(GiveUpReason::BodyGone),
    }
    // Connection housekeeping carries no information about the server, and the next connection may work.
    let transparent = input.is_transparent;
    if !transparent && input.made - input.transparent >= policy.attempts {
        return Err(GiveUpReason::AttemptsUsedUp);
    }
    if policy.max_retries[kind as usize]
        .is_some_and(|max| input.retries_by_kind[kind as usize] >= max)
    {
        return Err(GiveUpReason::KindUsedUp);
    }
    let delay = if transparent {
        Duration::ZERO
    } else {
        let delays = delays.get_or_insert_with(|| policy.delays.start());
        let throttled = kind == FailureKind::Throttled;
        let backoff = delays.next(throttled).ok_or(GiveUpReason::AttemptsUsedUp)?;
        // After a pushback the backoff begins with its first delay again (gRFC A6).
        if hint.is_some() && reason == Reason::GrpcStatus {
            delays.restart();
        }
        policy.delay(backoff, hint, input.left)?
    };
    // The next attempt needs its minimum time before the deadline.
    if input.left.is_some_and(|left| delay.saturating_add(policy.min_attempt_time) > left) {
        return Err(if rejected { GiveUpReason::Rejected } else { GiveUpReason::DeadlineTooNear });
    }
    let is_charged = !transparent && !rejected && !input.is_unprocessed;
    Ok(RetryPlan { delay, charge: is_charged.then_some(kind), transparent, kind })
}

#[cfg(test)]
mod tests {
    use super::*;

    const INPUT: DecisionInput = DecisionInput {
        class: RetryAction::Retry,
        outcome: Outcome::failure(),
        is_safe: true,
        is_unprocessed: false,
        is_error: false,
        is_sent_before: false,
        body: BodyReplay::Yes,
        made: 1,
        is_transparent: false,
        transparent: 0,
        retries_by_kind: [0; 8],
        left: None,
    };

    fn give_up_reason(input: DecisionInput) -> Option<GiveUpReason> {
        decide(&input, &RetryPolicy::new(), &mut None).err()
    }

    fn failure(reason: Reason) -> Outcome {
        Outcome::failure().because(reason)
    }

    /// Each case fails all later checks as well, so that the test shows their order.
    #[test]
    fn first_check_that_fails_is_the_reason() {
        let mut input = DecisionInput { made: 3, ..INPUT };
        assert_eq!(give_up_reason(input), Some(GiveUpReason::AttemptsUsedUp));
        input.body = BodyReplay::No;
        assert_eq!(give_up_reason(input), Some(GiveUpReason::BodyGone));
        input.body = BodyReplay::Streaming;
        assert_eq!(give_up_reason(input), Some(GiveUpReason::StillSending));
        input.is_safe = false;
        assert_eq!(give_up_reason(input), Some(GiveUpReason::Unsafe));
        input.class = RetryAction::Done;
        assert_eq!(give_up_reason(input), Some(GiveUpReason::Responded));
        assert_eq!(
            give_up_reason(DecisionInput { is_error: true, ..input }),
            Some(GiveUpReason::NotRetryable)
        );
        input.class = RetryAction::Forbidden(GiveUpReason::Rejected);
        assert_eq!(give_up_reason(input), Some(GiveUpReason::Rejected));
    }

    #[test]
    fn unsent_request_is_safe_for_any_method() {
        let post = DecisionInput { is_safe: false, ..INPUT };
        assert_eq!(
            give_up_reason(DecisionInput { outcome: failure(Reason::Reset), ..post }),
            Some(GiveUpReason::Unsafe)
        );
        let stale = failure(Reason::StaleConnection);
        assert_eq!(
            give_up_reason(DecisionInput { outcome: stale, ..post }),
            Some(GiveUpReason::Unsafe)
        );
        for reason in [
            Reason::ConnectRefused,
            Reason::ConnectFailed,
            Reason::ConnectTimeout,
            Reason::NeverSent,
            Reason::RefusedStream,
            Reason::GoAway,
        ] {
            assert_eq!(
                give_up_reason(DecisionInput { outcome: failure(reason), ..post }),
                None,
                "{reason:?}"
            );
        }
    }

    #[test]
    fn unsent_attempt_is_not_safe_if_an_earlier_hedge_attempt_may_have_been_sent() {
        let outcome = failure(Reason::NeverSent);
        let post = DecisionInput { is_safe: false, outcome, is_sent_before: true, ..INPUT };
        assert_eq!(give_up_reason(post), Some(GiveUpReason::Unsafe));
        assert_eq!(give_up_reason(DecisionInput { is_safe: true, ..post }), None);
    }

    #[test]
    fn grpc_retries_any_call_only_after_an_unprocessed_status() {
        let grpc = RetryPolicy { trusts_grpc_status: true, ..RetryPolicy::new() };
        let stop = |outcome| {
            decide(&DecisionInput { is_safe: false, outcome, ..INPUT }, &grpc, &mut None).err()
        };
        let status = |code| failure(Reason::GrpcStatus).with_code(code);
        assert_eq!(stop(status(grpc::UNAVAILABLE)), None);
        assert_eq!(stop(status(grpc::RESOURCE_EXHAUSTED)), None);
        for outcome in [
            status(4),
            failure(Reason::Status).with_code(14),
            failure(Reason::Timeout),
            failure(Reason::Reset),
        ] {
            assert_eq!(stop(outcome), Some(GiveUpReason::Unsafe), "{outcome:?}");
        }
    }

    #[test]
    fn transparent_retries_are_immediate_uncharged_and_bounded() {
        let policy = RetryPolicy { attempts: 1, ..RetryPolicy::new() };
        for outcome in [
            Outcome::cancelled().because(Reason::NeverSent),
            Outcome::cancelled().because(Reason::RefusedStream),
            Outcome::cancelled().because(Reason::GoAway),
            Outcome::cancelled().because(Reason::StaleConnection),
            Outcome::cancelled().because(Reason::Reset),
            // A GOAWAY with an error code.
            failure(Reason::GoAway),
        ] {
            let plan = |made, transparent| {
                let is_transparent = policy.is_transparent(outcome, transparent);
                let input = DecisionInput { outcome, made, is_transparent, transparent, ..INPUT };
                decide(&input, &policy, &mut None)
            };
            for retries in 0..5 {
                let plan = plan(retries + 1, retries).unwrap();
                let found = (plan.delay, plan.transparent, plan.charge);
                assert_eq!(found, (Duration::ZERO, true, None), "{outcome:?}");
            }
            assert_eq!(plan(6, 5).err(), Some(GiveUpReason::AttemptsUsedUp), "{outcome:?}");
        }
    }

    #[test]
    fn housekeeping_beyond_the_transparent_retries_follows_the_ordinary_rules() {
        let delays = Backoff::constant(Duration::from_millis(50)).without_jitter();
        let policy = RetryPolicy { delays: DelaySource::Backoff(delays), ..RetryPolicy::new() };
        let outcome = Outcome::cancelled().because(Reason::StaleConnection);
        let input = DecisionInput { outcome, made: 6, transparent: 5, ..INPUT };
        let plan = decide(&input, &policy, &mut None).unwrap();
        assert_eq!(plan.delay, Duration::from_millis(50));
        assert_eq!((plan.transparent, plan.charge), (false, Some(FailureKind::Read)));
    }

    #[test]
    fn reset_that_is_a_failure_is_delayed_and_charged() {
        let delays = Backoff::constant(Duration::from_millis(50)).without_jitter();
        let policy = RetryPolicy { delays: DelaySource::Backoff(delays), ..RetryPolicy::new() };
        let input = DecisionInput { outcome: failure(Reason::Reset), ..INPUT };
        let plan = decide(&input, &policy, &mut None).unwrap();
        assert_eq!(plan.delay, Duration::from_millis(50));
        assert_eq!((plan.transparent, plan.charge), (false, Some(FailureKind::Read)));
    }

    fn hinted(secs: u64) -> DecisionInput {
        let outcome = Outcome::throttled().with_retry_after(Duration::from_secs(secs));
        DecisionInput { outcome, ..INPUT }
    }

    fn drawn_delays(input: DecisionInput, policy: &RetryPolicy) -> Vec<f64> {
        let delay = |_| decide(&input, policy, &mut None).unwrap().delay.as_secs_f64();
        (0..200).map(delay).collect()
    }

    #[test]
    fn hint_is_a_lower_bound_with_jitter_proportional_to_it() {
        for (jitter, secs, max) in [(0.5, 1, 1.5), (0.5, 10, 15.0), (0.5, 30, 45.0), (5.0, 2, 12.0)]
        {
            let policy = RetryPolicy { hint: HintMode::Above { jitter }, ..RetryPolicy::new() };
            let (delays, hint) = (drawn_delays(hinted(secs), &policy), secs as f64);
            assert!(delays.iter().all(|delay| (hint..=max).contains(delay)), "{delays:?}");
            // The jitter is not cut at `max_wait`, where all clients would return at once.
            assert!(delays.iter().any(|&delay| delay > hint + (max - hint) * 0.9), "{delays:?}");
        }
    }

    #[test]
    fn hint_above_the_maximum_wait_ends_the_call() {
        assert_eq!(give_up_reason(hinted(31)), Some(GiveUpReason::DelayTooLong));
        let policy = RetryPolicy { max_wait: Some(Duration::from_secs(5)), ..RetryPolicy::new() };
        let left = Some(Duration::from_secs(1000));
        for (policy, secs, expected) in [
            (&policy, 6, Some(GiveUpReason::DelayTooLong)),
            (&policy, 5, None),
            // With a deadline, the deadline is the maximum.
            (&RetryPolicy::new(), 299, None),
            (&RetryPolicy::new(), 300, Some(GiveUpReason::DelayTooLong)),
        ] {
            let stop = decide(&DecisionInput { left, ..hinted(secs) }, policy, &mut None).err();
            assert_eq!(stop, expected, "{secs}");
        }
    }

    #[test]
    fn hint_that_fits_the_deadline_is_followed() {
        let policy = RetryPolicy::new();
        for (hint, left_ms) in [(1, 1010), (1, 1200), (2, 2900), (10, 10_010)] {
            let left = Duration::from_millis(left_ms);
            let delays = drawn_delays(DecisionInput { left: Some(left), ..hinted(hint) }, &policy);
            let max = (left - policy.min_attempt_time).as_secs_f64();
            assert!(delays.iter().all(|delay| (hint as f64..=max).contains(delay)), "{delays:?}");
        }
        let left = Some(Duration::from_millis(1009));
        assert_eq!(
            give_up_reason(DecisionInput { left, ..hinted(1) }),
            Some(GiveUpReason::DeadlineTooNear)
        );
    }

    #[test]
    fn jitter_and_backoff_above_a_hint_leave_the_attempt_half_of_the_time_to_the_deadline() {
        let long = Backoff::constant(Duration::from_secs(9)).without_jitter();
        for delays in [DelaySource::Backoff(Backoff::default()), DelaySource::Backoff(long)] {
            let policy = RetryPolicy { delays, ..RetryPolicy::new() };
            for (hint, left_ms) in [(0, 1010), (2, 3010), (9, 10_010)] {
                let left = Some(Duration::from_millis(left_ms));
                let delays = drawn_delays(DecisionInput { left, ..hinted(hint) }, &policy);
                let max = hint as f64 + 0.5;
                assert!(
                    delays.iter().all(|delay| (hint as f64..=max).contains(delay)),
                    "{delays:?}"
                );
            }
        }
    }

    #[test]
    fn maximum_wait_cuts_the_backoff_also_where_there_is_a_hint() {
        let delays =
            DelaySource::Backoff(Backoff::constant(Duration::from_secs(60)).without_jitter());
        let policy =
            RetryPolicy { delays, max_wait: Some(Duration::from_secs(5)), ..RetryPolicy::new() };
        for hint in [0, 1, 5] {
            assert_eq!(drawn_delays(hinted(hint), &policy)[0], 5.0, "{hint}");
        }
    }

    #[test]
    fn inner_rejection_ends_the_call_unless_waiting_is_enabled() {
        let outcome = Outcome::cancelled().because(Reason::Rejected);
        let class = RetryAction::Forbidden(GiveUpReason::Rejected);
        let hinted = outcome.with_retry_after(Duration::from_secs(1));
        let (default, waiting) =
            (RetryPolicy::new(), RetryPolicy { wait_on_rejection: true, ..RetryPolicy::new() });
        for left in [None, Some(Duration::from_secs(9))] {
            let stop = |policy: &RetryPolicy, outcome| {
                let class = policy.classify_rejection(class, outcome);
                decide(&DecisionInput { class, outcome, left, ..INPUT }, policy, &mut None).err()
            };
            assert_eq!(stop(&default, hinted), Some(GiveUpReason::Rejected), "{left:?}");
            assert_eq!(stop(&waiting, outcome), Some(GiveUpReason::Rejected), "{left:?}");
            assert_eq!(stop(&waiting, hinted), None, "{left:?}");
        }
    }
}
