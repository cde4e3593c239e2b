//! One timer for all layers of a task that wait for the same deadline.
//!
//! Each layer that enforces a deadline needs a timer while it waits. Without this module every layer would register a
//! timer of its own for the same instant, and each timer takes a lock of the runtime twice. With it, an outer layer
//! relies on the timer of an inner layer if that timer is certain to wake the task in time.
//!
//! # Mechanism
//!
//! The thread-local [`SET`] holds the last alarm that armed a timer in the current poll. A layer with an alarm does the
//! following in each poll:
//!
//! 1. [`SharedTimer::listen`] clears `SET`.
//! 2. The layer polls its inner future. An alarm within that future may arm a timer and publish itself in `SET`.
//! 3. [`SharedTimer::poll`] reads `SET`. It registers no timer if the published alarm
//!    - is due no later than this alarm,
//!    - wakes the same task, which the data and the vtable of the waker identify, and
//!    - lies within the memory of the inner future that was just polled.
//!
//! A published alarm stays in `SET`, so that the next outer layer can rely on it as well.
//!
//! # Why this is sound
//!
//! The inner alarm is pinned, and it is a part of the inner future. It can be dropped or cleared only while the inner
//! future is polled or dropped by this layer, and after each poll this layer calls [`SharedTimer::poll`] again. When the
//! inner timer fires, it wakes the same task, which polls this layer.
//!
//! A boxed inner future does not qualify, because its memory lies elsewhere: it could be polled once in this task and
//! then move to another task. An alarm that is cleared or dropped removes itself from `SET`, so the pointer in `SET` is
//! never that of an alarm without a timer. The pointer is compared and never dereferenced.
//!
//! A change must preserve the order of the three steps: no other code may poll or drop the inner future between step 2
//! and step 3.

use std::{
    cell::Cell,
    future::Future,
    mem,
    pin::Pin,
    ptr,
    task::{Context, Poll, RawWakerVTable},
};

use pin_project_lite::pin_project;
use tokio::time::{Instant, Sleep, sleep_until};

use super::clock::poll_timer;

pin_project! {
    /// Wakes its task at an instant: by a timer of its own, or by the timer of an alarm within the inner future that is
    /// due no later. See the [module](self).
    pub(crate) struct SharedTimer {
        at: Option<Instant>,
        #[pin]
        timer: Option<Sleep>,
    }

    impl PinnedDrop for SharedTimer {
        fn drop(this: Pin<&mut Self>) {
            this.clear();
        }
    }
}

/// An alarm that has armed its timer.
#[derive(Clone, Copy)]
struct Set {
    at: Instant,
    task: Task,
    by: *const SharedTimer,
}

/// The identity of a task: the data and the vtable of its waker.
type Task = (*const (), *const RawWakerVTable);

thread_local! {
    /// The last alarm that armed its timer since the last [`SharedTimer::listen`].
    static SET: Cell<Option<Set>> = const { Cell::new(None) };
}

impl SharedTimer {
    pub(crate) const fn new() -> Self {
        Self { at: None, timer: None }
    }

    /// Clears the thread-local, so that [`poll`](Self::poll) finds only alarms of the inner future. Called just before
    /// the inner future is polled.
    #[inline]
    pub(crate) fn listen() {
        SET.set(None);
    }

    /// Sets the instant. The timer is registered by the next [`poll`](Self::poll).
    pub(crate) fn set(self: Pin<&mut Self>, at: Instant) {
        *self.project().at = Some(at);
    }

    /// Removes the instant and the timer. Does nothing if the alarm is not set.
    #[inline]
    pub(crate) fn clear(self: Pin<&mut Self>) {
        if self.at.is_some() {
            self.unset();
        }
    }

    fn unset(self: Pin<&mut Self>) {
        let own = ptr::from_ref(&*self);
        if SET.get().is_some_and(|set| set.by == own) {
            SET.set(None);
        }
        let mut this = self.project();
        *this.at = None;
        this.timer.set(None);
    }

    /// Returns `Ready` once the instant has passed, and `Pending` for ever if the alarm is not set. `around` is the
    /// inner future, which has just been polled.
    pub(crate) fn poll<F>(self: Pin<&mut Self>, around: &F, cx: &mut Context<'_>) -> Poll<()> {
        let by = ptr::from_ref(&*self);
        let mut this = self.project();
        let Some(at) = *this.at else { return Poll::Pending };
        let task: Task = (cx.waker().data(), cx.waker().vtable());
        let start = ptr::from_ref(around).addr();
        let within = start..start + mem::size_of_val(around);
        let heard = SET.get().filter(|set| set.task == task && within.contains(&set.by.addr()));
        if heard.is_some_and(|set| set.at <= at) {
            return Poll::Pending;
        }
        let over = match this.timer.as_mut().as_pin_mut() {
            // The clock is not read: the deadline was checked before the call began.
            None => {
                this.timer.set(Some(sleep_until(at)));
                this.timer.as_pin_mut().map_or(Poll::Pending, |timer| timer.poll(cx))
            }
            Some(mut timer) => {
                if timer.deadline() != at {
                    timer.as_mut().reset(at);
                }
                poll_timer(timer, cx)
            }
        };
        if over.is_pending() {
            SET.set(Some(Set { at, task, by }));
        }
        over
    }
}

#[cfg(test)]
mod tests {
    use std::{
        future::poll_fn,
        sync::{
            Arc,
            atomic::{AtomicU32, Ordering::SeqCst},
        },
        task::{Wake, Waker},
        time::Duration,
    };

    use tokio::time::advance;

    use super::*;

    const fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    /// Counts how often it is woken.
    #[derive(Default)]
    struct Counts(AtomicU32);

    impl Wake for Counts {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, SeqCst);
        }
    }

    /// An outer alarm, and an inner future with another alarm.
    struct Nested {
        around: Pin<Box<SharedTimer>>,
        further_in: Pin<Box<Inner>>,
    }

    pin_project! {
        struct Inner {
            #[pin]
            alarm: Option<SharedTimer>,
        }
    }

    impl Nested {
        fn of(inner: Instant, outer: Instant) -> Self {
            let mut alarms = [inner, outer].map(|at| {
                let mut alarm = SharedTimer::new();
                alarm.at = Some(at);
                Some(alarm)
            });
            let around = Box::pin(alarms[1].take().expect("two"));
            Self { around, further_in: Box::pin(Inner { alarm: alarms[0].take() }) }
        }

        fn inner(&mut self, cx: &mut Context<'_>) -> Poll<()> {
            let alarm = self.further_in.as_mut().project().alarm.as_pin_mut();
            alarm.map_or(Poll::Pending, |alarm| alarm.poll(&(), cx))
        }

        fn outer(&mut self, cx: &mut Context<'_>) -> Poll<()> {
            self.around.as_mut().poll(&*self.further_in, cx)
        }
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_is_set_further_in_and_no_later_is_enough() {
        let now = Instant::now();
        for (inner, outer, own) in [(5, 9, false), (9, 9, false), (9, 5, true)] {
            let mut nested = Nested::of(now + ms(inner), now + ms(outer));
            let pending = poll_fn(|cx| {
                SharedTimer::listen();
                let pending = nested.inner(cx).is_pending();
                Poll::Ready(pending && nested.outer(cx).is_pending())
            });
            assert!(pending.await);
            assert_eq!(nested.around.timer.is_some(), own, "{inner} {outer}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn it_relies_on_nothing_that_is_gone_or_was_not_asked_or_may_go_elsewhere() {
        let at = Instant::now() + ms(5);
        for what in ["gone", "not asked", "another task's", "in a box of its own", "its own"] {
            let (mut nested, mut boxed) = (Nested::of(at, at), Nested::of(at, at));
            poll_fn(|cx| {
                SharedTimer::listen();
                match what {
                    "not asked" => {
                        assert!(nested.inner(cx).is_pending());
                        SharedTimer::listen();
                    }
                    "another task's" => {
                        let waker = Waker::from(Arc::new(Counts::default()));
                        assert!(nested.inner(&mut Context::from_waker(&waker)).is_pending());
                    }
                    "gone" => {
                        assert!(nested.inner(cx).is_pending());
                        nested.further_in.as_mut().project().alarm.set(None);
                    }
                    "in a box of its own" => assert!(boxed.inner(cx).is_pending()),
                    _ => {
                        assert!(nested.outer(cx).is_pending());
                        nested.around.as_mut().project().timer.set(None);
                    }
                }
                assert!(nested.outer(cx).is_pending());
                Poll::Ready(())
            })
            .await;
            assert!(nested.around.timer.is_some(), "{what}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn each_comes_at_its_time() {
        let (start, counts) = (Instant::now(), Arc::new(Counts::default()));
        let waker = Waker::from(counts.clone());
        let mut cx = Context::from_waker(&waker);
        let mut nested = Nested::of(start + ms(5), start + ms(9));
        let mut poll = || {
            SharedTimer::listen();
            let first = nested.inner(&mut cx);
            if first.is_ready() {
                nested.further_in.as_mut().project().alarm.set(None);
            }
            (first.is_ready(), nested.outer(&mut cx).is_ready())
        };
        assert_eq!(poll(), (false, false));
        advance(ms(5)).await;
        assert_eq!((counts.0.load(SeqCst), poll()), (1, (true, false)), "woken by the first");
        advance(ms(4)).await;
        assert_eq!((counts.0.load(SeqCst), poll()), (2, (false, true)), "and by the other's own");
    }
}
