//! What stands between the limit and its algorithm: the clock, the lock, and what is worth hearing.

use std::{
    mem,
    ops::RangeInclusive,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::time::Instant;

use super::{Algorithm, Change, Reason, Sample};
use crate::{
    call::{
        COUNT_CANCELLED_AFTER, Clock, Measures, Outcome, OutcomeKind, Reason as Why, Token,
        UpstreamClock, nanos,
    },
    event,
};

/// The value of `count_cancelled_after` with which no call that its caller ended counts.
const NEVER: u64 = u64::MAX;

#[derive(Debug)]
pub(in crate::limit) struct Teller {
    clock: Clock,
    to_the_end: AtomicBool,
    /// In nanoseconds, or [`NEVER`].
    count_cancelled_after: AtomicU64,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    algorithm: Box<dyn Algorithm>,
    last: Option<Change>,
}

/// A call that has been heard, or that nobody listens to.
const HEARD: u64 = 0;

impl Teller {
    pub(in crate::limit) fn new(algorithm: impl Algorithm) -> Self {
        let state = State { algorithm: Box::new(algorithm), last: None };
        Self {
            clock: Clock::new(),
            to_the_end: AtomicBool::new(false),
            count_cancelled_after: AtomicU64::new(nanos(COUNT_CANCELLED_AFTER)),
            state: Mutex::new(state),
        }
    }

    pub(in crate::limit) fn set_count_cancelled_after(&self, time: Option<Duration>) {
        self.count_cancelled_after.store(time.map_or(NEVER, nanos), Ordering::Relaxed);
    }

    pub(in crate::limit) fn count_cancelled_after(&self) -> Option<Duration> {
        match self.count_cancelled_after.load(Ordering::Relaxed) {
            NEVER => None,
            time => Some(Duration::from_nanos(time)),
        }
    }

    pub(in crate::limit) fn measures(&self) -> Measures {
        if self.to_the_end.load(Ordering::Relaxed) { Measures::Body } else { Measures::Head }
    }

    pub(in crate::limit) fn until_body_end(&self) {
        self.to_the_end.store(true, Ordering::Relaxed);
    }

    pub(in crate::limit) fn last(&self) -> Option<Change> {
        self.lock().last
    }

    /// The algorithm goes on from this limit, or the nearest it allows; `apply` runs before anybody else can change it.
    pub(in crate::limit) fn set_limit(&self, limit: u32, apply: impl FnOnce(u32)) {
        let mut state = self.lock();
        state.algorithm.set_limit(limit);
        let limit = state.algorithm.limit().max(1);
        state.last = Some(Change { limit, reason: Reason::ByHand });
        apply(limit);
    }

    /// [`set_limit`](Self::set_limit), for the bounds. False if the algorithm has none.
    pub(in crate::limit) fn set_bounds(
        &self,
        bounds: RangeInclusive<u32>,
        apply: impl FnOnce(u32),
    ) -> bool {
        let mut state = self.lock();
        let before = state.algorithm.limit();
        let has_any = state.algorithm.set_bounds(bounds);
        let limit = state.algorithm.limit().max(1);
        if limit != before {
            state.last = Some(Change { limit, reason: Reason::ByHand });
            apply(limit);
        }
        has_any
    }

    /// A call is let in, as one of so many.
    #[inline]
    pub(in crate::limit) fn started(&self, in_flight: u32) -> Token {
        Token { tag: in_flight.into(), clock: UpstreamClock::start() }
    }

    /// Records a call at its response head, unless latency is measured to the end of the body.
    ///
    /// If the trailers decide the outcome, the call is recorded at its end, with the latency to its head.
    pub(in crate::limit) fn head(
        &self,
        token: &mut Token,
        so_far: Outcome,
        apply: impl FnOnce(u32),
    ) -> bool {
        if self.to_the_end.load(Ordering::Relaxed) {
            return false;
        }
        if so_far.kind() == OutcomeKind::Cancelled {
            if token.tag != HEARD && !token.clock.is_off() {
                token.clock.stop(Instant::now());
            }
            return false;
        }
        let heard = mem::replace(&mut token.tag, HEARD);
        self.hear(Token { tag: heard, ..*token }, so_far, apply)
    }

    /// Records a call that has reached the measured point, and returns whether the limit changed. `apply` runs before
    /// another call can change the limit. A call whose request has not been sent is not a sample, unless connecting
    /// timed out.
    pub(in crate::limit) fn hear(
        &self,
        token: Token,
        outcome: Outcome,
        apply: impl FnOnce(u32),
    ) -> bool {
        if token.tag == HEARD {
            return false;
        }
        let Some(dropped) = is_drop(outcome) else { return false };
        let now = Instant::now();
        let latency = match token.clock.elapsed(now) {
            Some(latency) => latency,
            None if outcome.reason() == Why::ConnectTimeout => Duration::ZERO,
            // The clock starts at the admission. If it is off, the request has not been sent, so the time is attributed
            // to the caller.
            None => return false,
        };
        let sample = Sample {
            now: Duration::from_nanos(self.clock.at(now)),
            latency,
            in_flight: u32::try_from(token.tag).unwrap_or(u32::MAX),
            dropped,
        };
        let mut state = self.lock();
        let Some(change) = state.algorithm.hear(&sample) else { return false };
        state.last = Some(change);
        apply(change.limit.max(1));
        drop(state);
        event!(DEBUG, limit = change.limit, reason = change.reason.as_str(), "limit changed");
        true
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether the outcome is a drop; None if it says nothing about how much is too much.
fn is_drop(outcome: Outcome) -> Option<bool> {
    match outcome.kind() {
        OutcomeKind::Success => Some(false),
        OutcomeKind::Throttled => Some(true),
        OutcomeKind::Cancelled => None,
        OutcomeKind::Failure => match (outcome.reason(), outcome.code()) {
            (Why::Timeout | Why::NoResponse | Why::ConnectTimeout, _)
            | (Why::Status, Some(503 | 504))
            | (Why::GrpcStatus, Some(4 | 14)) => Some(true),
            _ => None,
        },
    }
}
