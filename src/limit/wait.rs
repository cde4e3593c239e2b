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
    time::has_passed,
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
        let entry = OwnedEntry(Some((limiter.clone(), entry)));
        // `sleep` accepts any duration, while an addition to the current time could overflow.
        let until = sleep(max_wait).deadline();
        let until = deadline.map_or(until, |deadline| deadline.min(until));
        let timer = sleep_until(limiter.recheck_at(until));
        Self { entry, deadline, until, is_new: true, timer }
    }
}

/// A queue entry. Its drop removes the entry, or passes on the permit that the entry has received.
struct OwnedEntry(Option<(SharedLimiter, EntryId)>);

impl Drop for OwnedEntry {
    fn drop(&mut self) {
        if let Some((limiter, entry)) = self.0.take() {
            limiter.leave_queue(entry);
        }
    }
}

impl Future for PermitWait {
    type Output = Result<LimitPermit, Rejected>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut this = self.project();
        let Some((limiter, entry)) = &this.entry.0 else { unreachable!("polled after completion") };
        let kind = loop {
            // A permit takes precedence over the end of the maximum wait, but not over the deadline: after the deadline
            // the response is of no use.
            match limiter.poll_position(*entry, mem::take(this.is_new), cx) {
                Position::Granted if !has_passed(*this.deadline) => {
                    let permit = limiter.permit(limiter.start_in(entry.0, limiter.in_flight()));
                    this.entry.0 = None;
                    return Poll::Ready(Ok(permit));
                }
                Position::Granted => break RejectedKind::DeadlinePassed,
                Position::Displaced => break RejectedKind::Outranked,
                Position::Queued => {}
            }
            ready!(this.timer.as_mut().poll(cx));
            if this.timer.deadline() >= *this.until {
                break if has_passed(*this.deadline) {
                    RejectedKind::DeadlinePassed
                } else {
                    RejectedKind::WaitedTooLong
                };
            }
            // The timer fired before `until`: a reservation of another partition may have expired. That makes permits
            // available without a release that would pass them on.
            limiter.grant_next();
            this.timer.as_mut().reset(limiter.recheck_at(*this.until));
        };
        limiter.record_timeout(*entry);
        let rejected = limiter.reject(kind).map(|token| limiter.permit(token));
        // The entry may receive a permit before it is removed here. In that case the drop of the `OwnedEntry` passes
        // the permit to the next entry.
        drop(this.entry.0.take().map(|entry| OwnedEntry(Some(entry))));
        Poll::Ready(rejected)
    }
}
