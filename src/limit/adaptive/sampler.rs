//! The connection between a limit and its algorithm: the clock, the lock, and the choice of the calls that are samples.

use std::{
    fmt, mem,
    ops::RangeInclusive,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    time::Duration,
};

use tokio::time::Instant;

use super::algorithm::{Algorithm, ChangeReason, LimitChange, Sample};
use crate::sync::{Mutex, MutexGuard};
use crate::{
    event::{RepeatedEvent, event},
    outcome::{COUNT_CANCELLED_AFTER, LayerKind, Outcome, OutcomeKind, Reason, UpstreamClock},
    permit::{Measures, Token},
    time::{Clock, nanos},
    user_code::catch_panic,
};

/// The value of `count_cancelled_after` that stands for `None`: a call that its caller ended never counts.
const NEVER: u64 = u64::MAX;

/// The algorithm of an adaptive limit, with its clock and settings.
///
/// The tag of a token contains the number of calls in flight at the admission, until the call has been recorded; then
/// [`RECORDED`]. So a call is recorded once, at its head or at its end.
pub(crate) struct Sampler {
    clock: Clock,
    /// Whether latency is measured to the end of the response body.
    measures_body: AtomicBool,
    /// In nanoseconds, or [`NEVER`].
    count_cancelled_after: AtomicU64,
    /// The algorithm is user code and runs under this lock. This cannot be avoided, because it needs `&mut self`. Its
    /// panics are caught.
    state: Mutex<SamplerState>,
    panics: RepeatedEvent,
}

/// An algorithm that can be cloned behind a `Box`.
trait CloneAlgorithm: Algorithm {
    fn clone_boxed(&self) -> Box<dyn CloneAlgorithm>;
}

impl<A: Algorithm + Clone> CloneAlgorithm for A {
    fn clone_boxed(&self) -> Box<dyn CloneAlgorithm> {
        Box::new(self.clone())
    }
}

struct SamplerState {
    algorithm: Box<dyn CloneAlgorithm>,
    last_change: Option<LimitChange>,
    /// The number of changes by reason, in the order of [`ChangeReason::LABELS`].
    changes: [u64; ChangeReason::LABELS.len()],
}

impl SamplerState {
    /// Records a change of the limit and applies it. `apply` stores the limit and returns the previous limit.
    fn step(&mut self, change: LimitChange, apply: impl FnOnce(u32) -> u32) -> LimitStep {
        self.last_change = Some(change);
        self.changes[change.reason.index()] += 1;
        let limit = change.limit.max(1);
        LimitStep { from: apply(limit), limit, reason: change.reason }
    }
}

/// A change of the limit, with the previous limit.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LimitStep {
    pub(crate) from: u32,
    pub(crate) limit: u32,
    pub(crate) reason: ChangeReason,
}

/// The tag of a call that has been recorded, or that is not to be recorded.
const RECORDED: u64 = 0;

impl Sampler {
    pub(in crate::limit) fn new(algorithm: impl Algorithm + Clone) -> Self {
        Self::with(Box::new(algorithm))
    }

    fn with(algorithm: Box<dyn CloneAlgorithm>) -> Self {
        let state = SamplerState { algorithm, last_change: None, changes: Default::default() };
        Self {
            clock: Clock::new(),
            measures_body: AtomicBool::new(false),
            count_cancelled_after: AtomicU64::new(nanos(COUNT_CANCELLED_AFTER)),
            state: Mutex::new(state),
            panics: RepeatedEvent::new(),
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
        if self.measures_body.load(Ordering::Relaxed) { Measures::Body } else { Measures::Head }
    }

    pub(in crate::limit) fn set_until_body_end(&self, on: bool) {
        self.measures_body.store(on, Ordering::Relaxed);
    }

    /// Returns a sampler with a copy of the algorithm and its settings. `None` if the algorithm panicked.
    pub(in crate::limit) fn fork(&self, name: &str) -> Option<Self> {
        let state = self.lock();
        let copy = catch_panic(|| state.algorithm.clone_boxed());
        drop(state);
        self.report_panic(name, copy.is_none());
        // The state of the algorithm contains times of this clock.
        let copy = Self { clock: self.clock, ..Self::with(copy?) };
        copy.set_until_body_end(self.measures() == Measures::Body);
        copy.set_count_cancelled_after(self.count_cancelled_after());
        Some(copy)
    }

    pub(in crate::limit) fn last_change(&self) -> Option<LimitChange> {
        self.lock().last_change
    }

    /// Returns the number of changes by reason, in the order of [`ChangeReason::LABELS`].
    #[cfg(feature = "observe")]
    pub(in crate::limit) fn changes(&self) -> [u64; ChangeReason::LABELS.len()] {
        self.lock().changes
    }

    /// Sets the limit, or the nearest one that the algorithm allows. `apply` runs before another thread can change the
    /// limit, and returns the previous limit. Returns `None` if the algorithm panicked: then the limit keeps its value.
    ///
    /// `name` is the name of the limit for events, here and in the other methods.
    pub(in crate::limit) fn set_limit(
        &self,
        name: &str,
        limit: u32,
        apply: impl FnOnce(u32) -> u32,
    ) -> Option<LimitStep> {
        let mut state = self.lock();
        let algorithm = &mut state.algorithm;
        let set = catch_panic(|| {
            algorithm.set_limit(limit);
            algorithm.limit().max(1)
        });
        let step = set.map(|limit| state.step(LimitChange::by_hand(limit), apply));
        drop(state);
        self.report_panic(name, step.is_none());
        step
    }

    /// Sets the bounds of the limit. Returns whether the algorithm has bounds, and the change of the limit, or `None` if
    /// it panicked: then the limit keeps its value.
    pub(in crate::limit) fn set_bounds(
        &self,
        name: &str,
        bounds: RangeInclusive<u32>,
        apply: impl FnOnce(u32) -> u32,
    ) -> Option<(bool, Option<LimitStep>)> {
        let mut state = self.lock();
        let algorithm = &mut state.algorithm;
        let set = catch_panic(|| {
            let before = algorithm.limit();
            let has_any = algorithm.set_bounds(bounds);
            let limit = algorithm.limit().max(1);
            (has_any, (limit != before).then_some(limit))
        });
        let set = set.map(|(has_any, limit)| {
            (has_any, limit.map(|limit| state.step(LimitChange::by_hand(limit), apply)))
        });
        drop(state);
        self.report_panic(name, set.is_none());
        set
    }

    fn report_panic(&self, name: &str, has_panicked: bool) {
        if let Some(occurrences) = has_panicked.then(|| self.panics.record()).flatten() {
            event!(
                limit,
                ERROR,
                LayerKind::ConcurrencyLimit.as_str(),
                name,
                occurrences = occurrences,
                "adaptive algorithm panicked: the limit keeps its value",
            );
        }
    }

    /// Returns the token of an admitted call. `in_flight` includes the call.
    #[inline]
    pub(in crate::limit) fn start(&self, in_flight: u32) -> Token {
        Token { tag: in_flight.into(), clock: UpstreamClock::start() }
    }

    /// Records a call at its response head, unless latency is measured to the end of the body.
    ///
    /// If the trailers decide the outcome, the call is recorded at its end, with the latency to its head.
    pub(in crate::limit) fn record_head(
        &self,
        name: &str,
        token: &mut Token,
        so_far: Outcome,
        apply: impl FnOnce(u32) -> u32,
    ) -> Option<LimitStep> {
        if self.measures_body.load(Ordering::Relaxed) {
            return None;
        }
        if so_far.kind() == OutcomeKind::Cancelled {
            if token.tag != RECORDED && !token.clock.is_off() {
                token.clock.stop(Instant::now());
            }
            return None;
        }
        let tag = mem::replace(&mut token.tag, RECORDED);
        self.record(name, Token { tag, ..*token }, so_far, apply)
    }

    /// Records a call that has reached the measured point, and returns the change of the limit. `apply` runs before
    /// another call can change the limit. A call whose request has not been sent is not a sample, unless connecting
    /// timed out.
    pub(in crate::limit) fn record(
        &self,
        name: &str,
        token: Token,
        outcome: Outcome,
        apply: impl FnOnce(u32) -> u32,
    ) -> Option<LimitStep> {
        if token.tag == RECORDED {
            return None;
        }
        let dropped = is_drop(outcome)?;
        let now = Instant::now();
        let latency = match token.clock.elapsed(now) {
            Some(latency) => latency,
            None if outcome.reason() == Reason::ConnectTimeout => Duration::ZERO,
            // The clock starts at the admission. If it is off, the request has not been sent, so the time is attributed
            // to the caller.
            None => return None,
        };
        let sample = Sample {
            now: Duration::from_nanos(self.clock.at(now)),
            latency,
            in_flight: u32::try_from(token.tag).unwrap_or(u32::MAX),
            dropped,
        };
        let mut state = self.lock();
        let algorithm = &mut state.algorithm;
        // The call may end while its thread unwinds, where a panic that is not caught aborts the process.
        let result = catch_panic(|| algorithm.on_sample(&sample));
        let step = result.flatten().map(|change| state.step(change, apply));
        drop(state);
        self.report_panic(name, result.is_none());
        step
    }

    fn lock(&self) -> MutexGuard<'_, SamplerState> {
        self.state.lock()
    }
}

impl fmt::Debug for Sampler {
    /// Without the algorithm: its `Debug` is user code and would run under the lock.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sampler").field("last_change", &self.last_change()).finish_non_exhaustive()
    }
}

/// Returns whether the outcome is a drop. `None`: it contains no information about the load, so it is not a sample.
fn is_drop(outcome: Outcome) -> Option<bool> {
    match outcome.kind() {
        OutcomeKind::Success => Some(false),
        OutcomeKind::Throttled => Some(true),
        OutcomeKind::Cancelled => None,
        OutcomeKind::Failure => match (outcome.reason(), outcome.code()) {
            (Reason::Timeout | Reason::NoResponse | Reason::ConnectTimeout, _)
            | (Reason::Status, Some(503 | 504 | 520..=524))
            | (Reason::GrpcStatus, Some(4 | 14)) => Some(true),
            _ => None,
        },
    }
}
