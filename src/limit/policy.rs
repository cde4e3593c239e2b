//! The admission [`Policy`] of a limit, and the [`Release`] of its permits.

use std::time::Duration;

use tokio::time::Instant;

use super::{
    adaptive::Teller,
    limiter::{Entry, Limiter},
    partition::{ClassifyCall, PartitionedPolicy},
    reuse::Limit,
    wait::Wait,
};
use crate::{
    admission::{Admit, Policy, Terms},
    outcome::{LayerKind, Outcome, Rejected, RejectedKind},
    permit::{Measures, Permit, Release, ReleaseAt, ShardOrSlot, Token},
    time::CallClock,
};

impl<Req> Policy<Req> for Limit {
    type StateRef = ShardOrSlot<Limiter>;
    type Pass = Token;
    type Wait = Wait;

    const LAYER: LayerKind = LayerKind::ConcurrencyLimit;

    #[inline]
    fn peek(&self) -> bool {
        self.has_room()
    }

    #[inline]
    fn admit(&self, _: &Req, terms: impl Terms) -> Admit<Token, Wait> {
        if let Some(token) = terms.health_call().and_then(|call| self.enter_health_call(call)) {
            return Admit::Pass(token);
        }
        let deadline = terms.deadline().map(|deadline| deadline.at());
        if CallClock::is_past(deadline) {
            return entered(self, LATE, deadline);
        }
        match self.enter() {
            Some(token) => Admit::Pass(token),
            None => entered(self, self.join(), deadline),
        }
    }

    #[inline]
    fn attributes(&self) -> bool {
        self.adaptive().is_some()
    }

    #[inline]
    fn permit(&self, token: Token) -> Permit<ShardOrSlot<Limiter>> {
        Limit::permit(self, token)
    }

    fn reject_late(&self, _: &Req) -> Option<Rejected> {
        self.turn_away(RejectedKind::DeadlinePassed).err()
    }
}

impl<Req, K: ClassifyCall<Req>> Policy<Req> for PartitionedPolicy<K> {
    type StateRef = ShardOrSlot<Limiter>;
    type Pass = Token;
    type Wait = Wait;

    const LAYER: LayerKind = LayerKind::ConcurrencyLimit;

    fn peek(&self) -> bool {
        self.limiter.has_room()
    }

    fn admit(&self, request: &Req, terms: impl Terms) -> Admit<Token, Wait> {
        let (limiter, claim) = (&self.limiter, self.sort.claim(request));
        if claim.exempt {
            return Admit::Pass(limiter.enter_exempt());
        }
        if let Some(token) = terms.health_call().and_then(|call| limiter.enter_health_call(call)) {
            return Admit::Pass(token);
        }
        let deadline = terms.deadline().map(|deadline| deadline.at());
        let entry = if CallClock::is_past(deadline) { LATE } else { limiter.enter_as(claim) };
        entered(limiter, entry, deadline)
    }

    fn attributes(&self) -> bool {
        self.limiter.adaptive().is_some()
    }

    fn permit(&self, token: Token) -> Permit<ShardOrSlot<Limiter>> {
        self.limiter.permit(token)
    }

    fn reject_late(&self, request: &Req) -> Option<Rejected> {
        if self.sort.claim(request).exempt {
            return None;
        }
        self.limiter.turn_away(RejectedKind::DeadlinePassed).err()
    }
}

/// The entry of a call whose deadline has passed.
const LATE: Result<Entry, RejectedKind> = Err(RejectedKind::DeadlinePassed);

/// Converts the result of an attempt to enter into the decision of the admission.
fn entered(
    limiter: &Limit,
    entry: Result<Entry, RejectedKind>,
    deadline: Option<Instant>,
) -> Admit<Token, Wait> {
    if !matches!(entry, Ok(Entry::In(_))) {
        // If every permit is held by an unread response, only the sweeper can release one, and it ends with the runtime
        // that it was spawned on. So each call that does not acquire a permit makes sure that there is a sweeper.
        limiter.ensure_sweeper();
    }
    match entry {
        Ok(Entry::In(token)) => Admit::Pass(token),
        Ok(Entry::Waits(place)) => {
            Admit::Queue(Box::pin(Wait::new(limiter.clone(), place, deadline)))
        }
        Err(kind) => match limiter.turn_away(kind) {
            Ok(token) => Admit::Pass(token),
            Err(rejected) => Admit::Reject(rejected),
        },
    }
}

impl Release for Limiter {
    #[inline]
    fn release(&self, token: Token, outcome: Outcome) {
        if let Some(token) = self.unwatch(token) {
            self.end(token);
            self.heard_end(token, outcome);
        }
    }

    #[inline]
    fn record_head(&self, token: &mut Token, so_far: Outcome) {
        self.heard_head(token, so_far);
    }

    #[inline]
    fn release_at(&self) -> ReleaseAt {
        if self.releases_at_head() { ReleaseAt::Head } else { ReleaseAt::Body }
    }

    #[inline]
    fn measures(&self) -> Measures {
        self.adaptive().map_or(Measures::Nothing, Teller::measures)
    }

    fn count_cancelled_after(&self) -> Option<Duration> {
        self.adaptive()?.count_cancelled_after()
    }

    #[inline]
    fn watches_reader(&self, token: Token) -> bool {
        Limiter::watches_reader(self, token)
    }

    fn watch_reader(&self, token: &mut Token) -> bool {
        Limiter::watch_reader(self, token)
    }

    fn body_polled(&self, token: Token, frame: Option<usize>) -> bool {
        Limiter::body_polled(self, token, frame)
    }
}
