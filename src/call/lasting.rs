//! States whose calls nobody counts: what they end at is never given back.

use std::sync::{Mutex, MutexGuard, PoisonError};

use super::{AnyGiver, Finish, Hold, Lease, Outcome, Token};

/// Memory for states that is never given back, and used for another one once it is idle: as much of it as there
/// ever were such states at once.
pub(crate) struct Idle<T: 'static>(Mutex<Vec<&'static T>>);

impl<T> Idle<T> {
    pub(crate) const fn new() -> Self {
        Self(Mutex::new(Vec::new()))
    }

    /// One that nobody uses, if there is one.
    pub(crate) fn take(&self) -> Option<&'static T> {
        self.list().pop()
    }

    /// Nobody uses it any more.
    pub(crate) fn keep(&self, idle: &'static T) {
        self.list().push(idle);
    }

    fn list(&self) -> MutexGuard<'_, Vec<&'static T>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What permits end at whose state is striped, or lasts.
#[derive(Debug)]
pub enum Anchor<T, L: 'static = T> {
    Counted(Lease<T>),
    Lasting(&'static L),
}

impl<T: Finish, L: Finish> Finish for Anchor<T, L> {
    #[inline]
    fn finish(&self, token: Token, outcome: Outcome) {
        match self {
            Self::Counted(state) => state.finish(token, outcome),
            Self::Lasting(state) => state.finish(token, outcome),
        }
    }

    #[inline]
    fn head(&self, token: &mut Token, so_far: Outcome) {
        match self {
            Self::Counted(state) => state.head(token, so_far),
            Self::Lasting(state) => state.head(token, so_far),
        }
    }

    #[inline]
    fn hold(&self) -> Hold {
        match self {
            Self::Counted(state) => state.hold(),
            Self::Lasting(state) => state.hold(),
        }
    }
}

impl<T: Finish, L: Finish> From<Anchor<T, L>> for AnyGiver {
    #[inline]
    fn from(anchor: Anchor<T, L>) -> Self {
        match anchor {
            Anchor::Counted(state) => state.into(),
            Anchor::Lasting(state) => Self::Lasting(state),
        }
    }
}
