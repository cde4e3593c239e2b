use std::{
    future::Future,
    mem,
    pin::Pin,
    task::{Context, Poll, ready},
};

use pin_project_lite::pin_project;
use tokio::time::{Instant, Sleep, sleep, sleep_until};

use super::{
    limiter::Limiter,
    queue::{Place, Turn},
    reuse::Limit,
};
use crate::{
    outcome::{Rejected, RejectedKind},
    permit::{Permit, ShardOrSlot},
    time::has_passed,
};

pin_project! {
    /// A call that waits in the queue. It completes with the permit or with the rejection.
    ///
    /// Dropping it at any point removes the queue entry, or passes on a permit that the entry has just received.
    pub struct Wait {
        place: Seat,
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

impl Wait {
    pub(super) fn new(limiter: Limit, place: Place, deadline: Option<Instant>) -> Self {
        let longest = limiter.longest_wait();
        // The `Seat` is made first: outside of a runtime `sleep` panics, and then the drop of the `Seat` removes the
        // queue entry.
        let place = Seat { taken: Some((limiter.clone(), place)) };
        // `sleep` accepts any duration, while an addition to the current time could overflow.
        let longest = sleep(longest).deadline();
        let until = deadline.map_or(longest, |deadline| deadline.min(longest));
        let timer = sleep_until(limiter.look_by(until));
        Self { place, deadline, until, is_new: true, timer }
    }
}

/// A queue entry. Its drop removes the entry, or passes on the permit that the entry has received.
struct Seat {
    taken: Option<(Limit, Place)>,
}

impl Drop for Seat {
    fn drop(&mut self) {
        if let Some((limiter, place)) = self.taken.take() {
            limiter.leave(place);
        }
    }
}

impl Future for Wait {
    type Output = Result<Permit<ShardOrSlot<Limiter>>, Rejected>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut this = self.project();
        let Some((limiter, place)) = &this.place.taken else {
            unreachable!("polled after completion")
        };
        let kind = loop {
            // A permit takes precedence over the end of the maximum wait, but not over the deadline: after the deadline
            // the response is of no use.
            match limiter.look(*place, mem::take(this.is_new), cx) {
                Turn::Come if !has_passed(*this.deadline) => {
                    let permit = limiter.permit(limiter.begin_in(place.0, limiter.in_flight()));
                    this.place.taken = None;
                    return Poll::Ready(Ok(permit));
                }
                Turn::Come => break RejectedKind::DeadlinePassed,
                Turn::Lost => break RejectedKind::Outranked,
                Turn::Waits => {}
            }
            ready!(this.timer.as_mut().poll(cx));
            if this.timer.deadline() >= *this.until {
                let late = has_passed(*this.deadline);
                break if late {
                    RejectedKind::DeadlinePassed
                } else {
                    RejectedKind::WaitedTooLong
                };
            }
            // The timer fired before `until`: a reservation of another partition may have expired. That makes permits
            // available without a release that would hand them over.
            limiter.hand_over();
            this.timer.as_mut().reset(limiter.look_by(*this.until));
        };
        limiter.waited_in_vain(*place);
        let away = limiter.turn_away(kind).map(|token| limiter.permit(token));
        // The entry may receive a permit before it is removed here. In that case the drop of the `Seat` passes the
        // permit to the next entry.
        drop(this.place.taken.take().map(|taken| Seat { taken: Some(taken) }));
        Poll::Ready(away)
    }
}
