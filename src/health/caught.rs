use std::{
    future::Future,
    pin::Pin,
    task::{Context, Poll, ready},
};

use crate::call::catch_panic;

/// The user's code panicked: while it was made, while it ran, or while it was dropped.
#[derive(Debug)]
pub(super) struct Panicked;

/// Runs a future of the user's; a panic of it is an answer, wherever it comes from.
///
/// What the future owns is gone when this is done.
pub(super) struct Caught<F>(Option<Pin<Box<F>>>);

impl<F: Future> Caught<F> {
    pub(super) fn new(make: impl FnOnce() -> F) -> Self {
        Self(catch_panic(|| Box::pin(make())))
    }
}

impl<F: Future> Future for Caught<F> {
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
