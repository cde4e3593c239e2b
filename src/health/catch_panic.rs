use std::{
    future::Future,
    pin::Pin,
    task::{Context, Poll, ready},
};

use crate::user_code::catch_panic;

/// A future of the user panicked: when it was made, polled or dropped.
#[derive(Debug)]
pub(super) struct Panicked;

/// Runs a future of the user, and returns its panics as [`Panicked`].
///
/// The inner future is dropped before this one resolves, so that a panic of its destructor is also returned.
pub(super) struct CatchPanic<F>(Option<Pin<Box<F>>>);

impl<F: Future> CatchPanic<F> {
    pub(super) fn new(make: impl FnOnce() -> F) -> Self {
        Self(catch_panic(|| Box::pin(make())))
    }
}

impl<F: Future> Future for CatchPanic<F> {
    type Output = Result<F::Output, Panicked>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let Some(future) = &mut self.0 else { return Poll::Ready(Err(Panicked)) };
        let result = match catch_panic(|| future.as_mut().poll(cx)) {
            Some(poll) => Ok(ready!(poll)),
            None => Err(Panicked),
        };
        let future = self.0.take();
        Poll::Ready(match catch_panic(|| drop(future)) {
            Some(()) => result,
            None => Err(Panicked),
        })
    }
}
