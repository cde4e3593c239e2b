//! The decision after one failed attempt: pure, in the one order that is right.

use std::{fmt, time::Duration};

use super::backoff::Backoff;
use crate::call::{Outcome, Reason, grpc};

/// What a retry layer is set to, and is asked for only when an attempt has failed.
#[derive(Clone, Debug)]
pub(super) struct Policy {
    pub(super) attempts: u32,
    pub(super) backoff: Backoff,
    pub(super) longest_wait: Duration,
    pub(super) drain_cap: u64,
    pub(super) safe: Safe,
    /// A gRPC status that says "not done" is believed, whatever the method.
    pub(super) trust_grpc: bool,
}

impl Policy {
    pub(super) const fn new() -> Self {
        Self {
            attempts: 3,
            backoff: Backoff::exponential(Duration::from_millis(50)),
            longest_wait: Duration::from_secs(30),
            drain_cap: 64 * 1024,
            safe: Safe::Idempotent,
            trust_grpc: false,
        }
    }

    /// Whether an unsafe method may be repeated for what the server said.
    fn trusts(&self, outcome: Outcome) -> bool {
        self.trust_grpc
            && outcome.reason() == Reason::GrpcStatus
            && matches!(outcome.code(), Some(grpc::UNAVAILABLE | grpc::RESOURCE_EXHAUSTED))
    }
}

/// Which requests may be repeated although they may have had an effect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Safe {
    /// By method (RFC 9110 §9.2.2), or by key.
    Idempotent,
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
    /// Of those, how many were repeated transparently.
    pub(super) transparent: u32,
}

/// Why there is no further attempt. A closed set, so that it can be a metric's label.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Stop {
    /// The answer is not one to retry.
    Answered,
    /// The server said not to retry: a negative or unreadable `grpc-retry-pushback-ms`.
    Pushback,
    /// A layer of this crate refused the attempt: an open circuit, a full limit.
    Rejected,
    /// It may have had an effect, and the method is not safe to repeat.
    Unsafe,
    /// The request body is still being sent.
    StillSending,
    /// The request body cannot be sent again: over the cap, or not to be copied.
    BodyGone,
    /// All attempts are used up.
    AttemptsUsedUp,
    /// The server asked for a longer wait than is allowed.
    WaitTooLong,
    /// The retry budget is used up.
    BudgetUsedUp,
    /// The wrapped service failed before it was called: its `poll_ready` did.
    NotReady,
    /// The layer's configuration is wrong: it never retries.
    Misconfigured,
}

impl Stop {
    /// The reason in `snake_case`, as events have it.
    #[must_use]
    pub const fn as_str(&self) -> &'static str {
        match self {
            Self::Answered => "answered",
            Self::Pushback => "pushback",
            Self::Rejected => "rejected",
            Self::Unsafe => "unsafe",
            Self::StillSending => "still_sending",
            Self::BodyGone => "body_gone",
            Self::AttemptsUsedUp => "attempts_used_up",
            Self::WaitTooLong => "wait_too_long",
            Self::BudgetUsedUp => "budget_used_up",
            Self::NotReady => "not_ready",
            Self::Misconfigured => "misconfigured",
        }
    }
}

impl fmt::Display for Stop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Another attempt is right, if the budget says so too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Again {
    pub(super) wait: Duration,
    /// Never seen by a server: not charged to the budget.
    pub(super) transparent: bool,
}

/// Transparent repeats of one call beyond this count like any other retry.
const MOST_TRANSPARENT: u32 = 2;

/// The server asks, the backoff jitters: a hint is a lower bound with jitter upward, so that those who
/// were told the same second do not come back in it. Half of the hint at least (as Envoy's).
fn wait(backoff: &Backoff, retry: u32, hint: Option<Duration>) -> Duration {
    match hint {
        None => backoff.delay(retry),
        Some(hint) => {
            let spread = (hint / 2).max(backoff.cap(retry));
            hint.saturating_add(spread.mul_f64(fastrand::f64()))
        }
    }
}

/// Whether to try again, and when. The budget is asked after this, so that it is never charged for a
/// retry that another rule refuses.
pub(super) fn decide(facts: &Facts, policy: &Policy) -> Result<Again, Stop> {
    // An explicit no.
    if let Class::Refused(stop) = facts.class {
        return Err(stop);
    }
    let reason = facts.outcome.reason();
    // Never left the client, or never looked at by the server (RFC 9113 §6.8, §8.7): any method.
    let unseen = matches!(reason, Reason::NeverSent | Reason::RefusedStream | Reason::GoAway);
    let unsent = unseen
        || matches!(
            reason,
            Reason::ConnectRefused | Reason::ConnectTimeout | Reason::ConnectFailed
        );
    if facts.class == Class::Final {
        return Err(Stop::Answered);
    }
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
    if unseen && facts.transparent < MOST_TRANSPARENT {
        // The first at once; one that is refused again waits like the others.
        let wait = match facts.transparent {
            0 => Duration::ZERO,
            n => policy.backoff.delay(n).min(policy.longest_wait),
        };
        return Ok(Again { wait, transparent: true });
    }
    if facts.made - facts.transparent >= policy.attempts {
        return Err(Stop::AttemptsUsedUp);
    }
    let hint = facts.outcome.retry_after();
    if hint.is_some_and(|hint| hint > policy.longest_wait) {
        return Err(Stop::WaitTooLong);
    }
    let mut wait = wait(&policy.backoff, facts.made - facts.transparent, hint);
    if hint.is_none() {
        wait = wait.min(policy.longest_wait);
    }
    Ok(Again { wait, transparent: false })
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
        transparent: 0,
    };

    fn stop(facts: Facts) -> Option<Stop> {
        decide(&facts, &Policy::new()).err()
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
        let stop = |outcome| decide(&Facts { safe: false, outcome, ..FACTS }, &grpc).err();
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
    fn transparent_repeats_are_free_and_bounded() {
        let refused = Facts { outcome: because(Reason::RefusedStream), ..FACTS };
        let once = Policy { attempts: 1, ..Policy::new() };
        let again = |made, transparent| decide(&Facts { made, transparent, ..refused }, &once);
        let first = again(1, 0).unwrap();
        assert_eq!(first, Again { wait: Duration::ZERO, transparent: true });
        assert!(again(2, 1).unwrap().transparent);
        assert_eq!(again(3, 2), Err(Stop::AttemptsUsedUp));
    }

    #[test]
    fn a_hint_is_a_lower_bound_and_one_too_long_ends_it() {
        let told = |secs| Facts {
            outcome: Outcome::throttled().with_retry_after(Duration::from_secs(secs)),
            ..FACTS
        };
        for secs in [10, 30] {
            let waits: Vec<_> =
                (0..100).map(|_| decide(&told(secs), &Policy::new()).unwrap().wait).collect();
            let hint = Duration::from_secs(secs);
            assert!(waits.iter().all(|&wait| wait >= hint && wait <= hint * 3 / 2), "{waits:?}");
            // Also at the longest wait: cut there, all would come back at once.
            assert!(waits.iter().any(|&wait| wait > hint * 5 / 4), "{waits:?}");
        }
        assert_eq!(stop(told(31)), Some(Stop::WaitTooLong));
    }
}
