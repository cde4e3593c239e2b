use std::{
    fmt,
    future::Future,
    pin::Pin,
    task::{Context, Poll},
};

use pin_project_lite::pin_project;

use crate::{BoxError, ClientError};

pin_project! {
    /// The future of a call of a ready-made client.
    #[must_use = "futures do nothing unless polled"]
    pub struct ClientFuture<F> {
        #[pin]
        future: F,
    }
}

impl<F> ClientFuture<F> {
    pub(super) fn new(future: F) -> Self {
        Self { future }
    }
}

impl<F, T> Future for ClientFuture<F>
where
    F: Future<Output = Result<T, BoxError>>,
{
    type Output = Result<T, ClientError>;

    #[inline]
    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        self.project().future.poll(cx).map_err(ClientError::new)
    }
}

impl<F> fmt::Debug for ClientFuture<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClientFuture").finish_non_exhaustive()
    }
}
