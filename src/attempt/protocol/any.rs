//! Requests and responses of any type, with a closure that classifies results.

use std::{
    fmt,
    task::{Context, Poll},
    time::Duration,
};

use super::super::{
    give_up::GiveUpReason,
    hedged::Hedged,
    record::Attempts,
    verdict::{BodyReplay, RetryAction, SafeRequests},
};
use super::{ClassifyAttempt, Numbered, Replay, ReplayRequest, Rules};
use crate::{
    classify::Classify,
    outcome::{Outcome, OutcomeKind, Rejected, http as rule},
};

impl<C, Req> ReplayRequest<Req> for Classify<C>
where
    C: Clone + Send + Sync + 'static,
    Req: Replay,
{
    type Request = Req;
    type Kept = Req::Kept;

    #[inline]
    fn keep(request: &Req, rules: Rules<'_>) -> Option<Req::Kept> {
        if rules.never { None } else { request.keep() }
    }

    #[inline]
    fn first(request: Req, _: Option<&mut Req::Kept>, _: Rules<'_>) -> Req {
        request
    }

    fn again(kept: &Req::Kept, _: Numbered) -> Req {
        Req::again(kept)
    }

    fn hedge_attempt(kept: &Req::Kept, _: u32) -> Req {
        Req::again(kept)
    }

    fn safe(_: &Req::Kept, _: &SafeRequests) -> bool {
        true
    }

    fn repeatable(_: &Req::Kept) -> BodyReplay {
        BodyReplay::Yes
    }

    fn claim(_: &Req::Kept) -> bool {
        true
    }
}

/// A result of any type, and its class.
pub struct PendingResult<Res, E> {
    result: Result<Res, E>,
    weight: (RetryAction, Outcome),
}

/// Omits the result: the `Debug` output of a response contains its headers.
impl<Res, E> fmt::Debug for PendingResult<Res, E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PendingResult").field("weight", &self.weight).finish_non_exhaustive()
    }
}

// No code pins the result in place.
impl<Res, E> Unpin for PendingResult<Res, E> {}

impl<C, Res, E> ClassifyAttempt<Res, E> for Classify<C>
where
    C: for<'a> Fn(Result<&'a Res, &'a E>) -> Outcome,
    E: 'static,
{
    type Response = Res;
    type Error = E;
    type Held = PendingResult<Res, E>;

    const PATIENCE: Duration = Duration::ZERO;

    #[inline]
    fn weigh(&self, _: bool, result: &Result<Res, E>) -> Option<(RetryAction, Outcome)> {
        // A rejection by a timeout ended an attempt in flight. The closure classifies it like any other error. Any
        // other rejection ends the call.
        let refused = result.as_ref().err().and_then(Rejected::find_in_any);
        if let Some(refused) = refused.filter(|refused| !refused.is_timeout()) {
            return Some((
                RetryAction::Refused(GiveUpReason::Rejected),
                rule::of_rejected(refused),
            ));
        }
        let outcome = (self.0)(result.as_ref());
        let class = match outcome.kind() {
            OutcomeKind::Cancelled if outcome.is_housekeeping() => RetryAction::Retryable,
            OutcomeKind::Failure | OutcomeKind::Throttled => RetryAction::Retryable,
            OutcomeKind::Success | OutcomeKind::Cancelled => RetryAction::Final,
        };
        Some((class, outcome))
    }

    #[inline]
    fn give(result: Result<Res, E>) -> Result<Res, E> {
        result
    }

    fn hold(
        result: Result<Res, E>,
        weight: Option<(RetryAction, Outcome)>,
    ) -> PendingResult<Res, E> {
        // `weigh` always returns a class here, so this is never the default.
        let weight = weight.unwrap_or((RetryAction::Final, Outcome::success()));
        PendingResult { result, weight }
    }

    fn poll_weigh(
        held: &mut PendingResult<Res, E>,
        _: &mut Context<'_>,
    ) -> Poll<(RetryAction, Outcome)> {
        Poll::Ready(held.weight)
    }

    fn is_error(held: &PendingResult<Res, E>) -> bool {
        held.result.is_err()
    }

    fn has_inner_attempts(held: &PendingResult<Res, E>) -> bool {
        held.result.as_ref().err().and_then(rule::known).is_some_and(Attempts::is_in)
    }

    fn poll_discard(_: &mut PendingResult<Res, E>, _: u64, _: &mut Context<'_>) -> Poll<()> {
        Poll::Ready(())
    }

    fn release(held: PendingResult<Res, E>, _: Option<Attempts>) -> Result<Res, E> {
        held.result
    }

    fn broken(error: E, _: Attempts) -> E {
        error
    }

    fn pass(held: PendingResult<Res, E>, _: Option<Hedged>) -> Result<Res, E> {
        held.result
    }

    fn error(error: E) -> E {
        error
    }
}
