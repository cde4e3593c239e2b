use std::{
    future::Future,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use pin_project_lite::pin_project;
use tokio::time::{Instant, Sleep, sleep_until};

/// Times a producer's silence: from when it is asked and has nothing. Whoever does not ask is not timed.
///
/// Boxed timer, made at the first silence: a body that is always ahead of its reader never pays for it. A frame
/// does not touch the timer; one that is due for an earlier silence is found to be too early, and set anew.
#[derive(Default)]
pub(super) struct Stall(Option<Pin<Box<Silence>>>);

pin_project! {
    struct Silence {
        since: Option<Instant>,
        #[pin]
        timer: Sleep,
    }
}

/// What is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Over {
    /// The silence has lasted as long as it may.
    Silence,
    /// The time of the whole.
    End,
}

impl Stall {
    pub(super) const fn new() -> Self {
        Self(None)
    }

    /// Ends the silence, and returns when it began.
    #[inline]
    pub(super) fn over(&mut self) -> Option<Instant> {
        self.0.as_mut().and_then(|silence| silence.as_mut().project().since.take())
    }

    /// It is asked and silent.
    pub(super) fn poll(
        &mut self,
        limit: Option<Duration>,
        end: Option<Instant>,
        cx: &mut Context<'_>,
    ) -> Poll<Over> {
        let since = self.0.as_ref().and_then(|silence| silence.since);
        let again = since.is_some() || limit.is_none() && self.0.is_some();
        let since = limit.map(|_| since.unwrap_or_else(Instant::now));
        let silence = limit.zip(since).and_then(|(limit, since)| since.checked_add(limit));
        let (at, over) = match (silence, end) {
            (None, None) => return Poll::Pending,
            (Some(at), None) => (at, Over::Silence),
            (None, Some(at)) => (at, Over::End),
            (Some(silence), Some(end)) if silence < end => (silence, Over::Silence),
            (Some(_), Some(end)) => (end, Over::End),
        };
        let made = || Box::pin(Silence { since, timer: sleep_until(at) });
        let mut this = self.0.get_or_insert_with(made).as_mut().project();
        *this.since = since;
        if this.timer.deadline() > at {
            this.timer.as_mut().reset(at);
        }
        while this.timer.as_mut().poll(cx).is_ready() {
            if this.timer.deadline() >= at {
                return Poll::Ready(over);
            }
            this.timer.as_mut().reset(at);
        }
        // A producer may use up its task's budget each time: then no timer ever tells.
        if again && at <= Instant::now() {
            return Poll::Ready(over);
        }
        Poll::Pending
    }
}
