use std::{
    any::Any,
    fmt,
    marker::PhantomData,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
};

use super::free_list::Idle;

/// A weak reference to the state of a layer, for calls that rarely use it. It is `Copy`: a clone and a drop of an
/// `Arc` would be two atomic writes per call to a word that all threads share.
///
/// It refers to a leaked slot ([`Place`]) that the next layer uses after this layer has been dropped. Each use of the
/// slot has a generation of its own, so a reference finds the state only while the layer that created it exists. The
/// generation is read and changed under the lock of the slot.
pub(crate) struct Far<T> {
    place: &'static Place,
    generation: u64,
    of: PhantomData<fn() -> T>,
}

/// The registration of a state in a slot. The state itself contains it, so that dropping the state ends the
/// registration.
pub(crate) struct Found(&'static Place);

/// A slot.
#[derive(Default)]
struct Place(Mutex<Tenant>);

/// The content of a slot.
#[derive(Default)]
struct Tenant {
    /// The number of registrations that have ended.
    generation: u64,
    /// The registered state. `None` while the slot is on the free list.
    state: Option<Weak<dyn Any + Send + Sync>>,
}

/// Slots without a registered state.
static FREE: Idle<Place> = Idle::new();

impl Place {
    fn lock(&self) -> MutexGuard<'_, Tenant> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Found {
    /// Registers a state that is being constructed by [`Arc::new_cyclic`]. Lookups return `None` until it exists.
    pub(crate) fn at<T: Send + Sync + 'static>(state: &Weak<T>) -> Self {
        let place = FREE.take().unwrap_or_else(|| Box::leak(Box::default()));
        place.lock().state = Some(state.clone());
        Self(place)
    }

    /// Returns a reference to the state. `T` has to be the type that was registered: [`Far::get`] finds no other.
    pub(crate) fn far<T>(&self) -> Far<T> {
        Far { place: self.0, generation: self.0.lock().generation, of: PhantomData }
    }
}

impl Drop for Found {
    fn drop(&mut self) {
        {
            let mut tenant = self.0.lock();
            tenant.generation += 1;
            tenant.state = None;
        }
        FREE.keep(self.0);
    }
}

impl<T: Send + Sync + 'static> Far<T> {
    /// Returns the state, or `None` if the layer has been dropped. Takes the lock of the slot.
    pub(crate) fn get(&self) -> Option<Arc<T>> {
        let tenant = self.place.lock();
        let state = tenant.state.as_ref().filter(|_| tenant.generation == self.generation);
        let state = state.and_then(Weak::upgrade);
        // Release the lock first. If this is the last reference, dropping it locks the slot again.
        drop(tenant);
        state?.downcast().ok()
    }
}

impl<T> Clone for Far<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Far<T> {}

impl<T> fmt::Debug for Far<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Far")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct State {
        number: u32,
        found: Found,
    }

    fn state(number: u32) -> Arc<State> {
        Arc::new_cyclic(|weak| State { number, found: Found::at(weak) })
    }

    #[test]
    fn is_found_as_long_as_it_is_there_and_never_taken_for_the_next() {
        let one = state(1);
        let far: Far<State> = one.found.far();
        assert_eq!(far.get().map(|state| state.number), Some(1));
        drop(one);
        assert!(far.get().is_none());
        // One of these states may use the slot of the first. Other tests use slots, too.
        let more: Vec<_> = (2..20).map(state).collect();
        assert!(far.get().is_none(), "nobody else answers for it");
        assert!(more.iter().all(|state| state.found.far::<State>().get().is_some()));
    }

    #[test]
    fn the_last_way_to_it_may_be_a_call_of_its_own() {
        let one = state(1);
        let far: Far<State> = one.found.far();
        let held = far.get();
        drop(one);
        // The last reference is dropped outside of the lock of the slot, so this does not deadlock.
        drop(held);
        assert!(far.get().is_none());
    }
}
