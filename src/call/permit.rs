use std::{fmt, mem, ops::Deref, sync::Arc};

use super::{Outcome, Reason};

/// How a layer's state is reached from services, futures and bodies.
///
/// The one place that knows it is an [`Arc`]: a cheaper way can be put here without touching a layer.
pub struct Shared<T: ?Sized>(Arc<T>);

impl<T> Shared<T> {
    pub(crate) fn new(state: T) -> Self {
        Self(Arc::new(state))
    }
}

impl<T: Finish> Shared<T> {
    fn erase(self) -> Shared<dyn Finish> {
        Shared(self.0)
    }

    /// The right to make one call, given by this state.
    #[cfg(any(
        feature = "breaker",
        feature = "connect",
        feature = "health",
        feature = "lifecycle",
        feature = "limit"
    ))]
    pub(crate) fn permit(&self, token: Token) -> Permit<T> {
        Permit::new(Giver::Counted(self.clone()), token)
    }
}

impl<T: ?Sized> Shared<T> {
    /// Whether nobody else has it.
    #[cfg(feature = "breaker")]
    pub(crate) fn is_unshared(&self) -> bool {
        Arc::strong_count(&self.0) == 1
    }

    /// A reference that does not keep the state alive.
    #[cfg(feature = "health")]
    pub(crate) fn downgrade(&self) -> std::sync::Weak<T> {
        Arc::downgrade(&self.0)
    }
}

impl<T: fmt::Debug + ?Sized> fmt::Debug for Shared<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        (**self).fmt(f)
    }
}

impl<T: ?Sized> Clone for Shared<T> {
    #[inline]
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<T: ?Sized> Deref for Shared<T> {
    type Target = T;

    #[inline]
    fn deref(&self) -> &T {
        &self.0
    }
}

/// Who gave a permit, as the permit has it.
pub(crate) enum Giver<T: ?Sized + 'static> {
    /// Lives as long as its permits.
    Counted(Shared<T>),
    /// Lives for ever: its permits need not count, which saves two atomics a call.
    Lasting(&'static T),
}

impl<T: Finish> Giver<T> {
    fn erase(self) -> Giver<dyn Finish> {
        match self {
            Self::Counted(state) => Giver::Counted(state.erase()),
            Self::Lasting(state) => Giver::Lasting(state),
        }
    }
}

impl<T: ?Sized> Clone for Giver<T> {
    #[inline]
    fn clone(&self) -> Self {
        match self {
            Self::Counted(state) => Self::Counted(state.clone()),
            Self::Lasting(state) => Self::Lasting(state),
        }
    }
}

impl<T: ?Sized> Deref for Giver<T> {
    type Target = T;

    #[inline]
    fn deref(&self) -> &T {
        match self {
            Self::Counted(state) => state,
            Self::Lasting(state) => state,
        }
    }
}

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
pub struct Permit<T: Finish + ?Sized = dyn Finish> {
    state: Option<Giver<T>>,
    token: Token,
    drop_as: Outcome,
}

impl<T: Finish + ?Sized> Permit<T> {
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
        if let Some(state) = self.state.take() {
            state.finish(self.token, outcome);
        }
    }

    /// Moves it on, and leaves a spent one behind. Not an `Option`: its niche, in the midst of the permit,
    /// would cost a stalled load a call.
    #[inline]
    pub(crate) fn take(&mut self) -> Self {
        Self { state: self.state.take(), token: self.token, drop_as: self.drop_as }
    }

    /// Tells the state what the head said.
    #[inline]
    pub(crate) fn head(&mut self, so_far: Outcome) {
        if let Some(state) = &self.state {
            state.head(&mut self.token, so_far);
        }
    }

    /// Who gave it, unless it is spent.
    #[cfg(feature = "breaker")]
    pub(crate) fn state(&self) -> Option<&T> {
        self.state.as_deref()
    }

    /// What it remembers of its admission.
    #[cfg(feature = "breaker")]
    #[inline]
    pub(crate) fn token(&self) -> Token {
        self.token
    }

    #[inline]
    pub(crate) fn hold(&self) -> Hold {
        self.state.as_ref().map_or(Hold::Head, |state| state.hold())
    }

    /// Runs the call's own code: if that panics, the call has failed.
    ///
    /// Asking the thread on drop would not do: a caller that panics while it holds a good answer
    /// unwinds through it, too.
    #[inline]
    pub(crate) fn guard<O>(&mut self, run: impl FnOnce() -> O) -> O {
        struct OnUnwind<'a, T: Finish + ?Sized>(&'a mut Permit<T>);

        impl<T: Finish + ?Sized> Drop for OnUnwind<'_, T> {
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

impl<T: Finish> Permit<T> {
    #[inline]
    pub(crate) fn new(state: Giver<T>, token: Token) -> Self {
        Self { state: Some(state), token, drop_as: Outcome::cancelled() }
    }

    /// Forgets which policy gave it.
    #[inline]
    pub(crate) fn erase(mut self) -> Permit {
        Permit {
            state: self.state.take().map(Giver::erase),
            token: self.token,
            drop_as: self.drop_as,
        }
    }
}

impl<T: Finish + ?Sized> Permit<T> {
    /// A permit that is spent already: for a call that has ended, or one that nobody counts.
    pub(crate) const fn hollow() -> Self {
        Self { state: None, token: Token { tag: 0, started: 0 }, drop_as: Outcome::cancelled() }
    }
}

impl<T: Finish + ?Sized> Drop for Permit<T> {
    #[inline]
    fn drop(&mut self) {
        if let Some(state) = self.state.take() {
            dropped(state, self.token, self.drop_as);
        }
    }
}

/// By value: a permit whose address nobody wants can stay in registers.
#[cold]
#[inline(never)]
fn dropped<T: Finish + ?Sized>(state: Giver<T>, token: Token, outcome: Outcome) {
    state.finish(token, outcome);
}

impl<T: Finish + ?Sized> fmt::Debug for Permit<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Permit")
            .field("spent", &self.state.is_none())
            .field("token", &self.token)
            .field("drop_as", &self.drop_as)
            .finish()
    }
}
