//! Admission by exemption, partition and priority.
//!
//! A limit with partitions or priorities admits each call under the lock of the queue, because the counts of the
//! partitions ([`Shares`](super::super::partition::Shares)) and the priorities of recent calls ([`Cutoff`]) are protected by
//! it. The word remains the authority for the total: its counts are changed by the same compare-exchanges as in
//! `core.rs`, so that a call without a partition is released as there.
//!
//! A call of a partition has the index of its queue in its token. Its release takes the lock: it subtracts the call
//! from the partition before the word.

use super::super::partition::{CallClass, Cutoff, KEPT};
use super::*;
use crate::outcome::HealthCall;

impl Limiter {
    // ===== Settings =====

    /// Sets the shares of the partitions. Waiting calls whose share has grown are admitted.
    pub(crate) fn set_shares(&self, ratios: &[f64]) {
        self.lock().set_shares(ratios);
        self.sorts.store(true, Ordering::Relaxed);
        self.hand_over();
    }

    /// Turns on rejection by priority.
    pub(crate) fn shed_by_priority(&self) {
        self.lock().cutoff = Some(Cutoff::new());
        self.sorts.store(true, Ordering::Relaxed);
    }

    // ===== Snapshots =====

    /// Returns the number of exempt calls so far, and in flight.
    pub(crate) fn exempt(&self) -> (u64, u32) {
        (self.counts.exempt.load(Ordering::Relaxed), self.uses.load(Ordering::Relaxed) - 1)
    }

    /// Returns the share, the calls in flight and the rejections of each partition.
    pub(crate) fn partitions(&self) -> Vec<(u32, u32, u64)> {
        self.lock().shares.each(self.limit())
    }

    /// Returns the priority below which calls are rejected, if there is one.
    pub(crate) fn shed_below(&self) -> Option<Priority> {
        self.lock().cutoff.as_ref().and_then(Cutoff::below)
    }

    // ===== Admission =====

    /// Admits an exempt call. It is never rejected, and is not counted in the word.
    pub(crate) fn enter_exempt(&self) -> Token {
        self.counts.exempt.fetch_add(1, Ordering::Relaxed);
        self.uses.fetch_add(1, Ordering::Relaxed);
        Token::unmeasured(EXEMPT)
    }

    /// Returns the token of an exempt health call. `None`: the call needs a permit, because health calls are not
    /// exempt, or there are [`MAX_HEALTH_CHECKS`] or [`MAX_HEALTH_WATCHES`] exempt calls already.
    #[cold]
    pub(crate) fn enter_health_call(&self, call: HealthCall) -> Option<Token> {
        if !self.exempts_health.load(Ordering::Relaxed) {
            return None;
        }
        let (calls, max, tag) = match call {
            HealthCall::Check => (&self.health_checks, MAX_HEALTH_CHECKS, HEALTH_CHECK),
            HealthCall::Watch => (&self.health_watches, MAX_HEALTH_WATCHES, HEALTH_WATCH),
        };
        let next = |calls: u32| (calls < max).then_some(calls + 1);
        calls.fetch_update(Ordering::Relaxed, Ordering::Relaxed, next).ok()?;
        let exempt = self.enter_exempt();
        Some(Token::unmeasured(exempt.tag | tag))
    }

    /// Acquires a permit or joins the queue, by partition and priority if the limit has any.
    pub(crate) fn enter_as(&self, claim: CallClass) -> Result<Entry, RejectedKind> {
        if self.sorts.load(Ordering::Relaxed) {
            return self.sort_in(claim, self.longest_queue());
        }
        self.enter().map_or_else(|| self.join(), |token| Ok(Entry::In(token)))
    }

    /// Acquires a permit without waiting, for a caller without partition and with normal priority.
    pub(crate) fn try_enter(&self) -> Option<Token> {
        if !self.sorts.load(Ordering::Relaxed) {
            return self.enter();
        }
        match self.sort_in(CallClass::default(), 0) {
            Ok(Entry::In(token)) => Some(token),
            _ => None,
        }
    }

    /// Acquires a permit or joins the queue, by partition and priority. `longest` is the maximum length of the queue;
    /// with 0 the call does not wait.
    ///
    /// In this order: a priority below the cutoff is rejected. Queue entries that may have a permit receive it first,
    /// so that a new call does not overtake them. The call acquires a permit if its partition may have one. Otherwise
    /// it joins the queue; if the queue is full, it displaces an entry of lower priority of its partition or is
    /// rejected.
    fn sort_in(&self, claim: CallClass, longest: u32) -> Result<Entry, RejectedKind> {
        let now = Instant::now();
        let mut queue = self.lock();
        let line = queue.shares.line_of(claim.partition);
        if !queue.cutoff.as_mut().is_none_or(|cutoff| cutoff.hear(claim.priority, now)) {
            return Err(RejectedKind::Outranked);
        }
        let mut word = self.word.load(Ordering::Relaxed);
        loop {
            let limit = self.limit();
            // The wakers are woken without the lock, and then everything is read again.
            if queue.turn(limit, in_flight(word), || now).is_some() {
                drop(queue);
                self.hand_over();
                queue = self.lock();
                word = self.word.load(Ordering::Relaxed);
                continue;
            }
            let room = queue.shares.may(line, limit, in_flight(word), now);
            if !room && (waiting(word) >= longest || limit == 0) {
                let displaced =
                    if longest > 0 { queue.displace(line, claim.priority) } else { None };
                if let Some(waker) = displaced {
                    // One entry replaces another, so the waiting count of the word stays as it is.
                    let place = queue.join(line, claim.priority, now);
                    drop(queue);
                    waker.into_iter().for_each(Waker::wake);
                    return Ok(Entry::Waits(place));
                }
                queue.refused(line, limit, now);
                return Err(RejectedKind::Full);
            }
            let next = if room { word + ONE_IN } else { word + ONE_WAITING };
            match self.word.compare_exchange_weak(word, next, Ordering::AcqRel, Ordering::Relaxed) {
                Ok(_) if room => {
                    queue.entered(line);
                    drop(queue);
                    return Ok(Entry::In(self.begin_in(line, in_flight(next))));
                }
                Ok(_) => return Ok(Entry::Waits(queue.join(line, claim.priority, now))),
                Err(now) => word = now,
            }
        }
    }

    /// Returns the token of a call that was admitted through this queue.
    pub(crate) fn begin_in(&self, line: Line, in_flight: u32) -> Token {
        let mut token = self.begin(in_flight);
        token.tag |= mark(line);
        token
    }

    /// Returns when a call that waits until `until` has to try again by itself. With partitions or priorities this is
    /// one [`KEPT`] from now, or `until` if that is earlier: the reservation of another partition expires by time
    /// alone, without a release that would pass a permit on.
    pub(crate) fn look_by(&self, until: Instant) -> Instant {
        if !self.sorts.load(Ordering::Relaxed) {
            return until;
        }
        Instant::now().checked_add(KEPT).map_or(until, |soon| soon.min(until))
    }

    /// Records that a call is rejected after waiting.
    pub(crate) fn waited_in_vain(&self, place: Place) {
        let (mut queue, now) = (self.lock(), Instant::now());
        queue.gives_up(place, now);
        queue.refused(place.0, self.limit(), now);
    }

    // ===== Release =====

    /// Releases the permit of a call whose token has marks.
    #[cold]
    pub(crate) fn end_marked(&self, token: Token) {
        if token.tag & SHADOW != 0 {
            return;
        }
        if token.tag & EXEMPT != 0 {
            if token.tag & HEALTH_WATCH != 0 {
                self.health_watches.fetch_sub(1, Ordering::Relaxed);
            } else if token.tag & HEALTH_CHECK != 0 {
                self.health_checks.fetch_sub(1, Ordering::Relaxed);
            }
            self.leave_use();
            return;
        }
        self.lock().shares.exit((token.tag >> 32) as Line);
        self.exit();
    }
}

#[cfg(all(test, not(buttress_loom)))]
mod tests {
    use super::*;

    #[test]
    fn health_calls_are_exempt_up_to_a_maximum_of_their_kind() {
        let limiter = Limiter::new(1, None);
        let kinds = [
            (HealthCall::Check, MAX_HEALTH_CHECKS as usize),
            (HealthCall::Watch, MAX_HEALTH_WATCHES as usize),
        ];
        let mut all = Vec::new();
        for (kind, max) in kinds {
            let mut calls: Vec<_> =
                (0..max).map_while(|_| limiter.enter_health_call(kind)).collect();
            assert_eq!(calls.len(), max, "{kind:?}");
            assert!(limiter.enter_health_call(kind).is_none(), "{kind:?}");
            limiter.end(calls.pop().unwrap());
            calls.extend(limiter.enter_health_call(kind));
            assert!(limiter.enter_health_call(kind).is_none(), "{kind:?}");
            assert_eq!(calls.len(), max, "{kind:?}");
            all.extend(calls);
        }
        assert!(limiter.enter().is_some(), "no health call needs the permit");
        all.into_iter().for_each(|call| limiter.end(call));
        assert_eq!(limiter.exempt().1, 0);
        limiter.set_exempts_health(false);
        assert!(limiter.enter_health_call(HealthCall::Check).is_none());
    }
}
