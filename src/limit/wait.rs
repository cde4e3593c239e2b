use std::{
    future::Future,
    mem,
    pin::Pin,
    task::{Context, Poll, ready},
};

use pin_project_lite::pin_project;
use tokio::time::{Instant, Sleep, sleep, sleep_until};

use super::{
    queue::{EntryId, Position},
    shared::{LimitPermit, SharedLimiter},
};
use crate::{
    outcome::{Rejected, RejectedKind},
    time::{WaitResult, has_passed},
};

pin_project! {
    /// A call that waits in the queue. It completes with the permit or with the rejection.
    ///
    /// Dropping it at any point removes the queue entry, or passes on a permit that the entry has just received.
    pub(crate) struct PermitWait {
        entry: OwnedEntry,
        deadline: Option<Instant>,
        // The end of the wait: the maximum wait or the deadline, whichever is earlier.
        until: Instant,
        // No waker has been registered for the queue entry yet.
        is_new: bool,
        // Fires at `until`. With partitions it also fires each time that a reservation may have expired.
        #[pin]
        timer: Sleep,
    }
}

impl PermitWait {
    pub(super) fn new(limiter: SharedLimiter, entry: EntryId, deadline: Option<Instant>) -> Self {
        let max_wait = limiter.max_wait();
        // The `OwnedEntry` is made first: outside of a runtime `sleep` panics, and then its drop removes the entry.
        let mut entry = OwnedEntry { entry: Some((limiter.clone(), entry)), since: None };
        // `sleep` accepts any duration, while an addition to the current time could overflow.
        let until = sleep(max_wait).deadline();
        entry.since = until.checked_sub(max_wait);
        let until = deadline.map_or(until, |deadline| deadline.min(until));
        let timer = sleep_until(limiter.recheck_at(until));
        Self { entry, deadline, until, is_new: true, timer }
    }
}

/// A queue entry. Its drop removes the entry, or passes on the permit that the entry has received.
struct OwnedEntry {
    entry: Option<(SharedLimiter, EntryId)>,
    /// The time at which the entry joined the queue. The queue counts the wait under its lock. The future of the caller
    /// exports it without the lock, because the export runs user code, which may read the trace of the call.
    since: Option<Instant>,
}

impl OwnedEntry {
    /// Ends the ownership of the entry without an export.
    fn leave(&mut self) -> Option<(SharedLimiter, Position)> {
        let (limiter, entry) = self.entry.take()?;
        let position = limiter.leave_queue(entry);
        Some((limiter, position))
    }

    /// Exports the wait of the entry.
    fn export(&self, limiter: &SharedLimiter, result: WaitResult) {
        if let Some(since) = self.since {
            limiter.export_wait(result, since);
        }
    }
}

impl Drop for OwnedEntry {
    fn drop(&mut self) {
        if let Some((limiter, position)) = self.leave() {
            let result = match position {
                Position::Queued => WaitResult::Abandoned,
                Position::Granted => WaitResult::Admitted,
                Position::Displaced => WaitResult::Rejected,
            };
            self.export(&limiter, result);
        }
    }
}

impl Future for PermitWait {
    type Output = Result<LimitPermit, Rejected>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut this = self.project();
        let Some((limiter, entry)) = &this.entry.entry else {
            unreachable!("polled after completion")
        };
        let (kind, was_granted) = loop {
            // A permit takes precedence over the end of the maximum wait, but not over the deadline: after the deadline
            // the response is of no use.
            match limiter.poll_position(*entry, mem::take(this.is_new), cx) {
                Position::Granted if !has_passed(*this.deadline) => {
                    let permit = limiter.permit(limiter.start_in(entry.0, limiter.in_flight()));
                    if let Some((limiter, _)) = this.entry.entry.take() {
                        this.entry.export(&limiter, WaitResult::Admitted);
                    }
                    return Poll::Ready(Ok(permit));
                }
                Position::Granted => break (RejectedKind::DeadlinePassed, true),
                Position::Displaced => break (RejectedKind::Outranked, false),
                Position::Queued => {}
            }
            ready!(this.timer.as_mut().poll(cx));
            if this.timer.deadline() >= *this.until {
                break match has_passed(*this.deadline) {
                    true => (RejectedKind::DeadlinePassed, false),
                    false => (RejectedKind::WaitedTooLong, false),
                };
            }
            // The timer fired before `until`: a reservation of another partition may have expired. That makes permits
            // available without a release that would pass them on.
            limiter.grant_next();
            this.timer.as_mut().reset(limiter.recheck_at(*this.until));
        };
        let was_queued = limiter.record_timeout(*entry);
        let rejected = limiter.reject(kind).map(|token| limiter.permit(token));
        // The entry may receive a permit before it is removed here. In that case `leave` passes the permit to the next
        // entry.
        if let Some((limiter, position)) = this.entry.leave() {
            // If the entry received a permit before the timeout was recorded, the queue has counted it as admitted.
            let is_granted = was_granted || !was_queued && position == Position::Granted;
            let result = if is_granted { WaitResult::Admitted } else { WaitResult::Rejected };
            this.entry.export(&limiter, result);
        }
        Poll::Ready(rejected)
    }
}
