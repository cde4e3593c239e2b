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
        permit: &mut Permit<Limiter>,
    ) -> Admit<Wait> {
        let deadline = deadline();
        if has_passed(deadline) {
            return turned_away(self, RejectedKind::DeadlinePassed, permit);
        }
        match self.enter() {
            Some(token) => goes(self, token, permit),
            None => entered(self, self.join(), deadline, permit),
        }
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
        permit: &mut Permit<Limiter>,
    ) -> Admit<Wait> {
        let (limiter, claim) = (&self.limiter, self.sort.claim(request));
        if claim.exempt {
            return goes(limiter, limiter.enter_exempt(), permit);
        }
        let deadline = deadline();
        if has_passed(deadline) {
            return turned_away(limiter, RejectedKind::DeadlinePassed, permit);
        }
        entered(limiter, limiter.enter_as(claim), deadline, permit)
    }
}

#[inline]
fn goes(limiter: &Shared<Limiter>, token: Token, permit: &mut Permit<Limiter>) -> Admit<Wait> {
    permit.fill(limiter.permit(token));
    Admit::Go
}

fn entered(
    limiter: &Shared<Limiter>,
    entry: Result<Entry, RejectedKind>,
    deadline: Option<Instant>,
    permit: &mut Permit<Limiter>,
) -> Admit<Wait> {
    match entry {
        Ok(Entry::In(token)) => goes(limiter, token, permit),
        Ok(Entry::Waits(place)) => {
            Admit::Wait(Box::pin(Wait::new(limiter.clone(), place, deadline)))
        }
        Err(kind) => turned_away(limiter, kind, permit),
    }
}

fn turned_away(
    limiter: &Shared<Limiter>,
    kind: RejectedKind,
    permit: &mut Permit<Limiter>,
) -> Admit<Wait> {
    match limiter.turn_away(kind) {
        Ok(token) => goes(limiter, token, permit),
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
