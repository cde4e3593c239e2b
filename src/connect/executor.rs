//! Detects connects that hyper-util continues in the background.
//!
//! [`Executor`] gives each task that it spawns an id, and stores the id in a thread-local while the task is polled.
//! [`CancelIfMoved`] records the id at its creation. If it is polled under another id, hyper-util has moved the future
//! from the call to a background task.

use std::{
    cell::Cell,
    future::Future,
    num::NonZeroU64,
    pin::Pin,
    sync::atomic::{AtomicU64, Ordering},
    task::{Context, Poll},
};

use pin_project_lite::pin_project;

/// Spawns the background tasks of hyper-util's client on tokio.
///
/// For a call without an idle connection, that client connects, and waits for a connection to become idle at the same
/// time. If a connection becomes idle first, the client continues the connect in a background task. The pool can use
/// the resulting connection for the next call. If the connect is still in the queue of a
/// [`ConnectLayer`](super::layer::ConnectLayer), however, it would get a permit that no call needs. On this executor
/// such a connect leaves the queue instead.
///
/// Pass it to hyper-util's `Client::builder` if a [`ConnectLayer`](super::layer::ConnectLayer) has a cap.
/// [`Client`](super::client::Client) uses it.
///
/// # Panics
///
/// Panics outside of a Tokio runtime, as `tokio::spawn` does.
#[derive(Clone, Copy, Debug, Default)]
pub struct Executor;

impl<F> hyper::rt::Executor<F> for Executor
where
    F: Future<Output = ()> + Send + 'static,
{
    fn execute(&self, future: F) {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let id = NonZeroU64::new(NEXT.fetch_add(1, Ordering::Relaxed));
        tokio::spawn(Spawned { future, id });
    }
}

type Id = Option<NonZeroU64>;

thread_local! {
    /// The id of the executor's task that this thread polls, if it polls one.
    static CURRENT: Cell<Id> = const { Cell::new(None) };
}

pin_project! {
    struct Spawned<F> {
        #[pin]
        future: F,
        id: Id,
    }
}

impl<F: Future> Future for Spawned<F> {
    type Output = F::Output;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        struct RestoreId(Id);

        impl Drop for RestoreId {
            fn drop(&mut self) {
                CURRENT.set(self.0);
            }
        }

        let this = self.project();
        let _restore = RestoreId(CURRENT.replace(*this.id));
        this.future.poll(cx)
    }
}

pin_project! {
    /// The future of [`cancel_if_moved`].
    pub(super) struct CancelIfMoved<F> {
        #[pin]
        future: F,
        created_in: Id,
    }
}

/// Wraps a future, which returns `None` when it is polled in another task of the executor than the one in which it was
/// created. Polls outside of the executor's tasks do not count as another task.
pub(super) fn cancel_if_moved<F>(future: F) -> CancelIfMoved<F> {
    CancelIfMoved { future, created_in: CURRENT.get() }
}

impl<F: Future> Future for CancelIfMoved<F> {
    type Output = Option<F::Output>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        let now = CURRENT.get();
        if now.is_some() && now != *this.created_in {
            return Poll::Ready(None);
        }
        this.future.poll(cx).map(Some)
    }
}
