use std::{
    future::Future,
    pin::Pin,
    task::{Context, Poll, ready},
};

use pin_project_lite::pin_project;
use tokio::time::{Sleep, sleep};

use super::{core::Limiter, queue::Place};
use crate::call::{Permit, Rejected, RejectedKind, Shared};

pin_project! {
    /// A call's wait for its turn. Dropped at any point, it gives back what it has.
    pub struct Wait {
        place: Seat,
        #[pin]
        longest: Sleep,
    }
}

impl Wait {
    pub(super) fn new(limiter: Shared<Limiter>, place: Place) -> Self {
        let longest = limiter.longest_wait();
        // The seat first: without a runtime `sleep` panics, and the place must not outlive that.
        Self { place: Seat { taken: Some((limiter, place)) }, longest: sleep(longest) }
    }
}

/// The place, given up on drop.
struct Seat {
    taken: Option<(Shared<Limiter>, Place)>,
}

impl Drop for Seat {
    fn drop(&mut self) {
        if let Some((limiter, place)) = self.taken.take() {
            limiter.leave(place);
        }
    }
}

impl Future for Wait {
    type Output = Result<Permit<Limiter>, Rejected>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        let Some((limiter, place)) = &this.place.taken else {
            unreachable!("polled after completion")
        };
        // A turn that has come beats a deadline that has passed.
        if limiter.poll_turn(*place, cx).is_ready() {
            let permit = limiter.permit(limiter.begin(limiter.in_flight()));
            this.place.taken = None;
            return Poll::Ready(Ok(permit));
        }
        ready!(this.longest.poll(cx));
        let rejected = limiter.refuse(RejectedKind::WaitedTooLong);
        // Also right if the turn came just now: then the place is handed to the next.
        drop(this.place.taken.take().map(|taken| Seat { taken: Some(taken) }));
        Poll::Ready(Err(rejected))
    }
}
