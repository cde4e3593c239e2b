//! Permits: the right to make one call, and its release with the outcome of the call.
//!
//! # Life of a permit
//!
//! 1. A state ([`Release`]: a circuit, a limit, a registry of calls) admits a call and issues a [`Permit`]. Its
//!    [`Token`] records the admission: the generation of the state, and the clock that measures the upstream.
//! 2. The permit is moved through the future of the call. [`Permit::pending`] records what the call waits for, and
//!    [`Permit::record_head`] reports the response head to the state.
//! 3. The permit ends at the time that [`Release::release_at`] states. If that is the end of the response body, it is
//!    type-erased and moved into the [`TrackedBody`](super::body::TrackedBody).
//! 4. [`Release::release`] receives the token and the attributed outcome.
//!
//! # Invariants
//!
//! - [`Release::release`] is called exactly once per token. The owner of the state is an `Option` that the release
//!   takes, so a second release and the destructor find `None`. Such a permit is *spent*.
//! - The release happens in `Drop` if it has not happened before: also when the future is dropped before its first
//!   poll, or while the thread unwinds.
//! - A token of an earlier generation must not change the current state. The state compares the generations.
//! - Every outcome other than a success is [attributed](crate::outcome::attribute) before the state receives it. A
//!   state can therefore count each failure against the upstream.

use std::{fmt, mem, sync::Arc};

use tokio::time::Instant;

use super::{
    release::{Measures, Release, ReleaseAt, Token},
    state_ref::{DynStateRef, StateRef},
};
use crate::outcome::{
    CallerDeadline, Ending, Outcome, Reason, SentMark, UpstreamClock, WaitsFor, attribute,
    dropped as outcome_of_drop,
};

/// The right to make one call. See the [module](super).
///
/// A permit is released once, with the outcome of its call. Dropping it releases it as well: with a failure if the
/// inner service panicked, and otherwise with the outcome of a call that its caller dropped.
pub struct Permit<G: StateRef = DynStateRef> {
    /// The state that issued the permit. `None` once the permit is spent.
    state: Option<G>,
    token: Token,
    context: CallContext,
}

/// What a permit records about its call besides the admission. The type has no destructor, because permits are moved
/// often.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CallContext {
    /// The outcome of a drop. `None`: the [`DropCause`](crate::outcome::DropCause) decides, and without one it is a
    /// hang-up.
    drop_as: Option<Outcome>,
    caller_deadline: Option<CallerDeadline>,
    /// A mark of the request's progress [sets](Permit::set_clock) the clock.
    has_mark: bool,
    /// The response head has arrived.
    has_head: bool,
    /// The response body is measured, too.
    measures_body: bool,
    /// The state records what the response body waits for.
    follows_reader: bool,
    /// The state watches whether the response body is read. Before the body is tracked: the state has requested the
    /// watch.
    is_watched: bool,
    waits_for: WaitsFor,
}

impl CallContext {
    const NONE: Self = Self {
        drop_as: None,
        caller_deadline: None,
        has_mark: false,
        has_head: false,
        measures_body: false,
        follows_reader: false,
        is_watched: false,
        waits_for: WaitsFor::Upstream,
    };
}

impl<G: StateRef> Permit<G> {
    #[inline]
    pub(crate) fn new(state: G, token: Token) -> Self {
        Self { state: Some(state), token, context: CallContext::NONE }
    }

    /// Returns a spent permit, for a call that has ended or that no state counts.
    pub(crate) const fn spent() -> Self {
        Self { state: None, token: Token::unmeasured(0), context: CallContext::NONE }
    }

    // ===== Release =====

    /// Releases the permit with this outcome.
    #[inline]
    pub(crate) fn release(mut self, outcome: Outcome) {
        self.release_mut(outcome);
        // `release_mut` has taken the state, so the destructor would do nothing.
        mem::forget(self);
    }

    /// Releases the permit with this outcome, unless it is spent.
    #[inline]
    pub(crate) fn release_mut(&mut self, outcome: Outcome) {
        if !outcome.is_success() {
            return self.release_attributed(outcome);
        }
        if let Some(state) = self.state.take() {
            state.release(self.token, outcome);
        }
    }

    #[cold]
    #[inline(never)]
    fn release_attributed(&mut self, outcome: Outcome) {
        let outcome = self.attributed(outcome);
        if let Some(state) = self.state.take() {
            state.release(self.token, outcome);
        }
    }

    /// Returns the outcome attributed to the side that caused it.
    fn attributed(&self, outcome: Outcome) -> Outcome {
        let Some(state) = &self.state else { return outcome };
        let ending = Ending {
            clock: self.token.clock,
            has_head: self.context.has_head,
            caller_deadline: self.context.caller_deadline,
            count_cancelled_after: state.count_cancelled_after(),
            waits_for: self.context.waits_for,
        };
        attribute(outcome, ending)
    }

    /// Moves the permit out, and leaves a spent permit behind.
    ///
    /// The callers store a permit and no `Option<Permit>`. The niche of such an option lies in the middle of the
    /// permit, and reading it costs a stalled load per call.
    #[inline]
    pub(crate) fn take(&mut self) -> Self {
        Self { state: self.state.take(), token: self.token, context: self.context }
    }

    /// Records the response head in the state. Returns `so_far` attributed to the side that caused it.
    ///
    /// `so_far` is the outcome unless the response body changes it. `is_certain` states that the body cannot.
    #[inline]
    pub(crate) fn record_head(&mut self, so_far: Outcome, is_certain: bool) -> Outcome {
        // A head that decides the outcome is attributed as if there were none: a 504 that only reports the caller's
        // deadline is still a failure after `count_cancelled_after`.
        self.context.has_head = !is_certain;
        let so_far = if so_far.is_success() { so_far } else { self.attributed(so_far) };
        self.context.has_head = true;
        if let Some(state) = &self.state {
            state.record_head(&mut self.token, so_far);
            if state.measures() == Measures::Body {
                self.context.measures_body = true;
                self.token.clock.stop(Instant::now());
            }
            self.context.is_watched = state.watches_reader(self.token);
            if state.follows_reader(self.token) {
                self.context.follows_reader = true;
                self.body_waits_for(WaitsFor::Caller);
            }
        }
        so_far
    }

    // ===== Attribution =====

    /// Records the caller deadline of the request, and whether a mark sets the clock.
    #[inline]
    pub(crate) fn observing(mut self, deadline: Option<CallerDeadline>, has_mark: bool) -> Self {
        (self.context.caller_deadline, self.context.has_mark) = (deadline, has_mark);
        self
    }

    /// Sets the clock by the mark of the request's progress.
    pub(crate) fn set_clock(&mut self, mark: &SentMark) {
        let progress = mark.progress();
        self.token.clock = progress.clock();
        let waits_for = &mut self.context.waits_for;
        if *waits_for != WaitsFor::Client {
            *waits_for = progress.waits_for;
        }
    }

    /// Records what the call waits for, after the inner future has returned `Pending`. The clock runs while the call
    /// waits for the upstream, stops while the call waits inside the client, and is off while the caller delays the
    /// request.
    #[inline]
    pub(crate) fn pending(&mut self, what: WaitsFor) {
        let Some(state) = &self.state else { return };
        let context = &mut self.context;
        let runs = !self.token.clock.is_off() || context.has_mark;
        if what == context.waits_for && (runs || what != WaitsFor::Upstream) {
            return;
        }
        if state.measures() == Measures::Nothing {
            return;
        }
        match what {
            // The mark sets the clock at the end of the call.
            _ if context.has_mark => self.token.clock = UpstreamClock::OFF,
            WaitsFor::Upstream => self.token.clock.resume(),
            WaitsFor::Client => self.token.clock.pause(),
            WaitsFor::Caller | WaitsFor::Transport => self.token.clock = UpstreamClock::OFF,
        }
        if mem::replace(&mut context.waits_for, what) != what {
            state.waits_for(self.token, what);
        }
    }

    /// Records what the call waited for when the inner future failed. The outcome of an inner timeout depends on it.
    #[inline]
    pub(crate) fn record_wait(&mut self, what: WaitsFor) {
        self.context.waits_for = what;
    }

    /// Starts to watch whether the response body is read, if the state requests it.
    #[inline]
    pub(crate) fn watch_reader(&mut self) {
        if let (true, Some(state)) = (self.context.is_watched, &self.state) {
            self.context.is_watched = state.watch_reader(&mut self.token);
        }
    }

    /// Runs the clock while the response body has no frame for its reader, and stops it otherwise.
    #[inline]
    pub(crate) fn body_polled(&mut self, is_pending: bool) {
        if self.context.measures_body {
            self.token.clock.body_polled(is_pending);
        }
        if self.context.follows_reader {
            let what = if is_pending { WaitsFor::Upstream } else { WaitsFor::Caller };
            if self.context.waits_for != what {
                self.body_waits_for(what);
            }
        }
    }

    /// Reports a poll of the response body if it is watched, with the length of the frame, or `None` if the body was
    /// pending. Returns whether the state has released the permit, because the response was not read.
    #[inline]
    pub(crate) fn is_unread(&self, frame: impl FnOnce() -> Option<usize>) -> bool {
        match &self.state {
            Some(state) if self.context.is_watched => state.body_polled(self.token, frame()),
            _ => false,
        }
    }

    #[cold]
    fn body_waits_for(&mut self, what: WaitsFor) {
        if let Some(state) = &self.state {
            self.context.waits_for = what;
            state.waits_for(self.token, what);
        }
    }

    // ===== Accessors =====

    /// Returns the state that issued the permit, unless the permit is spent.
    pub(crate) fn state(&self) -> Option<&G> {
        self.state.as_ref()
    }

    /// Returns the record of the admission.
    #[inline]
    pub(crate) fn token(&self) -> Token {
        self.token
    }

    /// Copies the clock and the record of the call from the lent permit.
    pub(crate) fn with_record_of<L: StateRef>(mut self, lent: &Permit<L>) -> Self {
        self.token.clock = lent.token.clock;
        self.context = lent.context;
        self
    }

    /// Replaces the clock of a lent permit by the clock of its measuring permit.
    pub(crate) fn replace_clock(&mut self, clock: UpstreamClock) {
        self.token.clock = clock;
    }

    /// Returns the time at which the permit is released. For a spent permit, the response head.
    #[inline]
    pub(crate) fn release_at(&self) -> ReleaseAt {
        self.state.as_ref().map_or(ReleaseAt::Head, G::release_at)
    }

    /// Runs code of the inner service. If it panics, the permit is released with a failure when it is dropped.
    ///
    /// `thread::panicking()` in the destructor would not suffice: a caller that panics while it holds a successful
    /// response drops the permit during unwinding, too.
    #[inline]
    pub(crate) fn guard<O>(&mut self, run: impl FnOnce() -> O) -> O {
        struct OnUnwind<'a, G: StateRef>(&'a mut Permit<G>);

        impl<G: StateRef> Drop for OnUnwind<'_, G> {
            fn drop(&mut self) {
                self.0.set_drop_outcome(Outcome::failure().because(Reason::Panicked));
            }
        }

        let unwinding = OnUnwind(self);
        let done = run();
        mem::forget(unwinding);
        done
    }

    /// Sets the outcome with which a drop releases the permit from now on.
    #[inline]
    pub(crate) fn set_drop_outcome(&mut self, outcome: Outcome) {
        self.context.drop_as = Some(outcome);
    }
}

impl<T: Release> Permit<Arc<T>> {
    /// Returns a permit that this state has issued. The permit keeps the state alive.
    pub(crate) fn of(state: &Arc<T>, token: Token) -> Self {
        Self::new(Arc::clone(state), token)
    }
}

impl<G: StateRef> Permit<G> {
    /// Erases the type of the state that issued the permit.
    #[inline]
    pub(crate) fn erase(mut self) -> Permit {
        Permit {
            state: self.state.take().map(Into::into),
            token: self.token,
            context: self.context,
        }
    }
}

impl<G: StateRef> Drop for Permit<G> {
    #[inline]
    fn drop(&mut self) {
        if self.state.is_some() {
            dropped(self.take());
        }
    }
}

/// Releases a dropped permit. Takes it by value, so that it can stay in registers.
#[cold]
#[inline(never)]
fn dropped<G: StateRef>(permit: Permit<G>) {
    let outcome = permit.context.drop_as.unwrap_or_else(|| outcome_of_drop(permit.token.clock));
    permit.release(outcome);
}

impl<G: StateRef> fmt::Debug for Permit<G> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Permit")
            .field("spent", &self.state.is_none())
            .field("token", &self.token)
            .field("context", &self.context)
            .finish()
    }
}
