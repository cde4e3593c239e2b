//! So many places, fairly handed on, and resized while they are taken.

use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::Semaphore;

/// The number of places that stands for no limit.
pub(super) const NO_LIMIT: usize = Semaphore::MAX_PERMITS / 2;

/// A semaphore that can shrink: first come, first served, and nobody who goes takes a place along.
#[derive(Debug)]
pub(super) struct Gate {
    places: Semaphore,
    size: Mutex<Size>,
}

#[derive(Debug)]
struct Size {
    limit: usize,
    /// Places that are taken and will not come back.
    owed: usize,
}

impl Gate {
    pub(super) fn new(limit: usize) -> Arc<Self> {
        let limit = limit.min(NO_LIMIT);
        Arc::new(Self { places: Semaphore::new(limit), size: Mutex::new(Size { limit, owed: 0 }) })
    }

    /// A place, if one is free and nobody waits for it.
    pub(super) fn try_enter(self: &Arc<Self>) -> Option<Place> {
        self.places.try_acquire().ok()?.forget();
        Some(Place { gate: self.clone(), is_kept: false })
    }

    /// Whether a place is free.
    pub(super) fn has_room(&self) -> bool {
        self.places.available_permits() > 0
    }

    /// The next place that is free.
    pub(super) async fn enter(self: &Arc<Self>) -> Place {
        // Never closed: with an error there would be no place to give back, which is right as well.
        if let Ok(permit) = self.places.acquire().await {
            permit.forget();
        }
        Place { gate: self.clone(), is_kept: false }
    }

    /// Gives back a place that was [kept](Place::keep).
    pub(super) fn leave(&self) {
        let mut size = self.size.lock().unwrap_or_else(PoisonError::into_inner);
        if size.owed > 0 {
            size.owed -= 1;
        } else {
            self.places.add_permits(1);
        }
    }

    /// More places are there at once; fewer as they become free.
    pub(super) fn resize(&self, limit: usize) {
        let limit = limit.min(NO_LIMIT);
        let mut size = self.size.lock().unwrap_or_else(PoisonError::into_inner);
        if limit > size.limit {
            let more = limit - size.limit;
            let paid = more.min(size.owed);
            size.owed -= paid;
            self.places.add_permits(more - paid);
        } else {
            let fewer = size.limit - limit;
            size.owed += fewer - self.places.forget_permits(fewer);
        }
        size.limit = limit;
    }
}

/// A place, given back on drop.
#[derive(Debug)]
pub(super) struct Place {
    gate: Arc<Gate>,
    is_kept: bool,
}

impl Place {
    /// Somebody else will give it back.
    pub(super) fn keep(mut self) {
        self.is_kept = true;
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if !self.is_kept {
            self.gate.leave();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::pin::pin;

    use tokio_test::{assert_pending, assert_ready, task::spawn};

    use super::*;

    #[test]
    fn shrinks_as_places_come_back_and_grows_at_once() {
        let gate = Gate::new(3);
        let mut taken: Vec<_> = (0..3).map_while(|_| gate.try_enter()).collect();
        gate.resize(1);
        taken.pop();
        taken.pop();
        assert!(gate.try_enter().is_none(), "one is still in, and one is all there may be");
        gate.resize(2);
        taken.push(gate.try_enter().unwrap());
        assert!(gate.try_enter().is_none());
        drop(taken);
        let taken: Vec<_> = (0..9).map_while(|_| gate.try_enter()).collect();
        assert_eq!(taken.len(), 2);
    }

    #[test]
    fn a_limit_set_where_there_was_none_counts_who_is_in() {
        let gate = Gate::new(NO_LIMIT);
        let taken: Vec<_> = (0..5).map_while(|_| gate.try_enter()).collect();
        gate.resize(3);
        assert!(gate.try_enter().is_none());
        drop(taken);
        assert_eq!((0..9).map_while(|_| gate.try_enter()).collect::<Vec<_>>().len(), 3);
        gate.resize(usize::MAX);
        assert!(gate.try_enter().is_some());
    }

    #[test]
    fn who_leaves_the_line_takes_nothing_along_and_nobody_overtakes() {
        let gate = Gate::new(1);
        let place = gate.try_enter().unwrap();
        let mut gone = spawn(gate.enter());
        assert_pending!(gone.poll());
        let mut next = spawn(gate.enter());
        assert_pending!(next.poll());
        drop(place);
        // It is the first one's, who goes without looking.
        assert!(gate.try_enter().is_none());
        assert_pending!(next.poll());
        drop(gone);
        let place = assert_ready!(next.poll());
        assert!(gate.try_enter().is_none());
        drop((place, pin!(next)));
        assert!(gate.try_enter().is_some());
    }
}
