//! One timer for all layers of a task that wait for the same deadline.
//!
//! Each layer that enforces a deadline needs a timer while it waits. Without this module every layer would register a
//! timer of its own for the same instant, and each timer takes a lock of the runtime twice. With it, an outer layer
//! relies on the timer of an inner layer if that timer is certain to wake the task in time.
//!
//! The saving was measured in pairs of builds with and without this module, on one thread, as the minimum per call of a
//! call that waits once: 324 ns instead of 370 with two layers of one deadline, 468 instead of 540 with three. With one
//! layer the module costs 3 ns.
//!
//! # Mechanism
//!
//! The thread-local [`ARMED`] holds the last shared timer that was armed in the current poll. A layer with a shared
//! timer does the following in each poll:
//!
//! 1. [`SharedTimer::observe_inner`] clears `ARMED`.
//! 2. The layer polls its inner future. A shared timer within that future may register a timer with the runtime and
//!    publish itself in `ARMED`.
//! 3. [`SharedTimer::poll`] reads `ARMED`. It registers no timer if the published timer
//!    - is due no later than this timer,
//!    - wakes the same task, which the data and the vtable of the waker identify, and
//!    - lies within the memory of the inner future that was just polled.
//!
//! A published timer stays in `ARMED`, so that the next outer layer can rely on it as well.
//!
//! # Invariants
//!
//! - In step 3, `ARMED` never refers to a shared timer without a registered timer. [`SharedTimer::clear`] and `Drop`
//!   remove it. They run in step 2, on the thread of the poll, if the timer was published in step 2.
//! - A shared timer publishes itself only after its registered timer has returned `Pending` to the task in `ARMED`.
//! - `ARMED` is empty at the start of step 2, so in step 3 it refers to a timer that was polled in step 2, or after it
//!   by a layer between both.
//!
//! # Why the comparison of addresses is sound
//!
//! The address answers one question: can the published timer disappear, or move to another task, without a poll of this
//! layer? It cannot if it is a part of the inner future. The inner future is pinned, so none of its parts moves until
//! it is dropped, and an address within `[start, start + size)` of the future is that of a part of it: the memory of a
//! live value is not shared with another value. The part can be cleared or dropped only while the inner future is
//! polled or dropped by this layer, and after each poll this layer calls [`SharedTimer::poll`] again. When the inner
//! timer fires, it wakes the same task, which polls this layer.
//!
//! A boxed inner future does not qualify, because its memory lies elsewhere: it could be polled once in this task and
//! then move to another task. If the address were wrong in either direction, the result would not be undefined
//! behavior: the pointer is compared and never dereferenced. A timer outside of the range costs a second timer.
//!
//! # What a change must preserve
//!
//! - The order of the three steps: no other code may poll or drop the inner future between step 2 and step 3.
//! - The inner future that is passed to [`SharedTimer::poll`] is the pinned place that was polled in step 2, not a
//!   pointer to it: the size of a pointer does not cover the future.
//! - Each path that ends a registered timer removes it from `ARMED`.

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
    /// Wakes its task at an instant: by a timer of its own, or by a shared timer within the inner future that is due
    /// no later. See the [module](self).
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

/// A shared timer that has registered its timer.
#[derive(Clone, Copy)]
struct ArmedTimer {
    at: Instant,
    task: Task,
    timer: *const SharedTimer,
}

/// The identity of a task: the data and the vtable of its waker.
type Task = (*const (), *const RawWakerVTable);

thread_local! {
    /// The last shared timer that was armed since the last [`SharedTimer::observe_inner`].
    static ARMED: Cell<Option<ArmedTimer>> = const { Cell::new(None) };
}

impl SharedTimer {
    pub(crate) const fn new() -> Self {
        Self { at: None, timer: None }
    }

    /// Clears the thread-local, so that [`poll`](Self::poll) finds only timers of the inner future. Called just before
    /// the inner future is polled.
    #[inline]
    pub(crate) fn observe_inner() {
        ARMED.set(None);
    }

    /// Sets the instant. The timer is registered by the next [`poll`](Self::poll).
    pub(crate) fn arm(self: Pin<&mut Self>, at: Instant) {
        *self.project().at = Some(at);
    }

    /// Removes the instant and the timer. Does nothing if no instant is set.
    #[inline]
    pub(crate) fn clear(self: Pin<&mut Self>) {
        if self.at.is_some() {
            self.disarm();
        }
    }

    fn disarm(self: Pin<&mut Self>) {
        let own = ptr::from_ref(&*self);
        if ARMED.get().is_some_and(|armed| armed.timer == own) {
            ARMED.set(None);
        }
        let mut this = self.project();
        *this.at = None;
        this.timer.set(None);
    }

    /// Returns `Ready` once the instant has passed, and `Pending` for ever if no instant is set. `inner` is the
    /// inner future, which has just been polled.
    pub(crate) fn poll<F>(self: Pin<&mut Self>, inner: &F, cx: &mut Context<'_>) -> Poll<()> {
        let own = ptr::from_ref(&*self);
        let mut this = self.project();
        let Some(at) = *this.at else { return Poll::Pending };
        let task: Task = (cx.waker().data(), cx.waker().vtable());
        let start = ptr::from_ref(inner).addr();
        let within = start..start + mem::size_of_val(inner);
        let is_inner =
            |armed: &ArmedTimer| armed.task == task && within.contains(&armed.timer.addr());
        if ARMED.get().filter(is_inner).is_some_and(|armed| armed.at <= at) {
            return Poll::Pending;
        }
        let polled = match this.timer.as_mut().as_pin_mut() {
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
        if polled.is_pending() {
            ARMED.set(Some(ArmedTimer { at, task, timer: own }));
        }
        polled
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

    /// An outer timer, and an inner future with another timer.
    struct Nested {
        outer_timer: Pin<Box<SharedTimer>>,
        inner_future: Pin<Box<Inner>>,
    }

    pin_project! {
        struct Inner {
            #[pin]
            timer: Option<SharedTimer>,
        }
    }

    impl Nested {
        fn of(inner: Instant, outer: Instant) -> Self {
            let mut timers = [inner, outer].map(|at| {
                let mut timer = SharedTimer::new();
                timer.at = Some(at);
                Some(timer)
            });
            let outer_timer = Box::pin(timers[1].take().expect("two"));
            Self { outer_timer, inner_future: Box::pin(Inner { timer: timers[0].take() }) }
        }

        fn inner(&mut self, cx: &mut Context<'_>) -> Poll<()> {
            let timer = self.inner_future.as_mut().project().timer.as_pin_mut();
            timer.map_or(Poll::Pending, |timer| timer.poll(&(), cx))
        }

        fn outer(&mut self, cx: &mut Context<'_>) -> Poll<()> {
            self.outer_timer.as_mut().poll(&*self.inner_future, cx)
        }
    }

    #[tokio::test(start_paused = true)]
    async fn inner_timer_that_is_due_no_later_is_sufficient() {
        let now = Instant::now();
        for (inner, outer, own) in [(5, 9, false), (9, 9, false), (9, 5, true)] {
            let mut nested = Nested::of(now + ms(inner), now + ms(outer));
            let pending = poll_fn(|cx| {
                SharedTimer::observe_inner();
                let pending = nested.inner(cx).is_pending();
                Poll::Ready(pending && nested.outer(cx).is_pending())
            });
            assert!(pending.await);
            assert_eq!(nested.outer_timer.timer.is_some(), own, "{inner} {outer}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn dropped_unobserved_foreign_and_boxed_timers_are_not_relied_on() {
        let at = Instant::now() + ms(5);
        for case in ["dropped", "not observed", "another task", "boxed", "itself"] {
            let (mut nested, mut boxed) = (Nested::of(at, at), Nested::of(at, at));
            poll_fn(|cx| {
                SharedTimer::observe_inner();
                match case {
                    "not observed" => {
                        assert!(nested.inner(cx).is_pending());
                        SharedTimer::observe_inner();
                    }
                    "another task" => {
                        let waker = Waker::from(Arc::new(Counts::default()));
                        assert!(nested.inner(&mut Context::from_waker(&waker)).is_pending());
                    }
                    "dropped" => {
                        assert!(nested.inner(cx).is_pending());
                        nested.inner_future.as_mut().project().timer.set(None);
                    }
                    "boxed" => assert!(boxed.inner(cx).is_pending()),
                    _ => {
                        assert!(nested.outer(cx).is_pending());
                        nested.outer_timer.as_mut().project().timer.set(None);
                    }
                }
                assert!(nested.outer(cx).is_pending());
                Poll::Ready(())
            })
            .await;
            assert!(nested.outer_timer.timer.is_some(), "{case}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn each_timer_fires_at_its_instant() {
        let (start, counts) = (Instant::now(), Arc::new(Counts::default()));
        let waker = Waker::from(counts.clone());
        let mut cx = Context::from_waker(&waker);
        let mut nested = Nested::of(start + ms(5), start + ms(9));
        let mut poll = || {
            SharedTimer::observe_inner();
            let first = nested.inner(&mut cx);
            if first.is_ready() {
                nested.inner_future.as_mut().project().timer.set(None);
            }
            (first.is_ready(), nested.outer(&mut cx).is_ready())
        };
        assert_eq!(poll(), (false, false));
        advance(ms(5)).await;
        assert_eq!((counts.0.load(SeqCst), poll()), (1, (true, false)), "woken by the inner timer");
        advance(ms(4)).await;
        assert_eq!((counts.0.load(SeqCst), poll()), (2, (false, true)), "woken by the outer timer");
    }
}
