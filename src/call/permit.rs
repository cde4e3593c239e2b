use std::{fmt, mem};

use super::{AnyGiver, Giver, Outcome, Reason};

/// What a permit remembers of its admission.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Token {
    /// The generation of the state that gave it, and what else that state wants back.
    pub(crate) tag: u64,
    /// When it was given, in nanoseconds since the state began; 0 where that is not measured.
    pub(crate) started: u64,
}

/// When a permit ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hold {
    /// At the response head, whatever it says.
    Head,
    /// As soon as the outcome is certain: at a bad head, else at the end of the body.
    Verdict,
    /// At the end of the body.
    Body,
}

/// The state behind a permit: what hears how the call ended.
///
/// Object-safe, so that a body needs to know no policy.
pub trait Finish: Send + Sync + 'static {
    /// The call has ended. Said exactly once for every token.
    fn finish(&self, token: Token, outcome: Outcome);

    /// The response head is here; `so_far` is what the outcome will be if nothing more goes wrong.
    /// It may mark the token, which comes back with the end.
    fn head(&self, token: &mut Token, so_far: Outcome) {
        let _ = (token, so_far);
    }

    /// When permits of this state end.
    fn hold(&self) -> Hold;
}

/// The right to make one call.
///
/// [`finish`](Self::finish) ends it once; dropping it unfinished ends it as cancelled, or, once a
/// head has been seen, as [`end_dropped_as`](Self::end_dropped_as) said, or as a failure if the call's
/// own code panicked under its [`guard`](Self::guard). A spent permit is hollow.
pub struct Permit<G: Finish = AnyGiver> {
    giver: Option<G>,
    token: Token,
    drop_as: Outcome,
}

impl<G: Finish> Permit<G> {
    /// Ends the call.
    #[inline]
    pub(crate) fn finish(mut self, outcome: Outcome) {
        self.end(outcome);
        // Hollow by now: there is nothing left to drop.
        mem::forget(self);
    }

    /// Ends the call, if it has not ended yet.
    #[inline]
    pub(crate) fn end(&mut self, outcome: Outcome) {
        if let Some(giver) = self.giver.take() {
            giver.finish(self.token, outcome);
        }
    }

    /// Moves it on, and leaves a spent one behind. Not an `Option`: its niche, in the midst of the permit,
    /// would cost a stalled load a call.
    #[inline]
    pub(crate) fn take(&mut self) -> Self {
        Self { giver: self.giver.take(), token: self.token, drop_as: self.drop_as }
    }

    /// Tells the state what the head said.
    #[inline]
    pub(crate) fn head(&mut self, so_far: Outcome) {
        if let Some(giver) = &self.giver {
            giver.head(&mut self.token, so_far);
        }
    }

    /// Who gave it, unless it is spent.
    #[cfg(feature = "breaker")]
    pub(crate) fn giver(&self) -> Option<&G> {
        self.giver.as_ref()
    }

    /// What it remembers of its admission.
    #[cfg(feature = "breaker")]
    #[inline]
    pub(crate) fn token(&self) -> Token {
        self.token
    }

    #[inline]
    pub(crate) fn hold(&self) -> Hold {
        self.giver.as_ref().map_or(Hold::Head, G::hold)
    }

    /// Runs the call's own code: if that panics, the call has failed.
    ///
    /// Asking the thread on drop would not do: a caller that panics while it holds a good answer
    /// unwinds through it, too.
    #[inline]
    pub(crate) fn guard<O>(&mut self, run: impl FnOnce() -> O) -> O {
        struct OnUnwind<'a, G: Finish>(&'a mut Permit<G>);

        impl<G: Finish> Drop for OnUnwind<'_, G> {
            fn drop(&mut self) {
                self.0.drop_as = Outcome::failure().because(Reason::Panicked);
            }
        }

        let unwinding = OnUnwind(self);
        let done = run();
        mem::forget(unwinding);
        done
    }

    /// What a drop will mean from here on.
    #[inline]
    pub(crate) fn end_dropped_as(&mut self, outcome: Outcome) {
        self.drop_as = outcome;
    }
}

impl<G: Finish> Permit<G> {
    #[inline]
    pub(crate) fn new(giver: G, token: Token) -> Self {
        Self { giver: Some(giver), token, drop_as: Outcome::cancelled() }
    }

    /// A permit that is spent already: for a call that has ended, or one that nobody counts.
    pub(crate) const fn hollow() -> Self {
        Self { giver: None, token: Token { tag: 0, started: 0 }, drop_as: Outcome::cancelled() }
    }
}

impl<G: Giver> Permit<G> {
    /// Forgets which policy gave it.
    #[inline]
    pub(crate) fn erase(mut self) -> Permit {
        Permit {
            giver: self.giver.take().map(Into::into),
            token: self.token,
            drop_as: self.drop_as,
        }
    }
}

impl<G: Finish> Drop for Permit<G> {
    #[inline]
    fn drop(&mut self) {
        if let Some(giver) = self.giver.take() {
            dropped(giver, self.token, self.drop_as);
        }
    }
}

/// By value: a permit whose address nobody wants can stay in registers.
#[cold]
#[inline(never)]
fn dropped<G: Finish>(giver: G, token: Token, outcome: Outcome) {
    giver.finish(token, outcome);
}

impl<G: Finish> fmt::Debug for Permit<G> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Permit")
            .field("spent", &self.giver.is_none())
            .field("token", &self.token)
            .field("drop_as", &self.drop_as)
            .finish()
    }
}
