//! One timer for a task, however many of its layers wait for the same moment.

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

use super::poll_timer;

pin_project! {
    /// Wakes its task at a time: by a timer of its own, unless what it is around has set one that is due no later.
    ///
    /// With a deadline, each layer that keeps it would set its own for the same moment, and a timer is two turns of the
    /// runtime's lock. Whoever has an alarm [listens](Self::listen) before it polls what is further in, and asks the
    /// alarm after: what was set in between, for the same task, and lies within what was polled wakes that task, which
    /// comes by here again. Pinned within it, it goes nowhere else, and is dropped only while that is polled or dropped:
    /// what is in a box of its own may be polled once here and then go on in another task.
    pub(crate) struct Alarm {
        at: Option<Instant>,
        #[pin]
        timer: Option<Sleep>,
    }

    impl PinnedDrop for Alarm {
        fn drop(this: Pin<&mut Self>) {
            this.clear();
        }
    }
}

/// An alarm that is set.
#[derive(Clone, Copy)]
struct Set {
    at: Instant,
    task: Task,
    by: *const Alarm,
}

/// What a waker wakes.
type Task = (*const (), *const RawWakerVTable);

thread_local! {
    /// The last one that was set in this poll.
    static SET: Cell<Option<Set>> = const { Cell::new(None) };
}

impl Alarm {
    pub(crate) const fn new() -> Self {
        Self { at: None, timer: None }
    }

    /// From here on it is heard what others set.
    #[inline]
    pub(crate) fn listen() {
        SET.set(None);
    }

    pub(crate) fn set(self: Pin<&mut Self>, at: Instant) {
        *self.project().at = Some(at);
    }

    /// Nobody is to be woken any more. Nothing to do where nobody has waited.
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

    /// Ready once it is time; never, if it is not set. Beside what it is around, which has just been polled.
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
            // Without a look at the clock: who has just begun to wait has time left.
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

    /// One alarm beside what it is around, which has another, and is polled once or more.
    struct Nested {
        around: Pin<Box<Alarm>>,
        further_in: Pin<Box<Inner>>,
    }

    pin_project! {
        struct Inner {
            #[pin]
            alarm: Option<Alarm>,
        }
    }

    impl Nested {
        fn of(inner: Instant, outer: Instant) -> Self {
            let mut alarms = [inner, outer].map(|at| {
                let mut alarm = Alarm::new();
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
                Alarm::listen();
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
                Alarm::listen();
                match what {
                    "not asked" => {
                        assert!(nested.inner(cx).is_pending());
                        Alarm::listen();
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
            Alarm::listen();
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
