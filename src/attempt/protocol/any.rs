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
    verdict::{BodyReplay, Classified, RetryAction, SafeRequests},
};
use super::traits::{AttemptNumber, ClassifyAttempt, Replay, ReplayRequest, SaveRules};
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
    type Saved = Req::Saved;

    #[inline]
    fn save(request: &Req, rules: SaveRules<'_>) -> Option<Req::Saved> {
        if rules.is_off { None } else { request.save() }
    }

    #[inline]
    fn first_attempt(request: Req, _: Option<&mut Req::Saved>, _: SaveRules<'_>) -> Req {
        request
    }

    fn replay(saved: &Req::Saved, _: AttemptNumber) -> Req {
        Req::replay(saved)
    }

    fn hedge_attempt(saved: &Req::Saved, _: u32) -> Req {
        Req::replay(saved)
    }

    fn is_safe(_: &Req::Saved, _: &SafeRequests) -> bool {
        true
    }

    fn body_replay(_: &Req::Saved) -> BodyReplay {
        BodyReplay::Yes
    }

    fn take_over(_: &Req::Saved) -> bool {
        true
    }
}

/// A result of any type, and its class.
pub struct PendingResult<Res, E> {
    result: Result<Res, E>,
    classified: Classified,
}

/// Omits the result: the `Debug` output of a response contains its headers.
impl<Res, E> fmt::Debug for PendingResult<Res, E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PendingResult")
            .field("classified", &self.classified)
            .finish_non_exhaustive()
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
    type Pending = PendingResult<Res, E>;

    const MAX_FIRST_FRAME_WAIT: Duration = Duration::ZERO;

    #[inline]
    fn classify(&self, _: bool, result: &Result<Res, E>) -> Option<Classified> {
        // A rejection by a timeout ended an attempt in flight. The closure classifies it like any other error. Any
        // other rejection ends the call.
        let rejected = result.as_ref().err().and_then(Rejected::find_in_any);
        if let Some(rejected) = rejected.filter(|rejected| !rejected.is_timeout()) {
            return Some((
                RetryAction::Forbidden(GiveUpReason::Rejected),
                rule::of_rejected(rejected),
            ));
        }
        let outcome = (self.0)(result.as_ref());
        let class = match outcome.kind() {
            OutcomeKind::Cancelled if outcome.is_housekeeping() => RetryAction::Retry,
            OutcomeKind::Failure | OutcomeKind::Throttled => RetryAction::Retry,
            OutcomeKind::Success | OutcomeKind::Cancelled => RetryAction::Done,
        };
        Some((class, outcome))
    }

    #[inline]
    fn return_first(result: Result<Res, E>) -> Result<Res, E> {
        result
    }

    fn pending(result: Result<Res, E>, classified: Option<Classified>) -> PendingResult<Res, E> {
        // `classify` always returns a class here, so this is never the default.
        let classified = classified.unwrap_or((RetryAction::Done, Outcome::success()));
        PendingResult { result, classified }
    }

    fn poll_classify(pending: &mut PendingResult<Res, E>, _: &mut Context<'_>) -> Poll<Classified> {
        Poll::Ready(pending.classified)
    }

    fn is_error(pending: &PendingResult<Res, E>) -> bool {
        pending.result.is_err()
    }

    fn has_inner_attempts(pending: &PendingResult<Res, E>) -> bool {
        pending.result.as_ref().err().and_then(rule::known).is_some_and(Attempts::is_in)
    }

    fn poll_discard(_: &mut PendingResult<Res, E>, _: u64, _: &mut Context<'_>) -> Poll<()> {
        Poll::Ready(())
    }

    fn return_recorded(pending: PendingResult<Res, E>, _: Option<Attempts>) -> Result<Res, E> {
        pending.result
    }

    fn readiness_error(error: E, _: Attempts) -> E {
        error
    }

    fn return_hedged(pending: PendingResult<Res, E>, _: Option<Hedged>) -> Result<Res, E> {
        pending.result
    }

    fn inner_error(error: E) -> E {
        error
    }
}
