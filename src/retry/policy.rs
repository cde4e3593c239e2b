//! The decision after one failed attempt: pure, in the one order that is right.

use std::{fmt, time::Duration};

use super::backoff::Backoff;
use crate::call::{Outcome, Reason};

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
    pub(super) most: u32,
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
pub(super) fn decide(
    facts: &Facts,
    backoff: &Backoff,
    longest_wait: Duration,
) -> Result<Again, Stop> {
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
    if !facts.safe && !unsent {
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
            n => backoff.delay(n),
        };
        return Ok(Again { wait, transparent: true });
    }
    if facts.made - facts.transparent >= facts.most {
        return Err(Stop::AttemptsUsedUp);
    }
    let hint = facts.outcome.retry_after();
    if hint.is_some_and(|hint| hint > longest_wait) {
        return Err(Stop::WaitTooLong);
    }
    let wait = wait(backoff, facts.made - facts.transparent, hint);
    Ok(Again { wait: wait.min(longest_wait), transparent: false })
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
        most: 3,
    };

    fn stop(facts: Facts) -> Option<Stop> {
        decide(&facts, &Backoff::default(), Duration::from_secs(30)).err()
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
    fn transparent_repeats_are_free_and_bounded() {
        let refused = Facts { outcome: because(Reason::RefusedStream), most: 1, ..FACTS };
        let again = |made, transparent| {
            decide(
                &Facts { made, transparent, ..refused },
                &Backoff::default(),
                Duration::from_secs(30),
            )
        };
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
        let backoff = Backoff::default();
        for _ in 0..100 {
            let again = decide(&told(10), &backoff, Duration::from_secs(30)).unwrap();
            assert!((10.0..=15.0).contains(&again.wait.as_secs_f64()), "{again:?}");
        }
        assert_eq!(stop(told(31)), Some(Stop::WaitTooLong));
    }
}
