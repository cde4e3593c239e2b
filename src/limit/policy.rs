//! How the limit admits calls, and when they end.

use tokio::time::Instant;

use super::{
    core::{Entry, Limiter},
    sort::{Sort, Sorted},
    wait::Wait,
};
use crate::{
    admission::{Admit, Policy},
    call::{Finish, Hold, LayerKind, Outcome, Permit, RejectedKind, Shared, Token, has_passed},
};

impl<Req> Policy<Req> for Shared<Limiter> {
    type State = Limiter;
    type Wait = Wait;

    const LAYER: LayerKind = LayerKind::ConcurrencyLimit;

    #[inline]
    fn peek(&self) -> bool {
        self.has_room()
    }

    #[inline]
    fn admit(
        &self,
        _: &Req,
        deadline: impl FnOnce() -> Option<Instant>,
    ) -> Admit<Permit<Limiter>, Wait> {
        let deadline = deadline();
        if has_passed(deadline) {
            return turned_away(self, RejectedKind::DeadlinePassed);
        }
        if let Some(token) = self.enter() {
            return Admit::Go(self.permit(token));
        }
        entered(self, self.join(), deadline)
    }
}

impl<Req, K: Sort<Req>> Policy<Req> for Sorted<K> {
    type State = Limiter;
    type Wait = Wait;

    const LAYER: LayerKind = LayerKind::ConcurrencyLimit;

    fn peek(&self) -> bool {
        self.limiter.has_room()
    }

    fn admit(
        &self,
        request: &Req,
        deadline: impl FnOnce() -> Option<Instant>,
    ) -> Admit<Permit<Limiter>, Wait> {
        let (limiter, claim) = (&self.limiter, self.sort.claim(request));
        if claim.exempt {
            return Admit::Go(limiter.permit(limiter.enter_exempt()));
        }
        let deadline = deadline();
        if has_passed(deadline) {
            return turned_away(limiter, RejectedKind::DeadlinePassed);
        }
        entered(limiter, limiter.enter_as(claim), deadline)
    }
}

fn entered(
    limiter: &Shared<Limiter>,
    entry: Result<Entry, RejectedKind>,
    deadline: Option<Instant>,
) -> Admit<Permit<Limiter>, Wait> {
    match entry {
        Ok(Entry::In(token)) => Admit::Go(limiter.permit(token)),
        Ok(Entry::Waits(place)) => {
            Admit::Wait(Box::pin(Wait::new(limiter.clone(), place, deadline)))
        }
        Err(kind) => turned_away(limiter, kind),
    }
}

fn turned_away(limiter: &Shared<Limiter>, kind: RejectedKind) -> Admit<Permit<Limiter>, Wait> {
    match limiter.turn_away(kind) {
        Ok(token) => Admit::Go(limiter.permit(token)),
        Err(rejected) => Admit::No(rejected),
    }
}

impl Finish for Limiter {
    #[inline]
    fn finish(&self, token: Token, outcome: Outcome) {
        self.end(token);
        self.heard_end(token, outcome);
    }

    #[inline]
    fn head(&self, token: &mut Token, so_far: Outcome) {
        self.heard_head(token, so_far);
    }

    #[inline]
    fn hold(&self) -> Hold {
        if self.releases_at_head() { Hold::Head } else { Hold::Body }
    }
}
