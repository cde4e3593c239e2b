//! The end of a limit, and its next life.

use std::mem;

use super::*;
use crate::limit::lasting::keep;

impl Limiter {
    /// As it is made, but for what it learns: the same memory, for somebody else.
    pub(in crate::limit) fn renew(&self, limit: u32) {
        // Field by field, so that none is forgotten.
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
            counts: Counts { full, waited_too_long, deadline_passed, outranked, shadowed, exempt },
            sorts,
            uses,
            home: _,
        } = self;
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

    /// That it is used again when it is idle.
    pub(in crate::limit) fn settle(&'static self) {
        let _ = self.home.set(self);
    }

    /// Nobody can call through it any more. The last call under way, if any, ends it.
    pub(in crate::limit) fn abandon(&self) {
        if in_flight(self.word.fetch_or(ABANDONED, Ordering::AcqRel)) == 0 {
            self.leave_use();
        }
    }

    /// One of its uses is over.
    #[cold]
    pub(super) fn leave_use(&self) {
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
        assert_eq!(uses(&limiter), 1, "the exempt one goes on");
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
