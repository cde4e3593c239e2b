use std::fmt;

use super::{
    adaptive::{Change, Teller},
    core::Limiter,
    upgrade::HeldPlace,
};
use crate::{
    ConfigError,
    call::{Rejected, RejectedKind, Shared},
};

/// Looks at a concurrency limit and resizes it, from outside of the stack.
///
/// Clones see the same limit, and so do all services that the layer or a clone of it made.
#[derive(Clone)]
pub struct ConcurrencyLimitHandle(pub(super) Shared<Limiter>);

/// A concurrency limit at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ConcurrencyLimitSnapshot {
    /// How many calls may be in flight at once.
    pub limit: u32,
    /// The last change of an adaptive limit, and why.
    pub last_change: Option<Change>,
    /// How many are, each to the end of its response body.
    pub in_flight: u32,
    /// How many wait for their turn.
    pub waiting: u32,
    /// How many were refused because the limit was reached and there was no room to wait.
    pub refused_full: u64,
    /// How many were refused after they had waited as long as they may.
    pub refused_waited: u64,
    /// How many were refused because their [deadline](crate::Deadline) had passed, waiting or not.
    pub refused_deadline: u64,
    /// How many were refused because calls worth more took all there was.
    pub refused_outranked: u64,
    /// How many exempt calls are in flight, beside the others.
    pub exempt_in_flight: u32,
    /// How many exempt calls there were.
    pub exempt: u64,
}

impl ConcurrencyLimitHandle {
    /// All there is to know at this moment.
    #[must_use]
    pub fn snapshot(&self) -> ConcurrencyLimitSnapshot {
        let (exempt, exempt_in_flight) = self.0.exempt();
        ConcurrencyLimitSnapshot {
            limit: self.0.limit(),
            last_change: self.0.adaptive().and_then(Teller::last),
            in_flight: self.0.in_flight(),
            waiting: self.0.waiting(),
            refused_full: self.0.refused(RejectedKind::Full),
            refused_waited: self.0.refused(RejectedKind::WaitedTooLong),
            refused_deadline: self.0.refused(RejectedKind::DeadlinePassed),
            refused_outranked: self.0.refused(RejectedKind::Outranked),
            exempt_in_flight,
            exempt,
        }
    }

    /// How many calls are in flight, each to the end of its response body.
    #[must_use]
    pub fn in_flight(&self) -> u32 {
        self.0.in_flight()
    }

    /// A place for something that is not a call under the layer, if there is room and nobody waits: for a
    /// WebSocket that is to be closed with code 1013 rather than refused, for work in the background.
    ///
    /// # Errors
    ///
    /// There is none: told, and counted, as a call's refusal is.
    pub fn try_acquire(&self) -> Result<HeldPlace, Rejected> {
        match self.0.try_enter() {
            Some(token) => Ok(HeldPlace::own(self.0.permit(token))),
            None => Err(self.0.refuse(RejectedKind::Full)),
        }
    }

    /// Resizes the limit: a higher one lets waiters in at once, a lower one takes effect as calls end.
    /// An adaptive one goes on from there, within its bounds.
    ///
    /// # Errors
    ///
    /// Zero, or more than `u32::MAX`.
    pub fn set_limit(&self, limit: usize) -> Result<(), ConfigError> {
        self.0.set_limit(checked(limit)?);
        Ok(())
    }
}

pub(super) fn checked(limit: usize) -> Result<u32, ConfigError> {
    match u32::try_from(limit) {
        Ok(limit) if limit > 0 => Ok(limit),
        _ => Err(ConfigError::new("limit", limit, "use 1 to 4294967295 calls")),
    }
}

impl fmt::Debug for ConcurrencyLimitHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("ConcurrencyLimitHandle").field(&*self.0).finish()
    }
}
