//! The decision after one failed attempt: pure, in the one order that is right.

use std::{sync::Arc, time::Duration};

use http::Method;

use super::{
    backoff::Backoff,
    rules::{FailureKind, PerKind, Say},
    series::{Series, Waits},
    stop::Stop,
};
use crate::call::{Outcome, Reason, grpc};

/// What a retry layer is set to, and is asked for only when an attempt has failed.
#[derive(Clone, Debug)]
pub(super) struct Policy {
    pub(super) name: Option<Arc<str>>,
    pub(super) attempts: u32,
    /// How many retries one kind of failure may have.
    pub(super) limits: PerKind<Option<u32>>,
    pub(super) waits: Waits,
    pub(super) longest_wait: Duration,
    pub(super) hint: Hint,
    /// The maximum number of transparent retries of one call. They are immediate, and neither counted as attempts nor
    /// charged to the budget.
    pub(super) max_transparent: u32,
    /// What is left of a deadline after the wait is at least so much, or there is no attempt.
    pub(super) least_attempt: Duration,
    pub(super) drain_cap: u64,
    pub(super) say: Say,
    pub(super) safe: Safe,
    /// A gRPC status that says "not done" is believed, whatever the method.
    pub(super) trust_grpc: bool,
}

/// The default of `max_transparent`, enough to pass every stale connection of a small pool.
pub(super) const MAX_TRANSPARENT: u32 = 5;

impl Policy {
    pub(super) fn new() -> Self {
        Self {
            name: None,
            attempts: 3,
            limits: [None; 8],
            waits: Waits::Backoff(Backoff::default()),
            longest_wait: Duration::from_secs(30),
            hint: Hint::Least,
            max_transparent: MAX_TRANSPARENT,
            least_attempt: Duration::from_millis(10),
            say: Say::default(),
            drain_cap: 64 * 1024,
            safe: Safe::Idempotent,
            trust_grpc: false,
        }
    }

    #[cfg_attr(not(feature = "tracing"), allow(dead_code))] // Only events tell it.
    pub(super) fn name(&self) -> &str {
        self.name.as_deref().unwrap_or_default()
    }

    /// Returns whether a retry for this outcome is transparent. `before` is the number of transparent retries that the
    /// call has had.
    pub(super) fn is_transparent(&self, outcome: Outcome, before: u32) -> bool {
        let unprocessed = FailureKind::of(outcome) == FailureKind::Unseen;
        (unprocessed || outcome.is_housekeeping()) && before < self.max_transparent
    }

    /// Whether an unsafe method may be repeated for what the server said.
    fn trusts(&self, outcome: Outcome) -> bool {
        self.trust_grpc
            && outcome.reason() == Reason::GrpcStatus
            && matches!(outcome.code(), Some(grpc::UNAVAILABLE | grpc::RESOURCE_EXHAUSTED))
    }

    /// The server asks, the backoff jitters: where nothing else is set, a hint is a lower bound with jitter upward, so that those who
    /// were told the same second do not come back in it. Half of the hint at least (as Envoy's).
    fn wait(&self, own: Duration, hint: Option<Duration>) -> Result<Duration, Stop> {
        let Some(hint) = hint else { return Ok(own.min(self.longest_wait)) };
        let jitter = if self.waits.has_jitter() { fastrand::f64() } else { 0.0 };
        let told = |spread: Duration| hint.saturating_add(spread.mul_f64(jitter));
        match self.hint {
            Hint::Within(reach) => {
                Ok(told(hint / 2).clamp(own, own.saturating_add(reach)).min(self.longest_wait))
            }
            _ if hint > self.longest_wait => Err(Stop::WaitTooLong),
            Hint::Exact => Ok(hint),
            Hint::AndHalf => Ok(told(hint / 2)),
            Hint::Least => {
                let left = self.longest_wait - hint;
                let short = hint.saturating_mul(5).min(SPREAD).min(left);
                Ok(told(short.max(hint / 2)).max(hint.saturating_add(own)))
            }
        }
    }
}

/// What a short hint is spread over: within half a second, 20 of 100 would still come in the same 100 ms.
const SPREAD: Duration = Duration::from_secs(5);

/// What a server's hint is to a wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Hint {
    /// A lower bound.
    Least,
    /// It moves what the backoff says by so much at most.
    Within(Duration),
    /// A lower bound, and up to half of it on top.
    AndHalf,
    /// The wait.
    Exact,
}

/// Which requests may be repeated although they may have had an effect.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Safe {
    /// By method (RFC 9110 §9.2.2), or by key.
    Idempotent,
    /// These methods, or by key.
    Methods(Arc<[Method]>),
    /// The user's word.
    All,
}

/// What an attempt's end is to a retry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// It is the answer.
    Final,
    /// It may be tried again.
    Retryable,
    /// What was called, or a layer further in, said no to a retry.
    Refused(Stop),
}

/// Whether a request's body can be sent again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Repeatable {
    /// Yes.
    Yes,
    /// The attempt before is still reading it, or has not let go of it.
    Streaming,
    /// It was over the cap, cannot be copied, or broke off.
    No,
}

/// All that the decision knows.
#[derive(Clone, Copy, Debug)]
pub(super) struct Facts {
    pub(super) class: Class,
    pub(super) outcome: Outcome,
    /// By method, by key, or because the user said so.
    pub(super) safe: bool,
    pub(super) body: Repeatable,
    /// Attempts made so far, this one included.
    pub(super) made: u32,
    /// A retry for this outcome is transparent.
    pub(super) is_transparent: bool,
    /// How many of them were followed by a transparent retry.
    pub(super) transparent: u32,
    /// Retries made so far, by what they were for.
    pub(super) of_kind: PerKind<u32>,
    /// How long until the deadline, if there is one.
    pub(super) left: Option<Duration>,
}

/// Another attempt is right, if the budget says so too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Again {
    pub(super) wait: Duration,
    /// The retry neither counts as an attempt nor is charged to the budget.
    pub(super) transparent: bool,
    /// As what it is charged to the budget; none: it is not.
    pub(super) charge: Option<FailureKind>,
    pub(super) kind: FailureKind,
}

/// Whether to try again, and when. The budget is asked after this, so that it is never charged for a
/// retry that another rule refuses.
pub(super) fn decide(
    facts: &Facts,
    policy: &Policy,
    series: &mut Option<Series>,
) -> Result<Again, Stop> {
    let reason = facts.outcome.reason();
    let hint = facts.outcome.retry_after();
    let rejected = reason == Reason::Rejected;
    match facts.class {
        // Worth waiting for only if it is known for how long, and that somebody has so long.
        Class::Refused(Stop::Rejected) if hint.is_some() && facts.left.is_some() => {}
        // An explicit no.
        Class::Refused(stop) => return Err(stop),
        Class::Final => return Err(Stop::Answered),
        Class::Retryable => {}
    }
    let kind = FailureKind::of(facts.outcome);
    // Never left the client, or never looked at by the server (RFC 9113 §6.8, §8.7): any method.
    let unsent = !kind.may_be_seen();
    if !facts.safe && !unsent && !policy.trusts(facts.outcome) {
        return Err(Stop::Unsafe);
    }
    // Its stream is gone: whoever still holds the body only has not let go of it yet.
    let over = unsent || matches!(reason, Reason::Reset | Reason::StaleConnection);
    match facts.body {
        Repeatable::Yes => {}
        Repeatable::Streaming if over => {}
        Repeatable::Streaming => return Err(Stop::StillSending),
        Repeatable::No => return Err(Stop::BodyGone),
    }
    // Connection housekeeping carries no information about the server, and the next connection may work.
    let transparent = facts.is_transparent;
    if !transparent && facts.made - facts.transparent >= policy.attempts {
        return Err(Stop::AttemptsUsedUp);
    }
    if policy.limits[kind as usize].is_some_and(|most| facts.of_kind[kind as usize] >= most) {
        return Err(Stop::KindUsedUp);
    }
    let wait = if transparent {
        Duration::ZERO
    } else {
        let waits = series.get_or_insert_with(|| policy.waits.begin());
        let throttled = kind == FailureKind::Throttled;
        let own = waits.next(throttled).ok_or(Stop::AttemptsUsedUp)?;
        // gRFC A6: after a pushback the backoff begins anew.
        if hint.is_some() && reason == Reason::GrpcStatus {
            waits.begin_anew();
        }
        policy.wait(own, hint)?
    };
    // What is tried is also to be of use.
    if facts.left.is_some_and(|left| wait.saturating_add(policy.least_attempt) > left) {
        return Err(if rejected { Stop::Rejected } else { Stop::DeadlineTooNear });
    }
    Ok(Again { wait, charge: (!transparent && !rejected).then_some(kind), transparent, kind })
}

#[cfg(test)]
mod tests {
    use super::*;

    const FACTS: Facts = Facts {
        class: Class::Retryable,
        outcome: Outcome::failure(),
        safe: true,
        body: Repeatable::Yes,
        made: 1,
        is_transparent: false,
        transparent: 0,
        of_kind: [0; 8],
        left: None,
    };

    fn stop(facts: Facts) -> Option<Stop> {
        decide(&facts, &Policy::new(), &mut None).err()
    }

    fn because(reason: Reason) -> Outcome {
        Outcome::failure().because(reason)
    }

    /// Each case would be stopped by every rule after its own, too: the order is what is shown.
    #[test]
    fn the_first_rule_that_says_no_is_the_one_told() {
        let mut facts = Facts { made: 3, ..FACTS };
        assert_eq!(stop(facts), Some(Stop::AttemptsUsedUp));
        facts.body = Repeatable::No;
        assert_eq!(stop(facts), Some(Stop::BodyGone));
        facts.body = Repeatable::Streaming;
        assert_eq!(stop(facts), Some(Stop::StillSending));
        facts.safe = false;
        assert_eq!(stop(facts), Some(Stop::Unsafe));
        facts.class = Class::Final;
        assert_eq!(stop(facts), Some(Stop::Answered));
        facts.class = Class::Refused(Stop::Rejected);
        assert_eq!(stop(facts), Some(Stop::Rejected));
    }

    #[test]
    fn what_was_never_sent_is_safe_for_any_method() {
        let unsafe_one = Facts { safe: false, ..FACTS };
        assert_eq!(
            stop(Facts { outcome: because(Reason::Reset), ..unsafe_one }),
            Some(Stop::Unsafe)
        );
        let stale = because(Reason::StaleConnection);
        assert_eq!(stop(Facts { outcome: stale, ..unsafe_one }), Some(Stop::Unsafe));
        for reason in [
            Reason::ConnectRefused,
            Reason::ConnectFailed,
            Reason::ConnectTimeout,
            Reason::NeverSent,
            Reason::RefusedStream,
            Reason::GoAway,
        ] {
            assert_eq!(stop(Facts { outcome: because(reason), ..unsafe_one }), None, "{reason:?}");
        }
    }

    #[test]
    fn grpc_believes_a_status_that_says_not_done_and_nothing_else() {
        let grpc = Policy { trust_grpc: true, ..Policy::new() };
        let stop =
            |outcome| decide(&Facts { safe: false, outcome, ..FACTS }, &grpc, &mut None).err();
        let status = |code| because(Reason::GrpcStatus).with_code(code);
        assert_eq!(stop(status(grpc::UNAVAILABLE)), None);
        assert_eq!(stop(status(grpc::RESOURCE_EXHAUSTED)), None);
        for outcome in [
            status(4),
            because(Reason::Status).with_code(14),
            because(Reason::Timeout),
            because(Reason::Reset),
        ] {
            assert_eq!(stop(outcome), Some(Stop::Unsafe), "{outcome:?}");
        }
    }

    #[test]
    fn transparent_retries_are_immediate_uncharged_and_bounded() {
        let policy = Policy { attempts: 1, ..Policy::new() };
        for outcome in [
            Outcome::cancelled().because(Reason::NeverSent),
            Outcome::cancelled().because(Reason::RefusedStream),
            Outcome::cancelled().because(Reason::GoAway),
            Outcome::cancelled().because(Reason::StaleConnection),
            Outcome::cancelled().because(Reason::Reset),
            // A GOAWAY with an error code.
            because(Reason::GoAway),
        ] {
            let again = |made, transparent| {
                let is_transparent = policy.is_transparent(outcome, transparent);
                let facts = Facts { outcome, made, is_transparent, transparent, ..FACTS };
                decide(&facts, &policy, &mut None)
            };
            for retries in 0..5 {
                let again = again(retries + 1, retries).unwrap();
                let found = (again.wait, again.transparent, again.charge);
                assert_eq!(found, (Duration::ZERO, true, None), "{outcome:?}");
            }
            assert_eq!(again(6, 5).err(), Some(Stop::AttemptsUsedUp), "{outcome:?}");
        }
    }

    #[test]
    fn housekeeping_beyond_the_transparent_retries_follows_the_ordinary_rules() {
        let waits = Backoff::constant(Duration::from_millis(50)).without_jitter();
        let policy = Policy { waits: Waits::Backoff(waits), ..Policy::new() };
        let outcome = Outcome::cancelled().because(Reason::StaleConnection);
        let facts = Facts { outcome, made: 6, transparent: 5, ..FACTS };
        let again = decide(&facts, &policy, &mut None).unwrap();
        assert_eq!(again.wait, Duration::from_millis(50));
        assert_eq!((again.transparent, again.charge), (false, Some(FailureKind::Read)));
    }

    #[test]
    fn a_reset_that_is_a_failure_waits_and_is_charged() {
        let waits = Backoff::constant(Duration::from_millis(50)).without_jitter();
        let policy = Policy { waits: Waits::Backoff(waits), ..Policy::new() };
        let facts = Facts { outcome: because(Reason::Reset), ..FACTS };
        let again = decide(&facts, &policy, &mut None).unwrap();
        assert_eq!(again.wait, Duration::from_millis(50));
        assert_eq!((again.transparent, again.charge), (false, Some(FailureKind::Read)));
    }

    #[test]
    fn a_hint_is_a_lower_bound_and_one_too_long_ends_it() {
        let told = |secs| Facts {
            outcome: Outcome::throttled().with_retry_after(Duration::from_secs(secs)),
            ..FACTS
        };
        for (secs, most) in [(1, 6), (10, 15), (30, 45)] {
            let waits: Vec<_> = (0..100)
                .map(|_| decide(&told(secs), &Policy::new(), &mut None).unwrap().wait)
                .collect();
            let (hint, most) = (Duration::from_secs(secs), Duration::from_secs(most));
            assert!(waits.iter().all(|&wait| wait >= hint && wait <= most), "{waits:?}");
            // Also at the longest wait: cut there, all would come back at once.
            assert!(waits.iter().any(|&wait| wait > (hint + most) / 2), "{waits:?}");
        }
        assert_eq!(stop(told(31)), Some(Stop::WaitTooLong));
    }
}
