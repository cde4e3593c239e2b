//! States with several reference counts, one per shard.
//!
//! Each call in flight holds a reference to the state of its layer. With one reference count, all threads would write
//! the same cache line twice per call. Here a call takes a reference to one of up to 16 shards, selected by its thread.
//! Each shard holds one reference to the state, so the state lives until the last call of every shard has ended and the
//! [`ShardedArc`] itself is dropped.
//!
//! ```text
//! ShardedArc ─▶ Shards ─┬─▶ Arc ──────────────────────────▶ state
//!                       ├─▶ ShardedRef ─▶ Shard (count) ──▶ state
//!                       └─▶ ShardedRef ─▶ Shard (count) ──▶ state
//! a call ─────────────────▶ ShardedRef ─▶ one of these shards
//! ```

use std::{
    fmt,
    ops::Deref,
    ptr,
    sync::{Arc, OnceLock},
    thread,
};

use super::release::Release;

/// A state whose calls are counted in shards. Calls on threads with different shards write no common cache
/// line. Its own clones, one per service, share one count.
pub(crate) struct ShardedArc<T>(Arc<Shards<T>>);

struct Shards<T> {
    state: Arc<T>,
    /// The first shard. It is a field of its own, so that the choice of a shard cannot fail.
    first: ShardedRef<T>,
    /// The other shards. Their number is a power of two less one, so it serves as the mask of a shard's index.
    others: Box<[ShardedRef<T>]>,
}

/// A shard: a reference to the state, with a reference count of its own. The alignment prevents false sharing.
#[repr(align(128))]
struct Shard<T>(Arc<T>);

impl<T> ShardedArc<T> {
    pub(crate) fn new(state: T) -> Self {
        let state = Arc::new(state);
        let first = ShardedRef::of(state.clone());
        let others = (1..shard_count()).map(|_| ShardedRef::of(state.clone())).collect();
        Self(Arc::new(Shards { state, first, others }))
    }

    /// Returns a reference for one call. It keeps the state alive.
    #[inline]
    pub(crate) fn lease(&self) -> ShardedRef<T> {
        let Shards { first, others, .. } = &*self.0;
        // No panic: with an unwind path here, the compiler copies the future of the call once more.
        others.get(thread_number() & others.len()).unwrap_or(first).clone()
    }

    /// Returns the state. A clone of it is counted in the state's own reference count.
    pub(crate) fn state(&self) -> &Arc<T> {
        &self.0.state
    }
}

impl<T> Clone for ShardedArc<T> {
    #[inline]
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<T> Deref for ShardedArc<T> {
    type Target = T;

    #[inline]
    fn deref(&self) -> &T {
        &self.0.state
    }
}

impl<T: fmt::Debug> fmt::Debug for ShardedArc<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        (**self).fmt(f)
    }
}

impl<T> Deref for Shard<T> {
    type Target = T;

    #[inline]
    fn deref(&self) -> &T {
        &self.0
    }
}

/// A reference to a shard of a [`ShardedArc`] state, held by one call.
pub(crate) struct ShardedRef<T>(Arc<Shard<T>>);

impl<T> ShardedRef<T> {
    fn of(state: Arc<T>) -> Self {
        Self(Arc::new(Shard(state)))
    }
}

impl<T: Release> ShardedRef<T> {
    /// Returns the shard as an owner of a permit whose type can be erased.
    #[inline]
    pub(super) fn into_shard(self) -> Arc<impl Release> {
        self.0
    }
}

impl<T> ShardedRef<T> {
    /// Returns a state with a single shard, for states that exist in large numbers.
    pub(crate) fn alone(state: T) -> Self {
        Self::of(Arc::new(state))
    }

    /// Returns the state. A clone of it is counted in the state's own reference count.
    pub(crate) fn state(&self) -> &Arc<T> {
        &self.0.0
    }

    /// Returns whether there is another reference to the shard or to its state. The result may be outdated at once.
    pub(crate) fn is_shared(&self) -> bool {
        Arc::strong_count(&self.0) > 1 || Arc::strong_count(&self.0.0) > 1
    }

    /// Returns whether this is the only reference to the shard and to its state, weak references included. If so, all
    /// writes through dropped references are visible: [`Arc::get_mut`] acquires what their drops released.
    pub(crate) fn is_unshared(&mut self) -> bool {
        Arc::get_mut(&mut self.0).is_some_and(|only| Arc::get_mut(&mut only.0).is_some())
    }
}

impl<T> Clone for ShardedRef<T> {
    #[inline]
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<T> Deref for ShardedRef<T> {
    type Target = T;

    #[inline]
    fn deref(&self) -> &T {
        &self.0
    }
}

impl<T: fmt::Debug> fmt::Debug for ShardedRef<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        (**self).fmt(f)
    }
}

// ===== Selection of a shard =====

/// The maximum number of shards. Each occupies 256 bytes: 128 for the reference counts and 128 for the reference to the
/// state.
const MAX_SHARDS: usize = 16;

/// Returns the number of shards: the available parallelism, rounded up to a power of two, and at most [`MAX_SHARDS`].
fn shard_count() -> usize {
    static COUNT: OnceLock<usize> = OnceLock::new();
    *COUNT.get_or_init(|| {
        let threads = thread::available_parallelism().map_or(1, usize::from);
        threads.next_power_of_two().min(MAX_SHARDS)
    })
}

/// Returns a number whose lowest bits differ between most threads: the address of the stack in units of 2 MiB.
///
/// By default Rust gives each thread a stack of 2 MiB, so neighbouring stacks differ in the lowest bit. With other
/// stack sizes more threads select the same shard. The address costs one instruction. A thread-local number would cost
/// a lookup, and a branch for its initialisation.
///
/// The number may change between two calls of a thread. Only speed depends on it: a call releases the reference that it
/// holds, whichever shard that is of.
#[inline]
fn thread_number() -> usize {
    let here = 0_u8;
    ptr::from_ref(&here).addr() >> 21
}
