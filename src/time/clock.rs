//! Time: the clock of a layer's state, and one reading of the clock for all layers of a call.
//!
//! All time comes from `tokio::time`, so that tests can pause it. State machines take the time as an argument, in
//! [`Nanos`].

use std::{
    cell::Cell,
    future::Future,
    marker::PhantomData,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use tokio::time::{Instant, Sleep};

/// Nanoseconds since the state was created.
pub(crate) type Nanos = u64;

/// The clock of one layer's state: tokio's clock, relative to the creation of the state.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Clock {
    began: Instant,
}

impl Clock {
    pub(crate) fn new() -> Self {
        Self { began: Instant::now() }
    }

    /// Returns the time since the state was created. Never panics.
    #[inline]
    pub(crate) fn now(&self) -> Nanos {
        self.at(Instant::now())
    }

    /// Converts an instant that has been read already. An instant before the creation of the state is 0.
    #[inline]
    pub(crate) fn at(&self, now: Instant) -> Nanos {
        nanos(now.saturating_duration_since(self.began))
    }
}

/// Converts a duration. A duration of more than 584 years becomes `u64::MAX`.
#[inline]
pub(crate) fn nanos(duration: Duration) -> Nanos {
    let seconds = duration.as_secs().saturating_mul(1_000_000_000);
    seconds.saturating_add(u64::from(duration.subsec_nanos()))
}

/// Returns `Ready` once the deadline of the timer has passed.
///
/// `Sleep::poll` returns `Pending` without a check of the time if the task's coop budget is exhausted. An inner future
/// that exhausts the budget in every poll would suppress the timer for ever, so the clock is read first.
pub(crate) fn poll_timer(timer: Pin<&mut Sleep>, cx: &mut Context<'_>) -> Poll<()> {
    if timer.deadline() <= Instant::now() { Poll::Ready(()) } else { timer.poll(cx) }
}

// ===== One clock reading per call =====

thread_local! {
    /// Outer `None`: the thread is not in a call. Inner `None`: it is in a call, and the clock has not been read yet.
    static READING: Cell<Option<Option<Instant>>> = const { Cell::new(None) };
}

/// A guard for the time in which a thread runs `Service::call` of a stack. While it exists, the layers of the stack
/// share one reading of the clock, so that a stack with several deadlines reads it once.
///
/// `Service::call` does not wait, so the reading is valid until it returns. An inner service may run another call
/// within it, and may block before that call. The layers of that call therefore discard the reading in `poll_ready`, by
/// [`invalidate`](Self::invalidate). Without a guard, [`now`](Self::now) reads the clock each time.
#[cfg_attr(not(feature = "timeout"), allow(dead_code))] // Only the layers of the feature `timeout` begin a call.
pub(crate) struct CallClock {
    outermost: bool,
    /// Makes the guard `!Send`: it belongs to its thread.
    of: PhantomData<*const ()>,
}

impl CallClock {
    /// Begins a call on this thread. A guard within another guard changes nothing.
    #[inline]
    pub(crate) fn begin() -> Self {
        let outermost = READING.get().is_none();
        if outermost {
            READING.set(Some(None));
        }
        Self { outermost, of: PhantomData }
    }

    /// Discards the reading of the current call. Called in `poll_ready`: if that runs within a call, the reading may be
    /// old, and the call that follows `poll_ready` may come much later.
    #[inline]
    pub(crate) fn invalidate() {
        if let Some(Some(_)) = READING.get() {
            READING.set(Some(None));
        }
    }

    /// Returns whether the deadline has passed, so that no response to the current call could be in time.
    #[inline]
    pub(crate) fn is_past(deadline: Option<Instant>) -> bool {
        deadline.is_some_and(|deadline| deadline <= Self::now())
    }

    /// Returns the reading of the current call, or the current time outside of a call.
    #[inline]
    pub(crate) fn now() -> Instant {
        match READING.get() {
            Some(Some(reading)) => reading,
            call => {
                let now = Instant::now();
                READING.set(call.map(|_| Some(now)));
                now
            }
        }
    }
}

impl Drop for CallClock {
    #[inline]
    fn drop(&mut self) {
        if self.outermost {
            READING.set(None);
        }
    }
}

#[cfg(all(test, feature = "timeout"))]
mod tests {
    use tokio::time::advance;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn clock_is_read_once_in_a_call_until_it_is_invalidated() {
        let second = Duration::from_secs(1);
        let began = CallClock::now();
        let call = CallClock::begin();
        advance(second).await;
        assert_eq!(CallClock::now(), began + second, "read at the first use, not at the start");
        let nested = CallClock::begin();
        advance(second).await;
        drop(nested);
        assert_eq!(CallClock::now(), began + second);
        assert!(!CallClock::is_past(Some(began + 2 * second)));
        CallClock::invalidate();
        assert!(CallClock::is_past(Some(began + 2 * second)));
        drop(call);
        assert_eq!(CallClock::now(), began + 2 * second);
    }
}
