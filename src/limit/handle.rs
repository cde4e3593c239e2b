use std::{fmt, ops::RangeInclusive, time::Duration};

use super::{
    adaptive::{LimitChange, Sampler},
    check::{
        checked_bounds, checked_cancelled_after, checked_limit, checked_max_unread, checked_order,
        checked_queue,
    },
    limiter::Acquisition,
    partition::CallClass,
    queue::QueueOrder,
    shared::SharedLimiter,
    upgrade::OwnedPermit,
    wait::PermitWait,
};
use crate::{
    error::ConfigError,
    event::settings_changed,
    indicator::Indicator,
    outcome::{LayerKind, Rejected, RejectedKind},
};

/// A handle that observes and changes a concurrency limit.
///
/// Clones refer to the same limit, as do all services that the layer or a clone of it made.
#[derive(Clone)]
pub struct ConcurrencyLimitHandle(pub(super) SharedLimiter);

/// A snapshot of a concurrency limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ConcurrencyLimitSnapshot {
    /// The maximum number of calls in flight.
    pub limit: u32,
    /// The last change of an adaptive limit, with its reason. `None` for a fixed limit, and before the first change.
    pub last_change: Option<LimitChange>,
    /// The number of calls in flight. By default a call is in flight to the end of its response body.
    pub in_flight: u32,
    /// The number of calls in the queue.
    pub waiting: u32,
    /// The number of calls rejected because the limit was reached and the queue was full or absent.
    pub rejected_full: u64,
    /// The number of calls rejected because they had waited in the queue for the maximum time.
    pub rejected_waited: u64,
    /// The number of calls rejected because their [deadline](crate::time::Deadline) had passed, in the queue or before
    /// it.
    pub rejected_deadline: u64,
    /// The number of calls rejected because of their priority.
    pub rejected_outranked: u64,
    /// The number of calls admitted in [shadow mode](ConcurrencyLimitHandle::set_shadow) that would have been rejected.
    pub shadowed: u64,
    /// The median of the waiting times in the queue in the last 30 to 60 s, too high by less than 1 %. `None` if no
    /// call waited.
    pub wait_p50: Option<Duration>,
    /// The 99th percentile of the same waiting times.
    pub wait_p99: Option<Duration>,
    /// The number of exempt calls in flight; [`in_flight`](Self::in_flight) does not contain them.
    pub exempt_in_flight: u32,
    /// The number of exempt calls since the limit was made.
    pub exempt: u64,
    /// The number of responses that released their permit because their client did not read them.
    pub unread: u64,
}

impl ConcurrencyLimitSnapshot {
    /// Returns the number of all rejected calls.
    #[must_use]
    pub const fn rejected(&self) -> u64 {
        self.rejected_full
            .saturating_add(self.rejected_waited)
            .saturating_add(self.rejected_deadline)
            .saturating_add(self.rejected_outranked)
    }
}

impl ConcurrencyLimitHandle {
    /// Returns a snapshot of the limit. Its numbers are read one after the other, so they may differ by concurrent
    /// calls.
    #[must_use]
    pub fn snapshot(&self) -> ConcurrencyLimitSnapshot {
        let (exempt, exempt_in_flight) = self.0.exempt();
        ConcurrencyLimitSnapshot {
            limit: self.0.limit(),
            last_change: self.0.adaptive().and_then(Sampler::last_change),
            in_flight: self.0.in_flight(),
            waiting: self.0.waiting(),
            rejected_full: self.0.rejected(RejectedKind::Full),
            rejected_waited: self.0.rejected(RejectedKind::WaitedTooLong),
            rejected_deadline: self.0.rejected(RejectedKind::DeadlinePassed),
            rejected_outranked: self.0.rejected(RejectedKind::Outranked),
            shadowed: self.0.shadowed(),
            wait_p50: self.0.wait(0.5),
            wait_p99: self.0.wait(0.99),
            exempt_in_flight,
            exempt,
            unread: self.0.unread(),
        }
    }

    /// Returns the maximum number of calls in flight.
    #[must_use]
    pub fn limit(&self) -> u32 {
        self.0.limit()
    }

    /// Returns the number of calls in flight. By default a call is in flight to the end of its response body.
    #[must_use]
    pub fn in_flight(&self) -> u32 {
        self.0.in_flight()
    }

    /// Acquires a permit for work that is not a call of the layer, if a permit is free and the queue is empty. Use it
    /// for a WebSocket that is to be closed with code 1013 instead of rejected, or for background work.
    ///
    /// # Errors
    ///
    /// Returns a [`Rejected`] if no permit can be acquired at once. The rejection is counted like that of a call.
    pub fn try_acquire(&self) -> Result<OwnedPermit, Rejected> {
        let token = self.0.try_acquire_as_default();
        let token = token.map_or_else(|| self.0.reject(RejectedKind::Full), Ok)?;
        Ok(OwnedPermit::acquired(self.0.permit(token)))
    }

    /// Acquires a permit, at once or after waiting in the queue like a call. Dropping the future removes its queue
    /// entry.
    ///
    /// # Errors
    ///
    /// Returns a [`Rejected`] if the limit is reached and the queue is full or absent, or if the maximum waiting time
    /// has passed. A limit that [rejects by priority](super::partition::PartitionedLimitLayer::reject_by_priority) may
    /// also reject it in favour of calls above the normal priority.
    ///
    /// # Panics
    ///
    /// Panics outside of a Tokio runtime with timers, if it has to wait.
    pub async fn acquire(&self) -> Result<OwnedPermit, Rejected> {
        let token = match self.0.acquire(CallClass::default()) {
            Ok(Acquisition::Admitted(token)) => token,
            Ok(Acquisition::Queued(entry)) => {
                let permit = PermitWait::new(self.0.clone(), entry, None).await?;
                return Ok(OwnedPermit::acquired(permit));
            }
            Err(kind) => self.0.reject(kind)?,
        };
        Ok(OwnedPermit::acquired(self.0.permit(token)))
    }

    /// Returns a percentile of the waiting times in the queue in the last 30 to 60 s. `share` is from 0 to 1: with
    /// 0.99, 99 % of the waits were not longer than the result. The result is too high by less than 1 %. It
    /// includes the calls that were rejected after waiting for the maximum time or to their deadline. `None` if no call
    /// waited.
    #[must_use]
    pub fn wait_percentile(&self, share: f64) -> Option<Duration> {
        self.0.wait(share)
    }

    // ===== Changes at run time =====

    /// Sets the limit. A higher limit admits queued calls at once; a lower one takes effect as calls end. An adaptive
    /// limit continues from this value, within its bounds.
    ///
    /// # Errors
    ///
    /// Returns an error if the limit is zero or more than `u32::MAX`, or if the algorithm of an adaptive limit
    /// panicked; then the limit keeps its value.
    pub fn set_limit(&self, limit: usize) -> Result<(), ConfigError> {
        let panicked = || ConfigError::new("limit", limit, ALGORITHM_PANICKED);
        self.0.set_limit(checked_limit(limit)?).ok_or_else(panicked)
    }

    /// Sets the bounds of an adaptive limit. The algorithm keeps the state that it has learnt.
    ///
    /// # Errors
    ///
    /// Returns an error if the bounds are invalid, if the limit is fixed or its algorithm has no bounds, or if the
    /// algorithm panicked; then the limit keeps its value.
    pub fn set_bounds(&self, bounds: RangeInclusive<usize>) -> Result<(), ConfigError> {
        let within = checked_bounds(bounds.clone())?;
        let remedy = match self.0.set_bounds(within) {
            Some(true) => {
                self.report_setting("bounds");
                return Ok(());
            }
            Some(false) => "set the limit: it has no bounds",
            None => ALGORITHM_PANICKED,
        };
        Err(ConfigError::new("adaptive.bounds", bounds, remedy))
    }

    /// Sets the length of the queue and the maximum wait, as [`queue`](super::layer::ConcurrencyLimitLayer::queue)
    /// does. Calls that wait already keep their queue entries, even if the queue is longer than the new length, and the
    /// maximum wait with which they joined.
    ///
    /// # Errors
    ///
    /// Returns an error for the values that [`queue`](super::layer::ConcurrencyLimitLayer::queue) rejects.
    pub fn set_queue(&self, length: usize, max_wait: Duration) -> Result<(), ConfigError> {
        self.0.set_queue(checked_queue(length, max_wait)?, max_wait);
        self.report_setting("queue");
        Ok(())
    }

    /// Sets the queue order. It also applies to the calls that wait already.
    ///
    /// # Errors
    ///
    /// Returns an error for an adaptive order with a time of zero.
    pub fn set_queue_order(&self, order: QueueOrder) -> Result<(), ConfigError> {
        self.0.set_order(checked_order(order)?);
        self.report_setting("queue_order");
        Ok(())
    }

    /// Sets the `Retry-After` hint of rejections, as [`retry_after`](super::layer::ConcurrencyLimitLayer::retry_after)
    /// does.
    pub fn set_retry_after(&self, after: Duration) {
        self.0.set_retry_after(after);
        self.report_setting("retry_after");
    }

    /// Sets the time after which a response that its client does not read releases its permit, as
    /// [`max_unread`](super::layer::ConcurrencyLimitLayer::max_unread) does. It applies to responses that begin after
    /// this call.
    ///
    /// # Errors
    ///
    /// Returns an error for a time of zero.
    pub fn set_max_unread(&self, time: impl Into<Option<Duration>>) -> Result<(), ConfigError> {
        self.0.set_max_unread(checked_max_unread(time.into())?);
        self.report_setting("max_unread");
        Ok(())
    }

    /// Sets whether health calls need no permit, as
    /// [`exempt_grpc_health`](super::layer::ConcurrencyLimitLayer::exempt_grpc_health) does.
    pub fn set_exempt_grpc_health(&self, on: bool) {
        self.0.set_exempts_health(on);
        self.report_setting("exempt_grpc_health");
    }

    /// Turns shadow mode on or off. In shadow mode no call is rejected, and no further call joins the queue.
    /// [`shadowed`](ConcurrencyLimitSnapshot::shadowed) counts the calls that a limit without a queue would have
    /// rejected. These calls are not counted as in flight, so that the other calls are those that the limit would have
    /// admitted.
    pub fn set_shadow(&self, on: bool) {
        self.0.set_shadow(on);
        self.report_setting("shadow");
    }

    /// Sets whether a call releases its permit at its response head, as
    /// [`release_at_head`](super::layer::ConcurrencyLimitLayer::release_at_head) does.
    pub fn set_release_at_head(&self, on: bool) {
        self.0.set_release_at_head(on);
        self.report_setting("release_at_head");
    }

    /// Sets whether an adaptive limit measures calls to the end of the response body, as
    /// [`until_body_end`](super::layer::ConcurrencyLimitLayer::until_body_end) does. It has no effect on a fixed limit.
    pub fn set_until_body_end(&self, on: bool) {
        if let Some(adaptive) = self.0.adaptive() {
            adaptive.set_until_body_end(on);
            self.report_setting("until_body_end");
        }
    }

    /// Sets the time after which a call that its caller ended counts as a drop, as
    /// [`count_cancelled_after`](super::layer::ConcurrencyLimitLayer::count_cancelled_after) does.
    ///
    /// # Errors
    ///
    /// Returns an error for a time of zero, and for any time if the limit is fixed.
    pub fn set_count_cancelled_after(
        &self,
        time: impl Into<Option<Duration>>,
    ) -> Result<(), ConfigError> {
        let adaptive = self.0.adaptive();
        let time = checked_cancelled_after(time.into(), adaptive.is_some())?;
        if let Some(adaptive) = adaptive {
            adaptive.set_count_cancelled_after(time);
            self.report_setting("count_cancelled_after");
        }
        Ok(())
    }

    /// Reports a setting that has changed.
    fn report_setting(&self, key: &'static str) {
        let layer = LayerKind::ConcurrencyLimit.as_str();
        settings_changed!(limit, self.0.is_in_use(), layer, self.0.name(), key);
    }
}

impl Indicator for ConcurrencyLimitHandle {
    /// Reports the limit as unhealthy while it is reached.
    fn indicate(&self) -> Result<(), String> {
        let limit = self.0.limit();
        match self.in_flight() {
            calls if calls < limit => Ok(()),
            calls => Err(format!("{calls} of {limit} calls in flight")),
        }
    }
}

const ALGORITHM_PANICKED: &str = "the adaptive algorithm panicked: use one that does not";

impl fmt::Debug for ConcurrencyLimitHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("ConcurrencyLimitHandle").field(&*self.0).finish()
    }
}
