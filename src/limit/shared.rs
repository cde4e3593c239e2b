//! The references of layers, services, handles, waiting calls and permits to a limiter.

#[cfg(feature = "observe")]
use std::sync::Weak;
use std::{ops::Deref, sync::Arc};

use super::{adaptive::Sampler, limiter::Limiter, tag::NEEDS_LIMITER};
use crate::{
    error::ConfigError,
    permit::{Permit, ShardOrSlot, ShardedArc, Slot, Token},
};

/// A reference to a limiter, held by its layers, services, handles and waiting calls.
#[derive(Clone, Debug)]
pub(super) struct SharedLimiter(ShardedArc<Limiter>);

/// The owner of a permit: the slot of the limit, or the limiter for a call whose release needs it.
pub(super) type LimitStateRef = ShardOrSlot<Limiter, Slot<Limiter>>;
pub(super) type LimitPermit = Permit<LimitStateRef>;

impl SharedLimiter {
    pub(super) fn new(limit: u32, adaptive: Option<Sampler>) -> Self {
        Self::of(Limiter::new(limit, adaptive))
    }

    fn of(limiter: Limiter) -> Self {
        let limiter = ShardedArc::new(limiter);
        limiter.slot().register(Arc::downgrade(limiter.state()));
        Self(limiter)
    }

    /// Returns a reference that does not keep the limiter alive.
    #[cfg(feature = "observe")]
    pub(super) fn downgrade(&self) -> Weak<Limiter> {
        Arc::downgrade(self.0.state())
    }

    /// Returns the permit of an admitted call.
    #[inline]
    pub(super) fn permit(&self, token: Token) -> LimitPermit {
        let owner = if token.tag & NEEDS_LIMITER == 0 && self.adaptive().is_none() {
            ShardOrSlot::Slot(self.slot())
        } else {
            ShardOrSlot::Shard(self.0.lease())
        };
        Permit::new(owner, token)
    }

    /// Prepares a setting of a layer: if a service uses the limiter, replaces it by a [fork](Limiter::fork), so that
    /// the setting does not change the service.
    pub(super) fn detach(&mut self) -> Result<(), ConfigError> {
        if self.is_in_use() {
            let fork = self.fork().ok_or_else(|| {
                let remedy = "use an algorithm that does not panic";
                ConfigError::new("adaptive", format_args!("a panic in `clone`"), remedy)
            })?;
            *self = Self::of(fork);
        }
        Ok(())
    }
}

impl Deref for SharedLimiter {
    type Target = Limiter;

    #[inline]
    fn deref(&self) -> &Limiter {
        &self.0
    }
}
