//! How a limit is reached by what has it, and by its calls.
//!
//! What a call ends at has to live as long as the call. To count references for that costs as much as all the
//! rest: two atomics a call, contended where the limit is. But a limit counts its calls anyhow. So a fixed one lives in
//! memory that is never given back, and used for another limit once nobody has this one and its last call is over: as
//! much as there ever were limits at once.

use std::{
    fmt,
    ops::Deref,
    sync::{Arc, Mutex, OnceLock, PoisonError},
};

use super::{adaptive::Teller, core::Limiter};
use crate::call::{Giver, Label, Permit, Rejected, RejectedKind, Shared, Token};

/// A limit: what its layers, services, handles and waiters have.
#[derive(Clone)]
pub struct Limit {
    limiter: Giver<Limiter>,
    own: Arc<Own>,
}

struct Own {
    /// The one that nobody else can find.
    lasting: Option<&'static Limiter>,
    label: OnceLock<Arc<Label>>,
}

/// Idle ones, to be used again.
static IDLE: Mutex<Vec<&'static Limiter>> = Mutex::new(Vec::new());

/// It is idle, for good.
pub(super) fn keep(limiter: &'static Limiter) {
    IDLE.lock().unwrap_or_else(PoisonError::into_inner).push(limiter);
}

fn lasting(limit: u32) -> &'static Limiter {
    let idle = IDLE.lock().unwrap_or_else(PoisonError::into_inner).pop();
    if let Some(limiter) = idle {
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
        Self { limiter: Giver::Lasting(limiter), own: Arc::new(own) }
    }

    /// What it learns goes with it: an ordinary reference.
    pub(super) fn adaptive(limit: u32, teller: Teller) -> Self {
        let limiter = Giver::Counted(Shared::new(Limiter::new(limit, Some(teller))));
        Self { limiter, own: Arc::new(Own { lasting: None, label: OnceLock::new() }) }
    }

    /// The right to make one call.
    #[inline]
    pub(super) fn permit(&self, token: Token) -> Permit<Limiter> {
        Permit::new(self.limiter.clone(), token)
    }

    pub(super) fn turn_away(&self, kind: RejectedKind) -> Result<Token, Rejected> {
        self.limiter.turn_away(kind, || self.own.label.get().cloned())
    }

    pub(super) fn name(&self, name: &str) {
        // The first name stays: refusals under way point at it.
        let _ = self.own.label.set(Arc::new(Label { name: name.into(), fault: None }));
    }
}

impl Deref for Limit {
    type Target = Limiter;

    #[inline]
    fn deref(&self) -> &Limiter {
        &self.limiter
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
