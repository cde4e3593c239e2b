use std::{
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use tokio::{
    sync::{Notify, futures::OwnedNotified},
    time::{Sleep, sleep_until},
};

use super::Policy;

/// Wakes a caller that waits for an inner service when its layer starts to reject calls.
///
/// Registers no waiter until the inner service is pending.
#[derive(Default)]
pub(super) struct ClosedWatch(Option<Pin<Box<OwnedNotified>>>);

impl ClosedWatch {
    /// Returns ready when `is_closed` is true. Stays pending for a policy without a notification.
    pub(super) fn poll(
        &mut self,
        cx: &mut Context<'_>,
        notify: impl Fn() -> Option<Arc<Notify>>,
        is_closed: impl Fn() -> bool,
    ) -> Poll<()> {
        loop {
            if self.0.is_none() {
                self.0 = notify().map(|notify| Box::pin(notify.notified_owned()));
            }
            let Some(notified) = &mut self.0 else { return Poll::Pending };
            let woken = notified.as_mut().poll(cx).is_ready();
            if woken {
                self.forget();
            }
            // Checked after the waker is registered, so that no change in between is missed.
            if is_closed() {
                self.forget();
                return Poll::Ready(());
            }
            if !woken {
                return Poll::Pending;
            }
        }
    }

    #[inline]
    pub(super) fn forget(&mut self) {
        self.0 = None;
    }
}

/// Keeps a service with backpressure from being ready while its layer would reject a call.
#[derive(Default)]
pub(super) struct BackpressureWait {
    reopened: ClosedWatch,
    by_time: Option<Pin<Box<Sleep>>>,
}

impl BackpressureWait {
    /// Returns ready when a call would be admitted.
    pub(super) fn poll<Req, P: Policy<Req>>(
        &mut self,
        cx: &mut Context<'_>,
        policy: &P,
    ) -> Poll<()> {
        loop {
            if self.reopened.poll(cx, || policy.closed_signal(None), || policy.peek()).is_ready() {
                self.by_time = None;
                return Poll::Ready(());
            }
            let Some(at) = policy.changes_at() else { return Poll::Pending };
            let by_time = self.by_time.get_or_insert_with(|| Box::pin(sleep_until(at)));
            // The next change may now be earlier than when the timer was set.
            if by_time.deadline() > at {
                by_time.as_mut().reset(at);
            }
            if by_time.as_mut().poll(cx).is_pending() {
                return Poll::Pending;
            }
            self.by_time = None;
        }
    }
}
