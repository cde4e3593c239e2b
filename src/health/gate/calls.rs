//! What a gate says to calls, and what it hears of them.

use std::{
    future::Ready,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use tokio::sync::Notify;

use super::{ARMED, Gate, LISTENS, state_of};
use crate::{
    admission::{Admit, Policy, Terms},
    call::{
        Finish, Hold, LayerKind, Outcome, OutcomeKind, Permit, Rejected, RejectedKind, Shared,
        Token,
    },
    event,
    health::{PanicGuard, ProbeState},
};

/// What becomes of calls while a gate is down.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum WhileDown {
    /// They are refused.
    #[default]
    Refuse,
    /// They go: for a gate whose word is wanted by a registry, and not by callers.
    LetThrough,
    /// The service is not ready, so that a balancer picks another endpoint. A call that comes all the same is
    /// refused.
    Wait,
}

impl Gate {
    /// The word that lets a call through, if it does.
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
            || self.guard.get().is_some_and(PanicGuard::panics)
    }

    #[cold]
    fn refuse(&self) -> Rejected {
        self.refused.fetch_add(1, Ordering::Relaxed);
        event!(DEBUG, resilience.name = self.named(), "call refused: unhealthy");
        let left = self.next.load(Ordering::Relaxed).saturating_sub(self.now());
        Rejected::by(LayerKind::HealthProbe, RejectedKind::Unhealthy)
            .with_retry_after(Duration::from_nanos(left))
            .labelled(self.label.get().cloned())
    }
}

impl<Req> Policy<Req> for Shared<Gate> {
    type Giver = Self;
    /// Whether anybody wants to hear how it ends.
    type Pass = bool;
    type Wait = Ready<Result<Permit<Self>, Rejected>>;

    const LAYER: LayerKind = LayerKind::HealthProbe;

    #[inline]
    fn peek(&self) -> bool {
        self.lets_through().is_some()
    }

    fn holds_back(&self) -> bool {
        self.while_down.load(Ordering::Relaxed) == WhileDown::Wait as u8
    }

    #[inline]
    fn admit(&self, _: &Req, _: impl Terms) -> Admit<bool, Self::Wait> {
        match self.lets_through() {
            Some(word) => Admit::Go(word & LISTENS != 0),
            None => Admit::No(self.refuse()),
        }
    }

    #[inline]
    fn permit(&self, listens: bool) -> Permit<Self> {
        // Else nobody wants to hear how it ends.
        if listens { Shared::permit(self, Token::default()) } else { Permit::hollow() }
    }

    fn shut(&self, _: Option<&Permit<Self>>) -> Option<Arc<Notify>> {
        Some(self.changed.clone())
    }
}

impl Finish for Gate {
    fn finish(&self, _: Token, outcome: Outcome) {
        match outcome.kind() {
            OutcomeKind::Success => self.passed.fetch_add(1, Ordering::Relaxed),
            OutcomeKind::Failure => self.failed.fetch_add(1, Ordering::Relaxed),
            // Neither proves anything.
            OutcomeKind::Throttled | OutcomeKind::Cancelled => return,
        };
    }

    #[inline]
    fn hold(&self) -> Hold {
        Hold::Verdict
    }
}
