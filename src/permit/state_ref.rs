//! The owner of a permit: a reference to the state that issued it.
//!
//! A state must exist, or be found, until its last call has ended. There are two mechanisms (see the
//! [module](super)):
//!
//! | reference | mechanism | the state is freed |
//! |---|---|---|
//! | [`Arc`] | one reference count | with the last reference |
//! | [`ShardedRef`](super::sharded::ShardedRef) of a [`ShardedArc`](super::sharded::ShardedArc) | one reference count per shard; threads use different shards | with the last reference |
//! | `&'static` to a [`Slot`](super::slot::Slot) | no count: the slot is leaked | with the last counted reference; calls in flight do not keep it alive |
//!
//! A permit within a generic future has a [`StateRef`] of a concrete type, so that its release is inlined. A permit in
//! a response body is type-erased to a [`DynStateRef`], so that the body's type does not name the layer.

use std::{fmt, ops::Deref, sync::Arc, time::Duration};

use super::{
    release::{Measures, Release, ReleaseAt, Token},
    sharded::ShardedRef,
};
use crate::{
    outcome::{Outcome, WaitsFor},
    sealed::Sealed,
};

/// A reference to the state that issued a permit. It can be type-erased.
pub trait StateRef: Release + Into<DynStateRef> {}

impl<G: Release + Into<DynStateRef>> StateRef for G {}

/// Implements each method of [`Release`] by the same method of `$state`.
macro_rules! forward_release {
    ($($pattern:pat => $state:expr),+) => {
        #[inline]
        fn release(&self, token: Token, outcome: Outcome) {
            match self {
                $($pattern => $state.release(token, outcome)),+
            }
        }

        #[inline]
        fn record_head(&self, token: &mut Token, so_far: Outcome) {
            match self {
                $($pattern => $state.record_head(token, so_far)),+
            }
        }

        #[inline]
        fn release_at(&self) -> ReleaseAt {
            match self {
                $($pattern => $state.release_at()),+
            }
        }

        #[inline]
        fn measures(&self) -> Measures {
            match self {
                $($pattern => $state.measures()),+
            }
        }

        #[inline]
        fn count_cancelled_after(&self) -> Option<Duration> {
            match self {
                $($pattern => $state.count_cancelled_after()),+
            }
        }

        #[inline]
        fn follows_reader(&self, token: Token) -> bool {
            match self {
                $($pattern => $state.follows_reader(token)),+
            }
        }

        #[inline]
        fn watches_reader(&self, token: Token) -> bool {
            match self {
                $($pattern => $state.watches_reader(token)),+
            }
        }

        fn watch_reader(&self, token: &mut Token) -> bool {
            match self {
                $($pattern => $state.watch_reader(token)),+
            }
        }

        fn body_polled(&self, token: Token, frame: Option<usize>) -> bool {
            match self {
                $($pattern => $state.body_polled(token, frame)),+
            }
        }

        #[inline]
        fn waits_for(&self, token: Token, what: WaitsFor) {
            match self {
                $($pattern => $state.waits_for(token, what)),+
            }
        }
    };
}

impl<P: Deref<Target: Release>> Sealed for P {}

impl<P> Release for P
where
    P: Deref<Target: Release> + Send + Sync + 'static,
{
    forward_release!(state => (**state));
}

/// A reference to a state whose calls hold a shard, or to its slot. The layer chooses one of them for each call.
#[derive(Debug)]
pub(crate) enum ShardOrSlot<T, L: 'static = T> {
    /// A shard, which keeps the state alive.
    Shard(ShardedRef<T>),
    /// A leaked word.
    Slot(&'static L),
}

impl<T, L> Sealed for ShardOrSlot<T, L> {}

impl<T: Release, L: Release> Release for ShardOrSlot<T, L> {
    forward_release!(Self::Shard(state) => state, Self::Slot(slot) => slot);
}

/// A type-erased reference to a state.
pub enum DynStateRef {
    /// A reference-counted state, or a shard of one.
    Counted(Arc<dyn Release>),
    /// A slot.
    Slot(&'static dyn Release),
}

impl Deref for DynStateRef {
    type Target = dyn Release;

    #[inline]
    fn deref(&self) -> &Self::Target {
        match self {
            Self::Counted(state) => &**state,
            Self::Slot(slot) => *slot,
        }
    }
}

impl fmt::Debug for DynStateRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("DynStateRef")
    }
}

impl<T: Release> From<Arc<T>> for DynStateRef {
    #[inline]
    fn from(state: Arc<T>) -> Self {
        Self::Counted(state)
    }
}

impl<T: Release> From<ShardedRef<T>> for DynStateRef {
    #[inline]
    fn from(shard: ShardedRef<T>) -> Self {
        Self::Counted(shard.into_shard())
    }
}

impl<T: Release, L: Release> From<ShardOrSlot<T, L>> for DynStateRef {
    #[inline]
    fn from(state: ShardOrSlot<T, L>) -> Self {
        match state {
            ShardOrSlot::Shard(shard) => shard.into(),
            ShardOrSlot::Slot(slot) => Self::Slot(slot),
        }
    }
}
