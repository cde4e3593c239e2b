//! The admission of calls by a gate, and the outcomes that it counts.

use std::{
    future::Ready,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use tokio::sync::Notify;

use super::{
    super::{fail_open::FailOpen, threshold::ProbeState},
    ARMED, BACKPRESSURE, Gate, PASSIVE, SHADOW, state_of,
};
use crate::{
    admission::{Admit, Policy, Terms},
    outcome::{LayerKind, Outcome, OutcomeKind, Rejected, RejectedKind, report_rejection},
    permit::{Permit, Release, ReleaseAt, Token},
    sealed::Sealed,
};

impl Gate {
    /// Returns the word for a call. Starts the prober if it is armed.
    #[inline]
    fn word_for_call(&self) -> u8 {
        let word = self.word.load(Ordering::Acquire);
        if word & ARMED != 0 {
            self.start_if_possible();
        }
        word
    }

    fn fails_open(&self) -> bool {
        self.fail_open.get().is_some_and(FailOpen::is_active)
    }

    #[cold]
    fn admits_while_down(&self, word: u8) -> bool {
        word & SHADOW != 0 || self.fails_open()
    }

    /// Admits or rejects a call while the gate is down, and counts it.
    #[cold]
    fn admit_while_down(&self, word: u8) -> Result<(), Rejected> {
        if self.fails_open() {
            return Ok(());
        }
        let left = self.next_result.load(Ordering::Relaxed).saturating_sub(self.now());
        let (layer, retry_after) = (LayerKind::HealthProbe, Duration::from_nanos(left));
        if word & SHADOW != 0 {
            self.shadowed.fetch_add(1, Ordering::Relaxed);
            let kind = RejectedKind::Unhealthy;
            report_rejection(layer, self.name(), kind, Some(retry_after), true);
            return Ok(());
        }
        self.rejected.fetch_add(1, Ordering::Relaxed);
        Err(Rejected::by(layer, RejectedKind::Unhealthy)
            .with_retry_after(retry_after)
            .labelled(self.label())
            .reported())
    }
}

impl<Req> Policy<Req> for Arc<Gate> {
    type StateRef = Self;
    /// Whether the outcome of the call is counted.
    type Pass = bool;
    type Wait = Ready<Result<Permit<Self>, Rejected>>;

    const LAYER: LayerKind = LayerKind::HealthProbe;

    fn name(&self) -> &str {
        Gate::name(self)
    }

    #[inline]
    fn peek(&self) -> bool {
        let word = self.word_for_call();
        state_of(word) != ProbeState::Down || self.admits_while_down(word)
    }

    fn count_misconfigured(&self) {
        self.misconfigured.fetch_add(1, Ordering::Relaxed);
    }

    fn uses_backpressure(&self) -> bool {
        self.word.load(Ordering::Relaxed) & BACKPRESSURE != 0
    }

    #[inline]
    fn admit(&self, _: &Req, _: impl Terms) -> Admit<bool, Self::Wait> {
        let word = self.word_for_call();
        if state_of(word) == ProbeState::Down {
            if let Err(rejected) = self.admit_while_down(word) {
                return Admit::Reject(rejected);
            }
        }
        Admit::Pass(word & PASSIVE != 0)
    }

    #[inline]
    fn permit(&self, is_counted: bool) -> Permit<Self> {
        // A gate that is not passive does not count outcomes, so its calls need no permit.
        if is_counted { Permit::of(self, Token::default()) } else { Permit::spent() }
    }

    fn closed_signal(&self, _: Option<&Permit<Self>>) -> Option<Arc<Notify>> {
        Some(self.changed.clone())
    }
}

impl Sealed for Gate {}

impl Release for Gate {
    fn release(&self, _: Token, outcome: Outcome) {
        match outcome.kind() {
            OutcomeKind::Success => self.succeeded.fetch_add(1, Ordering::Relaxed),
            OutcomeKind::Failure => self.failed.fetch_add(1, Ordering::Relaxed),
            // Neither outcome proves health or its absence.
            OutcomeKind::Throttled | OutcomeKind::Cancelled => return,
        };
    }

    #[inline]
    fn release_at(&self) -> ReleaseAt {
        ReleaseAt::Verdict
    }
}
