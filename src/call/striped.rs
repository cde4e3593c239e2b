//! States whose calls are counted in several words.

use std::{
    fmt,
    ops::Deref,
    ptr,
    sync::{Arc, OnceLock},
    thread,
};

use super::{AnyGiver, Finish, Shared};

/// A [`Shared`] state whose calls are counted apart, each group of threads by itself: what two threads do does not
/// meet. Clones of it, of which each service has one, are counted together.
pub(crate) struct Striped<T>(Arc<Stripes<T>>);

struct Stripes<T> {
    state: Shared<T>,
    first: Lease<T>,
    /// One less than a power of two, so that their number is a mask.
    others: Box<[Lease<T>]>,
}

/// One of the words that calls are counted in, apart from the next, and where it leads.
#[repr(align(128))]
struct Stripe<T>(Shared<T>);

impl<T> Striped<T> {
    pub(crate) fn new(state: T) -> Self {
        let state = Shared::new(state);
        let first = Lease::of(state.clone());
        let others = (1..count()).map(|_| Lease::of(state.clone())).collect();
        Self(Arc::new(Stripes { state, first, others }))
    }

    /// For one call, which keeps the state alive.
    #[inline]
    pub(crate) fn lease(&self) -> Lease<T> {
        let Stripes { first, others, .. } = &*self.0;
        // Nothing here can panic: a call's future would be moved to be ready for that.
        others.get(own() & others.len()).unwrap_or(first).clone()
    }

    /// The state alone, without a count of its calls.
    #[cfg(any(feature = "breaker", feature = "lifecycle", feature = "limit"))]
    pub(crate) fn state(&self) -> &Shared<T> {
        &self.0.state
    }
}

impl<T> Clone for Striped<T> {
    #[inline]
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<T> Deref for Striped<T> {
    type Target = T;

    #[inline]
    fn deref(&self) -> &T {
        &self.0.state
    }
}

impl<T: fmt::Debug> fmt::Debug for Striped<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        (**self).fmt(f)
    }
}

impl<T> Deref for Stripe<T> {
    type Target = T;

    #[inline]
    fn deref(&self) -> &T {
        &self.0
    }
}

/// What one call has of a [`Striped`] state.
pub struct Lease<T>(Arc<Stripe<T>>);

impl<T> Lease<T> {
    fn of(state: Shared<T>) -> Self {
        Self(Arc::new(Stripe(state)))
    }
}

#[cfg(feature = "breaker")]
impl<T> Lease<T> {
    /// A state whose calls are all counted in this one word: for what there are many of.
    pub(crate) fn alone(state: T) -> Self {
        Self::of(Shared::new(state))
    }

    /// The state, without a count of its calls.
    pub(crate) fn state(&self) -> &Shared<T> {
        &self.0.0
    }

    /// Returns whether there is another reference to it or to its state. The result may be outdated at once.
    pub(crate) fn is_shared(&self) -> bool {
        Arc::strong_count(&self.0) > 1 || Arc::strong_count(&self.0.0.0) > 1
    }

    /// Whether nobody else has it or its state. What those who had it did to the state is seen from here on.
    pub(crate) fn is_unshared(&mut self) -> bool {
        Arc::get_mut(&mut self.0).is_some_and(|only| Arc::get_mut(&mut only.0.0).is_some())
    }
}

impl<T> Clone for Lease<T> {
    #[inline]
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<T> Deref for Lease<T> {
    type Target = T;

    #[inline]
    fn deref(&self) -> &T {
        &self.0
    }
}

impl<T: fmt::Debug> fmt::Debug for Lease<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        (**self).fmt(f)
    }
}

impl<T: Finish> From<Lease<T>> for AnyGiver {
    #[inline]
    fn from(lease: Lease<T>) -> Self {
        Self::Counted(lease.0)
    }
}

// ===== Which word =====

/// More groups of threads than that are not told apart: each costs 256 bytes, a line of a cache for the count and one
/// for where it leads.
const MOST: usize = 16;

/// How many words there are: a power of two, for as many threads as run at once.
fn count() -> usize {
    static COUNT: OnceLock<usize> = OnceLock::new();
    *COUNT.get_or_init(|| {
        let threads = thread::available_parallelism().map_or(1, usize::from);
        threads.next_power_of_two().min(MOST)
    })
}

/// A number that threads mostly differ in, in its lowest bits: where their stacks are, which are 2 MiB each, one beside
/// the other, unless somebody has asked for others: then more of them meet. It costs an instruction, where a number of the
/// thread's own would be a lookup, and a branch for the first.
/// It may change from one call to the next; nothing but time depends on it.
#[inline]
fn own() -> usize {
    let here = 0_u8;
    ptr::from_ref(&here).addr() >> 21
}
