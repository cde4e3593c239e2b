//! How a limit is reached by what has it, and by its calls.
//!
//! What a call ends at has to live as long as the call. But a limit counts its calls anyhow: a fixed one lives in memory
//! that is never given back, and used for another limit once nobody has this one and its last call is over.

use std::{
    fmt,
    ops::Deref,
    sync::{Arc, OnceLock},
};

use super::{adaptive::Teller, core::Limiter};
use crate::call::{Anchor, Idle, Label, Permit, Rejected, RejectedKind, Striped, Token};

/// A limit: what its layers, services, handles and waiters have.
#[derive(Clone)]
pub struct Limit {
    limiter: Way,
    own: Arc<Own>,
}

/// How it is reached.
#[derive(Clone)]
enum Way {
    Striped(Striped<Limiter>),
    Lasting(&'static Limiter),
}

struct Own {
    /// The one that nobody else can find.
    lasting: Option<&'static Limiter>,
    label: OnceLock<Arc<Label>>,
}

static IDLE: Idle<Limiter> = Idle::new();

/// It is idle, for good.
pub(super) fn keep(limiter: &'static Limiter) {
    IDLE.keep(limiter);
}

fn lasting(limit: u32) -> &'static Limiter {
    if let Some(limiter) = IDLE.take() {
        limiter.renew(limit);
        return limiter;
    }
    let limiter: &'static Limiter = Box::leak(Box::new(Limiter::new(limit, None)));
    limiter.settle();
    limiter
}

impl Limit {
    pub(super) fn fixed(limit: u32) -> Self {
        let limiter = lasting(limit);
        let own = Own { lasting: Some(limiter), label: OnceLock::new() };
        Self { limiter: Way::Lasting(limiter), own: Arc::new(own) }
    }

    /// What it learns goes with it: its calls are counted.
    pub(super) fn adaptive(limit: u32, teller: Teller) -> Self {
        let limiter = Striped::new(Limiter::new(limit, Some(teller)));
        limiter.set_owner(limiter.state().downgrade());
        Self {
            limiter: Way::Striped(limiter),
            own: Arc::new(Own { lasting: None, label: OnceLock::new() }),
        }
    }

    /// The right to make one call.
    #[inline]
    pub(super) fn permit(&self, token: Token) -> Permit<Anchor<Limiter>> {
        let anchor = match &self.limiter {
            Way::Striped(limiter) => Anchor::Counted(limiter.lease()),
            Way::Lasting(limiter) => Anchor::Lasting(*limiter),
        };
        Permit::new(anchor, token)
    }

    pub(super) fn turn_away(&self, kind: RejectedKind) -> Result<Token, Rejected> {
        (**self).turn_away(kind, || self.own.label.get().cloned())
    }

    pub(super) fn name(&self, name: &str) {
        // The first name stays: refusals under way point at it.
        let label = Arc::new(Label { name: name.into(), fault: None });
        if self.own.label.set(label.clone()).is_ok() {
            self.set_label(label);
        }
    }
}

impl Deref for Limit {
    type Target = Limiter;

    #[inline]
    fn deref(&self) -> &Limiter {
        match &self.limiter {
            Way::Striped(limiter) => limiter,
            Way::Lasting(limiter) => limiter,
        }
    }
}

impl Drop for Own {
    fn drop(&mut self) {
        if let Some(limiter) = self.lasting {
            limiter.abandon();
        }
    }
}

impl fmt::Debug for Limit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        (**self).fmt(f)
    }
}
