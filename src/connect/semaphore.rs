//! A fair semaphore whose limit can change while permits are in use.
//!
//! tokio's semaphore cannot shrink below the permits that are in use. If the limit is lowered, the free permits are
//! therefore forgotten at once, and `owed` records the number of permits in use that are still to be forgotten.
//! Releasing a permit decreases `owed` if it is above zero, and frees the permit otherwise. Freeing a permit wakes a
//! caller, and wakers are user code, so no lock may be held there.
//!
//! `leave` reads `owed`, adds a permit, and reads `owed` again. `resize` and `settle` raise `owed`, and then read the
//! number of free permits. On both sides a `SeqCst` fence is between the write and the read, so at least one side
//! observes the write of the other, and corrects the sum. A change must preserve this order. Otherwise a permit stays
//! free beyond the limit.

use std::sync::{
    Arc, Mutex, MutexGuard, PoisonError,
    atomic::{AtomicUsize, Ordering::SeqCst, fence},
};

use tokio::sync::Semaphore;

/// The number of permits that means no limit.
pub(super) const NO_LIMIT: usize = Semaphore::MAX_PERMITS / 2;

/// A semaphore that can shrink. Callers get permits first come, first served. A caller that stops waiting passes the
/// permit that it may have been assigned to the next one.
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

    /// Acquires a permit if one is free. A released permit goes to a caller in the queue first, so this does not
    /// overtake.
    pub(super) fn try_enter(self: &Arc<Self>) -> Option<Place> {
        self.places.try_acquire().ok()?.forget();
        Some(Place { gate: self.clone(), is_kept: false })
    }

    /// Returns whether a permit is free.
    pub(super) fn has_room(&self) -> bool {
        self.places.available_permits() > 0
    }

    /// Waits for a permit.
    pub(super) async fn enter(self: &Arc<Self>) -> Place {
        // The semaphore is never closed, so `acquire` does not fail.
        if let Ok(permit) = self.places.acquire().await {
            permit.forget();
        }
        Place { gate: self.clone(), is_kept: false }
    }

    /// Releases a permit that was [kept](Place::keep).
    pub(super) fn leave(&self) {
        if self.pay(1) == 0 {
            self.add(1);
        }
    }

    /// Decreases `owed` by this number of permits, but not below zero. Returns the decrease.
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

    /// Forgets as many free permits as are owed. The guard serialises this with [`resize`](Self::resize).
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

    /// Changes the limit. A higher limit frees permits at once. A lower limit forgets the free permits at once and the
    /// ones in use on release.
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

/// A permit, released on drop.
#[derive(Debug)]
pub(super) struct Place {
    gate: Arc<Gate>,
    is_kept: bool,
}

impl Place {
    /// Leaves the release to a later call of [`Gate::leave`].
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
        assert!(gate.try_enter().is_none(), "one permit is in use, which is the limit");
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
        // The permit is assigned to the first caller of the queue, which is dropped without another poll.
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
