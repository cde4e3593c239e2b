use std::{
    any::Any,
    fmt,
    marker::PhantomData,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
};

use super::Idle;

/// The way back to a layer's state, for calls that hardly ever need it: `Copy`, where a clone of an `Arc` is two
/// atomic operations a call that all threads do on one word.
///
/// It points to a place that is never freed but used again, by the next layer that is made after this one is
/// gone; the place's generation tells the two apart.
pub(crate) struct Far<T> {
    place: &'static Place,
    generation: u64,
    of: PhantomData<fn() -> T>,
}

/// Where a state is found as long as it keeps this. Goes into the state itself.
pub(crate) struct Found(&'static Place);

#[derive(Default)]
struct Place(Mutex<Tenant>);

#[derive(Default)]
struct Tenant {
    generation: u64,
    state: Option<Weak<dyn Any + Send + Sync>>,
}

/// Places that nobody is found at.
static FREE: Idle<Place> = Idle::new();

impl Place {
    fn lock(&self) -> MutexGuard<'_, Tenant> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Found {
    /// Lets `state` be found, which is being made: see [`Arc::new_cyclic`].
    pub(crate) fn at<T: Send + Sync + 'static>(state: &Weak<T>) -> Self {
        let place = FREE.take().unwrap_or_else(|| Box::leak(Box::default()));
        place.lock().state = Some(state.clone());
        Self(place)
    }

    /// The way to it. Only for the state's own type.
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
    /// The state, if the layer is still there. Takes a short lock.
    pub(crate) fn get(&self) -> Option<Arc<T>> {
        let tenant = self.place.lock();
        let state = tenant.state.as_ref().filter(|_| tenant.generation == self.generation);
        let state = state.and_then(Weak::upgrade);
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
        // Whether or not they get its place: other tests take places too.
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
        // Dropped outside of the place's lock: no deadlock.
        drop(held);
        assert!(far.get().is_none());
    }
}
