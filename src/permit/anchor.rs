use std::time::Duration;

use super::{
    permit::{Measures, Release, ReleaseAt, Token},
    sharded::ShardedRef,
    state_ref::AnyGiver,
};
use crate::outcome::{Outcome, WaitsFor};

/// The owner of a permit of a layer whose state is either [sharded](super::sharded::ShardedArc) or [leaked](super::slot).
///
/// It forwards each method to the state.
#[derive(Debug)]
pub enum Anchor<T, L: 'static = T> {
    /// A reference to a shard of a reference-counted state.
    Counted(ShardedRef<T>),
    /// A leaked state.
    Lasting(&'static L),
}

impl<T: Release, L: Release> Release for Anchor<T, L> {
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
    fn hold(&self) -> ReleaseAt {
        match self {
            Self::Counted(state) => state.hold(),
            Self::Lasting(state) => state.hold(),
        }
    }

    #[inline]
    fn measures(&self) -> Measures {
        match self {
            Self::Counted(state) => state.measures(),
            Self::Lasting(state) => state.measures(),
        }
    }

    #[inline]
    fn count_cancelled_after(&self) -> Option<Duration> {
        match self {
            Self::Counted(state) => state.count_cancelled_after(),
            Self::Lasting(state) => state.count_cancelled_after(),
        }
    }

    #[inline]
    fn follows_reader(&self, token: Token) -> bool {
        match self {
            Self::Counted(state) => state.follows_reader(token),
            Self::Lasting(state) => state.follows_reader(token),
        }
    }

    #[inline]
    fn watches_reader(&self, token: Token) -> bool {
        match self {
            Self::Counted(state) => state.watches_reader(token),
            Self::Lasting(state) => state.watches_reader(token),
        }
    }

    fn watch_reader(&self, token: &mut Token) -> bool {
        match self {
            Self::Counted(state) => state.watch_reader(token),
            Self::Lasting(state) => state.watch_reader(token),
        }
    }

    fn body_polled(&self, token: Token, frame: Option<usize>) -> bool {
        match self {
            Self::Counted(state) => state.body_polled(token, frame),
            Self::Lasting(state) => state.body_polled(token, frame),
        }
    }

    #[inline]
    fn waits_for(&self, token: Token, what: WaitsFor) {
        match self {
            Self::Counted(state) => state.waits_for(token, what),
            Self::Lasting(state) => state.waits_for(token, what),
        }
    }
}

impl<T: Release, L: Release> From<Anchor<T, L>> for AnyGiver {
    #[inline]
    fn from(anchor: Anchor<T, L>) -> Self {
        match anchor {
            Anchor::Counted(state) => state.into(),
            Anchor::Lasting(state) => Self::Lasting(state),
        }
    }
}
