//! The references of layers, services, handles and calls to a limit, and the reuse of the memory of fixed limits.
//!
//! A permit refers to the [`Limiter`] that it is released to, and may outlive the layer and all services. One reference
//! count for all calls would keep the limiter alive, but its updates by two threads would cost more than the rest of a
//! call. So there are two kinds of reference:
//!
//! - A fixed limit is a leaked allocation, and its calls hold a `&'static Limiter`. The limiter counts its calls in
//!   flight anyway. When the last [`Limit`] has been dropped and the last call has ended, the limiter returns to the
//!   free list [`IDLE`], and the next fixed limit reuses it (see `core/life.rs`). The memory in use is bounded by the
//!   maximum number of fixed limits that existed at the same time.
//! - An adaptive limit is reference-counted in shards ([`ShardedArc`]): each call clones one of several `Arc`s, selected
//!   by thread. Its calls take a lock anyway, and an algorithm cannot be reset for another limit.
//!
//! # Invariants
//!
//! - All clones of a [`Limit`] share one [`Own`], so `Own::drop` runs when no layer, service, handle or waiting call is
//!   left. After it no call can be admitted and no queue entry exists.
//! - A `&'static Limiter` is used only by a [`Limit`], by a call that the limiter counts, or by a call or sweeper that
//!   may find the limiter renewed for another owner. The last kind is listed in `core/life.rs`.

use std::{
    fmt,
    ops::Deref,
    sync::{Arc, OnceLock},
};

use super::{adaptive::Teller, limiter::Limiter};
use crate::{
    fault::LayerName,
    outcome::{Rejected, RejectedKind},
    permit::{Idle, Permit, ShardOrSlot, ShardedArc, Token},
};

/// A reference to a limit, held by its layers, services, handles and waiting calls.
#[derive(Clone)]
pub struct Limit {
    limiter: Way,
    own: Arc<Own>,
}

/// The reference to the limiter, by the kind of limit.
#[derive(Clone)]
enum Way {
    Sharded(ShardedArc<Limiter>),
    Lasting(&'static Limiter),
}

/// The state that all clones of a [`Limit`] share. Its drop abandons a fixed limit.
struct Own {
    /// The limiter of a fixed limit. No other `Own` has it.
    lasting: Option<&'static Limiter>,
    label: OnceLock<Arc<LayerName>>,
}

/// The limiters that no limit and no call uses.
static IDLE: Idle<Limiter> = Idle::new();

/// Returns a limiter to the free list. No reference to it may be used for a call after that.
pub(super) fn keep(limiter: &'static Limiter) {
    IDLE.keep(limiter);
}

/// Returns a limiter for a new fixed limit: a renewed one from the free list, or a new allocation.
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

    /// Makes an adaptive limit. Its memory is deallocated with its last reference, because the algorithm keeps what it
    /// has learnt and cannot be reset for another limit.
    pub(super) fn adaptive(limit: u32, teller: Teller) -> Self {
        let limiter = ShardedArc::new(Limiter::new(limit, Some(teller)));
        limiter.set_owner(Arc::downgrade(limiter.state()));
        Self {
            limiter: Way::Sharded(limiter),
            own: Arc::new(Own { lasting: None, label: OnceLock::new() }),
        }
    }

    /// Returns the permit of an admitted call.
    #[inline]
    pub(super) fn permit(&self, token: Token) -> Permit<ShardOrSlot<Limiter>> {
        let anchor = match &self.limiter {
            Way::Sharded(limiter) => ShardOrSlot::Shard(limiter.lease()),
            Way::Lasting(limiter) => ShardOrSlot::Slot(*limiter),
        };
        Permit::new(anchor, token)
    }

    pub(super) fn turn_away(&self, kind: RejectedKind) -> Result<Token, Rejected> {
        (**self).turn_away(kind, || self.own.label.get().cloned())
    }

    pub(super) fn name(&self, name: &str) {
        // Only the first name takes effect, because the label is read without a lock.
        let label = Arc::new(LayerName { name: name.into(), fault: None });
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
            Way::Sharded(limiter) => limiter,
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
