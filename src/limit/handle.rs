use std::{fmt, ops::RangeInclusive, time::Duration};

use super::{
    adaptive::{Change, Teller},
    core::{Entry, MOST_WAITING},
    lasting::Limit,
    queue::QueueOrder,
    sort::Claim,
    upgrade::HeldPlace,
    wait::Wait,
};
use crate::{
    ConfigError,
    call::{Indicator, Rejected, RejectedKind},
};

/// Looks at a concurrency limit and resizes it, from outside of the stack.
///
/// Clones see the same limit, and so do all services that the layer or a clone of it made.
#[derive(Clone)]
pub struct ConcurrencyLimitHandle(pub(super) Limit);

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
    /// How many were let through in [shadow mode](ConcurrencyLimitHandle::shadow) that would have been refused.
    pub shadowed: u64,
    /// What half of those who waited in the last 30 to 60 s did not exceed, an eighth too much at most.
    pub wait_p50: Option<Duration>,
    /// What 99 of a hundred did not exceed.
    pub wait_p99: Option<Duration>,
    /// How many exempt calls are in flight, beside the others.
    pub exempt_in_flight: u32,
    /// How many exempt calls there were.
    pub exempt: u64,
    /// The number of responses that released their permit because their client did not read them.
    pub unread: u64,
}

impl ConcurrencyLimitSnapshot {
    /// How many were refused in all.
    #[must_use]
    pub const fn refused(&self) -> u64 {
        self.refused_full
            .saturating_add(self.refused_waited)
            .saturating_add(self.refused_deadline)
            .saturating_add(self.refused_outranked)
    }
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
            shadowed: self.0.shadowed(),
            wait_p50: self.0.wait(0.5),
            wait_p99: self.0.wait(0.99),
            exempt_in_flight,
            exempt,
            unread: self.0.unread(),
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
        let entered = self.0.try_enter();
        let token = entered.map_or_else(|| self.0.turn_away(RejectedKind::Full), Ok)?;
        Ok(HeldPlace::own(self.0.permit(token)))
    }

    /// A place, at once or in its turn: it waits in the queue as a call does. Dropping the future gives the
    /// turn back.
    ///
    /// # Errors
    ///
    /// There is none, and there is no room to wait; or the wait was too long.
    ///
    /// # Panics
    ///
    /// As a call that has to wait does: outside of a Tokio runtime with timers.
    pub async fn acquire(&self) -> Result<HeldPlace, Rejected> {
        let token = match self.0.enter_as(Claim::default()) {
            Ok(Entry::In(token)) => token,
            Ok(Entry::Waits(place)) => {
                let permit = Wait::new(self.0.clone(), place, None).await?;
                return Ok(HeldPlace::own(permit));
            }
            Err(kind) => self.0.turn_away(kind)?,
        };
        Ok(HeldPlace::own(self.0.permit(token)))
    }

    /// What this share, of 0 to 1, of those who waited in the last 30 to 60 s did not exceed, an eighth too
    /// much at most; both those whose turn came and those who waited in vain. None if nobody waited.
    #[must_use]
    pub fn wait_percentile(&self, share: f64) -> Option<Duration> {
        self.0.wait(share)
    }

    // ===== Changing it while calls are under way =====

    /// Resizes the limit: a higher one lets waiters in at once, a lower one takes effect as calls end.
    /// An adaptive one goes on from there, within its bounds.
    ///
    /// # Errors
    ///
    /// Zero, or more than `u32::MAX`; or the algorithm of an adaptive limit panicked, and the limit keeps its value.
    pub fn set_limit(&self, limit: usize) -> Result<(), ConfigError> {
        let panicked = || ConfigError::new("limit", limit, ALGORITHM_PANICKED);
        self.0.set_limit(checked(limit)?).ok_or_else(panicked)
    }

    /// Gives an adaptive limit other bounds; what it has learnt it keeps.
    ///
    /// # Errors
    ///
    /// Invalid bounds; a fixed limit, or an algorithm without bounds; or the algorithm panicked, and the limit keeps
    /// its value.
    pub fn set_bounds(&self, bounds: RangeInclusive<usize>) -> Result<(), ConfigError> {
        let within = checked_bounds(bounds.clone())?;
        let remedy = match self.0.set_bounds(within) {
            Some(true) => return Ok(()),
            Some(false) => "set the limit: it has no bounds",
            None => ALGORITHM_PANICKED,
        };
        Err(ConfigError::new("adaptive.bounds", bounds, remedy))
    }

    /// Changes the queue as [`queue`](crate::ConcurrencyLimitLayer::queue) does. Who waits already stays, also
    /// in a queue that is too long now, for as long as it was told then.
    ///
    /// # Errors
    ///
    /// As there.
    pub fn set_queue(&self, length: usize, longest_wait: Duration) -> Result<(), ConfigError> {
        self.0.set_queue(checked_queue(length, longest_wait)?, longest_wait);
        Ok(())
    }

    /// Changes whose turn it is next, also of those who wait already.
    ///
    /// # Errors
    ///
    /// An adaptive order with a time of zero.
    pub fn set_queue_order(&self, order: QueueOrder) -> Result<(), ConfigError> {
        self.0.set_order(checked_order(order)?);
        Ok(())
    }

    /// Changes what a refused call is told of when to come back.
    pub fn set_retry_after(&self, after: Duration) {
        self.0.set_retry_after(after);
    }

    /// Changes the time after which a response that its client does not read releases its permit, as
    /// [`max_unread`](crate::ConcurrencyLimitLayer::max_unread) does, for responses that begin from now on.
    ///
    /// # Errors
    ///
    /// A time of zero.
    pub fn set_max_unread(&self, time: impl Into<Option<Duration>>) -> Result<(), ConfigError> {
        self.0.set_max_unread(checked_max_unread(time.into())?);
        Ok(())
    }

    /// Changes whether health calls need no permit, as
    /// [`exempt_grpc_health`](crate::ConcurrencyLimitLayer::exempt_grpc_health) does.
    pub fn set_exempt_grpc_health(&self, on: bool) {
        self.0.set_exempts_health(on);
    }

    /// Shadow mode, on or off: nobody is refused and nobody waits, and
    /// [`shadowed`](ConcurrencyLimitSnapshot::shadowed) counts who would have been refused, were there no
    /// queue. Those are not counted as in flight, so that the others are who the limit would have let in.
    pub fn shadow(&self, on: bool) {
        self.0.set_shadow(on);
    }
}

impl Indicator for ConcurrencyLimitHandle {
    /// Not well while as many calls are in flight as may be.
    fn indicate(&self) -> Result<(), String> {
        let limit = self.0.limit();
        match self.in_flight() {
            calls if calls < limit => Ok(()),
            calls => Err(format!("{calls} of {limit} calls in flight")),
        }
    }
}

const ALGORITHM_PANICKED: &str = "the adaptive algorithm panicked: use one that does not";

// ===== What can be right =====

pub(super) fn checked(limit: usize) -> Result<u32, ConfigError> {
    match u32::try_from(limit) {
        Ok(limit) if limit > 0 => Ok(limit),
        _ => Err(ConfigError::new("limit", limit, "use 1 to 4294967295 calls")),
    }
}

pub(super) fn checked_bounds(
    bounds: RangeInclusive<usize>,
) -> Result<RangeInclusive<u32>, ConfigError> {
    let (min, max) = (checked(*bounds.start())?, checked(*bounds.end())?);
    if min > max {
        return Err(ConfigError::new("adaptive.bounds", bounds, "put the lower one first"));
    }
    Ok(min..=max)
}

pub(super) fn checked_queue(length: usize, longest_wait: Duration) -> Result<u32, ConfigError> {
    match u32::try_from(length) {
        Ok(0..=MOST_WAITING) if length > 0 && longest_wait < Duration::from_millis(1) => {
            let remedy = "use 1ms or more, or a length of 0";
            Err(ConfigError::new("queue.longest_wait", longest_wait, remedy))
        }
        Ok(length @ 0..=MOST_WAITING) => Ok(length),
        _ => Err(ConfigError::new("queue.length", length, "use at most 2147483647")),
    }
}

pub(super) fn checked_max_unread(time: Option<Duration>) -> Result<Option<Duration>, ConfigError> {
    time.map(|time| ConfigError::above_zero("max_unread", time)).transpose()
}

pub(super) fn checked_order(order: QueueOrder) -> Result<QueueOrder, ConfigError> {
    match order {
        QueueOrder::Adaptive(longest) => {
            ConfigError::above_zero("queue_order", longest).map(QueueOrder::Adaptive)
        }
        order => Ok(order),
    }
}

impl fmt::Debug for ConcurrencyLimitHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("ConcurrencyLimitHandle").field(&*self.0).finish()
    }
}
