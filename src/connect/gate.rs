//! So many places, fairly handed on, and resized while they are taken.
//!
//! tokio's semaphore cannot shrink below the permits that are taken. A smaller limit therefore forgets the free permits
//! at once, and records in `owed` the number of permits that are still to be forgotten. A released permit decreases
//! `owed` if it is above zero, and becomes free otherwise. Freeing a permit wakes a caller, and wakers are user code,
//! so no lock may be held there.
//!
//! `leave` reads `owed`, adds a permit, and reads `owed` again. `resize` and `settle` read the free permits after they
//! have raised `owed`. A `SeqCst` fence between the write and the read on both sides guarantees that at least one side
//! observes the write of the other. A change must preserve this: otherwise a permit stays free beyond the limit.

use std::sync::{
    Arc, Mutex, MutexGuard, PoisonError,
    atomic::{AtomicUsize, Ordering::SeqCst, fence},
};

use tokio::sync::Semaphore;

/// The number of places that stands for no limit.
pub(super) const NO_LIMIT: usize = Semaphore::MAX_PERMITS / 2;

/// A semaphore that can shrink: first come, first served, and nobody who goes takes a place along.
#[derive(Debug)]
pub(super) struct Gate {
    places: Semaphore,
    /// The number of permits in use that are forgotten on release instead of becoming free.
    owed: AtomicUsize,
    /// Serialises the changes of the limit. No waker runs under this lock.
    limit: Mutex<usize>,
}

impl Gate {
    pub(super) fn new(limit: usize) -> Arc<Self> {
        let limit = limit.min(NO_LIMIT);
        let (places, owed) = (Semaphore::new(limit), AtomicUsize::new(0));
        Arc::new(Self { places, owed, limit: Mutex::new(limit) })
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
        if self.pay(1) == 0 {
            self.add(1);
        }
    }

    /// Decreases `owed` by at most this number of permits. Returns by how many.
    fn pay(&self, permits: usize) -> usize {
        let pay = |owed: usize| (owed > 0).then(|| owed - owed.min(permits));
        self.owed.fetch_update(SeqCst, SeqCst, pay).map_or(0, |owed| owed.min(permits))
    }

    /// Frees permits and wakes the callers that get them.
    fn add(&self, permits: usize) {
        self.places.add_permits(permits);
        fence(SeqCst);
        if self.owed.load(SeqCst) > 0 {
            // The limit was lowered meanwhile.
            self.settle(&self.limit());
        }
    }

    /// Forgets free permits, as many as are owed. The guard serialises this with [`resize`](Self::resize).
    fn settle(&self, _limit: &MutexGuard<'_, usize>) {
        while self.pay(1) == 1 {
            if self.places.forget_permits(1) == 1 {
                continue;
            }
            // After `owed` was decreased, a released permit may have become free instead of decreasing it.
            self.owed.fetch_add(1, SeqCst);
            fence(SeqCst);
            if self.places.available_permits() == 0 {
                return;
            }
        }
    }

    fn limit(&self) -> MutexGuard<'_, usize> {
        self.limit.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// More places are there at once; fewer as they become free.
    pub(super) fn resize(&self, limit: usize) {
        let new = limit.min(NO_LIMIT);
        let mut limit = self.limit();
        let before = std::mem::replace(&mut *limit, new);
        if new <= before {
            let fewer = before - new;
            let forgotten = self.places.forget_permits(fewer);
            self.owed.fetch_add(fewer - forgotten, SeqCst);
            fence(SeqCst);
            if self.places.available_permits() > 0 {
                self.settle(&limit);
            }
            return;
        }
        let added = new - before - self.pay(new - before);
        drop(limit);
        if added > 0 {
            self.add(added);
        }
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

    #[test]
    fn limit_holds_after_it_was_changed_while_permits_were_released() {
        for _ in 0..200 {
            let gate = Gate::new(8);
            std::thread::scope(|scope| {
                for _ in 0..2 {
                    scope.spawn(|| {
                        for _ in 0..50 {
                            drop((gate.try_enter(), gate.try_enter()));
                        }
                    });
                }
                scope.spawn(|| (0..50).for_each(|nth| gate.resize([1, 8, 3, 5][nth % 4])));
            });
            gate.resize(2);
            assert_eq!(gate.owed.load(SeqCst), 0, "no permit is in use");
            let taken: Vec<_> = (0..9).map_while(|_| gate.try_enter()).collect();
            assert_eq!(taken.len(), 2);
        }
    }

    /// A waker that uses the gate.
    struct UsesGate(Arc<Gate>);

    impl std::task::Wake for UsesGate {
        fn wake(self: Arc<Self>) {
            self.0.resize(5);
            self.0.resize(2);
            drop(self.0.try_enter());
            assert!(self.0.owed.load(SeqCst) < 5);
        }
    }

    #[test]
    fn waker_may_use_the_gate_that_wakes_it() {
        let (ended, end) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            let gate = Gate::new(1);
            let waker = Arc::new(UsesGate(gate.clone())).into();
            let mut cx = std::task::Context::from_waker(&waker);
            for free in [false, true] {
                let place = gate.try_enter().expect("free");
                let mut queued = pin!(gate.enter());
                assert!(queued.as_mut().poll(&mut cx).is_pending());
                if free {
                    drop(place);
                } else {
                    gate.resize(2);
                    drop(place);
                }
                assert!(queued.as_mut().poll(&mut cx).is_ready());
                gate.resize(1);
            }
            let _ = ended.send(());
        });
        end.recv_timeout(std::time::Duration::from_secs(30)).expect("no deadlock");
    }
}
