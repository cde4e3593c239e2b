//! The admission of calls by a gate, and the outcomes that it counts.

use std::{
    future::Ready,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use tokio::sync::Notify;

use super::super::{fail_open::FailOpen, threshold::ProbeState};
use super::{ARMED, Gate, LISTENS, state_of};
use crate::{
    admission::{Admit, Policy, Terms},
    event::event,
    outcome::{LayerKind, Outcome, OutcomeKind, Rejected, RejectedKind},
    permit::{Permit, Release, ReleaseAt, Token},
};

/// The treatment of calls while a gate is down.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum WhileDown {
    /// Calls are rejected.
    #[default]
    Reject,
    /// Calls are admitted, so that the gate affects only the check in its registry.
    LetThrough,
    /// `poll_ready` returns `Pending`, so that a balancer selects another endpoint. A call that is made nevertheless is
    /// rejected.
    Wait,
}

impl Gate {
    /// Returns the word if it admits a call. Starts the prober if it is armed.
    #[inline]
    fn lets_through(&self) -> Option<u8> {
        let word = self.word.load(Ordering::Acquire);
        if word & ARMED != 0 {
            self.start_if_possible();
        }
        (state_of(word) != ProbeState::Down || self.lets_through_though_down()).then_some(word)
    }

    #[cold]
    fn lets_through_though_down(&self) -> bool {
        self.while_down.load(Ordering::Acquire) == WhileDown::LetThrough as u8
            || self.guard.get().is_some_and(FailOpen::panics)
    }

    #[cold]
    fn refuse(&self) -> Rejected {
        self.refused.fetch_add(1, Ordering::Relaxed);
        event!(health, DEBUG, resilience.name = self.named(), "call rejected: unhealthy");
        let left = self.next.load(Ordering::Relaxed).saturating_sub(self.now());
        Rejected::by(LayerKind::HealthProbe, RejectedKind::Unhealthy)
            .with_retry_after(Duration::from_nanos(left))
            .labelled(self.label.get().cloned())
    }
}

impl<Req> Policy<Req> for Arc<Gate> {
    type Giver = Self;
    /// Whether the outcome of the call is counted.
    type Pass = bool;
    type Wait = Ready<Result<Permit<Self>, Rejected>>;

    const LAYER: LayerKind = LayerKind::HealthProbe;

    #[inline]
    fn peek(&self) -> bool {
        self.lets_through().is_some()
    }

    fn uses_backpressure(&self) -> bool {
        self.while_down.load(Ordering::Relaxed) == WhileDown::Wait as u8
    }

    #[inline]
    fn admit(&self, _: &Req, _: impl Terms) -> Admit<bool, Self::Wait> {
        match self.lets_through() {
            Some(word) => Admit::Pass(word & LISTENS != 0),
            None => Admit::Reject(self.refuse()),
        }
    }

    #[inline]
    fn permit(&self, listens: bool) -> Permit<Self> {
        // A gate that is not passive does not count outcomes, so its calls need no permit.
        if listens { Permit::of(self, Token::default()) } else { Permit::hollow() }
    }

    fn closed_signal(&self, _: Option<&Permit<Self>>) -> Option<Arc<Notify>> {
        Some(self.changed.clone())
    }
}

impl Release for Gate {
    fn finish(&self, _: Token, outcome: Outcome) {
        match outcome.kind() {
            OutcomeKind::Success => self.passed.fetch_add(1, Ordering::Relaxed),
            OutcomeKind::Failure => self.failed.fetch_add(1, Ordering::Relaxed),
            // Neither outcome proves health or its absence.
            OutcomeKind::Throttled | OutcomeKind::Cancelled => return,
        };
    }

    #[inline]
    fn hold(&self) -> ReleaseAt {
        ReleaseAt::Verdict
    }
}
