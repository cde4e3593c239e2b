//! How the limit admits calls, and when they end.

use super::{core::Limiter, wait::Wait};
use crate::{
    admission::{Admit, Policy},
    call::{Finish, Hold, LayerKind, Outcome, Permit, Shared, Token},
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
    fn admit(&self, _: &Req) -> Admit<Permit<Limiter>, Wait> {
        if self.enter() {
            return Admit::Go(self.permit(Token::default()));
        }
        match self.join() {
            Ok(None) => Admit::Go(self.permit(Token::default())),
            Ok(Some(place)) => Admit::Wait(Wait::new(self.clone(), place)),
            Err(kind) => Admit::No(self.refuse(kind)),
        }
    }
}

impl Finish for Limiter {
    #[inline]
    fn finish(&self, _: Token, _: Outcome) {
        self.exit();
    }

    #[inline]
    fn hold(&self) -> Hold {
        if self.releases_at_head() { Hold::Head } else { Hold::Body }
    }
}
