use std::{
    future::Future,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use tokio::time::{Instant, Sleep, sleep_until};

/// Times a producer's silence: from when it is asked and has nothing. Whoever does not ask is not timed.
///
/// Boxed timer, made at the first silence: a body that is always ahead of its reader never pays for it. A frame
/// does not touch the timer; one that is due for an earlier silence is found to be too early, and set anew.
#[derive(Default)]
pub(super) struct Stall {
    since: Option<Instant>,
    timer: Option<Pin<Box<Sleep>>>,
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
        Self { since: None, timer: None }
    }

    /// It was heard of.
    #[inline]
    pub(super) fn over(&mut self) {
        self.since = None;
    }

    /// It is asked and silent.
    pub(super) fn poll(
        &mut self,
        limit: Option<Duration>,
        end: Option<Instant>,
        cx: &mut Context<'_>,
    ) -> Poll<Over> {
        let silence = limit.and_then(|limit| {
            let since = *self.since.get_or_insert_with(Instant::now);
            since.checked_add(limit)
        });
        let (at, over) = match (silence, end) {
            (None, None) => return Poll::Pending,
            (Some(at), None) => (at, Over::Silence),
            (None, Some(at)) => (at, Over::End),
            (Some(silence), Some(end)) if silence < end => (silence, Over::Silence),
            (Some(_), Some(end)) => (end, Over::End),
        };
        let timer = self.timer.get_or_insert_with(|| Box::pin(sleep_until(at)));
        if timer.deadline() > at {
            timer.as_mut().reset(at);
        }
        loop {
            ready!(timer.as_mut().poll(cx));
            if timer.deadline() >= at {
                return Poll::Ready(over);
            }
            timer.as_mut().reset(at);
        }
    }
}
