use std::{
    future::Future,
    mem,
    pin::Pin,
    task::{Context, Poll, ready},
};

use pin_project_lite::pin_project;
use tokio::time::{Instant, Sleep, sleep, sleep_until};

use super::{
    core::Limiter,
    lasting::Limit,
    queue::{Place, Turn},
};
use crate::call::{Anchor, Permit, Rejected, RejectedKind, has_passed};

pin_project! {
    /// A call's wait for its turn. Dropped at any point, it gives back what it has.
    pub struct Wait {
        place: Seat,
        deadline: Option<Instant>,
        until: Instant,
        is_new: bool,
        #[pin]
        timer: Sleep,
    }
}

impl Wait {
    pub(super) fn new(limiter: Limit, place: Place, deadline: Option<Instant>) -> Self {
        let longest = limiter.longest_wait();
        // The seat first: without a runtime `sleep` panics, and the place must not outlive that.
        let place = Seat { taken: Some((limiter.clone(), place)) };
        let longest = sleep(longest).deadline();
        let until = deadline.map_or(longest, |deadline| deadline.min(longest));
        let timer = sleep_until(limiter.look_by(until));
        Self { place, deadline, until, is_new: true, timer }
    }
}

/// The place, given up on drop.
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
    type Output = Result<Permit<Anchor<Limiter>>, Rejected>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut this = self.project();
        let Some((limiter, place)) = &this.place.taken else {
            unreachable!("polled after completion")
        };
        let kind = loop {
            // A turn that has come beats the longest wait, but nobody works for a caller who is gone.
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
            limiter.hand_over();
            this.timer.as_mut().reset(limiter.look_by(*this.until));
        };
        limiter.waited_in_vain(*place);
        let away = limiter.turn_away(kind).map(|token| limiter.permit(token));
        // Also right if the turn came just now: then the place is handed to the next.
        drop(this.place.taken.take().map(|taken| Seat { taken: Some(taken) }));
        Poll::Ready(away)
    }
}
