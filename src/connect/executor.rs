//! Tells a connection that somebody waits for from one that was left behind.

use std::{
    cell::Cell,
    future::Future,
    num::NonZeroU64,
    pin::Pin,
    sync::atomic::{AtomicU64, Ordering},
    task::{Context, Poll},
};

use pin_project_lite::pin_project;

/// Spawns what hyper-util's client leaves to others, on tokio.
///
/// That client asks for a connection and for an idle one at once. If it gets an idle one first, it spawns the
/// other half to its end: good if the connection is nearly there, and bad if it stands in a line, where it
/// would take the place of a caller for nobody. On this executor it gives up its place in that line:
/// give it to `Client::builder` where a [`ConnectLayer`](super::ConnectLayer) has a cap.
/// [`Client`](super::Client) does.
///
/// # Panics
///
/// Outside of a Tokio runtime, as `tokio::spawn`.
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
    /// Which of the tasks here this thread is at.
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
        struct Back(Id);

        impl Drop for Back {
            fn drop(&mut self) {
                CURRENT.set(self.0);
            }
        }

        let this = self.project();
        let _back = Back(CURRENT.replace(*this.id));
        this.future.poll(cx)
    }
}

pin_project! {
    /// Runs for as long as it is not left behind: `None` if it is polled by another task of the executor
    /// than the one it began in.
    pub(super) struct Wanted<F> {
        #[pin]
        future: F,
        home: Id,
    }
}

pub(super) fn wanted<F>(future: F) -> Wanted<F> {
    Wanted { future, home: CURRENT.get() }
}

impl<F: Future> Future for Wanted<F> {
    type Output = Option<F::Output>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        let now = CURRENT.get();
        if now.is_some() && now != *this.home {
            return Poll::Ready(None);
        }
        this.future.poll(cx).map(Some)
    }
}
