use std::{
    cell::Cell,
    future::Future,
    marker::PhantomData,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use tokio::time::{Instant, Sleep};

/// Nanoseconds since a state began: what pure state machines are told.
pub(crate) type Nanos = u64;

/// The clock of one layer's state: tokio's, so that tests can pause it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Clock {
    began: Instant,
}

impl Clock {
    pub(crate) fn new() -> Self {
        Self { began: Instant::now() }
    }

    /// Never goes back, and never panics: before the beginning is the beginning.
    #[inline]
    pub(crate) fn now(&self) -> Nanos {
        self.at(Instant::now())
    }

    /// Converts an instant that has been read already. An earlier instant than the beginning is the beginning.
    #[inline]
    pub(crate) fn at(&self, now: Instant) -> Nanos {
        nanos(now.saturating_duration_since(self.began))
    }
}

/// 584 years fit; what does not is for ever.
#[inline]
pub(crate) fn nanos(duration: Duration) -> Nanos {
    let seconds = duration.as_secs().saturating_mul(1_000_000_000);
    seconds.saturating_add(u64::from(duration.subsec_nanos()))
}

/// Ready once it is time, also beside what uses up its task's budget each time: then no timer ever tells.
pub(crate) fn poll_timer(timer: Pin<&mut Sleep>, cx: &mut Context<'_>) -> Poll<()> {
    if timer.deadline() <= Instant::now() { Poll::Ready(()) } else { timer.poll(cx) }
}

// ===== One look for a whole stack =====

thread_local! {
    /// None outside of a call; else its moment, once somebody has asked.
    static MOMENT: Cell<Option<Option<Instant>>> = const { Cell::new(None) };
}

/// While there is one, this thread is in a `call`, from layer to layer: all that comes too late does so at the same
/// moment, and one look at the clock tells it. For what layers do in that call alone: what it calls may block in it,
/// and begins with a [new one](Self::anew) then.
#[cfg_attr(not(feature = "timeout"), allow(dead_code))] // Nobody begins one.
pub(crate) struct Moment {
    outermost: bool,
    /// Of this thread.
    of: PhantomData<*const ()>,
}

impl Moment {
    #[cfg(feature = "timeout")]
    #[inline]
    pub(crate) fn begin() -> Self {
        let outermost = MOMENT.get().is_none();
        if outermost {
            MOMENT.set(Some(None));
        }
        Self { outermost, of: PhantomData }
    }

    /// Who is asked whether it is ready, in the midst of a call, may be called long after that has begun.
    #[cfg(feature = "timeout")]
    #[inline]
    pub(crate) fn anew() {
        if let Some(Some(_)) = MOMENT.get() {
            MOMENT.set(Some(None));
        }
    }

    /// Whether an answer to the call that this thread is in would come too late, however quick.
    #[inline]
    pub(crate) fn is_past(deadline: Option<Instant>) -> bool {
        deadline.is_some_and(|deadline| deadline <= Self::now())
    }

    /// The moment of the call that this thread is in, or now.
    #[inline]
    pub(crate) fn now() -> Instant {
        match MOMENT.get() {
            Some(Some(moment)) => moment,
            call => {
                let now = Instant::now();
                MOMENT.set(call.map(|_| Some(now)));
                now
            }
        }
    }
}

impl Drop for Moment {
    #[inline]
    fn drop(&mut self) {
        if self.outermost {
            MOMENT.set(None);
        }
    }
}

#[cfg(all(test, feature = "timeout"))]
mod tests {
    use tokio::time::advance;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn the_clock_is_looked_at_once_in_a_call_and_anew_after_it() {
        let second = Duration::from_secs(1);
        let began = Moment::now();
        let call = Moment::begin();
        advance(second).await;
        assert_eq!(Moment::now(), began + second, "not before somebody asks");
        let further_in = Moment::begin();
        advance(second).await;
        drop(further_in);
        assert_eq!(Moment::now(), began + second);
        assert!(!Moment::is_past(Some(began + 2 * second)));
        Moment::anew();
        assert!(Moment::is_past(Some(began + 2 * second)));
        drop(call);
        assert_eq!(Moment::now(), began + 2 * second);
    }
}
