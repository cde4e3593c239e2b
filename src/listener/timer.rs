use std::{
    future::Future,
    pin::Pin,
    task::{Context, Waker},
};

use tokio::{
    runtime::Handle,
    task::coop,
    time::{Instant, Sleep, sleep_until},
};

/// A timer that is created when it is first needed, and reset only for an earlier deadline.
///
/// Each request moves the deadlines of its connection to a later time. The timer is not reset then. It fires at the old
/// deadline, and its owner computes the current deadline and arms it again. A request within its limits therefore needs
/// no timer operation.
///
/// The timer belongs to the runtime in which it is created, because a handler may poll an upgraded connection outside
/// of any runtime.
#[derive(Debug)]
pub(crate) struct LazyTimer {
    runtime: Handle,
    sleep: Option<Pin<Box<Sleep>>>,
    /// The waker that is registered with the timer. It changes when an upgraded connection moves to another task.
    waker: Option<Waker>,
}

impl LazyTimer {
    /// Creates a timer that is not armed. Panics outside of a Tokio runtime.
    pub(crate) fn new() -> Self {
        Self { runtime: Handle::current(), sleep: None, waker: None }
    }

    /// Wakes the current task at `deadline` or earlier. `now` is the current time.
    pub(crate) fn arm(&mut self, deadline: Instant, now: Instant, cx: &mut Context<'_>) {
        let sleep = self.sleep.get_or_insert_with(|| {
            let _context = self.runtime.enter();
            Box::pin(sleep_until(deadline))
        });
        let is_pending = now < sleep.deadline() && !sleep.is_elapsed();
        if deadline < sleep.deadline() || !is_pending {
            sleep.as_mut().reset(deadline);
            self.waker = None;
        }
        self.register(cx);
    }

    #[inline]
    pub(crate) fn is_armed(&self) -> bool {
        self.sleep.is_some()
    }

    /// Returns whether the timer has fired since it was armed. If not, the timer wakes the current task when it fires.
    pub(crate) fn has_fired(&mut self, cx: &mut Context<'_>) -> bool {
        match &self.sleep {
            None => false,
            Some(sleep) if sleep.is_elapsed() => true,
            // A timer without a registered waker (see `register`) does not elapse by itself: compare with the clock.
            Some(sleep) if self.waker.is_none() && sleep.deadline() <= Instant::now() => true,
            Some(_) => {
                self.register(cx);
                false
            }
        }
    }

    /// Registers the waker of the current task with the timer.
    fn register(&mut self, cx: &mut Context<'_>) {
        let Some(sleep) = &mut self.sleep else { return };
        if self.waker.as_ref().is_some_and(|waker| waker.will_wake(cx.waker())) {
            return;
        }
        if sleep.as_mut().poll(cx).is_ready() {
            // The deadline has passed since the caller read the clock. The next poll of the task observes it.
            cx.waker().wake_by_ref();
        }
        // If the coop budget is exhausted, tokio's `Sleep` wakes the task at once and does not register the waker.
        // `None` makes the next poll register it.
        self.waker = coop::has_budget_remaining().then(|| cx.waker().clone());
    }
}

#[cfg(test)]
mod tests {
    use std::{future::poll_fn, pin::pin, task::Poll, time::Duration};

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    /// Waits for the timer, which is armed by a poll without budget.
    #[tokio::test(start_paused = true)]
    async fn timer_armed_without_budget_wakes_its_task() {
        let (mut timer, began) = (LazyTimer::new(), Instant::now());
        poll_fn(|cx| {
            if !timer.is_armed() {
                while coop::has_budget_remaining() {
                    let _ = pin!(coop::consume_budget()).poll(cx);
                }
                timer.arm(began + SECOND, began, cx);
            }
            if timer.has_fired(cx) { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
        assert_eq!(began.elapsed(), SECOND);
    }

    #[tokio::test(start_paused = true)]
    async fn timer_moves_only_to_an_earlier_deadline_until_it_has_fired() {
        let (mut timer, began) = (LazyTimer::new(), Instant::now());
        let fired = async |timer: &mut LazyTimer, deadlines: &[u32]| {
            let now = Instant::now();
            let mut is_armed = false;
            poll_fn(|cx| {
                if !std::mem::replace(&mut is_armed, true) {
                    deadlines.iter().for_each(|at| timer.arm(began + *at * SECOND, now, cx));
                }
                if timer.has_fired(cx) { Poll::Ready(()) } else { Poll::Pending }
            })
            .await;
            began.elapsed()
        };
        assert_eq!(fired(&mut timer, &[3, 2, 4]).await, 2 * SECOND);
        assert_eq!(fired(&mut timer, &[5]).await, 5 * SECOND);
    }
}
