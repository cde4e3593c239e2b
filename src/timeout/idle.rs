use std::{
    future::Future,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use pin_project_lite::pin_project;
use tokio::time::{Instant, Sleep, sleep_until};

/// Measures the time for which a body is pending. The time begins with a poll that finds no frame, so a consumer that
/// does not poll is not timed.
///
/// The timer is in a box that is created at the first such poll. A body that always has a frame needs none. A frame
/// does not reset the timer, because a reset takes a lock of the runtime. A timer that fires for an earlier wait is
/// therefore too early for the current one, and is set again.
#[derive(Default)]
pub(super) struct IdleTimer(Option<Pin<Box<Silence>>>);

pin_project! {
    struct Silence {
        since: Option<Instant>,
        #[pin]
        timer: Sleep,
    }
}

/// The limit that was reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Expired {
    /// The body was pending for the maximum time.
    Silence,
    /// The end of the whole call has come.
    End,
}

impl IdleTimer {
    pub(super) const fn new() -> Self {
        Self(None)
    }

    /// Ends the current wait after a frame. Returns when the wait began.
    #[inline]
    pub(super) fn end_wait(&mut self) -> Option<Instant> {
        self.0.as_mut().and_then(|silence| silence.as_mut().project().since.take())
    }

    /// Checks the limits after a poll that found no frame: `limit` is the maximum time of this wait, `end` the end of
    /// the whole call. If neither has been reached, registers the task with the timer.
    pub(super) fn poll(
        &mut self,
        limit: Option<Duration>,
        end: Option<Instant>,
        cx: &mut Context<'_>,
    ) -> Poll<Expired> {
        let since = self.0.as_ref().and_then(|silence| silence.since);
        let again = since.is_some() || limit.is_none() && self.0.is_some();
        let since = limit.map(|_| since.unwrap_or_else(Instant::now));
        let silence = limit.zip(since).and_then(|(limit, since)| since.checked_add(limit));
        let (at, expired) = match (silence, end) {
            (None, None) => return Poll::Pending,
            (Some(at), None) => (at, Expired::Silence),
            (None, Some(at)) => (at, Expired::End),
            (Some(silence), Some(end)) if silence < end => (silence, Expired::Silence),
            (Some(_), Some(end)) => (end, Expired::End),
        };
        let made = || Box::pin(Silence { since, timer: sleep_until(at) });
        let mut this = self.0.get_or_insert_with(made).as_mut().project();
        *this.since = since;
        if this.timer.deadline() > at {
            this.timer.as_mut().reset(at);
        }
        while this.timer.as_mut().poll(cx).is_ready() {
            if this.timer.deadline() >= at {
                return Poll::Ready(expired);
            }
            this.timer.as_mut().reset(at);
        }
        // The producer can exhaust the coop budget of the task in each poll. A tokio timer is then always pending, so
        // the clock is read from the second poll on.
        if again && at <= Instant::now() {
            return Poll::Ready(expired);
        }
        Poll::Pending
    }
}
