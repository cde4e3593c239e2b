//! Admission by exemption, partition and priority.
//!
//! A limit with partitions or priorities admits each call under the lock of the queue, because the counts of the
//! partitions ([`Shares`](super::super::partition::Shares)) and the [`PriorityThreshold`] are protected by it. The word
//! remains the authority for the total: its counts are changed by the same compare-exchanges as in the [module](super),
//! so that a call without a partition is released as there.
//!
//! A call of a partition has the index of its queue in its token. Its release takes the lock: it subtracts the call
//! from the partition before the word.

use super::super::partition::{CallClass, PartitionIndex, PriorityThreshold, RESERVATION};
use super::*;
use crate::outcome::HealthCall;

impl Limiter {
    // ===== Settings =====

    /// Sets the shares of the partitions. Waiting calls whose share has grown are admitted.
    pub(crate) fn set_shares(&self, ratios: &[f64]) {
        self.lock().set_shares(ratios);
        self.is_partitioned.store(true, Ordering::Relaxed);
        self.grant_next();
    }

    /// Turns rejection by priority on or off.
    pub(crate) fn set_reject_by_priority(&self, on: bool) {
        self.lock().set_reject_by_priority(on);
        self.is_partitioned.store(true, Ordering::Relaxed);
    }

    // ===== Snapshots =====

    /// Returns the number of exempt calls so far, and in flight.
    pub(crate) fn exempt(&self) -> (u64, u32) {
        let counters = &self.counters;
        (counters.exempt.load(Ordering::Relaxed), counters.exempt_in_flight.load(Ordering::Relaxed))
    }

    /// Returns the share, the calls in flight and the rejections of each partition.
    pub(crate) fn partitions(&self) -> Vec<(u32, u32, u64)> {
        self.lock().shares.snapshots(self.limit())
    }

    /// Returns the priority below which calls are rejected, if there is one.
    pub(crate) fn reject_below(&self) -> Option<Priority> {
        self.lock().threshold.as_ref().and_then(PriorityThreshold::get)
    }

    // ===== Admission =====

    /// Admits an exempt call. It is never rejected, and is not counted in the word.
    pub(crate) fn admit_exempt(&self) -> Token {
        self.counters.exempt.fetch_add(1, Ordering::Relaxed);
        self.counters.exempt_in_flight.fetch_add(1, Ordering::Relaxed);
        Token::unmeasured(EXEMPT)
    }

    /// Returns the token of an exempt health call. `None`: the call needs a permit, because health calls are not
    /// exempt, or there are [`MAX_HEALTH_CHECKS`] or [`MAX_HEALTH_WATCHES`] exempt calls already.
    #[cold]
    pub(crate) fn admit_health_call(&self, call: HealthCall) -> Option<Token> {
        if !self.exempts_health.load(Ordering::Relaxed) {
            return None;
        }
        let (calls, max, tag) = match call {
            HealthCall::Check => (&self.health_checks, MAX_HEALTH_CHECKS, HEALTH_CHECK),
            HealthCall::Watch => (&self.health_watches, MAX_HEALTH_WATCHES, HEALTH_WATCH),
        };
        let next = |calls: u32| (calls < max).then_some(calls + 1);
        calls.fetch_update(Ordering::Relaxed, Ordering::Relaxed, next).ok()?;
        let exempt = self.admit_exempt();
        Some(Token::unmeasured(exempt.tag | tag))
    }

    /// Acquires a permit or joins the queue, by partition and priority if the limit has any.
    pub(crate) fn acquire(&self, class: CallClass) -> Result<Acquisition, RejectedKind> {
        if self.is_partitioned.load(Ordering::Relaxed) {
            return self.enter_partitioned(class, self.max_queue());
        }
        self.try_acquire()
            .map_or_else(|| self.join_queue(), |token| Ok(Acquisition::Admitted(token)))
    }

    /// Acquires a permit without waiting, for a caller without partition and with normal priority.
    pub(crate) fn try_acquire_as_default(&self) -> Option<Token> {
        if !self.is_partitioned.load(Ordering::Relaxed) {
            return self.try_acquire();
        }
        match self.enter_partitioned(CallClass::default(), 0) {
            Ok(Acquisition::Admitted(token)) => Some(token),
            _ => None,
        }
    }

    /// Acquires a permit or joins the queue, by partition and priority. `max_queue` is the maximum length of the
    /// queue; with 0 the call does not wait.
    ///
    /// In this order: a priority below the threshold is rejected. Queue entries that may have a permit receive it
    /// first, so that a new call does not overtake them. The call acquires a permit if its partition may have one.
    /// Otherwise it joins the queue; if the queue is full, it displaces an entry of lower priority of its partition or
    /// is rejected.
    fn enter_partitioned(
        &self,
        class: CallClass,
        max_queue: u32,
    ) -> Result<Acquisition, RejectedKind> {
        let now = Instant::now();
        let mut queue = self.lock();
        let index = queue.shares.index_of(class.partition);
        let threshold = queue.threshold.as_mut();
        if threshold.is_some_and(|threshold| !threshold.record_arrival(class.priority, now)) {
            return Err(RejectedKind::Outranked);
        }
        let mut counts = self.word().counts();
        loop {
            let limit = self.limit();
            // The wakers are woken without the lock, and then everything is read again.
            if queue.next_index(limit, counts.in_flight(), || now).is_some() {
                drop(queue);
                self.grant_next();
                queue = self.lock();
                counts = self.word().counts();
                continue;
            }
            let has_room = queue.shares.can_enter(index, limit, counts.in_flight(), now);
            if !has_room && (counts.waiting() >= max_queue || limit == 0) {
                let displaced =
                    if max_queue > 0 { queue.displace(index, class.priority, now) } else { None };
                if let Some(waker) = displaced {
                    // One entry replaces another, so the waiting count of the word stays as it is.
                    let entry = queue.join(index, class.priority, now);
                    drop(queue);
                    waker.into_iter().for_each(Waker::wake);
                    return Ok(Acquisition::Queued(entry));
                }
                queue.record_rejection(index, limit, now);
                return Err(RejectedKind::Full);
            }
            let next = if has_room { counts.with_call() } else { counts.with_waiting() };
            match self.word().change(counts, next) {
                Ok(()) if has_room => {
                    queue.record_admission(index);
                    drop(queue);
                    return Ok(Acquisition::Admitted(self.start_in(index, next.in_flight())));
                }
                Ok(()) => return Ok(Acquisition::Queued(queue.join(index, class.priority, now))),
                Err(current) => counts = current,
            }
        }
    }

    /// Returns the token of a call that was admitted through this queue.
    pub(crate) fn start_in(&self, index: PartitionIndex, in_flight: u32) -> Token {
        let mut token = self.start(in_flight);
        token.tag |= of_partition(index);
        token
    }

    /// Returns when a call that waits until `until` has to try again by itself. With partitions or priorities this is
    /// one [`RESERVATION`] from now, or `until` if that is earlier: the reservation of another partition expires by
    /// time alone, without a release that would pass a permit on.
    pub(crate) fn recheck_at(&self, until: Instant) -> Instant {
        if !self.is_partitioned.load(Ordering::Relaxed) {
            return until;
        }
        Instant::now().checked_add(RESERVATION).map_or(until, |soon| soon.min(until))
    }

    /// Records that a call is rejected after waiting. Returns whether its entry was still in the queue.
    pub(crate) fn record_timeout(&self, entry: EntryId) -> bool {
        let (mut queue, now) = (self.lock(), Instant::now());
        let was_queued = queue.record_wait(entry, now);
        queue.record_rejection(entry.0, self.limit(), now);
        was_queued
    }

    // ===== Release =====

    /// Releases the permit of a call whose token has marks.
    #[cold]
    pub(crate) fn release_marked(&self, token: Token) {
        if token.tag & SHADOW != 0 {
            return;
        }
        if token.tag & EXEMPT != 0 {
            if token.tag & HEALTH_WATCH != 0 {
                self.health_watches.fetch_sub(1, Ordering::Relaxed);
            } else if token.tag & HEALTH_CHECK != 0 {
                self.health_checks.fetch_sub(1, Ordering::Relaxed);
            }
            self.counters.exempt_in_flight.fetch_sub(1, Ordering::Relaxed);
            return;
        }
        self.lock().shares.record_release(partition(token.tag));
        self.release_permit();
    }
}
