//! How the limit admits calls, and when they end.

use tokio::time::Instant;

use super::{
    core::{Entry, Limiter},
    wait::{Wait, has_passed},
};
use crate::{
    admission::{Admit, Policy},
    call::{Finish, Hold, LayerKind, Outcome, Permit, RejectedKind, Shared, Token},
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
            return Admit::No(self.refuse(RejectedKind::DeadlinePassed));
        }
        if let Some(token) = self.enter() {
            return Admit::Go(self.permit(token));
        }
        match self.join() {
            Ok(Entry::In(token)) => Admit::Go(self.permit(token)),
            Ok(Entry::Waits(place)) => {
                Admit::Wait(Box::pin(Wait::new(self.clone(), place, deadline)))
            }
            Err(kind) => Admit::No(self.refuse(kind)),
        }
    }
}

impl Finish for Limiter {
    #[inline]
    fn finish(&self, token: Token, outcome: Outcome) {
        self.exit();
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
