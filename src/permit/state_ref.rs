//! References to the state of a layer. Services and handles hold one, and so does the permit of each call in flight.
//!
//! A state lives until its last call has ended. A single reference count is simple, but two threads that both write it
//! spend more time on it than on the rest of the call. There are therefore three kinds of references:
//!
//! | kind | reference count | the state is freed |
//! |---|---|---|
//! | [`Arc`] | one | with the last reference |
//! | [`ShardedRef`](super::sharded::ShardedRef) of a [`ShardedArc`](super::sharded::ShardedArc) state | one per shard; threads use different shards | with the last reference |
//! | `&'static` to a [leaked](super::slot) state | none | never: its owner returns it to a free list |
//!
//! The third kind needs no count of its own because the state counts its calls anyway, or because a generation in the
//! token distinguishes a call of an earlier owner from a call of the current one.
//!
//! A permit within a generic future has a [`Giver`] of a concrete type. A permit in a response body is type-erased to
//! an [`AnyGiver`], so that the body's type does not name the layer.

use std::{fmt, ops::Deref, sync::Arc, time::Duration};

use super::permit::{Measures, Release, ReleaseAt, Token};
use crate::outcome::{Outcome, WaitsFor};

/// The owner of a permit: a reference to the state that issued it. It can be type-erased.
pub trait Giver: Release + Into<AnyGiver> {}

impl<G: Release + Into<AnyGiver>> Giver for G {}

/// Forwards to the pointee.
impl<P> Release for P
where
    P: Deref<Target: Release> + Send + Sync + 'static,
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
    fn hold(&self) -> ReleaseAt {
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

/// A type-erased owner of a permit.
pub enum AnyGiver {
    /// A reference-counted state, or a shard that refers to it.
    Counted(Arc<dyn Release>),
    /// A leaked state.
    Lasting(&'static dyn Release),
}

impl Deref for AnyGiver {
    type Target = dyn Release;

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

impl<T: Release> From<Arc<T>> for AnyGiver {
    #[inline]
    fn from(state: Arc<T>) -> Self {
        Self::Counted(state)
    }
}
