//! How a layer's state is reached: by services and handles, and by the calls under way, whose permits end at it.
//!
//! A state lives until the last of its calls is over. To count them in one word is plain, and costs two threads that
//! both write it more than all the rest of a call. So there are three ways: [`Shared`], here, counts in one word;
//! what is `striped` counts in a word for each of several groups of threads; and for what is `lasting` nobody counts.

#[cfg(any(feature = "breaker", feature = "health", feature = "lifecycle", feature = "limit"))]
use std::sync::Weak;
use std::{fmt, ops::Deref, sync::Arc, time::Duration};

use super::{Finish, Hold, Measures, Outcome, Permit, Token, WaitsFor};

/// Who gave a permit, as the permit has it.
pub trait Giver: Finish + Into<AnyGiver> {}

impl<G: Finish + Into<AnyGiver>> Giver for G {}

/// Whatever leads to a state tells it what it is told.
impl<P> Finish for P
where
    P: Deref<Target: Finish> + Send + Sync + 'static,
{
    #[inline]
    fn finish(&self, token: Token, outcome: Outcome) {
        (**self).finish(token, outcome);
    }

    #[inline]
    fn head(&self, token: &mut Token, so_far: Outcome) {
        (**self).head(token, so_far);
    }

    #[inline]
    fn hold(&self) -> Hold {
        (**self).hold()
    }

    #[inline]
    fn measures(&self) -> Measures {
        (**self).measures()
    }

    #[inline]
    fn count_cancelled_after(&self) -> Option<Duration> {
        (**self).count_cancelled_after()
    }

    #[inline]
    fn follows_reader(&self, token: Token) -> bool {
        (**self).follows_reader(token)
    }

    #[inline]
    fn watches_reader(&self, token: Token) -> bool {
        (**self).watches_reader(token)
    }

    fn watch_reader(&self, token: &mut Token) -> bool {
        (**self).watch_reader(token)
    }

    fn body_polled(&self, token: Token, frame: Option<usize>) -> bool {
        (**self).body_polled(token, frame)
    }

    #[inline]
    fn waits_for(&self, token: Token, what: WaitsFor) {
        (**self).waits_for(token, what);
    }
}

/// A giver of which nobody knows any more what it is.
pub enum AnyGiver {
    Counted(Arc<dyn Finish>),
    Lasting(&'static dyn Finish),
}

impl Deref for AnyGiver {
    type Target = dyn Finish;

    #[inline]
    fn deref(&self) -> &Self::Target {
        match self {
            Self::Counted(state) => &**state,
            Self::Lasting(state) => *state,
        }
    }
}

impl fmt::Debug for AnyGiver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("AnyGiver")
    }
}

/// A state that lives as long as somebody has it.
pub struct Shared<T>(pub(super) Arc<T>);

impl<T> Shared<T> {
    pub(crate) fn new(state: T) -> Self {
        Self(Arc::new(state))
    }

    /// A reference that does not keep the state alive.
    #[cfg(any(feature = "breaker", feature = "health", feature = "lifecycle", feature = "limit"))]
    pub(crate) fn downgrade(&self) -> Weak<T> {
        Arc::downgrade(&self.0)
    }
}

impl<T: Finish> Shared<T> {
    /// The right to make one call, given by this state.
    #[cfg(any(feature = "connect", feature = "health", feature = "limit"))]
    pub(crate) fn permit(&self, token: Token) -> Permit<Self> {
        Permit::new(self.clone(), token)
    }
}

impl<T: fmt::Debug> fmt::Debug for Shared<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        (**self).fmt(f)
    }
}

impl<T> Clone for Shared<T> {
    #[inline]
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<T> Deref for Shared<T> {
    type Target = T;

    #[inline]
    fn deref(&self) -> &T {
        &self.0
    }
}

impl<T: Finish> From<Shared<T>> for AnyGiver {
    #[inline]
    fn from(state: Shared<T>) -> Self {
        Self::Counted(state.0)
    }
}
