//! The end of a fixed limit, and its renewal for another owner.
//!
//! # Mechanism
//!
//! A fixed limiter is a leaked allocation; see `lasting.rs`. Its calls hold `&'static` references without a reference
//! count, so the limiter itself has to detect when it is idle: when no [`Limit`](super::super::reuse::Limit) is left
//! and every call that it counts has ended. Then [`Limiter::leave_use`] pushes it to the free list, once, and
//! [`Limiter::renew`] resets it for the next owner.
//!
//! [`Limiter::uses`] counts what has to end before that:
//!
//! - One use stands for the owners and all calls in flight together, so that calls do not write this counter.
//!   [`Limiter::abandon`] sets the bit `ABANDONED` in the word when the last `Limit` is dropped. If the word has no
//!   call in flight at that moment, `abandon` ends the use. Otherwise the release that takes the in-flight count from 1
//!   to 0 with the bit set ends it. Both are read-modify-writes of one word, so exactly one of them observes
//!   "abandoned, and no call in flight".
//! - Each exempt call is one use of its own, because it is not in the word.
//!
//! The use that takes the counter from 1 to 0 returns the limiter to the free list.
//!
//! No call is admitted after `abandon`, as every admission needs a `Limit`. So the in-flight count only falls, and the
//! counter cannot rise from 0.
//!
//! # References that outlive the use
//!
//! Code that still refers to the limiter when it is renewed must not change the counts of the new owner:
//!
//! - A call that was admitted in shadow mode is not counted. Its end returns at once, because its token has `SHADOW`.
//! - A response body whose permit the sweeper has released still owns its slot. Its end only frees the slot
//!   (`core/unread.rs`), and slots are not reset by a renewal.
//! - The sweeper keeps running, and works for the new owner.
//! - A release that found a waiting call calls `hand_over` after its `fetch_sub`. The waiting call and the last `Limit`
//!   may be dropped in between, so `hand_over` may run for the new owner. This has no effect there beyond that of a
//!   repeated call, because `hand_over` passes on only permits that are free.
//! - After its release a call reads `adaptive`, which is `None` for every fixed limiter.
//!
//! A call without a permit may read settings of the new owner, such as when permits are released. They have no effect
//! on it.
//!
//! # Memory orderings
//!
//! `fetch_or` in `abandon`, `fetch_sub` in `exit` and `fetch_sub` in `leave_use` are AcqRel. The thread that ends the
//! last use has therefore acquired the writes of all other uses. It publishes them to the next owner by the mutex of
//! the free list, so `renew` can store with Relaxed.

use std::mem;

use super::super::reuse::keep;
use super::*;

impl Limiter {
    /// Resets the limiter for a new owner. Only the slots of watched bodies and a running sweeper remain.
    pub(crate) fn renew(&self, limit: u32) {
        // The pattern names each field, so that a new field cannot be forgotten here.
        let Self {
            word,
            limit: most,
            adaptive: _,
            queue: _,
            longest_queue,
            longest_wait_ms,
            retry_after_ms,
            to_the_head_only,
            shadow,
            exempts_health,
            health_checks,
            health_watches,
            unread,
            counts:
                LimitCounts { full, waited_too_long, deadline_passed, outranked, shadowed, exempt },
            sorts,
            uses,
            home: _,
        } = self;
        // The queue is dropped without its lock.
        let before = mem::take(&mut *self.lock());
        drop(before);
        unread.renew();
        most.store(limit, Ordering::Relaxed);
        longest_queue.store(0, Ordering::Relaxed);
        retry_after_ms.store(RETRY_AFTER_MS, Ordering::Relaxed);
        uses.store(1, Ordering::Relaxed);
        health_checks.store(0, Ordering::Relaxed);
        health_watches.store(0, Ordering::Relaxed);
        exempts_health.store(true, Ordering::Relaxed);
        for flag in [to_the_head_only, shadow, sorts] {
            flag.store(false, Ordering::Relaxed);
        }
        let refused = [full, waited_too_long, deadline_passed, outranked];
        for number in refused.into_iter().chain([word, longest_wait_ms, shadowed, exempt]) {
            number.store(0, Ordering::Relaxed);
        }
    }

    /// Records the reference by which the limiter returns to the free list. Called once, for a fixed limit.
    pub(crate) fn settle(&'static self) {
        let _ = self.home.set(self);
    }

    /// Called when the last [`Limit`](super::super::reuse::Limit) has been dropped. The limiter becomes idle now, or
    /// with the end of its last call.
    pub(crate) fn abandon(&self) {
        if in_flight(self.word.fetch_or(ABANDONED, Ordering::AcqRel)) == 0 {
            self.leave_use();
        }
    }

    /// Ends one of the uses. The last one returns the limiter to the free list.
    #[cold]
    pub(crate) fn leave_use(&self) {
        if self.uses.fetch_sub(1, Ordering::AcqRel) == 1 {
            if let Some(limiter) = self.home.get() {
                keep(limiter);
            }
        }
    }
}

#[cfg(all(test, not(buttress_loom)))]
mod tests {
    use super::*;

    fn uses(limiter: &Limiter) -> u32 {
        limiter.uses.load(Ordering::Relaxed)
    }

    #[test]
    fn limit_is_idle_once_nobody_has_it_and_its_last_call_is_over() {
        let limiter = Limiter::new(2, None);
        let calls = [limiter.enter().unwrap(), limiter.enter().unwrap()];
        let exempt = limiter.enter_exempt();
        limiter.abandon();
        for call in calls {
            assert_eq!(uses(&limiter), 2);
            limiter.end(call);
        }
        assert_eq!(uses(&limiter), 1, "the exempt call is still in flight");
        limiter.end(exempt);
        assert_eq!(uses(&limiter), 0);
    }

    #[test]
    fn limit_without_calls_is_idle_at_once() {
        let limiter = Limiter::new(2, None);
        limiter.abandon();
        assert_eq!(uses(&limiter), 0);
    }

    #[test]
    fn limit_that_is_used_again_is_as_new() {
        let limiter = Limiter::new(1, None);
        limiter.set_queue(3, Duration::from_secs(1));
        limiter.set_order(QueueOrder::Lifo);
        limiter.set_retry_after(Duration::from_secs(9));
        limiter.release_at_head();
        limiter.set_shares(&[0.5, 0.5]);
        limiter.shed_by_priority();
        for _ in 0..3 {
            let _ = limiter.turn_away(RejectedKind::Full, || None);
        }
        limiter.set_shadow(true);
        let _ = limiter.turn_away(RejectedKind::Full, || None);
        let calls = [limiter.enter().unwrap(), limiter.enter_exempt()];
        limiter.abandon();
        calls.into_iter().for_each(|call| limiter.end(call));

        limiter.renew(7);
        let seen = |limiter: &Limiter| {
            let numbers = [limiter.limit(), limiter.in_flight(), limiter.waiting(), uses(limiter)];
            let flags = [limiter.is_shadow(), limiter.releases_at_head(), limiter.has_room()];
            let times = (limiter.longest_queue(), limiter.longest_wait());
            let counts = (limiter.refused(RejectedKind::Full), limiter.shadowed());
            let sorted = (limiter.exempt(), limiter.shed_below(), limiter.partitions());
            let sorts = limiter.sorts.load(Ordering::Relaxed);
            let refused = limiter.turn_away(RejectedKind::Full, || None).unwrap_err();
            (numbers, flags, times, counts, sorted, sorts, refused.retry_after())
        };
        assert_eq!(seen(&limiter), seen(&Limiter::new(7, None)));
    }
}
