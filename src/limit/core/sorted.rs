//! How calls get in that are told apart: under the lock, by partition and priority.

use super::*;
use crate::{
    call::grpc::HealthCall,
    limit::sort::{Claim, Cutoff, KEPT},
};

impl Limiter {
    // ===== Settings =====

    /// Those who wait may have more of a share now.
    pub(in crate::limit) fn set_shares(&self, ratios: &[f64]) {
        self.lock().set_shares(ratios);
        self.sorts.store(true, Ordering::Relaxed);
        self.hand_over();
    }

    pub(in crate::limit) fn shed_by_priority(&self) {
        self.lock().cutoff = Some(Cutoff::new());
        self.sorts.store(true, Ordering::Relaxed);
    }

    // ===== Looking =====

    /// How many exempt calls there were, and are.
    pub(in crate::limit) fn exempt(&self) -> (u64, u32) {
        (self.counts.exempt.load(Ordering::Relaxed), self.uses.load(Ordering::Relaxed) - 1)
    }

    /// Share, inside and refused of each partition.
    pub(in crate::limit) fn partitions(&self) -> Vec<(u32, u32, u64)> {
        self.lock().shares.each(self.limit())
    }

    /// What is refused for being worth too little: all below.
    pub(in crate::limit) fn shed_below(&self) -> Option<Priority> {
        self.lock().cutoff.as_ref().and_then(Cutoff::below)
    }

    // ===== Getting in =====

    /// Never refused, and not counted among the others.
    pub(in crate::limit) fn enter_exempt(&self) -> Token {
        self.counts.exempt.fetch_add(1, Ordering::Relaxed);
        self.uses.fetch_add(1, Ordering::Relaxed);
        Token::unmeasured(EXEMPT)
    }

    /// Returns the token of an exempt health call. `None`: the call needs a permit, because health calls are not
    /// exempt, or there are [`MAX_HEALTH_CHECKS`] or [`MAX_HEALTH_WATCHES`] exempt calls already.
    #[cold]
    pub(in crate::limit) fn enter_health_call(&self, call: HealthCall) -> Option<Token> {
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

    /// [`enter`](Self::enter) and [`join`](Self::join), by partition and priority.
    pub(in crate::limit) fn enter_as(&self, claim: Claim) -> Result<Entry, RejectedKind> {
        if self.sorts.load(Ordering::Relaxed) {
            return self.sort_in(claim, self.longest_queue());
        }
        self.enter().map_or_else(|| self.join(), |token| Ok(Entry::In(token)))
    }

    /// [`enter`](Self::enter), for what asks nothing in particular.
    pub(in crate::limit) fn try_enter(&self) -> Option<Token> {
        if !self.sorts.load(Ordering::Relaxed) {
            return self.enter();
        }
        match self.sort_in(Claim::default(), 0) {
            Ok(Entry::In(token)) => Some(token),
            _ => None,
        }
    }

    /// With so many waiting, nobody waits any more.
    fn sort_in(&self, claim: Claim, longest: u32) -> Result<Entry, RejectedKind> {
        let now = Instant::now();
        let mut queue = self.lock();
        let line = queue.shares.line_of(claim.partition);
        if !queue.cutoff.as_mut().is_none_or(|cutoff| cutoff.hear(claim.priority, now)) {
            return Err(RejectedKind::Outranked);
        }
        let mut word = self.word.load(Ordering::Relaxed);
        loop {
            let limit = self.limit();
            // Who waits and may go goes first.
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
                    // One waits instead of another: as many as before.
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

    /// [`begin`](Self::begin), in a line.
    pub(in crate::limit) fn begin_in(&self, line: Line, in_flight: u32) -> Token {
        let mut token = self.begin(in_flight);
        token.tag |= mark(line);
        token
    }

    /// When one that waits until then has to look for himself: what is kept for others comes free by time
    /// alone.
    pub(in crate::limit) fn look_by(&self, until: Instant) -> Instant {
        if !self.sorts.load(Ordering::Relaxed) {
            return until;
        }
        Instant::now().checked_add(KEPT).map_or(until, |soon| soon.min(until))
    }

    /// One that waits is refused after all.
    pub(in crate::limit) fn waited_in_vain(&self, place: Place) {
        let (mut queue, now) = (self.lock(), Instant::now());
        queue.gives_up(place, now);
        queue.refused(place.0, self.limit(), now);
    }

    // ===== Getting out =====

    #[cold]
    pub(super) fn end_marked(&self, token: Token) {
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
